//! Layer kinds, widths and key/value donors: the whole idea of E2B and E4B in one table.

use std::fmt;

/// Which keys a layer's queries may see.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum LayerKind {
    /// The last `window` positions, the query's own included.
    Sliding,
    /// Every position up to the query's own.
    Full,
}

impl LayerKind {
    /// Hugging Face's name.
    #[must_use]
    pub const fn hf_name(self) -> &'static str {
        match self {
            LayerKind::Sliding => "sliding_attention",
            LayerKind::Full => "full_attention",
        }
    }
}

impl fmt::Display for LayerKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.hf_name())
    }
}

/// Where a layer's keys and values come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvSource {
    /// The layer projects its own.
    Own,
    /// The layer reads those of an earlier layer, after norm and rotation.
    Shared {
        /// The last own layer of the same kind.
        donor: usize,
    },
}

/// One decoder layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layer {
    /// Sliding or full attention.
    pub kind: LayerKind,
    /// Head size of queries, keys and values.
    pub head_dim: usize,
    /// Number of key/value heads.
    pub kv_heads: usize,
    /// Inner width of the MLP.
    pub mlp_width: usize,
    /// Own or borrowed keys and values.
    pub kv: KvSource,
    /// Values are the key projection before norm and rotation (no `v_proj`).
    pub k_eq_v: bool,
}

impl Layer {
    /// Whether the layer owns keys and values.
    #[must_use]
    pub const fn owns_kv(&self) -> bool {
        matches!(self.kv, KvSource::Own)
    }
}

/// Rotary embedding of one layer kind.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f64,
    /// Pairs of channels that rotate; the others pass unchanged.
    pub rotated_pairs: usize,
    /// Frequencies are divided by this.
    pub factor: f64,
}

impl Rope {
    /// The `head_dim / 2` inverse frequencies, computed in `f64` and rounded once to `f32`; zero where nothing rotates.
    ///
    /// The exponent's denominator is the full head size also for the proportional kind.
    #[must_use]
    pub fn inv_freq(&self, head_dim: usize) -> Vec<f32> {
        (0..head_dim / 2)
            .map(|i| {
                if i < self.rotated_pairs {
                    (self.theta.powf(-2.0 * i as f64 / head_dim as f64) / self.factor) as f32
                } else {
                    0.0
                }
            })
            .collect()
    }
}

/// Per-layer embeddings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PerLayerInput {
    /// Rows of the per-layer table.
    pub vocab_size: usize,
    /// Width of one layer's slice.
    pub width: usize,
}

/// What an architecture is made from; [`Arch::new`] derives and checks the rest.
#[derive(Debug, Clone, PartialEq)]
pub struct ArchSpec {
    /// Vocabulary rows.
    pub vocab_size: usize,
    /// Hidden size.
    pub hidden_size: usize,
    /// MLP width of layers that are not doubled.
    pub intermediate_size: usize,
    /// Kind of every layer.
    pub layer_kinds: Vec<LayerKind>,
    /// Trailing layers that borrow keys and values.
    pub num_kv_shared_layers: usize,
    /// Double the MLP of the borrowing layers.
    pub use_double_wide_mlp: bool,
    /// Query heads.
    pub num_heads: usize,
    /// Key/value heads of sliding and of full layers.
    pub kv_heads: PerKind<usize>,
    /// Head size of sliding and of full layers.
    pub head_dim: PerKind<usize>,
    /// Full layers take values from the key projection.
    pub k_eq_v: bool,
    /// Rotary embedding of sliding and of full layers.
    pub rope: PerKind<Rope>,
    /// Window of sliding layers, in positions, the query's own included.
    pub sliding_window: usize,
    /// Per-layer embeddings, if any.
    pub per_layer_input: Option<PerLayerInput>,
    /// Epsilon of every norm.
    pub rms_norm_eps: f64,
    /// Soft cap of the logits.
    pub final_logit_softcapping: Option<f64>,
}

