//! What can go wrong when records are priced and written down.

use std::fmt;

use moesaic_plan::{MessageKind, Rank};

/// Why a step cannot be priced, or a result not be written.
#[derive(Debug, thiserror::Error)]
pub enum PlannerError {
    /// The model cannot be cut as asked.
    #[error(transparent)]
    Plan(#[from] moesaic_plan::PlanError),
    /// Weights, activations and one request are more than a GPU holds.
    #[error(
        "does not fit on {gpus} GPUs: weights of {weights}, activations, messages and the KV cache of one request of \
         {longest} tokens take {needed} of {gpu}, of which {budget} may be used (room for {kv_tokens} tokens); more GPUs, \
         shorter requests or smaller weights would fit"
    )]
    DoesNotFit {
        /// GPUs of the plan.
        gpus: usize,
        /// Their name.
        gpu: String,
        /// What may be used of one.
        budget: moesaic_spec::Bytes,
        /// Weights of the fullest rank.
        weights: moesaic_spec::Bytes,
        /// All that the fullest rank needs.
        needed: moesaic_spec::Bytes,
        /// Tokens that the KV cache would hold.
        kv_tokens: u64,
        /// Tokens of a request.
        longest: u64,
    },
    /// The model's own forward pass refuses it.
    #[error(transparent)]
    Model(#[from] moesaic_model::ModelError),
    /// A receive whose send is nowhere.
    #[error("{at} waits for {kind} from rank {from} (tag {tag:#x}), which the records of this step never send")]
    NeverSent {
        /// Who waits.
        at: Place,
        /// About what.
        kind: MessageKind,
        /// For whom.
        from: Rank,
        /// Which message.
        tag: u64,
    },
    /// A send whose receive is nowhere.
    #[error("{at} sends {kind} to rank {to} (tag {tag:#x}), which the records of this step never receive")]
    NeverReceived {
        /// Who sent it.
        at: Place,
        /// About what.
        kind: MessageKind,
        /// To whom.
        to: Rank,
        /// Which message.
        tag: u64,
    },
    /// Two messages of one name.
    #[error(
        "{at} sends {kind} to rank {to} with tag {tag:#x}, which names another message between the two in this step"
    )]
    SentTwice {
        /// Who sent the second.
        at: Place,
        /// About what.
        kind: MessageKind,
        /// To whom.
        to: Rank,
        /// The name.
        tag: u64,
    },
    /// Both ends know a message of different sizes.
    #[error("{at} receives {received} bytes of {kind} from rank {from}, which sent {sent}")]
    OtherSize {
        /// Who received it.
        at: Place,
        /// About what.
        kind: MessageKind,
        /// From whom.
        from: Rank,
        /// Bytes at the sender.
        sent: u64,
        /// Bytes at the receiver.
        received: u64,
    },
    /// The other end of a message is not in the plan.
    #[error("{at} has a message to or from rank {peer}; the plan has ranks 0 to {last}")]
    NoSuchRank {
        /// Whose.
        at: Place,
        /// The other end.
        peer: u32,
        /// Highest rank.
        last: usize,
    },
    /// Something else than one schedule and one record for each rank.
    #[error("a step of {ranks} ranks needs as many schedules and records, got {schedules} and {records}")]
    RankCount {
        /// Ranks of the clock.
        ranks: usize,
        /// Schedules.
        schedules: usize,
        /// Records.
        records: usize,
    },
    /// Records that are not those of the schedule.
    #[error("rank {rank}: the record of action {action} is out of order or beyond the schedule's {actions} actions")]
    RecordOrder {
        /// Whose.
        rank: Rank,
        /// Index in the record.
        action: usize,
        /// Actions of the schedule.
        actions: usize,
    },
    /// A table of measurements that cannot be used.
    #[error("{file}, line {line}{}: {why}", if column.is_empty() { String::new() } else { format!(", column {column}") })]
    Table {
        /// Which table.
        file: String,
        /// Line, from 1.
        line: usize,
        /// Column; empty if the whole line is wrong.
        column: String,
        /// What is wrong.
        why: String,
    },
    /// All rows of a file were passed over.
    #[error("{file}: none of its {rows} rows can be predicted; the first, line {line}: {why}")]
    NothingToValidate {
        /// Which file.
        file: String,
        /// Its rows.
        rows: usize,
        /// Line of the first, from 1.
        line: usize,
        /// Why it was passed over.
        why: String,
    },
    /// A parameter that no op can have.
    #[error("{name} is {value}, and should be {right}")]
    Parameter {
        /// Its name.
        name: String,
        /// What it is.
        value: String,
        /// What would be right.
        right: String,
    },
    /// An operation that no table has.
    #[error(
        "{op:?} is no operation between GPUs; there are nccl_all_reduce, nccl_all_gather, nccl_reduce_scatter, \
         nccl_alltoall, custom_all_reduce, deepep_ll_dispatch, deepep_ll_combine, deepep_normal_dispatch and \
         deepep_normal_combine"
    )]
    UnknownCommOp {
        /// Its name.
        op: String,
    },
    /// A column of an operation between GPUs that cannot be.
    #[error("{op}: {field} is {value}; it must be {right}")]
    CommParam {
        /// Which operation.
        op: String,
        /// Which column.
        field: &'static str,
        /// Its value.
        value: String,
        /// What would be right.
        right: String,
    },
    /// An expert load that cannot be.
    #[error("the expert load: {field} is {value}; it must be {right}")]
    Load {
        /// What is wrong.
        field: &'static str,
        /// Its value.
        value: f64,
        /// What would be right.
        right: &'static str,
    },
    /// A file of results could not be written.
    #[error("cannot write the {what}: {why}")]
    Write {
        /// Which result.
        what: &'static str,
        /// Why not.
        why: std::io::Error,
    },
    /// A file of results could not be read.
    #[error("this is no comparison of version {expected}: {why}")]
    NotAComparison {
        /// The version that is known.
        expected: u32,
        /// What is wrong.
        why: String,
    },
}

/// An action of a rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Whose.
    pub rank: Rank,
    /// Its index in the schedule.
    pub action: usize,
    /// What it does.
    pub name: &'static str,
    /// Decoder layer.
    pub layer: u32,
    /// Micro-batch.
    pub micro_batch: u32,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Place { rank, action, name, layer, micro_batch } = self;
        write!(f, "rank {rank}, action {action} ({name} of layer {layer}, micro-batch {micro_batch})")
    }
}
