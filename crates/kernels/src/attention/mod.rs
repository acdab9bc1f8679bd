//! Attention of whole sequences and its gradient, without scores in memory.
//!
//! Rows of queries go through the keys that they see, a block of rows at a time: scores of a block exist in a buffer of the
//! thread that computes them, and keys that no row of a block sees are not read. The gradient computes scores again from the
//! logarithms of the rows' sums, as is usual.
//!
//! A *row* is one query of one head; the heads that share keys are neighbours, so that row `r` of `queries * group` belongs to
//! query `r / group`. Products are those of [`gemm`](crate::gemm): its panels, its tiles.

#[cfg(target_arch = "x86_64")]
mod backward;
#[cfg(target_arch = "x86_64")]
mod forward;
#[cfg(target_arch = "x86_64")]
mod lanes;
#[cfg(test)]
#[cfg(target_arch = "x86_64")]
mod tests;

use crate::KernelError;
#[cfg(target_arch = "x86_64")]
use crate::gemm::{COLUMNS, Kernel, Operand, ROWS};
use crate::product::{Out, Rows};
use crate::tasks::Run;

/// Rows of a block: whole panels of rows and of columns.
const BLOCK: usize = 96;
/// Tasks that a gradient is cut into, if there are rows enough.
const TASKS: usize = 4;

/// Sizes of attention: queries `[batch, kv_heads, queries, group, width]`, keys and values `[batch, kv_heads, keys, width]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attention {
    /// Sequences.
    pub batch: usize,
    /// Heads of keys and values.
    pub kv_heads: usize,
    /// Queries of a sequence.
    pub queries: usize,
    /// Heads of queries that share keys and values.
    pub group: usize,
    /// Keys of a sequence.
    pub keys: usize,
    /// Elements of a head; a multiple of 32.
    pub width: usize,
    /// Positions that a query sees, its own included; 0: all before it.
    pub window: usize,
}

/// Which keys a query sees: those at positions from 0 up to its own, within the window, in its own segment.
#[derive(Debug, Clone, Copy)]
pub struct Places<'a> {
    /// `[queries]`.
    pub queries: &'a [i32],
    /// `[keys]`.
    pub keys: &'a [i32],
    /// `[batch, queries]`.
    pub query_segments: &'a [i32],
    /// `[batch, keys]`.
    pub key_segments: &'a [i32],
}

/// Operands of attention, of one dtype.
#[derive(Debug, Clone, Copy)]
pub struct Operands<'a> {
    /// Queries.
    pub q: Rows<'a>,
    /// Keys.
    pub k: Rows<'a>,
    /// Values.
    pub v: Rows<'a>,
}

/// Softmax of `q · kᵀ` (scale 1) over the keys that are seen, times `v`: `out` as the queries, `lse` the logarithm of each row's
/// sum of exponentials, `[batch, kv_heads, queries, group]`. A row that sees nothing gives zeros.
///
/// # Errors
/// When sizes do not agree, or this machine lacks the instructions ([`has_wide_products`](crate::has_wide_products),
/// [`has_bf16_products`](crate::has_bf16_products)).
pub fn attention(
    run: Run<'_>,
    a: &Attention,
    x: &Operands<'_>,
    places: &Places<'_>,
    out: &mut Out<'_>,
    lse: &mut [f32],
) -> Result<(), KernelError> {
    let is_bf16 = check(a, x, places, &[("the result", out.len(), a.rows() * a.width), ("lse", lse.len(), a.rows())])?;
    if is_bf16 != matches!(out, Out::Bf16(_)) {
        return Err(KernelError::Mixed);
    }
    #[cfg(target_arch = "x86_64")]
    {
        let job = Job::new(a, x, places, is_bf16);
        forward::run(&job, run, elements_mut(out), lse);
        Ok(())
    }
    #[cfg(not(target_arch = "x86_64"))]
    Err(KernelError::Instructions)
}

