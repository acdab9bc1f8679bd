//! Bytes of a training step on one device, from the configuration alone.
//!
//! What a program takes and gives ([`Memory::arguments`]) is exact. What it needs meanwhile ([`Memory::temporaries`]) follows
//! from what the gradient keeps and from the largest working set: of a layer, of the head's blocks, of the update. Compilers
//! reuse memory and pad shapes in ways of their own; the counts of simultaneous values in `working` were set by looking at
//! compiled programs (`lapidary compile`), and `docs/guide/plan.md` tells how far off the sums are. Where compilers for different
//! devices differ by gigabytes, [`Compiler`] says so.

use tensor::{DType, Shape};

use crate::arch::{Arch, Layer, LayerKind};
use crate::attention::FULL_BLOCK;
use crate::called;
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

/// What compilers for a kind of device do with arrays.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Compiler {
    /// CPUs and GPUs: arrays lie as the program says.
    #[default]
    Rows,
    /// TPUs: arrays lie in tiles, which for a narrow part of a table costs copies of it and of its moments ([`Memory::relaid`]).
    Tiles {
        /// Bytes that programs can use, where the compiler makes those copies as early as they fit; `None`: as late as possible.
        fills: Option<u64>,
    },
}

impl Compiler {
    /// The scheduler's limits in percent of the bytes that programs can use: the one it starts with, and, when that does not
    /// suffice for what it would like, the one it tries again with.
    const LIMITS: [u64; 2] = [95, 95 * 9 / 10];
    /// Columns of a tile.
    const TILE: usize = 128;
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
    /// Who compiles it.
    pub compiler: Compiler,
    /// See [`crate::loss::LossOptions::called`]: functions that are called keep scores to themselves, a block at a time.
    pub called: bool,
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
    /// What of the head's table waits in the layers until it is summed over devices.
    pub waiting: u64,
    /// The head's gradient once more while it is summed: TPUs sum it whole, into another array.
    pub summed: u64,
    /// Per-layer table on the device: rows and their gradient.
    pub per_layer: u64,
    /// On TPUs, copies of tables whose part has a number of columns that tiles do not divide. Such a part is stored with its
    /// rows in the tiles' columns, which pads least, while looking rows up and adding to them wants it the other way round.
    pub relaid: u64,
    /// The same of their moments, needed by the update alone.
    pub relaid_moments: u64,
    /// As much of [`Self::relaid_moments`] as the compiler has ready from the loss on.
    pub early: u64,
}

