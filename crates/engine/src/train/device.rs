//! The state of a run on a device: parameters, moments, programs.

use std::sync::Arc;
use std::time::Duration;

use gemma4::layout::Slot;
use gemma4::params::EMBED_TOKENS_PER_LAYER;
use graph::Program;
use pjrt::{Buffer, CompileOptions, Executable, MemoryFigures};
use tensor::{DType, HostArray, Shape};

use super::TrainError;
use super::plan::Plan;
use super::step::{PerLayerTable, Scalars, StepOptions, StepSums, eval_program, step_program};
use crate::data::TokenBatch;
use crate::runtime::{Compiled, Runtime};
use crate::{EngineError, Model};

type Result<T> = std::result::Result<T, TrainError>;

/// Where parameters come from: by Hugging Face name, in its shape, in any float dtype.
pub(crate) type Source<'a> = dyn Fn(&str) -> Result<HostArray> + Sync + 'a;

/// A per-layer table that stays on the host.
enum HostTable {
    /// In place in a mapped file.
    Mapped(Arc<Model>),
    /// In memory.
    Owned(HostArray),
}

/// A run's arrays on a device and the programs that change them.
pub struct Device<'r> {
    runtime: &'r Runtime,
    plan: Plan,
    params: Vec<Buffer>,
    /// First moments of the trained slots, then second ones, as far as the optimizer has them.
    moments: Vec<Buffer>,
    table: Option<HostTable>,
    step: Executable,
    eval: Option<Executable>,
}

impl std::fmt::Debug for Device<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Device").field("params", &self.params.len()).finish_non_exhaustive()
    }
}

/// What compiling took.
#[derive(Debug, Clone, Copy)]
pub struct CompileReport {
    /// Time to build, print and compile the program, or to load it from the cache.
    pub time: Duration,
    /// Whether it came from the cache.
    pub cached: bool,
    /// What the compiler says of memory.
    pub memory: Option<MemoryFigures>,
}

impl<'r> Device<'r> {
    /// Compiles the step and places parameters; moments are zero. `model` is asked for a table that stays on the host.
    pub(crate) fn new(
        runtime: &'r Runtime,
        plan: Plan,
        source: &Source<'_>,
        moments: Option<&Source<'_>>,
        model: Option<&Arc<Model>>,
    ) -> Result<(Self, CompileReport)> {
        let start = std::time::Instant::now();
        let program = step_program(&plan.arch, &plan.layout, &plan.step, &|s| plan.role(s))?;
        let Compiled { executable, cached, .. } = compile(runtime, &program, &plan)?;
        let report = CompileReport { time: start.elapsed(), cached, memory: executable.memory().ok() };

        let client = runtime.client();
        let mut params = Vec::new();
        for slot in plan.slots() {
            let dtype = plan.role(slot).dtype;
            let host = stacked(slot, dtype, &|name| source(name))?;
            params.push(client.buffer_from_owned(host, 0)?.0);
        }
        let mut buffers = Vec::new();
        for (prefix, dtype) in plan.step.update.moment_dtypes() {
            for slot in plan.slots().filter(|s| plan.role(s).trained) {
                let host = match moments {
                    Some(read) => stacked(slot, dtype, &|name| read(&format!("{prefix}{name}")))?,
                    None => HostArray::zeros(dtype, slot.shape.clone())?,
                };
                buffers.push(client.buffer_from_owned(host, 0)?.0);
            }
        }
        let table = match (plan.step.per_layer, plan.arch.per_layer_input()) {
            (PerLayerTable::Host(_), Some(_)) => Some(match model {
                Some(m) if m.mapped(EMBED_TOKENS_PER_LAYER).is_some() => {
                    if let Some(view) = m.mapped(EMBED_TOKENS_PER_LAYER) {
                        view.bytes.advise_random();
                    }
                    HostTable::Mapped(Arc::clone(m))
                }
                _ => HostTable::Owned(source(EMBED_TOKENS_PER_LAYER)?),
            }),
            _ => None,
        };
        Ok((Device { runtime, plan, params, moments: buffers, table, step: executable, eval: None }, report))
    }

