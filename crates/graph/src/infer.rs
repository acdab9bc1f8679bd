//! Result types from operand types, op by op. Whatever passes here must be valid StableHLO: a malformed program can take
//! the compiler's process down.

use tensor::{DType, Shape};

use crate::Problem;
use crate::op::{BinaryOp, Body, Compare, CustomVjp, DotDims, Op, ReduceKind, Scan, TensorType, UnaryOp};

type Result<T> = std::result::Result<T, Problem>;

fn bad<T>(message: impl Into<String>) -> Result<T> {
    Err(Problem::Attribute(message.into()))
}

fn arity(xs: &[&TensorType], expected: usize) -> Result<()> {
    if xs.len() == expected { Ok(()) } else { Err(Problem::Arity { expected, got: xs.len() }) }
}

fn want(xs: &[&TensorType], operand: usize, ok: bool, expected: &'static str) -> Result<()> {
    if ok { Ok(()) } else { Err(Problem::DType { operand, found: xs[operand].dtype, expected }) }
}

fn one(ty: TensorType) -> Result<Vec<TensorType>> {
    match ty.shape.checked_bytes(ty.dtype) {
        // StableHLO counts in signed 64-bit integers.
        Ok(n) if i64::try_from(n).is_ok() => Ok(vec![ty]),
        _ => bad(format!("the result {ty} is too large")),
    }
}

fn check_dims(dims: &[usize], rank: usize) -> Result<()> {
    for (i, &d) in dims.iter().enumerate() {
        if d >= rank {
            return bad(format!("dimension {d} is out of range for rank {rank}"));
        }
        if dims[..i].contains(&d) {
            return bad(format!("dimension {d} is listed twice"));
        }
    }
    Ok(())
}

fn check_index_scalars(xs: &[&TensorType], first: usize) -> Result<()> {
    for (i, t) in xs.iter().enumerate().skip(first) {
        want(xs, i, t.dtype.is_integer(), "an integer")?;
        if t.shape.rank() != 0 {
            return bad(format!("start index {} must be a scalar", i - first));
        }
        if t.dtype != xs[first].dtype {
            return Err(Problem::DTypesDiffer);
        }
    }
    Ok(())
}

