//! Where a run's arrays come from, and how they get onto the device without a second copy on the host.

use checkpoint::safetensors::TensorView;
use gemma4::layout::Slot;
use pjrt::{Buffer, Client};
use tensor::{DType, HostArray, Shape};

use super::TrainError;
use super::device::converted;

type Result<T> = std::result::Result<T, TrainError>;

/// An array, where it is.
#[derive(Debug)]
pub(crate) enum Given {
    /// In memory.
    Host(HostArray),
    /// In a mapped file.
    Mapped(Pages),
}

/// An array in a mapped file, whose pages go back to the system after use: they would stay in memory beside the copy.
#[derive(Debug)]
pub(crate) struct Pages(TensorView);

impl Drop for Pages {
    fn drop(&mut self) {
        self.0.bytes.advise_dont_need();
    }
}

impl From<TensorView> for Given {
    fn from(view: TensorView) -> Self {
        Given::Mapped(Pages(view))
    }
}

/// Gives a parameter by Hugging Face name, in its shape, in any float dtype.
pub(crate) type Source<'a> = dyn Fn(&str) -> Result<Given> + Sync + 'a;

impl Given {
    fn dtype(&self) -> DType {
        match self {
            Given::Host(a) => a.dtype(),
            Given::Mapped(v) => v.0.dtype,
        }
    }

    fn shape(&self) -> &Shape {
        match self {
            Given::Host(a) => a.shape(),
            Given::Mapped(v) => &v.0.shape,
        }
    }

    fn bytes(&self) -> &[u8] {
        match self {
            Given::Host(a) => a.bytes(),
            Given::Mapped(v) => v.0.bytes.as_slice(),
        }
    }

    /// The array in memory.
    pub(crate) fn into_host(self) -> Result<HostArray> {
        match self {
            Given::Host(a) => Ok(a),
            Given::Mapped(v) => Ok(HostArray::from_bytes(v.0.dtype, v.0.shape.clone(), v.0.bytes.as_slice())?),
        }
    }

    /// Calls `f` with the bytes of the array in a dtype, converted only if they must be.
    fn with_bytes<R>(self, dtype: DType, f: impl FnOnce(&[u8]) -> Result<R>) -> Result<R> {
        let from = self.dtype();
        if from == dtype {
            return f(self.bytes());
        }
        f(converted(from, self.bytes(), self.shape(), dtype)?.bytes())
    }
}

/// A slot's members on the device, in memory of the device's own: what a step gets to overwrite must not be borrowed, or the
/// runtime would copy it at the first step.
pub(crate) fn place(
    client: &Client,
    slot: &Slot,
    dtype: DType,
    read: &dyn Fn(&str) -> Result<Given>,
) -> Result<Buffer> {
    if let [only] = &slot.members[..]
        && !slot.stacked
    {
        return read(&only.name)?.with_bytes(dtype, |b| Ok(client.buffer_from_bytes(b, dtype, &slot.shape, 0)?));
    }
    Ok(client.buffer_from_host(&stacked(slot, dtype, read)?, 0)?)
}

/// The members of a slot in one array.
fn stacked(slot: &Slot, dtype: DType, read: &dyn Fn(&str) -> Result<Given>) -> Result<HostArray> {
    let mut all = HostArray::zeros(dtype, slot.shape.clone())?;
    let size = all.bytes().len() / slot.members.len();
    for (m, place) in slot.members.iter().zip(all.bytes_mut().chunks_mut(size)) {
        read(&m.name)?.with_bytes(dtype, |b| {
            place.copy_from_slice(b);
            Ok(())
        })?;
    }
    Ok(all)
}

/// Arrays of zeros on the device, all from one on the host.
#[derive(Debug)]
pub(crate) struct Zeros(HostArray);

impl Zeros {
    /// Enough for the largest of these.
    pub(crate) fn new(sizes: impl Iterator<Item = usize>) -> Result<Self> {
        Ok(Zeros(HostArray::zeros(DType::U8, [sizes.max().unwrap_or(0)])?))
    }

    pub(crate) fn place(&self, client: &Client, dtype: DType, shape: &Shape) -> Result<Buffer> {
        let len = shape.elements() * dtype.size();
        Ok(client.buffer_from_bytes(&self.0.bytes()[..len], dtype, shape, 0)?)
    }
}
