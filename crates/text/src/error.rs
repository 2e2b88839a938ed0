//! What can be wrong with a tokenizer, a chat template or a stop string.

use std::io;
use std::path::PathBuf;

/// Every failure of this crate. Each message names the file, the field, the value and what is right.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The file system refused.
    #[error("{}: cannot be read: {source}", file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// What the file system said.
        source: io::Error,
    },

    /// A folder, a device or a pipe where a plain file belongs.
    #[error("{}: is {got}; a plain file belongs here", file.display())]
    NotAFile {
        /// The path.
        file: PathBuf,
        /// What it is instead.
        got: &'static str,
    },

    /// Longer than any honest file of its kind; it was not read.
    #[error("{}: is {bytes} bytes long; at most {limit} are read", file.display())]
    TooLarge {
        /// The file.
        file: PathBuf,
        /// Its length in bytes (at least, where the length is found while reading).
        bytes: u64,
        /// The limit in bytes.
        limit: u64,
    },

    /// Not JSON, or JSON of another shape.
    #[error("{}: {reason}", file.display())]
    Json {
        /// The file.
        file: PathBuf,
        /// What is wrong, with line and column.
        reason: String,
    },

    /// Not text.
    #[error("{}: is not UTF-8: byte {at} begins no character", file.display())]
    NotUtf8 {
        /// The file.
        file: PathBuf,
        /// Offset of the first bad byte.
        at: usize,
    },

    /// A field has a value that cannot be used.
    #[error("{}: {field} is {got}; {expected}", file.display())]
    Field {
        /// The file.
        file: PathBuf,
        /// The field, with its path inside the file.
        field: String,
        /// The value found, shortened.
        got: String,
        /// What is right.
        expected: String,
    },

    /// `tokenizer.json` is well formed but describes no tokenizer that we can build.
    #[error("{}: describes no usable tokenizer: {reason}", file.display())]
    Tokenizer {
        /// The file.
        file: PathBuf,
        /// The first thing that is wrong.
        reason: String,
    },

    /// The tokenizer can produce ids for which the model has no embedding.
    #[error(
        "the tokenizer does not match the model: token {token:?} has id {id}, but the model's vocab_size is {model_vocab_size} (ids below it)"
    )]
    VocabMismatch {
        /// The token with the greatest id.
        token: String,
        /// That id.
        id: u32,
        /// Rows of the model's embedding.
        model_vocab_size: usize,
    },

    /// The tokenizer failed on this text.
    #[error("text of {bytes} bytes cannot be encoded: {reason}")]
    Encode {
        /// Length of the text in bytes.
        bytes: usize,
        /// What failed.
        reason: String,
    },

    /// The tokenizer failed on these ids.
    #[error("{num_ids} token ids cannot be decoded: {reason}")]
    Decode {
        /// How many ids were given.
        num_ids: usize,
        /// What failed.
        reason: String,
    },

    /// Chat was asked of a model that brings no chat template.
    #[error(
        "the model has no chat template: neither chat_template.jinja nor chat_template in tokenizer_config.json; give a plain prompt instead"
    )]
    NoChatTemplate,

    /// Several named templates, none of which is the one to use.
    #[error("tokenizer_config.json: chat_template has the names {names:?}; one must be called \"default\"")]
    NoDefaultTemplate {
        /// The names that there are.
        names: Vec<String>,
    },

    /// The template is not valid Jinja.
    #[error("the chat template ({origin}) cannot be parsed: {reason}")]
    TemplateSyntax {
        /// Which file and name it came from.
        origin: String,
        /// What is wrong, with the line.
        reason: String,
    },

    /// The template called `raise_exception`: it refuses these messages.
    #[error("the chat template ({origin}) refuses these messages: {message}")]
    TemplateRaised {
        /// Which file and name it came from.
        origin: String,
        /// The template's own words.
        message: String,
    },

    /// The template failed while it ran.
    #[error("the chat template ({origin}) failed: {reason}")]
    TemplateFailed {
        /// Which file and name it came from.
        origin: String,
        /// What failed, with the line.
        reason: String,
    },

    /// The template ran longer than any honest template does.
    #[error("the chat template ({origin}) was stopped after {limit} steps; does it loop for ever?")]
    TemplateEndless {
        /// Which file and name it came from.
        origin: String,
        /// Steps allowed.
        limit: u64,
    },

    /// The template wrote more than is accepted.
    #[error("the chat template ({origin}) wrote more than {limit} bytes, the most that is accepted")]
    TemplateOutput {
        /// Which file and name it came from.
        origin: String,
        /// Bytes allowed.
        limit: usize,
    },

    /// A message has parts that are not text.
    #[error("content part {index} has the type {got:?}; this model reads \"text\" parts only")]
    NotText {
        /// Position of the part, from 0.
        index: usize,
        /// Its type.
        got: String,
    },

    /// A stop string that would match everywhere, or too many or too long ones.
    #[error("stop strings: {got}; {expected}")]
    StopStrings {
        /// What was given.
        got: String,
        /// What is right.
        expected: String,
    },
}
