//! One decoder layer as a function of explicit inputs, so that it can stand alone, be computed again for a gradient, or be
//! the body of a loop.

use graph::{Graph, Value};
use tensor::DType;

use crate::arch::{Arch, KvSource, Layer};
use crate::attention::{AttentionTrace, KeyPositions, KeyValues, Sequence, attend, own_key_values};
use crate::called;
use crate::nn::{Angles, Result, gated_gelu, project, rms_norm};
use crate::partition::{Partition, Spread, constrain, gather, names as axis};

/// Names that values of a layer go by in MaxText, for policies that choose what a gradient keeps.
pub mod names {
    /// The layer's input.
    pub const DECODER_LAYER_INPUT: &str = "decoder_layer_input";
    /// Queries, before their norm.
    pub const QUERY_PROJ: &str = "query_proj";
    /// Keys, before their norm.
    pub const KEY_PROJ: &str = "key_proj";
    /// Values, before their norm.
    pub const VALUE_PROJ: &str = "value_proj";
    /// What attention gives, before the output projection.
    pub const CONTEXT: &str = "context";
    /// The output projection.
    pub const OUT_PROJ: &str = "out_proj";
    /// The gate projection.
    pub const MLPWI_0: &str = "mlpwi_0";
    /// The up projection.
    pub const MLPWI_1: &str = "mlpwi_1";
    /// The down projection.
    pub const MLPWO: &str = "mlpwo";
}

/// What a layer is built for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LayerContext<'a> {
    pub(crate) layer: Layer,
    pub(crate) heads: usize,
    pub(crate) window: usize,
    pub(crate) eps: f64,
    pub(crate) dtype: DType,
    pub(crate) partition: Option<&'a Partition>,
    /// See [`crate::loss::LossOptions::called`].
    pub(crate) called: bool,
}

impl<'a> LayerContext<'a> {
    /// The layer at `index`.
    pub(crate) fn new(arch: &Arch, index: usize, dtype: DType, partition: Option<&'a Partition>) -> Self {
        let spec = arch.spec();
        LayerContext {
            layer: arch.layers()[index],
            heads: spec.num_heads,
            window: spec.sliding_window,
            eps: spec.rms_norm_eps,
            dtype,
            partition,
            called: false,
        }
    }
}

/// What a layer reads besides its weights.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LayerInput {
    /// `[b, t, d]`.
    pub(crate) x: Value,
    /// `[b, t, p]`: the layer's slice of the per-layer inputs.
    pub(crate) ple: Option<Value>,
    /// Of the donor, where the layer has none of its own.
    pub(crate) borrowed: Option<KeyValues>,
    /// Of the layer's kind.
    pub(crate) angles: Angles,
    /// `[b, t]` i32.
    pub(crate) segments: Option<Value>,
    /// Where queries and borrowed keys stand, where that is not 0, 1, 2, ...; not for programs that are differentiated.
    pub(crate) at: Option<KeyPositions>,
}

impl LayerInput {
    /// Every value, in a fixed order.
    pub(crate) fn values(&self) -> Vec<Value> {
        let LayerInput { x, ple, borrowed, angles: Angles { cos, sin }, segments, at: _ } = *self;
        let kv = borrowed.map(|kv| [kv.keys, kv.values]);
        [x, cos, sin].into_iter().chain(ple).chain(kv.into_iter().flatten()).chain(segments).collect()
    }

    /// The same input with other values, in the order of [`LayerInput::values`]; what is left of them comes back.
    pub(crate) fn with<'v>(&self, values: &'v [Value]) -> (Self, &'v [Value]) {
        let mut rest = values.iter().copied();
        let mut next = |was: Value| rest.next().unwrap_or(was);
        let x = next(self.x);
        let angles = Angles { cos: next(self.angles.cos), sin: next(self.angles.sin) };
        let ple = self.ple.map(&mut next);
        let borrowed = self.borrowed.map(|kv| KeyValues { keys: next(kv.keys), values: next(kv.values) });
        let segments = self.segments.map(&mut next);
        let used = self.values().len().min(values.len());
        (LayerInput { x, ple, borrowed, angles, segments, at: self.at }, &values[used..])
    }
}

/// A parameter of a layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Weight {
    /// A value of the program.
    Value(Value),
    /// A matrix outside the program, with which a function of the runtime multiplies.
    Called {
        /// Its number there.
        index: usize,
        /// Its rows: the width of what the product gives.
        rows: usize,
    },
}