    /// The plan it was made from.
    #[must_use]
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Runs one step and waits for it. The batch holds the rows of all micro-batches.
    pub(crate) fn step(&mut self, batch: &TokenBatch, scalars: Scalars) -> Result<StepSums> {
        let mut inputs = self.batch(batch, &self.plan.step, self.plan.step.accumulation)?;
        let scalars = HostArray::from_slice([3], &scalars.values())?;
        inputs.push(self.runtime.client().buffer_from_host(&scalars, 0)?);
        let arguments: Vec<&Buffer> = self.params.iter().chain(&self.moments).chain(&inputs).collect();
        let mut outputs = self.step.execute(&arguments)?;
        let sums = outputs.pop().map(|b| b.to_host()).transpose()?;
        let mut outputs = outputs.into_iter();
        let trained: Vec<bool> = self.plan.slots().map(|s| self.plan.role(s).trained).collect();
        for (p, _) in self.params.iter_mut().zip(trained).filter(|(_, t)| *t) {
            *p = outputs.next().ok_or_else(missing)?;
        }
        for m in &mut self.moments {
            *m = outputs.next().ok_or_else(missing)?;
        }
        read_sums(sums)
    }

    /// Sums of one evaluation batch.
    pub(crate) fn evaluate(&mut self, batch: &TokenBatch) -> Result<StepSums> {
        let tokens = batch.rows * batch.seq;
        let mut options = StepOptions { rows: batch.rows, accumulation: 1, ..self.plan.step.clone() };
        if !tokens.is_multiple_of(options.loss.blocks) {
            options.loss.blocks = 1;
        }
        if self.eval.is_none() {
            let program = eval_program(&self.plan.arch, &self.plan.layout, &options, &|s| self.plan.role(s))?;
            self.eval = Some(compile(self.runtime, &program, &self.plan)?.executable);
        }
        let inputs = self.batch(batch, &options, 1)?;
        let arguments: Vec<&Buffer> = self.params.iter().chain(&inputs).collect();
        let Some(eval) = &self.eval else { return Err(missing()) };
        let mut outputs = eval.execute(&arguments)?;
        read_sums(outputs.pop().map(|b| b.to_host()).transpose()?)
    }

    /// The fields of a batch, micro-batch `i` being rows `i`, `i + n`, `i + 2n`, ... as in MaxText.
    fn batch(&self, batch: &TokenBatch, options: &StepOptions, micro: usize) -> Result<Vec<Buffer>> {
        let client = self.runtime.client();
        let shape: Shape = [micro, batch.rows / micro.max(1), batch.seq].into();
        let order = |values: &[i32]| -> Vec<i32> {
            if micro == 1 {
                return values.to_vec();
            }
            let rows: Vec<&[i32]> = values.chunks(batch.seq).collect();
            (0..micro).flat_map(|i| rows.iter().skip(i).step_by(micro).flat_map(|r| r.iter().copied())).collect()
        };
        let mut fields = vec![&batch.inputs, &batch.inputs_position, &batch.targets, &batch.targets_segmentation];
        if options.segments {
            fields.push(&batch.inputs_segmentation);
        }
        let mut buffers = Vec::new();
        for field in fields {
            buffers.push(client.buffer_from_host(&HostArray::from_slice(shape.clone(), &order(field))?, 0)?);
        }
        if let (PerLayerTable::Host(dtype), Some(p)) = (options.per_layer, self.plan.arch.per_layer_input()) {
            let width = self.plan.arch.layers().len() * p.width;
            let rows = self.rows(&order(&batch.inputs), width, dtype)?;
            let shape = [shape.dims(), &[width]].concat();
            buffers.push(client.buffer_from_owned(HostArray::from_bytes(dtype, shape, &rows)?, 0)?.0);
        }
        Ok(buffers)
    }

    /// Rows of the per-layer table for token ids, converted.
    fn rows(&self, ids: &[i32], width: usize, dtype: DType) -> Result<Vec<u8>> {
        let view;
        let (stored, bytes): (DType, &[u8]) = match self.table.as_ref().ok_or_else(missing)? {
            HostTable::Mapped(m) => {
                view = m.mapped(EMBED_TOKENS_PER_LAYER).ok_or_else(missing)?;
                (view.dtype, &view.bytes)
            }
            HostTable::Owned(host) => (host.dtype(), host.bytes()),
        };
        let row = width * stored.size();
        let mut gathered = Vec::with_capacity(ids.len() * row);
        for &id in ids {
            let at = usize::try_from(id).unwrap_or(usize::MAX).saturating_mul(row);
            let Some(slice) = bytes.get(at..at.saturating_add(row)) else {
                let message = format!("token id {id} is outside the per-layer table");
                return Err(EngineError::Input(message).into());
            };
            gathered.extend_from_slice(slice);
        }
        if stored == dtype {
            return Ok(gathered);
        }
        let host = HostArray::from_bytes(stored, [ids.len(), width], &gathered)?;
        Ok(convert(host, dtype)?.bytes().to_vec())
    }

