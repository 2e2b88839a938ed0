//! What training the time prediction costs, and how far off both models are on made-up pools.
//!
//! `cargo run --release -p moesaic-engine --example time_prediction`

use std::time::Instant;

use moesaic_engine::synchronize::{Features, TimePredictor};
use moesaic_kernels::philox;

/// Seconds of a made-up pool.
type Truth = fn(&Features) -> f64;

fn main() {
    let pools: [(&str, Truth); 2] = [
        ("attention", |f| 30e-6 + 0.4e-6 * f.tokens + 2.5e-9 * f.context_sum),
        ("experts", |f| 20e-6 + (6e-6 * f.active_experts).max(1.5e-6 * f.tokens)),
    ];
    for (name, seconds) in pools {
        let mut draws = 0;
        let mut between = |low: f64, high: f64| {
            draws += 1;
            low + (high - low) * philox::uniform(11, draws)
        };
        let mut predictor = TimePredictor::new(1);
        for _ in 0..1_000 {
            let tokens = between(4.0, 128.0).round();
            let context = between(50.0, 2_000.0);
            let features = Features {
                tokens,
                sequences: tokens,
                context_sum: tokens * context,
                context_max: 2.0 * context,
                active_experts: 16.0 * (1.0 - 0.875f64.powf(tokens)),
                micro_batches: 1.0,
            };
            predictor.observe(features, seconds(&features) * between(0.96, 1.04));
        }
        let start = Instant::now();
        predictor.fit();
        let time = start.elapsed().as_secs_f64() * 1e3;
        let errors = predictor.errors().expect("it was fitted");
        let mlp = errors.mlp.expect("samples enough");
        let percent = |share: f64| share * 100.0;
        println!("{name}: {} samples fitted in {time:.1} ms, {} held out", errors.samples, errors.held_out);
        println!("  linear: median {:.1} %, mean {:.1} %", percent(errors.linear.median), percent(errors.linear.mean));
        println!("  MLP:    median {:.1} %, mean {:.1} %", percent(mlp.median), percent(mlp.mean));
        println!("  used: {:?}", errors.used);
    }
}
