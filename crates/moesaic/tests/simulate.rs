//! `moesaic simulate` and the prediction of `moesaic explain`.

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::{arg, moesaic, temp};
use serde_json::Value;

/// Experts over 16 ranks of a preset's cluster.
const PLAN: &str = "version: 1
name: EP=16
model: qwen3-30b-a3b
cluster: dgx-h100-x2
workload: chat
ranks: 16
mesh: {dp: 16, ep: 16}
moe: {max_experts_per_rank: 9}
";

fn plan(folder: &Path) -> PathBuf {
    let path = folder.join("plan.yaml");
    fs::write(&path, PLAN).unwrap();
    path
}

fn simulated(plan: &Path, more: &[&str]) -> Value {
    let mut args = vec!["simulate", arg(plan), "--requests", "160", "--json", "-"];
    args.extend(more);
    moesaic(&args).json()
}

#[test]
fn a_plan_is_simulated_as_text_json_and_a_page() {
    let temp = temp();
    let plan = plan(temp.path());
    let (json, folder) = (temp.path().join("result.json"), temp.path().join("out"));
    let args = [
        "simulate",
        arg(&plan),
        "--concurrency",
        "32",
        "--requests",
        "200",
        "--goodput",
        "ttft:1s,tpot:50ms",
        "--trials",
        "3",
        "--routing",
        "zipf:0.6",
        "--json",
        arg(&json),
        "--output",
        arg(&folder),
    ];
    let text = moesaic(&args).ok();
    for part in [
        "EP=16, simulated on 16 GPUs",
        "200 requests of 1024 tokens, answers of 1024, of 32 users",
        "LATENCY, MS",
        "Time to first token (TTFT)",
        "Goodput, TTFT ≤ 1.00 s, TPOT ≤ 50.0 ms",
        "Output tokens/s of one user",
        "HOW SURE",
        "Preemptions",
        "Communication, all-to-all",
        "virtual clock",
    ] {
        assert!(text.contains(part), "no {part:?} in {text}");
    }
    assert!(text.lines().all(|line| line.chars().count() <= 100) && !text.contains('…'), "{text}");

    let report: Value = serde_json::from_slice(&fs::read(&json).unwrap()).unwrap();
    let one = &report["simulated"];
    assert_eq!((one["requests"].as_u64(), one["tokens"].as_u64()), (Some(200), Some(200 * 1024)));
    let figure = |path: &str| one.pointer(path).and_then(Value::as_f64).unwrap_or_else(|| panic!("no {path}: {one}"));
    let per_user = figure("/tokens_per_s_user");
    assert!((per_user * figure("/tpot_s/mean") - 1.0).abs() < 1e-9);
    assert!((figure("/tokens_per_s") / figure("/tokens_per_s_gpu") - 16.0).abs() < 1e-9);
    assert!(figure("/ttft_s/p50") <= figure("/ttft_s/p99") && figure("/goodput/share") <= 1.0);
    assert_eq!(report["trials"]["trials"], 3);

    let page = fs::read_to_string(folder.join("simulation.html")).unwrap();
    for part in
        ["<h1>EP=16, simulated on 16 GPUs</h1>", "KV cache in use", "class=\"line ours\"", "prefers-color-scheme"]
    {
        assert!(page.contains(part), "no {part:?}");
    }
    for outside in ["http://", "https://", "src=", "url(", "<script", "<link", "@import"] {
        assert!(!page.contains(outside), "the page needs {outside}");
    }
}

#[test]
fn a_seed_is_a_simulation() {
    let temp = temp();
    let plan = plan(temp.path());
    let run = |seed: &str| simulated(&plan, &["--rate", "30", "--seed", seed]);
    assert_eq!(run("4"), run("4"));
    assert_ne!(run("4")["simulated"], run("5")["simulated"]);
    // At a rate, how many are there at a time is found and not given.
    assert_eq!(run("4")["closed_form"], Value::Null);
}

