//! What happens to elements on their way: strided reads in cache-sized tiles, and arithmetic.

use half::{bf16, f16};
use tensor::{DType, Transform};

/// What is done to the elements of one array. All arithmetic is in `f32`; in `f64` if either side is `f64`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Op {
    /// The same elements in the same order, under the target's shape.
    Copy,
    /// A two-dimensional transpose. The side of higher rank is taken as the matrix into which its dimensions flatten.
    Transpose,
    /// Every element times this constant.
    Multiply(f32),
    /// Every element divided by this constant.
    Divide(f32),
}

impl Op {
    /// What turns a Hugging Face tensor into a MaxText array.
    #[must_use]
    pub fn forward(transform: Transform) -> Self {
        match transform {
            Transform::Copy => Op::Copy,
            Transform::Transpose => Op::Transpose,
            Transform::Scale(s) => Op::Multiply(s),
        }
    }

    /// What turns a MaxText array into a Hugging Face tensor.
    #[must_use]
    pub fn backward(transform: Transform) -> Self {
        match transform {
            Transform::Copy => Op::Copy,
            Transform::Transpose => Op::Transpose,
            Transform::Scale(s) => Op::Divide(s),
        }
    }

    pub(super) fn is_arithmetic(self) -> bool {
        matches!(self, Op::Multiply(_) | Op::Divide(_))
    }

    /// The element type in which an array of `source` must be stored after this operation so that the inverse gives
    /// back every bit: the same for copies and transposes; for arithmetic a type with twice the precision, because
    /// products in the same type collide.
    #[must_use]
    pub fn lossless_dtype(self, source: DType) -> DType {
        match source {
            DType::BF16 | DType::F16 if self.is_arithmetic() => DType::F32,
            DType::F32 if self.is_arithmetic() => DType::F64,
            other => other,
        }
    }
}

/// One dimension of a strided read: how many elements, and how far apart they are in the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Dim {
    pub(super) n: usize,
    pub(super) stride: usize,
}

/// Side of a tile in elements: a tile of either side stays in the first-level cache.
const TILE: usize = 32;

/// Reads a strided box into dense row-major `out`. `start` and strides are in elements of `size` bytes. Returns `None`
/// if the box does not lie within `src` or does not fill `out`.
pub(super) fn gather(src: &[u8], start: usize, dims: &[Dim], size: usize, out: &mut [u8]) -> Option<()> {
    let count = dims.iter().try_fold(1usize, |n, d| n.checked_mul(d.n))?;
    if count.checked_mul(size)? != out.len() {
        return None;
    }
    if count == 0 {
        return Some(());
    }
    let last = dims.iter().try_fold(start, |at, d| at.checked_add((d.n - 1).checked_mul(d.stride)?))?;
    if last.checked_add(1)?.checked_mul(size)? > src.len() {
        return None;
    }
    match size {
        1 => gather_elements::<1>(src, start, dims, out),
        2 => gather_elements::<2>(src, start, dims, out),
        4 => gather_elements::<4>(src, start, dims, out),
        8 => gather_elements::<8>(src, start, dims, out),
        _ => return None,
    }
    Some(())
}

fn gather_elements<const N: usize>(src: &[u8], start: usize, dims: &[Dim], out: &mut [u8]) {
    let src: &[[u8; N]] = src.as_chunks().0;
    let out: &mut [[u8; N]] = out.as_chunks_mut().0;
    let mut merged: Vec<Dim> = Vec::with_capacity(dims.len());
    for &d in dims.iter().filter(|d| d.n > 1) {
        match merged.last_mut() {
            // Two dimensions that are one in the source; in the output they always are.
            Some(last) if last.stride == d.stride * d.n => *last = Dim { n: last.n * d.n, stride: d.stride },
            _ => merged.push(d),
        }
    }
    let inner = merged.pop().unwrap_or(Dim { n: 1, stride: 1 });
    if inner.stride == 1 {
        let mut rows = out.chunks_exact_mut(inner.n);
        walk(&merged, start, &mut |at| {
            if let Some(row) = rows.next() {
                row.copy_from_slice(&src[at..at + inner.n]);
            }
        });
        return;
    }
    // The last two dimensions form a matrix whose columns are dense in the source (or nearly so).
    let outer = merged.pop().unwrap_or(Dim { n: 1, stride: 1 });
    let mut planes = out.chunks_exact_mut(outer.n * inner.n);
    walk(&merged, start, &mut |at| {
        if let Some(plane) = planes.next() {
            transpose(&src[at..], outer, inner, plane);
        }
    });
}

/// `out[i][j] = src[i * rows.stride + j * cols.stride]`, tile by tile.
fn transpose<const N: usize>(src: &[[u8; N]], rows: Dim, cols: Dim, out: &mut [[u8; N]]) {
    for j0 in (0..cols.n).step_by(TILE) {
        let width = TILE.min(cols.n - j0);
        for i0 in (0..rows.n).step_by(TILE) {
            let height = TILE.min(rows.n - i0);
            if rows.stride == 1 && width == TILE && height == TILE {
                full_tile(&src[i0 + j0 * cols.stride..], cols.stride, &mut out[i0 * cols.n + j0..], cols.n);
                continue;
            }
            for i in i0..i0 + height {
                for j in j0..j0 + width {
                    out[i * cols.n + j] = src[i * rows.stride + j * cols.stride];
                }
            }
        }
    }
}

