//! Bytes of a training step on one device, from the configuration alone.
//!
//! What a program takes and gives ([`Memory::arguments`]) is exact. What it needs meanwhile ([`Memory::temporaries`]) follows
//! from what the gradient keeps and from the largest working set: of a layer, of the head's blocks, of the update. Compilers
//! reuse memory and pad shapes in ways of their own; the counts of simultaneous values in `working` were set by looking at
//! compiled programs (`lapidary compile`), and `docs/guide/plan.md` tells how far off the sums are.

use tensor::{DType, Shape};

use crate::arch::{Arch, Layer, LayerKind};
use crate::attention::FULL_BLOCK;
use crate::decoder::LayerRemat;
use crate::layer::names;
use crate::layout::{Layout, Slot};
use crate::params::{EMBED_TOKENS, EMBED_TOKENS_PER_LAYER};
use crate::partition::{Partition, names as axis};

/// What is done with a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlotUse {
    /// Whether it has a gradient and moments.
    pub trained: bool,
    /// In which it is stored.
    pub dtype: DType,
    /// Bytes an element of all its moments together.
    pub moments: usize,
}

/// A step, as far as memory is concerned.
#[derive(Debug, Clone)]
pub struct StepShape<'a> {
    /// Sequences of a micro-batch, of all devices.
    pub rows: usize,
    /// Tokens of each.
    pub seq: usize,
    /// Micro-batches.
    pub accumulation: usize,
    /// Whether rows hold several documents.
    pub segments: bool,
    /// Activation dtype.
    pub dtype: DType,
    /// What the gradient of a layer keeps.
    pub remat: &'a LayerRemat,
    /// Blocks of head and loss.
    pub blocks: usize,
    /// Dtype of per-layer rows that the host hands in; `None`: their table is a parameter.
    pub host_rows: Option<DType>,
    /// How the device lays arrays out, where that costs memory.
    pub tiles: Option<Tiles>,
}

/// A device whose arrays lie in tiles, as a TPU's.
///
/// A table's part whose rows are no multiple of the lanes lies on its side where it is stored, which wastes nothing. Its
/// gradient is summed up row by row, and the update follows the gradient's layout: state that lies on its side is copied first, padded.
/// Such a copy depends on nothing, and the compiler makes it at the beginning of the step as long as there is room, else in the
/// update. (Read off the buffers of E2B and E4B compiled for v5e: `docs/guide/plan.md`.)
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tiles {
    /// Elements of a tile's row.
    pub lanes: usize,
    /// Bytes of the device.
    pub memory: u64,
}

impl Tiles {
    /// Bytes up to which the compiler begins with copies. A sixth of the memory stays free, or less where it cannot be helped.
    fn comfortable(self) -> u64 {
        self.memory / 6 * 5
    }
}

/// Bytes on one device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Memory {
    /// Parameters.
    pub parameters: u64,
    /// Moments of the optimizer.
    pub optimizer: u64,
    /// Tokens, and rows that the host hands in.
    pub batch: u64,
    /// Gradients of trained matrices: as their products gave them, or f32 sums over micro-batches. All are alive before the
    /// update, because their norm is needed first.
    pub gradients: u64,
    /// Gradients of the tables, f32.
    pub tables: u64,
    /// Copies of matrices in the activation dtype.
    pub rounded: u64,
    /// Values kept from the forward pass for the backward pass.
    pub kept: u64,
    /// Working set of the layer that needs most, weights gathered for it included.
    pub layer: u64,
    /// A block's logits and their gradients.
    pub head: u64,
    /// The head's table as it is used, in the activation dtype, and its gradient before it is summed over devices.
    pub head_table: u64,
    /// Per-layer table on the device: rows and their gradient.
    pub per_layer: u64,
    /// Copies of the tables' parameters and moments in the layout of the update, see [`Tiles`].
    pub copies: u64,
}

/// Parts of a step that need memory of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Logits, loss and their gradients.
    Head,
    /// The backward pass through the layers.
    Layers,
    /// The optimizer.
    Update,
}

