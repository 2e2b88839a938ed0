//! Plots as SVG without text: shapes stretch to any width, labels are HTML beside them.

use std::fmt::Write;

use moesaic_plan::Collective;

use super::format::{escape, number};
use super::{Activity, Timeline, TimelineSpan};
use crate::metrics::{ExpertLoad, Imbalance, LayerLoad};

/// A part of a bar.
pub(crate) struct Segment {
    /// Share of the bar's full width.
    pub(crate) share: f64,
    /// Class of its colour.
    pub(crate) class: String,
    /// Shown on hover, and read aloud.
    pub(crate) title: String,
}

/// A bar of segments, one after the other.
pub(crate) fn bar(segments: &[Segment]) -> String {
    let label: Vec<&str> = segments.iter().map(|segment| segment.title.as_str()).collect();
    let mut svg = format!(
        "<svg class=\"bar\" viewBox=\"0 0 1000 10\" preserveAspectRatio=\"none\" role=\"img\" aria-label=\"{}\">\
         <rect class=\"track\" width=\"1000\" height=\"10\"/>",
        escape(&label.join(", "))
    );
    let mut x = 0.0;
    for segment in segments {
        let width = (1000.0 * segment.share).clamp(0.0, 1000.0 - x);
        if width > 0.0 {
            let (class, title) = (&segment.class, escape(&segment.title));
            let _ = write!(
                svg,
                "<rect class=\"{class}\" x=\"{x:.2}\" width=\"{width:.2}\" height=\"10\"><title>{title}</title></rect>"
            );
        }
        x += width;
    }
    svg + "</svg>"
}

/// A line in a frame.
pub(crate) struct Line {
    /// Class of its colour.
    pub(crate) class: &'static str,
    /// Ascending x with y, shares of the frame; y counts from below.
    pub(crate) points: Vec<(f64, f64)>,
}

/// Lines over a track.
pub(crate) fn lines(lines: &[Line], label: &str) -> String {
    let mut svg = format!(
        "<svg class=\"lines\" viewBox=\"0 0 1000 100\" preserveAspectRatio=\"none\" role=\"img\" aria-label=\"{}\">\
         <rect class=\"track\" width=\"1000\" height=\"100\"/>",
        escape(label)
    );
    for Line { class, points } in lines {
        let mut path = String::new();
        for (idx, (x, y)) in points.iter().enumerate() {
            let _ = write!(path, "{}{:.1} {:.2}", if idx == 0 { 'M' } else { 'L' }, 1000.0 * x, 100.0 * (1.0 - y));
        }
        let _ = write!(svg, "<path class=\"line {class}\" d=\"{path}\"/>");
    }
    svg + "</svg>"
}

/// A point of a scatter plot.
pub(crate) struct Dot {
    pub(crate) x: f64,
    pub(crate) y: f64,
    /// Class of its colour.
    pub(crate) class: &'static str,
    /// Shown on hover, and read aloud.
    pub(crate) title: String,
}

/// Points with a line through some of them, from the origin to `most`.
pub(crate) fn scatter(line: &[Dot], others: &[Dot], most: (f64, f64)) -> String {
    const SIZE: (f64, f64) = (1000.0, 420.0);
    const MARGIN: f64 = 16.0;
    let place = |dot: &Dot| {
        let share = |value: f64, most: f64| if most > 0.0 { value / most } else { 0.0 };
        let x = MARGIN + (SIZE.0 - 2.0 * MARGIN) * share(dot.x, most.0);
        let y = SIZE.1 - MARGIN - (SIZE.1 - 2.0 * MARGIN) * share(dot.y, most.1);
        (x, y)
    };
    let mut svg = format!(
        "<svg class=\"scatter\" viewBox=\"0 0 {} {}\" role=\"img\" aria-label=\"{} plans\">\
         <rect class=\"track\" width=\"{}\" height=\"{}\" rx=\"6\"/><path class=\"line\" d=\"",
        SIZE.0,
        SIZE.1,
        line.len() + others.len(),
        SIZE.0,
        SIZE.1
    );
    for (idx, dot) in line.iter().enumerate() {
        let (x, y) = place(dot);
        let _ = write!(svg, "{}{x:.1} {y:.1}", if idx == 0 { 'M' } else { 'L' });
    }
    svg += "\"/>";
    for dot in line.iter().chain(others) {
        let ((x, y), title) = (place(dot), escape(&dot.title));
        let _ = write!(
            svg,
            "<circle class=\"{}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"10\"><title>{title}</title></circle>",
            dot.class
        );
    }
    svg + "</svg>"
}

/// Limits of the ten colours of a heat map: load / mean load up to this one.
pub(crate) const HEAT: [f64; 9] = [0.25, 0.5, 0.75, 0.9, 1.1, 1.33, 1.67, 2.0, 3.0];
/// Most cells across and down; of more, the fullest of each few is drawn.
const MAX_CELLS: (usize, usize) = (512, 128);

