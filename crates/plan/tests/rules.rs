//! Golden sentences: what a plan that cannot be followed is told. One for each rule.

mod common;

use common::{cluster, huge_cluster, model, sentence, strategy};
use moesaic_plan::plan::{Balance, ExplicitLayer, InitialPlacement, Mesh, Synchronize};
use moesaic_plan::{ExpertId, LayerPlacement, Placement, Plan, PlanFile, Rank, Strategy};
use moesaic_spec::{Bytes, Ffn, Mlp, ModelSpec, preset};

/// The sentence for a strategy's plan on 16 ranks after a change.
fn changed(of: Strategy, change: impl FnOnce(&mut PlanFile)) -> String {
    let mut file = strategy(of, &model(), 16).unwrap();
    change(&mut file);
    sentence(file)
}

fn dense_model() -> ModelSpec {
    let mut model = model();
    let activation = model.layers[0].as_moe().unwrap().activation;
    model.layers.iter_mut().for_each(|ffn| *ffn = Ffn::Dense(Mlp { intermediate_size: 64, activation }));
    model
}

fn explicit(layer: usize, experts: Vec<Vec<u32>>) -> InitialPlacement {
    let experts = experts.into_iter().map(|ranks| ranks.into_iter().map(Rank).collect()).collect();
    InitialPlacement::Explicit(vec![ExplicitLayer { layer, experts }])
}

/// Expert e on rank e, but for some.
fn explicit_but(layer: usize, others: &[(usize, &[u32])]) -> InitialPlacement {
    let mut experts: Vec<Vec<u32>> = (0..16).map(|e| vec![e]).collect();
    others.iter().for_each(|(expert, ranks)| experts[*expert] = ranks.to_vec());
    explicit(layer, experts)
}

#[test]
fn world_size() {
    assert_eq!(
        changed(Strategy::Tp, |file| file.ranks = 12),
        "ranks is 12, but the mesh makes 16 (pp 1 × tp 8 × dp 2); write `ranks: 16` or change the mesh"
    );
    assert_eq!(
        changed(Strategy::Ma, |file| file.mesh.ep = 5),
        "ranks is 16, but the mesh makes 17 (pp 1 × (tp 12 × dp 1 + ep 5)); write `ranks: 17` or change the mesh"
    );
    assert_eq!(changed(Strategy::Tp, |file| file.ranks = 0), "ranks is 0, but must be 1 to 65536");
    assert_eq!(
        changed(Strategy::Tp, |file| file.ranks = usize::MAX),
        format!("ranks is {}, but must be 1 to 65536", usize::MAX)
    );
    assert_eq!(changed(Strategy::Tp, |file| file.mesh.dp = 0), "mesh.dp is 0, but must be at least 1");
    // Products beyond any word are no panic.
    assert_eq!(
        changed(Strategy::Tp, |file| file.mesh = Mesh { tp: usize::MAX, pp: 3, dp: 7, ep: 1 }),
        format!(
            "ranks is 16, but the mesh makes {} (pp 3 × tp {} × dp 7); write `ranks: {}` or change the mesh",
            usize::MAX,
            usize::MAX,
            usize::MAX
        )
    );
}

#[test]
fn cluster_size() {
    let change = |file: &mut PlanFile| {
        file.mesh.dp = 4;
        file.ranks = 32;
    };
    assert_eq!(
        changed(Strategy::Tp, change),
        "ranks is 32, but cluster a100-4x4 has 16 GPUs (4 × 4); use fewer ranks or a larger cluster"
    );
}

#[test]
fn expert_pools() {
    assert_eq!(
        changed(Strategy::Ep, |file| file.mesh.ep = 8),
        "mesh.ep is 8, but with `pool: shared` all 16 ranks of a stage (tp 1 × dp 16) hold experts; write `ep: 16`, or \
         `ep: 1` to cut every expert by tp, or `pool: separate`"
    );
    let refused = |file: PlanFile| Plan::new(file, &dense_model(), &cluster()).unwrap_err().to_string();
    assert_eq!(
        refused(strategy(Strategy::Ma, &model(), 16).unwrap()),
        "moe.pool is separate, but the model has no MoE layer; write `pool: shared`"
    );
    assert_eq!(
        refused(strategy(Strategy::Ep, &model(), 16).unwrap()),
        "mesh.ep is 16, but the model has no MoE layer; write `ep: 1`"
    );
    assert_eq!(
        strategy(Strategy::Ma, &dense_model(), 16).unwrap_err().to_string(),
        "the strategy is ma, but the model has no MoE layer; choose tp, pp or tp+pp"
    );

    let mut mixed = model();
    mixed.layers[0] = dense_model().layers[0].clone();
    let mut file = strategy(Strategy::Ma, &mixed, 4).unwrap();
    file.mesh.pp = 4;
    file.ranks = 16;
    assert_eq!(
        Plan::new(file, &mixed, &cluster()).unwrap_err().to_string(),
        "stage 0 has layers 0 to 0, none of them with experts, so its 1 expert ranks would idle; choose stage_layers such \
         that each stage has a MoE layer, or `pool: shared`"
    );
}

