//! Values that depend on an array's name alone, in Rust as in `scripts/interop_orbax.py`, so that neither side has to
//! store what it expects.

use tensor::{DType, HostArray, Shape};

/// Element `i` of `name` is `(7 i + sum of the bytes of name) mod 251 - 125`; unsigned types hold it plus 125,
/// booleans whether that is odd.
pub(crate) fn pattern(name: &str, dtype: DType, shape: &Shape) -> HostArray {
    let seed: u64 = name.bytes().map(u64::from).sum();
    let values: Vec<f64> = (0..shape.elements() as u64)
        .map(|i| (i * 7 + seed) % 251)
        .map(|v| match dtype {
            DType::Bool => (v % 2) as f64,
            d if d.is_signed() => v as f64 - 125.0,
            _ => v as f64,
        })
        .collect();
    HostArray::from_f64(dtype, shape.clone(), &values).expect("the values fill the shape")
}
