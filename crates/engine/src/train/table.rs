//! A per-layer table that is trained on the host: only rows that a batch needs are on the device, with their moments.
//!
//! **What is exact.** A step updates the rows that occur in its batch, each once, with the gradient summed over its
//! occurrences: weights, moments and decay of these as if the whole table were on the device. All other rows rest: their moments
//! do not fade and their weights do not decay in that step. Bias corrections count steps of the run, not of the row. A row that
//! occurs in every step therefore goes exactly as on the device.
//!
//! **What it costs.** A row takes memory (weights and moments) from the first batch it occurs in; all others stay where the run
//! found them, in a mapped file.

use std::collections::BTreeMap;
use std::sync::Arc;

use tensor::{DType, HostArray, Shape};

use super::TrainError;
use super::device::convert;
use crate::rows::RowTable;
use crate::train_state::TableSnapshot;

type Result<T> = std::result::Result<T, TrainError>;

/// The table of a run.
#[derive(Debug)]
pub(crate) struct HostTable {
    /// Rows that no batch had yet.
    base: Arc<RowTable>,
    /// Weights, then each moment: the dtype of each.
    parts: Vec<DType>,
    /// Prefixes of the moments' names.
    prefixes: Vec<&'static str>,
    /// Rows that some batch had: the bytes of the parts, one after the other.
    touched: BTreeMap<i32, Box<[u8]>>,
}

/// The different rows that a batch needs, in ascending order, and which of them each token has.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Needed {
    pub(crate) rows: Vec<i32>,
    pub(crate) index: Vec<i32>,
}

impl Needed {
    pub(crate) fn of(ids: &[i32]) -> Self {
        let mut rows = ids.to_vec();
        rows.sort_unstable();
        rows.dedup();
        let place = |id: &i32| rows.binary_search(id).unwrap_or(0) as i32;
        let index = ids.iter().map(place).collect();
        Needed { rows, index }
    }
}

