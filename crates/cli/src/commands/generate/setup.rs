//! What `generate`, `chat` and `score` have in common: a model with its tokenizer, template and settings.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use config::{Config, Filter, SamplingStrategy, Sources};
use engine::data::{BYTES, Tokenizer};
use engine::decode::{DecodeOptions, Decoder, MAX_CONTEXT, Quantization, Steps};
use engine::generate::chat::{ChatTemplate, Conversation};
use engine::generate::{GenerationConfig, LanguageModel, Sampling, Uncached};
use engine::{Model, Runtime};
use serde_json::Value;
use tensor::DType;

use super::super::{ArchArgs, EngineArgs, Failure};
use crate::ui::{Ui, bytes, seconds};

/// How a model reads and computes.
#[derive(Debug, clap::Args)]
pub(crate) struct ModelArgs {
    /// Tokenizer: a tokenizer.json, a directory with one, or `bytes` [default: the model's].
    #[arg(long, value_name = "PATH")]
    pub(crate) tokenizer: Option<String>,
    /// Activations: float32, bfloat16, or `auto`, which is bfloat16 where the weights are.
    #[arg(long, default_value = "auto", value_parser = dtype)]
    dtype: Dtype,
}

#[derive(Debug, Clone, Copy)]
struct Dtype(Option<DType>);

fn dtype(s: &str) -> Result<Dtype, String> {
    match (s, s.parse::<DType>()) {
        ("auto", _) => Ok(Dtype(None)),
        (_, Ok(d @ (DType::F32 | DType::BF16))) => Ok(Dtype(Some(d))),
        _ => Err("use auto, float32 or bfloat16".into()),
    }
}

/// A model with what belongs to it. Nothing is on a device yet.
#[derive(Debug)]
pub(crate) struct Setup {
    pub(crate) model: Arc<Model>,
    pub(crate) tokenizer: Option<Tokenizer>,
    pub(crate) settings: GenerationConfig,
    pub(crate) dtype: DType,
    /// MaxText's keys that were given as words.
    pub(crate) keys: Option<Config>,
}

impl ModelArgs {
    /// Opens a model, and its tokenizer if there is one.
    pub(crate) fn open(&self, ui: &Ui, path: &Path, arch: &ArchArgs) -> Result<Setup, Failure> {
        let mut setup = self.open_weights(ui, path, arch)?;
        self.read_tokenizer(&mut setup, path)?;
        Ok(setup)
    }

    /// Opens a model, which is quick, and leaves its tokenizer for later.
    pub(crate) fn open_weights(&self, ui: &Ui, path: &Path, arch: &ArchArgs) -> Result<Setup, Failure> {
        let keys = keys(arch)?;
        for note in keys.iter().flat_map(Config::notes) {
            ui.say(format!("note: {note}"));
        }
        let model = Arc::new(arch.open_to_decode(ui, path)?);
        let weights = model.weights();
        let settings = GenerationConfig::new(weights.generation_config.as_ref(), &weights.config)?;
        let stored = weights.main_dtype();
        let auto = if stored == DType::BF16 { DType::BF16 } else { DType::F32 };
        Ok(Setup { model, tokenizer: None, settings, dtype: self.dtype.0.unwrap_or(auto), keys })
    }

    /// Reads the tokenizer, if there is one.
    pub(crate) fn read_tokenizer(&self, setup: &mut Setup, path: &Path) -> Result<(), Failure> {
        let of_key = setup.keys.as_ref().map(|k| k.data.tokenizer_path.clone()).filter(|path| !path.is_empty());
        let tokenizer = match self.tokenizer.clone().or(of_key) {
            Some(given) => Some(Tokenizer::open(&given, None)?),
            None if path.join("tokenizer.json").is_file() => Some(Tokenizer::from_path(path)?),
            None => None,
        };
        if let Some(t) = &tokenizer
            && t.largest_id() as usize >= setup.model.arch().vocab_size()
        {
            return Err(Failure::usage(format!(
                "{}: its largest id is {}, the model knows {} tokens",
                t.name(),
                t.largest_id(),
                setup.model.arch().vocab_size()
            )));
        }
        setup.tokenizer = tokenizer;
        Ok(())
    }
}

