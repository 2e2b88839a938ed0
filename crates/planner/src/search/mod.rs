//! The best plan: of all layouts of a model on a cluster at all concurrencies, the one with most output tokens per second and
//! GPU that keeps the goals; what nothing beats in everything; and the best of each strategy.
//!
//! Memory is looked at first, then a bound in closed form ([`bound`]), then what complete overlap would give,
//! then the price of what is left. The result is that of pricing everything.

pub mod bound;
pub mod candidates;
mod failures;
pub mod file;
pub mod frontier;
pub mod pools;
mod regret;
mod seen;

use std::collections::BTreeSet;

use moesaic_plan::Strategy;
use moesaic_plan::plan::MAX_MICRO_BATCHES;
use serde::{Deserialize, Serialize};

pub use bound::Bound;
pub use candidates::{Shape, Space};
use frontier::leading;
pub use frontier::{Frontier, Merit, by_tpot, by_ttft};
pub use regret::{Regret, regret};

use crate::PlannerError;
use crate::iteration::{Iterations, Layout, Resolved};
use crate::memory::Footprint;
use crate::serving::{self, Requests};

/// Requests of one group at a time at most, when nobody names concurrencies.
const MOST_SEQS: f64 = 2048.0;
/// What a bound gives away, because the steady state is found to 1 %, and more of one thing may be less of another there.
const SETTLED: f64 = 0.03;

/// What a plan must reach.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Goals {
    /// Time to first token at most, seconds.
    pub ttft: Option<f64>,
    /// Time per output token at most, seconds.
    pub tpot: Option<f64>,
}

impl Goals {
    /// By which factor the goals are missed; at most 1 where they are kept.
    pub fn missed_by(&self, ttft: f64, tpot: f64) -> f64 {
        let by = |goal: Option<f64>, value: f64| goal.map_or(0.0, |goal| value / goal);
        by(self.ttft, ttft).max(by(self.tpot, tpot))
    }
}

/// What is looked for.
#[derive(Clone, Debug)]
pub struct Search<'a> {
    /// Among what.
    pub space: Space<'a>,
    /// For which requests; their concurrency does not count.
    pub requests: Requests,
    /// Tokens of the longest sequence.
    pub longest: f64,
    /// With what limits.
    pub goals: Goals,
    /// Requests at a time, over all GPUs; powers of two for each group when absent.
    pub concurrencies: Option<Vec<f64>>,
    /// Share of a GPU's memory that may be used.
    pub utilization: f64,
    /// Leave out what bounds show to be of no use. Without, everything is priced.
    pub prune: bool,
}

/// One layout at one concurrency.
#[derive(Clone, Debug, PartialEq)]
pub struct Point {
    /// Which ranks.
    pub shape: Shape,
    /// How they work together.
    pub layout: Layout,
    /// Requests at a time, of all copies.
    pub concurrency: f64,
    /// Time to first token, seconds.
    pub ttft: f64,
    /// Time per output token, seconds.
    pub tpot: f64,
    /// Output tokens per second of all copies.
    pub throughput: f64,
}

impl Point {
    /// What it is compared by.
    pub fn merit(&self) -> Merit {
        Merit { throughput: self.throughput / self.shape.gpus as f64, tpot: self.tpot, ttft: self.ttft }
    }
}

/// The best of a strategy.
#[derive(Clone, Debug, Default)]
pub struct Podium {
    /// Most tokens per second and GPU within the goals.
    pub first: Option<Point>,
    /// The same of another shape.
    pub second: Option<Point>,
    /// Nearest to the goals, where nothing keeps them.
    pub nearest: Option<Point>,
    /// Shapes of which a rank does not hold its share.
    pub too_large: usize,
}

