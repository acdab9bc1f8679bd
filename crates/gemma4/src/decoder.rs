//! The forward pass, on weights in Hugging Face's own `[out, in]` layout.
//!
//! Sharing is a value: each donor's keys and values are handed to the layers that borrow them. No cache object is
//! involved, nothing can switch it off.

use std::collections::HashMap;

use graph::{Graph, Sharding, Value};
use tensor::DType;

use crate::arch::{KvSource, LayerKind, PerKind};
use crate::attention::KeyValues;
use crate::layer::{LayerContext, LayerInput, LayerOutputs, LayerWeights, layer};
use crate::layout::{Layout, Run, Slot, Stretch, role, stretches};
use crate::nn::{Angles, Result, of_layer, per_layer_inputs, project, rms_norm, scale_embedding, scale_f32};
use crate::params::EMBED_TOKENS;
use crate::partition::{Spread, constrain, gather, names as axis};
use crate::{Arch, PerLayerInput};

/// How one parameter of a slot lies, between steps and in use.
pub(crate) fn spread(layout: &Layout, slot: &Slot) -> Option<Spread> {
    let partition = layout.partition()?;
    // The slot was checked when the layout was made.
    let stored = partition.parameter(slot.spec()).ok()?;
    Some(Spread { gathered: partition.gathered(&stored), stored })
}

/// Rows of a table for every token `[b, t]`.
///
/// On a mesh every device looks its columns up for all tokens of the devices it shares the table with: the rows travel, never
/// the table, and the gradient of a device's columns is summed where they lie.
pub(crate) fn lookup(g: &Graph, layout: &Layout, name: &str, table: Value, ids: Value) -> Result<Value> {
    let slot = layout.slots().iter().find(|s| s.name == name);
    let (Some(p), Some(sharding)) = (layout.partition(), slot.and_then(|s| s.sharding.as_ref())) else {
        return g.take(table, ids);
    };
    let taken: Vec<&String> = sharding.dims().iter().flatten().collect();
    let free = |name: &str| p.axes_of(name).into_iter().filter(|a| !taken.contains(&a)).collect::<Vec<_>>();
    let (batch, length) = (free(axis::BATCH), free(axis::LENGTH));
    let ids = g.sharding_constraint(ids, Sharding::from_axes(vec![batch.clone(), length.clone()]))?;
    let rows = g.take(table, ids)?;
    let columns = sharding.dims()[1].clone();
    let rows = g.sharding_constraint(rows, Sharding::from_axes(vec![batch, length, columns]))?;
    constrain(g, Some(p), rows, &[axis::BATCH, axis::LENGTH, axis::WHOLE])
}

/// Tied head and soft cap.
pub(crate) fn head(g: &Graph, arch: &Arch, x: Value, table: Value) -> Result<Value> {
    soft_cap(g, arch, project(g, x, table, g.dtype(x))?)
}

/// The cap runs in the activation dtype.
pub(crate) fn soft_cap(g: &Graph, arch: &Arch, z: Value) -> Result<Value> {
    let dtype = g.dtype(z);
    match arch.spec().final_logit_softcapping {
        // HF divides, takes tanh and multiplies, each rounded to the activation dtype.
        Some(cap) => {
            let z_wide = g.convert(z, dtype.accumulator())?;
            let ratio = g.convert(g.div(z_wide, g.full_like(z_wide, cap)?)?, dtype)?;
            scale_f32(g, g.tanh(ratio)?, cap)
        }
        None => Ok(z),
    }
}

/// Parameters as values of a graph, by the names of a [`Layout`]'s slots.
#[derive(Debug)]
pub(crate) struct Weights(HashMap<String, Value>);

impl Weights {
    pub(crate) fn new(values: HashMap<String, Value>) -> Self {
        Weights(values)
    }

    /// The parameter as stored. The names asked for are those of the table that the map was made from.
    pub(crate) fn stored(&self, name: &str) -> Value {
        self.0[name]
    }

