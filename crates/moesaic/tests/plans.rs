//! Plans from the command line: compare, explain, diff, generate on many ranks, and plans that cannot be followed.

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::{Ran, arg, moesaic, temp};

/// The plan files that `compare` writes, made once for all tests of this file.
fn compared() -> &'static (tempfile::TempDir, Ran) {
    static COMPARED: std::sync::OnceLock<(tempfile::TempDir, Ran)> = std::sync::OnceLock::new();
    COMPARED.get_or_init(|| {
        let folder = temp();
        let (output, trace) = (folder.path().join("report"), folder.path().join("trace.json"));
        let ran = moesaic(&["compare", "--output", arg(&output), "--trace", arg(&trace)]);
        (folder, ran)
    })
}

fn report() -> PathBuf {
    compared().0.path().join("report")
}

fn plan(stem: &str) -> PathBuf {
    report().join("plans").join(format!("{stem}.yaml"))
}

/// A plan with some text replaced, in a file of its own.
fn changed(folder: &Path, stem: &str, from: &str, to: &str) -> PathBuf {
    let text = fs::read_to_string(plan(stem)).unwrap();
    assert!(text.contains(from), "{from:?} is not in {text}");
    let path = folder.join("changed.yaml");
    fs::write(&path, text.replacen(from, to, 1)).unwrap();
    path
}

