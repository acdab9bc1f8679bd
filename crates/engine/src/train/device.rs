//! The state of a run on its devices: parameters, moments, programs.

use std::time::Duration;

use gemma4::layout::Slot;
use gemma4::params::EMBED_TOKENS_PER_LAYER;
use graph::{Mesh, ProductCalls, Program, Sharding};
use pjrt::{Buffer, CompileOptions, Executable, HloStats, MemoryFigures};
use tensor::{DType, HostArray, Shape};

use super::TrainError;
use super::plan::Plan;
use super::source::{Source, Zeros, place};
use super::step::{
    PerLayerTable, Role, Scalars, StepOptions, StepSums, batch_sharding, eval_program, step_program,
    summed_gradient_program, update_program,
};
use super::table::{HostTable, Needed};
use crate::data::TokenBatch;
use crate::forward::narrow;
use crate::hosts::peers::{Peers, own_rows, sum_arrays};
use crate::rows::RowTable;
use crate::runtime::{Compiled, Runtime};
use crate::shards::{self, Memory, Sharded};
use crate::train_state::{Array, Data, Share, TableSnapshot};
use crate::{EngineError, Model};

type Result<T> = std::result::Result<T, TrainError>;

/// Values of [`StepSums`].
const SUMS: [usize; 1] = [5];

/// As much as a main thread has, and more: the compiler recurses over programs.
const COMPILER_STACK: usize = 64 << 20;

/// A run's arrays on its devices and the programs that change them.
pub struct Device<'r> {
    runtime: &'r Runtime,
    plan: Plan,
    /// Without axes where there is one device.
    mesh: Mesh,
    params: Vec<Sharded>,
    /// Which of them are trained.
    trained: Vec<bool>,
    /// First moments of the trained slots, then second ones, as far as the optimizer has them.
    moments: Vec<Sharded>,
    /// The per-layer table, where it stays on the host.
    table: Option<RowTable>,
    /// The same, where it is trained there.
    hosted: Option<Hosted>,
    step: Executable,
    /// With other processes: the update, which follows when their gradients are summed.
    update: Option<(Executable, &'r dyn Peers)>,
    eval: Option<Executable>,
}

impl std::fmt::Debug for Device<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Device").field("params", &self.params.len()).finish_non_exhaustive()
    }
}

/// A table of which the device has what a batch needs.
#[derive(Debug)]
struct Hosted {
    table: HostTable,
    /// Its place among the parameters, and in each list of moments.
    param: usize,
    moments: Vec<usize>,
}

/// What a run's moments are read from.
pub(crate) struct Moments<'a> {
    /// By prefix and name.
    pub(crate) read: &'a Source<'a>,
    /// Which rows of a table on the host have any.
    pub(crate) table_rows: Vec<i32>,
}

/// What compiling took.
#[derive(Debug, Clone)]
pub struct CompileReport {
    /// Time to build, print and compile the program, or to load it from the cache.
    pub time: Duration,
    /// Whether it came from the cache.
    pub cached: bool,
    /// What the compiler says of memory, on each device.
    pub memory: Option<MemoryFigures>,
    /// What the program does, collectives among it, where several devices share it.
    pub shared: Option<HloStats>,
}

