//! Every rule against central differences in `f64`, through the interpreter.

use std::cell::Cell;

use tensor::{DType, HostArray};

use crate::op::Op;
use crate::{Compare, DotDims, Graph, GraphError, Program, TensorType, UnaryOp, Value, interp};

mod bodies;
mod random;

type Result<T> = std::result::Result<T, GraphError>;

/// A fixed sequence of numbers in 0..1 without pattern.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (x >> 11) as f64 / (1u64 << 53) as f64
    }

    fn between(&mut self, lo: f64, hi: f64, n: usize) -> Vec<f64> {
        (0..n).map(|_| lo + (hi - lo) * self.next()).collect()
    }
}

/// `float64` of this shape, elements in -2..2.
fn f(shape: &[usize]) -> HostArray {
    within(shape, -2.0, 2.0)
}

/// `float64` of this shape with elements in an interval, different at every call of a test.
fn within(shape: &[usize], lo: f64, hi: f64) -> HostArray {
    thread_local!(static CALLS: Cell<u64> = const { Cell::new(0) });
    let call = CALLS.replace(CALLS.get() + 1);
    let values = Numbers(call * 1_000_003 + 7).between(lo, hi, shape.iter().product());
    HostArray::from_f64(DType::F64, shape, &values).unwrap()
}

fn ints(shape: &[usize], v: &[i32]) -> HostArray {
    HostArray::from_slice(shape, v).unwrap()
}

/// A graph with these inputs.
fn graph(inputs: &[HostArray]) -> (Graph, Vec<Value>) {
    let g = Graph::new("t");
    let vs = inputs.iter().enumerate();
    let vs = vs.map(|(i, a)| g.input(&i.to_string(), a.dtype(), a.shape().clone()).unwrap()).collect();
    (g, vs)
}

/// A scalar on which every element of the outputs has an influence of its own.
fn weighted(g: &Graph, outputs: &[Value]) -> Result<Value> {
    let mut loss = g.scalar(DType::F64, 0.0)?;
    for (i, &y) in outputs.iter().enumerate() {
        let shape = g.shape(y);
        let weights = Numbers(i as u64 + 99).between(0.5, 1.5, shape.elements());
        let weights = g.constant(HostArray::from_f64(DType::F64, shape.clone(), &weights).unwrap())?;
        let dims: Vec<usize> = (0..shape.rank()).collect();
        loss = g.add(loss, g.reduce_sum(g.mul(g.convert(y, DType::F64)?, weights)?, &dims)?)?;
    }
    Ok(loss)
}

/// The program with the loss, then the gradients by all float inputs. Also which inputs have one.
fn differentiated(
    inputs: &[HostArray],
    build: impl Fn(&Graph, &[Value]) -> Result<Vec<Value>>,
) -> (Program, Vec<bool>) {
    let (g, x) = graph(inputs);
    let loss = build(&g, &x).and_then(|y| weighted(&g, &y)).unwrap();
    let grads = g.grad(loss, &x).unwrap();
    g.output("loss", loss).unwrap();
    for (i, (grad, &x)) in grads.iter().zip(&x).enumerate() {
        if let Some(grad) = *grad {
            assert_eq!(g.ty(grad), g.ty(x));
            g.output(&format!("d{i}"), grad).unwrap();
        }
    }
    (g.finish().unwrap(), grads.iter().map(Option::is_some).collect())
}

/// Compares the gradients by all float inputs with central differences: 1e-6 of the larger of 1 and the gradient.
#[track_caller]
fn check(inputs: &[HostArray], build: impl Fn(&Graph, &[Value]) -> Result<Vec<Value>>) {
    let (g, x) = graph(inputs);
    let loss = build(&g, &x).and_then(|y| weighted(&g, &y)).unwrap();
    g.output("loss", loss).unwrap();
    let plain = g.finish().unwrap();
    let loss = |inputs: &[HostArray]| interp::run(&plain, inputs).unwrap()[0].to_f64()[0];

    let (program, present) = differentiated(inputs, build);
    let results = interp::run(&program, inputs).unwrap();
    assert_eq!(results[0].to_f64()[0], loss(inputs), "the loss itself changed");
    let mut grads = results[1..].iter();
    for (i, a) in inputs.iter().enumerate() {
        assert_eq!(present[i], a.dtype().is_float(), "gradient of input {i}");
        if !present[i] {
            continue;
        }
        let got = grads.next().unwrap().to_f64();
        let v = a.to_f64();
        for e in 0..v.len() {
            let h = 1e-5;
            let moved = |by: f64| {
                let mut v = v.clone();
                v[e] += by;
                let mut inputs = inputs.to_vec();
                inputs[i] = HostArray::from_f64(a.dtype(), a.shape().clone(), &v).unwrap();
                loss(&inputs)
            };
            let want = (moved(h) - moved(-h)) / (2.0 * h);
            let error = (got[e] - want).abs();
            assert!(
                error <= 1e-6 * want.abs().max(1.0),
                "input {i}, element {e}: {} instead of {want} (off by {error:e})",
                got[e]
            );
        }
    }
}

