//! `moesaic plan`: what it prints and writes, and what it refuses.

mod common;

use std::fs;
use std::path::Path;

use common::{arg, moesaic, temp};

fn plan(folder: &Path, args: &[&str]) -> common::Ran {
    moesaic(&[&["plan"], args, &["--output", arg(folder)]].concat())
}

const MIXTRAL: [&str; 7] = ["mixtral-8x7b", "--cluster", "a100-4x4", "--workload", "paper-003", "--gpus", "16"];

#[test]
fn the_best_plan_is_told_and_written() {
    let temp = temp();
    let text = plan(temp.path(), &[&MIXTRAL[..], &["--tpot", "60ms", "--top", "4"]].concat()).ok();
    for part in [
        "best       ",
        "memory     ",
        "limited by ",
        "runner-up  ",
        "regret     ",
        "BY TIME PER OUTPUT TOKEN",
        "THE STRATEGIES",
        "  tp+pp ",
        "tokens/s and GPU",
        "written    ",
    ] {
        assert!(text.contains(part), "no {part:?} in {text}");
    }
    let json: serde_json::Value = serde_json::from_slice(&fs::read(temp.path().join("report.json")).unwrap()).unwrap();
    let best = &json["best"]["prediction"];
    assert!(best["tpot_s"]["value"].as_f64().unwrap() <= 0.06, "{best}");
    let rate = |proposal: &serde_json::Value| proposal["prediction"]["tokens_per_s_gpu"]["value"].as_f64().unwrap();
    let frontier = json["frontier"].as_array().unwrap();
    assert!((1..=4).contains(&frontier.len()), "{}", frontier.len());
    assert!(frontier.iter().all(|proposal| rate(proposal) <= 1.0001 * rate(&json["best"])), "{json}");
    let names: Vec<&str> =
        json["strategies"].as_array().unwrap().iter().map(|verdict| verdict["strategy"].as_str().unwrap()).collect();
    assert_eq!(names, ["tp", "pp", "tp+pp", "ep", "ma"]);

    let page = fs::read_to_string(temp.path().join("report.html")).unwrap();
    for outside in ["http://", "https://", "src=", "url(", "<script", "<link", "@import"] {
        assert!(!page.contains(outside), "the page needs {outside}");
    }
    // What it writes is a plan like any other, with what is expected of it.
    let best = temp.path().join("plans/best.yaml");
    let explained = moesaic(&["explain", arg(&best)]).ok();
    assert!(explained.contains("predicted  TTFT "), "{explained}");
    let strategy = temp.path().join("plans/pp.yaml");
    assert!(moesaic(&["diff", arg(&best), arg(&strategy)]).ok().contains("prediction.tpot_ms.value"));
}

#[test]
fn json_is_one_object() {
    let temp = temp();
    let json = plan(
        temp.path(),
        &["olmoe-1b-7b", "--cluster", "a100-4x4", "--gpus", "2..4", "--concurrency", "8,64", "--json"],
    );
    let json = json.json();
    assert_eq!(json["gpus"], serde_json::json!([2, 4]));
    let concurrency = json["best"]["prediction"]["concurrency"].as_f64().unwrap();
    assert!(concurrency == 8.0 || concurrency == 64.0, "{concurrency}");
}

#[test]
fn a_cluster_grows_and_gpus_may_fail() {
    let temp = temp();
    let args =
        ["qwen3-30b-a3b", "--cluster", "dgx-h100", "--gpus", "16", "--tolerate-failures", "1", "--routing", "zipf:0.5"];
    let json = plan(temp.path(), &[&args[..], &["--json"]].concat()).json();
    assert_eq!(json["best"]["plan"]["cluster"], "dgx-h100-x2");
    assert_eq!(json["tolerate_failures"], 1);
    moesaic(&["explain", arg(&temp.path().join("plans/best.yaml"))]).ok();
}

