use half::bf16;

use super::*;
use crate::{Bytes, Level, products};

fn numbers(n: usize, seed: usize, scale: f32) -> Vec<f32> {
    (0..n).map(|i| (((i * 7919 + seed * 104_729) % 2003) as f32 / 1001.5 - 1.0) * scale).collect()
}

/// What bf16 holds, so that both kinds are given the same.
fn exact(n: usize, seed: usize, scale: f32) -> Vec<f32> {
    numbers(n, seed, scale).into_iter().map(|v| bf16::from_f32(v).to_f32()).collect()
}

fn narrow(v: &[f32]) -> Vec<bf16> {
    v.iter().map(|&v| bf16::from_f32(v)).collect()
}

fn matrix(v: &[f32], n: usize, k: usize) -> Matrix {
    let bytes: Vec<u8> = narrow(v).iter().flat_map(|v| v.to_le_bytes()).collect();
    Matrix::bf16(Bytes::from(bytes), n, k).unwrap()
}

fn assert_near(got: &[f32], wanted: &[f64], tolerance: f64) {
    assert_eq!(got.len(), wanted.len());
    let most = wanted.iter().fold(0.0f64, |m, v| m.max(v.abs()));
    for (i, (&g, &w)) in got.iter().zip(wanted).enumerate() {
        assert!((f64::from(g) - w).abs() <= tolerance * most, "{i}: {g} is not {w}, of at most {most}");
    }
}

fn norm(x: &[f64], w: Option<&[f32]>, width: usize, eps: f64) -> Vec<f64> {
    let of_row = |x: &[f64]| {
        let scale = 1.0 / (x.iter().map(|v| v * v).sum::<f64>() / width as f64 + eps).sqrt();
        x.iter().enumerate().map(|(i, v)| v * scale * w.map_or(1.0, |w| f64::from(w[i]))).collect::<Vec<_>>()
    };
    x.chunks(width).flat_map(of_row).collect()
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&v| f64::from(v)).collect()
}

fn times(x: &[f64], w: &[f32], k: usize) -> Vec<f64> {
    let row = |x: &[f64]| {
        w.chunks(k).map(|w| w.iter().zip(x).map(|(&w, x)| f64::from(w) * x).sum::<f64>()).collect::<Vec<_>>()
    };
    x.chunks(k).flat_map(row).collect()
}

fn gelu(u: f64) -> f64 {
    0.5 * u * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (u + 0.044_715 * u.powi(3))).tanh())
}

