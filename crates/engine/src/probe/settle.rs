//! Repeating a call until its median stands still.

use std::time::{Duration, Instant};

use crate::EngineError;

/// How hard to try.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// The median is settled when its 95 % interval is this narrow on both sides, relative to it.
    pub tolerance: f64,
    /// Least time spent on calls, unless that is more than `most`: what else runs here comes and goes in milliseconds, and a
    /// moment of it is no median.
    pub least: Duration,
    /// Longest time spent on calls; the first few are made in any case.
    pub most: Duration,
}

impl Default for Effort {
    fn default() -> Effort {
        Effort { tolerance: 0.02, least: Duration::from_millis(50), most: Duration::from_millis(500) }
    }
}

impl Effort {
    /// As few calls as there can be: for tests.
    pub fn least() -> Effort {
        Effort { tolerance: f64::INFINITY, least: Duration::ZERO, most: Duration::ZERO }
    }
}

/// What repeated calls took.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Timing {
    /// The median, seconds.
    pub seconds: f64,
    /// Half of the median's 95 % interval over the median.
    pub spread: f64,
    /// Calls.
    pub calls: usize,
    /// The interval became as narrow as was asked for.
    pub settled: bool,
}

/// Calls that are made in any case, after one that is not counted.
const MIN_CALLS: usize = 3;
/// Fewer say nothing about an interval.
const ENOUGH_CALLS: usize = 9;

/// Calls until the median is settled or the time is over; each says how many seconds it took. The first call warms up and is
/// not counted.
pub(super) fn median(
    effort: &Effort,
    mut call: impl FnMut() -> Result<f64, EngineError>,
) -> Result<Timing, EngineError> {
    call()?;
    let start = Instant::now();
    let mut times = Vec::new();
    let mut next_look = ENOUGH_CALLS;
    loop {
        times.push(call()?);
        let over = times.len() >= MIN_CALLS && start.elapsed() >= effort.most;
        if times.len() >= next_look || over {
            let timing = timing(&mut times, effort);
            if over || (timing.settled && start.elapsed() >= effort.least) {
                return Ok(timing);
            }
            // Sorting costs nothing when the number of calls grows by a share each time.
            next_look = times.len() + times.len() / 4 + 1;
        }
    }
}

/// Seconds of a call.
pub(super) fn timed(call: impl FnOnce() -> Result<(), EngineError>) -> Result<f64, EngineError> {
    let start = Instant::now();
    call()?;
    Ok(start.elapsed().as_secs_f64())
}

/// The median and its interval by order statistics: the share of values below the median is binomial, whatever their
/// distribution.
fn timing(times: &mut [f64], effort: &Effort) -> Timing {
    times.sort_by(f64::total_cmp);
    let n = times.len();
    let seconds = times[n / 2];
    let half = 0.98 * (n as f64).sqrt();
    let low = (n as f64 / 2.0 - half).floor().max(0.0) as usize;
    let high = ((n as f64 / 2.0 + half).ceil() as usize).min(n - 1);
    let spread = (times[high] - times[low]) / 2.0 / seconds;
    let settled = n >= ENOUGH_CALLS && spread <= effort.tolerance;
    Timing { seconds, spread, calls: n, settled }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outliers_do_not_move_the_median() {
        let mut times: Vec<f64> = (0..100).map(|i| if i % 10 == 0 { 50.0 } else { 1.0 }).collect();
        let timing = timing(&mut times, &Effort::default());
        assert_eq!((timing.seconds, timing.spread, timing.settled), (1.0, 0.0, true));
    }

    #[test]
    fn scattered_times_are_not_settled() {
        let mut times: Vec<f64> = (0..20).map(|i| 1.0 + f64::from(i)).collect();
        let timing = timing(&mut times, &Effort::default());
        assert!(!timing.settled && timing.spread > 0.2, "{timing:?}");
    }

    #[test]
    fn calls_end_with_the_time_and_an_error_ends_them() {
        let mut calls = 0;
        let timing = median(&Effort::least(), || {
            calls += 1;
            Ok(f64::from(calls))
        });
        let timing = timing.unwrap();
        // The first took 1, and does not count.
        assert_eq!((timing.calls, calls, timing.seconds), (3, 4, 3.0));
        let error = || EngineError::Invalid { field: "x", value: "1".into(), right: "2 is right".into() };
        assert!(median(&Effort::default(), || Err(error())).is_err());
    }
}
