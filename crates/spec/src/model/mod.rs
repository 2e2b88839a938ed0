//! The model: one description for every family.
//!
//! A family's own file (`mixtral.rs`, `qwen3_moe.rs`, …) reads its `config.json` into [`ModelSpec`]; from there on
//! nothing asks for the family's name except the names of tensors on disk.

pub(crate) mod common;
pub mod counts;
mod deepseek_v3;
mod formats;
pub mod hub;
mod mixtral;
mod olmoe;
mod paper;
mod planned;
pub mod planning;
pub mod presets;
mod qwen3_moe;
pub mod scale;
mod sparse;
pub mod tensors;

use serde_json::{Map, Value};

use self::planning::PlanningOnly;
use crate::fields::{Fields, show};
use crate::{DType, SpecError};

/// Which `model_type` the description came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Family {
    /// `mixtral`
    Mixtral,
    /// `qwen3_moe`
    Qwen3Moe,
    /// `olmoe`
    Olmoe,
    /// `deepseek_v3` (and `kimi_k2`, the same architecture)
    DeepseekV3,
    /// `moesaic_paper`: the models of the papers that the project comes from
    Paper,
    /// `llama`; from here on all are planned, not run
    Llama,
    /// `qwen3`, the models without experts
    Qwen3,
    /// `gpt_oss`
    GptOss,
    /// `minimax_m2`
    MinimaxM2,
    /// `glm4_moe`
    Glm4Moe,
    /// `qwen3_next`
    Qwen3Next,
    /// `qwen3_5_moe`, the text model
    Qwen35Moe,
    /// `deepseek_v32`
    DeepseekV32,
    /// `glm_moe_dsa`
    GlmMoeDsa,
}

impl Family {
    /// The `model_type` that its config.json has.
    pub const fn model_type(self) -> &'static str {
        match self {
            Family::Mixtral => "mixtral",
            Family::Qwen3Moe => "qwen3_moe",
            Family::Olmoe => "olmoe",
            Family::DeepseekV3 => "deepseek_v3",
            Family::Paper => "moesaic_paper",
            Family::Llama => "llama",
            Family::Qwen3 => "qwen3",
            Family::GptOss => "gpt_oss",
            Family::MinimaxM2 => "minimax_m2",
            Family::Glm4Moe => "glm4_moe",
            Family::Qwen3Next => "qwen3_next",
            Family::Qwen35Moe => "qwen3_5_moe",
            Family::DeepseekV32 => "deepseek_v32",
            Family::GlmMoeDsa => "glm_moe_dsa",
        }
    }

    /// The family that is planned but not run under this `model_type`.
    fn planned(model_type: &str) -> Option<Family> {
        const PLANNED: [Family; 9] = [
            Family::Llama,
            Family::Qwen3,
            Family::GptOss,
            Family::MinimaxM2,
            Family::Glm4Moe,
            Family::Qwen3Next,
            Family::Qwen35Moe,
            Family::DeepseekV32,
            Family::GlmMoeDsa,
        ];
        PLANNED.into_iter().find(|family| family.model_type() == model_type)
    }
}

/// A decoder-only Mixture-of-Experts transformer with pre-norm (RMSNorm) residual blocks.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelSpec {
    /// Where it came from; decides the names of tensors on disk.
    pub family: Family,
    /// Rows of the embedding and of the head.
    pub vocab_size: usize,
    /// Width of the residual stream (D).
    pub hidden_size: usize,
    /// Longest context in tokens.
    pub max_position_embeddings: usize,
    /// Added to the mean square inside every RMSNorm.
    pub rms_norm_eps: f32,
    /// The head is the transposed embedding.
    pub tie_word_embeddings: bool,
    /// The same in every layer.
    pub attention: Attention,
    /// Rotary position embedding.
    pub rope: Rope,
    /// The feed-forward half of each decoder layer, in order; its length is the number of layers.
    pub layers: Vec<Ffn>,
    /// Element type of the matrices in the checkpoint.
    pub dtype: DType,
    /// For FP8 checkpoints, the block `[rows, cols]` that shares one `weight_scale_inv`.
    pub fp8_block: Option<[usize; 2]>,
    /// Multi-token-prediction layers that the checkpoint carries after the last layer; recognised and skipped.
    pub num_mtp_layers: usize,
    /// What the model has beside all this that is priced but not run; `None` for a model that runs.
    pub planning_only: Option<PlanningOnly>,
}

