//! Checks of values against each other.
//!
//! Each check looks at values that passed their own; it reports what it finds and never stops the others.

use crate::build::{Reader, model, run, scales};
use crate::error::Problem;
use crate::files;
use crate::layer::{Origin, RawConfig};
use crate::mesh::MESH_AXES;
use crate::suggest::listed;
use crate::value::Value;

/// Largest size of one dimension after scaling.
const MAX_SIZE: usize = i32::MAX as usize;

/// Everything wrong with the values together.
pub(crate) fn all(raw: &RawConfig) -> Vec<Problem> {
    let mut check = Check { raw, read: Reader(raw), problems: Vec::new() };
    check.scale();
    if check.has_model() {
        check.shape();
        check.sharing();
    }
    check.refused_together();
    check.steps_and_batch();
    check.optimizer();
    check.data();
    check.checkpoint();
    check.mesh();
    check.decode_and_lora();
    check.problems
}

struct Check<'a> {
    raw: &'a RawConfig,
    read: Reader<'a>,
    problems: Vec<Problem>,
}

impl Check<'_> {
    fn problem(&self, key: &str, message: impl Into<String>) -> Problem {
        Problem::new(key, self.raw.origin(key).unwrap_or(&Origin::Default), message)
    }

    fn report(&mut self, key: &str, message: impl Into<String>) {
        let problem = self.problem(key, message);
        self.problems.push(problem);
    }

    fn report_hint(&mut self, key: &str, message: impl Into<String>, hint: impl Into<String>) {
        let problem = self.problem(key, message).hint(hint);
        self.problems.push(problem);
    }

    fn is_set(&self, key: &str) -> bool {
        self.raw.origin(key).is_some_and(|origin| *origin != Origin::Default)
    }

    /// Whether there is a model whose shape can be judged; says so if none was chosen.
    fn has_model(&mut self) -> bool {
        if self.raw.model_source.is_some() {
            return true;
        }
        let about_model = |problem: &Problem| problem.key == "model_name";
        if self.raw.problems.iter().any(about_model) {
            // The name was wrong; the base sizes are not what was meant.
            return false;
        }
        if !self.is_set("model_name") {
            if self.is_set("load_parameters_path") {
                // The checkpoint tells its shape.
                return false;
            }
            let models: Vec<&str> = files::builtin_models().collect();
            let hint = format!("add `model_name=` with {}", listed(&models));
            self.report_hint("model_name", "no model is chosen", hint);
            return false;
        }
        true
    }

    fn scale(&mut self) {
        let scale = self.read.int("global_parameter_scale");
        if scales(scale).is_none() {
            let hint = "set the base sizes themselves for a finer step";
            self.report_hint("global_parameter_scale", format!("{scale} is not a power of two"), hint);
        }
    }

    fn shape(&mut self) {
        let m = model(self.raw);
        for (key, size) in [
            ("base_num_decoder_layers", m.num_layers),
            ("base_emb_dim", m.emb_dim),
            ("base_num_query_heads", m.num_query_heads),
            ("base_num_kv_heads", m.num_kv_heads),
            ("base_mlp_dim", m.mlp_dim),
        ] {
            if size > MAX_SIZE {
                self.report(key, format!("{size} after scaling is too large: the most is {MAX_SIZE}"));
            }
        }
        for (key, heads) in [("base_num_kv_heads", m.num_kv_heads), ("global_num_kv_heads", m.global_num_kv_heads)] {
            let repeats = key == "global_num_kv_heads" && m.global_num_kv_heads == m.num_kv_heads;
            if !repeats && (heads == 0 || !m.num_query_heads.is_multiple_of(heads)) {
                let message = format!("{heads} key/value heads do not divide {} query heads", m.num_query_heads);
                self.report(key, message);
            }
        }
        for (key, size) in [("head_dim", m.head_dim), ("global_head_dim", m.global_head_dim)] {
            let repeats = key == "global_head_dim" && m.global_head_dim == m.head_dim;
            if !repeats && !size.is_multiple_of(2) {
                self.report(key, format!("{size} is odd: rotary embeddings turn pairs of channels"));
            }
        }
        if (m.global_rope_proportion * m.global_head_dim as f64 / 2.0) < 1.0 {
            let message = format!("{:?} of {} channels rotates no pair", m.global_rope_proportion, m.global_head_dim);
            self.report("global_rope_proportion", message);
        }
        for key in ["local_rope_max_timescale", "global_rope_max_timescale"] {
            if self.read.int(key) == 0 {
                self.report(key, "0 is no base of frequencies: give a positive one, or -1 for `rope_max_timescale`");
            }
        }
        if m.sliding_window_pattern > 1 && m.sliding_window_size == 0 {
            let hint = "the models use 512";
            self.report_hint("sliding_window_size", "the sliding layers need a window of at least 1", hint);
        }
        let activations = self.read.list("mlp_activations");
        if activations != ["gelu", "linear"] {
            let message = format!("{} is not supported: the MLP is gated by a GELU", Value::List(activations));
            self.report_hint("mlp_activations", message, "use `[gelu,linear]`");
        }
        if m.hidden_size_per_layer_input > 0 && m.vocab_size_per_layer_input < m.vocab_size {
            let message = format!(
                "the per-layer table has {} rows for a vocabulary of {}: some tokens would have none",
                m.vocab_size_per_layer_input, m.vocab_size
            );
            self.report("vocab_size_per_layer_input", message);
        }
    }

    fn sharing(&mut self) {
        let m = model(self.raw);
        let shared = m.num_kv_shared_layers;
        if shared == 0 {
            return;
        }
        let Some(own) = m.num_layers.checked_sub(shared).filter(|own| *own > 0) else {
            let message =
                format!("{shared} of {} layers leaves no layer with keys and values of its own", m.num_layers);
            self.report("num_kv_shared_layers", message);
            return;
        };
        // Looking at one period decides; the number of layers may be anything.
        let window = m.sliding_window_pattern.saturating_mul(2);
        let kinds = |range: std::ops::Range<usize>| {
            let range = range.start..range.end.min(range.start.saturating_add(window));
            range.map(|layer| m.is_full_attention(layer)).collect::<Vec<bool>>()
        };
        let (lenders, borrowers) = (kinds(0..own), kinds(own..m.num_layers));
        for (full, name) in [(false, "sliding"), (true, "full-attention")] {
            if borrowers.contains(&full) && !lenders.contains(&full) {
                let message =
                    format!("a {name} layer would borrow keys and values, but none of the first {own} layers is one");
                let hint = "share fewer layers, or shorten `sliding_window_pattern`";
                self.report_hint("num_kv_shared_layers", message, hint);
            }
        }
    }

    fn refused_together(&mut self) {
        if self.read.bool("use_sft") && self.read.bool("packing") && !self.read.bool("tokenize_train_data") {
            self.report("tokenize_train_data", "conversations are tokenized here: it cannot be false with `use_sft`");
        }
    }

    fn steps_and_batch(&mut self) {
        let r = &self.read;
        if r.limit("steps").is_none() && r.limit("learning_rate_schedule_steps").is_none() {
            let message = "-1 takes `learning_rate_schedule_steps`, which is -1 too";
            self.report_hint("steps", message, "give one of the two");
        }
        let (run, _) = run(self.raw);
        if let Some(devices) = self.raw.devices
            && let Err(error) = run.batch(devices)
        {
            for problem in error.problems {
                let origin = self.raw.origin(&problem.key).cloned().unwrap_or(Origin::Default);
                self.problems.push(Problem { origin, ..problem });
            }
        }
        let tiles = self.read.size("num_vocab_tiling");
        let tokens = run.per_device_batch_size * run.max_target_length as f64;
        if tiles > 1 && tokens % tiles as f64 != 0.0 {
            let message = format!(
                "{tiles} pieces do not divide the {tokens} tokens of a device (per_device_batch_size {:?} x \
                 max_target_length {})",
                run.per_device_batch_size, run.max_target_length
            );
            self.report("num_vocab_tiling", message);
        }
        if self.read.text("lr_schedule_type") == "wsd" {
            let (warm, decay) = (self.read.float("warmup_steps_fraction"), self.read.float("wsd_decay_steps_fraction"));
            if warm + decay > 1.0 {
                let message = format!("warm-up {warm:?} and decay {decay:?} make more than the whole schedule");
                self.report("wsd_decay_steps_fraction", message);
            }
        }
    }

    fn optimizer(&mut self) {
        for key in ["adam_b1", "adam_b2"] {
            if self.read.float(key) >= 1.0 {
                self.report(key, "1.0 never forgets: a moment needs a decay below 1");
            }
        }
        // A wrong pattern is found when parameters are matched; an empty one would match all and means nothing.
        for key in ["adamw_mask", "trainable_parameters_mask"] {
            if self.read.list(key).iter().any(String::is_empty) {
                self.report(key, "an empty pattern would match every parameter");
            }
        }
    }

    fn data(&mut self) {
        let r = &self.read;
        let is_hf = r.text("dataset_type") == "hf";
        let no_path = is_hf && r.text("hf_path").is_empty();
        let needs_files = is_hf && ["json", "text", "parquet"].contains(&r.text("hf_path"));
        let no_files = needs_files && r.text("hf_train_files").is_empty();
        let wants_eval = r.int("eval_interval") > 0;
        let no_eval = is_hf && wants_eval && r.text("hf_eval_split").is_empty() && r.text("hf_eval_files").is_empty();
        let zero_interval = r.int("eval_interval") == 0;
        let zero_steps = wants_eval && r.int("eval_steps") == 0;
        let endless = wants_eval && !is_hf && r.int("eval_steps") < 0;
        let columns_empty: Vec<&str> = ["train_data_columns", "eval_data_columns"]
            .into_iter()
            .filter(|key| is_hf && r.list(key).is_empty())
            .collect();
        if no_path {
            let hint = "name a directory, or a format with `hf_train_files`: hf_path=json hf_train_files=DATA.jsonl";
            self.report_hint("hf_path", "`dataset_type=hf` needs it", hint);
        }
        if no_files {
            let format = self.read.text("hf_path").to_owned();
            self.report("hf_train_files", format!("`hf_path={format}` names a format, so the files are needed"));
        }
        if no_eval {
            let hint = "give `hf_eval_split` or `hf_eval_files`";
            self.report_hint("eval_interval", "there is no text to evaluate on", hint);
        }
        if zero_interval {
            self.report("eval_interval", "0 is no interval: give a positive one, or -1 for no evaluation");
        }
        if zero_steps {
            self.report("eval_steps", "an evaluation needs at least one batch");
        }
        if endless {
            let hint = "give `eval_steps`";
            self.report_hint("eval_steps", "the synthetic batch repeats without end, so -1 would never finish", hint);
        }
        for key in columns_empty {
            self.report(key, "names no column");
        }
    }

    fn checkpoint(&mut self) {
        let paths = ["load_parameters_path", "load_full_state_path"];
        let given: Vec<&str> = paths.into_iter().filter(|key| !self.read.text(key).is_empty()).collect();
        if let [_, second] = given.as_slice() {
            self.report(second, "excludes `load_parameters_path`: a run starts from one of them");
        }
        if !self.read.bool("enable_checkpointing") {
            for key in given {
                self.report(key, "needs `enable_checkpointing=true`");
            }
        }
    }

    fn mesh(&mut self) {
        for group in ["ici", "dcn"] {
            let keys = MESH_AXES.map(|axis| format!("{group}_{axis}_parallelism"));
            for key in &keys {
                if self.read.int(key) == 0 {
                    self.report(key, "0 is no size of an axis: give a positive number, or -1 for what is left");
                }
            }
            let left: Vec<&str> = keys.iter().filter(|key| self.read.int(key) == -1).map(String::as_str).collect();
            if left.len() > 1 {
                // One that was set is named; -1 is the default of an axis in each group and rarely the one meant.
                let set = left.iter().find(|key| self.is_set(key)).copied().unwrap_or(left[0]);
                let what = if group == "ici" { "devices" } else { "slices" };
                let message = format!("only one axis can take the {what} that are left, not {}", left.join(" and "));
                self.report_hint(set, message, "give the others a number; 1 leaves an axis out");
            }
        }
        if self.read.bool("override_logical_axis_rules") && self.read.rules("logical_axis_rules").is_empty() {
            let message = "without `logical_axis_rules` nothing would be cut";
            self.report_hint("override_logical_axis_rules", message, "give the whole list of rules");
        }
    }

    fn decode_and_lora(&mut self) {
        let strategy = self.read.text("decode_sampling_strategy").to_owned();
        let uses = |words: &[&str]| words.contains(&strategy.as_str());
        if uses(&["nucleus", "composite"]) && self.read.float("decode_sampling_nucleus_p") <= 0.0 {
            let message = format!("`decode_sampling_strategy={strategy}` needs a share above 0");
            self.report("decode_sampling_nucleus_p", message);
        }
        if uses(&["topk", "composite"]) && self.read.int("decode_sampling_top_k") == 0 {
            let message = format!("`decode_sampling_strategy={strategy}` needs a number of tokens above 0");
            self.report("decode_sampling_top_k", message);
        }
        if self.read.bool("lora.enable_lora") {
            if self.read.int("lora.lora_rank") == 0 {
                self.report("lora.lora_rank", "adapters need a rank of at least 1");
            }
            if self.read.float("lora.lora_alpha") == 0.0 {
                self.report("lora.lora_alpha", "0 would switch the adapters off");
            }
        }
        if !self.read.text("chat_template").is_empty() && !self.read.text("chat_template_path").is_empty() {
            self.report("chat_template_path", "excludes `chat_template`: there is one template");
        }
    }
}
