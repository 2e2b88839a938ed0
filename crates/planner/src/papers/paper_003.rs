//! Paper 003: MA separation, as a deployment.

use super::Paper;
use super::check::{Check, exactly, n};
use super::claim::unit::{GB, NUMBER, PERCENT, S, TIMES};
use super::claim::{Claim, Finding};
use super::deployments::{ma, model};
use super::lab::{Answer, Bound};
use super::ma_separation::{self as shared, COLUMNS, CONTEXT, GPUS, MA_BY_LENGTH, SEQS, Setting};
use super::regime::Regime;
use crate::PlannerError;
use crate::cost::touched;
use crate::estimate::Estimate;
use crate::load::{ExpertLoad, LoadModel};

pub(super) fn paper() -> Result<Paper, PlannerError> {
    let setting = Setting::new();
    let ma_column = COLUMNS[3];
    let mut findings = shared::performance(&setting, "Table 1")?;
    let (scaling, scaling_plot) = shared::scaling(&setting, "5.2")?;
    findings.extend(scaling);
    findings.extend(speedup(&setting)?);
    findings.extend(shared::communication(&setting, "5.3", ma_column, ["8.4", "6.2", "2.9", "18.8"])?);
    findings.push(Claim::less("5.3", "parameter broadcast", "1.3", PERCENT).out_of_reach(
        "no plan of these broadcasts parameters while it runs, and the text says nothing of when it does",
    ));
    findings.extend(volumes(&setting));
    findings.extend(shared::memory(&setting, "5.4", ma_column, ["23.1", "18.7", "23.1", "46.2", "12.6", "123.7"])?);
    findings.extend(load_balance(&setting)?);
    findings.extend(shared::by_length(&setting, "5.7", ma_column, MA_BY_LENGTH)?);
    findings.extend(shared::energy(&setting, "5.8")?);
    findings.extend(faults(&setting));
    findings.extend(quality());
    let mut checks = shared::checks(&setting);
    checks.extend(own_checks(&setting));
    Ok(Paper {
        name: "003",
        title: "MA separation (deployment)",
        hardware: hardware(&setting),
        assumptions: shared::ASSUMPTIONS.to_vec(),
        findings,
        checks,
        plots: vec![shared::length_plot(&setting)?, scaling_plot],
        bars: vec![shared::communication_bars(&setting)?],
    })
}

pub(super) fn hardware(setting: &Setting) -> String {
    let cluster = &setting.cluster;
    format!("{} × {} in {} nodes ({})", cluster.num_gpus(), cluster.gpu.name, cluster.nodes, cluster.name)
}

fn speedup(setting: &Setting) -> Result<Vec<Finding>, PlannerError> {
    use super::deployments::hybrid;
    use super::lab::{Case, Figure};
    let mut lab = setting.lab()?;
    let claim = Claim::more("5.2", "speed-up on 16 GPUs over TP=8, PP=2", "1.528", TIMES);
    let least = claim.stated.low;
    let regime = setting.where_gained(Figure::TokensPerS, |ratio| ratio >= least)?;
    let layouts = [ma, hybrid].map(|spreading| spreading(GPUS).expect("both run on 16 GPUs"));
    let cases = layouts.each_ref().map(|layout| Case::decode(layout, SEQS, CONTEXT));
    let answer = lab.ratio(Figure::TokensPerS, [&cases[0], &cases[1]], "1,024 sequences decode at once")?;
    Ok(vec![claim.judged(vec![answer], regime)])
}

/// "Communication Volume per Layer" of a step over all 2,097,152 tokens.
fn volumes(setting: &Setting) -> Vec<Finding> {
    let row = setting.model.hidden_size as f64;
    let tokens = SEQS * CONTEXT;
    let once = Answer::exact("every row once, in BF16", tokens * row * 2.0);
    let int8 = 1.0 + 4.0 / 128.0;
    let out = Answer::exact("every row to its two experts, in 8 bits", 2.0 * tokens * row * int8);
    let both = Answer::exact("every row to its two experts and back, in 8 bits", 4.0 * tokens * row * int8);
    vec![
        Claim::less("5.3", "all-reduce of attention in a layer", "16.8", GB).judged(vec![once], Regime::NotSearched),
        Claim::less("5.3", "all-to-all of the experts in a layer", "16.8", GB)
            .judged(vec![out, both], Regime::NotSearched),
    ]
}

