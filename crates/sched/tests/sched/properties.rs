//! The promises, under random scripts of requests, aborts, steps and failures.

use std::collections::BTreeMap;

use moesaic_sched::{
    Execute, FinishReason, SchedError, SchedStats, Scheduler, SchedulerConfig, SeqId, SeqRequest, SeqUpdate, StepBatch,
    drive_step,
};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;

use crate::fake_model::{FakeError, FakeModel, VOCAB, alone};

#[derive(Debug, Clone)]
enum Event {
    Add(Request),
    /// Aborts the sequence at this place among those that live, wrapped around.
    Abort(usize),
    Step,
    /// A step between whose schedule and commit a sequence is aborted and a request added.
    StepInterrupted(usize, Request),
    /// A step that writes rubbish and fails.
    FailedStep,
}

/// A prompt is the beginning of one of a few long texts, then something of its own: prefixes meet often.
#[derive(Debug, Clone)]
struct Request {
    text: u32,
    num_shared: usize,
    own: Vec<u32>,
    max_tokens: usize,
    stop_token_ids: Vec<u32>,
    cache_salt: u64,
}

impl Request {
    fn with_id(self, id: SeqId) -> SeqRequest {
        let shared = (0..self.num_shared as u32).map(|idx| (idx * 5 + self.text) % VOCAB);
        SeqRequest {
            id,
            prompt: shared.chain(self.own).collect(),
            max_tokens: self.max_tokens,
            stop_token_ids: self.stop_token_ids,
            cache_salt: self.cache_salt,
        }
    }
}

fn requests() -> impl Strategy<Value = Request> {
    let own = prop::collection::vec(0..VOCAB, 0..4);
    let stops = prop_oneof![3 => Just(vec![]), 1 => prop::collection::vec(0..VOCAB, 1..3)];
    (0..2u32, 0..16usize, own, 0..24usize, stops, 0..2u64).prop_map(
        |(text, num_shared, own, max_tokens, stop_token_ids, cache_salt)| {
            let max_tokens = if max_tokens > 20 { usize::MAX } else { max_tokens }; // "as many as fit"
            Request { text, num_shared, own, max_tokens, stop_token_ids, cache_salt }
        },
    )
}

fn events() -> impl Strategy<Value = Vec<Event>> {
    let event = prop_oneof![
        6 => requests().prop_map(Event::Add),
        1 => (0..8usize).prop_map(Event::Abort),
        10 => Just(Event::Step),
        1 => (0..8usize, requests()).prop_map(|(abort, request)| Event::StepInterrupted(abort, request)),
        1 => Just(Event::FailedStep),
    ];
    prop::collection::vec(event, 1..80)
}

fn configs() -> impl Strategy<Value = SchedulerConfig> {
    (1..7usize, 0..16usize, 4..40usize, 1..5usize, 4..24usize, 1..6usize, any::<bool>(), any::<bool>()).prop_map(
        |(
            max_num_seqs,
            more_tokens,
            max_model_len,
            block_size,
            num_blocks,
            max_num_waiting,
            enable_prefix_caching,
            enable_chunked_prefill,
        )| {
            let at_least = if enable_chunked_prefill { max_num_seqs } else { max_num_seqs.max(max_model_len) };
            SchedulerConfig {
                max_num_seqs,
                max_num_batched_tokens: at_least + more_tokens,
                max_model_len,
                block_size,
                num_blocks,
                max_num_waiting,
                enable_prefix_caching,
                enable_chunked_prefill,
            }
        },
    )
}

struct Living {
    request: SeqRequest,
    generated: Vec<u32>,
    /// Steps since it is the oldest.
    num_steps_as_oldest: usize,
}

/// The scheduler, the model, and what a caller knows.
struct World {
    scheduler: Scheduler,
    model: FakeModel,
    /// By id, which is also the order of arrival.
    living: BTreeMap<SeqId, Living>,
    num_ids: u64,
    num_batches: u64,
    /// The youngest sequence that has a first token.
    latest_started: Option<SeqId>,
}

impl World {
    fn new(config: SchedulerConfig) -> Self {
        let model = FakeModel::new(config.num_blocks, config.block_size);
        let scheduler = Scheduler::new(config).unwrap();
        Self { scheduler, model, living: BTreeMap::new(), num_ids: 0, num_batches: 0, latest_started: None }
    }

