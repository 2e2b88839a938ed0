//! What a description means, in the forms of transformers 4 and 5.

use moesaic_spec::{Activation, Attention, DType, DropPolicy, Ffn, ModelSpec, QkNorm, RopeScaling, Scoring, preset};
use serde_json::{Value, json};

fn changed(name: &str, changes: Value) -> ModelSpec {
    let mut config: Value = serde_json::from_str(preset(name).unwrap().config_json).unwrap();
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    ModelSpec::from_config_json(&config.to_string(), "config.json").unwrap()
}

#[test]
fn deepseek_v3() {
    let spec = preset("deepseek-v3").unwrap().spec().unwrap();
    let Attention::Mla(mla) = &spec.attention else { panic!("MLA") };
    assert_eq!((mla.q_lora_rank, mla.kv_lora_rank, mla.qk_head_dim(), mla.v_head_dim), (Some(1536), 512, 192, 128));
    assert_eq!(spec.attention.kv_values_per_token(), 576);
    assert!(spec.rope.interleaved);
    assert_eq!((spec.dtype, spec.fp8_block, spec.num_mtp_layers), (DType::F8E4M3, Some([128, 128]), 1));
    assert_eq!(spec.layers.iter().take_while(|ffn| matches!(ffn, Ffn::Dense(_))).count(), 3);
    let moe = spec.layers[3].as_moe().unwrap();
    assert_eq!((moe.num_experts, moe.top_k, moe.shared_intermediate_size), (256, 8, 2048));
    assert_eq!((moe.router.scoring, moe.router.correction_bias), (Scoring::Sigmoid, true));
    assert_eq!((moe.router.n_group, moe.router.topk_group, moe.router.routed_scaling_factor), (8, 4, 2.5));
    // mscale and mscale_all_dim are equal, so cos and sin stay, and the softmax scale takes the temperature squared.
    assert_eq!(spec.rope.cos_sin_factor(), 1.0);
    let temperature = 0.1 * 40f64.ln() + 1.0;
    assert!((spec.softmax_scale() - temperature * temperature / 192f64.sqrt()).abs() < 1e-15);
}

#[test]
fn transformers_5_spells_rope_and_dtype_differently() {
    let old = preset("qwen3-30b-a3b").unwrap().spec().unwrap();
    let mut config: Value = serde_json::from_str(preset("qwen3-30b-a3b").unwrap().config_json).unwrap();
    let map = config.as_object_mut().unwrap();
    for key in ["rope_theta", "rope_scaling", "torch_dtype", "num_experts"] {
        map.remove(key);
    }
    map.insert("rope_parameters".into(), json!({"rope_type": "default", "rope_theta": 1000000.0}));
    map.insert("dtype".into(), json!("bfloat16"));
    map.insert("num_local_experts".into(), json!(128));
    assert_eq!(ModelSpec::from_config_json(&config.to_string(), "config.json").unwrap(), old);
}

#[test]
fn yarn_with_and_without_its_options() {
    let spec = changed(
        "qwen3-30b-a3b",
        json!({"rope_scaling": {"rope_type": "yarn", "factor": 4.0,
        "original_max_position_embeddings": 32768}}),
    );
    assert_eq!(
        spec.rope.scaling,
        RopeScaling::Yarn {
            factor: 4.0,
            original_max_position_embeddings: 32768,
            beta_fast: 32.0,
            beta_slow: 1.0,
            mscale: 0.0,
            mscale_all_dim: 0.0,
            attention_factor: None,
            truncate: true,
        }
    );
    assert_eq!(spec.rope.cos_sin_factor(), 0.1 * 4f64.ln() + 1.0);
    assert_eq!(spec.softmax_scale(), 128f64.powf(-0.5));
    // Without the original context it is the model's own, and without a factor it is their ratio.
    let spec = changed(
        "qwen3-30b-a3b",
        json!({"rope_scaling": {"type": "yarn",
        "original_max_position_embeddings": 10240, "attention_factor": 1.5, "truncate": false}}),
    );
    let RopeScaling::Yarn { factor, truncate, .. } = spec.rope.scaling else { panic!("YaRN") };
    assert_eq!((factor, truncate, spec.rope.cos_sin_factor()), (4.0, false, 1.5));
}

