//! Clusters and workloads: the presets, what is refused with which sentence, and any text.

use moesaic_spec::{
    Arrival, Bytes, Cluster, DType, Energy, Gpu, LinkClass, Power, TokenRange, WeightFormat, Workload, cluster_preset,
    clusters, gpu_preset, gpus, workload_preset, workloads,
};
use proptest::prelude::*;

/// The sentence for a preset's text after `from` became `to`.
fn cluster_sentence(name: &str, from: &str, to: &str) -> String {
    let text = clusters().iter().find(|file| file.name == name).unwrap().yaml;
    assert!(text.contains(from), "{from}");
    Cluster::from_yaml(&text.replacen(from, to, 1), "c.yaml").unwrap_err().to_string()
}

fn workload_sentence(text: &str) -> String {
    Workload::from_yaml(text, "w.yaml").unwrap_err().to_string()
}

#[test]
fn every_preset_is_read_has_its_name_and_survives_writing() {
    for file in clusters() {
        let cluster = cluster_preset(file.name).unwrap();
        assert_eq!(cluster.name, file.name);
        assert_eq!(Cluster::from_yaml(&cluster.to_yaml(), "written").unwrap(), cluster);
    }
    for file in gpus() {
        let gpu = gpu_preset(file.name).unwrap();
        assert!(gpu.peak_flops.f4 >= gpu.peak_flops.f8 && gpu.peak_flops.f8 >= gpu.peak_flops.bf16, "{}", file.name);
        assert!(gpu.power.is_some() && gpu.usd_per_hour.is_some(), "{}", file.name);
        assert_eq!(Gpu::from_yaml(&gpu.to_yaml(), "written").unwrap(), gpu);
    }
    for file in workloads() {
        let workload = workload_preset(file.name).unwrap();
        assert_eq!(workload.name, file.name);
        assert_eq!(Workload::from_yaml(&workload.to_yaml(), "written").unwrap(), workload);
    }
}

#[test]
fn the_papers_cluster_is_as_they_say() {
    let cluster = cluster_preset("A100-4x4").unwrap();
    assert_eq!((cluster.num_gpus(), cluster.gpu.memory), (16, Bytes(80 << 30)));
    assert_eq!(cluster.node_of(3), 0);
    assert_eq!(cluster.node_of(12), 3);
    assert_eq!(cluster.link_class(0, 3), LinkClass::IntraNode);
    assert_eq!(cluster.link_class(3, 4), LinkClass::InterNode);
    assert_eq!(cluster.link(LinkClass::IntraNode).bandwidth_per_gpu, 300e9);
    assert_eq!(cluster.link(LinkClass::InterNode).bandwidth_per_node, 25e9);

    let paper = cluster_preset("h100-paper").unwrap();
    assert_eq!(paper.num_gpus(), 58 * 256);
    assert_eq!(paper.gpu.peak(DType::F8E4M3) * paper.gpu.compute_utilization, 240e12);
    assert_eq!(paper.gpu.memory_bandwidth * paper.gpu.memory_utilization, 1.44e12);
}

#[test]
fn the_default_workload_is_32_short_chats() {
    let workload = workload_preset("chat-small").unwrap();
    assert_eq!(workload.num_requests, 32);
    assert_eq!(workload.input_tokens, TokenRange { min: 16, max: 64 });
    assert_eq!(workload.output_tokens, TokenRange { min: 24, max: 32 });
    assert_eq!(workload.longest(), 96);
    assert_eq!((workload.arrival, workload.prefix_hit), (Arrival::AtStart, 0.0));
    assert_eq!(workload_preset("rag").unwrap().arrival, Arrival::Closed { concurrency: 64 });
    assert_eq!(workload_preset("sharegpt").unwrap().arrival, Arrival::Poisson { requests_per_s: 4.0 });
    assert_eq!(workload_preset("paper-001").unwrap().longest(), 10_000);
    assert_eq!(workload_preset("paper-003").unwrap().longest(), 2048);
}

