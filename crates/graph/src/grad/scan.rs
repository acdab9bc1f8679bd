//! The rule of scans: a scan the other way round.
//!
//! The body and its gradient form a joint (one step forward, one step backward), which is cut in two. What the backward part
//! needs of the forward part comes from one of four places, the first that fits:
//! - **xs and consts** of the scan are handed to the backward scan as they are;
//! - **light** values, that cheap ops make from xs, consts and constants alone (masks, conversions of weights), and plain
//!   rearrangements of kept values (broadcasts, reshapes, widening conversions) are computed again;
//! - **invariant** values, that depend on consts alone, are computed once outside the loop and not stacked;
//! - everything else is a **residual**: the forward scan returns it stacked over steps, as one more of its ys. One that
//!   plain arithmetic makes from other residuals is computed again instead.
//!
//! The backward scan carries the cotangents of the carry and one sum for each const that wants a gradient (narrow floats are
//! summed in `f32`); its ys are the cotangents of the xs.

use std::sync::Arc;

use super::activity::{scan_carries, scan_inputs};
use super::joint::{Joint, Names, copy};
use super::{Grads, Result, Rule, accumulator};
use crate::op::{BinaryOp, Body, Op, Scan, UnaryOp, ValueId};
use crate::{Graph, Value};

/// Where the backward part gets the forward values it needs.
struct Plan {
    /// Inputs of the forward body that are handed on, by position.
    handed: Vec<usize>,
    /// Computed once, outside the loop.
    invariant: Vec<ValueId>,
    /// Stacked by the forward scan.
    residual: Vec<ValueId>,
    /// Nodes of the backward step: those computed again and those of the gradient.
    nodes: Vec<bool>,
}

/// Elementwise ops and rearrangements: cheaper to run again than to keep.
fn is_cheap(op: &Op) -> bool {
    matches!(
        op,
        Op::Constant { .. }
            | Op::Iota { .. }
            | Op::Unary(_)
            | Op::Binary(_)
            | Op::Compare(_)
            | Op::Select
            | Op::Clamp
            | Op::Convert(_)
            | Op::ReducePrecision { .. }
            | Op::BroadcastInDim { .. }
            | Op::Reshape(_)
            | Op::Transpose(_)
            | Op::Slice { .. }
            | Op::Pad { .. }
            | Op::Concatenate(_)
            | Op::Reverse(_)
            | Op::ShardingConstraint(_)
            | Op::Named(_)
    )
}

/// Ops whose operand is as good as the result and no larger.
fn is_rearrangement(body: &Body, op: &Op, operand: Option<ValueId>) -> bool {
    match op {
        Op::BroadcastInDim { .. }
        | Op::Reshape(_)
        | Op::Transpose(_)
        | Op::Reverse(_)
        | Op::ShardingConstraint(_)
        | Op::Named(_) => true,
        Op::Convert(to) => operand.is_some_and(|v| body.ty(v).dtype.size() <= to.size()),
        _ => false,
    }
}

/// Arithmetic that costs less than reading the result would.
fn is_arithmetic(op: &Op) -> bool {
    match op {
        Op::Binary(b) => !matches!(b, BinaryOp::Div | BinaryOp::Rem | BinaryOp::Pow),
        Op::Unary(u) => matches!(u, UnaryOp::Neg | UnaryOp::Abs | UnaryOp::Sign | UnaryOp::Not),
        Op::Compare(_) | Op::Select | Op::Clamp | Op::Convert(_) | Op::ReducePrecision { .. } => true,
        _ => false,
    }
}

