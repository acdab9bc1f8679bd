//! The update of one parameter, as ops of the step's program. Everything is computed in f32.

use graph::{Compare, Graph, GraphError, TensorType, Value};
use tensor::DType;

use super::step::names::{MU, NU};
use crate::kernels::fused::{ADAM, SQUARES};

type Result<T> = std::result::Result<T, GraphError>;

/// How parameters follow their gradients.
#[derive(Debug, Clone, PartialEq)]
pub struct Update {
    /// The rule.
    pub rule: Rule,
    /// Largest norm of the whole gradient; 0 does not clip.
    pub clip: f64,
}

/// The rule of an [`Update`].
#[derive(Debug, Clone, PartialEq)]
pub enum Rule {
    /// Adam with decoupled weight decay.
    AdamW(AdamW),
    /// The gradient times the learning rate.
    Sgd,
}

/// Constants of AdamW.
#[derive(Debug, Clone, PartialEq)]
pub struct AdamW {
    /// Decay of the first moment.
    pub b1: f64,
    /// Decay of the second moment.
    pub b2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Added to the second moment under the root.
    pub eps_root: f64,
    /// Weight decay.
    pub weight_decay: f64,
    /// Dtype of the first moment.
    pub mu_dtype: DType,
    /// Dtype of the second moment.
    pub nu_dtype: DType,
}

/// Moments of a parameter, as far as the rule has any.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Moments {
    mu: Option<Value>,
    nu: Option<Value>,
}

impl Moments {
    pub(crate) fn set(&mut self, prefix: &str, v: Value) {
        match prefix {
            MU => self.mu = Some(v),
            _ => self.nu = Some(v),
        }
    }

    pub(crate) fn get(&self, prefix: &str) -> Option<Value> {
        match prefix {
            MU => self.mu,
            _ => self.nu,
        }
    }
}

impl Update {
    /// Prefixes of the moments' names and their dtypes, in the order of a program's inputs.
    #[must_use]
    pub fn moment_dtypes(&self) -> Vec<(&'static str, DType)> {
        match &self.rule {
            Rule::AdamW(a) => vec![(MU, a.mu_dtype), (NU, a.nu_dtype)],
            Rule::Sgd => Vec::new(),
        }
    }

    /// What the gradient is multiplied with for its norm to stay within bounds: `threshold / norm` from the threshold on.
    pub(crate) fn clip(&self, g: &Graph, norm: Value) -> Result<Value> {
        let one = g.full_like(norm, 1.0)?;
        if self.clip == 0.0 {
            return Ok(one);
        }
        let threshold = g.full_like(norm, self.clip)?;
        g.select(g.compare(Compare::Ge, norm, threshold)?, g.div(threshold, norm)?, one)
    }
}

/// What a step makes of a parameter.
pub(crate) struct Updated {
    pub(crate) parameter: Value,
    pub(crate) moments: Moments,
    /// Sum of squares of the parameter, where it is known already.
    pub(crate) square: Option<Value>,
}

/// The same by a function of the runtime, which goes through memory once, if it can.
fn called(
    g: &Graph,
    rule: &Rule,
    [p, grad]: [Value; 2],
    moments: &Moments,
    [factor, scalars]: [Value; 2],
    decayed: bool,
) -> Result<Option<Updated>> {
    let (Rule::AdamW(a), &Moments { mu: Some(mu), nu: Some(nu) }) = (rule, moments) else { return Ok(None) };
    if [p, mu, nu].iter().any(|&v| g.dtype(v) != DType::F32) {
        return Ok(None);
    }
    let bits = |v: f64| v.to_bits().cast_signed();
    let attributes = [
        ("b1", bits(a.b1)),
        ("b2", bits(a.b2)),
        ("eps", bits(a.eps)),
        ("eps_root", bits(a.eps_root)),
        ("weight_decay", bits(if decayed { a.weight_decay } else { 0.0 })),
    ];
    let results = [g.ty(p), g.ty(mu), g.ty(nu), g.ty(factor)];
    let inputs = [p, mu, nu, grad, factor, scalars];
    let y = g.custom_call_in_place(ADAM, &inputs, 3, &results, &attributes)?;
    let moments = Moments { mu: Some(y[1]), nu: Some(y[2]) };
    Ok(Some(Updated { parameter: y[0], moments, square: Some(y[3]) }))
}

