//! Attention itself.

use super::{BLOCK, Job, PANELS, lanes};
use crate::gemm::{Buffer, COLUMNS, Emit, Operand, ROWS, TILE, Target, pack, tile};
use crate::tasks::{Run, each};

/// Where results go: threads write rows of their own.
struct To {
    out: *mut u8,
    lse: *mut f32,
}

// SAFETY: as said.
unsafe impl Sync for To {}

/// Panels of keys and values of one sequence and head.
struct Panels {
    keys: Buffer,
    values: Buffer,
}

/// What a thread works in.
struct Room {
    rows: Buffer,
    scores: Buffer,
    narrow: Buffer,
    weights: Buffer,
    sums: Buffer,
    out: Buffer,
}

pub(super) fn run(job: &Job<'_>, run: Run<'_>, out: *mut u8, lse: &mut [f32]) {
    let a = &job.a;
    let heads = a.batch * a.kv_heads;
    let to = To { out, lse: lse.as_mut_ptr() };
    // Blocks of rows of a head that a thread takes together, with the head's panels made once for them.
    let blocks = job.blocks();
    let parts = (2 * super::TASKS).div_ceil(heads.max(1)).clamp(1, blocks.max(1));
    let own = || (Panels::new(job), Room::new(job));
    each(run, heads * parts, own, |(panels, room), i| {
        let (head, part) = (i / parts, i % parts);
        panels.fill(job, head);
        for block in blocks * part / parts..blocks * (part + 1) / parts {
            // SAFETY: every block of rows is taken once, and lies within the results.
            unsafe { one_block(job, head, block, panels, room, &to) };
        }
    });
}

impl Panels {
    fn new(job: &Job<'_>) -> Self {
        let a = &job.a;
        let keys = a.keys.next_multiple_of(COLUMNS);
        Panels {
            keys: Buffer::new(keys * job.units),
            values: Buffer::new(a.width.next_multiple_of(COLUMNS) * Job::units_of(job.is_bf16, a.keys)),
        }
    }

    fn fill(&mut self, job: &Job<'_>, head: usize) {
        let a = &job.a;
        let at = head * a.keys * a.width;
        // SAFETY: a head's keys and values are there, and the buffers have room for their panels.
        unsafe {
            let keys = job.operand(job.k, at, a.keys, a.width, true);
            let n = a.keys.div_ceil(COLUMNS);
            pack::panels::<COLUMNS>(job.kernel, &keys, 0, 0, n, 0..job.units, self.keys.as_mut_ptr());
            let values = job.operand(job.v, at, a.width, a.keys, false);
            let units = Job::units_of(job.is_bf16, a.keys);
            pack::panels::<COLUMNS>(job.kernel, &values, 0, 0, a.width / COLUMNS, 0..units, self.values.as_mut_ptr());
        }
    }
}

impl Room {
    fn new(job: &Job<'_>) -> Self {
        let keys = job.a.keys.next_multiple_of(COLUMNS);
        let width = job.a.width;
        Room {
            rows: Buffer::new(BLOCK * job.units),
            scores: Buffer::new(BLOCK * keys),
            narrow: Buffer::new(BLOCK * keys),
            weights: Buffer::new(BLOCK * keys),
            sums: Buffer::new(TILE),
            out: Buffer::new(BLOCK * width),
        }
    }
}

/// Products of row panels with column panels, written as f32 rows of `stride`.
///
/// # Safety
/// Panels hold `units` units; `to` has room for [`BLOCK`] rows of `stride`, and `columns` panels are within it.
pub(super) unsafe fn products(
    job: &Job<'_>,
    units: usize,
    left: *const u32,
    right: impl Fn(usize) -> *const u32,
    columns: usize,
    sums: *mut f32,
    (to, stride): (*mut f32, usize),
) {
    for j in 0..columns {
        for i in 0..PANELS {
            let emit =
                Emit { to: Target::F32(to), at: i * ROWS * stride + j * COLUMNS, stride, rows: ROWS, columns: COLUMNS };
            // SAFETY: the caller's promise.
            unsafe { tile(job.kernel, units, left.add(i * ROWS * units), right(j), sums, false, Some(&emit)) };
        }
    }
}

/// # Safety
/// The block's rows are within the results, and nobody else writes them.
unsafe fn one_block(job: &Job<'_>, head: usize, block: usize, panels: &mut Panels, room: &mut Room, to: &To) {
    let a = &job.a;
    let rows = block * BLOCK..job.rows().min((block + 1) * BLOCK);
    let first = head * job.rows() + rows.start;
    let (from, end) = job.seen(&rows);
    let seen = end - from;
    // Scores of whole panels of keys; those beyond the end are zeros that nobody looks at.
    let stride = seen.next_multiple_of(COLUMNS);
    let b = head / a.kv_heads;
    let (scores, narrow) = (room.scores.as_mut_ptr().cast::<f32>(), room.narrow.as_mut_ptr().cast::<u8>());
    let sums = room.sums.as_mut_ptr().cast::<f32>();
    let out = room.out.as_mut_ptr().cast::<f32>();
    let mut totals = [(0.0f32, 0.0f32); BLOCK];
    // SAFETY: the block's queries are there; buffers have room for a block of rows by all keys or the width; the offset of
    // the panels of keys is a whole number of panels.
    unsafe {
        let q = job.operand(job.q, first * a.width, rows.len(), a.width, true);
        let left = room.rows.as_mut_ptr();
        pack::panels::<ROWS>(job.kernel, &q, 0, 0, PANELS, 0..job.units, left);
        let keys = panels.keys.as_mut_ptr().cast_const();
        let right = |j: usize| keys.add((from / COLUMNS + j) * COLUMNS * job.units);
        products(job, job.units, left, right, stride / COLUMNS, sums, (scores, stride));
        for (i, row) in rows.clone().enumerate() {
            let sight = job.sight(b, row, (from, end));
            totals[i] = lanes::softmax(&sight, scores.add(i * stride), narrow.add(job.bytes(i * seen)), job.is_bf16);
        }
        let p = Operand { data: narrow, is_bf16: job.is_bf16, free: rows.len(), k: seen, k_inside: true };
        let units = Job::units_of(job.is_bf16, seen);
        let weights = room.weights.as_mut_ptr();
        pack::panels::<ROWS>(job.kernel, &p, 0, 0, PANELS, 0..units, weights);
        let of_head = Job::units_of(job.is_bf16, a.keys);
        let values = panels.values.as_mut_ptr().cast_const();
        let before = Job::units_of(job.is_bf16, from);
        let right = |j: usize| values.add((j * of_head + before) * COLUMNS);
        products(job, units, weights, right, a.width / COLUMNS, sums, (out, a.width));
        for (i, &(most, sum)) in totals.iter().enumerate().take(rows.len()) {
            let factor = if sum > 0.0 { 1.0 / sum } else { 0.0 };
            let place = to.out.add(job.bytes((first + i) * a.width));
            lanes::scaled(out.add(i * a.width), factor, a.width, place, job.is_bf16);
            // A row that sees nothing: no exponential of it may count.
            to.lse.add(first + i).write(if sum > 0.0 { most + sum.ln() } else { f32::MAX });
        }
    }
}
