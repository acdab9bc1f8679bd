//! Text in and out: the start token of a prompt, and text that grows token by token.

use super::GenerateError;
use crate::data::Tokenizer;

/// What a broken character is shown as.
const REPLACEMENT: char = '\u{fffd}';

/// Ids of a text to continue, with the start token: it is put there unless the text begins with it, or the tokenizer's
/// configuration says not to.
///
/// # Errors
/// When the tokenizer does not take the text.
pub fn encode_text(tokenizer: &Tokenizer, text: &str) -> Result<Vec<i32>, GenerateError> {
    let mut ids = encode_written(tokenizer, text)?;
    if let Some(bos) = tokenizer.bos.map(|bos| bos as i32)
        && tokenizer.add_bos != Some(false)
        && ids.first() != Some(&bos)
    {
        ids.insert(0, bos);
    }
    Ok(ids)
}

/// Ids of a text that says itself where special tokens go, as chat templates do.
///
/// # Errors
/// When the tokenizer does not take the text.
pub fn encode_written(tokenizer: &Tokenizer, text: &str) -> Result<Vec<i32>, GenerateError> {
    let ids = tokenizer.encode(text).map_err(GenerateError::Text)?;
    Ok(ids.into_iter().map(|id| id as i32).collect())
}

/// Text of tokens that come one at a time.
///
/// Characters come out whole: their bytes are held until the last is there. Nothing comes out twice, and all that came out
/// is together the text of all tokens. Bytes that can be no character come out as replacement characters.
#[derive(Debug, Clone)]
pub struct TextStream<'t> {
    tokenizer: &'t Tokenizer,
    /// Bytes of a character that is not complete.
    bytes: Vec<u8>,
    /// Tokens since the last place at which the text stood still, the token before it included: decoders may treat the
    /// first token in another way.
    window: Vec<u32>,
    /// Length of the window's text that came out.
    shown: usize,
}

impl<'t> TextStream<'t> {
    /// An empty text.
    #[must_use]
    pub fn new(tokenizer: &'t Tokenizer) -> Self {
        TextStream { tokenizer, bytes: Vec::new(), window: Vec::new(), shown: 0 }
    }

    /// Takes a token; gives the text that is new.
    ///
    /// # Errors
    /// What the tokenizer says.
    pub fn push(&mut self, id: u32) -> Result<String, GenerateError> {
        if let Some(byte) = self.tokenizer.byte(id) {
            // Text that a decoder held back comes before.
            let mut out = self.release()?;
            self.bytes.push(byte);
            out.push_str(&take_characters(&mut self.bytes));
            self.anchor(id)?;
            return Ok(out);
        }
        let mut out = self.take_rest();
        if self.tokenizer.is_special(id) {
            return Ok(out);
        }
        self.window.push(id);
        let text = self.decode()?;
        if text.ends_with(REPLACEMENT) && self.window.len() < 8 {
            // Tokenizers of byte-level pieces cut characters in two; no character has more than four bytes.
            return Ok(out);
        }
        out.push_str(text.get(self.shown..).unwrap_or_default());
        self.anchor(id)?;
        Ok(out)
    }

    /// The rest, when no token follows.
    ///
    /// # Errors
    /// What the tokenizer says.
    pub fn finish(&mut self) -> Result<String, GenerateError> {
        let mut out = self.release()?;
        out.push_str(&self.take_rest());
        Ok(out)
    }

    /// What the decoder held back.
    fn release(&mut self) -> Result<String, GenerateError> {
        let text = self.decode()?;
        let out = text.get(self.shown..).unwrap_or_default().to_owned();
        self.shown = text.len();
        Ok(out)
    }

    /// Bytes that will not become a character any more.
    fn take_rest(&mut self) -> String {
        let rest = String::from_utf8_lossy(&self.bytes).into_owned();
        self.bytes.clear();
        rest
    }

    fn anchor(&mut self, id: u32) -> Result<(), GenerateError> {
        self.window.clear();
        self.window.push(id);
        self.shown = self.decode()?.len();
        Ok(())
    }

    fn decode(&self) -> Result<String, GenerateError> {
        if self.window.is_empty() {
            return Ok(String::new());
        }
        self.tokenizer.decode(&self.window).map_err(GenerateError::Text)
    }
}

