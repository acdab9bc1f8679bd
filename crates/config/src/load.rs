//! Reading the layers and merging them, with the rules of who may say what.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::Path;

use serde_json::Value as Json;

use crate::coerce;
use crate::error::Problem;
use crate::files;
use crate::keys::{self, ENVIRONMENT_PREFIX, Key, RESERVED_VARIABLES, Support, unsupported};
use crate::layer::{Note, Origin, RawConfig, Sources};
use crate::suggest::{keys_like, listed};
use crate::value::{Literal, Value};

/// Reads and merges the layers.
pub(crate) fn load(sources: &Sources) -> RawConfig {
    Loader::default().load(sources)
}

/// A value on its way: from a word or from YAML.
enum Given<'a> {
    Word(&'a str),
    Yaml(&'a Json),
    Value(&'a Value),
}

/// Which layer a value belongs to, for the rules that depend on it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Level {
    Base,
    Model,
    User,
    CommandLine,
    Environment,
}

#[derive(Default)]
struct Loader {
    problems: Vec<Problem>,
    notes: Vec<Note>,
    /// Values by level, merged at the end.
    found: Vec<(Level, &'static Key, Value, Origin)>,
    /// Keys that were named, whether their value was one or not.
    named: Vec<(Level, &'static Key, Origin)>,
    /// The home directory, if the environment that was handed over names one.
    home: Option<String>,
}

impl Loader {
    fn load(mut self, sources: &Sources) -> RawConfig {
        let home = sources.environment.iter().find(|(name, _)| name == "HOME").and_then(|(_, value)| value.to_str());
        self.home = home.map(str::to_owned);
        self.read_files(sources.config.as_deref());
        self.read_words(&sources.overrides);
        self.read_environment(&sources.environment);
        self.refuse_said_twice();
        let model_source = self.read_model(sources);
        let entries = self.merge(model_source.as_ref());
        RawConfig { entries, problems: self.problems, notes: self.notes, model_source, devices: sources.devices }
    }

    fn read_files(&mut self, config: Option<&Path>) {
        let chain = files::chain(config, &mut self.problems);
        let has_base = chain.iter().any(|file| file.is_base);
        if !has_base {
            let base = files::base_beside(config, &mut self.problems);
            self.read_file(Level::Base, &base);
        }
        for file in &chain {
            self.read_file(if file.is_base { Level::Base } else { Level::User }, file);
        }
    }

    fn read_file(&mut self, level: Level, file: &files::ConfigFile) {
        for entry in &file.entries {
            let origin = if level == Level::Base && file.builtin {
                Origin::Default
            } else {
                Origin::File { path: file.path.clone(), line: entry.line, builtin: file.builtin }
            };
            self.take(level, &entry.key, Given::Yaml(&entry.value), origin);
        }
    }

    fn read_words(&mut self, words: &[String]) {
        let mut last: BTreeMap<&str, &str> = BTreeMap::new();
        let mut order = Vec::new();
        for word in words {
            let Some((key, value)) = word.split_once('=') else {
                self.problems.push(not_an_override(word));
                continue;
            };
            let key = key.trim();
            if key.starts_with('-') || key.is_empty() {
                self.problems.push(not_an_override(word));
                continue;
            }
            if last.insert(key, value).is_none() {
                order.push(key);
            }
        }
        for key in order {
            if let Some(value) = last.get(key) {
                self.take(Level::CommandLine, key, Given::Word(value), Origin::CommandLine);
            }
        }
    }

    fn read_environment(&mut self, variables: &[(OsString, OsString)]) {
        let mut variables: Vec<_> = variables
            .iter()
            .filter_map(|(name, value)| name.to_str().map(|name| (name, value)))
            .filter(|(name, _)| name.starts_with(ENVIRONMENT_PREFIX))
            .filter(|(name, _)| RESERVED_VARIABLES.iter().all(|(reserved, _)| reserved != name))
            .collect();
        // The order of the environment is no information; a fixed one makes messages the same every time.
        variables.sort();
        for (name, value) in variables {
            let origin = Origin::Environment(name.to_owned());
            let key = name[ENVIRONMENT_PREFIX.len()..].replace("__", ".").to_ascii_lowercase();
            match value.to_str() {
                Some(value) => self.take(Level::Environment, &key, Given::Word(value), origin),
                None => self.problems.push(Problem::new(&key, &origin, "the value is not UTF-8")),
            }
        }
    }

    /// Takes one value in, or says why not.
    fn take(&mut self, level: Level, name: &str, given: Given<'_>, origin: Origin) {
        let Some(key) = keys::find(name) else {
            return self.take_unsupported(level, name, &given, &origin);
        };
        self.named.push((level, key, origin.clone()));
        let value = match given {
            Given::Word(word) => coerce::from_text(key, word),
            Given::Yaml(json) => coerce::from_json(key, json),
            Given::Value(value) => coerce::check(key, value.clone()),
        };
        let value = match value {
            Ok(value) => self.at_home(key, value),
            Err((message, hint)) => {
                self.problems.push(Problem { hint, ..Problem::new(name, &origin, message) });
                return;
            }
        };
        // MaxText's own default is no wish: a file or command line that repeats it must not fail on it.
        let is_peer_default = matches!(key.maxtext, keys::MaxText::Differs { default, .. } if value == default.into());
        match key.support {
            Support::OnlyDefault(reason) if !self.means_default(key, &value) => {
                if !(level == Level::Base && is_peer_default) {
                    let message = format!("`{value}` is not supported: {reason}");
                    let hint = format!("leave it out, or set it to `{}`", key.default);
                    self.problems.push(Problem::new(name, &origin, message).hint(hint));
                }
                return;
            }
            Support::Inert(reason) if value != key.default_value() => {
                let message = format!("changes nothing: {reason}");
                self.notes.push(Note { key: name.to_owned(), origin: origin.clone(), message });
            }
            _ => {}
        }
        self.found.push((level, key, value, origin));
    }

    /// Whether a value of a key that knows only its default says just that; an explicit 0 of a soft cap means null.
    fn means_default(&self, key: &Key, value: &Value) -> bool {
        *value == key.default_value()
            || (key.nullable && *value == Value::Float(0.0) && key.default == Literal::Null)
            // A mesh axis of -1 takes what is left, which one that cannot be cut leaves at 1.
            || (key.name.starts_with("dcn_") && *value == Value::Int(1))
    }

    /// Puts the home directory for a leading `~/`, which shells leave alone behind `key=`.
    fn at_home(&self, key: &Key, value: Value) -> Value {
        match (&value, &self.home) {
            (Value::Text(text), Some(home)) if key.is_path && text.starts_with("~/") => {
                Value::Text(format!("{}{}", home.trim_end_matches('/'), &text[1..]))
            }
            _ => value,
        }
    }

    fn take_unsupported(&mut self, level: Level, name: &str, given: &Given<'_>, origin: &Origin) {
        // The parent of a file is no key; `files::chain` has followed it.
        if name == "base_config" && !matches!(level, Level::CommandLine | Level::Environment) {
            return;
        }
        if let Some((_, instead, why)) = keys::COMPUTED.iter().find(|(computed, ..)| *computed == name) {
            let problem = Problem::new(name, origin, format!("cannot be set: {why}"));
            self.problems.push(problem.hint(format!("set `{instead}` instead")));
            return;
        }
        if let Some((group, default)) = unsupported::find(name) {
            let is_default = default.is_some_and(|default| says(given, default));
            if is_default {
                return;
            }
            if group.inert || (default.is_none() && level == Level::Base) {
                let message = format!("changes nothing: {}", group.reason);
                self.notes.push(Note { key: name.to_owned(), origin: origin.clone(), message });
                return;
            }
            let problem = Problem::new(name, origin, format!("is not supported: {}", group.reason));
            self.problems.push(match default {
                Some(default) => problem.hint(format!("leave it out, or set it to `{default}`")),
                None => problem.hint("leave it out"),
            });
            return;
        }
        if let Some((_, reason)) = unsupported::PREFIXES.iter().find(|(prefix, _)| name.starts_with(prefix)) {
            self.problems.push(Problem::new(name, origin, format!("is not supported: {reason}")));
            return;
        }
        let problem = match origin {
            Origin::Environment(_) => Problem::new(name, origin, "the variable names no known key"),
            _ => Problem::new(name, origin, "unknown key"),
        };
        let near = keys_like(name);
        self.problems.push(if near.is_empty() {
            problem.hint("`lapidary config explain` lists all keys")
        } else if let Origin::Environment(_) = origin {
            let near: Vec<String> = near.iter().filter_map(|n| keys::find(n)).map(Key::variable).collect();
            problem.hint(format!("did you mean {}?", listed(&near)))
        } else {
            problem.hint(format!("did you mean {}?", listed(&near)))
        });
    }

    /// A key on the command line and in the environment is refused: neither place is more deliberate than the other.
    fn refuse_said_twice(&mut self) {
        let on_line = |key: &Key| self.named.iter().any(|(l, k, _)| *l == Level::CommandLine && k.name == key.name);
        for (level, key, origin) in &self.named {
            if *level == Level::Environment && on_line(key) {
                let message = "is set on the command line and in the environment";
                self.problems.push(Problem::new(key.name, origin, message).hint("drop one of the two"));
            }
        }
    }

    fn read_model(&mut self, sources: &Sources) -> Option<Origin> {
        if let Some(model) = &sources.model {
            let origin = Origin::Checkpoint(model.name.clone());
            for (name, value) in &model.values {
                self.take(Level::Model, name, Given::Value(value), origin.clone());
            }
            return Some(origin);
        }
        let (name, origin) = self.winner("model_name").map(|(v, o)| (v.to_string_value(), o.clone()))?;
        let stem = name.strip_suffix("-Instruct").unwrap_or(&name);
        if stem == "default" {
            return None;
        }
        let file = files::model(stem, sources.config.as_deref(), &origin, &mut self.problems)?;
        let source = Origin::File { path: file.path.clone(), line: 0, builtin: file.builtin };
        self.read_file(Level::Model, &file);
        Some(source)
    }

    /// The value that wins so far; a later entry of the same level wins over an earlier one.
    fn winner(&self, name: &str) -> Option<(&Value, &Origin)> {
        let entries = self.found.iter().filter(|(_, key, ..)| key.name == name);
        entries.max_by_key(|(level, ..)| *level).map(|(_, _, value, origin)| (value, origin))
    }

    fn merge(&mut self, model: Option<&Origin>) -> BTreeMap<&'static str, (Value, Origin)> {
        let mut entries: BTreeMap<&'static str, (Value, Origin)> =
            keys::all().map(|key| (key.name, (key.default_value(), Origin::Default))).collect();
        // Stable: within a level, the order of reading decides.
        self.found.sort_by_key(|(level, ..)| *level);
        let mut of_model: BTreeMap<&'static str, (Value, Origin)> = BTreeMap::new();
        for (level, key, value, origin) in &self.found {
            if *level == Level::Model {
                of_model.insert(key.name, (value.clone(), origin.clone()));
            }
            entries.insert(key.name, (value.clone(), origin.clone()));
        }
        let may_override = matches!(entries.get("override_model_config"), Some((Value::Bool(true), _)));
        if !may_override && model.is_some() {
            for key in keys::all() {
                let (Some((theirs, place)), Some((value, origin))) = (of_model.get(key.name), entries.get(key.name))
                else {
                    continue;
                };
                if value != theirs {
                    let message = format!("`{value}` contradicts the model, which has `{theirs}` ({place})");
                    self.problems.push(
                        Problem::new(key.name, origin, message)
                            .hint("add `override_model_config=true` if you mean another model than the named one"),
                    );
                }
            }
        }
        entries
    }
}

/// Whether a given value says the same as a constant, whatever its spelling.
fn says(given: &Given<'_>, default: Literal) -> bool {
    let text = match given {
        Given::Word(word) => word.trim().trim_matches(['"', '\'']).to_owned(),
        Given::Yaml(Json::String(text)) => text.clone(),
        Given::Yaml(Json::Null) => "null".to_owned(),
        Given::Yaml(Json::Array(items)) => {
            let items: Option<Vec<&str>> = items.iter().map(Json::as_str).collect();
            return matches!((items, default), (Some(items), Literal::List(list)) if items == list);
        }
        Given::Yaml(json) => json.to_string(),
        Given::Value(value) => value.to_string(),
    };
    match default {
        Literal::Null => ["", "~", "null", "none"].iter().any(|word| text.eq_ignore_ascii_case(word)),
        Literal::Bool(b) => text.eq_ignore_ascii_case(if b { "true" } else { "false" }),
        Literal::Int(i) => text.replace('_', "").parse::<f64>() == Ok(i as f64),
        Literal::Float(x) => text.replace('_', "").parse::<f64>() == Ok(x),
        Literal::Text(t) => text == t,
        Literal::List(list) => {
            text == Value::from(Literal::List(list)).to_string() || (list.is_empty() && text == "[]")
        }
    }
}

fn not_an_override(word: &str) -> Problem {
    let bare = word.trim_start_matches('-');
    let problem = Problem::new(word, &Origin::CommandLine, "is not of the form `key=value`");
    if files::is_config_path(word) {
        problem.hint("a configuration file must be the first word")
    } else if bare != word && bare.contains('=') {
        problem.hint(format!("write `{bare}`, without dashes"))
    } else if let Some(key) = keys::find(bare) {
        problem.hint(format!("write `{}=VALUE`", key.name))
    } else {
        problem
    }
}
