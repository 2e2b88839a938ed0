//! The report as one page.

use std::fmt::Write;

use moesaic_plan::Collective;
use moesaic_spec::Bytes;

use super::format::{self, escape, number, percent};
use super::plots::{self, Segment, bar};
use super::tables::{self, Row, Table};
use super::{ABOUT_TIMES, Activity, Comparison, StrategyReport, Timeline};
use crate::clock::activity::COLLECTIVES;
use crate::metrics::{ExpertLoad, RankMemory};

/// Most bars of ranks for one strategy; of more groups of like ranks, the fullest of neighbours are shown.
const MAX_MEMORY_BARS: usize = 16;
/// Colours that tell parts of memory apart.
const PART_CLASSES: [&str; 10] = ["p0", "p1", "p2", "p3", "p4", "p5", "p6", "p7", "p8", "p9"];

pub(crate) fn render(comparison: &Comparison) -> String {
    let mut body = header(comparison);
    body += &section("performance", &tables::performance(comparison), &speed_plots(comparison));
    body += &section("sameness", &tables::results(comparison), "");
    body += &section("communication", &tables::communication(comparison), &time_plot(comparison));
    body += &section("links", &tables::links(comparison), &link_plot(comparison));
    body += &section("memory", &tables::memory(comparison), &memory_plot(comparison));
    body += &section("load", &tables::load(comparison), &heat_maps(comparison));
    body += &section("balance", &tables::balance(comparison), "");
    body += &section("prediction", &tables::synchronizer(comparison), "");
    body += &timelines(comparison);
    body += &section("more", &tables::more(comparison), "");
    body += &about(comparison);
    page(&comparison.title(), &body)
}

/// A page that needs nothing else.
pub(crate) fn page(title: &str, body: &str) -> String {
    head(title) + body + "</main>\n</body>\n</html>\n"
}

/// A page up to where its content begins.
pub(super) fn head(title: &str) -> String {
    let title = escape(title);
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n<title>{title}</title>\n<style>\n{}</style>\n</head>\n<body>\n<main>\n",
        include_str!("style.css")
    )
}

fn header(comparison: &Comparison) -> String {
    let mut html =
        format!("<header>\n<p class=\"eyebrow\">moesaic compare</p>\n<h1>{}</h1>\n<dl>", escape(&comparison.title()));
    let facts = [
        ("Model", comparison.model.line()),
        ("Cluster", comparison.cluster.line()),
        ("Workload", comparison.workload.line()),
    ];
    for (name, line) in facts {
        let _ = write!(html, "<dt>{name}</dt><dd>{}</dd>", escape(&line));
    }
    let _ = write!(html, "</dl>\n<p class=\"callout\">{}</p>\n</header>\n", escape(ABOUT_TIMES));
    html + &tiles(comparison)
}

fn tiles(comparison: &Comparison) -> String {
    let Some([(fast, tpot), (wide, throughput)]) = tables::winners(comparison) else {
        return String::new();
    };
    let strategies = &comparison.strategies;
    let compared = strategies.iter().filter_map(|strategy| strategy.sameness);
    let same = compared.clone().filter(|same| same.differing_tokens == 0).count();
    let exact = compared.clone().filter(|same| same.bit_identical()).count();
    let compared = compared.count();
    let exposed = |strategy: &StrategyReport| strategy.communication.all.exposed;
    let quiet = strategies.iter().min_by(|a, b| exposed(a).total_cmp(&exposed(b)));
    let mut tiles = Vec::new();
    if fast.performance.tpot_ms.mean > 0.0 {
        tiles.push(("Lowest TPOT", format!("{tpot} ms"), fast.name.clone()));
    }
    tiles.push(("Highest throughput", format!("{throughput} tok/s"), wide.name.clone()));
    if let Some(quiet) = quiet {
        tiles.push(("Least exposed communication", format!("{} %", percent(exposed(quiet))), quiet.name.clone()));
    }
    if compared > 0 {
        let widest = comparison.strategies.iter().filter_map(|strategy| strategy.sameness?.widest_gap).reduce(f64::max);
        let detail = match widest {
            None => format!("{exact} of them to the last bit"),
            Some(gap) => {
                format!("{exact} of them to the last bit; others part where two tokens are within {}", number(gap))
            }
        };
        tiles.push(("Same tokens as one rank", format!("{same} of {compared}"), detail));
    }
    tile_list(&tiles)
}

