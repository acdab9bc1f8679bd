//! Products of a program's values with large matrices, computed by the `kernels` crate instead of XLA. CPU only.
//!
//! A decode step multiplies few rows with every weight of a model. XLA's own products read weights far below the speed of
//! memory, and want each in a buffer of its own at 64-byte alignment. A program that calls [`products`] instead names a
//! [`Session`] (an input of the program, so that a compiled program serves any of them and can be cached) and matrices
//! of it by number. The matrices stay where they are: in a mapped file, at any alignment.

use std::collections::HashMap;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, RwLock};

use ::kernels::{Matrix, Out, Pool, Rows};
use gemma4::called::PRODUCTS;
pub use gemma4::called::products;
use half::bf16;
use pjrt::ffi::{Attribute, Call, Handler};
use pjrt::{Client, PjrtError};
use tensor::DType;

/// The matrices of the sessions that live, by number.
static SESSIONS: OnceLock<RwLock<HashMap<i64, Arc<[Matrix]>>>> = OnceLock::new();
static POOL: OnceLock<Pool> = OnceLock::new();

fn sessions() -> &'static RwLock<HashMap<i64, Arc<[Matrix]>>> {
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

/// The best speed, in bytes a second, at which these threads read memory in a few tries: what products of few rows are
/// measured against.
///
/// # Errors
/// When there is no memory for it (1 GiB).
pub fn read_bandwidth() -> crate::Result<f64> {
    const BYTES: usize = 1 << 30;
    let times = ::kernels::reading_times(pool(), BYTES, 4).map_err(|e| crate::EngineError::Input(e.to_string()))?;
    let best = times.iter().min().map_or(f64::NAN, std::time::Duration::as_secs_f64);
    Ok(BYTES as f64 / best)
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
        done.push(plugin);
    }
    Ok(())
}

/// Matrices that programs can use. They are given back when it is dropped; programs still running with them finish.
#[derive(Debug)]
pub struct Session {
    id: i64,
    matrices: Arc<[Matrix]>,
}

impl Session {
    /// Makes matrices available, numbered by their positions.
    #[must_use]
    pub fn new(matrices: Vec<Matrix>) -> Self {
        static NEXT: AtomicI64 = AtomicI64::new(1);
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        let matrices: Arc<[Matrix]> = matrices.into();
        let mut all = sessions().write().unwrap_or_else(PoisonError::into_inner);
        all.insert(id, Arc::clone(&matrices));
        Session { id, matrices }
    }

    /// What programs know it by: the value of the first operand of [`products`].
    #[must_use]
    pub fn id(&self) -> i64 {
        self.id
    }

    /// Its matrices.
    #[must_use]
    pub fn matrices(&self) -> &[Matrix] {
        &self.matrices
    }

    /// Bytes that a step reads which uses every matrix once.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.matrices.iter().map(|m| m.bytes().len()).sum()
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        sessions().write().unwrap_or_else(PoisonError::into_inner).remove(&self.id);
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
        let &[id] = session.as_slice::<i64>()? else { return Err("the session's number is not one number".to_owned()) };
        let matrices = sessions().read().unwrap_or_else(PoisonError::into_inner).get(&id).cloned();
        let matrices = matrices.ok_or_else(|| format!("there is no session {id}; it may have been dropped"))?;
        let used = (0..call.outputs.len())
            .map(|i| {
                let name = format!("w{i}");
                let Some(Attribute::Int(number)) = call.attribute(&name) else {
                    return Err(format!("the number of matrix {name} is missing"));
                };
                let matrix = usize::try_from(number).ok().and_then(|number| matrices.get(number));
                matrix.ok_or_else(|| format!("{name}: session {id} has {} matrices, no {number}", matrices.len()))
            })
            .collect::<Result<Vec<&Matrix>, String>>()?;
        let &[m, _] = x.dims else { return Err(format!("x {:?} is not a matrix", x.dims)) };
        let m = usize::try_from(m).map_err(|e| e.to_string())?;
        let rows = match x.dtype {
            DType::BF16 => Rows::Bf16(x.as_slice::<bf16>()?),
            _ => Rows::F32(x.as_slice::<f32>()?),
        };
        let mut out = call
            .outputs
            .iter_mut()
            .map(|y| match y.dtype {
                DType::BF16 => y.as_mut_slice::<bf16>().map(Out::Bf16),
                _ => y.as_mut_slice::<f32>().map(Out::F32),
            })
            .collect::<Result<Vec<Out<'_>>, String>>()?;
        ::kernels::products(pool(), rows, m, &used, &mut out).map_err(|e| e.to_string())
    }
}
