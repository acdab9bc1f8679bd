use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use checkpoint::safetensors::TensorView;
use gemma4::arch::{ArchSpec, PerKind, PerLayerInput, Rope, periodic_kinds};
use gemma4::{Arch, param_table};
use serde_json::json;
use tempfile::TempDir;
use tensor::DType;

use super::*;
use crate::Model;
use crate::init::{InitOptions, write_random};
use crate::rng::Philox;

fn arch() -> Arch {
    Arch::new(ArchSpec {
        vocab_size: 131,
        hidden_size: 32,
        intermediate_size: 48,
        layer_kinds: periodic_kinds(4, 2),
        num_kv_shared_layers: 2,
        use_double_wide_mlp: true,
        num_heads: 2,
        kv_heads: PerKind { sliding: 1, full: 1 },
        head_dim: PerKind { sliding: 16, full: 32 },
        k_eq_v: false,
        rope: PerKind {
            sliding: Rope { theta: 1e4, rotated_pairs: 8, factor: 1.0 },
            full: Rope { theta: 1e6, rotated_pairs: 4, factor: 1.0 },
        },
        sliding_window: 8,
        per_layer_input: Some(PerLayerInput { vocab_size: 131, width: 8 }),
        rms_norm_eps: 1e-6,
        final_logit_softcapping: Some(30.0),
    })
    .unwrap()
}

/// A source model and a run directory.
struct Case {
    tmp: TempDir,
    conditional: bool,
    max_shard: Option<u64>,
}

impl Case {
    fn new() -> Self {
        Self::sharded(true, None)
    }

    fn sharded(conditional: bool, max_shard: Option<u64>) -> Self {
        let case = Case { tmp: tempfile::tempdir().unwrap(), conditional, max_shard };
        let options = InitOptions {
            seed: 7,
            conditional,
            max_shard_bytes: case.max_shard,
            vary_norms: true,
            ..Default::default()
        };
        write_random(&case.source(), &arch(), &options, |_| {}).unwrap();
        fs::write(case.source().join("tokenizer.json"), "{\"tokens\":1}").unwrap();
        fs::write(case.source().join("chat_template.jinja"), "{{ x }}").unwrap();
        case
    }

    fn source(&self) -> PathBuf {
        self.tmp.path().join("source")
    }

    fn dir(&self) -> PathBuf {
        self.tmp.path().join("run/checkpoints")
    }

    fn store(&self, keep: Option<usize>) -> Store {
        self.try_store(keep, Some(self.source())).unwrap()
    }

    /// One of several processes.
    fn shared(&self, process: usize, count: usize) -> Store {
        let share = Share { process, count };
        let source = Some(self.source());
        Store::open(&self.dir(), StoreOptions { keep: None, conditional: true, arch: arch(), source, share }).unwrap()
    }

    fn try_store(&self, keep: Option<usize>, source: Option<PathBuf>) -> Result<Store, StateError> {
        Store::open(
            &self.dir(),
            StoreOptions { keep, conditional: self.conditional, arch: arch(), source, share: Share::ALONE },
        )
    }
}

fn is_trained(name: &str) -> bool {
    !name.starts_with("embed_tokens")
}

fn array(name: &str, shape: &tensor::Shape, dtype: DType, seed: u64) -> Array {
    let stream = Philox::new(seed, name);
    let values: Vec<f64> = (0..shape.elements()).map(|i| f64::from(stream.truncated_normal(i as u64))).collect();
    Array { name: name.to_owned(), data: Data::Here(HostArray::from_f64(dtype, shape.clone(), &values).unwrap()) }
}

/// The values of an array that a snapshot holds.
fn values(a: &Array) -> &HostArray {
    match &a.data {
        Data::Here(values) => values,
        Data::Later(..) => panic!("{} is not here", a.name),
    }
}

/// For snapshots that hold everything.
fn no_fetch(name: &str) -> Result<HostArray, StateError> {
    panic!("{name} was asked for")
}

