//! Cross-entropy of logits, with its gradient.

#[cfg(target_arch = "x86_64")]
use super::lanes::{self, Element};
use super::{check, check_machine};
use crate::KernelError;
use crate::product::{Out, Rows};
use crate::tasks::Run;
#[cfg(target_arch = "x86_64")]
use crate::tasks::each_of;

/// How a loss is computed from logits.
#[derive(Debug, Clone, Copy)]
pub struct CrossEntropy {
    /// Logits go through `cap * tanh(x / cap)`.
    pub cap: Option<f32>,
    /// Factor of the squared logarithm of a row's sum of exponentials.
    pub z_loss: f32,
}

/// Losses of rows.
#[derive(Debug)]
pub struct Losses<'a> {
    /// Cross-entropy with the z term, times the row's weight.
    pub loss: &'a mut [f32],
    /// The z term, times the row's weight.
    pub z: &'a mut [f32],
}

/// Losses of rows of logits `[rows, vocabulary]`, and the gradient of their sum by the logits. A target outside of the vocabulary is
/// never hit.
///
/// # Errors
/// When sizes or kinds do not agree.
pub fn cross_entropy(
    run: Run<'_>,
    how: &CrossEntropy,
    logits: Rows<'_>,
    targets: &[i32],
    weights: &[f32],
    losses: &mut Losses<'_>,
    d: &mut Out<'_>,
) -> Result<(), KernelError> {
    check_machine()?;
    let rows = targets.len();
    let width = logits.len() / rows.max(1);
    let sizes = [
        ("the logits", logits.len(), [rows, width]),
        ("the weights", weights.len(), [rows, 1]),
        ("the losses", losses.loss.len(), [rows, 1]),
        ("the z terms", losses.z.len(), [rows, 1]),
        ("the gradient", d.len(), [rows, width]),
    ];
    for (what, got, wanted) in sizes {
        check(what, got, wanted)?;
    }
    #[cfg(target_arch = "x86_64")]
    let given = Given { width, targets, weights };
    #[cfg(target_arch = "x86_64")]
    match (logits, d) {
        (Rows::F32(x), Out::F32(d)) => all(run, how, x, &given, losses, d),
        (Rows::Bf16(x), Out::Bf16(d)) => all(run, how, x, &given, losses, d),
        _ => return Err(KernelError::Mixed),
    }
    Ok(())
}

#[cfg(target_arch = "x86_64")]
struct Given<'a> {
    width: usize,
    targets: &'a [i32],
    weights: &'a [f32],
}

/// Rows of a share: few, so that all threads end together.
#[cfg(target_arch = "x86_64")]
const ROWS: usize = 4;

#[cfg(target_arch = "x86_64")]
fn all<T: Element>(run: Run<'_>, how: &CrossEntropy, x: &[T], given: &Given<'_>, to: &mut Losses<'_>, d: &mut [T]) {
    let width = given.width.max(1);
    let operands = x.chunks(ROWS * width).zip(given.targets.chunks(ROWS)).zip(given.weights.chunks(ROWS));
    let results = to.loss.chunks_mut(ROWS).zip(to.z.chunks_mut(ROWS)).zip(d.chunks_mut(ROWS * width));
    let room = || [vec![0.0; width], vec![0.0; width]];
    each_of(run, operands.zip(results), room, |room, (((x, targets), weights), ((loss, z), d))| {
        let operands = x.chunks_exact(width).zip(targets).zip(weights);
        let results = loss.iter_mut().zip(z).zip(d.chunks_exact_mut(width));
        for (((x, &target), &weight), ((loss, z), d)) in operands.zip(results) {
            let target = usize::try_from(target).ok().filter(|&t| t < width);
            (*loss, *z) = row(how, x, target, weight, room, d);
        }
    });
}

/// Loss, z term and gradient of a row.
#[cfg(target_arch = "x86_64")]
fn row<T: Element>(
    how: &CrossEntropy,
    x: &[T],
    target: Option<usize>,
    weight: f32,
    [logits, e]: &mut [Vec<f32>; 2],
    d: &mut [T],
) -> (f32, f32) {
    // SAFETY: the instructions are there, as has been checked.
    let (shift, sum) = unsafe {
        let most = lanes::logits(how.cap, x, logits);
        // A cap bounds the logits as well.
        let shift = how.cap.unwrap_or(most);
        (shift, lanes::exponentials(logits, shift, e))
    };
    let log_z = sum.ln() + shift;
    let z = log_z * log_z * how.z_loss;
    // d total / d logits = (softmax * (1 + 2 z_loss log_z) - hit) * weight
    let factor = (log_z * (2.0 * how.z_loss) + 1.0) * weight / sum;
    // SAFETY: as above.
    unsafe { lanes::by_logits(how.cap, logits, e, factor, d) };
    let mut hit = 0.0;
    if let Some(t) = target {
        hit = logits[t];
        let slope = how.cap.map_or(1.0, |cap| 1.0 - (hit / cap).powi(2));
        d[t] = T::rounded((e[t] * factor - weight) * slope);
    }
    ((log_z - hit + z) * weight, z * weight)
}
