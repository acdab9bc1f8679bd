//! Decoding with a cache: prompts go in by chunks of a few sizes, then one token of every sequence at a time.

mod chunks;
mod matrices;
mod programs;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use gemma4::LayerKind;
use gemma4::cached::{CacheArray, CachedOptions, cache_arrays, input, ring};
use gemma4::forward::body_params;
use gemma4::params::{EMBED_TOKENS, EMBED_TOKENS_PER_LAYER};
use pjrt::Buffer;
use tensor::{DType, HostArray, Shape};

pub use chunks::CHUNKS;
use chunks::{capacity_for, next_chunk};
use matrices::Matrices;
pub use matrices::{Alike, matrices_by_role};
use programs::Programs;

use crate::forward::{CompileTimes, Placed, place, placed_as};
use crate::generate::{LanguageModel, check_feed};
pub use crate::quantized::Quantization;
use crate::rows::RowTable;
use crate::{EngineError, Model, Result, Runtime};

/// How a model is decoded.
#[derive(Debug, Clone)]
pub struct DecodeOptions {
    /// Sequences that run side by side.
    pub sequences: usize,
    /// Most tokens of each.
    pub context: usize,
    /// Dtype of activations and cache: `F32` to prove, `BF16` for speed.
    pub dtype: DType,
    /// Sizes of the chunks in which prompts go in, smallest first; the first is 1.
    pub chunks: Vec<usize>,
    /// What multiplies few rows of activations with weights.
    pub products: Products,
    /// Weights of those products are quantized to this; longer chunks of prompts use them as stored. Where they are stored
    /// quantized, that is what all products use, and this may only name the same.
    pub quantize: Option<Quantization>,
}

/// What multiplies few rows of activations with weights, as every decode step does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Products {
    /// The `kernels` crate on a CPU, else the program.
    Auto,
    /// The `kernels` crate: weights stay where they are and are read at the speed of memory.
    Kernels,
    /// The program, like any other product.
    Program,
}

/// Rows of activations up to which the kernels multiply.
const CALLED_ROWS: usize = 16;

impl Default for DecodeOptions {
    fn default() -> Self {
        DecodeOptions {
            sequences: 1,
            context: 8192,
            dtype: DType::BF16,
            chunks: CHUNKS.to_vec(),
            products: Products::Auto,
            quantize: None,
        }
    }
}

/// What a cache takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheFigures {
    /// Layers that own keys and values.
    pub owners: usize,
    /// Bytes now.
    pub bytes: usize,
    /// Of them, the rings of sliding layers, which do not grow.
    pub ring_bytes: usize,
    /// Bytes of one more token of one sequence in the layers that keep all.
    pub bytes_per_token: usize,
}

/// A model with a cache for some sequences.
#[derive(Debug)]
pub struct Decoder<'r> {
    runtime: &'r Runtime,
    model: Arc<Model>,
    options: DecodeOptions,
    embed: RowTable,
    per_layer: Option<RowTable>,
    /// Parameters that are arrays on the device, as programs come to need them.
    weights: HashMap<String, Buffer>,
    placed: Placed,
    /// Parameters outside of programs.
    matrices: Option<Matrices>,
    programs: Programs,
    cache: Vec<Buffer>,
    /// Positions that the arrays of full layers hold.
    capacity: usize,
    lengths: Vec<usize>,
    /// A program to be compiled behind, once a prompt has been fed.
    next: Option<CachedOptions>,
}

/// When the program for decode steps is compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Steps {
    /// As soon as the program for the prompt is there, behind: for a prompt that is not there yet.
    BeforePrompt,
    /// Behind, when the prompt has been fed: the first token shares the processors with nothing.
    AfterPrompt,
}

