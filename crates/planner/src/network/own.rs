//! Prices from messages and sums that a machine measured of itself.

use std::collections::BTreeMap;

use moesaic_spec::Link;

use crate::PlannerError;
use crate::cost::LeftOut;
use crate::csv::Table;
use crate::estimate::NINETY;
use crate::price::{Price, Source};

/// How much less sure a price is for each e-fold beyond the rows: a judgement.
const BEYOND_SD: f64 = 0.1;
/// Standard deviation of ln(time) among rows that are too few to tell it.
const FEW_ROWS_SD: f64 = 0.2;

/// What ranks do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum LinkKind {
    /// One sends, another receives.
    SendReceive,
    /// All get the sum of what each has, 16-bit numbers.
    AllReduce,
}

impl LinkKind {
    /// The name of its table.
    pub fn table(self) -> &'static str {
        match self {
            LinkKind::SendReceive => "send_receive",
            LinkKind::AllReduce => "all_reduce",
        }
    }
}

/// A row of a table of messages or sums.
#[derive(Clone, Debug, PartialEq)]
pub struct LinkRow {
    /// What ranks did.
    pub kind: LinkKind,
    /// How many.
    pub ranks: u64,
    /// Bytes of the message; of the buffer of one rank.
    pub bytes: f64,
    /// How they reached each other: `in_process` or `process`.
    pub transport: String,
    /// How long it took, seconds.
    pub seconds: f64,
}

impl LinkRow {
    /// Reads a table of a kind. Lines that begin with `#` are notes; `path` is named in errors.
    ///
    /// # Errors
    /// [`PlannerError::Table`] with line and column of what is missing or cannot be, times that the link cannot reach among them.
    pub fn parse(text: &str, path: &str, kind: LinkKind, link: &Link) -> Result<Vec<LinkRow>, PlannerError> {
        let table = Table::parse(text, path, &["gpus", "bytes", "kernel", "latency_us"])?;
        let row = |record: crate::csv::Record| {
            let needed =
                |column| record.count(column)?.ok_or_else(|| record.fault(column, "is 0; a count is right".into()));
            let ranks = needed("gpus")? as u64;
            let bytes = record.needed("bytes")?;
            let seconds = record.needed("latency_us")? * 1e-6;
            let row = LinkRow { kind, ranks, bytes, transport: record.text("kernel").to_owned(), seconds };
            let least = row.least_bytes() / link.bandwidth_per_gpu;
            if seconds < least {
                let (us, least) = (1e6 * seconds, 1e6 * least);
                let why =
                    format!("{us:.3} µs is faster than physics: {} needs {least:.3} µs for {bytes} bytes", link.name);
                return Err(record.fault("latency_us", why));
            }
            Ok(row)
        };
        table.rows().map(row).collect()
    }

    /// Bytes that must leave a rank, whatever the algorithm. Between threads a message changes its owner and none does.
    pub(crate) fn least_bytes(&self) -> f64 {
        match self.kind {
            LinkKind::AllReduce => self.bytes * (self.ranks as f64 - 1.0) / self.ranks as f64,
            LinkKind::SendReceive if self.transport == "in_process" => 0.0,
            LinkKind::SendReceive => self.bytes,
        }
    }
}

/// Measured messages and sums of one machine, by kind and number of ranks.
#[derive(Clone, Debug)]
pub struct OwnLinks {
    /// Over which they went.
    link: Link,
    lines: BTreeMap<(LinkKind, u64), Line>,
}

impl OwnLinks {
    /// From rows that were measured over a link. Sums are those between threads of one process, which is how ranks of one machine
    /// run where nobody says otherwise; messages those between processes: between threads a message has no size.
    pub fn new(link: &Link, rows: &[LinkRow]) -> OwnLinks {
        let mut points: BTreeMap<_, Vec<(f64, f64)>> = BTreeMap::new();
        for row in rows.iter().filter(|row| row.transport == usual_transport(row.kind)) {
            points.entry((row.kind, row.ranks)).or_default().push((row.bytes.ln(), row.seconds.ln()));
        }
        let lines = points.into_iter().map(|(key, points)| (key, Line::new(points))).collect();
        OwnLinks { link: link.clone(), lines }
    }

