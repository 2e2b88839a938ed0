//! What the families' readers and writers share.

use std::ops::RangeInclusive;

use serde_json::{Map, Value, json};

use super::{Attention, Family, Ffn, Gqa, Mla, ModelSpec, Moe, Rope, RopeScaling};
use crate::fields::{Fields, show};
use crate::{DType, SpecError};

/// Ranges of sizes: far beyond any published model, and small enough that no product of the few that are multiplied
/// overflows 64 bits and no list that is made from them grows past some ten megabytes.
pub(crate) mod limits {
    use super::RangeInclusive;

    /// Rows of the embedding.
    pub(crate) const VOCAB: RangeInclusive<usize> = 1..=1 << 24;
    /// Width of the residual stream and of latents.
    pub(crate) const WIDTH: RangeInclusive<usize> = 1..=1 << 18;
    /// Width of an MLP.
    pub(crate) const INTERMEDIATE: RangeInclusive<usize> = 1..=1 << 20;
    /// Decoder layers.
    pub(crate) const LAYERS: RangeInclusive<usize> = 1..=1024;
    /// Attention heads.
    pub(crate) const HEADS: RangeInclusive<usize> = 1..=4096;
    /// Width of a head.
    pub(crate) const HEAD_DIM: RangeInclusive<usize> = 1..=4096;
    /// Routed experts of one layer.
    pub(crate) const EXPERTS: RangeInclusive<usize> = 1..=4096;
    /// Routed experts of all layers together.
    pub(crate) const EXPERTS_IN_ALL: usize = 1 << 17;
    /// Context in tokens.
    pub(crate) const CONTEXT: RangeInclusive<usize> = 1..=1 << 27;
    /// Bytes of a `config.json`.
    pub(crate) const TEXT_BYTES: usize = 1 << 20;
}

/// What `rms_norm_eps` may be; the lower end keeps it a normal F32.
const EPS: RangeInclusive<f64> = 1e-30..=1.0;

/// Values of fields that a family lets a file leave out.
pub(crate) struct Defaults {
    pub(crate) rms_norm_eps: f64,
    pub(crate) max_position_embeddings: usize,
    pub(crate) rope_theta: f64,
}

/// The fields that mean the same in every family.
pub(crate) struct Trunk {
    pub(crate) vocab_size: usize,
    pub(crate) hidden_size: usize,
    pub(crate) num_layers: usize,
    pub(crate) num_heads: usize,
    pub(crate) max_position_embeddings: usize,
    pub(crate) rms_norm_eps: f32,
    pub(crate) tie_word_embeddings: bool,
}

/// Parses `text` as one JSON object.
pub(crate) fn parse_object(text: &str, origin: &str) -> Result<Map<String, Value>, SpecError> {
    if text.len() > limits::TEXT_BYTES {
        return Err(SpecError::TooLong { origin: origin.to_owned(), got: text.len(), limit: limits::TEXT_BYTES });
    }
    match serde_json::from_str(text) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(other) => Err(SpecError::NotAnObject { origin: origin.to_owned(), got: show(&other) }),
        Err(e) => {
            let reason = e.to_string();
            // serde_json appends the place, which we say ourselves.
            let reason = reason.rsplit_once(" at line ").map_or(reason.as_str(), |(head, _)| head).to_owned();
            Err(SpecError::Json { origin: origin.to_owned(), line: e.line(), column: e.column(), reason })
        }
    }
}

/// Reads the fields that mean the same in every family.
pub(crate) fn read_trunk(f: &Fields, defaults: &Defaults) -> Result<Trunk, SpecError> {
    Ok(Trunk {
        vocab_size: f.size("vocab_size", None, limits::VOCAB)?,
        hidden_size: f.size("hidden_size", None, limits::WIDTH)?,
        num_layers: f.size("num_hidden_layers", None, limits::LAYERS)?,
        num_heads: f.size("num_attention_heads", None, limits::HEADS)?,
        max_position_embeddings: f.size(
            "max_position_embeddings",
            Some(defaults.max_position_embeddings),
            limits::CONTEXT,
        )?,
        rms_norm_eps: f.number("rms_norm_eps", defaults.rms_norm_eps, EPS)? as f32,
        tie_word_embeddings: f.flag("tie_word_embeddings", false)?,
    })
}

