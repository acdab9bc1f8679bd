//! Values that depend on an array's name alone, in Rust as in `scripts/interop_orbax.py`, so that neither side has to
//! store what it expects.

use tensor::{DType, HostArray, Shape};

/// Element `i` is `v - 125` for a hash `v < 251` of `i` and the sum of the name's bytes: every element type holds it exactly,
/// and it hardly compresses. Unsigned types hold `v`, booleans whether it is odd.
pub(crate) fn pattern(name: &str, dtype: DType, shape: &Shape) -> HostArray {
    let seed = name.bytes().map(u32::from).sum::<u32>().wrapping_mul(40503);
    let hash = |i: u32| {
        let x = i.wrapping_mul(2_654_435_761).wrapping_add(seed);
        let x = (x ^ (x >> 15)).wrapping_mul(2_246_822_519);
        f64::from((x ^ (x >> 13)) % 251)
    };
    let values: Vec<f64> = (0..shape.elements() as u32)
        .map(hash)
        .map(|v| match dtype {
            DType::Bool => v % 2.0,
            d if d.is_signed() => v - 125.0,
            _ => v,
        })
        .collect();
    HostArray::from_f64(dtype, shape.clone(), &values).expect("the values fill the shape")
}