/// The types of the results of `op` on operands of types `xs`.
pub(crate) fn infer(op: &Op, xs: &[&TensorType]) -> Result<Vec<TensorType>> {
    match op {
        Op::Input { ty, .. } => {
            arity(xs, 0)?;
            one(ty.clone())
        }
        Op::Constant { data, shape } => {
            arity(xs, 0)?;
            if data.shape().rank() != 0 && data.shape() != shape {
                return bad(format!("data of shape {} cannot fill {shape}", data.shape()));
            }
            one(TensorType { dtype: data.dtype(), shape: shape.clone() })
        }
        Op::Iota { ty, dim } => {
            arity(xs, 0)?;
            if ty.dtype == DType::Bool {
                return bad("cannot count in bool");
            }
            check_dims(&[*dim], ty.shape.rank())?;
            one(ty.clone())
        }
        Op::Unary(u) => {
            arity(xs, 1)?;
            unary(*u, xs)?;
            one(xs[0].clone())
        }
        Op::Binary(b) => {
            arity(xs, 2)?;
            same(xs)?;
            binary(*b, xs)?;
            one(xs[0].clone())
        }
        Op::Compare(c) => {
            arity(xs, 2)?;
            same(xs)?;
            let ordered = matches!(c, Compare::Lt | Compare::Le | Compare::Gt | Compare::Ge);
            want(xs, 0, !(ordered && xs[0].dtype == DType::Bool), "an ordered dtype (float or integer)")?;
            one(TensorType { dtype: DType::Bool, shape: xs[0].shape.clone() })
        }
        Op::Select => {
            arity(xs, 3)?;
            want(xs, 0, xs[0].dtype == DType::Bool, "bool")?;
            same(&xs[1..])?;
            if xs[0].shape.rank() != 0 && xs[0].shape != xs[1].shape {
                return Err(Problem::ShapesDiffer);
            }
            one(xs[1].clone())
        }
        Op::Clamp => {
            arity(xs, 3)?;
            want(xs, 1, xs[1].dtype != DType::Bool, "a float or an integer")?;
            if xs[0].dtype != xs[1].dtype || xs[2].dtype != xs[1].dtype {
                return Err(Problem::DTypesDiffer);
            }
            if [xs[0], xs[2]].iter().any(|b| b.shape.rank() != 0 && b.shape != xs[1].shape) {
                return Err(Problem::ShapesDiffer);
            }
            one(xs[1].clone())
        }
        Op::Convert(dtype) => {
            arity(xs, 1)?;
            one(TensorType { dtype: *dtype, shape: xs[0].shape.clone() })
        }
        Op::ReducePrecision { exponent, mantissa } => {
            arity(xs, 1)?;
            want(xs, 0, xs[0].dtype.is_float(), "a float")?;
            if !(1..=11).contains(exponent) || *mantissa > 52 {
                return bad(format!("cannot keep {exponent} exponent and {mantissa} mantissa bits"));
            }
            one(xs[0].clone())
        }
        Op::BroadcastInDim { shape, dims } => broadcast_in_dim(xs, shape, dims),
        Op::Reshape(shape) => {
            arity(xs, 1)?;
            match (xs[0].shape.checked_elements(), shape.checked_elements()) {
                (Ok(a), Ok(b)) if a == b => one(TensorType { dtype: xs[0].dtype, shape: shape.clone() }),
                _ => bad(format!("cannot reshape to {shape}: the number of elements differs")),
            }
        }
        Op::Transpose(perm) => {
            arity(xs, 1)?;
            let rank = xs[0].shape.rank();
            check_dims(perm, rank)?;
            if perm.len() != rank {
                return bad(format!("permutation {perm:?} must list all {rank} dimensions"));
            }
            let shape: Vec<usize> = perm.iter().map(|&d| xs[0].shape[d]).collect();
            one(TensorType::new(xs[0].dtype, shape))
        }
        Op::Slice { starts, limits, strides } => slice(xs, starts, limits, strides),
        Op::Pad { low, high, interior } => pad(xs, low, high, interior),
        Op::Concatenate(dim) => concatenate(xs, *dim),
        Op::Reverse(dims) => {
            arity(xs, 1)?;
            check_dims(dims, xs[0].shape.rank())?;
            one(xs[0].clone())
        }
        Op::DynamicSlice(sizes) => {
            let rank = sizes.len();
            arity(xs, 1 + rank)?;
            check_fits(xs[0], sizes)?;
            check_index_scalars(xs, 1)?;
            one(TensorType::new(xs[0].dtype, sizes.as_slice()))
        }
        Op::DynamicUpdateSlice => {
            if xs.len() < 2 {
                return Err(Problem::Arity { expected: 2, got: xs.len() });
            }
            arity(xs, 2 + xs[0].shape.rank())?;
            if xs[0].dtype != xs[1].dtype {
                return Err(Problem::DTypesDiffer);
            }
            check_fits(xs[0], xs[1].shape.dims())?;
            check_index_scalars(xs, 2)?;
            one(xs[0].clone())
        }
        Op::Take => {
            arity(xs, 2)?;
            check_rows(xs)?;
            let mut shape = xs[1].shape.dims().to_vec();
            shape.extend_from_slice(&xs[0].shape[1..]);
            one(TensorType::new(xs[0].dtype, shape))
        }
        Op::ScatterAddRows => {
            arity(xs, 3)?;
            check_rows(xs)?;
            want(xs, 0, xs[0].dtype != DType::Bool, "a float or an integer")?;
            if xs[0].dtype != xs[2].dtype {
                return Err(Problem::DTypesDiffer);
            }
            let mut shape = xs[1].shape.dims().to_vec();
            shape.extend_from_slice(&xs[0].shape[1..]);
            if xs[2].shape.dims() != shape.as_slice() {
                return bad(format!("updates must have shape {}", Shape::from(shape)));
            }
            one(xs[0].clone())
        }
        Op::Reduce { kind, dims } => {
            arity(xs, 1)?;
            let d = xs[0].dtype;
            match kind {
                ReduceKind::Sum | ReduceKind::Max | ReduceKind::Min => {
                    want(xs, 0, d != DType::Bool, "a float or an integer")?;
                }
                ReduceKind::And | ReduceKind::Or => want(xs, 0, !d.is_float(), "bool or an integer")?,
            }
            check_dims(dims, xs[0].shape.rank())?;
            if !dims.is_sorted() {
                return bad(format!("dimensions {dims:?} must be ascending"));
            }
            let shape: Vec<usize> =
                DotDims::free(xs[0].shape.rank(), dims, &[]).iter().map(|&i| xs[0].shape[i]).collect();
            one(TensorType::new(d, shape))
        }
        Op::DotGeneral { dims, out } => dot_general(xs, dims, *out),
        Op::OptimizationBarrier => {
            if xs.is_empty() {
                return bad("needs at least one operand");
            }
            Ok(xs.iter().map(|&t| t.clone()).collect())
        }
        Op::ShardingConstraint(s) => {
            arity(xs, 1)?;
            if s.dims().len() != xs[0].shape.rank() {
                return bad(format!("sharding {s} has {} dimensions", s.dims().len()));
            }
            one(xs[0].clone())
        }
        Op::Named(name) => {
            arity(xs, 1)?;
            if name.is_empty() {
                return bad("the name is empty");
            }
            one(xs[0].clone())
        }
        Op::CustomCall(c) => {
            if !is_symbol(&c.target) {
                return bad(format!("target {:?} must be letters, digits, '_' and '.'", c.target));
            }
            if c.results.is_empty() {
                return bad("needs at least one result");
            }
            for (i, (name, _)) in c.attributes.iter().enumerate() {
                if !crate::sharding::is_identifier(name) {
                    return bad(format!("attribute name {name:?} must be a word"));
                }
                if c.attributes[..i].iter().any(|(n, _)| n == name) {
                    return bad(format!("attribute {name:?} is given twice"));
                }
            }
            for t in &c.results {
                one(t.clone())?;
            }
            let same = |i: usize| xs.get(i).copied() == c.results.get(i) && c.results.get(i).is_some();
            if let Some(i) = (0..c.in_place).find(|&i| !same(i)) {
                return bad(format!("result {i} cannot take over the memory of an operand of another type"));
            }
            Ok(c.results.clone())
        }
        Op::Scan(s) => scan(xs, s),
        Op::Remat(r) => call(xs, &r.body),
        Op::CustomVjp(c) => custom_vjp(xs, c),
    }
}

