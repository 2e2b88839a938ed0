//! What papers 003 and 004 share: 12 GPUs with attention and 4 with experts, against TP = 8, PP = 2 and both together.

use moesaic_plan::Collective;
use moesaic_spec::{Cluster, ModelSpec};

use super::check::{Check, exactly, n};
use super::claim::unit::{GB, MJ, MS, PER_S, PERCENT};
use super::claim::{Claim, Finding};
use super::deployments::{cluster, hybrid, ma, model, pipeline, tensor};
use super::lab::{Answer, Bound, Case, Figure, Lab};
use super::plot::{Bars, Plot};
use super::regime::{Point, Regime, Search, Spreading};
use crate::PlannerError;
use crate::estimate::Estimate;
use crate::iteration::Layout;
use crate::training::{self, Training, TrainingMemory, TrainingStep};

/// GPUs of both papers.
pub(super) const GPUS: usize = 16;
/// "Batch size: 1024 sequences".
pub(super) const SEQS: f64 = 1024.0;
/// "Sequence length: 2048 tokens".
pub(super) const CONTEXT: f64 = 2048.0;
/// TPS × TPOT: what their TPS would be the throughput of.
pub(super) const IN_FLIGHT: f64 = 24.0;

const ALL_DECODE: &str = "all 1,024 sequences of 2,048 tokens decode at once";
const FEW_DECODE: &str = "24 sequences decode at once, as TPS × TPOT says";
const TRAINS: &str = "tokens are trained on, not generated";

/// The four columns of their tables.
pub(super) const COLUMNS: [(&str, Spreading); 4] =
    [("TP=8", tensor), ("PP=2", pipeline), ("TP=8, PP=2", hybrid), ("MA separation", ma)];

/// Assumed throughout.
pub(super) const ASSUMPTIONS: [&str; 5] = [
    "The texts do not say how many tokens are generated: a step decodes one token of each sequence, at 2,048 tokens of \
     context; both 1,024 sequences at a time (the batch size) and 24 (what TPS × TPOT says) are tried.",
    "All four strategies run on all 16 GPUs: TP=8 as two data-parallel groups, PP=2 as eight.",
    "Attention of MA separation is on GPUs 0 to 11, split by heads over all twelve, as `head_distribution` says.",
    "Experts have two matrices (GELU) unless said; the other reading of the texts, SwiGLU, has three.",
    "A node has one InfiniBand HDR adapter (25 GB/s), which its four GPUs share.",
];

/// The papers' model on their cluster.
pub(super) struct Setting {
    pub(super) model: ModelSpec,
    pub(super) cluster: Cluster,
}

impl Setting {
    pub(super) fn new() -> Setting {
        let mut cluster = cluster("a100-4x4");
        // "pue: 1.08", the better of the two.
        cluster.energy.pue = 1.08;
        Setting { model: model("paper-003-gelu"), cluster }
    }

    pub(super) fn lab(&self) -> Result<Lab<'_>, PlannerError> {
        Lab::new(&self.model, &self.cluster)
    }

    /// Where one strategy's figure is the claimed one.
    fn where_alone(&self, figure: Figure, proposed: Spreading, claim: &Claim) -> Result<Regime, PlannerError> {
        const SEQS: [f64; 13] = [1., 2., 4., 8., 16., 32., 64., 128., 256., 512., 1024., 2048., 4096.];
        let search = Search { seqs: &SEQS, contexts: &[CONTEXT], links: &[1.0], ..self.search(figure, proposed) };
        let stated = claim.stated;
        search.find(&self.model, &self.cluster, |low, high| stated.high >= low && stated.low <= high)
    }

    fn search(&self, figure: Figure, proposed: Spreading) -> Search<'static> {
        Search {
            figure,
            phase: super::lab::Phase::Decode,
            proposed,
            baseline: None,
            from: Point { gpus: GPUS, seqs: SEQS, context: CONTEXT, links: 1.0 },
            gpus: &[GPUS],
            seqs: &[16.0, 64.0, 256.0, 1024.0, 4096.0],
            contexts: &[512.0, 2048.0, 8192.0],
            links: &[1.0, 4.0, 16.0],
        }
    }

    /// Where MA separation has so many times the figure of TP=8, PP=2.
    pub(super) fn where_gained(&self, figure: Figure, times: impl Fn(f64) -> bool) -> Result<Regime, PlannerError> {
        let search = Search { baseline: Some(hybrid), gpus: &[8, 16, 32], ..self.search(figure, ma) };
        search.find(&self.model, &self.cluster, |ratio, _| times(ratio))
    }
}

