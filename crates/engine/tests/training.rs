//! The programs of training against each other, against finite differences and against optimizers written out in `f64`.
//!
//! Where two programs must agree, activations and weights are `f64`, so that a mistake cannot hide in rounding.

// The helpers of a test may unwrap as the test itself does.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

#[path = "common/values.rs"]
mod values;

use std::collections::{BTreeMap, HashMap};
use std::sync::OnceLock;

use config::{RematPolicy, Sources};
use gemma4::decoder::LayerRemat;
use gemma4::layout::{Layout, Slot};
use gemma4::loss::{BatchValues, HeadGradient, LossOptions, loss_sums};
use gemma4::params::{EMBED_TOKENS, EMBED_TOKENS_PER_LAYER};
use gemma4::{Arch, param_table};
use graph::{Graph, Program, Value};
use lapidary_engine::train::optimizer::{AdamW, Rule, Update};
use lapidary_engine::train::plan::Plan;
use lapidary_engine::train::step::{
    PerLayerTable, Role, Scalars, StepOptions, StepSums, device_slots, eval_program, gradient_program, names,
    step_program,
};
use lapidary_engine::{Runtime, RuntimeOptions};
use pjrt::{Buffer, CompileOptions, Executable};
use tensor::{DType, HostArray};
use values::{loss_options, slot_values, uniform, values};

/// Twelve layers, sliding twice and full once by turns: two repetitions that own keys and values, two that borrow them.
const WORDS: &[&str] = &[
    "model_name=tiny-e2b",
    "override_model_config=true",
    "base_num_decoder_layers=12",
    "sliding_window_pattern=3",
    "num_kv_shared_layers=6",
    "base_emb_dim=16",
    "base_mlp_dim=24",
    "base_num_query_heads=2",
    "head_dim=8",
    "global_head_dim=16",
    "vocab_size=37",
    "vocab_size_per_layer_input=37",
    "hidden_size_per_layer_input=4",
    "sliding_window_size=3",
];

const VOCAB: usize = 37;

fn config(more: &[&str]) -> config::Config {
    Sources::from_args(WORDS.iter().chain(more).copied()).resolve().unwrap()
}

fn arch(more: &[&str]) -> Arch {
    Arch::from_config(&config(more)).unwrap()
}

fn runtime() -> &'static Runtime {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    RUNTIME.get_or_init(|| Runtime::start(&RuntimeOptions { no_cache: true, ..Default::default() }).unwrap())
}

fn compile(program: &Program) -> Executable {
    let options = CompileOptions::verify_f32().with("xla_backend_optimization_level", 0i64);
    runtime().compile(program, &options).unwrap().executable
}

type Arrays = HashMap<String, HostArray>;

/// Runs a program on inputs by name; results by name.
fn execute(program: &Program, executable: &Executable, inputs: &Arrays) -> Arrays {
    let client = runtime().client();
    let buffers: Vec<Buffer> = program
        .inputs
        .iter()
        .map(|spec| {
            let host = inputs.get(&spec.name).unwrap_or_else(|| panic!("no input {}", spec.name));
            assert_eq!((host.dtype(), host.shape()), (spec.dtype, &spec.shape), "{}", spec.name);
            client.buffer_from_host(host, 0).unwrap()
        })
        .collect();
    let refs: Vec<&Buffer> = buffers.iter().collect();
    let out = executable.execute(&refs).unwrap();
    assert_eq!(out.len(), program.outputs.len());
    program.outputs.iter().zip(out).map(|(spec, b)| (spec.name.clone(), b.to_host().unwrap())).collect()
}

/// The slots' arrays.
fn parameters<'a>(slots: impl Iterator<Item = &'a Slot>, dtype: DType) -> Arrays {
    slots.map(|s| (s.name.clone(), HostArray::from_f64(dtype, s.shape.clone(), &slot_values(s)).unwrap())).collect()
}

#[derive(Clone)]
struct Rows {
    rows: usize,
    seq: usize,
    ids: Vec<i32>,
    positions: Vec<i32>,
    segments: Vec<i32>,
    targets: Vec<i32>,
    counted: Vec<i32>,
}

impl Rows {
    /// Random tokens, one document a row, `counted` saying which targets count.
    fn new(seed: &str, rows: usize, seq: usize, vocab: usize, counted: impl Fn(usize, usize) -> bool) -> Self {
        let token = |u: &f64| (((u + 1.0) / 2.0 * vocab as f64) as usize).min(vocab - 1) as i32;
        let stream: Vec<i32> = uniform(seed, rows * (seq + 1)).iter().map(token).collect();
        let of = |from: usize| stream.chunks(seq + 1).flat_map(move |r| r[from..from + seq].to_vec()).collect();
        Rows {
            rows,
            seq,
            ids: of(0),
            positions: (0..rows * seq).map(|i| (i % seq) as i32).collect(),
            segments: vec![1; rows * seq],
            targets: of(1),
            counted: (0..rows * seq).map(|i| i32::from(counted(i / seq, i % seq))).collect(),
        }
    }