/// The state after a step: norms in f32, other parameters in bf16, moments in f32.
fn snapshot(step: u64, all: bool, trained: impl Fn(&str) -> bool) -> Snapshot {
    let table = param_table(&arch());
    let names: Vec<&tensor::ParamSpec> = table.iter().filter(|p| trained(&p.name)).collect();
    let dtype = |name: &str| if name.contains("norm") { DType::F32 } else { DType::BF16 };
    let moments = |kind: &str| {
        let of = |p: &&tensor::ParamSpec| array(&format!("{kind}:{}", p.name), &p.shape, DType::F32, step);
        names.iter().map(of).collect::<Vec<_>>()
    };
    Snapshot {
        state: TrainerState {
            format: FORMAT,
            step,
            // Numbers that an inexact parser gets wrong, and the largest integer.
            cursor: json!({"documents": u64::MAX, "rate": 5.447_087_766_434_38e-5, "files": ["a", "b"]}),
            optimizer: "adamw".into(),
            trained: names.iter().map(|p| p.name.clone()).collect(),
            keys: BTreeMap::from([("learning_rate".into(), json!(1.0e-3 / 3.0)), ("steps".into(), json!(100))]),
            written_by: "test".into(),
        },
        params: table
            .iter()
            .filter(|p| all || trained(&p.name))
            .map(|p| array(&p.name, &p.shape, dtype(&p.name), step))
            .collect(),
        frozen: table.iter().filter(|p| !all && !trained(&p.name)).map(|p| p.name.clone()).collect(),
        moments: [moments("mu"), moments("nu")].concat(),
        table: None,
    }
}

fn save(store: &Store, s: &Snapshot) -> Saved {
    store.save(s, &mut no_fetch, &mut |_, _| {}).unwrap()
}

fn is(a: &TensorView, b: &HostArray) {
    assert_eq!((a.dtype, &a.shape), (b.dtype(), b.shape()));
    assert_eq!(a.bytes.as_slice(), b.bytes());
}

/// Everything of a snapshot comes back bit by bit, frozen parameters from `source`.
fn holds(loaded: &Loaded, s: &Snapshot, source: &Model) {
    assert_eq!(loaded.state, s.state);
    for a in &s.params {
        is(&loaded.param(&a.name).unwrap(), values(a));
    }
    for name in &s.frozen {
        is(&loaded.param(name).unwrap(), &source.read(name).unwrap());
    }
    assert_eq!(loaded.moments().count(), s.moments.len());
    for a in &s.moments {
        is(&loaded.moment(&a.name).unwrap(), values(a));
    }
}

fn names(dir: &Path) -> Vec<String> {
    let mut out: Vec<String> =
        fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    out.sort();
    out
}

/// File name and inode of files of frozen tensors.
fn frozen_files(dir: &Path) -> Vec<u64> {
    let mut out: Vec<u64> = names(dir)
        .iter()
        .filter(|n| n.starts_with("model-frozen"))
        .map(|n| fs::metadata(dir.join(n)).unwrap().ino())
        .collect();
    out.sort_unstable();
    out
}

#[test]
fn a_run_comes_back_bit_by_bit() {
    for conditional in [true, false] {
        let case = Case::sharded(conditional, None);
        let source = Model::open(&case.source()).unwrap();
        let store = case.store(None);
        assert_eq!(store.latest().unwrap(), None);
        for step in [3, 12] {
            let s = snapshot(step, false, is_trained);
            let mut last = (0, 0);
            let saved = store
                .save(&s, &mut no_fetch, &mut |done, total| {
                    assert!(done >= last.0 && done <= total);
                    last = (done, total);
                })
                .unwrap();
            assert_eq!(last, (saved.written, saved.written));
            holds(&store.load(step).unwrap(), &s, &source);
            assert_eq!(store.latest().unwrap(), Some(step));
        }
        assert_eq!(store.steps(), [3, 12]);
        // A store opened later, without the source, reads and saves the same.
        let later = case.try_store(None, None).unwrap();
        let s = snapshot(13, false, is_trained);
        save(&later, &s);
        holds(&later.load(13).unwrap(), &s, &source);
        assert_eq!(fs::read_to_string(later.path(13).join("chat_template.jinja")).unwrap(), "{{ x }}");
        let error = later.load(4).unwrap_err().to_string();
        assert!(error.contains("step 4; there are: 3, 12, 13"), "{error}");
    }
}

