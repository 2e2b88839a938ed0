//! One layer's keys and values of grouped-query attention.

use half::bf16;
use moesaic_device::{Arena, DeviceError, Tensor};
use moesaic_spec::{Bytes, DType};

use super::{PagedBatch, Shared, TILE_TOKENS};
use crate::contract::{KernelError, require};

/// Keys and values of one layer, BF16 or F32.
///
/// Both lie in tiles of eight tokens, as the dot-product loops read them, so that nothing is rearranged when they are
/// read:
/// - keys `[block, head, tile, C / 2, 8 tokens, 2]` (F32: `[block, head, tile, C, 8 tokens]`): one load brings the same
///   columns of several tokens; an odd C is padded with a zero;
/// - values `[block, head, tile, 4 pairs of tokens, C, 2]` (F32: `[block, head, tile, 8 tokens, C]`): one load brings
///   neighbouring columns of two tokens.
pub struct PagedKv {
    keys: Tensor,
    values: Tensor,
    shape: KvShape,
}

/// Sizes of a [`PagedKv`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvShape {
    /// Blocks.
    pub num_blocks: usize,
    /// Tokens of a block.
    pub block_size: usize,
    /// G: key and value heads.
    pub num_kv_heads: usize,
    /// C: width of a head.
    pub head_dim: usize,
    /// BF16 or F32.
    pub dtype: DType,
}

impl KvShape {
    /// Columns that a key takes.
    pub(crate) fn key_width(&self) -> usize {
        if self.dtype == DType::BF16 { self.head_dim.next_multiple_of(2) } else { self.head_dim }
    }

    fn key_dims(&self) -> [usize; 4] {
        [self.num_blocks, self.num_kv_heads, self.block_size, self.key_width()]
    }

    fn value_dims(&self) -> [usize; 4] {
        [self.num_blocks, self.num_kv_heads, self.block_size, self.head_dim]
    }

    /// Memory of one layer.
    pub fn bytes(&self) -> Bytes {
        let elements = self.key_dims().iter().product::<usize>() + self.value_dims().iter().product::<usize>();
        Bytes((elements * self.dtype.size_bytes()) as u64)
    }

    /// Which tile of all holds token `offset` of `block` of `head`.
    #[inline(always)]
    pub(crate) fn tile_of(&self, block: usize, offset: usize, head: usize) -> usize {
        (block * self.num_kv_heads + head) * (self.block_size / TILE_TOKENS) + offset / TILE_TOKENS
    }

    /// Which tile of all holds `slot` of `head`.
    pub(crate) fn tile(&self, slot: usize, head: usize) -> usize {
        self.tile_of(slot / self.block_size, slot % self.block_size, head)
    }
}

impl PagedKv {
    /// Takes the memory of one layer from `arena` (which may be `Meta`); its content is whatever was there.
    pub fn new(arena: &Arena, shape: KvShape) -> Result<PagedKv, KernelError> {
        const OP: &str = "paged";
        let KvShape { block_size, dtype, .. } = shape;
        let valid = block_size > 0 && block_size.is_multiple_of(TILE_TOKENS);
        let expected = || format!("a positive multiple of {TILE_TOKENS}");
        require(valid, OP, "block_size", expected, || block_size.to_string())?;
        let valid = matches!(dtype, DType::BF16 | DType::F32);
        require(valid, OP, "dtype", || "BF16 or F32".into(), || dtype.to_string())?;
        let tensor = |dims: [usize; 4]| -> Result<Tensor, DeviceError> { Tensor::empty(arena, &dims, dtype) };
        Ok(PagedKv { keys: tensor(shape.key_dims())?, values: tensor(shape.value_dims())?, shape })
    }

    /// Memory of one layer of `shape`.
    pub fn bytes(shape: KvShape) -> Bytes {
        shape.bytes()
    }

    /// Sizes.
    pub fn shape(&self) -> KvShape {
        self.shape
    }

    /// Refuses a batch with other blocks than these.
    pub(crate) fn check(&self, op: &'static str, batch: &PagedBatch) -> Result<(), KernelError> {
        check_blocks(op, batch, self.shape.num_blocks, self.shape.block_size)
    }

    /// Where keys and values begin, to read.
    pub(crate) fn bases(&self) -> (Shared<u8>, Shared<u8>) {
        (Shared(self.keys.bytes().as_ptr().cast_mut()), Shared(self.values.bytes().as_ptr().cast_mut()))
    }

    /// For tasks that store entries.
    pub(crate) fn writer(&mut self) -> KvWriter {
        KvWriter {
            keys: Shared(self.keys.bytes_mut().as_mut_ptr()),
            values: Shared(self.values.bytes_mut().as_mut_ptr()),
            shape: self.shape,
        }
    }
}

