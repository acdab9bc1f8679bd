//! `zarr.json` and `.zarray`: parsing any bytes gives metadata or an error, and what was parsed can be used and written.
#![no_main]

use checkpoint::orbax::zarr::ArrayMeta;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    for meta in [ArrayMeta::parse_v3(data), ArrayMeta::parse_v2(data)].into_iter().flatten() {
        let rank = meta.shape.rank();
        let _ = (meta.grid(), meta.chunk_count(), meta.chunk_bytes(), meta.describe());
        if meta.chunk_count() > 0 {
            let _ = (meta.chunk_key(&vec![0; rank]), meta.chunk_region(&vec![0; rank]));
        }
        if let Ok(json) = meta.to_json() {
            let again = if meta.version == 2 { ArrayMeta::parse_v2(&json) } else { ArrayMeta::parse_v3(&json) };
            // Version 2 has no place for the checksum flag of its compressor.
            assert_eq!(again.map(|m| m.describe()), Ok(meta.describe()));
        }
    }
});
