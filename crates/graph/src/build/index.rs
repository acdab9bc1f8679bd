//! Ops whose positions are known at run time only.

use crate::op::Op;
use crate::{Graph, GraphError, Value};

type Result<T> = std::result::Result<T, GraphError>;

impl Graph {
    /// The slice of `sizes` that begins at `starts` (one integer scalar per dimension). Starts are clamped so that the slice
    /// fits.
    ///
    /// # Errors
    /// When sizes do not fit or a start is no integer scalar.
    #[track_caller]
    pub fn dynamic_slice(&self, x: Value, starts: &[Value], sizes: &[usize]) -> Result<Value> {
        self.one(Op::DynamicSlice(sizes.to_vec()), &[&[x], starts].concat())
    }

    /// `x` with the slice that begins at `starts` (one integer scalar per dimension) replaced by `update`. Starts are clamped
    /// so that the slice fits.
    ///
    /// # Errors
    /// When dtypes differ, the update does not fit, or a start is no integer scalar.
    #[track_caller]
    pub fn dynamic_update_slice(&self, x: Value, update: Value, starts: &[Value]) -> Result<Value> {
        self.one(Op::DynamicUpdateSlice, &[&[x, update], starts].concat())
    }

    /// Rows of a table: table `[V, D..]` and ids `[N..]` give `[N.., D..]`. Ids out of range are clamped (that is what the
    /// compiled program does, silently): check them on the host.
    ///
    /// # Errors
    /// When ids are not integers or the table has no rows.
    #[track_caller]
    pub fn take(&self, table: Value, ids: Value) -> Result<Value> {
        self.one(Op::Take, &[table, ids])
    }

    /// `base` `[V, D..]` with `updates` `[N.., D..]` added to the rows `ids` `[N..]`; repeated ids add up, in no fixed order.
    /// Updates of ids out of range are dropped.
    ///
    /// # Errors
    /// When dtypes or shapes do not fit.
    #[track_caller]
    pub fn scatter_add_rows(&self, base: Value, ids: Value, updates: Value) -> Result<Value> {
        self.one(Op::ScatterAddRows, &[base, ids, updates])
    }
}
