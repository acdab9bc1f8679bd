//! Checks of values against each other.

use lapidary_config::{Batch, Sources};

use crate::{hint, messages, problems, tiny};

/// Words on top of the small model that change its shape.
fn reshaped(words: &[&str]) -> Vec<String> {
    problems(&[&["override_model_config=true"], words].concat())
}

#[test]
fn pictures_are_refused_with_the_reason_and_scanning_is_not() {
    for name in ["tiny-e2b", "gemma4-e2b", "gemma4-e4b"] {
        let result = crate::resolve(&[&format!("model_name={name}"), "scan_layers=true", "use_multimodal=true"]);
        assert_eq!(
            messages(result),
            ["use_multimodal (command line): is not supported: only the text model is built, without images and sound"]
        );
    }
    assert!(problems(&["scan_layers=false", "use_multimodal=false"]).is_empty());
}

#[test]
fn what_the_peer_rejects_for_these_models_is_rejected() {
    for word in [
        "fused_qkv=true",
        "share_kv_projections=true",
        "opt_type=muon",
        "shard_mode=explicit",
        "ici_pipeline_parallelism=2",
        "dcn_pipeline_parallelism=2",
        "partial_rotary_factor=0.5",
    ] {
        let found = problems(&[word]);
        assert_eq!(found.len(), 1, "{word}: {found:?}");
        assert!(found[0].contains("not supported"), "{word}: {found:?}");
    }
    for word in
        ["fused_qkv=false", "share_kv_projections=False", "ici_pipeline_parallelism=1", "partial_rotary_factor=1"]
    {
        assert!(problems(&[word]).is_empty(), "{word}");
    }
}

#[test]
fn shapes() {
    for (words, message) in [
        (&["global_parameter_scale=3"][..], "global_parameter_scale (command line): 3 is not a power of two"),
        (&["base_num_kv_heads=3"], "base_num_kv_heads (command line): 3 key/value heads do not divide 4 query heads"),
        (
            &["global_num_kv_heads=3"],
            "global_num_kv_heads (command line): 3 key/value heads do not divide 4 query heads",
        ),
        (&["head_dim=15"], "head_dim (command line): 15 is odd: rotary embeddings turn pairs of channels"),
        (
            &["global_head_dim=31"],
            "global_head_dim (command line): 31 is odd: rotary embeddings turn pairs of channels",
        ),
        (
            &["global_rope_proportion=0.01"],
            "global_rope_proportion (command line): 0.01 of 32 channels rotates no pair",
        ),
        (
            &["sliding_window_size=0"],
            "sliding_window_size (command line): the sliding layers need a window of at least 1",
        ),
        (
            &["mlp_activations=[silu,linear]"],
            "mlp_activations (command line): [\"silu\", \"linear\"] is not supported: the MLP is gated by a GELU",
        ),
        (
            &["vocab_size_per_layer_input=9"],
            "vocab_size_per_layer_input (command line): the per-layer table has 9 rows for a vocabulary of 515: some \
             tokens would have none",
        ),
        (
            &["num_kv_shared_layers=10"],
            "num_kv_shared_layers (command line): 10 of 10 layers leaves no layer with keys and values of its own",
        ),
        (
            &["num_kv_shared_layers=11"],
            "num_kv_shared_layers (command line): 11 of 10 layers leaves no layer with keys and values of its own",
        ),
        (
            &["num_kv_shared_layers=7"],
            "num_kv_shared_layers (command line): a full-attention layer would borrow keys and values, but none of \
             the first 3 layers is one",
        ),
        (
            &["base_emb_dim=2000000000", "global_parameter_scale=4"],
            "base_emb_dim (command line): 4000000000 after scaling is too large: the most is 2147483647",
        ),
    ] {
        assert_eq!(reshaped(words), [message], "{words:?}");
    }
}

#[test]
fn enormous_shapes_are_judged_quickly() {
    let found = reshaped(&["base_num_decoder_layers=2147483647", "num_kv_shared_layers=2147483640"]);
    assert!(found.is_empty(), "{found:?}");
    let found = reshaped(&["sliding_window_pattern=2147483647"]);
    assert!(found.is_empty(), "{found:?}");
}

#[test]
fn a_full_shape_by_scale() {
    let config = tiny(&["global_parameter_scale=8"]).unwrap();
    let m = &config.model;
    assert_eq!((m.num_layers, m.emb_dim, m.num_query_heads, m.num_kv_heads, m.mlp_dim), (20, 128, 8, 2, 192));
    assert_eq!((m.head_dim, m.vocab_size), (16, 515));
}

