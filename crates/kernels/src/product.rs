//! `x · wᵀ` for matrices that share their `x`.

use std::fmt;
use std::ops::Range;

use half::bf16;

use crate::split::Split;
use crate::tiles::Layout;
use crate::{Format, KernelError, Matrix, Pool};
use crate::{rows, tiles};

/// Bytes of weights that a thread takes at a time.
const GRAIN: usize = 256 << 10;
/// Most rows of `x` that go through a block of weights at once; more go through it again while it is in the cache.
pub(crate) const MAX_M: usize = 8;
/// Most rows of weights of a unit of work.
pub(crate) const MAX_ROWS: usize = 16;

/// The sums of a unit: one for each row of the unit and row of `x`.
pub(crate) type Sums = [[f32; MAX_M]; MAX_ROWS];

/// The rows of `x`, row-major `[m, k]`.
#[derive(Debug, Clone, Copy)]
pub enum Rows<'a> {
    /// In f32.
    F32(&'a [f32]),
    /// In bf16.
    Bf16(&'a [bf16]),
}

impl Rows<'_> {
    pub(crate) fn len(&self) -> usize {
        match self {
            Rows::F32(x) => x.len(),
            Rows::Bf16(x) => x.len(),
        }
    }
}

/// Room for a result, row-major `[m, n]`.
#[derive(Debug)]
pub enum Out<'a> {
    /// In f32.
    F32(&'a mut [f32]),
    /// In bf16, rounded to nearest even.
    Bf16(&'a mut [bf16]),
}

impl Out<'_> {
    /// What it holds.
    #[must_use]
    pub fn rows(&self) -> Rows<'_> {
        match self {
            Out::F32(y) => Rows::F32(y),
            Out::Bf16(y) => Rows::Bf16(y),
        }
    }

    pub(crate) fn len(&self) -> usize {
        match self {
            Out::F32(y) => y.len(),
            Out::Bf16(y) => y.len(),
        }
    }
}

/// Where the threads write a result.
#[derive(Clone, Copy)]
enum Target {
    F32(*mut f32),
    Bf16(*mut bf16),
}

/// One matrix of a call.
struct Job<'a> {
    matrix: &'a Matrix,
    weights: &'a [u8],
    target: Target,
    /// Its units of work, among those of all matrices.
    units: Range<usize>,
}

impl fmt::Debug for Job<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Job({:?}, units {:?})", self.matrix, self.units)
    }
}

// SAFETY: the targets are written by several threads, each at elements of its own: see `Job::write`.
unsafe impl Sync for Job<'_> {}

/// Units of work of a matrix: tiles of one that is quantised, else a row of each stripe.
fn units_of(matrix: &Matrix) -> usize {
    if Layout::of(matrix.format()).is_some() { matrix.n().div_ceil(tiles::ROWS) } else { rows::units(matrix.n()) }
}

