//! Products of a program's values with large matrices, computed by the `kernels` crate instead of XLA. CPU only.
//!
//! A decode step multiplies few rows with every weight of a model. XLA's own products read weights far below the speed of
//! memory, and want each in a buffer of its own at 64-byte alignment. A program that calls [`products`] instead names a
//! [`Session`] (an input of the program, so that a compiled program serves any of them and can be cached) and matrices
//! of it by number. The matrices stay where they are: in a mapped file, at any alignment.

use std::collections::HashMap;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};
use std::time::{Duration, Instant};

use ::kernels::{Attention, Given, Matrix, Operands, Out, Places, Pool, Product, Reading, Rows};
pub use gemma4::called::products;
use gemma4::called::{ATTENTION, ATTENTION_GRADIENT, PRODUCTS};
use graph::ProductCalls;
use half::bf16;
use pjrt::ffi::{Attribute, Call, Handler, Input, Output};
use pjrt::{Client, PjrtError};
use tensor::DType;

pub(crate) mod fused;
mod step;

/// The sessions that live, by number.
static SESSIONS: OnceLock<RwLock<HashMap<i64, Arc<Used>>>> = OnceLock::new();
static POOL: OnceLock<Pool> = OnceLock::new();

/// Matrices, and in which order they were used.
#[derive(Debug)]
struct Used {
    matrices: Vec<Matrix>,
    history: Mutex<History>,
}

/// Which call came after which, each told by its matrices. Steps of decoding are all alike.
#[derive(Debug, Default)]
struct History {
    last: Vec<usize>,
    after: HashMap<Vec<usize>, Vec<usize>>,
}

impl Used {
    /// Notes a call, and returns the matrices of the one that came after it the last time.
    fn next(&self, call: &[usize]) -> Vec<&Matrix> {
        let mut history = self.history.lock().unwrap_or_else(PoisonError::into_inner);
        let last = std::mem::replace(&mut history.last, call.to_vec());
        match history.after.get_mut(&last) {
            Some(after) if after == call => {}
            Some(after) => after.clone_from(&call.to_vec()),
            None => {
                history.after.insert(last, call.to_vec());
            }
        }
        let next = history.after.get(call).map_or(&[][..], Vec::as_slice);
        next.iter().filter_map(|&number| self.matrices.get(number)).collect()
    }
}

fn sessions() -> &'static RwLock<HashMap<i64, Arc<Used>>> {
    SESSIONS.get_or_init(Default::default)
}

/// The threads that compute the products, shared by all sessions.
pub fn pool() -> &'static Pool {
    POOL.get_or_init(|| Pool::new(0))
}

/// Sets the number of threads, the calling one included; 0 means one for each available core. Returns whether it is in
/// force: it is not when another number of threads has been started already.
pub fn set_threads(threads: usize) -> bool {
    let mut is_new = false;
    let pool = POOL.get_or_init(|| {
        is_new = true;
        Pool::new(threads)
    });
    is_new || pool.threads() == threads
}

/// Memory to measure the speed of reading with: what products of few rows are measured against.
#[derive(Debug)]
pub struct Bandwidth(Reading);

impl Bandwidth {
    /// Takes the memory, 256 MiB: several times the largest caches there are.
    ///
    /// # Errors
    /// When there is no memory for it.
    pub fn new() -> crate::Result<Self> {
        Reading::new(256 << 20).map(Self).map_err(|e| crate::EngineError::Input(e.to_string()))
    }

    /// The best speed of a few tries, in bytes a second, at which the threads of the products read.
    #[must_use]
    pub fn measure(&self, tries: usize) -> f64 {
        let best = (0..tries.max(1)).map(|_| self.0.time(pool())).min();
        best.map_or(f64::NAN, |best| self.0.bytes() as f64 / best.as_secs_f64())
    }
}

