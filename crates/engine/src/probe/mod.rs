//! How long one op takes on this machine, by its real kernel.
//!
//! Operands are random, never zeros, which some processors multiply faster. Weights and caches are held so many times that
//! none is still in a cache of the processor when its turn comes again, as far as memory allows; rows, which the op before has
//! just written, are warm. What a measurement takes is settled by a run on `Meta` before anything is allocated.

mod links;
mod operand;
mod settle;

pub use links::{Transport, measure_all_reduce, measure_send_receive};
pub use settle::{Effort, Timing};

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use moesaic_device::{Arena, Ctx, Isa, Machine, Pool, available_memory};
use moesaic_kernels::experts::Activation;
use moesaic_spec::{Bytes, DType};

use self::operand::{Inputs, Operand};
use crate::EngineError;

/// An op with its sizes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Probe {
    /// `[rows, k] · [k, n]`.
    Linear {
        /// Rows.
        rows: usize,
        /// Columns.
        n: usize,
        /// Inner width.
        k: usize,
        /// Type of the weights.
        dtype: DType,
    },
    /// The routed experts of one rank: rows are put in order, all products, the weighted sum. Every token chooses at random.
    Experts {
        /// Tokens of all ranks together.
        tokens: usize,
        /// Width of a row.
        hidden: usize,
        /// Hidden width of an expert on this rank.
        intermediate: usize,
        /// Experts of a token.
        top_k: usize,
        /// Experts of the layer.
        experts: usize,
        /// Those of them that this rank has.
        local: usize,
        /// Each is cut, so that answers are parts of sums, in F32.
        cut: bool,
        /// Type of the weights.
        dtype: DType,
        /// With a gate or without.
        activation: Activation,
    },
    /// Attention over paged keys and values.
    Attention {
        /// Rows and contexts.
        batch: Batch,
        /// Query heads.
        heads: usize,
        /// Key and value heads.
        kv_heads: usize,
        /// Width of a head.
        head_dim: usize,
        /// Type of queries, keys and values.
        dtype: DType,
    },
    /// Latent attention, absorbed.
    Mla {
        /// Rows and contexts.
        batch: Batch,
        /// Query heads.
        heads: usize,
        /// Width of the latent.
        latent: usize,
        /// Width of the rotary key.
        rope: usize,
        /// Type of queries and latents.
        dtype: DType,
    },
}

impl Probe {
    /// Inputs that take turns: few tokens meet in few experts, which would stay in a cache if they were the same ones each time.
    fn routings(&self) -> usize {
        match *self {
            Probe::Experts { tokens, top_k, experts, local, .. } => {
                let touched = 1.0 - (1.0 - (top_k as f64 / experts as f64).min(1.0)).powf(tokens as f64);
                ((1.0 / touched) as usize).clamp(1, local)
            }
            _ => 1,
        }
    }
}

/// Sequences of one length.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Batch {
    /// How many.
    pub seqs: usize,
    /// Tokens of each that are computed.
    pub new_tokens: usize,
    /// Tokens that the last of them sees.
    pub context: usize,
}

/// Where probes run.
pub struct Prober {
    pool: Arc<Pool>,
    /// Of other ranks that do the same meanwhile.
    others: Vec<Arc<Pool>>,
    isa: Isa,
    /// As much memory must lie between two uses of the same bytes.
    cold_bytes: u64,
    /// What a probe may take, where it was limited.
    limit: Option<Bytes>,
}

/// Where the system does not tell its caches.
const UNKNOWN_CACHE_BYTES: u64 = 64 << 20;
/// As many times the largest cache: those that do not forget the oldest line first keep a part of twice their size.
const CACHES: u64 = 8;
/// Never more than this is spent on coldness: a virtual machine may see its host's cache, of which it has a part.
const MAX_COLD_BYTES: u64 = 1 << 30;
/// Share of the available memory that a probe may take.
const MEMORY_SHARE: f64 = 0.8;

