//! The forward pass over a cache: a chunk of new tokens for every sequence, keys and values of the tokens before from arrays
//! that exist only for layers that own them.
//!
//! A sliding layer's array is a ring of `min(window, context)` positions: position `p` lies in row `p % ring`. A full
//! layer's holds `capacity` positions, position `p` in row `p`. Layers that borrow read what their donor's queries saw; they
//! write nothing, so they run for the last token of a chunk alone, and not at all where no logits are asked for.
//!
//! Sequences may be of different length: each has its own number of tokens before the chunk, and of tokens in it. Rows of a
//! chunk behind its last token are computed and never seen.

use std::collections::HashMap;

use graph::{Compare, Graph, GraphError, InputOptions, OutputOptions, Program, Value};
use tensor::{DType, ParamSpec, Shape};

use crate::arch::{KvSource, LayerKind, PerKind};
use crate::attention::{KeyPositions, KeyValues};
use crate::decoder::soft_cap;
use crate::forward::LOGITS;
use crate::layer::{LayerContext, LayerInput, LayerWeights, Weight, layer, own, products};
use crate::layout::role;
use crate::nn::{Angles, Result, of_layer, per_layer_inputs, rms_norm, scale_embedding};
use crate::params::{EMBED_TOKENS, EMBED_TOKENS_PER_LAYER, param_table};
use crate::{Arch, Layer};

mod step;

/// What a program over a cache is built for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct CachedOptions {
    /// Sequences.
    pub batch: usize,
    /// New tokens of each; 1 for a decode step.
    pub chunk: usize,
    /// Positions that a full layer's array holds. Those of every sequence plus the chunk must fit.
    pub capacity: usize,
    /// Rows of a sliding layer's ring, see [`ring`].
    pub ring: usize,
    /// Activation dtype.
    pub dtype: DType,
    /// Dtype of the cache.
    pub cache_dtype: DType,
    /// Whether there may be tokens before the chunk. A chunk that begins every sequence need not look for them.
    pub past: bool,
    /// Whether logits of each sequence's last token are wanted.
    pub logits: bool,
    /// Matrices are outside the program where a product has at most this many rows of activations; 0: nowhere.
    pub called_rows: usize,
    /// Whether functions of the runtime compute all of a decode step (a chunk of 1 with logits) whose matrices are outside.
    pub called_steps: bool,
}

/// Names of inputs that are not parameters.
pub mod input {
    /// Rows of the token table for every new token, `[b, t, d]`, in the dtype they are stored in.
    pub const EMBED_ROWS: &str = "embed_rows";
    /// Rows of the per-layer table for every new token, `[b, t, l * p]`, in the dtype they are stored in.
    pub const PLE_ROWS: &str = crate::forward::input::PLE_ROWS;
    /// Tokens before the chunk, `[b]` i32.
    pub const START: &str = "start";
    /// Tokens of the chunk that count, `[b]` i32, 0 for a sequence that is left alone.
    pub const COUNT: &str = "count";
    /// Whose matrices are outside the program, i64 `[1]`.
    pub const SESSION: &str = "session";
}

/// One array of a cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CacheArray {
    /// Name of the program's input and of the output that replaces it.
    pub name: String,
    /// The layer that owns it.
    pub layer: usize,
    /// Whether it is a ring.
    pub kind: LayerKind,
    /// `[b, k, s, e]`.
    pub shape: Shape,
}

/// Rows of a sliding layer's ring for sequences of at most `context` tokens.
#[must_use]
pub fn ring(arch: &Arch, context: usize) -> usize {
    arch.spec().sliding_window.min(context).max(1)
}

/// The arrays of a cache: keys and values of every layer that owns them.
#[must_use]
pub fn cache_arrays(arch: &Arch, batch: usize, capacity: usize, ring: usize) -> Vec<CacheArray> {
    let owners = arch.layers().iter().enumerate().filter(|(_, l)| l.owns_kv());
    let arrays = owners.flat_map(|(i, l)| {
        let rows = if l.kind == LayerKind::Sliding { ring } else { capacity };
        let shape: Shape = [batch, l.kv_heads, rows, l.head_dim].into();
        ["keys", "values"].map(|part| CacheArray {
            name: format!("cache.{i}.{part}"),
            layer: i,
            kind: l.kind,
            shape: shape.clone(),
        })
    });
    arrays.collect()
}

/// The matrices that a program may leave outside, in the order of the numbers it calls them by.
#[must_use]
pub fn called_matrices(arch: &Arch) -> Vec<ParamSpec> {
    param_table(arch).into_iter().filter(is_called).collect()
}

