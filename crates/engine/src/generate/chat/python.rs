//! Values written as Python writes them: templates were made with Python's `str` and `json.dumps` in mind.

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Error, ErrorKind, Value};

/// `str(value)`, as `{{ value }}` prints it.
pub(super) fn to_str(value: &Value) -> String {
    match value.kind() {
        ValueKind::Undefined => String::new(),
        ValueKind::String => value.to_string(),
        _ => repr(value),
    }
}

fn repr(value: &Value) -> String {
    match value.kind() {
        ValueKind::None => "None".to_owned(),
        ValueKind::Bool => if value.is_true() { "True" } else { "False" }.to_owned(),
        ValueKind::Number => number(value),
        ValueKind::String => quoted(&value.to_string()),
        ValueKind::Seq | ValueKind::Iterable => {
            let items: Vec<String> = value.try_iter().map(|all| all.map(|v| repr(&v)).collect()).unwrap_or_default();
            format!("[{}]", items.join(", "))
        }
        ValueKind::Map => {
            let pair = |key: Value| {
                let item = value.get_item(&key).unwrap_or_default();
                format!("{}: {}", repr(&key), repr(&item))
            };
            let items: Vec<String> = value.try_iter().map(|all| all.map(pair).collect()).unwrap_or_default();
            format!("{{{}}}", items.join(", "))
        }
        _ => value.to_string(),
    }
}

/// A string in Python's quotes: single ones, unless only they occur in it.
fn quoted(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    let mut out = String::from(quote);
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == quote => out.extend(['\\', c]),
            c if c.is_control() => out.push_str(&format!("\\x{:02x}", c as u32)),
            c => out.push(c),
        }
    }
    out.push(quote);
    out
}

fn number(value: &Value) -> String {
    if value.is_integer() {
        return value.to_string();
    }
    f64::try_from(value.clone()).map_or_else(|_| value.to_string(), float)
}

/// `repr` of a float: the shortest digits that tell it, with an exponent below 1e-4 and from 1e16 on.
fn float(x: f64) -> String {
    if x.is_nan() {
        return "nan".to_owned();
    }
    if x.is_infinite() {
        return if x > 0.0 { "inf" } else { "-inf" }.to_owned();
    }
    if x != 0.0 && !(1e-4..1e16).contains(&x.abs()) {
        let text = format!("{x:e}");
        let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
        let (sign, size) = exponent.strip_prefix('-').map_or(("+", exponent), |size| ("-", size));
        return format!("{digits}e{sign}{size:0>2}");
    }
    let text = x.to_string();
    if text.contains('.') { text } else { text + ".0" }
}

/// The filter `tojson` as transformers has it: `json.dumps` with `ensure_ascii` off and nothing escaped for HTML.
///
/// # Errors
/// When the value has no JSON, or an argument is unknown.
pub(super) fn tojson(value: &Value, kwargs: &Kwargs) -> Result<Value, Error> {
    let separators: Option<Vec<String>> = kwargs.get("separators")?;
    let indent: Option<Value> = kwargs.get("indent")?;
    let indent = match indent.filter(|v| !v.is_none()) {
        None => None,
        Some(v) if v.kind() == ValueKind::String => Some(v.to_string()),
        Some(v) => match usize::try_from(v) {
            Ok(width) if width <= 64 => Some(" ".repeat(width)),
            _ => return Err(Error::new(ErrorKind::InvalidOperation, "tojson: `indent` is from 0 to 64, or a string")),
        },
    };
    let (comma, colon) = match separators.as_deref() {
        None if indent.is_some() => (",".to_owned(), ": ".to_owned()),
        None => (", ".to_owned(), ": ".to_owned()),
        Some([comma, colon]) => (comma.clone(), colon.clone()),
        Some(_) => return Err(Error::new(ErrorKind::InvalidOperation, "tojson: `separators` are two strings")),
    };
    let ascii = kwargs.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false);
    let sorted = kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    kwargs.assert_all_used()?;
    let mut writer = Json { indent, comma, colon, ascii, sorted, out: String::new() };
    writer.write(value, 0)?;
    Ok(Value::from_safe_string(writer.out))
}

struct Json {
    indent: Option<String>,
    comma: String,
    colon: String,
    ascii: bool,
    sorted: bool,
    out: String,
}