/// Figures that are seen first: name, value, and what is said of it.
pub(crate) fn tile_list(tiles: &[(&str, String, String)]) -> String {
    let tile = |(name, value, detail): &(&str, String, String)| {
        format!("<li><span>{name}</span><strong>{}</strong><span>{}</span></li>", escape(value), escape(detail))
    };
    format!("<ul class=\"tiles\">{}</ul>\n", tiles.iter().map(tile).collect::<String>())
}

/// A table with its plots; nothing where it has no rows.
pub(crate) fn section(id: &str, table: &Table, plots: &str) -> String {
    if table.rows.is_empty() {
        return String::new();
    }
    format!(
        "<section id=\"{id}\">\n<h2>{}</h2>\n<div class=\"scroll\" tabindex=\"0\" role=\"region\" aria-label=\"{}\">{}</div>\n\
         <p class=\"about\">{}</p>\n{plots}</section>\n",
        table.title,
        table.title,
        table_html(table),
        escape(table.about)
    )
}

fn table_html(table: &Table) -> String {
    let mut html = String::from("<table><thead><tr><td></td>");
    for head in &table.heads {
        let _ = write!(html, "<th scope=\"col\">{}</th>", escape(head));
    }
    html += "</tr></thead><tbody>";
    for Row { name, cells, best } in &table.rows {
        let class = if name.starts_with(' ') { " class=\"sub\"" } else { "" };
        let _ = write!(html, "<tr><th scope=\"row\"{class}>{}</th>", escape(name.trim_start()));
        for (idx, cell) in cells.iter().enumerate() {
            let class = match cell.as_str() {
                _ if *best == Some(idx) => " class=\"best\"",
                text if text.ends_with(" worse") => " class=\"worse\"",
                _ => "",
            };
            let _ = write!(html, "<td{class}>{}</td>", escape(cell));
        }
        html += "</tr>";
    }
    html + "</tbody></table>"
}

/// A titled group of bars with a legend above.
pub(crate) struct Plot<'a> {
    pub(crate) title: &'a str,
    pub(crate) legend: Vec<(&'a str, String)>,
    /// Name, bar, value.
    pub(crate) bars: Vec<(String, String, String)>,
}

impl Plot<'_> {
    pub(crate) fn html(&self) -> String {
        let mut html =
            format!("<figure><figcaption>{}</figcaption>{}<div class=\"bars\">", self.title, legend(&self.legend));
        for (name, bar, value) in &self.bars {
            let _ = write!(
                html,
                "<span class=\"name\">{}</span>{bar}<span class=\"value\">{}</span>",
                escape(name),
                escape(value)
            );
        }
        html + "</div></figure>\n"
    }
}

/// What colours mean.
pub(crate) fn legend(entries: &[(&str, String)]) -> String {
    if entries.is_empty() {
        return String::new();
    }
    let mut html = String::from("<ul class=\"legend\">");
    for (class, name) in entries {
        let _ = write!(
            html,
            "<li><svg viewBox=\"0 0 10 10\" aria-hidden=\"true\"><rect class=\"{class}\" width=\"10\" height=\"10\"/></svg>{}</li>",
            escape(name)
        );
    }
    html + "</ul>"
}

