//! The chat template of a checkpoint, rendered as transformers renders it.

use std::path::{Path, PathBuf};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, Value};
use regex::Regex;
use serde_json::{Map, Value as Json, json};

use super::python;
use crate::generate::GenerateError;
use crate::generate::settings::{file_error, object};

/// Steps a template may take: a long conversation takes some hundred thousand, and a template that never ends must not
/// hang the program.
const FUEL: u64 = 20_000_000;

/// Names under which a message's thinking is passed; templates read one or another.
const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// A chat template, ready to render.
pub struct ChatTemplate {
    environment: Environment<'static>,
    has_tool_template: bool,
    /// `bos_token` and the like, which templates write.
    tokens: Map<String, Json>,
    source: PathBuf,
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChatTemplate").field("source", &self.source).finish_non_exhaustive()
    }
}

/// What a template is rendered with.
#[derive(Debug, Clone, Default)]
pub struct Conversation {
    /// Messages: objects with `role` and `content`, and whatever else the template reads.
    pub messages: Vec<Json>,
    /// Tools, as JSON schemas.
    pub tools: Vec<Json>,
    /// Whether the model is to think; `None` leaves it to the template.
    pub enable_thinking: Option<bool>,
    /// Further variables of the template.
    pub variables: Map<String, Json>,
}

impl ChatTemplate {
    /// Finds the template of a checkpoint, in the order of transformers: `chat_template.jinja` (with
    /// `additional_chat_templates/tool_use.jinja`), `chat_template.json`, and `chat_template` in tokenizer_config.json.
    /// `given` is a file to use instead. `None` if there is none.
    ///
    /// # Errors
    /// When a file cannot be read or is no template.
    pub fn open(dir: &Path, given: Option<&Path>) -> Result<Option<Self>, GenerateError> {
        let config_path = dir.join("tokenizer_config.json");
        let config = object(&config_path)?.unwrap_or_default();
        let mut tokens = Map::new();
        for (key, value) in &config {
            // Either the token, or an object that describes it.
            let text = value.as_str().or_else(|| value.get("content")?.as_str());
            if let Some(text) = text.filter(|_| key.ends_with("_token")) {
                tokens.insert(key.clone(), text.into());
            }
        }
        // Files without it are Gemma's all the same.
        tokens.entry("bos_token").or_insert_with(|| "<bos>".into());
        tokens.entry("eos_token").or_insert_with(|| "<eos>".into());
        let read = |path: &Path| fs_err::read_to_string(path);
        let (jinja, processor) = (dir.join("chat_template.jinja"), dir.join("chat_template.json"));
        let beside = dir.join("additional_chat_templates").join("tool_use.jinja");
        let (source, default, tool) = if let Some(path) = given {
            (path.to_owned(), read(path)?, None)
        } else if jinja.is_file() {
            let tool = if beside.is_file() { Some(read(&beside)?) } else { None };
            (jinja.clone(), read(&jinja)?, tool)
        } else {
            let of_processor = object(&processor)?.unwrap_or_default();
            let (path, value) = match (of_processor.get("chat_template"), config.get("chat_template")) {
                (Some(value), _) => (processor, value),
                (None, Some(value)) if !value.is_null() => (config_path, value),
                _ => return Ok(None),
            };
            let (default, tool) = named(value).map_err(|reason| file_error(&path, reason))?;
            (path, default, tool)
        };
        Self::new(source, &default, tool.as_deref(), tokens).map(Some)
    }

    /// A template from its text. `tokens` are the variables that name special tokens.
    ///
    /// # Errors
    /// When it is no template.
    pub fn new(
        source: PathBuf,
        default: &str,
        tool: Option<&str>,
        tokens: Map<String, Json>,
    ) -> Result<Self, GenerateError> {
        let mut environment = environment().map_err(|e| GenerateError::Template(explained(&e)))?;
        for (name, text) in [("default", Some(default)), ("tool_use", tool)] {
            let Some(text) = text else { continue };
            environment
                .add_template_owned(name, without_generation_blocks(text))
                .map_err(|e| file_error(&source, format!("no chat template: {}", explained(&e))))?;
        }
        Ok(ChatTemplate { environment, has_tool_template: tool.is_some(), tokens, source })
    }

    /// The file it came from.
    #[must_use]
    pub fn source(&self) -> &Path {
        &self.source
    }

