use half::bf16;

use super::*;

fn numbers(n: usize, seed: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 7919 + seed * 104_729) % 1013) as f32 / 506.0 - 1.0).collect()
}

fn threads(task: &(dyn Fn() + Sync)) {
    std::thread::scope(|s| {
        s.spawn(task);
        task();
    });
}

struct Case {
    a: Attention,
    queries: Vec<i32>,
    keys: Vec<i32>,
    query_segments: Vec<i32>,
    key_segments: Vec<i32>,
}

impl Case {
    /// Queries are the last of the keys.
    fn new(a: Attention, documents: usize) -> Self {
        let keys: Vec<i32> = (0..a.keys as i32).collect();
        let queries = keys[a.keys - a.queries..].to_vec();
        let of = |i: usize| (i * documents / a.keys) as i32;
        let key_segments: Vec<i32> = (0..a.batch).flat_map(|_| (0..a.keys).map(of)).collect();
        let query_segments = (0..a.batch).flat_map(|_| (a.keys - a.queries..a.keys).map(of)).collect();
        Case { a, queries, keys, query_segments, key_segments }
    }

    fn places(&self) -> Places<'_> {
        let Case { queries, keys, query_segments, key_segments, .. } = self;
        Places { queries, keys, query_segments, key_segments }
    }

    /// Result, and gradients by queries, keys and values, in f64.
    fn plain(&self, q: &[f32], k: &[f32], v: &[f32], d: &[f32]) -> [Vec<f64>; 4] {
        let a = self.a;
        let e = a.width;
        let wide = |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
        let (q, k, v, d) = (wide(q), wide(k), wide(v), wide(d));
        let mut y = [vec![0.0; q.len()], vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; k.len()]];
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        for head in 0..a.batch * a.kv_heads {
            let b = head / a.kv_heads;
            for r in 0..a.queries * a.group {
                let t = r / a.group;
                let at = (head * a.queries * a.group + r) * e;
                let key = |s: usize| (head * a.keys + s) * e;
                let seen: Vec<usize> = (0..a.keys)
                    .filter(|&s| {
                        let (p, x) = (self.queries[t], self.keys[s]);
                        let near = a.window == 0 || x > p - a.window as i32;
                        let same = self.query_segments[b * a.queries + t] == self.key_segments[b * a.keys + s];
                        x >= 0 && x <= p && near && same
                    })
                    .collect();
                let exps: Vec<f64> = seen.iter().map(|&s| dot(&q[at..at + e], &k[key(s)..key(s) + e]).exp()).collect();
                let sum: f64 = exps.iter().sum();
                for (&s, x) in seen.iter().zip(&exps) {
                    for i in 0..e {
                        y[0][at + i] += x / sum * v[key(s) + i];
                    }
                }
                let by_out = dot(&d[at..at + e], &y[0][at..at + e]);
                for (&s, x) in seen.iter().zip(&exps) {
                    let p = x / sum;
                    let ds = p * (dot(&d[at..at + e], &v[key(s)..key(s) + e]) - by_out);
                    for i in 0..e {
                        y[1][at + i] += ds * k[key(s) + i];
                        y[2][key(s) + i] += ds * q[at + i];
                        y[3][key(s) + i] += p * d[at + i];
                    }
                }
            }
        }
        y
    }
}

fn worst(got: &[f32], want: &[f64]) -> f64 {
    let norm = want.iter().map(|w| w * w).sum::<f64>().sqrt();
    let off = got.iter().zip(want).map(|(&g, w)| (f64::from(g) - w).powi(2)).sum::<f64>().sqrt();
    off / norm
}