fn speed_plots(comparison: &Comparison) -> String {
    type Value = fn(&StrategyReport) -> f64;
    let decodes = comparison.strategies.iter().any(|strategy| strategy.performance.tpot_ms.mean > 0.0);
    let plots: [(&str, Value); 2] = [
        match decodes {
            true => ("Time per output token, ms (less is better)", |strategy| strategy.performance.tpot_ms.mean),
            false => ("Time to first token, ms (less is better)", |strategy| strategy.performance.ttft_ms.mean),
        },
        ("Output tokens per second and GPU (more is better)", |strategy| strategy.performance.tps_per_gpu),
    ];
    let plots = plots.map(|(title, of)| {
        let most = comparison.strategies.iter().map(of).fold(0.0, f64::max);
        let bars = comparison.strategies.iter().map(|strategy| {
            let value = of(strategy);
            let class = if strategy.baseline { "baseline" } else { "ours" }.to_owned();
            let share = if most > 0.0 { value / most } else { 0.0 };
            let title = format!("{}: {}", strategy.name, number(value));
            (strategy.name.clone(), bar(&[Segment { share, class, title }]), number(value))
        });
        Plot { title, legend: Vec::new(), bars: bars.collect() }.html()
    });
    format!("<div class=\"pair\">{}</div>", plots.concat())
}

/// Where the ranks' time goes: the four parts are all of it.
fn time_plot(comparison: &Comparison) -> String {
    const PARTS: [(&str, &str); 4] =
        [("compute", "computing"), ("exposed", "exposed messages"), ("wait", "waiting for others"), ("idle", "idle")];
    let bars = comparison.strategies.iter().map(|strategy| {
        let (computing, all) = (strategy.performance.gpu_utilization, strategy.communication.all);
        let idle = (1.0 - computing - all.exposed).max(0.0);
        let shares = [computing, all.exposed - all.waiting, all.waiting, idle];
        let segments = shares.iter().zip(PARTS).map(|(&share, (class, name))| Segment {
            share,
            class: class.to_owned(),
            title: format!("{name} {} %", percent(share)),
        });
        let value = format!("{} %", percent(computing));
        (strategy.name.clone(), bar(&segments.collect::<Vec<_>>()), value)
    });
    let legend = PARTS.map(|(class, name)| (class, name.to_owned())).to_vec();
    Plot { title: "Where the ranks' time goes, and the share of computing", legend, bars: bars.collect() }.html()
}

fn link_plot(comparison: &Comparison) -> String {
    let bytes = |strategy: &StrategyReport| strategy.communication.classes.iter().map(|class| class.bytes).sum::<u64>();
    let most = comparison.strategies.iter().map(bytes).max().unwrap_or(0).max(1) as f64;
    let used = |collective: &Collective| {
        let mut classes = comparison.strategies.iter().flat_map(|strategy| &strategy.communication.classes);
        classes.any(|class| class.collective == *collective)
    };
    let bars = comparison.strategies.iter().map(|strategy| {
        let segments = strategy.communication.classes.iter().map(|class| Segment {
            share: class.bytes as f64 / most,
            class: plots::collective_class(class.collective).to_owned(),
            title: format!("{} {}", tables::collective_name(class.collective), Bytes(class.bytes)),
        });
        (strategy.name.clone(), bar(&segments.collect::<Vec<_>>()), Bytes(bytes(strategy)).to_string())
    });
    let legend = COLLECTIVES.into_iter().filter(used);
    let legend = legend.map(|kind| (plots::collective_class(kind), tables::collective_name(kind).to_owned()));
    Plot { title: "Bytes sent in the whole run, by kind", legend: legend.collect(), bars: bars.collect() }.html()
}

