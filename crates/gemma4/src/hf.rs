//! Hugging Face's view of the model: config.json in both spellings, tensor name prefixes, tensors that are stored
//! but not used by the text model.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::{Value, json};

use crate::arch::{ArchError, ArchSpec, LayerKind, PerKind, PerLayerInput, Rope, periodic_kinds};
use crate::{Arch, KvSource};

/// Prefixes that the wild puts before the names of [`crate::param_table`], most specific first.
pub const PREFIXES: &[&str] = &[
    "base_model.model.model.language_model.",
    "base_model.model.model.",
    "language_model.model.",
    "model.language_model.",
    "language_model.",
    "model.",
    "",
];

/// The prefix of a `Gemma4ForConditionalGeneration` checkpoint.
pub const CONDITIONAL_PREFIX: &str = "model.language_model.";
/// The prefix of a `Gemma4ForCausalLM` checkpoint.
pub const CAUSAL_PREFIX: &str = "model.";

/// An architecture read from a config.json.
#[derive(Debug, Clone, PartialEq)]
pub struct HfModel {
    /// The architecture.
    pub arch: Arch,
    /// What was found odd but survivable, in sentences.
    pub notes: Vec<String>,
    /// Whether the configuration is of the conditional (multimodal) class.
    pub conditional: bool,
}

#[derive(Debug, Deserialize)]
#[serde(default)]
struct TextConfig {
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: usize,
    head_dim: usize,
    global_head_dim: Option<usize>,
    num_global_key_value_heads: Option<usize>,
    per_layer_config: Option<BTreeMap<String, LayerOverride>>,
    hidden_activation: Option<String>,
    rms_norm_eps: f64,
    tie_word_embeddings: Option<bool>,
    rope_parameters: Option<BTreeMap<String, RopeConfig>>,
    sliding_window: Option<usize>,
    layer_types: Option<Vec<String>>,
    final_logit_softcapping: Option<f64>,
    use_bidirectional_attention: Option<Value>,
    vocab_size_per_layer_input: Option<usize>,
    hidden_size_per_layer_input: Option<usize>,
    attention_k_eq_v: Option<bool>,
    num_kv_shared_layers: Option<usize>,
    use_double_wide_mlp: Option<bool>,
    enable_moe_block: Option<bool>,
    attention_bias: Option<bool>,
}

