//! A record of the boxes that are on disk, in order, for a run that continues an interrupted one.
//!
//! A line is believed only if the bytes have the checksum that it states, so neither a torn line nor a lost page does
//! harm.

use std::io::{self, Write};
use std::path::Path;

use fs_err as fs;

/// Its name in the unfinished directory; gone before anything is committed.
const JOURNAL: &str = ".lapidary-journal";

#[derive(Debug)]
pub(super) struct Journal {
    file: fs::File,
}

impl Journal {
    /// The checksums that the journal of the same copy gives, in the order of the boxes; `None` if the directory holds
    /// none or one of another copy.
    pub(super) fn read(dir: &Path, fingerprint: &str) -> io::Result<Option<Vec<u32>>> {
        let bytes = match fs::read(dir.join(JOURNAL)) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e),
        };
        let text = String::from_utf8_lossy(&bytes);
        let mut lines = text.split_inclusive('\n').map_while(|l| l.strip_suffix('\n'));
        if lines.next() != Some(fingerprint) {
            return Ok(None);
        }
        Ok(Some(lines.map_while(|l| (l.len() == 8).then(|| u32::from_str_radix(l, 16).ok()).flatten()).collect()))
    }

    /// Starts a journal that begins with boxes known to be right.
    pub(super) fn create(dir: &Path, fingerprint: &str, done: &[u32]) -> io::Result<Self> {
        let mut text = format!("{fingerprint}\n");
        for crc in done {
            text += &format!("{crc:08x}\n");
        }
        let mut file = fs::File::create(dir.join(JOURNAL))?;
        file.write_all(text.as_bytes())?;
        Ok(Journal { file })
    }

    /// Records the next box.
    pub(super) fn add(&mut self, crc: u32) -> io::Result<()> {
        self.file.write_all(format!("{crc:08x}\n").as_bytes())
    }

    /// Removes it.
    pub(super) fn remove(dir: &Path) -> io::Result<()> {
        fs::remove_file(dir.join(JOURNAL))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn torn_lines_and_other_copies_are_not_believed() {
        let tmp = tempfile::tempdir().unwrap();
        let dir = tmp.path();
        assert_eq!(Journal::read(dir, "plan").unwrap(), None);
        let mut j = Journal::create(dir, "plan", &[7]).unwrap();
        j.add(u32::MAX).unwrap();
        assert_eq!(Journal::read(dir, "plan").unwrap(), Some(vec![7, u32::MAX]));
        assert_eq!(Journal::read(dir, "other").unwrap(), None);
        let path = dir.join(JOURNAL);
        for tail in ["0000", "00000001", "x0000001\n00000002\n", "1\n"] {
            fs::write(&path, format!("plan\n00000007\nffffffff\n{tail}")).unwrap();
            assert_eq!(Journal::read(dir, "plan").unwrap(), Some(vec![7, u32::MAX]), "{tail:?}");
        }
        fs::write(&path, "pla").unwrap();
        assert_eq!(Journal::read(dir, "plan").unwrap(), None);
        Journal::remove(dir).unwrap();
        assert_eq!(Journal::read(dir, "plan").unwrap(), None);
    }
}