    /// The per-layer table that stays on the host, whole.
    pub(crate) fn host_table(&self) -> Result<HostArray> {
        match self.table.as_ref().ok_or_else(missing)? {
            HostTable::Mapped(m) => Ok(m.read(EMBED_TOKENS_PER_LAYER)?),
            HostTable::Owned(host) => Ok(host.clone()),
        }
    }

    /// Copies every trained parameter and moment to the host, one array a parameter of the model: names as in the parameter
    /// table, moments with their prefix.
    #[expect(clippy::type_complexity, reason = "two lists of named arrays")]
    pub(crate) fn snapshot(&self, all: bool) -> Result<(Vec<(String, HostArray)>, Vec<(String, HostArray)>)> {
        let mut params = Vec::new();
        for (slot, buffer) in self.plan.slots().zip(&self.params) {
            if all || self.plan.role(slot).trained {
                unstack(slot, &buffer.to_host()?, "", &mut params)?;
            }
        }
        let mut moments = Vec::new();
        let mut buffers = self.moments.iter();
        for (prefix, _) in self.plan.step.update.moment_dtypes() {
            for slot in self.plan.slots().filter(|s| self.plan.role(s).trained) {
                unstack(slot, &buffers.next().ok_or_else(missing)?.to_host()?, prefix, &mut moments)?;
            }
        }
        Ok((params, moments))
    }
}

fn missing() -> TrainError {
    EngineError::Input("the program gave fewer results than it should".into()).into()
}

fn read_sums(sums: Option<HostArray>) -> Result<StepSums> {
    let host = sums.ok_or_else(missing)?;
    StepSums::from_values(host.as_slice::<f32>()?).ok_or_else(missing)
}

fn compile(runtime: &Runtime, program: &Program, plan: &Plan) -> Result<Compiled> {
    Ok(runtime.compile(program, &compile_options(plan))?)
}

/// Work of a step, in FLOP, from which its products are worth a library whose programs cannot be cached.
const LARGE_STEP: f64 = 3e11;

/// Compile options of training programs.
///
/// oneDNN runs the products of weight gradients three times as fast as the default library, but a program that calls it cannot
/// be stored: small steps compile longer than they run, and go without.
#[must_use]
pub fn compile_options(plan: &Plan) -> CompileOptions {
    match plan.step.loss.dtype {
        DType::BF16 if plan.flops.total >= LARGE_STEP => CompileOptions::bf16(),
        DType::BF16 => CompileOptions::default(),
        _ => CompileOptions::verify_f32(),
    }
}

/// The members of a slot in one array.
fn stacked(slot: &Slot, dtype: DType, read: &dyn Fn(&str) -> Result<HostArray>) -> Result<HostArray> {
    if let [only] = &slot.members[..]
        && !slot.stacked
    {
        return convert(read(&only.name)?, dtype);
    }
    let mut all = HostArray::zeros(dtype, slot.shape.clone())?;
    let size = all.bytes().len() / slot.members.len();
    for (m, place) in slot.members.iter().zip(all.bytes_mut().chunks_mut(size)) {
        place.copy_from_slice(convert(read(&m.name)?, dtype)?.bytes());
    }
    Ok(all)
}

fn unstack(slot: &Slot, host: &HostArray, prefix: &str, into: &mut Vec<(String, HostArray)>) -> Result<()> {
    let size = host.bytes().len() / slot.members.len();
    for (m, bytes) in slot.members.iter().zip(host.bytes().chunks(size)) {
        into.push((format!("{prefix}{}", m.name), HostArray::from_bytes(host.dtype(), m.shape.clone(), bytes)?));
    }
    Ok(())
}

/// The same values in another float dtype.
pub(crate) fn convert(host: HostArray, dtype: DType) -> Result<HostArray> {
    use half::bf16;
    if host.dtype() == dtype {
        return Ok(host);
    }
    let shape = host.shape().clone();
    Ok(match (host.dtype(), dtype) {
        (DType::BF16, DType::F32) => {
            let v: Vec<f32> = host.as_slice::<bf16>()?.iter().map(|x| x.to_f32()).collect();
            HostArray::from_slice(shape, &v)?
        }
        (DType::F32, DType::BF16) => {
            let v: Vec<bf16> = host.as_slice::<f32>()?.iter().map(|x| bf16::from_f32(*x)).collect();
            HostArray::from_slice(shape, &v)?
        }
        _ => HostArray::from_f64(dtype, shape, &host.to_f64())?,
    })
}
