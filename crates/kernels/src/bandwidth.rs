//! How fast memory can be read: what every product is measured against.

use std::hint::black_box;
use std::time::{Duration, Instant};

use memmap2::MmapMut;

use crate::split::Split;
use crate::{KernelError, Pool};

/// Bytes that a thread takes at a time.
const PIECE: usize = 1 << 20;

/// Times of reading `bytes` of fresh memory (at least twice the largest cache, to mean anything) `repeats` times with the
/// threads of a pool, which only add the numbers up.
///
/// # Errors
/// When there is no such memory.
pub fn reading_times(pool: &Pool, bytes: usize, repeats: usize) -> Result<Vec<Duration>, KernelError> {
    let pieces = u32::try_from(bytes / PIECE).map_err(|_| KernelError::TooLarge { n: 1, k: bytes })?.max(1);
    let bytes = pieces as usize * PIECE;
    let failed = |e: std::io::Error| KernelError::Memory { bytes, reason: e.to_string() };
    let mut memory = MmapMut::map_anon(bytes).map_err(failed)?;
    #[cfg(target_os = "linux")]
    let _ = memory.advise(memmap2::Advice::HugePage);
    // Untouched memory would all be one page of zeros.
    memory.iter_mut().step_by(64).for_each(|byte| *byte = 1);
    let time = || {
        let split = Split::new(pieces, pool.threads(), 1);
        let start = Instant::now();
        pool.run(&|thread| {
            let mut sums = [0u64; 32];
            while let Some(taken) = split.take(thread) {
                let numbers = memory[taken.start * PIECE..taken.end * PIECE].as_chunks::<8>().0;
                for chunk in numbers.as_chunks::<32>().0 {
                    sums.iter_mut().zip(chunk).for_each(|(sum, &n)| *sum = sum.wrapping_add(u64::from_ne_bytes(n)));
                }
            }
            black_box(sums);
        });
        start.elapsed()
    };
    Ok((0..repeats).map(|_| time()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_repeat_takes_time() {
        let times = reading_times(&Pool::new(2), 3 << 20, 4).unwrap();
        assert!(times.len() == 4 && times.iter().all(|t| !t.is_zero()), "{times:?}");
    }
}
