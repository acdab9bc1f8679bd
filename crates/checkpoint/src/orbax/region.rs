//! Boxes of arrays, and copies between strided layouts.

use std::fmt;

/// A box inside an array: where it starts and how far it extends along every dimension.
#[derive(Debug, Clone, PartialEq, Eq, Hash, serde::Serialize)]
pub struct Region {
    /// First index along every dimension.
    pub origin: Vec<usize>,
    /// Extent along every dimension.
    pub shape: Vec<usize>,
}

impl Region {
    /// All of an array of this shape.
    #[must_use]
    pub fn whole(shape: &[usize]) -> Self {
        Region { origin: vec![0; shape.len()], shape: shape.to_vec() }
    }

    /// Number of elements.
    #[must_use]
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether it lies within an array of this shape.
    #[must_use]
    pub fn fits(&self, shape: &[usize]) -> bool {
        self.origin.len() == shape.len()
            && self.shape.len() == shape.len()
            && (self.origin.iter().zip(&self.shape).zip(shape))
                .all(|((&o, &n), &d)| o.checked_add(n).is_some_and(|e| e <= d))
    }

    /// What two boxes share; `None` if nothing.
    #[must_use]
    pub fn intersection(&self, other: &Region) -> Option<Region> {
        let mut out = Region { origin: Vec::new(), shape: Vec::new() };
        for i in 0..self.origin.len() {
            let start = self.origin[i].max(other.origin[i]);
            let end = (self.origin[i] + self.shape[i]).min(other.origin[i] + other.shape[i]);
            if start >= end {
                return None;
            }
            out.origin.push(start);
            out.shape.push(end - start);
        }
        Some(out)
    }
}

impl fmt::Display for Region {
    /// `[0:16, 8:9]`
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[")?;
        for (i, (o, n)) in self.origin.iter().zip(&self.shape).enumerate() {
            let comma = if i > 0 { ", " } else { "" };
            write!(f, "{comma}{o}:{}", o.saturating_add(*n))?;
        }
        f.write_str("]")
    }
}

/// Row-major strides in elements of a shape whose size is known to fit.
pub(super) fn strides(shape: &[usize]) -> Vec<usize> {
    let mut out = vec![1; shape.len()];
    for i in (0..shape.len().saturating_sub(1)).rev() {
        out[i] = out[i + 1] * shape[i + 1];
    }
    out
}

/// The element offset of an index.
pub(super) fn offset(index: &[usize], strides: &[usize]) -> usize {
    index.iter().zip(strides).map(|(i, s)| i * s).sum()
}

/// Advances a row-major index; false after the last.
pub(super) fn advance(index: &mut [usize], bounds: &[usize]) -> bool {
    for (i, &n) in index.iter_mut().zip(bounds).rev() {
        *i += 1;
        if *i < n {
            return true;
        }
        *i = 0;
    }
    false
}

/// One side of a copy: where the first element lies and the stride of every dimension, both in elements.
#[derive(Debug, Clone)]
pub(super) struct Layout {
    pub(super) start: usize,
    pub(super) strides: Vec<usize>,
}

impl Layout {
    /// The part of a dense row-major array of `shape` that starts at `origin`.
    pub(super) fn dense(shape: &[usize], origin: &[usize]) -> Self {
        let strides = strides(shape);
        Layout { start: offset(origin, &strides), strides }
    }
}

/// Copies a box of `shape` elements of `size` bytes from one layout to another. Both layouts must lie within their
/// slices.
pub(super) fn copy(dst: &mut [u8], to: &Layout, src: &[u8], from: &Layout, shape: &[usize], size: usize) {
    match size {
        1 => copy_elements::<1>(dst, to, src, from, shape),
        2 => copy_elements::<2>(dst, to, src, from, shape),
        4 => copy_elements::<4>(dst, to, src, from, shape),
        _ => copy_elements::<8>(dst, to, src, from, shape),
    }
}

#[derive(Debug, Clone, Copy)]
struct Dim {
    n: usize,
    to: usize,
    from: usize,
}

/// Side of the squares in which a transposed copy proceeds: both sides of one fit the first-level cache.
const TILE: usize = 32;

