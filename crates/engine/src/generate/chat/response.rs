//! What the model answers: the answer itself, what it thought, and the tools it calls.
//!
//! Gemma 4 writes thoughts as `<|channel>thought`, a line feed, the text and `<channel|>`, and tool calls between
//! `<|tool_call>` and `<tool_call|>`. These marks are tokens of their own, so they are found by id: a text that only spells
//! one out does not count as one.

use serde_json::Value;

use super::tool_call::{QUOTE, ToolCall};
use crate::data::Tokenizer;
use crate::generate::{GenerateError, TextStream};

/// Longest name of a channel; a first line beyond it is text.
const LONGEST_NAME: usize = 32;

/// A piece of an answer.
#[derive(Debug, Clone, PartialEq)]
pub enum Part {
    /// Text of the answer.
    Answer(String),
    /// Text of a thought.
    Thought(String),
    /// A call of a tool.
    Call(ToolCall),
    /// What stood where a tool call should, and why it is none.
    BadCall {
        /// The text.
        text: String,
        /// What is wrong with it.
        reason: String,
    },
}

/// A whole answer.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Response {
    /// The answer.
    pub answer: String,
    /// What was thought.
    pub thought: String,
    /// The tools that were called.
    pub calls: Vec<ToolCall>,
    /// Texts of tool calls that cannot be read.
    pub bad_calls: Vec<String>,
}

impl Response {
    /// Adds a piece.
    pub fn add(&mut self, part: Part) {
        match part {
            Part::Answer(text) => self.answer.push_str(&text),
            Part::Thought(text) => self.thought.push_str(&text),
            Part::Call(call) => self.calls.push(call),
            Part::BadCall { text, .. } => self.bad_calls.push(text),
        }
    }

    /// The answer as a message of a conversation.
    #[must_use]
    pub fn message(&self) -> Value {
        let mut message = serde_json::json!({ "role": "assistant", "content": self.answer.trim() });
        if !self.calls.is_empty() {
            let call = |c: &ToolCall| serde_json::json!({ "type": "function", "function": { "name": c.name, "arguments": c.arguments } });
            message["tool_calls"] = self.calls.iter().map(call).collect();
            // Thoughts are part of the history where they led to a call; the template leaves out all others.
            if !self.thought.is_empty() {
                message["reasoning"] = self.thought.trim().into();
            }
        }
        message
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Answer,
    /// The name of a channel, up to the end of its line.
    Name,
    Thought,
    Call,
}

/// Takes tokens one at a time and gives the pieces of the answer.
#[derive(Debug, Clone)]
pub struct ResponseStream<'t> {
    tokenizer: &'t Tokenizer,
    text: TextStream<'t>,
    marks: Marks,
    state: State,
    /// Text of a channel's name or of a tool call, until it is complete.
    held: String,
}

#[derive(Debug, Clone, Copy)]
struct Marks {
    channel: [Option<u32>; 2],
    call: [Option<u32>; 2],
    quote: Option<u32>,
}

impl<'t> ResponseStream<'t> {
    /// An empty answer.
    #[must_use]
    pub fn new(tokenizer: &'t Tokenizer) -> Self {
        let id = |token| tokenizer.special_id(token);
        let marks = Marks {
            channel: [id("<|channel>"), id("<channel|>")],
            call: [id("<|tool_call>"), id("<tool_call|>")],
            quote: id(QUOTE),
        };
        ResponseStream { tokenizer, text: TextStream::new(tokenizer), marks, state: State::Answer, held: String::new() }
    }

    /// A text without marks: everything is answer.
    #[must_use]
    pub fn plain(tokenizer: &'t Tokenizer) -> Self {
        let marks = Marks { channel: [None; 2], call: [None; 2], quote: None };
        ResponseStream { tokenizer, text: TextStream::new(tokenizer), marks, state: State::Answer, held: String::new() }
    }

    /// Takes a token.
    ///
    /// # Errors
    /// What the tokenizer says.
    pub fn push(&mut self, id: u32) -> Result<Vec<Part>, GenerateError> {
        let mut parts = Vec::new();
        let is = |mark: Option<u32>| mark == Some(id);
        let next = match self.state {
            State::Answer | State::Name | State::Thought if is(self.marks.call[0]) => Some(State::Call),
            State::Answer if is(self.marks.channel[0]) => Some(State::Name),
            State::Name | State::Thought if is(self.marks.channel[1]) => Some(State::Answer),
            State::Call if is(self.marks.call[1]) => Some(State::Answer),
            _ => None,
        };
        if let Some(next) = next {
            self.close(&mut parts)?;
            self.state = next;
            self.text = TextStream::new(self.tokenizer);
            return Ok(parts);
        }
        if self.state == State::Call && is(self.marks.quote) {
            let rest = self.text.finish()?;
            self.take(rest, &mut parts);
            self.take(QUOTE.to_owned(), &mut parts);
            return Ok(parts);
        }
        let text = self.text.push(id)?;
        self.take(text, &mut parts);
        Ok(parts)
    }

