//! Decoding with a cache against what Hugging Face transformers generated, and against the same engine without a cache.
//!
//! `LAPIDARY_GOLDEN_DIR` names further cases.

// The helpers of a test may unwrap as the test itself does; what was compared is worth seeing with --nocapture.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

#[path = "common/golden.rs"]
mod golden;

use std::path::Path;
use std::sync::Arc;

use checkpoint::safetensors::SafetensorsFile;
use golden::{cases, read};
use lapidary_engine::convert::{Hints, QuantizeOptions, plan_quantized};
use lapidary_engine::decode::{DecodeOptions, Decoder, Products, Quantization, Steps};
use lapidary_engine::generate::{LanguageModel, Uncached};
use lapidary_engine::{Model, Runtime, RuntimeOptions, Session};
use tensor::DType;

/// Largest difference of logits that is put down to rounding in f32.
const TOLERANCE: f32 = 2e-4;

fn open(case: &Path) -> Arc<Model> {
    Arc::new(golden::open(case))
}

fn runtime() -> Runtime {
    Runtime::start(&RuntimeOptions::default()).unwrap()
}

fn argmax(row: &[f32]) -> i32 {
    let best = (0..row.len()).fold(0, |best, i| if row[i] > row[best] { i } else { best });
    best as i32
}

fn difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max)
}

fn options(sequences: usize, context: usize) -> DecodeOptions {
    DecodeOptions { sequences, context, dtype: DType::F32, ..DecodeOptions::default() }
}

#[test]
fn golden_continuations_are_reproduced() {
    let runtime = runtime();
    let mut checked = 0;
    for case in cases() {
        let file = SafetensorsFile::open(&case.join("golden.safetensors")).unwrap();
        let Some((shape, want_ids)) = read(&file, "gen_ids") else { continue };
        let want_logits = read(&file, "gen_logits").map(|(_, l)| l);
        let (rows, n) = (shape[0], shape[1]);
        let (shape, ids) = read(&file, "input_ids").unwrap();
        let seq = shape[1];
        let mask = read(&file, "attention_mask").map_or_else(|| vec![1.0; rows * seq], |(_, m)| m);
        // Padding stands before the first token and is no part of a prompt.
        let prompts: Vec<Vec<i32>> = (0..rows)
            .map(|r| (r * seq..(r + 1) * seq).filter(|&i| mask[i] != 0.0).map(|i| ids[i] as i32).collect())
            .collect();
        let model = open(&case);
        let v = model.arch().vocab_size();
        let session = Session::new(&runtime, model.clone(), DType::F64).unwrap();
        let mut plain = Uncached::new(&session, rows, seq + n);
        let mut decoder = Decoder::new(&runtime, model, options(rows, seq + n)).unwrap();
        let mut fed = prompts;
        // From the same engine without a cache, whose f64 leaves only the rounding of what is measured; of the cache, and of that
        // engine, from transformers.
        let (mut worst, mut from_hf, mut plain_from_hf) = (0f32, 0f32, 0f32);
        for step in 0..n {
            let tokens: Vec<&[i32]> = fed.iter().map(Vec::as_slice).collect();
            let (logits, uncached) = (decoder.feed(&tokens).unwrap(), plain.feed(&tokens).unwrap());
            worst = worst.max(difference(&logits, &uncached));
            for r in 0..rows {
                let row = &logits[r * v..(r + 1) * v];
                if let Some(want) = &want_logits {
                    let want: Vec<f32> =
                        want[(r * n + step) * v..(r * n + step + 1) * v].iter().map(|&x| x as f32).collect();
                    from_hf = from_hf.max(difference(row, &want));
                    plain_from_hf = plain_from_hf.max(difference(&uncached[r * v..(r + 1) * v], &want));
                }
                let want = want_ids[r * n + step] as i32;
                assert_eq!(argmax(row), want, "{}: token {step} of sequence {r}", case.display());
                fed[r] = vec![want];
            }
        }
        println!(
            "{}: {rows} x {n} tokens, {worst:.1e} from uncached, {from_hf:.1e} ({plain_from_hf:.1e}) from transformers",
            case.display()
        );
        assert!(worst <= TOLERANCE, "{}: logits differ by {worst}", case.display());
        // A random model may amplify rounding: then the same engine without a cache is as far away.
        let allowed = TOLERANCE.max(2.0 * plain_from_hf);
        assert!(from_hf <= allowed, "{}: logits differ by {from_hf} from transformers'", case.display());
        checked += 1;
    }
    assert!(checked > 0, "no case has a continuation");
}