/// [`check`] of a function with one result.
#[track_caller]
fn check1(inputs: &[HostArray], build: impl Fn(&Graph, &[Value]) -> Result<Value>) {
    check(inputs, |g, x| Ok(vec![build(g, x)?]));
}

#[test]
fn unary() {
    for &u in UnaryOp::ALL {
        let (lo, hi) = match u {
            UnaryOp::Not | UnaryOp::Sign | UnaryOp::Floor | UnaryOp::Ceil => continue,
            UnaryOp::Log | UnaryOp::Sqrt | UnaryOp::Rsqrt => (0.5, 3.0),
            UnaryOp::Log1p => (-0.5, 2.0),
            _ => (-2.0, 2.0),
        };
        check(&[within(&[2, 3], lo, hi)], |g, x| g.apply(Op::Unary(u), x));
    }
}

#[test]
fn binary() {
    type Build = fn(&Graph, Value, Value) -> Result<Value>;
    let any: [Build; 7] = [Graph::add, Graph::sub, Graph::mul, Graph::div, Graph::max, Graph::min, Graph::rem];
    for op in any {
        // Apart from 0 and from each other, so that nothing jumps nearby.
        check1(&[f(&[2, 3]), within(&[2, 3], 0.7, 1.9)], |g, x| op(g, x[0], x[1]));
    }
    check1(&[within(&[4], 0.3, 2.0), f(&[4])], |g, x| g.pow(x[0], x[1]));
    // The same value on both sides accumulates.
    check1(&[f(&[3])], |g, x| g.mul(x[0], x[0]));
    check1(&[f(&[3])], |g, x| g.sub(g.mul(x[0], g.exp(x[0])?)?, x[0]));
}

#[test]
fn powers_of_zero_and_to_zero() {
    let x = HostArray::from_f64(DType::F64, [3], &[0.0, 0.0, 2.0]).unwrap();
    let b = HostArray::from_f64(DType::F64, [3], &[2.0, 0.0, 0.0]).unwrap();
    let (g, v) = graph(&[x.clone(), b.clone()]);
    let y = g.reduce_sum(g.pow(v[0], v[1]).unwrap(), &[0]).unwrap();
    let d = g.grad(y, &v).unwrap();
    g.output("dx", d[0].unwrap()).unwrap();
    g.output("db", d[1].unwrap()).unwrap();
    let got = interp::run(&g.finish().unwrap(), &[x, b]).unwrap();
    assert_eq!(got[0].to_f64(), [0.0, 0.0, 0.0]);
    assert_eq!(got[1].to_f64(), [0.0, 0.0, 2f64.ln()]);
}

#[test]
fn ties_share() {
    let x = HostArray::from_f64(DType::F64, [4], &[1.0, 3.0, 3.0, 2.0]).unwrap();
    let gradient = |build: fn(&Graph, Value) -> Result<Value>| {
        let (g, v) = graph(std::slice::from_ref(&x));
        let y = build(&g, v[0]).unwrap();
        let d = g.grad(y, &v).unwrap();
        g.output("d", d[0].unwrap()).unwrap();
        interp::run(&g.finish().unwrap(), std::slice::from_ref(&x)).unwrap()[0].to_f64()
    };
    assert_eq!(gradient(|g, x| g.reduce_max(x, &[0])), [0.0, 0.5, 0.5, 0.0]);
    let relu = |g: &Graph, x| g.reduce_sum(g.max(x, g.full_like(x, 2.0)?)?, &[0]);
    assert_eq!(gradient(relu), [0.0, 1.0, 1.0, 0.5]);
    // A bound that is met passes the gradient on.
    let clamp = |g: &Graph, x| g.reduce_sum(g.clamp(g.scalar_like(x, 2.0)?, x, g.scalar_like(x, 2.5)?)?, &[0]);
    assert_eq!(gradient(clamp), [0.0, 0.0, 0.0, 1.0]);
}

