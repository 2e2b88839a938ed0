//! The tables that all written forms of the report share.

use moesaic_plan::Collective;
use moesaic_spec::{Bytes, LinkClass};

use super::{BalanceReport, Comparison, Sameness, StrategyReport, SynchronizerReport, format};
use crate::clock::activity::COLLECTIVES;
use crate::metrics::{ExpertLoad, LinkTraffic, RankMemory, memory_efficiency};

/// A table with a column for each strategy.
pub(crate) struct Table {
    pub(crate) title: &'static str,
    /// A sentence that explains it.
    pub(crate) about: &'static str,
    /// Heads of the columns after the first.
    pub(crate) heads: Vec<String>,
    pub(crate) rows: Vec<Row>,
}

pub(crate) struct Row {
    pub(crate) name: String,
    pub(crate) cells: Vec<String>,
    /// The cell that is best, where one is.
    pub(crate) best: Option<usize>,
}

/// Where a strategy has no such number.
const NOTHING: &str = "–";

impl Table {
    /// Only strategies that have something to say; no rows when none has.
    fn without_empty_columns(mut self) -> Table {
        let says = |column: usize| self.rows.iter().any(|row| row.cells[column] != NOTHING);
        let kept: Vec<usize> = (0..self.heads.len()).filter(|&column| says(column)).collect();
        if kept.is_empty() {
            self.rows.clear();
        }
        self.heads = kept.iter().map(|&column| self.heads[column].clone()).collect();
        for row in &mut self.rows {
            row.cells = kept.iter().map(|&column| row.cells[column].clone()).collect();
        }
        self
    }
}