    /// The parameter in the activation dtype.
    pub(crate) fn cast(&self, g: &Graph, name: &str, dtype: DType) -> Result<Value> {
        g.convert(self.stored(name), dtype)
    }
}

/// What the gradient of a layer keeps of its forward pass.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LayerRemat {
    /// Whatever it needs.
    Everything,
    /// The layer's input and the values of these names ([`names`](crate::layer::names)); the rest is computed again.
    Keep(Vec<&'static str>),
}

/// The forward pass over given weights.
pub(crate) struct Decoder<'a> {
    pub(crate) g: &'a Graph,
    pub(crate) arch: &'a Arch,
    pub(crate) layout: &'a Layout,
    pub(crate) weights: &'a Weights,
    pub(crate) dtype: DType,
    pub(crate) remat: LayerRemat,
    /// See [`crate::loss::LossOptions::called`].
    pub(crate) called: bool,
}

/// Tokens as values of a graph.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tokens {
    /// `[b, t]` i32.
    pub(crate) ids: Value,
    /// Rows of the per-layer table, `[b, t, l * p]`.
    pub(crate) rows: Option<Value>,
    /// `[b, t]` i32.
    pub(crate) segments: Option<Value>,
    /// `[b, t]` i32.
    pub(crate) positions: Value,
}

/// Everything a forward pass computed that someone may ask for.
pub(crate) struct Outputs {
    pub(crate) embed: Value,
    pub(crate) ple: Option<Value>,
    /// Of the layers that are written out and not computed again.
    pub(crate) layers: Vec<LayerOutputs>,
    /// After the last norm.
    pub(crate) last: Value,
}

/// What the layers share while the program is built.
struct State {
    x: Value,
    ple: Option<Value>,
    segments: Option<Value>,
    angles: PerKind<Angles>,
    /// Of every donor so far.
    key_values: HashMap<usize, KeyValues>,
    /// What may be looked at.
    outputs: Vec<LayerOutputs>,
}

