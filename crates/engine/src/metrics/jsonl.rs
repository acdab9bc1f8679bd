//! JSON lines on disk: one object a line, appended step by step, cut back on resume.
//!
//! JSON has no word for NaN or infinity. Such a value is written as `null`, and the object gets a member `non_finite`
//! that maps its key to `NaN`, `Infinity` or `-Infinity`: loaders that know nothing of it still see a gap.

use std::io::{BufRead, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use fs_err as fs;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::{MetricsError, Result, Scalar};

/// A file of metrics, open for appending.
#[derive(Debug)]
pub(super) struct JsonLines {
    file: fs::File,
    /// Bytes of whole lines.
    length: u64,
}

/// What decides whether a line stays.
#[derive(Deserialize)]
struct Stamp {
    step: f64,
    run_name: Option<String>,
}

impl JsonLines {
    /// Opens a file for a run that starts with `first_step`, and drops what earlier runs of that name logged for it and
    /// for later steps, and a last line that was never finished. A run from step 0 leaves the file it replaces under
    /// the same name with `.previous`.
    pub(super) fn open(path: &Path, run_name: &str, first_step: u64, key: &'static str) -> Result<Self> {
        if let Some(parent) = path.parent().filter(|p| !p.as_os_str().is_empty()) {
            fs::create_dir_all(parent)?;
        }
        cut_back(path, run_name, first_step, key)?;
        let mut file = fs::OpenOptions::new().create(true).append(true).open(path)?;
        let length = file.seek(SeekFrom::End(0))?;
        Ok(JsonLines { file, length })
    }

    /// Appends an object as one line.
    pub(super) fn append(&mut self, object: &Map<String, Value>) -> Result<()> {
        let mut line = serde_json::to_vec(object)?;
        line.push(b'\n');
        append(&mut self.file, &mut self.length, &line)
    }

    /// Whether both write to one file.
    pub(super) fn is_same(&self, other: &Self) -> Result<bool> {
        let (a, b) = (self.file.metadata()?, other.file.metadata()?);
        Ok(a.is_file() && (a.dev(), a.ino()) == (b.dev(), b.ino()))
    }

    /// Waits until everything is on disk.
    pub(super) fn sync(&self) -> Result<()> {
        Ok(self.file.sync_data()?)
    }
}

/// Appends bytes, all or none: what a full disk cut off is taken away again, so that the next piece begins where it
/// should.
pub(super) fn append(file: &mut fs::File, length: &mut u64, bytes: &[u8]) -> Result<()> {
    if let Err(error) = file.write_all(bytes) {
        // If this fails too, the reader reports a damaged line.
        let _ = file.set_len(*length);
        return Err(error.into());
    }
    *length += bytes.len() as u64;
    Ok(())
}

/// An object with the scalars of a step.
pub(super) fn object(run_name: &str, step: u64, wall_time: f64, scalars: &[Scalar]) -> Map<String, Value> {
    let mut object = Map::new();
    object.insert("step".to_owned(), step.into());
    object.insert("run_name".to_owned(), run_name.into());
    object.insert("wall_time".to_owned(), ((wall_time * 1e3).round() / 1e3).into());
    let mut non_finite = Map::new();
    for (key, value) in scalars {
        let word = match value {
            v if v.is_nan() => Some("NaN"),
            v if v.is_infinite() => Some(if *v > 0.0 { "Infinity" } else { "-Infinity" }),
            _ => None,
        };
        if let Some(word) = word {
            non_finite.insert((*key).to_owned(), word.into());
        }
        object.insert((*key).to_owned(), Value::from(*value));
    }
    if !non_finite.is_empty() {
        object.insert("non_finite".to_owned(), non_finite.into());
    }
    object
}

/// Rewrites a file without the lines that a run from `first_step` will log again. The result appears by a rename.
fn cut_back(path: &Path, run_name: &str, first_step: u64, key: &'static str) -> Result<()> {
    let source = match fs::File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e.into()),
    };
    // Writing a link's target anew would break the link.
    let path = &fs::canonicalize(path)?;
    let regular = source.metadata()?.is_file();
    if !regular {
        return Ok(()); // such as /dev/stderr: there is nothing to cut
    }
    let mut dropped = 0u64;
    each_line(&source, |line, whole, index| {
        let stamp = stamp(line);
        if index == 0 && whole && stamp.is_none() {
            return Err(MetricsError::Foreign { path: path.clone(), key });
        }
        dropped += u64::from(!keeps(stamp.as_ref(), whole, run_name, first_step));
        Ok(())
    })?;
    if dropped == 0 {
        return Ok(());
    }
    let staged = sibling(path, ".new");
    let mut out = BufWriter::new(fs::File::create(&staged)?);
    each_line(&source, |line, whole, _| {
        if keeps(stamp(line).as_ref(), whole, run_name, first_step) {
            out.write_all(line)?;
        }
        Ok(())
    })?;
    out.into_inner().map_err(std::io::IntoInnerError::into_error)?.sync_all()?;
    if first_step == 0 {
        let previous = sibling(path, ".previous");
        match fs::remove_file(&previous) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e.into()),
            _ => fs::hard_link(path, &previous).or_else(|_| fs::copy(path, &previous).map(drop))?,
        }
    }
    fs::rename(&staged, path)?;
    Ok(())
}

