//! Arrays cut over the devices of a mesh: parts of host arrays, and buffers that hold one part a device.

use std::ops::Range;

use graph::{Graph, InputOptions, Mesh, OutputOptions, Program, Sharding};
use pjrt::{Buffer, Client, Code, Executable, PjrtError};
use tensor::{DType, HostArray, Shape};

use crate::{EngineError, Result};

/// Whose memory a placed array is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Memory {
    /// The device's own: a program may take it over.
    Device,
    /// The host's, where the device can read that, as a CPU does: nothing is copied, and no program may take it over.
    Host,
}

/// Gives the part of an array within bounds.
pub type Cut<'a, E> = dyn FnMut(&[Range<usize>]) -> std::result::Result<HostArray, E> + 'a;

/// Calls `f` with the byte ranges (in the whole, in the part) of every contiguous run of the box `bounds` of an array.
fn runs(
    shape: &Shape,
    bounds: &[Range<usize>],
    element: usize,
    mut f: impl FnMut(Range<usize>, Range<usize>),
) -> Result<()> {
    let dims = shape.dims();
    let fits = bounds.len() == dims.len() && bounds.iter().zip(dims).all(|(b, &d)| b.start <= b.end && b.end <= d);
    if !fits {
        return Err(EngineError::Input(format!("{bounds:?} is no part of an array {shape}")));
    }
    if bounds.iter().any(Range::is_empty) {
        return Ok(());
    }
    let strides = shape.strides();
    // From this dimension on the box is whole, so that it is one run for every index before it.
    let inner = (0..dims.len()).rev().find(|&i| bounds[i].len() != dims[i]).unwrap_or(0);
    let run = bounds.iter().skip(inner).map(Range::len).product::<usize>() * element;
    let outer = &bounds[..inner.min(bounds.len())];
    let mut index: Vec<usize> = outer.iter().map(|b| b.start).collect();
    let first: usize = bounds.iter().zip(&strides).skip(inner).map(|(b, s)| b.start * s).sum();
    let mut to = 0;
    loop {
        let from = (index.iter().zip(&strides).map(|(i, s)| i * s).sum::<usize>() + first) * element;
        f(from..from + run, to..to + run);
        to += run;
        let Some(d) = (0..outer.len()).rev().find(|&d| index[d] + 1 < outer[d].end) else { return Ok(()) };
        index[d] += 1;
        for later in d + 1..outer.len() {
            index[later] = outer[later].start;
        }
    }
}

fn shape_of(bounds: &[Range<usize>]) -> Shape {
    bounds.iter().map(Range::len).collect::<Vec<_>>().into()
}

/// The part of an array, given as bytes, within `bounds`.
///
/// # Errors
/// When the bounds leave the array, or memory is short.
pub fn cut(bytes: &[u8], dtype: DType, shape: &Shape, bounds: &[Range<usize>]) -> Result<HostArray> {
    if shape.checked_bytes(dtype).map_err(tensor::HostError::from)? != bytes.len() {
        return Err(EngineError::Input(format!("{} bytes are no array {dtype}{shape}", bytes.len())));
    }
    let mut part = HostArray::zeros(dtype, shape_of(bounds))?;
    let out = part.bytes_mut();
    runs(shape, bounds, dtype.size(), |from, to| out[to].copy_from_slice(&bytes[from]))?;
    Ok(part)
}

/// Writes a part back into the array it was cut from.
///
/// # Errors
/// When dtype or shape do not fit.
pub fn paste(whole: &mut HostArray, bounds: &[Range<usize>], part: &HostArray) -> Result<()> {
    if part.dtype() != whole.dtype() || *part.shape() != shape_of(bounds) {
        return Err(EngineError::Input(format!("a part {}{} does not fit", part.dtype(), part.shape())));
    }
    let (shape, element) = (whole.shape().clone(), whole.dtype().size());
    let out = whole.bytes_mut();
    runs(&shape, bounds, element, |to, from| out[to].copy_from_slice(&part.bytes()[from]))
}

/// An array on all devices of a mesh, or whole on one device: one buffer for each of them that this process has, in the order of a
/// program's devices.
#[derive(Debug)]
pub struct Sharded {
    dtype: DType,
    shape: Shape,
    sharding: Sharding,
    parts: Vec<Buffer>,
    /// Which device of the mesh each part lies on.
    at: Vec<usize>,
}

