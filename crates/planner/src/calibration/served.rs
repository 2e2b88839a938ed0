//! Rows of measurements of served models: which program served which model how, and what users saw.

use crate::PlannerError;
use crate::csv::{Record, Table};

/// Ranks that serve together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Worker {
    /// Ranks that share heads.
    pub tp: usize,
    /// Pipeline stages.
    pub pp: usize,
    /// Data-parallel groups of attention.
    pub dp: usize,
    /// Ranks that whole experts are spread over.
    pub ep: usize,
}

impl Worker {
    /// Ranks.
    pub fn ranks(self) -> usize {
        self.tp * self.pp * self.dp
    }

    /// From the sizes of a row, whose columns begin with `prefix`. Where attention has fewer ranks than the experts, it is
    /// there once for each of the others (data parallelism that files leave out).
    fn read(row: &Record, prefix: &str) -> Result<Worker, PlannerError> {
        let size = |name: &str| Ok::<_, PlannerError>(row.count(&format!("{prefix}{name}"))?.unwrap_or(1));
        let (tp, pp) = (size("tp_size")?, size("pp_size")?);
        let (moe_tp, ep) = (size("moe_tp_size")?, size("moe_ep_size")?);
        let dp = row.count(&format!("{prefix}attention_dp_size"))?.unwrap_or(1).max(moe_tp * ep / tp);
        let worker = Worker { tp, pp, dp, ep };
        let named = named_sizes(row.text("id")).filter(|&(ranks, ep)| ep > 1 && tp * dp == ranks * ep);
        Ok(match named {
            None => worker,
            Some((ranks, ep)) if tp == 1 => Worker { dp: ranks, ep, ..worker },
            Some((ranks, ep)) => Worker { tp: ranks, dp: 1, ep, ..worker },
        })
    }
}

/// Ranks of a worker and ranks of its experts as a row's name has them: `…_tp8_ep8_…`, also with numbers like `8_0`. Where
/// both are all ranks, some files have their product among the sizes.
fn named_sizes(id: &str) -> Option<(usize, usize)> {
    let number = |mark: &str| {
        let (_, rest) = id.rsplit_once(mark)?;
        rest.split('_').next()?.parse().ok()
    };
    Some((number("_tp")?, number("_ep")?))
}

/// How a model was served.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Deployment {
    /// The same ranks read prompts and answer.
    Aggregated(Worker),
    /// Workers that read prompts, and workers that answer; of each so many, where the row says how many.
    Disaggregated {
        /// They read.
        prefill: Worker,
        /// They answer.
        decode: Worker,
        /// Of each.
        workers: Option<(usize, usize)>,
    },
}

/// One measurement.
#[derive(Clone, Debug, PartialEq)]
pub struct Served {
    /// Line of its file.
    pub line: usize,
    /// Its name there.
    pub id: String,
    /// Where it comes from.
    pub source: String,
    /// The program, as the row names it.
    pub backend: String,
    /// Its version; often empty.
    pub version: String,
    /// Name of the model on the hub.
    pub model: String,
    /// Name of the system.
    pub system: String,
    /// Weights of attention and dense MLPs, as the row names their type; the model's own where empty.
    pub dense: String,
    /// The same of experts.
    pub experts: String,
    /// How it was served.
    pub deployment: Deployment,
    /// Tokens of a prompt.
    pub input: f64,
    /// Tokens of an answer.
    pub output: f64,
    /// Requests at a time.
    pub concurrency: f64,
    /// Time to first token, seconds.
    pub ttft_s: Option<f64>,
    /// Time per output token, seconds.
    pub tpot_s: Option<f64>,
}

/// Columns that a file must have.
pub const NEEDED: [&str; 8] =
    ["backend", "model_path", "system", "mode", "isl", "osl", "silicon_ttft_ms", "silicon_tpot_ms"];