    /// The rows as documents of a single one.
    fn packed(&self) -> Self {
        let numbered = |v: &[i32]| v.iter().enumerate().map(|(i, x)| x * (1 + i / self.seq) as i32).collect();
        Rows {
            rows: 1,
            seq: self.rows * self.seq,
            segments: numbered(&self.segments),
            counted: numbered(&self.counted),
            ..self.clone()
        }
    }

    fn fields(&self, lead: &[usize]) -> Arrays {
        let shape = [lead, &[self.seq]].concat();
        [
            (names::INPUTS, &self.ids),
            (names::POSITIONS, &self.positions),
            (names::SEGMENTS, &self.segments),
            (names::TARGETS, &self.targets),
            (names::TARGET_SEGMENTS, &self.counted),
        ]
        .into_iter()
        .map(|(name, v)| (name.to_owned(), HostArray::from_slice(shape.clone(), v).unwrap()))
        .collect()
    }
}

/// Loss and, if asked for, gradients of its sum by every slot, all in f64 but for the sum itself.
fn exact_program(arch: &Arch, layout: &Layout, options: &LossOptions, batch: &Rows, segments: bool) -> Program {
    let g = Graph::new("exact");
    let params: HashMap<String, Value> = layout
        .slots()
        .iter()
        .map(|s| (s.name.clone(), g.input(&s.name, DType::F64, s.shape.clone()).unwrap()))
        .collect();
    let field = |name: &str| g.input(name, DType::I32, [batch.rows, batch.seq]).unwrap();
    let values = BatchValues {
        ids: field(names::INPUTS),
        positions: field(names::POSITIONS),
        segments: segments.then(|| field(names::SEGMENTS)),
        targets: field(names::TARGETS),
        target_segments: field(names::TARGET_SEGMENTS),
        per_layer_rows: None,
        per_layer_ids: None,
    };
    let sums = loss_sums(&g, arch, layout, options, &params, &values).unwrap();
    if options.gradient != HeadGradient::None {
        let wrt: Vec<Value> = layout.slots().iter().map(|s| params[&s.name]).collect();
        for (slot, grad) in layout.slots().iter().zip(g.grad(sums.total, &wrt).unwrap()) {
            g.output(&format!("{}{}", names::GRAD, slot.name), grad.unwrap()).unwrap();
        }
    }
    g.output("total", sums.total).unwrap();
    g.output("z", sums.z).unwrap();
    g.output("weight", sums.weight).unwrap();
    g.finish().unwrap()
}

/// Loss sums and gradients, the latter by parameter.
struct Found {
    total: f64,
    z: f64,
    weight: f64,
    grads: BTreeMap<String, Vec<f64>>,
}

/// Gradients among a program's results, by parameter.
fn by_parameter(layout: &Layout, out: &Arrays) -> BTreeMap<String, Vec<f64>> {
    let mut grads = BTreeMap::new();
    for slot in layout.slots() {
        let Some(host) = out.get(&format!("{}{}", names::GRAD, slot.name)) else { continue };
        let all = host.to_f64();
        for (m, part) in slot.members.iter().zip(all.chunks(all.len() / slot.members.len())) {
            grads.insert(m.name.clone(), part.to_vec());
        }
    }
    grads
}

fn exact(arch: &Arch, layout: &Layout, options: &LossOptions, batch: &Rows, segments: bool) -> Found {
    let program = exact_program(arch, layout, options, batch, segments);
    let mut inputs = parameters(layout.slots().iter(), DType::F64);
    inputs.extend(batch.fields(&[batch.rows]));
    let out = execute(&program, &compile(&program), &inputs);
    let scalar = |name: &str| out[name].to_f64()[0];
    Found { total: scalar("total"), z: scalar("z"), weight: scalar("weight"), grads: by_parameter(layout, &out) }
}

fn norm(v: &[f64]) -> f64 {
    v.iter().map(|x| x * x).sum::<f64>().sqrt()
}

