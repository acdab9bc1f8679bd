//! Elementwise ops: operands of one dtype and one shape, no implicit broadcasting.

use tensor::DType;

use crate::op::{BinaryOp, Compare, Op, UnaryOp};
use crate::{Graph, GraphError, Value};

type Result<T> = std::result::Result<T, GraphError>;

macro_rules! unary {
    ($($(#[$m:meta])* $name:ident = $op:ident;)*) => {
        /// Elementwise functions of one operand. An operand of a dtype that the function does not take is an error.
        impl Graph {$(
            $(#[$m])*
            #[track_caller]
            #[allow(clippy::missing_errors_doc)]
            pub fn $name(&self, x: Value) -> Result<Value> {
                self.one(Op::Unary(UnaryOp::$op), &[x])
            }
        )*}
    };
}

macro_rules! binary {
    ($($(#[$m:meta])* $name:ident = $op:ident;)*) => {
        /// Elementwise functions of two operands, which must have one dtype and one shape.
        impl Graph {$(
            $(#[$m])*
            #[track_caller]
            #[allow(clippy::missing_errors_doc)]
            pub fn $name(&self, a: Value, b: Value) -> Result<Value> {
                self.one(Op::Binary(BinaryOp::$op), &[a, b])
            }
        )*}
    };
}

unary! {
    /// `-x` (float, integer).
    neg = Neg;
    /// Absolute value (float, signed integer).
    abs = Abs;
    /// Sign: -1, 0, 1 (float, signed integer).
    sign = Sign;
    /// `e^x` (float).
    exp = Exp;
    /// `e^x - 1`, accurate near 0 (float).
    expm1 = Expm1;
    /// Natural logarithm (float).
    log = Log;
    /// `log(1 + x)`, accurate near 0 (float).
    log1p = Log1p;
    /// Hyperbolic tangent (float).
    tanh = Tanh;
    /// `1 / (1 + e^-x)` (float).
    logistic = Logistic;
    /// Square root (float).
    sqrt = Sqrt;
    /// `1 / sqrt(x)` (float).
    rsqrt = Rsqrt;
    /// Sine of radians (float).
    sin = Sin;
    /// Cosine of radians (float).
    cos = Cos;
    /// Largest integer not above (float).
    floor = Floor;
    /// Smallest integer not below (float).
    ceil = Ceil;
    /// Complement: logical for bool, bitwise for integers.
    not = Not;
}

binary! {
    /// `a + b` (float, integer).
    add = Add;
    /// `a - b` (float, integer).
    sub = Sub;
    /// `a * b` (float, integer).
    mul = Mul;
    /// `a / b` (float, integer; integers truncate towards zero).
    div = Div;
    /// Remainder with the sign of `a` (float, integer).
    rem = Rem;
    /// The larger; NaN wins (float, integer).
    max = Max;
    /// The smaller; NaN wins (float, integer).
    min = Min;
    /// `a` to the power `b` (float).
    pow = Pow;
    /// And: logical for bool, bitwise for integers.
    and = And;
    /// Or: logical for bool, bitwise for integers.
    or = Or;
    /// Exclusive or: logical for bool, bitwise for integers.
    xor = Xor;
}

impl Graph {
    /// Compares element by element; the result is bool.
    ///
    /// # Errors
    /// When the operands differ in dtype or shape, or bools are ordered.
    #[track_caller]
    pub fn compare(&self, direction: Compare, a: Value, b: Value) -> Result<Value> {
        self.one(Op::Compare(direction), &[a, b])
    }

    /// `pred ? on_true : on_false`; `pred` is bool, of the same shape or a scalar.
    ///
    /// # Errors
    /// When dtypes or shapes do not fit.
    #[track_caller]
    pub fn select(&self, pred: Value, on_true: Value, on_false: Value) -> Result<Value> {
        self.one(Op::Select, &[pred, on_true, on_false])
    }

    /// `min(max(x, lo), hi)`; the bounds have the shape of `x` or are scalars.
    ///
    /// # Errors
    /// When dtypes or shapes do not fit.
    #[track_caller]
    pub fn clamp(&self, lo: Value, x: Value, hi: Value) -> Result<Value> {
        self.one(Op::Clamp, &[lo, x, hi])
    }

    /// Converts to another dtype: floats round to nearest even, floats to integers truncate, anything to bool is "not zero".
    /// A value that already has the dtype is returned as it is.
    ///
    /// # Errors
    /// When the value belongs to another graph.
    #[track_caller]
    pub fn convert(&self, x: Value, dtype: DType) -> Result<Value> {
        self.check_foreign("convert", &[x])?;
        if self.dtype(x) == dtype {
            return Ok(x);
        }
        self.one(Op::Convert(dtype), &[x])
    }

    /// Rounds floats to `exponent` and `mantissa` bits and back; the dtype stays. bf16 is 8 and 7.
    ///
    /// # Errors
    /// When the operand is not a float or the bits are out of range.
    #[track_caller]
    pub fn reduce_precision(&self, x: Value, exponent: u32, mantissa: u32) -> Result<Value> {
        self.one(Op::ReducePrecision { exponent, mantissa }, &[x])
    }

    /// `x + s`; `s` is rounded to the dtype of `x` first.
    ///
    /// # Errors
    /// When `x` is bool or `s` is not representable in its dtype.
    #[track_caller]
    pub fn add_scalar(&self, x: Value, s: f64) -> Result<Value> {
        let c = self.full_like(x, s)?;
        self.add(x, c)
    }

    /// `x * s`; `s` is rounded to the dtype of `x` first.
    ///
    /// # Errors
    /// When `x` is bool or `s` is not representable in its dtype.
    #[track_caller]
    pub fn mul_scalar(&self, x: Value, s: f64) -> Result<Value> {
        let c = self.full_like(x, s)?;
        self.mul(x, c)
    }

    /// `a + b` after broadcasting both as numpy does.
    ///
    /// # Errors
    /// When dtypes differ or shapes do not broadcast.
    #[track_caller]
    pub fn add_bcast(&self, a: Value, b: Value) -> Result<Value> {
        let (a, b) = self.broadcast_pair(a, b)?;
        self.add(a, b)
    }

    /// `a - b` after broadcasting both as numpy does.
    ///
    /// # Errors
    /// When dtypes differ or shapes do not broadcast.
    #[track_caller]
    pub fn sub_bcast(&self, a: Value, b: Value) -> Result<Value> {
        let (a, b) = self.broadcast_pair(a, b)?;
        self.sub(a, b)
    }

    /// `a * b` after broadcasting both as numpy does.
    ///
    /// # Errors
    /// When dtypes differ or shapes do not broadcast.
    #[track_caller]
    pub fn mul_bcast(&self, a: Value, b: Value) -> Result<Value> {
        let (a, b) = self.broadcast_pair(a, b)?;
        self.mul(a, b)
    }

    /// `a / b` after broadcasting both as numpy does.
    ///
    /// # Errors
    /// When dtypes differ or shapes do not broadcast.
    #[track_caller]
    pub fn div_bcast(&self, a: Value, b: Value) -> Result<Value> {
        let (a, b) = self.broadcast_pair(a, b)?;
        self.div(a, b)
    }

    /// Compares after broadcasting both as numpy does.
    ///
    /// # Errors
    /// When dtypes differ or shapes do not broadcast.
    #[track_caller]
    pub fn compare_bcast(&self, direction: Compare, a: Value, b: Value) -> Result<Value> {
        let (a, b) = self.broadcast_pair(a, b)?;
        self.compare(direction, a, b)
    }

    /// Logical or bitwise and after broadcasting both as numpy does.
    ///
    /// # Errors
    /// When dtypes differ or shapes do not broadcast.
    #[track_caller]
    pub fn and_bcast(&self, a: Value, b: Value) -> Result<Value> {
        let (a, b) = self.broadcast_pair(a, b)?;
        self.and(a, b)
    }
}
