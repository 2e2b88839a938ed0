//! The blocks of the paged KV cache: who holds them, which are free, which may be evicted.
//!
//! A block is in one of three states: *used* (somebody refers to it), *evictable* (nobody does, but it holds the KV of
//! a known prefix), *free*. Only a full block whose KV is computed enters the prefix tree, and from then on it is never
//! written, so whatever is shared is read only.

use std::collections::BTreeMap;

use crate::prefix_tree::{Prefix, PrefixTree};
use crate::sequence::Sequence;

/// Names a block of the KV cache: `0..num_blocks`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockId(pub u32);

impl BlockId {
    pub(crate) fn idx(self) -> usize {
        self.0 as usize
    }
}

#[derive(Debug, Clone, Copy, Default)]
struct BlockState {
    /// Block tables that name it.
    num_refs: usize,
    /// When the last of them let go, counted in releases: its key in `evictable`.
    released_at: u64,
}

#[derive(Debug)]
pub(crate) struct BlockManager {
    block_size: usize,
    enable_prefix_caching: bool,
    blocks: Vec<BlockState>, // [num_blocks]
    /// A stack: the block freed last is used first, while it may still be in a cache.
    free: Vec<BlockId>,
    /// Least recently released first. Whoever holds a block holds all blocks before it and lets go of it before them, so
    /// this order meets a block only after everything that follows it in the tree: evicting always takes a leaf.
    evictable: BTreeMap<u64, BlockId>,
    num_releases: u64,
    tree: PrefixTree,
}

impl BlockManager {
    pub(crate) fn new(num_blocks: usize, block_size: usize, enable_prefix_caching: bool) -> Self {
        let last = u32::try_from(num_blocks).expect("the config was validated");
        Self {
            block_size,
            enable_prefix_caching,
            blocks: vec![BlockState::default(); num_blocks],
            free: (0..last).rev().map(BlockId).collect(),
            evictable: BTreeMap::new(),
            num_releases: 0,
            tree: PrefixTree::new(num_blocks),
        }
    }

    /// Blocks that this many tokens take.
    pub(crate) fn blocks_for(&self, num_tokens: usize) -> usize {
        num_tokens.div_ceil(self.block_size)
    }

    /// Blocks that can be had: free ones, and evictable ones at the price of what they remember.
    pub(crate) fn num_available(&self) -> usize {
        self.free.len() + self.evictable.len()
    }

    pub(crate) fn num_evictable(&self) -> usize {
        self.evictable.len()
    }

    /// The longest cached prefix of the sequence's tokens, in blocks. It ends before the last token: that one must run,
    /// or there would be nothing to sample from.
    pub(crate) fn lookup(&self, seq: &Sequence) -> Vec<BlockId> {
        let mut hit = Vec::new();
        if !self.enable_prefix_caching {
            return hit;
        }
        let mut prefix = Prefix::Root { cache_salt: seq.cache_salt };
        for tokens in seq.tokens[..seq.tokens.len() - 1].chunks_exact(self.block_size) {
            let Some(block) = self.tree.get(prefix, tokens) else { break };
            hit.push(block);
            prefix = Prefix::Block(block);
        }
        hit
    }

    /// How many of these blocks `share` would take from the available ones.
    pub(crate) fn num_evictable_among(&self, blocks: &[BlockId]) -> usize {
        blocks.iter().filter(|block| self.blocks[block.idx()].num_refs == 0).count()
    }

    /// One more reference to a cached block.
    pub(crate) fn share(&mut self, block: BlockId) {
        assert!(self.tree.contains(block), "{block:?} may still be written: it cannot be shared");
        let state = &mut self.blocks[block.idx()];
        if state.num_refs == 0 {
            let evictable = self.evictable.remove(&state.released_at);
            assert_eq!(evictable, Some(block), "a cached block that nobody uses is evictable");
        }
        state.num_refs += 1;
    }

    /// A block of one's own. The caller has made sure that one is available.
    pub(crate) fn allocate(&mut self) -> BlockId {
        let block = self.free.pop().unwrap_or_else(|| {
            let (_, block) = self.evictable.pop_first().expect("blocks are counted before they are allocated");
            self.tree.remove(block);
            block
        });
        let state = &mut self.blocks[block.idx()];
        assert_eq!(state.num_refs, 0, "{block:?} was available and has users");
        state.num_refs = 1;
        block
    }

