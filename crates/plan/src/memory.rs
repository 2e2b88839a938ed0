//! The memory ledger: who gets how much, settled before the first token.

use std::fmt;

use moesaic_spec::Bytes;
use serde::Serialize;

/// What the parts need.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MemoryRequest {
    /// What may be used in all.
    pub budget: Bytes,
    /// Weights as kernels want them.
    pub weights: Bytes,
    /// Activation arena that is enough for every step.
    pub activations: Bytes,
    /// Messages between ranks.
    pub exchange: Bytes,
    /// Buffers outside the arenas: logits and sampling, detokeniser, code.
    pub workspace: Bytes,
    /// Tables outside the arenas, for each position of the longest sequence.
    pub position_bytes: Bytes,
    /// One KV block in all layers.
    pub block_bytes: Bytes,
    /// Tokens a block.
    pub block_size: usize,
    /// Longest sequence, tokens.
    pub max_model_len: usize,
    /// Sequences at a time.
    pub max_num_seqs: usize,
    /// A fixed size of the KV cache instead of what the sequences need (`--kv-cache-memory-bytes`).
    pub kv_cache: Option<Bytes>,
}

impl MemoryRequest {
    /// Everything but the KV cache.
    fn fixed(&self, max_model_len: usize) -> Bytes {
        let arenas = self.weights.0.saturating_add(self.activations.0).saturating_add(self.exchange.0);
        let positions = self.position_bytes.0.saturating_mul(max_model_len as u64);
        Bytes(arenas.saturating_add(self.workspace.0).saturating_add(positions))
    }

    /// Everything outside the arenas.
    fn all_workspace(&self) -> Bytes {
        Bytes(self.workspace.0.saturating_add(self.position_bytes.0.saturating_mul(self.max_model_len as u64)))
    }
}

/// Who gets how much.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct MemoryLedger {
    /// What may be used in all, bytes.
    pub budget_bytes: u64,
    /// Weights.
    pub weights_bytes: u64,
    /// KV cache: `num_blocks` blocks.
    pub kv_cache_bytes: u64,
    /// Activation arena.
    pub activations_bytes: u64,
    /// Messages between ranks.
    pub exchange_bytes: u64,
    /// Buffers outside the arenas.
    pub workspace_bytes: u64,
    /// KV blocks.
    pub num_blocks: usize,
    /// Tokens a block.
    pub block_size: usize,
}

/// The parts need more than there is.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error(
    "cannot fit: weights {} + one sequence's KV cache {kv_needed} ({} tokens) + activations {}{} + workspace {} = {needed}, \
     but only {} may be used; {advice}",
    request.weights, request.max_model_len, request.activations, messages(request.exchange), request.all_workspace(),
    request.budget
)]
pub struct CannotFit {
    /// What was asked for.
    pub request: Box<MemoryRequest>,
    /// KV cache of one sequence of the longest length.
    pub kv_needed: Bytes,
    /// The sum.
    pub needed: Bytes,
    /// What would help.
    pub advice: Advice,
}

/// A single rank has none.
fn messages(exchange: Bytes) -> String {
    if exchange.0 == 0 { String::new() } else { format!(" + messages {exchange}") }
}

/// The settings that would make it fit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Advice {
    /// Longest `--max-model-len` that fits with everything else as it is; 0 when none does.
    pub max_model_len: usize,
    /// Bytes that `--max-num-batched-tokens` would have to save in activations; `None` when they are too few for that.
    pub activations_at_most: Option<Bytes>,
    /// Memory that would be enough.
    pub budget: Bytes,
}

impl fmt::Display for Advice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any of these would fix it: ")?;
        match self.max_model_len {
            0 => f.write_str("a smaller model, --dtype or --max-model-len, ")?,
            len => write!(f, "--max-model-len {len}, ")?,
        }
        match self.activations_at_most {
            Some(most) => write!(f, "a smaller --max-num-batched-tokens (activations of at most {most}), ")?,
            None => f.write_str("fewer layers or experts a rank (a plan over more machines), ")?,
        }
        write!(f, "or {} of memory (--memory-utilization, --memory-limit)", self.budget)
    }
}