fn is_called(p: &ParamSpec) -> bool {
    p.shape.rank() == 2 && p.name != EMBED_TOKENS_PER_LAYER
}

/// Builds the program that feeds a chunk.
///
/// Inputs, in order: those of [`input`] (rows of the per-layer table with per-layer embeddings only, the session if matrices
/// are outside), the arrays of [`cache_arrays`], donated, then the parameters it reads. Outputs: the arrays, then `logits`
/// `[b, v]` f32 if they are wanted.
///
/// `stored` gives the dtype of every parameter by name, and that of [`input::EMBED_ROWS`].
///
/// # Errors
/// When a dtype in `stored` is not a float.
pub fn cached_program(
    arch: &Arch,
    options: &CachedOptions,
    stored: &dyn Fn(&str) -> DType,
) -> std::result::Result<Program, GraphError> {
    let g = Graph::new(if options.chunk == 1 { "decode" } else { "prefill" });
    let spec = arch.spec();
    let (b, t) = (options.batch, options.chunk);
    let rows = g.input(input::EMBED_ROWS, stored(input::EMBED_ROWS), [b, t, spec.hidden_size])?;
    let ple_rows = match arch.per_layer_input() {
        Some(p) => {
            let dtype = stored(EMBED_TOKENS_PER_LAYER);
            Some(g.input(input::PLE_ROWS, dtype, [b, t, arch.layers().len() * p.width])?)
        }
        None => None,
    };
    let start = g.input(input::START, DType::I32, [b])?;
    let count = g.input(input::COUNT, DType::I32, [b])?;
    let session = if options.called_rows > 0 { Some(g.input(input::SESSION, DType::I64, [1])?) } else { None };
    let arrays = cache_arrays(arch, b, options.capacity, options.ring);
    let cache: Vec<Value> = arrays
        .iter()
        .map(|a| {
            let donated = InputOptions { donate: true, ..InputOptions::default() };
            g.input_with(&a.name, options.cache_dtype, a.shape.clone(), donated)
        })
        .collect::<Result<_>>()?;
    let owners = arrays.iter().step_by(2).zip(cache.chunks(2));
    let cache_of = owners.map(|(a, kv)| (a.layer, KeyValues { keys: kv[0], values: kv[1] })).collect();
    let params = Params::new(&g, arch, options, session, stored)?;
    let feed = Feed { g: &g, arch, options, params, start, count, cache: cache_of };
    let (written, logits) = feed.run(rows, ple_rows)?;
    for ((array, &was), now) in arrays.iter().zip(&cache).zip(written) {
        g.output_with(&array.name, now, OutputOptions { reuse: Some(was), ..OutputOptions::default() })?;
    }
    if let Some(logits) = logits {
        g.output(LOGITS, logits)?;
    }
    g.finish()
}

/// Parameters, as values or by number.
struct Params {
    table: Vec<ParamSpec>,
    session: Option<Value>,
    /// Parameters that are values; a matrix that is called everywhere is none.
    values: HashMap<String, Value>,
    /// Number and rows of matrices.
    called: HashMap<String, (usize, usize)>,
}

impl Params {
    fn new(
        g: &Graph,
        arch: &Arch,
        options: &CachedOptions,
        session: Option<Value>,
        stored: &dyn Fn(&str) -> DType,
    ) -> Result<Self> {
        let table = param_table(arch);
        let matrices = table.iter().filter(|p| is_called(p)).enumerate();
        let called: HashMap<String, (usize, usize)> =
            matrices.map(|(i, p)| (p.name.clone(), (i, p.shape.dims()[0]))).collect();
        let mut values = HashMap::new();
        for p in &table {
            let Some(rows) = used_rows(arch, options, p) else { continue };
            if !called.contains_key(&p.name) || rows.iter().any(|&r| r > options.called_rows) {
                values.insert(p.name.clone(), g.input(&p.name, stored(&p.name), p.shape.clone())?);
            }
        }
        Ok(Params { table, session, values, called })
    }

    /// The parameter for products with `m` rows of activations, if the program has a use for it.
    fn find(&self, name: &str, m: usize, limit: usize) -> Option<Weight> {
        match (self.called.get(name), self.values.get(name)) {
            (Some(&(index, rows)), _) if m <= limit => Some(Weight::Called { index, rows }),
            (_, value) => value.map(|&v| Weight::Value(v)),
        }
    }

