//! Chat templates: messages to the one text that the model was trained on.
//!
//! A template is a Jinja program that comes with the model. It runs in a box: it can load no file, there is no
//! other template to include, its steps and its output are bounded, and it sees only what is
//! given here. The settings are those of transformers (`trim_blocks`, `lstrip_blocks`, loop
//! controls, `raise_exception`, `strftime_now`, a `tojson` that escapes no HTML).

use std::io;
use std::time::SystemTime;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, ErrorKind, Value, context};
use serde::{Deserialize, Serialize};
use serde_json::Map;

use crate::{Error, python};

/// Steps that a template may take; a message takes about a hundred.
pub const MAX_STEPS: u64 = 1_000_000;
/// Longest text that a template may write, in bytes.
pub const MAX_OUTPUT_BYTES: usize = 32 << 20;

/// Stack of a template's thread, in bytes. The template engine recurses over its own data: over the
/// operators of one expression (at most one for each byte of the source), and over nested values
/// (at most one level for each step). Either takes less than 500 bytes a level, so this is enough
/// for the worst that [`crate::MAX_TEMPLATE_BYTES`] and [`MAX_STEPS`] let through, where an ordinary
/// stack would overflow and end the process. Memory is only taken as far as it is used.
const STACK_BYTES: usize = 640 << 20;

/// What a message says.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Content {
    /// Text.
    Text(String),
    /// Parts, each an object with a `type`, as in OpenAI's API.
    Parts(Vec<serde_json::Value>),
    /// Nothing (JSON `null`), as beside tool calls.
    #[default]
    None,
}

impl Content {
    /// The text of all parts, for the many templates that join strings: parts are put on lines of
    /// their own, as vLLM does.
    ///
    /// # Errors
    /// [`Error::NotText`] for a part of another type.
    pub fn text(&self) -> Result<String, Error> {
        match self {
            Content::Text(text) => Ok(text.clone()),
            Content::None => Ok(String::new()),
            Content::Parts(parts) => {
                let text = |(index, part): (usize, &serde_json::Value)| {
                    let kind = part.get("type").and_then(|t| t.as_str());
                    match (kind, part.get("text").and_then(|t| t.as_str())) {
                        (Some("text"), Some(text)) => Ok(text.to_owned()),
                        _ => Err(Error::NotText { index, got: kind.unwrap_or("none").to_owned() }),
                    }
                };
                Ok(parts.iter().enumerate().map(text).collect::<Result<Vec<_>, _>>()?.join("\n"))
            }
        }
    }
}

impl From<&str> for Content {
    fn from(text: &str) -> Self {
        Content::Text(text.to_owned())
    }
}

impl From<String> for Content {
    fn from(text: String) -> Self {
        Content::Text(text)
    }
}

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ChatMessage {
    /// Who speaks: "system", "user", "assistant", "tool", or what the template knows besides.
    pub role: String,
    /// What is said.
    #[serde(default)]
    pub content: Content,
    /// Anything else that a template may read: `tool_calls`, `reasoning_content`, `name`, …
    #[serde(flatten)]
    pub extra: Map<String, serde_json::Value>,
}

impl ChatMessage {
    /// A message of plain text.
    pub fn new(role: impl Into<String>, content: impl Into<Content>) -> Self {
        ChatMessage { role: role.into(), content: content.into(), extra: Map::new() }
    }
}

/// What a template is asked to write.
#[derive(Debug, Clone, Copy)]
pub struct ChatRequest<'a> {
    /// The conversation so far.
    pub messages: &'a [ChatMessage],
    /// Tools that the model may call, in OpenAI's schema.
    pub tools: Option<&'a [serde_json::Value]>,
    /// Whether the text ends with the opening of the assistant's next turn.
    pub add_generation_prompt: bool,
    /// Further variables (`enable_thinking`, …), vLLM's `chat_template_kwargs`.
    pub extra: Option<&'a Map<String, serde_json::Value>>,
    /// The time that `strftime_now` tells, in UTC.
    pub now: SystemTime,
}

impl<'a> ChatRequest<'a> {
    /// The usual request: the assistant answers now, without tools.
    pub fn new(messages: &'a [ChatMessage]) -> Self {
        ChatRequest { messages, tools: None, add_generation_prompt: true, extra: None, now: SystemTime::now() }
    }
}

/// A parsed chat template.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    origin: String,
    bos_token: Option<String>,
    eos_token: Option<String>,
}

const NAME: &str = "chat_template";

