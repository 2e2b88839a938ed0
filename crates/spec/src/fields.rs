//! Strict access to the fields of a description, JSON or YAML: every refusal names file, field, value and what would be
//! right.

use std::borrow::Cow;
use std::fmt::Display;
use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use crate::SpecError;
use crate::nearest::nearest;

/// One object of a description, with the words that its errors need.
pub struct Fields<'a> {
    /// Path of the file, for messages.
    pub origin: &'a str,
    /// Dotted path of this object inside the file, with a trailing dot; empty at the top.
    prefix: Cow<'a, str>,
    map: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    /// The fields of `map`, which stands at `prefix` (with a trailing dot; empty at the top) in the file `origin`.
    pub fn new(origin: &'a str, prefix: impl Into<Cow<'a, str>>, map: &'a Map<String, Value>) -> Self {
        Fields { origin, prefix: prefix.into(), map }
    }

    /// The fields of `map`, which stand in for these: a message names the same file and place.
    pub(crate) fn with_map<'b>(&'b self, map: &'b Map<String, Value>) -> Fields<'b> {
        Fields { origin: self.origin, prefix: Cow::Borrowed(&self.prefix), map }
    }

    /// All fields as they were read.
    pub(crate) fn map(&self) -> &'a Map<String, Value> {
        self.map
    }

    /// Refuses a key that is not among `known`.
    pub fn only_keys(&self, known: &[&str]) -> Result<(), SpecError> {
        match self.keys().find(|key| !known.contains(key)) {
            None => Ok(()),
            Some(unknown) => Err(SpecError::UnknownKey {
                origin: self.origin.to_owned(),
                field: self.dotted(&shorten(unknown)),
                nearest: nearest(unknown, known.iter().copied()).to_owned(),
            }),
        }
    }

    /// The fields below `key`; null is absent.
    pub fn section(&self, key: &str) -> Result<Option<Fields<'a>>, SpecError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Fields::new(self.origin, format!("{}.", self.dotted(key)), map))),
            Some(other) => Err(self.invalid(key, show(other), "keys of its own, indented below it")),
        }
    }

    /// The values of the list at `key`, or nothing where the field is absent.
    pub fn list(&self, key: &str) -> Result<Option<&'a [Value]>, SpecError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array(values)) => Ok(Some(values)),
            Some(other) => Err(self.invalid(key, show(other), "a list […]")),
        }
    }

    /// Counts within `range`, or nothing where the field is absent.
    pub fn sizes(&self, key: &str, range: RangeInclusive<usize>) -> Result<Option<Vec<usize>>, SpecError> {
        let Some(values) = self.list(key)? else { return Ok(None) };
        let one = |(idx, value): (usize, &Value)| {
            as_size(value, &range)
                .ok_or_else(|| self.invalid(&format!("{key}[{idx}]"), show(value), whole_number(&range)))
        };
        values.iter().enumerate().map(one).collect::<Result<_, _>>().map(Some)
    }

    /// What the string at `key` stands for, or nothing where the field is absent.
    pub fn choice<T: Copy>(&self, key: &str, choices: &[(&str, T)]) -> Result<Option<T>, SpecError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let chosen = value.as_str().and_then(|text| choices.iter().find(|(name, _)| *name == text));
        match chosen {
            Some((_, chosen)) => Ok(Some(*chosen)),
            None => {
                let names: Vec<&str> = choices.iter().map(|(name, _)| *name).collect();
                Err(self.invalid(key, show(value), names.join(" or ")))
            }
        }
    }

    /// A string that is there.
    pub fn required_text(&self, key: &str) -> Result<&'a str, SpecError> {
        self.text(key)?.ok_or_else(|| self.missing(key, "a string"))
    }

    /// A number within `range` that is there.
    pub fn required_number(&self, key: &str, range: RangeInclusive<f64>) -> Result<f64, SpecError> {
        self.opt_number(key, range.clone())?.ok_or_else(|| self.missing(key, number_within(&range)))
    }

    /// The value of `key`; null is absent, as transformers treats most fields.
    pub fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|v| !v.is_null())
    }

    /// Whether `key` is written as null, for the few fields where that differs from not being written.
    pub fn is_null(&self, key: &str) -> bool {
        self.map.get(key).is_some_and(Value::is_null)
    }

    /// All keys, in the file's order or sorted.
    pub fn keys(&self) -> impl Iterator<Item = &'a str> {
        self.map.keys().map(String::as_str)
    }

    /// The nested object at `key`; null and an empty object are absent.
    pub fn object(&self, key: &str) -> Result<Option<&'a Map<String, Value>>, SpecError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok((!map.is_empty()).then_some(map)),
            Some(other) => Err(self.invalid(key, show(other), "a JSON object or null")),
        }
    }

    /// A count within `range`, or `default` where the field is absent.
    pub fn size(&self, key: &str, default: Option<usize>, range: RangeInclusive<usize>) -> Result<usize, SpecError> {
        match (self.opt_size(key, range.clone())?, default) {
            (Some(size), _) | (None, Some(size)) => Ok(size),
            (None, None) => Err(self.missing(key, whole_number(&range))),
        }
    }

    /// A count within `range`, or nothing where the field is absent.
    pub fn opt_size(&self, key: &str, range: RangeInclusive<usize>) -> Result<Option<usize>, SpecError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match as_size(value, &range) {
            Some(size) => Ok(Some(size)),
            None => Err(self.invalid(key, show(value), whole_number(&range))),
        }
    }

    /// A number within `range`, or `default` where the field is absent.
    pub fn number(&self, key: &str, default: f64, range: RangeInclusive<f64>) -> Result<f64, SpecError> {
        Ok(self.opt_number(key, range)?.unwrap_or(default))
    }

    /// A number within `range`, or nothing where the field is absent.
    pub fn opt_number(&self, key: &str, range: RangeInclusive<f64>) -> Result<Option<f64>, SpecError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_f64().filter(|x| range.contains(x)) {
            Some(x) => Ok(Some(x)),
            None => Err(self.invalid(key, show(value), number_within(&range))),
        }
    }

    /// true or false, or `default` where the field is absent.
    pub fn flag(&self, key: &str, default: bool) -> Result<bool, SpecError> {
        match self.get(key) {
            None => Ok(default),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(other) => Err(self.invalid(key, show(other), "true or false")),
        }
    }

    /// A string, or nothing where the field is absent.
    pub fn text(&self, key: &str) -> Result<Option<&'a str>, SpecError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(self.invalid(key, show(other), "a string")),
        }
    }

    /// Refuses a field that is present and not one of `supported`.
    pub fn only(&self, key: &str, supported: &[&str]) -> Result<(), SpecError> {
        match self.text(key)? {
            Some(text) if !supported.contains(&text) => Err(self.unsupported(key, supported.join(" or "))),
            _ => Ok(()),
        }
    }

    /// The error for a field without default.
    pub fn missing(&self, key: &str, expected: impl Display) -> SpecError {
        SpecError::Missing { origin: self.origin.to_owned(), field: self.dotted(key), expected: expected.to_string() }
    }

    /// The error for a value that is wrong.
    pub fn invalid(&self, key: &str, got: impl Display, expected: impl Display) -> SpecError {
        SpecError::Invalid {
            origin: self.origin.to_owned(),
            field: self.dotted(key),
            got: got.to_string(),
            expected: expected.to_string(),
        }
    }

    /// The error for a value that others support.
    pub fn unsupported(&self, key: &str, supported: impl Display) -> SpecError {
        SpecError::Unsupported {
            origin: self.origin.to_owned(),
            field: self.dotted(key),
            got: self.map.get(key).map_or_else(|| "absent".to_owned(), show),
            supported: supported.to_string(),
        }
    }

    /// The dotted path of a key of this object.
    pub fn dotted(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }
}

/// A value as it stands in the file, shortened so that an error stays one line.
pub fn show(value: &Value) -> String {
    shorten(&value.to_string())
}

/// The first 60 characters.
pub fn shorten(text: &str) -> String {
    match text.char_indices().nth(60) {
        None => text.to_owned(),
        Some((end, _)) => format!("{}…", &text[..end]),
    }
}

fn as_size(value: &Value, range: &RangeInclusive<usize>) -> Option<usize> {
    value.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|n| range.contains(n))
}

fn whole_number(range: &RangeInclusive<usize>) -> String {
    if range.start() == range.end() {
        return format!("{}", range.start());
    }
    format!("a whole number from {} to {}", range.start(), range.end())
}

fn number_within(range: &RangeInclusive<f64>) -> String {
    if (*range.start(), *range.end()) == (f64::MIN, f64::MAX) {
        return "a number".to_owned();
    }
    format!("a number from {:?} to {:?}", range.start(), range.end())
}
