use proptest::prelude::*;
use tensor::{DType, HostArray};

use super::*;
use crate::{Compare, DotDims, Graph, GraphError, Value};

/// Builds a program of `f64` and `i32` inputs and returns its single result's elements.
fn eval1(inputs: &[HostArray], f: impl FnOnce(&Graph, &[Value]) -> Result<Value, GraphError>) -> Vec<f64> {
    let g = Graph::new("t");
    let vs: Vec<Value> = inputs
        .iter()
        .enumerate()
        .map(|(i, a)| g.input(&i.to_string(), a.dtype(), a.shape().clone()).unwrap())
        .collect();
    let y = f(&g, &vs).unwrap();
    g.output("y", y).unwrap();
    run(&g.finish().unwrap(), inputs).unwrap()[0].to_f64()
}

fn arr(shape: &[usize], v: &[f64]) -> HostArray {
    HostArray::from_f64(DType::F64, shape, v).unwrap()
}

fn ints(shape: &[usize], v: &[i32]) -> HostArray {
    HostArray::from_slice(shape, v).unwrap()
}

#[test]
fn movement() {
    let x = arr(&[2, 3], &[1., 2., 3., 4., 5., 6.]);
    let go =
        |f: &dyn Fn(&Graph, Value) -> Result<Value, GraphError>| eval1(std::slice::from_ref(&x), |g, v| f(g, v[0]));
    assert_eq!(go(&|g, x| g.transpose(x, &[1, 0])), [1., 4., 2., 5., 3., 6.]);
    assert_eq!(go(&|g, x| g.reverse(x, &[1])), [3., 2., 1., 6., 5., 4.]);
    assert_eq!(go(&|g, x| g.slice(x, &[0, 0], &[2, 3], &[1, 2])), [1., 3., 4., 6.]);
    let padded = go(&|g, x| g.pad(x, g.scalar(DType::F64, 9.0)?, &[0, -1], &[1, 1], &[0, 1]));
    assert_eq!(padded, [9., 2., 9., 3., 9., 9., 5., 9., 6., 9., 9., 9., 9., 9., 9.]);
    assert_eq!(go(&|g, x| g.concatenate(&[x, x], 1)), [1., 2., 3., 1., 2., 3., 4., 5., 6., 4., 5., 6.]);
    let repeated = go(&|g, x| g.broadcast_in_dim(g.slice_dim(x, 1, 0, 1)?, [2, 2, 2], &[0, 2]));
    assert_eq!(repeated, [1., 1., 1., 1., 4., 4., 4., 4.]);
    assert_eq!(go(&|g, _| g.iota(DType::F64, [2, 2], 1)), [0., 1., 0., 1.]);
}

#[test]
fn run_time_positions_clamp() {
    let x = arr(&[4], &[1., 2., 3., 4.]);
    let at = |i: i32| eval1(&[x.clone(), ints(&[], &[i])], |g, v| g.dynamic_slice(v[0], &[v[1]], &[2]));
    assert_eq!((at(-3), at(1), at(9)), (vec![1., 2.], vec![2., 3.], vec![3., 4.]));
    let put =
        eval1(&[x.clone(), arr(&[2], &[8., 9.]), ints(&[], &[3])], |g, v| g.dynamic_update_slice(v[0], v[1], &[v[2]]));
    assert_eq!(put, [1., 2., 8., 9.]);
    let ids = ints(&[2, 2], &[-1, 1, 1, 7]);
    let table = arr(&[3, 1], &[1., 2., 3.]);
    assert_eq!(eval1(&[table.clone(), ids.clone()], |g, v| g.take(v[0], v[1])), [1., 2., 2., 3.]);
    let updates = arr(&[2, 2, 1], &[10., 20., 30., 40.]);
    let summed = eval1(&[table, ids, updates], |g, v| g.scatter_add_rows(v[0], v[1], v[2]));
    assert_eq!(summed, [1., 52., 3.]);
}