/// Parameters of one layer by their name without `layers.N.`.
#[derive(Debug, Clone)]
pub(crate) struct LayerWeights {
    named: Vec<(String, Weight)>,
    /// Whose matrices are called, i64 `[1]`.
    session: Option<Value>,
    /// How they lie on a mesh.
    spreads: Vec<(String, Spread)>,
}

impl LayerWeights {
    pub(crate) fn new(weights: Vec<(String, Value)>) -> Self {
        let named = weights.into_iter().map(|(name, v)| (name, Weight::Value(v))).collect();
        LayerWeights { named, session: None, spreads: Vec::new() }
    }

    /// The same on a mesh.
    pub(crate) fn spread(self, spreads: Vec<(String, Spread)>) -> Self {
        LayerWeights { spreads, ..self }
    }

    /// Parameters of which some are outside the program.
    pub(crate) fn with_calls(named: Vec<(String, Weight)>, session: Option<Value>) -> Self {
        LayerWeights { named, session, spreads: Vec::new() }
    }

    /// Every value, in a fixed order.
    pub(crate) fn values(&self) -> impl Iterator<Item = Value> + '_ {
        self.named.iter().filter_map(|&(_, w)| match w {
            Weight::Value(v) => Some(v),
            Weight::Called { .. } => None,
        })
    }

    /// The same names with other values.
    pub(crate) fn with(&self, values: &[Value]) -> Self {
        let mut values = values.iter();
        let mut swapped = |w: Weight| match w {
            Weight::Value(was) => Weight::Value(values.next().copied().unwrap_or(was)),
            called @ Weight::Called { .. } => called,
        };
        let named = self.named.iter().map(|(name, w)| (name.clone(), swapped(*w))).collect();
        LayerWeights { named, session: self.session, spreads: self.spreads.clone() }
    }

    fn weight(&self, name: &str) -> Weight {
        match self.named.iter().find(|(n, _)| n == name) {
            Some(&(_, w)) => w,
            None => unreachable!("{name} is not a parameter of this layer"),
        }
    }

    /// The parameter as it is. Names asked for are those of the table that the list was made from.
    pub(crate) fn get(&self, name: &str) -> Value {
        match self.weight(name) {
            Weight::Value(v) => v,
            Weight::Called { .. } => unreachable!("{name} is only multiplied by"),
        }
    }

    /// Number and rows of a matrix outside of the program.
    pub(crate) fn called(&self, name: &str) -> (usize, usize) {
        match self.weight(name) {
            Weight::Called { index, rows } => (index, rows),
            Weight::Value(_) => unreachable!("{name} is a value of this program"),
        }
    }

    /// `x` `[.., k]` times the transposes of some matrices, in `dtype`; one call where the matrices are outside.
    pub(crate) fn products<const N: usize>(
        &self,
        g: &Graph,
        x: Value,
        names: [&str; N],
        dtype: DType,
    ) -> Result<[Value; N]> {
        let mut weights = names.map(|n| self.weight(n));
        for (name, weight) in names.iter().zip(&mut weights) {
            let spread = self.spreads.iter().find(|(n, _)| n == name);
            // Rounded first: what travels is narrow.
            if let (Weight::Value(w), Some((_, spread))) = (&weight, spread) {
                *weight = Weight::Value(gather(g, g.convert(*w, dtype)?, spread)?);
            }
        }
        products(g, self.session, x, weights, dtype)
    }
}

/// See [`LayerWeights::products`].
pub(crate) fn products<const N: usize>(
    g: &Graph,
    session: Option<Value>,
    x: Value,
    weights: [Weight; N],
    dtype: DType,
) -> Result<[Value; N]> {
    let mut out = [x; N];
    let dims = g.dims(x);
    let (&k, outer) = dims.split_last().unwrap_or((&1, &[]));
    let m = outer.iter().product();
    let (mut places, mut wanted) = (Vec::new(), Vec::new());
    for (i, w) in weights.into_iter().enumerate() {
        match w {
            Weight::Value(w) => out[i] = project(g, x, g.convert(w, dtype)?, dtype)?,
            Weight::Called { index, rows } => {
                places.push(i);
                wanted.push((index, rows, dtype));
            }
        }
    }
    if let (Some(session), false) = (session, wanted.is_empty()) {
        let flat = g.reshape(x, [m, k])?;
        for ((i, &(_, n, _)), y) in places.into_iter().zip(&wanted).zip(called::products(g, session, flat, &wanted)?) {
            out[i] = g.reshape(y, [outer, &[n]].concat())?;
        }
    }
    Ok(out)
}

