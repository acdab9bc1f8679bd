//! `zarr.json`.

use serde_json::{Value, json};

use super::codec::{ArrayBytes, BytesCodec, Chain, Endian, Sharding};
use super::json::{Object, ZarrError, bad, dtype, extents, field, object, permutation, text, version};
use super::{ArrayMeta, KeyEncoding};

/// Sharding inside sharding beyond this depth serves nobody.
const MAX_DEPTH: usize = 4;

pub(super) fn parse(bytes: &[u8]) -> Result<ArrayMeta, ZarrError> {
    let o = object(bytes)?;
    version(&o, 3)?;
    let kind = text(&o, "node_type")?;
    if kind != "array" {
        return Err(ZarrError::Value { key: "node_type", why: kind.to_owned() });
    }
    const KNOWN: [&str; 11] = [
        "zarr_format",
        "node_type",
        "shape",
        "data_type",
        "chunk_grid",
        "chunk_key_encoding",
        "fill_value",
        "codecs",
        "attributes",
        "storage_transformers",
        "dimension_names",
    ];
    for (key, value) in &o {
        let optional = value.get("must_understand") == Some(&Value::Bool(false));
        if !KNOWN.contains(&key.as_str()) && !optional {
            return Err(ZarrError::Unsupported { what: "extension", name: key.clone() });
        }
    }
    if o.get("storage_transformers").and_then(Value::as_array).is_some_and(|l| !l.is_empty()) {
        return Err(ZarrError::Unsupported { what: "extension", name: "storage_transformers".into() });
    }
    let (grid, configuration) = named(field(&o, "chunk_grid")?, "chunk_grid")?;
    if grid != "regular" {
        return Err(ZarrError::Unsupported { what: "chunk grid", name: grid.to_owned() });
    }
    ArrayMeta {
        version: 3,
        shape: extents(&o, "shape")?.into(),
        dtype: dtype(text(&o, "data_type")?)?,
        chunk_shape: extents(&configuration, "chunk_shape")?,
        keys: keys(field(&o, "chunk_key_encoding")?)?,
        codecs: chain(field(&o, "codecs")?, "codecs", 0)?,
    }
    .checked()
}

/// The name and configuration of an extension point, which may be a bare string.
fn named<'a>(v: &'a Value, key: &'static str) -> Result<(&'a str, Object), ZarrError> {
    if let Some(name) = v.as_str() {
        return Ok((name, Object::new()));
    }
    let name = v.get("name").and_then(Value::as_str).ok_or_else(|| bad(key, v))?;
    match v.get("configuration") {
        None => Ok((name, Object::new())),
        Some(Value::Object(c)) => Ok((name, c.clone())),
        Some(_) => Err(bad(key, v)),
    }
}

fn keys(v: &Value) -> Result<KeyEncoding, ZarrError> {
    let (name, c) = named(v, "chunk_key_encoding")?;
    let separator = |default| match c.get("separator") {
        None => Ok(default),
        Some(s) => match s.as_str() {
            Some("/") => Ok('/'),
            Some(".") => Ok('.'),
            _ => Err(bad("separator", s)),
        },
    };
    match name {
        "default" => Ok(KeyEncoding::Default(separator('/')?)),
        "v2" => Ok(KeyEncoding::V2(separator('.')?)),
        _ => Err(ZarrError::Unsupported { what: "chunk key encoding", name: name.to_owned() }),
    }
}

