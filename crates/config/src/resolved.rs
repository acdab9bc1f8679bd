//! The resolved configuration: plain, checked, nothing left to default.

use std::path::PathBuf;

use serde::Serialize;

use crate::choice::{
    Attention, DatasetKind, DecayStyle, DecoderBlock, FloatType, GateActivation, Hardware, MatmulPrecision,
    OptimizerKind, PackingKind, Profiler, RematPolicy, SamplingStrategy, ScheduleKind, TableHome,
};
use crate::error::{Error, Problem};
use crate::layer::{Note, Origin, RawConfig};
use crate::value::{AxisRule, Value};

/// A checked configuration.
///
/// The groups hold what the keys mean (zeros and -1 that stand for other keys are gone); [`Config::value`] and
/// [`Config::origin`] give what was written.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Config {
    /// The model and its shape.
    pub model: Model,
    /// Number types and precision.
    pub numerics: Numerics,
    /// Attention and memory.
    pub memory: Memory,
    /// Batch, length and steps.
    pub run: Run,
    /// The learning rate.
    pub schedule: Schedule,
    /// The optimizer.
    pub optimizer: Optimizer,
    /// Text.
    pub data: Data,
    /// Saving and restoring.
    pub checkpoint: Checkpoint,
    /// Devices.
    pub mesh: Mesh,
    /// Where results go.
    pub output: Output,
    /// Generating text.
    pub decode: Decode,
    /// Fine-tuning on conversations.
    pub sft: Sft,
    /// Low-rank adapters.
    pub lora: Lora,
    #[serde(skip)]
    pub(crate) raw: RawConfig,
}

/// The model's shape, scaled by `global_parameter_scale`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Model {
    /// Name of the model, without `-Instruct`.
    pub name: String,
    /// Class of the layers.
    pub decoder_block: DecoderBlock,
    /// Number of layers.
    pub num_layers: usize,
    /// Hidden size.
    pub emb_dim: usize,
    /// Query heads.
    pub num_query_heads: usize,
    /// Key/value heads of sliding layers.
    pub num_kv_heads: usize,
    /// Key/value heads of full layers.
    pub global_num_kv_heads: usize,
    /// Head size of sliding layers.
    pub head_dim: usize,
    /// Head size of full layers.
    pub global_head_dim: usize,
    /// MLP width of layers that are not doubled.
    pub mlp_dim: usize,
    /// Activation of the MLP's gate.
    pub gate_activation: GateActivation,
    /// Rows of the token table.
    pub vocab_size: usize,
    /// Width of the per-layer embedding; 0 without one.
    pub hidden_size_per_layer_input: usize,
    /// Rows of the per-layer table.
    pub vocab_size_per_layer_input: usize,
    /// Last layers that borrow keys and values.
    pub num_kv_shared_layers: usize,
    /// Whether borrowing layers have twice the MLP width.
    pub use_double_wide_mlp: bool,
    /// Positions a sliding layer sees, the query's own included.
    pub sliding_window_size: usize,
    /// Period of the layer kinds: layer i is full when `i % period == period - 1`.
    pub sliding_window_pattern: usize,
    /// Base of the rotary frequencies of sliding layers.
    pub local_rope_theta: f64,
    /// Base of the rotary frequencies of full layers.
    pub global_rope_theta: f64,
    /// Rotated share of a head of a sliding layer.
    pub local_rope_proportion: f64,
    /// Rotated share of a head of a full layer.
    pub global_rope_proportion: f64,
    /// Epsilon of the norms.
    pub normalization_layer_epsilon: f64,
    /// Soft cap of the logits, if any.
    pub final_logits_soft_cap: Option<f64>,
}

impl Model {
    /// Whether a layer attends to all positions.
    #[must_use]
    pub fn is_full_attention(&self, layer: usize) -> bool {
        layer % self.sliding_window_pattern == self.sliding_window_pattern - 1
    }
}