impl Sharded {
    /// Takes over the parts that a program gave.
    ///
    /// # Errors
    /// When there is not one for each device that this process has.
    pub fn new(
        client: &Client,
        mesh: &Mesh,
        (dtype, shape): (DType, &Shape),
        sharding: Sharding,
        parts: Vec<Buffer>,
    ) -> Result<Self> {
        let places = client.places(mesh.devices());
        let at: Vec<usize> = (0..places.len()).filter(|&d| places[d].is_some()).collect();
        if parts.len() != at.len() {
            return Err(EngineError::Input(format!("{} parts for {} devices", parts.len(), at.len())));
        }
        Ok(Sharded { dtype, shape: shape.clone(), sharding, parts, at })
    }

    /// Makes one part after the other and puts it on every device of this process that holds it. `part` is asked for the part
    /// within bounds, once for each different part of those that [`own_parts`] tells.
    ///
    /// # Errors
    /// When the sharding does not fit, `part` fails, or the device refuses.
    pub fn place<E: From<EngineError>>(
        client: &Client,
        mesh: &Mesh,
        (dtype, shape): (DType, &Shape),
        sharding: &Sharding,
        memory: Memory,
        part: &mut Cut<'_, E>,
    ) -> std::result::Result<Self, E> {
        let mut parts: Vec<Option<Buffer>> = (0..client.devices().len()).map(|_| None).collect();
        for Part { bounds, devices } in own_parts(client, mesh, shape, sharding)? {
            let host = part(&bounds)?;
            if host.dtype() != dtype || *host.shape() != shape_of(&bounds) {
                return Err(EngineError::Input(format!("a part is {}{}", host.dtype(), host.shape())).into());
            }
            let (last, others) = match (memory, devices.split_last()) {
                (Memory::Host, Some((&last, others))) => (Some(last), others),
                _ => (None, &devices[..]),
            };
            for &device in others {
                parts[device] = Some(client.buffer_from_host(&host, device).map_err(EngineError::from)?);
            }
            if let Some(device) = last {
                parts[device] = Some(client.buffer_from_owned(host, device).map_err(EngineError::from)?.0);
            }
        }
        let local = client.places(mesh.devices()).into_iter().flatten();
        let parts = local.filter_map(|device| parts.get_mut(device).and_then(Option::take)).collect();
        Ok(Self::new(client, mesh, (dtype, shape), sharding.clone(), parts)?)
    }

    /// Cuts a host array and copies every part to its device.
    ///
    /// # Errors
    /// As [`place`](Self::place).
    pub fn from_host(client: &Client, mesh: &Mesh, host: &HostArray, sharding: &Sharding) -> Result<Self> {
        let what = (host.dtype(), host.shape());
        if mesh.devices() == 1 {
            let parts = vec![client.buffer_from_host(host, 0)?];
            return Self::new(client, mesh, what, sharding.clone(), parts);
        }
        Self::place(client, mesh, what, sharding, Memory::Device, &mut |b| {
            cut(host.bytes(), host.dtype(), host.shape(), b)
        })
    }

    /// The element type.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The shape of the whole.
    #[must_use]
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// Bytes on all devices of this process together.
    #[must_use]
    pub fn size_in_bytes(&self) -> usize {
        self.parts.iter().map(Buffer::size_in_bytes).sum()
    }

    /// How it lies.
    #[must_use]
    pub fn sharding(&self) -> &Sharding {
        &self.sharding
    }

    /// Takes over what a program made of it: parts of the same type, one a device.
    ///
    /// # Errors
    /// When their number differs.
    pub fn replace(&mut self, parts: Vec<Buffer>) -> Result<()> {
        if parts.len() != self.parts.len() {
            return Err(EngineError::Input(format!("{} parts for {} devices", parts.len(), self.parts.len())));
        }
        self.parts = parts;
        Ok(())
    }

    /// The part on a device.
    #[must_use]
    pub fn part(&self, device: usize) -> Option<&Buffer> {
        self.parts.get(device)
    }