#[test]
fn a_checkpoint_is_a_model() {
    let case = Case::new();
    let store = case.store(None);
    save(&store, &snapshot(1, false, is_trained));
    let dir = store.path(1);
    let model = Model::open(&dir).unwrap();
    assert_eq!(*model.arch(), arch());
    assert!(model.weights().conditional && model.notes().is_empty(), "{:?}", model.notes());
    let report = model.report().unwrap();
    assert_eq!(report.prefix, "model.language_model.");
    assert!(report.unused_unexpected.is_empty() && report.unused_expected.is_empty());
    checkpoint::manifest::Manifest::read(&dir).unwrap().unwrap().verify(&dir).unwrap();
    // What is written here can be used in place.
    for file in names(&dir).iter().filter(|n| n.ends_with(".safetensors")) {
        let file = checkpoint::safetensors::SafetensorsFile::open(&dir.join(file)).unwrap();
        for t in file.tensors().iter().filter(|t| t.bytes().is_multiple_of(64)) {
            let start =
                file.view(file.tensors().iter().position(|o| o.name == t.name).unwrap()).unwrap().bytes.range().start;
            assert_eq!(start % 64, 0, "{}", t.name);
        }
    }
    let config: serde_json::Value = serde_json::from_slice(&fs::read(dir.join("config.json")).unwrap()).unwrap();
    assert_eq!(config["text_config"]["dtype"], "float32");
}

#[test]
fn frozen_files_are_shared() {
    let case = Case::new();
    let store = case.store(None);
    let first = save(&store, &snapshot(1, false, is_trained));
    assert_eq!(first.linked, 0);
    let second = save(&store, &snapshot(2, false, is_trained));
    let inodes = frozen_files(&store.path(1));
    assert!(!inodes.is_empty());
    assert_eq!(frozen_files(&store.path(2)), inodes);
    assert!(second.linked > 0 && second.written < first.written);
    // A source whose file holds frozen tensors alone gives it away as it is.
    let case = Case::sharded(true, Some(3000));
    let store = case.store(None);
    let saved = save(&store, &snapshot(1, false, is_trained));
    assert!(saved.linked > 0);
    let inside = frozen_files(&store.path(1));
    let outside: Vec<u64> = names(&case.source())
        .iter()
        .map(|n| fs::metadata(case.source().join(n)).unwrap().ino())
        .filter(|i| inside.contains(i))
        .collect();
    assert!(!outside.is_empty());
    holds(&store.load(1).unwrap(), &snapshot(1, false, is_trained), &Model::open(&case.source()).unwrap());
}

#[test]
fn a_run_without_a_source_gives_everything_once() {
    let case = Case::new();
    let store = case.try_store(None, None).unwrap();
    let error = store.save(&snapshot(1, false, is_trained), &mut no_fetch, &mut |_, _| {}).unwrap_err().to_string();
    assert!(error.contains("embed_tokens.weight (and 1 others)") && error.contains("first save"), "{error}");
    assert_eq!(store.steps(), [0u64; 0]);
    let first = snapshot(1, true, is_trained);
    save(&store, &first);
    let mut second = snapshot(2, false, is_trained);
    save(&store, &second);
    assert_eq!(frozen_files(&store.path(1)), frozen_files(&store.path(2)));
    second.params.extend(first.params.iter().filter(|a| !is_trained(&a.name)).cloned());
    second.frozen.clear();
    holds(&store.load(2).unwrap(), &second, &Model::open(&case.source()).unwrap());
}

