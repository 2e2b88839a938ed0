//! A rank that panics, dies or stalls ends the run within its deadline, with an error that names it, and nothing is left
//! behind. Ranks that are processes give the bits of those that are threads.

mod common;

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::children::{Started, be_a_rank, last_words, processes};
use common::moves::{movable, move_on};
use common::plans::{Subject, assert_same_bits, ep, exact_config, file, requests, results, results_with, separate};
use common::{GoldenModel, greedy, prompt};
use moesaic_engine::balance::{Decision, LoadStats, Move};
use moesaic_engine::{Engine, EngineConfig, Launch, Ranks, launch_plan};
use moesaic_plan::plan::Mesh;
use moesaic_plan::{ExpertId, Placement, PlanFile, Rank};
use moesaic_spec::ModelSpec;

/// Longest wait of a rank for another.
const DEADLINE: Duration = Duration::from_secs(1);
/// What a run may take to end on a machine that does much else: the leader waits half as long again as ranks, and two
/// seconds.
const MOST: Duration = Duration::from_secs(8);

fn config() -> EngineConfig {
    EngineConfig { deadline: DEADLINE, ..exact_config() }
}

/// Not a test of its own: what processes do.
#[test]
fn child() {
    be_a_rank();
}

fn golden(name: &str) -> (GoldenModel, ModelSpec) {
    let model = GoldenModel::open(name);
    let spec = model.without_capacity();
    (model, spec)
}

/// A run in its middle.
fn begin(engine: &mut Engine, spec: &ModelSpec) {
    for seed in 0..6 {
        engine.add(greedy(&prompt(seed, 12, spec.vocab_size), 40)).unwrap();
    }
    for _ in 0..5 {
        engine.step().unwrap();
    }
}

#[test]
fn processes_give_the_bits_of_threads_and_of_one_rank() {
    let (model, spec) = golden("qwen3_moe");
    let weights = Launch::Checkpoint(&model.checkpoint);
    let subject = Subject { name: "qwen3_moe", spec: &spec, weights: &weights };
    let single = results(&mut subject.single(&config()), &requests(&spec));
    let tp_pp = PlanFile { micro_batches: 2, ..file(Mesh { tp: 2, pp: 2, dp: 1, ep: 1 }, 4) };
    for (what, file, is_exact) in [
        ("EP", ep(4, &spec), true),
        ("MA by requests", separate(1, 3, 2, &spec), true),
        ("MA by heads", separate(2, 1, 2, &spec), false),
        ("TP=2, PP=2", tp_pp, false),
    ] {
        let started = Started::default();
        let mut engine = processes(&subject, file.clone(), &config(), &started).unwrap();
        let of_processes = results(&mut engine, &requests(&spec));
        drop(engine);
        started.assert_nothing_is_left();
        let of_threads = results(&mut subject.many(&subject.plan(file), &config()), &requests(&spec));
        assert_same_bits(what, &of_threads, &of_processes);
        if is_exact {
            assert_same_bits(what, &single, &of_processes);
        }
    }
}

#[test]
fn experts_move_between_processes() {
    let (model, spec) = golden("deepseek_v3");
    let weights = Launch::Checkpoint(&model.checkpoint);
    let subject = Subject { name: "deepseek_v3", spec: &spec, weights: &weights };
    let single = results(&mut subject.single(&config()), &requests(&spec));
    let started = Started::default();
    let file = movable(ep(3, &spec));
    let plan = subject.plan(file.clone());
    let mut engine = processes(&subject, file, &config(), &started).unwrap();
    let many = results_with(&mut engine, &requests(&spec), |engine| {
        move_on(engine, &plan);
    });
    assert!(engine.adaptation().placement().epoch > 1);
    assert_same_bits("processes", &single, &many);
}

#[test]
fn a_killed_process_is_named() {
    let (model, spec) = golden("qwen3_moe");
    let weights = Launch::Checkpoint(&model.checkpoint);
    let subject = Subject { name: "qwen3_moe", spec: &spec, weights: &weights };
    for (file, rank) in [(ep(4, &spec), 2), (separate(1, 2, 2, &spec), 3), (ep(4, &spec), 0)] {
        let started = Started::default();
        let mut engine = processes(&subject, file, &config(), &started).unwrap();
        begin(&mut engine, &spec);
        started.signal(rank, "-KILL");
        let error = last_words(&mut engine, MOST);
        assert_eq!(error, format!("the process of rank {rank} has ended (signal: 9 (SIGKILL))"));
        drop(engine);
        started.assert_nothing_is_left();
    }
}

