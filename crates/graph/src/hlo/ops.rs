//! One node, one op: elementwise, shape, linear algebra, annotations.

use tensor::{DType, Shape};

use super::literal::{dense, identity, list, tensor};
use super::{Names, Printer};
use crate::op::{Body, CustomVjp, Node, Op, Remat, TensorType, ValueId};

impl Printer<'_> {
    pub(super) fn node(&mut self, body: &Body, node: &Node, names: &mut Names) {
        let args: Vec<&str> = node.inputs().iter().map(|&v| names.get(v)).collect();
        let types: Vec<String> = node.inputs().iter().map(|&v| tensor(body.ty(v))).collect();
        let results: Vec<String> = node.outputs().map(|v| tensor(body.ty(v))).collect();
        let result = results.first().map_or("", String::as_str);
        let args = list(&args);
        // `(operand types) -> result type`
        let signature = || format!("({}) -> {result}", list(&types));
        let name = node.op().name();
        let text = match node.op() {
            // Inputs are arguments and have their names.
            Op::Input { .. } => return,
            Op::Constant { data, .. } => format!("stablehlo.constant {} : {result}", dense(data)),
            Op::Iota { dim, .. } => format!("stablehlo.iota dim = {dim} : {result}"),
            Op::Unary(_) | Op::Binary(_) => format!("stablehlo.{name} {args} : {result}"),
            Op::Compare(c) => {
                let kind = compare_kind(body.ty(node.inputs()[0]).dtype);
                format!("stablehlo.compare {}, {args}, {kind} : {}", c.name(), signature())
            }
            Op::Select => format!("stablehlo.select {args} : {}, {}", types[0], types[1]),
            Op::Clamp | Op::Convert(_) | Op::Reshape(_) | Op::DynamicUpdateSlice => {
                format!("stablehlo.{name} {args} : {}", signature())
            }
            Op::ReducePrecision { exponent, mantissa } => {
                format!("stablehlo.reduce_precision {args}, format = e{exponent}m{mantissa} : {result}")
            }
            Op::BroadcastInDim { dims, .. } => {
                format!("stablehlo.broadcast_in_dim {args}, dims = [{}] : {}", list(dims), signature())
            }
            Op::Transpose(perm) => format!("stablehlo.transpose {args}, dims = [{}] : {}", list(perm), signature()),
            Op::Slice { starts, limits, strides } => {
                let ranges = (0..starts.len()).map(|d| match strides[d] {
                    1 => format!("{}:{}", starts[d], limits[d]),
                    s => format!("{}:{}:{s}", starts[d], limits[d]),
                });
                format!("stablehlo.slice {args} [{}] : {}", list(ranges), signature())
            }
            Op::Pad { low, high, interior } => format!(
                "stablehlo.pad {args}, low = [{}], high = [{}], interior = [{}] : {}",
                list(low),
                list(high),
                list(interior),
                signature()
            ),
            Op::Concatenate(dim) => format!("stablehlo.concatenate {args}, dim = {dim} : {}", signature()),
            Op::Reverse(dims) => format!("stablehlo.reverse {args}, dims = [{}] : {result}", list(dims)),
            Op::DynamicSlice(sizes) => {
                format!("stablehlo.dynamic_slice {args}, sizes = [{}] : {}", list(sizes), signature())
            }
            Op::Take => super::index::take(body, node, &args, &signature()),
            Op::ScatterAddRows => return self.scatter_add_rows(body, node, names),
            Op::Reduce { kind, dims } => {
                let dtype = body.ty(node.inputs()[0]).dtype;
                let scalar = tensor(&TensorType::new(dtype, Shape::scalar()));
                let init = self.define(&format!("stablehlo.constant dense<{}> : {scalar}", identity(*kind, dtype)));
                format!(
                    "stablehlo.reduce({args} init: {init}) applies stablehlo.{} across dimensions = [{}] : ({}, {scalar}) -> {result}",
                    kind.name(),
                    list(dims),
                    types[0]
                )
            }
            Op::DotGeneral { dims, .. } => {
                if let Some(call) = self.product_call(body, node, dims) {
                    return self.call_product(body, node, &call, names);
                }
                let batch = if dims.lhs_batch.is_empty() {
                    String::new()
                } else {
                    format!("batching_dims = [{}] x [{}], ", list(&dims.lhs_batch), list(&dims.rhs_batch))
                };
                format!(
                    "stablehlo.dot_general {args}, {batch}contracting_dims = [{}] x [{}], precision = [DEFAULT, DEFAULT] : {}",
                    list(&dims.lhs_contract),
                    list(&dims.rhs_contract),
                    signature()
                )
            }
            Op::OptimizationBarrier => format!("stablehlo.optimization_barrier {args} : {}", list(&types)),
            Op::ShardingConstraint(s) => {
                if self.mesh.is_none() {
                    // Without a mesh the op is the identity: its result is the operand.
                    return super::name_results(node, names, &args);
                }
                format!("sdy.sharding_constraint {args} <@mesh, {s}> : {result}")
            }
            Op::Named(_) => return super::name_results(node, names, &args),
            Op::CustomCall(c) => {
                let config = c.attributes.iter().map(|(n, v)| format!("{n} = {v} : i64"));
                let results = if results.len() == 1 { result.to_owned() } else { format!("({})", list(&results)) };
                // Row-major, whatever the compiler would like better.
                let layouts = |vs: Vec<ValueId>| list(vs.into_iter().map(|v| layout(body.ty(v).shape.rank())));
                let of_tuple = |i: usize| if c.results.len() == 1 { String::new() } else { i.to_string() };
                let aliases = (0..c.in_place).map(|i| {
                    format!(
                        "#stablehlo.output_operand_alias<output_tuple_indices = [{}], operand_index = {i}, operand_tuple_indices = []>",
                        of_tuple(i)
                    )
                });
                let aliases = match c.in_place {
                    0 => String::new(),
                    _ => format!(", output_operand_aliases = [{}]", list(aliases)),
                };
                format!(
                    "stablehlo.custom_call @{}({args}) {{api_version = 4 : i32, backend_config = {{{}}}, operand_layouts = [{}]{aliases}, result_layouts = [{}]}} : ({}) -> {results}",
                    c.target,
                    list(config),
                    layouts(node.inputs().to_vec()),
                    layouts(node.outputs().collect()),
                    list(&types)
                )
            }
            Op::Scan(scan) => return self.scan(body, node, scan, names),
            Op::Remat(Remat { body: inner, .. }) | Op::CustomVjp(CustomVjp { forward: inner, .. }) => {
                return self.inline(node, inner, names);
            }
        };
        self.define_node(node, names, &text);
    }
}

/// The row-major layout of an array, as an operand or result of a call.
pub(super) fn layout(rank: usize) -> String {
    match rank {
        0 => "dense<> : tensor<0xindex>".to_owned(),
        _ => format!("dense<[{}]> : tensor<{rank}xindex>", list((0..rank).rev())),
    }
}

/// How elements of a dtype are compared.
fn compare_kind(dtype: DType) -> &'static str {
    if dtype.is_float() {
        "FLOAT"
    } else if dtype.is_signed() {
        "SIGNED"
    } else {
        "UNSIGNED"
    }
}
