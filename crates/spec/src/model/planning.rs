//! What can be priced but not run: how each layer attends, and how weights are stored.
//!
//! A family that has something the runtime lacks is read all the same, into the closest shape that the runtime has
//! ([`ModelSpec`]) and what changes its cost beside that ([`PlanningOnly`]). So it can be counted, laid out and traced on
//! `Meta`, and whoever wants to run it gets [`ModelSpec::require_runnable`]'s sentence.

use std::fmt;

use serde::Serialize;

use super::tensors::{DTypeClass, Role};
use super::{Attention, ModelSpec};
use crate::{DType, SpecError};

/// What a model has that is priced but not run.
#[derive(Clone, Debug, PartialEq)]
pub struct PlanningOnly {
    /// What the runtime lacks, as the end of "… cannot be run yet: it has …".
    pub reason: String,
    /// How each layer attends, in order; as many as the model has layers.
    pub attention: Vec<LayerAttention>,
    /// A gate as wide as the queries comes out of the query projection and multiplies attention's output.
    pub output_gate: bool,
    /// How matrices are stored.
    pub formats: WeightFormats,
}

/// How one layer attends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LayerAttention {
    /// To all tokens before.
    Full,
    /// To so many last tokens, itself included.
    Window(usize),
    /// To the best tokens, which an indexer chooses among all (DeepSeek-V3.2).
    Sparse(Indexer),
    /// To a state of fixed size instead of tokens (gated delta net).
    Linear(LinearAttention),
}

/// The lightning indexer of DeepSeek Sparse Attention (DeepSeek-V3.2, section 2.1): scores every token with small heads
/// that share one key, so that attention only looks at the best.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Indexer {
    /// Tokens that attention looks at.
    pub top_k: usize,
    /// Heads that score.
    pub num_heads: usize,
    /// Width of a head, and values that a token leaves in the indexer's cache.
    pub head_dim: usize,
}

/// Gated delta net (arXiv 2412.06464), as in Qwen3-Next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinearAttention {
    /// Heads of queries and keys.
    pub num_key_heads: usize,
    /// Heads of values.
    pub num_value_heads: usize,
    /// Width of a query or key.
    pub key_head_dim: usize,
    /// Width of a value.
    pub value_head_dim: usize,
    /// Tokens that the convolution before it sees.
    pub conv_kernel: usize,
}

/// How the matrices of a checkpoint are stored. Embedding, head, router and norms are not among them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct WeightFormats {
    /// Attention, dense MLPs and shared experts.
    pub dense: WeightFormat,
    /// Routed experts.
    pub experts: WeightFormat,
}

/// How a matrix is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum WeightFormat {
    /// F32.
    F32,
    /// BF16 or F16.
    Bf16,
    /// FP8 E4M3 with one scale.
    Fp8,
    /// FP8 E4M3 with an F32 scale for each block of 128 × 128.
    Fp8Block,
    /// FP4 E2M1 with an E8M0 scale for each 32 values (OCP MX).
    Mxfp4,
    /// FP4 E2M1 with an E4M3 scale for each 16 values (NVIDIA).
    Nvfp4,
    /// 4-bit integers with a BF16 scale for each 32 values; arithmetic is BF16.
    Int4,
}

impl WeightFormat {
    /// Every format with its name in files.
    pub const ALL: [(&str, WeightFormat); 7] = [
        ("f32", WeightFormat::F32),
        ("bf16", WeightFormat::Bf16),
        ("fp8", WeightFormat::Fp8),
        ("fp8_block", WeightFormat::Fp8Block),
        ("mxfp4", WeightFormat::Mxfp4),
        ("nvfp4", WeightFormat::Nvfp4),
        ("int4", WeightFormat::Int4),
    ];

    /// Bits of a weight, its share of the scales included.
    pub fn bits(self) -> f64 {
        match self {
            WeightFormat::F32 => 32.0,
            WeightFormat::Bf16 => 16.0,
            WeightFormat::Fp8 => 8.0,
            WeightFormat::Fp8Block => 8.0 + 32.0 / (128.0 * 128.0),
            WeightFormat::Mxfp4 => 4.0 + 8.0 / 32.0,
            WeightFormat::Nvfp4 => 4.0 + 8.0 / 16.0,
            WeightFormat::Int4 => 4.0 + 16.0 / 32.0,
        }
    }
}

impl fmt::Display for WeightFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = WeightFormat::ALL.iter().find(|(_, format)| format == self).expect("all are there").0;
        f.write_str(name)
    }
}

impl WeightFormats {
    /// The same for all matrices.
    pub const fn uniform(format: WeightFormat) -> WeightFormats {
        WeightFormats { dense: format, experts: format }
    }

    /// The closest that the runtime loads: FP8 in blocks where all matrices are FP8, F32, else BF16.
    fn closest(self) -> (DType, Option<[usize; 2]>) {
        let fp8 = |format| matches!(format, WeightFormat::Fp8 | WeightFormat::Fp8Block);
        match self {
            WeightFormats { dense, experts } if fp8(dense) && fp8(experts) => (DType::F8E4M3, Some([128, 128])),
            WeightFormats { dense: WeightFormat::F32, .. } => (DType::F32, None),
            _ => (DType::BF16, None),
        }
    }
}

