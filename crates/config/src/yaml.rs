//! The YAML reader, hidden here so that the crate behind it can be replaced.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::Value as Json;
use serde_saphyr::Spanned;

/// A value with its line, group members flattened to dotted names by [`parse`].
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Entry {
    pub(crate) key: String,
    pub(crate) value: Json,
    /// Line in the file, from 1; 0 where it is not known.
    pub(crate) line: u32,
}

/// Why a text is not a YAML mapping.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct YamlError {
    pub(crate) line: Option<u32>,
    pub(crate) message: String,
}

/// Reads a mapping. Nested mappings become dotted keys: `lora: {lora_rank: 8}` gives `lora.lora_rank`.
pub(crate) fn parse(text: &str) -> Result<Vec<Entry>, YamlError> {
    let root: BTreeMap<String, Spanned<Node>> = serde_saphyr::from_str(text).map_err(|e| YamlError {
        line: e.location().and_then(|l| u32::try_from(l.line()).ok()),
        message: plain_message(&e),
    })?;
    let mut entries = Vec::new();
    flatten("", root, &mut entries);
    entries.sort_by_key(|entry| entry.line);
    Ok(entries)
}

/// Reads one value, as the right side of `key=value`.
pub(crate) fn scalar_or_list(text: &str) -> Result<Json, YamlError> {
    serde_saphyr::from_str(text).map_err(|e| YamlError { line: None, message: plain_message(&e) })
}

fn plain_message(error: &serde_saphyr::Error) -> String {
    let text = error.without_snippet().to_string();
    let text = text.lines().next().unwrap_or_default();
    // The position is given apart, and the reader's own settings are of no use to people.
    let text = text.rsplit_once(" at line ").map_or(text, |(before, _)| before);
    text.split(", set ").next().unwrap_or(text).to_owned()
}

fn flatten(prefix: &str, map: BTreeMap<String, Spanned<Node>>, out: &mut Vec<Entry>) {
    for (key, node) in map {
        let key = if prefix.is_empty() { key } else { format!("{prefix}.{key}") };
        let line = u32::try_from(node.referenced.line()).unwrap_or(0);
        match node.value {
            Node::Map(members) if !members.is_empty() => flatten(&key, members, out),
            Node::Map(_) => out.push(Entry { key, value: Json::Object(serde_json::Map::new()), line }),
            Node::Leaf(value) => out.push(Entry { key, value, line }),
        }
    }
}

/// A mapping whose members know their lines, or anything else.
#[derive(Debug)]
enum Node {
    Leaf(Json),
    Map(BTreeMap<String, Spanned<Node>>),
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct NodeVisitor;

        impl<'de> Visitor<'de> for NodeVisitor {
            type Value = Node;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a YAML value")
            }

            fn visit_bool<E>(self, v: bool) -> Result<Node, E> {
                Ok(Node::Leaf(v.into()))
            }

            fn visit_i64<E>(self, v: i64) -> Result<Node, E> {
                Ok(Node::Leaf(v.into()))
            }

            fn visit_u64<E>(self, v: u64) -> Result<Node, E> {
                Ok(Node::Leaf(v.into()))
            }

            fn visit_f64<E: serde::de::Error>(self, v: f64) -> Result<Node, E> {
                serde_json::Number::from_f64(v)
                    .map(|n| Node::Leaf(Json::Number(n)))
                    .ok_or_else(|| E::custom("the number is not finite"))
            }

            fn visit_str<E>(self, v: &str) -> Result<Node, E> {
                Ok(Node::Leaf(v.into()))
            }

            fn visit_unit<E>(self) -> Result<Node, E> {
                Ok(Node::Leaf(Json::Null))
            }

            fn visit_none<E>(self) -> Result<Node, E> {
                Ok(Node::Leaf(Json::Null))
            }

            fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Node, D::Error> {
                Node::deserialize(deserializer)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Node, A::Error> {
                let mut items: Vec<Json> = Vec::new();
                while let Some(item) = seq.next_element()? {
                    items.push(item);
                }
                Ok(Node::Leaf(items.into()))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Node, A::Error> {
                let mut members = BTreeMap::new();
                while let Some((key, value)) = map.next_entry()? {
                    members.insert(key, value);
                }
                Ok(Node::Map(members))
            }
        }

        deserializer.deserialize_any(NodeVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_know_their_lines_and_groups_are_flattened() {
        let entries =
            parse("# head\nsteps: 10_000\nlora:\n  lora_rank: 8\n  enable_lora: True\nx: [a, 'b']\n").unwrap();
        let seen: Vec<(String, String, u32)> =
            entries.into_iter().map(|e| (e.key, e.value.to_string(), e.line)).collect();
        let expected = [
            ("steps", "10000", 2),
            ("lora.lora_rank", "8", 4),
            ("lora.enable_lora", "true", 5),
            ("x", "[\"a\",\"b\"]", 6),
        ];
        assert_eq!(seen, expected.map(|(k, v, l)| (k.to_owned(), v.to_owned(), l)));
    }

    #[test]
    fn broken_text_names_the_line() {
        for (text, line) in [("a: 1\nb: [1\n", 2), ("a: 1\na: 2\n", 2), ("- 1\n", 1)] {
            assert_eq!(parse(text).unwrap_err().line, Some(line), "{text:?}");
        }
        assert_eq!(parse("a: 1\na: 2\n").unwrap_err().message, "duplicate mapping key: a");
        assert_eq!(parse("").unwrap(), []);
        assert_eq!(parse("# nothing\n").unwrap(), []);
    }

    #[test]
    fn hostile_text_is_an_error_or_a_value_and_never_a_crash() {
        let deep = "[".repeat(100_000);
        assert!(parse(&format!("a: {deep}")).is_err());
        let deep_map = "{a: ".repeat(100_000);
        assert!(parse(&deep_map).is_err());
        let bomb = "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\n\
                    d: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d,*d]\n\
                    f: &f [*e,*e,*e,*e,*e,*e,*e,*e,*e]\ng: &g [*f,*f,*f,*f,*f,*f,*f,*f,*f]\n";
        assert!(parse(bomb).is_err());
        // JSON has no infinity, and no key takes one.
        assert_eq!(parse("a: 1\nb: .inf\n").unwrap_err().line, Some(2));
    }
}
