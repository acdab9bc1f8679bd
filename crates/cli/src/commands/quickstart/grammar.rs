//! A small language whose entropy is known, so that a loss has something to be measured against.
//!
//! A sentence is subject, verb, object and a full stop. Determiner, noun and verb agree in number, which a model can only get
//! right by looking back over the words between.

use engine::rng::Philox;

const DETERMINERS: [[&str; 2]; 2] = [["one", "this"], ["two", "many"]];
const ADJECTIVES: [&str; 4] = ["red", "old", "small", "wise"];
const NOUNS: [&str; 4] = ["cat", "stone", "king", "river"];
const VERBS: [&str; 4] = ["see", "make", "hold", "hear"];

/// Numbers from a seed, one after the other.
#[derive(Debug)]
pub(super) struct Draws {
    stream: Philox,
    count: u32,
}

impl Draws {
    pub(super) fn new(seed: u64, label: &str) -> Self {
        Draws { stream: Philox::new(seed, label), count: 0 }
    }

    fn word(&mut self) -> u32 {
        self.count += 1;
        self.stream.block([self.count, 0, 0, 0])[0]
    }

    /// One of `n`, which is a power of two.
    fn below(&mut self, n: u32) -> usize {
        (self.word() % n) as usize
    }
}

/// A noun phrase, and whether it is plural.
fn noun_phrase(d: &mut Draws) -> (String, bool) {
    let plural = d.below(2);
    let mut words = DETERMINERS[plural][d.below(2)].to_owned();
    if d.below(2) == 1 {
        words += " ";
        words += ADJECTIVES[d.below(4)];
    }
    words += " ";
    words += NOUNS[d.below(4)];
    if plural == 1 {
        words += "s";
    }
    (words, plural == 1)
}

/// A sentence.
pub(super) fn sentence(d: &mut Draws) -> String {
    let (subject, plural) = noun_phrase(d);
    let verb = VERBS[d.below(4)];
    let ending = if plural { "" } else { "s" };
    format!("{subject} {verb}{ending} {}.", noun_phrase(d).0)
}

/// Entropy of a sentence in nats: a noun phrase holds two bits of determiner, one of whether there is an adjective, two of it
/// in half of all cases, and two of noun; the verb two more.
pub(super) const SENTENCE_NATS: f64 = (2.0 * (2.0 + 1.0 + 0.5 * 2.0 + 2.0) + 2.0) * std::f64::consts::LN_2;

/// Whether a text is a sentence.
pub(super) fn accepts(text: &str) -> bool {
    let Some(body) = text.strip_suffix('.') else { return false };
    let mut words = body.split(' ');
    let Some(plural) = take_noun_phrase(&mut words) else { return false };
    let verb = words.next().unwrap_or_default();
    let verb = if plural { Some(verb) } else { verb.strip_suffix('s') };
    verb.is_some_and(|v| VERBS.contains(&v)) && take_noun_phrase(&mut words).is_some() && words.next().is_none()
}

fn take_noun_phrase<'a>(words: &mut impl Iterator<Item = &'a str>) -> Option<bool> {
    let determiner = words.next()?;
    let plural = DETERMINERS.iter().position(|d| d.contains(&determiner))? == 1;
    let mut noun = words.next()?;
    if ADJECTIVES.contains(&noun) {
        noun = words.next()?;
    }
    let noun = if plural { noun.strip_suffix('s')? } else { noun };
    NOUNS.contains(&noun).then_some(plural)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_sentence_is_accepted_and_its_neighbours_are_not() {
        let mut draws = Draws::new(1, "test");
        let first = sentence(&mut Draws::new(1, "test"));
        assert_eq!(sentence(&mut draws), first);
        for _ in 0..500 {
            let s = sentence(&mut draws);
            assert!(accepts(&s), "{s}");
            assert!(!accepts(&s[1..]) && !accepts(&s[..s.len() - 1]) && !accepts(&format!("{s}.")), "{s}");
        }
        for bad in
            ["", ".", "one cat see two cats.", "two cats sees one cat.", "one cats sees one cat.", "one  cat sees."]
        {
            assert!(!accepts(bad), "{bad}");
        }
        assert!(accepts("this wise king hears many stones."));
    }

    #[test]
    fn entropy_is_that_of_the_draws() {
        // All sentences of a phrase are equally likely given its choices: count what is drawn.
        let mut draws = Draws::new(7, "entropy");
        let n = 4000;
        let mut bits = 0;
        for _ in 0..n {
            let s = sentence(&mut draws);
            let adjectives = s.split([' ', '.']).filter(|w| ADJECTIVES.contains(w)).count();
            bits += 12 + 2 * adjectives;
        }
        let mean = f64::from(bits as u32) / f64::from(n);
        assert!((mean * std::f64::consts::LN_2 - SENTENCE_NATS).abs() < 0.05, "{mean}");
    }
}
