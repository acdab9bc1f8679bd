//! How a model lies on a mesh of devices: from the logical axes of parameters and activations to mesh axes.
//!
//! The rules are MaxText's, by its names: an ordered list of `(logical axis, mesh axes)`, of which the first whose mesh axes
//! are free decides. The model itself is maths on whole values; what this module says becomes shardings of a program's inputs
//! and results and constraints at a few of its values, and the compiler's partitioner does the rest.
//!
//! Parameters are stored cut over the axes that also cut the batch (`fsdp`, ...) and are gathered where they are used:
//! [`Partition::gathered`]. Gradients and moments lie as their parameters do.

use graph::{Graph, Mesh, Sharding, Value};
use tensor::{Axis, ParamSpec, Transform};

use crate::Arch;
use crate::nn::Result as GraphResult;
use crate::params::param_table;

pub use config::mesh::MESH_AXES;

/// Names of activation axes in the rules.
pub mod names {
    /// Sequences.
    pub const BATCH: &str = "activation_batch";
    /// Sequences of embedding and logits.
    pub const LOGITS_BATCH: &str = "activation_embed_and_logits_batch";
    /// Positions.
    pub const LENGTH: &str = "activation_length";
    /// Positions of queries.
    pub const Q_LENGTH: &str = "activation_q_length";
    /// Positions of the residual stream between blocks.
    pub const NORM_LENGTH: &str = "activation_norm_length";
    /// Width of the residual stream.
    pub const EMBED: &str = "activation_embed";
    /// Query heads.
    pub const HEADS: &str = "activation_heads";
    /// Key/value heads.
    pub const KV_HEADS: &str = "activation_kv_heads";
    /// Sequences of keys and values.
    pub const KV_BATCH: &str = "activation_kv_batch";
    /// Inner width of an MLP.
    pub const MLP: &str = "activation_mlp";
    /// Vocabulary of a block of logits.
    pub const VOCAB: &str = "activation_vocab";
    /// A dimension that is never cut.
    pub const WHOLE: &str = "";
}

/// The rules that matter to this model, in MaxText's order. Length axes name `context` first, so that leaving one of them out
/// keeps every device's part in one piece.
const RULES: &[(&str, &[&str])] = &[
    (names::LOGITS_BATCH, &["data", "fsdp", "fsdp_transpose"]),
    (names::VOCAB, &["tensor", "tensor_sequence"]),
    (names::VOCAB, &["tensor"]),
    (names::VOCAB, &["tensor_sequence"]),
    ("vocab", &["tensor", "tensor_sequence"]),
    ("embed_vocab", &["fsdp", "fsdp_transpose", "context"]),
    (names::HEADS, &["tensor", "tensor_sequence"]),
    (names::KV_HEADS, &["tensor", "tensor_sequence"]),
    (names::Q_LENGTH, &["context"]),
    (names::KV_BATCH, &["data", "fsdp", "fsdp_transpose"]),
    ("heads", &["tensor", "tensor_sequence"]),
    ("q_heads", &["tensor", "tensor_sequence"]),
    ("kv_heads", &["tensor", "tensor_sequence"]),
    ("kv", &[]),
    ("kv_head_dim", &[]),
    (names::MLP, &["tensor", "tensor_sequence"]),
    (names::BATCH, &["data", "fsdp", "fsdp_transpose"]),
    (names::LENGTH, &["context"]),
    (names::NORM_LENGTH, &["context", "tensor_sequence"]),
    (names::EMBED, &["tensor"]),
    ("mlp", &["fsdp_transpose", "tensor", "tensor_sequence"]),
    ("embed", &["fsdp", "fsdp_transpose", "context"]),
    ("embed", &["fsdp", "context"]),
    ("norm", &["tensor"]),
];

/// An ordered list of rules.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rules(Vec<(String, Vec<String>)>);

impl Default for Rules {
    fn default() -> Self {
        let own = |s: &[&str]| s.iter().map(|&a| a.to_owned()).collect();
        Rules(RULES.iter().map(|&(name, axes)| (name.to_owned(), own(axes))).collect())
    }
}

impl Rules {
    /// These rules alone. Logical axes without a rule are whole.
    #[must_use]
    pub fn only(rules: Vec<(String, Vec<String>)>) -> Self {
        Rules(rules)
    }

