//! The codecs between an array's elements and the bytes of a chunk.

use std::fmt;
use std::io::Read;

use tensor::Shape;

use super::json::ZarrError;

/// What makes the bytes of a chunk unreadable.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChunkError {
    /// Too few or too many bytes.
    #[error("it has {found} bytes and must have {wanted}")]
    Size {
        /// Bytes needed.
        wanted: u64,
        /// Bytes present.
        found: u64,
    },
    /// The checksum does not match.
    #[error("its checksum is {stored:08x} and its bytes give {actual:08x}: the bytes were changed or damaged")]
    Checksum {
        /// CRC-32C stored.
        stored: u32,
        /// CRC-32C of the bytes.
        actual: u32,
    },
    /// The zstd frame is broken.
    #[error("it cannot be decompressed: {0}")]
    Zstd(String),
    /// No zstd frame of this size can hold that many bytes.
    #[error("{stored} compressed bytes cannot hold {wanted}")]
    Ratio {
        /// Compressed size.
        stored: u64,
        /// Bytes needed.
        wanted: u64,
    },
    /// The index of a shard points outside of it.
    #[error("the index of the shard points to bytes {offset} to {end} of {size}")]
    Index {
        /// First byte.
        offset: u64,
        /// One after the last.
        end: u64,
        /// Size of the shard.
        size: u64,
    },
    /// An inner chunk of a shard was never written.
    #[error("inner chunk {0:?} of the shard is missing")]
    Missing(Vec<usize>),
    /// A boolean that is neither 0 nor 1.
    #[error("it holds a boolean that is neither 0 nor 1")]
    Bool,
}

/// Byte order of stored elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Endian {
    /// Least significant byte first.
    Little,
    /// Most significant byte first.
    Big,
}

/// Turns elements into bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ArrayBytes {
    /// Elements one after the other.
    Bytes(Endian),
    /// Inner chunks with an index.
    Sharding(Box<Sharding>),
}

/// Turns bytes into bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BytesCodec {
    /// Appends a CRC-32C.
    Crc32c,
    /// Compresses.
    Zstd {
        /// Level, for writing.
        level: i32,
        /// Whether frames carry a checksum.
        checksum: bool,
    },
}

/// A chunk that is divided into inner chunks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sharding {
    /// Extent of an inner chunk; it divides the outer one.
    pub chunk_shape: Vec<usize>,
    /// Codecs of inner chunks.
    pub codecs: Chain,
    /// Codecs of the index.
    pub index_codecs: Chain,
    /// Whether the index comes first; it comes last otherwise.
    pub index_at_start: bool,
}

/// The codecs of a chunk, in encoding order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    /// A transpose: dimension `k` of what is stored is dimension `order[k]` of the array.
    pub order: Option<Vec<usize>>,
    /// Elements to bytes.
    pub array: ArrayBytes,
    /// Bytes to bytes.
    pub bytes: Vec<BytesCodec>,
}

impl fmt::Display for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(order) = &self.order {
            write!(f, "transpose{order:?}+")?;
        }
        match &self.array {
            ArrayBytes::Bytes(Endian::Little) => f.write_str("bytes")?,
            ArrayBytes::Bytes(Endian::Big) => f.write_str("bytes(big)")?,
            ArrayBytes::Sharding(s) => write!(f, "sharding{:?}({})", s.chunk_shape, s.codecs)?,
        }
        for c in &self.bytes {
            f.write_str(match c {
                BytesCodec::Crc32c => "+crc32c",
                BytesCodec::Zstd { checksum: false, .. } => "+zstd",
                BytesCodec::Zstd { checksum: true, .. } => "+zstd(checksum)",
            })?;
        }
        Ok(())
    }
}

/// The smallest block of a zstd frame takes four bytes and the largest gives 128 KiB.
pub(in crate::orbax) const ZSTD_MAX_RATIO: u64 = (128 << 10) / 4;

impl Chain {
    /// Little-endian elements and nothing else.
    #[must_use]
    pub fn plain() -> Self {
        Chain { order: None, array: ArrayBytes::Bytes(Endian::Little), bytes: vec![] }
    }

    /// Little-endian elements with a checksum.
    #[must_use]
    pub fn checksummed() -> Self {
        Chain { bytes: vec![BytesCodec::Crc32c], ..Chain::plain() }
    }