fn memory_plot(comparison: &Comparison) -> String {
    let parts = tables::part_names(comparison);
    let class = |name: &str| {
        let idx = parts.iter().position(|part| part == name).unwrap_or(0);
        PART_CLASSES[idx.min(PART_CLASSES.len() - 1)]
    };
    // The scale is what the fullest rank uses, or all there is where that is not much more.
    let ranks = || comparison.strategies.iter().flat_map(|strategy| &strategy.memory);
    let most = ranks().map(RankMemory::used).max().unwrap_or(0).max(1);
    let available = ranks().map(|rank| rank.available).max().unwrap_or(0);
    let scale = if available <= 2 * most { available.max(most) } else { most } as f64;
    let mut html = String::new();
    for strategy in comparison.strategies.iter().filter(|strategy| !strategy.memory.is_empty()) {
        let bars = rank_groups(&strategy.memory).into_iter().map(|(name, rank)| {
            let segments = rank.parts.iter().map(|(part, bytes)| Segment {
                share: *bytes as f64 / scale,
                class: class(part).to_owned(),
                title: format!("{part} {}", Bytes(*bytes)),
            });
            (name, bar(&segments.collect::<Vec<_>>()), Bytes(rank.used()).to_string())
        });
        html += &Plot { title: &escape(&strategy.name), legend: Vec::new(), bars: bars.collect() }.html();
    }
    if html.is_empty() {
        return html;
    }
    let entries: Vec<(&str, String)> = parts.iter().map(|part| (class(part), part.clone())).collect();
    let scale = Bytes(scale as u64);
    format!("{}<div class=\"memory\">{html}</div><p class=\"about\">The whole width is {scale}.</p>", legend(&entries))
}

/// Neighbouring ranks of equal memory together; of too many groups, the fullest of each few.
fn rank_groups(memory: &[RankMemory]) -> Vec<(String, &RankMemory)> {
    let mut first = 0;
    let mut groups: Vec<(usize, usize, &RankMemory)> = Vec::new();
    for group in memory.chunk_by(|a, b| a == b) {
        groups.push((first, first + group.len() - 1, &group[0]));
        first += group.len();
    }
    let at_a_time = groups.len().div_ceil(MAX_MEMORY_BARS).max(1);
    let merged = groups.chunks(at_a_time).map(|few| {
        let fullest = few.iter().map(|group| group.2).max_by_key(|rank| rank.used()).expect("chunks are not empty");
        let (first, last) = (few[0].0, few[few.len() - 1].1);
        let name = if first == last { format!("rank {first}") } else { format!("ranks {first}–{last}") };
        (if few.len() > 1 { format!("{name}, fullest") } else { name }, fullest)
    });
    merged.collect()
}

/// One map for all strategies whose experts got the same tokens.
fn heat_maps(comparison: &Comparison) -> String {
    let mut maps: Vec<(&ExpertLoad, Vec<&str>)> = Vec::new();
    for strategy in &comparison.strategies {
        let Some(load) = strategy.expert_load.as_ref().filter(|load| !load.layers.is_empty()) else {
            continue;
        };
        match maps.iter_mut().find(|(other, _)| *other == load) {
            Some((_, names)) => names.push(&strategy.name),
            None => maps.push((load, vec![&strategy.name])),
        }
    }
    let mut html = String::new();
    for (load, names) in &maps {
        let experts = load.layers.iter().map(|layer| layer.tokens.len()).max().unwrap_or(0);
        let (first, last) = (load.layers[0].layer, load.layers[load.layers.len() - 1].layer);
        let _ = writeln!(
            html,
            "<figure><figcaption>Load of {experts} experts in layers {first} to {last}: {}</figcaption>\
             <div class=\"axes\"><span class=\"y\"><span>layer {first}</span><span>{last}</span></span>{}<span class=\"x\"><span>expert 0</span>\
             <span>{}</span></span></div></figure>",
            escape(&names.join(" · ")),
            plots::heat_map(load),
            experts.saturating_sub(1)
        );
    }
    if html.is_empty() {
        return html;
    }
    let limits = plots::HEAT.map(number);
    let mut scale = String::from("<div class=\"scale\"><span>load / mean of the layer: 0</span>");
    for level in 0..=limits.len() {
        let up_to = limits.get(level).map_or("more".to_owned(), |limit| format!("up to {limit}"));
        let _ = write!(
            scale,
            "<svg viewBox=\"0 0 10 10\" preserveAspectRatio=\"none\"><rect class=\"h{level}\" width=\"10\" height=\"10\"><title>{up_to}</title></rect></svg>"
        );
    }
    let _ = write!(scale, "<span>over {}; grey: within 10 %</span></div>", limits[limits.len() - 1]);
    scale + &html
}

