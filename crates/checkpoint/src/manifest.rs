//! SHA-256 of every file of a directory, written beside them and checked on demand.

use std::io::{self, Read};
use std::path::{Path, PathBuf};

use fs_err as fs;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// Name of the manifest within a directory.
pub const MANIFEST_FILE: &str = "lapidary_manifest.json";

/// Largest manifest that is read, in bytes.
const MAX_LEN: u64 = 64 << 20;

/// The files of a directory with their digests.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Manifest {
    /// Every file but the manifest itself, in the order of writing.
    pub files: Vec<ManifestFile>,
}

/// One file of a [`Manifest`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ManifestFile {
    /// Path below the directory, with `/` between elements.
    pub name: String,
    /// Size in bytes.
    pub bytes: u64,
    /// SHA-256 in lower-case hexadecimal.
    pub sha256: String,
}

/// What can be wrong with a directory that has a manifest.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// A file cannot be read; the source names it.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The manifest does not parse.
    #[error("{path}: {source}")]
    Json {
        /// The manifest.
        path: PathBuf,
        /// What the parser says.
        source: serde_json::Error,
    },
    /// The manifest is too large to be one.
    #[error("{path} has {len} bytes, more than the limit of {MAX_LEN}")]
    TooLarge {
        /// The manifest.
        path: PathBuf,
        /// Its size.
        len: u64,
    },
    /// The manifest names a file outside its directory.
    #[error("{path} names {name:?}, which leaves its directory")]
    Name {
        /// The manifest.
        path: PathBuf,
        /// The name given.
        name: String,
    },
    /// A file has another size.
    #[error("{path} has {found} bytes, the manifest says {expected}")]
    Size {
        /// The file.
        path: PathBuf,
        /// Its size.
        found: u64,
        /// Size in the manifest.
        expected: u64,
    },
    /// A file has another digest.
    #[error("{path} is damaged: its SHA-256 is {found}, the manifest says {expected}")]
    Digest {
        /// The file.
        path: PathBuf,
        /// Its digest.
        found: String,
        /// Digest in the manifest.
        expected: String,
    },
}

impl Manifest {
    /// Writes the manifest into a directory.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write(&self, dir: &Path) -> io::Result<()> {
        let mut text = serde_json::to_string_pretty(self)?;
        text.push('\n');
        fs::write(dir.join(MANIFEST_FILE), text)
    }

    /// Reads the manifest of a directory; `None` if it has none.
    ///
    /// # Errors
    /// When it cannot be read or parsed.
    pub fn read(dir: &Path) -> Result<Option<Self>, ManifestError> {
        let path = dir.join(MANIFEST_FILE);
        let len = match fs::metadata(&path) {
            Ok(meta) => meta.len(),
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e.into()),
        };
        if len > MAX_LEN {
            return Err(ManifestError::TooLarge { path, len });
        }
        let manifest: Self = serde_json::from_slice(&fs::read(&path)?)
            .map_err(|source| ManifestError::Json { path: path.clone(), source })?;
        for f in &manifest.files {
            let plain = f.name.split('/').all(|e| !e.is_empty() && e != "." && e != "..");
            if !plain || f.name.contains(['\\', '\0']) {
                return Err(ManifestError::Name { path, name: f.name.clone() });
            }
        }
        Ok(Some(manifest))
    }

    /// Reads every file of the directory and compares sizes and digests.
    ///
    /// # Errors
    /// For the first file that is missing or differs.
    pub fn verify(&self, dir: &Path) -> Result<(), ManifestError> {
        for f in &self.files {
            let path = dir.join(&f.name);
            let found = fs::metadata(&path)?.len();
            if found != f.bytes {
                return Err(ManifestError::Size { path, found, expected: f.bytes });
            }
            let found = sha256_file(&path)?;
            if found != f.sha256 {
                return Err(ManifestError::Digest { path, found, expected: f.sha256.clone() });
            }
        }
        Ok(())
    }
}

impl ManifestFile {
    /// The entry of a file whose bytes are at hand.
    #[must_use]
    pub fn of_bytes(name: &str, bytes: &[u8]) -> Self {
        let sha256 = hex(&Sha256::digest(bytes));
        ManifestFile { name: name.to_owned(), bytes: bytes.len() as u64, sha256 }
    }
}

/// SHA-256 of a file in lower-case hexadecimal.
///
/// # Errors
/// When the file cannot be read.
pub fn sha256_file(path: &Path) -> io::Result<String> {
    let mut file = fs::File::open(path)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hex(&hasher.finalize())),
            n => hasher.update(&buffer[..n]),
        }
    }
}

/// Lower-case hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut s, b| {
        // Writing to a string cannot fail.
        let _ = write!(s, "{b:02x}");
        s
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_change_is_found() {
        let tmp = tempfile::tempdir().unwrap();
        let dir = tmp.path();
        assert_eq!(Manifest::read(dir).unwrap(), None);
        fs::create_dir(dir.join("sub")).unwrap();
        fs::write(dir.join("sub/f"), b"abc").unwrap();
        let m = Manifest { files: vec![ManifestFile::of_bytes("sub/f", b"abc")] };
        assert_eq!(m.files[0].sha256, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        m.write(dir).unwrap();
        let back = Manifest::read(dir).unwrap().unwrap();
        assert_eq!(back, m);
        back.verify(dir).unwrap();
        fs::write(dir.join("sub/f"), b"abd").unwrap();
        assert!(matches!(back.verify(dir), Err(ManifestError::Digest { .. })));
        fs::write(dir.join("sub/f"), b"ab").unwrap();
        assert!(matches!(back.verify(dir), Err(ManifestError::Size { found: 2, expected: 3, .. })));
        fs::remove_file(dir.join("sub/f")).unwrap();
        assert!(matches!(back.verify(dir), Err(ManifestError::Io(_))));
    }

    #[test]
    fn names_stay_inside() {
        let tmp = tempfile::tempdir().unwrap();
        for name in ["../x", "/etc/passwd", "a//b", "", "a/../../b", "a\\b"] {
            Manifest { files: vec![ManifestFile::of_bytes(name, b"")] }.write(tmp.path()).unwrap();
            assert!(matches!(Manifest::read(tmp.path()), Err(ManifestError::Name { .. })), "{name}");
        }
        fs::write(tmp.path().join(MANIFEST_FILE), "[").unwrap();
        assert!(matches!(Manifest::read(tmp.path()), Err(ManifestError::Json { .. })));
    }
}