    /// Whether any checksum covers all stored elements.
    #[must_use]
    pub fn has_checksum(&self) -> bool {
        let own = self.bytes.iter().any(|c| !matches!(c, BytesCodec::Zstd { checksum: false, .. }));
        own || matches!(&self.array, ArrayBytes::Sharding(s) if s.codecs.has_checksum())
    }

    /// Whether stored bytes are compressed anywhere.
    #[must_use]
    pub fn is_compressed(&self) -> bool {
        let own = self.bytes.iter().any(|c| matches!(c, BytesCodec::Zstd { .. }));
        own || matches!(&self.array, ArrayBytes::Sharding(s) if s.codecs.is_compressed())
    }

    pub(super) fn check(&self, chunk: &[usize]) -> Result<(), ZarrError> {
        if self.order.as_ref().is_some_and(|o| o.len() != chunk.len()) {
            return Err(ZarrError::Value { key: "order", why: "its length is not the rank of the array".into() });
        }
        let ArrayBytes::Sharding(s) = &self.array else { return Ok(()) };
        let stored = self.stored_shape(chunk);
        let divides = s.chunk_shape.len() == stored.len()
            && s.chunk_shape.iter().zip(&stored).all(|(&inner, &outer)| inner > 0 && outer % inner == 0);
        if !divides {
            let why = format!("inner chunks {:?} do not divide {stored:?}", s.chunk_shape);
            return Err(ZarrError::Value { key: "chunk_shape", why });
        }
        let fixed = s.index_codecs.order.is_none()
            && matches!(s.index_codecs.array, ArrayBytes::Bytes(_))
            && !s.index_codecs.is_compressed();
        if !fixed {
            return Err(ZarrError::Unsupported { what: "index codec", name: s.index_codecs.to_string() });
        }
        if s.index_bytes(&stored).is_none() {
            return Err(ZarrError::Value { key: "chunk_shape", why: "the index would not fit memory".into() });
        }
        s.codecs.check(&s.chunk_shape)
    }

    /// The shape of what is stored for a chunk of this shape.
    #[must_use]
    pub fn stored_shape(&self, chunk: &[usize]) -> Vec<usize> {
        match &self.order {
            None => chunk.to_vec(),
            Some(order) => order.iter().map(|&i| chunk[i]).collect(),
        }
    }
}

impl Sharding {
    /// Inner chunks along every stored dimension.
    pub(in crate::orbax) fn grid(&self, stored: &[usize]) -> Vec<usize> {
        stored.iter().zip(&self.chunk_shape).map(|(o, i)| o / i).collect()
    }

    fn index_bytes(&self, stored: &[usize]) -> Option<u64> {
        let n = Shape::from(self.grid(stored)).checked_elements().ok()? as u64;
        n.checked_mul(16)?.checked_add(4 * self.index_codecs.bytes.len() as u64)
    }

    /// Reads the index of a shard: where each inner chunk lies, in row-major order.
    pub(in crate::orbax) fn index(
        &self,
        stored: &[usize],
        shard: &[u8],
    ) -> Result<Vec<Option<(u64, u64)>>, ChunkError> {
        let size = shard.len() as u64;
        // Verified when the metadata was read.
        let n = self.index_bytes(stored).unwrap_or(u64::MAX);
        if n > size {
            return Err(ChunkError::Size { wanted: n, found: size });
        }
        let n = n as usize;
        let encoded = if self.index_at_start { &shard[..n] } else { &shard[shard.len() - n..] };
        let raw = strip_checksums(&self.index_codecs.bytes, encoded)?;
        let big = self.index_codecs.array == ArrayBytes::Bytes(Endian::Big);
        let word = |b: &[u8]| {
            let mut w = [0; 8];
            w.copy_from_slice(b);
            if big { u64::from_be_bytes(w) } else { u64::from_le_bytes(w) }
        };
        raw.chunks_exact(16)
            .map(|pair| match (word(&pair[..8]), word(&pair[8..])) {
                (u64::MAX, u64::MAX) => Ok(None),
                (offset, length) => {
                    let end = offset.saturating_add(length);
                    if end > size { Err(ChunkError::Index { offset, end, size }) } else { Ok(Some((offset, length))) }
                }
            })
            .collect()
    }
}

