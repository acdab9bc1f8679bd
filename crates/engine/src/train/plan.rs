//! From a configuration to everything a run is built of, before a device is asked.

use config::{Config, FloatType, MatmulPrecision, MeshShape, OptimizerKind, Origin, Profiler, RematPolicy, TableHome};
use gemma4::decoder::LayerRemat;
use gemma4::layer::names;
use gemma4::layout::{Layout, Slot};
use gemma4::loss::{HeadGradient, LossOptions};
use gemma4::params::{EMBED_TOKENS, EMBED_TOKENS_PER_LAYER};
use gemma4::{Arch, Flops, param_table};
use regex::Regex;
use tensor::{DType, ParamSpec, Part};

use super::TrainError;
use super::optimizer::{AdamW, Rule, Update};
use super::schedule::Schedule;
use super::step::{PerLayerTable, Role, StepOptions, device_slots};
use crate::metrics::summary::ParameterCounts;

/// Where `num_vocab_tiling` is left to us, f32 logits that take no more than this are one block,
const WHOLE_BYTES: usize = 64 << 20;
/// and larger ones at least two, each of about this much
const BLOCK_BYTES: usize = 256 << 20;
/// or so many rows: every block reads the whole table twice and adds to all of its gradient, which fewer rows do not pay for
/// (a row is 6 FLOP an element, the traffic some 12 bytes; devices have 100 to 300 FLOP a byte).
const BLOCK_ROWS: usize = 512;

/// What a run is built of.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The architecture.
    pub arch: Arch,
    /// How programs hold the parameters.
    pub layout: Layout,
    /// What the programs are built for.
    pub step: StepOptions,
    /// The learning rate.
    pub schedule: Schedule,
    /// Number of steps.
    pub steps: u64,
    /// Sequences of an evaluation batch.
    pub eval_rows: usize,
    /// Work of a step.
    pub flops: Flops,
    /// Parameters, counted.
    pub counts: ParameterCounts,
    /// Patterns of what is trained and of what has no decay.
    masks: Masks,
}

#[derive(Debug, Clone)]
struct Masks {
    trainable: Vec<Regex>,
    no_decay: Vec<Regex>,
    layer_scalar: bool,
}

impl Masks {
    fn new(config: &Config) -> Result<Self, TrainError> {
        let compile = |key: &'static str, patterns: &[String]| {
            patterns
                .iter()
                .map(|p| Regex::new(p).map_err(|e| TrainError::Key { key, reason: format!("{p:?}: {e}") }))
                .collect::<Result<Vec<_>, _>>()
        };
        Ok(Masks {
            trainable: compile("trainable_parameters_mask", &config.optimizer.trainable)?,
            no_decay: compile("adamw_mask", &config.optimizer.no_decay)?,
            layer_scalar: config.optimizer.train_layer_scalar,
        })
    }

    fn role(&self, p: &ParamSpec) -> (bool, bool) {
        // MaxText's patterns are written for its own paths, users of Hugging Face know theirs: either may match.
        let maxtext = format!("params/{}", p.maxtext_name.replace('.', "/"));
        let hit = |patterns: &[Regex]| {
            patterns.iter().any(|r| r.is_match(&p.name) || r.is_match(&p.maxtext_name) || r.is_match(&maxtext))
        };
        let trained = (self.trainable.is_empty() || hit(&self.trainable)) && (p.trainable || self.layer_scalar);
        (trained, !hit(&self.no_decay))
    }
}

impl Plan {
    /// Checks what the configuration asks for and lays it out for as many devices as its axes ask for.
    ///
    /// # Errors
    /// As [`on`](Self::on).
    pub fn new(config: &Config, arch: Arch) -> Result<Self, TrainError> {
        Self::on(config, arch, &config.mesh.resolve(config.mesh.wanted(), 1)?)
    }