/// Columns that are read where they are there.
const OPTIONAL: [&str; 26] = [
    "id",
    "silicon_data_source",
    "source",
    "backend_version",
    "precision",
    "gemm_quant_mode",
    "moe_quant_mode",
    "batch_size",
    "tp_size",
    "pp_size",
    "attention_dp_size",
    "moe_tp_size",
    "moe_ep_size",
    "prefill_batch_size",
    "prefill_num_workers",
    "prefill_tp_size",
    "prefill_pp_size",
    "prefill_attention_dp_size",
    "prefill_moe_tp_size",
    "prefill_moe_ep_size",
    "decode_batch_size",
    "decode_num_workers",
    "decode_tp_size",
    "decode_pp_size",
    "decode_attention_dp_size",
    "decode_moe_tp_size",
];

/// A file of measurements.
#[derive(Clone, Debug)]
pub struct ServedFile {
    /// Its rows.
    pub rows: Vec<Served>,
    /// Columns that were passed over.
    pub unknown_columns: Vec<String>,
}

impl ServedFile {
    /// Reads the text of a file; `origin` is its path, for messages.
    ///
    /// # Errors
    /// [`PlannerError::Table`] with line and column of what is missing or cannot be.
    pub fn parse(text: &str, origin: &str) -> Result<ServedFile, PlannerError> {
        let table = Table::parse(text, origin, &NEEDED)?;
        let known: Vec<&str> = NEEDED.iter().chain(&OPTIONAL).copied().chain(["decode_moe_ep_size"]).collect();
        let unknown_columns = table.others(&known).into_iter().map(str::to_owned).collect();
        Ok(ServedFile { rows: table.rows().map(|row| Served::read(&row)).collect::<Result<_, _>>()?, unknown_columns })
    }
}

impl Served {
    fn read(row: &Record) -> Result<Served, PlannerError> {
        let text = |column: &str| row.text(column).to_owned();
        let source = row.text("silicon_data_source");
        let deployment = match row.text("mode") {
            "agg" => Deployment::Aggregated(Worker::read(row, "")?),
            "disagg" => {
                let workers = (row.count("prefill_num_workers")?, row.count("decode_num_workers")?);
                Deployment::Disaggregated {
                    prefill: Worker::read(row, "prefill_")?,
                    decode: Worker::read(row, "decode_")?,
                    workers: workers.0.zip(workers.1),
                }
            }
            other => return Err(row.fault("mode", format!("is {other:?}; \"agg\" or \"disagg\" is right"))),
        };
        // Batches are of one data-parallel group.
        let (batch, groups) = match deployment {
            Deployment::Aggregated(worker) => (row.number("batch_size")?, worker.dp),
            Deployment::Disaggregated { decode, workers, .. } => {
                (row.number("decode_batch_size")?, decode.dp * workers.map_or(1, |(_, decode)| decode))
            }
        };
        let concurrency = said_concurrency(source).or(batch.map(|batch| batch * groups as f64));
        let concurrency = concurrency.ok_or_else(|| {
            let column = if row.text("mode") == "agg" { "batch_size" } else { "decode_batch_size" };
            row.fault(column, "is empty, and silicon_data_source has no silicon_concurrency=; one is needed".into())
        })?;
        let times = ["silicon_ttft_ms", "silicon_tpot_ms"].map(|column| row.number(column));
        let [ttft_s, tpot_s] = times.map(|time| Ok::<_, PlannerError>(time?.map(|ms| ms * 1e-3)));
        let (ttft_s, tpot_s) = (ttft_s?, tpot_s?);
        if ttft_s.is_none() && tpot_s.is_none() {
            return Err(row.fault("silicon_tpot_ms", "is empty, and so is silicon_ttft_ms; one is needed".into()));
        }
        Ok(Served {
            line: row.line,
            id: text("id"),
            source: source.to_owned(),
            backend: text("backend"),
            version: text("backend_version"),
            model: text("model_path"),
            system: text("system"),
            dense: text("gemm_quant_mode"),
            experts: text("moe_quant_mode"),
            deployment,
            input: row.needed("isl")?,
            output: row.needed("osl")?,
            concurrency,
            ttft_s,
            tpot_s,
        })
    }
}

/// Requests at a time, which files hide among their sources: `…; silicon_concurrency=64; …`.
fn said_concurrency(source: &str) -> Option<f64> {
    let (_, rest) = source.split_once("silicon_concurrency=")?;
    let number = rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()?;
    (number > 0.0).then_some(number)
}
