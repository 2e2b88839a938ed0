//! Families that are planned but not run: grouped-query attention, an MLP or experts in each layer, and something that the
//! runtime lacks, which [`Traits`] names for each.

use serde_json::{Map, Value, json};

use super::common::{self, Defaults, Trunk, limits};
use super::planning::{LayerAttention, LinearAttention, PlanningOnly, WeightFormat, WeightFormats};
use super::{Activation, Attention, Family, Ffn, Gqa, Mlp, ModelSpec, Moe, QkNorm, Rope, RopeScaling, Router, Scoring};
use crate::fields::{Fields, show};
use crate::{DType, SpecError};

const DEFAULTS: Defaults = Defaults { rms_norm_eps: 1e-6, max_position_embeddings: 32768, rope_theta: 1e4 };

/// What differs between the families.
struct Traits {
    /// What the runtime lacks, as the end of "it has …".
    reason: &'static str,
    /// No layer has experts.
    dense: bool,
    /// Where queries and keys are normalised, unless `use_qk_norm` is false.
    qk_norm: QkNorm,
    /// `use_qk_norm` where it is absent.
    use_qk_norm: bool,
    /// `attention_bias` where it is absent.
    bias: bool,
    scoring: Scoring,
    output_gate: bool,
    /// Layers without `layer_types`.
    layers: Layers,
}

/// The pattern of layers of a family.
#[derive(Clone, Copy, PartialEq)]
enum Layers {
    Full,
    /// A window in the first layer and every other one.
    Alternating,
    /// Linear, except for every `full_attention_interval`-th.
    MostlyLinear,
}

const fn traits(family: Family) -> Traits {
    let plain = Traits {
        reason: "",
        dense: false,
        qk_norm: QkNorm::PerHead,
        use_qk_norm: true,
        bias: false,
        scoring: Scoring::Softmax,
        output_gate: false,
        layers: Layers::Full,
    };
    match family {
        Family::Llama => Traits {
            reason: "no experts, and positions that are stretched as in Llama 3.1",
            dense: true,
            qk_norm: QkNorm::None,
            ..plain
        },
        Family::Qwen3 => Traits { reason: "no experts", dense: true, ..plain },
        Family::GptOss => Traits {
            reason: "a window in every other layer, attention sinks, clamped experts with biases and MXFP4 weights",
            qk_norm: QkNorm::None,
            bias: true,
            layers: Layers::Alternating,
            ..plain
        },
        Family::MinimaxM2 => Traits {
            reason: "a head of which only a part turns, with one norm over all heads",
            qk_norm: QkNorm::FullWidth,
            scoring: Scoring::Sigmoid,
            ..plain
        },
        Family::Glm4Moe => Traits {
            reason: "a head of which only a part turns",
            use_qk_norm: false,
            scoring: Scoring::Sigmoid,
            ..plain
        },
        Family::Qwen3Next | Family::Qwen35Moe => Traits {
            reason: "linear attention (gated delta net) in most layers and a gate on attention's output",
            output_gate: true,
            layers: Layers::MostlyLinear,
            ..plain
        },
        _ => plain,
    }
}

pub(crate) fn read(f: &Fields, family: Family) -> Result<ModelSpec, SpecError> {
    let traits = traits(family);
    let trunk = common::read_trunk(f, &DEFAULTS)?;
    let qk_norm = if f.flag("use_qk_norm", traits.use_qk_norm)? { traits.qk_norm } else { QkNorm::None };
    let attention = Gqa {
        num_heads: trunk.num_heads,
        num_kv_heads: common::read_kv_heads(f, trunk.num_heads, trunk.num_heads)?,
        head_dim: common::read_head_dim(f, &trunk)?,
        qk_norm,
        clip_qkv: None,
        sliding_window: None,
        bias: f.flag("attention_bias", traits.bias)?,
    };
    let layers = read_layers(f, &trunk, &traits)?;
    if !traits.dense {
        common::check_experts_in_all(f, experts_key(f), &layers)?;
    }
    let planning = PlanningOnly {
        reason: traits.reason.to_owned(),
        attention: read_attention(f, trunk.num_layers, traits.layers)?,
        output_gate: traits.output_gate,
        formats: WeightFormats::uniform(WeightFormat::Bf16),
    };
    Ok(ModelSpec {
        family,
        vocab_size: trunk.vocab_size,
        hidden_size: trunk.hidden_size,
        max_position_embeddings: trunk.max_position_embeddings,
        rms_norm_eps: trunk.rms_norm_eps,
        tie_word_embeddings: trunk.tie_word_embeddings,
        attention: Attention::Gqa(attention),
        // Stretching and turning a part of the head cost what plain rotary positions cost.
        rope: Rope { theta: read_theta(f)?, interleaved: false, scaling: RopeScaling::None },
        layers,
        dtype: DType::BF16,
        fp8_block: None,
        num_mtp_layers: 0,
        planning_only: Some(planning),
    })
}

