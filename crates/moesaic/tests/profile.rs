//! `moesaic profile` with the real binary, on the model inside it.

mod common;

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::{arg, moesaic, temp};

/// A grid of seconds.
const SMALL: [&str; 10] = [
    "profile",
    "--max-num-batched-tokens",
    "4",
    "--max-num-seqs",
    "2",
    "--max-model-len",
    "64",
    "--dtype",
    "bfloat16",
    "--op=gemm,moe,attn_decode,attn_prefill",
];

fn args<'a>(dir: &'a Path, more: &[&'a str]) -> Vec<&'a str> {
    [&SMALL[..], &["--output", dir.to_str().unwrap()], more].concat()
}

/// Rows of a table, head and columns left out.
fn rows(dir: &Path, op: &str) -> Vec<String> {
    let text = fs::read_to_string(dir.join(format!("{op}.csv"))).unwrap_or_default();
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    whole.lines().filter(|line| !line.starts_with('#')).skip(1).map(str::to_owned).collect()
}

#[test]
fn a_list_is_what_is_measured() {
    let dir = temp();
    let list = moesaic(&args(dir.path(), &["--list"])).ok();
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "a list writes nothing");
    let asked = |op: &str| list.lines().filter(|line| line.split(' ').next() == Some(op)).count();
    let ran = moesaic(&args(dir.path(), &[]));
    let stderr = ran.stderr.clone();
    let summary = ran.ok();
    for op in ["gemm", "moe", "attn_decode", "attn_prefill"] {
        let rows = rows(dir.path(), op);
        assert!(!rows.is_empty() && rows.len() == asked(op), "{op}: {rows:#?} of {list}");
        assert!(summary.lines().any(|line| line.starts_with(op) && line.contains(" %")), "{op}: {summary}");
        let time = |row: &String| row.rsplit(',').next().unwrap().parse::<f64>().unwrap();
        assert!(rows.iter().all(|row| (1e-3..60e6).contains(&time(row))), "{rows:#?}");
    }
    assert!(stderr.contains(&format!("{} to measure, 0 of them are in", list.lines().count())), "{stderr}");
    let text = fs::read_to_string(dir.path().join("gemm.csv")).unwrap();
    for part in ["# command: moesaic profile", "# commit: ", "# machine: ", "# date: 20"] {
        assert!(text.contains(part), "no {part:?} in {text}");
    }
    assert!(text.contains("\ndtype,m,n,k,kernel,framework,version,latency_us\n"), "{text}");

    // All is there: nothing is left, and nothing changes.
    assert_eq!(moesaic(&args(dir.path(), &["--list"])).ok(), "");
    let again = moesaic(&args(dir.path(), &[]));
    assert!(again.stderr.contains(&format!("{0} to measure, {0} of them", list.lines().count())), "{}", again.stderr);
    again.ok();
    assert_eq!(fs::read_to_string(dir.path().join("gemm.csv")).unwrap(), text);
}

/// A small model whose plans can be searched.
fn model(dir: &Path) -> String {
    let path = dir.join("small");
    let init = ["init", "mixtral-8x7b", "--layers", "2", "--hidden", "64", "--heads", "4", "--experts", "4"];
    moesaic(&[&init[..], &["--intermediate", "64", "--vocab", "256", "--output", arg(&path)]].concat()).ok();
    arg(&path).to_owned()
}

