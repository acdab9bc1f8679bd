//! `lapidary generate`.

mod output;
pub(super) mod setup;

use std::io::{IsTerminal, Read, Write};
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use engine::decode::Steps;
use engine::generate::chat::{ChatTemplate, Conversation, Part};
use engine::generate::{
    Finish, GenerateError, LanguageModel, Sampler, Sampling, Sequence, Timing, Verdict, Writer, encode_text,
    encode_written, generate,
};
use engine::kernels::Bandwidth;
use serde_json::json;

use self::setup::{ChatArgs, DecodeArgs, Expected, ModelArgs, SamplingArgs, Setup, json_list};
use super::{ArchArgs, CommandResult, EngineArgs, Failure, Outcome};
use crate::ui::{Ui, seconds};

/// Generate text.
///
/// Continues a text, or answers it in the chat format where the checkpoint has a chat template. The text goes to stdout as
/// it is generated; figures go to stderr. Several prompts are generated side by side.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// The model: a Hugging Face directory or a MaxText checkpoint (items, a step or a run).
    model: PathBuf,
    /// Text to continue or to answer. Can be given several times.
    #[arg(long, value_name = "TEXT", required_unless_present_any = ["prompt_file", "tokens", "messages", "words"])]
    prompt: Vec<String>,
    /// The same from a file; `-` is stdin.
    #[arg(long, value_name = "FILE")]
    prompt_file: Vec<PathBuf>,
    /// Token ids to continue, exactly as given; the answer is ids as well. Can be given several times.
    #[arg(long, value_name = "ID,ID,...")]
    tokens: Vec<String>,
    /// A conversation to answer: a JSON file with a list of messages, tool calls and results included.
    #[arg(long, value_name = "FILE", conflicts_with = "raw")]
    messages: Vec<PathBuf>,
    /// Put prompts into the chat format [default: where the checkpoint has a chat template].
    #[arg(long, conflicts_with = "raw")]
    chat: bool,
    /// Continue prompts as they are.
    #[arg(long)]
    raw: bool,
    /// Most tokens to generate for each prompt [default: as generation_config.json says, else 256].
    #[arg(long, short = 'n', value_name = "N")]
    max_new_tokens: Option<usize>,
    /// Room for tokens of a sequence, prompt included [default: what is needed].
    #[arg(long, value_name = "N")]
    context: Option<usize>,
    /// With --json: logarithmic probabilities of every token, and of the N most likely others.
    #[arg(long, value_name = "N", requires = "json")]
    logprobs: Option<usize>,
    /// Print everything as JSON on stdout, at the end.
    #[arg(long)]
    json: bool,
    /// Print the prompt as the model would see it, and its tokens on stderr, and end. With --json both on stdout.
    #[arg(long)]
    print_prompt: bool,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    chat_options: ChatArgs,
    #[command(flatten)]
    decode: DecodeArgs,
    #[command(flatten)]
    options: ModelArgs,
    #[command(flatten)]
    arch: ArchArgs,
    #[command(flatten)]
    engine: EngineArgs,
}

const EXAMPLES: &str = "\
Examples:
  lapidary generate ./gemma-4-E2B-it --prompt 'Why is the sky blue?'
  lapidary generate ./gemma-4-E2B --raw --prompt 'The capital of France is' --greedy -n 8
  lapidary generate ./gemma-4-E2B-it --prompt 'Plan a day in Rome.' --thinking --show-thinking --seed 1
  lapidary generate ./gemma-4-E2B-it --prompt 'Weather in Rome?' --tools tools.json --json
  lapidary generate ./run/checkpoints/900 --tokenizer bytes --prompt 'one cat' --temperature 0.7 --seed 1
  lapidary generate ./model --tokens 2,818,5279 --tokens 2,7 --greedy --json --logprobs 5

Sampling settings and the tokens that end a text come from the checkpoint. The same seed gives the same text.";

/// Tokens to generate where nothing says how many.
const DEFAULT_NEW_TOKENS: usize = 256;

/// One prompt, as the model sees it.
#[derive(Debug)]
struct Prompt {
    /// What a person gave.
    label: String,
    /// The text that was tokenized, if it was text.
    text: Option<String>,
    ids: Vec<i32>,
}

