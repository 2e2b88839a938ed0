//! Plots as SVG files that are read in light and in dark.

use std::fmt::Write;

use serde::Serialize;

use crate::report::format::{escape, number};

/// A line, or the points of a claim.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Series {
    /// Its name.
    pub name: &'static str,
    /// Values at the x of the plot; `None` where nothing is said.
    pub y: Vec<Option<f64>>,
}

/// One plot: lines over a logarithmic x.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Plot {
    /// Name of its file, without the ending.
    pub name: &'static str,
    /// What it shows.
    pub title: &'static str,
    /// Under the x axis.
    pub x_label: &'static str,
    /// Beside the y axis.
    pub y_label: &'static str,
    /// Where the points are.
    pub x: Vec<f64>,
    /// Lines.
    pub series: Vec<Series>,
}

const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 340.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 170.0;
const TOP: f64 = 40.0;
const BOTTOM: f64 = 48.0;

/// Legible on white and on black alike; told apart also by those who see no red or green (Okabe and Ito, 2008).
const COLOURS: [&str; 6] = ["#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"];

impl Plot {
    /// Of one figure.
    pub fn new(name: &'static str, title: &'static str, [x_label, y_label]: [&'static str; 2], x: Vec<f64>) -> Plot {
        Plot { name, title, x_label, y_label, x, series: Vec::new() }
    }

    /// With one more line.
    #[must_use]
    pub fn with(mut self, name: &'static str, y: Vec<Option<f64>>) -> Plot {
        assert_eq!(y.len(), self.x.len(), "a value or none for each x");
        self.series.push(Series { name, y });
        self
    }

    /// The file.
    pub fn svg(&self) -> String {
        let (low, high) = self.limits();
        let (first, last) = (self.x[0].log2(), self.x[self.x.len() - 1].log2());
        let at_x = |x: f64| LEFT + (WIDTH - LEFT - RIGHT) * (x.log2() - first) / (last - first).max(1e-9);
        let at_y = |y: f64| {
            HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (y.log10() - low.log10()) / (high.log10() - low.log10())
        };
        let mut svg = head(self.title, HEIGHT);
        for tick in ticks(low, high) {
            let (y, label) = (at_y(tick), number(tick));
            let _ = writeln!(
                svg,
                "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{:.1}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>\
                 <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{label}</text>",
                WIDTH - RIGHT,
                LEFT - 6.0,
                y + 4.0
            );
        }
        for &x in &self.x {
            let _ = writeln!(
                svg,
                "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
                at_x(x),
                HEIGHT - BOTTOM + 18.0,
                number(x)
            );
        }
        let _ = writeln!(
            svg,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>\
             <text x=\"14\" y=\"{:.1}\" text-anchor=\"middle\" transform=\"rotate(-90 14 {:.1})\">{}</text>",
            (LEFT + WIDTH - RIGHT) / 2.0,
            HEIGHT - 10.0,
            escape(self.x_label),
            (TOP + HEIGHT - BOTTOM) / 2.0,
            (TOP + HEIGHT - BOTTOM) / 2.0,
            escape(self.y_label)
        );
        for (idx, series) in self.series.iter().enumerate() {
            let colour = COLOURS[idx % COLOURS.len()];
            let points: Vec<(f64, f64)> = self
                .x
                .iter()
                .zip(&series.y)
                .filter_map(|(&x, y)| y.filter(|y| *y > 0.0).map(|y| (at_x(x), at_y(y))))
                .collect();
            let line: Vec<String> = points.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
            let _ = write!(
                svg,
                "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>",
                line.join(" ")
            );
            for (x, y) in points {
                let _ = write!(svg, "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\" fill=\"{colour}\"/>");
            }
            let y = TOP + 10.0 + 18.0 * idx as f64;
            let _ = writeln!(
                svg,
                "<rect x=\"{:.1}\" y=\"{:.1}\" width=\"14\" height=\"3\" fill=\"{colour}\"/><text x=\"{:.1}\" y=\"{y:.1}\">{}</text>",
                WIDTH - RIGHT + 8.0,
                y - 5.0,
                WIDTH - RIGHT + 26.0,
                escape(series.name)
            );
        }
        svg + "</svg>\n"
    }

    /// Least and most of y, with some room.
    fn limits(&self) -> (f64, f64) {
        let all = || self.series.iter().flat_map(|series| series.y.iter().flatten()).copied().filter(|y| *y > 0.0);
        let (low, high) = (all().fold(f64::MAX, f64::min), all().fold(0.0, f64::max));
        if high > 0.0 { (low / 1.2, high * 1.2) } else { (0.1, 1.0) }
    }
}

/// Shares of a whole as stacked bars, a row each.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Bars {
    /// Name of its file, without the ending.
    pub name: &'static str,
    /// What it shows.
    pub title: &'static str,
    /// What the parts of a bar are.
    pub parts: Vec<&'static str>,
    /// Name and shares of each bar.
    pub rows: Vec<(String, Vec<f64>)>,
}

