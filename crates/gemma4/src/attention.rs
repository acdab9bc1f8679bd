//! Attention of one layer: projections, norms, rotation, windows, and the keys and values that others borrow.

use graph::{Compare, DotDims, Graph, Value};
use tensor::DType;

use crate::arch::{Layer, LayerKind};
use crate::called;
use crate::layer::names;
use crate::nn::{Angles, Result, masked_softmax, rms_norm};
use crate::partition::{Partition, constrain, names as axis};

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
pub(crate) struct Sequence<'a> {
    /// `[b, t]` i32: only positions of the same segment see each other. Absent: one segment.
    pub(crate) segments: Option<Value>,
    /// Given where keys are not those of the queries' own positions; then there are no segments.
    pub(crate) at: Option<KeyPositions>,
    pub(crate) eps: f64,
    pub(crate) window: usize,
    pub(crate) heads: usize,
    pub(crate) dtype: DType,
    pub(crate) partition: Option<&'a Partition>,
    /// Whether functions of the runtime compute norms and attention of whole sequences, where they can.
    pub(crate) called: bool,
}

impl Sequence<'_> {
    /// How many devices share a sequence.
    fn parts(&self) -> usize {
        self.partition.map_or(1, |p| p.parts_of(axis::LENGTH))
    }
}

/// `[b, t, heads * e]`, cut between heads: their number is what must divide.
fn projected(g: &Graph, partition: Option<&Partition>, x: Value, (heads, name): (usize, &str)) -> Result<Value> {
    let Some(p) = partition else { return Ok(x) };
    let d = g.dims(x);
    g.sharding_constraint(x, p.activation(&[(axis::BATCH, d[0]), (axis::LENGTH, d[1]), (name, heads)]))
}

/// Keys or values `[b, k, s, e]`, cut along the sequence or whole.
fn along(g: &Graph, partition: Option<&Partition>, x: Value, length: &str) -> Result<Value> {
    constrain(g, partition, x, &[axis::KV_BATCH, axis::KV_HEADS, length, axis::WHOLE])
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
    (eps, partition, called): (f64, Option<&Partition>, bool),
) -> Result<(KeyValues, (Value, Value))> {
    let projected = |x| projected(g, partition, x, (layer.kv_heads, axis::KV_HEADS));
    let (k_raw, v_raw) = (projected(k_raw)?, v_raw.map(projected).transpose()?);
    let k_raw = split_heads(g, g.named(k_raw, names::KEY_PROJ)?, layer.kv_heads)?;
    let v_raw = match v_raw {
        Some(v_raw) => split_heads(g, g.named(v_raw, names::VALUE_PROJ)?, layer.kv_heads)?,
        None => k_raw,
    };
    let k = rms_norm(g, k_raw, Some(k_norm), eps, called)?;
    // The value norm has no weight and values are not rotated.
    let v = rms_norm(g, v_raw, None, eps, called)?;
    let keys = along(g, partition, g.transpose(angles.rotate(g, k)?, &[0, 2, 1, 3])?, axis::LENGTH)?;
    let values = along(g, partition, g.transpose(v, &[0, 2, 1, 3])?, axis::LENGTH)?;
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
    seq: &Sequence<'_>,
) -> Result<(Value, Value)> {
    let dims = g.dims(q_raw);
    let (b, t) = (dims[0], dims[1]);
    let (k, e) = (layer.kv_heads, layer.head_dim);
    let (heads, group) = (seq.heads, seq.heads / k);
    let q_raw = g.named(projected(g, seq.partition, q_raw, (heads, axis::HEADS))?, names::QUERY_PROJ)?;
    let q = rms_norm(g, split_heads(g, q_raw, heads)?, Some(q_norm), seq.eps, seq.called)?;
    // [b, t, k, g, e] -> [b, k, t, g, e]: query head h uses key/value head h / g
    let q_btkge = g.reshape(angles.rotate(g, q)?, [b, t, k, group, e])?;
    let q_bktge = g.transpose(q_btkge, &[0, 2, 1, 3, 4])?;
    let window = (layer.kind == LayerKind::Sliding).then_some(seq.window);
    // A query outside of windows sees the whole sequence: keys and values come together once.
    let whole = KeyValues {
        keys: along(g, seq.partition, kv.keys, axis::WHOLE)?,
        values: along(g, seq.partition, kv.values, axis::WHOLE)?,
    };
    let o_bktge = match (layer.kind, seq.at) {
        (_, Some(at)) => at_positions(g, q_bktge, kv, at, window, seq)?,
        (_, None) if seq.called && called::attends(e) => {
            let first = g.iota(DType::I32, [t], 0)?;
            let segments = match seq.segments {
                Some(segments) => segments,
                None => g.splat(DType::I32, [b, t], 1.0)?,
            };
            called::attention(g, [q_bktge, kv.keys, kv.values], [first, first], [segments, segments], window)?
        }
        (LayerKind::Sliding, None) if t > seq.window => sliding(g, q_bktge, kv, seq)?,
        (LayerKind::Full, None) if t > FULL_BLOCK => full_blocks(g, q_bktge, whole, seq)?,
        _ => {
            let first = g.iota(DType::I32, [t], 0)?;
            block(
                g,
                q_bktge,
                whole,
                Positions { queries: first, keys: first },
                (seq.segments, seq.segments),
                window,
                seq,
            )?
        }
    };
    let o_bthe = g.reshape(g.transpose(o_bktge, &[0, 2, 1, 3, 4])?, [b, t, heads * e])?;
    Ok((g.named(projected(g, seq.partition, o_bthe, (heads, axis::HEADS))?, names::CONTEXT)?, q))
}

