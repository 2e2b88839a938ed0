//! `moesaic_paper`: the models of the papers that the project comes from. Our own format, so every key is checked.
//!
//! Attention is GQA (MHA where the heads are as many) or MLA. The first layers may be dense. Experts (`expert_type`) and
//! dense layers (`dense_type`, SwiGLU unless said) are GELU MLPs of two matrices or SwiGLU of three. The router is a
//! softmax whose chosen weights are renormalised unless `norm_topk_prob` is false, and an expert may have a capacity.
//! Rotary pairs are halves in GQA and neighbours in MLA, as in the families that each comes from.

use serde_json::{Map, Value, json};

use super::common::{self, Defaults, Trunk, limits};
use super::deepseek_v3::read_mla;
use super::{Activation, Attention, Capacity, DropPolicy, Family, Ffn, Gqa, Mlp, ModelSpec, Moe, QkNorm, Router};
use crate::fields::{Fields, shorten};
use crate::nearest::nearest;
use crate::{DType, SpecError};

const DEFAULTS: Defaults = Defaults { rms_norm_eps: 1e-5, max_position_embeddings: 4096, rope_theta: 1e4 };

/// The block that shares a scale in FP8, as in DeepSeek-V3.
const FP8_BLOCK: [usize; 2] = [128, 128];

/// Every key that a description may have.
const KEYS: [&str; 34] = [
    "architectures",
    "attention",
    "bos_token_id",
    "capacity_factor",
    "dense_type",
    "drop_policy",
    "dtype",
    "eos_token_id",
    "expert_type",
    "first_k_dense_replace",
    "head_dim",
    "hidden_size",
    "intermediate_size",
    "kv_lora_rank",
    "max_position_embeddings",
    "model_type",
    "moe_intermediate_size",
    "norm_topk_prob",
    "num_attention_heads",
    "num_experts",
    "num_experts_per_tok",
    "num_hidden_layers",
    "num_key_value_heads",
    "pad_token_id",
    "q_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "rms_norm_eps",
    "rope_theta",
    "tie_word_embeddings",
    "torch_dtype",
    "transformers_version",
    "v_head_dim",
    "vocab_size",
];

pub(crate) fn read(f: &Fields) -> Result<ModelSpec, SpecError> {
    if let Some(unknown) = f.keys().find(|key| !KEYS.contains(key)) {
        return Err(SpecError::UnknownField {
            origin: f.origin.to_owned(),
            field: shorten(unknown),
            nearest: nearest(unknown, KEYS).to_owned(),
        });
    }
    let trunk = common::read_trunk(f, &DEFAULTS)?;
    let attention = read_attention(f, &trunk)?;
    let interleaved = matches!(attention, Attention::Mla(_));
    let layers = read_layers(f, trunk.num_layers)?;
    common::check_experts_in_all(f, "num_experts", &layers)?;
    let (dtype, fp8_block) = read_dtype(f)?;
    Ok(ModelSpec {
        family: Family::Paper,
        vocab_size: trunk.vocab_size,
        hidden_size: trunk.hidden_size,
        max_position_embeddings: trunk.max_position_embeddings,
        rms_norm_eps: trunk.rms_norm_eps,
        tie_word_embeddings: trunk.tie_word_embeddings,
        attention,
        rope: common::read_rope(f, DEFAULTS.rope_theta, trunk.max_position_embeddings, interleaved)?,
        layers,
        dtype,
        fp8_block,
        num_mtp_layers: 0,
        planning_only: None,
    })
}

fn read_attention(f: &Fields, trunk: &Trunk) -> Result<Attention, SpecError> {
    const EXPECTED: &str = "\"gqa\" or \"mla\"";
    match f.text("attention")? {
        Some("gqa") => Ok(Attention::Gqa(Gqa {
            num_heads: trunk.num_heads,
            num_kv_heads: common::read_kv_heads(f, trunk.num_heads, trunk.num_heads)?,
            head_dim: common::read_head_dim(f, trunk)?,
            qk_norm: QkNorm::None,
            clip_qkv: None,
            sliding_window: None,
            bias: false,
        })),
        Some("mla") => Ok(Attention::Mla(read_mla(f, trunk, None)?)),
        Some(_) => Err(f.unsupported("attention", EXPECTED)),
        None => Err(f.missing("attention", EXPECTED)),
    }
}