/// A body on the operands as they are.
fn call(xs: &[&TensorType], body: &Body) -> Result<Vec<TensorType>> {
    arity(xs, body.inputs.len())?;
    for (i, (x, &v)) in xs.iter().zip(&body.inputs).enumerate() {
        if body.ty(v) != *x {
            return bad(format!("body input {i} is {}, the operand is {x}", body.ty(v)));
        }
    }
    if body.outputs.is_empty() {
        return bad("the body returns nothing");
    }
    Ok(body.outputs.iter().map(|&v| body.ty(v).clone()).collect())
}

fn custom_vjp(xs: &[&TensorType], c: &CustomVjp) -> Result<Vec<TensorType>> {
    let results = call(xs, &c.forward)?;
    if c.visible == 0 || c.visible > results.len() {
        return bad(format!("{} of {} results are visible", c.visible, results.len()));
    }
    let (visible, residuals) = results.split_at(c.visible);
    if let Some(i) = visible.iter().position(|t| !t.dtype.is_float()) {
        return bad(format!("result {i} is {}: only floats have gradients", visible[i]));
    }
    let given: Vec<&TensorType> = xs.iter().copied().chain(residuals).chain(visible).collect();
    let back: Vec<&TensorType> = c.backward.inputs.iter().map(|&v| c.backward.ty(v)).collect();
    if given != back {
        return bad("the gradient must take the operands, the residuals and one cotangent for each result");
    }
    arity(xs, c.gradients.len())?;
    for (i, (x, at)) in xs.iter().zip(&c.gradients).enumerate() {
        let Some(at) = *at else { continue };
        let Some(&v) = c.backward.outputs.get(at) else {
            return bad(format!("there is no gradient {at} for operand {i}"));
        };
        if c.backward.ty(v) != *x || !x.dtype.is_float() {
            return bad(format!("the gradient of operand {i} is {}, the operand is {x}", c.backward.ty(v)));
        }
    }
    Ok(results)
}

fn is_symbol(s: &str) -> bool {
    s.split('.').all(crate::sharding::is_identifier)
}

/// All operands of one type.
fn same(xs: &[&TensorType]) -> Result<()> {
    if xs.windows(2).any(|w| w[0].dtype != w[1].dtype) {
        return Err(Problem::DTypesDiffer);
    }
    if xs.windows(2).any(|w| w[0].shape != w[1].shape) {
        return Err(Problem::ShapesDiffer);
    }
    Ok(())
}

