//! What is wrong with a configuration: every problem, each with its key, its origin and a way out.

use std::fmt;

use serde::Serialize;

use crate::layer::Origin;

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Problem {
    /// The key, as its giver spelled it; empty where no key is concerned (an unreadable file).
    pub key: String,
    /// The layer the value came from.
    #[serde(serialize_with = "crate::layer::origin_as_text")]
    pub origin: Origin,
    /// What is wrong: lower case, no final stop.
    pub message: String,
    /// What to do, where something can be said.
    pub hint: Option<String>,
}

impl Problem {
    pub(crate) fn new(key: &str, origin: &Origin, message: impl Into<String>) -> Self {
        Problem { key: key.to_owned(), origin: origin.clone(), message: message.into(), hint: None }
    }

    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.key.as_str(), &self.origin) {
            ("", origin) => write!(f, "{origin}: {}", self.message),
            (key, Origin::Default) => write!(f, "{key}: {}", self.message),
            (key, origin) => write!(f, "{key} ({origin}): {}", self.message),
        }
    }
}

/// A configuration that cannot be used, with everything that is wrong with it.
///
/// The text has one line per problem. A hint follows the problem it belongs to, once where several in a row share it.
#[derive(Debug, Clone, PartialEq, thiserror::Error, Serialize)]
pub struct Error {
    /// The problems; never empty.
    pub problems: Vec<Problem>,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.problems.len() {
            1 => f.write_str("the configuration has a problem")?,
            n => write!(f, "the configuration has {n} problems")?,
        }
        for (i, problem) in self.problems.iter().enumerate() {
            write!(f, "\n  {problem}")?;
            if let Some(hint) = &problem.hint
                && self.problems.get(i + 1).is_none_or(|next| next.hint.as_ref() != Some(hint))
            {
                write!(f, "\n    hint: {hint}")?;
            }
        }
        Ok(())
    }
}