/// Damaged lines inside the file stay for the reader to report; an unfinished last one goes.
fn keeps(stamp: Option<&Stamp>, whole: bool, run_name: &str, first_step: u64) -> bool {
    whole
        && stamp
            .is_none_or(|s| s.step < first_step as f64 || s.run_name.as_ref().is_some_and(|theirs| theirs != run_name))
}

fn stamp(line: &[u8]) -> Option<Stamp> {
    serde_json::from_slice(&finite_words(line)).ok()
}

/// Goes through the lines of a file from its beginning: bytes with their end, whether they have one, and an index.
fn each_line(file: &fs::File, mut visit: impl FnMut(&[u8], bool, usize) -> Result<()>) -> Result<()> {
    let mut file = file;
    file.seek(SeekFrom::Start(0))?;
    let mut reader = BufReader::new(file);
    let mut line = Vec::new();
    for index in 0.. {
        line.clear();
        // A foreign file without line ends must not fill the memory.
        if reader.by_ref().take(MAX_LINE).read_until(b'\n', &mut line)? == 0 {
            break;
        }
        visit(&line, line.ends_with(b"\n"), index)?;
    }
    Ok(())
}

/// Longest piece that is looked at as a line, in bytes.
pub(super) const MAX_LINE: u64 = 1 << 24;

/// A line in which Python's words for what JSON does not know are replaced: `NaN`, `Infinity`, `-Infinity` as values
/// become null. Only a line that is no JSON is worth it.
pub(super) fn finite_words(line: &[u8]) -> std::borrow::Cow<'_, [u8]> {
    let has = |word: &[u8]| line.windows(word.len()).any(|w| w == word);
    if !has(b": NaN") && !has(b": Infinity") && !has(b": -Infinity") {
        return line.into();
    }
    let text = String::from_utf8_lossy(line);
    let text = text.replace(": NaN", ": null").replace(": Infinity", ": null").replace(": -Infinity", ": null");
    text.into_bytes().into()
}

