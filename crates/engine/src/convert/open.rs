//! A checkpoint of either format, with the parameters of the model found in it.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};

use checkpoint::binding::{BindReport, Expected, bind, listed};
use checkpoint::copy::{Item, Op, Store};
use checkpoint::hf::{HfDirectory, HfError, INDEX_FILE, SINGLE_FILE};
use checkpoint::orbax::{OrbaxCheckpoint, is_orbax};
use gemma4::hf::{HfModel, config_json};
use gemma4::{Arch, param_table};
use serde::Serialize;
use serde_json::{Map, Value};
use tensor::{DType, ParamSpec, Shape, Transform};

use crate::model::name_rules;
use crate::quantized::{Parts, Stored, without_note};
use crate::{EngineError, Result};

/// The entry of `custom_metadata` in which a conversion says where it comes from.
pub(super) const PROVENANCE: &str = "lapidary";

/// How names, shapes and the token table are held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Convention {
    /// Hugging Face: matrices `[out, in]`, token table unscaled.
    Hf,
    /// MaxText: kernels `[in, ...]`, token table times the square root of its width.
    Maxtext,
}

/// A checkpoint of which only the format is known.
#[derive(Debug)]
pub enum Checkpoint {
    /// A Hugging Face directory.
    Hf(Box<HfDirectory>),
    /// An Orbax checkpoint.
    Orbax(Box<OrbaxCheckpoint>),
}

impl Checkpoint {
    /// Opens whatever lies at a path: a Hugging Face directory (or a single `.safetensors` file), an Orbax item
    /// directory, a step, or a run with steps.
    ///
    /// # Errors
    /// When there is neither, or it is unfinished or damaged.
    pub fn open(path: &Path) -> Result<Self> {
        let weights = [SINGLE_FILE, INDEX_FILE].iter().any(|f| path.join(f).exists());
        if !weights && path.is_dir() && is_orbax(path) {
            return Ok(Checkpoint::Orbax(Box::new(OrbaxCheckpoint::open(path)?)));
        }
        match HfDirectory::open(path) {
            Ok(dir) => Ok(Checkpoint::Hf(Box::new(dir))),
            Err(HfError::NoWeights { path, found }) => Err(EngineError::File {
                path,
                reason: format!(
                    "no checkpoint: neither {SINGLE_FILE} nor {INDEX_FILE} nor an Orbax checkpoint (items, a step or a run){found}"
                ),
            }),
            Err(e) => Err(e.into()),
        }
    }

    /// As the copy engine takes it.
    #[must_use]
    pub fn store(&self) -> Store<'_> {
        match self {
            Checkpoint::Hf(dir) => Store::Hf(dir),
            Checkpoint::Orbax(checkpoint) => Store::Orbax(checkpoint),
        }
    }

    /// Where the weights lie.
    #[must_use]
    pub fn path(&self) -> &Path {
        match self {
            Checkpoint::Hf(dir) => dir.path(),
            Checkpoint::Orbax(checkpoint) => checkpoint.path(),
        }
    }

    /// The convention that goes with the format.
    #[must_use]
    pub fn convention(&self) -> Convention {
        match self {
            Checkpoint::Hf(_) => Convention::Hf,
            Checkpoint::Orbax(_) => Convention::Maxtext,
        }
    }

    /// Name, element type and shape of everything stored, ordered by name.
    #[must_use]
    pub fn entries(&self) -> Vec<(String, DType, Shape)> {
        match self {
            Checkpoint::Hf(dir) => dir.entries().map(|e| (e.name.clone(), e.dtype, e.shape.clone())).collect(),
            Checkpoint::Orbax(checkpoint) => {
                checkpoint.arrays().iter().map(|a| (a.name.clone(), a.dtype, a.shape.clone())).collect()
            }
        }
    }

    /// What the conversion that wrote it left in its metadata.
    fn provenance(&self) -> Option<&Map<String, Value>> {
        match self {
            Checkpoint::Hf(_) => None,
            Checkpoint::Orbax(c) => c.custom_metadata().get(PROVENANCE)?.as_object(),
        }
    }

    /// Directories in which a tokenizer and the like may lie, nearest first.
    pub(super) fn directories(&self) -> Vec<PathBuf> {
        match self {
            Checkpoint::Hf(dir) => vec![dir.path().to_owned()],
            Checkpoint::Orbax(c) => {
                let step = c.step_dir().cloned();
                let run = step.as_deref().and_then(Path::parent).map(Path::to_owned);
                [Some(c.path().to_owned()), step, run].into_iter().flatten().collect()
            }
        }
    }
}

