//! Single numbers: rounding, integer wrapping, elementwise functions.

use tensor::DType;

use super::Array;
use crate::op::{BinaryOp, Compare, UnaryOp};

/// Exponent and mantissa bits of a float dtype narrower than `f64`.
fn format(dtype: DType) -> Option<(u32, u32)> {
    match dtype {
        DType::F16 => Some((5, 10)),
        DType::BF16 => Some((8, 7)),
        DType::F32 => Some((8, 23)),
        _ => None,
    }
}

/// Rounds to nearest even in a float format with subnormals, directly (not by way of another format).
pub(super) fn quantise(x: f64, exponent: u32, mantissa: u32) -> f64 {
    if x == 0.0 || !x.is_finite() {
        return x;
    }
    let bias = (1i32 << (exponent - 1)) - 1;
    // Numbers whose exponent field is 0 are subnormal in f64 as well; their exponent is below every format's smallest.
    let e = ((x.to_bits() >> 52) & 0x7FF) as i32 - 1023;
    let e = e.max(1 - bias).min(1023);
    let unit = 2f64.powi((e - mantissa as i32).max(-1074));
    let r = (x / unit).round_ties_even() * unit;
    let largest = 2f64.powi(bias) * (2.0 - 2f64.powi(-(mantissa as i32)));
    if r.abs() > largest { f64::INFINITY.copysign(x) } else { r }
}

/// The value of a dtype that is nearest to `x`. Integers must be integral already and in range.
pub(super) fn round(x: f64, dtype: DType) -> f64 {
    format(dtype).map_or(x, |(e, m)| quantise(x, e, m))
}

/// Like the compiler's: results below the smallest normal number become zero if the exponent is narrowed.
pub(super) fn reduce_precision(x: f64, dtype: DType, exponent: u32, mantissa: u32) -> f64 {
    let (e, m) = format(dtype).unwrap_or((11, 52));
    if exponent >= e {
        return if mantissa >= m { x } else { quantise(x, e, mantissa) };
    }
    let r = quantise(x, exponent, mantissa.min(m));
    let smallest = 2f64.powi(2 - (1i32 << (exponent - 1)));
    // A number that is rounded up to the smallest normal one is kept, as only the rounded exponent counts.
    if r.abs() < smallest { 0f64.copysign(x) } else { r }
}

fn bits(dtype: DType) -> u32 {
    dtype.size() as u32 * 8
}

/// Wraps an integer into the range of its dtype.
fn wrap(x: i128, dtype: DType) -> f64 {
    let m = 1i128 << bits(dtype);
    let r = x.rem_euclid(m);
    (if dtype.is_signed() && r >= m / 2 { r - m } else { r }) as f64
}

pub(super) fn convert(x: f64, from: DType, to: DType) -> f64 {
    if to == DType::Bool {
        return f64::from(u8::from(x != 0.0));
    }
    if to.is_float() {
        return x;
    }
    if from.is_integer() {
        return wrap(x as i128, to);
    }
    // Floats truncate and saturate; NaN becomes 0.
    match to {
        DType::I8 => f64::from(x as i8),
        DType::I16 => f64::from(x as i16),
        DType::I32 => f64::from(x as i32),
        DType::I64 => x as i64 as f64,
        DType::U8 => f64::from(x as u8),
        DType::U16 => f64::from(x as u16),
        DType::U32 => f64::from(x as u32),
        _ => x as u64 as f64,
    }
}

pub(super) fn unary(u: UnaryOp, a: &Array) -> Vec<f64> {
    let dtype = a.ty.dtype;
    let f: fn(f64) -> f64 = match u {
        UnaryOp::Not if dtype == DType::Bool => |x| 1.0 - x,
        UnaryOp::Not => return a.v.iter().map(|&x| wrap(!(x as i128), dtype)).collect(),
        UnaryOp::Neg | UnaryOp::Abs if dtype.is_integer() => {
            let negate = |x: i128| if u == UnaryOp::Neg { -x } else { x.abs() };
            return a.v.iter().map(|&x| wrap(negate(x as i128), dtype)).collect();
        }
        UnaryOp::Neg => |x| -x,
        UnaryOp::Abs => f64::abs,
        UnaryOp::Sign => |x| if x == 0.0 || x.is_nan() { x } else { x.signum() },
        UnaryOp::Exp => f64::exp,
        UnaryOp::Expm1 => f64::exp_m1,
        UnaryOp::Log => f64::ln,
        UnaryOp::Log1p => f64::ln_1p,
        UnaryOp::Tanh => f64::tanh,
        UnaryOp::Logistic => |x| 1.0 / (1.0 + (-x).exp()),
        UnaryOp::Sqrt => f64::sqrt,
        UnaryOp::Rsqrt => |x| 1.0 / x.sqrt(),
        UnaryOp::Sin => f64::sin,
        UnaryOp::Cos => f64::cos,
        UnaryOp::Floor => f64::floor,
        UnaryOp::Ceil => f64::ceil,
    };
    a.v.iter().map(|&x| f(x)).collect()
}

