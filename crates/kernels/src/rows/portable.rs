//! For any machine.

use half::bf16;

use super::Rows;
use crate::Format;
use crate::product::Sums;

/// Running sums of a row, which compilers turn into vectors.
pub(super) const WIDTH: usize = 8;

pub(super) fn sums(format: Format, weights: &[u8], rows: Rows, k: usize, x: &[f32], sums: &mut Sums) {
    let stride = k.next_multiple_of(WIDTH).max(1);
    for (row, sums) in rows.iter().zip(sums.iter_mut()) {
        for (x, sum) in x.chunks_exact(stride).zip(sums.iter_mut()) {
            *sum = match format {
                Format::F32 => dot(weights[row * k * 4..(row + 1) * k * 4].as_chunks().0, x, f32::from_le_bytes),
                _ => dot(weights[row * k * 2..(row + 1) * k * 2].as_chunks().0, x, |b| bf16::from_le_bytes(b).to_f32()),
            };
        }
    }
}

fn dot<const N: usize>(w: &[[u8; N]], x: &[f32], widen: impl Fn([u8; N]) -> f32) -> f32 {
    let mut lanes = [0.0; WIDTH];
    for (w, x) in w.chunks(WIDTH).zip(x.chunks(WIDTH)) {
        for (lane, (&w, x)) in lanes.iter_mut().zip(w.iter().zip(x)) {
            *lane += widen(w) * x;
        }
    }
    lanes.iter().sum()
}
