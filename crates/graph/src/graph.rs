//! The builder's state: values, nodes, inputs, outputs, scopes.

use std::cell::{Ref, RefCell};
use std::fmt;
use std::panic::Location;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use tensor::{DType, Shape};

use crate::infer::infer;
use crate::op::{Body, CustomVjp, Node, Op, Remat, Scan, TensorType, ValueId, ValueInfo};
use crate::program::{InputSpec, OutputSpec, Program};
use crate::sharding::{Mesh, Sharding};
use crate::{GraphError, Problem};

/// A value of a [`Graph`]: a small handle, meaningless without it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Value {
    graph: u32,
    id: ValueId,
}

impl Value {
    /// The position among the values of its graph.
    #[must_use]
    pub fn id(self) -> ValueId {
        self.id
    }
}

/// How an input is handed to the program.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct InputOptions {
    /// The caller gives its memory away; the program may reuse it for an output.
    pub donate: bool,
    /// How it is laid out over the mesh; `None`: whole on every device.
    pub sharding: Option<Sharding>,
}

/// How an output leaves the program.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OutputOptions {
    /// The donated input of the same type whose memory it takes over.
    pub reuse: Option<Value>,
    /// How it is laid out over the mesh; `None`: as the value was annotated, or else whole on every device.
    pub sharding: Option<Sharding>,
}

/// A program under construction.
///
/// All methods take `&self`, so that calls nest: `g.add(g.mul(a, b)?, c)?`.
pub struct Graph {
    id: u32,
    /// Whether this is the body of a structured op.
    nested: bool,
    inner: RefCell<Inner>,
}

struct Inner {
    name: String,
    body: Body,
    inputs: Vec<InputSpec>,
    outputs: Vec<OutputSpec>,
    mesh: Option<Mesh>,
    scopes: Vec<Arc<str>>,
    /// The source line that everything is ascribed to, instead of the caller: that of the op being differentiated.
    location: Option<&'static Location<'static>>,
}

/// Labels what is built while it lives; see [`Graph::scope`].
#[must_use = "the scope ends when this is dropped"]
pub struct Scope<'g> {
    graph: &'g Graph,
}

impl fmt::Debug for Scope<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Scope({})", self.graph.scope_path())
    }
}

impl Drop for Scope<'_> {
    fn drop(&mut self) {
        self.graph.inner.borrow_mut().scopes.pop();
    }
}

impl fmt::Debug for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let i = self.inner.borrow();
        write!(f, "Graph({}: {} nodes)", i.name, i.body.nodes.len())
    }
}

fn next_id() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

impl Graph {
    /// An empty program. The name becomes the module's name, reduced to letters, digits and underscores.
    #[must_use]
    pub fn new(name: &str) -> Self {
        Self::with_scope(name, false, None, None)
    }

    /// An empty body of a structured op, in the scope of its parent.
    pub(crate) fn nested_in(parent: &Graph, name: &str) -> Self {
        let path = parent.scope_path();
        let path = if path.is_empty() { name.to_owned() } else { format!("{path}/{name}") };
        let location = parent.inner.borrow().location;
        Self::with_scope(name, true, Some(path.into()), location)
    }

    fn with_scope(
        name: &str,
        nested: bool,
        scope: Option<Arc<str>>,
        location: Option<&'static Location<'static>>,
    ) -> Self {
        Graph {
            id: next_id(),
            nested,
            inner: RefCell::new(Inner {
                name: name.to_owned(),
                body: Body::default(),
                inputs: Vec::new(),
                outputs: Vec::new(),
                mesh: None,
                scopes: scope.into_iter().collect(),
                location,
            }),
        }
    }

