//! The seam to whatever runs batches, and one round through it.

use crate::{SchedError, Scheduler, SeqUpdate, StepBatch, StepOutput};

/// Runs batches: the engine with ranks and kernels, the planner with prices and a virtual clock.
pub trait Execute {
    /// Why a step failed.
    type Error;

    /// Runs one batch of every data-parallel group to its end, all in one step: computes the KV of their tokens into
    /// their blocks, and samples one token for each sequence whose `samples` is set. A group without work has an empty
    /// batch. Returns the groups' outputs in their order.
    ///
    /// # Errors
    /// The step counts as not done, and its tokens will be scheduled again.
    fn execute(&mut self, batches: &[StepBatch]) -> Result<Vec<StepOutput>, Self::Error>;
}

/// A group's part of a step that is done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DrivenStep {
    /// What ran; empty when the scheduler was idle.
    pub batch: StepBatch,
    /// The tokens gained, in order of arrival.
    pub updates: Vec<SeqUpdate>,
}

/// One round of one group: schedule, execute, commit. An idle scheduler does nothing, and the executor is not called.
///
/// # Errors
/// The executor's, or [`SchedError::WrongSamples`] about its output. The step is then rolled back, and the next call
/// tries it again.
pub fn drive_step<E>(scheduler: &mut Scheduler, executor: &mut E) -> Result<DrivenStep, E::Error>
where
    E: Execute,
    E::Error: From<SchedError>,
{
    Ok(drive_groups(std::slice::from_mut(scheduler), executor)?.remove(0))
}

/// One round of all data-parallel groups together, each with a scheduler of its own. When all are idle the executor is not
/// called.
///
/// # Errors
/// As of [`drive_step`]; then the step is rolled back in every group.
pub fn drive_groups<E>(schedulers: &mut [Scheduler], executor: &mut E) -> Result<Vec<DrivenStep>, E::Error>
where
    E: Execute,
    E::Error: From<SchedError>,
{
    let batches: Vec<StepBatch> = schedulers.iter_mut().map(Scheduler::schedule).collect();
    if batches.iter().all(|batch| batch.seqs.is_empty()) {
        return Ok(batches.into_iter().map(|batch| DrivenStep { batch, updates: Vec::new() }).collect());
    }
    let committed = executor.execute(&batches).and_then(|outputs| {
        assert_eq!(outputs.len(), batches.len(), "an output for each group");
        let rounds = schedulers.iter_mut().zip(batches.iter().zip(&outputs));
        let updates: Result<Vec<_>, SchedError> =
            rounds.map(|(scheduler, (batch, output))| scheduler.commit(batch, output)).collect();
        updates.map_err(E::Error::from)
    });
    match committed {
        Ok(updates) => {
            Ok(batches.into_iter().zip(updates).map(|(batch, updates)| DrivenStep { batch, updates }).collect())
        }
        Err(error) => {
            for (scheduler, batch) in schedulers.iter_mut().zip(&batches) {
                // Nothing is in flight in a group that had no work, or whose output was right while another's was not.
                if let Err(why) = scheduler.rollback(batch) {
                    assert!(matches!(why, SchedError::NotInFlight { .. }), "nothing else refuses a rollback: {why}");
                }
            }
            Err(error)
        }
    }
}