impl Memory {
    /// What the program is given (and gives back in the same place).
    #[must_use]
    pub fn arguments(&self) -> u64 {
        self.parameters + self.optimizer + self.batch
    }

    /// What it needs besides, in the phase that needs most.
    #[must_use]
    pub fn temporaries(&self) -> u64 {
        self.busiest().1.iter().map(|part| part.1).sum()
    }

    /// The phase that needs most, and what of: the head, when everything is kept and nothing has a gradient yet; the layers; the
    /// update, when all gradients are there.
    #[must_use]
    pub fn busiest(&self) -> (Phase, Vec<(&'static str, u64)>) {
        let kept = [
            ("rounded weights", self.rounded),
            ("kept", self.kept),
            ("per-layer rows", self.per_layer),
            ("tables in another layout", self.copies),
        ];
        // The table's gradient waits in the layers until it is summed over devices.
        let table = ("head's table", self.head_table);
        let head = kept.into_iter().chain([("logits", self.head), table]).collect();
        let layers =
            kept.into_iter().chain([("gradients", self.gradients), ("one layer", self.layer), table]).collect();
        let update = vec![("gradients", self.gradients), ("tables' gradients", self.tables)];
        let sum = |parts: &Vec<(&str, u64)>| parts.iter().map(|p| p.1).sum::<u64>();
        // Of phases that need the same, the first.
        let mut most = (Phase::Head, head);
        for (phase, parts) in [(Phase::Layers, layers), (Phase::Update, update)] {
            if sum(&parts) > sum(&most.1) {
                most = (phase, parts);
            }
        }
        most
    }

    /// All.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.arguments() + self.temporaries()
    }
}

/// How many arrays of a kind are alive at once in a layer's backward pass.
mod working {
    /// Of the MLP's width: gate, up, their product and two gradients.
    pub(super) const MLP: u64 = 5;
    /// Of the MLP's width for every layer of a loop's body, in fifths: compilers overlap its layers.
    pub(super) const MLP_IN_LOOP: u64 = 12;
    /// Of the residual stream's width, in the activation dtype.
    pub(super) const STREAM: u64 = 8;
    /// Of attention scores, in f32: probabilities, their gradient.
    pub(super) const SCORES: u64 = 2;
}

struct Counter<'a> {
    arch: &'a Arch,
    layout: &'a Layout,
    shape: &'a StepShape<'a>,
    partition: Option<&'a Partition>,
}

/// Bytes of a step on one device.
#[must_use]
pub fn memory(arch: &Arch, layout: &Layout, shape: &StepShape<'_>, of: &dyn Fn(&Slot) -> SlotUse) -> Memory {
    let c = Counter { arch, layout, shape, partition: layout.partition() };
    let mut m = Memory::default();
    let narrow = shape.dtype.size() as u64;
    for slot in c.slots() {
        let (n, u) = (c.part(slot), of(slot));
        m.parameters += n * u.dtype.size() as u64;
        if u.trained {
            m.optimizer += n * u.moments as u64;
            let table = [EMBED_TOKENS, EMBED_TOKENS_PER_LAYER].contains(&&*slot.spec().name);
            match table {
                true => m.tables += n * 4,
                false => m.gradients += n * if shape.accumulation > 1 { 4 } else { narrow },
            }
        }
        let matrix =
            slot.spec().shape.rank() >= 2 && ![EMBED_TOKENS, EMBED_TOKENS_PER_LAYER].contains(&&*slot.spec().name);
        if matrix && u.dtype != shape.dtype {
            m.rounded += n * narrow;
        }
    }
    m.batch = c.batch();
    m.kept = c.kept();
    m.layer = c.layers();
    m.head = c.head();
    m.head_table = c.head_table(of);
    m.per_layer = c.per_layer();
    if let Some(tiles) = shape.tiles {
        m.copies = c.copies(tiles, of).min(tiles.comfortable().saturating_sub(m.total()));
    }
    m
}

