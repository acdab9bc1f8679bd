//! Attention of one query of each sequence over a cache that lies as it is kept.

#[cfg(target_arch = "x86_64")]
use std::ops::Range;

#[cfg(target_arch = "x86_64")]
use super::{Kind, each, normed};
use super::{check, check_machine};
#[cfg(target_arch = "x86_64")]
use crate::{
    Format,
    fused::lanes,
    product::{MAX_M, MAX_ROWS, Sums},
    rows,
};
use crate::{KernelError, Out, Pool, Rows};

/// Keys that are gone through together. Their results are put together in order, so that threads do not matter.
const PART: usize = 128;

/// The heads of a layer and where its sequences stand.
///
/// Position `p` of a sequence is in row `p` modulo `rows` of its cache: a ring, or all positions where they never come
/// round. A query sees what is in the cache, its own position included.
#[derive(Debug, Clone, Copy)]
pub struct Heads<'a> {
    /// Position of each sequence's new token.
    pub positions: &'a [i32],
    /// Heads of keys and values.
    pub kv_heads: usize,
    /// Heads of queries that share keys and values.
    pub group: usize,
    /// Elements of a head, an even number.
    pub width: usize,
    /// Positions that the cache `[sequences, kv_heads, rows, width]` holds.
    pub rows: usize,
    /// Of each sequence's angles, `[sequences, width / 2]`: element `i` of a head turns with element `i + width / 2`.
    pub cos: Rows<'a>,
    /// The same.
    pub sin: Rows<'a>,
    /// Of all norms.
    pub eps: f64,
}

/// New keys and values as projected, each `[sequences, kv_heads, width]`.
#[derive(Debug, Clone, Copy)]
pub struct NewKeys<'a> {
    /// They are normed and turned.
    pub keys: Rows<'a>,
    /// They are normed without a weight.
    pub values: Rows<'a>,
    /// `[width]`, of keys.
    pub norm: Rows<'a>,
}

