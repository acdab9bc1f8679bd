//! Constants: small ones only, since they stand in the program text.

use std::panic::Location;

use tensor::{DType, HostArray, Shape};

use crate::op::{Op, TensorType};
use crate::{Graph, GraphError, Problem, Value};

type Result<T> = std::result::Result<T, GraphError>;

/// Largest constant in bytes; more would bloat the program text and its compilation.
const MAX_CONSTANT: usize = 64 << 10;

/// The most negative finite value of a float dtype, or the smallest of an integer dtype: what masks add or select.
#[must_use]
pub fn finite_min(dtype: DType) -> f64 {
    match dtype {
        DType::Bool | DType::U8 | DType::U16 | DType::U32 | DType::U64 => 0.0,
        DType::I8 => f64::from(i8::MIN),
        DType::I16 => f64::from(i16::MIN),
        DType::I32 => f64::from(i32::MIN),
        DType::I64 => i64::MIN as f64,
        DType::F16 => f64::from(half::f16::MIN),
        DType::BF16 => f64::from(half::bf16::MIN),
        DType::F32 => f64::from(f32::MIN),
        DType::F64 => f64::MIN,
    }
}

impl Graph {
    /// A constant array of at most 64 KiB, exact.
    ///
    /// # Errors
    /// When it is larger: pass it as an input then.
    #[track_caller]
    pub fn constant(&self, data: HostArray) -> Result<Value> {
        let n = data.bytes().len();
        if n > MAX_CONSTANT {
            let p = Problem::Attribute(format!(
                "{}{} is {n} bytes; constants are at most {MAX_CONSTANT}: pass it as an input",
                data.dtype(),
                data.shape()
            ));
            return Err(self.error("constant", &[], p));
        }
        let shape = data.shape().clone();
        self.one(Op::Constant { data, shape }, &[])
    }

    /// A scalar constant. Floats round to nearest even; infinities and NaN are allowed.
    ///
    /// # Errors
    /// When a finite value overflows a float dtype, or the dtype cannot hold the value exactly and is not a float.
    #[track_caller]
    pub fn scalar(&self, dtype: DType, value: f64) -> Result<Value> {
        self.splat(dtype, Shape::scalar(), value)
    }

    /// A scalar constant of the dtype of `x`.
    ///
    /// # Errors
    /// As [`Graph::scalar`].
    #[track_caller]
    pub fn scalar_like(&self, x: Value, value: f64) -> Result<Value> {
        self.check_foreign("constant", &[x])?;
        self.scalar(self.dtype(x), value)
    }

    /// An array filled with one constant.
    ///
    /// # Errors
    /// As [`Graph::scalar`], or when the shape overflows.
    #[track_caller]
    pub fn splat(&self, dtype: DType, shape: impl Into<Shape>, value: f64) -> Result<Value> {
        let at = Location::caller();
        let bad = |m: String| self.error_at(at, "constant", &[], Problem::Attribute(m));
        let data = HostArray::from_f64(dtype, Shape::scalar(), &[value]).map_err(|e| bad(e.to_string()))?;
        let back = data.to_f64()[0];
        if dtype.is_float() {
            if value.is_finite() && !back.is_finite() {
                return Err(bad(format!("{value} overflows {dtype}; its smallest value is {}", finite_min(dtype))));
            }
        } else if back != value {
            return Err(bad(format!("{value} is not a value of {dtype}")));
        }
        self.one(Op::Constant { data, shape: shape.into() }, &[])
    }

    /// An array of the dtype and shape of `x`, filled with one constant.
    ///
    /// # Errors
    /// As [`Graph::splat`].
    #[track_caller]
    pub fn full_like(&self, x: Value, value: f64) -> Result<Value> {
        self.check_foreign("constant", &[x])?;
        let ty = self.ty(x);
        self.splat(ty.dtype, ty.shape, value)
    }

    /// `0, 1, 2 ...` along dimension `dim`, the same along the others.
    ///
    /// # Errors
    /// When `dim` is out of range or the dtype is bool.
    #[track_caller]
    pub fn iota(&self, dtype: DType, shape: impl Into<Shape>, dim: usize) -> Result<Value> {
        self.one(Op::Iota { ty: TensorType::new(dtype, shape), dim }, &[])
    }
}
