//! Finds the tensors that a model expects in a directory, under whatever prefix the directory uses, and accounts for
//! everything else that lies there.
//!
//! This module knows no model. The caller says which names and shapes it expects, which prefixes occur, and which
//! left-over tensors are no surprise.

use std::collections::{BTreeMap, HashSet};
use std::fmt;

use tensor::{DType, Shape};

use crate::hf::HfDirectory;
use crate::safetensors::TensorView;

/// The element types that weights may have.
pub const WEIGHT_DTYPES: [DType; 3] = [DType::BF16, DType::F16, DType::F32];

/// A tensor that a model needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expected {
    /// Name without a prefix.
    pub name: String,
    /// Shape.
    pub shape: Shape,
    /// The one element type it may have; `None` for any of [`WEIGHT_DTYPES`].
    pub dtype: Option<DType>,
}

/// Tensors that may be present and are not used, for one reason.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnusedRule {
    /// The reason, for people: `vision tower`.
    pub label: String,
    /// Patterns over dot-separated names: `*` stands for one element, `**` for any number of them (also none), anything
    /// else for itself. A pattern is tried on the full name and on the name without the detected prefix.
    pub patterns: Vec<String>,
}

/// How names in a directory relate to the names a model expects.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct NameRules {
    /// Prefixes in the wild, with their final dot. The empty prefix is always tried as well.
    pub prefixes: Vec<String>,
    /// Tensors that may be left over; the first rule that matches counts.
    pub unused: Vec<UnusedRule>,
}

/// Number and size of some tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Count {
    /// How many.
    pub tensors: usize,
    /// Their bytes in total.
    pub bytes: u64,
}

impl Count {
    fn add(&mut self, bytes: u64) {
        self.tensors += 1;
        self.bytes = self.bytes.saturating_add(bytes);
    }
}

/// What was found in a directory.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct BindReport {
    /// The prefix that the expected tensors carry.
    pub prefix: String,
    /// Tensors the model uses.
    pub used: Count,
    /// The same, by element type.
    pub dtypes: BTreeMap<DType, Count>,
    /// Left-over tensors that a rule foresees: label and count, in the order of the rules, without empty ones.
    pub unused_expected: Vec<(String, Count)>,
    /// Left-over tensors that no rule foresees: full name and bytes, ordered by name.
    pub unused_unexpected: Vec<(String, u64)>,
    /// Expected names that are not there. Empty in a successful binding.
    pub missing: Vec<String>,
}

/// A model's tensors in a directory.
#[derive(Debug, Clone)]
pub struct Binding {
    /// Name without prefix -> tensor (whose own name is the full one).
    pub tensors: BTreeMap<String, TensorView>,
    /// What was found.
    pub report: BindReport,
}

impl Binding {
    /// The tensor of this name (without prefix).
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&TensorView> {
        self.tensors.get(name)
    }
}

/// A tensor that is there and cannot be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Misfit {
    /// Another shape than the model needs.
    Shape {
        /// Full name.
        tensor: String,
        /// Shape in the file.
        found: Shape,
        /// Shape that the model needs.
        expected: Shape,
    },
    /// An element type that weights cannot have.
    DType {
        /// Full name.
        tensor: String,
        /// Its element type.
        found: DType,
        /// The only one it may have, if it is one.
        expected: Option<DType>,
    },
}

impl fmt::Display for Misfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Misfit::Shape { tensor, found, expected } => {
                write!(f, "{tensor} has shape {found}, expected {expected}")
            }
            Misfit::DType { tensor, found, expected: Some(expected) } => {
                write!(f, "{tensor} is {found}, expected {expected}")
            }
            Misfit::DType { tensor, found, expected: None } => {
                write!(f, "{tensor} is {found}, expected bfloat16, float16 or float32")
            }
        }
    }
}

