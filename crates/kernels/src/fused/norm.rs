//! RMS norm and its gradient.

use super::{check, check_machine};
#[cfg(target_arch = "x86_64")]
use super::{
    lanes::{self, Element},
    rows_of, share,
};
use crate::KernelError;
use crate::product::{Out, Rows};
use crate::tasks::Run;

/// Norm of rows of `x`, of `width` elements each.
#[derive(Debug, Clone, Copy)]
pub struct RmsNorm<'a> {
    /// Elements of a row.
    pub width: usize,
    /// What rows are multiplied with after the norm, `[width]`.
    pub weight: Option<&'a [f32]>,
}

/// Rows of `x` over the root of their mean square plus `eps`, times the weight, rounded once; `inverse` gets one over that root
/// for each row.
///
/// # Errors
/// When sizes or kinds do not agree.
pub fn rms_norm(
    run: Run<'_>,
    norm: &RmsNorm<'_>,
    eps: f64,
    x: Rows<'_>,
    y: &mut Out<'_>,
    inverse: &mut [f32],
) -> Result<(), KernelError> {
    norm.check(&[("x", x.len()), ("y", y.len())], inverse.len())?;
    #[cfg(target_arch = "x86_64")]
    match (x, y) {
        (Rows::F32(x), Out::F32(y)) => forward(run, norm, eps, x, y, inverse),
        (Rows::Bf16(x), Out::Bf16(y)) => forward(run, norm, eps, x, y, inverse),
        _ => return Err(KernelError::Mixed),
    }
    Ok(())
}

/// What the gradient of a norm reads.
#[derive(Debug, Clone, Copy)]
pub struct NormGradient<'a> {
    /// What the norm was taken of.
    pub x: Rows<'a>,
    /// What [`rms_norm`] gave for each row.
    pub inverse: &'a [f32],
    /// The gradient by the norm.
    pub ct: Rows<'a>,
}

/// Gradients by `x`, and by the weight if the norm has one (`[width]`, zeros otherwise).
///
/// # Errors
/// When sizes or kinds do not agree.
pub fn rms_norm_gradient(
    run: Run<'_>,
    norm: &RmsNorm<'_>,
    given: &NormGradient<'_>,
    dx: &mut Out<'_>,
    dw: &mut [f32],
) -> Result<(), KernelError> {
    let sizes = [("x", given.x.len()), ("the gradient", given.ct.len()), ("the gradient by x", dx.len())];
    norm.check(&sizes, given.inverse.len())?;
    check("the gradient by the weight", dw.len(), [1, norm.width])?;
    #[cfg(target_arch = "x86_64")]
    match (given.x, given.ct, dx) {
        (Rows::F32(x), Rows::F32(ct), Out::F32(dx)) => backward(run, norm, (x, ct), given.inverse, dx, dw),
        (Rows::Bf16(x), Rows::Bf16(ct), Out::Bf16(dx)) => backward(run, norm, (x, ct), given.inverse, dx, dw),
        _ => return Err(KernelError::Mixed),
    }
    Ok(())
}

impl RmsNorm<'_> {
    fn check(&self, sizes: &[(&'static str, usize)], rows: usize) -> Result<(), KernelError> {
        check_machine()?;
        for &(what, got) in sizes {
            check(what, got, [rows, self.width])?;
        }
        check("the weight", self.weight.map_or(self.width, <[f32]>::len), [1, self.width])
    }

    /// The weight, or ones.
    #[cfg(target_arch = "x86_64")]
    fn factors(&self) -> std::borrow::Cow<'_, [f32]> {
        self.weight.map_or_else(|| vec![1.0; self.width].into(), Into::into)
    }
}

#[cfg(target_arch = "x86_64")]
fn forward<T: Element>(run: Run<'_>, norm: &RmsNorm<'_>, eps: f64, x: &[T], y: &mut [T], inverse: &mut [f32]) {
    let (width, rows) = (norm.width.max(1), rows_of(norm.width));
    let weight = norm.factors();
    let items = x.chunks(rows * width).zip(y.chunks_mut(rows * width)).zip(inverse.chunks_mut(rows));
    share(run, items, |((x, y), inverse)| {
        // SAFETY: the instructions are there, as has been checked.
        unsafe { lanes::norm(width, &weight, eps, x, y, inverse) }
    });
}

#[cfg(target_arch = "x86_64")]
fn backward<T: Element>(
    run: Run<'_>,
    norm: &RmsNorm<'_>,
    (x, ct): (&[T], &[T]),
    inverse: &[f32],
    dx: &mut [T],
    dw: &mut [f32],
) {
    let (width, rows) = (norm.width.max(1), rows_of(norm.width));
    let weight = norm.factors();
    let mut sums = vec![0.0; inverse.len().div_ceil(rows) * width];
    let operands = x.chunks(rows * width).zip(ct.chunks(rows * width)).zip(inverse.chunks(rows));
    let items = operands.zip(dx.chunks_mut(rows * width)).zip(sums.chunks_mut(width));
    share(run, items, |((((x, ct), inverse), dx), sums)| {
        // SAFETY: the instructions are there, as has been checked.
        unsafe { lanes::norm_gradient(&weight, (x, ct), inverse, dx, sums) }
    });
    dw.fill(0.0);
    for part in sums.chunks(width) {
        for (dw, part) in dw.iter_mut().zip(part) {
            *dw += part;
        }
    }
}
