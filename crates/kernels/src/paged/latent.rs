//! One layer's latents of multi-head latent attention.

use moesaic_device::{Arena, Tensor};
use moesaic_spec::{Bytes, DType};

use super::{PagedBatch, Shared, TILE_TOKENS, kv::check_blocks};
use crate::contract::{KernelError, require};

/// Latents of one layer, BF16 or F32, `[block, token, L + P]`: the normalised latent of `L = kv_lora_rank` values and the
/// rotated key part of `P = qk_rope_head_dim` values that all heads share. Heads are never expanded.
pub struct PagedLatent {
    entries: Tensor,
    shape: LatentShape,
}

/// Sizes of a [`PagedLatent`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LatentShape {
    /// Blocks.
    pub num_blocks: usize,
    /// Tokens of a block.
    pub block_size: usize,
    /// L: rank of the latent.
    pub kv_lora_rank: usize,
    /// P: width of the rotary part; even.
    pub qk_rope_head_dim: usize,
    /// BF16 or F32.
    pub dtype: DType,
}

impl LatentShape {
    /// Values of a token.
    pub fn width(&self) -> usize {
        self.kv_lora_rank + self.qk_rope_head_dim
    }

    /// Memory of one layer.
    pub fn bytes(&self) -> Bytes {
        Bytes((self.num_blocks * self.block_size * self.width() * self.dtype.size_bytes()) as u64)
    }
}

impl PagedLatent {
    /// Takes the memory of one layer from `arena` (which may be `Meta`); its content is whatever was there.
    pub fn new(arena: &Arena, shape: LatentShape) -> Result<PagedLatent, KernelError> {
        const OP: &str = "paged";
        let LatentShape { num_blocks, block_size, dtype, qk_rope_head_dim, .. } = shape;
        let valid = block_size > 0 && block_size.is_multiple_of(TILE_TOKENS);
        let expected = || format!("a positive multiple of {TILE_TOKENS}");
        require(valid, OP, "block_size", expected, || block_size.to_string())?;
        let valid = matches!(dtype, DType::BF16 | DType::F32);
        require(valid, OP, "dtype", || "BF16 or F32".into(), || dtype.to_string())?;
        let even = qk_rope_head_dim.is_multiple_of(2);
        require(even, OP, "qk_rope_head_dim", || "an even number".into(), || qk_rope_head_dim.to_string())?;
        Ok(PagedLatent { entries: Tensor::empty(arena, &[num_blocks, block_size, shape.width()], dtype)?, shape })
    }

    /// Memory of one layer of `shape`.
    pub fn bytes(shape: LatentShape) -> Bytes {
        shape.bytes()
    }

    /// Sizes.
    pub fn shape(&self) -> LatentShape {
        self.shape
    }

    /// Refuses a batch with other blocks than these.
    pub(crate) fn check(&self, op: &'static str, batch: &PagedBatch) -> Result<(), KernelError> {
        check_blocks(op, batch, self.shape.num_blocks, self.shape.block_size)
    }

    /// Where entries begin, to read.
    pub(crate) fn base(&self) -> Shared<u8> {
        Shared(self.entries.bytes().as_ptr().cast_mut())
    }

    /// Where entries begin, to write.
    pub(crate) fn base_mut(&mut self) -> Shared<u8> {
        Shared(self.entries.bytes_mut().as_mut_ptr())
    }
}

#[cfg(test)]
impl PagedLatent {
    /// Fills the memory with NaN.
    pub(crate) fn poison(&mut self) {
        self.entries.bytes_mut().fill(0xff);
    }

    /// All entries.
    pub(crate) fn entries_f32(&self) -> Vec<f32> {
        match self.shape.dtype {
            DType::F32 => self.entries.f32().to_vec(),
            _ => self.entries.bf16().iter().map(|x| x.to_f32()).collect(),
        }
    }
}
