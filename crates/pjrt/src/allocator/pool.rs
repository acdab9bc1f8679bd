//! Large blocks of memory, kept for reuse: bookkeeping alone, no memory is touched here.
//!
//! Addresses come from one reserved range. A block that is freed keeps its pages, so that the next of about its size costs no
//! page faults; but live and kept bytes together never exceed what was live at some moment (plus [`SLACK`]): before the
//! footprint would grow, pages of kept blocks go back to the system, those unused for longest first.

use std::collections::BTreeMap;
use std::ops::Range;

/// Kept bytes that are tolerated beyond the most that was ever live.
pub(crate) const SLACK: usize = 16 << 20;

/// Where blocks lie, and which of them hold pages.
#[derive(Debug)]
pub(crate) struct Pool {
    /// Every block starts at a multiple of this and has a multiple of it to itself.
    grain: usize,
    page: usize,
    end: usize,
    /// Addresses from here on were never used.
    fresh: usize,
    /// Start and length of ranges without pages, below `fresh`; neighbours are merged.
    spans: BTreeMap<usize, usize>,
    live: BTreeMap<usize, Block>,
    kept: Vec<(usize, Block)>,
    live_bytes: usize,
    kept_bytes: usize,
    /// The most bytes that were ever live.
    high: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Block {
    /// Bytes of address space.
    reserved: usize,
    /// Bytes from the start that may hold pages.
    paged: usize,
}

/// What [`Pool::allocate`] found.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) address: usize,
    /// Whether all bytes are known to be zero.
    pub(crate) zero: bool,
    /// Ranges whose pages must be given back before the block is used.
    pub(crate) release: Vec<Range<usize>>,
}

impl Pool {
    /// A pool over a reserved range whose start is a multiple of `grain`.
    pub(crate) fn new(range: Range<usize>, grain: usize, page: usize) -> Self {
        Pool {
            grain,
            page,
            end: range.end,
            fresh: range.start,
            spans: BTreeMap::new(),
            live: BTreeMap::new(),
            kept: Vec::new(),
            live_bytes: 0,
            kept_bytes: 0,
            high: 0,
        }
    }

    /// A block of at least `len` bytes, or `None` where the range is used up.
    pub(crate) fn allocate(&mut self, len: usize) -> Option<Found> {
        let paged = len.checked_next_multiple_of(self.page)?;
        let reserved = len.checked_next_multiple_of(self.grain)?;
        // A kept block that is long enough and not much longer; of several, that which wastes least.
        let waste = |b: &Block| b.paged.abs_diff(paged);
        let fits = |b: &Block| b.reserved >= reserved && waste(b) <= paged / 8;
        let best = self.kept.iter().enumerate().filter(|(_, (_, b))| fits(b)).min_by_key(|(_, (_, b))| waste(b));
        let (address, block, zero) = match best.map(|(i, _)| i) {
            Some(i) => {
                // The order tells which was kept for longest.
                let (address, block) = self.kept.remove(i);
                self.kept_bytes -= block.paged;
                (address, Block { paged: block.paged.max(paged), ..block }, false)
            }
            None => (self.span(reserved)?, Block { reserved, paged }, true),
        };
        self.live.insert(address, block);
        self.live_bytes += block.paged;
        self.high = self.high.max(self.live_bytes);
        Some(Found { address, zero, release: self.shrink() })
    }

    /// Takes a block back. `Err`: no block starts there.
    pub(crate) fn free(&mut self, address: usize) -> Result<Vec<Range<usize>>, ()> {
        let block = self.live.remove(&address).ok_or(())?;
        self.live_bytes -= block.paged;
        self.kept_bytes += block.paged;
        self.kept.push((address, block));
        Ok(self.shrink())
    }

    /// Bytes that the block at an address can hold.
    pub(crate) fn size(&self, address: usize) -> Option<usize> {
        self.live.get(&address).map(|b| b.reserved)
    }

    /// Gives up all kept blocks.
    pub(crate) fn release_all(&mut self) -> Vec<Range<usize>> {
        self.high = self.live_bytes;
        let mut all = Vec::new();
        while let Some(range) = self.release_oldest() {
            all.push(range);
        }
        all
    }

