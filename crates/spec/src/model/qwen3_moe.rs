//! `qwen3_moe`: grouped-query attention with a q/k norm per head, dense and MoE layers mixed, softmax router.

use serde_json::{Map, Value, json};

use super::common::{self, Defaults, limits};
use super::{Activation, Attention, Family, Ffn, Gqa, Mlp, ModelSpec, Moe, QkNorm, Router};
use crate::SpecError;
use crate::fields::{Fields, show};

const DEFAULTS: Defaults = Defaults { rms_norm_eps: 1e-6, max_position_embeddings: 32768, rope_theta: 1e4 };

pub(crate) fn read(f: &Fields) -> Result<ModelSpec, SpecError> {
    common::require_silu(f)?;
    let trunk = common::read_trunk(f, &DEFAULTS)?;
    let attention = Gqa {
        num_heads: trunk.num_heads,
        num_kv_heads: common::read_kv_heads(f, trunk.num_heads, 4)?,
        head_dim: common::read_head_dim(f, &trunk)?,
        qk_norm: QkNorm::PerHead,
        clip_qkv: None,
        sliding_window: read_sliding_window(f)?,
        bias: f.flag("attention_bias", false)?,
    };
    let experts_key = if f.get("num_experts").is_some() { "num_experts" } else { "num_local_experts" };
    let layers = read_layers(f, trunk.num_layers, experts_key)?;
    common::check_experts_in_all(f, experts_key, &layers)?;
    let rope = common::read_rope(f, DEFAULTS.rope_theta, trunk.max_position_embeddings, false)?;
    common::assemble(f, Family::Qwen3Moe, trunk, Attention::Gqa(attention), rope, layers)
}

/// `sliding_window` counts only where `use_sliding_window` says so.
fn read_sliding_window(f: &Fields) -> Result<Option<usize>, SpecError> {
    if !f.flag("use_sliding_window", false)? || f.is_null("sliding_window") {
        return Ok(None);
    }
    f.size("sliding_window", Some(4096), limits::CONTEXT).map(Some)
}

/// A layer is MoE unless `mlp_only_layers` names it or `decoder_sparse_step` does not divide its number (from 1).
fn read_layers(f: &Fields, num_layers: usize, experts_key: &str) -> Result<Vec<Ffn>, SpecError> {
    let step = f.size("decoder_sparse_step", Some(1), limits::LAYERS)?;
    let mlp_only = read_mlp_only_layers(f)?;
    let any_experts = f.get(experts_key).and_then(Value::as_u64) != Some(0);
    let is_moe: Vec<bool> = (0..num_layers)
        .map(|layer| any_experts && !mlp_only.contains(&layer) && (layer + 1).is_multiple_of(step))
        .collect();
    let dense = if is_moe.contains(&false) {
        let intermediate_size = f.size("intermediate_size", None, limits::INTERMEDIATE)?;
        Some(Ffn::Dense(Mlp { intermediate_size, activation: Activation::SwiGlu }))
    } else {
        None
    };
    let moe = if is_moe.contains(&true) {
        let (experts_key, num_experts) = common::read_num_experts(f, ["num_experts", "num_local_experts"])?;
        Some(Ffn::Moe(Moe {
            num_experts,
            top_k: common::read_top_k(f, experts_key, num_experts)?,
            intermediate_size: f.size("moe_intermediate_size", None, limits::INTERMEDIATE)?,
            activation: Activation::SwiGlu,
            router: Router::softmax(f.flag("norm_topk_prob", false)?),
            shared_intermediate_size: 0,
            capacity: None,
        }))
    } else {
        None
    };
    Ok(is_moe.iter().filter_map(|&is_moe| if is_moe { moe.clone() } else { dense.clone() }).collect())
}

/// Layer numbers from 0; numbers beyond the last layer mean nothing, as in transformers.
fn read_mlp_only_layers(f: &Fields) -> Result<Vec<usize>, SpecError> {
    let Some(value) = f.get("mlp_only_layers") else { return Ok(Vec::new()) };
    let layers = value
        .as_array()
        .map(|list| list.iter().map(|v| v.as_u64().and_then(|n| usize::try_from(n).ok())).collect::<Option<Vec<_>>>());
    match layers {
        Some(Some(mut layers)) => {
            layers.retain(|layer| limits::LAYERS.contains(&(layer.saturating_add(1))));
            layers.sort_unstable();
            layers.dedup();
            Ok(layers)
        }
        _ => Err(f.invalid("mlp_only_layers", show(value), "a list of layer numbers, from 0")),
    }
}

pub(crate) fn write(spec: &ModelSpec) -> Map<String, Value> {
    let mut map = common::write_trunk(spec, "qwen3_moe", "Qwen3MoeForCausalLM");
    let gqa = common::gqa(spec);
    common::write_gqa(&mut map, gqa);
    map.insert("attention_bias".into(), json!(gqa.bias));
    map.insert("use_sliding_window".into(), json!(gqa.sliding_window.is_some()));
    map.insert("sliding_window".into(), json!(gqa.sliding_window));
    // Any pattern can be said as a list, so the step stays 1.
    let dense_layers: Vec<usize> =
        spec.layers.iter().enumerate().filter(|(_, ffn)| ffn.as_dense().is_some()).map(|(layer, _)| layer).collect();
    map.insert("decoder_sparse_step".into(), json!(1));
    map.insert("mlp_only_layers".into(), json!(dense_layers));
    let (dense, moe) = common::kinds(spec);
    if let Some(dense) = dense {
        map.insert("intermediate_size".into(), json!(dense.intermediate_size));
    }
    map.insert("num_experts".into(), json!(moe.map_or(0, |moe| moe.num_experts)));
    if let Some(moe) = moe {
        map.insert("num_experts_per_tok".into(), json!(moe.top_k));
        map.insert("moe_intermediate_size".into(), json!(moe.intermediate_size));
        map.insert("norm_topk_prob".into(), json!(moe.router.norm_topk_prob));
    }
    map
}
