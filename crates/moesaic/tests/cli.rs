//! The real binary, used as a user would.

mod common;

use std::fs;

use common::{arg, golden, moesaic, moesaic_with_stdin, temp};
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

#[test]
fn generate_goes_on_from_a_prompt() {
    let args = ["generate", "--prompt", "It was a fine morning, and", "--max-tokens", "8"];
    let ran = moesaic(&args);
    for part in ["memory    weights", "KV cache", "activations", "8 generated", "TTFT", "tokens/s"] {
        assert!(ran.stderr.contains(part), "no {part:?} in {}", ran.stderr);
    }
    let text = ran.ok();
    assert!(text.trim().len() > 8, "{text:?}");
    assert!(text.ends_with('\n'), "{text:?}");
    let quiet = moesaic(&[&args[..], &["--quiet"]].concat());
    assert_eq!(quiet.stderr, "");
    assert_eq!(quiet.ok(), text, "the same seed says the same");
}

#[test]
fn generate_reads_standard_input() {
    let prompt = "She had always been";
    let from_stdin = moesaic_with_stdin(&["generate", "-q", "-n", "8"], &format!("{prompt}\n")).ok();
    assert_eq!(from_stdin, moesaic(&["generate", "-q", "-n", "8", "--prompt", prompt]).ok());
    // Nothing on standard input: the model begins by itself.
    assert!(!moesaic(&["generate", "-q", "-n", "4"]).ok().trim().is_empty());
}

#[test]
fn generate_json_has_ids_and_logprobs() {
    let prompt = "The old house";
    let args = ["generate", "--prompt", prompt, "-n", "6", "--ignore-eos", "--logprobs", "3", "--json"];
    let json = moesaic(&args).json();
    assert_eq!(json["finish_reason"], "length");
    assert_eq!(json["usage"]["completion_tokens"], 6);
    assert!(json["usage"]["prompt_tokens"].as_u64().unwrap() > 0);
    assert_eq!(json["token_ids"].as_array().unwrap().len(), 6);
    let top = json["top_logprobs"].as_array().unwrap();
    assert_eq!(top.len(), 6);
    for (logprob, top) in json["logprobs"].as_array().unwrap().iter().zip(top) {
        let logprob = logprob.as_f64().unwrap();
        let top: Vec<f64> = top.as_array().unwrap().iter().map(|top| top["logprob"].as_f64().unwrap()).collect();
        assert_eq!(top.len(), 3);
        assert!(top[0] >= top[1] && top[1] >= top[2], "best first: {top:?}");
        assert!(logprob <= top[0] && top[0] <= 0.0, "{logprob} {top:?}");
    }
    let text = moesaic(&["generate", "--prompt", prompt, "-n", "6", "--ignore-eos", "-q"]).ok();
    assert_eq!(json["text"].as_str().unwrap(), text.strip_suffix('\n').unwrap());
}

#[test]
fn a_seed_is_reproducible_and_greedy_needs_none() {
    let tokens = |extra: &[&str]| {
        let args = ["generate", "--prompt", "One day", "-n", "12", "--ignore-eos", "--json"];
        moesaic(&[&args[..], extra].concat()).json()["token_ids"].clone()
    };
    let hot = ["--temperature", "1.5", "--top-p", "1"];
    assert_eq!(tokens(&[&hot[..], &["--seed", "7"]].concat()), tokens(&[&hot[..], &["--seed", "7"]].concat()));
    assert_ne!(tokens(&[&hot[..], &["--seed", "7"]].concat()), tokens(&[&hot[..], &["--seed", "8"]].concat()));
    let greedy = ["--temperature", "0"];
    assert_eq!(tokens(&greedy), tokens(&[&greedy[..], &["--seed", "9", "--num-threads", "3"]].concat()));
}

#[test]
fn several_prompts_run_together_and_say_what_they_say_alone() {
    let prompts = ["The king", "It rained all day, and", "She"];
    let shared = ["generate", "-n", "8", "--json", "--temperature", "0.8", "--seed", "3"];
    let alone: Vec<Value> =
        prompts.iter().map(|prompt| moesaic(&[&shared[..], &["--prompt", prompt]].concat()).json()).collect();
    let together: Vec<&str> = prompts.iter().flat_map(|prompt| ["--prompt", *prompt]).collect();
    assert_eq!(moesaic(&[&shared[..], &together].concat()).json(), Value::Array(alone.clone()));

    let text = [&shared[..3], &shared[4..], &["-q"], &together].concat();
    let text = moesaic(&text).ok();
    for (prompt, alone) in prompts.iter().zip(&alone) {
        let whole = format!("{prompt}{}", alone["text"].as_str().unwrap());
        assert!(text.contains(&whole), "no {whole:?} in {text:?}");
    }
}