    fn shrink(&mut self) -> Vec<Range<usize>> {
        let mut ranges = Vec::new();
        while self.live_bytes + self.kept_bytes > self.high + SLACK {
            let Some(range) = self.release_oldest() else { break };
            ranges.push(range);
        }
        ranges
    }

    fn release_oldest(&mut self) -> Option<Range<usize>> {
        if self.kept.is_empty() {
            return None;
        }
        let (address, block) = self.kept.remove(0);
        self.kept_bytes -= block.paged;
        self.give_span(address, block.reserved);
        Some(address..address + block.paged)
    }

    fn span(&mut self, len: usize) -> Option<usize> {
        let found = self.spans.iter().filter(|(_, l)| **l >= len).min_by_key(|(_, l)| **l).map(|(&a, &l)| (a, l));
        if let Some((address, available)) = found {
            self.spans.remove(&address);
            if available > len {
                self.spans.insert(address + len, available - len);
            }
            return Some(address);
        }
        let address = self.fresh;
        self.fresh = address.checked_add(len).filter(|&e| e <= self.end)?;
        Some(address)
    }

    fn give_span(&mut self, mut address: usize, mut len: usize) {
        if let Some(after) = self.spans.remove(&(address + len)) {
            len += after;
        }
        if let Some((&before, &l)) = self.spans.range(..address).next_back()
            && before + l == address
        {
            self.spans.remove(&before);
            (address, len) = (before, len + l);
        }
        self.spans.insert(address, len);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MB: usize = 1 << 20;

    fn pool() -> Pool {
        Pool::new(1 << 30..2 << 30, 2 * MB, 4096)
    }

    fn take(p: &mut Pool, len: usize) -> Found {
        p.allocate(len).unwrap()
    }

    #[test]
    fn a_block_comes_back_to_who_needs_its_size() {
        let mut p = pool();
        let a = take(&mut p, 100 * MB);
        assert!(a.zero && a.release.is_empty() && a.address.is_multiple_of(2 * MB));
        assert_eq!(p.free(a.address), Ok(vec![]));
        let b = take(&mut p, 100 * MB - 5000);
        assert_eq!((b.address, b.zero), (a.address, false));
        assert_eq!(p.size(b.address), Some(100 * MB));
        assert_eq!(p.free(b.address + 4096), Err(()));
    }

    #[test]
    fn the_footprint_never_exceeds_what_was_live_at_once() {
        let mut p = pool();
        let lens = [7, 90, 33, 150, 21, 90, 64, 12];
        let mut live: Vec<(usize, usize)> = Vec::new();
        let mut most = 0;
        for round in 0..200usize {
            let len = lens[round * 7 % lens.len()] * MB;
            live.push((take(&mut p, len).address, len));
            most = most.max(p.live_bytes);
            assert!(p.live_bytes + p.kept_bytes <= most + SLACK);
            if live.len() > 3 {
                let (address, _) = live.remove(round % 3);
                p.free(address).unwrap();
            }
            // Nobody lies in anybody.
            let mut sorted = live.clone();
            sorted.sort_unstable();
            assert!(sorted.windows(2).all(|w| w[0].0 + w[0].1 <= w[1].0));
        }
        assert!(p.fresh - (1 << 30) <= 2 * most, "addresses are used again");
    }

    #[test]
    fn pages_go_back_before_others_are_taken() {
        let mut p = pool();
        let a = take(&mut p, 100 * MB).address;
        p.free(a).unwrap();
        // Another size: the first block's pages make room.
        let b = take(&mut p, 60 * MB);
        assert_eq!(b.release, vec![a..a + 100 * MB]);
        assert!(b.zero);
        // A steady state releases nothing.
        p.free(b.address).unwrap();
        for _ in 0..5 {
            let again = take(&mut p, 60 * MB);
            assert!(again.release.is_empty() && !again.zero);
            assert_eq!(p.free(again.address), Ok(vec![]));
        }
        assert_eq!(p.release_all(), vec![b.address..b.address + 60 * MB]);
    }

    #[test]
    fn the_end_of_the_range_is_an_answer() {
        let mut p = pool();
        assert!(p.allocate(900 * MB).is_some());
        assert!(p.allocate(200 * MB).is_none());
        assert!(p.allocate(usize::MAX - 5).is_none());
    }
}