/// Attention where queries and keys say where they stand: over a cache, whose keys come in any order.
fn at_positions(
    g: &Graph,
    q: Value,
    kv: KeyValues,
    at: KeyPositions,
    window: Option<usize>,
    seq: &Sequence<'_>,
) -> Result<Value> {
    let (b, t, s) = (g.dims(q)[0], g.dims(q)[2], g.dims(kv.keys)[2]);
    let qi = g.reshape(at.queries, [b, 1, t, 1, 1])?;
    let kj = g.reshape(at.keys, [b, 1, 1, 1, s])?;
    let exists = g.compare(Compare::Ge, kj, g.full_like(kj, 0.0)?)?;
    let mut allowed = g.and_bcast(g.compare_bcast(Compare::Le, kj, qi)?, exists)?;
    if let Some(w) = window {
        allowed = g.and(allowed, g.compare_bcast(Compare::Lt, qi, g.add_scalar(kj, w as f64)?)?)?;
    }
    masked_attention(g, q, kv, allowed, seq)
}

/// Row indices of queries and keys, each `[n]` i32, for the causal and window rules.
#[derive(Debug, Clone, Copy)]
struct Positions {
    queries: Value,
    keys: Value,
}

/// Scores, mask, softmax and weighted values of queries `[b, .., k, t, g, e]` over keys `[b, .., k, s, e]`; scale 1, no cap.
/// Segments are `[b, .., t]` and `[b, .., s]`.
///
/// A gradient computes the scores again: they are the only thing here that grows with `t * s`.
fn block(
    g: &Graph,
    q: Value,
    kv: KeyValues,
    at: Positions,
    segments: (Option<Value>, Option<Value>),
    window: Option<usize>,
    seq: &Sequence<'_>,
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
    seq: &Sequence<'_>,
) -> Result<Value> {
    let d = g.dims(q);
    // Dimensions before the positions: batch, blocks where there are any, key/value heads.
    let lead = d.len() - 3;
    let (t, s) = (d[lead], g.dims(kv.keys)[lead]);
    let qi = g.reshape(at.queries, [t, 1])?;
    let kj = g.reshape(at.keys, [1, s])?;
    let mut allowed = g.compare_bcast(Compare::Le, kj, qi)?;
    if let Some(w) = window {
        // key > query - window: `window` positions, the query's own included
        allowed = g.and(allowed, g.compare_bcast(Compare::Lt, qi, g.add_scalar(kj, w as f64)?)?)?;
    }
    // Blocks reach before the first key; those rows are padding.
    let exists = g.compare(Compare::Ge, kj, g.full_like(kj, 0.0)?)?;
    let ones = vec![1; lead];
    allowed = g.reshape(g.and_bcast(allowed, exists)?, [&ones[..], &[t, 1, s]].concat())?;
    if let Some((qs, ks)) = segments {
        let same = g.compare_bcast(
            Compare::Eq,
            g.reshape(qs, [&d[..lead - 1], &[1, t, 1, 1]].concat())?,
            g.reshape(ks, [&d[..lead - 1], &[1, 1, 1, s]].concat())?,
        )?;
        allowed = g.and_bcast(allowed, same)?;
    }
    masked_attention(g, q, kv, allowed, seq)
}

