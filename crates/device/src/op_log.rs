//! What was done: one [`OpCall`] for every op, real or on `Meta`.

/// How much of something an op does. Where routing decides, the exact amount is not known before the run: `expected` is
/// its mean under uniform routing and `bound` its maximum. A real run records what happened, in both fields.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Amount {
    /// Mean.
    pub expected: f64,
    /// Maximum.
    pub bound: u64,
}

impl Amount {
    /// Known exactly.
    pub fn exact(amount: u64) -> Amount {
        Amount { expected: amount as f64, bound: amount }
    }
}

/// Which queue of a device the op runs in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stream {
    /// Computation.
    Compute,
    /// Exchange between ranks.
    Comm,
}

/// The other end of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Peer {
    /// The rank at the other end.
    pub rank: u32,
    /// Which message between the two; the same number at both ends.
    pub tag: u64,
    /// It goes there; otherwise it comes from there.
    pub outbound: bool,
}

/// One op, as asked for.
#[derive(Clone, Debug, PartialEq)]
pub struct OpCall {
    /// The op's folder in `kernels`.
    pub op: &'static str,
    /// Sizes by the letters of the op's contract.
    pub dims: Vec<(&'static str, u64)>,
    /// Floating-point operations; a multiply-add is two.
    pub flops: Amount,
    /// Bytes that must cross the memory bus: every input and output once.
    pub bytes: Amount,
    /// Queue.
    pub stream: Stream,
    /// For a message: its other end. `bytes` are then those that cross between the two.
    pub peer: Option<Peer>,
}

impl OpCall {
    /// A computation of known size.
    pub fn compute(op: &'static str, dims: &[(&'static str, usize)], flops: u64, bytes: u64) -> OpCall {
        OpCall {
            op,
            dims: dims.iter().map(|&(name, n)| (name, n as u64)).collect(),
            flops: Amount::exact(flops),
            bytes: Amount::exact(bytes),
            stream: Stream::Compute,
            peer: None,
        }
    }

    /// A message to or from another rank.
    pub fn message(peer: Peer, bytes: Amount) -> OpCall {
        OpCall {
            op: if peer.outbound { "send" } else { "receive" },
            dims: Vec::new(),
            flops: Amount::exact(0),
            bytes,
            stream: Stream::Comm,
            peer: Some(peer),
        }
    }
}