#[test]
fn settings_of_placed_experts_where_they_are_cut() {
    let tail = "but with `ep: 1` and `pool: shared` every expert is cut by tp;";
    assert_eq!(
        changed(Strategy::Tp, |file| file.moe.redundant_experts = 2),
        format!("moe.redundant_experts is 2, {tail} write `redundant_experts: 0`")
    );
    assert_eq!(
        changed(Strategy::Tp, |file| file.moe.placement = explicit_but(0, &[])),
        format!("moe.placement is explicit, {tail} write `placement: linear`")
    );
    assert_eq!(
        changed(Strategy::Tp, |file| file.moe.placement = InitialPlacement::Trace("t.json".to_owned())),
        format!("moe.placement is a trace, {tail} write `placement: linear`")
    );
    let balance = Balance { interval: 1, threshold: 0.1, significance: 0.1, bytes_per_step: None };
    assert_eq!(
        changed(Strategy::Tp, |file| file.balance = Some(balance)),
        format!("balance is there, {tail} leave it out, because there is nothing to move")
    );
}

#[test]
fn stages() {
    let deep = |file: &mut PlanFile| {
        file.mesh = Mesh { tp: 1, pp: 8, dp: 2, ep: 1 };
    };
    assert_eq!(changed(Strategy::Pp, deep), "mesh.pp is 8, but must be at most the number of the model's layers, 4");
    for (layers, expected) in [
        (vec![4], "stage_layers is a list of 1, but must be a list of one number for each of the pp 2 stages"),
        (vec![4, 0], "stage_layers[1] is 0, but must be at least 1"),
        (
            vec![4, 1],
            "stage_layers is a list whose sum is 5, but must be a list whose sum is the number of the model's layers, 4",
        ),
    ] {
        assert_eq!(changed(Strategy::Pp, |file| file.stage_layers = Some(layers)), expected);
    }
    let overflowing = Some(vec![usize::MAX, 5]);
    assert!(
        changed(Strategy::Pp, |file| file.stage_layers = overflowing).starts_with("stage_layers is a list whose sum")
    );
}

#[test]
fn heads() {
    let mut few = model();
    let moesaic_spec::Attention::Gqa(gqa) = &mut few.attention else { unreachable!() };
    (gqa.num_heads, gqa.num_kv_heads) = (4, 4);
    assert_eq!(
        Plan::new(strategy(Strategy::Tp, &model(), 16).unwrap(), &few, &cluster()).unwrap_err().to_string(),
        "mesh.tp is 8, but the model has 4 query heads, and each rank needs at least one; write `tp: 4` or less"
    );
    for (heads, expected) in [
        (vec![32], "attention.heads is a list of 1, but must be a list of one number for each of the tp 12 ranks"),
        (vec![4, 4, 4, 4, 4, 4, 4, 4, 0, 0, 0, 0], "attention.heads[8] is 0, but must be at least 1"),
        (
            vec![3; 12],
            "attention.heads is a list whose sum is 36, but must be a list whose sum is the number of the model's query \
             heads, 32",
        ),
    ] {
        assert_eq!(changed(Strategy::Ma, |file| file.attention.heads = Some(heads)), expected);
    }
    for (of, times, expected) in [
        (Strategy::Ma, 0, "attention.replication is 0, but must be at least 1 (held once)"),
        (
            Strategy::Ma,
            13,
            "attention.replication is 13, but must be at most tp 12, because each replica is on another rank of the group",
        ),
        (
            Strategy::Ep,
            17,
            "attention.replication is 17, but must be at most dp 16, because with tp 1 each group holds attention once",
        ),
    ] {
        assert_eq!(changed(of, |file| file.attention.replication = Some(times)), expected);
    }
}

