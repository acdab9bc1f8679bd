//! SHA-256 of files.

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

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

/// [`sha256_of_file`], once per process and state of the file: a plugin has 200 MB and is asked for several times.
pub(crate) fn sha256_of_file_remembered(path: &Path) -> io::Result<String> {
    type State = (PathBuf, u64, SystemTime);
    static KNOWN: Mutex<BTreeMap<State, String>> = Mutex::new(BTreeMap::new());
    let path = fs_err::canonicalize(path)?;
    let metadata = fs_err::metadata(&path)?;
    let state = (path, metadata.len(), metadata.modified()?);
    if let Some(hash) = KNOWN.lock().unwrap_or_else(PoisonError::into_inner).get(&state) {
        return Ok(hash.clone());
    }
    let hash = sha256_of_file(&state.0)?;
    KNOWN.lock().unwrap_or_else(PoisonError::into_inner).insert(state, hash.clone());
    Ok(hash)
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
}