#[test]
fn what_was_trained_before_is_not_taken_for_frozen() {
    let case = Case::new();
    let store = case.store(None);
    save(&store, &snapshot(1, false, is_trained));
    let fewer = |n: &str| n.starts_with("layers.3.");
    let s = snapshot(2, false, fewer);
    save(&store, &s);
    // Parameters that step 1 trained are unchanged since the source now, by the snapshot's own word.
    holds(&store.load(2).unwrap(), &s, &Model::open(&case.source()).unwrap());
    let s = snapshot(3, false, |_| true);
    save(&store, &s);
    assert!(frozen_files(&store.path(3)).is_empty());
    holds(&store.load(3).unwrap(), &s, &Model::open(&case.source()).unwrap());
}

#[test]
fn old_steps_go() {
    let case = Case::new();
    assert!(case.try_store(Some(0), None).is_err());
    let store = case.store(Some(2));
    for step in 1..=4 {
        let saved = save(&store, &snapshot(step, false, is_trained));
        assert_eq!(saved.removed, if step > 2 { vec![step - 2] } else { vec![] });
        assert!(saved.problems.is_empty());
    }
    assert_eq!(names(&case.dir()), ["3", "4"]);
    let source = Model::open(&case.source()).unwrap();
    holds(&store.load(4).unwrap(), &snapshot(4, false, is_trained), &source);
    // Never the one just saved, and damaged ones neither count nor go.
    fs::remove_file(store.path(4).join(STATE_FILE)).unwrap();
    assert_eq!(save(&store, &snapshot(1, false, is_trained)).removed, [0u64; 0]);
    assert_eq!(save(&store, &snapshot(2, false, is_trained)).removed, [1]);
    assert_eq!(store.steps(), [2, 3, 4]);
}

#[test]
fn every_kind_of_damage_is_named() {
    let case = Case::new();
    let store = case.store(None);
    save(&store, &snapshot(5, false, is_trained));
    save(&store, &snapshot(6, false, is_trained));
    let dir = store.path(6);
    let files = names(&dir);
    assert!(files.len() >= 9, "{files:?}");
    for file in &files {
        let path = dir.join(file);
        // A file of its own: links would spread the damage to step 5.
        let good = fs::read(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let refused = |what: &str| {
            let error = store.load(6).map(|_| ()).unwrap_err();
            assert!(matches!(error, StateError::Damaged { .. }), "{file} {what}: {error}");
            let text = error.to_string();
            let whose = if file == "lapidary_manifest.json" { "trainer.json" } else { file };
            assert!(text.contains(file) || text.contains(whose), "{file} {what}: {text}");
            assert!(text.contains("resume from another step (5)"), "{text}");
        };
        refused("removed");
        // A manifest without its last line break says the same.
        let last = if file == "lapidary_manifest.json" { 2 } else { 1 };
        for len in [0, good.len() / 2, good.len() - last] {
            fs::write(&path, &good[..len]).unwrap();
            refused("cut");
        }
        fs::write(&path, [good.as_slice(), b"x"].concat()).unwrap();
        refused("longer");
        for at in [0, good.len() / 2, good.len() - 2] {
            let mut bad = good.clone();
            bad[at] ^= 0x10;
            fs::write(&path, &bad).unwrap();
            refused("flipped");
        }
        fs::write(&path, &good).unwrap();
        store.load(6).unwrap();
    }
    // Files of another step.
    for file in ["model-trained-00001.safetensors", OPTIMIZER_FILE, STATE_FILE, "lapidary_manifest.json"] {
        let good = fs::read(dir.join(file)).unwrap();
        fs::copy(store.path(5).join(file), dir.join(file)).unwrap();
        assert!(matches!(store.load(6), Err(StateError::Damaged { .. })), "{file}");
        fs::write(dir.join(file), good).unwrap();
    }
    // A step under another's name; `latest` names it instead of passing over it.
    fs::rename(&dir, store.path(8)).unwrap();
    let error = store.latest().unwrap_err().to_string();
    assert!(error.contains("trainer.json is of step 6"), "{error}");
    fs::rename(store.path(8), &dir).unwrap();
    store.load(6).unwrap();
}

#[test]
fn another_architecture_and_format_are_refused() {
    let case = Case::new();
    let store = case.store(None);
    save(&store, &snapshot(1, false, is_trained));
    let mut spec = arch().spec().clone();
    spec.sliding_window = 9;
    let options = StoreOptions {
        keep: None,
        conditional: true,
        arch: Arch::new(spec).unwrap(),
        source: None,
        share: Share::ALONE,
    };
    let other = Store::open(&case.dir(), options).unwrap();
    let error = other.load(1).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("config.json describes another architecture"), "{error}");
    let mut record = Record::read(&store.path(1), 1).unwrap();
    record.state.format = 2;
    record.write(&store.path(1)).unwrap();
    let error = store.load(1).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("format 2, this version reads 1"), "{error}");
}

