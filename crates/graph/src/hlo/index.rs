//! Row lookup and row accumulation. Ids have no trailing index dimension, which StableHLO writes as an index vector
//! dimension equal to their rank.

use tensor::Shape;

use super::literal::{list, tensor};
use super::{Names, Printer, name_results};
use crate::op::{Body, Node, TensorType};

/// ` name = [items],` or nothing: StableHLO leaves out empty dimension lists.
fn field(name: &str, items: &[usize]) -> String {
    if items.is_empty() { String::new() } else { format!("{name} = [{}], ", list(items)) }
}

/// Result dimensions that hold a row, for ids of this rank.
fn row_dims(ids: usize, table: usize) -> Vec<usize> {
    (ids..ids + table - 1).collect()
}

pub(super) fn take(body: &Body, node: &Node, args: &str, signature: &str) -> String {
    let (table, ids) = (body.ty(node.inputs()[0]), body.ty(node.inputs()[1]));
    let rank = ids.shape.rank();
    let mut sizes = table.shape.dims().to_vec();
    sizes[0] = 1;
    format!(
        "\"stablehlo.gather\"({args}) <{{dimension_numbers = #stablehlo.gather<{}collapsed_slice_dims = [0], \
         start_index_map = [0], index_vector_dim = {rank}>, indices_are_sorted = false, slice_sizes = array<i64: {}>}}> : \
         {signature}",
        field("offset_dims", &row_dims(rank, table.shape.rank())),
        list(&sizes),
    )
}

impl Printer<'_> {
    pub(super) fn scatter_add_rows(&mut self, body: &Body, node: &Node, names: &mut Names) {
        let ty = |i: usize| body.ty(node.inputs()[i]);
        let args = list(node.inputs().iter().map(|&v| names.get(v)));
        let rank = ty(1).shape.rank();
        let scalar = tensor(&TensorType::new(ty(0).dtype, Shape::scalar()));
        let name = self.fresh();
        self.line(&format!(
            "{name} = \"stablehlo.scatter\"({args}) <{{indices_are_sorted = false, \
             scatter_dimension_numbers = #stablehlo.scatter<{}inserted_window_dims = [0], scatter_dims_to_operand_dims = [0], \
             index_vector_dim = {rank}>, unique_indices = false}}> ({{",
            field("update_window_dims", &row_dims(rank, ty(0).shape.rank())),
        ));
        let (a, b) = (self.fresh(), self.fresh());
        self.line(&format!("^bb0({a}: {scalar}, {b}: {scalar}):"));
        self.depth += 1;
        let sum = self.define(&format!("stablehlo.add {a}, {b} : {scalar}"));
        self.line(&format!("stablehlo.return {sum} : {scalar}"));
        self.depth -= 1;
        self.line(&format!("}}) : ({}, {}, {}) -> {}", tensor(ty(0)), tensor(ty(1)), tensor(ty(2)), tensor(ty(0))));
        name_results(node, names, &name);
    }
}