/// Why a directory does not fit a model.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// None of the expected tensors was found.
    #[error(
        "{path} holds none of the {expected} tensors that the model needs, such as {sample:?} under any of the known \
         prefixes; it holds {}", .holds.as_deref().map_or("no tensors at all".to_owned(), |n| format!("{n:?}"))
    )]
    NothingFound {
        /// The directory.
        path: String,
        /// How many tensors the model needs.
        expected: usize,
        /// The first of them.
        sample: String,
        /// One name in the directory.
        holds: Option<String>,
    },
    /// One expected tensor is there under two prefixes.
    #[error("{path} holds one tensor under two prefixes: {}", show_pairs(.pairs))]
    Ambiguous {
        /// The directory.
        path: String,
        /// Full names, all of them.
        pairs: Vec<(String, String)>,
    },
    /// Some expected tensors are there under one prefix and some under another.
    #[error("{path} mixes prefixes: {}", show_examples(.examples))]
    MixedPrefixes {
        /// The directory.
        path: String,
        /// Prefix, number of expected tensors under it, and the full name of one.
        examples: Vec<(String, usize, String)>,
    },
    /// Tensors are missing or cannot be used.
    #[error("{path} does not fit the model{}", problems(.report, .misfits))]
    Unfit {
        /// The directory.
        path: String,
        /// What was found, with everything that is missing.
        report: Box<BindReport>,
        /// Everything that has a wrong shape or element type.
        misfits: Vec<Misfit>,
    },
}

fn show_pairs(pairs: &[(String, String)]) -> String {
    pairs.iter().map(|(a, b)| format!("{a} and {b}")).collect::<Vec<_>>().join(", ")
}

fn show_examples(examples: &[(String, usize, String)]) -> String {
    examples.iter().map(|(_, n, name)| format!("{n} like {name}")).collect::<Vec<_>>().join(", ")
}

fn problems(report: &BindReport, misfits: &[Misfit]) -> String {
    let mut text = String::new();
    if !report.missing.is_empty() {
        text += &format!("; missing ({}): ", report.missing.len());
        text += &listed(report.missing.iter().map(|n| format!("{}{n}", report.prefix)));
    }
    if !misfits.is_empty() {
        text += &format!("; unusable ({}): ", misfits.len());
        text += &listed(misfits.iter());
    }
    text
}

/// Names with commas between them: of very many the first, and how many there are besides.
pub fn listed<T: ToString>(items: impl ExactSizeIterator<Item = T>) -> String {
    const MOST: usize = 12;
    let rest = items.len().saturating_sub(MOST);
    let first: Vec<String> = items.take(MOST).map(|i| i.to_string()).collect();
    let first = first.join(", ");
    if rest == 0 { first } else { format!("{first} and {rest} more") }
}

/// Finds every expected tensor in `dir` and accounts for the rest.
///
/// # Errors
/// When a tensor is missing, misshapen or of another element type than bf16, f16 and f32 (the first are named), when
/// expected names occur under two prefixes, or when none occurs at all.
pub fn bind(dir: &HfDirectory, expected: &[Expected], rules: &NameRules) -> Result<Binding, BindError> {
    let path = dir.path().display().to_string();
    let prefix = detect_prefix(dir, expected, rules, &path)?;
    let mut report = BindReport { prefix: prefix.to_owned(), ..Default::default() };
    let mut tensors = BTreeMap::new();
    let mut misfits = Vec::new();
    let mut used = HashSet::new();
    for e in expected {
        let Some(t) = dir.tensor(&format!("{prefix}{}", e.name)) else {
            report.missing.push(e.name.clone());
            continue;
        };
        used.insert(t.name.clone());
        report.used.add(t.bytes.len() as u64);
        report.dtypes.entry(t.dtype).or_default().add(t.bytes.len() as u64);
        if t.shape != e.shape {
            misfits.push(Misfit::Shape { tensor: t.name.clone(), found: t.shape.clone(), expected: e.shape.clone() });
        }
        if e.dtype.map_or(!WEIGHT_DTYPES.contains(&t.dtype), |d| d != t.dtype) {
            misfits.push(Misfit::DType { tensor: t.name.clone(), found: t.dtype, expected: e.dtype });
        }
        tensors.insert(e.name.clone(), t);
    }
    account_for_rest(dir, &used, prefix, &rules.unused, &mut report);
    if !report.missing.is_empty() || !misfits.is_empty() {
        return Err(BindError::Unfit { path, report: Box::new(report), misfits });
    }
    Ok(Binding { tensors, report })
}

