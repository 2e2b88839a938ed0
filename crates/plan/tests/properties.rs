//! Properties of plans that nobody wrote.

mod common;

use std::ops::Range;

use common::{huge_cluster, model};
use moesaic_plan::plan::{
    AttentionPlan, Balance, Exchange, ExchangePrecision, ExchangeRoute, ExplicitLayer, InitialPlacement, Interval,
    MemoryPlan, Mesh, MoePlan, Overlap, Pool, Prediction, Synchronize,
};
use moesaic_plan::{AllReduce, ExpertShard, Plan, PlanFile, Rank, explain};
use moesaic_spec::{Ffn, ModelSpec, Scale, preset};
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;

/// Any plan file, legal or not.
fn any_file() -> impl Strategy<Value = PlanFile> {
    let size = || prop_oneof![4 => 0usize..6, 1 => 0usize..=1 << 30];
    let text = || any::<String>();
    let mesh = (size(), size(), size(), size()).prop_map(|(tp, pp, dp, ep)| Mesh { tp, pp, dp, ep });
    let attention = (option::of(vec(size(), 0..4)), option::of(size()))
        .prop_map(|(heads, replication)| AttentionPlan { heads, replication });
    let layer = (size(), vec(vec(any::<u32>().prop_map(Rank), 0..3), 0..4))
        .prop_map(|(layer, experts)| ExplicitLayer { layer, experts });
    let placement = prop_oneof![
        Just(InitialPlacement::Linear),
        text().prop_map(InitialPlacement::Trace),
        vec(layer, 0..3).prop_map(InitialPlacement::Explicit),
    ];
    let pool = prop_oneof![Just(Pool::Shared), Just(Pool::Separate)];
    let moe = (pool, option::of(size()), size(), placement).prop_map(|(pool, max, redundant_experts, placement)| {
        MoePlan { pool, max_experts_per_rank: max, redundant_experts, placement }
    });
    let overlap = prop_oneof![Just(Overlap::None), Just(Overlap::MicroBatches), Just(Overlap::Arrivals)];
    let precision =
        prop_oneof![Just(ExchangePrecision::Full), Just(ExchangePrecision::Int8), Just(ExchangePrecision::Fp8)];
    let route = prop_oneof![Just(ExchangeRoute::Direct), Just(ExchangeRoute::TwoLevel)];
    let exchange = (precision, route).prop_map(|(precision, route)| Exchange { precision, route });
    let all_reduce = option::of(prop_oneof![Just(AllReduce::Flat), Just(AllReduce::Hierarchical)]);
    let number = || prop::num::f64::NORMAL | prop::num::f64::ZERO | prop::num::f64::SUBNORMAL;
    let balance = (0u64..1 << 30, number(), number(), option::of(any::<u64>())).prop_map(
        |(interval, threshold, significance, bytes_per_step)| Balance {
            interval,
            threshold,
            significance,
            bytes_per_step,
        },
    );
    let synchronize = (0u64..1 << 30, number()).prop_map(|(interval, threshold)| Synchronize { interval, threshold });
    let memory = (option::of(size()), option::of(size()), option::of(size()), option::of(number())).prop_map(
        |(max_model_len, max_num_seqs, max_num_batched_tokens, utilization)| MemoryPlan {
            max_model_len,
            max_num_seqs,
            max_num_batched_tokens,
            utilization,
        },
    );
    let names = (text(), text(), text(), text());
    let spread = (size(), mesh, option::of(vec(size(), 0..4)), attention, moe);
    let step = (size(), overlap, exchange, all_reduce);
    let figure = || 0.0..1e9f64;
    let interval = || (figure(), figure(), figure()).prop_map(|(value, low, high)| Interval { value, low, high });
    let prediction = (figure(), interval(), interval(), interval(), figure(), vec(text(), 0..3)).prop_map(
        |(concurrency, ttft_ms, tpot_ms, tokens_per_s, memory_gib, assumptions)| Prediction {
            concurrency,
            ttft_ms,
            tpot_ms,
            tokens_per_s,
            memory_gib,
            assumptions,
        },
    );
    let rest = (option::of(balance), option::of(synchronize), memory, option::of(prediction));
    (names, spread, step, rest).prop_map(|(names, spread, step, rest)| PlanFile {
        version: 1,
        name: names.0,
        model: names.1,
        cluster: names.2,
        workload: names.3,
        ranks: spread.0,
        mesh: spread.1,
        stage_layers: spread.2,
        attention: spread.3,
        moe: spread.4,
        micro_batches: step.0,
        overlap: step.1,
        exchange: step.2,
        all_reduce: step.3,
        balance: rest.0,
        synchronize: rest.1,
        memory: rest.2,
        prediction: rest.3,
    })
}

