//! The policy, read as scripts: what is asked, and step by step who runs.
//!
//! A script has a line for each event:
//! - `add 1 tokens=0..6 max=4 [salt=2]` adds sequence 1, whose prompt is the tokens 0 to 5;
//! - `abort 1`, `step`, `stats`.
//!
//! In what comes back, `1: 0..6 in [0 1] -> #0` means that sequence 1 ran its positions 0 to 5, its blocks are 0 and 1,
//! and its generated token number 0 was sampled. Block size is 4 throughout.

use std::fmt::Write as _;
use std::ops::Range;

use moesaic_sched::{Scheduler, SchedulerConfig, SeqId, SeqRequest, drive_step};

use crate::fake_model::FakeModel;

fn config() -> SchedulerConfig {
    SchedulerConfig {
        max_num_seqs: 4,
        max_num_batched_tokens: 16,
        max_model_len: 64,
        block_size: 4,
        num_blocks: 16,
        max_num_waiting: 4,
        enable_prefix_caching: false,
        enable_chunked_prefill: true,
    }
}

fn check(config: SchedulerConfig, script: &str, expected: &str) {
    let trimmed =
        |text: &str| text.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join("\n");
    let got = play(config, script);
    assert_eq!(trimmed(&got), trimmed(expected), "\n--- the script gave:\n{got}");
}

fn play(config: SchedulerConfig, script: &str) -> String {
    let mut out = String::new();
    let mut model = FakeModel::new(config.num_blocks, config.block_size);
    let mut scheduler = Scheduler::new(config).unwrap();
    for line in script.lines().map(str::trim).filter(|line| !line.is_empty()) {
        match line.split_once(' ').unwrap_or((line, "")) {
            ("add", rest) => {
                let request = parse_request(rest);
                match scheduler.add(request.clone()) {
                    Ok(()) => model.expect(&request),
                    Err(error) => writeln!(out, "{error}").unwrap(),
                }
            }
            ("abort", id) => assert!(scheduler.abort(SeqId(id.parse().unwrap()))),
            ("step", _) => step(&mut scheduler, &mut model, &mut out),
            ("stats", _) => {
                let stats = scheduler.stats();
                writeln!(
                    out,
                    "{} run, {} wait; blocks: {} used, {} free, {} of them cached; cache: {} of {} tokens",
                    stats.running,
                    stats.waiting,
                    stats.used_blocks,
                    stats.free_blocks,
                    stats.cached_free_blocks,
                    stats.prefix_cache_hits,
                    stats.prefix_cache_queries
                )
                .unwrap();
            }
            other => panic!("{other:?} is no event"),
        }
        scheduler.check_integrity();
    }
    out
}

fn parse_request(text: &str) -> SeqRequest {
    let mut words = text.split_whitespace();
    let id = SeqId(words.next().unwrap().parse().unwrap());
    let mut request = SeqRequest { id, prompt: vec![], max_tokens: 1, stop_token_ids: vec![], cache_salt: 0 };
    for word in words {
        match word.split_once('=').unwrap() {
            ("tokens", range) => {
                let (start, end) = range.split_once("..").unwrap();
                request.prompt = Range { start: start.parse().unwrap(), end: end.parse().unwrap() }.collect();
            }
            ("max", number) => request.max_tokens = number.parse().unwrap(),
            ("salt", number) => request.cache_salt = number.parse().unwrap(),
            other => panic!("{other:?} is no part of a request"),
        }
    }
    request
}

fn step(scheduler: &mut Scheduler, model: &mut FakeModel, out: &mut String) {
    let step = drive_step(scheduler, model).unwrap();
    if step.batch.seqs.is_empty() {
        writeln!(out, "idle").unwrap();
        return;
    }
    write!(out, "step {}, {} tokens", step.batch.step, step.batch.num_tokens()).unwrap();
    let preempted = step.batch.preempted.iter().map(|id| format!(", preempted {id}"));
    writeln!(out, "{}", preempted.collect::<String>()).unwrap();
    for seq in &step.batch.seqs {
        let blocks: Vec<_> = seq.block_table.iter().map(|block| block.0.to_string()).collect();
        let end = seq.start + seq.token_ids.len();
        write!(out, "  {}: {}..{end} in [{}]", seq.id, seq.start, blocks.join(" ")).unwrap();
        if seq.samples {
            write!(out, " -> #{}", seq.num_generated).unwrap();
        }
        let finish = step.updates.iter().find(|update| update.id == seq.id).and_then(|update| update.finish);
        writeln!(out, "{}", finish.map(|reason| format!(", {reason:?}")).unwrap_or_default()).unwrap();
    }
}