/// Number types and precision.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Numerics {
    /// Type of activations.
    pub dtype: FloatType,
    /// Type of stored weights.
    pub weight_dtype: FloatType,
    /// Type of gradients.
    pub grad_dtype: FloatType,
    /// Precision of products.
    pub matmul_precision: MatmulPrecision,
    /// MLP activation in f32.
    pub activations_in_float32: bool,
    /// Query-key products in f32.
    pub float32_qk_product: bool,
    /// Attention softmax in f32.
    pub float32_logits: bool,
    /// Output projection accumulated in f32.
    pub logits_dot_in_fp32: bool,
    /// Logits handed out in f32.
    pub cast_logits_to_fp32: bool,
}

/// Attention and memory.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Memory {
    /// How attention is computed.
    pub attention: Attention,
    /// What is kept for the backward pass.
    pub remat_policy: RematPolicy,
    /// Whether groups of layers are one loop.
    pub scan_layers: bool,
    /// Pieces of output projection and loss.
    pub num_vocab_tiling: usize,
    /// Where the per-layer table is.
    pub per_layer_table: TableHome,
    /// Most documents in a sequence, if limited.
    pub max_segments_per_seq: Option<usize>,
}

/// Batch, length and steps.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Run {
    /// Sequences per device and micro-batch.
    pub per_device_batch_size: f64,
    /// Sequences per device in evaluation.
    pub eval_per_device_batch_size: f64,
    /// Micro-batches in a step.
    pub gradient_accumulation_steps: usize,
    /// Tokens per sequence.
    pub max_target_length: usize,
    /// Longest prompt.
    pub max_prefill_predict_length: usize,
    /// Training steps.
    pub steps: usize,
    /// Seed of initial weights.
    pub init_weights_seed: u64,
}

/// Sequences over all devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Batch {
    /// In a micro-batch.
    pub micro: usize,
    /// In a step.
    pub train: usize,
    /// Read from the data for a step: more than `train` when devices outnumber sequences.
    pub load: usize,
    /// In an evaluation batch.
    pub eval: usize,
}

impl Run {
    /// Computes the batch over `devices` devices.
    ///
    /// # Errors
    /// When it would hold no sequence.
    pub fn batch(&self, devices: usize) -> Result<Batch, Error> {
        let whole = |per_device: f64| (devices as f64 * per_device) as usize;
        let (micro, eval) = (whole(self.per_device_batch_size), whole(self.eval_per_device_batch_size));
        let mut problems = Vec::new();
        for (key, size, per_device) in [
            ("per_device_batch_size", micro, self.per_device_batch_size),
            ("eval_per_device_batch_size", eval, self.eval_per_device_batch_size),
        ] {
            // A derived evaluation batch repeats the first problem.
            let repeats = key != "per_device_batch_size" && per_device == self.per_device_batch_size;
            if size == 0 && !repeats {
                let s = if devices == 1 { "" } else { "s" };
                let message = format!("{per_device:?} on {devices} device{s} makes an empty batch");
                let hint = format!("use at least {}", 1.0 / devices.max(1) as f64);
                problems.push(Problem::new(key, &Origin::Default, message).hint(hint));
            }
        }
        if !problems.is_empty() {
            return Err(Error { problems });
        }
        let load = if self.per_device_batch_size < 1.0 { devices } else { micro };
        let accumulation = self.gradient_accumulation_steps;
        Ok(Batch { micro, train: micro.saturating_mul(accumulation), load: load.saturating_mul(accumulation), eval })
    }
}

/// The learning rate.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Schedule {
    /// Peak.
    pub learning_rate: f64,
    /// Course.
    pub kind: ScheduleKind,
    /// Share of warm-up.
    pub warmup_steps_fraction: f64,
    /// Final rate as a share of the peak.
    pub final_fraction: f64,
    /// Length in steps.
    pub steps: usize,
    /// Share of decay (wsd).
    pub wsd_decay_steps_fraction: f64,
    /// Course of the decay (wsd).
    pub wsd_decay_style: DecayStyle,
}

