//! Building blocks that know no layer: norm, activation, rotation, softmax.

use graph::{Graph, GraphError, Value};
use tensor::{DType, HostArray, Shape};

use crate::arch::{ArchSpec, PerLayerInput, Rope};
use crate::called;

pub(crate) type Result<T> = std::result::Result<T, GraphError>;

/// RMS norm over the last axis: statistics and weight in f32, then **one** rounding to the dtype of `x`.
/// The weight is used as stored, there is no "+ 1".
///
/// The gradient keeps `x` and one number a row.
///
/// Where it is `called`, a function of the runtime computes both.
pub(crate) fn rms_norm(g: &Graph, x: Value, weight: Option<Value>, eps: f64, called: bool) -> Result<Value> {
    if called {
        return called::rms_norm(g, x, weight, eps);
    }
    let dtype = g.dtype(x);
    let last = g.shape(x).rank() - 1;
    let width = g.dims(x)[last] as f64;
    let inputs: Vec<Value> = [x].into_iter().chain(weight).collect();
    let forward = |g: &Graph, v: &[Value]| {
        let x32 = g.convert(v[0], dtype.accumulator())?;
        let sum = g.reduce_sum_keep(g.mul(x32, x32)?, &[last])?;
        let mean = g.mul_scalar(sum, 1.0 / width)?;
        let inverse = g.rsqrt(g.add_scalar(mean, eps)?)?;
        let mut y = g.mul_bcast(x32, inverse)?;
        if let Some(&w) = v.get(1) {
            y = g.mul_bcast(y, g.convert(w, dtype.accumulator())?)?;
        }
        Ok((vec![g.convert(y, dtype)?], vec![inverse]))
    };
    // With n = x * inverse: dx = inverse * (ct * w - n * mean(ct * w * n)), dw = sum over rows of ct * n.
    let backward = |g: &Graph, v: &[Value], kept: &[Value], ct: &[Value]| {
        let x32 = g.convert(v[0], dtype.accumulator())?;
        let ct32 = g.convert(ct[0], dtype.accumulator())?;
        let n = g.mul_bcast(x32, kept[0])?;
        let scaled = match v.get(1) {
            Some(&w) => g.mul_bcast(ct32, g.convert(w, dtype.accumulator())?)?,
            None => ct32,
        };
        let mean = g.mul_scalar(g.reduce_sum_keep(g.mul(scaled, n)?, &[last])?, 1.0 / width)?;
        let dx = g.mul_bcast(g.sub(scaled, g.mul_bcast(n, mean)?)?, kept[0])?;
        let mut gradients = vec![Some(g.convert(dx, dtype)?)];
        if let Some(&w) = v.get(1) {
            let rows: Vec<usize> = (0..last).collect();
            gradients.push(Some(g.convert(g.reduce_sum(g.mul(ct32, n)?, &rows)?, g.dtype(w))?));
        }
        Ok(gradients)
    };
    Ok(g.custom_vjp(&inputs, forward, backward)?[0])
}

/// `gelu_pytorch_tanh` of `gate`, rounded once as torch does inside its kernel, times `up`.
///
/// The gradient keeps the two operands alone. Where it is `called`, a function of the runtime computes both.
pub(crate) fn gated_gelu(g: &Graph, gate: Value, up: Value, called: bool) -> Result<Value> {
    if called {
        return called::gated_gelu(g, gate, up);
    }
    const CUBIC: f64 = 0.044715;
    let dtype = g.dtype(gate);
    let slope = (2.0 / std::f64::consts::PI).sqrt();
    // tanh(slope * (u + CUBIC * u^3)) and u^2
    let tanh = |g: &Graph, u: Value| {
        let square = g.mul(u, u)?;
        let inner = g.mul(u, g.add_scalar(g.mul_scalar(square, CUBIC)?, 1.0)?)?;
        Ok::<_, graph::GraphError>((g.tanh(g.mul_scalar(inner, slope)?)?, square))
    };
    let gelu = |g: &Graph, u: Value, t: Value| g.mul(g.mul_scalar(u, 0.5)?, g.add_scalar(t, 1.0)?);
    let forward = |g: &Graph, v: &[Value]| {
        let u = g.convert(v[0], dtype.accumulator())?;
        let (t, _) = tanh(g, u)?;
        Ok((vec![g.mul(g.convert(gelu(g, u, t)?, dtype)?, v[1])?], Vec::new()))
    };
    let backward = |g: &Graph, v: &[Value], _: &[Value], ct: &[Value]| {
        let u = g.convert(v[0], dtype.accumulator())?;
        let (t, square) = tanh(g, u)?;
        let ct = g.convert(ct[0], dtype.accumulator())?;
        // gelu' = (1 + t) / 2 + u / 2 * (1 - t^2) * slope * (1 + 3 CUBIC u^2)
        let inner = g.mul_scalar(g.add_scalar(g.mul_scalar(square, 3.0 * CUBIC)?, 1.0)?, slope)?;
        let bend = g.mul(g.mul(u, inner)?, g.add_scalar(g.neg(g.mul(t, t)?)?, 1.0)?)?;
        let d = g.mul_scalar(g.add(g.add_scalar(t, 1.0)?, bend)?, 0.5)?;
        let d_gate = g.mul(g.mul(ct, g.convert(v[1], dtype.accumulator())?)?, d)?;
        let d_up = g.mul(ct, gelu(g, u, t)?)?;
        Ok(vec![Some(g.convert(d_gate, dtype)?), Some(g.convert(d_up, dtype)?)])
    };
    Ok(g.custom_vjp(&[gate, up], forward, backward)?[0])
}

