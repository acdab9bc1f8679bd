//! From text to token ids and back.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::{DataError, Result};

/// The word that names the built-in tokenizer where a path is expected.
pub const BYTES: &str = "bytes";

/// Ids of the built-in tokenizer below those of bytes, as Gemma's: padding, end, start, unknown.
const BYTE_OFFSET: u32 = 4;

/// Tokens of the built-in tokenizer: four special ones and a byte each.
pub const BYTES_VOCAB_SIZE: usize = 260;

/// A tokenizer with its special tokens.
#[derive(Debug)]
pub struct Tokenizer {
    kind: Kind,
    /// Token before a document, if there is one.
    pub bos: Option<u32>,
    /// Token behind a document, if there is one.
    pub eos: Option<u32>,
    /// Token of padding, if there is one.
    pub pad: Option<u32>,
    /// What `add_bos_token` of tokenizer_config.json says, if anything.
    pub add_bos: Option<bool>,
    name: String,
    fingerprint: String,
    largest_id: u32,
}

#[derive(Debug)]
enum Kind {
    Bytes,
    HuggingFace(Box<tokenizers::Tokenizer>),
}

/// Byte pair encoding, as Gemma's.
type PairEncoding = tokenizers::TokenizerImpl<
    tokenizers::models::bpe::BPE,
    tokenizers::NormalizerWrapper,
    tokenizers::PreTokenizerWrapper,
    tokenizers::PostProcessorWrapper,
    tokenizers::DecoderWrapper,
>;

/// Reads a tokenizer.json. Where any model may stand, the library reads the model's half million entries into a tree of JSON values
/// first, and copies that twice; asked for the kind that Gemma has, it reads them straight.
fn parse(bytes: &[u8]) -> tokenizers::Result<tokenizers::Tokenizer> {
    match serde_json::from_slice::<PairEncoding>(bytes) {
        Ok(tokenizer) => Ok(tokenizer.into()),
        Err(_) => tokenizers::Tokenizer::from_bytes(bytes),
    }
}

/// The largest id of the vocabulary, added tokens included.
fn largest_id(tokenizer: &tokenizers::Tokenizer) -> Option<u32> {
    let size = u32::try_from(tokenizer.get_vocab_size(true)).ok()?;
    // Ids are usually counted through, which is seen without copying the vocabulary.
    match (0..size).all(|id| tokenizer.id_to_token(id).is_some()) {
        true => size.checked_sub(1),
        false => tokenizer.get_vocab(true).into_values().max(),
    }
}

impl Tokenizer {
    /// The built-in tokenizer: byte `b` is token `4 + b`; 0 is padding, 1 the end, 2 the start, 3 unused (Gemma's
    /// unknown). It fits any vocabulary of at least 260 and is meant for tests and first steps.
    #[must_use]
    pub fn bytes() -> Self {
        Tokenizer {
            kind: Kind::Bytes,
            bos: Some(2),
            eos: Some(1),
            pad: Some(0),
            add_bos: None,
            name: BYTES.to_owned(),
            fingerprint: BYTES.to_owned(),
            largest_id: BYTES_VOCAB_SIZE as u32 - 1,
        }
    }

    /// Opens the tokenizer that `tokenizer_path` names: the word `bytes`, a tokenizer.json, or a directory with one; if
    /// it is empty, that of the model.
    ///
    /// # Errors
    /// When there is none, or it is damaged.
    pub fn open(tokenizer_path: &str, model: Option<&Path>) -> Result<Self> {
        match (tokenizer_path, model) {
            (BYTES, _) => Ok(Tokenizer::bytes()),
            ("", None) => {
                let reason = "there is no tokenizer: give a tokenizer.json or a directory with one, or `bytes`";
                Err(DataError::Key { key: "tokenizer_path", reason: reason.to_owned() })
            }
            ("", Some(path)) => Self::from_path(path),
            (path, _) => Self::from_path(Path::new(path)),
        }
    }