impl MemoryLedger {
    /// Gives weights, activations and workspace what they need, and the KV cache what all sequences at their longest need,
    /// or what is left of the budget, whichever is less; at least one sequence of the longest length must fit.
    pub fn settle(request: &MemoryRequest) -> Result<MemoryLedger, CannotFit> {
        let blocks_of = |tokens: usize| tokens.div_ceil(request.block_size);
        let one_sequence = blocks_of(request.max_model_len);
        let fixed = request.fixed(request.max_model_len);
        let left = Bytes(request.budget.0.saturating_sub(fixed.0));
        let fitting = (left.0 / request.block_bytes.0.max(1)) as usize;
        let wanted = match request.kv_cache {
            Some(bytes) => (bytes.0 / request.block_bytes.0.max(1)) as usize,
            None => one_sequence.saturating_mul(request.max_num_seqs).min(fitting.max(one_sequence)),
        };
        if fixed > request.budget || wanted > fitting || wanted < one_sequence {
            return Err(Self::cannot_fit(request, wanted.max(one_sequence), fitting, fixed));
        }
        Ok(MemoryLedger {
            budget_bytes: request.budget.0,
            weights_bytes: request.weights.0,
            kv_cache_bytes: wanted as u64 * request.block_bytes.0,
            activations_bytes: request.activations.0,
            exchange_bytes: request.exchange.0,
            workspace_bytes: request.all_workspace().0,
            num_blocks: wanted,
            block_size: request.block_size,
        })
    }

    /// Everything together.
    pub fn total_bytes(&self) -> u64 {
        self.weights_bytes + self.kv_cache_bytes + self.activations_bytes + self.exchange_bytes + self.workspace_bytes
    }

    fn cannot_fit(request: &MemoryRequest, blocks: usize, fitting: usize, fixed: Bytes) -> CannotFit {
        let kv_needed = Bytes((blocks as u64).saturating_mul(request.block_bytes.0));
        let needed = Bytes(fixed.0.saturating_add(kv_needed.0));
        let fitting = match request.kv_cache {
            // A longer sequence than a KV cache of fixed size holds can't be helped by more memory elsewhere.
            Some(bytes) => {
                let held = (bytes.0 / request.block_bytes.0.max(1)) as usize;
                if held <= fitting { held } else { 0 }
            }
            // A shorter sequence needs fewer positions, too.
            None => {
                let block = request.block_bytes.0 + request.position_bytes.0 * request.block_size as u64;
                (request.budget.0.saturating_sub(request.fixed(0).0) / block.max(1)) as usize
            }
        };
        let without_activations = Bytes(needed.0 - request.activations.0);
        let room = request.budget.0.checked_sub(without_activations.0).filter(|&room| room > 0);
        CannotFit {
            request: Box::new(*request),
            kv_needed,
            needed,
            advice: Advice {
                max_model_len: fitting.saturating_mul(request.block_size),
                activations_at_most: room.map(Bytes),
                budget: needed,
            },
        }
    }
}

