//! The key table: one declaration per key.
//!
//! Everything else is derived from it: parsing, range and word checks, `explain`, `show`, the reference page and
//! `base.yml`. A key keeps the name, type and default it has in MaxText; where a default differs, the declaration
//! says so and why. Keys that MaxText has and this project does not support are in [`unsupported`]; they are accepted
//! at MaxText's default, so that a command line written for MaxText fails only on what would really differ.

mod checkpoint;
mod data;
mod decode;
mod mesh;
mod model;
mod numerics;
mod optimizer;
mod output;
mod run;
pub mod unsupported;

use crate::value::{Literal, Value};

/// A section of the reference, and of `show`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Category {
    /// Which model, and its shape.
    Model,
    /// Number types and precision.
    Numerics,
    /// Attention and memory.
    Memory,
    /// Batch, sequence length and steps.
    Run,
    /// The learning rate.
    Schedule,
    /// The optimizer.
    Optimizer,
    /// Training and evaluation text.
    Data,
    /// Saving and restoring.
    Checkpoint,
    /// Devices and how arrays are spread over them.
    Mesh,
    /// Output directories, metrics, evaluation, profiling.
    Output,
    /// Generating text.
    Decode,
    /// Fine-tuning.
    FineTuning,
}

impl Category {
    /// Every category in the order of the reference.
    pub const ALL: &'static [Category] = &[
        Category::Model,
        Category::Numerics,
        Category::Memory,
        Category::Run,
        Category::Schedule,
        Category::Optimizer,
        Category::Data,
        Category::Checkpoint,
        Category::Mesh,
        Category::Output,
        Category::Decode,
        Category::FineTuning,
    ];

    /// The section's heading.
    #[must_use]
    pub const fn title(self) -> &'static str {
        match self {
            Category::Model => "Model",
            Category::Numerics => "Numerics",
            Category::Memory => "Attention and memory",
            Category::Run => "Batch, length and steps",
            Category::Schedule => "Learning rate",
            Category::Optimizer => "Optimizer",
            Category::Data => "Data",
            Category::Checkpoint => "Checkpoints",
            Category::Mesh => "Devices and parallelism",
            Category::Output => "Output, metrics, evaluation, profiling",
            Category::Decode => "Generating text",
            Category::FineTuning => "Fine-tuning",
        }
    }
}

/// What a key's value may be.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Kind {
    /// `true` or `false`.
    Bool,
    /// A whole number between two bounds, both included.
    Int {
        /// Smallest accepted value.
        min: i64,
        /// Largest accepted value.
        max: i64,
    },
    /// A number between two bounds.
    Float {
        /// Smallest accepted value.
        min: f64,
        /// Largest accepted value.
        max: f64,
        /// Whether `min` itself is refused.
        above: bool,
    },
    /// Free text.
    Text,
    /// One of some words.
    Choice(&'static [&'static str]),
    /// A list of texts.
    TextList,
    /// A list of logical axes with their mesh axes.
    AxisRules,
}

impl Kind {
    /// The type's name as people read it.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Kind::Bool => "bool",
            Kind::Int { .. } => "int",
            Kind::Float { .. } => "float",
            Kind::Text => "string",
            Kind::Choice(_) => "enum",
            Kind::TextList => "list of strings",
            Kind::AxisRules => "list of rules",
        }
    }
}

/// How a key relates to MaxText's key of the same name.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum MaxText {
    /// Same name, type and default.
    Same,
    /// Same name and type, another default.
    Differs {
        /// MaxText's default.
        default: Literal,
        /// Why this project's differs.
        why: &'static str,
    },
    /// MaxText has no such key.
    Absent,
}

/// Whether a key does anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Support {
    /// It is obeyed.
    Yes,
    /// Only the default is accepted, for this reason.
    OnlyDefault(&'static str),
    /// Any value is accepted and none changes anything, for this reason; setting it leaves a note.
    Inert(&'static str),
}

/// The declaration of one key.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Key {
    /// Its name; groups are joined with a dot (`lora.lora_rank`).
    pub name: &'static str,
    /// Older names that mean the same.
    pub aliases: &'static [&'static str],
    /// Type and range.
    pub kind: Kind,
    /// Whether a text is a path, in which a leading `~/` means the home directory.
    pub is_path: bool,
    /// Whether `null` (or the word `none`) is accepted.
    pub nullable: bool,
    /// The value where no layer gives one.
    pub default: Literal,
    /// Where it is listed.
    pub category: Category,
    /// Relation to MaxText.
    pub maxtext: MaxText,
    /// Whether it is obeyed.
    pub support: Support,
    /// Words that MaxText accepts and this project refuses, with the reason.
    pub refused: &'static [(&'static str, &'static str)],
    /// Other spellings of accepted words: (spelling, word).
    pub synonyms: &'static [(&'static str, &'static str)],
    /// What it does, in a sentence or two.
    pub doc: &'static str,
}

