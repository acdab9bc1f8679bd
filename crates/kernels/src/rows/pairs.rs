//! For AVX-512 with BF16: bf16 with bf16, two products at a time.
//!
//! The instruction adds two products to a lane of f32, rounding after each addition; numbers below 1.2e-38 count as zero.

use std::arch::x86_64::*;

use half::bf16;

use super::{AHEAD, Place, Rows};
use crate::product::{MAX_M, Sums};

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
    let (w, x) = (weights.as_ptr(), x.as_ptr());
    let mut acc = [[_mm512_setzero_ps(); M]; R];
    let mut add = |j: usize, w: [__m512i; R]| {
        for m in 0..M {
            // SAFETY: step j is whole in every padded row of x.
            let x = pairs(unsafe { _mm512_loadu_si512(x.add(m * stride + j).cast()) });
            for (acc, w) in acc.iter_mut().zip(w) {
                acc[m] = _mm512_dpbf16_ps(acc[m], pairs(w), x);
            }
        }
    };
    let whole = k / STEP * STEP;
    for j in (0..whole).step_by(STEP) {
        let mut step = [_mm512_setzero_si512(); R];
        for (r, step) in step.iter_mut().enumerate() {
            let from = w.wrapping_add(r * at.pitch + j * 2);
            // To the second cache: the first one is for x.
            _mm_prefetch::<_MM_HINT_T1>(from.wrapping_add(AHEAD).cast());
            // SAFETY: the step lies within row r of the weights.
            *step = unsafe { _mm512_loadu_si512(from.cast()) };
        }
        add(j, step);
    }
    if whole < k {
        let mask = (1u32 << (k - whole)) - 1;
        let mut step = [_mm512_setzero_si512(); R];
        for (r, step) in step.iter_mut().enumerate() {
            let from = w.wrapping_add(r * at.pitch + whole * 2);
            // SAFETY: the elements in the mask are the last ones of row r; others are not touched.
            *step = unsafe { _mm512_maskz_loadu_epi16(mask, from.cast()) };
        }
        add(whole, step);
    }
    for (sums, acc) in sums[..R].iter_mut().zip(&acc) {
        for (sum, &acc) in sums.iter_mut().zip(acc) {
            *sum = _mm512_reduce_add_ps(acc);
        }
    }
    R
}

/// The same bits, taken as pairs of bf16.
#[inline]
#[target_feature(enable = "avx512f")]
fn pairs(v: __m512i) -> __m512bh {
    // SAFETY: both are 512 bits, of which any are valid.
    unsafe { std::mem::transmute::<__m512i, __m512bh>(v) }
}
