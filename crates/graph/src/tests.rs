//! Shape inference, op by op: what is accepted with which result type, and what is refused with which words.

use tensor::{DType, HostArray, Shape};

use crate::{
    Compare, DotDims, Graph, GraphError, InputOptions, OutputOptions, Problem, Sharding, TensorType, Value, finite_min,
};

/// What the cases build on.
struct Env {
    g: Graph,
    /// `float32[2, 3]`.
    x: Value,
    /// `float32[3, 2]`.
    t: Value,
    /// `int32[2, 3]`.
    i: Value,
    /// `bool[2, 3]`.
    p: Value,
    /// `uint8[2, 3]`.
    u: Value,
    /// `float32[]`.
    s: Value,
    /// `int32[]`.
    k: Value,
    /// `bfloat16[2, 3]`.
    b: Value,
}

fn env() -> Env {
    let g = Graph::new("t");
    let input = |name: &str, d: DType, s: &[usize]| g.input(name, d, s).unwrap();
    let (x, t) = (input("x", DType::F32, &[2, 3]), input("t", DType::F32, &[3, 2]));
    let (i, p) = (input("i", DType::I32, &[2, 3]), input("p", DType::Bool, &[2, 3]));
    let (u, s) = (input("u", DType::U8, &[2, 3]), input("s", DType::F32, &[]));
    let (k, b) = (input("k", DType::I32, &[]), input("b", DType::BF16, &[2, 3]));
    Env { g, x, t, i, p, u, s, k, b }
}

type Unary = fn(&Graph, Value) -> Result<Value, GraphError>;
type Binary = fn(&Graph, Value, Value) -> Result<Value, GraphError>;
type Case = fn(&Env) -> Result<Value, GraphError>;

#[track_caller]
fn good(want: &str, f: Case) {
    let e = env();
    match f(&e) {
        Ok(v) => assert_eq!(e.g.ty(v).to_string(), want),
        Err(err) => panic!("{err}"),
    }
}

#[track_caller]
fn bad(words: &str, f: Case) {
    let e = env();
    match f(&e) {
        Ok(v) => panic!("accepted, with result {}", e.g.ty(v)),
        Err(err) => assert!(err.to_string().contains(words), "{err}"),
    }
}

#[test]
fn unary() {
    let floats: [Unary; 12] = [
        Graph::exp,
        Graph::expm1,
        Graph::log,
        Graph::log1p,
        Graph::tanh,
        Graph::logistic,
        Graph::sqrt,
        Graph::rsqrt,
        Graph::sin,
        Graph::cos,
        Graph::floor,
        Graph::ceil,
    ];
    for f in floats {
        let e = env();
        let v = f(&e.g, e.b).unwrap();
        assert_eq!(e.g.ty(v).to_string(), "bfloat16[2, 3]");
        let err = f(&e.g, e.i).unwrap_err();
        assert!(err.to_string().contains("operand 0 has dtype int32, expected a float"), "{err}");
    }
    good("int32[2, 3]", |e| e.g.neg(e.i));
    bad("has dtype bool", |e| e.g.neg(e.p));
    good("int32[2, 3]", |e| e.g.abs(e.i));
    bad("expected a signed dtype", |e| e.g.abs(e.u));
    good("float32[2, 3]", |e| e.g.sign(e.x));
    bad("expected a signed dtype", |e| e.g.sign(e.u));
    good("bool[2, 3]", |e| e.g.not(e.p));
    bad("expected bool or an integer", |e| e.g.not(e.x));
}

#[test]
fn binary() {
    let numeric: [Binary; 7] = [Graph::add, Graph::sub, Graph::mul, Graph::div, Graph::rem, Graph::max, Graph::min];
    for f in numeric {
        let e = env();
        assert_eq!(e.g.ty(f(&e.g, e.x, e.x).unwrap()).to_string(), "float32[2, 3]");
        assert_eq!(e.g.ty(f(&e.g, e.u, e.u).unwrap()).to_string(), "uint8[2, 3]");
        assert_eq!(f(&e.g, e.x, e.t).unwrap_err().problem(), &Problem::ShapesDiffer);
        assert_eq!(f(&e.g, e.x, e.s).unwrap_err().problem(), &Problem::ShapesDiffer);
        assert_eq!(f(&e.g, e.x, e.b).unwrap_err().problem(), &Problem::DTypesDiffer);
        assert!(matches!(f(&e.g, e.p, e.p).unwrap_err().problem(), Problem::DType { .. }));
    }
    good("float32[2, 3]", |e| e.g.pow(e.x, e.x));
    bad("expected a float", |e| e.g.pow(e.i, e.i));
    let logical: [Binary; 3] = [Graph::and, Graph::or, Graph::xor];
    for f in logical {
        let e = env();
        assert_eq!(e.g.ty(f(&e.g, e.p, e.p).unwrap()).to_string(), "bool[2, 3]");
        assert_eq!(e.g.ty(f(&e.g, e.i, e.i).unwrap()).to_string(), "int32[2, 3]");
        assert!(matches!(f(&e.g, e.x, e.x).unwrap_err().problem(), Problem::DType { .. }));
    }
}

