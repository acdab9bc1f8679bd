use proptest::prelude::*;

use super::*;

/// A file with this header text and that many data bytes.
fn file(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend((0..data).map(|i| i as u8));
    bytes
}

#[track_caller]
fn refuse(header: &str, data: usize, message: &str) {
    assert_eq!(Header::parse(&file(header, data)).unwrap_err().to_string(), message);
}

#[test]
fn tensors_come_in_data_order() {
    let bytes = file(
        r#"{"__metadata__":{"format":"pt","x":"y"},
            "b":{"dtype":"BF16","shape":[2,3],"data_offsets":[4,16],"new_field":[{}]},
            "none":{"dtype":"I64","shape":[0,5],"data_offsets":[4,4]},
            "a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}     "#,
        16,
    );
    let h = Header::parse(&bytes).unwrap();
    let names: Vec<_> = h.tensors.iter().map(|t| t.name.as_str()).collect();
    assert_eq!(names, ["a", "none", "b"]);
    assert_eq!(h.tensors[2].shape.dims(), [2, 3]);
    assert_eq!(h.tensors[2].bytes(), 12);
    assert_eq!(h.tensors[2].range, h.data_start + 4..h.data_start + 16);
    assert_eq!(h.metadata, [("format".to_owned(), "pt".to_owned()), ("x".to_owned(), "y".to_owned())]);
}

#[test]
fn an_empty_file_of_tensors_is_valid() {
    assert!(Header::parse(&file("{}", 0)).unwrap().tensors.is_empty());
}

#[test]
fn views_read_the_right_bytes() {
    let tmp = tempfile::tempdir().unwrap();
    let path = tmp.path().join("m.safetensors");
    let header =
        r#"{"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},"b":{"dtype":"U8","shape":[2],"data_offsets":[3,5]}}"#;
    fs_err::write(&path, file(header, 5)).unwrap();
    let f = SafetensorsFile::open(&path).unwrap();
    assert_eq!(&*f.tensor("a").unwrap().bytes, [0, 1, 2]);
    assert_eq!(&*f.tensor("b").unwrap().bytes, [3, 4]);
    assert!(f.tensor("c").is_none());
}

#[test]
fn errors_name_the_file() {
    let tmp = tempfile::tempdir().unwrap();
    let path = tmp.path().join("bad.safetensors");
    fs_err::write(&path, [1, 2, 3]).unwrap();
    let e = SafetensorsFile::open(&path).unwrap_err().to_string();
    assert_eq!(e, format!("{}: the file has 3 bytes, too few for a safetensors header", path.display()));
    assert!(SafetensorsFile::open(&tmp.path().join("gone")).unwrap_err().to_string().contains("gone"));
}

#[test]
fn header_lengths() {
    let mut beyond = 1000u64.to_le_bytes().to_vec();
    beyond.extend_from_slice(b"{}");
    assert_eq!(
        Header::parse(&beyond).unwrap_err().to_string(),
        "the header claims 1000 bytes, but only 2 follow; the file is truncated or not safetensors"
    );
    let huge = u64::MAX.to_le_bytes();
    assert!(matches!(Header::parse(&huge), Err(FormatError::HeaderBeyondFile { header: u64::MAX, available: 0 })));
    let mut large = 100_000_001u64.to_le_bytes().to_vec();
    large.resize(100_000_009, b' ');
    assert_eq!(
        Header::parse(&large).unwrap_err().to_string(),
        "the header claims 100000001 bytes, more than the format's limit of 100000000"
    );
}

