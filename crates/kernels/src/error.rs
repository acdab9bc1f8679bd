//! What can be wrong with a matrix or a product.

use crate::Format;

/// A matrix or a product that cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KernelError {
    /// The bytes are not those of such a matrix.
    #[error("a matrix [{n}, {k}] of {format} takes {needed} bytes, got {got}")]
    Size {
        /// How the matrix is stored.
        format: Format,
        /// Rows.
        n: usize,
        /// Columns.
        k: usize,
        /// Bytes it takes.
        needed: usize,
        /// Bytes there are.
        got: usize,
    },
    /// A matrix too large to address.
    #[error("a matrix [{n}, {k}] is too large")]
    TooLarge {
        /// Rows.
        n: usize,
        /// Columns.
        k: usize,
    },
    /// The matrix's columns and the vector's length differ.
    #[error("x has {len} elements, and {m} rows of {k} columns are wanted (matrix {index})")]
    X {
        /// Position of the matrix among those of the product.
        index: usize,
        /// Elements of x.
        len: usize,
        /// Rows of x.
        m: usize,
        /// Columns of the matrix.
        k: usize,
    },
    /// The result has another size than the product.
    #[error("result {index} has room for {len} elements, and {m} rows of {n} are computed")]
    Out {
        /// Position of the matrix among those of the product.
        index: usize,
        /// Elements of the result.
        len: usize,
        /// Rows of x.
        m: usize,
        /// Rows of the matrix.
        n: usize,
    },
    /// As many results as matrices are needed.
    #[error("{matrices} matrices and {results} results")]
    Count {
        /// Number of matrices.
        matrices: usize,
        /// Number of results.
        results: usize,
    },
    /// An operand or the result of a product has another size than it says.
    #[error("{what} has {got} elements, and {batch} times {a} by {b} are wanted")]
    Operand {
        /// Which.
        what: &'static str,
        /// Elements it has.
        got: usize,
        /// Products beside each other.
        batch: usize,
        /// Extent.
        a: usize,
        /// Extent.
        b: usize,
    },
    /// Operands are of two kinds.
    #[error("both operands of a product must be f32, or both bf16")]
    Mixed,
    /// Heads are whole numbers of 32 elements, or of 2 over a cache.
    #[error("heads of {0} elements are no multiple of 32 (of 2 over a cache)")]
    Width(usize),
    /// A cache without room, or a position before the first.
    #[error("positions must not be negative, and a cache needs rows (it has {rows})")]
    Positions {
        /// Rows of the cache.
        rows: usize,
    },
    /// A function without a form for every machine.
    #[error("this machine lacks the vector instructions that this function needs")]
    Instructions,
    /// A weight that is infinite or not a number cannot be quantised.
    #[error("row {row} of the matrix holds a value that is not finite, and cannot be quantised")]
    NotFinite {
        /// The first such row found.
        row: usize,
    },
    /// Matrices are quantised to 8 or 4 bits.
    #[error("{0} is no format to quantise to; int8 and int4 are")]
    NotQuantized(Format),
    /// Quantised matrices cannot be quantised again.
    #[error("a matrix of {0} is quantised already")]
    Quantized(Format),
    /// There is no memory for the quantised matrix.
    #[error("no memory for {bytes} bytes: {reason}")]
    Memory {
        /// Bytes wanted.
        bytes: usize,
        /// What the system said.
        reason: String,
    },
}