/// Attention of queries `[b, .., k, t, g, e]` over keys `[b, .., k, s, e]`, of which `allowed` `[b or 1, .., 1, t, 1, s]` are
/// seen.
fn masked_attention(g: &Graph, q: Value, kv: KeyValues, allowed: Value, seq: &Sequence<'_>) -> Result<Value> {
    let d = g.dims(q);
    let lead = d.len() - 3;
    let (t, group, e) = (d[lead], d[lead + 1], d[lead + 2]);
    let s = g.dims(kv.keys)[lead];
    let shape = |last: &[usize]| [&d[..lead], last].concat();
    let float = seq.dtype.accumulator();
    // Scores stay in f32 (f64) up to the softmax, also where activations are narrower.
    if seq.partition.is_some() {
        // Positions and heads stay apart, so that either may be cut.
        let dims = |contract: usize| DotDims {
            lhs_batch: (0..lead).collect(),
            rhs_batch: (0..lead).collect(),
            lhs_contract: vec![lead + 2],
            rhs_contract: vec![contract],
        };
        let p = masked_softmax(g, g.dot_general(q, kv.keys, dims(lead + 1), float)?, allowed, seq.dtype)?;
        return g.convert(g.dot_general(p, kv.values, dims(lead), float)?, seq.dtype);
    }
    let rows = g.reshape(q, shape(&[t * group, e]))?;
    let scores = g.reshape(batched(g, rows, kv.keys, 3, float)?, shape(&[t, group, s]))?;
    let p = masked_softmax(g, scores, allowed, seq.dtype)?;
    let o = batched(g, g.reshape(p, shape(&[t * group, s]))?, kv.values, 2, float)?;
    g.reshape(g.convert(o, seq.dtype)?, shape(&[t, group, e]))
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
/// The blocks become part of the batch, so that the whole is one pair of batched products. Where devices share a sequence, they
/// share its blocks, and every device asks its neighbour for one block of keys.
fn sliding(g: &Graph, q: Value, kv: KeyValues, seq: &Sequence<'_>) -> Result<Value> {
    let d = g.dims(q);
    let (b, k, t, group, e) = (d[0], d[1], d[2], d[3], d[4]);
    let w = seq.window;
    let n = t.div_ceil(w);
    let tail = n * w - t;
    // Beside the batch, or merged with it where blocks are not shared.
    let lead: &[usize] = if seq.parts() > 1 { &[b, n] } else { &[b * n] };
    // [b, k, t, ..] -> [b, n, k, w, ..] or [b * n, k, w, ..]
    let split = |x: Value, inner: &[usize]| -> Result<Value> {
        let x = g.reshape(x, [&[b, k, n, w], inner].concat())?;
        let rank = 4 + inner.len();
        let perm: Vec<usize> = [0, 2, 1].into_iter().chain(3..rank).collect();
        let x = g.transpose(x, &perm)?;
        let logical: Vec<&str> = [axis::BATCH, axis::LENGTH].into_iter().chain(vec![axis::WHOLE; rank - 2]).collect();
        let x = if lead.len() == 2 && inner.len() == 1 { constrain(g, seq.partition, x, &logical)? } else { x };
        g.reshape(x, [lead, &[k, w], inner].concat())
    };
    let blocks = |x: Value, inner: &[usize]| split(pad_dim(g, x, 2, 0, tail)?, inner);
    // own and previous block of keys: rows (i - 1) * w .. (i + 1) * w of the sequence
    let two_blocks = |x: Value| -> Result<Value> {
        let own = blocks(x, &[e])?;
        let shifted = pad_dim(g, g.slice_dim(pad_dim(g, x, 2, 0, tail)?, 2, 0, (n - 1) * w)?, 2, w, 0)?;
        g.concatenate(&[split(shifted, &[e])?, own], lead.len() + 1)
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
    let own = g.reshape(padded, [lead, &[w]].concat())?;
    let before = g.splat(DType::I32, [b, w], -1.0)?;
    let previous = g.concatenate(&[before, g.slice_dim(padded, 1, 0, (n - 1) * w)?], 1)?;
    let key_segments = g.concatenate(&[g.reshape(previous, [lead, &[w]].concat())?, own], lead.len())?;
    let at = Positions { queries, keys };
    let o = block(g, q_blocks, kv_blocks, at, (Some(own), Some(key_segments)), Some(w), seq)?;
    let o = g.transpose(g.reshape(o, [b, n, k, w, group, e])?, &[0, 2, 1, 3, 4, 5])?;
    g.slice_dim(g.reshape(o, [b, k, n * w, group, e])?, 2, 0, t)
}

/// Full attention, one block of queries after the other over all keys: memory grows with t, not with its square.
///
/// Where `x` devices share a sequence, a block has [`FULL_BLOCK`] queries of each of them: every device goes through its own
/// part of the sequence, and no query moves.
fn full_blocks(g: &Graph, q: Value, kv: KeyValues, seq: &Sequence<'_>) -> Result<Value> {
    let d = g.dims(q);
    let (b, k, t, group, e) = (d[0], d[1], d[2], d[3], d[4]);
    let x = if t.is_multiple_of(seq.parts()) { seq.parts() } else { 1 };
    let part = t / x;
    let c = FULL_BLOCK.min(part);
    let n = part.div_ceil(c);
    let tail = n * c - part;
    // Positions `[.., t, ..]` at `dim` to `[n, .., x * c, ..]`: padded to whole blocks, which go in front.
    let blocks = |v: Value, dim: usize| -> Result<Value> {
        let d = g.dims(v);
        let (before, after) = (&d[..dim], &d[dim + 1..]);
        let v = g.reshape(v, [before, &[x, part], after].concat())?;
        let v = g.reshape(pad_dim(g, v, dim + 1, 0, tail)?, [before, &[x, n, c], after].concat())?;
        let rank = d.len() + 2;
        let perm: Vec<usize> = std::iter::once(dim + 1).chain((0..rank).filter(|&i| i != dim + 1)).collect();
        g.reshape(g.transpose(v, &perm)?, [&[n], before, &[x * c], after].concat())
    };
    let mut xs = vec![blocks(q, 2)?, blocks(g.iota(DType::I32, [t], 0)?, 0)?];
    let mut consts = vec![kv.keys, kv.values];
    if let Some(s) = seq.segments {
        xs.push(blocks(s, 1)?);
        consts.push(s);
    }
    let (_, ys) = g.scan(n, &[], &xs, &consts, |g, _, x, k| {
        let keys = g.iota(DType::I32, [t], 0)?;
        let kv = KeyValues { keys: k[0], values: k[1] };
        let at = Positions { queries: x[1], keys };
        let o = block(g, x[0], kv, at, (x.get(2).copied(), k.get(2).copied()), None, seq)?;
        Ok((vec![], vec![o]))
    })?;
    // [n, b, k, x * c, g, e] -> [b, k, t, g, e]
    let o = g.reshape(ys[0], [n, b, k, x, c, group, e])?;
    let o = g.reshape(g.transpose(o, &[1, 2, 3, 0, 4, 5, 6])?, [b, k, x, n * c, group, e])?;
    g.reshape(g.slice_dim(o, 3, 0, part)?, [b, k, t, group, e])
}