/// MaxText's keys among the words.
fn keys(arch: &ArchArgs) -> Result<Option<Config>, Failure> {
    if arch.words.is_empty() {
        return Ok(None);
    }
    let resolve = |words: Vec<String>| Sources::from_args(words).with_process_environment().resolve();
    match resolve(arch.words.clone()) {
        // A checkpoint tells its own architecture, so that none needs to be named; the rules for keys ask for one all the same.
        Err(_) if !arch.words.iter().any(|w| w.starts_with("model_name=")) => {
            resolve([vec!["model_name=gemma4-e2b".to_owned()], arch.words.clone()].concat())
        }
        first => first,
    }
    .map(Some)
    .map_err(Failure::usage)
}

impl Setup {
    /// The tokenizer, where text cannot do without.
    pub(crate) fn tokenizer(&self) -> Result<&Tokenizer, Failure> {
        self.tokenizer.as_ref().ok_or_else(|| {
            Failure::usage(format!("{} has no tokenizer.json", self.model.path().display()))
                .hint(format!("name one with --tokenizer, or `--tokenizer {BYTES}` where a token is a byte"))
        })
    }

    /// Whether one of MaxText's keys was given as a word.
    fn is_set(&self, name: &str) -> bool {
        self.keys.as_ref().is_some_and(|k| k.raw().show(Filter::Set).iter().any(|s| s.key == name))
    }

    /// Most tokens a slot may be asked to hold.
    pub(crate) fn check_context(&self, context: usize) -> Result<(), Failure> {
        match self.settings.max_positions {
            Some(most) if context > most => Err(Failure::usage(format!(
                "{context} tokens are more than the {most} positions the model was made for"
            ))),
            _ => Ok(()),
        }
    }
}

/// Options of the chat format.
#[derive(Debug, Default, clap::Args)]
#[command(next_help_heading = "Chat")]
pub(crate) struct ChatArgs {
    /// Instruction at the beginning of the conversation.
    #[arg(long, value_name = "TEXT")]
    pub(crate) system: Option<String>,
    /// Tools the model may call: a JSON file with a list of function schemas.
    #[arg(long, value_name = "FILE")]
    tools: Option<PathBuf>,
    /// Let the model think before it answers.
    #[arg(long)]
    thinking: bool,
    /// Show what it thinks, on stderr.
    #[arg(long)]
    pub(crate) show_thinking: bool,
    /// A chat template to use instead of the checkpoint's.
    #[arg(long, value_name = "FILE")]
    chat_template: Option<PathBuf>,
}

impl ChatArgs {
    /// The template, if there is one.
    pub(crate) fn template(&self, setup: &Setup) -> Result<Option<ChatTemplate>, Failure> {
        let keys = setup.keys.as_ref().map(|k| &k.decode);
        if self.chat_template.is_none()
            && let Some(text) = keys.map(|k| k.chat_template.as_str()).filter(|text| !text.is_empty())
        {
            let tokens = serde_json::Map::from_iter([("bos_token".to_owned(), Value::from("<bos>"))]);
            return Ok(Some(ChatTemplate::new(PathBuf::from("chat_template"), text, None, tokens)?));
        }
        let of_key = keys.map(|k| PathBuf::from(&k.chat_template_path)).filter(|path| !path.as_os_str().is_empty());
        let given = self.chat_template.clone().or(of_key);
        Ok(ChatTemplate::open(setup.model.path(), given.as_deref())?)
    }

    /// The system prompt: an option, or MaxText's key.
    fn system<'a>(&'a self, setup: &'a Setup) -> Option<&'a str> {
        let of_key = setup.keys.as_ref().map(|k| k.decode.system_prompt.as_str()).filter(|s| !s.is_empty());
        self.system.as_deref().or(of_key)
    }

    /// A conversation that is still to begin.
    pub(crate) fn conversation(&self, setup: &Setup) -> Result<Conversation, Failure> {
        let mut out = Conversation { enable_thinking: self.thinking.then_some(true), ..Conversation::default() };
        if let Some(system) = self.system(setup) {
            out.push("system", system);
        }
        if let Some(path) = &self.tools {
            out.tools = json_list(path, "a list of function schemas")?;
        }
        Ok(out)
    }
}

