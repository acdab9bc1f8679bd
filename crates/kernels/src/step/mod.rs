//! What a decode step does around its products: norms, gates, what is added to the stream, attention over a cache.
//!
//! The values between products are few, so that time goes into starting functions rather than into arithmetic: each function
//! here does all there is up to the next product. Values have the kind of `x`, to which they are rounded where the plain form
//! rounds them; between that everything is f32. Nothing depends on the number of threads.

mod attention;
#[cfg(test)]
#[cfg(target_arch = "x86_64")]
mod tests;

pub use attention::{Heads, NewKeys, attend, write_keys};

use half::bf16;

use crate::fused::{check, check_machine};
use crate::{KernelError, Matrix, Out, Pool, Rows};
#[cfg(target_arch = "x86_64")]
use crate::{
    fused::lanes::{self, Element},
    product::products_before,
    tasks::each_of,
};

/// A norm of rows: over the root of the mean square plus `eps`, times the weight.
#[derive(Debug, Clone, Copy)]
pub struct RowNorm<'a> {
    /// One for each element of a row, of any kind.
    pub weight: Rows<'a>,
    /// Added to the mean square.
    pub eps: f64,
}

/// What becomes of the results of products.
#[derive(Debug, Clone, Copy)]
pub enum Then<'a> {
    /// They are the results: one for each matrix.
    Results,
    /// The GELU (with tanh) of the first times the second, of two matrices.
    Gated,
    /// The GELU of the only one times columns from `column` on of the rows `by`.
    GatedBy {
        /// As many rows as `x` has.
        by: Rows<'a>,
        /// The first column.
        column: usize,
    },
    /// The norm of the only one is added to `x`, and the sum multiplied by `scale`.
    Onto {
        /// As many rows, as wide as the result.
        x: Rows<'a>,
        /// Of the result.
        norm: RowNorm<'a>,
        /// Of the sum.
        scale: Option<f32>,
    },
    /// `cap * tanh(y / cap)` of the only one, in f32.
    Capped(f32),
}

/// What is done before and after products.
#[derive(Debug, Clone, Copy)]
pub struct Around<'a> {
    /// Of the rows of `x`.
    pub norm: Option<RowNorm<'a>>,
    /// To the results.
    pub then: Then<'a>,
}

/// [`products_before`](crate::products_before) of normed rows, with something done to the results.
///
/// # Errors
/// When sizes or kinds do not agree, or this machine lacks the instructions ([`has_wide_products`](crate::has_wide_products)).
pub fn products_around(
    pool: &Pool,
    x: Rows<'_>,
    m: usize,
    matrices: &[&Matrix],
    how: &Around<'_>,
    out: &mut [Out<'_>],
    next: &[&Matrix],
) -> Result<(), KernelError> {
    check_machine()?;
    #[cfg(target_arch = "x86_64")]
    match x {
        Rows::F32(x) => around(pool, x, m, matrices, how, out, next),
        Rows::Bf16(x) => around(pool, x, m, matrices, how, out, next),
    }
    #[cfg(not(target_arch = "x86_64"))]
    Ok(())
}

/// A kind of elements.
#[cfg(target_arch = "x86_64")]
trait Kind: Element + Default {
    fn of<'a>(rows: Rows<'a>) -> Result<&'a [Self], KernelError>;
    fn of_out<'a>(out: &'a mut Out<'_>) -> Result<&'a mut [Self], KernelError>;
    fn rows(x: &[Self]) -> Rows<'_>;
    fn out(x: &mut [Self]) -> Out<'_>;
}

macro_rules! kind {
    ($t:ty, $name:ident) => {
        #[cfg(target_arch = "x86_64")]
        impl Kind for $t {
            fn of<'a>(rows: Rows<'a>) -> Result<&'a [Self], KernelError> {
                if let Rows::$name(x) = rows { Ok(x) } else { Err(KernelError::Mixed) }
            }
            fn of_out<'a>(out: &'a mut Out<'_>) -> Result<&'a mut [Self], KernelError> {
                if let Out::$name(x) = out { Ok(x) } else { Err(KernelError::Mixed) }
            }
            fn rows(x: &[Self]) -> Rows<'_> {
                Rows::$name(x)
            }
            fn out(x: &mut [Self]) -> Out<'_> {
                Out::$name(x)
            }
        }
    };
}
kind!(f32, F32);
kind!(bf16, Bf16);

/// In f32.
fn widened(x: Rows<'_>) -> Vec<f32> {
    match x {
        Rows::F32(x) => x.to_vec(),
        Rows::Bf16(x) => x.iter().map(|v| f32::from_bits(u32::from(v.to_bits()) << 16)).collect(),
    }
}