fn unary(u: UnaryOp, xs: &[&TensorType]) -> Result<()> {
    let d = xs[0].dtype;
    match u {
        UnaryOp::Neg => want(xs, 0, d != DType::Bool, "a float or an integer"),
        UnaryOp::Abs | UnaryOp::Sign => want(xs, 0, d.is_signed(), "a signed dtype"),
        UnaryOp::Not => want(xs, 0, !d.is_float(), "bool or an integer"),
        _ => want(xs, 0, d.is_float(), "a float"),
    }
}

fn binary(b: BinaryOp, xs: &[&TensorType]) -> Result<()> {
    let d = xs[0].dtype;
    match b {
        BinaryOp::Pow => want(xs, 0, d.is_float(), "a float"),
        BinaryOp::And | BinaryOp::Or | BinaryOp::Xor => want(xs, 0, !d.is_float(), "bool or an integer"),
        _ => want(xs, 0, d != DType::Bool, "a float or an integer"),
    }
}

fn broadcast_in_dim(xs: &[&TensorType], shape: &Shape, dims: &[usize]) -> Result<Vec<TensorType>> {
    arity(xs, 1)?;
    if dims.len() != xs[0].shape.rank() {
        return bad(format!("dims {dims:?} must list one result dimension for each of {}", xs[0].shape.rank()));
    }
    check_dims(dims, shape.rank())?;
    if !dims.is_sorted() {
        return bad(format!("dims {dims:?} must be ascending"));
    }
    for (i, &d) in dims.iter().enumerate() {
        if xs[0].shape[i] != 1 && xs[0].shape[i] != shape[d] {
            return bad(format!("dimension {i} of size {} cannot become dimension {d} of {shape}", xs[0].shape[i]));
        }
    }
    one(TensorType { dtype: xs[0].dtype, shape: shape.clone() })
}

fn slice(xs: &[&TensorType], starts: &[usize], limits: &[usize], strides: &[usize]) -> Result<Vec<TensorType>> {
    arity(xs, 1)?;
    let rank = xs[0].shape.rank();
    if [starts.len(), limits.len(), strides.len()] != [rank; 3] {
        return bad(format!("starts, limits and strides must each have {rank} entries"));
    }
    let mut shape = Vec::with_capacity(rank);
    for d in 0..rank {
        let (a, b, s, n) = (starts[d], limits[d], strides[d], xs[0].shape[d]);
        if a > b || b > n || s == 0 {
            return bad(format!("slice {a}..{b} by {s} does not fit dimension {d} of size {n}"));
        }
        shape.push((b - a).div_ceil(s));
    }
    one(TensorType::new(xs[0].dtype, shape))
}

fn pad(xs: &[&TensorType], low: &[i64], high: &[i64], interior: &[usize]) -> Result<Vec<TensorType>> {
    arity(xs, 2)?;
    if xs[0].dtype != xs[1].dtype {
        return Err(Problem::DTypesDiffer);
    }
    if xs[1].shape.rank() != 0 {
        return bad("the padding value must be a scalar");
    }
    let rank = xs[0].shape.rank();
    if [low.len(), high.len(), interior.len()] != [rank; 3] {
        return bad(format!("low, high and interior must each have {rank} entries"));
    }
    let mut shape = Vec::with_capacity(rank);
    for d in 0..rank {
        let n = xs[0].shape[d] as i128;
        let total = i128::from(low[d]) + i128::from(high[d]) + n + (n - 1).max(0) * interior[d] as i128;
        match usize::try_from(total) {
            Ok(t) => shape.push(t),
            Err(_) => return bad(format!("dimension {d} would have size {total}")),
        }
    }
    one(TensorType::new(xs[0].dtype, shape))
}

fn concatenate(xs: &[&TensorType], dim: usize) -> Result<Vec<TensorType>> {
    let Some(first) = xs.first() else { return bad("needs at least one operand") };
    check_dims(&[dim], first.shape.rank())?;
    let mut shape = first.shape.dims().to_vec();
    for t in &xs[1..] {
        if t.dtype != first.dtype {
            return Err(Problem::DTypesDiffer);
        }
        let differs = t.shape.rank() != shape.len() || (0..shape.len()).any(|d| d != dim && t.shape[d] != shape[d]);
        if differs {
            return bad(format!("shapes must agree in every dimension but {dim}"));
        }
        shape[dim] = shape[dim].saturating_add(t.shape[dim]);
    }
    one(TensorType::new(first.dtype, shape))
}

