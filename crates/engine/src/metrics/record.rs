//! The framing of event files: length, its checksum, bytes, their checksum.
//!
//! Lengths and checksums are little-endian. A checksum is CRC-32C, rotated and shifted so that a checksum over data
//! that itself holds checksums stays meaningful.

/// Appends a record to `out`.
pub(super) fn frame(out: &mut Vec<u8>, data: &[u8]) {
    let length = (data.len() as u64).to_le_bytes();
    out.extend_from_slice(&length);
    out.extend_from_slice(&masked(&length).to_le_bytes());
    out.extend_from_slice(data);
    out.extend_from_slice(&masked(data).to_le_bytes());
}

fn masked(data: &[u8]) -> u32 {
    crc32c::crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// The records of a file, every checksum proved.
    pub(in crate::metrics) fn records(mut file: &[u8]) -> Vec<&[u8]> {
        let mut records = Vec::new();
        while !file.is_empty() {
            let length = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
            let checksum = |at: usize| u32::from_le_bytes(file[at..at + 4].try_into().unwrap());
            assert_eq!(checksum(8), masked(&file[..8]));
            let data = &file[12..12 + length];
            assert_eq!(checksum(12 + length), masked(data));
            records.push(data);
            file = &file[16 + length..];
        }
        records
    }

    #[test]
    fn checksums() {
        // Test vectors of RFC 3720, B.4.
        assert_eq!(crc32c::crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c::crc32c(&[0xff; 32]), 0x62a8_ab43);
        // Masked by hand: 0x8a9136aa rotated right by 15 bits is 0x6d551522.
        assert_eq!(masked(&[0; 32]), 0x6d55_1522_u32.wrapping_add(0xa282_ead8));
    }

    #[test]
    fn known_bytes() {
        // The first record of a file as TensorBoard's own writer makes it.
        let data = b"\x09\x00\x00\x80\xb8\x9b\x9a\xd3\x41\x1a\x0dbrain.Event:2";
        let mut out = Vec::new();
        frame(&mut out, data);
        assert_eq!(out[..12], *b"\x18\x00\x00\x00\x00\x00\x00\x00\xa3\x7f\x4b\x22");
        assert_eq!(out[12..36], *data);
        assert_eq!(out[36..], *b"\xee\xcc\x12\x96");
        assert_eq!(records(&out), [data]);
        frame(&mut out, b"");
        assert_eq!(records(&out), [data.as_slice(), b""]);
    }
}