/// Largest relative difference of a gradient, by norms, with its parameter.
fn worst(a: &BTreeMap<String, Vec<f64>>, b: &BTreeMap<String, Vec<f64>>) -> (f64, String) {
    assert!(!a.is_empty());
    assert!(a.keys().eq(b.keys()));
    let mut worst = (0.0, String::new());
    for (name, x) in a {
        let y = &b[name];
        assert_eq!(x.len(), y.len(), "{name}");
        let size = norm(x);
        assert!(size.is_finite() && size > 1e-9, "{name}: the gradient's norm is {size}, nothing to compare");
        let diff: Vec<f64> = x.iter().zip(y).map(|(x, y)| x - y).collect();
        let relative = norm(&diff) / size;
        assert!(relative.is_finite(), "{name}");
        if relative > worst.0 {
            worst = (relative, name.clone());
        }
    }
    worst
}

impl Found {
    /// The sums are f32, the gradients f64.
    fn assert_is(&self, other: &Found, what: &str) {
        let close = |a: f64, b: f64| (a - b).abs() <= 2e-7 * b.abs();
        assert!(self.total > 1.0 && close(self.total, other.total), "{what}: loss {} and {}", self.total, other.total);
        assert!(self.z > 0.0 && close(self.z, other.z), "{what}: z {} and {}", self.z, other.z);
        assert_eq!(self.weight, other.weight, "{what}");
        let (relative, name) = worst(&self.grads, &other.grads);
        println!("{what}: gradients differ by {relative:.1e} at most ({name})");
        assert!(relative <= 1e-10, "{what}: {name} differs by {relative:.1e}");
    }
}

fn batch() -> Rows {
    Rows::new("batch", 2, 8, VOCAB, |row, i| row == 1 || i > 2)
}

#[test]
fn loops_over_layers_give_what_layers_written_out_give() {
    let arch = arch(&[]);
    let (scanned, unrolled) = (Layout::scanned(&arch).unwrap(), Layout::unrolled(&arch));
    let stacks = |from: usize| {
        let stacked =
            |s: &&Slot| s.stacked && s.members.len() == 2 && s.spec().layer.is_some_and(|l| l / 3 == from / 3);
        scanned.slots().iter().filter(stacked).count()
    };
    assert!(stacks(0) > 0 && stacks(6) > 0, "both segments are loops");
    for remat in [LayerRemat::Everything, LayerRemat::Keep(vec![])] {
        let options = loss_options(remat, 1);
        let a = exact(&arch, &scanned, &options, &batch(), true);
        let b = exact(&arch, &unrolled, &options, &batch(), true);
        assert_eq!(a.grads.len(), param_table(&arch).len());
        a.assert_is(&b, &format!("scanned, {:?}", options.remat));
    }
}

#[test]
fn no_remat_policy_changes_a_gradient() {
    let arch = arch(&[]);
    let layout = Layout::scanned(&arch).unwrap();
    let wanted = exact(&arch, &layout, &loss_options(LayerRemat::Everything, 1), &batch(), false);
    let mut seen = vec![LayerRemat::Everything];
    for word in RematPolicy::WORDS {
        let plan = Plan::new(&config(&[&format!("remat_policy={word}"), "dtype=float32"]), arch.clone()).unwrap();
        let remat = plan.step.loss.remat;
        if seen.contains(&remat) {
            continue;
        }
        seen.push(remat.clone());
        exact(&arch, &layout, &loss_options(remat, 1), &batch(), false).assert_is(&wanted, word);
    }
    assert_eq!(seen.len(), RematPolicy::WORDS.len(), "policies that keep the same: {seen:?}");
}

#[test]
fn blocks_of_the_loss_change_nothing() {
    let arch = arch(&[]);
    let layout = Layout::scanned(&arch).unwrap();
    let found: Vec<Found> = [1, 2, 4]
        .iter()
        .map(|&b| exact(&arch, &layout, &loss_options(LayerRemat::Keep(vec![]), b), &batch(), false))
        .collect();
    found[1].assert_is(&found[0], "2 blocks");
    found[2].assert_is(&found[0], "4 blocks");
}

#[test]
fn documents_packed_in_a_row_are_as_rows_of_their_own() {
    let arch = arch(&[]);
    let layout = Layout::scanned(&arch).unwrap();
    let options = loss_options(LayerRemat::Everything, 1);
    let apart = batch();
    let packed = apart.packed();
    let wanted = exact(&arch, &layout, &options, &apart, true);
    exact(&arch, &layout, &options, &packed, true).assert_is(&wanted, "packed");
    // Without the segments the second document would see the first.
    let options = LossOptions { gradient: HeadGradient::None, ..options };
    let blind = exact(&arch, &layout, &options, &packed, false);
    assert!((blind.total - wanted.total).abs() > 1e-3 * wanted.total, "segments make no difference");
}

