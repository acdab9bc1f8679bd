//! What becomes what: items for the copy engine, and the files beside them.

use std::path::{Path, PathBuf};

use checkpoint::copy::{
    CopyOptions, HfReport, HfTarget, Item, OnProgress, Op, OrbaxReport, OrbaxTarget, copy_to_hf, copy_to_orbax,
};
use checkpoint::hf::{CONFIG_FILE, GENERATION_CONFIG_FILE};
use checkpoint::orbax::{Layout, OrbaxOptions, Target};
use checkpoint::write::PlanOptions;
use gemma4::hf::{CAUSAL_PREFIX, CONDITIONAL_PREFIX};
use half::bf16;
use serde::Serialize;
use serde_json::{Map, Value, json};
use tensor::{DType, Transform};

use super::config::{Wanted, output_config, sidecars};
use super::open::{Checkpoint, Convention, PROVENANCE, Weights};
use crate::{EngineError, Result};

/// What a Hugging Face directory holds beside the text model's parameters, and under which names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Profile {
    /// The text model alone, in the class of its configuration.
    #[default]
    Lean,
    /// The text model alone, as `Gemma4ForCausalLM`.
    Causal,
    /// Everything that the base directory holds (towers, redundant keys and values), with the text model replaced.
    Official,
}

/// How to convert.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The convention, and with it the format, to be written.
    pub to: Convention,
    /// Element type of all parameters; as they are if absent.
    pub dtype: Option<DType>,
    /// Element type of the scaled token table (MaxText); one that loses nothing if absent.
    pub embedding_dtype: Option<DType>,
    /// What else to write (Hugging Face).
    pub profile: Profile,
    /// Largest weights file in bytes (Hugging Face).
    pub max_shard_bytes: Option<u64>,
    /// How arrays are stored (MaxText).
    pub orbax: OrbaxOptions,
    /// Refer to the source's files instead of copying what needs no arithmetic (Hugging Face to MaxText).
    pub link: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            to: Convention::Maxtext,
            dtype: None,
            embedding_dtype: None,
            profile: Profile::Lean,
            max_shard_bytes: None,
            orbax: OrbaxOptions::default(),
            link: false,
        }
    }
}

#[derive(Debug)]
enum Sink {
    Hf(HfTarget),
    Orbax(OrbaxTarget),
}

/// A conversion that can be run. Nothing was read or written yet.
#[derive(Debug)]
pub struct Plan<'a> {
    source: &'a Weights,
    base: Option<&'a Weights>,
    items: Vec<Item>,
    sink: Sink,
    /// What should be known before it runs, in sentences.
    pub notes: Vec<String>,
}

/// What a conversion amounts to.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// The directory to give to whatever loads the result.
    pub path: PathBuf,
    /// Number of tensors or arrays.
    pub tensors: usize,
    /// Bytes of their elements.
    pub bytes: u64,
    /// Bytes that an interrupted run had written already.
    pub resumed_bytes: u64,
    /// Weights files and what lies beside them, with digests (Hugging Face).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hf: Option<HfReport>,
    /// Arrays and chunks (MaxText).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub orbax: Option<OrbaxReport>,
}

/// Plans a conversion. `base` is a Hugging Face directory of the same architecture from which a tokenizer and, with
/// [`Profile::Official`], all other tensors are taken.
///
/// # Errors
/// When the base does not fit, or the settings contradict each other.
pub fn plan<'a>(
    source: &'a Weights,
    base: Option<&'a Weights>,
    target: &Path,
    settings: &Settings,
) -> Result<Plan<'a>> {
    if let Some(base) = base {
        check_base(source, base)?;
    }
    if settings.dtype.is_some_and(|d| !d.is_float()) {
        return Err(EngineError::Input("parameters can only be written as floats".into()));
    }
    if settings.link {
        let why = if settings.to != Convention::Maxtext || source.checkpoint.convention() != Convention::Hf {
            Some("only the way from Hugging Face to MaxText can link files")
        } else if settings.orbax.layout == Layout::Files {
            Some("the layout of plain files cannot refer to parts of other files")
        } else {
            None
        };
        if let Some(why) = why {
            return Err(EngineError::Input(why.into()));
        }
    }
    match settings.to {
        Convention::Maxtext => Ok(to_maxtext(source, target, settings)),
        Convention::Hf => to_hf(source, base, target, settings),
    }
}

