//! Which block holds the KV of which prefix.
//!
//! A tree with a full block at each node: the path from the root spells the tokens that the block's KV was computed
//! from. Lookups compare the tokens themselves. A hash of the prefix would be shorter, but two prompts that collide, by
//! chance or by intent, would then read one another's KV.

use std::collections::HashMap;
use std::sync::Arc;

use crate::BlockId;

/// What comes before a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Prefix {
    /// Nothing: the block starts a sequence of this tenant.
    Root { cache_salt: u64 },
    /// The tokens of this block, after those before it.
    Block(BlockId),
}

/// The tokens of a block → the block.
type Children = HashMap<Arc<[u32]>, BlockId>;

#[derive(Debug)]
struct Node {
    prefix: Prefix,
    tokens: Arc<[u32]>, // [block_size]
    children: Children,
}

/// The maps are only ever asked for a key, never walked, so that the scheduler's choices are the same in every run.
#[derive(Debug)]
pub(crate) struct PrefixTree {
    roots: HashMap<u64, Children>,
    /// By block id; `None` for a block that is not cached.
    nodes: Vec<Option<Node>>,
}

impl PrefixTree {
    pub(crate) fn new(num_blocks: usize) -> Self {
        Self { roots: HashMap::new(), nodes: std::iter::repeat_with(|| None).take(num_blocks).collect() }
    }

    /// The block that holds the KV of these `block_size` tokens after this prefix.
    pub(crate) fn get(&self, prefix: Prefix, tokens: &[u32]) -> Option<BlockId> {
        let children = match prefix {
            Prefix::Root { cache_salt } => self.roots.get(&cache_salt)?,
            Prefix::Block(block) => &self.nodes[block.idx()].as_ref()?.children,
        };
        children.get(tokens).copied()
    }

    pub(crate) fn contains(&self, block: BlockId) -> bool {
        self.nodes[block.idx()].is_some()
    }

    /// Adds a leaf.
    pub(crate) fn insert(&mut self, prefix: Prefix, tokens: &[u32], block: BlockId) {
        assert!(!self.contains(block), "{block:?} is cached already");
        let tokens: Arc<[u32]> = tokens.into();
        let children = match prefix {
            Prefix::Root { cache_salt } => self.roots.entry(cache_salt).or_default(),
            Prefix::Block(parent) => {
                &mut self.nodes[parent.idx()].as_mut().expect("a prefix is cached before what follows it").children
            }
        };
        let former = children.insert(tokens.clone(), block);
        assert!(former.is_none(), "{block:?} holds the same prefix as {former:?}");
        self.nodes[block.idx()] = Some(Node { prefix, tokens, children: Children::new() });
    }

    /// Removes a leaf.
    pub(crate) fn remove(&mut self, block: BlockId) {
        let node = self.nodes[block.idx()].take().expect("only a cached block can be removed");
        assert!(node.children.is_empty(), "{block:?} is evicted before the blocks that follow it");
        match node.prefix {
            Prefix::Root { cache_salt } => {
                let children = self.roots.get_mut(&cache_salt).expect("a first block has a root");
                children.remove(&node.tokens);
                if children.is_empty() {
                    self.roots.remove(&cache_salt); // tenants come and go
                }
            }
            Prefix::Block(parent) => {
                let parent = self.nodes[parent.idx()].as_mut().expect("a parent outlives its children");
                parent.children.remove(&node.tokens);
            }
        }
    }

    /// Asserts that every node hangs on its prefix, and nothing else does.
    pub(crate) fn check_integrity(&self, block_size: usize) {
        let mut num_nodes = 0;
        for (idx, node) in self.nodes.iter().enumerate() {
            let Some(node) = node else { continue };
            num_nodes += 1;
            assert_eq!(node.tokens.len(), block_size, "block {idx} is cached and not full");
            assert_eq!(
                self.get(node.prefix, &node.tokens),
                Some(BlockId(idx as u32)),
                "block {idx} is not where its prefix leads"
            );
        }
        let num_children = self.nodes.iter().flatten().map(|node| node.children.len()).sum::<usize>();
        let num_firsts = self.roots.values().map(Children::len).sum::<usize>();
        assert_eq!(num_children + num_firsts, num_nodes, "an entry leads to a block that is not cached");
        assert!(self.roots.values().all(|children| !children.is_empty()), "an empty tenant is kept");
    }
}
