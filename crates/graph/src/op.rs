//! The operations of a program and the nodes that hold them.

use std::fmt;
use std::panic::Location;
use std::sync::Arc;

use tensor::{DType, HostArray, Shape};

use crate::Sharding;

/// Dtype and shape of a value.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct TensorType {
    /// The element type.
    pub dtype: DType,
    /// The shape.
    pub shape: Shape,
}

impl TensorType {
    /// A tensor type.
    #[must_use]
    pub fn new(dtype: DType, shape: impl Into<Shape>) -> Self {
        TensorType { dtype, shape: shape.into() }
    }
}

impl fmt::Display for TensorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.dtype, self.shape)
    }
}

macro_rules! named_enum {
    ($(#[$m:meta])* $name:ident { $($(#[$vm:meta])* $v:ident = $s:literal,)* }) => {
        $(#[$m])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum $name { $($(#[$vm])* $v,)* }

        impl $name {
            /// Every member, in declaration order.
            pub const ALL: &'static [$name] = &[$($name::$v),*];

            /// The name in StableHLO.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $($name::$v => $s,)* }
            }
        }
    };
}

named_enum! {
    /// Elementwise functions of one operand.
    UnaryOp {
        /// `-x`.
        Neg = "negate",
        /// Absolute value.
        Abs = "abs",
        /// -1, 0 or 1 (a NaN stays a NaN).
        Sign = "sign",
        /// `e^x`.
        Exp = "exponential",
        /// `e^x - 1`, accurate near 0.
        Expm1 = "exponential_minus_one",
        /// Natural logarithm.
        Log = "log",
        /// `log(1 + x)`, accurate near 0.
        Log1p = "log_plus_one",
        /// Hyperbolic tangent.
        Tanh = "tanh",
        /// `1 / (1 + e^-x)`.
        Logistic = "logistic",
        /// Square root.
        Sqrt = "sqrt",
        /// `1 / sqrt(x)`.
        Rsqrt = "rsqrt",
        /// Sine (radians).
        Sin = "sine",
        /// Cosine (radians).
        Cos = "cosine",
        /// Largest integer not above.
        Floor = "floor",
        /// Smallest integer not below.
        Ceil = "ceil",
        /// Logical (bool) or bitwise (integer) complement.
        Not = "not",
    }
}

named_enum! {
    /// Elementwise functions of two operands of one dtype and shape.
    BinaryOp {
        /// Sum; integers wrap.
        Add = "add",
        /// Difference; integers wrap.
        Sub = "subtract",
        /// Product; integers wrap.
        Mul = "multiply",
        /// Quotient; integers truncate towards zero.
        Div = "divide",
        /// Remainder with the sign of the dividend.
        Rem = "remainder",
        /// Larger; a NaN wins (on CPU only if compiled with `xla_cpu_enable_fast_min_max=false`).
        Max = "maximum",
        /// Smaller; a NaN wins (on CPU only if compiled with `xla_cpu_enable_fast_min_max=false`).
        Min = "minimum",
        /// Power.
        Pow = "power",
        /// Logical or bitwise and.
        And = "and",
        /// Logical or bitwise or.
        Or = "or",
        /// Logical or bitwise exclusive or.
        Xor = "xor",
    }
}

named_enum! {
    /// The direction of a comparison.
    Compare {
        /// Equal.
        Eq = "EQ",
        /// Not equal.
        Ne = "NE",
        /// Less.
        Lt = "LT",
        /// Less or equal.
        Le = "LE",
        /// Greater.
        Gt = "GT",
        /// Greater or equal.
        Ge = "GE",
    }
}

named_enum! {
    /// How a reduction combines elements.
    ReduceKind {
        /// Sum from 0.
        Sum = "add",
        /// Maximum from the smallest value (floats: minus infinity).
        Max = "maximum",
        /// Minimum from the largest value (floats: infinity).
        Min = "minimum",
        /// Logical and from true.
        And = "and",
        /// Logical or from false.
        Or = "or",
    }
}

/// Which dimensions of a [`Op::DotGeneral`] are batch and which are contracted.
///
/// The result has the batch dimensions first (in the order listed), then the free dimensions of the left, then those of the
/// right operand.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct DotDims {
    /// Batch dimensions of the left operand.
    pub lhs_batch: Vec<usize>,
    /// Batch dimensions of the right operand, in the same order.
    pub rhs_batch: Vec<usize>,
    /// Contracted dimensions of the left operand.
    pub lhs_contract: Vec<usize>,
    /// Contracted dimensions of the right operand, in the same order.
    pub rhs_contract: Vec<usize>,
}

