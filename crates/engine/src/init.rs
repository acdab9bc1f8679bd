//! Random checkpoints of any size, written as Hugging Face directories in bounded memory.

use std::path::Path;

use checkpoint::manifest::Manifest;
use checkpoint::write::{HfPlan, PlanOptions, TensorPlan, WriteOptions, write_hf};
use gemma4::hf::{CAUSAL_PREFIX, CONDITIONAL_PREFIX, config_json};
use gemma4::{Arch, param_table};
use half::bf16;
use rayon::prelude::*;
use serde_json::json;
use tensor::{DType, HostArray, Init, ParamSpec};

use crate::rng::Philox;
use crate::{EngineError, Result};

/// Elements made at once: 1 Mi, at most 4 MiB.
const PIECE: usize = 1 << 20;

/// Standard deviation of a unit normal truncated at two: what a draw is divided by to have the standard deviation asked for.
const TRUNCATED_STD: f32 = 0.879_625_7;

/// What to write.
#[derive(Debug, Clone)]
pub struct InitOptions {
    /// The weights depend on this and their names alone.
    pub seed: u64,
    /// `BF16` or `F32`.
    pub dtype: DType,
    /// Names and configuration of `Gemma4ForConditionalGeneration` (else `Gemma4ForCausalLM`).
    pub conditional: bool,
    /// Largest weights file in bytes.
    pub max_shard_bytes: Option<u64>,
    /// Replace what is there.
    pub force: bool,
    /// Draw norms and scalars around their initial value instead of setting them to it, so that a model that drops one of
    /// them shows. For tests.
    pub vary_norms: bool,
}

impl Default for InitOptions {
    fn default() -> Self {
        InitOptions {
            seed: 0,
            dtype: DType::BF16,
            conditional: true,
            max_shard_bytes: None,
            force: false,
            vary_norms: false,
        }
    }
}

/// Bytes of tensor data that [`write_random`] will write.
#[must_use]
pub fn data_bytes(arch: &Arch, dtype: DType) -> u64 {
    param_table(arch).iter().map(|p| p.shape.elements() as u64 * dtype.size() as u64).sum()
}

/// Writes a checkpoint with freshly initialised weights.
///
/// # Errors
/// When the target exists, space is short, or the file system refuses.
pub fn write_random(target: &Path, arch: &Arch, options: &InitOptions, progress: impl FnMut(u64)) -> Result<Manifest> {
    if !matches!(options.dtype, DType::BF16 | DType::F32) {
        return Err(EngineError::Input(format!(
            "checkpoints are written in bfloat16 or float32, not {}",
            options.dtype
        )));
    }
    let table = param_table(arch);
    let prefix = if options.conditional { CONDITIONAL_PREFIX } else { CAUSAL_PREFIX };
    let tensors: Vec<TensorPlan> = table
        .iter()
        .map(|p| TensorPlan { name: format!("{prefix}{}", p.name), dtype: options.dtype, shape: p.shape.clone() })
        .collect();
    let metadata = vec![("format".to_owned(), "pt".to_owned())];
    let plan = HfPlan::new(&tensors, &PlanOptions { max_shard_bytes: options.max_shard_bytes, metadata })?;
    let config = config_json(arch, options.conditional, options.dtype.name());
    let generation = json!({
        "bos_token_id": 2, "do_sample": true, "eos_token_id": [1, 106, 50], "pad_token_id": 0,
        "temperature": 1.0, "top_k": 64, "top_p": 0.95,
    });
    let text = |v: &serde_json::Value| format!("{v:#}\n").into_bytes();
    let write = WriteOptions {
        force: options.force,
        extra_files: vec![
            ("config.json".to_owned(), text(&config)),
            ("generation_config.json".to_owned(), text(&generation)),
        ],
        ..WriteOptions::default()
    };
    let manifest = write_hf(
        target,
        &plan,
        &write,
        |index, sink| {
            let spec = &table[index];
            let stream = Philox::new(options.seed, &spec.name);
            let total = spec.shape.elements();
            let init = match spec.init {
                Init::Constant(c) if options.vary_norms => Draw::Around(c),
                other => Draw::Init(other),
            };
            let mut start = 0;
            let threads = rayon::current_num_threads().max(1);
            while start < total {
                // One piece a thread, written in order: memory stays at a few pieces.
                let pieces: Vec<Vec<u8>> = (0..threads)
                    .into_par_iter()
                    .map(|i| start + i * PIECE)
                    .filter(|&s| s < total)
                    .map(|s| init.bytes(&stream, s, (total - s).min(PIECE), options.dtype))
                    .collect();
                for piece in &pieces {
                    sink.write(piece)?;
                }
                start += threads * PIECE;
            }
            Ok(())
        },
        progress,
    )?;
    Ok(manifest)
}

/// A freshly initialised parameter in f32: what [`write_random`] writes for the same seed.
///
/// # Errors
/// When memory is short.
pub fn initial(spec: &ParamSpec, seed: u64) -> Result<HostArray> {
    let stream = Philox::new(seed, &spec.name);
    let mut host = HostArray::zeros(DType::F32, spec.shape.clone())?;
    let draw = Draw::Init(spec.init);
    host.bytes_mut().par_chunks_mut(PIECE * 4).enumerate().for_each(|(i, out)| {
        out.copy_from_slice(&draw.bytes(&stream, i * PIECE, out.len() / 4, DType::F32));
    });
    Ok(host)
}

/// How elements are drawn.
enum Draw {
    Init(Init),
    /// Normal with standard deviation 0.1 around a constant.
    Around(f32),
}

impl Draw {
    /// Elements `start .. start + n` as bytes. `start` is a multiple of four.
    fn bytes(&self, stream: &Philox, start: usize, n: usize, dtype: DType) -> Vec<u8> {
        let mut values = Vec::with_capacity(n + 3);
        let mut normals = |scale: f32, shift: f32| {
            for block in (start / 4)..(start + n).div_ceil(4) {
                values.extend(stream.normals(block as u64, 0).map(|z| z * scale + shift));
            }
        };
        match *self {
            Draw::Init(Init::Normal(std)) => normals(std, 0.0),
            Draw::Around(c) => normals(0.1, c),
            Draw::Init(Init::Constant(c)) => values.resize(n, c),
            Draw::Init(Init::TruncatedNormal(std)) => {
                let scale = std / TRUNCATED_STD;
                values.extend((start..start + n).map(|i| stream.truncated_normal(i as u64) * scale));
            }
        }
        values.truncate(n);
        match dtype {
            DType::BF16 => {
                let narrow: Vec<bf16> = values.into_iter().map(bf16::from_f32).collect();
                bytemuck::cast_slice(&narrow).to_vec()
            }
            _ => bytemuck::cast_slice(&values).to_vec(),
        }
    }
}
