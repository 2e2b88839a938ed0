//! Plans that nothing beats in everything at once.

use super::{Goals, Point};

/// What plans are compared by.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Merit {
    /// Output tokens per second for each GPU that is paid for.
    pub throughput: f64,
    /// Time per output token, seconds.
    pub tpot: f64,
    /// Time to first token, seconds.
    pub ttft: f64,
}

impl Merit {
    /// At least as good in everything.
    pub fn covers(&self, other: &Merit) -> bool {
        self.throughput >= other.throughput && self.tpot <= other.tpot && self.ttft <= other.ttft
    }
}

impl Merit {
    /// Better in everything by this share.
    pub(super) fn relaxed(self, share: f64) -> Merit {
        let Merit { throughput, tpot, ttft } = self;
        Merit { throughput: throughput * (1.0 + share), tpot: tpot * (1.0 - share), ttft: ttft * (1.0 - share) }
    }
}

/// Which lists have a merit within the goals that no other list's covers.
pub(super) fn leading<'a>(lists: impl Iterator<Item = &'a [Merit]>, goals: &Goals) -> Vec<bool> {
    let mut leading = Vec::new();
    let mut front: Vec<(Merit, usize)> = Vec::new();
    for (idx, merits) in lists.enumerate() {
        leading.push(false);
        for &merit in merits.iter().filter(|merit| goals.missed_by(merit.ttft, merit.tpot) <= 1.0) {
            if !front.iter().any(|(known, _)| known.covers(&merit)) {
                front.retain(|(known, _)| !merit.covers(known));
                front.push((merit, idx));
            }
        }
    }
    front.iter().for_each(|&(_, idx)| leading[idx] = true);
    leading
}

/// Points of which none covers another.
#[derive(Clone, Debug, Default)]
pub struct Frontier {
    points: Vec<Point>,
    merits: Vec<Merit>,
}

impl Frontier {
    /// Whether something is at least as good in everything.
    pub fn covers(&self, merit: &Merit) -> bool {
        self.merits.iter().any(|known| known.covers(merit))
    }

    /// Takes in a point that nothing covers, and drops those that it covers.
    pub fn insert(&mut self, point: Point) {
        let merit = point.merit();
        let mut idx = 0;
        while idx < self.merits.len() {
            if merit.covers(&self.merits[idx]) {
                self.merits.swap_remove(idx);
                self.points.swap_remove(idx);
            } else {
                idx += 1;
            }
        }
        self.merits.push(merit);
        self.points.push(point);
    }

    /// All points, by time per output token.
    pub fn into_points(mut self) -> Vec<Point> {
        self.points.sort_by(|a, b| a.tpot.total_cmp(&b.tpot).then(b.throughput.total_cmp(&a.throughput)));
        self.points
    }
}

/// Of points by time per output token, those that no other beats in throughput and that time alone.
pub fn by_tpot(points: &[Point]) -> Vec<&Point> {
    staircase(points, |point| point.tpot)
}

/// The same for the time to first token.
pub fn by_ttft(points: &[Point]) -> Vec<&Point> {
    staircase(points, |point| point.ttft)
}

fn staircase(points: &[Point], time: impl Fn(&Point) -> f64) -> Vec<&Point> {
    let mut sorted: Vec<&Point> = points.iter().collect();
    let rate = |point: &Point| point.merit().throughput;
    sorted.sort_by(|a, b| time(a).total_cmp(&time(b)).then(rate(b).total_cmp(&rate(a))));
    let mut best = 0.0;
    sorted.retain(|point| {
        rate(point) > best && {
            best = rate(point);
            true
        }
    });
    sorted
}