    /// One reference less. What the tree knows stays, evictable.
    pub(crate) fn release(&mut self, block: BlockId) {
        let state = &mut self.blocks[block.idx()];
        assert!(state.num_refs > 0, "{block:?} is released more often than it was taken");
        state.num_refs -= 1;
        if state.num_refs > 0 {
            return;
        }
        if self.tree.contains(block) {
            self.num_releases += 1;
            state.released_at = self.num_releases;
            self.evictable.insert(state.released_at, block);
        } else {
            self.free.push(block);
        }
    }

    /// Takes all blocks from a sequence, the last first, as the order of `evictable` demands.
    pub(crate) fn release_all(&mut self, seq: &mut Sequence) {
        while let Some(block) = seq.block_table.pop() {
            self.release(block);
        }
        seq.num_cached_blocks = 0;
        seq.num_computed = 0;
        seq.num_scheduled = 0;
    }

    /// Enters the sequence's newly full blocks into the tree. Where another sequence was faster with the same prefix, its
    /// block replaces this one's, which is free again: a prefix is held once, and a sequence whose block is in the tree
    /// holds the whole path to it.
    pub(crate) fn cache_full_blocks(&mut self, seq: &mut Sequence) {
        if !self.enable_prefix_caching {
            return;
        }
        for idx in seq.num_cached_blocks..seq.num_computed / self.block_size {
            let prefix = match idx.checked_sub(1) {
                None => Prefix::Root { cache_salt: seq.cache_salt },
                Some(before) => Prefix::Block(seq.block_table[before]),
            };
            let tokens = &seq.tokens[idx * self.block_size..(idx + 1) * self.block_size];
            let own = seq.block_table[idx];
            if let Some(cached) = self.tree.get(prefix, tokens) {
                self.share(cached);
                seq.block_table[idx] = cached;
                self.release(own);
            } else {
                self.tree.insert(prefix, tokens, own);
            }
            seq.num_cached_blocks = idx + 1;
        }
    }

    /// Asserts that every block is in exactly one state, with as many references as tables name it.
    pub(crate) fn check_integrity<'a>(&self, seqs: impl Iterator<Item = &'a Sequence>) {
        self.tree.check_integrity(self.block_size);

        let mut num_refs = vec![0; self.blocks.len()];
        for seq in seqs {
            let mut prefix = Prefix::Root { cache_salt: seq.cache_salt };
            for (idx, &block) in seq.block_table.iter().enumerate() {
                num_refs[block.idx()] += 1;
                if idx < seq.num_cached_blocks {
                    let tokens = &seq.tokens[idx * self.block_size..(idx + 1) * self.block_size];
                    let cached = self.tree.get(prefix, tokens);
                    assert_eq!(cached, Some(block), "sequence {}: block {idx} of its table is another's", seq.id);
                    prefix = Prefix::Block(block);
                } else {
                    assert!(!self.tree.contains(block), "sequence {}: it writes cached {block:?}", seq.id);
                    assert_eq!(num_refs[block.idx()], 1, "sequence {}: it writes shared {block:?}", seq.id);
                }
            }
        }

        let mut num_places = vec![0; self.blocks.len()];
        for &block in &self.free {
            num_places[block.idx()] += 1;
            assert!(!self.tree.contains(block), "{block:?} is free and cached");
        }
        for (&released_at, &block) in &self.evictable {
            num_places[block.idx()] += 1;
            assert!(self.tree.contains(block), "{block:?} is evictable and not cached");
            assert_eq!(self.blocks[block.idx()].released_at, released_at, "{block:?} is queued under another release");
        }
        for (idx, state) in self.blocks.iter().enumerate() {
            assert_eq!(state.num_refs, num_refs[idx], "block {idx}: references counted and found");
            let expected = if state.num_refs == 0 { 1 } else { 0 };
            assert_eq!(
                num_places[idx], expected,
                "block {idx} with {} references: places among the available",
                state.num_refs
            );
        }
    }
}
