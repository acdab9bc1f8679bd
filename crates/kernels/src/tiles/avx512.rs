//! For AVX-512 with VNNI.
//!
//! The instruction used multiplies four unsigned bytes with four signed ones and adds the products to a lane. Weights are
//! stored with a bias that makes them unsigned, which is taken back through the sums of `x`; an element of `x` is
//! two signed bytes, each with sums of its own.

use std::arch::x86_64::*;
use std::ops::Range;

use super::{BLOCK, GROUP, Layout, Prepared, ROWS};
use crate::Format;
use crate::product::{Rows, Sums};

/// How far ahead memory is asked for, in bytes: into the second cache, which waits for more lines at once than the first one can.
const AHEAD: usize = 12 << 10;

#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn prepare(to: &mut Prepared, x: Rows<'_>, m: usize, k: usize) {
    to.fill(x, m, k);
}

dispatch!("avx512f,avx512bw,avx512vl,avx512vnni", 1, 2, 3, 4, 5, 6, 7, 8);

/// 16 scales.
#[inline]
#[target_feature(enable = "avx512f")]
fn scales(bytes: &[u8; 32]) -> __m512 {
    // SAFETY: 32 bytes are readable there.
    let narrow = unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) };
    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(narrow)))
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn multiply<const INT4: bool, const M: usize>(tile: &[u8], x: &Prepared, first: usize, sums: &mut Sums) {
    let Some(layout) = Layout::of(if INT4 { Format::Int4 } else { Format::Int8 }) else { return };
    let halves = BLOCK / GROUP;
    let blocks = tile.len() / layout.block;
    let groups = x.groups;
    assert!(groups == blocks * halves && (first + M) * groups <= x.scales.len().min(x.sums.len()));
    assert!((first + M) * groups * GROUP <= x.high.len().min(x.low.len()));
    let (high, low) = (x.high.as_ptr().cast::<i32>(), x.low.as_ptr().cast::<i32>());
    let mask = _mm512_set1_epi8(15);
    let mut total = [_mm512_setzero_ps(); M];
    for (b, block) in tile.chunks_exact(layout.block).enumerate() {
        for line in (0..layout.block).step_by(64) {
            _mm_prefetch::<_MM_HINT_T1>(block.as_ptr().wrapping_add(AHEAD + line).cast());
        }
        for half in 0..halves {
            let group = b * halves + half;
            let mut sum_high = [_mm512_setzero_si512(); M];
            let mut sum_low = [_mm512_setzero_si512(); M];
            for (m, sum) in sum_low.iter_mut().enumerate() {
                // SAFETY: the lists are as long as was checked.
                let of_x = unsafe { *x.sums.get_unchecked((first + m) * groups + group) };
                *sum = _mm512_set1_epi32(-layout.bias * of_x);
            }
            let mut add = |quad: usize, w: __m512i| {
                for m in 0..M {
                    let at = ((first + m) * groups + group) * (GROUP / 4) + quad;
                    // SAFETY: `at` counts fours of bytes, and lies within the lists as was checked; the reads need no
                    // alignment.
                    let (a, b) = unsafe { (high.add(at).read_unaligned(), low.add(at).read_unaligned()) };
                    sum_high[m] = _mm512_dpbusd_epi32(sum_high[m], w, _mm512_set1_epi32(a));
                    sum_low[m] = _mm512_dpbusd_epi32(sum_low[m], w, _mm512_set1_epi32(b));
                }
            };
            let per_half = (layout.block - layout.scales) / halves;
            let values = &block[layout.scales + half * per_half..][..per_half];
            for (z, chunk) in values.as_chunks::<64>().0.iter().enumerate() {
                // SAFETY: 64 bytes are readable there.
                let w = unsafe { _mm512_loadu_si512(chunk.as_ptr().cast()) };
                if INT4 {
                    add(z, _mm512_and_si512(w, mask));
                    add(z + 4, _mm512_and_si512(_mm512_srli_epi16::<4>(w), mask));
                } else {
                    add(z, w);
                }
            }
            let scale = match block[layout.scale(0, half * GROUP)..].first_chunk::<32>() {
                Some(bytes) => scales(bytes),
                None => _mm512_setzero_ps(),
            };
            for m in 0..M {
                // SAFETY: the list is as long as was checked.
                let of_x = unsafe { *x.scales.get_unchecked((first + m) * groups + group) };
                let sum = _mm512_add_epi32(_mm512_slli_epi32::<8>(sum_high[m]), sum_low[m]);
                let scale = _mm512_mul_ps(scale, _mm512_set1_ps(of_x));
                total[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, total[m]);
            }
        }
    }
    for (m, total) in total.into_iter().enumerate() {
        let mut lanes = [0.0; ROWS];
        // SAFETY: there is room for 16 numbers.
        unsafe { _mm512_storeu_ps(lanes.as_mut_ptr(), total) };
        sums.iter_mut().zip(lanes).for_each(|(sums, lane)| sums[m] = lane);
    }
}
