//! From claimed, predicted and possible to a verdict: one rule for all claims.

use serde::Serialize;

use super::claim::{Better, Stated};
use super::lab::Answer;
use super::regime::Regime;
use crate::report::format::number;

/// What is to be said of a claim.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "verdict", rename_all = "snake_case")]
pub enum Verdict {
    /// Inside the interval under every reading of the text.
    Holds,
    /// Inside it under one reading, or somewhere near.
    HoldsIf {
        /// Under which condition.
        condition: String,
    },
    /// Physics allows it, the prediction does not, and the search found no place where it is reached.
    NotExpected {
        /// What stands in the way.
        because: String,
    },
    /// Bytes and operations forbid it under every reading.
    CannotHold {
        /// The bound.
        because: String,
    },
    /// Not a matter of time, bytes or joules.
    OutOfReach {
        /// Why.
        because: String,
    },
}

impl Verdict {
    /// In one sentence.
    pub fn sentence(&self) -> String {
        match self {
            Verdict::Holds => "holds".to_owned(),
            Verdict::HoldsIf { condition } => format!("holds if {condition}"),
            Verdict::NotExpected { because } => format!("not expected, because {because}"),
            Verdict::CannotHold { because } => format!("cannot hold, because {because}"),
            Verdict::OutOfReach { because } => format!("out of reach: {because}"),
        }
    }

    /// In one word.
    pub fn word(&self) -> &'static str {
        match self {
            Verdict::Holds => "holds",
            Verdict::HoldsIf { .. } => "holds if",
            Verdict::NotExpected { .. } => "not expected",
            Verdict::CannotHold { .. } => "cannot hold",
            Verdict::OutOfReach { .. } => "out of reach",
        }
    }
}

/// Where a claim lies under one reading.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Standing {
    /// Inside the interval.
    Inside,
    /// Better than the bound.
    Impossible,
    /// Better than the interval.
    TooGood,
    /// Worse than the interval.
    TooBad,
}

/// The verdict on a claim. Reasons come from the reading that is nearest to it.
pub fn decide(stated: &Stated, better: Better, answers: &[Answer], regime: &Regime) -> Verdict {
    let refused = answers.iter().find(|answer| !answer.fits);
    let fitting: Vec<Answer> = answers.iter().filter(|answer| answer.fits).cloned().collect();
    if let (Some(refused), []) = (refused, fitting.as_slice()) {
        return Verdict::CannotHold { because: format!("{} {}", refused.assuming, refused.binds) };
    }
    let answers = fitting.as_slice();
    let standings: Vec<Standing> = answers.iter().map(|answer| standing(stated, better, answer)).collect();
    let count = |wanted: Standing| standings.iter().filter(|&&standing| standing == wanted).count();
    let inside = count(Standing::Inside);
    if inside == answers.len() && inside > 0 {
        return Verdict::Holds;
    }
    if inside > 0 {
        let of = answers.iter().zip(&standings).filter(|(_, standing)| **standing == Standing::Inside);
        let readings: Vec<&str> = of.map(|(answer, _)| answer.assuming.as_str()).collect();
        return Verdict::HoldsIf { condition: readings.join(", or ") };
    }
    let Some(nearest) = nearest(stated, answers) else {
        return match regime {
            Regime::Nowhere { searched } => {
                Verdict::NotExpected { because: format!("it is nowhere in the range searched ({searched})") }
            }
            _ => Verdict::OutOfReach { because: "nothing predicts it".to_owned() },
        };
    };
    if count(Standing::Impossible) == answers.len() {
        return Verdict::CannotHold { because: forbidden(stated, better, nearest, regime) };
    }
    if let Regime::Found { at } = regime {
        return Verdict::HoldsIf { condition: at.clone() };
    }
    let predicted = stated.unit.show(nearest.estimate.value);
    let beyond = factor(nearest.estimate.value, stated.value);
    if count(Standing::TooBad) == answers.len() {
        // What is worse than predicted is possible: anything may be slower.
        let side = match better {
            Better::Less => "more than",
            Better::More => "below",
        };
        let condition = if beyond.is_finite() {
            format!("something loses a factor of {} {side} the prediction ({predicted})", number(beyond))
        } else {
            format!("something is spent on what the plan does not have ({predicted} is predicted)")
        };
        return Verdict::HoldsIf { condition };
    }
    if count(Standing::TooBad) > 0 {
        let readings: Vec<&str> = answers.iter().map(|answer| answer.assuming.as_str()).collect();
        return Verdict::HoldsIf { condition: format!("the truth is between: {}", readings.join("; and: ")) };
    }
    let nowhere = match regime {
        Regime::Nowhere { searched } => format!("; nowhere in the range searched ({searched})"),
        _ => String::new(),
    };
    let binds = if nearest.binds.is_empty() { String::new() } else { format!(": {}", nearest.binds) };
    Verdict::NotExpected { because: format!("{predicted} is predicted{}{binds}{nowhere}", off(beyond)) }
}