/// The loss is given as f32, so that the steps are wide and the formula is of sixth order; few targets keep it small.
#[test]
fn finite_differences_of_the_whole_loss() {
    let arch = arch(&[]);
    let layout = Layout::unrolled(&arch);
    let options = loss_options(LayerRemat::Keep(vec![]), 2);
    let mut batch = Rows::new("differences", 1, 8, VOCAB, |_, i| i == 6);
    // Row 0 of both tables is looked up, by the position whose target counts and by an earlier one.
    batch.ids[2] = 0;
    batch.ids[6] = 0;
    let gradients = exact(&arch, &layout, &options, &batch, false);
    assert_eq!(gradients.weight, 1.0);

    let options = LossOptions { gradient: HeadGradient::None, ..options };
    let program = exact_program(&arch, &layout, &options, &batch, false);
    let executable = compile(&program);
    let mut inputs = parameters(layout.slots().iter(), DType::F64);
    inputs.extend(batch.fields(&[1]));
    let mut loss_at = |name: &str, index: usize, by: f64| {
        let was = inputs[name].clone();
        let mut moved = was.to_f64();
        moved[index] += by;
        let moved = HostArray::from_f64(DType::F64, was.shape().clone(), &moved).unwrap();
        inputs.insert(name.to_owned(), moved);
        let out = execute(&program, &executable, &inputs);
        inputs.insert(name.to_owned(), was);
        out["total"].to_f64()[0]
    };
    // Layers 4 and 5 are the donors of the sliding and the full layers among 6 to 11.
    assert!(arch.is_donor(4) && arch.is_donor(5) && !arch.layers()[7].owns_kv());
    let wide = arch.layers().len() * arch.per_layer_input().unwrap().width;
    for (name, elements) in [
        (EMBED_TOKENS, 0..16),
        (EMBED_TOKENS_PER_LAYER, 0..wide),
        ("layers.0.self_attn.q_norm.weight", 0..8),
        ("layers.11.self_attn.q_norm.weight", 0..16),
        ("layers.4.self_attn.k_norm.weight", 0..8),
        ("layers.5.self_attn.k_norm.weight", 0..16),
        ("layers.5.self_attn.v_proj.weight", 0..256),
        ("layers.7.self_attn.q_proj.weight", 0..256),
        ("layers.1.mlp.down_proj.weight", 0..384),
        ("layers.8.per_layer_input_gate.weight", 0..64),
        ("per_layer_model_projection.weight", 0..256),
        ("layers.3.layer_scalar", 0..1),
        ("norm.weight", 0..16),
    ] {
        let grad = &gradients.grads[name][elements.clone()];
        let mut order: Vec<usize> = elements.collect();
        order.sort_by(|&a, &b| grad[b].abs().total_cmp(&grad[a].abs()));
        // Embeddings are normed by rows of small values: the loss bends more along them.
        let h = if name == EMBED_TOKENS { 0.003 } else { 0.01 };
        for &i in order.iter().take(2) {
            let mut slope = 0.0;
            for (k, c) in [(1.0, 45.0), (2.0, -9.0), (3.0, 1.0)] {
                slope += c * (loss_at(name, i, k * h) - loss_at(name, i, -k * h));
            }
            slope /= 60.0 * h;
            let error = (slope - grad[i]).abs();
            println!("{name}[{i}]: gradient {:.6e}, differences {slope:.6e}, error {error:.1e}", grad[i]);
            // The loss of about four is rounded to 2.4e-7, which the formula multiplies by at most 110 / 60 / h; the rest is
            // its own error.
            let allowed = 4.4e-7 / h + 1e-4 * grad[i].abs();
            assert!(error <= allowed, "{name}[{i}]: {} and {slope}", grad[i]);
            assert!(grad[i].abs() > 10.0 * allowed, "{name}[{i}]: {} is too small to be checked", grad[i]);
        }
    }
}

fn step_options(batch: &Rows, accumulation: usize, weight_dtype: DType) -> StepOptions {
    StepOptions {
        rows: batch.rows / accumulation,
        seq: batch.seq,
        accumulation,
        segments: false,
        loss: loss_options(LayerRemat::Keep(vec![]), 2),
        per_layer: PerLayerTable::Device,
        weight_dtype,
        update: Update { rule: Rule::Sgd, clip: 0.0 },
    }
}

fn all_trained(dtype: DType) -> impl Fn(&Slot) -> Role {
    move |_| Role { trained: true, decayed: true, dtype }
}

fn sums(out: &Arrays) -> StepSums {
    StepSums::from_values(out[names::SUMS].as_slice::<f32>().unwrap()).unwrap()
}