/// Parameter and moments after the step. `factor` makes the summed gradient the clipped mean.
#[expect(clippy::too_many_arguments, reason = "one call; a struct for it would only rename these")]
pub(crate) fn apply(
    g: &Graph,
    update: &Update,
    p: Value,
    grad: Value,
    moments: &Moments,
    factor: Value,
    scalars: Value,
    decayed: bool,
    may_call: bool,
) -> Result<Updated> {
    let grad = if may_call { g.before_widening(grad) } else { grad };
    if may_call && let Some(updated) = called(g, &update.rule, [p, grad], moments, [factor, scalars], decayed)? {
        return Ok(updated);
    }
    // Computed in f32; in f64 where gradients or the parameter are.
    let in_f64 = [grad, p].iter().any(|&v| g.dtype(v) == DType::F64);
    let dtype = if in_f64 { DType::F64 } else { DType::F32 };
    let widened = |v: Value| g.convert(v, dtype);
    let scalar = |i: usize| widened(g.reshape(g.slice_dim(scalars, 0, i, i + 1)?, [])?);
    let (grad, factor) = (widened(grad)?, widened(factor)?);
    let rate = scalar(0)?;
    let grad = g.mul_bcast(grad, factor)?;
    let wide = widened(p)?;
    let (step, after) = match (&update.rule, moments) {
        (Rule::AdamW(a), Moments { mu: Some(mu), nu: Some(nu) }) => {
            let average = |old: Value, new: Value, decay: f64| {
                g.add(g.mul_scalar(widened(old)?, decay)?, g.mul_scalar(new, 1.0 - decay)?)
            };
            let mu_new = average(*mu, grad, a.b1)?;
            let nu_new = average(*nu, g.mul(grad, grad)?, a.b2)?;
            let mu_hat = g.mul_bcast(mu_new, scalar(1)?)?;
            let nu_hat = g.mul_bcast(nu_new, scalar(2)?)?;
            let nu_hat = if a.eps_root == 0.0 { nu_hat } else { g.add_scalar(nu_hat, a.eps_root)? };
            let mut step = g.div(mu_hat, g.add_scalar(g.sqrt(nu_hat)?, a.eps)?)?;
            if decayed && a.weight_decay != 0.0 {
                step = g.add(step, g.mul_scalar(wide, a.weight_decay)?)?;
            }
            let narrow = |v: Value, was: Value| g.convert(v, g.dtype(was));
            (step, Moments { mu: Some(narrow(mu_new, *mu)?), nu: Some(narrow(nu_new, *nu)?) })
        }
        _ => (grad, Moments::default()),
    };
    let new = g.sub(wide, g.mul_bcast(step, rate)?)?;
    Ok(Updated { parameter: g.convert(new, g.dtype(p))?, moments: after, square: None })
}

/// Sum of the squares of all elements, f32.
///
/// A compiler for CPUs walks a whole reduction on one thread; columns first keeps all of them busy.
pub(crate) fn sum_of_squares(g: &Graph, v: Value, may_call: bool) -> Result<Value> {
    let narrow = g.before_widening(v);
    if may_call && [DType::F32, DType::BF16].contains(&g.dtype(narrow)) {
        return Ok(g.custom_call(SQUARES, &[narrow], &[TensorType::new(DType::F32, [])], &[])?[0]);
    }
    let x = g.convert(v, g.dtype(v).accumulator())?;
    let mut s = g.mul(x, x)?;
    let rank = g.shape(s).rank();
    if rank > 1 {
        s = g.reduce_sum(s, &(0..rank - 1).collect::<Vec<_>>())?;
    }
    g.convert(g.reduce_sum(s, &(0..g.shape(s).rank()).collect::<Vec<_>>())?, DType::F32)
}