impl Plan<'_> {
    /// Number of tensors or arrays to be written.
    #[must_use]
    pub fn tensors(&self) -> usize {
        self.items.len()
    }

    /// Bytes of their elements.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.items.iter().map(|i| (i.shape.elements() as u64).saturating_mul(i.dtype.size() as u64)).sum()
    }

    /// Runs it. The target is complete afterwards, or as it was before.
    ///
    /// # Errors
    /// When sources are damaged, the target exists, space is short, or the file system refuses.
    pub fn run(&self, options: &CopyOptions, progress: OnProgress<'_>) -> Result<Report> {
        let stores: Vec<_> =
            [Some(self.source), self.base].into_iter().flatten().map(|w| w.checkpoint.store()).collect();
        let (tensors, bytes) = (self.tensors(), self.bytes());
        match &self.sink {
            Sink::Hf(target) => {
                let done = copy_to_hf(&stores, &self.items, target, options, progress)?;
                let (path, resumed_bytes) = (target.path.clone(), done.resumed_bytes);
                Ok(Report { path, tensors, bytes, resumed_bytes, hf: Some(done), orbax: None })
            }
            Sink::Orbax(target) => {
                let done = copy_to_orbax(&stores, &self.items, target, options, progress)?;
                let (path, resumed_bytes) = (done.written.items.clone(), done.resumed_bytes);
                Ok(Report { path, tensors, bytes, resumed_bytes, hf: None, orbax: Some(done) })
            }
        }
    }
}

fn check_base(source: &Weights, base: &Weights) -> Result<()> {
    let path = base.checkpoint.path().to_owned();
    let no = |reason: String| Err(EngineError::File { path: path.clone(), reason });
    if matches!(base.checkpoint, Checkpoint::Orbax(_)) {
        return no("the base must be a Hugging Face directory".into());
    }
    let differs = source.params.iter().zip(&base.params).find(|(a, b)| a.spec != b.spec);
    if let Some((a, b)) = differs {
        return no(format!(
            "the base is of another architecture: {} {} here, {} {} there",
            a.spec.name, a.spec.shape, b.spec.name, b.spec.shape
        ));
    }
    if source.params.len() != base.params.len() {
        return no(format!("the base has {} parameters, the source {}", base.params.len(), source.params.len()));
    }
    Ok(())
}

/// The step directory that a path names, or one of step 0 below it.
fn orbax_place(target: &Path) -> Target {
    let number = |p: &Path| p.file_name()?.to_str()?.parse::<u64>().ok();
    let step = target.parent().filter(|_| target.file_name().is_some_and(|n| n == "items"));
    match step.and_then(|s| Some((number(s)?, s.parent()?))) {
        Some((step, base)) => Target::Step { base: base.to_owned(), step },
        None => Target::Step { base: target.to_owned(), step: 0 },
    }
}

fn to_maxtext<'a>(source: &'a Weights, target: &Path, settings: &Settings) -> Plan<'a> {
    let mut notes = Vec::new();
    let mut table_dtype = source.main_dtype();
    let items = source
        .params
        .iter()
        .map(|p| {
            let op = source.op(&p.spec, Convention::Maxtext);
            let hf_dtype = settings.dtype.unwrap_or(p.hf_dtype);
            let dtype = match p.spec.transform {
                Transform::Scale(scale) => {
                    table_dtype = hf_dtype;
                    // Of a MaxText source the table is taken as it is.
                    let kept = if op == Op::Copy { p.dtype } else { table_type(scale, hf_dtype) };
                    let dtype = settings.embedding_dtype.unwrap_or(kept);
                    notes.extend(loss(scale, p.hf_dtype, hf_dtype, dtype));
                    dtype
                }
                _ => settings.dtype.unwrap_or(p.dtype),
            };
            Item {
                store: 0,
                from: p.from.clone(),
                to: format!("params.params.{}", p.spec.maxtext_name),
                shape: p.spec.maxtext_shape.clone(),
                dtype,
                op,
            }
        })
        .collect();
    let unused = source.report.iter().flat_map(|r| &r.unused_expected).map(|(_, n)| n.tensors).sum::<usize>();
    if unused > 0 {
        notes.push(format!(
            "{unused} tensors have no place in MaxText's text model and stay behind; the way back takes them from --base"
        ));
    }
    let mut noted = Map::new();
    noted.insert("version".into(), json!(env!("CARGO_PKG_VERSION")));
    noted.insert("config".into(), source.config.clone());
    noted.insert("generation_config".into(), json!(source.generation_config));
    noted.insert("token_table_dtype".into(), json!(table_dtype.name()));
    let mut options = settings.orbax.clone();
    options.custom_metadata.insert("scan_layers".into(), Value::Bool(false));
    options.custom_metadata.insert(PROVENANCE.into(), Value::Object(noted));
    let sink = Sink::Orbax(OrbaxTarget {
        target: orbax_place(target),
        options,
        scalars: vec![("step".to_owned(), 0)],
        empty: vec![("opt_state".to_owned(), "Dict")],
        link: settings.link,
    });
    Plan { source, base: None, items, sink, notes }
}