#[test]
fn a_kill_at_any_place_leaves_the_run_as_it_was() {
    for place in ["staged", "linked", "weights", "moments", "files", "record"] {
        let case = Case::new();
        let source = Model::open(&case.source()).unwrap();
        let store = case.store(Some(1));
        let first = snapshot(1, false, is_trained);
        save(&store, &first);
        *store.fault.lock().unwrap() = Some(place);
        let error = store.save(&snapshot(2, false, is_trained), &mut no_fetch, &mut |_, _| {}).unwrap_err();
        assert!(error.to_string().contains(place));
        assert_eq!(names(&case.dir()), [".2.lapidary-partial", "1"], "{place}");
        assert_eq!(store.latest().unwrap(), Some(1));
        // The rest of the killed save goes when the run starts again.
        let again = case.store(Some(1));
        assert_eq!(names(&case.dir()), ["1"], "{place}");
        holds(&again.load(1).unwrap(), &first, &source);
        let second = snapshot(2, false, is_trained);
        assert_eq!(save(&again, &second).removed, [1]);
        holds(&again.load(2).unwrap(), &second, &source);
    }
}

#[test]
fn an_error_leaves_nothing_behind() {
    let case = Case::new();
    let store = case.store(None);
    save(&store, &snapshot(1, false, is_trained));
    // A file where the new step should lie.
    fs::write(store.path(2), "").unwrap();
    assert!(store.save(&snapshot(2, false, is_trained), &mut no_fetch, &mut |_, _| {}).is_err());
    assert_eq!(names(&case.dir()), ["1", "2"]);
    assert_eq!(store.steps(), [1]);
}

#[test]
fn leftovers_go_when_the_store_opens() {
    let case = Case::new();
    let store = case.store(None);
    save(&store, &snapshot(1, false, is_trained));
    save(&store, &snapshot(2, false, is_trained));
    let dir = case.dir();
    // Killed while step 1 was being removed, and just before step 3 got its name.
    fs::rename(dir.join("1"), dir.join(".1.lapidary-deleted")).unwrap();
    fs::create_dir(dir.join(".3.lapidary-partial")).unwrap();
    fs::copy(dir.join("2/trainer.json"), dir.join(".3.lapidary-partial/trainer.json")).unwrap();
    // Killed while step 2 was being replaced, on a file system that cannot exchange.
    fs::rename(dir.join("2"), dir.join(".2.lapidary-partial-old")).unwrap();
    // Not ours.
    fs::create_dir(dir.join(".notes")).unwrap();
    fs::create_dir(dir.join("007")).unwrap();
    let store = case.store(None);
    assert_eq!(names(&dir), [".notes", "007", "2"]);
    assert_eq!(store.steps(), [2]);
    store.load(2).unwrap();
    // What a live writer holds stays.
    let staged = checkpoint::commit::StagedDir::create(&dir.join("9"), true).unwrap();
    case.store(None);
    assert!(staged.path().exists());
}