    /// The default rules, of which those named among `rules` are replaced.
    #[must_use]
    pub fn replacing(rules: &[(String, Vec<String>)]) -> Self {
        let mut all = Rules::default().0;
        all.retain(|(name, _)| !rules.iter().any(|(n, _)| n == name));
        // In front: axes that a given rule takes are its own.
        Rules(rules.iter().cloned().chain(all).collect())
    }

    /// The rules in order.
    #[must_use]
    pub fn list(&self) -> &[(String, Vec<String>)] {
        &self.0
    }

    /// Mesh axes for each of the logical axes. An axis is used once; where every rule of a name wants one that is taken, the
    /// first rule counts without it.
    fn assign(&self, mesh: &Mesh, logical: &[&str]) -> Vec<Vec<String>> {
        let mut out: Vec<Option<Vec<String>>> = vec![None; logical.len()];
        let mut used: Vec<&str> = Vec::new();
        let present = |axes: &'_ [String]| axes.iter().filter(|a| mesh.size(a).is_some()).cloned().collect::<Vec<_>>();
        for strict in [true, false] {
            for (name, axes) in &self.0 {
                let Some(at) = (0..logical.len()).find(|&i| logical[i] == name && out[i].is_none()) else { continue };
                let mut wanted = present(axes);
                if !strict {
                    wanted.retain(|a| !used.contains(&a.as_str()));
                }
                if wanted.iter().any(|a| used.contains(&a.as_str())) {
                    continue;
                }
                used.extend(axes.iter().filter(|a| wanted.contains(a)).map(String::as_str));
                out[at] = Some(wanted);
            }
        }
        out.into_iter().map(Option::unwrap_or_default).collect()
    }
}

/// A model that does not fit a mesh.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PartitionError {
    /// A dimension does not divide.
    #[error(
        "{parameter}: its axis {axis} of {size} is not divisible by {parts}, the devices along {}; choose sizes of these axes \
         whose product divides {size}",
        .mesh_axes.join(" and ")
    )]
    Uneven {
        /// Name of the parameter.
        parameter: String,
        /// The logical axis.
        axis: &'static str,
        /// Its size.
        size: usize,
        /// Devices it is to be cut over.
        parts: usize,
        /// The mesh axes it is cut over.
        mesh_axes: Vec<String>,
    },
    /// A rule cuts a dimension that a parameter's layout cannot have cut.
    #[error(
        "{parameter}: its axis {axis} cannot be cut over {}, because it lies inside another in the stored matrix; leave {axis} \
         out of logical_axis_rules",
        .mesh_axes.join(" and ")
    )]
    Inner {
        /// Name of the parameter.
        parameter: String,
        /// The logical axis.
        axis: &'static str,
        /// The mesh axes it is cut over.
        mesh_axes: Vec<String>,
    },
    /// A mesh that is none.
    #[error("{0}")]
    Mesh(String),
}

/// A mesh and the rules by which a model lies on it.
#[derive(Debug, Clone, PartialEq)]
pub struct Partition {
    mesh: Mesh,
    rules: Rules,
    /// Mesh axes along which devices hold different tokens.
    token_axes: Vec<String>,
    /// Whether a dimension that does not divide is cut over fewer axes instead of being refused.
    lenient: bool,
}

/// How a parameter lies between steps, and while it is used.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Spread {
    pub(crate) stored: Sharding,
    pub(crate) gathered: Sharding,
}

impl Partition {
    /// Of sizes along [`MESH_AXES`] (other names are refused). Axes of size 1 are left out.
    ///
    /// # Errors
    /// When a name is unknown or occurs twice, or a size is 0.
    pub fn new(sizes: &[(&str, usize)], rules: Rules) -> Result<Self, PartitionError> {
        if let Some((name, _)) = sizes.iter().find(|(n, _)| !MESH_AXES.contains(n)) {
            return Err(PartitionError::Mesh(format!("{name:?} is no mesh axis; known are {}", MESH_AXES.join(", "))));
        }
        let all = Mesh::new(sizes).map_err(PartitionError::Mesh)?;
        let kept: Vec<(&str, usize)> =
            all.axes().iter().filter(|(_, s)| *s > 1).map(|(n, s)| (n.as_str(), *s)).collect();
        let mesh = Mesh::new(&kept).map_err(PartitionError::Mesh)?;
        let mut partition = Partition { mesh, rules, token_axes: Vec::new(), lenient: false };
        let [batch, length] = &partition.rules.assign(&partition.mesh, &[names::BATCH, names::LENGTH])[..] else {
            unreachable!("one list for each name")
        };
        partition.token_axes = [&batch[..], length].concat();
        Ok(partition)
    }

