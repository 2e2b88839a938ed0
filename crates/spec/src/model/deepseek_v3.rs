//! `deepseek_v3` and `kimi_k2`: latent attention (MLA), a dense head of the stack, shared experts, and a sigmoid
//! router with a correction bias and group-limited top-k.

use serde_json::{Map, Value, json};

use super::common::{self, Defaults, Trunk, limits};
use super::{Activation, Attention, Family, Ffn, Mla, Mlp, ModelSpec, Moe, Router, Scoring};
use crate::SpecError;
use crate::fields::Fields;

const DEFAULTS: Defaults = Defaults { rms_norm_eps: 1e-6, max_position_embeddings: 4096, rope_theta: 1e4 };

pub(crate) fn read(f: &Fields) -> Result<ModelSpec, SpecError> {
    common::require_silu(f)?;
    f.only("scoring_func", &["sigmoid"])?;
    f.only("topk_method", &["noaux_tc"])?;
    if f.flag("attention_bias", false)? {
        return Err(f.unsupported("attention_bias", "false for model_type \"deepseek_v3\""));
    }
    let trunk = common::read_trunk(f, &DEFAULTS)?;
    let mla = read_mla(f, &trunk, Some(1536))?;
    let layers = read_layers(f, trunk.num_layers)?;
    common::check_experts_in_all(f, "n_routed_experts", &layers)?;
    let (dtype, fp8_block) = common::read_dtype(f)?;
    let mtp_key = if f.get("num_mtp_layers").is_some() { "num_mtp_layers" } else { "num_nextn_predict_layers" };
    Ok(ModelSpec {
        family: Family::DeepseekV3,
        vocab_size: trunk.vocab_size,
        hidden_size: trunk.hidden_size,
        max_position_embeddings: trunk.max_position_embeddings,
        rms_norm_eps: trunk.rms_norm_eps,
        tie_word_embeddings: trunk.tie_word_embeddings,
        attention: Attention::Mla(mla),
        rope: common::read_rope(
            f,
            DEFAULTS.rope_theta,
            trunk.max_position_embeddings,
            f.flag("rope_interleave", true)?,
        )?,
        layers,
        dtype,
        fp8_block,
        num_mtp_layers: f.size(mtp_key, Some(1), 0..=*limits::LAYERS.end())?,
        planning_only: None,
    })
}

/// Latent attention; shared with the papers' models. `q_lora_rank` is `default_q_rank` where absent; null is none.
/// `num_key_value_heads` means nothing here, and files that transformers saved may have any number there.
pub(crate) fn read_mla(f: &Fields, trunk: &Trunk, default_q_rank: Option<usize>) -> Result<Mla, SpecError> {
    let default_q_rank = default_q_rank.filter(|_| !f.is_null("q_lora_rank"));
    let mla = Mla {
        num_heads: trunk.num_heads,
        q_lora_rank: f.opt_size("q_lora_rank", limits::WIDTH)?.or(default_q_rank),
        kv_lora_rank: f.size("kv_lora_rank", None, limits::WIDTH)?,
        qk_nope_head_dim: f.size("qk_nope_head_dim", None, limits::HEAD_DIM)?,
        qk_rope_head_dim: f.size("qk_rope_head_dim", None, limits::HEAD_DIM)?,
        v_head_dim: f.size("v_head_dim", None, limits::HEAD_DIM)?,
    };
    common::require_even(f, "qk_rope_head_dim", mla.qk_rope_head_dim)?;
    Ok(mla)
}

/// The first `first_k_dense_replace` layers are dense; of the others, those whose number `moe_layer_freq` divides are
/// MoE (DeepSeek's own rule; transformers knows only a frequency of 1, with which it is the same).
fn read_layers(f: &Fields, num_layers: usize) -> Result<Vec<Ffn>, SpecError> {
    let dense_default = num_layers.min(3);
    let num_dense = f.size("first_k_dense_replace", Some(dense_default), 0..=num_layers)?;
    let freq = f.size("moe_layer_freq", Some(1), limits::LAYERS)?;
    let is_moe: Vec<bool> = (0..num_layers).map(|layer| layer >= num_dense && layer.is_multiple_of(freq)).collect();
    let dense = if is_moe.contains(&false) {
        let intermediate_size = f.size("intermediate_size", None, limits::INTERMEDIATE)?;
        Some(Ffn::Dense(Mlp { intermediate_size, activation: Activation::SwiGlu }))
    } else {
        None
    };
    let moe = if is_moe.contains(&true) { Some(Ffn::Moe(read_moe(f)?)) } else { None };
    Ok(is_moe.iter().filter_map(|&is_moe| if is_moe { moe.clone() } else { dense.clone() }).collect())
}