#[test]
fn choosing_and_converting() {
    good("bool[2, 3]", |e| e.g.compare(Compare::Lt, e.x, e.x));
    good("bool[2, 3]", |e| e.g.compare(Compare::Eq, e.p, e.p));
    bad("expected an ordered dtype", |e| e.g.compare(Compare::Lt, e.p, e.p));
    bad("same shape", |e| e.g.compare(Compare::Eq, e.x, e.t));
    good("float32[2, 3]", |e| e.g.select(e.p, e.x, e.x));
    bad("operand 0 has dtype float32, expected bool", |e| e.g.select(e.x, e.x, e.x));
    bad("same shape", |e| e.g.select(e.p, e.t, e.t));
    good("float32[2, 3]", |e| e.g.clamp(e.s, e.x, e.x));
    bad("same dtype", |e| e.g.clamp(e.k, e.x, e.x));
    bad("same shape", |e| e.g.clamp(e.t, e.x, e.s));
    good("float16[2, 3]", |e| e.g.convert(e.p, DType::F16));
    good("float32[2, 3]", |e| e.g.reduce_precision(e.x, 8, 7));
    bad("cannot keep 0 exponent", |e| e.g.reduce_precision(e.x, 0, 7));
    good("bfloat16[2, 3]", |e| e.g.add_scalar(e.b, 0.1));
    good("bfloat16[2, 3]", |e| e.g.mul_scalar(e.b, 0.1));
    bad("0.1 is not a value of int32", |e| e.g.mul_scalar(e.i, 0.1));
    let e = env();
    assert_eq!(e.g.convert(e.x, DType::F32).unwrap(), e.x, "a conversion to the same dtype is nothing");
}

#[test]
fn constants() {
    good("float32[2]", |e| e.g.constant(HostArray::from_slice([2], &[1.0f32, 2.0]).unwrap()));
    bad("constants are at most 65536: pass it as an input", |e| {
        e.g.constant(HostArray::zeros(DType::F32, [128, 129]).unwrap())
    });
    good("bfloat16[]", |e| e.g.scalar(DType::BF16, f64::NEG_INFINITY));
    bad("overflows bfloat16; its smallest value is -33895313892515355", |e| {
        e.g.scalar(DType::BF16, f64::from(f32::MIN))
    });
    bad("256 is not a value of uint8", |e| e.g.scalar(DType::U8, 256.0));
    bad("NaN is not a value of int32", |e| e.g.scalar(DType::I32, f64::NAN));
    good("int32[]", |e| e.g.scalar_like(e.i, -5.0));
    good("int64[7]", |e| e.g.splat(DType::I64, [7], 3.0));
    bad("too large", |e| e.g.splat(DType::I64, [usize::MAX, 2], 3.0));
    good("int32[4, 5]", |e| e.g.iota(DType::I32, [4, 5], 1));
    bad("dimension 2 is out of range for rank 2", |e| e.g.iota(DType::I32, [4, 5], 2));
    bad("cannot count in bool", |e| e.g.iota(DType::Bool, [2], 0));
    for d in DType::ALL {
        let e = env();
        e.g.scalar(d, finite_min(d)).unwrap();
    }
}