fn check(case: &Case) {
    let a = &case.a;
    let (n, m) = (a.rows() * a.width, a.batch * a.kv_heads * a.keys * a.width);
    let narrow = |x: &[f32]| x.iter().map(|&x| bf16::from_f32(x)).collect::<Vec<_>>();
    let widen = |x: &[bf16]| x.iter().map(|x| x.to_f32()).collect::<Vec<_>>();
    let [q, k, v, d] = [(n, 1), (m, 2), (m, 3), (n, 4)].map(|(n, seed)| narrow(&numbers(n, seed)));
    let [qf, kf, vf, df] = [&q, &k, &v, &d].map(|x| widen(x));
    let want = case.plain(&qf, &kf, &vf, &df);

    let mut lse = vec![0.0; a.rows()];
    let [mut y, mut dq, mut dk, mut dv] = [n, n, m, m].map(|n| vec![f32::NAN; n]);
    let x = Operands { q: Rows::F32(&qf), k: Rows::F32(&kf), v: Rows::F32(&vf) };
    attention(&threads, a, &x, &case.places(), &mut Out::F32(&mut y), &mut lse).unwrap();
    let given = Given { lse: &lse, d_out: Rows::F32(&df) };
    let to = [&mut Out::F32(&mut dq), &mut Out::F32(&mut dk), &mut Out::F32(&mut dv)];
    attention_gradient(&threads, a, &x, &case.places(), &given, to).unwrap();
    for (got, want) in [&y, &dq, &dk, &dv].into_iter().zip(&want) {
        // Scores reach 30, whose rounding alone is 1e-6.
        assert!(worst(got, want) < 5e-6, "{a:?} f32: {}", worst(got, want));
    }

    let [mut y, mut dq, mut dk, mut dv] = [n, n, m, m].map(|n| vec![bf16::NAN; n]);
    let x = Operands { q: Rows::Bf16(&q), k: Rows::Bf16(&k), v: Rows::Bf16(&v) };
    attention(&threads, a, &x, &case.places(), &mut Out::Bf16(&mut y), &mut lse).unwrap();
    let given = Given { lse: &lse, d_out: Rows::Bf16(&d) };
    let to = [&mut Out::Bf16(&mut dq), &mut Out::Bf16(&mut dk), &mut Out::Bf16(&mut dv)];
    attention_gradient(&threads, a, &x, &case.places(), &given, to).unwrap();
    for (what, (got, want)) in [&y, &dq, &dk, &dv].into_iter().zip(&want).enumerate() {
        assert!(worst(&widen(got), want) < 1e-2, "{a:?} bf16 {what}: {}", worst(&widen(got), want));
    }
}

#[test]
fn results_and_gradients_are_those_of_the_formula() {
    if !crate::has_bf16_products() {
        return;
    }
    let a = Attention { batch: 2, kv_heads: 1, queries: 40, group: 3, keys: 40, width: 32, window: 0 };
    check(&Case::new(a, 1));
    check(&Case::new(a, 3));
    check(&Case::new(Attention { window: 7, ..a }, 1));
    check(&Case::new(Attention { queries: 300, keys: 300, group: 2, window: 100, width: 64, ..a }, 2));
    check(&Case::new(Attention { batch: 1, kv_heads: 2, queries: 33, keys: 131, group: 8, window: 0, width: 96 }, 1));
}

#[test]
fn a_row_that_sees_nothing_gives_zeros() {
    if !crate::has_wide_products() {
        return;
    }
    let a = Attention { batch: 1, kv_heads: 1, queries: 2, group: 1, keys: 2, width: 32, window: 0 };
    let x = numbers(64, 1);
    let places = Places { queries: &[0, 1], keys: &[0, 1], query_segments: &[1, 9], key_segments: &[1, 1] };
    let (mut y, mut lse) = ([1.0; 64], [0.0; 2]);
    let operands = Operands { q: Rows::F32(&x), k: Rows::F32(&x), v: Rows::F32(&x) };
    attention(&threads, &a, &operands, &places, &mut Out::F32(&mut y), &mut lse).unwrap();
    assert_eq!(y[32..], [0.0; 32]);
    let [mut dq, mut dk, mut dv] = [[1.0; 64]; 3];
    let given = Given { lse: &lse, d_out: Rows::F32(&x) };
    let to = [&mut Out::F32(&mut dq), &mut Out::F32(&mut dk), &mut Out::F32(&mut dv)];
    attention_gradient(&threads, &a, &operands, &places, &given, to).unwrap();
    assert_eq!(dq[32..], [0.0; 32]);
    assert!(dv[32..].iter().all(|&v| v == 0.0));
}

#[test]
fn wrong_sizes_are_refused() {
    let a = Attention { batch: 1, kv_heads: 1, queries: 1, group: 1, keys: 1, width: 32, window: 0 };
    let x = [0.0; 32];
    let operands = Operands { q: Rows::F32(&x), k: Rows::F32(&x), v: Rows::F32(&x) };
    let places = Places { queries: &[0], keys: &[0, 1], query_segments: &[1], key_segments: &[1] };
    let (mut y, mut lse) = ([0.0; 32], [0.0]);
    assert!(attention(&threads, &a, &operands, &places, &mut Out::F32(&mut y), &mut lse).is_err());
    let a = Attention { width: 16, ..a };
    assert!(attention(&threads, &a, &operands, &places, &mut Out::F32(&mut y), &mut lse).is_err());
}