/// Largest accepted size or count: products of three of them fit an `i128`, one fits every index type in use.
const COUNT: i64 = i32::MAX as i64;

impl Key {
    const fn new(name: &'static str, kind: Kind, default: Literal, doc: &'static str) -> Self {
        Key {
            name,
            aliases: &[],
            kind,
            is_path: false,
            nullable: false,
            default,
            category: Category::Model,
            maxtext: MaxText::Same,
            support: Support::Yes,
            refused: &[],
            synonyms: &[],
            doc,
        }
    }

    const fn bool(name: &'static str, default: bool, doc: &'static str) -> Self {
        Key::new(name, Kind::Bool, Literal::Bool(default), doc)
    }

    /// A count or size from 0.
    const fn int(name: &'static str, default: i64, doc: &'static str) -> Self {
        Key::new(name, Kind::Int { min: 0, max: COUNT }, Literal::Int(default), doc)
    }

    /// A number from 0.
    const fn float(name: &'static str, default: f64, doc: &'static str) -> Self {
        Key::new(name, Kind::Float { min: 0.0, max: f64::MAX, above: false }, Literal::Float(default), doc)
    }

    const fn text(name: &'static str, default: &'static str, doc: &'static str) -> Self {
        Key::new(name, Kind::Text, Literal::Text(default), doc)
    }

    const fn path(name: &'static str, default: &'static str, doc: &'static str) -> Self {
        let mut key = Key::text(name, default, doc);
        key.is_path = true;
        key
    }

    const fn choice(
        name: &'static str,
        words: &'static [&'static str],
        default: &'static str,
        doc: &'static str,
    ) -> Self {
        Key::new(name, Kind::Choice(words), Literal::Text(default), doc)
    }

    const fn list(name: &'static str, default: &'static [&'static str], doc: &'static str) -> Self {
        Key::new(name, Kind::TextList, Literal::List(default), doc)
    }

    const fn at_least(mut self, bound: i64) -> Self {
        self.kind = match self.kind {
            Kind::Int { max, .. } => Kind::Int { min: bound, max },
            Kind::Float { max, .. } => Kind::Float { min: bound as f64, max, above: false },
            other => other,
        };
        self
    }

    const fn at_most(mut self, bound: i64) -> Self {
        self.kind = match self.kind {
            Kind::Int { min, .. } => Kind::Int { min, max: bound },
            Kind::Float { min, above, .. } => Kind::Float { min, max: bound as f64, above },
            other => other,
        };
        self
    }

    /// Refuses the lower bound of a float itself.
    const fn positive(mut self) -> Self {
        if let Kind::Float { max, .. } = self.kind {
            self.kind = Kind::Float { min: 0.0, max, above: true };
        }
        self
    }

    /// Bounds a share from above.
    const fn at_most_one(self) -> Self {
        self.at_most(1)
    }

    /// Accepts `null`, which is also the default.
    const fn or_null(mut self) -> Self {
        self.nullable = true;
        self.default = Literal::Null;
        self
    }

    const fn with_default(mut self, default: Literal) -> Self {
        self.default = default;
        self
    }

    const fn alias(mut self, aliases: &'static [&'static str]) -> Self {
        self.aliases = aliases;
        self
    }

    const fn refuse(mut self, refused: &'static [(&'static str, &'static str)]) -> Self {
        self.refused = refused;
        self
    }

    const fn synonym(mut self, synonyms: &'static [(&'static str, &'static str)]) -> Self {
        self.synonyms = synonyms;
        self
    }

    const fn differs(mut self, default: Literal, why: &'static str) -> Self {
        self.maxtext = MaxText::Differs { default, why };
        self
    }

    const fn own(mut self) -> Self {
        self.maxtext = MaxText::Absent;
        self
    }

    const fn only(mut self, reason: &'static str) -> Self {
        self.support = Support::OnlyDefault(reason);
        self
    }

    const fn inert(mut self, reason: &'static str) -> Self {
        self.support = Support::Inert(reason);
        self
    }

    /// The default as a value.
    #[must_use]
    pub fn default_value(&self) -> Value {
        self.default.into()
    }

    /// The environment variable that sets the key, without regard to whether the tool reserves it.
    #[must_use]
    pub fn variable(&self) -> String {
        format!("{ENVIRONMENT_PREFIX}{}", self.name.replace('.', "__").to_ascii_uppercase())
    }

    /// Type, range and words in one phrase.
    #[must_use]
    pub fn type_phrase(&self) -> String {
        let base = match self.kind {
            Kind::Int { min, max } if max >= COUNT => format!("int >= {min}"),
            Kind::Int { min, max } => format!("int from {min} to {max}"),
            Kind::Float { min, max, above } => match (min == f64::MIN, max == f64::MAX) {
                (true, _) => "float".to_owned(),
                (false, true) => format!("float {} {min}", if above { ">" } else { ">=" }),
                (false, false) => format!("float {} {min}, <= {max}", if above { ">" } else { ">=" }),
            },
            Kind::Choice(words) => {
                format!("one of {}", words.iter().map(|w| Value::from(*w).to_string()).collect::<Vec<_>>().join(", "))
            }
            Kind::Text if self.is_path => "path".to_owned(),
            kind => kind.name().to_owned(),
        };
        if self.nullable { format!("{base}, or null") } else { base }
    }
}