    /// Labels everything that is built until the guard is dropped; labels nest and show in errors as `a/b`.
    pub fn scope(&self, label: &str) -> Scope<'_> {
        let path = self.scope_path();
        let path = if path.is_empty() { label.to_owned() } else { format!("{path}/{label}") };
        self.inner.borrow_mut().scopes.push(path.into());
        Scope { graph: self }
    }

    /// Runs `f` with everything it builds ascribed to this scope path and source line.
    pub(crate) fn ascribed<T>(
        &self,
        scope: Arc<str>,
        location: &'static Location<'static>,
        f: impl FnOnce() -> T,
    ) -> T {
        self.inner.borrow_mut().scopes.push(scope);
        let _scope = Scope { graph: self };
        let before = self.inner.borrow_mut().location.replace(location);
        let result = f();
        self.inner.borrow_mut().location = before;
        result
    }

    pub(crate) fn scope_path(&self) -> Arc<str> {
        self.inner.borrow().scopes.last().cloned().unwrap_or_else(|| "".into())
    }

    /// Names the axes of devices that shardings refer to. Without a mesh, shardings are ignored.
    ///
    /// # Errors
    /// When a name is not a word or occurs twice, a size is 0, a mesh is already set, or this is the body of a scan.
    #[track_caller]
    pub fn set_mesh(&self, axes: &[(&str, usize)]) -> Result<(), GraphError> {
        let at = Location::caller();
        let bad = |m: String| self.error_at(at, "mesh", &[], Problem::Attribute(m));
        if self.nested {
            return Err(bad("a mesh is set on the program, not on the body of an op".into()));
        }
        if self.inner.borrow().mesh.is_some() {
            return Err(bad("the mesh is already set".into()));
        }
        let mesh = Mesh::new(axes).map_err(bad)?;
        self.inner.borrow_mut().mesh = Some(mesh);
        Ok(())
    }

    /// An input of the program.
    ///
    /// # Errors
    /// When the name is taken or the shape overflows.
    #[track_caller]
    pub fn input(&self, name: &str, dtype: DType, shape: impl Into<Shape>) -> Result<Value, GraphError> {
        self.input_with(name, dtype, shape, InputOptions::default())
    }

    /// An input of the program, with options.
    ///
    /// # Errors
    /// When the name is taken, the shape overflows or the sharding has another rank.
    #[track_caller]
    pub fn input_with(
        &self,
        name: &str,
        dtype: DType,
        shape: impl Into<Shape>,
        options: InputOptions,
    ) -> Result<Value, GraphError> {
        let ty = TensorType::new(dtype, shape);
        let at = Location::caller();
        let bad = |m: String| self.error_at(at, &format!("input {name:?}"), &[], Problem::Attribute(m));
        if self.inner.borrow().inputs.iter().any(|i| i.name == name) {
            return Err(bad("the name is taken".into()));
        }
        if let Some(s) = &options.sharding
            && s.dims().len() != ty.shape.rank()
        {
            return Err(bad(format!("sharding {s} has {} dimensions, the value is {ty}", s.dims().len())));
        }
        let index = self.inner.borrow().inputs.len();
        let value = self.one(Op::Input { index, ty: ty.clone() }, &[])?;
        let mut i = self.inner.borrow_mut();
        i.body.inputs.push(value.id);
        i.body.values[value.id.index()].sharding = options.sharding.clone();
        i.inputs.push(InputSpec {
            name: name.to_owned(),
            dtype,
            shape: ty.shape,
            donated: options.donate,
            sharding: options.sharding,
        });
        Ok(value)
    }

    /// Makes a value an output of the program.
    ///
    /// # Errors
    /// When the name is taken or the value belongs to another graph.
    #[track_caller]
    pub fn output(&self, name: &str, value: Value) -> Result<(), GraphError> {
        self.output_with(name, value, OutputOptions::default())
    }

    /// Makes a value an output of the program, with options.
    ///
    /// # Errors
    /// When the name is taken, a value belongs to another graph, the sharding has another rank, or `reuse` is not a donated
    /// input of the same type that no other output reuses.
    #[track_caller]
    pub fn output_with(&self, name: &str, value: Value, options: OutputOptions) -> Result<(), GraphError> {
        let op = format!("output {name:?}");
        self.check_foreign(&op, &[value])?;
        let at = Location::caller();
        let bad = |m: String| self.error_at(at, &op, &[value], Problem::Attribute(m));
        let ty = self.ty(value);
        if self.inner.borrow().outputs.iter().any(|o| o.name == name) {
            return Err(bad("the name is taken".into()));
        }
        if let Some(s) = &options.sharding
            && s.dims().len() != ty.shape.rank()
        {
            return Err(bad(format!("sharding {s} has {} dimensions, the value is {ty}", s.dims().len())));
        }
        let mut reuses = None;
        if let Some(r) = options.reuse {
            self.check_foreign(&op, &[r])?;
            let i = self.inner.borrow();
            let Some(index) = i.body.inputs.iter().position(|&v| v == r.id) else {
                return Err(bad("only the memory of an input can be reused".into()));
            };
            let spec = &i.inputs[index];
            if !spec.donated {
                return Err(bad(format!("input {:?} must be donated for its memory to be reused", spec.name)));
            }
            if spec.dtype != ty.dtype || spec.shape != ty.shape {
                return Err(bad(format!("cannot reuse input {:?}, which is {}{}", spec.name, spec.dtype, spec.shape)));
            }
            if i.outputs.iter().any(|o| o.reuses == Some(index)) {
                return Err(bad(format!("input {:?} is already reused by another output", spec.name)));
            }
            reuses = Some(index);
        }
        let mut i = self.inner.borrow_mut();
        // An output that is an annotated value keeps the annotation.
        let sharding = options.sharding.or_else(|| i.body.values[value.id.index()].sharding.clone());
        i.body.outputs.push(value.id);
        i.outputs.push(OutputSpec { name: name.to_owned(), dtype: ty.dtype, shape: ty.shape, sharding, reuses });
        Ok(())
    }

    /// Ends construction.
    ///
    /// # Errors
    /// When there is no output, or a sharding does not fit the mesh.
    #[track_caller]
    pub fn finish(self) -> Result<Program, GraphError> {
        let at = Location::caller();
        let bad = |op: &str, m: String| self.error_at(at, op, &[], Problem::Attribute(m));
        {
            let i = self.inner.borrow();
            if i.outputs.is_empty() {
                return Err(bad("program", "it has no output".into()));
            }
            if let Some(mesh) = &i.mesh {
                for s in &i.inputs {
                    if let Some(sh) = &s.sharding {
                        sh.shard_shape(mesh, &s.shape).map_err(|m| bad(&format!("input {:?}", s.name), m))?;
                    }
                }
                for s in &i.outputs {
                    if let Some(sh) = &s.sharding {
                        sh.shard_shape(mesh, &s.shape).map_err(|m| bad(&format!("output {:?}", s.name), m))?;
                    }
                }
                check_constraints(&i.body, mesh)?;
            }
        }
        let i = self.inner.into_inner();
        Ok(Program { name: i.name, body: i.body, inputs: i.inputs, outputs: i.outputs, mesh: i.mesh, calls: None })
    }

    /// Ends construction of a body.
    pub(crate) fn finish_body(self, outputs: &[Value]) -> Body {
        let mut body = self.inner.into_inner().body;
        body.outputs = outputs.iter().map(|v| v.id).collect();
        body
    }

    /// Appends an op. Every builder method comes down to this.
    ///
    /// # Errors
    /// When an operand belongs to another graph or the op does not take operands of these types.
    #[track_caller]
    pub fn apply(&self, op: Op, inputs: &[Value]) -> Result<Vec<Value>, GraphError> {
        self.check_foreign(op.name(), inputs)?;
        let types: Vec<TensorType> = inputs.iter().map(|&v| self.ty(v)).collect();
        let refs: Vec<&TensorType> = types.iter().collect();
        let at = Location::caller();
        let results = infer(&op, &refs).map_err(|p| self.error_at(at, op.name(), inputs, p))?;
        let scope = self.scope_path();
        let mut i = self.inner.borrow_mut();
        let at = i.location.unwrap_or(at);
        let first = i.body.values.len() as u32;
        let node = i.body.nodes.len() as u32;
        let sharding = match &op {
            Op::ShardingConstraint(s) => Some(s.clone()),
            _ => None,
        };
        let outputs: Vec<ValueId> = (first..first + results.len() as u32).map(ValueId).collect();
        i.body.values.extend(results.into_iter().map(|ty| ValueInfo { ty, node, sharding: sharding.clone() }));
        i.body.nodes.push(Node {
            op,
            inputs: inputs.iter().map(|v| v.id).collect(),
            outputs: outputs.clone(),
            location: at,
            scope,
        });
        Ok(outputs.into_iter().map(|id| Value { graph: self.id, id }).collect())
    }

    /// Puts an op in place of that of a node. It must give the same results and may give more behind them, which are returned.
    pub(crate) fn extend_node(&self, node: usize, op: Op) -> Result<Vec<Value>, GraphError> {
        let mut i = self.inner.borrow_mut();
        let body = &mut i.body;
        let old = &body.nodes[node];
        let types: Vec<TensorType> = old.inputs.iter().map(|&v| body.ty(v).clone()).collect();
        let refs: Vec<&TensorType> = types.iter().collect();
        let fail = |p| GraphError::new(op.name(), types.clone(), p, old.location, &old.scope);
        let results = infer(&op, &refs).map_err(fail)?;
        let known = old.outputs.len();
        if results.len() < known || old.outputs.iter().zip(&results).any(|(&v, ty)| body.ty(v) != ty) {
            return Err(fail(Problem::Attribute("the results of a node must stay what they are".into())));
        }
        let mut added = Vec::new();
        for ty in results.into_iter().skip(known) {
            let id = ValueId(body.values.len() as u32);
            body.values.push(ValueInfo { ty, node: node as u32, sharding: None });
            body.nodes[node].outputs.push(id);
            added.push(Value { graph: self.id, id });
        }
        body.nodes[node].op = op;
        Ok(added)
    }

    /// The handle of a value of this graph.
    pub(crate) fn value(&self, id: ValueId) -> Value {
        Value { graph: self.id, id }
    }

    /// Appends an op of one result.
    #[track_caller]
    pub(crate) fn one(&self, op: Op, inputs: &[Value]) -> Result<Value, GraphError> {
        let name = op.name();
        let results = self.apply(op, inputs)?;
        match results[..] {
            [v] => Ok(v),
            _ => Err(self.error(name, inputs, Problem::Attribute(format!("has {} results", results.len())))),
        }
    }

    #[track_caller]
    pub(crate) fn check_foreign(&self, op: &str, inputs: &[Value]) -> Result<(), GraphError> {
        match inputs.iter().position(|v| v.graph != self.id) {
            None => Ok(()),
            Some(operand) => Err(self.error(op, &[], Problem::ForeignValue { operand })),
        }
    }

    #[track_caller]
    pub(crate) fn error(&self, op: &str, inputs: &[Value], problem: Problem) -> GraphError {
        self.error_at(Location::caller(), op, inputs, problem)
    }

    /// [`Graph::error`] for use in closures, which do not know who called the function around them.
    pub(crate) fn error_at(
        &self,
        location: &'static Location<'static>,
        op: &str,
        inputs: &[Value],
        problem: Problem,
    ) -> GraphError {
        let types = inputs.iter().filter(|v| v.graph == self.id).map(|&v| self.ty(v)).collect();
        let location = self.inner.borrow().location.unwrap_or(location);
        GraphError::new(op, types, problem, location, &self.scope_path())
    }

    /// Dtype and shape of a value.
    ///
    /// # Panics
    /// When the value belongs to another graph; ops report that as an error, but there is no type to give here.
    #[must_use]
    #[track_caller]
    pub fn ty(&self, v: Value) -> TensorType {
        assert!(v.graph == self.id, "the value belongs to another graph");
        self.inner.borrow().body.values[v.id.index()].ty.clone()
    }

    /// Dtype of a value.
    ///
    /// # Panics
    /// When the value belongs to another graph.
    #[must_use]
    #[track_caller]
    pub fn dtype(&self, v: Value) -> DType {
        self.ty(v).dtype
    }

    /// Shape of a value.
    ///
    /// # Panics
    /// When the value belongs to another graph.
    #[must_use]
    #[track_caller]
    pub fn shape(&self, v: Value) -> Shape {
        self.ty(v).shape
    }

    /// Extents of a value.
    ///
    /// # Panics
    /// When the value belongs to another graph.
    #[must_use]
    #[track_caller]
    pub fn dims(&self, v: Value) -> Vec<usize> {
        self.ty(v).shape.dims().to_vec()
    }

    /// The value that a float was widened from, which is the same number; any other value is given back.
    ///
    /// # Panics
    /// When the value belongs to another graph.
    #[must_use]
    #[track_caller]
    pub fn before_widening(&self, v: Value) -> Value {
        let wide = self.dtype(v);
        let inner = self.inner.borrow();
        let body = &inner.body;
        let node = body.nodes.get(body.values[v.id.index()].node as usize).filter(|n| n.outputs.contains(&v.id));
        match node.map(|n| (&n.op, &n.inputs[..])) {
            Some((Op::Convert(_), &[from])) => {
                let narrow = body.ty(from).dtype;
                let is_same = narrow.is_float() && wide.is_float() && narrow.size() < wide.size();
                if is_same { Value { id: from, ..v } } else { v }
            }
            _ => v,
        }
    }

    /// What was built so far.
    pub fn body(&self) -> Ref<'_, Body> {
        Ref::map(self.inner.borrow(), |i| &i.body)
    }
}

/// Checks the sharding constraints of a body and of the bodies within.
fn check_constraints(body: &Body, mesh: &Mesh) -> Result<(), GraphError> {
    for node in &body.nodes {
        match &node.op {
            Op::ShardingConstraint(s) => {
                let ty = body.ty(node.outputs[0]);
                s.shard_shape(mesh, &ty.shape).map_err(|m| {
                    GraphError::new(node.op.name(), vec![ty.clone()], Problem::Attribute(m), node.location, &node.scope)
                })?;
            }
            Op::Scan(Scan { body: inner, .. })
            | Op::Remat(Remat { body: inner, .. })
            | Op::CustomVjp(CustomVjp { forward: inner, .. }) => check_constraints(inner, mesh)?,
            _ => {}
        }
    }
    Ok(())
}