    /// Opens a tokenizer.json, or that of a directory.
    ///
    /// The special tokens are those of `tokenizer_config.json` beside it; without one, `<bos>`, `<eos>` and `<pad>` where
    /// the vocabulary has them.
    ///
    /// # Errors
    /// When there is none, or it is damaged.
    pub fn from_path(path: &Path) -> Result<Self> {
        let file = if path.is_dir() { path.join("tokenizer.json") } else { path.to_owned() };
        let wrong = |reason: String| DataError::File { path: file.clone(), reason };
        if !file.exists() {
            let other = file.with_file_name("tokenizer.model");
            return Err(wrong(if other.exists() {
                "there is no tokenizer.json, only a SentencePiece model, which is not read".to_owned()
            } else {
                "there is no such file; name a tokenizer.json with `tokenizer_path`, or use `tokenizer_path=bytes`"
                    .to_owned()
            }));
        }
        let bytes = fs_err::read(&file)?;
        let mut inner = parse(&bytes).map_err(|e| wrong(format!("no tokenizer: {e}")))?;
        // Both are settings of whoever saved the file; documents are cut and filled up here.
        inner.with_truncation(None).map_err(|e| wrong(format!("no tokenizer: {e}")))?;
        inner.with_padding(None);
        let special = SpecialTokens::beside(&file)?;
        let id = |names: &Option<String>, usual: &str| inner.token_to_id(names.as_deref().unwrap_or(usual));
        let (bos, eos, pad) = (id(&special.bos, "<bos>"), id(&special.eos, "<eos>"), id(&special.pad, "<pad>"));
        let largest_id = largest_id(&inner).ok_or_else(|| wrong("it has no token".to_owned()))?;
        let fingerprint = format!("crc32c {:08x}, bos {bos:?}, eos {eos:?}, pad {pad:?}", crc32c::crc32c(&bytes));
        let name = file.display().to_string();
        let (kind, add_bos) = (Kind::HuggingFace(Box::new(inner)), special.add_bos);
        Ok(Tokenizer { kind, bos, eos, pad, add_bos, name, fingerprint, largest_id })
    }

    /// Its file, or `bytes`.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The largest id it can give.
    #[must_use]
    pub fn largest_id(&self) -> u32 {
        self.largest_id
    }

    /// Id of a special token by its text.
    #[must_use]
    pub fn special_id(&self, token: &str) -> Option<u32> {
        match &self.kind {
            Kind::Bytes => None,
            Kind::HuggingFace(inner) => inner.token_to_id(token).filter(|id| self.is_special(*id)),
        }
    }

    /// Whether an id is a special token, which text does not show.
    #[must_use]
    pub fn is_special(&self, id: u32) -> bool {
        match &self.kind {
            Kind::Bytes => id < BYTE_OFFSET,
            Kind::HuggingFace(inner) => {
                inner.get_added_vocabulary().get_added_tokens_decoder().get(&id).is_some_and(|token| token.special)
            }
        }
    }

    /// The text of a token as the vocabulary has it, `▁` for a space and all.
    #[must_use]
    pub fn token(&self, id: u32) -> Option<String> {
        match &self.kind {
            Kind::Bytes => None,
            Kind::HuggingFace(inner) => inner.id_to_token(id),
        }
    }

    /// The byte that a token stands for, if it stands for a byte: text beyond the vocabulary is written in such tokens.
    #[must_use]
    pub fn byte(&self, id: u32) -> Option<u8> {
        match &self.kind {
            Kind::Bytes => id.checked_sub(BYTE_OFFSET).and_then(|byte| u8::try_from(byte).ok()),
            Kind::HuggingFace(inner) => {
                let falls_back = match inner.get_model() {
                    tokenizers::ModelWrapper::BPE(bpe) => bpe.byte_fallback,
                    tokenizers::ModelWrapper::Unigram(unigram) => unigram.byte_fallback(),
                    _ => false,
                };
                let token = inner.id_to_token(id).filter(|_| falls_back)?;
                let digits = token.strip_prefix("<0x")?.strip_suffix('>').filter(|digits| digits.len() == 2)?;
                u8::from_str_radix(digits, 16).ok()
            }
        }
    }

