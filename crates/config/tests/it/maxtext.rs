//! What is taken over from MaxText.

use lapidary_config::keys::{self, unsupported};
use lapidary_config::{BUILTIN_FILES, MaxText, Support, Value, base_yaml, reference_markdown};

use crate::{messages, resolve, tiny, write};

#[test]
fn shapes_of_the_models() {
    let e2b = resolve(&["model_name=gemma4-e2b"]).unwrap().model;
    assert_eq!((e2b.num_layers, e2b.emb_dim, e2b.num_query_heads, e2b.num_kv_heads), (35, 1536, 8, 1));
    assert_eq!((e2b.head_dim, e2b.global_head_dim, e2b.mlp_dim, e2b.vocab_size), (256, 512, 6144, 262_144));
    assert_eq!((e2b.num_kv_shared_layers, e2b.use_double_wide_mlp, e2b.sliding_window_size), (20, true, 512));
    assert_eq!((e2b.hidden_size_per_layer_input, e2b.vocab_size_per_layer_input), (256, 262_144));
    assert_eq!((e2b.local_rope_theta, e2b.global_rope_theta, e2b.global_rope_proportion), (1e4, 1e6, 0.25));
    assert_eq!((e2b.final_logits_soft_cap, e2b.normalization_layer_epsilon), (Some(30.0), 1e-6));
    let full: Vec<usize> = (0..35).filter(|layer| e2b.is_full_attention(*layer)).collect();
    assert_eq!(full, [4, 9, 14, 19, 24, 29, 34]);

    let e4b = resolve(&["model_name=gemma4-e4b"]).unwrap().model;
    assert_eq!((e4b.num_layers, e4b.emb_dim, e4b.num_query_heads, e4b.num_kv_heads), (42, 2560, 8, 2));
    assert_eq!((e4b.mlp_dim, e4b.num_kv_shared_layers, e4b.use_double_wide_mlp), (10_240, 18, false));
    let full: Vec<usize> = (0..42).filter(|layer| e4b.is_full_attention(*layer)).collect();
    assert_eq!(full, [5, 11, 17, 23, 29, 35, 41]);

    let tiny = tiny(&[]).unwrap().model;
    assert_eq!((tiny.num_layers, tiny.num_kv_shared_layers, tiny.sliding_window_pattern), (10, 5, 5));
}

#[test]
fn the_pattern_follows_the_name_where_no_file_gives_it() {
    let dir = tempfile::tempdir().unwrap();
    // MaxText's own model file has no pattern.
    let model = "base_num_decoder_layers: 10\nsliding_window_size: 8\n";
    let file = write(dir.path(), &[("run.yml", ""), ("models/gemma4-e2b.yml", model), ("models/other.yml", model)]);
    let pattern = |name: &str| resolve(&[&file, &format!("model_name={name}")]).unwrap().model.sliding_window_pattern;
    assert_eq!((pattern("gemma4-e2b"), pattern("other")), (5, 6));
}

#[test]
fn a_command_line_written_for_maxtext_works() {
    let config = resolve(&[
        "base.yml",
        "model_name=gemma4-e2b",
        "scan_layers=false",
        "override_model_config=true",
        "hardware=cpu",
        "skip_jax_distributed_system=true",
        "run_name=tiny_e2b",
        "base_output_directory=out",
        "dataset_type=synthetic",
        "steps=6",
        "per_device_batch_size=2",
        "max_target_length=128",
        "base_num_decoder_layers=10",
        "base_emb_dim=256",
        "base_num_query_heads=4",
        "base_num_kv_heads=1",
        "base_mlp_dim=512",
        "head_dim=64",
        "global_head_dim=128",
        "vocab_size=4096",
        "vocab_size_per_layer_input=4096",
        "hidden_size_per_layer_input=32",
        "num_kv_shared_layers=5",
        "sliding_window_size=64",
        "attention=dot_product",
        "async_checkpointing=false",
        "checkpoint_period=3",
        "jax_cache_dir=\"\"",
    ])
    .unwrap();
    assert_eq!((config.model.num_layers, config.model.sliding_window_pattern, config.run.steps), (10, 5, 6));
    assert_eq!(config.mesh.compilation_cache, lapidary_config::CompilationCache::Off);
    let notes: Vec<String> = config.notes().iter().map(ToString::to_string).collect();
    assert_eq!(
        notes,
        [
            "skip_jax_distributed_system (command line): changes nothing: there is no such service; one process runs alone"
        ]
    );
}

/// A base file that repeats MaxText's defaults asks for nothing; only what would really differ is refused.
#[test]
fn defaults_of_maxtext_are_accepted_one_by_one() {
    for group in unsupported::GROUPS {
        for (name, default) in group.keys {
            if let Some(default) = default {
                let result = tiny(&[&format!("{name}={default}")]);
                assert!(result.is_ok(), "{name}={default}: {}", result.unwrap_err());
            }
        }
    }
    for key in keys::all().filter(|key| key.maxtext == MaxText::Same) {
        let value = key.default_value();
        let word = if let Value::Text(text) = &value { text.clone() } else { value.to_string() };
        let result = tiny(&[&format!("{}={word}", key.name), "override_model_config=true"]);
        let about = |line: &String| line.starts_with(key.name);
        // The model's name and sizes cannot go back to the base without contradicting each other.
        let alone =
            ["model_name", "sliding_window_size", "vocab_size", "vocab_size_per_layer_input", "base_num_kv_heads"];
        if !alone.contains(&key.name) && key.name != "override_model_config" {
            assert!(!messages(result).iter().any(about), "{}", key.name);
        }
    }
    // In a base file, MaxText's default of a key that knows only another one is passed over.
    let dir = tempfile::tempdir().unwrap();
    let file = write(
        dir.path(),
        &[(
            "base.yml",
            "v_norm_with_scale: true\nlogits_via_embedding: false\nattn_logits_soft_cap: 0.0\ndata_sharding: [['data']]\n\
         logical_axis_rules: [['vocab', ['tensor']]]\nmax_num_checkpoints_to_keep: None\n",
        )],
    );
    let config = resolve(&[&file, "model_name=tiny-e2b"]).unwrap();
    assert_eq!(config.notes().len(), 1);
    assert_eq!(config.mesh.rules, [("vocab".to_owned(), vec!["tensor".to_owned()])]);
    assert_eq!(messages(tiny(&["v_norm_with_scale=true", "override_model_config=true"])).len(), 1);
}

#[test]
fn files_and_table_agree() {
    assert_eq!(BUILTIN_FILES[0], ("base.yml", base_yaml().as_str()), "run `cargo xtask docs`");
    for key in keys::all().filter(|key| key.support == Support::Yes) {
        let name = key.name.rsplit('.').next().unwrap();
        assert!(base_yaml().contains(&format!("{name}: {}\n", key.default)), "{}", key.name);
        assert!(reference_markdown().contains(&format!("### `{}`\n", key.name)), "{}", key.name);
    }
    for (path, _) in BUILTIN_FILES {
        if let Some(name) = path.strip_prefix("models/").and_then(|p| p.strip_suffix(".yml")) {
            assert!(messages(resolve(&[&format!("model_name={name}")])).is_empty(), "{path}");
        }
    }
}
