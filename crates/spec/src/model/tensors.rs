//! The tensors of a checkpoint: what each is, how it is called on disk, and its shape.
//!
//! D hidden, V vocabulary, F intermediate, E experts, H query heads, G key/value heads, d head width. Matrices are
//! `[out, in]`, as torch's `Linear` keeps them.

use super::{Activation, Attention, Family, Ffn, ModelSpec, QkNorm};
use crate::DType;

/// What a tensor is. The number is the layer, from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    /// Token embedding `[V, D]`.
    Embed,
    /// Norm before the head `[D]`.
    FinalNorm,
    /// Head `[V, D]`; not in the checkpoint when it is the embedding.
    LmHead,
    /// Norm before attention `[D]`.
    InputNorm(usize),
    /// Norm before the feed-forward half `[D]`.
    PostAttentionNorm(usize),
    /// Query projection `[H*d, D]`; also MLA's without low rank.
    Q(usize),
    /// Key projection `[G*d, D]`.
    K(usize),
    /// Value projection `[G*d, D]`.
    V(usize),
    /// Output projection `[D, H*d]`.
    O(usize),
    /// `[H*d]`
    QBias(usize),
    /// `[G*d]`
    KBias(usize),
    /// `[G*d]`
    VBias(usize),
    /// `[D]`
    OBias(usize),
    /// Query norm, `[d]` or `[H*d]` (see [`QkNorm`]).
    QNorm(usize),
    /// Key norm, `[d]` or `[G*d]`.
    KNorm(usize),
    /// MLA: down to the query latent `[q_lora_rank, D]`.
    QA(usize),
    /// MLA: norm of the query latent `[q_lora_rank]`.
    QANorm(usize),
    /// MLA: up from the query latent `[H*(nope+rope), q_lora_rank]`, each head's position-free part first.
    QB(usize),
    /// MLA: down to the key/value latent and the shared rotary key `[kv_lora_rank + rope, D]`.
    KvA(usize),
    /// MLA: norm of the key/value latent `[kv_lora_rank]`.
    KvANorm(usize),
    /// MLA: up from the key/value latent `[H*(nope+v), kv_lora_rank]`, each head's key part first.
    KvB(usize),
    /// Router `[E, D]`.
    Router(usize),
    /// Bias that is added to the scores for choosing `[E]`.
    RouterBias(usize),
    /// One matrix of one routed expert.
    Expert {
        /// Layer, from 0.
        layer: usize,
        /// Expert, from 0.
        expert: usize,
        /// Which matrix.
        proj: Proj,
    },
    /// One matrix of the shared expert.
    Shared(usize, Proj),
    /// One matrix of a dense layer's MLP.
    Dense(usize, Proj),
}

impl Role {
    /// The layer that the tensor belongs to.
    pub const fn layer(self) -> Option<usize> {
        match self {
            Role::Embed | Role::FinalNorm | Role::LmHead => None,
            Role::InputNorm(layer)
            | Role::PostAttentionNorm(layer)
            | Role::Q(layer)
            | Role::K(layer)
            | Role::V(layer)
            | Role::O(layer)
            | Role::QBias(layer)
            | Role::KBias(layer)
            | Role::VBias(layer)
            | Role::OBias(layer)
            | Role::QNorm(layer)
            | Role::KNorm(layer)
            | Role::QA(layer)
            | Role::QANorm(layer)
            | Role::QB(layer)
            | Role::KvA(layer)
            | Role::KvANorm(layer)
            | Role::KvB(layer)
            | Role::Router(layer)
            | Role::RouterBias(layer)
            | Role::Expert { layer, .. }
            | Role::Shared(layer, _)
            | Role::Dense(layer, _) => Some(layer),
        }
    }
}

/// Which matrix of an MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Proj {
    /// `[F, D]`, through the non-linearity; a GELU MLP has none.
    Gate,
    /// `[F, D]`
    Up,
    /// `[D, F]`
    Down,
}

/// Which tensor of a layer whose experts are stored as one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FusedProj {
    /// `[E, 2F, D]`, all gate rows of an expert before its up rows; `[E, F, D]` for GELU, which has no gate.
    GateUp,
    /// `[E, D, F]`
    Down,
}

/// Which element type a tensor has in a checkpoint as its authors publish it, and as we write it. A reader should
/// take any floating-point type instead: transformers saves the router's bias in the type of the model, for one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DTypeClass {
    /// The model's type; FP8 with a scale per block in an FP8 checkpoint.
    Matrix,
    /// Embedding, head and router: as `Matrix`, but never FP8 (BF16 instead).
    Plain,
    /// Weights of norms and biases of projections: never FP8.
    Norm,
    /// The router's correction bias: F32.
    RouterBias,
}

