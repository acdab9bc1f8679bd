//! Primitive fields of the OCDBT format: bounded reading, and writing.

/// What makes a manifest or node unreadable.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// A field runs past the end of the bytes.
    #[error("{what} at byte {at} needs {wanted} bytes and {left} are left")]
    Truncated {
        /// The field.
        what: &'static str,
        /// Where it starts.
        at: usize,
        /// Bytes it needs.
        wanted: u64,
        /// Bytes that are left.
        left: usize,
    },
    /// A variable-length integer is longer than 64 bits.
    #[error("{what} at byte {at} is no valid variable-length integer")]
    Varint {
        /// The field.
        what: &'static str,
        /// Where it starts.
        at: usize,
    },
    /// The first four bytes are not those of the expected kind of block.
    #[error("it starts with {found:08x} instead of {wanted:08x}")]
    Magic {
        /// The expected magic number.
        wanted: u32,
        /// What is there.
        found: u32,
    },
    /// The stored length differs from the number of bytes.
    #[error("it says that it is {stored} bytes long and is {actual}")]
    Length {
        /// The length in the header.
        stored: u64,
        /// Bytes present.
        actual: usize,
    },
    /// The checksum does not match.
    #[error("its checksum is {stored:08x} and its bytes give {actual:08x}: the bytes were changed or damaged")]
    Checksum {
        /// CRC-32C in the file.
        stored: u32,
        /// CRC-32C of the bytes.
        actual: u32,
    },
    /// A version or method that this reader does not know.
    #[error("{what} {value} is not supported")]
    Unsupported {
        /// The field.
        what: &'static str,
        /// Its value.
        value: u64,
    },
    /// Bytes are left over after the last field.
    #[error("{0} bytes are left over after the last field")]
    Trailing(usize),
    /// A count or size is beyond what the format or this reader allows.
    #[error("{what} is {value}, more than the {limit} that are possible here")]
    Limit {
        /// The field.
        what: &'static str,
        /// Its value.
        value: u64,
        /// The largest possible.
        limit: u64,
    },
    /// A value that contradicts the rest.
    #[error("{0}")]
    Invalid(String),
    /// The compressed body cannot be decompressed.
    #[error("its zstd body cannot be decompressed: {0}")]
    Zstd(String),
}

/// A position in a byte slice from which fields are taken; no read goes past the end.
#[derive(Debug, Clone)]
pub(super) struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Cursor { bytes, at: 0 }
    }

    pub(super) fn left(&self) -> usize {
        self.bytes.len() - self.at
    }

    pub(super) fn take(&mut self, n: u64, what: &'static str) -> Result<&'a [u8], FormatError> {
        let truncated = FormatError::Truncated { what, at: self.at, wanted: n, left: self.left() };
        let n = usize::try_from(n).map_err(|_| truncated.clone())?;
        let end = self.at.checked_add(n).filter(|&e| e <= self.bytes.len()).ok_or(truncated)?;
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], FormatError> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N as u64, what)?);
        Ok(out)
    }

    pub(super) fn u8(&mut self, what: &'static str) -> Result<u8, FormatError> {
        Ok(self.array::<1>(what)?[0])
    }

    pub(super) fn u32_be(&mut self, what: &'static str) -> Result<u32, FormatError> {
        Ok(u32::from_be_bytes(self.array(what)?))
    }

    pub(super) fn u32(&mut self, what: &'static str) -> Result<u32, FormatError> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    pub(super) fn u64(&mut self, what: &'static str) -> Result<u64, FormatError> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    pub(super) fn uuid(&mut self) -> Result<[u8; 16], FormatError> {
        self.array("uuid")
    }

    pub(super) fn varint(&mut self, what: &'static str) -> Result<u64, FormatError> {
        let at = self.at;
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.u8(what)?;
            let bits = u64::from(byte & 0x7f);
            // The tenth byte holds one bit.
            if shift == 63 && bits > 1 {
                return Err(FormatError::Varint { what, at });
            }
            value |= bits << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(FormatError::Varint { what, at })
    }

    /// A count of records of which each takes at least `min_bytes` of what is left, so that memory for them is
    /// bounded by the input.
    pub(super) fn count(&mut self, what: &'static str, min_bytes: usize) -> Result<usize, FormatError> {
        let value = self.varint(what)?;
        let limit = self.left() / min_bytes.max(1);
        match usize::try_from(value) {
            Ok(n) if n <= limit => Ok(n),
            _ => Err(FormatError::Limit { what, value, limit: limit as u64 }),
        }
    }

    /// One column of `n` variable-length integers.
    pub(super) fn varints(&mut self, n: usize, what: &'static str) -> Result<Vec<u64>, FormatError> {
        if n > self.left() {
            return Err(FormatError::Truncated { what, at: self.at, wanted: n as u64, left: self.left() });
        }
        (0..n).map(|_| self.varint(what)).collect()
    }

    /// One column of `n` lengths, none larger than `limit`.
    pub(super) fn lengths(&mut self, n: usize, limit: usize, what: &'static str) -> Result<Vec<usize>, FormatError> {
        self.varints(n, what)?
            .into_iter()
            .map(|v| match usize::try_from(v) {
                Ok(x) if x <= limit => Ok(x),
                _ => Err(FormatError::Limit { what, value: v, limit: limit as u64 }),
            })
            .collect()
    }

    pub(super) fn finish(self) -> Result<(), FormatError> {
        if self.left() > 0 {
            return Err(FormatError::Trailing(self.left()));
        }
        Ok(())
    }
}

pub(super) fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push((value as u8 & 0x7f) | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn varints_round_trip() {
        for v in [0, 1, 127, 128, 300, 1 << 35, u64::MAX - 1, u64::MAX] {
            let mut b = Vec::new();
            put_varint(&mut b, v);
            let mut c = Cursor::new(&b);
            assert_eq!(c.varint("x").unwrap(), v);
            c.finish().unwrap();
        }
    }

    #[test]
    fn overlong_and_cut_varints_are_errors() {
        assert!(matches!(Cursor::new(&[0xff; 11]).varint("x"), Err(FormatError::Varint { .. })));
        let mut too_big = vec![0xff; 9];
        too_big.push(2);
        assert!(matches!(Cursor::new(&too_big).varint("x"), Err(FormatError::Varint { .. })));
        assert!(matches!(Cursor::new(&[0x80]).varint("x"), Err(FormatError::Truncated { .. })));
    }

    #[test]
    fn counts_are_bounded_by_the_input() {
        let mut b = Vec::new();
        put_varint(&mut b, u64::MAX);
        assert!(matches!(Cursor::new(&b).count("n", 1), Err(FormatError::Limit { .. })));
        assert!(Cursor::new(&[1, 2, 3]).take(u64::MAX, "x").is_err());
        assert!(matches!(Cursor::new(&[0; 4]).varints(5, "x"), Err(FormatError::Truncated { .. })));
    }
}
