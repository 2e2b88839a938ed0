//! Paper 002: one GPU for each expert of each layer, BF16, experts of width 2048.

use moesaic_spec::{Cluster, LinkClass, ModelSpec};

use super::Paper;
use super::check::{Check, exactly, n};
use super::claim::unit::{GB, MB, PERCENT, TB_PER_S, TIMES, US};
use super::claim::{Claim, Finding};
use super::deployments::{cluster, dedicated, model, with_experts};
use super::lab::{Answer, Bound, Case, Figure, Lab, Phase};
use super::plot::Plot;
use super::regime::{Point, Regime, Search};
use crate::PlannerError;
use crate::estimate::Estimate;

const STAGES: usize = 58;
const GPUS: usize = STAGES * 64;
/// Tokens of context; the text's sequence length is "variable".
const CONTEXT: f64 = 256.0;
/// Sequences on each GPU for each micro-batch; the text's batch size is "variable".
const FEW: f64 = 1.0;
const MANY: f64 = 8.0;

pub(super) fn paper() -> Result<Paper, PlannerError> {
    let (model, cluster) = (model("paper-002"), cluster("h100-paper"));
    let mut findings = Vec::new();
    findings.extend(efficiency_claims(&model, &cluster)?);
    findings.extend(memory_claims(&model, &cluster)?);
    findings.extend(network_claims(&model, &cluster)?);
    let (scaling, plot) = scaling_claims(&model, &cluster)?;
    findings.extend(scaling);
    Ok(Paper {
        name: "002",
        title: "one GPU for each expert",
        hardware: format!("{GPUS} × {} in nodes of 8 ({})", cluster.gpu.name, cluster.name),
        assumptions: vec![
            "64 experts a layer (\"EP=64\"), 8 of them for each token; the text gives neither.",
            "GPUs of its own for each layer, 58 × 64 = 3,712: with all layers on each GPU attention alone takes 57 GB.",
            "All 58 stages are at work, so 58 micro-batches are on their way; 1 or 8 sequences of 256 tokens on each GPU \
             for each of them: batch size and sequence length are \"variable\", and with 128 whole heads of keys and values \
             more does not fit.",
            "Links are those of a real DGX H100; the text gives none but the memory's own bandwidth.",
        ],
        findings,
        checks: checks(),
        plots: vec![plot],
        bars: Vec::new(),
    })
}

/// 3,712 GPUs with so many sequences on each for each of the 58 micro-batches.
fn deployment(per_gpu: f64) -> Case {
    let layout = dedicated(GPUS).expect("64 GPUs for each of 58 layers");
    let seqs = per_gpu * layout.dp as f64 * STAGES as f64;
    Case::decode(&layout, seqs, CONTEXT)
}

fn readings(lab: &mut Lab, figure: Figure) -> Result<Vec<Answer>, PlannerError> {
    Ok(vec![
        lab.ask(figure, &deployment(FEW), "1 sequence on each GPU")?,
        lab.ask(figure, &deployment(MANY), "8 sequences on each GPU")?,
    ])
}

/// Prompts instead of decoding: the regime with the most operations for a byte.
pub(super) fn reading_prompts(lab: &mut Lab, figure: Figure, gpus: usize) -> Result<Answer, PlannerError> {
    let layout = dedicated(gpus).expect("a layer's GPUs for each of 58 layers");
    let case = Case::prefill(&layout, gpus as f64, 2048.0);
    lab.ask(figure, &case, "a prompt of 2,048 tokens is read on each GPU for each micro-batch")
}

fn somewhere(
    model: &ModelSpec,
    cluster: &Cluster,
    figure: Figure,
    reached: impl Fn(f64, f64) -> bool,
) -> Result<Regime, PlannerError> {
    let all = |per_gpu: f64| per_gpu * GPUS as f64;
    let search = Search {
        figure,
        phase: Phase::Decode,
        proposed: dedicated,
        baseline: None,
        from: Point { gpus: GPUS, seqs: all(MANY), context: CONTEXT, links: 1.0 },
        gpus: &[GPUS],
        seqs: &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0].map(all),
        contexts: &[1.0, 16.0, 64.0, 256.0, 1024.0],
        links: &[1.0, 4.0, 16.0],
    };
    search.find(model, cluster, reached)
}

