//! Ops from the parameters that tables and files of measurements name them by.

use serde_json::{Map, Value};

use super::op::{Op, Phase, Precision};
use crate::PlannerError;

/// Ops of tables, and the parameters that each may have. Those of the second list may be absent.
const PARAMETERS: &[(&str, &[&str], &[&str])] = &[
    ("gemm", &["dtype", "m", "n", "k"], &[]),
    ("moe", &["dtype", "tokens", "h", "inter", "topk", "E", "tp", "ep", "dist"], &["model"]),
    ("moe_ungated", &["dtype", "tokens", "h", "inter", "topk", "E", "tp", "ep", "dist"], &["model"]),
    ("moe_wideep_context", &["dtype", "tokens", "h", "inter", "topk", "E", "ep", "dist"], &["model"]),
    ("moe_wideep_generation", &["dtype", "tokens", "h", "inter", "topk", "E", "ep", "dist"], &["model"]),
    ("moe_grouped_gemm_decode", &["batch_per_gpu", "h", "inter", "topk", "E", "ep"], &["local", "tokens_per_expert"]),
    ("attn_prefill", &["batch", "seq", "q_heads", "kv_heads", "head_dim"], &["kv"]),
    ("attn_decode", &["batch", "kv_len", "q_heads", "kv_heads", "head_dim", "kv"], &[]),
    ("mla_decode", &["batch", "kv_len", "heads", "kv"], &["latent", "rope"]),
    ("mla_prefill", &["batch", "seq", "heads", "kv"], &["latent", "rope"]),
];

/// Parameters that an op of tables may have; `None` for a name that is no compute op.
pub(super) fn known(op: &str) -> Option<impl Iterator<Item = &'static str>> {
    let (_, needed, spare) = PARAMETERS.iter().find(|(name, ..)| *name == op)?;
    Some(needed.iter().chain(*spare).copied())
}

impl Op {
    /// Reads an op as files of measurements name it: `gemm` with `m`, `n`, `k`, `dtype`, and so on. Parameters that do not
    /// belong to the op are passed over.
    ///
    /// # Errors
    ///
    /// [`PlannerError::Parameter`] names the parameter that is missing or that cannot be, or the op that is not known.
    pub fn from_params(op: &str, params: &Map<String, Value>) -> Result<Op, PlannerError> {
        let number = |name| number(params, name);
        let heads = |name| whole(params, name);
        let weights = || precision(params, "dtype");
        // Tables without these columns are of DeepSeek's models.
        let width = |name, usual| if params.contains_key(name) { heads(name) } else { Ok(usual) };
        let bf16 = Precision::Bf16;
        Ok(match op {
            "gemm" => Op::Gemm { m: number("m")?, n: number("n")?, k: number("k")?, weights: weights()? },
            "moe" | "moe_ungated" => Op::Experts {
                tokens: number("tokens")?,
                hidden: number("h")?,
                intermediate: number("inter")?,
                top_k: number("topk")?,
                experts: number("E")?,
                tp: number("tp")?,
                ep: number("ep")?,
                weights: weights()?,
                matrices: if op == "moe" { 3 } else { 2 },
                skew: skew(params)?,
            },
            "moe_wideep_context" | "moe_wideep_generation" => Op::ExpertsDeepEp {
                tokens: number("tokens")?,
                hidden: number("h")?,
                intermediate: number("inter")?,
                top_k: number("topk")?,
                experts: number("E")?,
                ep: number("ep")?,
                weights: weights()?,
                skew: skew(params)?,
                phase: if op == "moe_wideep_context" { Phase::Context } else { Phase::Generation },
            },
            "moe_grouped_gemm_decode" => Op::ExpertsDeepEp {
                tokens: number("batch_per_gpu")? * number("ep")?,
                hidden: number("h")?,
                intermediate: number("inter")?,
                top_k: number("topk")?,
                experts: number("E")?,
                ep: number("ep")?,
                weights: Precision::Fp8Block,
                skew: 0.0,
                phase: Phase::Generation,
            },
            "attn_prefill" => Op::AttentionPrefill {
                seqs: number("batch")?,
                new_tokens: number("seq")?,
                context: number("seq")?,
                heads: heads("q_heads")?,
                kv_heads: heads("kv_heads")?,
                head_dim: heads("head_dim")?,
                kv: if params.contains_key("kv") { precision(params, "kv")? } else { bf16 },
            },
            "attn_decode" => Op::AttentionDecode {
                seqs: number("batch")?,
                context: number("kv_len")?,
                heads: heads("q_heads")?,
                kv_heads: heads("kv_heads")?,
                head_dim: heads("head_dim")?,
                kv: precision(params, "kv")?,
            },
            "mla_decode" => Op::MlaDecode {
                seqs: number("batch")?,
                context: number("kv_len")?,
                heads: heads("heads")?,
                latent: width("latent", 512)?,
                rope: width("rope", 64)?,
                kv: precision(params, "kv")?,
            },
            "mla_prefill" => Op::MlaPrefill {
                seqs: number("batch")?,
                new_tokens: number("seq")?,
                context: number("seq")?,
                heads: heads("heads")?,
                latent: width("latent", 512)?,
                rope: width("rope", 64)?,
                kv: precision(params, "kv")?,
            },
            _ => {
                let known: Vec<&str> = PARAMETERS.iter().map(|(name, ..)| *name).collect();
                return Err(bad("op", op, &format!("one of {}", known.join(", "))));
            }
        })
    }
}