fn check_fits(x: &TensorType, sizes: &[usize]) -> Result<()> {
    if sizes.len() != x.shape.rank() || sizes.iter().zip(x.shape.iter()).any(|(s, n)| s > n) {
        return bad(format!("a slice of {} does not fit {x}", Shape::from(sizes)));
    }
    Ok(())
}

fn check_rows(xs: &[&TensorType]) -> Result<()> {
    want(xs, 1, xs[1].dtype.is_integer(), "an integer")?;
    match xs[0].shape.first() {
        Some(0) => bad("the table has no rows"),
        Some(_) => Ok(()),
        None => bad("the table must have a dimension of rows"),
    }
}

fn dot_general(xs: &[&TensorType], dims: &DotDims, out: DType) -> Result<Vec<TensorType>> {
    arity(xs, 2)?;
    let (l, r) = (xs[0], xs[1]);
    if l.dtype != r.dtype {
        return Err(Problem::DTypesDiffer);
    }
    want(xs, 0, l.dtype != DType::Bool, "a float or an integer")?;
    if out.is_float() != l.dtype.is_float() || out == DType::Bool || out.size() < l.dtype.size() {
        return bad(format!("cannot give {out} from {}", l.dtype));
    }
    if dims.lhs_batch.len() != dims.rhs_batch.len() || dims.lhs_contract.len() != dims.rhs_contract.len() {
        return bad("batch and contracted dimensions must pair up");
    }
    check_dims(&[&dims.lhs_batch[..], &dims.lhs_contract].concat(), l.shape.rank())?;
    check_dims(&[&dims.rhs_batch[..], &dims.rhs_contract].concat(), r.shape.rank())?;
    let pairs = dims.lhs_batch.iter().zip(&dims.rhs_batch).chain(dims.lhs_contract.iter().zip(&dims.rhs_contract));
    for (&a, &b) in pairs {
        if l.shape[a] != r.shape[b] {
            return bad(format!(
                "dimension {a} of the left ({}) and {b} of the right ({}) must have one size",
                l.shape[a], r.shape[b]
            ));
        }
    }
    let mut shape: Vec<usize> = dims.lhs_batch.iter().map(|&d| l.shape[d]).collect();
    shape.extend(dims.lhs_free(l.shape.rank()).iter().map(|&d| l.shape[d]));
    shape.extend(dims.rhs_free(r.shape.rank()).iter().map(|&d| r.shape[d]));
    one(TensorType::new(out, shape))
}

/// The type of one slice of a scanned operand.
pub(crate) fn unstacked(ty: &TensorType) -> TensorType {
    TensorType::new(ty.dtype, &ty.shape[1..])
}

/// The type of `length` values stacked.
pub(crate) fn stacked(ty: &TensorType, length: usize) -> TensorType {
    let mut shape = vec![length];
    shape.extend_from_slice(ty.shape.dims());
    TensorType::new(ty.dtype, shape)
}

fn scan(xs: &[&TensorType], s: &Scan) -> Result<Vec<TensorType>> {
    arity(xs, s.carry + s.xs + s.consts)?;
    let body: &Body = &s.body;
    if body.inputs.len() != xs.len() {
        return bad(format!("the body takes {} inputs for {} operands", body.inputs.len(), xs.len()));
    }
    if body.outputs.len() < s.carry {
        return bad(format!("the body returns {} values for a carry of {}", body.outputs.len(), s.carry));
    }
    for (i, (x, &v)) in xs.iter().zip(&body.inputs).enumerate() {
        let scanned = (s.carry..s.carry + s.xs).contains(&i);
        if scanned && x.shape.first() != Some(&s.length) {
            return bad(format!("scanned operand {} must have leading dimension {}: it is {x}", i - s.carry, s.length));
        }
        let got = if scanned { unstacked(x) } else { (*x).clone() };
        if body.ty(v) != &got {
            return bad(format!("body input {i} is {}, the operand gives {got}", body.ty(v)));
        }
    }
    for (i, (x, &v)) in xs.iter().zip(&body.outputs).take(s.carry).enumerate() {
        if body.ty(v) != *x {
            return bad(format!("carry {i} goes in as {x} and comes out of the body as {}", body.ty(v)));
        }
    }
    let mut out: Vec<TensorType> = xs[..s.carry].iter().map(|&t| t.clone()).collect();
    for &v in &body.outputs[s.carry..] {
        out.extend(one(stacked(body.ty(v), s.length))?);
    }
    Ok(out)
}