    /// The same, where a dimension of a parameter that does not divide is cut over fewer axes: any model runs on any mesh, at the
    /// price of memory.
    #[must_use]
    pub fn lenient(self) -> Self {
        Partition { lenient: true, ..self }
    }

    /// The mesh, without axes of size 1.
    #[must_use]
    pub fn mesh(&self) -> &Mesh {
        &self.mesh
    }

    /// The rules.
    #[must_use]
    pub fn rules(&self) -> &Rules {
        &self.rules
    }

    fn parts(&self, axes: &[String]) -> usize {
        axes.iter().filter_map(|a| self.mesh.size(a)).product()
    }

    /// Number of devices along all of these axes.
    pub(crate) fn parts_of(&self, name: &str) -> usize {
        self.parts(&self.axes_of(name))
    }

    /// How many ways the sequences of a batch are dealt out: a batch is a multiple of it.
    #[must_use]
    pub fn batch_parts(&self) -> usize {
        self.parts_of(names::BATCH)
    }

    /// How many ways every sequence is cut: a sequence is a multiple of it.
    #[must_use]
    pub fn length_parts(&self) -> usize {
        self.parts_of(names::LENGTH).max(self.parts_of(names::NORM_LENGTH))
    }

    /// How many ways a sequence is cut where its loss is computed.
    #[must_use]
    pub fn token_length_parts(&self) -> usize {
        self.parts_of(names::LENGTH)
    }

    /// How many ways this many columns of a block of logits are cut.
    #[must_use]
    pub fn vocab_parts(&self, vocab: usize) -> usize {
        self.activation(&[(names::VOCAB, vocab)]).dims().first().map_or(1, |axes| self.parts(axes))
    }

    /// How a parameter lies, in Hugging Face's shape.
    ///
    /// Norms and keys and values whose size does not divide are whole on every device: one key/value head serves any number of
    /// devices.
    ///
    /// # Errors
    /// When another dimension does not divide, and the partition is not [`lenient`](Self::lenient).
    pub fn parameter(&self, spec: &ParamSpec) -> Result<Sharding, PartitionError> {
        let logical: Vec<&str> = spec.axes.iter().map(|a| a.name()).collect();
        let mut assigned = self.rules.assign(&self.mesh, &logical);
        for ((axes, &axis), &size) in assigned.iter_mut().zip(&spec.axes).zip(spec.maxtext_shape.dims()) {
            if self.lenient || matches!(axis, Axis::KvHeads | Axis::Norm) {
                self.shorten(axes, size);
            }
            let parts = self.parts(axes);
            if !size.is_multiple_of(parts) {
                return Err(PartitionError::Uneven {
                    parameter: spec.name.clone(),
                    axis: axis.name(),
                    size,
                    parts,
                    mesh_axes: axes.clone(),
                });
            }
        }
        if !matches!(spec.transform, Transform::Transpose) {
            return Ok(Sharding::from_axes(assigned));
        }
        // [in.., out..] -> [out, in]: the dimensions of each side are one, the first of them outermost.
        let inner = |group: std::ops::Range<usize>| {
            let cut = group.clone().skip(1).find(|&i| !assigned[i].is_empty());
            match cut {
                Some(i) => Err(PartitionError::Inner {
                    parameter: spec.name.clone(),
                    axis: spec.axes[i].name(),
                    mesh_axes: assigned[i].clone(),
                }),
                None => Ok(assigned.get(group.start).cloned().unwrap_or_default()),
            }
        };
        let inputs = inputs_of(spec);
        Ok(Sharding::from_axes(vec![inner(inputs..spec.axes.len())?, inner(0..inputs)?]))
    }

    /// Drops mesh axes from the end until the rest divide.
    fn shorten(&self, axes: &mut Vec<String>, size: usize) {
        while !size.is_multiple_of(self.parts(axes)) {
            axes.pop();
        }
    }