#[test]
fn micro_batches_add_up_to_the_whole_batch() {
    let arch = arch(&[]);
    let layout = Layout::scanned(&arch).unwrap();
    // The halves have 16 and 5 targets: the mean is over all of them, not of two means.
    let batch = Rows::new("accumulate", 4, 8, VOCAB, |row, i| row < 2 || (row == 2 && i > 2));
    let [one, two] = [1, 2].map(|n| {
        let options = step_options(&batch, n, DType::F64);
        let program = gradient_program(&arch, &layout, &options, &all_trained(DType::F64)).unwrap();
        let mut inputs = parameters(layout.slots().iter(), DType::F64);
        inputs.extend(batch.fields(&[n, batch.rows / n]));
        execute(&program, &compile(&program), &inputs)
    });
    let (a, b) = (sums(&one), sums(&two));
    assert_eq!((a.weight, b.weight), (21.0, 21.0));
    assert!((a.total - b.total).abs() <= 2e-7 * a.total && a.total > 1.0, "{a:?} {b:?}");
    assert!((a.z - b.z).abs() <= 2e-7 * a.z && a.z > 0.0, "{a:?} {b:?}");
    // Gradients come out in f32.
    let (relative, name) = worst(&by_parameter(&layout, &one), &by_parameter(&layout, &two));
    println!("accumulation: gradients differ by {relative:.1e} at most ({name})");
    assert!(relative <= 2e-7, "{name} differs by {relative:.1e}");
}

#[test]
fn rows_looked_up_by_the_host_are_those_of_the_table() {
    let arch = arch(&[]);
    let layout = Layout::scanned(&arch).unwrap();
    let batch = batch();
    let width = arch.layers().len() * arch.per_layer_input().unwrap().width;
    let role = |s: &Slot| Role { trained: s.spec().name != EMBED_TOKENS_PER_LAYER, decayed: true, dtype: DType::F64 };
    let run = |per_layer: PerLayerTable, build: &dyn Fn(&StepOptions) -> Program| {
        let options = StepOptions { per_layer, ..step_options(&batch, 1, DType::F64) };
        let program = build(&options);
        let mut inputs = parameters(device_slots(&layout, per_layer), DType::F64);
        assert_eq!(inputs.contains_key(EMBED_TOKENS_PER_LAYER), per_layer == PerLayerTable::Device);
        inputs.extend(batch.fields(&[1, batch.rows]));
        let table = param_table(&arch).into_iter().find(|p| p.name == EMBED_TOKENS_PER_LAYER).unwrap();
        let table = values(&table);
        let rows: Vec<f64> = batch.ids.iter().flat_map(|&id| table[id as usize * width..][..width].to_vec()).collect();
        let rows = HostArray::from_f64(DType::F32, [1, batch.rows, batch.seq, width], &rows).unwrap();
        inputs.insert(names::PER_LAYER_ROWS.to_owned(), rows);
        execute(&program, &compile(&program), &inputs)
    };
    let gradients = |o: &StepOptions| gradient_program(&arch, &layout, o, &role).unwrap();
    let (device, host) = (run(PerLayerTable::Device, &gradients), run(PerLayerTable::Host(DType::F32), &gradients));
    assert_eq!(sums(&device), sums(&host));
    let (relative, name) = worst(&by_parameter(&layout, &device), &by_parameter(&layout, &host));
    assert!(relative <= 2e-7, "{name} differs by {relative:.1e}");
    let loss = |o: &StepOptions| eval_program(&arch, &layout, o, &role).unwrap();
    let (device, host) = (run(PerLayerTable::Device, &loss), run(PerLayerTable::Host(DType::F32), &loss));
    assert_eq!(sums(&device), sums(&host));
    assert!(sums(&host).total > 1.0);
}

