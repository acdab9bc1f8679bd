//! Arrays in host memory.

use std::fmt;

use half::{bf16, f16};

use crate::{DType, Shape};

/// Alignment of every host array, in bytes: what XLA's CPU client needs to use memory in place.
const ALIGN: usize = 64;

#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
struct Block([u8; ALIGN]);

/// Owned bytes whose address is a multiple of 64, so that XLA can use them without a copy.
#[derive(Clone)]
pub struct AlignedBytes {
    blocks: Vec<Block>,
    len: usize,
}

impl AlignedBytes {
    /// `len` zero bytes, which the system hands out without touching them where it can.
    #[must_use]
    pub fn zeroed(len: usize) -> Self {
        AlignedBytes { blocks: bytemuck::zeroed_vec(len.div_ceil(ALIGN)), len }
    }

    /// A copy of `bytes`.
    #[must_use]
    pub fn copy_from(bytes: &[u8]) -> Self {
        let mut out = Self::zeroed(bytes.len());
        out.as_mut_slice().copy_from_slice(bytes);
        out
    }

    /// The bytes.
    #[must_use]
    pub fn as_slice(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.blocks)[..self.len]
    }

    /// The bytes, writable.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        &mut bytemuck::cast_slice_mut(&mut self.blocks)[..self.len]
    }
}

impl AsRef<[u8]> for AlignedBytes {
    fn as_ref(&self) -> &[u8] {
        self.as_slice()
    }
}

impl fmt::Debug for AlignedBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AlignedBytes({} bytes)", self.len)
    }
}

/// A Rust type that is stored as one [`DType`].
pub trait Element: bytemuck::Pod + PartialEq + fmt::Debug {
    /// The dtype it is stored as.
    const DTYPE: DType;
}

macro_rules! elements {
    ($($t:ty => $d:ident),*) => {$(
        impl Element for $t {
            const DTYPE: DType = DType::$d;
        }
    )*};
}
elements!(i8 => I8, i16 => I16, i32 => I32, i64 => I64, u8 => U8, u16 => U16, u32 => U32, u64 => U64,
          f16 => F16, bf16 => BF16, f32 => F32, f64 => F64);

/// What can go wrong when a host array is made or read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HostError {
    /// The bytes do not fill the shape.
    #[error("{shape} of {dtype} needs {needed} bytes, got {got}")]
    Size {
        /// The dtype asked for.
        dtype: DType,
        /// The shape asked for.
        shape: Shape,
        /// Bytes the two need.
        needed: usize,
        /// Bytes given.
        got: usize,
    },
    /// The array holds another dtype.
    #[error("expected an array of {wanted}, found {found}")]
    DType {
        /// What the caller wanted.
        wanted: DType,
        /// What the array holds.
        found: DType,
    },
    /// The shape overflows the address space.
    #[error(transparent)]
    Shape(#[from] crate::ShapeError),
}

/// A dense row-major array in host memory, 64-byte aligned.
#[derive(Clone)]
pub struct HostArray {
    dtype: DType,
    shape: Shape,
    data: AlignedBytes,
}

impl HostArray {
    /// An array of zeros.
    ///
    /// # Errors
    /// When the size overflows.
    pub fn zeros(dtype: DType, shape: impl Into<Shape>) -> Result<Self, HostError> {
        let shape = shape.into();
        let n = shape.checked_bytes(dtype)?;
        Ok(HostArray { dtype, shape, data: AlignedBytes::zeroed(n) })
    }

    /// An array from raw little-endian bytes (copied).
    ///
    /// # Errors
    /// When the bytes do not fill the shape exactly.
    pub fn from_bytes(dtype: DType, shape: impl Into<Shape>, bytes: &[u8]) -> Result<Self, HostError> {
        let shape = shape.into();
        let needed = shape.checked_bytes(dtype)?;
        if needed != bytes.len() {
            return Err(HostError::Size { dtype, shape, needed, got: bytes.len() });
        }
        Ok(HostArray { dtype, shape, data: AlignedBytes::copy_from(bytes) })
    }

    /// An array from typed values (copied).
    ///
    /// # Errors
    /// When the values do not fill the shape exactly.
    pub fn from_slice<T: Element>(shape: impl Into<Shape>, values: &[T]) -> Result<Self, HostError> {
        Self::from_bytes(T::DTYPE, shape, bytemuck::cast_slice(values))
    }

    /// A boolean array.
    ///
    /// # Errors
    /// When the values do not fill the shape exactly.
    pub fn from_bools(shape: impl Into<Shape>, values: &[bool]) -> Result<Self, HostError> {
        let bytes: Vec<u8> = values.iter().map(|&b| u8::from(b)).collect();
        Self::from_bytes(DType::Bool, shape, &bytes)
    }

