//! Weights outside of programs: matrices that the `kernels` crate multiplies with, where they lie.

use std::sync::Arc;

use ::kernels::{Bytes, Matrix};
use gemma4::cached::called_matrices;
use pjrt::{Buffer, Placement};
use rayon::prelude::*;
use tensor::{DType, HostArray};

use super::Quantization;
use crate::forward::{Placed, narrow, placed_as};
use crate::kernels::{self, Session};
use crate::{EngineError, Model, Result, Runtime};

/// The matrices of a model, by the numbers that programs call them by.
#[derive(Debug)]
pub(super) struct Matrices {
    session: Session,
    /// The session's number, as programs take it.
    pub(super) id: Buffer,
}

/// A matrix in memory of its own.
struct Owned(HostArray);

impl AsRef<[u8]> for Owned {
    fn as_ref(&self) -> &[u8] {
        self.0.bytes()
    }
}

impl Matrices {
    /// Finds every matrix: in its mapped file, or, where it has to be converted or quantized, in memory.
    pub(super) fn new(
        runtime: &Runtime,
        model: &Model,
        dtype: DType,
        quantize: Option<Quantization>,
        placed: &mut Placed,
    ) -> Result<Self> {
        let client = runtime.client();
        kernels::register(client)?;
        let found = find(model, dtype, quantize)?;
        let mut matrices = Vec::with_capacity(found.len());
        for (_, matrix, placement) in found {
            placed.count(placement, matrix.bytes().len());
            matrices.push(matrix);
        }
        let session = Session::new(matrices);
        let id = client.buffer_from_host(&HostArray::from_slice([1], &[session.id()])?, 0)?;
        Ok(Matrices { session, id })
    }

    /// Bytes that a decode step reads of them.
    pub(super) fn bytes(&self) -> usize {
        self.session.bytes()
    }
}

/// Every matrix of a model, with its name: as it is stored where that is quantized.
fn find(model: &Model, dtype: DType, quantize: Option<Quantization>) -> Result<Vec<(String, Matrix, Placement)>> {
    called_matrices(model.arch())
        .into_par_iter()
        .map(|p| {
            let (n, k) = (p.shape.dims()[0], p.shape.dims()[1]);
            let named = |e: ::kernels::KernelError| EngineError::Input(format!("{}: {e}", p.name));
            if let Some((format, view)) = model.tiles(&p.name) {
                let bytes = Bytes::new(Arc::new(view.bytes.clone()));
                return Ok((p.name.clone(), Matrix::new(format, bytes, n, k).map_err(named)?, Placement::ZeroCopy));
            }
            let (matrix, placement) = matrix(model, &p.name, n, k, dtype)?;
            let Some(format) = quantize.map(Quantization::format) else { return Ok((p.name, matrix, placement)) };
            let quantized = matrix.quantize(kernels::pool(), format).map_err(named)?;
            Ok((p.name, quantized, Placement::Copied))
        })
        .collect()
}

/// The matrices of a model that do the same in different layers.
#[derive(Debug)]
pub struct Alike {
    /// Their name without the layer: `mlp.gate_proj.weight`.
    pub name: String,
    /// The matrices, in the order of layers, all of one shape.
    pub matrices: Vec<Matrix>,
}

/// The matrices that decode steps multiply with, as they lie then. A role with two shapes comes twice.
///
/// # Errors
/// When a weight cannot be read or quantized.
pub fn matrices_by_role(model: &Model, dtype: DType, quantize: Option<Quantization>) -> Result<Vec<Alike>> {
    let mut all: Vec<Alike> = Vec::new();
    for (name, matrix, _) in find(model, dtype, model.quantization(quantize)?)? {
        let role = match name.strip_prefix("layers.").and_then(|rest| rest.split_once('.')) {
            Some((_, role)) => role.to_owned(),
            None => name,
        };
        let shape = |m: &Matrix| (m.n(), m.k());
        let like = all.iter_mut().find(|a| a.name == role && a.matrices.iter().all(|m| shape(m) == shape(&matrix)));
        match like {
            Some(alike) => alike.matrices.push(matrix),
            None => all.push(Alike { name: role, matrices: vec![matrix] }),
        }
    }
    Ok(all)
}

/// One matrix for activations in `dtype`.
fn matrix(model: &Model, name: &str, n: usize, k: usize, dtype: DType) -> Result<(Matrix, Placement)> {
    let named = |e: ::kernels::KernelError| EngineError::Input(format!("{name}: {e}"));
    let of = |stored: DType, bytes| match stored {
        DType::BF16 => Matrix::bf16(bytes, n, k).map_err(named),
        _ => Matrix::f32(bytes, n, k).map_err(named),
    };
    let as_is = |stored: DType| placed_as(stored, dtype) == stored && stored != DType::F16;
    if let Some(view) = model.mapped(name)
        && as_is(view.dtype)
    {
        return Ok((of(view.dtype, Bytes::new(Arc::new(view.bytes.clone())))?, Placement::ZeroCopy));
    }
    let mut read = model.read(name)?;
    if !as_is(read.dtype()) {
        let to = if dtype == DType::BF16 { DType::BF16 } else { DType::F32 };
        read = narrow(read.dtype(), read.bytes(), read.shape().clone(), to)?;
    }
    Ok((of(read.dtype(), Bytes::new(Arc::new(Owned(read))))?, Placement::Copied))
}
