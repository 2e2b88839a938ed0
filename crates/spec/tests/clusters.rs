//! Clusters and workloads: the presets, what is refused with which sentence, and any text.

use moesaic_spec::{
    Bytes, Cluster, DType, LinkClass, TokenRange, Workload, cluster_preset, clusters, workload_preset, workloads,
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
    assert_eq!(workload_preset("paper-001").unwrap().longest(), 10_000);
    assert_eq!(workload_preset("paper-003").unwrap().longest(), 2048);
}

#[test]
fn unknown_names_and_keys_are_told_the_nearest() {
    assert_eq!(
        cluster_preset("dgx-h10").unwrap_err().to_string(),
        "no cluster is called \"dgx-h10\"; did you mean `dgx-h100`? (clusters: a100-4x4, h100-paper, dgx-h100, dgx-h100-x2, \
         hgx-h200, h200-x2-nv18, gb200-nvl72, laptop)"
    );
    assert_eq!(
        workload_preset("chat").unwrap_err().to_string(),
        "no workload is called \"chat\"; did you mean `chat-small`? (workloads: chat-small, prefill, decode, paper-001, \
         paper-003)"
    );
    assert_eq!(
        cluster_sentence("dgx-h100", "memory_bandwidth:", "memory_bandwith:"),
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
        ("nodes: 2", "nodes: 0", "c.yaml: field `nodes` is 0, but must be a whole number from 1 to 65536"),
        ("nodes: 2", "nodes: 1", "c.yaml: field `inter_node` is there, but must be absent where there is one node"),
        (
            "nodes: 2\ngpus_per_node: 8",
            "nodes: 65536\ngpus_per_node: 4096",
            "c.yaml: field `nodes` is 65536, but must be such that there are at most 1048576 GPUs in all",
        ),
        (
            "memory: 81559 MiB",
            "memory: 80 gigs",
            "c.yaml: field `gpu.memory` is \"80 gigs\", but must be a size with a unit of B, KB, MB, GB, TB, KiB, MiB, GiB \
             or TiB, like 80 GiB",
        ),
        ("memory: 81559 MiB", "memory: 0", "c.yaml: field `gpu.memory` is 0, but must be more than none"),
        (
            "compute_utilization: 0.83",
            "compute_utilization: 83",
            "c.yaml: field `gpu.compute_utilization` is 83, but must be a number from 0.001 to 1.0",
        ),
        (
            "bandwidth_per_node: 400e9",
            "bandwidth_per_node: 40e9",
            "c.yaml: field `inter_node.bandwidth_per_node` is 4e10, but must be at least bandwidth_per_gpu (5e10)",
        ),
        ("gpu:\n", "gpu: H100\nother:\n", "c.yaml: field `other` is not known; did you mean `name`?"),
        ("name: dgx-h100-x2\n", "", "c.yaml: field `name` is missing; it must be a string"),
    ] {
        assert_eq!(cluster_sentence("dgx-h100-x2", from, to), expected);
    }
    assert_eq!(
        cluster_sentence("dgx-h100", "nodes: 1", "nodes: 2"),
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
    assert_eq!(
        Cluster::from_yaml("name: x\nnodes: 1\ngpus_per_node: 1\ngpu: H100\n", "c.yaml").unwrap_err().to_string(),
        "c.yaml: field `gpu` is \"H100\", but must be keys of its own, indented below it"
    );
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
    ) {
        let input_tokens = TokenRange { min: input, max: input + more };
        let output_tokens = TokenRange { min: 1 + more, max: 1 + more };
        let workload = Workload { name, num_requests, input_tokens, output_tokens, seed };
        prop_assert_eq!(Workload::from_yaml(&workload.to_yaml(), "written").unwrap(), workload);
    }
}