impl DotDims {
    /// Dimensions that are neither batch nor contracted.
    pub(crate) fn free(rank: usize, batch: &[usize], contract: &[usize]) -> Vec<usize> {
        (0..rank).filter(|d| !batch.contains(d) && !contract.contains(d)).collect()
    }

    /// Free dimensions of the left operand, given its rank.
    #[must_use]
    pub fn lhs_free(&self, rank: usize) -> Vec<usize> {
        Self::free(rank, &self.lhs_batch, &self.lhs_contract)
    }

    /// Free dimensions of the right operand, given its rank.
    #[must_use]
    pub fn rhs_free(&self, rank: usize) -> Vec<usize> {
        Self::free(rank, &self.rhs_batch, &self.rhs_contract)
    }
}

/// A call of a function that the runtime provides by name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CustomCall {
    /// The registered name.
    pub target: String,
    /// Types of the results.
    pub results: Vec<TensorType>,
    /// Integer attributes handed to the function.
    pub attributes: Vec<(String, i64)>,
    /// Results, the first ones, that take over the memory of the operands at the same positions.
    pub in_place: usize,
}

/// A loop of fixed length over a body.
///
/// Operands are carry, then xs (each with leading dimension `length`), then consts; body inputs are carry, one slice of each
/// x (leading dimension dropped), consts. Body outputs are the new carry, then one y for each of the stacked results. Results
/// are the last carry, then the ys stacked along a new leading dimension.
#[derive(Debug, Clone)]
pub struct Scan {
    /// Number of steps.
    pub length: usize,
    /// Steps run from the last slice to the first; ys still line up with xs.
    pub reverse: bool,
    /// Number of carried values.
    pub carry: usize,
    /// Number of scanned operands.
    pub xs: usize,
    /// Number of loop-invariant operands.
    pub consts: usize,
    /// One step.
    pub body: Arc<Body>,
}

/// A body that runs as it is, but of which differentiation keeps only the operands and named values: the gradient runs the
/// rest again.
#[derive(Debug, Clone)]
pub struct Remat {
    /// Names ([`Op::Named`]) of the values that are kept.
    pub keep: Arc<[String]>,
    /// What is computed: one input per operand, one output per result.
    pub body: Arc<Body>,
}

/// A body with a gradient of its own.
///
/// Results are those of `forward`: first the values the caller sees, then residuals that only `backward` reads.
#[derive(Debug, Clone)]
pub struct CustomVjp {
    /// What is computed: one input per operand.
    pub forward: Arc<Body>,
    /// How many of the results the caller sees; the others are residuals.
    pub visible: usize,
    /// The gradient. Inputs: operands, residuals, one cotangent for each visible result. Outputs: gradients.
    pub backward: Arc<Body>,
    /// For every operand, which output of `backward` is its gradient.
    pub gradients: Vec<Option<usize>>,
}

