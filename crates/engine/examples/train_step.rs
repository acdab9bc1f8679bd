//! Prints the program of one AdamW training step as StableHLO, for `time_program`:
//! `cargo run --release -p lapidary-engine --example train_step CONFIG.json ROWS SEQ [bfloat16|float32] [BLOCKS] [scan] [full]`.

#![allow(clippy::print_stdout)]

use gemma4::decoder::LayerRemat;
use gemma4::hf::HfModel;
use gemma4::layout::Layout;
use gemma4::loss::{HeadGradient, LossOptions};
use lapidary_engine::train::optimizer::{AdamW, Rule, Update};
use lapidary_engine::train::step::{PerLayerTable, Role, StepOptions, step_program};
use tensor::DType;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let a: Vec<String> = std::env::args().skip(1).collect();
    let [config, rows, seq, rest @ ..] = &a[..] else { return Err("CONFIG ROWS SEQ".into()) };
    let arch = HfModel::from_config(&serde_json::from_str(&std::fs::read_to_string(config)?)?)?.arch;
    let has = |w: &str| rest.iter().any(|r| r == w);
    let dtype = if has("float32") { DType::F32 } else { DType::BF16 };
    let blocks = rest.iter().find_map(|r| r.parse().ok()).unwrap_or(4);
    let remat = if has("full") { LayerRemat::Keep(vec![]) } else { LayerRemat::Everything };
    let layout = if has("scan") { Layout::scanned(&arch)? } else { Layout::unrolled(&arch) };
    let adam = AdamW {
        b1: 0.9,
        b2: 0.95,
        eps: 1e-8,
        eps_root: 0.0,
        weight_decay: 0.1,
        mu_dtype: DType::F32,
        nu_dtype: DType::F32,
    };
    let options = StepOptions {
        rows: rows.parse()?,
        seq: seq.parse()?,
        accumulation: 1,
        segments: has("segments"),
        loss: LossOptions { dtype, remat, blocks, called: false, z_loss: 0.0, gradient: HeadGradient::HiddenAndTable },
        per_layer: PerLayerTable::Device,
        weight_dtype: DType::F32,
        update: Update { rule: Rule::AdamW(adam), clip: 1.0 },
    };
    let program =
        step_program(&arch, &layout, &options, &|_| Role { trained: true, decayed: true, dtype: DType::F32 })?;
    println!("{}", program.stablehlo());
    Ok(())
}
