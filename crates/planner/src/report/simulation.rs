//! A simulation as text, JSON, and one HTML page that needs nothing else.

use std::fmt::Write;

use moesaic_spec::{Arrival, TokenRange, Workload};
use serde::{Deserialize, Serialize};

use super::format::{self, escape, integer, number, percent};
use super::plots::{self, Line};
use super::tables::{Row, Table, collective_name};
use super::{ClusterFacts, ModelFacts, html, text};
use crate::estimate::Estimate;
use crate::predict::Prediction;
use crate::simulate::{Distribution, Goals, Moment, Simulated, Trials};

/// What the report says about its times.
const ABOUT: &str = "The scheduler that serves was run, step by step, on a virtual clock: which tokens run when is what it \
     decided; what a step takes is priced for the named cluster, and paced as measurements of the program show.";

/// Titles of the tables that have plots.
const LATENCY: &str = "Latency, ms";
const SERVER: &str = "The server";

/// A simulation, and what it is held against.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SimulationReport {
    /// Name of the plan.
    pub plan: String,
    /// How the model is spread, in a few words.
    pub spread: String,
    /// The model.
    pub model: ModelFacts,
    /// What it is priced for.
    pub cluster: ClusterFacts,
    /// What is asked, in words.
    pub workload: String,
    /// How experts are loaded, in words.
    pub routing: String,
    /// What the simulation has shown.
    pub simulated: Simulated,
    /// Other seeds, if there were more.
    pub trials: Option<Trials>,
    /// The closed form of the same; absent where requests come at a rate.
    pub closed_form: Option<Prediction>,
}

/// A workload in words.
pub fn workload_line(workload: &Workload) -> String {
    let tokens = |TokenRange { min, max }| if min == max { min.to_string() } else { format!("{min} to {max}") };
    let arrival = match workload.arrival {
        Arrival::AtStart => "all there at the start".to_owned(),
        Arrival::Poisson { requests_per_s } => format!("{} a second at random moments", number(requests_per_s)),
        Arrival::Closed { concurrency } => format!("of {concurrency} users who ask again when answered"),
    };
    let prefix = match workload.prefix_hit {
        0.0 => String::new(),
        share => format!(", prompts alike in the first {} %", percent(share)),
    };
    format!(
        "{}: {} requests of {} tokens, answers of {}, {arrival}{prefix} (seed {})",
        workload.name,
        workload.num_requests,
        tokens(workload.input_tokens),
        tokens(workload.output_tokens),
        workload.seed
    )
}

impl SimulationReport {
    /// For a terminal.
    pub fn text(&self) -> String {
        let mut text = text::wrap(&self.title(), "", "");
        for (name, line) in self.lines() {
            text += &text::wrap(&line, &format!("  {:<10}", name.to_lowercase()), "            ");
        }
        for table in self.tables() {
            text += &columns(&table);
        }
        text + "\n" + &text::wrap(ABOUT, "", "")
    }

    /// As a page.
    pub fn html(&self) -> String {
        let mut body = String::new();
        let _ = write!(
            body,
            "<header>\n<p class=\"eyebrow\">moesaic simulate</p>\n<h1>{}</h1>\n<dl>",
            escape(&self.title())
        );
        for (name, line) in self.lines() {
            let _ = write!(body, "<dt>{name}</dt><dd>{}</dd>", escape(&line));
        }
        let _ = write!(body, "</dl>\n<p class=\"callout\">{}</p>\n</header>\n", escape(ABOUT));
        body += &self.tiles();
        let plots = [(LATENCY, self.latency_plots()), (SERVER, self.timelines())];
        for (idx, table) in self.tables().iter().enumerate() {
            let plots = plots.iter().find(|(title, _)| *title == table.title).map_or("", |(_, plots)| plots);
            body += &html::section(&format!("s{idx}"), table, plots);
        }
        html::page(&self.title(), &body)
    }

    fn title(&self) -> String {
        format!("{}, simulated on {} GPUs", self.plan, self.simulated.gpus)
    }

