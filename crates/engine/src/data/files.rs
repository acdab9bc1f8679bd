//! Which files a configuration means.

use std::path::{Path, PathBuf};

use super::{DataError, Result};

/// What a file holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    /// A document a line.
    Text,
    /// A JSON object a line.
    Json,
    /// A table.
    Parquet,
}

impl Format {
    fn from_word(word: &str) -> Option<Self> {
        match word {
            "text" => Some(Format::Text),
            "json" => Some(Format::Json),
            "parquet" => Some(Format::Parquet),
            _ => None,
        }
    }

    fn from_extension(extension: &str) -> Option<Self> {
        match extension {
            "txt" | "text" => Some(Format::Text),
            "jsonl" | "ndjson" | "json" => Some(Format::Json),
            "parquet" | "pq" => Some(Format::Parquet),
            _ => None,
        }
    }
}

/// How a file is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Compression {
    /// Not at all.
    None,
    /// `.gz`
    Gzip,
    /// `.zst`
    Zstd,
}

/// A file to read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct SourceFile {
    pub(super) path: PathBuf,
    pub(super) format: Format,
    pub(super) compression: Compression,
}

/// What names the files of a part of a data set.
#[derive(Debug, Clone, Copy)]
pub(super) struct Request<'a> {
    /// A directory, a file, or a format.
    pub(super) hf_path: &'a str,
    /// Subset: a directory below.
    pub(super) name: &'a str,
    /// Directory below.
    pub(super) data_dir: &'a str,
    /// Patterns, separated by commas; empty for the split.
    pub(super) files: &'a str,
    /// The key of `files`.
    pub(super) files_key: &'static str,
    /// Split, for a directory without patterns.
    pub(super) split: &'a str,
    /// The key of `split`.
    pub(super) split_key: &'static str,
}

/// Files that describe a data set and are not part of it.
const DESCRIPTIONS: &[&str] = &["dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"];

/// Words in file and directory names, by the split they mean, as Hugging Face's library reads them.
const SPLITS: &[(&str, &[&str])] = &[
    ("train", &["train", "training"]),
    ("validation", &["validation", "valid", "val", "dev"]),
    ("test", &["test", "testing", "eval", "evaluation"]),
];

/// Deepest directory that is looked into; guards against links in a circle.
const MAX_DEPTH: usize = 16;

/// Finds the files, in an order that depends on their names alone.
///
/// # Errors
/// When there are none; the message names the key and says what to do.
pub(super) fn find(request: &Request<'_>) -> Result<Vec<SourceFile>> {
    if let Some(format) = Format::from_word(request.hf_path) {
        if !request.name.is_empty() || !request.data_dir.is_empty() {
            let key = if request.name.is_empty() { "hf_data_dir" } else { "hf_name" };
            let reason = format!("belongs to a data set directory, and `hf_path={}` is a format", request.hf_path);
            return Err(DataError::Key { key, reason });
        }
        if request.files.is_empty() {
            let reason = format!("`hf_path={}` is a format, so the files are needed", request.hf_path);
            return Err(DataError::Key { key: request.files_key, reason });
        }
        let paths = expand(Path::new(""), request)?;
        return Ok(paths.into_iter().map(|path| SourceFile { compression: kind(&path).1, path, format }).collect());
    }
    let path = Path::new(request.hf_path);
    let paths = if !request.files.is_empty() {
        let base = if path.is_dir() { directory(request)? } else { PathBuf::new() };
        expand(&base, request)?
    } else if path.is_file() && request.split_key == "train_split" {
        vec![path.to_owned()]
    } else {
        of_split(&directory(request)?, request)?
    };
    paths.into_iter().map(of_known_format).collect()
}