/// The contract between a batch and any paged memory.
pub(super) fn check_blocks(
    op: &'static str,
    batch: &PagedBatch,
    num_blocks: usize,
    block_size: usize,
) -> Result<(), KernelError> {
    let expected = || block_size.to_string();
    require(batch.block_size() == block_size, op, "batch.block_size", expected, || batch.block_size().to_string())?;
    let expected = || format!("blocks below {num_blocks}");
    let got = || format!("block {}", batch.num_blocks() - 1);
    require(batch.num_blocks() <= num_blocks, op, "batch.block_table", expected, got)
}

/// Writes entries. The memory outlives it by the borrow of the op that made it.
#[derive(Clone, Copy)]
pub(crate) struct KvWriter {
    keys: Shared<u8>,
    values: Shared<u8>,
    shape: KvShape,
}

impl KvWriter {
    /// Stores the key `[C]` of one slot and head, in BF16.
    ///
    /// # Safety
    /// As for [`KvWriter::store_bf16`].
    #[inline(always)]
    pub(crate) unsafe fn store_key_bf16(&self, slot: usize, head: usize, key: &[bf16]) {
        let (tile, lane) = (self.shape.tile(slot, head), slot % TILE_TOKENS);
        let width = self.shape.key_width();
        // SAFETY: a tile has 8 * width keys, and the caller says that the tile is inside; only the elements of this slot
        // are touched.
        unsafe {
            let to = self.keys.ptr().cast::<bf16>().add(tile * TILE_TOKENS * width + 2 * lane);
            let pairs = key.chunks_exact(2);
            if let &[last] = pairs.remainder() {
                to.add((width / 2 - 1) * 2 * TILE_TOKENS).cast::<[bf16; 2]>().write([last, bf16::ZERO]);
            }
            for (i, pair) in pairs.enumerate() {
                to.add(i * 2 * TILE_TOKENS).cast::<[bf16; 2]>().write([pair[0], pair[1]]);
            }
        }
    }

    /// Stores the key and the value `[C]` of one slot and head, in BF16.
    ///
    /// # Safety
    /// The memory is alive, the slot and head are inside, and no other task stores or reads this slot and head now.
    #[inline(always)]
    pub(crate) unsafe fn store_bf16(&self, slot: usize, head: usize, key: &[bf16], value: &[bf16]) {
        let (tile, lane, c) = (self.shape.tile(slot, head), slot % TILE_TOKENS, self.shape.head_dim);
        // SAFETY: a tile has 8 * C values, and the caller says that the tile is inside; only the elements of this slot are
        // touched.
        unsafe {
            self.store_key_bf16(slot, head, key);
            let to = self.values.ptr().cast::<bf16>().add(tile * TILE_TOKENS * c + lane / 2 * 2 * c + lane % 2);
            for (i, x) in value.iter().enumerate() {
                to.add(2 * i).write(*x);
            }
        }
    }

    /// Stores the values of two slots that are neighbours, the first one even, of one head: side by side in memory, they
    /// go out as whole vectors. Keys are stored by [`KvWriter::store_key_bf16`].
    ///
    /// # Safety
    /// As for [`KvWriter::store_bf16`], for both slots.
    #[inline(always)]
    pub(crate) unsafe fn store_value_pair_bf16(&self, slot: usize, head: usize, values: [&[bf16]; 2]) {
        debug_assert!(slot.is_multiple_of(2));
        let (tile, lane, c) = (self.shape.tile(slot, head), slot % TILE_TOKENS, self.shape.head_dim);
        // SAFETY: the caller says that the tile, of 8 * C values, is inside; the pair's row has 2 * C, a whole number of
        // pairs from the start on, and nobody else touches them.
        let to = unsafe {
            let to = self.values.ptr().cast::<bf16>().add(tile * TILE_TOKENS * c + lane * c);
            std::slice::from_raw_parts_mut(to, 2 * c)
        };
        for ((to, first), second) in to.chunks_exact_mut(2).zip(values[0]).zip(values[1]) {
            to[0] = *first;
            to[1] = *second;
        }
    }

    /// The same in F32.
    ///
    /// # Safety
    /// As for [`KvWriter::store_bf16`].
    #[inline(always)]
    pub(crate) unsafe fn store_f32(&self, slot: usize, head: usize, key: &[f32], value: &[f32]) {
        let (tile, lane) = (self.shape.tile(slot, head), slot % TILE_TOKENS);
        let c = self.shape.head_dim;
        // SAFETY: as for BF16.
        unsafe {
            let to = self.keys.ptr().cast::<f32>().add(tile * TILE_TOKENS * c + lane);
            for (i, x) in key.iter().enumerate() {
                to.add(i * TILE_TOKENS).write(*x);
            }
            let to = self.values.ptr().cast::<f32>().add(tile * TILE_TOKENS * c + lane * c);
            std::ptr::copy_nonoverlapping(value.as_ptr(), to, value.len());
        }
    }
}

#[cfg(test)]
impl PagedKv {
    /// Fills the memory with NaN.
    pub(crate) fn poison(&mut self) {
        self.keys.bytes_mut().fill(0xff);
        self.values.bytes_mut().fill(0xff);
    }
}
