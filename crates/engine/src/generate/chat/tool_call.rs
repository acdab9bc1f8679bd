//! Tool calls as Gemma 4 writes them: `call:NAME{key:value,...}`.
//!
//! Keys are bare, strings stand between `<|"|>`, the rest is as in JSON. What a model writes is not always what it should
//! be, so JSON's own quotes, quoted keys, spaces and bare words are read as well; what cannot be read is an error and
//! never more.

use std::fmt::Write as _;

use serde_json::{Map, Value};

/// What stands before and after a string.
pub(super) const QUOTE: &str = "<|\"|>";

/// Most levels of lists and maps in one another.
const DEEPEST: usize = 64;

/// A call of a tool.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct ToolCall {
    /// The tool.
    pub name: String,
    /// Its arguments, an object.
    pub arguments: Value,
}

/// A text that is no tool call.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no tool call: {reason} at byte {at}")]
pub struct ToolCallError {
    /// Where reading stopped, in bytes.
    pub at: usize,
    /// What was wrong there.
    pub reason: &'static str,
}

impl ToolCall {
    /// Reads what stands between `<|tool_call>` and `<tool_call|>`.
    ///
    /// # Errors
    /// When it is no call; the place is told.
    pub fn parse(text: &str) -> Result<Self, ToolCallError> {
        let mut p = Parser { text, at: 0 };
        p.spaces();
        if !p.take("call:") {
            return Err(p.wrong("it does not begin with `call:`"));
        }
        let Some(length) = p.rest().find('{') else { return Err(p.wrong("no `{` follows the name")) };
        let name = p.rest()[..length].trim();
        if name.is_empty() || name.contains(char::is_control) {
            return Err(p.wrong("there is no name"));
        }
        p.at += length;
        let arguments = p.value(0)?;
        p.spaces();
        if !p.rest().is_empty() {
            return Err(p.wrong("something follows the call"));
        }
        Ok(ToolCall { name: name.to_owned(), arguments })
    }
}

struct Parser<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Parser<'a> {
    fn rest(&self) -> &'a str {
        &self.text[self.at..]
    }

    fn wrong(&self, reason: &'static str) -> ToolCallError {
        ToolCallError { at: self.at, reason }
    }

    fn spaces(&mut self) {
        let rest = self.rest();
        self.at += rest.len() - rest.trim_start().len();
    }

    fn take(&mut self, word: &str) -> bool {
        let there = self.rest().starts_with(word);
        if there {
            self.at += word.len();
        }
        there
    }

    fn value(&mut self, depth: usize) -> Result<Value, ToolCallError> {
        if depth > DEEPEST {
            return Err(self.wrong("too many levels"));
        }
        self.spaces();
        if self.take("{") {
            return self.map(depth);
        }
        if self.take("[") {
            return self.list(depth);
        }
        if let Some(text) = self.string()? {
            return Ok(Value::String(text));
        }
        let word = self.word(&[',', '}', ']']);
        Ok(match word {
            "" => return Err(self.wrong("there is no value")),
            "true" | "True" => Value::Bool(true),
            "false" | "False" => Value::Bool(false),
            "null" | "None" => Value::Null,
            // A number, or a string whose quotes were forgotten.
            word => match serde_json::from_str::<serde_json::Number>(word) {
                Ok(number) => Value::Number(number),
                Err(_) => Value::String(word.to_owned()),
            },
        })
    }

    fn map(&mut self, depth: usize) -> Result<Value, ToolCallError> {
        let mut map = Map::new();
        loop {
            self.spaces();
            if self.take("}") {
                return Ok(Value::Object(map));
            }
            let key = match self.string()? {
                Some(key) => key,
                None => self.word(&[':', ',', '{', '}', '[', ']']).to_owned(),
            };
            self.spaces();
            if !self.take(":") {
                return Err(self.wrong("no `:` follows a key"));
            }
            let value = self.value(depth + 1)?;
            map.insert(key, value);
            self.separator("}")?;
        }
    }

    fn list(&mut self, depth: usize) -> Result<Value, ToolCallError> {
        let mut list = Vec::new();
        loop {
            self.spaces();
            if self.take("]") {
                return Ok(Value::Array(list));
            }
            list.push(self.value(depth + 1)?);
            self.separator("]")?;
        }
    }

    /// A comma, or the end, which stays.
    fn separator(&mut self, end: &str) -> Result<(), ToolCallError> {
        self.spaces();
        if self.take(",") || self.rest().starts_with(end) {
            return Ok(());
        }
        Err(self.wrong(if self.rest().is_empty() { "it ends in the middle" } else { "neither `,` nor an end" }))
    }

    /// A string in either kind of quotes, if one begins here.
    fn string(&mut self) -> Result<Option<String>, ToolCallError> {
        if self.take(QUOTE) {
            let Some(length) = self.rest().find(QUOTE) else { return Err(self.wrong("a string does not end")) };
            let text = self.rest()[..length].to_owned();
            self.at += length + QUOTE.len();
            return Ok(Some(text));
        }
        if !self.rest().starts_with('"') {
            return Ok(None);
        }
        let mut strings = serde_json::Deserializer::from_str(self.rest()).into_iter::<String>();
        match strings.next() {
            Some(Ok(text)) => {
                self.at += strings.byte_offset();
                Ok(Some(text))
            }
            _ => Err(self.wrong("a string does not end")),
        }
    }

    fn word(&mut self, ends: &[char]) -> &'a str {
        let rest = self.rest();
        let length = rest.find(ends).unwrap_or(rest.len());
        self.at += length;
        rest[..length].trim()
    }
}

