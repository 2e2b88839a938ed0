//! Models that are planned but not run: their counts against what is published, what is refused, and names on the hub.

use moesaic_spec::{
    LayerAttention, ModelSpec, Scale, WeightFormat, WeightFormats, preset, preset_by_hub_name, presets,
};
use serde_json::{Value, json};

fn spec(name: &str) -> ModelSpec {
    preset(name).unwrap().spec().unwrap()
}

/// A preset's description with some keys changed.
fn changed(name: &str, changes: Value) -> Result<ModelSpec, String> {
    let mut config: Value = serde_json::from_str(preset(name).unwrap().config_json).unwrap();
    config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    ModelSpec::from_config_json(&config.to_string(), "c.json").map_err(|e| e.to_string())
}

#[test]
fn published_sizes() {
    // (total, active) in billions as published. Publishers do not agree on whether embedding and head are active, and round
    // large models to whole billions: one of the countings must come within 2 % or half a billion.
    for (name, total, active) in [
        ("llama-3.1-8b", 8.03, 8.03),
        ("llama-3.1-70b", 70.6, 70.6),
        ("llama-3.1-405b", 405.0, 405.0),
        ("qwen3-8b", 8.2, 8.2),
        ("qwen3-32b", 32.8, 32.8),
        ("gpt-oss-20b", 20.91, 3.61),
        ("gpt-oss-120b", 116.83, 5.13),
        ("minimax-m2.5", 230.0, 10.0),
        ("glm-4.5", 355.0, 32.0),
        ("glm-5", 744.0, 40.0),
        ("qwen3.5-397b-a17b", 397.0, 17.0),
        ("kimi-k2.5", 1040.0, 32.0),
        ("deepseek-v3.2", 671.0, 37.0),
        ("deepseek-r1", 671.0, 37.0),
    ] {
        let counts = spec(name).counts();
        let got_total = counts.params_total as f64 / 1e9;
        assert!((got_total - total).abs() <= 0.02 * total, "{name}: {got_total} B in all, published {total}");
        let all = counts.params_active as f64 / 1e9;
        let embedding = counts.parts[0].params as f64 / 1e9;
        let close = |got: f64| (got - active).abs() <= f64::max(0.02 * active, if active > 9.0 { 0.5 } else { 0.0 });
        assert!(
            [all, all - embedding, all - 2.0 * embedding].into_iter().any(close),
            "{name}: {all} B active, {active}"
        );
    }
}

/// The sizes that OpenAI states for the checkpoints, 12.8 and 60.8 GiB, and Moonshot's 595 GB.
#[test]
fn published_bytes() {
    for (name, bytes) in [("gpt-oss-20b", 12.8 * 1.074e9), ("gpt-oss-120b", 60.8 * 1.074e9), ("kimi-k2.5", 595e9)] {
        let got = spec(name).counts().bytes_total as f64;
        assert!((got / bytes - 1.0).abs() < 0.01, "{name}: {got}, stated {bytes}");
    }
}

#[test]
fn every_layer_attends_as_its_family_does() {
    let gpt = spec("gpt-oss-20b");
    assert_eq!(gpt.layer_attention(0), LayerAttention::Window(128));
    assert_eq!(gpt.layer_attention(1), LayerAttention::Full);
    let token = 2 * 8 * 64 * 2;
    assert_eq!(gpt.cache_bytes(1000), 12 * token * (1000 + 128));
    assert_eq!(gpt.cache_bytes(100), gpt.counts().kv.bytes_per_token * 100);
    // Half of the layers look at 128 tokens.
    let flops = gpt.counts().flops;
    assert_eq!(flops.decode(1000) - flops.linear, 24.0 * 2.0 * 64.0 * 128.0 * (1000.0 + 128.0) / 2.0);

    let qwen = spec("qwen3.5-397b-a17b");
    let linear = (0..60).filter(|&layer| matches!(qwen.layer_attention(layer), LayerAttention::Linear(_))).count();
    assert_eq!((linear, qwen.layer_attention(3)), (45, LayerAttention::Full));
    let state = 4 * 64 * 128 * 128 + 2 * (2 * 2048 + 8192) * 3;
    assert_eq!(qwen.counts().kv.bytes_per_sequence, 45 * state);
    assert_eq!(qwen.cache_bytes(10) - qwen.cache_bytes(9), 15 * 2 * 2 * 256 * 2);

    let deepseek = spec("deepseek-v3.2");
    let LayerAttention::Sparse(indexer) = deepseek.layer_attention(60) else { panic!("it has an indexer") };
    assert_eq!((indexer.top_k, indexer.num_heads, indexer.head_dim), (2048, 64, 128));
    assert_eq!(deepseek.cache_bytes(1), 61 * (576 + 128) * 2);
    let (sparse, full) = (deepseek.counts().flops, spec("deepseek-v3").counts().flops);
    assert!(sparse.decode(100_000) < full.decode(100_000) / 5.0);
}