impl<'r> Device<'r> {
    /// Compiles the step and places parameters; moments are zero. `model` is asked for a table that stays on the host.
    pub(crate) fn new(
        runtime: &'r Runtime,
        plan: Plan,
        source: &Source<'_>,
        moments: Option<&Moments<'_>>,
        model: Option<&Model>,
        peers: Option<&'r dyn Peers>,
    ) -> Result<(Self, CompileReport)> {
        let start = std::time::Instant::now();
        let client = runtime.client();
        let mesh = plan.layout.mesh();
        let several = peers.is_some();
        // Without them the program sums.
        let peers = peers.filter(|p| p.sums_gradients());
        let split = peers.is_some();
        if several && plan.step.per_layer == PerLayerTable::HostTrained {
            return Err(TrainError::Key {
                key: "per_layer_table",
                reason: "a table trained on the host is not shared between processes; use per_layer_table=device"
                    .into(),
            });
        }
        let prepare = || -> Result<(Executable, Option<Executable>, CompileReport)> {
            let build = if split { summed_gradient_program } else { step_program };
            let program = build(&plan.arch, &plan.layout, &plan.step, &|s| plan.role(s))?;
            let Compiled { executable, cached, .. } = compile(runtime, program, &plan)?;
            let update = match split {
                false => None,
                true => {
                    let program = update_program(&plan.arch, &plan.layout, &plan.step, &|s| plan.role(s))?;
                    Some(compile(runtime, program, &plan)?.executable)
                }
            };
            let time = start.elapsed();
            // Figures for a person: a plugin that does not tell them can run the program all the same.
            let shared = match mesh.devices() {
                1 => None,
                _ => executable.optimized_program().ok().and_then(|hlo| HloStats::read(&hlo).ok()),
            };
            let report = CompileReport { time, cached, memory: executable.memory().ok(), shared };
            Ok((executable, update, report))
        };
        let place_all = || -> Result<(Vec<Sharded>, Vec<Sharded>)> {
            let mut buffers = Vec::new();
            let trained: Vec<&Slot> = plan.slots().filter(|s| plan.role(s).trained).collect();
            let dtypes = plan.step.update.moment_dtypes();
            let widest = dtypes.iter().map(|(_, d)| d.size()).max().unwrap_or(0);
            let on_host = |s: &Slot| plan.step.is_hosted(s);
            let made = |s: &&&Slot| moments.is_none() || on_host(s);
            let zeros = Zeros::new(trained.iter().filter(made).map(|s| s.shape.elements() * widest.max(4)))?;
            // The largest first: its pages in the file lie beside its copies while there is little else.
            let mut order: Vec<(usize, &Slot)> = plan.slots().enumerate().collect();
            order.sort_by_key(|(_, slot)| std::cmp::Reverse(slot.shape.elements()));
            let mut params = Vec::new();
            for (i, slot) in order {
                let Role { dtype, trained, .. } = plan.role(slot);
                let memory = if trained { Memory::Device } else { Memory::Host };
                let array = match on_host(slot) {
                    true => zeros.place(client, &mesh, slot, dtype)?,
                    false => place(client, &mesh, slot, dtype, memory, source)?,
                };
                params.push((i, array));
            }
            params.sort_by_key(|(i, _)| *i);
            let params = params.into_iter().map(|(_, array)| array).collect();
            for (prefix, dtype) in dtypes {
                for slot in &trained {
                    buffers.push(match moments {
                        Some(m) if !on_host(slot) => place(client, &mesh, slot, dtype, Memory::Device, &|name| {
                            (m.read)(&format!("{prefix}{name}"))
                        })?,
                        _ => zeros.place(client, &mesh, slot, dtype)?,
                    });
                }
            }
            Ok((params, buffers))
        };
        // The compiler and the files keep each other company.
        let (compiled, placed) = std::thread::scope(|scope| {
            let compiler = std::thread::Builder::new().stack_size(COMPILER_STACK).spawn_scoped(scope, prepare);
            let placed = place_all();
            let compiled = match compiler {
                Ok(thread) => thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
                Err(e) => Err(e.into()),
            };
            (compiled, placed)
        });
        let ((executable, update, report), (params, buffers)) = (compiled?, placed?);
        let update = update.zip(peers);
        // What the compiler and conversions left behind.
        pjrt::trim_allocator();
        let hosted = hosted(&plan, source, moments, model)?;
        let table = match (plan.step.per_layer, plan.arch.per_layer_input(), model) {
            (PerLayerTable::Host(_), Some(_), Some(model)) => Some(RowTable::new(model, EMBED_TOKENS_PER_LAYER)?),
            (PerLayerTable::Host(_), Some(_), None) => {
                Some(RowTable::in_memory(source(EMBED_TOKENS_PER_LAYER)?.into_host()?)?)
            }
            _ => None,
        };
        let trained = plan.slots().map(|s| plan.role(s).trained).collect();
        Ok((
            Device {
                runtime,
                plan,
                mesh,
                params,
                trained,
                moments: buffers,
                table,
                hosted,
                step: executable,
                update,
                eval: None,
            },
            report,
        ))
    }

