//! The pipeline as a whole: files in, batches out, and back to any place.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use config::{Config, PackingKind, Sources};
use proptest::prelude::*;
use serde_json::json;

use super::cursor::Stream;
use super::files::{Compression, Format, SourceFile};
use super::index::Index;
use super::text::{Ending, Settings, TextSource};
use super::*;

fn settings() -> Settings {
    Settings {
        rows: 2,
        seq: 8,
        vocab_size: 300,
        columns: vec!["text".to_owned()],
        is_text: true,
        add_bos: true,
        add_eos: true,
        truncate: true,
        packing: Some(PackingKind::FirstFit),
        max_segments: None,
        shuffle: Some(0),
        epochs: 1,
        ending: Ending::Pad,
        abort_on_bad: false,
        shard: (0, 1),
    }
}

/// Opens lines of JSON.
fn open(path: &Path, settings: &Settings) -> Result<TextSource> {
    let file = SourceFile { path: path.to_owned(), format: Format::Json, compression: Compression::None };
    TextSource::new(settings.clone(), Tokenizer::bytes(), Index::build(&[file], &settings.columns)?)
}

fn write(dir: &Path, texts: &[impl AsRef<str>]) -> PathBuf {
    let path = dir.join("data.jsonl");
    let lines: Vec<String> = texts.iter().map(|text| json!({ "text": text.as_ref() }).to_string() + "\n").collect();
    fs_err::write(&path, lines.concat()).unwrap();
    path
}

fn batches(source: &mut dyn BatchSource) -> Vec<TokenBatch> {
    std::iter::from_fn(|| source.next().unwrap()).collect()
}

/// The documents of batches by segment: inputs, and the target of the last if it counts.
fn segments(batches: &[TokenBatch]) -> Vec<(Vec<i32>, Option<i32>)> {
    let mut found = Vec::new();
    for batch in batches {
        for row in 0..batch.rows {
            let mut of_row: BTreeMap<i32, (Vec<i32>, Option<i32>)> = BTreeMap::new();
            for at in row * batch.seq..(row + 1) * batch.seq {
                let segment = batch.inputs_segmentation[at];
                if segment == 0 {
                    assert_eq!(batch.targets_segmentation[at], 0);
                    assert_eq!((batch.inputs[at], batch.targets[at], batch.inputs_position[at]), (0, 0, 0));
                    continue;
                }
                let (ids, last) = of_row.entry(segment).or_default();
                // Positions restart, segments do not interleave, targets are the inputs that follow.
                assert_eq!(batch.inputs_position[at] as usize, ids.len());
                assert!(ids.is_empty() || *last == Some(batch.inputs[at]) || [0, 2].contains(&batch.inputs[at]));
                ids.push(batch.inputs[at]);
                let counts = batch.targets_segmentation[at];
                assert!(counts == 0 || counts == segment);
                *last = (counts != 0).then_some(batch.targets[at]);
            }
            let count = of_row.len() as i32;
            assert_eq!(of_row.keys().copied().collect::<Vec<_>>(), (1..=count).collect::<Vec<_>>());
            found.extend(of_row.into_values());
        }
    }
    found
}

/// A text's tokens as a document.
fn framed(text: &str) -> Vec<i32> {
    std::iter::once(2).chain(text.bytes().map(|byte| 4 + i32::from(byte))).chain([1]).collect()
}

fn texts() -> impl Strategy<Value = Vec<String>> {
    proptest::collection::vec("[a-z]{0,30}", 1..25)
}

