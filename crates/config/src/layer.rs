//! Layers: where values come from, who wins, and what may not be said twice.
//!
//! From lowest to highest: `base.yml`, the model file (or the shape read from a checkpoint), the user's files, the
//! command line, the environment. A raw configuration keeps, for every key, the winning value and its origin.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::path::PathBuf;

use serde::Serializer;

use crate::error::{Error, Problem};
use crate::explain::{Filter, Setting};
use crate::files;
use crate::keys::{self, Category};
use crate::resolved::Config;
use crate::value::Value;

/// Where a value came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// No layer gave one; the built-in `base.yml` repeats the defaults and counts as none.
    Default,
    /// A file.
    File {
        /// Its path, or its name below `configs/` for one that is built in.
        path: PathBuf,
        /// The line, from 1; 0 where it is not known.
        line: u32,
        /// Whether the file is part of the program.
        builtin: bool,
    },
    /// The configuration inside a checkpoint.
    Checkpoint(String),
    /// A word `key=value`.
    CommandLine,
    /// An environment variable.
    Environment(String),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::Default => f.write_str("default"),
            Origin::File { path, line, builtin } => {
                write!(f, "{}", path.display())?;
                if *line > 0 {
                    write!(f, ":{line}")?;
                }
                if *builtin { f.write_str(", built in") } else { Ok(()) }
            }
            Origin::Checkpoint(name) => f.write_str(name),
            Origin::CommandLine => f.write_str("command line"),
            Origin::Environment(name) => write!(f, "environment {name}"),
        }
    }
}

pub(crate) fn origin_as_text<S: Serializer>(origin: &Origin, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(origin)
}

/// A model's shape that was read from a checkpoint; it takes the place of the model file.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelLayer {
    /// Shown as the origin of its values, for instance the path of a `config.json`.
    pub name: String,
    /// Keys of the table with their values.
    pub values: Vec<(String, Value)>,
}

/// Everything a configuration is made from.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Sources {
    /// The user's configuration file.
    pub config: Option<PathBuf>,
    /// Words `key=value`, in order; the last one of a key counts.
    pub overrides: Vec<String>,
    /// Environment variables; those without the prefix are ignored.
    pub environment: Vec<(OsString, OsString)>,
    /// The shape found in a checkpoint, where a command has one.
    pub model: Option<ModelLayer>,
    /// Number of devices, where it is known already: the batch over all devices is then checked too.
    pub devices: Option<usize>,
}

impl Sources {
    /// Takes the words of a command line: an optional configuration file (`.yml` or `.yaml`), then `key=value`.
    #[must_use]
    pub fn from_args<I>(args: I) -> Self
    where
        I: IntoIterator,
        I::Item: Into<String>,
    {
        let mut overrides: Vec<String> = args.into_iter().map(Into::into).collect();
        let is_file = overrides.first().is_some_and(|first| files::is_config_path(first));
        let config = is_file.then(|| PathBuf::from(overrides.remove(0)));
        Sources { config, overrides, ..Sources::default() }
    }

    /// Adds environment variables.
    #[must_use]
    pub fn with_environment<K, V>(mut self, variables: impl IntoIterator<Item = (K, V)>) -> Self
    where
        K: Into<OsString>,
        V: Into<OsString>,
    {
        self.environment.extend(variables.into_iter().map(|(name, value)| (name.into(), value.into())));
        self
    }

    /// Adds the variables of this process.
    #[must_use]
    pub fn with_process_environment(self) -> Self {
        self.with_environment(std::env::vars_os())
    }

    /// Reads and merges the layers. Problems are collected, not returned: [`RawConfig::resolve`] reports them
    /// together with those found later.
    #[must_use]
    pub fn load(&self) -> RawConfig {
        crate::load::load(self)
    }

    /// Reads, merges and checks.
    ///
    /// # Errors
    /// All problems of all layers.
    pub fn resolve(&self) -> Result<Config, Error> {
        self.load().resolve()
    }
}

/// Something worth knowing that is no problem: a key that changes nothing.
#[derive(Debug, Clone, PartialEq)]
pub struct Note {
    /// The key.
    pub key: String,
    /// Where it was set.
    pub origin: Origin,
    /// What to know.
    pub message: String,
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({}): {}", self.key, self.origin, self.message)
    }
}

/// The merged layers: a value and its origin for every key, not yet checked against each other.
#[derive(Debug, Clone, PartialEq)]
pub struct RawConfig {
    pub(crate) entries: BTreeMap<&'static str, (Value, Origin)>,
    pub(crate) problems: Vec<Problem>,
    pub(crate) notes: Vec<Note>,
    /// Name of the model file, or of the checkpoint, if the shape comes from one.
    pub(crate) model_source: Option<Origin>,
    pub(crate) devices: Option<usize>,
}

impl RawConfig {
    /// The value of a key, by its name or an alias; `None` for a name the table does not know.
    #[must_use]
    pub fn value(&self, key: &str) -> Option<&Value> {
        keys::find(key).and_then(|key| self.entries.get(key.name)).map(|(value, _)| value)
    }

    /// The origin of a key's value.
    #[must_use]
    pub fn origin(&self, key: &str) -> Option<&Origin> {
        keys::find(key).and_then(|key| self.entries.get(key.name)).map(|(_, origin)| origin)
    }

    /// Whether anything was said of the model's shape.
    #[must_use]
    pub fn tells_a_model(&self) -> bool {
        self.show(Filter::Category(Category::Model)).iter().any(Setting::is_set)
    }

    /// What was wrong so far.
    #[must_use]
    pub fn problems(&self) -> &[Problem] {
        &self.problems
    }

    /// Keys that were set and change nothing.
    #[must_use]
    pub fn notes(&self) -> &[Note] {
        &self.notes
    }

    /// Checks values against each other and computes what follows from them.
    ///
    /// # Errors
    /// All problems, those of the layers included.
    pub fn resolve(self) -> Result<Config, Error> {
        crate::build::resolve(self)
    }
}