/// Computes `out[i] = x · matrices[i]ᵀ` for `m` rows of `x`: every matrix is read from memory once.
///
/// Weights in f32 and bf16 are multiplied exactly and summed in f32. With quantised ones, each 32 elements of `x` are
/// rounded to 65279 steps between plus and minus their largest magnitude.
///
/// # Errors
/// When sizes do not agree.
pub fn products(
    pool: &Pool,
    x: Rows<'_>,
    m: usize,
    matrices: &[&Matrix],
    out: &mut [Out<'_>],
) -> Result<(), KernelError> {
    products_before(pool, x, m, matrices, out, &[])
}

/// [`products`], after which those with the matrices of `next` are expected: threads that have nothing to do begin to read
/// them. A wrong guess costs nothing but time.
///
/// # Errors
/// When sizes do not agree.
pub fn products_before(
    pool: &Pool,
    x: Rows<'_>,
    m: usize,
    matrices: &[&Matrix],
    out: &mut [Out<'_>],
    next: &[&Matrix],
) -> Result<(), KernelError> {
    if matrices.len() != out.len() {
        return Err(KernelError::Count { matrices: matrices.len(), results: out.len() });
    }
    let Some(first) = matrices.first() else { return Ok(()) };
    let k = first.k();
    let mut jobs = Vec::with_capacity(matrices.len());
    let mut units = 0;
    let mut total = 0;
    for (index, (&matrix, out)) in matrices.iter().zip(out.iter_mut()).enumerate() {
        if matrix.k() != k || m.checked_mul(k) != Some(x.len()) {
            return Err(KernelError::X { index, len: x.len(), m, k: matrix.k() });
        }
        if m.checked_mul(matrix.n()) != Some(out.len()) {
            return Err(KernelError::Out { index, len: out.len(), m, n: matrix.n() });
        }
        let weights = matrix.bytes().as_slice();
        if Some(weights.len()) != matrix.format().bytes(matrix.n(), k) {
            let (format, n) = (matrix.format(), matrix.n());
            return Err(KernelError::Size { format, n, k, needed: matrix.bytes().len(), got: weights.len() });
        }
        let target = match out {
            Out::F32(y) => Target::F32(y.as_mut_ptr()),
            Out::Bf16(y) => Target::Bf16(y.as_mut_ptr()),
        };
        let count = units_of(matrix);
        jobs.push(Job { matrix, weights, target, units: units..units + count });
        units += count;
        total += weights.len();
    }
    let count = u32::try_from(units).map_err(|_| KernelError::TooLarge { n: units, k })?;
    if count == 0 || m == 0 {
        return Ok(());
    }
    let formats: Vec<Format> = matrices.iter().map(|matrix| matrix.format()).collect();
    let prepared = Prepared {
        rows: rows::Prepared::new(pool.level(), x, m, k, &formats),
        tiles: formats
            .iter()
            .any(|&format| Layout::of(format).is_some())
            .then(|| tiles::Prepared::new(pool.level(), x, m, k)),
    };
    let grain = GRAIN * units / total.max(1);
    let split = Split::new(count, pool.threads(), u32::try_from(grain).unwrap_or(1));
    expect(pool, next);
    pool.run(&|thread| {
        while let Some(taken) = split.take(thread) {
            for job in &jobs {
                let units = taken.start.max(job.units.start)..taken.end.min(job.units.end);
                if !units.is_empty() {
                    job.run(units.start - job.units.start..units.end - job.units.start, m, &prepared);
                }
            }
        }
    });
    Ok(())
}

/// Tells the threads where their parts of the next products begin, as `Split` will divide them.
fn expect(pool: &Pool, next: &[&Matrix]) {
    let total: usize = next.iter().map(|matrix| units_of(matrix)).sum();
    for thread in 0..pool.threads() {
        let mut first = total * thread / pool.threads();
        for matrix in next {
            let count = units_of(matrix);
            if first < count {
                let bytes = matrix.bytes().as_slice();
                let unit = bytes.len() / count;
                if Layout::of(matrix.format()).is_some() {
                    pool.expect(thread, &bytes[unit * first..], 1, 0);
                } else {
                    // Units are as long as their rows together, and stripes as long as their rows.
                    let row = unit / rows::UNIT;
                    pool.expect(thread, &bytes[row * first..], rows::UNIT, row * count);
                }
                break;
            }
            first -= count;
        }
    }
}

/// The rows of `x` in the forms that the kernels read.
struct Prepared {
    rows: rows::Prepared,
    tiles: Option<tiles::Prepared>,
}

impl Job<'_> {
    /// Computes some of its units.
    fn run(&self, units: Range<usize>, m: usize, x: &Prepared) {
        let (n, format) = (self.matrix.n(), self.matrix.format());
        let tile = Layout::of(format).and_then(|layout| layout.tile(self.matrix.k()));
        let mut sums: Sums = [[0.0; MAX_M]; MAX_ROWS];
        let mut units = units;
        if m == 1 && tile.is_none() {
            let of = (format, self.matrix.k());
            units.start += rows::several(of, self.weights, units.clone(), n, &x.rows, &mut |unit, values| {
                sums.iter_mut().zip(values).for_each(|(sums, value)| sums[0] = value);
                self.write(rows::Rows::of_unit(unit, n).iter(), 0..1, &sums);
            });
        }
        for unit in units {
            for first in (0..m).step_by(MAX_M) {
                let xs = first..m.min(first + MAX_M);
                if let (Some(tile), Some(x)) = (tile, &x.tiles) {
                    tiles::sums(format, &self.weights[unit * tile..][..tile], x, xs.clone(), &mut sums);
                    self.write(unit * tiles::ROWS..n.min((unit + 1) * tiles::ROWS), xs, &sums);
                } else {
                    let rows = rows::Rows::of_unit(unit, n);
                    rows::sums((format, self.matrix.k()), self.weights, rows, &x.rows, xs.clone(), &mut sums);
                    self.write(rows.iter(), xs, &sums);
                }
            }
        }
    }

    fn write(&self, rows: impl Iterator<Item = usize>, xs: Range<usize>, sums: &Sums) {
        let n = self.matrix.n();
        for (row, sums) in rows.zip(sums) {
            for (x, &value) in xs.clone().zip(sums) {
                let at = x * n + row;
                // SAFETY: `products` checked that the result has m n elements, x < m and row < n, and holds the
                // mutable borrow for as long as threads run. Each unit is taken by one thread, and units have disjoint
                // rows, so that no other thread touches this element.
                unsafe {
                    match self.target {
                        Target::F32(y) => y.add(at).write(value),
                        Target::Bf16(y) => y.add(at).write(bf16::from_f32(value)),
                    }
                }
            }
        }
    }
}

#[cfg(test)]
#[path = "product_tests.rs"]
pub(crate) mod tests;
