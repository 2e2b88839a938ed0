//! A report of made-up models: five ways to spread 16 layers of 16 experts over 16 GPUs, priced by the real clock.
//!
//! ```sh
//! cargo run -p moesaic-planner --example sample_report -- /tmp/report            # .html .md .txt .json
//! cargo run -p moesaic-planner --example sample_report -- /tmp/large large       # 58 layers, 256 experts, 1,000 ranks
//! ```

use std::sync::Arc;

use moesaic_device::op_log::{Amount, OpCall, Peer};
use moesaic_plan::{Action, AllReduce, Lane, MessageKind, Peers, Rank, Schedule, Work};
use moesaic_planner::clock::StepTimes;
use moesaic_planner::metrics::{
    Communication, ExpertLoad, Imbalance, LayerLoad, Performance, RankMemory, RequestTimes,
};
use moesaic_planner::report::{
    BalanceReport, ClusterFacts, Comparison, ExchangeError, ModelFacts, Sameness, StrategyReport, SynchronizerReport,
    Timeline, WorkloadFacts,
};
use moesaic_planner::trace::ChromeTrace;
use moesaic_planner::{ActionRecord, ClockSettings, PlannerError, RankStep, StepInput, VirtualClock};
use moesaic_spec::{Bytes, Cluster, DType, Energy, Gpu, Link, PeakFlops};

const GIB: u64 = 1 << 30;
const LAYERS: u32 = 16;
const STEPS: u64 = 24;
/// Bytes of one token's row.
const ROW: u64 = 2 * 4096;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let path = arguments.next().unwrap_or_else(|| "sample".to_owned());
    let large = arguments.next().is_some_and(|argument| argument == "large");
    let cluster = a100(if large { 250 } else { 4 });
    let mut comparison = compare(&cluster)?;
    if large {
        enlarge(&mut comparison);
    }
    std::fs::write(format!("{path}.html"), comparison.to_html())?;
    std::fs::write(format!("{path}.md"), comparison.to_markdown())?;
    std::fs::write(format!("{path}.txt"), comparison.to_text())?;
    std::fs::write(format!("{path}.json"), comparison.to_json())?;
    let separated = run(&cluster, &mut separation(2), 3, Some(std::fs::File::create(format!("{path}.trace.json"))?))?;
    println!(
        "{}\nthe trace ends at {:.3} ms",
        comparison.to_text(),
        1e3 * separated.last().map_or(0.0, StepTimes::end)
    );
    Ok(())
}

fn compare(cluster: &Cluster) -> Result<Comparison, PlannerError> {
    let model = ModelFacts {
        name: "sample-moe".to_owned(),
        params_total: 22_300_000_000,
        params_active: 3_100_000_000,
        layers: 16,
        moe_layers: 16,
        experts: 16,
        top_k: 2,
        dtype: "BF16".to_owned(),
    };
    let workload = WorkloadFacts {
        name: "chat".to_owned(),
        num_requests: 256,
        input_tokens: (128, 512),
        output_tokens: (128, 128),
        seed: 7,
    };
    let mut comparison = Comparison::new(model, ClusterFacts::of(cluster), workload);
    comparison.notes.push("The numbers of this page come from a made-up model; only the clock is real.".to_owned());
    let exact = Sameness { answers: 64, tokens: 32_768, ..Sameness::default() };
    let summed = Sameness { max_logprob_difference: 3.1e-6, ..exact };
    let ways: [(&str, &str, Script, Sameness); 5] = [
        ("TP=8", "two replicas of eight ranks that share every matrix", tensor(8, 1), summed),
        ("PP=2", "two stages of eight layers, eight replicas", tensor(1, 2), exact),
        ("TP=8 + PP=2", "two stages of eight ranks that share every matrix", tensor(8, 2), summed),
        (
            "EP=16",
            "attention data-parallel, one expert of each layer on each rank, two micro-batches",
            expert(2),
            exact,
        ),
        ("MA 12+4", "attention on 12 ranks, experts on 4, two micro-batches in turn", separation(2), exact),
    ];
    for (idx, (name, description, script, sameness)) in ways.into_iter().enumerate() {
        let mut report = report(cluster, &script)?;
        report.name = name.to_owned();
        report.description = description.to_owned();
        report.baseline = idx < 3;
        report.sameness = Some(sameness);
        comparison.strategies.push(report);
    }
    let [.., experts, separated] = &mut comparison.strategies[..] else { unreachable!("there are five") };
    experts.balance = Some(BalanceReport {
        before: Imbalance { max_over_mean: 1.94, std_dev: 0.031 },
        after: Imbalance { max_over_mean: 1.11, std_dev: 0.0052 },
        moves: 37,
        bytes_moved: 37 * (96 << 20),
        seconds: 0.151,
    });
    separated.exchange_error = Some(ExchangeError { precision: "int8".to_owned(), relative: 0.0061 });
    separated.sameness = Some(Sameness {
        differing_answers: 2,
        differing_tokens: 211,
        max_logprob_difference: 0.084,
        widest_tie: Some(0.031),
        ..exact
    });
    separated.synchronizer =
        Some(SynchronizerReport { mlp_error: Some(0.031), linear_error: 0.058, choices: 12, mlp_used: true });
    separated.notes.push("8-bit exchange moves logits; without it tokens are those of one rank.".to_owned());
    Ok(comparison)
}

