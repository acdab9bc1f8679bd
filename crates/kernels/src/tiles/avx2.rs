//! For AVX2.
//!
//! Weights are widened to 16 bits where they lie: the bytes at even places of a register, then those at odd ones. The
//! instruction used multiplies pairs of 16-bit numbers and adds the two products, which is exact.

use std::arch::x86_64::*;
use std::ops::Range;

use super::{BLOCK, GROUP, Layout, Prepared};
use crate::Format;
use crate::product::{Rows, Sums};

/// How far ahead memory is asked for, in bytes.
const AHEAD: usize = 4096;
/// Rows of a register; a tile has two of them.
const HALF: usize = 8;

#[target_feature(enable = "avx2,fma")]
pub(super) fn prepare(to: &mut Prepared, x: Rows<'_>, m: usize, k: usize) {
    to.fill(x, m, k);
}

dispatch!("avx2,fma", 1, 2, 3, 4, 5, 6, 7, 8);

/// 8 scales.
#[inline]
#[target_feature(enable = "avx2")]
fn scales(bytes: &[u8; 16]) -> __m256 {
    // SAFETY: 16 bytes are readable there.
    let narrow = unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) };
    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(narrow)))
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn multiply<const INT4: bool, const M: usize>(tile: &[u8], x: &Prepared, first: usize, sums: &mut Sums) {
    let Some(layout) = Layout::of(if INT4 { Format::Int4 } else { Format::Int8 }) else { return };
    let halves = BLOCK / GROUP;
    let blocks = tile.len() / layout.block;
    let groups = x.groups;
    assert!(groups == blocks * halves && (first + M) * groups <= x.scales.len().min(x.sums.len()));
    assert!((first + M) * groups * GROUP <= x.whole.len());
    let whole = x.whole.as_ptr().cast::<i32>();
    let mut total = [[_mm256_setzero_ps(); M]; 2];
    for (b, block) in tile.chunks_exact(layout.block).enumerate() {
        for line in (0..layout.block).step_by(64) {
            _mm_prefetch::<_MM_HINT_T0>(block.as_ptr().wrapping_add(AHEAD + line).cast());
        }
        for half in 0..halves {
            let group = b * halves + half;
            let per_half = (layout.block - layout.scales) / halves;
            let values = &block[layout.scales + half * per_half..][..per_half];
            for (side, total) in total.iter_mut().enumerate() {
                let mut sum = [_mm256_setzero_si256(); M];
                for (m, sum) in sum.iter_mut().enumerate() {
                    *sum = _mm256_set1_epi32(-layout.bias * x.sums[(first + m) * groups + group]);
                }
                // Four columns: the first and third of each lane, then the second and fourth.
                let mut add = |quad: usize, w: [__m256i; 2]| {
                    for (m, sum) in sum.iter_mut().enumerate() {
                        let at = ((first + m) * groups + group) * (GROUP / 2) + quad * 2;
                        // SAFETY: `at` counts pairs of elements, and lies within the list as was checked; the reads
                        // need no alignment.
                        let a = unsafe { [whole.add(at).read_unaligned(), whole.add(at + 1).read_unaligned()] };
                        for (w, a) in w.into_iter().zip(a) {
                            *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(w, _mm256_set1_epi32(a)));
                        }
                    }
                };
                for (z, chunk) in values.as_chunks::<64>().0.iter().enumerate() {
                    // SAFETY: 32 bytes are readable in either half.
                    let w = unsafe { _mm256_loadu_si256(chunk.as_ptr().add(side * 32).cast()) };
                    if INT4 {
                        let mask = _mm256_set1_epi16(15);
                        let low = [w, _mm256_srli_epi16::<8>(w)].map(|w| _mm256_and_si256(w, mask));
                        add(z, low);
                        let high = _mm256_and_si256(_mm256_srli_epi16::<4>(w), mask);
                        add(z + 4, [high, _mm256_srli_epi16::<12>(w)]);
                    } else {
                        add(z, [_mm256_and_si256(w, _mm256_set1_epi16(255)), _mm256_srli_epi16::<8>(w)]);
                    }
                }
                let scale = match block[layout.scale(side * HALF, half * GROUP)..].first_chunk::<16>() {
                    Some(bytes) => scales(bytes),
                    None => _mm256_setzero_ps(),
                };
                for (m, (total, sum)) in total.iter_mut().zip(sum).enumerate() {
                    let scale = _mm256_mul_ps(scale, _mm256_set1_ps(x.scales[(first + m) * groups + group]));
                    *total = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), scale, *total);
                }
            }
        }
    }
    for (side, total) in total.into_iter().enumerate() {
        for (m, total) in total.into_iter().enumerate() {
            let mut lanes = [0.0; HALF];
            // SAFETY: there is room for 8 numbers.
            unsafe { _mm256_storeu_ps(lanes.as_mut_ptr(), total) };
            sums[side * HALF..].iter_mut().zip(lanes).for_each(|(sums, lane)| sums[m] = lane);
        }
    }
}
