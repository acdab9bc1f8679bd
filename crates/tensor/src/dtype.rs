//! Element types, and their names in each notation that the project reads or writes.

use std::fmt;
use std::str::FromStr;

/// The type of one array element.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DType {
    /// Boolean, one byte, 0 or 1.
    Bool,
    /// Signed 8-bit integer.
    I8,
    /// Signed 16-bit integer.
    I16,
    /// Signed 32-bit integer.
    I32,
    /// Signed 64-bit integer.
    I64,
    /// Unsigned 8-bit integer.
    U8,
    /// Unsigned 16-bit integer.
    U16,
    /// Unsigned 32-bit integer.
    U32,
    /// Unsigned 64-bit integer.
    U64,
    /// IEEE binary16.
    F16,
    /// bfloat16: the upper half of an IEEE binary32.
    BF16,
    /// IEEE binary32.
    F32,
    /// IEEE binary64.
    F64,
}

/// A dtype name that no notation of [`DType`] knows.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown dtype {0:?}")]
pub struct UnknownDType(pub String);

impl DType {
    /// Every dtype, in declaration order.
    pub const ALL: [DType; 13] = [
        DType::Bool,
        DType::I8,
        DType::I16,
        DType::I32,
        DType::I64,
        DType::U8,
        DType::U16,
        DType::U32,
        DType::U64,
        DType::F16,
        DType::BF16,
        DType::F32,
        DType::F64,
    ];

    /// Names in: numpy/MaxText, safetensors, MLIR.
    const fn names(self) -> (&'static str, &'static str, &'static str) {
        match self {
            DType::Bool => ("bool", "BOOL", "i1"),
            DType::I8 => ("int8", "I8", "i8"),
            DType::I16 => ("int16", "I16", "i16"),
            DType::I32 => ("int32", "I32", "i32"),
            DType::I64 => ("int64", "I64", "i64"),
            DType::U8 => ("uint8", "U8", "ui8"),
            DType::U16 => ("uint16", "U16", "ui16"),
            DType::U32 => ("uint32", "U32", "ui32"),
            DType::U64 => ("uint64", "U64", "ui64"),
            DType::F16 => ("float16", "F16", "f16"),
            DType::BF16 => ("bfloat16", "BF16", "bf16"),
            DType::F32 => ("float32", "F32", "f32"),
            DType::F64 => ("float64", "F64", "f64"),
        }
    }

    /// Size of one element in bytes.
    #[must_use]
    pub const fn size(self) -> usize {
        match self {
            DType::Bool | DType::I8 | DType::U8 => 1,
            DType::I16 | DType::U16 | DType::F16 | DType::BF16 => 2,
            DType::I32 | DType::U32 | DType::F32 => 4,
            DType::I64 | DType::U64 | DType::F64 => 8,
        }
    }

    /// The name in numpy, JAX and MaxText: `bfloat16`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        self.names().0
    }

    /// The name in a safetensors header: `BF16`.
    #[must_use]
    pub const fn safetensors_name(self) -> &'static str {
        self.names().1
    }

    /// The name in MLIR: `bf16`.
    #[must_use]
    pub const fn mlir_name(self) -> &'static str {
        self.names().2
    }

    /// The dtype of a safetensors header name.
    #[must_use]
    pub fn from_safetensors(name: &str) -> Option<DType> {
        Self::ALL.into_iter().find(|d| d.safetensors_name() == name)
    }

    /// Whether it is a floating-point type.
    #[must_use]
    pub const fn is_float(self) -> bool {
        matches!(self, DType::F16 | DType::BF16 | DType::F32 | DType::F64)
    }

    /// What sums and statistics of such values are computed in: f64 of f64, else f32.
    #[must_use]
    pub const fn accumulator(self) -> DType {
        if matches!(self, DType::F64) { DType::F64 } else { DType::F32 }
    }

    /// Whether it is a signed or unsigned integer type (`Bool` is not).
    #[must_use]
    pub const fn is_integer(self) -> bool {
        !self.is_float() && !matches!(self, DType::Bool)
    }

    /// Whether it is a signed type: every float, and the signed integers.
    #[must_use]
    pub const fn is_signed(self) -> bool {
        self.is_float() || matches!(self, DType::I8 | DType::I16 | DType::I32 | DType::I64)
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for DType {
    type Err = UnknownDType;

    /// Reads any of the three notations: `bfloat16`, `BF16`, `bf16`.
    fn from_str(s: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .into_iter()
            .find(|d| {
                let (a, b, c) = d.names();
                s == a || s == b || s == c
            })
            .ok_or_else(|| UnknownDType(s.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_notation_reads_back() {
        for d in DType::ALL {
            for s in [d.name(), d.safetensors_name(), d.mlir_name()] {
                assert_eq!(s.parse::<DType>().unwrap(), d, "{s}");
            }
            assert_eq!(DType::from_safetensors(d.safetensors_name()), Some(d));
        }
        assert!("float8".parse::<DType>().is_err());
    }
}