fn any_settings() -> impl Strategy<Value = Settings> {
    let packing = prop_oneof![Just(None), Just(Some(PackingKind::FirstFit)), Just(Some(PackingKind::ConcatThenSplit))];
    let limits = (proptest::option::of(1..4usize), proptest::option::of(0..9u64));
    let ending = prop_oneof![Just(Ending::Pad), Just(Ending::Drop)];
    (1..5usize, 2..20usize, packing, any::<bool>(), limits, 1..4u64, ending, any::<[bool; 2]>()).prop_map(
        |(rows, seq, packing, truncate, (max_segments, shuffle), epochs, ending, [add_bos, add_eos])| Settings {
            rows,
            seq,
            packing,
            truncate,
            max_segments,
            shuffle,
            epochs,
            ending,
            add_bos,
            add_eos,
            ..settings()
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    /// Without cutting, every token but the first of a document is a target once an epoch, whatever the packing.
    #[test]
    fn packing_conserves_tokens(texts in texts(), settings in any_settings()) {
        let settings = Settings { truncate: false, ending: Ending::Pad, add_bos: true, add_eos: true, ..settings };
        let dir = tempfile::tempdir().unwrap();
        let kept: Vec<&String> = texts.iter().filter(|text| !text.is_empty()).collect();
        let opened = open(&write(dir.path(), &texts), &settings);
        if kept.is_empty() {
            prop_assert!(opened.unwrap().next().is_err());
            return Ok(());
        }
        let mut source = opened.unwrap();
        let batches = batches(&mut source);
        // Every piece, cut open into pairs of a token and the one after it.
        let pairs = |ids: &[i32]| ids.windows(2).map(|w| (w[0], w[1])).collect::<Vec<_>>();
        let mut found: Vec<(i32, i32)> = segments(&batches)
            .into_iter()
            .flat_map(|(mut ids, last)| { ids.extend(last); pairs(&ids) })
            .collect();
        let mut wanted: Vec<(i32, i32)> =
            kept.iter().flat_map(|text| pairs(&framed(text)).repeat(settings.epochs as usize)).collect();
        found.sort_unstable();
        wanted.sort_unstable();
        prop_assert_eq!(&found, &wanted);
        prop_assert_eq!(batches.iter().map(TokenBatch::weight).sum::<u64>(), wanted.len() as u64);
        let report = source.report();
        prop_assert_eq!(report.empty_documents, (texts.len() - kept.len()) as u64 * settings.epochs);
        let used = batches.iter().flat_map(|b| &b.inputs_segmentation).filter(|s| **s != 0).count() as u64;
        prop_assert_eq!(report.tokens, used);
        prop_assert_eq!(report.slots, batches.len() as u64 * (settings.rows * settings.seq) as u64);
    }

    /// First-fit packing with cutting keeps every document whole, in one piece, at its beginning.
    #[test]
    fn documents_stay_whole(texts in texts(), settings in any_settings()) {
        let packing = settings.packing.map(|_| PackingKind::FirstFit);
        let settings =
            Settings { truncate: true, packing, ending: Ending::Pad, add_bos: true, add_eos: true, ..settings };
        let kept: Vec<&String> = texts.iter().filter(|text| !text.is_empty()).collect();
        prop_assume!(!kept.is_empty());
        let dir = tempfile::tempdir().unwrap();
        let mut source = open(&write(dir.path(), &texts), &settings).unwrap();
        let batches = batches(&mut source);
        let mut found: Vec<Vec<i32>> = segments(&batches).into_iter().map(|(ids, last)| {
            assert_eq!(last, None);
            ids
        }).collect();
        let cut = |text: &&String| framed(text).into_iter().take(settings.seq).collect::<Vec<_>>();
        let mut wanted: Vec<Vec<i32>> = kept.iter().flat_map(|t| vec![cut(t); settings.epochs as usize]).collect();
        found.sort_unstable();
        wanted.sort_unstable();
        prop_assert_eq!(found, wanted);
        let long = kept.iter().filter(|text| text.len() + 2 > settings.seq).count() as u64;
        prop_assert_eq!(source.report().truncated_documents, long * settings.epochs);
        let limit = settings.max_segments.unwrap_or(usize::MAX);
        for batch in &batches {
            prop_assert!(batch.inputs_segmentation.iter().all(|segment| *segment as usize <= limit));
            if packing.is_none() {
                prop_assert!(batch.inputs_segmentation.iter().all(|segment| *segment <= 1));
            }
        }
    }

    /// Going on from any cursor, through JSON, gives exactly the batches that follow.
    #[test]
    fn every_cursor_restores(texts in texts(), settings in any_settings()) {
        let dir = tempfile::tempdir().unwrap();
        let path = write(dir.path(), &texts);
        let mut source = open(&path, &settings).unwrap();
        let mut cursors = vec![serde_json::to_string(&source.cursor()).unwrap()];
        let mut all = Vec::new();
        let end = loop {
            match source.next() {
                Ok(Some(batch)) => all.push(batch),
                Ok(None) => break None,
                Err(error) => break Some(error.to_string()),
            }
            cursors.push(serde_json::to_string(&source.cursor()).unwrap());
        };
        for (done, text) in cursors.iter().enumerate() {
            let cursor: Cursor = serde_json::from_str(text).unwrap();
            prop_assert_eq!(cursor.batches(), done as u64);
            let mut again = open(&path, &settings).unwrap();
            // A source that has read ahead from another place.
            let _ = again.next();
            again.restore(&cursor).unwrap();
            prop_assert_eq!(&again.cursor(), &cursor);
            for (number, batch) in all.iter().enumerate().skip(done) {
                let next = again.next().unwrap();
                prop_assert_eq!(next.as_ref(), Some(batch));
                prop_assert_eq!(&serde_json::to_string(&again.cursor()).unwrap(), &cursors[number + 1]);
            }
            if end.is_none() {
                prop_assert_eq!(again.next().unwrap(), None);
                // Also backwards, in the same source.
                again.restore(&serde_json::from_str(&cursors[done / 2]).unwrap()).unwrap();
                let next = again.next().unwrap();
                prop_assert_eq!(next.as_ref(), all.get(done / 2));
            } else {
                prop_assert!(again.next().is_err());
            }
        }
    }

    /// Bytes of any kind never do worse than an error or a count.
    #[test]
    fn hostile_files_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..400), settings in any_settings()) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("data.jsonl");
        let mut all = bytes;
        all.extend(b"\n{\"text\": \"good\"}\n");
        fs_err::write(&path, all).unwrap();
        if let Ok(mut source) = open(&path, &settings) {
            while let Ok(Some(batch)) = source.next() {
                segments(&[batch]);
            }
        }
    }

    /// A damaged cursor is refused, or a cursor of the same data; never a panic.
    #[test]
    fn hostile_cursors_are_survived(numbers in proptest::collection::vec(any::<u64>(), 8), small in any::<bool>()) {
        let dir = tempfile::tempdir().unwrap();
        let path = write(dir.path(), &["one", "two", "three", "a longer one"]);
        let settings = Settings { truncate: false, ..settings() };
        let mut source = open(&path, &settings).unwrap();
        source.next().unwrap();
        let n = |at: usize| if small { numbers[at] % 6 } else { numbers[at] };
        let mut json = serde_json::to_value(source.cursor()).unwrap();
        let text = &mut json["stream"]["text"];
        text["epoch"] = json!(n(0) % 3);
        text["position"] = json!(n(1));
        text["current"] = json!([n(2), n(3)]);
        text["rows"]["open"] = json!([[[n(4), n(5), n(6)], [n(7), n(0), n(2)]]]);
        let cursor: Cursor = serde_json::from_value(json).unwrap();
        let before = source.cursor();
        if source.restore(&cursor).is_err() {
            prop_assert_eq!(source.cursor(), before);
        }
        while let Ok(Some(batch)) = source.next() {
            segments(&[batch]);
        }
    }
}