/// A small model of a family, the heads and widths odd, with or without dense layers before the experts.
fn small_model() -> impl Strategy<Value = ModelSpec> {
    let name = prop::sample::select(vec!["paper-003-gelu", "deepseek-v3", "olmoe-1b-7b", "qwen3-30b-a3b", "paper-002"]);
    (name, 4usize..8, 1usize..14, 2usize..24, 8usize..200).prop_filter_map("sizes that do not fit", |sizes| {
        let (name, layers, heads, experts, intermediate) = sizes;
        let scale = Scale {
            layers: Some(layers),
            hidden: Some(heads * 16),
            heads: Some(heads),
            experts: Some(experts),
            intermediate: Some(intermediate),
            vocab: Some(97),
            ..Scale::default()
        };
        preset(name).unwrap().spec().unwrap().scaled(&scale).ok()
    })
}

/// `total` as a sum of so many numbers, none 0.
fn composition(total: usize, parts: usize, cuts: &[prop::sample::Index]) -> Vec<usize> {
    let mut sizes = vec![1; parts];
    for cut in cuts.iter().cycle().take(total - parts) {
        sizes[cut.index(parts)] += 1;
    }
    sizes
}

prop_compose! {
    /// A legal plan file for a model.
    fn legal()(model in small_model())(
        tp in 1..=model.attention.num_heads(),
        pp in 1..=model.layers.len(),
        dp in 1usize..5,
        ep in 1usize..9,
        kind in 0usize..3,
        cuts in vec(any::<prop::sample::Index>(), 1..5),
        given in any::<(bool, bool)>(),
        redundant in 0usize..9,
        times in 1usize..5,
        micro_batches in 1usize..5,
        exchange in (0usize..3, any::<bool>()),
        model in Just(model),
    ) -> (PlanFile, ModelSpec) {
        let (num_layers, num_heads) = (model.layers.len(), model.attention.num_heads());
        let experts = model.layers.iter().filter_map(Ffn::as_moe).map(|moe| moe.num_experts).max().unwrap();
        let (pool, ep) = [(Pool::Shared, 1), (Pool::Shared, tp * dp), (Pool::Separate, ep)][kind];
        // Dense layers come first: stages of a separate pool each need a MoE layer.
        let dense = num_layers - model.num_moe_layers();
        let pp = if pool == Pool::Separate { pp.min(num_layers - dense) } else { pp };
        let mut stage_layers = composition(num_layers - dense * usize::from(pool == Pool::Separate), pp, &cuts);
        if pool == Pool::Separate {
            stage_layers[0] += dense;
        }
        let explicit_stages = given.0 || pool == Pool::Separate;
        let placed = ep > 1 || pool == Pool::Separate;
        let redundant = if placed { redundant.min(experts * (ep - 1)) } else { 0 };
        let stage_ranks = tp * dp + if pool == Pool::Separate { ep } else { 0 };
        let file = PlanFile {
            ranks: pp * stage_ranks,
            mesh: Mesh { tp, pp, dp, ep },
            stage_layers: explicit_stages.then_some(stage_layers),
            attention: AttentionPlan {
                heads: given.1.then(|| composition(num_heads, tp, &cuts)),
                replication: Some(times.min(if tp > 1 { tp } else { dp })),
            },
            moe: MoePlan {
                pool,
                max_experts_per_rank: placed.then(|| (experts + redundant).div_ceil(ep)),
                redundant_experts: redundant,
                placement: InitialPlacement::Linear,
            },
            micro_batches,
            exchange: Exchange {
                precision: [ExchangePrecision::Full, ExchangePrecision::Int8, ExchangePrecision::Fp8][exchange.0],
                route: if exchange.1 { ExchangeRoute::Direct } else { ExchangeRoute::TwoLevel },
            },
            ..Plan::single(&model).file
        };
        (file, model)
    }
}

/// Whether ranges cover `0 .. n` once, in order.
fn covers(ranges: impl IntoIterator<Item = Range<usize>>, n: usize) -> bool {
    let end = ranges.into_iter().try_fold(0, |end, range| (range.start == end && range.end > end).then_some(range.end));
    end == Some(n)
}