    /// A sharding without the axes along which devices hold different tokens: how a parameter lies while it is used.
    #[must_use]
    pub fn gathered(&self, stored: &Sharding) -> Sharding {
        let keep = |axes: &Vec<String>| axes.iter().filter(|a| !self.token_axes.contains(a)).cloned().collect();
        Sharding::from_axes(stored.dims().iter().map(keep).collect())
    }

    /// How an activation lies: for every dimension its logical name and size. A dimension that does not divide is cut over
    /// fewer axes.
    #[must_use]
    pub fn activation(&self, dims: &[(&str, usize)]) -> Sharding {
        let logical: Vec<&str> = dims.iter().map(|d| d.0).collect();
        let mut assigned = self.rules.assign(&self.mesh, &logical);
        for (axes, &(_, size)) in assigned.iter_mut().zip(dims) {
            self.shorten(axes, size);
        }
        Sharding::from_axes(assigned)
    }

    /// Checks every parameter.
    ///
    /// # Errors
    /// The first parameter that does not fit.
    pub fn check(&self, arch: &Arch) -> Result<(), PartitionError> {
        param_table(arch).iter().try_for_each(|p| self.parameter(p).map(|_| ()))
    }

    /// Share of the parameters that lie whole on every device, and the largest of them. Devices along `data` alone are meant to
    /// hold everything: of them nothing is asked.
    ///
    /// # Errors
    /// When a parameter does not fit.
    pub fn whole_share(&self, arch: &Arch) -> Result<(f64, Option<String>), PartitionError> {
        if self.mesh.axes().iter().all(|(axis, _)| axis == "data") {
            return Ok((0.0, None));
        }
        let (mut all, mut whole, mut largest) = (0usize, 0usize, None::<(usize, String)>);
        for p in param_table(arch) {
            let n = p.shape.elements();
            all += n;
            if self.parameter(&p)?.is_replicated() {
                whole += n;
                if largest.as_ref().is_none_or(|(m, _)| n > *m) {
                    largest = Some((n, p.name));
                }
            }
        }
        Ok((whole as f64 / all.max(1) as f64, largest.map(|(_, name)| name)))
    }

    /// The mesh axes of one logical axis by itself.
    pub(crate) fn axes_of(&self, name: &str) -> Vec<String> {
        self.rules.assign(&self.mesh, &[name]).pop().unwrap_or_default()
    }
}

/// How many leading dimensions of the MaxText shape are the inputs of a transposed matrix.
fn inputs_of(spec: &ParamSpec) -> usize {
    let inputs = spec.shape.dims().last().copied().unwrap_or(1);
    let mut product = 1;
    for (i, d) in spec.maxtext_shape.dims().iter().enumerate() {
        product *= d;
        if product == inputs {
            return i + 1;
        }
    }
    spec.maxtext_shape.rank()
}

/// Constrains `x` to lie as its logical axes say; without a partition, `x` itself.
pub(crate) fn constrain(g: &Graph, partition: Option<&Partition>, x: Value, logical: &[&str]) -> GraphResult<Value> {
    let Some(p) = partition else { return Ok(x) };
    let dims: Vec<(&str, usize)> = logical.iter().copied().zip(g.dims(x)).collect();
    g.sharding_constraint(x, p.activation(&dims))
}

/// The parameter `w` as it is used: gathered over the axes that cut the tokens. Its gradient goes the other way at once: summed
/// over devices and cut as the parameter is stored.
pub(crate) fn gather(g: &Graph, w: Value, Spread { stored, gathered }: &Spread) -> GraphResult<Value> {
    if stored == gathered {
        return Ok(w);
    }
    let out = g.custom_vjp(
        &[w],
        |g, v| Ok((vec![g.sharding_constraint(v[0], gathered.clone())?], vec![])),
        |g, _, _, ct| Ok(vec![Some(g.sharding_constraint(ct[0], stored.clone())?)]),
    )?;
    Ok(out[0])
}

