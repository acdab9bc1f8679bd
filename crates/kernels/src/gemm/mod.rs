//! Products of two matrices of activations: many rows by many columns, as training has them.
//!
//! A *unit* is what one lane of a register takes at a time: one f32, or two neighbouring bf16. Operands are copied into
//! *panels*, [`ROWS`] rows of the left one or [`COLUMNS`] columns of the right one, in which the lanes of one unit lie side by
//! side; the innermost loop then reads memory in order, however operands are stored and whatever their widths are. (Rows that
//! lie a power of two apart fall into the same few places of a cache; read in place they push each other out.)
//!
//! A *task* is a block of the result. Tasks differ in nothing but their place, and the order of sums within one is fixed: a
//! result depends on neither threads nor the split.

#[cfg(target_arch = "x86_64")]
mod avx512;
mod job;
pub(crate) mod pack;
mod portable;

use std::mem::MaybeUninit;

use half::bf16;

#[cfg(target_arch = "x86_64")]
pub(crate) use avx512::rounded;

use crate::KernelError;
use crate::product::{Out, Rows};
use crate::tasks::Run;

/// Rows of the left operand in a panel.
pub(crate) const ROWS: usize = 12;
/// Columns of the right operand in a panel.
pub(crate) const COLUMNS: usize = 32;
/// Elements of a tile of the result: a panel by a panel.
pub(crate) const TILE: usize = ROWS * COLUMNS;

/// What instructions a product is computed with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kernel {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx512F32,
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16,
}

