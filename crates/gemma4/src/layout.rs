//! How a program holds its parameters: one array each, or those of like layers stacked for a loop.
//!
//! Scanning splits the layers into the two segments of the architecture (own keys and values, borrowed ones), each a whole
//! number of repetitions of the pattern of kinds. A segment of several repetitions becomes one loop over them, and within it, each
//! stretch of like layers a loop of its own: of the five layers of E2B's pattern, the program has one of each kind. The
//! parameters of a stretch in every repetition are one array, stacked in the order of layers. Checkpoints know nothing of it.

use std::sync::Arc;

use graph::{Graph, GraphError, Mesh, Sharding};
use tensor::{ParamSpec, Shape};

use crate::Arch;
use crate::params::{EMBED_TOKENS_PER_LAYER, param_table};
use crate::partition::{Partition, PartitionError, stacked};

/// One array of a program and the parameters in it.
#[derive(Debug, Clone, PartialEq)]
pub struct Slot {
    /// Name of the program's input: the parameter's, with `@n` behind it where `n` of them are stacked.
    pub name: String,
    /// Shape of the array.
    pub shape: Shape,
    /// The parameters in it: one of this shape, or several stacked along dimension 0.
    pub members: Vec<ParamSpec>,
    /// Whether they are stacked (a stack may be of one).
    pub stacked: bool,
    /// How it lies on a mesh of devices, where there is one: no stack is cut along its leading dimension.
    pub sharding: Option<Sharding>,
}

impl Slot {
    /// How it lies: whole where nothing is said.
    #[must_use]
    pub fn sharding_or_whole(&self) -> Sharding {
        self.sharding.clone().unwrap_or_else(|| Sharding::replicated(self.shape.rank()))
    }

    /// The first parameter, whose part, axes and kind hold for all.
    #[must_use]
    pub fn spec(&self) -> &ParamSpec {
        &self.members[0]
    }
}

/// A run of layers in a program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Run {
    /// One layer by itself.
    Layer(usize),
    /// A loop over `groups` repetitions of `period` layers.
    Loop { start: usize, groups: usize, period: usize },
}

/// Neighbours within the repeated pattern that are alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stretch {
    /// Index of the first one in the first repetition.
    pub(crate) first: usize,
    /// How many.
    pub(crate) length: usize,
}

/// The stretches of `period` layers from `start` on.
pub(crate) fn stretches(arch: &Arch, start: usize, period: usize) -> Vec<Stretch> {
    let mut all: Vec<Stretch> = Vec::new();
    for index in start..start + period {
        match all.last_mut() {
            Some(last) if arch.layers()[last.first] == arch.layers()[index] => last.length += 1,
            _ => all.push(Stretch { first: index, length: 1 }),
        }
    }
    all
}

/// The arrays of a program's parameters.
#[derive(Debug, Clone, PartialEq)]
pub struct Layout {
    slots: Vec<Slot>,
    runs: Vec<Run>,
    partition: Option<Arc<Partition>>,
}

/// Layers that do not repeat in a way a loop could follow.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "scan_layers=true needs layers that repeat evenly: the kinds repeat every {period}, which divides neither or only one of \
     the {own} layers with own keys and values and the {shared} that borrow them; use scan_layers=false"
)]
pub struct UnevenLayers {
    /// Smallest distance at which the kinds repeat.
    pub period: usize,
    /// Layers with own keys and values.
    pub own: usize,
    /// Layers that borrow them.
    pub shared: usize,
}

impl Layout {
    /// Every parameter by itself, every layer written out.
    #[must_use]
    pub fn unrolled(arch: &Arch) -> Self {
        let slots = param_table(arch).into_iter().map(single).collect();
        Layout { slots, runs: (0..arch.layers().len()).map(Run::Layer).collect(), partition: None }
    }

    /// The same, with only `rows` rows of the per-layer table: those that a batch needs.
    #[must_use]
    pub fn with_table_rows(mut self, rows: usize) -> Self {
        for slot in self.slots.iter_mut().filter(|s| s.members[0].name == EMBED_TOKENS_PER_LAYER) {
            let columns = slot.shape.dims().last().copied().unwrap_or(0);
            slot.shape = [rows, columns].into();
        }
        self
    }