/// A whole tile through a local array: rows are read dense, rows are written dense, and the shuffle between the two
/// stays in the cache and free of bounds checks.
fn full_tile<const N: usize>(src: &[[u8; N]], src_stride: usize, out: &mut [[u8; N]], out_stride: usize) {
    let mut tile = [[[0u8; N]; TILE]; TILE];
    for (j, row) in tile.iter_mut().enumerate() {
        row.copy_from_slice(&src[j * src_stride..j * src_stride + TILE]);
    }
    for i in 0..TILE {
        let row = &mut out[i * out_stride..i * out_stride + TILE];
        for (to, from) in row.iter_mut().zip(&tile) {
            *to = from[i];
        }
    }
}

/// Calls `f` with the source offset of every index, row-major.
fn walk(dims: &[Dim], start: usize, f: &mut impl FnMut(usize)) {
    let Some((first, rest)) = dims.split_first() else { return f(start) };
    for i in 0..first.n {
        walk(rest, start + i * first.stride, f);
    }
}

/// Element types that [`convert`] can read and write.
pub(super) fn is_convertible(dtype: DType) -> bool {
    dtype.is_float()
}

/// Converts elements: reads `from`, applies `op`'s arithmetic, rounds once to `to` (to nearest even).
///
/// bf16 results are rounded from `f32`, as MaxText does. Lengths must belong together, and both types be floats.
pub(super) fn convert(src: &[u8], from: DType, op: Op, to: DType, out: &mut [u8]) {
    if from == DType::F64 || to == DType::F64 {
        let f = |x: f64| match op {
            Op::Multiply(s) => x * f64::from(s),
            Op::Divide(s) => x / f64::from(s),
            Op::Copy | Op::Transpose => x,
        };
        each(src, from, to, out, |x: Wide| f(x.0).into());
    } else {
        match op {
            Op::Multiply(s) => each(src, from, to, out, |x: f32| x * s),
            Op::Divide(s) => each(src, from, to, out, |x: f32| x / s),
            Op::Copy | Op::Transpose => each(src, from, to, out, |x: f32| x),
        }
    }
}

/// `f64` as the type of arithmetic.
#[derive(Clone, Copy)]
struct Wide(f64);

impl From<f64> for Wide {
    fn from(x: f64) -> Self {
        Wide(x)
    }
}

/// A type in which arithmetic is done.
trait Number: Copy {
    fn read(dtype: DType, bytes: &[u8], out: &mut [Self]);
    fn write(dtype: DType, values: &[Self], out: &mut [u8]);
}

macro_rules! number {
    ($t:ty, $wrap:expr, $get:expr, $f16:path, $bf16:path) => {
        impl Number for $t {
            fn read(dtype: DType, bytes: &[u8], out: &mut [Self]) {
                match dtype {
                    DType::F32 => fill(bytes, out, |b| $wrap(f32::from_le_bytes(b).into())),
                    DType::F64 => fill(bytes, out, |b| $wrap(f64::from_le_bytes(b) as _)),
                    DType::F16 => fill(bytes, out, |b| $wrap(f16::from_le_bytes(b).into())),
                    _ => fill(bytes, out, |b| $wrap(bf16::from_le_bytes(b).into())),
                }
            }
            fn write(dtype: DType, values: &[Self], out: &mut [u8]) {
                match dtype {
                    DType::F32 => spill(values, out, |x| ($get(x) as f32).to_le_bytes()),
                    DType::F64 => spill(values, out, |x| f64::from($get(x)).to_le_bytes()),
                    DType::F16 => spill(values, out, |x| $f16($get(x)).to_le_bytes()),
                    _ => spill(values, out, |x| $bf16($get(x)).to_le_bytes()),
                }
            }
        }
    };
}
number!(f32, |x: f32| x, |x: f32| x, f16::from_f32, bf16::from_f32);
number!(Wide, Wide, |x: Wide| x.0, f16::from_f64, bf16::from_f64);

fn fill<const N: usize, T>(bytes: &[u8], out: &mut [T], f: impl Fn([u8; N]) -> T) {
    for (x, b) in out.iter_mut().zip(bytes.as_chunks::<N>().0) {
        *x = f(*b);
    }
}

fn spill<const N: usize, T: Copy>(values: &[T], out: &mut [u8], f: impl Fn(T) -> [u8; N]) {
    for (b, x) in out.as_chunks_mut::<N>().0.iter_mut().zip(values) {
        *b = f(*x);
    }
}