    /// The element type.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The shape.
    #[must_use]
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// The raw bytes, row-major, little-endian.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        self.data.as_slice()
    }

    /// The raw bytes, writable.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        self.data.as_mut_slice()
    }

    /// The elements as `T`.
    ///
    /// # Errors
    /// When the array holds another dtype.
    pub fn as_slice<T: Element>(&self) -> Result<&[T], HostError> {
        if T::DTYPE != self.dtype {
            return Err(HostError::DType { wanted: T::DTYPE, found: self.dtype });
        }
        Ok(bytemuck::cast_slice(self.bytes()))
    }

    /// The elements as `T`, writable.
    ///
    /// # Errors
    /// When the array holds another dtype.
    pub fn as_mut_slice<T: Element>(&mut self) -> Result<&mut [T], HostError> {
        if T::DTYPE != self.dtype {
            return Err(HostError::DType { wanted: T::DTYPE, found: self.dtype });
        }
        Ok(bytemuck::cast_slice_mut(self.bytes_mut()))
    }

    /// Every element widened to `f64` (exact for all dtypes but 64-bit integers beyond 2^53; booleans are 0 or 1).
    #[must_use]
    pub fn to_f64(&self) -> Vec<f64> {
        fn widen<T: Element>(bytes: &[u8], f: impl Fn(T) -> f64) -> Vec<f64> {
            bytemuck::cast_slice::<u8, T>(bytes).iter().map(|&x| f(x)).collect()
        }
        let b = self.bytes();
        match self.dtype {
            DType::Bool | DType::U8 => b.iter().map(|&x| f64::from(x)).collect(),
            DType::I8 => widen::<i8>(b, f64::from),
            DType::I16 => widen::<i16>(b, f64::from),
            DType::I32 => widen::<i32>(b, f64::from),
            DType::I64 => widen::<i64>(b, |x| x as f64),
            DType::U16 => widen::<u16>(b, f64::from),
            DType::U32 => widen::<u32>(b, f64::from),
            DType::U64 => widen::<u64>(b, |x| x as f64),
            DType::F16 => widen::<f16>(b, f64::from),
            DType::BF16 => widen::<bf16>(b, f64::from),
            DType::F32 => widen::<f32>(b, f64::from),
            DType::F64 => widen::<f64>(b, |x| x),
        }
    }

    /// An array of `dtype` from `f64` values: floats round to nearest even, integers truncate and saturate,
    /// booleans are "not zero".
    ///
    /// # Errors
    /// When the values do not fill the shape exactly.
    pub fn from_f64(dtype: DType, shape: impl Into<Shape>, v: &[f64]) -> Result<Self, HostError> {
        fn narrow<T: Element>(v: &[f64], f: impl Fn(f64) -> T) -> Vec<u8> {
            bytemuck::cast_slice(&v.iter().map(|&x| f(x)).collect::<Vec<T>>()).to_vec()
        }
        let bytes = match dtype {
            DType::Bool => v.iter().map(|&x| u8::from(x != 0.0)).collect(),
            DType::I8 => narrow(v, |x| x as i8),
            DType::I16 => narrow(v, |x| x as i16),
            DType::I32 => narrow(v, |x| x as i32),
            DType::I64 => narrow(v, |x| x as i64),
            DType::U8 => narrow(v, |x| x as u8),
            DType::U16 => narrow(v, |x| x as u16),
            DType::U32 => narrow(v, |x| x as u32),
            DType::U64 => narrow(v, |x| x as u64),
            DType::F16 => narrow(v, f16::from_f64),
            DType::BF16 => narrow(v, bf16::from_f64),
            DType::F32 => narrow(v, |x| x as f32),
            DType::F64 => narrow(v, |x| x),
        };
        Self::from_bytes(dtype, shape, &bytes)
    }
}

impl fmt::Debug for HostArray {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HostArray({}{})", self.dtype, self.shape)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrays_are_aligned_and_typed() {
        let a = HostArray::from_slice([3], &[1.0f32, 2.0, 3.0]).unwrap();
        assert_eq!(a.bytes().as_ptr() as usize % 64, 0);
        assert_eq!(a.as_slice::<f32>().unwrap(), &[1.0, 2.0, 3.0]);
        assert!(matches!(a.as_slice::<i32>(), Err(HostError::DType { .. })));
        assert!(HostArray::from_slice([2], &[1.0f32]).is_err());
    }

    #[test]
    fn f64_round_trip_of_every_dtype() {
        for d in DType::ALL {
            let v = [0.0, 1.0, 1.0, 0.0];
            let a = HostArray::from_f64(d, [2, 2], &v).unwrap();
            assert_eq!(a.to_f64(), v, "{d}");
        }
    }
}
