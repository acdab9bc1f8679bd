//! How fast memory can be read: what every product is measured against.

use std::hint::black_box;
use std::time::{Duration, Instant};

use memmap2::MmapMut;

use crate::split::Split;
use crate::{KernelError, Level, Pool};

/// Bytes that a thread takes at a time.
const PIECE: usize = 1 << 20;

/// Memory to be read, for its speed.
#[derive(Debug)]
pub struct Reading {
    memory: MmapMut,
}

impl Reading {
    /// Takes `bytes` of memory: at least a few times the largest cache, to mean anything.
    ///
    /// # Errors
    /// When there is no such memory.
    pub fn new(bytes: usize) -> Result<Self, KernelError> {
        let bytes = bytes.max(PIECE) / PIECE * PIECE;
        if bytes / PIECE > u32::MAX as usize {
            return Err(KernelError::TooLarge { n: 1, k: bytes });
        }
        let failed = |e: std::io::Error| KernelError::Memory { bytes, reason: e.to_string() };
        let mut memory = MmapMut::map_anon(bytes).map_err(failed)?;
        #[cfg(target_os = "linux")]
        let _ = memory.advise(memmap2::Advice::HugePage);
        // Untouched memory would all be one page of zeros.
        memory.iter_mut().step_by(64).for_each(|byte| *byte = 1);
        Ok(Reading { memory })
    }

    /// Bytes that are read.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.memory.len()
    }

    /// The time in which the threads of a pool read it once, only adding the numbers up.
    #[must_use]
    pub fn time(&self, pool: &Pool) -> Duration {
        // The size was checked.
        let pieces = u32::try_from(self.memory.len() / PIECE).unwrap_or(u32::MAX);
        let split = Split::new(pieces, pool.threads(), 1);
        let start = Instant::now();
        pool.run(&|thread| {
            while let Some(taken) = split.take(thread) {
                black_box(add_up(pool.level(), &self.memory[taken.start * PIECE..taken.end * PIECE]));
            }
        });
        start.elapsed()
    }
}

/// The sum of all 64-bit numbers, with the widest loads of the level: narrower ones do not read as fast as there is
/// memory.
fn add_up(level: Level, bytes: &[u8]) -> u64 {
    match level {
        // SAFETY: pools take only levels that the processor has.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 | Level::Avx512Bf16 => unsafe { add_up_avx512(bytes) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => unsafe { add_up_avx2(bytes) },
        _ => add_up_any(bytes),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn add_up_avx512(bytes: &[u8]) -> u64 {
    use std::arch::x86_64::*;
    let mut sums = [_mm512_setzero_si512(); 4];
    let (chunks, rest) = bytes.as_chunks::<256>();
    for chunk in chunks {
        for (sum, part) in sums.iter_mut().zip(chunk.as_chunks::<64>().0) {
            // SAFETY: 64 bytes are readable there.
            *sum = _mm512_add_epi64(*sum, unsafe { _mm512_loadu_si512(part.as_ptr().cast()) });
        }
    }
    let all = sums.into_iter().fold(_mm512_setzero_si512(), |all, sum| _mm512_add_epi64(all, sum));
    (_mm512_reduce_add_epi64(all) as u64).wrapping_add(add_up_any(rest))
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn add_up_avx2(bytes: &[u8]) -> u64 {
    add_up_any(bytes)
}

#[inline(always)]
fn add_up_any(bytes: &[u8]) -> u64 {
    let mut sums = [0u64; 16];
    let (chunks, rest) = bytes.as_chunks::<8>().0.as_chunks::<16>();
    for chunk in chunks {
        sums.iter_mut().zip(chunk).for_each(|(sum, &n)| *sum = sum.wrapping_add(u64::from_le_bytes(n)));
    }
    let rest = rest.iter().map(|&n| u64::from_le_bytes(n));
    sums.into_iter().chain(rest).fold(0, u64::wrapping_add)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_level_adds_up_everything() {
        let bytes: Vec<u8> = (0..8 * 1001).map(|i| (i * 37 % 251) as u8).collect();
        let wanted = bytes.as_chunks().0.iter().fold(0u64, |sum, &n| sum.wrapping_add(u64::from_le_bytes(n)));
        for level in Level::available() {
            assert_eq!(add_up(level, &bytes), wanted, "{level}");
        }
    }

    #[test]
    fn every_repeat_takes_time() {
        let reading = Reading::new((3 << 20) + 5).unwrap();
        assert_eq!(reading.bytes(), 3 << 20);
        let pool = Pool::new(2);
        assert!((0..4).all(|_| !reading.time(&pool).is_zero()));
    }
}
