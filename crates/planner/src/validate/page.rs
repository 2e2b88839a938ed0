//! The validation as one page, with a parity plot for each kind of time.

use std::fmt::Write;

use super::report::{Line, Validation, reasons, said};
use super::score::Pair;
use crate::report::format::escape;

/// Colours of groups of points, in the style sheet of all reports.
const CLASSES: [&str; 8] = ["p0", "p1", "p2", "p3", "p4", "p5", "p6", "p7"];

pub(super) fn render(validation: &Validation) -> String {
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n<title>Predicted and measured</title>\n<style>\n{}{STYLE}</style>\n\
         </head>\n<body>\n<main>\n<header>\n<p class=\"eyebrow\">moesaic validate</p>\n<h1>Predicted and measured</h1>\n<dl>",
        include_str!("../report/style.css")
    );
    for (name, from) in [("Served models", &validation.served_from), ("Ops", &validation.ops_from)] {
        if !from.is_empty() {
            let _ = write!(page, "<dt>{name}</dt><dd>{}</dd>", escape(from));
        }
    }
    page += "</dl>\n</header>\n";
    if !validation.served.is_empty() {
        for (tpot, title) in [(true, "Time per output token"), (false, "Time to first token")] {
            let points = validation.served.iter().filter_map(|outcome| {
                let pair = if tpot { outcome.tpot } else { outcome.ttft };
                let title = format!("{} (line {})", outcome.id, outcome.line);
                Some((outcome.model.as_str(), title, pair?))
            });
            page += &section(title, &validation.served_lines(tpot), &parity(points.collect(), "ms", 1e3));
        }
    }
    if let Some(ranking) = validation.ranking() {
        let _ = write!(page, "<section>\n<h2>Choosing</h2>\n<p>{}</p>\n</section>\n", escape(&said(&ranking)));
    }
    if !validation.ops.is_empty() {
        let point = |op: &'_ super::ops::OpOutcome| (op.gpu.clone(), format!("{} (line {})", op.op, op.line), op.time);
        let points: Vec<(String, String, Pair)> = validation.ops.iter().map(point).collect();
        let points = points.iter().map(|(gpu, title, pair)| (gpu.as_str(), title.clone(), *pair)).collect();
        page += &section("Time of an op", &validation.op_lines(), &parity(points, "µs", 1e6));
        let _ =
            writeln!(page, "<p class=\"note\">Predictions faster than physics: {}.</p>", validation.below_physics());
    }
    page += &passed_over(validation);
    page + "</main>\n</body>\n</html>\n"
}

/// What the plots have beside the style of all reports.
const STYLE: &str = "
.parity { width: 100%; max-width: 620px; aspect-ratio: 1; background: var(--track); border-radius: 3px; }
.parity line { stroke: var(--soft); stroke-width: 1; vector-effect: non-scaling-stroke; }
.parity .near { stroke-dasharray: 4 4; }
.parity circle { opacity: 0.7; }
.axes.square { max-width: 680px; }
";

fn section(title: &str, lines: &[Line], plot: &str) -> String {
    let mut html = format!(
        "<section>\n<h2>{title}</h2>\n<div class=\"scroll\" tabindex=\"0\" role=\"region\" aria-label=\"{title}\"><table><thead><tr>\
         <td></td>"
    );
    for head in ["rows", "median", "mean", "p90", "in the 90 % interval"] {
        let _ = write!(html, "<th scope=\"col\">{head}</th>");
    }
    html += "</tr></thead><tbody>";
    for Line { name, score } in lines {
        let _ = write!(html, "<tr><th scope=\"row\">{}</th><td>{}</td>", escape(name), score.rows);
        for share in [score.median, score.mean, score.p90, score.inside] {
            let _ = write!(html, "<td>{:.1} %</td>", 100.0 * share);
        }
        html += "</tr>";
    }
    html + "</tbody></table></div>\n<p class=\"about\">Errors are |predicted / measured - 1|.</p>\n"
        + plot
        + "</section>\n"
}