#[test]
fn choosing() {
    let pick = |g: &Graph, x: &[Value]| {
        let p = g.compare(Compare::Lt, x[0], x[1])?;
        g.select(p, g.exp(x[0])?, g.sin(x[1])?)
    };
    check1(&[f(&[2, 3]), within(&[2, 3], -1.0, 1.5)], pick);
    let scalar = |g: &Graph, x: &[Value]| {
        let p = g.compare(Compare::Lt, x[0], x[1])?;
        let chosen = g.select(p, x[2], x[3])?;
        g.concatenate(&[chosen, g.reshape(x[0], [1])?, g.reshape(x[1], [1])?], 0)
    };
    check1(&[within(&[], 0.0, 1.0), within(&[], 1.5, 2.0), f(&[3]), within(&[3], 0.0, 1.0)], scalar);
    // Below, inside and above, with bounds as scalars and as arrays, also crossed bounds.
    for (lo, hi) in [(f(&[9]), within(&[9], -0.5, 1.0)), (within(&[], -1.0, -0.9), within(&[], 0.4, 0.6))] {
        check1(&[lo, within(&[9], -2.5, 2.5), hi], |g, x| g.clamp(x[0], x[1], x[2]));
    }
}

#[test]
fn movement() {
    let x = [f(&[2, 3])];
    check1(&x, |g, x| g.broadcast_in_dim(x[0], [2, 4, 3, 2], &[0, 2]));
    check1(&[f(&[1, 3])], |g, x| g.broadcast_in_dim(x[0], [2, 3, 2], &[0, 1]));
    check1(&[f(&[1, 3])], |g, x| g.broadcast_in_dim(x[0], [1, 3], &[0, 1]));
    check1(&[f(&[])], |g, x| g.broadcast_to(x[0], [2, 2]));
    check1(&[f(&[3]), f(&[2, 1])], |g, x| g.mul_bcast(x[0], x[1]));
    check1(&x, |g, x| g.exp(g.reshape(x[0], [3, 2])?));
    check1(&[f(&[2, 3, 4])], |g, x| g.exp(g.transpose(x[0], &[2, 0, 1])?));
    check1(&x, |g, x| g.reverse(x[0], &[1]));
    check1(&[f(&[3, 7])], |g, x| g.slice(x[0], &[1, 1], &[3, 6], &[1, 3]));
    check1(&[f(&[3, 7])], |g, x| g.slice(x[0], &[0, 2], &[3, 2], &[1, 1]).and_then(|e| g.concatenate(&[e, x[0]], 1)));
    check1(&[f(&[2, 2]), f(&[2, 3]), f(&[2, 1])], |g, x| g.concatenate(x, 1));
    let padded = |low: [i64; 2], high: [i64; 2], interior: [usize; 2]| {
        check1(&[f(&[3, 4]), f(&[])], move |g, x| g.pad(x[0], x[1], &low, &high, &interior));
    };
    padded([1, 0], [0, 2], [0, 0]);
    padded([0, 2], [1, 0], [2, 1]);
    padded([-1, -2], [3, -1], [1, 0]);
    padded([2, -1], [-3, 1], [0, 2]);
}

#[test]
fn run_time_positions() {
    // Inside and out of range: starts are clamped.
    for at in [[0, 1], [1, 2], [5, -3]] {
        let at = [ints(&[], &at[..1]), ints(&[], &at[1..])];
        let slice = |g: &Graph, x: &[Value]| g.dynamic_slice(x[0], &x[1..], &[2, 2]);
        check1(&[f(&[3, 4]), at[0].clone(), at[1].clone()], slice);
        let update = |g: &Graph, x: &[Value]| g.dynamic_update_slice(x[0], x[1], &x[2..]);
        check1(&[f(&[3, 4]), f(&[2, 2]), at[0].clone(), at[1].clone()], update);
    }
    // Repeated ids, and ids out of range: clamped by a lookup, dropped by an accumulation.
    let ids = ints(&[2, 3], &[1, 0, 1, 7, -2, 3]);
    check1(&[f(&[4, 2]), ids.clone()], |g, x| g.exp(g.take(x[0], x[1])?));
    check1(&[f(&[4, 2]), ids, f(&[2, 3, 2])], |g, x| g.exp(g.scatter_add_rows(x[0], x[1], x[2])?));
    check1(&[f(&[3]), ints(&[], &[2])], |g, x| g.take(x[0], x[1]));
}

