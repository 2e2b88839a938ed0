//! Golden sentences: what a wrong description is told.

use moesaic_spec::{ModelSpec, preset};
use serde_json::{Value, json};

/// The sentence for a preset's description after `changes`; null removes a field.
fn sentence(name: &str, changes: Value) -> String {
    let mut config: Value = serde_json::from_str(preset(name).unwrap().config_json).unwrap();
    let map = config.as_object_mut().unwrap();
    for (key, value) in changes.as_object().unwrap() {
        if value == "REMOVE" {
            map.remove(key);
        } else {
            map.insert(key.clone(), value.clone());
        }
    }
    match ModelSpec::from_config_json(&config.to_string(), "m/config.json") {
        Ok(spec) => panic!("{changes} was taken for {spec:?}"),
        Err(e) => e.to_string(),
    }
}

fn of_text(text: &str) -> String {
    ModelSpec::from_config_json(text, "m/config.json").unwrap_err().to_string()
}

#[test]
fn more_experts_per_token_than_experts() {
    assert_eq!(
        sentence("mixtral-8x7b", json!({"num_experts_per_tok": 9})),
        "m/config.json: field `num_experts_per_tok` is 9, but must be at most num_local_experts (8)"
    );
    assert_eq!(
        sentence("deepseek-v3", json!({"num_experts_per_tok": 129})),
        "m/config.json: field `num_experts_per_tok` is 129, but must be at most 128, the experts in topk_group (4) groups of 32"
    );
}