fn detect_prefix<'r>(
    dir: &HfDirectory,
    expected: &[Expected],
    rules: &'r NameRules,
    path: &str,
) -> Result<&'r str, BindError> {
    let mut prefixes: Vec<&str> = rules.prefixes.iter().map(String::as_str).chain([""]).collect();
    let mut seen = HashSet::new();
    prefixes.retain(|p| seen.insert(*p));

    let mut found: BTreeMap<&str, String> = BTreeMap::new();
    let mut hits: Vec<(&str, usize, String)> = Vec::new();
    let mut twice = Vec::new();
    for &prefix in &prefixes {
        let mut here = (prefix, 0, String::new());
        for e in expected {
            let full = format!("{prefix}{}", e.name);
            if dir.entry(&full).is_none() {
                continue;
            }
            if here.1 == 0 {
                here.2.clone_from(&full);
            }
            here.1 += 1;
            if let Some(other) = found.get(e.name.as_str()) {
                twice.push((other.clone(), full));
            } else {
                found.insert(&e.name, full);
            }
        }
        if here.1 > 0 {
            hits.push(here);
        }
    }
    let path = path.to_owned();
    if !twice.is_empty() {
        return Err(BindError::Ambiguous { path, pairs: twice });
    }
    match hits.as_slice() {
        [(prefix, ..)] => Ok(prefix),
        [] if expected.is_empty() => Ok(""),
        [] => Err(BindError::NothingFound {
            path,
            expected: expected.len(),
            sample: expected.first().map(|e| e.name.clone()).unwrap_or_default(),
            holds: dir.entries().next().map(|t| t.name.clone()),
        }),
        many => Err(BindError::MixedPrefixes {
            path,
            examples: many.iter().map(|(p, n, name)| ((*p).to_owned(), *n, name.clone())).collect(),
        }),
    }
}

fn account_for_rest(
    dir: &HfDirectory,
    used: &HashSet<String>,
    prefix: &str,
    rules: &[UnusedRule],
    report: &mut BindReport,
) {
    let mut counts = vec![Count::default(); rules.len()];
    for t in dir.entries().filter(|t| !used.contains(&t.name)) {
        let inside = t.name.strip_prefix(prefix);
        let rule = rules.iter().position(|r| {
            r.patterns.iter().any(|p| matches(p, &t.name) || inside.is_some_and(|name| matches(p, name)))
        });
        match rule.and_then(|i| counts.get_mut(i)) {
            Some(count) => count.add(t.bytes()),
            None => report.unused_unexpected.push((t.name.clone(), t.bytes())),
        }
    }
    report.unused_expected = rules
        .iter()
        .zip(counts)
        .filter(|(_, count)| count.tensors > 0)
        .map(|(rule, count)| (rule.label.clone(), count))
        .collect();
}

/// Whether a name matches a pattern of [`UnusedRule`].
#[must_use]
pub fn matches(pattern: &str, name: &str) -> bool {
    let p: Vec<&str> = pattern.split('.').collect();
    let n: Vec<&str> = name.split('.').collect();
    // The classic two-pointer match: after a `**`, remember where to come back to. Linear in practice and never
    // exponential, whatever a foreign name looks like.
    let (mut i, mut j) = (0, 0);
    let mut back: Option<(usize, usize)> = None;
    while j < n.len() {
        match p.get(i) {
            Some(&"**") => {
                back = Some((i, j));
                i += 1;
            }
            Some(&e) if e == "*" || n.get(j) == Some(&e) => {
                i += 1;
                j += 1;
            }
            _ => match back {
                Some((star, at)) => {
                    back = Some((star, at + 1));
                    i = star + 1;
                    j = at + 1;
                }
                None => return false,
            },
        }
    }
    p.iter().skip(i).all(|&e| e == "**")
}

#[cfg(test)]
#[path = "binding_tests.rs"]
mod tests;