/// An operation. Result types follow from the operation and its operand types alone.
#[derive(Debug, Clone)]
pub enum Op {
    /// An input of the program or body; takes no operands.
    Input {
        /// Position among the inputs.
        index: usize,
        /// Its type.
        ty: TensorType,
    },
    /// A small constant. `data` either has the type's shape or is a scalar that fills it.
    Constant {
        /// The elements, or one element that fills the shape.
        data: HostArray,
        /// Shape of the result.
        shape: Shape,
    },
    /// `0, 1, 2 ...` along one dimension.
    Iota {
        /// Type of the result.
        ty: TensorType,
        /// The dimension that counts.
        dim: usize,
    },
    /// An elementwise function of one operand.
    Unary(UnaryOp),
    /// An elementwise function of two operands.
    Binary(BinaryOp),
    /// An elementwise comparison, to bool.
    Compare(Compare),
    /// `pred ? on_true : on_false`; operands pred (same shape or scalar), on_true, on_false.
    Select,
    /// `min(max(x, lo), hi)`; operands lo, x, hi (the bounds same shape or scalar).
    Clamp,
    /// Conversion to another dtype.
    Convert(DType),
    /// Rounds floats to fewer bits and back.
    ReducePrecision {
        /// Exponent bits kept.
        exponent: u32,
        /// Mantissa bits kept.
        mantissa: u32,
    },
    /// Dimension `i` of the operand becomes `dims[i]` of the result; other dimensions repeat.
    BroadcastInDim {
        /// Shape of the result.
        shape: Shape,
        /// Where each operand dimension goes, strictly increasing.
        dims: Vec<usize>,
    },
    /// The same elements in another shape.
    Reshape(Shape),
    /// Result dimension `i` is operand dimension `perm[i]`.
    Transpose(Vec<usize>),
    /// Strided slice with fixed bounds.
    Slice {
        /// First index of each dimension.
        starts: Vec<usize>,
        /// End (exclusive) of each dimension.
        limits: Vec<usize>,
        /// Step of each dimension.
        strides: Vec<usize>,
    },
    /// Padding with a scalar; operands x, value. Negative edges crop.
    Pad {
        /// Elements before each dimension.
        low: Vec<i64>,
        /// Elements after each dimension.
        high: Vec<i64>,
        /// Elements between neighbours of each dimension.
        interior: Vec<usize>,
    },
    /// Concatenation along one dimension.
    Concatenate(usize),
    /// Reverses the order along dimensions.
    Reverse(Vec<usize>),
    /// Slice of fixed size at run-time starts; operands x, then one integer scalar per dimension. Starts are clamped.
    DynamicSlice(Vec<usize>),
    /// Overwrites a slice at run-time starts; operands x, update, then one integer scalar per dimension. Starts are clamped.
    DynamicUpdateSlice,
    /// Rows `table[ids]`; operands table `[V, D..]`, ids `[N..]`; result `[N.., D..]`. Ids are clamped into range.
    Take,
    /// Adds `updates` `[N.., D..]` to rows `ids` `[N..]` of base `[V, D..]`; ids out of range are skipped.
    ScatterAddRows,
    /// Reduction over dimensions, in the operand's own dtype.
    Reduce {
        /// How elements are combined.
        kind: ReduceKind,
        /// The dimensions that disappear, ascending.
        dims: Vec<usize>,
    },
    /// Generalised matrix product.
    DotGeneral {
        /// Batch and contracted dimensions.
        dims: DotDims,
        /// Dtype of the result (and of the accumulation, at least).
        out: DType,
    },
    /// Identity on all operands that no optimisation moves work across.
    OptimizationBarrier,
    /// Identity with a wish how the value is laid out over the mesh.
    ShardingConstraint(Sharding),
    /// Identity that gives the value a name, by which a [`Remat`] around it may keep it.
    Named(Arc<str>),
    /// A function provided by the runtime.
    CustomCall(CustomCall),
    /// A loop with its own body.
    Scan(Scan),
    /// A body that the gradient computes again.
    Remat(Remat),
    /// A body with a gradient of its own.
    CustomVjp(CustomVjp),
}

impl Op {
    /// The name in StableHLO, or of the structured op.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Op::Input { .. } => "input",
            Op::Constant { .. } => "constant",
            Op::Iota { .. } => "iota",
            Op::Unary(u) => u.name(),
            Op::Binary(b) => b.name(),
            Op::Compare(_) => "compare",
            Op::Select => "select",
            Op::Clamp => "clamp",
            Op::Convert(_) => "convert",
            Op::ReducePrecision { .. } => "reduce_precision",
            Op::BroadcastInDim { .. } => "broadcast_in_dim",
            Op::Reshape(_) => "reshape",
            Op::Transpose(_) => "transpose",
            Op::Slice { .. } => "slice",
            Op::Pad { .. } => "pad",
            Op::Concatenate(_) => "concatenate",
            Op::Reverse(_) => "reverse",
            Op::DynamicSlice(_) => "dynamic_slice",
            Op::DynamicUpdateSlice => "dynamic_update_slice",
            Op::Take => "take",
            Op::ScatterAddRows => "scatter_add_rows",
            Op::Reduce { .. } => "reduce",
            Op::DotGeneral { .. } => "dot_general",
            Op::OptimizationBarrier => "optimization_barrier",
            Op::ShardingConstraint(_) => "sharding_constraint",
            Op::Named(_) => "named",
            Op::CustomCall(_) => "custom_call",
            Op::Scan(_) => "scan",
            Op::Remat(_) => "remat",
            Op::CustomVjp(_) => "custom_vjp",
        }
    }
}

