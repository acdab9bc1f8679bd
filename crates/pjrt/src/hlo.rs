//! The part of XLA's optimised program (`xla.HloModuleProto`) that [`crate::HloStats`] looks at.
//!
//! The bytes come from a plugin, but nothing here trusts them: what does not read is an error, never a panic.

use std::collections::HashMap;

use crate::proto::{Malformed, Reader, Value, integers};

/// Tuples of tuples deeper than this are refused.
const DEEPEST: usize = 32;

/// The type of a value.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Type {
    Array { element: i64, dims: Vec<i64> },
    Tuple(Vec<Type>),
}

impl Type {
    fn read(bytes: &[u8], depth: usize) -> Result<Type, Malformed> {
        const TUPLE: i64 = 13;
        let (mut element, mut dims, mut parts) = (0, Vec::new(), Vec::new());
        for field in Reader::new(bytes) {
            match field? {
                (2, Value::Varint(v)) => element = v as i64,
                (3, v) => integers(v, &mut dims)?,
                (4, Value::Bytes(_)) if depth >= DEEPEST => return Err(Malformed),
                (4, Value::Bytes(b)) => parts.push(Type::read(b, depth + 1)?),
                _ => {}
            }
        }
        Ok(if element == TUPLE { Type::Tuple(parts) } else { Type::Array { element, dims } })
    }

    /// The arrays in it, in order.
    pub(crate) fn arrays(&self) -> Vec<&Type> {
        match self {
            Type::Array { .. } => vec![self],
            Type::Tuple(parts) => parts.iter().flat_map(Type::arrays).collect(),
        }
    }

    pub(crate) fn dims(&self) -> &[i64] {
        match self {
            Type::Array { dims, .. } => dims,
            Type::Tuple(_) => &[],
        }
    }

    /// Elements of an array.
    pub(crate) fn elements(&self) -> f64 {
        match self {
            Type::Array { dims, .. } => dims.iter().map(|&d| d.max(0) as f64).product(),
            Type::Tuple(parts) => parts.iter().map(Type::elements).sum(),
        }
    }

    /// Bytes of all arrays in it.
    pub(crate) fn bytes(&self) -> f64 {
        match self {
            Type::Array { element, .. } => self.elements() * element_size(*element),
            Type::Tuple(parts) => parts.iter().map(Type::bytes).sum(),
        }
    }
}

/// Bytes of an element by its `xla.PrimitiveType` number; 0 for what has no values.
fn element_size(primitive: i64) -> f64 {
    match primitive {
        5 | 9 | 12 | 15 => 8.0,
        4 | 8 | 11 => 4.0,
        3 | 7 | 10 | 16 => 2.0,
        18 => 16.0,
        21 | 22 | 32 => 0.5,
        0 | 13 | 14 | 17 => 0.0,
        _ => 1.0,
    }
}

/// One window dimension of a convolution.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct WindowDim {
    pub(crate) size: i64,
    pub(crate) stride: i64,
    pub(crate) padding_low: i64,
    pub(crate) dilation: i64,
    pub(crate) base_dilation: i64,
}

/// Which dimension of a convolution is what.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct ConvDims {
    pub(crate) input_batch: i64,
    pub(crate) input_feature: i64,
    pub(crate) input_spatial: Vec<i64>,
    pub(crate) output_feature: i64,
    pub(crate) output_spatial: Vec<i64>,
}

/// An instruction.
#[derive(Debug, Clone)]
pub(crate) struct Instruction<'a> {
    pub(crate) id: i64,
    pub(crate) name: &'a str,
    pub(crate) opcode: &'a str,
    pub(crate) ty: Type,
    pub(crate) operands: Vec<i64>,
    pub(crate) called: Vec<i64>,
    pub(crate) parameter: i64,
    pub(crate) target: &'a str,
    pub(crate) backend_config: &'a [u8],
    /// Contracted dimensions of a dot's left operand.
    pub(crate) contracting: Vec<i64>,
    pub(crate) window: Vec<WindowDim>,
    pub(crate) conv: ConvDims,
    pub(crate) feature_groups: i64,
    pub(crate) batch_groups: i64,
    /// Devices of a group of a collective, where it says so.
    pub(crate) group: Option<i64>,
    /// The first integer of a constant.
    pub(crate) constant: Option<i64>,
}

/// A computation.
#[derive(Debug, Clone, Default)]
pub(crate) struct Computation<'a> {
    pub(crate) instructions: Vec<Instruction<'a>>,
    pub(crate) root: i64,
    index: HashMap<i64, usize>,
}

