//! Where a deployment is, for kriging: sizes as logarithms, kinds as 0 or 1.

use crate::calibration::case::Case;
use crate::calibration::served::Deployment;
use crate::cost::{Precision, Stack};

/// Names of the coordinates.
pub const NAMES: [&str; 23] = [
    "input",
    "output",
    "concurrency",
    "ranks",
    "attention_groups",
    "expert_ranks",
    "prefill_ranks",
    "disaggregated",
    "prefill_workers",
    "decode_workers",
    "version",
    "h200",
    "trtllm",
    "vllm",
    "sglang",
    "dense_8_bits",
    "experts_4_bits",
    "active_parameters",
    "parameters",
    "fitting",
    "iteration",
    "decode_iteration",
    "prefill",
];

/// Coordinates of a deployment, in the order of [`NAMES`].
pub fn of(case: &Case) -> Vec<f64> {
    let row = &case.row;
    let flag = |is: bool| if is { 1.0 } else { 0.0 };
    let (worker, prefill_ranks, workers) = match row.deployment {
        Deployment::Aggregated(worker) => (worker, 1, None),
        Deployment::Disaggregated { prefill, decode, workers } => (decode, prefill.ranks(), workers),
    };
    let (prefill_workers, decode_workers) = workers.unwrap_or((0, 0));
    let ln = |count: usize| (count as f64).ln();
    vec![
        row.input.ln(),
        row.output.ln(),
        row.concurrency.ln(),
        ln(worker.ranks()),
        ln(worker.dp),
        ln(worker.ep),
        ln(prefill_ranks),
        flag(matches!(row.deployment, Deployment::Disaggregated { .. })),
        ln(prefill_workers + 1),
        ln(decode_workers + 1),
        version(&row.version).unwrap_or_else(|| usual_version(case.stack)),
        flag(row.system == "h200_sxm"),
        flag(case.stack == Stack::Trtllm),
        flag(case.stack == Stack::Vllm),
        flag(case.stack == Stack::Sglang),
        flag(matches!(case.formats.dense, Precision::Fp8 | Precision::Fp8Block)),
        flag(matches!(case.formats.experts, Precision::F4 | Precision::Int4)),
        case.params.0.ln(),
        case.params.1.ln(),
        case.physics.fitting.ln(),
        case.physics.tpot.ln(),
        case.physics.decode.ln(),
        case.physics.prefill.ln(),
    ]
}

/// A version as a number that grows by 0.05 from one minor version to the next; `None` where it names none, as
/// `gpt-oss-dev`.
fn version(text: &str) -> Option<f64> {
    let mut parts = text.split('.').map(|part| {
        let digits = part.split(|c: char| !c.is_ascii_digit()).next().unwrap_or_default();
        digits.parse::<f64>().ok()
    });
    let (major, minor, patch) = (parts.next()??, parts.next()??, parts.next()??);
    Some(5.0 * (major + minor / 100.0 + patch / 10_000.0))
}

/// Where none is said: one in the middle of those that were measured.
fn usual_version(stack: Stack) -> f64 {
    let text = match stack {
        Stack::Trtllm => "1.0.0",
        Stack::Vllm => "0.15.0",
        _ => "0.5.8",
    };
    version(text).expect("a version")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_ordered() {
        let of = |text| version(text).unwrap();
        assert!(of("0.8.1.post3") < of("1.0.0rc3") && of("1.0.0rc3") < of("1.1.0rc2.post2"));
        assert!(of("0.5.6.post2") < of("0.5.8.post1") && of("0.9.0") < of("0.18.0"));
        assert_eq!((version("gpt-oss-dev"), version("")), (None, None));
    }
}
