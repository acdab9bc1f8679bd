//! Values of keys: the constants of the key table and what the layers hold.

use std::fmt;

use serde::{Serialize, Serializer};

/// A constant of the key table: a default, written where the key is declared.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Literal {
    /// No value.
    Null,
    /// A truth value.
    Bool(bool),
    /// A whole number.
    Int(i64),
    /// A number.
    Float(f64),
    /// Text.
    Text(&'static str),
    /// A list of texts.
    List(&'static [&'static str]),
}

/// The value of one key.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// No value (only keys that are declared nullable).
    Null,
    /// A truth value.
    Bool(bool),
    /// A whole number.
    Int(i64),
    /// A number.
    Float(f64),
    /// Text, or the chosen word of an enumeration.
    Text(String),
    /// A list of texts.
    List(Vec<String>),
    /// Logical axes with their mesh axes, in order.
    Rules(Vec<AxisRule>),
}

/// A logical axis and the mesh axes it is cut over.
pub type AxisRule = (String, Vec<String>);

impl From<Literal> for Value {
    fn from(literal: Literal) -> Self {
        match literal {
            Literal::Null => Value::Null,
            Literal::Bool(b) => Value::Bool(b),
            Literal::Int(i) => Value::Int(i),
            Literal::Float(f) => Value::Float(f),
            Literal::Text(s) => Value::Text(s.to_owned()),
            Literal::List(items) => Value::List(items.iter().map(|s| (*s).to_owned()).collect()),
        }
    }
}

impl Value {
    /// The text of a text value; what `Display` writes for the others.
    pub(crate) fn to_string_value(&self) -> String {
        match self {
            Value::Text(text) => text.clone(),
            other => other.to_string(),
        }
    }
}

impl From<bool> for Value {
    fn from(v: bool) -> Self {
        Value::Bool(v)
    }
}

impl From<i64> for Value {
    fn from(v: i64) -> Self {
        Value::Int(v)
    }
}

impl From<f64> for Value {
    fn from(v: f64) -> Self {
        Value::Float(v)
    }
}

impl From<&str> for Value {
    fn from(v: &str) -> Self {
        Value::Text(v.to_owned())
    }
}

/// Writes the value as YAML would take it back.
impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Value::Null => f.write_str("null"),
            Value::Bool(b) => write!(f, "{b}"),
            Value::Int(i) => write!(f, "{i}"),
            Value::Float(x) => write!(f, "{x:?}"),
            Value::Text(s) if is_plain(s) => f.write_str(s),
            Value::Text(s) => write!(f, "{}", quoted(s)),
            Value::List(items) => {
                f.write_str("[")?;
                for (i, item) in items.iter().enumerate() {
                    write!(f, "{}{}", if i > 0 { ", " } else { "" }, quoted(item))?;
                }
                f.write_str("]")
            }
            Value::Rules(rules) => {
                f.write_str("[")?;
                for (i, (name, axes)) in rules.iter().enumerate() {
                    let axes = Value::List(axes.clone());
                    write!(f, "{}[{}, {axes}]", if i > 0 { ", " } else { "" }, quoted(name))?;
                }
                f.write_str("]")
            }
        }
    }
}

impl fmt::Display for Literal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Value::from(*self).fmt(f)
    }
}

/// Whether YAML reads the text back as the same text without quotes.
fn is_plain(s: &str) -> bool {
    let word = |c: char| c.is_ascii_alphanumeric() || "_-./".contains(c);
    s.starts_with(|c: char| c.is_ascii_alphabetic() || c == '/')
        && s.chars().all(word)
        && !["null", "true", "false", "yes", "no", "on", "off", "y", "n"].iter().any(|w| w.eq_ignore_ascii_case(s))
}

fn quoted(s: &str) -> String {
    // JSON's double quotes are YAML's double quotes.
    serde_json::Value::from(s).to_string()
}

impl Serialize for Value {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Value::Null => serializer.serialize_unit(),
            Value::Bool(b) => serializer.serialize_bool(*b),
            Value::Int(i) => serializer.serialize_i64(*i),
            Value::Float(x) => serializer.serialize_f64(*x),
            Value::Text(s) => serializer.serialize_str(s),
            Value::List(items) => items.serialize(serializer),
            Value::Rules(rules) => rules.serialize(serializer),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn display_reads_back_as_yaml() {
        for (value, text) in [
            (Value::Null, "null"),
            (Value::Bool(true), "true"),
            (Value::Int(-3), "-3"),
            (Value::Float(3e-5), "3e-5"),
            (Value::Float(30.0), "30.0"),
            (Value::from("gemma4-e2b"), "gemma4-e2b"),
            (Value::from(""), "\"\""),
            (Value::from("I love to"), "\"I love to\""),
            (Value::from("no"), "\"no\""),
            (Value::from("010"), "\"010\""),
            (Value::List(vec!["gelu".into(), "linear".into()]), "[\"gelu\", \"linear\"]"),
        ] {
            assert_eq!(value.to_string(), text);
        }
    }

    #[test]
    fn json_keeps_the_type() {
        let json = serde_json::to_string(&[Value::Null, Value::Int(1), Value::Float(1.0), Value::from("x")]).unwrap();
        assert_eq!(json, r#"[null,1,1.0,"x"]"#);
    }
}
