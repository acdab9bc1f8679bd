//! Checksums of the files that the format itself leaves unprotected: JSON, and chunks of version 2.
//!
//! A writer of this crate records them in one more file of the item directory, which other readers pass over.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use fs_err as fs;
use serde_json::{Map, Value, json};

use super::OrbaxError;
use super::tree::read_json;

/// Name of the record.
pub const CHECKSUMS: &str = "lapidary.checksums.json";

/// Sizes and CRC-32C of files, by path below the item directory.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Checksums {
    record: PathBuf,
    files: BTreeMap<String, (u64, u32)>,
}

impl Checksums {
    /// Reads the record of a directory; `None` if it has none.
    pub(super) fn read(items: &Path) -> Result<Option<Self>, OrbaxError> {
        let record = items.join(CHECKSUMS);
        let Some(o) = read_json(&record)? else { return Ok(None) };
        let files = parse(&o);
        let sums = files.map(|files| Checksums { record: record.clone(), files });
        // Compared with its canonical form, so that a damaged record cannot pass for one that lists less.
        match sums {
            Some(s) if fs::read(&record)? == s.to_json() => Ok(Some(s)),
            _ => Err(OrbaxError::Json { path: record, why: "it is not as this program writes it".to_owned() }),
        }
    }

    pub(super) fn insert(&mut self, path: String, size: u64, crc: u32) {
        self.files.insert(path, (size, crc));
    }

    pub(super) fn contains(&self, path: &str) -> bool {
        self.files.contains_key(path)
    }

    /// Compares bytes with the record, if it has them.
    pub(super) fn check(&self, path: &str, bytes: &[u8]) -> Result<(), OrbaxError> {
        let Some(&(size, crc)) = self.files.get(path) else { return Ok(()) };
        let why = if size != bytes.len() as u64 {
            format!("it has {} bytes, {size} were recorded", bytes.len())
        } else if crc != crc32c::crc32c(bytes) {
            "its checksum differs from the recorded one".to_owned()
        } else {
            return Ok(());
        };
        let path = self.record.with_file_name(path);
        Err(OrbaxError::Changed { path, why, record: self.record.clone() })
    }

    /// Checks every recorded file: its size, and its bytes too if `pick` says so.
    pub(super) fn check_files(&self, items: &Path, pick: impl Fn(&str) -> bool) -> Result<(), OrbaxError> {
        for (path, &(size, _)) in &self.files {
            let full = items.join(path);
            let changed = |why| OrbaxError::Changed { path: full.clone(), why, record: self.record.clone() };
            match fs::metadata(&full) {
                Ok(m) if m.len() != size => {
                    return Err(changed(format!("it has {} bytes, {size} were recorded", m.len())));
                }
                Ok(_) if pick(path) => self.check(path, &fs::read(&full)?)?,
                Ok(_) => {}
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Err(changed("it is gone".to_owned())),
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    pub(super) fn to_json(&self) -> Vec<u8> {
        let files: Map<String, Value> =
            self.files.iter().map(|(p, (n, c))| (p.clone(), json!([n, format!("{c:08x}")]))).collect();
        let mut out = serde_json::to_vec_pretty(&json!({"crc32c": files})).unwrap_or_default();
        out.push(b'\n');
        out
    }
}

fn parse(o: &Map<String, Value>) -> Option<BTreeMap<String, (u64, u32)>> {
    let files = o.get("crc32c")?.as_object()?;
    files
        .iter()
        .map(|(path, v)| {
            let [size, crc] = v.as_array()?.as_slice() else { return None };
            // The paths are joined to the directory and opened.
            let safe = path.split('/').all(|part| !matches!(part, "" | "." | ".."));
            let crc = u32::from_str_radix(crc.as_str()?, 16).ok()?;
            safe.then_some((path.clone(), (size.as_u64()?, crc)))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_flipped_bit_is_seen() {
        let tmp = tempfile::tempdir().unwrap();
        assert_eq!(Checksums::read(tmp.path()).unwrap(), None);
        fs::write(tmp.path().join("a"), b"hello").unwrap();
        let mut s = Checksums { record: tmp.path().join(CHECKSUMS), files: BTreeMap::new() };
        s.insert("a".into(), 5, crc32c::crc32c(b"hello"));
        let good = s.to_json();
        fs::write(&s.record, &good).unwrap();
        assert_eq!(Checksums::read(tmp.path()).unwrap().unwrap(), s);
        s.check_files(tmp.path(), |_| true).unwrap();
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            fs::write(&s.record, &bad).unwrap();
            let seen =
                Checksums::read(tmp.path()).and_then(|s| s.unwrap_or_default().check_files(tmp.path(), |_| true));
            assert!(seen.is_err(), "bit {bit}: {}", String::from_utf8_lossy(&bad));
        }
        fs::write(&s.record, &good).unwrap();
        fs::write(tmp.path().join("a"), b"hellp").unwrap();
        assert!(matches!(s.check_files(tmp.path(), |_| true), Err(OrbaxError::Changed { .. })));
        fs::remove_file(tmp.path().join("a")).unwrap();
        assert!(s.check_files(tmp.path(), |_| true).unwrap_err().to_string().contains("gone"));
    }
}