    /// Checks what the configuration asks for and lays it out on a mesh. Batch and work are those of all devices.
    ///
    /// # Errors
    /// Names the key that cannot be followed, and the parameter and axis that the mesh does not divide.
    pub fn on(config: &Config, arch: Arch, mesh: &MeshShape) -> Result<Self, TrainError> {
        refuse(config)?;
        let devices = mesh.devices();
        let masks = Masks::new(config)?;
        let layout = match config.memory.scan_layers {
            true => {
                Layout::scanned(&arch).map_err(|e| TrainError::Key { key: "scan_layers", reason: e.to_string() })?
            }
            false => Layout::unrolled(&arch),
        };
        let batch = config.run.batch(devices)?;
        let (rows, seq) = (batch.micro, config.run.max_target_length);
        let asked = config.run.per_device_batch_size * devices as f64;
        if asked != rows as f64 {
            let s = if devices == 1 { "" } else { "s" };
            let reason = format!("{asked} sequences on {devices} device{s}: give a number that makes them whole");
            return Err(TrainError::Key { key: "per_device_batch_size", reason });
        }
        let layout = partitioned(layout, config, &arch, mesh, (rows, batch.eval))?;
        // What one device has of tokens and vocabulary.
        let (parts, vocab) = match layout.partition() {
            Some(p) => (p.batch_parts() * p.token_length_parts(), arch.vocab_size() / p.vocab_parts(arch.vocab_size())),
            None => (1, arch.vocab_size()),
        };
        let tokens = rows * seq / parts;
        let dtype = float(config.numerics.dtype);
        let weight_dtype = float(config.numerics.weight_dtype);
        let o = &config.optimizer;
        let rule = match o.kind {
            OptimizerKind::AdamW => Rule::AdamW(AdamW {
                b1: o.b1,
                b2: o.b2,
                eps: o.eps,
                eps_root: o.eps_root,
                weight_decay: o.weight_decay,
                mu_dtype: float(o.mu_dtype),
                nu_dtype: weight_dtype,
            }),
            OptimizerKind::Sgd => Rule::Sgd,
            OptimizerKind::AdamPax => {
                let reason = "adam_pax is not offered; adamw is, which differs in how weight decay is applied".into();
                return Err(TrainError::Key { key: "opt_type", reason });
            }
        };
        let written = !matches!(config.origin("num_vocab_tiling"), None | Some(Origin::Default));
        let blocks = match written {
            true => config.memory.num_vocab_tiling,
            false => blocks_that_pay(tokens, vocab),
        };
        if !tokens.is_multiple_of(blocks) {
            let reason = format!("{tokens} tokens a device are not divisible into {blocks} blocks");
            return Err(TrainError::Key { key: "num_vocab_tiling", reason });
        }
        let table = param_table(&arch);
        let ple_trained = table.iter().any(|p| p.name == EMBED_TOKENS_PER_LAYER && masks.role(p).0);
        let step = StepOptions {
            rows,
            seq,
            accumulation: config.run.gradient_accumulation_steps,
            segments: config.data.packing && config.data.dataset_type == config::DatasetKind::Hf,
            loss: LossOptions {
                dtype,
                remat: remat(config.memory.remat_policy),
                // Where it runs says more.
                called: false,
                blocks,
                z_loss: config.optimizer.z_loss_multiplier,
                gradient: HeadGradient::HiddenAndTable,
            },
            per_layer: match (config.memory.per_layer_table, ple_trained) {
                _ if arch.per_layer_input().is_none() => PerLayerTable::Device,
                (TableHome::Device, _) | (TableHome::Auto, true) => PerLayerTable::Device,
                (TableHome::Host, true) => PerLayerTable::HostTrained,
                (TableHome::Host | TableHome::Auto, false) => PerLayerTable::Host(frozen_dtype(dtype)),
            },
            weight_dtype,
            update: Update { rule, clip: o.gradient_clipping_threshold },
        };
        let layout = match (step.per_layer, arch.per_layer_input().map(|p| p.vocab_size)) {
            (PerLayerTable::HostTrained, Some(vocab)) => {
                layout.with_table_rows(vocab.min(step.rows * step.seq * step.accumulation))
            }
            _ => layout,
        };
        let sum = |f: &dyn Fn(&ParamSpec) -> bool| {
            table.iter().filter(|p| f(p)).map(|p| p.shape.elements() as u64).sum::<u64>()
        };
        let counts = ParameterCounts {
            total: sum(&|_| true),
            trainable: sum(&|p| masks.role(p).0),
            embeddings: sum(&|p| matches!(p.part, Part::TokenEmbedding | Part::PerLayerEmbedding)),
        };
        if counts.trainable == 0 {
            let reason = "no parameter matches, so that there is nothing to train; patterns are searched in names such \
                          as layers.0.mlp.up_proj.weight (Hugging Face) and decoder.layers_0.mlp.wi_1.kernel (MaxText)";
            return Err(TrainError::Key { key: "trainable_parameters_mask", reason: reason.into() });
        }
        let flops = Flops::training_step(&arch, config.run.per_device_batch_size, seq, step.accumulation);
        let plan = Plan {
            schedule: Schedule::new(&config.schedule),
            steps: config.run.steps as u64,
            eval_rows: batch.eval,
            flops,
            counts,
            masks,
            arch,
            layout,
            step,
        };
        plan.check_stacks()?;
        Ok(plan)
    }