#[test]
fn widths() {
    let model = preset("deepseek-v3").unwrap().spec().unwrap();
    let mut file = strategy(Strategy::Tp, &model, 8).unwrap();
    (file.mesh.tp, file.mesh.dp, file.ranks) = (32, 1, 32);
    assert_eq!(
        Plan::new(file.clone(), &model, &huge_cluster()).unwrap_err().to_string(),
        "mesh.tp is 32, but an expert of layer 3 is 2048 wide, 16 blocks of 128, and each rank needs at least one; write \
         `tp: 16` or less"
    );
    let refused = |change: fn(&mut ModelSpec)| {
        let mut model = model.clone();
        change(&mut model);
        Plan::new(file.clone(), &model, &huge_cluster()).unwrap_err().to_string()
    };
    let narrow_mlp = |model: &mut ModelSpec| {
        let Ffn::Dense(mlp) = &mut model.layers[1] else { unreachable!() };
        mlp.intermediate_size = 5;
        model.fp8_block = None;
    };
    assert_eq!(
        refused(narrow_mlp),
        "mesh.tp is 32, but the dense MLP of layer 1 is 5 wide, and each rank needs at least one; write `tp: 5` or less"
    );
    let narrow_shared = |model: &mut ModelSpec| {
        model.fp8_block = None;
        let Ffn::Moe(moe) = &mut model.layers[9] else { unreachable!() };
        moe.shared_intermediate_size = 7;
    };
    assert_eq!(
        refused(narrow_shared),
        "mesh.tp is 32, but the shared expert of layer 9 is 7 wide, and each rank needs at least one; write `tp: 7` or less"
    );
    let few_words = |model: &mut ModelSpec| {
        model.fp8_block = None;
        model.vocab_size = 9;
    };
    assert_eq!(
        refused(few_words),
        "mesh.tp is 32, but the vocabulary is 9 wide, and each rank needs at least one; write `tp: 9` or less"
    );
}

#[test]
fn room_for_experts() {
    let four = |file: &mut PlanFile| {
        file.moe.max_experts_per_rank = None;
    };
    assert_eq!(
        changed(Strategy::Ma, four),
        "16 experts of layer 0 on 4 ranks need max_experts_per_rank 4, but moe.max_experts_per_rank is 1; write \
         `max_experts_per_rank: 4` or give experts 16 ranks"
    );
    assert_eq!(
        changed(Strategy::Ep, |file| file.moe.redundant_experts = 4),
        "20 experts (4 redundant) of layer 0 on 16 ranks need max_experts_per_rank 2, but moe.max_experts_per_rank is 1; \
         write `max_experts_per_rank: 2` or give experts 20 ranks"
    );
    assert_eq!(
        changed(Strategy::Ma, |file| file.moe.redundant_experts = 49),
        "moe.redundant_experts is 49, but the 16 experts of layer 0 have at most 48 replicas more on 4 ranks, each on \
         another; write at most that"
    );
    assert_eq!(
        changed(Strategy::Ep, |file| file.moe.max_experts_per_rank = Some(0)),
        "moe.max_experts_per_rank is 0, but must be at least 1"
    );
}

#[test]
fn explicit_placements() {
    let placed = |placement| changed(Strategy::Ep, |file| file.moe.placement = placement);
    assert_eq!(
        placed(explicit_but(2, &[(5, &[])])),
        "expert 5 of layer 2 is nowhere; give it at least one of ranks 0–15"
    );
    assert_eq!(
        placed(explicit_but(2, &[(5, &[4])])),
        "rank 4 has 2 experts of layer 2 (4–5), but moe.max_experts_per_rank is 1; move some to another rank or write \
         `max_experts_per_rank: 2`"
    );
    assert_eq!(
        placed(explicit_but(2, &[(5, &[16])])),
        "expert 5 of layer 2 is on rank 16, but experts of that layer live on ranks 0–15"
    );
    assert_eq!(
        placed(explicit_but(2, &[(5, &[5, 5])])),
        "expert 5 of layer 2 is on rank 5 twice; a second replica needs another rank"
    );
    let replicas = |file: &mut PlanFile| {
        file.moe.placement = explicit_but(2, &[(5, &[5, 9])]);
        file.moe.max_experts_per_rank = Some(2);
    };
    assert_eq!(
        changed(Strategy::Ep, replicas),
        "the placement of layer 2 has 17 physical experts, but 16 experts with moe.redundant_experts 0 are 16; write \
         `redundant_experts: 1`"
    );
    assert_eq!(
        changed(Strategy::Ma, |file| file.moe.placement = explicit_but(0, &[])),
        "expert 0 of layer 0 is on rank 0, but experts of that layer live on ranks 12–15"
    );
}