fn sibling(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn steps(path: &Path) -> Vec<u64> {
        let text = fs::read_to_string(path).unwrap();
        text.lines().map(|l| serde_json::from_str::<Value>(l).unwrap()["step"].as_u64().unwrap()).collect()
    }

    fn write(path: &Path, run: &str, steps: impl IntoIterator<Item = u64>) {
        let mut file =
            JsonLines { file: fs::OpenOptions::new().create(true).append(true).open(path).unwrap(), length: 0 };
        for step in steps {
            file.append(&object(run, step, 1.5, &[("learning/loss", 2.0)])).unwrap();
        }
    }

    #[test]
    fn a_resumed_run_has_each_step_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.jsonl");
        write(&path, "a", 0..8);
        fs::OpenOptions::new().append(true).open(&path).unwrap().write_all(b"{\"step\": 8, \"lea").unwrap();
        let mut file = JsonLines::open(&path, "a", 5, "metrics_file").unwrap();
        file.append(&object("a", 5, 2.0, &[])).unwrap();
        assert_eq!(steps(&path), [0, 1, 2, 3, 4, 5]);
        assert!(!dir.path().join("m.jsonl.new").exists() && !dir.path().join("m.jsonl.previous").exists());
        // A torn line alone goes as well, with nothing to drop before it.
        fs::OpenOptions::new().append(true).open(&path).unwrap().write_all(b"{\"st").unwrap();
        JsonLines::open(&path, "a", 6, "metrics_file").unwrap();
        assert_eq!(steps(&path), [0, 1, 2, 3, 4, 5]);
    }

    #[test]
    fn a_fresh_run_keeps_the_file_it_replaces() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.jsonl");
        for n in [4, 3] {
            write(&path, "a", 0..n);
            JsonLines::open(&path, "a", 0, "metrics_file").unwrap();
            assert_eq!(fs::read(&path).unwrap(), b"");
            assert_eq!(steps(&dir.path().join("m.jsonl.previous")).len() as u64, n);
        }
    }

    #[test]
    fn lines_of_other_runs_and_damaged_ones_stay() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.jsonl");
        write(&path, "other", 7..9);
        fs::OpenOptions::new().append(true).open(&path).unwrap().write_all(b"{\"step\": 8, \"le\xff\n").unwrap();
        write(&path, "a", 0..3);
        JsonLines::open(&path, "a", 1, "metrics_file").unwrap();
        let text = fs::read(&path).unwrap();
        let lines: Vec<_> = text.split(|b| *b == b'\n').filter(|l| !l.is_empty()).collect();
        assert_eq!(lines.len(), 4);
        assert_eq!(lines[2], b"{\"step\": 8, \"le\xff");
    }

    #[test]
    fn other_files_are_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notes.txt");
        fs::write(&path, "milk\neggs\n").unwrap();
        let error = JsonLines::open(&path, "a", 0, "metrics_file").unwrap_err().to_string();
        assert!(error.contains("notes.txt") && error.contains("metrics_file"), "{error}");
        assert_eq!(fs::read(&path).unwrap(), b"milk\neggs\n");
    }

    #[test]
    fn what_is_no_number_is_valid_json() {
        let values = [("a", f64::NAN), ("b", f64::INFINITY), ("c", f64::NEG_INFINITY), ("d", 0.5)];
        let text = serde_json::to_string(&object("r", 3, 1.0, &values)).unwrap();
        assert_eq!(
            text,
            r#"{"step":3,"run_name":"r","wall_time":1.0,"a":null,"b":null,"c":null,"d":0.5,"non_finite":{"a":"NaN","b":"Infinity","c":"-Infinity"}}"#
        );
    }

    #[test]
    fn words_of_python() {
        let theirs = br#"{"learning/loss": NaN, "x": -Infinity, "step": 3.0, "run_name": "a"}"#;
        assert!(stamp(theirs).is_some_and(|s| s.step == 3.0));
        assert_eq!(&*finite_words(b"{\"a\": 1}"), b"{\"a\": 1}");
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn a_full_disk_is_an_error() {
        let mut file = JsonLines::open(Path::new("/dev/full"), "a", 0, "metrics_file").unwrap();
        let error = file.append(&object("a", 0, 1.0, &[])).unwrap_err().to_string();
        assert!(error.contains("/dev/full"), "{error}");
    }

    #[test]
    fn links_survive() {
        let dir = tempfile::tempdir().unwrap();
        let (real, link) = (dir.path().join("real.jsonl"), dir.path().join("link.jsonl"));
        write(&real, "a", 0..3);
        std::os::unix::fs::symlink(&real, &link).unwrap();
        JsonLines::open(&link, "a", 2, "metrics_file").unwrap();
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(steps(&real), [0, 1]);
    }
}
