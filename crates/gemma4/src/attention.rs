//! Attention of one layer: projections, norms, rotation, windows, and the keys and values that others borrow.

use graph::{Compare, DotDims, Graph, Value};
use tensor::DType;

use crate::arch::{Layer, LayerKind};
use crate::layer::names;
use crate::nn::{Angles, Result, masked_softmax, rms_norm, wide};

/// Query positions of one block of a full layer. A full layer goes through its queries block by block, so that its scores
/// never take more than `heads x FULL_BLOCK x S` floats.
pub(crate) const FULL_BLOCK: usize = 512;

/// Keys and values of a layer, after norm and rotation, for the whole sequence: what borrowing layers read.
#[derive(Debug, Clone, Copy)]
pub(crate) struct KeyValues {
    /// `[b, k, s, e]`.
    pub(crate) keys: Value,
    /// `[b, k, s, e]`.
    pub(crate) values: Value,
}

/// Where queries and keys stand in their sequences, where that is not 0, 1, 2, ...
#[derive(Debug, Clone, Copy)]
pub(crate) struct KeyPositions {
    /// `[b, t]` i32.
    pub(crate) queries: Value,
    /// `[b, s]` i32; negative where there is no key.
    pub(crate) keys: Value,
}

/// What attention needs to know besides its layer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sequence {
    /// `[b, t]` i32: only positions of the same segment see each other. Absent: one segment.
    pub(crate) segments: Option<Value>,
    /// Given where keys are not those of the queries' own positions; then there are no segments.
    pub(crate) at: Option<KeyPositions>,
    pub(crate) eps: f64,
    pub(crate) window: usize,
    pub(crate) heads: usize,
    pub(crate) dtype: DType,
}

/// Values worth looking at when implementations are compared.
#[derive(Debug, Clone, Copy)]
pub(crate) struct AttentionTrace {
    /// `[b, t, h, e]`, after the norm, before rotation.
    pub(crate) q: Value,
    /// `[b, t, k, e]` of layers that own them.
    pub(crate) kv: Option<(Value, Value)>,
}

/// `[b, t, heads * e]` to `[b, t, heads, e]`.
fn split_heads(g: &Graph, x: Value, heads: usize) -> Result<Value> {
    let d = g.dims(x);
    g.reshape(x, [d[0], d[1], heads, d[2] / heads])
}

/// A layer's own keys and values from their projections `[b, t, k * e]`, and their unrotated forms for tracing. Without a
/// value projection, values are the key projection.
pub(crate) fn own_key_values(
    g: &Graph,
    layer: &Layer,
    (k_raw, v_raw): (Value, Option<Value>),
    k_norm: Value,
    angles: &Angles,
    eps: f64,
) -> Result<(KeyValues, (Value, Value))> {
    let k_raw = split_heads(g, g.named(k_raw, names::KEY_PROJ)?, layer.kv_heads)?;
    let v_raw = match v_raw {
        Some(v_raw) => split_heads(g, g.named(v_raw, names::VALUE_PROJ)?, layer.kv_heads)?,
        None => k_raw,
    };
    let k = rms_norm(g, k_raw, Some(k_norm), eps)?;
    // The value norm has no weight and values are not rotated.
    let v = rms_norm(g, v_raw, None, eps)?;
    let keys = g.transpose(angles.rotate(g, k)?, &[0, 2, 1, 3])?;
    let values = g.transpose(v, &[0, 2, 1, 3])?;
    Ok((KeyValues { keys, values }, (k, v)))
}

