//! Kernels for row-major matrices of f32 and bf16.
//!
//! Every element is widened to f32, which is exact, and added to one of a fixed number of running sums by its position
//! in the row; the order of additions depends on the level alone.

/// The `sums` of a level with these features, whose `block` takes, for `m` rows of `x`, so many rows of weights at once.
#[cfg(target_arch = "x86_64")]
macro_rules! dispatch {
    ($features:literal, $($m:literal: $r:literal),*) => {
        #[target_feature(enable = $features)]
        pub(super) fn sums(
            format: Format,
            weights: &[u8],
            rows: Rows,
            k: usize,
            x: &[f32],
            stride: usize,
            sums: &mut Sums,
        ) {
            let m = x.len() / stride.max(1);
            let mut done = 0;
            while done < rows.count {
                let left = rows.count - done;
                let at = |size: usize| rows.place(done, k * size);
                let sums = &mut sums[done..];
                done += match (format, m) {
                    $((Format::Bf16, $m) if left >= $r => block::<Bf16, $r, $m>(weights, at(2), k, x, stride, sums),
                      (Format::F32, $m) if left >= $r => block::<F32, $r, $m>(weights, at(4), k, x, stride, sums),
                      (Format::Bf16, $m) => block::<Bf16, 1, $m>(weights, at(2), k, x, stride, sums),
                      (Format::F32, $m) => block::<F32, 1, $m>(weights, at(4), k, x, stride, sums),)*
                    _ => left,
                };
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod pairs;
mod portable;

use std::ops::Range;

use half::bf16;

use crate::product::{self, Sums};
use crate::{Format, Level};

/// Rows of weights in a unit of work, and of stripes of a matrix: a unit has one row of each stripe.
///
/// A thread that goes from unit to unit reads as many streams of memory, each in one direction. Where pages are small, as
/// those of mapped files mostly are, a single stream stops at the end of every page (77 % of the speed of memory; eight
/// streams 98 %); with eight rows next to each other processors do not see streams (60 to 75 %).
pub(crate) const UNIT: usize = 8;

/// How far ahead each stream asks for memory, in bytes.
#[cfg(target_arch = "x86_64")]
const AHEAD: usize = 1024;

/// Rows of a matrix that are computed together: `count` of them from `first` on, `step` rows from one to the next.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rows {
    pub(crate) first: usize,
    pub(crate) step: usize,
    pub(crate) count: usize,
}

impl Rows {
    /// Those of a unit of a matrix of `n` rows.
    pub(crate) fn of_unit(unit: usize, n: usize) -> Self {
        let step = units(n);
        Rows { first: unit, step, count: (unit..n).step_by(step.max(1)).len() }
    }

    pub(crate) fn iter(self) -> impl Iterator<Item = usize> {
        (0..self.count).map(move |i| self.first + i * self.step)
    }

    /// Where the row lies that is `done` rows behind the first, and those after it, if rows have so many bytes.
    #[cfg(target_arch = "x86_64")]
    fn place(self, done: usize, bytes: usize) -> Place {
        Place { first: (self.first + done * self.step) * bytes, pitch: self.step * bytes }
    }
}

/// Units of a matrix of `n` rows.
pub(crate) fn units(n: usize) -> usize {
    n.div_ceil(UNIT)
}

/// Where rows lie among the weights, in bytes.
#[derive(Debug, Clone, Copy)]
#[cfg(target_arch = "x86_64")]
struct Place {
    first: usize,
    /// From one row to the next.
    pitch: usize,
}

#[cfg(target_arch = "x86_64")]
impl Place {
    /// The weights from the first row to the end of the last one of `rows` rows of so many bytes.
    fn weights(self, weights: &[u8], rows: usize, bytes: usize) -> &[u8] {
        &weights[self.first..][..(rows - 1) * self.pitch + bytes]
    }
}

/// Elements that a level reads at a time.
fn width(level: Level) -> usize {
    match level {
        Level::Portable => portable::WIDTH,
        Level::Avx2 => 16,
        Level::Avx512 | Level::Avx512Bf16 => 32,
    }
}

/// The rows of `x` as the kernels of a level read them: f32, padded with zeros to whole steps of [`width`] elements.
#[derive(Debug)]
pub(crate) struct Prepared {
    level: Level,
    /// Elements from one row to the next.
    stride: usize,
    /// In their order: what f32 matrices are multiplied with.
    plain: Vec<f32>,
    /// In each step first the elements at even places, then those at odd ones: a vector of bf16 read as 32-bit numbers
    /// has the former in its lower and the latter in its upper halves.
    even_odd: Vec<f32>,
    /// As they came: what bf16 matrices are multiplied with where there is an instruction for that.
    #[cfg(target_arch = "x86_64")]
    pairs: Vec<bf16>,
}

impl Prepared {
    /// Makes what matrices of these formats need.
    pub(crate) fn new(level: Level, x: product::Rows<'_>, m: usize, k: usize, formats: &[Format]) -> Self {
        let width = width(level);
        let stride = k.next_multiple_of(width);
        let mut prepared = Prepared {
            level,
            stride,
            plain: Vec::new(),
            even_odd: Vec::new(),
            #[cfg(target_arch = "x86_64")]
            pairs: Vec::new(),
        };
        let has_bf16 = formats.contains(&Format::Bf16);
        #[cfg(target_arch = "x86_64")]
        if let (Level::Avx512Bf16, product::Rows::Bf16(x), true) = (level, x, has_bf16) {
            prepared.pairs = vec![bf16::ZERO; m * stride];
            for (to, x) in prepared.pairs.chunks_exact_mut(stride.max(1)).zip(x.chunks_exact(k.max(1))) {
                to[..k].copy_from_slice(x);
            }
        }
        #[cfg(target_arch = "x86_64")]
        let has_bf16 = has_bf16 && prepared.pairs.is_empty();
        let needs_even_odd = has_bf16 && level != Level::Portable;
        if formats.contains(&Format::F32) || (has_bf16 && !needs_even_odd) {
            prepared.plain = vec![0.0; m * stride];
            for (i, to) in prepared.plain.chunks_exact_mut(stride.max(1)).enumerate() {
                match x {
                    product::Rows::F32(x) => to[..k].copy_from_slice(&x[i * k..(i + 1) * k]),
                    product::Rows::Bf16(x) => {
                        to.iter_mut().zip(&x[i * k..(i + 1) * k]).for_each(|(to, &x)| *to = widen(x))
                    }
                }
            }
        }
        if needs_even_odd {
            prepared.even_odd = vec![0.0; m * stride];
            for (i, to) in prepared.even_odd.chunks_exact_mut(stride.max(1)).enumerate() {
                match x {
                    product::Rows::F32(x) => even_odd(&x[i * k..(i + 1) * k], to, width, |v| v),
                    product::Rows::Bf16(x) => even_odd(&x[i * k..(i + 1) * k], to, width, widen),
                }
            }
        }
        prepared
    }
}

fn widen(v: bf16) -> f32 {
    f32::from_bits(u32::from(v.to_bits()) << 16)
}

/// In each `width` elements the even ones first.
#[inline]
fn even_odd<T: Copy>(from: &[T], to: &mut [f32], width: usize, widen: impl Fn(T) -> f32) {
    let half = width / 2;
    for (from, to) in from.chunks(width).zip(to.chunks_exact_mut(width)) {
        let (even, odd) = to.split_at_mut(half);
        let (pairs, rest) = from.as_chunks::<2>();
        for ((pair, even), odd) in pairs.iter().zip(even.iter_mut()).zip(odd) {
            (*even, *odd) = (widen(pair[0]), widen(pair[1]));
        }
        if let [last] = rest {
            even[pairs.len()] = widen(*last);
        }
    }
}

/// Calls `take` with the sums of units of a matrix of `n` rows with the only row of `x`, where a kernel reads several units at a
/// time: for those at the beginning of `all`. Returns how many were.
pub(crate) fn several(
    (format, k): (Format, usize),
    weights: &[u8],
    all: Range<usize>,
    n: usize,
    x: &Prepared,
    take: &mut dyn FnMut(usize, [f32; UNIT]),
) -> usize {
    #[cfg(target_arch = "x86_64")]
    if x.level == Level::Avx512Bf16 && format == Format::Bf16 && x.pairs.len() == x.stride {
        let step = units(n);
        // Those behind lack their last row.
        let whole = all.start..all.end.min((n + step).saturating_sub(UNIT * step));
        let count = whole.len();
        if count > 0 {
            // SAFETY: such a level is only prepared for where the processor has it.
            unsafe { pairs::several(weights, whole, step, k, &x.pairs, take) };
        }
        return count;
    }
    let _ = (format, k, weights, all, n, x, take);
    0
}

/// Computes the sums of some rows (at most [`UNIT`]) of a matrix of `k` columns with some rows (at most 8) of `x`.
pub(crate) fn sums(
    (format, k): (Format, usize),
    weights: &[u8],
    rows: Rows,
    x: &Prepared,
    xs: Range<usize>,
    sums: &mut Sums,
) {
    match x.level {
        Level::Portable => {
            let x = &x.plain[xs.start * x.stride..xs.end * x.stride];
            portable::sums(format, weights, rows, k, x, sums);
        }
        #[cfg(target_arch = "x86_64")]
        Level::Avx512Bf16 if format == Format::Bf16 && !x.pairs.is_empty() => {
            let x_rows = &x.pairs[xs.start * x.stride..xs.end * x.stride];
            // SAFETY: such a level is only prepared for where the processor has it.
            unsafe { pairs::sums(weights, rows, k, x_rows, x.stride, sums) }
        }
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 | Level::Avx512 | Level::Avx512Bf16 => {
            let source = match format {
                Format::F32 => &x.plain,
                _ => &x.even_odd,
            };
            let x_rows = &source[xs.start * x.stride..xs.end * x.stride];
            // SAFETY: such a level is only prepared for where the processor has it.
            unsafe {
                if x.level >= Level::Avx512 {
                    avx512::sums(format, weights, rows, k, x_rows, x.stride, sums);
                } else {
                    avx2::sums(format, weights, rows, k, x_rows, x.stride, sums);
                }
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        Level::Avx2 | Level::Avx512 | Level::Avx512Bf16 => {}
    }
}
