//! Reverse-mode differentiation: gradients as ordinary nodes behind those they belong to.
//!
//! Vocabulary:
//! - The **cotangent** of a value is the gradient of the loss by that value. It has the value's dtype and shape. A value that
//!   does not influence the loss has none: an absent cotangent is `None`, never an array of zeros.
//! - A value is **active** when it is a float that depends differentiably on one of the values asked for. Only active values
//!   get cotangents, so nothing is computed that does not lie between the loss and what was asked for.
//! - A **rule** turns the cotangents of a node's results into those of its operands, through the builder. There is one for each
//!   op, by family: `elementwise`, `movement`, `index`, `linear`, `structured`, `scan`.
//! - A **joint** is a body followed by its own gradient, in one graph: what `scan` and `remat` cut into parts.
//!
//! Nodes of the backward pass carry the scope of the forward node with `grad` behind it, and its source line, so that an
//! error points at the line of the model.
//!
//! Where a function is not differentiable: `floor`, `ceil`, `sign`, comparisons and everything integer or bool pass no
//! gradient; elements that tie in a maximum or minimum share it; `clamp` passes it to an element that equals a bound; a row
//! lookup gives it to the row that was read, after clamping. Rounding (`convert`, `reduce_precision`) counts as the identity,
//! and the cotangent is rounded in the same way. A custom call is an error: wrap it in
//! [`Graph::custom_vjp`].

mod activity;
mod elementwise;
mod index;
mod joint;
mod linear;
mod movement;
mod scan;
mod structured;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::sync::Arc;

use tensor::DType;

use crate::op::{Node, Op, ValueId};
use crate::{Graph, GraphError, Problem, Value};

type Result<T> = std::result::Result<T, GraphError>;

/// One cotangent, or none, for each operand of a node.
type Grads = Result<Vec<Option<Value>>>;

/// What a rule works on.
struct Rule<'a> {
    g: &'a Graph,
    node: &'a Node,
    /// Position of the node.
    index: usize,
    /// Its operands.
    x: Vec<Value>,
    /// Its results.
    y: Vec<Value>,
    /// Cotangents of its results, of which at least one is present.
    ct: Vec<Option<Value>>,
    /// Which operands want a cotangent.
    wants: Vec<bool>,
}

impl Rule<'_> {
    /// The cotangent of the only result.
    fn only(&self) -> Result<Value> {
        match self.ct[..] {
            [Some(ct)] => Ok(ct),
            _ => Err(self.fail("has several results")),
        }
    }

    fn fail(&self, message: impl Into<String>) -> GraphError {
        self.g.error(self.node.op().name(), &self.x, Problem::Attribute(message.into()))
    }

    /// `f()` if the operand wants a cotangent.
    fn wanted(&self, operand: usize, f: impl FnOnce() -> Result<Value>) -> Result<Option<Value>> {
        self.wants[operand].then(f).transpose()
    }

    fn run(&self) -> Grads {
        match self.node.op() {
            Op::Input { .. } | Op::Constant { .. } | Op::Iota { .. } => Ok(Vec::new()),
            Op::Unary(u) => elementwise::unary(self, *u),
            Op::Binary(b) => elementwise::binary(self, *b),
            Op::Compare(_) => Ok(vec![None, None]),
            Op::Select => elementwise::select(self),
            Op::Clamp => elementwise::clamp(self),
            Op::Convert(_) => elementwise::convert(self),
            Op::ReducePrecision { exponent, mantissa } => {
                Ok(vec![Some(self.g.reduce_precision(self.only()?, *exponent, *mantissa)?)])
            }
            Op::BroadcastInDim { dims, .. } => movement::broadcast_in_dim(self, dims),
            Op::Reshape(_) => Ok(vec![Some(self.g.reshape(self.only()?, self.g.shape(self.x[0]))?)]),
            Op::Transpose(perm) => Ok(vec![Some(self.g.transpose(self.only()?, &inverse(perm))?)]),
            Op::Slice { starts, strides, .. } => movement::slice(self, starts, strides),
            Op::Pad { low, high, interior } => movement::pad(self, low, high, interior),
            Op::Concatenate(dim) => movement::concatenate(self, *dim),
            Op::Reverse(dims) => Ok(vec![Some(self.g.reverse(self.only()?, dims)?)]),
            Op::DynamicSlice(_) => index::dynamic_slice(self),
            Op::DynamicUpdateSlice => index::dynamic_update_slice(self),
            Op::Take => index::take(self),
            Op::ScatterAddRows => index::scatter_add_rows(self),
            Op::Reduce { kind, dims } => linear::reduce(self, *kind, dims),
            Op::DotGeneral { dims, .. } => linear::dot_general(self, dims),
            Op::OptimizationBarrier => structured::optimization_barrier(self),
            Op::ShardingConstraint(s) => Ok(vec![Some(self.g.sharding_constraint(self.only()?, s.clone())?)]),
            Op::Named(_) => Ok(vec![Some(self.only()?)]),
            Op::CustomCall(c) => Err(self.fail(format!(
                "custom call {:?} has no gradient; give it one with custom_vjp, or stop_gradient before it",
                c.target
            ))),
            Op::Scan(s) => scan::scan(self, s),
            Op::Remat(r) => structured::remat(self, r),
            Op::CustomVjp(c) => structured::custom_vjp(self, c),
        }
    }
}