    fn add(&mut self, request: Request) {
        let request = request.with_id(SeqId(self.num_ids));
        self.num_ids += 1;
        let config = self.scheduler.config().clone();
        let before = self.scheduler.stats();

        let longest = request.prompt.len().saturating_add(request.max_tokens).min(config.max_model_len);
        let kind = match self.scheduler.add(request.clone()) {
            Ok(()) => "ok",
            Err(SchedError::EmptyPrompt { .. }) => "empty",
            Err(SchedError::NoTokensAsked { .. }) => "none asked",
            Err(SchedError::PromptTooLong { .. }) => "too long",
            Err(SchedError::NeverFits { .. }) => "never fits",
            Err(SchedError::QueueFull { .. }) => "queue full",
            Err(other) => panic!("{other}"),
        };
        let expected = match &request {
            request if request.prompt.is_empty() => "empty",
            request if request.max_tokens == 0 => "none asked",
            request if request.prompt.len() + 1 > config.max_model_len => "too long",
            _ if longest - 1 > config.num_blocks * config.block_size => "never fits",
            _ if before.waiting >= config.max_num_waiting => "queue full",
            _ => "ok",
        };
        assert_eq!(kind, expected, "{request:?} with {before:?}");
        if kind != "ok" {
            assert_eq!(self.scheduler.stats(), before, "a refusal changed something");
            return;
        }
        let duplicate = self.scheduler.add(request.clone());
        assert_eq!(duplicate, Err(SchedError::DuplicateId { id: request.id }));
        self.model.expect(&request);
        self.living.insert(request.id, Living { request, generated: Vec::new(), num_steps_as_oldest: 0 });
    }

    fn abort(&mut self, place: usize) {
        let Some(idx) = place.checked_rem(self.living.len()) else {
            assert!(!self.scheduler.abort(SeqId(u64::MAX)));
            return;
        };
        let id = *self.living.keys().nth(idx).unwrap();
        self.living.remove(&id);
        assert!(self.scheduler.abort(id));
        assert!(!self.scheduler.abort(id), "it was aborted before");
    }

    fn step(&mut self) {
        let batch = self.schedule();
        if batch.seqs.is_empty() {
            assert_eq!(self.scheduler.commit(&batch, &Default::default()), Ok(vec![]));
            return;
        }
        let output = self.model.execute(std::slice::from_ref(&batch)).unwrap().remove(0);
        let updates = self.scheduler.commit(&batch, &output).unwrap();
        self.take_in(&updates);
    }

    fn interrupted_step(&mut self, abort: usize, request: Request) {
        let batch = self.schedule();
        if batch.seqs.is_empty() {
            return;
        }
        self.abort(abort);
        self.scheduler.check_integrity();
        let output = self.model.execute(std::slice::from_ref(&batch)).unwrap().remove(0);
        self.add(request);
        let updates = self.scheduler.commit(&batch, &output).unwrap();
        self.take_in(&updates);
    }

    fn failed_step(&mut self) {
        if self.living.is_empty() {
            return;
        }
        self.model.fail_next = true;
        let before = self.scheduler.stats();
        let failed = drive_step(&mut self.scheduler, &mut self.model);
        assert_eq!(failed, Err(FakeError::Failed));
        self.num_batches += 1;
        let after = self.scheduler.stats();
        assert_eq!(before.running + before.waiting, after.running + after.waiting);
    }

    fn schedule(&mut self) -> StepBatch {
        let before = self.scheduler.stats();
        let batch = self.scheduler.schedule();
        let after = self.scheduler.stats();
        self.scheduler.check_integrity();
        self.check_policy(&batch);
        assert_eq!(after.preemptions - before.preemptions, batch.preempted.len() as u64);
        batch
    }

    fn check_policy(&mut self, batch: &StepBatch) {
        let config = self.scheduler.config();
        assert_eq!(batch.seqs.is_empty(), self.living.is_empty(), "the scheduler idles with work to do: {batch:?}");
        assert_eq!(batch.step, self.num_batches, "steps are counted");
        self.num_batches += u64::from(!batch.seqs.is_empty());
        assert!(batch.seqs.len() <= config.max_num_seqs);
        assert!(batch.num_tokens() <= config.max_num_batched_tokens);
        assert!(batch.seqs.is_sorted_by(|a, b| a.id < b.id), "not in order of arrival: {batch:?}");

        // Nobody is passed by: those that run are the oldest, and only the last of them may have been cut.
        let oldest = self.living.keys().take(batch.seqs.len());
        assert!(batch.seqs.iter().map(|seq| &seq.id).eq(oldest), "somebody was passed by: {batch:?}");
        let runs = |id: &SeqId| batch.seqs.iter().any(|seq| seq.id == *id);
        assert!(!batch.preempted.iter().any(runs), "preempted and run in one step: {batch:?}");
        let cut = batch.seqs.iter().position(|seq| !seq.samples);
        assert!(cut.is_none_or(|idx| idx + 1 == batch.seqs.len()), "{batch:?}");
        if cut.is_some() {
            assert!(config.enable_chunked_prefill, "a prefill was cut: {batch:?}");
            assert_eq!(batch.num_tokens(), config.max_num_batched_tokens, "a prefill was cut too early: {batch:?}");
        }
        // Nobody starves: whoever is the oldest has its tokens in each step, and so is done in a bounded number.
        if let Some(living) = batch.seqs.first().and_then(|seq| self.living.get_mut(&seq.id)) {
            living.num_steps_as_oldest += 1;
            let num_chunks = living.request.prompt.len().div_ceil(config.max_num_batched_tokens);
            let num_tokens = living.request.max_tokens.min(config.max_model_len);
            let bound = num_chunks + num_tokens;
            assert!(living.num_steps_as_oldest <= bound, "the oldest should be done after {bound} steps: {batch:?}");
        }
    }

