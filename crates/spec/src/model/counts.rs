//! What a model costs: parameters, bytes, cache and arithmetic, from the list of its tensors alone.

use serde::Serialize;

use super::planning::LayerAttention;
use super::tensors::{DTypeClass, Role};
use super::{Attention, Ffn, ModelSpec};

/// What a model costs before anything runs.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Counts {
    /// All parameters, FP8 scales and skipped multi-token-prediction layers not counted.
    pub params_total: u64,
    /// Parameters that one token meets, embedding and head included. A tied embedding counts once.
    pub params_active: u64,
    /// Bytes of the checkpoint's tensors, FP8 scales included.
    pub bytes_total: u64,
    /// The same by part; parts that the model lacks are absent.
    pub parts: Vec<Part>,
    /// The cache.
    pub kv: KvCounts,
    /// The forward pass of one token.
    pub flops: FlopsPerToken,
}

/// One part of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Part {
    /// Which.
    pub name: PartName,
    /// Parameters.
    pub params: u64,
    /// Parameters that one token meets.
    pub params_active: u64,
    /// Bytes in the checkpoint, FP8 scales included.
    pub bytes: u64,
}

/// The parts of a model, in the order of the forward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum PartName {
    /// Token embedding; also the head when they are tied.
    Embedding,
    /// Projections of attention, their biases, and the norms on queries, keys and latents.
    Attention,
    /// Routers with their correction biases.
    Router,
    /// Experts that tokens are routed to.
    RoutedExperts,
    /// Experts that every token passes.
    SharedExperts,
    /// MLPs of dense layers.
    DenseMlp,
    /// Norms of the residual stream.
    Norm,
    /// Head, when it is not the embedding.
    Head,
}

impl PartName {
    /// All, in order.
    pub const ALL: [PartName; 8] = [
        PartName::Embedding,
        PartName::Attention,
        PartName::Router,
        PartName::RoutedExperts,
        PartName::SharedExperts,
        PartName::DenseMlp,
        PartName::Norm,
        PartName::Head,
    ];

    /// For people.
    pub fn label(self) -> &'static str {
        match self {
            PartName::Embedding => "embedding",
            PartName::Attention => "attention",
            PartName::Router => "router",
            PartName::RoutedExperts => "routed experts",
            PartName::SharedExperts => "shared experts",
            PartName::DenseMlp => "dense MLPs",
            PartName::Norm => "norms",
            PartName::Head => "head",
        }
    }

    fn of(role: Role) -> PartName {
        match role {
            Role::Embed => PartName::Embedding,
            Role::LmHead => PartName::Head,
            Role::FinalNorm | Role::InputNorm(_) | Role::PostAttentionNorm(_) => PartName::Norm,
            Role::Q(_)
            | Role::K(_)
            | Role::V(_)
            | Role::O(_)
            | Role::QBias(_)
            | Role::KBias(_)
            | Role::VBias(_)
            | Role::OBias(_)
            | Role::QNorm(_)
            | Role::KNorm(_)
            | Role::QA(_)
            | Role::QANorm(_)
            | Role::QB(_)
            | Role::KvA(_)
            | Role::KvANorm(_)
            | Role::KvB(_) => PartName::Attention,
            Role::Router(_) | Role::RouterBias(_) => PartName::Router,
            Role::Expert { .. } => PartName::RoutedExperts,
            Role::Shared(..) => PartName::SharedExperts,
            Role::Dense(..) => PartName::DenseMlp,
        }
    }
}

/// What one token leaves in the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct KvCounts {
    /// Values per layer: keys and values of all key/value heads, or MLA's latent and rotary key.
    pub values_per_token_layer: u64,
    /// Bytes per layer, in the type that activations have.
    pub bytes_per_token_layer: u64,
    /// Bytes over all layers that keep keys and values, and their indexers. Layers with a window keep no more tokens than
    /// that: see [`ModelSpec::cache_bytes`].
    pub bytes_per_token: u64,
    /// Bytes of a sequence over all layers with a state of fixed size.
    pub bytes_per_sequence: u64,
}

