//! Weights as whole numbers of 8 or 4 bits with scales.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use half::bf16;
use memmap2::MmapMut;

use crate::tiles::{BLOCK, Layout, ROWS, round};
use crate::{Bytes, Format, KernelError, Level, Matrix, Pool};

/// Step counts that are tried for 4 bits: how many steps reach from zero to the largest weight of a group.
const STEPS: [f32; 7] = [6.6, 7.0, 7.4, 7.8, 8.2, 8.6, 9.0];

impl Matrix {
    /// The matrix in [`Format::Int8`] or [`Format::Int4`], in memory of its own. Both threads and vector instructions
    /// are the pool's.
    ///
    /// # Errors
    /// When it is quantised already, the format is neither of the two, a weight is not finite, or there is no memory.
    pub fn quantize(&self, pool: &Pool, format: Format) -> Result<Matrix, KernelError> {
        let (n, k) = (self.n(), self.k());
        let (_, size) = self.quantized(format)?;
        if size == 0 {
            return Matrix::new(format, Bytes::from(Vec::new()), n, k);
        }
        let failed = |e: std::io::Error| KernelError::Memory { bytes: size, reason: e.to_string() };
        let mut memory = MmapMut::map_anon(size).map_err(failed)?;
        // Large pages make reading faster; without them it is still right.
        #[cfg(target_os = "linux")]
        let _ = memory.advise(memmap2::Advice::HugePage);
        self.quantize_into(pool, format, &mut memory)?;
        let memory = memory.make_read_only().map_err(failed)?;
        Matrix::new(format, Bytes::new(Arc::new(memory)), n, k)
    }

    /// The same into memory of [`Format::bytes`] bytes. Tiles do not depend on each other: a matrix may be quantised in parts
    /// of a multiple of 16 rows, one behind the other.
    ///
    /// # Errors
    /// As [`Matrix::quantize`]; also when the memory has another size.
    pub fn quantize_into(&self, pool: &Pool, format: Format, out: &mut [u8]) -> Result<(), KernelError> {
        let (n, k) = (self.n(), self.k());
        let (layout, size) = self.quantized(format)?;
        let tile = layout.tile(k).ok_or(KernelError::TooLarge { n, k })?;
        if out.len() != size {
            return Err(KernelError::Size { format, n, k, needed: size, got: out.len() });
        }
        let bad_row = AtomicUsize::new(usize::MAX);
        let tiles = Mutex::new(out.chunks_exact_mut(tile.max(1)).enumerate());
        let source = self.bytes().as_slice();
        pool.run(&|_| {
            let mut rows = vec![0.0; ROWS * k];
            loop {
                let next = tiles.lock().unwrap_or_else(PoisonError::into_inner).next();
                let Some((index, tile)) = next else { break };
                let row = index * ROWS;
                let here = ROWS.min(n - row);
                self.widen(source, row, &mut rows[..here * k]);
                if let Err(at) = fill(pool.level(), layout, &rows[..here * k], k, tile) {
                    bad_row.fetch_min(row + at, Ordering::Relaxed);
                }
            }
        });
        match bad_row.into_inner() {
            usize::MAX => Ok(()),
            row => Err(KernelError::NotFinite { row }),
        }
    }

    /// How it would lie in a format, and in how many bytes.
    fn quantized(&self, format: Format) -> Result<(Layout, usize), KernelError> {
        let Some(layout) = Layout::of(format) else { return Err(KernelError::NotQuantized(format)) };
        if Layout::of(self.format()).is_some() {
            return Err(KernelError::Quantized(self.format()));
        }
        let (n, k) = (self.n(), self.k());
        Ok((layout, format.bytes(n, k).ok_or(KernelError::TooLarge { n, k })?))
    }
}