/// Layers down, experts across, colour by load / mean load of the layer.
pub(crate) fn heat_map(load: &ExpertLoad) -> String {
    let num_experts = load.layers.iter().map(|layer| layer.tokens.len()).max().unwrap_or(0).max(1);
    let (across, down) = (num_experts.min(MAX_CELLS.0), load.layers.len().clamp(1, MAX_CELLS.1));
    // One path a colour, so that 15,000 cells are 10 shapes.
    let mut paths = vec![String::new(); HEAT.len() + 1];
    let mut rows = String::new();
    for y in 0..down {
        let layers = &load.layers[parts(y, down, load.layers.len())];
        let levels: Vec<usize> = (0..across).map(|x| level(layers, parts(x, across, num_experts))).collect();
        let mut x = 0;
        for run in levels.chunk_by(|a, b| a == b) {
            let _ = write!(paths[run[0]], "M{x} {y}h{0}v1h-{0}z", run.len());
            x += run.len();
        }
        let _ = write!(
            rows,
            "<rect class=\"row\" y=\"{y}\" width=\"{across}\" height=\"1\"><title>{}</title></rect>",
            row_title(layers)
        );
    }
    let height = (down * if down <= 24 { 16 } else { 7 }).min(640);
    let mut svg = format!(
        "<svg class=\"heat\" style=\"height:{height}px\" viewBox=\"0 0 {across} {down}\" preserveAspectRatio=\"none\" \
         shape-rendering=\"crispEdges\" role=\"img\" aria-label=\"Load of {num_experts} experts in {} layers\">",
        load.layers.len()
    );
    for (level, path) in paths.iter().enumerate().filter(|(_, path)| !path.is_empty()) {
        let _ = write!(svg, "<path class=\"h{level}\" d=\"{path}\"/>");
    }
    svg + &rows + "</svg>"
}

/// The `idx`th of `count` nearly equal parts of `0 .. n`.
fn parts(idx: usize, count: usize, n: usize) -> std::ops::Range<usize> {
    idx * n / count..(idx + 1) * n / count
}

/// Colour of the fullest of some experts in some layers.
fn level(layers: &[LayerLoad], experts: std::ops::Range<usize>) -> usize {
    let of_layer = |layer: &LayerLoad| {
        let mean = layer.tokens.iter().sum::<u64>() as f64 / layer.tokens.len().max(1) as f64;
        let loads = layer.tokens.get(experts.clone()).unwrap_or_default();
        let most = loads.iter().max().copied().unwrap_or(0) as f64;
        if mean > 0.0 { most / mean } else { 0.0 }
    };
    let ratio = layers.iter().map(of_layer).fold(0.0, f64::max);
    HEAT.iter().position(|&limit| ratio <= limit).unwrap_or(HEAT.len())
}

fn row_title(layers: &[LayerLoad]) -> String {
    let of_layer = |layer: &LayerLoad| {
        let (fullest, most) = layer.tokens.iter().enumerate().max_by_key(|(_, tokens)| **tokens).unwrap_or((0, &0));
        let Imbalance { max_over_mean, std_dev } = Imbalance::of(&layer.tokens);
        format!(
            "layer {}: max / mean {}, std-dev of share {}, most for expert {fullest} ({} tokens)",
            layer.layer,
            number(max_over_mean),
            number(std_dev),
            number(*most as f64)
        )
    };
    layers.iter().map(of_layer).collect::<Vec<_>>().join("; ")
}

/// Class of an activity's colour.
pub(crate) fn activity_class(activity: Activity) -> &'static str {
    match activity {
        Activity::Attention => "attention",
        Activity::Experts => "experts",
        Activity::Other => "other",
        Activity::Waiting => "wait",
        Activity::Message(collective) => collective_class(collective),
    }
}

/// Class of a collective's colour.
pub(crate) fn collective_class(collective: Collective) -> &'static str {
    match collective {
        Collective::AllReduce => "all-reduce",
        Collective::AllToAll => "all-to-all",
        Collective::SendReceive => "send-receive",
        Collective::AllGather => "all-gather",
        Collective::Broadcast => "weights",
    }
}

/// One rank of a timeline: compute above, messages below.
pub(crate) fn lane(compute: &[TimelineSpan], network: &[TimelineSpan], timeline: &Timeline) -> String {
    let mut svg = String::from(
        "<svg class=\"lane\" viewBox=\"0 0 1000 10\" preserveAspectRatio=\"none\" aria-hidden=\"true\">\
         <rect class=\"track\" width=\"1000\" height=\"6.6\"/>",
    );
    let scale = if timeline.seconds > 0.0 { 1000.0 / timeline.seconds } else { 0.0 };
    // One path for spans of one look; odd micro-batches are lighter.
    let mut looks: Vec<(String, String)> = Vec::new();
    for (spans, (y, height)) in [(compute, (0.0, 6.6)), (network, (7.2, 2.8))] {
        for span in spans {
            let class = format!("{} m{}", activity_class(span.activity), span.micro_batch % 2);
            let (x, width) = (scale * span.start, (scale * (span.end - span.start)).max(0.4));
            let path = format!("M{x:.1} {y}h{width:.1}v{height}h-{width:.1}z");
            match looks.iter_mut().find(|(look, _)| *look == class) {
                Some((_, d)) => d.push_str(&path),
                None => looks.push((class, path)),
            }
        }
    }
    // Waits are parts of actions, and drawn over them.
    looks.sort_by_key(|(class, _)| class.starts_with("wait"));
    for (class, d) in looks {
        let _ = write!(svg, "<path class=\"{class}\" d=\"{d}\"/>");
    }
    svg + "</svg>"
}
