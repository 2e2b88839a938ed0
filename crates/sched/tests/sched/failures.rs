//! Executors that break their promise, and callers that mix up their batches.

use moesaic_sched::{
    Execute, FinishReason, SchedError, Scheduler, SchedulerConfig, SeqId, SeqRequest, SeqUpdate, StepBatch, StepOutput,
    drive_groups, drive_step,
};

fn scheduler_with_two_prompts() -> Scheduler {
    let mut scheduler = Scheduler::new(SchedulerConfig {
        max_num_seqs: 2,
        max_num_batched_tokens: 8,
        max_model_len: 16,
        block_size: 4,
        num_blocks: 8,
        max_num_waiting: 2,
        enable_prefix_caching: true,
        enable_chunked_prefill: true,
    })
    .unwrap();
    for id in [SeqId(1), SeqId(2)] {
        let request = SeqRequest { id, prompt: vec![1, 2, 3], max_tokens: 5, stop_token_ids: vec![9], cache_salt: 0 };
        scheduler.add(request).unwrap();
    }
    scheduler
}

/// Says what it was told to say.
struct Says(Vec<(SeqId, u32)>);

impl Execute for Says {
    type Error = SchedError;

    fn execute(&mut self, batches: &[StepBatch]) -> Result<Vec<StepOutput>, SchedError> {
        let said = |batch: &StepBatch| if batch.seqs.is_empty() { Vec::new() } else { self.0.clone() };
        Ok(batches.iter().map(|batch| StepOutput { sampled: said(batch) }).collect())
    }
}

#[test]
fn groups_run_together_and_a_group_that_failed_is_tried_again() {
    let idle = || Scheduler::new(scheduler_with_two_prompts().config().clone()).unwrap();
    let mut groups = [scheduler_with_two_prompts(), idle(), scheduler_with_two_prompts()];
    let (one, two) = (SeqId(1), SeqId(2));
    let refused = drive_groups(&mut groups, &mut Says(vec![(one, 7)]));
    assert!(matches!(refused, Err(SchedError::WrongSamples { .. })));
    groups.iter().for_each(Scheduler::check_integrity);
    let steps = drive_groups(&mut groups, &mut Says(vec![(one, 7), (two, 8)])).unwrap();
    let gained: Vec<usize> = steps.iter().map(|step| step.updates.len()).collect();
    assert_eq!(gained, [2, 0, 2]);
    // Nothing is executed when all are idle.
    let mut idle = [idle(), idle()];
    assert!(drive_groups(&mut idle, &mut Says(vec![(one, 7)])).unwrap().iter().all(|step| step.updates.is_empty()));
}

#[test]
fn samples_that_are_missing_doubled_or_not_due_are_refused_and_the_step_is_tried_again() {
    let mut scheduler = scheduler_with_two_prompts();
    let (one, two, three) = (SeqId(1), SeqId(2), SeqId(3));
    for (step, wrong) in [vec![one], vec![one, one], vec![one, one, two], vec![one, two, three]].into_iter().enumerate()
    {
        let refused = drive_step(&mut scheduler, &mut Says(wrong.iter().map(|&id| (id, 7)).collect()));
        let error = SchedError::WrongSamples { step: step as u64, expected: vec![one, two], got: wrong };
        assert_eq!(refused, Err(error));
        scheduler.check_integrity();
    }
    let done = drive_step(&mut scheduler, &mut Says(vec![(two, 9), (one, 7)])).unwrap();
    assert_eq!(done.batch.seqs[0].token_ids, [1, 2, 3]);
    let stopped = Some(FinishReason::Stop { token: 9 });
    assert_eq!(
        done.updates,
        [SeqUpdate { id: one, token: 7, finish: None }, SeqUpdate { id: two, token: 9, finish: stopped }]
    );
}

#[test]
fn only_the_batch_in_flight_can_be_committed_or_rolled_back() {
    let mut scheduler = scheduler_with_two_prompts();
    let first = scheduler.schedule();
    let output = StepOutput { sampled: vec![(SeqId(1), 7), (SeqId(2), 7)] };
    scheduler.commit(&first, &output).unwrap();
    let none = Err(SchedError::NotInFlight { step: 0, in_flight: None });
    assert_eq!(scheduler.commit(&first, &output).map(|_| ()), none);
    assert_eq!(scheduler.rollback(&first), none);

    let second = scheduler.schedule();
    let another = SchedError::NotInFlight { step: 0, in_flight: Some(1) };
    assert_eq!(scheduler.commit(&first, &output), Err(another.clone()));
    assert_eq!(another.to_string(), "step 0 cannot be committed or rolled back: step 1 is in flight");
    assert_eq!(scheduler.commit(&second, &output).unwrap().len(), 2);
}

#[test]
#[should_panic(expected = "the step in flight must be committed or rolled back first")]
fn two_steps_are_never_in_flight() {
    let mut scheduler = scheduler_with_two_prompts();
    scheduler.schedule();
    scheduler.schedule();
}

#[test]
fn a_name_can_be_used_again_while_its_aborted_bearer_is_in_flight() {
    let mut scheduler = scheduler_with_two_prompts();
    let batch = scheduler.schedule();
    assert!(scheduler.abort(SeqId(2)));
    let again = SeqRequest { id: SeqId(2), prompt: vec![4], max_tokens: 1, stop_token_ids: vec![], cache_salt: 0 };
    scheduler.add(again).unwrap();
    let output = StepOutput { sampled: vec![(SeqId(1), 7), (SeqId(2), 7)] };
    let updates = scheduler.commit(&batch, &output).unwrap();
    assert_eq!(updates, [SeqUpdate { id: SeqId(1), token: 7, finish: None }]);
    let next = scheduler.schedule();
    assert_eq!((next.seqs[1].id, next.seqs[1].token_ids.clone()), (SeqId(2), vec![4]));
    scheduler.check_integrity();
}
