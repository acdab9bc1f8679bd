//! Moments and extremes of stored tensors, in one streaming pass.

use checkpoint::copy::{Item, ItemReader, Op};
use half::{bf16, f16};
use rayon::prelude::*;
use serde::Serialize;
use tensor::DType;

use super::diff::OnBytes;
use super::open::Checkpoint;
use crate::Result;

/// Bytes read at a time.
const PIECE: usize = 4 << 20;

/// What the elements of one tensor are like, as stored.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Stats {
    /// Number of elements.
    pub elements: u64,
    /// Smallest finite value.
    pub min: Option<f64>,
    /// Largest finite value.
    pub max: Option<f64>,
    /// Mean of the finite values.
    pub mean: Option<f64>,
    /// Standard deviation of the finite values.
    pub std: Option<f64>,
    /// Elements that are zero.
    pub zeros: u64,
    /// Elements that are no number.
    pub nan: u64,
    /// Elements that are infinite.
    pub infinite: u64,
}

/// Reads every tensor of a checkpoint. Name and statistics, ordered by name; checksums are verified on the way.
///
/// # Errors
/// When data are damaged or missing.
pub fn stats(checkpoint: &Checkpoint, progress: OnBytes<'_>) -> Result<Vec<(String, Stats)>> {
    let done = std::sync::atomic::AtomicU64::new(0);
    let stores = [checkpoint.store()];
    let entries = checkpoint.entries();
    entries
        .par_iter()
        .map(|(name, dtype, shape)| {
            let item = Item {
                store: 0,
                from: name.clone(),
                to: name.clone(),
                shape: shape.clone(),
                dtype: *dtype,
                op: Op::Copy,
            };
            let mut reader = ItemReader::new(&stores, &item)?;
            let mut sums = Sums::default();
            let mut buffer = Vec::new();
            for region in reader.boxes(PIECE, reader.grain()) {
                reader.read(&region, &mut buffer)?;
                sums.add(&buffer, *dtype);
                let n = buffer.len() as u64;
                progress(done.fetch_add(n, std::sync::atomic::Ordering::Relaxed) + n);
            }
            Ok((name.clone(), sums.finish()))
        })
        .collect()
}

#[derive(Default)]
struct Sums {
    out: Stats,
    finite: f64,
    mean: f64,
    squares: f64,
}

impl Sums {
    fn add(&mut self, bytes: &[u8], dtype: DType) {
        // Sums of a box are exact enough; boxes are merged by their moments, so that size does not spoil the result.
        let (mut n, mut sum, mut squares) = (0.0, 0.0, 0.0);
        let mut shift = None;
        for piece in bytes.chunks_exact(dtype.size()) {
            let x = value(piece, dtype);
            self.out.elements += 1;
            if x.is_nan() {
                self.out.nan += 1;
                continue;
            }
            if x.is_infinite() {
                self.out.infinite += 1;
                continue;
            }
            if x == 0.0 {
                self.out.zeros += 1;
            }
            self.out.min = Some(self.out.min.map_or(x, |m| m.min(x)));
            self.out.max = Some(self.out.max.map_or(x, |m| m.max(x)));
            let d = x - *shift.get_or_insert(x);
            n += 1.0;
            sum += d;
            squares += d * d;
        }
        let Some(shift) = shift else { return };
        let (mean, m2) = (shift + sum / n, squares - sum * sum / n);
        let delta = mean - self.mean;
        let total = self.finite + n;
        self.squares += m2 + delta * delta * self.finite * n / total;
        self.mean += delta * n / total;
        self.finite = total;
    }

    fn finish(mut self) -> Stats {
        if self.finite > 0.0 {
            self.out.mean = Some(self.mean);
            self.out.std = Some((self.squares / self.finite).max(0.0).sqrt());
        }
        self.out
    }
}

/// One little-endian element as `f64`; 64-bit integers are rounded.
pub(super) fn value(bytes: &[u8], dtype: DType) -> f64 {
    fn array<const N: usize>(bytes: &[u8]) -> [u8; N] {
        let mut out = [0; N];
        for (o, b) in out.iter_mut().zip(bytes) {
            *o = *b;
        }
        out
    }
    match dtype {
        DType::Bool | DType::U8 => f64::from(u8::from_le_bytes(array(bytes))),
        DType::I8 => f64::from(i8::from_le_bytes(array(bytes))),
        DType::I16 => f64::from(i16::from_le_bytes(array(bytes))),
        DType::U16 => f64::from(u16::from_le_bytes(array(bytes))),
        DType::I32 => f64::from(i32::from_le_bytes(array(bytes))),
        DType::U32 => f64::from(u32::from_le_bytes(array(bytes))),
        DType::I64 => i64::from_le_bytes(array(bytes)) as f64,
        DType::U64 => u64::from_le_bytes(array(bytes)) as f64,
        DType::F16 => f64::from(f16::from_le_bytes(array(bytes))),
        DType::BF16 => f64::from(bf16::from_le_bytes(array(bytes))),
        DType::F32 => f64::from(f32::from_le_bytes(array(bytes))),
        DType::F64 => f64::from_le_bytes(array(bytes)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_do_not_depend_on_boxes() {
        let values: Vec<f32> = (0..1000).map(|i| 1000.0 + (i as f32 * 0.37).sin()).collect();
        let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        let of = |step: usize| {
            let mut sums = Sums::default();
            bytes.chunks(step * 4).for_each(|b| sums.add(b, DType::F32));
            sums.finish()
        };
        let mean = values.iter().map(|&x| f64::from(x)).sum::<f64>() / 1000.0;
        let std = (values.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / 1000.0).sqrt();
        for step in [1, 7, 1000] {
            let s = of(step);
            assert!((s.mean.unwrap() - mean).abs() < 1e-9 && (s.std.unwrap() - std).abs() < 1e-9, "{s:?}");
            assert_eq!((s.elements, s.nan, s.infinite), (1000, 0, 0));
        }
    }

    #[test]
    fn values_that_are_no_numbers_are_counted_apart() {
        let bytes: Vec<u8> =
            [f32::NAN, f32::INFINITY, 0.0, -2.0].iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect();
        let mut sums = Sums::default();
        sums.add(&bytes, DType::BF16);
        let s = sums.finish();
        assert_eq!((s.nan, s.infinite, s.zeros, s.min, s.max, s.mean), (1, 1, 1, Some(-2.0), Some(0.0), Some(-1.0)));
        assert_eq!(Sums::default().finish().mean, None);
    }

    #[test]
    fn every_type_is_read() {
        for dtype in DType::ALL {
            let mut bytes = vec![0; dtype.size()];
            assert_eq!(value(&bytes, dtype), 0.0);
            if dtype.is_integer() || dtype == DType::Bool {
                bytes[0] = 1;
                assert_eq!(value(&bytes, dtype), 1.0);
            }
        }
        assert_eq!(value(&(-3i64).to_le_bytes(), DType::I64), -3.0);
    }
}
