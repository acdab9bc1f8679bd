//! Golden files: token ids and the logits a reference implementation gave for them.
//!
//! * `.safetensors`: `input_ids` `[B, S]`, and `logits` `[B, S, V]` or `logits_last` (`[V]` or `[B, V]`, of the last
//!   position); optionally `attention_mask` `[B, S]`, and intermediate values (`hidden.N`, `ple`, `trace.N.part`, or of the
//!   last position only `hidden_last` `[L, D]`, `ple_last`, `embed_last`, `final_last`).
//! * `.jsonl`: one object a line with `tokens` (ids) and `logits` (`[S][V]`), optionally `prompt`; MaxText's format.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use checkpoint::safetensors::{SafetensorsFile, TensorView};
use serde::Deserialize;
use tensor::{DType, HostArray};

use crate::{EngineError, Result};

/// Longest line of a JSONL file: 4096 tokens of 262144 logits of 12 characters would be 12 GB; refuse far below.
const MAX_LINE: u64 = 4 << 30;

/// What a reference gave for some sequences.
#[derive(Debug)]
pub struct Golden {
    path: PathBuf,
    /// The sequences, in file order.
    pub sequences: Vec<GoldenSequence>,
    /// Vocabulary of the logits.
    pub vocab_size: usize,
    /// Intermediate values to compare, if the file has any.
    pub trace: Vec<GoldenTrace>,
}

/// One sequence.
#[derive(Debug)]
pub struct GoldenSequence {
    /// What people call it.
    pub label: String,
    /// Token ids, padding included.
    pub ids: Vec<i32>,
    /// Which positions are real.
    pub mask: Option<Vec<bool>>,
    /// Positions with reference logits.
    pub positions: Vec<usize>,
    logits: Logits,
}

#[derive(Debug)]
enum Logits {
    /// Row `first + i` of the mapped tensor belongs to position `i` of [`GoldenSequence::positions`].
    Mapped { view: Arc<TensorView>, rows: Vec<usize> },
    /// Flattened rows.
    Owned(Vec<f32>),
}

/// A reference's intermediate value.
#[derive(Debug)]
pub struct GoldenTrace {
    /// Its name in a forward program's trace.
    pub name: String,
    /// `[B, S, ...]`, or `[...]` of the last position of the only sequence.
    values: HostArray,
    /// Whether it holds the last position only.
    last_only: bool,
}

