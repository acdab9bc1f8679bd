//! Errors of graph construction.

use std::fmt;
use std::panic::Location;

use tensor::DType;

use crate::TensorType;

/// An op that could not be built, with where it was tried.
#[derive(Clone, thiserror::Error)]
pub struct GraphError(Box<Details>);

#[derive(Clone)]
struct Details {
    op: String,
    operands: Vec<TensorType>,
    problem: Problem,
    location: &'static Location<'static>,
    scope: String,
}

/// What is wrong with an op.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// A value of another graph was used.
    #[error(
        "operand {operand} belongs to another graph; hand it in as an input (to a scan or remat body: as one of its arguments)"
    )]
    ForeignValue {
        /// Position of the operand.
        operand: usize,
    },
    /// Operands that must agree in dtype do not.
    #[error("operands must have the same dtype; convert one of them")]
    DTypesDiffer,
    /// Operands that must agree in shape do not.
    #[error("operands must have the same shape; broadcast explicitly")]
    ShapesDiffer,
    /// The op does not take this dtype.
    #[error("operand {operand} has dtype {found}, expected {expected}")]
    DType {
        /// Position of the operand.
        operand: usize,
        /// Its dtype.
        found: DType,
        /// What the op takes.
        expected: &'static str,
    },
    /// An attribute (dimension, bound, size, name) does not fit the operands.
    #[error("{0}")]
    Attribute(String),
    /// The wrong number of operands.
    #[error("takes {expected} operands, got {got}")]
    Arity {
        /// How many it takes.
        expected: usize,
        /// How many were given.
        got: usize,
    },
}

impl GraphError {
    pub(crate) fn new(
        op: impl Into<String>,
        operands: Vec<TensorType>,
        problem: Problem,
        location: &'static Location<'static>,
        scope: &str,
    ) -> Self {
        GraphError(Box::new(Details { op: op.into(), operands, problem, location, scope: scope.to_owned() }))
    }

    /// The op, as StableHLO names it.
    #[must_use]
    pub fn op(&self) -> &str {
        &self.0.op
    }

    /// What is wrong.
    #[must_use]
    pub fn problem(&self) -> &Problem {
        &self.0.problem
    }

    /// The source line that tried to build it.
    #[must_use]
    pub fn location(&self) -> &'static Location<'static> {
        self.0.location
    }

    /// The scope path it was built in, elements joined by `/`; empty at top level.
    #[must_use]
    pub fn scope(&self) -> &str {
        &self.0.scope
    }
}

impl fmt::Display for GraphError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let d = &*self.0;
        write!(f, "{}(", d.op)?;
        for (i, t) in d.operands.iter().enumerate() {
            if i > 0 {
                f.write_str(", ")?;
            }
            write!(f, "{t}")?;
        }
        write!(f, "): {} (built at {}:{}", d.problem, d.location.file(), d.location.line())?;
        if !d.scope.is_empty() {
            write!(f, ", in {}", d.scope)?;
        }
        f.write_str(")")
    }
}

impl fmt::Debug for GraphError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GraphError({self})")
    }
}