    /// An array that lies within this one from byte `start` on, where one device of this process holds all of it.
    ///
    /// # Errors
    /// When it lies elsewhere or on several, the part leaves it, or the device refuses.
    pub fn part_to_host(&self, start: usize, shape: &Shape) -> Result<HostArray> {
        let [only] = &self.parts[..] else {
            return Err(EngineError::Input(format!("an array of {} parts has no part by itself", self.parts.len())));
        };
        if *only.shape() != self.shape {
            return Err(EngineError::Input(format!("{} of {} is not the whole array", only.shape(), self.shape)));
        }
        let mut part = HostArray::zeros(self.dtype, shape.clone())?;
        match only.copy_part_to(start, part.bytes_mut()) {
            Err(PjrtError::Plugin { code: Code::Unimplemented, .. } | PjrtError::Unsupported { .. }) => {
                let whole = only.to_host()?;
                let bytes = whole.bytes().get(start..).and_then(|b| b.get(..part.bytes().len()));
                let bytes = bytes.ok_or_else(|| EngineError::Input(format!("no {shape} from byte {start} on")))?;
                part.bytes_mut().copy_from_slice(bytes);
            }
            done => done?,
        }
        Ok(part)
    }

    /// Whether this process has all of it.
    ///
    /// # Errors
    /// When the sharding does not fit.
    pub fn is_here(&self, mesh: &Mesh) -> Result<bool> {
        let parts = parts_of(mesh, &self.shape, &self.sharding)?;
        Ok(parts.iter().all(|p| p.devices.iter().any(|d| self.at.contains(d))))
    }

    /// Puts the whole together on the host. Every part is read once, from the first device that holds it.
    ///
    /// # Errors
    /// When a part lies with another process, a buffer is gone, its program failed, or memory is short.
    pub fn to_host(&self, mesh: &Mesh) -> Result<HostArray> {
        if let ([only], 1) = (&self.parts[..], mesh.devices()) {
            return Ok(only.to_host()?);
        }
        let mut whole = HostArray::zeros(self.dtype, self.shape.clone())?;
        for Part { bounds, devices } in parts_of(mesh, &self.shape, &self.sharding)? {
            let buffer = self.at.iter().position(|d| devices.contains(d)).and_then(|i| self.parts.get(i));
            let buffer = buffer.ok_or_else(|| EngineError::Input("a part lies with another process".into()))?;
            paste(&mut whole, &bounds, &buffer.to_host()?)?;
        }
        Ok(whole)
    }
}

/// The program that puts an array whole on every device of its mesh. Every process must run it.
///
/// # Errors
/// When the sharding does not fit.
pub fn gather_program(array: &Sharded, mesh: &Mesh) -> Result<Program> {
    let g = Graph::new("gather");
    let axes: Vec<(&str, usize)> = mesh.axes().iter().map(|(name, n)| (name.as_str(), *n)).collect();
    g.set_mesh(&axes)?;
    let lies = InputOptions { sharding: Some(array.sharding.clone()), ..InputOptions::default() };
    let value = g.input_with("array", array.dtype, array.shape.clone(), lies)?;
    let whole = Sharding::replicated(array.shape.rank());
    g.output_with("whole", value, OutputOptions { sharding: Some(whole), ..OutputOptions::default() })?;
    Ok(g.finish()?)
}

/// A part of an array and the devices that hold it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// Where it lies in the whole.
    pub bounds: Vec<Range<usize>>,
    /// The devices, ascending.
    pub devices: Vec<usize>,
}

/// The different parts of an array, in the order of the first devices that hold them.
///
/// # Errors
/// When the sharding does not fit the array.
pub fn parts_of(mesh: &Mesh, shape: &Shape, sharding: &Sharding) -> Result<Vec<Part>> {
    let mut parts: Vec<Part> = Vec::new();
    for device in 0..mesh.devices() {
        let bounds = sharding.shard_bounds(mesh, shape, device).map_err(EngineError::Input)?;
        match parts.iter_mut().find(|p| p.bounds == bounds) {
            Some(same) => same.devices.push(device),
            None => parts.push(Part { bounds, devices: vec![device] }),
        }
    }
    Ok(parts)
}

/// The parts that devices of this process hold, in the order of [`parts_of`]; devices are positions in
/// [`Client::devices`].
///
/// # Errors
/// When the sharding does not fit the array.
pub fn own_parts(client: &Client, mesh: &Mesh, shape: &Shape, sharding: &Sharding) -> Result<Vec<Part>> {
    Ok(keep_local(parts_of(mesh, shape, sharding)?, &client.places(mesh.devices())))
}

fn keep_local(mut parts: Vec<Part>, places: &[Option<usize>]) -> Vec<Part> {
    for part in &mut parts {
        part.devices = part.devices.iter().filter_map(|&d| places.get(d).copied().flatten()).collect();
    }
    parts.retain(|p| !p.devices.is_empty());
    parts
}