    /// What it costs over a link that may have other figures than the machine's: as many times more as a message would. `None`
    /// where nothing like it was measured.
    pub fn price(&self, kind: LinkKind, ranks: u64, bytes: f64, link: &Link) -> Option<Price> {
        let price = self.lines.get(&(kind, ranks))?.at(bytes);
        let ratio = message_s(link, bytes) / message_s(&self.link, bytes);
        Some(Price { seconds: price.seconds * ratio, ..price })
    }

    /// How well each row is met by its neighbours, by kind.
    pub fn leave_one_out(&self) -> BTreeMap<LinkKind, LeftOut> {
        let mut errors: BTreeMap<LinkKind, Vec<f64>> = BTreeMap::new();
        for ((kind, _), line) in &self.lines {
            errors.entry(*kind).or_default().extend(line.left_out());
        }
        errors.into_iter().filter_map(|(kind, errors)| Some((kind, LeftOut::of(errors)?))).collect()
    }
}

/// By which transport ranks of one machine do something, see [`OwnLinks::new`].
pub(crate) fn usual_transport(kind: LinkKind) -> &'static str {
    match kind {
        LinkKind::AllReduce => "in_process",
        LinkKind::SendReceive => "process",
    }
}

/// Hockney's time of a message.
fn message_s(link: &Link, bytes: f64) -> f64 {
    link.latency_s + bytes / (link.bandwidth_per_gpu * link.utilization)
}

/// Straight between points of (ln bytes, ln seconds).
#[derive(Clone, Debug)]
struct Line {
    /// By bytes, each once.
    points: Vec<(f64, f64)>,
    sd: f64,
}

impl Line {
    fn new(mut points: Vec<(f64, f64)>) -> Line {
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        points.dedup_by(|a, b| a.0 == b.0);
        let mut line = Line { points, sd: FEW_ROWS_SD };
        let mut errors = line.left_out();
        errors.sort_by(f64::total_cmp);
        if let Some(p90) = errors.get(((errors.len() as f64 - 1.0) * 0.9).round() as usize) {
            line.sd = p90 / NINETY;
        }
        line
    }

    /// Below the least row as it, beyond the greatest in proportion to the bytes.
    fn at(&self, bytes: f64) -> Price {
        let x = bytes.max(1.0).ln();
        let (first, last) = (self.points[0], self.points[self.points.len() - 1]);
        let beyond = (first.0 - x).max(x - last.0).max(0.0);
        let y = match x {
            _ if x <= first.0 => first.1,
            _ if x >= last.0 => last.1 + (x - last.0),
            _ => self.between(x, None),
        };
        let source = if beyond == 0.0 { Source::Table } else { Source::Predictor };
        Price { seconds: y.exp(), sd: self.sd.hypot(BEYOND_SD * beyond), source }
    }

    /// Between the points around `x`, which lies inside, without one of them.
    fn between(&self, x: f64, without: Option<usize>) -> f64 {
        let used = |idx: &usize| Some(*idx) != without;
        let above = (0..self.points.len()).filter(used).find(|&idx| self.points[idx].0 >= x).expect("inside");
        let below = (0..above).rev().find(used).unwrap_or(above);
        let ((x0, y0), (x1, y1)) = (self.points[below], self.points[above]);
        if x1 > x0 { y0 + (y1 - y0) * (x - x0) / (x1 - x0) } else { y1 }
    }

    /// |ln(predicted / measured)| of all points but the ends.
    fn left_out(&self) -> Vec<f64> {
        let inner = 1..self.points.len().saturating_sub(1);
        inner.map(|idx| (self.between(self.points[idx].0, Some(idx)) - self.points[idx].1).abs()).collect()
    }
}
