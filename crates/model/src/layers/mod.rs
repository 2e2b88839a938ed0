//! The layers. Letters as in `kernels`: `T` tokens, `D` model width, `H` heads, `G` key/value heads, `C` head width, `E`
//! experts, `A` experts per token, `F` hidden width, `V` vocabulary.

pub mod attention;
pub mod embedding;
pub mod ffn;
pub mod mla;
pub mod moe;

pub use attention::GqaAttention;
pub use embedding::Embedding;
pub use ffn::FeedForward;
pub use mla::MlaAttention;
pub use moe::MoeLayer;