fn read_theta(f: &Fields) -> Result<f64, SpecError> {
    let theta = |f: &Fields| f.opt_number("rope_theta", 1.001..=1e18);
    let inside = f.object("rope_parameters")?;
    let inside = inside.map(|map| theta(&Fields::new(f.origin, f.dotted("rope_parameters."), map))).transpose()?;
    Ok(inside.flatten().or(theta(f)?).unwrap_or(DEFAULTS.rope_theta))
}

fn experts_key(f: &Fields) -> &'static str {
    ["num_experts", "num_local_experts"].into_iter().find(|key| f.get(key).is_some()).unwrap_or("n_routed_experts")
}

/// The first `first_k_dense_replace` layers have an MLP, the others experts.
fn read_layers(f: &Fields, trunk: &Trunk, traits: &Traits) -> Result<Vec<Ffn>, SpecError> {
    let num_dense = match traits.dense {
        true => trunk.num_layers,
        false => f.size("first_k_dense_replace", Some(0), 0..=trunk.num_layers)?,
    };
    let mut layers = Vec::with_capacity(trunk.num_layers);
    if num_dense > 0 {
        let intermediate_size = f.size("intermediate_size", None, limits::INTERMEDIATE)?;
        layers.resize(num_dense, Ffn::Dense(Mlp { intermediate_size, activation: Activation::SwiGlu }));
    }
    if num_dense < trunk.num_layers {
        layers.resize(trunk.num_layers, Ffn::Moe(read_moe(f, traits)?));
    }
    Ok(layers)
}

/// The width of an expert is `moe_intermediate_size`, or `intermediate_size` where all layers have experts; that of the
/// shared one is given, or so many routed ones.
fn read_moe(f: &Fields, traits: &Traits) -> Result<Moe, SpecError> {
    let experts_key = experts_key(f);
    let num_experts = f.size(experts_key, None, limits::EXPERTS)?;
    let width_key =
        if f.get("moe_intermediate_size").is_some() { "moe_intermediate_size" } else { "intermediate_size" };
    let intermediate_size = f.size(width_key, None, limits::INTERMEDIATE)?;
    let shared = f.opt_size("shared_expert_intermediate_size", 0..=*limits::INTERMEDIATE.end())?;
    let shared_intermediate_size = match shared {
        Some(width) => width,
        None => {
            let most = limits::INTERMEDIATE.end() / intermediate_size;
            intermediate_size * f.size("n_shared_experts", Some(0), 0..=most)?
        }
    };
    let sigmoid = traits.scoring == Scoring::Sigmoid;
    let router = Router {
        scoring: traits.scoring,
        correction_bias: sigmoid,
        routed_scaling_factor: f.number("routed_scaling_factor", 1.0, 1e-6..=1e6)? as f32,
        ..Router::softmax(f.flag("norm_topk_prob", true)?)
    };
    Ok(Moe {
        num_experts,
        top_k: common::read_top_k(f, experts_key, num_experts)?,
        intermediate_size,
        activation: Activation::SwiGlu,
        router,
        shared_intermediate_size,
        capacity: None,
    })
}

