//! From text or YAML to the value of a key: type, range, words.

use serde_json::Value as Json;

use crate::keys::{Key, Kind, MESH_AXES};
use crate::suggest::{listed, word_like};
use crate::value::{AxisRule, Value};
use crate::yaml;

/// Why a value is not one of a key's: message and hint.
pub(crate) type Refusal = (String, Option<String>);

fn refuse<T>(message: String) -> Result<T, Refusal> {
    Err((message, None))
}

/// Words that stand for no value.
fn is_none_word(text: &str) -> bool {
    text == "~" || text.eq_ignore_ascii_case("none") || text.eq_ignore_ascii_case("null")
}

fn bool_word(text: &str) -> Option<bool> {
    match text.to_ascii_lowercase().as_str() {
        "true" | "yes" | "on" | "1" => Some(true),
        "false" | "no" | "off" | "0" => Some(false),
        _ => None,
    }
}

/// A whole number in decimal, with `_` between digits allowed, or a float that is whole (`1e6`).
fn int_word(text: &str) -> Option<i64> {
    let plain = text.replace('_', "");
    plain.parse().ok().or_else(|| plain.parse().ok().and_then(whole))
}

fn float_word(text: &str) -> Option<f64> {
    text.replace('_', "").parse().ok()
}

fn whole(x: f64) -> Option<i64> {
    // Beyond 2^53 a float no longer names one whole number.
    (x.fract() == 0.0 && x.abs() <= 9_007_199_254_740_992.0).then_some(x as i64)
}

fn unquoted(text: &str) -> &str {
    for quote in ['"', '\''] {
        if text.len() >= 2
            && let Some(inner) = text.strip_prefix(quote).and_then(|t| t.strip_suffix(quote))
        {
            return inner;
        }
    }
    text
}

/// The value of a word from the command line or the environment.
///
/// Text keys take the word as it stands (a prompt may hold any character); the others read it as YAML does.
pub(crate) fn from_text(key: &Key, text: &str) -> Result<Value, Refusal> {
    let trimmed = text.trim();
    let word = unquoted(trimmed);
    let is_text = matches!(key.kind, Kind::Text | Kind::Choice(_));
    if key.nullable && (is_none_word(trimmed) || (!is_text && trimmed.is_empty())) {
        return check(key, Value::Null);
    }
    let value = match key.kind {
        Kind::Bool => bool_word(word).map(Value::Bool),
        Kind::Int { .. } => int_word(word).map(Value::Int),
        Kind::Float { .. } => float_word(word).map(Value::Float),
        // Quotes the shell left in place are dropped, all else stays, blanks at the ends too.
        Kind::Text => Some(Value::Text(if word == trimmed { text } else { word }.to_owned())),
        Kind::Choice(_) => Some(Value::Text(word.to_owned())),
        Kind::TextList | Kind::AxisRules => match yaml::scalar_or_list(trimmed) {
            Ok(json @ Json::Array(_)) => return from_json(key, &json),
            _ => {
                let example = if key.kind == Kind::TextList { "[one,two]" } else { "[[embed,[fsdp]],[mlp,[tensor]]]" };
                return Err((
                    format!("`{trimmed}` is not {}", article(&key.kind)),
                    Some(format!("write `{}={example}`", key.name)),
                ));
            }
        },
    };
    match value {
        Some(value) => check(key, value),
        None => refuse(format!("`{trimmed}` is not {}", article(&key.kind))),
    }
}

/// The value of a YAML node.
pub(crate) fn from_json(key: &Key, json: &Json) -> Result<Value, Refusal> {
    let is_text = matches!(key.kind, Kind::Text | Kind::Choice(_));
    let value = match (&key.kind, json) {
        (_, Json::Null) if key.nullable => Some(Value::Null),
        (_, Json::String(s)) if key.nullable && is_none_word(s) => Some(Value::Null),
        // An empty YAML value is null; for text it means empty.
        (Kind::Text, Json::Null) => Some(Value::Text(String::new())),
        (Kind::Bool, Json::Bool(b)) => Some(Value::Bool(*b)),
        (Kind::Bool, Json::String(s)) => bool_word(s).map(Value::Bool),
        (Kind::Int { .. }, Json::Number(n)) => n.as_i64().or_else(|| n.as_f64().and_then(whole)).map(Value::Int),
        (Kind::Int { .. }, Json::String(s)) => int_word(s).map(Value::Int),
        (Kind::Float { .. }, Json::Number(n)) => n.as_f64().map(Value::Float),
        (Kind::Float { .. }, Json::String(s)) => float_word(s).map(Value::Float),
        (Kind::Text | Kind::Choice(_), Json::String(s)) => Some(Value::Text(s.clone())),
        // `remat_policy: none` reads as text, but `remat_policy: null` must mean the word.
        (Kind::Choice(words), Json::Null) if words.contains(&"none") => Some(Value::Text("none".to_owned())),
        (Kind::TextList, Json::Array(items)) => {
            items.iter().map(|i| i.as_str().map(str::to_owned)).collect::<Option<_>>().map(Value::List)
        }
        (Kind::AxisRules, Json::Array(items)) => items.iter().map(rule).collect::<Option<_>>().map(Value::Rules),
        _ => None,
    };
    match value {
        Some(value) => check(key, value),
        None => {
            let hint = (is_text && (json.is_number() || json.is_boolean()))
                .then(|| format!("put it in quotes: `{}: \"{json}\"`", key.name));
            Err((format!("`{}` is not {}", shortened(json), article(&key.kind)), hint))
        }
    }
}