/// The type of a scaled table that gives back every bit. Products of f32 need f64, unless the factor is a power of two.
fn table_type(scale: f32, dtype: DType) -> DType {
    let exact = scale.to_bits() & 0x007f_ffff == 0;
    if dtype == DType::F32 && exact { DType::F32 } else { Op::Multiply(scale).lossless_dtype(dtype) }
}

/// What a person should know of the token table's type.
fn loss(scale: f32, source: DType, hf: DType, stored: DType) -> Option<String> {
    if source != hf {
        // Everything is rounded anyway.
        return None;
    }
    if stored.size() >= table_type(scale, hf).size() {
        return (stored == DType::F64).then(|| {
            "the scaled token table is written in float64, so that the way back gives every bit of a float32 table; \
             --embedding-dtype float32 writes MaxText's own type"
                .to_owned()
        });
    }
    if (hf, stored) == (DType::BF16, DType::BF16) {
        let lost = lost_significands(scale);
        return (lost > 0).then(|| {
            format!(
                "the scaled token table is written in bfloat16: values with {lost} of the 128 significands come back \
                 one unit off; float32 loses nothing"
            )
        });
    }
    Some(format!("the scaled token table is rounded to {stored}: not every value of the {hf} table comes back"))
}

/// How many of the 128 bf16 significands do not survive a product in bf16 and the way back.
fn lost_significands(scale: f32) -> usize {
    let survives = |m: u16| {
        let x = bf16::from_bits(0x3f80 | m);
        bf16::from_f32(bf16::from_f32(x.to_f32() * scale).to_f32() / scale) == x
    };
    (0..128).filter(|&m| !survives(m)).count()
}

fn to_hf<'a>(source: &'a Weights, base: Option<&'a Weights>, target: &Path, settings: &Settings) -> Result<Plan<'a>> {
    // A directory is its own base.
    let base = base.or((source.report.is_some() && settings.profile == Profile::Official).then_some(source));
    let mut notes = Vec::new();
    let official = settings.profile == Profile::Official;
    let Some(carried) = base.or((!official).then_some(source)) else {
        return Err(EngineError::Input(
            "the official profile takes towers, redundant keys and values and other files from --base HF_DIR".into(),
        ));
    };
    let conditional = match settings.profile {
        Profile::Lean => source.conditional,
        Profile::Causal => false,
        Profile::Official => carried.conditional,
    };
    let prefix = if conditional { CONDITIONAL_PREFIX } else { CAUSAL_PREFIX };
    let mut items: Vec<Item> = source
        .params
        .iter()
        .enumerate()
        .map(|(i, p)| {
            let own = (official).then(|| carried.params.get(i).map(|b| b.from.clone())).flatten();
            let to = own.unwrap_or_else(|| format!("{prefix}{}", p.spec.name));
            Item { to, dtype: settings.dtype.unwrap_or(p.hf_dtype), ..source.hf_item(p) }
        })
        .collect();
    if official {
        items.extend(others(carried, &mut notes));
    }
    let dtype = settings.dtype.unwrap_or_else(|| source.main_dtype());
    let wanted = Wanted { conditional, towers: official, dtype };
    let original = if official { &carried.config } else { &source.config };
    let config = output_config(original, &source.arch, wanted);
    let directories: Vec<PathBuf> =
        [base, Some(source)].into_iter().flatten().flat_map(|w| w.checkpoint.directories()).collect();
    let mut extra_files = vec![(CONFIG_FILE.to_owned(), text(&config))];
    extra_files.extend(sidecars(&directories, official)?);
    if !extra_files.iter().any(|(name, _)| name == GENERATION_CONFIG_FILE)
        && let Some(noted) = source.generation_config.as_ref().filter(|v| v.is_object())
    {
        extra_files.push((GENERATION_CONFIG_FILE.to_owned(), text(noted)));
    }
    if !extra_files.iter().any(|(name, _)| name.starts_with("tokenizer")) {
        notes.push("no tokenizer lies beside the source; --base HF_DIR carries one over".to_owned());
    }
    let sink = Sink::Hf(HfTarget {
        path: target.to_owned(),
        plan: PlanOptions { max_shard_bytes: settings.max_shard_bytes, ..PlanOptions::default() },
        extra_files,
        no_manifest: false,
    });
    // Items of the base are those of store 1.
    Ok(Plan { source, base, items, sink, notes })
}

