//! What ranks report after something went wrong with one of them, and which report explains the others.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use moesaic_plan::Rank as RankId;

use crate::EngineError;

/// How long others have to report after a rank's own failure: whoever waits for it knows at once.
const PATIENCE: Duration = Duration::from_secs(1);

/// The reports, in the order in which they came.
#[derive(Default)]
pub(super) struct Failures(Vec<(RankId, EngineError)>);

impl Failures {
    /// Takes in a report; until when more are waited for, at most `until`.
    pub(super) fn push(&mut self, rank: RankId, error: EngineError, until: Instant) -> Instant {
        let is_cause = error.severity() == 0;
        self.0.push((rank, error));
        // After a wait that ran out, the others' waits run out as well, each when it does.
        if is_cause { until.min(Instant::now() + PATIENCE) } else { until }
    }

    /// Whether nothing more is to be heard: the last rank that keeps silent is one that somebody waited for in vain. If there
    /// are several, some of them may still be waiting for another.
    pub(super) fn explain(&self, silent: &BTreeSet<RankId>) -> bool {
        let is_awaited = |rank: &RankId| self.0.iter().any(|(_, error)| error.awaited() == Some(*rank));
        silent.len() == 1 && silent.iter().all(is_awaited)
    }

    /// All reports are in, but for those of ranks that have kept silent for so long.
    pub(super) fn check(self, silent: &BTreeSet<RankId>, waited: Duration) -> Result<(), EngineError> {
        match (self.0.is_empty(), silent.first()) {
            (false, _) => Err(self.root_cause()),
            (true, Some(&rank)) => Err(EngineError::Stalled { rank, seconds: waited.as_secs_f64() }),
            (true, None) => Ok(()),
        }
    }

    /// A rank's own failure before a wait that ran out, and that before the news that somebody has ended. Of waits, one for a
    /// rank that reports nothing: who does report waited for somebody else.
    fn root_cause(self) -> EngineError {
        let reports: Vec<RankId> = self.0.iter().map(|&(rank, _)| rank).collect();
        let waited_too = |error: &EngineError| error.awaited().is_some_and(|rank| reports.contains(&rank));
        let first = self.0.into_iter().min_by_key(|(_, error)| (error.severity(), waited_too(error)));
        first.expect("somebody failed").1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn waited(for_rank: u32) -> EngineError {
        EngineError::Remote { severity: 1, awaited: Some(RankId(for_rank)), what: format!("waited for {for_rank}") }
    }

    fn told(severity: u8) -> EngineError {
        EngineError::Remote { severity, awaited: None, what: format!("severity {severity}") }
    }

    fn failures(reports: Vec<(u32, EngineError)>) -> Failures {
        Failures(reports.into_iter().map(|(rank, error)| (RankId(rank), error)).collect())
    }

    #[test]
    fn who_waits_for_a_silent_rank_explains_who_waits_for_him() {
        let chain = || failures(vec![(3, waited(2)), (2, waited(1)), (4, told(2)), (1, waited(0))]);
        assert_eq!(chain().root_cause().to_string(), "waited for 0");
        assert!(chain().explain(&BTreeSet::from([RankId(0)])));
        assert!(!chain().explain(&BTreeSet::from([RankId(0), RankId(1)])));
        assert!(!chain().explain(&BTreeSet::from([RankId(5)])));
    }

    #[test]
    fn silence_is_named_where_nobody_reports() {
        let stalled = Failures::default().check(&BTreeSet::from([RankId(2), RankId(5)]), Duration::from_secs(9));
        assert_eq!(stalled.unwrap_err().to_string(), "rank 2 has not answered for 9.0 s");
        assert!(Failures::default().check(&BTreeSet::new(), Duration::ZERO).is_ok());
    }

    #[test]
    fn a_failure_of_its_own_explains_all_waits() {
        let all = failures(vec![(0, told(2)), (1, waited(2)), (2, told(0))]);
        assert_eq!(all.root_cause().to_string(), "severity 0");
    }

    #[test]
    fn only_a_failure_of_its_own_shortens_the_wait_for_others() {
        let until = Instant::now() + Duration::from_secs(1000);
        let mut failures = Failures::default();
        assert_eq!(failures.push(RankId(0), waited(1), until), until);
        assert!(failures.push(RankId(0), told(0), until) < until);
    }
}