    /// A loop for every segment that has more than one repetition of the pattern.
    ///
    /// # Errors
    /// When the pattern does not divide the segments.
    pub fn scanned(arch: &Arch) -> Result<Self, UnevenLayers> {
        let kinds: Vec<_> = arch.layers().iter().map(|l| l.kind).collect();
        let period = (1..=kinds.len()).find(|p| kinds[*p..].iter().eq(&kinds[..kinds.len() - p])).unwrap_or(1);
        let own = arch.first_shared_layer();
        let shared = kinds.len() - own;
        if !own.is_multiple_of(period) || !shared.is_multiple_of(period) {
            return Err(UnevenLayers { period, own, shared });
        }
        let mut runs = Vec::new();
        for (start, length) in [(0, own), (own, shared)] {
            match length / period {
                0 => {}
                1 => runs.extend((start..start + period).map(Run::Layer)),
                groups => runs.push(Run::Loop { start, groups, period }),
            }
        }
        // The stretch a layer is in, how often it repeats, and at what distance.
        let looped = |layer: usize| {
            runs.iter().find_map(|r| match *r {
                Run::Loop { start, groups, period } if (start..start + groups * period).contains(&layer) => {
                    let at = start + (layer - start) % period;
                    let mut all = stretches(arch, start, period).into_iter();
                    all.find(|s| (s.first..s.first + s.length).contains(&at)).map(|s| (s, groups, period))
                }
                _ => None,
            })
        };
        let table = param_table(arch);
        let mut slots: Vec<Slot> = Vec::new();
        for spec in &table {
            match spec.layer.and_then(looped) {
                None => slots.push(single(spec.clone())),
                Some((stretch, groups, period)) if spec.layer == Some(stretch.first) => {
                    let layers = (0..groups).flat_map(|i| (0..stretch.length).map(move |j| i * period + j));
                    let members: Vec<ParamSpec> = layers.filter_map(|by| moved(&table, spec, by)).collect();
                    let shape: Shape = [&[members.len()], spec.shape.dims()].concat().into();
                    let name = format!("{}@{}", spec.name, members.len());
                    slots.push(Slot { name, shape, members, stacked: true, sharding: None });
                }
                // Stacked with that of the first layer of its stretch.
                Some(_) => {}
            }
        }
        Ok(Layout { slots, runs, partition: None })
    }

    /// The same arrays and layers on a mesh of devices. One device needs no partition and gets none.
    ///
    /// # Errors
    /// The first parameter that the mesh does not divide.
    pub fn partitioned(mut self, partition: Partition) -> Result<Self, PartitionError> {
        if partition.mesh().devices() == 1 {
            return Ok(self);
        }
        for slot in &mut self.slots {
            let one = partition.parameter(slot.spec())?;
            slot.sharding = Some(if slot.stacked { stacked(&one) } else { one });
        }
        self.partition = Some(Arc::new(partition));
        Ok(self)
    }

    /// A graph on the layout's mesh, if it has one.
    ///
    /// # Errors
    /// When the mesh is not one.
    pub fn graph(&self, name: &str) -> Result<Graph, GraphError> {
        let g = Graph::new(name);
        if let Some(p) = self.partition() {
            let axes: Vec<(&str, usize)> = p.mesh().axes().iter().map(|(n, s)| (n.as_str(), *s)).collect();
            g.set_mesh(&axes)?;
        }
        Ok(g)
    }

    /// The mesh and its rules, where there are several devices.
    #[must_use]
    pub fn partition(&self) -> Option<&Partition> {
        self.partition.as_deref()
    }

    /// The mesh; one without axes where there is one device.
    #[must_use]
    pub fn mesh(&self) -> Mesh {
        self.partition().map(|p| p.mesh().clone()).unwrap_or_default()
    }

    /// Devices that share the arrays.
    #[must_use]
    pub fn devices(&self) -> usize {
        self.partition().map_or(1, |p| p.mesh().devices())
    }