#[test]
fn a_machine_is_measured_and_then_planned_for() {
    let dir = temp();
    let (model, tables) = (model(dir.path()), dir.path().join("tables"));
    let grid =
        ["--max-num-batched-tokens", "16", "--max-num-seqs", "4", "--max-model-len", "256", "--dtype", "bfloat16"];
    let profile = [&["profile", &model, "--num-threads", "1"], &grid[..], &["--output", arg(&tables)]].concat();
    let told = moesaic(&[&profile[..], &["--op", "gemm,moe,attn_decode,attn_prefill"]].concat()).ok();
    let left_out = |text: &str| text[text.find("error of a row left out").expect(text)..].to_owned();
    assert!(["gemm", "moe", "attn_decode"].iter().all(|op| left_out(&told).contains(&format!("\n{op} "))), "{told}");
    assert_eq!(left_out(&moesaic(&["validate", "--tables", arg(&tables)]).ok()), left_out(&told));

    // Nothing is written by hand.
    let cluster = tables.join("cluster.yaml");
    let workload = dir.path().join("workload.yaml");
    fs::write(&workload, "name: short\nnum_requests: 4\ninput_tokens: 16\noutput_tokens: 8\narrival: {closed: 1}\n")
        .unwrap();
    let out = dir.path().join("plan");
    let by = ["--workload", arg(&workload), "--tables", arg(&tables)];
    let plan = ["plan", &model, "--cluster", arg(&cluster), "--gpus", "1", "--concurrency", "1", "--output", arg(&out)];
    moesaic(&[&plan[..], &by].concat()).ok();
    let report: serde_json::Value = serde_json::from_slice(&fs::read(out.join("report.json")).unwrap()).unwrap();
    let sources = &report["best"]["prediction"]["sources"];
    let share = |name: &str| sources[name].as_f64().unwrap();
    assert!(share("table") > 0.1 && share("roofline") < 0.5, "{sources}");

    let other = [&["plan", &model, "--cluster", "dgx-h100"], &by[..]].concat();
    moesaic(&other).refused(&["--tables is", "which measured", "H100", "cluster.yaml"]);
    // The same tables under the simulation and under what would help; other prices without them.
    let best = out.join("plans/best.yaml");
    let simulate = |more: &[&str]| moesaic(&[&["simulate", arg(&best), "--json", "-"], more].concat()).json();
    let tpot = |json: &serde_json::Value| json["closed_form"]["tpot_s"]["value"].as_f64().unwrap();
    let (own, published) = (simulate(&by), simulate(&by[..2]));
    assert!(tpot(&own) != tpot(&published), "{own}");
    let explain = |more: &[&str]| {
        let text = moesaic(&[&["explain", arg(&best)], more].concat()).ok();
        let line = text.lines().find(|line| line.contains("time per output token ")).expect(&text);
        line.to_owned()
    };
    assert!(explain(&by) != explain(&by[..2]), "{}", explain(&by));
}

#[test]
fn tables_that_cannot_be_are_refused() {
    let dir = temp();
    let plan = |more: &[&str]| {
        let plan = ["plan", "mixtral-8x7b", "--cluster", "dgx-h100", "--output", arg(dir.path())];
        moesaic(&[&plan[..], more].concat())
    };
    let tables = dir.path().join("tables");
    plan(&["--tables", arg(&tables)]).refused(&["tables: is no folder"]);
    fs::create_dir(&tables).unwrap();
    plan(&["--tables", arg(&tables)]).refused(&["which has no table", "gemm.csv", "moesaic profile MODEL"]);
    let gemm = tables.join("gemm.csv");
    for (text, parts) in [
        (
            "dtype,m,colour\n",
            ["gemm.csv, line 1, column colour: is not known; a table of gemm may have dtype, m, n, k", ""],
        ),
        (
            "dtype,m,n,k,framework,version,latency_us\nbfloat16,8192,8192,8192,moesaic,0,5\n",
            ["gemm.csv, line 2, column latency_us: 5.000 µs is faster than physics", "H100"],
        ),
        (
            "dtype,m,n,k,framework,version,latency_us\nbfloat16,x,1,1,moesaic,0,5\n",
            ["column m: x is not a number above 0", ""],
        ),
    ] {
        fs::write(&gemm, text).unwrap();
        plan(&["--tables", arg(&tables)]).refused(&parts);
    }
    moesaic(&["validate", "--tables", arg(&tables)]).refused(&["cluster.yaml"]);
}

