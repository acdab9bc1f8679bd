//! The training loop: data, steps, metrics, evaluation, checkpoints, and a clean end whatever happens.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use config::Config;
use gemma4::param_table;
use gemma4::params::EMBED_TOKENS_PER_LAYER;
use serde_json::json;
use tensor::DType;

use super::TrainError;
use super::device::{CompileReport, Device, HostState, Moments, product_calls};
use super::optimizer::Rule;
use super::plan::Plan;
use super::source::Given;
use super::start::{
    architecture, check_identity, identity, optimizer_name, peak_rate, run_name, store_options, summary,
};
use super::step::{Scalars, StepSums};
use crate::data::{self, BatchSource, DataReport, FixedBatches, Prefetch, TokenBatch};
use crate::hosts::peers::Peers;
use crate::metrics::{self, EvalMetrics, MetricsOptions, MetricsWriter, StepMetrics};
use crate::train_state::{Array, AsyncSaver, Data, Loaded, Share, Snapshot, Store, TrainerState};
use crate::{Model, Runtime, init};

type Result<T> = std::result::Result<T, TrainError>;

/// Batches read ahead of the device.
const AHEAD: usize = 2;

/// What happens in a run, as it happens.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// Something that takes a while begins.
    Status(&'a str),
    /// Parameters, work and memory, before anything is compiled.
    Summary(&'a str),
    /// The run goes on from a checkpoint.
    Resumed {
        /// Steps done.
        step: u64,
        /// The checkpoint.
        path: &'a Path,
    },
    /// The step is compiled.
    Compiled(&'a CompileReport),
    /// A step is done.
    Step(&'a StepMetrics),
    /// A batch of an evaluation is done.
    EvalStep {
        /// MaxText's line.
        line: &'a str,
    },
    /// An evaluation is done.
    Eval(&'a EvalMetrics),
    /// A checkpoint is complete.
    Saved {
        /// Steps done.
        step: u64,
        /// Where.
        path: &'a Path,
        /// How long the run stood still for it.
        paused: Duration,
    },
}

/// What a run is given besides its configuration.
#[derive(Default)]
pub struct TrainOptions<'a> {
    /// Set from outside to save and end after the current step.
    pub stop: Option<&'a AtomicBool>,
    /// A safetensors file of token batches instead of the data the configuration names, see [`FixedBatches`].
    pub batches: Option<PathBuf>,
    /// The configuration as text, kept with the run.
    pub config_text: Option<String>,
    /// Other processes of the run. Process 0 alone writes metrics.
    pub peers: Option<&'a dyn Peers>,
}

impl std::fmt::Debug for TrainOptions<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TrainOptions").field("stop", &self.stop).finish_non_exhaustive()
    }
}

/// Why a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// All steps are done.
    Steps,
    /// It was asked to stop.
    Stopped,
    /// The evaluation loss reached `target_eval_loss`.
    Target,
}

/// What a run came to.
#[derive(Debug)]
pub struct TrainReport {
    /// Why it ended.
    pub end: End,
    /// Steps done, earlier runs included.
    pub step: u64,
    /// The last step of this run.
    pub last: Option<StepMetrics>,
    /// The run's directory.
    pub run_dir: PathBuf,
    /// The last checkpoint, a Hugging Face model directory.
    pub checkpoint: Option<PathBuf>,
    /// What was read.
    pub data: DataReport,
}