fn copy_elements<const N: usize>(dst: &mut [u8], to: &Layout, src: &[u8], from: &Layout, shape: &[usize]) {
    if shape.contains(&0) {
        return;
    }
    // Whole elements only; a remainder belongs to nobody.
    let dst: &mut [[u8; N]] = dst.as_chunks_mut().0;
    let src: &[[u8; N]] = src.as_chunks().0;

    let mut dims: Vec<Dim> = Vec::new();
    for (i, &n) in shape.iter().enumerate().filter(|&(_, &n)| n > 1) {
        let dim = Dim { n, to: to.strides[i], from: from.strides[i] };
        match dims.last_mut() {
            // Two dimensions that are one in both layouts.
            Some(last) if last.to == dim.to * n && last.from == dim.from * n => {
                *last = Dim { n: last.n * n, ..dim };
            }
            _ => dims.push(dim),
        }
    }
    let Some(inner) = dims.pop() else {
        dst[to.start] = src[from.start];
        return;
    };
    if inner.to == 1 && inner.from == 1 {
        outer(&dims, to.start, from.start, &mut |t, f| dst[t..t + inner.n].copy_from_slice(&src[f..f + inner.n]));
        return;
    }
    // The dimension along which the source is dense, to be walked together with the destination's.
    let across = dims.iter().position(|d| d.from == 1).map(|i| dims.remove(i));
    let Some(across) = across else {
        outer(&dims, to.start, from.start, &mut |t, f| {
            for i in 0..inner.n {
                dst[t + i * inner.to] = src[f + i * inner.from];
            }
        });
        return;
    };
    outer(&dims, to.start, from.start, &mut |t, f| {
        for a0 in (0..across.n).step_by(TILE) {
            for b0 in (0..inner.n).step_by(TILE) {
                for a in a0..across.n.min(a0 + TILE) {
                    for b in b0..inner.n.min(b0 + TILE) {
                        dst[t + a * across.to + b * inner.to] = src[f + a * across.from + b * inner.from];
                    }
                }
            }
        }
    });
}

/// Calls `f` with both offsets of every index of the dimensions.
fn outer(dims: &[Dim], to: usize, from: usize, f: &mut impl FnMut(usize, usize)) {
    let bounds: Vec<usize> = dims.iter().map(|d| d.n).collect();
    let mut index = vec![0; dims.len()];
    loop {
        let at = |stride: fn(&Dim) -> usize| index.iter().zip(dims).map(|(i, d)| i * stride(d)).sum::<usize>();
        f(to + at(|d| d.to), from + at(|d| d.from));
        if !advance(&mut index, &bounds) {
            return;
        }
    }
}

/// Reverses the bytes of every element.
pub(super) fn swap_endian(bytes: &mut [u8], size: usize) {
    if size > 1 {
        bytes.chunks_exact_mut(size).for_each(<[u8]>::reverse);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn copies_equal_the_plain_loop(
            dims in prop::collection::vec((1usize..6, 0usize..3, 0usize..3), 0..5),
            keys in prop::collection::vec(any::<u32>(), 5),
            size in prop::sample::select(vec![1usize, 2, 4, 8]),
        ) {
            let rank = dims.len();
            let shape: Vec<usize> = dims.iter().map(|d| d.0).collect();
            let mut perm: Vec<usize> = (0..rank).collect();
            perm.sort_by_key(|&i| keys[i]);
            // The source holds the dimensions in another order; both sides have room around the box.
            let src_shape: Vec<usize> = perm.iter().map(|&i| dims[i].0 + dims[i].1).collect();
            let dst_shape: Vec<usize> = dims.iter().map(|d| d.0 + d.2).collect();
            let s = strides(&src_shape);
            let mut from = Layout { start: 0, strides: vec![0; rank] };
            for (k, &d) in perm.iter().enumerate() {
                from.strides[d] = s[k];
                from.start += dims[d].1 * s[k];
            }
            let to = Layout::dense(&dst_shape, &dims.iter().map(|d| d.2).collect::<Vec<_>>());
            let n = src_shape.iter().product::<usize>() * size;
            let src: Vec<u8> = (0..n).map(|i| (i * 7 + i / 256) as u8).collect();
            let mut dst = vec![0xEE; dst_shape.iter().product::<usize>() * size];
            let mut want = dst.clone();
            let mut index = vec![0; rank];
            loop {
                let (t, f) = (to.start + offset(&index, &to.strides), from.start + offset(&index, &from.strides));
                want[t * size..(t + 1) * size].copy_from_slice(&src[f * size..(f + 1) * size]);
                if !advance(&mut index, &shape) { break; }
            }
            copy(&mut dst, &to, &src, &from, &shape, size);
            prop_assert_eq!(dst, want);
        }
    }

    #[test]
    fn a_large_transpose_goes_through_tiles() {
        let src: Vec<u8> = (0..100 * 70 * 2).map(|i| (i % 251) as u8).collect();
        let mut dst = vec![0; src.len()];
        let to = Layout::dense(&[70, 100], &[0, 0]);
        copy(&mut dst, &to, &src, &Layout { start: 0, strides: vec![1, 70] }, &[70, 100], 2);
        for i in 0..70 {
            for j in 0..100 {
                assert_eq!(dst[(i * 100 + j) * 2..][..2], src[(j * 70 + i) * 2..][..2]);
            }
        }
    }

    #[test]
    fn boxes_intersect() {
        let a = Region { origin: vec![0, 4], shape: vec![3, 4] };
        let b = Region { origin: vec![2, 0], shape: vec![3, 5] };
        assert_eq!(a.intersection(&b).unwrap().to_string(), "[2:3, 4:5]");
        assert!(a.intersection(&Region { origin: vec![3, 0], shape: vec![1, 9] }).is_none());
        assert!(a.fits(&[3, 8]) && !a.fits(&[3, 7]) && !a.fits(&[3]));
        assert!(!Region { origin: vec![usize::MAX], shape: vec![2] }.fits(&[5]));
    }
}