/// `[logical, [mesh, ..]]` or `[logical, mesh]`.
fn rule(json: &Json) -> Option<AxisRule> {
    let [name, axes] = json.as_array()?.as_slice() else { return None };
    let axes = match axes {
        Json::String(axis) => vec![axis.clone()],
        Json::Array(axes) => axes.iter().map(|a| a.as_str().map(str::to_owned)).collect::<Option<_>>()?,
        _ => return None,
    };
    Some((name.as_str()?.to_owned(), axes))
}

fn shortened(json: &Json) -> String {
    let text = json.to_string();
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

fn article(kind: &Kind) -> String {
    match kind {
        Kind::Bool => "true or false".to_owned(),
        Kind::Int { .. } => "a whole number".to_owned(),
        Kind::Float { .. } => "a number".to_owned(),
        Kind::Text => "text".to_owned(),
        Kind::Choice(_) => "a word".to_owned(),
        Kind::TextList => "a list of strings".to_owned(),
        Kind::AxisRules => "a list of rules, each a logical axis and a list of mesh axes".to_owned(),
    }
}

/// Checks range and words of a value of the right type; replaces other spellings by the accepted word.
pub(crate) fn check(key: &Key, value: Value) -> Result<Value, Refusal> {
    match (&key.kind, &value) {
        (_, Value::Null) if key.nullable => Ok(value),
        (Kind::Int { min, max }, Value::Int(i)) => {
            if i < min {
                return refuse(format!("{i} is too small: the least is {min}"));
            }
            if i > max {
                return refuse(format!("{i} is too large: the most is {max}"));
            }
            Ok(value)
        }
        (Kind::Float { min, max, above }, Value::Float(x)) => {
            if !x.is_finite() {
                refuse(format!("{x} is not a finite number"))
            } else if *above && x <= min {
                refuse(format!("{x:?} is too small: it must be greater than {min}"))
            } else if x < min {
                refuse(format!("{x:?} is too small: the least is {min}"))
            } else if x > max {
                refuse(format!("{x:?} is too large: the most is {max}"))
            } else {
                Ok(value)
            }
        }
        (Kind::Choice(words), Value::Text(word)) => {
            if words.contains(&word.as_str()) {
                return Ok(value);
            }
            if let Some((_, meant)) = key.synonyms.iter().find(|(other, _)| other == word) {
                return Ok(Value::from(*meant));
            }
            if let Some((_, reason)) = key.refused.iter().find(|(other, _)| other == word) {
                return Err((format!("`{word}` is not supported: {reason}"), None));
            }
            let meant = word_like(word, words.iter().copied().filter(|w| !w.is_empty()));
            let known: Vec<&str> = words.iter().map(|w| if w.is_empty() { "\"\"" } else { w }).collect();
            let hint = meant.map(|w| format!("did you mean `{w}`?"));
            Err((format!("`{word}` is not one of {}", listed(&known)), hint))
        }
        (Kind::Bool, Value::Bool(_)) | (Kind::Text, Value::Text(_)) | (Kind::TextList, Value::List(_)) => Ok(value),
        (Kind::AxisRules, Value::Rules(rules)) => {
            for (name, axes) in rules {
                if let Some(axis) = axes.iter().find(|a| !MESH_AXES.contains(&a.as_str())) {
                    let hint = word_like(axis, MESH_AXES.iter().copied()).map(|w| format!("did you mean `{w}`?"));
                    return Err((
                        format!("the rule of `{name}` names `{axis}`, which is not one of {}", listed(MESH_AXES)),
                        hint,
                    ));
                }
            }
            Ok(value)
        }
        (kind, _) => refuse(format!("`{value}` is not {}", article(kind))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::find;

    fn text(key: &str, word: &str) -> Result<Value, Refusal> {
        from_text(find(key).unwrap(), word)
    }

    fn json(key: &str, yaml: &str) -> Result<Value, Refusal> {
        from_json(find(key).unwrap(), &yaml::scalar_or_list(yaml).unwrap())
    }

    #[test]
    fn words_of_the_command_line() {
        assert_eq!(text("steps", "7"), Ok(Value::Int(7)));
        assert_eq!(text("steps", "150_001"), Ok(Value::Int(150_001)));
        assert_eq!(text("steps", "1e3"), Ok(Value::Int(1000)));
        assert_eq!(text("learning_rate", "1e-5"), Ok(Value::Float(1e-5)));
        assert_eq!(text("learning_rate", "1"), Ok(Value::Float(1.0)));
        assert_eq!(text("packing", "False"), Ok(Value::Bool(false)));
        assert_eq!(text("prompt", "what: is # this"), Ok(Value::from("what: is # this")));
        assert_eq!(text("prompt", "\"quoted\""), Ok(Value::from("quoted")));
        assert_eq!(text("run_name", "007"), Ok(Value::from("007")));
        assert_eq!(text("adamw_mask", "[\"a\",\"b\"]"), Ok(Value::List(vec!["a".into(), "b".into()])));
        assert_eq!(text("adamw_mask", "[a, b]"), Ok(Value::List(vec!["a".into(), "b".into()])));
    }

    #[test]
    fn none_is_null_only_where_null_is_a_value() {
        for word in ["none", "None", "NONE", "null", "~"] {
            assert_eq!(text("max_num_checkpoints_to_keep", word), Ok(Value::Null), "{word}");
            assert_eq!(text("final_logits_soft_cap", word), Ok(Value::Null), "{word}");
        }
        assert_eq!(text("remat_policy", "none"), Ok(Value::from("none")));
        assert_eq!(text("prompt", "none"), Ok(Value::from("none")));
        assert_eq!(json("max_num_checkpoints_to_keep", "None"), Ok(Value::Null));
        assert_eq!(json("max_num_checkpoints_to_keep", "~"), Ok(Value::Null));
        assert_eq!(json("remat_policy", "null"), Ok(Value::from("none")));
        assert_eq!(text("jax_cache_dir", ""), Ok(Value::from("")));
    }

    #[test]
    fn wrong_values_say_why() {
        let message = |r: Result<Value, Refusal>| r.unwrap_err().0;
        assert_eq!(message(text("steps", "abc")), "`abc` is not a whole number");
        assert_eq!(message(text("steps", "1.5")), "`1.5` is not a whole number");
        assert_eq!(message(text("steps", "-2")), "-2 is too small: the least is -1");
        assert_eq!(message(text("steps", "99999999999")), "99999999999 is too large: the most is 2147483647");
        assert_eq!(message(text("learning_rate", "-1")), "-1.0 is too small: the least is 0");
        assert_eq!(message(text("learning_rate", "nan")), "NaN is not a finite number");
        assert_eq!(message(text("per_device_batch_size", "0")), "0.0 is too small: it must be greater than 0");
        assert_eq!(message(text("packing", "maybe")), "`maybe` is not true or false");
        assert_eq!(message(text("adamw_mask", "a")), "`a` is not a list of strings");
        assert_eq!(message(json("adamw_mask", "[1]")), "`[1]` is not a list of strings");
        assert_eq!(message(json("packing", "[]")), "`[]` is not true or false");
        assert_eq!(
            json("run_name", "12"),
            Err(("`12` is not text".into(), Some("put it in quotes: `run_name: \"12\"`".into())))
        );
    }

    proptest::proptest! {
        /// What is shown can be written: on the command line and, where it is no text that YAML breaks, in a file.
        #[test]
        fn shown_values_read_back(text in "\\PC{0,12}", items in proptest::collection::vec("\\PC{0,6}", 0..4),
                                  int in 0..i64::from(i32::MAX), float in 0.0f64..1e300) {
            for (key, value) in [
                ("hf_name", Value::Text(text)),
                ("adamw_mask", Value::List(items)),
                ("data_shuffle_seed", Value::Int(int)),
                ("learning_rate", Value::Float(float)),
            ] {
                let key = find(key).unwrap();
                let shown = value.to_string();
                let entries = yaml::parse(&format!("{}: {shown}\n", key.name)).unwrap();
                proptest::prop_assert_eq!(from_json(key, &entries[0].value), Ok(value.clone()), "{}", shown);
                if !matches!(value, Value::Text(_)) {
                    proptest::prop_assert_eq!(from_text(key, &shown), Ok(value), "{}", shown);
                }
            }
        }

        /// No word makes any key panic.
        #[test]
        fn any_word_is_a_value_or_a_refusal(word in "\\PC{0,20}") {
            for key in crate::keys::all() {
                let _ = from_text(key, &word);
                if let Ok(json) = yaml::scalar_or_list(&word) {
                    let _ = from_json(key, &json);
                }
            }
        }
    }

    #[test]
    fn words_of_enumerations() {
        assert_eq!(text("remat_policy", "minimal_flash"), Ok(Value::from("minimal_with_context")));
        let (message, hint) = text("dtype", "bfloat6").unwrap_err();
        assert_eq!(message, "`bfloat6` is not one of `bfloat16`, `float32`, `float16` or `float64`");
        assert_eq!(hint.as_deref(), Some("did you mean `bfloat16`?"));
        let (message, _) = text("attention", "flash").unwrap_err();
        assert!(message.starts_with("`flash` is not supported: this version"), "{message}");
        let (message, _) = text("opt_type", "muon").unwrap_err();
        assert_eq!(message, "`muon` is not supported: it is not defined for the gemma4_small decoder");
    }
}
