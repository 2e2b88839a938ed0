//! What changes while requests run: where experts live, and in how many micro-batches a step is cut.

use moesaic_plan::{Placement, Plan};
use moesaic_spec::ModelSpec;

use crate::executor::StepRecord;
use crate::wire::ExpertMove;

/// The leader's view of what may change.
pub struct Adaptation {
    placement: Placement,
    num_micro_batches: usize,
    /// Moves that ranks have not been told of yet.
    new_moves: Vec<ExpertMove>,
}

impl Adaptation {
    pub(crate) fn new(plan: &Plan, _spec: &ModelSpec) -> Adaptation {
        Adaptation {
            placement: plan.placement.clone(),
            num_micro_batches: plan.file.micro_batches,
            new_moves: Vec::new(),
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

    pub(crate) fn new_moves(&mut self) -> Vec<ExpertMove> {
        std::mem::take(&mut self.new_moves)
    }

    pub(crate) fn due_placement(&mut self) -> Option<Placement> {
        None
    }

    pub(crate) fn arrived(&mut self, _moves: &[u32]) {}

    pub(crate) fn after_step(&mut self, _record: &StepRecord) {}
}
