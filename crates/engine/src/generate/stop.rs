//! Strings that end a text, found while it streams.

/// Looks for stop strings in a text that comes in pieces.
///
/// What may be the beginning of one is held back until it is known not to be; a stop string itself is never given out.
#[derive(Debug, Clone, Default)]
pub struct StopStrings {
    stops: Vec<String>,
    held: String,
}

impl StopStrings {
    /// Looks for these; empty ones are left out.
    #[must_use]
    pub fn new(stops: &[String]) -> Self {
        StopStrings { stops: stops.iter().filter(|s| !s.is_empty()).cloned().collect(), held: String::new() }
    }

    /// Takes a piece; gives what may be shown, and the stop string if one was met, after which there is nothing more.
    pub fn push(&mut self, piece: &str) -> (String, Option<String>) {
        self.held.push_str(piece);
        // Where several are met, the one that ends first counts, as if the text had come letter by letter.
        let met = self
            .stops
            .iter()
            .filter_map(|stop| self.held.find(stop.as_str()).map(|at| (at + stop.len(), at, stop)))
            .min_by_key(|(end, at, _)| (*end, *at));
        if let Some((_, at, stop)) = met {
            let stop = stop.clone();
            let mut shown = std::mem::take(&mut self.held);
            shown.truncate(at);
            return (shown, Some(stop));
        }
        let from = self.stops.iter().map(|stop| beginning(&self.held, stop)).min().unwrap_or(self.held.len());
        let rest = self.held.split_off(from);
        (std::mem::replace(&mut self.held, rest), None)
    }

    /// What was held back, at the end of the text.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// Where the longest end of `text` lies that `stop` begins with; the length of `text` if there is none.
fn beginning(text: &str, stop: &str) -> usize {
    let longest = stop.len().saturating_sub(1).min(text.len());
    let from = text.len() - longest;
    (from..text.len())
        .find(|&at| text.is_char_boundary(at) && stop.as_bytes().starts_with(&text.as_bytes()[at..]))
        .unwrap_or(text.len())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn all(stops: &[&str], pieces: &[&str]) -> (String, Option<String>) {
        let stops: Vec<String> = stops.iter().map(ToString::to_string).collect();
        let mut s = StopStrings::new(&stops);
        let mut out = String::new();
        for piece in pieces {
            let (shown, met) = s.push(piece);
            out += &shown;
            if met.is_some() {
                return (out, met);
            }
        }
        (out + &s.finish(), None)
    }

    #[test]
    fn strings_over_several_pieces() {
        assert_eq!(all(&["END"], &["a E", "N", "D b"]), ("a ".into(), Some("END".into())));
        assert_eq!(all(&["END"], &["a E", "N", "F"]), ("a ENF".into(), None));
        assert_eq!(all(&["END", ""], &["EN"]), ("EN".into(), None));
        assert_eq!(all(&[], &["x", "y"]), ("xy".into(), None));
        assert_eq!(all(&["ééx"], &["é", "é", "é", "x!"]), ("é".into(), Some("ééx".into())));
        assert_eq!(all(&["\n\n", "b"], &["a\n", "\nb"]), ("a".into(), Some("\n\n".into())));
    }

    #[test]
    fn nothing_is_held_longer_than_needed() {
        let mut s = StopStrings::new(&["\nUser:".to_owned()]);
        assert_eq!(s.push("hello\nU").0, "hello");
        assert_eq!(s.push("sual").0, "\nUsual");
    }

    proptest! {
        #[test]
        fn pieces_do_not_matter(text in "[abé]{0,30}", stops in prop::collection::vec("[abé]{1,4}", 0..3), cuts: u32) {
            let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
            let mut pieces = vec![String::new()];
            for (i, c) in text.chars().enumerate() {
                if cuts >> i & 1 == 1 {
                    pieces.push(String::new());
                }
                pieces.last_mut().unwrap().push(c);
            }
            let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
            let letters: Vec<String> = text.chars().map(String::from).collect();
            let letters: Vec<&str> = letters.iter().map(String::as_str).collect();
            prop_assert_eq!(all(&stops, &pieces), all(&stops, &letters));
        }
    }
}
