//! The training loss: decoder, tied head and cross-entropy, whose logits exist for one block of rows at a time.

use std::collections::HashMap;

use graph::{Compare, DotDims, Graph, GraphError, Sharding, Value};
use tensor::DType;

use crate::Arch;
use crate::called;
use crate::decoder::{Decoder, LayerRemat, Tokens, Weights, lookup, spread};
use crate::layout::Layout;
use crate::nn::{Result, project};
use crate::params::{EMBED_TOKENS, EMBED_TOKENS_PER_LAYER};
use crate::partition::{Partition, Spread, names as axis};

/// How a loss is computed.
#[derive(Debug, Clone, PartialEq)]
pub struct LossOptions {
    /// Activation dtype, to which matrices are rounded before a product.
    pub dtype: DType,
    /// What the gradient of a layer keeps.
    pub remat: LayerRemat,
    /// Whether attention, norms, activations and the loss are calls of functions of the runtime ([`crate::called`]) wherever
    /// they fit. For one device, in f32 or bf16.
    pub called: bool,
    /// Blocks in which the rows go through head and cross-entropy; divides `b * t`.
    pub blocks: usize,
    /// Factor of the squared log-partition added to each token's loss.
    pub z_loss: f64,
    /// Whether the gradient is wanted: by the token table as head, or by hidden states at all.
    pub gradient: HeadGradient,
}

/// What the head's block computes beside the loss.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeadGradient {
    /// The loss alone.
    None,
    /// The gradient by hidden states.
    Hidden,
    /// That and the gradient by the token table.
    HiddenAndTable,
}

/// One batch as values of a graph, each `[b, t]` i32.
#[derive(Debug, Clone, Copy)]
pub struct BatchValues {
    /// Token ids.
    pub ids: Value,
    /// Positions, restarting in every document.
    pub positions: Value,
    /// Documents: positions of different ones do not see each other. `None`: every row is one document.
    pub segments: Option<Value>,
    /// The token that follows.
    pub targets: Value,
    /// 0 where there is no target.
    pub target_segments: Value,
    /// Rows of the per-layer table among the parameters, where they are not numbered as tokens are; `None`: by `ids`.
    pub per_layer_ids: Option<Value>,
    /// Rows of the per-layer table for every token, `[b, t, l * p]`; `None`: taken from the table among the parameters.
    pub per_layer_rows: Option<Value>,
}

/// Sums over the tokens of a batch, each an f32 scalar.
#[derive(Debug, Clone, Copy)]
pub struct LossSums {
    /// Cross-entropy, z term included.
    pub total: Value,
    /// The z term alone.
    pub z: Value,
    /// Number of targets.
    pub weight: Value,
}

/// Sum of the losses of a batch. `params` holds the slots of the layout by name, in the dtype they are stored in.
///
/// # Errors
/// When shapes do not fit the architecture.
pub fn loss_sums(
    g: &Graph,
    arch: &Arch,
    layout: &Layout,
    options: &LossOptions,
    params: &HashMap<String, Value>,
    batch: &BatchValues,
) -> std::result::Result<LossSums, GraphError> {
    // Matrices are rounded once, outside of loops and of what is computed again.
    let mut cast = HashMap::with_capacity(params.len());
    for slot in layout.slots() {
        // A per-layer table on the host is not among them.
        let Some(&v) = params.get(&slot.name) else { continue };
        let matrix = slot.spec().shape.rank() >= 2 && slot.spec().name != EMBED_TOKENS_PER_LAYER;
        let v = if matrix { g.convert(v, options.dtype)? } else { v };
        cast.insert(slot.name.clone(), v);
    }
    // Rows are looked up in the table as stored, so that their gradient is summed in its precision.
    let table = params[EMBED_TOKENS];
    cast.insert(EMBED_TOKENS.to_owned(), table);
    let rows = match (arch.per_layer_input(), batch.per_layer_rows) {
        (Some(_), None) => {
            let ids = batch.per_layer_ids.unwrap_or(batch.ids);
            Some(lookup(g, layout, EMBED_TOKENS_PER_LAYER, params[EMBED_TOKENS_PER_LAYER], ids)?)
        }
        (_, rows) => rows,
    };
    let weights = Weights::new(cast);
    let decoder = Decoder {
        g,
        arch,
        layout,
        weights: &weights,
        dtype: options.dtype,
        remat: options.remat.clone(),
        called: options.called,
    };
    let tokens = Tokens { ids: batch.ids, rows, segments: batch.segments, positions: batch.positions };
    let last = decoder.run(&tokens)?.last;

    let _scope = g.scope("loss");
    let rows = Rows { partition: layout.partition(), blocks: options.blocks.max(1) };
    let hidden = rows.deal(g, last)?;
    let targets = rows.deal(g, batch.targets)?;
    let segments = rows.deal(g, batch.target_segments)?;
    let counted =
        g.convert(g.compare(Compare::Ne, segments, g.full_like(segments, 0.0)?)?, options.dtype.accumulator())?;
    let spread = layout.slots().iter().find(|s| s.name == EMBED_TOKENS).and_then(|s| spread(layout, s));
    let head = Head { cap: arch.spec().final_logit_softcapping, options, rows, spread };
    let [total, z] = head.cross_entropy(g, hidden, table, targets, counted)?;
    let narrow = |v: Value| g.convert(v, DType::F32);
    Ok(LossSums { total: narrow(total)?, z: narrow(z)?, weight: narrow(g.reduce_sum(counted, &[0, 1])?)? })
}

