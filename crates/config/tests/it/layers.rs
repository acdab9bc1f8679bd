//! Which layer wins, and what may not be said.

use lapidary_config::{ModelLayer, Origin, Sources, Value};

use crate::{hint, messages, problems, resolve, tiny, write};

#[test]
fn command_line_over_user_file_over_model_over_base() {
    let dir = tempfile::tempdir().unwrap();
    let file = write(dir.path(), &[("run.yml", "model_name: tiny-e2b\nsteps: 5\nlearning_rate: 1e-3\n")]);
    let config = resolve(&[&file, "steps=7"]).unwrap();
    assert_eq!(config.run.steps, 7);
    assert_eq!(config.origin("steps"), Some(&Origin::CommandLine));
    assert_eq!(config.schedule.learning_rate, 1e-3);
    assert_eq!(config.origin("learning_rate"), Some(&Origin::File { path: file.into(), line: 3, builtin: false }));
    assert_eq!(config.model.emb_dim, 64);
    let origin = config.origin("base_emb_dim").unwrap();
    assert_eq!(origin.to_string(), "models/tiny-e2b.yml:6, built in");
    assert_eq!(config.origin("dtype"), Some(&Origin::Default));
    assert_eq!(config.value("dtype"), Some(&Value::from("bfloat16")));
    assert_eq!(config.value("no_such_key"), None);
}

#[test]
fn environment_over_user_file() {
    let dir = tempfile::tempdir().unwrap();
    let file = write(dir.path(), &[("run.yml", "model_name: tiny-e2b\nsteps: 5\n")]);
    let sources = Sources::from_args([file]).with_environment([
        ("LAPIDARY_STEPS", "9"),
        ("LAPIDARY_LORA__LORA_RANK", "4"),
        ("LAPIDARY_ADAMW_MASK", "[norm]"),
        ("STEPS", "1"),
        ("M_STEPS", "2"),
    ]);
    let config = sources.resolve().unwrap();
    assert_eq!(config.run.steps, 9);
    assert_eq!(config.lora.rank, 4);
    assert_eq!(config.optimizer.no_decay, ["norm"]);
    assert_eq!(config.origin("steps").unwrap().to_string(), "environment LAPIDARY_STEPS");
}

#[test]
fn environment_problems() {
    let with = |words: &[&str], variables: &[(&str, &str)]| {
        let sources = Sources::from_args([&["model_name=tiny-e2b"], words].concat());
        messages(sources.with_environment(variables.iter().copied()).resolve())
    };
    assert_eq!(
        with(&["steps=3"], &[("LAPIDARY_STEPS", "3")]),
        ["steps (environment LAPIDARY_STEPS): is set on the command line and in the environment"]
    );
    assert_eq!(
        with(&["cosine_learning_rate_final_fraction=0.5"], &[("LAPIDARY_LEARNING_RATE_FINAL_FRACTION", "0.5")]).len(),
        1
    );
    assert_eq!(
        with(&[], &[("LAPIDARY_STEPS", "many")]),
        ["steps (environment LAPIDARY_STEPS): `many` is not a whole number"]
    );
    assert_eq!(
        with(&[], &[("LAPIDARY_SETPS", "1")]),
        ["setps (environment LAPIDARY_SETPS): the variable names no known key"]
    );
    assert_eq!(
        with(&[], &[("LAPIDARY_BASE_EMB_DIM", "128")]),
        ["base_emb_dim (environment LAPIDARY_BASE_EMB_DIM): `128` contradicts the model, which has `64` \
          (models/tiny-e2b.yml:6, built in)"]
    );
    let reserved = [
        ("LAPIDARY_PJRT_PLUGIN", "x"),
        ("LAPIDARY_CACHE_DIR", "x"),
        ("LAPIDARY_GOLDEN_DIR", "x"),
        ("LAPIDARY_TOKENIZER_DIR", "x"),
        ("LAPIDARY_OFFLINE", "1"),
        ("LAPIDARY_LOG", "debug"),
    ];
    assert!(with(&[], &reserved).is_empty());
    assert!(with(&["pjrt_plugin=here.so"], &[("LAPIDARY_PJRT_PLUGIN", "there.so")]).is_empty());
}