impl Indexer {
    /// Parameters of one layer's indexer: queries out of the query latent, one key, a weight for each head.
    pub fn params(&self, hidden_size: usize, q_lora_rank: usize) -> u64 {
        let query = self.num_heads * self.head_dim * q_lora_rank;
        (query + self.head_dim * hidden_size + self.num_heads * hidden_size) as u64
    }
}

impl LinearAttention {
    /// Width of all queries, or of all keys.
    pub fn keys(&self) -> usize {
        self.num_key_heads * self.key_head_dim
    }

    /// Width of all values.
    pub fn values(&self) -> usize {
        self.num_value_heads * self.value_head_dim
    }

    /// Parameters of one layer: projections to queries, keys, values and their gate; two numbers for each value head; the
    /// convolution; the norm; and the projection back.
    pub fn params(&self, hidden_size: usize) -> u64 {
        let (keys, values) = (self.keys(), self.values());
        let projections = hidden_size * (2 * keys + 2 * values + 2 * self.num_value_heads) + values * hidden_size;
        (projections + (2 * keys + values) * self.conv_kernel + 2 * self.num_value_heads + self.value_head_dim) as u64
    }

    /// Bytes that one layer keeps of a sequence, whatever its length: an F32 matrix for each value head, and the last tokens
    /// of the convolution in BF16.
    pub fn state_bytes(&self) -> u64 {
        let state = 4 * self.num_value_heads * self.key_head_dim * self.value_head_dim;
        (state + 2 * (2 * self.keys() + self.values()) * (self.conv_kernel - 1)) as u64
    }

    /// FLOPs of one token beside the projections: read the state with the key, decay it, add to it, read it with the query.
    pub fn state_flops(&self) -> f64 {
        7.0 * (self.num_value_heads * self.key_head_dim * self.value_head_dim) as f64
    }
}

impl ModelSpec {
    /// How a layer attends.
    ///
    /// # Panics
    /// When the model has no such layer.
    pub fn layer_attention(&self, layer: usize) -> LayerAttention {
        assert!(layer < self.layers.len(), "layer {layer} of {}", self.layers.len());
        match (&self.planning_only, &self.attention) {
            (Some(planning), _) => planning.attention[layer],
            (None, Attention::Gqa(gqa)) => gqa.sliding_window.map_or(LayerAttention::Full, LayerAttention::Window),
            (None, Attention::Mla(_)) => LayerAttention::Full,
        }
    }

    /// How matrices are stored.
    pub fn formats(&self) -> WeightFormats {
        match (&self.planning_only, self.dtype) {
            (Some(planning), _) => planning.formats,
            (None, DType::F8E4M3) => WeightFormats::uniform(WeightFormat::Fp8Block),
            (None, DType::F32) => WeightFormats::uniform(WeightFormat::F32),
            (None, _) => WeightFormats::uniform(WeightFormat::Bf16),
        }
    }

    /// The same model with its matrices stored otherwise, to be planned.
    pub fn with_formats(self, formats: WeightFormats) -> ModelSpec {
        if formats == self.formats() {
            return self;
        }
        let (dtype, fp8_block) = formats.closest();
        let attention = (0..self.layers.len()).map(|layer| self.layer_attention(layer)).collect();
        let WeightFormats { dense, experts } = formats;
        let planning = match self.planning_only {
            Some(planning) => PlanningOnly { formats, ..planning },
            None => PlanningOnly {
                reason: format!("weights in a format that is not loaded (dense {dense}, experts {experts})"),
                attention,
                output_gate: false,
                formats,
            },
        };
        ModelSpec { dtype, fp8_block, planning_only: Some(planning), ..self }
    }

    /// Refuses a model that can only be planned; what loads or makes weights begins with this.
    ///
    /// # Errors
    /// [`SpecError::PlanningOnly`], with what the runtime lacks.
    pub fn require_runnable(&self) -> Result<(), SpecError> {
        match &self.planning_only {
            None => Ok(()),
            Some(planning) => {
                Err(SpecError::PlanningOnly { model_type: self.family.model_type(), reason: planning.reason.clone() })
            }
        }
    }

    /// Bytes of a tensor, or of a part of it, as the checkpoint stores it, scales included.
    pub fn stored_bytes(&self, role: Role, class: DTypeClass, shape: &[usize]) -> u64 {
        let elements: u64 = shape.iter().map(|&n| n as u64).product();
        if class != DTypeClass::Matrix {
            return elements * self.dtype_of(class).size_bytes() as u64;
        }
        let WeightFormats { dense, experts } = self.formats();
        match if matches!(role, Role::Expert { .. }) { experts } else { dense } {
            WeightFormat::Fp8Block => {
                let scales = self.scale_shape(class, shape).map_or(0, |[n, k]| n as u64 * k as u64);
                elements + scales * DType::F32.size_bytes() as u64
            }
            format => (elements as f64 * format.bits() / 8.0) as u64,
        }
    }

    /// Bytes that one sequence of `context` tokens has in the cache, over all layers.
    pub fn cache_bytes(&self, context: usize) -> u64 {
        let value = self.dtype.compute().size_bytes();
        let token = self.attention.kv_values_per_token() * value;
        let of_layer = |layer| match self.layer_attention(layer) {
            LayerAttention::Full => (token * context) as u64,
            LayerAttention::Window(window) => (token * context.min(window)) as u64,
            LayerAttention::Sparse(indexer) => ((token + indexer.head_dim * value) * context) as u64,
            LayerAttention::Linear(linear) => linear.state_bytes(),
        };
        (0..self.layers.len()).map(of_layer).sum()
    }
}
