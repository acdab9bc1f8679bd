//! Loss and whole-model gradients against those that Hugging Face transformers computed, for every golden case.
//!
//! `LAPIDARY_GOLDEN_DIR` names further cases. A case without gradients checks its loss alone.

// The helpers of a test may unwrap as the test itself does; what was compared is worth seeing with --nocapture.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

#[path = "common/golden.rs"]
mod golden;

use std::path::Path;

use checkpoint::safetensors::SafetensorsFile;
use gemma4::decoder::LayerRemat;
use gemma4::layout::{Layout, Slot};
use gemma4::loss::{HeadGradient, LossOptions};
use golden::{cases, open, read};
use lapidary_engine::kernels::{product_calls, register};
use lapidary_engine::train::optimizer::{Rule, Update};
use lapidary_engine::train::step::{PerLayerTable, Role, StepOptions, StepSums, gradient_program, names};
use lapidary_engine::{Model, Runtime, RuntimeOptions};
use pjrt::{Buffer, CompileOptions};
use tensor::{DType, HostArray};

struct Case {
    model: Model,
    file: SafetensorsFile,
    rows: usize,
    seq: usize,
    /// inputs, positions, targets, target segments, segments
    batch: Vec<Vec<i32>>,
}

impl Case {
    fn open(path: &Path) -> Self {
        let file = SafetensorsFile::open(&path.join("golden.safetensors")).unwrap();
        let ints = |name: &str| read(&file, name).map(|(s, v)| (s, v.iter().map(|&x| x as i32).collect::<Vec<_>>()));
        let (shape, ids) = ints("input_ids").unwrap();
        let (rows, seq) = (shape[0], shape[1]);
        let labels = ints("labels").map_or_else(|| ids.clone(), |(_, v)| v);
        let mask = ints("attention_mask").map_or_else(|| vec![1; rows * seq], |(_, v)| v);
        let mut targets = vec![0; rows * seq];
        let mut target_segments = vec![0; rows * seq];
        for i in 0..rows * seq {
            if i % seq + 1 < seq && labels[i + 1] != -100 {
                targets[i] = labels[i + 1];
                target_segments[i] = 1;
            }
        }
        let positions = (0..rows * seq).map(|i| (i % seq) as i32).collect();
        let batch = vec![ids, positions, targets, target_segments, mask];
        Case { model: open(path), file, rows, seq, batch }
    }

    fn parameter(&self, slot: &Slot, dtype: DType) -> HostArray {
        let mut values = Vec::new();
        for m in &slot.members {
            values.extend(self.model.read(&m.name).unwrap().to_f64());
        }
        HostArray::from_f64(dtype, slot.shape.clone(), &values).unwrap()
    }

    /// Largest relative error of a gradient, and of the loss. With f32 arithmetic, products and attention are those of
    /// training, which are called where the machine has the instructions.
    fn check(&self, runtime: &Runtime, layout: &Layout, dtype: DType, blocks: usize, remat: LayerRemat) -> (f64, f64) {
        let loss = LossOptions {
            dtype,
            remat,
            blocks,
            called: product_calls(dtype).is_some(),
            z_loss: 0.0,
            gradient: HeadGradient::HiddenAndTable,
        };
        let options = StepOptions {
            rows: self.rows,
            seq: self.seq,
            accumulation: 1,
            segments: true,
            loss,
            per_layer: PerLayerTable::Device,
            weight_dtype: DType::F32,
            update: Update { rule: Rule::Sgd, clip: 0.0 },
        };
        let role = Role { trained: true, decayed: true, dtype: DType::F32 };
        let program = gradient_program(self.model.arch(), layout, &options, &|_| role.clone()).unwrap();
        let compile = CompileOptions::verify_f32().with("xla_backend_optimization_level", 0i64);
        let program = match product_calls(dtype) {
            Some(calls) => program.with_product_calls(calls),
            None => program,
        };
        let compiled = runtime.compile(&program, &compile).unwrap();
        let client = runtime.client();
        let mut inputs: Vec<Buffer> = layout
            .slots()
            .iter()
            .map(|s| client.buffer_from_host(&self.parameter(s, DType::F32), 0).unwrap())
            .collect();
        for field in &self.batch {
            let host = HostArray::from_slice([1, self.rows, self.seq], field).unwrap();
            inputs.push(client.buffer_from_host(&host, 0).unwrap());
        }
        let refs: Vec<&Buffer> = inputs.iter().collect();
        let out = compiled.executable.execute(&refs).unwrap();
        let mut worst: f64 = 0.0;
        let mut compared = 0;
        let mut loss_error = f64::NAN;
        for (spec, buffer) in program.outputs.iter().zip(out) {
            let host = buffer.to_host().unwrap();
            if spec.name == names::SUMS {
                let sums = StepSums::from_values(host.as_slice::<f32>().unwrap()).unwrap();
                let (_, wanted) = read(&self.file, "loss").unwrap();
                let ours = f64::from(sums.total) / f64::from(sums.weight);
                loss_error = (ours - wanted[0]).abs() / wanted[0].abs();
                continue;
            }
            let slot = layout.slots().iter().find(|s| spec.name == format!("grad:{}", s.name)).unwrap();
            let ours = host.to_f64();
            let n = ours.len() / slot.members.len();
            for (m, ours) in slot.members.iter().zip(ours.chunks(n)) {
                let golden = ["", "model.", "model.language_model."]
                    .iter()
                    .find_map(|p| read(&self.file, &format!("grad.{p}{}", m.name)));
                let Some((_, wanted)) = golden else { continue };
                compared += 1;
                assert_eq!(wanted.len(), ours.len(), "{}", m.name);
                let norm = wanted.iter().map(|x| x * x).sum::<f64>().sqrt();
                let diff = wanted.iter().zip(ours).map(|(a, b)| (a - b) * (a - b)).sum::<f64>().sqrt();
                let relative = diff / norm.max(1e-12);
                assert!(relative <= 1e-4, "{}: relative error {relative:.1e} of norm {norm:.3e}", m.name);
                worst = worst.max(relative);
            }
        }
        println!("  {compared} gradients compared, worst {worst:.1e}, loss {loss_error:.1e}");
        (worst, loss_error)
    }
}

#[test]
fn losses_and_gradients_are_those_of_transformers() {
    let runtime = Runtime::start(&RuntimeOptions::default()).unwrap();
    register(runtime.client()).unwrap();
    let mut with_gradients = 0;
    for path in cases() {
        let case = Case::open(&path);
        println!("{}", path.display());
        let arch = case.model.arch();
        let unrolled = Layout::unrolled(arch);
        let (worst, loss) = case.check(&runtime, &unrolled, DType::F32, 1, LayerRemat::Everything);
        assert!(loss <= 1e-5, "loss off by {loss:.1e}");
        with_gradients += usize::from(worst > 0.0);
        // Computed again from each layer's input, loss in blocks, and in loops where the layers allow it.
        let layout = Layout::scanned(arch).unwrap_or(unrolled);
        let (_, loss) = case.check(&runtime, &layout, DType::F32, case.rows, LayerRemat::Keep(vec![]));
        assert!(loss <= 1e-5, "loss off by {loss:.1e}");
    }
    assert!(with_gradients > 0, "no golden case has gradients");
}