fn chain(v: &Value, key: &'static str, depth: usize) -> Result<Chain, ZarrError> {
    let list = v.as_array().filter(|l| l.len() <= 16).ok_or_else(|| bad(key, v))?;
    let mut order: Option<Vec<usize>> = None;
    let mut array: Option<ArrayBytes> = None;
    let mut bytes = Vec::new();
    for codec in list {
        let (name, c) = named(codec, key)?;
        match (name, &array) {
            ("transpose", None) => {
                let next = permutation(&c, "order")?;
                order = Some(match order {
                    None => next,
                    Some(first) if first.len() == next.len() => next.iter().map(|&i| first[i]).collect(),
                    Some(_) => {
                        return Err(ZarrError::Value { key: "order", why: "two transposes differ in rank".into() });
                    }
                });
            }
            ("bytes", None) => array = Some(ArrayBytes::Bytes(endian(&c)?)),
            ("sharding_indexed", None) => array = Some(ArrayBytes::Sharding(Box::new(sharding(&c, depth)?))),
            ("crc32c", Some(_)) => bytes.push(BytesCodec::Crc32c),
            ("zstd", Some(_)) => {
                let level = c.get("level").and_then(Value::as_i64).unwrap_or(0);
                let checksum = c.get("checksum").and_then(Value::as_bool).unwrap_or(false);
                bytes.push(BytesCodec::Zstd { level: i32::try_from(level).unwrap_or(0), checksum });
            }
            ("transpose" | "bytes" | "sharding_indexed" | "crc32c" | "zstd", _) => {
                return Err(ZarrError::Value { key, why: format!("codec {name:?} is out of place") });
            }
            _ => return Err(ZarrError::Unsupported { what: "codec", name: name.to_owned() }),
        }
    }
    let array = array.ok_or_else(|| ZarrError::Value { key, why: "no codec turns elements into bytes".into() })?;
    if bytes.iter().filter(|c| matches!(c, BytesCodec::Zstd { .. })).count() > 1 {
        return Err(ZarrError::Unsupported { what: "codec sequence", name: "zstd twice".into() });
    }
    if matches!(array, ArrayBytes::Sharding(_)) && !bytes.is_empty() {
        // Nobody could read a part of it, which is what sharding is for.
        return Err(ZarrError::Unsupported { what: "codec sequence", name: "a codec around shards".into() });
    }
    Ok(Chain { order, array, bytes })
}

fn endian(c: &Object) -> Result<Endian, ZarrError> {
    match c.get("endian") {
        // Left out where an element is one byte.
        None => Ok(Endian::Little),
        Some(v) => match v.as_str() {
            Some("little") => Ok(Endian::Little),
            Some("big") => Ok(Endian::Big),
            _ => Err(bad("endian", v)),
        },
    }
}

fn sharding(c: &Object, depth: usize) -> Result<Sharding, ZarrError> {
    if depth >= MAX_DEPTH {
        return Err(ZarrError::Unsupported { what: "codec sequence", name: "deeply nested sharding".into() });
    }
    let index_at_start = match c.get("index_location") {
        None => false,
        Some(v) => match v.as_str() {
            Some("start") => true,
            Some("end") => false,
            _ => return Err(bad("index_location", v)),
        },
    };
    Ok(Sharding {
        chunk_shape: extents(c, "chunk_shape")?,
        codecs: chain(field(c, "codecs")?, "codecs", depth + 1)?,
        index_codecs: match c.get("index_codecs") {
            None => Chain { order: None, array: ArrayBytes::Bytes(Endian::Little), bytes: vec![BytesCodec::Crc32c] },
            Some(v) => chain(v, "index_codecs", MAX_DEPTH)?,
        },
        index_at_start,
    })
}

pub(super) fn write(m: &ArrayMeta) -> Vec<u8> {
    let zero = if m.dtype == tensor::DType::Bool {
        json!(false)
    } else if m.dtype.is_float() {
        json!(0.0)
    } else {
        json!(0)
    };
    let keys = match m.keys {
        KeyEncoding::Default('/') => json!({"name": "default"}),
        KeyEncoding::Default(s) => json!({"name": "default", "configuration": {"separator": s}}),
        KeyEncoding::V2(s) => json!({"name": "v2", "configuration": {"separator": s}}),
    };
    let value = json!({
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": m.chunk_shape}},
        "chunk_key_encoding": keys,
        "codecs": write_chain(&m.codecs, m.dtype.size()),
        "data_type": m.dtype.name(),
        "fill_value": zero,
        "node_type": "array",
        "shape": m.shape.dims(),
        "zarr_format": 3,
    });
    value.to_string().into_bytes()
}

fn write_chain(chain: &Chain, size: usize) -> Value {
    let mut list = Vec::new();
    if let Some(order) = &chain.order {
        list.push(json!({"name": "transpose", "configuration": {"order": order}}));
    }
    list.push(match &chain.array {
        ArrayBytes::Bytes(_) if size == 1 => json!({"name": "bytes"}),
        ArrayBytes::Bytes(Endian::Little) => json!({"name": "bytes", "configuration": {"endian": "little"}}),
        ArrayBytes::Bytes(Endian::Big) => json!({"name": "bytes", "configuration": {"endian": "big"}}),
        ArrayBytes::Sharding(s) => json!({"name": "sharding_indexed", "configuration": {
            "chunk_shape": s.chunk_shape,
            "codecs": write_chain(&s.codecs, size),
            "index_codecs": write_chain(&s.index_codecs, 8),
            "index_location": if s.index_at_start { "start" } else { "end" },
        }}),
    });
    list.extend(chain.bytes.iter().map(|c| match c {
        BytesCodec::Crc32c => json!({"name": "crc32c"}),
        BytesCodec::Zstd { level, checksum } => {
            json!({"name": "zstd", "configuration": {"level": level, "checksum": checksum}})
        }
    }));
    Value::Array(list)
}

