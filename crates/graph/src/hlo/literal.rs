//! Types and constants.

use std::fmt::{Display, Write as _};

use tensor::{DType, HostArray};

use crate::op::{ReduceKind, TensorType};

/// `tensor<2x3xf32>`.
pub(super) fn tensor(ty: &TensorType) -> String {
    let mut s = "tensor<".to_owned();
    for d in ty.shape.iter() {
        let _ = write!(s, "{d}x");
    }
    s + ty.dtype.mlir_name() + ">"
}

/// Items joined by commas, without brackets.
pub(super) fn list(items: impl IntoIterator<Item = impl Display>) -> String {
    let mut s = String::new();
    for (i, item) in items.into_iter().enumerate() {
        let _ = write!(s, "{}{item}", if i > 0 { ", " } else { "" });
    }
    s
}

/// One element, exact: floats are the hexadecimal digits of their bits.
fn element(dtype: DType, bytes: &[u8]) -> String {
    // `bytes` is one little-endian element.
    let mut wide = [0u8; 8];
    wide[..bytes.len()].copy_from_slice(bytes);
    let bits = u64::from_le_bytes(wide);
    match dtype {
        DType::Bool => (bits != 0).to_string(),
        DType::F16 | DType::BF16 => format!("0x{bits:04X}"),
        DType::F32 => format!("0x{bits:08X}"),
        DType::F64 => format!("0x{bits:016X}"),
        DType::I8 => (bits as u8 as i8).to_string(),
        DType::I16 => (bits as u16 as i16).to_string(),
        DType::I32 => (bits as u32 as i32).to_string(),
        DType::I64 => (bits as i64).to_string(),
        DType::U8 | DType::U16 | DType::U32 | DType::U64 => bits.to_string(),
    }
}

/// `dense<...>` of an array, or of the one element of a scalar that fills the shape.
pub(super) fn dense(data: &HostArray) -> String {
    let dtype = data.dtype();
    let elements: Vec<String> = data.bytes().chunks_exact(dtype.size()).map(|b| element(dtype, b)).collect();
    let mut s = "dense<".to_owned();
    if !elements.is_empty() {
        nested(&mut s, data.shape().dims(), &elements);
    }
    s + ">"
}

fn nested(s: &mut String, dims: &[usize], elements: &[String]) {
    let Some((&n, rest)) = dims.split_first() else {
        s.push_str(&elements[0]);
        return;
    };
    s.push('[');
    let each = elements.len() / n;
    for (i, part) in elements.chunks_exact(each).enumerate() {
        if i > 0 {
            s.push_str(", ");
        }
        nested(s, rest, part);
    }
    s.push(']');
}

/// The value a reduction starts from, as it stands in `dense<...>`.
pub(super) fn identity(kind: ReduceKind, dtype: DType) -> String {
    let bits = match (kind, dtype) {
        (ReduceKind::Or, DType::Bool) => return "false".to_owned(),
        (ReduceKind::And, DType::Bool) => return "true".to_owned(),
        (ReduceKind::Sum | ReduceKind::Or, _) => 0,
        // All ones: -1 for signed integers.
        (ReduceKind::And, _) => u64::MAX,
        (ReduceKind::Max, DType::F16) => 0xFC00,
        (ReduceKind::Max, DType::BF16) => 0xFF80,
        (ReduceKind::Max, DType::F32) => 0xFF80_0000,
        (ReduceKind::Max, DType::F64) => 0xFFF0_0000_0000_0000,
        (ReduceKind::Min, DType::F16) => 0x7C00,
        (ReduceKind::Min, DType::BF16) => 0x7F80,
        (ReduceKind::Min, DType::F32) => 0x7F80_0000,
        (ReduceKind::Min, DType::F64) => 0x7FF0_0000_0000_0000,
        // The sign bit alone is the smallest signed integer, everything below it the largest.
        (ReduceKind::Max, d) if d.is_signed() => 1 << (d.size() * 8 - 1),
        (ReduceKind::Min, d) if d.is_signed() => (1 << (d.size() * 8 - 1)) - 1,
        (ReduceKind::Max, _) => 0,
        (ReduceKind::Min, _) => u64::MAX,
    };
    element(dtype, &bits.to_le_bytes()[..dtype.size()])
}

/// Zero, as it stands in `dense<...>`.
pub(super) fn zero(dtype: DType) -> String {
    element(dtype, &[0; 8][..dtype.size()])
}