#[test]
fn a_killed_run_goes_on() {
    let dir = temp();
    let mut command = Command::new(env!("CARGO_BIN_EXE_moesaic"));
    command.env("MOESAIC_NUM_THREADS", "2").args(args(dir.path(), &["--quiet"]));
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let start = Instant::now();
    while rows(dir.path(), "gemm").len() < 2 {
        assert!(start.elapsed() < Duration::from_secs(120), "no rows came");
        std::thread::sleep(Duration::from_millis(5));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let before = rows(dir.path(), "gemm");
    let path = dir.path().join("gemm.csv");
    // As if the end had come in the middle of a row.
    let cut = fs::read_to_string(&path).unwrap() + "bfloat16,2,19";
    fs::write(&path, cut).unwrap();

    moesaic(&args(dir.path(), &["--quiet"])).ok();
    let after = rows(dir.path(), "gemm");
    assert_eq!(after[..before.len()], before, "what was measured stays");
    let key = |row: &String| row.rsplit_once(',').unwrap().0.to_owned();
    let mut keys: Vec<String> = after.iter().map(key).collect();
    assert!(keys.iter().all(|key| key.split(',').count() == 7), "{after:#?}");
    keys.sort();
    keys.dedup();
    assert_eq!(keys.len(), after.len(), "nothing is measured twice");
    assert_eq!(moesaic(&args(dir.path(), &["--list"])).ok(), "");
}

#[test]
fn time_ends_a_run_and_memory_skips_rows() {
    let dir = temp();
    let ran = moesaic(&args(dir.path(), &["--max-seconds", "0"]));
    assert!(ran.stderr.contains(" are left; the same command goes on"), "{}", ran.stderr);
    ran.ok();
    let ran = moesaic(&args(dir.path(), &["--memory-limit", "1KiB", "--op", "gemm"]));
    assert!(ran.stderr.contains("skipped gemm dtype=bfloat16 m=1 "), "{}", ran.stderr);
    assert!(ran.stderr.contains("of memory, and 1.00 KiB may be used"), "{}", ran.stderr);
    ran.ok();
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn links_are_measured_by_both_transports() {
    let dir = temp();
    let all =
        ["profile", "--op", "send_receive,all_reduce", "--max-seconds", "1", "--output", dir.path().to_str().unwrap()];
    let list = moesaic(&[&all[..], &["--list"]].concat()).ok();
    assert_eq!(list.lines().count(), 2 * 3 * 17, "{list}");
    moesaic(&all).ok();
    let rows = rows(dir.path(), "send_receive");
    assert!(rows.iter().any(|row| row.starts_with("2,1024,in_process,moesaic,")), "{rows:#?}");
}

#[test]
fn files_of_others_are_refused_and_kept() {
    let dir = temp();
    let path = dir.path().join("gemm.csv");
    let columns = "dtype,m,n,k,kernel,framework,version,latency_us\n";
    for (text, part) in [
        (format!("# machine: a Cray\n{columns}"), "gemm.csv: is of machine a Cray, this is "),
        (columns.to_owned(), "`# machine: …` is missing"),
        ("m,n,k\n1,2,3\n".to_owned(), "line 1 has the columns m,n,k"),
    ] {
        fs::write(&path, &text).unwrap();
        moesaic(&args(dir.path(), &[])).refused(&[part]);
        assert_eq!(fs::read_to_string(&path).unwrap(), text);
    }
}

#[test]
fn what_cannot_be_is_refused() {
    moesaic(&["profile", "--max-num-seqs", "0"]).refused(&["--max-num-seqs is 0; 1 to 65536 is right"]);
    moesaic(&["profile", "--max-seconds=-1"]).refused(&["--max-seconds is -1"]);
    moesaic(&["profile", "--expert-parallel-size", "1000"]).refused(&["--expert-parallel-size is 1000; the model's"]);
    moesaic(&["profile", "--max-model-len", "9999999"]).refused(&["--max-model-len is 9999999; the model's own"]);
    moesaic(&["profile", "no-such-model"]).refused(&["no-such-model"]);
    let ran = moesaic(&["profile", "--op", "dance"]);
    assert!(ran.code == Some(2) && ran.stderr.contains("attn_decode"), "{ran:?}");
}