/// Whether this machine multiplies matrices of bf16 as they are.
#[must_use]
pub fn has_bf16_products() -> bool {
    #[cfg(target_arch = "x86_64")]
    return is_x86_feature_detected!("avx512bf16") && has_wide_products();
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Whether this machine multiplies matrices of f32 with 512-bit registers.
#[must_use]
pub fn has_wide_products() -> bool {
    #[cfg(target_arch = "x86_64")]
    return is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl");
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Sizes and layouts of a product `[batch, m, n]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Product {
    /// Products beside each other.
    pub batch: usize,
    /// Rows of the result.
    pub m: usize,
    /// Columns of the result.
    pub n: usize,
    /// What is summed over.
    pub k: usize,
    /// The left operand lies as `[batch, k, m]` instead of `[batch, m, k]`.
    pub lhs_transposed: bool,
    /// The right operand lies as `[batch, n, k]` instead of `[batch, k, n]`.
    pub rhs_transposed: bool,
}

/// An operand: elements of one kind, and how they lie.
#[derive(Clone, Copy)]
pub(crate) struct Operand {
    pub(crate) data: *const u8,
    pub(crate) is_bf16: bool,
    /// Rows or columns of the result.
    pub(crate) free: usize,
    /// What is summed over.
    pub(crate) k: usize,
    /// Whether elements that are summed lie side by side.
    pub(crate) k_inside: bool,
}

// SAFETY: operands are only read.
unsafe impl Send for Operand {}
// SAFETY: as above.
unsafe impl Sync for Operand {}

/// Where results go.
#[derive(Clone, Copy)]
pub(crate) enum Target {
    F32(*mut f32),
    Bf16(*mut bf16),
}

// SAFETY: tasks write blocks of their own.
unsafe impl Sync for Target {}

/// A cache line, for buffers that start at one.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u32; 16]);

/// Room for `units` units, which start at a cache line. It holds nothing until it is written.
pub(crate) struct Buffer(Vec<MaybeUninit<Line>>);

impl Buffer {
    pub(crate) fn new(units: usize) -> Self {
        Buffer(Vec::with_capacity(units.div_ceil(16).max(1)))
    }

    pub(crate) fn as_mut_ptr(&mut self) -> *mut u32 {
        self.0.as_mut_ptr().cast()
    }
}

/// Computes `out = lhs · rhs` for every product of the batch, summed in f32. Both operands are of one kind.
///
/// # Errors
/// When sizes do not agree.
pub fn matmul(run: Run<'_>, p: &Product, lhs: Rows<'_>, rhs: Rows<'_>, out: &mut Out<'_>) -> Result<(), KernelError> {
    within(run, p, lhs, rhs, out, job::LIMITS)
}

/// The same with other limits of what tasks share.
fn within(
    run: Run<'_>,
    p: &Product,
    lhs: Rows<'_>,
    rhs: Rows<'_>,
    out: &mut Out<'_>,
    limits: job::Limits,
) -> Result<(), KernelError> {
    let size = |a: usize, b: usize| p.batch.checked_mul(a).and_then(|x| x.checked_mul(b));
    let wrong =
        |what: &'static str, got: usize, [a, b]: [usize; 2]| KernelError::Operand { what, got, batch: p.batch, a, b };
    if size(p.m, p.k) != Some(lhs.len()) {
        return Err(wrong("the left operand", lhs.len(), [p.m, p.k]));
    }
    if size(p.k, p.n) != Some(rhs.len()) {
        return Err(wrong("the right operand", rhs.len(), [p.k, p.n]));
    }
    if size(p.m, p.n) != Some(out.len()) {
        return Err(wrong("the result", out.len(), [p.m, p.n]));
    }
    let (is_bf16, left, right) = match (lhs, rhs) {
        (Rows::Bf16(l), Rows::Bf16(r)) => (true, l.as_ptr().cast(), r.as_ptr().cast()),
        (Rows::F32(l), Rows::F32(r)) => (false, l.as_ptr().cast(), r.as_ptr().cast()),
        _ => return Err(KernelError::Mixed),
    };
    let kernel = kernel(is_bf16);
    // The portable kernel takes bf16 widened, one to a unit.
    let units = if is_bf16 && kernel != Kernel::Portable { p.k.div_ceil(2) } else { p.k };
    let lhs = Operand { data: left, is_bf16, free: p.m, k: p.k, k_inside: !p.lhs_transposed };
    let rhs = Operand { data: right, is_bf16, free: p.n, k: p.k, k_inside: p.rhs_transposed };
    let out = match out {
        Out::F32(y) => Target::F32(y.as_mut_ptr()),
        Out::Bf16(y) => Target::Bf16(y.as_mut_ptr()),
    };
    job::Job::new(*p, kernel, (lhs, rhs), units, out, limits).run(run);
    Ok(())
}

fn kernel(is_bf16: bool) -> Kernel {
    #[cfg(target_arch = "x86_64")]
    match is_bf16 {
        true if has_bf16_products() => return Kernel::Avx512Bf16,
        false if has_wide_products() => return Kernel::Avx512F32,
        _ => {}
    }
    let _ = is_bf16;
    Kernel::Portable
}

/// Where a finished tile goes.
pub(crate) struct Emit {
    pub(crate) to: Target,
    /// The element of the result that the tile's first one is.
    pub(crate) at: usize,
    /// Elements from row to row.
    pub(crate) stride: usize,
    pub(crate) rows: usize,
    pub(crate) columns: usize,
}

/// Adds the product of two panels to a tile of sums (which begin at zero unless `add`), and writes the tile where it is wanted.
///
/// # Safety
/// The panels hold `units` units for each lane, the tile [`TILE`] sums; the machine has the kernel's instructions; `emit` lies
/// within its target, and nobody else uses that part of it.
pub(crate) unsafe fn tile(
    kernel: Kernel,
    units: usize,
    l: *const u32,
    r: *const u32,
    sums: *mut f32,
    add: bool,
    emit: Option<&Emit>,
) {
    // SAFETY: the caller's promise.
    unsafe {
        match kernel {
            Kernel::Portable => portable::tile(units, l.cast(), r.cast(), sums, add, emit),
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx512F32 => avx512::tile_f32(units, l, r, sums, add, emit),
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx512Bf16 => avx512::tile_bf16(units, l, r, sums, add, emit),
        }
    }
}

#[cfg(test)]
mod tests;
