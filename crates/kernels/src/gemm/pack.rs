//! Operands into panels.

use std::ops::Range;

use half::bf16;

use super::{Kernel, Operand};

/// Copies `panels` panels of `W` lanes, of which the first begins at lane `first`: `to` gets them one after the other, each with
/// the lanes of a unit side by side. Lanes beyond the operand are zero.
///
/// # Safety
/// The operand is readable, and `to` has room for `W * units.len() * panels` units.
pub(crate) unsafe fn panels<const W: usize>(
    kernel: Kernel,
    x: &Operand,
    batch: usize,
    first: usize,
    panels: usize,
    units: Range<usize>,
    to: *mut u32,
) {
    let n = units.len();
    // Panels of which all lanes are there, with those beyond them that are read together.
    let mut done = 0;
    #[cfg(target_arch = "x86_64")]
    if kernel != Kernel::Portable && !x.k_inside && (!x.is_bf16 || 2 * units.end <= x.k) {
        let beyond = W.max(16) - W;
        done = (x.free.saturating_sub(first + beyond) / W).min(panels);
        let start = batch * x.free * x.k;
        // SAFETY: the instructions are there, as the kernel says; whole rows of lanes within the operand are read.
        unsafe {
            match x.is_bf16 {
                true => {
                    let from = x.data.cast::<u16>().add(start + 2 * units.start * x.free + first);
                    super::avx512::pairs::<W>(from, x.free, n, done, to);
                }
                false => {
                    let from = x.data.cast::<u32>().add(start + units.start * x.free + first);
                    super::avx512::rows::<W>(from, x.free, n, done, to);
                }
            }
        }
    }
    for i in done..panels {
        // SAFETY: the caller's promise.
        unsafe { panel::<W>(kernel, x, batch, first + i * W, units.clone(), to.add(i * W * n)) };
    }
}

/// One panel, see [`panels`].
///
/// # Safety
/// As there.
unsafe fn panel<const W: usize>(
    kernel: Kernel,
    x: &Operand,
    batch: usize,
    first: usize,
    units: Range<usize>,
    to: *mut u32,
) {
    let lanes = x.free.saturating_sub(first).min(W);
    let start = batch * x.free * x.k;
    #[cfg(target_arch = "x86_64")]
    {
        let per_unit = 1 + usize::from(x.is_bf16);
        if kernel != Kernel::Portable && x.k_inside && x.k.is_multiple_of(per_unit) {
            let stride = x.k / per_unit;
            // SAFETY: the instructions are there, as the kernel says; whole units of lanes that are there are read.
            unsafe {
                let from = x.data.cast::<u32>().wrapping_add(start / per_unit + first * stride + units.start);
                return super::avx512::lanes::<W>(from, stride, lanes, units.len(), to);
            }
        }
    }
    // One element of the operand, as bits.
    let element = |lane: usize, k: usize| -> u32 {
        if lane >= lanes || k >= x.k {
            return 0;
        }
        let at = start + if x.k_inside { (first + lane) * x.k + k } else { k * x.free + first + lane };
        // SAFETY: a lane and an element that are there.
        unsafe {
            match x.is_bf16 {
                true => u32::from(x.data.cast::<bf16>().add(at).read().to_bits()),
                false => x.data.cast::<u32>().add(at).read(),
            }
        }
    };
    for (i, u) in units.enumerate() {
        for lane in 0..W {
            let unit = match (kernel, x.is_bf16) {
                (_, false) => element(lane, u),
                (Kernel::Portable, true) => element(lane, u) << 16,
                #[cfg(target_arch = "x86_64")]
                (_, true) => element(lane, 2 * u) | element(lane, 2 * u + 1) << 16,
            };
            // SAFETY: within the panel.
            unsafe { to.add(i * W + lane).write(unit) };
        }
    }
}