#[test]
fn home_is_put_for_a_tilde_in_paths() {
    let words = ["model_name=tiny-e2b", "base_output_directory=~/out", "prompt=~/x", "metrics_file=a~/b"];
    let config = Sources::from_args(words).with_environment([("HOME", "/h/")]).resolve().unwrap();
    assert_eq!(config.output.base_output_directory.to_str(), Some("/h/out"));
    assert_eq!((config.decode.prompt.as_str(), config.output.metrics_file.as_str()), ("~/x", "a~/b"));
    let config = Sources::from_args(words).resolve().unwrap();
    assert_eq!(config.output.base_output_directory.to_str(), Some("~/out"));
}

#[cfg(unix)]
#[test]
fn environment_that_is_not_utf8_is_a_problem_only_when_it_is_ours() {
    use std::ffi::OsString;
    use std::os::unix::ffi::OsStringExt as _;
    let bytes = || OsString::from_vec(vec![0xff]);
    let base = || Sources::from_args(["model_name=tiny-e2b"]);
    assert!(base().with_environment([(OsString::from("OTHER"), bytes())]).resolve().is_ok());
    let result = base().with_environment([(OsString::from("LAPIDARY_STEPS"), bytes())]).resolve();
    assert_eq!(messages(result), ["steps (environment LAPIDARY_STEPS): the value is not UTF-8"]);
}

#[test]
fn model_keys_need_override_model_config() {
    let words = ["base_emb_dim=128", "head_dim=32", "steps=3"];
    assert_eq!(
        problems(&words),
        [
            "base_emb_dim (command line): `128` contradicts the model, which has `64` (models/tiny-e2b.yml:6, built in)",
            "head_dim (command line): `32` contradicts the model, which has `16` (models/tiny-e2b.yml:9, built in)",
        ]
    );
    let config = tiny(&[&words[..], &["override_model_config=true"]].concat()).unwrap();
    assert_eq!((config.model.emb_dim, config.model.head_dim, config.model.num_layers), (128, 32, 10));
    // The value the model has is no change, in any spelling.
    let config = tiny(&["base_emb_dim=64", "final_logits_soft_cap=30", "mlp_activations=[gelu,linear]"]).unwrap();
    assert_eq!(config.origin("base_emb_dim"), Some(&Origin::CommandLine));
}

#[test]
fn a_user_file_that_contradicts_the_model_needs_it_too() {
    let dir = tempfile::tempdir().unwrap();
    let text = "model_name: tiny-e2b\nbase_emb_dim: 128\n";
    let file = write(dir.path(), &[("run.yml", text)]);
    let found = messages(resolve(&[&file]));
    assert_eq!(found.len(), 1);
    assert!(found[0].contains("run.yml:2): `128` contradicts the model, which has `64`"), "{found:?}");
    let file = write(dir.path(), &[("run.yml", &format!("{text}override_model_config: true\n"))]);
    assert_eq!(resolve(&[&file]).unwrap().model.emb_dim, 128);
}

#[test]
fn the_last_word_of_a_key_counts() {
    assert_eq!(tiny(&["steps=1", "steps=2"]).unwrap().run.steps, 2);
}

#[test]
fn instruct_is_dropped_from_the_name() {
    let config = resolve(&["model_name=gemma4-e2b-Instruct"]).unwrap();
    assert_eq!(config.model.name, "gemma4-e2b");
    assert_eq!(config.model.sliding_window_pattern, 5);
}

