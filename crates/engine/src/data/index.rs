//! Where documents are: the offset of every line, found by one pass over the files.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::files::{Compression, Format, SourceFile};
use super::{DataError, Result, spool};

/// Longest document in bytes. A tokenizer takes many times that in memory.
pub(super) const MAX_DOCUMENT: u64 = 64 << 20;

/// Bytes read at a time.
const CHUNK: usize = 1 << 20;

/// Files kept open at a time, so that a data set of thousands of files does not meet the system's limit.
const MAX_OPEN: usize = 32;

/// Bytes that a text file may begin with and that are not text.
const BYTE_ORDER_MARK: &[u8] = b"\xEF\xBB\xBF";

/// What tells a file's content from another's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct FileMark {
    pub(super) name: String,
    /// Length of what is read; uncompressed.
    pub(super) bytes: u64,
    pub(super) crc32c: u32,
}

/// A file with the places of its documents.
#[derive(Debug)]
struct IndexedFile {
    path: PathBuf,
    format: Format,
    /// Length and time of the file when it was read.
    stamp: Stamp,
    mark: FileMark,
    /// Offset of each document: 8 bytes a document is all that is kept.
    offsets: Vec<u64>,
    /// Number of the first document.
    first: u64,
    /// The content, where the file itself cannot be read at any place.
    spool: Option<File>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    bytes: u64,
    modified: Option<SystemTime>,
}

impl Stamp {
    fn of(metadata: &std::fs::Metadata) -> Self {
        Stamp { bytes: metadata.len(), modified: metadata.modified().ok() }
    }
}

/// All documents of some files.
#[derive(Debug)]
pub(super) struct Index {
    files: Vec<IndexedFile>,
    len: u64,
}

/// What a place in the index holds.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct RawDocument {
    pub(super) format: Format,
    /// The line without its end, or what is wrong with it.
    pub(super) line: std::result::Result<Vec<u8>, String>,
}

impl Index {
    /// Reads all files once. Lines of blanks are no documents.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub(super) fn build(files: &[SourceFile], columns: &[String]) -> Result<Self> {
        let scanned: Vec<Result<IndexedFile>> = files.par_iter().map(|file| scan_file(file, columns)).collect();
        let mut files = Vec::with_capacity(scanned.len());
        let mut len = 0;
        for file in scanned {
            let mut file = file?;
            file.first = len;
            len += file.offsets.len() as u64;
            files.push(file);
        }
        Ok(Index { files, len })
    }

    /// Number of documents.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// The files, for messages.
    pub(super) fn names(&self) -> String {
        match self.files.as_slice() {
            [] => "no file".to_owned(),
            [file] => file.path.display().to_string(),
            [file, others @ ..] => format!("{} and {} more", file.path.display(), others.len()),
        }
    }

    /// What tells the content from another's.
    pub(super) fn marks(&self) -> Vec<FileMark> {
        self.files.iter().map(|file| file.mark.clone()).collect()
    }

    /// The file of a document, and its number there.
    fn locate(&self, document: u64) -> Option<(usize, usize)> {
        if document >= self.len {
            return None;
        }
        // The last file that begins at or before it; files without documents share their first with the next.
        let file = self.files.partition_point(|file| file.first <= document).checked_sub(1)?;
        Some((file, usize::try_from(document - self.files[file].first).ok()?))
    }

    /// File and line (from 1) of a document, for messages. Reads the file up to there.
    pub(super) fn place(&self, document: u64) -> (PathBuf, u64) {
        let Some((file, at)) = self.locate(document) else { return (PathBuf::new(), 0) };
        let file = &self.files[file];
        // An unreadable file is reported by who reads its documents; the line is then that of the document's number.
        let line = count_lines(file, file.offsets[at]).unwrap_or(at as u64);
        (file.path.clone(), line + 1)
    }
}

/// Line feeds before an offset.
fn count_lines(file: &IndexedFile, end: u64) -> std::io::Result<u64> {
    let opened;
    let mut input: &File = match &file.spool {
        Some(spool) => spool,
        None => {
            opened = File::open(&file.path)?;
            &opened
        }
    };
    input.seek(SeekFrom::Start(0))?;
    let mut input = input.take(end);
    let mut buffer = vec![0; CHUNK];
    let mut lines = 0;
    loop {
        let read = input.read(&mut buffer)?;
        if read == 0 {
            return Ok(lines);
        }
        lines += memchr::memchr_iter(b'\n', &buffer[..read]).count() as u64;
    }
}