fn plan(joint: &Joint, s: &Scan) -> Plan {
    let body = &joint.body;
    let n = body.values().len();
    let (mut light, mut invariant) = (vec![false; n], vec![false; n]);
    for (i, v) in joint.primals().iter().enumerate() {
        light[v.index()] = i >= s.carry;
        invariant[v.index()] = i >= s.carry + s.xs;
    }
    for node in &body.nodes()[..joint.forward] {
        if matches!(node.op(), Op::Input { .. }) {
            continue;
        }
        let all = |of: &[bool]| node.inputs().iter().all(|v| of[v.index()]);
        let (l, i) = (is_cheap(node.op()) && all(&light), all(&invariant));
        for v in node.outputs() {
            (light[v.index()], invariant[v.index()]) = (l, i);
        }
    }

    let live = body.live();
    let mut plan = Plan { handed: vec![], invariant: vec![], residual: vec![], nodes: vec![false; live.len()] };
    let mut needed: Vec<ValueId> = body.outputs().to_vec();
    for (i, node) in body.nodes().iter().enumerate().skip(joint.forward).filter(|(i, _)| live[*i]) {
        plan.nodes[i] = true;
        needed.extend_from_slice(node.inputs());
    }
    let mut seen = vec![false; n];
    loop {
        while let Some(v) = needed.pop() {
            if !joint.is_forward(v) || std::mem::replace(&mut seen[v.index()], true) {
                continue;
            }
            let at = body.values()[v.index()].node();
            let node = &body.nodes()[at];
            let op = node.op();
            if light[v.index()] && matches!(op, Op::Input { .. }) {
                plan.handed.extend(joint.primals().iter().position(|&p| p == v));
            } else if light[v.index()]
                || !invariant[v.index()] && is_rearrangement(body, op, node.inputs().first().copied())
            {
                plan.nodes[at] = true;
                needed.extend_from_slice(node.inputs());
            } else if invariant[v.index()] {
                plan.invariant.push(v);
            } else {
                plan.residual.push(v);
            }
        }
        // Those that arithmetic makes from what is there anyway need not be kept, unless they are among the ys already.
        let had = |v: &ValueId| seen[v.index()] || light[v.index()];
        let spare = plan.residual.iter().position(|v| {
            let node = &body.nodes()[body.values()[v.index()].node()];
            is_arithmetic(node.op()) && node.inputs().iter().all(had) && !joint.results[s.carry..].contains(v)
        });
        let Some(spare) = spare else { break };
        let at = body.values()[plan.residual.swap_remove(spare).index()].node();
        plan.nodes[at] = true;
        needed.extend_from_slice(body.nodes()[at].inputs());
    }
    // Whatever the order in which the backward part was walked.
    plan.handed.sort_unstable();
    plan.invariant.sort_unstable();
    plan.residual.sort_unstable();
    plan
}

/// Lets the forward scan return the residuals, stacked, and returns them. Those that it returns already are used as they are.
fn stack(r: &Rule<'_>, s: &Scan, joint: &Joint, residual: &[ValueId]) -> Result<Vec<Value>> {
    let g = r.g;
    let known = |v: ValueId| joint.results[s.carry..].iter().position(|&y| y == v);
    let new: Vec<ValueId> = residual.iter().copied().filter(|&v| known(v).is_none()).collect();
    let mut added = Vec::new();
    if !new.is_empty() {
        let outputs = [&joint.results[..], &new].concat();
        let body = Arc::new(joint.forward_body(g, "scan", &outputs)?);
        added = g.extend_node(r.index, Op::Scan(Scan { body, ..s.clone() }))?;
    }
    let mut added = added.into_iter();
    let found = residual.iter().map(|&v| match known(v) {
        Some(y) => Some(r.y[s.carry + y]),
        None => added.next(),
    });
    found.collect::<Option<Vec<Value>>>().ok_or_else(|| r.fail("a residual was not stacked"))
}

/// Computes invariant values outside the loop.
fn hoist(r: &Rule<'_>, s: &Scan, joint: &Joint, invariant: &[ValueId]) -> Result<Vec<Value>> {
    let mut names = Names::new(&joint.body);
    for (&v, &x) in joint.primals().iter().zip(&r.x).skip(s.carry + s.xs) {
        names.set(v, x);
    }
    let live = joint.body.live_for(invariant);
    copy(r.g, &joint.body, |i| live[i], &mut names)?;
    names.all(r.g, invariant)
}