#[test]
fn plans_for_another_model() {
    let placed = |placement| changed(Strategy::Ep, |file| file.moe.placement = placement);
    assert_eq!(
        placed(explicit_but(4, &[])),
        "the placement names layer 4, but the model has layers 0 to 3; is this a plan for another model?"
    );
    assert_eq!(
        placed(explicit(1, vec![vec![0]; 8])),
        "the placement of layer 1 has 8 experts, but the model's has 16; is this a plan for another model?"
    );
    let twice = InitialPlacement::Explicit(vec![ExplicitLayer { layer: 1, experts: vec![vec![Rank(0)]; 16] }; 2]);
    assert_eq!(placed(twice), "the placement names layer 1, but it did so before; is this a plan for another model?");
    let mut mixed = model();
    mixed.layers[1] = dense_model().layers[1].clone();
    let mut file = strategy(Strategy::Ep, &mixed, 16).unwrap();
    file.moe.placement = explicit_but(1, &[]);
    assert_eq!(
        file.fits_model(&mixed).unwrap_err().to_string(),
        "the placement names layer 1, but that layer is dense; is this a plan for another model?"
    );
}

#[test]
fn numbers() {
    for (count, expected) in
        [(0, "micro_batches is 0, but must be 1 to 4"), (5, "micro_batches is 5, but must be 1 to 4")]
    {
        assert_eq!(changed(Strategy::Ep, |file| file.micro_batches = count), expected);
    }
    let good = Balance { interval: 100, threshold: 0.05, significance: 0.01, bytes_per_step: Some(1) };
    for (balance, expected) in [
        (Balance { interval: 0, ..good }, "balance.interval is 0, but must be at least 1"),
        (Balance { threshold: -0.1, ..good }, "balance.threshold is -0.1, but must be a number from 0 to 10"),
        (Balance { threshold: f64::NAN, ..good }, "balance.threshold is NaN, but must be a number from 0 to 10"),
        (Balance { significance: 0.0, ..good }, "balance.significance is 0, but must be more than 0 and less than 1"),
        (Balance { significance: 1.0, ..good }, "balance.significance is 1, but must be more than 0 and less than 1"),
        (Balance { bytes_per_step: Some(0), ..good }, "balance.bytes_per_step is 0, but must be at least 1"),
    ] {
        assert_eq!(changed(Strategy::Ep, |file| file.balance = Some(balance)), expected);
    }
    let good = Synchronize { interval: 100, threshold: 0.05 };
    for (synchronize, expected) in [
        (Synchronize { interval: 0, ..good }, "synchronize.interval is 0, but must be at least 1"),
        (Synchronize { threshold: 1.5, ..good }, "synchronize.threshold is 1.5, but must be a number from 0 to 1"),
    ] {
        assert_eq!(changed(Strategy::Ma, |file| file.synchronize = Some(synchronize)), expected);
    }
    assert_eq!(
        changed(Strategy::Ep, |file| file.synchronize = Some(good)),
        "synchronize is there, but must be absent with `pool: shared`, because there are no two pools to keep in step"
    );
    for (change, expected) in [
        (
            (|file| file.memory.max_model_len = Some(4097)) as fn(&mut PlanFile),
            "memory.max_model_len is 4097, but must be 1 to the model's max_position_embeddings 4096",
        ),
        (|file| file.memory.max_num_seqs = Some(0), "memory.max_num_seqs is 0, but must be at least 1"),
        (
            |file| file.memory.max_num_batched_tokens = Some(0),
            "memory.max_num_batched_tokens is 0, but must be at least 1",
        ),
        (|file| file.memory.utilization = Some(0.0), "memory.utilization is 0, but must be more than 0 and at most 1"),
        (
            |file| file.memory.utilization = Some(1.1),
            "memory.utilization is 1.1, but must be more than 0 and at most 1",
        ),
    ] {
        assert_eq!(changed(Strategy::Ep, change), expected);
    }
}