    /// Devices that share the run.
    #[must_use]
    pub fn devices(&self) -> usize {
        self.layout.devices()
    }

    /// What is done with a slot.
    #[must_use]
    pub fn role(&self, slot: &Slot) -> Role {
        let (trained, decayed) = self.masks.role(slot.spec());
        let dtype = if trained { self.step.weight_dtype } else { frozen_dtype(self.step.loss.dtype) };
        Role { trained, decayed, dtype }
    }

    /// Whether a parameter is trained.
    #[must_use]
    pub fn is_trained(&self, p: &ParamSpec) -> bool {
        self.masks.role(p).0
    }

    /// The slots a program takes, in order.
    pub fn slots(&self) -> impl Iterator<Item = &Slot> {
        device_slots(&self.layout, self.step.per_layer)
    }

    /// The part of [`Flops::total`] that a step does: products for gradients that nobody asks for are not computed. Gradients by
    /// activations reach down to the first layer with a trained parameter, of which all count.
    #[must_use]
    pub fn worked_flops(&self) -> f64 {
        let table = param_table(&self.arch);
        let trained = |p: &ParamSpec| self.is_trained(p);
        // Embeddings and what makes per-layer inputs lie before every layer.
        let last = "norm.weight";
        let before = table.iter().any(|p| p.layer.is_none() && p.name != last && trained(p));
        let layers = table.iter().filter(|p| trained(p)).filter_map(|p| p.layer);
        let first = if before { Some(0) } else { layers.min() };
        let reached = |layer: Option<usize>| match (layer, first) {
            (Some(l), Some(f)) => l >= f,
            // The projection that makes per-layer inputs.
            (None, _) => before,
            (_, None) => false,
        };
        let tokens = self.flops.tokens as f64;
        let products: f64 = table
            .iter()
            .filter(|p| p.shape.rank() == 2 && p.name != EMBED_TOKENS_PER_LAYER)
            .map(|p| {
                let forward = 2.0 * tokens * p.shape.elements() as f64;
                // The head's hidden states have a gradient whatever is trained.
                let passed = p.name == EMBED_TOKENS || reached(p.layer);
                forward * (1.0 + f64::from(u8::from(passed)) + f64::from(u8::from(trained(p))))
            })
            .sum();
        let share = |layer: usize| if reached(Some(layer)) { 1.0 } else { 1.0 / 3.0 };
        products + self.flops.layers.iter().map(|l| l.attention * share(l.layer)).sum::<f64>()
    }

    /// Layers of a loop are all treated alike.
    fn check_stacks(&self) -> Result<(), TrainError> {
        for slot in self.layout.slots() {
            let first = self.masks.role(slot.spec());
            if let Some(other) = slot.members.iter().find(|m| self.masks.role(m) != first) {
                let key = match self.masks.role(other).0 == first.0 {
                    true => "adamw_mask",
                    false => "trainable_parameters_mask",
                };
                let reason = format!(
                    "it treats {} and {} differently, which one loop over both cannot; use scan_layers=false",
                    slot.spec().name,
                    other.name
                );
                return Err(TrainError::Key { key, reason });
            }
        }
        Ok(())
    }
}

