//! Finished programs.

use tensor::{DType, Shape};

use crate::op::{Body, Node};
use crate::sharding::{Mesh, Sharding};

/// One input of a program, in the order of its arguments.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InputSpec {
    /// Its name, unique among the inputs.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Global shape.
    pub shape: Shape,
    /// Whether the caller gives its memory away.
    pub donated: bool,
    /// How it is laid out over the mesh; `None`: whole on every device.
    pub sharding: Option<Sharding>,
}

/// One output of a program, in the order of its results.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutputSpec {
    /// Its name, unique among the outputs.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Global shape.
    pub shape: Shape,
    /// How it is laid out over the mesh; `None`: whole on every device.
    pub sharding: Option<Sharding>,
    /// Index of the donated input whose memory it takes over.
    pub reuses: Option<usize>,
}

/// Which products print as calls of a function that the runtime provides, rather than as ops of the compiler.
///
/// The function gets both operands as `[batch, m, k]` and `[batch, k, n]`, or with the last two dimensions exchanged where the
/// attribute `lhs_transposed` or `rhs_transposed` is 1, and gives `[batch, m, n]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProductCalls {
    /// The registered name.
    pub target: String,
    /// Dtypes of operands that it takes; both have the same.
    pub dtypes: Vec<DType>,
    /// Multiplications from which a call is worth it.
    pub least_work: usize,
}

/// A finished program: inputs, outputs and the nodes between.
#[derive(Debug, Clone)]
pub struct Program {
    pub(crate) name: String,
    pub(crate) body: Body,
    /// The inputs, in argument order.
    pub inputs: Vec<InputSpec>,
    /// The outputs, in result order.
    pub outputs: Vec<OutputSpec>,
    pub(crate) mesh: Option<Mesh>,
    pub(crate) calls: Option<ProductCalls>,
}

impl Program {
    /// The name given to [`Graph::new`](crate::Graph::new).
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The nodes; operands come before their users.
    #[must_use]
    pub fn nodes(&self) -> &[Node] {
        self.body.nodes()
    }

    /// Nodes, values, inputs and outputs.
    #[must_use]
    pub fn body(&self) -> &Body {
        &self.body
    }

    /// The mesh, if one was set.
    #[must_use]
    pub fn mesh(&self) -> Option<&Mesh> {
        self.mesh.as_ref()
    }

    /// Has products computed by a function of the runtime wherever one fits it. Means nothing to a program on a mesh: calls are not
    /// partitioned.
    #[must_use]
    pub fn with_product_calls(mut self, calls: ProductCalls) -> Self {
        self.calls = self.mesh.is_none().then_some(calls);
        self
    }

    /// The program as StableHLO text: deterministic, with exact constants and without dead nodes.
    #[must_use]
    pub fn stablehlo(&self) -> String {
        crate::hlo::print(self)
    }
}
