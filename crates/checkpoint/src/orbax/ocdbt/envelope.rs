//! The frame around every manifest and node: magic, length, version, optional compression, checksum.

use std::borrow::Cow;
use std::io::Read;

use super::bytes::{Cursor, FormatError, put_varint};

/// Magic of a manifest.
pub(super) const MANIFEST: u32 = 0x0cdb_3a2a;
/// Magic of a B+tree node.
pub(super) const NODE: u32 = 0x0cdb_20de;

/// No real body comes near this; a hostile one must not fill memory.
const MAX_BODY: u64 = 256 << 20;

/// Checks the frame and gives the decompressed body.
pub(super) fn open(magic: u32, block: &[u8]) -> Result<Cow<'_, [u8]>, FormatError> {
    let mut c = Cursor::new(block);
    let found = c.u32_be("magic")?;
    if found != magic {
        return Err(FormatError::Magic { wanted: magic, found });
    }
    let stored = c.u64("length")?;
    if stored != block.len() as u64 {
        return Err(FormatError::Length { stored, actual: block.len() });
    }
    let Some(at) = block.len().checked_sub(4).filter(|&n| n >= 12) else {
        return Err(FormatError::Truncated { what: "checksum", at: 12, wanted: 4, left: c.left() });
    };
    let stored = Cursor::new(&block[at..]).u32("checksum")?;
    let actual = crc32c::crc32c(&block[..at]);
    if stored != actual {
        return Err(FormatError::Checksum { stored, actual });
    }
    let mut c = Cursor::new(&block[12..at]);
    let version = c.varint("format version")?;
    if version != 0 {
        return Err(FormatError::Unsupported { what: "format version", value: version });
    }
    let method = c.varint("compression method")?;
    let left = c.left() as u64;
    let body = c.take(left, "body")?;
    match method {
        0 => Ok(Cow::Borrowed(body)),
        1 => Ok(Cow::Owned(decompress(body)?)),
        value => Err(FormatError::Unsupported { what: "compression method", value }),
    }
}

/// Decompresses with a bound that any honest body meets: keys and small integers do not shrink a thousandfold.
fn decompress(body: &[u8]) -> Result<Vec<u8>, FormatError> {
    let limit = (body.len() as u64).saturating_mul(1000).saturating_add(1 << 20).min(MAX_BODY);
    let mut out = Vec::new();
    let zstd = |e: std::io::Error| FormatError::Zstd(e.to_string());
    let decoder = zstd::stream::read::Decoder::new(body).map_err(zstd)?;
    decoder.take(limit + 1).read_to_end(&mut out).map_err(zstd)?;
    if out.len() as u64 > limit {
        return Err(FormatError::Limit { what: "decompressed body size", value: out.len() as u64, limit });
    }
    Ok(out)
}

/// Puts an uncompressed body into a frame.
pub(super) fn seal(magic: u32, body: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(body.len() + 18);
    out.extend(magic.to_be_bytes());
    out.extend((body.len() as u64 + 18).to_le_bytes());
    put_varint(&mut out, 0);
    put_varint(&mut out, 0);
    out.extend(body);
    let crc = crc32c::crc32c(&out);
    out.extend(crc.to_le_bytes());
    out
}

#[cfg(test)]
pub(super) fn seal_zstd(magic: u32, body: &[u8]) -> Vec<u8> {
    let body = zstd::bulk::compress(body, 0).unwrap();
    let mut out = Vec::new();
    out.extend(magic.to_be_bytes());
    out.extend((body.len() as u64 + 18).to_le_bytes());
    out.extend([0, 1]);
    out.extend(&body);
    let crc = crc32c::crc32c(&out);
    out.extend(crc.to_le_bytes());
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_compressions_open() {
        assert_eq!(&*open(NODE, &seal(NODE, b"hello")).unwrap(), b"hello");
        assert_eq!(&*open(NODE, &seal_zstd(NODE, b"hello")).unwrap(), b"hello");
        assert_eq!(&*open(NODE, &seal(NODE, b"")).unwrap(), b"");
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_seen() {
        let good = seal(NODE, b"some body");
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(open(NODE, &bad).is_err(), "bit {bit}");
        }
        for n in 0..good.len() {
            assert!(open(NODE, &good[..n]).is_err(), "cut at {n}");
        }
        assert!(matches!(open(MANIFEST, &good), Err(FormatError::Magic { .. })));
    }

    #[test]
    fn a_bomb_is_refused() {
        let bomb = seal_zstd(NODE, &vec![0u8; 64 << 20]);
        assert!(bomb.len() < 16 << 10);
        assert!(matches!(open(NODE, &bomb), Err(FormatError::Limit { .. })));
    }
}
