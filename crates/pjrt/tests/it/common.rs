//! One client for all tests of this binary, with four devices.

use std::sync::OnceLock;

use lapidary_pjrt::plugins::LocateOptions;
use lapidary_pjrt::{Buffer, Client, ClientOptions, CompileOptions, Executable, Plugin};
use tensor::HostArray;

pub(crate) fn client() -> &'static Client {
    static CLIENT: OnceLock<Client> = OnceLock::new();
    CLIENT.get_or_init(|| {
        let path = Plugin::locate("cpu", &LocateOptions::default()).expect("the tests need the CPU plugin");
        let plugin = Plugin::load(path).expect("the CPU plugin loads");
        Client::new(&plugin, &ClientOptions::cpu(4)).expect("the CPU plugin makes a client")
    })
}

pub(crate) fn compile(program: &str) -> Executable {
    client().compile(program, &CompileOptions::default()).expect(program)
}

pub(crate) fn f32s(shape: &[usize], values: &[f32]) -> HostArray {
    HostArray::from_slice(shape, values).expect("values fill the shape")
}

pub(crate) fn put(array: &HostArray) -> Buffer {
    client().buffer_from_host(array, 0).expect("copy to a device")
}

/// Small whole numbers, exact in every float type.
pub(crate) fn small_numbers(n: usize, seed: u64) -> Vec<f64> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..n)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((state >> 33) % 7) as f64 - 3.0
        })
        .collect()
}