    /// What tells it from another tokenizer.
    pub(super) fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// Token ids of a text, without the start and end tokens that belong to a document. Special tokens written out in
    /// the text become those tokens, as in Hugging Face's libraries.
    ///
    /// # Errors
    /// What the tokenizer says.
    pub fn encode(&self, text: &str) -> std::result::Result<Vec<u32>, String> {
        match &self.kind {
            Kind::Bytes => Ok(text.bytes().map(|byte| BYTE_OFFSET + u32::from(byte)).collect()),
            Kind::HuggingFace(inner) => match inner.encode_fast(text, false) {
                Ok(encoding) => Ok(encoding.get_ids().to_vec()),
                Err(error) => Err(format!("it cannot be tokenized: {error}")),
            },
        }
    }

    /// Text of token ids, special tokens left out; bytes that are no UTF-8 become replacement characters.
    ///
    /// # Errors
    /// What the tokenizer says.
    pub fn decode(&self, ids: &[u32]) -> std::result::Result<String, String> {
        match &self.kind {
            Kind::Bytes => {
                let byte = |id: &u32| id.checked_sub(BYTE_OFFSET).and_then(|byte| u8::try_from(byte).ok());
                let bytes: Vec<u8> = ids.iter().filter_map(byte).collect();
                Ok(String::from_utf8_lossy(&bytes).into_owned())
            }
            Kind::HuggingFace(inner) => inner.decode(ids, true).map_err(|e| format!("it cannot be decoded: {e}")),
        }
    }
}

/// Names of the special tokens in a `tokenizer_config.json`.
#[derive(Debug, Default)]
struct SpecialTokens {
    bos: Option<String>,
    eos: Option<String>,
    pad: Option<String>,
    add_bos: Option<bool>,
}

