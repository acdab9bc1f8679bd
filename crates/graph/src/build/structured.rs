//! Barriers, shardings, calls into the runtime, and ops with bodies.

use std::sync::Arc;

use crate::infer::unstacked;
use crate::op::{CustomCall, CustomVjp, Op, Remat, Scan, TensorType};
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
        self.custom_call_in_place(target, inputs, 0, results, attributes)
    }

    /// The same, where the first `in_place` results take over the memory of the operands at the same positions. They are of
    /// the same types, and the function finds the operands' elements there. An operand that is needed afterwards is copied.
    ///
    /// # Errors
    /// When names are not plain words, there is no result, or types differ.
    #[track_caller]
    pub fn custom_call_in_place(
        &self,
        target: &str,
        inputs: &[Value],
        in_place: usize,
        results: &[TensorType],
        attributes: &[(&str, i64)],
    ) -> Result<Vec<Value>> {
        let call = CustomCall {
            target: target.to_owned(),
            results: results.to_vec(),
            attributes: attributes.iter().map(|&(n, v)| (n.to_owned(), v)).collect(),
            in_place,
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

    /// The same value under a name, by which [`Graph::remat_keeping`] around it may keep it.
    ///
    /// # Errors
    /// When the name is empty.
    #[track_caller]
    pub fn named(&self, x: Value, name: &str) -> Result<Value> {
        self.one(Op::Named(name.into()), &[x])
    }

    /// Computes `body`, of which a gradient keeps only `inputs`: it computes the body again, behind a barrier that waits for
    /// the incoming cotangent. Trades time for memory.
    ///
    /// The body builds into its own graph: it may use its arguments, but no value from outside.
    ///
    /// # Errors
    /// When the body fails or returns nothing.
    #[track_caller]
    pub fn remat(
        &self,
        inputs: &[Value],
        body: impl FnOnce(&Graph, &[Value]) -> Result<Vec<Value>>,
    ) -> Result<Vec<Value>> {
        self.remat_keeping(inputs, &[], body)
    }

    /// [`Graph::remat`] whose gradient keeps, besides the inputs, values of the body with one of these names
    /// ([`Graph::named`]). Names within ops with bodies of their own do not count.
    ///
    /// # Errors
    /// As [`Graph::remat`]. A name that nothing has is no error.
    #[track_caller]
    pub fn remat_keeping(
        &self,
        inputs: &[Value],
        keep: &[&str],
        body: impl FnOnce(&Graph, &[Value]) -> Result<Vec<Value>>,
    ) -> Result<Vec<Value>> {
        self.check_foreign("remat", inputs)?;
        let g = Graph::nested_in(self, "remat");
        let arguments = g.arguments(inputs.iter().map(|&v| self.ty(v)))?;
        let outputs = body(&g, &arguments)?;
        g.check_foreign("remat", &outputs)?;
        let keep = keep.iter().map(|&n| n.to_owned()).collect();
        self.apply(Op::Remat(Remat { keep, body: Arc::new(g.finish_body(&outputs)) }), inputs)
    }

    /// Computes `forward`, whose gradient is what `backward` says.
    ///
    /// `forward` returns the results, all floats, and residuals, which are kept for the gradient. `backward` gets the inputs,
    /// the residuals and one cotangent of the type of each result (zeros where a result has no influence on the loss), and
    /// returns for every input its gradient, of the type of the input, or none. Both build into graphs of their own: they may
    /// use their arguments, but no value from outside.
    ///
    /// # Errors
    /// When a body fails, there is no result, a result is no float, or gradients do not match the inputs.
    #[track_caller]
    pub fn custom_vjp(
        &self,
        inputs: &[Value],
        forward: impl FnOnce(&Graph, &[Value]) -> Result<(Vec<Value>, Vec<Value>)>,
        backward: impl FnOnce(&Graph, &[Value], &[Value], &[Value]) -> Result<Vec<Option<Value>>>,
    ) -> Result<Vec<Value>> {
        self.check_foreign("custom_vjp", inputs)?;
        let types = |g: &Graph, vs: &[Value]| vs.iter().map(|&v| g.ty(v)).collect::<Vec<_>>();
        let f = Graph::nested_in(self, "custom_vjp");
        let operands = types(self, inputs);
        let (results, residuals) = forward(&f, &f.arguments(operands.iter().cloned())?)?;
        let outputs = [&results[..], &residuals].concat();
        f.check_foreign("custom_vjp", &outputs)?;

        let b = Graph::nested_in(self, "custom_vjp/grad");
        let given = [operands, types(&f, &residuals), types(&f, &results)].concat();
        let arguments = b.arguments(given.into_iter())?;
        let (x, rest) = arguments.split_at(inputs.len());
        let (kept, cotangents) = rest.split_at(residuals.len());
        let gradients = backward(&b, x, kept, cotangents)?;
        let present: Vec<Value> = gradients.iter().flatten().copied().collect();
        b.check_foreign("custom_vjp", &present)?;
        let mut places = 0..;
        let op = CustomVjp {
            forward: Arc::new(f.finish_body(&outputs)),
            visible: results.len(),
            backward: Arc::new(b.finish_body(&present)),
            gradients: gradients.iter().map(|g| g.and_then(|_| places.next())).collect(),
        };
        let mut all = self.apply(Op::CustomVjp(op), inputs)?;
        all.truncate(results.len());
        Ok(all)
    }

    /// The same value, through which no gradient flows.
    ///
    /// # Errors
    /// When the value is no float.
    #[track_caller]
    pub fn stop_gradient(&self, x: Value) -> Result<Value> {
        let y = self.custom_vjp(&[x], |_, x| Ok((x.to_vec(), Vec::new())), |_, _, _, _| Ok(vec![None]))?;
        Ok(y[0])
    }

    /// The inputs of a body, of these types.
    #[track_caller]
    pub(crate) fn arguments(&self, types: impl Iterator<Item = TensorType>) -> Result<Vec<Value>> {
        types.enumerate().map(|(i, ty)| self.input(&i.to_string(), ty.dtype, ty.shape)).collect()
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