/// Every tensor of the base that is no parameter of the text model, unchanged.
fn others(base: &Weights, notes: &mut Vec<String>) -> Vec<Item> {
    let Checkpoint::Hf(dir) = &base.checkpoint else { return Vec::new() };
    let used: std::collections::HashSet<&str> = base.params.iter().map(|p| p.from.as_str()).collect();
    let mut items = Vec::new();
    for e in dir.entries().filter(|e| !used.contains(e.name.as_str())) {
        if e.name == "lm_head.weight" || e.name.ends_with(".lm_head.weight") {
            // It would be a stale copy of another token table.
            notes.push(format!("{} of the base is left out: the head is tied to the token table", e.name));
            continue;
        }
        items.push(Item {
            store: 1,
            from: e.name.clone(),
            to: e.name.clone(),
            shape: e.shape.clone(),
            dtype: e.dtype,
            op: Op::Copy,
        });
    }
    let kept = items.len();
    if kept > 0 {
        notes.push(format!("{kept} other tensors are carried over from {}", dir.path().display()));
    }
    items
}

pub(super) fn text(v: &Value) -> Vec<u8> {
    format!("{v:#}\n").into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_gets_a_type_that_loses_nothing() {
        for (width, hf, want) in [
            (1536, DType::BF16, DType::F32),
            (256, DType::BF16, DType::F32),
            (1536, DType::F32, DType::F64),
            (256, DType::F32, DType::F32),
            (1536, DType::F16, DType::F32),
        ] {
            assert_eq!(table_type((width as f32).sqrt(), hf), want, "{width} {hf}");
        }
    }

    #[test]
    fn lost_significands_are_those_of_the_official_widths() {
        // Weighted by how often significands occur these are 11.2 and 14.0 % of normal values.
        assert_eq!([1536f32, 2560.0, 256.0].map(|d| lost_significands(d.sqrt())), [18, 20, 0]);
    }

    #[test]
    fn losses_are_told() {
        let s = 1536f32.sqrt();
        assert!(loss(s, DType::BF16, DType::BF16, DType::F32).is_none());
        assert!(loss(s, DType::BF16, DType::BF16, DType::BF16).unwrap().contains("18 of the 128"));
        assert!(loss(16.0, DType::BF16, DType::BF16, DType::BF16).is_none());
        assert!(loss(s, DType::F32, DType::F32, DType::F64).unwrap().contains("float64"));
        assert!(loss(s, DType::F32, DType::F32, DType::F32).unwrap().contains("not every value"));
    }

    #[test]
    fn a_path_may_name_the_step() {
        let step = |base: &str, step| Target::Step { base: base.into(), step };
        assert_eq!(orbax_place(Path::new("/a/b")), step("/a/b", 0));
        assert_eq!(orbax_place(Path::new("/a/b/7/items")), step("/a/b", 7));
        assert_eq!(orbax_place(Path::new("/a/items")), step("/a/items", 0));
    }
}
