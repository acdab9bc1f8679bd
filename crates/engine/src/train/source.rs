//! Where a run's arrays come from, and how they get onto the devices without a second copy on the host.

use checkpoint::safetensors::TensorView;
use gemma4::layout::Slot;
use graph::{Mesh, Sharding};
use pjrt::Client;
use tensor::{DType, HostArray, Shape};

use super::TrainError;
use super::device::{convert, converted};
use crate::EngineError;
use crate::shards::{Memory, Sharded, cut, own_parts, paste};

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

/// A slot's members on the devices. What a step gets to overwrite must be in the devices' own memory: of what is borrowed, the
/// runtime would make a copy at the first step.
///
/// Every member is read once and every device gets its part of it: the host never holds more than one slot.
pub(crate) fn place(
    client: &Client,
    mesh: &Mesh,
    slot: &Slot,
    dtype: DType,
    memory: Memory,
    read: &dyn Fn(&str) -> Result<Given>,
) -> Result<Sharded> {
    let sharding = slot.sharding_or_whole();
    let what = (dtype, &slot.shape);
    let only = match &slot.members[..] {
        [only] if !slot.stacked => Some(only),
        _ => None,
    };
    match (mesh.devices(), only) {
        (1, only) => {
            let buffer = match only {
                Some(only) => read(&only.name)?
                    .with_bytes(dtype, |b| Ok(client.buffer_from_bytes(b, dtype, &slot.shape, 0)?))?,
                None => client.buffer_from_host(&stacked(slot, dtype, read)?, 0)?,
            };
            Ok(Sharded::new(client, mesh, what, sharding, vec![buffer])?)
        }
        (_, Some(only)) => {
            let given = read(&only.name)?;
            Sharded::place(client, mesh, what, &sharding, memory, &mut |bounds| {
                convert(cut(given.bytes(), given.dtype(), given.shape(), bounds)?, dtype)
            })
        }
        (_, None) => {
            let mut parts = stacked_parts(client, mesh, slot, dtype, read, &sharding)?.into_iter();
            Sharded::place(client, mesh, what, &sharding, memory, &mut |_| {
                parts.next().ok_or_else(|| EngineError::Input("a part is missing".into()).into())
            })
        }
    }
}

/// The different parts of a stack, in the order of [`own_parts`].
fn stacked_parts(
    client: &Client,
    mesh: &Mesh,
    slot: &Slot,
    dtype: DType,
    read: &dyn Fn(&str) -> Result<Given>,
    sharding: &Sharding,
) -> Result<Vec<HostArray>> {
    let mut parts = Vec::new();
    for part in own_parts(client, mesh, &slot.shape, sharding)? {
        let shape: Vec<usize> = part.bounds.iter().map(|b| b.len()).collect();
        parts.push((part.bounds, HostArray::zeros(dtype, shape)?));
    }
    for (i, member) in slot.members.iter().enumerate() {
        let given = read(&member.name)?;
        for (bounds, part) in &mut parts {
            // No stack is cut along its leading dimension.
            let one = convert(cut(given.bytes(), given.dtype(), given.shape(), &bounds[1..])?, dtype)?;
            let inner = one.shape().dims().to_vec();
            let at: Vec<_> = std::iter::once(i..i + 1).chain(inner.iter().map(|&n| 0..n)).collect();
            let shape: Vec<usize> = std::iter::once(1).chain(inner).collect();
            paste(part, &at, &HostArray::from_bytes(dtype, shape, one.bytes())?)?;
        }
    }
    Ok(parts.into_iter().map(|(_, part)| part).collect())
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

/// Arrays of zeros on the devices, all from one on the host.
#[derive(Debug)]
pub(crate) struct Zeros(HostArray);

impl Zeros {
    /// Enough for the largest of these.
    pub(crate) fn new(sizes: impl Iterator<Item = usize>) -> Result<Self> {
        Ok(Zeros(HostArray::zeros(DType::U8, [sizes.max().unwrap_or(0)])?))
    }

    pub(crate) fn place(&self, client: &Client, mesh: &Mesh, slot: &Slot, dtype: DType) -> Result<Sharded> {
        let sharding = slot.sharding_or_whole();
        let local = sharding.shard_shape(mesh, &slot.shape).map_err(EngineError::Input)?;
        let zeros = &self.0.bytes()[..local.elements() * dtype.size()];
        let places = client.places(mesh.devices()).into_iter().flatten();
        let parts = places.map(|d| client.buffer_from_bytes(zeros, dtype, &local, d));
        let parts = parts.collect::<std::result::Result<_, _>>()?;
        Ok(Sharded::new(client, mesh, (dtype, &slot.shape), sharding, parts)?)
    }
}
