//! From checked values to the resolved configuration.

use std::path::PathBuf;

use crate::check;
use crate::choice::{
    Attention, DatasetKind, DecayStyle, DecoderBlock, FloatType, GateActivation, Hardware, MatmulPrecision,
    OptimizerKind, PackingKind, Profiler, RematPolicy, SamplingStrategy, ScheduleKind, TableHome,
};
use crate::error::Error;
use crate::layer::RawConfig;
use crate::mesh::MESH_AXES;
use crate::resolved::{
    Checkpoint, CompilationCache, Config, Data, Decode, Lora, Memory, Mesh, Model, Numerics, Optimizer, Output, Run,
    Schedule, Sft,
};
use crate::value::{AxisRule, Value};

/// Typed reading of values that were checked when they were taken in.
///
/// A wrong name or type here is a mistake in this file; a test reads every field, so none reaches a user.
pub(crate) struct Reader<'a>(pub(crate) &'a RawConfig);

impl Reader<'_> {
    fn get(&self, key: &str) -> &Value {
        let value = self.0.value(key);
        debug_assert!(value.is_some(), "no key {key}");
        value.unwrap_or(&Value::Null)
    }

    pub(crate) fn bool(&self, key: &str) -> bool {
        debug_assert!(matches!(self.get(key), Value::Bool(_)), "{key} is no bool");
        matches!(self.get(key), Value::Bool(true))
    }

    pub(crate) fn int(&self, key: &str) -> i64 {
        debug_assert!(matches!(self.get(key), Value::Int(_)), "{key} is no int");
        if let Value::Int(i) = self.get(key) { *i } else { 0 }
    }

    pub(crate) fn size(&self, key: &str) -> usize {
        usize::try_from(self.int(key)).unwrap_or(0)
    }

    /// A count where negative numbers (or null) mean none.
    pub(crate) fn limit(&self, key: &str) -> Option<usize> {
        if let Value::Int(i) = self.get(key) { usize::try_from(*i).ok() } else { None }
    }

    pub(crate) fn float(&self, key: &str) -> f64 {
        debug_assert!(matches!(self.get(key), Value::Float(_)), "{key} is no float");
        if let Value::Float(x) = self.get(key) { *x } else { 0.0 }
    }

    pub(crate) fn cap(&self, key: &str) -> Option<f64> {
        if let Value::Float(x) = self.get(key) { (*x > 0.0).then_some(*x) } else { None }
    }

    pub(crate) fn text(&self, key: &str) -> &str {
        debug_assert!(matches!(self.get(key), Value::Text(_)), "{key} is no text");
        if let Value::Text(text) = self.get(key) { text } else { "" }
    }

    fn owned(&self, key: &str) -> String {
        self.text(key).to_owned()
    }

    pub(crate) fn rules(&self, key: &str) -> Vec<AxisRule> {
        if let Value::Rules(rules) = self.get(key) { rules.clone() } else { Vec::new() }
    }

    pub(crate) fn list(&self, key: &str) -> Vec<String> {
        debug_assert!(matches!(self.get(key), Value::List(_)), "{key} is no list");
        if let Value::List(items) = self.get(key) { items.clone() } else { Vec::new() }
    }

    /// The variant of a word that was checked; `fallback` only if the table and the type disagree, which a test denies.
    pub(crate) fn word<T>(&self, key: &str, from: impl Fn(&str) -> Option<T>, fallback: T) -> T {
        let found = from(self.text(key));
        debug_assert!(found.is_some(), "{key}: {:?}", self.text(key));
        found.unwrap_or(fallback)
    }

    pub(crate) fn float_type(&self, key: &str) -> FloatType {
        self.word(key, FloatType::from_word, FloatType::Float32)
    }
}

/// Powers of two by which the base sizes grow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Scales {
    pub(crate) emb: u32,
    pub(crate) heads: u32,
    pub(crate) mlp: u32,
    pub(crate) layers: u32,
}

/// Splits a power of two over the sizes; `None` for other numbers.
pub(crate) fn scales(global: i64) -> Option<Scales> {
    let global = u64::try_from(global).ok().filter(|g| g.is_power_of_two())?;
    let (base, rest) = (global.ilog2() / 3, global.ilog2() % 3);
    let heads = base + u32::from(rest > 0);
    Some(Scales { emb: base + u32::from(rest > 1), heads, mlp: heads, layers: base })
}