/// One value for each [`LayerKind`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PerKind<T> {
    /// For sliding layers.
    pub sliding: T,
    /// For full layers.
    pub full: T,
}

impl<T: Copy> PerKind<T> {
    /// The value of a kind.
    #[must_use]
    pub const fn get(&self, kind: LayerKind) -> T {
        match kind {
            LayerKind::Sliding => self.sliding,
            LayerKind::Full => self.full,
        }
    }
}

/// A checked Gemma 4 text architecture.
#[derive(Debug, Clone, PartialEq)]
pub struct Arch {
    spec: ArchSpec,
    layers: Vec<Layer>,
}

/// An architecture that cannot be: every problem found.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the model configuration does not describe a Gemma 4 text model:\n{}", .0.iter().map(|p| format!("  - {p}")).collect::<Vec<_>>().join("\n"))]
pub struct ArchError(pub Vec<String>);

/// Largest extent accepted from a configuration file: far above any model, far below overflow.
const MAX_EXTENT: usize = 1 << 28;

impl Arch {
    /// Derives the layers and checks that they make sense.
    ///
    /// # Errors
    /// With every problem found.
    pub fn new(spec: ArchSpec) -> Result<Self, ArchError> {
        let problems = spec.problems();
        if !problems.is_empty() {
            return Err(ArchError(problems));
        }
        let first_shared = spec.layer_kinds.len() - spec.num_kv_shared_layers;
        let mut last_own = PerKind { sliding: 0, full: 0 };
        let layers = spec
            .layer_kinds
            .iter()
            .enumerate()
            .map(|(index, &kind)| {
                let shared = index >= first_shared;
                if !shared {
                    match kind {
                        LayerKind::Sliding => last_own.sliding = index,
                        LayerKind::Full => last_own.full = index,
                    }
                }
                Layer {
                    kind,
                    head_dim: spec.head_dim.get(kind),
                    kv_heads: spec.kv_heads.get(kind),
                    mlp_width: spec.intermediate_size * if shared && spec.use_double_wide_mlp { 2 } else { 1 },
                    kv: if shared { KvSource::Shared { donor: last_own.get(kind) } } else { KvSource::Own },
                    k_eq_v: spec.k_eq_v && kind == LayerKind::Full,
                }
            })
            .collect();
        Ok(Arch { spec, layers })
    }

    /// What it was made from.
    #[must_use]
    pub fn spec(&self) -> &ArchSpec {
        &self.spec
    }

    /// Vocabulary rows.
    #[must_use]
    pub fn vocab_size(&self) -> usize {
        self.spec.vocab_size
    }

    /// Hidden size.
    #[must_use]
    pub fn hidden_size(&self) -> usize {
        self.spec.hidden_size
    }

    /// Query heads of every layer.
    #[must_use]
    pub fn num_heads(&self) -> usize {
        self.spec.num_heads
    }

    /// The layers, in order.
    #[must_use]
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// Per-layer embeddings, if the model has them.
    #[must_use]
    pub fn per_layer_input(&self) -> Option<PerLayerInput> {
        self.spec.per_layer_input
    }

    /// Index of the first layer that borrows keys and values (the number of layers if none does).
    #[must_use]
    pub fn first_shared_layer(&self) -> usize {
        self.layers.len() - self.spec.num_kv_shared_layers
    }

    /// Whether a borrowing layer reads this layer's keys and values.
    #[must_use]
    pub fn is_donor(&self, index: usize) -> bool {
        self.layers.iter().any(|l| l.kv == KvSource::Shared { donor: index })
    }

    /// The cache slot each layer reads: own layers are numbered in order, borrowing layers have their donor's.
    #[must_use]
    pub fn kv_slots(&self) -> Vec<usize> {
        self.layers
            .iter()
            .enumerate()
            .map(|(i, l)| match l.kv {
                // Own layers all precede the borrowing ones, so their slot is their index.
                KvSource::Own => i,
                KvSource::Shared { donor } => donor,
            })
            .collect()
    }
}