impl fmt::Display for MemoryLedger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tokens = self.num_blocks * self.block_size;
        writeln!(f, "memory    weights     {:>12}", Bytes(self.weights_bytes).to_string())?;
        let kv = Bytes(self.kv_cache_bytes).to_string();
        writeln!(
            f,
            "          KV cache    {kv:>12}   {} blocks of {} tokens, {tokens} tokens",
            self.num_blocks, self.block_size
        )?;
        writeln!(f, "          activations {:>12}", Bytes(self.activations_bytes).to_string())?;
        if self.exchange_bytes > 0 {
            writeln!(f, "          messages    {:>12}", Bytes(self.exchange_bytes).to_string())?;
        }
        writeln!(f, "          workspace   {:>12}", Bytes(self.workspace_bytes).to_string())?;
        write!(
            f,
            "          total       {:>12}   of {} that may be used",
            Bytes(self.total_bytes()).to_string(),
            Bytes(self.budget_bytes)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn request() -> MemoryRequest {
        MemoryRequest {
            budget: Bytes(100 * MIB),
            weights: Bytes(60 * MIB),
            activations: Bytes(10 * MIB),
            exchange: Bytes(0),
            workspace: Bytes(2 * MIB),
            position_bytes: Bytes(0),
            block_bytes: Bytes(MIB),
            block_size: 16,
            max_model_len: 160,
            max_num_seqs: 2,
            kv_cache: None,
        }
    }

    #[test]
    fn every_sequence_gets_its_longest_when_there_is_room() {
        let ledger = MemoryLedger::settle(&request()).unwrap();
        assert_eq!((ledger.num_blocks, ledger.kv_cache_bytes), (20, 20 * MIB));
        assert!(ledger.total_bytes() <= ledger.budget_bytes);
    }

    #[test]
    fn with_less_room_the_cache_gets_what_is_left() {
        let ledger = MemoryLedger::settle(&MemoryRequest { max_num_seqs: 100, ..request() }).unwrap();
        assert_eq!(ledger.num_blocks, 28);
    }

    /// The advice must be true: what it proposes fits, and one step beyond does not.
    #[test]
    fn advice_is_true() {
        for position_bytes in [0, 1000, MIB / 8] {
            let too_long = MemoryRequest { max_model_len: 16 * 40, position_bytes: Bytes(position_bytes), ..request() };
            let error = MemoryLedger::settle(&too_long).unwrap_err();
            assert_eq!(error.kv_needed, Bytes(40 * MIB));
            let len = error.advice.max_model_len;
            assert!(MemoryLedger::settle(&MemoryRequest { max_model_len: len, ..too_long }).is_ok());
            assert!(MemoryLedger::settle(&MemoryRequest { max_model_len: len + 1, ..too_long }).is_err());
            let budget = error.advice.budget;
            assert!(MemoryLedger::settle(&MemoryRequest { budget, ..too_long }).is_ok());
            assert!(MemoryLedger::settle(&MemoryRequest { budget: Bytes(budget.0 - 1), ..too_long }).is_err());
        }
        // No length helps a KV cache of fixed size that does not fit.
        let large_cache = MemoryRequest { kv_cache: Some(Bytes(50 * MIB)), ..request() };
        assert_eq!(MemoryLedger::settle(&large_cache).unwrap_err().advice.max_model_len, 0);
        let small_cache = MemoryRequest { kv_cache: Some(Bytes(3 * MIB)), ..request() };
        assert_eq!(MemoryLedger::settle(&small_cache).unwrap_err().advice.max_model_len, 48);
        assert!(MemoryLedger::settle(&MemoryRequest { max_model_len: 48, ..small_cache }).is_ok());

        let few_short = MemoryRequest { budget: Bytes(75 * MIB), ..request() };
        let error = MemoryLedger::settle(&few_short).unwrap_err();
        let most = error.advice.activations_at_most.unwrap();
        assert!(MemoryLedger::settle(&MemoryRequest { activations: most, ..few_short }).is_ok());
    }

    #[test]
    fn the_sentence_has_the_numbers_and_three_ways_out() {
        let error = MemoryLedger::settle(&MemoryRequest { max_model_len: 16 * 30, ..request() }).unwrap_err();
        assert_eq!(
            error.to_string(),
            "cannot fit: weights 60.00 MiB + one sequence's KV cache 30.00 MiB (480 tokens) + activations 10.00 MiB + \
             workspace 2.00 MiB = 102.00 MiB, but only 100.00 MiB may be used; any of these would fix it: \
             --max-model-len 448, a smaller --max-num-batched-tokens (activations of at most 8.00 MiB), or 102.00 MiB of \
             memory (--memory-utilization, --memory-limit)"
        );
    }
}