impl Prober {
    /// One of so many ranks that share a machine, with so many threads each, and memory of all together up to a limit, or to most
    /// of what is available. While one rank is measured, the others do the same.
    ///
    /// # Errors
    /// [`EngineError`]: no threads, or an instruction set in the environment that this machine has not.
    pub fn new(ranks: usize, num_threads: usize, limit: Option<Bytes>) -> Result<Prober, EngineError> {
        let largest = Machine::detect().caches.iter().map(|cache| cache.size.0).max().unwrap_or(UNKNOWN_CACHE_BYTES);
        let cold_bytes = (CACHES * largest).min(MAX_COLD_BYTES);
        let pool = || Pool::new(num_threads).map(Arc::new);
        let others = (1..ranks).map(|_| pool()).collect::<Result<_, _>>()?;
        Ok(Prober { pool: pool()?, others, isa: Isa::from_env()?, cold_bytes, limit })
    }

    /// A context of the same threads, with an arena of its own.
    ///
    /// # Errors
    /// [`EngineError`]: no memory.
    pub fn ctx(&self, activations: Bytes) -> Result<Ctx, EngineError> {
        self.ctx_of(&self.pool, activations)
    }

    fn ctx_of(&self, pool: &Arc<Pool>, activations: Bytes) -> Result<Ctx, EngineError> {
        Ok(Ctx::cpu_with(Arena::host("activation", activations)?, pool.clone(), self.isa))
    }

    /// Bytes that a probe may take now.
    fn available(&self) -> u64 {
        let most = available_memory().map_or(u64::MAX, |bytes| (bytes.0 as f64 * MEMORY_SHARE) as u64);
        self.limit.map_or(most, |limit| limit.0.min(most))
    }

    /// Measures one op on the CPU; another device is another implementation of this function.
    ///
    /// # Errors
    /// [`EngineError::TooLarge`]: it takes more memory than there is. Anything else is a mistake in the probe's sizes.
    pub fn measure(&self, probe: &Probe, effort: &Effort) -> Result<Timing, EngineError> {
        let Needs { activations, operand, scratch } = Needs::of(probe)?;
        let ranks = 1 + self.others.len() as u64;
        let available = self.available() / ranks;
        let routings = probe.routings();
        let fixed = routings as u64 * activations + scratch;
        let needed = fixed + operand;
        if needed > available {
            return Err(EngineError::TooLarge { needed: Bytes(needed), available: Bytes(available) });
        }
        let fitting = (available - fixed) / operand;
        // What all ranks read lies between two uses.
        let copies = (self.cold_bytes / ranks).div_ceil(operand).clamp(1, fitting);
        let rank = |pool: &Arc<Pool>| {
            let turn = |routing: usize| {
                let ctx = self.ctx_of(pool, Bytes(activations))?;
                Ok((Inputs::new(probe, &ctx, routing)?, ctx))
            };
            let inputs = (0..routings).map(turn).collect::<Result<_, EngineError>>()?;
            let arena = Arena::host("operand", Bytes(copies * operand))?;
            let operands = Operand::random(probe, &arena, pool, copies as usize)?;
            Ok(Rank { inputs, operands, calls: 0 })
        };
        let mut measured = rank(&self.pool)?;
        let others = self.others.iter().map(rank).collect::<Result<Vec<_>, EngineError>>()?;
        let is_over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let is_over = &is_over;
            let work = |mut rank: Rank| {
                move || {
                    while !is_over.load(Ordering::Relaxed) {
                        rank.call(probe)?;
                    }
                    Ok::<(), EngineError>(())
                }
            };
            let others: Vec<_> = others.into_iter().map(|rank| scope.spawn(work(rank))).collect();
            let timing = settle::median(effort, || settle::timed(|| measured.call(probe)));
            is_over.store(true, Ordering::Relaxed);
            others.into_iter().try_for_each(|other| other.join().expect("a rank does not panic"))?;
            timing
        })
    }
}

/// One rank with all that it calls an op with.
struct Rank {
    inputs: Vec<(Inputs, Ctx)>,
    operands: Vec<Operand>,
    calls: usize,
}

