//! Text to token ids and back, as `tokenizer.json` says.

use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::Value;

use crate::Error;
use crate::chat::ChatTemplate;
use crate::files::{self, Config, shorten};

/// Longest run of white space in a text to encode. The patterns that split words keep one entry of
/// a stack of a million for each character of such a run; beyond that they would silently stop
/// splitting and give other ids.
pub const MAX_WHITESPACE_RUN: usize = 100_000;

/// The contents of a model folder's text files, for a model that is not in a folder.
#[derive(Debug, Clone, Copy, Default)]
pub struct TokenizerFiles<'a> {
    /// `tokenizer.json`.
    pub tokenizer_json: &'a [u8],
    /// `tokenizer_config.json`, if there is one.
    pub tokenizer_config_json: Option<&'a [u8]>,
    /// `chat_template.jinja`, if there is one.
    pub chat_template_jinja: Option<&'a [u8]>,
}

/// A model's tokenizer with its special tokens and chat templates. Cheap to clone.
///
/// Ids are below [`Tokenizer::vocab_size`]; hold that against the model with
/// [`Tokenizer::check_vocab`] before the first id is used.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    hf: tokenizers::Tokenizer,
    special_ids: HashSet<u32>,
    /// The greatest id that encoding can give, and its token.
    last: (u32, String),
    bos: Bos,
    config: Config,
    /// Where the template called "default" came from.
    template_origin: &'static str,
}

/// What `add_bos_token` changes about what the post-processor does by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Bos {
    AsProcessed,
    Prepend(u32),
    Remove(u32),
}

impl Tokenizer {
    /// Reads `tokenizer.json` and, where they exist, `tokenizer_config.json` and
    /// `chat_template.jinja` (which takes precedence, as in transformers) of a model folder.
    ///
    /// # Errors
    /// Names the file, the field and what is right: see [`Error`]. Nothing beyond the files'
    /// limits is read or allocated.
    pub fn from_folder(folder: impl AsRef<Path>) -> Result<Self, Error> {
        let paths = Paths::new(folder.as_ref());
        let tokenizer = files::read(&paths.tokenizer, files::MAX_TOKENIZER_BYTES)?;
        let config = files::read_optional(&paths.config, files::MAX_CONFIG_BYTES)?;
        let template = files::read_optional(&paths.template, files::MAX_TEMPLATE_BYTES)?;
        let files = TokenizerFiles {
            tokenizer_json: &tokenizer,
            tokenizer_config_json: config.as_deref(),
            chat_template_jinja: template.as_deref(),
        };
        Self::parse(&paths, files)
    }

    /// As [`Tokenizer::from_folder`], from memory. Any bytes are allowed.
    ///
    /// # Errors
    /// As [`Tokenizer::from_folder`].
    pub fn from_bytes(files: TokenizerFiles<'_>) -> Result<Self, Error> {
        Self::parse(&Paths::new(Path::new("")), files)
    }

    fn parse(paths: &Paths, files: TokenizerFiles<'_>) -> Result<Self, Error> {
        files::check_len(&paths.tokenizer, files.tokenizer_json, files::MAX_TOKENIZER_BYTES)?;
        let mut config = Config::default();
        if let Some(bytes) = files.tokenizer_config_json {
            files::check_len(&paths.config, bytes, files::MAX_CONFIG_BYTES)?;
            config = Config::parse(&paths.config, bytes)?;
        }
        let mut template_origin = files::CONFIG;
        if let Some(bytes) = files.chat_template_jinja {
            files::check_len(&paths.template, bytes, files::MAX_TEMPLATE_BYTES)?;
            let source = files::utf8(&paths.template, bytes)?.to_owned();
            config.chat_templates.retain(|(name, _)| name != "default");
            config.chat_templates.push(("default".to_owned(), source));
            template_origin = files::TEMPLATE;
        }

        let (hf, last) = build(&paths.tokenizer, files.tokenizer_json)?;
        let added = hf.get_added_vocabulary();
        let special_ids = added
            .get_added_tokens_decoder()
            .keys()
            .copied()
            .filter(|&id| added.simple_id_to_token(id).is_some_and(|token| added.is_special_token(&token)))
            .collect();
        let bos = bos_rule(&paths.config, &hf, &config)?;
        Ok(Tokenizer { inner: Arc::new(Inner { hf, special_ids, last, bos, config, template_origin }) })
    }

