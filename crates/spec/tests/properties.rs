//! Properties over descriptions that nobody wrote.

use moesaic_spec::{GenerationConfig, ModelSpec, Scale, presets};
use proptest::prelude::*;
use serde_json::{Value, json};

/// A value that a field might be given by mistake or malice.
fn odd_value() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        (0u64..5000).prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        "[a-z0-9_]{0,12}".prop_map(Value::from),
        prop::collection::vec(0u64..100, 0..4).prop_map(Value::from),
        Just(json!({})),
        Just(json!({"type": "yarn", "factor": 0.0})),
        Just(json!({"rope_type": "yarn", "original_max_position_embeddings": 1})),
        Just(json!({"quant_method": "fp8", "weight_block_size": [1, 65536]})),
    ]
}

/// The key of a preset's field, or any other.
fn key(index: usize, config: &Value) -> String {
    let keys: Vec<&String> = config.as_object().unwrap().keys().collect();
    keys[index % keys.len()].clone()
}

fn size(range: std::ops::Range<usize>) -> impl Strategy<Value = Option<usize>> {
    prop::option::of(range)
}

prop_compose! {
    fn scale()(
        layers in size(1..9), hidden in size(8..300), heads in size(1..20), experts in size(1..40),
        intermediate in size(1..200), vocab in size(1..500), top_k in size(1..5),
        max_position_embeddings in size(1..5000),
    ) -> Scale {
        Scale { layers, hidden, heads, experts, intermediate, vocab, top_k, max_position_embeddings, ..Scale::default() }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn mutated_descriptions_are_read_or_refused(
        preset in prop::sample::select(presets()),
        changes in prop::collection::vec((any::<usize>(), odd_value()), 1..4),
    ) {
        let mut config: Value = serde_json::from_str(preset.config_json).unwrap();
        for (index, value) in changes {
            let key = key(index, &config);
            config[key] = value;
        }
        match ModelSpec::from_config_json(&config.to_string(), "config.json") {
            Err(e) => {
                let sentence = e.to_string();
                prop_assert!(sentence.starts_with("config.json: ") && !sentence.contains('\n'), "{}", sentence);
                prop_assert!(sentence.len() < 700, "{}", sentence);
            }
            Ok(spec) => {
                let counts = spec.counts();
                prop_assert!(counts.params_active <= counts.params_total);
                let again = ModelSpec::from_config_json(&spec.to_config_json(), "written").unwrap();
                prop_assert_eq!(again, spec);
            }
        }
    }

    #[test]
    fn any_text_is_answered(text in ".{0,200}", bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = ModelSpec::from_config_json(&text, "config.json");
        let _ = ModelSpec::from_config_json(&String::from_utf8_lossy(&bytes), "config.json");
        let _ = GenerationConfig::from_json(&text, "generation_config.json");
    }

    #[test]
    fn cut_descriptions_are_refused(preset in prop::sample::select(presets()), cut in 0.0..1.0f64) {
        let text = preset.config_json.trim_end();
        let end = (text.len() as f64 * cut) as usize;
        prop_assert!(ModelSpec::from_config_json(&text[..end], "config.json").is_err());
    }

    #[test]
    fn generation_configs_are_read_or_refused(key in prop::sample::select(vec![
        "eos_token_id", "bos_token_id", "pad_token_id", "do_sample", "temperature", "top_p", "top_k", "min_p",
        "repetition_penalty", "max_length", "max_new_tokens",
    ]), value in odd_value()) {
        let _ = GenerationConfig::from_json(&json!({key: value}).to_string(), "generation_config.json");
    }

    #[test]
    fn scaled_models_have_the_sizes_asked_for(preset in prop::sample::select(presets()), scale in scale()) {
        let spec = preset.spec().unwrap();
        // A refusal (sizes that do not fit each other) is an answer too.
        if let Ok(scaled) = spec.scaled(&scale) {
            prop_assert_eq!(scaled.family, spec.family);
            prop_assert_eq!(scaled.layers.len(), scale.layers.unwrap_or(spec.layers.len()));
            prop_assert_eq!(scaled.hidden_size, scale.hidden.unwrap_or(spec.hidden_size));
            prop_assert_eq!(scaled.attention.num_heads(), scale.heads.unwrap_or(scaled.attention.num_heads()));
            prop_assert!(scale.heads.is_some() || spec.attention.num_heads() % scaled.attention.num_heads() == 0);
            prop_assert!(scaled.num_moe_layers() > 0);
            for moe in scaled.layers.iter().filter_map(|ffn| ffn.as_moe()) {
                prop_assert_eq!(moe.intermediate_size, scale.intermediate.unwrap_or(moe.intermediate_size));
                prop_assert!(moe.top_k <= moe.num_experts / moe.router.n_group * moe.router.topk_group);
            }
            let again = ModelSpec::from_config_json(&scaled.to_config_json(), "scaled").unwrap();
            prop_assert_eq!(again, scaled);
        }
    }
}

#[test]
fn presets_survive_writing_and_scaling_to_themselves() {
    for preset in presets() {
        let spec = preset.spec().unwrap();
        assert_eq!(ModelSpec::from_config_json(&spec.to_config_json(), preset.name).unwrap(), spec);
        if spec.planning_only.is_some() {
            continue;
        }
        let same = spec.scaled(&Scale::default()).unwrap();
        assert_eq!(same, ModelSpec { num_mtp_layers: 0, ..spec });
    }
}

#[test]
fn every_preset_shrinks_to_a_laptop() {
    for preset in presets().iter().filter(|preset| preset.spec().unwrap().planning_only.is_none()) {
        let small =
            Scale { layers: Some(2), hidden: Some(128), vocab: Some(256), experts: Some(8), ..Scale::default() };
        let spec = preset.spec().unwrap().scaled(&small).unwrap_or_else(|e| panic!("{}: {e}", preset.name));
        assert!(spec.counts().params_total < 10_000_000, "{}: {}", preset.name, spec.counts().params_total);
        assert!(spec.num_moe_layers() > 0);
    }
}

/// DeepSeek's two numbers for which layers are MoE, all combinations of them for short stacks.
#[test]
fn every_pattern_of_dense_layers_survives_writing_and_scaling() {
    let deepseek = presets().iter().find(|preset| preset.name == "deepseek-v3").unwrap();
    let mut config: Value = serde_json::from_str(deepseek.config_json).unwrap();
    for num_layers in 1..9usize {
        for (num_dense, freq) in (0..=num_layers).flat_map(|dense| (1..11usize).map(move |freq| (dense, freq))) {
            config["num_hidden_layers"] = json!(num_layers);
            config["first_k_dense_replace"] = json!(num_dense);
            config["moe_layer_freq"] = json!(freq);
            let spec = ModelSpec::from_config_json(&config.to_string(), "config.json").unwrap();
            let again = ModelSpec::from_config_json(&spec.to_config_json(), "written").unwrap();
            assert_eq!(again, spec, "{num_layers} layers, first {num_dense} dense, every {freq}");
            for layers in 1..11 {
                let scale = Scale { layers: Some(layers), hidden: Some(64), ..Scale::default() };
                assert_eq!(spec.scaled(&scale).unwrap().layers.len(), layers);
            }
        }
    }
}
