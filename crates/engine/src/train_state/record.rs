//! `trainer.json`: what a run needs besides arrays, and what the directory consists of.

use std::io;
use std::path::Path;

use checkpoint::commit::is_incomplete;
use checkpoint::manifest::{MANIFEST_FILE, Manifest, ManifestFile};
use fs_err as fs;
use serde::{Deserialize, Serialize};

use super::TrainerState;

/// Name of the file within a checkpoint.
pub const STATE_FILE: &str = "trainer.json";
/// The format that is written and read.
pub const FORMAT: u32 = 1;

/// Largest `trainer.json` that is read, in bytes.
const MAX_LEN: u64 = 64 << 20;

/// The content of `trainer.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Record {
    #[serde(flatten)]
    pub(super) state: TrainerState,
    /// Parameters without moments: their files may be linked into later checkpoints.
    pub(super) frozen: Vec<String>,
    /// Every other file of the directory but the manifest.
    pub(super) files: Vec<ManifestFile>,
}

impl Record {
    /// Writes the record and, after it, the manifest of the whole directory.
    pub(super) fn write(&self, dir: &Path) -> io::Result<()> {
        let mut text = serde_json::to_string_pretty(self)?;
        text.push('\n');
        let mut manifest = Manifest { files: self.files.clone() };
        manifest.files.push(ManifestFile::of_bytes(STATE_FILE, text.as_bytes()));
        manifest.write(dir)?;
        fs::write(dir.join(STATE_FILE), text)
    }

    /// Reads a record and checks everything that costs nothing: that it belongs to the manifest, and that all files have
    /// the lengths it gives. The error is a sentence without its full stop.
    pub(super) fn read(dir: &Path, step: u64) -> Result<Self, String> {
        if is_incomplete(dir) {
            return Err("it was not written to its end".to_owned());
        }
        let path = dir.join(STATE_FILE);
        let len = fs::metadata(&path).map_err(|e| e.to_string())?.len();
        if len > MAX_LEN {
            return Err(format!("{STATE_FILE} has {len} bytes, more than the limit of {MAX_LEN}"));
        }
        let bytes = fs::read(&path).map_err(|e| e.to_string())?;
        let manifest = Manifest::read(dir).map_err(|e| e.to_string())?;
        let manifest = manifest.ok_or_else(|| format!("{MANIFEST_FILE} is missing"))?;
        let own = ManifestFile::of_bytes(STATE_FILE, &bytes);
        let Some((last, rest)) = manifest.files.split_last() else {
            return Err(format!("{MANIFEST_FILE} names no files"));
        };
        if *last != own {
            return Err(format!("{STATE_FILE} is not the one that {MANIFEST_FILE} describes"));
        }
        // The number alone, so that a later format is named and not taken for damage.
        #[derive(Deserialize)]
        struct Format {
            format: u32,
        }
        let bad = |e: serde_json::Error| format!("{STATE_FILE} does not parse: {e}");
        let Format { format } = serde_json::from_slice(&bytes).map_err(bad)?;
        if format != FORMAT {
            return Err(format!("{STATE_FILE} has format {format}, this version reads {FORMAT}"));
        }
        let record: Self = serde_json::from_slice(&bytes).map_err(bad)?;
        if record.files != rest {
            return Err(format!("{STATE_FILE} and {MANIFEST_FILE} describe different files"));
        }
        if record.state.step != step {
            return Err(format!("{STATE_FILE} is of step {}", record.state.step));
        }
        for f in &record.files {
            let found = fs::metadata(dir.join(&f.name)).map_err(|e| e.to_string())?.len();
            if found != f.bytes {
                return Err(format!("{} has {found} bytes instead of {}", f.name, f.bytes));
            }
        }
        Ok(record)
    }

    /// What tells this checkpoint from another of the same step; `None` if nothing does.
    pub(super) fn differs(&self, new: &TrainerState) -> Option<String> {
        let old = &self.state;
        if old.optimizer != new.optimizer {
            return Some(format!("optimizer ({} instead of {})", old.optimizer, new.optimizer));
        }
        if old.trained != new.trained {
            return Some("set of trained parameters".to_owned());
        }
        let keys = old.keys.keys().chain(new.keys.keys());
        for key in keys {
            if old.keys.get(key) != new.keys.get(key) {
                return Some(format!("value of `{key}`"));
            }
        }
        (old.cursor != new.cursor).then(|| "place in the training data".to_owned())
    }
}