/// The directory that `hf_path`, `hf_name` and `hf_data_dir` name.
fn directory(request: &Request<'_>) -> Result<PathBuf> {
    let mut path = PathBuf::from(request.hf_path);
    for (key, part) in [("hf_path", ""), ("hf_name", request.name), ("hf_data_dir", request.data_dir)] {
        if !part.is_empty() {
            path.push(part);
        }
        if !path.is_dir() {
            let why = if path.is_file() { "is a file" } else { "does not exist" };
            let reason = format!(
                "the directory {} {why}; nothing is downloaded: give a local directory, or a format (json, text, \
                 parquet) with `{}`",
                path.display(),
                request.files_key
            );
            return Err(DataError::Key { key, reason });
        }
    }
    Ok(path)
}

/// Expands patterns relative to a directory.
fn expand(base: &Path, request: &Request<'_>) -> Result<Vec<PathBuf>> {
    let wrong = |reason: String| DataError::Key { key: request.files_key, reason };
    // A name with a comma that exists is that file.
    let patterns: Vec<&str> = if base.join(request.files).exists() {
        vec![request.files]
    } else {
        request.files.split(',').map(str::trim).filter(|pattern| !pattern.is_empty()).collect()
    };
    let mut all: Vec<PathBuf> = Vec::new();
    for pattern in patterns {
        let literal = base.join(pattern);
        if literal.is_dir() {
            return Err(wrong(format!("{} is a directory; use a pattern: {pattern}/*.jsonl", literal.display())));
        }
        let mut found = Vec::new();
        if literal.exists() {
            found.push(literal);
        } else {
            let full = if base.as_os_str().is_empty() || Path::new(pattern).is_absolute() {
                pattern.to_owned()
            } else {
                format!("{}/{pattern}", glob::Pattern::escape(&base.to_string_lossy()))
            };
            for path in glob::glob(&full).map_err(|e| wrong(format!("`{pattern}` is no pattern: {e}")))? {
                let path = path.map_err(|e| wrong(e.to_string()))?;
                if path.is_file() {
                    found.push(path);
                }
            }
            found.sort();
        }
        if found.is_empty() {
            let place = if base.as_os_str().is_empty() { String::new() } else { format!(" in {}", base.display()) };
            return Err(wrong(format!("no file{place} is named `{pattern}`")));
        }
        for path in found {
            if !all.contains(&path) {
                all.push(path);
            }
        }
    }
    if all.is_empty() {
        return Err(wrong("it names no file".to_owned()));
    }
    Ok(all)
}

/// The files of a split of a directory.
fn of_split(base: &Path, request: &Request<'_>) -> Result<Vec<PathBuf>> {
    let wrong = |reason: String| DataError::Key { key: request.split_key, reason };
    let split = request.split;
    if split.is_empty() {
        let reason = format!("names no split; give one, or files with `{}`", request.files_key);
        return Err(wrong(reason));
    }
    if split.contains(['[', '+', ':', '%']) {
        return Err(wrong(format!("`{split}`: parts and sums of splits are not read; make files of them")));
    }
    let mut files = Vec::new();
    let mut has_arrow = false;
    walk(base, Path::new(""), 0, &mut files, &mut has_arrow)?;
    files.sort();
    if files.is_empty() {
        let what = if has_arrow {
            "holds Arrow files, which are not read: write it with `to_parquet` or `to_json` instead of `save_to_disk`"
        } else {
            "holds no .jsonl, .json, .txt or .parquet file"
        };
        return Err(DataError::Key { key: "hf_path", reason: format!("{} {what}", base.display()) });
    }
    let wanted = SPLITS.iter().find(|(name, words)| *name == split || words.contains(&split)).map_or(split, |s| s.0);
    let chosen: Vec<&PathBuf> = files.iter().filter(|file| split_of(file, split) == Some(wanted)).collect();
    if chosen.is_empty() && wanted == "train" && files.iter().all(|file| split_of(file, split).is_none()) {
        // Nothing speaks of splits: all of it is for training.
        return Ok(files.iter().map(|file| base.join(file)).collect());
    }
    if chosen.is_empty() {
        let names: Vec<String> = files.iter().take(3).map(|file| file.display().to_string()).collect();
        let reason = format!(
            "no file in {} belongs to the split `{split}` by its name or directory ({}{}); give files with `{}`",
            base.display(),
            names.join(", "),
            if files.len() > 3 { ", ..." } else { "" },
            request.files_key
        );
        return Err(wrong(reason));
    }
    Ok(chosen.into_iter().map(|file| base.join(file)).collect())
}