/// Trains as the configuration says.
///
/// # Errors
/// When the configuration asks for what cannot be done, data or checkpoints are missing or damaged, the device fails, or the
/// loss is no number. Everything up to the last checkpoint is kept.
pub fn train(
    runtime: &Runtime,
    config: &Config,
    options: TrainOptions<'_>,
    events: &mut dyn FnMut(Event<'_>),
) -> Result<TrainReport> {
    let peers = options.peers.filter(|p| p.count() > 1);
    let (rank, processes) = peers.map_or((0, 1), |p| (p.rank(), p.count()));
    if processes > 1 && config.output.run_name.is_empty() {
        let reason = "must be given: processes that start in different minutes would name their run differently".into();
        return Err(TrainError::Key { key: "run_name", reason });
    }
    let run_name = run_name(config);
    let run_dir = config.output.base_output_directory.join(&run_name);
    let load = &config.checkpoint.load_parameters_path;
    let given = if load.is_empty() { None } else { Some(Model::open(Path::new(load))?) };
    let arch = architecture(config, given.as_ref())?;
    // Processes that sum gradients have a model each; the devices of others are one mesh.
    let replicas = peers.filter(|p| p.sums_gradients()).map_or(1, Peers::count);
    let slices = if processes > replicas { config.mesh.slices() } else { 1 };
    let mut plan = Plan::on(config, arch, &config.mesh.resolve(runtime.client().mesh_devices().len(), slices)?)?;
    plan.step.loss.called = product_calls(runtime, &plan).is_some();

    // Where the run stands.
    let share = Share { process: rank, count: processes };
    let checkpoints = run_dir.join("checkpoints");
    // Opening a store clears what a killed run left: process 0 first, and no one saves before all have looked.
    let sign = if rank == 0 { None } else { Some(together(peers, 0.0)?) };
    // Model directories do not hold f64.
    let saves = config.checkpoint.enable && plan.step.weight_dtype != DType::F64;
    if let Some(sign) = sign.filter(|_| saves) {
        shared_files(&checkpoints, sign)?;
    }
    let store = match saves {
        true => Some(Arc::new(Store::open(&checkpoints, store_options(config, &plan, given.as_ref(), share))?)),
        false => None,
    };
    let latest = store.as_ref().map(|s| s.latest()).transpose()?.flatten();
    let loaded = match (&store, latest) {
        (Some(store), Some(step)) => Some(store.load(step)?),
        _ => None,
    };
    let start = loaded.as_ref().map_or(0, |l| l.state.step);
    let signed = match (rank, peers) {
        (0, Some(_)) => {
            let sign = if saves { sign_files(&checkpoints)? } else { 0.0 };
            together(peers, sign)?;
            saves
        }
        _ => false,
    };
    if together(peers, start as f32)? != start as f32 * processes as f32 {
        return Err(TrainError::OtherStep { here: start });
    }
    if signed {
        fs_err::remove_file(checkpoints.join(SIGN_FILE))?;
    }
    let own_dir = if rank == 0 { run_dir.clone() } else { run_dir.join(format!("process_{rank}")) };
    if start >= plan.steps {
        return Err(TrainError::Finished { done: start, steps: plan.steps });
    }
    let identity = identity(config, &plan, replicas);
    if let Some(l) = &loaded {
        check_identity(&l.state, &identity)?;
        events(Event::Resumed { step: start, path: l.model_dir() });
    }

    events(Event::Summary(&summary(&plan, config)));
    if config.checkpoint.enable && !saves {
        events(Event::Status("no checkpoints: weights are float64, which model directories do not hold"));
    }

    // Data before the compiler: its mistakes show at once.
    let rows = plan.step.rows * plan.step.accumulation * replicas;
    let vocab = plan.arch.vocab_size();
    let tokenizer = given.as_ref().map(|m| m.path().to_owned());
    let mut source = match &options.batches {
        Some(path) => {
            let fixed = FixedBatches::from_safetensors(path, vocab)?;
            if (fixed.rows(), fixed.seq()) != (rows, plan.step.seq) {
                let reason = format!(
                    "{} holds batches of {} x {}, the configuration {rows} x {} (per_device_batch_size times \
                     gradient_accumulation_steps, max_target_length)",
                    path.display(),
                    fixed.rows(),
                    fixed.seq(),
                    plan.step.seq
                );
                return Err(TrainError::Key { key: "per_device_batch_size", reason });
            }
            Box::new(fixed) as Box<dyn BatchSource>
        }
        None => data::open_train(config, vocab, tokenizer.as_deref(), rows)?,
    };
    if let Some(l) = &loaded {
        let cursor = serde_json::from_value(l.state.cursor.clone())
            .map_err(|e| TrainError::OtherModel { path: l.model_dir().to_owned(), reason: format!("cursor: {e}") })?;
        source.restore(&cursor)?;
    }
    let mut source = Prefetch::new(source, AHEAD);
    let mut eval = data::open_eval(config, vocab, tokenizer.as_deref(), plan.eval_rows)?;

    events(Event::Status("compiling the training step"));
    let (mut device, compiled) = place(runtime, config, &plan, given.as_ref(), loaded.as_ref(), peers)?;
    events(Event::Compiled(&compiled));

    fs_err::create_dir_all(&own_dir)?;
    if let Some(text) = &options.config_text {
        fs_err::write(own_dir.join("config.yml"), text)?;
    }
    let metrics_file = &config.output.metrics_file;
    let mut writer = MetricsWriter::open(
        &own_dir,
        &run_name,
        &MetricsOptions {
            metrics_file: if metrics_file.is_empty() || rank > 0 { None } else { Some(metrics_file.into()) },
            tensorboard: config.output.enable_tensorboard,
            resume_step: loaded.as_ref().map(|_| start),
        },
    )?;
    writer.text("config", &options.config_text.map(|t| format!("```yaml\n{t}\n```")).unwrap_or_default())?;

    let mut run = Run {
        config,
        plan: &plan,
        run_dir: &own_dir,
        identity,
        saver: store.as_ref().map(|s| AsyncSaver::new(Arc::clone(s))),
        store: store.clone(),
        share,
        saved: latest,
        paused: None,
        peak: None,
    };
    if run.store.is_some() && config.checkpoint.save_on_start && latest.is_none() {
        run.save(&device, 0, &source, events)?;
    }
    let mut report = TrainReport {
        end: End::Steps,
        step: start,
        last: None,
        run_dir: run_dir.clone(),
        checkpoint: None,
        data: source.report(),
    };
    for step in start..plan.steps {
        let clock = Instant::now();
        let Some(batch) = next_batch(&mut source, config, rows, plan.step.seq)? else {
            run.save(&device, step, &source, events)?;
            run.finish(events)?;
            return Err(TrainError::OutOfData { done: step, steps: plan.steps });
        };
        let waited = clock.elapsed();
        let sums = device.step(&batch, scalars(&plan, step))?;
        let metrics = run.metrics(step, clock.elapsed(), waited, &sums);
        run.check_loss(&metrics, &batch, &mut writer)?;
        writer.log_step(&metrics)?;
        events(Event::Step(&metrics));
        if (step + 1) % config.output.log_period as u64 == 0 {
            writer.flush()?;
        }
        if step == start {
            // Not before the first step: nobody waits for it.
            run.peak = peak_rate(runtime, &plan);
        }
        report.last = Some(metrics);
        report.step = step + 1;
        let due = config.output.eval_interval.is_some_and(|n| {
            step >= config.output.eval_start_step as u64
                && (step - config.output.eval_start_step as u64).is_multiple_of(n.max(1) as u64)
        });
        if let (true, Some(eval)) = (due, &mut eval) {
            let found = evaluate(&mut device, eval.as_mut(), config, step, events)?;
            writer.log_eval(&found)?;
            events(Event::Eval(&found));
            if config.output.target_eval_loss > 0.0 && found.avg_loss() <= config.output.target_eval_loss {
                report.end = End::Target;
            }
        }
        // Who is asked to stop stops all.
        let asked = options.stop.is_some_and(|s| s.load(Ordering::Relaxed));
        let stopped = together(peers, f32::from(u8::from(asked)))? > 0.0;
        if stopped && report.end == End::Steps && step + 1 < plan.steps {
            report.end = End::Stopped;
        }
        let last = step + 1 == plan.steps || report.end != End::Steps;
        let periodic = (step + 1).is_multiple_of(config.checkpoint.period.max(1) as u64);
        let wanted = periodic || (last && (config.checkpoint.save_on_completion || stopped));
        if run.store.is_some() && wanted {
            run.save(&device, step + 1, &source, events)?;
        }
        run.poll(events)?;
        if last {
            break;
        }
    }
    writer.flush()?;
    run.finish(events)?;
    report.checkpoint = run.saved.zip(run.store.as_ref()).map(|(step, s)| s.path(step));
    report.data = source.report();
    Ok(report)
}

/// What the loop holds besides data and device.
struct Run<'a> {
    config: &'a Config,
    plan: &'a Plan,
    run_dir: &'a Path,
    identity: BTreeMap<String, serde_json::Value>,
    saver: Option<AsyncSaver>,
    store: Option<Arc<Store>>,
    share: Share,
    /// The last step saved.
    saved: Option<u64>,
    /// How long the run stood still for the save under way.
    paused: Option<Duration>,
    /// FLOP/s.
    peak: Option<f64>,
}

