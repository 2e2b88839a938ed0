//! The paged key/value cache of all layers.

use moesaic_device::Arena;
use moesaic_kernels::paged::{KvShape, LatentShape, PagedKv, PagedLatent};
use moesaic_spec::{Attention, Bytes, DType};

use crate::{ModelError, Transformer};

/// One layer's pages.
pub enum LayerCache {
    /// Keys and values of each key/value head.
    Gqa(PagedKv),
    /// MLA's latent and the shared rotary key.
    Mla(PagedLatent),
}

/// Pages of all layers; page `b` of every layer belongs to the same sequence.
pub struct KvCache {
    /// In layer order.
    pub layers: Vec<LayerCache>,
    /// Tokens a page.
    pub block_size: usize,
    /// Pages.
    pub num_blocks: usize,
}

impl KvCache {
    /// Takes the memory of `num_blocks` pages in each of `num_layers` layers. `attention` has the heads that are here
    /// ([`attention_of`](crate::layers::attention_of)).
    pub fn new(
        arena: &Arena,
        attention: &Attention,
        num_layers: usize,
        dtype: DType,
        num_blocks: usize,
        block_size: usize,
    ) -> Result<KvCache, ModelError> {
        let layer = || {
            Ok(match attention {
                Attention::Gqa(gqa) => LayerCache::Gqa(PagedKv::new(
                    arena,
                    KvShape { num_blocks, block_size, num_kv_heads: gqa.num_kv_heads, head_dim: gqa.head_dim, dtype },
                )?),
                Attention::Mla(mla) => LayerCache::Mla(PagedLatent::new(
                    arena,
                    LatentShape {
                        num_blocks,
                        block_size,
                        kv_lora_rank: mla.kv_lora_rank,
                        qk_rope_head_dim: mla.qk_rope_head_dim,
                        dtype,
                    },
                )?),
            })
        };
        let layers = (0..num_layers).map(|_| layer()).collect::<Result<_, ModelError>>()?;
        Ok(KvCache { layers, block_size, num_blocks })
    }

    /// The same for the heads and layers of a rank.
    pub fn of_rank(
        arena: &Arena,
        transformer: &Transformer,
        num_blocks: usize,
        block_size: usize,
    ) -> Result<KvCache, ModelError> {
        let (attention, num_layers) = transformer.cached();
        KvCache::new(arena, &attention, num_layers, transformer.compute_dtype(), num_blocks, block_size)
    }

    /// Memory of one page in all layers of a rank.
    pub fn rank_block_bytes(transformer: &Transformer, block_size: usize) -> Result<Bytes, ModelError> {
        let (attention, num_layers) = transformer.cached();
        KvCache::block_bytes(&attention, num_layers, transformer.compute_dtype(), block_size)
    }

    /// Memory of one page in all layers, found by asking for it on `Meta`.
    pub fn block_bytes(
        attention: &Attention,
        num_layers: usize,
        dtype: DType,
        block_size: usize,
    ) -> Result<Bytes, ModelError> {
        // Two pages less one: what allocations round up at their ends is not counted for every page.
        let of = |num_blocks| {
            let arena = Arena::meta("kv");
            KvCache::new(&arena, attention, num_layers, dtype, num_blocks, block_size).map(|_cache| arena.peak().0)
        };
        Ok(Bytes(of(65)?.saturating_sub(of(1)?) / 64))
    }
}
