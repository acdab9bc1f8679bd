//! Barriers, shardings, calls into the runtime, and ops with bodies.

use std::sync::Arc;

use crate::infer::unstacked;
use crate::op::{CustomCall, Op, Scan, TensorType};
use crate::{Graph, GraphError, Problem, Sharding, Value};

type Result<T> = std::result::Result<T, GraphError>;

/// New carry and ys of one step of a scan, or last carry and stacked ys of the whole.
pub type CarryAndYs = (Vec<Value>, Vec<Value>);

impl Graph {
    /// The same values, across which the compiler moves no work: what makes them is done before anything that uses the
    /// results.
    ///
    /// # Errors
    /// When there is no value.
    #[track_caller]
    pub fn optimization_barrier(&self, xs: &[Value]) -> Result<Vec<Value>> {
        self.apply(Op::OptimizationBarrier, xs)
    }

    /// The same value, with a wish how it is laid out over the mesh.
    ///
    /// # Errors
    /// When the sharding has another rank.
    #[track_caller]
    pub fn sharding_constraint(&self, x: Value, sharding: Sharding) -> Result<Value> {
        self.one(Op::ShardingConstraint(sharding), &[x])
    }

    /// Calls a function that the runtime has registered under `target`, with integer attributes.
    ///
    /// # Errors
    /// When names are not plain words or there is no result.
    #[track_caller]
    pub fn custom_call(
        &self,
        target: &str,
        inputs: &[Value],
        results: &[TensorType],
        attributes: &[(&str, i64)],
    ) -> Result<Vec<Value>> {
        let call = CustomCall {
            target: target.to_owned(),
            results: results.to_vec(),
            attributes: attributes.iter().map(|&(n, v)| (n.to_owned(), v)).collect(),
        };
        self.apply(Op::CustomCall(call), inputs)
    }

    /// Runs `body` `length` times. Step `i` gets the carry, slice `i` (along dimension 0) of every value of `xs`, and
    /// `consts` as they are; it returns the next carry and the ys. The results are the last carry and the ys stacked along a
    /// new dimension 0.
    ///
    /// The body builds into its own graph: it may use its arguments, but no value from outside.
    ///
    /// # Errors
    /// When an x lacks the leading dimension, the carry changes type, or the body fails.
    #[track_caller]
    pub fn scan(
        &self,
        length: usize,
        carry: &[Value],
        xs: &[Value],
        consts: &[Value],
        body: impl FnOnce(&Graph, &[Value], &[Value], &[Value]) -> Result<CarryAndYs>,
    ) -> Result<CarryAndYs> {
        self.scan_with(length, false, carry, xs, consts, body)
    }

    /// [`Graph::scan`] from the last slice to the first; y `i` still belongs to slice `i`.
    ///
    /// # Errors
    /// As [`Graph::scan`].
    #[track_caller]
    pub fn scan_reverse(
        &self,
        length: usize,
        carry: &[Value],
        xs: &[Value],
        consts: &[Value],
        body: impl FnOnce(&Graph, &[Value], &[Value], &[Value]) -> Result<CarryAndYs>,
    ) -> Result<CarryAndYs> {
        self.scan_with(length, true, carry, xs, consts, body)
    }

    #[track_caller]
    fn scan_with(
        &self,
        length: usize,
        reverse: bool,
        carry: &[Value],
        xs: &[Value],
        consts: &[Value],
        body: impl FnOnce(&Graph, &[Value], &[Value], &[Value]) -> Result<CarryAndYs>,
    ) -> Result<CarryAndYs> {
        let operands = [carry, xs, consts].concat();
        self.check_foreign("scan", &operands)?;
        let g = Graph::nested_in(self, "scan");
        let mut inputs = Vec::with_capacity(operands.len());
        for (i, &v) in operands.iter().enumerate() {
            let scanned = (carry.len()..carry.len() + xs.len()).contains(&i);
            let ty = self.ty(v);
            if scanned && ty.shape.first() != Some(&length) {
                let p = Problem::Attribute(format!(
                    "scanned operand {} must have leading dimension {length}: it is {ty}",
                    i - carry.len()
                ));
                return Err(self.error("scan", &operands, p));
            }
            let ty = if scanned { unstacked(&ty) } else { ty };
            inputs.push(g.input(&i.to_string(), ty.dtype, ty.shape)?);
        }
        let (c, rest) = inputs.split_at(carry.len());
        let (x, k) = rest.split_at(xs.len());
        let (next, ys) = body(&g, c, x, k)?;
        if next.len() != carry.len() {
            let p =
                Problem::Attribute(format!("the body returns {} values for a carry of {}", next.len(), carry.len()));
            return Err(self.error("scan", &operands, p));
        }
        let outputs = [next, ys].concat();
        g.check_foreign("scan", &outputs)?;
        let scan = Scan {
            length,
            reverse,
            carry: carry.len(),
            xs: xs.len(),
            consts: consts.len(),
            body: Arc::new(g.finish_body(&outputs)),
        };
        let mut results = self.apply(Op::Scan(scan), &operands)?;
        let ys = results.split_off(carry.len());
        Ok((results, ys))
    }
}
