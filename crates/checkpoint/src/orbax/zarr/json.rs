//! Typed access to zarr's JSON.

use serde_json::{Map, Value};
use tensor::DType;

/// What makes array metadata unreadable.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ZarrError {
    /// Not JSON.
    #[error("array metadata is not valid JSON: {0}")]
    Json(String),
    /// A key is absent.
    #[error("array metadata has no {0:?}")]
    Missing(&'static str),
    /// A key has a value that cannot be.
    #[error("array metadata has an impossible {key:?}: {why}")]
    Value {
        /// The key.
        key: &'static str,
        /// What is wrong with it.
        why: String,
    },
    /// Something that this reader does not know.
    #[error("{what} {name:?} is not supported; rewrite the checkpoint without it")]
    Unsupported {
        /// The kind of thing.
        what: &'static str,
        /// Its name.
        name: String,
    },
}

pub(super) type Object = Map<String, Value>;

pub(super) fn object(bytes: &[u8]) -> Result<Object, ZarrError> {
    serde_json::from_slice(bytes).map_err(|e| ZarrError::Json(e.to_string()))
}

pub(super) fn field<'a>(o: &'a Object, key: &'static str) -> Result<&'a Value, ZarrError> {
    o.get(key).ok_or(ZarrError::Missing(key))
}

pub(super) fn bad(key: &'static str, value: &Value) -> ZarrError {
    let mut why = value.to_string();
    if why.len() > 80 {
        why = why.chars().take(80).chain("...".chars()).collect();
    }
    ZarrError::Value { key, why }
}

pub(super) fn text<'a>(o: &'a Object, key: &'static str) -> Result<&'a str, ZarrError> {
    let v = field(o, key)?;
    v.as_str().ok_or_else(|| bad(key, v))
}

/// Most dimensions of an array; numpy allows 64.
const MAX_RANK: usize = 64;

pub(super) fn extents(o: &Object, key: &'static str) -> Result<Vec<usize>, ZarrError> {
    let v = field(o, key)?;
    let list = v.as_array().filter(|l| l.len() <= MAX_RANK).ok_or_else(|| bad(key, v))?;
    list.iter().map(|n| n.as_u64().and_then(|n| usize::try_from(n).ok()).ok_or_else(|| bad(key, v))).collect()
}

/// A permutation of `0..n`.
pub(super) fn permutation(o: &Object, key: &'static str) -> Result<Vec<usize>, ZarrError> {
    let order = extents(o, key)?;
    let mut sorted = order.clone();
    sorted.sort_unstable();
    if sorted.iter().enumerate().any(|(i, &n)| i != n) {
        return Err(ZarrError::Value { key, why: format!("{order:?} is no permutation") });
    }
    Ok(order)
}

pub(super) fn version(o: &Object, wanted: u64) -> Result<(), ZarrError> {
    let v = field(o, "zarr_format")?;
    if v.as_u64() == Some(wanted) { Ok(()) } else { Err(bad("zarr_format", v)) }
}

/// Element types by their numpy names, which version 3 uses.
pub(super) fn dtype(name: &str) -> Result<DType, ZarrError> {
    DType::ALL
        .into_iter()
        .find(|d| d.name() == name)
        .ok_or_else(|| ZarrError::Unsupported { what: "data type", name: name.to_owned() })
}