fn scan_file(source: &SourceFile, columns: &[String]) -> Result<IndexedFile> {
    let path = &source.path;
    let file = fs_err::File::open(path)?;
    let stamp = Stamp::of(&file.metadata()?);
    let is_plain = source.compression == Compression::None && source.format != Format::Parquet;
    let (lines, spool) = if is_plain {
        (scan(file, path, source.format)?, None)
    } else {
        let mut spool = spool::unpack(file, source, columns)?;
        spool.seek(SeekFrom::Start(0))?;
        (scan(&spool, path, source.format)?, Some(spool))
    };
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let mark = FileMark { name, bytes: lines.bytes, crc32c: lines.crc32c };
    let (path, format, offsets) = (path.clone(), source.format, lines.offsets);
    Ok(IndexedFile { path, format, stamp, mark, offsets, first: 0, spool })
}

struct Lines {
    offsets: Vec<u64>,
    bytes: u64,
    crc32c: u32,
}

/// Finds the lines that hold more than blanks.
fn scan(mut input: impl Read, path: &Path, format: Format) -> Result<Lines> {
    let mut buffer = vec![0; CHUNK];
    let mut lines = Lines { offsets: Vec::new(), bytes: 0, crc32c: 0 };
    // Start of the line that is being read, and whether it is known to hold something.
    let (mut start, mut has_content) = (0, false);
    loop {
        let read = match input.read(&mut buffer) {
            Ok(0) => return Ok(lines),
            Ok(read) => read,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error.into()),
        };
        let chunk = &buffer[..read];
        lines.crc32c = crc32c::crc32c_append(lines.crc32c, chunk);
        let mut at = 0;
        if lines.bytes == 0 && chunk.starts_with(BYTE_ORDER_MARK) {
            at = BYTE_ORDER_MARK.len();
            start = at as u64;
        }
        while at < read {
            let end = memchr::memchr(b'\n', &chunk[at..]).map_or(read, |length| at + length);
            if !has_content && let Some(first) = chunk[at..end].iter().find(|byte| !byte.is_ascii_whitespace()) {
                if *first == b'[' && format == Format::Json && lines.offsets.is_empty() {
                    let reason = "it begins with a list; one JSON object a line is read (JSON lines)".to_owned();
                    return Err(DataError::File { path: path.to_owned(), reason });
                }
                has_content = true;
                lines.offsets.push(start);
            }
            if end < read {
                start = lines.bytes + end as u64 + 1;
                has_content = false;
            }
            at = end + 1;
        }
        lines.bytes += read as u64;
    }
}

/// Reads documents, with a few files open at a time.
#[derive(Debug, Default)]
pub(super) struct Reader {
    /// The latest first.
    open: Vec<(usize, File)>,
}

impl Reader {
    /// Reads a document.
    ///
    /// # Errors
    /// When its file cannot be read or was changed after it was indexed.
    pub(super) fn read(&mut self, index: &Index, document: u64) -> Result<RawDocument> {
        let Some((number, at)) = index.locate(document) else {
            return Err(DataError::Cursor(format!("there is no document {document} among {}", index.len)));
        };
        let file = &index.files[number];
        let start = file.offsets[at];
        let end = file.offsets.get(at + 1).copied().unwrap_or(file.mark.bytes);
        // One byte more than allowed tells a long line from a short one that blank lines follow.
        let length = (end - start).min(MAX_DOCUMENT + 1);
        let mut line = vec![0; length as usize];
        let result = match &file.spool {
            Some(spool) => read_at(spool, start, &mut line),
            None => read_at(self.file(index, number)?, start, &mut line),
        };
        result.map_err(|error| {
            if error.kind() == std::io::ErrorKind::UnexpectedEof {
                changed(&file.path)
            } else {
                std::io::Error::new(error.kind(), format!("{}: {error}", file.path.display())).into()
            }
        })?;
        if let Some(end) = memchr::memchr(b'\n', &line) {
            line.truncate(end);
        } else if line.len() as u64 > MAX_DOCUMENT {
            let line = Err(format!("longer than {} MiB", MAX_DOCUMENT >> 20));
            return Ok(RawDocument { format: file.format, line });
        }
        if line.last() == Some(&b'\r') {
            line.pop();
        }
        Ok(RawDocument { format: file.format, line: Ok(line) })
    }

    fn file(&mut self, index: &Index, number: usize) -> Result<&File> {
        let place = self.open.iter().position(|(open, _)| *open == number);
        let entry = match place {
            Some(place) => self.open.remove(place),
            None => {
                let indexed = &index.files[number];
                let (file, path) = fs_err::File::open(&indexed.path)?.into_parts();
                if Stamp::of(&file.metadata()?) != indexed.stamp {
                    return Err(changed(&path));
                }
                (number, file)
            }
        };
        self.open.truncate(MAX_OPEN - 1);
        self.open.insert(0, entry);
        Ok(&self.open[0].1)
    }
}

