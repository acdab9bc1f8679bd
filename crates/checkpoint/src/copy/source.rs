//! Reads any box of a target array out of wherever its elements lie.

use tensor::{DType, Shape};

use super::convert::{Dim, convert, gather, is_convertible};
use super::{CopyError, Item, Op, Store};
use crate::orbax::{ArrayInfo, OrbaxCheckpoint, Region};
use crate::safetensors::TensorView;

/// Why an item cannot be copied, found before anything is written.
pub(super) type Problem = String;

/// One item, ready to be read.
#[derive(Debug)]
pub(super) struct Reader<'a> {
    name: &'a str,
    from: From<'a>,
    source_dtype: DType,
    op: Op,
    dtype: DType,
    shape: &'a Shape,
}

#[derive(Debug)]
enum From<'a> {
    /// Dense in a mapped file; strides of the target's dimensions in the source.
    Mapped { view: TensorView, strides: Vec<usize> },
    /// The target's box is a box of the array.
    Same { checkpoint: &'a OrbaxCheckpoint, info: &'a ArrayInfo },
    /// The array as a matrix `[rows, columns]`, its dimensions split at `split`; the target is the transpose.
    Transposed { checkpoint: &'a OrbaxCheckpoint, info: &'a ArrayInfo, split: usize, rows: usize, columns: usize },
}

/// Buffers of one thread, kept from piece to piece.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    raw: Vec<u8>,
    panel: Vec<u8>,
}

