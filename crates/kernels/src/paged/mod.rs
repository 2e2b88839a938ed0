//! Paged key/value memory: which rows of a step belong to which sequence, and where each token's entry lies.
//!
//! Memory is cut into blocks of `block_size` tokens; a sequence owns a list of them, its block table. Token `p` of a
//! sequence lies in slot `block_table[p / block_size] * block_size + p % block_size`.

mod kv;
mod latent;

pub use kv::{KvShape, PagedKv};
pub use latent::{LatentShape, PagedLatent};

use crate::contract::{KernelError, require};

/// Keys are stored in tiles of so many tokens, so every block holds whole tiles.
pub const TILE_TOKENS: usize = 8;

/// One sequence's part of a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PagedSeq {
    /// First row of the step that is this sequence's.
    pub row0: usize,
    /// Rows of the step: the tokens that are computed now.
    pub num_rows: usize,
    /// Tokens that the last of them sees, itself included.
    pub context_len: usize,
    /// The blocks that hold tokens `0 .. context_len`, in order; it may be longer.
    pub block_table: Vec<u32>,
}

impl PagedSeq {
    /// Position of the first row.
    pub fn first_position(&self) -> usize {
        self.context_len - self.num_rows
    }
}

/// A step's rows: prefill chunks and decode rows in any mixture, each sequence's rows side by side.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PagedBatch {
    block_size: usize,
    seqs: Vec<PagedSeq>,
    positions: Vec<u32>,
    slots: Vec<usize>,
    num_blocks: usize,
}

impl PagedBatch {
    /// Checks that rows follow one another without holes, that every sequence has a row, a context that includes its
    /// rows, and blocks enough for it; and that no two rows share a slot.
    pub fn new(block_size: usize, seqs: Vec<PagedSeq>) -> Result<PagedBatch, KernelError> {
        const OP: &str = "paged";
        let valid = block_size > 0 && block_size.is_multiple_of(TILE_TOKENS);
        require(
            valid,
            OP,
            "block_size",
            || format!("a positive multiple of {TILE_TOKENS}"),
            || block_size.to_string(),
        )?;
        let num_rows: usize = seqs.iter().map(|seq| seq.num_rows).sum();
        let (mut positions, mut slots) = (Vec::with_capacity(num_rows), Vec::with_capacity(num_rows));
        let mut num_blocks = 0;
        for (i, seq) in seqs.iter().enumerate() {
            let got = |what: usize| move || format!("{what} (sequence {i})");
            require(seq.row0 == positions.len(), OP, "row0", || positions.len().to_string(), got(seq.row0))?;
            require(seq.num_rows > 0, OP, "num_rows", || "at least 1".into(), got(seq.num_rows))?;
            let enough = seq.context_len >= seq.num_rows && u32::try_from(seq.context_len).is_ok();
            require(
                enough,
                OP,
                "context_len",
                || format!("at least num_rows = {} and below 2^32", seq.num_rows),
                got(seq.context_len),
            )?;
            let needed = seq.context_len.div_ceil(block_size);
            let held = seq.block_table.len();
            require(held >= needed, OP, "block_table", || format!("at least {needed} blocks"), got(held))?;
            for position in seq.first_position()..seq.context_len {
                positions.push(position as u32);
                slots.push(seq.block_table[position / block_size] as usize * block_size + position % block_size);
            }
            let highest = seq.block_table[..needed].iter().max();
            num_blocks = num_blocks.max(highest.map_or(0, |&block| block as usize + 1));
        }
        let mut sorted = slots.clone();
        sorted.sort_unstable();
        let shared = sorted.windows(2).find(|pair| pair[0] == pair[1]);
        require(
            shared.is_none(),
            OP,
            "block_table",
            || "one row for each slot".into(),
            || format!("two rows for slot {}", shared.map_or(0, |pair| pair[0])),
        )?;
        Ok(PagedBatch { block_size, seqs, positions, slots, num_blocks })
    }

    /// Tokens of a block.
    pub fn block_size(&self) -> usize {
        self.block_size
    }

    /// The sequences, in the order of their rows.
    pub fn seqs(&self) -> &[PagedSeq] {
        &self.seqs
    }

    /// T: rows of the step.
    pub fn num_rows(&self) -> usize {
        self.positions.len()
    }

    /// Each row's position in its sequence.
    pub fn positions(&self) -> &[u32] {
        &self.positions
    }

