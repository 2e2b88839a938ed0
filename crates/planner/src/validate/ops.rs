//! Files of ops and collectives with their measured times, and what they are predicted to take.

use serde::Serialize;
use serde_json::{Map, Value};

use super::score::Pair;
use crate::PlannerError;
use crate::calibration::case::Skipped;
use crate::cost::{CostModel, Op, Stack, published, roofline};
use crate::csv::{Record, Table};
use crate::estimate::Estimate;
use crate::network::{CommOp, Library, MeasuredGpu, Network};
use crate::price::Price;

/// Columns that a file must have.
pub const NEEDED: [&str; 4] = ["gpu", "op", "params", "latency_us"];
const OPTIONAL: [&str; 5] = ["framework", "version", "device_label", "source", "note"];

/// One row, and what was predicted of it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct OpOutcome {
    /// Line of its file.
    pub line: usize,
    /// Name of the GPU in the file.
    pub gpu: String,
    /// The op.
    pub op: String,
    /// Whose kernel.
    pub framework: String,
    /// Measured and predicted time, seconds.
    pub time: Pair,
    /// No op of this size can take less, seconds.
    pub bound: f64,
}

/// A file, predicted.
#[derive(Clone, Debug, Default)]
pub struct OpsFile {
    /// Rows.
    pub outcomes: Vec<OpOutcome>,
    /// Rows that were passed over.
    pub skipped: Vec<Skipped>,
    /// Columns that were passed over.
    pub unknown_columns: Vec<String>,
}

impl OpsFile {
    /// Reads the text of a file and predicts each row; `origin` is its path, for messages.
    ///
    /// # Errors
    /// [`PlannerError::Table`] with line and column of what is missing or cannot be.
    pub fn predict(text: &str, origin: &str) -> Result<OpsFile, PlannerError> {
        let table = Table::parse(text, origin, &NEEDED)?;
        let known: Vec<&str> = NEEDED.iter().chain(&OPTIONAL).copied().collect();
        let mut file = OpsFile {
            unknown_columns: table.others(&known).into_iter().map(str::to_owned).collect(),
            ..OpsFile::default()
        };
        for row in table.rows() {
            match outcome(&row)? {
                Ok(outcome) => file.outcomes.push(outcome),
                Err(why) => file.skipped.push(Skipped { line: row.line, why }),
            }
        }
        Ok(file)
    }
}

/// A row's outcome, or why it is passed over; an error where the file is broken.
fn outcome(row: &Record) -> Result<Result<OpOutcome, String>, PlannerError> {
    let measured = row.needed("latency_us")? * 1e-6;
    let params: Map<String, Value> = serde_json::from_str(row.text("params"))
        .map_err(|error| row.fault("params", format!("is no JSON object: {error}")))?;
    let (gpu, op) = (row.text("gpu"), row.text("op"));
    let framework = row.text("framework");
    let priced = match op.starts_with("nccl") || op.starts_with("custom") || op.starts_with("deepep") {
        true => communication(gpu, op, &params),
        false => computation(gpu, op, framework, named_kernel(row.text("note")), &params),
    };
    Ok(priced.and_then(|Priced { price, bound, least }| {
        if measured < least {
            let (us, least) = (measured * 1e6, least * 1e6);
            return Err(format!("{op} in {us:.2} µs is faster than physics lets it be ({least:.2} µs)"));
        }
        let time = Pair { measured, predicted: Estimate::new(price.seconds, price.sd) };
        Ok(OpOutcome { line: row.line, gpu: gpu.into(), op: op.into(), framework: framework.into(), time, bound })
    }))
}

struct Priced {
    price: Price,
    /// What our prices never go below.
    bound: f64,
    /// What no measurement can go below: tokens may have met in fewer experts than is expected.
    least: f64,
}

fn communication(gpu: &str, op: &str, params: &Map<String, Value>) -> Result<Priced, String> {
    let measured = MeasuredGpu::of(gpu).ok_or_else(|| unknown_gpu(gpu))?;
    let op = CommOp::from_params(op, params).map_err(|error| error.to_string())?;
    let network = Network::measured(measured, Library::Nccl);
    let bound = network.bound(&op);
    Ok(Priced { price: network.price(&op), bound, least: bound })
}

fn computation(
    gpu: &str,
    op: &str,
    framework: &str,
    kernel: Option<&str>,
    params: &Map<String, Value>,
) -> Result<Priced, String> {
    let gpu = &published::device(gpu).ok_or_else(|| unknown_gpu(gpu))?.gpu;
    let op = Op::from_params(op, params).map_err(|error| error.to_string())?;
    let stack = Stack::of(framework).ok_or_else(|| format!("framework {framework:?} is not known"))?;
    let price = CostModel::new(gpu, stack).price_kernel(&op, kernel);
    Ok(Priced { price, bound: roofline::bound(gpu, &op), least: roofline::luckiest(gpu, &op) })
}

/// Which of its kernels a program used, where the note says so: `…, kernel=moe_torch_flow_cutlass`.
fn named_kernel(note: &str) -> Option<&str> {
    let (_, rest) = note.split_once("kernel=")?;
    rest.split([',', ';', ' ']).next().filter(|name| !name.is_empty())
}

fn unknown_gpu(gpu: &str) -> String {
    let known: Vec<&str> = published::devices().iter().map(|device| device.folder).collect();
    format!("GPU {gpu:?} is not known; {} are", known.join(", "))
}
