//! One answer as it grows, and what the run is summed up with.

use std::fmt;
use std::time::{Duration, Instant};

use anyhow::Result;
use moesaic_device::machine;
use moesaic_engine::{FinishReason, SeqId, Step, TokenEvent};
use moesaic_text::{Detokenizer, StopStrings, Tokenizer};

/// One answer.
pub(super) struct Answer {
    pub id: SeqId,
    pub prompt_len: usize,
    /// What was said, without the text that ended it.
    pub text: String,
    pub tokens: Vec<TokenEvent>,
    finish: &'static str,
    detokenizer: Option<Detokenizer>,
    stop: StopStrings,
    /// Ids that end the answer are not part of its text.
    stop_token_ids: Vec<u32>,
}

impl Answer {
    pub(super) fn new(
        id: SeqId,
        prompt: &[u32],
        tokenizer: Option<&Tokenizer>,
        stop_token_ids: &[u32],
        stop: &[String],
    ) -> Result<Answer> {
        Ok(Answer {
            id,
            prompt_len: prompt.len(),
            text: String::new(),
            tokens: Vec::new(),
            finish: "length",
            detokenizer: tokenizer.map(|t| Detokenizer::after_prompt(t.clone(), true, prompt)).transpose()?,
            stop: StopStrings::new(stop.to_vec(), false)?,
            stop_token_ids: stop_token_ids.to_vec(),
        })
    }

    /// Takes a token; the text that is now certain.
    pub(super) fn push(&mut self, event: TokenEvent) -> Result<String> {
        let ended_by_token = matches!(event.finish, Some(FinishReason::Stop { .. }));
        let mut piece = String::new();
        if let Some(detokenizer) = &mut self.detokenizer {
            if !(ended_by_token && self.stop_token_ids.contains(&event.token)) {
                piece = self.stop.push(&detokenizer.step(event.token)?).text;
            }
            if event.finish.is_some() && self.stop.matched().is_none() {
                piece += &self.stop.push(&detokenizer.finish()?).text;
                piece += &self.stop.finish();
            }
        }
        if ended_by_token || self.stop.matched().is_some() {
            self.finish = "stop";
        }
        self.text += &piece;
        self.tokens.push(event);
        Ok(piece)
    }

    /// Whether one of the stop strings was met.
    pub(super) fn stopped_by_text(&self) -> bool {
        self.stop.matched().is_some()
    }

    pub(super) fn to_json(&self) -> serde_json::Value {
        let top = |event: &TokenEvent| -> Vec<_> {
            event.top_logprobs.iter().map(|(id, logprob)| serde_json::json!({"id": id, "logprob": logprob})).collect()
        };
        serde_json::json!({
            "text": self.text,
            "finish_reason": self.finish,
            "token_ids": self.tokens.iter().map(|event| event.token).collect::<Vec<_>>(),
            "logprobs": self.tokens.iter().map(|event| event.logprob).collect::<Vec<_>>(),
            "top_logprobs": self.tokens.iter().map(top).collect::<Vec<_>>(),
            "usage": { "prompt_tokens": self.prompt_len, "completion_tokens": self.tokens.len() },
        })
    }
}

/// Times of one run.
pub(super) struct Summary {
    start: Instant,
    /// This process has no rank but only leads them.
    leads: bool,
    num_prompts: usize,
    prompt_tokens: usize,
    generated_tokens: usize,
    first_token: Option<Duration>,
    last_token: Duration,
    steps_after_first: usize,
}

impl Summary {
    pub(super) fn start(prompts: &[Vec<u32>], leads: bool) -> Summary {
        Summary {
            start: Instant::now(),
            leads,
            num_prompts: prompts.len(),
            prompt_tokens: prompts.iter().map(Vec::len).sum(),
            generated_tokens: 0,
            first_token: None,
            last_token: Duration::ZERO,
            steps_after_first: 0,
        }
    }

    pub(super) fn step(&mut self, step: &Step) {
        if step.events.is_empty() {
            return;
        }
        self.last_token = self.start.elapsed();
        self.generated_tokens += step.events.len();
        match self.first_token {
            None => self.first_token = Some(self.last_token),
            Some(_) => self.steps_after_first += 1,
        }
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let first = self.first_token.unwrap_or_default();
        let total = self.last_token.as_secs_f64();
        write!(f, "{} prompt tokens, {} generated", self.prompt_tokens, self.generated_tokens)?;
        if self.num_prompts > 1 {
            write!(f, " by {} prompts", self.num_prompts)?;
        }
        write!(f, " | TTFT {:.1} ms", first.as_secs_f64() * 1e3)?;
        if self.steps_after_first > 0 {
            let decoding = total - first.as_secs_f64();
            write!(f, " | TPOT {:.2} ms", decoding / self.steps_after_first as f64 * 1e3)?;
        }
        if total > 0.0 {
            write!(f, " | {:.1} tokens/s", self.generated_tokens as f64 / total)?;
        }
        if let Some(peak) = machine::peak_memory() {
            write!(f, " | peak memory {}{peak}", if self.leads { "of the leader " } else { "" })?;
        }
        Ok(())
    }
}
