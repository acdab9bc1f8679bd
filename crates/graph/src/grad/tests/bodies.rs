//! Gradients through ops with bodies.

use super::*;

/// A step with everything: nonlinear carry, xs, consts, an integer x, a derived const, ys.
fn step(b: &Graph, c: &[Value], x: &[Value], k: &[Value]) -> Result<(Vec<Value>, Vec<Value>)> {
    let mixed = b.tanh(b.add(b.matmul_nt(c[0], k[0], DType::F64)?, b.mul(x[0], c[0])?)?)?;
    // Depends on consts alone: a product (kept outside the loop) and a cheap op (computed again).
    let fixed = b.matmul_nt(k[1], b.exp(k[0])?, DType::F64)?;
    let next = b.mul(mixed, fixed)?;
    let y = b.mul(b.sin(next)?, b.mul(x[0], x[0])?)?;
    Ok((vec![next], vec![y, mixed]))
}

#[test]
fn scans() {
    let inputs = [f(&[2, 3]), f(&[4, 2, 3]), within(&[3, 3], -0.5, 0.5), within(&[2, 3], 0.2, 0.5)];
    check(&inputs, |g, x| {
        let (c, ys) = g.scan(4, &x[..1], &x[1..2], &x[2..], step)?;
        Ok([c, ys].concat())
    });
    check(&inputs, |g, x| {
        let (c, ys) = g.scan_reverse(4, &x[..1], &x[1..2], &x[2..], step)?;
        Ok([c, ys].concat())
    });
    // Only the carry, or only one of the ys, reaches the loss.
    check(&inputs, |g, x| Ok(g.scan(4, &x[..1], &x[1..2], &x[2..], step)?.0));
    check(&inputs, |g, x| Ok(g.scan_reverse(4, &x[..1], &x[1..2], &x[2..], step)?.1[1..].to_vec()));
    // One step, and none: then the carry goes straight through.
    let one = [f(&[2, 3]), f(&[1, 2, 3]), f(&[3, 3]), f(&[2, 3])];
    check(&one, |g, x| Ok(g.scan(1, &x[..1], &x[1..2], &x[2..], step)?.0));
    let none = [f(&[2, 3])];
    check(&none, |g, x| Ok(g.scan(0, x, &[], &[], |b, c, _, _| Ok((vec![b.exp(c[0])?], vec![])))?.0));
}

/// A carry that becomes dependent on a parameter only on the way, one that is an integer, one that nothing reads.
#[test]
fn scan_carries_of_all_kinds() {
    let inputs = [within(&[], 0.5, 1.0), f(&[3, 2]), ints(&[], &[1]), f(&[4, 2])];
    check(&inputs, |g, x| {
        let start = g.splat(DType::F64, [2], 0.25)?;
        let (c, _) = g.scan(3, &[start, start, x[2], x[3]], &x[1..2], &x[..1], |b, c, x, k| {
            let scaled = b.mul(x[0], b.broadcast_to(k[0], [2])?)?;
            let first = b.add(c[0], b.mul(scaled, scaled)?)?;
            // Follows the first with a delay of one step.
            let second = b.mul(c[0], c[1])?;
            let row = b.take(c[3], c[2])?;
            let count = b.add_scalar(c[2], 1.0)?;
            Ok((vec![b.mul(first, row)?, second, count, c[3]], vec![]))
        })?;
        Ok(vec![c[0], c[1], c[3]])
    });
}

#[test]
fn unreached_operands_of_scans_have_none() {
    let (g, x) = graph(&[f(&[2]), f(&[3, 2]), f(&[2]), f(&[3, 2]), f(&[2])]);
    let (c, ys) = g
        .scan(3, &[x[0], x[2]], &[x[1], x[3]], &[x[4]], |b, c, x, k| {
            let other = b.mul(c[1], b.mul(x[1], k[0])?)?;
            Ok((vec![b.mul(c[0], x[0])?, other], vec![other]))
        })
        .unwrap();
    let present = |v: Value| {
        let dims: Vec<usize> = (0..g.shape(v).rank()).collect();
        let loss = g.reduce_sum(v, &dims).unwrap();
        g.grad(loss, &x).unwrap().iter().map(Option::is_some).collect::<Vec<_>>()
    };
    assert_eq!(present(c[0]), [true, true, false, false, false]);
    assert_eq!(present(c[1]), [false, false, true, true, true]);
    assert_eq!(present(ys[0]), [false, false, true, true, true]);
}