/// Both readings of how many sequences there are.
fn readings(lab: &mut Lab, figure: Figure, layout: &Layout) -> Result<Vec<Answer>, PlannerError> {
    Ok(vec![
        lab.ask(figure, &Case::decode(layout, SEQS, CONTEXT), ALL_DECODE)?,
        lab.ask(figure, &Case::decode(layout, IN_FLIGHT, CONTEXT), FEW_DECODE)?,
    ])
}

fn ratio_readings(lab: &mut Lab, figure: Figure, spreadings: [Spreading; 2]) -> Result<Vec<Answer>, PlannerError> {
    let layouts = spreadings.map(|spreading| spreading(GPUS).expect("all strategies run on 16 GPUs"));
    let mut of = |seqs: f64, assuming: &str| {
        let cases = layouts.each_ref().map(|layout| Case::decode(layout, seqs, CONTEXT));
        lab.ratio(figure, [&cases[0], &cases[1]], assuming)
    };
    Ok(vec![of(SEQS, ALL_DECODE)?, of(IN_FLIGHT, FEW_DECODE)?])
}

/// One training step of 1,024 sequences, 8 of them in each micro-batch of a group.
pub(super) fn train(lab: &mut Lab, layout: &Layout, checkpointing: bool) -> Result<TrainingStep, PlannerError> {
    let micro_batches = (SEQS / layout.dp as f64 / 8.0).max(1.0) as usize;
    let network = lab.network().clone();
    let training = Training::adamw(SEQS, CONTEXT, micro_batches, checkpointing);
    training::step(lab.iterations(), &network, layout, &training)
}

/// Operations of training by what the GPUs' peak does: what no training is faster than.
fn training_bound(lab: &mut Lab) -> Bound {
    let (model, cluster) = (lab.model(), lab.cluster());
    let flops = 3.0 * model.counts().flops.prefill((CONTEXT / 2.0) as usize);
    let peak = cluster.gpu.peak_flops.bf16;
    let arithmetic = format!("{GPUS} × {:.0} TFLOP/s / (3 × {:.2} GFLOP a token)", peak / 1e12, flops / 3.0 / 1e9);
    Bound::limit(GPUS as f64 * peak / flops, arithmetic)
}