#[test]
fn more_load_means_longer_waits() {
    let temp = temp();
    let plan = plan(temp.path());
    let ttft = |more: &[&str]| simulated(&plan, more)["simulated"]["ttft_s"]["mean"].as_f64().unwrap();
    // What a program adds was measured at each load for itself; what the scheduler adds grows.
    let [quiet, busy] = ["1", "2000"].map(|rate| ttft(&["--rate", rate, "--backend", "moesaic"]));
    assert!(busy > 2.0 * quiet, "{quiet} {busy}");
}

#[test]
fn a_routing_trace_is_a_load() {
    let temp = temp();
    let ran = moesaic(&["compare", "--strategy", "ep", "--quiet", "--output", arg(temp.path())]);
    ran.ok();
    let (plan, trace) = (temp.path().join("plans/ep16.yaml"), temp.path().join("routing-trace.json"));
    let imbalance = |routing: &str| {
        let report = moesaic(&["simulate", arg(&plan), "--routing", routing, "--json", "-"]).json();
        report["simulated"]["imbalance"].as_f64().unwrap()
    };
    let [even, traced] = ["uniform", arg(&trace)].map(imbalance);
    assert!(traced > even && even > 1.0, "{even} {traced}");
}

#[test]
fn explain_says_what_binds_and_what_would_help() {
    let temp = temp();
    let plan = plan(temp.path());
    let text = moesaic(&["explain", arg(&plan), "--concurrency", "256", "--routing", "zipf:0.6"]).ok();
    for part in [
        "who owns what",
        "predicted for 256 users at a time, on 16 GPUs",
        "time per output token",
        "(90 %: ",
        "what binds",
        "routed experts",
        "the fullest rank's surplus",
        "what would help, one thing at a time",
        "links between nodes twice as fast",
        "experts placed by load",
        "one more node, same users",
        "rows travel in 8 bits",
    ] {
        assert!(text.contains(part), "no {part:?} in {text}");
    }
    // What would help is in the order of throughput.
    let after = text.split("what would help").nth(1).unwrap();
    let gains: Vec<f64> = after
        .lines()
        .filter_map(|line| {
            let gain = line.split_whitespace().rev().nth(3)?;
            gain.trim_start_matches(['+', '±']).parse().ok()
        })
        .collect();
    assert!(gains.len() >= 10 && gains.is_sorted_by(|a, b| a >= b), "{gains:?} in {after}");

    let few = moesaic(&["explain", arg(&plan), "--workload", "prefill"]).ok();
    assert!(few.contains("predicted for 16 users"), "{few}");
}

#[test]
fn what_cannot_be_simulated_is_refused() {
    let temp = temp();
    let plan = plan(temp.path());
    let refused = |more: &[&str], parts: &[&str]| {
        let mut args = vec!["simulate", arg(&plan)];
        args.extend(more);
        moesaic(&args).refused(parts);
    };
    refused(&["--goodput", "speed:1s"], &["--goodput has \"speed:1s\"", "ttft:1s,tpot:30ms"]);
    refused(&["--rate", "0"], &["--rate is 0", "above 0"]);
    refused(&["--concurrency", "0"], &["--concurrency is 0"]);
    refused(&["--requests", "0"], &["--requests is 0"]);
    refused(&["--trials", "0"], &["--trials is 0"]);
    refused(&["--routing", "zipf"], &["--routing is zipf", "zipf:0.6"]);
    refused(&["--routing", "zipf:-1"], &["the exponent is -1"]);
    refused(&["--routing", "no-such.json"], &["--routing is no-such.json", "uniform"]);
    refused(&["--cluster", "moon"], &["moon"]);

    let long = temp.path().join("long.yaml");
    fs::write(&long, "name: long\nnum_requests: 2\ninput_tokens: 4000000\noutput_tokens: 10\n").unwrap();
    refused(&["--workload", arg(&long)], &["does not fit on 16 GPUs", "4000010 tokens"]);
}