fn report(cluster: &Cluster, script: &Script) -> Result<StrategyReport, PlannerError> {
    let ranks = script.ranks.len();
    let mut clock = VirtualClock::new(cluster, settings(ranks));
    let mut requests = vec![RequestTimes::default(); 256];
    let mut timeline = Timeline::default();
    let mut script = script.clone();
    for step in 0..STEPS {
        let times = clock.step(script.input())?;
        script.know_tokens(&times);
        let sampled: Vec<f64> = times.sampled.iter().flatten().flatten().copied().collect();
        for (request, times) in requests.iter_mut().enumerate() {
            times.tokens.push(sampled[request % sampled.len()]);
        }
        if step == STEPS / 2 {
            timeline = Timeline::of(&times, &script.schedules);
        }
    }
    let totals = clock.finish();
    Ok(StrategyReport {
        ranks,
        performance: Performance::of(&totals, &requests, cluster, DType::BF16),
        communication: Communication::of(&totals, cluster),
        memory: script.memory.clone(),
        expert_load: Some(loads(LAYERS as usize, 16)),
        timeline: Some(timeline),
        ..StrategyReport::default()
    })
}

/// Some steps, written as a trace.
fn run(
    cluster: &Cluster,
    script: &mut Script,
    steps: u64,
    trace: Option<std::fs::File>,
) -> Result<Vec<StepTimes>, PlannerError> {
    let mut clock = VirtualClock::new(cluster, settings(script.ranks.len()));
    let mut times = Vec::new();
    for _ in 0..steps {
        times.push(clock.step(script.input())?);
        script.know_tokens(&times[times.len() - 1]);
    }
    if let Some(file) = trace {
        let names: Vec<String> = (0..script.ranks.len()).map(|rank| format!("GPU {rank}")).collect();
        let mut trace = ChromeTrace::new(std::io::BufWriter::new(file), &names, steps)?;
        times.iter().try_for_each(|times| trace.step(times, &script.schedules))?;
        trace.finish()?;
    }
    Ok(times)
}

fn settings(world_size: usize) -> ClockSettings {
    ClockSettings { world_size, dtype: DType::BF16, kind_of, keep_ops: true }
}

const KINDS: [MessageKind; 5] =
    [MessageKind::Hidden, MessageKind::Attention, MessageKind::Mlp, MessageKind::Dispatch, MessageKind::Answer];

fn tag(kind: MessageKind, layer: u32, micro_batch: u32, round: u64) -> u64 {
    let kind = KINDS.iter().position(|&known| known == kind).expect("one of those above") as u64;
    ((u64::from(layer) * 8 + u64::from(micro_batch)) * 4 + round) * 8 + kind
}

fn kind_of(tag: u64) -> MessageKind {
    KINDS[(tag % 8) as usize]
}

/// The same step of all ranks.
#[derive(Clone)]
struct Script {
    /// Of each rank: ranks whose tokens it works on.
    replicas: Vec<std::ops::Range<usize>>,
    schedules: Vec<Schedule>,
    ranks: Vec<RankStep>,
    ready: Vec<Vec<f64>>,
    memory: Vec<RankMemory>,
}

/// Where an action is: layer, micro-batch.
type At = (u32, u32);

impl Script {
    fn new(memory: Vec<RankMemory>) -> Script {
        let ranks = memory.len() as u32;
        Script {
            schedules: (0..ranks).map(|rank| Schedule { rank: Rank(rank), actions: Vec::new() }).collect(),
            ranks: vec![RankStep::default(); ranks as usize],
            replicas: (0..memory.len()).map(|rank| rank..rank + 1).collect(),
            ready: Vec::new(),
            memory,
        }
    }