#[test]
fn stop_strings_and_stop_ids_end_the_answer() {
    let shared = ["generate", "--prompt", "It was a fine morning, and", "-n", "40", "--ignore-eos", "--json"];
    let free = moesaic(&shared).json();
    let text = free["text"].as_str().unwrap();
    // Something from the middle of the answer, beginning inside a word as stop strings may.
    let chars: Vec<char> = text.chars().collect();
    let stop: String = chars[chars.len() / 2..chars.len() / 2 + 5].iter().collect();
    let stopped = moesaic(&[&shared[..], &["--stop", "never said", "--stop", &stop]].concat()).json();
    assert_eq!(stopped["finish_reason"], "stop");
    assert_eq!(stopped["text"].as_str().unwrap(), &text[..text.find(&stop).unwrap()]);
    assert!(stopped["usage"]["completion_tokens"].as_u64() < free["usage"]["completion_tokens"].as_u64());

    let ids = free["token_ids"].as_array().unwrap();
    let id = ids[10].as_u64().unwrap();
    let first = ids.iter().position(|other| *other == id).unwrap();
    let stopped = moesaic(&[&shared[..], &["--stop-token-ids", &id.to_string()]].concat()).json();
    assert_eq!(stopped["finish_reason"], "stop");
    assert_eq!(stopped["token_ids"], Value::Array(ids[..=first].to_vec()), "the id itself is reported");
}

#[test]
fn logits_are_written_as_documented() {
    let folder = temp();
    let file = folder.path().join("logits.safetensors");
    let model = golden("qwen3_moe");
    let args = ["generate", arg(&model), "--prompt-ids", "5,6,7,8", "-n", "3", "--json", "--dtype", "float32"];
    let json = moesaic(&[&args[..], &["--logits", arg(&file)]].concat()).json();
    let bytes = fs::read(&file).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let mut names = tensors.names();
    names.sort();
    assert_eq!(names, ["decode_logits", "prefill_logits", "token_ids"]);
    let shape = |name: &str| (tensors.tensor(name).unwrap().dtype(), tensors.tensor(name).unwrap().shape().to_vec());
    assert_eq!(shape("prefill_logits"), (Dtype::F32, vec![4, 96]));
    assert_eq!(shape("decode_logits"), (Dtype::F32, vec![2, 96]));
    assert_eq!(shape("token_ids"), (Dtype::I64, vec![3]));
    let ids: Vec<i64> = tensors
        .tensor("token_ids")
        .unwrap()
        .data()
        .as_chunks::<8>()
        .0
        .iter()
        .copied()
        .map(i64::from_le_bytes)
        .collect();
    assert_eq!(serde_json::json!(ids), json["token_ids"]);
    // The first token is the likeliest after the last row of the prompt: without a tokenizer the model is greedy.
    let rows: Vec<f32> = tensors
        .tensor("prefill_logits")
        .unwrap()
        .data()
        .as_chunks::<4>()
        .0
        .iter()
        .copied()
        .map(f32::from_le_bytes)
        .collect();
    let last = &rows[3 * 96..];
    let best = (0..96).max_by(|&a, &b| last[a].total_cmp(&last[b])).unwrap();
    assert_eq!(ids[0], best as i64);
}

#[test]
fn a_preset_runs_on_random_weights() {
    let folder = temp();
    let config = folder.path().join("config.json");
    fs::copy(golden("deepseek_v3").join("config.json"), &config).unwrap();
    let args = ["generate", arg(&config), "--load-format", "dummy", "--prompt-ids", "1,2,3", "-n", "4", "--json"];
    let json = moesaic(&args).json();
    assert_eq!(json["usage"]["completion_tokens"], 4);
    assert_eq!(json["text"], "", "there is no tokenizer");
}

