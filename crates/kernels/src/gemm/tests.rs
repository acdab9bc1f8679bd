use super::*;

/// Numbers that are exact in bf16 and of which sums of products are exact in f32.
fn numbers(n: usize, seed: usize) -> Vec<f32> {
    (0..n).map(|i| (((i * 7919 + seed * 104_729) >> 3) % 17) as f32 - 8.0).collect()
}

fn run(task: &(dyn Fn() + Sync)) {
    std::thread::scope(|s| {
        s.spawn(task);
        task();
    });
}

fn plain(p: &Product, l: &[f32], r: &[f32]) -> Vec<f32> {
    let mut y = Vec::new();
    for b in 0..p.batch {
        for i in 0..p.m {
            for j in 0..p.n {
                let at_l = |k: usize| b * p.m * p.k + if p.lhs_transposed { k * p.m + i } else { i * p.k + k };
                let at_r = |k: usize| b * p.k * p.n + if p.rhs_transposed { j * p.k + k } else { k * p.n + j };
                y.push((0..p.k).map(|k| l[at_l(k)] * r[at_r(k)]).sum());
            }
        }
    }
    y
}

#[test]
fn every_layout_and_edge() {
    for (batch, m, n, k) in [
        (1, 1, 1, 1),
        (1, 12, 32, 8),
        (2, 13, 33, 7),
        (1, 100, 70, 333),
        (3, 40, 17, 64),
        (1, 30, 130, 651),
        (1, 300, 300, 40),
        (2, 200, 600, 300),
        (1, 900, 70, 257),
    ] {
        for (lhs_transposed, rhs_transposed) in [(false, false), (false, true), (true, false), (true, true)] {
            let p = Product { batch, m, n, k, lhs_transposed, rhs_transposed };
            let (l, r) = (numbers(batch * m * k, 1), numbers(batch * k * n, 2));
            let want = plain(&p, &l, &r);
            let mut y = vec![f32::NAN; want.len()];
            matmul(&run, &p, Rows::F32(&l), Rows::F32(&r), &mut Out::F32(&mut y)).unwrap();
            assert_eq!(y, want, "{p:?} f32");
            let narrow = |v: &[f32]| v.iter().map(|&v| bf16::from_f32(v)).collect::<Vec<_>>();
            let (l, r) = (narrow(&l), narrow(&r));
            y.fill(f32::NAN);
            matmul(&run, &p, Rows::Bf16(&l), Rows::Bf16(&r), &mut Out::F32(&mut y)).unwrap();
            assert_eq!(y, want, "{p:?} bf16 to f32");
            let mut z = vec![bf16::NAN; want.len()];
            matmul(&run, &p, Rows::Bf16(&l), Rows::Bf16(&r), &mut Out::Bf16(&mut z)).unwrap();
            assert_eq!(z, narrow(&want), "{p:?} bf16");
        }
    }
}

/// What is shared goes by in phases, of steps or of columns, or is not shared at all.
#[test]
fn phases_change_nothing() {
    for (batch, m, n, k) in [(1, 300, 300, 1200), (2, 170, 290, 700), (1, 150, 1100, 600)] {
        for (lhs_transposed, rhs_transposed) in [(false, false), (true, true)] {
            let p = Product { batch, m, n, k, lhs_transposed, rhs_transposed };
            let (l, r) = (numbers(batch * m * k, 5), numbers(batch * k * n, 6));
            let want = plain(&p, &l, &r);
            for (units, sums) in
                [(1 << 16, usize::MAX), (1 << 18, usize::MAX), (3 << 16, 0), (1 << 17, 0), (1, 0), (1, usize::MAX)]
            {
                let mut y = vec![f32::NAN; want.len()];
                let limits = job::Limits { units, sums };
                within(&run, &p, Rows::F32(&l), Rows::F32(&r), &mut Out::F32(&mut y), limits).unwrap();
                assert!(y == want, "{p:?} {units} units, {sums} sums");
            }
        }
    }
}

#[test]
fn the_portable_kernel_agrees() {
    let p = Product { batch: 1, m: 29, n: 45, k: 77, lhs_transposed: true, rhs_transposed: true };
    let (l, r) = (numbers(p.m * p.k, 3), numbers(p.k * p.n, 4));
    let mut y = vec![0.0; p.m * p.n];
    let job = |data: *const f32, free, k_inside| Operand { data: data.cast(), is_bf16: false, free, k: p.k, k_inside };
    let operands = (job(l.as_ptr(), p.m, false), job(r.as_ptr(), p.n, true));
    let job = job::Job::new(p, Kernel::Portable, operands, p.k, Target::F32(y.as_mut_ptr()), job::LIMITS);
    job.run(&run);
    assert_eq!(y, plain(&p, &l, &r));
}

#[test]
fn wrong_sizes_are_refused() {
    let p = Product { batch: 1, m: 2, n: 2, k: 2, lhs_transposed: false, rhs_transposed: false };
    let x = [0.0; 4];
    let mut y = [0.0; 3];
    assert!(matmul(&run, &p, Rows::F32(&x), Rows::F32(&x), &mut Out::F32(&mut y)).is_err());
    assert!(matmul(&run, &p, Rows::F32(&x[..3]), Rows::F32(&x), &mut Out::F32(&mut [0.0; 4])).is_err());
    let half = [bf16::ZERO; 4];
    assert!(matmul(&run, &p, Rows::F32(&x), Rows::Bf16(&half), &mut Out::F32(&mut [0.0; 4])).is_err());
}

#[test]
fn values_that_are_not_finite_stay_so() {
    let p = Product { batch: 1, m: 1, n: 2, k: 2, lhs_transposed: false, rhs_transposed: false };
    let mut z = [bf16::ZERO; 2];
    let l = [bf16::NAN, bf16::ONE];
    matmul(&run, &p, Rows::Bf16(&l), Rows::Bf16(&[bf16::ONE; 4]), &mut Out::Bf16(&mut z)).unwrap();
    assert!(z.iter().all(|v| v.is_nan()));
    let l = [bf16::INFINITY, bf16::ONE];
    matmul(&run, &p, Rows::Bf16(&l), Rows::Bf16(&[bf16::ONE; 4]), &mut Out::Bf16(&mut z)).unwrap();
    assert_eq!(z, [bf16::INFINITY; 2]);
}
