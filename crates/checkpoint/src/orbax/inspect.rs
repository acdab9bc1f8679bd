//! A summary for people and programs.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::{Map, Value};

use super::reader::{ArrayInfo, OrbaxCheckpoint, Problem, Skipped};
use super::tree::TreeKind;

/// A number of arrays and their size.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Tally {
    /// Number of arrays.
    pub arrays: usize,
    /// Number of elements.
    pub elements: u64,
    /// Bytes of the elements.
    pub bytes: u64,
    /// Bytes on disk.
    pub stored_bytes: u64,
}

impl Tally {
    fn add(&mut self, a: &ArrayInfo) {
        let elements = a.shape.elements() as u64;
        self.arrays += 1;
        self.elements += elements;
        self.bytes += elements.saturating_mul(a.dtype.size() as u64);
        self.stored_bytes += a.stored_bytes;
    }
}

/// What is in a checkpoint.
#[derive(Debug, Clone, Serialize)]
pub struct Inspection {
    /// The directory with the arrays.
    pub path: String,
    /// The step in the name of its directory.
    pub step: Option<u64>,
    /// `OCDBT` or plain files.
    pub container: String,
    /// What is around the parameters.
    pub kind: TreeKind,
    /// The parameters.
    pub parameters: Tally,
    /// All arrays in the scope.
    pub total: Tally,
    /// Arrays by element type.
    pub dtypes: BTreeMap<String, Tally>,
    /// Number of arrays by encoding.
    pub formats: BTreeMap<String, usize>,
    /// Whether every array has checksums.
    pub checksummed: bool,
    /// What the scope left out.
    pub skipped: Vec<Skipped>,
    /// Leaves that hold nothing, with what they are.
    pub empty: BTreeMap<String, String>,
    /// `custom_metadata`.
    pub custom_metadata: Map<String, Value>,
    /// What is not as it should be.
    pub problems: Vec<Problem>,
    /// Every array.
    pub arrays: Vec<ArrayInfo>,
}

impl OrbaxCheckpoint {
    /// Sums up what is known without reading elements.
    #[must_use]
    pub fn inspect(&self) -> Inspection {
        let (mut parameters, mut total) = (Tally::default(), Tally::default());
        let mut dtypes: BTreeMap<String, Tally> = BTreeMap::new();
        let mut formats: BTreeMap<String, usize> = BTreeMap::new();
        for a in self.arrays() {
            total.add(a);
            if a.param_name.is_some() {
                parameters.add(a);
            }
            dtypes.entry(a.dtype.name().to_owned()).or_default().add(a);
            *formats.entry(a.format.clone()).or_default() += 1;
        }
        Inspection {
            path: self.path().display().to_string(),
            step: self.step(),
            container: self.container(),
            kind: self.kind(),
            parameters,
            total,
            dtypes,
            formats,
            checksummed: self.arrays().iter().all(|a| a.checksummed),
            skipped: self.skipped().to_vec(),
            empty: self.empty_leaves().iter().map(|l| (l.name(), l.value_type.clone())).collect(),
            custom_metadata: self.custom_metadata().clone(),
            problems: self.problems().to_vec(),
            arrays: self.arrays().to_vec(),
        }
    }
}