#[test]
fn shapes() {
    good("float32[4, 2, 5, 3]", |e| e.g.broadcast_in_dim(e.x, [4, 2, 5, 3], &[1, 3]));
    bad("dimension 1 of size 3 cannot become dimension 1 of [2, 4]", |e| e.g.broadcast_in_dim(e.x, [2, 4], &[0, 1]));
    bad("must be ascending", |e| e.g.broadcast_in_dim(e.t, [2, 3], &[1, 0]));
    bad("listed twice", |e| e.g.broadcast_in_dim(e.x, [2, 3], &[0, 0]));
    good("float32[7, 2, 3]", |e| e.g.broadcast_to(e.x, [7, 2, 3]));
    bad("fewer dimensions", |e| e.g.broadcast_to(e.x, [3]));
    good("float32[2, 3]", |e| e.g.add_bcast(e.x, e.s));
    good("float32[2, 3]", |e| e.g.mul_bcast(e.g.slice_dim(e.x, 0, 0, 1)?, e.x));
    bad("sizes 2 and 3 do not broadcast (dimension 0 of 2)", |e| e.g.add_bcast(e.x, e.t));
    good("float32[6]", |e| e.g.reshape(e.x, [6]));
    bad("number of elements differs", |e| e.g.reshape(e.x, [7]));
    good("float32[2, 1, 3]", |e| e.g.expand_dim(e.x, 1));
    bad("cannot insert dimension 3 into rank 2", |e| e.g.expand_dim(e.x, 3));
    good("float32[3, 2]", |e| e.g.transpose(e.x, &[1, 0]));
    bad("must list all 2 dimensions", |e| e.g.transpose(e.x, &[1]));
    good("float32[1, 2]", |e| e.g.slice(e.x, &[0, 0], &[1, 3], &[1, 2]));
    bad("slice 0..4 by 1 does not fit dimension 1 of size 3", |e| e.g.slice(e.x, &[0, 0], &[1, 4], &[1, 1]));
    bad("by 0", |e| e.g.slice(e.x, &[0, 0], &[1, 3], &[1, 0]));
    good("float32[2, 1]", |e| e.g.slice_dim(e.x, 1, 1, 2));
    bad("dimension 2 is out of range", |e| e.g.slice_dim(e.x, 2, 0, 1));
    good("float32[5, 2]", |e| e.g.pad(e.x, e.s, &[1, -1], &[1, 0], &[1, 0]));
    bad("dimension 0 would have size -1", |e| e.g.pad(e.x, e.s, &[-3, 0], &[0, 0], &[0, 0]));
    bad("must be a scalar", |e| e.g.pad(e.x, e.x, &[0, 0], &[0, 0], &[0, 0]));
    bad("same dtype", |e| e.g.pad(e.x, e.k, &[0, 0], &[0, 0], &[0, 0]));
    good("float32[4, 3]", |e| e.g.concatenate(&[e.x, e.x], 0));
    bad("every dimension but 1", |e| e.g.concatenate(&[e.x, e.t], 1));
    bad("at least one operand", |e| e.g.concatenate(&[], 0));
    good("float32[2, 3]", |e| e.g.reverse(e.x, &[1, 0]));
    bad("dimension 2 is out of range", |e| e.g.reverse(e.x, &[2]));
}

#[test]
fn positions_at_run_time() {
    good("float32[1, 2]", |e| e.g.dynamic_slice(e.x, &[e.k, e.k], &[1, 2]));
    bad("does not fit", |e| e.g.dynamic_slice(e.x, &[e.k, e.k], &[3, 2]));
    bad("takes 3 operands, got 2", |e| e.g.dynamic_slice(e.x, &[e.k], &[1, 2]));
    bad("start index 1 must be a scalar", |e| e.g.dynamic_slice(e.x, &[e.k, e.i], &[1, 2]));
    bad("expected an integer", |e| e.g.dynamic_slice(e.x, &[e.k, e.s], &[1, 2]));
    good("float32[2, 3]", |e| e.g.dynamic_update_slice(e.x, e.g.slice_dim(e.x, 0, 0, 1)?, &[e.k, e.k]));
    bad("does not fit", |e| e.g.dynamic_update_slice(e.x, e.t, &[e.k, e.k]));
    bad("same dtype", |e| e.g.dynamic_update_slice(e.x, e.i, &[e.k, e.k]));
    good("float32[2, 3, 2]", |e| e.g.take(e.t, e.i));
    bad("operand 1 has dtype float32, expected an integer", |e| e.g.take(e.t, e.x));
    bad("must have a dimension of rows", |e| e.g.take(e.s, e.i));
    good("float32[3, 2]", |e| e.g.scatter_add_rows(e.t, e.i, e.g.splat(DType::F32, [2, 3, 2], 1.0)?));
    bad("updates must have shape [2, 3, 2]", |e| e.g.scatter_add_rows(e.t, e.i, e.x));
}

