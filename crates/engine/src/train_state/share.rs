//! A checkpoint that several processes write together: each its own files, process 0 the rest and the commit.
//!
//! All of them see the same directory, and meet in nothing else, so that a save needs no messages and can run on a thread.
//! Process 0 opens the hidden directory of the step; the others wait for it, write their files there and, last, a small one
//! that lists them ([`Part`]). Process 0 waits for those lists, checks that together they are the model, and commits.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use checkpoint::commit::{is_incomplete, staging_path};
use checkpoint::manifest::ManifestFile;
use fs_err as fs;
use serde::{Deserialize, Serialize};
use tensor::DType;

use super::StateError;

/// How long processes wait for each other. One that died is noticed by whoever launched it; this is for the network's files.
const PATIENCE: Duration = Duration::from_secs(30 * 60);

/// How often they look.
const PAUSE: Duration = Duration::from_millis(20);

/// Largest list that is read, in bytes.
const MAX_LEN: u64 = 64 << 20;

/// Which of the processes that save together this one is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    /// From 0; that one commits.
    pub process: usize,
    /// How many there are.
    pub count: usize,
}

impl Share {
    /// One process saves everything.
    pub const ALONE: Share = Share { process: 0, count: 1 };

    /// Deals out things of these sizes: who saves each of them. The largest first, each to whoever has least; the same on all
    /// processes.
    #[must_use]
    pub fn deal(self, sizes: &[u64]) -> Vec<usize> {
        let mut order: Vec<usize> = (0..sizes.len()).collect();
        order.sort_by_key(|&i| (std::cmp::Reverse(sizes[i]), i));
        let mut loads = vec![0u64; self.count.max(1)];
        let mut owners = vec![0; sizes.len()];
        for i in order {
            let least = loads.iter().enumerate().min_by_key(|(_, load)| **load).map_or(0, |(p, _)| p);
            owners[i] = least;
            loads[least] += sizes[i];
        }
        owners
    }

    /// The name of one of this process's files: `model-trained-00001` of process 2 is `model-trained-p00002-00001`.
    pub(super) fn file(self, kind: &str, number: usize) -> String {
        match self.process {
            0 => format!("{kind}-{number:05}.safetensors"),
            p => format!("{kind}-p{p:05}-{number:05}.safetensors"),
        }
    }
}

/// A tensor of the model in a file that was written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Listed {
    /// With the prefix.
    pub(super) name: String,
    pub(super) file: String,
    pub(super) elements: u64,
    pub(super) bytes: u64,
    /// Bytes of an element: the widest one names the model's dtype.
    pub(super) element: usize,
}

/// What one process wrote.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Part {
    pub(super) step: u64,
    pub(super) files: Vec<ManifestFile>,
    pub(super) weights: Vec<Listed>,
    /// Names of moments.
    pub(super) moments: Vec<String>,
    /// Why it wrote nothing.
    pub(super) failed: Option<String>,
}

fn list_file(process: usize) -> String {
    format!("part-{process:05}.json")
}

impl Part {
    /// A process that could not write its files: the others need not wait.
    pub(super) fn failed(step: u64, reason: String) -> Self {
        Part { step, failed: Some(reason), ..Part::default() }
    }

    /// Flushes the files, because process 0 may not see what this machine has not sent yet, and then lists them.
    pub(super) fn hand_in(&self, dir: &Path, share: Share) -> Result<(), StateError> {
        for file in &self.files {
            fs::File::open(dir.join(&file.name))?.sync_all()?;
        }
        let name = list_file(share.process);
        let hidden = dir.join(format!(".{name}"));
        fs::write(&hidden, serde_json::to_vec(self).map_err(std::io::Error::from)?)?;
        fs::File::open(&hidden)?.sync_all()?;
        Ok(fs::rename(&hidden, dir.join(name))?)
    }

