//! A B+tree node: decoding any bytes gives a node or an error in bounded memory, and a node survives the way through its
//! own encoding.
#![no_main]

use checkpoint::orbax::ocdbt::{Budget, Node};
use libfuzzer_sys::fuzz_target;

mod frame;

fuzz_target!(|data: &[u8]| {
    let budget = || Budget::new(16 << 20);
    let _ = Node::decode(data, &mut budget());
    for block in frame::both(0x0cdb_20de, data) {
        if let Ok(node) = Node::decode(&block, &mut budget()) {
            assert_eq!(Node::decode(&node.encode(), &mut budget()), Ok(node));
        }
    }
});