/// A description of what was read, without multi-token-prediction layers.
pub(crate) fn assemble(
    f: &Fields,
    family: Family,
    trunk: Trunk,
    attention: Attention,
    rope: Rope,
    layers: Vec<Ffn>,
) -> Result<ModelSpec, SpecError> {
    let (dtype, fp8_block) = read_dtype(f)?;
    Ok(ModelSpec {
        family,
        vocab_size: trunk.vocab_size,
        hidden_size: trunk.hidden_size,
        max_position_embeddings: trunk.max_position_embeddings,
        rms_norm_eps: trunk.rms_norm_eps,
        tie_word_embeddings: trunk.tie_word_embeddings,
        attention,
        rope,
        layers,
        dtype,
        fp8_block,
        num_mtp_layers: 0,
        planning_only: None,
    })
}

/// Key/value heads that divide the query heads.
pub(crate) fn read_kv_heads(f: &Fields, num_heads: usize, default: usize) -> Result<usize, SpecError> {
    let num_kv_heads = f.size("num_key_value_heads", Some(default), limits::HEADS)?;
    if !num_heads.is_multiple_of(num_kv_heads) {
        return Err(f.invalid(
            "num_key_value_heads",
            num_kv_heads,
            format!("a divisor of num_attention_heads ({num_heads})"),
        ));
    }
    Ok(num_kv_heads)
}

/// `head_dim`, or `hidden_size / num_attention_heads` where it is absent; even, because RoPE turns pairs.
pub(crate) fn read_head_dim(f: &Fields, trunk: &Trunk) -> Result<usize, SpecError> {
    let Some(head_dim) = f.opt_size("head_dim", limits::HEAD_DIM)? else {
        let Trunk { hidden_size, num_heads, .. } = *trunk;
        let derived = hidden_size / num_heads;
        if !hidden_size.is_multiple_of(num_heads) || !derived.is_multiple_of(2) {
            return Err(f.invalid(
                "num_attention_heads",
                num_heads,
                format!("such that hidden_size ({hidden_size}) divided by it is a whole even head_dim"),
            ));
        }
        if !limits::HEAD_DIM.contains(&derived) {
            return Err(f.invalid(
                "num_attention_heads",
                num_heads,
                format!(
                    "such that hidden_size ({hidden_size}) divided by it is a head_dim of at most {}",
                    limits::HEAD_DIM.end()
                ),
            ));
        }
        return Ok(derived);
    };
    require_even(f, "head_dim", head_dim)?;
    Ok(head_dim)
}

/// RoPE turns pairs, so a rotary width is even.
pub(crate) fn require_even(f: &Fields, key: &str, size: usize) -> Result<(), SpecError> {
    if size.is_multiple_of(2) { Ok(()) } else { Err(f.invalid(key, size, "even, because RoPE turns pairs")) }
}

/// `num_experts_per_tok`, at most `num_experts`, which the file calls `experts_key`.
pub(crate) fn read_top_k(f: &Fields, experts_key: &str, num_experts: usize) -> Result<usize, SpecError> {
    let top_k = f.size("num_experts_per_tok", None, limits::EXPERTS)?;
    if top_k > num_experts {
        return Err(f.invalid("num_experts_per_tok", top_k, format!("at most {experts_key} ({num_experts})")));
    }
    Ok(top_k)
}