    /// Waits for what another process wrote, and takes its list away.
    pub(super) fn collect(dir: &Path, process: usize, step: u64) -> Result<Self, StateError> {
        let path = dir.join(list_file(process));
        let bad = |reason: String| StateError::Part { process, step, reason };
        wait(|| path.is_file()).map_err(|after| bad(format!("it has not written them after {after:?}")))?;
        if fs::metadata(&path)?.len() > MAX_LEN {
            return Err(bad(format!("its list of files is longer than {MAX_LEN} bytes")));
        }
        let part: Part = serde_json::from_slice(&fs::read(&path)?).map_err(|e| bad(e.to_string()))?;
        if let Some(reason) = part.failed {
            return Err(bad(reason));
        }
        if part.step != step {
            return Err(bad(format!("it saves step {}", part.step)));
        }
        let mark = format!("-p{process:05}-");
        for f in &part.files {
            let plain = !f.name.contains(['/', '\\']) && f.name.contains(&mark);
            let found = fs::metadata(dir.join(&f.name)).map(|m| m.len()).ok().filter(|_| plain);
            if found != Some(f.bytes) {
                return Err(bad(format!("{} does not lie here with {} bytes", f.name, f.bytes)));
            }
        }
        if let Some(w) = part.weights.iter().find(|w| part.files.iter().all(|f| f.name != w.file)) {
            return Err(bad(format!("{} is said to be in {}, which is not listed", w.name, w.file)));
        }
        fs::remove_file(&path)?;
        Ok(part)
    }
}

/// The widest dtype of weights.
pub(super) fn widest(weights: &[Listed]) -> DType {
    if weights.iter().any(|w| w.element > DType::BF16.size()) { DType::F32 } else { DType::BF16 }
}

/// Waits until process 0 has opened the hidden directory of a step.
pub(super) fn opened(target: &Path, share: Share, step: u64) -> Result<PathBuf, StateError> {
    let dir = staging_path(target)?;
    let bad = |after| {
        let reason = format!("process 0 has not opened {} after {after:?}", dir.display());
        StateError::Part { process: share.process, step, reason }
    };
    wait(|| is_incomplete(&dir)).map_err(bad)?;
    Ok(dir)
}

fn wait(there: impl Fn() -> bool) -> Result<(), Duration> {
    let start = Instant::now();
    while !there() {
        if start.elapsed() > PATIENCE {
            return Err(PATIENCE);
        }
        std::thread::sleep(PAUSE);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loads_are_even_and_the_same_everywhere() {
        let sizes = [5, 1, 9, 3, 3, 7, 0];
        let owners = Share { process: 1, count: 3 }.deal(&sizes);
        assert_eq!(owners, Share { process: 0, count: 3 }.deal(&sizes));
        let load = |p| owners.iter().zip(sizes).filter(|(o, _)| **o == p).map(|(_, s)| s).sum::<u64>();
        assert_eq!([load(0), load(1), load(2)], [9, 10, 9]);
        assert_eq!(Share::ALONE.deal(&sizes), [0; 7]);
    }

    #[test]
    fn lists_are_not_believed() {
        let tmp = tempfile::tempdir().unwrap();
        let share = Share { process: 2, count: 3 };
        fs::write(tmp.path().join("model-trained-p00002-00001.safetensors"), "12345").unwrap();
        let file = |name: &str, bytes| ManifestFile { name: name.into(), bytes, sha256: String::new() };
        let good = Part { step: 4, files: vec![file("model-trained-p00002-00001.safetensors", 5)], ..Part::default() };
        let refused = |part: &Part, word: &str| {
            let text = serde_json::to_vec(part).unwrap();
            fs::write(tmp.path().join("part-00002.json"), text).unwrap();
            let error = Part::collect(tmp.path(), 2, 4).unwrap_err().to_string();
            assert!(error.contains(word) && error.contains("process 2"), "{error}");
        };
        refused(&Part { step: 5, ..good.clone() }, "saves step 5");
        refused(&Part::failed(4, "disk full".into()), "disk full");
        for name in ["../model-trained-p00002-00001.safetensors", "model-trained-00001.safetensors"] {
            refused(&Part { files: vec![file(name, 5)], ..good.clone() }, "does not lie here");
        }
        refused(&Part { files: vec![file(&good.files[0].name, 6)], ..good.clone() }, "6 bytes");
        let stray = Listed { name: "a".into(), file: "b".into(), elements: 1, bytes: 4, element: 4 };
        refused(&Part { weights: vec![stray], ..good.clone() }, "a is said to be in b");
        fs::write(tmp.path().join("part-00002.json"), "{").unwrap();
        assert!(Part::collect(tmp.path(), 2, 4).is_err());
        good.hand_in(tmp.path(), share).unwrap();
        assert_eq!(Part::collect(tmp.path(), 2, 4).unwrap(), good);
        assert!(!tmp.path().join("part-00002.json").exists());
    }
}
