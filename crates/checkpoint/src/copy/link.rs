//! Arrays that stay where they are: chunks of the new checkpoint that refer to parts of the source's files.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use fs_err as fs;
use tensor::Shape;

use super::source::as_matrix;
use super::{Item, Op, Store};
use crate::orbax::{ArrayPlan, LinkedChunk, LinkedFile, Source};

/// Rows of an array that is stored as it is are cut into this many chunks, so that a host can read a part.
const SPLIT: usize = 16;

/// Files that arrays refer to.
#[derive(Debug, Default)]
pub(super) struct Links {
    pub(super) files: Vec<LinkedFile>,
    sources: Vec<PathBuf>,
}

impl Links {
    /// The plan of an array that needs no arithmetic and lies dense in a file: it refers to that file. `None` for any
    /// other.
    pub(super) fn array(&mut self, stores: &[Store<'_>], item: &Item, near: &Path) -> Option<ArrayPlan> {
        let Store::Hf(dir) = stores.get(item.store)? else { return None };
        let view = dir.tensor(&item.from)?;
        if item.op.is_arithmetic() || view.dtype != item.dtype || view.bytes.is_empty() {
            return None;
        }
        let range = view.bytes.range();
        let order = match item.op {
            Op::Transpose => Some(stored_order(&view.shape, &item.shape)?),
            _ if view.shape == item.shape => None,
            _ => return None,
        };
        let rows = item.shape.first().copied().unwrap_or(1);
        let split = if order.is_none() && rows > SPLIT && rows.is_multiple_of(SPLIT) { SPLIT } else { 1 };
        let mut chunk_shape = item.shape.dims().to_vec();
        if let Some(first) = chunk_shape.first_mut() {
            *first /= split;
        }
        let file = self.file(view.bytes.file().path(), near);
        let bytes = (range.len() / split) as u64;
        let chunks = (0..split as u64).map(|i| LinkedChunk { file, offset: range.start as u64 + i * bytes }).collect();
        Some(ArrayPlan {
            chunk_shape: Some(chunk_shape),
            source: Source::Linked { order, chunks },
            ..ArrayPlan::pushed(&item.to, item.dtype, item.shape.clone())
        })
    }

    /// The number of a file. Links are hard where the file system allows it, so that they outlive the source directory.
    fn file(&mut self, path: &Path, near: &Path) -> usize {
        if let Some(at) = self.sources.iter().position(|p| p == path) {
            return at;
        }
        let at = self.sources.len();
        let name = path.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned());
        let device = |p: &Path| fs::metadata(p).ok().map(|m| m.dev());
        let hard = near.ancestors().find_map(device).is_some_and(|d| device(path) == Some(d));
        self.sources.push(path.to_owned());
        self.files.push(LinkedFile { name: format!("linked/{at:05}-{name}"), target: path.to_owned(), hard });
        at
    }
}

/// Stored dimension `k` of a transposed array is its dimension `order[k]`.
fn stored_order(stored: &Shape, array: &Shape) -> Option<Vec<usize>> {
    let (_, columns) = as_matrix(stored, array).ok()?;
    let split = super::source::split_at(array, columns)?;
    Some((split..array.rank()).chain(0..split).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_of_kernels() {
        let order = |s: &[usize], a: &[usize]| stored_order(&s.into(), &a.into()).unwrap();
        assert_eq!(order(&[32, 5], &[5, 4, 8]), [1, 2, 0]);
        assert_eq!(order(&[5, 32], &[4, 8, 5]), [2, 0, 1]);
        assert_eq!(order(&[7, 5], &[5, 7]), [1, 0]);
        assert!(stored_order(&[7, 5].into(), &[7, 5].into()).is_none());
    }
}
