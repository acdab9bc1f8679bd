//! For any machine. Panels hold f32 here, whatever the operands are: bf16 are widened when they are copied, one to a unit.

use half::bf16;

use super::{COLUMNS, Emit, ROWS, TILE, Target};

/// See [`super::tile`]. Units are elements.
pub(super) unsafe fn tile(units: usize, l: *const f32, r: *const f32, sums: *mut f32, add: bool, emit: Option<&Emit>) {
    // SAFETY: the caller's promise; sums that begin here are written before they are looked at.
    let (l, r, sums) = unsafe {
        if !add {
            sums.write_bytes(0, TILE);
        }
        (
            std::slice::from_raw_parts(l, units * ROWS),
            std::slice::from_raw_parts(r, units * COLUMNS),
            std::slice::from_raw_parts_mut(sums, TILE),
        )
    };
    for (l, r) in l.chunks_exact(ROWS).zip(r.chunks_exact(COLUMNS)) {
        for (sums, l) in sums.chunks_exact_mut(COLUMNS).zip(l) {
            sums.iter_mut().zip(r).for_each(|(s, r)| *s += l * r);
        }
    }
    let Some(e) = emit else { return };
    for (i, row) in sums.chunks_exact(COLUMNS).take(e.rows).enumerate() {
        for (j, &v) in row.iter().take(e.columns).enumerate() {
            let at = e.at + i * e.stride + j;
            // SAFETY: the caller's promise.
            unsafe {
                match e.to {
                    Target::F32(y) => y.add(at).write(v),
                    Target::Bf16(y) => y.add(at).write(bf16::from_f32(v)),
                }
            }
        }
    }
}