#[test]
fn steps_and_tiles() {
    assert_eq!(
        problems(&["steps=-1"]),
        ["steps (command line): -1 takes `learning_rate_schedule_steps`, which is -1 too"]
    );
    let config = tiny(&["steps=-1", "learning_rate_schedule_steps=40"]).unwrap();
    assert_eq!((config.run.steps, config.schedule.steps), (40, 40));
    let config = tiny(&["steps=30", "learning_rate_schedule_steps=40"]).unwrap();
    assert_eq!((config.run.steps, config.schedule.steps), (30, 40));
    assert_eq!(problems(&["steps=-2"]), ["steps (command line): -2 is too small: the least is -1"]);

    assert_eq!(
        problems(&["num_vocab_tiling=5", "per_device_batch_size=2", "max_target_length=128"]),
        ["num_vocab_tiling (command line): 5 pieces do not divide the 256 tokens of a device (per_device_batch_size \
         2.0 x max_target_length 128)"]
    );
    assert!(problems(&["num_vocab_tiling=4", "per_device_batch_size=2", "max_target_length=128"]).is_empty());
    assert_eq!(problems(&["num_vocab_tiling=0"]).len(), 1);
}

#[test]
fn an_empty_batch_is_refused() {
    let with = |devices, words: &[&str]| Sources {
        devices: Some(devices),
        ..Sources::from_args([&["model_name=tiny-e2b"], words].concat())
    };
    assert_eq!(
        messages(with(1, &["per_device_batch_size=0.5"]).resolve()),
        ["per_device_batch_size (command line): 0.5 on 1 device makes an empty batch"]
    );
    let config = with(4, &["per_device_batch_size=0.5"]).resolve().unwrap();
    assert_eq!(config.run.batch(4), Ok(Batch { micro: 2, train: 2, load: 4, eval: 2 }));
    assert_eq!(
        problems(&["per_device_batch_size=0"]),
        ["per_device_batch_size (command line): 0.0 is too small: it must be greater than 0"]
    );
}

#[test]
fn learning_rate_and_optimizer() {
    assert_eq!(
        problems(&["lr_schedule_type=wsd", "warmup_steps_fraction=0.6", "wsd_decay_steps_fraction=0.5"]),
        ["wsd_decay_steps_fraction (command line): warm-up 0.6 and decay 0.5 make more than the whole schedule"]
    );
    assert!(problems(&["warmup_steps_fraction=0.6", "wsd_decay_steps_fraction=0.5"]).is_empty());
    assert_eq!(problems(&["learning_rate=-1"]), ["learning_rate (command line): -1.0 is too small: the least is 0"]);
    assert_eq!(problems(&["gradient_clipping_threshold=-1"]).len(), 1);
    assert_eq!(problems(&["adam_b1=1"]).len(), 1);
    assert_eq!(problems(&["lr_schedule_type=linear"]).len(), 1);
    let config = tiny(&["weight_dtype=bfloat16"]).unwrap();
    assert_eq!(config.optimizer.mu_dtype, config.numerics.weight_dtype);
    assert_eq!(tiny(&["cosine_learning_rate_final_fraction=0.2"]).unwrap().schedule.final_fraction, 0.2);
}

#[test]
fn data() {
    assert_eq!(problems(&["dataset_type=hf"]), ["hf_path: `dataset_type=hf` needs it"]);
    assert_eq!(
        problems(&["dataset_type=hf", "hf_path=json"]),
        ["hf_train_files: `hf_path=json` names a format, so the files are needed"]
    );
    let hf = ["dataset_type=hf", "hf_path=json", "hf_train_files=a.jsonl"];
    assert!(problems(&hf).is_empty());
    let evaluated = [&hf[..], &["eval_interval=10"]].concat();
    assert_eq!(problems(&evaluated), ["eval_interval (command line): there is no text to evaluate on"]);
    assert!(problems(&[&evaluated[..], &["hf_eval_files=b.jsonl"]].concat()).is_empty());
    assert_eq!(problems(&["eval_interval=0"]).len(), 1);
    assert_eq!(problems(&["eval_interval=2"]).len(), 1);
    assert!(problems(&["eval_interval=2", "eval_steps=1"]).is_empty());
    for kind in ["tfds", "grain", "c4_mlperf", "olmo_grain"] {
        let found = problems(&[&format!("dataset_type={kind}")]);
        assert!(found[0].contains("is not supported: that input pipeline"), "{found:?}");
    }
    assert_eq!(problems(&["use_sft=true", "use_dpo=true"]).len(), 1);
}

#[test]
fn checkpoints() {
    assert_eq!(
        problems(&["load_parameters_path=a", "load_full_state_path=b"]),
        ["load_full_state_path (command line): excludes `load_parameters_path`: a run starts from one of them"]
    );
    for key in ["load_parameters_path", "load_full_state_path"] {
        assert_eq!(
            problems(&[&format!("{key}=a"), "enable_checkpointing=false"]),
            [format!("{key} (command line): needs `enable_checkpointing=true`")]
        );
    }
    assert_eq!(problems(&["enable_emergency_checkpoint=true", "enable_multi_tier_checkpointing=true"]).len(), 2);
    assert_eq!(tiny(&["max_num_checkpoints_to_keep=none"]).unwrap().checkpoint.max_to_keep, None);
    assert_eq!(tiny(&["max_num_checkpoints_to_keep=3"]).unwrap().checkpoint.max_to_keep, Some(3));
}

