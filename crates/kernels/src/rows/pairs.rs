//! For AVX-512 with BF16: bf16 with bf16, two products at a time.
//!
//! The instruction adds two products to a lane of f32, rounding after each addition; numbers below 1.2e-38 count as zero.

use std::arch::x86_64::*;
use std::ops::Range;

use half::bf16;

use super::{AHEAD, Place, Rows, UNIT};
use crate::product::{MAX_M, Sums};

/// Lines of a row that are read one after the other.
const LINES: usize = 4;
/// Elements of a step.
pub(super) const STEP: usize = 32;

/// The sums of some rows with the rows of `x`, which are padded with zeros to `stride` elements.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub(super) fn sums(weights: &[u8], rows: Rows, k: usize, x: &[bf16], stride: usize, sums: &mut Sums) {
    macro_rules! by_m {
        ($left:ident, $block:ident, $($m:literal: $r:literal),*) => {
            match x.len() / stride.max(1) {
                $($m if $left >= $r => $block!($r, $m),
                  $m => $block!(1, $m),)*
                _ => $left,
            }
        };
    }
    let mut done = 0;
    while done < rows.count {
        let left = rows.count - done;
        let (at, sums) = (rows.place(done, k * 2), &mut sums[done..]);
        macro_rules! call {
            ($r:literal, $m:literal) => {
                block::<$r, $m>(weights, at, k, x, stride, sums)
            };
        }
        done += by_m!(left, call, 1: 8, 2: 4, 3: 4, 4: 4, 5: 2, 6: 2, 7: 2, 8: 2);
    }
}

/// Computes the sums of `R` rows, of which `at` tells the first byte and the bytes from one to the next, with `M` rows of `x`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn block<const R: usize, const M: usize>(
    weights: &[u8],
    at: Place,
    k: usize,
    x: &[bf16],
    stride: usize,
    sums: &mut [[f32; MAX_M]],
) -> usize {
    let weights = at.weights(weights, R, k * 2);
    let x = &x[..M * stride];
    assert!(stride >= k.next_multiple_of(STEP));
    // SAFETY: the rows lie within the weights, and x has whole steps.
    let acc = unsafe { read::<R, M>(weights.as_ptr(), at.pitch, k, x.as_ptr(), stride) };
    for (sums, acc) in sums[..R].iter_mut().zip(&acc) {
        for (sum, &acc) in sums.iter_mut().zip(acc) {
            *sum = _mm512_reduce_add_ps(acc);
        }
    }
    R
}

/// Units whose sums are added up together.
const TOGETHER: usize = 8;

/// Calls `take` with the sums of whole units with the only row of `x`, by unit.
///
/// Adding up a register waits for the last weights of its row, and processors look only so many instructions ahead: nothing of the
/// next unit would be asked for meanwhile. So registers are put aside, and added up when several units have been read.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub(super) fn several(
    weights: &[u8],
    units: Range<usize>,
    step: usize,
    k: usize,
    x: &[bf16],
    take: &mut dyn FnMut(usize, [f32; UNIT]),
) {
    assert!(x.len() >= k.next_multiple_of(STEP));
    let mut aside = [[[_mm512_setzero_ps(); 1]; UNIT]; TOGETHER];
    for first in units.clone().step_by(TOGETHER) {
        let these = first..units.end.min(first + TOGETHER);
        for (unit, aside) in these.clone().zip(&mut aside) {
            let at = Rows { first: unit, step, count: UNIT }.place(0, k * 2);
            let weights = at.weights(weights, UNIT, k * 2);
            // SAFETY: as in `block`.
            *aside = unsafe { read::<UNIT, 1>(weights.as_ptr(), at.pitch, k, x.as_ptr(), 0) };
        }
        for (unit, aside) in these.zip(&aside) {
            take(unit, aside.map(|[v]| _mm512_reduce_add_ps(v)));
        }
    }
}

/// The sums of `R` rows with `M` rows of `x`, not added up yet.
///
/// # Safety
/// Rows of `k` weights begin at `w` and every `pitch` bytes, whole steps of x at `x` and every `stride` elements.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn read<const R: usize, const M: usize>(
    w: *const u8,
    pitch: usize,
    k: usize,
    x: *const bf16,
    stride: usize,
) -> [[__m512; M]; R] {
    let mut acc = [[_mm512_setzero_ps(); M]; R];
    let add = |acc: &mut [__m512; M], j: usize, w: __m512i| {
        for (m, acc) in acc.iter_mut().enumerate() {
            // SAFETY: step j is whole in every padded row of x.
            let x = pairs(unsafe { _mm512_loadu_si512(x.add(m * stride + j).cast()) });
            *acc = _mm512_dpbf16_ps(*acc, pairs(w), x);
        }
    };
    let whole = k / STEP * STEP;
    let mut done = 0;
    if M == 1 {
        // Several lines of a row before those of the next.
        done = whole / (STEP * LINES) * (STEP * LINES);
        for j in (0..done).step_by(STEP * LINES) {
            // SAFETY: steps from j on are whole in x.
            let x: [_; LINES] =
                std::array::from_fn(|i| pairs(unsafe { _mm512_loadu_si512(x.add(j + i * STEP).cast()) }));
            for (r, acc) in acc.iter_mut().enumerate() {
                for (i, x) in x.into_iter().enumerate() {
                    let from = w.wrapping_add(r * pitch + (j + i * STEP) * 2);
                    // One line of each group, for what streams do not do by themselves: to begin a page before it is reached.
                    if i == 0 {
                        _mm_prefetch::<_MM_HINT_T1>(from.wrapping_add(AHEAD).cast());
                    }
                    // SAFETY: the step lies within row r of the weights.
                    acc[0] = _mm512_dpbf16_ps(acc[0], pairs(unsafe { _mm512_loadu_si512(from.cast()) }), x);
                }
            }
        }
    }
    for j in (done..whole).step_by(STEP) {
        for (r, acc) in acc.iter_mut().enumerate() {
            let from = w.wrapping_add(r * pitch + j * 2);
            // To the second cache: the first one is for x.
            _mm_prefetch::<_MM_HINT_T1>(from.wrapping_add(AHEAD).cast());
            // SAFETY: the step lies within row r of the weights.
            add(acc, j, unsafe { _mm512_loadu_si512(from.cast()) });
        }
    }
    if whole < k {
        let mask = (1u32 << (k - whole)) - 1;
        for (r, acc) in acc.iter_mut().enumerate() {
            let from = w.wrapping_add(r * pitch + whole * 2);
            // SAFETY: the elements in the mask are the last ones of row r; others are not touched.
            add(acc, whole, unsafe { _mm512_maskz_loadu_epi16(mask, from.cast()) });
        }
    }
    acc
}

/// The same bits, taken as pairs of bf16.
#[inline]
#[target_feature(enable = "avx512f")]
fn pairs(v: __m512i) -> __m512bh {
    // SAFETY: both are 512 bits, of which any are valid.
    unsafe { std::mem::transmute::<__m512i, __m512bh>(v) }
}
