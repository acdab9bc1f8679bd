//! What programs of decode steps call around and between products, see [`gemma4::called`].

use ::kernels::{Around, Heads, NewKeys, Out, RowNorm, Then};
use gemma4::called::{PRODUCTS_AROUND, STEP_ATTENTION, then};
use pjrt::ffi::{Attribute, Call, Handler, Input};
use pjrt::{Client, PjrtError};

use super::fused::{exactly, inputs, number, outputs};
use super::{multiply, pool, room, rows};

pub(super) fn register(client: &Client) -> Result<(), PjrtError> {
    client.register_handler::<ProductsAround>()?;
    client.register_handler::<Attention>()?;
    client.register_handler::<OwnAttention>()
}

type Result<T, E = String> = std::result::Result<T, E>;

fn integer(call: &Call<'_>, name: &str) -> Result<i64> {
    match call.attribute(name) {
        Some(Attribute::Int(v)) => Ok(v),
        _ => Err(format!("{name} is missing")),
    }
}

/// The only number of an array.
fn single(x: &Input<'_>) -> Result<f32> {
    match rows(x)? {
        ::kernels::Rows::F32(&[v]) => Ok(v),
        ::kernels::Rows::Bf16(&[v]) => Ok(v.to_f32()),
        _ => Err(format!("a factor is one number, not {:?}", x.dims)),
    }
}

struct ProductsAround;

impl Handler for ProductsAround {
    const NAME: &'static str = PRODUCTS_AROUND;

    fn call(call: &mut Call<'_>) -> Result<()> {
        let eps = number(call, "eps")?;
        let kind = integer(call, "then")?;
        let mut operands = call.inputs.clone().into_iter();
        let mut next = || operands.next().ok_or_else(|| "operands are missing".to_owned());
        let (session, x) = (next()?, next()?);
        let mut norm = || Ok::<_, String>(RowNorm { weight: rows(&next()?)?, eps });
        let before = (integer(call, "norm")? == 1).then(&mut norm).transpose()?;
        let count = call.outputs.len();
        let (count, then) = match kind {
            then::RESULTS => (count, Then::Results),
            then::GATED => (2, Then::Gated),
            then::GATED_BY => {
                let column = usize::try_from(integer(call, "column")?).map_err(|e| e.to_string())?;
                (1, Then::GatedBy { by: rows(&next()?)?, column })
            }
            then::ONTO | then::ONTO_SCALED => {
                let x = rows(&next()?)?;
                let norm = RowNorm { weight: rows(&next()?)?, eps };
                let scale = (kind == then::ONTO_SCALED).then(|| single(&next()?)).transpose()?;
                (1, Then::Onto { x, norm, scale })
            }
            then::CAPPED => (1, Then::Capped(number(call, "cap")? as f32)),
            _ => return Err(format!("nothing is known that is done as {kind}")),
        };
        let mut all = std::mem::take(&mut call.outputs);
        let mut out = all.iter_mut().map(room).collect::<Result<Vec<Out<'_>>>>()?;
        let around = Around { norm: before, then };
        multiply(call, session, x, count, |x, m, matrices, next| {
            ::kernels::products_around(pool(), x, m, matrices, &around, &mut out, next)
        })
    }
}

/// Where heads and sequences stand, from the cache's extents `[b, k, s, e]` and what both functions are given.
fn heads<'a>(
    call: &Call<'_>,
    cache: &Input<'_>,
    queries: &Input<'_>,
    [cos, sin, positions]: [&Input<'a>; 3],
) -> Result<Heads<'a>> {
    let extents = |x: &Input<'_>| x.dims.iter().map(|&d| usize::try_from(d).unwrap_or(0)).collect::<Vec<_>>();
    let ([_, kv_heads, rows_, width], [_, all]) = (exactly(extents(cache))?, exactly(extents(queries))?);
    Ok(Heads {
        positions: positions.as_slice()?,
        kv_heads,
        group: all / (kv_heads * width).max(1),
        width,
        rows: rows_,
        cos: rows(cos)?,
        sin: rows(sin)?,
        eps: number(call, "eps")?,
    })
}

struct Attention;

impl Handler for Attention {
    const NAME: &'static str = STEP_ATTENTION[0];

    fn call(call: &mut Call<'_>) -> Result<()> {
        let [keys, values, q, norm, cos, sin, positions] = inputs(call)?;
        let [mut out] = outputs(call)?;
        let h = heads(call, &keys, &q, [&cos, &sin, &positions])?;
        ::kernels::attend(pool(), &h, rows(&q)?, rows(&norm)?, rows(&keys)?, rows(&values)?, &mut room(&mut out)?)
            .map_err(|e| e.to_string())
    }
}

struct OwnAttention;

impl Handler for OwnAttention {
    const NAME: &'static str = STEP_ATTENTION[1];

    fn call(call: &mut Call<'_>) -> Result<()> {
        let [was, _, q, norm, cos, sin, positions, k, v, k_norm] = inputs(call)?;
        let [mut keys, mut values, mut out] = outputs(call)?;
        if !was.bytes.is_empty() {
            return Err("the cache is not taken over".to_owned());
        }
        let text = |e: ::kernels::KernelError| e.to_string();
        let h = heads(call, &was, &q, [&cos, &sin, &positions])?;
        let new = NewKeys { keys: rows(&k)?, values: rows(&v)?, norm: rows(&k_norm)? };
        let (mut keys, mut values) = (room(&mut keys)?, room(&mut values)?);
        ::kernels::write_keys(&h, &new, &mut keys, &mut values).map_err(text)?;
        let (keys, values) = (keys.rows(), values.rows());
        ::kernels::attend(pool(), &h, rows(&q)?, rows(&norm)?, keys, values, &mut room(&mut out)?).map_err(text)
    }
}