/// Attention of queries `q_raw` `[b, t, h * e]`, as projected, over `kv`; returns the heads' results `[b, t, h * e]` and the
/// queries before rotation.
pub(crate) fn attend(
    g: &Graph,
    layer: &Layer,
    q_raw: Value,
    q_norm: Value,
    kv: KeyValues,
    angles: &Angles,
    seq: &Sequence,
) -> Result<(Value, Value)> {
    let dims = g.dims(q_raw);
    let (b, t) = (dims[0], dims[1]);
    let (k, e) = (layer.kv_heads, layer.head_dim);
    let (heads, group) = (seq.heads, seq.heads / k);
    let q_raw = g.named(q_raw, names::QUERY_PROJ)?;
    let q = rms_norm(g, split_heads(g, q_raw, heads)?, Some(q_norm), seq.eps)?;
    // [b, t, k, g, e] -> [b, k, t, g, e]: query head h uses key/value head h / g
    let q_btkge = g.reshape(angles.rotate(g, q)?, [b, t, k, group, e])?;
    let q_bktge = g.transpose(q_btkge, &[0, 2, 1, 3, 4])?;
    let window = (layer.kind == LayerKind::Sliding).then_some(seq.window);
    let o_bktge = match (layer.kind, seq.at) {
        (_, Some(at)) => at_positions(g, q_bktge, kv, at, window, seq)?,
        (LayerKind::Sliding, None) if t > seq.window => sliding(g, q_bktge, kv, seq)?,
        (LayerKind::Full, None) if t > FULL_BLOCK => full_blocks(g, q_bktge, kv, seq)?,
        _ => {
            let first = g.iota(DType::I32, [t], 0)?;
            block(g, q_bktge, kv, Positions { queries: first, keys: first }, (seq.segments, seq.segments), window, seq)?
        }
    };
    let o_bthe = g.reshape(g.transpose(o_bktge, &[0, 2, 1, 3, 4])?, [b, t, heads * e])?;
    Ok((g.named(o_bthe, names::CONTEXT)?, q))
}

/// Attention where queries and keys say where they stand: over a cache, whose keys come in any order.
fn at_positions(
    g: &Graph,
    q: Value,
    kv: KeyValues,
    at: KeyPositions,
    window: Option<usize>,
    seq: &Sequence,
) -> Result<Value> {
    let (b, t, s) = (g.dims(q)[0], g.dims(q)[2], g.dims(kv.keys)[2]);
    let qi = g.reshape(at.queries, [b, 1, t, 1, 1])?;
    let kj = g.reshape(at.keys, [b, 1, 1, 1, s])?;
    let exists = g.compare(Compare::Ge, kj, g.full_like(kj, 0.0)?)?;
    let mut allowed = g.and_bcast(g.compare_bcast(Compare::Le, kj, qi)?, exists)?;
    if let Some(w) = window {
        allowed = g.and(allowed, g.compare_bcast(Compare::Lt, qi, g.add_scalar(kj, w as f64)?)?)?;
    }
    masked_attention(g, q, kv, allowed, seq.dtype)
}

/// Row indices of queries and keys, each `[n]` i32, for the causal and window rules.
#[derive(Debug, Clone, Copy)]
struct Positions {
    queries: Value,
    keys: Value,
}

/// Scores, mask, softmax and weighted values of queries `[b, k, t, g, e]` over keys `[b, k, s, e]`; scale 1, no cap.
///
/// A gradient computes the scores again: they are the only thing here that grows with `t * s`.
fn block(
    g: &Graph,
    q: Value,
    kv: KeyValues,
    at: Positions,
    segments: (Option<Value>, Option<Value>),
    window: Option<usize>,
    seq: &Sequence,
) -> Result<Value> {
    let segmented = segments.0.zip(segments.1);
    let mut inputs = vec![q, kv.keys, kv.values, at.queries, at.keys];
    inputs.extend(segmented.into_iter().flat_map(|(q, k)| [q, k]));
    let outputs = g.remat(&inputs, |g, x| {
        let (kv, at) = (KeyValues { keys: x[1], values: x[2] }, Positions { queries: x[3], keys: x[4] });
        let segments = segmented.map(|_| (x[5], x[6]));
        Ok(vec![block_plain(g, x[0], kv, at, segments, window, seq)?])
    })?;
    Ok(outputs[0])
}