impl Counter<'_> {
    fn slots(&self) -> impl Iterator<Item = &Slot> {
        let host = self.shape.host_rows.is_some();
        self.layout.slots().iter().filter(move |s| !host || s.spec().name != EMBED_TOKENS_PER_LAYER)
    }

    /// What one device holds of a slot.
    fn part_shape(&self, slot: &Slot) -> Shape {
        match (&slot.sharding, self.partition) {
            (Some(s), Some(p)) => s.shard_shape(p.mesh(), &slot.shape).unwrap_or_else(|_| slot.shape.clone()),
            _ => slot.shape.clone(),
        }
    }

    /// Elements of a slot that one device holds.
    fn part(&self, slot: &Slot) -> u64 {
        self.part_shape(slot).elements() as u64
    }

    /// Parameters and moments of trained tables that lie on their side, padded as the update has them.
    fn copies(&self, tiles: Tiles, of: &dyn Fn(&Slot) -> SlotUse) -> u64 {
        let table = |s: &&Slot| [EMBED_TOKENS, EMBED_TOKENS_PER_LAYER].contains(&&*s.spec().name) && of(s).trained;
        self.slots()
            .filter(table)
            .filter_map(|slot| {
                let &[rows, columns] = self.part_shape(slot).dims() else { return None };
                // On its side it must be without waste itself.
                let lies = !columns.is_multiple_of(tiles.lanes) && rows.is_multiple_of(tiles.lanes);
                let u = of(slot);
                let each = (rows * columns.next_multiple_of(tiles.lanes)) as u64;
                lies.then_some(each * (u.dtype.size() + u.moments) as u64)
            })
            .sum()
    }

    /// Elements of an activation that one device holds.
    fn activation(&self, dims: &[(&str, usize)]) -> u64 {
        let shape: Shape = dims.iter().map(|d| d.1).collect::<Vec<_>>().into();
        let part = self.partition.and_then(|p| p.activation(dims).shard_shape(p.mesh(), &shape).ok());
        part.unwrap_or(shape).elements() as u64
    }

    fn tokens(&self) -> u64 {
        self.activation(&[(axis::BATCH, self.shape.rows), (axis::LENGTH, self.shape.seq)])
    }

    /// Values of `width` a token, cut over the axes of `name`.
    fn wide(&self, name: &str, width: usize) -> u64 {
        self.activation(&[(axis::BATCH, self.shape.rows), (axis::LENGTH, self.shape.seq), (name, width)])
    }

    fn narrow(&self) -> u64 {
        self.shape.dtype.size() as u64
    }

    fn batch(&self) -> u64 {
        let fields = 4 + u64::from(self.shape.segments);
        let mut bytes = fields * 4;
        if let (Some(dtype), Some(p)) = (self.shape.host_rows, self.arch.per_layer_input()) {
            bytes += (self.arch.layers().len() * p.width * dtype.size()) as u64;
        }
        // Three scalars of the step.
        self.tokens() * bytes * self.shape.accumulation as u64 + 12
    }

    /// What the backward pass finds of the forward pass: every layer's input and what the policy names, keys and values of
    /// donors, per-layer inputs.
    fn kept(&self) -> u64 {
        let stream = self.wide(axis::EMBED, self.arch.hidden_size());
        let mut n = 0;
        for layer in self.arch.layers() {
            let q = self.heads(layer);
            let kv = if layer.owns_kv() { 2 * self.key_values(layer) } else { 0 };
            let f = self.wide(axis::MLP, layer.mlp_width);
            n += match self.shape.remat {
                LayerRemat::Everything => 8 * stream + 3 * q + 2 * kv + 3 * f,
                LayerRemat::Keep(kept) => {
                    let of = |name: &str, n: u64| if kept.contains(&name) { n } else { 0 };
                    stream
                        + of(names::QUERY_PROJ, q)
                        + of(names::KEY_PROJ, kv)
                        + of(names::OUT_PROJ, stream)
                        + of(names::CONTEXT, q)
                        + of(names::MLPWI_0, 2 * f)
                        + of(names::MLPWO, stream)
                }
            };
        }
        for donor in (0..self.arch.layers().len()).filter(|&i| self.arch.is_donor(i)) {
            n += 2 * self.key_values(&self.arch.layers()[donor]);
        }
        n * self.narrow()
    }

    fn heads(&self, layer: &Layer) -> u64 {
        self.wide(axis::HEADS, self.arch.num_heads()) * layer.head_dim as u64
    }

    fn key_values(&self, layer: &Layer) -> u64 {
        self.wide(axis::KV_HEADS, layer.kv_heads) * layer.head_dim as u64
    }

    /// Of the largest layer: inner values and their gradients, scores, gathered weights.
    fn layers(&self) -> u64 {
        let stream = self.wide(axis::EMBED, self.arch.hidden_size());
        self.arch
            .layers()
            .iter()
            .enumerate()
            .map(|(i, layer)| {
                let f = self.wide(axis::MLP, layer.mlp_width);
                let arrays = match self.layout.longest_body(self.arch) {
                    1 => working::MLP * f,
                    n => f * n as u64 * working::MLP_IN_LOOP / 5,
                };
                let inner = arrays + working::STREAM * stream + 4 * self.heads(layer);
                inner * self.narrow() + working::SCORES * 4 * self.scores(layer) + self.gathered(i)
            })
            .max()
            .unwrap_or(0)
    }

    /// Attention scores of a layer.
    fn scores(&self, layer: &Layer) -> u64 {
        let (t, w) = (self.shape.seq as u64, self.arch.spec().sliding_window as u64);
        let rows = self.wide(axis::HEADS, self.arch.num_heads());
        match layer.kind {
            LayerKind::Sliding if t > w => rows * 2 * w,
            LayerKind::Full if t > FULL_BLOCK as u64 => rows / t * FULL_BLOCK as u64 * t,
            _ => rows * t,
        }
    }

    /// Weights of a layer as they are used, where they are stored in parts, and their gradients before they are summed.
    fn gathered(&self, layer: usize) -> u64 {
        let Some(p) = self.partition else { return 0 };
        let elements: u64 = self
            .slots()
            .filter(|s| s.members.iter().any(|m| m.layer == Some(layer)))
            .filter_map(|s| {
                let one = p.parameter(s.spec()).ok()?;
                let gathered = p.gathered(&one);
                (gathered != one).then(|| gathered.shard_shape(p.mesh(), &s.spec().shape).ok()).flatten()
            })
            .map(|s| s.elements() as u64)
            .sum();
        2 * elements * self.narrow()
    }

    /// Logits of a block in f32, and their gradient in the activation dtype.
    fn head(&self) -> u64 {
        let block = self.tokens().div_ceil(self.shape.blocks.max(1) as u64);
        block * self.activation(&[(axis::VOCAB, self.arch.vocab_size())]) * (4 + self.narrow())
    }

    fn head_table(&self, of: &dyn Fn(&Slot) -> SlotUse) -> u64 {
        let Some(slot) = self.slots().find(|s| s.spec().name == EMBED_TOKENS) else { return 0 };
        let whole = match (&slot.sharding, self.partition) {
            (Some(s), Some(p)) => p.gathered(s).shard_shape(p.mesh(), &slot.shape).map_or(0, |s| s.elements() as u64),
            _ => slot.shape.elements() as u64,
        };
        let as_stored = of(slot).dtype == self.shape.dtype && whole == self.part(slot);
        let rounded = if as_stored { 0 } else { whole * self.narrow() };
        rounded + if of(slot).trained { whole * 4 } else { 0 }
    }

    /// Per-layer inputs, their gradient, and the rows of a table on the device.
    fn per_layer(&self) -> u64 {
        let Some(p) = self.arch.per_layer_input() else { return 0 };
        let n = self.tokens() * (self.arch.layers().len() * p.width) as u64;
        let rows = if self.shape.host_rows.is_some() { 0 } else { 4 * n };
        2 * n * self.narrow() + rows
    }
}