/// The `weight_scale_inv` that belongs to an FP8 matrix: F32, `[ceil(rows / block), ceil(cols / block)]`; a value is
/// the FP8 number times its block's scale.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScaleInv {
    /// Name on disk.
    pub name: String,
    /// One per block.
    pub shape: Vec<usize>,
}

/// A tensor that the checkpoint must hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Name on disk, one expert a tensor (see [`ModelSpec::fused_expert_name`] for the other spelling).
    pub name: String,
    /// Elements along each dim.
    pub shape: Vec<usize>,
    /// Decides the element type.
    pub dtype_class: DTypeClass,
    /// What it is.
    pub role: Role,
    /// For a matrix of an FP8 checkpoint.
    pub scale: Option<ScaleInv>,
}

impl TensorSpec {
    /// Elements, without the scale's.
    pub fn num_elements(&self) -> u64 {
        self.shape.iter().map(|&n| n as u64).product()
    }
}

/// Ending of a scale's name, after its matrix's.
const SCALE_SUFFIX: &str = "_scale_inv";

impl ModelSpec {
    /// Everything that the checkpoint must hold, in layer order, experts apart.
    pub fn tensors(&self) -> Vec<TensorSpec> {
        let mut tensors = Vec::new();
        self.each_tensor(|role, dtype_class, shape| {
            let name = self.name_of(role);
            let scale = self
                .scale_shape(dtype_class, shape)
                .map(|shape| ScaleInv { name: self.scale_name(&name), shape: shape.to_vec() });
            tensors.push(TensorSpec { name, shape: shape.to_vec(), dtype_class, role, scale });
        });
        tensors
    }

    /// The element type of a tensor in the checkpoint.
    pub fn dtype_of(&self, class: DTypeClass) -> DType {
        match class {
            DTypeClass::Matrix => self.dtype,
            DTypeClass::Plain | DTypeClass::Norm if self.dtype == DType::F8E4M3 => DType::BF16,
            DTypeClass::Plain | DTypeClass::Norm => self.dtype,
            DTypeClass::RouterBias => DType::F32,
        }
    }

    /// Blocks of a matrix's scales, for FP8 checkpoints. The shape may have a leading dim of experts.
    pub(crate) fn scale_shape(&self, class: DTypeClass, shape: &[usize]) -> Option<[usize; 2]> {
        let [rows, cols] = self.fp8_block.filter(|_| class == DTypeClass::Matrix)?;
        match *shape {
            [n, k] => Some([n.div_ceil(rows), k.div_ceil(cols)]),
            _ => None,
        }
    }

    /// Name of the scale that belongs to the FP8 matrix `name`, fused or not.
    pub fn scale_name(&self, name: &str) -> String {
        format!("{name}{SCALE_SUFFIX}")
    }

    /// Visits role, class and shape of every tensor without spelling its name.
    pub(crate) fn each_tensor(&self, mut visit: impl FnMut(Role, DTypeClass, &[usize])) {
        use DTypeClass::{Matrix, Norm, Plain, RouterBias};
        let d = self.hidden_size;
        visit(Role::Embed, Plain, &[self.vocab_size, d]);
        for (l, ffn) in self.layers.iter().enumerate() {
            visit(Role::InputNorm(l), Norm, &[d]);
            self.each_attention_tensor(l, &mut visit);
            visit(Role::PostAttentionNorm(l), Norm, &[d]);
            match ffn {
                Ffn::Dense(mlp) => {
                    for &proj in mlp.activation.projs() {
                        visit(Role::Dense(l, proj), Matrix, &proj.shape(d, mlp.intermediate_size));
                    }
                }
                Ffn::Moe(moe) => {
                    visit(Role::Router(l), Plain, &[moe.num_experts, d]);
                    if moe.router.correction_bias {
                        visit(Role::RouterBias(l), RouterBias, &[moe.num_experts]);
                    }
                    for expert in 0..moe.num_experts {
                        for &proj in moe.activation.projs() {
                            let shape = proj.shape(d, moe.intermediate_size);
                            visit(Role::Expert { layer: l, expert, proj }, Matrix, &shape);
                        }
                    }
                    if moe.shared_intermediate_size > 0 {
                        for &proj in moe.activation.projs() {
                            visit(Role::Shared(l, proj), Matrix, &proj.shape(d, moe.shared_intermediate_size));
                        }
                    }
                }
            }
        }
        visit(Role::FinalNorm, Norm, &[d]);
        if !self.tie_word_embeddings {
            visit(Role::LmHead, Plain, &[self.vocab_size, d]);
        }
    }