/// The norm of rows of so many elements, times a weight if there is one.
#[cfg(target_arch = "x86_64")]
fn normed<T: Kind>(x: &[T], width: usize, weight: Option<Rows<'_>>, eps: f64) -> Result<Vec<T>, KernelError> {
    let width = width.max(1);
    let weight = weight.map_or_else(|| vec![1.0; width], widened);
    check("the norm's weight", weight.len(), [1, width])?;
    let (mut y, mut inverse) = (vec![T::default(); x.len()], vec![0.0; x.len() / width]);
    // SAFETY: callers have checked that the machine has the instructions.
    unsafe { lanes::norm(width, &weight, eps, x, &mut y, &mut inverse) };
    Ok(y)
}

#[cfg(target_arch = "x86_64")]
fn around<T: Kind>(
    pool: &Pool,
    x: &[T],
    m: usize,
    matrices: &[&Matrix],
    how: &Around<'_>,
    out: &mut [Out<'_>],
    next: &[&Matrix],
) -> Result<(), KernelError> {
    let k = matrices.first().map_or(0, |w| w.k());
    let own;
    let x = match how.norm {
        None => x,
        Some(norm) => {
            check("x", x.len(), [m, k])?;
            own = normed(x, k, Some(norm.weight), norm.eps)?;
            &own
        }
    };
    if let Then::Results = how.then {
        return products_before(pool, T::rows(x), m, matrices, out, next);
    }
    let count = KernelError::Count { matrices: matrices.len(), results: out.len() };
    let [out] = out else { return Err(count) };
    let mut results: Vec<Vec<T>> = matrices.iter().map(|w| vec![T::default(); m * w.n()]).collect();
    let mut rooms: Vec<Out<'_>> = results.iter_mut().map(|y| T::out(y)).collect();
    products_before(pool, T::rows(x), m, matrices, &mut rooms, next)?;
    let n = matrices.first().map_or(0, |w| w.n());
    match (how.then, &results[..]) {
        (Then::Gated, [gate, up]) => {
            let y = T::of_out(out)?;
            check("up", up.len(), [m, n])?;
            check("the result", y.len(), [m, n])?;
            let items = y.chunks_mut(PIECE).zip(gate.chunks(PIECE)).zip(up.chunks(PIECE));
            // SAFETY: the machine has the instructions.
            each(pool, items, |((y, gate), up)| unsafe { lanes::gelu(gate, up, y) });
        }
        (Then::GatedBy { by, column }, [gate]) => {
            let (y, by) = (T::of_out(out)?, T::of(by)?);
            check("the result", y.len(), [m, n])?;
            let width = by.len() / m.max(1);
            if by.len() != m * width || column.checked_add(n).is_none_or(|end| end > width) {
                return Err(KernelError::Operand { what: "the gate's factor", got: by.len(), batch: 1, a: m, b: n });
            }
            for (i, (y, gate)) in y.chunks_mut(n.max(1)).zip(gate.chunks(n.max(1))).enumerate() {
                // SAFETY: the machine has the instructions.
                unsafe { lanes::gelu(gate, &by[i * width + column..][..n], y) };
            }
        }
        (Then::Onto { x, norm, scale }, [result]) => {
            let (y, x) = (T::of_out(out)?, T::of(x)?);
            check("the result", y.len(), [m, n])?;
            check("what is added to", x.len(), [m, n])?;
            let added = normed(result, n, Some(norm.weight), norm.eps)?;
            // SAFETY: the machine has the instructions.
            unsafe { lanes::sum(x, &added, scale, y) };
        }
        (Then::Capped(cap), [result]) => {
            let Out::F32(y) = out else { return Err(KernelError::Mixed) };
            check("the result", y.len(), [m, n])?;
            let items = y.chunks_mut(PIECE).zip(result.chunks(PIECE));
            // SAFETY: the machine has the instructions.
            each(pool, items, |(y, result)| unsafe {
                lanes::logits(Some(cap), result, y);
            });
        }
        _ => return Err(count),
    }
    Ok(())
}

/// Elements that are worth asking another thread for.
const PIECE: usize = 2048;

/// Works on all items, on the threads of a pool.
#[cfg(target_arch = "x86_64")]
fn each<I: Send>(pool: &Pool, items: impl Iterator<Item = I> + Send, work: impl Fn(I) + Sync) {
    each_of(&|task| pool.run(&|_| task()), items, || (), |(), item| work(item));
}
