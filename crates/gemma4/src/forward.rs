//! Programs that run the model forward: from token ids to the final hidden state, from there to logits.
//!
//! On a mesh, weights lie as the layout says; tokens and results are whole on every device.

use std::collections::HashMap;

use graph::{Graph, GraphError, InputOptions, OutputOptions, Program, Sharding, Value};
use tensor::{DType, ParamSpec};

use crate::Arch;
use crate::decoder::{Decoder, LayerRemat, Outputs, Tokens, Weights, head};
use crate::layout::{Layout, Slot};
use crate::nn::Result;
use crate::params::{EMBED_TOKENS, EMBED_TOKENS_PER_LAYER, param_table};

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

/// The parameters a forward program takes, in order: all but the per-layer table, whose rows are gathered on the host.
pub fn body_params(arch: &Arch) -> impl Iterator<Item = ParamSpec> {
    param_table(arch).into_iter().filter(|p| p.name != EMBED_TOKENS_PER_LAYER)
}

/// How a parameter lies on the mesh of a layout with a slot for every parameter; whole where it has none.
#[must_use]
pub fn sharding_of(layout: &Layout, p: &ParamSpec) -> Sharding {
    let slot = layout.slots().iter().find(|s| s.name == p.name);
    slot.map_or_else(|| Sharding::replicated(p.shape.rank()), Slot::sharding_or_whole)
}

/// Builds the program from token ids to the final hidden state, with layers written out: `layout` is an unrolled one, on any
/// mesh.
///
/// Inputs, in order: `input_ids`, `per_layer_rows` (with per-layer embeddings), `segment_ids` and `positions` (if asked for),
/// then every parameter of [`body_params`], each in the dtype that `stored` gives for it. Sequences and positions that do not
/// divide by the devices that share them are filled up inside: what is added follows everything real, which never looks ahead.
///
/// # Errors
/// When a dtype in `stored` is not a float.
pub fn forward_program(
    arch: &Arch,
    layout: &Layout,
    options: &ForwardOptions,
    stored: &dyn Fn(&str) -> DType,
) -> std::result::Result<Program, GraphError> {
    let g = layout.graph("forward")?;
    let (b, t) = (options.batch, options.seq);
    let full = match layout.partition() {
        Some(p) => Full([b.next_multiple_of(p.batch_parts()), t.next_multiple_of(p.length_parts())], [b, t]),
        None => Full([b, t], [b, t]),
    };
    let field = |name: &str| full.up(&g, g.input(name, DType::I32, [b, t])?);
    let ids = field(input::IDS)?;
    let rows = match arch.per_layer_input() {
        Some(p) => {
            let shape = [b, t, arch.layers().len() * p.width];
            Some(full.up(&g, g.input(input::PLE_ROWS, stored(EMBED_TOKENS_PER_LAYER), shape)?)?)
        }
        None => None,
    };
    let segments = if options.segments { Some(field(input::SEGMENTS)?) } else { None };
    let positions = match options.positions {
        true => field(input::POSITIONS)?,
        false => g.iota(DType::I32, full.0, 1)?,
    };
    let weights = inputs(&g, layout, body_params(arch), stored)?;
    let (dtype, remat) = (options.dtype, LayerRemat::Everything);
    let decoder = Decoder { g: &g, arch, layout, weights: &weights, dtype, remat, called: false };
    let out = decoder.run(&Tokens { ids, rows, segments, positions })?;
    emit(&g, &out, options.trace, &full)?;
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
    layout: &Layout,
    n: usize,
    dtype: DType,
    stored: &dyn Fn(&str) -> DType,
) -> std::result::Result<Program, GraphError> {
    let g = layout.graph("head")?;
    let x = g.input(input::HIDDEN, dtype, [n, arch.hidden_size()])?;
    let table = param_table(arch).into_iter().filter(|p| p.name == EMBED_TOKENS);
    let weights = inputs(&g, layout, table, stored)?;
    let z = head(&g, arch, x, weights.cast(&g, EMBED_TOKENS, dtype)?)?;
    whole(&g, LOGITS, g.convert(z, DType::F32)?)?;
    g.finish()
}

fn inputs(
    g: &Graph,
    layout: &Layout,
    params: impl Iterator<Item = ParamSpec>,
    stored: &dyn Fn(&str) -> DType,
) -> Result<Weights> {
    let input = |p: ParamSpec| {
        let sharding = layout.partition().map(|_| sharding_of(layout, &p));
        let options = InputOptions { sharding, ..InputOptions::default() };
        Ok((p.name.clone(), g.input_with(&p.name, stored(&p.name), p.shape, options)?))
    };
    params.map(input).collect::<Result<HashMap<_, _>>>().map(Weights::new)
}

/// Batch and length as computed, and as asked for.
struct Full([usize; 2], [usize; 2]);

impl Full {
    /// Fills the first two dimensions up with zeros.
    fn up(&self, g: &Graph, x: Value) -> Result<Value> {
        if self.0 == self.1 {
            return Ok(x);
        }
        let rank = g.dims(x).len();
        let none = vec![0i64; rank];
        let mut high = none.clone();
        for (high, (full, asked)) in high.iter_mut().zip(self.0.iter().zip(self.1)) {
            *high = i64::try_from(full - asked).unwrap_or(0);
        }
        g.pad(x, g.scalar(g.dtype(x), 0.0)?, &none, &high, &vec![0; rank])
    }

    /// What was asked for of a result.
    fn down(&self, g: &Graph, x: Value) -> Result<Value> {
        if self.0 == self.1 {
            return Ok(x);
        }
        (0..2).try_fold(x, |x, dim| g.slice_dim(x, dim, 0, self.1[dim]))
    }
}

/// A result that is whole on every device.
fn whole(g: &Graph, name: &str, x: Value) -> Result<()> {
    let sharding = Some(Sharding::replicated(g.dims(x).len()));
    g.output_with(name, x, OutputOptions { sharding, ..OutputOptions::default() })
}

fn emit(g: &Graph, out: &Outputs, trace: Trace, full: &Full) -> Result<()> {
    let output = |name: &str, x: Value| whole(g, name, full.down(g, x)?);
    output(FINAL, out.last)?;
    if trace == Trace::None {
        return Ok(());
    }
    output("hidden.embed", out.embed)?;
    if let Some(ple) = out.ple {
        output("ple", ple)?;
    }
    for (i, layer) in out.layers.iter().enumerate() {
        output(&format!("hidden.{i}"), layer.hidden)?;
        if trace == Trace::Parts {
            output(&format!("trace.{i}.q"), layer.attention.q)?;
            if let Some((k, v)) = layer.attention.kv {
                output(&format!("trace.{i}.k"), k)?;
                output(&format!("trace.{i}.v"), v)?;
            }
            output(&format!("trace.{i}.attn"), layer.attn)?;
            output(&format!("trace.{i}.mlp"), layer.mlp)?;
        }
    }
    Ok(())
}