impl<'r> Decoder<'r> {
    /// Prepares a model; nothing is compiled yet.
    ///
    /// # Errors
    /// When the options make no sense or the tables cannot be read.
    pub fn new(runtime: &'r Runtime, model: Arc<Model>, options: DecodeOptions) -> Result<Self> {
        let bad = |m: String| Err(EngineError::Input(m));
        if !matches!(options.dtype, DType::F32 | DType::BF16) {
            return bad(format!("decoding in {} is not offered; use float32 or bfloat16", options.dtype));
        }
        if options.sequences == 0 || options.context == 0 || options.context > MAX_CONTEXT {
            return bad(format!(
                "{} sequences of {} tokens: there must be at least one, of 1 to {MAX_CONTEXT} tokens",
                options.sequences, options.context
            ));
        }
        if options.chunks.first() != Some(&1) || !options.chunks.is_sorted_by(|a, b| a < b) {
            return bad(format!("chunk sizes {:?} must begin with 1 and grow", options.chunks));
        }
        // The head streams the table from the same pages, so they are read ahead as usual.
        let embed = RowTable::streamed(&model, EMBED_TOKENS)?;
        let per_layer = match model.arch().per_layer_input() {
            Some(_) => Some(RowTable::new(&model, EMBED_TOKENS_PER_LAYER)?),
            None => None,
        };
        let spooled = embed.spooled() + per_layer.as_ref().map_or(0, RowTable::spooled);
        let mut placed = Placed { spooled_bytes: spooled, ..Placed::default() };
        let kernels = match options.products {
            Products::Auto => runtime.client().platform_name() == "cpu",
            Products::Kernels => true,
            Products::Program => false,
        };
        let quantize = model.quantization(options.quantize)?;
        if quantize.is_some() && !kernels {
            return bad("quantized weights are multiplied with on a CPU only, and not by the program".into());
        }
        let matrices = match kernels {
            true => Some(Matrices::new(runtime, &model, options.dtype, quantize, &mut placed)?),
            false => None,
        };
        let lengths = vec![0; options.sequences];
        let mut decoder = Decoder {
            runtime,
            model,
            options,
            embed,
            per_layer,
            weights: HashMap::new(),
            placed,
            matrices,
            programs: Programs::default(),
            cache: Vec::new(),
            capacity: 0,
            lengths,
            next: None,
        };
        decoder.grow(1)?;
        Ok(decoder)
    }

    /// Changes how many tokens a sequence may have, before any are fed. What has been prepared stays. Whether that is possible: with
    /// rings of another size everything would have to be made anew.
    pub fn set_context(&mut self, context: usize) -> bool {
        let ring = |context: usize| ring(self.model.arch(), capacity_for(context));
        let fits = (1..=MAX_CONTEXT).contains(&context)
            && ring(context) == ring(self.options.context)
            && self.lengths.iter().all(|&n| n == 0);
        if fits {
            self.options.context = context;
        }
        fits
    }

    /// The model.
    #[must_use]
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// How the weights came to the device, as far as programs needed them yet.
    #[must_use]
    pub fn placed(&self) -> Placed {
        self.placed
    }

    /// What the programs took so far.
    #[must_use]
    pub fn compile_times(&self) -> CompileTimes {
        self.programs.times()
    }

    /// What the cache takes.
    #[must_use]
    pub fn cache_figures(&self) -> CacheFigures {
        let arch = self.model.arch();
        let arrays = cache_arrays(arch, self.options.sequences, self.capacity, self.ring());
        let size = self.options.dtype.size();
        let full = |a: &&CacheArray| a.kind == LayerKind::Full;
        let ring_bytes = arrays.iter().filter(|a| !full(a)).map(|a| a.shape.elements() * size).sum();
        let per_token = arrays.iter().filter(full).map(|a| a.shape.dims()[1] * a.shape.dims()[3] * size).sum();
        CacheFigures {
            owners: arrays.len() / 2,
            bytes: arrays.iter().map(|a| a.shape.elements() * size).sum(),
            ring_bytes,
            bytes_per_token: per_token,
        }
    }