/// Quantises the rows of a tile, at most 16; the missing ones become zeros. The error is the first row that is not finite.
fn fill(level: Level, layout: Layout, rows: &[f32], k: usize, tile: &mut [u8]) -> Result<(), usize> {
    match level {
        // SAFETY: pools take only levels that the processor has.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 | Level::Avx512Bf16 => unsafe { fill_avx512(layout, rows, k, tile) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => unsafe { fill_avx2(layout, rows, k, tile) },
        _ => fill_any(layout, rows, k, tile),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,fma")]
fn fill_avx512(layout: Layout, rows: &[f32], k: usize, tile: &mut [u8]) -> Result<(), usize> {
    fill_any(layout, rows, k, tile)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn fill_avx2(layout: Layout, rows: &[f32], k: usize, tile: &mut [u8]) -> Result<(), usize> {
    fill_any(layout, rows, k, tile)
}

/// Inlined into a function for each level, which compilers then make vectors of.
#[inline(always)]
fn fill_any(layout: Layout, rows: &[f32], k: usize, tile: &mut [u8]) -> Result<(), usize> {
    for (b, block) in tile.chunks_exact_mut(layout.block).enumerate() {
        for row in 0..ROWS {
            let mut values = [0.0; BLOCK];
            let (start, end) = ((b * BLOCK).min(k), ((b + 1) * BLOCK).min(k));
            if let Some(values_of_row) = rows.get(row * k..(row + 1) * k) {
                values[..end - start].copy_from_slice(&values_of_row[start..end]);
            }
            let largest = values.iter().fold(0, |most, v| (v.to_bits() & 0x7fff_ffff).max(most));
            if !f32::from_bits(largest).is_finite() {
                return Err(row);
            }
            if layout.bias == 8 {
                for (half, values) in values.as_chunks::<32>().0.iter().enumerate() {
                    let (scale, numbers) = four_bits(values);
                    let at = layout.scale(row, half * 32);
                    block[at..at + 2].copy_from_slice(&scale.to_le_bytes());
                    // See `Layout::place`: columns 16 apart share a byte.
                    let to = &mut block[layout.scales + half * 256..][..256];
                    for c in 0..16 {
                        to[c / 4 * 64 + row * 4 + c % 4] = numbers[c] | numbers[c + 16] << 4;
                    }
                }
            } else {
                let (scale, numbers) = eight_bits(&values, f32::from_bits(largest));
                let at = layout.scale(row, 0);
                block[at..at + 2].copy_from_slice(&scale.to_le_bytes());
                for (half, numbers) in numbers.as_chunks::<32>().0.iter().enumerate() {
                    let to = &mut block[layout.scales + half * 512..][..512];
                    for (quad, numbers) in numbers.as_chunks::<4>().0.iter().enumerate() {
                        to[quad * 64 + row * 4..][..4].copy_from_slice(numbers);
                    }
                }
            }
        }
    }
    Ok(())
}

/// The inverse of a scale; zero for one that stands for zeros.
#[inline(always)]
fn inverse(scale: bf16) -> f32 {
    let scale = scale.to_f32();
    if scale.abs() < f32::MIN_POSITIVE * 256.0 { 0.0 } else { 1.0 / scale }
}

/// From -127 to 127, with the bias of 128.
#[inline(always)]
fn eight_bits(values: &[f32; BLOCK], largest: f32) -> (bf16, [u8; BLOCK]) {
    let scale = bf16::from_f32(largest / 127.0);
    let inverse = inverse(scale);
    let mut numbers = [0; BLOCK];
    for (number, v) in numbers.iter_mut().zip(values) {
        *number = (round((v * inverse).clamp(-127.0, 127.0)) + 128) as u8;
    }
    (scale, numbers)
}

/// From -8 to 7, with the bias of 8. Of several numbers of steps to the largest weight the one is taken that leaves the
/// least squared error once the scale has been fitted to its whole numbers.
#[inline(always)]
fn four_bits(values: &[f32; 32]) -> (bf16, [u8; 32]) {
    let mut largest = 0.0f32;
    for &v in values {
        largest = if v.abs() > largest.abs() { v } else { largest };
    }
    let (mut best, mut fitted) = (-1.0f32, 0.0f32);
    // Numbers this small have no inverse.
    if largest.abs() > 1e-30 {
        for steps in STEPS {
            // The largest weight comes to lie at -8, of which there is no positive counterpart.
            let inverse = -steps / largest;
            let (mut with_weight, mut with_itself) = ([0.0f32; 8], [0.0f32; 8]);
            for chunk in values.as_chunks::<8>().0 {
                for (i, v) in chunk.iter().enumerate() {
                    let number = round((v * inverse).clamp(-8.0, 7.0)) as f32;
                    with_weight[i] += number * v;
                    with_itself[i] += number * number;
                }
            }
            let (with_weight, with_itself) = (with_weight.iter().sum::<f32>(), with_itself.iter().sum::<f32>());
            // By so much do the numbers, times the fitted scale, lower the squared error.
            let gain = with_weight * with_weight / with_itself;
            if gain > best {
                (best, fitted) = (gain, with_weight / with_itself);
            }
        }
    }
    // The sums of absurdly large weights overflow.
    let scale = bf16::from_f32(if fitted.is_finite() { fitted } else { largest / -8.0 });
    let inverse = inverse(scale);
    let mut numbers = [0; 32];
    for (number, v) in numbers.iter_mut().zip(values) {
        *number = (round((v * inverse).clamp(-8.0, 7.0)) + 8) as u8;
    }
    (scale, numbers)
}

#[cfg(test)]
#[path = "quantize_tests.rs"]
mod tests;