impl Run<'_> {
    fn metrics(&self, step: u64, seconds: Duration, waited: Duration, s: &StepSums) -> StepMetrics {
        let weight = f64::from(s.weight);
        // MaxText's guard against an empty batch.
        let mean = |sum: f32| f64::from(sum) / (weight + 1e-8);
        let raw = f64::from(s.grad_square).sqrt();
        let clip = self.plan.step.update.clip;
        let loss = mean(s.total);
        StepMetrics {
            step,
            seconds: seconds.as_secs_f64(),
            loss,
            lm_loss: loss,
            perplexity: loss.exp(),
            z_loss: mean(s.z),
            total_weights: s.weight as u64,
            grad_norm: if clip > 0.0 { raw.min(clip) } else { raw },
            raw_grad_norm: raw,
            param_norm: f64::from(s.param_square).sqrt(),
            learning_rate: self.plan.schedule.rate(step),
            tflops: self.plan.flops.total / 1e12,
            worked_tflops: self.plan.worked_flops() / 1e12,
            tokens: self.plan.flops.tokens,
            peak_flops: self.peak,
            memory_bytes: metrics::memory::process().map(|m| m.resident),
            data_wait_seconds: waited.as_secs_f64(),
            skipped: false,
        }
    }

    /// Stops at a loss that is no number, and keeps the batch.
    fn check_loss(&self, m: &StepMetrics, batch: &TokenBatch, writer: &mut MetricsWriter) -> Result<()> {
        let o = &self.config.output;
        let bad = (m.loss.is_nan() && o.abort_on_nan_loss) || (m.loss.is_infinite() && o.abort_on_inf_loss);
        if !bad {
            return Ok(());
        }
        writer.log_step(m)?;
        writer.flush()?;
        let path = self.run_dir.join(format!("bad_batch_step_{}.json", m.step));
        let text = json!({
            "step": m.step, "loss": m.loss.to_string(), "rows": batch.rows, "seq": batch.seq,
            "inputs": batch.inputs, "inputs_position": batch.inputs_position,
            "inputs_segmentation": batch.inputs_segmentation, "targets": batch.targets,
            "targets_segmentation": batch.targets_segmentation,
        });
        fs_err::write(&path, text.to_string())?;
        Err(TrainError::BadLoss { step: m.step, loss: m.loss, batch: path })
    }

    fn save(
        &mut self,
        device: &Device<'_>,
        step: u64,
        source: &Prefetch,
        events: &mut dyn FnMut(Event<'_>),
    ) -> Result<()> {
        let Some(saver) = &mut self.saver else { return Ok(()) };
        if self.saved == Some(step) {
            return Ok(());
        }
        let clock = Instant::now();
        // The first checkpoint of a run holds everything, later ones what changed.
        let all = self.saved.is_none();
        let HostState { mut params, moments, held } = device.snapshot(all, self.share)?;
        let hosted = device.table_snapshot()?;
        let cursor = serde_json::to_value(source.cursor()).unwrap_or_default();
        let table = param_table(&self.plan.arch);
        let held: std::collections::HashSet<&str> =
            held.iter().map(String::as_str).chain(hosted.iter().map(|t| t.name.as_str())).collect();
        let trained = |p: &&tensor::ParamSpec| self.plan.is_trained(p);
        let state = TrainerState {
            format: 1,
            step,
            cursor,
            optimizer: optimizer_name(self.plan).to_owned(),
            trained: table.iter().filter(trained).map(|p| p.name.clone()).collect(),
            keys: self.identity.clone(),
            written_by: concat!("lapidary ", env!("CARGO_PKG_VERSION")).to_owned(),
        };
        let frozen = table.iter().filter(|p| !held.contains(p.name.as_str())).map(|p| p.name.clone()).collect();
        let mut frozen: Vec<String> = frozen;
        if all
            && frozen.iter().any(|n| n == EMBED_TOKENS_PER_LAYER)
            && self.config.checkpoint.load_parameters_path.is_empty()
        {
            // Drawn at random and kept on the host: nothing else could give it back.
            if self.share.process == 0 {
                params.push(Array { name: EMBED_TOKENS_PER_LAYER.into(), data: Data::Here(device.host_table()?) });
            }
            frozen.retain(|n| n != EMBED_TOKENS_PER_LAYER);
        }
        // The one before is complete after this, or its error is here.
        saver.finish()?;
        tell_saved(saver, &mut self.paused, events);
        let snapshot = Snapshot { state, params, frozen, moments, table: hosted };
        saver.submit(snapshot, &mut |name| device.fetch(name))?;
        if !self.config.checkpoint.asynchronous {
            saver.finish()?;
        }
        self.saved = Some(step);
        self.paused = Some(clock.elapsed());
        self.poll(events)
    }

    /// Tells of a save that is complete by now.
    fn poll(&mut self, events: &mut dyn FnMut(Event<'_>)) -> Result<()> {
        match &self.saver {
            Some(saver) if !saver.is_busy() => self.finish(events),
            _ => Ok(()),
        }
    }

    fn finish(&mut self, events: &mut dyn FnMut(Event<'_>)) -> Result<()> {
        let Some(saver) = &mut self.saver else { return Ok(()) };
        saver.finish()?;
        tell_saved(saver, &mut self.paused, events);
        Ok(())
    }
}

fn tell_saved(saver: &mut AsyncSaver, paused: &mut Option<Duration>, events: &mut dyn FnMut(Event<'_>)) {
    for saved in saver.take_saved() {
        let paused = paused.take().unwrap_or_default();
        events(Event::Saved { step: saved.step, path: &saved.path, paused });
    }
}

/// Compiles and places what a run starts from: its last checkpoint, a given model, or random weights.
fn place<'r>(
    runtime: &'r Runtime,
    config: &Config,
    plan: &Plan,
    given: Option<&Model>,
    loaded: Option<&Loaded>,
    peers: Option<&'r dyn Peers>,
) -> Result<(Device<'r>, CompileReport)> {
    let table = param_table(&plan.arch);
    let seed = config.run.init_weights_seed;
    let random = |name: &str| -> Result<Given> {
        match table.iter().find(|p| p.name == name) {
            Some(spec) => Ok(Given::Host(init::initial(spec, seed)?)),
            None => Err(crate::EngineError::Input(format!("no parameter {name}")).into()),
        }
    };
    let from_model = |name: &str| -> Result<Given> {
        match given {
            Some(model) => match model.mapped(name) {
                Some(view) => Ok(view.into()),
                None => Ok(Given::Host(model.read(name)?)),
            },
            None => random(name),
        }
    };
    match loaded {
        Some(l) => {
            let source = |name: &str| -> Result<Given> { Ok(l.param(name)?.into()) };
            let moments = |name: &str| -> Result<Given> { Ok(l.moment(name)?.into()) };
            let moments = Moments { read: &moments, table_rows: l.table_rows()? };
            Device::new(runtime, plan.clone(), &source, Some(&moments), Some(l.model()), peers)
        }
        None => Device::new(runtime, plan.clone(), &from_model, None, given, peers),
    }
}

/// Name of the file by which processes know that they see the same directory.
const SIGN_FILE: &str = ".lapidary-processes";

/// Puts a number into the directory of checkpoints that other processes find there, if it is the same directory.
fn sign_files(dir: &Path) -> Result<f32> {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.subsec_nanos());
    // An f32 holds it exactly, also as a sum with zeros; it is never 0.
    let sign = 1 + ((now ^ std::process::id().rotate_left(12)) & 0xf_ffff);
    fs_err::create_dir_all(dir)?;
    fs_err::write(dir.join(SIGN_FILE), sign.to_string())?;
    Ok(sign as f32)
}

/// Waits for that number: file systems of networks may show files late.
fn shared_files(dir: &Path, sign: f32) -> Result<()> {
    let start = Instant::now();
    let wanted = (sign as u32).to_string();
    while fs_err::read_to_string(dir.join(SIGN_FILE)).ok().as_ref() != Some(&wanted) {
        if start.elapsed() > Duration::from_secs(60) {
            return Err(TrainError::OtherFiles { dir: dir.to_owned() });
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// The sum of a value over all processes: none goes on before all have come here.
fn together(peers: Option<&dyn Peers>, value: f32) -> Result<f32> {
    let mut values = [value];
    if let Some(peers) = peers {
        peers.sum(&mut values)?;
    }
    Ok(values[0])
}

fn next_batch(source: &mut Prefetch, config: &Config, rows: usize, seq: usize) -> Result<Option<TokenBatch>> {
    Ok(match source.next()? {
        None if config.data.generate_padding_batch_train => Some(TokenBatch::empty(rows, seq)),
        batch => batch,
    })
}

fn evaluate(
    device: &mut Device<'_>,
    source: &mut dyn BatchSource,
    config: &Config,
    step: u64,
    events: &mut dyn FnMut(Event<'_>),
) -> Result<EvalMetrics> {
    let beginning = source.cursor();
    let mut found = EvalMetrics::begin(step);
    let limit = config.output.eval_steps.unwrap_or(usize::MAX);
    for _ in 0..limit {
        let clock = Instant::now();
        let Some(batch) = source.next()? else { break };
        let sums = device.evaluate(&batch)?;
        let seconds = clock.elapsed().as_secs_f64();
        let z = f64::from(sums.z) / (f64::from(sums.weight) + 1e-8);
        found.add(f64::from(sums.total), f64::from(sums.weight), z, seconds);
        events(Event::EvalStep { line: &found.running_line(seconds) });
    }
    source.restore(&beginning)?;
    Ok(found)
}

fn scalars(plan: &Plan, step: u64) -> Scalars {
    let t = (step + 1) as f64;
    let correction = |b: f64| (1.0 / (1.0 - b.powf(t))) as f32;
    let (correction1, correction2) = match &plan.step.update.rule {
        Rule::AdamW(a) => (correction(a.b1), correction(a.b2)),
        Rule::Sgd => (1.0, 1.0),
    };
    Scalars { learning_rate: plan.schedule.rate(step) as f32, correction1, correction2 }
}