    fn weight(&self, name: &str, m: usize, limit: usize) -> Weight {
        match self.find(name, m, limit) {
            Some(weight) => weight,
            None => unreachable!("{name} is no input of this program"),
        }
    }
}

/// Rows of activations that a parameter is applied to, one number for each place; `None` where the program does not use it.
fn used_rows(arch: &Arch, options: &CachedOptions, p: &ParamSpec) -> Option<Vec<usize>> {
    let (all, last) = (options.batch * options.chunk, options.batch);
    let Some(index) = p.layer else {
        // The token table is the head.
        return match p.name.as_str() {
            EMBED_TOKENS_PER_LAYER => None,
            EMBED_TOKENS | "norm.weight" => options.logits.then(|| vec![last]),
            _ => Some(vec![all]),
        };
    };
    let role = role(p)?;
    let owner = last_owner(arch);
    let keys = matches!(
        role,
        "input_layernorm.weight" | "self_attn.k_proj.weight" | "self_attn.k_norm.weight" | "self_attn.v_proj.weight"
    );
    if index < owner {
        return Some(vec![all]);
    }
    // Of the last owner, only keys and values are needed for every token.
    match (index == owner && keys, options.logits) {
        (true, true) if role == "input_layernorm.weight" => Some(vec![all, last]),
        (true, _) => Some(vec![all]),
        (false, true) => Some(vec![last]),
        (false, false) => None,
    }
}

/// The last layer with own keys and values: behind it, only the last token of a chunk matters.
fn last_owner(arch: &Arch) -> usize {
    arch.layers().iter().rposition(Layer::owns_kv).unwrap_or(0)
}

struct Feed<'a> {
    g: &'a Graph,
    arch: &'a Arch,
    options: &'a CachedOptions,
    params: Params,
    /// `[b]` i32.
    start: Value,
    /// `[b]` i32.
    count: Value,
    cache: HashMap<usize, KeyValues>,
}

/// What goes through the layers: all tokens of the chunk, or the last of each sequence.
struct Stream {
    /// `[b, t, d]`.
    x: Value,
    /// `[b, t, l, p]`.
    ple: Option<Value>,
    /// `[b, t]` i32.
    positions: Value,
    angles: PerKind<Angles>,
}

