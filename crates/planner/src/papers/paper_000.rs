//! Paper 000: 14,848 GPUs, one for each of 256 experts of each of 58 layers, FP8, experts of width 18432.

use moesaic_spec::{Cluster, ModelSpec, PartName};

use super::Paper;
use super::check::{Check, Rounded, exactly, n};
use super::claim::unit::{GB, GPUS, PERCENT};
use super::claim::{Claim, Finding};
use super::deployments::{cluster, dedicated, model, plan, together};
use super::lab::{Answer, Bound, Case, Figure, Lab, Phase};
use super::paper_002::{EPS, efficiencies, reading_prompts};
use super::regime::{Point, Regime, Search};
use crate::PlannerError;
use crate::estimate::Estimate;

const STAGES: usize = 58;
const ALL: usize = STAGES * 256;
/// Tokens of context; the text's sequence length is "variable".
const CONTEXT: f64 = 4096.0;

pub(super) fn paper() -> Result<Paper, PlannerError> {
    let (model, cluster) = (model("paper-000"), cluster("h100-paper"));
    let mut findings = sizes(&model, &cluster);
    findings.extend(utilizations(&model, &cluster)?);
    findings.extend(scaling(&model, &cluster)?);
    let real = super::deployments::cluster("dgx-h100").gpu;
    let mut checks = hardware_checks("1", ("FP8 TFLOP/s of an H100", exactly(real.peak_flops.f8 / 1e12)));
    checks.extend(own_checks(&model));
    Ok(Paper {
        name: "000",
        title: "14,848 dedicated GPUs",
        hardware: format!("{} × {} in nodes of 8 ({})", cluster.num_gpus(), cluster.gpu.name, cluster.name),
        assumptions: vec![
            "8 experts for each token, as in DeepSeek-V3; the text gives no top-k.",
            "Each GPU of a layer has the layer's attention for requests of its own; the text says nothing of where attention is.",
            "\"GPUs per layer\" is a pipeline with one MoE layer in each of 58 stages; 4 micro-batches (what a plan file may \
             have) leave 54 stages idle, 58 fill them.",
            "Sequences of 4,096 tokens; batch size and sequence length are \"variable\".",
            "Links are those of a real DGX H100, of which 80 % are reached.",
        ],
        findings,
        checks,
        plots: Vec::new(),
        bars: Vec::new(),
    })
}

/// GPUs, and what is on them.
fn sizes(model: &ModelSpec, cluster: &Cluster) -> Vec<Finding> {
    let counts = model.counts();
    let bytes = counts.bytes_total as f64;
    let room = cluster.gpu.memory.0 as f64;
    let fewest = Bound::limit((bytes / room).ceil(), format!("{} of weights / {}", GB.show(bytes), GB.show(room)));
    let routed = counts.parts.iter().find(|part| part.name == PartName::RoutedExperts);
    let expert = routed.map_or(0.0, |part| part.bytes as f64) / ALL as f64;
    vec![
        Claim::less("5.1", "GPUs", "14,848", GPUS).judged(
            vec![Answer::exact("one for each expert of each layer", ALL as f64).bounded(fewest)],
            Regime::NotSearched,
        ),
        Claim::less("6", "memory for an expert", "64", GB)
            .judged(vec![Answer::exact("two matrices of 7168 × 18432 in FP8", expert)], Regime::NotSearched),
    ]
}

/// The plan file, and the same with all stages at work.
fn readings(lab: &mut Lab, figure: Figure) -> Result<Vec<Answer>, PlannerError> {
    let file = plan!("paper-000", lab.cluster());
    let filled = dedicated(ALL).expect("256 GPUs for each of 58 layers");
    let mut of = |layout, per_gpu: f64, micro_batches: f64, assuming: &str| {
        lab.ask(figure, &Case::decode(layout, per_gpu * 256.0 * micro_batches, CONTEXT), assuming)
    };
    Ok(vec![
        of(&file, 32.0, 4.0, "4 micro-batches of 32 sequences on each GPU")?,
        of(&filled, 32.0, 58.0, "58 micro-batches of 32 sequences on each GPU")?,
    ])
}

fn utilizations(model: &ModelSpec, cluster: &Cluster) -> Result<Vec<Finding>, PlannerError> {
    let mut lab = Lab::new(model, cluster)?;
    let all = |per_gpu: f64| per_gpu * ALL as f64;
    let somewhere = |figure, reached: &dyn Fn(f64, f64) -> bool| {
        let search = Search {
            figure,
            phase: Phase::Decode,
            proposed: dedicated,
            baseline: None,
            from: Point { gpus: ALL, seqs: all(32.0), context: CONTEXT, links: 1.0 },
            gpus: &[ALL],
            seqs: &[1.0, 4.0, 16.0, 64.0, 256.0, 1024.0].map(all),
            contexts: &[64.0, 256.0, 1024.0, 4096.0],
            links: &[1.0, 4.0, 16.0],
        };
        search.find(model, cluster, reached)
    };
    let mfu = Claim::more("6", "MFU", "60", PERCENT);
    let network = Claim::more("6", "network bandwidth in use", "80", PERCENT);
    let given = "the text gives it as an input: here, too, large messages reach 80 % of the links";
    let busy = Claim::more("9", "GPU utilization (\"full\")", ">95", PERCENT);
    let hidden = Claim::less("9", "communication that nothing hides (\"masked\")", "<5", PERCENT);
    let [least_mfu, least_busy] = [&mfu, &busy].map(|claim| claim.stated.low);
    let most = hidden.stated.high;
    let mut with_prompts = readings(&mut lab, Figure::Mfu)?;
    with_prompts.push(reading_prompts(&mut lab, Figure::Mfu, ALL)?);
    Ok(vec![
        mfu.judged(with_prompts, somewhere(Figure::Mfu, &|_, high| high >= least_mfu)?),
        network.out_of_reach(given),
        busy.judged(
            readings(&mut lab, Figure::Utilization)?,
            somewhere(Figure::Utilization, &|_, high| high >= least_busy)?,
        ),
        hidden.judged(readings(&mut lab, Figure::Exposed)?, somewhere(Figure::Exposed, &|low, _| low <= most)?),
    ])
}