fn timelines(comparison: &Comparison) -> String {
    let drawn: Vec<(&str, &Timeline)> = comparison
        .strategies
        .iter()
        .filter_map(|strategy| Some((strategy.name.as_str(), strategy.timeline.as_ref()?)))
        .filter(|(_, timeline)| !timeline.rows.is_empty())
        .collect();
    if drawn.is_empty() {
        return String::new();
    }
    let mut seen: Vec<Activity> = vec![Activity::Attention, Activity::Experts, Activity::Other, Activity::Waiting];
    let rows = drawn.iter().flat_map(|(_, timeline)| &timeline.rows);
    for span in rows.flat_map(|row| &row.network) {
        if !seen.contains(&span.activity) {
            seen.push(span.activity);
        }
    }
    let name = |activity: Activity| match activity {
        Activity::Attention => "attention",
        Activity::Experts => "experts",
        Activity::Other => "other ops",
        Activity::Waiting => "waiting for a message",
        Activity::Message(collective) => tables::collective_name(collective),
    };
    let entries: Vec<_> =
        seen.iter().map(|&activity| (plots::activity_class(activity), name(activity).to_owned())).collect();
    let mut html = format!(
        "<section id=\"timeline\">\n<h2>One step, rank by rank</h2>\n<p class=\"about\">For each rank its compute lane above, the \
         messages that it sends below, until they arrive. Every other micro-batch is lighter. Each picture has a scale of its own.</p>\n{}",
        legend(&entries)
    );
    for (strategy, timeline) in drawn {
        let shown = if timeline.rows.len() < timeline.ranks {
            format!(", {} of {} ranks", timeline.rows.len(), timeline.ranks)
        } else {
            String::new()
        };
        let _ = write!(
            html,
            "<figure><figcaption>{}: step {}, {}{shown}</figcaption><div class=\"gantt\" role=\"img\" aria-label=\"Timeline of {}\">",
            escape(strategy),
            timeline.step,
            format::seconds(timeline.seconds),
            escape(strategy)
        );
        for row in &timeline.rows {
            let _ = write!(html, "<span>{}</span>{}", row.rank, plots::lane(&row.compute, &row.network, timeline));
        }
        let _ = writeln!(
            html,
            "<span></span><span class=\"x\"><span>0</span><span>{}</span></span></div></figure>",
            format::seconds(timeline.seconds)
        );
    }
    html + "</section>\n"
}

fn about(comparison: &Comparison) -> String {
    let mut html = String::from("<section id=\"about\">\n<h2>Strategies</h2>\n<dl class=\"wide\">");
    for strategy in &comparison.strategies {
        let _ = write!(html, "<dt>{}</dt><dd>{}", escape(&strategy.name), escape(&strategy.description));
        for note in &strategy.notes {
            let _ = write!(html, "<br><span class=\"note\">{}</span>", escape(note));
        }
        html += "</dd>";
    }
    html += "</dl>\n<h2>How to read this</h2>\n<ul class=\"prose\">";
    const HOW: [&str; 4] = [
        "An op takes launch time plus the longer of operations / (peak × reached share) and bytes / (bandwidth × reached share).",
        "A message occupies the links of both GPUs, and of both nodes if it leaves its node, for bytes / bandwidth, and arrives a \
         latency later. Links carry one message at a time \
         for each GPU: who was first goes first, who is later waits, or uses what the first leaves.",
        "Computing and messages overlap only where the strategy's schedule lets them. Steps follow each other without a barrier.",
        "GPU utilisation is the share of time in which ops run, however well they use the GPU; MFU says how well. Memory efficiency \
         is used / available, mean over ranks.",
    ];
    let notes = comparison.notes.iter().map(String::as_str);
    for line in HOW.into_iter().chain(notes) {
        let _ = write!(html, "<li>{}</li>", escape(line));
    }
    let _ = write!(html, "</ul>\n</section>\n<footer>moesaic comparison, format {}</footer>\n", comparison.version);
    html
}
