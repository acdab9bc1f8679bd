//! Any bytes as a safetensors file: an error, or tensors that cover the data exactly once.
#![no_main]

use checkpoint::safetensors::Header;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    if let Ok(header) = Header::parse(data) {
        let mut at = header.data_start;
        for t in &header.tensors {
            assert_eq!(t.range.start, at);
            assert_eq!(t.shape.checked_bytes(t.dtype).ok(), usize::try_from(t.bytes()).ok());
            at = t.range.end;
        }
        assert_eq!(at, data.len() as u64);
    }
});