    /// One more than the greatest id that [`Tokenizer::encode`] can give; holes count.
    pub fn vocab_size(&self) -> usize {
        self.inner.last.0 as usize + 1
    }

    /// Checks that every id fits a model with `model_vocab_size` rows of embedding. Models often
    /// have more rows than tokens; never fewer.
    ///
    /// # Errors
    /// [`Error::VocabMismatch`].
    pub fn check_vocab(&self, model_vocab_size: usize) -> Result<(), Error> {
        if self.vocab_size() > model_vocab_size {
            let (id, token) = self.inner.last.clone();
            return Err(Error::VocabMismatch { token, id, model_vocab_size });
        }
        Ok(())
    }

    /// The ids of a text. With `add_special_tokens` the model's own frame is put around it (usually
    /// a beginning-of-sequence token); say false for a text that a chat template wrote, which
    /// has it already.
    ///
    /// # Errors
    /// [`Error::Encode`] for a run of white space beyond [`MAX_WHITESPACE_RUN`] characters, and
    /// when the tokenizer's own rules fail on the text.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, Error> {
        let failed = |reason| Error::Encode { bytes: text.len(), reason };
        let mut run = 0;
        for c in text.chars() {
            run = if c.is_whitespace() { run + 1 } else { 0 };
            if run > MAX_WHITESPACE_RUN {
                let reason = format!("it has a run of more than {MAX_WHITESPACE_RUN} white-space characters");
                return Err(failed(reason));
            }
        }
        let mut ids = encode(&self.inner.hf, text, add_special_tokens).map_err(failed)?;
        match self.inner.bos {
            Bos::Prepend(bos) if add_special_tokens => ids.insert(0, bos),
            Bos::Remove(bos) if add_special_tokens && ids.first() == Some(&bos) => {
                ids.remove(0);
            }
            _ => {}
        }
        Ok(ids)
    }

    /// The text of some ids; bytes that form no character become U+FFFD. Ids without a token (a
    /// model may have more rows than tokens) give no text; `skip_special` leaves special tokens out.
    ///
    /// # Errors
    /// [`Error::Decode`] when the tokenizer's own rules fail on the ids.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, Error> {
        guard(|| self.inner.hf.decode(ids, skip_special)).map_err(|reason| Error::Decode { num_ids: ids.len(), reason })
    }

    /// The id of a token, spelled as in the vocabulary.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.hf.token_to_id(token)
    }

    /// The token of an id, spelled as in the vocabulary (`Ġthe`, not ` the`).
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.inner.hf.id_to_token(id)
    }

    /// Whether an id has a token.
    pub(crate) fn has_id(&self, id: u32) -> bool {
        self.inner.hf.id_to_token(id).is_some()
    }

    /// Whether an id is a special token (control, not text).
    pub fn is_special(&self, id: u32) -> bool {
        self.inner.special_ids.contains(&id)
    }

    /// The beginning-of-sequence token, if `tokenizer_config.json` names one.
    pub fn bos_token(&self) -> Option<&str> {
        self.inner.config.bos_token.as_deref()
    }

    /// The end-of-sequence token, if `tokenizer_config.json` names one.
    pub fn eos_token(&self) -> Option<&str> {
        self.inner.config.eos_token.as_deref()
    }

    /// The padding token, if `tokenizer_config.json` names one.
    pub fn pad_token(&self) -> Option<&str> {
        self.inner.config.pad_token.as_deref()
    }

    /// Id of [`Tokenizer::bos_token`].
    pub fn bos_id(&self) -> Option<u32> {
        self.token_to_id(self.bos_token()?)
    }

    /// Id of [`Tokenizer::eos_token`]. Generation may stop at further ids: see the model's
    /// `generation_config.json`.
    pub fn eos_id(&self) -> Option<u32> {
        self.token_to_id(self.eos_token()?)
    }

    /// Whether the model brings any chat template.
    pub fn has_chat_template(&self) -> bool {
        !self.inner.config.chat_templates.is_empty()
    }

    /// The chat template, parsed; of several named ones "tool_use" `with_tools`, "default"
    /// otherwise, as transformers chooses.
    ///
    /// # Errors
    /// [`Error::NoChatTemplate`], [`Error::NoDefaultTemplate`], [`Error::TemplateSyntax`].
    pub fn chat_template(&self, with_tools: bool) -> Result<ChatTemplate, Error> {
        let templates = &self.inner.config.chat_templates;
        if templates.is_empty() {
            return Err(Error::NoChatTemplate);
        }
        let named = |name: &str| templates.iter().find(|(n, _)| n == name);
        let (name, source) =
            Some("tool_use").filter(|_| with_tools).and_then(named).or_else(|| named("default")).ok_or_else(|| {
                Error::NoDefaultTemplate { names: templates.iter().map(|(n, _)| n.clone()).collect() }
            })?;
        let origin = match name.as_str() {
            "default" => self.inner.template_origin.to_owned(),
            name => format!("{}, {name:?}", files::CONFIG),
        };
        let token = |t: Option<&str>| t.map(str::to_owned);
        ChatTemplate::new(source.clone(), origin, token(self.bos_token()), token(self.eos_token()))
    }
}

