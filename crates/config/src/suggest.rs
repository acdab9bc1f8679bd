//! Did-you-mean.

use crate::keys;

/// Keys that a misspelt name may have meant, best first, at most three.
pub(crate) fn keys_like(name: &str) -> Vec<&'static str> {
    let wanted = name.to_ascii_lowercase().replace('-', "_");
    let last = wanted.rsplit('.').next().unwrap_or(&wanted).to_owned();
    let limit = (wanted.chars().count() / 4).clamp(1, 3);
    let mut found: Vec<(usize, &'static str)> = keys::all()
        .flat_map(|key| std::iter::once(key.name).chain(key.aliases.iter().copied()))
        .filter_map(|candidate| {
            // A member of a group named without the group, or the other way round.
            if candidate.rsplit('.').next() == Some(&last) {
                return Some((0, candidate));
            }
            let distance = distance(&wanted, candidate);
            (distance <= limit).then_some((distance, candidate))
        })
        .collect();
    if found.is_empty() && wanted.len() >= 4 {
        // The middle of a long name, such as `batch_size`.
        found.extend(
            keys::all().filter(|key| key.name.contains(&wanted)).map(|key| (key.name.len() - wanted.len(), key.name)),
        );
    }
    found.sort();
    found.into_iter().map(|(_, name)| name).take(3).collect()
}

/// The word nearest to a misspelt one, if it is near.
pub(crate) fn word_like<'a>(word: &str, words: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let word = word.to_ascii_lowercase();
    let limit = (word.chars().count() / 3).clamp(1, 3);
    words.into_iter().map(|w| (distance(&word, w), w)).filter(|(d, _)| *d <= limit).min().map(|(_, w)| w)
}

/// Insertions, deletions, substitutions and swaps of neighbours that make `b` of `a`.
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    // Foreign text may be long; nothing that differs this much in length is near.
    if a.len().abs_diff(b.len()) > 3 {
        return usize::MAX;
    }
    let mut before: Vec<usize> = Vec::new();
    let mut last: Vec<usize> = (0..=b.len()).collect();
    for i in 1..=a.len() {
        let mut row = vec![i; b.len() + 1];
        for j in 1..=b.len() {
            let cost = usize::from(a[i - 1] != b[j - 1]);
            row[j] = (last[j] + 1).min(row[j - 1] + 1).min(last[j - 1] + cost);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                row[j] = row[j].min(before[j - 2] + 1);
            }
        }
        before = std::mem::replace(&mut last, row);
    }
    last[b.len()]
}

/// Names in backticks, joined as a question's end: "`a`, `b` or `c`".
pub(crate) fn listed<S: AsRef<str>>(names: &[S]) -> String {
    let quoted: Vec<String> = names.iter().map(|n| format!("`{}`", n.as_ref())).collect();
    match quoted.split_last() {
        None => String::new(),
        Some((last, [])) => last.clone(),
        Some((last, rest)) => format!("{} or {last}", rest.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances() {
        for (a, b, d) in [("", "", 0), ("abc", "abc", 0), ("abc", "acb", 1), ("abc", "ab", 1), ("kitten", "sitting", 3)]
        {
            assert_eq!(distance(a, b), d, "{a} {b}");
            assert_eq!(distance(b, a), d, "{b} {a}");
        }
    }

    #[test]
    fn near_names_are_found() {
        assert_eq!(keys_like("learning_rat"), ["learning_rate"]);
        assert_eq!(keys_like("setps"), ["steps"]);
        assert_eq!(keys_like("max_target_lenght"), ["max_target_length"]);
        assert_eq!(keys_like("lora_rank"), ["lora.lora_rank"]);
        assert_eq!(keys_like("batch_size").first(), Some(&"per_device_batch_size"));
        assert!(keys_like("foo_bar").is_empty());
        assert!(keys_like(&"x".repeat(100_000)).is_empty());
    }

    #[test]
    fn near_words_are_found() {
        assert_eq!(word_like("bfloat6", ["bfloat16", "float32"]), Some("bfloat16"));
        assert_eq!(word_like("bogus", ["none", "full"]), None);
    }

    #[test]
    fn lists() {
        assert_eq!(listed(&["a", "b", "c"]), "`a`, `b` or `c`");
        assert_eq!(listed(&["a"]), "`a`");
    }
}
