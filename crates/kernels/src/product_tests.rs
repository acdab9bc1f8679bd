//! Products against sums in f64, for every level of this machine.

use half::bf16;
use proptest::prelude::*;

use super::*;
use crate::{Bytes, Level};

/// A small generator: the same numbers on every machine.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn unit(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    pub(crate) fn numbers(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.unit()).collect()
    }
}

/// Weights at an offset within their memory, so that they lie at any alignment.
pub(crate) fn stored(format: Format, weights: &[f32], n: usize, k: usize, offset: usize) -> Matrix {
    let mut bytes = vec![0xff; offset];
    for &w in weights {
        match format {
            Format::F32 => bytes.extend(w.to_le_bytes()),
            _ => bytes.extend(bf16::from_f32(w).to_le_bytes()),
        }
    }
    let len = bytes.len();
    Matrix::new(format, Bytes::from(bytes).slice(offset..len).unwrap(), n, k).unwrap()
}

/// The product in f64 and, for each element, the sum of magnitudes.
pub(crate) fn exact(x: &[f32], m: usize, w: &Matrix) -> Vec<(f64, f64)> {
    let rows: Vec<Vec<f32>> = (0..w.n()).map(|row| w.row(row)).collect();
    let mut all = Vec::new();
    for i in 0..m {
        let x = &x[i * w.k()..(i + 1) * w.k()];
        for row in &rows {
            let terms = || x.iter().zip(row).map(|(&a, &b)| f64::from(a) * f64::from(b));
            all.push((terms().sum(), terms().map(f64::abs).sum()));
        }
    }
    all
}

fn pools() -> Vec<Pool> {
    Level::available().into_iter().flat_map(|level| [1, 3].map(|n| Pool::new(n).with_level(level))).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn plain_matrices(
        m in 1usize..20, n in 0usize..40, second in 1usize..9, k in 1usize..200, offset in 0usize..70, seed: u64,
        narrow: bool,
    ) {
        let mut random = Random(seed);
        let x = random.numbers(m * k);
        let rounded: Vec<bf16> = x.iter().map(|&v| bf16::from_f32(v)).collect();
        let widened: Vec<f32> = rounded.iter().map(|v| v.to_f32()).collect();
        let a = stored(Format::Bf16, &random.numbers(n * k), n, k, offset);
        let b = stored(Format::F32, &random.numbers(second * k), second, k, offset);
        let x_used = if narrow { &widened } else { &x };
        for pool in pools() {
            let mut ya = vec![f32::NAN; m * n];
            let mut yb = vec![bf16::NAN; m * second];
            let rows = if narrow { Rows::Bf16(&rounded) } else { Rows::F32(&x) };
            products(&pool, rows, m, &[&a, &b], &mut [Out::F32(&mut ya), Out::Bf16(&mut yb)]).unwrap();
            for (y, (exact, size)) in ya.iter().zip(exact(x_used, m, &a)) {
                prop_assert!((f64::from(*y) - exact).abs() <= 2e-6 * size + 1e-30, "{y} for {exact} by {pool:?}");
            }
            for (y, (exact, size)) in yb.iter().zip(exact(x_used, m, &b)) {
                let bound = 2e-6 * size + exact.abs() / 256.0 + 1e-30;
                prop_assert!((y.to_f64() - exact).abs() <= bound, "{y} for {exact} by {pool:?}");
            }
        }
    }

    /// A single row goes through several units at a time; it is what it would be beside another.
    #[test]
    fn one_row_by_itself(n in 1usize..220, k in 1usize..300, offset in 0usize..70, seed: u64) {
        let mut random = Random(seed);
        let x: Vec<bf16> = random.numbers(2 * k).into_iter().map(bf16::from_f32).collect();
        let w = stored(Format::Bf16, &random.numbers(n * k), n, k, offset);
        let wide: Vec<f32> = x.iter().map(|v| v.to_f32()).collect();
        for pool in pools() {
            let (mut one, mut two) = (vec![f32::NAN; n], vec![f32::NAN; 2 * n]);
            products(&pool, Rows::Bf16(&x[..k]), 1, &[&w], &mut [Out::F32(&mut one)]).unwrap();
            products(&pool, Rows::Bf16(&x), 2, &[&w], &mut [Out::F32(&mut two)]).unwrap();
            prop_assert_eq!(&one, &two[..n], "{:?}", pool);
            for (y, (exact, size)) in one.iter().zip(exact(&wide[..k], 1, &w)) {
                prop_assert!((f64::from(*y) - exact).abs() <= 2e-6 * size + 1e-30, "{y} for {exact} by {pool:?}");
            }
        }
    }

    /// What a row of x gives does not depend on its company, the threads, what comes next or where the matrix lies.
    #[test]
    fn rows_are_independent(m in 2usize..18, n in 1usize..30, k in 1usize..150, offset in 0usize..70, seed: u64) {
        let mut random = Random(seed);
        let (x, w) = (random.numbers(m * k), random.numbers(n * k));
        let narrow: Vec<bf16> = x.iter().map(|&v| bf16::from_f32(v)).collect();
        for format in [Format::F32, Format::Bf16] {
            let (here, there) = (stored(format, &w, n, k, 0), stored(format, &w, n, k, offset));
            for level in Level::available() {
                let (one, three) = (Pool::new(1).with_level(level), Pool::new(3).with_level(level));
                let (mut together, mut single) = (vec![0.0; m * n], vec![0.0; n]);
                let out = &mut [Out::F32(&mut together)];
                products_before(&three, Rows::F32(&x), m, &[&there], out, &[&here, &there]).unwrap();
                for (x, together) in x.chunks(k).zip(together.chunks(n)) {
                    products(&one, Rows::F32(x), 1, &[&here], &mut [Out::F32(&mut single)]).unwrap();
                    prop_assert_eq!(together, &single[..]);
                }
                products(&three, Rows::Bf16(&narrow), m, &[&there], &mut [Out::F32(&mut together)]).unwrap();
                for (x, together) in narrow.chunks(k).zip(together.chunks(n)) {
                    products(&one, Rows::Bf16(x), 1, &[&here], &mut [Out::F32(&mut single)]).unwrap();
                    prop_assert_eq!(together, &single[..]);
                }
            }
        }
    }
}

