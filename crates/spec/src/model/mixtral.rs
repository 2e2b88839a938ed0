//! `mixtral`: grouped-query attention, every layer MoE, softmax router with renormalised weights.

use serde_json::{Map, Value, json};

use super::common::{self, Defaults, limits};
use super::{Activation, Attention, Family, Ffn, Gqa, ModelSpec, Moe, QkNorm, Router};
use crate::SpecError;
use crate::fields::Fields;

const DEFAULTS: Defaults = Defaults { rms_norm_eps: 1e-5, max_position_embeddings: 131072, rope_theta: 1e6 };

pub(crate) fn read(f: &Fields) -> Result<ModelSpec, SpecError> {
    common::require_silu(f)?;
    let trunk = common::read_trunk(f, &DEFAULTS)?;
    // Absent is 8, as in transformers; null is one for each query head.
    let kv_default = if f.is_null("num_key_value_heads") { trunk.num_heads } else { 8 };
    let attention = Gqa {
        num_heads: trunk.num_heads,
        num_kv_heads: common::read_kv_heads(f, trunk.num_heads, kv_default)?,
        head_dim: common::read_head_dim(f, &trunk)?,
        qk_norm: QkNorm::None,
        clip_qkv: None,
        sliding_window: f.opt_size("sliding_window", limits::CONTEXT)?,
        bias: false,
    };
    let (experts_key, num_experts) = common::read_num_experts(f, ["num_local_experts", "num_experts"])?;
    let moe = Moe {
        num_experts,
        top_k: common::read_top_k(f, experts_key, num_experts)?,
        intermediate_size: f.size("intermediate_size", None, limits::INTERMEDIATE)?,
        activation: Activation::SwiGlu,
        router: Router::softmax(true),
        shared_intermediate_size: 0,
        capacity: None,
    };
    let layers = vec![Ffn::Moe(moe); trunk.num_layers];
    common::check_experts_in_all(f, experts_key, &layers)?;
    let rope = common::read_rope(f, DEFAULTS.rope_theta, trunk.max_position_embeddings, false)?;
    common::assemble(f, Family::Mixtral, trunk, Attention::Gqa(attention), rope, layers)
}

pub(crate) fn write(spec: &ModelSpec) -> Map<String, Value> {
    let mut map = common::write_trunk(spec, "mixtral", "MixtralForCausalLM");
    let gqa = common::gqa(spec);
    common::write_gqa(&mut map, gqa);
    map.insert("sliding_window".into(), json!(gqa.sliding_window));
    let (_, moe) = common::kinds(spec);
    let moe = moe.expect("every layer of mixtral is MoE");
    map.insert("num_local_experts".into(), json!(moe.num_experts));
    map.insert("num_experts_per_tok".into(), json!(moe.top_k));
    map.insert("intermediate_size".into(), json!(moe.intermediate_size));
    map
}
