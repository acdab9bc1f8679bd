//! The largest of many numbers, without sorting all of them.

use std::cmp::Ordering;

/// Fewest candidates that are worth a selection of their own.
const FEW: usize = 64;

/// Larger numbers first; of equal ones, lower ids first.
fn order<T: PartialOrd>(a: &(u32, T), b: &(u32, T)) -> Ordering {
    b.1.partial_cmp(&a.1).unwrap_or(Ordering::Equal).then(a.0.cmp(&b.0))
}

/// The `n`th largest number, counted from 1; the smallest of all if there are fewer. None may be NaN.
pub(super) fn nth_largest(values: &[f32], n: usize) -> f32 {
    largest(values, n).last().map_or(f32::NEG_INFINITY, |(_, v)| *v)
}

/// The `n` largest numbers with their places, largest first. None may be NaN.
///
/// One pass: candidates above a bar are collected, and the bar rises whenever twice as many as needed have come together.
pub(super) fn largest(values: &[f32], n: usize) -> Vec<(u32, f32)> {
    if n == 0 || values.is_empty() {
        return Vec::new();
    }
    let n = n.min(values.len());
    let room = n.saturating_mul(2).max(FEW);
    let mut best: Vec<(u32, f32)> = Vec::with_capacity(room.min(values.len()));
    let mut bar = None;
    for (id, &value) in (0u32..).zip(values) {
        // An equal number that comes later has a higher id and stays out.
        if bar.is_some_and(|bar| value <= bar) {
            continue;
        }
        best.push((id, value));
        if best.len() == room {
            best.select_nth_unstable_by(n - 1, order);
            best.truncate(n);
            bar = Some(best[n - 1].1);
        }
    }
    best.sort_unstable_by(order);
    best.truncate(n);
    best
}

/// Leaves the fewest tokens, most likely first, that have `share` of all weight together; at least one.
pub(super) fn nucleus(kept: &mut Vec<(u32, f64)>, share: f64) {
    let need = share * kept.iter().map(|(_, w)| w).sum::<f64>();
    let (mut sorted, mut mass) = (0, 0.0);
    // Usually a handful is enough; flat distributions come to a sort of everything.
    let mut block = FEW;
    while sorted < kept.len() {
        let rest = &mut kept[sorted..];
        let front = block.min(rest.len());
        if front < rest.len() {
            rest.select_nth_unstable_by(front - 1, order);
        }
        rest[..front].sort_unstable_by(order);
        for (i, (_, w)) in rest[..front].iter().enumerate() {
            // A token stays as long as those before it do not have the share yet.
            if mass >= need && sorted + i > 0 {
                kept.truncate(sorted + i);
                return;
            }
            mass += w;
        }
        sorted += front;
        block *= 4;
    }
}