    fn lines(&self) -> [(&'static str, String); 5] {
        [
            ("Plan", self.spread.clone()),
            ("Model", self.model.line()),
            ("Cluster", self.cluster.line()),
            ("Workload", self.workload.clone()),
            ("Experts", self.routing.clone()),
        ]
    }

    fn tables(&self) -> Vec<Table> {
        let mut tables = vec![self.latency(), self.throughput()];
        tables.extend(self.against());
        tables.push(self.server());
        tables.push(self.time());
        tables
    }

    fn latency(&self) -> Table {
        let one = &self.simulated;
        let row = |name: &str, of: &Distribution| {
            Row::new(name, [of.mean, of.p50, of.p90, of.p99].map(|seconds| number(1e3 * seconds)))
        };
        Table {
            title: LATENCY,
            about: "By request, and time between tokens by token. TPOT is the mean gap between a request's tokens after the first.",
            heads: ["mean", "p50", "p90", "p99"].map(str::to_owned).to_vec(),
            rows: vec![
                row("Time to first token (TTFT)", &one.ttft_s),
                row("Time per output token (TPOT)", &one.tpot_s),
                row("Time between tokens (ITL)", &one.itl_s),
                row("Question to last token", &one.e2e_s),
            ],
        }
    }

    fn throughput(&self) -> Table {
        let one = &self.simulated;
        let mut rows = vec![
            Row::new("Output tokens/s, all users", [number(one.tokens_per_s)]),
            Row::new("Output tokens/s for each GPU", [number(one.tokens_per_s_gpu)]),
            Row::new("Output tokens/s of one user", [number(one.tokens_per_s_user)]),
        ];
        if let Some(steady) = one.steady {
            rows.push(Row::new("Output tokens/s, start and end left out", [number(steady.tokens_per_s)]));
        }
        rows.push(Row::new("Requests/s", [number(one.requests_per_s)]));
        if let Some(goodput) = one.goodput {
            let share = percent(goodput.share);
            let cell = format!("{} ({share} %)", number(goodput.requests_per_s));
            rows.push(Row::new(format!("Goodput, {}", goals(&goodput.goals)), [cell]));
        }
        Table {
            title: "Throughput",
            about: "\"Tokens per second\" has two meanings: what the server puts out, and what one user sees, which is 1 / TPOT. Goodput \
                    counts the requests per second that met all goals.",
            heads: vec![String::new()],
            rows,
        }
    }

    /// Other seeds and the closed form.
    fn against(&self) -> Option<Table> {
        let (one, closed, trials) = (&self.simulated, self.closed_form.as_ref(), self.trials.as_ref());
        if closed.is_none() && trials.is_none() {
            return None;
        }
        let (ttft, tpot, rate) = match one.steady {
            Some(steady) => (steady.ttft_s, steady.tpot_s, steady.tokens_per_s),
            None => (one.ttft_s.mean, one.tpot_s.mean, one.tokens_per_s),
        };
        let milli = |seconds: f64| number(1e3 * seconds);
        let range = |estimate: Option<Estimate>, show: &dyn Fn(f64) -> String| match estimate {
            Some(estimate) => format!("{} to {}", show(estimate.low), show(estimate.high)),
            None => "–".to_owned(),
        };
        let value = |estimate: Option<Estimate>, show: &dyn Fn(f64) -> String| {
            estimate.map_or("–".to_owned(), |estimate| show(estimate.value))
        };
        let row = |name: &str,
                   own: f64,
                   of_closed: Option<Estimate>,
                   of_trials: Option<Estimate>,
                   show: &dyn Fn(f64) -> String| {
            Row::new(
                name,
                [show(own), value(of_trials, show), range(of_trials.or(of_closed), show), value(of_closed, show)],
            )
        };
        Some(Table {
            title: "How sure",
            about: "This run (start and end left out where there is more), the mean over all seeds, what lies in nine of ten cases \
                    when prices are as far off as they may be, and the closed form, whose users are in steady state.",
            heads: ["this run", "all seeds", "90 % interval", "closed form"].map(str::to_owned).to_vec(),
            rows: vec![
                row("TTFT, ms", ttft, closed.map(|p| p.ttft_s), trials.map(|t| t.ttft_s), &milli),
                row("TPOT, ms", tpot, closed.map(|p| p.tpot_s), trials.map(|t| t.tpot_s), &milli),
                row("Output tokens/s", rate, closed.map(|p| p.tokens_per_s), trials.map(|t| t.tokens_per_s), &number),
            ],
        })
    }

    fn server(&self) -> Table {
        let one = &self.simulated;
        let cell = |text: String| [text];
        Table {
            title: SERVER,
            about: "A step waits for the data-parallel group whose attention takes longest. A preempted request gives its KV cache back \
                    and is computed again.",
            heads: vec![String::new()],
            rows: vec![
                Row::new("Length of the run", cell(format::seconds(one.seconds))),
                Row::new("Steps", cell(integer(one.steps))),
                Row::new("Steps with prefill", cell(format!("{} %", percent(one.prefill_share)))),
                Row::new("Requests that run, mean", cell(number(one.running))),
                Row::new("KV cache of a group, tokens", cell(integer(one.kv_tokens as u64))),
                Row::new("KV cache in use, mean", cell(format!("{} %", percent(one.kv_use_mean)))),
                Row::new("KV cache in use, most", cell(format!("{} %", percent(one.kv_use_max)))),
                Row::new("Preemptions", cell(integer(one.preemptions))),
                Row::new("Prompt tokens from the prefix cache", cell(format!("{} %", percent(one.prefix_hit)))),
            ],
        }
    }

    fn time(&self) -> Table {
        let one = &self.simulated;
        let share = |value: f64| [format!("{} %", percent(value))];
        let mut rows = vec![
            Row::new("GPU utilization (a rank computes)", share(one.gpu_utilization)),
            Row::new("MFU", share(one.mfu)),
            Row::new("MBU", share(one.mbu)),
            Row::new("Load of experts, max / mean", [number(one.imbalance)]),
        ];
        for class in &one.communication {
            let cell = format!("{} %, exposed {} %", percent(class.total), percent(class.exposed));
            rows.push(Row::new(format!("Communication, {}", collective_name(class.class)), [cell]));
        }
        Table {
            title: "Where time goes",
            about: "Shares of the length of the run, of a rank with attention.",
            heads: vec![String::new()],
            rows,
        }
    }

    fn tiles(&self) -> String {
        let one = &self.simulated;
        let mut tiles = vec![
            ("TTFT, median", format::seconds(one.ttft_s.p50), format!("p99 {}", format::seconds(one.ttft_s.p99))),
            ("TPOT, median", format::seconds(one.tpot_s.p50), format!("p99 {}", format::seconds(one.tpot_s.p99))),
            ("Output tokens/s", number(one.tokens_per_s), format!("{} for each GPU", number(one.tokens_per_s_gpu))),
        ];
        if let Some(goodput) = one.goodput {
            let detail = format!("{} % of requests: {}", percent(goodput.share), goals(&goodput.goals));
            tiles.push(("Goodput, requests/s", number(goodput.requests_per_s), detail));
        }
        html::tile_list(&tiles)
    }

    /// Share of requests (or tokens) within a time.
    fn latency_plots(&self) -> String {
        let one = &self.simulated;
        let plot = |title: &str, of: &Distribution| {
            let most = of.percentiles.last().copied().unwrap_or(0.0);
            if most <= 0.0 {
                return String::new();
            }
            let points: Vec<(f64, f64)> = of
                .percentiles
                .iter()
                .enumerate()
                .map(|(percent, value)| (value / most, percent as f64 / 100.0))
                .collect();
            figure(title, &[Line { class: "ours", points }], ["100 %", "0"], ["0", &format::seconds(most)])
        };
        let plots = [
            plot("Requests with their first token within", &one.ttft_s),
            plot("Requests with this time per output token or less", &one.tpot_s),
            plot("Tokens that came this soon after the last", &one.itl_s),
            plot("Requests answered within", &one.e2e_s),
        ];
        format!("<div class=\"pair\">{}</div>", plots.concat())
    }

    fn timelines(&self) -> String {
        let timeline = &self.simulated.timeline;
        let end = self.simulated.seconds;
        let curve = |of: fn(&Moment) -> f64, most: f64, class: &'static str| {
            let points = timeline.iter().map(|moment| (moment.at_s / end, of(moment) / most));
            Line { class, points: points.collect() }
        };
        let most = |of: fn(&Moment) -> f64| timeline.iter().map(of).fold(0.0, f64::max).max(1e-9);
        let ends = ["0".to_owned(), format::seconds(end)];
        let ends = [ends[0].as_str(), ends[1].as_str()];
        let requests = most(|moment| moment.running.max(moment.waiting));
        let rows = most(|moment| moment.decodes.max(moment.prefill_tokens));
        let plots = [
            figure("KV cache in use", &[curve(|moment| moment.kv_use, 1.0, "ours")], ["100 %", "0"], ends),
            html::legend(&[("attention", "run".to_owned()), ("exposed", "wait".to_owned())])
                + &figure(
                    "Requests",
                    &[curve(|m| m.running, requests, "attention"), curve(|m| m.waiting, requests, "exposed")],
                    [&number(requests), "0"],
                    ends,
                ),
            html::legend(&[("attention", "answers".to_owned()), ("exposed", "prompts".to_owned())])
                + &figure(
                    "Tokens of a step, in the group that all wait for",
                    &[curve(|m| m.decodes, rows, "attention"), curve(|m| m.prefill_tokens, rows, "exposed")],
                    [&number(rows), "0"],
                    ends,
                ),
        ];
        plots.concat()
    }
}