pub(crate) fn run(ui: &Ui, args: &Args) -> CommandResult {
    let mut setup = args.options.open_weights(ui, &args.model, &args.arch)?;
    let template = if args.raw { None } else { args.chat_options.template(&setup)? };
    let key = setup.keys.as_ref().is_some_and(|k| k.decode.use_chat_template);
    let chat = !args.raw && (args.chat || !args.messages.is_empty() || key || template.is_some());
    let template = template.as_ref().filter(|_| chat);
    if args.print_prompt {
        args.options.read_tokenizer(&mut setup, &args.model)?;
        let prompts = prompts(args, &setup, template, chat)?;
        if args.json {
            let each = prompts.iter().map(|p| json!({ "prompt": p.text, "prompt_tokens": p.ids }));
            ui.json(&json!({ "prompts": each.collect::<Vec<_>>() }))?;
            return Ok(Outcome::Yes);
        }
        for p in prompts {
            ui.data(p.text.as_deref().unwrap_or(&p.label));
            ui.say(format!("{} tokens: {}", p.ids.len(), output::id_list(&p.ids)));
        }
        return Ok(Outcome::Yes);
    }
    let sampling = args.sampling.sampling(&setup)?;
    let most = args.max_new_tokens.or(setup.settings.max_new_tokens).unwrap_or(DEFAULT_NEW_TOKENS);

    let (clock, cell) = (Instant::now(), OnceLock::new());
    let (model, expected) = ((Arc::clone(&setup.model), setup.dtype), expected(args, chat));
    let (runtime, begun, prompts) = args.decode.begin(ui, &args.engine, &cell, model, expected, || {
        args.options.read_tokenizer(&mut setup, &args.model)?;
        prompts(args, &setup, template, chat)
    })?;
    let stop_ids = args.sampling.stop_ids(&setup, chat);
    let longest = prompts.iter().map(|p| p.ids.len()).max().unwrap_or(0);
    let room = setup.settings.max_positions.unwrap_or(usize::MAX);
    let context = args.context.unwrap_or_else(|| longest.saturating_add(most).min(room));
    setup.check_context(context.max(longest))?;
    if longest > context {
        return Err(Failure::usage(format!("a prompt has {longest} tokens, --context gives room for {context}")));
    }
    say_settings(ui, &setup, &sampling, chat);
    let known = Expected { steps: Steps::AfterPrompt, sequences: prompts.len(), tokens: longest };
    let mut model = args.decode.start(ui, runtime, &setup, begun, (known, context, clock))?;
    let mut samplers = prompts
        .iter()
        .enumerate()
        .map(|(i, p)| {
            let mut sampler = Sampler::new(sampling.clone(), i, args.logprobs)?;
            sampler.observe(&p.ids);
            Ok(sampler)
        })
        .collect::<Result<Vec<_>, GenerateError>>()?;
    let mut sequences: Vec<Sequence<'_>> = prompts
        .iter()
        .zip(&mut samplers)
        .map(|(p, sampler)| Sequence { prompt: &p.ids, sampler, max_new_tokens: most })
        .collect();
    let mut writers: Vec<Writer<'_>> =
        prompts.iter().map(|_| Writer::new(setup.tokenizer.as_ref(), chat, &args.sampling.stop)).collect();
    // One text streams; of several, each is printed when all are there.
    let streams = prompts.len() == 1 && !args.json && prompts[0].text.is_some();
    let mut printer = Printer::new(args.chat_options.show_thinking);
    let (finishes, timing) = generate(model.as_mut(), &mut sequences, &stop_ids, |slot, choice| {
        let verdict = writers[slot].take(choice, &stop_ids, &mut |part| {
            if streams {
                printer.print(part);
            }
        })?;
        Ok(if printer.closed { Verdict::Finish(Finish::Cancelled) } else { verdict })
    })?;
    for writer in &mut writers {
        writer.finish(&mut |part| {
            if streams {
                printer.print(part);
            }
        })?;
    }
    let speed = Speed::of(model.as_ref(), &timing);
    if args.json {
        let mut report =
            output::report(args.logprobs, &setup, &sampling, &stop_ids, &prompts, &writers, &finishes, &timing);
        report["timing"]["weight_bytes_per_second"] = speed.as_ref().map(|s| s.weights).into();
        report["timing"]["read_bandwidth"] = speed.as_ref().map(|s| s.memory).into();
        ui.json(&report)?;
    } else if streams {
        printer.end();
    } else {
        for (p, writer) in prompts.iter().zip(&writers) {
            if prompts.len() > 1 {
                ui.say(ui.bold(&format!("# {}", p.label)));
            }
            if p.text.is_none() {
                ui.data(output::id_list(&writer.choices.iter().map(|c| c.id).collect::<Vec<_>>()));
                continue;
            }
            let response = &writer.response;
            if !response.thought.is_empty() {
                printer.print(&Part::Thought(response.thought.clone()));
            }
            printer.print(&Part::Answer(response.answer.clone()));
            response.calls.iter().for_each(|call| printer.print(&Part::Call(call.clone())));
            printer.end();
        }
    }
    say_timing(ui, &timing);
    if let Some(speed) = speed {
        ui.say(format!(
            "weights were read at {:.1} GB/s, {:.0} % of the {:.1} GB/s at which memory is read now",
            speed.weights / 1e9,
            100.0 * speed.weights / speed.memory,
            speed.memory / 1e9
        ));
    }
    Ok(Outcome::Yes)
}