fn scaling(model: &ModelSpec, cluster: &Cluster) -> Result<Vec<Finding>, PlannerError> {
    let mut lab = Lab::new(model, cluster)?;
    let last = EPS.len() - 1;
    let near = |per_gpu: f64, text: &str| -> Result<Answer, PlannerError> {
        let value = efficiencies(model, cluster, per_gpu)?[last];
        Ok(Answer::known(format!("against EP=16, {text}"), Estimate::new(value, 0.1)))
    };
    let linear = Claim::more("9", "efficiency with 256 experts a layer (\"near-linear\")", ">90", PERCENT);
    let answers = vec![near(8.0, "8 sequences on each GPU")?, near(64.0, "64 sequences on each GPU")?];
    let mut findings = vec![linear.judged(answers, Regime::NotSearched)];

    // The same sequences on each GPU with all 61 layers on 256 GPUs.
    let of_all = Case::decode(&dedicated(ALL).expect("58 × 256 GPUs"), 32.0 * ALL as f64, CONTEXT);
    let of_few = Case::decode(&together(256).expect("256 GPUs"), 32.0 * 256.0, CONTEXT);
    let ratio = lab.ratio(Figure::TokensPerSGpu, [&of_all, &of_few], "32 sequences on each GPU of both")?;
    let gain = Claim::more(
        "7",
        "tokens/s of a GPU, by 58 experts on each of 256 GPUs (\"gain\")",
        ">1",
        super::claim::unit::TIMES,
    );
    findings.push(gain.judged(vec![ratio], Regime::NotSearched));
    Ok(findings)
}

/// The H100 of papers 000 and 002 against NVIDIA's.
pub(super) fn hardware_checks(at: &'static str, (what, peak): (&str, Rounded)) -> Vec<Check> {
    let real = cluster("dgx-h100").gpu;
    let gib = exactly((real.memory.0 as f64 / f64::from(1 << 30)).round());
    const OTHER: &str = "no H100 is sold like this; predictions are for the GPU of the text";
    vec![
        Check::equation(at, ("TFLOP/s of a GPU", n("400")), (what, peak), OTHER),
        Check::equation(
            at,
            ("memory bandwidth, TB/s", n("1.8")),
            ("of an H100 SXM", exactly(real.memory_bandwidth / 1e12)),
            OTHER,
        ),
        Check::equation(at, ("memory, GB", n("64")), ("of an H100 SXM", gib), OTHER),
    ]
}

fn own_checks(model: &ModelSpec) -> Vec<Check> {
    let expert = exactly(2.0 * 7168.0 * 18432.0 / 1e9);
    let rows = 2.0 * 7168.0 * 18432.0 / (1.8e12 * 0.8) / (4.0 * 7168.0 * 18432.0 / (400e12 * 0.6));
    vec![
        Check::equation("5.1", ("GPUs", n("14,848")), ("256 × 58", exactly(256.0 * 58.0)), "is the product right?"),
        Check::equation("2", ("MoE layers", n("58")), ("61 − 3", exactly(61.0 - 3.0)), "is the difference right?"),
        Check::equation(
            "3",
            ("attention dimension", n("7168")),
            ("128 × 56", exactly(128.0 * 56.0)),
            "is the product right? (DeepSeek-V3 has 128 a head; 002 has 128 × 128)",
        ),
        Check::at_most(
            "6",
            ("GB of a GPU for one expert", n("64")),
            ("GB of an expert, two matrices in FP8", expert),
            "an expert is 0.4 % of the GPU that is kept for it",
        ),
        Check::conflict(
            "2, 6",
            "activation: GELU (\"implied\")",
            "DeepSeek-V3, whose shape this is, gates its experts (SwiGLU, three matrices of 7168 × 2048)",
            "with 18432 each expert is as wide as DeepSeek-V3's dense layers, 9 times its experts",
        ),
        Check::at_most(
            "5.1, 6",
            ("rows that an expert needs in a step for compute to take as long as its weights", exactly(rows)),
            ("rows of one sequence on each GPU: 8 × 256 / 256", exactly(8.0)),
            "full utilization needs over 10 sequences on each of the 14,848 GPUs for each of the 58 stages",
        ),
        Check::equation(
            "2",
            ("parameters of DeepSeek-V3, B", exactly(671.0)),
            ("of this model, B", exactly((model.counts().params_total as f64 / 1e9).round())),
            "six times the model that it resembles",
        ),
        Check::conflict(
            "1, 5.1",
            "256+ GPUs",
            "14,848 GPUs",
            "256 GPUs could hold one expert of each layer: 58 × 0.26 GB = 15 GB of 64",
        ),
    ]
}
