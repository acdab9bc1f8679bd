//! A record of the chunks that are on disk, for a run that continues an interrupted one.
//!
//! A line is appended after a chunk's bytes were handed to the system. It is believed only if the bytes have the checksum
//! that it states, so neither a torn line nor a lost page does harm.

use std::io::{self, Write};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use fs_err as fs;

/// Its name in the unfinished item directory; gone before anything is committed.
pub(super) const JOURNAL: &str = ".lapidary-journal";

/// A chunk that was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) array: usize,
    pub(super) number: usize,
    pub(super) length: u64,
    pub(super) crc: u32,
}

#[derive(Debug)]
pub(super) struct Journal {
    file: Mutex<fs::File>,
}

impl Journal {
    /// Whether a directory holds the journal of this plan.
    pub(super) fn is_of(items: &Path, fingerprint: &str) -> io::Result<bool> {
        match fs::read(items.join(JOURNAL)) {
            Ok(bytes) => Ok(bytes.strip_prefix(fingerprint.as_bytes()).is_some_and(|rest| rest.starts_with(b"\n"))),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// Starts a journal, or continues the one of the same plan and gives what it says.
    pub(super) fn open(items: &Path, fingerprint: &str) -> io::Result<(Self, Vec<Record>)> {
        let path = items.join(JOURNAL);
        let text = match fs::read(&path) {
            Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
            Err(e) if e.kind() == io::ErrorKind::NotFound => String::new(),
            Err(e) => return Err(e),
        };
        let mut lines = text.split_inclusive('\n');
        let same = lines.next().is_some_and(|l| l.trim_end() == fingerprint);
        if same {
            let records = lines.filter_map(parse).collect();
            let mut file = fs::OpenOptions::new().append(true).open(&path)?;
            // The last line may have been cut short.
            file.write_all(b"\n")?;
            return Ok((Journal { file: Mutex::new(file) }, records));
        }
        let mut file = fs::File::create(&path)?;
        file.write_all(format!("{fingerprint}\n").as_bytes())?;
        Ok((Journal { file: Mutex::new(file) }, Vec::new()))
    }

    pub(super) fn add(&self, r: &Record) -> io::Result<()> {
        let line = format!("{} {} {} {:08x}\n", r.array, r.number, r.length, r.crc);
        self.file.lock().unwrap_or_else(PoisonError::into_inner).write_all(line.as_bytes())
    }
}

fn parse(line: &str) -> Option<Record> {
    let mut words = line.strip_suffix('\n')?.split(' ');
    let record = Record {
        array: words.next()?.parse().ok()?,
        number: words.next()?.parse().ok()?,
        length: words.next()?.parse().ok()?,
        crc: words.next().filter(|w| w.len() == 8).and_then(|w| u32::from_str_radix(w, 16).ok())?,
    };
    words.next().is_none().then_some(record)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_recorded_is_found_and_torn_lines_are_not() {
        let tmp = tempfile::tempdir().unwrap();
        let r = |array, crc| Record { array, number: 7, length: 1 << 40, crc };
        let (journal, found) = Journal::open(tmp.path(), "plan a").unwrap();
        assert!(found.is_empty());
        journal.add(&r(1, 5)).unwrap();
        journal.add(&r(2, u32::MAX)).unwrap();
        let path = tmp.path().join(JOURNAL);
        let mut bytes = fs::read(&path).unwrap();
        bytes.extend(b"3 7 1099511627776 000000");
        fs::write(&path, bytes).unwrap();
        let (again, found) = Journal::open(tmp.path(), "plan a").unwrap();
        assert_eq!(found, [r(1, 5), r(2, u32::MAX)]);
        again.add(&r(4, 1)).unwrap();
        assert_eq!(Journal::open(tmp.path(), "plan a").unwrap().1.len(), 3);
        assert!(Journal::open(tmp.path(), "plan b").unwrap().1.is_empty());
        assert!(Journal::open(tmp.path(), "plan a").unwrap().1.is_empty());
    }
}
