//! What changes while requests run: where experts live, and in how many micro-batches a step is cut.
//!
//! Only the leader decides. A new placement is announced when all weights that it needs have arrived; every rank then
//! switches before the same step.

mod pools;

pub use pools::{PoolSeconds, pool_of};

use std::collections::BTreeSet;

use moesaic_plan::plan::MAX_MICRO_BATCHES;
use moesaic_plan::{Placement, Plan};
use moesaic_spec::ModelSpec;

use self::pools::InStep;
use crate::balance::{BalanceReport, BalanceSetup, Balancer, Decision, LoadCounters, Paid};
use crate::record::StepRecord;
use crate::routing;
use crate::synchronize::SynchronizerReport;
use crate::wire::ExpertMove;

/// The leader's view of what may change.
pub struct Adaptation {
    placement: Placement,
    num_micro_batches: usize,
    synchronizer: Option<InStep>,
    balancer: Option<Balancer>,
    /// Moves so far.
    num_moves: u32,
    /// Moves that ranks have not been told of yet.
    new_moves: Vec<ExpertMove>,
    pending: Option<Pending>,
}

/// A placement whose weights are on their way.
struct Pending {
    placement: Placement,
    /// Numbers of moves that have not arrived.
    missing: BTreeSet<u32>,
    paid: Paid,
}

impl Adaptation {
    /// With `external_times`, somebody else says what pools took ([`Adaptation::observe_times`]).
    pub(crate) fn new(plan: &Plan, spec: &ModelSpec, external_times: bool) -> Adaptation {
        let balancer = plan.file.balance.map(|settings| {
            let num_experts = routing::num_experts(spec);
            Balancer::new(settings, BalanceSetup { num_experts, ranks: plan.expert_slots(), ..BalanceSetup::default() })
        });
        Adaptation {
            placement: plan.placement.clone(),
            num_micro_batches: plan.file.micro_batches,
            synchronizer: InStep::new(plan, spec, external_times),
            balancer,
            num_moves: 0,
            new_moves: Vec::new(),
            pending: None,
        }
    }

    /// Where experts live now.
    pub fn placement(&self) -> &Placement {
        &self.placement
    }

    /// Parts of the next step.
    pub fn num_micro_batches(&self) -> usize {
        self.num_micro_batches
    }

    /// How the pools are kept in step; `None` where they are not.
    pub fn synchronizer_report(&self) -> Option<&SynchronizerReport> {
        self.synchronizer.as_ref().map(|in_step| in_step.synchronizer.report())
    }

    /// What sequences of these context lengths cost beside each other, in any unit; by length where nothing is predicted.
    pub fn costs(&self, contexts: &[usize]) -> Vec<f64> {
        match &self.synchronizer {
            Some(in_step) => in_step.synchronizer.attention_costs(contexts),
            None => contexts.iter().map(|&context| context as f64).collect(),
        }
    }

    /// What the pools took for each micro-batch of the last step, on the clock that counts.
    pub fn observe_times(&mut self, times: &[PoolSeconds]) {
        let Some(in_step) = &mut self.synchronizer else { return };
        let explores = in_step.synchronizer.report().intervals == 0;
        match in_step.observe(times) {
            Some(chosen) => self.num_micro_batches = chosen,
            // Before the first choice, all numbers are tried in turn: nothing can be said of what was never seen.
            None if explores => self.num_micro_batches = self.num_micro_batches % MAX_MICRO_BATCHES + 1,
            None => {}
        }
    }

    /// What moving experts did so far; `None` where they don't.
    pub fn balance_report(&self) -> Option<&BalanceReport> {
        self.balancer.as_ref().map(Balancer::report)
    }

    /// Whether experts are on their way.
    pub fn is_migrating(&self) -> bool {
        self.pending.is_some()
    }

    /// Experts go to other places, as soon as their weights have: the leader's own decision does the same. Only where the plan
    /// balances, because there is memory for it, and one decision after the other.
    pub fn migrate(&mut self, decision: &Decision) {
        assert!(self.balancer.is_some(), "the plan says nothing of balance");
        assert!(!self.is_migrating(), "experts are on their way to the placement of another decision");
        let moves = decision.moves.iter().map(|one| {
            self.num_moves += 1;
            ExpertMove {
                number: self.num_moves,
                layer: one.layer as u32,
                expert: one.expert,
                from: one.from,
                to: one.to,
            }
        });
        let moves: Vec<ExpertMove> = moves.collect();
        let missing = moves.iter().map(|one| one.number).collect();
        self.new_moves.extend(moves);
        self.pending = Some(Pending { placement: decision.placement.clone(), missing, paid: Paid::default() });
    }

    pub(crate) fn new_moves(&mut self) -> Vec<ExpertMove> {
        std::mem::take(&mut self.new_moves)
    }

    /// The placement that the next step begins with, where it is another one.
    pub(crate) fn due_placement(&mut self) -> Option<Placement> {
        let arrived = self.pending.take_if(|pending| pending.missing.is_empty() && self.new_moves.is_empty())?;
        if let Some(balancer) = &mut self.balancer {
            balancer.moved(arrived.paid);
        }
        self.placement = arrived.placement.clone();
        Some(arrived.placement)
    }

    /// One rank's news.
    pub(crate) fn take_in(&mut self, loads: Option<&LoadCounters>, arrived: &[u32]) {
        if let (Some(balancer), Some(loads)) = (&mut self.balancer, loads) {
            balancer.count(loads);
        }
        if let Some(pending) = &mut self.pending {
            arrived.iter().for_each(|number| {
                pending.missing.remove(number);
            });
        }
    }

    /// All ranks are done with a step.
    pub(crate) fn after_step(&mut self, record: &StepRecord) {
        if let Some(pending) = &mut self.pending {
            pending.paid.bytes += record.weights_sent;
        }
        if let Some(in_step) = &mut self.synchronizer {
            in_step.take_in(record);
            if !in_step.external_times {
                let times = in_step.measured(record);
                self.observe_times(&times);
            }
        }
        let Some(balancer) = &mut self.balancer else { return };
        balancer.advance(1);
        if self.pending.is_none()
            && balancer.is_due()
            && let Some(decision) = balancer.decide(&self.placement)
        {
            self.migrate(&decision);
        }
    }
}