impl HostTable {
    /// A table whose rows are those of `base` so far.
    pub(crate) fn new(base: RowTable, dtype: DType, moments: &[(&'static str, DType)]) -> Self {
        let parts = std::iter::once(dtype).chain(moments.iter().map(|m| m.1)).collect();
        let prefixes = moments.iter().map(|m| m.0).collect();
        HostTable { base: Arc::new(base), parts, prefixes, touched: BTreeMap::new() }
    }

    /// Takes up where a checkpoint left: its weights are `base`, `moments` those of these rows.
    pub(crate) fn restore(&mut self, rows: &[i32], moments: &[HostArray]) -> Result<()> {
        let weights = self.lookup(rows)?;
        let all: Vec<&HostArray> = std::iter::once(&weights).chain(moments).collect();
        self.store(rows, &all)
    }

    fn columns(&self) -> usize {
        self.base.columns()
    }

    /// Rows from the base, in the dtype of the weights.
    fn base_rows(&self, rows: &[i32]) -> Result<HostArray> {
        convert(self.base.gather(rows, [rows.len(), self.columns()])?, self.parts[0])
    }

    /// Weights of the rows `ids`: `[ids, columns]`.
    pub(crate) fn lookup(&self, ids: &[i32]) -> Result<HostArray> {
        let mut out = HostArray::zeros(self.parts[0], [ids.len(), self.columns()])?;
        let width = self.columns() * self.parts[0].size();
        let fresh: Vec<i32> = ids.iter().copied().filter(|id| !self.touched.contains_key(id)).collect();
        let found = self.base_rows(&fresh)?;
        let mut found = found.bytes().chunks_exact(width.max(1));
        for (id, to) in ids.iter().zip(out.bytes_mut().chunks_exact_mut(width.max(1))) {
            let row = self.touched.get(id).map(|r| &r[..width]).or_else(|| found.next());
            to.copy_from_slice(row.unwrap_or(&[]));
        }
        Ok(out)
    }

    /// Weights and moments of rows, each `[capacity, columns]` with zeros behind the rows.
    pub(crate) fn gather(&self, rows: &[i32], capacity: usize) -> Result<Vec<HostArray>> {
        let weights = self.lookup(rows)?;
        let mut out = Vec::with_capacity(self.parts.len());
        let mut offset = 0;
        for (part, &dtype) in self.parts.iter().enumerate() {
            let width = self.columns() * dtype.size();
            let mut array = HostArray::zeros(dtype, [capacity, self.columns()])?;
            if part == 0 {
                array.bytes_mut()[..weights.bytes().len()].copy_from_slice(weights.bytes());
            } else {
                for (id, to) in rows.iter().zip(array.bytes_mut().chunks_exact_mut(width.max(1))) {
                    if let Some(row) = self.touched.get(id) {
                        to.copy_from_slice(&row[offset..offset + width]);
                    }
                }
            }
            offset += width;
            out.push(array);
        }
        Ok(out)
    }

    /// Keeps rows: weights and moments, each with at least as many rows.
    pub(crate) fn store(&mut self, rows: &[i32], parts: &[&HostArray]) -> Result<()> {
        let widths: Vec<usize> = self.parts.iter().map(|d| d.size() * self.columns()).collect();
        for (&dtype, array) in self.parts.iter().zip(parts) {
            let enough = array.dtype() == dtype
                && matches!(array.shape().dims(), &[n, c] if n >= rows.len() && c == self.columns());
            if !enough || parts.len() != self.parts.len() {
                let reason = format!("rows of the per-layer table come as {}{}", array.dtype(), array.shape());
                return Err(crate::EngineError::Input(reason).into());
            }
        }
        for (i, &id) in rows.iter().enumerate() {
            let row = self.touched.entry(id).or_insert_with(|| vec![0; widths.iter().sum()].into());
            let mut rest = &mut row[..];
            for (array, &width) in parts.iter().zip(&widths) {
                let (to, after) = rest.split_at_mut(width);
                to.copy_from_slice(&array.bytes()[i * width..(i + 1) * width]);
                rest = after;
            }
        }
        Ok(())
    }

    /// The table as it is now, for a checkpoint.
    pub(crate) fn snapshot(&self, name: &str) -> Result<TableSnapshot> {
        // A file has at least one row: the first, which is as it was if no batch had it.
        let mut rows: Vec<i32> = self.touched.keys().copied().collect();
        if rows.first() != Some(&0) {
            rows.insert(0, 0);
        }
        let mut parts = self.gather(&rows, rows.len())?.into_iter();
        let weights = match parts.next() {
            Some(w) => w,
            None => HostArray::zeros(self.parts[0], Shape::from([0, self.columns()]))?,
        };
        let moments = self.prefixes.iter().map(|p| format!("{p}{name}")).zip(parts).collect();
        Ok(TableSnapshot { name: name.to_owned(), base: Arc::clone(&self.base), rows, weights, moments })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> HostTable {
        let values: Vec<f32> = (0..12).map(|v| v as f32).collect();
        let base = RowTable::in_memory(HostArray::from_slice([6, 2], &values).unwrap()).unwrap();
        HostTable::new(base, DType::F32, &[("mu:", DType::BF16), ("nu:", DType::F32)])
    }

    fn floats(a: &HostArray) -> Vec<f64> {
        a.to_f64()
    }

    #[test]
    fn tokens_find_their_rows() {
        let needed = Needed::of(&[5, 2, 5, 0]);
        assert_eq!(needed, Needed { rows: vec![0, 2, 5], index: vec![2, 1, 2, 0] });
    }

    #[test]
    fn stored_rows_come_back_and_others_stay() {
        let mut t = table();
        let [w, mu, nu] = &t.gather(&[1, 4], 3).unwrap()[..] else { panic!() };
        assert_eq!(floats(w), [2.0, 3.0, 8.0, 9.0, 0.0, 0.0]);
        assert_eq!((floats(mu), floats(nu)), (vec![0.0; 6], vec![0.0; 6]));
        let new = |d, v: &[f64]| HostArray::from_f64(d, [3, 2], v).unwrap();
        let w = new(DType::F32, &[20.0, 30.0, 80.0, 90.0, 7.0, 7.0]);
        let mu = new(DType::BF16, &[1.0, 2.0, 3.0, 4.0, 7.0, 7.0]);
        let nu = new(DType::F32, &[5.0, 6.0, 7.0, 8.0, 7.0, 7.0]);
        t.store(&[1, 4], &[&w, &mu, &nu]).unwrap();
        assert_eq!(floats(&t.lookup(&[4, 0, 1, 4]).unwrap()), [80.0, 90.0, 0.0, 1.0, 20.0, 30.0, 80.0, 90.0]);
        let again = t.gather(&[0, 4], 2).unwrap();
        assert_eq!(floats(&again[1]), [0.0, 0.0, 3.0, 4.0]);
        assert_eq!(floats(&again[2]), [0.0, 0.0, 7.0, 8.0]);
        assert!(t.store(&[1, 2, 3, 4], &[&w, &mu, &nu]).is_err());
        assert!(t.store(&[1], &[&w, &nu, &nu]).is_err());
        assert!(t.gather(&[6], 1).is_err());
        let s = t.snapshot("t").unwrap();
        assert_eq!(s.rows, [0, 1, 4]);
        assert_eq!(floats(&s.moments[1].1), [0.0, 0.0, 5.0, 6.0, 7.0, 8.0]);
        let mut back = table();
        let moments: Vec<HostArray> = s.moments.into_iter().map(|m| m.1).collect();
        back.restore(&s.rows, &moments).unwrap();
        assert_eq!(floats(&back.gather(&[1, 4], 2).unwrap()[2]), [5.0, 6.0, 7.0, 8.0]);
    }
}