/// What a layer computed that someone may ask for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LayerOutputs {
    pub(crate) hidden: Value,
    /// Of a layer that owns keys and values.
    pub(crate) kv: Option<KeyValues>,
    pub(crate) attention: AttentionTrace,
    pub(crate) attn: Value,
    pub(crate) mlp: Value,
}

pub(crate) fn layer(g: &Graph, cx: &LayerContext<'_>, input: &LayerInput, w: &LayerWeights) -> Result<LayerOutputs> {
    let LayerContext { layer, dtype, eps, window, heads, partition, called } = *cx;
    let seq = Sequence { segments: input.segments, at: input.at, eps, window, heads, dtype, partition, called };
    let residual = |x: Value| constrain(g, partition, x, &[axis::BATCH, axis::NORM_LENGTH, axis::EMBED]);
    let inner = |x: Value| constrain(g, partition, x, &[axis::BATCH, axis::LENGTH, axis::MLP]);
    let norm = |x: Value, s: &str| rms_norm(g, x, Some(w.get(s)), eps, called);

    let x = g.named(input.x, names::DECODER_LAYER_INPUT)?;
    let a = norm(x, "input_layernorm.weight")?;
    let own = match layer.kv {
        KvSource::Shared { .. } => None,
        KvSource::Own => Some(own(g, cx, a, w, &input.angles)?),
    };
    let kv = match (own, input.borrowed) {
        (Some((kv, _)), _) | (None, Some(kv)) => kv,
        (None, None) => unreachable!("a borrowing layer is given its donor's keys and values"),
    };
    let [q_raw] = w.products(g, a, ["self_attn.q_proj.weight"], dtype)?;
    let (context, q) = attend(g, &layer, q_raw, w.get("self_attn.q_norm.weight"), kv, &input.angles, &seq)?;
    let [attn] = w.products(g, context, ["self_attn.o_proj.weight"], dtype)?;
    let attn = g.named(residual(attn)?, names::OUT_PROJ)?;
    let x = residual(g.add(x, norm(attn, "post_attention_layernorm.weight")?)?)?;

    let h = norm(x, "pre_feedforward_layernorm.weight")?;
    let [gate, up] = w.products(g, h, ["mlp.gate_proj.weight", "mlp.up_proj.weight"], dtype)?;
    let (gate, up) = (g.named(inner(gate)?, names::MLPWI_0)?, g.named(inner(up)?, names::MLPWI_1)?);
    let [mlp] = w.products(g, gated_gelu(g, gate, up, called)?, ["mlp.down_proj.weight"], dtype)?;
    let mlp = g.named(residual(mlp)?, names::MLPWO)?;
    let mut x = residual(g.add(x, norm(mlp, "post_feedforward_layernorm.weight")?)?)?;

    if let Some(ple) = input.ple {
        // The gate reads the residual stream un-normed.
        let [gate] = w.products(g, x, ["per_layer_input_gate.weight"], dtype)?;
        let [y] = w.products(g, gated_gelu(g, gate, ple, called)?, ["per_layer_projection.weight"], dtype)?;
        x = residual(g.add(x, norm(residual(y)?, "post_per_layer_input_norm.weight")?)?)?;
    }
    // The whole residual stream, after everything.
    let hidden = residual(g.mul_bcast(x, g.convert(w.get("layer_scalar"), dtype)?)?)?;
    let trace = AttentionTrace { q, kv: own.map(|(_, trace)| trace) };
    Ok(LayerOutputs { hidden, kv: own.map(|(kv, _)| kv), attention: trace, attn, mlp })
}

/// The layer's own keys and values of `a` `[b, t, d]`, its normed input, and their unrotated forms.
pub(crate) fn own(
    g: &Graph,
    cx: &LayerContext<'_>,
    a: Value,
    w: &LayerWeights,
    angles: &Angles,
) -> Result<(KeyValues, (Value, Value))> {
    let (k, v) = ("self_attn.k_proj.weight", "self_attn.v_proj.weight");
    let raw = if cx.layer.k_eq_v {
        let [k] = w.products(g, a, [k], cx.dtype)?;
        (k, None)
    } else {
        let [k, v] = w.products(g, a, [k, v], cx.dtype)?;
        (k, Some(v))
    };
    own_key_values(g, &cx.layer, raw, w.get("self_attn.k_norm.weight"), angles, (cx.eps, cx.partition, cx.called))
}
