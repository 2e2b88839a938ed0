//! Plan files from text. Here the form is checked: keys, types, spellings. Whether the plan can be followed is checked
//! against a model and a cluster, by [`Plan::new`](crate::Plan::new).

use moesaic_spec::SpecError;
use moesaic_spec::fields::{Fields, show};
use moesaic_spec::yaml::parse_mapping;
use serde_json::Value;

use crate::plan::{
    AttentionPlan, Balance, Exchange, ExchangePrecision, ExchangeRoute, ExplicitLayer, InitialPlacement, Interval,
    MemoryPlan, Mesh, MoePlan, Overlap, Pool, Prediction, Synchronize,
};
use crate::{AllReduce, PlanError, PlanFile, Rank};

/// Any size that a key may have before it is checked against the model.
const ANY: std::ops::RangeInclusive<usize> = 0..=1 << 30;
/// Any number.
const NUMBER: std::ops::RangeInclusive<f64> = f64::MIN..=f64::MAX;

pub(crate) const POOLS: [(&str, Pool); 2] = [("shared", Pool::Shared), ("separate", Pool::Separate)];
pub(crate) const OVERLAPS: [(&str, Overlap); 3] =
    [("none", Overlap::None), ("micro_batches", Overlap::MicroBatches), ("arrivals", Overlap::Arrivals)];
pub(crate) const PRECISIONS: [(&str, ExchangePrecision); 3] =
    [("full", ExchangePrecision::Full), ("int8", ExchangePrecision::Int8), ("fp8", ExchangePrecision::Fp8)];
pub(crate) const ROUTES: [(&str, ExchangeRoute); 2] =
    [("direct", ExchangeRoute::Direct), ("two_level", ExchangeRoute::TwoLevel)];
pub(crate) const ALL_REDUCES: [(&str, AllReduce); 2] =
    [("flat", AllReduce::Flat), ("hierarchical", AllReduce::Hierarchical)];