pub(crate) fn model(raw: &RawConfig) -> Model {
    let r = Reader(raw);
    let scales = scales(r.int("global_parameter_scale")).unwrap_or(Scales { emb: 0, heads: 0, mlp: 0, layers: 0 });
    // Sizes are below 2^31 and each scale below 2^31: the product fits.
    let scaled = |key: &str, power: u32| r.size(key) << power.min(31);
    let or = |value: usize, other: usize| if value == 0 { other } else { value };
    let theta = |key: &str| r.limit(key).filter(|t| *t > 0).unwrap_or_else(|| r.size("rope_max_timescale")) as f64;
    let name = r.text("model_name");
    let name = name.strip_suffix("-Instruct").unwrap_or(name);
    let num_kv_heads = scaled("base_num_kv_heads", scales.heads);
    Model {
        name: name.to_owned(),
        decoder_block: r.word("decoder_block", DecoderBlock::from_word, DecoderBlock::Gemma4Small),
        num_layers: scaled("base_num_decoder_layers", scales.layers),
        emb_dim: scaled("base_emb_dim", scales.emb),
        num_query_heads: scaled("base_num_query_heads", scales.heads),
        num_kv_heads,
        global_num_kv_heads: or(r.size("global_num_kv_heads"), num_kv_heads),
        head_dim: r.size("head_dim"),
        global_head_dim: or(r.size("global_head_dim"), r.size("head_dim")),
        mlp_dim: scaled("base_mlp_dim", scales.mlp),
        gate_activation: GateActivation::Gelu,
        vocab_size: r.size("vocab_size"),
        hidden_size_per_layer_input: r.size("hidden_size_per_layer_input"),
        vocab_size_per_layer_input: or(r.size("vocab_size_per_layer_input"), r.size("vocab_size")),
        num_kv_shared_layers: r.size("num_kv_shared_layers"),
        use_double_wide_mlp: r.bool("use_double_wide_mlp"),
        sliding_window_size: r.size("sliding_window_size"),
        // MaxText's rule, by name.
        sliding_window_pattern: r.limit("sliding_window_pattern").unwrap_or(if name == "gemma4-e2b" { 5 } else { 6 }),
        local_rope_theta: theta("local_rope_max_timescale"),
        global_rope_theta: theta("global_rope_max_timescale"),
        local_rope_proportion: r.float("local_rope_proportion"),
        global_rope_proportion: r.float("global_rope_proportion"),
        normalization_layer_epsilon: r.float("normalization_layer_epsilon"),
        final_logits_soft_cap: r.cap("final_logits_soft_cap"),
    }
}

pub(crate) fn run(raw: &RawConfig) -> (Run, usize) {
    let r = Reader(raw);
    let (steps, schedule) = (r.limit("steps"), r.limit("learning_rate_schedule_steps"));
    let per_device = r.float("per_device_batch_size");
    let eval = r.float("eval_per_device_batch_size");
    let run = Run {
        per_device_batch_size: per_device,
        eval_per_device_batch_size: if eval == 0.0 { per_device } else { eval },
        gradient_accumulation_steps: r.size("gradient_accumulation_steps"),
        max_target_length: r.size("max_target_length"),
        max_prefill_predict_length: r.size("max_prefill_predict_length"),
        steps: steps.or(schedule).unwrap_or(0),
        init_weights_seed: r.size("init_weights_seed") as u64,
    };
    (run, schedule.or(steps).unwrap_or(0))
}