impl<'a> Computation<'a> {
    pub(crate) fn get(&self, id: i64) -> Option<&Instruction<'a>> {
        self.index.get(&id).map(|&i| &self.instructions[i])
    }

    pub(crate) fn root(&self) -> Option<&Instruction<'a>> {
        self.get(self.root)
    }
}

/// A module.
#[derive(Debug, Clone, Default)]
pub(crate) struct Module<'a> {
    pub(crate) computations: HashMap<i64, Computation<'a>>,
    pub(crate) entry: i64,
    /// Devices the program runs on.
    pub(crate) devices: i64,
}

impl<'a> Module<'a> {
    /// Reads a serialised `xla.HloModuleProtoWithConfig`.
    pub(crate) fn read(bytes: &'a [u8]) -> Result<Self, Malformed> {
        let mut module = Module { devices: 1, ..Module::default() };
        for field in Reader::new(bytes) {
            match field? {
                (1, Value::Bytes(b)) => {
                    for field in Reader::new(b) {
                        match field? {
                            (3, Value::Bytes(b)) => {
                                let (id, computation) = computation(b)?;
                                module.computations.insert(id, computation);
                            }
                            (6, Value::Varint(v)) => module.entry = v as i64,
                            _ => {}
                        }
                    }
                }
                (2, Value::Bytes(config)) => {
                    for field in Reader::new(config) {
                        // Replicas and partitions.
                        if let (4 | 5, Value::Varint(v)) = field? {
                            module.devices = module.devices.saturating_mul((v as i64).max(1));
                        }
                    }
                }
                _ => {}
            }
        }
        Ok(module)
    }
}

fn text(bytes: &[u8]) -> Result<&str, Malformed> {
    std::str::from_utf8(bytes).map_err(|_| Malformed)
}

fn computation(bytes: &[u8]) -> Result<(i64, Computation<'_>), Malformed> {
    let (mut id, mut c) = (0, Computation::default());
    for field in Reader::new(bytes) {
        match field? {
            (2, Value::Bytes(b)) => {
                let i = instruction(b)?;
                c.index.insert(i.id, c.instructions.len());
                c.instructions.push(i);
            }
            (5, Value::Varint(v)) => id = v as i64,
            (6, Value::Varint(v)) => c.root = v as i64,
            _ => {}
        }
    }
    Ok((id, c))
}

fn instruction(bytes: &[u8]) -> Result<Instruction<'_>, Malformed> {
    let mut i = Instruction {
        id: 0,
        name: "",
        opcode: "",
        ty: Type::Tuple(Vec::new()),
        operands: Vec::new(),
        called: Vec::new(),
        parameter: 0,
        target: "",
        backend_config: &[],
        contracting: Vec::new(),
        window: Vec::new(),
        conv: ConvDims::default(),
        feature_groups: 1,
        batch_groups: 1,
        group: None,
        constant: None,
    };
    for field in Reader::new(bytes) {
        match field? {
            (1, Value::Bytes(b)) => i.name = text(b)?,
            (2, Value::Bytes(b)) => i.opcode = text(b)?,
            (3, Value::Bytes(b)) => i.ty = Type::read(b, 0)?,
            (8, Value::Bytes(b)) => i.constant = literal(b)?,
            (9, Value::Varint(v)) => i.parameter = v as i64,
            (15, Value::Bytes(b)) => i.window = window(b)?,
            (16, Value::Bytes(b)) => i.conv = conv_dims(b)?,
            (28, Value::Bytes(b)) => i.target = text(b)?,
            (30, Value::Bytes(b)) => {
                for field in Reader::new(b) {
                    if let (1, v) = field? {
                        integers(v, &mut i.contracting)?;
                    }
                }
            }
            (35, Value::Varint(v)) => i.id = v as i64,
            (36, v) => integers(v, &mut i.operands)?,
            (38, v) => integers(v, &mut i.called)?,
            (43, Value::Bytes(b)) => i.backend_config = b,
            (49, Value::Bytes(b)) => i.group = i.group.or(Some(group(b)?)),
            (50, Value::Varint(v)) => i.feature_groups = (v as i64).max(1),
            (58, Value::Varint(v)) => i.batch_groups = (v as i64).max(1),
            (87, Value::Bytes(b)) => i.group = i.group.or(device_list(b)?),
            (92, Value::Bytes(b)) => i.group = i.group.or(iota_list(b)?),
            (93, Value::Bytes(b)) => i.group = i.group.or(axes_list(b)?),
            _ => {}
        }
    }
    Ok(i)
}