#[test]
fn reductions_and_products() {
    good("float32[2]", |e| e.g.reduce_sum(e.x, &[1]));
    good("float32[]", |e| e.g.reduce_max(e.x, &[1, 0]));
    good("int32[1, 3]", |e| e.g.reduce_min_keep(e.i, &[0]));
    good("bool[3]", |e| e.g.reduce_and(e.p, &[0]));
    good("bool[1, 1]", |e| e.g.reduce_or_keep(e.p, &[0, 1]));
    bad("has dtype bool", |e| e.g.reduce_sum(e.p, &[0]));
    bad("expected bool or an integer", |e| e.g.reduce_and(e.x, &[0]));
    bad("dimension 2 is out of range", |e| e.g.reduce_sum_keep(e.x, &[2]));
    bad("listed twice", |e| e.g.reduce_sum(e.x, &[0, 0]));
    good("float32[2, 2]", |e| e.g.matmul_nt(e.b, e.b, DType::F32));
    bad("must have one size", |e| e.g.matmul_nt(e.x, e.t, DType::F32));
    bad("needs x of shape [.., k]", |e| e.g.matmul_nt(e.x, e.s, DType::F32));
    bad("cannot give bfloat16 from float32", |e| e.g.matmul_nt(e.x, e.x, DType::BF16));
    bad("cannot give int32 from float32", |e| e.g.matmul_nt(e.x, e.x, DType::I32));
    good("float32[3, 2, 2]", |e| {
        let dims = DotDims { lhs_batch: vec![1], rhs_batch: vec![0], ..DotDims::default() };
        e.g.dot_general(e.x, e.t, dims, DType::F32)
    });
    bad("must pair up", |e| {
        e.g.dot_general(e.x, e.t, DotDims { lhs_batch: vec![1], ..DotDims::default() }, DType::F32)
    });
    bad("listed twice", |e| {
        let dims = DotDims { lhs_batch: vec![1], rhs_batch: vec![0], lhs_contract: vec![1], rhs_contract: vec![0] };
        e.g.dot_general(e.x, e.t, dims, DType::F32)
    });
}

#[test]
fn structured() {
    good("int32[]", |e| Ok(e.g.optimization_barrier(&[e.x, e.k])?[1]));
    bad("at least one operand", |e| Ok(e.g.optimization_barrier(&[])?[0]));
    good("float32[2, 3]", |e| e.g.sharding_constraint(e.x, Sharding::replicated(2)));
    bad("has 1 dimensions", |e| e.g.sharding_constraint(e.x, Sharding::replicated(1)));
    good("float32[4]", |e| Ok(e.g.custom_call("a.b", &[e.x], &[TensorType::new(DType::F32, [4])], &[("k", 1)])?[0]));
    bad("must be letters", |e| Ok(e.g.custom_call("a b", &[e.x], &[TensorType::new(DType::F32, [4])], &[])?[0]));
    bad("given twice", |e| {
        Ok(e.g.custom_call("a", &[e.x], &[TensorType::new(DType::F32, [4])], &[("k", 1), ("k", 2)])?[0])
    });
    bad("at least one result", |e| Ok(e.g.custom_call("a", &[e.x], &[], &[])?[0]));
    bad("of another type", |e| {
        Ok(e.g.custom_call_in_place("a", &[e.x], 1, &[TensorType::new(DType::F32, [4])], &[])?[0])
    });
    // Carry float32[3], scanned float32[2, 3], invariant float32[].
    good("float32[2, 3]", |e| {
        let c = e.g.reduce_sum(e.x, &[0])?;
        let (carry, ys) = e.g.scan(2, &[c], &[e.x], &[e.s], |b, c, x, k| {
            let y = b.mul_bcast(b.add(c[0], x[0])?, k[0])?;
            Ok((vec![y], vec![c[0]]))
        })?;
        assert_eq!(e.g.ty(carry[0]).to_string(), "float32[3]");
        Ok(ys[0])
    });
    bad("scanned operand 0 must have leading dimension 2: it is float32[3, 2]", |e| {
        Ok(e.g.scan(2, &[], &[e.t], &[], |_, _, x, _| Ok((vec![], x.to_vec())))?.1[0])
    });
    bad("carry 0 goes in as float32[2, 3] and comes out of the body as bool[2, 3]", |e| {
        Ok(e.g.scan(2, &[e.x], &[], &[], |b, c, _, _| Ok((vec![b.compare(Compare::Eq, c[0], c[0])?], vec![])))?.0[0])
    });
    bad("the body returns 0 values for a carry of 1", |e| {
        Ok(e.g.scan(2, &[e.x], &[], &[], |_, _, _, _| Ok((vec![], vec![])))?.0[0])
    });
    bad("operand 1 belongs to another graph; hand it in as an input", |e| {
        Ok(e.g.scan(2, &[e.x], &[], &[], |b, c, _, _| Ok((vec![b.add(c[0], e.x)?], vec![])))?.0[0])
    });
}

