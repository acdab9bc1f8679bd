use half::bf16;

use super::*;
use crate::{Out, Rows};

/// Three threads, of which each may get nothing.
fn threads(task: &(dyn Fn() + Sync)) {
    std::thread::scope(|s| {
        for _ in 0..3 {
            s.spawn(task);
        }
    });
}

fn numbers(n: usize, seed: usize, scale: f32) -> Vec<f32> {
    (0..n).map(|i| (((i * 7919 + seed * 104_729) % 2003) as f32 / 1001.5 - 1.0) * scale).collect()
}

fn narrowed(v: &[f32]) -> Vec<bf16> {
    v.iter().map(|&v| bf16::from_f32(v)).collect()
}

fn widened(v: &[bf16]) -> Vec<f32> {
    v.iter().map(|v| v.to_f32()).collect()
}

/// Relative to the largest.
fn assert_near(got: &[f32], wanted: &[f64], tolerance: f64) {
    assert_eq!(got.len(), wanted.len());
    let most = wanted.iter().fold(0.0f64, |m, v| m.max(v.abs()));
    for (i, (&g, &w)) in got.iter().zip(wanted).enumerate() {
        assert!((f64::from(g) - w).abs() <= tolerance * most, "{i}: {g} is not {w}, of at most {most}");
    }
}

#[test]
fn functions_are_those_of_f64() {
    use std::arch::x86_64::{_mm512_loadu_ps, _mm512_storeu_ps};

    /// Through a register.
    fn lanes(x: &[f32; 16], f: unsafe fn(&[f32; 16]) -> [f32; 16]) -> [f32; 16] {
        assert!(crate::has_wide_products());
        // SAFETY: the instructions are there.
        unsafe { f(x) }
    }
    #[target_feature(enable = "avx512f")]
    fn exp(x: &[f32; 16]) -> [f32; 16] {
        let mut y = [0.0; 16];
        // SAFETY: both are a register long.
        unsafe { _mm512_storeu_ps(y.as_mut_ptr(), super::lanes::exp(_mm512_loadu_ps(x.as_ptr()))) };
        y
    }
    #[target_feature(enable = "avx512f")]
    fn tanh(x: &[f32; 16]) -> [f32; 16] {
        let mut y = [0.0; 16];
        // SAFETY: both are a register long.
        unsafe { _mm512_storeu_ps(y.as_mut_ptr(), super::lanes::tanh(_mm512_loadu_ps(x.as_ptr()))) };
        y
    }
    if !crate::has_wide_products() {
        return;
    }
    let all: Vec<f32> = numbers(4000, 1, 12.0).into_iter().chain(numbers(4000, 2, 1e-4)).collect();
    for x in all.chunks_exact(16) {
        let x: &[f32; 16] = x.try_into().unwrap();
        for ((&x, e), t) in x.iter().zip(lanes(x, exp)).zip(lanes(x, tanh)) {
            let near = |got: f32, wanted: f64| (f64::from(got) - wanted).abs() <= 3e-7 * wanted.abs();
            assert!(near(e, f64::from(x).exp()), "exp {x}: {e}");
            assert!(near(t, f64::from(x).tanh()), "tanh {x}: {t}");
        }
    }
    let mut x = [0.0; 16];
    x[..5].copy_from_slice(&[f32::INFINITY, -50.0, -0.0, f32::NAN, -1e9]);
    let (t, e) = (lanes(&x, tanh), lanes(&x, exp));
    assert_eq!([t[0], t[1], t[2], t[4]], [1.0, -1.0, 0.0, -1.0]);
    assert!(t[3].is_nan() && e[3].is_nan() && e[4] == 0.0 && e[2] == 1.0);
}

/// A function of each row, in f64, and its gradient by differences.
fn gradient(f: impl Fn(&[f64]) -> f64, x: &[f64]) -> Vec<f64> {
    let at = |i: usize, by: f64| {
        let mut x = x.to_vec();
        x[i] += by;
        f(&x)
    };
    (0..x.len()).map(|i| (at(i, 1e-5) - at(i, -1e-5)) / 2e-5).collect()
}

fn wide64(v: &[f32]) -> Vec<f64> {
    v.iter().map(|&v| f64::from(v)).collect()
}