#[test]
fn a_step_is_replaced_by_its_like_alone() {
    let case = Case::new();
    let source = Model::open(&case.source()).unwrap();
    let store = case.store(None);
    save(&store, &snapshot(1, false, is_trained));
    let mut again = snapshot(1, false, is_trained);
    again.state.written_by = "later".into();
    save(&store, &again);
    holds(&store.load(1).unwrap(), &again, &source);
    assert_eq!(names(&case.dir()), ["1"]);
    let refused = |change: &dyn Fn(&mut Snapshot), what: &str| {
        let mut s = snapshot(1, false, is_trained);
        change(&mut s);
        let error = store.save(&s, &mut no_fetch, &mut |_, _| {}).unwrap_err();
        assert!(matches!(error, StateError::Exists { .. }), "{error}");
        assert!(error.to_string().contains(what), "{error}");
        holds(&store.load(1).unwrap(), &again, &source);
    };
    refused(&|s| s.state.optimizer = "adam_pax".into(), "optimizer (adamw instead of adam_pax)");
    refused(&|s| *s = snapshot(1, false, |n| n.starts_with("layers.")), "set of trained parameters");
    refused(&|s| drop(s.state.keys.insert("seed".into(), json!(1))), "value of `seed`");
    refused(&|s| s.state.cursor = json!(1), "place in the training data");
    // A damaged one is no obstacle.
    fs::write(store.path(1).join(OPTIMIZER_FILE), "").unwrap();
    save(&store, &again);
    holds(&store.load(1).unwrap(), &again, &source);
}

#[test]
fn snapshots_that_do_not_fit_are_refused() {
    let case = Case::new();
    let store = case.store(None);
    let refused = |change: &dyn Fn(&mut Snapshot), what: &str| {
        let mut s = snapshot(1, false, is_trained);
        change(&mut s);
        let error = store.save(&s, &mut no_fetch, &mut |_, _| {}).unwrap_err();
        assert!(matches!(error, StateError::Snapshot { step: 1, .. }), "{error}");
        assert!(error.to_string().contains(what), "{what}: {error}");
        assert!(!case.dir().exists() || names(&case.dir()).is_empty());
    };
    refused(&|s| s.state.format = 9, "format is 9");
    refused(&|s| drop(s.params.remove(0)), "neither given nor named as frozen");
    refused(&|s| drop(s.frozen.remove(0)), "neither given nor named as frozen");
    refused(&|s| s.params.push(s.params[0].clone()), "given twice");
    refused(&|s| s.frozen.push(s.params[0].name.clone()), "given as well");
    refused(&|s| s.params[0].name = "nonsense".into(), "nonsense is no parameter");
    refused(&|s| s.params[0].data = Data::Here(HostArray::zeros(DType::F32, [3]).unwrap()), "has the shape");
    refused(&|s| s.params[0].data = Data::Later(DType::F16, s.params[0].data.shape().clone()), "is float16");
    refused(&|s| s.state.trained.push("embed_tokens.weight".into()), "is trained, but not given");
    refused(&|s| s.state.trained.push(s.state.trained[0].clone()), "named twice");
    refused(&|s| drop(s.moments.remove(0)), "is missing (of");
    refused(&|s| drop(s.moments.pop()), "moment nu:");
    refused(&|s| s.moments.clear(), "moment mu:");
    refused(&|s| s.moments[0].name = "mu:embed_tokens.weight".into(), "not trained");
    refused(&|s| s.moments[0].name = "vu:norm.weight".into(), "neither mu:NAME nor nu:NAME");
    refused(&|s| s.moments.push(s.moments[0].clone()), "is there twice");
    refused(&|s| s.moments[0].data = Data::Here(HostArray::zeros(DType::F32, [3]).unwrap()), "has the shape");
}

#[test]
fn an_optimizer_may_do_without_moments() {
    let case = Case::new();
    let store = case.store(None);
    let mut s = snapshot(1, false, is_trained);
    s.state.optimizer = "sgd".into();
    s.moments.clear();
    save(&store, &s);
    let loaded = store.load(1).unwrap();
    holds(&loaded, &s, &Model::open(&case.source()).unwrap());
    let error = loaded.moment("mu:norm.weight").unwrap_err().to_string();
    assert!(error.contains("holds no moment mu:norm.weight"), "{error}");
}