impl Podium {
    /// Takes in a point that may belong here.
    fn take(&mut self, point: Point, goals: &Goals) {
        let missed = |point: &Point| goals.missed_by(point.ttft, point.tpot);
        let rate = |point: &Point| point.merit().throughput;
        if missed(&point) > 1.0 {
            if self.nearest.as_ref().is_none_or(|near| missed(near) > missed(&point)) {
                self.nearest = Some(point);
            }
            return;
        }
        let leads = self.first.as_ref().is_none_or(|first| rate(&point) > rate(first));
        let same = self.first.as_ref().is_some_and(|first| first.shape == point.shape);
        match (leads, same) {
            (true, false) => self.second = self.first.replace(point),
            (true, true) => self.first = Some(point),
            (false, true) => {}
            (false, false) if self.second.as_ref().is_none_or(|second| rate(&point) > rate(second)) => {
                self.second = Some(point);
            }
            (false, false) => {}
        }
    }
}

/// How much there was, and how much of it was looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Shapes.
    pub shapes: usize,
    /// Shapes that fit.
    pub fitting: usize,
    /// Layouts at one concurrency that fit.
    pub configurations: usize,
    /// Those that were priced; a bound excludes the others.
    pub priced: usize,
}

/// What was found.
#[derive(Clone, Debug)]
pub struct Found {
    /// By strategy, in the order of [`Strategy::ALL`].
    pub strategies: Vec<(Strategy, Podium)>,
    /// What nothing beats in throughput, time per output token and time to first token at once, within the goals.
    pub frontier: Vec<Point>,
    /// How much was searched.
    pub counts: Counts,
}

impl Found {
    /// Most tokens per second and GPU within the goals.
    pub fn best(&self) -> Option<&Point> {
        self.ranked().next()
    }

    /// The best of another shape.
    pub fn runner_up(&self) -> Option<&Point> {
        self.ranked().nth(1)
    }

    fn ranked(&self) -> impl Iterator<Item = &Point> {
        let all = self.strategies.iter().flat_map(|(_, podium)| podium.first.iter().chain(&podium.second));
        let mut all: Vec<&Point> = all.collect();
        all.sort_by(|a, b| b.merit().throughput.total_cmp(&a.merit().throughput));
        all.into_iter()
    }

    /// What comes nearest to the goals, where nothing keeps them.
    pub fn nearest(&self, goals: &Goals) -> Option<&Point> {
        let missed = |point: &&Point| goals.missed_by(point.ttft, point.tpot);
        let all = self.strategies.iter().filter_map(|(_, podium)| podium.nearest.as_ref());
        all.min_by(|a, b| missed(a).total_cmp(&missed(b)))
    }
}

/// A shape that fits, before it is priced.
struct Task {
    shape: Shape,
    strategy: usize,
    /// Requests of a group at a time, ascending.
    slots: Vec<f64>,
    /// By slots: the best that the closed form allows since the ones before.
    bounds: Vec<bound::Best>,
    ttft: f64,
}

/// Layouts that differ in how much overlaps.
struct Family {
    task: usize,
    layout: Layout,
    /// By slots: what complete overlap would give; nothing where the KV cache has no room for more.
    ideal: Vec<Merit>,
}

/// Where the goals are kept and a bit more concurrency breaks them.
struct Edge {
    shape: Shape,
    layout: Layout,
    strategy: usize,
    /// Requests of a group at a time with which they are kept.
    slots: f64,
    /// The same with which they are broken.
    broken: f64,
    /// What everything up to there reaches at best.
    at_most: Merit,
}

/// A layout at one concurrency, with its price.
struct Priced<'l> {
    shape: Shape,
    layout: &'l Layout,
    slots: f64,
    merit: Merit,
}

impl Priced<'_> {
    fn point(&self) -> Point {
        let (groups, Merit { throughput, tpot, ttft }) = ((self.layout.dp * self.shape.copies) as f64, self.merit);
        Point {
            shape: self.shape,
            layout: self.layout.clone(),
            concurrency: self.slots * groups,
            ttft,
            tpot,
            throughput: throughput * self.shape.gpus as f64,
        }
    }
}

