//! Counted against what the authors publish.

use moesaic_spec::{Attention, Counts, DTypeClass, FusedProj, ModelSpec, PartName, Proj, Role, preset, presets};

fn counts(name: &str) -> Counts {
    preset(name).unwrap().spec().unwrap().counts()
}

#[test]
fn published_sizes() {
    // (total, active) in billions as published. Ours count embedding and head among the active ones; DeepSeek, Qwen and
    // Moonshot round to whole or tenths of billions and do not say what they count, so those come close only.
    for (name, total, active, tolerance) in [
        ("mixtral-8x7b", 46.7, 12.9, 0.05),
        ("mixtral-8x22b", 140.6, 39.1, 0.1),
        ("qwen3-30b-a3b", 30.5, 3.3, 0.06),
        ("qwen3-235b-a22b", 235.0, 22.0, 0.5),
        ("olmoe-1b-7b", 6.9, 1.3, 0.05),
        ("deepseek-v3", 671.0, 37.0, 0.6),
    ] {
        let counts = counts(name);
        let (got_total, got_active) = (counts.params_total as f64 / 1e9, counts.params_active as f64 / 1e9);
        assert!((got_total - total).abs() <= tolerance, "{name}: {got_total} B in all, published {total}");
        assert!((got_active - active).abs() <= tolerance, "{name}: {got_active} B active, published {active}");
    }
    let kimi = counts("kimi-k2");
    assert!((kimi.params_total as f64 / 1e12 - 1.04).abs() < 0.015, "{}", kimi.params_total);
    let without_embedding = kimi.params_active as f64 / 1e9 - kimi.parts[0].params as f64 / 1e9;
    assert!((without_embedding - 32.0).abs() < 0.6, "{without_embedding}");
}

#[test]
fn mixtral_to_the_last_parameter() {
    // The sum of the sizes in the published checkpoint's index is 93,405,585,408 bytes of BF16.
    let counts = counts("mixtral-8x7b");
    assert_eq!(counts.params_total, 46_702_792_704);
    assert_eq!(counts.bytes_total, 93_405_585_408);
    assert_eq!(counts.kv.bytes_per_token, 131_072);
}

#[test]
fn latent_cache() {
    let counts = counts("deepseek-v3");
    assert_eq!(counts.kv.values_per_token_layer, 576);
    assert_eq!(counts.kv.bytes_per_token, 61 * 576 * 2);
    assert_eq!(counts.flops.attention_per_context_token, 2.0 * 61.0 * 128.0 * 320.0);
    assert_eq!(counts.flops.attention_per_context_token_absorbed, 2.0 * 61.0 * 128.0 * 1088.0);
}

#[test]
fn flops_are_two_per_active_parameter_and_grow_with_the_context() {
    let counts = counts("mixtral-8x7b");
    let norms = counts.parts.iter().find(|part| part.name == PartName::Norm).unwrap().params;
    let embedding = counts.parts.iter().find(|part| part.name == PartName::Embedding).unwrap().params;
    assert_eq!(counts.flops.linear, 2.0 * (counts.params_active - norms - embedding) as f64);
    assert_eq!(counts.flops.prefill(1000) - counts.flops.linear, 32.0 * 1000.0 * 4.0 * 4096.0);
    assert_eq!(counts.flops.prefill(7), counts.flops.decode(7));
}

#[test]
fn a_window_bounds_the_context() {
    let mut spec = preset("mixtral-8x7b").unwrap().spec().unwrap();
    let Attention::Gqa(gqa) = &mut spec.attention else { panic!("GQA") };
    gqa.sliding_window = Some(100);
    let flops = spec.counts().flops;
    assert_eq!(flops.decode(100), flops.decode(100_000));
    assert!(flops.decode(99) < flops.decode(100));
}

#[test]
fn an_expert_of_paper_002_is_as_large_as_the_paper_says() {
    let spec = preset("paper-002").unwrap().spec().unwrap();
    let expert: u64 = spec
        .tensors()
        .iter()
        .filter(|t| matches!(t.role, Role::Expert { layer: 3, expert: 0, .. }))
        .map(|t| t.num_elements() * spec.dtype_of(t.dtype_class).size_bytes() as u64)
        .sum();
    assert_eq!(expert, 58_720_256);
}

/// The largest descriptions that are read: nothing overflows, and the list of tensors stays a list.
#[test]
fn limits_keep_counts_within_64_bits() {
    let mut config: serde_json::Value = serde_json::from_str(preset("deepseek-v3").unwrap().config_json).unwrap();
    for (key, size) in [
        ("vocab_size", 1 << 24),
        ("hidden_size", 1 << 18),
        ("num_hidden_layers", 1024),
        ("first_k_dense_replace", 0),
        ("num_attention_heads", 4096),
        ("q_lora_rank", 1 << 18),
        ("kv_lora_rank", 1 << 18),
        ("qk_nope_head_dim", 4096),
        ("qk_rope_head_dim", 4096),
        ("v_head_dim", 4096),
        ("n_routed_experts", 128),
        ("moe_intermediate_size", 1 << 20),
        ("max_position_embeddings", 1 << 27),
    ] {
        config[key] = size.into();
    }
    let spec = ModelSpec::from_config_json(&config.to_string(), "config.json").unwrap();
    let counts = spec.counts();
    assert!(counts.params_total > 1 << 56 && counts.bytes_total > counts.params_total);
    assert!(counts.flops.prefill(1 << 27).is_finite());
}

