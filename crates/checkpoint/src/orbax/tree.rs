//! Orbax's JSON: the tree of a checkpoint and the notes beside it.

use std::path::Path;

use fs_err as fs;
use serde_json::{Map, Value, json};

use super::OrbaxError;

/// File with the tree.
pub const METADATA: &str = "_METADATA";
/// File with custom metadata, in an item and in a step.
pub const CHECKPOINT_METADATA: &str = "_CHECKPOINT_METADATA";
/// File that says that a directory is complete.
pub const COMMIT: &str = "commit_success.txt";

/// JSON files of a tree stay far below this.
const MAX_JSON: u64 = 512 << 20;

/// One step of a path through a tree.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Key {
    /// Into a dictionary.
    Dict(String),
    /// Into a list.
    Index(String),
}

impl Key {
    /// The text that names of arrays are made of.
    #[must_use]
    pub fn text(&self) -> &str {
        match self {
            Key::Dict(s) | Key::Index(s) => s,
        }
    }
}

/// A leaf of the tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TreeLeaf {
    /// The path to it.
    pub path: Vec<Key>,
    /// `np.ndarray`, `jax.Array`, `scalar`, or what an empty leaf is: `Dict`, `List`, `None`.
    pub value_type: String,
    /// Whether nothing is stored for it.
    pub empty: bool,
}

impl TreeLeaf {
    /// The name of its array.
    #[must_use]
    pub fn name(&self) -> String {
        join(&self.path)
    }
}

fn join(path: &[Key]) -> String {
    path.iter().map(Key::text).collect::<Vec<_>>().join(".")
}

/// `_METADATA`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TreeMetadata {
    /// All leaves in file order.
    pub leaves: Vec<TreeLeaf>,
    /// Whether arrays lie in OCDBT.
    pub use_ocdbt: Option<bool>,
    /// Whether arrays are zarr version 3.
    pub use_zarr3: Option<bool>,
}

/// Reads a JSON object; `None` if there is no such file.
pub(super) fn read_json(path: &Path) -> Result<Option<Map<String, Value>>, OrbaxError> {
    let size = match fs::metadata(path) {
        Ok(m) => m.len(),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e.into()),
    };
    let broken = |why: String| OrbaxError::Json { path: path.to_owned(), why };
    if size > MAX_JSON {
        return Err(broken(format!("{size} bytes are too many for it")));
    }
    let object = serde_json::from_slice(&fs::read(path)?).map_err(|e| broken(e.to_string()))?;
    Ok(Some(object))
}

impl TreeMetadata {
    /// Reads the file of an item directory; `None` if it has none.
    pub(super) fn read(items: &Path) -> Result<Option<Self>, OrbaxError> {
        let path = items.join(METADATA);
        let Some(o) = read_json(&path)? else { return Ok(None) };
        Self::parse(&o).map(Some).map_err(|why| OrbaxError::Json { path, why })
    }

    fn parse(o: &Map<String, Value>) -> Result<Self, String> {
        let flag = |key: &str| o.get(key).and_then(Value::as_bool);
        let mut out = TreeMetadata { leaves: vec![], use_ocdbt: flag("use_ocdbt"), use_zarr3: flag("use_zarr3") };
        let Some(tree) = o.get("tree_metadata") else { return Ok(out) };
        let tree = tree.as_object().ok_or("tree_metadata is no object")?;
        for (id, leaf) in tree {
            let wrong = |what: &str| format!("leaf {id} has no valid {what}");
            let keys = leaf.get("key_metadata").and_then(Value::as_array).ok_or_else(|| wrong("key_metadata"))?;
            let path = keys
                .iter()
                .map(|k| {
                    let text = match k.get("key") {
                        Some(Value::String(s)) => s.clone(),
                        Some(Value::Number(n)) => n.to_string(),
                        _ => return Err(wrong("key")),
                    };
                    match k.get("key_type").and_then(Value::as_u64) {
                        Some(1) => Ok(Key::Index(text)),
                        Some(2) => Ok(Key::Dict(text)),
                        _ => Err(wrong("key_type")),
                    }
                })
                .collect::<Result<Vec<Key>, String>>()?;
            let value = leaf.get("value_metadata").ok_or_else(|| wrong("value_metadata"))?;
            let value_type =
                value.get("value_type").and_then(Value::as_str).ok_or_else(|| wrong("value_type"))?.to_owned();
            let empty = value.get("skip_deserialize").and_then(Value::as_bool).unwrap_or(false);
            out.leaves.push(TreeLeaf { path, value_type, empty });
        }
        Ok(out)
    }