/// The optimizer.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Optimizer {
    /// Which one.
    pub kind: OptimizerKind,
    /// Decay of the first moment.
    pub b1: f64,
    /// Decay of the second moment.
    pub b2: f64,
    /// Added to the root.
    pub eps: f64,
    /// Added under the root.
    pub eps_root: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Type of the first moment.
    pub mu_dtype: FloatType,
    /// Patterns of parameters without decay.
    pub no_decay: Vec<String>,
    /// Patterns of the parameters to train; empty means all.
    pub trainable: Vec<String>,
    /// Largest gradient norm; 0 does not clip.
    pub gradient_clipping_threshold: f64,
    /// Factor of the z term of the loss.
    pub z_loss_multiplier: f64,
    /// Whether `layer_scalar` is trained.
    pub train_layer_scalar: bool,
    /// Whether odd steps are skipped.
    pub skip_step_on_spikes: bool,
    /// Steps over which the ordinary is measured.
    pub skip_step_interval: usize,
    /// Standard deviations that count as odd.
    pub skip_step_scaling_factor: f64,
}

/// Text.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Data {
    /// Kind of data set.
    pub dataset_type: DatasetKind,
    /// Directory or format.
    pub hf_path: String,
    /// Subset.
    pub hf_name: String,
    /// Subdirectory.
    pub hf_data_dir: String,
    /// Training files.
    pub hf_train_files: String,
    /// Evaluation split.
    pub hf_eval_split: String,
    /// Evaluation files.
    pub hf_eval_files: String,
    /// Training split.
    pub train_split: String,
    /// Columns of training text.
    pub train_data_columns: Vec<String>,
    /// Columns of evaluation text.
    pub eval_data_columns: Vec<String>,
    /// Tokenizer file or directory; empty means the checkpoint's.
    pub tokenizer_path: String,
    /// Whether training text is tokenized.
    pub tokenize_train_data: bool,
    /// Whether evaluation text is tokenized.
    pub tokenize_eval_data: bool,
    /// Start token before documents.
    pub add_bos: bool,
    /// End token behind documents.
    pub add_eos: bool,
    /// Cut long documents.
    pub use_truncation: bool,
    /// Several documents in a sequence.
    pub packing: bool,
    /// How documents are packed.
    pub packing_kind: PackingKind,
    /// Passes over the text.
    pub num_epoch: usize,
    /// Whether to shuffle.
    pub enable_data_shuffling: bool,
    /// Seed of the shuffle.
    pub data_shuffle_seed: u64,
    /// Go on with empty training batches.
    pub generate_padding_batch_train: bool,
    /// Go on with empty evaluation batches.
    pub generate_padding_batch_eval: bool,
    /// Stop at the first bad document.
    pub abort_on_bad_data: bool,
}

/// Saving and restoring.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Checkpoint {
    /// Whether there are checkpoints.
    pub enable: bool,
    /// Write in the background.
    pub asynchronous: bool,
    /// Steps between saves.
    pub period: usize,
    /// Save before the first step.
    pub save_on_start: bool,
    /// Save after the last step.
    pub save_on_completion: bool,
    /// Save on a termination signal.
    pub save_on_termination: bool,
    /// How many to keep; `None` keeps all.
    pub max_to_keep: Option<usize>,
    /// Weights to start from; empty for none.
    pub load_parameters_path: String,
    /// Full state to start from; empty for none.
    pub load_full_state_path: String,
}

/// Devices. Axis sizes as written: -1 takes what is left.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Mesh {
    /// Kind of device.
    pub hardware: Hardware,
    /// Plugin given by path; empty for none.
    pub pjrt_plugin: String,
    /// Where compiled programs are kept.
    pub compilation_cache: CompilationCache,
    /// Virtual devices of a CPU; 0 for as many as the axes ask for.
    pub num_cpu_devices: usize,
    /// Devices of a slice along every axis of [`MESH_AXES`](crate::mesh::MESH_AXES).
    pub ici: [i64; 6],
    /// Slices along every axis.
    pub dcn: [i64; 6],
    /// Rules given for logical axes.
    pub rules: Vec<AxisRule>,
    /// Whether those are the whole list.
    pub only_rules: bool,
    /// Largest share of parameter bytes that may be whole on every device.
    pub sharding_tolerance: f64,
}

/// Where compiled programs are kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum CompilationCache {
    /// The tool's own cache directory.
    Own,
    /// Nowhere.
    Off,
    /// A directory.
    Directory(PathBuf),
}