    /// Runs one step and waits for it. The batch holds the rows of all micro-batches, and of all processes.
    pub(crate) fn step(&mut self, batch: &TokenBatch, scalars: Scalars) -> Result<StepSums> {
        let scalars = self.hand_over(&HostArray::from_slice([3], &scalars.values())?, None)?;
        let Some((update, peers)) = &self.update else {
            let mut inputs = self.batch(batch, &self.plan.step, self.plan.step.accumulation)?;
            let rows = self.hand_in(batch, &mut inputs)?;
            inputs.push(scalars);
            let arguments: Vec<&Sharded> = self.params.iter().chain(&self.moments).chain(&inputs).collect();
            let outputs = shards::execute(&self.step, &arguments)?;
            return self.take(outputs, &rows);
        };
        let own = batch.rows(own_rows(batch.rows, peers.rank(), peers.count())?);
        let inputs = self.batch(&own, &self.plan.step, self.plan.step.accumulation)?;
        let arguments: Vec<&Sharded> = self.params.iter().chain(&inputs).collect();
        // Gradients of the trained slots lie as these do; then the sums, whole on every device.
        let slots = self.plan.slots().zip(&self.trained).filter(|(_, t)| **t).map(|(slot, _)| slot);
        let lies: Vec<(Shape, Sharding)> = slots
            .map(|s| (s.shape.clone(), s.sharding_or_whole()))
            .chain([(SUMS.into(), Sharding::replicated(1))])
            .collect();
        let (mut hosts, mut lying) = (Vec::new(), Vec::new());
        for (parts, (shape, sharding)) in shards::execute(&self.step, &arguments)?.into_iter().zip(lies) {
            let output = Sharded::new(self.runtime.client(), &self.mesh, (DType::F32, &shape), sharding, parts)?;
            hosts.push(output.to_host(&self.mesh)?);
            lying.push(output.sharding().clone());
        }
        sum_arrays(*peers, &mut hosts)?;
        let summed = hosts.iter().zip(lying).map(|(host, sharding)| self.hand_over(host, Some(sharding)));
        let summed = summed.collect::<Result<Vec<Sharded>>>()?;
        let arguments: Vec<&Sharded> =
            self.params.iter().chain(&self.moments).chain(&summed).chain([&scalars]).collect();
        let outputs = shards::execute(update, &arguments)?;
        self.take(outputs, &[])
    }

    /// Takes over what a step gave; `rows` are those of a table trained on the host.
    fn take(&mut self, mut outputs: Vec<Vec<Buffer>>, rows: &[i32]) -> Result<StepSums> {
        let sums = outputs.pop();
        let mut outputs = outputs.into_iter();
        for (p, _) in self.params.iter_mut().zip(&self.trained).filter(|(_, t)| **t) {
            p.replace(outputs.next().ok_or_else(missing)?)?;
        }
        for m in &mut self.moments {
            m.replace(outputs.next().ok_or_else(missing)?)?;
        }
        // Before anything is read: what failed, failed here.
        let sums = read_sums(sums)?;
        if let Some(hosted) = &mut self.hosted {
            let parts =
                std::iter::once(&self.params[hosted.param]).chain(hosted.moments.iter().map(|&i| &self.moments[i]));
            let parts: Vec<HostArray> = parts.map(|p| p.to_host(&self.mesh)).collect::<crate::Result<_>>()?;
            hosted.table.store(rows, &parts.iter().collect::<Vec<_>>())?;
        }
        Ok(sums)
    }

