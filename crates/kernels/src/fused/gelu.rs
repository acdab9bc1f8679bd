//! The gated GELU and its gradient.

#[cfg(target_arch = "x86_64")]
use super::{
    SHARE,
    lanes::{self, Element},
    share,
};
use super::{check, check_machine};
use crate::KernelError;
use crate::product::{Out, Rows};
use crate::tasks::Run;

/// GELU (with tanh) of `gate`, rounded to its kind, times `up`.
///
/// # Errors
/// When sizes or kinds do not agree.
pub fn gated_gelu(run: Run<'_>, gate: Rows<'_>, up: Rows<'_>, y: &mut Out<'_>) -> Result<(), KernelError> {
    check_machine()?;
    for (what, got) in [("up", up.len()), ("y", y.len())] {
        check(what, got, [1, gate.len()])?;
    }
    #[cfg(target_arch = "x86_64")]
    match (gate, up, y) {
        (Rows::F32(gate), Rows::F32(up), Out::F32(y)) => forward(run, gate, up, y),
        (Rows::Bf16(gate), Rows::Bf16(up), Out::Bf16(y)) => forward(run, gate, up, y),
        _ => return Err(KernelError::Mixed),
    }
    Ok(())
}

/// Gradients by `gate` and `up`; `ct` is the one by the result.
///
/// # Errors
/// When sizes or kinds do not agree.
pub fn gated_gelu_gradient(
    run: Run<'_>,
    gate: Rows<'_>,
    up: Rows<'_>,
    ct: Rows<'_>,
    [d_gate, d_up]: [&mut Out<'_>; 2],
) -> Result<(), KernelError> {
    let sizes = [("up", up.len()), ("the gradient", ct.len()), ("d gate", d_gate.len()), ("d up", d_up.len())];
    check_machine()?;
    for (what, got) in sizes {
        check(what, got, [1, gate.len()])?;
    }
    #[cfg(target_arch = "x86_64")]
    match (gate, up, ct, d_gate, d_up) {
        (Rows::F32(g), Rows::F32(u), Rows::F32(ct), Out::F32(dg), Out::F32(du)) => backward(run, [g, u, ct], dg, du),
        (Rows::Bf16(g), Rows::Bf16(u), Rows::Bf16(ct), Out::Bf16(dg), Out::Bf16(du)) => {
            backward(run, [g, u, ct], dg, du);
        }
        _ => return Err(KernelError::Mixed),
    }
    Ok(())
}

#[cfg(target_arch = "x86_64")]
fn forward<T: Element>(run: Run<'_>, gate: &[T], up: &[T], y: &mut [T]) {
    let items = gate.chunks(SHARE).zip(up.chunks(SHARE)).zip(y.chunks_mut(SHARE));
    share(run, items, |((gate, up), y)| {
        // SAFETY: the instructions are there, as has been checked.
        unsafe { lanes::gelu(gate, up, y) }
    });
}

#[cfg(target_arch = "x86_64")]
fn backward<T: Element>(run: Run<'_>, [gate, up, ct]: [&[T]; 3], d_gate: &mut [T], d_up: &mut [T]) {
    let operands = gate.chunks(SHARE).zip(up.chunks(SHARE)).zip(ct.chunks(SHARE));
    let items = operands.zip(d_gate.chunks_mut(SHARE)).zip(d_up.chunks_mut(SHARE));
    share(run, items, |((((gate, up), ct), d_gate), d_up)| {
        // SAFETY: the instructions are there, as has been checked.
        unsafe { lanes::gelu_gradient([gate, up, ct], d_gate, d_up) }
    });
}