fn efficiency_claims(model: &ModelSpec, cluster: &Cluster) -> Result<Vec<Finding>, PlannerError> {
    let mut lab = Lab::new(model, cluster)?;
    let mfu = Claim::more("3.1", "MFU", "60", PERCENT);
    let busy = Claim::more("5.2", "GPU utilization", ">95", PERCENT);
    let hidden = Claim::less("3.3", "communication that nothing hides", "<5", PERCENT);
    let (least_mfu, least_busy, most_exposed) = (mfu.stated.low, busy.stated.low, hidden.stated.high);
    let mut with_prompts = readings(&mut lab, Figure::Mfu)?;
    with_prompts.push(reading_prompts(&mut lab, Figure::Mfu, GPUS)?);
    let where_mfu = somewhere(model, cluster, Figure::Mfu, |_, high| high >= least_mfu)?;
    let where_busy = somewhere(model, cluster, Figure::Utilization, |_, high| high >= least_busy)?;
    let where_hidden = somewhere(model, cluster, Figure::Exposed, |low, _| low <= most_exposed)?;
    Ok(vec![
        mfu.judged(with_prompts, where_mfu),
        busy.judged(readings(&mut lab, Figure::Utilization)?, where_busy),
        hidden.judged(readings(&mut lab, Figure::Exposed)?, where_hidden),
    ])
}

fn memory_claims(model: &ModelSpec, cluster: &Cluster) -> Result<Vec<Finding>, PlannerError> {
    let mut lab = Lab::new(model, cluster)?;
    let moe = model.layers.iter().find_map(|ffn| ffn.as_moe()).expect("the model has experts");
    let expert = (moe.activation.matrices() as usize * model.hidden_size * moe.intermediate_size * 2) as f64;
    let storage = Answer::exact("two matrices of 7168 × 2048 in BF16", expert);
    let room = cluster.gpu.memory.0 as f64;
    let used = |answers: Vec<Answer>| -> Vec<Answer> {
        let share = |answer: Answer| Answer::exact(answer.assuming, answer.estimate.value / room);
        answers.into_iter().map(share).collect()
    };
    let efficient = Claim::more("3.2", "memory in use at peak", ">95", PERCENT);
    let least = efficient.stated.low * room;
    let filled = somewhere(model, cluster, Figure::Memory, |low, high| low >= 0.9 * least && high <= room)?;
    Ok(vec![
        Claim::less("3.2", "bytes of an expert", "58.72", MB).judged(vec![storage], Regime::NotSearched),
        Claim::less("3.2", "memory of a GPU (\"≤64\")", "<64", GB)
            .judged(readings(&mut lab, Figure::Memory)?, Regime::NotSearched),
        efficient.judged(used(readings(&mut lab, Figure::Memory)?), filled),
    ])
}

fn network_claims(model: &ModelSpec, cluster: &Cluster) -> Result<Vec<Finding>, PlannerError> {
    let lab = Lab::new(model, cluster)?;
    let row = (model.hidden_size * 2) as f64;
    let sent = |class: LinkClass, assuming: &str| {
        let price = lab.network().point_to_point(row, class);
        let bandwidth = cluster.link(class).bandwidth_per_gpu;
        let bound = Bound::limit(row / bandwidth, format!("14.3 kB / {}", crate::report::format::rate(bandwidth)));
        Answer::known(assuming, Estimate::new(price.seconds, price.sd)).bounded(bound)
    };
    let latency = vec![
        sent(LinkClass::InterNode, "one row to another node"),
        sent(LinkClass::IntraNode, "one row inside a node"),
    ];
    let link = |class: LinkClass, assuming: &str| {
        let link = cluster.link(class);
        let reached = link.bandwidth_per_gpu * link.utilization;
        let bound = Bound::limit(link.bandwidth_per_gpu, format!("{} one way, from the data sheet", link.name));
        Answer::exact(assuming, reached).bounded(bound)
    };
    let bandwidth = vec![link(LinkClass::InterNode, "to another node"), link(LinkClass::IntraNode, "inside a node")];
    Ok(vec![
        Claim::less("3.3", "time of one token's transfer", "<100", US).judged(latency, Regime::NotSearched),
        Claim::more("3.3", "effective bandwidth of the network", "1.44", TB_PER_S)
            .judged(bandwidth, Regime::NotSearched),
    ])
}

