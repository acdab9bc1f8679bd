//! StableHLO text: deterministic, exact, without dead nodes.
//!
//! Values are numbered in the order they are printed. An op of the graph prints as one StableHLO op, except that a reduction
//! brings its initial value, and a scan prints as a `while` (see the `loops` module).

mod index;
mod literal;
mod loops;
mod ops;
mod products;

use std::fmt::Write as _;

use crate::op::{Body, Node, ValueId};
use crate::program::{ProductCalls, Program};
use crate::sharding::{Mesh, Sharding};

use literal::{list, tensor};

/// The text of a whole program.
pub(crate) fn print(program: &Program) -> String {
    let (mesh, calls) = (program.mesh(), program.calls.as_ref());
    let mut p = Printer { out: String::new(), mesh, calls, next: 0, depth: 0 };
    p.module(program);
    p.out
}

struct Printer<'p> {
    out: String,
    mesh: Option<&'p Mesh>,
    /// Which products are calls.
    calls: Option<&'p ProductCalls>,
    /// Number of the next value.
    next: usize,
    depth: usize,
}

/// What each value of one body is called.
struct Names(Vec<String>);

impl Names {
    fn get(&self, v: ValueId) -> &str {
        &self.0[v.index()]
    }

    fn set(&mut self, v: ValueId, name: String) {
        self.0[v.index()] = name;
    }
}

impl Printer<'_> {
    fn module(&mut self, program: &Program) {
        let mut name: String =
            program.name().chars().map(|c| if c.is_ascii_alphanumeric() || c == '_' { c } else { '_' }).collect();
        if !name.starts_with(|c: char| c.is_ascii_alphabetic()) {
            name.insert(0, 'm');
        }
        match self.mesh {
            None => self.line(&format!("module @{name} {{")),
            Some(mesh) => {
                let n = mesh.devices();
                self.line(&format!(
                    "module @{name} attributes {{mhlo.num_partitions = {n} : i32, mhlo.num_replicas = 1 : i32}} {{"
                ));
            }
        }
        self.depth += 1;
        if let Some(mesh) = self.mesh {
            let axes: Vec<String> = mesh.axes().iter().map(|(n, s)| format!("\"{n}\"={s}")).collect();
            self.line(&format!("sdy.mesh @mesh = <[{}]>", axes.join(", ")));
        }
        self.function(program);
        self.depth -= 1;
        self.line("}");
    }

    fn function(&mut self, program: &Program) {
        let body = program.body();
        let mut names = Names(vec![String::new(); body.values().len()]);
        let mut arguments = Vec::new();
        for (i, (spec, &v)) in program.inputs.iter().zip(body.inputs()).enumerate() {
            names.set(v, format!("%arg{i}"));
            let mut attributes = Vec::new();
            if spec.donated {
                attributes.push(match program.outputs.iter().position(|o| o.reuses == Some(i)) {
                    Some(o) => format!("tf.aliasing_output = {o} : i32"),
                    None => "jax.buffer_donor = true".to_owned(),
                });
            }
            attributes.extend(self.sharding_attribute(spec.sharding.as_ref(), spec.shape.rank()));
            arguments.push(format!("%arg{i}: {}{}", tensor(body.ty(v)), braces(&attributes)));
        }
        let results: Vec<String> = program
            .outputs
            .iter()
            .zip(body.outputs())
            .map(|(spec, &v)| {
                let attributes: Vec<String> =
                    self.sharding_attribute(spec.sharding.as_ref(), spec.shape.rank()).into_iter().collect();
                format!("{}{}", tensor(body.ty(v)), braces(&attributes))
            })
            .collect();
        self.line(&format!("func.func public @main({}) -> ({}) {{", arguments.join(", "), results.join(", ")));
        self.depth += 1;
        self.nodes(body, &mut names);
        let (values, types) = outputs(body, &names);
        self.line(&format!("return {values} : {types}"));
        self.depth -= 1;
        self.line("}");
    }

    /// What stands at an input or output of a program with a mesh. Those without a sharding are declared whole on every
    /// device: the partitioner would otherwise cut them as it likes, and the caller could not know how.
    fn sharding_attribute(&self, sharding: Option<&Sharding>, rank: usize) -> Option<String> {
        self.mesh?;
        let whole = Sharding::replicated(rank);
        Some(format!("sdy.sharding = #sdy.sharding<@mesh, {}>", sharding.unwrap_or(&whole)))
    }

    /// Prints the live nodes of a body whose inputs already have names.
    fn nodes(&mut self, body: &Body, names: &mut Names) {
        let live = body.live();
        for (node, _) in body.nodes().iter().zip(live).filter(|(_, l)| *l) {
            self.node(body, node, names);
        }
    }

    /// Prints the nodes of a body in place of the node that holds it.
    fn inline(&mut self, node: &Node, inner: &Body, names: &mut Names) {
        let mut inside = Names(vec![String::new(); inner.values().len()]);
        for (&v, &operand) in inner.inputs().iter().zip(node.inputs()) {
            inside.set(v, names.get(operand).to_owned());
        }
        self.nodes(inner, &mut inside);
        for (v, &result) in node.outputs().zip(inner.outputs()) {
            names.set(v, inside.get(result).to_owned());
        }
    }

    fn line(&mut self, text: &str) {
        for _ in 0..self.depth {
            self.out.push_str("  ");
        }
        self.out.push_str(text);
        self.out.push('\n');
    }

    fn fresh(&mut self) -> String {
        let name = format!("%{}", self.next);
        self.next += 1;
        name
    }

    /// Prints `name = text` for a new value and returns its name.
    fn define(&mut self, text: &str) -> String {
        let name = self.fresh();
        self.line(&format!("{name} = {text}"));
        name
    }

    /// Prints a node's op and names its results: `%3` for one, `%3#0`, `%3#1` for several.
    fn define_node(&mut self, node: &Node, names: &mut Names, text: &str) {
        let name = self.fresh();
        let n = node.outputs().len();
        if n == 1 {
            self.line(&format!("{name} = {text}"));
        } else {
            self.line(&format!("{name}:{n} = {text}"));
        }
        name_results(node, names, &name);
    }
}

/// Names the results of a node after the op's value.
fn name_results(node: &Node, names: &mut Names, name: &str) {
    let n = node.outputs().len();
    for (i, v) in node.outputs().enumerate() {
        names.set(v, if n == 1 { name.to_owned() } else { format!("{name}#{i}") });
    }
}

fn braces(attributes: &[String]) -> String {
    if attributes.is_empty() { String::new() } else { format!(" {{{}}}", attributes.join(", ")) }
}

/// Names and types of a body's outputs, each joined by commas.
fn outputs(body: &Body, names: &Names) -> (String, String) {
    let mut types = String::new();
    for (i, &v) in body.outputs().iter().enumerate() {
        let _ = write!(types, "{}{}", if i > 0 { ", " } else { "" }, tensor(body.ty(v)));
    }
    (list(body.outputs().iter().map(|&v| names.get(v))), types)
}

#[cfg(test)]
mod tests;