/// How a value is spelled.
pub(crate) fn name_of<T: PartialEq>(value: T, names: &[(&'static str, T)]) -> &'static str {
    names.iter().find(|(_, named)| *named == value).expect("every value has a name").0
}

impl PlanFile {
    /// Reads a plan file. `origin` is its path, for messages. Total: any text gives a plan or an error, in time and memory
    /// that the length of the text bounds.
    ///
    /// # Errors
    /// [`PlanError::File`]: not YAML, a key unknown, missing, of the wrong type or there twice, or another version.
    pub fn from_yaml(text: &str, origin: &str) -> Result<PlanFile, PlanError> {
        let map = parse_mapping(text, origin)?;
        Ok(read(&Fields::new(origin, "", &map))?)
    }
}

fn read(f: &Fields) -> Result<PlanFile, SpecError> {
    // First, because all else depends on it.
    let version = f.size("version", None, 1..=1)? as u32;
    f.only_keys(&[
        "version",
        "name",
        "model",
        "cluster",
        "workload",
        "ranks",
        "mesh",
        "stage_layers",
        "attention",
        "moe",
        "micro_batches",
        "overlap",
        "exchange",
        "all_reduce",
        "balance",
        "synchronize",
        "memory",
        "prediction",
    ])?;
    let mesh = f.section("mesh")?.ok_or_else(|| f.missing("mesh", "tp, pp, dp and ep; those left out are 1"))?;
    Ok(PlanFile {
        version,
        name: f.required_text("name")?.to_owned(),
        model: f.required_text("model")?.to_owned(),
        cluster: f.required_text("cluster")?.to_owned(),
        workload: f.required_text("workload")?.to_owned(),
        ranks: f.size("ranks", None, ANY)?,
        mesh: read_mesh(&mesh)?,
        stage_layers: f.sizes("stage_layers", ANY)?,
        attention: section(f, "attention", read_attention)?.unwrap_or_default(),
        moe: section(f, "moe", read_moe)?.unwrap_or_default(),
        micro_batches: f.size("micro_batches", Some(1), ANY)?,
        overlap: f.choice("overlap", &OVERLAPS)?.unwrap_or_default(),
        exchange: section(f, "exchange", read_exchange)?.unwrap_or_default(),
        all_reduce: f.choice("all_reduce", &ALL_REDUCES)?,
        balance: section(f, "balance", read_balance)?,
        synchronize: section(f, "synchronize", read_synchronize)?,
        memory: section(f, "memory", read_memory)?.unwrap_or_default(),
        prediction: section(f, "prediction", read_prediction)?,
    })
}

fn section<T>(
    f: &Fields,
    key: &str,
    read: impl FnOnce(&Fields) -> Result<T, SpecError>,
) -> Result<Option<T>, SpecError> {
    f.section(key)?.map(|section| read(&section)).transpose()
}

fn read_mesh(f: &Fields) -> Result<Mesh, SpecError> {
    f.only_keys(&["tp", "pp", "dp", "ep"])?;
    let axis = |key: &str| f.size(key, Some(1), ANY);
    Ok(Mesh { tp: axis("tp")?, pp: axis("pp")?, dp: axis("dp")?, ep: axis("ep")? })
}

fn read_attention(f: &Fields) -> Result<AttentionPlan, SpecError> {
    f.only_keys(&["heads", "replication"])?;
    Ok(AttentionPlan { heads: f.sizes("heads", ANY)?, replication: f.opt_size("replication", ANY)? })
}

fn read_moe(f: &Fields) -> Result<MoePlan, SpecError> {
    f.only_keys(&["pool", "max_experts_per_rank", "redundant_experts", "placement"])?;
    Ok(MoePlan {
        pool: f.choice("pool", &POOLS)?.unwrap_or_default(),
        max_experts_per_rank: f.opt_size("max_experts_per_rank", ANY)?,
        redundant_experts: f.size("redundant_experts", Some(0), ANY)?,
        placement: read_placement(f)?,
    })
}

/// `linear`, `{trace: FILE}` or `{explicit: […]}`.
fn read_placement(f: &Fields) -> Result<InitialPlacement, SpecError> {
    let right = "linear, or one of the keys trace and explicit";
    let p = match f.get("placement") {
        None => return Ok(InitialPlacement::Linear),
        Some(Value::String(word)) if word == "linear" => return Ok(InitialPlacement::Linear),
        Some(Value::Object(_)) => f.section("placement")?.expect("an object is a section"),
        Some(other) => return Err(f.invalid("placement", show(other), right)),
    };
    p.only_keys(&["trace", "explicit"])?;
    match (p.text("trace")?, p.list("explicit")?) {
        (Some(file), None) => Ok(InitialPlacement::Trace(file.to_owned())),
        (None, Some(layers)) => {
            let one = |(idx, layer)| read_explicit_layer(&p, idx, layer);
            Ok(InitialPlacement::Explicit(layers.iter().enumerate().map(one).collect::<Result<_, _>>()?))
        }
        (Some(_), Some(_)) => Err(f.invalid("placement", "both", right)),
        (None, None) => Err(f.invalid("placement", "neither", right)),
    }
}

fn read_explicit_layer(p: &Fields, idx: usize, value: &Value) -> Result<ExplicitLayer, SpecError> {
    let at = format!("explicit[{idx}]");
    let Value::Object(map) = value else {
        return Err(p.invalid(&at, show(value), "a layer with its experts, {layer: …, experts: […]}"));
    };
    let f = Fields::new(p.origin, format!("{}.", p.dotted(&at)), map);
    f.only_keys(&["layer", "experts"])?;
    let experts = f.list("experts")?.ok_or_else(|| f.missing("experts", "for each expert a list of its ranks"))?;
    let ranks_of = |(expert, ranks): (usize, &Value)| {
        let wrong = || f.invalid(&format!("experts[{expert}]"), show(ranks), "a list of ranks");
        let rank = |rank: &Value| rank.as_u64().and_then(|rank| u32::try_from(rank).ok()).map(Rank).ok_or_else(wrong);
        ranks.as_array().ok_or_else(wrong)?.iter().map(rank).collect::<Result<Vec<Rank>, SpecError>>()
    };
    Ok(ExplicitLayer {
        layer: f.size("layer", None, ANY)?,
        experts: experts.iter().enumerate().map(ranks_of).collect::<Result<_, _>>()?,
    })
}

fn read_exchange(f: &Fields) -> Result<Exchange, SpecError> {
    f.only_keys(&["precision", "route"])?;
    Ok(Exchange {
        precision: f.choice("precision", &PRECISIONS)?.unwrap_or_default(),
        route: f.choice("route", &ROUTES)?.unwrap_or_default(),
    })
}

fn read_balance(f: &Fields) -> Result<Balance, SpecError> {
    f.only_keys(&["interval", "threshold", "significance", "bytes_per_step"])?;
    Ok(Balance {
        interval: f.size("interval", None, ANY)? as u64,
        threshold: f.required_number("threshold", NUMBER)?,
        significance: f.required_number("significance", NUMBER)?,
        bytes_per_step: f.opt_size("bytes_per_step", 0..=usize::MAX)?.map(|bytes| bytes as u64),
    })
}

fn read_synchronize(f: &Fields) -> Result<Synchronize, SpecError> {
    f.only_keys(&["interval", "threshold"])?;
    Ok(Synchronize {
        interval: f.size("interval", None, ANY)? as u64,
        threshold: f.required_number("threshold", NUMBER)?,
    })
}

fn read_memory(f: &Fields) -> Result<MemoryPlan, SpecError> {
    f.only_keys(&["max_model_len", "max_num_seqs", "max_num_batched_tokens", "utilization"])?;
    Ok(MemoryPlan {
        max_model_len: f.opt_size("max_model_len", ANY)?,
        max_num_seqs: f.opt_size("max_num_seqs", ANY)?,
        max_num_batched_tokens: f.opt_size("max_num_batched_tokens", ANY)?,
        utilization: f.opt_number("utilization", NUMBER)?,
    })
}

fn read_prediction(f: &Fields) -> Result<Prediction, SpecError> {
    f.only_keys(&["concurrency", "ttft_ms", "tpot_ms", "tokens_per_s", "memory_gib", "assumptions"])?;
    let interval = |key: &str| {
        let right = "a figure with its interval, {value: …, low: …, high: …}";
        let f = f.section(key)?.ok_or_else(|| f.missing(key, right))?;
        f.only_keys(&["value", "low", "high"])?;
        let figure = |key: &str| f.required_number(key, 0.0..=f64::MAX);
        Ok::<_, SpecError>(Interval { value: figure("value")?, low: figure("low")?, high: figure("high")? })
    };
    let sentence = |(idx, value): (usize, &Value)| {
        let wrong = || f.invalid(&format!("assumptions[{idx}]"), show(value), "a text");
        value.as_str().map(str::to_owned).ok_or_else(wrong)
    };
    let assumptions = f.list("assumptions")?.unwrap_or_default();
    Ok(Prediction {
        concurrency: f.required_number("concurrency", 0.0..=f64::MAX)?,
        ttft_ms: interval("ttft_ms")?,
        tpot_ms: interval("tpot_ms")?,
        tokens_per_s: interval("tokens_per_s")?,
        memory_gib: f.required_number("memory_gib", 0.0..=f64::MAX)?,
        assumptions: assumptions.iter().enumerate().map(sentence).collect::<Result<_, _>>()?,
    })
}
