//! `moesaic bench`: how fast, and how near to what the machine can do.

use std::collections::{BTreeMap, HashSet};
use std::path::Path;
use std::time::Instant;
use std::{fmt, fs};

use anyhow::{Context, Result, ensure};
use moesaic_device::OpCall;
use moesaic_device::machine::{self, Machine};
use moesaic_engine::{Ceilings, Engine, EngineConfig, Request, SamplingParams};
use moesaic_spec::Bytes;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use serde::Serialize;

use crate::args::{BenchArgs, BenchCommon, BenchKind, BenchLatencyArgs, BenchThroughputArgs};
use crate::folder::OpenModel;

pub(crate) fn run(args: &BenchArgs) -> Result<()> {
    match &args.kind {
        BenchKind::Latency(args) => latency(args),
        BenchKind::Throughput(args) => throughput(args),
    }
}

/// What every result file says about where it came from.
#[derive(Serialize)]
struct Report<R: Serialize> {
    model: String,
    moesaic_version: &'static str,
    cpu_model: Option<String>,
    isa: String,
    num_threads: usize,
    input_len: usize,
    output_len: usize,
    ceilings: Ceilings,
    /// Of loading; what is measured later takes memory of its own.
    load_peak_memory_bytes: Option<u64>,
    results: Vec<R>,
}

#[derive(Serialize)]
struct LatencyResult {
    batch_size: usize,
    /// Medians over the rounds; the time to first token is the mean over the batch.
    ttft_ms: f64,
    tpot_ms: f64,
    prefill_tokens_per_s: f64,
    /// Of the whole batch.
    decode_tokens_per_s: f64,
    /// Time that the ops of the steps need at the measured ceilings, over the time they took.
    prefill_roofline_share: f64,
    decode_roofline_share: f64,
    /// Bytes that a decode step moves, over its time and the measured read bandwidth.
    decode_bandwidth_share: f64,
    rounds: Vec<LatencyRound>,
}

#[derive(Clone, Copy, Default, Serialize)]
struct LatencyRound {
    ttft_ms: f64,
    prefill_s: f64,
    prefill_tokens: usize,
    decode_s: f64,
    decode_steps: usize,
    decode_tokens: usize,
    #[serde(skip)]
    prefill_floor_s: f64,
    #[serde(skip)]
    decode_floor_s: f64,
    #[serde(skip)]
    decode_bytes: f64,
}

fn latency(args: &BenchLatencyArgs) -> Result<()> {
    ensure!(!args.batch_size.contains(&0), "--batch-size is 0; 1 or more is right");
    ensure!(args.num_iters > 0, "--num-iters is 0; 1 or more is right");
    let largest = args.batch_size.iter().copied().max().unwrap_or(1);
    let bench = Bench::open(&args.common, largest)?;
    let (mut engine, load_peak, ceilings) = bench.launch()?;
    println!("batch  prefill tok/s  of roofline   TTFT ms   TPOT ms  decode tok/s  of roofline  of bandwidth");
    let mut results = Vec::new();
    for &batch_size in &args.batch_size {
        let mut rounds = Vec::new();
        let mut by_op = ByOp::default();
        for round in 0..=args.num_iters {
            let measured = bench.round(&mut engine, &ceilings, batch_size, round as u64, &mut by_op)?;
            match round {
                0 => by_op = ByOp::default(),
                _ => rounds.push(measured),
            }
        }
        let result = LatencyResult::of(batch_size, rounds, &ceilings);
        println!(
            "{:>5}  {:>13.1}  {:>10.0}%  {:>8.1}  {:>8.2}  {:>12.1}  {:>10.0}%  {:>11.0}%",
            result.batch_size,
            result.prefill_tokens_per_s,
            result.prefill_roofline_share * 100.0,
            result.ttft_ms,
            result.tpot_ms,
            result.decode_tokens_per_s,
            result.decode_roofline_share * 100.0,
            result.decode_bandwidth_share * 100.0,
        );
        if args.by_op {
            print!("{by_op}");
        }
        results.push(result);
    }
    bench.report(load_peak, ceilings, results)
}

/// Where the time of the measured rounds went.
#[derive(Default)]
struct ByOp {
    prefill: OpTimes,
    decode: OpTimes,
}

/// Seconds and least possible seconds by op, and the number of steps.
#[derive(Default)]
struct OpTimes {
    steps: usize,
    ops: BTreeMap<&'static str, (usize, f64, f64)>,
}