/// What [`attention`] gave, and the gradient by it.
#[derive(Debug, Clone, Copy)]
pub struct Given<'a> {
    /// Logarithms of sums.
    pub lse: &'a [f32],
    /// The gradient by the result.
    pub d_out: Rows<'a>,
}

/// Gradients by queries, keys and values, in their dtype.
///
/// # Errors
/// As [`attention`].
pub fn attention_gradient(
    run: Run<'_>,
    a: &Attention,
    x: &Operands<'_>,
    places: &Places<'_>,
    given: &Given<'_>,
    [dq, dk, dv]: [&mut Out<'_>; 3],
) -> Result<(), KernelError> {
    let (all, keys) = (a.rows() * a.width, a.batch * a.kv_heads * a.keys * a.width);
    let sizes = [
        ("the result's gradient", given.d_out.len(), all),
        ("lse", given.lse.len(), a.rows()),
        ("the gradient by queries", dq.len(), all),
        ("the gradient by keys", dk.len(), keys),
        ("the gradient by values", dv.len(), keys),
    ];
    let is_bf16 = check(a, x, places, &sizes)?;
    let narrow = |r: &Rows<'_>| matches!(r, Rows::Bf16(_));
    if narrow(&given.d_out) != is_bf16 || [&*dq, &*dk, &*dv].iter().any(|y| matches!(y, Out::Bf16(_)) != is_bf16) {
        return Err(KernelError::Mixed);
    }
    #[cfg(target_arch = "x86_64")]
    {
        let job = Job::new(a, x, places, is_bf16);
        let of = backward::Of { d_out: elements(given.d_out), lse: given.lse };
        backward::run(&job, run, &of, [dq, dk, dv].map(elements_mut));
        Ok(())
    }
    #[cfg(not(target_arch = "x86_64"))]
    Err(KernelError::Instructions)
}

impl Attention {
    /// Rows of all queries.
    fn rows(&self) -> usize {
        self.batch * self.kv_heads * self.queries * self.group
    }
}

/// Whether operands are bf16, if all sizes are as they should be.
fn check(
    a: &Attention,
    x: &Operands<'_>,
    p: &Places<'_>,
    more: &[(&'static str, usize, usize)],
) -> Result<bool, KernelError> {
    let keys = a.batch * a.kv_heads * a.keys * a.width;
    let sizes = [
        ("the queries", x.q.len(), a.rows() * a.width),
        ("the keys", x.k.len(), keys),
        ("the values", x.v.len(), keys),
        ("positions of queries", p.queries.len(), a.queries),
        ("positions of keys", p.keys.len(), a.keys),
        ("segments of queries", p.query_segments.len(), a.batch * a.queries),
        ("segments of keys", p.key_segments.len(), a.batch * a.keys),
    ];
    for &(what, got, wanted) in sizes.iter().chain(more) {
        if got != wanted {
            return Err(KernelError::Operand { what, got, batch: 1, a: 1, b: wanted });
        }
    }
    if a.width == 0 || !a.width.is_multiple_of(32) {
        return Err(KernelError::Width(a.width));
    }
    let is_bf16 = match (x.q, x.k, x.v) {
        (Rows::Bf16(_), Rows::Bf16(_), Rows::Bf16(_)) => true,
        (Rows::F32(_), Rows::F32(_), Rows::F32(_)) => false,
        _ => return Err(KernelError::Mixed),
    };
    match if is_bf16 { crate::has_bf16_products() } else { crate::has_wide_products() } {
        true => Ok(is_bf16),
        false => Err(KernelError::Instructions),
    }
}

#[cfg(target_arch = "x86_64")]
fn elements(x: Rows<'_>) -> *const u8 {
    match x {
        Rows::F32(x) => x.as_ptr().cast(),
        Rows::Bf16(x) => x.as_ptr().cast(),
    }
}

#[cfg(target_arch = "x86_64")]
fn elements_mut(x: &mut Out<'_>) -> *mut u8 {
    match x {
        Out::F32(x) => x.as_mut_ptr().cast(),
        Out::Bf16(x) => x.as_mut_ptr().cast(),
    }
}

/// One call, as its threads see it.
#[cfg(target_arch = "x86_64")]
struct Job<'a> {
    a: Attention,
    is_bf16: bool,
    kernel: Kernel,
    q: *const u8,
    k: *const u8,
    v: *const u8,
    places: Places<'a>,
    /// Units of a head's elements.
    units: usize,
}

// SAFETY: operands are only read.
#[cfg(target_arch = "x86_64")]
unsafe impl Sync for Job<'_> {}

#[cfg(target_arch = "x86_64")]
impl<'a> Job<'a> {
    fn new(a: &Attention, x: &Operands<'_>, places: &Places<'a>, is_bf16: bool) -> Self {
        Job {
            a: *a,
            is_bf16,
            kernel: if is_bf16 { Kernel::Avx512Bf16 } else { Kernel::Avx512F32 },
            q: elements(x.q),
            k: elements(x.k),
            v: elements(x.v),
            places: *places,
            units: Self::units_of(is_bf16, a.width),
        }
    }

    fn units_of(is_bf16: bool, elements: usize) -> usize {
        if is_bf16 { elements.div_ceil(2) } else { elements }
    }

    /// Bytes of so many elements.
    fn bytes(&self, elements: usize) -> usize {
        elements * if self.is_bf16 { 2 } else { 4 }
    }

    /// Rows of one sequence and head of keys.
    fn rows(&self) -> usize {
        self.a.queries * self.a.group
    }

    /// Blocks of them.
    fn blocks(&self) -> usize {
        self.rows().div_ceil(BLOCK)
    }

    /// An operand whose first element is `at` elements after `data`.
    fn operand(&self, data: *const u8, at: usize, free: usize, k: usize, k_inside: bool) -> Operand {
        Operand { data: data.wrapping_add(self.bytes(at)), is_bf16: self.is_bf16, free, k, k_inside }
    }

    /// Keys that some row of a block sees, as far as positions say: `from..to`, where `from` begins panels of both kinds.
    fn seen(&self, rows: &std::ops::Range<usize>) -> (usize, usize) {
        let queries = &self.places.queries[rows.start / self.a.group..rows.end.div_ceil(self.a.group)];
        let most = queries.iter().copied().max().unwrap_or(-1);
        let least = queries.iter().copied().min().unwrap_or(0);
        let window = i64::try_from(self.a.window).unwrap_or(i64::MAX);
        let is_seen = |&k: &i32| k >= 0 && k <= most && (window == 0 || i64::from(k) + window > i64::from(least));
        let Some(first) = self.places.keys.iter().position(is_seen) else { return (0, 0) };
        let last = self.places.keys.iter().rposition(is_seen).unwrap_or(first);
        (first / BLOCK * BLOCK, (last + 1).next_multiple_of(COLUMNS).min(self.a.keys))
    }

    /// What query `row / group` of sequence `b` sees of keys `from..to`.
    fn sight(&self, b: usize, row: usize, (from, to): (usize, usize)) -> lanes::Sight<'a> {
        let query = row / self.a.group;
        let position = self.places.queries[query];
        let after = match i32::try_from(self.a.window) {
            Ok(0) | Err(_) => -1,
            Ok(w) => position.saturating_sub(w).max(-1),
        };
        lanes::Sight {
            position,
            after,
            segment: self.places.query_segments[b * self.a.queries + query],
            keys: &self.places.keys[from..to],
            segments: &self.places.key_segments[b * self.a.keys + from..b * self.a.keys + to],
        }
    }
}

/// Panels of rows in a block.
#[cfg(target_arch = "x86_64")]
const PANELS: usize = BLOCK / ROWS;