/// The larger; NaN wins.
pub(super) fn max(a: f64, b: f64) -> f64 {
    if a.is_nan() || a > b { a } else { b }
}

/// The smaller; NaN wins.
pub(super) fn min(a: f64, b: f64) -> f64 {
    if a.is_nan() || a < b { a } else { b }
}

fn float(b: BinaryOp, x: f64, y: f64) -> f64 {
    match b {
        BinaryOp::Add => x + y,
        BinaryOp::Sub => x - y,
        BinaryOp::Mul => x * y,
        BinaryOp::Div => x / y,
        BinaryOp::Rem => x % y,
        BinaryOp::Max => max(x, y),
        BinaryOp::Min => min(x, y),
        BinaryOp::Pow => x.powf(y),
        // Not defined on floats; shape inference refuses them.
        BinaryOp::And | BinaryOp::Or | BinaryOp::Xor => f64::NAN,
    }
}

fn integer(b: BinaryOp, x: i128, y: i128) -> i128 {
    match b {
        BinaryOp::Add => x + y,
        BinaryOp::Sub => x - y,
        BinaryOp::Mul => x.wrapping_mul(y),
        // A division by zero gives all ones and leaves the dividend as remainder.
        BinaryOp::Div => x.checked_div(y).unwrap_or(-1),
        BinaryOp::Rem => x.checked_rem(y).unwrap_or(x),
        BinaryOp::Max => x.max(y),
        BinaryOp::Min => x.min(y),
        BinaryOp::And => x & y,
        BinaryOp::Or => x | y,
        BinaryOp::Xor => x ^ y,
        // Not defined on integers; shape inference refuses them.
        BinaryOp::Pow => 0,
    }
}

pub(super) fn binary(b: BinaryOp, x: &Array, y: &Array) -> Vec<f64> {
    let pairs = x.v.iter().zip(y.v.iter());
    match x.ty.dtype {
        d if d.is_float() => pairs.map(|(&x, &y)| float(b, x, y)).collect(),
        // Only and, or, xor: they stay within 0 and 1.
        DType::Bool => pairs.map(|(&x, &y)| integer(b, x as i128, y as i128) as f64).collect(),
        d => pairs.map(|(&x, &y)| wrap(integer(b, x as i128, y as i128), d)).collect(),
    }
}

/// Bitwise and/or of two elements, for reductions.
pub(super) fn bitwise(b: BinaryOp, x: f64, y: f64, dtype: DType) -> f64 {
    wrap(integer(b, x as i128, y as i128), dtype)
}

/// Sum of two elements of a dtype: integers wrap, floats stay in `f64`.
pub(super) fn sum(x: f64, y: f64, dtype: DType) -> f64 {
    if dtype.is_float() { x + y } else { wrap(x as i128 + y as i128, dtype) }
}

pub(super) fn compare(c: Compare, a: f64, b: f64) -> bool {
    match c {
        Compare::Eq => a == b,
        Compare::Ne => a != b,
        Compare::Lt => a < b,
        Compare::Le => a <= b,
        Compare::Gt => a > b,
        Compare::Ge => a >= b,
    }
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;

    #[test]
    fn rounding_agrees_with_the_types() {
        // Values around every power of two, subnormals, ties, overflow.
        let mut x = 1e-46;
        while x < 1e39 {
            for y in [x, -x] {
                assert_eq!(round(y, DType::F32), f64::from(y as f32), "{y}");
                assert_eq!(round(f64::from(y as f32), DType::F16), f64::from(f16::from_f32(y as f32)), "{y}");
                assert_eq!(round(f64::from(y as f32), DType::BF16), f64::from(bf16::from_f32(y as f32)), "{y}");
            }
            x *= 1.003_7;
        }
        // Just above a tie, by less than f32 can tell: must not be rounded twice.
        assert_eq!(round(1.0 + 2f64.powi(-8) + 2f64.powi(-50), DType::BF16), 1.0 + 2f64.powi(-7));
        assert_eq!(round(1.0 + 2f64.powi(-8), DType::BF16), 1.0);
        assert_eq!(round(f64::from(f32::MAX), DType::BF16), f64::INFINITY);
        assert!(round(f64::NAN, DType::F16).is_nan());
        assert_eq!(round(0.1, DType::F64), 0.1);
    }

    #[test]
    fn integers_wrap_and_floats_saturate() {
        assert_eq!(wrap(128, DType::I8), -128.0);
        assert_eq!(wrap(-1, DType::U8), 255.0);
        assert_eq!(convert(300.7, DType::F32, DType::I8), 127.0);
        assert_eq!(convert(300.0, DType::I32, DType::I8), 44.0);
        assert_eq!(convert(-0.5, DType::F32, DType::Bool), 1.0);
        assert_eq!(integer(BinaryOp::Div, -7, 2), -3);
        assert_eq!(integer(BinaryOp::Rem, -7, 2), -1);
    }
}