#[test]
fn inspect_says_what_a_model_is() {
    let text = moesaic(&["inspect", "deepseek-v3"]).ok();
    for part in ["deepseek_v3", "61 (3 dense)", "latent (MLA)", "256 of width 2048, top-8", "KV cache", "FLOPs"] {
        assert!(text.contains(part), "no {part:?} in {text}");
    }
    let json = moesaic(&["inspect", "qwen3-30b-a3b", "--json", "--context", "1000"]).json();
    assert_eq!((json["model_type"].as_str(), json["num_layers"].as_u64()), (Some("qwen3_moe"), Some(48)));
    assert_eq!(json["context"], 1000);
    let total = json["counts"]["params_total"].as_u64().unwrap();
    assert!((30_000_000_000..31_000_000_000).contains(&total), "{total}");
    // A multiply-add with every active weight but the embedding's, and attention beside it.
    let active = json["counts"]["params_active"].as_f64().unwrap();
    for field in ["flops_per_token_prefill", "flops_per_token_decode"] {
        let flops = json[field].as_f64().unwrap();
        assert!((1.5 * active..4.0 * active).contains(&flops), "{field}: {flops} {active}");
    }

    let list = moesaic(&["inspect", "--list"]).ok();
    assert!(list.lines().count() >= 12, "{list}");
    assert!(list.lines().any(|line| line.starts_with("mixtral-8x7b ")), "{list}");

    let text = moesaic(&["inspect", "gpt-oss-120b"]).ok();
    for part in ["bf16, routed experts mxfp4", "only, and not run yet: it has a window in every other layer"] {
        assert!(text.contains(part), "no {part:?} in {text}");
    }

    let folder = golden("olmoe");
    let by_folder = moesaic(&["inspect", arg(&folder), "--json"]).json();
    let by_file = moesaic(&["inspect", arg(&folder.join("config.json")), "--json"]).json();
    assert_eq!(by_folder["counts"], by_file["counts"]);
    assert_eq!(by_folder["model_type"], "olmoe");
    assert!(moesaic::<&str>(&["inspect"]).ok().contains("inside the binary"));
}

const TINY: [&str; 12] =
    ["--layers", "2", "--hidden", "64", "--heads", "4", "--experts", "4", "--intermediate", "32", "--vocab", "128"];

#[test]
fn init_writes_any_preset_in_any_size() {
    let folder = temp();
    let list = moesaic(&["inspect", "--list"]).ok();
    for line in list.lines() {
        let preset = line.split_whitespace().next().unwrap();
        let model = folder.path().join(preset);
        if line.ends_with("planned only") {
            moesaic(&["init", preset, "--output", arg(&model)]).refused(&["can be planned, but not run yet: it has "]);
            continue;
        }
        let said = moesaic(&[&["init", preset, "--output", arg(&model)], &TINY[..]].concat()).ok();
        assert!(said.contains("random weights (seed 0)"), "{said}");
        let json = moesaic(&["generate", arg(&model), "--prompt-ids", "1,2,3,4,5", "-n", "4", "--json"]).json();
        assert_eq!(json["usage"]["completion_tokens"], 4, "{preset}");
        let counts = moesaic(&["inspect", arg(&model), "--json"]).json()["counts"].clone();
        let bytes = fs::metadata(model.join("model.safetensors")).unwrap().len();
        let tensors = counts["bytes_total"].as_u64().unwrap();
        assert!((tensors..tensors + 64 * 1024).contains(&bytes), "{preset}: {bytes} {tensors}");
    }
}

#[test]
fn init_in_shards_with_a_seed() {
    let folder = temp();
    let make = |name: &str, extra: &[&str]| {
        let model = folder.path().join(name);
        moesaic(&[&["init", "qwen3-30b-a3b", "--output", arg(&model)], &TINY[..], extra].concat()).ok();
        model
    };
    let answer = |model: &std::path::Path| {
        let args = ["generate", arg(model), "--prompt-ids", "1,2,3", "-n", "6", "--json", "--logprobs", "2"];
        moesaic(&args).json()
    };
    let (one, again) = (make("one", &["--seed", "5"]), make("again", &["--seed", "5"]));
    for file in ["model.safetensors", "config.json"] {
        assert_eq!(fs::read(one.join(file)).unwrap(), fs::read(again.join(file)).unwrap(), "{file}");
    }
    let shards = make("shards", &["--seed", "5", "--shard-size", "20KB"]);
    assert!(shards.join("model.safetensors.index.json").exists() && !shards.join("model.safetensors").exists());
    assert_eq!(answer(&one), answer(&shards), "a tensor is the same in any file");
    assert_ne!(answer(&one), answer(&make("other", &["--seed", "6"])));
    let config = one.join("config.json");
    let from_config = folder.path().join("from_config");
    moesaic(&["init", "--config", arg(&config), "--output", arg(&from_config), "--seed", "5"]).ok();
    assert_eq!(answer(&one), answer(&from_config));

    let args = [&["init", "qwen3-30b-a3b", "--output", arg(&one)], &TINY[..]].concat();
    moesaic(&args).refused(&[arg(&one), "is not empty", "a new or empty folder is right"]);
}

