//! Forward runs of a model on one device or a mesh of them: weights placed once, programs compiled once for every shape.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use gemma4::Layout;
use gemma4::forward::{FINAL, ForwardOptions, Trace, body_params, forward_program, head_program, sharding_of};
use gemma4::params::{EMBED_TOKENS, EMBED_TOKENS_PER_LAYER};
use graph::{Mesh, Sharding};
use half::{bf16, f16};
use pjrt::{Buffer, Executable, Placement};
use rayon::prelude::*;
use tensor::{DType, HostArray, ParamSpec, Shape};

use crate::rows::RowTable;
use crate::runtime::compile_options;
use crate::shards::{self, Sharded, cut};
use crate::{EngineError, Model, Result, Runtime};

/// Rows of hidden states that go through the head at once: their f32 logits take 128 x 262144 x 4 = 128 MiB.
pub const HEAD_ROWS: usize = 128;

/// Token sequences of one length.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// Sequences.
    pub batch: usize,
    /// Positions of each.
    pub seq: usize,
    /// `[batch, seq]`, row-major.
    pub ids: Vec<i32>,
    /// `[batch, seq]`: positions of different segments do not see each other; 0 is padding by convention.
    pub segments: Option<Vec<i32>>,
}

/// What a forward run gave.
#[derive(Debug)]
pub struct Hidden {
    /// `[batch, seq, hidden]` after the last norm, in the activation dtype.
    pub last: HostArray,
    /// Intermediate values by name (`hidden.3`, `ple`, ...), in the activation dtype.
    pub trace: BTreeMap<String, HostArray>,
}

/// How weights came to the device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Placed {
    /// Tensors used in place in the mapped file.
    pub mapped: usize,
    /// Their bytes.
    pub mapped_bytes: usize,
    /// Tensors copied to aligned memory (or converted).
    pub copied: usize,
    /// Their bytes.
    pub copied_bytes: usize,
    /// Bytes of the per-layer table that went to a temporary file, because its rows cannot be used where they are stored.
    pub spooled_bytes: u64,
}

impl Placed {
    /// Counts one tensor.
    pub(crate) fn count(&mut self, placement: Placement, size: usize) {
        let (count, bytes) = match placement {
            Placement::ZeroCopy => (&mut self.mapped, &mut self.mapped_bytes),
            Placement::Copied => (&mut self.copied, &mut self.copied_bytes),
        };
        *count += 1;
        *bytes += size;
    }
}

/// Time spent on programs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CompileTimes {
    /// Programs.
    pub programs: usize,
    /// Of them, from the cache.
    pub cached: usize,
    /// In total.
    pub total: Duration,
}

/// A model with its weights on its devices, ready to run.
#[derive(Debug)]
pub struct Session<'r> {
    runtime: &'r Runtime,
    model: Arc<Model>,
    dtype: DType,
    /// Layers written out, on the mesh if there is one.
    layout: Layout,
    mesh: Mesh,
    weights: HashMap<String, Sharded>,
    rows: Option<RowTable>,
    placed: Placed,
    programs: Mutex<Programs>,
}

#[derive(Debug, Default)]
struct Programs {
    body: HashMap<(usize, usize, bool, Trace), Arc<Body>>,
    head: HashMap<usize, Arc<Executable>>,
    times: CompileTimes,
}