#[test]
fn shuffles_differ_by_epoch_and_seed_and_repeat() {
    let dir = tempfile::tempdir().unwrap();
    let texts: Vec<String> = (0..50).map(|number| format!("d{number:02}")).collect();
    let path = write(dir.path(), &texts);
    let order = |shuffle, epochs| {
        let settings = Settings { packing: None, shuffle, epochs, ..settings() };
        let all = batches(&mut open(&path, &settings).unwrap());
        segments(&all).into_iter().map(|(ids, _)| ids).collect::<Vec<_>>()
    };
    let plain: Vec<Vec<i32>> = texts.iter().map(|text| framed(text)).collect();
    assert_eq!(order(None, 1), plain);
    let two = order(Some(7), 2);
    assert_ne!(two[..50], plain);
    assert_ne!(two[..50], two[50..]);
    assert_eq!(two, order(Some(7), 2));
    assert_ne!(two[..50], order(Some(8), 1));
}

#[test]
fn shards_share_the_documents() {
    let dir = tempfile::tempdir().unwrap();
    let texts: Vec<String> = (0..11).map(|number| format!("d{number:02}")).collect();
    let path = write(dir.path(), &texts);
    let mut all = Vec::new();
    for shard in 0..3 {
        let settings = Settings { packing: None, shard: (shard, 3), ..settings() };
        all.extend(segments(&batches(&mut open(&path, &settings).unwrap())).into_iter().map(|(ids, _)| ids));
    }
    all.sort_unstable();
    assert_eq!(all, texts.iter().map(|text| framed(text)).collect::<Vec<_>>());
}

