//! Tensor by tensor, across formats and layouts.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use checkpoint::copy::{Item, ItemReader, Op, Store};
use rayon::prelude::*;
use serde::Serialize;
use tensor::{DType, Shape};

use super::open::{Checkpoint, Convention, Weights};
use super::stats::value;
use crate::{EngineError, Result};

/// Bytes compared at a time.
const PIECE: usize = 4 << 20;

/// How far a comparison has come: bytes done. Called from several threads.
pub type OnBytes<'a> = &'a (dyn Fn(u64) + Sync);

/// Two checkpoints to be compared.
#[derive(Debug, Clone, Copy)]
pub enum Sides<'a> {
    /// Both are Gemma 4: by parameter, MaxText's values transformed back. `text_only` leaves out what belongs to no
    /// parameter of the text model; across formats that is always so.
    Models {
        /// One.
        a: &'a Weights,
        /// The other.
        b: &'a Weights,
        /// Compare the text model's parameters alone.
        text_only: bool,
    },
    /// Anything: by stored name.
    Raw {
        /// One.
        a: &'a Checkpoint,
        /// The other, in the same format.
        b: &'a Checkpoint,
    },
}

/// One tensor that is not the same on both sides.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Difference {
    /// Parameter or tensor.
    pub name: String,
    /// Element type in `a` and in `b`, in the convention in which they were compared.
    pub dtypes: [String; 2],
    /// Shape in `a` and in `b`.
    pub shapes: [Vec<usize>; 2],
    /// Number of elements; 0 if the shapes differ and nothing was compared.
    pub elements: u64,
    /// Elements that are not the same bit for bit (of different values, if the types differ).
    pub different: u64,
    /// Largest absolute difference; absent if nothing was compared or no two differing values were finite.
    pub max_abs: Option<f64>,
    /// Largest difference in representable values; absent where types differ or a value is no number.
    pub max_ulp: Option<u64>,
    /// Differing elements of which at least one is infinite or no number.
    pub not_finite: u64,
    /// Index of the first differing element.
    pub first: Option<Vec<usize>>,
}

/// What a comparison found.
#[derive(Debug, Clone, Default, Serialize)]
pub struct DiffReport {
    /// Whether everything is the same, bit for bit.
    pub equal: bool,
    /// Tensors that are on both sides.
    pub compared: usize,
    /// Bytes of them, in the convention in which they were compared.
    pub bytes: u64,
    /// Those that are not the same.
    pub differences: Vec<Difference>,
    /// Names that are in `a` alone.
    pub only_a: Vec<String>,
    /// Names that are in `b` alone.
    pub only_b: Vec<String>,
    /// Tensors of `a` and of `b` that were left out, because they are no parameter of the text model.
    pub left_out: [usize; 2],
}

struct Pair {
    name: String,
    a: Item,
    b: Item,
}

/// Compares two checkpoints.
///
/// # Errors
/// When a checkpoint is damaged, or formats differ and at least one is no known model.
pub fn diff(sides: Sides<'_>, progress: OnBytes<'_>) -> Result<DiffReport> {
    let (a, b, stores) = match sides {
        Sides::Models { a, b, text_only } => {
            let same = a.checkpoint.convention() == b.checkpoint.convention();
            let all = same && !text_only;
            (items(a, same, all), items(b, same, all), [a.checkpoint.store(), b.checkpoint.store()])
        }
        Sides::Raw { a, b } => {
            if a.convention() != b.convention() {
                return Err(EngineError::Input(
                    "checkpoints of different formats can only be compared as Gemma 4 models".into(),
                ));
            }
            (raw(a), raw(b), [a.store(), b.store()])
        }
    };
    let mut report = DiffReport::default();
    if let Sides::Models { a: wa, b: wb, .. } = sides {
        report.left_out = [left_out(wa, &a), left_out(wb, &b)];
    }
    let mut pairs = Vec::new();
    let mut rest = b;
    for (name, a) in a {
        match rest.remove(&name) {
            Some(b) => pairs.push(Pair { name, a, b }),
            None => report.only_a.push(name),
        }
    }
    report.only_b = rest.into_keys().collect();
    report.compared = pairs.len();
    report.bytes = pairs.iter().map(|p| bytes(&p.a)).sum();
    // Large ones first, so that no thread is left with one at the end.
    pairs.sort_by_key(|p| std::cmp::Reverse(bytes(&p.a)));
    let done = AtomicU64::new(0);
    let advance = |n: u64| progress(done.fetch_add(n, Ordering::Relaxed) + n);
    let found: Vec<Option<Difference>> =
        pairs.par_iter().map(|p| compare(p, stores, &advance)).collect::<Result<_>>()?;
    report.differences = found.into_iter().flatten().collect();
    report.differences.sort_by(|x, y| x.name.cmp(&y.name));
    report.equal = report.differences.is_empty() && report.only_a.is_empty() && report.only_b.is_empty();
    Ok(report)
}