impl<'r> Session<'r> {
    /// Places every weight the forward pass reads on the device. The per-layer table stays mapped on the host.
    ///
    /// Weights wider than the activations are converted on the way, as transformers does; narrower ones stay as they are and
    /// are widened inside the program.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn new(runtime: &'r Runtime, model: Arc<Model>, dtype: DType) -> Result<Self> {
        let layout = Layout::unrolled(model.arch());
        Self::on(runtime, model, dtype, layout)
    }

    /// The same on the mesh of a layout with layers written out: every device gets its part of every weight, straight from the
    /// file.
    ///
    /// # Errors
    /// When the layout has loops, or a device has no room.
    pub fn on(runtime: &'r Runtime, model: Arc<Model>, dtype: DType, layout: Layout) -> Result<Self> {
        if layout.has_loops() {
            return Err(EngineError::Input("layers must be written out".into()));
        }
        if !matches!(dtype, DType::F32 | DType::F64 | DType::BF16) {
            return Err(EngineError::Input(format!("activations in {dtype} are not offered; use float32 or bfloat16")));
        }
        let params: Vec<ParamSpec> = body_params(model.arch()).collect();
        let arrays: Vec<(String, Sharded, Placement)> = params
            .into_par_iter()
            .map(|p| {
                let (array, placement) = place_on(runtime, &model, &layout, &p, dtype)?;
                Ok((p.name, array, placement))
            })
            .collect::<Result<_>>()?;
        let mut placed = Placed::default();
        let mut weights = HashMap::with_capacity(arrays.len());
        for (name, array, placement) in arrays {
            placed.count(placement, array.size_in_bytes());
            weights.insert(name, array);
        }
        let rows = match model.arch().per_layer_input() {
            Some(_) => Some(RowTable::new(&model, EMBED_TOKENS_PER_LAYER)?),
            None => None,
        };
        placed.spooled_bytes = rows.as_ref().map_or(0, RowTable::spooled);
        let mesh = layout.mesh();
        Ok(Session { runtime, model, dtype, layout, mesh, weights, rows, placed, programs: Mutex::default() })
    }

    /// The model.
    #[must_use]
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The activation dtype.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// How the weights came to the device.
    #[must_use]
    pub fn placed(&self) -> Placed {
        self.placed
    }

    /// What the programs took so far.
    #[must_use]
    pub fn compile_times(&self) -> CompileTimes {
        self.programs.lock().unwrap_or_else(PoisonError::into_inner).times
    }

    /// Runs the decoder.
    ///
    /// # Errors
    /// When an id is outside the vocabulary, lengths disagree, or the device fails.
    pub fn forward(&self, batch: &Batch, trace: Trace) -> Result<Hidden> {
        self.check(batch)?;
        let body = self.body_program(batch, trace)?;
        let shape: Shape = [batch.batch, batch.seq].into();
        let int_input =
            |values: &[i32]| -> Result<Sharded> { self.hand_over(HostArray::from_slice(shape.clone(), values)?) };
        let mut inputs = vec![int_input(&batch.ids)?];
        if let Some(rows) = &self.rows {
            // Ids were checked above.
            let rows = rows.gather(&batch.ids, [batch.batch, batch.seq, rows.columns()])?;
            inputs.push(self.hand_over(rows)?);
        }
        if let Some(segments) = &batch.segments {
            inputs.push(int_input(segments)?);
        }
        let arguments: Vec<&Sharded> =
            inputs.iter().chain(body_params(self.model.arch()).map(|p| &self.weights[&p.name])).collect();
        let outputs = shards::execute(&body.executable, &arguments)?;
        let mut trace: BTreeMap<String, HostArray> = BTreeMap::new();
        let mut last = None;
        for (name, buffer) in body.outputs.iter().zip(outputs) {
            let host = first(&buffer)?.to_host()?;
            if name == FINAL {
                last = Some(host.clone());
            }
            trace.insert(name.clone(), host);
        }
        let last = last.ok_or_else(|| EngineError::Input("the program gave no final hidden state".into()))?;
        Ok(Hidden { last, trace })
    }

    /// Logits of some rows of a final hidden state seen as `[batch * seq, hidden]`: calls `each(row, logits)` for every one,
    /// in order, a block of rows at a time, so that memory stays bounded.
    ///
    /// # Errors
    /// When a row is out of range, the device fails, or `each` does.
    pub fn logits(
        &self,
        last: &HostArray,
        rows: &[usize],
        mut each: impl FnMut(&[usize], &[f32]) -> Result<()>,
    ) -> Result<()> {
        let d = self.model.arch().hidden_size();
        let width = d * self.dtype.size();
        let total = last.bytes().len() / width.max(1);
        if let Some(&row) = rows.iter().find(|&&r| r >= total) {
            return Err(EngineError::Input(format!("row {row} asked for, there are {total}")));
        }
        let block = rows.len().min(HEAD_ROWS);
        for chunk in rows.chunks(block.max(1)) {
            let head = self.head_program(block)?;
            let mut hidden = HostArray::zeros(self.dtype, [block, d])?;
            for (i, &row) in chunk.iter().enumerate() {
                hidden.bytes_mut()[i * width..(i + 1) * width]
                    .copy_from_slice(&last.bytes()[row * width..(row + 1) * width]);
            }
            let x = self.hand_over(hidden)?;
            let out = shards::execute(&head, &[&x, &self.weights[EMBED_TOKENS]])?;
            let logits = first(out.first().map_or(&[], Vec::as_slice))?.to_host()?;
            let v = self.model.arch().vocab_size();
            each(chunk, &logits.as_slice::<f32>()?[..chunk.len() * v])?;
        }
        Ok(())
    }

    /// A host array, whole on every device.
    fn hand_over(&self, host: HostArray) -> Result<Sharded> {
        let (dtype, shape) = (host.dtype(), host.shape().clone());
        let mesh = &self.mesh;
        let sharding = Sharding::replicated(shape.rank());
        match mesh.devices() {
            1 => {
                let client = self.runtime.client();
                let buffer = client.buffer_from_owned(host, 0)?.0;
                Sharded::new(client, mesh, (dtype, &shape), sharding, vec![buffer])
            }
            _ => Sharded::from_host(self.runtime.client(), mesh, &host, &sharding),
        }
    }

    fn check(&self, batch: &Batch) -> Result<()> {
        let n = batch.batch * batch.seq;
        if n == 0 || batch.ids.len() != n || batch.segments.as_ref().is_some_and(|s| s.len() != n) {
            return Err(EngineError::Input(format!(
                "{} token ids for {} sequences of {} tokens",
                batch.ids.len(),
                batch.batch,
                batch.seq
            )));
        }
        let v = self.model.arch().vocab_size();
        if let Some((i, id)) = batch.ids.iter().enumerate().find(|&(_, &id)| id < 0 || id as usize >= v) {
            return Err(EngineError::Input(format!(
                "token {id} at position {} of sequence {} is outside the vocabulary of {v}",
                i % batch.seq,
                i / batch.seq
            )));
        }
        Ok(())
    }

    /// The dtype a weight has on the device.
    fn placed_dtype(&self, name: &str) -> DType {
        // The per-layer table is not placed; its rows come as they are stored.
        let rows = || self.rows.as_ref().map_or(self.dtype, RowTable::dtype);
        self.weights.get(name).map_or_else(rows, Sharded::dtype)
    }

    fn body_program(&self, batch: &Batch, trace: Trace) -> Result<Arc<Body>> {
        let mut programs = self.programs.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (batch.batch, batch.seq, batch.segments.is_some(), trace);
        if let Some(body) = programs.body.get(&key) {
            return Ok(body.clone());
        }
        let options = ForwardOptions {
            batch: batch.batch,
            seq: batch.seq,
            dtype: self.dtype,
            segments: batch.segments.is_some(),
            positions: false,
            trace,
        };
        let program = forward_program(self.model.arch(), &self.layout, &options, &|name| self.placed_dtype(name))?;
        let outputs = program.outputs.iter().map(|o| o.name.clone()).collect();
        let executable = programs.compile(self.runtime, &program, self.dtype)?;
        let body = Arc::new(Body { executable, outputs });
        programs.body.insert(key, body.clone());
        Ok(body)
    }

    fn head_program(&self, rows: usize) -> Result<Arc<Executable>> {
        let mut programs = self.programs.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(executable) = programs.head.get(&rows) {
            return Ok(executable.clone());
        }
        let stored = |name: &str| self.placed_dtype(name);
        let program = head_program(self.model.arch(), &self.layout, rows, self.dtype, &stored)?;
        let executable = programs.compile(self.runtime, &program, self.dtype)?;
        programs.head.insert(rows, executable.clone());
        Ok(executable)
    }
}