/// The time of multiplying `m` rows of bf16 with each of some matrices, one after the other.
///
/// # Errors
/// When the sizes are too large to be computed with.
pub fn time_products(matrices: &[Matrix], m: usize) -> crate::Result<Duration> {
    let refused = |e: ::kernels::KernelError| crate::EngineError::Input(e.to_string());
    let (k, n) = matrices.iter().fold((0, 0), |(k, n), w| (w.k().max(k), w.n().max(n)));
    let (x, mut y) = (vec![bf16::ONE; m * k], vec![bf16::ZERO; m * n]);
    let start = Instant::now();
    for (i, w) in matrices.iter().enumerate() {
        let out = &mut [Out::Bf16(&mut y[..m * w.n()])];
        let next = matrices.get(i + 1);
        let next: &[&Matrix] = if let Some(next) = &next { &[next] } else { &[] };
        ::kernels::products_before(pool(), Rows::Bf16(&x[..m * w.k()]), m, &[w], out, next).map_err(refused)?;
    }
    Ok(start.elapsed())
}

/// What products took since the process started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Spent {
    /// Calls, each of one or more products with the same operand.
    pub calls: u64,
    /// Bytes of weights.
    pub bytes: u64,
    /// Time within the calls.
    pub time: Duration,
}

impl Spent {
    /// What was spent after an earlier look.
    #[must_use]
    pub fn since(self, earlier: Spent) -> Spent {
        Spent {
            calls: self.calls.saturating_sub(earlier.calls),
            bytes: self.bytes.saturating_sub(earlier.bytes),
            time: self.time.saturating_sub(earlier.time),
        }
    }
}

static CALLS: AtomicU64 = AtomicU64::new(0);
static BYTES: AtomicU64 = AtomicU64::new(0);
static NANOSECONDS: AtomicU64 = AtomicU64::new(0);

/// What products took so far.
#[must_use]
pub fn spent() -> Spent {
    let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    Spent { calls: of(&CALLS), bytes: of(&BYTES), time: Duration::from_nanos(of(&NANOSECONDS)) }
}

/// Makes the products known to a plugin. To be done before a program that calls them is compiled or loaded from a cache.
///
/// # Errors
/// When the platform is not the CPU, or the plugin has no custom calls.
pub fn register(client: &Client) -> Result<(), PjrtError> {
    // Plugins live as long as the process, and take a name once.
    static DONE: RwLock<Vec<String>> = RwLock::new(Vec::new());
    let plugin = client.plugin().sha256().to_owned();
    let mut done = DONE.write().unwrap_or_else(PoisonError::into_inner);
    if !done.contains(&plugin) {
        client.register_handler::<Products>()?;
        client.register_handler::<MatrixProduct>()?;
        client.register_handler::<WholeAttention>()?;
        client.register_handler::<AttentionGradient>()?;
        fused::register(client)?;
        step::register(client)?;
        done.push(plugin);
    }
    Ok(())
}

/// Matrices that programs can use. They are given back when it is dropped; programs still running with them finish.
#[derive(Debug)]
pub struct Session {
    id: i64,
    used: Arc<Used>,
}

impl Session {
    /// Makes matrices available, numbered by their positions.
    #[must_use]
    pub fn new(matrices: Vec<Matrix>) -> Self {
        static NEXT: AtomicI64 = AtomicI64::new(1);
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        let used = Arc::new(Used { matrices, history: Mutex::default() });
        let mut all = sessions().write().unwrap_or_else(PoisonError::into_inner);
        all.insert(id, Arc::clone(&used));
        Session { id, used }
    }

    /// What programs know it by: the value of the first operand of [`products`].
    #[must_use]
    pub fn id(&self) -> i64 {
        self.id
    }

    /// Its matrices.
    #[must_use]
    pub fn matrices(&self) -> &[Matrix] {
        &self.used.matrices
    }

    /// Bytes that a step reads which uses every matrix once.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.matrices().iter().map(|m| m.bytes().len()).sum()
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        sessions().write().unwrap_or_else(PoisonError::into_inner).remove(&self.id);
    }
}

fn rows<'a>(x: &Input<'a>) -> Result<Rows<'a>, String> {
    match x.dtype {
        DType::BF16 => x.as_slice::<bf16>().map(Rows::Bf16),
        _ => x.as_slice::<f32>().map(Rows::F32),
    }
}