/// How tokens are dealt to blocks: every device has its own part of every block, so that no token moves.
#[derive(Debug, Clone, Copy)]
struct Rows<'a> {
    partition: Option<&'a Partition>,
    blocks: usize,
}

impl Rows<'_> {
    /// Ways in which a batch and its sequences are cut.
    fn parts(&self) -> (usize, usize) {
        self.partition.map_or((1, 1), |p| (p.parts_of(axis::LOGITS_BATCH), p.parts_of(axis::LENGTH)))
    }

    /// `[b, t, ..]` to `[blocks, c, ..]`.
    fn deal(&self, g: &Graph, x: Value) -> Result<Value> {
        let dims = g.dims(x);
        let (n, inner) = (dims[0] * dims[1], &dims[2..]);
        let (b, t) = self.parts();
        let Some(p) = self.partition.filter(|_| b * t > 1) else {
            return g.reshape(x, [&[self.blocks, n / self.blocks][..], inner].concat());
        };
        let whole = vec![axis::WHOLE; inner.len()];
        let logical: Vec<(&str, usize)> =
            [axis::LOGITS_BATCH, axis::LENGTH].into_iter().chain(whole).zip(dims.clone()).collect();
        let x = g.sharding_constraint(x, p.activation(&logical))?;
        let x = g.reshape(x, [&[b, dims[0] / b, t, dims[1] / t], inner].concat())?;
        let swapped = |from: usize, rank: usize| {
            let mut perm: Vec<usize> = (0..rank).collect();
            perm.swap(from, from + 1);
            perm
        };
        let x = g.transpose(x, &swapped(1, 4 + inner.len()))?;
        let x = g.reshape(x, [&[b * t, self.blocks, n / (b * t * self.blocks)][..], inner].concat())?;
        let x = g.transpose(x, &swapped(0, 3 + inner.len()))?;
        let x = g.reshape(x, [&[self.blocks, n / self.blocks][..], inner].concat())?;
        let rest = vec![Vec::new(); inner.len()];
        g.sharding_constraint(x, Sharding::from_axes([vec![Vec::new(), self.axes(p)], rest].concat()))
    }

    /// Mesh axes of the tokens of a block.
    fn axes(&self, p: &Partition) -> Vec<String> {
        [p.axes_of(axis::LOGITS_BATCH), p.axes_of(axis::LENGTH)].concat()
    }
}

struct Head<'a> {
    cap: Option<f64>,
    options: &'a LossOptions,
    rows: Rows<'a>,
    /// How the table lies on the mesh.
    spread: Option<Spread>,
}

/// What a block of rows gives.
struct Block {
    total: Value,
    z: Value,
    /// `[c, d]`, in the activation dtype.
    d_hidden: Option<Value>,
    /// `[v, d]`, in the activation dtype; on a mesh `[devices, v, d]`, what the tokens of each give.
    d_table: Option<Value>,
}

