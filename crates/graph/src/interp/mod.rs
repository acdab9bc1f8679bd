//! A plain evaluator of programs: slow, simple, the oracle that compiled programs are tested against.
//!
//! Every element is an `f64`. Every op computes in `f64` and rounds its result once to the value's dtype (round to nearest
//! even, subnormals kept), so a program in `float64` is an exact reference and one in `bfloat16` shows where rounding happens.
//! Reductions and products accumulate in `f64` whatever the dtype. 64-bit integers are exact up to 2^53 only.

mod linear;
mod movement;
mod number;

use std::panic::Location;
use std::sync::Arc;

use tensor::{HostArray, HostError};

use crate::Program;
use crate::op::{Body, CustomVjp, Node, Op, Remat, Scan, TensorType};

/// Why a program could not be evaluated.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InterpError {
    /// The wrong number of inputs.
    #[error("the program takes {expected} inputs, got {got}")]
    Count {
        /// How many it takes.
        expected: usize,
        /// How many were given.
        got: usize,
    },
    /// An input of another type.
    #[error("input {name:?} must be {expected}, got {found}")]
    Input {
        /// The input.
        name: String,
        /// Its type in the program.
        expected: TensorType,
        /// The type given.
        found: TensorType,
    },
    /// A function of the runtime, which only a compiled program has.
    #[error("cannot evaluate custom call {target:?} (built at {location})")]
    CustomCall {
        /// The function.
        target: String,
        /// Where the op was built.
        location: &'static Location<'static>,
    },
    /// An array could not be made.
    #[error(transparent)]
    Host(#[from] HostError),
}

/// An array whose elements are all `f64`, whatever the dtype they stand for.
#[derive(Debug, Clone)]
struct Array {
    ty: TensorType,
    v: Arc<Vec<f64>>,
}

impl Array {
    fn from_host(a: &HostArray) -> Self {
        Array { ty: TensorType::new(a.dtype(), a.shape().clone()), v: Arc::new(a.to_f64()) }
    }

    fn dims(&self) -> &[usize] {
        self.ty.shape.dims()
    }

    /// A scalar integer as an index.
    fn index(&self) -> i64 {
        self.v.first().map_or(0, |&x| x as i64)
    }
}

/// Evaluates a program.
///
/// # Errors
/// When inputs do not match the program, or it calls into a runtime.
pub fn run(program: &Program, inputs: &[HostArray]) -> Result<Vec<HostArray>, InterpError> {
    if inputs.len() != program.inputs.len() {
        return Err(InterpError::Count { expected: program.inputs.len(), got: inputs.len() });
    }
    let mut arrays = Vec::with_capacity(inputs.len());
    for (spec, a) in program.inputs.iter().zip(inputs) {
        let expected = TensorType::new(spec.dtype, spec.shape.clone());
        let a = Array::from_host(a);
        if a.ty != expected {
            return Err(InterpError::Input { name: spec.name.clone(), expected, found: a.ty });
        }
        arrays.push(a);
    }
    let outputs = body(program.body(), &arrays)?;
    outputs.iter().map(|a| Ok(HostArray::from_f64(a.ty.dtype, a.ty.shape.clone(), &a.v)?)).collect()
}

fn body(body: &Body, inputs: &[Array]) -> Result<Vec<Array>, InterpError> {
    let live = body.live();
    // The node after which a value is not needed any more; outputs are needed to the end.
    let mut last_use = vec![0; body.values().len()];
    for (i, node) in body.nodes().iter().enumerate().filter(|(i, _)| live[*i]) {
        for v in node.inputs() {
            last_use[v.index()] = i;
        }
    }
    for v in body.outputs() {
        last_use[v.index()] = usize::MAX;
    }
    let mut values: Vec<Option<Array>> = vec![None; body.values().len()];
    for (i, node) in body.nodes().iter().enumerate().filter(|(i, _)| live[*i]) {
        let results = match node.op() {
            Op::Input { index, .. } => vec![inputs[*index].clone()],
            _ => {
                let args: Vec<&Array> = node.inputs().iter().filter_map(|v| values[v.index()].as_ref()).collect();
                debug_assert_eq!(args.len(), node.inputs().len(), "operands come before their users");
                eval(body, node, &args)?
            }
        };
        for (v, a) in node.outputs().zip(results) {
            debug_assert_eq!(a.v.len(), a.ty.shape.elements());
            values[v.index()] = Some(a);
        }
        for v in node.inputs() {
            if last_use[v.index()] == i {
                values[v.index()] = None;
            }
        }
    }
    Ok(body.outputs().iter().filter_map(|v| values[v.index()].clone()).collect())
}