impl OpTimes {
    fn add(&mut self, timed: &[(OpCall, f64)], ceilings: &Ceilings) {
        self.steps += 1;
        for (call, seconds) in timed {
            let (calls, taken, floor) = self.ops.entry(call.op).or_default();
            *calls += 1;
            *taken += seconds;
            *floor += ceilings.floor_s(std::slice::from_ref(call));
        }
    }
}

impl fmt::Display for ByOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, times) in [("prefill", &self.prefill), ("decode", &self.decode)] {
            if times.steps == 0 {
                continue;
            }
            let per_step_ms = 1e3 / times.steps as f64;
            writeln!(f, "       {name:<16} calls   ms a step  least ms")?;
            for (op, (calls, taken, floor)) in &times.ops {
                let calls = calls / times.steps;
                writeln!(f, "         {op:<14} {calls:>5} {:>11.3} {:>9.3}", taken * per_step_ms, floor * per_step_ms)?;
            }
        }
        Ok(())
    }
}

impl LatencyResult {
    fn of(batch_size: usize, rounds: Vec<LatencyRound>, ceilings: &Ceilings) -> LatencyResult {
        let median = |of: &dyn Fn(&LatencyRound) -> f64| {
            let mut values: Vec<f64> = rounds.iter().map(of).filter(|value| value.is_finite()).collect();
            values.sort_by(f64::total_cmp);
            values.get(values.len() / 2).copied().unwrap_or(0.0)
        };
        LatencyResult {
            batch_size,
            ttft_ms: median(&|r| r.ttft_ms),
            tpot_ms: median(&|r| r.decode_s / r.decode_steps as f64 * 1e3),
            prefill_tokens_per_s: median(&|r| r.prefill_tokens as f64 / r.prefill_s),
            decode_tokens_per_s: median(&|r| r.decode_tokens as f64 / r.decode_s),
            prefill_roofline_share: median(&|r| r.prefill_floor_s / r.prefill_s),
            decode_roofline_share: median(&|r| r.decode_floor_s / r.decode_s),
            decode_bandwidth_share: median(&|r| r.decode_bytes / r.decode_s / ceilings.read_bytes_per_s),
            rounds,
        }
    }
}

#[derive(Serialize)]
struct ThroughputResult {
    num_prompts: usize,
    elapsed_s: f64,
    request_throughput: f64,
    output_throughput: f64,
    total_token_throughput: f64,
    num_preemptions: u64,
}

fn throughput(args: &BenchThroughputArgs) -> Result<()> {
    ensure!(args.num_prompts > 0, "--num-prompts is 0; 1 or more is right");
    let bench = Bench::open(&args.common, args.common.engine.max_num_seqs)?;
    let (mut engine, load_peak, ceilings) = bench.launch()?;
    let start = Instant::now();
    for prompt in 0..args.num_prompts {
        bench.add(&mut engine, prompt as u64)?;
    }
    let mut generated = 0;
    while !engine.is_idle() {
        generated += engine.step()?.events.len();
    }
    let elapsed_s = start.elapsed().as_secs_f64();
    let total = generated + args.num_prompts * args.common.input_len;
    let result = ThroughputResult {
        num_prompts: args.num_prompts,
        elapsed_s,
        request_throughput: args.num_prompts as f64 / elapsed_s,
        output_throughput: generated as f64 / elapsed_s,
        total_token_throughput: total as f64 / elapsed_s,
        num_preemptions: engine.stats().preemptions,
    };
    println!(
        "{} requests in {elapsed_s:.2} s | {:.2} requests/s | {:.1} output tokens/s | {:.1} tokens/s in all | {} preemptions",
        result.num_prompts,
        result.request_throughput,
        result.output_throughput,
        result.total_token_throughput,
        result.num_preemptions
    );
    bench.report(load_peak, ceilings, vec![result])
}

/// A model under measurement.
struct Bench<'a> {
    args: &'a BenchCommon,
    model: OpenModel,
    config: EngineConfig,
}

