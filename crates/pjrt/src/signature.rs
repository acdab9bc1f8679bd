//! What a compiled program takes and gives back, read from the program itself.

use serde::{Deserialize, Serialize};
use tensor::{DType, Shape};

use crate::dtype;
use crate::proto::{Malformed, Reader, Value, integers};

/// The dtype and shape of one argument or result, as one device sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ArrayType {
    /// Element type.
    pub dtype: DType,
    /// Shape of the part that one device holds.
    pub shape: Shape,
}

/// The arguments and results of a compiled program, as one device sees them: for a partitioned program, shapes are
/// those of a device's own part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProgramSignature {
    /// The arguments, in order.
    pub inputs: Vec<ArrayType>,
    /// The results, in order.
    pub outputs: Vec<ArrayType>,
    /// Indices of the arguments whose memory the program takes over, ascending.
    pub donated: Vec<usize>,
}

/// [`ProgramSignature`] in the cache's metadata.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct StoredSignature {
    inputs: Vec<(String, Vec<usize>)>,
    outputs: Vec<(String, Vec<usize>)>,
    donated: Vec<usize>,
}

impl ProgramSignature {
    pub(crate) fn to_stored(&self) -> StoredSignature {
        let list = |v: &[ArrayType]| v.iter().map(|a| (a.dtype.name().to_owned(), a.shape.to_vec())).collect();
        StoredSignature { inputs: list(&self.inputs), outputs: list(&self.outputs), donated: self.donated.clone() }
    }

    pub(crate) fn from_stored(stored: StoredSignature) -> Option<Self> {
        let list = |v: Vec<(String, Vec<usize>)>| {
            v.into_iter()
                .map(|(d, s)| Some(ArrayType { dtype: d.parse().ok()?, shape: Shape::from(s) }))
                .collect::<Option<Vec<_>>>()
        };
        let inputs = list(stored.inputs)?;
        let ordered = stored.donated.windows(2).all(|w| w[0] < w[1]);
        if !ordered || stored.donated.last().is_some_and(|&i| i >= inputs.len()) {
            return None;
        }
        Some(ProgramSignature { inputs, outputs: list(stored.outputs)?, donated: stored.donated })
    }

    /// Reads the signature out of a serialised `xla.HloModuleProtoWithConfig`.
    pub(crate) fn from_hlo_with_config(bytes: &[u8]) -> Result<Self, String> {
        let malformed = |_: Malformed| "the optimised program is not a valid message".to_owned();
        let mut module = None;
        for field in Reader::new(bytes) {
            if let (1, Value::Bytes(b)) = field.map_err(malformed)? {
                module = Some(b);
            }
        }
        let (mut shape, mut aliases, mut donors) = (None, None, None);
        for field in Reader::new(module.ok_or("the optimised program holds no module")?) {
            match field.map_err(malformed)? {
                (4, Value::Bytes(b)) => shape = Some(b),
                (8, Value::Bytes(b)) => aliases = Some(b),
                (18, Value::Bytes(b)) => donors = Some(b),
                _ => {}
            }
        }
        let (mut inputs, mut outputs) = (Vec::new(), Vec::new());
        for field in Reader::new(shape.ok_or("the optimised program has no shape")?) {
            match field.map_err(malformed)? {
                (1, Value::Bytes(b)) => flatten(b, &mut inputs)?,
                (2, Value::Bytes(b)) => flatten(b, &mut outputs)?,
                _ => {}
            }
        }
        let mut donated = Vec::new();
        // Alias entries name the argument in field 2, donor entries in field 1. Absent means argument 0.
        for (list, number) in [(aliases, 2), (donors, 1)] {
            for entry in Reader::new(list.unwrap_or_default()) {
                let (1, Value::Bytes(entry)) = entry.map_err(malformed)? else { continue };
                let mut argument = 0;
                for field in Reader::new(entry) {
                    if let (n, Value::Varint(v)) = field.map_err(malformed)?
                        && n == number
                    {
                        argument = v;
                    }
                }
                let argument = usize::try_from(argument).ok().filter(|&a| a < inputs.len());
                donated.push(argument.ok_or("the optimised program donates an argument it does not have")?);
            }
        }
        donated.sort_unstable();
        donated.dedup();
        Ok(ProgramSignature { inputs, outputs, donated })
    }
}

