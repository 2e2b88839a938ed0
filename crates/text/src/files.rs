//! The files of a model folder that speak of text, read within limits.

use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use crate::Error;

/// Longest `tokenizer.json` that is read: the largest vocabularies in use take half of it.
pub const MAX_TOKENIZER_BYTES: u64 = 64 << 20;
/// Longest `tokenizer_config.json` that is read.
pub const MAX_CONFIG_BYTES: u64 = 16 << 20;
/// Longest chat template that is read; the longest in use are a tenth of it.
pub const MAX_TEMPLATE_BYTES: u64 = 256 << 10;

pub(crate) const TOKENIZER: &str = "tokenizer.json";
pub(crate) const CONFIG: &str = "tokenizer_config.json";
pub(crate) const TEMPLATE: &str = "chat_template.jinja";

/// Reads a plain file (or a link to one, as the hub's cache has) of at most `limit` bytes.
pub(crate) fn read(file: &Path, limit: u64) -> Result<Vec<u8>, Error> {
    let failed = |source| Error::Read { file: file.to_owned(), source };
    // Looked at before it is opened: opening a pipe would wait for a writer.
    let metadata = fs::metadata(file).map_err(failed)?;
    if !metadata.is_file() {
        let got = if metadata.is_dir() { "a folder" } else { "a device, pipe or socket" };
        return Err(Error::NotAFile { file: file.to_owned(), got });
    }
    let too_large = |bytes| Err(Error::TooLarge { file: file.to_owned(), bytes, limit });
    if metadata.len() > limit {
        return too_large(metadata.len());
    }
    let mut bytes = Vec::new();
    File::open(file).and_then(|f| f.take(limit + 1).read_to_end(&mut bytes)).map_err(failed)?;
    if bytes.len() as u64 > limit {
        return too_large(bytes.len() as u64); // it grew
    }
    Ok(bytes)
}

/// As [`read`], but a file that is not there is `None`.
pub(crate) fn read_optional(file: &Path, limit: u64) -> Result<Option<Vec<u8>>, Error> {
    match read(file, limit) {
        Err(Error::Read { source, .. }) if source.kind() == ErrorKind::NotFound => Ok(None),
        other => other.map(Some),
    }
}

/// The same limit for bytes that were not read by us.
pub(crate) fn check_len(file: &Path, bytes: &[u8], limit: u64) -> Result<(), Error> {
    if bytes.len() as u64 > limit {
        return Err(Error::TooLarge { file: file.to_owned(), bytes: bytes.len() as u64, limit });
    }
    Ok(())
}

pub(crate) fn utf8<'a>(file: &Path, bytes: &'a [u8]) -> Result<&'a str, Error> {
    std::str::from_utf8(bytes).map_err(|e| Error::NotUtf8 { file: file.to_owned(), at: e.valid_up_to() })
}

/// What we use of `tokenizer_config.json`.
#[derive(Debug, Default)]
pub(crate) struct Config {
    pub(crate) bos_token: Option<String>,
    pub(crate) eos_token: Option<String>,
    pub(crate) pad_token: Option<String>,
    pub(crate) add_bos_token: Option<bool>,
    /// (name, source); a template without a name is called "default".
    pub(crate) chat_templates: Vec<(String, String)>,
}

impl Config {
    pub(crate) fn parse(file: &Path, bytes: &[u8]) -> Result<Self, Error> {
        let json = |e: serde_json::Error| Error::Json { file: file.to_owned(), reason: e.to_string() };
        let fields: serde_json::Map<String, Value> = serde_json::from_slice(bytes).map_err(json)?;
        let wrong = |field: String, got: &Value, expected: &str| Error::Field {
            file: file.to_owned(),
            field,
            got: shorten(&got.to_string()),
            expected: expected.to_owned(),
        };
        let get = |field: &str| fields.get(field).filter(|v| !v.is_null());

        let token = |field: &str| match get(field) {
            None => Ok(None),
            Some(Value::String(content)) => Ok(Some(content.clone())),
            Some(value) => match value.get("content") {
                Some(Value::String(content)) => Ok(Some(content.clone())),
                _ => Err(wrong(field.into(), value, "a string, an object with a string `content`, or null is right")),
            },
        };
        let add_bos_token = match get("add_bos_token") {
            None => None,
            Some(Value::Bool(add)) => Some(*add),
            Some(value) => return Err(wrong("add_bos_token".into(), value, "true, false or null is right")),
        };

        #[derive(Deserialize)]
        struct Named {
            name: String,
            template: String,
        }
        let chat_templates = match get("chat_template") {
            None => Vec::new(),
            Some(Value::String(source)) => vec![("default".to_owned(), source.clone())],
            Some(Value::Array(list)) => list
                .iter()
                .enumerate()
                .map(|(i, value)| {
                    let Named { name, template } = Named::deserialize(value).map_err(|_| {
                        wrong(
                            format!("chat_template[{i}]"),
                            value,
                            "an object with strings `name` and `template` is right",
                        )
                    })?;
                    Ok((name, template))
                })
                .collect::<Result<_, Error>>()?,
            Some(value) => {
                let expected = "a string or a list of {name, template} is right";
                return Err(wrong("chat_template".into(), value, expected));
            }
        };
        for (name, source) in &chat_templates {
            if source.len() as u64 > MAX_TEMPLATE_BYTES {
                return Err(Error::Field {
                    file: file.to_owned(),
                    field: format!("chat_template {name:?}"),
                    got: format!("{} bytes long", source.len()),
                    expected: format!("at most {MAX_TEMPLATE_BYTES} are accepted"),
                });
            }
        }
        Ok(Config {
            bos_token: token("bos_token")?,
            eos_token: token("eos_token")?,
            pad_token: token("pad_token")?,
            add_bos_token,
            chat_templates,
        })
    }
}

/// A value for an error message: its beginning, when it is long.
pub(crate) fn shorten(value: &str) -> String {
    const MAX_CHARS: usize = 80;
    match value.char_indices().nth(MAX_CHARS) {
        Some((at, _)) => format!("{}…", &value[..at]),
        None => value.to_owned(),
    }
}
