//! Learns what ops cost from the published tables, says how well on rows that were held out, and writes what was learned to
//! `bench/results/published/fit-ops.json`:
//!
//! ```text
//! cargo run --release -p moesaic-planner --example fit_costs [-- --check]
//! ```
//!
//! With `--check` nothing is written.

use std::path::Path;

use moesaic_planner::cost::validate::{HeldOut, Split, cross_validate, score, widenings};
use moesaic_planner::cost::{Learned, published};
use serde_json::Value;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let check = std::env::args().any(|arg| arg == "--check");
    let rows = published::rows();
    let mut learned = Learned::train(&rows);
    let held_out = cross_validate(&rows, &learned, Split::Rows, 5);
    print("rows held out, five parts", &held_out);
    print("shapes held out, five parts", &cross_validate(&rows, &learned, Split::Shapes, 5));
    if !check {
        widenings(&held_out).into_iter().for_each(|(family, widening)| learned.widen(family, widening));
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

fn print(title: &str, held_out: &[HeldOut]) {
    println!("{title}");
    println!(
        "{:20}{:10}{:11}{:>6}{:>9}{:>8}{:>10}{:>7}",
        "op", "gpu", "stack", "rows", "median", "p90", "in 90 %", "below"
    );
    let widenings = widenings(held_out);
    let mut keys: Vec<_> = held_out.iter().map(|held| (held.family, held.row.device.clone(), held.row.stack)).collect();
    keys.sort();
    keys.dedup();
    let line = |names: [String; 3], of: &dyn Fn(&HeldOut) -> bool| {
        if let Some(score) = score(held_out.iter().filter(|held| of(held)), |family| widenings[&family]) {
            let [op, gpu, stack] = names;
            println!(
                "{op:20}{gpu:10}{stack:11}{:6}{:8.1}%{:7.1}%{:9.0}%{:7}",
                score.rows,
                100.0 * score.median,
                100.0 * score.p90,
                100.0 * score.coverage,
                score.below_physics
            );
        }
    };
    for (family, device, stack) in keys {
        let of = |held: &HeldOut| (held.family, &held.row.device, held.row.stack) == (family, &device, stack);
        line([format!("{family:?}"), device.clone(), format!("{stack:?}")], &of);
    }
    for family in widenings.keys() {
        line([format!("{family:?}"), "all".into(), format!("x{:.2}", widenings[family])], &|held| {
            held.family == *family
        });
    }
    line(["all".into(), String::new(), String::new()], &|_| true);
}