/// A table whose columns are as wide as what is in them.
fn columns(table: &Table) -> String {
    let width = |cells: &mut dyn Iterator<Item = &String>| cells.map(|cell| cell.chars().count()).max().unwrap_or(0);
    let names = width(&mut table.rows.iter().map(|row| &row.name));
    let widths: Vec<usize> = (0..table.heads.len())
        .map(|idx| width(&mut table.rows.iter().map(|row| &row.cells[idx]).chain([&table.heads[idx]])))
        .collect();
    let mut text = format!("\n{}\n", table.title.to_uppercase());
    let mut line = |name: &str, cells: &[String]| {
        let mut line = format!("{name:<names$}");
        for (cell, width) in cells.iter().zip(&widths) {
            let _ = write!(line, "   {cell:>width$}");
        }
        text += line.trim_end();
        text.push('\n');
    };
    if table.heads.iter().any(|head| !head.is_empty()) {
        line("", &table.heads);
    }
    table.rows.iter().for_each(|row| line(&row.name, &row.cells));
    text
}

/// Lines in a frame: what its top and bottom, and its left and right, stand for.
fn figure(title: &str, lines: &[Line], y: [&str; 2], x: [&str; 2]) -> String {
    format!(
        "<figure><figcaption>{}</figcaption><div class=\"axes\"><span class=\"y\"><span>{}</span><span>{}</span></span>{}\
         <span class=\"x\"><span>{}</span><span>{}</span></span></div></figure>\n",
        escape(title),
        escape(y[0]),
        escape(y[1]),
        plots::lines(lines, title),
        escape(x[0]),
        escape(x[1])
    )
}

fn goals(goals: &Goals) -> String {
    let said = [("TTFT", goals.ttft_s), ("TPOT", goals.tpot_s), ("all", goals.e2e_s)];
    let goal = |(name, limit): (&str, Option<f64>)| Some(format!("{name} ≤ {}", format::seconds(limit?)));
    said.into_iter().filter_map(goal).collect::<Vec<_>>().join(", ")
}
