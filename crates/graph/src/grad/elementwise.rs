//! Rules of elementwise ops.

use tensor::DType;

use super::{Grads, Result, Rule, sum_all};
use crate::op::{BinaryOp, Compare, UnaryOp};
use crate::{Graph, Value};

pub(super) fn unary(r: &Rule<'_>, u: UnaryOp) -> Grads {
    let (g, x, y, ct) = (r.g, r.x[0], r.y[0], r.only()?);
    // Where there is a choice, the factor is computed from the result: it is more often kept anyway.
    let grad = match u {
        UnaryOp::Sign | UnaryOp::Floor | UnaryOp::Ceil | UnaryOp::Not => return Ok(vec![None]),
        UnaryOp::Neg => g.neg(ct)?,
        UnaryOp::Abs => g.mul(ct, g.sign(x)?)?,
        UnaryOp::Exp => g.mul(ct, y)?,
        UnaryOp::Expm1 => g.mul(ct, g.add_scalar(y, 1.0)?)?,
        UnaryOp::Log => g.div(ct, x)?,
        UnaryOp::Log1p => g.div(ct, g.add_scalar(x, 1.0)?)?,
        UnaryOp::Tanh => g.mul(ct, g.sub(g.full_like(y, 1.0)?, g.mul(y, y)?)?)?,
        UnaryOp::Logistic => g.mul(ct, g.mul(y, g.sub(g.full_like(y, 1.0)?, y)?)?)?,
        UnaryOp::Sqrt => g.div(g.mul_scalar(ct, 0.5)?, y)?,
        UnaryOp::Rsqrt => g.mul(g.mul_scalar(ct, -0.5)?, g.mul(y, g.mul(y, y)?)?)?,
        UnaryOp::Sin => g.mul(ct, g.cos(x)?)?,
        UnaryOp::Cos => g.neg(g.mul(ct, g.sin(x)?)?)?,
    };
    Ok(vec![Some(grad)])
}

pub(super) fn binary(r: &Rule<'_>, op: BinaryOp) -> Grads {
    let (g, a, b, y, ct) = (r.g, r.x[0], r.x[1], r.y[0], r.only()?);
    let (left, right): (Option<Value>, Option<Value>) = match op {
        BinaryOp::And | BinaryOp::Or | BinaryOp::Xor => (None, None),
        BinaryOp::Add => (Some(ct), Some(ct)),
        BinaryOp::Sub => (Some(ct), r.wanted(1, || g.neg(ct))?),
        BinaryOp::Mul => (r.wanted(0, || g.mul(ct, b))?, r.wanted(1, || g.mul(ct, a))?),
        BinaryOp::Div => {
            let left = g.div(ct, b)?;
            (Some(left), r.wanted(1, || g.neg(g.mul(left, y)?))?)
        }
        // a - b * trunc(a / b), where the truncated quotient is constant between its jumps.
        BinaryOp::Rem => (Some(ct), r.wanted(1, || g.neg(g.mul(ct, g.div(g.sub(a, y)?, b)?)?))?),
        BinaryOp::Max => {
            (r.wanted(0, || winner(g, ct, Compare::Gt, a, b))?, r.wanted(1, || winner(g, ct, Compare::Gt, b, a))?)
        }
        BinaryOp::Min => {
            (r.wanted(0, || winner(g, ct, Compare::Lt, a, b))?, r.wanted(1, || winner(g, ct, Compare::Lt, b, a))?)
        }
        BinaryOp::Pow => (r.wanted(0, || base(g, ct, a, b))?, r.wanted(1, || exponent(g, ct, a, y))?),
    };
    Ok(vec![left, right])
}

/// The cotangent where `a` wins against `b`, half of it where they tie.
fn winner(g: &Graph, ct: Value, wins: Compare, a: Value, b: Value) -> Result<Value> {
    let zero = g.full_like(ct, 0.0)?;
    let tied = g.select(g.compare(Compare::Eq, a, b)?, g.mul_scalar(ct, 0.5)?, zero)?;
    g.select(g.compare(wins, a, b)?, ct, tied)
}

/// `ct * b * a^(b - 1)`, and 0 where the exponent is 0, also for a base of 0.
fn base(g: &Graph, ct: Value, a: Value, b: Value) -> Result<Value> {
    let slope = g.mul(b, g.pow(a, g.add_scalar(b, -1.0)?)?)?;
    let constant = g.compare(Compare::Eq, b, g.full_like(b, 0.0)?)?;
    g.mul(ct, g.select(constant, g.full_like(b, 0.0)?, slope)?)
}

/// `ct * a^b * ln(a)`, and 0 for a base of 0.
fn exponent(g: &Graph, ct: Value, a: Value, y: Value) -> Result<Value> {
    let zero = g.compare(Compare::Eq, a, g.full_like(a, 0.0)?)?;
    let log = g.log(g.select(zero, g.full_like(a, 1.0)?, a)?)?;
    g.mul(ct, g.mul(y, log)?)
}

pub(super) fn select(r: &Rule<'_>) -> Grads {
    let (g, pred, ct) = (r.g, r.x[0], r.only()?);
    let zero = g.full_like(ct, 0.0)?;
    Ok(vec![None, r.wanted(1, || g.select(pred, ct, zero))?, r.wanted(2, || g.select(pred, zero, ct))?])
}

pub(super) fn clamp(r: &Rule<'_>) -> Grads {
    let (g, ct) = (r.g, r.only()?);
    let shape = g.shape(ct);
    let (lo, x, hi) = (g.broadcast_to(r.x[0], shape.clone())?, r.x[1], g.broadcast_to(r.x[2], shape)?);
    let zero = g.full_like(ct, 0.0)?;
    let below = g.compare(Compare::Lt, x, lo)?;
    let above = g.compare(Compare::Gt, g.max(x, lo)?, hi)?;
    // A bound that is a scalar gets the sum.
    let bound = |i: usize, grad: Value| if g.shape(r.x[i]).rank() == 0 { sum_all(g, grad) } else { Ok(grad) };
    Ok(vec![
        r.wanted(0, || bound(0, g.select(g.and(below, g.not(above)?)?, ct, zero)?))?,
        r.wanted(1, || g.select(g.or(below, above)?, zero, ct))?,
        r.wanted(2, || bound(2, g.select(above, ct, zero)?))?,
    ])
}

pub(super) fn convert(r: &Rule<'_>) -> Grads {
    let from: DType = r.g.dtype(r.x[0]);
    Ok(vec![r.wanted(0, || r.g.convert(r.only()?, from))?])
}