/// Ids that are neither all alike nor in order.
fn prompt(length: usize, vocab: usize, seed: usize) -> Vec<i32> {
    (0..length).map(|i| ((i * 7919 + seed * 104_729 + i * i) % (vocab - 3) + 2) as i32).collect()
}

#[test]
fn chunks_and_lengths_around_the_window_change_nothing() {
    let runtime = runtime();
    for name in ["win", "keqv", "e2b"] {
        let model = open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(name));
        let (v, w) = (model.arch().vocab_size(), model.arch().spec().sliding_window);
        let lengths = [1, w.max(2) - 1, w, w + 1, 3 * w];
        let context = 3 * w + 40;
        let prompts: Vec<Vec<i32>> = lengths.iter().enumerate().map(|(i, &l)| prompt(l, v, i)).collect();
        let session = Session::new(&runtime, model.clone(), DType::F64).unwrap();
        // What is fed one after the other: prompts, single tokens, a continuation of some, single tokens.
        let mut feeds = vec![prompts];
        for i in 0..3 {
            feeds.push((0..lengths.len()).map(|s| prompt(1, v, 10 * s + i)).collect());
        }
        feeds.push((0..lengths.len()).map(|s| prompt([0, w, 3, 0, 2 * w][s].min(20), v, s + 50)).collect());
        feeds.push((0..lengths.len()).map(|s| prompt(1, v, s + 60)).collect());
        let mut plain = Uncached::new(&session, lengths.len(), context);
        let want: Vec<Vec<f32>> =
            feeds.iter().map(|f| plain.feed(&f.iter().map(Vec::as_slice).collect::<Vec<_>>()).unwrap()).collect();
        for (products, chunks) in [
            (Products::Auto, vec![1]),
            (Products::Auto, vec![1, 16]),
            (Products::Auto, vec![1, w + 2, 3 * w + 1]),
            (Products::Program, vec![1, 3]),
        ] {
            let options = DecodeOptions { products, chunks: chunks.clone(), ..options(lengths.len(), context) };
            let mut decoder = Decoder::new(&runtime, model.clone(), options).unwrap();
            for round in 0..2 {
                for (i, (feed, want)) in feeds.iter().zip(&want).enumerate() {
                    let got = decoder.feed(&feed.iter().map(Vec::as_slice).collect::<Vec<_>>()).unwrap();
                    for (s, fed) in feed.iter().enumerate().filter(|(_, f)| !f.is_empty()) {
                        let d = difference(&got[s * v..(s + 1) * v], &want[s * v..(s + 1) * v]);
                        assert!(
                            d <= TOLERANCE,
                            "{name}, {products:?}, chunks {chunks:?}, round {round}, feed {i}, sequence {s} of {} tokens: {d}",
                            fed.len()
                        );
                    }
                }
                assert_eq!(decoder.lengths(), plain.lengths());
                // What was there before must not shine through.
                decoder.reset();
            }
        }
    }
}

