//! The result as one page.

use std::fmt::Write;

use moesaic_spec::Bytes;

use super::super::format::{escape, integer, number, percent, seconds};
use super::super::html::{Plot, page, section, tile_list};
use super::super::plots::{self, Dot, Segment, bar};
use super::super::tables::{Row, Table};
use super::text::{gained, parts};
use super::{Planning, Pools, Proposal};
use crate::memory::Memory;

const PARTS: [&str; 5] = ["p0", "p1", "p2", "p3", "p4"];

pub(super) fn render(planning: &Planning) -> String {
    let mut body = header(planning);
    let scatter = frontier_plot(planning);
    body += &section("frontier", &frontier_table(&planning.frontier), &scatter);
    let about = "The same for the time to the first token.";
    body += &section(
        "ttft-frontier",
        &Table { about, title: "By time to first token", ..frontier_table(&planning.ttft_frontier) },
        "",
    );
    body += &section("strategies", &strategies(planning), &time_plot(planning));
    if let Some(pools) = &planning.pools {
        let gain = pools.gain.map_or_else(String::new, |gain| format!("<p class=\"about\">{}.</p>", gained(gain)));
        body += &section("pools", &pools_table(pools), &gain);
    }
    body += &section("memory", &memory_table(planning), &memory_plot(planning));
    body += &assumptions(planning);
    page(&planning.title(), &body)
}

fn header(planning: &Planning) -> String {
    let best = &planning.best;
    let goals = [
        planning.goals.ttft.map(|goal| format!("TTFT at most {}", seconds(goal))),
        planning.goals.tpot.map(|goal| format!("TPOT at most {}", seconds(goal))),
        (planning.tolerate_failures > 0).then(|| format!("{} GPUs may fail", planning.tolerate_failures)),
    ];
    let goals: Vec<String> = goals.into_iter().flatten().collect();
    let goals = if goals.is_empty() { "none: throughput alone counts".to_owned() } else { goals.join(", ") };
    let gpus = match planning.gpus {
        (from, to) if from == to => integer(to as u64),
        (from, to) => format!("{} to {}", integer(from as u64), integer(to as u64)),
    };
    let facts = [
        ("Model", planning.model.line()),
        ("Cluster", planning.cluster.line()),
        ("Workload", planning.workload.line()),
        ("GPUs", gpus),
        ("Goals", goals),
    ];
    let mut html = format!(
        "<header>\n<p class=\"eyebrow\">moesaic plan</p>\n<h1>{}</h1>\n<dl>",
        escape(&format!("{} on {}: {}", planning.model.name, planning.cluster.name, best.name()))
    );
    for (name, line) in facts {
        let _ = write!(html, "<dt>{name}</dt><dd>{}</dd>", escape(&line));
    }
    let _ = write!(html, "</dl>\n<p class=\"callout\">Limited by: {}.</p>\n</header>\n", escape(&best.binds));
    html + &tiles(planning)
}

fn tiles(planning: &Planning) -> String {
    let prediction = &planning.best.prediction;
    let between =
        |low: f64, high: f64, show: fn(f64) -> String| format!("{} to {}, 9 times of 10", show(low), show(high));
    let [tpot, ttft, rate] = [prediction.tpot_s, prediction.ttft_s, prediction.tokens_per_s_gpu];
    let mut tiles = vec![
        ("Tokens/s and GPU", number(rate.value), between(rate.low, rate.high, number)),
        ("Time per output token", seconds(tpot.value), between(tpot.low, tpot.high, seconds)),
        ("Time to first token", seconds(ttft.value), between(ttft.low, ttft.high, seconds)),
        (
            "Tokens/s in all",
            number(prediction.tokens_per_s.value),
            format!("{} GPUs, {} requests at a time", integer(prediction.gpus as u64), number(prediction.concurrency)),
        ),
    ];
    if let (Some(second), Some(regret)) = (&planning.runner_up, &planning.regret) {
        let detail = format!("lost on average if {} is the faster one after all", second.name());
        tiles.push(("Regret", format!("{} %", number(100.0 * regret.expected)), detail));
    }
    tile_list(&tiles)
}