#[test]
fn sizes_are_checked() {
    let pool = Pool::new(1);
    let w = stored(Format::F32, &[1.0; 6], 2, 3, 0);
    let other = stored(Format::F32, &[1.0; 4], 2, 2, 0);
    let x = [1.0; 6];
    let mut y = [0.0; 4];
    let mut z = [0.0; 4];
    let mut call = |m: usize, x: &[f32], ws: &[&Matrix], n: usize| {
        let mut out = [Out::F32(&mut y[..n]), Out::F32(&mut z)];
        let count = ws.len().min(2);
        products(&pool, Rows::F32(x), m, ws, &mut out[..count]).map_err(|e| e.to_string())
    };
    assert_eq!(call(2, &x, &[&w], 4), Ok(()));
    assert_eq!(call(1, &x, &[&w], 4).unwrap_err(), "x has 6 elements, and 1 rows of 3 columns are wanted (matrix 0)");
    assert_eq!(
        call(2, &x, &[&w, &other], 4).unwrap_err(),
        "x has 6 elements, and 2 rows of 2 columns are wanted (matrix 1)"
    );
    assert_eq!(call(2, &x, &[&w], 3).unwrap_err(), "result 0 has room for 3 elements, and 2 rows of 2 are computed");
    assert_eq!(call(2, &x, &[&w, &w, &w], 4).unwrap_err(), "3 matrices and 2 results");
    assert_eq!(call(0, &[], &[&w], 0), Ok(()));
    assert!(call(usize::MAX, &x, &[&w], 4).is_err());
}

#[test]
fn what_is_not_finite_stays_so() {
    let w = stored(Format::Bf16, &[1.0; 80], 2, 40, 2);
    for pool in pools() {
        for bad in [f32::NAN, f32::INFINITY] {
            let mut x = [1.0; 80];
            x[39] = bad;
            let mut y = [0.0; 4];
            products(&pool, Rows::F32(&x), 2, &[&w], &mut [Out::F32(&mut y)]).unwrap();
            assert!(!y[0].is_finite() && !y[1].is_finite() && y[2..] == [40.0; 2], "{y:?} by {pool:?}");
        }
    }
}