fn scans_in(p: &Program) -> Vec<&crate::Scan> {
    let live = p.body().live();
    let nodes = p.nodes().iter().zip(live).filter(|(_, l)| *l);
    nodes.filter_map(|(n, _)| if let Op::Scan(s) = n.op() { Some(s) } else { None }).collect()
}

/// Consts, xs and what follows cheaply from them are not stacked; the forward scan exists once.
#[test]
fn residuals_are_few() {
    let inputs = [f(&[2, 3]), f(&[4, 2, 3]), f(&[3, 3]), f(&[2, 3])];
    let (p, _) = differentiated(&inputs, |g, x| {
        let (c, ys) = g.scan(4, &x[..1], &x[1..2], &x[2..], step)?;
        Ok(vec![c[0], ys[0]])
    });
    let scans = scans_in(&p);
    assert_eq!(scans.len(), 2);
    let (forward, backward) = (scans[0], scans[1]);
    // Residuals: the carry and the sine of `next`. `mixed` is one of the ys already, `next` a product of what is there.
    assert_eq!(forward.body.outputs().len(), 1 + 2 + 2);
    // Xs: three residuals, x, the cotangent of y. Consts: both, and the product of them.
    assert_eq!((backward.carry, backward.xs, backward.consts), (1 + 2, 3 + 1 + 1, 3));
    assert!(backward.reverse);

    // A second gradient of the same loss finds the residuals in place.
    let (g, x) = graph(&inputs);
    let (c, _) = g.scan(4, &x[..1], &x[1..2], &x[2..], step).unwrap();
    let loss = weighted(&g, &c).unwrap();
    let results = || g.body().nodes().iter().map(|n| n.outputs().len()).max();
    g.grad(loss, &x).unwrap();
    let before = results();
    g.grad(loss, &x).unwrap();
    assert_eq!(results(), before);
}

/// Layers over blocks: the inner scan has the outer carry and x among its operands.
fn nested(b: &Graph, c: &[Value], x: &[Value], k: &[Value]) -> Result<(Vec<Value>, Vec<Value>)> {
    let (inner, ys) = b.scan_reverse(2, &[c[0]], &[x[0]], &[k[0], c[0]], |b, c, x, k| {
        let next = b.tanh(b.add(b.mul(c[0], x[0])?, b.mul(k[0], k[1])?)?)?;
        Ok((vec![next], vec![b.mul(next, x[0])?]))
    })?;
    let sum = b.reduce_sum(ys[0], &[0])?;
    Ok((vec![b.add(b.sin(inner[0])?, sum)?], vec![inner[0]]))
}

#[test]
fn nested_scans() {
    let inputs = [f(&[3]), f(&[4, 2, 3]), f(&[3])];
    check(&inputs, |g, x| {
        let (c, ys) = g.scan(4, &x[..1], &x[1..2], &x[2..], nested)?;
        Ok([c, ys].concat())
    });
    // The inner forward scan runs once: the outer backward scan holds the inner backward scan only.
    let (p, _) = differentiated(&inputs, |g, x| Ok(g.scan(4, &x[..1], &x[1..2], &x[2..], nested)?.0));
    let inner: Vec<usize> =
        scans_in(&p).iter().map(|s| s.body.nodes().iter().filter(|n| matches!(n.op(), Op::Scan(_))).count()).collect();
    assert_eq!(inner, [1, 1]);
    // The gradient of a gradient of a scan.
    check1(&[f(&[2]), f(&[3, 2])], |g, x| {
        let (c, _) = g.scan(3, &x[..1], &x[1..], &[], |b, c, x, _| Ok((vec![b.sin(b.mul(c[0], x[0])?)?], vec![])))?;
        let loss = g.reduce_sum(c[0], &[0])?;
        Ok(g.grad(loss, x)?[0].unwrap())
    });
}

/// Gradients of narrow consts are summed in `f32`.
#[test]
fn scan_sums_are_wide() {
    let g = Graph::new("t");
    let k = g.input("k", DType::BF16, []).unwrap();
    let zero = g.scalar(DType::F32, 0.0).unwrap();
    let (c, _) = g
        .scan(600, &[zero], &[], &[k], |b, c, _, k| Ok((vec![b.add(c[0], b.convert(k[0], DType::F32)?)?], vec![])))
        .unwrap();
    let d = g.grad(c[0], &[k]).unwrap()[0].unwrap();
    assert_eq!(g.dtype(d), DType::BF16);
    g.output("d", d).unwrap();
    let one = HostArray::from_f64(DType::BF16, [], &[1.0]).unwrap();
    assert_eq!(interp::run(&g.finish().unwrap(), &[one]).unwrap()[0].to_f64(), [600.0]);
}