fn block_plain(
    g: &Graph,
    q: Value,
    kv: KeyValues,
    at: Positions,
    segments: Option<(Value, Value)>,
    window: Option<usize>,
    seq: &Sequence,
) -> Result<Value> {
    let d = g.dims(q);
    let (b, t) = (d[0], d[2]);
    let s = g.dims(kv.keys)[2];
    let qi = g.reshape(at.queries, [t, 1])?;
    let kj = g.reshape(at.keys, [1, s])?;
    let mut allowed = g.compare_bcast(Compare::Le, kj, qi)?;
    if let Some(w) = window {
        // key > query - window: `window` positions, the query's own included
        allowed = g.and(allowed, g.compare_bcast(Compare::Lt, qi, g.add_scalar(kj, w as f64)?)?)?;
    }
    // Blocks reach before the first key; those rows are padding.
    let exists = g.compare(Compare::Ge, kj, g.full_like(kj, 0.0)?)?;
    allowed = g.reshape(g.and_bcast(allowed, exists)?, [1, 1, t, 1, s])?;
    if let Some((qs, ks)) = segments {
        let same = g.compare_bcast(Compare::Eq, g.reshape(qs, [b, 1, t, 1, 1])?, g.reshape(ks, [b, 1, 1, 1, s])?)?;
        allowed = g.and_bcast(allowed, same)?;
    }
    masked_attention(g, q, kv, allowed, seq.dtype)
}

/// Attention of queries `[b, k, t, g, e]` over keys `[b, k, s, e]`, of which `allowed` `[b or 1, 1, t, 1, s]` are seen.
fn masked_attention(g: &Graph, q: Value, kv: KeyValues, allowed: Value, dtype: DType) -> Result<Value> {
    let d = g.dims(q);
    let (b, k, t, group, e) = (d[0], d[1], d[2], d[3], d[4]);
    let s = g.dims(kv.keys)[2];
    let rows = g.reshape(q, [b, k, t * group, e])?;
    // Scores stay in f32 (f64) up to the softmax, also where activations are narrower.
    let scores = g.reshape(batched(g, rows, kv.keys, 3, wide(dtype))?, [b, k, t, group, s])?;
    let p = masked_softmax(g, scores, allowed, dtype)?;
    let o = batched(g, g.reshape(p, [b, k, t * group, s])?, kv.values, 2, wide(dtype))?;
    g.reshape(g.convert(o, dtype)?, [b, k, t, group, e])
}

/// `[b, k, m, c]` times `[b, k, ..]` over dimension `contract` of the latter.
fn batched(g: &Graph, lhs: Value, rhs: Value, contract: usize, out: DType) -> Result<Value> {
    let (l, r) = (g.dims(lhs), g.dims(rhs));
    if l[0] * l[1] == 1 {
        // Libraries that take narrow operands take no batches.
        let dims =
            DotDims { lhs_batch: vec![], rhs_batch: vec![], lhs_contract: vec![1], rhs_contract: vec![contract - 2] };
        let product = g.dot_general(g.reshape(lhs, &l[2..])?, g.reshape(rhs, &r[2..])?, dims, out)?;
        let n = g.dims(product)[1];
        return g.reshape(product, [1, 1, l[2], n]);
    }
    let batch = vec![0, 1];
    let dims =
        DotDims { lhs_batch: batch.clone(), rhs_batch: batch, lhs_contract: vec![3], rhs_contract: vec![contract] };
    g.dot_general(lhs, rhs, dims, out)
}

/// Pads dimension `dim` with zeros.
fn pad_dim(g: &Graph, x: Value, dim: usize, low: usize, high: usize) -> Result<Value> {
    let rank = g.shape(x).rank();
    let (mut lows, mut highs) = (vec![0i64; rank], vec![0i64; rank]);
    lows[dim] = low as i64;
    highs[dim] = high as i64;
    let zero = g.scalar_like(x, 0.0)?;
    g.pad(x, zero, &lows, &highs, &vec![0; rank])
}