#[test]
fn bad_lines_are_named_and_counted_once() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("data.jsonl");
    let mut content = b"{\"text\": \"good\"}\n{\"text\": 3}\n\nnot json\n".to_vec();
    content.extend(b"{\"text\": \"\xff\"}\n{\"other\": 1}\n{\"text\": \"\"}\n");
    fs_err::write(&path, content).unwrap();
    let settings = Settings { epochs: 3, shuffle: None, ..settings() };
    let mut source = open(&path, &settings).unwrap();
    assert_eq!(batches(&mut source).iter().map(TokenBatch::weight).sum::<u64>(), 3 * 5);
    let report = source.report();
    assert_eq!((report.documents, report.bad_documents, report.empty_documents), (18, 4, 3));
    let first: Vec<String> = report.first_bad.iter().map(ToString::to_string).collect();
    let name = path.display();
    assert_eq!(first[0], format!("{name}:2: column `text` is a number, not a string"));
    assert!(first[1].starts_with(&format!("{name}:4: not a JSON object")), "{}", first[1]);
    assert_eq!(first[2], format!("{name}:5: invalid UTF-8 at byte 11"));
    assert_eq!(first[3], format!("{name}:6: no column `text` (there is `other`)"));
    let settings = Settings { abort_on_bad: true, ..settings };
    let mut source = open(&path, &settings).unwrap();
    for _ in 0..2 {
        let error = source.next().unwrap_err().to_string();
        assert!(error.contains(":2: column") && error.contains("abort_on_bad_data"), "{error}");
    }
}

#[test]
fn nothing_usable_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("data.jsonl");
    let many = Settings { epochs: 1 << 31, ..settings() };
    for (content, wants) in [
        ("", "no document of 0"),
        ("\n \n", "no document of 0"),
        ("{\"text\": 1}\n{\"text\": 2}\n", "no document of 2 can be used; the first: "),
        ("{\"text\": \"\"}\n", "no document of 1 can be used: they are empty"),
    ] {
        fs_err::write(&path, content).unwrap();
        let error = open(&path, &many).and_then(|mut source| source.next()).unwrap_err().to_string();
        assert!(error.contains(wants) && error.contains("data.jsonl"), "{error}");
    }
    // Too little for a batch.
    fs_err::write(&path, "{\"text\": \"abc\"}\n").unwrap();
    let error = open(&path, &Settings { ending: Ending::Drop, ..settings() }).unwrap().next().unwrap_err().to_string();
    assert!(error.contains("fill 1 sequences, and a batch has 2"), "{error}");
}

#[test]
fn endings_drop_pad_or_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let path = write(dir.path(), &["a", "b", "c"]);
    let with = |ending| open(&path, &Settings { packing: None, ending, ..settings() }).unwrap();
    let mut drop = with(Ending::Drop);
    assert_eq!(batches(&mut drop).len(), 1);
    assert_eq!(drop.report().left_over_tokens, 3);
    assert_eq!(drop.next().unwrap(), None);
    let padded = batches(&mut with(Ending::Pad));
    assert_eq!(padded.iter().map(TokenBatch::weight).collect::<Vec<_>>(), [4, 2]);
    let mut endless = with(Ending::Endless);
    let weights: Vec<u64> = (0..5).map(|_| endless.next().unwrap().unwrap().weight()).collect();
    assert_eq!(weights, [4, 2, 0, 0, 0]);
    let cursor = endless.cursor();
    endless.restore(&cursor).unwrap();
    assert_eq!(endless.next().unwrap(), Some(TokenBatch::empty(2, 8)));
}