#[test]
fn a_stopped_process_is_named_by_the_deadline() {
    let (model, spec) = golden("qwen3_moe");
    let weights = Launch::Checkpoint(&model.checkpoint);
    let subject = Subject { name: "qwen3_moe", spec: &spec, weights: &weights };
    // In a pipeline others wait for who waits for it.
    let pipeline = PlanFile { moe: ep(2, &spec).moe, ..file(Mesh { tp: 1, pp: 2, dp: 2, ep: 2 }, 4) };
    for (file, rank) in [(ep(4, &spec), 2), (separate(1, 2, 2, &spec), 3), (pipeline, 0)] {
        let started = Started::default();
        let mut engine = processes(&subject, file, &config(), &started).unwrap();
        begin(&mut engine, &spec);
        started.signal(rank, "-STOP");
        let error = last_words(&mut engine, MOST);
        assert!(error.contains(&format!(" waited 1.0 s for rank {rank}: ")), "rank {rank}: {error}");
        let start = Instant::now();
        drop(engine);
        assert!(start.elapsed() < MOST, "{:?}", start.elapsed());
        started.assert_nothing_is_left();
    }
}

#[test]
fn a_process_that_never_becomes_a_rank_is_named() {
    let (model, spec) = golden("qwen3_moe");
    let weights = Launch::Checkpoint(&model.checkpoint);
    let subject = Subject { name: "qwen3_moe", spec: &spec, weights: &weights };
    let plan = subject.plan(ep(2, &spec));
    let config = EngineConfig { deadline: Duration::from_millis(200), ..config() };
    for (program, expected) in
        [("false", "the process of rank 1 has ended (exit status: 1)"), ("cat", "rank 1 has not answered for 2.3 s")]
    {
        let started = Started::default();
        let spawn = |rank: Rank, folder: &Path| match rank {
            Rank(1) => {
                let mut command = Command::new(program);
                started.note(command.stdin(Stdio::piped()).stdout(Stdio::null()).spawn()?, folder)
            }
            _ => started.spawn(rank, folder, "qwen3_moe"),
        };
        let start = Instant::now();
        let engine = launch_plan(&spec, &weights, &plan, &config, Ranks::Processes(&spawn), |_| ());
        assert_eq!(engine.err().unwrap().to_string(), expected);
        assert!(start.elapsed() < MOST);
        started.assert_nothing_is_left();
    }
}

/// A decision that our balancer never makes: who is to send does not have the expert.
fn impossible(placement: &Placement, from: Rank, to: Rank) -> Decision {
    let layer = placement.layers.iter().position(Option::is_some).unwrap();
    let placed = placement.layers[layer].as_ref().unwrap();
    let elsewhere = placed.replicas.iter().position(|holders| !holders.contains(&from)).unwrap();
    let moves = vec![Move { layer, expert: ExpertId(elsewhere as u32), from, to }];
    let placement = Placement { epoch: placement.epoch + 1, ..placement.clone() };
    let (before, after) = (LoadStats::default(), LoadStats::default());
    Decision { placement, moves, before, after, gains: Vec::new(), p_value: 0.0 }
}

#[test]
fn a_rank_that_panics_is_named() {
    let (model, spec) = golden("qwen3_moe");
    let weights = Launch::Checkpoint(&model.checkpoint);
    let subject = Subject { name: "qwen3_moe", spec: &spec, weights: &weights };
    let file = movable(ep(4, &spec));
    let started = Started::default();
    for is_process in [false, true] {
        let mut engine = match is_process {
            false => subject.many(&subject.plan(file.clone()), &config()),
            true => processes(&subject, file.clone(), &config(), &started).unwrap(),
        };
        begin(&mut engine, &spec);
        let decision = impossible(engine.adaptation().placement(), Rank(2), Rank(1));
        engine.adaptation().migrate(&decision);
        let error = last_words(&mut engine, MOST);
        assert_eq!(error, "rank 2 panicked: a move starts where the expert lives");
        let start = Instant::now();
        drop(engine);
        assert!(start.elapsed() < MOST, "{:?}", start.elapsed());
    }
    started.assert_nothing_is_left();
}

/// Of two ranks that sum something one comes first; it finds nothing there, and may not wait.
#[test]
fn a_thread_whose_peer_does_not_answer_says_for_whom_it_waited() {
    let (model, spec) = golden("qwen3_moe");
    let weights = Launch::Checkpoint(&model.checkpoint);
    let subject = Subject { name: "qwen3_moe", spec: &spec, weights: &weights };
    let plan = subject.plan(file(Mesh { tp: 2, pp: 1, dp: 1, ep: 1 }, 2));
    let mut engine = subject.many(&plan, &EngineConfig { deadline: Duration::ZERO, ..config() });
    engine.add(greedy(&prompt(0, 20, spec.vocab_size), 4)).unwrap();
    let error = last_words(&mut engine, MOST);
    let waited = |rank, peer| format!("rank {rank} waited 0.0 s for rank {peer}: partial ");
    assert!(error.starts_with(&waited(0, 1)) || error.starts_with(&waited(1, 0)), "{error}");
}
