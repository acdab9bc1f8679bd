//! What happens to rows of scores, for AVX-512.

use std::arch::x86_64::*;

/// Which keys a row sees.
pub(super) struct Sight<'a> {
    /// Keys up to here,
    pub(super) position: i32,
    /// and behind here,
    pub(super) after: i32,
    /// of this segment.
    pub(super) segment: i32,
    /// Their positions.
    pub(super) keys: &'a [i32],
    /// Their segments.
    pub(super) segments: &'a [i32],
}

impl Sight<'_> {
    /// Of the 16 keys from `at` on.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn mask(&self, at: usize) -> u16 {
        let there = lanes(self.keys.len() - at);
        // SAFETY: lanes beyond the end are masked.
        let (key, segment) = unsafe {
            (
                _mm512_maskz_loadu_epi32(there, self.keys.as_ptr().wrapping_add(at)),
                _mm512_maskz_loadu_epi32(there, self.segments.as_ptr().wrapping_add(at)),
            )
        };
        there
            & _mm512_cmple_epi32_mask(key, _mm512_set1_epi32(self.position))
            & _mm512_cmpgt_epi32_mask(key, _mm512_set1_epi32(self.after))
            & _mm512_cmpeq_epi32_mask(segment, _mm512_set1_epi32(self.segment))
    }
}

/// A mask of the first `n` lanes.
#[inline]
fn lanes(n: usize) -> u16 {
    ((1u32 << n.min(16)) - 1) as u16
}

/// e to the power of `x`, for `x` up to 80 or so; within 2e-7 of itself.
#[inline]
#[target_feature(enable = "avx512f")]
fn exp(x: __m512) -> __m512 {
    // Below this the result is zero in any case, and whole numbers of halvings stay small.
    let x = _mm512_max_ps(x, _mm512_set1_ps(-110.0));
    let (n, r) = crate::exp::reduced(x);
    let mut p = _mm512_set1_ps(1.0 / 720.0);
    for c in [1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
    }
    _mm512_scalef_ps(p, n)
}

/// Writes lanes as f32, or rounded to bf16.
///
/// # Safety
/// The lanes of the mask are writable.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn store(to: *mut u8, at: usize, is_bf16: bool, mask: u16, v: __m512) {
    // SAFETY: the caller's promise.
    unsafe {
        match is_bf16 {
            true => _mm256_mask_storeu_epi16(to.cast::<i16>().wrapping_add(at), mask, crate::gemm::rounded(v)),
            false => _mm512_mask_storeu_ps(to.cast::<f32>().wrapping_add(at), mask, v),
        }
    }
}

/// Exponentials of a row's scores less their largest, into `p` (zero where nothing is seen); gives the largest and the sum.
///
/// # Safety
/// `scores` holds as many as there are keys, `p` has room for as many elements.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) unsafe fn softmax(sight: &Sight<'_>, scores: *const f32, p: *mut u8, is_bf16: bool) -> (f32, f32) {
    let n = sight.keys.len();
    let low = _mm512_set1_ps(f32::MIN);
    let mut most = low;
    for at in (0..n).step_by(16) {
        let mask = sight.mask(at);
        // SAFETY: masked lanes are there.
        most = unsafe { _mm512_max_ps(most, _mm512_mask_loadu_ps(low, mask, scores.wrapping_add(at))) };
    }
    let most = _mm512_reduce_max_ps(most);
    let mut sum = _mm512_setzero_ps();
    for at in (0..n).step_by(16) {
        let mask = sight.mask(at);
        // SAFETY: masked lanes are there.
        unsafe {
            let s = _mm512_maskz_loadu_ps(mask, scores.wrapping_add(at));
            let e = _mm512_maskz_mov_ps(mask, exp(_mm512_sub_ps(s, _mm512_set1_ps(most))));
            sum = _mm512_add_ps(sum, e);
            store(p, at, is_bf16, lanes(n - at), e);
        }
    }
    (most, _mm512_reduce_add_ps(sum))
}

/// Probabilities `exp(scores - lse)` into `p`, and `p * (dp - dot)` into `ds`, where `dot` is the sum of `p * dp`.
///
/// # Safety
/// `scores`, which is overwritten, and `dp` hold as many as there are keys; `p` and `ds` have room for as many elements.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) unsafe fn gradient(
    sight: &Sight<'_>,
    (scores, dp): (*mut f32, *const f32),
    lse: f32,
    [p, ds]: [*mut u8; 2],
    is_bf16: bool,
) {
    let n = sight.keys.len();
    let lse = _mm512_set1_ps(lse);
    let (mut dot, mut sum) = (_mm512_setzero_ps(), _mm512_setzero_ps());
    for at in (0..n).step_by(16) {
        let (mask, there) = (sight.mask(at), lanes(n - at));
        // SAFETY: masked lanes are there.
        unsafe {
            let s = _mm512_maskz_loadu_ps(mask, scores.wrapping_add(at));
            let e = _mm512_maskz_mov_ps(mask, exp(_mm512_sub_ps(s, lse)));
            dot = _mm512_fmadd_ps(e, _mm512_maskz_loadu_ps(mask, dp.wrapping_add(at)), dot);
            sum = _mm512_add_ps(sum, e);
            _mm512_mask_storeu_ps(scores.wrapping_add(at), there, e);
        }
    }
    // One but for the rounding of `lse`, which would weigh in a difference of nearly equal numbers.
    let sum = _mm512_reduce_add_ps(sum);
    let inverse = if sum > 0.0 { 1.0 / sum } else { 0.0 };
    let dot = _mm512_set1_ps(_mm512_reduce_add_ps(dot) * inverse);
    let inverse = _mm512_set1_ps(inverse);
    for at in (0..n).step_by(16) {
        let there = lanes(n - at);
        // SAFETY: masked lanes are there.
        unsafe {
            let e = _mm512_mul_ps(_mm512_maskz_loadu_ps(there, scores.wrapping_add(at)), inverse);
            let d = _mm512_sub_ps(_mm512_maskz_loadu_ps(there, dp.wrapping_add(at)), dot);
            store(p, at, is_bf16, there, e);
            store(ds, at, is_bf16, there, _mm512_mul_ps(e, d));
        }
    }
}

/// `n` elements times a factor.
///
/// # Safety
/// `from` holds as many, `to` has room for them.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) unsafe fn scaled(from: *const f32, factor: f32, n: usize, to: *mut u8, is_bf16: bool) {
    for at in (0..n).step_by(16) {
        let mask = lanes(n - at);
        // SAFETY: masked lanes are there.
        unsafe {
            let v = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, from.wrapping_add(at)), _mm512_set1_ps(factor));
            store(to, at, is_bf16, mask, v);
        }
    }
}