fn layer(b: &Graph, x: &[Value]) -> Result<Vec<Value>> {
    let h = b.tanh(b.matmul_nt(x[0], x[1], DType::F64)?)?;
    Ok(vec![b.exp(b.mul(h, h)?)?, h])
}

#[test]
fn remat_equals_plain() {
    let inputs = [f(&[2, 3]), f(&[3, 3])];
    check(&inputs, |g, x| g.remat(x, layer));
    let run =
        |p: &Program| -> Vec<Vec<f64>> { interp::run(p, &inputs).unwrap().iter().map(HostArray::to_f64).collect() };
    let (plain, _) = differentiated(&inputs, layer);
    let (again, _) = differentiated(&inputs, |g, x| g.remat(x, layer));
    assert_eq!(run(&plain), run(&again));
    let (plain, again) = (plain.stablehlo(), again.stablehlo());
    let count = |text: &str, op: &str| text.matches(op).count();
    assert_eq!((count(&plain, "stablehlo.tanh"), count(&again, "stablehlo.tanh")), (1, 2));
    // One barrier over both operands and both cotangents.
    assert_eq!(count(&again, "optimization_barrier"), 1);
    assert!(again.contains(":4 = stablehlo.optimization_barrier"), "{again}");
}

#[test]
fn remat_of_linear_bodies_needs_no_barrier() {
    let inputs = [f(&[2, 3]), f(&[2, 3])];
    let (p, _) = differentiated(&inputs, |g, x| g.remat(x, |b, x| Ok(vec![b.sub(x[0], x[1])?])));
    assert!(!p.stablehlo().contains("optimization_barrier"));
    check(&inputs, |g, x| g.remat(x, |b, x| Ok(vec![b.sub(x[0], x[1])?])));
}

/// A scan of rematerialised steps keeps the carry only.
#[test]
fn remat_in_scans() {
    let inputs = [f(&[2, 3]), f(&[4, 3, 3])];
    let build = |g: &Graph, x: &[Value]| {
        let (c, _) = g.scan(4, &x[..1], &x[1..], &[], |b, c, w, _| {
            let y = b.remat(&[c[0], w[0]], layer)?;
            Ok((vec![b.mul_scalar(y[0], 0.1)?], vec![]))
        })?;
        Ok(c)
    };
    check(&inputs, build);
    let (p, _) = differentiated(&inputs, build);
    let scans = scans_in(&p);
    assert_eq!(scans[0].body.outputs().len(), 2);
    assert!(scans[1].body.nodes().iter().any(|n| matches!(n.op(), Op::OptimizationBarrier)));
    // Scans within remat within scans.
    check(&[f(&[3]), f(&[4, 2, 3]), f(&[3])], |g, x| {
        let (c, ys) = g.scan(4, &x[..1], &x[1..2], &x[2..], |b, c, x, k| {
            let y = b.remat(&[c[0], x[0], k[0]], |b, v| {
                let (c, ys) = nested(b, &v[..1], &v[1..2], &v[2..])?;
                Ok([c, ys].concat())
            })?;
            Ok((y[..1].to_vec(), y[1..].to_vec()))
        })?;
        Ok([c, ys].concat())
    });
}

fn named_layer(b: &Graph, x: &[Value]) -> Result<Vec<Value>> {
    let h = b.named(b.matmul_nt(x[0], x[1], DType::F64)?, "hidden")?;
    let a = b.named(b.tanh(h)?, "activation")?;
    Ok(vec![b.exp(b.matmul_nt(a, x[1], DType::F64)?)?])
}

