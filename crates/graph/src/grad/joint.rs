//! Bodies copied from graph to graph, and bodies with their own gradient behind them.

use crate::op::{Body, Op, ValueId};
use crate::{Graph, Problem, Value};

use super::Result;

/// What the values of one body are called in the graph it is copied to.
pub(super) struct Names(Vec<Option<Value>>);

impl Names {
    /// Nothing is named yet.
    pub(super) fn new(body: &Body) -> Self {
        Names(vec![None; body.values().len()])
    }

    pub(super) fn set(&mut self, v: ValueId, value: Value) {
        self.0[v.index()] = Some(value);
    }

    pub(super) fn get(&self, g: &Graph, v: ValueId) -> Result<Value> {
        self.0[v.index()].ok_or_else(|| {
            g.error("grad", &[], Problem::Attribute(format!("value {} of the body was not computed", v.index())))
        })
    }

    pub(super) fn all(&self, g: &Graph, vs: &[ValueId]) -> Result<Vec<Value>> {
        vs.iter().map(|&v| self.get(g, v)).collect()
    }
}

/// Appends the chosen nodes of a body, with their source lines and scopes. Operands that are not copied need names already.
pub(super) fn copy(g: &Graph, body: &Body, choose: impl Fn(usize) -> bool, names: &mut Names) -> Result<()> {
    for (i, node) in body.nodes().iter().enumerate() {
        if !choose(i) || matches!(node.op(), Op::Input { .. }) {
            continue;
        }
        let operands = names.all(g, node.inputs())?;
        let results = g.ascribed(node.scope.clone(), node.location(), || g.apply(node.op().clone(), &operands))?;
        for (v, value) in node.outputs().zip(results) {
            names.set(v, value);
        }
    }
    Ok(())
}

/// A body followed by its gradient.
pub(super) struct Joint {
    /// Inputs: those of the forward body, then the cotangents that are present. Outputs: the gradients that are present.
    pub body: Body,
    /// How many of the inputs are those of the forward body.
    pub inputs: usize,
    /// Nodes before this one are the forward body (and its inputs), nodes from it on the gradient (and its cotangents).
    pub forward: usize,
    /// The outputs of the forward body.
    pub results: Vec<ValueId>,
    /// The gradient of each input of the forward body.
    pub grads: Vec<Option<ValueId>>,
}

impl Joint {
    /// Puts the gradient of `body` behind it: `ct` are the outputs with cotangents, `wants` the inputs that want one.
    pub(super) fn new(parent: &Graph, body: &Body, ct: &[bool], wants: &[bool]) -> Result<Self> {
        let g = Graph::nested_in(parent, "grad");
        let inputs = g.arguments(body.inputs().iter().map(|&v| body.ty(v).clone()))?;
        let mut names = Names::new(body);
        for (&v, &x) in body.inputs().iter().zip(&inputs) {
            names.set(v, x);
        }
        let live = body.live();
        copy(&g, body, |i| live[i], &mut names)?;
        let results = names.all(&g, body.outputs())?;
        let forward = g.body().nodes().len();
        let mut pairs = Vec::new();
        for (i, &y) in results.iter().enumerate().filter(|(i, _)| ct[*i]) {
            let ty = g.ty(y);
            pairs.push((y, g.input(&format!("ct{i}"), ty.dtype, ty.shape)?));
        }
        let wrt: Vec<Value> = inputs.iter().zip(wants).filter(|(_, w)| **w).map(|(&x, _)| x).collect();
        let mut found = g.vjp(&pairs, &wrt)?.into_iter();
        let grads: Vec<Option<Value>> = wants.iter().map(|&w| if w { found.next().flatten() } else { None }).collect();
        let outputs: Vec<Value> = grads.iter().flatten().copied().collect();
        Ok(Joint {
            inputs: inputs.len(),
            forward,
            results: results.iter().map(|v| v.id()).collect(),
            grads: grads.iter().map(|v| v.map(Value::id)).collect(),
            body: g.finish_body(&outputs),
        })
    }

    /// The forward body with these outputs.
    pub(super) fn forward_body(&self, parent: &Graph, name: &str, outputs: &[ValueId]) -> Result<Body> {
        let g = Graph::nested_in(parent, name);
        let inputs = g.arguments(self.primals().iter().map(|&v| self.body.ty(v).clone()))?;
        let mut names = Names::new(&self.body);
        for (&v, x) in self.primals().iter().zip(inputs) {
            names.set(v, x);
        }
        let live = self.body.live_for(outputs);
        copy(&g, &self.body, |i| live[i], &mut names)?;
        let outputs = names.all(&g, outputs)?;
        Ok(g.finish_body(&outputs))
    }

    /// The inputs of the forward body.
    pub(super) fn primals(&self) -> &[ValueId] {
        &self.body.inputs()[..self.inputs]
    }

    /// The cotangents that are present, in the order of the results.
    pub(super) fn cotangents(&self) -> &[ValueId] {
        &self.body.inputs()[self.inputs..]
    }

    /// Whether a value is made by the forward body (or is an input of it).
    pub(super) fn is_forward(&self, v: ValueId) -> bool {
        self.body.values()[v.index()].node() < self.forward
    }
}
