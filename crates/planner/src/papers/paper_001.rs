//! Paper 001: large expert parallelism, one expert of each layer on a GPU, against TP = 8 with PP = 2.

use super::Paper;
use super::check::{Check, exactly, n};
use super::claim::unit::{MS, PER_S, PERCENT, TIMES};
use super::claim::{Claim, Finding};
use super::deployments::{cluster, hybrid_h100, large_ep, model};
use super::lab::{Answer, Case, Figure, Lab, Phase};
use super::regime::{Point, Regime, Search, Spreading};
use crate::PlannerError;
use crate::estimate::Estimate;
use crate::iteration::Layout;
use moesaic_spec::{Cluster, ModelSpec};

const GPUS: usize = 16;
/// "Batch Size: 128 sequences".
const SEQS: f64 = 128.0;
/// "Sequence Length: 10,000 tokens per sequence".
const CONTEXT: f64 = 10_000.0;
/// TPS × TPOT.
const IN_FLIGHT: f64 = 992.0;

const DECODE: &str = "128 sequences of 10,000 tokens decode at once";
const SHORT: &str = "992 sequences (TPS × TPOT) of 1,000 tokens decode at once";
const PREFILL: &str = "TPS counts tokens of prompts that are read";

pub(super) fn paper() -> Result<Paper, PlannerError> {
    let (model, cluster) = (model("paper-001"), cluster("dgx-h100-x2"));
    let mut lab = Lab::new(&model, &cluster)?;
    let table = "Performance Comparison";
    let [ep, hybrid] = [large_ep, hybrid_h100].map(|spreading| spreading(GPUS).expect("both run on 16 GPUs"));
    let mut findings = Vec::new();
    for (name, spreading, tps, tpot) in
        [("TP=8, PP=2", hybrid_h100 as Spreading, "120,000", "8.3"), ("EP=16", large_ep, "450,000", "2.2")]
    {
        let layout = spreading(GPUS).expect("both run on 16 GPUs");
        let claim = Claim::more(table, format!("TPS, {name}"), tps, PER_S);
        let regime = alone(&model, &cluster, Figure::TokensPerS, spreading, &claim)?;
        let mut answers = decoding(&mut lab, Figure::TokensPerS, &layout)?;
        answers.push(lab.ask(Figure::TokensPerS, &Case::prefill(&layout, SEQS, CONTEXT), PREFILL)?);
        findings.push(claim.judged(answers, regime));
        let claim = Claim::less(table, format!("TPOT, {name}"), tpot, MS);
        let regime = alone(&model, &cluster, Figure::Step, spreading, &claim)?;
        findings.push(claim.judged(decoding(&mut lab, Figure::Step, &layout)?, regime));
    }
    for (what, figure, text) in [
        ("throughput, EP=16 by TP=8, PP=2", Figure::TokensPerS, "3.75"),
        ("TPOT, TP=8, PP=2 by EP=16", Figure::Step, "3.8"),
    ] {
        let claim = Claim::more("Performance Improvements", what, text, TIMES);
        let times = claim.stated.low;
        // Both are the ratio of two steps, which is the other way round for times.
        let inverse = figure == Figure::Step;
        let ratio = |lab: &mut Lab, seqs, context, assuming: &str| {
            let cases = [&ep, &hybrid].map(|layout| Case::decode(layout, seqs, context));
            let [of, to] = if inverse { [1, 0] } else { [0, 1] };
            lab.ratio(figure, [&cases[of], &cases[to]], assuming)
        };
        let answers = vec![ratio(&mut lab, SEQS, CONTEXT, DECODE)?, ratio(&mut lab, IN_FLIGHT, 1000.0, SHORT)?];
        let search = Search { baseline: Some(hybrid_h100), gpus: &[4, 8, 16], ..search(figure, large_ep) };
        let reached = |ratio: f64, _| if inverse { 1.0 / ratio >= times } else { ratio >= times };
        let regime = search.find(&model, &cluster, reached)?;
        findings.push(claim.judged(answers, regime));
    }
    findings.extend(qualities(&mut lab, &ep)?);
    Ok(Paper {
        name: "001",
        title: "large expert parallelism on 16 GPUs",
        hardware: format!("{GPUS} × {} in {} nodes ({})", cluster.gpu.name, cluster.nodes, cluster.name),
        assumptions: vec![
            "\"Adequate H100 GPUs\" are 16 H100 SXM as they are sold, in two nodes: one GPU for each of the 16 experts, and \
             8 × 2 for the baseline.",
            "The text gives no top-k; 2 experts of a token, as in papers 003 and 004.",
            "The text does not say how many tokens are generated: a step decodes one token of each sequence.",
        ],
        findings,
        checks: checks(&model),
        plots: Vec::new(),
        bars: Vec::new(),
    })
}