/// Where the architecture of a checkpoint that does not tell may come from.
#[derive(Debug, Default)]
pub struct Hints<'a> {
    /// A `config.json`. It is believed more than the checkpoint's own.
    pub config: Option<&'a Path>,
    /// An architecture from configuration keys, believed likewise.
    pub arch: Option<Arch>,
    /// A Hugging Face directory of the same architecture, asked last.
    pub base: Option<&'a Weights>,
    /// Weights that are stored quantised are of use. Otherwise they are refused.
    pub quantized: bool,
}

/// Where the architecture came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// The checkpoint's own `config.json`.
    Config,
    /// What an earlier conversion noted in the checkpoint.
    Provenance,
    /// The hints given.
    Given,
}

/// One parameter of the model as a checkpoint holds it.
#[derive(Debug, Clone)]
pub struct Param {
    /// What it is.
    pub spec: ParamSpec,
    /// Its name in the store.
    pub from: String,
    /// Its element type there.
    pub dtype: DType,
    /// The element type it has, or should have, in Hugging Face's convention. That it had, where it is stored in tiles alone.
    pub hf_dtype: DType,
    /// Name of the tensor with its tiles, if it is stored quantised.
    pub tiles: Option<String>,
    /// Bytes as it is stored, uncompressed.
    pub bytes: u64,
}

/// A Gemma 4 checkpoint of either format: every parameter found, nothing read yet.
#[derive(Debug)]
pub struct Weights {
    /// The files.
    pub checkpoint: Checkpoint,
    /// The architecture.
    pub arch: Arch,
    /// A `config.json` of it: the original one where there is one.
    pub config: Value,
    /// Whether that is of the conditional (multimodal) class.
    pub conditional: bool,
    /// Where it came from.
    pub origin: Origin,
    /// `generation_config.json`, if it is known.
    pub generation_config: Option<Value>,
    /// Every parameter, in the order of the table.
    pub params: Vec<Param>,
    /// How matrices are stored, where that is quantised.
    pub stored: Option<Stored>,
    /// The account of a Hugging Face directory.
    pub report: Option<BindReport>,
    /// What was odd but survivable, in sentences.
    pub notes: Vec<String>,
}

struct Described {
    hf: HfModel,
    config: Value,
    origin: Origin,
}

impl Weights {
    /// Opens a checkpoint as a model.
    ///
    /// # Errors
    /// As [`Checkpoint::open`] and [`Weights::find`].
    pub fn open(path: &Path, hints: &Hints<'_>) -> Result<Self> {
        Self::find(Checkpoint::open(path)?, hints)
    }

    /// Finds the model in a checkpoint.
    ///
    /// # Errors
    /// [`EngineError::NoArchitecture`] when neither the checkpoint nor the hints tell the architecture; others when a
    /// parameter is missing or misshapen (the first are named), or the configuration is not one of Gemma 4.
    pub fn find(checkpoint: Checkpoint, hints: &Hints<'_>) -> Result<Self> {
        let stored = match &checkpoint {
            Checkpoint::Hf(dir) => stored_in(dir)?,
            Checkpoint::Orbax(_) => None,
        };
        if let Some(stored) = stored.filter(|_| !hints.quantized) {
            let path = checkpoint.path().to_owned();
            return Err(EngineError::Quantized { path, format: stored.format.name() });
        }
        let Described { hf, config, origin } = describe(&checkpoint, hints)?;
        let HfModel { arch, mut notes, conditional } = hf;
        let table = param_table(&arch);
        let (params, report) = match &checkpoint {
            Checkpoint::Hf(dir) => {
                let (params, report) = bind_hf(dir, &arch, table, stored)?;
                (params, Some(report))
            }
            Checkpoint::Orbax(c) => (bind_orbax(c, table, checkpoint.provenance(), &mut notes)?, None),
        };
        let generation_config = match &checkpoint {
            Checkpoint::Hf(dir) => dir.generation_config().cloned(),
            Checkpoint::Orbax(_) => checkpoint.provenance().and_then(|p| p.get("generation_config")).cloned(),
        };
        Ok(Weights { arch, config, conditional, origin, generation_config, params, stored, report, notes, checkpoint })
    }

