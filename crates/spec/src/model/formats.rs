//! How a description says in which format weights are stored: `quantization_config`, as its makers write it, and as we do.

use serde_json::{Map, Value, json};

use super::planning::{WeightFormat, WeightFormats};
use crate::SpecError;
use crate::fields::Fields;

/// The `quant_method` of our own form, which names the formats.
const OURS: &str = "moesaic";

/// Whether the formats are said in our own form, which every family may have.
pub(crate) fn is_ours(f: &Fields) -> bool {
    let method = f.get("quantization_config").and_then(|config| config.get("quant_method"));
    method.and_then(Value::as_str) == Some(OURS)
}

/// What `quantization_config` says; BF16 where there is none.
pub(crate) fn read(f: &Fields) -> Result<WeightFormats, SpecError> {
    use WeightFormat::{Bf16, Fp8, Fp8Block, Int4, Mxfp4, Nvfp4};
    let Some(q) = f.section("quantization_config")? else { return Ok(WeightFormats::uniform(Bf16)) };
    let experts_only = |experts| WeightFormats { dense: Bf16, experts };
    // Where attention is left alone, so are all matrices but the experts: nobody publishes it otherwise.
    let keeps_attention = ["ignore", "exclude_modules", "modules_to_not_convert"].iter().any(|key| {
        let names = q.get(key).and_then(Value::as_array).into_iter().flatten();
        // The module with all in it, wildcards behind it or not; its norms alone are never converted.
        names.filter_map(Value::as_str).any(|name| name.trim_end_matches(['.', '*']).ends_with("self_attn"))
    });
    let all = |format| if keeps_attention { experts_only(format) } else { WeightFormats::uniform(format) };
    match q.text("quant_method")? {
        None => Err(q.missing("quant_method", "the way in which weights are stored")),
        Some(OURS) => {
            let read = |key| {
                q.choice(key, &WeightFormat::ALL)?
                    .ok_or_else(|| q.missing(key, WeightFormat::ALL.map(|(name, _)| name).join(" or ")))
            };
            Ok(WeightFormats { dense: read("dense")?, experts: read("experts")? })
        }
        Some("fp8" | "fbgemm_fp8") => Ok(all(if q.get("weight_block_size").is_some() { Fp8Block } else { Fp8 })),
        Some("mxfp4") => Ok(experts_only(Mxfp4)),
        Some("awq" | "gptq") => Ok(all(Int4)),
        Some("modelopt") => match q.choice("quant_algo", &[("FP8", Fp8), ("NVFP4", Nvfp4)])? {
            Some(format) => Ok(all(format)),
            None => Err(q.missing("quant_algo", "FP8 or NVFP4")),
        },
        Some("compressed-tensors") => {
            let groups = q.section("config_groups")?.ok_or_else(|| q.missing("config_groups", "groups of weights"))?;
            let first = groups.keys().next().ok_or_else(|| q.missing("config_groups", "groups of weights"))?;
            let group = groups.section(first)?.ok_or_else(|| groups.missing(first, "a group of weights"))?;
            let weights = group.section("weights")?.ok_or_else(|| group.missing("weights", "bits and type"))?;
            match (weights.text("type")?, weights.opt_size("num_bits", 1..=32)?) {
                (Some("int"), Some(4)) => Ok(all(Int4)),
                (Some("float"), Some(8)) => Ok(all(Fp8)),
                (Some("float"), Some(4)) => Ok(all(Nvfp4)),
                _ => Err(weights.unsupported("num_bits", "4 (int or float) or 8 (float)")),
            }
        }
        Some(_) => Err(q.unsupported(
            "quant_method",
            "\"fp8\", \"mxfp4\", \"awq\", \"gptq\", \"modelopt\" or \"compressed-tensors\"",
        )),
    }
}

pub(crate) fn write(map: &mut Map<String, Value>, formats: WeightFormats) {
    let WeightFormats { dense, experts } = formats;
    let ours = json!({"quant_method": OURS, "dense": dense.to_string(), "experts": experts.to_string()});
    map.insert("quantization_config".into(), ours);
}
