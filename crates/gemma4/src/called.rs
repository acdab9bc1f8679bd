//! What functions of the runtime compute instead of the compiler: products with matrices that are outside of the program,
//! attention, and what would go through memory several times.

use graph::{Graph, GraphError, TensorType, Value};
use tensor::DType;

/// Name of the function: operands `session` (i64 `[1]`) and `x` `[m, k]`, attributes `w0`, `w1`, ... for each result `[m, n]`.
pub const PRODUCTS: &str = "lapidary.products";

/// `x · wᵀ` for matrices of a session that share their `x`: one result `[m, n]` for each `(number, n, dtype)`.
///
/// `session` is `i64[1]` with the session's number, `x` is `[m, k]` of f32 or bf16, as are the results. Numbers and sizes
/// are checked against the session when the program runs.
///
/// # Errors
/// When `x` is not a matrix.
#[track_caller]
pub fn products(
    graph: &Graph,
    session: Value,
    x: Value,
    wanted: &[(usize, usize, DType)],
) -> Result<Vec<Value>, GraphError> {
    let m = graph.shape(x).dims().first().copied().unwrap_or(1);
    let results: Vec<TensorType> = wanted.iter().map(|&(_, n, dtype)| TensorType::new(dtype, [m, n])).collect();
    let names: Vec<String> = (0..wanted.len()).map(|i| format!("w{i}")).collect();
    let attributes: Vec<(&str, i64)> =
        names.iter().zip(wanted).map(|(name, &(number, ..))| (name.as_str(), number as i64)).collect();
    graph.custom_call(PRODUCTS, &[session, x], &results, &attributes)
}

/// What becomes of the results of [`products_around`].
#[derive(Debug, Clone, Copy)]
pub(crate) enum Then {
    /// They are the results.
    Results,
    /// The gated GELU of two.
    Gated,
    /// The gated GELU of the only one and columns from `column` on of `by`.
    GatedBy { by: Value, column: usize },
    /// Its norm is added to `x`, and the sum multiplied by `scale` `[1]`.
    Onto { x: Value, norm: Value, scale: Option<Value> },
    /// It is capped, and f32.
    Capped(f64),
}

/// What the attribute `then` says.
pub mod then {
    /// Results are those of the products.
    pub const RESULTS: i64 = 0;
    /// Gated GELU of two.
    pub const GATED: i64 = 1;
    /// Gated GELU with columns of an operand.
    pub const GATED_BY: i64 = 2;
    /// Norm and sum.
    pub const ONTO: i64 = 3;
    /// Norm and sum, times a factor.
    pub const ONTO_SCALED: i64 = 4;
    /// Logits with a cap.
    pub const CAPPED: i64 = 5;
}

/// [`products`] of rows that are normed before, if there is a norm, and with something done to the results, all in the dtype of
/// `x` but for capped ones. The function finds the operands in the order norm, then those of [`Then`], after `x`, weights as stored;
/// attributes `norm`, `then` ([`then`]), `column`, and bits of f64 `eps` and `cap`.
///
/// # Errors
/// When `x` is not a matrix.
#[track_caller]
pub(crate) fn products_around(
    graph: &Graph,
    session: Value,
    x: Value,
    norm: Option<Value>,
    eps: f64,
    wanted: &[(usize, usize)],
    then: Then,
) -> Result<Vec<Value>, GraphError> {
    let m = graph.shape(x).dims().first().copied().unwrap_or(1);
    let mut operands: Vec<Value> = [session, x].into_iter().chain(norm).collect();
    let names: Vec<String> = (0..wanted.len()).map(|i| format!("w{i}")).collect();
    let mut attributes: Vec<(&str, i64)> =
        names.iter().zip(wanted).map(|(name, &(number, _))| (name.as_str(), number as i64)).collect();
    let (mut dtype, mut results) = (graph.dtype(x), 1);
    let kind = match then {
        Then::Results => {
            results = wanted.len();
            then::RESULTS
        }
        Then::Gated => then::GATED,
        Then::GatedBy { by, column } => {
            operands.push(by);
            attributes.push(("column", column as i64));
            then::GATED_BY
        }
        Then::Onto { x, norm, scale } => {
            operands.extend([x, norm].into_iter().chain(scale));
            if scale.is_some() { then::ONTO_SCALED } else { then::ONTO }
        }
        Then::Capped(cap) => {
            dtype = DType::F32;
            attributes.push(("cap", bits(cap)));
            then::CAPPED
        }
    };
    attributes.extend([("norm", i64::from(norm.is_some())), ("then", kind), ("eps", bits(eps))]);
    let results: Vec<TensorType> = wanted[..results].iter().map(|&(_, n)| TensorType::new(dtype, [m, n])).collect();
    graph.custom_call(PRODUCTS_AROUND, &operands, &results, &attributes)
}