    /// Bytes of weights that a decode step reads: every matrix but the per-layer table, of which it reads a row.
    #[must_use]
    pub fn bytes_per_step(&self) -> usize {
        let read = body_params(self.model.arch());
        if let Some(matrices) = &self.matrices {
            return matrices.bytes();
        }
        let size = |name: &str| self.model.dtype(name).map_or(0, |d| placed_as(d, self.options.dtype).size());
        read.map(|p| p.shape.elements() * size(&p.name)).sum()
    }

    /// Compiles the programs for prompts of about `tokens` tokens and for decode steps, so that the first of either need not
    /// wait. Returns how long it took.
    ///
    /// # Errors
    /// When a program does not compile or weights cannot be placed.
    pub fn prepare(&mut self, tokens: usize) -> Result<Duration> {
        let start = std::time::Instant::now();
        let mut wanted = self.for_prompt(tokens)?;
        wanted.push(self.cached_options(1, true, true));
        self.compile(&wanted)?;
        Ok(start.elapsed())
    }

    /// As [`Decoder::prepare`], but the program for decode steps is compiled behind, before or after the prompt: the first
    /// step waits for it, if it is not there by then.
    ///
    /// # Errors
    /// When a program does not compile or weights cannot be placed.
    pub fn prepare_prompt(&mut self, tokens: usize, steps: Steps) -> Result<Duration> {
        let start = std::time::Instant::now();
        let wanted = self.for_prompt(tokens)?;
        let step = self.cached_options(1, true, true);
        self.compile(&wanted)?;
        self.next = Some(step).filter(|step| !wanted.contains(step));
        if steps == Steps::BeforePrompt {
            self.begin_next();
        }
        Ok(start.elapsed())
    }

    /// Begins to compile what is to be compiled behind.
    fn begin_next(&mut self) {
        if let Some(options) = self.next.take() {
            self.programs.begin(self.runtime.compiler(), &self.model, options, self.stored());
        }
    }

    /// The programs for a prompt of so many tokens, for which there is room then.
    fn for_prompt(&mut self, tokens: usize) -> Result<Vec<CachedOptions>> {
        let mut left = tokens.min(self.options.context);
        self.grow(self.needed(&vec![left; self.options.sequences]))?;
        let mut wanted = Vec::new();
        let mut past = false;
        while left > 0 {
            let chunk = next_chunk(&self.options.chunks, left);
            left -= left.min(chunk);
            let options = self.cached_options(chunk, past, left == 0);
            if !wanted.contains(&options) {
                wanted.push(options);
            }
            past = true;
        }
        Ok(wanted)
    }