/// Checks and removes trailing checksums, outermost first; stops before anything else.
fn strip_checksums<'a>(codecs: &[BytesCodec], mut bytes: &'a [u8]) -> Result<&'a [u8], ChunkError> {
    for codec in codecs.iter().rev() {
        if *codec != BytesCodec::Crc32c {
            break;
        }
        bytes = strip_checksum(bytes, true)?;
    }
    Ok(bytes)
}

fn strip_checksum(bytes: &[u8], verify: bool) -> Result<&[u8], ChunkError> {
    let Some((body, tail)) = bytes.split_last_chunk::<4>() else {
        return Err(ChunkError::Size { wanted: 4, found: bytes.len() as u64 });
    };
    if verify {
        let (stored, actual) = (u32::from_le_bytes(*tail), crc32c::crc32c(body));
        if stored != actual {
            return Err(ChunkError::Checksum { stored, actual });
        }
    }
    Ok(body)
}

/// A chunk's elements as bytes: where they lie already, or a stream that decompresses them.
pub(in crate::orbax) enum Decoded<'a> {
    /// In place.
    Raw(&'a [u8]),
    /// To be decompressed.
    Zstd(ZstdStream<'a>),
}

/// Undoes all codecs but compression, which is left to the caller to do in pieces. `wanted` is the decoded size. `verify` tells whether trailing checksums of uncompressed bytes are computed.
pub(in crate::orbax) fn decode<'a>(
    codecs: &[BytesCodec],
    stored: &'a [u8],
    wanted: usize,
    verify: bool,
) -> Result<Decoded<'a>, ChunkError> {
    let mut bytes = stored;
    for (i, codec) in codecs.iter().enumerate().rev() {
        match codec {
            BytesCodec::Crc32c => bytes = strip_checksum(bytes, verify)?,
            BytesCodec::Zstd { .. } => {
                // Only checksums can be left: two compressors are refused.
                let inner = i * 4;
                return Ok(Decoded::Zstd(ZstdStream::new(bytes, wanted + inner, inner)?));
            }
        }
    }
    if wanted != bytes.len() {
        return Err(ChunkError::Size { wanted: wanted as u64, found: bytes.len() as u64 });
    }
    Ok(Decoded::Raw(bytes))
}

/// Decompresses a chunk front to back.
pub(in crate::orbax) struct ZstdStream<'a> {
    decoder: zstd::stream::read::Decoder<'static, &'a [u8]>,
    inner: usize,
    crc: u32,
}

impl<'a> ZstdStream<'a> {
    fn new(bytes: &'a [u8], size: usize, inner: usize) -> Result<Self, ChunkError> {
        let (stored, wanted) = (bytes.len() as u64, size as u64);
        if wanted > stored.saturating_mul(ZSTD_MAX_RATIO) {
            return Err(ChunkError::Ratio { stored, wanted });
        }
        let decoder = zstd::stream::read::Decoder::with_buffer(bytes).map_err(|e| ChunkError::Zstd(e.to_string()))?;
        Ok(ZstdStream { decoder, inner, crc: 0 })
    }

    /// Fills `out` with the next bytes.
    pub(in crate::orbax) fn fill(&mut self, out: &mut [u8]) -> Result<(), ChunkError> {
        self.decoder.read_exact(out).map_err(|e| ChunkError::Zstd(e.to_string()))?;
        if self.inner > 0 {
            self.crc = crc32c::crc32c_append(self.crc, out);
        }
        Ok(())
    }

    /// After the last element: checks what follows, and that nothing else does.
    pub(in crate::orbax) fn finish(mut self) -> Result<(), ChunkError> {
        for _ in 0..self.inner / 4 {
            let actual = self.crc;
            let mut tail = [0; 4];
            self.fill(&mut tail)?;
            let stored = u32::from_le_bytes(tail);
            if stored != actual {
                return Err(ChunkError::Checksum { stored, actual });
            }
        }
        let mut more = [0; 1];
        match self.decoder.read(&mut more) {
            Ok(0) => Ok(()),
            Ok(_) => Err(ChunkError::Zstd("it holds more bytes than the chunk".into())),
            Err(e) => Err(ChunkError::Zstd(e.to_string())),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::borrow::Cow;

    use super::*;

    fn decode_all<'a>(codecs: &[BytesCodec], stored: &'a [u8], wanted: usize) -> Result<Cow<'a, [u8]>, ChunkError> {
        match decode(codecs, stored, wanted, true)? {
            Decoded::Raw(b) => Ok(Cow::Borrowed(b)),
            Decoded::Zstd(mut z) => {
                let mut out = vec![0; wanted];
                z.fill(&mut out)?;
                z.finish()?;
                Ok(Cow::Owned(out))
            }
        }
    }