#[test]
fn unknown_names_and_keys_are_told_the_nearest() {
    assert_eq!(
        cluster_preset("dgx-h10").unwrap_err().to_string(),
        "no cluster is called \"dgx-h10\"; did you mean `dgx-h100`? (clusters: a100-4x4, h100-paper, dgx-h100, hgx-h200, \
         hgx-h800, hgx-h20, hgx-b200, h200-x2-nv18, gb200-nvl72, laptop)"
    );
    assert_eq!(
        workload_preset("chat-smal").unwrap_err().to_string(),
        "no workload is called \"chat-smal\"; did you mean `chat-small`? (workloads: chat-small, prefill, decode, paper-001, \
         paper-003, chat, reasoning, rag, sharegpt)"
    );
    assert_eq!(
        cluster_sentence("laptop", "memory_bandwidth:", "memory_bandwith:"),
        "c.yaml: field `gpu.memory_bandwith` is not known; did you mean `memory_bandwidth`?"
    );
    assert_eq!(
        workload_sentence("name: w\nrequests: 3\n"),
        "w.yaml: field `requests` is not known; did you mean `num_requests`?"
    );
}

#[test]
fn wrong_clusters_are_refused() {
    for (from, to, expected) in [
        ("nodes: 4", "nodes: 0", "c.yaml: field `nodes` is 0, but must be a whole number from 1 to 65536"),
        (
            "nodes: 4\ngpus_per_node: 4",
            "nodes: 65536\ngpus_per_node: 4096",
            "c.yaml: field `nodes` is 65536, but must be such that there are at most 1048576 GPUs in all",
        ),
        (
            "bandwidth_per_node: 25e9",
            "bandwidth_per_node: 2e9",
            "c.yaml: field `inter_node.bandwidth_per_node` is 2e9, but must be at least bandwidth_per_gpu (2.5e10)",
        ),
        ("bandwidth_per_gpu: 25e9", "bandwidth_per_gpu: 0", {
            "c.yaml: field `inter_node.bandwidth_per_gpu` is 0, but must be a number from 1.0 to 1e18"
        }),
        ("gpu: a", "other: a", "c.yaml: field `other` is not known; did you mean `name`?"),
        ("inter_node:", "energy: {pue: 0.9}\ninter_node:", {
            "c.yaml: field `energy.pue` is 0.9, but must be a number from 1.0 to 10.0"
        }),
        ("name: a100-4x4\n", "", "c.yaml: field `name` is missing; it must be a string"),
    ] {
        assert_eq!(cluster_sentence("a100-4x4", from, to), expected);
    }
    assert_eq!(
        cluster_sentence("laptop", "nodes: 1", "nodes: 2"),
        "c.yaml: field `inter_node` is missing; it must be the link between the nodes"
    );
    assert_eq!(
        cluster_sentence("a100-4x4", "rank_map: [0, 1, 2,", "rank_map: [0, 1, 0,"),
        "c.yaml: field `rank_map[2]` is 0, but must be another GPU, because rank 0 has that one"
    );
    assert_eq!(
        cluster_sentence("a100-4x4", "rank_map: [0, 1, 2,", "rank_map: [0, 1, 16,"),
        "c.yaml: field `rank_map[2]` is 16, but must be a whole number from 0 to 15"
    );
    assert_eq!(
        cluster_sentence("a100-4x4", "rank_map: [0, 1, 2,", "rank_map: [0, 1,"),
        "c.yaml: field `rank_map` is a list of 15, but must be a list of all 16 GPUs, one for each rank, or absent"
    );
}

/// What `gpu: …` in a cluster's file is.
fn gpu_of(gpu: &str) -> Result<Gpu, String> {
    let text = clusters().iter().find(|file| file.name == "dgx-h100").unwrap().yaml;
    let cluster = Cluster::from_yaml(&text.replacen("gpu: h100-sxm", &format!("gpu: {gpu}"), 1), "c.yaml");
    cluster.map(|cluster| cluster.gpu).map_err(|e| e.to_string())
}

#[test]
fn a_gpu_is_a_preset_a_changed_preset_or_keys_of_its_own() {
    let h100 = gpu_preset("h100-sxm").unwrap();
    assert_eq!(gpu_of("H100-SXM").unwrap(), h100);
    let changed = gpu_of("{preset: h100-sxm, memory: 60 GiB, peak_flops: {f8: 1e15}, power: {max_w: 500}}").unwrap();
    assert_eq!(changed.memory, Bytes(60 << 30));
    assert_eq!((changed.peak_flops.f8, changed.peak_flops.bf16), (1e15, h100.peak_flops.bf16));
    assert_eq!(changed.power, Some(Power { max_w: 500.0, ..h100.power.unwrap() }));

    let own = "{name: x, memory: 1, peak_flops: {bf16: 1, f8: 2, f32: 1}, compute_utilization: 1, memory_bandwidth: 1, \
               memory_utilization: 1, launch_s: 0}";
    let own = gpu_of(own).unwrap();
    assert_eq!((own.sms, own.peak_flops.f4, own.power, own.usd_per_hour), (132, 2.0, None, None));
}