    /// The dtype of a parameter as programs take it, and of the token table's rows.
    fn stored(&self) -> impl Fn(&str) -> DType + Send + Sync + 'static {
        let (model, dtype) = (Arc::clone(&self.model), self.options.dtype);
        let (rows, per_layer) = (self.embed.dtype(), self.per_layer.as_ref().map(RowTable::dtype));
        move |name: &str| match (name, per_layer) {
            (input::EMBED_ROWS, _) => rows,
            (EMBED_TOKENS_PER_LAYER, Some(stored)) => stored,
            // Names are those of the parameter table.
            _ => model.dtype(name).map_or(dtype, |d| placed_as(d, dtype)),
        }
    }

    fn ring(&self) -> usize {
        // Rounded, so that programs serve many contexts.
        ring(self.model.arch(), capacity_for(self.options.context))
    }

    /// Positions that full layers must hold to feed so many tokens.
    fn needed(&self, tokens: &[usize]) -> usize {
        let mut most = 0;
        for (&length, &fed) in self.lengths.iter().zip(tokens) {
            most = most.max(length + fed);
        }
        // A chunk's last rows may stand behind its tokens; they are written all the same.
        let longest = tokens.iter().copied().max().unwrap_or(0);
        most + next_chunk(&self.options.chunks, longest)
    }

    /// Makes room for `positions` positions in full layers. What the cache holds stays.
    fn grow(&mut self, positions: usize) -> Result<()> {
        if positions <= self.capacity {
            return Ok(());
        }
        let capacity = capacity_for(positions);
        let client = self.runtime.client();
        let arrays = cache_arrays(self.model.arch(), self.options.sequences, capacity, self.ring());
        let same = |old: &Buffer, shape: &Shape| old.shape() == shape;
        // Everything that can fail comes before anything changes.
        let mut made = Vec::with_capacity(arrays.len());
        for (i, array) in arrays.iter().enumerate() {
            made.push(match self.cache.get(i) {
                Some(old) if same(old, &array.shape) => None,
                Some(old) => Some(client.buffer_from_host(&widened(&old.to_host()?, &array.shape)?, 0)?),
                None => Some(client.buffer_from_host(&HostArray::zeros(self.options.dtype, array.shape.clone())?, 0)?),
            });
        }
        let old = std::mem::take(&mut self.cache).into_iter().map(Some).chain(std::iter::repeat_with(|| None));
        self.cache = made.into_iter().zip(old).filter_map(|(new, old)| new.or(old)).collect();
        self.capacity = capacity;
        Ok(())
    }

    fn cached_options(&self, chunk: usize, past: bool, logits: bool) -> CachedOptions {
        CachedOptions {
            batch: self.options.sequences,
            chunk,
            capacity: self.capacity,
            ring: self.ring(),
            dtype: self.options.dtype,
            cache_dtype: self.options.dtype,
            // A step has one program.
            past: chunk == 1 || past,
            logits,
            called_rows: match &self.matrices {
                // There is nothing else to multiply with.
                Some(_) if self.model.weights().stored.is_some() => usize::MAX,
                Some(_) => CALLED_ROWS,
                None => 0,
            },
            called_steps: chunk == 1
                && self.matrices.is_some()
                && self.options.sequences <= CALLED_ROWS
                && ::kernels::has_wide_products(),
        }
    }

    /// Compiles programs and places the weights they read, so far as that is not done yet.
    fn compile(&mut self, wanted: &[CachedOptions]) -> Result<()> {
        let dtype = self.options.dtype;
        let (stored, compiler) = (self.stored(), self.runtime.compiler());
        for (options, fed) in self.programs.compile(compiler, self.model.arch(), wanted, &stored)? {
            for name in &fed.params {
                if !self.weights.contains_key(name) {
                    let (buffer, placement) = place(self.runtime, &self.model, name, dtype)?;
                    self.placed.count(placement, buffer.size_in_bytes());
                    self.weights.insert(name.clone(), buffer);
                }
            }
            self.programs.insert(options, fed);
        }
        Ok(())
    }

    /// One chunk. Returns `[sequences, vocab]` logits where they are wanted.
    fn run(&mut self, tokens: &[&[i32]], chunk: usize, logits: bool) -> Result<Option<HostArray>> {
        let past = self.lengths.iter().any(|&l| l > 0);
        let options = self.cached_options(chunk, past, logits);
        let missing = || EngineError::Input("a program over a cache lacks an array".into());
        let fed = match self.programs.get(&options) {
            Some(fed) => fed,
            None => {
                self.compile(&[options])?;
                self.programs.get(&options).ok_or_else(missing)?
            }
        };
        let client = self.runtime.client();
        let n = self.options.sequences;
        let mut ids = Vec::with_capacity(n * chunk);
        for &t in tokens {
            ids.extend_from_slice(t);
            ids.resize(ids.len() + chunk - t.len(), 0);
        }
        let ints = |values: Vec<i32>| -> Result<Buffer> {
            Ok(client.buffer_from_host(&HostArray::from_slice([n], &values)?, 0)?)
        };
        let as_i32 = |n: usize| i32::try_from(n).unwrap_or(i32::MAX);
        let embed = self.embed.gather(&ids, [n, chunk, self.embed.columns()])?;
        let mut inputs = vec![client.buffer_from_owned(embed, 0)?.0];
        if let Some(table) = &self.per_layer {
            inputs.push(client.buffer_from_owned(table.gather(&ids, [n, chunk, table.columns()])?, 0)?.0);
        }
        inputs.push(ints(self.lengths.iter().map(|&l| as_i32(l)).collect())?);
        inputs.push(ints(tokens.iter().map(|t| as_i32(t.len())).collect())?);
        let weights =
            fed.params.iter().map(|name| self.weights.get(name).ok_or_else(missing)).collect::<Result<Vec<_>>>()?;
        let session = self.matrices.iter().map(|m| &m.id);
        let arguments: Vec<&Buffer> = inputs.iter().chain(session).chain(&self.cache).chain(weights).collect();
        let mut outputs = match fed.executable.execute(&arguments) {
            Ok(outputs) => outputs,
            Err(error) => {
                // The arrays were given away: what the slots held is lost.
                self.cache.clear();
                self.capacity = 0;
                self.lengths.fill(0);
                self.grow(1)?;
                return Err(error.into());
            }
        };
        let rows = if logits { Some(outputs.pop().ok_or_else(missing)?) } else { None };
        self.cache = outputs;
        for (length, t) in self.lengths.iter_mut().zip(tokens) {
            *length += t.len();
        }
        Ok(rows.map(|r| r.to_host()).transpose()?)
    }
}

