//! Any bytes as the index of a directory that has one shard: an error, or a directory that opens.
#![no_main]

use checkpoint::hf::{HfDirectory, INDEX_FILE, parse_index};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    // Opening touches the disk, so only what parses gets that far.
    let Ok(map) = parse_index(data) else { return };
    let dir = std::env::temp_dir().join(format!("lapidary-fuzz-{}", std::process::id()));
    std::fs::create_dir_all(&dir).expect("a temporary directory");
    std::fs::write(dir.join("s"), b"\x02\0\0\0\0\0\0\0{}").expect("a shard");
    std::fs::write(dir.join(INDEX_FILE), data).expect("an index");
    if let Ok(opened) = HfDirectory::open(&dir) {
        assert!(map.entries.is_empty() && map.duplicate.is_none() && opened.is_empty());
    }
});
