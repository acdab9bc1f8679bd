//! Gradients of attention.

use super::forward::products;
use super::{BLOCK, Job, PANELS, TASKS, lanes};
use crate::gemm::{Buffer, COLUMNS, Emit, Operand, ROWS, TILE, Target, pack, tile};
use crate::tasks::{Run, each};

/// What attention gave.
pub(super) struct Of<'a> {
    pub(super) d_out: *const u8,
    pub(super) lse: &'a [f32],
}

// SAFETY: only read.
unsafe impl Sync for Of<'_> {}

/// Where gradients go: threads write parts of their own.
struct To([*mut u8; 3]);

// SAFETY: as said.
unsafe impl Sync for To {}

/// Sums of gradients by keys and values, one after the other, of every part of the rows.
struct Sums(*mut f32);

// SAFETY: threads write parts of their own, and read when all are written.
unsafe impl Sync for Sums {}

/// What a thread works in.
struct Room {
    /// Keys and values with what is summed inside, and keys the other way.
    keys: Buffer,
    values: Buffer,
    across: Buffer,
    rows: Buffer,
    d_rows: Buffer,
    scores: Buffer,
    dp: Buffer,
    p: Buffer,
    ds: Buffer,
    panels: Buffer,
    columns: Buffer,
    tile: Buffer,
}

pub(super) fn run(job: &Job<'_>, run: Run<'_>, of: &Of<'_>, to: [*mut u8; 3]) {
    let a = &job.a;
    let heads = a.batch * a.kv_heads;
    let blocks = job.blocks();
    // By sizes alone, so that sums do not depend on threads.
    let parts = TASKS.div_ceil(heads.max(1)).clamp(1, blocks.max(1));
    let tiles = a.keys.div_ceil(ROWS) * (a.width / COLUMNS);
    let mut sums = Buffer::new(heads * parts * 2 * tiles * TILE);
    let (to, sums) = (To(to), Sums(sums.as_mut_ptr().cast()));
    // As wholes: their fields are bare pointers, which threads do not share.
    let (to, sums) = (&to, &sums);
    each(
        run,
        heads * parts,
        || Room::new(job),
        |room, i| {
            let (head, part) = (i / parts, i % parts);
            room.fill(job, head);
            // SAFETY: the part's own sums; every block of rows is taken once.
            unsafe {
                let mine = sums.0.add(i * 2 * tiles * TILE);
                mine.write_bytes(0, 2 * tiles * TILE);
                for block in blocks * part / parts..blocks * (part + 1) / parts {
                    one_block(job, head, block, of, room, to, [mine, mine.add(tiles * TILE)]);
                }
            }
        },
    );
    each(
        run,
        2 * heads,
        || (),
        |(), i| {
            let (head, which) = (i / 2, i % 2);
            // SAFETY: all sums are written; every head's gradient is written once.
            unsafe {
                let first = sums.0.add((head * parts * 2 + which) * tiles * TILE);
                for part in 1..parts {
                    let more = first.add(part * 2 * tiles * TILE);
                    for at in 0..tiles * TILE {
                        *first.add(at) += *more.add(at);
                    }
                }
                write(job, head, first, to.0[1 + which]);
            }
        },
    );
}

/// Writes the tiles of a head's keys.
///
/// # Safety
/// The tiles are there, and the gradient has room.
unsafe fn write(job: &Job<'_>, head: usize, tiles: *mut f32, to: *mut u8) {
    let a = &job.a;
    let target = if job.is_bf16 { Target::Bf16(to.cast()) } else { Target::F32(to.cast()) };
    let tall = a.keys.div_ceil(ROWS);
    for j in 0..a.width / COLUMNS {
        for i in 0..tall {
            let emit = Emit {
                to: target,
                at: (head * a.keys + i * ROWS) * a.width + j * COLUMNS,
                stride: a.width,
                rows: (a.keys - i * ROWS).min(ROWS),
                columns: COLUMNS,
            };
            // SAFETY: no units: the sums as they are.
            unsafe {
                let sums = tiles.add((j * tall + i) * TILE);
                tile(job.kernel, 0, std::ptr::null(), std::ptr::null(), sums, true, Some(&emit));
            }
        }
    }
}

impl Room {
    fn new(job: &Job<'_>) -> Self {
        let a = &job.a;
        let keys = a.keys.next_multiple_of(BLOCK);
        Room {
            keys: Buffer::new(keys * job.units),
            values: Buffer::new(keys * job.units),
            across: Buffer::new(a.width * Job::units_of(job.is_bf16, a.keys)),
            rows: Buffer::new(BLOCK * job.units),
            d_rows: Buffer::new(BLOCK * job.units),
            scores: Buffer::new(BLOCK * keys),
            dp: Buffer::new(BLOCK * keys),
            p: Buffer::new(BLOCK * keys),
            ds: Buffer::new(BLOCK * keys),
            panels: Buffer::new(BLOCK * keys),
            columns: Buffer::new(BLOCK * a.width),
            tile: Buffer::new(TILE),
        }
    }