/// Cut experts may be too narrow for `tp`; that is a rule, not a property.
fn narrow(file: &PlanFile, model: &ModelSpec) -> bool {
    let unit = moesaic_plan::cut_unit(model);
    let widths = model.layers.iter().flat_map(|ffn| match ffn {
        Ffn::Dense(mlp) => vec![mlp.intermediate_size],
        Ffn::Moe(moe) if !file.places_experts() => vec![moe.intermediate_size, moe.shared_intermediate_size],
        Ffn::Moe(_) => Vec::new(),
    });
    widths.filter(|&width| width > 0).any(|width| width.div_ceil(unit) < file.mesh.tp)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn files_survive_writing(file in any_file()) {
        let text = file.to_yaml();
        prop_assert_eq!(PlanFile::from_yaml(&text, "written").unwrap(), file, "{}", text);
    }

    /// A plan file that nobody would write is refused in one sentence, or can be followed.
    #[test]
    fn any_file_is_answered(file in any_file()) {
        match Plan::new(file, &model(), &huge_cluster()) {
            Ok(plan) => prop_assert!(!explain(&plan, &model()).is_empty()),
            Err(e) => prop_assert!(!e.to_string().contains('\n')),
        }
    }

    #[test]
    fn any_text_is_answered(text in ".{0,300}", line in any::<prop::sample::Index>(), value in "[ -~]{0,20}") {
        let _ = PlanFile::from_yaml(&text, "p.yaml");
        let good = Plan::single(&model()).file.to_yaml();
        let mut lines: Vec<&str> = good.lines().collect();
        *line.get_mut(&mut lines) = &value;
        if let Err(e) = PlanFile::from_yaml(&lines.join("\n"), "p.yaml") {
            prop_assert!(e.to_string().starts_with("p.yaml: ") && !e.to_string().contains('\n'), "{}", e);
        }
    }

    /// A legal plan has every head once in each group, every layer once, every expert somewhere, and all of the widths.
    #[test]
    fn a_legal_plan_has_all_of_the_model((file, model) in legal()) {
        prop_assume!(!narrow(&file, &model));
        let plan = Plan::new(file.clone(), &model, &huge_cluster()).unwrap();
        prop_assert_eq!(plan.world_size(), file.ranks);
        for (rank, shard) in plan.shards.iter().enumerate() {
            prop_assert_eq!(shard.rank.idx(), rank);
            prop_assert_eq!(&shard.layers, &plan.stages[shard.stage].layers);
        }
        prop_assert!(covers(plan.stages.iter().map(|stage| stage.layers.clone()), model.layers.len()));
        let unit = moesaic_plan::cut_unit(&model);
        let mut seen = vec![0; plan.world_size()];
        for (idx, stage) in plan.stages.iter().enumerate() {
            for (group, ranks) in stage.groups.iter().enumerate() {
                let shards: Vec<_> = ranks.iter().map(|rank| plan.shards[rank.idx()].attention.as_ref().unwrap()).collect();
                prop_assert!(shards.iter().all(|shard| shard.group == group));
                prop_assert!(shards.iter().all(|s| s.embeds == (idx == 0) && s.has_head == (idx + 1 == plan.stages.len())));
                prop_assert!(covers(shards.iter().map(|shard| shard.heads.clone()), model.attention.num_heads()));
                prop_assert!(covers(shards.iter().map(|shard| shard.tp.range(model.vocab_size, 1)), model.vocab_size));
                for ffn in &model.layers[stage.layers.clone()] {
                    let width = match ffn {
                        Ffn::Dense(mlp) => mlp.intermediate_size,
                        Ffn::Moe(moe) if stage.expert_ranks.is_empty() => moe.intermediate_size,
                        Ffn::Moe(_) => continue,
                    };
                    prop_assert!(covers(shards.iter().map(|shard| shard.tp.range(width, unit)), width));
                }
                // Each head is held as often as was asked for.
                let times = if file.mesh.tp > 1 { file.attention.replication.unwrap() } else { 1 };
                for head in 0..model.attention.num_heads() {
                    let held = |s: &&&moesaic_plan::AttentionShard| {
                        s.heads.contains(&head) || s.backup_heads.iter().any(|heads| heads.contains(&head))
                    };
                    prop_assert_eq!(shards.iter().filter(held).count(), times);
                }
            }
            let mut ranks = stage.groups.concat();
            ranks.extend(&stage.expert_ranks);
            ranks.sort_unstable();
            ranks.dedup();
            ranks.iter().for_each(|rank| seen[rank.idx()] += 1);
        }
        prop_assert!(seen.iter().all(|&times| times == 1));
        for (layer, placed) in plan.placement.layers.iter().enumerate() {
            let moe = model.layers[layer].as_moe();
            prop_assert_eq!(placed.is_some(), file.places_experts() && moe.is_some());
            let (Some(placed), Some(moe)) = (placed, moe) else { continue };
            prop_assert_eq!(placed.replicas.len(), moe.num_experts);
            let homes = &plan.stage_of(layer).expert_ranks;
            for ranks in &placed.replicas {
                prop_assert!(!ranks.is_empty() && ranks.is_sorted_by(|a, b| a < b));
                prop_assert!(ranks.iter().all(|rank| homes.contains(rank)));
                prop_assert!(ranks.iter().all(|rank| plan.shards[rank.idx()].experts == ExpertShard::Placed));
            }
            let physical: usize = placed.replicas.iter().map(Vec::len).sum();
            prop_assert_eq!(physical, moe.num_experts + file.moe.redundant_experts);
            let counts = homes.iter().map(|&rank| placed.experts_of(rank).len());
            prop_assert!(counts.max().unwrap() <= physical.div_ceil(homes.len()));
        }
        prop_assert!(plan.check_placement(&plan.placement).is_ok());
        prop_assert!(!explain(&plan, &model).is_empty());
    }

    /// Nothing of the model is lost or held twice without reason: over the ranks of one group of each stage, and the experts,
    /// the weights are the model's, plus what is whole everywhere.
    #[test]
    fn memory_adds_up((file, model) in legal()) {
        prop_assume!(!narrow(&file, &model));
        let one_group = PlanFile {
            mesh: Mesh { dp: 1, ep: if file.moe.pool == Pool::Separate { file.mesh.ep } else { 1 }, ..file.mesh },
            ranks: file.mesh.pp * (file.mesh.tp + if file.moe.pool == Pool::Separate { file.mesh.ep } else { 0 }),
            attention: AttentionPlan { replication: None, ..file.attention.clone() },
            moe: MoePlan { redundant_experts: 0, ..file.moe.clone() },
            ..file
        };
        prop_assume!(!narrow(&one_group, &model));
        let plan = Plan::new(one_group, &model, &huge_cluster()).unwrap();
        let whole = Plan::single(&model).rank_memory(&model)[0];
        prop_assert_eq!(whole.weights(), model.counts().bytes_total);
        prop_assert_eq!(whole.kv_bytes_per_token, model.counts().kv.bytes_per_token);
        let memory = plan.rank_memory(&model);
        let sum = |part: fn(&moesaic_plan::RankMemory) -> u64| memory.iter().map(part).sum::<u64>();
        prop_assert_eq!(sum(|m| m.dense_mlp), whole.dense_mlp);
        prop_assert_eq!(sum(|m| m.routed_experts), whole.routed_experts);
        prop_assert_eq!(sum(|m| m.router), whole.router * plan.file.mesh.tp as u64);
        prop_assert!(sum(|m| m.attention) >= whole.attention);
        prop_assert_eq!(sum(|m| m.backup_attention), 0);
    }

    /// Replicas of an expert are in different nodes as long as there are nodes without it that have room.
    #[test]
    fn replicas_go_to_other_nodes(redundant in 1usize..=16) {
        let mut file = common::strategy(moesaic_plan::Strategy::Ep, &model(), 16).unwrap();
        file.moe.redundant_experts = redundant;
        file.moe.max_experts_per_rank = Some(2);
        let plan = Plan::new(file, &model(), &common::cluster()).unwrap();
        let replicas = &plan.placement.layers[0].as_ref().unwrap().replicas;
        let replicated: Vec<_> = replicas.iter().filter(|ranks| ranks.len() > 1).collect();
        prop_assert_eq!(replicated.len(), redundant);
        for ranks in replicated {
            prop_assert_eq!(ranks.len(), 2);
            prop_assert!(plan.node_of[ranks[0].idx()] != plan.node_of[ranks[1].idx()], "{:?}", ranks);
        }
    }
}
