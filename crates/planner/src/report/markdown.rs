//! The report in Markdown.

use super::{ABOUT_TIMES, Comparison, tables};
use tables::Table;

pub(crate) fn render(comparison: &Comparison) -> String {
    let mut text = format!("# {}\n\n", cell(&comparison.title()));
    text += &format!("- Model: {}\n", cell(&comparison.model.line()));
    text += &format!("- Cluster: {}\n", cell(&comparison.cluster.line()));
    text += &format!("- Workload: {}\n\n{ABOUT_TIMES}\n", cell(&comparison.workload.line()));
    for table in tables::all(comparison) {
        text += &render_table(&table);
    }
    text += "\n## Strategies\n\n";
    for strategy in &comparison.strategies {
        text += &format!("- **{}**: {}\n", cell(&strategy.name), cell(&strategy.description));
    }
    let notes = tables::notes(comparison);
    if !notes.is_empty() {
        text += "\n## Notes\n\n";
        notes.iter().for_each(|note| text += &format!("- {}\n", cell(note)));
    }
    text
}

fn render_table(table: &Table) -> String {
    let mut text = format!("\n## {}\n\n{}\n\n| |", table.title, table.about);
    table.heads.iter().for_each(|head| text += &format!(" {} |", cell(head)));
    text += "\n|---|";
    text += &"---:|".repeat(table.heads.len());
    text += "\n";
    for row in &table.rows {
        text += &format!("| {} |", cell(row.name.trim_start()));
        for (idx, value) in row.cells.iter().enumerate() {
            let value = cell(value);
            text += &if row.best == Some(idx) { format!(" **{value}** |") } else { format!(" {value} |") };
        }
        text += "\n";
    }
    text
}

/// Names come from files: nothing in them may end a cell, begin a line or be read as HTML.
pub(crate) fn cell(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '|' => safe.push_str("\\|"),
            '\\' => safe.push_str("\\\\"),
            '<' => safe.push_str("&lt;"),
            '\n' | '\r' => safe.push(' '),
            other => safe.push(other),
        }
    }
    safe
}