/// Name of the function that computes products with what is done before and after them in a decode step.
pub const PRODUCTS_AROUND: &str = "lapidary.products_around";

/// Names of the functions that compute attention of a decode step: over a cache, and over one that gets new keys and values.
pub const STEP_ATTENTION: [&str; 2] = ["lapidary.step_attention", "lapidary.step_attention_own"];

/// What attention of a step reads besides its cache.
#[derive(Debug, Clone, Copy)]
pub(crate) struct StepAttention {
    /// Queries as projected, `[b, h * e]`, and their norm `[e]` as stored.
    pub(crate) queries: (Value, Value),
    /// New keys and values as projected, `[b, k * e]`, and the norm of keys `[e]` as stored.
    pub(crate) new: Option<(Value, Value, Value)>,
    /// Each `[b, 1, e / 2]`.
    pub(crate) angles: [Value; 2],
    /// Position of each sequence's token, `[b]` i32.
    pub(crate) positions: Value,
    pub(crate) eps: f64,
}

/// Attention of one token of every sequence over `cache`, keys and values `[b, k, s, e]`, with position `p` in row `p` modulo `s`; all
/// rows that have been written are seen. Gives the heads' results `[b, h * e]`, and the cache with the new keys and values, which takes
/// over the memory of the old.
///
/// # Errors
/// When operands are not arrays of so many dimensions.
#[track_caller]
pub(crate) fn step_attention(
    graph: &Graph,
    x: &StepAttention,
    cache: [Value; 2],
) -> Result<(Value, [Value; 2]), GraphError> {
    let attributes = [("eps", bits(x.eps))];
    let context = graph.ty(x.queries.0);
    let [keys, values] = cache;
    let mut operands = vec![keys, values, x.queries.0, x.queries.1, x.angles[0], x.angles[1], x.positions];
    match x.new {
        None => {
            let y = graph.custom_call(STEP_ATTENTION[0], &operands, &[context], &attributes)?;
            Ok((y[0], cache))
        }
        Some((k, v, norm)) => {
            operands.extend([k, v, norm]);
            let results = [graph.ty(keys), graph.ty(values), context];
            let y = graph.custom_call_in_place(STEP_ATTENTION[1], &operands, 2, &results, &attributes)?;
            Ok((y[2], [y[0], y[1]]))
        }
    }
}

/// Name of the function that computes attention, see [`attention`].
pub const ATTENTION: &str = "lapidary.attention";
/// Name of the function that computes its gradient.
pub const ATTENTION_GRADIENT: &str = "lapidary.attention_gradient";

/// Whether the functions take heads of so many elements.
#[must_use]
pub fn attends(width: usize) -> bool {
    width.is_multiple_of(32)
}

/// Attention of queries `[b, k, t, g, e]` over keys and values `[b, k, s, e]`, as the queries: scale 1, over keys at positions
/// from 0 up to the query's, of its segment, and within the window if there is one.
///
/// Positions of queries `[t]` and keys `[s]` and segments `[b, t]` and `[b, s]` are i32. The function gets these seven and the
/// attribute `window` (0: none), and gives the result and the logarithm of every row's sum of exponentials, f32 `[b, k, t, g]`.
/// The function of the gradient gets the seven, those logarithms and the gradient by the result, and gives the gradients by
/// queries, keys and values.
///
/// # Errors
/// When shapes do not fit each other.
#[track_caller]
pub fn attention(
    graph: &Graph,
    operands: [Value; 3],
    positions: [Value; 2],
    segments: [Value; 2],
    window: Option<usize>,
) -> Result<Value, GraphError> {
    let inputs: Vec<Value> = operands.into_iter().chain(positions).chain(segments).collect();
    let attributes = [("window", window.unwrap_or(0) as i64)];
    let forward = |g: &Graph, x: &[Value]| {
        let dims = g.dims(x[0]);
        let results = [g.ty(x[0]), TensorType::new(DType::F32, &dims[..4])];
        let y = g.custom_call(ATTENTION, x, &results, &attributes)?;
        Ok((vec![y[0]], vec![y[1]]))
    };
    let backward = |g: &Graph, x: &[Value], kept: &[Value], ct: &[Value]| {
        let given: Vec<Value> = x.iter().chain(kept).chain(ct).copied().collect();
        let results = [g.ty(x[0]), g.ty(x[1]), g.ty(x[2])];
        let y = g.custom_call(ATTENTION_GRADIENT, &given, &results, &attributes)?;
        Ok(y.into_iter().map(Some).chain([None; 4]).collect())
    };
    Ok(graph.custom_vjp(&inputs, forward, backward)?[0])
}