impl Search<'_> {
    /// Looks for it.
    ///
    /// # Errors
    /// [`PlannerError`]: the model cannot be traced.
    pub fn run(&self, iterations: &mut Iterations) -> Result<Found, PlannerError> {
        let mut counts = Counts::default();
        let mut strategies: Vec<(Strategy, Podium)> =
            Strategy::ALL.iter().map(|&strategy| (strategy, Podium::default())).collect();
        let mut tasks = Vec::new();
        for shape in self.space.shapes() {
            counts.shapes += 1;
            let strategy = Strategy::ALL.iter().position(|&s| s == shape.strategy()).expect("one of all");
            let Some(base) = self.space.base(&shape) else { continue };
            match self.task(iterations, shape, strategy, &base)? {
                Some(task) => tasks.push(task),
                None => strategies[strategy].1.too_large += 1,
            }
        }
        counts.fitting = tasks.len();
        let mut state = State {
            search: self,
            frontier: Frontier::default(),
            strategies,
            counts,
            edges: Vec::new(),
            refining: false,
        };
        let mut families = Vec::new();
        for (idx, task) in tasks.iter().enumerate() {
            for layout in self.space.families(&task.shape) {
                let ideal = self.ideal(iterations, task, &layout)?;
                families.push(Family { task: idx, layout, ideal });
            }
        }
        // Those that would be best of all, in whatever respect, first: what they reach excludes most others.
        let promise = |family: &Family| family.ideal.iter().map(|merit| merit.throughput).fold(0.0, f64::max);
        families.sort_by(|a, b| promise(b).total_cmp(&promise(a)));
        let (first, rest): (Vec<_>, Vec<_>) = {
            let leading = leading(families.iter().map(|family| &family.ideal[..]), &self.goals);
            families.into_iter().zip(leading).partition(|(_, leads)| *leads)
        };
        for (family, _) in first.iter().chain(&rest) {
            state.price(iterations, &tasks[family.task], family)?;
        }
        state.refine(iterations)?;
        Ok(Found { strategies: state.strategies, frontier: state.frontier.into_points(), counts: state.counts })
    }

    /// What a family would reach with complete overlap.
    fn ideal(&self, iterations: &mut Iterations, task: &Task, layout: &Layout) -> Result<Vec<Merit>, PlannerError> {
        let most = Layout { micro_batches: MAX_MICRO_BATCHES, ..layout.clone() };
        let footprint = iterations.footprint(&most, self.requests.step_tokens)?;
        let Some(room) = self.room(&footprint) else { return Ok(Vec::new()) };
        let resolved = iterations.resolve(layout)?;
        let mut ideal = Vec::with_capacity(task.slots.len());
        for &slots in &task.slots {
            if self.concurrencies.is_none() && slots > self.fitting(room) {
                break;
            }
            if !self.prune {
                ideal.push(Merit { throughput: f64::INFINITY, tpot: 0.0, ttft: 0.0 });
                continue;
            }
            let requests = Requests { concurrency: slots * layout.dp as f64, ..self.requests };
            let served = serving::ideal(iterations, &resolved, &requests, room);
            let throughput = served.throughput * task.shape.copies as f64 / task.shape.gpus as f64;
            let merit = Merit { throughput, tpot: served.tpot, ttft: served.ttft }.relaxed(SETTLED);
            ideal.push(merit);
            // More requests at a time take longer still, but for a step of the scheduler here and there.
            if self.prune && self.goals.missed_by(0.0, merit.tpot) > 2.0 {
                break;
            }
        }
        Ok(ideal)
    }

    /// The fewest GPUs that hold the model and its longest request: any number up to two nodes, then whole nodes, up to so
    /// many.
    ///
    /// # Errors
    /// [`PlannerError`]: the model cannot be traced.
    pub fn fewest_gpus(&self, iterations: &mut Iterations, most: usize) -> Result<Option<usize>, PlannerError> {
        let node = self.space.cluster.gpus_per_node;
        let whole_nodes = (1..=most / node).map(|nodes| nodes * node);
        let sizes: BTreeSet<usize> = (1..=most.min(2 * node)).chain(whole_nodes).collect();
        for gpus in sizes {
            let space = Space { gpus: gpus..=gpus, ..self.space.clone() };
            for shape in space.shapes().into_iter().filter(|shape| shape.ranks() == gpus) {
                let Some(base) = space.base(&shape) else { continue };
                if self.task(iterations, shape, 0, &base)?.is_some() {
                    return Ok(Some(gpus));
                }
            }
        }
        Ok(None)
    }

    /// Tokens that a group's KV cache holds, where the longest request fits.
    fn room(&self, footprint: &Footprint) -> Option<f64> {
        let budget = self.space.cluster.gpu.memory.0 as f64 * self.utilization;
        footprint.kv_tokens(budget).filter(|&tokens| tokens >= self.longest)
    }

    /// A shape with its concurrencies and bounds; nothing where it does not fit.
    fn task(
        &self,
        iterations: &mut Iterations,
        shape: Shape,
        strategy: usize,
        base: &Layout,
    ) -> Result<Option<Task>, PlannerError> {
        // The variant that needs least: small micro-batches, rows in few bytes, no more replicas than needed.
        let least = Layout {
            micro_batches: MAX_MICRO_BATCHES,
            redundant_experts: self.space.fewest_replicas(&shape),
            ..base.clone()
        };
        let footprint = iterations.footprint(&least, self.requests.step_tokens)?;
        let Some(room) = self.room(&footprint) else { return Ok(None) };
        let fitting = self.fitting(room);
        let groups = (shape.dp * shape.copies) as f64;
        let slots: Vec<f64> = match &self.concurrencies {
            // Each group has a request at least.
            Some(all) => {
                let mut slots: Vec<f64> = all.iter().map(|all| all / groups).filter(|&slots| slots >= 1.0).collect();
                slots.sort_by(f64::total_cmp);
                slots
            }
            None => std::iter::successors(Some(1.0), |slots| Some(2.0 * slots))
                .take_while(|&slots| slots <= fitting.min(MOST_SEQS))
                .collect(),
        };
        let bound = Bound::new(iterations, &shape, base, &self.requests, self.space.compress)?;
        let mut from = 1.0;
        let bracket = |&to: &f64| {
            let best = bound.best(from, to.min(fitting), to.min(fitting));
            from = to;
            best
        };
        let bounds = slots.iter().map(bracket).collect();
        Ok(Some(Task { shape, strategy, bounds, ttft: bound.ttft(), slots }))
    }

    /// Requests of a group at a time that its KV cache has room for, as long as they are in the mean.
    fn fitting(&self, room: f64) -> f64 {
        (room / self.requests.context()).floor().max(1.0)
    }
}