#[test]
fn unknown_family() {
    const KNOWN: &str = "mixtral, qwen3_moe, olmoe, deepseek_v3, kimi_k2, moesaic_paper, llama, qwen3, gpt_oss, minimax_m2, \
                         glm4_moe, qwen3_next, qwen3_5_moe, deepseek_v32, glm_moe_dsa, kimi_k25";
    assert_eq!(
        sentence("mixtral-8x7b", json!({"model_type": "gpt2"})),
        format!("m/config.json: field `model_type` is \"gpt2\", which is not a known family; known are {KNOWN}")
    );
    assert_eq!(of_text("{}"), format!("m/config.json: field `model_type` is missing; it must be one of {KNOWN}"));
    assert_eq!(
        of_text(r#"{"model_type": 3}"#),
        format!("m/config.json: field `model_type` is 3, which is not a known family; known are {KNOWN}")
    );
}

#[test]
fn sizes_that_are_none() {
    for (value, shown) in [
        (json!(-1), "-1"),
        (json!(0), "0"),
        (json!(4096.5), "4096.5"),
        (json!(4096.0), "4096.0"),
        (json!(u64::MAX), "18446744073709551615"),
        (json!(1e300), "1e+300"),
        (json!("4096"), "\"4096\""),
        (json!([4096]), "[4096]"),
        (json!(true), "true"),
    ] {
        assert_eq!(
            sentence("mixtral-8x7b", json!({"hidden_size": value})),
            format!("m/config.json: field `hidden_size` is {shown}, but must be a whole number from 1 to 262144")
        );
    }
}

#[test]
fn a_missing_size_says_what_it_would_be() {
    for absent in [json!("REMOVE"), Value::Null] {
        assert_eq!(
            sentence("olmoe-1b-7b", json!({"num_hidden_layers": absent})),
            "m/config.json: field `num_hidden_layers` is missing; it must be a whole number from 1 to 1024"
        );
    }
}

#[test]
fn text_that_is_not_json() {
    // What Python writes for infinities and NaN is no JSON.
    assert_eq!(
        of_text("{\"model_type\": \"mixtral\",\n \"rope_theta\": NaN}"),
        "m/config.json: not valid JSON at line 2, column 16: expected value"
    );
    assert_eq!(
        of_text(r#"{"model_type": "mixtral""#),
        "m/config.json: not valid JSON at line 1, column 24: EOF while parsing an object"
    );
    assert_eq!(of_text("[1]"), "m/config.json: the top of the file is [1], but must be a JSON object {…}");
    assert_eq!(
        of_text(&" ".repeat((1 << 20) + 1)),
        "m/config.json: the file has 1048577 bytes, but a description has at most 1048576"
    );
    // Deeper than any stack is meant to hold.
    assert!(of_text(&"[".repeat(100_000)).starts_with("m/config.json: not valid JSON at line 1"));
}

#[test]
fn heads_that_do_not_divide() {
    assert_eq!(
        sentence("qwen3-30b-a3b", json!({"num_key_value_heads": 5})),
        "m/config.json: field `num_key_value_heads` is 5, but must be a divisor of num_attention_heads (32)"
    );
    assert_eq!(
        sentence("mixtral-8x7b", json!({"num_attention_heads": 24, "num_key_value_heads": 8})),
        "m/config.json: field `num_attention_heads` is 24, but must be such that hidden_size (4096) divided by it is a \
         whole even head_dim"
    );
    assert_eq!(
        sentence("qwen3-30b-a3b", json!({"head_dim": 33})),
        "m/config.json: field `head_dim` is 33, but must be even, because RoPE turns pairs"
    );
    assert_eq!(
        sentence("olmoe-1b-7b", json!({"head_dim": 64})),
        "m/config.json: field `head_dim` is 64, but must be hidden_size (2048) divided by num_attention_heads (16)"
    );
}

#[test]
fn groups_that_do_not_divide() {
    assert_eq!(
        sentence("deepseek-v3", json!({"n_group": 7})),
        "m/config.json: field `n_group` is 7, but must be a divisor of n_routed_experts (256)"
    );
    assert_eq!(
        sentence("deepseek-v3", json!({"n_group": 256})),
        "m/config.json: field `n_group` is 256, but must be at most half of n_routed_experts (256), because a group is \
         scored by its two best"
    );
    assert_eq!(
        sentence("deepseek-v3", json!({"topk_group": 9})),
        "m/config.json: field `topk_group` is 9, but must be at most n_group (8)"
    );
}

#[test]
fn what_others_support() {
    assert_eq!(
        sentence("mixtral-8x7b", json!({"hidden_act": "gelu"})),
        "m/config.json: field `hidden_act` is \"gelu\", which is not supported; supported is \"silu\""
    );
    assert_eq!(
        sentence("qwen3-30b-a3b", json!({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}})),
        "m/config.json: field `rope_scaling.rope_type` is \"llama3\", which is not supported; supported is \"default\", \
         \"linear\" or \"yarn\""
    );
    assert_eq!(
        sentence("qwen3-30b-a3b", json!({"quantization_config": {"quant_method": "gptq", "bits": 4}})),
        "m/config.json: field `quantization_config.quant_method` is \"gptq\", which is not supported; supported is \
         \"fp8\" (E4M3 weights with one scale per block)"
    );
    assert_eq!(
        sentence("deepseek-v3", json!({"scoring_func": "softmax"})),
        "m/config.json: field `scoring_func` is \"softmax\", which is not supported; supported is sigmoid"
    );
    assert_eq!(
        sentence("deepseek-v3", json!({"attention_bias": true})),
        "m/config.json: field `attention_bias` is true, which is not supported; supported is false for model_type \
         \"deepseek_v3\""
    );
    assert_eq!(
        sentence("mixtral-8x7b", json!({"torch_dtype": "int8"})),
        "m/config.json: field `torch_dtype` is \"int8\", which is not supported; supported is \"bfloat16\", \"float16\" or \
         \"float32\""
    );
}

#[test]
fn our_own_format_knows_all_its_keys() {
    assert_eq!(
        sentence("paper-001", json!({"num_expert": 4})),
        "m/config.json: field `num_expert` is not known to model_type \"moesaic_paper\"; did you mean `num_experts`?"
    );
    assert_eq!(
        sentence("paper-001", json!({"attention": "REMOVE"})),
        "m/config.json: field `attention` is missing; it must be \"gqa\" or \"mla\""
    );
    // Others have keys of their own, which mean nothing to us.
    let mut config: Value = serde_json::from_str(preset("mixtral-8x7b").unwrap().config_json).unwrap();
    config["router_aux_loss_coef"] = json!(0.02);
    assert!(ModelSpec::from_config_json(&config.to_string(), "m/config.json").is_ok());
}

#[test]
fn a_lie_about_experts_allocates_nothing() {
    assert_eq!(
        sentence("mixtral-8x7b", json!({"num_local_experts": 4096, "num_hidden_layers": 1024})),
        "m/config.json: field `num_local_experts` is 4096, but must be at most 131072 over all 1024 MoE layers together"
    );
}

#[test]
fn long_values_are_shortened() {
    let long = "x".repeat(100_000);
    assert!(sentence("mixtral-8x7b", json!({"model_type": long})).len() < 400);
    assert!(sentence("paper-001", json!({(long): 1})).len() < 300);
}

#[test]
fn a_preset_that_is_none() {
    let e = preset("mixtral-8x7").unwrap_err().to_string();
    assert!(
        e.starts_with("no preset is called \"mixtral-8x7\"; did you mean `mixtral-8x7b`? (presets: mixtral-8x7b, "),
        "{e}"
    );
    assert_eq!(preset("Qwen3-30B-A3B").unwrap().name, "qwen3-30b-a3b");
}
