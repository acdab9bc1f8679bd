//! What a checkpoint says about generation: generation_config.json and the ids that end a text.

use std::path::Path;

use serde_json::{Map, Value};

use super::{GenerateError, Sampling};
use crate::data::Tokenizer;

/// Tokens that end an answer of an instruction-tuned model: end of text, end of turn, and the place where a tool's result
/// goes. Files that were saved again often name fewer.
const CHAT_ENDS: [&str; 3] = ["<eos>", "<turn|>", "<|tool_response>"];

/// Settings that change what transformers generates and have no counterpart here, with the values that mean nothing.
const IGNORED: [(&str, f64); 8] = [
    ("num_beams", 1.0),
    ("no_repeat_ngram_size", 0.0),
    ("encoder_repetition_penalty", 1.0),
    ("typical_p", 1.0),
    ("epsilon_cutoff", 0.0),
    ("eta_cutoff", 0.0),
    ("penalty_alpha", 0.0),
    ("min_new_tokens", 0.0),
];

/// What a checkpoint says about generation.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GenerationConfig {
    /// Whether tokens are drawn.
    pub do_sample: Option<bool>,
    /// See [`Sampling`].
    pub temperature: Option<f32>,
    /// See [`Sampling`].
    pub top_k: Option<usize>,
    /// See [`Sampling`].
    pub top_p: Option<f32>,
    /// See [`Sampling`].
    pub min_p: Option<f32>,
    /// See [`Sampling`].
    pub repetition_penalty: Option<f32>,
    /// See [`Sampling`].
    pub suppress_tokens: Vec<i32>,
    /// Most tokens to generate.
    pub max_new_tokens: Option<usize>,
    /// Tokens that end a text: those of generation_config.json and of config.json together.
    pub eos: Vec<i32>,
    /// Most tokens of a sequence that the model was made for.
    pub max_positions: Option<usize>,
    /// Settings of the file that have no effect here.
    pub ignored: Vec<String>,
}

impl GenerationConfig {
    /// What the two files of a checkpoint say; an absent generation_config.json says nothing.
    ///
    /// # Errors
    /// When a setting is not what it should be.
    pub fn new(generation: Option<&Value>, config: &Value) -> Result<Self, GenerateError> {
        let mut out = GenerationConfig::default();
        if let Some(json) = generation {
            let wrong = |reason| file_error(Path::new("generation_config.json"), reason);
            let map = json.as_object().ok_or_else(|| wrong("it is not a JSON object".to_owned()))?;
            out.read_settings(map).map_err(wrong)?;
        }
        for object in [Some(config), config.get("text_config")].into_iter().flatten() {
            if let Some(eos) = object.get("eos_token_id") {
                out.add_eos(eos).map_err(|reason| file_error(Path::new("config.json"), reason))?;
            }
            let positions = object.get("max_position_embeddings").and_then(Value::as_u64);
            out.max_positions = out.max_positions.or(positions.and_then(|n| usize::try_from(n).ok()));
        }
        Ok(out)
    }

    fn read_settings(&mut self, json: &Map<String, Value>) -> Result<(), String> {
        let present = |key: &str| json.get(key).filter(|v| !v.is_null());
        let number = |key: &str| {
            present(key).map(|v| v.as_f64().ok_or_else(|| format!("`{key}` is {v}, not a number"))).transpose()
        };
        let count = |key: &str| {
            let read = |v: &Value| v.as_u64().and_then(|n| usize::try_from(n).ok());
            present(key).map(|v| read(v).ok_or_else(|| format!("`{key}` is {v}, not a count"))).transpose()
        };
        self.do_sample = present("do_sample")
            .map(|v| v.as_bool().ok_or_else(|| format!("`do_sample` is {v}, not true or false")))
            .transpose()?;
        self.temperature = number("temperature")?.map(|x| x as f32);
        self.top_k = count("top_k")?;
        self.top_p = number("top_p")?.map(|x| x as f32);
        self.min_p = number("min_p")?.map(|x| x as f32);
        self.repetition_penalty = number("repetition_penalty")?.map(|x| x as f32);
        self.max_new_tokens = count("max_new_tokens")?;
        if let Some(list) = present("suppress_tokens") {
            self.suppress_tokens = ids(list).map_err(|e| format!("`suppress_tokens` {e}"))?;
        }
        if let Some(eos) = json.get("eos_token_id") {
            self.add_eos(eos)?;
        }
        for (key, nothing) in IGNORED {
            if present(key).is_some_and(|v| v.as_f64() != Some(nothing)) {
                self.ignored.push(key.to_owned());
            }
        }
        Ok(())
    }

    fn add_eos(&mut self, value: &Value) -> Result<(), String> {
        if !value.is_null() {
            for id in ids(value).map_err(|e| format!("`eos_token_id` {e}"))? {
                if !self.eos.contains(&id) {
                    self.eos.push(id);
                }
            }
        }
        Ok(())
    }