impl Graph {
    /// The gradient of `loss`, a float scalar, by each of `wrt`: `None` where the loss does not depend on it, and for integers
    /// and bools. The gradient has the dtype and shape of the value.
    ///
    /// Values of `wrt` may be inputs or anything computed; where one depends on another, the gradient by the other goes
    /// through it. A scan between `wrt` and the loss gets additional results: what its gradient needs of every step.
    ///
    /// # Errors
    /// When the loss is no float scalar, or something between has no gradient (custom calls).
    #[track_caller]
    pub fn grad(&self, loss: Value, wrt: &[Value]) -> Result<Vec<Option<Value>>> {
        self.check_foreign("grad", &[loss])?;
        let ty = self.ty(loss);
        if !ty.dtype.is_float() || ty.shape.rank() != 0 {
            return Err(self.error("grad", &[loss], Problem::Attribute("the loss must be a float scalar".into())));
        }
        self.vjp(&[(loss, self.scalar(ty.dtype, 1.0)?)], wrt)
    }

    /// The product of given cotangents with the Jacobian: for each of `wrt`, the gradient of the sum over `outputs` of value
    /// times cotangent. Each output is a pair of a float value and its cotangent, which has the same dtype and shape. Otherwise
    /// as [`Graph::grad`].
    ///
    /// # Errors
    /// When a cotangent is not of its value's type, or something between has no gradient (custom calls).
    #[track_caller]
    pub fn vjp(&self, outputs: &[(Value, Value)], wrt: &[Value]) -> Result<Vec<Option<Value>>> {
        self.check_foreign("grad", wrt)?;
        for &(v, ct) in outputs {
            self.check_foreign("grad", &[v, ct])?;
            if self.ty(v) != self.ty(ct) || !self.dtype(v).is_float() {
                let p = Problem::Attribute("a cotangent must have the type of its value, which must be a float".into());
                return Err(self.error("grad", &[v, ct], p));
            }
        }
        let active = activity::activity(&self.body(), |v| wrt.iter().any(|w| w.id() == v));
        let mut cts: HashMap<ValueId, Value> = HashMap::new();
        for &(v, ct) in outputs.iter().filter(|(v, _)| active[v.id().index()]) {
            self.accumulate(&mut cts, v.id(), ct)?;
        }
        let last = cts.keys().map(|v| self.body().values()[v.index()].node()).max();
        for index in (0..last.map_or(0, |n| n + 1)).rev() {
            let Some((node, wants)) = self.due(index, &active, &cts) else { continue };
            let scope: Arc<str> = match node.scope() {
                "" => "grad".into(),
                path => format!("{path}/grad").into(),
            };
            self.ascribed(scope, node.location(), || self.step(&node, index, wants, &mut cts))?;
        }
        Ok(wrt.iter().map(|v| cts.get(&v.id()).copied()).collect())
    }

    /// The node and which operands want a cotangent, if there is something to do: a result has a cotangent and an operand
    /// wants one.
    fn due(&self, index: usize, active: &[bool], cts: &HashMap<ValueId, Value>) -> Option<(Node, Vec<bool>)> {
        let body = self.body();
        let node = &body.nodes()[index];
        if !node.outputs().any(|v| cts.contains_key(&v)) {
            return None;
        }
        let wants: Vec<bool> = node.inputs().iter().map(|v| active[v.index()]).collect();
        wants.contains(&true).then(|| (node.clone(), wants))
    }

    /// Runs the rule of one node.
    fn step(&self, node: &Node, index: usize, wants: Vec<bool>, cts: &mut HashMap<ValueId, Value>) -> Result<()> {
        let rule = Rule {
            g: self,
            node,
            index,
            x: node.inputs().iter().map(|&v| self.value(v)).collect(),
            y: node.outputs().map(|v| self.value(v)).collect(),
            ct: node.outputs().map(|v| cts.get(&v).copied()).collect(),
            wants,
        };
        let grads = rule.run()?;
        for (i, (&v, grad)) in node.inputs().iter().zip(grads).enumerate() {
            let Some(grad) = grad.filter(|_| rule.wants[i]) else { continue };
            let (want, got) = (self.ty(rule.x[i]), self.ty(grad));
            if want != got {
                return Err(rule.fail(format!("its gradient for operand {i} is {got}, expected {want}")));
            }
            self.accumulate(cts, v, grad)?;
        }
        Ok(())
    }

    /// Adds to the cotangent of a value.
    fn accumulate(&self, cts: &mut HashMap<ValueId, Value>, v: ValueId, ct: Value) -> Result<()> {
        let sum = match cts.get(&v) {
            Some(&before) => self.add(before, ct)?,
            None => ct,
        };
        cts.insert(v, sum);
        Ok(())
    }
}

/// What sums of cotangents are accumulated in: narrow floats in `f32`.
fn accumulator(dtype: DType) -> DType {
    match dtype {
        DType::F16 | DType::BF16 => DType::F32,
        d => d,
    }
}

/// The permutation that undoes `perm`.
fn inverse(perm: &[usize]) -> Vec<usize> {
    let mut back = vec![0; perm.len()];
    for (i, &d) in perm.iter().enumerate() {
        back[d] = i;
    }
    back
}

/// Sum over dimensions, in the dtype of `x` but accumulated in `f32` if that is narrow.
fn wide_sum(g: &Graph, x: Value, dims: &[usize]) -> Result<Value> {
    let dtype = g.dtype(x);
    if dims.is_empty() {
        return Ok(x);
    }
    g.convert(g.reduce_sum(g.convert(x, accumulator(dtype))?, dims)?, dtype)
}

/// Sum over all dimensions.
fn sum_all(g: &Graph, x: Value) -> Result<Value> {
    let dims: Vec<usize> = (0..g.shape(x).rank()).collect();
    wide_sum(g, x, &dims)
}