#[test]
fn decodes_run_beside_the_prefill_of_newcomers() {
    check(
        config(),
        "
        add 1 tokens=0..6 max=3
        step
        add 2 tokens=10..13 max=2
        step
        step
        step
        ",
        "
        step 0, 6 tokens
          1: 0..6 in [0 1] -> #0
        step 1, 4 tokens
          1: 6..7 in [0 1] -> #1
          2: 0..3 in [2] -> #0
        step 2, 2 tokens
          1: 7..8 in [0 1] -> #2, Length
          2: 3..4 in [2] -> #1, Length
        idle
        ",
    );
}

#[test]
fn a_long_prefill_is_cut_and_leaves_the_decodes_their_tokens() {
    check(
        SchedulerConfig { max_num_batched_tokens: 8, ..config() },
        "
        add 1 tokens=0..3 max=9
        step
        add 2 tokens=10..27 max=9
        add 3 tokens=30..32 max=9
        step
        step
        step
        ",
        "
        step 0, 3 tokens
          1: 0..3 in [0] -> #0
        step 1, 8 tokens
          1: 3..4 in [0] -> #1
          2: 0..7 in [1 2]
        step 2, 8 tokens
          1: 4..5 in [0 6] -> #2
          2: 7..14 in [1 2 3 4]
        step 3, 6 tokens
          1: 5..6 in [0 6] -> #3
          2: 14..17 in [1 2 3 4 5] -> #0
          3: 0..2 in [7] -> #0
        ",
    );
}

#[test]
fn without_chunking_a_prefill_waits_for_a_step_with_room() {
    check(
        SchedulerConfig { max_model_len: 16, enable_chunked_prefill: false, ..config() },
        "
        add 1 tokens=0..10 max=2
        add 2 tokens=10..20 max=2
        add 3 tokens=30..32 max=2
        step
        step
        step
        ",
        "
        step 0, 10 tokens
          1: 0..10 in [0 1 2] -> #0
        step 1, 13 tokens
          1: 10..11 in [0 1 2] -> #1, Length
          2: 0..10 in [3 4 5] -> #0
          3: 0..2 in [6] -> #0
        step 2, 2 tokens
          2: 10..11 in [3 4 5] -> #1, Length
          3: 2..3 in [6] -> #1, Length
        ",
    );
}

#[test]
fn the_latest_gives_way_when_blocks_run_out_and_goes_on_where_it_was() {
    check(
        SchedulerConfig { num_blocks: 6, ..config() },
        "
        add 1 tokens=0..7 max=10
        add 2 tokens=10..14 max=9
        step
        step
        step
        step
        step
        step
        step
        step
        step
        step
        step
        ",
        "
        step 0, 11 tokens
          1: 0..7 in [0 1] -> #0
          2: 0..4 in [2] -> #0
        step 1, 2 tokens
          1: 7..8 in [0 1] -> #1
          2: 4..5 in [2 3] -> #1
        step 2, 2 tokens
          1: 8..9 in [0 1 4] -> #2
          2: 5..6 in [2 3] -> #2
        step 3, 2 tokens
          1: 9..10 in [0 1 4] -> #3
          2: 6..7 in [2 3] -> #3
        step 4, 2 tokens
          1: 10..11 in [0 1 4] -> #4
          2: 7..8 in [2 3] -> #4
        step 5, 2 tokens
          1: 11..12 in [0 1 4] -> #5
          2: 8..9 in [2 3 5] -> #5
        step 6, 1 tokens, preempted 2
          1: 12..13 in [0 1 4 2] -> #6
        step 7, 1 tokens
          1: 13..14 in [0 1 4 2] -> #7
        step 8, 1 tokens
          1: 14..15 in [0 1 4 2] -> #8
        step 9, 1 tokens
          1: 15..16 in [0 1 4 2] -> #9, Length
        step 10, 10 tokens
          2: 0..10 in [0 1 4] -> #6
        ",
    );
}

#[test]
fn a_newcomer_enters_only_when_those_that_run_can_grow_beside_it() {
    check(
        SchedulerConfig { num_blocks: 4, ..config() },
        "
        add 1 tokens=0..7 max=4
        step
        add 2 tokens=10..14 max=2
        step
        step
        step
        step
        ",
        "
        step 0, 7 tokens
          1: 0..7 in [0 1] -> #0
        step 1, 1 tokens
          1: 7..8 in [0 1] -> #1
        step 2, 1 tokens
          1: 8..9 in [0 1 2] -> #2
        step 3, 1 tokens
          1: 9..10 in [0 1 2] -> #3, Length
        step 4, 4 tokens
          2: 0..4 in [0] -> #0
        ",
    );
}

