//! What a request asks of the sampler, in vLLM's names.

use super::OP;
use crate::KernelError;
use crate::contract::require;

/// Below this a temperature means greedy (vLLM's bound, too).
const GREEDY_BELOW: f32 = 1e-5;

/// How a request's tokens are chosen. The default draws from the model's distribution as it is.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct SamplingParams {
    /// Divides the logits; 0 always takes the likeliest token.
    pub temperature: f32,
    /// Draw from so many likeliest tokens; 0 is all.
    pub top_k: usize,
    /// Draw from the fewest likeliest tokens whose probabilities reach this sum, in (0, 1].
    pub top_p: f32,
    /// Draw from tokens at least this probable, relative to the likeliest, in `[0, 1]`.
    pub min_p: f32,
    /// Positive logits of tokens in prompt or output are divided by it, negative ones multiplied; above 0, 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted from the logit of a token in the output, in `[-2, 2]`.
    pub presence_penalty: f32,
    /// Subtracted from the logit of a token for every time that it is in the output, in `[-2, 2]`.
    pub frequency_penalty: f32,
    /// Which stream of random numbers.
    pub seed: u64,
    /// Report this many likeliest tokens beside the chosen.
    pub logprobs: Option<usize>,
    /// Added to the logits of these tokens before all else, in `[-100, 100]`.
    pub logit_bias: Vec<(u32, f32)>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        SamplingParams {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            seed: 0,
            logprobs: None,
            logit_bias: Vec::new(),
        }
    }
}

impl SamplingParams {
    /// Always the likeliest token.
    pub fn greedy() -> SamplingParams {
        SamplingParams { temperature: 0.0, ..SamplingParams::default() }
    }

    /// Whether no random number is needed.
    pub fn is_greedy(&self) -> bool {
        self.temperature < GREEDY_BELOW
    }

    /// Checks every number; the error names the field.
    pub fn validate(&self) -> Result<(), KernelError> {
        let number = |field, value: f32, ok: bool, expected: &str| {
            require(ok, OP, field, || expected.to_string(), || value.to_string())
        };
        let t = self.temperature;
        number("temperature", t, t.is_finite() && t >= 0.0, "0 (greedy) or a number above it")?;
        number("top_p", self.top_p, self.top_p > 0.0 && self.top_p <= 1.0, "a number above 0 and at most 1")?;
        number("min_p", self.min_p, (0.0..=1.0).contains(&self.min_p), "a number from 0 to 1")?;
        let r = self.repetition_penalty;
        number("repetition_penalty", r, r.is_finite() && r > 0.0, "a number above 0")?;
        let penalty = |field, value| number(field, value, (-2.0..=2.0).contains(&value), "a number from -2 to 2");
        penalty("presence_penalty", self.presence_penalty)?;
        penalty("frequency_penalty", self.frequency_penalty)?;
        let bias = |&(_, value): &(u32, f32)| {
            number("logit_bias", value, (-100.0..=100.0).contains(&value), "a number from -100 to 100")
        };
        self.logit_bias.iter().try_for_each(bias)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_error_names_the_field() {
        let check = |params: SamplingParams| params.validate().unwrap_err().to_string();
        let base = SamplingParams::default;
        assert!(base().validate().is_ok() && SamplingParams::greedy().validate().is_ok());
        assert_eq!(
            check(SamplingParams { temperature: -1.0, ..base() }),
            "sampler: temperature is -1, expected 0 (greedy) or a number above it"
        );
        assert_eq!(
            check(SamplingParams { top_p: 1.5, ..base() }),
            "sampler: top_p is 1.5, expected a number above 0 and at most 1"
        );
        for (field, params) in [
            ("temperature", SamplingParams { temperature: f32::NAN, ..base() }),
            ("temperature", SamplingParams { temperature: f32::INFINITY, ..base() }),
            ("top_p", SamplingParams { top_p: 0.0, ..base() }),
            ("top_p", SamplingParams { top_p: f32::NAN, ..base() }),
            ("min_p", SamplingParams { min_p: -0.1, ..base() }),
            ("min_p", SamplingParams { min_p: f32::NAN, ..base() }),
            ("repetition_penalty", SamplingParams { repetition_penalty: 0.0, ..base() }),
            ("presence_penalty", SamplingParams { presence_penalty: 2.1, ..base() }),
            ("frequency_penalty", SamplingParams { frequency_penalty: -2.1, ..base() }),
            ("logit_bias", SamplingParams { logit_bias: vec![(0, 1.0), (1, 101.0)], ..base() }),
        ] {
            assert!(check(params).starts_with(&format!("sampler: {field} is ")), "{field}");
        }
    }
}