/// Writes arguments as Gemma 4 does: keys bare and sorted, strings between `<|"|>`.
#[must_use]
pub fn format_arguments(value: &Value) -> String {
    let mut out = String::new();
    write_value(value, &mut out);
    out
}

fn write_value(value: &Value, out: &mut String) {
    match value {
        Value::Object(map) => {
            let mut keys: Vec<&String> = map.keys().collect();
            keys.sort();
            out.push('{');
            for (i, key) in keys.into_iter().enumerate() {
                if i > 0 {
                    out.push(',');
                }
                out.push_str(key);
                out.push(':');
                write_value(&map[key], out);
            }
            out.push('}');
        }
        Value::Array(list) => {
            out.push('[');
            for (i, value) in list.iter().enumerate() {
                if i > 0 {
                    out.push(',');
                }
                write_value(value, out);
            }
            out.push(']');
        }
        Value::String(text) => {
            // Writing to a string does not fail.
            let _ = write!(out, "{QUOTE}{text}{QUOTE}");
        }
        other => {
            let _ = write!(out, "{other}");
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn parse(text: &str) -> Result<(String, Value), ToolCallError> {
        ToolCall::parse(text).map(|c| (c.name, c.arguments))
    }

    #[test]
    fn calls_are_read() {
        for (text, name, arguments) in [
            (r#"call:now{}"#, "now", json!({})),
            (
                r#"call:get_weather{city:<|"|>São Paulo, {x}<|"|>,days:3,metric:true}"#,
                "get_weather",
                json!({"city": "São Paulo, {x}", "days": 3, "metric": true}),
            ),
            (
                r#"call:f{a:[1,-2.5e3,<|"|><|"|>],b:{c:null,d:[]},e:[{}]}"#,
                "f",
                json!({"a": [1, -2500.0, ""], "b": {"c": null, "d": []}, "e": [{}]}),
            ),
            // What it should not be, and is.
            (
                "\ncall:f { \"a\" : \"x\\n\\\"y\" , <|\"|>b<|\"|> : False, c: two words, } \n",
                "f",
                json!({"a": "x\n\"y", "b": false, "c": "two words"}),
            ),
            ("call:f{a:01,b:1.,c:NaN}", "f", json!({"a": "01", "b": "1.", "c": "NaN"})),
            ("call:f{a:1,a:2}", "f", json!({"a": 2})),
        ] {
            assert_eq!(parse(text), Ok((name.to_owned(), arguments)), "{text}");
        }
    }

    #[test]
    fn what_is_no_call_is_an_error_that_tells_where() {
        for (text, at, reason) in [
            ("", 0, "`call:`"),
            ("get_weather{}", 0, "`call:`"),
            ("call:f", 5, "no `{`"),
            ("call:{}", 5, "no name"),
            ("call:f{", 7, "no `:`"),
            ("call:f{a", 8, "no `:`"),
            ("call:f{a:", 9, "no value"),
            ("call:f{a:1", 10, "middle"),
            ("call:f{a:<|\"|>x", 14, "does not end"),
            ("call:f{a:\"x", 9, "does not end"),
            ("call:f{a:[1}", 11, "neither"),
            ("call:f{}x", 8, "follows the call"),
        ] {
            let e = ToolCall::parse(text).unwrap_err();
            assert!(e.at == at && e.reason.contains(reason), "{text}: {e}");
        }
        let deep = format!("call:f{{a:{}", "[".repeat(100_000));
        assert!(ToolCall::parse(&deep).unwrap_err().reason.contains("levels"));
    }

    fn value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            (-1e12f64..1e12).prop_map(Value::from),
            "[a-z \"{}\\[\\]:,é\\\\\n]{0,12}".prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 24, 5, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::btree_map("[a-zé_][a-z0-9_é]{0,6}", inner, 0..4)
                    .prop_map(|m| Value::Object(m.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(arguments in prop::collection::btree_map("[a-z_]{1,5}", value(), 0..5)) {
            let arguments = Value::Object(arguments.into_iter().collect());
            let text = format!("call:tool.name-1{}", format_arguments(&arguments));
            prop_assert_eq!(parse(&text), Ok(("tool.name-1".to_owned(), arguments)));
        }

        #[test]
        fn hostile_text_does_no_harm(
            words in prop::collection::vec(
                prop_oneof![
                    Just("call:"), Just("f"), Just("{"), Just("}"), Just("["), Just("]"), Just(":"), Just(","),
                    Just("<|\"|>"), Just("<|"), Just("\""), Just("\\"), Just("é"), Just(" "), Just("1e999"), Just("\u{0}"),
                ],
                0..40,
            ),
            text: String,
        ) {
            for text in [words.concat(), format!("call:f{{{}", words.concat()), text] {
                match ToolCall::parse(&text) {
                    Ok(call) => prop_assert!(call.arguments.is_object() && !call.name.is_empty()),
                    Err(error) => prop_assert!(text.is_char_boundary(error.at)),
                }
            }
        }
    }
}