/// Appends the arrays of an `xla.ShapeProto`; of a tuple, those of its elements.
fn flatten(bytes: &[u8], into: &mut Vec<ArrayType>) -> Result<(), String> {
    const TUPLE: i64 = 13;
    let malformed = |_: Malformed| "a shape of the optimised program is not a valid message".to_owned();
    let (mut element, mut dims, mut parts) = (0i64, Vec::new(), Vec::new());
    for field in Reader::new(bytes) {
        match field.map_err(malformed)? {
            (2, Value::Varint(v)) => element = v as i64,
            (3, v) => integers(v, &mut dims).map_err(malformed)?,
            (4, Value::Bytes(b)) => parts.push(b),
            _ => {}
        }
    }
    if element == TUPLE {
        // StableHLO's `main` has no nested tuples, so one level is all there is; more would be refused below.
        for part in parts {
            flatten_array(part, into)?;
        }
        return Ok(());
    }
    push_array(element, &dims, into)
}

fn flatten_array(bytes: &[u8], into: &mut Vec<ArrayType>) -> Result<(), String> {
    let malformed = |_: Malformed| "a shape of the optimised program is not a valid message".to_owned();
    let (mut element, mut dims) = (0i64, Vec::new());
    for field in Reader::new(bytes) {
        match field.map_err(malformed)? {
            (2, Value::Varint(v)) => element = v as i64,
            (3, v) => integers(v, &mut dims).map_err(malformed)?,
            _ => {}
        }
    }
    push_array(element, &dims, into)
}

fn push_array(element: i64, dims: &[i64], into: &mut Vec<ArrayType>) -> Result<(), String> {
    let dtype =
        dtype::from_primitive(element).ok_or_else(|| format!("element type {element} of XLA is not supported"))?;
    let dims: Result<Vec<usize>, _> = dims.iter().map(|&d| usize::try_from(d)).collect();
    let dims = dims.map_err(|_| "a dimension of the optimised program is negative".to_owned())?;
    into.push(ArrayType { dtype, shape: Shape::from(dims) });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::Writer;

    fn array(w: &mut Writer, field: u32, element: i64, dims: &[i64]) {
        w.message(field, |s| {
            s.varint(2, element);
            s.packed(3, dims.iter().copied());
        });
    }

    #[test]
    fn a_signature_is_read_from_the_message() {
        let mut w = Writer::default();
        w.message(1, |module| {
            module.bytes(1, b"name");
            module.message(4, |shape| {
                array(shape, 1, 11, &[2, 3]);
                array(shape, 1, 4, &[]);
                shape.message(2, |result| {
                    result.varint(2, 13);
                    array(result, 4, 16, &[7]);
                    array(result, 4, 11, &[2, 3]);
                });
            });
            module.message(8, |alias| alias.message(1, |entry| entry.varint(2, 1)));
            module.message(18, |donor| donor.message(1, |_| {}));
        });
        let s = ProgramSignature::from_hlo_with_config(&w.into_bytes()).unwrap();
        let a = |dtype, dims: &[usize]| ArrayType { dtype, shape: Shape::from(dims) };
        assert_eq!(s.inputs, [a(DType::F32, &[2, 3]), a(DType::I32, &[])]);
        assert_eq!(s.outputs, [a(DType::BF16, &[7]), a(DType::F32, &[2, 3])]);
        assert_eq!(s.donated, [0, 1]);
        assert_eq!(ProgramSignature::from_stored(s.to_stored()), Some(s));
    }

    #[test]
    fn foreign_bytes_are_errors() {
        for bytes in [&b""[..], b"\x0a\x00", b"\x0a\x05ab", b"\x80"] {
            assert!(ProgramSignature::from_hlo_with_config(bytes).is_err());
        }
        let stored = StoredSignature { inputs: vec![], outputs: vec![], donated: vec![0] };
        assert_eq!(ProgramSignature::from_stored(stored), None);
    }
}