#[test]
fn unknown_names() {
    assert_eq!(problems(&["learning_rat=1"]), ["learning_rat (command line): unknown key"]);
    assert_eq!(hint(&["learning_rat=1"]), "did you mean `learning_rate`?");
    assert_eq!(hint(&["lora.lora_rnak=1"]), "did you mean `lora.lora_rank`?");
    assert_eq!(hint(&["lora_rank=1"]), "did you mean `lora.lora_rank`?");
    assert_eq!(hint(&["foo_bar=1"]), "`lapidary config explain` lists all keys");
    assert_eq!(problems(&["lora.foo=1"]), ["lora.foo (command line): unknown key"]);
    assert_eq!(problems(&["foo"]), ["foo (command line): is not of the form `key=value`"]);
    assert_eq!(hint(&["--steps=3"]), "write `steps=3`, without dashes");
    assert_eq!(hint(&["steps"]), "write `steps=VALUE`");
    assert_eq!(hint(&["late.yml"]), "a configuration file must be the first word");
    assert_eq!(problems(&["=3"]).len(), 1);
}

#[test]
fn unknown_models() {
    let error = resolve(&["model_name=gemma4-e3b"]).unwrap_err();
    assert_eq!(error.problems[0].message, "there is no model `gemma4-e3b`");
    assert_eq!(error.problems[0].hint.as_deref(), Some("did you mean `gemma4-e2b`?"));
    assert_eq!(error.problems.len(), 1);
    for name in ["../../etc/passwd", "", ".", "a/b"] {
        let error = resolve(&[&format!("model_name={name}")]).unwrap_err();
        assert_eq!(error.problems[0].message, format!("there is no model `{name}`"));
    }
}

#[test]
fn no_model_is_chosen() {
    let error = resolve(&["steps=3"]).unwrap_err();
    assert_eq!(error.problems.len(), 1, "{error}");
    assert_eq!(error.problems[0].message, "no model is chosen");
    let config = resolve(&["model_name=default", "sliding_window_size=16"]).unwrap();
    assert_eq!((config.model.num_layers, config.model.sliding_window_pattern), (16, 6));
}

#[test]
fn computed_names_are_refused_with_the_key_to_use() {
    for (word, instead) in [
        ("emb_dim=3", "base_emb_dim"),
        ("num_decoder_layers=3", "base_num_decoder_layers"),
        ("mlp_dim=3", "base_mlp_dim"),
        ("num_query_heads=3", "base_num_query_heads"),
        ("num_kv_heads=3", "base_num_kv_heads"),
        ("global_batch_size_to_train_on=3", "per_device_batch_size"),
        ("hidden_size=3", "base_emb_dim"),
    ] {
        assert_eq!(hint(&[word]), format!("set `{instead}` instead"), "{word}");
    }
    let found = problems(&["num_decoder_layers=3"]);
    assert!(found[0].starts_with("num_decoder_layers (command line): cannot be set: it is computed"), "{found:?}");
}

#[test]
fn parents_are_followed() {
    let dir = tempfile::tempdir().unwrap();
    let file = write(
        dir.path(),
        &[
            ("child.yml", "base_config: middle.yml\nsteps: 3\n"),
            ("middle.yml", "base_config: deep/eldest.yml\nsteps: 2\nlog_period: 2\n"),
            ("deep/eldest.yml", "base_config: base.yml\nsteps: 1\nlog_period: 1\nmodel_name: tiny-e2b\n"),
        ],
    );
    let config = resolve(&[&file]).unwrap();
    assert_eq!((config.run.steps, config.output.log_period), (3, 2));
    assert!(config.origin("log_period").unwrap().to_string().ends_with("middle.yml:3"));

    let file = write(dir.path(), &[("a.yml", "base_config: b.yml\n"), ("b.yml", "base_config: a.yml\n")]);
    let found = messages(resolve(&[&file, "model_name=tiny-e2b"]));
    assert_eq!(found.len(), 1);
    assert!(found[0].contains("the chain of parents does not end"), "{found:?}");
    let file = write(dir.path(), &[("c.yml", "base_config: none.yml\n")]);
    assert!(messages(resolve(&[&file, "model_name=tiny-e2b"]))[0].ends_with("none.yml: there is no such file"));
    let file = write(dir.path(), &[("d.yml", "base_config: [1]\n")]);
    assert!(messages(resolve(&[&file, "model_name=tiny-e2b"]))[0].ends_with("is not the name of a file"));
}

