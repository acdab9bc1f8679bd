//! A manifest of an OCDBT store: decoding any bytes gives a manifest or an error, and a manifest survives the way
//! through its own encoding.
#![no_main]

use checkpoint::orbax::ocdbt::Manifest;
use libfuzzer_sys::fuzz_target;

mod frame;

fuzz_target!(|data: &[u8]| {
    let _ = Manifest::decode(data);
    for block in frame::both(0x0cdb_3a2a, data) {
        if let Ok(m) = Manifest::decode(&block)
            && m.latest().is_none_or(|v| v.root_height < 128)
        {
            assert_eq!(Manifest::decode(&m.encode()), Ok(m));
        }
    }
});