fn eval(body: &Body, node: &Node, args: &[&Array]) -> Result<Vec<Array>, InterpError> {
    let result = body.ty(node.outputs[0]).clone();
    let dims = result.shape.dims();
    let v = match node.op() {
        // Handled by the caller.
        Op::Input { .. } => Vec::new(),
        Op::Constant { data, .. } => {
            let v = data.to_f64();
            if v.len() == result.shape.elements() { v } else { vec![v[0]; result.shape.elements()] }
        }
        Op::Iota { dim, .. } => movement::iota(dims, *dim),
        Op::Unary(u) => number::unary(*u, args[0]),
        Op::Binary(b) => number::binary(*b, args[0], args[1]),
        Op::Compare(c) => args[0]
            .v
            .iter()
            .zip(args[1].v.iter())
            .map(|(&a, &b)| f64::from(u8::from(number::compare(*c, a, b))))
            .collect(),
        Op::Select => {
            let pred = |i: usize| if args[0].dims().is_empty() { args[0].v[0] } else { args[0].v[i] };
            (0..args[1].v.len()).map(|i| if pred(i) != 0.0 { args[1].v[i] } else { args[2].v[i] }).collect()
        }
        Op::Clamp => {
            let bound = |a: &Array, i: usize| if a.dims().is_empty() { a.v[0] } else { a.v[i] };
            let x = args[1].v.iter().enumerate();
            x.map(|(i, &x)| number::min(number::max(x, bound(args[0], i)), bound(args[2], i))).collect()
        }
        Op::Convert(to) => args[0].v.iter().map(|&x| number::convert(x, args[0].ty.dtype, *to)).collect(),
        Op::ReducePrecision { exponent, mantissa } => {
            args[0].v.iter().map(|&x| number::reduce_precision(x, args[0].ty.dtype, *exponent, *mantissa)).collect()
        }
        Op::BroadcastInDim { dims: to, .. } => movement::broadcast(args[0], dims, to),
        Op::Reshape(_) | Op::ShardingConstraint(_) | Op::Named(_) => {
            return Ok(vec![Array { ty: result, v: args[0].v.clone() }]);
        }
        Op::Transpose(perm) => movement::transpose(args[0], perm),
        Op::Slice { starts, strides, .. } => movement::slice(args[0], dims, starts, strides),
        Op::Pad { low, interior, .. } => movement::pad(args[0], args[1].v[0], dims, low, interior),
        Op::Concatenate(dim) => movement::concatenate(args, dims, *dim),
        Op::Reverse(which) => movement::reverse(args[0], which),
        Op::DynamicSlice(sizes) => {
            let starts = movement::clamped_starts(args[0].dims(), sizes, &args[1..]);
            movement::slice(args[0], sizes, &starts, &vec![1; sizes.len()])
        }
        Op::DynamicUpdateSlice => {
            let starts = movement::clamped_starts(args[0].dims(), args[1].dims(), &args[2..]);
            movement::update(args[0], args[1], &starts)
        }
        Op::Take => movement::take(args[0], args[1]),
        Op::ScatterAddRows => movement::scatter_add_rows(args[0], args[1], args[2]),
        Op::Reduce { kind, dims } => linear::reduce(args[0], *kind, dims),
        Op::DotGeneral { dims, .. } => linear::dot_general(args[0], args[1], dims),
        Op::OptimizationBarrier => return Ok(args.iter().map(|&a| a.clone()).collect()),
        Op::CustomCall(c) => {
            return Err(InterpError::CustomCall { target: c.target.clone(), location: node.location() });
        }
        Op::Scan(s) => return scan(s, args),
        Op::Remat(Remat { body: inner, .. }) | Op::CustomVjp(CustomVjp { forward: inner, .. }) => {
            let inputs: Vec<Array> = args.iter().map(|&a| a.clone()).collect();
            return self::body(inner, &inputs);
        }
    };
    let v = v.into_iter().map(|x| number::round(x, result.dtype)).collect();
    Ok(vec![Array { ty: result, v: Arc::new(v) }])
}

fn scan(s: &Scan, args: &[&Array]) -> Result<Vec<Array>, InterpError> {
    let mut carry: Vec<Array> = args[..s.carry].iter().map(|&a| a.clone()).collect();
    let (xs, consts) = args[s.carry..].split_at(s.xs);
    let mut ys: Vec<Vec<f64>> = s.body.outputs()[s.carry..]
        .iter()
        .map(|&v| vec![0.0; s.length.saturating_mul(s.body.ty(v).shape.elements())])
        .collect();
    for step in 0..s.length {
        let i = if s.reverse { s.length - 1 - step } else { step };
        let mut inputs = std::mem::take(&mut carry);
        for x in xs {
            let ty = crate::infer::unstacked(&x.ty);
            let n = ty.shape.elements();
            inputs.push(Array { ty, v: Arc::new(x.v[i * n..(i + 1) * n].to_vec()) });
        }
        inputs.extend(consts.iter().map(|&a| a.clone()));
        let mut outputs = body(&s.body, &inputs)?;
        for (y, all) in outputs.split_off(s.carry).iter().zip(&mut ys) {
            let n = y.v.len();
            all[i * n..(i + 1) * n].copy_from_slice(&y.v);
        }
        carry = outputs;
    }
    let types = s.body.outputs()[s.carry..].iter().map(|&v| crate::infer::stacked(s.body.ty(v), s.length));
    carry.extend(ys.into_iter().zip(types).map(|(v, ty)| Array { ty, v: Arc::new(v) }));
    Ok(carry)
}

#[cfg(test)]
mod tests;
