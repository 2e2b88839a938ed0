//! Which requests come, and when.

use moesaic_sched::{SeqId, SeqRequest};
use moesaic_spec::{Arrival, SplitMix64, Workload};

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

/// The requests of a workload in the order in which they come.
pub(super) fn asks(workload: &Workload) -> Vec<Ask> {
    let mut random = SplitMix64(workload.seed ^ ARRIVALS);
    let mut clock = 0.0;
    let mut at = |idx: usize| match workload.arrival {
        Arrival::AtStart => Some(0.0),
        Arrival::Closed { concurrency } => (idx < concurrency).then_some(0.0),
        Arrival::Poisson { requests_per_s } => {
            clock -= (1.0 - random.uniform()).ln() / requests_per_s;
            Some(clock)
        }
    };
    let ask = |(idx, (input, output))| Ask { input, output, at: at(idx) };
    workload.lengths().enumerate().map(ask).collect()
}

/// Tells the seed of arrivals from that of lengths.
const ARRIVALS: u64 = 0xA55A;

#[cfg(test)]
mod tests {
    use moesaic_spec::TokenRange;

    use super::*;

    fn workload(arrival: Arrival) -> Workload {
        let tokens = |min, max| TokenRange { min, max };
        Workload {
            name: "w".into(),
            num_requests: 4000,
            input_tokens: tokens(10, 20),
            output_tokens: tokens(1, 4),
            seed: 3,
            arrival,
            prefix_hit: 0.0,
        }
    }

    #[test]
    fn requests_come_as_often_as_asked_and_in_no_rhythm() {
        let asked = asks(&workload(Arrival::Poisson { requests_per_s: 20.0 }));
        let times: Vec<f64> = asked.iter().map(|ask| ask.at.unwrap()).collect();
        let gaps: Vec<f64> = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        let variance = gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / gaps.len() as f64;
        assert!((mean - 0.05).abs() < 0.003, "{mean}");
        // Of an exponential distribution, the deviation is the mean; 4,000 draws come within a few percent.
        assert!((variance.sqrt() / mean - 1.0).abs() < 0.08, "{}", variance.sqrt() / mean);
        assert_eq!(
            asks(&workload(Arrival::Closed { concurrency: 7 })).iter().filter(|ask| ask.at == Some(0.0)).count(),
            7
        );
    }

    #[test]
    fn prompts_share_what_they_should_and_no_more() {
        let asked = asks(&workload(Arrival::AtStart));
        let (a, b) = (asked[0].request(0, 0.5).prompt, asked[1].request(1, 0.5).prompt);
        let same = a.iter().zip(&b).take_while(|(a, b)| a == b).count();
        let half = |ask: &Ask| (ask.input as f64 / 2.0).round() as usize;
        assert_eq!(same, half(&asked[0]).min(half(&asked[1])));
    }
}