impl Decoder<'_> {
    pub(crate) fn run(&self, tokens: &Tokens) -> Result<Outputs> {
        let g = self.g;
        let spec = self.arch.spec();
        let embed = {
            let _scope = g.scope("embed");
            let rows_btd = lookup(g, self.layout, EMBED_TOKENS, self.weights.stored(EMBED_TOKENS), tokens.ids)?;
            let rows_btd = g.convert(rows_btd, self.dtype)?;
            let rows_btd = self.constrain(rows_btd, &[axis::BATCH, axis::NORM_LENGTH, axis::EMBED])?;
            scale_embedding(g, rows_btd, spec)?
        };
        let ple = match (self.arch.per_layer_input(), tokens.rows) {
            (Some(p), Some(rows)) => Some(self.per_layer_inputs(p, embed, rows)?),
            _ => None,
        };
        let angles = |kind| Angles::new(g, tokens.positions, spec.rope.get(kind), spec.head_dim.get(kind), self.dtype);
        let mut state = State {
            x: embed,
            ple,
            segments: tokens.segments,
            angles: PerKind { sliding: angles(LayerKind::Sliding)?, full: angles(LayerKind::Full)? },
            key_values: HashMap::new(),
            outputs: Vec::new(),
        };
        for run in self.layout.runs() {
            match *run {
                Run::Layer(index) => self.layer(index, &mut state)?,
                Run::Loop { start, groups, period } => self.looped(start, groups, period, &mut state)?,
            }
        }
        let last = rms_norm(g, state.x, Some(self.weights.stored("norm.weight")), spec.rms_norm_eps, self.called)?;
        Ok(Outputs { embed, ple, layers: state.outputs, last })
    }

    /// `[b, t, l, p]`: what every layer gets to know of the token and its embedding, computed once.
    fn per_layer_inputs(&self, p: PerLayerInput, x: Value, rows: Value) -> Result<Value> {
        let g = self.g;
        let _scope = g.scope("per_layer_inputs");
        let name = "per_layer_model_projection.weight";
        let projection = self.weights.cast(g, name, self.dtype)?;
        let projection = match self.layout.slots().iter().find(|s| s.name == name).and_then(|s| spread(self.layout, s))
        {
            Some(spread) => gather(g, projection, &spread)?,
            None => projection,
        };
        // Cut by tokens alone: the layers within the last axis do not divide evenly, and every layer wants its own.
        let tokens = |x: Value| self.constrain(x, &[axis::BATCH, axis::LENGTH, axis::WHOLE]);
        let context = tokens(project(g, x, projection, self.dtype)?)?;
        let norm = self.weights.stored("per_layer_projection_norm.weight");
        let ple = per_layer_inputs(g, p, context, tokens(rows)?, norm, (self.arch.spec(), self.called))?;
        self.constrain(ple, &[axis::BATCH, axis::LENGTH, axis::WHOLE, axis::WHOLE])
    }

    fn constrain(&self, x: Value, logical: &[&str]) -> Result<Value> {
        constrain(self.g, self.layout.partition(), x, logical)
    }

    fn context(&self, index: usize) -> LayerContext<'_> {
        let cx = LayerContext::new(self.arch, index, self.dtype, self.layout.partition());
        LayerContext { called: self.called, ..cx }
    }

    /// The slots of the layer at `index`, with their parameters' names without `layers.N.`.
    fn layer_slots(&self, index: usize) -> Vec<(String, Value)> {
        let of_layer = |s: &&Slot| s.spec().layer == Some(index);
        let named = |s: &Slot| role(s.spec()).map(|r| (r.to_owned(), self.weights.stored(&s.name)));
        self.layout.slots().iter().filter(of_layer).filter_map(named).collect()
    }

    /// The layer's parameters from these values of its slots, or parts of them.
    fn layer_weights(&self, index: usize, named: Vec<(String, Value)>) -> LayerWeights {
        let of_layer = |s: &&Slot| s.spec().layer == Some(index);
        let spreads = |s: &Slot| Some((role(s.spec())?.to_owned(), spread(self.layout, s)?));
        LayerWeights::new(named).spread(self.layout.slots().iter().filter(of_layer).filter_map(spreads).collect())
    }

    fn layer(&self, index: usize, state: &mut State) -> Result<()> {
        let g = self.g;
        let _scope = g.scope(&format!("layers.{index}"));
        let cx = self.context(index);
        let ple = state.ple.map(|ple| of_layer(g, ple, index));
        let borrowed = match cx.layer.kv {
            KvSource::Shared { donor } => Some(state.key_values[&donor]),
            KvSource::Own => None,
        };
        let angles = state.angles.get(cx.layer.kind);
        let input =
            LayerInput { x: state.x, ple: ple.transpose()?, borrowed, angles, segments: state.segments, at: None };
        let weights = self.layer_weights(index, self.layer_slots(index));
        let (hidden, kv, outputs) = self.rematerialised(g, &cx, &input, &weights)?;
        state.x = hidden;
        state.outputs.extend(outputs);
        if let Some(kv) = kv {
            state.key_values.insert(index, kv);
        }
        Ok(())
    }

    /// The layer, of which a gradient keeps what was asked for.
    fn rematerialised(
        &self,
        g: &Graph,
        cx: &LayerContext<'_>,
        input: &LayerInput,
        weights: &LayerWeights,
    ) -> Result<(Value, Option<KeyValues>, Option<LayerOutputs>)> {
        let LayerRemat::Keep(names) = &self.remat else {
            let out = layer(g, cx, input, weights)?;
            return Ok((out.hidden, out.kv, Some(out)));
        };
        let values: Vec<Value> = input.values().into_iter().chain(weights.values()).collect();
        let out = g.remat_keeping(&values, names, |g, v| {
            let (input, rest) = input.with(v);
            let out = layer(g, cx, &input, &weights.with(rest))?;
            Ok([out.hidden].into_iter().chain(out.kv.into_iter().flat_map(|kv| [kv.keys, kv.values])).collect())
        })?;
        let kv = (out.len() == 3).then(|| KeyValues { keys: out[1], values: out[2] });
        Ok((out[0], kv, None))
    }

    /// A loop over repetitions of the pattern, and within it a loop over each stretch of like layers. Keys and values of donors,
    /// which are the last of their stretch in the last repetition, come out of the carry; those that layers borrow go in as
    /// invariants.
    fn looped(&self, start: usize, groups: usize, period: usize, state: &mut State) -> Result<()> {
        let g = self.g;
        let _scope = g.scope(&format!("layers.{start}-{}", start + groups * period - 1));
        let dims = g.dims(state.x);
        let (b, t) = (dims[0], dims[1]);

        let mut carry = vec![state.x];
        let mut bodies = Vec::new();
        let mut donors = Vec::new();
        for Stretch { first, length } in stretches(self.arch, start, period) {
            let cx = self.context(first);
            let last = first + (groups - 1) * period + length - 1;
            let lends = self.arch.is_donor(last);
            if lends {
                let nothing = g.splat(self.dtype, [b, cx.layer.kv_heads, t, cx.layer.head_dim], 0.0)?;
                let nothing = self.constrain(nothing, &[axis::KV_BATCH, axis::KV_HEADS, axis::LENGTH, axis::WHOLE])?;
                carry.extend([nothing, nothing]);
                donors.push(last);
            }
            bodies.push(Body { first, length, cx, lends, slots: self.layer_slots(first) });
        }
        let mut consts = Vec::new();
        for kind in [LayerKind::Sliding, LayerKind::Full] {
            let Angles { cos, sin } = state.angles.get(kind);
            consts.extend([cos, sin]);
        }
        consts.extend(state.segments);
        let mut borrowed: Vec<usize> = bodies.iter().filter_map(|body| body.donor()).collect();
        borrowed.sort_unstable();
        borrowed.dedup();
        for donor in &borrowed {
            let KeyValues { keys, values } = state.key_values[donor];
            consts.extend([keys, values]);
        }
        let mut xs = Vec::new();
        for body in &bodies {
            for &(_, v) in &body.slots {
                // [groups * length, ..] -> [groups, length, ..]
                let split = [&[groups, body.length], &g.dims(v)[1..]].concat();
                xs.push(if body.length > 1 { g.reshape(v, split)? } else { v });
            }
        }
        if let Some(ple) = state.ple {
            // [b, t, l, p] -> [groups, period, b, t, p]
            let p = g.dims(ple)[3];
            let part = g.slice_dim(ple, 2, start, start + groups * period)?;
            let part = g.transpose(g.reshape(part, [b, t, groups, period, p])?, &[2, 3, 0, 1, 4])?;
            let part = self.constrain(part, &[axis::WHOLE, axis::WHOLE, axis::BATCH, axis::LENGTH, axis::WHOLE])?;
            xs.push(part);
        }
        let segmented = state.segments.is_some();
        let (out, _) = g.scan(groups, &carry, &xs, &consts, |g, c, x, k| {
            let lent = &k[4 + usize::from(segmented)..];
            let mut next = vec![c[0]];
            let (mut weights, mut kept) = (x, &c[1..]);
            for body in &bodies {
                let (own, rest) = weights.split_at(body.slots.len());
                weights = rest;
                let at = body.first - start;
                let ple = match state.ple.and(x.last()) {
                    Some(&ple) => Some(g.slice_dim(ple, 0, at, at + body.length)?),
                    None => None,
                };
                let angles = if body.cx.layer.kind == LayerKind::Sliding { &k[..2] } else { &k[2..4] };
                let from = body.donor().and_then(|donor| borrowed.iter().position(|&d| d == donor));
                let shared = Shared {
                    angles: Angles { cos: angles[0], sin: angles[1] },
                    segments: segmented.then(|| k[4]),
                    borrowed: from.map(|i| KeyValues { keys: lent[2 * i], values: lent[2 * i + 1] }),
                };
                let (before, rest) = kept.split_at(if body.lends { 2 } else { 0 });
                kept = rest;
                let after = self.stretch(g, body, next[0], before, own, ple, shared)?;
                next[0] = after[0];
                next.extend(&after[1..]);
            }
            Ok((next, vec![]))
        })?;
        state.x = out[0];
        for (i, &index) in donors.iter().enumerate() {
            state.key_values.insert(index, KeyValues { keys: out[1 + 2 * i], values: out[2 + 2 * i] });
        }
        Ok(())
    }

    /// One repetition of a stretch: its hidden state, then keys and values where it lends them. `own` are its parameters, `ple` its
    /// per-layer inputs `[length, b, t, p]`, `before` the keys and values of the repetition before.
    #[expect(clippy::too_many_arguments, reason = "what a body of a loop is given")]
    fn stretch(
        &self,
        g: &Graph,
        body: &Body<'_>,
        x: Value,
        before: &[Value],
        own: &[Value],
        ple: Option<Value>,
        shared: Shared,
    ) -> Result<Vec<Value>> {
        // One layer: `w` its parameters, `ple` `[b, t, p]`.
        let one = |g: &Graph, x: Value, w: &[Value], ple: Option<Value>, shared: Shared| -> Result<Vec<Value>> {
            let named = body.slots.iter().zip(w).map(|((name, _), &v)| (name.clone(), v)).collect();
            let Shared { angles, segments, borrowed } = shared;
            let input = LayerInput { x, ple, borrowed, angles, segments, at: None };
            let (next, kv, _) = self.rematerialised(g, &body.cx, &input, &self.layer_weights(body.first, named))?;
            let lent = kv.filter(|_| body.lends).into_iter().flat_map(|kv| [kv.keys, kv.values]);
            Ok([next].into_iter().chain(lent).collect())
        };
        if body.length == 1 {
            let ple = match ple {
                Some(ple) => Some(g.reshape(ple, g.dims(ple)[1..].to_vec())?),
                None => None,
            };
            return one(g, x, own, ple, shared);
        }
        let carry: Vec<Value> = [x].iter().chain(before).copied().collect();
        let xs: Vec<Value> = own.iter().copied().chain(ple).collect();
        let (out, _) = g.scan(body.length, &carry, &xs, &shared.values(), |g, c, x, k| {
            let (w, ple) = x.split_at(own.len());
            Ok((one(g, c[0], w, ple.first().copied(), shared.with(k))?, vec![]))
        })?;
        Ok(out)
    }
}

