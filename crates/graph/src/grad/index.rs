//! Rules of ops with positions known at run time only.

use tensor::DType;

use super::{Grads, Result, Rule, accumulator};
use crate::op::Compare;
use crate::{Graph, Value};

pub(super) fn dynamic_slice(r: &Rule<'_>) -> Grads {
    let (g, ct) = (r.g, r.only()?);
    let mut grads = vec![None; r.x.len()];
    // Both ops clamp the starts in the same way.
    grads[0] = Some(g.dynamic_update_slice(g.full_like(r.x[0], 0.0)?, ct, &r.x[1..])?);
    Ok(grads)
}

pub(super) fn dynamic_update_slice(r: &Rule<'_>) -> Grads {
    let (g, ct) = (r.g, r.only()?);
    let mut grads = vec![None; r.x.len()];
    grads[0] = r.wanted(0, || g.dynamic_update_slice(ct, g.full_like(r.x[1], 0.0)?, &r.x[2..]))?;
    grads[1] = r.wanted(1, || g.dynamic_slice(ct, &r.x[2..], &g.dims(r.x[1])))?;
    Ok(grads)
}

/// The largest row number that ids of a dtype can name.
fn last_row(ids: DType, rows: usize) -> f64 {
    let bits = ids.size() as i32 * 8 - i32::from(ids.is_signed());
    // Wider integers hold every row number that occurs; 52 bits are exact in `f64`.
    (rows as f64 - 1.0).min(2f64.powi(bits.min(52)) - 1.0)
}

pub(super) fn take(r: &Rule<'_>) -> Grads {
    let (g, table, ids, ct) = (r.g, r.x[0], r.x[1], r.only()?);
    let ty = g.ty(table);
    let wide = accumulator(ty.dtype);
    // A lookup clamps its ids, an accumulation drops those out of range.
    let last = last_row(g.dtype(ids), ty.shape[0]);
    let rows = g.clamp(g.scalar_like(ids, 0.0)?, ids, g.scalar_like(ids, last)?)?;
    let sums = g.scatter_add_rows(g.splat(wide, ty.shape, 0.0)?, rows, g.convert(ct, wide)?)?;
    Ok(vec![Some(g.convert(sums, ty.dtype)?), None])
}

pub(super) fn scatter_add_rows(r: &Rule<'_>) -> Grads {
    let (g, base, ids, ct) = (r.g, r.x[0], r.x[1], r.only()?);
    let updates = r.wanted(2, || {
        let rows = g.take(ct, ids)?;
        let kept = in_range(g, ids, g.shape(base)[0])?;
        let dims: Vec<usize> = (0..g.shape(ids).rank()).collect();
        let kept = g.broadcast_in_dim(kept, g.shape(rows), &dims)?;
        g.select(kept, rows, g.full_like(rows, 0.0)?)
    })?;
    Ok(vec![Some(ct), None, updates])
}

fn in_range(g: &Graph, ids: Value, rows: usize) -> Result<Value> {
    let below = g.compare(Compare::Le, ids, g.full_like(ids, last_row(g.dtype(ids), rows))?)?;
    g.and(below, g.compare(Compare::Ge, ids, g.full_like(ids, 0.0)?)?)
}
