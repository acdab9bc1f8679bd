//! Symbolic programs: builder with shape inference, reverse-mode differentiation, StableHLO printer, reference
//! interpreter.
//!
//! A [`Graph`] is built op by op; every op checks its operands at once and an error names the op, the operand types, the
//! source line that built it and the scope it stood in. [`Graph::finish`] makes a [`Program`], whose
//! [`stablehlo`](Program::stablehlo) text is what a compiler takes and which [`interp::run`] evaluates slowly
//! and plainly as an oracle for tests. [`Graph::grad`] appends the gradient of a scalar as ordinary ops.
//!
//! **Invariants:** no I/O, no plugin, no model. Operands always come before their users. The type of a result follows from
//! the op and its operand types alone. No op broadcasts or converts unless its name says so.

mod build;
mod error;
mod grad;
mod graph;
mod hlo;
mod infer;
pub mod interp;
mod op;
mod program;
mod sharding;

pub use build::{CarryAndYs, finite_min};
pub use error::{GraphError, Problem};
pub use graph::{Graph, InputOptions, OutputOptions, Scope, Value};
pub use op::{
    BinaryOp, Body, Compare, CustomCall, CustomVjp, DotDims, Node, Op, ReduceKind, Remat, Scan, TensorType, UnaryOp,
    ValueId, ValueInfo,
};
pub use program::{InputSpec, OutputSpec, ProductCalls, Program};
pub use sharding::{Mesh, Sharding};

#[cfg(test)]
mod tests;