#[test]
fn bad_json() {
    refuse("", 0, "bad header: it does not begin with '{'");
    refuse(" {}", 0, "bad header: it does not begin with '{'");
    refuse("[]", 0, "bad header: it does not begin with '{'");
    refuse("{} x", 0, "bad header: trailing characters at line 1 column 4");
    refuse(r#"{"a":"#, 0, "bad header: EOF while parsing a value at line 1 column 5");
    refuse(
        r#"{"__metadata__":{"a":1}}"#,
        0,
        "bad header: invalid type: integer `1`, expected a string at line 1 column 22",
    );
    let deep = format!("{{\"a\":{{\"dtype\":{}", "[".repeat(100_000));
    assert!(matches!(Header::parse(&file(&deep, 0)), Err(FormatError::Json(_))));
    let long = format!(r#"{{"{}":1}}"#, "x".repeat(10_000));
    assert!(Header::parse(&file(&long, 0)).unwrap_err().to_string().len() < 600);
}

#[test]
fn bad_entries_name_their_tensor() {
    refuse(
        r#"{"w":3}"#,
        0,
        "bad header: invalid type: integer `3`, expected an object with dtype, shape and data_offsets for tensor \"w\" at line 1 column 6",
    );
    refuse(
        r#"{"w":{"dtype":"F32","shape":[1]}}"#,
        0,
        "bad header: tensor \"w\" has no field \"data_offsets\" at line 1 column 32",
    );
    refuse(
        r#"{"w":{"dtype":"F32","dtype":"F32"}}"#,
        0,
        "bad header: tensor \"w\" has two fields \"dtype\" at line 1 column 34",
    );
    let e = Header::parse(&file(r#"{"w":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}"#, 4)).unwrap_err();
    assert!(e.to_string().starts_with("bad header: tensor \"w\": invalid value: integer `-1`, expected u64"), "{e}");
    let many = format!(r#"{{"w":{{"dtype":"F32","shape":[{}1],"data_offsets":[0,4]}}}}"#, "1,".repeat(1000));
    let e = Header::parse(&file(&many, 4)).unwrap_err();
    assert!(e.to_string().starts_with("bad header: tensor \"w\": more than 64 dimensions"), "{e}");
}

#[test]
fn names_are_unique() {
    let t = r#"{"dtype":"U8","shape":[1],"data_offsets":[0,1]}"#;
    refuse(&format!(r#"{{"w":{t},"w":{t}}}"#), 1, "tensor \"w\" occurs twice in the header");
    // The same name in two spellings.
    refuse(&format!(r#"{{"w":{t},"\u0077":{t}}}"#), 1, "tensor \"w\" occurs twice in the header");
    refuse(r#"{"__metadata__":{},"__metadata__":{}}"#, 0, "tensor \"__metadata__\" occurs twice in the header");
}

#[test]
fn unknown_dtypes() {
    refuse(
        r#"{"w":{"dtype":"F8_E4M3","shape":[1],"data_offsets":[0,1]}}"#,
        1,
        "tensor \"w\" has the unknown dtype \"F8_E4M3\"",
    );
}

#[test]
fn sizes() {
    refuse(
        r#"{"w":{"dtype":"F32","shape":[2,2],"data_offsets":[0,12]}}"#,
        12,
        "tensor \"w\": float32 [2, 2] needs 16 bytes, but its offsets give 12",
    );
    refuse(
        r#"{"w":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]}}"#,
        4,
        "tensor \"w\": shape [4294967296, 4294967296] is too large for this machine's address space",
    );
    refuse(
        r#"{"w":{"dtype":"F32","shape":[4611686018427387905],"data_offsets":[0,4]}}"#,
        4,
        "tensor \"w\": shape [4611686018427387905] is too large for this machine's address space",
    );
    refuse(
        r#"{"w":{"dtype":"U8","shape":[1000000000000],"data_offsets":[0,1000000000000]}}"#,
        4,
        "tensor \"w\": its data ends at offset 1000000000000, but the file has only 4 bytes of data",
    );
}

#[test]
fn offsets() {
    let two = |a: &str, b: &str| {
        format!(
            r#"{{"a":{{"dtype":"U8","shape":[4],"data_offsets":{a}}},"b":{{"dtype":"U8","shape":[4],"data_offsets":{b}}}}}"#
        )
    };
    refuse(&two("[4,0]", "[4,8]"), 8, "tensor \"a\": its data ends at offset 0, before it begins at 4");
    refuse(
        &two("[0,4]", "[3,7]"),
        8,
        "tensor \"b\" begins at offset 3, inside the data of tensor \"a\", which ends at 4",
    );
    refuse(
        &two("[0,4]", "[0,4]"),
        4,
        "tensor \"b\" begins at offset 0, inside the data of tensor \"a\", which ends at 4",
    );
    refuse(&two("[0,4]", "[6,10]"), 10, "2 bytes before tensor \"b\" (offset 4) belong to no tensor");
    refuse(&two("[1,5]", "[5,9]"), 9, "1 bytes before tensor \"a\" (offset 0) belong to no tensor");
    refuse(&two("[0,4]", "[4,8]"), 11, "the file has 3 bytes after the data of its last tensor");
    refuse(&two("[0,4]", "[4,8]"), 7, "tensor \"b\": its data ends at offset 8, but the file has only 7 bytes of data");
    refuse("{}", 1, "the file has 1 bytes after the data of its last tensor");
}

const SAMPLE: &str = r#"{"__metadata__":{"format":"pt"},"m.b":{"dtype":"BF16","shape":[2,3],"data_offsets":[4,16]},"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}} "#;

proptest! {
    #[test]
    fn damaged_headers_never_panic(at in 0..180usize, with in any::<u8>(), cut in 0..200usize) {
        let mut bytes = file(SAMPLE, 16);
        let at = at % bytes.len();
        bytes[at] = with;
        let _ = Header::parse(&bytes);
        bytes.truncate(cut);
        let _ = Header::parse(&bytes);
    }

    #[test]
    fn whatever_is_accepted_lies_within_the_file(header in "\\{(\"[ab]\":\\{\"dtype\":\"(U8|F32)\",\"shape\":\\[[0-9]\\],\"data_offsets\":\\[[0-9],[0-9]\\]\\},?){0,3}\\}", data in 0..12usize) {
        let bytes = file(&header, data);
        if let Ok(h) = Header::parse(&bytes) {
            let total: u64 = h.tensors.iter().map(TensorEntry::bytes).sum();
            prop_assert_eq!(total, data as u64);
            prop_assert!(h.tensors.iter().all(|t| t.range.end <= bytes.len() as u64));
        }
    }
}
