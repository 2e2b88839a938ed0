//! Some GPUs read prompts and others answer: how many of each, and how either spreads the model.
//!
//! Ranks that answer are searched as ranks whose prompts cost nothing; ranks that read are those that read most prompts. Both
//! have whole nodes where there are several. A pair goes as fast as the slower of the two.

use super::{Found, Goals, Point, Search, Space};
use crate::PlannerError;
use crate::iteration::{Batch, Iterations, Layout};
use crate::predict::Predictor;
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
    /// What users see.
    pub seen: Seen,
    /// Output tokens per second of all.
    pub throughput: f64,
}

impl Pair {
    /// GPUs that work.
    pub fn gpus(&self) -> usize {
        self.prefill.gpus() + self.decode.gpus()
    }

    /// Output tokens per second and GPU.
    pub fn rate(&self) -> f64 {
        self.throughput / self.gpus() as f64
    }
}

/// Those that read, and prompts that they read in a second.
struct Readers {
    workers: Workers,
    prompts_per_s: f64,
    read_s: f64,
}

impl Search<'_> {
    /// The pair with most output tokens per second and GPU within the goals, as users see it; nothing where no pair keeps them.
    ///
    /// # Errors
    /// [`PlannerError`]: the model cannot be traced.
    pub fn best_pair(&self, predictor: &mut Predictor) -> Result<Option<Pair>, PlannerError> {
        let most = *self.space.gpus.end();
        let node = self.space.cluster.gpus_per_node;
        let unit = if most >= 2 * node { node } else { 1 };
        let mut best: Option<Pair> = None;
        for decode in (unit..=most - unit).step_by(unit) {
            let Some(readers) = self.readers(&mut predictor.iterations, most - decode)? else { continue };
            for point in self.answering(&mut predictor.iterations, decode)?.candidates() {
                let pair = self.pair(predictor, &readers, point)?;
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
    fn pair(&self, predictor: &mut Predictor, readers: &Readers, answers: &Point) -> Result<Pair, PlannerError> {
        let Predictor { iterations, system, .. } = predictor;
        let decode = Workers { layout: answers.layout.clone(), count: answers.shape.copies };
        let prefill = readers.workers.clone();
        let transfer_s = serving::transfer_s(iterations, &decode.layout, &self.requests)?;
        let answered_per_s = answers.throughput / self.requests.output;
        // Readers that are always at work let prompts wait without end.
        let per_s = answered_per_s.min(BUSY * readers.prompts_per_s);
        let concurrency = answers.concurrency * per_s / answered_per_s + per_s * (readers.read_s + transfer_s);
        let requests = Requests { concurrency: concurrency.ceil(), ..self.requests };
        let serving = serving::disaggregated(iterations, prefill.pool(), decode.pool(), &requests, transfer_s)?;
        let seen = system.seen_of_pools(iterations, prefill.pool(), decode.pool(), &requests, &serving)?;
        let throughput = seen.throughput(&serving, &requests);
        Ok(Pair { prefill, decode, concurrency: requests.concurrency, seen, throughput })
    }
}

/// Share of the time that readers are at work at most.
const BUSY: f64 = 0.9;

impl Found {
    /// All points that lead in something.
    fn candidates(&self) -> impl Iterator<Item = &Point> {
        let podiums = self.strategies.iter().flat_map(|(_, podium)| podium.first.iter().chain(&podium.second));
        podiums.chain(&self.frontier)
    }
}
