//! Progress bars: on a terminal only, and never on standard output.

use indicatif::{ProgressBar, ProgressStyle};

/// A bar over bytes; invisible when standard error is not a terminal or `quiet`.
pub(crate) fn bytes_bar(what: &'static str, total: u64, quiet: bool) -> ProgressBar {
    if quiet {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{prefix} {bar:32} {bytes}/{total_bytes} {bytes_per_sec} {eta}")
        .expect("a fixed template is right");
    ProgressBar::new(total).with_style(style).with_prefix(what)
}

/// A bar over things that take about as long each; invisible when standard error is not a terminal or `quiet`.
pub(crate) fn count_bar(what: &'static str, total: u64, quiet: bool) -> ProgressBar {
    if quiet {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{prefix} {bar:32} {pos}/{len}, {eta} left  {wide_msg}")
        .expect("a fixed template is right");
    ProgressBar::new(total).with_style(style).with_prefix(what)
}
