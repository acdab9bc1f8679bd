//! Where keys lead to bytes: an OCDBT store, or a directory of files.

use std::collections::HashMap;
use std::io;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use fs_err as fs;

use super::ocdbt::{Kept, Store, StoreError};
use crate::mmap::{MappedBytes, MappedFile};

/// Name of the manifest of an OCDBT store.
pub(super) const MANIFEST: &str = "manifest.ocdbt";
/// Start of the names of the stores that the processes of a job write before they are merged.
pub(super) const PROCESS: &str = "ocdbt.process_";

/// Bytes of a value.
pub(super) enum Blob<'a> {
    Inline(&'a [u8]),
    Mapped(MappedBytes),
    Empty,
}

impl Deref for Blob<'_> {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match self {
            Blob::Inline(b) => b,
            Blob::Mapped(m) => m.as_slice(),
            Blob::Empty => &[],
        }
    }
}

/// How the arrays of a checkpoint are kept.
#[derive(Debug)]
pub(super) enum Container {
    Ocdbt { store: Store, maps: Mutex<HashMap<u32, Arc<MappedFile>>>, merged: bool, inline_bytes: u64 },
    Files { root: PathBuf },
}

/// The per-process stores below an item directory, in order.
pub(super) fn process_stores(root: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(root)? {
        let entry = entry?;
        let name = entry.file_name();
        if name.to_string_lossy().starts_with(PROCESS) && entry.path().join(MANIFEST).is_file() {
            found.push(entry.path());
        }
    }
    found.sort();
    Ok(found)
}

impl Container {
    pub(super) fn open(root: &Path) -> Result<Self, StoreError> {
        let processes = process_stores(root)?;
        let (store, merged) = if root.join(MANIFEST).is_file() {
            (Store::open(root)?, true)
        } else if !processes.is_empty() {
            (Store::open_all(&processes)?, false)
        } else {
            return Ok(Container::Files { root: root.to_owned() });
        };
        let inline = store.entries().iter().map(|e| if let Kept::Inline(b) = &e.value { b.len() as u64 } else { 0 });
        let inline_bytes = inline.sum();
        Ok(Container::Ocdbt { store, maps: Mutex::default(), merged, inline_bytes })
    }

    /// Every array with the zarr versions of its metadata, by name.
    pub(super) fn arrays(&self) -> io::Result<Vec<(String, u8)>> {
        let mut out = Vec::new();
        match self {
            Container::Ocdbt { store, .. } => {
                for entry in store.entries() {
                    let Ok(key) = std::str::from_utf8(&entry.key) else { continue };
                    if let Some(name) = key.strip_suffix("/zarr.json") {
                        out.push((name.to_owned(), 3));
                    } else if let Some(name) = key.strip_suffix("/.zarray") {
                        out.push((name.to_owned(), 2));
                    }
                }
            }
            Container::Files { root } => {
                for entry in fs::read_dir(root)? {
                    let entry = entry?;
                    let Ok(name) = entry.file_name().into_string() else { continue };
                    let path = entry.path();
                    if path.join("zarr.json").is_file() {
                        out.push((name.clone(), 3));
                    }
                    if path.join(".zarray").is_file() {
                        out.push((name, 2));
                    }
                }
            }
        }
        out.retain(|(name, _)| !name.is_empty());
        out.sort();
        Ok(out)
    }

    /// Size of a value, or `None` if there is no such key. That the file has those bytes is checked.
    pub(super) fn len(&self, key: &str) -> io::Result<Option<u64>> {
        match self {
            Container::Ocdbt { .. } => Ok(self.get(key)?.map(|b| b.len() as u64)),
            Container::Files { root } => match fs::metadata(root.join(key)) {
                Ok(m) => Ok(Some(m.len())),
                Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
                Err(e) => Err(e),
            },
        }
    }

    /// A value, or `None` if there is no such key.
    pub(super) fn get(&self, key: &str) -> io::Result<Option<Blob<'_>>> {
        match self {
            Container::Ocdbt { store, maps, .. } => match store.get(key.as_bytes()) {
                None => Ok(None),
                Some(Kept::Inline(b)) => Ok(Some(Blob::Inline(b))),
                Some(Kept::Range { length: 0, .. }) => Ok(Some(Blob::Empty)),
                Some(&Kept::Range { file, offset, length }) => {
                    let map = Self::map(store, maps, file)?;
                    let range = usize::try_from(offset).ok().zip(usize::try_from(length).ok());
                    let bytes = range.and_then(|(o, n)| map.bytes(o..o.checked_add(n)?));
                    bytes.map(|b| Some(Blob::Mapped(b))).ok_or_else(|| {
                        let path = store.files()[file as usize].display();
                        let n = map.len();
                        io::Error::new(
                            io::ErrorKind::UnexpectedEof,
                            format!("{path} has {n} bytes; {length} bytes at byte {offset} belong to {key}"),
                        )
                    })
                }
            },
            Container::Files { root } => {
                let path = root.join(key);
                match fs::metadata(&path) {
                    Ok(m) if m.is_file() && m.len() == 0 => return Ok(Some(Blob::Empty)),
                    Ok(_) => {}
                    Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
                    Err(e) => return Err(e),
                }
                let map = MappedFile::open(&path)?;
                let n = map.len();
                Ok(map.bytes(0..n).map(Blob::Mapped))
            }
        }
    }

    /// Bytes of all data files that were needed so far; what several keys share counts once.
    pub(super) fn file_bytes(&self) -> u64 {
        match self {
            Container::Ocdbt { maps, inline_bytes, .. } => {
                let maps = maps.lock().unwrap_or_else(PoisonError::into_inner);
                maps.values().fold(*inline_bytes, |n, m| n.saturating_add(m.len() as u64))
            }
            Container::Files { .. } => u64::MAX,
        }
    }

    fn map(store: &Store, maps: &Mutex<HashMap<u32, Arc<MappedFile>>>, file: u32) -> io::Result<Arc<MappedFile>> {
        let mut maps = maps.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(map) = maps.get(&file) {
            return Ok(Arc::clone(map));
        }
        let map = MappedFile::open(&store.files()[file as usize])?;
        maps.insert(file, Arc::clone(&map));
        Ok(map)
    }

    /// `OCDBT` or `files`, with what is worth knowing.
    pub(super) fn describe(&self) -> String {
        match self {
            Container::Ocdbt { store, merged, .. } => {
                let merged = if *merged { "" } else { ", processes not merged" };
                let (files, keys) = (store.files().len(), store.entries().len());
                format!("OCDBT, {keys} keys in {files} files{merged}")
            }
            Container::Files { .. } => "plain files".to_owned(),
        }
    }
}