/// Parts of a step that need memory of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Logits, loss and their gradients.
    Head,
    /// The backward pass through the layers.
    Layers,
    /// Sums of the tables' gradients over devices.
    Tables,
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
        let kept = [("rounded weights", self.rounded), ("kept", self.kept), ("per-layer rows", self.per_layer)];
        let relaid = ("tables in tiles", self.relaid + self.early);
        let head = kept.into_iter().chain([("logits", self.head), ("head's table", self.head_table), relaid]).collect();
        let table = ("head's table", self.waiting);
        let layers =
            kept.into_iter().chain([("gradients", self.gradients), ("one layer", self.layer), table, relaid]).collect();
        let mut gradients = vec![("gradients", self.gradients), ("tables' gradients", self.tables)];
        let mut phases = vec![(Phase::Layers, layers)];
        if self.summed > 0 {
            let sums = [("per-layer rows", self.per_layer), ("head's table", self.waiting + self.summed), relaid];
            phases.push((Phase::Tables, gradients.iter().copied().chain(sums).collect()));
        }
        gradients.push(("tables in tiles", self.relaid + self.relaid_moments));
        phases.push((Phase::Update, gradients));
        let sum = |parts: &Vec<(&str, u64)>| parts.iter().map(|p| p.1).sum::<u64>();
        // Of phases that need the same, the first.
        let mut most = (Phase::Head, head);
        for (phase, parts) in phases {
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
        if let Some(tiled) = c.tiled(slot) {
            m.relaid += tiled * u.dtype.size() as u64;
            m.relaid_moments += if u.trained { tiled * u.moments as u64 } else { 0 };
        }
        m.parameters += n * u.dtype.size() as u64;
        if u.trained {
            m.optimizer += n * u.moments as u64;
            let table = [EMBED_TOKENS, EMBED_TOKENS_PER_LAYER].contains(&&*slot.spec().name);
            match table {
                true => m.tables += c.tiled(slot).unwrap_or(n) * 4,
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
    let (rounded, gradient) = c.head_table(of);
    m.head_table = rounded + gradient;
    // TPUs are done with the rounded table before the layers.
    m.waiting = if c.tiles() { gradient } else { m.head_table };
    m.summed = if c.tiles() && c.partition.is_some() { gradient } else { 0 };
    m.per_layer = c.per_layer();
    if let Compiler::Tiles { fills: Some(bytes) } = shape.compiler {
        m.early = early(&m, bytes);
    }
    m
}

/// As much of the moments' copies as the scheduler makes early: all where that fits its limit; otherwise it lowers the limit and
/// makes what fits that.
fn early(m: &Memory, usable: u64) -> u64 {
    let [first, second] = Compiler::LIMITS.map(|percent| usable / 100 * percent);
    let all = Memory { early: m.relaid_moments, ..*m };
    if all.total() <= first { m.relaid_moments } else { second.saturating_sub(m.total()).min(m.relaid_moments) }
}

impl Counter<'_> {
    fn slots(&self) -> impl Iterator<Item = &Slot> {
        let host = self.shape.host_rows.is_some();
        self.layout.slots().iter().filter(move |s| !host || s.spec().name != EMBED_TOKENS_PER_LAYER)
    }

    /// Elements of a slot that one device holds.
    fn part(&self, slot: &Slot) -> u64 {
        self.part_shape(slot).elements() as u64
    }

    fn part_shape(&self, slot: &Slot) -> Shape {
        match (&slot.sharding, self.partition) {
            (Some(s), Some(p)) => s.shard_shape(p.mesh(), &slot.shape).unwrap_or_else(|_| slot.shape.clone()),
            _ => slot.shape.clone(),
        }
    }

    fn tiles(&self) -> bool {
        matches!(self.shape.compiler, Compiler::Tiles { .. })
    }

    /// Elements of a table's part in the order of its rows, padded to tiles, where it is stored otherwise.
    fn tiled(&self, slot: &Slot) -> Option<u64> {
        let table = [EMBED_TOKENS, EMBED_TOKENS_PER_LAYER].contains(&&*slot.spec().name);
        if !table || !self.tiles() {
            return None;
        }
        let columns = *self.part_shape(slot).dims().last()?;
        let padded = columns.next_multiple_of(Compiler::TILE) as u64;
        (padded > columns as u64).then(|| self.part(slot) / columns as u64 * padded)
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

    /// Attention scores of a layer that are arrays of the program.
    fn scores(&self, layer: &Layer) -> u64 {
        if self.shape.called && called::attends(layer.head_dim) {
            return 0;
        }
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

    /// The head's table as it is used, and its gradient.
    fn head_table(&self, of: &dyn Fn(&Slot) -> SlotUse) -> (u64, u64) {
        let Some(slot) = self.slots().find(|s| s.spec().name == EMBED_TOKENS) else { return (0, 0) };
        let whole = match (&slot.sharding, self.partition) {
            (Some(s), Some(p)) => p.gathered(s).shard_shape(p.mesh(), &slot.shape).map_or(0, |s| s.elements() as u64),
            _ => slot.shape.elements() as u64,
        };
        let as_stored = of(slot).dtype == self.shape.dtype && whole == self.part(slot);
        let rounded = if as_stored { 0 } else { whole * self.narrow() };
        (rounded, if of(slot).trained { whole * 4 } else { 0 })
    }

    /// Per-layer inputs, their gradient, and the rows of a table on the device.
    fn per_layer(&self) -> u64 {
        let Some(p) = self.arch.per_layer_input() else { return 0 };
        let n = self.tokens() * (self.arch.layers().len() * p.width) as u64;
        let rows = if self.shape.host_rows.is_some() { 0 } else { 4 * n };
        2 * n * self.narrow() + rows
    }
}