    /// What turns a parameter into the convention wanted.
    #[must_use]
    pub fn op(&self, spec: &ParamSpec, wanted: Convention) -> Op {
        match (self.checkpoint.convention(), wanted) {
            (Convention::Hf, Convention::Maxtext) => Op::forward(spec.transform),
            (Convention::Maxtext, Convention::Hf) => Op::backward(spec.transform),
            _ => Op::Copy,
        }
    }

    /// A parameter as Hugging Face has it, for reading.
    #[must_use]
    pub fn hf_item(&self, param: &Param) -> Item {
        Item {
            store: 0,
            from: param.from.clone(),
            to: param.spec.name.clone(),
            shape: param.spec.shape.clone(),
            dtype: param.hf_dtype,
            op: self.op(&param.spec, Convention::Hf),
        }
    }

    /// The element type that most bytes of the model have in Hugging Face's convention.
    #[must_use]
    pub fn main_dtype(&self) -> DType {
        dominant(self.params.iter().map(|p| (p.hf_dtype, p.spec.shape.elements())))
    }

    /// Bytes of all parameters as they are stored, uncompressed.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.params.iter().map(|p| p.bytes).fold(0, u64::saturating_add)
    }

    /// The checkpoint's entries that belong to no parameter: names as stored.
    #[must_use]
    pub fn leftover(&self) -> Vec<String> {
        let tiles = self.params.iter().filter_map(|p| p.tiles.as_deref());
        let used: HashSet<&str> = self.params.iter().map(|p| p.from.as_str()).chain(tiles).collect();
        let names = self.checkpoint.entries().into_iter().map(|(name, ..)| name);
        names.filter(|n| !used.contains(n.as_str())).collect()
    }
}

/// The type with the most elements; the first in the order of types if two are equal. bf16 if there are none.
fn dominant(counts: impl Iterator<Item = (DType, usize)>) -> DType {
    let mut sums: BTreeMap<DType, usize> = BTreeMap::new();
    for (dtype, n) in counts {
        *sums.entry(dtype).or_default() += n;
    }
    sums.into_iter().max_by_key(|&(_, n)| n).map_or(DType::BF16, |(d, _)| d)
}

fn describe(checkpoint: &Checkpoint, hints: &Hints<'_>) -> Result<Described> {
    let read = |path: &Path, config: &Value, origin| {
        let hf = HfModel::from_config(config).map_err(|source| EngineError::Arch { path: path.to_owned(), source })?;
        Ok(Described { hf, config: config.clone(), origin })
    };
    if let Some(path) = hints.config {
        let text = fs_err::read_to_string(path)?;
        let config: Value = serde_json::from_str(&text)
            .map_err(|e| EngineError::File { path: path.to_owned(), reason: e.to_string() })?;
        return read(path, &config, Origin::Given);
    }
    if let Some(arch) = &hints.arch {
        let config = config_json(arch, true, DType::BF16.name());
        return read(checkpoint.path(), &config, Origin::Given);
    }
    match checkpoint {
        Checkpoint::Hf(dir) => {
            let path = dir.path().join("config.json");
            let config = dir.config().ok_or_else(|| EngineError::File {
                path: path.clone(),
                reason: "not found; a model directory needs its config.json".into(),
            })?;
            read(&path, &without_note(config), Origin::Config)
        }
        Checkpoint::Orbax(c) => {
            let noted = checkpoint.provenance().and_then(|p| p.get("config"));
            match (noted, hints.base) {
                (Some(config), _) => read(c.path(), config, Origin::Provenance),
                (None, Some(base)) => read(base.checkpoint.path(), &base.config, Origin::Given),
                (None, None) => Err(EngineError::NoArchitecture { path: c.path().to_owned() }),
            }
        }
    }
}

/// What a directory says of quantised weights.
fn stored_in(dir: &HfDirectory) -> Result<Option<Stored>> {
    let stored = dir.config().map_or(Ok(None), Stored::of);
    stored.map_err(|reason| EngineError::File { path: dir.path().join("config.json"), reason })
}