/// Collects data files below a directory, as paths relative to it.
fn walk(base: &Path, below: &Path, depth: usize, out: &mut Vec<PathBuf>, has_arrow: &mut bool) -> Result<()> {
    for entry in fs_err::read_dir(base.join(below))? {
        let entry = entry?;
        let name = entry.file_name();
        let text = name.to_string_lossy();
        if text.starts_with('.') || DESCRIPTIONS.contains(&text.as_ref()) {
            continue;
        }
        let (path, relative) = (entry.path(), below.join(&name));
        if path.is_dir() {
            if depth < MAX_DEPTH {
                walk(base, &relative, depth + 1, out, has_arrow)?;
            }
        } else if kind(&path).0.is_some() {
            out.push(relative);
        } else if text.ends_with(".arrow") {
            *has_arrow = true;
        }
    }
    Ok(())
}

/// The split that a path speaks of: its name decides before its directories, the first word before later ones.
fn split_of<'a>(path: &Path, asked: &'a str) -> Option<&'a str> {
    for part in path.iter().rev() {
        let part = part.to_string_lossy().to_ascii_lowercase();
        for word in part.split(|c: char| !c.is_ascii_alphanumeric()) {
            if let Some((split, _)) = SPLITS.iter().find(|(_, words)| words.contains(&word)) {
                return Some(split);
            }
        }
        // A split of another name may itself hold marks.
        let stem = part.split('.').next().unwrap_or_default();
        if stem == asked || stem.strip_prefix(asked).is_some_and(|rest| rest.starts_with(['-', '_'])) {
            return Some(asked);
        }
    }
    None
}

/// Format and compression by the extensions.
fn kind(path: &Path) -> (Option<Format>, Compression) {
    let name = path.file_name().map(|name| name.to_string_lossy().to_ascii_lowercase()).unwrap_or_default();
    let (name, compression) = match name.rsplit_once('.') {
        Some((stem, "gz")) => (stem, Compression::Gzip),
        Some((stem, "zst" | "zstd")) => (stem, Compression::Zstd),
        _ => (name.as_str(), Compression::None),
    };
    (name.rsplit_once('.').and_then(|(_, extension)| Format::from_extension(extension)), compression)
}