#[test]
fn parts_add_up_and_agree_with_the_tensors() {
    for preset in presets() {
        let spec = preset.spec().unwrap();
        let counts = spec.counts();
        let tensors = spec.tensors();
        // A model that is only planned may have parameters that the shape we know has not.
        if spec.planning_only.is_none() {
            assert_eq!(tensors.iter().map(|t| t.num_elements()).sum::<u64>(), counts.params_total, "{}", preset.name);
        }
        assert_eq!(counts.parts.iter().map(|part| part.bytes).sum::<u64>(), counts.bytes_total);
        assert_eq!(counts.params_active < counts.params_total, spec.num_moe_layers() > 0);
        let json = serde_json::to_value(&counts).unwrap();
        assert_eq!(json["parts"][0]["name"], "embedding");
    }
}

#[test]
fn names_are_unique_and_follow_from_roles() {
    for preset in presets() {
        let spec = preset.spec().unwrap();
        let mut names = std::collections::HashSet::new();
        for tensor in spec.tensors() {
            assert_eq!(spec.name_of(tensor.role), tensor.name);
            assert!(!spec.is_ignorable(&tensor.name), "{}", tensor.name);
            if let Some(scale) = &tensor.scale {
                assert!(names.insert(scale.name.clone()), "{} twice", scale.name);
            }
            assert!(names.insert(tensor.name.clone()), "{} twice", tensor.name);
        }
    }
}

#[test]
fn mixtral_names_in_both_spellings() {
    let spec = preset("mixtral-8x7b").unwrap().spec().unwrap();
    let w3 = Role::Expert { layer: 1, expert: 7, proj: Proj::Up };
    assert_eq!(spec.name_of(w3), "model.layers.1.block_sparse_moe.experts.7.w3.weight");
    assert_eq!(spec.name_of(Role::Router(1)), "model.layers.1.block_sparse_moe.gate.weight");
    assert_eq!(spec.alias_of(Role::Router(1)).unwrap(), "model.layers.1.mlp.gate.weight");
    assert_eq!(spec.fused_expert_name(1, FusedProj::GateUp), "model.layers.1.mlp.experts.gate_up_proj");
    assert_eq!(spec.fused_expert_shape(1, FusedProj::GateUp), Some([8, 28672, 4096]));
    assert_eq!(spec.fused_expert_shape(1, FusedProj::Down), Some([8, 4096, 14336]));
    assert_eq!(spec.fused_expert_shape(32, FusedProj::Down), None);
}

#[test]
fn fp8_scales_cover_ragged_blocks_and_spare_router_and_head() {
    let spec = preset("deepseek-v3").unwrap().spec().unwrap();
    let tensors = spec.tensors();
    let of = |role| tensors.iter().find(|t| t.role == role).unwrap();
    let kv_a = of(Role::KvA(0));
    assert_eq!(kv_a.shape, [576, 7168]);
    let scale = kv_a.scale.as_ref().unwrap();
    assert_eq!(scale.name, "model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv");
    assert_eq!(scale.shape, [5, 56]);
    for role in [Role::Embed, Role::LmHead, Role::Router(3), Role::RouterBias(3), Role::KvANorm(0)] {
        assert_eq!(of(role).scale, None);
    }
    assert_eq!(spec.dtype_of(DTypeClass::Plain).to_string(), "BF16");
    assert_eq!(spec.dtype_of(of(Role::RouterBias(3)).dtype_class).to_string(), "F32");
}

#[test]
fn what_may_be_skipped() {
    let spec: ModelSpec = preset("deepseek-v3").unwrap().spec().unwrap();
    assert!(spec.is_ignorable("model.layers.61.eh_proj.weight"));
    assert!(spec.is_ignorable("model.layers.61.mlp.experts.0.up_proj.weight_scale_inv"));
    assert!(spec.is_ignorable("model.layers.4.self_attn.rotary_emb.inv_freq"));
    for name in ["model.layers.60.eh_proj.weight", "model.layers.62.x", "model.layers.+61.x", "lm_head.bias", ""] {
        assert!(!spec.is_ignorable(name), "{name}");
    }
    let tied = ModelSpec { tie_word_embeddings: true, ..spec };
    assert!(tied.is_ignorable("lm_head.weight"));
    assert!(tied.tensors().iter().all(|t| t.role != Role::LmHead));
}
