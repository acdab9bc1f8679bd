//! What programs of training call for everything that is neither product nor attention, see [`gemma4::called`].

use ::kernels::{Adam, CrossEntropy, Losses, NormGradient, RmsNorm, State};
use gemma4::called::{CROSS_ENTROPY, GATED_GELU, RMS_NORM};
use pjrt::ffi::{Attribute, Call, Handler, Input, Output};
use pjrt::{Client, PjrtError};

use super::{room, rows};

pub(super) fn register(client: &Client) -> Result<(), PjrtError> {
    client.register_handler::<Norm>()?;
    client.register_handler::<NormBackward>()?;
    client.register_handler::<GatedGelu>()?;
    client.register_handler::<GatedGeluBackward>()?;
    client.register_handler::<Loss>()?;
    client.register_handler::<Update>()?;
    client.register_handler::<Squares>()
}

type Result<T, E = String> = std::result::Result<T, E>;

/// Operands or results, if there are as many.
pub(super) fn exactly<const N: usize, T>(all: Vec<T>) -> Result<[T; N]> {
    let n = all.len();
    all.try_into().map_err(|_| format!("{N} arrays are wanted, there are {n}"))
}

pub(super) fn inputs<'a, const N: usize>(call: &Call<'a>) -> Result<[Input<'a>; N]> {
    exactly(call.inputs.clone())
}

pub(super) fn outputs<'a, const N: usize>(call: &mut Call<'a>) -> Result<[Output<'a>; N]> {
    exactly(std::mem::take(&mut call.outputs))
}

/// A number that is given by its bits.
pub(super) fn number(call: &Call<'_>, name: &str) -> Result<f64> {
    match call.attribute(name) {
        Some(Attribute::Int(bits)) => Ok(f64::from_bits(bits.cast_unsigned())),
        _ => Err(format!("{name} is missing")),
    }
}

/// The same, rounded.
fn number32(call: &Call<'_>, name: &str) -> Result<f32> {
    Ok(number(call, name)? as f32)
}

fn text(e: ::kernels::KernelError) -> String {
    e.to_string()
}

fn width(x: &Input<'_>) -> Result<usize> {
    x.dims.last().and_then(|&d| usize::try_from(d).ok()).ok_or_else(|| "x has no rows".to_owned())
}

struct Norm;

impl Handler for Norm {
    const NAME: &'static str = RMS_NORM[0];

    fn call(call: &mut Call<'_>) -> Result<()> {
        let (x, weight) = match call.inputs[..] {
            [x] => (x, None),
            [x, w] => (x, Some(w.as_slice()?)),
            _ => return Err("one or two arrays are wanted".to_owned()),
        };
        let eps = number(call, "eps")?;
        let [mut y, mut inverse] = outputs(call)?;
        let norm = RmsNorm { width: width(&x)?, weight };
        let inverse = inverse.as_mut_slice()?;
        ::kernels::rms_norm(&|task| call.run(task), &norm, eps, rows(&x)?, &mut room(&mut y)?, inverse).map_err(text)
    }
}

struct NormBackward;

impl Handler for NormBackward {
    const NAME: &'static str = RMS_NORM[1];

    fn call(call: &mut Call<'_>) -> Result<()> {
        let (x, weight, inverse, ct) = match call.inputs[..] {
            [x, inverse, ct] => (x, None, inverse, ct),
            [x, w, inverse, ct] => (x, Some(w.as_slice()?), inverse, ct),
            _ => return Err("three or four arrays are wanted".to_owned()),
        };
        let norm = RmsNorm { width: width(&x)?, weight };
        let given = NormGradient { x: rows(&x)?, inverse: inverse.as_slice()?, ct: rows(&ct)? };
        let mut all = std::mem::take(&mut call.outputs);
        let mut unseen = vec![0.0; if weight.is_none() { norm.width } else { 0 }];
        let (dx, dw) = match &mut all[..] {
            [dx] if weight.is_none() => (dx, &mut unseen[..]),
            [dx, dw] => (dx, dw.as_mut_slice()?),
            _ => return Err("gradients by all operands are given".to_owned()),
        };
        ::kernels::rms_norm_gradient(&|task| call.run(task), &norm, &given, &mut room(dx)?, dw).map_err(text)
    }
}

struct GatedGelu;

