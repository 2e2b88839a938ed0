//! A price: how long something takes, how sure that is, and where it comes from.

/// What an op or a message costs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Price {
    /// Expected time (its median), seconds.
    pub seconds: f64,
    /// Standard deviation of its natural logarithm.
    pub sd: f64,
    /// Where it comes from.
    pub source: Source,
}

/// Where a price comes from, from the surest to the least sure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Source {
    /// Between measurements of this GPU and software.
    Table,
    /// Beyond them, by what was learned from others.
    Predictor,
    /// From the data sheet alone.
    Roofline,
}

impl Price {
    /// What does not happen costs nothing.
    pub const NOTHING: Price = Price { seconds: 0.0, sd: 0.0, source: Source::Table };
}
