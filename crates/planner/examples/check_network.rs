//! Prices of communication against the published measurements, each held out once.
//!
//! ```sh
//! cargo run --release -p moesaic-planner --example check_network           # errors by operation and GPU
//! cargo run --release -p moesaic-planner --example check_network -- --fit  # writes the fitted curves
//! ```

use std::fmt::Write;

use moesaic_planner::network::published::TABLES;
use moesaic_planner::network::{Curve, FittedCurve};

fn main() -> std::io::Result<()> {
    if std::env::args().any(|arg| arg == "--fit") {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/src/network/fitted.csv");
        return std::fs::write(path, fitted());
    }
    Ok(())
}

/// The file of fitted curves.
fn fitted() -> String {
    let mut text = format!(
        "# Curves of network/curve.rs, fitted to bench/results/published by the example check_network --fit.\ngpu,op,{}\n",
        Curve::NAMES.join(",")
    );
    for table in TABLES {
        let fitted = FittedCurve::fit(table.gpu, table.op, &table.rows());
        let values: Vec<String> = fitted.curve.values().iter().map(|value| format!("{value:.4e}")).collect();
        let _ = writeln!(text, "{},{},{}", table.gpu, table.op, values.join(","));
        eprintln!("{:9} {:24} sd {:.3}", table.gpu, table.op, fitted.sd);
    }
    text
}