impl Row {
    pub(super) fn new(name: impl Into<String>, cells: impl IntoIterator<Item = String>) -> Row {
        Row { name: name.into(), cells: cells.into_iter().collect(), best: None }
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Better {
    Lower,
    Higher,
}

/// A number of each strategy.
struct Metric {
    name: &'static str,
    better: Better,
    of: fn(&StrategyReport) -> f64,
    show: fn(f64) -> String,
}

const TABLE_1: [Metric; 5] = [
    Metric { name: "TPOT (ms)", better: Better::Lower, of: |strategy| strategy.performance.tpot_ms.mean, show: tpot },
    Metric {
        name: "TPS per GPU",
        better: Better::Higher,
        of: |strategy| strategy.performance.tps_per_gpu,
        show: format::number,
    },
    Metric {
        name: "Throughput (tokens/s)",
        better: Better::Higher,
        of: |strategy| strategy.performance.throughput,
        show: format::number,
    },
    Metric {
        name: "GPU utilisation (%)",
        better: Better::Higher,
        of: |strategy| strategy.performance.gpu_utilization,
        show: format::percent,
    },
    Metric {
        name: "Memory efficiency (%)",
        better: Better::Higher,
        of: |strategy| memory_efficiency(&strategy.memory),
        show: format::percent,
    },
];

/// The papers' Table 1.
pub(crate) fn performance(comparison: &Comparison) -> Table {
    let strategies = &comparison.strategies;
    let mut heads: Vec<String> = strategies.iter().map(|strategy| strategy.name.clone()).collect();
    let compares = [true, false].iter().all(|&kind| strategies.iter().any(|strategy| strategy.baseline == kind));
    if compares {
        heads.push("Improvement".to_owned());
    }
    let rows = TABLE_1.iter().map(|metric| {
        let values: Vec<f64> = strategies.iter().map(metric.of).collect();
        let mut cells: Vec<String> = values.iter().map(|&value| (metric.show)(value)).collect();
        if compares {
            cells.push(improvement(comparison, metric));
        }
        let best = best(values.iter().copied().enumerate(), metric.better);
        // Where several are equally good, none is marked.
        let best = best.filter(|(_, best)| values.iter().filter(|value| *value == best).count() == 1);
        Row { best: best.map(|(idx, _)| idx).filter(|_| values.len() > 1), ..Row::new(metric.name, cells) }
    });
    Table {
        title: "Performance",
        about: "Improvement: the best of the others over the best baseline (TP, PP and both).",
        heads,
        rows: rows.collect(),
    }
}

/// The best of the others over the best baseline.
fn improvement(comparison: &Comparison, metric: &Metric) -> String {
    let of = |baseline: bool| {
        let values = comparison.strategies.iter().filter(|strategy| strategy.baseline == baseline).map(metric.of);
        best(values.enumerate(), metric.better).map_or(0.0, |(_, value)| value)
    };
    let (baseline, other) = (of(true), of(false));
    if baseline <= 0.0 {
        return "n/a".to_owned();
    }
    let change = other / baseline - 1.0;
    let arrow = if change < 0.0 { "↓" } else { "↑" };
    let worse = (change > 0.0) == (metric.better == Better::Lower);
    // Beyond ten times, a factor is what is read; it stays narrow, too.
    let size = match change.abs() {
        size if size < 10.0 => format!("{} %", format::percent(size)),
        _ => format!("{}×", format::number(other / baseline)),
    };
    match change {
        0.0 => "0 %".to_owned(),
        _ if worse => format!("{size} worse"),
        _ => format!("{size} {arrow}"),
    }
}

/// The first of the best.
fn best(values: impl Iterator<Item = (usize, f64)>, better: Better) -> Option<(usize, f64)> {
    values.reduce(|best, one| {
        let wins = if better == Better::Lower { one.1 < best.1 } else { one.1 > best.1 };
        if wins { one } else { best }
    })
}

/// Milliseconds; answers of one token have none.
fn tpot(value: f64) -> String {
    if value == 0.0 { NOTHING.to_owned() } else { format::number(value) }
}

/// The strategy with the best TPOT and the one with the best throughput.
pub(crate) fn winners(comparison: &Comparison) -> Option<[(&StrategyReport, String); 2]> {
    let of = |metric: &Metric| {
        let values = comparison.strategies.iter().map(metric.of).enumerate();
        let (idx, value) = best(values, metric.better)?;
        Some((&comparison.strategies[idx], (metric.show)(value)))
    };
    Some([of(&TABLE_1[0])?, of(&TABLE_1[2])?])
}

/// What Table 1 leaves out.
pub(crate) fn more(comparison: &Comparison) -> Table {
    let row =
        |name: &str, cell: &dyn Fn(&StrategyReport) -> String| Row::new(name, comparison.strategies.iter().map(cell));
    let rows = vec![
        row("Ranks", &|strategy| strategy.ranks.to_string()),
        row("TPOT p50 (ms)", &|strategy| tpot(strategy.performance.tpot_ms.p50)),
        row("TPOT p99 (ms)", &|strategy| tpot(strategy.performance.tpot_ms.p99)),
        row("TTFT mean (ms)", &|strategy| format::number(strategy.performance.ttft_ms.mean)),
        row("TTFT p99 (ms)", &|strategy| format::number(strategy.performance.ttft_ms.p99)),
        row("MFU (%)", &|strategy| format::percent(strategy.performance.mfu)),
        row("MBU (%)", &|strategy| format::percent(strategy.performance.mbu)),
        row("Output tokens", &|strategy| format::integer(strategy.performance.tokens)),
        row("Steps", &|strategy| format::integer(strategy.performance.steps)),
        row("Length of the run", &|strategy| format::seconds(strategy.performance.seconds)),
    ];
    let about =
        "TPOT and TTFT by request; MFU and MBU: operations done and bytes moved, of what all GPUs could have at peak.";
    Table { title: "More numbers", about, heads: names(comparison), rows }
}

fn names(comparison: &Comparison) -> Vec<String> {
    comparison.strategies.iter().map(|strategy| strategy.name.clone()).collect()
}

pub(crate) fn collective_name(collective: Collective) -> &'static str {
    match collective {
        Collective::AllReduce => "all-reduce",
        Collective::AllToAll => "all-to-all",
        Collective::SendReceive => "send/receive",
        Collective::AllGather => "all-gather",
        Collective::Broadcast => "broadcast",
    }
}

/// Communication by kind.
pub(crate) fn communication(comparison: &Comparison) -> Table {
    let strategies = &comparison.strategies;
    let used = |collective: &Collective| {
        let mut classes = strategies.iter().flat_map(|strategy| &strategy.communication.classes);
        classes.any(|class| class.collective == *collective)
    };
    let mut rows: Vec<Row> = COLLECTIVES
        .into_iter()
        .filter(used)
        .map(|collective| {
            let cell = |strategy: &StrategyReport| {
                let of_kind = strategy.communication.classes.iter().find(|class| class.collective == collective);
                of_kind.map_or(NOTHING.to_owned(), |class| shares(class.shares.total, class.shares.exposed))
            };
            Row::new(format!("{} (%)", collective_name(collective)), strategies.iter().map(cell))
        })
        .collect();
    let row = |name: &str, cell: &dyn Fn(&StrategyReport) -> String| Row::new(name, strategies.iter().map(cell));
    let all = |strategy: &StrategyReport| strategy.communication.all;
    rows.push(row("all kinds (%)", &|strategy| shares(all(strategy).total, all(strategy).exposed)));
    rows.push(row("only waiting (%)", &|strategy| format::percent(all(strategy).waiting)));
    rows.push(row("experts overlapped (%)", &|strategy| format::percent(strategy.communication.experts_overlapped)));
    rows.push(row("messages", &|strategy| {
        format::count(strategy.communication.classes.iter().map(|class| class.messages as f64).sum())
    }));
    Table {
        title: "Communication",
        about: "Share of the ranks' time in which a message is under way to or from them, or awaited; in brackets what computing \
                does not hide. Kinds overlap, so all kinds are less than their sum. Only waiting: computing stands still and no \
                message is under way, because others are not done. Experts overlapped: of the experts' time, with messages \
                under way beside it.",
        heads: names(comparison),
        rows,
    }
}

fn shares(total: f64, exposed: f64) -> String {
    format!("{} ({})", format::percent(total), format::percent(exposed))
}

/// Bytes over each class of links.
pub(crate) fn links(comparison: &Comparison) -> Table {
    let strategies = &comparison.strategies;
    let mut rows = Vec::new();
    for class in [LinkClass::IntraNode, LinkClass::InterNode] {
        let of =
            |strategy: &StrategyReport| strategy.communication.links.iter().find(|link| link.class == class).cloned();
        let Some(link) = strategies.iter().find_map(of) else {
            continue;
        };
        let place = link_class_name(class);
        let cell = |show: fn(&LinkTraffic) -> String| {
            let one = move |strategy: &StrategyReport| of(strategy).map_or(NOTHING.to_owned(), |link| show(&link));
            strategies.iter().map(one).collect::<Vec<_>>()
        };
        rows.push(Row::new(format!("{place}: {}", link.name), cell(|link| Bytes(link.bytes).to_string())));
        rows.push(Row::new("  messages", cell(|link| format::count(link.messages as f64))));
        rows.push(Row::new("  used (%)", cell(|link| format::percent(link.utilization))));
    }
    let about = "Used: of what all GPUs together could have sent in the time at the full bandwidth.";
    Table { title: "Bytes by link", about, heads: names(comparison), rows }
}

pub(crate) fn link_class_name(class: LinkClass) -> &'static str {
    match class {
        LinkClass::IntraNode => "in a node",
        LinkClass::InterNode => "between nodes",
    }
}

