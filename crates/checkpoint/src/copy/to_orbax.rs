//! Into an Orbax checkpoint: every chunk of the target is filled box by box.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use serde::Serialize;
use tensor::{DType, Shape};

use super::link::Links;
use super::source::{Scratch, boxes};
use super::{CopyError, CopyOptions, Item, OnProgress, PIECE, Progress, Store, fingerprint, readers};
use crate::commit::check_space;
use crate::orbax::{ArrayPlan, OrbaxOptions, OrbaxPlan, OrbaxWriter, Region, Target, WriteReport, dotted};

/// Where and how to write an Orbax checkpoint.
#[derive(Debug, Clone)]
pub struct OrbaxTarget {
    /// The directory.
    pub target: Target,
    /// How arrays are stored. `force`, `resume` and `source_id` are set by the copy.
    pub options: OrbaxOptions,
    /// Scalars beside the copied arrays, such as `step`: path and value.
    pub scalars: Vec<(String, i64)>,
    /// Empty leaves of the tree: path and what they are (`Dict`, `List` or `None`).
    pub empty: Vec<(String, &'static str)>,
    /// Leave arrays that need no arithmetic where they are: the checkpoint refers to the files of a Hugging Face source,
    /// by hard links where the file system allows it. No checksum covers those arrays.
    pub link: bool,
}

/// What a copy into an Orbax checkpoint amounts to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct OrbaxReport {
    /// What was written.
    pub written: WriteReport,
    /// Bytes that an interrupted run had written already.
    pub resumed_bytes: u64,
    /// Bytes that stay in the source's files.
    pub linked_bytes: u64,
}

/// Copies items into a new Orbax checkpoint.
///
/// # Errors
/// When items cannot be copied (all are listed), sources are damaged, space is short, or the file system refuses.
pub fn copy_to_orbax(
    stores: &[Store<'_>],
    items: &[Item],
    target: &OrbaxTarget,
    options: &CopyOptions,
    progress: OnProgress<'_>,
) -> Result<OrbaxReport, CopyError> {
    let readers = readers(stores, items)?;
    let bytes = |shape: &Shape, dtype: DType| (shape.elements() as u64).saturating_mul(dtype.size() as u64);
    let path = match &target.target {
        Target::Step { base, .. } => base,
        Target::Items(path) => path,
    };
    let mut links = Links::default();
    let linked: Vec<Option<ArrayPlan>> =
        items.iter().map(|i| if target.link { links.array(stores, i, path) } else { None }).collect();
    let sum = |want_linked: bool| {
        let chosen = items.iter().zip(&linked).filter(|(_, l)| l.is_some() == want_linked);
        chosen.map(|(i, _)| bytes(&i.shape, i.dtype)).fold(0, u64::saturating_add)
    };
    let (total, linked_bytes) = (sum(false), sum(true));
    if !options.resume {
        check_space(path, total)?;
    }
    // Copied arrays come first: their position in the plan is their position among the items.
    let is_linked: Vec<bool> = linked.iter().map(Option::is_some).collect();
    let pushed = |i: &Item| ArrayPlan::pushed(&i.to, i.dtype, i.shape.clone());
    let mut arrays: Vec<ArrayPlan> =
        items.iter().zip(linked).map(|(i, linked)| linked.unwrap_or_else(|| pushed(i))).collect();
    arrays.extend(target.scalars.iter().map(|(path, value)| ArrayPlan::scalar_i64(path, *value)));
    let empty = target.empty.iter().map(|(path, kind)| (dotted(path), *kind)).collect();
    let write_options = OrbaxOptions {
        force: options.force,
        resume: options.resume,
        source_id: fingerprint(stores, items)?,
        ..target.options.clone()
    };
    let mut writer =
        OrbaxWriter::create(target.target.clone(), OrbaxPlan { arrays, empty, links: links.files }, write_options)?;
    if options.keep_partial {
        writer.keep();
    }

    let mut left = Vec::with_capacity(items.len());
    let mut resumed_bytes = 0;
    for (i, item) in items.iter().enumerate() {
        let chunks = writer.chunk_count(i);
        let done = (0..chunks).filter(|&c| writer.is_done(i, c));
        let (mut n, mut found) = (0, 0);
        for c in done {
            n += 1;
            found += writer.chunk_region(i, c).elements() as u64 * item.dtype.size() as u64;
        }
        if is_linked.get(i) != Some(&true) {
            resumed_bytes += found;
        }
        left.push(AtomicUsize::new(chunks - n));
    }
    let done = AtomicU64::new(resumed_bytes);
    let report = |bytes: u64| {
        let done = done.fetch_add(bytes, Ordering::Relaxed) + bytes;
        match progress(Progress { done, total }) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(CopyError::Cancelled),
        }
    };
    report(0)?;
    writer.write_all(options.workers(), |array, region, chunk| {
        let (Some(reader), Some(item)) = (readers.get(array), items.get(array)) else {
            // Scalars are known to the writer and never asked for.
            return Ok(());
        };
        let mut scratch = Scratch::default();
        let mut buffer = Vec::new();
        let size = item.dtype.size();
        let mut result = Ok(());
        boxes(&region.shape, reader.piece_bytes(PIECE) / size, 1, &mut |piece: Region| {
            if result.is_err() {
                return;
            }
            let origin = piece.origin.iter().zip(&region.origin).map(|(a, b)| a + b).collect();
            let piece = Region { origin, shape: piece.shape };
            buffer.resize(piece.elements() * size, 0);
            result = reader
                .read(&piece, &mut buffer, &mut scratch)
                .and_then(|()| Ok(chunk.push(&buffer)?))
                .and_then(|()| report(buffer.len() as u64));
        });
        result?;
        if left.get(array).is_some_and(|n| n.fetch_sub(1, Ordering::Relaxed) == 1) {
            reader.done();
        }
        Ok::<(), CopyError>(())
    })?;
    Ok(OrbaxReport { written: writer.finish()?, resumed_bytes, linked_bytes })
}