/// A step on the rows that its batch has, with their moments, is a step on the whole table: for these rows, to rounding. All
/// other rows are not there, so that they rest.
#[test]
fn rows_trained_on_the_host_go_as_on_the_device() {
    let arch = arch(&[]);
    let whole = Layout::unrolled(&arch);
    let batch = batch();
    let tokens = batch.rows * batch.seq;
    let mut different = batch.ids.clone();
    different.sort_unstable();
    different.dedup();
    assert!(different.len() < VOCAB, "some rows rest");
    let name = EMBED_TOKENS_PER_LAYER;
    let spec = param_table(&arch).into_iter().find(|p| p.name == name).unwrap();
    let width = spec.shape.dims()[1];
    let table = values(&spec);
    let decayed = |s: &Slot| Role { trained: true, decayed: s.spec().name != "norm.weight", dtype: DType::F32 };
    let run = |layout: &Layout, per_layer: PerLayerTable, change: &dyn Fn(&mut Arrays)| -> Arrays {
        let update = Update { rule: adamw(), clip: 0.5 };
        let options = StepOptions { per_layer, update, ..step_options(&batch, 1, DType::F32) };
        let loss = LossOptions { dtype: DType::F32, ..options.loss.clone() };
        let options = StepOptions { loss, ..options };
        let program = step_program(&arch, layout, &options, &decayed).unwrap();
        let mut inputs = parameters(device_slots(&whole, per_layer), DType::F32);
        for slot in device_slots(&whole, per_layer) {
            for (prefix, scale) in [(names::MU, 0.01), (names::NU, 0.02)] {
                let moment: Vec<f64> = uniform(prefix, slot.shape.elements()).iter().map(|u| scale * u.abs()).collect();
                let moment = HostArray::from_f64(DType::F32, slot.shape.clone(), &moment).unwrap();
                inputs.insert(format!("{prefix}{}", slot.name), moment);
            }
        }
        inputs.extend(batch.fields(&[1, batch.rows]));
        let scalars = Scalars { learning_rate: 1e-2, correction1: 1.5, correction2: 2.5 };
        inputs.insert(names::SCALARS.into(), HostArray::from_slice([3], &scalars.values()).unwrap());
        change(&mut inputs);
        execute(&program, &compile(&program), &inputs)
    };
    let device = run(&whole, PerLayerTable::Device, &|_| {});
    let of_rows = |all: &[f64]| -> Vec<f64> {
        different.iter().flat_map(|&id| all[id as usize * width..][..width].to_vec()).collect()
    };
    let few = whole.clone().with_table_rows(tokens);
    let host = run(&few, PerLayerTable::HostTrained, &|inputs| {
        for key in [name.to_owned(), format!("{}{name}", names::MU), format!("{}{name}", names::NU)] {
            let mut rows = of_rows(&inputs[&key].to_f64());
            rows.resize(tokens * width, 0.0);
            inputs.insert(key, HostArray::from_f64(DType::F32, [tokens, width], &rows).unwrap());
        }
        let index: Vec<i32> = batch.ids.iter().map(|id| different.binary_search(id).unwrap() as i32).collect();
        let index = HostArray::from_slice([1, batch.rows, batch.seq], &index).unwrap();
        inputs.insert(names::PER_LAYER_INDEX.into(), index);
    });
    let close = |what: &str, a: &[f64], b: &[f64]| {
        let distance: f64 = a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt();
        assert!(
            a.len() == b.len() && distance <= 2e-6 * norm(a).max(1e-9),
            "{what}: {distance:.1e} of {:.1e}",
            norm(a)
        );
    };
    for (key, value) in &device {
        let (a, b) = (value.to_f64(), host[key].to_f64());
        if !key.ends_with(name) {
            // The norm of parameters leaves the table out.
            let n = if key == names::SUMS { 4 } else { a.len() };
            close(key, &a[..n], &b[..n]);
            continue;
        }
        close(key, &of_rows(&a), &b[..different.len() * width]);
        assert!(of_rows(&a) != of_rows(&table), "it is trained");
    }
}

#[test]
fn blocks_of_the_loss_save_the_memory_of_the_logits() {
    const V: usize = 2053;
    let arch = arch(&[
        "vocab_size=2053",
        "vocab_size_per_layer_input=2053",
        "base_num_decoder_layers=3",
        "num_kv_shared_layers=0",
        "use_double_wide_mlp=false",
    ]);
    let layout = Layout::unrolled(&arch);
    let batch = Rows::new("memory", 4, 32, V, |_, _| true);
    let n = batch.rows * batch.seq;
    let measured = |blocks: usize| {
        let mut options = step_options(&batch, 1, DType::F32);
        options.loss = LossOptions { dtype: DType::F32, blocks, ..options.loss };
        let program = gradient_program(&arch, &layout, &options, &all_trained(DType::F32)).unwrap();
        let text = program.stablehlo();
        let logits = [vec![n], vec![batch.rows, batch.seq], vec![blocks, n / blocks]].map(|lead| {
            let lead: Vec<String> = lead.iter().map(ToString::to_string).collect();
            text.contains(&format!("tensor<{}x{V}x", lead.join("x")))
        });
        assert!(text.contains(&format!("tensor<{}x{V}x", n / blocks)), "the logits of one block are there");
        let whole = logits.contains(&true);
        assert_eq!(whole, blocks == 1, "{blocks} blocks: logits of all tokens in the program");
        runtime().compile(&program, &CompileOptions::verify_f32()).unwrap().executable.memory().unwrap().temporary
    };
    let temporary = [1, 2, 4].map(measured);
    println!("temporary bytes in 1, 2, 4 blocks: {temporary:?}");
    let one = (n * V * 4) as i64;
    assert!(temporary[0] >= one, "a program with {one} bytes of logits has {} bytes", temporary[0]);
    assert!(temporary[0] - temporary[1] >= one / 4 && temporary[1] > temporary[2], "{temporary:?}");
}