struct State<'a, 'b> {
    search: &'a Search<'b>,
    frontier: Frontier,
    strategies: Vec<(Strategy, Podium)>,
    counts: Counts,
    edges: Vec<Edge>,
    /// Points are between those that all layouts are priced at, and count for the best only.
    refining: bool,
}

impl State<'_, '_> {
    /// Prices what of a family no bound excludes.
    fn price(&mut self, iterations: &mut Iterations, task: &Task, family: &Family) -> Result<(), PlannerError> {
        let members = self.search.space.members(&task.shape, &family.layout);
        self.counts.configurations += members.len() * family.ideal.len();
        let gpus = task.shape.gpus as f64;
        // By the closed form, all up to here; by complete overlap, each for itself.
        let of_bound =
            |best: &bound::Best| Merit { throughput: best.throughput / gpus, tpot: best.tpot, ttft: task.ttft };
        let far = task.bounds.iter().take_while(|best| self.excluded(task, &of_bound(best))).count();
        let of_use = |idx: usize| idx >= far && !self.excluded(task, &family.ideal[idx]);
        let alive: Vec<bool> = (0..family.ideal.len())
            .map(|idx| !self.search.prune || of_use(idx) || self.may_lead_on(task, family, idx))
            .collect();
        if !alive.contains(&true) {
            return Ok(());
        }
        for layout in members {
            let footprint = iterations.footprint(&layout, self.search.requests.step_tokens)?;
            let Some(room) = self.search.room(&footprint) else { continue };
            let resolved = iterations.resolve(&layout)?;
            let mut kept = None;
            for (idx, &slots) in task.slots.iter().take(alive.len()).enumerate() {
                if self.search.concurrencies.is_none() && slots > self.search.fitting(room) {
                    break;
                }
                let keeps = alive[idx] && {
                    let priced = self.priced(iterations, &resolved, task.shape, slots, room);
                    self.offer(iterations, task.strategy, &priced)?
                };
                // What is left out for being worse is followed by what is worse, too.
                let broken = !keeps && (alive[idx] || self.misses(&family.ideal[idx]));
                if let (true, Some(at)) = (broken, kept) {
                    self.edges.push(Edge {
                        shape: task.shape,
                        layout: layout.clone(),
                        strategy: task.strategy,
                        slots: task.slots[at],
                        broken: slots,
                        at_most: between(task, family, at),
                    });
                }
                kept = keeps.then_some(idx);
            }
        }
        Ok(())
    }

