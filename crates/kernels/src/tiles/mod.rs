//! Kernels for quantised matrices, and how those lie in memory (`docs/reference/quantization.md`).
//!
//! A *tile* is 16 rows by all columns; a tile is a row of *blocks* of 64 columns, which are read one after the other. A
//! vector register holds four columns of 16 rows, so that sums stay in their lanes: nothing is added across a
//! register, and one instruction multiplies 64 weights.
//!
//! The rows of `x` become whole numbers of 16 bits with a scale for each 32 elements. That changes a product less than
//! rounding `x` to bf16 does, and lets integer instructions do the work: within a group of 32 columns all sums are exact
//! in 32 bits, on every level.

/// The `sums` of a level with these features, whose `multiply` takes so many rows of `x`.
#[cfg(target_arch = "x86_64")]
macro_rules! dispatch {
    ($features:literal, $($m:literal),*) => {
        #[target_feature(enable = $features)]
        pub(super) fn sums(format: Format, tile: &[u8], x: &Prepared, xs: Range<usize>, sums: &mut Sums) {
            match (format, xs.len()) {
                $((Format::Int4, $m) => multiply::<true, $m>(tile, x, xs.start, sums),
                  (Format::Int8, $m) => multiply::<false, $m>(tile, x, xs.start, sums),)*
                _ => {}
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

use std::ops::Range;

use half::bf16;

use crate::product::{Rows, Sums};
use crate::{Format, Level};

/// Rows of a tile.
pub(crate) const ROWS: usize = 16;
/// Columns of a block.
pub(crate) const BLOCK: usize = 64;
/// Elements of `x` that share a scale, and columns whose sums are whole numbers.
pub(crate) const GROUP: usize = 32;
/// Largest magnitude of an element of `x`: both bytes of it, taken as signed numbers, stay within 127.
const LARGEST: f32 = 32639.0;

/// How the blocks of a format are laid out: scales, then for each 32 columns the values.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Layout {
    /// Bytes of a block.
    pub(crate) block: usize,
    /// Columns that share a scale.
    pub(crate) group: usize,
    /// Bytes of scales at the start of a block.
    pub(crate) scales: usize,
    /// What is added to a value to store it.
    pub(crate) bias: i32,
}

impl Layout {
    pub(crate) fn of(format: Format) -> Option<Self> {
        match format {
            Format::Int8 => Some(Layout { block: 32 + 1024, group: 64, scales: 32, bias: 128 }),
            Format::Int4 => Some(Layout { block: 64 + 512, group: 32, scales: 64, bias: 8 }),
            Format::F32 | Format::Bf16 => None,
        }
    }

    /// Bytes of a tile of `k` columns.
    pub(crate) fn tile(self, k: usize) -> Option<usize> {
        k.div_ceil(BLOCK).checked_mul(self.block)
    }

    /// Where in a block the value of a row and column is stored, and by how many bits it is shifted.
    pub(crate) fn place(self, row: usize, column: usize) -> (usize, u32) {
        let (half, c) = (column / GROUP, column % GROUP);
        let quad = |c: usize| (c / 4) * 64 + row * 4 + c % 4;
        match self.bias {
            // The lower halves of bytes hold the first 16 columns, the upper ones the others.
            8 => (self.scales + half * 256 + quad(c % 16), 4 * (c as u32 / 16)),
            _ => (self.scales + half * 512 + quad(c), 0),
        }
    }

    /// Where in a block the scale of a row and column is stored.
    pub(crate) fn scale(self, row: usize, column: usize) -> usize {
        (column / self.group * ROWS + row) * 2
    }

    /// The value of a row and column of a tile.
    pub(crate) fn value(self, tile: &[u8], row: usize, column: usize) -> f32 {
        let block = &tile[column / BLOCK * self.block..][..self.block];
        let (at, shift) = self.place(row, column % BLOCK);
        let mask = if self.bias == 8 { 15 } else { 255 };
        let scale = self.scale(row, column % BLOCK);
        let scale = bf16::from_le_bytes([block[scale], block[scale + 1]]).to_f32();
        scale * (i32::from(block[at] >> shift & mask) - self.bias) as f32
    }
}

/// The rows of `x` as whole numbers, padded with zeros to whole blocks.
#[derive(Debug)]
pub(crate) struct Prepared {
    level: Level,
    /// Groups of a row.
    groups: usize,
    /// For each group what a unit is worth.
    scales: Vec<f32>,
    /// For each group the sum of its elements.
    sums: Vec<i32>,
    /// For AVX-512: the elements are `256 high + low`.
    high: Vec<i8>,
    low: Vec<i8>,
    /// For the other levels: whole elements. For AVX2, in each four of them the middle ones are exchanged.
    whole: Vec<i16>,
}

impl Prepared {
    pub(crate) fn new(level: Level, x: Rows<'_>, m: usize, k: usize) -> Self {
        let groups = k.div_ceil(BLOCK) * (BLOCK / GROUP);
        let padded = m * groups * GROUP;
        let (bytes, whole) = if level >= Level::Avx512 { (padded, 0) } else { (0, padded) };
        let mut prepared = Prepared {
            level,
            groups,
            scales: vec![0.0; m * groups],
            sums: vec![0; m * groups],
            high: vec![0; bytes],
            low: vec![0; bytes],
            whole: vec![0; whole],
        };
        match level {
            // SAFETY: pools take only levels that the processor has.
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 | Level::Avx512Bf16 => unsafe { avx512::prepare(&mut prepared, x, m, k) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => unsafe { avx2::prepare(&mut prepared, x, m, k) },
            _ => prepared.fill(x, m, k),
        }
        prepared
    }

    /// Inlined into functions for each level, which compilers then make vectors of.
    #[inline(always)]
    fn fill(&mut self, x: Rows<'_>, m: usize, k: usize) {
        for i in 0..m {
            for g in 0..self.groups {
                let (start, end) = ((g * GROUP).min(k), ((g + 1) * GROUP).min(k));
                let mut values = [0.0; GROUP];
                let from = i * k + start..i * k + end;
                match x {
                    Rows::F32(x) => values[..end - start].copy_from_slice(&x[from]),
                    Rows::Bf16(x) => {
                        for (to, x) in values.iter_mut().zip(&x[from]) {
                            *to = f32::from_bits(u32::from(x.to_bits()) << 16);
                        }
                    }
                }
                self.fill_group(i * self.groups + g, &values);
            }
        }
    }

    #[inline(always)]
    fn fill_group(&mut self, at: usize, values: &[f32; GROUP]) {
        let largest = values.iter().fold(0, |most, v| (v.to_bits() & 0x7fff_ffff).max(most));
        let largest = f32::from_bits(largest);
        // What is not finite spoils the whole product, as it should. What is this small is taken as zero: its units
        // could not be told apart in f32.
        if !largest.is_finite() || largest < 1e-30 {
            self.scales[at] = if largest.is_finite() { 0.0 } else { f32::NAN };
            return;
        }
        self.scales[at] = largest / LARGEST;
        let inverse = LARGEST / largest;
        let mut numbers = [0i32; GROUP];
        let mut sum = 0;
        for (number, v) in numbers.iter_mut().zip(values) {
            *number = round(v * inverse);
            sum += *number;
        }
        self.sums[at] = sum;
        let places = at * GROUP..(at + 1) * GROUP;
        match self.level {
            Level::Avx512 | Level::Avx512Bf16 => {
                let (high, low) = (&mut self.high[places.clone()], &mut self.low[places]);
                for ((high, low), n) in high.iter_mut().zip(low).zip(numbers) {
                    // Truncation to the lower byte; the upper one makes up for its sign.
                    *low = n as i8;
                    *high = ((n + 128) >> 8) as i8;
                }
            }
            Level::Avx2 => {
                for (to, n) in self.whole[places].as_chunks_mut::<4>().0.iter_mut().zip(numbers.as_chunks::<4>().0) {
                    *to = [n[0] as i16, n[2] as i16, n[1] as i16, n[3] as i16];
                }
            }
            Level::Portable => self.whole[places].iter_mut().zip(numbers).for_each(|(to, n)| *to = n as i16),
        }
    }
}

/// To the nearest whole number, for magnitudes below 2^22.
#[inline(always)]
pub(crate) fn round(v: f32) -> i32 {
    // Adding 1.5 * 2^23 leaves a unit of one in the last place of the sum.
    const SHIFT: f32 = 12_582_912.0;
    (v + SHIFT).to_bits() as i32 - SHIFT.to_bits() as i32
}

/// Computes the sums of a tile with some rows (at most 8) of `x`.
pub(crate) fn sums(format: Format, tile: &[u8], x: &Prepared, xs: Range<usize>, sums: &mut Sums) {
    let Some(layout) = Layout::of(format) else { return };
    assert_eq!(tile.len(), x.groups * GROUP / BLOCK * layout.block);
    match x.level {
        // SAFETY: such a level is only prepared for where the processor has it.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 | Level::Avx512Bf16 => unsafe { avx512::sums(format, tile, x, xs, sums) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => unsafe { avx2::sums(format, tile, x, xs, sums) },
        _ => portable::sums(layout, tile, x, xs, sums),
    }
}