#[test]
fn a_prompt_that_begins_like_another_does_not_compute_its_beginning() {
    check(
        SchedulerConfig { enable_prefix_caching: true, ..config() },
        "
        add 1 tokens=0..9 max=1
        step
        stats
        add 2 tokens=0..11 max=2
        add 3 tokens=0..8 max=2
        add 4 tokens=0..9 max=2 salt=1
        step
        stats
        step
        stats
        ",
        "
        step 0, 9 tokens
          1: 0..9 in [0 1 2] -> #0, Length
        0 run, 0 wait; blocks: 0 used, 16 free, 2 of them cached; cache: 0 of 9 tokens
        step 1, 16 tokens
          2: 8..11 in [0 1 2] -> #0
          3: 4..8 in [0 3] -> #0
          4: 0..9 in [4 5 6] -> #0
        3 run, 0 wait; blocks: 6 used, 10 free, 0 of them cached; cache: 12 of 37 tokens
        step 2, 3 tokens
          2: 11..12 in [0 1 2] -> #1, Length
          3: 8..9 in [0 1 3] -> #1, Length
          4: 9..10 in [4 5 6] -> #1, Length
        0 run, 0 wait; blocks: 0 used, 16 free, 5 of them cached; cache: 12 of 37 tokens
        ",
    );
}

#[test]
fn equal_prompts_in_one_step_end_up_in_the_same_blocks() {
    check(
        SchedulerConfig { enable_prefix_caching: true, ..config() },
        "
        add 1 tokens=0..5 max=3
        add 2 tokens=0..5 max=3
        step
        stats
        step
        ",
        "
        step 0, 10 tokens
          1: 0..5 in [0 1] -> #0
          2: 0..5 in [2 3] -> #0
        2 run, 0 wait; blocks: 3 used, 13 free, 0 of them cached; cache: 0 of 10 tokens
        step 1, 2 tokens
          1: 5..6 in [0 1] -> #1
          2: 5..6 in [0 3] -> #1
        ",
    );
}

#[test]
fn the_cache_forgets_what_was_used_least_recently_and_ends_before_beginnings() {
    check(
        SchedulerConfig { enable_prefix_caching: true, num_blocks: 4, ..config() },
        "
        add 1 tokens=0..8 max=1
        step
        stats
        add 2 tokens=10..19 max=1
        step
        stats
        add 3 tokens=0..9 max=1
        step
        stats
        add 4 tokens=10..19 max=1
        step
        stats
        ",
        "
        step 0, 8 tokens
          1: 0..8 in [0 1] -> #0, Length
        0 run, 0 wait; blocks: 0 used, 4 free, 2 of them cached; cache: 0 of 8 tokens
        step 1, 9 tokens
          2: 0..9 in [2 3 1] -> #0, Length
        0 run, 0 wait; blocks: 0 used, 4 free, 3 of them cached; cache: 0 of 17 tokens
        step 2, 5 tokens
          3: 4..9 in [0 1 3] -> #0, Length
        0 run, 0 wait; blocks: 0 used, 4 free, 3 of them cached; cache: 4 of 26 tokens
        step 3, 5 tokens
          4: 4..9 in [2 3 1] -> #0, Length
        0 run, 0 wait; blocks: 0 used, 4 free, 3 of them cached; cache: 8 of 35 tokens
        ",
    );
}

#[test]
fn an_aborted_sequence_gives_its_blocks_back() {
    check(
        config(),
        "
        add 1 tokens=0..9 max=5
        add 2 tokens=0..3 max=5
        step
        stats
        abort 1
        stats
        step
        abort 2
        step
        ",
        "
        step 0, 12 tokens
          1: 0..9 in [0 1 2] -> #0
          2: 0..3 in [3] -> #0
        2 run, 0 wait; blocks: 4 used, 12 free, 0 of them cached; cache: 0 of 0 tokens
        1 run, 0 wait; blocks: 1 used, 15 free, 0 of them cached; cache: 0 of 0 tokens
        step 1, 1 tokens
          2: 3..4 in [3] -> #1
        idle
        ",
    );
}

#[test]
fn what_can_never_run_is_refused_with_a_sentence() {
    check(
        SchedulerConfig { max_num_waiting: 1, num_blocks: 8, ..config() },
        "
        add 1 tokens=0..0
        add 1 tokens=0..1 max=0
        add 1 tokens=0..64
        add 1 tokens=0..30 max=4
        add 1 tokens=0..30 max=3
        add 1 tokens=0..1
        add 2 tokens=0..1
        stats
        ",
        "
        sequence 1: the prompt is empty; it needs at least one token
        sequence 1: max_tokens is 0; it must be at least 1
        sequence 1: the prompt has 64 tokens, and max_model_len (64) allows 63
        sequence 1: up to 34 tokens need 9 KV blocks, and the cache has 8
        sequence 1 is already waiting or running
        the queue is full: 1 requests wait, and max_num_waiting is 1
        0 run, 1 wait; blocks: 0 used, 8 free, 0 of them cached; cache: 0 of 0 tokens
        ",
    );
}