pub(crate) fn resolve(raw: RawConfig) -> Result<Config, Error> {
    let mut problems = raw.problems.clone();
    problems.extend(check::all(&raw));
    if !problems.is_empty() {
        return Err(Error { problems });
    }
    let r = Reader(&raw);
    let (run, schedule_steps) = run(&raw);
    let output_directory = match r.text("base_output_directory") {
        "" => PathBuf::from("lapidary_output"),
        path => PathBuf::from(path),
    };
    let axes = |group: &str| MESH_AXES.map(|axis| r.int(&format!("{group}_{axis}_parallelism")));
    let compilation_cache = match raw.value("jax_cache_dir") {
        Some(Value::Text(dir)) if dir.is_empty() => CompilationCache::Off,
        Some(Value::Text(dir)) => CompilationCache::Directory(PathBuf::from(dir)),
        _ => CompilationCache::Own,
    };
    Ok(Config {
        model: model(&raw),
        numerics: Numerics {
            dtype: r.float_type("dtype"),
            weight_dtype: r.float_type("weight_dtype"),
            grad_dtype: r.float_type("grad_dtype"),
            matmul_precision: r.word("matmul_precision", MatmulPrecision::from_word, MatmulPrecision::Default),
            activations_in_float32: r.bool("activations_in_float32"),
            float32_qk_product: r.bool("float32_qk_product"),
            float32_logits: r.bool("float32_logits"),
            logits_dot_in_fp32: r.bool("logits_dot_in_fp32"),
            cast_logits_to_fp32: r.bool("cast_logits_to_fp32"),
        },
        memory: Memory {
            attention: r.word("attention", Attention::from_word, Attention::Autoselected),
            remat_policy: r.word("remat_policy", RematPolicy::from_word, RematPolicy::Full),
            scan_layers: r.bool("scan_layers"),
            num_vocab_tiling: r.size("num_vocab_tiling"),
            per_layer_table: r.word("per_layer_table", TableHome::from_word, TableHome::Auto),
            max_segments_per_seq: r.limit("max_segments_per_seq"),
        },
        run,
        schedule: Schedule {
            learning_rate: r.float("learning_rate"),
            kind: r.word("lr_schedule_type", ScheduleKind::from_word, ScheduleKind::Cosine),
            warmup_steps_fraction: r.float("warmup_steps_fraction"),
            final_fraction: r.float("learning_rate_final_fraction"),
            steps: schedule_steps,
            wsd_decay_steps_fraction: r.float("wsd_decay_steps_fraction"),
            wsd_decay_style: r.word("wsd_decay_style", DecayStyle::from_word, DecayStyle::Linear),
        },
        optimizer: Optimizer {
            kind: r.word("opt_type", OptimizerKind::from_word, OptimizerKind::AdamW),
            b1: r.float("adam_b1"),
            b2: r.float("adam_b2"),
            eps: r.float("adam_eps"),
            eps_root: r.float("adam_eps_root"),
            weight_decay: r.float("adam_weight_decay"),
            mu_dtype: r.float_type(if r.text("mu_dtype").is_empty() { "weight_dtype" } else { "mu_dtype" }),
            no_decay: r.list("adamw_mask"),
            trainable: r.list("trainable_parameters_mask"),
            gradient_clipping_threshold: r.float("gradient_clipping_threshold"),
            z_loss_multiplier: r.float("z_loss_multiplier"),
            train_layer_scalar: r.bool("train_layer_scalar"),
            skip_step_on_spikes: r.bool("skip_step_on_spikes"),
            skip_step_interval: r.size("skip_step_interval"),
            skip_step_scaling_factor: r.float("skip_step_scaling_factor"),
        },
        data: Data {
            dataset_type: r.word("dataset_type", DatasetKind::from_word, DatasetKind::Synthetic),
            hf_path: r.owned("hf_path"),
            hf_name: r.owned("hf_name"),
            hf_data_dir: r.owned("hf_data_dir"),
            hf_train_files: r.owned("hf_train_files"),
            hf_eval_split: r.owned("hf_eval_split"),
            hf_eval_files: r.owned("hf_eval_files"),
            train_split: r.owned("train_split"),
            train_data_columns: r.list("train_data_columns"),
            eval_data_columns: r.list("eval_data_columns"),
            tokenizer_path: r.owned("tokenizer_path"),
            tokenize_train_data: r.bool("tokenize_train_data"),
            tokenize_eval_data: r.bool("tokenize_eval_data"),
            add_bos: r.bool("add_bos"),
            add_eos: r.bool("add_eos"),
            use_truncation: r.bool("use_truncation"),
            packing: r.bool("packing"),
            packing_kind: r.word("grain_packing_type", PackingKind::from_word, PackingKind::FirstFit),
            num_epoch: r.size("num_epoch"),
            enable_data_shuffling: r.bool("enable_data_shuffling"),
            data_shuffle_seed: r.size("data_shuffle_seed") as u64,
            generate_padding_batch_train: r.bool("generate_padding_batch_train"),
            generate_padding_batch_eval: r.bool("generate_padding_batch_eval"),
            abort_on_bad_data: r.bool("abort_on_bad_data"),
        },
        checkpoint: Checkpoint {
            enable: r.bool("enable_checkpointing"),
            asynchronous: r.bool("async_checkpointing"),
            period: r.size("checkpoint_period"),
            save_on_start: r.bool("save_checkpoint_on_start"),
            save_on_completion: r.bool("save_checkpoint_on_completion"),
            save_on_termination: r.bool("enable_autocheckpoint"),
            max_to_keep: r.limit("max_num_checkpoints_to_keep"),
            load_parameters_path: r.owned("load_parameters_path"),
            load_full_state_path: r.owned("load_full_state_path"),
        },
        mesh: Mesh {
            hardware: r.word("hardware", Hardware::from_word, Hardware::Auto),
            pjrt_plugin: r.owned("pjrt_plugin"),
            compilation_cache,
            num_cpu_devices: r.size("num_cpu_devices"),
            ici: axes("ici"),
            dcn: axes("dcn"),
            rules: r.rules("logical_axis_rules"),
            only_rules: r.bool("override_logical_axis_rules"),
            sharding_tolerance: r.float("sharding_tolerance"),
        },
        output: Output {
            run_name: r.owned("run_name"),
            base_output_directory: output_directory,
            metrics_file: r.owned("metrics_file"),
            enable_tensorboard: r.bool("enable_tensorboard"),
            log_period: r.size("log_period"),
            log_config: r.bool("log_config"),
            eval_interval: r.limit("eval_interval"),
            eval_steps: r.limit("eval_steps"),
            eval_start_step: r.size("eval_start_step"),
            target_eval_loss: r.float("target_eval_loss"),
            abort_on_nan_loss: r.bool("abort_on_nan_loss"),
            abort_on_inf_loss: r.bool("abort_on_inf_loss"),
            profiler: r.word("profiler", Profiler::from_word, Profiler::Off),
            skip_first_n_steps_for_profiler: r.size("skip_first_n_steps_for_profiler"),
            profiler_steps: r.size("profiler_steps"),
            max_inflight_computations: r.size("max_inflight_computations"),
        },
        decode: Decode {
            prompt: r.owned("prompt"),
            system_prompt: r.owned("system_prompt"),
            use_chat_template: r.bool("use_chat_template"),
            chat_template: r.owned("chat_template"),
            chat_template_path: r.owned("chat_template_path"),
            strategy: r.word("decode_sampling_strategy", SamplingStrategy::from_word, SamplingStrategy::Greedy),
            nucleus_p: r.float("decode_sampling_nucleus_p"),
            top_k: r.size("decode_sampling_top_k"),
            temperature: r.float("decode_sampling_temperature"),
            expect: r.owned("autoregressive_decode_assert"),
        },
        sft: Sft { enable: r.bool("use_sft"), train_on_completion_only: r.bool("sft_train_on_completion_only") },
        lora: Lora {
            enable: r.bool("lora.enable_lora"),
            rank: r.size("lora.lora_rank"),
            alpha: r.float("lora.lora_alpha"),
            module_path: r.owned("lora.lora_module_path"),
            restore_path: r.owned("lora.lora_restore_path"),
        },
        raw,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_rotate_over_heads_hidden_and_layers() {
        let s = |emb, heads, layers| Some(Scales { emb, heads, mlp: heads, layers });
        assert_eq!(scales(1), s(0, 0, 0));
        assert_eq!(scales(2), s(0, 1, 0));
        assert_eq!(scales(4), s(1, 1, 0));
        assert_eq!(scales(8), s(1, 1, 1));
        assert_eq!(scales(16), s(1, 2, 1));
        assert_eq!(scales(3), None);
        assert_eq!(scales(0), None);
        assert_eq!(scales(-2), None);
    }
}