fn norm64(x: &[f64], w: &[f64], eps: f64) -> Vec<f64> {
    let width = w.len();
    x.chunks(width)
        .flat_map(|x| {
            let scale = 1.0 / (x.iter().map(|x| x * x).sum::<f64>() / width as f64 + eps).sqrt();
            x.iter().zip(w).map(|(x, w)| x * scale * w).collect::<Vec<_>>()
        })
        .collect()
}

#[test]
fn norm_and_its_gradient() {
    if !crate::has_wide_products() {
        return;
    }
    // Two shares of rows, the second of them with one row.
    let (width, rows, eps) = (72, SHARE / 72 + 1, 1e-3);
    let (x, w, ct) = (numbers(rows * width, 1, 2.0), numbers(width, 2, 1.5), numbers(rows * width, 3, 1.0));
    let (mut y, mut inverse) = (vec![0.0; x.len()], vec![0.0; rows]);
    let norm = RmsNorm { width, weight: Some(&w) };
    rms_norm(&threads, &norm, eps, Rows::F32(&x), &mut Out::F32(&mut y), &mut inverse).unwrap();
    assert_near(&y, &norm64(&wide64(&x), &wide64(&w), eps), 1e-6);

    let (mut dx, mut dw) = (vec![0.0; x.len()], vec![9.0; width]);
    let given = NormGradient { x: Rows::F32(&x), inverse: &inverse, ct: Rows::F32(&ct) };
    rms_norm_gradient(&threads, &norm, &given, &mut Out::F32(&mut dx), &mut dw).unwrap();
    let (w64, ct64) = (wide64(&w), wide64(&ct));
    let dot = |y: Vec<f64>, ct: &[f64]| y.iter().zip(ct).map(|(y, c)| y * c).sum::<f64>();
    for row in [0, 7, rows - 1] {
        let at = row * width..(row + 1) * width;
        let wanted = gradient(|x| dot(norm64(x, &w64, eps), &ct64[at.clone()]), &wide64(&x[at.clone()]));
        assert_near(&dx[at], &wanted, 1e-6);
    }
    let x64 = wide64(&x);
    let wanted = gradient(|w| dot(norm64(&x64, w, eps), &ct64), &w64);
    assert_near(&dw, &wanted, 1e-5);

    // Without a weight, and in bf16: the same, rounded once.
    let (xb, ctb) = (narrowed(&x), narrowed(&ct));
    let (mut yb, mut dxb) = (narrowed(&x), narrowed(&x));
    let bare = RmsNorm { width, weight: None };
    rms_norm(&threads, &bare, eps, Rows::Bf16(&xb), &mut Out::Bf16(&mut yb), &mut inverse).unwrap();
    let given = NormGradient { x: Rows::Bf16(&xb), inverse: &inverse, ct: Rows::Bf16(&ctb) };
    rms_norm_gradient(&threads, &bare, &given, &mut Out::Bf16(&mut dxb), &mut dw).unwrap();
    let (x, ct) = (widened(&xb), widened(&ctb));
    rms_norm(&threads, &bare, eps, Rows::F32(&x), &mut Out::F32(&mut y), &mut inverse).unwrap();
    let given = NormGradient { x: Rows::F32(&x), inverse: &inverse, ct: Rows::F32(&ct) };
    rms_norm_gradient(&threads, &bare, &given, &mut Out::F32(&mut dx), &mut dw).unwrap();
    assert_eq!((yb, dxb), (narrowed(&y), narrowed(&dx)));
}

fn gelu64(gate: f64, up: f64) -> f64 {
    let inner = (2.0 / std::f64::consts::PI).sqrt() * (gate + 0.044715 * gate.powi(3));
    0.5 * gate * (inner.tanh() + 1.0) * up
}