    /// A host array on the devices, lying as said or whole on each.
    fn hand_over(&self, host: &HostArray, sharding: Option<Sharding>) -> Result<Sharded> {
        let sharding = sharding.unwrap_or_else(|| Sharding::replicated(host.shape().rank()));
        Ok(Sharded::from_host(self.runtime.client(), &self.mesh, host, &sharding)?)
    }

    /// Puts the rows that a batch needs of a table trained on the host into their places, and the batch's last field, which says
    /// where they are. Returns the rows.
    fn hand_in(&mut self, batch: &TokenBatch, inputs: &mut Vec<Sharded>) -> Result<Vec<i32>> {
        let Some(hosted) = &self.hosted else { return Ok(Vec::new()) };
        let micro = self.plan.step.accumulation;
        let needed = Needed::of(&in_micro_batches(&batch.inputs, batch.seq, micro));
        let shape = [micro, batch.rows / micro.max(1), batch.seq];
        let index = HostArray::from_slice(shape, &needed.index)?;
        inputs.push(self.hand_over(&index, batch_sharding(&self.plan.layout, &shape))?);
        let capacity = self.params[hosted.param].shape().dims().first().copied().unwrap_or(0);
        let mut parts = hosted.table.gather(&needed.rows, capacity)?.into_iter();
        let (client, mesh) = (self.runtime.client(), &self.mesh);
        let mut place = |was: &mut Sharded| -> Result<()> {
            *was = Sharded::from_host(client, mesh, &parts.next().ok_or_else(missing)?, was.sharding())?;
            Ok(())
        };
        place(&mut self.params[hosted.param])?;
        for &i in &hosted.moments {
            place(&mut self.moments[i])?;
        }
        Ok(needed.rows)
    }

    /// Sums of one evaluation batch.
    pub(crate) fn evaluate(&mut self, batch: &TokenBatch) -> Result<StepSums> {
        let tokens = batch.rows * batch.seq;
        let mut options = StepOptions { rows: batch.rows, accumulation: 1, ..self.plan.step.clone() };
        if options.per_layer == PerLayerTable::HostTrained {
            options.per_layer = PerLayerTable::Host(options.loss.dtype);
        }
        // Every device goes through its own tokens in blocks.
        let parts = self.plan.layout.partition().map_or(1, |p| p.batch_parts() * p.token_length_parts());
        if !tokens.is_multiple_of(options.loss.blocks * parts) {
            options.loss.blocks = 1;
        }
        if self.eval.is_none() {
            let program = eval_program(&self.plan.arch, &self.plan.layout, &options, &|s| self.plan.role(s))?;
            self.eval = Some(compile(self.runtime, program, &self.plan)?.executable);
        }
        let inputs = self.batch(batch, &options, 1)?;
        let on_device =
            self.params.iter().enumerate().filter(|(i, _)| self.hosted.as_ref().is_none_or(|h| h.param != *i));
        let arguments: Vec<&Sharded> = on_device.map(|(_, b)| b).chain(&inputs).collect();
        let Some(eval) = &self.eval else { return Err(missing()) };
        read_sums(shards::execute(eval, &arguments)?.pop())
    }