impl ChatTemplate {
    /// Parses a template. `origin` says in errors where it came from; templates read the tokens
    /// as `bos_token` and `eos_token`, a missing one as the empty string.
    ///
    /// # Errors
    /// [`Error::TemplateSyntax`] with the line.
    pub fn new(
        source: String,
        origin: String,
        bos_token: Option<String>,
        eos_token: Option<String>,
    ) -> Result<Self, Error> {
        let mut environment = Environment::new();
        environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().expect("fixed"));
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_fuel(Some(MAX_STEPS));
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_filter("tojson", python::tojson);
        environment.add_function("raise_exception", |message: &Value| -> Result<Value, minijinja::Error> {
            let raised = Raised(message.to_string());
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, raised.0.clone()).with_source(raised))
        });
        let parsed = on_large_stack(|| environment.add_template_owned(NAME, without_generation_tags(source)));
        parsed
            .and_then(|result| result.map_err(|e| describe(&e)))
            .map_err(|reason| Error::TemplateSyntax { origin: origin.clone(), reason })?;
        Ok(ChatTemplate { environment, origin, bos_token, eos_token })
    }

    /// Writes the text for a conversation. Encode it without special tokens: they are in it.
    ///
    /// # Errors
    /// [`Error::TemplateRaised`] when the template refuses the messages, and
    /// [`Error::TemplateFailed`], [`Error::TemplateEndless`], [`Error::TemplateOutput`].
    pub fn render(&self, request: ChatRequest<'_>) -> Result<String, Error> {
        on_large_stack(|| self.render_here(request))
            .unwrap_or_else(|reason| Err(Error::TemplateFailed { origin: self.origin.clone(), reason }))
    }

    fn render_here(&self, request: ChatRequest<'_>) -> Result<String, Error> {
        let now = request.now;
        let own = context! {
            messages => Serde(request.messages),
            tools => request.tools.map(|tools| Value::from(Serde(tools))),
            documents => (),
            add_generation_prompt => request.add_generation_prompt,
            bos_token => self.bos_token.as_deref().unwrap_or_default(),
            eos_token => self.eos_token.as_deref().unwrap_or_default(),
            strftime_now => Value::from_function(move |format: &str| {
                python::strftime(format, now).map_err(|e| minijinja::Error::new(ErrorKind::InvalidOperation, e))
            }),
        };
        // What is ours wins over a further variable of the same name.
        let context = match request.extra {
            Some(extra) => context! { ..own, ..Serde(extra) },
            None => own,
        };
        let mut output = Bounded { bytes: Vec::new(), full: false };
        let template = self.environment.get_template(NAME).expect("parsed by `new`");
        let result = template.render_captured_to(context, &mut output).map(drop);
        if output.full {
            return Err(Error::TemplateOutput { origin: self.origin.clone(), limit: MAX_OUTPUT_BYTES });
        }
        result.map_err(|e| self.failure(&e))?;
        Ok(String::from_utf8(output.bytes).expect("a template writes whole strings"))
    }

    fn failure(&self, error: &minijinja::Error) -> Error {
        let origin = self.origin.clone();
        if error.kind() == ErrorKind::OutOfFuel {
            return Error::TemplateEndless { origin, limit: MAX_STEPS };
        }
        let mut source: Option<&(dyn std::error::Error + 'static)> = Some(error);
        while let Some(e) = source {
            if let Some(Raised(message)) = e.downcast_ref() {
                return Error::TemplateRaised { origin, message: message.clone() };
            }
            source = e.source();
        }
        Error::TemplateFailed { origin, reason: describe(error) }
    }
}

/// Runs the template engine on a thread with [`STACK_BYTES`]; the error says why there is no result.
fn on_large_stack<T: Send>(f: impl FnOnce() -> T + Send) -> Result<T, String> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("chat-template".into()).stack_size(STACK_BYTES);
        let running = thread
            .spawn_scoped(scope, f)
            .map_err(|e| format!("no thread with {} MiB of stack can be started: {e}", STACK_BYTES >> 20))?;
        running.join().map_err(|_| "the template engine broke down; this is a bug".to_owned())
    })
}

/// What a template gave to `raise_exception`, found again in the chain of causes.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

/// The error with its line, without the template's name.
fn describe(error: &minijinja::Error) -> String {
    let what = match error.detail() {
        Some(detail) => format!("{}: {detail}", error.kind()),
        None => error.kind().to_string(),
    };
    error.line().map_or(what.clone(), |line| format!("line {line}: {what}"))
}

/// Collects the output up to the limit.
struct Bounded {
    bytes: Vec<u8>,
    full: bool,
}

impl io::Write for Bounded {
    fn write(&mut self, piece: &[u8]) -> io::Result<usize> {
        if piece.len() > MAX_OUTPUT_BYTES - self.bytes.len() {
            self.full = true;
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.bytes.extend_from_slice(piece);
        Ok(piece.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// transformers marks the assistant's words with `{% generation %}…{% endgeneration %}` to train on
/// them. The tags write nothing, so they become an `if` that holds.
fn without_generation_tags(source: String) -> String {
    if !source.contains("generation") {
        return source;
    }
    let mut output = String::with_capacity(source.len());
    let mut rest = source.as_str();
    while let Some(start) = rest.find("{%") {
        let Some(length) = rest[start..].find("%}") else { break };
        let tag = &rest[start + 2..start + length];
        output.push_str(&rest[..start + 2]);
        match tag.trim_matches(['-', '+']).trim() {
            word @ ("generation" | "endgeneration") => {
                output.push_str(&tag.replace(word, if word == "generation" { "if true" } else { "endif" }));
            }
            _ => output.push_str(tag),
        }
        output.push_str("%}");
        rest = &rest[start + length + 2..];
    }
    output + rest
}

#[cfg(test)]
#[path = "chat_tests.rs"]
mod tests;