    fn fill(&mut self, job: &Job<'_>, head: usize) {
        let a = &job.a;
        let at = head * a.keys * a.width;
        let n = a.keys.div_ceil(COLUMNS);
        // SAFETY: a head's keys and values are there, and the buffers have room for their panels.
        unsafe {
            for (data, to) in [(job.k, self.keys.as_mut_ptr()), (job.v, self.values.as_mut_ptr())] {
                let x = job.operand(data, at, a.keys, a.width, true);
                pack::panels::<COLUMNS>(job.kernel, &x, 0, 0, n, 0..job.units, to);
            }
            let keys = job.operand(job.k, at, a.width, a.keys, false);
            let units = Job::units_of(job.is_bf16, a.keys);
            pack::panels::<COLUMNS>(job.kernel, &keys, 0, 0, a.width / COLUMNS, 0..units, self.across.as_mut_ptr());
        }
    }
}

/// # Safety
/// The block's rows are within the results, nobody else writes them or the sums.
unsafe fn one_block(
    job: &Job<'_>,
    head: usize,
    block: usize,
    of: &Of<'_>,
    room: &mut Room,
    to: &To,
    [by_keys, by_values]: [*mut f32; 2],
) {
    let a = &job.a;
    let rows = block * BLOCK..job.rows().min((block + 1) * BLOCK);
    let n = rows.len();
    let first = head * job.rows() + rows.start;
    let (from, end) = job.seen(&rows);
    let seen = end - from;
    let stride = seen.next_multiple_of(COLUMNS);
    let b = head / a.kv_heads;
    let tile_sums = room.tile.as_mut_ptr().cast::<f32>();
    let (scores, dp) = (room.scores.as_mut_ptr().cast::<f32>(), room.dp.as_mut_ptr().cast::<f32>());
    let (p, ds) = (room.p.as_mut_ptr().cast::<u8>(), room.ds.as_mut_ptr().cast::<u8>());
    // SAFETY: as in the forward pass.
    unsafe {
        let sides = [
            (job.q, room.rows.as_mut_ptr(), room.keys.as_mut_ptr(), scores),
            (of.d_out, room.d_rows.as_mut_ptr(), room.values.as_mut_ptr(), dp),
        ];
        for (data, left, right, result) in sides {
            let x = job.operand(data, first * a.width, n, a.width, true);
            pack::panels::<ROWS>(job.kernel, &x, 0, 0, PANELS, 0..job.units, left);
            let right = right.cast_const();
            let of = |j: usize| right.add((from / COLUMNS + j) * COLUMNS * job.units);
            products(job, job.units, left, of, stride / COLUMNS, tile_sums, (result, stride));
        }
        for (i, row) in rows.clone().enumerate() {
            let sight = job.sight(b, row, (from, end));
            let place = job.bytes(i * seen);
            let rows = (scores.add(i * stride), dp.add(i * stride).cast_const());
            lanes::gradient(&sight, rows, of.lse[first + i], [p.add(place), ds.add(place)], job.is_bf16);
        }
        // By queries: ds times keys.
        let panels = room.panels.as_mut_ptr();
        let x = Operand { data: ds, is_bf16: job.is_bf16, free: n, k: seen, k_inside: true };
        let units = Job::units_of(job.is_bf16, seen);
        pack::panels::<ROWS>(job.kernel, &x, 0, 0, PANELS, 0..units, panels);
        let (of_head, before) = (Job::units_of(job.is_bf16, a.keys), Job::units_of(job.is_bf16, from));
        let across = room.across.as_mut_ptr().cast_const();
        let target = if job.is_bf16 { Target::Bf16(to.0[0].cast()) } else { Target::F32(to.0[0].cast()) };
        for j in 0..a.width / COLUMNS {
            for i in 0..n.div_ceil(ROWS) {
                let emit = Emit {
                    to: target,
                    at: (first + i * ROWS) * a.width + j * COLUMNS,
                    stride: a.width,
                    rows: (n - i * ROWS).min(ROWS),
                    columns: COLUMNS,
                };
                let right = across.add((j * of_head + before) * COLUMNS);
                tile(job.kernel, units, panels.add(i * ROWS * units), right, tile_sums, false, Some(&emit));
            }
        }
        // By keys and values: the other way, summed over rows.
        let units = Job::units_of(job.is_bf16, n);
        let (tall, all) = (seen.div_ceil(ROWS), a.keys.div_ceil(ROWS));
        for (weights, data, sums) in [(ds, job.q, by_keys), (p, of.d_out, by_values)] {
            let x = Operand { data: weights, is_bf16: job.is_bf16, free: seen, k: n, k_inside: false };
            pack::panels::<ROWS>(job.kernel, &x, 0, 0, tall, 0..units, panels);
            let y = job.operand(data, first * a.width, a.width, n, false);
            let columns = room.columns.as_mut_ptr();
            pack::panels::<COLUMNS>(job.kernel, &y, 0, 0, a.width / COLUMNS, 0..units, columns);
            for j in 0..a.width / COLUMNS {
                for i in 0..tall {
                    let (left, right) = (panels.add(i * ROWS * units), columns.add(j * COLUMNS * units));
                    let place = sums.add((j * all + from / ROWS + i) * TILE);
                    tile(job.kernel, units, left, right, place, true, None);
                }
            }
        }
    }
}