    /// The next step's tokens are those that this one sampled.
    fn know_tokens(&mut self, times: &StepTimes) {
        let ready = self.replicas.iter().map(|replica| {
            let of = |micro_batch: usize| {
                let sampled =
                    times.sampled[replica.clone()].iter().filter_map(|of_rank| of_rank.get(micro_batch)?.as_ref());
                sampled.fold(0.0, |last: f64, &at| last.max(at))
            };
            (0..4).map(of).collect()
        });
        self.ready = ready.collect();
    }

    fn input(&self) -> StepInput<'_> {
        StepInput { schedules: &self.schedules, ranks: &self.ranks, ready: &self.ready }
    }

    fn add(&mut self, rank: u32, (layer, micro_batch): At, (work, lane): (Work, Lane), calls: Vec<OpCall>) -> u32 {
        let actions = &mut self.schedules[rank as usize].actions;
        // After the micro-batch's last action.
        let last = actions.iter().rposition(|action| action.micro_batch == micro_batch);
        let idx = actions.len();
        let after = last.into_iter().map(|last| last as u32).collect();
        actions.push(Action { work, layer, micro_batch, lane, after });
        self.ranks[rank as usize].actions.push(ActionRecord { action: idx, calls });
        idx as u32
    }

    fn compute(&mut self, rank: u32, at: At, work: Work, ops: &[(&'static str, f64, u64)]) {
        let ops = ops.iter().map(|&(op, gflops, bytes)| OpCall::compute(op, &[], (1e9 * gflops) as u64, bytes));
        self.add(rank, at, (work, Lane::Compute), ops.collect());
    }

    fn all_reduce(&mut self, rank: u32, at: At, group: &Peers, of: MessageKind, tokens: u64) {
        let part = tokens * ROW / group.len() as u64;
        let mut calls = Vec::new();
        for round in 0..2 {
            let tag = tag(of, at.0, at.1, round);
            let others = || group.iter().filter(|peer| peer.0 != rank);
            calls.extend(others().map(|peer| message(peer.0, tag, true, part)));
            calls.extend(others().map(|peer| message(peer.0, tag, false, part)));
            calls.push(OpCall::compute("add", &[], 0, 2 * part));
        }
        let work = Work::AllReduce { of, group: group.clone(), algorithm: AllReduce::Flat };
        self.add(rank, at, (work, Lane::Comm), calls);
    }
}

fn message(rank: u32, tag: u64, outbound: bool, bytes: u64) -> OpCall {
    OpCall::message(Peer { rank, tag, outbound }, Amount::exact(bytes))
}

fn peers(ranks: impl Iterator<Item = u32>) -> Peers {
    Arc::from(ranks.map(Rank).collect::<Vec<_>>())
}

/// Groups of `tp` ranks in `pp` stages; the rest of the 16 are replicas.
fn tensor(tp: u32, pp: u32) -> Script {
    let replicas = 16 / (tp * pp);
    let tokens = u64::from(256 / replicas / pp);
    let cut = f64::from(tp);
    let part = |gib: f64| (gib * GIB as f64) as u64;
    let memory = RankMemory {
        parts: parts(part(41.6 / cut / f64::from(pp)), part(64.0 / 16.0), part(1.6), part(0.7)),
        available: 80 * GIB,
    };
    let mut script = Script::new(vec![memory; 16]);
    let size = (tp * pp) as usize;
    script.replicas = (0..16).map(|rank| rank / size * size..(rank / size + 1) * size).collect();
    for rank in 0..16 {
        let (stage, place) = (rank % (tp * pp) / tp, rank % tp);
        let group = peers((rank - place)..(rank - place + tp));
        // Each stage has as many micro-batches as there are stages.
        for layer in stage * LAYERS / pp..(stage + 1) * LAYERS / pp {
            for micro_batch in 0..pp {
                let at = (layer, micro_batch);
                if layer > 0 && layer == stage * LAYERS / pp {
                    let hidden = message(rank - tp, tag(MessageKind::Hidden, 0, micro_batch, 0), false, tokens * ROW);
                    script.add(rank, at, (Work::ReceiveHidden { from: Rank(rank - tp) }, Lane::Compute), vec![hidden]);
                }
                let attention = tokens as f64 * 0.14 / cut;
                let cache = (tokens as f64 * 1.1e6 / cut) as u64;
                script.compute(
                    rank,
                    at,
                    Work::Attention,
                    &[
                        ("linear", attention, (134e6 / cut) as u64),
                        ("attention", attention / 9.0, cache),
                        ("linear", attention / 3.0, (34e6 / cut) as u64),
                    ],
                );
                if tp > 1 {
                    script.all_reduce(rank, at, &group, MessageKind::Attention, tokens);
                }
                let experts = Work::Experts { from: group.clone(), relays: peers(0..0) };
                script.compute(rank, at, Work::Route, &[("router", 0.01, 1 << 20)]);
                script.compute(
                    rank,
                    at,
                    experts,
                    &[("grouped_linear", tokens as f64 * 0.2 / cut, (2.4e9 / cut) as u64)],
                );
                if tp > 1 {
                    script.all_reduce(rank, at, &group, MessageKind::Mlp, tokens);
                }
            }
        }
        for micro_batch in 0..pp {
            let at = ((stage + 1) * LAYERS / pp - 1, micro_batch);
            if stage + 1 < pp {
                let hidden = message(rank + tp, tag(MessageKind::Hidden, 0, micro_batch, 0), true, tokens * ROW);
                script.add(rank, at, (Work::SendHidden { to: Rank(rank + tp) }, Lane::Comm), vec![hidden]);
            } else {
                script.compute(rank, at, Work::Head, &[("linear", tokens as f64 * 0.26 / cut, (262e6 / cut) as u64)]);
                script.compute(rank, at, Work::Sample, &[("sample", 0.0, 1 << 20)]);
            }
        }
    }
    script
}

/// Everybody has attention and one expert of each layer.
fn expert(micro_batches: u32) -> Script {
    let memory = |rank: u64| RankMemory {
        parts: parts(7 * GIB + (rank % 3) * GIB / 8, 4 * GIB, 19 * GIB / 10, 13 * GIB / 10),
        available: 80 * GIB,
    };
    let mut script = Script::new((0..16).map(memory).collect());
    exchange(&mut script, (0..16).collect(), (0..16).collect(), micro_batches);
    script
}

/// Attention on ranks 0 to 11, four experts of each layer on each of 12 to 15.
fn separation(micro_batches: u32) -> Script {
    let attention = RankMemory { parts: parts(3 * GIB, 11 * GIB / 2, 3 * GIB / 2, 6 * GIB / 10), available: 80 * GIB };
    let experts = RankMemory { parts: parts(10 * GIB, 0, 26 * GIB / 10, 18 * GIB / 10), available: 80 * GIB };
    let mut script = Script::new([vec![attention; 12], vec![experts; 4]].concat());
    exchange(&mut script, (0..12).collect(), (12..16).collect(), micro_batches);
    script
}

fn exchange(script: &mut Script, attention: Vec<u32>, experts: Vec<u32>, micro_batches: u32) {
    let tokens = 256.0 / attention.len() as f64 / f64::from(micro_batches);
    let load = loads(LAYERS as usize, experts.len());
    // Rows from one rank to another.
    let rows = |layer: u32, to: usize| {
        let layer = &load.layers[layer as usize].tokens;
        let share = layer[to] as f64 / layer.iter().sum::<u64>() as f64;
        (2.0 * tokens * share).round().max(1.0) as u64
    };
    for layer in 0..LAYERS {
        for micro_batch in 0..micro_batches {
            let at = (layer, micro_batch);
            let tag_of = |kind| tag(kind, layer, micro_batch, 0);
            for &rank in &attention {
                if layer > 0 {
                    combine(script, rank, (layer - 1, micro_batch), &experts, &rows);
                }
                script.compute(
                    rank,
                    at,
                    Work::Attention,
                    &[
                        ("linear", tokens * 0.14, 134_000_000),
                        ("attention", tokens * 0.015, (tokens * 1.1e6) as u64),
                        ("linear", tokens * 0.05, 34_000_000),
                    ],
                );
                script.compute(rank, at, Work::Route, &[("router", 0.01, 1 << 20)]);
                let to = peers(experts.iter().copied().filter(|&to| to != rank));
                let sends = experts.iter().enumerate().filter(|&(_, &to)| to != rank);
                let sends =
                    sends.map(|(idx, &to)| message(to, tag_of(MessageKind::Dispatch), true, ROW * rows(layer, idx)));
                script.add(rank, at, (Work::Dispatch { to }, Lane::Comm), sends.collect());
            }
            for (idx, &rank) in experts.iter().enumerate() {
                let from = || attention.iter().copied().filter(|&from| from != rank);
                let bytes = ROW * rows(layer, idx);
                let mut calls: Vec<OpCall> =
                    from().map(|from| message(from, tag_of(MessageKind::Dispatch), false, bytes)).collect();
                let all_rows = rows(layer, idx) * attention.len() as u64;
                let weights = 16 / experts.len() as u64 * 150_000_000;
                calls.push(OpCall::compute("grouped_linear", &[], all_rows * 100_000_000, weights));
                let work = Work::Experts { from: peers(from()), relays: peers(0..0) };
                script.add(rank, at, (work, Lane::Compute), calls);
                let answers = from().map(|to| message(to, tag_of(MessageKind::Answer), true, bytes));
                script.add(rank, at, (Work::Answer { to: peers(from()) }, Lane::Comm), answers.collect());
            }
        }
    }
    for &rank in &attention {
        for micro_batch in 0..micro_batches {
            let at = (LAYERS - 1, micro_batch);
            combine(script, rank, at, &experts, &rows);
            script.compute(rank, at, Work::Head, &[("linear", tokens * 0.26, 262_000_000)]);
            script.compute(rank, at, Work::Sample, &[("sample", 0.0, 1 << 20)]);
        }
    }
}

fn combine(script: &mut Script, rank: u32, at: At, experts: &[u32], rows: &dyn Fn(u32, usize) -> u64) {
    let tag = tag(MessageKind::Answer, at.0, at.1, 0);
    let answers = experts.iter().enumerate().filter(|&(_, &from)| from != rank);
    let mut calls: Vec<OpCall> = answers.map(|(idx, &from)| message(from, tag, false, ROW * rows(at.0, idx))).collect();
    calls.push(OpCall::compute("combine", &[], 0, 1 << 20));
    let from = peers(experts.iter().copied().filter(|&from| from != rank));
    script.add(rank, at, (Work::Combine { from }, Lane::Compute), calls);
}

fn parts(weights: u64, kv_cache: u64, activations: u64, messages: u64) -> Vec<(String, u64)> {
    let parts = [("weights", weights), ("KV cache", kv_cache), ("activations", activations), ("messages", messages)];
    parts.map(|(name, bytes)| (name.to_owned(), bytes)).to_vec()
}

/// Uneven loads that follow no pattern.
fn loads(layers: usize, experts: usize) -> ExpertLoad {
    let mut state = 12_345u64;
    let mut random = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as f64 / (1u64 << 31) as f64
    };
    let mut layer = |layer: usize| LayerLoad {
        layer,
        tokens: (0..experts).map(|_| (900.0 * (0.6 + random() + 3.0 * random().powi(12))) as u64).collect(),
    };
    ExpertLoad { layers: (0..layers).map(&mut layer).collect() }
}

