//! Shapes with checked arithmetic.

use std::fmt;
use std::ops::Deref;

use crate::DType;

/// The extent of every dimension, outermost first.
#[derive(Clone, PartialEq, Eq, Hash, Default)]
pub struct Shape(Vec<usize>);

/// A shape whose size does not fit the address space.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("shape {0} is too large for this machine's address space")]
pub struct ShapeError(pub Shape);

impl Shape {
    /// The shape of a scalar: no dimensions, one element.
    #[must_use]
    pub const fn scalar() -> Self {
        Shape(Vec::new())
    }

    /// The extents.
    #[must_use]
    pub fn dims(&self) -> &[usize] {
        &self.0
    }

    /// Number of dimensions.
    #[must_use]
    pub fn rank(&self) -> usize {
        self.0.len()
    }

    /// Number of elements, or an error if it overflows `usize`.
    ///
    /// # Errors
    /// When the product of the extents overflows.
    pub fn checked_elements(&self) -> Result<usize, ShapeError> {
        // A zero anywhere makes the product zero even if the other factors overflow.
        if self.0.contains(&0) {
            return Ok(0);
        }
        self.0.iter().try_fold(1usize, |n, &d| n.checked_mul(d)).ok_or_else(|| ShapeError(self.clone()))
    }

    /// Number of elements of a shape known to fit memory (it saturates otherwise).
    #[must_use]
    pub fn elements(&self) -> usize {
        self.checked_elements().unwrap_or(usize::MAX)
    }

    /// Size in bytes, or an error if it overflows `usize`.
    ///
    /// # Errors
    /// When elements times element size overflows.
    pub fn checked_bytes(&self, dtype: DType) -> Result<usize, ShapeError> {
        self.checked_elements()?.checked_mul(dtype.size()).ok_or_else(|| ShapeError(self.clone()))
    }

    /// Row-major strides in elements.
    #[must_use]
    pub fn strides(&self) -> Vec<usize> {
        let mut strides = vec![1usize; self.rank()];
        for i in (0..self.rank().saturating_sub(1)).rev() {
            strides[i] = strides[i + 1].saturating_mul(self.0[i + 1]);
        }
        strides
    }
}

impl Deref for Shape {
    type Target = [usize];
    fn deref(&self) -> &[usize] {
        &self.0
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[")?;
        for (i, d) in self.0.iter().enumerate() {
            if i > 0 {
                f.write_str(", ")?;
            }
            write!(f, "{d}")?;
        }
        f.write_str("]")
    }
}

impl fmt::Debug for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl From<Vec<usize>> for Shape {
    fn from(v: Vec<usize>) -> Self {
        Shape(v)
    }
}

impl From<&[usize]> for Shape {
    fn from(v: &[usize]) -> Self {
        Shape(v.to_vec())
    }
}

impl<const N: usize> From<[usize; N]> for Shape {
    fn from(v: [usize; N]) -> Self {
        Shape(v.to_vec())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_strides() {
        let s = Shape::from([2, 3, 4]);
        assert_eq!(s.elements(), 24);
        assert_eq!(s.checked_bytes(DType::BF16).unwrap(), 48);
        assert_eq!(s.strides(), vec![12, 4, 1]);
        assert_eq!(Shape::scalar().elements(), 1);
        assert_eq!(s.to_string(), "[2, 3, 4]");
    }

    #[test]
    fn overflow_is_an_error() {
        let s = Shape::from([usize::MAX, 2]);
        assert!(s.checked_elements().is_err());
        assert_eq!(Shape::from([usize::MAX, 2, 0]).checked_elements().unwrap(), 0);
        assert!(Shape::from([usize::MAX / 2]).checked_bytes(DType::F32).is_err());
    }
}