impl Bars {
    /// The file.
    pub fn svg(&self) -> String {
        const ROW: f64 = 26.0;
        let height = TOP + 30.0 + ROW * self.rows.len() as f64;
        let (left, width) = (190.0, WIDTH - 190.0 - 60.0);
        let longest = self.rows.iter().map(|(_, shares)| shares.iter().sum::<f64>()).fold(1.0, f64::max);
        let mut svg = head(self.title, height);
        for (idx, (name, shares)) in self.rows.iter().enumerate() {
            let y = TOP + ROW * idx as f64;
            let _ = writeln!(
                svg,
                "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
                left - 8.0,
                y + 14.0,
                escape(name)
            );
            let mut x = left;
            for (part, share) in shares.iter().enumerate() {
                let length = width * share / longest;
                let colour = COLOURS[part % COLOURS.len()];
                let _ = writeln!(
                    svg,
                    "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{length:.1}\" height=\"18\" fill=\"{colour}\"/>"
                );
                x += length;
            }
            let sum = 100.0 * shares.iter().sum::<f64>();
            let _ = writeln!(svg, "<text x=\"{:.1}\" y=\"{:.1}\">{}%</text>", x + 6.0, y + 14.0, number(sum));
        }
        for (idx, part) in self.parts.iter().enumerate() {
            let (x, y) = (left + 130.0 * idx as f64, height - 12.0);
            let colour = COLOURS[idx % COLOURS.len()];
            let _ = writeln!(
                svg,
                "<rect x=\"{x:.1}\" y=\"{:.1}\" width=\"12\" height=\"12\" fill=\"{colour}\"/><text x=\"{:.1}\" y=\"{y:.1}\">{}</text>",
                y - 10.0,
                x + 18.0,
                escape(part)
            );
        }
        svg + "</svg>\n"
    }
}

/// Title and colours that follow the reader's.
fn head(title: &str, height: f64) -> String {
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" \
         font-family=\"sans-serif\" font-size=\"12\">\n<title>{title}</title>\n<style>text{{fill:#333}}\
         .grid{{stroke:#ccc}}@media (prefers-color-scheme:dark){{text{{fill:#ddd}}.grid{{stroke:#444}}}}</style>\n\
         <text x=\"16\" y=\"20\" font-size=\"14\">{title}</text>\n",
        title = escape(title)
    )
}

/// 1, 2 and 5 of each power of ten.
fn ticks(low: f64, high: f64) -> Vec<f64> {
    let powers = low.log10().floor() as i32..=high.log10().ceil() as i32;
    let all = powers.flat_map(|power| [1.0, 2.0, 5.0].map(|step| step * 10f64.powi(power)));
    all.filter(|tick| (low..=high).contains(tick)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_lie_inside_the_frame() {
        let plot = Plot::new("a", "A < B", ["GPUs", "ms"], vec![4.0, 8.0, 16.0])
            .with("claimed", vec![None, Some(2.0), Some(1.0)])
            .with("predicted", vec![Some(900.0), Some(30.0), Some(4.0)]);
        let svg = plot.svg();
        assert!(svg.contains("A &lt; B") && svg.contains("prefers-color-scheme:dark") && svg.ends_with("</svg>\n"));
        assert_eq!(svg.matches("<circle").count(), 5);
        for y in svg.split("cy=\"").skip(1).map(|rest| rest.split('"').next().unwrap().parse::<f64>().unwrap()) {
            assert!((TOP..=HEIGHT - BOTTOM).contains(&y), "{y}");
        }
    }

    #[test]
    fn bars_have_a_part_for_each_share() {
        let rows = vec![("a".to_owned(), vec![0.1, 0.2]), ("b".to_owned(), vec![0.9, 0.6])];
        let bars = Bars { name: "b", title: "B", parts: vec!["x", "y"], rows };
        // Two bars of two parts, and a square for each part.
        assert_eq!(bars.svg().matches("<rect").count(), 6);
        assert!(bars.svg().contains(">150%<"));
    }

    #[test]
    fn ticks_are_round() {
        assert_eq!(ticks(0.9, 11.0), [1.0, 2.0, 5.0, 10.0]);
    }
}