/// Where results go.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Output {
    /// Name of the run; empty until the run names itself.
    pub run_name: String,
    /// Directory of all runs.
    pub base_output_directory: PathBuf,
    /// File of metrics; empty for none.
    pub metrics_file: String,
    /// TensorBoard files.
    pub enable_tensorboard: bool,
    /// Steps between flushes.
    pub log_period: usize,
    /// Log the configuration.
    pub log_config: bool,
    /// Steps between evaluations, if there are any.
    pub eval_interval: Option<usize>,
    /// Batches per evaluation, if limited.
    pub eval_steps: Option<usize>,
    /// First step after which to evaluate.
    pub eval_start_step: usize,
    /// Evaluation loss that ends training; 0 for none.
    pub target_eval_loss: f64,
    /// Stop on NaN.
    pub abort_on_nan_loss: bool,
    /// Stop on infinity.
    pub abort_on_inf_loss: bool,
    /// Profiler.
    pub profiler: Profiler,
    /// Steps before the profile.
    pub skip_first_n_steps_for_profiler: usize,
    /// Steps in the profile.
    pub profiler_steps: usize,
    /// Steps handed ahead to the device.
    pub max_inflight_computations: usize,
}

/// Generating text.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Decode {
    /// Text to continue.
    pub prompt: String,
    /// Instruction before the chat.
    pub system_prompt: String,
    /// Wrap the prompt in the chat template.
    pub use_chat_template: bool,
    /// Template; empty for the checkpoint's.
    pub chat_template: String,
    /// File of a template; empty for none.
    pub chat_template_path: String,
    /// How tokens are chosen.
    pub strategy: SamplingStrategy,
    /// Share of probability (nucleus, composite).
    pub nucleus_p: f64,
    /// Number of tokens (topk, composite).
    pub top_k: usize,
    /// Divides the logits.
    pub temperature: f64,
    /// Text that must come out; empty for none.
    pub expect: String,
}

/// Fine-tuning on conversations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Sft {
    /// Whether to.
    pub enable: bool,
    /// Count only answers in the loss.
    pub train_on_completion_only: bool,
}

/// Low-rank adapters.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Lora {
    /// Whether to train them.
    pub enable: bool,
    /// Rank.
    pub rank: usize,
    /// Scale times rank.
    pub alpha: f64,
    /// Pattern of modules; empty for the projections of every layer.
    pub module_path: String,
    /// Adapters to start from; empty for none.
    pub restore_path: String,
}

impl Config {
    /// What was written for a key, by its name or an alias.
    #[must_use]
    pub fn value(&self, key: &str) -> Option<&Value> {
        self.raw.value(key)
    }

    /// Where a key's value came from.
    #[must_use]
    pub fn origin(&self, key: &str) -> Option<&Origin> {
        self.raw.origin(key)
    }

    /// Keys that were set and change nothing.
    #[must_use]
    pub fn notes(&self) -> &[Note] {
        self.raw.notes()
    }

    /// The merged layers.
    #[must_use]
    pub fn raw(&self) -> &RawConfig {
        &self.raw
    }

    /// Where the shape came from: the model file or the checkpoint, if not the user's own keys.
    #[must_use]
    pub fn model_source(&self) -> Option<&Origin> {
        self.raw.model_source.as_ref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_over_devices() {
        let run = Run {
            per_device_batch_size: 2.0,
            eval_per_device_batch_size: 1.0,
            gradient_accumulation_steps: 3,
            max_target_length: 8,
            max_prefill_predict_length: 8,
            steps: 1,
            init_weights_seed: 0,
        };
        assert_eq!(run.batch(4), Ok(Batch { micro: 8, train: 24, load: 24, eval: 4 }));
        let half = Run { per_device_batch_size: 0.5, eval_per_device_batch_size: 0.5, ..run };
        assert_eq!(half.batch(4), Ok(Batch { micro: 2, train: 6, load: 12, eval: 2 }));
        let error = half.batch(1).unwrap_err();
        assert_eq!(error.problems.len(), 1);
        assert_eq!(error.problems[0].to_string(), "per_device_batch_size: 0.5 on 1 device makes an empty batch");
        assert_eq!(error.problems[0].hint.as_deref(), Some("use at least 1"));
    }
}
