//! `olmoe`: multi-head attention with full-width q/k norm and clipping, every layer MoE, softmax router.

use serde_json::{Map, Value, json};

use super::common::{self, Defaults, limits};
use super::{Activation, Attention, Family, Ffn, Gqa, ModelSpec, Moe, QkNorm, Router};
use crate::SpecError;
use crate::fields::Fields;

const DEFAULTS: Defaults = Defaults { rms_norm_eps: 1e-5, max_position_embeddings: 4096, rope_theta: 1e4 };

pub(crate) fn read(f: &Fields) -> Result<ModelSpec, SpecError> {
    common::require_silu(f)?;
    let trunk = common::read_trunk(f, &DEFAULTS)?;
    let head_dim = common::read_head_dim(f, &trunk)?;
    // The q norm has hidden_size weights and spans all heads.
    if head_dim * trunk.num_heads != trunk.hidden_size {
        return Err(f.invalid(
            "head_dim",
            head_dim,
            format!("hidden_size ({}) divided by num_attention_heads ({})", trunk.hidden_size, trunk.num_heads),
        ));
    }
    if f.get("sliding_window").is_some() {
        return Err(f.unsupported("sliding_window", "null for model_type \"olmoe\""));
    }
    let attention = Gqa {
        num_heads: trunk.num_heads,
        num_kv_heads: common::read_kv_heads(f, trunk.num_heads, trunk.num_heads)?,
        head_dim,
        qk_norm: QkNorm::FullWidth,
        clip_qkv: f.opt_number("clip_qkv", 1e-6..=1e30)?.map(|clip| clip as f32),
        sliding_window: None,
        bias: f.flag("attention_bias", false)?,
    };
    let (experts_key, num_experts) = common::read_num_experts(f, ["num_experts", "num_local_experts"])?;
    let moe = Moe {
        num_experts,
        top_k: common::read_top_k(f, experts_key, num_experts)?,
        intermediate_size: f.size("intermediate_size", None, limits::INTERMEDIATE)?,
        activation: Activation::SwiGlu,
        router: Router::softmax(f.flag("norm_topk_prob", false)?),
        shared_intermediate_size: 0,
        capacity: None,
    };
    let layers = vec![Ffn::Moe(moe); trunk.num_layers];
    common::check_experts_in_all(f, experts_key, &layers)?;
    let rope = common::read_rope(f, DEFAULTS.rope_theta, trunk.max_position_embeddings, false)?;
    common::assemble(f, Family::Olmoe, trunk, Attention::Gqa(attention), rope, layers)
}

pub(crate) fn write(spec: &ModelSpec) -> Map<String, Value> {
    let mut map = common::write_trunk(spec, "olmoe", "OlmoeForCausalLM");
    let gqa = common::gqa(spec);
    map.insert("num_attention_heads".into(), json!(gqa.num_heads));
    map.insert("num_key_value_heads".into(), json!(gqa.num_kv_heads));
    map.insert("attention_bias".into(), json!(gqa.bias));
    map.insert("clip_qkv".into(), gqa.clip_qkv.map_or(Value::Null, common::decimal));
    let (_, moe) = common::kinds(spec);
    let moe = moe.expect("every layer of olmoe is MoE");
    map.insert("num_experts".into(), json!(moe.num_experts));
    map.insert("num_experts_per_tok".into(), json!(moe.top_k));
    map.insert("intermediate_size".into(), json!(moe.intermediate_size));
    map.insert("norm_topk_prob".into(), json!(moe.router.norm_topk_prob));
    map
}
