//! For AVX-512, with and without products of bf16.

use std::arch::x86_64::*;

use super::{COLUMNS, Emit, ROWS, Target};

/// One function for each kind of unit: the instruction that multiplies one lane with a register and adds is what differs, and
/// the one that rounds two registers of sums to bf16.
macro_rules! tile {
    ($name:ident, $features:literal, |$sum:ident, $l:ident, $r:ident| $multiply:expr, $narrow:ident) => {
        /// See [`super::tile`].
        #[target_feature(enable = $features)]
        pub(super) unsafe fn $name(
            units: usize,
            l: *const u32,
            r: *const u32,
            sums: *mut f32,
            add: bool,
            emit: Option<&Emit>,
        ) {
            if let Some(e) = emit {
                fetch(e);
            }
            let mut acc = [[_mm512_setzero_ps(); 2]; ROWS];
            let (mut l, mut r) = (l, r);
            for _ in 0..units {
                // SAFETY: the panels have as many units; those of the right one start at cache lines.
                let (r0, r1) = unsafe { (_mm512_load_si512(r.cast()), _mm512_load_si512(r.add(16).cast())) };
                for (i, row) in acc.iter_mut().enumerate() {
                    // SAFETY: as above.
                    let lane = unsafe { _mm512_set1_epi32(*l.add(i).cast()) };
                    for ($sum, right) in row.iter_mut().zip([r0, r1]) {
                        let ($l, $r) = (lane, right);
                        *$sum = $multiply;
                    }
                }
                // SAFETY: at most one past the end.
                (l, r) = unsafe { (l.add(ROWS), r.add(COLUMNS)) };
            }
            if add {
                for (i, row) in acc.iter_mut().enumerate() {
                    for (h, v) in row.iter_mut().enumerate() {
                        // SAFETY: within the tile, which starts at a cache line.
                        *v = _mm512_add_ps(unsafe { _mm512_load_ps(sums.add(i * COLUMNS + 16 * h)) }, *v);
                    }
                }
            }
            // A whole tile goes where it belongs from the registers.
            match emit {
                Some(&Emit { to: Target::F32(y), at, stride, rows: ROWS, columns: COLUMNS }) => {
                    for (i, row) in acc.iter().enumerate() {
                        for (h, v) in row.iter().enumerate() {
                            // SAFETY: the caller's promise.
                            unsafe { _mm512_storeu_ps(y.wrapping_add(at + i * stride + 16 * h), *v) };
                        }
                    }
                }
                Some(&Emit { to: Target::Bf16(y), at, stride, rows: ROWS, columns: COLUMNS }) => {
                    for (i, row) in acc.iter().enumerate() {
                        // SAFETY: as above.
                        unsafe { _mm512_storeu_epi16(y.wrapping_add(at + i * stride).cast(), $narrow(row[0], row[1])) };
                    }
                }
                part => {
                    for (i, row) in acc.iter().enumerate() {
                        for (h, v) in row.iter().enumerate() {
                            // SAFETY: within the tile, which starts at a cache line.
                            unsafe { _mm512_store_ps(sums.add(i * COLUMNS + 16 * h), *v) };
                        }
                    }
                    if let Some(e) = part {
                        // SAFETY: the caller's promise.
                        unsafe { write(sums, e) };
                    }
                }
            }
        }
    };
}

tile!(
    tile_f32,
    "avx512f,avx512bw,avx512vl",
    |sum, l, r| _mm512_fmadd_ps(_mm512_castsi512_ps(l), _mm512_castsi512_ps(r), *sum),
    narrow
);
tile!(
    tile_bf16,
    "avx512f,avx512bw,avx512vl,avx512bf16",
    |sum, l, r| _mm512_dpbf16_ps(*sum, as_bf16(l), as_bf16(r)),
    narrow_bf16
);

/// Asks for the cache lines that a tile will be written to, while it is computed: without, each write waits for memory.
#[inline]
#[target_feature(enable = "avx512f")]
fn fetch(e: &Emit) {
    let (base, bytes) = match e.to {
        Target::F32(y) => (y.cast::<u8>(), 4),
        Target::Bf16(y) => (y.cast::<u8>(), 2),
    };
    for i in 0..e.rows {
        let row = base.wrapping_add((e.at + i * e.stride) * bytes);
        for line in (0..e.columns * bytes).step_by(64) {
            _mm_prefetch::<_MM_HINT_ET0>(row.wrapping_add(line).cast());
        }
    }
}

/// Rounds 32 sums to bf16.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn narrow(low: __m512, high: __m512) -> __m512i {
    _mm512_inserti64x4::<1>(_mm512_castsi256_si512(rounded(low)), rounded(high))
}

/// As [`narrow`], by the instruction made for it.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn narrow_bf16(low: __m512, high: __m512) -> __m512i {
    // SAFETY: both are 512 bits without meaning of their own.
    unsafe { std::mem::transmute(_mm512_cvtne2ps_pbh(high, low)) }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn as_bf16(v: __m512i) -> __m512bh {
    // SAFETY: both are 512 bits without meaning of their own.
    unsafe { std::mem::transmute(v) }
}

/// To bf16, nearest and ties to even, in the upper halves of the lanes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(crate) fn rounded(v: __m512) -> __m256i {
    let bits = _mm512_castps_si512(v);
    let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
    let bias = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    let sum = _mm512_srli_epi32::<16>(_mm512_add_epi32(bits, bias));
    // The bias would carry the payload of some NaNs into the sign.
    let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(v, v);
    _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(sum, nan, _mm512_set1_epi32(0x7fc0)))
}

