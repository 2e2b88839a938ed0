//! From what the planner wants to what the engine measures.

use anyhow::{Result, bail};
use moesaic_engine::EngineError;
use moesaic_engine::probe::{
    Batch, Effort, Probe, Prober, Timing, Transport, measure_all_reduce, measure_send_receive,
};
use moesaic_planner::cost::{Op, Precision};
use moesaic_planner::network::LinkKind;
use moesaic_planner::profile::{Link, Wanted};
use moesaic_spec::{Activation, DType};

/// One row to measure: an op, or a link by one transport.
#[derive(Clone, Copy, Debug)]
pub(super) struct Item {
    pub wanted: Wanted,
    transport: Option<Transport>,
}

impl Item {
    /// The rows of something wanted.
    pub(super) fn of(wanted: Wanted) -> Vec<Item> {
        match wanted {
            Wanted::Compute(_) => vec![Item { wanted, transport: None }],
            Wanted::Link(_) => {
                let by = |transport| Item { wanted, transport: Some(transport) };
                vec![by(Transport::InProcess), by(Transport::Process)]
            }
        }
    }

    /// Column `kernel`: the instruction set of an op, the transport of a link.
    fn kernel<'a>(&self, isa: &'a str) -> &'a str {
        match self.transport {
            None => isa,
            Some(Transport::InProcess) => "in_process",
            Some(Transport::Process) => "process",
        }
    }

    /// What stands in its table before the framework, with commas.
    pub(super) fn row(&self, isa: &str) -> String {
        let (_, columns) = self.wanted.columns();
        let values = columns.into_iter().map(|(_, value)| value);
        values.chain([self.kernel(isa).to_owned()]).collect::<Vec<_>>().join(",")
    }

    /// For people.
    pub(super) fn label(&self, isa: &str) -> String {
        format!("{} kernel={}", self.wanted, self.kernel(isa))
    }

    /// Measures it; what does not fit into memory gives the sentence that says so.
    pub(super) fn measure(&self, prober: &Prober, effort: &Effort) -> Result<Result<Timing, String>> {
        let timing = match (self.wanted, self.transport) {
            (Wanted::Compute(op), _) => prober.measure(&probe(&op)?, effort),
            (Wanted::Link(Link { kind, ranks, bytes }), transport) => {
                let transport = transport.unwrap_or(Transport::InProcess);
                match kind {
                    LinkKind::SendReceive => measure_send_receive(transport, bytes as usize, effort),
                    LinkKind::AllReduce => measure_all_reduce(transport, ranks as usize, bytes as usize, effort),
                }
            }
        };
        match timing {
            Ok(timing) => Ok(Ok(timing)),
            Err(error @ EngineError::TooLarge { .. }) => Ok(Err(error.to_string())),
            Err(error) => Err(error.into()),
        }
    }
}

/// The same op on our kernels.
fn probe(op: &Op) -> Result<Probe> {
    Ok(match *op {
        Op::Gemm { m, n, k, weights } => {
            Probe::Linear { rows: m as usize, n: n as usize, k: k as usize, dtype: dtype(weights)? }
        }
        Op::Experts { tokens, hidden, intermediate, top_k, experts, tp, ep, weights, matrices, .. } => Probe::Experts {
            tokens: tokens as usize,
            hidden: hidden as usize,
            intermediate: (intermediate / tp).ceil() as usize,
            top_k: top_k as usize,
            experts: experts as usize,
            local: (experts / ep).ceil() as usize,
            cut: tp > 1.0,
            dtype: dtype(weights)?,
            activation: if matrices == 3 { Activation::SwiGlu } else { Activation::Gelu },
        },
        Op::AttentionPrefill { seqs, new_tokens, context, heads, kv_heads, head_dim, kv } => Probe::Attention {
            batch: batch(seqs, new_tokens, context),
            heads: heads as usize,
            kv_heads: kv_heads as usize,
            head_dim: head_dim as usize,
            dtype: dtype(kv)?,
        },
        Op::AttentionDecode { seqs, context, heads, kv_heads, head_dim, kv } => Probe::Attention {
            batch: batch(seqs, 1.0, context),
            heads: heads as usize,
            kv_heads: kv_heads as usize,
            head_dim: head_dim as usize,
            dtype: dtype(kv)?,
        },
        Op::MlaPrefill { seqs, new_tokens, context, heads, latent, rope, kv } => Probe::Mla {
            batch: batch(seqs, new_tokens, context),
            heads: heads as usize,
            latent: latent as usize,
            rope: rope as usize,
            dtype: dtype(kv)?,
        },
        Op::MlaDecode { seqs, context, heads, latent, rope, kv } => Probe::Mla {
            batch: batch(seqs, 1.0, context),
            heads: heads as usize,
            latent: latent as usize,
            rope: rope as usize,
            dtype: dtype(kv)?,
        },
        Op::Stream { .. } | Op::ExpertsDeepEp { .. } => bail!("{op:?} is no op of a table"),
    })
}

fn batch(seqs: f64, new_tokens: f64, context: f64) -> Batch {
    Batch { seqs: seqs as usize, new_tokens: new_tokens as usize, context: context as usize }
}

/// The type of our kernels; other types have none.
pub(super) fn dtype(precision: Precision) -> Result<DType> {
    Ok(match precision {
        Precision::F32 => DType::F32,
        Precision::Bf16 => DType::BF16,
        Precision::Fp8 | Precision::Fp8Block => DType::F8E4M3,
        Precision::F4 | Precision::Int4 => bail!("no kernel has weights in {precision:?}"),
    })
}
