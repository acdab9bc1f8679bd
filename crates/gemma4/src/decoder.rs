//! The forward pass, on weights in Hugging Face's own `[out, in]` layout.
//!
//! Sharing is a value: each donor's keys and values are handed to the layers that borrow them. No cache object is
//! involved, nothing can switch it off.

use std::collections::HashMap;

use graph::{Graph, GraphError, Program, Value};
use tensor::{DType, ParamSpec};

use crate::arch::{KvSource, Layer, LayerKind, PerKind};
use crate::attention::{AttentionTrace, AttentionWeights, KeyValues, OwnWeights, Sequence, attend, own_key_values};
use crate::nn::{Angles, Result, gelu_tanh, project, rms_norm, scale_f32, wide};
use crate::params::{EMBED_TOKENS, EMBED_TOKENS_PER_LAYER, param_table};
use crate::{Arch, PerLayerInput};

/// What a forward program is built for.
#[derive(Debug, Clone, PartialEq)]
pub struct ForwardOptions {
    /// Sequences.
    pub batch: usize,
    /// Positions of each.
    pub seq: usize,
    /// Activation dtype: `F32` to prove, `BF16` for speed; `F64` does the arithmetic of an f32 model without its rounding.
    pub dtype: DType,
    /// Whether the program takes `segment_ids`: positions of different segments do not see each other.
    pub segments: bool,
    /// Whether the program takes `positions` (else 0, 1, 2, ... in every row).
    pub positions: bool,
    /// What it gives besides the final hidden state.
    pub trace: Trace,
}

/// Intermediate values a forward program gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Trace {
    /// None.
    None,
    /// The embedding, per-layer inputs and the output of every layer.
    Layers,
    /// Those, and queries, keys, values, attention and MLP outputs of every layer.
    Parts,
}

/// Names of program inputs that are not parameters.
pub mod input {
    /// Token ids, `[b, t]` i32.
    pub const IDS: &str = "input_ids";
    /// Rows of the per-layer table for every token, `[b, t, l * p]`, in the dtype they are stored in.
    pub const PLE_ROWS: &str = "per_layer_rows";
    /// Segments, `[b, t]` i32; 0 is padding by convention.
    pub const SEGMENTS: &str = "segment_ids";
    /// Positions, `[b, t]` i32.
    pub const POSITIONS: &str = "positions";
    /// Final hidden states, `[n, d]`, of the head program.
    pub const HIDDEN: &str = "hidden";
}

/// Name of the output that holds the final hidden state, `[b, t, d]`, after the last norm.
pub const FINAL: &str = "hidden.final";
/// Name of the output that holds logits, `[n, v]` f32.
pub const LOGITS: &str = "logits";

/// Builds the program from token ids to the final hidden state.
///
/// Inputs, in order: `input_ids`, `per_layer_rows` (with per-layer embeddings), `segment_ids` and `positions` (if asked for),
/// then every parameter of [`body_params`], each in the dtype that `stored` gives for it.
///
/// # Errors
/// When a dtype in `stored` is not a float.
pub fn forward_program(
    arch: &Arch,
    options: &ForwardOptions,
    stored: &dyn Fn(&str) -> DType,
) -> std::result::Result<Program, GraphError> {
    let g = Graph::new("forward");
    let (b, t) = (options.batch, options.seq);
    let ids = g.input(input::IDS, DType::I32, [b, t])?;
    let rows = match arch.per_layer_input() {
        Some(p) => {
            let dtype = stored(EMBED_TOKENS_PER_LAYER);
            Some(g.input(input::PLE_ROWS, dtype, [b, t, arch.layers().len() * p.width])?)
        }
        None => None,
    };
    let segments = if options.segments { Some(g.input(input::SEGMENTS, DType::I32, [b, t])?) } else { None };
    let positions = match options.positions {
        true => g.input(input::POSITIONS, DType::I32, [b, t])?,
        false => g.iota(DType::I32, [b, t], 1)?,
    };
    let weights = Weights::inputs(&g, body_params(arch), stored)?;
    let decoder = Decoder { g: &g, arch, weights: &weights, dtype: options.dtype };
    let out = decoder.run(ids, rows, segments, positions)?;
    out.emit(&g, options.trace)?;
    g.finish()
}

/// Builds the program from final hidden states `[n, d]` (activation dtype) to f32 logits `[n, v]`, soft cap included.
///
/// Inputs: `hidden`, then the token table.
///
/// # Errors
/// When the dtype of the table is not a float.
pub fn head_program(
    arch: &Arch,
    n: usize,
    dtype: DType,
    stored: &dyn Fn(&str) -> DType,
) -> std::result::Result<Program, GraphError> {
    let g = Graph::new("head");
    let x = g.input(input::HIDDEN, dtype, [n, arch.hidden_size()])?;
    let weights = Weights::inputs(&g, param_table(arch).into_iter().filter(|p| p.name == EMBED_TOKENS), stored)?;
    let z = head(&g, arch, x, weights.cast(&g, EMBED_TOKENS, dtype)?)?;
    g.output(LOGITS, g.convert(z, DType::F32)?)?;
    g.finish()
}