/// Puts every key of a table into one category.
const fn within<const N: usize>(category: Category, mut keys: [Key; N]) -> [Key; N] {
    let mut i = 0;
    while i < N {
        keys[i].category = category;
        i += 1;
    }
    keys
}

/// Prefix of the environment variables that set keys.
pub const ENVIRONMENT_PREFIX: &str = "LAPIDARY_";

/// Environment variables that carry the prefix but are read by the tool itself, not as keys.
pub const RESERVED_VARIABLES: &[(&str, &str)] = &[
    ("LAPIDARY_PJRT_PLUGIN", "path of the PJRT plugin to load"),
    ("LAPIDARY_CACHE_DIR", "directory for fetched plugins and compiled programs"),
    ("LAPIDARY_GOLDEN_DIR", "directory of a larger set of golden cases, for the tests"),
    ("LAPIDARY_TOKENIZER_DIR", "directory with Gemma 4's tokenizer.json, for the tests of known tokens"),
    ("LAPIDARY_OFFLINE", "when 1, nothing is downloaded"),
    ("LAPIDARY_LOG", "which log lines are shown"),
];

/// Every axis of MaxText's mesh. Those that are not offered have one device, so that rules may name them.
pub const MESH_AXES: &[&str] = &[
    "diloco",
    "data",
    "stage",
    "fsdp",
    "fsdp_transpose",
    "context",
    "context_usp_ulysses",
    "context_autoregressive",
    "tensor",
    "tensor_sequence",
    "expert",
    "autoregressive",
];

/// The tables, in the order of the reference.
const TABLES: &[&[Key]] = &[
    model::KEYS,
    numerics::KEYS,
    numerics::MEMORY,
    run::KEYS,
    optimizer::SCHEDULE,
    optimizer::KEYS,
    data::KEYS,
    checkpoint::KEYS,
    mesh::KEYS,
    output::KEYS,
    decode::KEYS,
    decode::FINE_TUNING,
];

/// Every declared key, in the order of the reference.
pub fn all() -> impl Iterator<Item = &'static Key> {
    TABLES.iter().flat_map(|table| table.iter())
}

/// The key of a name or an alias.
#[must_use]
pub fn find(name: &str) -> Option<&'static Key> {
    all().find(|key| key.name == name || key.aliases.contains(&name))
}

