//! Learns what ops cost from the published tables, says how well on rows that were held out, and writes what was learned to
//! `bench/results/published/fit-ops.json`:
//!
//! ```text
//! cargo run --release -p moesaic-planner --example fit_costs [-- --check]
//! ```
//!
//! With `--check` nothing is written.

use std::collections::BTreeMap;
use std::path::Path;

use moesaic_planner::cost::validate::{HeldOut, Split, cross_validate, score, widenings};
use moesaic_planner::cost::{Family, Learned, Widening, published};
use serde_json::Value;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let check = std::env::args().any(|arg| arg == "--check");
    let rows = published::rows();
    let mut learned = Learned::train(&rows);
    let held_out = cross_validate(&rows, &learned, Split::Rows, 5);
    let shapes = cross_validate(&rows, &learned, Split::Shapes, 5);
    let widenings = widenings(&held_out, &shapes);
    print("rows held out, five parts", &held_out, &widenings);
    print("shapes held out, five parts", &shapes, &widenings);
    if !check {
        widenings.into_iter().for_each(|(family, widening)| learned.widen(family, widening));
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../bench/results/published/fit-ops.json");
        let mut learned = serde_json::to_value(&learned)?;
        shorten(&mut learned);
        std::fs::write(path, learned.to_string() + "\n")?;
    }
    Ok(())
}

/// Keeps five digits of every number, which is more than measurements have.
fn shorten(value: &mut Value) {
    match value {
        Value::Array(values) => values.iter_mut().for_each(shorten),
        Value::Object(fields) => fields.values_mut().for_each(shorten),
        Value::Number(number) if number.is_f64() => {
            let short = format!("{:.4e}", number.as_f64().expect("a number"));
            *value = Value::from(short.parse::<f64>().expect("a number that was written"));
        }
        _ => {}
    }
}

fn print(title: &str, held_out: &[HeldOut], widenings: &BTreeMap<Family, Widening>) {
    println!("{title}");
    let head = ["op", "gpu", "stack", "rows", "median", "p90", "in 90 %", "far", "below"];
    let [op, gpu, stack, rows, median, p90, inside, far, below] = head;
    println!("{op:18}{gpu:10}{stack:14}{rows:>6}{median:>8}{p90:>8}{inside:>9}{far:>6}{below:>7}");
    let mut keys: Vec<_> =
        held_out.iter().map(|held| (held.family, held.row.device.as_str(), held.row.stack)).collect();
    keys.sort();
    keys.dedup();
    let line = |names: [String; 3], of: &dyn Fn(&HeldOut) -> bool| {
        if let Some(score) = score(held_out.iter().filter(|held| of(held)), widenings) {
            let [op, gpu, stack] = names;
            let [median, p90, inside, far] =
                [score.median, score.p90, score.coverage, score.far].map(|share| 100.0 * share);
            let (rows, below) = (score.rows, score.below_physics);
            println!("{op:18}{gpu:10}{stack:14}{rows:6}{median:7.1}%{p90:7.1}%{inside:8.0}%{far:5.0}%{below:7}");
        }
    };
    for (family, device, stack) in keys {
        let of = |held: &HeldOut| (held.family, held.row.device.as_str(), held.row.stack) == (family, device, stack);
        line([format!("{family:?}"), device.to_owned(), format!("{stack:?}")], &of);
    }
    for (family, Widening { near, far }) in widenings {
        let names = [format!("{family:?}"), "all".into(), format!("sd ×{near:.2} ×{far:.2}")];
        line(names, &|held| held.family == *family);
    }
    line(["all".into(), String::new(), String::new()], &|_| true);
}