    fn take_in(&mut self, updates: &[SeqUpdate]) {
        assert!(updates.is_sorted_by(|a, b| a.id < b.id), "updates are not in order of arrival");
        let config = self.scheduler.config();
        for update in updates {
            let living = self.living.get_mut(&update.id).expect("only the living gain tokens");
            if living.generated.is_empty() {
                assert!(
                    self.latest_started < Some(update.id),
                    "a later sequence had its first token before {update:?}"
                );
                self.latest_started = Some(update.id);
            }
            living.generated.push(update.token);
            let (tokens, reason) = alone(&living.request, config.max_model_len);
            let num_generated = living.generated.len();
            assert_eq!(living.generated, tokens[..num_generated], "{update:?} is not what it says alone");
            let expected: Option<FinishReason> = (num_generated == tokens.len()).then_some(reason);
            assert_eq!(update.finish, expected);
            if update.finish.is_some() {
                self.living.remove(&update.id);
            }
        }
    }

    fn check(&self) {
        self.scheduler.check_integrity();
        let config = self.scheduler.config();
        let stats = self.scheduler.stats();
        assert_eq!(stats.running + stats.waiting, self.living.len());
        assert_eq!(stats.used_blocks + stats.free_blocks, config.num_blocks);
        assert_eq!(self.scheduler.is_idle(), self.living.is_empty());
        if !config.enable_prefix_caching {
            assert_eq!((stats.cached_free_blocks, stats.prefix_cache_queries, stats.prefix_cache_hits), (0, 0, 0));
        }
    }
}

/// Runs the script and then everything that is left of it.
fn run(config: SchedulerConfig, events: Vec<Event>) -> SchedStats {
    let mut world = World::new(config);
    for event in events {
        match event {
            Event::Add(request) => world.add(request),
            Event::Abort(place) => world.abort(place),
            Event::Step => world.step(),
            Event::StepInterrupted(place, request) => world.interrupted_step(place, request),
            Event::FailedStep => world.failed_step(),
        }
        world.check();
    }
    while !world.living.is_empty() {
        world.step(); // bounded: `check_policy` bounds the steps of the oldest
        world.check();
    }
    let stats = world.scheduler.stats();
    assert_eq!(stats.used_blocks, 0, "blocks are held and nobody lives");
    stats
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 5000, failure_persistence: None, ..ProptestConfig::default() })]

    /// No block is lost or shared wrongly, nobody starves, queues are bounded, and everybody says what they say alone.
    #[test]
    fn all_promises_hold_under_any_script(config in configs(), events in events()) {
        run(config, events);
    }
}

/// The scripts above would prove nothing if they never met a full cache or a shared prefix.
#[test]
fn the_scripts_meet_preemption_and_prefix_hits() {
    let mut runner = TestRunner::deterministic();
    let (mut num_preempting, mut num_hitting, mut num_both) = (0, 0, 0);
    let num_scripts = 200;
    for _ in 0..num_scripts {
        let (config, events) = (configs(), events()).new_tree(&mut runner).unwrap().current();
        let stats = run(config, events);
        let (preempts, hits) = (stats.preemptions > 0, stats.prefix_cache_hits > 0);
        num_preempting += usize::from(preempts);
        num_hitting += usize::from(hits);
        num_both += usize::from(preempts && hits);
    }
    assert!(num_preempting > num_scripts / 10, "{num_preempting} of {num_scripts} scripts preempt");
    assert!(num_hitting > num_scripts / 5, "{num_hitting} of {num_scripts} scripts hit the cache");
    assert!(num_both > num_scripts / 20, "{num_both} of {num_scripts} scripts do both");
}