impl<'a> Bench<'a> {
    fn open(args: &'a BenchCommon, num_seqs: usize) -> Result<Bench<'a>> {
        ensure!(args.input_len > 0, "--input-len is 0; 1 or more is right");
        ensure!(args.output_len > 0, "--output-len is 0; 1 or more is right");
        let model = OpenModel::open(&args.model)?;
        let mut config = args.engine.config(args.model.dtype, args.input_len + args.output_len)?;
        config.max_num_seqs = num_seqs;
        config.max_num_batched_tokens = config.max_num_batched_tokens.max(num_seqs);
        config.max_num_waiting = usize::MAX;
        // Rounds repeat their prompts' lengths, not their tokens; still, nothing measured may come from a cache.
        config.enable_prefix_caching = false;
        Ok(Bench { args, model, config })
    }

    /// The engine, the most memory that loading took, and what the machine can do at best.
    fn launch(&self) -> Result<(Engine, Option<Bytes>, Ceilings)> {
        let mut engine = self.model.launch(&self.config, false)?;
        eprintln!("model     {}\n{}", self.model.name, engine.ledger());
        let load_peak = machine::peak_memory();
        let rank = engine.single_rank().expect("launched without a plan");
        let ceilings = Ceilings::measure(rank.ctx(), rank.transformer().compute_dtype())?;
        eprintln!(
            "ceilings  {:.1} GB/s read, {:.0} GFLOP/s (measured, {} threads)\n",
            ceilings.read_bytes_per_s / 1e9,
            ceilings.flops_per_s / 1e9,
            rank.ctx().pool().num_threads()
        );
        Ok((engine, load_peak, ceilings))
    }

    fn add(&self, engine: &mut Engine, prompt_seed: u64) -> Result<()> {
        let mut rng = ChaCha8Rng::seed_from_u64(self.args.seed << 32 | prompt_seed);
        let vocab_size = self.model.spec.vocab_size as u32;
        let prompt = (0..self.args.input_len).map(|_| rng.next_u32() % vocab_size).collect();
        engine.add(Request {
            prompt,
            sampling: SamplingParams { temperature: 0.0, ..SamplingParams::default() },
            max_tokens: self.args.output_len,
            stop_token_ids: Vec::new(),
        })?;
        Ok(())
    }

    /// All sequences at once. Steps that run prompts and steps in which the whole batch decodes are timed apart; those at
    /// the end, when some sequences are done, count for neither.
    fn round(
        &self,
        engine: &mut Engine,
        ceilings: &Ceilings,
        batch_size: usize,
        round: u64,
        by_op: &mut ByOp,
    ) -> Result<LatencyRound> {
        let mut measured = LatencyRound::default();
        let mut answered = HashSet::new();
        let start = Instant::now();
        for seq in 0..batch_size {
            self.add(engine, round << 16 | seq as u64)?;
        }
        while !engine.is_idle() {
            let rank = engine.single_rank().expect("launched without a plan");
            rank.ctx().start_log();
            let step_start = Instant::now();
            let step = engine.step()?;
            let took = step_start.elapsed().as_secs_f64();
            let timed = engine.single_rank().expect("launched without a plan").ctx().take_timed_log();
            let calls: Vec<OpCall> = timed.iter().map(|(call, _)| call.clone()).collect();
            if step.num_prefill_tokens > 0 {
                by_op.prefill.add(&timed, ceilings);
                measured.prefill_s += took;
                measured.prefill_tokens += step.num_prefill_tokens;
                measured.prefill_floor_s += ceilings.floor_s(&calls);
            } else if step.num_decode_tokens == batch_size {
                by_op.decode.add(&timed, ceilings);
                measured.decode_s += took;
                measured.decode_steps += 1;
                measured.decode_tokens += step.num_decode_tokens;
                measured.decode_floor_s += ceilings.floor_s(&calls);
                measured.decode_bytes += calls.iter().map(|call| call.bytes.expected).sum::<f64>();
            }
            let first_tokens = step.events.iter().filter(|event| answered.insert(event.id)).count();
            measured.ttft_ms += first_tokens as f64 * start.elapsed().as_secs_f64() * 1e3 / batch_size as f64;
        }
        Ok(measured)
    }

    fn report<R: Serialize>(&self, load_peak: Option<Bytes>, ceilings: Ceilings, results: Vec<R>) -> Result<()> {
        let Some(file) = &self.args.json else { return Ok(()) };
        let machine = Machine::detect();
        let report = Report {
            model: self.model.name.clone(),
            moesaic_version: env!("CARGO_PKG_VERSION"),
            cpu_model: machine.cpu_model,
            isa: machine.isa.to_string(),
            num_threads: self.config.num_threads.unwrap_or_else(machine::num_usable_cores),
            input_len: self.args.input_len,
            output_len: self.args.output_len,
            ceilings,
            load_peak_memory_bytes: load_peak.map(|bytes| bytes.0),
            results,
        };
        let json = serde_json::to_string_pretty(&report)?;
        if file == Path::new("-") {
            println!("{json}");
            return Ok(());
        }
        fs::write(file, json + "\n").with_context(|| file.display().to_string())
    }
}
