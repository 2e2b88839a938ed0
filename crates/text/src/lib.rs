//! Text to token ids and back: tokenizers, incremental detokenisation, stop strings and chat
//! templates, for the command line and the server.
//!
//! It reads the text files of a model folder (`tokenizer.json`, `tokenizer_config.json`,
//! `chat_template.jinja`) and treats them as strangers' data: limits before reading, one error enum
//! ([`Error`]) that names file, field, value and what is right, no panic for any bytes, chat
//! templates in a box. It must never know a tensor, a device or a scheduler.
//!
//! A chat turn, from messages to ids to streamed text:
//!
//! ```
//! use moesaic_text::{ChatMessage, ChatRequest, Detokenizer, StopStrings, Tokenizer, TokenizerFiles};
//!
//! // A model folder would be read with `Tokenizer::from_folder`.
//! let tokenizer = Tokenizer::from_bytes(TokenizerFiles {
//!     tokenizer_json: br#"{
//!         "added_tokens": [{"id": 3, "content": "<eos>", "special": true, "single_word": false,
//!                           "lstrip": false, "rstrip": false, "normalized": false}],
//!         "pre_tokenizer": {"type": "Whitespace"},
//!         "model": {"type": "WordLevel", "vocab": {"hi": 0, "there": 1, "?": 2}, "unk_token": "?"}}"#,
//!     tokenizer_config_json: Some(br#"{
//!         "eos_token": "<eos>",
//!         "chat_template": "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"}"#),
//!     chat_template_jinja: None,
//! })?;
//! tokenizer.check_vocab(4)?; // the rows of the model's embedding
//!
//! let messages = [ChatMessage::new("user", "hi there")];
//! let prompt = tokenizer.chat_template(false)?.render(ChatRequest::new(&messages))?;
//! assert_eq!(prompt, "hi there<eos>");
//! let ids = tokenizer.encode(&prompt, false)?;
//! assert_eq!(ids, [0, 1, 3]);
//!
//! let mut detokenizer = Detokenizer::new(tokenizer, true);
//! let mut stop = StopStrings::new(vec!["re".into()], false)?;
//! let mut answer = String::new();
//! for id in ids {
//!     answer += &stop.push(&detokenizer.step(id)?).text;
//!     if stop.matched().is_some() {
//!         break;
//!     }
//! }
//! assert_eq!(answer, "hi the");
//! # Ok::<(), moesaic_text::Error>(())
//! ```

mod chat;
mod detokenize;
mod error;
mod files;
mod python;
mod stop;
mod tokenizer;

#[cfg(test)]
mod fixtures;

pub use chat::{ChatMessage, ChatRequest, ChatTemplate, Content, MAX_OUTPUT_BYTES, MAX_STEPS};
pub use detokenize::Detokenizer;
pub use error::Error;
pub use files::{MAX_CONFIG_BYTES, MAX_TEMPLATE_BYTES, MAX_TOKENIZER_BYTES};
pub use stop::{MAX_STOP_BYTES, MAX_STOP_STRINGS, StopOutput, StopStrings};
pub use tokenizer::{MAX_WHITESPACE_RUN, Tokenizer, TokenizerFiles};