pub(super) fn scan(r: &Rule<'_>, s: &Scan) -> Grads {
    let g = r.g;
    let wants = scan_inputs(s, &r.wants);
    let outside: Vec<bool> = r.ct.iter().map(Option::is_some).collect();
    let carries = scan_carries(s, &wants, &outside);
    // A carry without gradient may still have got a cotangent from outside: nothing is asked of it.
    let carried: Vec<usize> = (0..s.carry).filter(|&i| carries[i] && wants[i]).collect();
    let ys: Vec<usize> = (s.carry..outside.len()).filter(|&i| outside[i]).collect();
    let present: Vec<bool> = (0..outside.len()).map(|i| carried.contains(&i) || ys.contains(&i)).collect();
    let joint = Joint::new(g, &s.body, &present, &wants)?;
    let plan = plan(&joint, s);
    let stacks = stack(r, s, &joint, &plan.residual)?;
    let hoisted = hoist(r, s, &joint, &plan.invariant)?;

    // Operands of the backward scan. Carry: cotangents of the carry, then sums for consts.
    let summed: Vec<usize> = (s.carry + s.xs..r.x.len()).filter(|&i| joint.grads[i].is_some()).collect();
    let mut carry = Vec::new();
    for &i in &carried {
        carry.push(r.ct[i].map_or_else(|| g.full_like(r.x[i], 0.0), Ok)?);
    }
    for &i in &summed {
        let ty = g.ty(r.x[i]);
        carry.push(g.splat(accumulator(ty.dtype), ty.shape, 0.0)?);
    }
    // Xs: residuals, xs, cotangents of ys. Consts: consts, then hoisted values.
    let (xs_handed, consts_handed): (Vec<usize>, Vec<usize>) = plan.handed.iter().partition(|&&i| i < s.carry + s.xs);
    let mut xs = stacks;
    xs.extend(xs_handed.iter().map(|&i| r.x[i]));
    xs.extend(ys.iter().filter_map(|&i| r.ct[i]));
    let mut consts: Vec<Value> = consts_handed.iter().map(|&i| r.x[i]).collect();
    consts.extend(hoisted);
    // What these are in the joint.
    let primals = joint.primals();
    let (ct_carry, ct_ys) = joint.cotangents().split_at(carried.len());
    let ids = |positions: &[usize]| positions.iter().map(|&i| primals[i]).collect::<Vec<_>>();
    let x_ids = [&plan.residual[..], &ids(&xs_handed), ct_ys].concat();
    let const_ids = [&ids(&consts_handed)[..], &plan.invariant].concat();

    let out: Vec<usize> = (s.carry..s.carry + s.xs).filter(|&i| joint.grads[i].is_some()).collect();
    let step = |b: &Graph, c: &[Value], x: &[Value], k: &[Value]| {
        let mut names = Names::new(&joint.body);
        let (ct, sums) = c.split_at(carried.len());
        let ids = ct_carry.iter().chain(&x_ids).chain(&const_ids);
        for (&v, &value) in ids.zip(ct.iter().chain(x).chain(k)) {
            names.set(v, value);
        }
        copy(b, &joint.body, |i| plan.nodes[i], &mut names)?;
        let mut next = Vec::with_capacity(c.len());
        for (&i, &ct) in carried.iter().zip(ct) {
            next.push(joint.grads[i].map_or_else(|| b.full_like(ct, 0.0), |v| names.get(b, v))?);
        }
        for (&i, &sum) in summed.iter().zip(sums) {
            let Some(grad) = joint.grads[i] else { continue };
            next.push(b.add(sum, b.convert(names.get(b, grad)?, b.dtype(sum))?)?);
        }
        let grads: Vec<ValueId> = out.iter().filter_map(|&i| joint.grads[i]).collect();
        Ok((next, names.all(b, &grads)?))
    };
    let (last, stacked) = match s.reverse {
        true => g.scan(s.length, &carry, &xs, &consts, step)?,
        false => g.scan_reverse(s.length, &carry, &xs, &consts, step)?,
    };

    let mut grads = vec![None; r.x.len()];
    let (ct, sums) = last.split_at(carried.len());
    for (&i, &v) in carried.iter().zip(ct) {
        // A body that ignores its carry passes nothing on, except through no steps at all.
        grads[i] = (joint.grads[i].is_some() || s.length == 0).then_some(v);
    }
    for (&i, &v) in summed.iter().zip(sums) {
        grads[i] = Some(g.convert(v, g.dtype(r.x[i]))?);
    }
    for (&i, &v) in out.iter().zip(&stacked) {
        grads[i] = Some(v);
    }
    Ok(grads)
}