fn room<'a>(y: &'a mut Output<'_>) -> Result<Out<'a>, String> {
    match y.dtype {
        DType::BF16 => y.as_mut_slice::<bf16>().map(Out::Bf16),
        _ => y.as_mut_slice::<f32>().map(Out::F32),
    }
}

/// Which products of a program with activations in `dtype` this machine computes faster here than the compiler's libraries do;
/// the functions must be [registered](register) before the program is compiled.
#[must_use]
pub fn product_calls(dtype: DType) -> Option<ProductCalls> {
    let dtypes = match dtype {
        DType::BF16 if ::kernels::has_bf16_products() => vec![DType::BF16, DType::F32],
        DType::F32 if ::kernels::has_wide_products() => vec![DType::F32],
        _ => return None,
    };
    Some(ProductCalls { target: MatrixProduct::NAME.to_owned(), dtypes, least_work: LEAST_WORK })
}

/// Multiplications that take as long as calling a function.
const LEAST_WORK: usize = 1 << 20;

/// What programs call for products of two of their values, see [`ProductCalls`].
struct MatrixProduct;

impl Handler for MatrixProduct {
    const NAME: &'static str = "lapidary.matmul";

    fn call(call: &mut Call<'_>) -> Result<(), String> {
        let [l, r] = call.inputs[..] else {
            return Err(format!("two operands are wanted, there are {}", call.inputs.len()));
        };
        let flag = |name: &str| call.attribute(name) == Some(Attribute::Int(1));
        let (lhs_transposed, rhs_transposed) = (flag("lhs_transposed"), flag("rhs_transposed"));
        let dims = |x: &Input<'_>, swap: bool| -> Result<[usize; 3], String> {
            let &[b, i, j] = x.dims else { return Err(format!("an operand {:?} has not three dimensions", x.dims)) };
            let [i, j] = if swap { [j, i] } else { [i, j] };
            let [b, i, j] = [b, i, j].map(usize::try_from);
            let text = |e: std::num::TryFromIntError| e.to_string();
            Ok([b.map_err(text)?, i.map_err(text)?, j.map_err(text)?])
        };
        let [batch, m, k] = dims(&l, lhs_transposed)?;
        let [other, k_too, n] = dims(&r, rhs_transposed)?;
        if (batch, k) != (other, k_too) {
            return Err(format!("operands {:?} and {:?} do not fit each other", l.dims, r.dims));
        }
        let product = Product { batch, m, n, k, lhs_transposed, rhs_transposed };
        let mut outputs = std::mem::take(&mut call.outputs);
        let [y] = &mut outputs[..] else { return Err(format!("one result is wanted, there are {}", outputs.len())) };
        ::kernels::matmul(&|task| call.run(task), &product, rows(&l)?, rows(&r)?, &mut room(y)?)
            .map_err(|e| e.to_string())
    }
}

/// The seven operands of attention, see [`gemma4::called::attention`].
fn attention_operands<'a>(call: &Call<'a>) -> Result<(Attention, Operands<'a>, Places<'a>), String> {
    let [q, k, v, queries, keys, query_segments, key_segments, ..] = call.inputs[..] else {
        return Err(format!("seven operands are wanted, there are {}", call.inputs.len()));
    };
    let extents = |x: &Input<'_>| x.dims.iter().map(|&d| usize::try_from(d).unwrap_or(0)).collect::<Vec<_>>();
    let [batch, kv_heads, t, group, width] = extents(&q)[..] else {
        return Err(format!("queries {:?} have not five dimensions", q.dims));
    };
    let [.., s, _] = extents(&k)[..] else { return Err(format!("keys {:?} have not four dimensions", k.dims)) };
    let window = match call.attribute("window") {
        Some(Attribute::Int(w)) => usize::try_from(w).map_err(|e| e.to_string())?,
        _ => return Err("the window is missing".to_owned()),
    };
    let places = Places {
        queries: queries.as_slice()?,
        keys: keys.as_slice()?,
        query_segments: query_segments.as_slice()?,
        key_segments: key_segments.as_slice()?,
    };
    let a = Attention { batch, kv_heads, queries: t, group, keys: s, width, window };
    Ok((a, Operands { q: rows(&q)?, k: rows(&k)?, v: rows(&v)? }, places))
}