impl Default for TextConfig {
    /// The class defaults of `Gemma4TextConfig`, which a missing field means. No released model has them all.
    fn default() -> Self {
        TextConfig {
            vocab_size: 262_144,
            hidden_size: 2304,
            intermediate_size: 9216,
            num_hidden_layers: 30,
            num_attention_heads: 8,
            num_key_value_heads: 4,
            head_dim: 256,
            global_head_dim: Some(512),
            num_global_key_value_heads: None,
            per_layer_config: None,
            hidden_activation: None,
            rms_norm_eps: 1e-6,
            tie_word_embeddings: None,
            rope_parameters: None,
            sliding_window: Some(512),
            layer_types: None,
            final_logit_softcapping: None,
            use_bidirectional_attention: None,
            vocab_size_per_layer_input: Some(262_144),
            hidden_size_per_layer_input: Some(256),
            attention_k_eq_v: None,
            num_kv_shared_layers: None,
            use_double_wide_mlp: None,
            enable_moe_block: None,
            attention_bias: None,
        }
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct LayerOverride {
    head_dim: Option<usize>,
    num_key_value_heads: Option<usize>,
    #[serde(flatten)]
    other: BTreeMap<String, Value>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct RopeConfig {
    rope_type: Option<String>,
    rope_theta: Option<f64>,
    partial_rotary_factor: Option<f64>,
    factor: Option<f64>,
}

impl HfModel {
    /// Reads a whole config.json, of either class and in either spelling of the per-layer head size.
    ///
    /// # Errors
    /// With every problem found: missing or wrong types, features that the text engine does not compute.
    pub fn from_config(config: &Value) -> Result<Self, ArchError> {
        let fail = |s: String| ArchError(vec![s]);
        let object = config.as_object().ok_or_else(|| fail("the top level is not an object".into()))?;
        let model_type = object.get("model_type").and_then(Value::as_str).unwrap_or("(none)");
        let (text, conditional) = match model_type {
            "gemma4" => (object.get("text_config").ok_or_else(|| fail("`text_config` is missing".into()))?, true),
            "gemma4_text" => (config, false),
            other => {
                return Err(fail(format!(
                    "model_type is `{other}`; expected `gemma4` (with text_config) or `gemma4_text`"
                )));
            }
        };
        if object.contains_key("quantization_config") {
            return Err(fail("`quantization_config` is present: quantized checkpoints are not read".into()));
        }
        let raw = TextConfig::deserialize(text).map_err(|e| fail(format!("{e}")))?;
        let mut notes = Vec::new();
        let spec = raw.into_spec(config, &mut notes)?;
        Ok(HfModel { arch: Arch::new(spec)?, notes, conditional })
    }
}

impl TextConfig {
    fn into_spec(self, whole: &Value, notes: &mut Vec<String>) -> Result<ArchSpec, ArchError> {
        let mut problems = Vec::new();
        self.refuse_unsupported(whole, &mut problems);
        // The layer list is bounded before anything is allocated from it.
        if self.num_hidden_layers == 0 || self.num_hidden_layers > 4096 {
            problems.push(format!("num_hidden_layers is {}, must be between 1 and 4096", self.num_hidden_layers));
            return Err(ArchError(problems));
        }
        let layer_kinds = self.layer_kinds(notes, &mut problems);
        let (head_dim, kv_heads) = self.head_sizes(&layer_kinds, &mut problems);
        let rope = PerKind {
            sliding: self.rope(LayerKind::Sliding, head_dim.sliding, &mut problems),
            full: self.rope(LayerKind::Full, head_dim.full, &mut problems),
        };
        if !problems.is_empty() {
            return Err(ArchError(problems));
        }
        let width = self.hidden_size_per_layer_input.unwrap_or(0);
        Ok(ArchSpec {
            vocab_size: self.vocab_size,
            hidden_size: self.hidden_size,
            intermediate_size: self.intermediate_size,
            layer_kinds,
            num_kv_shared_layers: self.num_kv_shared_layers.unwrap_or(0),
            use_double_wide_mlp: self.use_double_wide_mlp.unwrap_or(false),
            num_heads: self.num_attention_heads,
            kv_heads,
            head_dim,
            k_eq_v: self.attention_k_eq_v.unwrap_or(false),
            rope,
            sliding_window: self.sliding_window.unwrap_or(512),
            per_layer_input: (width > 0).then(|| PerLayerInput {
                vocab_size: self.vocab_size_per_layer_input.unwrap_or(self.vocab_size),
                width,
            }),
            rms_norm_eps: self.rms_norm_eps,
            final_logit_softcapping: self.final_logit_softcapping,
        })
    }

    fn refuse_unsupported(&self, whole: &Value, problems: &mut Vec<String>) {
        if self.enable_moe_block == Some(true) {
            problems.push("enable_moe_block: mixture-of-experts layers are not part of E2B/E4B".into());
        }
        if self.attention_bias == Some(true) {
            problems.push("attention_bias: biased projections are not part of Gemma 4".into());
        }
        // "vision" only changes how image tokens see each other; text is causal either way.
        if let Some(v) = &self.use_bidirectional_attention
            && !matches!(v.as_str(), Some("vision"))
            && !v.is_null()
            && v != &Value::Bool(false)
        {
            problems.push(format!("use_bidirectional_attention {v}: only causal text attention is computed"));
        }
        if let Some(a) = &self.hidden_activation
            && a != "gelu_pytorch_tanh"
        {
            problems.push(format!("hidden_activation `{a}`: only gelu_pytorch_tanh is computed"));
        }
        let tied = self.tie_word_embeddings.or_else(|| whole.get("tie_word_embeddings").and_then(Value::as_bool));
        if tied == Some(false) {
            problems.push("tie_word_embeddings is false: an untied head is not part of Gemma 4".into());
        }
    }

    fn layer_kinds(&self, notes: &mut Vec<String>, problems: &mut Vec<String>) -> Vec<LayerKind> {
        let Some(names) = &self.layer_types else {
            return periodic_kinds(self.num_hidden_layers, 6);
        };
        if names.len() != self.num_hidden_layers {
            problems.push(format!(
                "layer_types lists {} layers, num_hidden_layers is {}",
                names.len(),
                self.num_hidden_layers
            ));
        }
        let mut kinds: Vec<LayerKind> = names
            .iter()
            .enumerate()
            .map(|(i, name)| match name.as_str() {
                "sliding_attention" => LayerKind::Sliding,
                "full_attention" => LayerKind::Full,
                other => {
                    problems
                        .push(format!("layer_types[{i}] is `{other}`, expected sliding_attention or full_attention"));
                    LayerKind::Full
                }
            })
            .collect();
        if let Some(last) = kinds.last_mut()
            && *last == LayerKind::Sliding
        {
            // transformers forces this too, with a warning.
            *last = LayerKind::Full;
            notes.push(format!(
                "the last layer is always full_attention; layer_types said sliding for layer {}",
                names.len() - 1
            ));
        }
        kinds
    }

    /// Head size and key/value heads by kind: `per_layer_config` wins where present, else the official scalars.
    fn head_sizes(&self, kinds: &[LayerKind], problems: &mut Vec<String>) -> (PerKind<usize>, PerKind<usize>) {
        let k_eq_v = self.attention_k_eq_v.unwrap_or(false);
        let Some(overrides) = &self.per_layer_config else {
            let full_kv = self.num_global_key_value_heads.filter(|_| k_eq_v).unwrap_or(self.num_key_value_heads);
            return (
                PerKind { sliding: self.head_dim, full: self.global_head_dim.unwrap_or(512) },
                PerKind { sliding: self.num_key_value_heads, full: full_kv },
            );
        };
        let mut by_layer = vec![(self.head_dim, self.num_key_value_heads); kinds.len()];
        for (key, o) in overrides {
            match key.parse::<usize>().ok().filter(|&i| i < kinds.len()) {
                Some(i) => {
                    by_layer[i] = (o.head_dim.unwrap_or(by_layer[i].0), o.num_key_value_heads.unwrap_or(by_layer[i].1));
                }
                None => problems.push(format!("per_layer_config names layer `{key}` of {}", kinds.len())),
            }
            for name in o.other.keys() {
                problems.push(format!(
                    "per_layer_config overrides `{name}` of layer {key}; only head_dim and num_key_value_heads may vary"
                ));
            }
        }
        let mut uniform = |kind: LayerKind| {
            let mut of_kind = (0..kinds.len()).filter(|&i| kinds[i] == kind);
            let Some(first) = of_kind.next() else { return (self.head_dim, self.num_key_value_heads) };
            if let Some(odd) = of_kind.find(|&i| by_layer[i] != by_layer[first]) {
                problems.push(format!(
                    "per_layer_config gives {kind} layers {first} and {odd} different sizes {:?} and {:?}; one kind must be uniform",
                    by_layer[first], by_layer[odd]
                ));
            }
            by_layer[first]
        };
        let (sliding, full) = (uniform(LayerKind::Sliding), uniform(LayerKind::Full));
        (PerKind { sliding: sliding.0, full: full.0 }, PerKind { sliding: sliding.1, full: full.1 })
    }

    fn rope(&self, kind: LayerKind, head_dim: usize, problems: &mut Vec<String>) -> Rope {
        let default = match kind {
            LayerKind::Sliding => ("default", 1e4, 1.0),
            LayerKind::Full => ("proportional", 1e6, 0.25),
        };
        let given = self.rope_parameters.as_ref().and_then(|m| m.get(kind.hf_name()));
        if self.rope_parameters.is_some() && given.is_none() {
            problems.push(format!("rope_parameters has no entry for {kind}"));
        }
        let empty = RopeConfig::default();
        let given = given.unwrap_or(&empty);
        let rope_type = given.rope_type.as_deref().unwrap_or(default.0);
        let theta = given.rope_theta.unwrap_or(default.1);
        match rope_type {
            "default" => {
                if given.partial_rotary_factor.is_some_and(|p| p != 1.0) {
                    problems.push(format!("rope_type default of {kind} with a partial_rotary_factor is not computed"));
                }
                Rope { theta, rotated_pairs: head_dim / 2, factor: 1.0 }
            }
            "proportional" => {
                let portion =
                    given.partial_rotary_factor.unwrap_or(if given.rope_type.is_some() { 1.0 } else { default.2 });
                if !(0.0..=1.0).contains(&portion) {
                    problems.push(format!("partial_rotary_factor {portion} of {kind} must be between 0 and 1"));
                }
                // int(portion * head_dim // 2), the order of operations of transformers
                let rotated_pairs = (portion * head_dim as f64 / 2.0).floor().max(0.0) as usize;
                Rope { theta, rotated_pairs, factor: given.factor.unwrap_or(1.0) }
            }
            other => {
                problems.push(format!("rope_type `{other}` of {kind}: expected default or proportional"));
                Rope { theta, rotated_pairs: 0, factor: 1.0 }
            }
        }
    }
}

/// Tensors that may be stored and are not used by the text model: reason, and patterns over dot-separated names
/// (`*` is one element, `**` any number of them, also none).
#[must_use]
pub fn expected_unused(arch: &Arch) -> Vec<(&'static str, Vec<String>)> {
    let module = |name: &str| vec![format!("**.{name}.**")];
    let borrowed = (0..arch.layers().len()).filter(|&i| matches!(arch.layers()[i].kv, KvSource::Shared { .. }));
    let redundant =
        borrowed.flat_map(|i| ["k_proj", "v_proj", "k_norm"].map(|m| format!("layers.{i}.self_attn.{m}.weight")));
    vec![
        ("keys and values of sharing layers", redundant.collect()),
        ("tied head", vec!["**.lm_head.weight".into()]),
        ("vision tower", module("vision_tower")),
        ("vision projector", module("embed_vision")),
        ("audio tower", module("audio_tower")),
        ("audio projector", module("embed_audio")),
    ]
}

/// The config.json of an architecture, in the official scalar spelling that every version of transformers reads.
///
/// `dtype` is `bfloat16` or `float32`. The token ids are the official ones.
#[must_use]
pub fn config_json(arch: &Arch, conditional: bool, dtype: &str) -> Value {
    let spec = arch.spec();
    let rope = |kind: LayerKind| {
        let r = spec.rope.get(kind);
        let half = spec.head_dim.get(kind) / 2;
        if kind == LayerKind::Sliding && r.rotated_pairs == half && r.factor == 1.0 {
            json!({"rope_theta": r.theta, "rope_type": "default"})
        } else {
            let mut o = json!({
                "partial_rotary_factor": r.rotated_pairs as f64 / half as f64,
                "rope_theta": r.theta,
                "rope_type": "proportional",
            });
            if r.factor != 1.0 {
                o["factor"] = json!(r.factor);
            }
            o
        }
    };
    let global_kv = (spec.kv_heads.full != spec.kv_heads.sliding).then_some(spec.kv_heads.full);
    let mut text = json!({
        "attention_bias": false,
        "attention_dropout": 0.0,
        "attention_k_eq_v": spec.k_eq_v,
        "bos_token_id": 2,
        "dtype": dtype,
        "enable_moe_block": false,
        "eos_token_id": 1,
        "final_logit_softcapping": spec.final_logit_softcapping,
        "global_head_dim": spec.head_dim.full,
        "head_dim": spec.head_dim.sliding,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": spec.hidden_size,
        "hidden_size_per_layer_input": spec.per_layer_input.map_or(0, |p| p.width),
        "initializer_range": 0.02,
        "intermediate_size": spec.intermediate_size,
        "layer_types": spec.layer_kinds.iter().map(|k| k.hf_name()).collect::<Vec<_>>(),
        "max_position_embeddings": 131_072,
        "model_type": "gemma4_text",
        "num_attention_heads": spec.num_heads,
        "num_experts": null,
        "num_global_key_value_heads": global_kv,
        "num_hidden_layers": spec.layer_kinds.len(),
        "num_key_value_heads": spec.kv_heads.sliding,
        "num_kv_shared_layers": spec.num_kv_shared_layers,
        "pad_token_id": 0,
        "rms_norm_eps": spec.rms_norm_eps,
        "rope_parameters": {
            "full_attention": rope(LayerKind::Full),
            "sliding_attention": rope(LayerKind::Sliding),
        },
        "sliding_window": spec.sliding_window,
        "tie_word_embeddings": true,
        "top_k_experts": null,
        "use_bidirectional_attention": null,
        "use_cache": true,
        "use_double_wide_mlp": spec.use_double_wide_mlp,
        "vocab_size": spec.vocab_size,
        "vocab_size_per_layer_input": spec.per_layer_input.map_or(spec.vocab_size, |p| p.vocab_size),
    });
    if !conditional {
        text["architectures"] = json!(["Gemma4ForCausalLM"]);
        return text;
    }
    json!({
        "architectures": ["Gemma4ForConditionalGeneration"],
        "audio_config": null,
        "audio_token_id": 258_881,
        "boa_token_id": 256_000,
        "boi_token_id": 255_999,
        "dtype": dtype,
        "eoa_token_id": 258_883,
        "eoa_token_index": 258_883,
        "eoi_token_id": 258_882,
        "eos_token_id": [1, 106],
        "image_token_id": 258_880,
        "initializer_range": 0.02,
        "model_type": "gemma4",
        "text_config": text,
        "tie_word_embeddings": true,
        "video_token_id": 258_884,
        "vision_config": null,
        "vision_soft_tokens_per_image": 280,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::tests::{e2b, e4b};

    #[test]
    fn what_is_written_reads_back() {
        for arch in [e2b(), e4b()] {
            for conditional in [true, false] {
                let m = HfModel::from_config(&config_json(&arch, conditional, "bfloat16")).unwrap();
                assert_eq!((m.arch, m.conditional, m.notes), (arch.clone(), conditional, vec![]));
            }
        }
    }

    #[test]
    fn saved_spelling_equals_the_official_one() {
        let mut saved = config_json(&e2b(), true, "bfloat16");
        let text = saved["text_config"].as_object_mut().unwrap();
        text.remove("global_head_dim");
        text.remove("num_global_key_value_heads");
        let full: serde_json::Map<_, _> =
            [4, 9, 14, 19, 24, 29, 34].map(|i| (format!("{i:02}"), json!({"head_dim": 512}))).into_iter().collect();
        text.insert("per_layer_config".into(), Value::Object(full));
        assert_eq!(HfModel::from_config(&saved).unwrap().arch, e2b());
        // an empty map means equal head sizes, not the default of 512
        saved["text_config"]["per_layer_config"] = json!({});
        let arch = HfModel::from_config(&saved).unwrap().arch;
        assert_eq!(arch.spec().head_dim.full, 256);
    }

    #[test]
    fn unsupported_features_are_named() {
        let mut c = config_json(&e2b(), false, "bfloat16");
        c["enable_moe_block"] = json!(true);
        c["hidden_activation"] = json!("silu");
        c["rope_parameters"]["full_attention"]["rope_type"] = json!("yarn");
        c["layer_types"][3] = json!("linear_attention");
        let text = HfModel::from_config(&c).unwrap_err().to_string();
        for part in ["enable_moe_block", "silu", "yarn", "layer_types[3]"] {
            assert!(text.contains(part), "{part} not in {text}");
        }
        assert!(HfModel::from_config(&json!({"model_type": "llama"})).unwrap_err().to_string().contains("llama"));
        assert!(HfModel::from_config(&json!([1])).is_err());
    }

    #[test]
    fn a_sliding_last_layer_is_forced_full_with_a_note() {
        let mut c = config_json(&e2b(), false, "bfloat16");
        c["layer_types"][34] = json!("sliding_attention");
        let m = HfModel::from_config(&c).unwrap();
        assert_eq!(m.arch, e2b());
        assert_eq!(m.notes.len(), 1);
    }

    #[test]
    fn keys_and_values_are_redundant_in_sharing_layers_only() {
        let rules = expected_unused(&e2b());
        let (_, redundant) = &rules[0];
        assert_eq!(redundant.len(), 60);
        assert!(redundant.iter().any(|p| p == "layers.15.self_attn.k_proj.weight"));
        assert!(!redundant.iter().any(|p| p == "layers.14.self_attn.k_proj.weight"));
    }
}