/// The same results as if of a larger model and 1,000 ranks.
fn enlarge(comparison: &mut Comparison) {
    comparison.model.layers = 61;
    comparison.model.moe_layers = 58;
    comparison.model.experts = 256;
    comparison.model.top_k = 8;
    for strategy in &mut comparison.strategies {
        strategy.ranks = 1000;
        let mut load = loads(58, 256);
        load.layers.iter_mut().for_each(|layer| layer.layer += 3);
        strategy.expert_load = Some(load);
        strategy.memory = (0..1000).map(|rank| strategy.memory[rank * 16 / 1000].clone()).collect();
        if let Some(timeline) = &mut strategy.timeline {
            timeline.ranks = 1000;
            timeline.rows = (0..32).map(|row| timeline.rows[row / 2].clone()).collect();
            timeline.rows.iter_mut().zip(0u32..).for_each(|(row, idx)| row.rank = idx * 1000 / 32);
        }
    }
}

/// Nodes of four A100 with one HDR link.
fn a100(nodes: usize) -> Cluster {
    Cluster {
        name: format!("{} × A100 80 GB", 4 * nodes),
        nodes,
        gpus_per_node: 4,
        gpu: Gpu {
            name: "A100 80 GB".to_owned(),
            memory: Bytes(80 * GIB),
            peak_flops: PeakFlops { bf16: 312e12, f8: 312e12, f4: 312e12, f32: 19.5e12 },
            compute_utilization: 0.6,
            memory_bandwidth: 2.039e12,
            memory_utilization: 0.8,
            launch_s: 4e-6,
            sms: 132,
            power: None,
            usd_per_hour: None,
        },
        intra_node: Link {
            name: "NVLink 3".to_owned(),
            bandwidth_per_gpu: 300e9,
            bandwidth_per_node: 1200e9,
            utilization: 0.8,
            latency_s: 3e-6,
        },
        inter_node: Some(Link {
            name: "HDR 200 Gb/s".to_owned(),
            bandwidth_per_gpu: 25e9,
            bandwidth_per_node: 25e9,
            utilization: 0.9,
            latency_s: 5e-6,
        }),
        rank_map: Vec::new(),
        energy: Energy::default(),
    }
}
