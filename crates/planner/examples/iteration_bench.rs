//! How many iterations a second are priced, and what some take.

use std::time::Instant;

use moesaic_planner::cost::{CostModel, Precision, Stack};
use moesaic_planner::iteration::{Batch, ExpertLayout, Formats, Iterations, Layout};
use moesaic_planner::load::{ExpertLoad, LoadModel};
use moesaic_planner::network::{Library, Network};
use moesaic_planner::serving::{self, Requests};

fn main() {
    let model = moesaic_spec::preset("deepseek-v3").unwrap().spec().unwrap();
    let cluster = moesaic_spec::cluster_preset("dgx-h100-x12").unwrap();
    let formats = Formats { dense: Precision::Fp8Block, experts: Precision::Fp8Block, kv: Precision::Bf16 };
    let mut iterations = Iterations::new(
        &model,
        &cluster,
        formats,
        CostModel::new(&cluster.gpu, Stack::Sglang),
        Network::new(&cluster, Library::Custom),
        Some(ExpertLoad::new(LoadModel::Uniform, 256, 8).unwrap().into()),
    );
    let layout = |ep: usize, micro_batches: usize| Layout {
        dp: ep,
        experts: ExpertLayout::Placed { ep },
        micro_batches,
        ..Layout::single(8)
    };
    for (ep, mb, seqs) in [(16, 1, 8.0), (32, 1, 32.0), (32, 2, 128.0), (72, 2, 256.0), (96, 2, 256.0)] {
        let start = Instant::now();
        let it = iterations.price(&layout(ep, mb), &Batch::decode(seqs, 2000.0)).unwrap();
        println!(
            "EP{ep} mb{mb} b{seqs}: {:.2} ms (computing {:.2}, a2a {:.2}) first {:?}",
            1e3 * it.seconds,
            1e3 * it.computing,
            1e3 * it.communication(moesaic_plan::Collective::AllToAll),
            start.elapsed()
        );
    }
    let requests = Requests {
        input: 2000.0,
        output: 100.0,
        concurrency: 32.0 * 128.0,
        prefix_hit: 0.0,
        step_tokens: 8192.0,
        common_rhythm: true,
    };
    let served = serving::aggregated(&mut iterations, &layout(32, 2), &requests, 1e6).unwrap();
    println!("{:.1} ms TTFT {:.1} ms TPOT {:.0} tok/s", 1e3 * served.ttft, 1e3 * served.tpot, served.throughput);
    let start = Instant::now();
    let mut n = 0;
    while start.elapsed().as_secs_f64() < 1.0 {
        for ep in [16, 32, 72] {
            for mb in [1, 2] {
                for seqs in 1..200 {
                    iterations.price(&layout(ep, mb), &Batch::decode(seqs as f64, 2000.0)).unwrap();
                    n += 1;
                }
            }
        }
    }
    println!("{:.0} iterations/s", n as f64 / start.elapsed().as_secs_f64());
}
