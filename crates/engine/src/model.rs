//! A checkpoint opened as a model: architecture, and every parameter as Hugging Face has it.

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use checkpoint::binding::{BindReport, NameRules, UnusedRule};
use checkpoint::copy::{Item, ItemReader};
use checkpoint::safetensors::TensorView;
use gemma4::Arch;
use gemma4::cached::called_matrices;
use gemma4::hf::{PREFIXES, expected_unused};
use gemma4::params::EMBED_TOKENS;
use tensor::{DType, HostArray, Shape};

use crate::convert::{Checkpoint, Hints, Param, Weights};
use crate::quantized::Quantization;
use crate::{EngineError, Result};

/// Bytes read at a time: enough to go through chunks once, little enough to stay in the cache.
const PIECE: usize = 4 << 20;

/// A Gemma 4 text model, from a Hugging Face directory or an Orbax checkpoint as MaxText writes it: checked, nothing read
/// yet.
///
/// Either way parameters have Hugging Face's names and come in its convention: matrices `[out, in]`, the token table
/// unscaled.
#[derive(Debug)]
pub struct Model {
    weights: Weights,
    index: HashMap<String, usize>,
}

impl Model {
    /// Opens a Hugging Face directory in any of its spellings, or an Orbax checkpoint: its items, a step or a run.
    ///
    /// # Errors
    /// When a file is damaged, the configuration is not one of a Gemma 4 text model, or a tensor is missing or misshapen;
    /// [`EngineError::NoArchitecture`] for an Orbax checkpoint that no conversion of ours wrote.
    pub fn open(path: &Path) -> Result<Self> {
        Self::open_with(path, &Hints::default())
    }