#[test]
fn gelu_and_its_gradient() {
    if !crate::has_wide_products() {
        return;
    }
    // The last block of lanes is not whole.
    let n = SHARE + 21;
    let (gate, up, ct) = (numbers(n, 1, 4.0), numbers(n, 2, 2.0), numbers(n, 3, 1.0));
    let mut y = vec![0.0; n];
    gated_gelu(&threads, Rows::F32(&gate), Rows::F32(&up), &mut Out::F32(&mut y)).unwrap();
    let each = |f: &dyn Fn(f64, f64) -> f64| -> Vec<f64> {
        gate.iter().zip(&up).map(|(&g, &u)| f(f64::from(g), f64::from(u))).collect()
    };
    assert_near(&y, &each(&gelu64), 1e-6);
    let (mut dg, mut du) = (vec![0.0; n], vec![0.0; n]);
    let to = [&mut Out::F32(&mut dg), &mut Out::F32(&mut du)];
    gated_gelu_gradient(&threads, Rows::F32(&gate), Rows::F32(&up), Rows::F32(&ct), to).unwrap();
    let times = |v: Vec<f64>| -> Vec<f64> { v.iter().zip(&ct).map(|(v, &c)| v * f64::from(c)).collect() };
    assert_near(&dg, &times(each(&|g, u| (gelu64(g + 1e-5, u) - gelu64(g - 1e-5, u)) / 2e-5)), 1e-6);
    assert_near(&du, &times(each(&|g, _| gelu64(g, 1.0))), 1e-6);

    // In bf16 the GELU is rounded before it is multiplied.
    let (gb, ub) = (narrowed(&gate), narrowed(&up));
    let mut yb = narrowed(&gate);
    gated_gelu(&threads, Rows::Bf16(&gb), Rows::Bf16(&ub), &mut Out::Bf16(&mut yb)).unwrap();
    let ones = vec![1.0; n];
    gated_gelu(&threads, Rows::F32(&widened(&gb)), Rows::F32(&ones), &mut Out::F32(&mut y)).unwrap();
    let wanted: Vec<bf16> = narrowed(&y).iter().zip(&ub).map(|(g, u)| g * u).collect();
    assert_eq!(yb, wanted);
}

#[test]
fn losses_and_their_gradient() {
    if !crate::has_wide_products() {
        return;
    }
    let (rows, width) = (9, 53);
    for (scale, shift) in [(20.0, 0.0), (0.1, 0.0), (0.1, -60.0)] {
        let x: Vec<f32> = numbers(rows * width, 1, scale).iter().map(|v| v + shift).collect();
        check_losses(&x, rows, width);
    }
}

fn check_losses(x: &[f32], rows: usize, width: usize) {
    let targets: Vec<i32> = (0..rows as i32).map(|i| if i == 4 { -1 } else { i * 5 }).collect();
    let weights: Vec<f32> = (0..rows).map(|i| if i == 2 { 0.0 } else { 1.0 }).collect();
    for cap in [Some(30.0f32), None] {
        let how = CrossEntropy { cap, z_loss: 0.01 };
        let loss64 = |row: usize, x: &[f64]| {
            let logits: Vec<f64> =
                x.iter().map(|&x| cap.map_or(x, |c| f64::from(c) * (x / f64::from(c)).tanh())).collect();
            let log_z = logits.iter().map(|l| l.exp()).sum::<f64>().ln();
            let hit = usize::try_from(targets[row]).map_or(0.0, |t| logits[t]);
            (log_z - hit + f64::from(how.z_loss) * log_z * log_z) * f64::from(weights[row])
        };
        let (mut loss, mut z, mut d) = (vec![0.0; rows], vec![0.0; rows], vec![0.0; rows * width]);
        let mut losses = Losses { loss: &mut loss, z: &mut z };
        cross_entropy(&threads, &how, Rows::F32(x), &targets, &weights, &mut losses, &mut Out::F32(&mut d)).unwrap();
        let x64 = wide64(x);
        let row = |r: usize| &x64[r * width..(r + 1) * width];
        let wanted: Vec<f64> = (0..rows).map(|r| loss64(r, row(r))).collect();
        assert_near(&loss, &wanted, 1e-6);
        let wanted: Vec<f64> = (0..rows).flat_map(|r| gradient(|x| loss64(r, x), row(r))).collect();
        assert_near(&d, &wanted, 1e-6);
        assert!(z[2] == 0.0 && z[3] > 0.0);

        let xb = narrowed(x);
        let (mut db, mut more) = (narrowed(x), vec![0.0; rows]);
        let mut losses = Losses { loss: &mut more, z: &mut z };
        cross_entropy(&threads, &how, Rows::Bf16(&xb), &targets, &weights, &mut losses, &mut Out::Bf16(&mut db))
            .unwrap();
        let mut losses = Losses { loss: &mut loss, z: &mut z };
        let x = widened(&xb);
        cross_entropy(&threads, &how, Rows::F32(&x), &targets, &weights, &mut losses, &mut Out::F32(&mut d)).unwrap();
        assert_eq!((db, more), (narrowed(&d), loss));
    }
}

