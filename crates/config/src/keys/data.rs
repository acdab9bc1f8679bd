//! Training and evaluation text.

use super::{Category, Key, within};
use crate::choice::{DatasetKind, PackingKind};
use crate::value::Literal;

const PIPELINE: &str = "that input pipeline is not part of this project; convert the data to JSON lines or Parquet and \
                        use `dataset_type=hf`";

pub(super) const KEYS: &[Key] = &within(
    Category::Data,
    [
        Key::choice(
            "dataset_type",
            DatasetKind::WORDS,
            "synthetic",
            "Where training text comes from: `synthetic` repeats one random batch, `hf` reads local files.",
        )
        .differs(Literal::Text("tfds"), "TensorFlow Datasets is not read here")
        .refuse(&[("tfds", PIPELINE), ("grain", PIPELINE), ("c4_mlperf", PIPELINE), ("olmo_grain", PIPELINE)]),
        Key::path(
            "hf_path",
            "",
            "A data set directory, or the format of the files: `json`, `text` or `parquet`. Required by \
             `dataset_type=hf`.",
        ),
        Key::text("hf_name", "", "Configuration (subset) of the data set."),
        Key::path("hf_data_dir", "", "Subdirectory of the data set to read."),
        Key::path("hf_train_files", "", "Files to train on; a pattern with `*` is expanded."),
        Key::text("hf_eval_split", "", "Split of the data set to evaluate on."),
        Key::path("hf_eval_files", "", "Files to evaluate on; a pattern with `*` is expanded."),
        Key::text("train_split", "train", "Split of the data set to train on."),
        Key::list("train_data_columns", &["text"], "Columns (JSON fields) that hold the training text."),
        Key::list("eval_data_columns", &["text"], "Columns (JSON fields) that hold the evaluation text."),
        Key::path(
            "tokenizer_path",
            "",
            "A tokenizer.json, or a directory that holds one; empty means the checkpoint's own. The word `bytes` means \
             the built-in tokenizer: one token a byte, for any vocabulary of at least 260.",
        ),
        Key::choice("tokenizer_type", &["huggingface"], "huggingface", "Format of the tokenizer.")
            .differs(Literal::Text("sentencepiece"), "the models' own tokenizer files are in Hugging Face's format")
            .refuse(&[
                ("sentencepiece", "only tokenizer.json is read; every Gemma 4 checkpoint brings one"),
                ("tiktoken", "only tokenizer.json is read; every Gemma 4 checkpoint brings one"),
            ]),
        Key::bool("tokenize_train_data", true, "Tokenizes the training text; false expects columns of token ids."),
        Key::bool("tokenize_eval_data", true, "Tokenizes the evaluation text; false expects columns of token ids."),
        Key::bool("add_bos", true, "Puts the start token before each document."),
        Key::bool("add_eos", true, "Puts the end token behind each document."),
        Key::bool("use_truncation", true, "Cuts documents that are longer than a sequence; false splits them."),
        Key::bool("packing", true, "Fills a sequence with several documents, which do not see each other."),
        Key::choice(
            "grain_packing_type",
            PackingKind::WORDS,
            "first_fit",
            "How documents are packed: `first_fit` keeps those that fit in a sequence whole, `concat_then_split` leaves \
             no place empty and cuts where a sequence ends.",
        )
        .refuse(&[("best_fit", "use `first_fit`, which keeps many sequences open and wastes about as little")]),
        Key::int("num_epoch", 1, "Passes over the training text.").at_least(1),
        Key::bool("enable_data_shuffling", true, "Shuffles the training text."),
        Key::int("data_shuffle_seed", 0, "Seed of the shuffle."),
        Key::int("max_corpus_chars", 10_000_000, "Characters read when a tokenizer is trained.")
            .inert("no tokenizer is trained here"),
        Key::bool(
            "generate_padding_batch_train",
            false,
            "Goes on with empty batches when the training text ends before the last step.",
        ),
        Key::bool("generate_padding_batch_eval", false, "Fills the last evaluation round with empty batches."),
        Key::bool(
            "abort_on_bad_data",
            false,
            "Stops at the first document that cannot be used (damaged JSON, a missing column, invalid UTF-8); false \
             counts and reports them.",
        )
        .own(),
        Key::text("hf_access_token", "", "Token for downloads from the model hub.")
            .only("nothing is downloaded from the hub; give local files"),
    ],
);
