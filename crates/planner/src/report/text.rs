//! The report for a terminal.

use super::{ABOUT_TIMES, Comparison, tables};
use tables::Table;

const COLUMNS: usize = 100;
/// Narrowest column of a strategy that still shows its numbers.
const NARROWEST: usize = 13;
/// Width of the names of rows, where columns leave no more.
const NAMES: usize = 22;
const LONGEST_NAMES: usize = 32;

pub(crate) fn render(comparison: &Comparison) -> String {
    let mut text = wrap(&comparison.title(), "", "");
    text += &wrap(&comparison.model.line(), "  model     ", "            ");
    text += &wrap(&comparison.cluster.line(), "  cluster   ", "            ");
    text += &wrap(&comparison.workload.line(), "  workload  ", "            ");
    for table in tables::all(comparison) {
        text += &render_table(&table);
    }
    text += "\n";
    for note in tables::notes(comparison) {
        text += &wrap(&note, "- ", "  ");
    }
    text + &wrap(ABOUT_TIMES, "", "")
}

/// As many strategies side by side as there is room for, the rest below.
fn render_table(table: &Table) -> String {
    let count = table.heads.len().max(1);
    let at_a_time = ((COLUMNS - NAMES) / NARROWEST).min(count);
    let longest = table.rows.iter().map(|row| row.name.chars().count()).max().unwrap_or(0);
    let names = (longest + 1).clamp(NAMES, LONGEST_NAMES).min(COLUMNS - at_a_time * NARROWEST);
    let width = ((COLUMNS - names) / at_a_time).min(16);
    let mut text = format!("\n{}\n", table.title.to_uppercase());
    for first in (0..count).step_by(at_a_time) {
        let columns = first..(first + at_a_time).min(count);
        let line = |name: &str, cells: &[String]| {
            let mut line = format!("{:<names$}", shorten(name, names));
            for cell in cells.get(columns.clone()).unwrap_or_default() {
                line += &format!("{:>width$}", shorten(cell, width - 1));
            }
            line.trim_end().to_owned() + "\n"
        };
        text += &line("", &table.heads);
        table.rows.iter().for_each(|row| text += &line(&row.name, &row.cells));
    }
    text
}

fn shorten(text: &str, width: usize) -> String {
    if text.chars().count() <= width {
        return text.to_owned();
    }
    text.chars().take(width - 1).chain(['…']).collect()
}

pub(super) fn wrap(text: &str, first: &str, others: &str) -> String {
    let (mut lines, mut line, mut empty) = (String::new(), first.to_owned(), true);
    for word in text.split_whitespace() {
        if !empty && line.chars().count() + 1 + word.chars().count() > COLUMNS {
            lines += &line;
            lines.push('\n');
            line = others.to_owned();
            empty = true;
        }
        if !empty {
            line.push(' ');
        }
        line += word;
        empty = false;
    }
    lines + &line + "\n"
}