/// What programs call for [attention](gemma4::called::attention).
struct WholeAttention;

impl Handler for WholeAttention {
    const NAME: &'static str = ATTENTION;

    fn call(call: &mut Call<'_>) -> Result<(), String> {
        let (a, x, places) = attention_operands(call)?;
        let mut outputs = std::mem::take(&mut call.outputs);
        let [y, lse] = &mut outputs[..] else { return Err(format!("two results are wanted, not {}", outputs.len())) };
        let lse = lse.as_mut_slice()?;
        ::kernels::attention(&|task| call.run(task), &a, &x, &places, &mut room(y)?, lse).map_err(|e| e.to_string())
    }
}

/// What programs call for its gradient.
struct AttentionGradient;

impl Handler for AttentionGradient {
    const NAME: &'static str = ATTENTION_GRADIENT;

    fn call(call: &mut Call<'_>) -> Result<(), String> {
        let (a, x, places) = attention_operands(call)?;
        let [.., lse, d_out] = call.inputs[..] else { return Err("operands are missing".to_owned()) };
        let mut outputs = std::mem::take(&mut call.outputs);
        let [dq, dk, dv] = &mut outputs[..] else {
            return Err(format!("three results are wanted, not {}", outputs.len()));
        };
        let given = Given { lse: lse.as_slice()?, d_out: rows(&d_out)? };
        let to = [&mut room(dq)?, &mut room(dk)?, &mut room(dv)?];
        ::kernels::attention_gradient(&|task| call.run(task), &a, &x, &places, &given, to).map_err(|e| e.to_string())
    }
}

/// What programs call.
struct Products;

impl Handler for Products {
    const NAME: &'static str = PRODUCTS;

    fn call(call: &mut Call<'_>) -> Result<(), String> {
        let [session, x] = call.inputs[..] else {
            return Err(format!("a session and x are wanted, there are {} operands", call.inputs.len()));
        };
        let count = call.outputs.len();
        let mut out = std::mem::take(&mut call.outputs);
        let mut out = out.iter_mut().map(room).collect::<Result<Vec<Out<'_>>, String>>()?;
        multiply(call, session, x, count, |rows, m, matrices, next| {
            ::kernels::products_before(pool(), rows, m, matrices, &mut out, next)
        })
    }
}

/// Finds the matrices of a call and those of the call that will probably be next, and multiplies the rows of `x` with them.
fn multiply(
    call: &Call<'_>,
    session: Input<'_>,
    x: Input<'_>,
    count: usize,
    products: impl FnOnce(Rows<'_>, usize, &[&Matrix], &[&Matrix]) -> Result<(), ::kernels::KernelError>,
) -> Result<(), String> {
    let start = Instant::now();
    let &[id] = session.as_slice::<i64>()? else { return Err("the session's number is not one number".to_owned()) };
    let session = sessions().read().unwrap_or_else(PoisonError::into_inner).get(&id).cloned();
    let session = session.ok_or_else(|| format!("there is no session {id}; it may have been dropped"))?;
    let mut numbers = Vec::with_capacity(count);
    let mut used = Vec::with_capacity(count);
    for i in 0..count {
        let name = format!("w{i}");
        let Some(Attribute::Int(number)) = call.attribute(&name) else {
            return Err(format!("the number of matrix {name} is missing"));
        };
        let index = usize::try_from(number).unwrap_or(usize::MAX);
        let Some(matrix) = session.matrices.get(index) else {
            return Err(format!("{name}: session {id} has {} matrices, no {number}", session.matrices.len()));
        };
        numbers.push(index);
        used.push(matrix);
    }
    let &[m, _] = x.dims else { return Err(format!("x {:?} is not a matrix", x.dims)) };
    let m = usize::try_from(m).map_err(|e| e.to_string())?;
    let next = session.next(&numbers);
    products(rows(&x)?, m, &used, &next).map_err(|e| e.to_string())?;
    CALLS.fetch_add(1, Ordering::Relaxed);
    BYTES.fetch_add(used.iter().map(|m| m.bytes().len() as u64).sum(), Ordering::Relaxed);
    NANOSECONDS.fetch_add(u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
    Ok(())
}
