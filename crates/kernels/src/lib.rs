//! Products on the CPU: of a few rows with large matrices, at the speed of memory, and of large matrices with each other.
//!
//! Decoding multiplies one vector, or a few, with every weight of a model. Each weight is used once a step, so that the
//! time is that of reading the weights; the code here does nothing else that takes time. A [`Matrix`] is a weight
//! `[n, k]` where it lies (a mapped file at any alignment); a [`Pool`] is the threads; [`products`] computes
//! `x · wᵀ` for several matrices that share their `x`.
//!
//! ```
//! use kernels::{Bytes, Matrix, Out, Pool, Rows, products};
//! let w: Vec<u8> = [1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0].iter().flat_map(|v| v.to_le_bytes()).collect();
//! let w = Matrix::f32(Bytes::from(w), 3, 2)?;
//! let mut y = [0.0; 3];
//! products(&Pool::new(2), Rows::F32(&[1.0, 10.0]), 1, &[&w], &mut [Out::F32(&mut y)])?;
//! assert_eq!(y, [21.0, 43.0, 65.0]);
//! # Ok::<(), kernels::KernelError>(())
//! ```
//!
//! Training multiplies many rows by many columns: [`matmul`], and [`attention`] with [its gradient](attention_gradient). Those run
//! on whatever threads the caller lends.
//!
//! **Invariants.** Nothing here knows graphs, XLA, files or models. The result for one row of `x` does not depend on the
//! other rows, on the number of threads or on what else is computed: sums run in one fixed order per instruction set.

#![allow(unsafe_code)]
#![warn(unsafe_op_in_unsafe_fn, clippy::undocumented_unsafe_blocks)]

mod attention;
mod bandwidth;
mod bytes;
mod error;
#[cfg(target_arch = "x86_64")]
mod exp;
mod fused;
mod gemm;
mod level;
mod matrix;
mod pool;
mod product;
mod quantize;
mod rows;
mod split;
mod step;
mod tasks;
mod tiles;

pub use attention::{Attention, Given, Operands, Places, attention, attention_gradient};
pub use bandwidth::Reading;
pub use bytes::Bytes;
pub use error::KernelError;
pub use fused::{
    Adam, CrossEntropy, Losses, NormGradient, RmsNorm, State, adam, cross_entropy, gated_gelu, gated_gelu_gradient,
    rms_norm, rms_norm_gradient, squares,
};
pub use gemm::{Product, has_bf16_products, has_wide_products, matmul};
pub use level::Level;
pub use matrix::{Format, Matrix};
pub use pool::Pool;
pub use product::{Out, Rows, products, products_before};
pub use step::{Around, Heads, NewKeys, RowNorm, Then, attend, products_around, write_keys};
pub use tasks::Run;
