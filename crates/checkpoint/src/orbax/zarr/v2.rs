//! `.zarray`.

use serde_json::{Value, json};
use tensor::DType;

use super::codec::{ArrayBytes, BytesCodec, Chain, Endian};
use super::json::{ZarrError, bad, extents, field, object, text, version};
use super::{ArrayMeta, KeyEncoding};

/// The compressors of version 2 that are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compressor2 {
    /// Plain elements.
    None,
    /// One zstd frame per chunk.
    Zstd(i32),
}

pub(super) fn parse(bytes: &[u8]) -> Result<ArrayMeta, ZarrError> {
    let o = object(bytes)?;
    version(&o, 2)?;
    let (dtype, endian) = dtype(field(&o, "dtype")?)?;
    let shape = extents(&o, "shape")?;
    if let Some(filter) = o.get("filters").and_then(Value::as_array).and_then(|l| l.first()) {
        let name = filter.get("id").and_then(Value::as_str).unwrap_or("?").to_owned();
        return Err(ZarrError::Unsupported { what: "filter", name });
    }
    let order = match text(&o, "order")? {
        "C" => None,
        "F" => Some((0..shape.len()).rev().collect()),
        other => return Err(ZarrError::Value { key: "order", why: other.to_owned() }),
    };
    let bytes = match field(&o, "compressor")? {
        Value::Null => vec![],
        c => match c.get("id").and_then(Value::as_str).ok_or_else(|| bad("compressor", c))? {
            "zstd" => {
                let level = c.get("level").and_then(Value::as_i64).and_then(|l| i32::try_from(l).ok()).unwrap_or(0);
                vec![BytesCodec::Zstd { level, checksum: false }]
            }
            name => return Err(ZarrError::Unsupported { what: "compressor", name: name.to_owned() }),
        },
    };
    let separator = match o.get("dimension_separator") {
        None | Some(Value::Null) => '.',
        Some(s) => match s.as_str() {
            Some("/") => '/',
            Some(".") => '.',
            _ => return Err(bad("dimension_separator", s)),
        },
    };
    ArrayMeta {
        version: 2,
        shape: shape.into(),
        dtype,
        chunk_shape: extents(&o, "chunks")?,
        keys: KeyEncoding::V2(separator),
        codecs: Chain { order, array: ArrayBytes::Bytes(endian), bytes },
    }
    .checked()
}

fn dtype(v: &Value) -> Result<(DType, Endian), ZarrError> {
    let name = v.as_str().ok_or_else(|| bad("dtype", v))?;
    if name == "bfloat16" {
        return Ok((DType::BF16, Endian::Little));
    }
    let unknown = || ZarrError::Unsupported { what: "data type", name: name.to_owned() };
    let code = name.get(1..).ok_or_else(unknown)?;
    let dtype = DType::ALL.into_iter().find(|&d| code_of(d) == Some(code)).ok_or_else(unknown)?;
    let endian = match (&name[..1], dtype.size()) {
        ("|" | "<" | ">", 1) | ("<", _) => Endian::Little,
        (">", _) => Endian::Big,
        _ => return Err(unknown()),
    };
    Ok((dtype, endian))
}

fn code_of(d: DType) -> Option<&'static str> {
    Some(match d {
        DType::Bool => "b1",
        DType::I8 => "i1",
        DType::I16 => "i2",
        DType::I32 => "i4",
        DType::I64 => "i8",
        DType::U8 => "u1",
        DType::U16 => "u2",
        DType::U32 => "u4",
        DType::U64 => "u8",
        DType::F16 => "f2",
        DType::F32 => "f4",
        DType::F64 => "f8",
        // Has no numpy code.
        DType::BF16 => return None,
    })
}

pub(super) fn write(m: &ArrayMeta) -> Result<Vec<u8>, ZarrError> {
    let cannot = |name: String| ZarrError::Unsupported { what: "codec sequence in version 2", name };
    let compressor = match m.codecs.bytes.as_slice() {
        [] => Value::Null,
        [BytesCodec::Zstd { level, .. }] => json!({"id": "zstd", "level": level}),
        _ => return Err(cannot(m.codecs.to_string())),
    };
    let reversed: Vec<usize> = (0..m.shape.rank()).rev().collect();
    let order = match &m.codecs.order {
        None => "C",
        Some(o) if *o == reversed => "F",
        Some(_) => return Err(cannot(m.codecs.to_string())),
    };
    let prefix = match (&m.codecs.array, m.dtype.size()) {
        (ArrayBytes::Bytes(_), 1) => "|",
        (ArrayBytes::Bytes(Endian::Little), _) => "<",
        (ArrayBytes::Bytes(Endian::Big), _) => ">",
        (ArrayBytes::Sharding(_), _) => return Err(cannot(m.codecs.to_string())),
    };
    let dtype = code_of(m.dtype).map_or_else(|| "bfloat16".to_owned(), |code| format!("{prefix}{code}"));
    let (KeyEncoding::V2(separator) | KeyEncoding::Default(separator)) = m.keys;
    let value = json!({
        "chunks": m.chunk_shape,
        "compressor": compressor,
        "dimension_separator": separator,
        "dtype": dtype,
        "fill_value": null,
        "filters": null,
        "order": order,
        "shape": m.shape.dims(),
        "zarr_format": 2,
    });
    Ok(value.to_string().into_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn base() -> Value {
        json!({"chunks": [4, 2], "compressor": {"id": "zstd", "level": 1}, "dimension_separator": ".",
               "dtype": "<f4", "fill_value": null, "filters": null, "order": "C", "shape": [5, 2], "zarr_format": 2})
    }

    #[test]
    fn every_dtype_is_written_and_read() {
        for dtype in DType::ALL {
            let mut m = parse(base().to_string().as_bytes()).unwrap();
            m.dtype = dtype;
            assert_eq!(parse(&write(&m).unwrap()).unwrap(), m, "{dtype}");
        }
        let mut v = base();
        v["dtype"] = json!(">i2");
        v["order"] = json!("F");
        v["compressor"] = Value::Null;
        let m = parse(v.to_string().as_bytes()).unwrap();
        assert_eq!(m.codecs.order, Some(vec![1, 0]));
        assert_eq!(m.codecs.array, ArrayBytes::Bytes(Endian::Big));
        assert_eq!(parse(&write(&m).unwrap()).unwrap(), m);
    }

    #[test]
    fn unknown_things_are_refused_by_name() {
        for (key, value, name) in [
            ("compressor", json!({"id": "blosc"}), "blosc"),
            ("compressor", json!({"id": "gzip"}), "gzip"),
            ("filters", json!([{"id": "delta"}]), "delta"),
            ("dtype", json!("<c8"), "<c8"),
            ("dtype", json!("é"), "é"),
            ("dtype", json!("|f4"), "|f4"),
            ("order", json!("K"), "K"),
        ] {
            let mut v = base();
            v[key] = value;
            let e = parse(v.to_string().as_bytes()).unwrap_err().to_string();
            assert!(e.contains(name), "{e}");
        }
    }
}