    /// Sampling as transformers would by these files: what they leave open has the values it gives them, which is 50 for
    /// `top_k`.
    #[must_use]
    pub fn sampling(&self) -> Sampling {
        Sampling {
            do_sample: self.do_sample.unwrap_or(false),
            temperature: self.temperature.unwrap_or(1.0),
            top_k: self.top_k.unwrap_or(50),
            top_p: self.top_p.unwrap_or(1.0),
            min_p: self.min_p.unwrap_or(0.0),
            repetition_penalty: self.repetition_penalty.unwrap_or(1.0),
            suppress_tokens: self.suppress_tokens.clone(),
            seed: 0,
        }
    }

    /// Every token that ends a text: those of the files, the tokenizer's own end, and, in a chat, those that end an answer
    /// of an instruction-tuned Gemma 4, whatever the files say.
    #[must_use]
    pub fn stop_ids(&self, tokenizer: Option<&Tokenizer>, chat: bool) -> Vec<i32> {
        let mut out = self.eos.clone();
        let mut add = |id: Option<u32>| {
            if let Some(id) = id.and_then(|id| i32::try_from(id).ok()).filter(|id| !out.contains(id)) {
                out.push(id);
            }
        };
        if let Some(t) = tokenizer {
            add(t.eos);
            if chat {
                CHAT_ENDS.iter().for_each(|name| add(t.special_id(name)));
            }
        }
        out
    }
}

/// A scalar or a list of ids.
fn ids(value: &Value) -> Result<Vec<i32>, String> {
    let id = |v: &Value| v.as_i64().and_then(|x| i32::try_from(x).ok()).filter(|x| *x >= 0);
    let all = match value {
        Value::Array(list) => list.iter().map(id).collect(),
        one => id(one).map(|one| vec![one]),
    };
    all.ok_or_else(|| format!("is {value}, not a token id or a list of them"))
}

/// Reads a JSON object, if the file is there.
pub(super) fn object(path: &Path) -> Result<Option<Map<String, Value>>, GenerateError> {
    if !path.is_file() {
        return Ok(None);
    }
    match serde_json::from_slice(&fs_err::read(path)?) {
        Ok(Value::Object(map)) => Ok(Some(map)),
        Ok(_) => Err(file_error(path, "it is not a JSON object".to_owned())),
        Err(e) => Err(file_error(path, format!("no JSON: {e}"))),
    }
}

pub(super) fn file_error(path: &Path, reason: String) -> GenerateError {
    GenerateError::File { path: path.to_owned(), reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(generation: &str, config: &str) -> Result<GenerationConfig, GenerateError> {
        let json = |text| serde_json::from_str::<Value>(text).unwrap();
        GenerationConfig::new(Some(&json(generation)), &json(config))
    }

    #[test]
    fn the_file_of_an_instruction_tuned_model() {
        let c = read(
            r#"{"bos_token_id": 2, "do_sample": true, "eos_token_id": [1, 106, 50], "pad_token_id": 0, "temperature": 1.0,
                "top_k": 64, "top_p": 0.95, "suppress_tokens": [258883, 258882], "num_beams": 4, "typical_p": 1.0}"#,
            r#"{"eos_token_id": [1, 106], "text_config": {"eos_token_id": 7}}"#,
        )
        .unwrap();
        let s = c.sampling();
        assert_eq!((s.do_sample, s.temperature, s.top_k, s.top_p, s.min_p), (true, 1.0, 64, 0.95, 0.0));
        assert_eq!(s.suppress_tokens, [258_883, 258_882]);
        assert_eq!(c.ignored, ["num_beams"]);
        assert_eq!(c.stop_ids(None, true), [1, 106, 50, 7]);
    }

    #[test]
    fn files_that_say_little() {
        let c = read("{}", r#"{"eos_token_id": 1}"#).unwrap();
        assert_eq!((c.eos.as_slice(), c.sampling().do_sample, c.sampling().top_k), ([1].as_slice(), false, 50));
        let none = GenerationConfig::new(None, &serde_json::json!({"text_config": {"max_position_embeddings": 9}}));
        assert_eq!(none.unwrap(), GenerationConfig { max_positions: Some(9), ..GenerationConfig::default() });
        assert_eq!(c.stop_ids(Some(&Tokenizer::bytes()), true), [1]);
        assert_eq!(GenerationConfig::default().stop_ids(Some(&Tokenizer::bytes()), false), [1]);
    }

    #[test]
    fn damage_is_named() {
        for (generation, config, expected) in [
            ("[]", "{}", "not a JSON object"),
            ("{}", r#"{"eos_token_id": "x"}"#, "config.json: `eos_token_id`"),
            (r#"{"eos_token_id": [1, -4]}"#, "{}", "`eos_token_id`"),
            (r#"{"top_k": 1.5}"#, "{}", "`top_k` is 1.5"),
            (r#"{"do_sample": 1}"#, "{}", "`do_sample` is 1"),
            (r#"{"suppress_tokens": [[]]}"#, "{}", "`suppress_tokens`"),
        ] {
            let error = read(generation, config).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