    /// The file's bytes.
    #[must_use]
    pub fn to_json(&self) -> Vec<u8> {
        let mut tree = Map::new();
        for leaf in &self.leaves {
            let keys: Vec<Value> = leaf
                .path
                .iter()
                .map(|k| match k {
                    Key::Index(s) => json!({"key": s, "key_type": 1}),
                    Key::Dict(s) => json!({"key": s, "key_type": 2}),
                })
                .collect();
            let value = json!({"value_type": leaf.value_type, "skip_deserialize": leaf.empty});
            tree.insert(tuple(&leaf.path), json!({"key_metadata": keys, "value_metadata": value}));
        }
        let value = json!({
            "tree_metadata": tree,
            "use_ocdbt": self.use_ocdbt.unwrap_or(true),
            "use_zarr3": self.use_zarr3.unwrap_or(true),
            "store_array_data_equal_to_fill_value": true,
            "custom_metadata": null,
        });
        value.to_string().into_bytes()
    }
}

/// A path as Python prints a tuple of strings; it only has to be unique.
fn tuple(path: &[Key]) -> String {
    let quoted: Vec<String> = path
        .iter()
        .map(|k| {
            let text = k.text().replace('\\', "\\\\");
            if text.contains('\'') && !text.contains('"') {
                format!("\"{text}\"")
            } else {
                format!("'{}'", text.replace('\'', "\\'"))
            }
        })
        .collect();
    match quoted.as_slice() {
        [one] => format!("({one},)"),
        all => format!("({})", all.join(", ")),
    }
}

/// What the arrays of a checkpoint belong to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum TreeKind {
    /// `params.params.<parameter>`, with `step` and `opt_state` beside it: conversions and training.
    Linen,
    /// `params.<parameter>`: parameters alone.
    ParamsOnly,
    /// `<parameter>.value`: fine-tuning.
    Nnx,
    /// `base.<parameter>.value`: reinforcement learning.
    NnxBase,
    /// `<parameter>`, nothing around it.
    Bare,
}

/// Top-level entries that never hold parameters.
const NOT_PARAMS: [&str; 6] = ["step", "opt_state", "optimizer", "nnx_aux", "rngs", "metrics"];

