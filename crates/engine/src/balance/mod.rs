//! When experts move, and where to: counters, a test that tells a load from noise, the decision, the moves, the report.
//!
//! Plain data in, plain data out: whoever owns the loop counts what routers choose, asks at the end of each interval, sends
//! the weights, and says what it cost. `docs/balance.md` has the formulas and their limits.

mod counters;
mod moves;
mod report;
mod significance;
#[cfg(test)]
mod simulated;
mod stats;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;

use moesaic_plan::eplb::{self, ExpertRank, PlaceRequest, Policy, RoutingTrace};
use moesaic_plan::plan::Balance;
use moesaic_plan::{LayerPlacement, Placement};

pub use counters::{LoadCounters, STREAMS, stream_of};
pub use moves::{Move, moves};
pub use report::{BalanceReport, DecisionRecord, Paid, QuietInterval};
pub use stats::LoadStats;

/// Windows that a test may look back over, in intervals. One is enough for many sequences at a time; few sequences need
/// longer until enough different ones have passed.
const HORIZONS: [usize; 5] = [1, 2, 4, 8, 16];

/// What balances, and between whom.
#[derive(Clone, Debug, Default)]
pub struct BalanceSetup {
    /// Routed experts of a layer.
    pub num_experts: usize,
    /// By decoder layer: who may hold its experts; `None` where nothing can be moved.
    pub ranks: Vec<Option<Vec<ExpertRank>>>,
    /// What placements are chosen from.
    pub policy: Policy,
    /// Which experts the same tokens choose, if that is known.
    pub trace: Option<RoutingTrace>,
}

/// Watches loads and decides when experts move.
#[derive(Clone, Debug)]
pub struct Balancer {
    settings: Balance,
    setup: BalanceSetup,
    /// Steps observed in all.
    step: u64,
    /// The window that is being filled, and its steps.
    window: LoadCounters,
    window_steps: u64,
    /// Full windows, the latest last.
    past: VecDeque<LoadCounters>,
    /// A window is full and nobody has asked yet.
    is_due: bool,
    /// Times that was asked since the last move.
    looks: u64,
    report: BalanceReport,
}

/// Experts are to move.
#[derive(Clone, Debug, PartialEq)]
pub struct Decision {
    /// Where experts live afterwards; one epoch later.
    pub placement: Placement,
    /// Weights that must travel before.
    pub moves: Vec<Move>,
    /// Load of the observed windows, as placed now.
    pub before: LoadStats,
    /// The same load, as placed afterwards: a prediction.
    pub after: LoadStats,
    /// Layers that change, each with its gain in max/mean on tokens that its new placement was not made from.
    pub gains: Vec<(usize, f64)>,
    /// Probability that noise alone would have led here, corrected for everything that was looked at; below the setting.
    pub p_value: f64,
}

impl Balancer {
    /// Nothing observed yet.
    pub fn new(settings: Balance, setup: BalanceSetup) -> Self {
        assert!(settings.interval >= 1, "an interval of {} steps", settings.interval);
        assert!(settings.threshold >= 0.0, "a threshold of {}", settings.threshold);
        assert!(
            settings.significance > 0.0 && settings.significance < 1.0,
            "a significance of {}",
            settings.significance
        );
        let window = LoadCounters::new(setup.ranks.len(), setup.num_experts);
        Balancer {
            settings,
            setup,
            step: 0,
            window,
            window_steps: 0,
            past: VecDeque::new(),
            is_due: false,
            looks: 0,
            report: BalanceReport::default(),
        }
    }

    /// Counts what routers chose in so many steps: usually in one, or all at the end of an interval.
    pub fn observe(&mut self, loads: &LoadCounters, steps: u64) {
        self.count(loads);
        self.advance(steps);
    }

    /// Counts what routers chose in a step that is not over: one rank's share of it, say.
    pub fn count(&mut self, loads: &LoadCounters) {
        self.window.add_all(loads);
    }

    /// So many steps are over, whose choices were counted.
    pub fn advance(&mut self, steps: u64) {
        self.window_steps += steps;
        self.step += steps;
        if self.window_steps >= self.settings.interval {
            if self.past.len() == HORIZONS[HORIZONS.len() - 1] {
                self.past.pop_front();
            }
            let empty = LoadCounters::new(self.setup.ranks.len(), self.setup.num_experts);
            self.past.push_back(std::mem::replace(&mut self.window, empty));
            self.window_steps = 0;
            self.is_due = true;
        }
    }

    /// Whether an interval ended and `decide` was not called since.
    pub fn is_due(&self) -> bool {
        self.is_due
    }

    /// Whether, and where, experts should move; nothing except once after each interval.
    ///
    /// A layer moves if the share of some rank exceeds the mean, beyond what independent sequences would show by chance,
    /// *and* a new placement lowers max/mean by more than the threshold on tokens that it was not made from.
    pub fn decide(&mut self, current: &Placement) -> Option<Decision> {
        if !std::mem::take(&mut self.is_due) {
            return None;
        }
        assert_eq!(current.layers.len(), self.setup.ranks.len(), "layers of the current placement");
        self.looks += 1;
        let latest = self.past.back().expect("a window is full");
        let now = LoadStats::of(latest, current, &self.setup.ranks);
        self.report.measured(current.epoch, now);

        let mut least = 1.0f64;
        for horizon in HORIZONS.into_iter().filter(|&horizon| horizon <= self.past.len()) {
            let mut loads = LoadCounters::new(self.setup.ranks.len(), self.setup.num_experts);
            self.past.iter().rev().take(horizon).for_each(|window| loads.add_all(window));
            let (p_value, suspects) = self.suspects(&loads, current);
            least = least.min(p_value);
            if let Some(decision) = self.improve(&loads, current, (p_value, suspects)) {
                self.looks = 0;
                // What the placement was not made from is older; if it differs, it would only argue for going back.
                self.past.drain(..self.past.len() - horizon);
                self.report.decided(self.step, horizon, &decision);
                return Some(decision);
            }
        }
        self.report.quiet(QuietInterval { step: self.step, p_value: least, max_over_mean: now.max_over_mean });
        None
    }