/// A sharding of a stack of values that each lie as `one` does.
pub(crate) fn stacked(one: &Sharding) -> Sharding {
    Sharding::from_axes(std::iter::once(Vec::new()).chain(one.dims().iter().cloned()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::tests::{e2b, e4b};
    use crate::layout::Layout;

    fn partition(sizes: &[(&str, usize)]) -> Partition {
        Partition::new(sizes, Rules::default()).unwrap()
    }

    fn lies(arch: &Arch, sizes: &[(&str, usize)], name: &str) -> String {
        let spec = param_table(arch).into_iter().find(|p| p.name == name).unwrap();
        partition(sizes).parameter(&spec).unwrap().to_string()
    }

    #[test]
    fn parameters_of_both_models_lie_as_in_maxtext() {
        let mesh: &[(&str, usize)] = &[("fsdp", 4), ("tensor", 2)];
        // Hugging Face's matrices are [out, in].
        for (name, e2b_lies, e4b_lies) in [
            ("embed_tokens.weight", r#"[{"tensor"}, {"fsdp"}]"#, r#"[{"tensor"}, {"fsdp"}]"#),
            ("embed_tokens_per_layer.weight", r#"[{"tensor"}, {"fsdp"}]"#, r#"[{"tensor"}, {"fsdp"}]"#),
            ("per_layer_model_projection.weight", r#"[{"tensor"}, {"fsdp"}]"#, r#"[{"tensor"}, {"fsdp"}]"#),
            ("layers.0.self_attn.q_proj.weight", r#"[{"tensor"}, {"fsdp"}]"#, r#"[{"tensor"}, {"fsdp"}]"#),
            // One key/value head is whole on both devices of the tensor axis, two are shared.
            ("layers.0.self_attn.k_proj.weight", r#"[{}, {"fsdp"}]"#, r#"[{"tensor"}, {"fsdp"}]"#),
            ("layers.0.self_attn.v_proj.weight", r#"[{}, {"fsdp"}]"#, r#"[{"tensor"}, {"fsdp"}]"#),
            ("layers.0.self_attn.o_proj.weight", r#"[{"fsdp"}, {"tensor"}]"#, r#"[{"fsdp"}, {"tensor"}]"#),
            ("layers.0.mlp.gate_proj.weight", r#"[{"tensor"}, {"fsdp"}]"#, r#"[{"tensor"}, {"fsdp"}]"#),
            ("layers.0.mlp.down_proj.weight", r#"[{"fsdp"}, {"tensor"}]"#, r#"[{"fsdp"}, {"tensor"}]"#),
            ("layers.0.per_layer_input_gate.weight", r#"[{"tensor"}, {"fsdp"}]"#, r#"[{"tensor"}, {"fsdp"}]"#),
            ("layers.0.per_layer_projection.weight", r#"[{"fsdp"}, {"tensor"}]"#, r#"[{"fsdp"}, {"tensor"}]"#),
            ("layers.0.input_layernorm.weight", r#"[{"tensor"}]"#, r#"[{"tensor"}]"#),
            ("layers.0.layer_scalar", "[{}]", "[{}]"),
        ] {
            assert_eq!(lies(&e2b(), mesh, name), e2b_lies, "E2B {name}");
            assert_eq!(lies(&e4b(), mesh, name), e4b_lies, "E4B {name}");
        }
    }

    #[test]
    fn the_second_fsdp_axis_cuts_the_other_side_of_the_mlp() {
        let mesh: &[(&str, usize)] = &[("fsdp", 2), ("fsdp_transpose", 2), ("context", 2), ("tensor", 2)];
        let lies = |name| lies(&e2b(), mesh, name);
        assert_eq!(lies("layers.0.mlp.up_proj.weight"), r#"[{"fsdp_transpose", "tensor"}, {"fsdp", "context"}]"#);
        assert_eq!(lies("layers.0.self_attn.q_proj.weight"), r#"[{"tensor"}, {"fsdp", "fsdp_transpose", "context"}]"#);
        let p = partition(mesh);
        assert_eq!((p.batch_parts(), p.length_parts()), (4, 2));
        let stored = p.parameter(&param_table(&e2b())[0]).unwrap();
        assert_eq!(stored.to_string(), r#"[{"tensor"}, {"fsdp", "fsdp_transpose", "context"}]"#);
        assert_eq!(p.gathered(&stored).to_string(), r#"[{"tensor"}, {}]"#);
    }

    #[test]
    fn activations_are_cut_by_tokens_heads_and_widths() {
        let p = partition(&[("data", 2), ("fsdp", 2), ("context", 2), ("tensor", 2)]);
        let at = |dims: &[(&str, usize)]| p.activation(dims).to_string();
        assert_eq!(
            at(&[(names::BATCH, 8), (names::NORM_LENGTH, 16), (names::EMBED, 32)]),
            r#"[{"data", "fsdp"}, {"context"}, {"tensor"}]"#
        );
        assert_eq!(
            at(&[(names::KV_BATCH, 8), (names::KV_HEADS, 1), (names::LENGTH, 16), (names::WHOLE, 8)]),
            r#"[{"data", "fsdp"}, {}, {"context"}, {}]"#
        );
        // Per-layer inputs [b, t, l, p]: by tokens alone.
        assert_eq!(
            at(&[(names::BATCH, 8), (names::LENGTH, 16), (names::WHOLE, 35), (names::WHOLE, 256)]),
            r#"[{"data", "fsdp"}, {"context"}, {}, {}]"#
        );
    }

    #[test]
    fn every_mesh_of_sixteen_takes_both_models_or_says_why_not() {
        for arch in [e2b(), e4b()] {
            for tensor in [1, 2, 4, 8] {
                let p = partition(&[("fsdp", 16 / tensor), ("tensor", tensor)]);
                p.check(&arch).unwrap();
                let (whole, _) = p.whole_share(&arch).unwrap();
                assert!(whole < 0.02, "{tensor}: {whole}");
            }
            let error = partition(&[("tensor", 16)]).check(&arch).unwrap_err();
            assert_eq!(
                error.to_string(),
                "layers.0.self_attn.q_proj.weight: its axis q_heads of 8 is not divisible by 16, the devices along tensor; \
                 choose sizes of these axes whose product divides 8"
            );
        }
        let error = partition(&[("fsdp", 7)]).check(&e2b()).unwrap_err();
        assert!(matches!(error, PartitionError::Uneven { axis: "embed_vocab", size: 1536, parts: 7, .. }), "{error}");
    }

    #[test]
    fn what_lies_whole_is_counted() {
        assert_eq!(partition(&[("data", 8)]).whole_share(&e2b()).unwrap(), (0.0, None));
        let rules = Rules::replacing(&[("embed_vocab".to_owned(), vec![])]);
        let (share, largest) = Partition::new(&[("fsdp", 8)], rules).unwrap().whole_share(&e2b()).unwrap();
        // Both tables: 402653184 + 2348810240 of 4628569379.
        assert!((0.594..0.595).contains(&share), "{share}");
        assert_eq!(largest.as_deref(), Some("embed_tokens_per_layer.weight"));
    }

    #[test]
    fn rules_can_be_replaced() {
        let rule = |name: &str, axes: &[&str]| (name.to_owned(), axes.iter().map(|a| (*a).to_owned()).collect());
        let spec = &param_table(&e2b())[0];
        let rules = Rules::replacing(&[rule("embed_vocab", &[]), rule("vocab", &["fsdp", "expert"])]);
        let p = Partition::new(&[("fsdp", 4), ("tensor", 2)], rules).unwrap();
        assert_eq!(p.parameter(spec).unwrap().to_string(), r#"[{"fsdp"}, {}]"#);
        let p = Partition::new(&[("fsdp", 4), ("tensor", 2)], Rules::only(vec![rule("vocab", &["tensor"])])).unwrap();
        assert_eq!(p.parameter(spec).unwrap().to_string(), r#"[{"tensor"}, {}]"#);
        // Within a stored matrix heads are outside, head sizes inside.
        let rules = Rules::replacing(&[rule("kv", &["tensor"]), rule("q_heads", &[])]);
        let error = Partition::new(&[("tensor", 2)], rules).unwrap().check(&e2b()).unwrap_err();
        assert!(matches!(error, PartitionError::Inner { axis: "kv", .. }), "{error}");
        assert!(Partition::new(&[("fsdq", 2)], Rules::default()).is_err());
    }

    #[test]
    fn stacks_are_never_cut_along_their_layers() {
        let layout = Layout::scanned(&e2b()).unwrap().partitioned(partition(&[("fsdp", 8)])).unwrap();
        for slot in layout.slots().iter().filter(|s| s.stacked) {
            assert!(slot.sharding.as_ref().unwrap().dims()[0].is_empty(), "{}", slot.name);
        }
        assert_eq!(layout.partition().unwrap().mesh().devices(), 8);
        let one = Layout::scanned(&e2b()).unwrap().partitioned(partition(&[("fsdp", 1)])).unwrap();
        assert!(one.partition().is_none() && one.slots()[0].sharding.is_none());
    }
}