/// The number of experts under the first of `keys` that is present.
pub(crate) fn read_num_experts(f: &Fields, keys: [&'static str; 2]) -> Result<(&'static str, usize), SpecError> {
    let key = if f.get(keys[0]).is_none() && f.get(keys[1]).is_some() { keys[1] } else { keys[0] };
    Ok((key, f.size(key, None, limits::EXPERTS)?))
}

/// Refuses more expert matrices than a list of them should hold.
pub(crate) fn check_experts_in_all(f: &Fields, key: &str, layers: &[Ffn]) -> Result<(), SpecError> {
    let moe = layers.iter().filter_map(Ffn::as_moe).collect::<Vec<_>>();
    let in_all: usize = moe.iter().map(|m| m.num_experts).sum();
    if in_all > limits::EXPERTS_IN_ALL {
        return Err(f.invalid(
            key,
            moe[0].num_experts,
            format!("at most {} over all {} MoE layers together", limits::EXPERTS_IN_ALL, moe.len()),
        ));
    }
    Ok(())
}

/// The element type under `dtype` (transformers 5) or `torch_dtype` (transformers 4), with the FP8 block of
/// `quantization_config`. F32 where nothing is said, which is torch's own default.
pub(crate) fn read_dtype(f: &Fields) -> Result<(DType, Option<[usize; 2]>), SpecError> {
    let key = if f.get("dtype").is_some() { "dtype" } else { "torch_dtype" };
    let stored = match f.text(key)? {
        Some("float32") | None => DType::F32,
        Some("bfloat16") => DType::BF16,
        Some("float16") => DType::F16,
        Some(_) => return Err(f.unsupported(key, "\"bfloat16\", \"float16\" or \"float32\"")),
    };
    let Some(map) = f.object("quantization_config")? else { return Ok((stored, None)) };
    let q = Fields::new(f.origin, "quantization_config.", map);
    match q.text("quant_method")? {
        Some("fp8") => {}
        Some(_) => return Err(q.unsupported("quant_method", "\"fp8\" (E4M3 weights with one scale per block)")),
        None => return Err(q.missing("quant_method", "\"fp8\"")),
    }
    q.only("fmt", &["e4m3"])?;
    q.only("activation_scheme", &["dynamic"])?;
    let expected = "two block sizes, rows and columns, for example [128, 128]";
    let block = match q.get("weight_block_size") {
        None => return Err(q.missing("weight_block_size", expected)),
        Some(Value::Array(sizes)) => sizes
            .iter()
            .map(|v| v.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|n| (1..=1 << 16).contains(n)))
            .collect::<Option<Vec<usize>>>(),
        Some(_) => None,
    };
    match block.as_deref() {
        Some(&[rows, cols]) => Ok((DType::F8E4M3, Some([rows, cols]))),
        _ => Err(q.invalid("weight_block_size", q.get("weight_block_size").map_or_else(String::new, show), expected)),
    }
}

