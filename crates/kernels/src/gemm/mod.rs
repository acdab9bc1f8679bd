//! Products of two matrices of activations: many rows by many columns, as training has them.
//!
//! A *unit* is what one lane of a register takes at a time: one f32, or two neighbouring bf16. Operands are copied into
//! *panels*, [`ROWS`] rows of the left one or [`COLUMNS`] columns of the right one, in which the lanes of one unit lie side by
//! side; the innermost loop then reads memory in order, however operands are stored and whatever their widths are. (Rows that
//! lie a power of two apart fall into the same few places of a cache; read in place they push each other out.)
//!
//! A *task* is a block of the result. Tasks differ in nothing but their place, and the order of sums within one is fixed: a
//! result depends on neither threads nor the split.

#[cfg(target_arch = "x86_64")]
mod avx512;
pub(crate) mod pack;
mod portable;

use std::mem::MaybeUninit;
use std::ops::Range;

use half::bf16;

#[cfg(target_arch = "x86_64")]
pub(crate) use avx512::rounded;

use crate::KernelError;
use crate::product::{Out, Rows};
use crate::tasks::{Run, each};

/// Rows of the left operand in a panel.
pub(crate) const ROWS: usize = 12;
/// Columns of the right operand in a panel.
pub(crate) const COLUMNS: usize = 32;
/// Elements of a tile of the result: a panel by a panel.
pub(crate) const TILE: usize = ROWS * COLUMNS;
/// Units that go through the panels of a task at a time: a panel of the right operand stays in the first cache.
const DEPTH: usize = 256;
/// Most panels of a task.
const MOST: (usize, usize) = (22, 16);
/// Fewest panels of a task, which copying operands is worth.
const FEWEST: (usize, usize) = (6, 4);
/// Most units of an operand whose panels are made at once for all tasks.
const SHARED: usize = 4 << 20;
/// Most sums that are kept while what is summed over goes by in phases: as the panels, they should stay in the last cache.
const SUMS: usize = 2 << 20;
/// Panels that are made at a time.
const GROUP: usize = 8;
/// Tasks that a product is cut into if it is large enough.
const TASKS: usize = 8;

/// What instructions a product is computed with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kernel {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx512F32,
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16,
}