/// Table 1.
pub(super) fn performance(setting: &Setting, at: &'static str) -> Result<Vec<Finding>, PlannerError> {
    let mut lab = setting.lab()?;
    let tpot = ["2.84", "3.12", "2.76", "1.82"];
    let tps = ["8,450", "7,692", "8,696", "13,289"];
    let throughput = ["135,200", "123,072", "139,136", "212,624"];
    let utilization = ["68.4", "62.1", "71.2", "89.7"];
    let mut findings = Vec::new();
    for ((name, spreading), text) in COLUMNS.iter().zip(tpot) {
        let layout = spreading(GPUS).expect("all strategies run on 16 GPUs");
        let claim = Claim::less(at, format!("TPOT, {name}"), text, MS);
        let regime = setting.where_alone(Figure::Step, *spreading, &claim)?;
        findings.push(claim.judged(readings(&mut lab, Figure::Step, &layout)?, regime));
    }
    for ((name, spreading), text) in COLUMNS.iter().zip(tps) {
        let layout = spreading(GPUS).expect("all strategies run on 16 GPUs");
        let claim = Claim::more(at, format!("TPS, {name}"), text, PER_S);
        let regime = setting.where_alone(Figure::TokensPerS, *spreading, &claim)?;
        findings.push(claim.judged(readings(&mut lab, Figure::TokensPerS, &layout)?, regime));
    }
    let most_trained = training_bound(&mut lab);
    for ((name, spreading), text) in COLUMNS.iter().zip(throughput) {
        let layout = spreading(GPUS).expect("all strategies run on 16 GPUs");
        let claim = Claim::more(at, format!("throughput, {name}"), text, PER_S);
        let regime = setting.where_alone(Figure::TokensPerS, *spreading, &claim)?;
        let trained = train(&mut lab, &layout, true)?;
        let estimate = Estimate::new(trained.tokens_per_s, trained.deviation / trained.seconds);
        let answers = vec![
            lab.ask(Figure::TokensPerS, &Case::decode(&layout, SEQS, CONTEXT), ALL_DECODE)?,
            Answer::known(TRAINS, estimate).bounded(most_trained.clone()),
        ];
        findings.push(claim.judged(answers, regime));
    }
    for ((name, spreading), text) in COLUMNS.iter().zip(utilization) {
        let layout = spreading(GPUS).expect("all strategies run on 16 GPUs");
        let claim = Claim::more(at, format!("GPU utilization, {name}"), text, PERCENT);
        let regime = setting.where_alone(Figure::Utilization, *spreading, &claim)?;
        findings.push(claim.judged(readings(&mut lab, Figure::Utilization, &layout)?, regime));
    }
    let gains: [(&str, Figure, &str); 3] = [
        ("TPOT, less than TP=8, PP=2", Figure::Step, "34.2"),
        ("TPS, more than TP=8, PP=2", Figure::TokensPerS, "52.8"),
        ("GPU utilization, more than TP=8, PP=2", Figure::Utilization, "25.9"),
    ];
    for (what, figure, text) in gains {
        let claim = Claim::more(at, what, text, PERCENT);
        let gain = claim.stated.value;
        let less = figure == Figure::Step;
        let regime =
            setting.where_gained(figure, |ratio| if less { 1.0 - ratio >= gain } else { ratio - 1.0 >= gain })?;
        let answers = ratio_readings(&mut lab, figure, [ma, hybrid])?;
        let answers = answers.into_iter().map(|answer| if less { answer.less() } else { answer.more() }).collect();
        findings.push(claim.judged(answers, regime));
    }
    for ((name, _), text) in COLUMNS.iter().zip(["72.3", "69.8", "74.1", "85.4"]) {
        let claim = Claim::more(at, format!("memory efficiency, {name}"), text, PERCENT);
        findings.push(
            claim.out_of_reach("the text does not say of what it is a share, and no two of its columns agree on one"),
        );
    }
    Ok(findings)
}