/// The parameters a forward program takes, in order: all but the per-layer table, whose rows are gathered on the host.
pub fn body_params(arch: &Arch) -> impl Iterator<Item = ParamSpec> {
    param_table(arch).into_iter().filter(|p| p.name != EMBED_TOKENS_PER_LAYER)
}

/// Tied head and soft cap: the cap runs in the activation dtype.
fn head(g: &Graph, arch: &Arch, x: Value, table: Value) -> Result<Value> {
    let dtype = g.dtype(x);
    let z = project(g, x, table, dtype)?;
    match arch.spec().final_logit_softcapping {
        // HF divides, takes tanh and multiplies, each rounded to the activation dtype.
        Some(cap) => {
            let z_wide = g.convert(z, wide(dtype))?;
            let ratio = g.convert(g.div(z_wide, g.full_like(z_wide, cap)?)?, dtype)?;
            scale_f32(g, g.tanh(ratio)?, cap)
        }
        None => Ok(z),
    }
}

/// Parameters as values of a graph, by Hugging Face name.
#[derive(Debug)]
struct Weights(HashMap<String, Value>);

impl Weights {
    fn inputs(g: &Graph, params: impl Iterator<Item = ParamSpec>, stored: &dyn Fn(&str) -> DType) -> Result<Self> {
        params
            .map(|p| {
                let v = g.input(&p.name, stored(&p.name), p.shape)?;
                Ok((p.name, v))
            })
            .collect::<Result<_>>()
            .map(Weights)
    }

    /// The parameter as stored. The names asked for are those of the table that the map was made from.
    fn stored(&self, name: &str) -> Value {
        self.0[name]
    }

    /// The parameter in the activation dtype.
    fn cast(&self, g: &Graph, name: &str, dtype: DType) -> Result<Value> {
        g.convert(self.stored(name), dtype)
    }
}

/// What the layers share while the program is built.
struct State {
    ple: Option<Value>,
    seq: Sequence,
    angles: PerKind<Angles>,
    /// Of every own layer so far.
    key_values: HashMap<usize, KeyValues>,
}

struct Decoder<'a> {
    g: &'a Graph,
    arch: &'a Arch,
    weights: &'a Weights,
    dtype: DType,
}

/// Everything a forward pass computed that someone may ask for.
struct Outputs {
    embed: Value,
    ple: Option<Value>,
    layers: Vec<LayerOutputs>,
    last: Value,
}

struct LayerOutputs {
    hidden: Value,
    attention: AttentionTrace,
    attn: Value,
    mlp: Value,
}

impl Outputs {
    fn emit(&self, g: &Graph, trace: Trace) -> Result<()> {
        g.output(FINAL, self.last)?;
        if trace == Trace::None {
            return Ok(());
        }
        g.output("hidden.embed", self.embed)?;
        if let Some(ple) = self.ple {
            g.output("ple", ple)?;
        }
        for (i, layer) in self.layers.iter().enumerate() {
            g.output(&format!("hidden.{i}"), layer.hidden)?;
            if trace == Trace::Parts {
                g.output(&format!("trace.{i}.q"), layer.attention.q)?;
                if let Some((k, v)) = layer.attention.kv {
                    g.output(&format!("trace.{i}.k"), k)?;
                    g.output(&format!("trace.{i}.v"), v)?;
                }
                g.output(&format!("trace.{i}.attn"), layer.attn)?;
                g.output(&format!("trace.{i}.mlp"), layer.mlp)?;
            }
        }
        Ok(())
    }
}