#[test]
fn errors_say_where() {
    let e = env();
    let _layer = e.g.scope("layers.3");
    let attention = e.g.scope("attention");
    let (err, line) = (e.g.add(e.x, e.b).unwrap_err(), line!());
    assert_eq!(err.location().line(), line);
    assert_eq!(
        err.to_string(),
        format!(
            "add(float32[2, 3], bfloat16[2, 3]): operands must have the same dtype; convert one of them \
             (built at {}:{line}, in layers.3/attention)",
            file!()
        )
    );
    drop(attention);
    assert_eq!(e.g.add(e.x, e.b).unwrap_err().scope(), "layers.3");
    // Convenience methods report their caller's line too, and bodies their parent's scope.
    let (err, line) = (e.g.add_bcast(e.x, e.t).unwrap_err(), line!());
    assert_eq!(err.location().line(), line);
    let err = e.g.scan(1, &[e.x], &[], &[], |b, c, _, _| Ok((vec![b.add(c[0], e.x)?], vec![]))).unwrap_err();
    assert_eq!(err.scope(), "layers.3/scan");
    let other = Graph::new("other");
    let y = other.input("y", DType::F32, [2, 3]).unwrap();
    assert_eq!(e.g.add(e.x, y).unwrap_err().problem(), &Problem::ForeignValue { operand: 1 });
}

#[test]
fn inputs_and_outputs() {
    let e = env();
    assert!(e.g.input("x", DType::F32, [1]).unwrap_err().to_string().contains("the name is taken"));
    let err = e.g.output_with("y", e.x, OutputOptions { reuse: Some(e.x), ..Default::default() }).unwrap_err();
    assert!(err.to_string().contains("input \"x\" must be donated"), "{err}");
    let d = e.g.input_with("d", DType::F32, [2, 3], InputOptions { donate: true, ..Default::default() }).unwrap();
    let reuse = || OutputOptions { reuse: Some(d), ..Default::default() };
    let err = e.g.output_with("y", e.t, reuse()).unwrap_err();
    assert!(err.to_string().contains("cannot reuse input \"d\", which is float32[2, 3]"), "{err}");
    e.g.output_with("y", e.x, reuse()).unwrap();
    assert!(e.g.output_with("z", e.x, reuse()).unwrap_err().to_string().contains("already reused"));
    assert!(e.g.output("y", e.x).unwrap_err().to_string().contains("the name is taken"));
    let p = e.g.finish().unwrap();
    assert_eq!((p.outputs[0].reuses, p.outputs[0].shape.clone()), (Some(8), Shape::from([2, 3])));
    assert!(Graph::new("none").finish().unwrap_err().to_string().contains("it has no output"));
}

#[test]
fn shardings_are_checked_against_the_mesh() {
    let finish = |mesh: &[(&str, usize)], input: Sharding, inner: Sharding| {
        let g = Graph::new("t");
        g.set_mesh(mesh)?;
        let x = g.input_with("x", DType::F32, [4, 6], InputOptions { sharding: Some(input), ..Default::default() })?;
        g.output("y", g.neg(g.sharding_constraint(x, inner)?)?)?;
        g.finish()
    };
    let mesh = [("fsdp", 2), ("tp", 4)];
    let whole = || Sharding::replicated(2);
    finish(&mesh, Sharding::new(&[&["fsdp"], &[]]), Sharding::new(&[&["tp"], &["fsdp"]])).unwrap();
    let err = finish(&mesh, Sharding::new(&[&[], &["tp"]]), whole()).unwrap_err();
    assert!(err.to_string().contains("dimension 1 of [4, 6] is not divisible into 4 parts"), "{err}");
    let err = finish(&mesh, whole(), Sharding::new(&[&["dp"], &[]])).unwrap_err();
    assert!(err.to_string().contains("names axis \"dp\", which the mesh lacks"), "{err}");
    let err = finish(&mesh, whole(), Sharding::new(&[&["fsdp"], &["fsdp"]])).unwrap_err();
    assert!(err.to_string().contains("uses axis \"fsdp\" twice"), "{err}");
    let err = finish(&[("a b", 2)], whole(), whole()).unwrap_err();
    assert!(err.to_string().contains("must be a word"), "{err}");
}