/// Finds every parameter among tensors that carry Hugging Face's names.
fn bind_hf(
    dir: &HfDirectory,
    arch: &Arch,
    table: Vec<ParamSpec>,
    stored: Option<Stored>,
) -> Result<(Vec<Param>, BindReport)> {
    let whole = |p: &ParamSpec| Parts { plain: Some((p.name.clone(), p.shape.clone())), tiles: None };
    let parts = match stored {
        Some(stored) => stored.parts(arch),
        None => table.iter().map(whole).collect(),
    };
    let expect = |part: &Option<(String, Shape)>, dtype: Option<DType>| {
        part.as_ref().map(|(name, shape)| Expected { name: name.clone(), shape: shape.clone(), dtype })
    };
    let expected: Vec<Expected> =
        parts.iter().flat_map(|p| [expect(&p.plain, None), expect(&p.tiles, Some(DType::U8))]).flatten().collect();
    let binding = bind(dir, &expected, &name_rules(arch))?;
    let find = |(spec, parts): (ParamSpec, Parts)| {
        let tensor = |part: Option<(String, Shape)>| binding.get(&part?.0);
        let (plain, tiles) = (tensor(parts.plain), tensor(parts.tiles));
        let found = plain.or(tiles)?;
        let bytes = [plain, tiles].into_iter().flatten().map(|t| t.bytes.len() as u64).sum();
        Some(Param {
            from: found.name.clone(),
            dtype: found.dtype,
            hf_dtype: plain.map(|t| t.dtype).or(stored.map(|s| s.dtype)).unwrap_or(found.dtype),
            tiles: tiles.map(|t| t.name.clone()),
            bytes,
            spec,
        })
    };
    Ok((table.into_iter().zip(parts).filter_map(find).collect(), binding.report))
}

/// Finds every parameter among arrays that carry MaxText's names.
fn bind_orbax(
    checkpoint: &OrbaxCheckpoint,
    table: Vec<ParamSpec>,
    provenance: Option<&Map<String, Value>>,
    notes: &mut Vec<String>,
) -> Result<Vec<Param>> {
    let (mut missing, mut misfits) = (Vec::new(), Vec::new());
    let mut params: Vec<Param> = Vec::with_capacity(table.len());
    for spec in table {
        let Some(info) = checkpoint.parameter(&spec.maxtext_name) else {
            missing.push(spec.maxtext_name);
            continue;
        };
        if info.shape != spec.maxtext_shape {
            misfits.push(format!("{} has shape {}, expected {}", info.name, info.shape, spec.maxtext_shape));
        } else if !info.dtype.is_float() {
            misfits.push(format!("{} is {}, expected floats", info.name, info.dtype));
        }
        let bytes = (info.shape.elements() as u64).saturating_mul(info.dtype.size() as u64);
        let (from, dtype) = (info.name.clone(), info.dtype);
        params.push(Param { from, dtype, hf_dtype: dtype, tiles: None, bytes, spec });
    }
    if !missing.is_empty() || !misfits.is_empty() {
        return Err(EngineError::File {
            path: checkpoint.path().to_owned(),
            reason: unfit(checkpoint, &missing, &misfits),
        });
    }
    let used: HashSet<&str> = params.iter().map(|p| p.from.as_str()).collect();
    let extra = checkpoint.arrays().iter().filter(|a| a.param_name.is_some() && !used.contains(a.name.as_str()));
    notes.extend(extra.map(|a| format!("{} is no parameter of this architecture and is not used", a.name)));
    // A scaled table may be stored more precisely than the weights are; it belongs to them all the same.
    let scaled = |p: &Param| matches!(p.spec.transform, Transform::Scale(_));
    let others = dominant(params.iter().filter(|p| !scaled(p)).map(|p| (p.dtype, p.spec.shape.elements())));
    let noted = provenance.and_then(|p| p.get("token_table_dtype")?.as_str()?.parse::<DType>().ok());
    for p in params.iter_mut().filter(|p| scaled(p)) {
        p.hf_dtype = noted.filter(|d| d.is_float()).unwrap_or(others);
    }
    Ok(params)
}

fn unfit(checkpoint: &OrbaxCheckpoint, missing: &[String], misfits: &[String]) -> String {
    let mut text = "does not fit the model".to_owned();
    if !missing.is_empty() {
        text += &format!("; missing ({}): {}", missing.len(), listed(missing.iter()));
    }
    if !misfits.is_empty() {
        text += &format!("; unusable ({}): {}", misfits.len(), listed(misfits.iter()));
    }
    if checkpoint.custom_metadata().get("scan_layers") == Some(&Value::Bool(true)) {
        text += "; it was written with scan_layers=true, whose stacked layers are not read";
    }
    if let Some(a) = checkpoint.arrays().iter().find(|a| a.param_name.is_some()) {
        text += &format!("; it holds, for example, {} {}", a.name, a.shape);
    }
    text
}