/// Rotary embedding in the form of transformers 5 (`rope_parameters`) or 4 (`rope_theta`, `rope_scaling`), with the
/// precedence that transformers 5 gives them: a non-empty `rope_scaling` replaces `rope_parameters`, and a
/// `rope_theta` inside wins over the one beside.
pub(crate) fn read_rope(
    f: &Fields,
    default_theta: f64,
    max_position_embeddings: usize,
    interleaved: bool,
) -> Result<Rope, SpecError> {
    // Above 1, or the correction range of YaRN has no logarithm to divide by.
    const THETA: RangeInclusive<f64> = 1.001..=1e18;
    const FACTOR: RangeInclusive<f64> = 1.0..=1e6;
    refuse_partial_rotary(f)?;
    let beside = f.number("rope_theta", default_theta, THETA)?;
    let (prefix, map) = match (f.object("rope_scaling")?, f.object("rope_parameters")?) {
        (Some(map), _) => ("rope_scaling.", map),
        (None, Some(map)) => ("rope_parameters.", map),
        (None, None) => return Ok(Rope { theta: beside, interleaved, scaling: RopeScaling::None }),
    };
    let r = Fields::new(f.origin, prefix, map);
    refuse_partial_rotary(&r)?;
    let theta = r.number("rope_theta", beside, THETA)?;
    let type_key = if r.get("rope_type").is_some() { "rope_type" } else { "type" };
    let scaling = match r.text(type_key)?.unwrap_or("default") {
        "default" => RopeScaling::None,
        "linear" => match r.opt_number("factor", FACTOR)? {
            Some(factor) => RopeScaling::Linear { factor },
            None => return Err(r.missing("factor", "a number of at least 1")),
        },
        "yarn" => {
            let beside = f.opt_size("original_max_position_embeddings", limits::CONTEXT)?;
            let inside = r.opt_size("original_max_position_embeddings", limits::CONTEXT)?;
            let original = beside.or(inside).unwrap_or(max_position_embeddings);
            let implied = (max_position_embeddings as f64 / original as f64).max(1.0);
            // transformers reads a zero for either as "not given".
            let beta = |key, default| Ok(Some(r.number(key, default, 0.0..=1e6)?).filter(|b| *b > 0.0));
            RopeScaling::Yarn {
                factor: r.number("factor", implied, FACTOR)?,
                original_max_position_embeddings: original,
                beta_fast: beta("beta_fast", 32.0)?.unwrap_or(32.0),
                beta_slow: beta("beta_slow", 1.0)?.unwrap_or(1.0),
                mscale: r.number("mscale", 0.0, 0.0..=1e3)?,
                mscale_all_dim: r.number("mscale_all_dim", 0.0, 0.0..=1e3)?,
                attention_factor: r.opt_number("attention_factor", 1e-6..=1e6)?,
                truncate: r.flag("truncate", true)?,
            }
        }
        _ => return Err(r.unsupported(type_key, "\"default\", \"linear\" or \"yarn\"")),
    };
    Ok(Rope { theta, interleaved, scaling })
}

fn refuse_partial_rotary(f: &Fields) -> Result<(), SpecError> {
    match f.get("partial_rotary_factor") {
        None => Ok(()),
        Some(value) if value.as_f64() == Some(1.0) => Ok(()),
        Some(_) => Err(f.unsupported("partial_rotary_factor", "1.0 (the whole head turns)")),
    }
}

/// All our families gate with SiLU unless they say otherwise elsewhere.
pub(crate) fn require_silu(f: &Fields) -> Result<(), SpecError> {
    match f.text("hidden_act")? {
        None | Some("silu") => Ok(()),
        Some(_) => Err(f.unsupported("hidden_act", "\"silu\"")),
    }
}

/// Starts a `config.json` with the fields that mean the same in every family, in the transformers 4 form, which
/// transformers 5 reads as well.
pub(crate) fn write_trunk(spec: &ModelSpec, model_type: &str, architecture: &str) -> Map<String, Value> {
    let mut map = Map::new();
    let mut put = |key: &str, value: Value| map.insert(key.to_owned(), value);
    put("architectures", json!([architecture]));
    put("model_type", json!(model_type));
    put("vocab_size", json!(spec.vocab_size));
    put("hidden_size", json!(spec.hidden_size));
    put("num_hidden_layers", json!(spec.layers.len()));
    put("max_position_embeddings", json!(spec.max_position_embeddings));
    put("rms_norm_eps", decimal(spec.rms_norm_eps));
    put("tie_word_embeddings", json!(spec.tie_word_embeddings));
    put("rope_theta", json!(spec.rope.theta));
    if spec.family != Family::Paper {
        put("hidden_act", json!("silu"));
        put("rope_scaling", write_scaling(&spec.rope.scaling));
        let stored = if spec.dtype == DType::F8E4M3 { DType::BF16 } else { spec.dtype };
        put("torch_dtype", json!(dtype_name(stored)));
        if let Some([rows, cols]) = spec.fp8_block {
            put(
                "quantization_config",
                json!({
                    "quant_method": "fp8",
                    "fmt": "e4m3",
                    "activation_scheme": "dynamic",
                    "weight_block_size": [rows, cols],
                }),
            );
        }
    }
    map
}