    /// What is left when no token follows.
    ///
    /// # Errors
    /// What the tokenizer says.
    pub fn finish(&mut self) -> Result<Vec<Part>, GenerateError> {
        let mut parts = Vec::new();
        self.close(&mut parts)?;
        self.state = State::Answer;
        Ok(parts)
    }

    /// New text in the present state.
    fn take(&mut self, text: String, parts: &mut Vec<Part>) {
        if text.is_empty() {
            return;
        }
        match self.state {
            State::Answer => parts.push(Part::Answer(text)),
            State::Thought => parts.push(Part::Thought(text)),
            State::Call => self.held.push_str(&text),
            State::Name => {
                self.held.push_str(&text);
                if let Some((_, thought)) = self.held.split_once('\n') {
                    let thought = thought.to_owned();
                    self.held.clear();
                    self.state = State::Thought;
                    self.take(thought, parts);
                } else if self.held.len() > LONGEST_NAME {
                    self.state = State::Thought;
                    let thought = std::mem::take(&mut self.held);
                    self.take(thought, parts);
                }
            }
        }
    }

    /// Ends the present state.
    fn close(&mut self, parts: &mut Vec<Part>) -> Result<(), GenerateError> {
        let rest = self.text.finish()?;
        self.take(rest, parts);
        let held = std::mem::take(&mut self.held);
        if self.state == State::Call {
            parts.push(match ToolCall::parse(&held) {
                Ok(call) => Part::Call(call),
                Err(error) => Part::BadCall { text: held, reason: error.to_string() },
            });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::generate::text::tests::gemma;

    fn answer(tokenizer: &Tokenizer, ids: &[u32]) -> (Response, Vec<Part>) {
        let mut stream = ResponseStream::new(tokenizer);
        let mut parts: Vec<Part> = ids.iter().flat_map(|id| stream.push(*id).unwrap()).collect();
        parts.extend(stream.finish().unwrap());
        let mut response = Response::default();
        parts.iter().cloned().for_each(|part| response.add(part));
        (response, parts)
    }

    #[test]
    fn thoughts_answers_and_calls_are_told_apart() {
        let t = gemma();
        let text = "<|channel>thought\nIs it é?\nYes.<channel|>It is é.<|tool_call>call:look{at:<|\"|>a, b<|\"|>,n:2}<tool_call|><|tool_response>";
        let (r, parts) = answer(&t, &t.encode(text).unwrap());
        assert_eq!(r.thought, "Is it é?\nYes.");
        assert_eq!(r.answer, "It is é.");
        assert_eq!(r.calls, [ToolCall { name: "look".into(), arguments: json!({"at": "a, b", "n": 2}) }]);
        assert!(parts.len() > 10, "it streams: {parts:?}");
        assert_eq!(
            r.message(),
            json!({"role": "assistant", "content": "It is é.", "reasoning": "Is it é?\nYes.", "tool_calls": [
                {"type": "function", "function": {"name": "look", "arguments": {"at": "a, b", "n": 2}}}]})
        );
    }

    #[test]
    fn what_is_cut_off_is_kept() {
        let t = gemma();
        let run = |text: &str| answer(&t, &t.encode(text).unwrap()).0;
        assert_eq!(run("<|channel>thought\nhm").thought, "hm");
        assert_eq!(run("<|channel>thou"), Response::default());
        assert_eq!(run("<|channel>thought\n<channel|>a").answer, "a");
        assert_eq!(run("<|tool_call>call:f{").bad_calls, ["call:f{"]);
        assert_eq!(run("a<channel|>b<tool_call|>c").answer, "abc");
        let long = "x".repeat(50);
        assert_eq!(run(&format!("<|channel>{long}")).thought, long);
        // A text that spells a mark in letters is text.
        let letters: Vec<u32> = "<|channel>".chars().flat_map(|c| t.encode(&c.to_string()).unwrap()).collect();
        assert_eq!(answer(&t, &letters).0.answer, "<|channel>");
        // A tokenizer without marks.
        let bytes = Tokenizer::bytes();
        assert_eq!(answer(&bytes, &bytes.encode("<|channel>é").unwrap()).0.answer, "<|channel>é");
    }

    proptest! {
        #[test]
        fn any_tokens_do_no_harm(ids in prop::collection::vec(0u32..400, 0..60)) {
            let t = gemma();
            let (response, _) = answer(&t, &ids);
            prop_assert!(!response.answer.contains("<|channel>") || ids.len() > 8);
        }
    }
}
