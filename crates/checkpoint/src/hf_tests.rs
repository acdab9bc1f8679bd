use super::*;

/// A file of one-byte tensors of these names.
fn bytes_of(names: &[&str]) -> Vec<u8> {
    let entries: Vec<String> = names
        .iter()
        .enumerate()
        .map(|(i, n)| format!(r#""{n}":{{"dtype":"U8","shape":[1],"data_offsets":[{i},{}]}}"#, i + 1))
        .collect();
    let header = format!("{{{}}}", entries.join(","));
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend((0..names.len()).map(|i| i as u8 + 10));
    bytes
}

struct Dir(tempfile::TempDir);

impl Dir {
    fn new() -> Self {
        Dir(tempfile::tempdir().unwrap())
    }

    fn put(self, name: &str, bytes: impl AsRef<[u8]>) -> Self {
        fs::write(self.0.path().join(name), bytes).unwrap();
        self
    }

    fn index(self, entries: &[(&str, &str)]) -> Self {
        let map: Vec<String> = entries.iter().map(|(t, s)| format!("{t:?}:{s:?}")).collect();
        self.put(INDEX_FILE, format!(r#"{{"metadata":{{"total_size":3}},"weight_map":{{{}}}}}"#, map.join(",")))
    }

    fn open(&self) -> Result<HfDirectory, HfError> {
        HfDirectory::open(self.0.path())
    }

    /// The message, with the directory's own path left out.
    fn refused(&self) -> String {
        let text = self.open().unwrap_err().to_string();
        text.replace(&format!("{}/", self.0.path().display()), "").replace(&self.0.path().display().to_string(), "DIR")
    }
}

#[test]
fn a_single_file_with_configuration() {
    let dir = Dir::new()
        .put(SINGLE_FILE, bytes_of(&["b", "a"]))
        .put(CONFIG_FILE, r#"{"model_type":"x","z":1,"a":2}"#)
        .put(GENERATION_CONFIG_FILE, r#"{"eos_token_id":[1,106]}"#);
    let hf = dir.open().unwrap();
    assert_eq!(hf.entries().map(|t| t.name.as_str()).collect::<Vec<_>>(), ["a", "b"]);
    assert_eq!(&*hf.tensor("b").unwrap().bytes, [10]);
    assert_eq!(hf.config().unwrap()["model_type"], "x");
    assert_eq!(hf.generation_config().unwrap()["eos_token_id"][1], 106);
    assert!(hf.tensor("c").is_none() && hf.entry("a").is_some());
}

#[test]
fn a_file_by_its_own_path() {
    let dir = Dir::new().put("golden.safetensors", bytes_of(&["logits"]));
    let hf = HfDirectory::open(&dir.0.path().join("golden.safetensors")).unwrap();
    assert_eq!(hf.len(), 1);
    assert!(hf.config().is_none());
}

#[test]
fn shards_and_unindexed_tensors() {
    let dir = Dir::new().put("s1", bytes_of(&["a"])).put("s2", bytes_of(&["c", "b", "extra"])).index(&[
        ("a", "s1"),
        ("b", "s2"),
        ("c", "s2"),
    ]);
    let hf = dir.open().unwrap();
    assert_eq!(hf.files().len(), 2);
    assert_eq!(&*hf.tensor("b").unwrap().bytes, [11]);
    assert_eq!(hf.unindexed(), ["extra"]);
    assert!(hf.tensor("extra").is_some());
}

#[test]
fn an_index_may_name_the_single_file() {
    let dir = Dir::new().put(SINGLE_FILE, bytes_of(&["a"])).index(&[("a", SINGLE_FILE)]);
    assert_eq!(dir.open().unwrap().len(), 1);
}

#[test]
fn links_to_files_elsewhere_are_followed() {
    let blobs = Dir::new().put("0123", bytes_of(&["a"])).put("4567", "{}");
    let dir = Dir::new();
    for (blob, name) in [("0123", SINGLE_FILE), ("4567", CONFIG_FILE)] {
        std::os::unix::fs::symlink(blobs.0.path().join(blob), dir.0.path().join(name)).unwrap();
    }
    assert_eq!(dir.open().unwrap().len(), 1);
}

#[test]
fn missing_pieces() {
    assert_eq!(Dir::new().refused(), "DIR has neither model.safetensors nor model.safetensors.index.json");
    assert_eq!(
        Dir::new().put("model.gguf", "").put("x.txt", "").refused(),
        "DIR has neither model.safetensors nor model.safetensors.index.json; it has model.gguf"
    );
    assert_eq!(
        HfDirectory::open(Path::new("/no/such/place")).unwrap_err().to_string(),
        "/no/such/place does not exist"
    );
    assert_eq!(
        Dir::new().put("s1", bytes_of(&["a"])).index(&[("a", "s1"), ("b", "s2"), ("c", "s3")]).refused(),
        "model.safetensors.index.json names files that are missing: s2, s3"
    );
    assert_eq!(
        Dir::new()
            .put("s1", bytes_of(&["a"]))
            .put("s2", bytes_of(&["b"]))
            .index(&[("a", "s2"), ("b", "s2"), ("c", "s1")])
            .refused(),
        "model.safetensors.index.json names tensors that are not where it says: a in s2, c in s1"
    );
}

#[test]
fn contradictions() {
    assert_eq!(
        Dir::new()
            .put("s1", bytes_of(&["a", "b"]))
            .put("s2", bytes_of(&["b"]))
            .index(&[("a", "s1"), ("b", "s2")])
            .refused(),
        "DIR: tensor \"b\" is in both s1 and s2"
    );
    assert_eq!(
        Dir::new().put("s1", bytes_of(&["a"])).put(SINGLE_FILE, bytes_of(&["a"])).index(&[("a", "s1")]).refused(),
        "DIR has both model.safetensors and an index of other files (s1, ...); remove the one that is stale"
    );
    assert_eq!(
        Dir::new().put("s1", bytes_of(&["a"])).index(&[("a", "s1"), ("a", "s1")]).refused(),
        "model.safetensors.index.json: tensor \"a\" occurs twice in weight_map"
    );
}

#[test]
fn shard_names_stay_inside() {
    for name in ["../s1", "/etc/passwd", "sub/s1", "..", ".", "", "c:\\s1", "C:s1"] {
        assert_eq!(
            Dir::new().put("s1", bytes_of(&["a"])).index(&[("a", name)]).refused(),
            format!("model.safetensors.index.json: tensor \"a\" is mapped to {name:?}, which is no plain file name")
        );
    }
}

#[test]
fn bad_json_names_the_file() {
    let dir = Dir::new().put(SINGLE_FILE, bytes_of(&["a"])).put(CONFIG_FILE, "{");
    assert_eq!(dir.refused(), "config.json: EOF while parsing an object at line 1 column 1");
    assert_eq!(
        Dir::new().put(INDEX_FILE, "{}").refused(),
        "model.safetensors.index.json: missing field `weight_map` at line 1 column 2"
    );
    assert_eq!(
        Dir::new().put(INDEX_FILE, r#"{"weight_map":{"a":1}}"#).refused(),
        "model.safetensors.index.json: invalid type: integer `1`, expected a string at line 1 column 20"
    );
    let dir = Dir::new().put(SINGLE_FILE, bytes_of(&["a"]));
    fs::File::create(dir.0.path().join(CONFIG_FILE)).unwrap().set_len(MAX_JSON_LEN + 1).unwrap();
    assert_eq!(dir.refused(), format!("config.json has {} bytes, more than the limit of 67108864", MAX_JSON_LEN + 1));
}

#[test]
fn damaged_shards_name_the_file() {
    let mut bytes = bytes_of(&["a", "b"]);
    bytes.pop();
    assert_eq!(
        Dir::new().put("s1", &bytes).index(&[("a", "s1")]).refused(),
        "s1: tensor \"b\": its data ends at offset 2, but the file has only 1 bytes of data"
    );
}

#[test]
fn an_unfinished_write_is_refused() {
    let dir = Dir::new().put(SINGLE_FILE, bytes_of(&["a"])).put(crate::commit::INCOMPLETE_MARKER, "");
    assert_eq!(dir.refused(), "DIR is an unfinished or interrupted write, not a complete checkpoint; write it again");
}
