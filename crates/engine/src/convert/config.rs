//! The configuration files beside converted weights.

use std::path::PathBuf;

use checkpoint::hf::GENERATION_CONFIG_FILE;
use gemma4::hf::{HfModel, config_json};
use gemma4::{Arch, KvSource};
use serde_json::{Map, Value, json};
use tensor::DType;

use crate::Result;

/// Largest file beside the weights that is carried along, in bytes. Tokenizers have 32 MB.
const MAX_SIDECAR: u64 = 256 << 20;

/// Files that any text model may have beside its weights.
const TEXT_FILES: [&str; 10] = [
    GENERATION_CONFIG_FILE,
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
];

/// Files that only make sense with the towers.
const TOWER_FILES: [&str; 4] =
    ["preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "feature_extractor.json"];

/// Reads the files that are carried along: each from the first directory that has it, unchanged.
pub(crate) fn sidecars(directories: &[PathBuf], towers: bool) -> Result<Vec<(String, Vec<u8>)>> {
    let names = TEXT_FILES.iter().chain(if towers { TOWER_FILES.as_slice() } else { &[] });
    let mut out = Vec::new();
    for name in names {
        for dir in directories {
            let path = dir.join(name);
            if fs_err::metadata(&path).is_ok_and(|m| m.is_file() && m.len() <= MAX_SIDECAR) {
                out.push(((*name).to_owned(), fs_err::read(&path)?));
                break;
            }
        }
    }
    Ok(out)
}

/// What the configuration of the output should say.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted {
    /// Of the conditional class.
    pub(super) conditional: bool,
    /// With vision and audio towers.
    pub(super) towers: bool,
    /// Type of the weights, for the entry that tools show.
    pub(super) dtype: DType,
}

/// A `config.json` for an architecture: the original one with as little changed as possible, in the spelling that every
/// version of transformers reads.
pub(super) fn output_config(original: &Value, arch: &Arch, wanted: Wanted) -> Value {
    let reads_back =
        |v: &Value| HfModel::from_config(v).is_ok_and(|m| m.arch == *arch && m.conditional == wanted.conditional);
    let mut carried = reclass(original, wanted);
    if wanted.conditional && !wanted.towers {
        for tower in ["vision_config", "audio_config"] {
            // Declared towers without weights would be initialised at random.
            if let Some(v) = carried.get_mut(tower) {
                *v = Value::Null;
            }
        }
    }
    set_dtype(&mut carried, wanted.dtype);
    let respelled = respell(&carried, arch);
    if let Some(good) = [respelled, carried].into_iter().find(reads_back) {
        return good;
    }
    config_json(arch, wanted.conditional, wanted.dtype.name())
}

/// The text part of a configuration of either class.
fn text_of(config: &Value) -> &Value {
    config.get("text_config").unwrap_or(config)
}

fn reclass(original: &Value, wanted: Wanted) -> Value {
    let is_conditional = original.get("text_config").is_some();
    if is_conditional == wanted.conditional {
        return original.clone();
    }
    let (Some(text), Some(whole)) = (text_of(original).as_object(), original.as_object()) else {
        return Value::Null;
    };
    let mut text = text.clone();
    if !wanted.conditional {
        let mut out = Map::new();
        out.insert("architectures".into(), json!(["Gemma4ForCausalLM"]));
        text.shift_remove("architectures");
        out.extend(text);
        out.insert("model_type".into(), json!("gemma4_text"));
        // The list at the top knows the end of a turn, which the text part does not.
        if let Some(eos) = whole.get("eos_token_id") {
            out.insert("eos_token_id".into(), eos.clone());
        }
        return Value::Object(out);
    }
    let arch = HfModel::from_config(original).map(|m| m.arch);
    let Ok(arch) = arch else { return Value::Null };
    let mut out = config_json(&arch, true, DType::BF16.name());
    text.shift_remove("architectures");
    if let Some(eos) = text.get("eos_token_id") {
        out["eos_token_id"] = eos.clone();
    }
    text.insert("model_type".into(), json!("gemma4_text"));
    out["text_config"] = Value::Object(text);
    out
}

fn set_dtype(config: &mut Value, dtype: DType) {
    let set = |o: &mut Map<String, Value>| {
        o.shift_remove("torch_dtype");
        o.insert("dtype".into(), json!(dtype.name()));
    };
    let Some(top) = config.as_object_mut() else { return };
    set(top);
    if let Some(text) = top.get_mut("text_config").and_then(Value::as_object_mut) {
        set(text);
    }
}

/// Head sizes as scalars instead of a map by layer, which versions before 5.15 do not know.
fn respell(config: &Value, arch: &Arch) -> Value {
    let mut config = config.clone();
    let text = if config.get("text_config").is_some() { config.get_mut("text_config") } else { Some(&mut config) };
    let Some(text) = text.and_then(Value::as_object_mut) else { return Value::Null };
    if text.shift_remove("per_layer_config").is_none() {
        return config;
    }
    let spec = arch.spec();
    text.insert("head_dim".into(), json!(spec.head_dim.sliding));
    text.insert("global_head_dim".into(), json!(spec.head_dim.full));
    text.insert("num_key_value_heads".into(), json!(spec.kv_heads.sliding));
    let global = (spec.kv_heads.full != spec.kv_heads.sliding).then_some(spec.kv_heads.full);
    text.insert("num_global_key_value_heads".into(), json!(global));
    config
}

