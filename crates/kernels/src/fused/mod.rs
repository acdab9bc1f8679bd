//! What training does to every element, in one pass over memory: norms, the gated GELU, the loss of logits, the update.
//!
//! A compiler that writes each intermediate value to memory takes longer for these than their arithmetic does. Everything is
//! computed in f32 and rounded once. Threads take blocks of rows whose size does not depend on how many threads there are, so that
//! no sum does.

mod adam;
mod gelu;
#[cfg(target_arch = "x86_64")]
pub(crate) mod lanes;
mod loss;
mod norm;
#[cfg(test)]
#[cfg(target_arch = "x86_64")]
mod tests;

pub use adam::{Adam, State, adam, squares};
pub use gelu::{gated_gelu, gated_gelu_gradient};
pub use loss::{CrossEntropy, Losses, cross_entropy};
pub use norm::{NormGradient, RmsNorm, rms_norm, rms_norm_gradient};

use crate::KernelError;
use crate::tasks::{Run, each_of};

/// Elements of a thread's share, which is worth asking for.
const SHARE: usize = 32 << 10;

/// Works on all items, on as many threads as there are.
fn share<I: Send>(run: Run<'_>, items: impl Iterator<Item = I> + Send, work: impl Fn(I) + Sync) {
    each_of(run, items, || (), |(), item| work(item));
}

/// Rows of a share.
fn rows_of(width: usize) -> usize {
    (SHARE / width.max(1)).max(1)
}

/// Whether the machine has the instructions.
pub(crate) fn check_machine() -> Result<(), KernelError> {
    match crate::has_wide_products() {
        true => Ok(()),
        false => Err(KernelError::Instructions),
    }
}

/// Whether a slice is as long as it should be.
pub(crate) fn check(what: &'static str, got: usize, [a, b]: [usize; 2]) -> Result<(), KernelError> {
    match a.checked_mul(b) == Some(got) {
        true => Ok(()),
        false => Err(KernelError::Operand { what, got, batch: 1, a, b }),
    }
}