    /// Whether more requests than these, but fewer than the next number that is priced, may be the best of the strategy: where
    /// the next breaks the goals, or may break them and would be the best otherwise.
    fn may_lead_on(&self, task: &Task, family: &Family, idx: usize) -> bool {
        let Some(next) = family.ideal.get(idx + 1) else { return false };
        let places = |merit: &Merit| self.places(task.strategy, merit, &task.shape);
        self.search.concurrencies.is_none()
            && !self.misses(&family.ideal[idx])
            && (self.misses(next) || places(next))
            && places(&between(task, family, idx))
    }

    fn misses(&self, merit: &Merit) -> bool {
        self.search.goals.missed_by(merit.ttft, merit.tpot) > 1.0
    }

    fn priced<'l>(
        &mut self,
        iterations: &mut Iterations,
        resolved: &Resolved<'l>,
        shape: Shape,
        slots: f64,
        room: f64,
    ) -> Priced<'l> {
        let layout = resolved.layout();
        let requests = Requests { concurrency: slots * layout.dp as f64, ..self.search.requests };
        self.counts.priced += 1;
        let served = serving::steady_seconds(iterations, resolved, &requests, room);
        let throughput = served.throughput * shape.copies as f64 / shape.gpus as f64;
        Priced { shape, layout, slots, merit: Merit { throughput, tpot: served.tpot, ttft: served.ttft } }
    }

    /// Whether a point that is no better than this is of no use: it is worse in everything than something that is known, or
    /// breaks the goals; and does not lead its strategy.
    fn excluded(&self, task: &Task, merit: &Merit) -> bool {
        let goals = &self.search.goals;
        let missed = goals.missed_by(merit.ttft, merit.tpot);
        let podium = &self.strategies[task.strategy].1;
        if missed > 1.0 {
            let nearest = podium.nearest.as_ref();
            return podium.first.is_some()
                || nearest.is_some_and(|near| goals.missed_by(near.ttft, near.tpot) <= missed);
        }
        self.frontier.covers(merit) && !self.places(task.strategy, merit, &task.shape)
    }

    /// Whether it would be among the first two of its strategy.
    fn places(&self, strategy: usize, merit: &Merit, shape: &Shape) -> bool {
        let podium = &self.strategies[strategy].1;
        let beats =
            |point: &Option<Point>| point.as_ref().is_none_or(|point| merit.throughput > point.merit().throughput);
        match &podium.first {
            Some(first) if first.shape == *shape => beats(&podium.first),
            _ => beats(&podium.second),
        }
    }

    /// Takes in a point; whether it keeps the goals, with as many failures as are tolerated.
    fn offer(&mut self, iterations: &mut Iterations, strategy: usize, priced: &Priced) -> Result<bool, PlannerError> {
        let (goals, merit) = (self.search.goals, &priced.merit);
        let missed = goals.missed_by(merit.ttft, merit.tpot);
        if missed > 1.0 {
            let podium = &mut self.strategies[strategy].1;
            if podium.nearest.as_ref().is_none_or(|near| goals.missed_by(near.ttft, near.tpot) > missed) {
                podium.nearest = Some(priced.point());
            }
            return Ok(false);
        }
        // Most points are worse than something in everything.
        let (leads, ahead) = (self.places(strategy, merit, &priced.shape), !self.frontier.covers(merit));
        if !leads && !ahead {
            return Ok(true);
        }
        let point = priced.point();
        if !self.survives(iterations, &point)? {
            return Ok(false);
        }
        if leads {
            self.strategies[strategy].1.take(point.clone(), &goals);
        }
        if ahead && !self.refining {
            self.frontier.insert(point);
        }
        Ok(true)
    }

    /// Whether the plan still fits and keeps the goals without the GPUs that may fail.
    fn survives(&mut self, iterations: &mut Iterations, point: &Point) -> Result<bool, PlannerError> {
        let failures = self.search.space.tolerate_failures;
        if failures == 0 {
            return Ok(true);
        }
        let search = self.search;
        for layout in failures::after(search.space.model, &point.layout, failures) {
            let footprint = iterations.footprint(&layout, search.requests.step_tokens)?;
            let Some(room) = search.room(&footprint) else { return Ok(false) };
            let concurrency = point.concurrency / point.shape.copies as f64;
            let requests = Requests { concurrency, ..search.requests };
            let served = serving::aggregated(iterations, &layout, &requests, room)?;
            if search.goals.missed_by(served.ttft, served.tpot) > 1.0 {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Between a concurrency that keeps the goals and one that does not, the greatest whole number of requests of a group
    /// that does.
    fn refine(&mut self, iterations: &mut Iterations) -> Result<(), PlannerError> {
        if self.search.concurrencies.is_some() {
            return Ok(());
        }
        let mut edges = std::mem::take(&mut self.edges);
        edges.sort_by(|a, b| b.at_most.throughput.total_cmp(&a.at_most.throughput));
        self.refining = true;
        for Edge { shape, layout, strategy, mut slots, mut broken, at_most } in edges {
            if !self.places(strategy, &at_most, &shape) {
                continue;
            }
            let footprint = iterations.footprint(&layout, self.search.requests.step_tokens)?;
            let room = self.search.room(&footprint).expect("it fitted before");
            let resolved = iterations.resolve(&layout)?;
            while broken - slots > 1.0 {
                let middle = ((slots + broken) / 2.0).floor();
                let priced = self.priced(iterations, &resolved, shape, middle, room);
                if self.offer(iterations, strategy, &priced)? { slots = middle } else { broken = middle }
            }
        }
        for (_, podium) in &self.strategies {
            if let Some(first) = podium.first.as_ref().filter(|first| !self.frontier.covers(&first.merit())) {
                self.frontier.insert(first.clone());
            }
        }
        Ok(())
    }
}

/// What more requests than those at a place, but fewer than those at the next, reach at best: none gets faster when there are
/// more.
fn between(task: &Task, family: &Family, idx: usize) -> Merit {
    let Merit { throughput, .. } = family.ideal[idx];
    Merit { throughput: throughput * task.slots[idx + 1] / task.slots[idx], ..family.ideal[idx] }
}