impl TreeKind {
    /// Tells the kind from the paths of all arrays.
    pub(super) fn detect<'a>(paths: impl Iterator<Item = &'a [Key]> + Clone) -> Self {
        let starts = |prefix: &[&str]| {
            paths.clone().any(|p| p.len() > prefix.len() && prefix.iter().zip(p).all(|(a, b)| *a == b.text()))
        };
        if starts(&["params", "params"]) {
            return TreeKind::Linen;
        }
        if starts(&["params"]) {
            return TreeKind::ParamsOnly;
        }
        if starts(&["base"]) {
            return TreeKind::NnxBase;
        }
        let mut parameters = paths.filter(|p| p.first().is_some_and(|k| !NOT_PARAMS.contains(&k.text()))).peekable();
        let wrapped = parameters.peek().is_some() && parameters.all(|p| p.last().is_some_and(|k| k.text() == "value"));
        if wrapped { TreeKind::Nnx } else { TreeKind::Bare }
    }

    /// The name of a parameter without what the tree puts around it; `None` for anything else.
    #[must_use]
    pub fn parameter(self, path: &[Key]) -> Option<String> {
        let prefix: &[&str] = match self {
            TreeKind::Linen => &["params", "params"],
            TreeKind::ParamsOnly => &["params"],
            TreeKind::NnxBase => &["base"],
            TreeKind::Nnx | TreeKind::Bare => &[],
        };
        if path.len() <= prefix.len() || !prefix.iter().zip(path).all(|(a, b)| *a == b.text()) {
            return None;
        }
        let mut rest = &path[prefix.len()..];
        if prefix.is_empty() && NOT_PARAMS.contains(&rest[0].text()) {
            return None;
        }
        // Variables of one framework keep their array in an attribute of this name.
        if rest.len() > 1 && rest.last().is_some_and(|k| k.text() == "value") {
            rest = &rest[..rest.len() - 1];
        }
        Some(join(rest))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(text: &str) -> Vec<Key> {
        text.split('.').map(|s| Key::Dict(s.to_owned())).collect()
    }

    fn check(names: &[&str], kind: TreeKind, parameters: &[Option<&str>]) {
        let paths: Vec<Vec<Key>> = names.iter().map(|n| path(n)).collect();
        assert_eq!(TreeKind::detect(paths.iter().map(Vec::as_slice)), kind, "{names:?}");
        let found: Vec<Option<String>> = paths.iter().map(|p| kind.parameter(p)).collect();
        assert_eq!(found.iter().map(Option::as_deref).collect::<Vec<_>>(), parameters, "{names:?}");
    }

    #[test]
    fn parameters_are_found_in_every_kind_of_tree() {
        check(
            &["step", "params.params.decoder.norm.scale", "opt_state.0.mu.params.decoder.norm.scale"],
            TreeKind::Linen,
            &[None, Some("decoder.norm.scale"), None],
        );
        check(&["params.decoder.w.kernel"], TreeKind::ParamsOnly, &[Some("decoder.w.kernel")]);
        check(&["decoder.w.kernel.value", "step"], TreeKind::Nnx, &[Some("decoder.w.kernel"), None]);
        check(&["base.decoder.w.value"], TreeKind::NnxBase, &[Some("decoder.w")]);
        check(&["decoder.w", "opt_state.w"], TreeKind::Bare, &[Some("decoder.w"), None]);
        check(&["params.params.w.value"], TreeKind::Linen, &[Some("w")]);
    }

    #[test]
    fn the_tree_is_written_and_read_back() {
        let leaf = |path: Vec<Key>, value_type: &str, empty| TreeLeaf { path, value_type: value_type.into(), empty };
        let tree = TreeMetadata {
            leaves: vec![
                leaf(path("step"), "scalar", false),
                leaf(path("params.params.it's"), "np.ndarray", false),
                leaf(vec![Key::Dict("opt_state".into()), Key::Index("0".into())], "None", true),
            ],
            use_ocdbt: Some(true),
            use_zarr3: Some(false),
        };
        let json: Map<String, Value> = serde_json::from_slice(&tree.to_json()).unwrap();
        assert_eq!(TreeMetadata::parse(&json).unwrap(), tree);
        let ids: Vec<&String> = json["tree_metadata"].as_object().unwrap().keys().collect();
        assert_eq!(ids, ["('step',)", "('params', 'params', \"it's\")", "('opt_state', '0')"]);
    }

    #[test]
    fn damaged_trees_are_errors() {
        for text in [
            r#"{"tree_metadata": 3}"#,
            r#"{"tree_metadata": {"a": {}}}"#,
            r#"{"tree_metadata": {"a": {"key_metadata": [{"key": "x"}], "value_metadata": {"value_type": "x"}}}}"#,
            r#"{"tree_metadata": {"a": {"key_metadata": [{"key": "x", "key_type": 2}]}}}"#,
        ] {
            assert!(TreeMetadata::parse(&serde_json::from_str(text).unwrap()).is_err(), "{text}");
        }
    }
}
