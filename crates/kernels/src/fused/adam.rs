//! The update of a parameter by AdamW.

#[cfg(target_arch = "x86_64")]
use super::{
    SHARE,
    lanes::{self, Element},
    share,
};
use super::{check, check_machine};
use crate::KernelError;
use crate::product::Rows;
use crate::tasks::Run;

/// Constants of AdamW for one step.
#[derive(Debug, Clone, Copy)]
pub struct Adam {
    /// Decay of the first moment, and what is left of one.
    pub b1: [f32; 2],
    /// Decay of the second moment, and what is left of one.
    pub b2: [f32; 2],
    /// Added to the root of the second moment.
    pub eps: f32,
    /// Added to the second moment under the root.
    pub eps_root: f32,
    /// Weight decay.
    pub weight_decay: f32,
    /// Learning rate.
    pub learning_rate: f32,
    /// What moments are multiplied with for having begun at zero.
    pub corrections: [f32; 2],
    /// What gradients are multiplied with.
    pub factor: f32,
}

/// What a step changes, element by element.
#[derive(Debug)]
pub struct State<'a> {
    /// The parameter.
    pub parameter: &'a mut [f32],
    /// First moment.
    pub mu: &'a mut [f32],
    /// Second moment.
    pub nu: &'a mut [f32],
}

/// Makes a step; gives the sum of squares of the parameter after it.
///
/// # Errors
/// When sizes do not agree, or this machine lacks the instructions.
pub fn adam(run: Run<'_>, a: &Adam, state: State<'_>, gradient: Rows<'_>) -> Result<f32, KernelError> {
    let n = gradient.len();
    check_machine()?;
    for (what, got) in [("the parameter", state.parameter.len()), ("mu", state.mu.len()), ("nu", state.nu.len())] {
        check(what, got, [1, n])?;
    }
    #[cfg(target_arch = "x86_64")]
    return Ok(match gradient {
        Rows::F32(g) => step(run, a, state, g),
        Rows::Bf16(g) => step(run, a, state, g),
    });
    #[cfg(not(target_arch = "x86_64"))]
    Err(KernelError::Instructions)
}

#[cfg(target_arch = "x86_64")]
fn step<T: Element>(run: Run<'_>, a: &Adam, state: State<'_>, gradient: &[T]) -> f32 {
    let mut sums = vec![0.0; gradient.len().div_ceil(SHARE)];
    let State { parameter, mu, nu } = state;
    let moments = mu.chunks_mut(SHARE).zip(nu.chunks_mut(SHARE));
    let items = parameter.chunks_mut(SHARE).zip(moments).zip(gradient.chunks(SHARE)).zip(&mut sums);
    share(run, items, |(((p, (mu, nu)), gradient), sum)| {
        // SAFETY: the instructions are there, as has been checked.
        *sum = unsafe { lanes::adam(a, p, mu, nu, gradient) };
    });
    sums.iter().sum::<f64>() as f32
}

/// The sum of squares of all elements.
///
/// # Errors
/// When this machine lacks the instructions.
pub fn squares(run: Run<'_>, x: Rows<'_>) -> Result<f32, KernelError> {
    check_machine()?;
    #[cfg(target_arch = "x86_64")]
    return Ok(match x {
        Rows::F32(x) => sum_of_squares(run, x),
        Rows::Bf16(x) => sum_of_squares(run, x),
    });
    #[cfg(not(target_arch = "x86_64"))]
    Err(KernelError::Instructions)
}

#[cfg(target_arch = "x86_64")]
fn sum_of_squares<T: Element>(run: Run<'_>, x: &[T]) -> f32 {
    let mut sums = vec![0.0; x.len().div_ceil(SHARE)];
    share(run, x.chunks(SHARE).zip(&mut sums), |(x, sum)| {
        // SAFETY: the instructions are there, as has been checked.
        *sum = unsafe { lanes::squares(x) };
    });
    sums.iter().sum::<f64>() as f32
}