/// `layer_types`, or the family's pattern.
fn read_attention(f: &Fields, num_layers: usize, pattern: Layers) -> Result<Vec<LayerAttention>, SpecError> {
    const KINDS: [(&str, Layers); 3] = [
        ("full_attention", Layers::Full),
        ("sliding_attention", Layers::Alternating),
        ("linear_attention", Layers::MostlyLinear),
    ];
    let kinds: Vec<Layers> = match f.list("layer_types")? {
        Some(types) if types.len() == num_layers => types
            .iter()
            .enumerate()
            .map(|(idx, value)| {
                let kind = KINDS.iter().find(|(name, _)| value.as_str() == Some(name));
                let expected = || KINDS.map(|(name, _)| format!("{name:?}")).join(" or ");
                kind.map(|(_, kind)| *kind)
                    .ok_or_else(|| f.invalid(&format!("layer_types[{idx}]"), show(value), expected()))
            })
            .collect::<Result<_, _>>()?,
        Some(types) => {
            let expected = format!("a list of num_hidden_layers ({num_layers})");
            return Err(f.invalid("layer_types", format!("a list of {}", types.len()), expected));
        }
        None => {
            let interval = match pattern {
                Layers::Full => 1,
                Layers::Alternating => 2,
                Layers::MostlyLinear => f.size("full_attention_interval", Some(4), limits::LAYERS)?,
            };
            let is_full = |layer: usize| (layer + 1).is_multiple_of(interval);
            (0..num_layers).map(|layer| if is_full(layer) { Layers::Full } else { pattern }).collect()
        }
    };
    let window = match kinds.contains(&Layers::Alternating) {
        true => Some(LayerAttention::Window(f.size("sliding_window", None, limits::CONTEXT)?)),
        false => None,
    };
    let linear = match kinds.contains(&Layers::MostlyLinear) {
        true => Some(LayerAttention::Linear(read_linear(f)?)),
        false => None,
    };
    let attention = |kind: &Layers| match kind {
        Layers::Full => Some(LayerAttention::Full),
        Layers::Alternating => window,
        Layers::MostlyLinear => linear,
    };
    Ok(kinds.iter().filter_map(attention).collect())
}

fn read_linear(f: &Fields) -> Result<LinearAttention, SpecError> {
    Ok(LinearAttention {
        num_key_heads: f.size("linear_num_key_heads", None, limits::HEADS)?,
        num_value_heads: f.size("linear_num_value_heads", None, limits::HEADS)?,
        key_head_dim: f.size("linear_key_head_dim", None, limits::HEAD_DIM)?,
        value_head_dim: f.size("linear_value_head_dim", None, limits::HEAD_DIM)?,
        conv_kernel: f.size("linear_conv_kernel_dim", Some(4), 1..=64)?,
    })
}

pub(crate) fn write(spec: &ModelSpec) -> Map<String, Value> {
    let mut map = common::write_trunk(spec, spec.family.model_type(), "");
    map.remove("architectures");
    let gqa = common::gqa(spec);
    common::write_gqa(&mut map, gqa);
    let mut put = |key: &str, value: Value| map.insert(key.to_owned(), value);
    put("attention_bias", json!(gqa.bias));
    put("use_qk_norm", json!(gqa.qk_norm != QkNorm::None));
    let planning = spec.planning_only.as_ref().expect("a planned family");
    let mut types = Vec::new();
    for attention in &planning.attention {
        types.push(match attention {
            LayerAttention::Full => "full_attention",
            LayerAttention::Window(window) => {
                put("sliding_window", json!(window));
                "sliding_attention"
            }
            LayerAttention::Linear(linear) => {
                put("linear_num_key_heads", json!(linear.num_key_heads));
                put("linear_num_value_heads", json!(linear.num_value_heads));
                put("linear_key_head_dim", json!(linear.key_head_dim));
                put("linear_value_head_dim", json!(linear.value_head_dim));
                put("linear_conv_kernel_dim", json!(linear.conv_kernel));
                "linear_attention"
            }
            LayerAttention::Sparse(_) => panic!("{:?} has no indexer", spec.family),
        });
    }
    put("layer_types", json!(types));
    let (dense, moe) = common::kinds(spec);
    put("first_k_dense_replace", json!(spec.layers.iter().filter(|ffn| ffn.as_dense().is_some()).count()));
    if let Some(dense) = dense {
        put("intermediate_size", json!(dense.intermediate_size));
    }
    if let Some(moe) = moe {
        put("num_experts", json!(moe.num_experts));
        put("num_experts_per_tok", json!(moe.top_k));
        put("moe_intermediate_size", json!(moe.intermediate_size));
        put("shared_expert_intermediate_size", json!(moe.shared_intermediate_size));
        put("norm_topk_prob", json!(moe.router.norm_topk_prob));
        put("routed_scaling_factor", common::decimal(moe.router.routed_scaling_factor));
    }
    map
}