/// The position of a value in its body: values are numbered in the order they were built, but for the results that
/// differentiation adds to a scan later.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ValueId(pub(crate) u32);

impl ValueId {
    /// The position as an index into [`Body::values`].
    #[must_use]
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// One operation with its operands and results. Operands are always results of earlier nodes.
#[derive(Debug, Clone)]
pub struct Node {
    pub(crate) op: Op,
    pub(crate) inputs: Vec<ValueId>,
    pub(crate) outputs: Vec<ValueId>,
    pub(crate) location: &'static Location<'static>,
    pub(crate) scope: Arc<str>,
}

impl Node {
    /// The operation.
    #[must_use]
    pub fn op(&self) -> &Op {
        &self.op
    }

    /// The operands.
    #[must_use]
    pub fn inputs(&self) -> &[ValueId] {
        &self.inputs
    }

    /// The results.
    pub fn outputs(&self) -> impl ExactSizeIterator<Item = ValueId> + '_ {
        self.outputs.iter().copied()
    }

    /// The source line that built it.
    #[must_use]
    pub fn location(&self) -> &'static Location<'static> {
        self.location
    }

    /// The scope path it was built in.
    #[must_use]
    pub fn scope(&self) -> &str {
        &self.scope
    }
}

/// What is known of a value.
#[derive(Debug, Clone)]
pub struct ValueInfo {
    pub(crate) ty: TensorType,
    pub(crate) node: u32,
    pub(crate) sharding: Option<Sharding>,
}

impl ValueInfo {
    /// Dtype and shape.
    #[must_use]
    pub fn ty(&self) -> &TensorType {
        &self.ty
    }

    /// Index of the node that makes it, in [`Body::nodes`].
    #[must_use]
    pub fn node(&self) -> usize {
        self.node as usize
    }

    /// How it is laid out over the mesh, if that was said.
    #[must_use]
    pub fn sharding(&self) -> Option<&Sharding> {
        self.sharding.as_ref()
    }
}

/// Nodes in topological order with the inputs and outputs among their values: a program, or the body of a structured op.
#[derive(Debug, Clone, Default)]
pub struct Body {
    pub(crate) nodes: Vec<Node>,
    pub(crate) values: Vec<ValueInfo>,
    pub(crate) inputs: Vec<ValueId>,
    pub(crate) outputs: Vec<ValueId>,
}

impl Body {
    /// The nodes; operands come before their users.
    #[must_use]
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// The values, indexed by [`ValueId::index`].
    #[must_use]
    pub fn values(&self) -> &[ValueInfo] {
        &self.values
    }

    /// The values that are inputs, in order.
    #[must_use]
    pub fn inputs(&self) -> &[ValueId] {
        &self.inputs
    }

    /// The values that are outputs, in order.
    #[must_use]
    pub fn outputs(&self) -> &[ValueId] {
        &self.outputs
    }

    /// Dtype and shape of a value.
    #[must_use]
    pub fn ty(&self, v: ValueId) -> &TensorType {
        &self.values[v.index()].ty
    }

    /// For every node, whether an output depends on it.
    #[must_use]
    pub fn live(&self) -> Vec<bool> {
        self.live_for(&self.outputs)
    }

    /// For every node, whether one of these values depends on it.
    pub(crate) fn live_for(&self, roots: &[ValueId]) -> Vec<bool> {
        self.live_without(roots, |_| false)
    }

    /// For every node, whether one of these values depends on it otherwise than through values that are given.
    pub(crate) fn live_without(&self, roots: &[ValueId], given: impl Fn(ValueId) -> bool) -> Vec<bool> {
        let mut live = vec![false; self.nodes.len()];
        for v in roots.iter().filter(|&&v| !given(v)) {
            live[self.values[v.index()].node()] = true;
        }
        for i in (0..self.nodes.len()).rev() {
            if live[i] {
                for v in self.nodes[i].inputs.iter().filter(|&&v| !given(v)) {
                    live[self.values[v.index()].node()] = true;
                }
            }
        }
        live
    }
}