#[test]
fn prompts_and_answers_may_have_gpus_of_their_own() {
    let temp = temp();
    let args = ["olmoe-1b-7b", "--cluster", "dgx-h100", "--gpus", "4", "--disaggregate"];
    let text = plan(temp.path(), &args).ok();
    assert!(text.contains("PROMPTS AND ANSWERS ON GPUS OF THEIR OWN"), "{text}");
    let json: serde_json::Value =
        serde_json::from_slice(&std::fs::read(temp.path().join("report.json")).unwrap()).unwrap();
    assert!(json["pools"]["gpus"].as_u64().unwrap() <= 4, "{}", json["pools"]);
    for name in ["prefill", "decode"] {
        moesaic(&["explain", arg(&temp.path().join(format!("plans/{name}.yaml")))]).ok();
    }
}

#[test]
fn the_model_inside_has_a_name() {
    let temp = temp();
    let json = plan(temp.path(), &["tiny-moe", "--cluster", "laptop", "--concurrency", "4", "--json"]).json();
    assert_eq!(json["best"]["plan"]["model"], "tiny-moe");
    moesaic(&["explain", arg(&temp.path().join("plans/best.yaml"))]).ok();
}

/// One sentence with the field, its value and what would be right.
#[test]
fn what_cannot_be_is_refused() {
    let temp = temp();
    let refused = |args: &[&str], parts: &[&str]| plan(temp.path(), args).refused(parts);
    refused(&["deepseek-v3", "--cluster", "dgx-h100"], &["does not fit on 8 × ", "--gpus ", "is the fewest"]);
    refused(&["mixtral-8x7b", "--cluster", "dgx-h100", "--tpot", "1us"], &["--tpot is 1us", "comes nearest"]);
    refused(&["mixtral-8x7b", "--cluster", "dgx-h1000"], &["dgx-h1000", "dgx-h100"]);
    refused(&["mixtrall-8x7b", "--cluster", "dgx-h100"], &["mixtrall-8x7b", "mixtral-8x7b"]);
    refused(&["mixtral-8x7b", "--cluster", "dgx-h100", "--workload", "chatt"], &["chatt"]);
    refused(&["mixtral-8x7b", "--cluster", "dgx-h100", "--routing", "zipf:-1"], &["-1", "from 0 to 100"]);
    refused(
        &["mixtral-8x7b", "--cluster", "dgx-h100", "--gpus", "8", "--tolerate-failures", "8"],
        &["--tolerate-failures is 8", "fewer than the 8 GPUs"],
    );
    refused(&["olmoe-1b-7b", "--cluster", "dgx-h100", "--workload", "paper-001"], &["10000 tokens", "context of 4096"]);
    refused(&["mixtral-8x7b", "--cluster", "a100-4x4", "--gpus", "99999999"], &["99999999"]);

    let file = temp.path().join("cluster.yaml");
    let yaml = "name: own\nnodes: 1\ngpus_per_node: 8\ngpu: h100-sxm\nintra_node: {name: n, bandwidth_per_gpu: 0, \
                bandwidth_per_node: 1e9, utilization: 0.8, latency_s: 1e-6}\n";
    fs::write(&file, yaml).unwrap();
    refused(&["mixtral-8x7b", "--cluster", arg(&file)], &["bandwidth_per_gpu", "0"]);
    fs::write(&file, yaml.replace("per_gpu: 0", "per_gpu: 1e9")).unwrap();
    refused(&["mixtral-8x7b", "--cluster", arg(&file), "--gpus", "16"], &["--gpus is 16", "has 8 GPUs", "nodes: 2"]);
}

/// The command line itself refuses what is no time and no number of GPUs.
#[test]
fn times_and_gpus_are_spelled_out() {
    for (args, part) in [
        (["--tpot", "30"], "30ms or 30s"),
        (["--ttft", "3 parsecs"], "not a unit of time"),
        (["--gpus", "0"], "32 or 32..96"),
        (["--gpus", "9..3"], "3..9 would be right"),
        (["--concurrency", "0"], "0"),
        (["--top", "0"], "0"),
    ] {
        let ran = moesaic(&[&["plan", "mixtral-8x7b", "--cluster", "dgx-h100"], &args[..]].concat());
        assert_eq!(ran.code, Some(2), "{ran:?}");
        assert!(ran.stderr.contains(part), "no {part:?} in {}", ran.stderr);
    }
}