#[test]
fn memory() {
    let refused = |of: Strategy, memory: Bytes, change: fn(&mut PlanFile)| {
        let mut cluster = cluster();
        cluster.gpu.memory = memory;
        let mut file = strategy(of, &model(), 16).unwrap();
        file.memory.max_model_len = Some(4096);
        change(&mut file);
        Plan::new(file, &model(), &cluster).unwrap_err().to_string()
    };
    assert_eq!(
        refused(Strategy::Pp, Bytes(8 << 30), |_| {}),
        "rank 8 needs 8.77 GiB: weights 8.63 GiB + KV cache 128.00 MiB (one sequence of 4096 tokens) + exchange 16.00 MiB, \
         but only 7.20 GiB of its 8.00 GiB may be used; its largest part is routed experts with 8.00 GiB, which more ranks \
         with experts (ep), more stages (pp) or, where experts are cut, a larger tp would make smaller"
    );
    assert_eq!(
        refused(Strategy::Pp, Bytes(8750 << 20), |file| file.memory.utilization = Some(1.0)),
        "rank 8 needs 8.77 GiB: weights 8.63 GiB + KV cache 128.00 MiB (one sequence of 4096 tokens) + exchange 16.00 MiB, \
         but only 8.54 GiB of its 8.54 GiB may be used; its largest part is routed experts with 8.00 GiB, which more ranks \
         with experts (ep), more stages (pp) or, where experts are cut, a larger tp would make smaller"
    );
    // The advice is true: the length that it names fits, one more does not.
    let text = refused(Strategy::Pp, Bytes(8900 << 20), |file| file.memory.utilization = Some(1.0));
    let (_, rest) = text.split_once("write `max_model_len: ").unwrap_or_else(|| panic!("{text}"));
    let fitting: usize = rest.split_once('`').unwrap().0.parse().unwrap();
    let fits = |len: usize| {
        let mut cluster = cluster();
        cluster.gpu.memory = Bytes(8900 << 20);
        let mut file = strategy(Strategy::Pp, &model(), 16).unwrap();
        file.memory.max_model_len = Some(len);
        file.memory.utilization = Some(1.0);
        Plan::new(file, &model(), &cluster).is_ok()
    };
    assert!(fits(fitting) && !fits(fitting + 1));
    let text = refused(Strategy::Ep, Bytes(3 << 30), |file| file.memory.max_num_batched_tokens = Some(1 << 20));
    assert!(text.ends_with("write a smaller `max_num_batched_tokens` or more micro_batches"), "{text}");
}

#[test]
fn strategies_that_cannot_be() {
    let refused = |of, ranks| strategy(of, &model(), ranks).unwrap_err().to_string();
    assert_eq!(
        refused(Strategy::Pp, 1),
        "ranks of strategy pp is 1, but must be a multiple of a number of stages from 2 to 4, the model's layers"
    );
    assert_eq!(refused(Strategy::TpPp, 3), "ranks of strategy tp+pp is 3, but must be an even number of at least 4");
    assert_eq!(
        refused(Strategy::Ma, 1),
        "ranks of strategy ma is 1, but must be at least 2, one for attention and one for experts"
    );
    assert_eq!(refused(Strategy::Tp, 0), "ranks is 0, but must be at least 1");
    let mut shallow = model();
    shallow.layers.truncate(1);
    assert_eq!(
        strategy(Strategy::TpPp, &shallow, 16).unwrap_err().to_string(),
        "the number of layers is 1, but must be at least 2, one for each pipeline stage"
    );
}

#[test]
fn placements_that_come_later_obey_the_same_rules() {
    let plan = || Plan::new(strategy(Strategy::Ep, &model(), 16).unwrap(), &model(), &cluster()).unwrap();
    let refused = |change: &dyn Fn(&mut Placement)| {
        let mut placement = plan().placement;
        change(&mut placement);
        plan().with_placement(placement).unwrap_err().to_string()
    };
    assert_eq!(
        refused(&|p| p.layers[2].as_mut().unwrap().replicas[3].clear()),
        "expert 3 of layer 2 is nowhere; give it at least one of ranks 0–15"
    );
    assert_eq!(
        refused(&|p| drop(p.layers.pop())),
        "the placement names layer 3, but the plan has layers 0 to 3; is this a plan for another model?"
    );
    assert_eq!(
        refused(&|p| p.layers[0] = None),
        "the placement names layer 0, but says nothing about its experts; is this a plan for another model?"
    );
    assert_eq!(
        refused(&|p| p.layers[0] = Some(LayerPlacement { replicas: vec![vec![Rank(0)]] })),
        "the placement of layer 0 has 1 experts, but the model's has 16; is this a plan for another model?"
    );
    // Two experts change places.
    let mut placement = plan().placement;
    placement.epoch = 7;
    placement.layers[1].as_mut().unwrap().replicas.swap(0, 9);
    let moved = plan().with_placement(placement.clone()).unwrap();
    assert_eq!(moved.placement, placement);
    assert_eq!(moved.experts_of(Rank(9))[1], [ExpertId(0)]);
    // Cut experts have no place.
    let cut = Plan::new(strategy(Strategy::Tp, &model(), 16).unwrap(), &model(), &cluster()).unwrap();
    assert_eq!(
        cut.with_placement(placement).unwrap_err().to_string(),
        "the placement names layer 0, but it has no experts to place; is this a plan for another model?"
    );
}