/// Tokens per second and GPU, and seconds of a step, of as many experts as GPUs of a layer.
fn at_ep(model: &ModelSpec, cluster: &Cluster, ep: usize, per_gpu: f64) -> Result<(f64, f64), PlannerError> {
    let model = with_experts(model, ep);
    let layout = dedicated(STAGES * ep).expect("a layer's GPUs for each of 58 layers");
    let case = Case::decode(&layout, per_gpu * (ep * STAGES) as f64, CONTEXT);
    let mut lab = Lab::new(&model, cluster)?;
    let step = lab.ask(Figure::Step, &case, "")?.estimate.value;
    Ok((lab.ask(Figure::TokensPerSGpu, &case, "")?.estimate.value, step))
}

/// Parallel efficiency at EP 16 to 256, for one model: what a GPU does there by what it does at EP = 16.
pub(super) fn efficiencies(model: &ModelSpec, cluster: &Cluster, per_gpu: f64) -> Result<Vec<f64>, PlannerError> {
    let rates: Vec<f64> =
        EPS.iter().map(|&ep| Ok(at_ep(model, cluster, ep, per_gpu)?.0)).collect::<Result<_, PlannerError>>()?;
    Ok(rates.iter().map(|rate| rate / rates[0]).collect())
}

pub(super) const EPS: [usize; 5] = [16, 32, 64, 128, 256];

fn scaling_claims(model: &ModelSpec, cluster: &Cluster) -> Result<(Vec<Finding>, Plot), PlannerError> {
    let [few, many] = [efficiencies(model, cluster, FEW)?, efficiencies(model, cluster, MANY)?];
    let at = |values: &[f64], ep: usize| values[EPS.iter().position(|&at| at == ep).expect("in the list")];
    let by = |ep: usize, times: f64| {
        vec![
            Answer::known("against EP=16, 1 sequence on each GPU", Estimate::new(times * at(&few, ep), 0.1)),
            Answer::known("against EP=16, 8 sequences on each GPU", Estimate::new(times * at(&many, ep), 0.1)),
        ]
    };
    // The same experts on fewer GPUs: two, four, eight of them on each.
    let crowded = |per_gpu: usize| -> Result<f64, PlannerError> {
        let mut lab = Lab::new(model, cluster)?;
        let layout = dedicated(STAGES * 64 / per_gpu).expect("fewer GPUs for each of 58 layers");
        let case = Case::decode(&layout, MANY * (layout.dp * STAGES) as f64, CONTEXT);
        Ok(lab.ask(Figure::TokensPerSGpu, &case, "")?.estimate.value)
    };
    let gain = crowded(1)? / crowded(8)?;
    let slower = at_ep(model, cluster, 256, MANY)?.1 / at_ep(model, cluster, 16, MANY)?.1;
    let findings = vec![
        Claim::more("4.1", "parallel efficiency at EP=64", ">90", PERCENT).judged(by(64, 1.0), Regime::NotSearched),
        Claim::more("4.1", "parallel efficiency at EP=256 (\"limited only by cluster size\")", ">90", PERCENT)
            .judged(by(256, 1.0), Regime::NotSearched),
        Claim::more("4.2", "throughput of 256 experts by 16 (\"linear\")", "16", TIMES)
            .judged(by(256, 16.0), Regime::NotSearched),
        Claim::less("4.2", "step at EP=256 by EP=16 (\"consistent regardless of cluster size\")", "1.0", TIMES)
            .judged(vec![Answer::known("8 sequences on each GPU", Estimate::new(slower, 0.1))], Regime::NotSearched),
        Claim::more(
            "5.1",
            "tokens/s of a GPU with 1 expert by one with 8 (\"diminishing returns beyond 4-8\")",
            ">1",
            TIMES,
        )
        .judged(vec![Answer::known("8 sequences on each GPU", Estimate::new(gain, 0.1))], Regime::NotSearched),
    ];
    let claimed = EPS.map(|ep| (ep == 64).then_some(0.9)).to_vec();
    let some = |values: &[f64]| values.iter().map(|&value| Some(value)).collect();
    let plot = Plot::new(
        "parallel-efficiency",
        "Tokens/s of a GPU by EP, against EP = 16",
        ["experts = GPUs of a layer", "share of EP = 16"],
        EPS.map(|ep| ep as f64).to_vec(),
    )
    .with("claimed by 002", claimed)
    .with("002, 1 seq a GPU", some(&few))
    .with("002, 8 seqs a GPU", some(&many));
    let large = super::deployments::model("paper-000");
    let plot = plot
        .with("000, 1 seq a GPU", some(&efficiencies(&large, cluster, FEW)?))
        .with("000, 8 seqs a GPU", some(&efficiencies(&large, cluster, MANY)?));
    Ok((findings, plot))
}