impl ArchSpec {
    fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let mut extent = |name: &str, value: usize| {
            if value == 0 || value > MAX_EXTENT {
                problems.push(format!("{name} is {value}, must be between 1 and {MAX_EXTENT}"));
            }
        };
        extent("vocab_size", self.vocab_size);
        extent("hidden_size", self.hidden_size);
        extent("intermediate_size", self.intermediate_size);
        extent("num_hidden_layers", self.layer_kinds.len());
        extent("num_attention_heads", self.num_heads);
        for (kind, name) in [(LayerKind::Sliding, "sliding"), (LayerKind::Full, "full")] {
            if self.layer_kinds.contains(&kind) {
                extent(&format!("head size of {name} layers"), self.head_dim.get(kind));
                extent(&format!("key/value heads of {name} layers"), self.kv_heads.get(kind));
            }
        }
        if self.layer_kinds.contains(&LayerKind::Sliding) {
            extent("sliding_window", self.sliding_window);
        }
        if let Some(p) = self.per_layer_input {
            extent("hidden_size_per_layer_input", p.width);
            extent("vocab_size_per_layer_input", p.vocab_size);
            if p.vocab_size < self.vocab_size {
                problems.push(format!(
                    "vocab_size_per_layer_input {} is smaller than vocab_size {}: some tokens would have no per-layer row",
                    p.vocab_size, self.vocab_size
                ));
            }
        }
        if !problems.is_empty() {
            return problems;
        }
        for kind in [LayerKind::Sliding, LayerKind::Full] {
            if !self.layer_kinds.contains(&kind) {
                continue;
            }
            let (head_dim, kv_heads, rope) = (self.head_dim.get(kind), self.kv_heads.get(kind), self.rope.get(kind));
            if !head_dim.is_multiple_of(2) {
                problems.push(format!("head size {head_dim} of {kind} layers is odd, rotary embedding needs pairs"));
            }
            if !self.num_heads.is_multiple_of(kv_heads) {
                problems.push(format!(
                    "num_attention_heads {} is not a multiple of the {kv_heads} key/value heads of {kind} layers",
                    self.num_heads
                ));
            }
            if !(rope.theta.is_finite() && rope.theta > 0.0 && rope.factor.is_finite() && rope.factor > 0.0) {
                problems
                    .push(format!("rope_theta {} and factor {} of {kind} must be positive", rope.theta, rope.factor));
            }
            if rope.rotated_pairs > head_dim / 2 {
                problems.push(format!("{kind} rotates {} pairs of a head of {head_dim}", rope.rotated_pairs));
            }
        }
        if self.num_kv_shared_layers >= self.layer_kinds.len() {
            problems.push(format!(
                "num_kv_shared_layers {} leaves none of the {} layers to own keys and values",
                self.num_kv_shared_layers,
                self.layer_kinds.len()
            ));
        } else {
            let (own, shared) = self.layer_kinds.split_at(self.layer_kinds.len() - self.num_kv_shared_layers);
            for kind in [LayerKind::Sliding, LayerKind::Full] {
                if shared.contains(&kind) && !own.contains(&kind) {
                    problems.push(format!("a {kind} layer borrows keys and values, but no {kind} layer owns any"));
                }
            }
        }
        if !(self.rms_norm_eps.is_finite() && self.rms_norm_eps > 0.0) {
            problems.push(format!("rms_norm_eps {} must be positive", self.rms_norm_eps));
        }
        if let Some(cap) = self.final_logit_softcapping
            && !(cap.is_finite() && cap > 0.0)
        {
            problems.push(format!("final_logit_softcapping {cap} must be positive, or null for none"));
        }
        problems
    }
}

