//! Reductions and matrix products, accumulated in `f64`.

use tensor::DType;

use super::Array;
use super::movement::{strided, strides};
use super::number::{bitwise, max, min, sum};
use crate::op::{BinaryOp, DotDims, ReduceKind};

/// The array with the dimensions in this order, and the size of each group of dimensions.
fn grouped(x: &Array, groups: [&[usize]; 3]) -> (Vec<f64>, [usize; 3]) {
    let s = strides(x.dims());
    let order = groups.concat();
    let dims: Vec<usize> = order.iter().map(|&d| x.dims()[d]).collect();
    let by: Vec<isize> = order.iter().map(|&d| s[d]).collect();
    let sizes = groups.map(|g| g.iter().map(|&d| x.dims()[d]).product());
    (strided(&x.v, &dims, 0, &by), sizes)
}

pub(super) fn reduce(x: &Array, kind: ReduceKind, dims: &[usize]) -> Vec<f64> {
    let kept = DotDims::free(x.dims().len(), dims, &[]);
    let (v, [n, each, _]) = grouped(x, [&kept, dims, &[]]);
    let d = x.ty.dtype;
    let (start, combine): (f64, Box<dyn Fn(f64, f64) -> f64>) = match kind {
        ReduceKind::Sum => (0.0, Box::new(|a, b| sum(a, b, d))),
        ReduceKind::Max => (lowest(d), Box::new(max)),
        ReduceKind::Min => (highest(d), Box::new(min)),
        ReduceKind::And if d == DType::Bool => (1.0, Box::new(|a, b| a * b)),
        ReduceKind::Or if d == DType::Bool => (0.0, Box::new(f64::max)),
        // All ones, whatever the width; a reduction over nothing wraps it into the dtype below.
        ReduceKind::And => (-1.0, Box::new(|a, b| bitwise(BinaryOp::And, a, b, d))),
        ReduceKind::Or => (0.0, Box::new(|a, b| bitwise(BinaryOp::Or, a, b, d))),
    };
    let total = |i: usize| v[i * each..(i + 1) * each].iter().fold(start, |a, &b| combine(a, b));
    match kind {
        ReduceKind::And if d.is_integer() && each == 0 => vec![bitwise(BinaryOp::Or, start, start, d); n],
        _ => (0..n).map(total).collect(),
    }
}

fn lowest(d: DType) -> f64 {
    if d.is_float() { f64::NEG_INFINITY } else { crate::finite_min(d) }
}

fn highest(d: DType) -> f64 {
    if d.is_float() {
        return f64::INFINITY;
    }
    let bits = d.size() as i32 * 8 - i32::from(d.is_signed());
    2f64.powi(bits) - 1.0
}

pub(super) fn dot_general(l: &Array, r: &Array, dims: &DotDims) -> Vec<f64> {
    let (a, [batch, m, k]) = grouped(l, [&dims.lhs_batch, &dims.lhs_free(l.dims().len()), &dims.lhs_contract]);
    let (b, [_, n, _]) = grouped(r, [&dims.rhs_batch, &dims.rhs_free(r.dims().len()), &dims.rhs_contract]);
    let mut out = Vec::with_capacity(batch * m * n);
    for s in 0..batch {
        for i in 0..m {
            let row = &a[(s * m + i) * k..][..k];
            for j in 0..n {
                let column = &b[(s * n + j) * k..][..k];
                out.push(row.iter().zip(column).map(|(x, y)| x * y).sum());
            }
        }
    }
    out
}