#[test]
fn mesh() {
    assert_eq!(
        problems(&["ici_data_parallelism=-1"]),
        ["ici_data_parallelism (command line): only one axis can take the devices that are left, not \
         ici_data_parallelism and ici_fsdp_parallelism"]
    );
    assert!(problems(&["ici_data_parallelism=-1", "ici_fsdp_parallelism=1"]).is_empty());
    // One key/value head serves any number of devices.
    assert!(problems(&["ici_tensor_parallelism=2"]).is_empty());
    assert_eq!(problems(&["dcn_fsdp_parallelism=-1"]).len(), 1);
    assert_eq!(problems(&["override_logical_axis_rules=true"]).len(), 1);
    let rules = tiny(&["logical_axis_rules=[[embed,[fsdp,context]],[mlp,tensor]]"]).unwrap().mesh.rules;
    assert_eq!(
        rules,
        [
            ("embed".to_owned(), vec!["fsdp".to_owned(), "context".to_owned()]),
            ("mlp".to_owned(), vec!["tensor".to_owned()]),
        ]
    );
    let unknown = problems(&["logical_axis_rules=[[embed,fsdq]]"]);
    assert_eq!(unknown.len(), 1);
    let start =
        "logical_axis_rules (command line): the rule of `embed` names `fsdq`, which is not one of `diloco`, `data`,";
    assert!(unknown[0].starts_with(start), "{unknown:?}");
    assert_eq!(problems(&["logical_axis_rules=[embed]"]).len(), 1);
    assert_eq!(problems(&["ici_fsdp_parallelism=0"]).len(), 1);
    assert_eq!(
        problems(&["ici_expert_parallelism=2"]),
        ["ici_expert_parallelism (command line): `2` is not supported: the model is dense and has no experts to \
          spread; use the fsdp axis"]
    );
    for axis in
        ["diloco", "sequence", "context_usp_ulysses", "context_autoregressive", "pipeline", "expert", "autoregressive"]
    {
        for group in ["ici", "dcn"] {
            assert_eq!(problems(&[&format!("{group}_{axis}_parallelism=2")]).len(), 1, "{group} {axis}");
            assert!(problems(&[&format!("{group}_{axis}_parallelism=1")]).is_empty(), "{group} {axis}");
        }
    }
    for axis in ["data", "fsdp", "fsdp_transpose", "context", "tensor", "tensor_sequence"] {
        for group in ["ici", "dcn"] {
            assert!(problems(&[&format!("{group}_{axis}_parallelism=2")]).is_empty(), "{group} {axis}");
        }
    }
}

#[test]
fn words() {
    for (word, message) in [
        ("attention=bogus", "attention (command line): `bogus` is not one of `autoselected` or `dot_product`"),
        ("dtype=fp32", "dtype (command line): `fp32` is not one of `bfloat16`, `float32`, `float16` or `float64`"),
        (
            "remat_policy=custom",
            "remat_policy (command line): `custom` is not supported: choosing tensor by tensor is \
                                not offered; take one of the named policies",
        ),
        (
            "profiler=nsys",
            "profiler (command line): `nsys` is not supported: start the whole command under `nsys \
                          profile` instead",
        ),
    ] {
        assert_eq!(problems(&[word]), [message]);
    }
    assert_eq!(problems(&["remat_policy=bogus"]).len(), 1);
    assert_eq!(hint(&["remat_policy=minimall"]), "did you mean `minimal`?");
    assert_eq!(
        problems(&["quantization=int8"]),
        ["quantization (command line): is not supported: quantized and sparse weights are not offered"]
    );
    assert!(problems(&["quantization="]).is_empty());
}

#[test]
fn sampling_adapters_and_templates() {
    assert_eq!(problems(&["decode_sampling_strategy=composite"]).len(), 2);
    assert!(problems(&["decode_sampling_strategy=topk", "decode_sampling_top_k=64"]).is_empty());
    assert_eq!(problems(&["lora.enable_lora=true"]).len(), 2);
    let config = tiny(&["lora.enable_lora=true", "lora.lora_rank=8", "lora.lora_alpha=16"]).unwrap();
    assert_eq!((config.lora.rank, config.lora.alpha), (8, 16.0));
    assert_eq!(problems(&["lora.lora_weight_qtype=nf4"]).len(), 1);
    assert!(problems(&["lora.lora_weight_qtype=none"]).is_empty());
    assert_eq!(
        problems(&["dpo.beta=0.2"]),
        ["dpo.beta (command line): is not supported: preference training is not offered"]
    );
}
