//! The larger reference cases, read when `LAPIDARY_GOLDEN_DIR` names their directory.

use std::collections::BTreeSet;
use std::path::PathBuf;

use lapidary_checkpoint::binding::{Expected, NameRules, UnusedRule, bind};
use lapidary_checkpoint::hf::HfDirectory;
use serde_json::Value;

/// Every case of the set, or nothing when the variable is not set. A variable that names no directory is a failure.
fn cases() -> Vec<PathBuf> {
    let Some(dir) = std::env::var_os("LAPIDARY_GOLDEN_DIR") else { return Vec::new() };
    let dir = PathBuf::from(dir);
    assert!(dir.is_dir(), "LAPIDARY_GOLDEN_DIR names {}, which is no directory", dir.display());
    let mut cases: Vec<PathBuf> = fs_err::read_dir(&dir).unwrap().map(|e| e.unwrap().path()).collect();
    cases.retain(|c| c.join("golden.safetensors").is_file());
    cases.sort();
    assert!(!cases.is_empty(), "LAPIDARY_GOLDEN_DIR names {}, which holds no case", dir.display());
    cases
}

/// A case's parameters are listed independently of its weights: every gradient of the reference run names one.
fn expected_from_gradients(golden: &HfDirectory) -> Vec<Expected> {
    golden
        .entries()
        .filter_map(|t| {
            Some(Expected { name: t.name.strip_prefix("grad.")?.to_owned(), shape: t.shape.clone(), dtype: None })
        })
        .collect()
}

#[test]
fn with_golden_dir_every_case_opens_and_binds() {
    for case in cases() {
        let golden = HfDirectory::open(&case.join("golden.safetensors")).unwrap();
        let logits = golden.tensor("logits").unwrap();
        let ids = golden.tensor("input_ids").unwrap();
        assert_eq!(logits.shape.dims()[..2], *ids.shape.dims(), "{}", case.display());

        let facts: Value = serde_json::from_slice(&fs_err::read(case.join("golden.json")).unwrap()).unwrap();
        let dir = HfDirectory::open(&case.join("model")).unwrap();
        assert!(dir.config().is_some() && dir.generation_config().is_some());
        assert_eq!(dir.files().len() as u64, facts["shards"].as_u64().unwrap_or(1).max(1), "{}", case.display());
        assert!(dir.unindexed().is_empty());
        let parameters: usize = dir.entries().map(|t| t.shape.elements()).sum();
        assert_eq!(parameters as u64, facts["params"].as_u64().unwrap(), "{}", case.display());

        let rule = |label: &str, patterns: &[&str]| UnusedRule {
            label: label.to_owned(),
            patterns: patterns.iter().map(|p| (*p).to_owned()).collect(),
        };
        let rules = NameRules {
            prefixes: ["model.language_model.", "model."].map(str::to_owned).to_vec(),
            unused: vec![
                rule("towers", &["model.vision_tower.**", "model.audio_tower.**"]),
                rule("projectors", &["model.embed_vision.**", "model.embed_audio.**"]),
                rule("scalars", &["layers.*.layer_scalar"]),
                rule("keys and values", &["layers.*.self_attn.*.weight"]),
            ],
        };
        let expected = expected_from_gradients(&golden);
        assert!(!expected.is_empty());
        let binding = bind(&dir, &expected, &rules).unwrap();
        let conditional = facts["layout"] == "conditional";
        assert_eq!(binding.report.prefix, if conditional { "model.language_model." } else { "model." });
        assert_eq!(binding.tensors.len(), expected.len());
        let labels: BTreeSet<&str> = binding.report.unused_expected.iter().map(|(l, _)| l.as_str()).collect();
        assert_eq!(labels.contains("towers"), facts["towers"] == true, "{}", case.display());
        // Where only some gradients were kept, the others' tensors are left over.
        if expected.len() > 10 {
            assert_eq!(labels.contains("keys and values"), facts["redundant_kv"] == true, "{}", case.display());
            assert_eq!(binding.report.unused_unexpected, [], "{}", case.display());
        }
    }
}