/// Every `model_type` that is read: six that run, and those that are planned.
const MODEL_TYPES: [&str; 16] = [
    "mixtral",
    "qwen3_moe",
    "olmoe",
    "deepseek_v3",
    "kimi_k2",
    "moesaic_paper",
    "llama",
    "qwen3",
    "gpt_oss",
    "minimax_m2",
    "glm4_moe",
    "qwen3_next",
    "qwen3_5_moe",
    "deepseek_v32",
    "glm_moe_dsa",
    "kimi_k25",
];

impl ModelSpec {
    /// Reads the text of a `config.json`, in the form of transformers 4 or 5 or our own (`moesaic_paper`). `origin`
    /// is its path, for messages. Total: any text gives a checked description or an error, in time and memory that
    /// the length of the text bounds.
    ///
    /// # Errors
    /// [`SpecError`]: not JSON, a field missing, of the wrong type, out of range or at odds with another, or something
    /// that is not supported.
    pub fn from_config_json(text: &str, origin: &str) -> Result<ModelSpec, SpecError> {
        let map = common::parse_object(text, origin)?;
        let (prefix, mut map) = text_model(map);
        let planned = map.get("model_type").and_then(Value::as_str).and_then(Family::planned);
        let f = Fields::new(origin, prefix, &map);
        // The families that run know the one format that they load; all others are said here, for any family.
        if planned.is_some() || prefix == "text_config." || formats::is_ours(&f) {
            let formats = formats::read(&f)?;
            map.remove("quantization_config");
            return Ok(read_family(&Fields::new(origin, prefix, &map), planned)?.with_formats(formats));
        }
        read_family(&f, planned)
    }

    /// The `config.json` that transformers and [`ModelSpec::from_config_json`] read back as this description.
    /// `kimi_k2` is written as `deepseek_v3`, which it is.
    pub fn to_config_json(&self) -> String {
        let mut map = match self.family {
            Family::Mixtral => mixtral::write(self),
            Family::Qwen3Moe => qwen3_moe::write(self),
            Family::Olmoe => olmoe::write(self),
            Family::DeepseekV3 => deepseek_v3::write(self),
            Family::Paper => paper::write(self),
            Family::DeepseekV32 | Family::GlmMoeDsa => sparse::write(self),
            _ => planned::write(self),
        };
        if let Some(planning) = &self.planning_only {
            formats::write(&mut map, planning.formats);
        }
        let mut text = serde_json::to_string_pretty(&Value::Object(map)).expect("a JSON value prints");
        text.push('\n');
        text
    }

    /// The factor on query·key before the softmax: `1/sqrt(width)`, with YaRN's temperature squared for MLA
    /// (DeepSeek-V3; the other families put all of it into cos and sin).
    pub fn softmax_scale(&self) -> f64 {
        match &self.attention {
            Attention::Gqa(gqa) => (gqa.head_dim as f64).powf(-0.5),
            Attention::Mla(mla) => {
                let temperature = match self.rope.scaling {
                    RopeScaling::Yarn { factor, mscale_all_dim, .. } if mscale_all_dim != 0.0 => {
                        yarn_mscale(factor, mscale_all_dim)
                    }
                    _ => 1.0,
                };
                (mla.qk_head_dim() as f64).powf(-0.5) * temperature * temperature
            }
        }
    }
}

/// The language model of a model that also sees, with what is said beside it; any other description as it is. Also the
/// prefix of its fields.
fn text_model(mut map: Map<String, Value>) -> (&'static str, Map<String, Value>) {
    const WRAPPERS: [(&str, &str); 2] = [("kimi_k25", "deepseek_v3"), ("qwen3_5_moe", "qwen3_5_moe")];
    let model_type = map.get("model_type").and_then(Value::as_str);
    let Some((_, inside)) = WRAPPERS.iter().find(|(outside, _)| model_type == Some(outside)) else { return ("", map) };
    let Some(Value::Object(mut text)) = map.remove("text_config") else { return ("", map) };
    for key in ["quantization_config", "tie_word_embeddings"] {
        if let (None, Some(value)) = (text.get(key), map.remove(key)) {
            text.insert(key.to_owned(), value);
        }
    }
    text.insert("model_type".to_owned(), Value::from(*inside));
    ("text_config.", text)
}

