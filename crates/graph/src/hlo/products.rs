//! Products as calls of a function of the runtime.

use tensor::Shape;

use super::literal::{list, tensor};
use super::{Names, Printer};
use crate::op::{Body, DotDims, Node, TensorType};

/// A product as the function takes it.
pub(super) struct ProductCall {
    batch: usize,
    m: usize,
    n: usize,
    k: usize,
    lhs_transposed: bool,
    rhs_transposed: bool,
}

/// Whether the contracted dimensions of an operand lie before the free ones, if batch, free and contracted dimensions are each
/// together and in order.
fn contracted_first(rank: usize, batch: &[usize], contract: &[usize], free: &[usize]) -> Option<bool> {
    let starts = |order: [&[usize]; 3]| order.concat().into_iter().eq(0..rank);
    if starts([batch, free, contract]) {
        Some(false)
    } else if starts([batch, contract, free]) {
        Some(true)
    } else {
        None
    }
}

impl Printer<'_> {
    /// The call that computes a product, if one does.
    pub(super) fn product_call(&self, body: &Body, node: &Node, dims: &DotDims) -> Option<ProductCall> {
        let calls = self.calls?;
        let (l, r) = (body.ty(node.inputs()[0]), body.ty(node.inputs()[1]));
        let out = body.ty(node.outputs().next()?).dtype;
        let fits = |dtype| calls.dtypes.contains(&dtype);
        if l.dtype != r.dtype || !fits(l.dtype) || !fits(out) || out.size() < l.dtype.size() {
            return None;
        }
        let (rank_l, rank_r) = (l.shape.rank(), r.shape.rank());
        let mut pairs: Vec<(usize, usize)> =
            dims.lhs_contract.iter().copied().zip(dims.rhs_contract.iter().copied()).collect();
        pairs.sort_unstable();
        let (lhs_contract, rhs_contract): (Vec<usize>, Vec<usize>) = pairs.into_iter().unzip();
        let (lhs_free, rhs_free) = (dims.lhs_free(rank_l), dims.rhs_free(rank_r));
        let lhs_transposed = contracted_first(rank_l, &dims.lhs_batch, &lhs_contract, &lhs_free)?;
        let rhs_transposed = !contracted_first(rank_r, &dims.rhs_batch, &rhs_contract, &rhs_free)?;
        let extent = |shape: &Shape, dims: &[usize]| dims.iter().map(|&d| shape.dims()[d]).product::<usize>();
        let batch = extent(&l.shape, &dims.lhs_batch);
        let (m, n) = (extent(&l.shape, &lhs_free), extent(&r.shape, &rhs_free));
        let k = extent(&l.shape, &lhs_contract);
        let is_worth_it = batch * m * n * k >= calls.least_work;
        is_worth_it.then_some(ProductCall { batch, m, n, k, lhs_transposed, rhs_transposed })
    }

    /// Prints the call, with its operands and result reshaped to three dimensions.
    pub(super) fn call_product(&mut self, body: &Body, node: &Node, p: &ProductCall, names: &mut Names) {
        let &ProductCall { batch, m, n, k, lhs_transposed, rhs_transposed } = p;
        let shapes = [
            if lhs_transposed { [batch, k, m] } else { [batch, m, k] },
            if rhs_transposed { [batch, n, k] } else { [batch, k, n] },
        ];
        let mut operands = Vec::new();
        let mut types = Vec::new();
        for (&v, shape) in node.inputs().iter().zip(shapes) {
            let before = body.ty(v);
            let after = tensor(&TensorType::new(before.dtype, shape));
            let text = format!("stablehlo.reshape {} : ({}) -> {after}", names.get(v), tensor(before));
            operands.push(self.define(&text));
            types.push(after);
        }
        let Some(output) = node.outputs().next() else { return };
        let result = body.ty(output);
        let flat = tensor(&TensorType::new(result.dtype, [batch, m, n]));
        let target = self.calls.map_or("", |c| c.target.as_str());
        let layout = super::ops::layout(3);
        let call = self.define(&format!(
            "stablehlo.custom_call @{target}({}) {{api_version = 4 : i32, backend_config = {{lhs_transposed = {} : i64, \
             rhs_transposed = {} : i64}}, operand_layouts = [{layout}, {layout}], result_layouts = [{layout}]}} : ({}) -> {flat}",
            list(&operands),
            i64::from(lhs_transposed),
            i64::from(rhs_transposed),
            list(&types),
        ));
        self.define_node(node, names, &format!("stablehlo.reshape {call} : ({flat}) -> {}", tensor(result)));
    }
}
