//! How a product is cut into tasks, and what they share.

use std::ops::Range;

use super::{Buffer, COLUMNS, Emit, Kernel, Operand, Product, ROWS, TILE, Target, pack, tile};
use crate::tasks::{Run, each};

/// Most panels of a task.
const MOST: (usize, usize) = (22, 16);
/// Fewest panels of a task, which copying operands is worth.
const FEWEST: (usize, usize) = (6, 4);
/// What tasks share should stay in the last cache.
pub(super) const LIMITS: Limits = Limits { units: 4 << 20, sums: 2 << 20 };
/// Panels that are made at a time.
const GROUP: usize = 8;
/// Tasks that a product is cut into if it is large enough.
const TASKS: usize = 8;
/// Units that go through the panels of a task at a time: a panel of the right operand stays in the first cache.
const DEPTH: usize = 256;

/// Blocks of rows and of columns.
fn blocks(p: &Product) -> (usize, usize) {
    let (rows, columns) = (p.m.div_ceil(ROWS).max(1), p.n.div_ceil(COLUMNS).max(1));
    let (mut r, mut c) = (rows.div_ceil(MOST.0), columns.div_ceil(MOST.1));
    while r * c * p.batch < TASKS {
        let (tall, wide) = (rows.div_ceil(r), columns.div_ceil(c));
        if tall >= 2 * FEWEST.0 && (tall * ROWS >= wide * COLUMNS || wide < 2 * FEWEST.1) {
            r *= 2;
        } else if wide >= 2 * FEWEST.1 {
            c *= 2;
        } else {
            break;
        }
    }
    (r, c)
}

/// How much is there at once for all tasks.
#[derive(Clone, Copy)]
pub(super) struct Limits {
    /// Most units of an operand whose panels are shared.
    pub(super) units: usize,
    /// Most sums that are kept while what is summed over goes by in phases.
    pub(super) sums: usize,
}

pub(super) struct Job {
    p: Product,
    kernel: Kernel,
    lhs: Operand,
    rhs: Operand,
    out: Target,
    blocks: (usize, usize),
    /// What is summed over, in units.
    units: usize,
    /// In how many steps.
    steps: usize,
    limits: Limits,
}

/// Part `i` of `n`.
fn part(whole: usize, n: usize, i: usize) -> Range<usize> {
    whole * i / n..whole * (i + 1) / n
}

/// Which operands' panels are made for all tasks together, and how the product is cut for them to have their limits.
#[derive(Clone, Copy)]
struct Sharing {
    left: bool,
    right: bool,
    phases: Phases,
}

#[derive(Clone, Copy)]
enum Phases {
    One,
    /// Some steps after the others: sums of the whole result are kept meanwhile.
    Steps,
    /// Some columns after the others.
    Columns,
}

/// What is made together: some steps of some blocks of columns.
struct Phase {
    steps: Range<usize>,
    columns: Range<usize>,
}

/// An operand's panels for a phase, made once for all tasks that read them.
struct Packed {
    units: *mut u32,
    /// The panels, in each product of the batch.
    panels: Range<usize>,
    /// The units.
    depth: Range<usize>,
}

// SAFETY: threads write parts of their own, and read only when all are written.
unsafe impl Sync for Packed {}

impl Packed {
    /// The panels of a product from one on, for the units of a step.
    ///
    /// # Safety
    /// They are there.
    unsafe fn at<const W: usize>(&self, b: usize, step: &Range<usize>, panel: usize) -> *mut u32 {
        let before = (b * self.depth.len() + step.start - self.depth.start) * self.panels.len();
        // SAFETY: the caller's promise.
        unsafe { self.units.add((before + (panel - self.panels.start) * step.len()) * W) }
    }
}

/// The sums of the whole result, kept from phase to phase.
#[derive(Clone, Copy)]
struct Sums(*mut u32);

// SAFETY: every tile belongs to one task of a phase.
unsafe impl Sync for Sums {}

impl Job {
    pub(super) fn new(
        p: Product,
        kernel: Kernel,
        (lhs, rhs): (Operand, Operand),
        units: usize,
        out: Target,
        limits: Limits,
    ) -> Self {
        Job { p, kernel, lhs, rhs, out, blocks: blocks(&p), units, steps: units.div_ceil(DEPTH).max(1), limits }
    }