#[test]
fn wrong_gpus_are_refused() {
    let known = "one of a100-sxm-80gb, h100-sxm, h100-paper, h200-sxm, h20, h800, b200, gb200";
    for (gpu, expected) in [
        ("H100-SMX", format!("field `gpu` is \"H100-SMX\", but must be {known} (`h100-sxm`?)")),
        ("{preset: h21}", format!("field `gpu.preset` is \"h21\", but must be {known} (`h20`?)")),
        ("~", format!("field `gpu` is missing; it must be {known}, or keys of its own, indented below it")),
        ("[1]", "field `gpu` is [1], but must be keys of its own, indented below it".into()),
        (
            "{preset: h20, memory: 80 gigs}",
            "field `gpu.memory` is \"80 gigs\", but must be a size with a unit of B, KB, MB, GB, TB, KiB, MiB, GiB or TiB, \
             like 80 GiB"
                .into(),
        ),
        ("{preset: h20, memory: 0}", "field `gpu.memory` is 0, but must be more than none".into()),
        ("{preset: h20, sms: 0}", "field `gpu.sms` is 0, but must be a whole number from 1 to 65536".into()),
        (
            "{preset: h20, compute_utilization: 83}",
            "field `gpu.compute_utilization` is 83, but must be a number from 0.001 to 1.0".into(),
        ),
        ("{preset: h20, power: {max_w: 9}}", "field `gpu.power.max_w` is 9, but must be at least idle_w (70)".into()),
        ("{preset: h20, sm: 9}", "field `gpu.sm` is not known; did you mean `sms`?".into()),
    ] {
        assert_eq!(gpu_of(gpu).unwrap_err(), format!("c.yaml: {expected}"));
    }
}

#[test]
fn a_cluster_grows_by_nodes() {
    let dgx = cluster_preset("dgx-h100").unwrap();
    for num_gpus in [1, 8] {
        assert_eq!(dgx.with_gpus(num_gpus).unwrap(), dgx);
    }
    let many = dgx.with_gpus(90).unwrap();
    assert_eq!((many.nodes, many.num_gpus(), many.name.as_str()), (12, 96, "dgx-h100-x12"));
    assert_eq!(many, cluster_preset("DGX-H100-x12").unwrap());
    assert_eq!(many.with_gpus(16).unwrap(), cluster_preset("dgx-h100-x2").unwrap());
    assert_eq!(Cluster::from_yaml(&many.to_yaml(), "written").unwrap(), many);

    let paper = cluster_preset("h100-paper").unwrap();
    assert_eq!(paper.with_gpus(14_848).unwrap(), paper);
    assert_eq!(paper.with_gpus(100_000).unwrap().num_gpus(), 100_000);
    // The order of 16 GPUs says nothing about 32.
    assert!(cluster_preset("a100-4x4").unwrap().with_gpus(32).unwrap().rank_map.is_empty());
}

#[test]
fn a_cluster_that_cannot_grow_says_why() {
    let dgx = cluster_preset("dgx-h100").unwrap();
    for (error, expected) in [
        (
            cluster_preset("laptop").unwrap().with_gpus(3),
            "cluster laptop cannot have 2 nodes of 2 GPUs: it must have an `inter_node`, the link between nodes, to have more \
             than one",
        ),
        (dgx.with_gpus(0), "cluster dgx-h100 cannot have 0 GPUs: it must have from 1 to 1048576"),
        (
            cluster_preset("dgx-h100-x0"),
            "cluster dgx-h100 cannot have 0 nodes of 8 GPUs: it must have from 1 to 65536 nodes and at most 1048576 GPUs in \
             all",
        ),
    ] {
        assert_eq!(error.unwrap_err().to_string(), expected);
    }
}

#[test]
fn the_peak_is_that_of_the_weights() {
    let (h100, b200) = (gpu_preset("h100-sxm").unwrap(), gpu_preset("b200").unwrap());
    assert_eq!(h100.peak_of(WeightFormat::Fp8Block), 2.0 * h100.peak_of(WeightFormat::Bf16) + 1e12);
    assert_eq!(h100.peak_of(WeightFormat::Mxfp4), h100.peak_flops.bf16);
    assert_eq!(b200.peak_of(WeightFormat::Nvfp4), b200.peak_flops.f4);
    assert_eq!(b200.peak_of(WeightFormat::Int4), b200.peak_flops.bf16);
}

