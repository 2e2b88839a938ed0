//! Workloads as YAML files.

use std::fmt::Write;
use std::ops::RangeInclusive;

use serde_json::Value;

use super::{Arrival, TokenRange, Workload};
use crate::SpecError;
use crate::fields::{Fields, show};
use crate::yaml::{parse_mapping, scalar};

const REQUESTS: RangeInclusive<usize> = 1..=1 << 20;
const TOKENS: RangeInclusive<usize> = 1..=1 << 22;
/// Requests/s.
const RATE: RangeInclusive<f64> = 1e-6..=1e6;
/// Prompt tokens of all requests together: a gigabyte of token ids.
const TOKENS_IN_ALL: usize = 1 << 28;

impl Workload {
    /// Reads a workload file. `origin` is its path, for messages. Total: any text gives a checked workload or an error.
    ///
    /// # Errors
    /// [`SpecError`]: not YAML, a key unknown or missing, or a value out of range or at odds with another.
    pub fn from_yaml(text: &str, origin: &str) -> Result<Workload, SpecError> {
        let map = parse_mapping(text, origin)?;
        let f = Fields::new(origin, "", &map);
        f.only_keys(&["name", "num_requests", "input_tokens", "output_tokens", "seed", "arrival", "prefix_hit"])?;
        let num_requests = f.size("num_requests", None, REQUESTS)?;
        let input_tokens = read_range(&f, "input_tokens")?;
        if input_tokens.max.saturating_mul(num_requests) > TOKENS_IN_ALL {
            let expected = format!("such that num_requests prompts have at most {TOKENS_IN_ALL} tokens in all");
            return Err(f.invalid("input_tokens", input_tokens.max, expected));
        }
        let seed = match f.get("seed") {
            None => 0,
            Some(seed) => seed.as_u64().ok_or_else(|| f.invalid("seed", show(seed), "a whole number from 0"))?,
        };
        Ok(Workload {
            name: f.required_text("name")?.to_owned(),
            num_requests,
            input_tokens,
            output_tokens: read_range(&f, "output_tokens")?,
            seed,
            arrival: read_arrival(&f)?,
            prefix_hit: f.number("prefix_hit", 0.0, 0.0..=1.0)?,
        })
    }

    /// The file that is read back as this workload.
    pub fn to_yaml(&self) -> String {
        let mut text = String::new();
        let _ = writeln!(text, "name: {}\nnum_requests: {}", scalar(&self.name), self.num_requests);
        for (key, TokenRange { min, max }) in
            [("input_tokens", self.input_tokens), ("output_tokens", self.output_tokens)]
        {
            let _ = match min == max {
                true => writeln!(text, "{key}: {min}"),
                false => writeln!(text, "{key}: {{min: {min}, max: {max}}}"),
            };
        }
        let _ = writeln!(text, "seed: {}", self.seed);
        let _ = match self.arrival {
            Arrival::AtStart => Ok(()),
            Arrival::Poisson { requests_per_s } => writeln!(text, "arrival: {{poisson: {requests_per_s:e}}}"),
            Arrival::Closed { concurrency } => writeln!(text, "arrival: {{closed: {concurrency}}}"),
        };
        if self.prefix_hit > 0.0 {
            let _ = writeln!(text, "prefix_hit: {:e}", self.prefix_hit);
        }
        text
    }

    /// Tokens of the longest sequence that a request can become.
    pub fn longest(&self) -> usize {
        self.input_tokens.max + self.output_tokens.max
    }
}

/// `{poisson: requests/s}` or `{closed: users}`; all at the start where it is absent.
fn read_arrival(f: &Fields) -> Result<Arrival, SpecError> {
    let Some(arrival) = f.section("arrival")? else { return Ok(Arrival::AtStart) };
    arrival.only_keys(&["poisson", "closed"])?;
    match (arrival.opt_number("poisson", RATE)?, arrival.opt_size("closed", REQUESTS)?) {
        (Some(requests_per_s), None) => Ok(Arrival::Poisson { requests_per_s }),
        (None, Some(concurrency)) => Ok(Arrival::Closed { concurrency }),
        _ => Err(f.invalid("arrival", show(&f.map()["arrival"]), "one of poisson (requests/s) and closed (users)")),
    }
}

/// A number, or `{min: …, max: …}`.
fn read_range(f: &Fields, key: &str) -> Result<TokenRange, SpecError> {
    if !matches!(f.get(key), Some(Value::Object(_))) {
        let tokens = f.size(key, None, TOKENS)?;
        return Ok(TokenRange { min: tokens, max: tokens });
    }
    let range = f.section(key)?.expect("an object is a section");
    range.only_keys(&["min", "max"])?;
    let (min, max) = (range.size("min", None, TOKENS)?, range.size("max", None, TOKENS)?);
    if max < min {
        return Err(range.invalid("max", max, format!("at least min ({min})")));
    }
    Ok(TokenRange { min, max })
}