/// A parameter's update written out.
fn updated(rule: &Rule, rate: f64, t: i32, decayed: bool, [p, g, mu, nu]: [f64; 4]) -> [f64; 3] {
    match rule {
        Rule::Sgd => [p - rate * g, mu, nu],
        Rule::AdamW(a) => {
            let mu = a.b1 * mu + (1.0 - a.b1) * g;
            let nu = a.b2 * nu + (1.0 - a.b2) * g * g;
            let mu_hat = mu / (1.0 - a.b1.powi(t));
            let nu_hat = nu / (1.0 - a.b2.powi(t));
            let decay = if decayed { a.weight_decay * p } else { 0.0 };
            [p - rate * (mu_hat / ((nu_hat + a.eps_root).sqrt() + a.eps) + decay), mu, nu]
        }
    }
}

/// Three steps of the program and of the rule on the gradients of the gradient program.
fn three_steps(rule: &Rule, clip: f64) {
    const RATE: f32 = 0.01;
    let arch = arch(&[]);
    let layout = Layout::scanned(&arch).unwrap();
    let batch = Rows::new("steps", 4, 8, VOCAB, |row, i| row != 1 || i < 3);
    let mut options = step_options(&batch, 2, DType::F32);
    options.update = Update { rule: rule.clone(), clip };
    // Matrices decay, norms do not; gates are frozen.
    let role = |s: &Slot| Role {
        trained: !s.name.contains("mlp.gate_proj"),
        decayed: s.spec().shape.rank() > 1,
        dtype: DType::F32,
    };
    let frozen: Vec<&Slot> = layout.slots().iter().filter(|s| !role(s).trained).collect();
    let trained: Vec<&Slot> = layout.slots().iter().filter(|s| role(s).trained).collect();
    assert!(!frozen.is_empty() && trained.iter().any(|s| role(s).decayed) && trained.iter().any(|s| !role(s).decayed));
    let gradients = gradient_program(&arch, &layout, &options, &role).unwrap();
    let step = step_program(&arch, &layout, &options, &role).unwrap();
    let moments = options.update.moment_dtypes();
    for slot in &frozen {
        for name in [slot.name.clone(), format!("{}{}", names::MU, slot.name), format!("{}{}", names::NU, slot.name)] {
            assert!(step.outputs.iter().all(|o| o.name != name), "{name} is frozen");
        }
        let input = step.inputs.iter().find(|i| i.name == slot.name).unwrap();
        assert!(!input.donated, "{}", slot.name);
        assert!(step.inputs.iter().all(|i| i.name != format!("{}{}", names::MU, slot.name)));
    }
    assert_eq!(step.outputs.len(), trained.len() * (1 + moments.len()) + 1);
    let (gradients_exe, step_exe) = (compile(&gradients), compile(&step));

    let mut state = parameters(layout.slots().iter(), DType::F32);
    for slot in &trained {
        for (prefix, dtype) in &moments {
            state.insert(format!("{prefix}{}", slot.name), HostArray::zeros(*dtype, slot.shape.clone()).unwrap());
        }
    }
    state.extend(batch.fields(&[2, 2]));
    for t in 1..=3 {
        let correction = |b: f64| (1.0 / (1.0 - b.powi(t))) as f32;
        let (correction1, correction2) = match rule {
            Rule::AdamW(a) => (correction(a.b1), correction(a.b2)),
            Rule::Sgd => (1.0, 1.0),
        };
        let scalars = Scalars { learning_rate: RATE, correction1, correction2 };
        state.insert(names::SCALARS.to_owned(), HostArray::from_slice([3], &scalars.values()).unwrap());
        let grads = execute(&gradients, &gradients_exe, &state);
        let out = execute(&step, &step_exe, &state);

        let found = sums(&out);
        assert_eq!((found.total, found.weight), (sums(&grads).total, sums(&grads).weight));
        assert_eq!(found.weight, 27.0);
        let of = |slot: &Slot| grads[&format!("{}{}", names::GRAD, slot.name)].to_f64();
        let raw = norm(&trained.iter().map(|s| norm(&of(s))).collect::<Vec<_>>());
        assert!((f64::from(found.grad_square).sqrt() - raw).abs() <= 1e-6 * raw, "norm {raw}, {found:?}");
        let factor = if clip > 0.0 && raw >= clip { clip / raw } else { 1.0 };
        assert_eq!(factor < 1.0, clip == 0.5, "the norm is {raw}, the threshold {clip}");

        let mut worst: f64 = 0.0;
        for slot in &trained {
            let grad = of(slot);
            let read = |from: &Arrays, prefix: &str| {
                from.get(&format!("{prefix}{}", slot.name)).map_or_else(|| vec![0.0; grad.len()], HostArray::to_f64)
            };
            let before = ["", names::MU, names::NU].map(|p| read(&state, p));
            let after = ["", names::MU, names::NU].map(|p| read(&out, p));
            for (i, g) in grad.iter().enumerate() {
                let was = [before[0][i], g * factor, before[1][i], before[2][i]];
                let wanted = updated(rule, f64::from(RATE), t, role(slot).decayed, was);
                // The gradient's own rounding is 1e-7 of it; moments are sums of two terms, either of which may round.
                let scale = [1e-6 * f64::from(RATE) * (1.0 + g.abs()) + 1.2e-7 * was[0].abs(), 0.0, 0.0];
                let terms = [0.0, was[2].abs() + was[1].abs(), was[3] + was[1] * was[1]];
                for k in 0..3 {
                    let error = (after[k][i] - wanted[k]).abs();
                    // What is below the smallest normal number may count as zero.
                    let allowed = scale[k] + 1e-6 * terms[k] + f64::from(f32::MIN_POSITIVE);
                    assert!(
                        error <= allowed,
                        "step {t}, {}[{i}], part {k}: {} instead of {} from {was:?}",
                        slot.name,
                        after[k][i],
                        wanted[k]
                    );
                }
                worst = worst.max((after[0][i] - wanted[0]).abs());
            }
            assert!(before[0] != after[0], "{} did not move", slot.name);
        }
        println!("step {t}: norm {raw:.3}, parameters off by {worst:.1e} at most");
        for (name, host) in out {
            state.insert(name, host);
        }
        let all: Vec<f64> = layout.slots().iter().map(|s| norm(&state[&s.name].to_f64())).collect();
        let square = norm(&all).powi(2);
        assert!((f64::from(found.param_square) - square).abs() <= 1e-6 * square, "parameters {square}, {found:?}");
    }
}