impl Heads<'_> {
    fn sequences(&self) -> usize {
        self.positions.len()
    }

    fn check(&self, sizes: &[(&'static str, usize, usize)]) -> Result<(), KernelError> {
        check_machine()?;
        if self.width == 0 || !self.width.is_multiple_of(2) {
            return Err(KernelError::Width(self.width));
        }
        if self.rows == 0 || self.positions.iter().any(|&p| p < 0) {
            return Err(KernelError::Positions { rows: self.rows });
        }
        for &(what, got, each) in sizes {
            check(what, got, [self.sequences(), each])?;
        }
        for x in [self.cos, self.sin] {
            check("the angles", x.len(), [self.sequences(), self.width / 2])?;
        }
        Ok(())
    }

    fn cache(&self) -> usize {
        self.kv_heads * self.rows * self.width
    }
}

/// Norms and turns new keys and puts them into the cache, with the values.
///
/// # Errors
/// When sizes or kinds do not agree, or this machine lacks the instructions.
pub fn write_keys(
    h: &Heads<'_>,
    new: &NewKeys<'_>,
    keys: &mut Out<'_>,
    values: &mut Out<'_>,
) -> Result<(), KernelError> {
    let each = h.kv_heads * h.width;
    h.check(&[
        ("the new keys", new.keys.len(), each),
        ("the new values", new.values.len(), each),
        ("the keys", keys.len(), h.cache()),
        ("the values", values.len(), h.cache()),
    ])?;
    #[cfg(target_arch = "x86_64")]
    match new.keys {
        Rows::F32(_) => write::<f32>(h, new, keys, values)?,
        Rows::Bf16(_) => write::<half::bf16>(h, new, keys, values)?,
    }
    Ok(())
}

/// Softmax of the normed and turned queries' products with the keys, times the values: `[sequences, heads, width]`, as the queries
/// are. `norm` is the queries' `[width]`.
///
/// # Errors
/// When sizes or kinds do not agree, or this machine lacks the instructions.
pub fn attend(
    pool: &Pool,
    h: &Heads<'_>,
    queries: Rows<'_>,
    norm: Rows<'_>,
    keys: Rows<'_>,
    values: Rows<'_>,
    out: &mut Out<'_>,
) -> Result<(), KernelError> {
    let each = h.kv_heads * h.group * h.width;
    h.check(&[
        ("the queries", queries.len(), each),
        ("the result", out.len(), each),
        ("the keys", keys.len(), h.cache()),
        ("the values", values.len(), h.cache()),
    ])?;
    #[cfg(target_arch = "x86_64")]
    match queries {
        Rows::F32(q) => attend_kind(pool, h, q, norm, (keys, values), out)?,
        Rows::Bf16(q) => attend_kind(pool, h, q, norm, (keys, values), out)?,
    }
    Ok(())
}

/// Rows of heads `[sequences, heads, width]`, normed and turned.
#[cfg(target_arch = "x86_64")]
fn turned<T: Kind>(h: &Heads<'_>, x: &[T], norm: Rows<'_>) -> Result<Vec<T>, KernelError> {
    let mut y = normed(x, h.width, Some(norm), h.eps)?;
    let half = h.width / 2;
    let (cos, sin) = (T::of(h.cos)?, T::of(h.sin)?);
    let each = (x.len() / h.sequences().max(1)).max(1);
    for (sequence, y) in y.chunks_mut(each).enumerate() {
        let at = sequence * half..(sequence + 1) * half;
        for head in y.chunks_exact_mut(h.width) {
            // SAFETY: the machine has the instructions, as has been checked.
            unsafe { lanes::turn(head, &cos[at.clone()], &sin[at.clone()]) };
        }
    }
    Ok(y)
}

#[cfg(target_arch = "x86_64")]
fn write<T: Kind>(
    h: &Heads<'_>,
    new: &NewKeys<'_>,
    keys: &mut Out<'_>,
    values: &mut Out<'_>,
) -> Result<(), KernelError> {
    let k = turned(h, T::of(new.keys)?, new.norm)?;
    let v = normed(T::of(new.values)?, h.width, None, h.eps)?;
    for (new, kept) in [(k, T::of_out(keys)?), (v, T::of_out(values)?)] {
        for (i, new) in new.chunks_exact(h.width).enumerate() {
            let position = usize::try_from(h.positions[i / h.kv_heads]).unwrap_or(0);
            let row = i * h.rows + position % h.rows;
            kept[row * h.width..][..h.width].copy_from_slice(new);
        }
    }
    Ok(())
}

/// Some heads of one sequence with the keys and values they share, up to [`MAX_M`] heads.
#[cfg(target_arch = "x86_64")]
struct Shared<'a, T> {
    queries: rows::Prepared,
    /// How many.
    heads: usize,
    keys: &'a [T],
    values: &'a [T],
    /// Rows that are seen.
    seen: usize,
}

/// A part of the keys, and what comes of it: for each of [`MAX_M`] heads the largest score, the sum of exponentials of scores less
/// it, and the values' sums.
#[cfg(target_arch = "x86_64")]
struct Part<'a> {
    shared: usize,
    keys: Range<usize>,
    most: [f32; MAX_M],
    sum: [f32; MAX_M],
    /// `[MAX_M, width]`.
    values: &'a mut [f32],
}

