//! Finding and reading configuration files: the user's, their parents, `base.yml` and the model files.

use std::path::{Path, PathBuf};

use serde_json::Value as Json;

use crate::error::Problem;
use crate::layer::Origin;
use crate::suggest::{listed, word_like};
use crate::yaml::{self, Entry};

/// The files that are part of the program, by their path below `configs/`.
pub const BUILTIN: &[(&str, &str)] = &[
    ("base.yml", include_str!("../../../configs/base.yml")),
    ("models/gemma4-e2b.yml", include_str!("../../../configs/models/gemma4-e2b.yml")),
    ("models/gemma4-e4b.yml", include_str!("../../../configs/models/gemma4-e4b.yml")),
    ("models/tiny-e2b.yml", include_str!("../../../configs/models/tiny-e2b.yml")),
];

const BASE: &str = "base.yml";
/// A chain of parents longer than this is a mistake.
const MAX_PARENTS: usize = 16;
/// A configuration file larger than this is another kind of file.
const MAX_BYTES: u64 = 4 << 20;

/// One file of a layer.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct ConfigFile {
    pub(crate) path: PathBuf,
    pub(crate) builtin: bool,
    /// Whether it takes the place of `base.yml`, below the model file.
    pub(crate) is_base: bool,
    pub(crate) entries: Vec<Entry>,
}

/// Whether a word names a configuration file.
pub(crate) fn is_config_path(word: &str) -> bool {
    !word.contains('=') && (word.ends_with(".yml") || word.ends_with(".yaml"))
}

/// Names of the built-in models.
pub(crate) fn builtin_models() -> impl Iterator<Item = &'static str> {
    BUILTIN.iter().filter_map(|(path, _)| path.strip_prefix("models/")?.strip_suffix(".yml"))
}

/// The user's file after its parents, eldest first.
pub(crate) fn chain(config: Option<&Path>, problems: &mut Vec<Problem>) -> Vec<ConfigFile> {
    let mut files: Vec<ConfigFile> = Vec::new();
    let mut next = config.map(Path::to_path_buf);
    while let Some(path) = next.take() {
        let seen = files.iter().any(|file| same_file(&file.path, &path));
        if seen || files.len() == MAX_PARENTS {
            let origin =
                Origin::File { path: files.last().map_or(path.clone(), |f| f.path.clone()), line: 0, builtin: false };
            let message = format!("the chain of parents does not end: `{}` comes again", path.display());
            problems.push(Problem::new("base_config", &origin, message));
            break;
        }
        let Some(file) = read(&path, problems) else { break };
        let parent = file.entries.iter().find(|entry| entry.key == "base_config").cloned();
        let place = file.path.parent().map(Path::to_path_buf).unwrap_or_default();
        if let Some(entry) = parent {
            let origin = Origin::File { path: file.path.clone(), line: entry.line, builtin: file.builtin };
            match &entry.value {
                Json::String(name) if !name.is_empty() => {
                    let beside = place.join(name);
                    next = if beside.is_file() || builtin(name).is_none() { Some(beside) } else { Some(name.into()) };
                }
                Json::Null => {}
                Json::String(_) => {}
                _ => problems.push(Problem::new("base_config", &origin, "is not the name of a file")),
            }
        }
        files.push(file);
    }
    files.reverse();
    files
}

/// `base.yml` beside the user's file, else the built-in one.
pub(crate) fn base_beside(config: Option<&Path>, problems: &mut Vec<Problem>) -> ConfigFile {
    let beside = config.and_then(Path::parent).map(|dir| dir.join(BASE)).filter(|path| path.is_file());
    beside
        .and_then(|path| read(&path, problems))
        .or_else(|| read_builtin(BASE, problems))
        .unwrap_or_else(|| ConfigFile { path: BASE.into(), builtin: true, is_base: true, entries: Vec::new() })
}

/// The file of a model: beside the user's configuration, one level up, else built in.
pub(crate) fn model(
    name: &str,
    config: Option<&Path>,
    named_by: &Origin,
    problems: &mut Vec<Problem>,
) -> Option<ConfigFile> {
    let file_name = format!("models/{name}.yml");
    // A name is one path component, whatever the file system would make of it.
    let is_plain = !name.is_empty() && !name.starts_with('.') && !name.contains(['/', '\\', '\0']);
    if is_plain {
        let place = config.map(|path| path.parent().unwrap_or(Path::new("")).to_path_buf());
        for dir in place.iter().flat_map(|dir| [dir.clone(), dir.join("..")]) {
            let path = dir.join(&file_name);
            if path.is_file() {
                return read(&path, problems);
            }
        }
        if let Some(file) = read_builtin(&file_name, problems) {
            return Some(file);
        }
    }
    let known: Vec<&str> = builtin_models().collect();
    let problem = Problem::new("model_name", named_by, format!("there is no model `{name}`"));
    problems.push(match word_like(name, known.iter().copied()) {
        Some(near) => problem.hint(format!("did you mean `{near}`?")),
        None => problem.hint(format!(
            "the models are {}; another needs a file `{file_name}` beside your configuration",
            listed(&known)
        )),
    });
    None
}

fn builtin(name: &str) -> Option<&'static str> {
    BUILTIN.iter().find(|(path, _)| *path == name).map(|(_, text)| *text)
}

fn read_builtin(name: &str, problems: &mut Vec<Problem>) -> Option<ConfigFile> {
    builtin(name).and_then(|text| parse(Path::new(name), text, true, problems))
}

/// Reads a file; a name that does not exist on disk may be that of a built-in one (`base.yml`).
fn read(path: &Path, problems: &mut Vec<Problem>) -> Option<ConfigFile> {
    let name = path.to_string_lossy();
    if !path.exists()
        && let Some(file) = read_builtin(&name, problems)
    {
        return Some(file);
    }
    let text = fs_err::metadata(path).and_then(|meta| {
        if meta.len() > MAX_BYTES {
            let message = format!("{} is too large for a configuration file ({} bytes)", path.display(), meta.len());
            return Err(std::io::Error::new(std::io::ErrorKind::InvalidData, message));
        }
        fs_err::read_to_string(path)
    });
    match text {
        Ok(text) => parse(path, &text, false, problems),
        Err(error) => {
            let origin = Origin::File { path: path.to_path_buf(), line: 0, builtin: false };
            let message = match error.kind() {
                std::io::ErrorKind::NotFound => "there is no such file".to_owned(),
                _ => format!("cannot be read: {error}"),
            };
            problems.push(Problem::new("", &origin, message));
            None
        }
    }
}

fn parse(path: &Path, text: &str, builtin: bool, problems: &mut Vec<Problem>) -> Option<ConfigFile> {
    match yaml::parse(text) {
        Ok(entries) => {
            let is_base = path.file_name().is_some_and(|name| name == BASE);
            Some(ConfigFile { path: path.to_path_buf(), builtin, is_base, entries })
        }
        Err(error) => {
            let origin = Origin::File { path: path.to_path_buf(), line: error.line.unwrap_or(0), builtin };
            problems.push(Problem::new("", &origin, format!("is not a YAML mapping: {}", error.message)));
            None
        }
    }
}

fn same_file(a: &Path, b: &Path) -> bool {
    a == b || matches!((fs_err::canonicalize(a), fs_err::canonicalize(b)), (Ok(a), Ok(b)) if a == b)
}