/// Floating-point operations of one token's forward pass; a multiply and an add are two. F64, because they outgrow
/// 64 bits for long contexts of large models and nobody reads the last digit.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct FlopsPerToken {
    /// Products with weights: projections, router, chosen and shared experts, head.
    pub linear: f64,
    /// Scores and weighted values over all layers, for each token that is looked at. For MLA with expanded heads, as
    /// in prefill.
    pub attention_per_context_token: f64,
    /// The same for MLA in the latent space, as in decode; for GQA it does not differ.
    pub attention_per_context_token_absorbed: f64,
    /// Tokens that attention looks at at most, in the layers where it does not look at all: the window, or the number that
    /// an indexer chooses.
    pub sliding_window: Option<usize>,
    /// The share of those layers among all that look at tokens.
    pub windowed_share: f64,
    /// An indexer's scores over all layers, for each token of the context.
    pub index_per_context_token: f64,
}

impl FlopsPerToken {
    /// One prompt token that sees `context` tokens, itself included.
    pub fn prefill(&self, context: usize) -> f64 {
        self.linear + self.attention_per_context_token * self.seen(context) + self.indexing(context)
    }

    /// One generated token that sees `context` tokens, itself included. MLA stays in the latent space, where the up
    /// projection of keys and values is applied to the query and the output instead: as many operations as
    /// projecting one token, so `linear` is the same.
    pub fn decode(&self, context: usize) -> f64 {
        self.linear + self.attention_per_context_token_absorbed * self.seen(context) + self.indexing(context)
    }

    /// Tokens that are looked at, in the mean over the layers.
    fn seen(&self, context: usize) -> f64 {
        let windowed = self.sliding_window.map_or(context, |window| window.min(context));
        self.windowed_share * windowed as f64 + (1.0 - self.windowed_share) * context as f64
    }

    fn indexing(&self, context: usize) -> f64 {
        self.index_per_context_token * context as f64
    }
}

impl ModelSpec {
    /// Counts parameters, bytes, cache and arithmetic.
    pub fn counts(&self) -> Counts {
        let mut parts = PartName::ALL.map(|name| Part { name, params: 0, params_active: 0, bytes: 0 });
        let mut linear_params = 0;
        self.each_tensor(|role, class, shape| {
            if role.layer().is_some_and(|layer| self.is_linear(layer)) && PartName::of(role) == PartName::Attention {
                return; // Has other tensors, which `attention_beside` counts.
            }
            let params: u64 = shape.iter().map(|&n| n as u64).product();
            // Which experts a token goes to is not known, but how many: the first top_k stand for the chosen ones.
            let active = match role {
                Role::Expert { layer, expert, .. } => expert < self.top_k(layer),
                _ => true,
            };
            let part = &mut parts[PartName::of(role) as usize];
            part.params += params;
            part.params_active += if active { params } else { 0 };
            part.bytes += self.stored_bytes(role, class, shape);
            // Looking a row up is no product; a tied embedding is one, as the head.
            let is_product = matches!(class, DTypeClass::Matrix | DTypeClass::Plain)
                && (role != Role::Embed || self.tie_word_embeddings);
            linear_params += if active && is_product { params } else { 0 };
        });
        let beside = self.attention_beside();
        if beside > 0 {
            let part = &mut parts[PartName::Attention as usize];
            part.params += beside;
            part.params_active += beside;
            part.bytes += self.stored_bytes(Role::Q(0), DTypeClass::Matrix, &[1, beside as usize]);
            linear_params += beside;
        }
        Counts {
            params_total: parts.iter().map(|part| part.params).sum(),
            params_active: parts.iter().map(|part| part.params_active).sum(),
            bytes_total: parts.iter().map(|part| part.bytes).sum(),
            parts: parts.into_iter().filter(|part| part.params > 0).collect(),
            kv: self.kv_counts(),
            flops: self.flops(linear_params),
        }
    }

    fn top_k(&self, layer: usize) -> usize {
        self.layers[layer].as_moe().map_or(0, |moe| moe.top_k)
    }

