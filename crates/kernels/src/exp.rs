//! What every exponential of sixteen lanes begins with, for AVX-512.

use std::arch::x86_64::*;

/// `x` as `n ln 2 + r` with `r` within half of ln 2.
#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn reduced(x: __m512) -> (__m512, __m512) {
    let n = _mm512_roundscale_ps::<0>(_mm512_mul_ps(x, _mm512_set1_ps(std::f32::consts::LOG2_E)));
    // ln 2 in two parts, so that the rest is exact.
    let r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693_359_4), x);
    (n, _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.121_944_4e-4), r))
}
