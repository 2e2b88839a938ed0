//! What changes while requests run: where experts live, and in how many micro-batches a step is cut.
//!
//! Only the leader decides. A new placement is announced when all weights that it needs have arrived; every rank then
//! switches before the same step.

use std::collections::BTreeSet;

use moesaic_plan::{Placement, Plan};
use moesaic_spec::ModelSpec;

use crate::balance::{BalanceReport, BalanceSetup, Balancer, Decision, LoadCounters, Paid};
use crate::executor::StepRecord;
use crate::routing;
use crate::wire::ExpertMove;

/// The leader's view of what may change.
pub struct Adaptation {
    placement: Placement,
    num_micro_batches: usize,
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
    pub(crate) fn new(plan: &Plan, spec: &ModelSpec) -> Adaptation {
        let balancer = plan.file.balance.map(|settings| {
            let num_experts = routing::num_experts(spec);
            Balancer::new(settings, BalanceSetup { num_experts, ranks: plan.expert_slots(), ..BalanceSetup::default() })
        });
        Adaptation {
            placement: plan.placement.clone(),
            num_micro_batches: plan.file.micro_batches,
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

    /// What moving experts did so far; `None` where they don't.
    pub fn balance_report(&self) -> Option<&BalanceReport> {
        self.balancer.as_ref().map(Balancer::report)
    }

    /// Experts go to other places, as soon as their weights have: the leader's own decision does the same.
    pub fn migrate(&mut self, decision: &Decision) {
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