/// Whether this machine multiplies matrices of bf16 as they are.
#[must_use]
pub fn has_bf16_products() -> bool {
    #[cfg(target_arch = "x86_64")]
    return is_x86_feature_detected!("avx512bf16") && has_wide_products();
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Whether this machine multiplies matrices of f32 with 512-bit registers.
#[must_use]
pub fn has_wide_products() -> bool {
    #[cfg(target_arch = "x86_64")]
    return is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl");
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Sizes and layouts of a product `[batch, m, n]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Product {
    /// Products beside each other.
    pub batch: usize,
    /// Rows of the result.
    pub m: usize,
    /// Columns of the result.
    pub n: usize,
    /// What is summed over.
    pub k: usize,
    /// The left operand lies as `[batch, k, m]` instead of `[batch, m, k]`.
    pub lhs_transposed: bool,
    /// The right operand lies as `[batch, n, k]` instead of `[batch, k, n]`.
    pub rhs_transposed: bool,
}

/// An operand: elements of one kind, and how they lie.
#[derive(Clone, Copy)]
pub(crate) struct Operand {
    pub(crate) data: *const u8,
    pub(crate) is_bf16: bool,
    /// Rows or columns of the result.
    pub(crate) free: usize,
    /// What is summed over.
    pub(crate) k: usize,
    /// Whether elements that are summed lie side by side.
    pub(crate) k_inside: bool,
}

// SAFETY: operands are only read.
unsafe impl Send for Operand {}
// SAFETY: as above.
unsafe impl Sync for Operand {}

/// Where results go.
#[derive(Clone, Copy)]
pub(crate) enum Target {
    F32(*mut f32),
    Bf16(*mut bf16),
}

// SAFETY: tasks write blocks of their own.
unsafe impl Sync for Target {}

/// A cache line, for buffers that start at one.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u32; 16]);

/// Room for `units` units, which start at a cache line. It holds nothing until it is written.
pub(crate) struct Buffer(Vec<MaybeUninit<Line>>);

impl Buffer {
    pub(crate) fn new(units: usize) -> Self {
        Buffer(Vec::with_capacity(units.div_ceil(16).max(1)))
    }

    pub(crate) fn as_mut_ptr(&mut self) -> *mut u32 {
        self.0.as_mut_ptr().cast()
    }
}

/// Computes `out = lhs · rhs` for every product of the batch, summed in f32. Both operands are of one kind.
///
/// # Errors
/// When sizes do not agree.
pub fn matmul(run: Run<'_>, p: &Product, lhs: Rows<'_>, rhs: Rows<'_>, out: &mut Out<'_>) -> Result<(), KernelError> {
    let size = |a: usize, b: usize| p.batch.checked_mul(a).and_then(|x| x.checked_mul(b));
    let wrong =
        |what: &'static str, got: usize, [a, b]: [usize; 2]| KernelError::Operand { what, got, batch: p.batch, a, b };
    if size(p.m, p.k) != Some(lhs.len()) {
        return Err(wrong("the left operand", lhs.len(), [p.m, p.k]));
    }
    if size(p.k, p.n) != Some(rhs.len()) {
        return Err(wrong("the right operand", rhs.len(), [p.k, p.n]));
    }
    if size(p.m, p.n) != Some(out.len()) {
        return Err(wrong("the result", out.len(), [p.m, p.n]));
    }
    let (is_bf16, left, right) = match (lhs, rhs) {
        (Rows::Bf16(l), Rows::Bf16(r)) => (true, l.as_ptr().cast(), r.as_ptr().cast()),
        (Rows::F32(l), Rows::F32(r)) => (false, l.as_ptr().cast(), r.as_ptr().cast()),
        _ => return Err(KernelError::Mixed),
    };
    let kernel = kernel(is_bf16);
    // The portable kernel takes bf16 widened, one to a unit.
    let units = if is_bf16 && kernel != Kernel::Portable { p.k.div_ceil(2) } else { p.k };
    let job = Job {
        p: *p,
        kernel,
        units,
        steps: units.div_ceil(DEPTH).max(1),
        lhs: Operand { data: left, is_bf16, free: p.m, k: p.k, k_inside: !p.lhs_transposed },
        rhs: Operand { data: right, is_bf16, free: p.n, k: p.k, k_inside: p.rhs_transposed },
        out: match out {
            Out::F32(y) => Target::F32(y.as_mut_ptr()),
            Out::Bf16(y) => Target::Bf16(y.as_mut_ptr()),
        },
        blocks: blocks(p),
    };
    job.run(run);
    Ok(())
}

fn kernel(is_bf16: bool) -> Kernel {
    #[cfg(target_arch = "x86_64")]
    match is_bf16 {
        true if has_bf16_products() => return Kernel::Avx512Bf16,
        false if has_wide_products() => return Kernel::Avx512F32,
        _ => {}
    }
    let _ = is_bf16;
    Kernel::Portable
}

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

struct Job {
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
    fn run(&self, run: Run<'_>) {
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
        let fits = |there: bool, lanes: usize| !there || lanes * units <= SHARED;
        let (left, right) = (fits(s.left, rows * ROWS), fits(s.right, columns * COLUMNS));
        match (left, right) {
            (true, true) => {}
            _ if self.p.batch * rows * columns * TILE <= SUMS => s.phases = Phases::Steps,
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
        let n = (self.p.batch * lanes * self.units).div_ceil(SHARED);
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

/// Where a finished tile goes.
pub(crate) struct Emit {
    pub(crate) to: Target,
    /// The element of the result that the tile's first one is.
    pub(crate) at: usize,
    /// Elements from row to row.
    pub(crate) stride: usize,
    pub(crate) rows: usize,
    pub(crate) columns: usize,
}

/// Adds the product of two panels to a tile of sums (which begin at zero unless `add`), and writes the tile where it is wanted.
///
/// # Safety
/// The panels hold `units` units for each lane, the tile [`TILE`] sums; the machine has the kernel's instructions; `emit` lies
/// within its target, and nobody else uses that part of it.
pub(crate) unsafe fn tile(
    kernel: Kernel,
    units: usize,
    l: *const u32,
    r: *const u32,
    sums: *mut f32,
    add: bool,
    emit: Option<&Emit>,
) {
    // SAFETY: the caller's promise.
    unsafe {
        match kernel {
            Kernel::Portable => portable::tile(units, l.cast(), r.cast(), sums, add, emit),
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx512F32 => avx512::tile_f32(units, l, r, sums, add, emit),
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx512Bf16 => avx512::tile_bf16(units, l, r, sums, add, emit),
        }
    }
}

#[cfg(test)]
mod tests;
