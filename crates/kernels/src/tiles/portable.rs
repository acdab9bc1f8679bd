//! For any machine.

use std::ops::Range;

use half::bf16;

use super::{BLOCK, GROUP, Layout, Prepared, ROWS};
use crate::product::Sums;

pub(super) fn sums(layout: Layout, tile: &[u8], x: &Prepared, xs: Range<usize>, sums: &mut Sums) {
    sums.iter_mut().for_each(|row| row[..xs.len()].fill(0.0));
    let halves = BLOCK / GROUP;
    for (b, block) in tile.chunks_exact(layout.block).enumerate() {
        for half in 0..halves {
            let numbers = unpack(layout, block, half);
            for (j, row) in xs.clone().enumerate() {
                let group = row * x.groups + b * halves + half;
                let whole = &x.whole[group * GROUP..(group + 1) * GROUP];
                let mut lanes = [-layout.bias * x.sums[group]; ROWS];
                for (quad, a) in numbers.iter().zip(whole.as_chunks::<4>().0) {
                    for (lane, w) in lanes.iter_mut().zip(quad.as_chunks::<4>().0) {
                        *lane += (0..4).map(|i| i32::from(w[i]) * i32::from(a[i])).sum::<i32>();
                    }
                }
                for (r, lane) in lanes.into_iter().enumerate() {
                    let at = layout.scale(r, half * GROUP);
                    let scale = bf16::from_le_bytes([block[at], block[at + 1]]).to_f32();
                    sums[r][j] += lane as f32 * (scale * x.scales[group]);
                }
            }
        }
    }
}

/// The stored numbers of 32 columns: for each four columns, those of row 0, row 1, ...
fn unpack(layout: Layout, block: &[u8], half: usize) -> [[u8; 64]; GROUP / 4] {
    let mut numbers = [[0; 64]; GROUP / 4];
    let values = &block[layout.scales..].as_chunks::<64>().0;
    for (quad, numbers) in numbers.iter_mut().enumerate() {
        *numbers = match layout.bias {
            8 => values[half * 4 + quad % 4].map(|byte| byte >> (4 * (quad / 4)) & 15),
            _ => values[half * 8 + quad],
        };
    }
    numbers
}