struct Paths {
    tokenizer: PathBuf,
    config: PathBuf,
    template: PathBuf,
}

impl Paths {
    fn new(folder: &Path) -> Self {
        Paths {
            tokenizer: folder.join(files::TOKENIZER),
            config: folder.join(files::CONFIG),
            template: folder.join(files::TEMPLATE),
        }
    }
}

/// Runs the tokenizers crate on data that we do not trust.
///
/// It panics on some damaged descriptions (a `Precompiled` normalizer that does not decode, a
/// merge that is shorter than the subword prefix, a `FixedLength` split of 0), and some of them show
/// only on the first text. A bad file must be an error here, so its panics become errors; nothing
/// of ours runs inside, and what it was building is dropped or read-only, so no broken state is
/// seen afterwards. A fuzz target has to replace the panic hook if that one aborts.
fn guard<T>(f: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(f)) {
        Ok(result) => result.map_err(|e| shorten_reason(&e.to_string())),
        Err(panic) => {
            let words = panic.downcast_ref::<String>().map(String::as_str);
            let words = words.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no reason given");
            Err(shorten_reason(words))
        }
    }
}

/// The crate's errors quote the data; a sentence needs its beginning only.
fn shorten_reason(reason: &str) -> String {
    const MAX_CHARS: usize = 300;
    reason.chars().take(MAX_CHARS).collect()
}

