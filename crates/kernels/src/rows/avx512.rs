//! For AVX-512.

use std::arch::x86_64::*;

use super::{AHEAD, Place, Rows};
use crate::Format;
use crate::product::{MAX_M, Sums};

/// Elements of a step.
const STEP: usize = 32;

dispatch!("avx512f,avx512bw", 1: 8, 2: 4, 3: 4, 4: 4, 5: 2, 6: 2, 7: 2, 8: 2);

/// How 32 elements become two vectors of f32.
trait Widen {
    const SIZE: usize;
    /// # Safety
    /// 32 elements must be readable.
    unsafe fn load(at: *const u8) -> (__m512, __m512);
    /// # Safety
    /// The elements in the mask must be readable.
    unsafe fn load_masked(at: *const u8, mask: u32) -> (__m512, __m512);
}

struct Bf16;
struct F32;

impl Widen for Bf16 {
    const SIZE: usize = 2;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn load(at: *const u8) -> (__m512, __m512) {
        // SAFETY: the caller's promise.
        split(unsafe { _mm512_loadu_si512(at.cast()) })
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn load_masked(at: *const u8, mask: u32) -> (__m512, __m512) {
        // SAFETY: the caller's promise; elements that are masked out are not touched.
        split(unsafe { _mm512_maskz_loadu_epi16(mask, at.cast()) })
    }
}

/// The elements at even places, then those at odd ones.
#[inline]
#[target_feature(enable = "avx512f")]
fn split(w: __m512i) -> (__m512, __m512) {
    let odd = _mm512_and_si512(w, _mm512_set1_epi32(0xffff_0000_u32 as i32));
    (_mm512_castsi512_ps(_mm512_slli_epi32::<16>(w)), _mm512_castsi512_ps(odd))
}

impl Widen for F32 {
    const SIZE: usize = 4;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn load(at: *const u8) -> (__m512, __m512) {
        // SAFETY: the caller's promise.
        unsafe { (_mm512_loadu_ps(at.cast()), _mm512_loadu_ps(at.add(64).cast())) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn load_masked(at: *const u8, mask: u32) -> (__m512, __m512) {
        let at = at.cast::<f32>();
        // SAFETY: the caller's promise; elements that are masked out are not touched, and the second address is
        // computed without claiming that it lies within.
        unsafe {
            (_mm512_maskz_loadu_ps(mask as u16, at), _mm512_maskz_loadu_ps((mask >> 16) as u16, at.wrapping_add(16)))
        }
    }
}

/// Computes the sums of `R` rows with `M` rows of `x`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn block<W: Widen, const R: usize, const M: usize>(
    weights: &[u8],
    at: Place,
    k: usize,
    x: &[f32],
    stride: usize,
    sums: &mut [[f32; MAX_M]],
) -> usize {
    let weights = at.weights(weights, R, k * W::SIZE);
    let x = &x[..M * stride];
    assert!(stride >= k.next_multiple_of(STEP));
    let (w, x) = (weights.as_ptr(), x.as_ptr());
    let mut acc = [[_mm512_setzero_ps(); M]; R];
    let mut add = |j: usize, r: usize, (low, high): (__m512, __m512)| {
        for (m, acc) in acc[r].iter_mut().enumerate() {
            // SAFETY: step j is whole in every padded row of x.
            let (a, b) = unsafe {
                let x = x.add(m * stride + j);
                (_mm512_loadu_ps(x), _mm512_loadu_ps(x.add(16)))
            };
            *acc = _mm512_fmadd_ps(high, b, _mm512_fmadd_ps(low, a, *acc));
        }
    };
    let whole = k / STEP * STEP;
    for j in (0..whole).step_by(STEP) {
        for r in 0..R {
            let from = w.wrapping_add(r * at.pitch + j * W::SIZE);
            // To the second cache: the first one is for x.
            let ahead = from.wrapping_add(AHEAD);
            _mm_prefetch::<_MM_HINT_T1>(ahead.cast());
            if W::SIZE == 4 {
                _mm_prefetch::<_MM_HINT_T1>(ahead.wrapping_add(64).cast());
            }
            // SAFETY: the step lies within row r of the weights.
            add(j, r, unsafe { W::load(from) });
        }
    }
    if whole < k {
        let mask = (1u32 << (k - whole)) - 1;
        for r in 0..R {
            // SAFETY: the elements in the mask are the last ones of row r.
            add(whole, r, unsafe { W::load_masked(w.wrapping_add(r * at.pitch + whole * W::SIZE), mask) });
        }
    }
    for (sums, acc) in sums[..R].iter_mut().zip(&acc) {
        for (sum, &acc) in sums.iter_mut().zip(acc) {
            *sum = _mm512_reduce_add_ps(acc);
        }
    }
    R
}