fn read_family(f: &Fields, planned: Option<Family>) -> Result<ModelSpec, SpecError> {
    if let Some(family) = planned {
        return match family {
            Family::DeepseekV32 | Family::GlmMoeDsa => sparse::read(f, family),
            _ => planned::read(f, family),
        };
    }
    match f.get("model_type").and_then(Value::as_str) {
        Some("mixtral") => mixtral::read(f),
        Some("qwen3_moe") => qwen3_moe::read(f),
        Some("olmoe") => olmoe::read(f),
        Some("deepseek_v3" | "kimi_k2") => deepseek_v3::read(f),
        Some("moesaic_paper") => paper::read(f),
        _ => match f.get("model_type") {
            None => Err(f.missing("model_type", format!("one of {}", MODEL_TYPES.join(", ")))),
            Some(other) => Err(SpecError::UnknownModelType {
                origin: f.origin.to_owned(),
                got: show(other),
                known: MODEL_TYPES.join(", "),
            }),
        },
    }
}

/// YaRN's attention temperature, equation 22 of arXiv 2309.00071 with DeepSeek's `mscale` in front of the logarithm.
fn yarn_mscale(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
}

impl Rope {
    /// The factor on cos and sin (transformers' `attention_scaling`).
    pub fn cos_sin_factor(&self) -> f64 {
        match self.scaling {
            RopeScaling::None | RopeScaling::Linear { .. } => 1.0,
            RopeScaling::Yarn { attention_factor: Some(factor), .. } => factor,
            RopeScaling::Yarn { factor, mscale, mscale_all_dim, .. } if mscale != 0.0 && mscale_all_dim != 0.0 => {
                yarn_mscale(factor, mscale) / yarn_mscale(factor, mscale_all_dim)
            }
            RopeScaling::Yarn { factor, .. } => yarn_mscale(factor, 1.0),
        }
    }
}

impl Attention {
    /// Query heads.
    pub fn num_heads(&self) -> usize {
        match self {
            Attention::Gqa(gqa) => gqa.num_heads,
            Attention::Mla(mla) => mla.num_heads,
        }
    }

    /// Values that one token leaves in the cache of one layer: keys and values, or MLA's latent with the rotary key.
    pub fn kv_values_per_token(&self) -> usize {
        match self {
            Attention::Gqa(gqa) => 2 * gqa.num_kv_heads * gqa.head_dim,
            Attention::Mla(mla) => mla.kv_lora_rank + mla.qk_rope_head_dim,
        }
    }
}

impl Mla {
    /// The epsilon of the norms on the query's and the key/value latent. transformers builds these two with its
    /// default instead of the model's `rms_norm_eps`.
    pub const LATENT_NORM_EPS: f32 = 1e-6;

    /// Width of a head's whole query or key.
    pub fn qk_head_dim(&self) -> usize {
        self.qk_nope_head_dim + self.qk_rope_head_dim
    }
}

impl Ffn {
    /// The experts, where the layer has them.
    pub fn as_moe(&self) -> Option<&Moe> {
        match self {
            Ffn::Moe(moe) => Some(moe),
            Ffn::Dense(_) => None,
        }
    }

    /// The MLP, where the layer is dense.
    pub fn as_dense(&self) -> Option<&Mlp> {
        match self {
            Ffn::Dense(mlp) => Some(mlp),
            Ffn::Moe(_) => None,
        }
    }
}

/// How tokens look at each other.
#[derive(Clone, Debug, PartialEq)]
pub enum Attention {
    /// Grouped-query attention; multi-head attention is `num_kv_heads == num_heads`.
    Gqa(Gqa),
    /// Multi-head latent attention (DeepSeek-V2, section 2.1).
    Mla(Mla),
}

/// Grouped-query attention.
#[derive(Clone, Debug, PartialEq)]
pub struct Gqa {
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads; divides `num_heads`.
    pub num_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// RMSNorm on queries and keys before RoPE.
    pub qk_norm: QkNorm,
    /// Queries, keys and values are clamped to ±this, after the norm and before RoPE (OLMoE).
    pub clip_qkv: Option<f32>,
    /// A token sees at most this many last tokens, itself included.
    pub sliding_window: Option<usize>,
    /// q, k, v and o projections have a bias.
    pub bias: bool,
}

/// Where queries and keys are normalised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QkNorm {
    /// Not at all.
    None,
    /// Each head apart, one weight of `head_dim` for all heads (Qwen3).
    PerHead,
    /// Over all heads at once, a weight of `num_heads * head_dim` (OLMoE).
    FullWidth,
}

/// Multi-head latent attention. A token's cache entry is `kv_lora_rank + qk_rope_head_dim` values.
#[derive(Clone, Debug, PartialEq)]
pub struct Mla {
    /// Heads.
    pub num_heads: usize,
    /// Rank of the query's low-rank projection; `None` projects directly.
    pub q_lora_rank: Option<usize>,
    /// Rank of the shared key/value latent.
    pub kv_lora_rank: usize,
    /// Width of a head's position-free query/key part.
    pub qk_nope_head_dim: usize,
    /// Width of the rotary query/key part; the key's is shared by all heads.
    pub qk_rope_head_dim: usize,
    /// Width of a head's value.
    pub v_head_dim: usize,
}

