//! The seam to whatever runs a batch, and one round through it.

use crate::{SchedError, Scheduler, SeqUpdate, StepBatch, StepOutput};

/// Runs batches: the engine with ranks and kernels, the planner with prices and a virtual clock.
pub trait Execute {
    /// Why a step failed.
    type Error;

    /// Runs the batch to its end: computes the KV of its tokens into their blocks, and samples one token for each
    /// sequence whose `samples` is set.
    ///
    /// # Errors
    /// The step counts as not done, and its tokens will be scheduled again.
    fn execute(&mut self, batch: &StepBatch) -> Result<StepOutput, Self::Error>;
}

/// A step that is done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DrivenStep {
    /// What ran; empty when the scheduler was idle.
    pub batch: StepBatch,
    /// The tokens gained, in order of arrival.
    pub updates: Vec<SeqUpdate>,
}

/// One round: schedule, execute, commit. An idle scheduler does nothing, and the executor is not called.
///
/// # Errors
/// The executor's, or [`SchedError::WrongSamples`] about its output. The step is then rolled back, and the next call
/// tries it again.
pub fn drive_step<E>(scheduler: &mut Scheduler, executor: &mut E) -> Result<DrivenStep, E::Error>
where
    E: Execute,
    E::Error: From<SchedError>,
{
    let batch = scheduler.schedule();
    if batch.seqs.is_empty() {
        return Ok(DrivenStep { batch, updates: Vec::new() });
    }
    let committed =
        executor.execute(&batch).and_then(|output| scheduler.commit(&batch, &output).map_err(E::Error::from));
    match committed {
        Ok(updates) => Ok(DrivenStep { batch, updates }),
        Err(error) => {
            scheduler.rollback(&batch).expect("nobody else had the scheduler since the batch was scheduled");
            Err(error)
        }
    }
}