/// Speeds in bytes a second.
#[derive(Debug)]
struct Speed {
    /// Of reading weights, in all steps.
    weights: f64,
    /// Of reading memory, measured when the last step was done.
    memory: f64,
}

/// Fewer steps say nothing, and the measurement takes as long as a step or two.
const STEPS_TO_MEASURE: usize = 8;

impl Speed {
    fn of(model: &dyn LanguageModel, timing: &Timing) -> Option<Self> {
        let bytes = model.bytes_per_step().filter(|_| timing.steps >= STEPS_TO_MEASURE)?;
        let weights = bytes as f64 * timing.steps as f64 / timing.decode.as_secs_f64();
        // Without memory to read there is nothing to say.
        let memory = Bandwidth::new().ok()?.measure(3);
        Some(Speed { weights, memory })
    }
}

/// What can be said of prompts before there is a tokenizer: a token is about four bytes of text. A wrong guess costs the time of
/// loading a program that is not used.
fn expected(args: &Args, chat: bool) -> Expected {
    let file = |path: &PathBuf| std::fs::metadata(path).map_or(0, |m| m.len() as usize);
    let texts = args.prompt.iter().map(String::len).chain(args.prompt_file.iter().chain(&args.messages).map(file));
    // Turns are marked by a few tokens.
    let of_text = texts.map(|bytes| bytes.div_ceil(4) + if chat { 8 } else { 1 });
    let given = args.tokens.iter().map(|list| list.split(',').count());
    let sizes: Vec<usize> = of_text.chain(given).collect();
    Expected { steps: Steps::AfterPrompt, sequences: sizes.len().max(1), tokens: sizes.into_iter().max().unwrap_or(1) }
}

/// Every prompt, in the order of the options.
fn prompts(args: &Args, setup: &Setup, template: Option<&ChatTemplate>, chat: bool) -> Result<Vec<Prompt>, Failure> {
    let mut texts = args.prompt.clone();
    for path in &args.prompt_file {
        texts.push(if path.as_os_str() == "-" {
            let mut text = String::new();
            std::io::stdin().read_to_string(&mut text)?;
            text
        } else {
            fs_err::read_to_string(path)?
        });
    }
    let of_key = setup.keys.as_ref().map(|k| k.decode.prompt.clone());
    if texts.is_empty() && args.tokens.is_empty() && args.messages.is_empty() {
        texts.extend(of_key);
    }
    let need_template = || {
        template.ok_or_else(|| {
            Failure::usage(format!("{} has no chat template", setup.model.path().display()))
                .hint("give one with --chat-template, or continue the text with --raw")
        })
    };
    let render = |label: String, conversation: &Conversation| -> Result<Prompt, Failure> {
        let text = need_template()?.render(conversation, true)?;
        let ids = encode_written(setup.tokenizer()?, &text)?;
        Ok(Prompt { label, text: Some(text), ids })
    };
    let mut out = Vec::new();
    for text in texts {
        out.push(if chat {
            let mut conversation = args.chat_options.conversation(setup)?;
            conversation.push("user", &text);
            render(text, &conversation)?
        } else {
            let ids = encode_text(setup.tokenizer()?, &text)?;
            Prompt { label: text.clone(), text: Some(text), ids }
        });
    }
    for path in &args.messages {
        let mut conversation = args.chat_options.conversation(setup)?;
        conversation.messages.extend(json_list(path, "a list of messages")?);
        out.push(render(path.display().to_string(), &conversation)?);
    }
    for list in &args.tokens {
        let ids =
            output::parse_ids(list).map_err(|word| Failure::usage(format!("--tokens: `{word}` is no token id")))?;
        out.push(Prompt { label: list.clone(), text: None, ids });
    }
    if let Some(p) = out.iter().find(|p| p.ids.is_empty()) {
        return Err(Failure::usage(format!("the prompt {:?} has no tokens", p.label)));
    }
    Ok(out)
}

