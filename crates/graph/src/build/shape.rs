//! Ops that move elements without computing.

use tensor::Shape;

use crate::op::Op;
use crate::{Graph, GraphError, Problem, Value};

type Result<T> = std::result::Result<T, GraphError>;

impl Graph {
    /// Operand dimension `i` becomes result dimension `dims[i]` (ascending); other dimensions, and those of size 1, repeat.
    ///
    /// # Errors
    /// When `dims` or sizes do not fit.
    #[track_caller]
    pub fn broadcast_in_dim(&self, x: Value, shape: impl Into<Shape>, dims: &[usize]) -> Result<Value> {
        self.one(Op::BroadcastInDim { shape: shape.into(), dims: dims.to_vec() }, &[x])
    }

    /// Broadcasts as numpy does: trailing dimensions line up, sizes 1 repeat. A value of that shape is returned as it is.
    ///
    /// # Errors
    /// When the shape does not broadcast.
    #[track_caller]
    pub fn broadcast_to(&self, x: Value, shape: impl Into<Shape>) -> Result<Value> {
        let shape = shape.into();
        self.check_foreign("broadcast_in_dim", &[x])?;
        let from = self.shape(x);
        if from == shape {
            return Ok(x);
        }
        let Some(lead) = shape.rank().checked_sub(from.rank()) else {
            let p = Problem::Attribute(format!("cannot broadcast to {shape}, which has fewer dimensions"));
            return Err(self.error("broadcast_in_dim", &[x], p));
        };
        let dims: Vec<usize> = (lead..shape.rank()).collect();
        self.broadcast_in_dim(x, shape, &dims)
    }

    /// Both operands broadcast to their common shape as numpy does.
    #[track_caller]
    pub(crate) fn broadcast_pair(&self, a: Value, b: Value) -> Result<(Value, Value)> {
        self.check_foreign("broadcast_in_dim", &[a, b])?;
        let (sa, sb) = (self.shape(a), self.shape(b));
        let rank = sa.rank().max(sb.rank());
        let extent = |s: &Shape, d: usize| (d + s.rank()).checked_sub(rank).map_or(1, |i| s[i]);
        let mut common = Vec::with_capacity(rank);
        for d in 0..rank {
            common.push(match (extent(&sa, d), extent(&sb, d)) {
                (x, y) if x == y => x,
                (1, y) => y,
                (x, 1) => x,
                (x, y) => {
                    let p = Problem::Attribute(format!("sizes {x} and {y} do not broadcast (dimension {d} of {rank})"));
                    return Err(self.error("broadcast_in_dim", &[a, b], p));
                }
            });
        }
        Ok((self.broadcast_to(a, common.as_slice())?, self.broadcast_to(b, common)?))
    }

    /// The same elements in row-major order in another shape. A value of that shape is returned as it is.
    ///
    /// # Errors
    /// When the number of elements differs.
    #[track_caller]
    pub fn reshape(&self, x: Value, shape: impl Into<Shape>) -> Result<Value> {
        let shape = shape.into();
        self.check_foreign("reshape", &[x])?;
        if self.shape(x) == shape {
            return Ok(x);
        }
        self.one(Op::Reshape(shape), &[x])
    }

    /// Inserts a dimension of size 1 before dimension `dim` (`dim` may be the rank).
    ///
    /// # Errors
    /// When `dim` is beyond the rank.
    #[track_caller]
    pub fn expand_dim(&self, x: Value, dim: usize) -> Result<Value> {
        self.check_foreign("reshape", &[x])?;
        let mut dims = self.dims(x);
        if dim > dims.len() {
            let p = Problem::Attribute(format!("cannot insert dimension {dim} into rank {}", dims.len()));
            return Err(self.error("reshape", &[x], p));
        }
        dims.insert(dim, 1);
        self.reshape(x, dims)
    }

    /// Result dimension `i` is operand dimension `perm[i]`.
    ///
    /// # Errors
    /// When `perm` is not a permutation of the dimensions.
    #[track_caller]
    pub fn transpose(&self, x: Value, perm: &[usize]) -> Result<Value> {
        self.one(Op::Transpose(perm.to_vec()), &[x])
    }

    /// Elements `starts[d], starts[d] + strides[d], ...` below `limits[d]` of every dimension.
    ///
    /// # Errors
    /// When bounds do not fit the operand or a stride is 0.
    #[track_caller]
    pub fn slice(&self, x: Value, starts: &[usize], limits: &[usize], strides: &[usize]) -> Result<Value> {
        let op = Op::Slice { starts: starts.to_vec(), limits: limits.to_vec(), strides: strides.to_vec() };
        self.one(op, &[x])
    }

    /// Elements `start..limit` of one dimension, all of the others.
    ///
    /// # Errors
    /// When the dimension or bounds do not fit the operand.
    #[track_caller]
    pub fn slice_dim(&self, x: Value, dim: usize, start: usize, limit: usize) -> Result<Value> {
        self.check_foreign("slice", &[x])?;
        let mut limits = self.dims(x);
        let mut starts = vec![0; limits.len()];
        let strides = vec![1; limits.len()];
        if dim >= limits.len() {
            let p = Problem::Attribute(format!("dimension {dim} is out of range for rank {}", limits.len()));
            return Err(self.error("slice", &[x], p));
        }
        starts[dim] = start;
        limits[dim] = limit;
        self.slice(x, &starts, &limits, &strides)
    }

    /// Puts `low[d]` copies of the scalar `value` before, `high[d]` after and `interior[d]` between the elements of every
    /// dimension. Negative `low` and `high` crop.
    ///
    /// # Errors
    /// When dtypes or lengths do not fit, or a size would be negative.
    #[track_caller]
    pub fn pad(&self, x: Value, value: Value, low: &[i64], high: &[i64], interior: &[usize]) -> Result<Value> {
        let op = Op::Pad { low: low.to_vec(), high: high.to_vec(), interior: interior.to_vec() };
        self.one(op, &[x, value])
    }

    /// Joins values along dimension `dim`. A single value is returned as it is.
    ///
    /// # Errors
    /// When there is none, or dtypes or other dimensions differ.
    #[track_caller]
    pub fn concatenate(&self, xs: &[Value], dim: usize) -> Result<Value> {
        let joined = self.one(Op::Concatenate(dim), xs);
        match xs {
            [x] if joined.is_ok() => Ok(*x),
            _ => joined,
        }
    }

    /// Reverses the order of elements along `dims`.
    ///
    /// # Errors
    /// When a dimension is out of range or listed twice.
    #[track_caller]
    pub fn reverse(&self, x: Value, dims: &[usize]) -> Result<Value> {
        self.one(Op::Reverse(dims.to_vec()), &[x])
    }
}