fn forbidden(stated: &Stated, better: Better, nearest: &Answer, regime: &Regime) -> String {
    let bound = nearest.bound.as_ref().expect("what is impossible is beyond a bound");
    let (at_best, off) = (stated.unit.show(bound.value), off(factor(bound.value, stated.value)));
    let side = match better {
        Better::Less => "at least",
        Better::More => "at most",
    };
    let mut because = format!("{side} {at_best} follows from {}{off}", bound.arithmetic);
    if !nearest.assuming.is_empty() {
        because += &format!(" ({})", nearest.assuming);
    }
    match regime {
        Regime::Found { at } => because += &format!("; it would with {at}"),
        Regime::Nowhere { searched } => because += &format!("; nowhere in the range searched ({searched})"),
        Regime::NotSearched => {}
    }
    because
}

fn standing(stated: &Stated, better: Better, answer: &Answer) -> Standing {
    let (low, high) = (answer.estimate.low, answer.estimate.high);
    let limit = answer.bound.as_ref().filter(|bound| bound.limits).map(|bound| bound.value);
    // Everything as a cost: rates are turned round.
    let (best_claim, worst_claim, best, worst, limit) = match better {
        Better::Less => (stated.low, stated.high, low, high, limit),
        Better::More => (-stated.high, -stated.low, -high, -low, limit.map(|limit| -limit)),
    };
    // Rounding is in the claim's favour, and the last bit of a float is nobody's claim.
    let slack = 1e-9 * stated.value.abs();
    if limit.is_some_and(|limit| worst_claim + slack < limit) {
        Standing::Impossible
    } else if worst_claim + slack < best {
        Standing::TooGood
    } else if best_claim - slack > worst && !stated.open {
        Standing::TooBad
    } else {
        Standing::Inside
    }
}

/// The reading whose prediction differs by the least factor.
fn nearest<'a>(stated: &Stated, answers: &'a [Answer]) -> Option<&'a Answer> {
    let distance = |answer: &Answer| factor(answer.estimate.value, stated.value);
    answers.iter().min_by(|a, b| distance(a).total_cmp(&distance(b)))
}

/// How many times one is the other, at least 1; infinite where one is nothing, or a gain and the other a loss.
fn factor(a: f64, b: f64) -> f64 {
    if a * b > 0.0 { (a / b).max(b / a) } else { f64::INFINITY }
}