#[test]
fn arrays_grow_and_keep_what_they_hold() {
    let runtime = runtime();
    let model = open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/win"));
    let v = model.arch().vocab_size();
    let session = Session::new(&runtime, model.clone(), DType::F64).unwrap();
    let mut plain = Uncached::new(&session, 1, 2100);
    let mut decoder = Decoder::new(&runtime, model, options(1, 2100)).unwrap();
    let before = decoder.cache_figures();
    for length in [600, 500, 1] {
        let tokens = prompt(length, v, length);
        let (want, got) = (plain.feed(&[&tokens]).unwrap(), decoder.feed(&[&tokens]).unwrap());
        let d = difference(&want, &got);
        assert!(d <= TOLERANCE, "after {:?} tokens: {d}", decoder.lengths());
    }
    let after = decoder.cache_figures();
    assert!(after.bytes > before.bytes && after.ring_bytes == before.ring_bytes, "{before:?} {after:?}");
}

#[test]
fn what_cannot_be_fed_is_refused_and_changes_nothing() {
    let runtime = runtime();
    let model = open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/win"));
    let v = model.arch().vocab_size() as i32;
    let refused = |o: DecodeOptions| Decoder::new(&runtime, model.clone(), o).unwrap_err().to_string();
    assert!(refused(options(0, 10)).contains("at least one"));
    assert!(refused(options(1, 0)).contains("at least one"));
    assert!(refused(DecodeOptions { dtype: DType::F16, ..options(1, 10) }).contains("float16"));
    assert!(refused(DecodeOptions { chunks: vec![2, 4], ..options(1, 10) }).contains("begin with 1"));
    let mut decoder = Decoder::new(&runtime, model.clone(), options(2, 10)).unwrap();
    assert!(decoder.feed(&[&[2]]).is_err());
    assert!(decoder.feed(&[&[2], &[v]]).is_err());
    assert!(decoder.feed(&[&[2], &[-1]]).is_err());
    assert!(decoder.feed(&[&[2; 11], &[]]).is_err());
    assert_eq!(decoder.lengths(), [0, 0]);
    decoder.feed(&[&[2; 10], &[]]).unwrap();
    assert_eq!(decoder.lengths(), [10, 0]);
}

#[test]
fn when_the_program_of_steps_is_made_changes_nothing() {
    let runtime = runtime();
    let model = open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/e2b"));
    let run = |prepare: &dyn Fn(&mut Decoder<'_>)| {
        let mut decoder = Decoder::new(&runtime, Arc::clone(&model), options(1, 64)).unwrap();
        prepare(&mut decoder);
        let made = decoder.compile_times().programs;
        (logits(&mut decoder, &[9], 2), made, decoder.compile_times().programs)
    };
    let (whole, made, all) = run(&|d| assert!(d.prepare(9).is_ok()));
    assert_eq!((made, all), (2, 2));
    // Programs that nobody has waited for yet are not counted.
    for steps in [Steps::BeforePrompt, Steps::AfterPrompt] {
        let (behind, made, all) = run(&|d| assert!(d.prepare_prompt(9, steps).is_ok()));
        assert_eq!((made, all), (1, 2), "{steps:?}");
        assert!(behind == whole, "{steps:?}");
    }
    // Told to stop, it reads nothing; else it touches every matrix. Either way weights are what they were.
    for stop in [true, false] {
        model.read_ahead(&std::sync::atomic::AtomicBool::new(stop));
    }
    assert!(run(&|_| ()).0 == whole);
}

/// Logits of prompts and of some steps after them.
fn logits(decoder: &mut Decoder<'_>, lengths: &[usize], steps: usize) -> Vec<Vec<f32>> {
    let vocab = decoder.model().arch().vocab_size();
    decoder.reset();
    let prompts: Vec<Vec<i32>> = lengths.iter().enumerate().map(|(i, &n)| prompt(n, vocab, i)).collect();
    let mut out = vec![decoder.feed(&prompts.iter().map(Vec::as_slice).collect::<Vec<_>>()).unwrap()];
    for step in 0..steps {
        let next: Vec<Vec<i32>> = (0..lengths.len()).map(|i| prompt(1, vocab, 10 + step + i)).collect();
        out.push(decoder.feed(&next.iter().map(Vec::as_slice).collect::<Vec<_>>()).unwrap());
    }
    out
}

