//! The little of the protocol-buffer wire format that the PJRT C API needs: writing compile options,
//! reading the signature out of an optimised program.

/// Appends fields to a message.
#[derive(Default)]
pub(crate) struct Writer(Vec<u8>);

impl Writer {
    pub(crate) fn into_bytes(self) -> Vec<u8> {
        self.0
    }

    fn raw_varint(&mut self, mut v: u64) {
        while v >= 0x80 {
            self.0.push((v as u8) | 0x80);
            v >>= 7;
        }
        self.0.push(v as u8);
    }

    fn key(&mut self, field: u32, wire_type: u64) {
        self.raw_varint(u64::from(field) << 3 | wire_type);
    }

    /// An `int64`, `bool` or enum field. Negative numbers take ten bytes, as the format wants.
    pub(crate) fn varint(&mut self, field: u32, v: i64) {
        self.key(field, 0);
        self.raw_varint(v as u64);
    }

    pub(crate) fn double(&mut self, field: u32, v: f64) {
        self.key(field, 1);
        self.0.extend_from_slice(&v.to_le_bytes());
    }

    pub(crate) fn bytes(&mut self, field: u32, v: &[u8]) {
        self.key(field, 2);
        self.raw_varint(v.len() as u64);
        self.0.extend_from_slice(v);
    }

    pub(crate) fn message(&mut self, field: u32, write: impl FnOnce(&mut Writer)) {
        let mut inner = Writer::default();
        write(&mut inner);
        self.bytes(field, &inner.0);
    }

    /// A packed repeated `int64` field.
    pub(crate) fn packed(&mut self, field: u32, values: impl IntoIterator<Item = i64>) {
        let mut inner = Writer::default();
        for v in values {
            inner.raw_varint(v as u64);
        }
        self.bytes(field, &inner.0);
    }
}

/// One field of a message.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Value<'a> {
    Varint(u64),
    Fixed64(u64),
    Bytes(&'a [u8]),
    Fixed32(u32),
}

/// Walks the fields of a message. Ends, with an `Err` item, at the first byte that makes no sense.
pub(crate) struct Reader<'a> {
    rest: &'a [u8],
}

/// Bytes that are not a protocol-buffer message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Malformed;

impl<'a> Reader<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Reader { rest: bytes }
    }

    fn raw_varint(&mut self) -> Result<u64, Malformed> {
        let mut v = 0u64;
        for shift in (0..64).step_by(7) {
            let (&b, rest) = self.rest.split_first().ok_or(Malformed)?;
            self.rest = rest;
            v |= u64::from(b & 0x7f) << shift;
            if b < 0x80 {
                return Ok(v);
            }
        }
        Err(Malformed)
    }

    fn take(&mut self, n: u64) -> Result<&'a [u8], Malformed> {
        let n = usize::try_from(n).map_err(|_| Malformed)?;
        let (head, rest) = self.rest.split_at_checked(n).ok_or(Malformed)?;
        self.rest = rest;
        Ok(head)
    }

    fn field(&mut self) -> Result<(u32, Value<'a>), Malformed> {
        let key = self.raw_varint()?;
        let number = u32::try_from(key >> 3).map_err(|_| Malformed)?;
        let value = match key & 7 {
            0 => Value::Varint(self.raw_varint()?),
            1 => Value::Fixed64(u64::from_le_bytes(self.take(8)?.try_into().map_err(|_| Malformed)?)),
            2 => {
                let n = self.raw_varint()?;
                Value::Bytes(self.take(n)?)
            }
            5 => Value::Fixed32(u32::from_le_bytes(self.take(4)?.try_into().map_err(|_| Malformed)?)),
            _ => return Err(Malformed),
        };
        Ok((number, value))
    }
}

impl<'a> Iterator for Reader<'a> {
    type Item = Result<(u32, Value<'a>), Malformed>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let field = self.field();
        if field.is_err() {
            self.rest = &[];
        }
        Some(field)
    }
}

/// The integers of a repeated field, packed or not.
pub(crate) fn integers(value: Value<'_>, into: &mut Vec<i64>) -> Result<(), Malformed> {
    match value {
        Value::Varint(v) => into.push(v as i64),
        Value::Bytes(b) => {
            let mut r = Reader::new(b);
            while !r.rest.is_empty() {
                into.push(r.raw_varint()? as i64);
            }
        }
        Value::Fixed64(_) | Value::Fixed32(_) => return Err(Malformed),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_reads_back() {
        let mut w = Writer::default();
        w.varint(1, -1);
        w.varint(300, 300);
        w.double(4, 1.5);
        w.bytes(2, b"ab");
        w.packed(3, [1, -2, 300]);
        w.message(5, |m| m.varint(1, 7));
        let bytes = w.into_bytes();
        let fields: Vec<_> = Reader::new(&bytes).collect::<Result<_, _>>().unwrap();
        assert_eq!(fields[0], (1, Value::Varint(u64::MAX)));
        assert_eq!(fields[1], (300, Value::Varint(300)));
        assert_eq!(fields[2], (4, Value::Fixed64(1.5f64.to_bits())));
        assert_eq!(fields[3], (2, Value::Bytes(b"ab")));
        let mut ints = Vec::new();
        integers(fields[4].1, &mut ints).unwrap();
        assert_eq!(ints, [1, -2, 300]);
        assert_eq!(fields[5], (5, Value::Bytes(&[8, 7])));
    }

    #[test]
    fn malformed_bytes_end_the_walk() {
        for bytes in [&[0x0a, 0x05, 1][..], &[0x80], &[0x07], &[0x09, 1, 2], &[0xff; 12]] {
            let all: Vec<_> = Reader::new(bytes).collect();
            assert_eq!(all, [Err(Malformed)], "{bytes:?}");
        }
    }
}
