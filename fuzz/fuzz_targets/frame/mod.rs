//! Puts a body into the frame that its checksum guards, so that fuzzing reaches what lies behind it.

/// The same bytes as a plain and as a compressed body.
pub fn both(magic: u32, body: &[u8]) -> [Vec<u8>; 2] {
    [0, 1].map(|method| {
        let mut out = magic.to_be_bytes().to_vec();
        out.extend((body.len() as u64 + 18).to_le_bytes());
        out.extend([0, method]);
        out.extend(body);
        let crc = crc32c::crc32c(&out);
        out.extend(crc.to_le_bytes());
        out
    })
}