/// Writes the part of a tile that is there.
///
/// # Safety
/// The tile starts at a cache line, the place lies within the target.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn write(sums: *const f32, e: &Emit) {
    let mask = (u64::MAX >> (64 - e.columns.clamp(1, COLUMNS))) as u32;
    for i in 0..e.rows {
        // SAFETY: the caller's promise; lanes outside are masked.
        unsafe {
            let [low, high] = [0, 16].map(|h| _mm512_load_ps(sums.add(i * COLUMNS + h)));
            match e.to {
                Target::F32(y) => {
                    let y = y.wrapping_add(e.at + i * e.stride);
                    _mm512_mask_storeu_ps(y, mask as u16, low);
                    _mm512_mask_storeu_ps(y.wrapping_add(16), (mask >> 16) as u16, high);
                }
                Target::Bf16(y) => {
                    let y = y.wrapping_add(e.at + i * e.stride).cast();
                    _mm512_mask_storeu_epi16(y, mask, narrow(low, high));
                }
            }
        }
    }
}

/// Transposes 16 by 16 lanes.
#[inline]
#[target_feature(enable = "avx512f")]
fn transpose(r: &mut [__m512i; 16]) {
    let mut t = *r;
    for i in (0..16).step_by(2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for i in (0..16).step_by(4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for i in 0..4 {
        t[i] = _mm512_shuffle_i32x4::<0x88>(r[i], r[i + 4]);
        t[i + 4] = _mm512_shuffle_i32x4::<0xdd>(r[i], r[i + 4]);
        t[i + 8] = _mm512_shuffle_i32x4::<0x88>(r[i + 8], r[i + 12]);
        t[i + 12] = _mm512_shuffle_i32x4::<0xdd>(r[i + 8], r[i + 12]);
    }
    for i in 0..8 {
        r[i] = _mm512_shuffle_i32x4::<0x88>(t[i], t[i + 8]);
        r[i + 8] = _mm512_shuffle_i32x4::<0xdd>(t[i], t[i + 8]);
    }
}

/// Copies lanes whose units lie side by side: lane `i` starts at `from + i * stride`.
///
/// # Safety
/// `lanes` lanes of `units` units are readable, `W * units` units writable.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) unsafe fn lanes<const W: usize>(from: *const u32, stride: usize, lanes: usize, units: usize, to: *mut u32) {
    for first in (0..W).step_by(16) {
        for u in (0..units).step_by(16) {
            let here = (units - u).min(16);
            let mask = ((1u32 << here) - 1) as u16;
            let mut r = [_mm512_setzero_si512(); 16];
            for (i, r) in r.iter_mut().enumerate() {
                if first + i < lanes && first + i < W {
                    let unit = from.wrapping_add((first + i) * stride + u);
                    // SAFETY: a lane that is there, of which the mask leaves the units that are.
                    *r = unsafe { _mm512_maskz_loadu_epi32(mask, unit.cast()) };
                    // The next panel's: lanes are too far apart for the processor to guess.
                    _mm_prefetch::<_MM_HINT_T1>(unit.wrapping_add(W * stride).cast());
                }
            }
            transpose(&mut r);
            for (i, r) in r.iter().enumerate().take(here) {
                // SAFETY: within the panel.
                unsafe { store::<W>(to.add((u + i) * W + first), *r) };
            }
        }
    }
}

/// Copies lanes of bf16 that lie side by side, row upon row, into `panels` panels: units are made of two rows.
///
/// # Safety
/// `max(W, 16)` elements are readable for every panel in each of `2 * units` rows, and `W * units * panels` units writable.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) unsafe fn pairs<const W: usize>(from: *const u16, stride: usize, units: usize, panels: usize, to: *mut u32) {
    for u in 0..units {
        for panel in 0..panels {
            for first in (0..W).step_by(16) {
                let lane = panel * W + first;
                // SAFETY: the caller's promise.
                unsafe {
                    let even = _mm256_loadu_si256(from.add(2 * u * stride + lane).cast());
                    let odd = _mm256_loadu_si256(from.add((2 * u + 1) * stride + lane).cast());
                    let odd = _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(odd));
                    let both = _mm512_or_si512(_mm512_cvtepu16_epi32(even), odd);
                    store::<W>(to.add((panel * units + u) * W + first), both);
                }
            }
        }
    }
}

/// Copies lanes of f32 that lie side by side, row upon row, into `panels` panels.
///
/// # Safety
/// `max(W, 16)` elements are readable for every panel in each of `units` rows, and `W * units * panels` units writable.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) unsafe fn rows<const W: usize>(from: *const u32, stride: usize, units: usize, panels: usize, to: *mut u32) {
    for u in 0..units {
        for panel in 0..panels {
            for first in (0..W).step_by(16) {
                // SAFETY: the caller's promise.
                unsafe {
                    let v = _mm512_loadu_si512(from.add(u * stride + panel * W + first).cast());
                    store::<W>(to.add((panel * units + u) * W + first), v);
                }
            }
        }
    }
}

/// Writes 16 lanes, or those that a narrower panel has.
///
/// # Safety
/// So many lanes are writable.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn store<const W: usize>(to: *mut u32, v: __m512i) {
    // SAFETY: the caller's promise.
    unsafe {
        match W % 16 {
            0 => _mm512_storeu_si512(to.cast(), v),
            lanes => _mm512_mask_storeu_epi32(to.cast(), (1 << lanes) - 1, v),
        }
    }
}
