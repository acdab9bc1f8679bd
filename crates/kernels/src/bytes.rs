//! Memory that something else keeps alive.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

/// A part of the bytes of a shared owner, such as a mapped file. Cloning costs one reference count.
#[derive(Clone)]
pub struct Bytes {
    owner: Arc<dyn AsRef<[u8]> + Send + Sync>,
    range: Range<usize>,
}

impl Bytes {
    /// All bytes of an owner.
    #[must_use]
    pub fn new(owner: Arc<dyn AsRef<[u8]> + Send + Sync>) -> Self {
        let range = 0..(*owner).as_ref().len();
        Bytes { owner, range }
    }

    /// A part of them, or `None` if it does not lie within.
    #[must_use]
    pub fn slice(&self, range: Range<usize>) -> Option<Bytes> {
        let start = self.range.start.checked_add(range.start)?;
        let end = self.range.start.checked_add(range.end)?;
        (start <= end && end <= self.range.end).then(|| Bytes { owner: Arc::clone(&self.owner), range: start..end })
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.range.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }

    /// The bytes. Fewer than [`Bytes::len`] only if the owner has shrunk, which no sensible one does.
    #[must_use]
    pub fn as_slice(&self) -> &[u8] {
        (*self.owner).as_ref().get(self.range.clone()).unwrap_or_default()
    }
}

impl From<Vec<u8>> for Bytes {
    fn from(bytes: Vec<u8>) -> Self {
        Bytes::new(Arc::new(bytes))
    }
}

impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Bytes({:?})", self.range)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_stay_within() {
        let all = Bytes::from(vec![1, 2, 3, 4, 5]);
        let part = all.slice(1..4).unwrap();
        assert_eq!((part.as_slice(), part.len(), part.is_empty()), (&[2, 3, 4][..], 3, false));
        assert_eq!(part.slice(1..3).unwrap().as_slice(), [3, 4]);
        assert!(part.slice(1..4).is_none() && part.slice(usize::MAX..usize::MAX).is_none());
        #[allow(clippy::reversed_empty_ranges)]
        let reversed = 3..2;
        assert!(all.slice(reversed).is_none());
    }
}
