//! The description of one model parameter, from which initialisation, sharding, both checkpoint
//! conversions, FLOPs and memory plans follow.

use std::fmt;

use crate::Shape;

/// A logical axis of a parameter, with MaxText's name for it. Mesh axes are assigned to these outside the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Axis {
    /// Vocabulary rows of a table.
    Vocab,
    /// Hidden width of a vocabulary table.
    EmbedVocab,
    /// Hidden width of a matrix.
    Embed,
    /// Inner width of an MLP, and the flattened layer-by-width axis of per-layer embeddings.
    Mlp,
    /// Query heads.
    QHeads,
    /// Heads of the attention output.
    Heads,
    /// Key/value heads.
    KvHeads,
    /// Head size of queries and outputs.
    Kv,
    /// Head size of keys and values.
    KvHeadDim,
    /// The width of a norm.
    Norm,
    /// Not sharded.
    Replicated,
}

impl Axis {
    /// MaxText's name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Axis::Vocab => "vocab",
            Axis::EmbedVocab => "embed_vocab",
            Axis::Embed => "embed",
            Axis::Mlp => "mlp",
            Axis::QHeads => "q_heads",
            Axis::Heads => "heads",
            Axis::KvHeads => "kv_heads",
            Axis::Kv => "kv",
            Axis::KvHeadDim => "kv_head_dim",
            Axis::Norm => "norm",
            Axis::Replicated => "replicated",
        }
    }
}

impl fmt::Display for Axis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How a parameter starts when training from scratch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Init {
    /// Every element is this value.
    Constant(f32),
    /// Normal with this standard deviation.
    Normal(f32),
    /// Normal truncated at two standard deviations, rescaled so that its standard deviation is this.
    TruncatedNormal(f32),
}

/// The part of the model a parameter belongs to, for accounting.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Part {
    /// The token table (and tied head).
    TokenEmbedding,
    /// The per-layer token table.
    PerLayerEmbedding,
    /// The projection that makes per-layer inputs, and its norm.
    PerLayerProjection,
    /// Attention projections and q/k norms.
    Attention,
    /// Gate, up and down projections.
    Mlp,
    /// A layer's per-layer-input gate and projection.
    PerLayerGate,
    /// Norms and scalars.
    Norm,
}

/// What turns a Hugging Face tensor into the MaxText array of the same parameter.
/// The way back is the exact inverse.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Transform {
    /// The same bytes in the same shape.
    Copy,
    /// A two-dimensional transpose, followed by a reshape to the MaxText shape.
    Transpose,
    /// Every element times this `f32` constant, in `f32`.
    Scale(f32),
}

/// One parameter: its names, shapes, axes and initialiser in both conventions.
#[derive(Debug, Clone, PartialEq)]
pub struct ParamSpec {
    /// Hugging Face name without a layout prefix: `layers.0.mlp.up_proj.weight`.
    pub name: String,
    /// Hugging Face shape.
    pub shape: Shape,
    /// MaxText path below `params.params`, elements joined by dots: `decoder.layers_0.mlp.wi_1.kernel`.
    pub maxtext_name: String,
    /// MaxText shape.
    pub maxtext_shape: Shape,
    /// Logical axes of the **MaxText** shape.
    pub axes: Vec<Axis>,
    /// Hugging Face to MaxText.
    pub transform: Transform,
    /// Initialiser, in the Hugging Face convention (token table unscaled).
    pub init: Init,
    /// Which part of the model it belongs to.
    pub part: Part,
    /// The layer it belongs to, if any.
    pub layer: Option<usize>,
    /// Whether Hugging Face trains it (`layer_scalar` is a buffer there).
    pub trainable: bool,
}