/// The layout on the mesh, if it has several devices and everything divides.
fn partitioned(
    layout: Layout,
    config: &Config,
    arch: &Arch,
    mesh: &MeshShape,
    (rows, eval_rows): (usize, usize),
) -> Result<Layout, TrainError> {
    let key = |key: &'static str, reason: String| TrainError::Key { key, reason };
    let partition = crate::mesh::partition(&config.mesh, mesh)?;
    let (batch, length) = (partition.batch_parts(), partition.length_parts());
    for (name, rows) in [("per_device_batch_size", rows), ("eval_per_device_batch_size", eval_rows)] {
        if !rows.is_multiple_of(batch) {
            let reason = format!(
                "{rows} sequences on {} devices cannot be dealt out evenly to {batch}, the devices that share a batch",
                mesh.devices()
            );
            return Err(key(name, reason));
        }
    }
    let seq = config.run.max_target_length;
    if !seq.is_multiple_of(length) {
        let reason = format!("{seq} is not divisible by {length}, the devices that share a sequence");
        return Err(key("max_target_length", reason));
    }
    Ok(crate::mesh::lay_out(layout, &config.mesh, partition, arch)?)
}

/// Frozen parameters are only ever read in the activation dtype. No file has more digits than f32 to read.
fn frozen_dtype(activations: DType) -> DType {
    if activations == DType::F64 { DType::F32 } else { activations }
}

/// As few blocks as keep one block's logits near [`BLOCK_BYTES`] or [`BLOCK_ROWS`], whatever is more.
fn blocks_that_pay(rows: usize, vocab: usize) -> usize {
    let bytes = vocab * 4;
    if rows * bytes <= WHOLE_BYTES {
        return 1;
    }
    let block = (BLOCK_BYTES / bytes.max(1)).max(BLOCK_ROWS);
    let wanted = rows.div_ceil(block).max(2);
    let blocks = (wanted..=rows).find(|b| rows.is_multiple_of(*b)).unwrap_or(1);
    // Rows that do not divide well go in one block if that is not much more than a block.
    if rows <= 2 * block && rows / blocks < block / 8 { 1 } else { blocks }
}

fn float(f: FloatType) -> DType {
    match f {
        FloatType::BFloat16 => DType::BF16,
        FloatType::Float16 => DType::F16,
        FloatType::Float32 => DType::F32,
        FloatType::Float64 => DType::F64,
    }
}