#[test]
fn a_logit_that_is_no_number_makes_a_loss_that_is_none() {
    if !crate::has_wide_products() {
        return;
    }
    let mut x = numbers(64, 1, 1.0);
    x[40] = f32::NAN;
    for cap in [Some(30.0), None] {
        let (mut loss, mut z, mut d) = ([0.0; 2], [0.0; 2], [0.0; 64]);
        let mut losses = Losses { loss: &mut loss, z: &mut z };
        let how = CrossEntropy { cap, z_loss: 0.0 };
        cross_entropy(&threads, &how, Rows::F32(&x), &[1, 1], &[1.0; 2], &mut losses, &mut Out::F32(&mut d)).unwrap();
        assert!(loss[0].is_finite() && loss[1].is_nan(), "{loss:?}");
    }
}

#[test]
fn a_step_of_adam() {
    if !crate::has_wide_products() {
        return;
    }
    let n = SHARE + 45;
    let (p, mu, nu, g) = (numbers(n, 1, 1.0), numbers(n, 2, 0.1), numbers(n, 3, 0.1), numbers(n, 4, 1.0));
    let nu: Vec<f32> = nu.iter().map(|v| v.abs()).collect();
    let a = Adam {
        b1: [0.9, 0.1],
        b2: [0.95, 0.05],
        eps: 1e-8,
        eps_root: 0.0,
        weight_decay: 0.1,
        learning_rate: 0.01,
        corrections: [2.0, 3.0],
        factor: 0.5,
    };
    for narrow in [false, true] {
        let gb = narrowed(&g);
        let g = if narrow { widened(&gb) } else { g.clone() };
        let (mut p2, mut mu2, mut nu2) = (p.clone(), mu.clone(), nu.clone());
        let state = State { parameter: &mut p2, mu: &mut mu2, nu: &mut nu2 };
        let given = if narrow { Rows::Bf16(&gb) } else { Rows::F32(&g) };
        let square = adam(&threads, &a, state, given).unwrap();
        let mut wanted = [vec![], vec![], vec![]];
        for i in 0..n {
            let [p, mu, nu, g] = [p[i], mu[i], nu[i], g[i] * 0.5].map(f64::from);
            let (mu, nu) = (mu * 0.9 + g * 0.1, nu * 0.95 + g * g * 0.05);
            let step = 2.0 * mu / ((3.0 * nu).sqrt() + 1e-8) + 0.1 * p;
            for (to, v) in wanted.iter_mut().zip([p - 0.01 * step, mu, nu]) {
                to.push(v);
            }
        }
        for (got, wanted) in [&p2, &mu2, &nu2].into_iter().zip(&wanted) {
            assert_near(got, wanted, 1e-6);
        }
        let sum = wanted[0].iter().map(|p| p * p).sum::<f64>();
        assert!((f64::from(square) / sum - 1.0).abs() < 1e-6);
        let sum = g.iter().map(|&g| f64::from(g).powi(2)).sum::<f64>();
        assert!((f64::from(squares(&threads, given).unwrap()) / sum - 1.0).abs() < 1e-6);
    }
}

#[test]
fn sizes_that_do_not_fit_are_errors() {
    if !crate::has_wide_products() {
        return;
    }
    let x = vec![0.0; 40];
    let (mut y, mut inverse) = (vec![0.0; 40], vec![0.0; 2]);
    let norm = RmsNorm { width: 16, weight: None };
    let error = rms_norm(&threads, &norm, 0.0, Rows::F32(&x), &mut Out::F32(&mut y), &mut inverse).unwrap_err();
    assert_eq!(error.to_string(), "x has 40 elements, and 1 times 2 by 16 are wanted");
    let error = gated_gelu(&threads, Rows::F32(&x), Rows::F32(&x), &mut Out::F32(&mut y[1..])).unwrap_err();
    assert!(error.to_string().starts_with("y has 39 elements"), "{error}");
}
