//! Enumerations: the words a key accepts, as Rust types.

use std::fmt;

use serde::{Serialize, Serializer};

/// Declares an enumeration whose words are the ones written in configuration files.
macro_rules! choices {
    ($($(#[$meta:meta])* $name:ident { $($(#[$vmeta:meta])* $variant:ident = $word:literal),+ $(,)? })+) => {$(
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum $name { $($(#[$vmeta])* $variant),+ }

        impl $name {
            /// Every accepted word, in the order of declaration.
            pub const WORDS: &'static [&'static str] = &[$($word),+];
            /// Every variant, in the order of declaration.
            pub const ALL: &'static [$name] = &[$($name::$variant),+];

            /// The word written in configuration files.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self { $($name::$variant => $word),+ }
            }

            /// The variant of a word, if it is one of [`Self::WORDS`].
            #[must_use]
            pub fn from_word(word: &str) -> Option<Self> {
                match word { $($word => Some($name::$variant),)+ _ => None }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(self.as_str())
            }
        }
    )+};
}

choices! {
    /// The class of the decoder layers.
    DecoderBlock {
        /// Gemma 4 E2B and E4B: per-layer embeddings and shared keys and values.
        Gemma4Small = "gemma4_small",
    }

    /// A floating-point type.
    FloatType {
        /// Eight bits of exponent, seven of mantissa.
        BFloat16 = "bfloat16",
        /// IEEE single precision.
        Float32 = "float32",
        /// IEEE half precision.
        Float16 = "float16",
        /// IEEE double precision, with which curves of training are proved. Not MaxText's.
        Float64 = "float64",
    }

    /// How exactly XLA multiplies matrices.
    MatmulPrecision {
        /// The platform's own choice.
        Default = "default",
        /// More than the default where the platform has it.
        High = "high",
        /// The most the platform has.
        Highest = "highest",
        /// Operands rounded to bfloat16.
        BFloat16 = "bfloat16",
        /// Operands kept in f32.
        Float32 = "float32",
    }

    /// How attention is computed.
    Attention {
        /// The best way this version has for the shape and the device.
        Autoselected = "autoselected",
        /// Plain products and a softmax.
        DotProduct = "dot_product",
    }

    /// What a layer keeps for the backward pass; the rest is computed again.
    RematPolicy {
        /// Everything: nothing is recomputed.
        None = "none",
        /// Only the layer's input.
        Full = "full",
        /// The results of all projections.
        Minimal = "minimal",
        /// The results of all projections and of attention.
        MinimalWithContext = "minimal_with_context",
        /// Projections and attention, not the MLP.
        SaveDotWithContextExceptMlp = "save_dot_with_context_except_mlp",
        /// Projections and the MLP's output, not its gate and up products.
        SaveDotExceptMlpwi = "save_dot_except_mlpwi",
        /// Projections, nothing of the MLP.
        SaveDotExceptMlp = "save_dot_except_mlp",
        /// Query, key and value projections.
        SaveQkvProj = "save_qkv_proj",
        /// Attention's output projection.
        SaveOutProj = "save_out_proj",
    }

    /// Where the per-layer table is while a model is trained.
    TableHome {
        /// On the host if it is frozen, else on the device.
        Auto = "auto",
        /// A parameter like any other.
        Device = "device",
        /// Rows go to the device as they are needed, and come back if they are trained.
        Host = "host",
    }

    /// The optimizer.
    OptimizerKind {
        /// Adam with decoupled weight decay.
        AdamW = "adamw",
        /// Adam in Pax's formulation.
        AdamPax = "adam_pax",
        /// Plain gradient descent.
        Sgd = "sgd",
    }

    /// The course of the learning rate after warm-up.
    ScheduleKind {
        /// A half cosine down to the final value.
        Cosine = "cosine",
        /// Warm-up, stable, decay.
        Wsd = "wsd",
    }

    /// The course of the decay in a warm-up, stable, decay schedule.
    DecayStyle {
        /// A straight line.
        Linear = "linear",
        /// A half cosine.
        Cosine = "cosine",
    }

    /// Where training text comes from.
    DatasetKind {
        /// One fixed random batch.
        Synthetic = "synthetic",
        /// Local files: text, JSON lines, Parquet, or a data set directory.
        Hf = "hf",
    }

    /// How documents are packed into sequences.
    PackingKind {
        /// Whole documents, each into the first open sequence with room.
        FirstFit = "first_fit",
        /// One stream of tokens, cut where a sequence ends.
        ConcatThenSplit = "concat_then_split",
    }

    /// How the next token is chosen.
    SamplingStrategy {
        /// The most likely token.
        Greedy = "greedy",
        /// A draw from the whole distribution.
        Weighted = "weighted",
        /// A draw from the smallest set holding a share of the probability.
        Nucleus = "nucleus",
        /// A draw from the k most likely tokens.
        TopK = "topk",
        /// Top-k, then nucleus, then temperature.
        Composite = "composite",
    }

    /// The kind of device to run on.
    Hardware {
        /// Whatever the loaded plugin offers.
        Auto = "auto",
        /// Google TPUs.
        Tpu = "tpu",
        /// Graphics processors.
        Gpu = "gpu",
        /// The host's processor.
        Cpu = "cpu",
    }

    /// The activation of the MLP's gate.
    GateActivation {
        /// The tanh approximation of GELU.
        Gelu = "gelu",
    }

    /// Which profiler records.
    Profiler {
        /// None.
        Off = "",
        /// XLA's own, read by xprof and TensorBoard.
        Xplane = "xplane",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_and_variants_agree() {
        for (variant, word) in RematPolicy::ALL.iter().zip(RematPolicy::WORDS) {
            assert_eq!(variant.as_str(), *word);
            assert_eq!(RematPolicy::from_word(word), Some(*variant));
        }
        assert_eq!(RematPolicy::from_word("bogus"), None);
        assert_eq!(Profiler::from_word(""), Some(Profiler::Off));
    }
}