impl Decoder<'_> {
    fn run(&self, ids: Value, rows: Option<Value>, segments: Option<Value>, positions: Value) -> Result<Outputs> {
        let g = self.g;
        let spec = self.arch.spec();
        let embed = {
            let _scope = g.scope("embed");
            let rows_btd = g.convert(g.take(self.weights.stored(EMBED_TOKENS), ids)?, self.dtype)?;
            // sqrt(hidden) is rounded to the activation dtype before the product: 39.25 for E2B in bf16.
            // The reference's f32 model has the f32 root, also where the arithmetic is f64.
            g.mul_scalar(rows_btd, f64::from((spec.hidden_size as f32).sqrt()))?
        };
        let ple = match (self.arch.per_layer_input(), rows) {
            (Some(p), Some(rows)) => Some(self.per_layer_inputs(p, embed, rows)?),
            _ => None,
        };
        let angles = |kind| Angles::new(g, positions, spec.rope.get(kind), spec.head_dim.get(kind), self.dtype);
        let mut state = State {
            ple,
            seq: Sequence {
                segments,
                eps: spec.rms_norm_eps,
                window: spec.sliding_window,
                heads: spec.num_heads,
                dtype: self.dtype,
            },
            angles: PerKind { sliding: angles(LayerKind::Sliding)?, full: angles(LayerKind::Full)? },
            key_values: HashMap::new(),
        };
        let mut x = embed;
        let mut layers = Vec::with_capacity(self.arch.layers().len());
        for (index, layer) in self.arch.layers().iter().enumerate() {
            let _scope = g.scope(&format!("layers.{index}"));
            let out = self.layer(index, layer, x, &mut state)?;
            x = out.hidden;
            layers.push(out);
        }
        let last = rms_norm(g, x, Some(self.weights.stored("norm.weight")), spec.rms_norm_eps)?;
        Ok(Outputs { embed, ple, layers, last })
    }

    /// `[b, t, l, p]`: what every layer gets to know of the token and its embedding, computed once.
    fn per_layer_inputs(&self, p: PerLayerInput, x: Value, rows: Value) -> Result<Value> {
        let g = self.g;
        let _scope = g.scope("per_layer_inputs");
        let d = g.dims(x);
        let shape = [d[0], d[1], self.arch.layers().len(), p.width];
        let tok = g.mul_scalar(g.convert(rows, self.dtype)?, f64::from((p.width as f32).sqrt()))?;
        let projection = self.weights.cast(g, "per_layer_model_projection.weight", self.dtype)?;
        let ctx = scale_f32(g, project(g, x, projection, self.dtype)?, (d[2] as f64).powf(-0.5))?;
        let norm = self.weights.stored("per_layer_projection_norm.weight");
        let ctx = rms_norm(g, g.reshape(ctx, shape)?, Some(norm), self.arch.spec().rms_norm_eps)?;
        scale_f32(g, g.add(ctx, g.reshape(tok, shape)?)?, 0.5f64.sqrt())
    }

    fn layer(&self, index: usize, layer: &Layer, x: Value, state: &mut State) -> Result<LayerOutputs> {
        let g = self.g;
        let State { ple, seq, .. } = *state;
        let angles = state.angles.get(layer.kind);
        let name = |s: &str| format!("layers.{index}.{s}");
        let norm = |x: Value, s: &str| rms_norm(g, x, Some(self.weights.stored(&name(s))), seq.eps);
        let matrix = |s: &str| self.weights.cast(g, &name(s), self.dtype);

        let a = norm(x, "input_layernorm.weight")?;
        let weights = AttentionWeights {
            q_proj: matrix("self_attn.q_proj.weight")?,
            q_norm: self.weights.stored(&name("self_attn.q_norm.weight")),
            o_proj: matrix("self_attn.o_proj.weight")?,
            own: match layer.kv {
                KvSource::Shared { .. } => None,
                KvSource::Own => Some(OwnWeights {
                    k_proj: matrix("self_attn.k_proj.weight")?,
                    k_norm: self.weights.stored(&name("self_attn.k_norm.weight")),
                    v_proj: if layer.k_eq_v { None } else { Some(matrix("self_attn.v_proj.weight")?) },
                }),
            },
        };
        let (kv, own_trace) = match (layer.kv, &weights.own) {
            (KvSource::Shared { donor }, _) => (state.key_values[&donor], None),
            (KvSource::Own, own) => {
                let own = own.as_ref().expect("set above for layers that own keys and values");
                let (kv, trace) = own_key_values(g, layer, a, own, &angles, &seq)?;
                state.key_values.insert(index, kv);
                (kv, Some(trace))
            }
        };
        let (attn, q) = attend(g, layer, a, &weights, kv, &angles, &seq)?;
        let x = g.add(x, norm(attn, "post_attention_layernorm.weight")?)?;

        let h = norm(x, "pre_feedforward_layernorm.weight")?;
        let gate = gelu_tanh(g, project(g, h, matrix("mlp.gate_proj.weight")?, self.dtype)?)?;
        let up = project(g, h, matrix("mlp.up_proj.weight")?, self.dtype)?;
        let mlp = project(g, g.mul(gate, up)?, matrix("mlp.down_proj.weight")?, self.dtype)?;
        let mut x = g.add(x, norm(mlp, "post_feedforward_layernorm.weight")?)?;

        if let Some(ple) = ple {
            let d = g.dims(ple);
            let slice = g.reshape(g.slice_dim(ple, 2, index, index + 1)?, [d[0], d[1], d[3]])?;
            // The gate reads the residual stream un-normed.
            let gate = gelu_tanh(g, project(g, x, matrix("per_layer_input_gate.weight")?, self.dtype)?)?;
            let y = project(g, g.mul(gate, slice)?, matrix("per_layer_projection.weight")?, self.dtype)?;
            x = g.add(x, norm(y, "post_per_layer_input_norm.weight")?)?;
        }
        // The whole residual stream, after everything.
        let hidden = g.mul_bcast(x, matrix("layer_scalar")?)?;
        Ok(LayerOutputs { hidden, attention: AttentionTrace { q, kv: own_trace }, attn, mlp })
    }
}
