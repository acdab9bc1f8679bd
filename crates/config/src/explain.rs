//! `explain` and `show`: what a key means, and what every key is set to.

use std::fmt::Write as _;

use serde::Serialize;

use crate::error::{Error, Problem};
use crate::keys::{self, Category, Key, MaxText, Support, unsupported};
use crate::layer::{Origin, RawConfig, origin_as_text};
use crate::suggest::{keys_like, listed};
use crate::value::Value;

/// What is known about one name.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Explanation {
    /// The key's name.
    pub key: String,
    /// Other accepted names.
    pub aliases: Vec<String>,
    /// The section it belongs to.
    pub category: String,
    /// Type, range and words.
    pub kind: String,
    /// The default, as YAML.
    pub default: String,
    /// What it does.
    pub doc: String,
    /// The environment variable that sets it; empty where the key cannot be set.
    pub variable: String,
    /// Relation to MaxText's key.
    pub maxtext: String,
    /// Why it cannot be set, or changes nothing; empty where it is obeyed.
    pub restriction: String,
    /// Refused words with reasons.
    pub refused: Vec<(String, String)>,
    /// The value it has, where a configuration was asked.
    pub current: Option<Setting>,
}

/// A key's value and where it came from.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Setting {
    /// The key.
    pub key: &'static str,
    /// The section it belongs to.
    pub category: &'static str,
    /// The value.
    pub value: Value,
    /// Its default.
    pub default: Value,
    /// Where the value came from.
    #[serde(serialize_with = "origin_as_text")]
    pub origin: Origin,
}

impl Setting {
    fn new(key: &'static Key, value: &Value, origin: &Origin) -> Self {
        Setting {
            key: key.name,
            category: key.category.title(),
            value: value.clone(),
            default: key.default_value(),
            origin: origin.clone(),
        }
    }

    /// Whether some layer set the key.
    #[must_use]
    pub fn is_set(&self) -> bool {
        self.origin != Origin::Default
    }
}

/// Which keys to show.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Filter {
    /// All that are obeyed.
    All,
    /// Those that some layer set.
    Set,
    /// Those of one section.
    Category(Category),
}

impl RawConfig {
    /// Lists values and origins, in the order of the reference.
    ///
    /// Keys that know only their default are left out.
    #[must_use]
    pub fn show(&self, filter: Filter) -> Vec<Setting> {
        keys::all()
            .filter(|key| key.support == Support::Yes)
            .filter_map(|key| self.entries.get(key.name).map(|(value, origin)| Setting::new(key, value, origin)))
            .filter(|setting| match filter {
                Filter::All => true,
                Filter::Set => setting.is_set(),
                Filter::Category(category) => setting.category == category.title(),
            })
            .collect()
    }

    /// Explains a key together with its value here.
    ///
    /// # Errors
    /// When no key has that name; the hint names near ones.
    pub fn explain(&self, name: &str) -> Result<Explanation, Error> {
        let mut explanation = explain(name)?;
        if let Some(key) = keys::find(name) {
            explanation.current = self.entries.get(key.name).map(|(value, origin)| Setting::new(key, value, origin));
        }
        Ok(explanation)
    }
}

/// Explains a key, a computed name or an unsupported key of MaxText.
///
/// # Errors
/// When no key has that name; the hint names near ones.
pub fn explain(name: &str) -> Result<Explanation, Error> {
    if let Some(key) = keys::find(name) {
        return Ok(of_key(key));
    }
    let blank = |kind: &str| Explanation {
        key: name.to_owned(),
        aliases: Vec::new(),
        category: String::new(),
        kind: kind.to_owned(),
        default: String::new(),
        doc: String::new(),
        variable: String::new(),
        maxtext: String::new(),
        restriction: String::new(),
        refused: Vec::new(),
        current: None,
    };
    if let Some((_, instead, why)) = keys::COMPUTED.iter().find(|(computed, ..)| *computed == name) {
        return Ok(Explanation {
            doc: format!("Not a key: {why}. Set `{instead}` instead."),
            restriction: (*why).to_owned(),
            ..blank("computed")
        });
    }
    if let Some((group, default)) = unsupported::find(name) {
        return Ok(Explanation {
            doc: format!("A key of MaxText that is not supported: {}.", group.reason),
            default: default.map(|d| d.to_string()).unwrap_or_default(),
            maxtext: "MaxText's key of the same name".to_owned(),
            restriction: group.reason.to_owned(),
            ..blank(if group.inert { "accepted, changes nothing" } else { "accepted at its default only" })
        });
    }
    let problem = Problem::new(name, &Origin::Default, "unknown key");
    let near = keys_like(name);
    let problem = if near.is_empty() { problem } else { problem.hint(format!("did you mean {}?", listed(&near))) };
    Err(Error { problems: vec![problem] })
}

fn of_key(key: &Key) -> Explanation {
    Explanation {
        key: key.name.to_owned(),
        aliases: key.aliases.iter().map(|s| (*s).to_owned()).collect(),
        category: key.category.title().to_owned(),
        kind: key.type_phrase(),
        default: key.default.to_string(),
        doc: key.doc.to_owned(),
        variable: if is_reserved(key) { String::new() } else { key.variable() },
        maxtext: match key.maxtext {
            MaxText::Same => "same name, type and default".to_owned(),
            MaxText::Differs { default, why } => format!("default there is `{default}`; {why}"),
            MaxText::Absent => "no such key there".to_owned(),
        },
        restriction: match key.support {
            Support::Yes => String::new(),
            Support::OnlyDefault(reason) => format!("only the default is accepted: {reason}"),
            Support::Inert(reason) => format!("changes nothing: {reason}"),
        },
        refused: key.refused.iter().map(|(word, why)| ((*word).to_owned(), (*why).to_owned())).collect(),
        current: None,
    }
}

pub(crate) fn is_reserved(key: &Key) -> bool {
    keys::RESERVED_VARIABLES.iter().any(|(name, _)| *name == key.variable())
}

/// Writes an explanation for people.
#[must_use]
pub fn render_explanation(explanation: &Explanation) -> String {
    let mut out = format!("{}\n  {}\n", explanation.key, explanation.doc);
    let mut line = |label: &str, text: &str| {
        if !text.is_empty() {
            // Writing to a string cannot fail.
            let _ = writeln!(out, "  {label:<12} {text}");
        }
    };
    line("type", &explanation.kind);
    line("default", &explanation.default);
    if let Some(current) = &explanation.current {
        line("value", &format!("{} ({})", current.value, current.origin));
    }
    line("note", &explanation.restriction);
    line("aliases", &explanation.aliases.join(", "));
    line("environment", &explanation.variable);
    line("MaxText", &explanation.maxtext);
    for (word, reason) in &explanation.refused {
        line("refused", &format!("{word}: {reason}"));
    }
    out
}

/// Writes settings for people: one line each, in columns, under the headings of their sections.
#[must_use]
pub fn render_settings(settings: &[Setting]) -> String {
    let width = |f: &dyn Fn(&Setting) -> usize| settings.iter().map(f).max().unwrap_or(0);
    let key_width = width(&|s| s.key.len());
    let value_width = width(&|s| s.value.to_string().chars().count()).min(40);
    let mut out = String::new();
    let mut section = "";
    for setting in settings {
        if setting.category != section {
            let gap = if section.is_empty() { "" } else { "\n" };
            let _ = writeln!(out, "{gap}{}", setting.category);
            section = setting.category;
        }
        let value = setting.value.to_string();
        let _ = writeln!(out, "  {:<key_width$}  {value:<value_width$}  {}", setting.key, setting.origin);
    }
    out
}