    /// The fields of a batch, micro-batch `i` being rows `i`, `i + n`, `i + 2n`, ... as in MaxText.
    fn batch(&self, batch: &TokenBatch, options: &StepOptions, micro: usize) -> Result<Vec<Sharded>> {
        let lies = |shape: &Shape| batch_sharding(&self.plan.layout, shape.dims());
        let shape: Shape = [micro, batch.rows / micro.max(1), batch.seq].into();
        let order = |values: &[i32]| in_micro_batches(values, batch.seq, micro);
        let mut fields = vec![&batch.inputs, &batch.inputs_position, &batch.targets, &batch.targets_segmentation];
        if options.segments {
            fields.push(&batch.inputs_segmentation);
        }
        let mut buffers = Vec::new();
        for field in fields {
            buffers.push(self.hand_over(&HostArray::from_slice(shape.clone(), &order(field))?, lies(&shape))?);
        }
        if let (PerLayerTable::Host(dtype), Some(p)) = (options.per_layer, self.plan.arch.per_layer_input()) {
            let width = self.plan.arch.layers().len() * p.width;
            let shape = [shape.dims(), &[width]].concat();
            let ids = order(&batch.inputs);
            let rows = match &self.hosted {
                Some(h) => {
                    let rows = h.table.lookup(&ids)?;
                    HostArray::from_bytes(rows.dtype(), shape, rows.bytes())?
                }
                None => self.table()?.gather(&ids, shape)?,
            };
            let rows = convert(rows, dtype)?;
            buffers.push(self.hand_over(&rows, lies(rows.shape()))?);
        }
        Ok(buffers)
    }

    fn table(&self) -> Result<&RowTable> {
        self.table.as_ref().ok_or_else(missing)
    }

    /// The per-layer table that is trained on the host, as it is now.
    pub(crate) fn table_snapshot(&self) -> Result<Option<TableSnapshot>> {
        self.hosted.as_ref().map(|h| h.table.snapshot(EMBED_TOKENS_PER_LAYER)).transpose()
    }

    /// The per-layer table that stays on the host, whole.
    pub(crate) fn host_table(&self) -> Result<HostArray> {
        Ok(self.table()?.whole()?)
    }

    /// Trained parameters and moments, one array a parameter of the model: names as in the parameter table, moments with their
    /// prefix. With `all`, untrained ones that are on the device too. Those that are not copied to the host now are to be
    /// [fetched](Self::fetch) before the next step.
    pub(crate) fn snapshot(&self, all: bool, share: Share) -> Result<HostState> {
        let slots: Vec<(&Slot, bool)> = self.plan.slots().zip(self.trained.iter().copied()).collect();
        let kept = |(slot, trained): (&Slot, bool)| (all || trained) && !self.plan.step.is_hosted(slot);
        // Moments are where their parameter is.
        let lists = self.plan.step.update.moment_dtypes();
        let arrays = |&(slot, trained): &(&Slot, bool)| match kept((slot, trained)) {
            false => 0,
            true => 1 + if trained { lists.len() } else { 0 },
        };
        let sizes: Vec<u64> = slots.iter().map(|s| (s.0.shape.elements() * arrays(s)) as u64).collect();
        let mine: Vec<bool> = share.deal(&sizes).iter().map(|p| *p == share.process).collect();
        let mut state = HostState::default();
        for ((&(slot, trained), buffer), mine) in slots.iter().zip(&self.params).zip(&mine) {
            if !kept((slot, trained)) {
                continue;
            }
            state.held.extend(slot.members.iter().map(|m| m.name.clone()));
            self.members(slot, buffer, "", *mine, &mut state.params)?;
        }
        let mut buffers = self.moments.iter();
        for (prefix, _) in lists {
            for (&(slot, _), mine) in slots.iter().zip(&mine).filter(|((_, trained), _)| *trained) {
                let buffer = buffers.next().ok_or_else(missing)?;
                if !self.plan.step.is_hosted(slot) {
                    self.members(slot, buffer, prefix, *mine, &mut state.moments)?;
                }
            }
        }
        Ok(state)
    }

    /// The parameters in a slot, or their moments, where they are wanted here: as they are now, or where that needs no copy, to be
    /// fetched.
    fn members(&self, slot: &Slot, array: &Sharded, prefix: &str, wanted: bool, into: &mut Vec<Array>) -> Result<()> {
        let names = slot.members.iter().map(|m| (format!("{prefix}{}", m.name), &m.shape));
        if self.saves_in_place() {
            let later = |shape: &Shape| Data::Later(array.dtype(), shape.clone());
            into.extend(names.filter(|_| wanted).map(|(name, shape)| Array { name, data: later(shape) }));
            return Ok(());
        }
        let Some(host) = self.whole(array, wanted)? else { return Ok(()) };
        let size = host.bytes().len() / slot.members.len();
        for ((name, shape), bytes) in names.zip(host.bytes().chunks(size)) {
            let data = Data::Here(HostArray::from_bytes(host.dtype(), shape.clone(), bytes)?);
            into.push(Array { name, data });
        }
        Ok(())
    }

