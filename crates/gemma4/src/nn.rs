//! Building blocks that know no layer: norm, activation, rotation, softmax.

use graph::{Graph, GraphError, Value};
use tensor::{DType, HostArray, Shape};

use crate::arch::Rope;

/// The dtype of statistics and transcendental functions: f32, or f64 in a run that carries f64 activations.
pub(crate) fn wide(dtype: DType) -> DType {
    if dtype == DType::F64 { DType::F64 } else { DType::F32 }
}

pub(crate) type Result<T> = std::result::Result<T, GraphError>;

/// RMS norm over the last axis: statistics and weight in f32, then **one** rounding to the dtype of `x`.
/// The weight is used as stored, there is no "+ 1".
pub(crate) fn rms_norm(g: &Graph, x: Value, weight: Option<Value>, eps: f64) -> Result<Value> {
    let dtype = g.dtype(x);
    let last = g.shape(x).rank() - 1;
    let width = g.dims(x)[last] as f64;
    let x32 = g.convert(x, wide(dtype))?;
    let sum = g.reduce_sum_keep(g.mul(x32, x32)?, &[last])?;
    let mean = g.mul_scalar(sum, 1.0 / width)?;
    let inverse = g.rsqrt(g.add_scalar(mean, eps)?)?;
    let mut y = g.mul_bcast(x32, inverse)?;
    if let Some(w) = weight {
        y = g.mul_bcast(y, g.convert(w, wide(dtype))?)?;
    }
    g.convert(y, dtype)
}

/// `gelu_pytorch_tanh`: computed in f32 and rounded once, as torch does inside its kernel.
pub(crate) fn gelu_tanh(g: &Graph, x: Value) -> Result<Value> {
    let dtype = g.dtype(x);
    let u = g.convert(x, wide(dtype))?;
    let cube = g.mul(g.mul(u, u)?, u)?;
    let inner = g.add(u, g.mul_scalar(cube, 0.044715)?)?;
    let t = g.tanh(g.mul_scalar(inner, (2.0 / std::f64::consts::PI).sqrt())?)?;
    let y = g.mul(g.mul_scalar(u, 0.5)?, g.add_scalar(t, 1.0)?)?;
    g.convert(y, dtype)
}

/// `x` times an f32 scalar with one rounding, as torch multiplies a tensor by a Python float.
pub(crate) fn scale_f32(g: &Graph, x: Value, s: f64) -> Result<Value> {
    let dtype = g.dtype(x);
    g.convert(g.mul_scalar(g.convert(x, wide(dtype))?, s)?, dtype)
}

/// Cosine and sine of every rotated angle.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Angles {
    /// `[b, t, e / 2]` in the activation dtype.
    cos: Value,
    /// `[b, t, e / 2]` in the activation dtype.
    sin: Value,
}

impl Angles {
    /// Angles of `positions` `[b, t]` (i32): computed in f32, then rounded to `dtype`.
    pub(crate) fn new(g: &Graph, positions: Value, rope: Rope, head_dim: usize, dtype: DType) -> Result<Self> {
        let frequencies = rope.inv_freq(head_dim);
        let half = frequencies.len();
        let bt = g.dims(positions);
        let shape = [bt[0], bt[1], half];
        let f = g.constant(HostArray::from_slice([half], &frequencies).expect("one value per frequency"))?;
        let p = g.convert(positions, DType::F32)?;
        let angle = g.mul(g.broadcast_in_dim(p, shape, &[0, 1])?, g.broadcast_in_dim(f, shape, &[2])?)?;
        let angle = g.convert(angle, wide(dtype))?;
        Ok(Angles { cos: g.convert(g.cos(angle)?, dtype)?, sin: g.convert(g.sin(angle)?, dtype)? })
    }

    /// Rotates `x` `[b, t, heads, e]`: channel `i` pairs with `i + e / 2`.
    pub(crate) fn rotate(&self, g: &Graph, x: Value) -> Result<Value> {
        let dims = g.dims(x);
        let half = dims[3] / 2;
        let wide: Shape = [dims[0], dims[1], dims[2], half].into();
        let cos = g.broadcast_in_dim(self.cos, wide.clone(), &[0, 1, 3])?;
        let sin = g.broadcast_in_dim(self.sin, wide, &[0, 1, 3])?;
        let a = g.slice_dim(x, 3, 0, half)?;
        let b = g.slice_dim(x, 3, half, dims[3])?;
        let first = g.sub(g.mul(a, cos)?, g.mul(b, sin)?)?;
        let second = g.add(g.mul(b, cos)?, g.mul(a, sin)?)?;
        g.concatenate(&[first, second], 3)
    }
}

/// Softmax over the last axis of wide scores, with excluded positions at exactly zero.
/// At least one position of every row must be allowed.
pub(crate) fn masked_softmax(g: &Graph, scores: Value, allowed: Value) -> Result<Value> {
    let last = g.shape(scores).rank() - 1;
    let low = g.full_like(scores, graph::finite_min(g.dtype(scores)))?;
    let masked = g.select(g.broadcast_to(allowed, g.shape(scores))?, scores, low)?;
    let shifted = g.sub_bcast(masked, g.reduce_max_keep(masked, &[last])?)?;
    let e = g.exp(shifted)?;
    g.div_bcast(e, g.reduce_sum_keep(e, &[last])?)
}

/// `x` `[.., k]` times the transpose of `w` `[n, k]`, accumulated in f32 (f64) and rounded once to `dtype`.
///
/// Asking for narrow results would leave the accumulator's precision to the library behind the product.
pub(crate) fn project(g: &Graph, x: Value, w: Value, dtype: DType) -> Result<Value> {
    g.convert(g.matmul_nt(x, w, wide(dtype))?, dtype)
}