    /// The arrays, in the order of a program's inputs.
    #[must_use]
    pub fn slots(&self) -> &[Slot] {
        &self.slots
    }

    /// Whether there is any loop.
    #[must_use]
    pub fn has_loops(&self) -> bool {
        self.runs.iter().any(|r| matches!(r, Run::Loop { .. }))
    }

    /// Layers written out in the longest loop's body; 1 without loops.
    #[must_use]
    pub fn longest_body(&self, arch: &Arch) -> usize {
        let body = |r: &Run| match *r {
            Run::Layer(_) => 1,
            Run::Loop { start, period, .. } => stretches(arch, start, period).len(),
        };
        self.runs.iter().map(body).max().unwrap_or(1)
    }

    pub(crate) fn runs(&self) -> &[Run] {
        &self.runs
    }
}

fn single(spec: ParamSpec) -> Slot {
    Slot { name: spec.name.clone(), shape: spec.shape.clone(), members: vec![spec], stacked: false, sharding: None }
}

/// The parameter of the same role, some layers later.
fn moved(table: &[ParamSpec], spec: &ParamSpec, by: usize) -> Option<ParamSpec> {
    let layer = spec.layer? + by;
    let role = role(spec)?;
    table.iter().find(|p| p.layer == Some(layer) && crate::layout::role(p) == Some(role)).cloned()
}

/// The name of a layer's parameter without `layers.N.`.
pub(crate) fn role(spec: &ParamSpec) -> Option<&str> {
    spec.layer?;
    spec.name.splitn(3, '.').nth(2)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::tests::{e2b, e4b};

    #[test]
    fn every_parameter_is_in_one_slot() {
        for arch in [e2b(), e4b()] {
            let wanted: Vec<String> = param_table(&arch).into_iter().map(|p| p.name).collect();
            for layout in [Layout::unrolled(&arch), Layout::scanned(&arch).unwrap()] {
                let mut found: Vec<&str> =
                    layout.slots().iter().flat_map(|s| s.members.iter().map(|m| m.name.as_str())).collect();
                let mut wanted: Vec<&str> = wanted.iter().map(String::as_str).collect();
                found.sort_unstable();
                wanted.sort_unstable();
                assert_eq!(found, wanted);
                for s in layout.slots() {
                    assert_eq!(
                        s.shape.elements(),
                        s.members.iter().map(|m| m.shape.elements()).sum::<usize>(),
                        "{}",
                        s.name
                    );
                }
            }
        }
    }

    #[test]
    fn e2b_and_e4b_are_two_loops_each() {
        let runs = |arch: &Arch| Layout::scanned(arch).unwrap().runs().to_vec();
        let looped = |start, groups, period| Run::Loop { start, groups, period };
        assert_eq!(runs(&e2b()), [looped(0, 3, 5), looped(15, 4, 5)]);
        assert_eq!(runs(&e4b()), [looped(0, 4, 6), looped(24, 3, 6)]);
        let stretch = |first, length| Stretch { first, length };
        assert_eq!(stretches(&e2b(), 15, 5), [stretch(15, 4), stretch(19, 1)]);
        // Of own layers, four in three repetitions share an array; in checkpoints each is by itself.
        let layout = Layout::scanned(&e2b()).unwrap();
        let slot = layout.slots().iter().find(|s| s.name == "layers.0.mlp.up_proj.weight@12").unwrap();
        let layers: Vec<usize> = slot.members.iter().filter_map(|m| m.layer).collect();
        assert_eq!(layers, [0, 1, 2, 3, 5, 6, 7, 8, 10, 11, 12, 13]);
    }

    #[test]
    fn a_pattern_that_does_not_divide_is_refused() {
        let mut spec = e2b().spec().clone();
        spec.num_kv_shared_layers = 18;
        let error = Layout::scanned(&Arch::new(spec).unwrap()).unwrap_err();
        assert_eq!(error, UnevenLayers { period: 5, own: 17, shared: 18 });
        assert!(error.to_string().contains("scan_layers=false"));
    }
}