    /// Where each row's entry is stored; all different.
    pub fn slots(&self) -> &[usize] {
        &self.slots
    }

    /// Blocks that memory must have for all used tables to be inside: the highest block number and one.
    pub fn num_blocks(&self) -> usize {
        self.num_blocks
    }

    /// Pairs of row and visible token, summed over all rows, and tokens that must be read, summed over sequences. A row
    /// sees itself and those before it, at most the last `window`.
    pub(crate) fn work(&self, window: Option<usize>) -> Work {
        let mut work = Work::default();
        let window = window.unwrap_or(usize::MAX) as u64;
        for seq in &self.seqs {
            // Rows see first, first + 1, …, last tokens, each at most the window.
            let (first, last) = (seq.first_position() as u64 + 1, seq.context_len as u64);
            let whole = (last.min(window) + 1).saturating_sub(first);
            work.pairs += (2 * first + whole).saturating_sub(1) * whole / 2;
            work.pairs += (seq.num_rows as u64 - whole) * window.min(last);
            work.tokens += last - (first - first.min(window));
        }
        work
    }
}

/// See [`PagedBatch::work`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Work {
    pub(crate) pairs: u64,
    pub(crate) tokens: u64,
}

/// A pointer that tasks of one region share, each for elements of its own.
#[derive(Clone, Copy)]
pub(crate) struct Shared<T>(pub(crate) *mut T);

// SAFETY: who writes through it states which elements belong to which task.
unsafe impl<T> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Shared<T> {}

impl<T> Shared<T> {
    /// The pointer. (A method, so that closures capture the whole value and with it `Sync`.)
    pub(crate) fn ptr(self) -> *mut T {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seq(row0: usize, num_rows: usize, context_len: usize, block_table: &[u32]) -> PagedSeq {
        PagedSeq { row0, num_rows, context_len, block_table: block_table.to_vec() }
    }

    #[test]
    fn positions_and_slots_follow_the_tables() {
        let batch =
            PagedBatch::new(8, vec![seq(0, 3, 10, &[4, 1]), seq(3, 1, 1, &[0]), seq(4, 2, 2, &[2, 9])]).unwrap();
        assert_eq!(batch.positions(), [7, 8, 9, 0, 0, 1]);
        assert_eq!(batch.slots(), [39, 8, 9, 0, 16, 17]);
        assert_eq!(batch.num_blocks(), 5);
    }

    #[test]
    fn work_is_the_plain_count() {
        for window in [None, Some(1), Some(4), Some(9), Some(100)] {
            let seqs = vec![seq(0, 3, 10, &[4, 1]), seq(3, 1, 1, &[0]), seq(4, 8, 8, &[2]), seq(12, 1, 7, &[3])];
            let batch = PagedBatch::new(8, seqs).unwrap();
            let mut expected = Work::default();
            for seq in batch.seqs() {
                let visible = |p: usize| (p + 1).min(window.unwrap_or(usize::MAX));
                let first = seq.first_position();
                expected.pairs += (first..seq.context_len).map(|p| visible(p) as u64).sum::<u64>();
                expected.tokens += (seq.context_len - (first + 1 - visible(first))) as u64;
            }
            assert_eq!(batch.work(window), expected, "{window:?}");
        }
    }

    #[test]
    fn what_does_not_fit_together_is_refused() {
        let refused = |block_size, seqs| PagedBatch::new(block_size, seqs).unwrap_err().to_string();
        assert_eq!(refused(12, vec![]), "paged: block_size is 12, expected a positive multiple of 8");
        assert_eq!(refused(8, vec![seq(1, 1, 1, &[0])]), "paged: row0 is 1 (sequence 0), expected 0");
        assert_eq!(refused(8, vec![seq(0, 0, 1, &[0])]), "paged: num_rows is 0 (sequence 0), expected at least 1");
        let short = refused(8, vec![seq(0, 3, 2, &[0])]);
        assert_eq!(short, "paged: context_len is 2 (sequence 0), expected at least num_rows = 3 and below 2^32");
        let short = refused(8, vec![seq(0, 3, 9, &[0])]);
        assert_eq!(short, "paged: block_table is 1 (sequence 0), expected at least 2 blocks");
        let twice = refused(8, vec![seq(0, 1, 1, &[3]), seq(1, 1, 1, &[3])]);
        assert_eq!(twice, "paged: block_table is two rows for slot 24, expected one row for each slot");
    }
}