/// Gives what is to be done, with operands in bf16 or f32, to a function.
type How<'a> = &'a dyn Fn(bool, &mut dyn FnMut(&Around<'_>));

/// The result in f32, which is within rounding of `wanted`, and of bf16 within its own.
fn check(x: &[f32], m: usize, matrices: &[&Matrix], how: How<'_>, wanted: &[f64]) {
    for threads in [1, 3] {
        let pool = Pool::new(threads);
        let mut got = vec![0.0; wanted.len()];
        how(false, &mut |how| {
            let out = &mut [Out::F32(&mut got)];
            products_around(&pool, Rows::F32(x), m, matrices, how, out, &[]).unwrap();
        });
        assert_near(&got, wanted, 2e-5);
        let mut rounded = narrow(&got);
        how(true, &mut |how| {
            let capped = matches!(how.then, Then::Capped(_));
            let out = if capped { Out::F32(&mut got) } else { Out::Bf16(&mut rounded) };
            products_around(&pool, Rows::Bf16(&narrow(x)), m, matrices, how, &mut [out], &[]).unwrap();
            if !capped {
                got = rounded.iter().map(|v| v.to_f32()).collect();
            }
        });
        assert_near(&got, wanted, 2e-2);
    }
}

#[test]
fn what_is_done_around_products() {
    if !crate::has_wide_products() {
        return;
    }
    let (m, k, n, eps) = (3, 72, 3000, 1e-3);
    let (x, w) = (exact(m * k, 1, 2.0), exact(k, 2, 1.5));
    let (a, b) = (exact(n * k, 3, 0.1), exact(n * k, 4, 0.1));
    let (first, second) = (matrix(&a, n, k), matrix(&b, n, k));
    let normed = norm(&wide(&x), Some(&w), k, eps);
    let (ya, yb) = (times(&normed, &a, k), times(&normed, &b, k));
    let (wb, of_result) = (narrow(&w), exact(n, 5, 1.0));
    let before = RowNorm { weight: Rows::Bf16(&wb), eps };

    let wanted: Vec<f64> = ya.iter().zip(&yb).map(|(&a, b)| gelu(a) * b).collect();
    check(&x, m, &[&first, &second], &|_, f| f(&Around { norm: Some(before), then: Then::Gated }), &wanted);

    let (column, width) = (5, n + 9);
    let by = exact(m * width, 6, 1.0);
    let narrow_by = narrow(&by);
    let wanted: Vec<f64> = (0..m * n).map(|i| gelu(ya[i]) * f64::from(by[i / n * width + column + i % n])).collect();
    let gated = |is_bf16: bool, f: &mut dyn FnMut(&Around<'_>)| {
        let by = if is_bf16 { Rows::Bf16(&narrow_by) } else { Rows::F32(&by) };
        f(&Around { norm: Some(before), then: Then::GatedBy { by, column } });
    };
    check(&x, m, &[&first], &gated, &wanted);

    let (stream, of_bare) = (exact(m * n, 7, 2.0), times(&wide(&x), &a, k));
    let narrow_stream = narrow(&stream);
    let added = norm(&of_bare, Some(&of_result), n, eps);
    let wanted: Vec<f64> = added.iter().zip(&stream).map(|(y, &x)| (y + f64::from(x)) * 0.75).collect();
    let onto = |is_bf16: bool, f: &mut dyn FnMut(&Around<'_>)| {
        let x = if is_bf16 { Rows::Bf16(&narrow_stream) } else { Rows::F32(&stream) };
        let norm = RowNorm { weight: Rows::F32(&of_result), eps };
        f(&Around { norm: None, then: Then::Onto { x, norm, scale: Some(0.75) } });
    };
    check(&x, m, &[&first], &onto, &wanted);

    let wanted: Vec<f64> = ya.iter().map(|y| 3.0 * (y / 3.0).tanh()).collect();
    check(&x, m, &[&first], &|_, f| f(&Around { norm: Some(before), then: Then::Capped(3.0) }), &wanted);

    // What is only normed.
    let pool = Pool::new(2);
    let normed: Vec<f32> = normed.iter().map(|&v| v as f32).collect();
    let (mut got, mut wanted) = (vec![0.0; m * n], vec![0.0; m * n]);
    products(&pool, Rows::F32(&normed), m, &[&first], &mut [Out::F32(&mut wanted)]).unwrap();
    let how = Around { norm: Some(before), then: Then::Results };
    products_around(&pool, Rows::F32(&x), m, &[&first], &how, &mut [Out::F32(&mut got)], &[]).unwrap();
    assert_near(&got, &wide(&wanted), 1e-6);
}

#[test]
fn what_does_not_fit_around_products_is_refused() {
    if !crate::has_wide_products() {
        return;
    }
    let (pool, w, x) = (Pool::new(1), matrix(&exact(4 * 8, 1, 1.0), 4, 8), exact(8, 2, 1.0));
    let refused = |then: Then<'_>, matrices: &[&Matrix], n: usize| {
        let mut y = vec![0.0; n];
        let how = Around { norm: None, then };
        products_around(&pool, Rows::F32(&x), 1, matrices, &how, &mut [Out::F32(&mut y)], &[]).unwrap_err()
    };
    let by = Rows::F32(&x[..4]);
    let norm = |n: usize| RowNorm { weight: Rows::F32(&x[..n]), eps: 0.0 };
    assert!(matches!(refused(Then::Gated, &[&w], 4), KernelError::Count { .. }));
    assert!(matches!(refused(Then::Capped(1.0), &[&w, &w], 4), KernelError::Count { .. }));
    assert!(matches!(refused(Then::Capped(1.0), &[&w], 3), KernelError::Operand { .. }));
    assert!(matches!(refused(Then::GatedBy { by, column: 1 }, &[&w], 4), KernelError::Operand { .. }));
    assert!(matches!(
        refused(Then::GatedBy { by: Rows::Bf16(&[bf16::ONE; 4]), column: 0 }, &[&w], 4),
        KernelError::Mixed
    ));
    assert!(matches!(refused(Then::Onto { x: by, norm: norm(3), scale: None }, &[&w], 4), KernelError::Operand { .. }));
    let onto = Then::Onto { x: Rows::F32(&x[..3]), norm: norm(4), scale: None };
    assert!(matches!(refused(onto, &[&w], 4), KernelError::Operand { .. }));
}

/// Sequences at several positions of a ring that has come round, or not, and more heads than go together.
#[test]
fn attention_over_a_cache() {
    if !crate::has_wide_products() {
        return;
    }
    for (group, width, rows) in [(2, 6, 5), (8, 32, 300), (11, 40, 130)] {
        let (kv_heads, eps) = (2, 1e-6);
        let positions = [0, 3, rows as i32 - 1, 3 * rows as i32 + 2];
        let b = positions.len();
        let half = width / 2;
        let angles = numbers(b * half, 1, 3.0);
        let round = |v: f32| bf16::from_f32(v).to_f32();
        let cos: Vec<f32> = angles.iter().map(|a| round(a.cos())).collect();
        let sin: Vec<f32> = angles.iter().map(|a| round(a.sin())).collect();
        let q = exact(b * kv_heads * group * width, 2, 1.0);
        let (k, v) = (exact(b * kv_heads * width, 3, 1.0), exact(b * kv_heads * width, 4, 1.0));
        let (q_norm, k_norm) = (exact(width, 5, 1.0), exact(width, 6, 1.0));
        let (keys, values) = (exact(b * kv_heads * rows * width, 7, 1.0), exact(b * kv_heads * rows * width, 8, 1.0));

        let turned = |x: &[f32], w: &[f32]| -> Vec<f64> {
            let mut y = norm(&wide(x), Some(w), width, eps);
            let heads = x.len() / b / width;
            for (i, y) in y.chunks_mut(width).enumerate() {
                for j in 0..half {
                    let at = i / heads * half + j;
                    let (c, s) = (f64::from(cos[at]), f64::from(sin[at]));
                    (y[j], y[j + half]) = (y[j] * c - y[j + half] * s, y[j + half] * c + y[j] * s);
                }
            }
            y
        };
        let (mut keys64, mut values64) = (wide(&keys), wide(&values));
        let (new_k, new_v) = (turned(&k, &k_norm), norm(&wide(&v), None, width, eps));
        for i in 0..b * kv_heads {
            let at = (i * rows + positions[i / kv_heads] as usize % rows) * width;
            keys64[at..at + width].copy_from_slice(&new_k[i * width..][..width]);
            values64[at..at + width].copy_from_slice(&new_v[i * width..][..width]);
        }
        let mut wanted = Vec::new();
        for (i, q) in turned(&q, &q_norm).chunks(width).enumerate() {
            let seen = rows.min(positions[i / group / kv_heads] as usize + 1);
            let of_head = i / group * rows * width;
            let row = |x: &[f64], j: usize| x[of_head + j * width..][..width].to_vec();
            let score = |j: usize| row(&keys64, j).iter().zip(q).map(|(k, q)| k * q).sum::<f64>();
            let scores: Vec<f64> = (0..seen).map(score).collect();
            let most = scores.iter().fold(f64::MIN, |a, &b| a.max(b));
            let weights: Vec<f64> = scores.iter().map(|s| (s - most).exp()).collect();
            let sum: f64 = weights.iter().sum();
            let mut out = vec![0.0; width];
            for (j, weight) in weights.iter().enumerate() {
                out.iter_mut().zip(row(&values64, j)).for_each(|(out, v)| *out += weight / sum * v);
            }
            wanted.extend(out);
        }

        let mut first: Option<Vec<f32>> = None;
        for level in Level::available() {
            for threads in [1, 3] {
                let pool = Pool::new(threads).with_level(level);
                let (mut kept_k, mut kept_v, mut out) = (keys.clone(), values.clone(), vec![0.0; q.len()]);
                let h = Heads {
                    positions: &positions,
                    kv_heads,
                    group,
                    width,
                    rows,
                    cos: Rows::F32(&cos),
                    sin: Rows::F32(&sin),
                    eps,
                };
                let new = NewKeys { keys: Rows::F32(&k), values: Rows::F32(&v), norm: Rows::F32(&k_norm) };
                let (mut ok, mut ov) = (Out::F32(&mut kept_k), Out::F32(&mut kept_v));
                write_keys(&h, &new, &mut ok, &mut ov).unwrap();
                let out_rows = &mut Out::F32(&mut out);
                attend(&pool, &h, Rows::F32(&q), Rows::F32(&q_norm), ok.rows(), ov.rows(), out_rows).unwrap();
                assert_near(&kept_k, &keys64, 1e-6);
                assert_near(&kept_v, &values64, 1e-6);
                assert_near(&out, &wanted, 1e-5);
                if threads == 1 {
                    first = Some(out);
                } else {
                    assert_eq!(first.as_ref(), Some(&out), "{threads} threads");
                }

                let (mut kept_k, mut kept_v, mut out) = (narrow(&keys), narrow(&values), narrow(&q));
                let (cos, sin) = (narrow(&cos), narrow(&sin));
                let h = Heads { cos: Rows::Bf16(&cos), sin: Rows::Bf16(&sin), ..h };
                let (k, v, kn) = (narrow(&k), narrow(&v), narrow(&k_norm));
                let new = NewKeys { keys: Rows::Bf16(&k), values: Rows::Bf16(&v), norm: Rows::Bf16(&kn) };
                let (mut ok, mut ov) = (Out::Bf16(&mut kept_k), Out::Bf16(&mut kept_v));
                write_keys(&h, &new, &mut ok, &mut ov).unwrap();
                let (q, out_rows) = (narrow(&q), &mut Out::Bf16(&mut out));
                attend(&pool, &h, Rows::Bf16(&q), Rows::F32(&q_norm), ok.rows(), ov.rows(), out_rows).unwrap();
                let out: Vec<f32> = out.iter().map(|v| v.to_f32()).collect();
                assert_near(&out, &wanted, 4e-2);
            }
        }
    }
}

#[test]
fn a_cache_that_does_not_fit_is_refused() {
    if !crate::has_wide_products() {
        return;
    }
    let x = [1.0; 64];
    let h = Heads {
        positions: &[1],
        kv_heads: 1,
        group: 2,
        width: 4,
        rows: 3,
        cos: Rows::F32(&x[..2]),
        sin: Rows::F32(&x[..2]),
        eps: 0.0,
    };
    let tried = |h: &Heads<'_>, q: usize, keys: usize, norm: usize| {
        let mut out = vec![0.0; q];
        let keys = Rows::F32(&x[..keys]);
        attend(&Pool::new(1), h, Rows::F32(&x[..q]), Rows::F32(&x[..norm]), keys, keys, &mut Out::F32(&mut out))
    };
    tried(&h, 8, 12, 4).unwrap();
    for (h, q, keys, norm) in [
        (h, 7, 12, 4),
        (h, 8, 11, 4),
        (h, 8, 12, 3),
        (Heads { positions: &[-1], ..h }, 8, 12, 4),
        (Heads { rows: 0, ..h }, 8, 0, 4),
        (Heads { width: 3, ..h }, 6, 9, 3),
        (Heads { width: 0, ..h }, 0, 0, 0),
        (Heads { cos: Rows::F32(&x[..1]), ..h }, 8, 12, 4),
    ] {
        tried(&h, q, keys, norm).unwrap_err();
    }
}
