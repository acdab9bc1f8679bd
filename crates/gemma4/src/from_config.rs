//! The architecture a resolved configuration describes: MaxText's keys in, [`ArchSpec`] out.

use config::Config;

use crate::Arch;
use crate::arch::{ArchError, ArchSpec, PerKind, PerLayerInput, Rope, periodic_kinds};

/// Most layers a configuration may ask for: the list of kinds is bounded before anything is allocated from it.
const MAX_LAYERS: usize = 4096;

impl Arch {
    /// Makes the architecture of a configuration.
    ///
    /// Layers are full at every `sliding_window_pattern`-th place; the last layer is always full, as Hugging Face
    /// builds it, also where the number of layers is no multiple of the period.
    ///
    /// # Errors
    /// With every problem found.
    pub fn from_config(config: &Config) -> Result<Self, ArchError> {
        let m = &config.model;
        if m.num_layers == 0 || m.num_layers > MAX_LAYERS {
            return Err(ArchError(vec![format!(
                "base_num_decoder_layers makes {} layers, must be between 1 and {MAX_LAYERS}",
                m.num_layers
            )]));
        }
        // Frequencies are those of the whole head; a proportion only says how many pairs turn. Rounded down, as
        // transformers does it.
        let rope = |theta: f64, proportion: f64, head_dim: usize| Rope {
            theta,
            rotated_pairs: (proportion * head_dim as f64 / 2.0).floor().max(0.0) as usize,
            factor: 1.0,
        };
        Arch::new(ArchSpec {
            vocab_size: m.vocab_size,
            hidden_size: m.emb_dim,
            intermediate_size: m.mlp_dim,
            layer_kinds: periodic_kinds(m.num_layers, m.sliding_window_pattern),
            num_kv_shared_layers: m.num_kv_shared_layers,
            use_double_wide_mlp: m.use_double_wide_mlp,
            num_heads: m.num_query_heads,
            kv_heads: PerKind { sliding: m.num_kv_heads, full: m.global_num_kv_heads },
            head_dim: PerKind { sliding: m.head_dim, full: m.global_head_dim },
            // `share_kv_projections` is refused by the configuration.
            k_eq_v: false,
            rope: PerKind {
                sliding: rope(m.local_rope_theta, m.local_rope_proportion, m.head_dim),
                full: rope(m.global_rope_theta, m.global_rope_proportion, m.global_head_dim),
            },
            sliding_window: m.sliding_window_size,
            per_layer_input: (m.hidden_size_per_layer_input > 0).then_some(PerLayerInput {
                vocab_size: m.vocab_size_per_layer_input,
                width: m.hidden_size_per_layer_input,
            }),
            rms_norm_eps: m.normalization_layer_epsilon,
            final_logit_softcapping: m.final_logits_soft_cap,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::tests::{e2b, e4b};
    use crate::{KvSource, LayerKind};

    fn arch(words: &[&str]) -> Result<Arch, ArchError> {
        Arch::from_config(&config::Sources::from_args(words.iter().copied()).resolve().unwrap())
    }

    #[test]
    fn the_built_in_models_are_the_official_ones() {
        assert_eq!(arch(&["model_name=gemma4-e2b"]).unwrap(), e2b());
        assert_eq!(arch(&["model_name=gemma4-e4b"]).unwrap(), e4b());
        assert_eq!(arch(&["model_name=gemma4-e4b-Instruct"]).unwrap(), e4b());
    }

    #[test]
    fn the_tiny_model_is_e2b_in_small() {
        let tiny = arch(&["model_name=tiny-e2b"]).unwrap();
        let expected = Arch::new(ArchSpec {
            vocab_size: 515,
            hidden_size: 64,
            intermediate_size: 96,
            layer_kinds: periodic_kinds(10, 5),
            num_kv_shared_layers: 5,
            use_double_wide_mlp: true,
            num_heads: 4,
            kv_heads: PerKind { sliding: 1, full: 1 },
            head_dim: PerKind { sliding: 16, full: 32 },
            k_eq_v: false,
            rope: PerKind {
                sliding: Rope { theta: 1e4, rotated_pairs: 8, factor: 1.0 },
                full: Rope { theta: 1e6, rotated_pairs: 4, factor: 1.0 },
            },
            sliding_window: 8,
            per_layer_input: Some(PerLayerInput { vocab_size: 515, width: 8 }),
            rms_norm_eps: 1e-6,
            final_logit_softcapping: Some(30.0),
        });
        assert_eq!(tiny, expected.unwrap());
        assert_eq!(tiny.layers()[5].kv, KvSource::Shared { donor: 3 });
        assert_eq!(tiny.layers()[9].kv, KvSource::Shared { donor: 4 });
    }

    #[test]
    fn keys_reach_their_place() {
        let a = arch(&[
            "model_name=tiny-e2b",
            "override_model_config=true",
            "base_num_decoder_layers=7",
            "num_kv_shared_layers=1",
            "use_double_wide_mlp=false",
            "global_num_kv_heads=2",
            "global_rope_proportion=0.5",
            "global_rope_max_timescale=500",
            "hidden_size_per_layer_input=0",
            "final_logits_soft_cap=0.0",
            "normalization_layer_epsilon=1e-5",
        ])
        .unwrap();
        let s = a.spec();
        assert_eq!(a.layers().len(), 7);
        // The fifth by the period, the seventh because it is the last.
        let full: Vec<usize> = (0..7).filter(|&i| a.layers()[i].kind == LayerKind::Full).collect();
        assert_eq!(full, [4, 6]);
        assert_eq!(a.layers()[6].kv, KvSource::Shared { donor: 4 });
        assert_eq!(a.layers()[6].mlp_width, 96);
        assert_eq!(s.kv_heads, PerKind { sliding: 1, full: 2 });
        assert_eq!(s.rope.full, Rope { theta: 500.0, rotated_pairs: 8, factor: 1.0 });
        assert_eq!((s.per_layer_input, s.final_logit_softcapping, s.rms_norm_eps), (None, None, 1e-5));
    }

    #[test]
    fn an_absurd_number_of_layers_is_an_error_not_an_allocation() {
        let error = arch(&["model_name=tiny-e2b", "override_model_config=true", "base_num_decoder_layers=2000000000"]);
        assert!(error.unwrap_err().to_string().contains("base_num_decoder_layers"));
    }
}
