//! Units of work `0..n`, shared out so that each thread reads memory in one direction.
//!
//! Every thread starts with a contiguous part of its own and takes from its front. One that is done takes from the back
//! of another's part, so that a thread that was late, or never came, delays nobody.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

/// One thread's part on a cache line of its own: the next unit in the low half, the end in the high half.
#[repr(align(64))]
struct Part(AtomicU64);

pub(crate) struct Split {
    parts: Vec<Part>,
    grain: u32,
}

fn pack(next: u32, end: u32) -> u64 {
    u64::from(end) << 32 | u64::from(next)
}

fn unpack(part: u64) -> (u32, u32) {
    // Truncation takes the halves apart.
    (part as u32, (part >> 32) as u32)
}

impl Split {
    /// Units `0..n` for `threads` threads, taken `grain` at a time.
    pub(crate) fn new(n: u32, threads: usize, grain: u32) -> Self {
        let bound = |i: usize| (u64::from(n) * i as u64 / threads as u64) as u32;
        let parts = (0..threads).map(|i| Part(AtomicU64::new(pack(bound(i), bound(i + 1))))).collect();
        Split { parts, grain: grain.max(1) }
    }

    /// The next units for a thread. `None`: all have been taken.
    pub(crate) fn take(&self, thread: usize) -> Option<Range<usize>> {
        let n = self.parts.len();
        let own = thread % n;
        if let Some(range) = self.claim(own, |next, end| (next + self.grain.min(end - next), end)) {
            return Some(range);
        }
        (1..n).find_map(|i| self.claim((own + i) % n, |next, end| (next, end - self.grain.min(end - next))))
    }

    /// Makes a part smaller; what it lost is the claim.
    fn claim(&self, part: usize, smaller: impl Fn(u32, u32) -> (u32, u32)) -> Option<Range<usize>> {
        let part = &self.parts[part].0;
        let mut now = part.load(Ordering::Relaxed);
        loop {
            let (next, end) = unpack(now);
            if next >= end {
                return None;
            }
            let (new_next, new_end) = smaller(next, end);
            // The units carry no data between threads: what each computes is published when it leaves the task.
            match part.compare_exchange_weak(now, pack(new_next, new_end), Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) if new_next > next => return Some(next as usize..new_next as usize),
                Ok(_) => return Some(new_end as usize..end as usize),
                Err(found) => now = found,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[test]
    fn every_unit_is_taken_once() {
        for (n, threads, grain) in [(0, 1, 1), (1, 3, 4), (100, 2, 3), (1000, 4, 7), (17, 4, 100)] {
            let split = Split::new(n, threads, grain);
            let taken = Mutex::new(Vec::new());
            std::thread::scope(|scope| {
                // The last thread never comes.
                for thread in 0..threads.max(2) - 1 {
                    let (split, taken) = (&split, &taken);
                    scope.spawn(move || {
                        while let Some(range) = split.take(thread) {
                            taken.lock().unwrap().extend(range);
                        }
                    });
                }
            });
            let mut taken = taken.into_inner().unwrap();
            taken.sort_unstable();
            assert_eq!(taken, (0..n as usize).collect::<Vec<_>>());
        }
    }

    #[test]
    fn own_units_come_in_order() {
        let split = Split::new(10, 2, 2);
        let mut own = Vec::new();
        while let Some(range) = split.take(1) {
            own.push(range);
        }
        assert_eq!(own, [5..7, 7..9, 9..10, 3..5, 1..3, 0..1]);
    }
}
