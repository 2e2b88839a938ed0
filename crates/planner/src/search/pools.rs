//! Some GPUs read prompts and others answer: how many of each, and how either spreads the model.
//!
//! Ranks that answer are searched as ranks whose prompts cost nothing; ranks that read are those that read most prompts. Both
//! have whole nodes where there are several. A pair goes as fast as the slower of the two.
//!
//! All of it is told by iterations alone. What programs add was measured of pools whose workers are counted in 18 rows only, from
//! which nothing can be learned that holds elsewhere.

use super::{Found, Goals, Point, Search, Space};
use crate::PlannerError;
use crate::iteration::{Batch, Iterations, Layout};
use crate::serving::{self, Pool, Requests};
use crate::system::Seen;

/// Ranks of one kind.
#[derive(Clone, Debug, PartialEq)]
pub struct Workers {
    /// How one of them spreads the model.
    pub layout: Layout,
    /// How many there are.
    pub count: usize,
}

impl Workers {
    /// GPUs of all.
    pub fn gpus(&self) -> usize {
        self.layout.ranks() * self.count
    }

    fn pool(&self) -> Pool<'_> {
        Pool { layout: &self.layout, workers: self.count as f64 }
    }
}

/// Workers that read and workers that answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Pair {
    /// They read.
    pub prefill: Workers,
    /// They answer.
    pub decode: Workers,
    /// Requests at a time, of all.
    pub concurrency: f64,
    /// What users see, by iterations alone.
    pub seen: Seen,
    /// Output tokens per second of all.
    pub throughput: f64,
    /// GPUs that are paid for: those that work, and those that are left over.
    pub gpus: usize,
}

impl Pair {
    /// Output tokens per second and GPU.
    pub fn rate(&self) -> f64 {
        self.throughput / self.gpus as f64
    }
}

/// Those that read, and prompts that they read in a second.
struct Readers {
    workers: Workers,
    prompts_per_s: f64,
    read_s: f64,
}

impl Search<'_> {
    /// The pair with most output tokens per second and GPU within the goals; nothing where no pair keeps them.
    ///
    /// # Errors
    /// [`PlannerError`]: the model cannot be traced.
    pub fn best_pair(&self, iterations: &mut Iterations) -> Result<Option<Pair>, PlannerError> {
        let most = *self.space.gpus.end();
        let node = self.space.cluster.gpus_per_node;
        let unit = if most >= 2 * node { node } else { 1 };
        let mut best: Option<Pair> = None;
        for decode in (unit..=most - unit).step_by(unit) {
            let Some(readers) = self.readers(iterations, most - decode)? else { continue };
            for point in self.answering(iterations, decode)?.candidates() {
                let pair = self.pair(iterations, &readers, point)?;
                let missed = self.goals.missed_by(pair.seen.ttft.value, pair.seen.tpot.value);
                if missed <= 1.0 && best.as_ref().is_none_or(|best| pair.rate() > best.rate()) {
                    best = Some(pair);
                }
            }
        }
        Ok(best)
    }

    /// The search among ranks that only answer, on so many GPUs.
    fn answering(&self, iterations: &mut Iterations, gpus: usize) -> Result<Found, PlannerError> {
        Search {
            space: Space { gpus: gpus..=gpus, ..self.space.clone() },
            requests: Requests { prefix_hit: 1.0, ..self.requests },
            goals: Goals { ttft: None, ..self.goals },
            concurrencies: None,
            ..self.clone()
        }
        .run(iterations)
    }

    /// Of so many GPUs, the workers that read most prompts, each group one after another.
    fn readers(&self, iterations: &mut Iterations, gpus: usize) -> Result<Option<Readers>, PlannerError> {
        let space = Space { gpus: gpus..=gpus, ..self.space.clone() };
        let tokens = (self.requests.input * (1.0 - self.requests.prefix_hit)).max(1.0);
        let chunk = tokens.min(self.requests.step_tokens);
        let (batch, steps) = (Batch::prefill(1.0, chunk), (tokens / chunk).ceil());
        let mut best: Option<Readers> = None;
        for shape in space.shapes() {
            let families = space.families(&shape);
            for layout in families.iter().flat_map(|family| space.members(&shape, family)) {
                let footprint = iterations.footprint(&layout, self.requests.step_tokens)?;
                if self.room(&footprint).is_none() {
                    continue;
                }
                let resolved = iterations.resolve(&layout)?;
                let read_s = steps * iterations.seconds(&resolved, &batch);
                let prompts_per_s = (layout.dp * shape.copies) as f64 / read_s;
                let keeps = self.goals.ttft.is_none_or(|goal| read_s <= goal);
                if keeps && best.as_ref().is_none_or(|best| prompts_per_s > best.prompts_per_s) {
                    best = Some(Readers { workers: Workers { layout, count: shape.copies }, prompts_per_s, read_s });
                }
            }
        }
        Ok(best)
    }

    /// A pair in steady state, with as many requests as keep its slower side at work.
    fn pair(&self, iterations: &mut Iterations, readers: &Readers, answers: &Point) -> Result<Pair, PlannerError> {
        let decode = Workers { layout: answers.layout.clone(), count: answers.shape.copies };
        let prefill = readers.workers.clone();
        let transfer_s = serving::transfer_s(iterations, &decode.layout, &self.requests)?;
        let answered_per_s = answers.throughput / self.requests.output;
        // Readers that are always at work let prompts wait without end.
        let per_s = answered_per_s.min(BUSY * readers.prompts_per_s);
        let concurrency = answers.concurrency * per_s / answered_per_s + per_s * (readers.read_s + transfer_s);
        let requests = Requests { concurrency: concurrency.ceil(), ..self.requests };
        let serving = serving::disaggregated(iterations, prefill.pool(), decode.pool(), &requests, transfer_s)?;
        let gpus = (prefill.gpus() + decode.gpus()).max(*self.space.gpus.start());
        let seen = Seen::unmeasured(&serving, TTFT_SD, TPOT_SD);
        Ok(Pair { prefill, decode, concurrency: requests.concurrency, seen, throughput: serving.throughput, gpus })
    }
}

/// Standard deviations of the natural logarithm, of the time to first token and per output token. The latter is what 18 measured
/// pools were off, 17 % in the median; the former a judgement, a factor of two in nine of ten cases.
const TTFT_SD: f64 = 0.4;
const TPOT_SD: f64 = 0.25;
/// Share of the time that readers are at work at most.
const BUSY: f64 = 0.9;

impl Found {
    /// All points that lead in something.
    fn candidates(&self) -> impl Iterator<Item = &Point> {
        let podiums = self.strategies.iter().flat_map(|(_, podium)| podium.first.iter().chain(&podium.second));
        podiums.chain(&self.frontier)
    }
}