#[test]
fn the_theta_inside_wins() {
    let spec = changed("olmoe-1b-7b", json!({"rope_theta": 5.0, "rope_parameters": {"rope_theta": 7.0}}));
    assert_eq!(spec.rope.theta, 7.0);
    let linear = json!({"type": "linear", "factor": 2.0});
    let spec = changed("olmoe-1b-7b", json!({"rope_theta": 5.0, "rope_scaling": linear}));
    assert_eq!((spec.rope.theta, spec.rope.scaling), (5.0, RopeScaling::Linear { factor: 2.0 }));
}

#[test]
fn qwen3_mixes_dense_and_moe() {
    let spec =
        changed("qwen3-30b-a3b", json!({"num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]}));
    let moe: Vec<usize> = (0..6).filter(|&l| spec.layers[l].as_moe().is_some()).collect();
    assert_eq!(moe, [1, 5]);
    assert_eq!(spec.layers[0].as_dense().unwrap().intermediate_size, 6144);
    let spec = changed("qwen3-30b-a3b", json!({"num_experts": 0}));
    assert_eq!(spec.num_moe_layers(), 0);
}

#[test]
fn sliding_windows_where_they_count() {
    let window = |spec: ModelSpec| match spec.attention {
        Attention::Gqa(gqa) => gqa.sliding_window,
        Attention::Mla(_) => panic!("GQA"),
    };
    assert_eq!(window(changed("mixtral-8x7b", json!({"sliding_window": 4096}))), Some(4096));
    assert_eq!(window(changed("qwen3-30b-a3b", json!({"sliding_window": 64}))), None);
    assert_eq!(window(changed("qwen3-30b-a3b", json!({"sliding_window": 64, "use_sliding_window": true}))), Some(64));
}

#[test]
fn olmoe_norms_and_clips() {
    let spec = changed("olmoe-1b-7b", json!({"clip_qkv": 8.0, "num_key_value_heads": null}));
    let Attention::Gqa(gqa) = &spec.attention else { panic!("GQA") };
    assert_eq!((gqa.qk_norm, gqa.clip_qkv, gqa.num_kv_heads), (QkNorm::FullWidth, Some(8.0), 16));
    assert!(!spec.layers[0].as_moe().unwrap().router.norm_topk_prob);
}

#[test]
fn deepseek_without_low_rank_queries_or_groups() {
    let spec =
        changed("deepseek-v3", json!({"q_lora_rank": null, "n_shared_experts": null, "n_group": 1, "topk_group": 1}));
    let Attention::Mla(mla) = &spec.attention else { panic!("MLA") };
    assert_eq!(mla.q_lora_rank, None);
    assert_eq!(spec.layers[60].as_moe().unwrap().shared_intermediate_size, 0);
    let spec = changed("deepseek-v3", json!({"num_hidden_layers": 9, "moe_layer_freq": 2, "first_k_dense_replace": 3}));
    let moe: Vec<usize> = (0..9).filter(|&l| spec.layers[l].as_moe().is_some()).collect();
    assert_eq!(moe, [4, 6, 8]);
}

#[test]
fn papers_say_the_non_linearity_of_experts_and_dense_layers_apart() {
    let spec = preset("paper-002").unwrap().spec().unwrap();
    assert_eq!(spec.layers[0].as_dense().unwrap().activation, Activation::Gelu);
    assert_eq!(spec.layers[3].as_moe().unwrap().activation, Activation::Gelu);
    let spec = changed("paper-002", json!({"dense_type": null}));
    assert_eq!(spec.layers[0].as_dense().unwrap().activation, Activation::SwiGlu);
    let spec = changed("paper-003-swiglu", json!({"drop_policy": "position"}));
    let capacity = spec.layers[0].as_moe().unwrap().capacity.unwrap();
    assert_eq!((capacity.factor, capacity.policy), (1.0, DropPolicy::Position));
}