impl SpecialTokens {
    fn beside(tokenizer: &Path) -> Result<Self> {
        let path: PathBuf = tokenizer.with_file_name("tokenizer_config.json");
        if !path.exists() {
            return Ok(SpecialTokens::default());
        }
        let json: Value = serde_json::from_slice(&fs_err::read(&path)?)
            .map_err(|e| DataError::File { path: path.clone(), reason: format!("no JSON: {e}") })?;
        let token = |key: &str| {
            let value = json.get(key)?;
            // Either the token, or an object that describes it.
            value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_owned)
        };
        let add_bos = json.get("add_bos_token").and_then(Value::as_bool);
        Ok(SpecialTokens { bos: token("bos_token"), eos: token("eos_token"), pad: token("pad_token"), add_bos })
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A tokenizer of single words, with Gemma's special tokens.
    pub(in super::super) const WORDS: &str = r#"{"version": "1.0",
        "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0,
            "pad_type_id": 0, "pad_token": "<pad>"},
        "added_tokens": [
            {"id": 0, "content": "<pad>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true},
            {"id": 1, "content": "<eos>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true},
            {"id": 2, "content": "<bos>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}],
        "normalizer": null, "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<bos>": {"id": "<bos>", "ids": [2], "tokens": ["<bos>"]}}},
        "decoder": null,
        "model": {"type": "WordLevel", "unk_token": "<unk>",
            "vocab": {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "red": 4, "green": 5, "blue": 6}}}"#;

    #[test]
    fn bytes_come_back() {
        let t = Tokenizer::bytes();
        assert_eq!((t.pad, t.eos, t.bos), (Some(0), Some(1), Some(2)));
        assert_eq!(t.encode("A\0é").unwrap(), [69, 4, 4 + 0xC3, 4 + 0xA9]);
        let all = "naïve 😀\n";
        let mut ids = t.encode(all).unwrap();
        assert!(ids.iter().all(|id| *id <= t.largest_id()));
        ids.insert(0, 2);
        ids.push(1);
        assert_eq!(t.decode(&ids).unwrap(), all);
        assert_eq!(t.decode(&[4 + 0xC3, 999]).unwrap(), "\u{fffd}");
    }

    /// Read straight or by way of any model: the same tokenizer. Merges in both spellings.
    #[test]
    fn pair_encodings_are_read_as_the_library_reads_them() {
        let pairs = [r#"["a", "b"], ["ab", "c"]"#, r#""a b", "ab c""#];
        for merges in pairs {
            let model = format!(
                r#""model": {{"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
                "vocab": {{"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "a": 4, "b": 5, "c": 6, "ab": 7, "abc": 9}},
                "merges": [{merges}]}}}}"#
            );
            let text = WORDS.split("\"model\"").next().unwrap().to_owned() + &model;
            let (mut ours, theirs) =
                (parse(text.as_bytes()).unwrap(), tokenizers::Tokenizer::from_bytes(&text).unwrap());
            assert!(serde_json::from_str::<PairEncoding>(&text).is_ok(), "by the short way");
            assert_eq!(ours.to_string(false).unwrap(), theirs.to_string(false).unwrap());
            ours.with_truncation(None).unwrap();
            ours.with_padding(None);
            assert_eq!(ours.encode("abcab", true).unwrap().get_ids(), [2, 9, 7]);
            assert_eq!(largest_id(&ours), Some(9), "an id is left out");
        }
        let broken = WORDS.replace("WordLevel", "BPE");
        let error = parse(broken.as_bytes()).unwrap_err().to_string();
        assert_eq!(error, tokenizers::Tokenizer::from_bytes(&broken).unwrap_err().to_string());
    }

    #[test]
    fn files_are_read_without_their_own_cutting_and_filling() {
        let dir = tempfile::tempdir().unwrap();
        fs_err::write(dir.path().join("tokenizer.json"), WORDS).unwrap();
        let t = Tokenizer::open("", Some(dir.path())).unwrap();
        assert_eq!((t.pad, t.eos, t.bos, t.largest_id()), (Some(0), Some(1), Some(2), 6));
        assert_eq!(t.encode("red green blue white").unwrap(), [4, 5, 6, 3]);
        assert_eq!(t.encode("<bos> red<eos>").unwrap(), [2, 4, 1]);
        assert_eq!(t.decode(&[2, 4, 6, 1]).unwrap(), "red blue");
        let file = dir.path().join("tokenizer.json");
        assert_eq!(Tokenizer::open(file.to_str().unwrap(), None).unwrap().largest_id(), 6);
        // The configuration beside it has the last word.
        let config = r#"{"bos_token": {"content": "red"}, "eos_token": "green", "pad_token": null}"#;
        fs_err::write(dir.path().join("tokenizer_config.json"), config).unwrap();
        let other = Tokenizer::open("", Some(&file)).unwrap();
        assert_eq!((other.pad, other.eos, other.bos), (Some(0), Some(5), Some(4)));
        assert_ne!(other.fingerprint(), t.fingerprint());
        fs_err::write(dir.path().join("tokenizer_config.json"), "{").unwrap();
        assert!(Tokenizer::open("", Some(&file)).unwrap_err().to_string().contains("tokenizer_config.json"));
    }

    #[test]
    fn what_is_missing_or_damaged_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let error = |path: &str, model: Option<&Path>| Tokenizer::open(path, model).unwrap_err().to_string();
        assert!(error("", None).contains("tokenizer_path"));
        assert!(error("", Some(dir.path())).contains("no such file"));
        fs_err::write(dir.path().join("tokenizer.model"), "x").unwrap();
        assert!(error("", Some(dir.path())).contains("SentencePiece"));
        for content in ["", "{", "[]", "{\"model\": {}}", r#"{"version": "1.0", "model": {"type": "BPE", "vocab": 3}}"#]
        {
            fs_err::write(dir.path().join("tokenizer.json"), content).unwrap();
            assert!(error("", Some(dir.path())).contains("no tokenizer"), "{content}");
        }
    }
}
