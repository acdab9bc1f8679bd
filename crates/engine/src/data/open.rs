//! From a configuration to a source.

use std::path::Path;

use config::{Config, DatasetKind};

use super::files::{self, Format, Request};
use super::index::Index;
use super::text::{Ending, Settings, TextSource};
use super::{BatchSource, DataError, Result, Synthetic, Tokenizer};

/// Which part of the data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    Train,
    Eval,
}

/// Opens a part of the data that a configuration names.
pub(super) fn open(
    config: &Config,
    part: Part,
    vocab_size: usize,
    model_tokenizer: Option<&Path>,
    rows: usize,
) -> Result<Box<dyn BatchSource>> {
    let seq = config.run.max_target_length;
    super::check_sizes(vocab_size, rows, seq)?;
    match config.data.dataset_type {
        DatasetKind::Synthetic => Ok(Box::new(Synthetic::new(rows, seq, vocab_size))),
        DatasetKind::Hf => Ok(Box::new(text_source(config, part, vocab_size, model_tokenizer, rows)?)),
    }
}

/// Opens files of documents.
pub(super) fn text_source(
    config: &Config,
    part: Part,
    vocab_size: usize,
    model_tokenizer: Option<&Path>,
    rows: usize,
) -> Result<TextSource> {
    if config.sft.enable {
        let reason = "conversations are not read yet in this version; train on text without it".to_owned();
        return Err(DataError::Key { key: "use_sft", reason });
    }
    let settings = settings(config, part, vocab_size, rows);
    if settings.seq == 1 && settings.truncate {
        let reason = "documents cut to one token leave nothing to predict; use `use_truncation=false`".to_owned();
        return Err(DataError::Key { key: "max_target_length", reason });
    }
    let files = files::find(&request(config, part)?)?;
    let is_lines = files.iter().all(|file| file.format == Format::Text);
    if is_lines && settings.is_text && settings.columns != ["text"] {
        let key = if part == Part::Train { "train_data_columns" } else { "eval_data_columns" };
        let reason = format!("a text file has only the column `text`, not {}", settings.columns.join(", "));
        return Err(DataError::Key { key, reason });
    }
    let tokenizer = tokenizer(config, &settings, model_tokenizer)?;
    let index = Index::build(&files, &settings.columns)?;
    TextSource::new(settings, tokenizer, index)
}

fn settings(config: &Config, part: Part, vocab_size: usize, rows: usize) -> Settings {
    let data = &config.data;
    let is_train = part == Part::Train;
    Settings {
        rows,
        seq: config.run.max_target_length,
        vocab_size,
        columns: if is_train { &data.train_data_columns } else { &data.eval_data_columns }.clone(),
        is_text: if is_train { data.tokenize_train_data } else { data.tokenize_eval_data },
        add_bos: data.add_bos,
        add_eos: data.add_eos,
        truncate: data.use_truncation,
        packing: data.packing.then_some(data.packing_kind),
        max_segments: config.memory.max_segments_per_seq,
        shuffle: (is_train && data.enable_data_shuffling).then_some(data.data_shuffle_seed),
        epochs: if is_train { data.num_epoch as u64 } else { 1 },
        ending: match part {
            Part::Train if data.generate_padding_batch_train => Ending::Endless,
            Part::Train => Ending::Drop,
            // An empty row weighs nothing; a text left out would change the result.
            Part::Eval => Ending::Pad,
        },
        abort_on_bad: data.abort_on_bad_data,
        // One host reads everything.
        shard: (0, 1),
    }
}

fn request(config: &Config, part: Part) -> Result<Request<'_>> {
    let data = &config.data;
    let (files, files_key, split, split_key) = match part {
        Part::Train => (&data.hf_train_files, "hf_train_files", &data.train_split, "train_split"),
        Part::Eval => (&data.hf_eval_files, "hf_eval_files", &data.hf_eval_split, "hf_eval_split"),
    };
    if part == Part::Eval && files.is_empty() && split.is_empty() {
        let reason = "there is no text to evaluate on: give `hf_eval_split` or `hf_eval_files`".to_owned();
        return Err(DataError::Key { key: "eval_interval", reason });
    }
    let (hf_path, name, data_dir) = (&data.hf_path, &data.hf_name, &data.hf_data_dir);
    Ok(Request { hf_path, name, data_dir, files, files_key, split, split_key })
}

/// The tokenizer, checked against the vocabulary and what is asked of it. Token ids need none but for its special
/// tokens; without one those are Gemma's.
fn tokenizer(config: &Config, settings: &Settings, model_tokenizer: Option<&Path>) -> Result<Tokenizer> {
    let path = &config.data.tokenizer_path;
    if !settings.is_text && path.is_empty() && model_tokenizer.is_none() {
        return Ok(Tokenizer::bytes());
    }
    let tokenizer = Tokenizer::open(path, model_tokenizer)?;
    for (key, is_wanted, token) in
        [("add_bos", settings.add_bos, tokenizer.bos), ("add_eos", settings.add_eos, tokenizer.eos)]
    {
        if is_wanted && token.is_none() {
            let reason = format!("the tokenizer {} has no such token; use `{key}=false`", tokenizer.name());
            return Err(DataError::Key { key, reason });
        }
    }
    let largest = if settings.is_text {
        Some(tokenizer.largest_id())
    } else {
        [tokenizer.bos, tokenizer.eos, tokenizer.pad].into_iter().flatten().max()
    };
    if let Some(id) = largest
        && id as usize >= settings.vocab_size
    {
        let at = format!("the tokenizer {}", tokenizer.name());
        return Err(DataError::Vocabulary { at, id: i64::from(id), vocab_size: settings.vocab_size });
    }
    Ok(tokenizer)
}