impl Rank {
    /// One call, with the inputs and the operand whose turn it is.
    fn call(&mut self, probe: &Probe) -> Result<(), EngineError> {
        self.calls += 1;
        let (inputs, ctx) = &self.inputs[self.calls % self.inputs.len()];
        inputs.run(probe, ctx, &self.operands[self.calls / self.inputs.len() % self.operands.len()])
    }
}

/// Bytes of a probe.
struct Needs {
    activations: u64,
    /// One copy of its weights or cache.
    operand: u64,
    /// What packing reads from.
    scratch: u64,
}

impl Needs {
    fn of(probe: &Probe) -> Result<Needs, EngineError> {
        let ctx = Ctx::meta();
        let inputs = Inputs::new(probe, &ctx, 0)?;
        let arena = Arena::meta("operand");
        let operand = Operand::empty(probe, &arena)?;
        inputs.run(probe, &ctx, &operand)?;
        // Whole pages, and room for the arena's own rounding.
        let round = |bytes: Bytes| bytes.0.next_multiple_of(4096) + 4096;
        let scratch = operand::slab_bytes(probe);
        Ok(Needs { activations: round(ctx.arena().sufficient()), operand: round(arena.peak()), scratch })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DTYPES: [DType; 3] = [DType::F32, DType::BF16, DType::F8E4M3];

    fn prober(limit: Option<Bytes>) -> Prober {
        Prober { cold_bytes: 1 << 20, ..Prober::new(1, 2, limit).unwrap() }
    }

    fn probes() -> Vec<Probe> {
        let batch = Batch { seqs: 3, new_tokens: 1, context: 70 };
        let prompt = Batch { seqs: 1, new_tokens: 33, context: 33 };
        let experts = |dtype, activation, local| Probe::Experts {
            tokens: 5,
            hidden: 64,
            intermediate: 48,
            top_k: 2,
            experts: 8,
            local,
            cut: local == 8,
            dtype,
            activation,
        };
        let mut probes = Vec::new();
        for dtype in DTYPES {
            probes.push(Probe::Linear { rows: 3, n: 40, k: 72, dtype });
            probes.push(experts(dtype, Activation::SwiGlu, 8));
            probes.push(experts(dtype, Activation::Gelu, 2));
        }
        for (batch, dtype) in [(batch, DType::BF16), (prompt, DType::BF16), (batch, DType::F32), (prompt, DType::F32)] {
            probes.push(Probe::Attention { batch, heads: 4, kv_heads: 2, head_dim: 16, dtype });
            probes.push(Probe::Mla { batch, heads: 2, latent: 32, rope: 8, dtype });
        }
        probes
    }

    #[test]
    fn every_op_is_measured_in_the_memory_that_was_settled() {
        let prober = prober(None);
        for probe in probes() {
            let timing = prober.measure(&probe, &Effort::least()).unwrap_or_else(|error| panic!("{probe:?}: {error}"));
            assert!(timing.seconds > 0.0 && timing.calls >= 3, "{probe:?}: {timing:?}");
        }
    }

    #[test]
    fn what_does_not_fit_is_refused_with_both_numbers() {
        let probe = Probe::Linear { rows: 1, n: 4096, k: 4096, dtype: DType::F32 };
        let error = prober(Some(Bytes(32 << 20))).measure(&probe, &Effort::least()).unwrap_err().to_string();
        assert!(error.starts_with("needs ") && error.ends_with("of memory, and 32.00 MiB may be used"), "{error}");
    }

    #[test]
    fn operands_are_random() {
        let pool = Pool::new(1).unwrap();
        for probe in probes() {
            let needs = Needs::of(&probe).unwrap();
            let arena = Arena::host("operand", Bytes(2 * needs.operand)).unwrap();
            let operands = Operand::random(&probe, &arena, &pool, 2).unwrap();
            assert_eq!(operands.len(), 2);
            if let [Operand::Matrix(a), _] = &operands[..] {
                let mut row = vec![0.0; a.k()];
                a.row_to_f32(a.n() - 1, &mut row);
                assert!(row.iter().filter(|&&x| x != 0.0).count() > row.len() / 2, "{probe:?}: {row:?}");
                assert!(row.iter().all(|x| x.is_finite()), "{probe:?}: {row:?}");
            }
        }
    }
}