/// Runs a program on arrays that lie as it wants them; results by position, one buffer a device.
///
/// # Errors
/// When an array lacks a part, the arguments do not fit, or the plugin refuses.
pub fn execute(executable: &Executable, arguments: &[&Sharded]) -> Result<Vec<Vec<Buffer>>> {
    let mut lists: Vec<Vec<&Buffer>> = Vec::with_capacity(executable.devices().len());
    for &device in executable.devices() {
        let parts: Vec<&Buffer> =
            arguments.iter().filter_map(|a| a.parts.iter().find(|b| b.device() == device)).collect();
        if parts.len() != arguments.len() {
            let message = "an argument lies on fewer devices than the program runs on";
            return Err(EngineError::Input(message.into()));
        }
        lists.push(parts);
    }
    let results = executable.execute_sharded(&lists)?;
    let mut devices: Vec<(usize, Vec<Buffer>)> = executable.devices().iter().copied().zip(results).collect();
    // In the order of the mesh, as parts are, whatever the plugin's is.
    let parts = arguments.first().map_or(&[][..], |a| &a.parts);
    devices.sort_by_key(|(device, _)| parts.iter().position(|b| b.device() == *device));
    let count = devices.first().map_or(0, |(_, results)| results.len());
    let mut by_result: Vec<Vec<Buffer>> = (0..count).map(|_| Vec::with_capacity(devices.len())).collect();
    for (_, results) in devices {
        for (list, buffer) in by_result.iter_mut().zip(results) {
            list.push(buffer);
        }
    }
    Ok(by_result)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Four devices, of which this process has the second and the fourth.
    #[test]
    fn a_process_makes_what_its_own_devices_hold() {
        let mesh = Mesh::new(&[("a", 2), ("b", 2)]).unwrap();
        let shape = Shape::from([4, 6]);
        let places = [None, Some(0), None, Some(1)];
        let own = |axes: &[&[&str]]| keep_local(parts_of(&mesh, &shape, &Sharding::new(axes)).unwrap(), &places);
        let part =
            |bounds: [Range<usize>; 2], devices: &[usize]| Part { bounds: bounds.to_vec(), devices: devices.to_vec() };
        assert_eq!(own(&[&["a"], &["b"]]), [part([0..2, 3..6], &[0]), part([2..4, 3..6], &[1])]);
        assert_eq!(own(&[&["b"], &[]]), [part([2..4, 0..6], &[0, 1])]);
        assert_eq!(own(&[&[], &["a"]]), [part([0..4, 0..3], &[0]), part([0..4, 3..6], &[1])]);
        assert_eq!(own(&[&[], &[]]), [part([0..4, 0..6], &[0, 1])]);
    }

    #[test]
    fn parts_put_together_are_the_whole() {
        let mesh = Mesh::new(&[("a", 2), ("b", 2)]).unwrap();
        let shape = Shape::from([2, 4, 6]);
        let values: Vec<i32> = (0..48).collect();
        let whole = HostArray::from_slice(shape.clone(), &values).unwrap();
        let cases: [&[&[&str]]; 5] = [
            &[&["a"], &["b"], &[]],
            &[&[], &["b", "a"], &[]],
            &[&[], &[], &["a"]],
            &[&["b"], &[], &["a"]],
            &[&[], &[], &[]],
        ];
        for axes in cases {
            let s = Sharding::new(axes);
            let mut again = HostArray::zeros(DType::I32, shape.clone()).unwrap();
            for Part { bounds: b, .. } in parts_of(&mesh, &shape, &s).unwrap() {
                let part = cut(whole.bytes(), DType::I32, &shape, &b).unwrap();
                let first = (b[0].start * 24 + b[1].start * 6 + b[2].start) as i32;
                assert_eq!(part.as_slice::<i32>().unwrap()[0], first, "{s}");
                paste(&mut again, &b, &part).unwrap();
            }
            assert_eq!(again.as_slice::<i32>().unwrap(), values, "{s}");
        }
        let scalar = HostArray::from_slice(Shape::scalar(), &[7i32]).unwrap();
        assert_eq!(cut(scalar.bytes(), DType::I32, scalar.shape(), &[]).unwrap().bytes(), scalar.bytes());
        assert!(cut(whole.bytes(), DType::I32, &shape, &[0..2, 0..5, 0..6]).is_err());
        assert!(cut(whole.bytes(), DType::I32, &shape, std::slice::from_ref(&(0..2))).is_err());
    }
}