impl Feed<'_> {
    fn run(&self, rows: Value, ple_rows: Option<Value>) -> Result<(Vec<Value>, Option<Value>)> {
        let (g, spec, options) = (self.g, self.arch.spec(), self.options);
        let (b, t) = (options.batch, options.chunk);
        let embed = scale_embedding(g, g.convert(rows, options.dtype)?, spec)?;
        let ple = match (self.arch.per_layer_input(), ple_rows) {
            (Some(p), Some(rows)) => {
                let projection = self.params.weight("per_layer_model_projection.weight", b * t, options.called_rows);
                let [context] = products(g, self.params.session, embed, [projection], options.dtype)?;
                let norm = self.params.values["per_layer_projection_norm.weight"];
                Some(per_layer_inputs(g, p, context, rows, norm, (spec, false))?)
            }
            _ => None,
        };
        let offsets = g.iota(DType::I32, [b, t], 1)?;
        let positions = g.add(g.broadcast_in_dim(self.start, [b, t], &[0])?, offsets)?;
        let mut stream = Stream { x: embed, ple, positions, angles: self.angles(positions)? };
        if let Some(session) = self.params.session.filter(|_| options.called_steps && t == 1 && options.logits) {
            return self.step(session, stream);
        }
        let mut written = Vec::new();
        let mut seen: HashMap<usize, (KeyValues, Value)> = HashMap::new();
        let owner = last_owner(self.arch);
        for (index, l) in self.arch.layers().iter().enumerate() {
            let _scope = g.scope(&format!("layers.{index}"));
            let mut cx = LayerContext::new(self.arch, index, options.dtype, None);
            let donor = match l.kv {
                KvSource::Own => {
                    let w = self.weights(index, b * t);
                    let a = rms_norm(g, stream.x, Some(w.get("input_layernorm.weight")), cx.eps, false)?;
                    let (new, _) = own(g, &cx, a, &w, &stream.angles.get(l.kind))?;
                    let (kept, visible) = self.write(index, l.kind, new)?;
                    written.extend([kept.keys, kept.values]);
                    seen.insert(index, visible);
                    index
                }
                KvSource::Shared { donor } => donor,
            };
            if index == owner {
                if !options.logits {
                    return Ok((written, None));
                }
                stream = self.last(stream)?;
            }
            cx.layer.kv = KvSource::Shared { donor };
            let (borrowed, keys) = seen[&donor];
            let ple = stream.ple.map(|ple| of_layer(g, ple, index));
            let input = LayerInput {
                x: stream.x,
                ple: ple.transpose()?,
                borrowed: Some(borrowed),
                angles: stream.angles.get(l.kind),
                segments: None,
                at: Some(KeyPositions { queries: stream.positions, keys }),
            };
            let rows = g.dims(stream.x)[..2].iter().product();
            stream.x = layer(g, &cx, &input, &self.weights(index, rows))?.hidden;
        }
        let x = rms_norm(g, stream.x, Some(self.params.values["norm.weight"]), spec.rms_norm_eps, false)?;
        let table = self.params.weight(EMBED_TOKENS, b, options.called_rows);
        let x = g.reshape(x, [b, spec.hidden_size])?;
        let [z] = products(g, self.params.session, x, [table], options.dtype)?;
        let z = soft_cap(g, self.arch, z)?;
        Ok((written, Some(g.convert(z, DType::F32)?)))
    }

    /// The parameters of a layer for products with `m` rows of activations.
    fn weights(&self, index: usize, m: usize) -> LayerWeights {
        let named = self.params.table.iter().filter(|p| p.layer == Some(index)).filter_map(|p| {
            let weight = self.params.find(&p.name, m, self.options.called_rows)?;
            Some((role(p)?.to_owned(), weight))
        });
        LayerWeights::with_calls(named.collect(), self.params.session)
    }

    fn angles(&self, positions: Value) -> Result<PerKind<Angles>> {
        let spec = self.arch.spec();
        let of =
            |kind| Angles::new(self.g, positions, spec.rope.get(kind), spec.head_dim.get(kind), self.options.dtype);
        Ok(PerKind { sliding: of(LayerKind::Sliding)?, full: of(LayerKind::Full)? })
    }

    /// The last token of every sequence, as a chunk of one.
    fn last(&self, stream: Stream) -> Result<Stream> {
        let g = self.g;
        let (b, t) = (self.options.batch, self.options.chunk);
        if t == 1 {
            return Ok(stream);
        }
        // Row i * t + count - 1 of the sequences laid end to end; a sequence without tokens gives its first row.
        let last = g.sub(self.count, g.splat(DType::I32, [b], 1.0)?)?;
        let last = g.max(last, g.splat(DType::I32, [b], 0.0)?)?;
        let first = g.mul_scalar(g.iota(DType::I32, [b], 0)?, t as f64)?;
        let ids = g.reshape(g.add(first, last)?, [b, 1])?;
        let pick = |x: Value| -> Result<Value> {
            let d = g.dims(x);
            g.take(g.reshape(x, [&[b * t], &d[2..]].concat())?, ids)
        };
        let positions = pick(stream.positions)?;
        let ple = stream.ple.map(pick).transpose()?;
        Ok(Stream { x: pick(stream.x)?, ple, positions, angles: self.angles(positions)? })
    }

    /// Puts new keys and values `[b, k, t, e]` into a layer's arrays. Returns the arrays, and what queries of the chunk see
    /// with its positions `[b, s]`.
    fn write(&self, index: usize, kind: LayerKind, new: KeyValues) -> Result<(KeyValues, (KeyValues, Value))> {
        let g = self.g;
        let dtype = self.options.cache_dtype;
        let new = KeyValues { keys: g.convert(new.keys, dtype)?, values: g.convert(new.values, dtype)? };
        let old = self.cache[&index];
        match kind {
            LayerKind::Full => {
                let (b, s) = (self.options.batch, self.options.capacity);
                let kept = self.in_place(old, new, self.start)?;
                if !self.options.past {
                    return Ok((kept, (self.seen(new)?, self.own_positions()?)));
                }
                // Rows behind the chunk are behind every query.
                let positions = g.iota(DType::I32, [b, s], 1)?;
                Ok((kept, (self.seen(kept)?, positions)))
            }
            LayerKind::Sliding if self.options.chunk == 1 => {
                let ring = self.options.ring;
                let row = g.rem(self.start, g.full_like(self.start, ring as f64)?)?;
                let kept = self.in_place(old, new, row)?;
                Ok((kept, (self.seen(kept)?, self.ring_positions(self.start)?)))
            }
            LayerKind::Sliding => self.write_ring(old, new),
        }
    }

    /// Keys and values as activations.
    fn seen(&self, kv: KeyValues) -> Result<KeyValues> {
        let convert = |x| self.g.convert(x, self.options.dtype);
        Ok(KeyValues { keys: convert(kv.keys)?, values: convert(kv.values)? })
    }

    /// Overwrites rows of each sequence from `row` `[b]` on.
    fn in_place(&self, old: KeyValues, new: KeyValues, row: Value) -> Result<KeyValues> {
        let g = self.g;
        let zero = g.scalar(DType::I32, 0.0)?;
        let write = |old: Value, new: Value| -> Result<Value> {
            let mut out = old;
            for i in 0..self.options.batch {
                let at = g.reshape(g.slice_dim(row, 0, i, i + 1)?, Shape::scalar())?;
                let sequence = g.scalar(DType::I32, i as f64)?;
                out = g.dynamic_update_slice(out, g.slice_dim(new, 0, i, i + 1)?, &[sequence, zero, at, zero])?;
            }
            Ok(out)
        };
        // Without the barrier the compiler computes the update once more for every reader, on a copy of the whole array.
        let kept = g.optimization_barrier(&[write(old.keys, new.keys)?, write(old.values, new.values)?])?;
        Ok(KeyValues { keys: kept[0], values: kept[1] })
    }

    /// The position in every row of a ring whose latest is `latest` `[b]`: `[b, ring]`, negative where there was none yet.
    fn ring_positions(&self, latest: Value) -> Result<Value> {
        let g = self.g;
        let shape: Shape = [self.options.batch, self.options.ring].into();
        let ring = g.splat(DType::I32, shape.clone(), self.options.ring as f64)?;
        let latest = g.broadcast_in_dim(latest, shape.clone(), &[0])?;
        // The remainder has the sign of its operand: bring it up to 0 .. ring.
        let behind = g.rem(g.sub(latest, g.iota(DType::I32, shape, 1)?)?, ring)?;
        let behind = g.rem(g.add(behind, ring)?, ring)?;
        g.sub(latest, behind)
    }

    /// Positions of the chunk's tokens, `[b, t]`, negative behind the last.
    fn own_positions(&self) -> Result<Value> {
        let g = self.g;
        let (b, t) = (self.options.batch, self.options.chunk);
        let offsets = g.iota(DType::I32, [b, t], 1)?;
        let counted = g.compare(Compare::Lt, offsets, g.broadcast_in_dim(self.count, [b, t], &[0])?)?;
        let own = g.add(offsets, g.broadcast_in_dim(self.start, [b, t], &[0])?)?;
        g.select(counted, own, g.full_like(own, -1.0)?)
    }

    /// A chunk sees the ring as it was, then itself; the ring gets the chunk's last tokens.
    fn write_ring(&self, old: KeyValues, new: KeyValues) -> Result<(KeyValues, (KeyValues, Value))> {
        let g = self.g;
        let CachedOptions { batch: b, chunk: t, ring, .. } = *self.options;
        let one = g.splat(DType::I32, [b], 1.0)?;
        let own = self.own_positions()?;
        let (visible, positions) = if self.options.past {
            let before = self.ring_positions(g.sub(self.start, one)?)?;
            let both = |old, new| g.concatenate(&[old, new], 2);
            let visible = KeyValues { keys: both(old.keys, new.keys)?, values: both(old.values, new.values)? };
            (visible, g.concatenate(&[before, own], 1)?)
        } else {
            (new, own)
        };

        let after = self.ring_positions(g.sub(g.add(self.start, self.count)?, one)?)?;
        let offset = g.sub(after, g.broadcast_in_dim(self.start, [b, ring], &[0])?)?;
        let zero = g.full_like(offset, 0.0)?;
        let replaced = g.compare(Compare::Ge, offset, zero)?;
        let first = g.mul_scalar(g.iota(DType::I32, [b, ring], 0)?, t as f64)?;
        let ids = g.add(g.max(offset, zero)?, first)?;
        let keep = |old: Value, new: Value| -> Result<Value> {
            let d = g.dims(new);
            let (k, e) = (d[1], d[3]);
            let rows = g.reshape(g.transpose(new, &[0, 2, 1, 3])?, [b * t, k, e])?;
            let new = g.transpose(g.take(rows, ids)?, &[0, 2, 1, 3])?;
            let replaced = g.broadcast_in_dim(replaced, [b, k, ring, e], &[0, 2])?;
            g.select(replaced, new, old)
        };
        let kept = KeyValues { keys: keep(old.keys, new.keys)?, values: keep(old.values, new.values)? };
        Ok((kept, (self.seen(visible)?, positions)))
    }
}