impl Handler for GatedGelu {
    const NAME: &'static str = GATED_GELU[0];

    fn call(call: &mut Call<'_>) -> Result<()> {
        let [gate, up] = inputs(call)?;
        let [mut y] = outputs(call)?;
        ::kernels::gated_gelu(&|task| call.run(task), rows(&gate)?, rows(&up)?, &mut room(&mut y)?).map_err(text)
    }
}

struct GatedGeluBackward;

impl Handler for GatedGeluBackward {
    const NAME: &'static str = GATED_GELU[1];

    fn call(call: &mut Call<'_>) -> Result<()> {
        let [gate, up, ct] = inputs(call)?;
        let [mut d_gate, mut d_up] = outputs(call)?;
        let to = [&mut room(&mut d_gate)?, &mut room(&mut d_up)?];
        let run = |task: &(dyn Fn() + Sync)| call.run(task);
        ::kernels::gated_gelu_gradient(&run, rows(&gate)?, rows(&up)?, rows(&ct)?, to).map_err(text)
    }
}

struct Loss;

impl Handler for Loss {
    const NAME: &'static str = CROSS_ENTROPY;

    fn call(call: &mut Call<'_>) -> Result<()> {
        let [logits, targets, weights] = inputs(call)?;
        let capped = call.attribute("capped") == Some(Attribute::Int(1));
        let how =
            CrossEntropy { cap: capped.then(|| number32(call, "cap")).transpose()?, z_loss: number32(call, "z_loss")? };
        let [mut loss, mut z, mut d] = outputs(call)?;
        let mut losses = Losses { loss: loss.as_mut_slice()?, z: z.as_mut_slice()? };
        let (targets, weights) = (targets.as_slice()?, weights.as_slice()?);
        let run = |task: &(dyn Fn() + Sync)| call.run(task);
        ::kernels::cross_entropy(&run, &how, rows(&logits)?, targets, weights, &mut losses, &mut room(&mut d)?)
            .map_err(text)
    }
}

/// Name of the function that makes a step of AdamW. Operands are parameter and moments (f32, which the first results take over), the
/// gradient, its factor, and learning rate and corrections; the last result is the sum of squares of the new parameter.
/// Attributes are bits of f64.
pub(crate) const ADAM: &str = "lapidary.adam";

struct Update;

impl Handler for Update {
    const NAME: &'static str = ADAM;

    fn call(call: &mut Call<'_>) -> Result<()> {
        let [p, mu, nu, gradient, factor, scalars] = inputs(call)?;
        if [&p, &mu, &nu].iter().any(|x| !x.bytes.is_empty()) {
            return Err("parameter and moments are not taken over".to_owned());
        }
        let (&[factor], &[learning_rate, first, second]) = (factor.as_slice()?, scalars.as_slice()?) else {
            return Err("a factor and three scalars are wanted".to_owned());
        };
        let decay = |name: &str| number(call, name).map(|b| [b as f32, (1.0 - b) as f32]);
        let a = Adam {
            b1: decay("b1")?,
            b2: decay("b2")?,
            eps: number32(call, "eps")?,
            eps_root: number32(call, "eps_root")?,
            weight_decay: number32(call, "weight_decay")?,
            learning_rate,
            corrections: [first, second],
            factor,
        };
        let [mut p, mut mu, mut nu, mut square] = outputs(call)?;
        let state = State { parameter: p.as_mut_slice()?, mu: mu.as_mut_slice()?, nu: nu.as_mut_slice()? };
        let sum = ::kernels::adam(&|task| call.run(task), &a, state, rows(&gradient)?).map_err(text)?;
        square.as_mut_slice::<f32>()?.fill(sum);
        Ok(())
    }
}

/// Name of the function that sums squares: of an array, f32 `[]`.
pub(crate) const SQUARES: &str = "lapidary.squares";

struct Squares;

impl Handler for Squares {
    const NAME: &'static str = SQUARES;

    fn call(call: &mut Call<'_>) -> Result<()> {
        let [x] = inputs(call)?;
        let [mut sum] = outputs(call)?;
        let squares = ::kernels::squares(&|task| call.run(task), rows(&x)?).map_err(text)?;
        sum.as_mut_slice::<f32>()?.fill(squares);
        Ok(())
    }
}