pub(crate) fn write_gqa(map: &mut Map<String, Value>, gqa: &Gqa) {
    map.insert("num_attention_heads".into(), json!(gqa.num_heads));
    map.insert("num_key_value_heads".into(), json!(gqa.num_kv_heads));
    map.insert("head_dim".into(), json!(gqa.head_dim));
}

pub(crate) fn write_mla(map: &mut Map<String, Value>, mla: &Mla) {
    map.insert("num_attention_heads".into(), json!(mla.num_heads));
    map.insert("num_key_value_heads".into(), json!(mla.num_heads));
    map.insert("q_lora_rank".into(), json!(mla.q_lora_rank));
    map.insert("kv_lora_rank".into(), json!(mla.kv_lora_rank));
    map.insert("qk_nope_head_dim".into(), json!(mla.qk_nope_head_dim));
    map.insert("qk_rope_head_dim".into(), json!(mla.qk_rope_head_dim));
    map.insert("v_head_dim".into(), json!(mla.v_head_dim));
}

/// The name that torch gives to an element type.
pub(crate) fn dtype_name(dtype: DType) -> &'static str {
    match dtype {
        DType::F32 => "float32",
        DType::BF16 => "bfloat16",
        DType::F16 => "float16",
        DType::F8E4M3 => "float8_e4m3",
        DType::F8E8M0 | DType::I64 | DType::I32 | DType::U8 => panic!("weights of {dtype} do not exist"),
    }
}

/// An F32 as the shortest decimal that reads back to it: 1e-6, not 9.999999974752427e-7.
pub(crate) fn decimal(x: f32) -> Value {
    json!(x.to_string().parse::<f64>().expect("an F32 prints as a number"))
}

fn write_scaling(scaling: &RopeScaling) -> Value {
    match *scaling {
        RopeScaling::None => Value::Null,
        RopeScaling::Linear { factor } => json!({"type": "linear", "rope_type": "linear", "factor": factor}),
        RopeScaling::Yarn {
            factor,
            original_max_position_embeddings,
            beta_fast,
            beta_slow,
            mscale,
            mscale_all_dim,
            attention_factor,
            truncate,
        } => {
            let mut yarn = json!({
                "type": "yarn",
                "rope_type": "yarn",
                "factor": factor,
                "original_max_position_embeddings": original_max_position_embeddings,
                "beta_fast": beta_fast,
                "beta_slow": beta_slow,
            });
            // Younger than the rest, so only where it says something.
            if !truncate {
                yarn["truncate"] = json!(false);
            }
            // Left out where absent: transformers takes a zero for "not given", and so do we.
            if mscale != 0.0 {
                yarn["mscale"] = json!(mscale);
            }
            if mscale_all_dim != 0.0 {
                yarn["mscale_all_dim"] = json!(mscale_all_dim);
            }
            if let Some(factor) = attention_factor {
                yarn["attention_factor"] = json!(factor);
            }
            yarn
        }
    }
}

/// The first dense and the first MoE layer's shape; all layers of a kind are alike in every family.
pub(crate) fn kinds(spec: &ModelSpec) -> (Option<&super::Mlp>, Option<&Moe>) {
    (spec.layers.iter().find_map(Ffn::as_dense), spec.layers.iter().find_map(Ffn::as_moe))
}

/// The grouped-query attention that a family without MLA must have.
pub(crate) fn gqa(spec: &ModelSpec) -> &Gqa {
    match &spec.attention {
        Attention::Gqa(gqa) => gqa,
        Attention::Mla(_) => panic!("{:?} has no MLA", spec.family),
    }
}
