//! Element types, here and there.

use tensor::{DType, Shape};

use crate::error::{PjrtError, Result};
use crate::sys;

pub(crate) fn to_raw(dtype: DType) -> sys::PJRT_Buffer_Type {
    match dtype {
        DType::Bool => sys::PJRT_Buffer_Type_PRED,
        DType::I8 => sys::PJRT_Buffer_Type_S8,
        DType::I16 => sys::PJRT_Buffer_Type_S16,
        DType::I32 => sys::PJRT_Buffer_Type_S32,
        DType::I64 => sys::PJRT_Buffer_Type_S64,
        DType::U8 => sys::PJRT_Buffer_Type_U8,
        DType::U16 => sys::PJRT_Buffer_Type_U16,
        DType::U32 => sys::PJRT_Buffer_Type_U32,
        DType::U64 => sys::PJRT_Buffer_Type_U64,
        DType::F16 => sys::PJRT_Buffer_Type_F16,
        DType::BF16 => sys::PJRT_Buffer_Type_BF16,
        DType::F32 => sys::PJRT_Buffer_Type_F32,
        DType::F64 => sys::PJRT_Buffer_Type_F64,
    }
}

pub(crate) fn from_raw(raw: sys::PJRT_Buffer_Type) -> Result<DType> {
    DType::ALL.into_iter().find(|&d| to_raw(d) == raw).ok_or(PjrtError::ElementType(raw))
}

/// The dtype of an `xla.PrimitiveType` number, which XLA's protocol buffers and its foreign-function interface use.
pub(crate) fn from_primitive(number: i64) -> Option<DType> {
    Some(match number {
        1 => DType::Bool,
        2 => DType::I8,
        3 => DType::I16,
        4 => DType::I32,
        5 => DType::I64,
        6 => DType::U8,
        7 => DType::U16,
        8 => DType::U32,
        9 => DType::U64,
        10 => DType::F16,
        11 => DType::F32,
        12 => DType::F64,
        16 => DType::BF16,
        _ => return None,
    })
}

/// Dimensions as the C API wants them.
pub(crate) fn dims_to_raw(shape: &Shape) -> Result<Vec<i64>> {
    shape
        .dims()
        .iter()
        .map(|&d| i64::try_from(d).map_err(|_| PjrtError::Shape(tensor::ShapeError(shape.clone()))))
        .collect()
}

/// Dimensions as the C API gives them.
pub(crate) fn dims_from_raw(operation: &'static str, dims: &[i64]) -> Result<Shape> {
    let dims: Vec<usize> = dims
        .iter()
        .map(|&d| usize::try_from(d))
        .collect::<Result<_, _>>()
        .map_err(|_| PjrtError::Contract { operation, reason: format!("dimensions {dims:?}") })?;
    Ok(Shape::from(dims))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_dtype_survives_the_way_there_and_back() {
        for d in DType::ALL {
            assert_eq!(from_raw(to_raw(d)).unwrap(), d);
        }
        assert!(matches!(from_raw(sys::PJRT_Buffer_Type_C64), Err(PjrtError::ElementType(_))));
        let mut known: Vec<_> = (0..64).filter_map(from_primitive).collect();
        known.sort();
        assert_eq!(known, DType::ALL);
    }
}