    fn is_linear(&self, layer: usize) -> bool {
        matches!(self.layer_attention(layer), LayerAttention::Linear(_))
    }

    /// Parameters of attention that the shape in [`ModelSpec::attention`] does not have: linear attention, indexers, and the
    /// gate on attention's output.
    fn attention_beside(&self) -> u64 {
        let Some(planning) = &self.planning_only else { return 0 };
        let (gate, q_lora_rank) = match &self.attention {
            Attention::Gqa(gqa) => (gqa.num_heads * gqa.head_dim * self.hidden_size, self.hidden_size),
            Attention::Mla(mla) => (0, mla.q_lora_rank.unwrap_or(self.hidden_size)),
        };
        let gate = if planning.output_gate { gate as u64 } else { 0 };
        let of_layer = |attention: &LayerAttention| match attention {
            LayerAttention::Full | LayerAttention::Window(_) => gate,
            LayerAttention::Sparse(indexer) => gate + indexer.params(self.hidden_size, q_lora_rank),
            LayerAttention::Linear(linear) => linear.params(self.hidden_size),
        };
        planning.attention.iter().map(of_layer).sum()
    }

    fn kv_counts(&self) -> KvCounts {
        let values = self.attention.kv_values_per_token() as u64;
        let value_bytes = self.dtype.compute().size_bytes() as u64;
        let mut kv = KvCounts {
            values_per_token_layer: values,
            bytes_per_token_layer: values * value_bytes,
            bytes_per_token: 0,
            bytes_per_sequence: 0,
        };
        for layer in 0..self.layers.len() {
            match self.layer_attention(layer) {
                LayerAttention::Full | LayerAttention::Window(_) => kv.bytes_per_token += kv.bytes_per_token_layer,
                LayerAttention::Sparse(indexer) => {
                    kv.bytes_per_token += kv.bytes_per_token_layer + indexer.head_dim as u64 * value_bytes;
                }
                LayerAttention::Linear(linear) => kv.bytes_per_sequence += linear.state_bytes(),
            }
        }
        kv
    }

    fn flops(&self, linear_params: u64) -> FlopsPerToken {
        // Values multiplied and added for one head and one token that is looked at: with the key, then with the value.
        let (heads, expanded, absorbed) = match &self.attention {
            Attention::Gqa(gqa) => (gqa.num_heads, 2 * gqa.head_dim, 2 * gqa.head_dim),
            Attention::Mla(mla) => {
                let expanded = mla.qk_head_dim() + mla.v_head_dim;
                let absorbed = 2 * mla.kv_lora_rank + mla.qk_rope_head_dim;
                (mla.num_heads, expanded, absorbed)
            }
        };
        let (mut full, mut windowed, mut sliding_window) = (0, 0, None);
        let (mut linear, mut index_per_context_token) = (2.0 * linear_params as f64, 0.0);
        for layer in 0..self.layers.len() {
            match self.layer_attention(layer) {
                LayerAttention::Full => full += 1,
                LayerAttention::Window(window) => (windowed, sliding_window) = (windowed + 1, Some(window)),
                LayerAttention::Sparse(indexer) => {
                    (windowed, sliding_window) = (windowed + 1, Some(indexer.top_k));
                    index_per_context_token += 2.0 * (indexer.num_heads * indexer.head_dim) as f64;
                }
                LayerAttention::Linear(attention) => linear += attention.state_flops(),
            }
        }
        let all_heads = 2.0 * (full + windowed) as f64 * heads as f64;
        FlopsPerToken {
            linear,
            attention_per_context_token: all_heads * expanded as f64,
            attention_per_context_token_absorbed: all_heads * absorbed as f64,
            sliding_window,
            windowed_share: windowed as f64 / f64::max((full + windowed) as f64, 1.0),
            index_per_context_token,
        }
    }

    /// Layers with routed experts.
    pub fn num_moe_layers(&self) -> usize {
        self.layers.iter().filter(|ffn| matches!(ffn, Ffn::Moe(_))).count()
    }
}
