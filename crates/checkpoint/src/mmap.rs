//! Files mapped read-only, and ranges of them that keep the map alive.

use std::fmt;
use std::io;
use std::ops::{Deref, Range};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use fs_err as fs;
use memmap2::{Advice, Mmap, UncheckedAdvice};

/// A whole file mapped into memory, shared by every [`MappedBytes`] cut from it.
pub struct MappedFile {
    path: PathBuf,
    map: Mmap,
}

impl MappedFile {
    /// Maps a regular file read-only. Pages are read when they are touched.
    ///
    /// # Errors
    /// When the file cannot be opened or mapped, or is no regular file; the message names it.
    pub fn open(path: &Path) -> io::Result<Arc<Self>> {
        let named = |e: io::Error| io::Error::new(e.kind(), format!("cannot map {}: {e}", path.display()));
        // Opening a named pipe would wait for a writer.
        if !fs::metadata(path)?.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{} is not a file", path.display())));
        }
        let file = fs::File::open(path)?;
        // SAFETY: the map is read-only, so nothing in this process changes the bytes behind a shared slice. Another process that rewrites the file while it is in use would: weights are read as plain old
        // data, so that yields other numbers, and truncation ends in SIGBUS. Both are outside what a reader of mapped
        // checkpoints can prevent; this crate's writers replace files by rename and never touch one in place.
        #[allow(unsafe_code)]
        let map = unsafe { Mmap::map(file.file()) }.map_err(named)?;
        Ok(Arc::new(MappedFile { path: path.to_owned(), map }))
    }

    /// The file's path as it was opened.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Size in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.map.len()
    }

    /// Whether the file is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.map.is_empty()
    }

    /// All of the file.
    #[must_use]
    pub fn as_slice(&self) -> &[u8] {
        &self.map
    }

    /// A part of the file, or `None` if it does not lie within it.
    #[must_use]
    pub fn bytes(self: &Arc<Self>, range: Range<usize>) -> Option<MappedBytes> {
        self.map.get(range.clone())?;
        Some(MappedBytes { file: Arc::clone(self), range })
    }

    fn advise(&self, advice: Advice, range: &Range<usize>) {
        if !range.is_empty() {
            // Advice changes speed, never results: a kernel that knows it not is no error.
            let _ = self.map.advise_range(advice, range.start, range.len());
        }
    }
}

impl fmt::Debug for MappedFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MappedFile({}, {} bytes)", self.path.display(), self.len())
    }
}

/// A range of a mapped file. Cloning costs one reference count; the map lives as long as the last clone.
#[derive(Clone)]
pub struct MappedBytes {
    file: Arc<MappedFile>,
    range: Range<usize>,
}

impl MappedBytes {
    /// The file it belongs to.
    #[must_use]
    pub fn file(&self) -> &Arc<MappedFile> {
        &self.file
    }

    /// Where it lies in the file.
    #[must_use]
    pub fn range(&self) -> Range<usize> {
        self.range.clone()
    }

    /// The bytes.
    #[must_use]
    pub fn as_slice(&self) -> &[u8] {
        // The constructor checked the range, and a map does not change its length.
        self.file.map.get(self.range.clone()).unwrap_or_default()
    }

    /// A part of it, relative to its start, or `None` if it does not lie within it.
    #[must_use]
    pub fn slice(&self, range: Range<usize>) -> Option<MappedBytes> {
        let start = self.range.start.checked_add(range.start)?;
        let end = self.range.start.checked_add(range.end)?;
        if start > end || end > self.range.end {
            return None;
        }
        Some(MappedBytes { file: Arc::clone(&self.file), range: start..end })
    }

    /// Says that it will be read from front to back: reads ahead, drops behind.
    pub fn advise_sequential(&self) {
        self.file.advise(Advice::Sequential, &self.range);
    }

    /// Says that single rows will be read: no reading ahead.
    pub fn advise_random(&self) {
        self.file.advise(Advice::Random, &self.range);
    }

    /// Says that it will be read soon.
    pub fn advise_will_need(&self) {
        self.file.advise(Advice::WillNeed, &self.range);
    }

    /// Reads it now into memory, and makes that memory this process's, so that reading it later meets no page fault. Where
    /// that is not to be had, nothing happens.
    pub fn populate(&self) {
        #[cfg(target_os = "linux")]
        self.file.advise(Advice::PopulateRead, &self.range);
    }

    /// Says that it will not be read soon: its pages no longer count as this process's memory. Reading it later is
    /// still correct, at the price of a page fault.
    pub fn advise_dont_need(&self) {
        if !self.range.is_empty() {
            // SAFETY: on a read-only file mapping, dropped pages come back from the file unchanged.
            #[allow(unsafe_code)]
            let _ = unsafe {
                self.file.map.unchecked_advise_range(UncheckedAdvice::DontNeed, self.range.start, self.range.len())
            };
        }
    }
}

impl AsRef<[u8]> for MappedBytes {
    fn as_ref(&self) -> &[u8] {
        self.as_slice()
    }
}

impl Deref for MappedBytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        self.as_slice()
    }
}

impl fmt::Debug for MappedBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MappedBytes({}, {:?})", self.file.path.display(), self.range)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn send_sync<T: Send + Sync + 'static>(_: &T) {}

    #[test]
    fn ranges_outlive_the_file_handle_and_the_name() {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("f");
        fs::write(&path, b"0123456789").unwrap();
        let file = MappedFile::open(&path).unwrap();
        let bytes = file.bytes(2..8).unwrap();
        send_sync(&bytes);
        drop(file);
        fs::remove_file(&path).unwrap();
        assert_eq!(&*bytes, b"234567");
        let inner = bytes.slice(1..3).unwrap();
        assert_eq!(inner.as_ref(), b"34");
        assert_eq!(inner.range(), 3..5);
    }

    #[test]
    fn ranges_outside_are_none() {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("f");
        fs::write(&path, b"0123").unwrap();
        let file = MappedFile::open(&path).unwrap();
        assert!(file.bytes(2..5).is_none());
        #[allow(clippy::reversed_empty_ranges)]
        let reversed = 3..2;
        assert!(file.bytes(reversed).is_none());
        let all = file.bytes(0..4).unwrap();
        assert!(all.slice(0..5).is_none());
        assert!(all.slice(1..usize::MAX).is_none());
        assert!(all.slice(4..4).unwrap().is_empty());
    }

    #[test]
    fn advice_never_changes_the_bytes() {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("f");
        let data: Vec<u8> = (0..100_000u32).map(|i| i as u8).collect();
        fs::write(&path, &data).unwrap();
        let bytes = MappedFile::open(&path).unwrap().bytes(5000..90_001).unwrap();
        bytes.advise_sequential();
        bytes.advise_will_need();
        bytes.advise_random();
        assert_eq!(&*bytes, &data[5000..90_001]);
        bytes.advise_dont_need();
        assert_eq!(&*bytes, &data[5000..90_001]);
    }

    #[test]
    fn empty_files_map_and_directories_do_not() {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("empty");
        fs::write(&path, b"").unwrap();
        let file = MappedFile::open(&path).unwrap();
        assert!(file.is_empty() && file.bytes(0..0).is_some());
        assert!(MappedFile::open(tmp.path()).unwrap_err().to_string().contains("is not a file"));
        let gone = MappedFile::open(&tmp.path().join("gone")).unwrap_err().to_string();
        assert!(gone.contains("gone"), "{gone}");
    }
}
