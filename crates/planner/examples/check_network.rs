//! Prices of communication against the published measurements, each held out once.
//!
//! ```sh
//! cargo run --release -p moesaic-planner --example check_network           # errors by operation and GPU
//! cargo run --release -p moesaic-planner --example check_network -- --fit  # writes the fitted curves
//! ```
//!
//! Rows are cut into five parts by their sizes, so that the same sizes under another version or on another GPU are held out together; each
//! part is priced by curves (and intervals) that were fitted to the other four.

use std::fmt::Write;

use moesaic_planner::network::published::Measured;
use moesaic_planner::network::{Family, FittedCurve, HeldOut, Library, MeasuredGpu, Network, OPS, held_out};

/// Standard deviations to each side of a 90 % interval.
const INTERVAL: f64 = 1.645;

fn main() -> std::io::Result<()> {
    if std::env::args().any(|arg| arg == "--fit") {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/src/network/fitted.csv");
        return std::fs::write(path, fitted());
    }
    println!("{:9} {:24} {:>5} {:>7} {:>7} {:>9}", "GPU", "operation", "rows", "median", "p90", "in 90 %");
    let mut all = Vec::new();
    for (family, op) in families() {
        let errors = held_out(&family.measured(op), 0, |known| FittedCurve::fit(op, known));
        for gpu in [MeasuredGpu::H200, MeasuredGpu::H100, MeasuredGpu::A100] {
            let own: Vec<HeldOut> = errors.iter().filter(|error| error.gpu == gpu).copied().collect();
            if !own.is_empty() {
                print_errors(&format!("{gpu:?}"), op, &own);
            }
        }
        all.extend(errors);
    }
    print_errors("all", "", &all);
    println!("\nThe A100's measurements by the H200's curves and the A100's links:");
    let theirs = Network::measured_by(MeasuredGpu::A100, MeasuredGpu::H200, Library::Nccl);
    for op in OPS {
        let error = |row: &Measured| {
            let price = theirs.price(&row.op);
            HeldOut { gpu: row.gpu, ln_ratio: (row.seconds / price.seconds).ln(), sd: price.sd }
        };
        let errors: Vec<HeldOut> = Family::NvLink3.measured(op).iter().map(error).collect();
        if !errors.is_empty() {
            print_errors("A100", op, &errors);
        }
    }
    Ok(())
}

/// Families and operations with measurements.
fn families() -> impl Iterator<Item = (Family, &'static str)> {
    let all = OPS.into_iter().flat_map(|op| Family::ALL.map(|family| (family, op)));
    all.filter(|(family, op)| !family.measured(op).is_empty())
}

fn print_errors(gpu: &str, op: &str, errors: &[HeldOut]) {
    let mut relative: Vec<f64> = errors.iter().map(|error| (-error.ln_ratio).exp_m1().abs()).collect();
    relative.sort_by(f64::total_cmp);
    let at = |share: f64| 100.0 * relative[((relative.len() - 1) as f64 * share).round() as usize];
    let inside = errors.iter().filter(|error| error.ln_ratio.abs() <= INTERVAL * error.sd).count();
    let inside = 100.0 * inside as f64 / errors.len() as f64;
    println!("{gpu:9} {op:24} {:5} {:6.1}% {:6.1}% {inside:8.0}%", errors.len(), at(0.5), at(0.9));
}

/// The file of fitted curves.
fn fitted() -> String {
    let mut text = format!(
        "# Curves (network/curve.rs) and the scales of what they leave (network/kriging.rs), fitted to\n\
         # bench/results/published by `cargo run --release -p moesaic-planner --example check_network -- --fit`.\n\
         links,op,{}\n",
        FittedCurve::names().join(",")
    );
    for (family, op) in families() {
        let fitted = FittedCurve::fit(op, &family.measured(op));
        let values: Vec<String> = fitted.values().iter().map(|value| format!("{value:.4e}")).collect();
        let _ = writeln!(text, "{},{op},{}", family.name(), values.join(","));
    }
    text
}