/// Memory by part, of the rank that uses most.
pub(crate) fn memory(comparison: &Comparison) -> Table {
    let fullest = |strategy: &StrategyReport| strategy.memory.iter().max_by_key(|rank| rank.used()).cloned();
    let ranks: Vec<_> = comparison.strategies.iter().map(|strategy| fullest(strategy).unwrap_or_default()).collect();
    let mut rows: Vec<Row> = part_names(comparison)
        .into_iter()
        .map(|part| {
            let of = |rank: &RankMemory| {
                let found = rank.parts.iter().find(|(name, _)| *name == part);
                found.map_or(NOTHING.to_owned(), |&(_, bytes)| Bytes(bytes).to_string())
            };
            Row::new(part.clone(), ranks.iter().map(of))
        })
        .collect();
    rows.push(Row::new("together", ranks.iter().map(|rank| Bytes(rank.used()).to_string())));
    rows.push(Row::new("available", ranks.iter().map(|rank| Bytes(rank.available).to_string())));
    let about = "Of the rank that uses most.";
    Table { title: "Memory by part", about, heads: names(comparison), rows }
}

/// All parts of memory that some rank has, in the order of their first mention.
pub(crate) fn part_names(comparison: &Comparison) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    let ranks = comparison.strategies.iter().flat_map(|strategy| &strategy.memory);
    for (name, bytes) in ranks.flat_map(|rank| &rank.parts) {
        if *bytes > 0 && !names.contains(name) {
            names.push(name.clone());
        }
    }
    names
}

/// Whether the results are those of one rank, and what moved them.
pub(crate) fn results(comparison: &Comparison) -> Table {
    let strategies = &comparison.strategies;
    let mut rows = vec![
        Row::new("answers as one rank", strategies.iter().map(|strategy| strategy.verdict())),
        Row::new(
            "tokens that differ",
            strategies.iter().map(|strategy| {
                let of = |same: Sameness| {
                    let tokens = format::integer(same.tokens);
                    format!("{} of {tokens}", same.differing_tokens)
                };
                strategy.sameness.map_or(NOTHING.to_owned(), of)
            }),
        ),
        Row::new(
            "largest log-prob diff",
            strategies.iter().map(|strategy| {
                strategy.sameness.map_or(NOTHING.to_owned(), |same| format::number(same.max_logprob_difference))
            }),
        ),
    ];
    if strategies.iter().any(|strategy| strategy.sameness.is_some_and(|same| same.widest_gap.is_some())) {
        let cell = |strategy: &StrategyReport| {
            strategy.sameness.and_then(|same| same.widest_gap).map_or(NOTHING.to_owned(), format::number)
        };
        rows.push(Row::new("gap where they part", strategies.iter().map(cell)));
    }
    if strategies.iter().any(|strategy| strategy.exchange_error.is_some()) {
        let cell = |strategy: &StrategyReport| {
            let error = strategy.exchange_error.as_ref();
            error.map_or("exact".to_owned(), |error| {
                format!("{} {} %", error.precision, format::percent(error.relative))
            })
        };
        rows.push(Row::new("8-bit exchange, error", strategies.iter().map(cell)));
    }
    let about = "Held against a run of the same requests on one rank. An answer goes its own way from its first other token on, so \
                 log-probabilities are compared up to there. Gap where they part: how far apart one rank saw its two likeliest \
                 tokens there, at most; near 0 it was undecided.";
    Table { title: "Sameness", about, heads: names(comparison), rows }
}