/// Bytes that [`diff`] will compare.
#[must_use]
pub fn diff_bytes(sides: Sides<'_>) -> u64 {
    match sides {
        Sides::Models { a, b, text_only } => {
            let same = a.checkpoint.convention() == b.checkpoint.convention();
            items(a, same, same && !text_only).values().map(bytes).sum()
        }
        Sides::Raw { a, .. } => raw(a).values().map(bytes).sum(),
    }
}

fn bytes(item: &Item) -> u64 {
    (item.shape.elements() as u64).saturating_mul(item.dtype.size() as u64)
}

fn left_out(w: &Weights, items: &BTreeMap<String, Item>) -> usize {
    w.checkpoint.entries().len().saturating_sub(items.len())
}

fn stored(name: &str, dtype: DType, shape: &Shape) -> Item {
    Item { store: 0, from: name.to_owned(), to: name.to_owned(), shape: shape.clone(), dtype, op: Op::Copy }
}

fn raw(checkpoint: &Checkpoint) -> BTreeMap<String, Item> {
    checkpoint.entries().into_iter().map(|(name, dtype, shape)| (name.clone(), stored(&name, dtype, &shape))).collect()
}

/// Items by logical name: as stored if both sides share a convention, else as Hugging Face has them.
fn items(w: &Weights, as_stored: bool, all: bool) -> BTreeMap<String, Item> {
    let mut out = BTreeMap::new();
    let maxtext = w.checkpoint.convention() == Convention::Maxtext;
    for p in &w.params {
        let item = match (as_stored, maxtext) {
            (true, true) => stored(&p.from, p.dtype, &p.spec.maxtext_shape),
            _ => w.hf_item(p),
        };
        out.insert(p.spec.name.clone(), item);
    }
    if all {
        let prefix = w.report.as_ref().map_or("", |r| r.prefix.as_str());
        let used: std::collections::HashSet<&str> = w.params.iter().map(|p| p.from.as_str()).collect();
        for (name, dtype, shape) in w.checkpoint.entries() {
            // The step and optimizer state of a MaxText checkpoint are no weights.
            if used.contains(name.as_str()) || maxtext {
                continue;
            }
            let logical = name.strip_prefix(prefix).unwrap_or(&name).to_owned();
            out.entry(logical).or_insert_with(|| stored(&name, dtype, &shape));
        }
    }
    out
}