#[test]
fn weights_have_the_formats_of_their_checkpoint() {
    use WeightFormat::{Bf16, Fp8, Fp8Block, Int4, Mxfp4, Nvfp4};
    let formats = |dense, experts| WeightFormats { dense, experts };
    for (name, expected) in [
        ("mixtral-8x7b", formats(Bf16, Bf16)),
        ("deepseek-v3", formats(Fp8Block, Fp8Block)),
        ("minimax-m2.5", formats(Fp8Block, Fp8Block)),
        ("gpt-oss-120b", formats(Bf16, Mxfp4)),
        ("kimi-k2.5", formats(Bf16, Int4)),
    ] {
        assert_eq!(spec(name).formats(), expected, "{name}");
    }
    for (config, expected) in [
        (json!({"quant_method": "fp8"}), formats(Fp8, Fp8)),
        (json!({"quant_method": "modelopt", "quant_algo": "FP8"}), formats(Fp8, Fp8)),
        (json!({"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["*.self_attn*"]}), formats(Bf16, Nvfp4)),
        (json!({"quant_method": "awq"}), formats(Int4, Int4)),
        (
            json!({"quant_method": "fp8", "weight_block_size": [128, 128],
                   "modules_to_not_convert": ["model.layers.0.self_attn.q_a_layernorm"]}),
            formats(Fp8Block, Fp8Block),
        ),
    ] {
        assert_eq!(changed("glm-5", json!({"quantization_config": config})).unwrap().formats(), expected);
    }
    // A model that runs, in another format: fewer bytes, and planned only.
    let deepseek = spec("deepseek-v3");
    let nvfp4 = deepseek.clone().with_formats(formats(Bf16, Nvfp4));
    assert!(nvfp4.counts().bytes_total < deepseek.counts().bytes_total * 2 / 3);
    assert_eq!(nvfp4.counts().params_total, deepseek.counts().params_total);
    assert!(nvfp4.require_runnable().is_err());
    assert_eq!(ModelSpec::from_config_json(&nvfp4.to_config_json(), "written").unwrap(), nvfp4);
    assert_eq!(deepseek.clone().with_formats(deepseek.formats()), deepseek);
}

#[test]
fn what_can_only_be_planned_says_so() {
    let planned: Vec<&str> =
        presets().iter().filter(|preset| preset.spec().unwrap().planning_only.is_some()).map(|p| p.name).collect();
    assert_eq!(planned.len(), 13, "{planned:?}");
    assert_eq!(
        spec("gpt-oss-20b").require_runnable().unwrap_err().to_string(),
        "a gpt_oss model like this can be planned, but not run yet: it has a window in every other layer, attention sinks, \
         clamped experts with biases and MXFP4 weights"
    );
    assert_eq!(
        spec("qwen3-8b").scaled(&Scale::default()).unwrap_err().to_string(),
        "a qwen3 model like this can be planned, but not run yet: it has no experts"
    );
    assert!(spec("mixtral-8x7b").require_runnable().is_ok());
}

#[test]
fn wrong_descriptions_are_refused() {
    for (name, changes, expected) in [
        (
            "gpt-oss-20b",
            json!({"layer_types": ["full_attention"]}),
            "field `layer_types` is a list of 1, but must be a list of num_hidden_layers (24)",
        ),
        (
            "qwen3-8b",
            json!({"num_hidden_layers": 1, "layer_types": ["chunked_attention"]}),
            "field `layer_types[0]` is \"chunked_attention\", but must be \"full_attention\" or \"sliding_attention\" or \
             \"linear_attention\"",
        ),
        (
            "gpt-oss-20b",
            json!({"sliding_window": 0}),
            "field `sliding_window` is 0, but must be a whole number from 1 to 134217728",
        ),
        (
            "gpt-oss-20b",
            json!({"num_experts_per_tok": 33}),
            "field `num_experts_per_tok` is 33, but must be at most num_local_experts (32)",
        ),
        (
            "qwen3.5-397b-a17b",
            json!({"linear_key_head_dim": null}),
            "field `linear_key_head_dim` is missing; it must be a whole number from 1 to 4096",
        ),
        (
            "glm-5",
            json!({"index_topk": null}),
            "field `index_topk` is missing; it must be a whole number from 1 to 134217728",
        ),
        (
            "glm-5",
            json!({"quantization_config": {"quant_method": "bitsandbytes"}}),
            "field `quantization_config.quant_method` is \"bitsandbytes\", which is not supported; supported is \"fp8\", \
             \"mxfp4\", \"awq\", \"gptq\", \"modelopt\" or \"compressed-tensors\"",
        ),
        (
            "kimi-k2.5",
            json!({"text_config": {"hidden_size": 1}}),
            "field `text_config.vocab_size` is missing; it must be a whole number from 1 to 16777216",
        ),
    ] {
        assert_eq!(changed(name, changes).unwrap_err(), format!("c.json: {expected}"), "{name}");
    }
}

#[test]
fn models_are_found_by_their_names_on_the_hub() {
    let hub = |name| preset_by_hub_name(name).unwrap_or_else(|e| panic!("{e}"));
    for (name, expected) in [
        ("deepseek-ai/DeepSeek-R1", "deepseek-r1"),
        ("deepseek-ai/DeepSeek-R1-0528", "deepseek-r1"),
        ("deepseek-ai/DeepSeek-V3", "deepseek-v3"),
        ("Qwen/Qwen3-235B-A22B-FP8", "qwen3-235b-a22b-fp8"),
        ("qwen/qwen3-235b-a22b-instruct-2507-fp8", "qwen3-235b-a22b-fp8"),
        ("Qwen/Qwen3-32B", "qwen3-32b"),
        ("Qwen/Qwen3.5-397B-A17B", "qwen3.5-397b-a17b"),
        ("MiniMaxAI/MiniMax-M2.5", "minimax-m2.5"),
        ("meta-llama/Llama-3.1-70B", "llama-3.1-70b"),
        ("meta-llama/Llama-3.1-8B-Instruct", "llama-3.1-8b"),
        ("meta-llama/Meta-Llama-3.1-405B", "llama-3.1-405b"),
        ("moonshotai/Kimi-K2.5", "kimi-k2.5"),
        ("moonshotai/Kimi-K2-Instruct", "kimi-k2"),
        ("openai/gpt-oss-120b", "gpt-oss-120b"),
        ("zhipuai/GLM-5", "glm-5"),
        ("mistralai/Mixtral-8x7B-Instruct-v0.1", "mixtral-8x7b"),
        ("allenai/OLMoE-1B-7B-0924", "olmoe-1b-7b"),
        ("olmoe-1b-7b", "olmoe-1b-7b"),
    ] {
        assert_eq!((hub(name).preset.name, hub(name).formats), (expected, None), "{name}");
    }
    let formats = |name| hub(name).spec().unwrap().formats();
    assert_eq!(formats("nvidia/Llama-3.1-8B-Instruct-FP8"), WeightFormats::uniform(WeightFormat::Fp8));
    assert_eq!(formats("zai-org/GLM-5-FP8"), WeightFormats::uniform(WeightFormat::Fp8Block));
    assert_eq!(formats("Qwen/Qwen3-32B-AWQ"), WeightFormats::uniform(WeightFormat::Int4));
    let nvfp4 = WeightFormats { dense: WeightFormat::Bf16, experts: WeightFormat::Nvfp4 };
    assert_eq!(formats("nvidia/DeepSeek-V3-0324-NVFP4"), nvfp4);
    let error = preset_by_hub_name("openai/gpt-os-120b").unwrap_err().to_string();
    let start = "no model is called \"openai/gpt-os-120b\"; did you mean `gpt-oss-120b`? (models: ";
    assert!(error.starts_with(start), "{error}");
}
