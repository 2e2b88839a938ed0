//! What many ranks cost beside one on the same requests: processor time of the whole process, and wall time.
//!
//! `cargo run --release -p moesaic-engine --example ranks_bench [WORD…]`. All ranks are threads of this process with one
//! thread each. Rounds of one rank and of every plan take turns; medians of rounds, the first one dropped. With words only
//! those models, workloads and plans run whose names contain one of them (a model or workload that no word names is run).
//!
//! A product of few rows reads the same weights as one of many, so ranks that share the rows read more. How much of a ratio
//! that is shows in two ways. *compute* and *exchange* are the actions of both kinds by their own processor time over all of
//! one rank's, in one more round; *rest* is what is left of that round: commands, replies, wakes. And "one rank, by 2" is one
//! rank with as many sequences at a time as each of 16 has, experts included.

use std::collections::BTreeMap;
use std::error::Error;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use moesaic_device::process_time;
use moesaic_engine::{Engine, EngineConfig, Launch, Ranks, Request, SamplingParams, launch_plan};
use moesaic_model::Checkpoint;
use moesaic_model::checkpoint::RandomWeights;
use moesaic_plan::plan::{AttentionPlan, Mesh};
use moesaic_plan::{Plan, PlanFile, Rank, Schedule, Setting, Strategy};
use moesaic_spec::model::scale::Scale;
use moesaic_spec::workload::TokenRange;
use moesaic_spec::{Arrival, ModelSpec, Workload, cluster_preset};

const CLUSTER: &str = "a100-4x4";
/// Rounds of a model, the dropped one included: a small model's are short.
const ROUNDS: [(&str, usize); 2] = [("tiny-moe", 12), ("mixtral-512", 4)];

type Result<T> = std::result::Result<T, Box<dyn Error>>;

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with("--")).collect();
    let rounds = ROUNDS.into_iter().filter(|(name, _)| chosen(&words, name, &ROUNDS.map(|(name, _)| name)));
    for (model, num_rounds) in rounds {
        let (spec, weights) = open(model)?;
        let workloads = workloads();
        let names: Vec<&str> = workloads.iter().map(|workload| workload.name.as_str()).collect();
        for workload in workloads.iter().filter(|workload| chosen(&words, &workload.name, &names)) {
            let bench = Bench { model, spec: &spec, weights: &weights, workload, num_rounds };
            bench.run(&words)?;
        }
    }
    Ok(())
}

/// Whether a word names it, or none names any of its kind.
fn chosen(words: &[String], name: &str, all: &[&str]) -> bool {
    let named = |name: &str| words.iter().any(|word| name.contains(word.as_str()));
    named(name) || !all.iter().any(|name| named(name))
}

fn open(name: &str) -> Result<(ModelSpec, Launch<'static>)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    if name == "tiny-moe" {
        let folder = root.join("examples/tiny-moe");
        let checkpoint: &'static Checkpoint = Box::leak(Box::new(Checkpoint::open(&folder)?));
        let config = std::fs::read_to_string(folder.join("config.json"))?;
        return Ok((ModelSpec::from_config_json(&config, "config.json")?, Launch::Checkpoint(checkpoint)));
    }
    let config = std::fs::read_to_string(root.join("bench/peers/model.json"))?;
    let spec = ModelSpec::from_config_json(&config, "model.json")?;
    let scale = Scale { hidden: Some(512), intermediate: Some(1024), ..Scale::default() };
    Ok((spec.scaled(&scale)?, Launch::Random(RandomWeights { seed: 1 })))
}

fn workloads() -> [Workload; 4] {
    let workload = |name: &str, num_requests, input: (usize, usize), output: (usize, usize)| Workload {
        name: name.into(),
        num_requests,
        input_tokens: TokenRange { min: input.0, max: input.1 },
        output_tokens: TokenRange { min: output.0, max: output.1 },
        seed: 1,
        arrival: Arrival::AtStart,
        prefix_hit: 0.0,
    };
    [
        workload("chat-small", 32, (16, 64), (24, 32)),
        workload("decode-64", 64, (8, 8), (48, 48)),
        workload("decode-256", 256, (8, 8), (32, 32)),
        workload("prefill", 64, (128, 256), (1, 1)),
    ]
}