fn compare(pair: &Pair, stores: [Store<'_>; 2], advance: &dyn Fn(u64)) -> Result<Option<Difference>> {
    let Pair { name, a, b } = pair;
    let mut out = Difference {
        name: name.clone(),
        dtypes: [a.dtype.name().to_owned(), b.dtype.name().to_owned()],
        shapes: [a.shape.dims().to_vec(), b.shape.dims().to_vec()],
        elements: 0,
        different: 0,
        max_abs: None,
        max_ulp: None,
        not_finite: 0,
        first: None,
    };
    if a.shape != b.shape {
        advance(bytes(a));
        return Ok(Some(out));
    }
    out.elements = a.shape.elements() as u64;
    let (sa, sb) = ([stores[0]], [stores[1]]);
    let (mut ra, mut rb) = (ItemReader::new(&sa, a)?, ItemReader::new(&sb, b)?);
    let grain = ra.grain().max(rb.grain());
    let (mut xa, mut xb) = (Vec::new(), Vec::new());
    for region in ra.boxes(PIECE, grain) {
        ra.read(&region, &mut xa)?;
        rb.read(&region, &mut xb)?;
        if a.dtype != b.dtype || xa != xb {
            let before = out.first.is_some();
            let first = elements(&mut out, (&xa, a.dtype), (&xb, b.dtype));
            if let (false, Some(i)) = (before, first) {
                out.first = Some(index(&region.origin, &region.shape, i));
            }
        }
        advance(xa.len() as u64);
    }
    Ok((out.different > 0 || a.dtype != b.dtype).then_some(out))
}

/// Adds the differences of a box; gives the first of them.
fn elements(out: &mut Difference, a: (&[u8], DType), b: (&[u8], DType)) -> Option<usize> {
    let same_type = a.1 == b.1;
    let mut first = None;
    let pieces = a.0.chunks_exact(a.1.size()).zip(b.0.chunks_exact(b.1.size()));
    for (i, (x, y)) in pieces.enumerate() {
        if same_type && x == y {
            continue;
        }
        let (vx, vy) = (value(x, a.1), value(y, b.1));
        if !same_type && (vx == vy || (vx.is_nan() && vy.is_nan())) {
            continue;
        }
        first.get_or_insert(i);
        out.different += 1;
        if vx.is_finite() && vy.is_finite() {
            out.max_abs = Some(out.max_abs.unwrap_or(0.0).max((vx - vy).abs()));
            if same_type && a.1.is_float() {
                let ulp = rank(x).abs_diff(rank(y));
                out.max_ulp = Some(out.max_ulp.unwrap_or(0).max(u64::try_from(ulp).unwrap_or(u64::MAX)));
            }
        } else {
            out.not_finite += 1;
        }
    }
    first
}

/// The position of a little-endian float among all values of its type, in order of size; both zeros are next to each
/// other.
fn rank(bytes: &[u8]) -> i128 {
    let mut bits = 0u64;
    for &b in bytes.iter().rev() {
        bits = bits << 8 | u64::from(b);
    }
    let sign = 1u64 << (bytes.len() * 8 - 1);
    if bits & sign == 0 { i128::from(bits) } else { -1 - i128::from(bits & !sign) }
}

fn index(origin: &[usize], shape: &[usize], mut i: usize) -> Vec<usize> {
    let mut out = origin.to_vec();
    for (o, &n) in out.iter_mut().zip(shape).rev() {
        *o += i % n.max(1);
        i /= n.max(1);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn empty() -> Difference {
        Difference {
            name: String::new(),
            dtypes: [String::new(), String::new()],
            shapes: [vec![], vec![]],
            elements: 0,
            different: 0,
            max_abs: None,
            max_ulp: None,
            not_finite: 0,
            first: None,
        }
    }

    #[test]
    fn neighbours_are_one_apart() {
        let r = |x: f32| rank(&x.to_le_bytes());
        assert_eq!(r(1.0f32.next_up()) - r(1.0), 1);
        assert_eq!(r(0.0) - r(-0.0), 1);
        assert_eq!(r(0.0f32.next_up()) - r(0.0f32.next_down()), 3);
        assert!(r(-2.0) < r(-1.0) && r(-1.0) < r(1.0));
        assert_eq!(rank(&1.0f64.next_up().to_le_bytes()) - rank(&1.0f64.to_le_bytes()), 1);
    }

    #[test]
    fn elements_are_counted_and_measured() {
        let le = |v: &[f32]| v.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
        let (a, b) = (le(&[1.0, 2.0, f32::NAN, 4.0]), le(&[1.0, 2.5, 3.0, 4.0f32.next_up()]));
        let mut out = empty();
        assert_eq!(elements(&mut out, (&a, DType::F32), (&b, DType::F32)), Some(1));
        assert_eq!((out.different, out.max_abs, out.max_ulp, out.not_finite), (3, Some(0.5), Some(1 << 21), 1));
        // The same values in another type are no different elements.
        let wide: Vec<u8> = [1.0f64, 2.0, f64::NAN, 4.0].iter().flat_map(|x| x.to_le_bytes()).collect();
        let mut out = empty();
        assert_eq!(elements(&mut out, (&a, DType::F32), (&wide, DType::F64)), None);
        assert_eq!(out.different, 0);
    }

    #[test]
    fn places_are_found() {
        assert_eq!(index(&[10, 0], &[5, 3], 7), [12, 1]);
        assert_eq!(index(&[], &[], 0), [0; 0]);
    }
}
