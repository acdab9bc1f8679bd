//! The final configuration of a run, to be kept beside what it did. No key that holds a secret has a value here: the
//! one there is (`hf_access_token`) takes none.

use std::fmt::Write;

use config::{Config, Filter, Setting};

/// The configuration as YAML: given to a command, it says the same again. Every key is there, with the origin of its
/// value as a comment.
#[must_use]
pub fn yaml(config: &Config) -> String {
    let mut out = String::from("# The final configuration of a run: every key, whichever layer gave its value.\n");
    let mut section = "";
    for setting in &config.raw().show(Filter::All) {
        if setting.category != section {
            section = setting.category;
            let _ = write!(out, "\n# {section}\n");
        }
        let _ = write!(out, "{}: {}", setting.key, setting.value);
        if setting.is_set() {
            let _ = write!(out, "  # {}", one_line(&setting.origin.to_string()));
        }
        out.push('\n');
    }
    out
}

/// The configuration as a Markdown table, for TensorBoard's text page: what some layer set first, then the defaults.
#[must_use]
pub fn markdown(config: &Config) -> String {
    let settings = config.raw().show(Filter::All);
    let (set, default): (Vec<&Setting>, Vec<&Setting>) = settings.iter().partition(|s| s.is_set());
    let mut out = String::from("| key | value | from |\n|---|---|---|\n");
    for s in set.into_iter().chain(default) {
        let cell = |text: String| one_line(&text).replace('|', "\\|");
        let _ = writeln!(out, "| {} | {} | {} |", s.key, cell(s.value.to_string()), cell(s.origin.to_string()));
    }
    out
}

/// Paths may hold line ends; neither a comment nor a cell may.
fn one_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use config::Sources;

    use super::*;

    #[test]
    fn the_file_says_the_same_again() {
        let words = [
            "model_name=gemma4-e2b",
            "override_model_config=true",
            "base_num_decoder_layers=10",
            "num_kv_shared_layers=5",
            "learning_rate=1e-3",
            "run_name=a | b # c",
            "steps=7",
            "metrics_file=/tmp/it's \"odd\".jsonl",
        ];
        let first = Sources::from_args(words.map(str::to_owned)).resolve().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.yml");
        fs_err::write(&path, yaml(&first)).unwrap();
        let again = Sources::from_args([path.to_str().unwrap().to_owned()]).resolve().unwrap();
        let values = |c: &Config| -> Vec<(&str, String)> {
            c.raw().show(Filter::All).into_iter().map(|s| (s.key, s.value.to_string())).collect()
        };
        assert_eq!(values(&first), values(&again));
        assert!(values(&first).len() > 80);
        let table = markdown(&first);
        assert!(table.contains("| run_name | \"a \\| b # c\" |"), "{table}");
        assert!(table.find("| steps |").unwrap() < table.find("| adam_b1 |").unwrap());
    }
}