#[test]
fn reductions() {
    check1(&[f(&[2, 3, 2])], |g, x| g.exp(g.reduce_sum(x[0], &[2, 0])?));
    check1(&[f(&[2, 3, 2])], |g, x| g.reduce_max(x[0], &[1]));
    check1(&[f(&[2, 3, 2])], |g, x| g.reduce_min_keep(x[0], &[0, 1]));
    check1(&[f(&[3, 4])], |g, x| {
        let e = g.exp(g.sub_bcast(x[0], g.reduce_max_keep(x[0], &[1])?)?)?;
        g.div_bcast(e, g.reduce_sum_keep(e, &[1])?)
    });
}

#[test]
fn products() {
    check1(&[f(&[2, 3, 4]), f(&[5, 4])], |g, x| g.matmul_nt(x[0], x[1], DType::F64));
    check1(&[f(&[3, 4])], |g, x| g.matmul_nt(x[0], x[0], DType::F64));
    let mut dims = DotDims { lhs_batch: vec![2], rhs_batch: vec![0], lhs_contract: vec![1], rhs_contract: vec![2] };
    check1(&[f(&[2, 3, 4]), f(&[4, 5, 3])], |g, x| g.dot_general(x[0], x[1], dims.clone(), DType::F64));
    // Two batch and two contracted dimensions, in unlike orders.
    dims = DotDims { lhs_batch: vec![3, 0], rhs_batch: vec![1, 4], lhs_contract: vec![4, 1], rhs_contract: vec![0, 2] };
    check1(&[f(&[2, 3, 2, 4, 2]), f(&[2, 4, 3, 3, 2])], |g, x| g.dot_general(x[0], x[1], dims.clone(), DType::F64));
    dims = DotDims::default();
    check1(&[f(&[2]), f(&[3])], |g, x| g.dot_general(x[0], x[1], dims.clone(), DType::F64));
    dims = DotDims { lhs_contract: vec![0, 1], rhs_contract: vec![1, 0], ..DotDims::default() };
    check1(&[f(&[2, 3]), f(&[3, 2])], |g, x| g.dot_general(x[0], x[1], dims.clone(), DType::F64));
}

#[test]
fn identities() {
    check(&[f(&[3]), f(&[2])], |g, x| g.optimization_barrier(&[g.exp(x[0])?, x[1]]));
    check1(&[f(&[3])], |g, x| g.sharding_constraint(g.exp(x[0])?, crate::Sharding::new(&[&["a"]])));
    check1(&[f(&[3])], |g, x| g.reduce_precision(x[0], 11, 52));
}

/// Programs of narrow floats: where gradients are rounded, and that sums are wide.
#[test]
fn narrow_floats() {
    let g = Graph::new("t");
    let x = g.input("x", DType::BF16, [600, 2]).unwrap();
    let w = g.input("w", DType::BF16, [3, 2]).unwrap();
    let table = g.input("table", DType::BF16, [2, 3]).unwrap();
    let ids = g.input("ids", DType::I32, [600]).unwrap();
    let bias = g.input("bias", DType::BF16, [3]).unwrap();
    let y = g.matmul_nt(x, w, DType::F32).unwrap();
    let y = g.convert(y, DType::BF16).unwrap();
    let y = g.add(g.add_bcast(y, bias).unwrap(), g.take(table, ids).unwrap()).unwrap();
    let loss = g.reduce_sum(g.convert(y, DType::F32).unwrap(), &[0, 1]).unwrap();
    let wrt = [x, w, table, ids, bias];
    let grads = g.grad(loss, &wrt).unwrap();
    assert_eq!(grads[3], None);
    for (i, (grad, &v)) in grads.iter().zip(&wrt).enumerate() {
        if let Some(grad) = *grad {
            assert_eq!(g.ty(grad), g.ty(v));
            g.output(&i.to_string(), grad).unwrap();
        }
    }
    let p = g.finish().unwrap();
    let text = p.stablehlo();
    assert!(text.contains("(tensor<600x3xbf16>, tensor<600x2xbf16>) -> tensor<3x2xbf16>"), "{text}");
    assert!(text.contains("(tensor<2x3xf32>, tensor<600xi32>, tensor<600x3xf32>) -> tensor<2x3xf32>"), "{text}");
    let bf = |shape: &[usize]| HostArray::from_f64(DType::BF16, shape, &vec![1.0; shape.iter().product()]).unwrap();
    let ids = ints(&[600], &[1; 600]);
    let got = interp::run(&p, &[bf(&[600, 2]), bf(&[3, 2]), bf(&[2, 3]), ids, bf(&[3])]).unwrap();
    // 600 ones: beyond what bf16 can count to (256), rounded once.
    assert_eq!(got[1].to_f64(), [600.0; 6]);
    assert_eq!(got[2].to_f64(), [0.0, 0.0, 0.0, 600.0, 600.0, 600.0]);
    assert_eq!(got[3].to_f64(), [600.0; 3]);
}