fn of_known_format(path: PathBuf) -> Result<SourceFile> {
    let (format, compression) = kind(&path);
    let Some(format) = format else {
        let reason = "its name does not tell the format; set `hf_path` to json, text or parquet".to_owned();
        return Err(DataError::File { path, reason });
    };
    Ok(SourceFile { path, format, compression })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request<'a>(hf_path: &'a str, files: &'a str, split: &'a str) -> Request<'a> {
        let (files_key, split_key) = ("hf_train_files", "train_split");
        Request { hf_path, name: "", data_dir: "", files, files_key, split, split_key }
    }

    /// Makes empty files.
    fn tree(names: &[&str]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for name in names {
            let path = dir.path().join(name);
            fs_err::create_dir_all(path.parent().unwrap()).unwrap();
            fs_err::write(path, "").unwrap();
        }
        dir
    }

    fn names(dir: &Path, request: &Request<'_>) -> Vec<String> {
        let files = find(request).unwrap();
        files.iter().map(|f| f.path.strip_prefix(dir).unwrap().to_string_lossy().into_owned()).collect()
    }

    fn error(request: &Request<'_>) -> String {
        find(request).unwrap_err().to_string()
    }

    #[test]
    fn splits_go_by_names_and_directories() {
        let dir = tree(&[
            "data/train-00001-of-00002.parquet",
            "data/train-00000-of-00002.parquet",
            "data/validation-00000-of-00001.parquet",
            "test/train_like.jsonl",
            "dev/a.txt",
            "held_out-0.jsonl",
            ".cache/train.jsonl",
            "dataset_info.json",
            "README.md",
        ]);
        let path = dir.path().to_str().unwrap();
        let of = |split| names(dir.path(), &request(path, "", split));
        assert_eq!(
            of("train"),
            ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "test/train_like.jsonl"]
        );
        assert_eq!(of("validation"), ["data/validation-00000-of-00001.parquet", "dev/a.txt"]);
        assert_eq!(of("dev"), of("validation"));
        assert_eq!(of("held_out"), ["held_out-0.jsonl"]);
        let missing = error(&request(path, "", "test"));
        assert!(missing.contains("no file in") && missing.contains("`test`"), "{missing}");
        assert!(error(&request(path, "", "train[:5%]")).contains("not read"));
        assert!(error(&request(path, "", "")).contains("hf_train_files"));
    }

    #[test]
    fn a_directory_without_splits_is_for_training() {
        let dir = tree(&["b.jsonl.gz", "a.txt", "sub/c.json.zst"]);
        let path = dir.path().to_str().unwrap();
        assert_eq!(names(dir.path(), &request(path, "", "train")), ["a.txt", "b.jsonl.gz", "sub/c.json.zst"]);
        assert!(error(&request(path, "", "validation")).contains("validation"));
        let files = find(&request(path, "", "train")).unwrap();
        assert_eq!(files[1].compression, Compression::Gzip);
        assert_eq!((files[2].format, files[2].compression), (Format::Json, Compression::Zstd));
        let with = Request { data_dir: "sub", ..request(path, "", "train") };
        assert_eq!(names(dir.path(), &with), ["sub/c.json.zst"]);
        let with = Request { name: "en", ..request(path, "", "train") };
        assert!(error(&with).starts_with("hf_name: the directory"));
    }

    #[test]
    fn patterns_are_expanded_in_order() {
        let dir = tree(&["b1.log", "b2.log", "a,1.log", "x[1].jsonl", "d/e.jsonl"]);
        let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
        let both = format!("{}, {}", at("b*.log"), at("a,1.log").replace(',', "?"));
        assert_eq!(names(dir.path(), &request("json", &both, "")), ["b1.log", "b2.log", "a,1.log"]);
        assert_eq!(names(dir.path(), &request("text", &at("a,1.log"), "")), ["a,1.log"]);
        assert_eq!(names(dir.path(), &request("json", &at("x[1].jsonl"), "")), ["x[1].jsonl"]);
        let path = dir.path().to_str().unwrap();
        assert_eq!(names(dir.path(), &request(path, "**/e.jsonl", "train")), ["d/e.jsonl"]);
        assert!(error(&request(path, "b1.log", "train")).contains("does not tell the format"));
        assert!(error(&request("json", &at("c*"), "")).contains("no file is named"));
        assert!(error(&request("json", &at("***"), "")).contains("no pattern"));
        assert!(error(&request("json", &at("d"), "")).contains("is a directory"));
        assert!(error(&request("json", ",", "")).contains("names no file"));
        assert!(error(&request("json", "", "")).contains("hf_train_files"));
        assert_eq!(names(dir.path(), &request(&at("d/e.jsonl"), "", "train")), ["d/e.jsonl"]);
    }

    #[test]
    fn what_is_missing_is_named() {
        let dir = tree(&["x.arrow"]);
        let path = dir.path().to_str().unwrap();
        assert!(error(&request(path, "", "train")).contains("Arrow"));
        assert!(error(&request("allenai/c4", "", "train")).contains("nothing is downloaded"));
        let with = Request { data_dir: "en", ..request("json", "x", "") };
        assert!(error(&with).starts_with("hf_data_dir"));
    }
}