/// `x` times an f32 scalar with one rounding, as torch multiplies a tensor by a Python float.
pub(crate) fn scale_f32(g: &Graph, x: Value, s: f64) -> Result<Value> {
    let dtype = g.dtype(x);
    g.convert(g.mul_scalar(g.convert(x, dtype.accumulator())?, s)?, dtype)
}

/// Rows of the token table `[b, t, d]`, in the activation dtype, to what enters the first layer.
///
/// sqrt(hidden) is rounded to the activation dtype before the product: 39.25 for E2B in bf16. The reference's f32 model has
/// the f32 root, also where the arithmetic is f64.
pub(crate) fn scale_embedding(g: &Graph, rows: Value, spec: &ArchSpec) -> Result<Value> {
    g.mul_scalar(rows, f64::from((spec.hidden_size as f32).sqrt()))
}

/// The slice `[b, t, p]` of [`per_layer_inputs`] for the layer at `index`.
pub(crate) fn of_layer(g: &Graph, ple: Value, index: usize) -> Result<Value> {
    let d = g.dims(ple);
    g.reshape(g.slice_dim(ple, 2, index, index + 1)?, [d[0], d[1], d[3]])
}

/// `[b, t, l, p]`: what every layer gets to know of a token, from its rows of the per-layer table `[b, t, l * p]` and the
/// projection `[b, t, l * p]` of its scaled embedding.
pub(crate) fn per_layer_inputs(
    g: &Graph,
    p: PerLayerInput,
    context: Value,
    rows: Value,
    norm: Value,
    (spec, called): (&ArchSpec, bool),
) -> Result<Value> {
    let (d, dtype) = (g.dims(context), g.dtype(context));
    let shape = [d[0], d[1], spec.layer_kinds.len(), p.width];
    let tok = g.mul_scalar(g.convert(rows, dtype)?, f64::from((p.width as f32).sqrt()))?;
    let ctx = scale_f32(g, context, (spec.hidden_size as f64).powf(-0.5))?;
    let ctx = rms_norm(g, g.reshape(ctx, shape)?, Some(norm), spec.rms_norm_eps, called)?;
    scale_f32(g, g.add(ctx, g.reshape(tok, shape)?)?, 0.5f64.sqrt())
}

/// Cosine and sine of every rotated angle.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Angles {
    /// `[b, t, e / 2]` in the activation dtype.
    pub(crate) cos: Value,
    /// `[b, t, e / 2]` in the activation dtype.
    pub(crate) sin: Value,
}

impl Angles {
    /// Angles of `positions` `[b, t]` (i32), computed in f32 and then rounded to `dtype`. Frequencies are f32 numbers, as the
    /// reference keeps them, also where the arithmetic is f64.
    pub(crate) fn new(g: &Graph, positions: Value, rope: Rope, head_dim: usize, dtype: DType) -> Result<Self> {
        let frequencies = rope.inv_freq(head_dim);
        let half = frequencies.len();
        let bt = g.dims(positions);
        let shape = [bt[0], bt[1], half];
        let wide = dtype.accumulator();
        let f = g.constant(HostArray::from_slice([half], &frequencies).expect("one value per frequency"))?;
        let (f, p) = (g.convert(f, wide)?, g.convert(positions, wide)?);
        let angle = g.mul(g.broadcast_in_dim(p, shape, &[0, 1])?, g.broadcast_in_dim(f, shape, &[2])?)?;
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

/// Softmax over the last axis of wide scores, rounded to `dtype`, with excluded positions at exactly zero.
/// At least one position of every row must be allowed.
///
/// The gradient keeps the probabilities alone: ds = p * (dp - sum(dp * p)).
pub(crate) fn masked_softmax(g: &Graph, scores: Value, allowed: Value, dtype: DType) -> Result<Value> {
    let last = g.shape(scores).rank() - 1;
    let score = g.dtype(scores);
    let forward = |g: &Graph, v: &[Value]| {
        let low = g.full_like(v[0], graph::finite_min(score))?;
        let masked = g.select(g.broadcast_to(v[1], g.shape(v[0]))?, v[0], low)?;
        let e = g.exp(g.sub_bcast(masked, g.reduce_max_keep(masked, &[last])?)?)?;
        let p = g.convert(g.div_bcast(e, g.reduce_sum_keep(e, &[last])?)?, dtype)?;
        Ok((vec![p], vec![p]))
    };
    let backward = |g: &Graph, _: &[Value], kept: &[Value], ct: &[Value]| {
        let (p, ct) = (g.convert(kept[0], score)?, g.convert(ct[0], score)?);
        let dot = g.reduce_sum_keep(g.mul(ct, p)?, &[last])?;
        Ok(vec![Some(g.mul(p, g.sub_bcast(ct, dot)?)?), None])
    };
    Ok(g.custom_vjp(&[scores, allowed], forward, backward)?[0])
}

/// `x` `[.., k]` times the transpose of `w` `[n, k]`, in `dtype`.
///
/// The result is asked for in the operands' own dtype, for which every library has its fastest kernel; all of them accumulate
/// in f32.
pub(crate) fn project(g: &Graph, x: Value, w: Value, dtype: DType) -> Result<Value> {
    g.matmul_nt(x, w, dtype)
}