fn decoding(lab: &mut Lab, figure: Figure, layout: &Layout) -> Result<Vec<Answer>, PlannerError> {
    Ok(vec![
        lab.ask(figure, &Case::decode(layout, SEQS, CONTEXT), DECODE)?,
        lab.ask(figure, &Case::decode(layout, IN_FLIGHT, 1000.0), SHORT)?,
    ])
}

fn search(figure: Figure, proposed: Spreading) -> Search<'static> {
    Search {
        figure,
        phase: Phase::Decode,
        proposed,
        baseline: None,
        from: Point { gpus: GPUS, seqs: SEQS, context: CONTEXT, links: 1.0 },
        gpus: &[GPUS],
        seqs: &[16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0],
        contexts: &[100.0, 1000.0, 2500.0, 5000.0, 10_000.0],
        links: &[1.0, 4.0, 16.0],
    }
}

fn alone(
    model: &ModelSpec,
    cluster: &Cluster,
    figure: Figure,
    spreading: Spreading,
    claim: &Claim,
) -> Result<Regime, PlannerError> {
    let search = Search { links: &[1.0], ..search(figure, spreading) };
    let stated = claim.stated;
    search.find(model, cluster, |low, high| stated.high >= low && stated.low <= high)
}

fn qualities(lab: &mut Lab, ep: &Layout) -> Result<Vec<Finding>, PlannerError> {
    let all_busy = Claim::more("Key Findings", "GPU utilization (\"full\")", ">95", PERCENT);
    let busy = decoding(lab, Figure::Utilization, ep)?;
    let hidden =
        Claim::less("Communication Optimization", "exposed communication (\"hides network latency\")", "<5", PERCENT);
    let exposed = decoding(lab, Figure::Exposed, ep)?;
    // Experts of 16 ranks by those of 4, with as many tokens on each.
    let mut per_gpu = |gpus: usize| -> Result<f64, PlannerError> {
        let layout = large_ep(gpus).expect("16 experts");
        let case = Case::decode(&layout, SEQS / 16.0 * gpus as f64, CONTEXT);
        Ok(lab.ask(Figure::TokensPerSGpu, &case, "")?.estimate.value)
    };
    let efficiency = per_gpu(16)? / per_gpu(4)?;
    let linear = Claim::more("Scalability Characteristics", "efficiency at EP=16 (\"near-linear\")", ">90", PERCENT);
    let answer = Answer::known("against EP=4, 8 sequences on each GPU", Estimate::new(efficiency, 0.1));
    Ok(vec![
        all_busy.judged(busy, Regime::NotSearched),
        hidden.judged(exposed, Regime::NotSearched),
        linear.judged(vec![answer], Regime::NotSearched),
    ])
}

fn checks(model: &ModelSpec) -> Vec<Check> {
    let per_token = model.counts().kv.bytes_per_token as f64;
    let cache = SEQS * CONTEXT * per_token;
    const ONE_NUMBER: &str =
        "TPS is about 1,000 / TPOT for both rows: one measurement written twice, for 8 times the batch";
    vec![
        Check::equation(
            "Performance Comparison",
            ("sequences of a batch", exactly(SEQS)),
            ("120,000 tokens/s × 8.3 ms", n("120,000") * n("8.3") / exactly(1e3)),
            ONE_NUMBER,
        ),
        Check::equation(
            "Performance Comparison",
            ("sequences of a batch", exactly(SEQS)),
            ("450,000 tokens/s × 2.2 ms", n("450,000") * n("2.2") / exactly(1e3)),
            ONE_NUMBER,
        ),
        Check::equation(
            "Performance Improvements",
            ("throughput, times", n("3.75")),
            ("450,000 / 120,000", n("450,000") / n("120,000")),
            "do the columns give it?",
        ),
        Check::equation(
            "Performance Improvements",
            ("TPOT, times", n("3.8")),
            ("8.3 / 2.2", n("8.3") / n("2.2")),
            "do the columns give it?",
        ),
        Check::at_most(
            "Performance Comparison, Model",
            ("ms that 16 H100 take to stream the KV cache", exactly(1e3 * cache / (16.0 * 3.35e12))),
            ("TPOT", n("2.2")),
            "128 sequences of 10,000 tokens are 336 GB of keys and values, which every token reads",
        ),
        Check::conflict(
            "Key Findings, Scalability",
            "full GPU compute utilization",
            "\"communication becomes limiting factor\"",
            "what waits for the network does not compute",
        ),
        Check::conflict(
            "Baseline",
            "\"multiple experts colocated on same GPU\" contend",
            "TP=8 cuts each expert in eight: no GPU has a whole one, and they run one after the other either way",
            "eight GPUs read an expert's weights eight times as fast as one; contention is no cost of its own",
        ),
    ]
}