#[test]
fn errors_of_a_thread_come_with_the_next_call() {
    let case = Case::new();
    let store = Arc::new(case.store(None));
    let mut saver = AsyncSaver::new(Arc::clone(&store));
    saver.finish().unwrap();
    saver.submit(snapshot(1, false, is_trained), &mut no_fetch).unwrap();
    saver.submit(snapshot(2, false, is_trained), &mut no_fetch).unwrap();
    saver.finish().unwrap();
    assert_eq!(saver.take_saved().iter().map(|s| s.step).collect::<Vec<_>>(), [1, 2]);
    assert!(!saver.is_busy());
    let mut bad = snapshot(3, false, is_trained);
    bad.moments.pop();
    saver.submit(bad.clone(), &mut no_fetch).unwrap();
    // The next submit fails and saves nothing; the one after works again.
    let error = saver.submit(snapshot(4, false, is_trained), &mut no_fetch).unwrap_err();
    assert!(matches!(error, StateError::Snapshot { step: 3, .. }), "{error}");
    assert_eq!(store.steps(), [1, 2]);
    saver.submit(snapshot(4, false, is_trained), &mut no_fetch).unwrap();
    saver.finish().unwrap();
    saver.submit(bad, &mut no_fetch).unwrap();
    assert!(saver.finish().is_err());
    saver.finish().unwrap();
    // Dropping waits.
    saver.submit(snapshot(5, false, is_trained), &mut no_fetch).unwrap();
    drop(saver);
    assert_eq!(store.steps(), [1, 2, 4, 5]);
    store.load(5).unwrap();
}

/// Arrays that are fetched are written as those that are here, each asked for once; a failed fetch saves nothing.
#[test]
fn arrays_are_fetched_when_they_are_written() {
    let here = snapshot(1, true, is_trained);
    let mut later = here.clone();
    for a in later.params.iter_mut().chain(&mut later.moments) {
        a.data = Data::Later(a.data.dtype(), a.data.shape().clone());
    }
    assert_eq!((here.later(), later.later()), (0, here.params.len() + here.moments.len()));
    let arrays: BTreeMap<&str, &HostArray> =
        here.params.iter().chain(&here.moments).map(|a| (a.name.as_str(), values(a))).collect();

    let case = Case::new();
    let store = Arc::new(case.store(None));
    let mut saver = AsyncSaver::new(Arc::clone(&store));
    let mut asked = Vec::new();
    let mut fetch = |name: &str| -> Result<HostArray, StateError> {
        asked.push(name.to_owned());
        Ok(arrays[name].clone())
    };
    saver.submit(later.clone(), &mut fetch).unwrap();
    saver.finish().unwrap();
    asked.sort();
    assert_eq!(asked, arrays.keys().copied().collect::<Vec<_>>());
    let other = Case::new();
    save(&other.store(None), &here);
    for file in ["model-trained-00001.safetensors", OPTIMIZER_FILE] {
        let [a, b] = [&case, &other].map(|c| fs::read(c.dir().join("1").join(file)).unwrap());
        assert!(a == b, "{file}");
    }

    later.state.step = 2;
    let mut left = 3;
    let mut fails = |name: &str| -> Result<HostArray, StateError> {
        left -= 1;
        if left == 0 { Err(StateError::Option("the device is gone".into())) } else { Ok(arrays[name].clone()) }
    };
    let error = saver.submit(later.clone(), &mut fails).unwrap_err().to_string();
    assert_eq!(error, "the device is gone");
    // What does not fit the plan is noticed, too.
    let mut wrong = |_: &str| -> Result<HostArray, StateError> { Ok(HostArray::zeros(DType::F32, [3]).unwrap()) };
    saver.submit(later, &mut wrong).unwrap();
    assert!(saver.finish().unwrap_err().to_string().contains("bytes"));
    assert_eq!(store.steps(), [1]);
}

