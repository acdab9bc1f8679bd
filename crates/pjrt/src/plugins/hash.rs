//! SHA-256 of files.

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// Lower-case hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut s, b| {
        let _ = write!(s, "{b:02x}");
        s
    })
}

/// Lower-case hexadecimal SHA-256 of a file.
pub(crate) fn sha256_of_file(path: &Path) -> io::Result<String> {
    let mut file = fs_err::File::open(path)?;
    let mut hasher = Sha256::new();
    let mut block = vec![0u8; 1 << 20];
    loop {
        let n = file.read(&mut block)?;
        if n == 0 {
            return Ok(hex(&hasher.finalize()));
        }
        hasher.update(&block[..n]);
    }
}

/// Smaller files are hashed faster than a memory of them is read.
const WORTH_REMEMBERING: u64 = 16 << 20;
/// A memory with more entries than this starts anew.
const LARGEST_MEMORY: usize = 64;

/// What changes when a file does: size, inode, times of change of contents and of metadata. The last cannot be set by
/// ordinary means.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    size: u64,
    numbers: Vec<i64>,
}

impl State {
    fn of(path: &Path) -> io::Result<Self> {
        let metadata = fs_err::metadata(path)?;
        #[cfg(unix)]
        let numbers = {
            use std::os::unix::fs::MetadataExt as _;
            let m = &metadata;
            vec![m.dev() as i64, m.ino() as i64, m.mtime(), m.mtime_nsec(), m.ctime(), m.ctime_nsec()]
        };
        #[cfg(not(unix))]
        let numbers = {
            let age = metadata.modified()?.duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
            vec![age.as_secs() as i64, i64::from(age.subsec_nanos())]
        };
        Ok(State { size: metadata.len(), numbers })
    }
}

type Memory = BTreeMap<PathBuf, (State, String)>;

/// [`sha256_of_file`], once per state of the file: a plugin has 200 MB, which take 0.2 s of every start otherwise.
/// Remembered in this process and, for large files, in `memory_directory`.
pub(crate) fn sha256_of_file_remembered(path: &Path, memory_directory: Option<&Path>) -> io::Result<String> {
    static KNOWN: Mutex<Memory> = Mutex::new(Memory::new());
    let path = fs_err::canonicalize(path)?;
    let state = State::of(&path)?;
    let file = memory_directory.filter(|_| state.size >= WORTH_REMEMBERING).map(|d| d.join("hashes.json"));
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((then, hash)) = known.get(&path)
        && *then == state
    {
        return Ok(hash.clone());
    }
    let mut memory = file.as_deref().and_then(read_memory).unwrap_or_default();
    if let Some((then, hash)) = memory.get(&path)
        && *then == state
        && hash.len() == 64
    {
        known.insert(path, (state, hash.clone()));
        return Ok(hash.clone());
    }
    let hash = sha256_of_file(&path)?;
    // A file that changed meanwhile is not remembered.
    if State::of(&path)? == state {
        known.insert(path.clone(), (state.clone(), hash.clone()));
        if let Some(file) = file {
            if memory.len() >= LARGEST_MEMORY {
                memory.clear();
            }
            memory.insert(path, (state, hash.clone()));
            write_memory(&file, &memory);
        }
    }
    Ok(hash)
}

fn read_memory(file: &Path) -> Option<Memory> {
    serde_json::from_slice(&fs_err::read(file).ok()?).ok()
}

/// Without a memory all works as well, only slower: trouble is no error.
fn write_memory(file: &Path, memory: &Memory) {
    let temporary = file.with_extension(format!("{}.part", std::process::id()));
    let written = serde_json::to_vec(memory)
        .map_err(io::Error::from)
        .and_then(|bytes| fs_err::write(&temporary, bytes))
        .and_then(|()| fs_err::rename(&temporary, file));
    if written.is_err() {
        let _ = fs_err::remove_file(&temporary);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_known_answer() {
        let wanted = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        fs_err::write(&path, b"abc").unwrap();
        assert_eq!(sha256_of_file(&path).unwrap(), wanted);
        assert!(sha256_of_file(&dir.path().join("none")).is_err());
    }

    #[test]
    fn a_large_file_is_remembered_until_it_changes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let mut bytes = vec![0u8; WORTH_REMEMBERING as usize];
        fs_err::write(&path, &bytes).unwrap();
        let first = sha256_of_file_remembered(&path, Some(dir.path())).unwrap();
        assert_eq!(first, sha256_of_file(&path).unwrap());
        let memory = dir.path().join("hashes.json");
        let canonical = fs_err::canonicalize(&path).unwrap();
        assert_eq!(read_memory(&memory).unwrap()[&canonical].1, first);
        bytes[7] = 1;
        fs_err::write(&path, &bytes).unwrap();
        let second = sha256_of_file_remembered(&path, Some(dir.path())).unwrap();
        assert_ne!(first, second);
        assert_eq!(read_memory(&memory).unwrap()[&canonical].1, second);
        assert_eq!(fs_err::read_dir(dir.path()).unwrap().count(), 2);
        fs_err::write(&memory, b"nonsense").unwrap();
        assert_eq!(read_memory(&memory), None);
    }
}