fn read_layers(f: &Fields, num_layers: usize) -> Result<Vec<Ffn>, SpecError> {
    let num_dense = f.size("first_k_dense_replace", Some(0), 0..=num_layers)?;
    let mut layers = Vec::with_capacity(num_layers);
    if num_dense > 0 {
        let intermediate_size = f.size("intermediate_size", None, limits::INTERMEDIATE)?;
        let activation = read_activation(f, "dense_type")?.unwrap_or(Activation::SwiGlu);
        layers.resize(num_dense, Ffn::Dense(Mlp { intermediate_size, activation }));
    }
    if num_dense < num_layers {
        layers.resize(num_layers, Ffn::Moe(read_moe(f)?));
    }
    Ok(layers)
}

const ACTIVATIONS: &str = "\"gelu\" (two matrices) or \"swiglu\" (three matrices)";

fn read_activation(f: &Fields, key: &str) -> Result<Option<Activation>, SpecError> {
    match f.text(key)? {
        Some("gelu") => Ok(Some(Activation::Gelu)),
        Some("swiglu") => Ok(Some(Activation::SwiGlu)),
        Some(_) => Err(f.unsupported(key, ACTIVATIONS)),
        None => Ok(None),
    }
}

fn read_moe(f: &Fields) -> Result<Moe, SpecError> {
    let activation = read_activation(f, "expert_type")?.ok_or_else(|| f.missing("expert_type", ACTIVATIONS))?;
    let num_experts = f.size("num_experts", None, limits::EXPERTS)?;
    let policy = match f.text("drop_policy")? {
        Some("probs") | None => DropPolicy::Probs,
        Some("position") => DropPolicy::Position,
        Some(_) => return Err(f.unsupported("drop_policy", "\"probs\" or \"position\"")),
    };
    let factor = f.opt_number("capacity_factor", 1e-3..=1e6)?;
    Ok(Moe {
        num_experts,
        top_k: common::read_top_k(f, "num_experts", num_experts)?,
        intermediate_size: f.size("moe_intermediate_size", None, limits::INTERMEDIATE)?,
        activation,
        router: Router::softmax(f.flag("norm_topk_prob", true)?),
        shared_intermediate_size: 0,
        capacity: factor.map(|factor| Capacity { factor: factor as f32, policy }),
    })
}

fn read_dtype(f: &Fields) -> Result<(DType, Option<[usize; 2]>), SpecError> {
    let key = if f.get("dtype").is_some() { "dtype" } else { "torch_dtype" };
    match f.text(key)? {
        Some("bfloat16") => Ok((DType::BF16, None)),
        Some("float16") => Ok((DType::F16, None)),
        Some("float32") | None => Ok((DType::F32, None)),
        Some("float8_e4m3") => Ok((DType::F8E4M3, Some(FP8_BLOCK))),
        Some(_) => Err(f.unsupported(key, "\"bfloat16\", \"float16\", \"float32\" or \"float8_e4m3\"")),
    }
}

pub(crate) fn write(spec: &ModelSpec) -> Map<String, Value> {
    let mut map = common::write_trunk(spec, "moesaic_paper", "MoesaicPaperForCausalLM");
    match &spec.attention {
        Attention::Gqa(gqa) => {
            common::write_gqa(&mut map, gqa);
            map.insert("attention".into(), json!("gqa"));
        }
        Attention::Mla(mla) => {
            common::write_mla(&mut map, mla);
            map.insert("attention".into(), json!("mla"));
        }
    }
    let mut put = |key: &str, value: Value| map.insert(key.to_owned(), value);
    put("dtype", json!(common::dtype_name(spec.dtype)));
    let (dense, moe) = common::kinds(spec);
    let type_name = |activation| if activation == Activation::Gelu { "gelu" } else { "swiglu" };
    put("first_k_dense_replace", json!(spec.layers.iter().filter(|ffn| ffn.as_dense().is_some()).count()));
    if let Some(dense) = dense {
        put("intermediate_size", json!(dense.intermediate_size));
        put("dense_type", json!(type_name(dense.activation)));
    }
    if let Some(moe) = moe {
        put("expert_type", json!(type_name(moe.activation)));
        put("num_experts", json!(moe.num_experts));
        put("num_experts_per_tok", json!(moe.top_k));
        put("moe_intermediate_size", json!(moe.intermediate_size));
        put("norm_topk_prob", json!(moe.router.norm_topk_prob));
        put("capacity_factor", moe.capacity.map_or(Value::Null, |c| common::decimal(c.factor)));
        if let Some(capacity) = moe.capacity {
            let policy = match capacity.policy {
                DropPolicy::Probs => "probs",
                DropPolicy::Position => "position",
            };
            put("drop_policy", json!(policy));
        }
    }
    map
}
