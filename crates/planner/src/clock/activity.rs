//! What a rank spent its time on, kept over all steps.
//!
//! For a rank and a class of messages ([`Collective`]):
//!
//! - **transfer**: time in which a message of the class occupies a link from or to the rank, or is on its way to it (α);
//! - **communication**: that, and time in which an action of the rank waits for a message of the class; what counts twice,
//!   or for two messages, counts once;
//! - **exposed**: communication while the rank's compute lane executes no op; **hidden**: the rest;
//! - **waiting**: the part of the exposed that is no transfer: the sender is not done yet, or the links are busy with others.
//!
//! Classes may overlap each other, so "all classes" is less than their sum.

use moesaic_plan::Collective;

/// All classes, in the order of arrays by class.
pub const COLLECTIVES: [Collective; 5] = [
    Collective::AllReduce,
    Collective::AllToAll,
    Collective::SendReceive,
    Collective::AllGather,
    Collective::Broadcast,
];

/// Position of a class in [`COLLECTIVES`].
pub fn collective_idx(collective: Collective) -> usize {
    match collective {
        Collective::AllReduce => 0,
        Collective::AllToAll => 1,
        Collective::SendReceive => 2,
        Collective::AllGather => 3,
        Collective::Broadcast => 4,
    }
}

/// Seconds of communication, as the module says.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct CommSeconds {
    /// A message on a link, or somebody waiting for one.
    pub communication: f64,
    /// The part of it in which the compute lane executes no op.
    pub exposed: f64,
    /// The part of that in which no message is on a link or on its way.
    pub waiting: f64,
}

/// Seconds of one rank.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RankSeconds {
    /// Its compute lane executes ops.
    pub computing: f64,
    /// By class, in the order of [`COLLECTIVES`].
    pub by_class: [CommSeconds; 5],
    /// All classes.
    pub all: CommSeconds,
    /// It executes ops of experts.
    pub experts: f64,
    /// The part of that in which a message from or to this rank is on its way.
    pub experts_overlapped: f64,
}

/// Spans of time that are not summed up yet, because more may come between them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Activity {
    pub(crate) computing: Spans,
    pub(crate) experts: Spans,
    pub(crate) transfers: [Spans; 5],
    pub(crate) waits: [Spans; 5],
}

impl Activity {
    /// Sums up everything before a time from which on everything new will be.
    pub(crate) fn settle(&mut self, until: f64, seconds: &mut RankSeconds) {
        let computing = self.computing.take(until);
        let experts = self.experts.take(until);
        let (mut all_transfers, mut all_waits) = (Spans::default(), Spans::default());
        for class in 0..5 {
            let transfers = self.transfers[class].take(until);
            let waits = self.waits[class].take(until);
            add(&mut seconds.by_class[class], &transfers, &waits, &computing);
            all_transfers.0.extend(&transfers.0);
            all_waits.0.extend(&waits.0);
        }
        let all_transfers = all_transfers.take(f64::INFINITY);
        add(&mut seconds.all, &all_transfers, &all_waits, &computing);
        seconds.computing += computing.length();
        seconds.experts += experts.length();
        seconds.experts_overlapped += experts.overlap(&all_transfers);
    }
}

fn add(to: &mut CommSeconds, transfers: &Spans, waits: &Spans, computing: &Spans) {
    let mut both = Spans(transfers.0.iter().chain(&waits.0).copied().collect());
    let both = both.take(f64::INFINITY);
    let exposed = both.length() - both.overlap(computing);
    to.communication += both.length();
    to.exposed += exposed;
    // Transfers are a part of both.
    to.waiting += exposed - (transfers.length() - transfers.overlap(computing));
}

/// Spans of time. What [`Spans::take`] gives is ascending and disjoint.
#[derive(Clone, Debug, Default)]
pub(crate) struct Spans(Vec<(f64, f64)>);

impl Spans {
    pub(crate) fn push(&mut self, start: f64, end: f64) {
        if end > start {
            self.0.push((start, end));
        }
    }

    /// Takes what is before a time out of them.
    fn take(&mut self, until: f64) -> Spans {
        self.0.sort_by(|a, b| a.0.total_cmp(&b.0));
        let mut taken: Vec<(f64, f64)> = Vec::new();
        let mut kept = Vec::new();
        for &(start, end) in &self.0 {
            if end > until {
                kept.push((start.max(until), end));
            }
            let end = end.min(until);
            match taken.last_mut() {
                Some(last) if start <= last.1 => last.1 = last.1.max(end),
                _ if start < end => taken.push((start, end)),
                _ => {}
            }
        }
        self.0 = kept;
        Spans(taken)
    }

    fn length(&self) -> f64 {
        self.0.iter().map(|(start, end)| end - start).sum()
    }

    fn overlap(&self, other: &Spans) -> f64 {
        let (mut a, mut b, mut sum) = (0, 0, 0.0);
        while a < self.0.len() && b < other.0.len() {
            let (mine, others) = (self.0[a], other.0[b]);
            sum += (mine.1.min(others.1) - mine.0.max(others.0)).max(0.0);
            if mine.1 < others.1 {
                a += 1;
            } else {
                b += 1;
            }
        }
        sum
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn spans(list: &[(u8, u8)]) -> Spans {
        let mut spans = Spans::default();
        list.iter().for_each(|&(start, length)| spans.push(start.into(), (start as f64) + f64::from(length)));
        spans
    }

    /// Second by second.
    fn covered(list: &[(u8, u8)], second: usize) -> bool {
        list.iter().any(|&(start, length)| (start as usize..start as usize + length as usize).contains(&second))
    }

    proptest! {
        #[test]
        fn seconds_are_those_counted_one_by_one(
            computing in prop::collection::vec((0u8..60, 0u8..9), 0..12),
            transfers in prop::collection::vec((0u8..60, 0u8..9), 0..12),
            waits in prop::collection::vec((0u8..60, 0u8..9), 0..12),
            cut in 0u8..70,
        ) {
            let mut activity = Activity { computing: spans(&computing), experts: spans(&computing), ..Default::default() };
            activity.transfers[1] = spans(&transfers);
            activity.waits[1] = spans(&waits);
            let mut seconds = RankSeconds::default();
            // In two parts, as steps do it.
            activity.settle(cut.into(), &mut seconds);
            activity.settle(f64::INFINITY, &mut seconds);
            let count = |holds: &dyn Fn(usize) -> bool| (0..80).filter(|&second| holds(second)).count() as f64;
            let communicates = |at| covered(&transfers, at) || covered(&waits, at);
            prop_assert_eq!(seconds.computing, count(&|at| covered(&computing, at)));
            prop_assert_eq!(seconds.all.communication, count(&communicates));
            prop_assert_eq!(seconds.all.exposed, count(&|at| communicates(at) && !covered(&computing, at)));
            prop_assert_eq!(seconds.all.waiting, count(&|at| {
                covered(&waits, at) && !covered(&transfers, at) && !covered(&computing, at)
            }));
            prop_assert_eq!(seconds.experts_overlapped, count(&|at| covered(&computing, at) && covered(&transfers, at)));
            prop_assert_eq!(seconds.all, seconds.by_class[1]);
        }
    }
}