    /// The text of a conversation; with `generation_prompt` it ends where the model's answer begins.
    ///
    /// # Errors
    /// When the template refuses the conversation, or fails.
    pub fn render(&self, conversation: &Conversation, generation_prompt: bool) -> Result<String, GenerateError> {
        let mut variables = self.tokens.clone();
        variables.extend(conversation.variables.clone());
        let messages: Vec<Json> = conversation.messages.iter().cloned().map(with_reasoning).collect();
        variables.insert("messages".to_owned(), messages.into());
        variables.insert("add_generation_prompt".to_owned(), generation_prompt.into());
        let tools = if conversation.tools.is_empty() { Json::Null } else { conversation.tools.clone().into() };
        variables.insert("tools".to_owned(), tools);
        variables.insert("documents".to_owned(), Json::Null);
        if let Some(enable) = conversation.enable_thinking {
            variables.insert("enable_thinking".to_owned(), enable.into());
        }
        let name = if self.has_tool_template && !conversation.tools.is_empty() { "tool_use" } else { "default" };
        let template = self.environment.get_template(name).map_err(|e| GenerateError::Template(explained(&e)))?;
        template.render(Value::from(Serde(variables))).map_err(|e| GenerateError::Template(explained(&e)))
    }
}

/// The template, and the one for tools: a string, or a list of named ones.
fn named(value: &Json) -> Result<(String, Option<String>), String> {
    if let Some(text) = value.as_str() {
        return Ok((text.to_owned(), None));
    }
    let find = |name: &str| match value {
        Json::Array(list) => list
            .iter()
            .find(|t| t.get("name").and_then(Json::as_str) == Some(name))
            .and_then(|t| t.get("template")?.as_str()),
        Json::Object(map) => map.get(name)?.as_str(),
        _ => None,
    };
    match find("default") {
        Some(default) => Ok((default.to_owned(), find("tool_use").map(str::to_owned))),
        None => Err("`chat_template` is neither a text nor holds one named `default`".to_owned()),
    }
}

/// transformers gives a message's thinking under two names, whichever it came under.
fn with_reasoning(mut message: Json) -> Json {
    let reasoning = REASONING.iter().filter_map(|name| message.get(name)).find(|v| !v.is_null()).cloned();
    if let (Some(reasoning), Some(map)) = (reasoning, message.as_object_mut()) {
        map.entry("thinking").or_insert_with(|| reasoning.clone());
        map.insert("reasoning_content".to_owned(), reasoning);
    }
    message
}

/// `{% generation %}` marks what the assistant wrote, for training; it prints nothing and is no tag of Jinja's own.
fn without_generation_blocks(text: &str) -> String {
    let Ok(mark) = Regex::new(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}") else { return text.to_owned() };
    let replaced = mark.replace_all(text, |c: &regex::Captures<'_>| {
        let tag = if c.get(2).is_some() { "endif" } else { "if true" };
        format!("{{%{} {tag} {}%}}", &c[1], &c[3])
    });
    replaced.into_owned()
}

fn environment() -> Result<Environment<'static>, Error> {
    let mut env = Environment::new();
    env.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    env.set_auto_escape_callback(|_| AutoEscape::None);
    env.set_fuel(Some(FUEL));
    env.set_recursion_limit(200);
    env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    env.set_formatter(|out, _, value| {
        out.write_str(&python::to_str(value)).map_err(|_| Error::new(ErrorKind::WriteFailure, "the text is too long"))
    });
    env.add_filter("tojson", |value: &Value, kwargs: Kwargs| python::tojson(value, &kwargs));
    env.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message))
    });
    env.add_function("strftime_now", |format: &str| -> Result<String, Error> {
        jiff::fmt::strtime::format(format, &jiff::ZonedDateTime::now())
            .map_err(|e| Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {e}")))
    });
    Ok(env)
}

/// An error with its place and causes, in one line.
fn explained(error: &Error) -> String {
    let mut out = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
    if let Some(line) = error.line() {
        out += &format!(" (line {line})");
    }
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        out += &format!(": {cause}");
        source = cause.source();
    }
    out
}

impl Conversation {
    /// A conversation of one message, after an instruction if there is one.
    #[must_use]
    pub fn ask(system: Option<&str>, text: &str) -> Self {
        let mut out = Conversation::default();
        if let Some(system) = system {
            out.push("system", system);
        }
        out.push("user", text);
        out
    }

    /// Adds a message.
    pub fn push(&mut self, role: &str, content: &str) {
        self.messages.push(json!({ "role": role, "content": content }));
    }
}

#[cfg(test)]
#[path = "template_tests.rs"]
mod tests;
