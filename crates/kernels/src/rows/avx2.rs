//! For AVX2 with FMA.

use std::arch::x86_64::*;

use super::{AHEAD, Place, Rows};
use crate::Format;
use crate::product::{MAX_M, Sums};

/// Elements of a step.
const STEP: usize = 16;

dispatch!("avx2,fma", 1: 8, 2: 4, 3: 2, 4: 2, 5: 2, 6: 1, 7: 1, 8: 1);

/// How 16 elements become two vectors of f32.
trait Widen {
    const SIZE: usize;
    /// # Safety
    /// 16 elements must be readable.
    unsafe fn load(at: *const u8) -> (__m256, __m256);
}

struct Bf16;
struct F32;

impl Widen for Bf16 {
    const SIZE: usize = 2;

    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn load(at: *const u8) -> (__m256, __m256) {
        // SAFETY: the caller's promise.
        let w = unsafe { _mm256_loadu_si256(at.cast()) };
        let odd = _mm256_and_si256(w, _mm256_set1_epi32(0xffff_0000_u32 as i32));
        (_mm256_castsi256_ps(_mm256_slli_epi32::<16>(w)), _mm256_castsi256_ps(odd))
    }
}

impl Widen for F32 {
    const SIZE: usize = 4;

    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn load(at: *const u8) -> (__m256, __m256) {
        // SAFETY: the caller's promise.
        unsafe { (_mm256_loadu_ps(at.cast()), _mm256_loadu_ps(at.add(32).cast())) }
    }
}

/// Computes the sums of `R` rows with `M` rows of `x`.
#[inline]
#[target_feature(enable = "avx2,fma")]
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
    let mut acc = [[_mm256_setzero_ps(); M]; R];
    let mut add = |j: usize, r: usize, (low, high): (__m256, __m256)| {
        for (m, acc) in acc[r].iter_mut().enumerate() {
            // SAFETY: step j is whole in every padded row of x.
            let (a, b) = unsafe {
                let x = x.add(m * stride + j);
                (_mm256_loadu_ps(x), _mm256_loadu_ps(x.add(8)))
            };
            *acc = _mm256_fmadd_ps(high, b, _mm256_fmadd_ps(low, a, *acc));
        }
    };
    let whole = k / STEP * STEP;
    for j in (0..whole).step_by(STEP) {
        for r in 0..R {
            let from = w.wrapping_add(r * at.pitch + j * W::SIZE);
            // To the second cache: the first one is for x.
            _mm_prefetch::<_MM_HINT_T1>(from.wrapping_add(AHEAD).cast());
            // SAFETY: the step lies within row r of the weights.
            add(j, r, unsafe { W::load(from) });
        }
    }
    if whole < k {
        // The last elements, copied to where a whole step can be read.
        let mut last = [0u8; STEP * 4];
        let size = (k - whole) * W::SIZE;
        for r in 0..R {
            let from = r * at.pitch + whole * W::SIZE;
            last[..size].copy_from_slice(&weights[from..from + size]);
            // SAFETY: the array holds a step of either type.
            add(whole, r, unsafe { W::load(last.as_ptr()) });
        }
    }
    for (sums, acc) in sums[..R].iter_mut().zip(&acc) {
        for (sum, &acc) in sums.iter_mut().zip(acc) {
            let half = _mm_add_ps(_mm256_castps256_ps128(acc), _mm256_extractf128_ps::<1>(acc));
            let quarter = _mm_add_ps(half, _mm_movehl_ps(half, half));
            *sum = _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
        }
    }
    R
}
