//! The text of one sequence while it is generated.

use super::chat::{Part, Response, ResponseStream};
use super::{Choice, Finish, GenerateError, StopStrings, Verdict};
use crate::data::Tokenizer;

/// Takes the tokens of one sequence, and gives text as soon as it is certain.
#[derive(Debug)]
pub struct Writer<'t> {
    stream: Option<ResponseStream<'t>>,
    stops: StopStrings,
    ended: bool,
    /// Every token so far, the one that ended the text included.
    pub choices: Vec<Choice>,
    /// All text so far.
    pub response: Response,
}

impl<'t> Writer<'t> {
    /// A writer of plain text, or with `chat` of answers with thoughts and tool calls. Without a tokenizer there is no
    /// text, only tokens. `stops` end an answer; they are not part of it.
    #[must_use]
    pub fn new(tokenizer: Option<&'t Tokenizer>, chat: bool, stops: &[String]) -> Self {
        let stream = tokenizer.map(|t| if chat { ResponseStream::new(t) } else { ResponseStream::plain(t) });
        Writer {
            stream,
            stops: StopStrings::new(stops),
            ended: false,
            choices: Vec::new(),
            response: Response::default(),
        }
    }

    /// Takes a token; `show` gets the text that is new. A token of `stop_ids` ends the text and is no part of it.
    ///
    /// # Errors
    /// What the tokenizer says.
    pub fn take(
        &mut self,
        choice: &Choice,
        stop_ids: &[i32],
        show: &mut dyn FnMut(&Part),
    ) -> Result<Verdict, GenerateError> {
        self.choices.push(choice.clone());
        let Some(stream) = &mut self.stream else { return Ok(Verdict::Continue) };
        if stop_ids.contains(&choice.id) || self.ended {
            return Ok(Verdict::Continue);
        }
        // Ids come from logits, so they are not negative.
        let parts = stream.push(u32::try_from(choice.id).unwrap_or_default())?;
        Ok(match self.write(parts, show) {
            Some(stop) => Verdict::Finish(Finish::StopString(stop)),
            None => Verdict::Continue,
        })
    }

    /// Gives what was held back, once no token follows.
    ///
    /// # Errors
    /// What the tokenizer says.
    pub fn finish(&mut self, show: &mut dyn FnMut(&Part)) -> Result<(), GenerateError> {
        if self.ended {
            return Ok(());
        }
        let parts = self.stream.as_mut().map(ResponseStream::finish).transpose()?.unwrap_or_default();
        if self.write(parts, show).is_none() {
            self.release(show);
        }
        self.ended = true;
        Ok(())
    }

    /// Writes pieces; gives the stop string that was met.
    fn write(&mut self, parts: Vec<Part>, show: &mut dyn FnMut(&Part)) -> Option<String> {
        for part in parts {
            match part {
                Part::Answer(text) => {
                    let (text, met) = self.stops.push(&text);
                    self.put(Part::Answer(text), show);
                    if met.is_some() {
                        self.ended = true;
                        return met;
                    }
                }
                other => {
                    self.release(show);
                    self.put(other, show);
                }
            }
        }
        None
    }

    fn release(&mut self, show: &mut dyn FnMut(&Part)) {
        let text = self.stops.finish();
        self.put(Part::Answer(text), show);
    }

    fn put(&mut self, part: Part, show: &mut dyn FnMut(&Part)) {
        if part != Part::Answer(String::new()) {
            show(&part);
            self.response.add(part);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::generate::text::tests::gemma;

    fn write(text: &str, chat: bool, stops: &[&str], stop_ids: &[i32]) -> (Response, Vec<Part>, Option<Verdict>) {
        let t = gemma();
        let stops: Vec<String> = stops.iter().map(ToString::to_string).collect();
        let mut w = Writer::new(Some(&t), chat, &stops);
        let (mut shown, mut end) = (Vec::new(), None);
        for id in t.encode(text).unwrap() {
            let choice = Choice { id: id as i32, logprob: None, top: Vec::new() };
            let verdict = w.take(&choice, stop_ids, &mut |p| shown.push(p.clone())).unwrap();
            if verdict != Verdict::Continue || stop_ids.contains(&(id as i32)) {
                end = Some(verdict);
                break;
            }
        }
        w.finish(&mut |p| shown.push(p.clone())).unwrap();
        let mut again = Response::default();
        shown.iter().cloned().for_each(|p| again.add(p));
        assert_eq!(again, w.response);
        (w.response, shown, end)
    }

    #[test]
    fn stop_strings_end_the_answer_and_not_the_thought() {
        let (r, _, end) = write("<|channel>thought\nx END y<channel|>a END b", true, &["END"], &[]);
        assert_eq!((r.thought.as_str(), r.answer.as_str()), ("x END y", "a "));
        assert_eq!(end, Some(Verdict::Finish(Finish::StopString("END".to_owned()))));
    }

    #[test]
    fn what_was_held_comes_out_at_the_end() {
        let (r, shown, end) = write("a EN<turn|>", true, &["END"], &[106]);
        assert_eq!((r.answer.as_str(), end), ("a EN", Some(Verdict::Continue)));
        assert_eq!(shown.last(), Some(&Part::Answer("EN".to_owned())));
    }

    #[test]
    fn plain_text_has_no_channels() {
        let (r, _, _) = write("<|channel>thought\nx<channel|>a", false, &[], &[]);
        assert_eq!((r.answer.as_str(), r.thought.as_str()), ("thought\nxa", ""));
    }

    #[test]
    fn tokens_without_a_tokenizer() {
        let mut w = Writer::new(None, false, &[]);
        let choice = Choice { id: 7, logprob: None, top: Vec::new() };
        assert_eq!(w.take(&choice, &[], &mut |_| panic!("no text")).unwrap(), Verdict::Continue);
        w.finish(&mut |_| panic!("no text")).unwrap();
        assert_eq!(w.choices, [choice]);
    }
}