fn read_moe(f: &Fields) -> Result<Moe, SpecError> {
    let (experts_key, num_experts) = common::read_num_experts(f, ["n_routed_experts", "num_local_experts"])?;
    let top_k = common::read_top_k(f, experts_key, num_experts)?;
    let intermediate_size = f.size("moe_intermediate_size", None, limits::INTERMEDIATE)?;
    // Absent is DeepSeek-V3's own 1; null is none.
    let shared_default = usize::from(!f.is_null("n_shared_experts"));
    let num_shared = f.size("n_shared_experts", Some(shared_default), 0..=*limits::EXPERTS.end())?;
    let shared_intermediate_size = intermediate_size * num_shared;
    if shared_intermediate_size > *limits::INTERMEDIATE.end() {
        return Err(f.invalid(
            "n_shared_experts",
            num_shared,
            format!("such that all of width {intermediate_size} are at most {} wide", limits::INTERMEDIATE.end()),
        ));
    }
    let (n_group, topk_group) = read_groups(f, experts_key, num_experts, top_k)?;
    Ok(Moe {
        num_experts,
        top_k,
        intermediate_size,
        activation: Activation::SwiGlu,
        router: Router {
            scoring: Scoring::Sigmoid,
            norm_topk_prob: f.flag("norm_topk_prob", true)?,
            correction_bias: true,
            n_group,
            topk_group,
            routed_scaling_factor: f.number("routed_scaling_factor", 2.5, 1e-6..=1e6)? as f32,
        },
        shared_intermediate_size,
        capacity: None,
    })
}

/// Groups of equal size, at least two experts each (a group's score is the sum of its best two), and enough experts
/// in the chosen groups for the top-k.
fn read_groups(f: &Fields, experts_key: &str, num_experts: usize, top_k: usize) -> Result<(usize, usize), SpecError> {
    let absent = |key: &str, default: usize| if f.is_null(key) { 1 } else { default };
    let n_group = f.size("n_group", Some(absent("n_group", 8)), limits::EXPERTS)?;
    if !num_experts.is_multiple_of(n_group) {
        return Err(f.invalid("n_group", n_group, format!("a divisor of {experts_key} ({num_experts})")));
    }
    let group_size = num_experts / n_group;
    if n_group > 1 && group_size < 2 {
        return Err(f.invalid(
            "n_group",
            n_group,
            format!("at most half of {experts_key} ({num_experts}), because a group is scored by its two best"),
        ));
    }
    let topk_group = f.size("topk_group", Some(absent("topk_group", 4)), limits::EXPERTS)?;
    if topk_group > n_group {
        return Err(f.invalid("topk_group", topk_group, format!("at most n_group ({n_group})")));
    }
    if top_k > topk_group * group_size {
        return Err(f.invalid(
            "num_experts_per_tok",
            top_k,
            format!(
                "at most {}, the experts in topk_group ({topk_group}) groups of {group_size}",
                topk_group * group_size
            ),
        ));
    }
    Ok((n_group, topk_group))
}

pub(crate) fn write(spec: &ModelSpec) -> Map<String, Value> {
    let mut map = common::write_trunk(spec, "deepseek_v3", "DeepseekV3ForCausalLM");
    let Attention::Mla(mla) = &spec.attention else { panic!("deepseek_v3 has latent attention") };
    common::write_mla(&mut map, mla);
    let mut put = |key: &str, value: Value| map.insert(key.to_owned(), value);
    put("rope_interleave", json!(spec.rope.interleaved));
    put("num_nextn_predict_layers", json!(spec.num_mtp_layers));
    let (num_dense, freq) = dense_pattern(&spec.layers);
    put("first_k_dense_replace", json!(num_dense));
    put("moe_layer_freq", json!(freq));
    let (dense, moe) = common::kinds(spec);
    if let Some(dense) = dense {
        put("intermediate_size", json!(dense.intermediate_size));
    }
    if let Some(moe) = moe {
        put("n_routed_experts", json!(moe.num_experts));
        put("num_experts_per_tok", json!(moe.top_k));
        put("moe_intermediate_size", json!(moe.intermediate_size));
        put("n_shared_experts", json!(moe.shared_intermediate_size / moe.intermediate_size));
        put("scoring_func", json!("sigmoid"));
        put("topk_method", json!("noaux_tc"));
        put("norm_topk_prob", json!(moe.router.norm_topk_prob));
        put("n_group", json!(moe.router.n_group));
        put("topk_group", json!(moe.router.topk_group));
        put("routed_scaling_factor", common::decimal(moe.router.routed_scaling_factor));
    }
    map
}

/// `first_k_dense_replace` and `moe_layer_freq` that say which layers are dense.
///
/// # Panics
/// When no pair says it; such a description cannot have been read from a file.
fn dense_pattern(layers: &[Ffn]) -> (usize, usize) {
    let moe: Vec<usize> = (0..layers.len()).filter(|&layer| layers[layer].as_moe().is_some()).collect();
    let (Some(&first), second) = (moe.first(), moe.get(1)) else { return (layers.len(), 1) };
    // One MoE layer that is not the last: any frequency that hits it and nothing after it.
    let freq = match second {
        Some(second) => second - first,
        None if first + 1 == layers.len() => 1,
        None => (2..=layers.len()).find(|f| first.is_multiple_of(*f) && first + f >= layers.len()).unwrap_or(0),
    };
    let says = |layer: usize| layer >= first && freq > 0 && layer.is_multiple_of(freq);
    assert!(
        (0..layers.len()).all(|layer| says(layer) == layers[layer].as_moe().is_some()),
        "deepseek_v3 cannot say that the MoE layers are {moe:?} of {}",
        layers.len()
    );
    (first, freq)
}
