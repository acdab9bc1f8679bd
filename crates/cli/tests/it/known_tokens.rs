//! What is publicly known of Gemma 4's tokenizer and chat format, token by token.
//!
//! `LAPIDARY_TOKENIZER_DIR` names a directory with the tokenizer.json: that of a checkpoint, or the one that `cargo xtask tokenizer`
//! makes.

// What is left out is worth seeing with --nocapture.
#![allow(clippy::print_stderr)]

use std::path::{Path, PathBuf};

use engine::data::Tokenizer;
use serde_json::{Value, json};

use super::lapidary;

/// Control tokens.
const CONTROL: [(i64, &str); 24] = [
    (0, "<pad>"),
    (1, "<eos>"),
    (2, "<bos>"),
    (3, "<unk>"),
    (4, "<mask>"),
    (46, "<|tool>"),
    (47, "<tool|>"),
    (48, "<|tool_call>"),
    (49, "<tool_call|>"),
    (50, "<|tool_response>"),
    (51, "<tool_response|>"),
    (52, "<|\"|>"),
    (98, "<|think|>"),
    (100, "<|channel>"),
    (101, "<channel|>"),
    (105, "<|turn>"),
    (106, "<turn|>"),
    (255_999, "<|image>"),
    (256_000, "<|audio>"),
    (258_880, "<|image|>"),
    (258_881, "<|audio|>"),
    (258_882, "<image|>"),
    (258_883, "<audio|>"),
    (258_884, "<|video|>"),
];

/// The directory, if one is named. One that is named must be there.
fn directory() -> Option<PathBuf> {
    let Some(dir) = std::env::var_os("LAPIDARY_TOKENIZER_DIR").map(PathBuf::from) else {
        eprintln!("skipped: LAPIDARY_TOKENIZER_DIR names no tokenizer; `cargo xtask tokenizer` makes one");
        return None;
    };
    let file = dir.join("tokenizer.json");
    assert!(file.is_file(), "LAPIDARY_TOKENIZER_DIR: there is no {}", file.display());
    Some(dir)
}

/// A small model with this tokenizer, to ask what it would see.
struct Asked {
    dir: tempfile::TempDir,
    model: String,
    tokenizer: PathBuf,
}

impl Asked {
    fn new(tokenizer: PathBuf) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let model = dir.path().join("model").to_str().unwrap().to_owned();
        let words =
            ["vocab_size=262144", "vocab_size_per_layer_input=262144", "base_emb_dim=8", "override_model_config=true"];
        lapidary(&[&["init", &model, "model_name=tiny-e2b"][..], &words].concat()).exits(0);
        Asked { dir, model, tokenizer }
    }

    /// The text and ids of every prompt.
    fn prompts(&self, extra: &[&str]) -> Vec<(String, Vec<i64>)> {
        let tokenizer = self.tokenizer.to_str().unwrap();
        let args = ["generate", &self.model, "--tokenizer", tokenizer, "--print-prompt", "--json"];
        let shown = lapidary(&[&args[..], extra].concat()).exits(0).json();
        let one = |p: &Value| {
            let ids = p["prompt_tokens"].as_array().unwrap().iter().map(|id| id.as_i64().unwrap()).collect();
            (p["prompt"].as_str().unwrap().to_owned(), ids)
        };
        shown["prompts"].as_array().unwrap().iter().map(one).collect()
    }

    /// The ids of texts that are continued.
    fn raw(&self, texts: &[&str]) -> Vec<Vec<i64>> {
        let mut args = vec!["--raw"];
        texts.iter().for_each(|text| args.extend(["--prompt", text]));
        self.prompts(&args).into_iter().map(|(_, ids)| ids).collect()
    }

    /// The text and ids of a conversation that the model is to answer.
    fn chat(&self, messages: &Value) -> (String, Vec<i64>) {
        let template = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/text/chat_template.jinja");
        let file = self.dir.path().join("messages.json");
        fs_err::write(&file, messages.to_string()).unwrap();
        let args = ["--messages", file.to_str().unwrap(), "--chat-template", template.to_str().unwrap()];
        self.prompts(&args).remove(0)
    }
}

