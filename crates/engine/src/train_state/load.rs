//! A directory is checked and read.

use std::collections::BTreeSet;
use std::path::Path;

use checkpoint::manifest::Manifest;
use checkpoint::safetensors::{SafetensorsFile, TensorView};
use gemma4::param_table;
use rayon::prelude::*;
use tensor::{DType, ParamSpec, Shape};

use super::check::{check_moments, check_rows};
use super::record::Record;
use super::{OPTIMIZER_FILE, OPTIMIZER_PARTS, ROWS, StateError, Store, TrainerState};
use crate::Model;

/// A checkpoint that was checked completely. Arrays are read when they are asked for.
#[derive(Debug)]
pub struct Loaded {
    /// Everything but arrays.
    pub state: TrainerState,
    model: Model,
    /// One file, or one of each process that wrote.
    moments: Vec<SafetensorsFile>,
}

impl Store {
    /// Opens a step and checks all of it: lengths and SHA-256 of every file, names, shapes and element types of every
    /// parameter against the architecture, moments of exactly the trained parameters.
    ///
    /// # Errors
    /// When there is no such step or anything is wrong with it; the message names file or tensor.
    pub fn load(&self, step: u64) -> Result<Loaded, StateError> {
        let path = self.path(step);
        if !path.is_dir() {
            let steps: Vec<String> = self.steps().iter().map(u64::to_string).collect();
            let available = if steps.is_empty() {
                "there is none yet".to_owned()
            } else {
                format!("there are: {}", steps.join(", "))
            };
            return Err(StateError::NoStep { dir: self.dir.clone(), step, available });
        }
        self.check(&path, step).map_err(|reason| self.damaged(step, reason))
    }

    fn check(&self, path: &Path, step: u64) -> Result<Loaded, String> {
        let record = Record::read(path, step)?;
        let files: Vec<Manifest> = record.files.iter().map(|f| Manifest { files: vec![f.clone()] }).collect();
        // All are read, so that the first one named does not depend on chance.
        let results: Vec<_> = files.par_iter().map(|m| m.verify(path)).collect();
        results.into_iter().collect::<Result<Vec<()>, _>>().map_err(|e| e.to_string())?;
        let model = Model::open(path).map_err(|e| e.to_string())?;
        if *model.arch() != self.options.arch {
            return Err("config.json describes another architecture than the one being trained".to_owned());
        }
        let moments = moment_files(&record)
            .map(|name| SafetensorsFile::open(&path.join(name)).map_err(|e| e.to_string()))
            .collect::<Result<Vec<_>, _>>()?;
        let table = param_table(&self.options.arch);
        for spec in &table {
            let dtype = model.dtype(&spec.name).map_err(|e| e.to_string())?;
            if !matches!(dtype, DType::BF16 | DType::F32) {
                return Err(format!("{} is {dtype}; checkpoints hold bfloat16 and float32", spec.name));
            }
        }
        let trained: BTreeSet<&str> = record.state.trained.iter().map(String::as_str).collect();
        let all = moments.iter().flat_map(SafetensorsFile::tensors);
        let names: Vec<&str> = all.map(|t| t.name.as_str()).filter(|n| !n.starts_with(ROWS)).collect();
        check_moments(&record.state.optimizer, &trained, &names).map_err(|e| format!("{OPTIMIZER_FILE}: {e}"))?;
        for file in &moments {
            check_shapes(file, &table)
                .map_err(|e| format!("{}: {e}", file.path().file_name().unwrap_or_default().display()))?;
        }
        Ok(Loaded { state: record.state, model, moments })
    }
}

/// The file of moments, and those of other processes.
fn moment_files(record: &Record) -> impl Iterator<Item = &str> {
    let names = record.files.iter().map(|f| f.name.as_str());
    std::iter::once(OPTIMIZER_FILE)
        .chain(names.filter(|n| n.starts_with(OPTIMIZER_PARTS) && n.ends_with(".safetensors")))
}

/// Whether moments have the shapes of their parameters, or of as many rows of them as are numbered. The error is a clause.
fn check_shapes(file: &SafetensorsFile, table: &[ParamSpec]) -> Result<(), String> {
    for t in file.tensors() {
        let param = t.name.split_once(':').map_or("", |(_, n)| n);
        let Some(spec) = table.iter().find(|p| p.name == param) else {
            return Err(format!("{} is of no parameter of the model", t.name));
        };
        let rows = file.tensor(&format!("{ROWS}{param}"));
        if let Some(rows) = rows.filter(|_| spec.shape.rank() == 2) {
            let numbers = numbers(&rows).map_err(|e| format!("{ROWS}{param}: {e}"))?;
            check_rows(&numbers, spec.shape.dims()[0]).map_err(|e| format!("{param}: {e}"))?;
            let part = Shape::from([numbers.len(), spec.shape.dims()[1]]);
            let is_float = matches!(t.dtype, DType::BF16 | DType::F32) && t.shape == part;
            if !is_float && t.name != format!("{ROWS}{param}") {
                return Err(format!("{} is {}{}, expected {part}", t.name, t.dtype, t.shape));
            }
            continue;
        }
        if t.shape != spec.shape || !matches!(t.dtype, DType::BF16 | DType::F32) {
            return Err(format!("{} is {}{}, expected floats of {}", t.name, t.dtype, t.shape, spec.shape));
        }
    }
    Ok(())
}

/// The values of a list of i32.
fn numbers(view: &TensorView) -> Result<Vec<i32>, String> {
    if view.dtype != DType::I32 || view.shape.rank() != 1 {
        return Err(format!("it is {}{}, expected a list of int32", view.dtype, view.shape));
    }
    let number = |b: &[u8]| b.try_into().map(i32::from_le_bytes).unwrap_or_default();
    Ok(view.bytes.as_slice().chunks_exact(4).map(number).collect())
}

impl Loaded {
    /// The directory, which is a model by itself.
    #[must_use]
    pub fn model_dir(&self) -> &Path {
        self.model.path()
    }

    /// The model, opened.
    #[must_use]
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Names of the moments.
    pub fn moments(&self) -> impl Iterator<Item = &str> {
        self.moments.iter().flat_map(SafetensorsFile::tensors).map(|t| t.name.as_str())
    }

    /// A parameter, trained or frozen, in the element type it was saved in, in its mapped file.
    ///
    /// # Errors
    /// When there is none of this name.
    pub fn param(&self, name: &str) -> Result<TensorView, StateError> {
        self.model.mapped(name).ok_or_else(|| self.no_array("parameter", name))
    }

    /// Which rows of a table there are moments of, where they are not of all; empty if there is no such table.
    ///
    /// # Errors
    /// When the file changed since it was checked.
    pub fn table_rows(&self) -> Result<Vec<i32>, StateError> {
        let Some(name) = self.moments().find(|n| n.starts_with(ROWS)) else { return Ok(Vec::new()) };
        let view = self.moments.iter().find_map(|f| f.tensor(name)).ok_or_else(|| self.no_array("rows", name))?;
        numbers(&view).map_err(|_| self.no_array("rows", name))
    }

    /// A moment, such as `mu:norm.weight`, in its mapped file.
    ///
    /// # Errors
    /// When there is none of this name.
    pub fn moment(&self, name: &str) -> Result<TensorView, StateError> {
        self.moments.iter().find_map(|f| f.tensor(name)).ok_or_else(|| self.no_array("moment", name))
    }

    fn no_array(&self, what: &'static str, name: &str) -> StateError {
        StateError::NoArray { path: self.model_dir().to_owned(), what, name: name.to_owned() }
    }
}