/// What falls to one of `count` processes of a snapshot.
fn part_of(s: &Snapshot, process: usize, count: usize) -> Snapshot {
    let sizes: Vec<u64> = s.params.iter().map(|a| values(a).bytes().len() as u64).collect();
    let owners = Share { process, count }.deal(&sizes);
    let mine: std::collections::BTreeSet<&str> =
        s.params.iter().zip(owners).filter(|(_, o)| *o == process).map(|(a, _)| a.name.as_str()).collect();
    let mut part = s.clone();
    part.params.retain(|a| mine.contains(a.name.as_str()));
    part.moments.retain(|a| mine.contains(a.name.split_once(':').unwrap().1));
    part
}

/// Three processes save parts of a snapshot; results in their order.
fn save_together(case: &Case, parts: &[Snapshot]) -> Vec<Result<Saved, StateError>> {
    // Opening clears leftovers, so that all open before any saves.
    let stores: Vec<Store> = (0..parts.len()).map(|p| case.shared(p, parts.len())).collect();
    std::thread::scope(|scope| {
        let save = |(store, part): (&Store, &Snapshot)| store.save(part, &mut no_fetch, &mut |_, _| {});
        let running: Vec<_> = stores.iter().zip(parts).map(|pair| scope.spawn(move || save(pair))).collect();
        running.into_iter().map(|t| t.join().unwrap()).collect()
    })
}

#[test]
fn several_processes_write_one_checkpoint() {
    let case = Case::new();
    for (step, all) in [(1, false), (2, true), (3, false)] {
        let s = snapshot(step, all, is_trained);
        let parts: Vec<Snapshot> = (0..3).map(|p| part_of(&s, p, 3)).collect();
        assert!(parts.iter().all(|p| !p.params.is_empty() && p.params.len() < s.params.len()));
        for saved in save_together(&case, &parts) {
            assert!(saved.unwrap().written > 0);
        }
        let store = case.store(None);
        let listed = names(&store.path(step));
        for file in ["model-trained-p00001-00001.safetensors", "optimizer-p00002-00001.safetensors"] {
            assert!(listed.iter().any(|n| n == file), "{listed:?}");
        }
        assert!(!listed.iter().any(|n| n.contains("part")), "{listed:?}");
        // From the newest complete checkpoint where there is one.
        let frozen = Model::open(&if step == 3 { store.path(2) } else { case.source() }).unwrap();
        holds(&store.load(step).unwrap(), &s, &frozen);
        checkpoint::manifest::Manifest::read(&store.path(step)).unwrap().unwrap().verify(&store.path(step)).unwrap();
    }
    // One process goes on alone from what they wrote, and links to all that is frozen.
    let store = case.store(None);
    let saved = save(&store, &snapshot(4, false, is_trained));
    assert!(saved.linked > 0);
    assert_eq!(frozen_files(&store.path(4)), frozen_files(&store.path(3)));
}

#[test]
fn a_part_that_is_missing_stops_the_commit() {
    let case = Case::new();
    let s = snapshot(1, false, is_trained);
    let good: Vec<Snapshot> = (0..2).map(|p| part_of(&s, p, 2)).collect();
    let refused = |parts: &[Snapshot], word: &str| {
        let error = save_together(&case, parts).remove(0).unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
        assert_eq!(case.store(None).steps(), [0u64; 0]);
        assert!(names(&case.dir()).is_empty());
    };
    let mut parts = good.clone();
    let lost = parts[1].params.pop().unwrap();
    refused(&parts, "is neither given nor named as frozen");
    parts[0].params.push(lost);
    parts[1].moments.pop();
    refused(&parts, "is missing (of");
    let mut parts = good.clone();
    let twice = parts[0].params[0].clone();
    parts[1].params.push(twice);
    refused(&parts, "is given twice");
    for saved in save_together(&case, &good) {
        saved.unwrap();
    }
    holds(&case.store(None).load(1).unwrap(), &s, &Model::open(&case.source()).unwrap());
}
