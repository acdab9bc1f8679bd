//! Where the stored bytes of one chunk go, with their checksum computed on the way.

use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

use fs_err as fs;

/// Pushes smaller than this are collected before they are written.
const BUFFER: usize = 256 << 10;

#[derive(Debug)]
enum To {
    /// Stays in memory.
    Memory,
    /// A range of a shared file.
    File(Arc<fs::File>),
    /// Memory until it outgrows `limit`, then a file of its own.
    Own { path: PathBuf, limit: usize },
}

/// The destination of one chunk.
#[derive(Debug)]
pub(super) struct Sink {
    to: To,
    alone: bool,
    buffer: Vec<u8>,
    /// Where the buffer goes in the file.
    at: u64,
    pub(super) length: u64,
    pub(super) crc: u32,
}

impl Sink {
    fn new(to: To, at: u64) -> Self {
        let alone = matches!(to, To::Own { .. });
        Sink { to, alone, buffer: Vec::new(), at, length: 0, crc: 0 }
    }

    pub(super) fn memory() -> Self {
        Sink::new(To::Memory, 0)
    }

    pub(super) fn range(file: Arc<fs::File>, offset: u64) -> Self {
        Sink::new(To::File(file), offset)
    }

    pub(super) fn own(path: PathBuf, limit: usize) -> Self {
        Sink::new(To::Own { path, limit }, 0)
    }

    pub(super) fn push(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.crc = crc32c::crc32c_append(self.crc, bytes);
        self.length += bytes.len() as u64;
        if let To::Own { path, limit } = &self.to
            && self.length > *limit as u64
        {
            self.to = To::File(Arc::new(create(path)?));
        }
        if matches!(self.to, To::File(_)) {
            if self.buffer.len() + bytes.len() > BUFFER {
                self.flush()?;
            }
            if bytes.len() > BUFFER {
                return self.write(bytes);
            }
        }
        self.buffer.extend_from_slice(bytes);
        Ok(())
    }

    /// The file that is this chunk's alone, if it got one.
    pub(super) fn own_file(&self) -> Option<Arc<fs::File>> {
        match &self.to {
            To::File(file) if self.alone => Some(Arc::clone(file)),
            _ => None,
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        let buffer = std::mem::take(&mut self.buffer);
        self.write(&buffer)?;
        self.buffer = buffer;
        self.buffer.clear();
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let To::File(file) = &self.to else { return Ok(()) };
        file.file()
            .write_all_at(bytes, self.at)
            .map_err(|e| io::Error::new(e.kind(), format!("failed to write to {}: {e}", file.path().display())))?;
        self.at += bytes.len() as u64;
        Ok(())
    }

    /// Writes what is left. Gives the bytes if they stayed in memory.
    pub(super) fn finish(&mut self) -> io::Result<Option<Vec<u8>>> {
        // An empty chunk is a file too where no tree could hold it.
        if let To::Own { path, limit: 0 } = &self.to {
            self.to = To::File(Arc::new(create(path)?));
        }
        if let To::File(_) = &self.to {
            self.flush()?;
            return Ok(None);
        }
        Ok(Some(std::mem::take(&mut self.buffer)))
    }
}

/// For the compressor.
impl io::Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.push(bytes)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn create(path: &PathBuf) -> io::Result<fs::File> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    fs::File::create(path)
}
