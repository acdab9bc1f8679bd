//! Which values have cotangents at all: forward from what is asked for, backward from what influences the loss.

use crate::op::{Body, Op, Scan, UnaryOp, ValueId};

/// For every value, whether it is a float that depends differentiably on a seed (or is one).
pub(super) fn activity(body: &Body, seed: impl Fn(ValueId) -> bool) -> Vec<bool> {
    let mut active = vec![false; body.values().len()];
    for node in body.nodes() {
        let operands: Vec<bool> = node.inputs().iter().map(|v| active[v.index()]).collect();
        let results = match operands.contains(&true) {
            true => results(node.op(), &operands, node.outputs().len()),
            false => vec![false; node.outputs().len()],
        };
        for (v, a) in node.outputs().zip(results) {
            active[v.index()] = body.ty(v).dtype.is_float() && (a || seed(v));
        }
    }
    active
}

/// [`activity`] from some of the inputs.
pub(super) fn from_inputs(body: &Body, inputs: &[bool]) -> Vec<bool> {
    activity(body, |v| body.inputs().iter().zip(inputs).any(|(&i, &a)| a && i == v))
}

/// Which results of an op are active, given which operands are.
fn results(op: &Op, operands: &[bool], count: usize) -> Vec<bool> {
    let inside = |body: &Body, inputs: &[bool]| {
        let active = from_inputs(body, inputs);
        body.outputs().iter().map(|v| active[v.index()]).collect()
    };
    match op {
        Op::Unary(UnaryOp::Sign | UnaryOp::Floor | UnaryOp::Ceil) => vec![false; count],
        Op::OptimizationBarrier => operands.to_vec(),
        Op::Remat(r) => inside(&r.body, operands),
        Op::Scan(s) => inside(&s.body, &scan_inputs(s, operands)),
        Op::CustomVjp(c) => {
            let flows = operands.iter().zip(&c.gradients).any(|(&a, g)| a && g.is_some());
            (0..count).map(|i| flows && i < c.visible).collect()
        }
        _ => vec![true; count],
    }
}

/// Which inputs of a scan's body are active in some step: a carry may become active on the way.
pub(super) fn scan_inputs(s: &Scan, operands: &[bool]) -> Vec<bool> {
    let mut inputs = operands.to_vec();
    loop {
        let active = from_inputs(&s.body, &inputs);
        let mut grown = false;
        for (i, v) in s.body.outputs().iter().take(s.carry).enumerate() {
            grown |= active[v.index()] && !inputs[i];
            inputs[i] |= active[v.index()];
        }
        if !grown {
            return inputs;
        }
    }
}

/// Which carries of a scan have a cotangent in some step, going backward.
///
/// `inputs` are the active inputs of the body, `outputs` those outputs of the body whose cotangents come from outside.
pub(super) fn scan_carries(s: &Scan, inputs: &[bool], outputs: &[bool]) -> Vec<bool> {
    let body = &*s.body;
    let active = from_inputs(body, inputs);
    let mut present = outputs.to_vec();
    loop {
        let mut reached = vec![false; body.values().len()];
        for (v, _) in body.outputs().iter().zip(&present).filter(|(_, p)| **p) {
            reached[v.index()] = active[v.index()];
        }
        for node in body.nodes().iter().rev() {
            if node.outputs().any(|v| reached[v.index()]) {
                for v in node.inputs() {
                    reached[v.index()] |= active[v.index()];
                }
            }
        }
        let mut grown = false;
        for i in 0..s.carry {
            let r = reached[body.inputs()[i].index()];
            grown |= r && !present[i];
            present[i] |= r;
        }
        if !grown {
            present.truncate(s.carry);
            return present;
        }
    }
}
