//! Ops that move elements.

use tensor::Shape;

use super::Array;
use super::number::sum;

/// Reads elements at `offset + sum(index[d] * strides[d])` for every index of an array of extents `dims`, row-major.
pub(super) fn strided(src: &[f64], dims: &[usize], offset: isize, strides: &[isize]) -> Vec<f64> {
    let mut out = Vec::with_capacity(Shape::from(dims).elements());
    visit(dims, offset, strides, &mut |at| out.push(src[at]));
    out
}

/// Calls `f` with the position of every index of an array of extents `dims`, row-major.
fn visit(dims: &[usize], offset: isize, strides: &[isize], f: &mut impl FnMut(usize)) {
    match (dims.split_first(), strides.split_first()) {
        (Some((&n, dims)), Some((&s, strides))) => {
            for i in 0..n {
                visit(dims, offset + i as isize * s, strides, f);
            }
        }
        _ => f(offset as usize),
    }
}

pub(super) fn strides(dims: &[usize]) -> Vec<isize> {
    Shape::from(dims).strides().iter().map(|&s| s as isize).collect()
}

pub(super) fn iota(dims: &[usize], dim: usize) -> Vec<f64> {
    let mut by = vec![0; dims.len()];
    by[dim] = 1;
    let count: Vec<f64> = (0..dims[dim]).map(|i| i as f64).collect();
    strided(&count, dims, 0, &by)
}

pub(super) fn broadcast(x: &Array, dims: &[usize], to: &[usize]) -> Vec<f64> {
    let mut by = vec![0; dims.len()];
    for ((&d, &n), s) in to.iter().zip(x.dims()).zip(strides(x.dims())) {
        by[d] = if n == 1 { 0 } else { s };
    }
    strided(&x.v, dims, 0, &by)
}

pub(super) fn transpose(x: &Array, perm: &[usize]) -> Vec<f64> {
    let s = strides(x.dims());
    let dims: Vec<usize> = perm.iter().map(|&d| x.dims()[d]).collect();
    let by: Vec<isize> = perm.iter().map(|&d| s[d]).collect();
    strided(&x.v, &dims, 0, &by)
}

pub(super) fn slice(x: &Array, dims: &[usize], starts: &[usize], steps: &[usize]) -> Vec<f64> {
    let s = strides(x.dims());
    let offset = starts.iter().zip(&s).map(|(&a, &s)| a as isize * s).sum();
    let by: Vec<isize> = steps.iter().zip(&s).map(|(&k, &s)| k as isize * s).collect();
    strided(&x.v, dims, offset, &by)
}

pub(super) fn reverse(x: &Array, which: &[usize]) -> Vec<f64> {
    let mut by = strides(x.dims());
    let mut offset = 0;
    for &d in which {
        offset += (x.dims()[d] as isize - 1) * by[d];
        by[d] = -by[d];
    }
    strided(&x.v, x.dims(), offset, &by)
}

pub(super) fn pad(x: &Array, value: f64, dims: &[usize], low: &[i64], interior: &[usize]) -> Vec<f64> {
    let mut out = vec![value; Shape::from(dims).elements()];
    let to = strides(dims);
    let mut index = vec![0usize; dims.len()];
    for &e in x.v.iter() {
        let mut at = 0isize;
        let mut inside = true;
        for (d, &i) in index.iter().enumerate() {
            let p = low[d] as isize + (i * (interior[d] + 1)) as isize;
            inside &= (0..dims[d] as isize).contains(&p);
            at += p * to[d];
        }
        if inside {
            out[at as usize] = e;
        }
        next_index(&mut index, x.dims());
    }
    out
}

fn next_index(index: &mut [usize], dims: &[usize]) {
    for (i, &n) in index.iter_mut().zip(dims).rev() {
        *i += 1;
        if *i < n {
            return;
        }
        *i = 0;
    }
}

pub(super) fn concatenate(args: &[&Array], dims: &[usize], dim: usize) -> Vec<f64> {
    let outer: usize = dims[..dim].iter().product();
    let inner: usize = dims[dim + 1..].iter().product();
    let mut out = Vec::with_capacity(Shape::from(dims).elements());
    for o in 0..outer {
        for a in args {
            let n = a.dims()[dim] * inner;
            out.extend_from_slice(&a.v[o * n..(o + 1) * n]);
        }
    }
    out
}

/// Starts of a slice of `sizes` in an array of extents `dims`, moved so that it fits.
pub(super) fn clamped_starts(dims: &[usize], sizes: &[usize], starts: &[&Array]) -> Vec<usize> {
    let limits = dims.iter().zip(sizes).map(|(n, s)| (n - s) as i64);
    starts.iter().zip(limits).map(|(a, limit)| a.index().clamp(0, limit) as usize).collect()
}

pub(super) fn update(x: &Array, update: &Array, starts: &[usize]) -> Vec<f64> {
    let s = strides(x.dims());
    let offset = starts.iter().zip(&s).map(|(&a, &s)| a as isize * s).sum();
    let mut out = x.v.to_vec();
    let mut from = update.v.iter();
    visit(update.dims(), offset, &s, &mut |at| {
        if let Some(&e) = from.next() {
            out[at] = e;
        }
    });
    out
}

pub(super) fn take(table: &Array, ids: &Array) -> Vec<f64> {
    let rows = table.dims()[0];
    let n = table.v.len() / rows;
    let mut out = Vec::with_capacity(ids.v.len() * n);
    for &id in ids.v.iter() {
        let r = (id as i64).clamp(0, rows as i64 - 1) as usize;
        out.extend_from_slice(&table.v[r * n..(r + 1) * n]);
    }
    out
}

pub(super) fn scatter_add_rows(base: &Array, ids: &Array, updates: &Array) -> Vec<f64> {
    let rows = base.dims()[0];
    let n = base.v.len() / rows;
    let mut out = base.v.to_vec();
    for (k, &id) in ids.v.iter().enumerate() {
        let Some(r) = usize::try_from(id as i64).ok().filter(|&r| r < rows) else { continue };
        for j in 0..n {
            out[r * n + j] = sum(out[r * n + j], updates.v[k * n + j], base.ty.dtype);
        }
    }
    out
}
