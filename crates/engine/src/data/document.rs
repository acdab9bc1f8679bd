//! One line of a file: its text, or its token ids.

use std::fmt;

use serde::de::{Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::files::Format;

/// What a document holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Content {
    /// Text, yet to be tokenized.
    Text(String),
    /// Token ids.
    Ids(Vec<i64>),
}

impl Content {
    pub(super) fn is_empty(&self) -> bool {
        match self {
            Content::Text(text) => text.is_empty(),
            Content::Ids(ids) => ids.is_empty(),
        }
    }
}

/// Reads a line, without its line feed.
///
/// Several columns make one document: texts joined by a line feed, ids one after the other.
///
/// # Errors
/// What is wrong with the line.
pub(super) fn parse(line: &[u8], format: Format, columns: &[String], is_text: bool) -> Result<Content, String> {
    let text = std::str::from_utf8(line).map_err(|e| format!("invalid UTF-8 at byte {}", e.valid_up_to() + 1))?;
    match (format, is_text) {
        (Format::Text, true) => Ok(Content::Text(text.to_owned())),
        (Format::Text, false) => {
            let id = |word: &str| word.parse().map_err(|_| format!("`{}` is no token id", shortened(word)));
            text.split_ascii_whitespace().map(id).collect::<Result<_, _>>().map(Content::Ids)
        }
        // Tables were turned into JSON lines.
        (Format::Json | Format::Parquet, _) => {
            let cells = cells(text, columns)?;
            if is_text { join_text(cells, columns) } else { join_ids(cells, columns) }
        }
    }
}

fn shortened(text: &str) -> String {
    if text.chars().count() <= 40 { text.to_owned() } else { text.chars().take(40).chain(['…']).collect() }
}

/// The value of one column.
#[derive(Debug, Clone, PartialEq)]
enum Cell {
    Text(String),
    Ids(Vec<i64>),
    /// Anything else, by its name.
    Other(&'static str),
}

impl Cell {
    fn name(&self) -> &'static str {
        match self {
            Cell::Text(_) => "a string",
            Cell::Ids(_) => "a list of numbers",
            Cell::Other(name) => name,
        }
    }
}

fn join_text(cells: Vec<Cell>, columns: &[String]) -> Result<Content, String> {
    let mut all = String::new();
    for (at, (cell, column)) in cells.into_iter().zip(columns).enumerate() {
        let Cell::Text(text) = cell else {
            return Err(format!("column `{column}` is {}, not a string", cell.name()));
        };
        if at == 0 {
            all = text;
        } else {
            all.push('\n');
            all.push_str(&text);
        }
    }
    Ok(Content::Text(all))
}

fn join_ids(cells: Vec<Cell>, columns: &[String]) -> Result<Content, String> {
    let mut all = Vec::new();
    for (cell, column) in cells.into_iter().zip(columns) {
        let Cell::Ids(ids) = cell else {
            return Err(format!("column `{column}` is {}, not a list of token ids", cell.name()));
        };
        all.extend(ids);
    }
    Ok(Content::Ids(all))
}

/// The columns of a JSON object, in the order asked for; the rest is skipped without being stored.
fn cells(text: &str, columns: &[String]) -> Result<Vec<Cell>, String> {
    let mut json = serde_json::Deserializer::from_str(text);
    let row = json.deserialize_any(RowVisitor { columns }).map_err(|e| plain(&e))?;
    json.end().map_err(|e| plain(&e))?;
    let mut cells = Vec::with_capacity(columns.len());
    for (cell, column) in row.cells.into_iter().zip(columns) {
        cells.push(cell.ok_or_else(|| match row.others.as_slice() {
            [] => format!("no column `{column}`"),
            others => format!("no column `{column}` (there is {})", others.join(", ")),
        })?);
    }
    Ok(cells)
}

/// A message of the JSON parser; its line number is that within one line, always 1.
fn plain(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let said = text.split(" at line ").next().unwrap_or_default();
    format!("not a JSON object: {said} at byte {}", error.column())
}

struct Row {
    cells: Vec<Option<Cell>>,
    /// Names of a few columns that were not asked for.
    others: Vec<String>,
}

struct RowVisitor<'a> {
    columns: &'a [String],
}

impl<'de> Visitor<'de> for RowVisitor<'_> {
    type Value = Row;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Row, A::Error> {
        let mut row = Row { cells: vec![None; self.columns.len()], others: Vec::new() };
        while let Some(name) = map.next_key::<String>()? {
            // The same column may be asked for twice.
            let mut places = self.columns.iter().enumerate().filter(|(_, column)| **column == name).map(|(at, _)| at);
            let Some(first) = places.next() else {
                map.next_value::<IgnoredAny>()?;
                if row.others.len() < 5 {
                    row.others.push(format!("`{}`", shortened(&name)));
                }
                continue;
            };
            let cell: Cell = map.next_value()?;
            for other in places {
                row.cells[other] = Some(cell.clone());
            }
            row.cells[first] = Some(cell);
        }
        Ok(row)
    }
}