/// What a benchmark reports, not how fast it is.
#[test]
fn bench_reports_its_fields() {
    let folder = temp();
    let file = folder.path().join("latency.json");
    let tiny = ["--input-len", "8", "--output-len", "4"];
    let latency = ["bench", "latency", "--batch-size", "1,2", "--num-iters", "1", "--json", arg(&file)];
    let table = moesaic(&[&latency[..], &tiny].concat()).ok();
    assert!(table.lines().count() >= 3, "{table}");
    let json: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    for field in ["model", "moesaic_version", "cpu_model", "isa", "ceilings", "load_peak_memory_bytes"] {
        assert!(!json[field].is_null(), "no {field} in {json:#}");
    }
    assert_eq!((json["num_threads"].as_u64(), json["input_len"].as_u64()), (Some(2), Some(8)), "{json:#}");
    let sizes: Vec<_> = json["results"].as_array().unwrap().iter().map(|r| r["batch_size"].as_u64().unwrap()).collect();
    assert_eq!(sizes, [1, 2]);
    for result in json["results"].as_array().unwrap() {
        for field in ["ttft_ms", "tpot_ms", "prefill_tokens_per_s", "decode_tokens_per_s", "decode_roofline_share"] {
            assert!(result[field].as_f64().unwrap() > 0.0, "{field}: {result:#}");
        }
    }

    let throughput = ["bench", "throughput", "--num-prompts", "3", "--json", "-"];
    let stdout = moesaic(&[&throughput[..], &tiny].concat()).ok();
    let json: Value = serde_json::from_str(&stdout[stdout.find('{').unwrap()..]).unwrap();
    assert_eq!(json["results"][0]["num_prompts"], 3);
    assert!(json["results"][0]["output_throughput"].as_f64().unwrap() > 0.0);
}

#[test]
fn doctor_describes_the_machine() {
    let json = moesaic(&["doctor", "--json"]).json();
    for field in ["cpu_model", "isa", "read_bandwidth_bytes_per_s"] {
        assert!(!json[field].is_null(), "no {field} in {json:#}");
    }
    assert!(json["read_bandwidth_bytes_per_s"].as_f64().unwrap() > 1e8, "{json:#}");
}

#[test]
fn completions_and_help() {
    let bash = moesaic(&["completions", "bash"]).ok();
    for part in ["_moesaic", "--max-num-batched-tokens", "complete -F"] {
        assert!(bash.contains(part), "no {part:?}");
    }
    let help = moesaic(&["generate", "--help"]).ok();
    for heading in ["Model:", "Prompt:", "Sampling:", "Output:", "Engine:", "Memory:", "Examples:"] {
        assert!(help.lines().any(|line| line == heading), "no {heading} in {help}");
    }
    let help = moesaic(&["--help"]).ok();
    for command in ["generate", "inspect", "init", "bench", "doctor", "completions"] {
        assert!(help.lines().any(|line| line.trim_start().starts_with(command)), "no {command} in {help}");
    }
    assert!(moesaic(&["--version"]).ok().starts_with("moesaic "));
}

/// The instruction set and the number of threads can be chosen from outside, and change nothing that is said.
#[test]
fn the_environment_chooses_and_changes_nothing() {
    let run = |variable: &str, value: &str| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_moesaic"));
        command.env(variable, value).args(["generate", "--prompt", "The sea", "-n", "6", "--json"]);
        command.output().unwrap()
    };
    let expected = moesaic(&["generate", "--prompt", "The sea", "-n", "6", "--json"]).ok();
    for (variable, value) in [("MOESAIC_ISA", "portable"), ("MOESAIC_NUM_THREADS", "1")] {
        let output = run(variable, value);
        assert_eq!(String::from_utf8(output.stdout).unwrap(), expected, "{variable}={value}");
    }
    for (variable, value) in [("MOESAIC_ISA", "abacus"), ("MOESAIC_NUM_THREADS", "none")] {
        let output = run(variable, value);
        assert_eq!(output.status.code(), Some(2));
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(stderr.starts_with(&format!("error: {variable}={value}: ")), "{stderr}");
    }
}