/// Names of the function that computes a norm, and of its gradient; with `x` and a weight as operands.
pub const RMS_NORM: [&str; 2] = ["lapidary.rms_norm", "lapidary.rms_norm_gradient"];
/// Names of the function that computes a gated GELU, and of its gradient; with gate and up as operands.
pub const GATED_GELU: [&str; 2] = ["lapidary.gated_gelu", "lapidary.gated_gelu_gradient"];
/// Name of the function that computes losses of logits and their gradient.
pub const CROSS_ENTROPY: &str = "lapidary.cross_entropy";

/// The bits of a number, as an attribute takes them.
fn bits(v: f64) -> i64 {
    v.to_bits().cast_signed()
}

/// RMS norm over the last axis, as [`crate::nn`] has it. The function gets `x`, the weight in f32 if there is one and the
/// attribute `eps` (bits of an f64), and gives the norm and one f32 for each row, which the gradient gets after `x` and weight, and
/// before the gradient by the norm. That gives the gradients by `x` and weight.
///
/// # Errors
/// When shapes do not fit each other.
#[track_caller]
pub(crate) fn rms_norm(graph: &Graph, x: Value, weight: Option<Value>, eps: f64) -> Result<Value, GraphError> {
    let attributes = [("eps", bits(eps))];
    let weight_dtype = weight.map_or(DType::F32, |w| graph.dtype(w));
    let inputs: Vec<Value> = [x].into_iter().chain(weight).collect();
    let wide = |g: &Graph, v: &[Value]| -> Result<Vec<Value>, GraphError> {
        v.iter().enumerate().map(|(i, &v)| if i == 1 { g.convert(v, DType::F32) } else { Ok(v) }).collect()
    };
    let forward = |g: &Graph, v: &[Value]| {
        let mut rows = g.dims(v[0]);
        rows.pop();
        let y =
            g.custom_call(RMS_NORM[0], &wide(g, v)?, &[g.ty(v[0]), TensorType::new(DType::F32, rows)], &attributes)?;
        Ok((vec![y[0]], vec![y[1]]))
    };
    let backward = |g: &Graph, v: &[Value], kept: &[Value], ct: &[Value]| {
        let v = wide(g, v)?;
        let given: Vec<Value> = v.iter().chain(kept).chain(ct).copied().collect();
        let results: Vec<TensorType> = v.iter().map(|&v| g.ty(v)).collect();
        let d = g.custom_call(RMS_NORM[1], &given, &results, &attributes)?;
        d.into_iter().enumerate().map(|(i, d)| Ok(Some(if i == 1 { g.convert(d, weight_dtype)? } else { d }))).collect()
    };
    Ok(graph.custom_vjp(&inputs, forward, backward)?[0])
}

/// The gated GELU of `gate` and `up`, as [`crate::nn`] has it. The function of the gradient gets both and the gradient by the
/// result, and gives the gradients by both.
///
/// # Errors
/// When shapes differ.
#[track_caller]
pub(crate) fn gated_gelu(graph: &Graph, gate: Value, up: Value) -> Result<Value, GraphError> {
    let forward = |g: &Graph, v: &[Value]| Ok((g.custom_call(GATED_GELU[0], v, &[g.ty(v[0])], &[])?, Vec::new()));
    let backward = |g: &Graph, v: &[Value], _: &[Value], ct: &[Value]| {
        let d = g.custom_call(GATED_GELU[1], &[v[0], v[1], ct[0]], &[g.ty(v[0]), g.ty(v[1])], &[])?;
        Ok(d.into_iter().map(Some).collect())
    };
    Ok(graph.custom_vjp(&[gate, up], forward, backward)?[0])
}

/// Losses and z terms of logits `[c, v]` with targets and weights `[c]` (i32, f32), each f32 `[c]`, and the gradient of the sum of
/// the losses by the logits. The attributes `capped` (0 or 1), `cap` and `z_loss` (bits of an f64) say how.
///
/// # Errors
/// When operands are not arrays of so many dimensions.
#[track_caller]
pub(crate) fn cross_entropy(
    graph: &Graph,
    [logits, targets, weights]: [Value; 3],
    cap: Option<f64>,
    z_loss: f64,
) -> Result<[Value; 3], GraphError> {
    let row = graph.ty(weights);
    let attributes =
        [("capped", i64::from(cap.is_some())), ("cap", bits(cap.unwrap_or(0.0))), ("z_loss", bits(z_loss))];
    let results = [row.clone(), row, graph.ty(logits)];
    let y = graph.custom_call(CROSS_ENTROPY, &[logits, targets, weights], &results, &attributes)?;
    Ok([y[0], y[1], y[2]])
}