impl<'de> serde::Deserialize<'de> for Cell {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(CellVisitor)
    }
}

struct CellVisitor;

impl<'de> Visitor<'de> for CellVisitor {
    type Value = Cell;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string or a list of whole numbers")
    }

    fn visit_str<E>(self, text: &str) -> Result<Cell, E> {
        Ok(Cell::Text(text.to_owned()))
    }

    fn visit_string<E>(self, text: String) -> Result<Cell, E> {
        Ok(Cell::Text(text))
    }

    fn visit_unit<E>(self) -> Result<Cell, E> {
        Ok(Cell::Other("null"))
    }

    fn visit_bool<E>(self, _: bool) -> Result<Cell, E> {
        Ok(Cell::Other("a truth value"))
    }

    fn visit_i64<E>(self, _: i64) -> Result<Cell, E> {
        Ok(Cell::Other("a number"))
    }

    fn visit_u64<E>(self, _: u64) -> Result<Cell, E> {
        Ok(Cell::Other("a number"))
    }

    fn visit_f64<E>(self, _: f64) -> Result<Cell, E> {
        Ok(Cell::Other("a number"))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Cell, A::Error> {
        let mut ids = Vec::new();
        while let Some(id) = seq.next_element::<i64>()? {
            ids.push(id);
        }
        Ok(Cell::Ids(ids))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Cell, A::Error> {
        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(Cell::Other("an object"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn columns(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    fn text(line: &str, names: &[&str]) -> Result<Content, String> {
        parse(line.as_bytes(), Format::Json, &columns(names), true)
    }

    fn ids(line: &str) -> Result<Content, String> {
        parse(line.as_bytes(), Format::Json, &columns(&["ids"]), false)
    }

    #[test]
    fn columns_are_picked_and_joined() {
        let line = r#"{"a": {"x": [1, {"text": "no"}]}, "text": "caf\u00e9 \ud83d\ude00", "title": "T", "n": 1.5}"#;
        assert_eq!(text(line, &["text"]), Ok(Content::Text("café 😀".into())));
        assert_eq!(text(line, &["title", "text"]), Ok(Content::Text("T\ncafé 😀".into())));
        assert_eq!(text(line, &["title", "title"]), Ok(Content::Text("T\nT".into())));
        assert_eq!(ids(r#" {"ids": [1, 2, -3]} "#), Ok(Content::Ids(vec![1, 2, -3])));
        assert_eq!(ids(r#"{"ids": []}"#), Ok(Content::Ids(vec![])));
        assert_eq!(parse(b"a  b\tc ", Format::Text, &[], true), Ok(Content::Text("a  b\tc ".into())));
        assert_eq!(parse(b" 1 22\t3", Format::Text, &[], false), Ok(Content::Ids(vec![1, 22, 3])));
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (line, wants) in [
            ("{", "not a JSON object: EOF while parsing"),
            ("[1]", "not a JSON object: invalid type: sequence, expected an object"),
            ("\"x\"", "expected an object"),
            (r#"{"text": "a"} x"#, "trailing characters at byte 15"),
            (r#"{"text": null}"#, "column `text` is null, not a string"),
            (r#"{"text": 3}"#, "column `text` is a number"),
            (r#"{"text": [1]}"#, "column `text` is a list of numbers"),
            (r#"{"text": {"a": 1}}"#, "column `text` is an object"),
            (r#"{"body": "a", "id": 3}"#, "no column `text` (there is `body`, `id`)"),
            ("{}", "no column `text`"),
            (r#"{"text": "\ud800"}"#, "not a JSON object"),
            (r#"{"text": "a"#, "EOF"),
        ] {
            let error = text(line, &["text"]).unwrap_err();
            assert!(error.contains(wants), "{line}: {error}");
        }
        assert!(ids(r#"{"ids": "1 2"}"#).unwrap_err().contains("is a string, not a list of token ids"));
        assert!(ids(r#"{"ids": [1.5]}"#).unwrap_err().contains("floating point"));
        assert!(ids(r#"{"ids": [99999999999999999999]}"#).unwrap_err().contains("not a JSON object"));
        let bytes = b"{\"text\": \"\xff\"}";
        assert_eq!(parse(bytes, Format::Json, &columns(&["text"]), true), Err("invalid UTF-8 at byte 11".into()));
        assert!(parse(b"1 x", Format::Text, &[], false).unwrap_err().contains("`x` is no token id"));
    }

    #[test]
    fn nesting_does_not_exhaust_the_stack() {
        for depth in [100, 100_000] {
            let deep = "[".repeat(depth);
            assert!(text(&format!(r#"{{"x": {deep}"#), &["text"]).is_err());
            assert!(ids(&format!(r#"{{"ids": {deep}"#)).is_err());
            let objects = r#"{"a":"#.repeat(depth);
            assert!(text(&format!(r#"{{"text": {objects}"#), &["text"]).is_err());
        }
    }
}