fn each<T: Number + Default>(src: &[u8], from: DType, to: DType, out: &mut [u8], f: impl Fn(T) -> T) {
    const AT_ONCE: usize = 1024;
    let mut values = [T::default(); AT_ONCE];
    let blocks = src.chunks(AT_ONCE * from.size()).zip(out.chunks_mut(AT_ONCE * to.size()));
    for (src, out) in blocks {
        let values = &mut values[..(src.len() / from.size()).min(AT_ONCE)];
        T::read(from, src, values);
        for x in values.iter_mut() {
            *x = f(*x);
        }
        T::write(to, values, out);
    }
}

impl Default for Wide {
    fn default() -> Self {
        Wide(0.0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn gathers_equal_the_plain_loop(
            dims in prop::collection::vec((1usize..40, any::<u32>()), 0..4),
            size in prop::sample::select(vec![1usize, 2, 4, 8]),
            start in 0usize..5,
        ) {
            // A permutation of a dense array.
            let mut order: Vec<usize> = (0..dims.len()).collect();
            order.sort_by_key(|&i| dims[i].1);
            let mut box_: Vec<Dim> = dims.iter().map(|d| Dim { n: d.0, stride: 0 }).collect();
            let mut stride = 1;
            for &i in order.iter().rev() {
                box_[i].stride = stride;
                stride *= dims[i].0;
            }
            let src: Vec<u8> = (0..(stride + start) * size).map(|i| (i * 7 + i / 256) as u8).collect();
            let mut out = vec![0; stride * size];
            gather(&src, start, &box_, size, &mut out).unwrap();
            let mut want = Vec::new();
            walk(&box_, start, &mut |at| want.extend_from_slice(&src[at * size..(at + 1) * size]));
            prop_assert_eq!(out, want);
        }

        #[test]
        fn whatever_bf16_times_f32_comes_back(bits in any::<u16>(), s in 1.0f32..200.0) {
            let x = bf16::from_bits(bits);
            prop_assume!(x.is_finite() && (x.to_f32() * s).is_finite());
            let (mut wide, mut back) = ([0; 4], [0; 2]);
            convert(&x.to_le_bytes(), DType::BF16, Op::Multiply(s), DType::F32, &mut wide);
            prop_assert_eq!(f32::from_le_bytes(wide), x.to_f32() * s);
            convert(&wide, DType::F32, Op::Divide(s), DType::BF16, &mut back);
            prop_assert_eq!(back, x.to_le_bytes());
        }

        #[test]
        fn whatever_f32_times_f32_comes_back_from_f64(bits in any::<u32>(), s in 1.0f32..200.0) {
            let x = f32::from_bits(bits);
            prop_assume!(x.is_finite());
            let (mut wide, mut back) = ([0; 8], [0; 4]);
            convert(&x.to_le_bytes(), DType::F32, Op::Multiply(s), DType::F64, &mut wide);
            // Whoever rounds the stored value to f32 gets the f32 product.
            prop_assert_eq!((f64::from_le_bytes(wide) as f32).to_bits(), (x * s).to_bits());
            convert(&wide, DType::F64, Op::Divide(s), DType::F32, &mut back);
            prop_assert_eq!(back, x.to_le_bytes());
        }
    }

    #[test]
    fn boxes_outside_the_source_are_refused() {
        let src = [0; 16];
        let mut out = [0; 8];
        let rows = |n, stride| [Dim { n, stride }];
        assert!(gather(&src, 0, &rows(4, 2), 2, &mut out).is_some());
        assert!(gather(&src, 2, &rows(4, 2), 2, &mut out).is_none());
        assert!(gather(&src, 0, &rows(4, usize::MAX), 2, &mut out).is_none());
        assert!(gather(&src, 0, &rows(5, 1), 2, &mut out).is_none());
        assert!(gather(&src, usize::MAX, &rows(0, 1), 2, &mut []).is_some());
    }

    #[test]
    fn conversions_round_to_nearest_even() {
        let x = [1.0f32, 1.0 + f32::powi(2.0, -8), -65504.0, 0.1];
        let bytes: Vec<u8> = x.iter().flat_map(|v| v.to_le_bytes()).collect();
        for (to, want) in [
            (DType::BF16, x.map(|v| bf16::from_f32(v).to_f64())),
            (DType::F16, x.map(|v| f16::from_f32(v).to_f64())),
            (DType::F64, x.map(f64::from)),
        ] {
            let mut out = vec![0; 4 * to.size()];
            convert(&bytes, DType::F32, Op::Copy, to, &mut out);
            let got = tensor::HostArray::from_bytes(to, [4], &out).unwrap().to_f64();
            assert_eq!(got, want, "{to}");
        }
    }

    #[test]
    fn long_runs_are_converted_whole() {
        let src: Vec<u8> = (0..5000u32).flat_map(|i| (i as f32).to_le_bytes()).collect();
        let mut out = vec![0; 5000 * 8];
        convert(&src, DType::F32, Op::Multiply(2.0), DType::F64, &mut out);
        let got = tensor::HostArray::from_bytes(DType::F64, [5000], &out).unwrap();
        assert!(got.to_f64().iter().enumerate().all(|(i, x)| *x == 2.0 * i as f64));
    }
}