#[test]
fn compare_runs_five_strategies_and_holds_them_against_one_rank() {
    let (folder, ran) = compared();
    assert_eq!(ran.code, Some(0), "{ran:#?}");
    for line in ["PP=2         16 ranks  every bit as one rank", "EP=16        16 ranks  every bit as one rank"] {
        assert!(ran.stderr.contains(line), "{ran:#?}");
    }
    let json = fs::read_to_string(report().join("report.json")).unwrap();
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    let strategies = json["strategies"].as_array().unwrap();
    let names: Vec<&str> = strategies.iter().map(|strategy| strategy["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["TP=8", "PP=2", "TP=8, PP=2", "EP=16", "MA 12+4"]);
    for strategy in strategies {
        let exact = ["PP=2", "EP=16"].contains(&strategy["name"].as_str().unwrap());
        let same = &strategy["sameness"];
        assert!(!exact || (same["differing_tokens"] == 0 && same["max_logprob_difference"] == 0.0), "{same}");
        assert_eq!(same["tokens"], 932);
        assert!(strategy["performance"]["tpot_ms"]["mean"].as_f64().unwrap() > 0.0);
        assert_eq!(strategy["memory"].as_array().unwrap().len(), 16);
    }
    let html = fs::read_to_string(report().join("report.html")).unwrap();
    for outside in ["http://", "https://", "src=", "<link", "<script"] {
        let found = html.matches(outside).count()
            - html.matches("http://www.w3.org/").count() * usize::from(outside == "http://");
        assert_eq!(found, 0, "{outside} in the page");
    }
    assert!(html.contains("virtual clock"));
    for stem in ["tp8", "pp2", "tp8-pp2", "ep16", "ma-12+4"] {
        let trace = folder.path().join(format!("trace.{stem}.json"));
        let trace: serde_json::Value = serde_json::from_str(&fs::read_to_string(trace).unwrap()).unwrap();
        assert!(trace.as_array().unwrap().len() > 1000);
    }
}

/// Microseconds of a rank's experts during which a message of its node's links was on its way.
fn overlap_us(trace: &Path) -> f64 {
    let events: serde_json::Value = serde_json::from_str(&fs::read_to_string(trace).unwrap()).unwrap();
    let spans = |wanted: &dyn Fn(&serde_json::Value) -> bool| -> Vec<(u64, f64, f64)> {
        let slices = events.as_array().unwrap().iter().filter(|event| event["ph"] == "X" && wanted(event));
        slices
            .map(|e| (e["pid"].as_u64().unwrap(), e["ts"].as_f64().unwrap(), e["dur"].as_f64().unwrap()))
            .map(|(pid, ts, dur)| (pid, ts, ts + dur))
            .collect()
    };
    let experts = spans(&|event| event["name"] == "experts" && event["tid"] == 0 && event["args"]["layer"].is_u64());
    let sends = spans(&|event| event["name"] == "answers" || event["name"] == "dispatch");
    let both = |e: &(u64, f64, f64), s: &(u64, f64, f64)| (e.2.min(s.2) - e.1.max(s.1)).max(0.0);
    experts.iter().map(|e| sends.iter().filter(|s| s.0 == e.0).map(|s| both(e, s)).sum::<f64>()).sum()
}

#[test]
fn sends_overlap_experts_where_the_plan_says_so() {
    let folder = temp();
    let run = |overlap: &str| {
        let path = changed(folder.path(), "ep16", "overlap: arrivals", &format!("overlap: {overlap}"));
        let trace = folder.path().join(format!("{overlap}.json"));
        let output = folder.path().join("report");
        moesaic(&["compare", "-q", "--plan", arg(&path), "--output", arg(&output), "--trace", arg(&trace)]).ok();
        overlap_us(&trace)
    };
    let (none, arrivals) = (run("none"), run("arrivals"));
    assert!(arrivals > 100.0 && arrivals > 4.0 * none, "{none} and {arrivals} µs");
}

#[test]
fn a_plan_gives_the_bytes_of_one_rank_with_both_communicators() {
    let folder = temp();
    let logits = |name: &str, more: &[&str]| {
        let file = folder.path().join(name);
        let ids = "300,12,77,401,9,1000,55";
        let args = ["generate", "-q", "--json", "-n", "9", "--prompt-ids", ids, "--logits", arg(&file)];
        let json = moesaic(&[&args, more].concat()).json();
        (json["token_ids"].clone(), fs::read(&file).unwrap())
    };
    let one = logits("one", &[]);
    let ep = plan("ep16");
    assert_eq!(one, logits("threads", &["--plan", arg(&ep)]));
    assert_eq!(one, logits("processes", &["--plan", arg(&ep), "--communicator", "process", "--deadline", "20"]));
}

#[test]
fn plans_explain_themselves_and_differ_field_by_field() {
    let ma = plan("ma-12+4");
    let text = moesaic(&["explain", arg(&ma), "--schedule", "13"]).ok();
    for part in ["who owns what", "rank 12    0–3", "what crosses which links", "experts for 0-11"] {
        assert!(text.contains(part), "no {part:?} in {text}");
    }
    let diff = moesaic(&["diff", arg(&plan("ep16")), arg(&ma)]).ok();
    assert!(diff.contains("mesh.ep: 16 → 4\n") && diff.contains("moe.pool: shared → separate\n"), "{diff}");
    moesaic(&["explain", arg(&ma), "--schedule", "16"]).refused(&["--schedule is 16; ranks 0 to 15 are right"]);
}

#[test]
fn plans_that_cannot_be_followed_say_how_to_mend_them() {
    let folder = temp();
    let cases = [
        ("tp8", "ranks: 16", "ranks: 15", "ranks is 15"),
        ("tp8", "ranks: 16", "ranks: 0", "ranks is 0"),
        ("tp8", "  tp: 8", "  tp: 0", "mesh.tp is 0"),
        ("tp8", "  tp: 8", "  tpp: 8", "did you mean `tp`?"),
        ("ma-12+4", "max_experts_per_rank: 4", "max_experts_per_rank: 3", "max_experts_per_rank"),
        ("ep16", "  ep: 16", "  ep: 8", "mesh.ep is 8"),
        ("ma-12+4", "micro_batches: 2", "micro_batches: 5", "micro_batches is 5"),
        ("tp8", "cluster: a100-4x4", "cluster: laptop", "cluster laptop has 2 GPUs"),
        ("tp8", "version: 1", "version: 2", "version"),
    ];
    for (stem, from, to, sentence) in cases {
        let path = changed(folder.path(), stem, from, to);
        moesaic(&["generate", "-q", "--plan", arg(&path), "-n", "1"]).refused(&[sentence]);
    }
    let path = changed(folder.path(), "ep16", "model: tiny-moe", "model: mixtral-8x7b");
    let olmoe = common::golden("olmoe");
    moesaic(&["generate", "-q", "--plan", arg(&path), "--model", arg(&olmoe)])
        .refused(&["the plan is for model mixtral-8x7b"]);
    moesaic(&["generate", "-q", "--plan", "/nowhere.yaml"]).refused(&["/nowhere.yaml"]);
    moesaic(&["generate", "-q", "--plan", arg(folder.path())]).refused(&["is a folder"]);
    fs::write(folder.path().join("list.yaml"), "- 1\n- 2\n").unwrap();
    moesaic(&["explain", arg(&folder.path().join("list.yaml"))]).refused(&["list.yaml"]);
}