fn adamw() -> Rule {
    Rule::AdamW(AdamW {
        b1: 0.9,
        b2: 0.95,
        eps: 1e-3,
        eps_root: 1e-6,
        weight_decay: 0.1,
        mu_dtype: DType::F32,
        nu_dtype: DType::F32,
    })
}

#[test]
fn adamw_is_what_it_is_on_paper() {
    three_steps(&adamw(), 0.0);
}

#[test]
fn adamw_of_a_clipped_gradient() {
    three_steps(&adamw(), 0.5);
}

#[test]
fn sgd_of_a_clipped_gradient() {
    three_steps(&Rule::Sgd, 0.5);
}

#[test]
fn sgd_below_the_clipping_threshold() {
    three_steps(&Rule::Sgd, 1e6);
}

#[test]
fn the_text_of_a_scanned_step_does_not_grow_with_depth() {
    let lines = |layers: usize, scan: bool| {
        let (total, shared) =
            (format!("base_num_decoder_layers={layers}"), format!("num_kv_shared_layers={}", layers / 2));
        let arch = arch(&["sliding_window_pattern=5", &total, &shared]);
        let layout = if scan { Layout::scanned(&arch).unwrap() } else { Layout::unrolled(&arch) };
        let options =
            StepOptions { update: Update { rule: adamw(), clip: 1.0 }, ..step_options(&batch(), 1, DType::F32) };
        let program = step_program(&arch, &layout, &options, &all_trained(DType::F32)).unwrap();
        program.stablehlo().lines().count()
    };
    // Ten layers are one repetition in either segment, which is written out: the loops begin at twenty.
    let scanned = [20, 40, 80].map(|n| lines(n, true));
    let unrolled = [20, 40].map(|n| lines(n, false));
    println!("lines of 20, 40, 80 layers in loops {scanned:?}, of 20 and 40 written out {unrolled:?}");
    for n in &scanned[1..] {
        assert!(n.abs_diff(scanned[0]) * 50 <= scanned[0], "{scanned:?}");
    }
    assert!(unrolled[1] * 2 > unrolled[0] * 3 && scanned[0] < unrolled[0], "{scanned:?} {unrolled:?}");
}