/// Reads a JSON file that holds a list of objects.
pub(crate) fn json_list(path: &Path, what: &str) -> Result<Vec<Value>, Failure> {
    let text = fs_err::read_to_string(path)?;
    let value: Value =
        serde_json::from_str(&text).map_err(|e| Failure::usage(format!("{}: no JSON: {e}", path.display())))?;
    match value {
        Value::Array(list) if list.iter().all(Value::is_object) => Ok(list),
        _ => Err(Failure::usage(format!("{}: it is not {what}", path.display()))),
    }
}

/// How tokens are chosen. What is not given is as generation_config.json says.
#[derive(Debug, Default, clap::Args)]
#[command(next_help_heading = "Sampling")]
pub(crate) struct SamplingArgs {
    /// Always take the most likely token.
    #[arg(long)]
    greedy: bool,
    /// Divides the logits; 0 is --greedy. This and the next three turn sampling on.
    #[arg(long, value_name = "X")]
    temperature: Option<f32>,
    /// Draw from the N most likely tokens; 0 for all.
    #[arg(long, value_name = "N")]
    top_k: Option<usize>,
    /// Draw from the most likely tokens that have this probability together.
    #[arg(long, value_name = "P")]
    top_p: Option<f32>,
    /// Draw from tokens at least this likely, relative to the most likely one.
    #[arg(long, value_name = "P")]
    min_p: Option<f32>,
    /// Make tokens that occurred less likely (above 1).
    #[arg(long, value_name = "X")]
    repetition_penalty: Option<f32>,
    /// Tokens that are never chosen.
    #[arg(long, value_name = "ID,ID,...", value_delimiter = ',')]
    suppress_tokens: Vec<i32>,
    /// Seed of the draws: the same seed gives the same text [default: a new one every time].
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// End the answer where this text comes up. Can be given several times.
    #[arg(long, value_name = "TEXT")]
    pub(crate) stop: Vec<String>,
    /// Go on where the model ends the text.
    #[arg(long)]
    pub(crate) ignore_eos: bool,
}

impl SamplingArgs {
    /// Files, then MaxText's keys, then options.
    pub(crate) fn sampling(&self, setup: &Setup) -> Result<Sampling, Failure> {
        let mut s = setup.settings.sampling();
        if let Some(keys) = setup.keys.as_ref().map(|k| &k.decode) {
            if setup.is_set("decode_sampling_strategy") {
                use SamplingStrategy::{Composite, Greedy, Nucleus, TopK, Weighted};
                s.do_sample = keys.strategy != Greedy;
                s.top_k = match keys.strategy {
                    TopK | Composite => keys.top_k,
                    Greedy | Weighted | Nucleus => 0,
                };
                s.top_p = match keys.strategy {
                    Nucleus | Composite => keys.nucleus_p as f32,
                    Greedy | Weighted | TopK => 1.0,
                };
                s.min_p = 0.0;
            }
            if setup.is_set("decode_sampling_temperature") {
                s.temperature = keys.temperature as f32;
            }
        }
        let draws = [self.temperature, self.top_p, self.min_p].iter().any(Option::is_some) || self.top_k.is_some();
        s.do_sample = (s.do_sample || draws) && !self.greedy;
        s.temperature = self.temperature.unwrap_or(s.temperature);
        s.top_k = self.top_k.unwrap_or(s.top_k);
        s.top_p = self.top_p.unwrap_or(s.top_p);
        s.min_p = self.min_p.unwrap_or(s.min_p);
        s.repetition_penalty = self.repetition_penalty.unwrap_or(s.repetition_penalty);
        s.suppress_tokens.extend(&self.suppress_tokens);
        s.seed = self.seed.unwrap_or_else(|| {
            SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |t| t.as_nanos() as u64 % 1_000_000_000)
        });
        s.check().map_err(Failure::usage)?;
        Ok(s)
    }

    /// Tokens that end a text.
    pub(crate) fn stop_ids(&self, setup: &Setup, chat: bool) -> Vec<i32> {
        if self.ignore_eos { Vec::new() } else { setup.settings.stop_ids(setup.tokenizer.as_ref(), chat) }
    }
}

/// How the model runs.
#[derive(Debug, Default, clap::Args)]
#[command(next_help_heading = "Engine")]
pub(crate) struct DecodeArgs {
    /// Keep no keys and values: run every sequence again for every token. Slow; for comparison.
    #[arg(long)]
    no_kv_cache: bool,
    /// Multiply with weights in fewer bits (8.25 and 4.5 a weight), quantized while the model is opened. On a CPU.
    #[arg(long, value_name = "int8|int4", conflicts_with = "no_kv_cache")]
    quantize: Option<Quantization>,
}