fn frontier_table(frontier: &[Proposal]) -> Table {
    let heads = ["tokens/s and GPU", "TPOT", "TTFT", "requests at a time", "GPUs", "tokens/s", "memory"];
    let row = |proposal: &Proposal| {
        let prediction = &proposal.prediction;
        let cells = vec![
            number(prediction.tokens_per_s_gpu.value),
            seconds(prediction.tpot_s.value),
            seconds(prediction.ttft_s.value),
            integer(prediction.concurrency as u64),
            integer(prediction.gpus as u64),
            number(prediction.tokens_per_s.value),
            format!("{} %", percent((1000.0 * prediction.memory.total() / prediction.gpu_memory).round() / 1000.0)),
        ];
        Row { name: proposal.name(), cells, best: None }
    };
    Table {
        title: "Throughput against time per output token",
        about: "Plans that no other beats in both, within the goals.",
        heads: heads.map(str::to_owned).to_vec(),
        rows: frontier.iter().map(row).collect(),
    }
}

fn frontier_plot(planning: &Planning) -> String {
    let at = |proposal: &Proposal, class: &'static str| {
        let prediction = &proposal.prediction;
        let (x, y) = (1e3 * prediction.tpot_s.value, prediction.tokens_per_s_gpu.value);
        let title = format!("{}: TPOT {}, {} tokens/s and GPU", proposal.name(), seconds(x / 1e3), number(y));
        Dot { x, y, class, title }
    };
    let line: Vec<Dot> = planning.frontier.iter().map(|proposal| at(proposal, "ours")).collect();
    let mut dots: Vec<Dot> = planning
        .strategies
        .iter()
        .filter_map(|verdict| verdict.proposal.as_ref())
        .map(|proposal| at(proposal, "baseline"))
        .collect();
    dots.push(at(&planning.best, "exposed"));
    let all = || line.iter().chain(&dots);
    let [x, y] = [all().map(|dot| dot.x).fold(0.0, f64::max), all().map(|dot| dot.y).fold(0.0, f64::max)];
    format!(
        "<figure><figcaption>Tokens/s and GPU (up) against time per output token (right)</figcaption>{}\
         <div class=\"axes\"><span class=\"y\"><span>{}</span><span>0</span></span>{}<span class=\"x\"><span>0</span>\
         <span>TPOT {} ms</span></span></div></figure>",
        super::super::html::legend(&[
            ("ours", "what nothing beats".to_owned()),
            ("baseline", "the best of each strategy".to_owned()),
            ("exposed", "the best".to_owned()),
        ]),
        number(y),
        plots::scatter(&line, &dots, (x, y)),
        number(x)
    )
}

fn strategies(planning: &Planning) -> Table {
    let rows = planning.strategies.iter().map(|verdict| {
        let cells = match &verdict.proposal {
            None => vec!["-".to_owned(), "-".to_owned(), "-".to_owned(), "-".to_owned(), verdict.why.clone()],
            Some(proposal) => vec![
                proposal.name(),
                number(proposal.prediction.tokens_per_s_gpu.value),
                seconds(proposal.prediction.tpot_s.value),
                seconds(proposal.prediction.ttft_s.value),
                verdict.why.clone(),
            ],
        };
        Row { name: verdict.strategy.clone(), cells, best: None }
    });
    Table {
        title: "The strategies",
        about: "Each strategy's best plan within the goals, or the one that comes nearest to them, and why it is not the best.",
        heads: ["plan", "tokens/s and GPU", "TPOT", "TTFT", "why"].map(str::to_owned).to_vec(),
        rows: rows.collect(),
    }
}

/// The best of each strategy.
/// Workers that read and workers that answer.
fn pools_table(pools: &Pools) -> Table {
    let heads = ["workers", "plan", "tokens/s and GPU", "TPOT", "TTFT", "GPUs"];
    let row = |name: &str, cells: [String; 6]| Row { name: name.to_owned(), cells: cells.to_vec(), best: None };
    let empty = String::new;
    let of = |name: &str, workers: usize, plan: &str| {
        row(name, [workers.to_string(), plan.to_owned(), empty(), empty(), empty(), empty()])
    };
    let all = [
        empty(),
        empty(),
        number(pools.tokens_per_s_gpu.value),
        seconds(pools.tpot_s.value),
        seconds(pools.ttft_s.value),
        integer(pools.gpus as u64),
    ];
    Table {
        title: "Prompts and answers on GPUs of their own",
        about: "Workers that read send keys and values to workers that answer. Told by iterations alone, without what a program adds. \
                Nothing here runs both kinds together yet: each plan runs by itself.",
        heads: heads.map(str::to_owned).to_vec(),
        rows: vec![
            of("read", pools.prefill_workers, &pools.prefill.name),
            of("answer", pools.decode_workers, &pools.decode.name),
            row("together", all),
        ],
    }
}

