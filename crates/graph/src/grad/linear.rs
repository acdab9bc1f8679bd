//! Rules of reductions and products.

use tensor::DType;

use super::{Grads, Result, Rule, accumulator, inverse};
use crate::op::{Compare, DotDims, ReduceKind};
use crate::{Graph, Value};

pub(super) fn reduce(r: &Rule<'_>, kind: ReduceKind, dims: &[usize]) -> Grads {
    let (g, x, ct) = (r.g, r.x[0], r.only()?);
    let shape = g.shape(x);
    let kept = DotDims::free(shape.rank(), dims, &[]);
    let repeat = |v: Value| g.broadcast_in_dim(v, shape.clone(), &kept);
    Ok(vec![match kind {
        ReduceKind::And | ReduceKind::Or => None,
        ReduceKind::Sum => Some(repeat(ct)?),
        ReduceKind::Max | ReduceKind::Min => {
            // Elements that tie share the cotangent.
            let dtype = g.dtype(x);
            let wide = accumulator(dtype);
            let best = g.compare(Compare::Eq, x, repeat(r.y[0])?)?;
            let count = g.reduce_sum(g.convert(best, wide)?, dims)?;
            let share = g.convert(g.div(g.convert(ct, wide)?, count)?, dtype)?;
            Some(g.select(best, repeat(share)?, g.full_like(x, 0.0)?)?)
        }
    }])
}

/// Both gradients are products again, of the operands' own dtype: a narrow product with a wide result rounds its cotangent,
/// so that the backward products run at the same rate as the forward one.
pub(super) fn dot_general(r: &Rule<'_>, dims: &DotDims) -> Grads {
    let (g, l, rhs) = (r.g, r.x[0], r.x[1]);
    let dtype = g.dtype(l);
    let ct = g.convert(r.only()?, dtype)?;
    let (rank_l, rank_r) = (g.shape(l).rank(), g.shape(rhs).rank());
    let batch = dims.lhs_batch.len();
    let lhs_free = dims.lhs_free(rank_l);
    let rhs_free = dims.rhs_free(rank_r);
    // The cotangent has the batch, then the free dimensions of the left, then those of the right operand.
    let ct_left: Vec<usize> = (batch..batch + lhs_free.len()).collect();
    let ct_right: Vec<usize> = (batch + lhs_free.len()..batch + lhs_free.len() + rhs_free.len()).collect();
    let left = r.wanted(0, || {
        let other = Side { value: rhs, batch: &dims.rhs_batch, free: &rhs_free, contract: &dims.rhs_contract };
        product(g, ct, ct_right, &other, [&dims.lhs_batch, &lhs_free, &dims.lhs_contract], dtype)
    })?;
    let right = r.wanted(1, || {
        let other = Side { value: l, batch: &dims.lhs_batch, free: &lhs_free, contract: &dims.lhs_contract };
        product(g, ct, ct_left, &other, [&dims.rhs_batch, &rhs_free, &dims.rhs_contract], dtype)
    })?;
    Ok(vec![left, right])
}

/// The operand that the gradient is not for.
struct Side<'a> {
    value: Value,
    batch: &'a [usize],
    free: &'a [usize],
    contract: &'a [usize],
}

/// Contracts the cotangent with the other operand over that one's free dimensions and puts the result into the order of the
/// operand whose batch, free and contracted dimensions are `[batch, free, contract]`.
fn product(
    g: &Graph,
    ct: Value,
    ct_contract: Vec<usize>,
    other: &Side<'_>,
    [batch, free, contract]: [&[usize]; 3],
    dtype: DType,
) -> Result<Value> {
    let dims = DotDims {
        lhs_batch: (0..batch.len()).collect(),
        rhs_batch: other.batch.to_vec(),
        lhs_contract: ct_contract,
        rhs_contract: other.free.to_vec(),
    };
    let y = g.dot_general(ct, other.value, dims, dtype)?;
    // Result: batch, free, then the contracted dimensions in the order in which the other operand has them.
    let mut pairs: Vec<(usize, usize)> = other.contract.iter().copied().zip(contract.iter().copied()).collect();
    pairs.sort_unstable();
    let place: Vec<usize> = batch.iter().chain(free).copied().chain(pairs.into_iter().map(|(_, d)| d)).collect();
    if place.is_sorted() {
        return Ok(y);
    }
    g.transpose(y, &inverse(&place))
}