    pub(super) fn run(&self, run: Run<'_>) {
        let batch = self.p.batch;
        let (rows, columns) = self.panels();
        let sharing = self.sharing();
        let phases = self.phases(sharing);
        let most = |size: &dyn Fn(&Phase) -> usize| phases.iter().map(size).max().unwrap_or(0);
        let depth = |p: &Phase| self.depth(&p.steps).len();
        let mut left = Buffer::new(if sharing.left { batch * rows * ROWS * most(&depth) } else { 0 });
        let wide = |p: &Phase| self.columns(&p.columns).len() * depth(p);
        let mut right = Buffer::new(if sharing.right { batch * COLUMNS * most(&wide) } else { 0 });
        let in_steps = phases.iter().any(|p| p.steps.len() < self.steps);
        let mut sums = in_steps.then(|| Buffer::new(batch * rows * columns * TILE));
        let sums = sums.as_mut().map(|s| Sums(s.as_mut_ptr()));
        let mut steps = 0..0;
        for phase in &phases {
            let depth = self.depth(&phase.steps);
            let of = |there: bool, units: *mut u32, panels: Range<usize>| {
                there.then(|| Packed { units, panels, depth: depth.clone() })
            };
            let l = of(sharing.left, left.as_mut_ptr(), 0..rows);
            let r = of(sharing.right, right.as_mut_ptr(), self.columns(&phase.columns));
            // The left operand's are those of the phase before where only columns are others.
            let fresh = l.as_ref().filter(|_| phase.steps != steps);
            steps = phase.steps.clone();
            self.pack_all(run, &phase.steps, fresh, r.as_ref());
            self.tasks(run, phase, l.as_ref(), r.as_ref(), sums);
        }
    }

    /// Panels of the operands.
    fn panels(&self) -> (usize, usize) {
        (self.p.m.div_ceil(ROWS), self.p.n.div_ceil(COLUMNS))
    }

    /// Which operands' panels are made for all tasks together: those that several read.
    fn sharing(&self) -> Sharing {
        let (rows, columns) = self.panels();
        let units = self.p.batch * self.units;
        let mut s = Sharing { left: self.blocks.1 > 1, right: self.blocks.0 > 1, phases: Phases::One };
        let fits = |there: bool, lanes: usize| !there || lanes * units <= self.limits.units;
        let (left, right) = (fits(s.left, rows * ROWS), fits(s.right, columns * COLUMNS));
        match (left, right) {
            (true, true) => {}
            _ if self.p.batch * rows * columns * TILE <= self.limits.sums => s.phases = Phases::Steps,
            (true, false) => s.phases = Phases::Columns,
            _ => (s.left, s.right) = (left && s.left, right && s.right),
        }
        s
    }

    /// Cuts the product so that what is shared in a phase has its limits.
    fn phases(&self, sharing: Sharing) -> Vec<Phase> {
        let (rows, columns) = self.panels();
        let lanes = match sharing {
            Sharing { left: true, right: false, .. } => rows * ROWS,
            Sharing { left: false, right: true, .. } => columns * COLUMNS,
            _ => (rows * ROWS).max(columns * COLUMNS),
        };
        let n = (self.p.batch * lanes * self.units).div_ceil(self.limits.units);
        let cut = |whole: usize, n: usize| (0..n).map(move |i| part(whole, n, i));
        match sharing.phases {
            Phases::One => vec![Phase { steps: 0..self.steps, columns: 0..self.blocks.1 }],
            Phases::Steps => {
                cut(self.steps, n.min(self.steps)).map(|steps| Phase { steps, columns: 0..self.blocks.1 }).collect()
            }
            Phases::Columns => cut(self.blocks.1, n.min(self.blocks.1))
                .map(|columns| Phase { steps: 0..self.steps, columns })
                .collect(),
        }
    }

    /// Units of a step.
    fn step(&self, step: usize) -> Range<usize> {
        part(self.units, self.steps, step)
    }

    /// Units of several steps.
    fn depth(&self, steps: &Range<usize>) -> Range<usize> {
        self.step(steps.start).start..self.step(steps.end - 1).end
    }

    /// Panels of blocks of columns.
    fn columns(&self, blocks: &Range<usize>) -> Range<usize> {
        let of = |block| part(self.panels().1, self.blocks.1, block);
        of(blocks.start).start..of(blocks.end - 1).end
    }

    /// Makes the panels that are shared, as many at a time as are worth a look at the counter.
    fn pack_all(&self, run: Run<'_>, steps: &Range<usize>, left: Option<&Packed>, right: Option<&Packed>) {
        let groups = |p: Option<&Packed>| p.map_or(0, |p| p.panels.len().div_ceil(GROUP));
        let [of_left, of_right] = [left, right].map(|p| groups(p) * steps.len() * self.p.batch);
        if of_left + of_right == 0 {
            return;
        }
        each(
            run,
            of_left + of_right,
            || (),
            |(), i| match (left, right) {
                // SAFETY: every group is made once.
                (Some(p), _) if i < of_left => unsafe { self.pack::<ROWS>(p, &self.lhs, steps, i) },
                // SAFETY: as above.
                (_, Some(p)) => unsafe { self.pack::<COLUMNS>(p, &self.rhs, steps, i - of_left) },
                _ => {}
            },
        );
    }