    fn each_attention_tensor(&self, l: usize, visit: &mut impl FnMut(Role, DTypeClass, &[usize])) {
        use DTypeClass::{Matrix, Norm};
        let d = self.hidden_size;
        match &self.attention {
            Attention::Gqa(gqa) => {
                let q = gqa.num_heads * gqa.head_dim;
                let kv = gqa.num_kv_heads * gqa.head_dim;
                visit(Role::Q(l), Matrix, &[q, d]);
                visit(Role::K(l), Matrix, &[kv, d]);
                visit(Role::V(l), Matrix, &[kv, d]);
                visit(Role::O(l), Matrix, &[d, q]);
                if gqa.bias {
                    visit(Role::QBias(l), Norm, &[q]);
                    visit(Role::KBias(l), Norm, &[kv]);
                    visit(Role::VBias(l), Norm, &[kv]);
                    visit(Role::OBias(l), Norm, &[d]);
                }
                let norms = match gqa.qk_norm {
                    QkNorm::None => None,
                    QkNorm::PerHead => Some((gqa.head_dim, gqa.head_dim)),
                    QkNorm::FullWidth => Some((q, kv)),
                };
                if let Some((q_norm, k_norm)) = norms {
                    visit(Role::QNorm(l), Norm, &[q_norm]);
                    visit(Role::KNorm(l), Norm, &[k_norm]);
                }
            }
            Attention::Mla(mla) => {
                let q = mla.num_heads * mla.qk_head_dim();
                match mla.q_lora_rank {
                    None => visit(Role::Q(l), Matrix, &[q, d]),
                    Some(rank) => {
                        visit(Role::QA(l), Matrix, &[rank, d]);
                        visit(Role::QANorm(l), Norm, &[rank]);
                        visit(Role::QB(l), Matrix, &[q, rank]);
                    }
                }
                let up = mla.num_heads * (mla.qk_nope_head_dim + mla.v_head_dim);
                visit(Role::KvA(l), Matrix, &[mla.kv_lora_rank + mla.qk_rope_head_dim, d]);
                visit(Role::KvANorm(l), Norm, &[mla.kv_lora_rank]);
                visit(Role::KvB(l), Matrix, &[up, mla.kv_lora_rank]);
                visit(Role::O(l), Matrix, &[d, mla.num_heads * mla.v_head_dim]);
            }
        }
    }

    /// The name of a tensor on disk, as published checkpoints spell it (one tensor an expert).
    pub fn name_of(&self, role: Role) -> String {
        let attention = |l: usize, rest: &str| format!("model.layers.{l}.self_attn.{rest}");
        match role {
            Role::Embed => "model.embed_tokens.weight".to_owned(),
            Role::FinalNorm => "model.norm.weight".to_owned(),
            Role::LmHead => "lm_head.weight".to_owned(),
            Role::InputNorm(l) => format!("model.layers.{l}.input_layernorm.weight"),
            Role::PostAttentionNorm(l) => format!("model.layers.{l}.post_attention_layernorm.weight"),
            Role::Q(l) => attention(l, "q_proj.weight"),
            Role::K(l) => attention(l, "k_proj.weight"),
            Role::V(l) => attention(l, "v_proj.weight"),
            Role::O(l) => attention(l, "o_proj.weight"),
            Role::QBias(l) => attention(l, "q_proj.bias"),
            Role::KBias(l) => attention(l, "k_proj.bias"),
            Role::VBias(l) => attention(l, "v_proj.bias"),
            Role::OBias(l) => attention(l, "o_proj.bias"),
            Role::QNorm(l) => attention(l, "q_norm.weight"),
            Role::KNorm(l) => attention(l, "k_norm.weight"),
            Role::QA(l) => attention(l, "q_a_proj.weight"),
            Role::QANorm(l) => attention(l, "q_a_layernorm.weight"),
            Role::QB(l) => attention(l, "q_b_proj.weight"),
            Role::KvA(l) => attention(l, "kv_a_proj_with_mqa.weight"),
            Role::KvANorm(l) => attention(l, "kv_a_layernorm.weight"),
            Role::KvB(l) => attention(l, "kv_b_proj.weight"),
            Role::Router(l) => format!("model.layers.{l}.{}.gate.weight", self.moe_block()),
            Role::RouterBias(l) => format!("model.layers.{l}.{}.gate.e_score_correction_bias", self.moe_block()),
            Role::Expert { layer, expert, proj } => {
                let block = self.moe_block();
                let proj = if self.family == Family::Mixtral { proj.mixtral_name() } else { proj.name() };
                format!("model.layers.{layer}.{block}.experts.{expert}.{proj}.weight")
            }
            Role::Shared(l, proj) => format!("model.layers.{l}.mlp.shared_experts.{}.weight", proj.name()),
            Role::Dense(l, proj) => format!("model.layers.{l}.mlp.{}.weight", proj.name()),
        }
    }

