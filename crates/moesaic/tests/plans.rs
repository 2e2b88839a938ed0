//! Plans as a user meets them: what they say about themselves, and what is said of those that cannot be followed.

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::{arg, moesaic, temp};

/// A plan for 16 ranks that can be followed, with some keys exchanged. An empty value leaves a key out.
fn plan(changes: &[(&str, &str)]) -> String {
    let mut keys = vec![
        ("version", "1"),
        ("name", "large EP"),
        ("model", "tiny-moe"),
        ("cluster", "a100-4x4"),
        ("workload", "chat-small"),
        ("ranks", "16"),
        ("mesh", "{dp: 16, ep: 16}"),
    ];
    for &(key, value) in changes {
        match keys.iter_mut().find(|(name, _)| *name == key) {
            Some(entry) => entry.1 = value,
            None => keys.push((key, value)),
        }
    }
    let lines = keys.into_iter().filter(|(_, value)| !value.is_empty());
    lines.map(|(key, value)| format!("{key}: {value}\n")).collect()
}

fn write(folder: &Path, name: &str, text: &str) -> PathBuf {
    let path = folder.join(name);
    fs::write(&path, text).unwrap();
    path
}

/// Refused by every command that takes a plan, with this one sentence.
#[track_caller]
fn refused_everywhere(plan: &Path, sentence: &str) {
    let output = plan.parent().unwrap().join("report");
    for args in [
        &["explain", arg(plan)][..],
        &["generate", "--plan", arg(plan), "--prompt", "x", "-n", "1"],
        &["compare", "--plan", arg(plan), "--output", arg(&output)],
    ] {
        assert_eq!(moesaic(args).refused(&[]), format!("error: {sentence}"), "{args:?}");
    }
    assert!(!output.exists(), "nothing is written before all is checked");
}

/// An explicit placement of layer 1 of the small model: expert `e` on rank `e`, but for one.
fn placement(expert: usize, ranks: &str) -> String {
    let on = |e: usize| if e == expert { ranks.to_string() } else { format!("[{e}]") };
    let experts: Vec<String> = (0..16).map(on).collect();
    format!("{{placement: {{explicit: [{{layer: 1, experts: [{}]}}]}}}}", experts.join(", "))
}