fn changed(path: &Path) -> DataError {
    DataError::File { path: path.to_owned(), reason: "it was changed while it is being trained on".to_owned() }
}

fn read_at(mut file: &File, offset: u64, into: &mut [u8]) -> std::io::Result<()> {
    file.seek(SeekFrom::Start(offset))?;
    file.read_exact(into)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain(path: PathBuf, format: Format) -> SourceFile {
        SourceFile { path, format, compression: Compression::None }
    }

    fn all(index: &Index) -> Vec<String> {
        let mut reader = Reader::default();
        let text = |document| String::from_utf8(reader.read(index, document).unwrap().line.unwrap()).unwrap();
        (0..index.len()).map(text).collect()
    }

    #[test]
    fn lines_of_any_ending_are_found() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b, c) = (dir.path().join("a"), dir.path().join("b"), dir.path().join("c"));
        fs_err::write(&a, "\u{feff}one\r\n\r\n \t\n  two \nthree").unwrap();
        fs_err::write(&b, "\n\n").unwrap();
        fs_err::write(&c, "four\n\n\n").unwrap();
        let files = [a.clone(), b, c.clone()].map(|path| plain(path, Format::Text));
        let index = Index::build(&files, &[]).unwrap();
        assert_eq!(all(&index), ["one", "  two ", "three", "four"]);
        assert_eq!(index.place(0), (a.clone(), 1));
        assert_eq!(index.place(1), (a.clone(), 4));
        assert_eq!(index.place(2), (a, 5));
        assert_eq!(index.place(3), (c, 1));
        assert!(Reader::default().read(&index, 4).is_err());
        assert_eq!(index.marks()[1], FileMark { name: "b".into(), bytes: 2, crc32c: crc32c::crc32c(b"\n\n") });
    }

    #[test]
    fn lines_longer_than_a_chunk_are_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        let lines = ["x".repeat(CHUNK - 1), "y".repeat(3 * CHUNK), "z".repeat(CHUNK), "end".to_owned()];
        fs_err::write(&path, lines.join("\n")).unwrap();
        let index = Index::build(&[plain(path, Format::Text)], &[]).unwrap();
        assert_eq!(all(&index), lines);
        assert_eq!(index.place(3).1, 4);
    }

    #[test]
    fn giant_lines_are_bad_and_followed_by_good_ones() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        let mut text = vec![b'x'; MAX_DOCUMENT as usize + 1];
        text.extend(b"\nshort");
        text.extend(vec![b'\n'; MAX_DOCUMENT as usize + 9]);
        fs_err::write(&path, text).unwrap();
        let index = Index::build(&[plain(path, Format::Text)], &[]).unwrap();
        let mut reader = Reader::default();
        assert_eq!(index.len(), 2);
        assert_eq!(reader.read(&index, 0).unwrap().line, Err("longer than 64 MiB".to_owned()));
        assert_eq!(reader.read(&index, 1).unwrap().line, Ok(b"short".to_vec()));
    }

    #[test]
    fn changes_and_lists_are_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.json");
        fs_err::write(&path, " [\n{}]").unwrap();
        let error = Index::build(&[plain(path.clone(), Format::Json)], &[]).unwrap_err().to_string();
        assert!(error.contains("begins with a list"), "{error}");
        fs_err::write(&path, "one\ntwo\n").unwrap();
        let index = Index::build(&[plain(path.clone(), Format::Text)], &[]).unwrap();
        fs_err::write(&path, "one").unwrap();
        let error = Reader::default().read(&index, 1).unwrap_err().to_string();
        assert!(error.contains("changed"), "{error}");
        let error = Index::build(&[plain(dir.path().join("none"), Format::Text)], &[]).unwrap_err().to_string();
        assert!(error.contains("none"), "{error}");
    }

    #[test]
    fn more_files_than_may_be_open() {
        let dir = tempfile::tempdir().unwrap();
        let files: Vec<SourceFile> = (0..3 * MAX_OPEN)
            .map(|number| {
                let path = dir.path().join(number.to_string());
                fs_err::write(&path, format!("{number}\n")).unwrap();
                plain(path, Format::Text)
            })
            .collect();
        let index = Index::build(&files, &[]).unwrap();
        let mut reader = Reader::default();
        for document in (0..index.len()).chain((0..index.len()).rev()) {
            assert_eq!(reader.read(&index, document).unwrap().line, Ok(document.to_string().into_bytes()));
            assert!(reader.open.len() <= MAX_OPEN);
        }
    }
}