/// What is kept by MaxText's policies.
fn remat(policy: RematPolicy) -> LayerRemat {
    use names::{CONTEXT, KEY_PROJ, MLPWI_0, MLPWI_1, MLPWO, OUT_PROJ, QUERY_PROJ, VALUE_PROJ};
    const QKV: [&str; 3] = [QUERY_PROJ, KEY_PROJ, VALUE_PROJ];
    let keep = |more: &[&'static str]| LayerRemat::Keep([&QKV, more].concat());
    match policy {
        RematPolicy::None => LayerRemat::Everything,
        RematPolicy::Minimal => keep(&[OUT_PROJ, MLPWI_0, MLPWI_1, MLPWO]),
        RematPolicy::MinimalWithContext => keep(&[OUT_PROJ, MLPWI_0, MLPWI_1, MLPWO, CONTEXT]),
        RematPolicy::SaveDotWithContextExceptMlp => keep(&[OUT_PROJ, CONTEXT]),
        RematPolicy::SaveDotExceptMlpwi => keep(&[OUT_PROJ, MLPWO]),
        RematPolicy::SaveDotExceptMlp => keep(&[OUT_PROJ]),
        RematPolicy::SaveQkvProj => keep(&[]),
        RematPolicy::SaveOutProj => LayerRemat::Keep(vec![OUT_PROJ]),
        _ => LayerRemat::Keep(Vec::new()),
    }
}

/// Keys whose value this trainer cannot follow.
fn refuse(config: &Config) -> Result<(), TrainError> {
    let key = |key: &'static str, reason: &str| Err(TrainError::Key { key, reason: reason.to_owned() });
    let n = &config.numerics;
    if n.grad_dtype != FloatType::Float32 {
        return key("grad_dtype", "gradients are summed and applied in float32; rounding them first is not offered");
    }
    if n.weight_dtype == FloatType::Float16 || n.dtype == FloatType::Float16 {
        return key("dtype", "training in float16 needs loss scaling, which is not offered; use bfloat16 or float32");
    }
    if n.logits_dot_in_fp32 && n.dtype != FloatType::Float32 {
        return key("logits_dot_in_fp32", "not offered in training; products accumulate in f32 and round once");
    }
    if !matches!(n.matmul_precision, MatmulPrecision::Default) && n.dtype != FloatType::Float32 {
        return key("matmul_precision", "only with dtype=float32, where a CPU computes exactly");
    }
    if config.optimizer.skip_step_on_spikes {
        return key("skip_step_on_spikes", "not offered yet; NaN and infinite losses stop the run (abort_on_nan_loss)");
    }
    if config.output.profiler != Profiler::Off {
        return key("profiler", "the CPU plugin has no profiler; use perf(1) or the plugin's own tools");
    }
    if config.sft.enable || config.lora.enable {
        return key("use_sft", "fine-tuning on conversations and adapters are not offered yet in this version");
    }
    if !config.checkpoint.load_full_state_path.is_empty() {
        return key("load_full_state_path", "give run_name of the run to continue instead");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(words: &[&str]) -> Plan {
        let config = config::Sources::from_args(words.iter().copied()).resolve().unwrap();
        Plan::new(&config, Arch::from_config(&config).unwrap()).unwrap()
    }

    #[test]
    fn frozen_parameters_are_work_not_done() {
        let tiny = ["model_name=tiny-e2b", "max_target_length=64"];
        let all = plan(&tiny);
        // Per-layer projections of all layers are one parameter here and several products there: to rounding.
        assert!((all.worked_flops() / all.flops.total - 1.0).abs() < 1e-12);
        let of = |mask: &str| {
            let p = plan(&[&tiny[..], &[&format!("trainable_parameters_mask=[\"{mask}\"]")]].concat());
            p.worked_flops() / p.flops.total
        };
        let (last, first) = (of("layers\\\\.9\\\\."), of("layers\\\\.0\\\\."));
        assert!(last > 1.0 / 3.0 && last < 0.6, "{last}");
        assert!(first > 2.0 / 3.0 - 0.05 && first < 0.8, "{first}");
    }

    #[test]
    fn a_trained_table_is_on_the_host_only_if_asked() {
        let tiny = ["model_name=tiny-e2b", "max_target_length=8", "per_device_batch_size=2"];
        let with = |more: &[&str]| plan(&[&tiny[..], more].concat());
        assert_eq!(with(&[]).step.per_layer, PerLayerTable::Device);
        let frozen = ["trainable_parameters_mask=[\"mlp\"]"];
        assert!(matches!(with(&frozen).step.per_layer, PerLayerTable::Host(_)));
        let hosted = with(&["per_layer_table=host"]);
        assert_eq!(hosted.step.per_layer, PerLayerTable::HostTrained);
        let slot = hosted.slots().find(|s| hosted.step.is_hosted(s)).unwrap();
        assert_eq!(slot.shape.dims(), [16, 80]);
    }

    #[test]
    fn blocks_divide_the_rows_and_bound_the_logits() {
        assert_eq!(blocks_that_pay(16, 512), 1);
        assert_eq!(blocks_that_pay(2048, 32768), 2);
        assert_eq!(blocks_that_pay(16384, 32768), 8);
        // 262144 x 4 bytes is 1 MiB a row.
        assert_eq!(blocks_that_pay(64, 262_144), 1);
        assert_eq!(blocks_that_pay(512, 262_144), 2);
        assert_eq!(blocks_that_pay(4096, 262_144), 8);
        // Prime numbers.
        assert_eq!(blocks_that_pay(97, 262_144), 1);
        assert_eq!(blocks_that_pay(4099, 262_144), 4099);
    }
}
