//! Operations by the names and columns of published tables.

use serde_json::{Map, Value};

use super::{Collective, CollectiveKind, Copies, Demand, Exchange, Group, Library, Mode};
use crate::PlannerError;

/// FP8 with one 4-byte scale for 128 numbers, as DeepEP sends it.
const FP8_WITH_SCALES: f64 = 1.0 + 4.0 / 128.0;

/// What tables measure.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum CommOp {
    /// All-reduce and its relatives.
    Collective(Collective),
    /// Rows to experts.
    Dispatch(Exchange),
    /// Answers back.
    Combine(Exchange),
}

impl CommOp {
    /// From a row of a table: `nccl_all_reduce`, `nccl_all_gather`, `nccl_reduce_scatter`, `nccl_alltoall` and
    /// `custom_all_reduce` have `gpus` and `bytes`; `deepep_ll_dispatch` and `deepep_ll_combine` have `nodes`, `ep`,
    /// `tokens_per_gpu`, `h`, `topk` and `E`; `deepep_normal_dispatch` and `deepep_normal_combine` `sms`, too.
    ///
    /// # Errors
    /// [`PlannerError::UnknownCommOp`], and [`PlannerError::CommParam`] for a column that is missing or out of range.
    pub fn from_params(op: &str, params: &Map<String, Value>) -> Result<CommOp, PlannerError> {
        let row = Row { op, params };
        let collective = |kind, library| {
            let group = Group::one_node(row.count("gpus", 1)?);
            Ok(CommOp::Collective(Collective { kind, library, bytes: row.count("bytes", 0)? as f64, group }))
        };
        match op {
            "nccl_all_reduce" => collective(CollectiveKind::AllReduce, Library::Nccl),
            "custom_all_reduce" => collective(CollectiveKind::AllReduce, Library::Custom),
            "nccl_all_gather" => collective(CollectiveKind::AllGather, Library::Nccl),
            "nccl_reduce_scatter" => collective(CollectiveKind::ReduceScatter, Library::Nccl),
            "nccl_alltoall" => collective(CollectiveKind::AllToAll, Library::Nccl),
            "deepep_ll_dispatch" => row.exchange(Mode::LowLatency).map(CommOp::Dispatch),
            "deepep_ll_combine" => row.exchange(Mode::LowLatency).map(CommOp::Combine),
            "deepep_normal_dispatch" => row.exchange(Mode::Normal).map(CommOp::Dispatch),
            "deepep_normal_combine" => row.exchange(Mode::Normal).map(CommOp::Combine),
            _ => Err(PlannerError::UnknownCommOp { op: op.into() }),
        }
    }

    /// What the operation asks of the links of one GPU.
    pub fn demand(&self) -> Demand {
        match self {
            CommOp::Collective(collective) => collective.demand(),
            CommOp::Dispatch(exchange) => exchange.dispatch_demand(),
            CommOp::Combine(exchange) => exchange.combine_demand(),
        }
    }

    pub(super) fn coordinates(&self) -> [f64; super::calibration::COORDINATES] {
        match self {
            CommOp::Collective(collective) => collective.coordinates(),
            CommOp::Dispatch(exchange) | CommOp::Combine(exchange) => exchange.coordinates(),
        }
    }
}

struct Row<'a> {
    op: &'a str,
    params: &'a Map<String, Value>,
}

impl Row<'_> {
    fn count(&self, field: &'static str, least: u64) -> Result<usize, PlannerError> {
        let value = self.params.get(field);
        // Beyond 2^53 a float is no longer exact.
        match value.and_then(Value::as_u64).filter(|&value| value >= least && value <= 1 << 53) {
            Some(value) => Ok(value as usize),
            None => {
                let value = value.map_or("missing".into(), Value::to_string);
                Err(self.wrong(field, value, format!("a whole number of at least {least}")))
            }
        }
    }

    fn exchange(&self, mode: Mode) -> Result<Exchange, PlannerError> {
        let (ranks, nodes) = (self.count("ep", 1)?, self.count("nodes", 1)?);
        let (experts, top_k) = (self.count("E", 1)?, self.count("topk", 1)?);
        if nodes > ranks {
            return Err(self.wrong("nodes", nodes.to_string(), format!("at most the {ranks} ranks of ep")));
        }
        if top_k > experts {
            return Err(self.wrong("topk", top_k.to_string(), format!("at most the {experts} experts of E")));
        }
        Ok(Exchange {
            tokens_per_rank: self.count("tokens_per_gpu", 0)? as f64,
            hidden: self.count("h", 1)?,
            top_k,
            experts,
            group: Group { ranks, ranks_per_node: ranks.div_ceil(nodes) },
            bytes_per_value_out: FP8_WITH_SCALES,
            bytes_per_value_back: 2.0,
            copies: if mode == Mode::Normal { Copies::PerNode } else { Copies::PerExpert },
            max_over_mean: 1.0,
            mode,
            sms: if mode == Mode::Normal { self.count("sms", 1)? } else { 0 },
        })
    }

    fn wrong(&self, field: &'static str, value: String, right: String) -> PlannerError {
        PlannerError::CommParam { op: self.op.into(), field, value, right }
    }
}
