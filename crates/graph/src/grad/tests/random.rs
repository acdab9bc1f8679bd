//! Rules with many parameters, at random ones.

use proptest::prelude::*;

use super::*;

/// A permutation of `0..n` from sort keys.
fn permutation(keys: &[u32]) -> Vec<usize> {
    let mut p: Vec<usize> = (0..keys.len()).collect();
    p.sort_by_key(|&i| keys[i]);
    p
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn pads(dims in prop::collection::vec((0usize..4, -3i64..4, -3i64..4, 0usize..3), 1..3)) {
        let shape: Vec<usize> = dims.iter().map(|d| d.0).collect();
        let (low, high): (Vec<i64>, Vec<i64>) = dims.iter().map(|d| (d.1, d.2)).unzip();
        let interior: Vec<usize> = dims.iter().map(|d| d.3).collect();
        let size = |&(n, low, high, gap): &(usize, i64, i64, usize)| low + high + (n + n.saturating_sub(1) * gap) as i64;
        prop_assume!(dims.iter().all(|d| size(d) >= 0));
        check1(&[f(&shape), f(&[])], |g, x| g.pad(x[0], x[1], &low, &high, &interior));
    }

    #[test]
    fn slices(dims in prop::collection::vec((0usize..5, 0usize..5, 0usize..5, 1usize..4), 1..3)) {
        let shape: Vec<usize> = dims.iter().map(|d| d.0 + d.1 + d.2).collect();
        let starts: Vec<usize> = dims.iter().map(|d| d.0).collect();
        let limits: Vec<usize> = dims.iter().map(|d| d.0 + d.1).collect();
        let strides: Vec<usize> = dims.iter().map(|d| d.3).collect();
        check1(&[f(&shape)], |g, x| g.slice(x[0], &starts, &limits, &strides));
    }

    /// Batch, free and contracted dimensions in any number and order.
    #[test]
    fn products(
        batch in prop::collection::vec(1usize..3, 0..3),
        contract in prop::collection::vec(1usize..4, 0..3),
        left in prop::collection::vec(1usize..3, 0..3),
        right in prop::collection::vec(1usize..3, 0..3),
        keys in prop::collection::vec(any::<u32>(), 12),
    ) {
        // Dimensions in the order batch, contracted, free are shuffled: dimension `i` goes to place `at[i]`.
        let shuffled = |free: &[usize], keys: &[u32]| {
            let sizes = [&batch[..], &contract, free].concat();
            let at = permutation(&keys[..sizes.len()]);
            let mut shape = vec![0; sizes.len()];
            for (&p, &n) in at.iter().zip(&sizes) {
                shape[p] = n;
            }
            let (b, c) = (batch.len(), contract.len());
            (shape, at[..b].to_vec(), at[b..b + c].to_vec())
        };
        let (l, lhs_batch, lhs_contract) = shuffled(&left, &keys[..6]);
        let (r, rhs_batch, rhs_contract) = shuffled(&right, &keys[6..]);
        let dims = DotDims { lhs_batch, rhs_batch, lhs_contract, rhs_contract };
        check1(&[f(&l), f(&r)], |g, x| g.dot_general(x[0], x[1], dims.clone(), DType::F64));
    }

    /// A scan in either direction, of any length, with any of its results used.
    #[test]
    fn scans(length in 0usize..5, reverse: bool, used in 1u8..8, scale in 0.2..0.9f64) {
        let inputs = [f(&[2]), f(&[2]), f(&[length, 2]), f(&[2])];
        let step = |b: &Graph, c: &[Value], x: &[Value], k: &[Value]| {
            let mixed = b.tanh(b.add(b.mul(c[0], k[0])?, b.mul(c[1], x[0])?)?)?;
            let other = b.mul_scalar(b.add(b.exp(mixed)?, b.mul(c[1], b.cos(k[0])?)?)?, scale)?;
            Ok((vec![mixed, other], vec![b.mul(mixed, other)?]))
        };
        let (g, x) = graph(&inputs);
        let build = |g: &Graph, x: &[Value]| {
            let scan = if reverse { Graph::scan_reverse } else { Graph::scan };
            let (c, ys) = scan(g, length, &x[..2], &x[2..3], &x[3..], step)?;
            let all = [c, ys].concat();
            Ok(all.into_iter().enumerate().filter(|(i, _)| used >> i & 1 == 1).map(|(_, v)| v).collect::<Vec<Value>>())
        };
        let loss = weighted(&g, &build(&g, &x).unwrap()).unwrap();
        // What is not used has no gradient: a sum of everything gives each input one, to compare with differences.
        prop_assert!(g.grad(loss, &x).is_ok());
        check(&inputs, |g, x| {
            let sum = x.iter().map(|&v| g.reduce_sum(v, &(0..g.shape(v).rank()).collect::<Vec<_>>()));
            let sums = sum.collect::<Result<Vec<Value>>>()?;
            Ok([build(g, x)?, sums].concat())
        });
    }
}
