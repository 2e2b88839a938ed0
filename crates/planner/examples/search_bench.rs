//! How fast plans are searched, on one core: configurations (one layout at one concurrency: time to first token, time per
//! output token and memory) a second when all are priced, and the time of whole searches, bounds and all.
//!
//! `cargo run --release -p moesaic-planner --example search_bench`

use std::time::Instant;

use moesaic_planner::cost::{CostModel, Stack};
use moesaic_planner::iteration::{Formats, Iterations};
use moesaic_planner::load::{ExpertLoad, LoadModel};
use moesaic_planner::network::{Library, Network};
use moesaic_planner::search::{Found, Goals, Search, Space};
use moesaic_planner::serving::Requests;
use moesaic_spec::{Cluster, ModelSpec, cluster_preset, preset};

fn main() {
    let deepseek = preset("deepseek-v3").unwrap().spec().unwrap();
    let h100 = cluster_preset("dgx-h100-x12").unwrap();
    let h200 = cluster_preset("hgx-h200-x4").unwrap();
    let mixtral = preset("mixtral-8x7b").unwrap().spec().unwrap();
    let paper = preset("paper-000").unwrap().spec().unwrap();
    let paper_cluster = cluster_preset("h100-paper").unwrap().with_gpus(14848).unwrap();
    run("mixtral-8x7b, 8 H200, everything priced", &mixtral, &h200, 8..=8, false);
    run("deepseek-v3, 16 H200, everything priced", &deepseek, &h200, 16..=16, false);
    run("mixtral-8x7b, 8 H200", &mixtral, &h200, 8..=8, true);
    run("deepseek-v3, 32 H200", &deepseek, &h200, 32..=32, true);
    run("deepseek-v3, 32 to 96 H100", &deepseek, &h100, 32..=96, true);
    run("paper-000, 14,848 H100 of the paper", &paper, &paper_cluster, 14848..=14848, true);
}

fn run(what: &str, model: &ModelSpec, cluster: &Cluster, gpus: std::ops::RangeInclusive<usize>, prune: bool) {
    let (start, cpu) = (Instant::now(), cpu_seconds());
    let found = search(model, cluster, gpus, prune);
    let (seconds, cpu) = (start.elapsed().as_secs_f64(), cpu_seconds() - cpu);
    let counts = found.counts;
    println!("{what}: {seconds:.3} s, of which {cpu:.3} s on the core");
    println!(
        "  {} shapes, {} fit; {} configurations, {} priced: {:.0} priced/s of the core",
        counts.shapes,
        counts.fitting,
        counts.configurations,
        counts.priced,
        counts.priced as f64 / cpu,
    );
    if let Some(best) = found.best() {
        println!(
            "  best: {} × {}, {} at a time: TTFT {:.0} ms, TPOT {:.1} ms, {:.0} tok/s/GPU; {} on the frontier",
            best.shape.copies,
            moesaic_planner::search::file::name(&best.layout),
            best.concurrency,
            1e3 * best.ttft,
            1e3 * best.tpot,
            best.merit().throughput,
            found.frontier.len(),
        );
    }
}

fn search(model: &ModelSpec, cluster: &Cluster, gpus: std::ops::RangeInclusive<usize>, prune: bool) -> Found {
    let moe = model.layers.iter().find_map(|ffn| ffn.as_moe()).unwrap();
    let load = ExpertLoad::new(LoadModel::Uniform, moe.num_experts, moe.top_k).unwrap();
    let mut iterations = Iterations::new(
        model,
        cluster,
        Formats::of(model),
        CostModel::new(&cluster.gpu, Stack::Sglang),
        Network::new(cluster, Library::Custom),
        Some(load.into()),
    );
    let search = Search {
        space: Space { model, cluster, gpus, compress: true, uneven: false, tolerate_failures: 0 },
        requests: Requests {
            input: 2000.0,
            output: 500.0,
            concurrency: 0.0,
            prefix_hit: 0.0,
            step_tokens: 8192.0,
            common_rhythm: true,
        },
        longest: 2500.0,
        goals: Goals { ttft: None, tpot: Some(0.05) },
        concurrencies: None,
        utilization: 0.9,
        prune,
    };
    search.run(&mut iterations).unwrap()
}

/// Time for which this process has had a core: what counts on a machine that others use, too.
fn cpu_seconds() -> f64 {
    let text = std::fs::read_to_string("/proc/self/schedstat").unwrap_or_default();
    text.split(' ').next().and_then(|ns| ns.parse::<f64>().ok()).unwrap_or(f64::NAN) / 1e9
}
