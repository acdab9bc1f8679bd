//! What people read.

use lapidary_config::{Filter, Sources, explain, render_explanation, render_settings};

use crate::tiny;

#[test]
fn errors() {
    let error = Sources::from_args([
        "model_name=tiny-e2b",
        "steps=abc",
        "learning_rat=1e-4",
        "base_emb_dim=128",
        "head_dim=32",
        "emb_dim=3",
        "remat_policy=minimall",
        "attention=flash",
        "use_multimodal=true",
    ])
    .with_environment([("LAPIDARY_STEPS", "4"), ("LAPIDARY_DYTPE", "float32")])
    .resolve()
    .unwrap_err();
    insta::assert_snapshot!(error, @r#"
    the configuration has 10 problems
      steps (command line): `abc` is not a whole number
      learning_rat (command line): unknown key
        hint: did you mean `learning_rate`?
      emb_dim (command line): cannot be set: it is computed from the base key and global_parameter_scale
        hint: set `base_emb_dim` instead
      remat_policy (command line): `minimall` is not one of `none`, `full`, `minimal`, `minimal_with_context`, `save_dot_with_context_except_mlp`, `save_dot_except_mlpwi`, `save_dot_except_mlp`, `save_qkv_proj` or `save_out_proj`
        hint: did you mean `minimal`?
      attention (command line): `flash` is not supported: this version computes attention with XLA's own operations; leave it to `autoselected`
      use_multimodal (command line): is not supported: only the text model is built, without images and sound
        hint: leave it out, or set it to `false`
      dytpe (environment LAPIDARY_DYTPE): the variable names no known key
        hint: did you mean `LAPIDARY_DTYPE`?
      steps (environment LAPIDARY_STEPS): is set on the command line and in the environment
        hint: drop one of the two
      base_emb_dim (command line): `128` contradicts the model, which has `64` (models/tiny-e2b.yml:6, built in)
      head_dim (command line): `32` contradicts the model, which has `16` (models/tiny-e2b.yml:9, built in)
        hint: add `override_model_config=true` if you mean another model than the named one
    "#);
}

#[test]
fn one_error() {
    insta::assert_snapshot!(tiny(&["steps=abc"]).unwrap_err(), @r#"
    the configuration has a problem
      steps (command line): `abc` is not a whole number
    "#);
}

#[test]
fn show_of_the_small_model() {
    let raw = Sources::from_args(["model_name=tiny-e2b", "steps=20", "prompt=Hi there"])
        .with_environment([("LAPIDARY_DTYPE", "float32")])
        .load();
    insta::assert_snapshot!(render_settings(&raw.show(Filter::Set)), @r#"
    Model
      model_name                   tiny-e2b            command line
      decoder_block                gemma4_small        models/tiny-e2b.yml:4, built in
      base_num_decoder_layers      10                  models/tiny-e2b.yml:5, built in
      base_emb_dim                 64                  models/tiny-e2b.yml:6, built in
      base_num_query_heads         4                   models/tiny-e2b.yml:7, built in
      base_num_kv_heads            1                   models/tiny-e2b.yml:8, built in
      head_dim                     16                  models/tiny-e2b.yml:9, built in
      global_head_dim              32                  models/tiny-e2b.yml:10, built in
      base_mlp_dim                 96                  models/tiny-e2b.yml:11, built in
      mlp_activations              ["gelu", "linear"]  models/tiny-e2b.yml:12, built in
      vocab_size                   515                 models/tiny-e2b.yml:14, built in
      hidden_size_per_layer_input  8                   models/tiny-e2b.yml:29, built in
      vocab_size_per_layer_input   515                 models/tiny-e2b.yml:30, built in
      num_kv_shared_layers         5                   models/tiny-e2b.yml:26, built in
      use_double_wide_mlp          true                models/tiny-e2b.yml:27, built in
      sliding_window_size          8                   models/tiny-e2b.yml:17, built in
      sliding_window_pattern       5                   models/tiny-e2b.yml:18, built in
      rope_max_timescale           1000000             models/tiny-e2b.yml:22, built in
      local_rope_max_timescale     10000               models/tiny-e2b.yml:20, built in
      global_rope_max_timescale    1000000             models/tiny-e2b.yml:21, built in
      global_rope_proportion       0.25                models/tiny-e2b.yml:23, built in
      normalization_layer_epsilon  1e-6                models/tiny-e2b.yml:15, built in
      final_logits_soft_cap        30.0                models/tiny-e2b.yml:33, built in

    Numerics
      dtype                        float32             environment LAPIDARY_DTYPE

    Batch, length and steps
      steps                        20                  command line

    Generating text
      prompt                       "Hi there"          command line
    "#);
    let all = raw.show(Filter::All);
    assert!(all.len() > 100, "{}", all.len());
    let model = raw.show(Filter::Category(lapidary_config::Category::Model));
    assert!(model.iter().all(|setting| setting.category == "Model") && model.len() > 20);
}

#[test]
fn show_as_json() {
    let raw = Sources::from_args(["model_name=tiny-e2b", "steps=20"]).load();
    let settings = raw.show(Filter::Set);
    let steps = settings.iter().find(|setting| setting.key == "steps").unwrap();
    insta::assert_snapshot!(serde_json::to_string(steps).unwrap(), @r#"{"key":"steps","category":"Batch, length and steps","value":20,"default":150001,"origin":"command line"}"#);
    let config = tiny(&[]).unwrap();
    let json = serde_json::to_value(&config).unwrap();
    assert_eq!(json["model"]["emb_dim"], 64);
    assert_eq!(json["memory"]["attention"], "autoselected");
}

#[test]
fn explanations() {
    let raw = Sources::from_args(["model_name=tiny-e2b", "remat_policy=minimal"]).load();
    insta::assert_snapshot!(render_explanation(&raw.explain("remat_policy").unwrap()), @r#"
    remat_policy
      What each layer keeps for the backward pass; the rest is computed again.
      type         one of none, full, minimal, minimal_with_context, save_dot_with_context_except_mlp, save_dot_except_mlpwi, save_dot_except_mlp, save_qkv_proj, save_out_proj
      default      full
      value        minimal (command line)
      environment  LAPIDARY_REMAT_POLICY
      MaxText      same name, type and default
      refused      minimal_with_quantization: quantized training is not offered
      refused      minimal_with_context_and_quantization: quantized training is not offered
      refused      qkv_proj_offloaded: offloading to host memory is not offered yet
      refused      minimal_offloaded: offloading to host memory is not offered yet
      refused      custom: choosing tensor by tensor is not offered; take one of the named policies
    "#);
    insta::assert_snapshot!(render_explanation(&explain("scan_layers").unwrap()), @r#"
    scan_layers
      Loops over groups of like layers instead of writing every layer out: the program compiles in a time that does not depend on depth, and may run slower. Needs a pattern of layers that divides both the layers with own keys and values and those that borrow them.
      type         bool
      default      false
      environment  LAPIDARY_SCAN_LAYERS
      MaxText      default there is `true`; MaxText cannot loop over these models' layers
    "#);
    insta::assert_snapshot!(render_explanation(&explain("emb_dim").unwrap()), @r#"
    emb_dim
      Not a key: it is computed from the base key and global_parameter_scale. Set `base_emb_dim` instead.
      type         computed
      note         it is computed from the base key and global_parameter_scale
    "#);
    insta::assert_snapshot!(render_explanation(&explain("quantization").unwrap()), @r#"
    quantization
      A key of MaxText that is not supported: quantized and sparse weights are not offered.
      type         accepted at its default only
      default      ""
      note         quantized and sparse weights are not offered
      MaxText      MaxText's key of the same name
    "#);
    insta::assert_snapshot!(explain("learning_rat").unwrap_err(), @r#"
    the configuration has a problem
      learning_rat: unknown key
        hint: did you mean `learning_rate`?
    "#);
}