/// Names that are computed from other keys, or belong to other systems, with the key to set instead.
///
/// MaxText overwrites the first group silently, which builds another model than the one asked for.
pub const COMPUTED: &[(&str, &str, &str)] = &[
    ("emb_dim", "base_emb_dim", COMPUTED_BY_SCALE),
    ("num_decoder_layers", "base_num_decoder_layers", COMPUTED_BY_SCALE),
    ("mlp_dim", "base_mlp_dim", COMPUTED_BY_SCALE),
    ("num_query_heads", "base_num_query_heads", COMPUTED_BY_SCALE),
    ("num_kv_heads", "base_num_kv_heads", COMPUTED_BY_SCALE),
    ("global_batch_size_to_train_on", "per_device_batch_size", COMPUTED_BY_BATCH),
    ("global_batch_size_to_load", "per_device_batch_size", COMPUTED_BY_BATCH),
    ("global_batch_size_to_eval_on", "eval_per_device_batch_size", COMPUTED_BY_BATCH),
    ("global_batch_size_to_load_eval", "eval_per_device_batch_size", COMPUTED_BY_BATCH),
    ("micro_batch_size_to_train_on", "per_device_batch_size", COMPUTED_BY_BATCH),
    ("micro_batch_size_to_eval_on", "eval_per_device_batch_size", COMPUTED_BY_BATCH),
    ("num_target_devices", "hardware", "it is the number of devices found"),
    ("checkpoint_dir", "base_output_directory", COMPUTED_BY_OUTPUT),
    ("metrics_dir", "base_output_directory", COMPUTED_BY_OUTPUT),
    ("tensorboard_dir", "base_output_directory", COMPUTED_BY_OUTPUT),
    ("hidden_size", "base_emb_dim", HF_NAME),
    ("num_hidden_layers", "base_num_decoder_layers", HF_NAME),
    ("intermediate_size", "base_mlp_dim", HF_NAME),
    ("num_attention_heads", "base_num_query_heads", HF_NAME),
    ("num_key_value_heads", "base_num_kv_heads", HF_NAME),
    ("sliding_window", "sliding_window_size", HF_NAME),
    ("rms_norm_eps", "normalization_layer_epsilon", HF_NAME),
    ("final_logit_softcapping", "final_logits_soft_cap", HF_NAME),
    ("tie_word_embeddings", "logits_via_embedding", HF_NAME),
    ("layer_types", "sliding_window_pattern", HF_NAME),
];

const COMPUTED_BY_SCALE: &str = "it is computed from the base key and global_parameter_scale";
const COMPUTED_BY_BATCH: &str = "it is computed from the batch per device, the devices and gradient accumulation";
const COMPUTED_BY_OUTPUT: &str = "it is computed from base_output_directory and run_name";
const HF_NAME: &str = "it is Hugging Face's name for another key";

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::coerce::{check, from_json};

    #[test]
    fn names_are_unique_over_all_tables() {
        let mut seen = BTreeSet::new();
        let unsupported = unsupported::GROUPS.iter().flat_map(|g| g.keys.iter().map(|(name, _)| *name));
        let names = all().flat_map(|k| std::iter::once(k.name).chain(k.aliases.iter().copied()));
        for name in names.chain(unsupported).chain(COMPUTED.iter().map(|(name, ..)| *name)) {
            assert!(seen.insert(name), "{name} is declared twice");
        }
        assert!(all().count() > 140, "{}", all().count());
    }

    #[test]
    fn every_default_passes_its_own_check() {
        for key in all() {
            let json = serde_json::to_value(key.default_value()).unwrap();
            assert_eq!(from_json(key, &json), Ok(key.default_value()), "{}", key.name);
            assert_eq!(check(key, key.default_value()), Ok(key.default_value()), "{}", key.name);
        }
    }

    #[test]
    fn every_key_is_documented() {
        for key in all() {
            assert!(key.doc.ends_with('.') && key.doc.len() > 15, "{}: {:?}", key.name, key.doc);
            assert!(key.doc.chars().next().is_some_and(char::is_uppercase), "{}: {:?}", key.name, key.doc);
        }
    }

    #[test]
    fn computed_names_point_at_keys() {
        for (name, instead, _) in COMPUTED {
            assert!(find(instead).is_some(), "{name} points at {instead}");
        }
    }

    #[test]
    fn refused_words_and_synonyms_are_consistent() {
        for key in all() {
            let Kind::Choice(words) = key.kind else {
                assert!(key.refused.is_empty() && key.synonyms.is_empty(), "{}", key.name);
                continue;
            };
            assert!(key.refused.iter().all(|(word, _)| !words.contains(word)), "{}", key.name);
            assert!(key.synonyms.iter().all(|(_, word)| words.contains(word)), "{}", key.name);
        }
    }

    #[test]
    fn variables_are_distinct() {
        let variables: BTreeSet<String> = all().map(Key::variable).collect();
        assert_eq!(variables.len(), all().count());
        assert_eq!(find("lora.lora_rank").unwrap().variable(), "LAPIDARY_LORA__LORA_RANK");
    }
}