fn encode(hf: &tokenizers::Tokenizer, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, String> {
    guard(|| Ok(hf.encode_fast(text, add_special_tokens)?.get_ids().to_vec()))
}

/// What we must know of `tokenizer.json` before the tokenizers crate sees it.
#[derive(Deserialize)]
struct Header {
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
    model: Model,
}

#[derive(Deserialize)]
struct AddedToken {
    id: u32,
    content: String,
}

#[derive(Deserialize)]
struct Model {
    #[serde(default)]
    continuing_subword_prefix: Option<String>,
    #[serde(default)]
    dropout: Option<f64>,
    /// Left unread here: it is most of the file and rarely needed.
    #[serde(default)]
    #[allow(dead_code)]
    merges: Option<IgnoredAny>,
}

/// Parses `tokenizer.json`; returns the tokenizer with its greatest id and that id's token.
fn build(file: &Path, bytes: &[u8]) -> Result<(tokenizers::Tokenizer, (u32, String)), Error> {
    let json = |e: serde_json::Error| Error::Json { file: file.to_owned(), reason: e.to_string() };
    let header: Header = serde_json::from_slice(bytes).map_err(json)?;
    let wrong = |field: &str, got: String, expected: &str| Error::Field {
        file: file.to_owned(),
        field: field.to_owned(),
        got,
        expected: expected.to_owned(),
    };
    if let Some(dropout) = header.model.dropout.filter(|&d| d != 0.0) {
        let expected = "null is right: the same text must always give the same ids";
        return Err(wrong("model.dropout", dropout.to_string(), expected));
    }
    if let Some(prefix) = header.model.continuing_subword_prefix.filter(|p| !p.is_empty()) {
        check_merges(bytes, &prefix).map_err(|(field, got)| {
            wrong(&field, got, &format!("a token that begins with continuing_subword_prefix {prefix:?} is right"))
        })?;
    }

    let broken = |reason| Error::Tokenizer { file: file.to_owned(), reason };
    let mut hf = guard(|| tokenizers::Tokenizer::from_bytes(bytes)).map_err(broken)?;
    // Both are left over from training. We want every id and no other; besides, a padded length is
    // whatever the file says.
    hf.with_padding(None);
    guard(|| hf.with_truncation(None).map(|_| ())).map_err(broken)?;

    // The crate numbers added tokens itself. Where the file's ids have holes it gives others, and the
    // model would read the wrong rows.
    for token in header.added_tokens.iter().filter(|t| !t.content.is_empty()) {
        let id = hf.token_to_id(&token.content);
        if id != Some(token.id) {
            let expected = match id {
                Some(id) => format!("{id} is right: added ids follow the vocabulary without holes"),
                None => "a token of the vocabulary is right".to_owned(),
            };
            let field = format!("added_tokens: the id of {:?}", shorten(&token.content));
            return Err(wrong(&field, token.id.to_string(), &expected));
        }
    }

    let mut last = hf.get_vocab(true).into_iter().map(|(token, id)| (id, token)).max();
    // A post-processor names ids of its own, which need not be in the vocabulary.
    for id in encode(&hf, "", true).map_err(broken)? {
        if last.as_ref().is_none_or(|(most, _)| id > *most) {
            last = Some((id, format!("post_processor's id {id}")));
        }
    }
    let last = last.ok_or_else(|| wrong("model.vocab", "empty".into(), "at least one token is needed"))?;
    Ok((hf, last))
}

/// Every right half of a merge must begin with the prefix: the tokenizers crate cuts that many bytes
/// off unseen, through the middle of a character if need be, and takes the rest for UTF-8.
fn check_merges(bytes: &[u8], prefix: &str) -> Result<(), (String, String)> {
    #[derive(Deserialize)]
    struct WithMerges {
        model: Merges,
    }
    #[derive(Deserialize)]
    struct Merges {
        #[serde(default)]
        merges: Vec<Value>,
    }
    let file: WithMerges =
        serde_json::from_slice(bytes).map_err(|e| ("model.merges".to_owned(), shorten(&e.to_string())))?;
    for (i, merge) in file.model.merges.iter().enumerate() {
        let right = match merge {
            Value::String(pair) => pair.split_once(' ').map(|(_, right)| right),
            pair => pair.get(1).and_then(Value::as_str),
        };
        // Malformed pairs are left to the crate, which refuses them in words.
        if right.is_some_and(|right| !right.starts_with(prefix)) {
            return Err((format!("model.merges[{i}]"), shorten(&merge.to_string())));
        }
    }
    Ok(())
}

/// `add_bos_token` against what the post-processor does: transformers lets the field win.
fn bos_rule(file: &Path, hf: &tokenizers::Tokenizer, config: &Config) -> Result<Bos, Error> {
    let Some(add) = config.add_bos_token else { return Ok(Bos::AsProcessed) };
    let bos = config.bos_token.as_deref().and_then(|token| hf.token_to_id(token));
    let frame = encode(hf, "", true).unwrap_or_default(); // `build` has done the same successfully
    match bos {
        Some(bos) if add && frame.first() != Some(&bos) => Ok(Bos::Prepend(bos)),
        Some(bos) if !add && frame.first() == Some(&bos) => Ok(Bos::Remove(bos)),
        None if add => Err(Error::Field {
            file: file.to_owned(),
            field: "bos_token".into(),
            got: config.bos_token.as_deref().map_or("missing".into(), |t| format!("{:?}", shorten(t))),
            expected: "add_bos_token is true, so a token of the vocabulary is right".into(),
        }),
        _ => Ok(Bos::AsProcessed),
    }
}

#[cfg(test)]
#[path = "tokenizer_tests.rs"]
mod tests;