    fn with_crc(b: &[u8]) -> Vec<u8> {
        [b, &crc32c::crc32c(b).to_le_bytes()].concat()
    }

    fn zstd(b: &[u8]) -> Vec<u8> {
        zstd::bulk::compress(b, 3).unwrap()
    }

    const Z: BytesCodec = BytesCodec::Zstd { level: 3, checksum: false };
    const C: BytesCodec = BytesCodec::Crc32c;

    #[test]
    fn every_sequence_decodes() {
        let data: Vec<u8> = (0..5000u32).map(|i| (i / 7) as u8).collect();
        for (codecs, stored) in [
            (vec![], data.clone()),
            (vec![C], with_crc(&data)),
            (vec![Z], zstd(&data)),
            (vec![C, Z], zstd(&with_crc(&data))),
            (vec![Z, C], with_crc(&zstd(&data))),
            (vec![C, C, Z, C], with_crc(&zstd(&with_crc(&with_crc(&data))))),
        ] {
            assert_eq!(*decode_all(&codecs, &stored, data.len()).unwrap(), *data, "{codecs:?}");
            assert!(decode_all(&codecs, &stored, data.len() - 1).is_err(), "{codecs:?}");
            assert!(decode_all(&codecs, &stored, data.len() + 1).is_err(), "{codecs:?}");
            for n in [0, 1, 3, stored.len() - 1] {
                assert!(decode_all(&codecs, &stored[..n], data.len()).is_err(), "{codecs:?} cut at {n}");
            }
            if codecs.contains(&C) {
                for bit in (0..stored.len() * 8).step_by(stored.len() / 40 + 1) {
                    let mut bad = stored.clone();
                    bad[bit / 8] ^= 1 << (bit % 8);
                    assert!(decode_all(&codecs, &bad, data.len()).is_err(), "{codecs:?} bit {bit}");
                }
            }
        }
    }

    #[test]
    fn an_impossible_ratio_is_refused_before_memory_is_taken() {
        assert!(matches!(decode_all(&[Z], &zstd(b"x"), 1 << 40), Err(ChunkError::Ratio { .. })));
        // What really compresses this well is accepted.
        let zeros = vec![0; 8 << 20];
        assert_eq!(decode_all(&[Z], &zstd(&zeros), zeros.len()).unwrap().len(), zeros.len());
    }

    fn sharding(index_at_start: bool) -> Sharding {
        Sharding { chunk_shape: vec![2], codecs: Chain::plain(), index_codecs: Chain::checksummed(), index_at_start }
    }

    #[test]
    fn shard_indices_are_checked() {
        let index = |pairs: &[(u64, u64)]| {
            with_crc(&pairs.iter().flat_map(|&(o, n)| [o.to_le_bytes(), n.to_le_bytes()].concat()).collect::<Vec<_>>())
        };
        let shard = [b"abcd".to_vec(), index(&[(0, 2), (u64::MAX, u64::MAX)])].concat();
        let s = sharding(false);
        assert_eq!(s.index(&[4], &shard).unwrap(), vec![Some((0, 2)), None]);
        let first = [index(&[(36, 2), (38, 2)]), b"abcd".to_vec()].concat();
        assert_eq!(sharding(true).index(&[4], &first).unwrap()[1], Some((38, 2)));
        for pair in [(0, 41), (u64::MAX, 1), (1, u64::MAX), (100, 0)] {
            let shard = [b"abcd".to_vec(), index(&[(0, 2), pair])].concat();
            assert!(matches!(s.index(&[4], &shard), Err(ChunkError::Index { .. })), "{pair:?}");
        }
        assert!(matches!(s.index(&[4], &shard[..20]), Err(ChunkError::Size { .. })));
        let mut bad = shard.clone();
        bad[5] ^= 1;
        assert!(matches!(s.index(&[4], &bad), Err(ChunkError::Checksum { .. })));
    }
}
