//! Arithmetic between the figures of one text: do they follow from each other?

use serde::Serialize;

use super::claim::plain;

/// A number with how far it may be rounded.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Rounded {
    /// As written.
    pub value: f64,
    /// Least.
    pub low: f64,
    /// Most.
    pub high: f64,
}

/// A number as written, rounded in its last digit: `13,289`, `1.82`.
///
/// # Panics
/// It is no number: texts are ours to write down rightly.
pub fn n(text: &'static str) -> Rounded {
    let stated = super::claim::Stated::new(text, super::claim::unit::NUMBER);
    Rounded { value: stated.value, low: stated.low, high: stated.high }
}

/// A number that is exact.
pub fn exactly(value: f64) -> Rounded {
    Rounded { value, low: value, high: value }
}

impl Rounded {
    fn by(self, other: Rounded, f: impl Fn(f64, f64) -> f64) -> Rounded {
        let corners =
            [f(self.low, other.low), f(self.low, other.high), f(self.high, other.low), f(self.high, other.high)];
        Rounded {
            value: f(self.value, other.value),
            low: corners.into_iter().fold(f64::INFINITY, f64::min),
            high: corners.into_iter().fold(f64::NEG_INFINITY, f64::max),
        }
    }

    /// A zero in a table means that there is nothing, not half of the last digit.
    #[must_use]
    pub fn or_exact_zero(self) -> Rounded {
        if self.value == 0.0 { exactly(0.0) } else { self }
    }

    /// Whether both may be one number, rounded.
    pub fn agrees(self, other: Rounded) -> bool {
        let slack = 1e-9 * self.value.abs().max(other.value.abs());
        self.low <= other.high + slack && other.low <= self.high + slack
    }
}

impl std::ops::Add for Rounded {
    type Output = Rounded;

    fn add(self, other: Rounded) -> Rounded {
        self.by(other, |a, b| a + b)
    }
}

impl std::ops::Sub for Rounded {
    type Output = Rounded;

    fn sub(self, other: Rounded) -> Rounded {
        self.by(other, |a, b| a - b)
    }
}

impl std::ops::Mul for Rounded {
    type Output = Rounded;

    fn mul(self, other: Rounded) -> Rounded {
        self.by(other, |a, b| a * b)
    }
}

impl std::ops::Div for Rounded {
    type Output = Rounded;

    fn div(self, other: Rounded) -> Rounded {
        self.by(other, |a, b| a / b)
    }
}

/// Two things that a text says, and whether they agree.
#[derive(Clone, Debug, Serialize)]
pub struct Check {
    /// Sections or tables.
    pub at: &'static str,
    /// What the text says.
    pub says: String,
    /// What follows from its other figures.
    pub follows: String,
    /// Whether that is the same, but for rounding.
    pub agrees: bool,
    /// What it means.
    pub meaning: &'static str,
}

impl Check {
    /// A figure, and the same worked out from others.
    pub fn equation(
        at: &'static str,
        (what, stated): (&str, Rounded),
        (how, computed): (&str, Rounded),
        meaning: &'static str,
    ) -> Check {
        let says = format!("{what}: {}", plain(stated.value));
        let follows = format!("{how} = {}", plain(computed.value));
        Check { at, says, follows, agrees: stated.agrees(computed), meaning }
    }

    /// A figure that must not be more than another.
    pub fn at_most(
        at: &'static str,
        (what, stated): (&str, Rounded),
        (how, limit): (&str, Rounded),
        meaning: &'static str,
    ) -> Check {
        let says = format!("{what}: {}", plain(stated.value));
        let follows = format!("{how}: at most {}", plain(limit.value));
        Check { at, says, follows, agrees: stated.low <= limit.high, meaning }
    }

    /// Two statements of which only one can be true.
    pub fn conflict(at: &'static str, says: &str, but: &str, meaning: &'static str) -> Check {
        Check { at, says: says.to_owned(), follows: but.to_owned(), agrees: false, meaning }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_is_carried_through() {
        // 34.2 % from two figures of three digits: 33.8 to 34.4.
        let less = exactly(100.0) * (exactly(1.0) - n("1.82") / n("2.76"));
        assert!(less.agrees(n("34.2")) && !less.agrees(n("35.9")), "{less:?}");
        // 8,450 × 2.84 ms = 24.0, but 13,289 × 1.82 ms is 24.19 at least 24.12.
        let per_ms = |tps, tpot| n(tps) * n(tpot) / exactly(1e3);
        assert!(per_ms("8,450", "2.84").agrees(exactly(24.0)));
        assert!(!per_ms("13,289", "1.82").agrees(exactly(24.0)));
    }

    #[test]
    fn checks_say_whether_they_agree() {
        let sum = ("all", n("18.8"));
        let right = Check::equation("", sum, ("parts", n("8.4") + n("6.2") + n("2.9") + n("1.3")), "");
        let wrong = Check::equation("", sum, ("parts", n("8.4") + n("6.2")), "");
        assert!(right.agrees && !wrong.agrees);
        assert!(!Check::at_most("", ("memory", n("123.7")), ("a GPU", n("80")), "").agrees);
        assert!(Check::at_most("", ("memory", n("79.7")), ("a GPU", n("80")), "").agrees);
        assert!(!Check::conflict("", "GELU", "SwiGLU", "").agrees);
    }
}