/// Shares of the experts. An even router is the reading that needs no assumption; the regime is a skewed one.
fn load_balance(setting: &Setting) -> Result<Vec<Finding>, PlannerError> {
    let moe = setting.model.layers.iter().find_map(|ffn| ffn.as_moe()).expect("the model has experts");
    let (experts, top_k) = (moe.num_experts as f64, moe.top_k as f64);
    let pairs = SEQS * CONTEXT * top_k;
    let share = 1.0 / experts;
    // Chance alone: a share of n pairs has the variance p (1 − p) / n.
    let sd = (share * (1.0 - share) / pairs).sqrt();
    let even = "routers choose evenly, over a step of 2,097,152 tokens";
    let around = |value: f64| Answer::known(even, Estimate { value, low: value - 2.0 * sd, high: value + 2.0 * sd });
    let largest = Claim::less("5.5", "largest share of an expert", "8.9", PERCENT);
    let exponent = zipf_with_largest(moe.num_experts, moe.top_k, largest.stated.value)?;
    let skewed = Regime::Found { at: format!("popularity falls off like i^-{exponent:.2} (Zipf) over the 16 experts") };
    let active = Claim::more("5.5", "experts with at least one token in a step", "94.2", PERCENT);
    let few = (1.0 - active.stated.value).ln() / (1.0 - top_k / experts).ln();
    let tokens = Regime::Found { at: format!("a step has {few:.0} tokens: 1 − (1 − 2/16)^n = 94.2 %") };
    let touched_share = touched(SEQS * CONTEXT, top_k, experts) / experts;
    Ok(vec![
        largest.judged(vec![around(share)], skewed),
        Claim::more("5.5", "smallest share of an expert", "5.8", PERCENT)
            .judged(vec![around(share)], Regime::NotSearched),
        Claim::less("5.5", "standard deviation of the shares", "0.023", NUMBER)
            .judged(vec![Answer::known(even, Estimate::new(sd, 0.2))], Regime::NotSearched),
        active.judged(vec![Answer::exact(even, touched_share)], tokens),
        Claim::less("5.5", "load balancing loss", "0.0082", NUMBER)
            .out_of_reach("a loss of training, which no simulation of time has"),
    ])
}

/// The exponent for which the most popular of the experts has this share of all choices, by halving.
fn zipf_with_largest(experts: usize, top_k: usize, largest: f64) -> Result<f64, PlannerError> {
    let (mut low, mut high) = (0.0, 4.0);
    for _ in 0..20 {
        let middle = 0.5 * (low + high);
        // One expert a rank: the fullest rank is the most popular expert.
        let skew = ExpertLoad::new(LoadModel::Zipf(middle), experts, top_k)?.spread(experts, 0, false).skew();
        if skew / (experts as f64) < largest { low = middle } else { high = middle }
    }
    Ok(0.5 * (low + high))
}

fn faults(setting: &Setting) -> Vec<Finding> {
    let link = setting.cluster.inter_node.as_ref().expect("the cluster has nodes");
    let counts = setting.model.counts();
    let experts = counts.parts.iter().find(|part| part.name == moesaic_spec::PartName::RoutedExperts);
    let held = experts.map_or(0.0, |part| part.bytes as f64) / 4.0;
    let seconds = held / link.bandwidth_per_gpu;
    let bound = Bound::limit(seconds, format!("{} of experts / 25.0 GB/s", GB.show(held)));
    let loads = Answer::known("a spare GPU reads its experts over InfiniBand, at best", Estimate::new(seconds, 0.3));
    vec![
        Claim::less("5.9", "recovery of a failed GPU", "2.3", S)
            .judged(vec![loads.bounded(bound)], Regime::NotSearched),
        Claim::more("5.9", "expert failures handled", "99.2", PERCENT)
            .out_of_reach("no failures are simulated, and the text does not say which were"),
    ]
}

fn quality() -> Vec<Finding> {
    let weights =
        "a property of trained weights: a simulation has none, and how a model is spread does not change its sums";
    vec![
        Claim::less("6", "perplexity", "12.8", NUMBER).out_of_reach(weights),
        Claim::more("6", "convergence, faster", "23", PERCENT).out_of_reach(weights),
    ]
}