#[test]
fn energy_has_defaults_and_is_read() {
    assert_eq!(cluster_preset("laptop").unwrap().energy, Energy::default());
    let text = clusters()[0].yaml.replace("inter_node:", "energy: {pue: 1.5, co2_g_per_kwh: 20}\ninter_node:");
    let energy = Cluster::from_yaml(&text, "c.yaml").unwrap().energy;
    assert_eq!(energy, Energy { pue: 1.5, co2_g_per_kwh: 20.0, ..Energy::default() });
}

#[test]
fn wrong_workloads_are_refused() {
    for (text, expected) in [
        (
            "name: w\nnum_requests: 1\ninput_tokens: {min: 5, max: 4}\noutput_tokens: 1\n",
            "w.yaml: field `input_tokens.max` is 4, but must be at least min (5)",
        ),
        (
            "name: w\nnum_requests: 1\ninput_tokens: 1\noutput_tokens: 0\n",
            "w.yaml: field `output_tokens` is 0, but must be a whole number from 1 to 4194304",
        ),
        (
            "name: w\nnum_requests: 1000000\ninput_tokens: 4096\noutput_tokens: 1\n",
            "w.yaml: field `input_tokens` is 4096, but must be such that num_requests prompts have at most 268435456 tokens \
             in all",
        ),
        (
            "name: w\nnum_requests: 1\ninput_tokens: 1\noutput_tokens: 1\nseed: -1\n",
            "w.yaml: field `seed` is -1, but must be a whole number from 0",
        ),
        (
            "name: w\nnum_requests: 1\ninput_tokens: 1\noutput_tokens: 1\narrival: {poisson: 0}\n",
            "w.yaml: field `arrival.poisson` is 0, but must be a number from 1e-6 to 1000000.0",
        ),
        (
            "name: w\nnum_requests: 1\ninput_tokens: 1\noutput_tokens: 1\narrival: {closed: 2, poisson: 1}\n",
            "w.yaml: field `arrival` is {\"closed\":2,\"poisson\":1}, but must be one of poisson (requests/s) and closed (users)",
        ),
        (
            "name: w\nnum_requests: 1\ninput_tokens: 1\noutput_tokens: 1\nprefix_hit: 30\n",
            "w.yaml: field `prefix_hit` is 30, but must be a number from 0.0 to 1.0",
        ),
    ] {
        assert_eq!(workload_sentence(text), expected);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    /// A line of a preset becomes anything.
    #[test]
    fn mutated_files_are_read_or_refused(
        file in prop::sample::select(clusters()),
        line in any::<prop::sample::Index>(),
        value in prop_oneof!["[ -~]{0,20}", "[a-z_]{1,12}: (-?[0-9.e]{1,8}|\\[[0-9, ]{0,9}\\]|~|true)"],
    ) {
        let mut lines: Vec<&str> = file.yaml.lines().collect();
        let indent = lines[line.index(lines.len())].chars().take_while(|c| *c == ' ').count();
        let value = format!("{}{value}", " ".repeat(indent));
        *line.get_mut(&mut lines) = &value;
        match Cluster::from_yaml(&lines.join("\n"), "c.yaml") {
            Ok(cluster) => prop_assert_eq!(Cluster::from_yaml(&cluster.to_yaml(), "written").unwrap(), cluster),
            Err(e) => {
                let sentence = e.to_string();
                prop_assert!(sentence.starts_with("c.yaml: ") && !sentence.contains('\n'), "{}", sentence);
            }
        }
    }

    #[test]
    fn any_text_is_answered(text in ".{0,200}") {
        let _ = Cluster::from_yaml(&text, "c.yaml");
        let _ = Workload::from_yaml(&text, "w.yaml");
    }

    #[test]
    fn workloads_survive_writing(
        name in any::<String>(), num_requests in 1usize..100, input in 1usize..50, more in 0usize..50, seed in any::<u64>(),
        arrival in prop_oneof![
            Just(Arrival::AtStart),
            (1e-6..=1e6).prop_map(|requests_per_s| Arrival::Poisson { requests_per_s }),
            (1usize..1000).prop_map(|concurrency| Arrival::Closed { concurrency }),
        ],
        prefix_hit in 0.0..=1.0,
    ) {
        let input_tokens = TokenRange { min: input, max: input + more };
        let output_tokens = TokenRange { min: 1 + more, max: 1 + more };
        let workload = Workload { name, num_requests, input_tokens, output_tokens, seed, arrival, prefix_hit };
        prop_assert_eq!(Workload::from_yaml(&workload.to_yaml(), "written").unwrap(), workload);
    }
}