/// What is known of prompts before they are read.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Expected {
    /// When the program for steps is compiled.
    pub(crate) steps: Steps,
    /// Prompts side by side.
    pub(crate) sequences: usize,
    /// Tokens of the longest, about.
    pub(crate) tokens: usize,
}

impl DecodeArgs {
    /// Starts the engine, puts it into `cell`, and makes the model ready for such prompts, which takes longest before a first token,
    /// while `read` reads the tokenizer and what follows from it. The error of `read` comes first. There is no decoder where
    /// the model is not decoded over a cache.
    pub(crate) fn begin<'r, T>(
        &self,
        ui: &Ui,
        engine: &EngineArgs,
        cell: &'r OnceLock<Runtime>,
        (model, dtype): (Arc<Model>, DType),
        expected: Expected,
        read: impl FnOnce() -> Result<T, Failure>,
    ) -> Result<(&'r Runtime, Option<Decoder<'r>>, T), Failure> {
        if let Some(stored) = model.weights().stored.filter(|_| self.no_kv_cache) {
            return Err(Failure::usage(format!(
                "--no-kv-cache: {} holds weights quantized to {}, which are multiplied with over a cache only",
                model.path().display(),
                stored.format.name()
            )));
        }
        let ahead = Arc::clone(&model);
        let begin = || -> Result<(&'r Runtime, Option<Decoder<'r>>), Failure> {
            let started = engine.start(ui)?;
            let runtime = cell.get_or_init(|| started);
            if self.no_kv_cache {
                return Ok((runtime, None));
            }
            let mut decoder = Decoder::new(runtime, model, self.options(dtype, expected.sequences, MAX_CONTEXT))?;
            decoder.prepare_prompt(expected.tokens, expected.steps)?;
            Ok((runtime, Some(decoder)))
        };
        let stop = &AtomicBool::new(false);
        std::thread::scope(|scope| {
            let work = move || {
                let begun = begin();
                stop.store(true, Ordering::Relaxed);
                begun
            };
            let begun = std::thread::Builder::new().name("begin".to_owned()).spawn_scoped(scope, work)?;
            let read = read();
            if read.is_ok() && !self.no_kv_cache {
                // There is nothing else to do until the engine has begun.
                ahead.read_ahead(stop);
            }
            let begun = begun.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            let read = read?;
            let (runtime, decoder) = begun?;
            Ok((runtime, decoder, read))
        })
    }

    fn options(&self, dtype: DType, sequences: usize, context: usize) -> DecodeOptions {
        DecodeOptions { sequences, context, dtype, quantize: self.quantize, ..DecodeOptions::default() }
    }

    /// The model on the device, ready to be fed prompts of about so many tokens; `begun` is what [`DecodeArgs::begin`] gave, at
    /// `since`.
    pub(crate) fn start<'r>(
        &self,
        ui: &Ui,
        runtime: &'r Runtime,
        setup: &Setup,
        begun: Option<Decoder<'r>>,
        (expected, context, since): (Expected, usize, Instant),
    ) -> Result<Box<dyn LanguageModel + 'r>, Failure> {
        if self.no_kv_cache {
            let session = super::super::verify::place(ui, runtime, &setup.model, setup.dtype)?;
            return Ok(Box::new(Uncached::new(session, expected.sequences, context)));
        }
        let spinner = ui.spinner("placing weights, compiling");
        let begun = begun.and_then(|mut decoder| decoder.set_context(context).then_some(decoder));
        let mut decoder = match begun {
            Some(decoder) => decoder,
            None => {
                let options = self.options(setup.dtype, expected.sequences, context);
                Decoder::new(runtime, Arc::clone(&setup.model), options)?
            }
        };
        decoder.prepare_prompt(expected.tokens, expected.steps)?;
        spinner.finish_and_clear();
        let (placed, times) = (decoder.placed(), decoder.compile_times());
        ui.say(format!(
            "ready in {}: {} of weights used in place in the file, {} copied to aligned memory; {} programs, {} from the cache",
            seconds(since.elapsed()),
            bytes(placed.mapped_bytes as u64),
            bytes(placed.copied_bytes as u64),
            times.programs,
            times.cached
        ));
        Ok(Box::new(decoder))
    }
}