#[cfg(test)]
mod tests {
    use tensor::DType;

    use super::*;

    fn base() -> Value {
        json!({
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [4, 6]}},
            "chunk_key_encoding": {"name": "default"},
            "codecs": [{"name": "sharding_indexed", "configuration": {
                "chunk_shape": [4, 6],
                "codecs": [{"name": "bytes", "configuration": {"endian": "little"}},
                           {"name": "zstd", "configuration": {"level": 3, "checksum": false}}],
                "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]}}],
            "data_type": "bfloat16", "fill_value": 0.0, "node_type": "array", "shape": [16, 6], "zarr_format": 3,
        })
    }

    fn read(v: &Value) -> Result<ArrayMeta, ZarrError> {
        parse(v.to_string().as_bytes())
    }

    #[test]
    fn what_orbax_writes_is_read_and_written_back() {
        let m = read(&base()).unwrap();
        assert_eq!((m.dtype, m.grid()), (DType::BF16, vec![4, 1]));
        assert_eq!(m.describe(), "zarr3 sharding[4, 6](bytes+zstd)");
        assert_eq!(parse(&write(&m)).unwrap(), m);
        for codecs in [
            json!([{"name": "transpose", "configuration": {"order": [1, 0]}}, {"name": "bytes", "configuration": {"endian": "big"}}, {"name": "crc32c"}]),
            json!(["bytes", {"name": "zstd", "configuration": {"level": 1, "checksum": true}}, "crc32c"]),
        ] {
            let mut v = base();
            v["codecs"] = codecs;
            let m = read(&v).unwrap();
            assert_eq!(parse(&write(&m)).unwrap(), m);
        }
    }

    #[test]
    fn two_transposes_make_one() {
        let mut v = base();
        v["shape"] = json!([2, 3, 4]);
        v["chunk_grid"]["configuration"]["chunk_shape"] = json!([2, 3, 4]);
        v["codecs"] = json!([{"name": "transpose", "configuration": {"order": [1, 2, 0]}},
                             {"name": "transpose", "configuration": {"order": [2, 1, 0]}}, "bytes"]);
        assert_eq!(read(&v).unwrap().codecs.order, Some(vec![0, 2, 1]));
    }

    #[test]
    fn unknown_things_are_refused_by_name() {
        let refuse = |f: &dyn Fn(&mut Value), name: &str| {
            let mut v = base();
            f(&mut v);
            let e = read(&v).unwrap_err().to_string();
            assert!(e.contains(name), "{e}");
        };
        for codec in ["gzip", "blosc", "bitround"] {
            refuse(&|v| v["codecs"] = json!(["bytes", {"name": codec, "configuration": {}}]), codec);
        }
        refuse(&|v| v["data_type"] = json!("float8_e4m3fn"), "float8_e4m3fn");
        refuse(&|v| v["chunk_grid"]["name"] = json!("rectangular"), "rectangular");
        refuse(&|v| v["future"] = json!({"a": 1}), "future");
        refuse(&|v| v["storage_transformers"] = json!([{"name": "x"}]), "storage_transformers");
        refuse(&|v| v["codecs"] = json!(["bytes", "zstd", "zstd"]), "zstd twice");
        refuse(&|v| v["codecs"] = json!(["crc32c", "bytes"]), "out of place");
        refuse(&|v| v["codecs"].as_array_mut().unwrap().push(json!("crc32c")), "around shards");
        refuse(&|v| v["codecs"] = json!([]), "no codec");
        let mut v = base();
        v["future"] = json!({"must_understand": false});
        assert!(read(&v).is_ok());
    }

    #[test]
    fn impossible_values_are_errors() {
        let refuse = |key: &str, value: Value| {
            let mut v = base();
            v[key] = value;
            assert!(read(&v).is_err(), "{key}");
        };
        refuse("shape", json!([-1, 6]));
        refuse("shape", json!([16]));
        refuse("shape", json!([1u64 << 40, 1u64 << 40]));
        refuse("shape", json!("16"));
        refuse("zarr_format", json!(2));
        refuse("node_type", json!("group"));
        for chunk in [json!([0, 6]), json!([1u64 << 60, 1u64 << 60]), json!([4, 3]), json!([4])] {
            refuse("chunk_grid", json!({"name": "regular", "configuration": {"chunk_shape": chunk}}));
        }
        assert!(parse(b"[").is_err());
        assert!(parse(b"{}").is_err());
    }
}