/// Load of experts; the same for all strategies unless their tokens differ.
pub(crate) fn load(comparison: &Comparison) -> Table {
    let row = |name: &str, of: fn(&ExpertLoad) -> String| {
        let cell = |strategy: &StrategyReport| strategy.expert_load.as_ref().map_or(NOTHING.to_owned(), of);
        Row::new(name, comparison.strategies.iter().map(cell))
    };
    let rows = vec![
        row("max / mean", |load| format::number(load.mean().max_over_mean)),
        row("std-dev of share", |load| format::number(load.mean().std_dev)),
        row("worst max / mean", |load| format::number(load.worst().map_or(0.0, |(_, worst)| worst.max_over_mean))),
        row("in layer", |load| load.worst().map_or(NOTHING.to_owned(), |(layer, _)| layer.to_string())),
    ];
    let about = "Tokens of the experts of a layer, mean over layers; below, the layer in which they are most uneven.";
    Table { title: "Load of experts", about, heads: names(comparison), rows }.without_empty_columns()
}

/// What moving experts did.
pub(crate) fn balance(comparison: &Comparison) -> Table {
    let row = |name: &str, of: &dyn Fn(&BalanceReport) -> String| {
        let cell = |strategy: &StrategyReport| strategy.balance.as_ref().map_or(NOTHING.to_owned(), of);
        Row::new(name, comparison.strategies.iter().map(cell))
    };
    let number = format::number;
    let rows = vec![
        row("max / mean before", &|report| number(report.before.max_over_mean)),
        row("max / mean after", &|report| number(report.after.max_over_mean)),
        row("std-dev before", &|report| number(report.before.std_dev)),
        row("std-dev after", &|report| number(report.after.std_dev)),
        row("experts moved", &|report| format::integer(report.moves)),
        row("weights sent", &|report| Bytes(report.bytes_moved).to_string()),
        row("time on links", &|report| format::seconds(report.seconds)),
    ];
    let about =
        "Load of ranks before the first move of experts and after the last; the deviation is that of their shares.";
    Table { title: "Balance", about, heads: names(comparison), rows }.without_empty_columns()
}

/// How well the time of pools is predicted.
pub(crate) fn synchronizer(comparison: &Comparison) -> Table {
    let row = |name: &str, of: &dyn Fn(&SynchronizerReport) -> String| {
        let cell = |strategy: &StrategyReport| strategy.synchronizer.as_ref().map_or(NOTHING.to_owned(), of);
        Row::new(name, comparison.strategies.iter().map(cell))
    };
    let rows = vec![
        row("3-layer MLP (%)", &|report| report.mlp_error.map_or(NOTHING.to_owned(), format::percent)),
        row("linear model (%)", &|report| format::percent(report.linear_error)),
        row("used", &|report| if report.mlp_used { "MLP" } else { "linear" }.to_owned()),
        row("choices", &|report| format::integer(report.choices)),
    ];
    let about = "Median error of the predicted time of the pool of ranks that is predicted worst, by both models; the better one was used for \
                 so many choices of micro-batches.";
    Table { title: "Prediction of time", about, heads: names(comparison), rows }.without_empty_columns()
}

/// All of them, in order.
pub(crate) fn all(comparison: &Comparison) -> Vec<Table> {
    let mut tables = vec![
        performance(comparison),
        results(comparison),
        communication(comparison),
        links(comparison),
        memory(comparison),
        load(comparison),
        balance(comparison),
        synchronizer(comparison),
        more(comparison),
    ];
    tables.retain(|table| !table.rows.is_empty());
    tables
}

/// Notes of all and of each strategy.
pub(crate) fn notes(comparison: &Comparison) -> Vec<String> {
    let of_each = comparison
        .strategies
        .iter()
        .flat_map(|strategy| strategy.notes.iter().map(move |note| format!("{}: {note}", strategy.name)));
    comparison.notes.iter().cloned().chain(of_each).collect()
}
