//! What is written down while a simulation runs.

use moesaic_sched::SchedStats;
use moesaic_spec::Arrival;

use super::executor::Clock;
use super::result::Moment;

/// When a request came, and its tokens.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Request {
    pub(super) arrival: f64,
    pub(super) first: f64,
    pub(super) last: f64,
    pub(super) tokens: usize,
}

/// Tokens that were there at a time.
#[derive(Clone, Copy, Debug)]
pub(super) struct Mark {
    pub(super) at: f64,
    pub(super) tokens: u64,
}

pub(super) struct Record {
    pub(super) requests: Vec<Request>,
    /// Gaps between two tokens of a request, and how many of them follow each other.
    pub(super) gaps: Vec<(f64, f64)>,
    pub(super) moments: Vec<Moment>,
    pub(super) tokens: u64,
    finished: usize,
    /// Answers after which the start is over; `None` where there is nothing but start and end.
    warm: Option<usize>,
    /// The start was over, and the last request came.
    pub(super) steady: [Option<Mark>; 2],
}

impl Record {
    pub(super) fn new(requests: usize, arrival: Arrival) -> Record {
        Record {
            requests: vec![Request::default(); requests],
            gaps: Vec::new(),
            moments: Vec::new(),
            tokens: 0,
            finished: 0,
            warm: match arrival {
                Arrival::AtStart => None,
                Arrival::Poisson { .. } => Some(requests / 10),
                // All users came together; after two rounds they have drifted apart.
                Arrival::Closed { concurrency } => Some(2 * concurrency),
            },
            steady: [None; 2],
        }
    }

    pub(super) fn ask(&mut self, idx: usize, at: f64) {
        self.requests[idx].arrival = at;
        if idx + 1 == self.requests.len() {
            self.steady[1] = Some(Mark { at, tokens: self.tokens });
        }
    }

    pub(super) fn token(&mut self, idx: usize, now: f64, is_last: bool) {
        let request = &mut self.requests[idx];
        if request.tokens == 0 {
            request.first = now;
        } else {
            let gap = now - request.last;
            // Those who get a token in every step have the same gap.
            match self.gaps.last_mut() {
                Some((same, times)) if *same == gap => *times += 1.0,
                _ => self.gaps.push((gap, 1.0)),
            }
        }
        request.last = now;
        request.tokens += 1;
        self.tokens += 1;
        self.finished += usize::from(is_last);
        if is_last && Some(self.finished) == self.warm {
            self.steady[0] = Some(Mark { at: now, tokens: self.tokens });
        }
    }

    pub(super) fn step(&mut self, clock: &Clock, stats: &SchedStats, kv_blocks: f64) {
        self.moments.push(Moment {
            at_s: clock.now,
            running: stats.running as f64,
            waiting: stats.waiting as f64,
            kv_use: stats.used_blocks as f64 / kv_blocks,
            decodes: clock.last.decodes,
            prefill_tokens: clock.last.prefill_tokens,
        });
    }
}