/// TPOT by sequence length, for some of the columns.
pub(super) fn by_length(
    setting: &Setting,
    at: &'static str,
    (name, spreading): (&str, Spreading),
    texts: [&'static str; 4],
) -> Result<Vec<Finding>, PlannerError> {
    let mut lab = setting.lab()?;
    let layout = spreading(GPUS).expect("all strategies run on 16 GPUs");
    let mut findings = Vec::new();
    for (context, text) in LENGTHS.into_iter().zip(texts) {
        let claim = Claim::less(at, format!("TPOT at {context} tokens, {name}"), text, MS);
        let answers = vec![
            lab.ask(Figure::Step, &Case::decode(&layout, SEQS, context), "1,024 sequences decode at once")?,
            lab.ask(Figure::Step, &Case::decode(&layout, IN_FLIGHT, context), "24 sequences decode at once")?,
        ];
        findings.push(claim.judged(answers, Regime::NotSearched));
    }
    Ok(findings)
}

const LENGTHS: [f64; 4] = [512.0, 1024.0, 2048.0, 4096.0];
/// "tpot_ms" of MA separation.
pub(super) const MA_BY_LENGTH: [&str; 4] = ["0.89", "1.21", "1.82", "3.41"];

/// Claimed, predicted and possible TPOT by sequence length.
pub(super) fn length_plot(setting: &Setting) -> Result<Plot, PlannerError> {
    let mut lab = setting.lab()?;
    let layout = ma(GPUS).expect("MA separation runs on 16 GPUs");
    let mut of = |seqs: f64| -> Result<[Vec<Option<f64>>; 2], PlannerError> {
        let (mut predicted, mut possible) = (Vec::new(), Vec::new());
        for context in LENGTHS {
            let answer = lab.ask(Figure::Step, &Case::decode(&layout, seqs, context), "")?;
            predicted.push(Some(1e3 * answer.estimate.value));
            possible.push(answer.bound.map(|bound| 1e3 * bound.value));
        }
        Ok([predicted, possible])
    };
    let [many, many_bound] = of(SEQS)?;
    let [few, few_bound] = of(IN_FLIGHT)?;
    let claimed = MA_BY_LENGTH.map(|text| Some(n(text).value)).to_vec();
    let labels = ["tokens of context", "TPOT, ms"];
    Ok(Plot::new("tpot-by-length", "TPOT of MA separation by sequence length", labels, LENGTHS.to_vec())
        .with("claimed", claimed)
        .with("predicted, 1,024 seqs", many)
        .with("bound, 1,024 seqs", many_bound)
        .with("predicted, 24 seqs", few)
        .with("bound, 24 seqs", few_bound))
}

const SCALES: [usize; 8] = [4, 8, 12, 16, 20, 24, 28, 32];
/// Numbers of GPUs on which both MA separation and TP=8, PP=2 run.
const BOTH: [usize; 4] = [4, 8, 16, 32];

/// How sequences grow with GPUs.
#[derive(Clone, Copy)]
enum Growth {
    /// 1,024 on any number of GPUs.
    Strong,
    /// 64 for each GPU.
    Weak,
}

impl Growth {
    fn seqs(self, gpus: usize) -> f64 {
        match self {
            Growth::Strong => SEQS,
            Growth::Weak => SEQS / GPUS as f64 * gpus as f64,
        }
    }
}

const GROWTHS: [(Growth, &str); 2] =
    [(Growth::Strong, "1,024 sequences on any number of GPUs"), (Growth::Weak, "64 sequences for each GPU")];

fn rate(lab: &mut Lab, spreading: Spreading, gpus: usize, growth: Growth) -> Result<Option<Estimate>, PlannerError> {
    let Some(layout) = spreading(gpus) else { return Ok(None) };
    Ok(Some(lab.ask(Figure::TokensPerS, &Case::decode(&layout, growth.seqs(gpus), CONTEXT), "")?.estimate))
}

/// Scaling from 4 to 32 GPUs, its efficiency, and from where on MA separation gains.
pub(super) fn scaling(setting: &Setting, at: &'static str) -> Result<(Vec<Finding>, Plot), PlannerError> {
    let grown = setting.cluster.with_gpus(32).expect("the cluster has links between nodes");
    let mut lab = Lab::new(&setting.model, &grown)?;
    let efficiency = |lab: &mut Lab, growth: Growth, assuming: &str| -> Result<Answer, PlannerError> {
        let of = |lab: &mut Lab, gpus: usize| {
            Ok::<f64, PlannerError>(rate(lab, ma, gpus, growth)?.expect("MA separation runs").value / gpus as f64)
        };
        let value = of(&mut *lab, GPUS)? / of(lab, 4)?;
        Ok(Answer::known(format!("against 4 GPUs, {assuming}"), Estimate::new(value, 0.1)))
    };
    let answers: Vec<Answer> =
        GROWTHS.iter().map(|(growth, text)| efficiency(&mut lab, *growth, text)).collect::<Result<_, _>>()?;
    let mut findings =
        vec![Claim::more(at, "scaling efficiency at 16 GPUs", "87", PERCENT).judged(answers, Regime::NotSearched)];

    let mut gains = Vec::new();
    for (growth, text) in GROWTHS {
        let mut first = None;
        for gpus in BOTH {
            let [proposed, baseline] = [ma, hybrid].map(|spreading| rate(&mut lab, spreading, gpus, growth));
            if let (Some(proposed), Some(baseline)) = (proposed?, baseline?)
                && first.is_none()
                && proposed.value > baseline.value
            {
                first = Some(gpus);
            }
        }
        gains.push((text, first));
    }
    findings.push(break_even(at, &gains));

    let mut plot = Plot::new(
        "scaling",
        "Output tokens/s of 1,024 sequences by GPUs",
        ["GPUs", "tokens/s"],
        SCALES.map(|gpus| gpus as f64).to_vec(),
    );
    let claimed = |text: &'static str| SCALES.map(|gpus| (gpus == GPUS).then(|| n(text).value)).to_vec();
    plot = plot.with("MA, TPS claimed", claimed("13,289")).with("MA, throughput claimed", claimed("212,624"));
    for (name, spreading) in [("MA separation", ma as Spreading), ("TP=8, PP=2", hybrid)] {
        let of = |gpus| Ok(rate(&mut lab, spreading, gpus, Growth::Strong)?.map(|estimate| estimate.value));
        plot = plot.with(name, SCALES.into_iter().map(of).collect::<Result<_, PlannerError>>()?);
    }
    Ok((findings, plot))
}

fn break_even(at: &'static str, gains: &[(&str, Option<usize>)]) -> Finding {
    let claim = Claim::less(at, "GPUs from which MA separation gains on TP=8, PP=2", "8", super::claim::unit::GPUS);
    let answers = gains.iter().filter_map(|(text, first)| Some(Answer::exact(*text, (*first)? as f64))).collect();
    let never = gains.iter().filter(|(_, first)| first.is_none()).map(|(text, _)| *text).collect::<Vec<_>>();
    let searched = format!("4, 8, 16 and 32 GPUs with {}", never.join(", and with "));
    let regime = if never.is_empty() { Regime::NotSearched } else { Regime::Nowhere { searched } };
    claim.judged(answers, regime)
}

/// Communication as shares of the time, of one column: attention's all-reduce, all-to-all, gradients, all together.
pub(super) fn communication(
    setting: &Setting,
    at: &'static str,
    (name, spreading): (&str, Spreading),
    texts: [&'static str; 4],
) -> Result<Vec<Finding>, PlannerError> {
    let mut lab = setting.lab()?;
    let layout = spreading(GPUS).expect("all strategies run on 16 GPUs");
    let [sums, exchange, gradients, total] = texts;
    let of = |what: &str, text| Claim::less(at, format!("{what}, {name}"), text, PERCENT);
    let trained = train(&mut lab, &layout, true)?;
    let synced = Answer::exact("one sum of gradients a step of training", trained.gradient_sync_s / trained.seconds);
    let class = |lab: &mut Lab, class| readings(lab, Figure::CommunicationOf(class), &layout);
    Ok(vec![
        of("all-reduce", sums).judged(class(&mut lab, Collective::AllReduce)?, Regime::NotSearched),
        of("all-to-all", exchange).judged(class(&mut lab, Collective::AllToAll)?, Regime::NotSearched),
        of("gradient synchronization", gradients).judged(vec![synced], Regime::NotSearched),
        of("communication in all", total)
            .judged(readings(&mut lab, Figure::Communication, &layout)?, Regime::NotSearched),
    ])
}

/// Claimed and predicted shares of communication, column by column.
pub(super) fn communication_bars(setting: &Setting) -> Result<Bars, PlannerError> {
    let mut lab = setting.lab()?;
    let claimed = [[0.123, 0.0], [0.0, 0.0], [0.118, 0.0], [0.084, 0.062]];
    let mut rows = Vec::new();
    for ((name, spreading), [sums, exchange]) in COLUMNS.into_iter().zip(claimed) {
        let layout = spreading(GPUS).expect("all strategies run on 16 GPUs");
        let case = Case::decode(&layout, SEQS, CONTEXT);
        let mut share =
            |class| Ok::<f64, PlannerError>(lab.ask(Figure::CommunicationOf(class), &case, "")?.estimate.value);
        let predicted =
            vec![share(Collective::AllReduce)?, share(Collective::AllToAll)?, share(Collective::SendReceive)?];
        rows.push((format!("{name}, claimed"), vec![sums, exchange, 0.0]));
        rows.push((format!("{name}, predicted"), predicted));
    }
    Ok(Bars {
        name: "communication",
        title: "Communication by the time of a decode step of 1,024 sequences (hidden parts included)",
        parts: vec!["all-reduce", "all-to-all", "send and receive"],
        rows,
    })
}

/// Memory by part of one column, as training has it: parameters, activations, gradients, optimizer states, buffers, all.
pub(super) fn memory(
    setting: &Setting,
    at: &'static str,
    (name, spreading): (&str, Spreading),
    texts: [&'static str; 6],
) -> Result<Vec<Finding>, PlannerError> {
    type Part = (&'static str, fn(&TrainingMemory) -> f64);
    const PARTS: [Part; 6] = [
        ("parameters", |memory| memory.weights),
        ("activations", |memory| memory.activations),
        ("gradients", |memory| memory.gradients),
        ("optimizer states", |memory| memory.optimizer),
        ("communication buffers", |memory| memory.exchange),
        ("memory of a GPU", TrainingMemory::total),
    ];
    let layout = spreading(GPUS).expect("all strategies run on 16 GPUs");
    let swiglu = model("paper-003-swiglu");
    let mut findings = Vec::new();
    let mut steps = Vec::new();
    for (assuming, model, checkpointing) in [
        ("GELU, activations checkpointed", &setting.model, true),
        ("GELU, all activations kept", &setting.model, false),
        ("SwiGLU, all activations kept", &swiglu, false),
    ] {
        let mut lab = Lab::new(model, &setting.cluster)?;
        steps.push((assuming, train(&mut lab, &layout, checkpointing)?));
    }
    let least = least_states(&setting.model);
    for ((part, of), text) in PARTS.into_iter().zip(texts) {
        let answers = steps.iter().map(|(assuming, step)| {
            let fullest = step.expert_memory.iter().map(of).fold(of(&step.memory), f64::max);
            let answer = Answer::exact(*assuming, fullest);
            if part == "memory of a GPU" { answer.bounded(least.clone()) } else { answer }
        });
        let answers = answers.collect();
        findings.push(Claim::less(at, format!("{part}, {name}"), text, GB).judged(answers, Regime::NotSearched));
    }
    Ok(findings)
}

/// Weights, gradients and states of AdamW, once over all GPUs.
fn least_states(model: &ModelSpec) -> Bound {
    let params = model.counts().params_total as f64;
    let arithmetic = format!("{:.2} G parameters × (2 + 2 + 12) bytes / {GPUS} GPUs", params / 1e9);
    Bound::limit(params * 16.0 / GPUS as f64, arithmetic)
}

/// Energy of a token.
pub(super) fn energy(setting: &Setting, at: &'static str) -> Result<Vec<Finding>, PlannerError> {
    let mut lab = setting.lab()?;
    let mut findings = Vec::new();
    for (name, spreading, text) in [("MA separation", ma as Spreading, "0.82"), ("the baseline", hybrid, "1.24")] {
        let layout = spreading(GPUS).expect("all strategies run on 16 GPUs");
        let claim = Claim::less(at, format!("energy per token, {name}"), text, MJ);
        let regime = setting.where_alone(Figure::Energy, spreading, &claim)?;
        findings.push(claim.judged(readings(&mut lab, Figure::Energy, &layout)?, regime));
    }
    let claim = Claim::more(at, "energy per token, less than the baseline", "33.9", PERCENT);
    let gain = claim.stated.value;
    let regime = setting.where_gained(Figure::Energy, |ratio| 1.0 - ratio >= gain)?;
    let answers = ratio_readings(&mut lab, Figure::Energy, [ma, hybrid])?.into_iter().map(Answer::less).collect();
    findings.push(claim.judged(answers, regime));
    for (name, text) in [("MA separation", "1.08"), ("the baseline", "1.12")] {
        findings.push(
            Claim::less(at, format!("PUE, {name}"), text, super::claim::unit::NUMBER)
                .out_of_reach("a property of the data centre, which no plan changes"),
        );
    }
    findings.push(
        Claim::more(at, "CO2 per token, less than the baseline", "34.2", PERCENT)
            .out_of_reach("the energy's own ratio, if both run on the same grid"),
    );
    Ok(findings)
}

/// Table 1, sequence lengths and energy against themselves; both papers have them.
pub(super) fn checks(setting: &Setting) -> Vec<Check> {
    let hundred = exactly(100.0);
    let one = exactly(1.0);
    let mut checks = Vec::new();
    let tps = [n("8,450"), n("7,692"), n("8,696"), n("13,289")];
    let tpot = [n("2.84"), n("3.12"), n("2.76"), n("1.82")];
    const ONE_NUMBER: &str =
        "TPS is 24 / TPOT: one measurement written twice, for 24 sequences at a time and not 1,024";
    for (how, (tps, tpot)) in ["TP=8", "PP=2", "TP=8, PP=2", "MA"].iter().zip(tps.into_iter().zip(tpot)) {
        let how = format!("TPS × TPOT of {how}");
        let product = tps * tpot / exactly(1e3);
        checks.push(Check::equation("Table 1", ("sequences of a batch", exactly(SEQS)), (&how, product), ONE_NUMBER));
    }
    let throughput = [n("135,200"), n("123,072"), n("139,136"), n("212,624")];
    for ((name, throughput), tps) in ["TP=8", "PP=2", "TP=8, PP=2", "MA"].iter().zip(throughput).zip(tps) {
        let what = format!("throughput of {name}, \"tokens/s\" like TPS");
        checks.push(Check::equation(
            "Table 1",
            (&what, throughput),
            ("TPS", tps),
            "throughput is 16 × TPS for every strategy, so TPS would be of one GPU and the three rows are one number",
        ));
    }
    checks.push(Check::equation(
        "Table 1",
        ("throughput × TPOT, sequences at a time", throughput[3] * tpot[3] / exactly(1e3)),
        ("batch", exactly(SEQS)),
        "with throughput in place of TPS 387 sequences would be decoded at a time",
    ));
    let gains = [
        ("TPOT", "34.2", hundred * (one - n("1.82") / n("2.76")), "1 − 1.82 / 2.76"),
        ("TPS", "52.8", hundred * (n("13,289") / n("8,696") - one), "13,289 / 8,696 − 1"),
        ("GPU utilization", "25.9", hundred * (n("89.7") / n("71.2") - one), "89.7 / 71.2 − 1"),
        ("memory efficiency", "15.2", hundred * (n("85.4") / n("74.1") - one), "85.4 / 74.1 − 1"),
        ("TPS, from the TPOTs", "52.8", hundred * (n("2.76") / n("1.82") - one), "2.76 / 1.82 − 1"),
    ];
    for (what, stated, computed, how) in gains {
        let what = format!("improvement of {what}, %");
        checks.push(Check::equation(
            "Table 1",
            (&what, n(stated)),
            (how, computed),
            "do columns give the improvement?",
        ));
    }
    let used = n("89.7") + n("18.8");
    checks.push(Check::at_most(
        "Table 1, communication",
        ("GPU utilization + communication of MA, %", used),
        ("all of the time", hundred),
        "at least 8.5 % of the time must be both: communication is hidden at least in part, where the texts call it overhead",
    ));
    for (length, tpot, gain, baseline) in [
        (512, "0.89", "27.6", "1.23"),
        (1024, "1.21", "34.2", "1.84"),
        (2048, "1.82", "35.9", "2.84"),
        (4096, "3.41", "39.9", "5.67"),
    ] {
        let what = format!("improvement at {length} tokens, %");
        let how = format!("1 − {tpot} / {baseline}");
        checks.push(Check::equation(
            "Inference by sequence length",
            (&what, n(gain)),
            (&how, hundred * (one - n(tpot) / n(baseline))),
            "against TP=8 here and against TP=8, PP=2 in Table 1: two baselines under one word",
        ));
    }
    checks.push(streaming_slope(setting));
    checks.push(Check::equation(
        "Energy",
        ("improvement of energy, %", n("33.9")),
        ("1 − 0.82 / 1.24", hundred * (one - n("0.82") / n("1.24"))),
        "do the two figures give it?",
    ));
    let with_pue = hundred * (one - n("0.82") * n("1.08") / (n("1.24") * n("1.12")));
    checks.push(Check::equation(
        "Energy",
        ("reduction of CO2, %", n("34.2")),
        ("1 − 0.82 × 1.08 / (1.24 × 1.12)", with_pue),
        "on one grid CO2 follows energy: 33.9 % if PUE is in it, 36.2 % if not; 34.2 is neither, but the TPOT's gain",
    ));
    let idle = setting.cluster.gpu.power.map_or(0.0, |power| power.idle_w);
    for (what, rate) in [("throughput", n("212,624")), ("TPS", n("13,289"))] {
        let claimed = format!("watts of 16 GPUs at this {what}");
        checks.push(Check::equation(
            "Energy, Table 1",
            ("watts of 16 idle GPUs, at least", exactly(GPUS as f64 * idle)),
            (&claimed, n("0.82") / exactly(1e3) * rate),
            "energy × rate is the cluster's power: less than the boards draw when they do nothing",
        ));
    }
    checks
}

/// TPOT grows with the cache that is streamed: how many sequences its slope allows at full bandwidth.
fn streaming_slope(setting: &Setting) -> Check {
    let per_token = setting.model.counts().kv.bytes_per_token as f64;
    let bandwidth = 12.0 * setting.cluster.gpu.memory_bandwidth;
    let slope = (n("3.41") - n("1.82")) / exactly(1e3) / exactly(2048.0);
    Check::equation(
        "Inference by sequence length",
        ("sequences of a batch", exactly(SEQS)),
        ("most that (3.41 − 1.82) ms / 2,048 tokens lets 12 GPUs stream", slope * exactly(bandwidth / per_token)),
        "2,048 tokens more of each of 1,024 sequences take 5.6 ms to stream, not 1.6",
    )
}

/// The fullest attention GPU of `head_distribution`.
pub(super) fn heads_check(at: &'static str) -> Check {
    let heads = ma(GPUS).and_then(|layout| layout.heads).unwrap_or_default();
    let most = heads.iter().copied().max().unwrap_or(0) as f64;
    let mean = heads.iter().sum::<usize>() as f64 / heads.len().max(1) as f64;
    Check::at_most(
        at,
        ("heads of the fullest GPU by the mean", exactly(most / mean)),
        ("load_balancing_threshold: 5 % difference", exactly(1.05)),
        "32 heads on 12 GPUs are uneven by 12.5 %, whatever a synchroniser does",
    )
}
