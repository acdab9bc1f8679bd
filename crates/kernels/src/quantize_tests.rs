//! Quantised matrices: what they hold, and products with them.

use proptest::prelude::*;

use super::*;
use crate::product::tests::{Random, exact, stored};
use crate::{Out, Rows, products};

const FORMATS: [Format; 2] = [Format::Int8, Format::Int4];

fn pools() -> Vec<Pool> {
    Level::available().into_iter().flat_map(|level| [1, 3].map(|n| Pool::new(n).with_level(level))).collect()
}

/// Numbers of a normal distribution's shape, nearly.
fn normal(random: &mut Random, n: usize) -> Vec<f32> {
    (0..n).map(|_| (0..6).map(|_| random.unit()).sum::<f32>() / 1.4).collect()
}

/// The root of the mean squared error of a quantised matrix, relative to that of its weights.
fn error(weights: &[f32], matrix: &Matrix) -> f64 {
    let values: Vec<f32> = (0..matrix.n()).flat_map(|row| matrix.row(row)).collect();
    let square = |v: f64| v * v;
    let off: f64 = weights.iter().zip(&values).map(|(w, v)| square(f64::from(w - v))).sum();
    (off / weights.iter().map(|&w| square(f64::from(w))).sum::<f64>()).sqrt()
}

#[test]
fn errors_are_those_of_so_many_bits() {
    let (n, k) = (64, 512);
    let weights = normal(&mut Random(1), n * k);
    let plain = stored(Format::Bf16, &weights, n, k, 2);
    for pool in pools() {
        // The error of evenly spaced steps over the range of 64 and of 32 normal numbers is 0.6 % and 8 %.
        for (format, most) in [(Format::Int8, 0.0065), (Format::Int4, 0.08)] {
            let found = error(&weights, &plain.quantize(&pool, format).unwrap());
            assert!(found < most && found > most / 2.0, "{format}: {found} by {pool:?}");
        }
    }
}

/// A group's largest weight comes back within half a step, whatever its magnitude.
#[test]
fn extreme_weights() {
    let pool = Pool::new(1);
    for magnitude in [0.0, 1e-38, 1e-20, 1.0, 1e20, 3e38] {
        let weights: Vec<f32> = (0..64).map(|i| if i == 5 { magnitude } else { magnitude / 100.0 }).collect();
        let plain = stored(Format::F32, &weights, 1, 64, 0);
        for format in FORMATS {
            let row = plain.quantize(&pool, format).unwrap().row(0);
            assert!((row[5] - magnitude).abs() <= (magnitude * 0.07).max(1e-30), "{} for {magnitude}", row[5]);
        }
    }
    for bad in [f32::NAN, f32::INFINITY] {
        let mut weights = vec![1.0; 40 * 3];
        weights[2 * 40 + 7] = bad;
        let plain = stored(Format::F32, &weights, 3, 40, 0);
        assert_eq!(plain.quantize(&pool, Format::Int8).unwrap_err(), KernelError::NotFinite { row: 2 });
    }
    let quantized = stored(Format::F32, &[1.0; 4], 2, 2, 0).quantize(&pool, Format::Int4).unwrap();
    assert_eq!(quantized.quantize(&pool, Format::Int8).unwrap_err(), KernelError::Quantized(Format::Int4));
    assert_eq!(quantized.quantize(&pool, Format::F32).unwrap_err(), KernelError::NotQuantized(Format::F32));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    /// Every weight is within half a step of its own; both are stored where the layout says.
    #[test]
    fn every_weight_is_near(n in 1usize..40, k in 1usize..200, seed: u64) {
        let weights = Random(seed).numbers(n * k);
        let plain = stored(Format::F32, &weights, n, k, 0);
        for pool in pools() {
            for (format, group, steps) in [(Format::Int8, 64, 127.0), (Format::Int4, 32, 6.0)] {
                let quantized = plain.quantize(&pool, format).unwrap();
                prop_assert_eq!(Some(quantized.bytes().len()), format.bytes(n, k));
                for row in 0..n {
                    let values = quantized.row(row);
                    let wanted = &weights[row * k..(row + 1) * k];
                    for (values, wanted) in values.chunks(group).zip(wanted.chunks(group)) {
                        let largest = wanted.iter().fold(0.0f32, |a, w| a.max(w.abs()));
                        for (v, w) in values.iter().zip(wanted) {
                            prop_assert!((v - w).abs() <= largest / steps, "{v} for {w} of {largest}, {format}");
                        }
                    }
                }
            }
        }
    }

    /// Products are those of the stored weights, but for the rounding of x to one part in 32639.
    #[test]
    fn products_of_quantised_matrices(
        m in 1usize..20, n in 1usize..40, k in 1usize..300, offset in 0usize..70, seed: u64,
    ) {
        let mut random = Random(seed);
        let (x, weights) = (random.numbers(m * k), random.numbers(n * k));
        for format in FORMATS {
            let quantized = stored(Format::F32, &weights, n, k, 0).quantize(&Pool::new(1), format).unwrap();
            // The same bytes at another place.
            let mut bytes = vec![0; offset];
            bytes.extend(quantized.bytes().as_slice());
            let len = bytes.len();
            let moved = Matrix::new(format, Bytes::from(bytes).slice(offset..len).unwrap(), n, k).unwrap();
            let exact = exact(&x, m, &moved);
            let mut integers = None;
            for pool in pools() {
                let mut y = vec![f32::NAN; m * n];
                products(&pool, Rows::F32(&x), m, &[&moved], &mut [Out::F32(&mut y)]).unwrap();
                for (i, (y, (exact, _))) in y.iter().zip(&exact).enumerate() {
                    // x is off by up to half a step of its group, none of which is larger than 1 / 32639.
                    let size: f32 = quantized.row(i % n).iter().map(|w| w.abs()).sum();
                    let bound = f64::from(size) * (0.5 / 32639.0 + 2e-6);
                    prop_assert!((f64::from(*y) - exact).abs() <= bound, "{y} for {exact}, {format} by {pool:?}");
                }
                // One row at a time, with another pool's threads, gives the very same.
                let single = Pool::new(1).with_level(pool.level());
                let mut row = vec![0.0; n];
                for (x, together) in x.chunks(k).zip(y.chunks(n)) {
                    products(&single, Rows::F32(x), 1, &[&quantized], &mut [Out::F32(&mut row)]).unwrap();
                    prop_assert_eq!(together, &row[..]);
                }
                if pool.level() != Level::Portable {
                    prop_assert_eq!(integers.get_or_insert_with(|| y.clone()), &y);
                }
            }
        }
    }
}