impl<'a> Reader<'a> {
    /// Finds the source of an item and checks that it can become the target.
    pub(super) fn new(stores: &[Store<'a>], item: &'a Item) -> Result<Self, Problem> {
        let no = |why: String| format!("{} -> {}: {why}", item.from, item.to);
        let Some(store) = stores.get(item.store) else { return Err(no("its source was not given".to_owned())) };
        let (from, source_dtype, source_shape) = match store {
            Store::Hf(dir) => {
                let view = dir.tensor(&item.from).ok_or_else(|| no(format!("{} has none", dir.path().display())))?;
                let (dtype, shape) = (view.dtype, view.shape.clone());
                let strides = mapped_strides(&shape, &item.shape, item.op).map_err(no)?;
                (From::Mapped { view, strides }, dtype, shape)
            }
            Store::Orbax(checkpoint) => {
                let info = (checkpoint.array(&item.from).or_else(|| checkpoint.parameter(&item.from)))
                    .ok_or_else(|| no(format!("{} has none", checkpoint.path().display())))?;
                (orbax_source(checkpoint, info, item).map_err(no)?, info.dtype, info.shape.clone())
            }
        };
        let converts = item.op.is_arithmetic() || source_dtype != item.dtype;
        if converts && !(is_convertible(source_dtype) && is_convertible(item.dtype)) {
            return Err(no(format!("{source_dtype} cannot become {}", item.dtype)));
        }
        if source_shape.checked_bytes(source_dtype).is_err() || item.shape.checked_bytes(item.dtype).is_err() {
            return Err(no(format!("shape {} is too large", item.shape)));
        }
        let (op, dtype, shape, name) = (item.op, item.dtype, &item.shape, item.from.as_str());
        Ok(Reader { name, from, source_dtype, op, dtype, shape })
    }

    /// Boxes should begin and end at multiples of this along the target's first dimension; others cost twice the work.
    pub(super) fn grain(&self) -> usize {
        match &self.from {
            From::Transposed { info, split, .. } => info.shape.iter().skip(split + 1).product::<usize>().max(1),
            From::Mapped { strides, .. } if self.op == Op::Transpose => {
                // Whole cache lines of the source's rows.
                let dense = strides.first() == Some(&1);
                if dense { 64 / self.source_dtype.size() } else { 1 }
            }
            _ => 1,
        }
    }

    /// The size that a box should have, given the usual one: decoding a compressed chunk again and again is worse than
    /// a larger box.
    pub(super) fn piece_bytes(&self, usual: usize) -> usize {
        match &self.from {
            From::Same { info, .. } | From::Transposed { info, .. } if info.compressed => usual.saturating_mul(4),
            _ => usual,
        }
    }

    /// Fills `out` with the elements of a box of the target, dense, row-major, in the target's element type.
    pub(super) fn read(&self, region: &Region, out: &mut [u8], scratch: &mut Scratch) -> Result<(), CopyError> {
        if self.source_dtype == self.dtype && !self.op.is_arithmetic() {
            return self.read_raw(region, out, &mut scratch.panel);
        }
        let bytes = region.elements() * self.source_dtype.size();
        let mut raw = std::mem::take(&mut scratch.raw);
        raw.resize(bytes, 0);
        let result = self.read_raw(region, &mut raw, &mut scratch.panel);
        convert(&raw, self.source_dtype, self.op, self.dtype, out);
        scratch.raw = raw;
        result
    }

    fn read_raw(&self, region: &Region, out: &mut [u8], panel: &mut Vec<u8>) -> Result<(), CopyError> {
        let size = self.source_dtype.size();
        match &self.from {
            From::Mapped { view, strides } => {
                let start = region.origin.iter().zip(strides).map(|(o, s)| o * s).sum();
                let dims: Vec<Dim> = region.shape.iter().zip(strides).map(|(&n, &stride)| Dim { n, stride }).collect();
                gather(&view.bytes, start, &dims, size, out).ok_or_else(|| self.inside())?;
                if self.op != Op::Transpose {
                    // These pages will not be read again; they should not count as this process's memory.
                    let count: usize = region.elements();
                    if let Some(done) = start.checked_add(count).and_then(|e| view.bytes.slice(start * size..e * size))
                    {
                        done.advise_dont_need();
                    }
                }
                Ok(())
            }
            From::Same { checkpoint, info } => Ok(checkpoint.read_region(&info.name, region, out)?),
            From::Transposed { checkpoint, info, split, rows, columns } => {
                // Target rows are source columns. The target is a matrix, so its box has two ranges.
                let (&[j0, i0], &[nj, ni]) = (region.origin.as_slice(), region.shape.as_slice()) else {
                    return Err(self.inside());
                };
                if nj == 0 || ni == 0 {
                    return Ok(());
                }
                // Whole steps of the dimension at `split`; with the right grain exactly the columns asked for.
                let grain = info.shape.iter().skip(split + 1).product::<usize>().max(1);
                let steps = j0 / grain..(j0 + nj).div_ceil(grain);
                let mut source = Region::whole(&info.shape);
                let first = steps.start * grain;
                let width = if let (Some(o), Some(n)) = (source.origin.get_mut(*split), source.shape.get_mut(*split)) {
                    (*o, *n) = (steps.start, steps.len());
                    steps.len() * grain
                } else {
                    *columns
                };
                panel.resize(rows * width * size, 0);
                checkpoint.read_region(&info.name, &source, panel)?;
                let dims = [Dim { n: nj, stride: 1 }, Dim { n: ni, stride: width }];
                gather(panel, i0 * width + (j0 - first), &dims, size, out).ok_or_else(|| self.inside())
            }
        }
    }

    /// Cannot happen: boxes are cut from the target's own shape, which was checked against the source.
    fn inside(&self) -> CopyError {
        CopyError::Items(vec![format!("{}: a box outside of {}", self.name, self.shape)])
    }

    /// Says that nothing more will be read: mapped pages stop counting as this process's memory.
    pub(super) fn done(&self) {
        match &self.from {
            From::Mapped { view, .. } => view.bytes.advise_dont_need(),
            From::Same { checkpoint, info } | From::Transposed { checkpoint, info, .. } => {
                let Ok(grid) = checkpoint.grid(&info.name) else { return };
                boxes(&grid, 1, 1, &mut |chunk: Region| {
                    // What cannot be had in place was not mapped for long; damage was reported when it was read.
                    if let Ok(Some(bytes)) = checkpoint.mapped_chunk(&info.name, &chunk.origin) {
                        bytes.advise_dont_need();
                    }
                });
            }
        }
    }
}

/// Where the dimensions of `shape` split into a matrix of `rows` rows; the last such place.
pub(super) fn split_at(shape: &Shape, rows: usize) -> Option<usize> {
    (0..=shape.rank()).rev().find(|&s| shape.iter().take(s).try_fold(1usize, |n, &d| n.checked_mul(d)) == Some(rows))
}

/// The source as a matrix `[rows, columns]` whose transpose is the target.
pub(super) fn as_matrix(source: &Shape, target: &Shape) -> Result<(usize, usize), Problem> {
    let fits = |rows: usize, columns: usize| {
        split_at(source, rows).is_some()
            && split_at(target, columns).is_some()
            && source.elements() == target.elements()
    };
    let found = match (source.dims(), target.dims()) {
        (&[rows, columns], _) | (_, &[columns, rows]) if fits(rows, columns) => Some((rows, columns)),
        _ => None,
    };
    found.ok_or_else(|| format!("{source} cannot be transposed into {target}"))
}

fn mapped_strides(source: &Shape, target: &Shape, op: Op) -> Result<Vec<usize>, Problem> {
    if op != Op::Transpose {
        return if source == target {
            Ok(source.strides())
        } else {
            Err(format!("shape {source} cannot become {target}"))
        };
    }
    // The second part of the target has as many elements as the source has rows.
    let (_, columns) = as_matrix(source, target)?;
    let Some(split) = split_at(target, columns) else {
        return Err(format!("{source} cannot be transposed into {target}"));
    };
    let (a, b) = target.split_at(split);
    let (a, b) = (Shape::from(a).strides(), Shape::from(b).strides());
    Ok(a.into_iter().chain(b.into_iter().map(|s| s.saturating_mul(columns))).collect())
}

fn orbax_source<'a>(checkpoint: &'a OrbaxCheckpoint, info: &'a ArrayInfo, item: &Item) -> Result<From<'a>, Problem> {
    if item.op != Op::Transpose {
        return if info.shape == item.shape {
            Ok(From::Same { checkpoint, info })
        } else {
            Err(format!("shape {} cannot become {}", info.shape, item.shape))
        };
    }
    let (rows, columns) = as_matrix(&info.shape, &item.shape)?;
    match split_at(&info.shape, rows) {
        Some(split) if item.shape.rank() == 2 => Ok(From::Transposed { checkpoint, info, split, rows, columns }),
        _ => Err(format!("{} cannot be transposed into {}", info.shape, item.shape)),
    }
}

/// Calls `f` with consecutive boxes that cover `shape` in row-major order, each contiguous in a dense array, of at most
/// `max` elements but at least one; cuts of the first dimension are multiples of `grain`.
pub(super) fn boxes(shape: &[usize], max: usize, grain: usize, f: &mut impl FnMut(Region)) {
    if shape.contains(&0) {
        return;
    }
    // Below dimension `k` everything fits into one box.
    let below = Shape::from(shape).strides();
    let Some(k) = below.iter().position(|&n| n <= max.max(1)) else { return f(Region::whole(shape)) };
    let mut rows = max / below[k];
    if k == 0 {
        rows = (rows / grain * grain).max(grain);
    }
    let rows = rows.clamp(1, shape[k]);
    let mut region = Region::whole(shape);
    region.shape[..k].fill(1);
    loop {
        region.shape[k] = rows.min(shape[k] - region.origin[k]);
        f(region.clone());
        // Advance, the innermost cut dimension in steps of `rows`.
        let mut d = k;
        loop {
            region.origin[d] += if d == k { rows } else { 1 };
            if region.origin[d] < shape[d] {
                break;
            }
            region.origin[d] = 0;
            if d == 0 {
                return;
            }
            d -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn boxes_cover_everything_in_order() {
        for shape in [vec![], vec![7], vec![3, 5], vec![2, 3, 4], vec![1, 100], vec![0, 4]] {
            for max in [0, 1, 2, 3, 4, 5, 12, 1000] {
                for grain in [1, 2] {
                    let strides = Shape::from(shape.clone()).strides();
                    let mut next = 0;
                    boxes(&shape, max, grain, &mut |r| {
                        assert_eq!(r.origin.iter().zip(&strides).map(|(o, s)| o * s).sum::<usize>(), next);
                        assert!(r.fits(&shape));
                        next += r.elements();
                    });
                    assert_eq!(next, shape.iter().product::<usize>(), "{shape:?} {max} {grain}");
                }
            }
        }
        let mut cuts = Vec::new();
        boxes(&[100, 3], 50, 8, &mut |r| cuts.push(r.origin[0]));
        assert_eq!(cuts, [0, 16, 32, 48, 64, 80, 96]);
    }

    #[test]
    fn matrices_behind_shapes() {
        let m = |s: &[usize], t: &[usize]| as_matrix(&s.into(), &t.into());
        assert_eq!(m(&[32, 5], &[5, 4, 8]), Ok((32, 5)));
        assert_eq!(m(&[4, 8, 5], &[5, 32]), Ok((32, 5)));
        assert_eq!(m(&[5, 1, 8], &[8, 5]), Ok((5, 8)));
        assert!(m(&[4, 8, 5], &[5, 31]).is_err());
        assert!(m(&[6, 4], &[6, 4]).is_err());
        assert!(m(&[2, 2, 2], &[2, 2, 2]).is_err());
        assert_eq!(split_at(&[5, 1, 8].into(), 5), Some(2));
    }
}
