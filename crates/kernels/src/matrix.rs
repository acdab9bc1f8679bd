//! A weight matrix, where it lies.

use std::fmt;

use crate::tiles::{BLOCK, Layout, ROWS};
use crate::{Bytes, KernelError};

/// How the elements of a [`Matrix`] are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Format {
    /// 32-bit floats, row-major, little-endian.
    F32,
    /// The upper halves of 32-bit floats, row-major, little-endian.
    Bf16,
    /// Whole numbers of 8 bits with a scale for each 64 columns of a row: 8.25 bits a weight.
    Int8,
    /// Whole numbers of 4 bits with a scale for each 32 columns of a row: 4.5 bits a weight.
    Int4,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Format::F32 => "float32",
            Format::Bf16 => "bfloat16",
            Format::Int8 => "int8",
            Format::Int4 => "int4",
        })
    }
}

impl Format {
    /// Bytes of a matrix `[n, k]`; quantised ones are padded to whole tiles. `None`: more than can be addressed.
    #[must_use]
    pub fn bytes(self, n: usize, k: usize) -> Option<usize> {
        // Pointers are advanced by at most this much.
        let limit = |bytes: usize| (bytes <= isize::MAX as usize).then_some(bytes);
        match (self, Layout::of(self)) {
            (_, Some(layout)) => n.div_ceil(ROWS).checked_mul(layout.tile(k)?).and_then(limit),
            (Format::F32, _) => n.checked_mul(k)?.checked_mul(4).and_then(limit),
            _ => n.checked_mul(k)?.checked_mul(2).and_then(limit),
        }
    }

    /// Tiles, blocks of a tile and bytes of a block of a quantised matrix `[n, k]`: how its bytes are cut where they are stored.
    /// `None` for other formats.
    #[must_use]
    pub fn tiles(self, n: usize, k: usize) -> Option<[usize; 3]> {
        let layout = Layout::of(self)?;
        Some([n.div_ceil(ROWS), k.div_ceil(BLOCK), layout.block])
    }

    /// Columns of a row that share a scale. `None` for formats without scales.
    #[must_use]
    pub fn group(self) -> Option<usize> {
        Layout::of(self).map(|layout| layout.group)
    }
}

/// A weight `[n, k]` (Hugging Face's `[out, in]`) over memory that something else keeps alive. Cloning copies no weights.
#[derive(Debug, Clone)]
pub struct Matrix {
    format: Format,
    n: usize,
    k: usize,
    bytes: Bytes,
}

impl Matrix {
    /// A matrix over bytes in a format. They may lie at any alignment.
    ///
    /// # Errors
    /// When it takes another number of bytes.
    pub fn new(format: Format, bytes: Bytes, n: usize, k: usize) -> Result<Self, KernelError> {
        // Units of work are counted in 32 bits.
        let needed = format.bytes(n, k).filter(|_| n <= i32::MAX as usize).ok_or(KernelError::TooLarge { n, k })?;
        match bytes.as_slice().len() {
            got if got == needed => Ok(Matrix { format, n, k, bytes }),
            got => Err(KernelError::Size { format, n, k, needed, got }),
        }
    }

    /// A matrix of bf16, row-major, as in a Hugging Face file.
    ///
    /// # Errors
    /// When there are not `2 n k` bytes.
    pub fn bf16(bytes: Bytes, n: usize, k: usize) -> Result<Self, KernelError> {
        Self::new(Format::Bf16, bytes, n, k)
    }

    /// A matrix of f32, row-major.
    ///
    /// # Errors
    /// When there are not `4 n k` bytes.
    pub fn f32(bytes: Bytes, n: usize, k: usize) -> Result<Self, KernelError> {
        Self::new(Format::F32, bytes, n, k)
    }

    /// How it is stored.
    #[must_use]
    pub fn format(&self) -> Format {
        self.format
    }

    /// Rows: elements of the result.
    #[must_use]
    pub fn n(&self) -> usize {
        self.n
    }

    /// Columns: elements of `x`.
    #[must_use]
    pub fn k(&self) -> usize {
        self.k
    }

    /// Where it lies.
    #[must_use]
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// The values of one row in f32. Empty if there is no such row.
    #[must_use]
    pub fn row(&self, row: usize) -> Vec<f32> {
        if row >= self.n {
            return Vec::new();
        }
        let bytes = self.bytes.as_slice();
        let Some(layout) = Layout::of(self.format) else {
            let mut values = vec![0.0; self.k];
            self.widen(bytes, row, &mut values);
            return values;
        };
        let size = layout.tile(self.k).unwrap_or(0);
        let tile = bytes.get(row / ROWS * size..(row / ROWS + 1) * size).unwrap_or_default();
        (0..self.k).map(|column| layout.value(tile, row % ROWS, column)).collect()
    }

    /// The values from the start of a row on, of a matrix that is not quantised and has the bytes.
    pub(crate) fn widen(&self, bytes: &[u8], row: usize, values: &mut [f32]) {
        let start = row * self.k;
        if self.format == Format::F32 {
            let from = bytes.get(start * 4..).unwrap_or_default().as_chunks().0;
            values.iter_mut().zip(from).for_each(|(v, &b)| *v = f32::from_le_bytes(b));
        } else {
            let from = bytes.get(start * 2..).unwrap_or_default().as_chunks().0;
            values.iter_mut().zip(from).for_each(|(v, &b)| *v = f32::from_bits(u32::from(u16::from_le_bytes(b)) << 16));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_checked() {
        let bytes = |n: usize| Bytes::from(vec![0; n]);
        let error = Matrix::bf16(bytes(11), 2, 3).unwrap_err();
        assert_eq!(error.to_string(), "a matrix [2, 3] of bfloat16 takes 12 bytes, got 11");
        assert!(matches!(Matrix::f32(bytes(1), usize::MAX, 2), Err(KernelError::TooLarge { .. })));
        assert!(matches!(Matrix::f32(bytes(0), usize::MAX, 0), Err(KernelError::TooLarge { .. })));
        assert_eq!(Matrix::f32(bytes(24), 2, 3).unwrap().row(1), [0.0; 3]);
        assert!(Matrix::f32(bytes(24), 2, 3).unwrap().row(2).is_empty());
    }
}