/// The layer kinds of a model with one full layer after every `period - 1` sliding ones; the last layer is always full.
#[must_use]
pub fn periodic_kinds(num_layers: usize, period: usize) -> Vec<LayerKind> {
    (1..=num_layers)
        .map(|n| if n % period.max(1) == 0 || n == num_layers { LayerKind::Full } else { LayerKind::Sliding })
        .collect()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    fn official(
        hidden: usize,
        mlp: usize,
        layers: usize,
        period: usize,
        shared: usize,
        kv: usize,
        double: bool,
    ) -> Arch {
        Arch::new(ArchSpec {
            vocab_size: 262_144,
            hidden_size: hidden,
            intermediate_size: mlp,
            layer_kinds: periodic_kinds(layers, period),
            num_kv_shared_layers: shared,
            use_double_wide_mlp: double,
            num_heads: 8,
            kv_heads: PerKind { sliding: kv, full: kv },
            head_dim: PerKind { sliding: 256, full: 512 },
            k_eq_v: false,
            rope: PerKind {
                sliding: Rope { theta: 1e4, rotated_pairs: 128, factor: 1.0 },
                full: Rope { theta: 1e6, rotated_pairs: 64, factor: 1.0 },
            },
            sliding_window: 512,
            per_layer_input: Some(PerLayerInput { vocab_size: 262_144, width: 256 }),
            rms_norm_eps: 1e-6,
            final_logit_softcapping: Some(30.0),
        })
        .unwrap()
    }

    pub(crate) fn e2b() -> Arch {
        official(1536, 6144, 35, 5, 20, 1, true)
    }

    pub(crate) fn e4b() -> Arch {
        official(2560, 10240, 42, 6, 18, 2, false)
    }

    #[test]
    fn e2b_layers() {
        let a = e2b();
        assert_eq!(a.first_shared_layer(), 15);
        let full: Vec<usize> = (0..35).filter(|&i| a.layers()[i].kind == LayerKind::Full).collect();
        assert_eq!(full, [4, 9, 14, 19, 24, 29, 34]);
        assert_eq!(a.layers()[15].kv, KvSource::Shared { donor: 13 });
        assert_eq!(a.layers()[19].kv, KvSource::Shared { donor: 14 });
        assert!((15..35).all(|i| a.layers()[i].mlp_width == 12288) && (0..15).all(|i| a.layers()[i].mlp_width == 6144));
        assert!(a.is_donor(13) && a.is_donor(14) && !a.is_donor(12));
        let slots = a.kv_slots();
        assert_eq!(&slots[..15], (0..15).collect::<Vec<_>>());
        assert_eq!(&slots[15..20], [13, 13, 13, 13, 14]);
    }

    #[test]
    fn e4b_layers() {
        let a = e4b();
        assert_eq!(a.first_shared_layer(), 24);
        assert_eq!(a.layers()[24].kv, KvSource::Shared { donor: 22 });
        assert_eq!(a.layers()[29].kv, KvSource::Shared { donor: 23 });
        assert!(a.layers().iter().all(|l| l.mlp_width == 10240));
    }

    #[test]
    fn proportional_frequencies_use_the_full_head_size() {
        let f = e2b().spec().rope.full.inv_freq(512);
        assert_eq!(f.len(), 256);
        assert_eq!(f[0], 1.0);
        assert_eq!(f[1], 1e6f64.powf(-2.0 / 512.0) as f32);
        assert!(f[63] > 0.0 && f[64..].iter().all(|&x| x == 0.0));
    }

    #[test]
    fn all_problems_are_reported_at_once() {
        let mut s = e2b().spec().clone();
        s.num_heads = 6;
        s.kv_heads = PerKind { sliding: 4, full: 4 };
        s.head_dim.sliding = 7;
        s.rms_norm_eps = 0.0;
        s.layer_kinds = vec![LayerKind::Sliding, LayerKind::Full];
        s.num_kv_shared_layers = 2;
        let ArchError(problems) = Arch::new(s).unwrap_err();
        // 6 heads over 4 kv heads (twice), the odd head, 128 rotated pairs of 7, no own layer, epsilon
        assert_eq!(problems.len(), 6, "{problems:#?}");
    }
}