/// A line that tells an architecture: `35 layers (20 share keys and values), hidden 1536, ...`.
#[must_use]
pub fn describe(arch: &Arch) -> String {
    let spec = arch.spec();
    let shared = arch.layers().iter().filter(|l| matches!(l.kv, KvSource::Shared { .. })).count();
    let ple = arch.per_layer_input().map_or(String::new(), |p| format!(", per-layer inputs of {}", p.width));
    format!(
        "{} layers ({shared} share keys and values), hidden {}, MLP {}{}, {} query and {}/{} key/value heads of {}/{}, \
         window {}, vocabulary {}{ple}",
        arch.layers().len(),
        spec.hidden_size,
        spec.intermediate_size,
        if spec.use_double_wide_mlp { " (double where shared)" } else { "" },
        spec.num_heads,
        spec.kv_heads.sliding,
        spec.kv_heads.full,
        spec.head_dim.sliding,
        spec.head_dim.full,
        spec.sliding_window,
        spec.vocab_size,
    )
}

#[cfg(test)]
mod tests {
    use gemma4::arch::{ArchSpec, PerKind, PerLayerInput, Rope, periodic_kinds};

    use super::*;

    fn arch() -> Arch {
        Arch::new(ArchSpec {
            vocab_size: 515,
            hidden_size: 64,
            intermediate_size: 96,
            layer_kinds: periodic_kinds(10, 5),
            num_kv_shared_layers: 5,
            use_double_wide_mlp: true,
            num_heads: 4,
            kv_heads: PerKind { sliding: 1, full: 1 },
            head_dim: PerKind { sliding: 16, full: 32 },
            k_eq_v: false,
            rope: PerKind {
                sliding: Rope { theta: 1e4, rotated_pairs: 8, factor: 1.0 },
                full: Rope { theta: 1e6, rotated_pairs: 4, factor: 1.0 },
            },
            sliding_window: 8,
            per_layer_input: Some(PerLayerInput { vocab_size: 515, width: 16 }),
            rms_norm_eps: 1e-6,
            final_logit_softcapping: Some(30.0),
        })
        .unwrap()
    }

    const LEAN: Wanted = Wanted { conditional: true, towers: false, dtype: DType::F32 };

    #[test]
    fn the_original_is_kept_where_possible() {
        let arch = arch();
        let mut original = config_json(&arch, true, "bfloat16");
        original["vision_config"] = json!({"hidden_size": 3});
        original["unknown_key"] = json!("kept");
        let lean = output_config(&original, &arch, LEAN);
        assert_eq!(lean["unknown_key"], "kept");
        assert_eq!(lean["vision_config"], Value::Null);
        assert_eq!((&lean["dtype"], &lean["text_config"]["dtype"]), (&json!("float32"), &json!("float32")));
        let official = output_config(&original, &arch, Wanted { towers: true, dtype: DType::BF16, ..LEAN });
        assert_eq!(official, original);
    }

    #[test]
    fn classes_change_into_each_other() {
        let arch = arch();
        for from in [true, false] {
            let original = config_json(&arch, from, "bfloat16");
            let out = output_config(&original, &arch, Wanted { conditional: !from, ..LEAN });
            let read = HfModel::from_config(&out).unwrap();
            assert_eq!((read.arch, read.conditional), (arch.clone(), !from));
        }
        let causal = output_config(&config_json(&arch, true, "bfloat16"), &arch, Wanted { conditional: false, ..LEAN });
        assert_eq!(causal["eos_token_id"], json!([1, 106]));
        assert_eq!(causal["architectures"], json!(["Gemma4ForCausalLM"]));
    }

    #[test]
    fn maps_by_layer_become_scalars() {
        let arch = arch();
        let mut original = config_json(&arch, false, "bfloat16");
        original.as_object_mut().unwrap().shift_remove("global_head_dim");
        original["per_layer_config"] = json!({"4": {"head_dim": 32}, "9": {"head_dim": 32}});
        let out = output_config(&original, &arch, Wanted { conditional: false, ..LEAN });
        assert!(out.get("per_layer_config").is_none());
        assert_eq!(out["global_head_dim"], 32);
    }

    #[test]
    fn files_come_from_the_nearest_directory() {
        let tmp = tempfile::tempdir().unwrap();
        let (a, b) = (tmp.path().join("a"), tmp.path().join("b"));
        for d in [&a, &b] {
            fs_err::create_dir(d).unwrap();
            fs_err::write(d.join("tokenizer.json"), d.file_name().unwrap().to_str().unwrap()).unwrap();
        }
        fs_err::write(b.join("processor_config.json"), "{}").unwrap();
        fs_err::write(b.join("other.json"), "{}").unwrap();
        let text = sidecars(&[a.clone(), b.clone()], false).unwrap();
        assert_eq!(text, [("tokenizer.json".to_owned(), b"a".to_vec())]);
        assert_eq!(sidecars(&[a, b], true).unwrap().len(), 2);
    }
}