/// The first integer of an `xla.LiteralProto`.
fn literal(bytes: &[u8]) -> Result<Option<i64>, Malformed> {
    let mut all = Vec::new();
    for field in Reader::new(bytes) {
        // s32s, s64s, u32s, u64s.
        if let (4..=7, v) = field? {
            integers(v, &mut all)?;
        }
    }
    Ok(all.first().copied())
}

fn window(bytes: &[u8]) -> Result<Vec<WindowDim>, Malformed> {
    let mut out = Vec::new();
    for field in Reader::new(bytes) {
        let (1, Value::Bytes(b)) = field? else { continue };
        let mut n = [0i64; 7];
        for field in Reader::new(b) {
            if let (k @ 1..=6, Value::Varint(v)) = field? {
                n[k as usize] = v as i64;
            }
        }
        out.push(WindowDim {
            size: n[1],
            stride: n[2].max(1),
            padding_low: n[3],
            dilation: n[5].max(1),
            base_dilation: n[6].max(1),
        });
    }
    Ok(out)
}

fn conv_dims(bytes: &[u8]) -> Result<ConvDims, Malformed> {
    let mut d = ConvDims::default();
    for field in Reader::new(bytes) {
        match field? {
            (7, Value::Varint(v)) => d.input_batch = v as i64,
            (8, Value::Varint(v)) => d.input_feature = v as i64,
            (10, Value::Varint(v)) => d.output_feature = v as i64,
            (11, v) => integers(v, &mut d.input_spatial)?,
            (12, v) => integers(v, &mut d.output_spatial)?,
            _ => {}
        }
    }
    Ok(d)
}

/// Size of an `xla.ReplicaGroup`.
fn group(bytes: &[u8]) -> Result<i64, Malformed> {
    let mut ids = Vec::new();
    for field in Reader::new(bytes) {
        if let (1, v) = field? {
            integers(v, &mut ids)?;
        }
    }
    Ok(ids.len() as i64)
}

/// Size of the groups of an `xla.CollectiveDeviceListProto`; in older versions it could hold an iota list.
fn device_list(bytes: &[u8]) -> Result<Option<i64>, Malformed> {
    let mut size = None;
    for field in Reader::new(bytes) {
        match field? {
            (1, Value::Bytes(b)) => size = size.or(Some(group(b)?)),
            (2, Value::Bytes(b)) => size = size.or(iota_list(b)?),
            _ => {}
        }
    }
    Ok(size)
}

/// Size of the groups of an `xla.IotaReplicaGroupListProto`.
fn iota_list(bytes: &[u8]) -> Result<Option<i64>, Malformed> {
    let mut size = None;
    for field in Reader::new(bytes) {
        if let (2, Value::Varint(v)) = field? {
            size = Some(v as i64);
        }
    }
    Ok(size)
}

/// Size of the groups of an `xla.MeshAxesReplicaGroupListProto`: the devices along its axes.
fn axes_list(bytes: &[u8]) -> Result<Option<i64>, Malformed> {
    let number = |bytes: &[u8], wanted: u32| -> Result<Option<i64>, Malformed> {
        let mut found = None;
        for field in Reader::new(bytes) {
            if let (n, Value::Varint(v)) = field?
                && n == wanted
            {
                found = Some(v as i64);
            }
        }
        Ok(found)
    };
    let (mut sizes, mut axes) = (Vec::new(), Vec::new());
    for field in Reader::new(bytes) {
        match field? {
            (1, Value::Bytes(mesh)) => {
                for field in Reader::new(mesh) {
                    if let (1, Value::Bytes(axis)) = field? {
                        sizes.push(number(axis, 2)?.unwrap_or(1));
                    }
                }
            }
            (2, Value::Bytes(axis)) => axes.push(axis),
            _ => {}
        }
    }
    let mut product = Some(1i64);
    for axis in axes {
        let mut part = None;
        for field in Reader::new(axis) {
            if let (2, Value::Bytes(sub)) = field? {
                part = number(sub, 2)?;
            }
        }
        let index = usize::try_from(number(axis, 1)?.unwrap_or(0)).map_err(|_| Malformed)?;
        let size = part.or_else(|| sizes.get(index).copied());
        product = product.zip(size).and_then(|(p, s)| p.checked_mul(s));
    }
    Ok(product)
}