/// Predictions over measurements, both as logarithms; dashed lines are 20 % away.
fn parity(points: Vec<(&str, String, Pair)>, unit: &str, factor: f64) -> String {
    let times = points.iter().flat_map(|(_, _, pair)| [pair.measured, pair.predicted.value]).map(|time| time * factor);
    let (low, high) = times.fold((f64::INFINITY, 0.0_f64), |(low, high), time| (low.min(time), high.max(time)));
    let (low, high) = ((low / 1.1).log10(), (high * 1.1).log10());
    let at = |time: f64| 1000.0 * (time.log10() - low) / (high - low);
    let mut groups: Vec<&str> = points.iter().map(|(group, ..)| *group).collect();
    groups.sort_unstable();
    groups.dedup();
    let class = |group: &str| CLASSES[groups.iter().position(|other| *other == group).unwrap_or(0) % CLASSES.len()];
    let mut html = String::from(
        "<figure><figcaption>Predicted over measured; dashed lines are 20 % away</figcaption><ul class=\"legend\">",
    );
    for group in &groups {
        let _ = write!(
            html,
            "<li><svg viewBox=\"0 0 10 10\" aria-hidden=\"true\"><rect class=\"{}\" width=\"10\" height=\"10\"/></svg>{}</li>",
            class(group),
            escape(group)
        );
    }
    let label = |at: f64| format!("{} {unit}", round(10_f64.powf(at)));
    let middle = f64::midpoint(low, high);
    let _ = write!(
        html,
        "</ul><div class=\"axes square\"><div class=\"y\"><span>{}</span><span>{}</span><span>{}</span></div>\
         <svg class=\"parity\" viewBox=\"0 0 1000 1000\" role=\"img\" aria-label=\"{} predictions over measurements\">",
        label(high),
        label(middle),
        label(low),
        points.len()
    );
    let away = 1000.0 * 1.2_f64.log10() / (high - low);
    for (class, shift) in [("same", 0.0), ("near", away), ("near", -away)] {
        let _ =
            write!(html, "<line class=\"{class}\" x1=\"0\" y1=\"{}\" x2=\"1000\" y2=\"{}\"/>", 1000.0 - shift, -shift);
    }
    for (group, title, pair) in &points {
        let (measured, predicted) = (pair.measured * factor, pair.predicted.value * factor);
        let _ = write!(
            html,
            "<circle class=\"{}\" cx=\"{:.1}\" cy=\"{:.1}\" r=\"7\"><title>{}: measured {} {unit}, predicted {}</title></circle>",
            class(group),
            at(measured),
            1000.0 - at(predicted),
            escape(title),
            round(measured),
            round(predicted)
        );
    }
    let _ = write!(
        html,
        "</svg><div class=\"x\"><span>{}</span><span>{}</span><span>{}</span></div></div></figure>\n",
        label(low),
        label(middle),
        label(high)
    );
    html
}

/// Three digits.
fn round(value: f64) -> String {
    let digits = (2 - value.abs().max(1e-9).log10().floor() as i32).clamp(0, 6) as usize;
    format!("{value:.digits$}")
}

fn passed_over(validation: &Validation) -> String {
    let mut html = String::new();
    for over in &validation.passed_over {
        for (why, lines) in reasons(&over.rows) {
            let _ = write!(html, "<tr><th scope=\"row\">{}</th><td>{}</td>", escape(&over.file), lines.len());
            let _ = write!(html, "<td>{}</td></tr>", escape(why));
        }
    }
    if html.is_empty() {
        return html;
    }
    format!(
        "<section>\n<h2>Rows passed over</h2>\n<div class=\"scroll\" tabindex=\"0\" role=\"region\" aria-label=\"Rows passed over\">\
         <table><thead><tr><td></td><th scope=\"col\">rows</th><th scope=\"col\">why</th></tr></thead><tbody>{html}</tbody></table>\
         </div>\n</section>\n"
    )
}