    /// Makes group `i` of an operand's panels, of some steps and all products.
    ///
    /// # Safety
    /// Nobody else makes or reads it meanwhile.
    unsafe fn pack<const W: usize>(&self, to: &Packed, x: &Operand, steps: &Range<usize>, i: usize) {
        let groups = to.panels.len().div_ceil(GROUP);
        let (group, i) = (i % groups, i / groups);
        let (step, b) = (self.step(steps.start + i % steps.len()), i / steps.len());
        let first = to.panels.start + group * GROUP;
        let last = to.panels.end.min(first + GROUP);
        // SAFETY: the group is within the panels.
        unsafe {
            let place = to.at::<W>(b, &step, first);
            pack::panels::<W>(self.kernel, x, b, first * W, last - first, step, place);
        }
    }

    fn tasks(&self, run: Run<'_>, phase: &Phase, left: Option<&Packed>, right: Option<&Packed>, sums: Option<Sums>) {
        let (rows, columns) = self.panels();
        let (tall, wide) = (rows.div_ceil(self.blocks.0), columns.div_ceil(self.blocks.1));
        let room = || Room {
            lhs: Buffer::new(if left.is_some() { 0 } else { tall * ROWS * DEPTH }),
            rhs: Buffer::new(if right.is_some() { 0 } else { wide * COLUMNS * DEPTH }),
            sums: Buffer::new(if sums.is_some() { 0 } else { tall * wide * TILE }),
        };
        let per_product = self.blocks.0 * phase.columns.len();
        each(run, per_product * self.p.batch, room, |room, task| {
            let (b, block) = (task / per_product, task % per_product);
            // Neighbours share their columns of the right operand.
            let (row, column) = (block % self.blocks.0, phase.columns.start + block / self.blocks.0);
            let place = Place {
                b,
                rows: part(rows, self.blocks.0, row),
                columns: part(columns, self.blocks.1, column),
                steps: phase.steps.clone(),
            };
            self.task(&place, left, right, room, sums);
        });
    }

    fn task(&self, at: &Place, left: Option<&Packed>, right: Option<&Packed>, room: &mut Room, sums: Option<Sums>) {
        let Product { m, n, .. } = self.p;
        let b = at.b;
        let (tall, wide) = (at.rows.len(), at.columns.len());
        // Where the tile of a panel by a panel lies, by columns: of all there are, or of the task's.
        let (panels, columns) = self.panels();
        let (sums, first, pitch) = match sums {
            Some(s) => (s.0, (b * columns + at.columns.start) * panels + at.rows.start, panels),
            None => (room.sums.as_mut_ptr(), 0, tall),
        };
        for step in at.steps.clone() {
            let units = self.step(step);
            // SAFETY: panels that are shared are there; the buffers have room for as many panels as a task has, of at most
            // `DEPTH` units.
            let (l, r) = unsafe {
                let l = match left {
                    Some(p) => p.at::<ROWS>(b, &units, at.rows.start),
                    None => {
                        let l = room.lhs.as_mut_ptr();
                        let first = at.rows.start * ROWS;
                        pack::panels::<ROWS>(self.kernel, &self.lhs, b, first, tall, units.clone(), l);
                        l
                    }
                };
                let r = match right {
                    Some(p) => p.at::<COLUMNS>(b, &units, at.columns.start),
                    None => {
                        let r = room.rhs.as_mut_ptr();
                        let first = at.columns.start * COLUMNS;
                        pack::panels::<COLUMNS>(self.kernel, &self.rhs, b, first, wide, units.clone(), r);
                        r
                    }
                };
                (l.cast_const(), r.cast_const())
            };
            for j in 0..wide {
                for i in 0..tall {
                    // SAFETY: offsets within the panels and the sums, as above.
                    let (l, r, sums) = unsafe {
                        (
                            l.add(i * ROWS * units.len()),
                            r.add(j * COLUMNS * units.len()),
                            sums.add((first + j * pitch + i) * TILE).cast::<f32>(),
                        )
                    };
                    let (row, column) = ((at.rows.start + i) * ROWS, (at.columns.start + j) * COLUMNS);
                    let emit = (step + 1 == self.steps).then(|| Emit {
                        to: self.out,
                        at: (b * m + row) * n + column,
                        stride: n,
                        rows: (m - row).min(ROWS),
                        columns: (n - column).min(COLUMNS),
                    });
                    // SAFETY: panels and sums are as long as the kernels read and write, the kernel is one this machine
                    // has, and what is emitted lies within the result, in a block that no other task writes.
                    unsafe { tile(self.kernel, units.len(), l, r, sums, step > 0, emit.as_ref()) };
                }
            }
        }
    }
}

/// A task: panels of rows by panels of columns of a product of the batch, over some steps.
struct Place {
    b: usize,
    rows: Range<usize>,
    columns: Range<usize>,
    steps: Range<usize>,
}

/// What a thread works in: panels that it does not share, and sums.
struct Room {
    lhs: Buffer,
    rhs: Buffer,
    sums: Buffer,
}