#[test]
fn files_beside_the_users_take_the_place_of_the_built_in_ones() {
    let dir = tempfile::tempdir().unwrap();
    let model = "base_num_decoder_layers: 4\nsliding_window_size: 3\n";
    let file = write(
        dir.path(),
        &[
            ("run.yml", "model_name: mine\n"),
            ("base.yml", "steps: 11\nbase_emb_dim: 256\n"),
            ("models/mine.yml", model),
            ("sub/run.yml", "model_name: mine\n"),
        ],
    );
    let config = resolve(&[&file]).unwrap();
    // A base is below the model: nothing in it contradicts.
    assert_eq!((config.run.steps, config.model.emb_dim, config.model.num_layers), (11, 256, 4));
    assert_eq!(config.model.sliding_window_pattern, 6);
    assert!(config.origin("steps").unwrap().to_string().ends_with("base.yml:1"));
    let sub = dir.path().join("sub/run.yml");
    assert_eq!(resolve(&[sub.to_str().unwrap()]).unwrap().model.num_layers, 4);
    assert_eq!(messages(resolve(&[&file, "base_num_decoder_layers=5"])).len(), 1);
}

#[test]
fn base_yml_as_the_first_word_is_the_built_in_one() {
    let config = resolve(&["base.yml", "model_name=tiny-e2b"]).unwrap();
    assert_eq!(config.origin("steps"), Some(&Origin::Default));
}

#[test]
fn broken_files_name_the_line() {
    let dir = tempfile::tempdir().unwrap();
    for (text, end) in [
        ("steps: 1\nlr: [\n", ":2: is not a YAML mapping: unclosed bracket '['"),
        ("steps: 1\nsteps: 2\n", ":2: is not a YAML mapping: duplicate mapping key: steps"),
        ("- 1\n", ":1: is not a YAML mapping: expected mapping start"),
    ] {
        let file = write(dir.path(), &[("run.yml", text)]);
        let found = messages(resolve(&[&file, "model_name=tiny-e2b"]));
        assert_eq!(found.len(), 1);
        assert!(found[0].ends_with(&format!("run.yml{end}")), "{found:?}");
    }
    assert_eq!(messages(resolve(&["no/such.yml", "model_name=tiny-e2b"])), ["no/such.yml: there is no such file"]);
    fs_err::write(dir.path().join("binary.yml"), [0xff, 0xfe, 0x00]).unwrap();
    let binary = dir.path().join("binary.yml");
    assert!(messages(resolve(&[binary.to_str().unwrap(), "model_name=tiny-e2b"]))[0].contains("cannot be read"));
}

#[test]
fn a_checkpoint_takes_the_place_of_the_model_file() {
    let values = [("base_emb_dim", 32), ("sliding_window_size", 4), ("base_num_decoder_layers", 6)];
    let model = ModelLayer {
        name: "ckpt/config.json".to_owned(),
        values: values.map(|(key, value)| (key.to_owned(), Value::Int(value))).to_vec(),
    };
    let with = |words: &[&str]| Sources { model: Some(model.clone()), ..Sources::from_args(words.iter().copied()) };
    let config = with(&[]).resolve().unwrap();
    assert_eq!((config.model.emb_dim, config.model.num_layers), (32, 6));
    assert_eq!(config.origin("base_emb_dim").unwrap().to_string(), "ckpt/config.json");
    assert_eq!(
        messages(with(&["base_emb_dim=64"]).resolve()),
        ["base_emb_dim (command line): `64` contradicts the model, which has `32` (ckpt/config.json)"]
    );
}

#[test]
fn all_problems_are_reported_at_once() {
    let found = problems(&["steps=abc", "foo_bar=1", "attention=bogus", "base_emb_dim=3", "use_multimodal=true", "x"]);
    assert_eq!(found.len(), 6, "{found:#?}");
}
