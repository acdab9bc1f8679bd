//! Reads what a copy would write, without writing it: for comparisons and statistics.

use super::source::{Reader, Scratch, boxes};
use super::{CopyError, Item, Store};
use crate::orbax::Region;

/// One item, read box by box. Each thread makes its own.
#[derive(Debug)]
pub struct ItemReader<'a> {
    item: &'a Item,
    reader: Reader<'a>,
    scratch: Scratch,
}

impl<'a> ItemReader<'a> {
    /// Finds the source of an item and checks that it can become the target that the item describes.
    ///
    /// # Errors
    /// [`CopyError::Items`] when it is not there or has another shape or kind of element.
    pub fn new(stores: &[Store<'a>], item: &'a Item) -> Result<Self, CopyError> {
        let reader = Reader::new(stores, item).map_err(|problem| CopyError::Items(vec![problem]))?;
        Ok(ItemReader { item, reader, scratch: Scratch::default() })
    }

    /// Boxes should begin and end at multiples of this along the first dimension; others cost twice the work.
    #[must_use]
    pub fn grain(&self) -> usize {
        self.reader.grain()
    }

    /// Consecutive boxes of about `bytes` bytes that cover the target row-major, each dense in it. Cuts of the first
    /// dimension are multiples of `grain`.
    #[must_use]
    pub fn boxes(&self, bytes: usize, grain: usize) -> Vec<Region> {
        let mut out = Vec::new();
        let elements = self.reader.piece_bytes(bytes) / self.item.dtype.size();
        boxes(&self.item.shape, elements, grain, &mut |region| out.push(region));
        out
    }

    /// Fills `out` with the elements of a box of the target, dense, row-major, little-endian, in the target's type.
    /// `out` is made to fit.
    ///
    /// # Errors
    /// When the source is damaged, or the box lies outside of the target.
    pub fn read(&mut self, region: &Region, out: &mut Vec<u8>) -> Result<(), CopyError> {
        if !region.fits(&self.item.shape) {
            return Err(CopyError::Items(vec![format!(
                "{}: {region} lies outside of {}",
                self.item.from, self.item.shape
            )]));
        }
        out.resize(region.elements() * self.item.dtype.size(), 0);
        self.read_into(region, out)
    }

    /// As [`read`](Self::read), into memory that has the box's size.
    ///
    /// # Errors
    /// As [`read`](Self::read); also when `out` has another size.
    pub fn read_into(&mut self, region: &Region, out: &mut [u8]) -> Result<(), CopyError> {
        let fits = region.fits(&self.item.shape) && out.len() == region.elements() * self.item.dtype.size();
        if !fits {
            return Err(CopyError::Items(vec![format!(
                "{}: {region} of {} into {} bytes",
                self.item.from,
                self.item.shape,
                out.len()
            )]));
        }
        self.reader.read(region, out, &mut self.scratch)
    }

    /// Says that nothing more will be read: mapped pages stop counting as this process's memory.
    pub fn done(&self) {
        self.reader.done();
    }
}
