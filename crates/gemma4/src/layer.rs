//! One decoder layer as a function of explicit inputs, so that it can stand alone, be computed again for a gradient, or be
//! the body of a loop.

use graph::{Graph, Value};
use tensor::DType;

use crate::arch::{KvSource, Layer};
use crate::attention::{AttentionTrace, AttentionWeights, KeyValues, OwnWeights, Sequence, attend, own_key_values};
use crate::nn::{Angles, Result, gated_gelu, project, rms_norm};

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
pub(crate) struct LayerContext {
    pub(crate) layer: Layer,
    pub(crate) heads: usize,
    pub(crate) window: usize,
    pub(crate) eps: f64,
    pub(crate) dtype: DType,
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
}

impl LayerInput {
    /// Every value, in a fixed order.
    pub(crate) fn values(&self) -> Vec<Value> {
        let LayerInput { x, ple, borrowed, angles: Angles { cos, sin }, segments } = *self;
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
        (LayerInput { x, ple, borrowed, angles, segments }, &values[used..])
    }
}

/// Parameters of one layer by their name without `layers.N.`; matrices in the activation dtype or narrower.
#[derive(Debug, Clone)]
pub(crate) struct LayerWeights(Vec<(String, Value)>);

impl LayerWeights {
    pub(crate) fn new(weights: Vec<(String, Value)>) -> Self {
        LayerWeights(weights)
    }

    /// Every value, in a fixed order.
    pub(crate) fn values(&self) -> impl Iterator<Item = Value> + '_ {
        self.0.iter().map(|&(_, v)| v)
    }

    /// The same names with other values.
    pub(crate) fn with(&self, values: &[Value]) -> Self {
        LayerWeights(self.0.iter().zip(values).map(|((name, _), &v)| (name.clone(), v)).collect())
    }

    /// The parameter as it is. Names asked for are those of the table that the list was made from.
    fn get(&self, name: &str) -> Value {
        match self.0.iter().find(|(n, _)| n == name) {
            Some(&(_, v)) => v,
            None => unreachable!("{name} is not a parameter of this layer"),
        }
    }
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

pub(crate) fn layer(g: &Graph, cx: &LayerContext, input: &LayerInput, w: &LayerWeights) -> Result<LayerOutputs> {
    let LayerContext { layer, dtype, eps, .. } = *cx;
    let seq = Sequence { segments: input.segments, eps, window: cx.window, heads: cx.heads, dtype };
    let norm = |x: Value, s: &str| rms_norm(g, x, Some(w.get(s)), eps);
    let matrix = |s: &str| g.convert(w.get(s), dtype);

    let x = g.named(input.x, names::DECODER_LAYER_INPUT)?;
    let a = norm(x, "input_layernorm.weight")?;
    let own = match layer.kv {
        KvSource::Shared { .. } => None,
        KvSource::Own => Some(OwnWeights {
            k_proj: matrix("self_attn.k_proj.weight")?,
            k_norm: w.get("self_attn.k_norm.weight"),
            v_proj: if layer.k_eq_v { None } else { Some(matrix("self_attn.v_proj.weight")?) },
        }),
    };
    let weights = AttentionWeights {
        q_proj: matrix("self_attn.q_proj.weight")?,
        q_norm: w.get("self_attn.q_norm.weight"),
        o_proj: matrix("self_attn.o_proj.weight")?,
    };
    let own = match &own {
        Some(own) => Some(own_key_values(g, &layer, a, own, &input.angles, &seq)?),
        None => None,
    };
    let kv = match (own, input.borrowed) {
        (Some((kv, _)), _) | (None, Some(kv)) => kv,
        (None, None) => unreachable!("a borrowing layer is given its donor's keys and values"),
    };
    let (attn, q) = attend(g, &layer, a, &weights, kv, &input.angles, &seq)?;
    let x = g.add(x, norm(attn, "post_attention_layernorm.weight")?)?;

    let h = norm(x, "pre_feedforward_layernorm.weight")?;
    let gate = g.named(project(g, h, matrix("mlp.gate_proj.weight")?, dtype)?, names::MLPWI_0)?;
    let up = g.named(project(g, h, matrix("mlp.up_proj.weight")?, dtype)?, names::MLPWI_1)?;
    let inner = gated_gelu(g, gate, up)?;
    let mlp = g.named(project(g, inner, matrix("mlp.down_proj.weight")?, dtype)?, names::MLPWO)?;
    let mut x = g.add(x, norm(mlp, "post_feedforward_layernorm.weight")?)?;

    if let Some(ple) = input.ple {
        // The gate reads the residual stream un-normed.
        let gate = project(g, x, matrix("per_layer_input_gate.weight")?, dtype)?;
        let y = project(g, gated_gelu(g, gate, ple)?, matrix("per_layer_projection.weight")?, dtype)?;
        x = g.add(x, norm(y, "post_per_layer_input_norm.weight")?)?;
    }
    // The whole residual stream, after everything.
    let hidden = g.mul_bcast(x, matrix("layer_scalar")?)?;
    let trace = AttentionTrace { q, kv: own.map(|(_, trace)| trace) };
    Ok(LayerOutputs { hidden, kv: own.map(|(kv, _)| kv), attention: trace, attn, mlp })
}