    /// Whether arrays are read when they are written, and the next step waits until the last has been. On a CPU a copy of
    /// everything would take as much memory again as the run's state; elsewhere the device should not wait for a disk.
    fn saves_in_place(&self) -> bool {
        self.mesh.devices() == 1 && self.runtime.client().platform_name() == "cpu"
    }

    /// A parameter by its name, or a moment of it, on the host.
    pub(crate) fn fetch(&self, name: &str) -> Result<HostArray> {
        let lists = self.plan.step.update.moment_dtypes();
        let moment = lists.iter().enumerate().find_map(|(i, (prefix, _))| Some((i, name.strip_prefix(prefix)?)));
        let parameter = moment.map_or(name, |(_, parameter)| parameter);
        let member = |slot: &Slot| slot.members.iter().position(|m| m.name == parameter);
        let found = self.plan.slots().enumerate().find_map(|(i, slot)| Some((i, slot, member(slot)?)));
        let unknown = || EngineError::Input(format!("no array {name} is on the device"));
        let (i, slot, member) = found.ok_or_else(unknown)?;
        let array = match moment {
            None => self.params.get(i),
            Some((list, _)) => {
                let trained = |to: usize| self.trained.iter().take(to).filter(|t| **t).count();
                self.moments.get(list * trained(usize::MAX) + trained(i))
            }
        };
        let array = array.ok_or_else(unknown)?;
        let shape = &slot.members[member].shape;
        Ok(array.part_to_host(member * shape.elements() * array.dtype().size(), shape)?)
    }

    /// An array on the host, where it is wanted here. One that lies with several processes comes together on the devices first, for
    /// which all of them must call this.
    fn whole(&self, array: &Sharded, wanted: bool) -> Result<Option<HostArray>> {
        if array.is_here(&self.mesh)? {
            return Ok(if wanted { Some(array.to_host(&self.mesh)?) } else { None });
        }
        let program = shards::gather_program(array, &self.mesh)?;
        let gather = compile(self.runtime, program, &self.plan)?.executable;
        let parts = shards::execute(&gather, &[array])?.pop().ok_or_else(missing)?;
        let first = parts.first().filter(|_| wanted);
        Ok(first.map(Buffer::to_host).transpose()?)
    }
}

/// What a run's devices hold, on the host or to be fetched.
#[derive(Debug, Default)]
pub(crate) struct HostState {
    /// Parameters that fall to this process.
    pub(crate) params: Vec<Array>,
    /// Their moments.
    pub(crate) moments: Vec<Array>,
    /// Names of the parameters that fall to any process.
    pub(crate) held: Vec<String>,
}

/// Micro-batch `i` is rows `i`, `i + n`, `i + 2n`, ... as in MaxText.
fn in_micro_batches(values: &[i32], seq: usize, micro: usize) -> Vec<i32> {
    if micro == 1 {
        return values.to_vec();
    }
    let rows: Vec<&[i32]> = values.chunks(seq).collect();
    (0..micro).flat_map(|i| rows.iter().skip(i).step_by(micro).flat_map(|r| r.iter().copied())).collect()
}

