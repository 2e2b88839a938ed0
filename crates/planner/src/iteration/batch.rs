//! What an iteration works on.

/// What one data-parallel group has in one iteration; the one that all wait for, where groups have not the same.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Batch {
    /// Sequences that get one more token.
    pub decodes: f64,
    /// Tokens in the cache of each, in the mean.
    pub context: f64,
    /// Tokens of prompts.
    pub prefill_tokens: f64,
    /// Prompts that they are of.
    pub prefills: f64,
    /// Tokens in the cache before them, for each prompt, in the mean.
    pub prefill_context: f64,
    /// Prompts that are read to their end.
    pub finished_prefills: f64,
    /// Rows that the mean group has fewer than this one: 0 where every group has the same. Placed experts work for all
    /// groups, so they have the mean of rows and not the most.
    pub shortfall: f64,
}

impl Batch {
    /// Decoding only.
    pub fn decode(seqs: f64, context: f64) -> Batch {
        Batch { decodes: seqs, context, ..Batch::default() }
    }

    /// Whole prompts only.
    pub fn prefill(prompts: f64, tokens: f64) -> Batch {
        Batch { prefill_tokens: prompts * tokens, prefills: prompts, finished_prefills: prompts, ..Batch::default() }
    }

    /// Rows of the residual stream.
    pub fn rows(&self) -> f64 {
        self.decodes + self.prefill_tokens
    }

    /// Rows of the mean group.
    pub(super) fn mean_rows(&self) -> f64 {
        (self.rows() - self.shortfall).max(0.0)
    }

    /// One of so many equal parts.
    pub(super) fn part(self, parts: f64) -> Batch {
        Batch {
            decodes: self.decodes / parts,
            prefill_tokens: self.prefill_tokens / parts,
            prefills: self.prefills / parts,
            finished_prefills: self.finished_prefills / parts,
            shortfall: self.shortfall / parts,
            ..self
        }
    }
}