fn off(factor: f64) -> String {
    if factor.is_finite() { format!(", {}× off", number(factor)) } else { String::new() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::estimate::Estimate;
    use crate::papers::claim::unit::{MS, PER_S, PERCENT};
    use crate::papers::lab::Bound;

    fn answer(assuming: &str, [low, value, high]: [f64; 3], limit: Option<f64>) -> Answer {
        let bound = limit.map(|value| Bound { value, arithmetic: "a / b".into(), limits: true });
        let estimate = Estimate { value, low, high };
        Answer { assuming: assuming.into(), estimate, bound, binds: "attention takes 70 %".into(), fits: true }
    }

    #[test]
    fn every_case_has_its_verdict() {
        let nowhere = Regime::Nowhere { searched: "8 to 16 GPUs".into() };
        let found = Regime::Found { at: "64 sequences".into() };
        // Claimed 2.0 ms; times in seconds.
        type Case<'c> = (&'c str, Vec<[f64; 3]>, Option<f64>, &'c Regime, &'c str);
        let cases: [Case; 9] = [
            ("inside", vec![[1.8e-3, 2.1e-3, 2.4e-3]], None, &nowhere, "holds"),
            ("at the edge, by rounding", vec![[2.04e-3, 2.1e-3, 2.4e-3]], None, &nowhere, "holds"),
            (
                "under one reading",
                vec![[1.8e-3, 2.1e-3, 2.4e-3], [5e-3, 6e-3, 7e-3]],
                None,
                &nowhere,
                "holds if reading 0",
            ),
            ("forbidden", vec![[3e-3, 4e-3, 5e-3]], Some(2.5e-3), &nowhere, "cannot hold, because at least 2.50 ms"),
            ("forbidden, elsewhere not", vec![[3e-3, 4e-3, 5e-3]], Some(2.5e-3), &found, "cannot hold, because"),
            ("not reached", vec![[3e-3, 4e-3, 5e-3]], Some(1e-3), &nowhere, "not expected, because 4.00 ms"),
            ("reached elsewhere", vec![[3e-3, 4e-3, 5e-3]], Some(1e-3), &found, "holds if 64 sequences"),
            (
                "slower than need be",
                vec![[0.3e-3, 0.5e-3, 0.8e-3]],
                None,
                &nowhere,
                "holds if something loses a factor of 4.00",
            ),
            (
                "between readings",
                vec![[0.3e-3, 0.5e-3, 0.8e-3], [3e-3, 4e-3, 5e-3]],
                None,
                &nowhere,
                "holds if the truth is between: reading 0; and: reading 1",
            ),
        ];
        for (name, estimates, limit, regime, expected) in cases {
            let answers: Vec<Answer> = estimates
                .into_iter()
                .enumerate()
                .map(|(idx, estimate)| answer(&format!("reading {idx}"), estimate, limit))
                .collect();
            let verdict = decide(&Stated::new("2.0", MS), Better::Less, &answers, regime);
            assert!(verdict.sentence().starts_with(expected), "{name}: {}", verdict.sentence());
        }
    }

    #[test]
    fn rates_are_better_the_other_way_round() {
        let of = |text, estimate, limit| {
            let answers = [answer("", estimate, limit)];
            decide(&Stated::new(text, PER_S), Better::More, &answers, &Regime::NotSearched).word()
        };
        assert_eq!(of("1,000", [400.0, 500.0, 600.0], Some(900.0)), "cannot hold");
        assert_eq!(of("800", [400.0, 500.0, 600.0], Some(900.0)), "not expected");
        assert_eq!(of("550", [400.0, 500.0, 600.0], Some(900.0)), "holds");
        assert_eq!(of("100", [400.0, 500.0, 600.0], Some(900.0)), "holds if");
        assert_eq!(of(">100", [400.0, 500.0, 600.0], Some(900.0)), "holds");
    }

    #[test]
    fn what_does_not_fit_is_no_way_to_hold() {
        let large =
            Answer { fits: false, binds: "does not fit".into(), ..answer("with all", [1.8e-3, 2e-3, 2.2e-3], None) };
        let slow = answer("with few", [5e-3, 6e-3, 7e-3], None);
        let of = |answers: &[Answer]| decide(&Stated::new("2.0", MS), Better::Less, answers, &Regime::NotSearched);
        assert_eq!(of(std::slice::from_ref(&large)).sentence(), "cannot hold, because with all does not fit");
        assert_eq!(of(&[large, slow]).word(), "not expected");
    }

    #[test]
    fn a_loss_is_no_factor_of_a_gain() {
        let of = |estimate| {
            decide(&Stated::new("50", PERCENT), Better::More, &[answer("", estimate, None)], &Regime::NotSearched)
        };
        let loss = of([-0.6, -0.5, -0.4]).sentence();
        assert!(loss.starts_with("not expected, because -50.0% is predicted: attention"), "{loss}");
        let nothing =
            decide(&Stated::new("2.9", PERCENT), Better::Less, &[answer("", [0.0; 3], None)], &Regime::NotSearched);
        assert!(nothing.sentence().contains("what the plan does not have"), "{}", nothing.sentence());
    }

    #[test]
    fn a_ratio_of_bounds_limits_nothing() {
        let bound = Bound { value: 0.1, arithmetic: "both at their bounds".into(), limits: false };
        let answers = [Answer { bound: Some(bound), ..answer("", [0.2, 0.3, 0.4], None) }];
        let verdict = decide(&Stated::new("50", PERCENT), Better::More, &answers, &Regime::NotSearched);
        assert_eq!(verdict.word(), "not expected");
    }

    #[test]
    fn without_a_prediction_nothing_is_said() {
        let verdict = decide(&Stated::new("50", PERCENT), Better::More, &[], &Regime::NotSearched);
        assert_eq!(verdict.word(), "out of reach");
        let nowhere = Regime::Nowhere { searched: "4 to 32 GPUs".into() };
        assert_eq!(decide(&Stated::new("8", PERCENT), Better::Less, &[], &nowhere).word(), "not expected");
    }
}
