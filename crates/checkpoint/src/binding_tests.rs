use fs_err as fs;

use super::*;
use crate::hf::SINGLE_FILE;

/// A directory of zero tensors: name, dtype as safetensors spells it, shape.
fn dir_of(tensors: &[(&str, &str, &[usize])]) -> (tempfile::TempDir, HfDirectory) {
    let mut at = 0;
    let mut entries = Vec::new();
    for (name, dtype, shape) in tensors {
        let end = at + shape.iter().product::<usize>() * DType::from_safetensors(dtype).unwrap().size();
        entries.push(format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":[{at},{end}]}}"#));
        at = end;
    }
    let header = format!("{{{}}}", entries.join(","));
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.resize(bytes.len() + at, 0);
    let tmp = tempfile::tempdir().unwrap();
    fs::write(tmp.path().join(SINGLE_FILE), bytes).unwrap();
    let dir = HfDirectory::open(tmp.path()).unwrap();
    (tmp, dir)
}

fn expected() -> Vec<Expected> {
    [("embed.weight", &[4, 2][..]), ("layers.0.up.weight", &[3, 2]), ("norm.weight", &[2])]
        .map(|(name, shape)| Expected { name: name.to_owned(), shape: Shape::from(shape), dtype: None })
        .to_vec()
}

fn rules() -> NameRules {
    let rule = |label: &str, patterns: &[&str]| UnusedRule {
        label: label.to_owned(),
        patterns: patterns.iter().map(|p| (*p).to_owned()).collect(),
    };
    NameRules {
        prefixes: ["model.language_model.", "model.", "language_model.model."].map(str::to_owned).to_vec(),
        unused: vec![
            rule("tower", &["**.tower.**"]),
            rule("spare", &["layers.*.k.weight"]),
            rule("head", &["**.head"]),
        ],
    }
}

fn model(prefix: &str) -> Vec<(String, &'static str, &'static [usize])> {
    vec![
        (format!("{prefix}embed.weight"), "BF16", &[4, 2]),
        (format!("{prefix}layers.0.up.weight"), "BF16", &[3, 2]),
        (format!("{prefix}norm.weight"), "F32", &[2]),
    ]
}

fn bind_model(tensors: &[(String, &str, &[usize])]) -> Result<Binding, String> {
    let tensors: Vec<_> = tensors.iter().map(|(n, d, s)| (n.as_str(), *d, *s)).collect();
    let (tmp, dir) = dir_of(&tensors);
    bind(&dir, &expected(), &rules()).map_err(|e| e.to_string().replace(&tmp.path().display().to_string(), "DIR"))
}

#[test]
fn every_prefix_gives_the_same_tensors() {
    for prefix in ["", "model.", "model.language_model.", "language_model.model."] {
        let b = bind_model(&model(prefix)).unwrap();
        assert_eq!(b.report.prefix, prefix);
        assert_eq!(b.tensors.keys().collect::<Vec<_>>(), ["embed.weight", "layers.0.up.weight", "norm.weight"]);
        assert_eq!(b.get("norm.weight").unwrap().name, format!("{prefix}norm.weight"));
        assert_eq!(b.report.used, Count { tensors: 3, bytes: 16 + 12 + 8 });
        assert_eq!(b.report.dtypes[&DType::BF16], Count { tensors: 2, bytes: 28 });
        assert!(b.report.missing.is_empty() && b.report.unused_unexpected.is_empty());
    }
}

#[test]
fn the_rest_is_accounted_for() {
    let mut m = model("model.language_model.");
    m.push(("model.tower.layers.0.up.weight".into(), "F32", &[5]));
    m.push(("model.tower.x".into(), "BF16", &[5]));
    m.push(("model.language_model.layers.1.k.weight".into(), "BF16", &[2, 2]));
    m.push(("model.language_model.surprise".into(), "I64", &[3]));
    m.push(("head".into(), "BF16", &[4, 2]));
    let r = bind_model(&m).unwrap().report;
    assert_eq!(
        r.unused_expected,
        [
            ("tower".to_owned(), Count { tensors: 2, bytes: 30 }),
            ("spare".to_owned(), Count { tensors: 1, bytes: 8 }),
            ("head".to_owned(), Count { tensors: 1, bytes: 16 }),
        ]
    );
    assert_eq!(r.unused_unexpected, [("model.language_model.surprise".to_owned(), 24)]);
}

#[test]
fn every_problem_is_listed() {
    let m = vec![("model.embed.weight".to_owned(), "I32", &[4, 2][..]), ("model.other".to_owned(), "F32", &[1])];
    assert_eq!(
        bind_model(&m).unwrap_err(),
        "DIR does not fit the model; missing (2): model.layers.0.up.weight, model.norm.weight; unusable (1): \
         model.embed.weight is int32, expected bfloat16, float16 or float32"
    );
    let mut m = model("");
    m[0].2 = &[2, 4];
    m[2].2 = &[3];
    assert_eq!(
        bind_model(&m).unwrap_err(),
        "DIR does not fit the model; unusable (2): embed.weight has shape [2, 4], expected [4, 2], \
         norm.weight has shape [3], expected [2]"
    );
}

#[test]
fn prefixes_do_not_mix() {
    let mut m = model("model.");
    m[2].0 = "model.language_model.norm.weight".into();
    assert_eq!(
        bind_model(&m).unwrap_err(),
        "DIR mixes prefixes: 1 like model.language_model.norm.weight, 2 like model.embed.weight"
    );
    let mut m = model("model.");
    m.push(("norm.weight".into(), "F32", &[2]));
    assert_eq!(
        bind_model(&m).unwrap_err(),
        "DIR holds one tensor under two prefixes: model.norm.weight and norm.weight"
    );
}

#[test]
fn foreign_directories() {
    assert_eq!(
        bind_model(&[("bert.x".to_owned(), "F32", &[1])]).unwrap_err(),
        "DIR holds none of the 3 tensors that the model needs, such as \"embed.weight\" under any of the known \
         prefixes; it holds \"bert.x\""
    );
    assert!(bind_model(&[]).unwrap_err().ends_with("it holds no tensors at all"));
}

#[test]
fn patterns() {
    for (pattern, name, yes) in [
        ("a.b", "a.b", true),
        ("a.b", "a.b.c", false),
        ("a.b.c", "a.b", false),
        ("a.*.c", "a.7.c", true),
        ("a.*.c", "a.c", false),
        ("**.c", "c", true),
        ("**.c", "a.b.c", true),
        ("**.c", "a.b.cc", false),
        ("a.**", "a", true),
        ("a.**", "a.b.c", true),
        ("**.t.**", "m.t.x.y", true),
        ("**.t.**", "m.x.y", false),
        ("**.a.b.**.c", "a.x.a.b.a.c.c", true),
        ("**", "", true),
        ("*", "a.b", false),
    ] {
        assert_eq!(matches(pattern, name), yes, "{pattern} on {name}");
    }
    let hostile = "a.".repeat(20_000);
    assert!(!matches("**.a.**.a.**.a.**.b", &hostile));
}
