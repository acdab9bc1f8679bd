//! What functions of the runtime compute instead of the compiler: products with matrices that are outside of the program, and
//! attention.

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

/// Name of the function that computes attention, see [`attention`].
pub const ATTENTION: &str = "lapidary.attention";
/// Name of the function that computes its gradient.
pub const ATTENTION_GRADIENT: &str = "lapidary.attention_gradient";

/// Whether the functions take heads of so many elements.
#[must_use]
pub fn attends(width: usize) -> bool {
    width.is_multiple_of(32)
}

/// Attention of queries `[b, k, t, g, e]` over keys and values `[b, k, s, e]`, as the queries: scale 1, over keys at positions
/// from 0 up to the query's, of its segment, and within the window if there is one.
///
/// Positions of queries `[t]` and keys `[s]` and segments `[b, t]` and `[b, s]` are i32. The function gets these seven and the
/// attribute `window` (0: none), and gives the result and the logarithm of every row's sum of exponentials, f32 `[b, k, t, g]`.
/// The function of the gradient gets the seven, those logarithms and the gradient by the result, and gives the gradients by
/// queries, keys and values.
///
/// # Errors
/// When shapes do not fit each other.
#[track_caller]
pub fn attention(
    graph: &Graph,
    operands: [Value; 3],
    positions: [Value; 2],
    segments: [Value; 2],
    window: Option<usize>,
) -> Result<Value, GraphError> {
    let inputs: Vec<Value> = operands.into_iter().chain(positions).chain(segments).collect();
    let attributes = [("window", window.unwrap_or(0) as i64)];
    let forward = |g: &Graph, x: &[Value]| {
        let dims = g.dims(x[0]);
        let results = [g.ty(x[0]), TensorType::new(DType::F32, &dims[..4])];
        let y = g.custom_call(ATTENTION, x, &results, &attributes)?;
        Ok((vec![y[0]], vec![y[1]]))
    };
    let backward = |g: &Graph, x: &[Value], kept: &[Value], ct: &[Value]| {
        let given: Vec<Value> = x.iter().chain(kept).chain(ct).copied().collect();
        let results = [g.ty(x[0]), g.ty(x[1]), g.ty(x[2])];
        let y = g.custom_call(ATTENTION_GRADIENT, &given, &results, &attributes)?;
        Ok(y.into_iter().map(Some).chain([None; 4]).collect())
    };
    Ok(graph.custom_vjp(&inputs, forward, backward)?[0])
}