    /// As [`open`](Self::open), with an architecture for a checkpoint that does not tell its own.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_with(path: &Path, hints: &Hints<'_>) -> Result<Self> {
        Ok(Self::new(Weights::open(path, hints)?))
    }

    /// The model of a checkpoint that is open already.
    #[must_use]
    pub fn new(weights: Weights) -> Self {
        let index = weights.params.iter().enumerate().map(|(i, p)| (p.spec.name.clone(), i)).collect();
        Model { weights, index }
    }

    /// Where it lies.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.weights.checkpoint.path()
    }

    /// The architecture.
    #[must_use]
    pub fn arch(&self) -> &Arch {
        &self.weights.arch
    }

    /// The checkpoint behind it: format, configuration, origin of every parameter.
    #[must_use]
    pub fn weights(&self) -> &Weights {
        &self.weights
    }

    /// What was odd in the configuration or the checkpoint.
    #[must_use]
    pub fn notes(&self) -> &[String] {
        &self.weights.notes
    }

    /// What was found in a Hugging Face directory: used, left over, by reason.
    #[must_use]
    pub fn report(&self) -> Option<&BindReport> {
        self.weights.report.as_ref()
    }

    fn param(&self, name: &str) -> Result<&Param> {
        let param = self.index.get(name).and_then(|&i| self.weights.params.get(i));
        param.ok_or_else(|| EngineError::Input(format!("{name} is no parameter of {}", self.path().display())))
    }

    /// The element type in which [`read`](Self::read) gives a parameter: that of its file, except that MaxText's token
    /// table, which may be stored more precisely, has the type it had, or that of the other weights.
    ///
    /// # Errors
    /// When the model has no such parameter.
    pub fn dtype(&self, name: &str) -> Result<DType> {
        Ok(self.param(name)?.hf_dtype)
    }

    /// A parameter in place in its mapped file; `None` if it is not stored as Hugging Face has it, in one piece, or quantised.
    #[must_use]
    pub fn mapped(&self, name: &str) -> Option<TensorView> {
        match &self.weights.checkpoint {
            Checkpoint::Hf(dir) => {
                let param = self.param(name).ok()?;
                // Tiles are no rows.
                (param.dtype == param.hf_dtype).then(|| dir.tensor(&param.from))?
            }
            Checkpoint::Orbax(_) => None,
        }
    }

    /// What matrices are multiplied as, if that is quantised: as they are stored, or as it is asked for.
    ///
    /// # Errors
    /// When they are stored in another form than is asked for.
    pub fn quantization(&self, asked: Option<Quantization>) -> Result<Option<Quantization>> {
        match (self.weights.stored.map(|s| s.format), asked) {
            (Some(stored), Some(asked)) if stored != asked => Err(EngineError::Input(format!(
                "{} holds weights quantized to {}; {} is made of the weights as they were before",
                self.path().display(),
                stored.name(),
                asked.name()
            ))),
            (stored, asked) => Ok(stored.or(asked)),
        }
    }

    /// A matrix in tiles in its mapped file, and how those are laid out; `None` where it is not stored quantised.
    #[must_use]
    pub(crate) fn tiles(&self, name: &str) -> Option<(::kernels::Format, TensorView)> {
        let stored = self.weights.stored?;
        let Checkpoint::Hf(dir) = &self.weights.checkpoint else { return None };
        Some((stored.format.format(), dir.tensor(self.param(name).ok()?.tiles.as_deref()?)?))
    }

    /// The shape of a parameter.
    ///
    /// # Errors
    /// When the model has no such parameter.
    pub(crate) fn shape(&self, name: &str) -> Result<&Shape> {
        Ok(&self.param(name)?.spec.shape)
    }

    /// Brings what decode steps read into this process's memory, in the order in which they do, until it is told to stop:
    /// for a thread that waits for something else. Nothing is changed; what comes later is found sooner.
    pub fn read_ahead(&self, stop: &AtomicBool) {
        let mut names: Vec<String> = called_matrices(self.arch()).into_iter().map(|p| p.name).collect();
        // The token table is the head, which comes last.
        names.sort_by_key(|name| name == EMBED_TOKENS);
        for name in names {
            let Some(view) = self.tiles(&name).map(|(_, view)| view).or_else(|| self.mapped(&name)) else { continue };
            let len = view.bytes.as_slice().len();
            for start in (0..len).step_by(PIECE) {
                if stop.load(Ordering::Relaxed) {
                    return;
                }
                if let Some(piece) = view.bytes.slice(start..len.min(start + PIECE)) {
                    piece.populate();
                }
            }
        }
    }

    /// Reads a parameter: row-major, in the shape of the parameter table. Every checksum on the way is verified.
    ///
    /// # Errors
    /// When the model has no such parameter or stores it quantised, the checkpoint is damaged, or memory is short.
    pub fn read(&self, name: &str) -> Result<HostArray> {
        let param = self.param(name)?;
        if let Some(view) = self.mapped(name) {
            return Ok(HostArray::from_bytes(view.dtype, view.shape.clone(), view.bytes.as_slice())?);
        }
        let mut out = HostArray::zeros(param.hf_dtype, param.spec.shape.clone())?;
        let mut rest = out.bytes_mut();
        self.read_pieces(name, (PIECE, 1), &mut |reader, region| {
            // Boxes come in order and are dense, so each is the next part of the array.
            let bytes = region.elements() * param.hf_dtype.size();
            let (piece, after) = std::mem::take(&mut rest)
                .split_at_mut_checked(bytes)
                .ok_or_else(|| EngineError::Input(format!("{name}: its pieces exceed its shape")))?;
            rest = after;
            Ok(reader.read_into(region, piece)?)
        })?;
        Ok(out)
    }

    /// Calls `f` with every consecutive box of a parameter and what reads it. Boxes have about so many bytes and, but for the
    /// last, a multiple of so many rows.
    pub(crate) fn read_pieces(
        &self,
        name: &str,
        (bytes, rows): (usize, usize),
        f: &mut dyn FnMut(&mut ItemReader<'_>, &checkpoint::orbax::Region) -> Result<()>,
    ) -> Result<()> {
        let param = self.param(name)?;
        if let Some(stored) = self.weights.stored.filter(|_| param.dtype != param.hf_dtype) {
            return Err(EngineError::Input(format!(
                "{name} of {} is stored in {} and can only be multiplied with, over a cache on a CPU; use the model as it was \
                 before it was quantized",
                self.path().display(),
                stored.format.name()
            )));
        }
        let item: Item = self.weights.hf_item(param);
        let stores = [self.weights.checkpoint.store()];
        let mut reader = ItemReader::new(&stores, &item)?;
        let grain = reader.grain().saturating_mul(rows);
        for region in reader.boxes(bytes, grain) {
            f(&mut reader, &region)?;
        }
        reader.done();
        Ok(())
    }
}

/// How names in Hugging Face directories relate to the parameter table.
#[must_use]
pub fn name_rules(arch: &Arch) -> NameRules {
    NameRules {
        prefixes: PREFIXES.iter().map(|&p| p.to_owned()).collect(),
        unused: expected_unused(arch)
            .into_iter()
            .map(|(label, patterns)| UnusedRule { label: label.to_owned(), patterns })
            .collect(),
    }
}
