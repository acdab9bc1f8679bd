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
            rows: Range<usize>,
            k: usize,
            x: &[f32],
            stride: usize,
            sums: &mut Sums,
        ) {
            // One row after the other is one stream of memory, which processors read fastest (AVX-512, 1536 columns:
            // 23 GB/s of one core against 13 for four rows at a time). It needs all of x for each row, so x has to stay
            // in the first cache; where it does not, or there are several rows of it, rows share what is read of it.
            let m = x.len() / stride.max(1);
            let is_one_stream = m == 1 && size_of_val(x) <= super::STREAMED_X;
            let (mut first, mut at) = (rows.start, 0);
            while first < rows.end {
                let left = if is_one_stream { 1 } else { rows.end - first };
                let (done, ()) = match (format, m) {
                    $((Format::Bf16, $m) if left >= $r => ($r, block::<Bf16, $r, $m>(weights, first, k, x, stride, sums, at)),
                      (Format::F32, $m) if left >= $r => ($r, block::<F32, $r, $m>(weights, first, k, x, stride, sums, at)),
                      (Format::Bf16, $m) => (1, block::<Bf16, 1, $m>(weights, first, k, x, stride, sums, at)),
                      (Format::F32, $m) => (1, block::<F32, 1, $m>(weights, first, k, x, stride, sums, at)),)*
                    _ => (rows.end - first, ()),
                };
                first += done;
                at += done;
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

use std::ops::Range;

use half::bf16;

use crate::product::{Rows, Sums};
use crate::{Format, Level, Matrix};

/// Rows of weights in a unit of work.
pub(crate) const UNIT: usize = 4;

/// Most bytes of `x` that stay in the first cache beside the weights passing through.
#[cfg(target_arch = "x86_64")]
const STREAMED_X: usize = 16 << 10;

/// Elements that a level reads at a time.
fn width(level: Level) -> usize {
    match level {
        Level::Portable => portable::WIDTH,
        Level::Avx2 => 16,
        Level::Avx512 => 32,
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
}

impl Prepared {
    /// Makes what matrices of these formats need.
    pub(crate) fn new(level: Level, x: Rows<'_>, m: usize, k: usize, formats: &[Format]) -> Self {
        let width = width(level);
        let stride = k.next_multiple_of(width);
        let mut prepared = Prepared { level, stride, plain: Vec::new(), even_odd: Vec::new() };
        let needs_even_odd = formats.contains(&Format::Bf16) && level != Level::Portable;
        if formats.contains(&Format::F32) || (formats.contains(&Format::Bf16) && !needs_even_odd) {
            prepared.plain = vec![0.0; m * stride];
            for (i, to) in prepared.plain.chunks_exact_mut(stride.max(1)).enumerate() {
                match x {
                    Rows::F32(x) => to[..k].copy_from_slice(&x[i * k..(i + 1) * k]),
                    Rows::Bf16(x) => to.iter_mut().zip(&x[i * k..(i + 1) * k]).for_each(|(to, &x)| *to = widen(x)),
                }
            }
        }
        if needs_even_odd {
            prepared.even_odd = vec![0.0; m * stride];
            for (i, to) in prepared.even_odd.chunks_exact_mut(stride.max(1)).enumerate() {
                match x {
                    Rows::F32(x) => even_odd(&x[i * k..(i + 1) * k], to, width, |v| v),
                    Rows::Bf16(x) => even_odd(&x[i * k..(i + 1) * k], to, width, widen),
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

/// Computes the sums of some rows (at most [`UNIT`]) of a matrix with some rows (at most 8) of `x`.
pub(crate) fn sums(
    matrix: &Matrix,
    weights: &[u8],
    rows: Range<usize>,
    x: &Prepared,
    xs: Range<usize>,
    sums: &mut Sums,
) {
    let k = matrix.k();
    match x.level {
        Level::Portable => {
            let x = &x.plain[xs.start * x.stride..xs.end * x.stride];
            portable::sums(matrix.format(), weights, rows, k, x, sums);
        }
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 | Level::Avx512 => {
            let source = match matrix.format() {
                Format::F32 => &x.plain,
                _ => &x.even_odd,
            };
            let x_rows = &source[xs.start * x.stride..xs.end * x.stride];
            // SAFETY: such a level is only prepared for where the processor has it.
            unsafe {
                if x.level == Level::Avx512 {
                    avx512::sums(matrix.format(), weights, rows, k, x_rows, x.stride, sums);
                } else {
                    avx2::sums(matrix.format(), weights, rows, k, x_rows, x.stride, sums);
                }
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        Level::Avx2 | Level::Avx512 => {}
    }
}
