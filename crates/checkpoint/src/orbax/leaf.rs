//! The smallest stored unit of an array (a chunk, or an inner chunk of a shard) and how its elements are handed out.

use super::region::{Layout, Region, advance, copy, strides, swap_endian};
use super::zarr::{ArrayBytes, BytesCodec, Chain, ChunkError, Decoded, Endian, decode};
use tensor::DType;

/// A chunk or inner chunk with its bytes as stored.
pub(super) struct Leaf<'a> {
    /// Index of its first element in the array.
    pub(super) origin: Vec<usize>,
    /// Stored dimension `k` is dimension `order[k]` of the array.
    pub(super) order: Vec<usize>,
    /// Extent of the stored dimensions.
    pub(super) shape: Vec<usize>,
    pub(super) codecs: &'a [BytesCodec],
    pub(super) endian: Endian,
    pub(super) bytes: &'a [u8],
    /// Number of the inner chunk, counted through all levels.
    pub(super) inner: usize,
}

/// The array a leaf belongs to.
#[derive(Clone, Copy)]
pub(super) struct Of<'a> {
    pub(super) shape: &'a [usize],
    pub(super) dtype: DType,
}

/// Calls `f` with every leaf of a chunk that has elements in `want`.
pub(super) fn visit<E: From<ChunkError>>(
    chain: &Chain,
    chunk: Leaf<'_>,
    want: &Region,
    f: &mut impl FnMut(&Leaf<'_>) -> Result<(), E>,
) -> Result<(), E> {
    let Leaf { origin, mut order, mut shape, bytes, inner, .. } = chunk;
    if let Some(transpose) = &chain.order {
        order = transpose.iter().map(|&i| order[i]).collect();
        shape = transpose.iter().map(|&i| shape[i]).collect();
    }
    let sharding = match &chain.array {
        ArrayBytes::Bytes(endian) => {
            return f(&Leaf { origin, order, shape, codecs: &chain.bytes, endian: *endian, bytes, inner });
        }
        ArrayBytes::Sharding(s) => s,
    };
    let grid = sharding.grid(&shape);
    let places = sharding.index(&shape, bytes)?;
    let mut index = vec![0; grid.len()];
    for (number, place) in places.into_iter().enumerate() {
        let mut start = origin.clone();
        let mut extent = vec![0; start.len()];
        for (k, &dim) in order.iter().enumerate() {
            start[dim] += index[k] * sharding.chunk_shape[k];
            extent[dim] = sharding.chunk_shape[k];
        }
        let region = Region { origin: start.clone(), shape: extent };
        if region.intersection(want).is_some() || want.shape.is_empty() {
            let Some((offset, length)) = place else { return Err(ChunkError::Missing(index).into()) };
            // The index was checked against the size of the shard.
            let bytes = &bytes[offset as usize..(offset + length) as usize];
            let leaf = Leaf {
                origin: start,
                order: order.clone(),
                shape: sharding.chunk_shape.clone(),
                codecs: &[],
                endian: Endian::Little,
                bytes,
                inner: inner.saturating_mul(grid.iter().product::<usize>().max(1)).saturating_add(number),
            };
            visit(&sharding.codecs, leaf, want, f)?;
        }
        advance(&mut index, &grid);
    }
    Ok(())
}

/// Calls `f` with consecutive boxes of at most `max` elements (but at least one) that cover `shape` in row-major order,
/// each contiguous in a dense array of that shape.
pub(super) fn blocks<E>(
    shape: &[usize],
    max: usize,
    f: &mut impl FnMut(&[usize], &[usize]) -> Result<(), E>,
) -> Result<(), E> {
    if shape.contains(&0) {
        return Ok(());
    }
    // Below dimension `k` everything fits into one box.
    let below = strides(shape);
    let Some(k) = below.iter().position(|&n| n <= max.max(1)) else { return f(&[], &[]) };
    let rows = (max / below[k]).clamp(1, shape[k]);
    let mut bounds: Vec<usize> = shape[..k].to_vec();
    bounds.push(shape[k].div_ceil(rows));
    let mut index = vec![0; k + 1];
    let mut origin = vec![0; shape.len()];
    let mut extent = shape.to_vec();
    extent[..k].fill(1);
    loop {
        origin[..k].copy_from_slice(&index[..k]);
        origin[k] = index[k] * rows;
        extent[k] = rows.min(shape[k] - origin[k]);
        f(&origin, &extent)?;
        if !advance(&mut index, &bounds) {
            return Ok(());
        }
    }
}

impl Leaf<'_> {
    /// Extent along the array's dimensions, padding included.
    fn extent(&self) -> Vec<usize> {
        let mut out = vec![0; self.shape.len()];
        for (&dim, &n) in self.order.iter().zip(&self.shape) {
            out[dim] = n;
        }
        out
    }

    /// The part that lies within the array.
    pub(super) fn region(&self, of: Of<'_>) -> Region {
        let shape = (self.extent().iter().zip(&self.origin).zip(of.shape)).map(|((&n, &o), &d)| n.min(d - o)).collect();
        Region { origin: self.origin.clone(), shape }
    }

    fn in_order(&self) -> bool {
        self.order.iter().enumerate().all(|(k, &dim)| k == dim)
    }

    fn swapped(&self, of: Of<'_>) -> bool {
        self.endian == Endian::Big && of.dtype.size() > 1
    }

    fn wanted(&self, of: Of<'_>) -> usize {
        // The metadata was checked for overflow.
        self.shape.iter().product::<usize>() * of.dtype.size()
    }

    /// Layout of the stored elements along the array's dimensions, from array index `at` on.
    fn layout(&self, at: &[usize]) -> Layout {
        let mut out = Layout { start: 0, strides: vec![0; self.shape.len()] };
        for (&dim, stride) in self.order.iter().zip(strides(&self.shape)) {
            out.strides[dim] = stride;
            out.start += (at[dim] - self.origin[dim]) * stride;
        }
        out
    }

    /// The elements as they lie in the file, if they lie there as the array has them.
    pub(super) fn in_place(&self, of: Of<'_>, verify: bool) -> Result<Option<&[u8]>, ChunkError> {
        if !self.in_order() || self.swapped(of) || self.region(of).shape != self.shape {
            return Ok(None);
        }
        match decode(self.codecs, self.bytes, self.wanted(of), verify)? {
            Decoded::Raw(b) => Ok(Some(b)),
            Decoded::Zstd(_) => Ok(None),
        }
    }

    /// Checks everything that can be checked without handing elements out.
    pub(super) fn check(&self, of: Of<'_>) -> Result<(), ChunkError> {
        self.pieces(of, 1 << 20, true, &mut |_, _| Ok(()))
    }

    /// Copies what lies in `want` to its place in `out`, a dense array of the shape of `want`.
    pub(super) fn copy_into(&self, of: Of<'_>, want: &Region, out: &mut [u8], verify: bool) -> Result<(), ChunkError> {
        let size = of.dtype.size();
        if !self.swapped(of)
            && let Decoded::Raw(b) = decode(self.codecs, self.bytes, self.wanted(of), verify)?
        {
            if let Some(part) = intersect(&self.region(of), want) {
                let to = Layout::dense(&want.shape, &minus(&part.origin, &want.origin));
                copy(out, &to, b, &self.layout(&part.origin), &part.shape, size);
            }
            return Ok(());
        }
        self.pieces(of, 1 << 20, verify, &mut |piece, bytes| {
            if let Some(part) = intersect(piece, want) {
                let to = Layout::dense(&want.shape, &minus(&part.origin, &want.origin));
                let from = Layout::dense(&piece.shape, &minus(&part.origin, &piece.origin));
                copy(out, &to, bytes, &from, &part.shape, size);
            }
            Ok::<(), ChunkError>(())
        })
    }

    /// Hands out the elements in boxes of at most `max` bytes (but at least one element), dense and row-major. Memory is
    /// bounded by `max`, except that a compressed *and* transposed chunk is decompressed as a whole.
    pub(super) fn pieces<E: From<ChunkError>>(
        &self,
        of: Of<'_>,
        max: usize,
        verify: bool,
        f: &mut impl FnMut(&Region, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let size = of.dtype.size();
        let wanted = self.wanted(of);
        let max = (max / size).max(1);
        match decode(self.codecs, self.bytes, wanted, verify)? {
            Decoded::Raw(raw) if self.in_order() && !self.swapped(of) => {
                let mut scratch = Vec::new();
                let mut at = 0;
                blocks(&self.shape, max, &mut |origin, shape| {
                    let n = shape.iter().product::<usize>() * size;
                    let bytes = &raw[at..at + n];
                    at += n;
                    self.clip(of, origin, shape, bytes, &mut scratch, f)
                })
            }
            Decoded::Raw(raw) => self.gather(of, raw, max, f),
            Decoded::Zstd(mut stream) if self.in_order() => {
                let (mut buffer, mut scratch) = (Vec::new(), Vec::new());
                blocks(&self.shape, max, &mut |origin, shape| {
                    buffer.resize(shape.iter().product::<usize>() * size, 0);
                    stream.fill(&mut buffer)?;
                    if self.swapped(of) {
                        swap_endian(&mut buffer, size);
                    }
                    self.clip(of, origin, shape, &buffer, &mut scratch, f)
                })?;
                Ok(stream.finish()?)
            }
            Decoded::Zstd(mut stream) => {
                let mut whole = vec![0; wanted];
                stream.fill(&mut whole)?;
                stream.finish()?;
                self.gather(of, &whole, max, f)
            }
        }
    }

    /// Passes on the part of a box that lies within the array. `origin` is relative to the chunk.
    fn clip<E>(
        &self,
        of: Of<'_>,
        origin: &[usize],
        shape: &[usize],
        bytes: &[u8],
        scratch: &mut Vec<u8>,
        f: &mut impl FnMut(&Region, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        if shape.is_empty() {
            return f(&Region::whole(&[]), bytes);
        }
        let origin = self.origin.iter().zip(origin).map(|(a, b)| a + b).collect();
        let full = Region { origin, shape: shape.to_vec() };
        let Some(part) = full.intersection(&Region::whole(of.shape)) else { return Ok(()) };
        if part == full {
            return f(&full, bytes);
        }
        let size = of.dtype.size();
        scratch.resize(part.elements() * size, 0);
        let to = Layout::dense(&part.shape, &vec![0; shape.len()]);
        let from = Layout::dense(shape, &minus(&part.origin, &full.origin));
        copy(scratch, &to, bytes, &from, &part.shape, size);
        f(&part, scratch)
    }

    /// Collects boxes of the array from elements that are stored in another order.
    fn gather<E>(
        &self,
        of: Of<'_>,
        raw: &[u8],
        max: usize,
        f: &mut impl FnMut(&Region, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let size = of.dtype.size();
        let valid = self.region(of);
        let mut scratch = Vec::new();
        blocks(&valid.shape, max, &mut |origin, shape| {
            let piece =
                Region { origin: valid.origin.iter().zip(origin).map(|(a, b)| a + b).collect(), shape: shape.to_vec() };
            scratch.resize(piece.elements() * size, 0);
            let to = Layout::dense(shape, &vec![0; shape.len()]);
            copy(&mut scratch, &to, raw, &self.layout(&piece.origin), shape, size);
            if self.swapped(of) {
                swap_endian(&mut scratch, size);
            }
            f(&piece, &scratch)
        })
    }
}

/// As [`Region::intersection`], but scalars meet.
fn intersect(a: &Region, b: &Region) -> Option<Region> {
    if a.shape.is_empty() { Some(a.clone()) } else { a.intersection(b) }
}

fn minus(a: &[usize], b: &[usize]) -> Vec<usize> {
    a.iter().zip(b).map(|(x, y)| x - y).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_cover_everything_in_order() {
        for shape in [vec![], vec![7], vec![3, 5], vec![2, 3, 4], vec![1, 100], vec![0, 4]] {
            for max in [1, 2, 3, 4, 5, 12, 1000] {
                let mut next = 0;
                let s = strides(&shape);
                blocks::<()>(&shape, max, &mut |origin, extent| {
                    let at: usize = origin.iter().zip(&s).map(|(a, b)| a * b).sum();
                    assert_eq!(at, next, "{shape:?} {max}");
                    let n: usize = extent.iter().product();
                    assert!(n <= max && n > 0);
                    next += n;
                    Ok(())
                })
                .unwrap();
                assert_eq!(next, shape.iter().product::<usize>(), "{shape:?} {max}");
            }
        }
    }
}