#[test]
fn plans_that_cannot_be_followed_are_refused_with_the_way_out() {
    let temp = temp();
    let (nowhere, crowded) = (placement(5, "[]"), placement(5, "[4]"));
    let cases: [(&[(&str, &str)], &str); 19] = [
        (
            &[("ranks", "12")],
            "ranks is 12, but the mesh makes 16 (pp 1 × tp 1 × dp 16); write `ranks: 16` or change the mesh",
        ),
        (&[("ranks", "0")], "ranks is 0, but must be 1 to 65536"),
        (&[("mesh", "{dp: 16, ep: 16, tp: 0}")], "mesh.tp is 0, but must be at least 1"),
        (&[("moe", &nowhere)], "expert 5 of layer 1 is nowhere; give it at least one of ranks 0–15"),
        (
            &[("moe", &crowded)],
            "rank 4 has 2 experts of layer 1 (4–5), but moe.max_experts_per_rank is 1; move some to another rank or write \
             `max_experts_per_rank: 2`",
        ),
        (
            &[("ranks", "8"), ("mesh", "{dp: 8, ep: 8}")],
            "16 experts of layer 0 on 8 ranks need max_experts_per_rank 2, but moe.max_experts_per_rank is 1; write \
             `max_experts_per_rank: 2` or give experts 16 ranks",
        ),
        (
            &[("ranks", "4"), ("mesh", "{tp: 4}"), ("attention", "{heads: [4, 4, 4, 3]}")],
            "attention.heads is a list whose sum is 15, but must be a list whose sum is the number of the model's query \
             heads, 16",
        ),
        (
            &[("memory", "{utilization: 0.00001, max_model_len: 96}")],
            "rank 0 needs 6.67 MiB: weights 2.30 MiB + KV cache 384.00 KiB (one sequence of 96 tokens) + exchange 4.00 MiB, \
             but only 838.86 KiB of its 80.00 GiB may be used; its largest part is attention with 1.00 MiB, which a larger \
             tp or more stages (pp) would make smaller",
        ),
        (&[("mcro_batches", "2")], "field `mcro_batches` is not known; did you mean `micro_batches`?"),
        (&[("mesh", "{dp: 16, eq: 16}")], "field `mesh.eq` is not known; did you mean `ep`?"),
        (
            &[("moe", "{placement: {explicit: [{layer: 9, experts: [[0]]}]}}")],
            "the placement names layer 9, but the model has layers 0 to 3; is this a plan for another model?",
        ),
        (
            &[("moe", "{placement: {explicit: [{layer: 1, experts: [[0], [1]]}]}}")],
            "the placement of layer 1 has 2 experts, but the model's has 16; is this a plan for another model?",
        ),
        (
            &[("cluster", "laptop")],
            "ranks is 16, but cluster laptop has 2 GPUs (1 × 2); use fewer ranks or a larger cluster",
        ),
        (
            &[("cluster", "hgx-h21")],
            "no cluster is called \"hgx-h21\"; did you mean `hgx-h20`? (clusters: a100-4x4, h100-paper, dgx-h100, \
             hgx-h200, hgx-h800, hgx-h20, hgx-b200, h200-x2-nv18, gb200-nvl72, laptop)",
        ),
        (
            &[("mesh", "{dp: 16, ep: 4}")],
            "mesh.ep is 4, but with `pool: shared` all 16 ranks of a stage (tp 1 × dp 16) hold experts; write `ep: 16`, or \
             `ep: 1` to cut every expert by tp, or `pool: separate`",
        ),
        (&[("version", "2")], "field `version` is 2, but must be 1"),
        (&[("ranks", "")], "field `ranks` is missing; it must be a whole number from 0 to 1073741824"),
        (
            &[("exchange", "{precision: int4}")],
            "field `exchange.precision` is \"int4\", but must be full or int8 or fp8",
        ),
        (
            &[("memory", "{max_model_len: 4096}")],
            "memory.max_model_len is 4096, but must be 1 to the model's max_position_embeddings 2048",
        ),
    ];
    for (changes, sentence) in cases {
        let path = write(temp.path(), "plan.yaml", &plan(changes));
        refused_everywhere(&path, &format!("{}: {sentence}", path.display()));
    }
}

#[test]
fn files_that_are_no_plans() {
    let temp = temp();
    for (text, sentence) in [
        ("{[", "not valid YAML at line 1, column 2: unclosed bracket '['"),
        ("", "the top of the file is null, but must be keys with values, like `name: …`"),
        ("- a\n", "the top of the file is [\"a\"], but must be keys with values, like `name: …`"),
    ] {
        let path = write(temp.path(), "plan.yaml", text);
        refused_everywhere(&path, &format!("{}: {sentence}", path.display()));
    }
    let twice = write(temp.path(), "plan.yaml", &(plan(&[]) + "ranks: 16\n"));
    let sentence = "not valid YAML at line 8, column 1: key `ranks` is there twice";
    refused_everywhere(&twice, &format!("{}: {sentence}", twice.display()));
    let folder = temp.path().join("folder");
    fs::create_dir(&folder).unwrap();
    refused_everywhere(&folder, &format!("{}: is a folder; a YAML file is right", folder.display()));
    let missing = temp.path().join("gone.yaml");
    refused_everywhere(&missing, &format!("{}: No such file or directory (os error 2)", missing.display()));
}