#[test]
fn the_real_tokenizer_gives_the_known_tokens() {
    let Some(tokenizer) = directory() else { return };
    let asked = Asked::new(tokenizer);
    conversations(&asked);
    texts(&asked);
    control_tokens(&asked);
    ways_back(&asked);
}

fn conversations(asked: &Asked) {
    let question = json!({"role": "user", "content": "What is the capital of France?"});
    let answer = json!({"role": "assistant", "content": "The capital of France is Paris."});
    let (text, ids) = asked.chat(&json!([question, answer]));
    assert_eq!(text.matches("<bos>").count(), 1, "{text}");
    // Published of google/gemma-4-E2B-it.
    assert_eq!(
        ids,
        [
            2, 105, 2364, 107, 3689, 563, 506, 5279, 529, 7001, 236_881, 106, 107, 105, 4368, 107, 818, 5279, 529,
            7001, 563, 9079, 236_761, 106, 107, 105, 4368, 107
        ]
    );
    let (_, first) = asked.chat(&json!([question]));
    assert_eq!(first, [&ids[..13], &[105, 4368, 107]].concat());
    let (_, typed) = asked.chat(&json!([{"role": "user", "content": "hello"}]));
    assert_eq!(typed, [2, 105, 2364, 107, 23391, 106, 107, 105, 4368, 107]);
}

fn texts(asked: &Asked) {
    let capital = [2, 818, 5279, 529, 7001, 563];
    let ids = asked.raw(&[
        "The capital of France is",
        // The start token is there once, whoever writes it.
        "<bos>The capital of France is",
        "Hello world",
        "\n",
        "\n\n",
    ]);
    assert_eq!(ids[..4], [&capital[..], &capital, &[2, 9259, 1902], &[2, 107]]);
    assert_eq!(ids[4].len(), 2, "a run of newlines is a piece: {:?}", ids[4]);
    // Tags and unused names were control tokens in Gemma 3 and are ordinary text now.
    for (text, ids) in ["<table>", "</s>", "<h1>", "<unused7>", "[multimodal]", "<start_of_turn>"]
        .iter()
        .zip(asked.raw(&["<table>", "</s>", "<h1>", "<unused7>", "[multimodal]", "<start_of_turn>"]))
    {
        assert!(ids.len() > 2 && ids[1..].iter().all(|&id| CONTROL.iter().all(|&(c, _)| c != id)), "{text}: {ids:?}");
    }
}

fn control_tokens(asked: &Asked) {
    let names: Vec<&str> = CONTROL.iter().map(|&(_, name)| name).collect();
    for (&(id, name), ids) in CONTROL.iter().zip(asked.raw(&names)) {
        let want = if name == "<bos>" { vec![2] } else { vec![2, id] };
        assert_eq!(ids, want, "{name}");
    }
}

fn ways_back(asked: &Asked) {
    let tokenizer = Tokenizer::from_path(&asked.tokenizer).unwrap();
    assert_eq!(
        (tokenizer.bos, tokenizer.eos, tokenizer.pad, tokenizer.largest_id()),
        (Some(2), Some(1), Some(0), 262_143)
    );
    // A character without a piece becomes its bytes.
    let rare = '\u{10fffd}'.to_string();
    let bytes: Vec<i64> = rare.bytes().map(|b| 238 + i64::from(b)).collect();
    assert_eq!(asked.raw(&[&rare])[0][1..], bytes);
    let texts = [
        &rare,
        "  two spaces before, one behind ",
        "tabs\tand\r\nline ends\n\n\n",
        "Äpfel, naïve, Ελλάδα, Привет, 日本語のテキスト, 한국어, עברית, हिन्दी",
        "fn main() {\n    println!(\"{}\", 1 << 4);\n}\n",
        "👩‍👩‍👧‍👦 and 🏴󠁧󠁢󠁳󠁣󠁴󠁿",
        "a▁b",
    ];
    for (text, ids) in texts.iter().zip(asked.raw(&texts)) {
        let ids: Vec<u32> = ids[1..].iter().map(|&id| u32::try_from(id).unwrap()).collect();
        // A piece stands for a space and has its name; no text with the name itself comes back.
        assert_eq!(tokenizer.decode(&ids).unwrap(), text.replace('▁', " "));
    }
}