#[test]
fn neither_start_nor_end_comes_twice() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("data.jsonl");
    fs_err::write(&path, "{\"ids\": [2, 7, 1]}\n{\"ids\": [7]}\n{\"ids\": [2]}\n").unwrap();
    let base = Settings { columns: vec!["ids".into()], is_text: false, packing: None, shuffle: None, ..settings() };
    let inputs = |settings: &Settings| {
        let all = batches(&mut open(&path, settings).unwrap());
        segments(&all).into_iter().map(|(ids, _)| ids).collect::<Vec<_>>()
    };
    assert_eq!(inputs(&base), [vec![2, 7, 1], vec![2, 7, 1], vec![2, 1]]);
    // [7] and [2] alone predict nothing.
    assert_eq!(inputs(&Settings { add_bos: false, add_eos: false, ..base.clone() }), [vec![2, 7, 1]]);
    assert_eq!(inputs(&Settings { add_eos: false, ..base }), [vec![2, 7, 1], vec![2, 7]]);
}

#[test]
fn ids_outside_the_vocabulary_are_fatal() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("data.jsonl");
    let settings = Settings { columns: vec!["ids".into()], is_text: false, shuffle: None, ..settings() };
    for (id, shown) in [("300", "300"), ("-1", "-1"), ("9223372036854775807", "9223372036854775807")] {
        fs_err::write(&path, format!("{{\"ids\": [1, 2]}}\n{{\"ids\": [299, {id}]}}\n")).unwrap();
        let mut source = open(&path, &settings).unwrap();
        for _ in 0..2 {
            let error = source.next().unwrap_err().to_string();
            let wants = format!("data.jsonl:2: token id {shown} is outside the model's vocabulary of 300");
            assert!(error.ends_with(&wants), "{error}");
        }
    }
}

#[test]
fn one_token_sequences_split_documents() {
    let dir = tempfile::tempdir().unwrap();
    let path = write(dir.path(), &["ab"]);
    for packing in [None, Some(PackingKind::FirstFit), Some(PackingKind::ConcatThenSplit)] {
        let settings = Settings { seq: 1, rows: 3, truncate: false, packing, ..settings() };
        let all = batches(&mut open(&path, &settings).unwrap());
        assert_eq!(all.len(), 1);
        assert_eq!((&all[0].inputs, &all[0].targets), (&vec![2, 101, 102], &vec![101, 102, 1]));
        assert_eq!(all[0].weight(), 3);
    }
}

#[test]
fn cursors_of_other_data_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = write(dir.path(), &["one", "two", "three", "four"]);
    let mut source = open(&path, &settings()).unwrap();
    source.next().unwrap();
    let cursor = source.cursor();
    let refusal = |settings: &Settings| open(&path, settings).unwrap().restore(&cursor).unwrap_err().to_string();
    assert!(refusal(&Settings { seq: 9, ..settings() }).contains("max_target_length is 9, and was 8"));
    assert!(refusal(&Settings { shuffle: Some(1), ..settings() }).contains("seed 1, and was seed 0"));
    assert!(refusal(&Settings { packing: None, ..settings() }).contains("packing is none, and was first_fit"));
    // Another batch size is another cut through the same stream.
    open(&path, &Settings { rows: 3, ..settings() }).unwrap().restore(&cursor).unwrap();
    write(dir.path(), &["one", "two", "three", "fünf"]);
    assert!(refusal(&settings()).contains("data.jsonl has"), "{}", refusal(&settings()));
    write(dir.path(), &["one", "two", "three", "five"]);
    assert!(refusal(&settings()).contains("same length and other content"));
    write(dir.path(), &["one", "two", "three", "four"]);
    open(&path, &settings()).unwrap().restore(&cursor).unwrap();
    let other = Cursor { batches: 0, stream: Stream::Fixed };
    assert!(source.restore(&other).unwrap_err().to_string().contains("a list of batches"));
}

fn configured(words: &[&str]) -> Config {
    let base = ["model_name=tiny-e2b", "dataset_type=hf", "max_target_length=16", "tokenizer_path=bytes"];
    Sources::from_args(base.iter().chain(words).copied()).resolve().unwrap()
}