/// A compiled decoder and the names of its outputs.
#[derive(Debug)]
struct Body {
    executable: Arc<Executable>,
    outputs: Vec<String>,
}

impl Programs {
    fn compile(&mut self, runtime: &Runtime, program: &graph::Program, dtype: DType) -> Result<Arc<Executable>> {
        let devices = program.mesh().map_or(1, Mesh::devices);
        let compiled = runtime.compile(program, &compile_options(dtype).partitioned(devices))?;
        self.times.programs += 1;
        self.times.cached += usize::from(compiled.cached);
        self.times.total += compiled.time;
        Ok(Arc::new(compiled.executable))
    }
}

/// A result that is whole on every device.
fn first(parts: &[Buffer]) -> Result<&Buffer> {
    parts.first().ok_or_else(|| EngineError::Input("the program gave fewer results than it should".into()))
}

/// Puts a weight on the devices of a layout.
fn place_on(
    runtime: &Runtime,
    model: &Model,
    layout: &Layout,
    p: &ParamSpec,
    dtype: DType,
) -> Result<(Sharded, Placement)> {
    let mesh = layout.mesh();
    let sharding = sharding_of(layout, p);
    if mesh.devices() == 1 {
        let (buffer, placement) = place(runtime, model, &p.name, dtype)?;
        let what = (buffer.dtype(), &p.shape);
        let array = Sharded::new(runtime.client(), &mesh, what, sharding, vec![buffer])?;
        return Ok((array, placement));
    }
    let client = runtime.client();
    let view = model.mapped(&p.name);
    let read;
    let (from, bytes) = match &view {
        Some(view) => (view.dtype, view.bytes.as_slice()),
        None => {
            read = model.read(&p.name)?;
            (read.dtype(), read.bytes())
        }
    };
    let to = placed_as(from, dtype);
    let array = Sharded::place(client, &mesh, (to, &p.shape), &sharding, shards::Memory::Host, &mut |bounds| {
        let part = cut(bytes, from, &p.shape, bounds)?;
        if to == from { Ok(part) } else { narrow(from, part.bytes(), part.shape().clone(), to) }
    })?;
    if let Some(view) = view {
        // The copies are what runs; the file's pages would only count twice.
        view.bytes.advise_dont_need();
    }
    Ok((array, Placement::Copied))
}