/// Rotary position embedding.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f64,
    /// Pairs are neighbours (2i, 2i+1) on disk; otherwise halves (i, i + dim/2).
    pub interleaved: bool,
    /// Stretching to longer contexts.
    pub scaling: RopeScaling,
}

/// Stretching of rotary positions.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// As trained.
    None,
    /// Positions divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// YaRN (arXiv 2309.00071): frequencies blended between interpolation and extrapolation.
    Yarn {
        /// Context extension.
        factor: f64,
        /// Context before the extension, tokens.
        original_max_position_embeddings: usize,
        /// Rotations at which extrapolation is complete.
        beta_fast: f64,
        /// Rotations at which interpolation is complete.
        beta_slow: f64,
        /// DeepSeek's numerator of the attention temperature; 0 is absent.
        mscale: f64,
        /// DeepSeek's denominator, also applied to the softmax scale, squared; 0 is absent.
        mscale_all_dim: f64,
        /// Explicit factor on cos and sin, instead of the one that follows from `factor`.
        attention_factor: Option<f64>,
        /// Round the correction range to whole dimensions.
        truncate: bool,
    },
}

/// The feed-forward half of a layer.
#[derive(Clone, Debug, PartialEq)]
pub enum Ffn {
    /// One MLP for all tokens.
    Dense(Mlp),
    /// Routed experts.
    Moe(Moe),
}

/// A dense MLP.
#[derive(Clone, Debug, PartialEq)]
pub struct Mlp {
    /// Hidden width (F).
    pub intermediate_size: usize,
    /// Non-linearity, and with it the number of matrices.
    pub activation: Activation,
}

/// The non-linearity of an MLP or expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Activation {
    /// `down(silu(gate(x)) * up(x))`, three matrices.
    SwiGlu,
    /// `down(gelu_tanh(up(x)))`, two matrices.
    Gelu,
}

impl Activation {
    /// Matrices of an MLP or expert.
    pub const fn matrices(self) -> u64 {
        match self {
            Activation::SwiGlu => 3,
            Activation::Gelu => 2,
        }
    }
}

/// A layer of routed experts.
#[derive(Clone, Debug, PartialEq)]
pub struct Moe {
    /// Routed experts (E).
    pub num_experts: usize,
    /// Experts that a token goes to (K).
    pub top_k: usize,
    /// Hidden width of one expert (F).
    pub intermediate_size: usize,
    /// Non-linearity of the experts, the shared one included.
    pub activation: Activation,
    /// How experts are chosen and weighted.
    pub router: Router,
    /// Hidden width of the shared expert that every token passes (all shared experts side by side); 0 is none.
    pub shared_intermediate_size: usize,
    /// Limit on tokens per expert; `None` drops nothing.
    pub capacity: Option<Capacity>,
}

/// How experts are chosen and weighted.
#[derive(Clone, Debug, PartialEq)]
pub struct Router {
    /// Logits to scores.
    pub scoring: Scoring,
    /// The K chosen scores are divided by their sum.
    pub norm_topk_prob: bool,
    /// A learned bias is added to the scores for choosing, not for weighting (DeepSeek-V3).
    pub correction_bias: bool,
    /// Experts are split into this many groups …
    pub n_group: usize,
    /// … of which the best so many (by the sum of their two best scores) may be chosen from.
    pub topk_group: usize,
    /// Factor on the final weights.
    pub routed_scaling_factor: f32,
}

impl Router {
    /// The plain one: a softmax over all experts, the weights renormalised or not.
    pub const fn softmax(norm_topk_prob: bool) -> Router {
        Router {
            scoring: Scoring::Softmax,
            norm_topk_prob,
            correction_bias: false,
            n_group: 1,
            topk_group: 1,
            routed_scaling_factor: 1.0,
        }
    }
}

/// Logits to scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scoring {
    /// Over all experts.
    Softmax,
    /// Each expert apart.
    Sigmoid,
}

/// Expert capacity: at most `ceil(factor * K * n / E)` of a sequence's `n` tokens go to one expert.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Capacity {
    /// 1.0 is a perfectly balanced load.
    pub factor: f32,
    /// Which tokens lose their place.
    pub policy: DropPolicy,
}

/// Which tokens lose their place at a full expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DropPolicy {
    /// The lowest gate first.
    Probs,
    /// The latest position first.
    Position,
}