/// Takes complete characters off the front, and what can be none, as replacement characters.
fn take_characters(bytes: &mut Vec<u8>) -> String {
    let mut out = String::new();
    loop {
        match std::str::from_utf8(bytes) {
            Ok(text) => {
                out.push_str(text);
                bytes.clear();
                return out;
            }
            Err(error) => {
                let good = error.valid_up_to();
                out.push_str(&String::from_utf8_lossy(&bytes[..good]));
                match error.error_len() {
                    None => {
                        bytes.drain(..good);
                        return out;
                    }
                    Some(bad) => {
                        out.push(REPLACEMENT);
                        bytes.drain(..good + bad);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A tokenizer of Gemma's kind, with few pieces: letters, `▁`, all bytes, Gemma 4's control tokens.
    pub(in super::super) const GEMMA: &str = include_str!("../../../../tests/text/tokenizer.json");

    pub(in super::super) fn gemma() -> Tokenizer {
        let dir = tempfile::tempdir().unwrap();
        fs_err::write(dir.path().join("tokenizer.json"), GEMMA).unwrap();
        Tokenizer::from_path(dir.path()).unwrap()
    }

    fn stream(tokenizer: &Tokenizer, ids: &[u32]) -> Vec<String> {
        let mut s = TextStream::new(tokenizer);
        let mut out: Vec<String> = ids.iter().map(|id| s.push(*id).unwrap()).collect();
        out.push(s.finish().unwrap());
        out
    }

    #[test]
    fn characters_come_out_whole_and_once() {
        let t = gemma();
        let ids = t.encode("ab é 😀 b<turn|>").unwrap();
        let pieces = stream(&t, &ids);
        assert_eq!(pieces.concat(), "ab é 😀 b");
        assert!(pieces.iter().all(|p| !p.contains(REPLACEMENT)), "{pieces:?}");
        assert!(pieces.contains(&"😀".to_owned()) && pieces.contains(&"é".to_owned()), "{pieces:?}");
        assert_eq!(stream(&t, &ids[..1]), ["ab", ""]);
        // A character that is never finished.
        let face = t.encode("😀").unwrap();
        assert_eq!(stream(&t, &face[..2]), ["", "", "\u{fffd}"]);
        let a = t.encode("a").unwrap()[0];
        assert_eq!(stream(&t, &[face[0], face[1], a]), ["", "", "\u{fffd}a", ""]);
        assert_eq!(stream(&t, &[face[0], 106, a]), ["", "\u{fffd}", "a", ""]);
    }

    #[test]
    fn byte_level_pieces_are_held_until_they_are_characters() {
        // GPT-2's alphabet: é is two pieces that are no character alone.
        let json = r#"{"version": "1.0", "added_tokens": [], "normalizer": null, "post_processor": null,
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
            "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
            "model": {"type": "BPE", "vocab": {"a": 0, "Ã": 1, "©": 2, "Ġ": 3}, "merges": []}}"#;
        let dir = tempfile::tempdir().unwrap();
        fs_err::write(dir.path().join("tokenizer.json"), json).unwrap();
        let t = Tokenizer::from_path(dir.path()).unwrap();
        let ids = t.encode("a éa").unwrap();
        assert_eq!(ids, [0, 3, 1, 2, 0]);
        assert_eq!(stream(&t, &ids), ["a", " ", "", "é", "a", ""]);
        assert_eq!(stream(&t, &[1]), ["", "\u{fffd}"]);
    }

    #[test]
    fn the_start_token_is_there_once() {
        let t = gemma();
        let a = t.encode("a").unwrap()[0] as i32;
        assert_eq!(encode_text(&t, "a").unwrap(), [2, a]);
        assert_eq!(encode_text(&t, "<bos>a").unwrap(), [2, a]);
        assert_eq!(encode_text(&t, "").unwrap(), [2]);
        assert_eq!(encode_written(&t, "<bos>a").unwrap(), [2, a]);
        assert_eq!(encode_written(&t, "a").unwrap(), [a]);
        let mut none = gemma();
        none.add_bos = Some(false);
        assert_eq!(encode_text(&none, "a").unwrap(), [a]);
        assert_eq!(encode_text(&Tokenizer::bytes(), "A").unwrap(), [2, 69]);
    }

    proptest! {
        #[test]
        fn what_is_encoded_streams_back(text in "[ab é😀\u{fffd}z\n]{0,12}") {
            for t in [gemma(), Tokenizer::bytes()] {
                prop_assert_eq!(stream(&t, &t.encode(&text).unwrap()).concat(), text.as_str());
            }
        }

        #[test]
        fn any_tokens_stream_as_lossy_text(bytes in prop::collection::vec(any::<u8>(), 0..40)) {
            // In the tiny tokenizer a byte's token is the byte plus 110.
            let ids: Vec<u32> = bytes.iter().map(|b| u32::from(*b) + 110).collect();
            let t = gemma();
            prop_assert_eq!(t.byte(ids.first().copied().unwrap_or(110)), Some(bytes.first().copied().unwrap_or(0)));
            let expected = String::from_utf8_lossy(&bytes).into_owned();
            prop_assert_eq!(stream(&t, &ids).concat(), expected.as_str());
        }
    }
}
