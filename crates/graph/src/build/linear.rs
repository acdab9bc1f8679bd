//! Reductions and matrix products.

use tensor::DType;

use crate::op::{DotDims, Op, ReduceKind};
use crate::{Graph, GraphError, Problem, Value};

type Result<T> = std::result::Result<T, GraphError>;

macro_rules! reductions {
    ($($(#[$m:meta])* $name:ident, $keep:ident = $kind:ident;)*) => {
        /// Reductions over `dims` (any order, each at most once). XLA accumulates in the operand's own dtype: convert bf16 to
        /// f32 before a sum. Without dimensions the value is returned as it is. The `_keep` forms leave dimensions of size 1.
        impl Graph {$(
            $(#[$m])*
            #[track_caller]
            #[allow(clippy::missing_errors_doc)]
            pub fn $name(&self, x: Value, dims: &[usize]) -> Result<Value> {
                self.reduce(ReduceKind::$kind, x, dims, false)
            }

            $(#[$m])*
            /// Reduced dimensions stay, with size 1.
            #[track_caller]
            #[allow(clippy::missing_errors_doc)]
            pub fn $keep(&self, x: Value, dims: &[usize]) -> Result<Value> {
                self.reduce(ReduceKind::$kind, x, dims, true)
            }
        )*}
    };
}

reductions! {
    /// Sum (float, integer), accumulated in the operand's dtype.
    reduce_sum, reduce_sum_keep = Sum;
    /// Maximum (float, integer).
    reduce_max, reduce_max_keep = Max;
    /// Minimum (float, integer).
    reduce_min, reduce_min_keep = Min;
    /// And (bool, integer).
    reduce_and, reduce_and_keep = And;
    /// Or (bool, integer).
    reduce_or, reduce_or_keep = Or;
}

impl Graph {
    #[track_caller]
    fn reduce(&self, kind: ReduceKind, x: Value, dims: &[usize], keep: bool) -> Result<Value> {
        self.check_foreign("reduce", &[x])?;
        let mut dims = dims.to_vec();
        dims.sort_unstable();
        if dims.is_empty() {
            return Ok(x);
        }
        let mut kept = self.dims(x);
        let y = self.one(Op::Reduce { kind, dims: dims.clone() }, &[x])?;
        if !keep {
            return Ok(y);
        }
        for d in dims {
            kept[d] = 1;
        }
        self.reshape(y, kept)
    }

    /// Generalised matrix product with a result (and accumulation) of dtype `out`. Result dimensions: batch, free of the
    /// left, free of the right.
    ///
    /// # Errors
    /// When operand dtypes differ, `out` is of another kind or narrower, or dimensions do not pair up.
    #[track_caller]
    pub fn dot_general(&self, lhs: Value, rhs: Value, dims: DotDims, out: DType) -> Result<Value> {
        self.one(Op::DotGeneral { dims, out }, &[lhs, rhs])
    }

    /// `x` `[.., k]` times the transpose of `w` `[n, k]`: `[.., n]`. Weights are `[out, in]`.
    ///
    /// # Errors
    /// When `w` is not a matrix, the inner sizes differ, or dtypes do not fit.
    #[track_caller]
    pub fn matmul_nt(&self, x: Value, w: Value, out: DType) -> Result<Value> {
        self.check_foreign("dot_general", &[x, w])?;
        let (rank, wrank) = (self.shape(x).rank(), self.shape(w).rank());
        if rank == 0 || wrank != 2 {
            let p = Problem::Attribute("needs x of shape [.., k] and w of shape [n, k]".into());
            return Err(self.error("dot_general", &[x, w], p));
        }
        let dims = DotDims { lhs_contract: vec![rank - 1], rhs_contract: vec![1], ..DotDims::default() };
        self.dot_general(x, w, dims, out)
    }
}