#[test]
fn unreachable_values_have_none() {
    let (g, x) = graph(&[f(&[3]), f(&[3]), ints(&[3], &[0, 1, 2]), f(&[3])]);
    let counted = g.convert(x[2], DType::F64).unwrap();
    let jumps = g.floor(x[1]).unwrap();
    let sum = g.add(g.mul(x[0], counted).unwrap(), jumps).unwrap();
    let loss = g.reduce_sum(sum, &[0]).unwrap();
    let constant = g.scalar(DType::F64, 2.0).unwrap();
    let wrt = [x[0], x[1], x[2], x[3], sum, loss, constant];
    let present: Vec<bool> = g.grad(loss, &wrt).unwrap().iter().map(Option::is_some).collect();
    assert_eq!(present, [true, false, false, false, true, true, false]);
}

/// Nothing is computed that does not lie between the loss and what is asked for.
#[test]
fn frozen_operands_cost_nothing() {
    let (g, x) = graph(&[f(&[3, 4]), f(&[5, 4])]);
    let y = g.matmul_nt(g.exp(x[0]).unwrap(), x[1], DType::F64).unwrap();
    let loss = g.reduce_sum(g.neg(y).unwrap(), &[0, 1]).unwrap();
    let products = || g.body().nodes().iter().filter(|n| matches!(n.op(), Op::DotGeneral { .. })).count();
    assert_eq!(products(), 1);
    let grads = g.grad(loss, &x[1..]).unwrap();
    assert!(grads[0].is_some());
    assert_eq!(products(), 2);
}

#[test]
fn vjp_takes_cotangents() {
    let (g, x) = graph(&[f(&[2]), f(&[2]), f(&[3])]);
    let y = g.mul(x[0], x[0]).unwrap();
    let d = g.vjp(&[(y, x[1]), (y, x[1])], &x[..1]).unwrap();
    g.output("d", d[0].unwrap()).unwrap();
    let wrong = g.vjp(&[(y, x[2])], &x[..1]).unwrap_err().to_string();
    assert!(wrong.contains("a cotangent must have the type of its value"), "{wrong}");
    let wrong = g.grad(y, &x).unwrap_err().to_string();
    assert!(wrong.contains("grad(float64[2]): the loss must be a float scalar"), "{wrong}");
    let inputs = [f(&[2]), within(&[2], 3.0, 4.0), f(&[3])];
    let got = interp::run(&g.finish().unwrap(), &inputs).unwrap()[0].to_f64();
    let (x, ct) = (inputs[0].to_f64(), inputs[1].to_f64());
    assert_eq!(got, [4.0 * x[0] * ct[0], 4.0 * x[1] * ct[1]]);
}

/// The gradient of a gradient.
#[test]
fn twice() {
    check1(&[f(&[3])], |g, x| {
        let y = g.reduce_sum(g.tanh(g.mul(x[0], x[0])?)?, &[0])?;
        Ok(g.grad(y, x)?[0].unwrap())
    });
}

#[test]
fn errors_name_the_model_line() {
    let (g, x) = graph(&[f(&[2])]);
    let line = line!() + 3;
    let call = {
        let _layer = g.scope("layer 3");
        g.custom_call("fast_thing", &x, &[TensorType::new(DType::F64, [2])], &[]).unwrap()
    };
    let loss = g.reduce_sum(call[0], &[0]).unwrap();
    let e = g.grad(loss, &x).unwrap_err();
    assert_eq!((e.location().line(), e.scope()), (line, "layer 3/grad"));
    assert!(e.to_string().contains("custom call \"fast_thing\" has no gradient"), "{e}");
    // Frozen inputs may pass through what has no gradient.
    assert_eq!(g.grad(loss, &[]).unwrap(), []);
    let body = g.body();
    let node = body.nodes().iter().find(|n| n.scope() == "grad").unwrap();
    assert_eq!((node.location().file(), node.location().line()), (file!(), line + 2));
}
