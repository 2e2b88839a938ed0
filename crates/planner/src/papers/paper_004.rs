//! Paper 004: MA separation, the evaluation.

use super::Paper;
use super::check::{Check, exactly, n};
use super::ma_separation::{self as shared, COLUMNS, MA_BY_LENGTH, Setting};
use super::paper_003::hardware;
use crate::PlannerError;

/// Attention all-reduce, MoE all-to-all, gradient synchronization and the total, column by column, in percent.
const COMMUNICATION: [[&str; 4]; 4] = [
    ["12.3", "0", "3.2", "16.6"],
    ["0", "0", "2.8", "4.0"],
    ["11.8", "0", "3.1", "16.0"],
    ["8.4", "6.2", "2.9", "18.8"],
];

/// Parameters, activations, gradients, optimizer states, buffers and the total, column by column, in GB.
const MEMORY: [[&str; 6]; 4] = [
    ["18.2", "22.4", "18.2", "36.4", "8.3", "103.5"],
    ["36.4", "11.2", "36.4", "72.8", "4.1", "160.9"],
    ["18.2", "22.4", "18.2", "36.4", "8.3", "103.5"],
    ["23.1", "18.7", "23.1", "46.2", "12.6", "123.7"],
];

pub(super) fn paper() -> Result<Paper, PlannerError> {
    let setting = Setting::new();
    let mut findings = shared::performance(&setting, "5.1")?;
    findings.extend(shared::scaling(&setting, "5.2")?.0);
    for (column, texts) in COLUMNS.into_iter().zip(COMMUNICATION) {
        findings.extend(shared::communication(&setting, "5.3", column, texts)?);
    }
    for (column, texts) in COLUMNS.into_iter().zip(MEMORY) {
        findings.extend(shared::memory(&setting, "5.4", column, texts)?);
    }
    findings.extend(shared::by_length(&setting, "5.7", COLUMNS[0], ["1.23", "1.84", "2.84", "5.67"])?);
    findings.extend(shared::by_length(&setting, "5.7", COLUMNS[3], MA_BY_LENGTH)?);
    findings.extend(shared::energy(&setting, "5.8")?);
    let mut checks = shared::checks(&setting);
    checks.extend(own_checks());
    Ok(Paper {
        name: "004",
        title: "MA separation (evaluation)",
        hardware: hardware(&setting),
        assumptions: shared::ASSUMPTIONS.to_vec(),
        findings,
        checks,
        plots: Vec::new(),
        bars: Vec::new(),
    })
}

fn own_checks() -> Vec<Check> {
    let names = ["TP=8", "PP=2", "TP=8, PP=2", "MA separation"];
    let mut checks = vec![
        Check::conflict(
            "4.1",
            "activation function: GELU",
            "expert type: feed-forward network with SwiGLU activation",
            "two or three matrices in each expert: 8.6 or 12.9 G parameters in them",
        ),
        Check::conflict(
            "4.3",
            "the baseline is the hybrid TP=8, PP=2",
            "5.7 compares with TP=8 alone",
            "TP=8 is the slower one, so the gains of 5.7 are larger than those of 5.1",
        ),
        Check::conflict(
            "5.3",
            "PP=2 has no row for sends between its stages, TP=8 with PP=2 neither",
            "a pipeline sends every row from stage to stage",
            "a kind of communication is not counted",
        ),
        Check::equation(
            "5.4",
            ("parameters of a GPU under PP=2, GB", n("36.4")),
            ("half of what TP=8 has on each of 8 GPUs, 18.2 × 8 / 2", n("18.2") * exactly(8.0) / exactly(2.0)),
            "all GPUs of TP=8 together would hold 146 GB of a model that has 18.5 GB; PP=2 holds 73 GB",
        ),
    ];
    for (name, [sums, exchange, gradients, total]) in names.into_iter().zip(COMMUNICATION) {
        let broadcast = match name {
            "PP=2" => "1.2",
            "MA separation" => "1.3",
            _ => "1.1",
        };
        let what = format!("communication in all of {name}, %");
        let sum = n(sums).or_exact_zero() + n(exchange).or_exact_zero() + n(gradients) + n(broadcast);
        checks.push(Check::equation("5.3", (&what, n(total)), ("its parts", sum), "do the parts sum up?"));
    }
    for (name, [params, activations, gradients, states, buffers, total]) in names.into_iter().zip(MEMORY) {
        let sum = n(params) + n(activations) + n(gradients) + n(states) + n(buffers);
        let what = format!("memory in all of {name}, GB");
        checks.push(Check::equation("5.4", (&what, n(total)), ("its parts", sum), "do the parts sum up?"));
        let fits = format!("memory of a GPU with {name}, GB");
        checks.push(Check::at_most(
            "5.4, 4.2",
            (&fits, n(total)),
            ("an A100", n("80")),
            "none of the four fits the GPUs that it is said to have run on",
        ));
    }
    let implied = |total, efficiency| exactly(100.0) * n(total) / n(efficiency);
    checks.push(Check::equation(
        "5.4",
        ("memory that TP=8 is 72.3 % of, GB", implied("103.5", "72.3")),
        ("that TP=8, PP=2 is 74.1 % of", implied("103.5", "74.1")),
        "the same 103.5 GB have two efficiencies on the same GPUs",
    ));
    checks.push(Check::equation(
        "5.4",
        ("memory that PP=2 is 69.8 % of, GB", implied("160.9", "69.8")),
        ("that MA separation is 85.4 % of", implied("123.7", "85.4")),
        "no one size of memory gives the efficiencies",
    ));
    checks.push(Check::at_most(
        "5.4",
        ("parameters of a GPU under TP=8, GB", n("18.2")),
        ("an eighth of the model in BF16 (GELU), and a copy of what is not split", exactly(18.5 / 8.0 + 0.9)),
        "18.2 GB are the whole model: nothing is split",
    ));
    checks.push(shared::heads_check("4.2"));
    checks
}