    /// Tells the report what the last decision cost, once its weights have arrived.
    pub fn moved(&mut self, paid: Paid) {
        self.report.paid(paid);
    }

    /// Other ranks hold experts from now on (one was lost, or came back). What was counted stays.
    pub fn set_ranks(&mut self, ranks: Vec<Option<Vec<ExpertRank>>>) {
        assert_eq!(ranks.len(), self.setup.ranks.len(), "layers of the ranks");
        self.setup.ranks = ranks;
    }

    /// Counts of the window that is being filled.
    pub fn live(&self) -> &LoadCounters {
        &self.window
    }

    /// What happened so far.
    pub fn report(&self) -> &BalanceReport {
        &self.report
    }

    /// The probability that chance shows an excess like that of the fullest rank of the most uneven layer, corrected for the
    /// ranks, layers, horizons and intervals that are looked at; and the layers that are uneven beyond chance.
    ///
    /// Anything at all is uneven only if that probability is below the setting (Bonferroni). If so, further layers count by
    /// the rule of Benjamini and Hochberg (1995), which keeps the *share* of layers that move for nothing below it.
    fn suspects(&self, loads: &LoadCounters, current: &Placement) -> (f64, Vec<usize>) {
        let horizons = HORIZONS.into_iter().filter(|&horizon| horizon <= self.past.len()).count();
        let looks = horizons as f64 / significance::spent(self.looks);
        let layer = |(layer, ranks): (usize, &Option<Vec<ExpertRank>>)| {
            let (ranks, placement) = (ranks.as_ref()?, current.layers[layer].as_ref()?);
            let streams: Vec<Vec<f64>> = (0..STREAMS)
                .map(|stream| eplb::rank_loads(placement, &loads.stream_loads(layer, stream), ranks))
                .collect();
            Some((significance::excess(&streams)? * ranks.len() as f64 * looks, layer))
        };
        let layers = self.setup.ranks.iter().flatten().count() as f64;
        let mut tested: Vec<(f64, usize)> = self.setup.ranks.iter().enumerate().filter_map(layer).collect();
        tested.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        let least = tested.first().map_or(1.0, |&(p, _)| (p * layers).min(1.0));
        if least >= self.settings.significance {
            return (least, Vec::new());
        }
        let passes = |&idx: &usize| tested[idx].0 * layers / (idx + 1) as f64 <= self.settings.significance;
        let last = (0..tested.len()).rev().find(passes).unwrap_or(0);
        (least, tested[..=last].iter().map(|&(_, layer)| layer).collect())
    }

    /// New placements for those of the suspects that gain enough.
    fn improve(
        &self,
        loads: &LoadCounters,
        current: &Placement,
        (p_value, mut suspects): (f64, Vec<usize>),
    ) -> Option<Decision> {
        suspects.sort_unstable();
        let mut placement = Placement { epoch: current.epoch + 1, layers: current.layers.clone() };
        let mut gains = Vec::new();
        for layer in suspects {
            let now = current.layers[layer].as_ref().expect("a suspect is placed");
            let ranks = self.setup.ranks[layer].as_ref().expect("a suspect has ranks");
            let all = loads.loads(layer);
            // No placement is better than level, and most suspects are nearly that: they cost no search.
            let most = eplb::max_over_mean(&eplb::rank_loads(now, &all, ranks)) - 1.0;
            if most <= self.settings.threshold {
                continue;
            }
            let gain = self.gain(loads, layer, now);
            if gain <= self.settings.threshold {
                continue;
            }
            let best = self.place(layer, &all, now);
            if best != *now {
                gains.push((layer, gain));
                placement.layers[layer] = Some(best);
            }
        }
        (!gains.is_empty()).then(|| Decision {
            moves: moves(current, &placement, &self.setup.ranks),
            before: LoadStats::of(loads, current, &self.setup.ranks),
            after: LoadStats::of(loads, &placement, &self.setup.ranks),
            placement,
            gains,
            p_value,
        })
    }

    /// Gain in max/mean that a placement made from every other stream has on the rest, averaged over both ways. A placement
    /// fits the noise of the tokens that it is made from, so on those its gain is too fair.
    fn gain(&self, loads: &LoadCounters, layer: usize, now: &LayerPlacement) -> f64 {
        let ranks = self.setup.ranks[layer].as_ref().expect("a suspect has ranks");
        let [even, odd] = loads.halves(layer);
        let one_way = |from: &[f64], on: &[f64]| {
            let max_over_mean = |placement| eplb::max_over_mean(&eplb::rank_loads(placement, on, ranks));
            max_over_mean(now) - max_over_mean(&self.place(layer, from, now))
        };
        (one_way(&even, &odd) + one_way(&odd, &even)) / 2.0
    }

    fn place(&self, layer: usize, loads: &[f64], now: &LayerPlacement) -> LayerPlacement {
        let ranks = self.setup.ranks[layer].as_ref().expect("a suspect has ranks");
        let traced = self.setup.trace.as_ref().and_then(|trace| trace.layers.get(layer)?.as_ref());
        let co_activation = traced.map(|layer| layer.co_activation());
        let request = PlaceRequest { loads, ranks, policy: self.setup.policy, co_activation, current: Some(now) };
        eplb::place(&request).expect("the plan's ranks hold its experts").placement
    }
}
