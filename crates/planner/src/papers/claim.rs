//! A claim: a figure of a text, where it stands, and how it is predicted.

use serde::Serialize;

use super::lab::Answer;
use super::regime::Regime;
use super::verdict::{Verdict, decide};
use crate::report::format::{integer, number};

/// A unit that a text uses.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Unit {
    /// As written behind the number.
    pub name: &'static str,
    /// SI units (seconds, bytes, joules, …) that it is.
    pub scale: f64,
}

/// Units of the texts.
pub mod unit {
    use super::Unit;

    /// Milliseconds.
    pub const MS: Unit = Unit { name: "ms", scale: 1e-3 };
    /// Microseconds.
    pub const US: Unit = Unit { name: "µs", scale: 1e-6 };
    /// Seconds.
    pub const S: Unit = Unit { name: "s", scale: 1.0 };
    /// Tokens per second.
    pub const PER_S: Unit = Unit { name: "tokens/s", scale: 1.0 };
    /// Hundredths.
    pub const PERCENT: Unit = Unit { name: "%", scale: 0.01 };
    /// A plain number.
    pub const NUMBER: Unit = Unit { name: "", scale: 1.0 };
    /// A ratio.
    pub const TIMES: Unit = Unit { name: "×", scale: 1.0 };
    /// Gigabytes.
    pub const GB: Unit = Unit { name: "GB", scale: 1e9 };
    /// Megabytes.
    pub const MB: Unit = Unit { name: "MB", scale: 1e6 };
    /// Millijoules.
    pub const MJ: Unit = Unit { name: "mJ", scale: 1e-3 };
    /// GPUs.
    pub const GPUS: Unit = Unit { name: "GPUs", scale: 1.0 };
    /// Terabytes per second.
    pub const TB_PER_S: Unit = Unit { name: "TB/s", scale: 1e12 };
}

impl Unit {
    /// A value in SI units as it is written in this unit.
    pub fn show(self, value: f64) -> String {
        let counts = matches!(self.name, "" | "GPUs");
        let number = if counts { plain(value / self.scale) } else { number(value / self.scale) };
        match self.name {
            "" => number,
            "%" | "×" => format!("{number}{}", self.name),
            name => format!("{number} {name}"),
        }
    }
}

/// Counts whole, anything else with the digits that count.
pub(super) fn plain(value: f64) -> String {
    if value.fract() == 0.0 && value.abs() < 1e15 {
        let sign = if value < 0.0 { "-" } else { "" };
        format!("{sign}{}", integer(value.abs() as u64))
    } else {
        number(value)
    }
}

/// A number as a text writes it: with the digits that it gives, and so with how far it may be rounded.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Stated {
    /// As written, without its unit: `8,450`, `>90`.
    pub text: &'static str,
    /// Its unit.
    pub unit: Unit,
    /// In SI units.
    pub value: f64,
    /// Least that is rounded to it.
    pub low: f64,
    /// Most that is rounded to it.
    pub high: f64,
    /// The text says "at least" or "at most": whatever is better is meant, too.
    pub open: bool,
}

impl Stated {
    /// Reads a number; `<`, `>` or `~` may stand before it.
    ///
    /// # Panics
    /// It is no number: claims are ours to write down rightly.
    pub fn new(text: &'static str, unit: Unit) -> Stated {
        let digits: String = text.chars().filter(|c| c.is_ascii_digit() || *c == '.').collect();
        let number: f64 = digits.parse().unwrap_or_else(|_| panic!("{text:?} is no number"));
        let decimals = digits.split_once('.').map_or(0, |(_, after)| after.len());
        let open = text.starts_with(['<', '>']);
        // "More than 95" is no rounded 94.5.
        let half = if open { 0.0 } else { 0.5 * 10f64.powi(-(decimals as i32)) };
        Stated {
            text,
            unit,
            value: number * unit.scale,
            low: (number - half) * unit.scale,
            high: (number + half) * unit.scale,
            open,
        }
    }

    /// As people read it.
    pub fn show(&self) -> String {
        match self.unit.name {
            "" => self.text.to_owned(),
            "%" | "×" => format!("{}{}", self.text, self.unit.name),
            name => format!("{} {name}", self.text),
        }
    }
}

/// Which way a figure is good.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Better {
    /// Times, bytes, joules.
    Less,
    /// Rates, utilizations, improvements.
    More,
}

/// A figure of a text.
#[derive(Clone, Debug)]
pub struct Claim {
    /// Section or table.
    pub at: &'static str,
    /// What it is a figure of.
    pub what: String,
    /// The figure.
    pub stated: Stated,
    /// Which way it is good.
    pub better: Better,
}

impl Claim {
    /// A figure where less is better.
    pub fn less(at: &'static str, what: impl Into<String>, text: &'static str, unit: Unit) -> Claim {
        Claim { at, what: what.into(), stated: Stated::new(text, unit), better: Better::Less }
    }

    /// A figure where more is better.
    pub fn more(at: &'static str, what: impl Into<String>, text: &'static str, unit: Unit) -> Claim {
        Claim { at, what: what.into(), stated: Stated::new(text, unit), better: Better::More }
    }

    /// Held against what is predicted under each reading of the text.
    pub fn judged(self, answers: Vec<Answer>, regime: Regime) -> Finding {
        let answers: Vec<Answer> = answers.into_iter().map(|answer| answer.within_physics(self.better)).collect();
        let verdict = decide(&self.stated, self.better, &answers, &regime);
        Finding { at: self.at, what: self.what, stated: self.stated, better: self.better, answers, verdict }
    }

    /// What no simulation can tell.
    pub fn out_of_reach(self, because: &str) -> Finding {
        let verdict = Verdict::OutOfReach { because: because.to_owned() };
        Finding { at: self.at, what: self.what, stated: self.stated, better: self.better, answers: Vec::new(), verdict }
    }
}

/// A claim with all that is said of it.
#[derive(Clone, Debug, Serialize)]
pub struct Finding {
    /// Section or table.
    pub at: &'static str,
    /// What it is a figure of.
    pub what: String,
    /// The figure.
    pub stated: Stated,
    /// Which way it is good.
    pub better: Better,
    /// What is predicted, under each reading of the text.
    pub answers: Vec<Answer>,
    /// What comes of it.
    pub verdict: Verdict,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_the_precision_that_they_are_written_with() {
        let tpot = Stated::new("1.82", unit::MS);
        assert!((tpot.low - 1.815e-3).abs() < 1e-12 && (tpot.high - 1.825e-3).abs() < 1e-12 && !tpot.open);
        let rate = Stated::new("13,289", unit::PER_S);
        assert_eq!((rate.value, rate.low, rate.show().as_str()), (13289.0, 13288.5, "13,289 tokens/s"));
        let open = Stated::new(">95", unit::PERCENT);
        assert!(open.open && (open.value - 0.95).abs() < 1e-12);
        assert_eq!((open.show().as_str(), unit::MJ.show(0.00413).as_str()), (">95%", "4.13 mJ"));
    }
}