#[test]
fn products_and_reductions() {
    let x = arr(&[2, 3], &[1., 2., 3., 4., 5., 6.]);
    let product = eval1(&[x.clone(), x.clone()], |g, v| g.matmul_nt(v[0], v[1], DType::F64));
    assert_eq!(product, [14., 32., 32., 77.]);
    let dims = DotDims { lhs_batch: vec![1], rhs_batch: vec![1], lhs_contract: vec![0], rhs_contract: vec![0] };
    let product = eval1(&[x.clone(), x.clone()], |g, v| g.dot_general(v[0], v[1], dims, DType::F64));
    assert_eq!(product, [17., 29., 45.]);
    assert_eq!(eval1(std::slice::from_ref(&x), |g, v| g.reduce_sum(v[0], &[0])), [5., 7., 9.]);
    assert_eq!(eval1(std::slice::from_ref(&x), |g, v| g.reduce_max(v[0], &[1])), [3., 6.]);
    let none = arr(&[2, 0], &[]);
    assert_eq!(eval1(&[none], |g, v| g.reduce_max(v[0], &[1])), [f64::NEG_INFINITY; 2]);
    let all = eval1(&[x], |g, v| {
        let p = g.compare(Compare::Gt, v[0], g.full_like(v[0], 3.0)?)?;
        g.reduce_and(p, &[1])
    });
    assert_eq!(all, [0., 1.]);
}

#[test]
fn rounding_happens_after_every_op() {
    let x = HostArray::from_f64(DType::BF16, [1], &[1.0]).unwrap();
    // 1 + 2^-8 is a tie in bf16 and goes back to 1, twice.
    let y = eval1(&[x], |g, v| g.add_scalar(g.add_scalar(v[0], 2f64.powi(-8))?, 2f64.powi(-8)));
    assert_eq!(y, [1.0]);
}

#[test]
fn wrong_inputs_are_errors() {
    let g = Graph::new("t");
    let x = g.input("x", DType::F32, [2]).unwrap();
    let y = g.custom_call("there.is_none", &[x], &[TensorType::new(DType::F32, [2])], &[("k", 3)]).unwrap();
    g.output("y", y[0]).unwrap();
    let p = g.finish().unwrap();
    assert!(matches!(run(&p, &[]), Err(InterpError::Count { expected: 1, got: 0 })));
    let wrong = run(&p, &[arr(&[2], &[1., 2.])]).unwrap_err();
    assert_eq!(wrong.to_string(), "input \"x\" must be float32[2], got float64[2]");
    let call = run(&p, &[HostArray::zeros(DType::F32, [2]).unwrap()]).unwrap_err();
    assert!(call.to_string().starts_with("cannot evaluate custom call \"there.is_none\""), "{call}");
}

proptest! {
    /// A scan gives what the same steps written out give, both ways round.
    #[test]
    fn scan_is_its_steps(c in -2.0..2.0f64, xs in prop::collection::vec(-2.0..2.0f64, 0..5), k in -2.0..2.0f64, reverse: bool) {
        let n = xs.len();
        let g = Graph::new("t");
        let v = [
            g.input("c", DType::F64, []).unwrap(),
            g.input("xs", DType::F64, [n]).unwrap(),
            g.input("k", DType::F64, []).unwrap(),
        ];
        let step = |b: &Graph, c: &[Value], x: &[Value], k: &[Value]| {
            let next = b.add(b.mul(c[0], k[0])?, x[0])?;
            Ok((vec![next], vec![b.mul(next, next)?]))
        };
        let (last, ys) = if reverse {
            g.scan_reverse(n, &v[..1], &v[1..2], &v[2..], step).unwrap()
        } else {
            g.scan(n, &v[..1], &v[1..2], &v[2..], step).unwrap()
        };
        g.output("last", last[0]).unwrap();
        g.output("ys", ys[0]).unwrap();
        let inputs = [arr(&[], &[c]), arr(&[n], &xs), arr(&[], &[k])];
        let got = run(&g.finish().unwrap(), &inputs).unwrap();
        let (mut carry, mut want) = (c, vec![0.0; n]);
        for step in 0..n {
            let i = if reverse { n - 1 - step } else { step };
            carry = carry * k + xs[i];
            want[i] = carry * carry;
        }
        prop_assert_eq!(got[0].to_f64(), [carry]);
        prop_assert_eq!(got[1].to_f64(), want);
    }
}
