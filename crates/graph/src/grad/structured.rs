//! Rules of barriers and of ops with bodies, except scans.

use std::sync::Arc;

use super::joint::{Joint, Names, copy};
use super::{Grads, Result, Rule};
use crate::Value;
use crate::op::{CustomVjp, Node, Op, Remat, ValueId};

pub(super) fn optimization_barrier(r: &Rule<'_>) -> Grads {
    let present: Vec<Value> = r.ct.iter().flatten().copied().collect();
    let mut behind = r.g.optimization_barrier(&present)?.into_iter();
    Ok(r.ct.iter().map(|ct| ct.and_then(|_| behind.next())).collect())
}

/// Computes the body again from the operands and the values kept by name, then its gradient.
///
/// One barrier over all of these and the cotangents does two things: the copy cannot be merged with the forward pass, and it
/// is not computed before the cotangent is there.
pub(super) fn remat(r: &Rule<'_>, remat: &Remat) -> Grads {
    let g = r.g;
    let ct: Vec<bool> = r.ct.iter().map(Option::is_some).collect();
    let joint = Joint::new(g, &remat.body, &ct, &r.wants)?;
    let body = &joint.body;
    // What goes under the name, not what comes out: rules may read either, and this gives both.
    let named: Vec<ValueId> = body.nodes()[..joint.forward]
        .iter()
        .filter(|n| matches!(n.op(), Op::Named(name) if remat.keep.iter().any(|k| **k == **name)))
        .flat_map(|n| n.inputs().iter().copied())
        .filter(|v| !joint.primals().contains(v))
        .collect();
    let live = body.live_without(body.outputs(), |v| named.contains(&v));
    let is_used = |v: ValueId| {
        let by = |(i, n): (usize, &Node)| live[i] && n.inputs().contains(&v);
        body.outputs().contains(&v) || body.nodes().iter().enumerate().any(by)
    };
    let kept: Vec<ValueId> = named.iter().copied().filter(|&v| is_used(v)).collect();

    let mut used: Vec<(ValueId, Value)> = kept.iter().copied().zip(keep(r, remat, &joint, &kept)?).collect();
    let given = r.x.iter().copied().chain(r.ct.iter().flatten().copied());
    used.extend(body.inputs().iter().copied().zip(given).filter(|(v, _)| live[body.values()[v.index()].node()]));
    let values: Vec<Value> = used.iter().map(|&(_, v)| v).collect();
    let is_work = |n: &Node| !matches!(n.op(), Op::Input { .. } | Op::Named(_));
    let recomputes = body.nodes()[..joint.forward].iter().zip(&live).any(|(n, l)| *l && is_work(n));
    let values = if recomputes { g.optimization_barrier(&values)? } else { values };
    let mut names = Names::new(body);
    for (&(v, _), value) in used.iter().zip(values) {
        names.set(v, value);
    }
    copy(g, body, |i| live[i], &mut names)?;
    joint.grads.iter().map(|v| v.map(|v| names.get(g, v)).transpose()).collect()
}

/// Lets the forward body return the values that are kept, and returns them. Those that it returns already are used as they
/// are.
fn keep(r: &Rule<'_>, remat: &Remat, joint: &Joint, kept: &[ValueId]) -> Result<Vec<Value>> {
    let known = |v: ValueId| joint.results.iter().position(|&y| y == v);
    let new: Vec<ValueId> = kept.iter().copied().filter(|&v| known(v).is_none()).collect();
    let mut added = Vec::new();
    if !new.is_empty() {
        let outputs = [&joint.results[..], &new].concat();
        let body = Arc::new(joint.forward_body(r.g, "remat", &outputs)?);
        added = r.g.extend_node(r.index, Op::Remat(Remat { body, ..remat.clone() }))?;
    }
    let mut added = added.into_iter();
    let found = kept.iter().map(|&v| known(v).map_or_else(|| added.next(), |i| Some(r.y[i])));
    found.collect::<Option<Vec<Value>>>().ok_or_else(|| r.fail("a value was not kept"))
}

/// The gradient that came with the forward pass.
///
/// Where it reads operands, it computes part of the forward pass again. A barrier over all it reads and the cotangents keeps
/// that from being merged with the forward pass, which would keep wide intermediate values (a `tanh`, a normalised row) instead
/// of the operands, and from being computed before it is needed.
pub(super) fn custom_vjp(r: &Rule<'_>, c: &CustomVjp) -> Grads {
    let g = r.g;
    let body = &*c.backward;
    let wanted: Vec<_> = c.gradients.iter().zip(&r.wants).map(|(at, &w)| at.filter(|_| w)).collect();
    let roots: Vec<_> = wanted.iter().flatten().map(|&at| body.outputs()[at]).collect();
    let live = body.live_for(&roots);
    let mut given = [&r.x[..], &r.y[c.visible..]].concat();
    let operands = given.len();
    for (&y, ct) in r.y.iter().zip(&r.ct).take(c.visible) {
        given.push(ct.map_or_else(|| g.full_like(y, 0.0), Ok)?);
    }
    let is_read = |i: usize| live[body.values()[body.inputs()[i].index()].node()];
    if (0..r.x.len()).any(is_read) {
        let behind: Vec<usize> =
            (0..given.len()).filter(|&i| is_read(i) && (i < operands || r.ct[i - operands].is_some())).collect();
        let values: Vec<Value> = behind.iter().map(|&i| given[i]).collect();
        for (&i, value) in behind.iter().zip(g.optimization_barrier(&values)?) {
            given[i] = value;
        }
    }
    let mut names = Names::new(body);
    for (&v, value) in body.inputs().iter().zip(given) {
        names.set(v, value);
    }
    copy(g, body, |i| live[i], &mut names)?;
    wanted.iter().map(|at| at.map(|at| names.get(g, body.outputs()[at])).transpose()).collect()
}
