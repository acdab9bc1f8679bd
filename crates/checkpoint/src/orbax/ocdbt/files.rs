//! The table of data files inside manifests and nodes.

use super::bytes::{Cursor, FormatError, put_varint};

/// Longest path of a data file.
const MAX_PATH: usize = 65_535;

/// A data file: `base` joins the prefix that nodes read through it inherit, `relative` is the rest of its path.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct DataFile {
    /// Directory prefix with its final `/`, or empty. What a node in this file refers to is relative to it.
    pub base: String,
    /// The rest of the path.
    pub relative: String,
}

impl DataFile {
    /// A file whose nodes refer to files relative to the same place as the table that names it.
    pub fn new(relative: impl Into<String>) -> Self {
        DataFile { base: String::new(), relative: relative.into() }
    }

    /// The same file seen through the prefix under which its table was read.
    #[must_use]
    pub fn below(&self, transitive: &str) -> DataFile {
        DataFile { base: format!("{transitive}{}", self.base), relative: self.relative.clone() }
    }

    /// Path relative to the root of the store.
    #[must_use]
    pub fn path(&self) -> String {
        format!("{}{}", self.base, self.relative)
    }

    /// Whether the path stays below the root of the store on every system.
    #[must_use]
    pub fn is_safe(&self) -> bool {
        let path = self.path();
        !path.is_empty()
            && path.len() <= MAX_PATH
            && !path.contains(['\0', '\\'])
            && path.split('/').all(|part| !matches!(part, "" | "." | ".."))
    }
}

pub(super) fn decode(c: &mut Cursor<'_>, budget: &mut usize) -> Result<Vec<DataFile>, FormatError> {
    let n = c.count("number of data files", 2)?;
    if n == 0 {
        return Ok(Vec::new());
    }
    let prefix = c.lengths(n - 1, MAX_PATH, "data file prefix length")?;
    let suffix = c.lengths(n, MAX_PATH, "data file suffix length")?;
    let base = c.lengths(n, MAX_PATH, "data file base length")?;
    let mut files = Vec::with_capacity(n);
    let mut path: Vec<u8> = Vec::new();
    for i in 0..n {
        let keep = if i == 0 { 0 } else { prefix[i - 1] };
        if keep > path.len() || base[i] > keep.saturating_add(suffix[i]) || keep + suffix[i] > MAX_PATH {
            return Err(FormatError::Invalid(format!("data file {i} has impossible lengths")));
        }
        path.truncate(keep);
        path.extend(c.take(suffix[i] as u64, "data file path")?);
        *budget = budget.checked_sub(path.len()).ok_or(FormatError::Limit {
            what: "total length of data file paths",
            value: path.len() as u64,
            limit: *budget as u64,
        })?;
        let text =
            std::str::from_utf8(&path).map_err(|_| FormatError::Invalid(format!("data file {i} is not UTF-8")))?;
        if !text.is_char_boundary(base[i]) {
            return Err(FormatError::Invalid(format!("data file {i} is split inside a character")));
        }
        let (base, relative) = text.split_at(base[i]);
        let file = DataFile { base: base.to_owned(), relative: relative.to_owned() };
        // Versions without a root refer to an empty path; whoever uses a file asks for a real one.
        if !(file.base.is_empty() && file.relative.is_empty() || file.is_safe()) {
            return Err(FormatError::Invalid(format!("data file {text:?} would lie outside the checkpoint")));
        }
        files.push(file);
    }
    Ok(files)
}

/// Writes a table; the files must be sorted.
pub(super) fn encode(out: &mut Vec<u8>, files: &[DataFile]) {
    put_varint(out, files.len() as u64);
    let paths: Vec<String> = files.iter().map(DataFile::path).collect();
    let mut shared = vec![0];
    for (w, pair) in paths.windows(2).zip(files.windows(2)) {
        let n = w[0].bytes().zip(w[1].bytes()).take_while(|(a, b)| a == b).count();
        // A shared prefix may run past the base only where both bases are equal.
        let bound = if pair[0].base == pair[1].base { n } else { pair[0].base.len().min(pair[1].base.len()) };
        shared.push(n.min(bound));
    }
    for &n in shared.iter().skip(1) {
        put_varint(out, n as u64);
    }
    for (path, n) in paths.iter().zip(&shared) {
        put_varint(out, (path.len() - n) as u64);
    }
    for f in files {
        put_varint(out, f.base.len() as u64);
    }
    for (path, &n) in paths.iter().zip(&shared) {
        out.extend(&path.as_bytes()[n..]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round(files: &[DataFile]) {
        let mut b = Vec::new();
        encode(&mut b, files);
        let mut c = Cursor::new(&b);
        assert_eq!(decode(&mut c, &mut 100_000).unwrap(), files);
        c.finish().unwrap();
    }

    #[test]
    fn tables_round_trip() {
        round(&[]);
        round(&[DataFile::new("d/v")]);
        round(&[
            DataFile::new("d/a"),
            DataFile::new("d/ab"),
            DataFile { base: "p0/".into(), relative: "d/1".into() },
            DataFile { base: "p0/".into(), relative: "d/2".into() },
            DataFile { base: "p01/".into(), relative: "d/2".into() },
        ]);
    }

    #[test]
    fn paths_that_leave_the_store_are_refused() {
        for path in ["/etc/passwd", "../x", "a/../../x", "a//b", "./a", "a/", "a\\b", "a\0b"] {
            let mut b = Vec::new();
            encode(&mut b, &[DataFile::new(path)]);
            assert!(decode(&mut Cursor::new(&b), &mut 100_000).is_err(), "{path:?}");
        }
    }

    #[test]
    fn prefixes_cannot_multiply_without_bound() {
        let mut b = Vec::new();
        let long = "x".repeat(60_000);
        let files: Vec<DataFile> = (0..200).map(|i| DataFile::new(format!("{long}{i:03}"))).collect();
        encode(&mut b, &files);
        assert!(b.len() < 70_000);
        assert!(matches!(decode(&mut Cursor::new(&b), &mut 1_000_000), Err(FormatError::Limit { .. })));
    }
}
