//! Writes a model directory whose matrices are stored quantised.

use std::error::Error;
use std::path::Path;

use ::kernels::{Bytes, KernelError, Matrix};
use checkpoint::hf::{CONFIG_FILE, GENERATION_CONFIG_FILE};
use checkpoint::manifest::Manifest;
use checkpoint::write::{HfPlan, PlanOptions, TensorPlan, TensorSink, WriteOptions, write_hf};
use gemma4::hf::{CAUSAL_PREFIX, CONDITIONAL_PREFIX};
use tensor::DType;

use super::config::{Wanted, output_config, sidecars};
use super::plan::text;
use crate::forward::narrow;
use crate::quantized::{Quantization, Stored};
use crate::{EngineError, Model, Result, kernels};

/// Rows of a tile.
const TILE: usize = 16;
/// Bytes of a matrix that are quantised at a time.
const PIECE: usize = 16 << 20;

/// How to write a directory of quantised weights.
#[derive(Debug, Clone, Default)]
pub struct QuantizeOptions {
    /// Replace an existing checkpoint.
    pub force: bool,
    /// Largest weights file in bytes; one file if absent.
    pub max_shard_bytes: Option<u64>,
}

/// A directory of quantised weights that can be written. Nothing was read or written yet.
#[derive(Debug)]
pub struct QuantizePlan<'a> {
    model: &'a Model,
    format: Quantization,
    plan: HfPlan,
    work: Vec<Work>,
    write: WriteOptions,
    /// What should be known before it runs, in sentences.
    pub notes: Vec<String>,
}

/// What fills a tensor: a parameter, quantised or as it is.
#[derive(Debug)]
struct Work {
    param: String,
    tiles: bool,
}

/// Plans a directory of quantised weights.
///
/// # Errors
/// When the model's are quantised already, sizes overflow or a file that is carried along cannot be read.
pub fn plan_quantized<'a>(
    model: &'a Model,
    format: Quantization,
    options: &QuantizeOptions,
) -> Result<QuantizePlan<'a>> {
    let weights = model.weights();
    if let Some(stored) = weights.stored {
        return Err(EngineError::Input(format!(
            "{} holds weights that are quantized to {} already; quantize the directory it was made from",
            model.path().display(),
            stored.format.name()
        )));
    }
    let stored = Stored { format, dtype: weights.main_dtype() };
    let prefix = if weights.conditional { CONDITIONAL_PREFIX } else { CAUSAL_PREFIX };
    let (mut tensors, mut work) = (Vec::new(), Vec::new());
    for (param, parts) in weights.params.iter().zip(stored.parts(&weights.arch)) {
        for (part, dtype, tiles) in [(parts.plain, param.hf_dtype, false), (parts.tiles, DType::U8, true)] {
            let Some((name, shape)) = part else { continue };
            tensors.push(TensorPlan { name: format!("{prefix}{name}"), dtype, shape });
            work.push(Work { param: param.spec.name.clone(), tiles });
        }
    }
    let layout = PlanOptions { max_shard_bytes: options.max_shard_bytes, ..PlanOptions::default() };
    let plan = HfPlan::new(&tensors, &layout)?;
    let wanted = Wanted { conditional: weights.conditional, towers: false, dtype: stored.dtype };
    let mut config = output_config(&weights.config, &weights.arch, wanted);
    stored.note(&mut config);
    let mut extra_files = vec![(CONFIG_FILE.to_owned(), text(&config))];
    extra_files.extend(sidecars(&weights.checkpoint.directories(), false)?);
    if !extra_files.iter().any(|(name, _)| name == GENERATION_CONFIG_FILE)
        && let Some(noted) = weights.generation_config.as_ref().filter(|v| v.is_object())
    {
        extra_files.push((GENERATION_CONFIG_FILE.to_owned(), text(noted)));
    }
    let mut notes = Vec::new();
    let unused: usize = weights.report.iter().flat_map(|r| &r.unused_expected).map(|(_, n)| n.tensors).sum();
    if unused > 0 {
        notes.push(format!("{unused} tensors are no parameters of the text model and stay behind"));
    }
    let write = WriteOptions { force: options.force, extra_files, ..WriteOptions::default() };
    Ok(QuantizePlan { model, format, plan, work, write, notes })
}

impl QuantizePlan<'_> {
    /// Number of tensors to be written.
    #[must_use]
    pub fn tensors(&self) -> usize {
        self.work.len()
    }

    /// Bytes of them.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.plan.data_bytes
    }

    /// Writes it, in bounded memory. The target is complete afterwards, or as it was before. `progress` hears of bytes
    /// written.
    ///
    /// # Errors
    /// When the source is damaged, a weight is not finite, the target exists, space is short, or the file system refuses.
    pub fn run(&self, target: &Path, progress: impl FnMut(u64)) -> Result<Manifest> {
        let fill = |index: usize, sink: &mut TensorSink<'_>| -> std::result::Result<(), Box<dyn Error + Send + Sync>> {
            let Some(work) = self.work.get(index) else { return Err("a tensor outside of the plan".into()) };
            match work.tiles {
                true => self.quantize(&work.param, sink),
                false => self.copy(&work.param, sink),
            }
        };
        Ok(write_hf(target, &self.plan, &self.write, fill, progress)?)
    }

    fn copy(&self, param: &str, sink: &mut TensorSink<'_>) -> std::result::Result<(), Box<dyn Error + Send + Sync>> {
        let mut buffer = Vec::new();
        self.model.read_pieces(param, (PIECE, 1), &mut |reader, region| {
            reader.read(region, &mut buffer)?;
            Ok(sink.write(&buffer)?)
        })?;
        Ok(())
    }

    fn quantize(
        &self,
        param: &str,
        sink: &mut TensorSink<'_>,
    ) -> std::result::Result<(), Box<dyn Error + Send + Sync>> {
        let dtype = self.model.dtype(param)?;
        let format = self.format.format();
        let width = self.model.shape(param)?.dims().last().copied().unwrap_or(0);
        // Tiles are whole: no box may be smaller.
        let piece = PIECE.max(TILE * width * dtype.size());
        let (mut done, mut tiles) = (0, Vec::new());
        self.model.read_pieces(param, (piece, TILE), &mut |reader, region| {
            let &[n, k] = region.shape.as_slice() else {
                return Err(EngineError::Input(format!("{param} is no matrix")));
            };
            let mut rows = Vec::new();
            reader.read(region, &mut rows)?;
            let named = |e: KernelError| {
                let e = match e {
                    KernelError::NotFinite { row } => KernelError::NotFinite { row: row + done },
                    other => other,
                };
                EngineError::Input(format!("{param}: {e}"))
            };
            let matrix = match dtype {
                DType::BF16 => Matrix::bf16(Bytes::from(rows), n, k),
                DType::F32 => Matrix::f32(Bytes::from(rows), n, k),
                // As decoding widens them.
                _ => {
                    let wide = narrow(dtype, &rows, [n, k].into(), DType::F32)?;
                    Matrix::f32(Bytes::from(wide.bytes().to_vec()), n, k)
                }
            }
            .map_err(named)?;
            tiles.resize(format.bytes(n, k).unwrap_or(0), 0);
            matrix.quantize_into(kernels::pool(), format, &mut tiles).map_err(named)?;
            done += n;
            Ok(sink.write(&tiles)?)
        })?;
        Ok(())
    }
}
