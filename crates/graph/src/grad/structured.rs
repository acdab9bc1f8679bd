//! Rules of barriers and of ops with bodies, except scans.

use super::joint::{Joint, Names, copy};
use super::{Grads, Rule};
use crate::Value;
use crate::op::{CustomVjp, Op, Remat};

pub(super) fn optimization_barrier(r: &Rule<'_>) -> Grads {
    let present: Vec<Value> = r.ct.iter().flatten().copied().collect();
    let mut behind = r.g.optimization_barrier(&present)?.into_iter();
    Ok(r.ct.iter().map(|ct| ct.and_then(|_| behind.next())).collect())
}

/// Computes the body again from the operands, then its gradient.
///
/// One barrier over operands and cotangents does two things: the copy cannot be merged with the forward pass, and it is not
/// computed before the cotangent is there.
pub(super) fn remat(r: &Rule<'_>, remat: &Remat) -> Grads {
    let g = r.g;
    let ct: Vec<bool> = r.ct.iter().map(Option::is_some).collect();
    let joint = Joint::new(g, &remat.body, &ct, &r.wants)?;
    let body = &joint.body;
    let live = body.live();
    let given = || r.x.iter().copied().chain(r.ct.iter().flatten().copied());
    let used: Vec<_> =
        body.inputs().iter().copied().zip(given()).filter(|(v, _)| live[body.values()[v.index()].node()]).collect();
    let recomputes =
        body.nodes()[..joint.forward].iter().zip(&live).any(|(n, l)| *l && !matches!(n.op(), Op::Input { .. }));
    let values: Vec<Value> = used.iter().map(|&(_, v)| v).collect();
    let values = if recomputes { g.optimization_barrier(&values)? } else { values };
    let mut names = Names::new(body);
    for (&(v, _), value) in used.iter().zip(values) {
        names.set(v, value);
    }
    copy(g, body, |i| live[i], &mut names)?;
    joint.grads.iter().map(|v| v.map(|v| names.get(g, v)).transpose()).collect()
}

pub(super) fn custom_vjp(r: &Rule<'_>, c: &CustomVjp) -> Grads {
    let g = r.g;
    let body = &*c.backward;
    let mut given = [&r.x[..], &r.y[c.visible..]].concat();
    for (&y, ct) in r.y.iter().zip(&r.ct).take(c.visible) {
        given.push(ct.map_or_else(|| g.full_like(y, 0.0), Ok)?);
    }
    let mut names = Names::new(body);
    for (&v, value) in body.inputs().iter().zip(given) {
        names.set(v, value);
    }
    let wanted: Vec<_> = c.gradients.iter().zip(&r.wants).map(|(at, &w)| at.filter(|_| w)).collect();
    let roots: Vec<_> = wanted.iter().flatten().map(|&at| body.outputs()[at]).collect();
    let live = body.live_for(&roots);
    copy(g, body, |i| live[i], &mut names)?;
    wanted.iter().map(|at| at.map(|at| names.get(g, body.outputs()[at])).transpose()).collect()
}
