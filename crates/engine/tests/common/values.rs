//! What tests of whole models share: values of parameters, made up, and a loss.

use gemma4::decoder::LayerRemat;
use gemma4::layout::Slot;
use gemma4::loss::{HeadGradient, LossOptions};
use tensor::{DType, ParamSpec};

/// A loss with everything in it, in f64.
pub(crate) fn loss_options(remat: LayerRemat, blocks: usize) -> LossOptions {
    LossOptions {
        dtype: DType::F64,
        remat,
        blocks,
        called: false,
        z_loss: 0.01,
        gradient: HeadGradient::HiddenAndTable,
    }
}

/// Between -1 and 1, the same on every machine.
pub(crate) fn uniform(seed: &str, n: usize) -> Vec<f64> {
    let mut state =
        seed.bytes().fold(0xCBF2_9CE4_8422_2325_u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01B3));
    let mut next = || {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

/// Values of a parameter, each an f32.
pub(crate) fn values(p: &ParamSpec) -> Vec<f64> {
    let dims = p.shape.dims();
    let (mean, spread) = match dims.len() {
        // Small: the network is calm, and differences of its loss are smooth.
        1 if p.name.contains("post_") => (0.15, 0.05),
        1 => (0.9, 0.4),
        _ => (0.0, 1.7 / (*dims.last().unwrap() as f64).sqrt()),
    };
    uniform(&p.name, p.shape.elements()).iter().map(|u| f64::from((mean + spread * u) as f32)).collect()
}

/// Values of all members of a slot.
pub(crate) fn slot_values(slot: &Slot) -> Vec<f64> {
    slot.members.iter().flat_map(values).collect()
}