impl Golden {
    /// Opens a golden file.
    ///
    /// # Errors
    /// When it is damaged, lacks a tensor, or its shapes disagree; the message names file and tensor.
    pub fn open(path: &Path) -> Result<Self> {
        match path.extension().and_then(|e| e.to_str()) {
            Some("safetensors") => Self::open_safetensors(path),
            Some("jsonl") => Self::open_jsonl(path),
            _ => Err(EngineError::File {
                path: path.to_owned(),
                reason: "a golden file ends in .safetensors or .jsonl (pickle files are not read: they can run code)"
                    .into(),
            }),
        }
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether any sequence is padded.
    #[must_use]
    pub fn padded(&self) -> bool {
        self.sequences.iter().any(|s| s.mask.is_some())
    }

    fn open_safetensors(path: &Path) -> Result<Self> {
        let file = SafetensorsFile::open(path)?;
        let fail = |reason: String| EngineError::File { path: path.to_owned(), reason };
        let ids_view = file.tensor("input_ids").ok_or_else(|| fail("tensor `input_ids` is missing".into()))?;
        let [b, s] = *ids_view.shape.dims() else {
            return Err(fail(format!("`input_ids` has shape {}, expected [batch, sequence]", ids_view.shape)));
        };
        if b == 0 || s == 0 {
            return Err(fail("`input_ids` is empty".into()));
        }
        let ids = integers(&ids_view).map_err(&fail)?;
        let mask = match file.tensor("attention_mask") {
            None => None,
            Some(m) if m.shape == ids_view.shape => Some(integers(&m).map_err(&fail)?),
            Some(m) => {
                return Err(fail(format!("`attention_mask` has shape {}, expected {}", m.shape, ids_view.shape)));
            }
        };
        let (logits, last_only) = match (file.tensor("logits"), file.tensor("logits_last")) {
            (Some(l), _) => (l, false),
            (None, Some(l)) => (l, true),
            (None, None) => return Err(fail("neither `logits` nor `logits_last` is there".into())),
        };
        if !logits.dtype.is_float() {
            return Err(fail(format!("`{}` is {}, expected floats", logits.name, logits.dtype)));
        }
        let vocab_size = match (logits.shape.dims(), last_only) {
            (&[lb, ls, v], false) if (lb, ls) == (b, s) => v,
            (&[v], true) if b == 1 => v,
            (&[lb, v], true) if lb == b => v,
            _ => {
                return Err(fail(format!(
                    "`{}` has shape {}, which does not fit input_ids {}",
                    logits.name, logits.shape, ids_view.shape
                )));
            }
        };
        let logits = Arc::new(logits);
        let sequences = (0..b)
            .map(|i| {
                let mask: Option<Vec<bool>> =
                    mask.as_ref().map(|m| m[i * s..(i + 1) * s].iter().map(|&x| x != 0).collect());
                let real = |p: &usize| mask.as_ref().is_none_or(|m| m[*p]);
                let (positions, rows): (Vec<usize>, Vec<usize>) = match last_only {
                    true => (vec![s - 1], vec![i]),
                    false => (0..s).filter(real).map(|p| (p, i * s + p)).unzip(),
                };
                GoldenSequence {
                    label: format!("sequence {i}"),
                    ids: ids[i * s..(i + 1) * s].to_vec(),
                    // A mask of ones says nothing.
                    mask: mask.filter(|m| m.contains(&false)),
                    positions,
                    logits: Logits::Mapped { view: logits.clone(), rows },
                }
            })
            .collect();
        let trace = traces(&file, b, s)?;
        Ok(Golden { path: path.to_owned(), sequences, vocab_size, trace })
    }

    fn open_jsonl(path: &Path) -> Result<Self> {
        #[derive(Deserialize)]
        struct Record {
            #[serde(default)]
            prompt: Option<String>,
            tokens: Vec<i32>,
            logits: Vec<Vec<f32>>,
        }
        let mut reader = BufReader::new(fs_err::File::open(path)?);
        let mut sequences: Vec<GoldenSequence> = Vec::new();
        let mut vocab_size = None;
        let mut line = String::new();
        for number in 1.. {
            let fail = |reason: String| EngineError::File {
                path: path.to_owned(),
                reason: format!("line {number}: {reason}"),
            };
            line.clear();
            let read = std::io::Read::take(&mut reader, MAX_LINE).read_line(&mut line)?;
            if read == 0 {
                break;
            }
            if line.trim().is_empty() {
                continue;
            }
            let record: Record = serde_json::from_str(&line).map_err(|e| fail(e.to_string()))?;
            // Some writers wrap one sequence in a batch of one; MaxText's do not, so that is an error of shape here.
            if record.tokens.is_empty() || record.tokens.len() != record.logits.len() {
                return Err(fail(format!("{} tokens and {} rows of logits", record.tokens.len(), record.logits.len())));
            }
            let v = *vocab_size.get_or_insert(record.logits[0].len());
            if let Some(row) = record.logits.iter().position(|r| r.len() != v || r.is_empty()) {
                return Err(fail(format!("row {row} has {} logits, expected {v}", record.logits[row].len())));
            }
            sequences.push(GoldenSequence {
                label: record.prompt.unwrap_or_else(|| format!("line {number}")),
                positions: (0..record.tokens.len()).collect(),
                ids: record.tokens,
                mask: None,
                logits: Logits::Owned(record.logits.concat()),
            });
        }
        let vocab_size =
            vocab_size.ok_or_else(|| EngineError::File { path: path.to_owned(), reason: "holds no records".into() })?;
        Ok(Golden { path: path.to_owned(), sequences, vocab_size, trace: Vec::new() })
    }
}

impl GoldenSequence {
    /// The reference logits of `positions[index]`, widened to f32, into `row`.
    pub fn copy_row(&self, index: usize, row: &mut Vec<f32>, vocab_size: usize) {
        row.clear();
        match &self.logits {
            Logits::Owned(all) => row.extend_from_slice(&all[index * vocab_size..(index + 1) * vocab_size]),
            Logits::Mapped { view, rows } => {
                let width = vocab_size * view.dtype.size();
                let bytes = &view.bytes.as_slice()[rows[index] * width..][..width];
                row.extend(floats(view.dtype, bytes));
            }
        }
    }
}

impl GoldenTrace {
    /// The reference values and ours (`[B, S, ...]`) at the same real positions.
    ///
    /// # Errors
    /// When the shapes disagree.
    pub fn pairs(&self, golden: &Golden, ours: &HostArray) -> std::result::Result<(Vec<f64>, Vec<f64>), String> {
        let reference = self.values.to_f64();
        let ours_shape = ours.shape();
        let [b, s] = [ours_shape.first().copied().unwrap_or(0), ours_shape.get(1).copied().unwrap_or(0)];
        let width: usize = ours_shape.iter().skip(2).product();
        let ours = ours.to_f64();
        if self.last_only {
            if b != 1 || reference.len() != width {
                return Err(format!("reference has {} values, ours {width}", reference.len()));
            }
            return Ok((reference, ours[(s - 1) * width..].to_vec()));
        }
        if reference.len() != ours.len() {
            return Err(format!("reference is {}, ours {ours_shape}", self.values.shape()));
        }
        let real =
            |row: usize| golden.sequences.get(row / s).is_none_or(|q| q.mask.as_ref().is_none_or(|m| m[row % s]));
        let keep = |v: Vec<f64>| -> Vec<f64> {
            (0..b * s).filter(|&r| real(r)).flat_map(|r| v[r * width..(r + 1) * width].to_vec()).collect()
        };
        Ok((keep(reference), keep(ours)))
    }
}

fn traces(file: &SafetensorsFile, b: usize, s: usize) -> Result<Vec<GoldenTrace>> {
    let mut out = Vec::new();
    for entry in file.tensors() {
        let Some(view) = file.tensor(&entry.name) else { continue };
        if !view.dtype.is_float() {
            continue;
        }
        let whole = entry.name.starts_with("hidden.") || entry.name.starts_with("trace.") || entry.name == "ple";
        if whole && view.shape.len() >= 2 && view.shape[..2] == [b, s] {
            out.push(GoldenTrace { name: entry.name.clone(), values: host(&view)?, last_only: false });
        } else if b == 1 {
            let single = |name: &str| -> Result<GoldenTrace> {
                Ok(GoldenTrace { name: name.into(), values: host(&view)?, last_only: true })
            };
            match entry.name.as_str() {
                "embed_last" => out.push(single("hidden.embed")?),
                "final_last" => out.push(single("hidden.final")?),
                "ple_last" => out.push(single("ple")?),
                "hidden_last" if view.shape.rank() == 2 => {
                    let width = view.shape[1] * view.dtype.size();
                    for (layer, row) in view.bytes.as_slice().chunks_exact(width.max(1)).enumerate() {
                        let values = HostArray::from_bytes(view.dtype, [view.shape[1]], row)?;
                        out.push(GoldenTrace { name: format!("hidden.{layer}"), values, last_only: true });
                    }
                }
                _ => {}
            }
        }
    }
    // In the order of the computation, so that the first that fails is where things go wrong.
    out.sort_by_key(|t| trace_order(&t.name));
    Ok(out)
}

/// Sorts trace names by when they are computed.
#[must_use]
pub fn trace_order(name: &str) -> (usize, usize, String) {
    let mut parts = name.split('.');
    match (parts.next(), parts.next()) {
        (Some("hidden"), Some("embed")) => (0, 0, String::new()),
        (Some("ple"), _) => (1, 0, String::new()),
        (Some("hidden"), Some("final")) => (usize::MAX, 0, String::new()),
        (Some("hidden"), Some(i)) => (2 + i.parse().unwrap_or(0), 9, String::new()),
        (Some("trace"), Some(i)) => {
            let part = parts.next().unwrap_or("");
            let rank = ["q", "k", "v", "attn", "mlp"].iter().position(|&p| p == part).unwrap_or(8);
            (2 + i.parse::<usize>().unwrap_or(0), rank, part.to_owned())
        }
        _ => (usize::MAX, 1, name.to_owned()),
    }
}

fn host(view: &TensorView) -> Result<HostArray> {
    Ok(HostArray::from_bytes(view.dtype, view.shape.clone(), view.bytes.as_slice())?)
}

/// Floats of any width as f32 (f64 rounds).
fn floats(dtype: DType, bytes: &[u8]) -> Vec<f32> {
    match HostArray::from_bytes(dtype, [bytes.len() / dtype.size()], bytes) {
        Ok(a) => a.to_f64().into_iter().map(|x| x as f32).collect(),
        Err(_) => Vec::new(),
    }
}

fn integers(view: &TensorView) -> std::result::Result<Vec<i32>, String> {
    if !(view.dtype.is_integer() || view.dtype == DType::Bool) {
        return Err(format!("`{}` is {}, expected integers", view.name, view.dtype));
    }
    let array = host(view).map_err(|e| e.to_string())?;
    array
        .to_f64()
        .into_iter()
        .map(|x| if x.abs() <= f64::from(i32::MAX) { Ok(x as i32) } else { Err(format!("`{}` holds {x}", view.name)) })
        .collect()
}