/// Sliding attention in O(t * window): every block of `window` queries sees its own and the previous block of keys.
///
/// The blocks become part of the batch, so that the whole is one pair of batched products.
fn sliding(g: &Graph, q: Value, kv: KeyValues, seq: &Sequence) -> Result<Value> {
    let d = g.dims(q);
    let (b, k, t, group, e) = (d[0], d[1], d[2], d[3], d[4]);
    let w = seq.window;
    let n = t.div_ceil(w);
    let tail = n * w - t;
    // [b, k, t, ..] -> [b, n, w, ..] with blocks beside the batch: [b * n, k, w, ..]
    let blocks = |x: Value, inner: &[usize]| -> Result<Value> {
        let x = pad_dim(g, x, 2, 0, tail)?;
        let x = g.reshape(x, [&[b, k, n, w], inner].concat())?;
        let rank = 4 + inner.len();
        let perm: Vec<usize> = [0, 2, 1].into_iter().chain(3..rank).collect();
        g.reshape(g.transpose(x, &perm)?, [&[b * n, k, w], inner].concat())
    };
    // own and previous block of keys: rows (i - 1) * w .. (i + 1) * w of the sequence
    let two_blocks = |x: Value| -> Result<Value> {
        let own = blocks(x, &[e])?;
        let shifted = pad_dim(g, g.slice_dim(pad_dim(g, x, 2, 0, tail)?, 2, 0, (n - 1) * w)?, 2, w, 0)?;
        let x = g.reshape(shifted, [b, k, n, w, e])?;
        let previous = g.reshape(g.transpose(x, &[0, 2, 1, 3, 4])?, [b * n, k, w, e])?;
        g.concatenate(&[previous, own], 2)
    };
    let q_blocks = blocks(q, &[group, e])?;
    let kv_blocks = KeyValues { keys: two_blocks(kv.keys)?, values: two_blocks(kv.values)? };
    // Rows relative to the block: queries at w .. 2w, keys at 0 .. 2w. Only the first block of a sequence has no
    // previous one; segments say so: its missing keys get segment -1, which no query has.
    let queries = g.add_scalar(g.iota(DType::I32, [w], 0)?, w as f64)?;
    let keys = g.iota(DType::I32, [2 * w], 0)?;
    let segments = match seq.segments {
        Some(s) => s,
        None => g.splat(DType::I32, [b, t], 1.0)?,
    };
    let padded = pad_dim(g, segments, 1, 0, tail)?;
    let own = g.reshape(padded, [b * n, w])?;
    let before = g.splat(DType::I32, [b, w], -1.0)?;
    let previous = g.concatenate(&[before, g.slice_dim(padded, 1, 0, (n - 1) * w)?], 1)?;
    let key_segments = g.concatenate(&[g.reshape(previous, [b * n, w])?, own], 1)?;
    let at = Positions { queries, keys };
    let o = block(g, q_blocks, kv_blocks, at, (Some(own), Some(key_segments)), Some(w), seq)?;
    let o = g.transpose(g.reshape(o, [b, n, k, w, group, e])?, &[0, 2, 1, 3, 4, 5])?;
    g.slice_dim(g.reshape(o, [b, k, n * w, group, e])?, 2, 0, t)
}

/// Full attention, one block of queries after the other over all keys: memory grows with t, not with its square.
fn full_blocks(g: &Graph, q: Value, kv: KeyValues, seq: &Sequence) -> Result<Value> {
    let d = g.dims(q);
    let (b, k, t, group, e) = (d[0], d[1], d[2], d[3], d[4]);
    let c = FULL_BLOCK;
    let n = t.div_ceil(c);
    let tail = n * c - t;
    // [b, k, t, g, e] -> [n, b, k, c, g, e]
    let q_blocks = g.reshape(pad_dim(g, q, 2, 0, tail)?, [b, k, n, c, group, e])?;
    let q_blocks = g.transpose(q_blocks, &[2, 0, 1, 3, 4, 5])?;
    let index = g.reshape(g.iota(DType::I32, [n * c], 0)?, [n, c])?;
    let mut xs = vec![q_blocks, index];
    let mut consts = vec![kv.keys, kv.values];
    if let Some(s) = seq.segments {
        let s_blocks = g.reshape(pad_dim(g, s, 1, 0, tail)?, [b, n, c])?;
        xs.push(g.transpose(s_blocks, &[1, 0, 2])?);
        consts.push(s);
    }
    let (_, ys) = g.scan(n, &[], &xs, &consts, |g, _, x, k| {
        let keys = g.iota(DType::I32, [t], 0)?;
        let kv = KeyValues { keys: k[0], values: k[1] };
        let at = Positions { queries: x[1], keys };
        let o = block(g, x[0], kv, at, (x.get(2).copied(), k.get(2).copied()), None, seq)?;
        Ok((vec![], vec![o]))
    })?;
    // [n, b, k, c, g, e] -> [b, k, t, g, e]
    let o = g.transpose(ys[0], &[1, 2, 0, 3, 4, 5])?;
    g.slice_dim(g.reshape(o, [b, k, n * c, group, e])?, 2, 0, t)
}