#[test]
fn a_configuration_opens_both_parts() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).display().to_string();
    fs_err::write(at("train.txt"), "some text\nand more\n").unwrap();
    fs_err::write(at("validation.jsonl"), "{\"body\": \"held out\"}\n").unwrap();
    let path = format!("hf_path={}", dir.path().display());
    let eval = ["hf_eval_split=validation", "eval_data_columns=[body]", "eval_interval=5"];
    let both = configured(&[&[path.as_str(), "generate_padding_batch_train=true"], &eval[..]].concat());
    let mut train = open_train(&both, 515, None, 2).unwrap();
    assert_eq!(train.next().unwrap().unwrap().weight(), 10 + 9);
    let mut eval = open_eval(&both, 515, None, 3).unwrap().unwrap();
    let start = eval.cursor();
    let first = batches(&mut eval);
    assert_eq!(first.iter().map(TokenBatch::weight).collect::<Vec<_>>(), [9]);
    eval.restore(&start).unwrap();
    assert_eq!(batches(&mut eval), first);
    assert!(open_eval(&configured(&[&path]), 515, None, 3).unwrap().is_none());
    // A part as a format and files.
    let files = format!("hf_train_files={}", at("train.*"));
    let mut text = open_train(&configured(&["hf_path=text", &files, "packing=false"]), 515, None, 2).unwrap();
    assert_eq!(text.next().unwrap().unwrap().inputs[..3], [2, 4 + 115, 4 + 111]);
}

#[test]
fn what_a_configuration_cannot_have_is_named() {
    let dir = tempfile::tempdir().unwrap();
    fs_err::write(dir.path().join("a.txt"), "some text\n").unwrap();
    let path = format!("hf_path={}", dir.path().display());
    let error = |words: &[&str], vocab, rows| {
        let words = [&[path.as_str()], words].concat();
        open_train(&configured(&words), vocab, None, rows).err().unwrap().to_string()
    };
    assert!(error(&[], 259, 2).contains("the tokenizer bytes: token id 259 is outside the model's vocabulary of 259"));
    assert!(error(&[], 0, 2).contains("vocab_size cannot be 0"));
    assert!(error(&[], 515, 0).contains("the batch cannot be 0"));
    assert!(error(&[], 515, usize::MAX).contains("the batch cannot be"));
    assert!(error(&["train_data_columns=[body]"], 515, 2).contains("only the column `text`"));
    assert!(error(&["tokenizer_path="], 515, 2).contains("tokenizer_path: there is no tokenizer"));
    assert!(error(&["max_target_length=1", "max_prefill_predict_length=1"], 515, 2).contains("use_truncation=false"));
    fs_err::write(dir.path().join("tokenizer.json"), super::tokenizer::tests::WORDS).unwrap();
    let words = format!("tokenizer_path={}", dir.path().join("tokenizer.json").display());
    assert!(error(&[&words], 6, 2).contains("token id 6 is outside the model's vocabulary of 6"));
    fs_err::write(dir.path().join("tokenizer_config.json"), r#"{"bos_token": "<s>"}"#).unwrap();
    assert!(error(&[&words], 7, 2).contains("add_bos: the tokenizer"));
}

#[test]
fn prefetching_text_is_exact() {
    let dir = tempfile::tempdir().unwrap();
    let texts: Vec<String> = (0..40).map(|number| "x".repeat(number % 13)).collect();
    let path = write(dir.path(), &texts);
    let settings = Settings { epochs: 2, truncate: false, ..settings() };
    let wanted = batches(&mut open(&path, &settings).unwrap());
    let mut ahead = Prefetch::new(Box::new(open(&path, &settings).unwrap()), 4);
    for batch in &wanted[..5] {
        assert_eq!(ahead.next().unwrap().as_ref(), Some(batch));
    }
    let cursor = ahead.cursor();
    drop(ahead);
    let mut again = open(&path, &settings).unwrap();
    again.restore(&cursor).unwrap();
    let mut again = Prefetch::new(Box::new(again), 2);
    assert_eq!(batches(&mut again), wanted[5..]);
    assert_eq!(again.cursor().batches(), wanted.len() as u64);
}
