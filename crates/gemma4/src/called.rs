//! Products with matrices that are outside of the program: a function of the runtime multiplies.

use graph::{Graph, GraphError, TensorType, Value};
use tensor::DType;

/// Name of the function: operands `session` (i64 `[1]`) and `x` `[m, k]`, attributes `w0`, `w1`, ... for each result `[m, n]`.
pub const PRODUCTS: &str = "lapidary.products";

/// `x · wᵀ` for matrices of a session that share their `x`: one result `[m, n]` for each `(number, n, dtype)`.
///
/// `session` is `i64[1]` with the session's number, `x` is `[m, k]` of f32 or bf16, as are the results. Numbers and sizes
/// are checked against the session when the program runs.
///
/// # Errors
/// When `x` is not a matrix.
#[track_caller]
pub fn products(
    graph: &Graph,
    session: Value,
    x: Value,
    wanted: &[(usize, usize, DType)],
) -> Result<Vec<Value>, GraphError> {
    let m = graph.shape(x).dims().first().copied().unwrap_or(1);
    let results: Vec<TensorType> = wanted.iter().map(|&(_, n, dtype)| TensorType::new(dtype, [m, n])).collect();
    let names: Vec<String> = (0..wanted.len()).map(|i| format!("w{i}")).collect();
    let attributes: Vec<(&str, i64)> =
        names.iter().zip(wanted).map(|(name, &(number, ..))| (name.as_str(), number as i64)).collect();
    graph.custom_call(PRODUCTS, &[session, x], &results, &attributes)
}