/// The dtype that a stored weight has on the device, for activations in `dtype`.
pub(crate) fn placed_as(stored: DType, dtype: DType) -> DType {
    if stored.size() > dtype.size() || (dtype == DType::BF16 && stored != dtype) { dtype } else { stored }
}

/// Puts one weight on the device: in place where the file aligns it, else in aligned memory.
pub(crate) fn place(runtime: &Runtime, model: &Model, name: &str, dtype: DType) -> Result<(Buffer, Placement)> {
    let client = runtime.client();
    let too_wide = |d: DType| placed_as(d, dtype) != d;
    let Some(view) = model.mapped(name) else {
        let read = model.read(name)?;
        let from = read.dtype();
        let read = if too_wide(from) { narrow(from, read.bytes(), read.shape().clone(), dtype)? } else { read };
        return Ok((client.buffer_from_owned(read, 0)?.0, Placement::Copied));
    };
    let bytes = view.bytes.as_slice();
    if too_wide(view.dtype) {
        let converted = narrow(view.dtype, bytes, view.shape.clone(), dtype)?;
        view.bytes.advise_dont_need();
        let (buffer, _) = client.buffer_from_owned(converted, 0)?;
        return Ok((buffer, Placement::Copied));
    }
    if bytes.as_ptr().addr().is_multiple_of(pjrt::ZERO_COPY_ALIGNMENT) {
        let owner: pjrt::Owner = Arc::new(view.bytes.clone());
        return Ok(client.buffer_from_mapped(owner, 0..bytes.len(), view.dtype, &view.shape, 0)?);
    }
    let copy = HostArray::from_bytes(view.dtype, view.shape.clone(), bytes)?;
    // The copy is what runs; the file's pages would only count twice.
    view.bytes.advise_dont_need();
    let (buffer, _) = client.buffer_from_owned(copy, 0)?;
    Ok((buffer, Placement::Copied))
}

/// Converts floats to `to`, bf16 or f32, rounding to nearest even.
pub(crate) fn narrow(from: DType, bytes: &[u8], shape: Shape, to: DType) -> Result<HostArray> {
    // Files align nothing, so elements are read byte by byte.
    let widen: fn(&[u8]) -> f32 = match from {
        DType::F32 => |b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]),
        DType::BF16 => |b| bf16::from_le_bytes([b[0], b[1]]).to_f32(),
        DType::F16 => |b| f16::from_le_bytes([b[0], b[1]]).to_f32(),
        other => return Err(EngineError::Input(format!("weights in {other} are not read"))),
    };
    let mut out = HostArray::zeros(to, shape)?;
    let source = bytes.chunks_exact(from.size());
    match to {
        DType::BF16 => {
            for (o, b) in out.as_mut_slice::<bf16>()?.iter_mut().zip(source) {
                *o = bf16::from_f32(widen(b));
            }
        }
        _ => {
            for (o, b) in out.as_mut_slice::<f32>()?.iter_mut().zip(source) {
                *o = widen(b);
            }
        }
    }
    Ok(out)
}