/// Named values are kept: what only they need is not computed again.
#[test]
fn remat_keeps_by_name() {
    let inputs = [f(&[2, 3]), f(&[3, 3])];
    let counts = |keep: &[&str]| {
        check(&inputs, |g, x| g.remat_keeping(x, keep, named_layer));
        let (p, _) = differentiated(&inputs, |g, x| g.remat_keeping(x, keep, named_layer));
        let text = p.stablehlo();
        (text.matches("stablehlo.dot_general").count(), text.matches("stablehlo.tanh").count())
    };
    // Two products forward, two for the gradient of each, and those that are computed again.
    assert_eq!(counts(&[]), (2 + 4 + 2, 2));
    assert_eq!(counts(&["nothing"]), (2 + 4 + 2, 2));
    assert_eq!(counts(&["hidden"]), (2 + 4 + 1, 2));
    assert_eq!(counts(&["activation"]), (2 + 4 + 1, 1));
    assert_eq!(counts(&["hidden", "activation"]), (2 + 4 + 1, 1));
    // In a scan they are stacked beside the carry.
    let xs = [f(&[2, 3]), within(&[4, 3, 3], -0.4, 0.4)];
    let build = |g: &Graph, x: &[Value]| {
        let step = |b: &Graph, c: &[Value], w: &[Value], _: &[Value]| {
            Ok((b.remat_keeping(&[c[0], w[0]], &["hidden"], named_layer)?, vec![]))
        };
        Ok(g.scan(4, &x[..1], &x[1..], &[], step)?.0)
    };
    check(&xs, build);
    let (p, _) = differentiated(&xs, build);
    assert_eq!(scans_in(&p)[0].body.outputs().len(), 1 + 2);
}

#[test]
fn custom_gradients() {
    // The right gradient passes the check, in a scan and out of it; residuals are handed over.
    let square = |g: &Graph, x: Value, k: Value| {
        let y = g.custom_vjp(
            &[x, k],
            |b, x| Ok((vec![b.mul(b.mul(x[0], x[0])?, x[1])?], vec![b.mul_scalar(x[0], 2.0)?])),
            |b, x, kept, ct| {
                let dx = b.mul(ct[0], b.mul(kept[0], x[1])?)?;
                Ok(vec![Some(dx), Some(b.mul(ct[0], b.mul(x[0], x[0])?)?)])
            },
        )?;
        Ok(y[0])
    };
    check1(&[f(&[3]), f(&[3])], |g, x| square(g, x[0], g.exp(x[1])?));
    check(&[f(&[3]), f(&[2, 3])], |g, x| {
        Ok(g.scan(2, &x[..1], &x[1..], &[], |b, c, x, _| Ok((vec![square(b, c[0], x[0])?], vec![])))?.0)
    });

    // A result without influence gives zeros, an input without gradient none, and what is said counts.
    let (g, x) = graph(&[f(&[2]), f(&[2])]);
    let y = g
        .custom_vjp(
            &x,
            |b, x| Ok((vec![b.neg(x[0])?, b.exp(x[1])?], vec![])),
            |b, _, _, ct| Ok(vec![Some(b.add_scalar(ct[1], 7.0)?), None]),
        )
        .unwrap();
    let stopped = g.stop_gradient(x[1]).unwrap();
    let loss = g.reduce_sum(g.mul(y[0], stopped).unwrap(), &[0]).unwrap();
    let d = g.grad(loss, &x).unwrap();
    assert_eq!(d[1], None);
    g.output("d", d[0].unwrap()).unwrap();
    assert_eq!(interp::run(&g.finish().unwrap(), &[f(&[2]), f(&[2])]).unwrap()[0].to_f64(), [7.0; 2]);
}

#[test]
fn wrong_bodies_are_refused() {
    let (g, x) = graph(&[f(&[2]), ints(&[2], &[0, 1])]);
    let e = g.custom_vjp(&x[..1], |_, x| Ok((x.to_vec(), vec![])), |_, _, _, _| Ok(vec![])).unwrap_err();
    assert!(e.to_string().contains("takes 0 operands, got 1") || e.to_string().contains("gradient"), "{e}");
    let sum = |b: &Graph, ct: &[Value]| Ok(vec![Some(b.reduce_sum(ct[0], &[0])?)]);
    let e = g.custom_vjp(&x[..1], |_, x| Ok((x.to_vec(), vec![])), |b, _, _, ct| sum(b, ct)).unwrap_err();
    assert!(e.to_string().contains("the gradient of operand 0 is float64[], the operand is float64[2]"), "{e}");
    let e = g.stop_gradient(x[1]).unwrap_err();
    assert!(e.to_string().contains("only floats have gradients"), "{e}");
    let e = g.remat(&x, |_, _| Ok(vec![])).unwrap_err();
    assert!(e.to_string().contains("the body returns nothing"), "{e}");
    let outside = g.exp(x[0]).unwrap();
    let e = g.remat(&x, |b, x| Ok(vec![b.mul(x[0], outside)?])).unwrap_err();
    assert!(e.to_string().contains("belongs to another graph"), "{e}");
}