fn shown(planning: &Planning) -> impl Iterator<Item = (&str, &Proposal)> {
    planning.strategies.iter().filter_map(|verdict| Some((verdict.strategy.as_str(), verdict.proposal.as_ref()?)))
}

fn time_plot(planning: &Planning) -> String {
    const SHARES: [(&str, &str); 4] = [
        ("compute", "computing alone"),
        ("all-to-all", "computing that hides communication"),
        ("exposed", "communication that nothing hides"),
        ("wait", "waiting"),
    ];
    let bars = shown(planning).map(|(strategy, proposal)| {
        let [computing, exposed, waiting] = proposal.shares();
        let hidden = proposal.hidden().min(computing);
        let shares = [computing - hidden, hidden, exposed, waiting];
        let segments = shares.iter().zip(SHARES).map(|(&share, (class, name))| Segment {
            share,
            class: class.to_owned(),
            title: format!("{name} {:.0} %", 100.0 * share),
        });
        let value = format!("{:.0} % exposed", 100.0 * exposed);
        (strategy.to_owned(), bar(&segments.collect::<Vec<_>>()), value)
    });
    let legend = SHARES.map(|(class, name)| (class, name.to_owned())).to_vec();
    Plot { title: "Where the time of a rank with attention goes", legend, bars: bars.collect() }.html()
}

/// Ranks with attention, and those of an expert pool.
fn ranks(planning: &Planning) -> Vec<(String, Memory, f64)> {
    let mut all = Vec::new();
    for (strategy, proposal) in shown(planning) {
        let prediction = &proposal.prediction;
        all.push((strategy.to_owned(), prediction.memory, prediction.gpu_memory));
        if let Some(pool) = prediction.expert_memory {
            all.push((format!("{strategy}, experts"), pool, prediction.gpu_memory));
        }
    }
    all
}

fn memory_table(planning: &Planning) -> Table {
    let ranks = ranks(planning);
    let part = |idx: usize| Row {
        name: parts(&Memory::default())[idx].0.to_owned(),
        cells: ranks.iter().map(|(_, memory, _)| Bytes(parts(memory)[idx].1 as u64).to_string()).collect(),
        best: None,
    };
    let all = Row {
        name: "all".to_owned(),
        cells: ranks.iter().map(|(_, memory, _)| Bytes(memory.total() as u64).to_string()).collect(),
        best: None,
    };
    Table {
        title: "Memory of a rank",
        about: "Of the rank that has most, with as many requests as the plan is proposed for.",
        heads: ranks.iter().map(|(name, ..)| name.clone()).collect(),
        rows: (0..PARTS.len()).map(part).chain([all]).collect(),
    }
}

fn memory_plot(planning: &Planning) -> String {
    let ranks = ranks(planning);
    let Some(gpu) = ranks.first().map(|(.., gpu)| *gpu) else { return String::new() };
    let bars = ranks.iter().map(|(name, memory, _)| {
        let segments = parts(memory).into_iter().zip(PARTS).map(|((part, bytes), class)| Segment {
            share: bytes / gpu,
            class: class.to_owned(),
            title: format!("{part} {}", Bytes(bytes as u64)),
        });
        (name.clone(), bar(&segments.collect::<Vec<_>>()), Bytes(memory.total() as u64).to_string())
    });
    let legend = parts(&Memory::default()).into_iter().zip(PARTS).map(|((part, _), class)| (class, part.to_owned()));
    let bars = bars.collect();
    let plot = Plot { title: "Memory by part", legend: legend.collect(), bars }.html();
    format!("{plot}<p class=\"about\">The whole width is one GPU, {}.</p>", Bytes(gpu as u64))
}

fn assumptions(planning: &Planning) -> String {
    let mut html = String::from("<section id=\"about\">\n<h2>What this assumes</h2>\n<ul class=\"prose\">");
    for sentence in &planning.assumptions {
        let _ = write!(html, "<li>{}</li>", escape(sentence));
    }
    let counts = &planning.counts;
    let _ = write!(
        html,
        "<li>{} layouts at one concurrency were looked at, {} of them priced; bounds exclude the others.</li>",
        integer(counts.configurations as u64),
        integer(counts.priced as u64)
    );
    let _ = write!(html, "</ul>\n</section>\n<footer>moesaic plan, format {}</footer>\n", planning.version);
    html
}
