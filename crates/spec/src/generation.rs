//! `generation_config.json`: how a model's authors want its text to be sampled.

use std::ops::RangeInclusive;

use serde_json::Value;

use crate::SpecError;
use crate::fields::{Fields, show};
use crate::model::common::{limits, parse_object};

/// The fields of `generation_config.json` that we obey; absent ones stay absent, so that a caller's own defaults and
/// flags can be told from the file's. Unknown fields are ignored, as in transformers.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationConfig {
    /// Any of these ends a sequence.
    pub eos_token_ids: Vec<u32>,
    /// Starts a sequence.
    pub bos_token_id: Option<u32>,
    /// Fills a batch.
    pub pad_token_id: Option<u32>,
    /// Sample, rather than take the best token.
    pub do_sample: Option<bool>,
    /// Logits are divided by it; 0 is greedy.
    pub temperature: Option<f32>,
    /// Sample from the smallest set of tokens with this probability together.
    pub top_p: Option<f32>,
    /// Sample from so many best tokens; 0 is all.
    pub top_k: Option<usize>,
    /// Drop tokens below this share of the best one's probability.
    pub min_p: Option<f32>,
    /// Logits of tokens that occurred are divided (or, when negative, multiplied) by it.
    pub repetition_penalty: Option<f32>,
    /// Tokens of prompt and answer together.
    pub max_length: Option<usize>,
    /// Tokens of the answer.
    pub max_new_tokens: Option<usize>,
}

const TOKEN_IDS: RangeInclusive<usize> = 0..=(1 << 24) - 1;
const PROBABILITY: RangeInclusive<f64> = 0.0..=1.0;

impl GenerationConfig {
    /// Reads the text of a `generation_config.json`; `origin` is its path, for messages. Total, like
    /// [`crate::ModelSpec::from_config_json`].
    ///
    /// # Errors
    /// [`SpecError`]: not JSON, or a field of the wrong type or out of range.
    pub fn from_json(text: &str, origin: &str) -> Result<GenerationConfig, SpecError> {
        let map = parse_object(text, origin)?;
        let f = Fields::new(origin, "", &map);
        let number = |key: &str, range: RangeInclusive<f64>| Ok(f.opt_number(key, range)?.map(|x| x as f32));
        let flag = |key: &str| if f.get(key).is_some() { f.flag(key, false).map(Some) } else { Ok(None) };
        Ok(GenerationConfig {
            eos_token_ids: read_eos(&f)?,
            bos_token_id: read_token(&f, "bos_token_id")?,
            pad_token_id: read_token(&f, "pad_token_id")?,
            do_sample: flag("do_sample")?,
            temperature: number("temperature", 0.0..=1e3)?,
            top_p: number("top_p", PROBABILITY)?,
            top_k: f.opt_size("top_k", 0..=*limits::VOCAB.end())?,
            min_p: number("min_p", PROBABILITY)?,
            repetition_penalty: number("repetition_penalty", 1e-3..=1e3)?,
            max_length: f.opt_size("max_length", limits::CONTEXT)?,
            max_new_tokens: f.opt_size("max_new_tokens", limits::CONTEXT)?,
        })
    }

    /// The token ids alone from the text of a `config.json`, for a model without `generation_config.json`. Old
    /// versions of transformers wrote their own defaults for sampling there (`max_length` 20), which nobody meant.
    ///
    /// # Errors
    /// [`SpecError`]: not JSON, or an id of the wrong type or out of range.
    pub fn from_config_json(text: &str, origin: &str) -> Result<GenerationConfig, SpecError> {
        let map = parse_object(text, origin)?;
        let f = Fields::new(origin, "", &map);
        Ok(GenerationConfig {
            eos_token_ids: read_eos(&f)?,
            bos_token_id: read_token(&f, "bos_token_id")?,
            pad_token_id: read_token(&f, "pad_token_id")?,
            ..GenerationConfig::default()
        })
    }
}

/// A token id; -1 is "nobody" in some old files.
fn read_token(f: &Fields, key: &str) -> Result<Option<u32>, SpecError> {
    match f.get(key).and_then(Value::as_i64) {
        Some(-1) => Ok(None),
        _ => Ok(f.opt_size(key, TOKEN_IDS)?.map(|id| id as u32)),
    }
}

/// One id or a list of them.
fn read_eos(f: &Fields) -> Result<Vec<u32>, SpecError> {
    const KEY: &str = "eos_token_id";
    let Some(value) = f.get(KEY) else { return Ok(Vec::new()) };
    let id = |v: &Value| {
        v.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|n| TOKEN_IDS.contains(n)).map(|n| n as u32)
    };
    let ids = match value {
        Value::Array(list) => list.iter().map(id).collect::<Option<Vec<u32>>>(),
        one if one.as_i64() == Some(-1) => Some(Vec::new()),
        one => id(one).map(|id| vec![id]),
    };
    ids.ok_or_else(|| f.invalid(KEY, show(value), "a token id or a list of token ids"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<GenerationConfig, String> {
        GenerationConfig::from_json(text, "generation_config.json").map_err(|e| e.to_string())
    }

    #[test]
    fn reads_what_qwen3_ships() {
        let config = read(
            r#"{"bos_token_id": 151643, "do_sample": true, "eos_token_id": [151645, 151643], "pad_token_id": 151643,
                "temperature": 0.6, "top_k": 20, "top_p": 0.95, "transformers_version": "4.51.0"}"#,
        )
        .unwrap();
        assert_eq!(config.eos_token_ids, [151645, 151643]);
        assert_eq!((config.top_k, config.do_sample, config.max_length), (Some(20), Some(true), None));
        assert_eq!((config.temperature, config.top_p, config.min_p), (Some(0.6), Some(0.95), None));
    }

    #[test]
    fn a_single_end_is_a_list_of_one_and_absence_is_kept() {
        assert_eq!(read(r#"{"eos_token_id": 2}"#).unwrap().eos_token_ids, [2]);
        assert_eq!(read("{}").unwrap(), GenerationConfig::default());
    }

    #[test]
    fn a_model_config_gives_ids_and_no_sampling() {
        let text =
            r#"{"model_type": "olmoe", "eos_token_id": 50279, "pad_token_id": -1, "max_length": 20, "top_k": 50}"#;
        let config = GenerationConfig::from_config_json(text, "config.json").unwrap();
        assert_eq!(config, GenerationConfig { eos_token_ids: vec![50279], ..GenerationConfig::default() });
    }

    #[test]
    fn refusals_name_file_field_value_and_what_is_right() {
        assert_eq!(
            read(r#"{"temperature": -1}"#).unwrap_err(),
            "generation_config.json: field `temperature` is -1, but must be a number from 0.0 to 1000.0"
        );
        assert_eq!(
            read(r#"{"eos_token_id": [2, "end"]}"#).unwrap_err(),
            "generation_config.json: field `eos_token_id` is [2,\"end\"], but must be a token id or a list of token ids"
        );
        assert_eq!(
            read("[]").unwrap_err(),
            "generation_config.json: the top of the file is [], but must be a JSON object {…}"
        );
    }
}