fn number(params: &Map<String, Value>, name: &'static str) -> Result<f64, PlannerError> {
    let value = required(params, name)?;
    let number = value.as_f64().or_else(|| value.as_str()?.parse().ok());
    // Beyond this no op has a size, and products of sizes stay finite.
    match number {
        Some(number) if number > 0.0 && number < 1e15 => Ok(number),
        _ => Err(bad(name, &text(value), "a number above 0")),
    }
}

fn whole(params: &Map<String, Value>, name: &'static str) -> Result<u64, PlannerError> {
    let value = number(params, name)?;
    if value.fract() == 0.0 && value < 1e6 { Ok(value as u64) } else { Err(bad(name, &value.to_string(), "a count")) }
}

fn precision(params: &Map<String, Value>, name: &'static str) -> Result<Precision, PlannerError> {
    let value = text(required(params, name)?);
    Ok(match value.as_str() {
        "float32" | "fp32" | "f32" => Precision::F32,
        "bfloat16" | "bf16" | "float16" | "fp16" => Precision::Bf16,
        "fp8" | "fp8_e4m3" | "float8_e4m3fn" => Precision::Fp8,
        "fp8_block" => Precision::Fp8Block,
        "nvfp4" | "mxfp4" | "fp4" => Precision::F4,
        "int4" | "int4_wo" => Precision::Int4,
        _ => return Err(bad(name, &value, "float32, bfloat16, fp8, fp8_block, nvfp4 or int4")),
    })
}

/// The exponent of a distribution of loads: `balanced` and `uniform` are 0, `power_law_1.2` is 1.2.
fn skew(params: &Map<String, Value>) -> Result<f64, PlannerError> {
    let value = text(required(params, "dist")?);
    let exponent = match value.as_str() {
        "balanced" | "uniform" => Some(0.0),
        other => other.strip_prefix("power_law_").and_then(|exponent| exponent.parse().ok()),
    };
    match exponent {
        Some(exponent) if (0.0..=5.0).contains(&exponent) => Ok(exponent),
        _ => Err(bad("dist", &value, "balanced, uniform, or power_law_ with an exponent of 0 to 5")),
    }
}

fn required<'a>(params: &'a Map<String, Value>, name: &'static str) -> Result<&'a Value, PlannerError> {
    params.get(name).ok_or_else(|| bad(name, "nothing", "a value"))
}

fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

fn bad(name: &str, value: &str, right: &str) -> PlannerError {
    PlannerError::Parameter { name: name.to_owned(), value: value.to_owned(), right: right.to_owned() }
}
