//! `lapidary chat`.

use std::io::{BufRead, IsTerminal};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use engine::decode::Steps;
use engine::generate::chat::{ChatTemplate, Conversation};
use engine::generate::{Finish, LanguageModel, Sampler, Sequence, Timing, Verdict, Writer, encode_written, generate};
use serde_json::json;
use signal_hook::consts::SIGINT;

use super::generate::setup::{ChatArgs, DecodeArgs, Expected, ModelArgs, SamplingArgs, Setup};
use super::generate::{Printer, say_settings, say_timing};
use super::{ArchArgs, CommandResult, EngineArgs, Failure, Outcome};
use crate::ui::Ui;

/// Talk with an instruction-tuned model.
///
/// Answers stream; the model sees the whole conversation. Ctrl-C stops an answer, and the program only where none is being
/// written. Without a terminal every line of stdin is a message.
#[derive(Debug, clap::Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Args {
    /// The model: a Hugging Face directory or a MaxText checkpoint (items, a step or a run).
    model: PathBuf,
    /// Most tokens of an answer [default: what there is room for].
    #[arg(long, short = 'n', value_name = "N")]
    max_new_tokens: Option<usize>,
    /// Room for tokens of the whole conversation.
    #[arg(long, value_name = "N", default_value_t = 8192)]
    context: usize,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    chat: ChatArgs,
    #[command(flatten)]
    decode: DecodeArgs,
    #[command(flatten)]
    options: ModelArgs,
    #[command(flatten)]
    arch: ArchArgs,
    #[command(flatten)]
    engine: EngineArgs,
}

const AFTER_HELP: &str = "\
In the conversation:
  /reset    begin anew
  /exit     end, as Ctrl-D does
  Ctrl-C    stop the answer

Examples:
  lapidary chat ./gemma-4-E2B-it
  lapidary chat ./gemma-4-E2B-it --system 'Answer in one sentence.' --temperature 0.7 --seed 1";

/// Tokens of a message for which programs are compiled before the first.
const TYPICAL_MESSAGE: usize = 64;

pub(crate) fn run(ui: &Ui, args: &Args) -> CommandResult {
    let mut setup = args.options.open_weights(ui, &args.model, &args.arch)?;
    let template = args.chat.template(&setup)?.ok_or_else(|| {
        Failure::usage(format!("{} has no chat template, so it is no model to talk with", setup.model.path().display()))
            .hint("give one with --chat-template, or continue text with `lapidary generate --raw`")
    })?;
    let context = args.context.min(setup.settings.max_positions.unwrap_or(usize::MAX));
    let sampling = args.sampling.sampling(&setup)?;
    let (clock, cell) = (Instant::now(), OnceLock::new());
    let model = (Arc::clone(&setup.model), setup.dtype);
    let expected = Expected { steps: Steps::BeforePrompt, sequences: 1, tokens: TYPICAL_MESSAGE };
    let (runtime, begun, ()) = args.decode.begin(ui, &args.engine, &cell, model, expected, || {
        args.options.read_tokenizer(&mut setup, &args.model)?;
        setup.tokenizer().map(|_| ())
    })?;
    say_settings(ui, &setup, &sampling, true);
    let sampler = Sampler::new(sampling, 0, None)?;
    let conversation = args.chat.conversation(&setup)?;

    let interrupt = Interrupt::new()?;
    let model = args.decode.start(ui, runtime, &setup, begun, (expected, context, clock))?;
    let mut dialogue = Dialogue {
        ui,
        args,
        setup: &setup,
        template: &template,
        stop_ids: args.sampling.stop_ids(&setup, true),
        model,
        fed: Vec::new(),
        sampler,
        beginning: conversation.clone(),
        conversation,
        interrupt: &interrupt,
    };
    let mut lines = Lines::new()?;
    ui.say("/reset begins anew, /exit ends");
    while let Some(line) = lines.next()? {
        match line.trim() {
            "" => {}
            "/exit" | "/quit" => break,
            "/reset" => {
                dialogue.reset();
                ui.say("a new conversation");
            }
            command if command.starts_with('/') && !command.contains(' ') => {
                ui.say(format!("no such command: {command} (there are /reset and /exit)"));
            }
            message => {
                if let Some(timing) = dialogue.answer(message)? {
                    say_timing(ui, &timing);
                }
            }
        }
    }
    Ok(Outcome::Yes)
}

/// A conversation and the model that has seen part of it.
struct Dialogue<'a> {
    ui: &'a Ui,
    args: &'a Args,
    setup: &'a Setup,
    template: &'a ChatTemplate,
    stop_ids: Vec<i32>,
    model: Box<dyn LanguageModel + 'a>,
    /// Tokens the model holds.
    fed: Vec<i32>,
    sampler: Sampler,
    beginning: Conversation,
    conversation: Conversation,
    interrupt: &'a Interrupt,
}