    /// A second name under which the same tensor, in the same shape, may be found: transformers 5 calls Mixtral's
    /// MoE block `mlp`, as all the others do.
    pub fn alias_of(&self, role: Role) -> Option<String> {
        match (self.family, role) {
            (Family::Mixtral, Role::Router(l)) => Some(format!("model.layers.{l}.mlp.gate.weight")),
            _ => None,
        }
    }

    /// The name of a layer's experts where they are stored as one tensor (the modules of transformers 5); it has no
    /// `.weight` at its end. For shapes see [`FusedProj`]; FP8 scales of such a tensor are `[E, rows, cols]` of blocks.
    pub fn fused_expert_name(&self, layer: usize, proj: FusedProj) -> String {
        let activation = self.layers.get(layer).and_then(Ffn::as_moe).map(|moe| moe.activation);
        let name = match (proj, activation) {
            (FusedProj::GateUp, Some(Activation::Gelu)) => "up_proj",
            (FusedProj::GateUp, _) => "gate_up_proj",
            (FusedProj::Down, _) => "down_proj",
        };
        format!("model.layers.{layer}.mlp.experts.{name}")
    }

    /// The shape of a layer's experts where they are stored as one tensor; nothing for a dense layer.
    pub fn fused_expert_shape(&self, layer: usize, proj: FusedProj) -> Option<[usize; 3]> {
        let moe = self.layers.get(layer)?.as_moe()?;
        let (e, d, f) = (moe.num_experts, self.hidden_size, moe.intermediate_size);
        Some(match (proj, moe.activation) {
            (FusedProj::GateUp, Activation::SwiGlu) => [e, 2 * f, d],
            (FusedProj::GateUp, Activation::Gelu) => [e, f, d],
            (FusedProj::Down, _) => [e, d, f],
        })
    }

    /// Whether a tensor that [`ModelSpec::tensors`] does not list may be in the checkpoint all the same, and is
    /// skipped: frequencies that old versions saved, the head of a model whose head is its embedding, and the layers
    /// for multi-token prediction after the last.
    pub fn is_ignorable(&self, name: &str) -> bool {
        if name.ends_with(".rotary_emb.inv_freq") || (self.tie_word_embeddings && name == "lm_head.weight") {
            return true;
        }
        let layer = name
            .strip_prefix("model.layers.")
            .and_then(|rest| rest.split_once('.'))
            .filter(|(layer, _)| layer.bytes().all(|b| b.is_ascii_digit()))
            .and_then(|(layer, _)| layer.parse::<usize>().ok());
        let mtp_layers = self.layers.len()..self.layers.len() + self.num_mtp_layers;
        layer.is_some_and(|layer| mtp_layers.contains(&layer))
    }

    /// The module that holds router and experts.
    fn moe_block(&self) -> &'static str {
        if self.family == Family::Mixtral { "block_sparse_moe" } else { "mlp" }
    }
}

impl Activation {
    /// The matrices of an MLP with this non-linearity.
    pub const fn projs(self) -> &'static [Proj] {
        match self {
            Activation::SwiGlu => &[Proj::Gate, Proj::Up, Proj::Down],
            Activation::Gelu => &[Proj::Up, Proj::Down],
        }
    }
}

impl Proj {
    /// `[out, in]` for a residual of `hidden` and an MLP of `intermediate`.
    pub const fn shape(self, hidden: usize, intermediate: usize) -> [usize; 2] {
        match self {
            Proj::Gate | Proj::Up => [intermediate, hidden],
            Proj::Down => [hidden, intermediate],
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Proj::Gate => "gate_proj",
            Proj::Up => "up_proj",
            Proj::Down => "down_proj",
        }
    }

    const fn mixtral_name(self) -> &'static str {
        match self {
            Proj::Gate => "w1",
            Proj::Up => "w3",
            Proj::Down => "w2",
        }
    }
}
