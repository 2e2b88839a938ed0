//! How fast plans are searched, on one core: configurations (one layout at one concurrency: time to first token, time per
//! output token and memory) a second when all are priced, and the time of whole searches, bounds and all.
//!
//! `cargo run --release -p moesaic-planner --example search_bench`

use std::ops::RangeInclusive;
use std::time::Instant;

use moesaic_planner::cost::{CostModel, Stack};
use moesaic_planner::iteration::{Formats, Iterations};
use moesaic_planner::load::{ExpertLoad, LoadModel};
use moesaic_planner::network::{Library, Network};
use moesaic_planner::search::file::name;
use moesaic_planner::search::{Goals, Search, Space};
use moesaic_planner::serving::Requests;
use moesaic_spec::{Cluster, ModelSpec, cluster_preset, preset};

fn main() {
    let [deepseek, mixtral, paper] =
        ["deepseek-v3", "mixtral-8x7b", "paper-000"].map(|name| preset(name).unwrap().spec().unwrap());
    let [h100, h200] = ["dgx-h100-x12", "hgx-h200-x4"].map(|name| cluster_preset(name).unwrap());
    let paper_h100 = cluster_preset("h100-paper").unwrap().with_gpus(14848).unwrap();
    println!("everything priced, for the second time, so that no part's price is new");
    everything("mixtral-8x7b, 8 H200", &mixtral, &h200, 8..=8);
    everything("deepseek-v3, 16 H200", &deepseek, &h200, 16..=16);
    println!("whole searches, from nothing");
    whole("mixtral-8x7b, 8 H200", &mixtral, &h200, 8..=8);
    whole("deepseek-v3, 32 H200", &deepseek, &h200, 32..=32);
    whole("deepseek-v3, 32 to 96 H100", &deepseek, &h100, 32..=96);
    whole("paper-000, 14,848 H100 of the paper", &paper, &paper_h100, 14848..=14848);
}

fn everything(what: &str, model: &ModelSpec, cluster: &Cluster, gpus: RangeInclusive<usize>) {
    let mut iterations = iterations(model, cluster);
    let search = search(model, cluster, gpus, false);
    search.run(&mut iterations).unwrap();
    let (found, [seconds, cpu]) = timed(|| search.run(&mut iterations).unwrap());
    let priced = found.counts.priced;
    println!("  {what}: {priced} configurations in {seconds:.3} s, {:.0}/s of the core", priced as f64 / cpu);
}

fn whole(what: &str, model: &ModelSpec, cluster: &Cluster, gpus: RangeInclusive<usize>) {
    let search = search(model, cluster, gpus, true);
    let (found, [seconds, cpu]) = timed(|| search.run(&mut iterations(model, cluster)).unwrap());
    let (counts, best) = (found.counts, found.best().unwrap());
    println!("  {what}: {seconds:.3} s, of which {cpu:.3} s on the core");
    println!(
        "    {} shapes, {} fit; {} configurations, {} priced",
        counts.shapes, counts.fitting, counts.configurations, counts.priced
    );
    println!(
        "    best: {} × {}, {} at a time: TTFT {:.0} ms, TPOT {:.1} ms, {:.0} tok/s/GPU; {} on the frontier",
        best.shape.copies,
        name(&best.layout),
        best.concurrency,
        1e3 * best.ttft,
        1e3 * best.tpot,
        best.merit().throughput,
        found.frontier.len(),
    );
}

fn iterations<'a>(model: &'a ModelSpec, cluster: &'a Cluster) -> Iterations<'a> {
    let moe = model.layers.iter().find_map(|ffn| ffn.as_moe()).unwrap();
    let load = ExpertLoad::new(LoadModel::Uniform, moe.num_experts, moe.top_k).unwrap();
    let (costs, network) = (CostModel::new(&cluster.gpu, Stack::default()), Network::new(cluster, Library::Custom));
    Iterations::new(model, cluster, Formats::of(model), costs, network, Some(load.into()))
}

fn search<'a>(model: &'a ModelSpec, cluster: &'a Cluster, gpus: RangeInclusive<usize>, prune: bool) -> Search<'a> {
    Search {
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
    }
}

/// Seconds on the clock and on the core.
fn timed<T>(work: impl FnOnce() -> T) -> (T, [f64; 2]) {
    let (start, cpu) = (Instant::now(), cpu_seconds());
    let done = work();
    (done, [start.elapsed().as_secs_f64(), cpu_seconds() - cpu])
}

/// Time for which this process has had a core: what counts on a machine that others use, too.
fn cpu_seconds() -> f64 {
    let text = std::fs::read_to_string("/proc/self/schedstat").unwrap_or_default();
    text.split(' ').next().and_then(|ns| ns.parse::<f64>().ok()).unwrap_or(f64::NAN) / 1e9
}