impl Dialogue<'_> {
    fn reset(&mut self) {
        self.conversation = self.beginning.clone();
        self.model.reset();
        self.fed.clear();
        self.sampler.forget();
    }

    /// Answers a message; `None` where there is no room for it, and the conversation is as it was.
    fn answer(&mut self, message: &str) -> Result<Option<Timing>, Failure> {
        self.conversation.push("user", message);
        let text = self.template.render(&self.conversation, true)?;
        let ids = encode_written(self.setup.tokenizer()?, &text)?;
        let room = self.model.context().saturating_sub(ids.len());
        if room == 0 {
            self.conversation.messages.pop();
            self.ui.say(format!(
                "the conversation has {} tokens, there is room for {}: /reset, or start with a larger --context",
                ids.len(),
                self.model.context()
            ));
            return Ok(None);
        }
        // What the model holds is used where the conversation still begins with it.
        if !ids.starts_with(&self.fed) || ids.len() == self.fed.len() {
            self.model.reset();
            self.fed.clear();
            self.sampler.forget();
        }
        let prompt = &ids[self.fed.len()..];
        self.sampler.observe(prompt);
        let mut writer = Writer::new(self.setup.tokenizer.as_ref(), true, &self.args.sampling.stop);
        let mut printer = Printer::new(self.args.chat.show_thinking);
        let most = self.args.max_new_tokens.unwrap_or(usize::MAX).min(room);
        let answering = self.interrupt.answering();
        let mut sequence = [Sequence { prompt, sampler: &mut self.sampler, max_new_tokens: most }];
        let outcome = generate(self.model.as_mut(), &mut sequence, &self.stop_ids, |_, choice| {
            let verdict = writer.take(choice, &self.stop_ids, &mut |part| printer.print(part))?;
            Ok(if answering.interrupted() || printer.closed { Verdict::Finish(Finish::Cancelled) } else { verdict })
        });
        drop(answering);
        let (finish, timing) = outcome?;
        writer.finish(&mut |part| printer.print(part))?;
        printer.end();
        match &finish[0] {
            Finish::Cancelled => self.ui.say("stopped"),
            Finish::Length => self.ui.say("no room for more: see --max-new-tokens and --context"),
            Finish::Context => self.ui.say("no room for more: /reset, or start with a larger --context"),
            _ => {}
        }
        // All but the last token were fed.
        self.fed.clone_from(&ids);
        self.fed.extend(writer.choices.iter().map(|c| c.id));
        self.fed.pop();
        if !writer.response.calls.is_empty() {
            self.ui.say("tools are not run here; what they would give can be told as the next message");
        }
        self.conversation.messages.push(if writer.response.calls.is_empty() {
            writer.response.message()
        } else {
            json!({ "role": "assistant", "content": writer.response.answer.trim() })
        });
        Ok(Some(timing))
    }
}

/// What Ctrl-C does: ends the program while it waits, and only the answer while one is written.
struct Interrupt {
    waiting: Arc<AtomicBool>,
    pressed: Arc<AtomicBool>,
}

impl Interrupt {
    fn new() -> Result<Self, Failure> {
        let (waiting, pressed) = (Arc::new(AtomicBool::new(true)), Arc::new(AtomicBool::new(false)));
        signal_hook::flag::register_conditional_default(SIGINT, Arc::clone(&waiting))?;
        signal_hook::flag::register(SIGINT, Arc::clone(&pressed))?;
        Ok(Interrupt { waiting, pressed })
    }

    fn answering(&self) -> Answering<'_> {
        self.pressed.store(false, Ordering::SeqCst);
        self.waiting.store(false, Ordering::SeqCst);
        Answering(self)
    }
}

/// An answer is being written.
struct Answering<'a>(&'a Interrupt);

impl Answering<'_> {
    fn interrupted(&self) -> bool {
        self.0.pressed.load(Ordering::SeqCst)
    }
}

impl Drop for Answering<'_> {
    fn drop(&mut self) {
        self.0.waiting.store(true, Ordering::SeqCst);
    }
}

/// Lines a person types, with history and editing on a terminal.
enum Lines {
    Terminal(Box<rustyline::DefaultEditor>),
    Plain(std::io::Lines<std::io::StdinLock<'static>>),
}

impl Lines {
    fn new() -> Result<Self, Failure> {
        if std::io::stdin().is_terminal() && std::io::stdout().is_terminal() {
            return Ok(Lines::Terminal(Box::new(rustyline::DefaultEditor::new()?)));
        }
        Ok(Lines::Plain(std::io::stdin().lock().lines()))
    }

    fn next(&mut self) -> Result<Option<String>, Failure> {
        use rustyline::error::ReadlineError::{Eof, Interrupted};
        match self {
            Lines::Plain(lines) => Ok(lines.next().transpose()?),
            Lines::Terminal(editor) => loop {
                match editor.readline("> ") {
                    Ok(line) => {
                        // Its history is in memory; a full one is no reason to stop.
                        let _ = editor.add_history_entry(&line);
                        return Ok(Some(line));
                    }
                    // Drops the line, as shells do.
                    Err(Interrupted) => {}
                    Err(Eof) => return Ok(None),
                    Err(error) => return Err(error.into()),
                }
            },
        }
    }
}
