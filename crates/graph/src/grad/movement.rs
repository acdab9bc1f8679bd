//! Rules of ops that move elements.

use super::{Grads, Rule, sum_all, wide_sum};

pub(super) fn broadcast_in_dim(r: &Rule<'_>, dims: &[usize]) -> Grads {
    let (g, ct) = (r.g, r.only()?);
    let (from, to) = (g.shape(r.x[0]), g.shape(ct));
    // Dimensions that repeat: new ones, and those of size 1 that were stretched.
    let stretched = |d: usize| match dims.iter().position(|&k| k == d) {
        None => true,
        Some(i) => from[i] == 1 && to[d] != 1,
    };
    let repeated: Vec<usize> = (0..to.rank()).filter(|&d| stretched(d)).collect();
    Ok(vec![Some(g.reshape(wide_sum(g, ct, &repeated)?, from)?)])
}

pub(super) fn slice(r: &Rule<'_>, starts: &[usize], strides: &[usize]) -> Grads {
    let (g, ct) = (r.g, r.only()?);
    let (from, to) = (g.shape(r.x[0]), g.shape(ct));
    let (mut low, mut high, mut interior) = (Vec::new(), Vec::new(), Vec::new());
    for d in 0..from.rank() {
        // What the slice covers, from its first to its last element.
        let covered = to[d].checked_sub(1).map_or(0, |n| n * strides[d] + 1);
        low.push(starts[d] as i64);
        high.push((from[d] - starts[d] - covered) as i64);
        interior.push(strides[d] - 1);
    }
    Ok(vec![Some(g.pad(ct, g.scalar_like(ct, 0.0)?, &low, &high, &interior)?)])
}

pub(super) fn pad(r: &Rule<'_>, low: &[i64], high: &[i64], interior: &[usize]) -> Grads {
    let (g, ct) = (r.g, r.only()?);
    let from = g.shape(r.x[0]);
    let zero = g.scalar_like(ct, 0.0)?;
    let none = vec![0; interior.len()];
    // Cropped elements come back as zeros, padding is cropped, then every `interior + 1`th element is one of the operand's.
    let x = r.wanted(0, || {
        let back = |edges: &[i64]| edges.iter().map(|e| -e).collect::<Vec<_>>();
        let whole = g.pad(ct, zero, &back(low), &back(high), &none)?;
        let strides: Vec<usize> = interior.iter().map(|i| i + 1).collect();
        g.slice(whole, &none, &g.dims(whole), &strides)
    })?;
    let value = r.wanted(1, || {
        let inside = g.splat(tensor::DType::Bool, from, 0.0)?;
        let padding = g.pad(inside, g.scalar(tensor::DType::Bool, 1.0)?, low, high, interior)?;
        sum_all(g, g.select(padding, ct, g.full_like(ct, 0.0)?)?)
    })?;
    Ok(vec![x, value])
}

pub(super) fn concatenate(r: &Rule<'_>, dim: usize) -> Grads {
    let (g, ct) = (r.g, r.only()?);
    let mut start = 0;
    let mut grads = Vec::with_capacity(r.x.len());
    for (i, &x) in r.x.iter().enumerate() {
        let limit = start + g.shape(x)[dim];
        grads.push(r.wanted(i, || g.slice_dim(ct, dim, start, limit))?);
        start = limit;
    }
    Ok(grads)
}
