//! Nouns shared by every Lapidary crate: dtypes, shapes, host arrays, parameter specifications.
//!
//! **Invariant:** this crate knows no files, no XLA and no model.

mod dtype;
mod host;
mod param;
mod shape;

pub use dtype::{DType, UnknownDType};
pub use host::{AlignedBytes, Element, HostArray, HostError};
pub use param::{Axis, Init, ParamSpec, Part, Transform};
pub use shape::{Shape, ShapeError};
