//! The search for what users see: what iterations promise, told again as the system that serves would show it.
//!
//! A search prices hundreds of thousands of configurations, by their iterations. What a program that was measured makes of them
//! is asked for those that came out on top; and where it breaks a goal there, or has time left, iterations get another goal.

use moesaic_plan::Strategy;

use super::{Found, Frontier, Goals, Podium, Point, Search};
use crate::PlannerError;
use crate::predict::Predictor;
use crate::serving::Requests;
use crate::system::System;

/// Searches at most.
const ROUNDS: usize = 4;
/// Relative change of the goals at which another search would find the same.
const SETTLED: f64 = 0.02;

impl Search<'_> {
    /// Looks for the best that users see.
    ///
    /// # Errors
    /// [`PlannerError`]: the model cannot be traced.
    pub fn run_seen(&self, predictor: &mut Predictor) -> Result<Found, PlannerError> {
        if predictor.system != System::Measured {
            return self.run(&mut predictor.iterations);
        }
        let mut asked = self.goals;
        let mut best: Option<Found> = None;
        for _ in 0..ROUNDS {
            let found = Search { goals: asked, ..self.clone() }.run(&mut predictor.iterations)?;
            let leader = found.best().or_else(|| found.nearest(&asked)).cloned();
            let seen = found.seen(&self.goals, &mut |point| self.seen(predictor, point))?;
            if best.as_ref().is_none_or(|best| better(&seen, best, &self.goals)) {
                best = Some(seen);
            }
            let Some(leader) = leader else { break };
            let shown = self.seen(predictor, &leader)?;
            let next = Goals {
                ttft: self.goals.ttft.map(|goal| goal * leader.ttft / shown.ttft),
                tpot: self.goals.tpot.map(|goal| goal * leader.tpot / shown.tpot),
            };
            if alike(asked.ttft, next.ttft) && alike(asked.tpot, next.tpot) {
                break;
            }
            asked = next;
        }
        Ok(best.expect("there is a round"))
    }

    /// A point as users see it.
    fn seen(&self, predictor: &mut Predictor, point: &Point) -> Result<Point, PlannerError> {
        let copies = point.shape.copies as f64;
        let requests = Requests { concurrency: point.concurrency / copies, ..self.requests };
        let prediction = predictor.predict(&point.layout, &requests)?;
        Ok(Point {
            ttft: prediction.ttft_s.value,
            tpot: prediction.tpot_s.value,
            throughput: prediction.tokens_per_s.value * copies,
            ..point.clone()
        })
    }
}

fn alike(a: Option<f64>, b: Option<f64>) -> bool {
    a.zip(b).is_none_or(|(a, b)| (a / b - 1.0).abs() < SETTLED)
}

/// Whether a search has found more: more throughput within the goals, or what misses them by less.
fn better(found: &Found, than: &Found, goals: &Goals) -> bool {
    let rate = |found: &Found| found.best().map_or(0.0, |point| point.merit().throughput);
    let missed =
        |found: &Found| found.nearest(goals).map_or(f64::INFINITY, |near| goals.missed_by(near.ttft, near.tpot));
    match rate(found).total_cmp(&rate(than)) {
        std::cmp::Ordering::Equal => missed(found) < missed(than),
        order => order.is_gt(),
    }
}

impl Found {
    /// All that is in it, told again and ranked anew.
    fn seen(
        self,
        goals: &Goals,
        tell: &mut impl FnMut(&Point) -> Result<Point, PlannerError>,
    ) -> Result<Found, PlannerError> {
        let mut strategies: Vec<(Strategy, Podium)> = Vec::new();
        let mut frontier = Frontier::default();
        for (strategy, podium) in self.strategies {
            let mut ranked = Podium { too_large: podium.too_large, ..Podium::default() };
            let on_frontier = self.frontier.iter().filter(|point| point.shape.strategy() == strategy);
            for point in [podium.first, podium.second, podium.nearest].iter().flatten().chain(on_frontier) {
                let told = tell(point)?;
                if goals.missed_by(told.ttft, told.tpot) <= 1.0 && !frontier.covers(&told.merit()) {
                    frontier.insert(told.clone());
                }
                ranked.take(told, goals);
            }
            strategies.push((strategy, ranked));
        }
        Ok(Found { strategies, frontier: frontier.into_points(), counts: self.counts })
    }
}