#[test]
fn a_plan_runs_the_model_that_it_names() {
    let temp = temp();
    let other = write(
        temp.path(),
        "other.yaml",
        &plan(&[("model", "mixtral-8x7b"), ("ranks", "8"), ("mesh", "{dp: 8, ep: 8}")]),
    );
    let ours = write(temp.path(), "ours.yaml", &plan(&[]));
    let (other, ours) = (arg(&other), arg(&ours));
    let output = temp.path().join("report");
    let output = ["--output", arg(&output)];
    let sentence = format!(
        "error: {ours}: the plan is for model tiny-moe, but mixtral-8x7b was named; leave MODEL out, or change `model` in the \
         plan"
    );
    assert_eq!(moesaic(&["generate", "mixtral-8x7b", "--plan", ours]).refused(&[]), sentence);
    assert_eq!(moesaic(&[&["compare", "mixtral-8x7b", "--plan", ours], &output[..]].concat()).refused(&[]), sentence);
    let sentence = format!(
        "error: {other}: mixtral-8x7b: is a preset, which has no weights; --load-format dummy takes random ones"
    );
    assert_eq!(moesaic(&["generate", "--plan", other]).refused(&[]), sentence);
    let sentence =
        format!("error: {other}: model is mixtral-8x7b, but {ours} is for tiny-moe; plans are compared on one model");
    assert_eq!(moesaic(&[&["compare", "--plan", ours, other], &output[..]].concat()).refused(&[]), sentence);
    // To be explained, a model needs no weights.
    moesaic(&["explain", other]).ok();
}

#[test]
fn explain_says_who_owns_what_and_in_which_order_things_run() {
    let temp = temp();
    let path = write(temp.path(), "plan.yaml", &plan(&[("micro_batches", "2"), ("overlap", "arrivals")]));
    let text = moesaic(&["explain", arg(&path)]).ok();
    for line in [
        "plan       large EP: model tiny-moe, cluster a100-4x4, workload chat-small",
        "ranks      16 = pp 1 × tp 1 × dp 16, on 4 nodes",
        "step       2 micro-batches, overlap arrivals",
        "who owns what",
        "memory by part",
        "limits",
    ] {
        assert!(text.lines().any(|other| other == line), "no {line:?} in {text}");
    }
    for part in ["rank 15    15", "dispatch ", "all-to-all ", "a token through all layers"] {
        assert!(text.contains(part), "no {part:?} in {text}");
    }
    let schedules = moesaic(&["explain", arg(&path), "--schedule", "3,15"]).ok();
    let schedules = schedules.strip_prefix(&text).expect("schedules come after the rest");
    let heads: Vec<&str> = schedules.lines().filter(|line| line.starts_with("rank ")).collect();
    assert_eq!(heads, ["rank 3", "rank 15"]);
    for part in ["layer 0   micro-batch 0  compute  embed", "comm     dispatch to 0-2,4-15", "experts for 0-3"] {
        assert!(schedules.contains(part), "no {part:?} in {schedules}");
    }
    let sentence = "error: --schedule is 16; ranks 0 to 15 are right";
    assert_eq!(moesaic(&["explain", arg(&path), "--schedule", "3,16"]).refused(&[]), sentence);
}

#[test]
fn diff_says_in_which_keys_plans_differ() {
    let temp = temp();
    let a = write(temp.path(), "a.yaml", &plan(&[]));
    let b =
        write(temp.path(), "b.yaml", &plan(&[("exchange", "{precision: int8}"), ("ranks", "8"), ("mesh", "{dp: 8}")]));
    let expected = "exchange.precision: full → int8\nmesh.dp: 16 → 8\nmesh.ep: 16 → 1\nranks: 16 → 8\n";
    assert_eq!(moesaic(&["diff", arg(&a), arg(&b)]).ok(), expected);
    assert_eq!(moesaic(&["diff", arg(&a), arg(&a)]).ok(), "the plans say the same\n");
    moesaic(&["diff", arg(&a), "gone.yaml"]).refused(&["gone.yaml: No such file"]);
}