#[cfg(target_arch = "x86_64")]
fn attend_kind<T: Kind>(
    pool: &Pool,
    h: &Heads<'_>,
    queries: &[T],
    norm: Rows<'_>,
    (keys, values): (Rows<'_>, Rows<'_>),
    out: &mut Out<'_>,
) -> Result<(), KernelError> {
    let (width, out) = (h.width, T::of_out(out)?);
    if out.is_empty() {
        return Ok(());
    }
    let (keys, values) = (T::of(keys)?, T::of(values)?);
    let queries = turned(h, queries, norm)?;
    let format = if size_of::<T>() == 2 { Format::Bf16 } else { Format::F32 };
    let of_head = h.rows * width;
    let mut all = Vec::new();
    for (i, group) in queries.chunks_exact(h.group * width).enumerate() {
        let position = usize::try_from(h.positions[i / h.kv_heads]).unwrap_or(0);
        for some in group.chunks(MAX_M * width) {
            let heads = some.len() / width;
            all.push(Shared {
                queries: rows::Prepared::new(pool.level(), T::rows(some), heads, width, &[format]),
                heads,
                keys: &keys[i * of_head..][..of_head],
                values: &values[i * of_head..][..of_head],
                seen: h.rows.min(position.saturating_add(1)),
            });
        }
    }
    let count = all.iter().map(|s| s.seen.div_ceil(PART)).sum::<usize>();
    let mut room = vec![0.0; count * MAX_M * width];
    let places = all
        .iter()
        .enumerate()
        .flat_map(|(shared, s)| (0..s.seen).step_by(PART).map(move |first| (shared, first..s.seen.min(first + PART))));
    let with_room = places.zip(room.chunks_exact_mut(MAX_M * width));
    let mut parts: Vec<Part<'_>> = with_room
        .map(|((shared, keys), values)| Part { shared, keys, most: [0.0; MAX_M], sum: [0.0; MAX_M], values })
        .collect();
    let work = |part: &mut Part<'_>| one_part((format, width), &all[part.shared], part);
    if let [part] = &mut parts[..] {
        work(part);
    } else {
        each(pool, parts.iter_mut(), work);
    }
    let mut done = parts.as_slice();
    let mut out = out.chunks_exact_mut(width);
    for shared in &all {
        let (own, rest) = done.split_at(shared.seen.div_ceil(PART));
        done = rest;
        for (head, out) in out.by_ref().take(shared.heads).enumerate() {
            let most = own.iter().fold(f32::MIN, |most, part| most.max(part.most[head]));
            let weights: Vec<f32> = own.iter().map(|part| (part.most[head] - most).exp()).collect();
            let sum: f32 = own.iter().zip(&weights).map(|(part, weight)| part.sum[head] * weight).sum();
            let parts = own.iter().zip(&weights).map(|(p, weight)| (&p.values[head * width..][..width], weight / sum));
            let parts: Vec<(&[f32], f32)> = parts.collect();
            // SAFETY: the machine has the instructions, as has been checked.
            unsafe { lanes::weighted(&parts, out) };
        }
    }
    Ok(())
}

#[cfg(target_arch = "x86_64")]
fn one_part<T: Kind>((format, width): (Format, usize), shared: &Shared<'_, T>, part: &mut Part<'_>) {
    // SAFETY: any bits are bytes, and there are as many.
    let bytes = unsafe { std::slice::from_raw_parts(shared.keys.as_ptr().cast::<u8>(), size_of_val(shared.keys)) };
    let mut scores = [[0.0; PART]; MAX_M];
    let mut sums: Sums = [[0.0; MAX_M]; MAX_ROWS];
    for first in part.keys.clone().step_by(rows::UNIT) {
        let some = rows::Rows { first, step: 1, count: rows::UNIT.min(part.keys.end - first) };
        rows::sums((format, width), bytes, some, &shared.queries, 0..shared.heads, &mut sums);
        for (row, sums) in some.iter().zip(&sums) {
            for (scores, &sum) in scores.iter_mut().zip(sums) {
                scores[row - part.keys.start] = sum;
            }
        }
    }
    let n = part.keys.len();
    for ((scores, most), sum) in scores[..shared.heads].iter_mut().zip(&mut part.most).zip(&mut part.sum) {
        // SAFETY: the machine has the instructions, as has been checked.
        (*most, *sum) = unsafe { lanes::weights(&mut scores[..n]) };
    }
    let values = &shared.values[part.keys.start * width..part.keys.end * width];
    // SAFETY: as above.
    unsafe { lanes::values(&scores, values, width, part.values) };
}