/// A stretch of like layers as a loop's body has it.
struct Body<'a> {
    first: usize,
    length: usize,
    cx: LayerContext<'a>,
    /// Whether its last layer of the last repetition is a donor.
    lends: bool,
    slots: Vec<(String, Value)>,
}

impl Body<'_> {
    /// Whose keys and values its layers borrow.
    fn donor(&self) -> Option<usize> {
        match self.cx.layer.kv {
            KvSource::Shared { donor } => Some(donor),
            KvSource::Own => None,
        }
    }
}

/// What the layers of a stretch have in common.
#[derive(Clone, Copy)]
struct Shared {
    angles: Angles,
    segments: Option<Value>,
    borrowed: Option<KeyValues>,
}

impl Shared {
    fn values(&self) -> Vec<Value> {
        let borrowed = self.borrowed.into_iter().flat_map(|kv| [kv.keys, kv.values]);
        [self.angles.cos, self.angles.sin].into_iter().chain(self.segments).chain(borrowed).collect()
    }

    /// The same with these values.
    fn with(&self, v: &[Value]) -> Self {
        let rest = &v[2 + usize::from(self.segments.is_some())..];
        Shared {
            angles: Angles { cos: v[0], sin: v[1] },
            segments: self.segments.map(|_| v[2]),
            borrowed: self.borrowed.map(|_| KeyValues { keys: rest[0], values: rest[1] }),
        }
    }
}