fn own_checks(setting: &Setting) -> Vec<Check> {
    let tokens = exactly(SEQS * CONTEXT);
    let row_bytes = exactly(setting.model.hidden_size as f64 * 2.0);
    let gb = exactly(1e9);
    let counts = |name: &str| exactly(2.0 * model(name).counts().params_total as f64 / 1e9);
    let least = 1.0 / 16.0;
    let (low, high) = (0.058f64, 0.089f64);
    // Bhatia and Davis: no distribution between two ends has more variance than (high − mean)(mean − low).
    let widest = ((high - least) * (least - low)).sqrt();
    let nic = setting.cluster.inter_node.as_ref().map_or(1.0, |link| link.bandwidth_per_node);
    vec![
        Check::equation(
            "4.1",
            ("tokens of a batch", n("2,097,152")),
            ("1,024 × 2,048", tokens),
            "is the product right?",
        ),
        Check::equation(
            "5.3",
            ("all-reduce of a layer, GB", n("16.8")),
            ("2,097,152 tokens × 4,096 × 2 bytes", tokens * row_bytes / gb),
            "17.2 GB, or 16.0 GiB; 16.8 is neither",
        ),
        Check::equation(
            "5.3",
            ("all-to-all of a layer, GB", n("16.8")),
            ("the same rows to 2 experts and back, in 8 bits", exactly(4.0 * 0.5) * tokens * row_bytes / gb),
            "the text counts rows once; each goes to two experts, and both answers come back",
        ),
        Check::equation(
            "5.3, Table 1",
            ("bandwidth of a node's adapter, GB/s", exactly(nic / 1e9)),
            (
                "16.8 GB in 6.2 % of 1.82 ms / 4 layers, GB/s",
                n("16.8") / (n("6.2") / exactly(100.0) * n("1.82") / exactly(1e3) / exactly(4.0)),
            ),
            "volumes are of a step of 2,097,152 tokens, the share is of a TPOT: gigabytes in microseconds",
        ),
        Check::equation(
            "5.3",
            ("communication in all, %", n("18.8")),
            ("8.4 + 6.2 + 2.9 + 1.3", n("8.4") + n("6.2") + n("2.9") + n("1.3")),
            "do the parts sum up?",
        ),
        Check::equation(
            "5.3",
            ("a layer in all, GB", n("33.6")),
            ("16.8 + 16.8", n("16.8") + n("16.8")),
            "do the parts sum up?",
        ),
        Check::conflict(
            "Table 1, 5.3",
            "TPOT: time per output token, of inference",
            "gradient synchronization takes 2.9 % of the time, and 5.4 holds gradients and optimizer states",
            "one table has the times of inference and the communication and memory of training",
        ),
        Check::equation(
            "5.4",
            ("memory in all, GB", n("123.7")),
            ("23.1 + 18.7 + 23.1 + 46.2 + 12.6", n("23.1") + n("18.7") + n("23.1") + n("46.2") + n("12.6")),
            "do the parts sum up?",
        ),
        Check::at_most(
            "5.4, 4.2",
            ("memory of a GPU, GB", n("123.7")),
            ("an A100", n("80")),
            "\"with paging\" a third of it would be fetched over PCIe in each step, which no time of the text has room for",
        ),
        Check::equation(
            "5.4",
            ("utilization, %", n("85.4")),
            ("123.7 / 124", exactly(100.0) * n("123.7") / n("124")),
            "the text's own calculation gives nearly 100 %",
        ),
        Check::at_most(
            "5.4",
            ("parameters of a GPU, GB", n("23.1")),
            ("the whole model in BF16 (GELU)", counts("paper-003-gelu")),
            "a GPU would hold more than the model; SwiGLU's 27.1 GB would make it 85 % of the model on each GPU",
        ),
        Check::equation(
            "5.4",
            ("optimizer states, GB", n("46.2")),
            ("AdamW's two moments in F32 beside BF16 weights, 8 / 2 × 23.1", exactly(4.0) * n("23.1")),
            "twice the weights is right only if moments have the weights' own type, which AdamW in mixed precision has not",
        ),
        Check::at_most(
            "5.5",
            ("standard deviation of the shares", n("0.023")),
            ("shares of mean 1/16 between 5.8 % and 8.9 %", exactly(widest)),
            "no 16 numbers between these ends spread as widely",
        ),
        Check::at_most(
            "5.5",
            ("least that the relative deviation is, if 0.023 is relative to 1/16", exactly(relative_spread(high))),
            ("0.023", n("0.023")),
            "and one expert with 8.9 % alone spreads more than 2.3 % of the mean",
        ),
        Check::conflict(
            "5.5, 4.1",
            "94.2 % of the experts are active in a step",
            "a step has 4,194,304 choices among 16 experts: that one gets none has no chance",
            "the figure is that of a step of about 21 tokens",
        ),
        Check::equation(
            "5.2",
            ("speed-up", n("1.528")),
            ("13,289 / 8,696", n("13,289") / n("8,696")),
            "do the figures give it?",
        ),
        Check::conflict(
            "5.2",
            "linear scaling up to 16 GPUs",
            "efficiency at 16 GPUs is 87 %",
            "neither says against how many GPUs",
        ),
        Check::conflict(
            "4.3",
            "attention is held twice, for fault tolerance",
            "12 GPUs share 32 heads [3,3,3,3,3,3,3,3,2,2,2,2]",
            "each head is on one GPU in the distribution; held twice it would be on two",
        ),
        shared::heads_check("4.3"),
        Check::equation(
            "4.2",
            ("NVLink 3, GB/s each way", n("600")),
            ("data sheet: 12 links × 25 GB/s", exactly(300.0)),
            "600 GB/s counts both directions",
        ),
        Check::equation(
            "6, Table 1",
            (
                "days that 50,000 steps of 2,097,152 tokens take at TPS",
                n("50,000") * tokens / n("13,289") / exactly(86400.0),
            ),
            ("at \"throughput\"", n("50,000") * tokens / n("212,624") / exactly(86400.0)),
            "ten runs at TPS are 2.5 years of the cluster; the two rates cannot both be the training's",
        ),
    ]
}

/// Least standard deviation by the mean of 16 shares, one of which is this large: all others alike.
fn relative_spread(largest: f64) -> f64 {
    let mean = 1.0f64 / 16.0;
    let others = (1.0 - largest) / 15.0;
    (((largest - mean).powi(2) + 15.0 * (others - mean).powi(2)) / 16.0).sqrt() / mean
}
