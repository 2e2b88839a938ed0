//! The layers. Letters as in `kernels`: `T` tokens, `D` model width, `H` heads, `G` key/value heads, `C` head width, `E`
//! experts, `A` experts per token, `F` hidden width, `V` vocabulary.

pub mod attention;
pub mod embedding;
pub mod ffn;
pub mod heads;
pub mod mla;
pub mod moe;

pub use attention::{GqaAttention, Projected};
pub use embedding::Embedding;
pub use ffn::FeedForward;
pub use heads::{attention_of, kv_heads_of};
pub use mla::MlaAttention;
pub use moe::MoeLayer;

use moesaic_kernels::paged::PagedBatch;
use moesaic_kernels::rope::RopeTable;
use moesaic_spec::DType;

/// What attention needs to know of a step, besides its input and the cache.
#[derive(Clone, Copy)]
pub struct AttentionStep<'a> {
    /// Which rows belong to which sequence, and where their keys and values are.
    pub batch: &'a PagedBatch,
    /// Angles.
    pub rope: &'a RopeTable,
    /// Type of the result. A part of a sum over ranks is asked for in F32, so that only the sum is rounded.
    pub out_dtype: DType,
}