#[test]
fn stored_tiles_are_those_made_at_load() {
    let runtime = runtime();
    let dir = tempfile::tempdir().unwrap();
    for (name, format) in [("e2b", Quantization::Int8), ("e2b", Quantization::Int4), ("keqv", Quantization::Int8)] {
        let model = open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(name));
        let target = dir.path().join(format!("{name}-{}", format.name()));
        let sharded = QuantizeOptions { max_shard_bytes: Some(100_000), ..QuantizeOptions::default() };
        plan_quantized(&model, format, &sharded).unwrap().run(&target, |_| ()).unwrap();
        let hints = Hints { quantized: true, ..Hints::default() };
        let stored = Arc::new(Model::open_with(&target, &hints).unwrap());
        assert!(stored.weights().leftover().is_empty());
        let lengths = [5, 9, 16];
        let at_load = DecodeOptions { quantize: Some(format), ..options(1, 64) };
        let mut loaded = Decoder::new(&runtime, Arc::clone(&model), at_load).unwrap();
        let mut mapped = Decoder::new(&runtime, Arc::clone(&stored), options(1, 64)).unwrap();
        for length in lengths {
            let (a, b) = (logits(&mut loaded, &[length], 3), logits(&mut mapped, &[length], 3));
            assert!(a == b, "{name}: {length} tokens");
        }
        assert_eq!(mapped.bytes_per_step(), loaded.bytes_per_step());
        // Nothing but norms may be copied.
        assert!(mapped.placed().mapped_bytes >= mapped.bytes_per_step(), "{:?}", mapped.placed());
        // Long prompts go through the tiles as well, in chunks of any size, beside each other or not.
        let long = |chunks: &[usize], lengths: &[usize]| {
            let options = DecodeOptions { chunks: chunks.to_vec(), ..options(lengths.len(), 600) };
            logits(&mut Decoder::new(&runtime, Arc::clone(&stored), options).unwrap(), lengths, 1)
        };
        let exact = {
            let mut plain = Decoder::new(&runtime, Arc::clone(&model), options(2, 600)).unwrap();
            logits(&mut plain, &[300, 130], 1)
        };
        let (whole, small) = (long(&[1, 16, 128, 512], &[300, 130]), long(&[1, 16], &[300, 130]));
        let stepwise = long(&[1], &[300, 130]);
        for ((a, exact), (b, c)) in whole.iter().zip(&exact).zip(small.iter().zip(&stepwise)) {
            let (chunks, steps) = (difference(a, b), difference(a, c));
            // Activations have 16 bits, so that a last digit that falls otherwise is amplified: bounded by a twentieth of
            // what quantizing the weights itself changes.
            let bound = difference(a, exact) / 20.0;
            println!(
                "{name} {}: {chunks:.1e} between chunks, {steps:.1e} from single steps, bound {bound:.1e}",
                format.name()
            );
            assert!(chunks <= bound && steps <= bound, "{name}: {chunks} {steps} {bound}");
        }
        // Nothing else can be done with them.
        assert!(Model::open(&target).unwrap_err().to_string().contains(format.name()));
        let program = DecodeOptions { products: Products::Program, ..options(1, 8) };
        assert!(Decoder::new(&runtime, Arc::clone(&stored), program).is_err());
        let other = if format == Quantization::Int8 { Quantization::Int4 } else { Quantization::Int8 };
        let again = DecodeOptions { quantize: Some(other), ..options(1, 8) };
        assert!(Decoder::new(&runtime, Arc::clone(&stored), again).is_err());
        assert!(
            stored.read("layers.0.mlp.up_proj.weight").unwrap_err().to_string().contains("before it was quantized")
        );
        assert!(stored.mapped("layers.0.mlp.up_proj.weight").is_none());
        assert!(plan_quantized(&stored, format, &sharded).is_err());
    }
}