/// One model under one workload.
struct Bench<'a> {
    model: &'a str,
    spec: &'a ModelSpec,
    weights: &'a Launch<'a>,
    workload: &'a Workload,
    num_rounds: usize,
}

/// A plan, ready to run.
struct Contender {
    name: String,
    plan: Arc<Plan>,
    engine: Engine,
    /// Sequences at a time, of each group.
    max_num_seqs: usize,
    /// Processor and wall time of each round.
    rounds: Vec<(f64, f64)>,
}

impl Bench<'_> {
    fn run(&self, words: &[String]) -> Result<()> {
        let plans = self.plans()?;
        let names: Vec<&str> = plans.iter().map(|(name, _)| name.as_str()).collect();
        let mut contenders = Vec::new();
        let single = Plan::single(self.spec);
        contenders.push(self.contender("one rank", single.clone(), self.workload.num_requests)?);
        if chosen(words, "one rank, by", &names) {
            let few = self.workload.num_requests.div_ceil(16);
            contenders.push(self.contender(&format!("one rank, by {few}"), single, few)?);
        }
        for (name, file) in &plans {
            if chosen(words, name, &names) {
                let plan = Plan::new(file.clone(), self.spec, &cluster_preset(CLUSTER)?)?;
                let max_num_seqs = self.workload.num_requests.div_ceil(plan.num_groups());
                contenders.push(self.contender(name, plan, max_num_seqs)?);
            }
        }
        for _ in 0..self.num_rounds {
            for contender in &mut contenders {
                let requests = self.requests();
                let (cpu, wall) = (process_time(), Instant::now());
                run(&mut contender.engine, requests, |_| ())?;
                contender.rounds.push((process_time() - cpu, wall.elapsed().as_secs_f64()));
            }
        }
        println!("{}, {}: {} requests", self.model, self.workload.name, self.workload.num_requests);
        println!(
            "{:<18} {:>9} {:>9} {:>9} {:>9}   {:>8} {:>8} {:>8}",
            "", "cpu s", "x", "wall s", "x", "compute", "exchange", "rest"
        );
        let mut one_rank = None;
        for contender in contenders {
            let (cpu, wall) = (median(&contender.rounds, |round| round.0), median(&contender.rounds, |round| round.1));
            let (one_cpu, one_wall) = *one_rank.get_or_insert((cpu, wall));
            let Contender { name, plan, engine, max_num_seqs, .. } = contender;
            drop(engine);
            let [compute, exchange, rest] = self.by_kind(plan, max_num_seqs)?.map(|seconds| seconds / one_cpu);
            println!(
                "{name:<18} {cpu:>9.3} {:>9.2} {wall:>9.3} {:>9.2}   {compute:>8.2} {exchange:>8.2} {rest:>8.2}",
                cpu / one_cpu,
                wall / one_wall,
            );
        }
        println!();
        Ok(())
    }

    fn plans(&self) -> Result<Vec<(String, PlanFile)>> {
        let preset = |strategy, ranks| {
            PlanFile::preset(
                strategy,
                &Setting {
                    model_name: self.model,
                    model: self.spec,
                    cluster_name: CLUSTER,
                    workload_name: &self.workload.name,
                    workload: self.workload,
                    ranks,
                },
            )
        };
        let by_heads = preset(Strategy::Ma, 16)?;
        let by_requests = PlanFile {
            mesh: Mesh { tp: 1, dp: 12, ..by_heads.mesh },
            attention: AttentionPlan { heads: None, ..by_heads.attention.clone() },
            ..by_heads.clone()
        };
        Ok(vec![
            ("EP 4".into(), preset(Strategy::Ep, 4)?),
            ("EP 16".into(), preset(Strategy::Ep, 16)?),
            ("MA 12+4, requests".into(), by_requests),
            ("MA 12+4, heads".into(), by_heads),
            ("TP 8".into(), preset(Strategy::Tp, 16)?),
            ("TP 8, PP 2".into(), preset(Strategy::TpPp, 16)?),
            ("PP 2".into(), preset(Strategy::Pp, 16)?),
        ])
    }

    fn contender(&self, name: &str, plan: Plan, max_num_seqs: usize) -> Result<Contender> {
        let plan = Arc::new(plan);
        let engine = self.launch(&plan, max_num_seqs, false)?;
        Ok(Contender { name: name.into(), plan, engine, max_num_seqs, rounds: Vec::new() })
    }

    fn launch(&self, plan: &Arc<Plan>, max_num_seqs: usize, measure: bool) -> Result<Engine> {
        let config = EngineConfig {
            max_num_seqs,
            max_num_batched_tokens: 2048,
            max_model_len: Some(self.workload.longest()),
            block_size: 16,
            // Every round has the same prompts.
            enable_prefix_caching: false,
            num_threads: Some(1),
            measure,
            ..EngineConfig::default()
        };
        Ok(launch_plan(self.spec, self.weights, plan, &config, Ranks::Threads, |_| ())?)
    }

    fn requests(&self) -> Vec<Request> {
        let requests = self.workload.requests(self.spec.vocab_size).into_iter();
        let request = |(prompt, max_tokens)| Request {
            prompt,
            sampling: SamplingParams::greedy(),
            max_tokens,
            stop_token_ids: Vec::new(),
        };
        requests.map(request).collect()
    }

    /// Processor time of one round: actions that compute, actions that exchange, and what is neither.
    fn by_kind(&self, plan: Arc<Plan>, max_num_seqs: usize) -> Result<[f64; 3]> {
        let mut engine = self.launch(&plan, max_num_seqs, true)?;
        let schedules: Vec<Vec<Schedule>> = (1..=moesaic_plan::plan::MAX_MICRO_BATCHES)
            .map(|num| (0..plan.world_size()).map(|rank| plan.schedule(self.spec, Rank(rank as u32), num)).collect())
            .collect();
        run(&mut engine, self.requests(), |_| ())?;
        let mut by_work: BTreeMap<String, f64> = BTreeMap::new();
        let mut by_kind = [0.0; 2];
        let before = process_time();
        run(&mut engine, self.requests(), |engine| {
            let record = engine.last_step();
            let of_step = &schedules[record.sequences[0].len() - 1];
            for (rank, schedule) in record.ranks.iter().zip(of_step) {
                for (seconds, action) in rank.action_s.iter().zip(&schedule.actions) {
                    by_kind[usize::from(action.work.sends().is_some())] += seconds;
                    let what = format!("{:?}", action.work);
                    let what = what.split([' ', '{']).next().unwrap_or_default();
                    *by_work.entry(what.to_string()).or_default() += seconds;
                }
            }
        })?;
        let [compute, exchange] = by_kind;
        let all = process_time() - before;
        if std::env::args().any(|arg| arg == "--by-action") {
            let times = by_work.iter().map(|(what, seconds)| format!("{what} {:.1}", seconds * 1e3));
            println!("{:18} ms: {}", plan.file.name, times.collect::<Vec<_>>().join(", "));
        }
        Ok([compute, exchange, all - compute - exchange])
    }
}

/// All requests to their ends.
fn run(engine: &mut Engine, requests: Vec<Request>, mut after_step: impl FnMut(&Engine)) -> Result<()> {
    for request in requests {
        engine.add(request)?;
    }
    while !engine.is_idle() {
        engine.step()?;
        after_step(engine);
    }
    Ok(())
}

/// Of all rounds but the first.
fn median(rounds: &[(f64, f64)], of: impl Fn(&(f64, f64)) -> f64) -> f64 {
    let mut values: Vec<f64> = rounds[1..].iter().map(of).collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