/// The table that is trained on the host, if it is: from a model's file, or drawn at random.
fn hosted(
    plan: &Plan,
    source: &Source<'_>,
    moments: Option<&Moments<'_>>,
    model: Option<&Model>,
) -> Result<Option<Hosted>> {
    let Some(param) = plan.slots().position(|s| plan.step.is_hosted(s)) else { return Ok(None) };
    let name = EMBED_TOKENS_PER_LAYER;
    let base = match model {
        Some(model) => RowTable::new(model, name)?,
        None => RowTable::in_memory(source(name)?.into_host()?)?,
    };
    let dtypes = plan.step.update.moment_dtypes();
    let mut table = HostTable::new(base, plan.step.weight_dtype, &dtypes);
    if let Some(m) = moments {
        let read =
            |(prefix, dtype): &(&str, DType)| convert((m.read)(&format!("{prefix}{name}"))?.into_host()?, *dtype);
        table.restore(&m.table_rows, &dtypes.iter().map(read).collect::<Result<Vec<_>>>()?)?;
    }
    let trained: Vec<bool> = plan.slots().filter(|s| plan.role(s).trained).map(|s| plan.step.is_hosted(s)).collect();
    let place = trained.iter().position(|h| *h).ok_or_else(missing)?;
    let moments = (0..dtypes.len()).map(|i| i * trained.len() + place).collect();
    Ok(Some(Hosted { table, param, moments }))
}

fn missing() -> TrainError {
    EngineError::Input("the program gave fewer results than it should".into()).into()
}

/// Sums are the same on every device.
fn read_sums(sums: Option<Vec<Buffer>>) -> Result<StepSums> {
    let host = sums.as_ref().and_then(|parts| parts.first()).ok_or_else(missing)?.to_host()?;
    StepSums::from_values(host.as_slice::<f32>()?).ok_or_else(missing)
}

fn compile(runtime: &Runtime, program: Program, plan: &Plan) -> Result<Compiled> {
    Ok(match product_calls(runtime, plan) {
        Some(calls) => runtime.compile(&program.with_product_calls(calls), &options(plan, false))?,
        None => runtime.compile(&program, &compile_options(plan))?,
    })
}

/// Products that a program on one device of this machine does not leave to the compiler.
pub(super) fn product_calls(runtime: &Runtime, plan: &Plan) -> Option<ProductCalls> {
    let calls = crate::kernels::product_calls(plan.step.loss.dtype)?;
    let can = plan.layout.partition().is_none() && crate::kernels::register(runtime.client()).is_ok();
    can.then_some(calls)
}

/// Work of a step, in FLOP, from which its products are worth a library whose programs cannot be cached.
const LARGE_STEP: f64 = 3e11;

/// Compile options of training programs whose products are the compiler's.
///
/// oneDNN runs the products of weight gradients three times as fast as the default library, but a program that calls it cannot
/// be stored: small steps compile longer than they run, and go without.
#[must_use]
pub fn compile_options(plan: &Plan) -> CompileOptions {
    options(plan, plan.flops.total >= LARGE_STEP)
}

/// With a library for products of bf16, or without.
fn options(plan: &Plan, library: bool) -> CompileOptions {
    let options = match plan.step.loss.dtype {
        DType::BF16 if library => CompileOptions::bf16(),
        DType::BF16 => CompileOptions::default(),
        _ => CompileOptions::verify_f32(),
    };
    options.partitioned(plan.devices())
}

/// The same values in another float dtype.
pub(crate) fn convert(host: HostArray, dtype: DType) -> Result<HostArray> {
    if host.dtype() == dtype { Ok(host) } else { converted(host.dtype(), host.bytes(), host.shape(), dtype) }
}

/// Values in one float dtype from the bytes of another.
pub(crate) fn converted(from: DType, bytes: &[u8], shape: &Shape, to: DType) -> Result<HostArray> {
    match (from, to) {
        (DType::F32 | DType::BF16 | DType::F16, DType::F32 | DType::BF16) => {
            Ok(narrow(from, bytes, shape.clone(), to)?)
        }
        _ => {
            let host = HostArray::from_bytes(from, shape.clone(), bytes)?;
            Ok(HostArray::from_f64(to, shape.clone(), &host.to_f64())?)
        }
    }
}
