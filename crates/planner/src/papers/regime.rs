//! Where a claim would be reached: a small search, nearest to the text's own setting first.

use moesaic_spec::{Cluster, ModelSpec};
use serde::Serialize;

use super::claim::plain;
use super::lab::{Case, Figure, Lab, Phase};
use crate::PlannerError;
use crate::iteration::Layout;

/// What a search found.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "search", rename_all = "snake_case")]
pub enum Regime {
    /// Nobody searched.
    NotSearched,
    /// The nearest setting in which the claim is reached.
    Found {
        /// That setting.
        at: String,
    },
    /// There is none in the range.
    Nowhere {
        /// The range.
        searched: String,
    },
}

/// A setting in the range.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Point {
    /// GPUs.
    pub gpus: usize,
    /// Sequences, over all groups.
    pub seqs: f64,
    /// Tokens of each.
    pub context: f64,
    /// How many times as fast links between nodes are.
    pub links: f64,
}

impl Point {
    /// Doublings from one to the other, in all directions together.
    fn distance(&self, other: &Point) -> f64 {
        let doublings = |a: f64, b: f64| (a / b).log2().abs();
        doublings(self.gpus as f64, other.gpus as f64)
            + doublings(self.seqs, other.seqs)
            + doublings(self.context, other.context)
            + doublings(self.links, other.links)
    }

    fn describe(&self) -> String {
        let Point { gpus, seqs, context, links } = *self;
        let faster =
            if links == 1.0 { String::new() } else { format!(", links between nodes {} times as fast", plain(links)) };
        format!("{} sequences of {} tokens on {gpus} GPUs{faster}", plain(seqs), plain(context))
    }
}

/// How a strategy spreads a model over so many GPUs, if it can.
pub type Spreading = fn(usize) -> Option<Layout>;

/// What is asked of each point.
#[derive(Clone, Copy, Debug)]
pub struct Search<'s> {
    /// Of which figure.
    pub figure: Figure,
    /// In which phase.
    pub phase: Phase,
    /// What is proposed.
    pub proposed: Spreading,
    /// What it is divided by.
    pub baseline: Option<Spreading>,
    /// Where the text is.
    pub from: Point,
    /// GPUs.
    pub gpus: &'s [usize],
    /// Sequences.
    pub seqs: &'s [f64],
    /// Tokens of each.
    pub contexts: &'s [f64],
    /// How many times as fast links between nodes are.
    pub links: &'s [f64],
}

impl Search<'_> {
    /// The nearest point at which `reached` is true of the figure's interval (or, with a baseline, of the ratio).
    ///
    /// # Errors
    /// [`PlannerError`]: the model cannot be spread like this.
    pub fn find(
        &self,
        model: &ModelSpec,
        cluster: &Cluster,
        reached: impl Fn(f64, f64) -> bool,
    ) -> Result<Regime, PlannerError> {
        let clusters: Vec<Cluster> = self.links.iter().map(|&times| faster(cluster, times)).collect();
        let mut labs: Vec<Lab> = clusters.iter().map(|cluster| Lab::new(model, cluster)).collect::<Result<_, _>>()?;
        for (point, links) in self.points() {
            let lab = &mut labs[links];
            let case = |spreading: Spreading| {
                let layout = spreading(point.gpus)?;
                // Fewer sequences than groups, and some groups would have none.
                (point.seqs >= layout.dp as f64).then_some(Case {
                    layout,
                    seqs: point.seqs,
                    context: point.context,
                    phase: self.phase,
                })
            };
            let Some(proposed) = case(self.proposed) else { continue };
            if !fits(lab, &proposed)? {
                continue;
            }
            let estimate = match self.baseline {
                None => lab.ask(self.figure, &proposed, "")?.estimate,
                Some(baseline) => {
                    let Some(baseline) = case(baseline) else { continue };
                    if !fits(lab, &baseline)? {
                        continue;
                    }
                    let ratio = lab.ratio(self.figure, [&proposed, &baseline], "")?.estimate.value;
                    crate::estimate::Estimate { value: ratio, low: ratio, high: ratio }
                }
            };
            if reached(estimate.low, estimate.high) {
                return Ok(Regime::Found { at: point.describe() });
            }
        }
        Ok(Regime::Nowhere { searched: self.range() })
    }

    /// All points with the index of their links, nearest first; of equally near ones the first in the lists' order.
    fn points(&self) -> Vec<(Point, usize)> {
        let mut points = Vec::new();
        for (idx, &links) in self.links.iter().enumerate() {
            for &gpus in self.gpus {
                for &seqs in self.seqs {
                    points.extend(self.contexts.iter().map(|&context| (Point { gpus, seqs, context, links }, idx)));
                }
            }
        }
        points.sort_by(|a, b| a.0.distance(&self.from).total_cmp(&b.0.distance(&self.from)));
        points
    }

    fn range(&self) -> String {
        let ends = |values: &[f64], what: &str| {
            let (low, high) =
                (values.iter().copied().fold(f64::MAX, f64::min), values.iter().copied().fold(0.0, f64::max));
            if low == high {
                format!("{} {what}", plain(low))
            } else {
                format!("{} to {} {what}", plain(low), plain(high))
            }
        };
        let gpus: Vec<f64> = self.gpus.iter().map(|&gpus| gpus as f64).collect();
        format!(
            "{}, {}, {}, {}",
            ends(&gpus, "GPUs"),
            ends(self.seqs, "sequences"),
            ends(self.contexts, "tokens each"),
            ends(self.links, "times the bandwidth between nodes")
        )
    }
}

/// The same cluster with faster links between nodes.
pub fn faster(cluster: &Cluster, times: f64) -> Cluster {
    let mut cluster = cluster.clone();
    if let Some(link) = &mut cluster.inter_node {
        link.bandwidth_per_gpu *= times;
        link.bandwidth_per_node *= times;
    }
    cluster
}

fn fits(lab: &mut Lab, case: &Case) -> Result<bool, PlannerError> {
    Ok(lab.ask(Figure::Memory, case, "")?.estimate.value <= lab.cluster().gpu.memory.0 as f64)
}