/// Longest context that is accepted: what the models are trained for is less.
pub const MAX_CONTEXT: usize = 1 << 20;

/// The same values in an array with more positions.
fn widened(old: &HostArray, shape: &Shape) -> Result<HostArray> {
    let mut new = HostArray::zeros(old.dtype(), shape.clone())?;
    let row = |s: &Shape| s.dims()[2..].iter().product::<usize>() * old.dtype().size();
    let (from, to) = (row(old.shape()), row(shape));
    if from > 0 && to >= from {
        for (n, o) in new.bytes_mut().chunks_mut(to).zip(old.bytes().chunks(from)) {
            n[..from].copy_from_slice(o);
        }
    }
    Ok(new)
}

impl LanguageModel for Decoder<'_> {
    fn sequences(&self) -> usize {
        self.options.sequences
    }

    fn vocab_size(&self) -> usize {
        self.model.arch().vocab_size()
    }

    fn lengths(&self) -> &[usize] {
        &self.lengths
    }

    fn context(&self) -> usize {
        self.options.context
    }

    fn compiling(&self) -> Duration {
        self.programs.times().total
    }

    fn bytes_per_step(&self) -> Option<usize> {
        self.matrices.as_ref().map(Matrices::bytes)
    }

    fn feed(&mut self, tokens: &[&[i32]]) -> Result<Vec<f32>> {
        check_feed(self, tokens)?;
        let vocab = self.vocab_size();
        let mut logits = vec![0f32; tokens.len() * vocab];
        let counts: Vec<usize> = tokens.iter().map(|t| t.len()).collect();
        self.grow(self.needed(&counts))?;
        let mut left: Vec<&[i32]> = tokens.to_vec();
        loop {
            let longest = left.iter().map(|t| t.len()).max().unwrap_or(0);
            if longest == 0 {
                self.begin_next();
                return Ok(logits);
            }
            let chunk = next_chunk(&self.options.chunks, longest);
            let now: Vec<&[i32]> = left.iter().map(|t| &t[..t.len().min(chunk)]).collect();
            for (l, n) in left.iter_mut().zip(&now) {
                *l = &l[n.len()..];
            }
            let ends = |slot: usize| !now[slot].is_empty() && left[slot].is_empty();
            let wanted = (0..now.len()).any(ends);
            if let Some(rows) = self.run(&now, chunk, wanted)? {
                let rows = rows.as_slice::<f32>()?;
                for slot in (0..now.len()).filter(|&s| ends(s)) {
                    let row = slot * vocab..(slot + 1) * vocab;
                    logits[row.clone()].copy_from_slice(&rows[row]);
                }
            }
        }
    }

    fn reset(&mut self) {
        // What is left in the arrays lies behind every query until it is written over.
        self.lengths.fill(0);
    }
}