impl Json {
    fn write(&mut self, value: &Value, level: usize) -> Result<(), Error> {
        if level > 128 {
            return Err(Error::new(ErrorKind::InvalidOperation, "tojson: too many levels"));
        }
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.out.push_str(&match number(value).as_str() {
                "nan" => "NaN".to_owned(),
                "inf" => "Infinity".to_owned(),
                "-inf" => "-Infinity".to_owned(),
                plain => plain.to_owned(),
            }),
            ValueKind::String => self.string(&value.to_string()),
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.many('[', ']', &items, level, |json, item| json.write(item, level + 1))?;
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sorted {
                    keys.sort();
                }
                self.many('{', '}', &keys, level, |json, key| {
                    // Python makes strings of keys that are none.
                    match key.kind() {
                        ValueKind::String => json.string(&key.to_string()),
                        ValueKind::None => json.out.push_str("\"null\""),
                        ValueKind::Bool => json.out.push_str(if key.is_true() { "\"true\"" } else { "\"false\"" }),
                        _ => json.string(&repr(key)),
                    }
                    json.out.push_str(&json.colon.clone());
                    json.write(&value.get_item(key)?, level + 1)
                })?;
            }
            kind => {
                let what = format!("tojson: a value of kind {kind} has no JSON");
                return Err(Error::new(ErrorKind::InvalidOperation, what));
            }
        }
        Ok(())
    }

    fn many(
        &mut self,
        open: char,
        close: char,
        items: &[Value],
        level: usize,
        mut each: impl FnMut(&mut Self, &Value) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.out.push(open);
        for (i, item) in items.iter().enumerate() {
            if i > 0 {
                self.out.push_str(&self.comma.clone());
            }
            self.line(level + 1);
            each(self, item)?;
        }
        if !items.is_empty() {
            self.line(level);
        }
        self.out.push(close);
        Ok(())
    }

    fn line(&mut self, level: usize) {
        if let Some(indent) = &self.indent {
            self.out.push('\n');
            self.out.push_str(&indent.repeat(level));
        }
    }

    fn string(&mut self, text: &str) {
        // A string always has JSON.
        let json = serde_json::to_string(text).unwrap_or_default();
        if !self.ascii {
            self.out.push_str(&json);
            return;
        }
        for c in json.chars() {
            if c.is_ascii() && c != '\u{7f}' {
                self.out.push(c);
            } else {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    self.out.push_str(&format!("\\u{unit:04x}"));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use minijinja::value::Serde;
    use serde_json::json;

    use super::*;

    /// Expected values are what Python 3.11 prints.
    #[test]
    fn values_print_as_in_python() {
        for (value, expected) in [
            (json!(null), "None"),
            (json!(true), "True"),
            (json!(12), "12"),
            (json!(1.0), "1.0"),
            (json!(0.1), "0.1"),
            (json!(1e16), "1e+16"),
            (json!(123456789012345.0), "123456789012345.0"),
            (json!(0.0001), "0.0001"),
            (json!(0.00001234), "1.234e-05"),
            (json!(-1e-7), "-1e-07"),
            (json!("it's"), "it's"),
            (json!(["it's", "a\"b'", "\n", 1, null]), r#"["it's", 'a"b\'', '\n', 1, None]"#),
            (json!({"a": [false], "b": {}}), "{'a': [False], 'b': {}}"),
        ] {
            assert_eq!(to_str(&Value::from(Serde(&value))), expected);
        }
        assert_eq!(to_str(&Value::UNDEFINED), "");
    }

    fn dumps(value: &serde_json::Value, kwargs: &[(&str, Value)]) -> Result<String, Error> {
        let kwargs: Kwargs = kwargs.iter().map(|(k, v)| (*k, v.clone())).collect();
        tojson(&Value::from(Serde(value)), &kwargs).map(|v| v.to_string())
    }

    #[test]
    fn tojson_is_json_dumps() {
        let value = json!({"b": [1, 2.0, "<é'\"\n\u{1}😀\u{7f}>"], "a": {}, "c": [], "d": {"x": null}});
        assert_eq!(
            dumps(&value, &[]).unwrap(),
            "{\"b\": [1, 2.0, \"<é'\\\"\\n\\u0001😀\u{7f}>\"], \"a\": {}, \"c\": [], \"d\": {\"x\": null}}"
        );
        assert_eq!(
            dumps(&value, &[("indent", 2.into()), ("sort_keys", true.into())]).unwrap(),
            "{\n  \"a\": {},\n  \"b\": [\n    1,\n    2.0,\n    \"<é'\\\"\\n\\u0001😀\u{7f}>\"\n  ],\n  \"c\": [],\n  \"d\": {\n    \"x\": null\n  }\n}"
        );
        assert_eq!(dumps(&json!(["é😀"]), &[("ensure_ascii", true.into())]).unwrap(), "[\"\\u00e9\\ud83d\\ude00\"]");
        let compact = Value::from(vec![",", ":"]);
        assert_eq!(dumps(&json!({"a": [1, 2]}), &[("separators", compact)]).unwrap(), "{\"a\":[1,2]}");
        assert!(dumps(&json!(1), &[("colour", 1.into())]).is_err());
        assert!(dumps(&json!(1), &[("indent", (-1).into())]).is_err());
        let none: Kwargs = std::iter::empty::<(&str, Value)>().collect();
        assert!(tojson(&Value::UNDEFINED, &none).is_err());
    }
}
