//! zarr arrays: metadata of versions 2 and 3, and the codecs that Orbax and its readers use.

mod codec;
mod json;
mod v2;
mod v3;

pub use codec::{ArrayBytes, BytesCodec, Chain, ChunkError, Endian, Sharding};
pub(in crate::orbax) use codec::{Decoded, ZSTD_MAX_RATIO, decode};
pub use json::ZarrError;
pub use v2::Compressor2;

use tensor::{DType, Shape};

/// How chunk keys are spelled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyEncoding {
    /// `c/0/1`, or `c` for a scalar.
    Default(char),
    /// `0.1`, or `0` for a scalar.
    V2(char),
}

/// Everything that is needed to find and decode the chunks of an array.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ArrayMeta {
    /// 2 or 3.
    pub version: u8,
    /// Extent of every dimension.
    pub shape: Shape,
    /// Element type.
    pub dtype: DType,
    /// Extent of every chunk; those at the edge may reach beyond the array.
    pub chunk_shape: Vec<usize>,
    /// How chunk keys are spelled.
    pub keys: KeyEncoding,
    /// What was done to the elements of a chunk.
    pub codecs: Chain,
}

impl ArrayMeta {
    /// Reads a `zarr.json`.
    ///
    /// # Errors
    /// When it is no valid description of an array, or uses something that this reader does not know; the message
    /// names it.
    pub fn parse_v3(bytes: &[u8]) -> Result<Self, ZarrError> {
        v3::parse(bytes)
    }

    /// Reads a `.zarray`.
    ///
    /// # Errors
    /// As [`parse_v3`](ArrayMeta::parse_v3).
    pub fn parse_v2(bytes: &[u8]) -> Result<Self, ZarrError> {
        v2::parse(bytes)
    }

    /// The `zarr.json` or `.zarray` of this array, as Orbax writes it.
    ///
    /// # Errors
    /// When version 2 cannot express the codecs.
    pub fn to_json(&self) -> Result<Vec<u8>, ZarrError> {
        match self.version {
            2 => v2::write(self),
            _ => Ok(v3::write(self)),
        }
    }

    /// Name of the metadata key below the array's name.
    #[must_use]
    pub fn metadata_key(&self) -> &'static str {
        if self.version == 2 { ".zarray" } else { "zarr.json" }
    }

    /// Number of chunks along every dimension.
    #[must_use]
    pub fn grid(&self) -> Vec<usize> {
        self.shape.iter().zip(&self.chunk_shape).map(|(n, c)| n.div_ceil(*c)).collect()
    }

    /// Number of chunks; `usize::MAX` when there are more than that.
    #[must_use]
    pub fn chunk_count(&self) -> usize {
        // A zero among the factors must win over an overflow.
        Shape::from(self.grid()).elements()
    }

    /// Bytes of one decoded chunk, padding included.
    ///
    /// # Errors
    /// When they do not fit the address space.
    pub fn chunk_bytes(&self) -> Result<usize, ZarrError> {
        Shape::from(self.chunk_shape.clone())
            .checked_bytes(self.dtype)
            .map_err(|e| ZarrError::Value { key: "chunk_shape", why: e.to_string() })
    }

    /// The key of a chunk below the array's name.
    #[must_use]
    pub fn chunk_key(&self, index: &[usize]) -> String {
        let (mut key, separator) = match self.keys {
            KeyEncoding::Default(s) => ("c".to_owned(), s),
            KeyEncoding::V2(s) => (String::new(), s),
        };
        for i in index {
            if !key.is_empty() {
                key.push(separator);
            }
            key.push_str(&i.to_string());
        }
        if key.is_empty() {
            key.push('0');
        }
        key
    }

    /// The part of the array that a chunk covers, without padding.
    #[must_use]
    pub fn chunk_region(&self, index: &[usize]) -> super::Region {
        let origin: Vec<usize> = index.iter().zip(&self.chunk_shape).map(|(i, c)| i * c).collect();
        let shape =
            (origin.iter().zip(&self.chunk_shape).zip(self.shape.iter())).map(|((o, c), n)| (*c).min(n - o)).collect();
        super::Region { origin, shape }
    }

    /// A line about the encoding: `zarr3 bytes+crc32c`.
    #[must_use]
    pub fn describe(&self) -> String {
        format!("zarr{} {}", self.version, self.codecs)
    }

    fn checked(self) -> Result<Self, ZarrError> {
        let value = |key, why: String| Err(ZarrError::Value { key, why });
        if self.chunk_shape.len() != self.shape.rank() {
            return value("chunk_shape", format!("it has {} dimensions", self.chunk_shape.len()));
        }
        if self.chunk_shape.contains(&0) {
            return value("chunk_shape", "an extent is 0".into());
        }
        if let Err(e) = self.shape.checked_bytes(self.dtype) {
            return value("shape", e.to_string());
        }
        self.chunk_bytes()?;
        self.codecs.check(&self.chunk_shape)?;
        Ok(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meta(keys: KeyEncoding, shape: &[usize], chunk: &[usize]) -> ArrayMeta {
        ArrayMeta {
            version: 3,
            shape: shape.into(),
            dtype: DType::F32,
            chunk_shape: chunk.to_vec(),
            keys,
            codecs: Chain::plain(),
        }
    }

    #[test]
    fn chunk_keys_of_both_spellings() {
        let m = meta(KeyEncoding::Default('/'), &[10, 4], &[4, 4]);
        assert_eq!(m.chunk_key(&[2, 0]), "c/2/0");
        assert_eq!(m.chunk_region(&[2, 0]).to_string(), "[8:10, 0:4]");
        assert_eq!((m.grid(), m.chunk_count()), (vec![3, 1], 3));
        assert_eq!(meta(KeyEncoding::Default('/'), &[], &[]).chunk_key(&[]), "c");
        assert_eq!(meta(KeyEncoding::V2('.'), &[], &[]).chunk_key(&[]), "0");
        assert_eq!(m.chunk_key(&[0, 12]), "c/0/12");
        assert_eq!(meta(KeyEncoding::V2('.'), &[9, 9], &[1, 1]).chunk_key(&[3, 4]), "3.4");
        assert_eq!(meta(KeyEncoding::V2('.'), &[], &[]).chunk_count(), 1);
        assert_eq!(meta(KeyEncoding::V2('.'), &[0, 5], &[1, 1]).chunk_count(), 0);
    }
}