impl Head<'_> {
    /// Sums of loss and z term over hidden states `[blocks, c, d]`.
    ///
    /// The loss is a scalar, so that its gradient is known up to one factor as soon as a block's logits are there: it is
    /// computed with the block, and nothing of the size `[rows, v]` is kept or computed twice.
    fn cross_entropy(
        &self,
        g: &Graph,
        hidden: Value,
        table: Value,
        targets: Value,
        counted: Value,
    ) -> Result<[Value; 2]> {
        let inputs = [hidden, table, targets, counted];
        let forward = |g: &Graph, v: &[Value]| {
            let [total, z, gradients @ ..] = &self.blocks(g, v)?[..] else { unreachable!("the sums are always there") };
            Ok((vec![*total, *z], gradients.to_vec()))
        };
        // The z term is part of the total; by itself it is only looked at.
        let backward = |g: &Graph, v: &[Value], kept: &[Value], ct: &[Value]| {
            let scaled = |kept: Option<&Value>, like: Value| -> Result<Option<Value>> {
                let Some(&x) = kept else { return Ok(None) };
                let x =
                    g.mul_bcast(g.convert(x, g.dtype(x).accumulator())?, g.convert(ct[0], g.dtype(x).accumulator())?)?;
                Ok(Some(g.convert(x, g.dtype(like))?))
            };
            Ok(vec![scaled(kept.first(), v[0])?, scaled(kept.get(1), v[1])?, None, None])
        };
        let out = g.custom_vjp(&inputs, forward, backward)?;
        Ok([out[0], out[1]])
    }

    /// Total, z term, and the gradients asked for, summed over blocks.
    fn blocks(&self, g: &Graph, v: &[Value]) -> Result<Vec<Value>> {
        let [hidden, table, targets, counted] = [v[0], v[1], v[2], v[3]];
        let dims = g.dims(hidden);
        let (blocks, c, d) = (dims[0], dims[1], dims[2]);
        let float = g.dtype(counted);
        let wants_table = self.options.gradient == HeadGradient::HiddenAndTable;
        // A product takes the table rounded; rows of targets and the gradient's sum keep the stored precision.
        let narrow = g.convert(table, self.options.dtype)?;
        // Gathered once for all blocks.
        let narrow = match &self.spread {
            Some(s) => g.sharding_constraint(narrow, s.gathered.clone())?,
            None => narrow,
        };
        if blocks == 1 {
            let (hidden, targets) = (g.reshape(hidden, [c, d])?, g.reshape(targets, [c])?);
            let b = self.block(g, hidden, narrow, targets, g.reshape(counted, [c])?)?;
            let d_hidden = b.d_hidden.map(|x| g.reshape(x, [1, c, d])).transpose()?;
            let d_table = b.d_table.map(|x| self.over_devices(g, g.convert(x, float)?)).transpose()?;
            return Ok([Some(b.total), Some(b.z), d_hidden, d_table].into_iter().flatten().collect());
        }
        let zero = g.scalar(float, 0.0)?;
        let mut carry = vec![zero, zero];
        if wants_table {
            let v = g.dims(table)[0];
            let shape = if self.devices() > 1 { vec![self.devices(), v, d] } else { vec![v, d] };
            carry.push(self.constrain_table(g, g.splat(float, shape, 0.0)?)?);
        }
        let (sums, ys) = g.scan(blocks, &carry, &[hidden, targets, counted], &[narrow], |g, carry, x, k| {
            let b = self.block(g, x[0], k[0], x[1], x[2])?;
            let mut next = vec![g.add(carry[0], b.total)?, g.add(carry[1], b.z)?];
            if let (Some(&sum), Some(d_table)) = (carry.get(2), b.d_table) {
                next.push(g.add(sum, g.convert(d_table, float)?)?);
            }
            Ok((next, b.d_hidden.into_iter().collect()))
        })?;
        let d_table = sums.get(2).map(|&x| self.over_devices(g, x)).transpose()?;
        Ok([Some(sums[0]), Some(sums[1]), ys.first().copied(), d_table].into_iter().flatten().collect())
    }

    /// Devices that hold different tokens.
    fn devices(&self) -> usize {
        let (b, t) = self.rows.parts();
        b * t
    }

    /// A gradient by the table before it is summed over devices: `[devices, v, d]`.
    fn constrain_table(&self, g: &Graph, x: Value) -> Result<Value> {
        let (Some(p), Some(s), 3) = (self.rows.partition, &self.spread, g.shape(x).rank()) else { return Ok(x) };
        let [rows, columns] = s.gathered.dims() else { return Ok(x) };
        g.sharding_constraint(x, Sharding::from_axes(vec![self.rows.axes(p), rows.clone(), columns.clone()]))
    }

    /// The sum over devices, which each keep the part of the table that they store.
    fn over_devices(&self, g: &Graph, x: Value) -> Result<Value> {
        let x = if g.shape(x).rank() == 3 { g.reduce_sum(x, &[0])? } else { x };
        match &self.spread {
            Some(s) => g.sharding_constraint(x, s.stored.clone()),
            None => Ok(x),
        }
    }

    /// One block: hidden states `[c, d]`, table `[v, d]`, targets `[c]` i32, weights `[c]`.
    fn block(&self, g: &Graph, hidden: Value, table: Value, targets: Value, counted: Value) -> Result<Block> {
        let LossOptions { dtype, z_loss, gradient, .. } = *self.options;
        let (c, v) = (g.dims(hidden)[0], g.dims(table)[0]);
        let float = g.dtype(counted);
        let column = |x: Value| g.reshape(x, [c, 1]);
        // Rounded to the activation dtype, as MaxText does unless logits_dot_in_fp32 is set.
        let raw = project(g, hidden, table, dtype)?;
        let raw = match self.rows.partition {
            Some(p) => {
                let columns = p.activation(&[(axis::VOCAB, v)]).dims()[0].clone();
                g.sharding_constraint(raw, Sharding::from_axes(vec![self.rows.axes(p), columns]))?
            }
            None => raw,
        };
        if self.options.called && gradient != HeadGradient::None {
            let cap = self.cap;
            let [loss, z, d_raw] = called::cross_entropy(g, [raw, targets, counted], cap, z_loss)?;
            let (total, z) = (g.reduce_sum(loss, &[0])?, g.reduce_sum(z, &[0])?);
            return self.gradients(g, [total, z], d_raw, hidden, table);
        }
        let raw = g.convert(raw, float)?;
        let (tanh, logits) = match self.cap {
            Some(cap) => {
                let t = g.tanh(g.mul_scalar(raw, 1.0 / cap)?)?;
                (Some(t), g.mul_scalar(t, cap)?)
            }
            None => (None, raw),
        };
        // The cap bounds the logits, so that their largest need not be looked for.
        let (shifted, shift) = match self.cap {
            Some(cap) => (g.add_scalar(logits, -cap)?, g.splat(float, [c, 1], cap)?),
            None => {
                let max = g.reduce_max_keep(logits, &[1])?;
                (g.sub_bcast(logits, max)?, max)
            }
        };
        let e = g.exp(shifted)?;
        let sum = g.reduce_sum_keep(e, &[1])?;
        let log_z = g.add(g.log(sum)?, shift)?;
        // [c, v] bool, never stored: it is fused into whatever reads it.
        let column_index = g.iota(DType::I32, [1, v], 1)?;
        let hit = g.compare_bcast(Compare::Eq, column_index, column(targets)?)?;
        let at_target = g.select(hit, logits, g.full_like(logits, 0.0)?)?;
        let at_target = g.reduce_sum_keep(at_target, &[1])?;
        let z = g.mul_scalar(g.mul(log_z, log_z)?, z_loss)?;
        let each = g.add(g.sub(log_z, at_target)?, z)?;
        let weight = column(counted)?;
        let total = g.reduce_sum(g.mul(each, weight)?, &[0, 1])?;
        let z_total = g.reduce_sum(g.mul(z, weight)?, &[0, 1])?;
        if gradient == HeadGradient::None {
            return Ok(Block { total, z: z_total, d_hidden: None, d_table: None });
        }
        // d total / d logits = (softmax * (1 + 2 z_loss log_z) - hit) * weight
        let factor = g.add_scalar(g.mul_scalar(log_z, 2.0 * z_loss)?, 1.0)?;
        let factor = g.div(g.mul(factor, weight)?, sum)?;
        let one = g.select(hit, g.broadcast_to(weight, [c, v])?, g.splat(float, [c, v], 0.0)?)?;
        let mut d_raw = g.sub(g.mul_bcast(e, factor)?, one)?;
        if let Some(t) = tanh {
            d_raw = g.mul(d_raw, g.add_scalar(g.neg(g.mul(t, t)?)?, 1.0)?)?;
        }
        self.gradients(g, [total, z_total], g.convert(d_raw, dtype)?, hidden, table)
    }

    /// What a block gives, from the gradient by its logits `[c, v]`.
    fn gradients(&self, g: &Graph, [total, z]: [Value; 2], d_raw: Value, hidden: Value, table: Value) -> Result<Block> {
        let LossOptions { dtype, gradient, .. } = *self.options;
        let c = g.dims(hidden)[0];
        let product = |l: Value, r: Value, batch: &[usize], contract: [usize; 2]| {
            let dims = DotDims {
                lhs_batch: batch.to_vec(),
                rhs_batch: batch.to_vec(),
                lhs_contract: vec![contract[0]],
                rhs_contract: vec![contract[1]],
            };
            g.dot_general(l, r, dims, dtype)
        };
        let d_hidden = Some(product(d_raw, table, &[], [1, 0])?);
        let d_table = match (gradient, self.devices()) {
            (HeadGradient::HiddenAndTable, 1) => Some(product(d_raw, hidden, &[], [0, 0])?),
            // Every device sums over its own tokens; sums over devices wait until all blocks are done.
            (HeadGradient::HiddenAndTable, n) => {
                let apart = |x: Value| g.reshape(x, [n, c / n, g.dims(x)[1]]);
                Some(self.constrain_table(g, product(apart(d_raw)?, apart(hidden)?, &[0], [1, 1])?)?)
            }
            _ => None,
        };
        Ok(Block { total, z, d_hidden, d_table })
    }
}
