//! Tables of measured times: CSV, one file for a GPU and an op.

use moesaic_spec::Gpu;
use serde_json::{Map, Value};

use super::op::Op;
use super::{params, roofline};
use crate::PlannerError;

/// Whose kernels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Stack {
    /// NVIDIA TensorRT-LLM.
    Trtllm,
    /// vLLM.
    Vllm,
    /// SGLang; the one that has kernels for rows that travel to experts, and what is priced where nobody says otherwise.
    #[default]
    Sglang,
    /// FlashInfer's alone.
    FlashInfer,
    /// DeepSeek's FlashMLA alone.
    FlashMla,
    /// DeepSeek's DeepGEMM alone.
    DeepGemm,
    /// This project's.
    Moesaic,
}

impl Stack {
    /// By the column `framework`, whatever its case.
    pub fn of(framework: &str) -> Option<Stack> {
        let name = framework.to_ascii_lowercase();
        Some(match name.split_whitespace().next().unwrap_or_default() {
            "trtllm" => Stack::Trtllm,
            "vllm" => Stack::Vllm,
            "sglang" => Stack::Sglang,
            "flashinfer" => Stack::FlashInfer,
            "flashmla" => Stack::FlashMla,
            "deepgemm" => Stack::DeepGemm,
            "moesaic" => Stack::Moesaic,
            _ => return None,
        })
    }
}

/// One measurement.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// On which GPU; the name of a folder of tables.
    pub device: String,
    /// What was measured.
    pub op: Op,
    /// Whose kernel.
    pub stack: Stack,
    /// Which of its kernels, where it has several.
    pub kernel: String,
    /// How long it took, seconds.
    pub seconds: f64,
}

/// Columns beside the op's parameters.
const COLUMNS: &[&str] = &["kernel", "framework", "version", "latency_us"];

/// Reads a table. Lines that begin with `#` say where it comes from; the first other line names the columns: parameters of the
/// op, then `kernel` (optional), `framework`, `version` and `latency_us`. `file` is named in errors.
///
/// # Errors
///
/// [`PlannerError::Table`] names line and column of: a column that is not known or is missing, a line of another length, a
/// value that cannot be, and a time that is not above zero or shorter than physics lets any op be on this GPU.
pub fn parse(text: &str, file: &str, device: &str, gpu: &Gpu, op: &str) -> Result<Vec<Row>, PlannerError> {
    let bad = |line: usize, column: &str, why: String| PlannerError::Table {
        file: file.to_owned(),
        line: line + 1,
        column: column.to_owned(),
        why,
    };
    let mut lines = text.lines().enumerate().filter(|(_, line)| !line.starts_with('#') && !line.trim().is_empty());
    let known: Vec<&str> = match params::known(op) {
        Some(known) => known.chain(COLUMNS.iter().copied()).collect(),
        None => return Err(bad(0, "op", format!("{op} is no op of tables"))),
    };
    let (at, head) = lines.next().ok_or_else(|| bad(0, "latency_us", "the table is empty".into()))?;
    let columns: Vec<&str> = head.split(',').map(str::trim).collect();
    if let Some(column) = columns.iter().find(|column| !known.contains(column)) {
        return Err(bad(at, column, format!("is not known; a table of {op} may have {}", known.join(", "))));
    }
    let place = |name: &str| {
        columns.iter().position(|column| *column == name).ok_or_else(|| bad(at, name, "is missing".into()))
    };
    let (framework, latency) = (place("framework")?, place("latency_us")?);
    let kernel = columns.iter().position(|column| *column == "kernel");

    let mut rows = Vec::new();
    for (at, line) in lines {
        let values: Vec<&str> = line.split(',').map(str::trim).collect();
        if values.len() != columns.len() {
            return Err(bad(at, "", format!("{} values for {} columns", values.len(), columns.len())));
        }
        let params: Map<String, Value> =
            columns.iter().zip(&values).map(|(name, value)| ((*name).to_owned(), Value::from(*value))).collect();
        let op = Op::from_params(op, &params).map_err(|error| match error {
            PlannerError::Parameter { name, value, right } => bad(at, &name, format!("{value} is not {right}")),
            other => other,
        })?;
        let stack = Stack::of(values[framework])
            .ok_or_else(|| bad(at, "framework", format!("{} is not known", values[framework])))?;
        let seconds = match values[latency].parse::<f64>() {
            Ok(us) if us > 0.0 && us.is_finite() => us * 1e-6,
            _ => return Err(bad(at, "latency_us", format!("{} is not a time above 0", values[latency]))),
        };
        let bound = roofline::luckiest(gpu, &op);
        if seconds < bound {
            let why = format!(
                "{:.3} µs is faster than physics: {} needs {:.3} µs for {:.3e} operations",
                seconds * 1e6,
                gpu.name,
                bound * 1e6,
                op.flops()
            );
            return Err(bad(at, "latency_us", why));
        }
        let kernel = kernel.map_or(String::new(), |kernel| values[kernel].to_owned());
        rows.push(Row { device: device.to_owned(), op, stack, kernel, seconds });
    }
    Ok(rows)
}
