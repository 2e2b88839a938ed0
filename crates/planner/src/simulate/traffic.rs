//! Which requests come, and when.

use moesaic_sched::{SeqId, SeqRequest};
use moesaic_spec::{SplitMix64, Workload};
use serde::{Deserialize, Serialize};

/// When requests come.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Arrival {
    /// All are there at the start.
    AtOnce,
    /// So many come in a second, in the mean, each without regard to the others.
    Poisson(f64),
    /// So many users, each of whom asks again as soon as the last token of an answer is there.
    Closed(usize),
}

/// Requests as they come.
#[derive(Clone, Debug, PartialEq)]
pub struct Traffic {
    /// How many, and of how many tokens.
    pub workload: Workload,
    /// When.
    pub arrival: Arrival,
    /// Share of each prompt that all prompts begin with.
    pub shared_prefix: f64,
}

/// One request.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Ask {
    pub(super) input: usize,
    pub(super) output: usize,
    /// When it comes; `None` where it follows another.
    pub(super) at: Option<f64>,
}

impl Ask {
    /// What the scheduler is asked. Tokens are counted and not computed, so they only say which prompts begin alike.
    pub(super) fn request(self, idx: usize, shared_prefix: f64) -> SeqRequest {
        let shared = (self.input as f64 * shared_prefix).round() as usize;
        let mut prompt = vec![0; self.input];
        if shared > 0 {
            prompt[shared..].fill(idx as u32 + 1);
        }
        SeqRequest { id: SeqId(idx as u64), prompt, max_tokens: self.output, stop_token_ids: Vec::new(), cache_salt: 0 }
    }
}

impl Traffic {
    /// The requests in the order in which they come.
    pub(super) fn asks(&self) -> Vec<Ask> {
        let mut random = SplitMix64(self.workload.seed ^ 0xA5);
        let mut clock = 0.0;
        let mut at = |idx: usize| match self.arrival {
            Arrival::AtOnce => Some(0.0),
            Arrival::Closed(users) => (idx < users).then_some(0.0),
            Arrival::Poisson(rate) => {
                clock -= (1.0 - random.uniform()).ln() / rate;
                Some(clock)
            }
        };
        let ask = |(idx, (input, output))| Ask { input, output, at: at(idx) };
        self.workload.lengths().enumerate().map(ask).collect()
    }
}

#[cfg(test)]
mod tests {
    use moesaic_spec::TokenRange;

    use super::*;

    fn traffic(arrival: Arrival) -> Traffic {
        let tokens = |min, max| TokenRange { min, max };
        let workload = Workload {
            name: "w".into(),
            num_requests: 4000,
            input_tokens: tokens(10, 20),
            output_tokens: tokens(1, 4),
            seed: 3,
            arrival: moesaic_spec::Arrival::AtStart,
            prefix_hit: 0.0,
        };
        Traffic { workload, arrival, shared_prefix: 0.5 }
    }

    #[test]
    fn requests_come_as_often_as_asked_and_in_no_rhythm() {
        let asks = traffic(Arrival::Poisson(20.0)).asks();
        let times: Vec<f64> = asks.iter().map(|ask| ask.at.unwrap()).collect();
        let gaps: Vec<f64> = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        let variance = gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / gaps.len() as f64;
        assert!((mean - 0.05).abs() < 0.003, "{mean}");
        // Of an exponential distribution, the deviation is the mean; 4,000 draws come within a few percent.
        assert!((variance.sqrt() / mean - 1.0).abs() < 0.08, "{}", variance.sqrt() / mean);
        assert_eq!(traffic(Arrival::Closed(7)).asks().iter().filter(|ask| ask.at == Some(0.0)).count(), 7);
    }

    #[test]
    fn prompts_share_what_they_should_and_no_more() {
        let asks = traffic(Arrival::AtOnce).asks();
        let (a, b) = (asks[0].request(0, 0.5).prompt, asks[1].request(1, 0.5).prompt);
        let same = a.iter().zip(&b).take_while(|(a, b)| a == b).count();
        let half = |ask: &Ask| (ask.input as f64 / 2.0).round() as usize;
        assert_eq!(same, half(&asks[0]).min(half(&asks[1])));
    }
}
