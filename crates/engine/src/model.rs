//! A checkpoint opened as a model: architecture, tensors, and an account of everything found.

use std::path::Path;

use checkpoint::binding::{BindReport, Binding, Expected, NameRules, UnusedRule, bind};
use checkpoint::hf::HfDirectory;
use checkpoint::safetensors::TensorView;
use gemma4::hf::{HfModel, PREFIXES, expected_unused};
use gemma4::{Arch, param_table};
use tensor::DType;

use crate::{EngineError, Result};

/// A Gemma 4 text checkpoint: mapped, checked, nothing read yet.
#[derive(Debug)]
pub struct Model {
    directory: HfDirectory,
    hf: HfModel,
    binding: Binding,
}

impl Model {
    /// Opens a Hugging Face directory in any of its spellings.
    ///
    /// # Errors
    /// When a file is damaged, the configuration is not one of a Gemma 4 text model, or a tensor is missing or misshapen.
    pub fn open(path: &Path) -> Result<Self> {
        let directory = HfDirectory::open(path)?;
        let config_path = directory.path().join("config.json");
        let config = directory.config().ok_or_else(|| EngineError::File {
            path: config_path.clone(),
            reason: "not found; a model directory needs its config.json".into(),
        })?;
        let hf = HfModel::from_config(config).map_err(|source| EngineError::Arch { path: config_path, source })?;
        let expected: Vec<Expected> =
            param_table(&hf.arch).into_iter().map(|p| Expected { name: p.name, shape: p.shape }).collect();
        let binding = bind(&directory, &expected, &name_rules(&hf.arch))?;
        Ok(Model { directory, hf, binding })
    }

    /// Where it lies.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// The architecture.
    #[must_use]
    pub fn arch(&self) -> &Arch {
        &self.hf.arch
    }

    /// The directory.
    #[must_use]
    pub fn directory(&self) -> &HfDirectory {
        &self.directory
    }

    /// What was odd in the configuration.
    #[must_use]
    pub fn notes(&self) -> &[String] {
        &self.hf.notes
    }

    /// What was found: used, left over, by reason.
    #[must_use]
    pub fn report(&self) -> &BindReport {
        &self.binding.report
    }

    /// The tensor of a parameter. Every name of the parameter table is there: [`Model::open`] made sure.
    #[must_use]
    pub fn tensor(&self, name: &str) -> &TensorView {
        &self.binding.tensors[name]
    }

    /// The dtype a parameter is stored in.
    #[must_use]
    pub fn stored_dtype(&self, name: &str) -> DType {
        self.tensor(name).dtype
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