#[test]
fn what_is_not_finite_stays_so() {
    for format in FORMATS {
        for pool in pools() {
            let w = stored(Format::F32, &[1.0; 80], 2, 40, 0).quantize(&pool, format).unwrap();
            for bad in [f32::NAN, f32::INFINITY] {
                let mut x = [1.0; 80];
                x[39] = bad;
                let mut y = [0.0; 4];
                products(&pool, Rows::F32(&x), 2, &[&w], &mut [Out::F32(&mut y)]).unwrap();
                assert!(y[..2].iter().all(|v| v.is_nan()) && y[2..].iter().all(|v| (v - 40.0).abs() < 0.2), "{y:?}");
            }
        }
    }
}

#[test]
fn parts_are_quantized_as_the_whole() {
    let (n, k) = (45, 100);
    let weights = normal(&mut Random(7), n * k);
    let pool = Pool::new(2);
    for format in FORMATS {
        let whole = stored(Format::F32, &weights, n, k, 0).quantize(&pool, format).unwrap();
        let [tiles, blocks, block] = format.tiles(n, k).unwrap();
        assert_eq!(tiles * blocks * block, whole.bytes().len());
        let mut parts = vec![0xff; whole.bytes().len()];
        let (first, rest) = parts.split_at_mut(2 * blocks * block);
        stored(Format::F32, &weights[..32 * k], 32, k, 0).quantize_into(&pool, format, first).unwrap();
        let last = stored(Format::F32, &weights[32 * k..], 13, k, 0);
        last.quantize_into(&pool, format, rest).unwrap();
        assert_eq!(parts, whole.bytes().as_slice());
        assert!(matches!(last.quantize_into(&pool, format, &mut parts), Err(KernelError::Size { .. })));
    }
    assert_eq!((Format::Bf16.tiles(n, k), Format::Bf16.group()), (None, None));
    assert_eq!((Format::Int8.group(), Format::Int4.group()), (Some(64), Some(32)));
}