fn checks() -> Vec<Check> {
    let real = cluster("dgx-h100").gpu;
    let peak = exactly(real.peak_flops.bf16 / 1e12);
    let mut checks = super::paper_000::hardware_checks("1.3", ("BF16 TFLOP/s of an H100", peak));
    checks.extend([
        Check::equation(
            "3.1",
            ("sustained TFLOP/s", n("240")),
            ("400 × 60 %", n("400") * n("0.60")),
            "do the figures give it?",
        ),
        Check::equation(
            "3.3",
            ("effective bandwidth, TB/s", n("1.44")),
            ("1.8 TB/s × 80 %", n("1.8") * n("0.80")),
            "do the figures give it?",
        ),
        Check::conflict(
            "2.2, 3.3",
            "the network sustains 1.8 TB/s at 80 % utilization",
            "1.8 TB/s is the memory's bandwidth (1.3); NVLink 4 has 0.45 each way (0.9 in both), InfiniBand NDR 0.05",
            "the memory's bandwidth stands in for the network's, 4 to 36 times too fast",
        ),
        Check::equation(
            "3.2",
            ("MB of an expert", n("58.72")),
            ("7168 × 2048 × 2 matrices × 2 bytes / 10^6", exactly(7168.0 * 2048.0 * 4.0 / 1e6)),
            "so experts have two matrices, without a gate",
        ),
        Check::at_most(
            "3.2",
            ("GB in use at \"more than 95 %\" of 64", exactly(0.95 * 64.0)),
            ("GB of one expert", exactly(0.05872)),
            "an expert is 0.09 % of the GPU that is kept for it: the rest must be attention, cache or nothing",
        ),
        Check::equation(
            "1.2",
            ("token dimension", n("7168")),
            ("128 heads × 128", exactly(16384.0)),
            "attention is wider than the residual stream: allowed, but not 000's 128 × 56",
        ),
        Check::conflict(
            "3.3, 4.2",
            "communication is less than 5 % of the time",
            "bottleneck: network bandwidth at scale",
            "what takes less than a twentieth of the time is no bottleneck",
        ),
        Check::conflict(
            "3.1, 5.2",
            "60 % MFU achieved",
            "more than 95 % GPU utilization",
            "two thirds of what a busy GPU could compute, if both are right: utilization counts busy time, MFU operations",
        ),
        Check::conflict(
            "2.1",
            "one GPU per expert per layer",
            "each GPU hosts exactly one expert per layer",
            "the first needs 58 times as many GPUs as the second, where attention of all layers does not fit beside it",
        ),
    ]);
    checks
}