/// What decides the text, in a line.
pub(super) fn say_settings(ui: &Ui, setup: &Setup, sampling: &Sampling, chat: bool) {
    let mut how = if sampling.draws() {
        format!(
            "temperature {}, top-k {}, top-p {}, min-p {}, seed {}",
            sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p, sampling.seed
        )
    } else {
        "the most likely token".to_owned()
    };
    if sampling.repetition_penalty != 1.0 {
        how += &format!(", repetition penalty {}", sampling.repetition_penalty);
    }
    ui.say(format!("{}; {how}; activations {}", if chat { "chat" } else { "plain text" }, setup.dtype));
    for key in &setup.settings.ignored {
        ui.say(format!("note: `{key}` of generation_config.json has no effect here"));
    }
}

/// Tokens a second and the time to the first.
pub(super) fn say_timing(ui: &Ui, timing: &Timing) {
    let rate = timing.tokens_per_second().map_or_else(String::new, |r| format!(", then {r:.1} tokens/s"));
    ui.say(format!(
        "{} prompt tokens, first token after {}{rate} ({} tokens)",
        timing.prompt_tokens,
        seconds(timing.first_token),
        timing.new_tokens
    ));
}

/// Prints an answer as it comes: the answer and tool calls to stdout, thoughts to stderr.
#[derive(Debug)]
pub(super) struct Printer {
    show_thinking: bool,
    /// Whether the last character was a line feed, on stdout and on stderr.
    fresh: [bool; 2],
    /// Whether nobody reads stdout any more.
    pub(super) closed: bool,
}

impl Printer {
    pub(super) fn new(show_thinking: bool) -> Self {
        Printer { show_thinking, fresh: [true; 2], closed: false }
    }

    pub(super) fn print(&mut self, part: &Part) {
        match part {
            Part::Answer(text) => {
                self.line_on_stderr();
                self.write(text);
            }
            Part::Thought(text) if self.show_thinking => {
                let dim = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty());
                let mut err = std::io::stderr().lock();
                let _ = if dim { write!(err, "\x1b[2m{text}\x1b[0m") } else { write!(err, "{text}") };
                let _ = err.flush();
                self.fresh[1] = text.ends_with('\n');
            }
            Part::Thought(_) => {}
            Part::Call(call) => {
                self.line_on_stderr();
                self.end();
                // A call of names and JSON always has JSON.
                self.write(&serde_json::to_string(call).unwrap_or_default());
                self.end();
            }
            Part::BadCall { text, reason } => {
                self.line_on_stderr();
                let _ = writeln!(std::io::stderr().lock(), "a tool call that cannot be read ({reason}): {text}");
            }
        }
    }

    /// Ends the line, if one was begun.
    pub(super) fn end(&mut self) {
        self.line_on_stderr();
        if !self.fresh[0] {
            self.write("\n");
        }
    }

    fn line_on_stderr(&mut self) {
        if !self.fresh[1] {
            let _ = writeln!(std::io::stderr().lock());
            self.fresh[1] = true;
        }
    }

    fn write(&mut self, text: &str) {
        if text.is_empty() {
            return;
        }
        self.fresh[0] = text.ends_with('\n');
        let mut out = std::io::stdout().lock();
        self.closed |= out.write_all(text.as_bytes()).and_then(|()| out.flush()).is_err();
    }
}
