//! The papers' deployments, and the strategies that are compared.

mod common;

use common::{cluster, huge_cluster, model, strategy};
use moesaic_plan::plan::Pool;
use moesaic_plan::{MessageKind, Plan, PlanFile, Rank, Strategy, explain};
use moesaic_spec::{ModelSpec, Scale, cluster_preset, preset, workload_preset};

fn spec(name: &str) -> ModelSpec {
    preset(name).unwrap().spec().unwrap()
}

fn read(name: &str) -> PlanFile {
    let path = format!("{}/../../specs/plans/{name}.yaml", env!("CARGO_MANIFEST_DIR"));
    let file = PlanFile::from_yaml(&std::fs::read_to_string(&path).unwrap(), &path).unwrap();
    assert!(workload_preset(&file.workload).is_ok(), "{path}");
    file
}

/// On the cluster that the file names.
fn plan(name: &str, model: &ModelSpec) -> Plan {
    let file = read(name);
    let cluster = cluster_preset(&file.cluster).unwrap();
    Plan::new(file, model, &cluster).unwrap_or_else(|e| panic!("{name}: {e}"))
}

fn total<'a>(plan: &Plan, model: &ModelSpec, kinds: impl IntoIterator<Item = &'a MessageKind>) -> f64 {
    let traffic = plan.expected_traffic(model);
    let of = |kind: &MessageKind| {
        traffic.iter().filter(|t| t.kind == *kind).map(|t| t.intra_bytes + t.inter_bytes).sum::<f64>()
    };
    kinds.into_iter().map(of).sum()
}

#[test]
fn ma_separation_is_as_the_paper_says() {
    let model = model();
    let plan = plan("paper-003-ma", &model);
    let heads: Vec<usize> = plan.shards[..12].iter().map(|s| s.attention.as_ref().unwrap().heads.len()).collect();
    assert_eq!(heads, [3, 3, 3, 3, 3, 3, 3, 3, 2, 2, 2, 2]);
    let heads_of = |rank: usize| plan.shards[rank].attention.as_ref().unwrap().heads.clone();
    assert_eq!((heads_of(0), heads_of(11)), (0..3, 30..32));
    let backups = |rank: usize| plan.shards[rank].attention.as_ref().unwrap().backup_heads.clone();
    assert_eq!((backups(1), backups(0)), (vec![heads_of(0)], vec![heads_of(11)]));
    let experts = |rank| plan.experts_of(Rank(rank))[2].iter().map(|e| e.0).collect::<Vec<_>>();
    assert_eq!((experts(12), experts(15)), (vec![0, 1, 2, 3], vec![12, 13, 14, 15]));
    assert_eq!((plan.node_of[11], plan.node_of[12]), (2, 3));
    // The preset of the strategy is the same but for the exchange in 8 bits and the synchroniser.
    let mut preset = strategy(Strategy::Ma, &model, 16).unwrap();
    let linear = Plan::new(preset.clone(), &model, &cluster()).unwrap();
    assert_eq!((linear.placement, &linear.shards), (plan.placement.clone(), &plan.shards));
    preset.exchange = plan.file.exchange;
    // A row in 8 bits: 4096 values and 32 factors, to 1 − C(12,2)/C(16,2) of the four ranks.
    let misses = (12.0 * 11.0) / (16.0 * 15.0);
    let dispatch = total(&plan, &model, &[MessageKind::Dispatch]);
    assert!((dispatch - 4.0 * (1.0 - misses) * (4096.0 + 4.0 * 32.0)).abs() < 1e-6, "{dispatch}");
    assert!((total(&plan, &model, &[MessageKind::Answer]) - 2.0 * (4096.0 + 128.0)).abs() < 1e-6);
}

/// The example that the documentation begins with is the paper's plan, but for the limit of memory and the placement's form.
#[test]
fn the_documented_example_can_be_followed() {
    let text = include_str!("../../../docs/plan-file.md");
    let yaml = text.split("```yaml\n").nth(1).unwrap().split("```").next().unwrap();
    let file = PlanFile::from_yaml(yaml, "docs/plan-file.md").unwrap();
    let documented = Plan::new(file, &model(), &cluster()).unwrap();
    let paper = plan("paper-003-ma", &model());
    assert_eq!((documented.shards, documented.placement), (paper.shards, paper.placement));
    let keys: Vec<String> = moesaic_plan::diff(&documented.file, &paper.file)
        .iter()
        .map(|d| d.split(':').next().unwrap().to_owned())
        .collect();
    assert_eq!(keys[0], "memory.max_model_len");
    assert!(keys[1..].iter().all(|key| key.starts_with("moe.placement")), "{keys:?}");
}

#[test]
fn paper_001_both_ways() {
    let model = spec("paper-001");
    let ep = plan("paper-001-ep", &model);
    assert!(
        (0..16)
            .all(|rank| ep.experts_of(Rank(rank)).iter().all(|experts| experts[..] == [moesaic_plan::ExpertId(rank)]))
    );
    let baseline = plan("paper-001-tp-pp", &model);
    assert_eq!(baseline.stages.len(), 2);
    assert_eq!(baseline.stages[1].layers, 8..16);
    // Two experts of 16, one of which is at home with probability 1/16 each.
    let answers = total(&ep, &model, &[MessageKind::Answer]);
    assert!((answers - 2.0 * 15.0 / 16.0 * 4096.0 * 2.0).abs() < 1e-6, "{answers}");
    // Once to the other node (14/15 × 8/16 + 8/16 × … = 1 − C(8,2)/C(16,2)), and on to those that need it.
    let traffic = ep.expected_traffic(&model);
    let dispatch = traffic.iter().find(|t| t.kind == MessageKind::Dispatch).unwrap();
    let hit = 1.0 - (8.0 * 7.0) / (16.0 * 15.0);
    assert!((dispatch.inter_bytes - hit * 8192.0).abs() < 1e-6, "{dispatch:?}");
    let relay = traffic.iter().find(|t| t.kind == MessageKind::Relay).unwrap();
    assert!((relay.intra_bytes - 8.0 * (2.0 / 16.0) * 7.0 / 8.0 * 8192.0).abs() < 1e-6, "{relay:?}");
    assert_eq!(relay.inter_bytes, 0.0);
}

#[test]
fn gpus_of_its_own_for_each_layer() {
    let model = spec("paper-000");
    let big = plan("paper-000", &model);
    assert_eq!((big.world_size(), big.stages.len()), (14_848, 58));
    assert_eq!((big.stages[0].layers.clone(), big.stages[57].layers.clone()), (0..4, 60..61));
    assert_eq!(big.placement.layers[60].as_ref().unwrap().replicas[255], [Rank(14_847)]);
    assert!(explain(&big, &model).contains("the same with layers 5–59, ranks 512–14591"), "{}", explain(&big, &model));

    let small = Scale {
        hidden: Some(64),
        heads: Some(4),
        experts: Some(16),
        intermediate: Some(32),
        vocab: Some(512),
        ..Scale::default()
    };
    let small = model.scaled(&small).unwrap();
    assert_eq!((small.layers.len(), small.num_moe_layers()), (61, 58));
    let reduced = plan("paper-000-reduced", &small);
    assert_eq!(reduced.world_size(), 58 * 16);
    let held = |rank: u32| reduced.experts_of(Rank(rank)).iter().map(Vec::len).sum::<usize>();
    assert!((0..928).all(|rank| held(rank) == 1));
}

/// Paper 002 wants one expert of *each* layer on a GPU of 64 GB; attention of all layers takes that much alone.
#[test]
fn paper_002_fits_with_gpus_for_each_layer_only() {
    let model = spec("paper-002");
    assert_eq!(plan("paper-002", &model).world_size(), 58 * 64);
    let mut file = strategy(Strategy::Ep, &model, 64).unwrap();
    file.memory.max_model_len = Some(256);
    let cluster = cluster_preset("h100-paper").unwrap();
    let text = Plan::new(file, &model, &cluster).unwrap_err().to_string();
    assert!(text.contains("its largest part is attention with 53.38 GiB"), "{text}");
}

#[test]
fn the_five_strategies_on_16_ranks() {
    let mesh = |of| {
        let file = strategy(of, &model(), 16).unwrap();
        let name = file.name.clone();
        let plan = Plan::new(file, &model(), &cluster()).unwrap();
        let mesh = plan.file.mesh;
        (name, [mesh.tp, mesh.pp, mesh.dp, mesh.ep], plan.file.moe.pool)
    };
    assert_eq!(mesh(Strategy::Tp), ("TP=8".to_owned(), [8, 1, 2, 1], Pool::Shared));
    assert_eq!(mesh(Strategy::Pp), ("PP=2".to_owned(), [1, 2, 8, 1], Pool::Shared));
    assert_eq!(mesh(Strategy::TpPp), ("TP=8, PP=2".to_owned(), [8, 2, 1, 1], Pool::Shared));
    assert_eq!(mesh(Strategy::Ep), ("EP=16".to_owned(), [1, 1, 16, 16], Pool::Shared));
    assert_eq!(mesh(Strategy::Ma), ("MA 12+4".to_owned(), [12, 1, 1, 4], Pool::Separate));
}

/// Every strategy on every number of ranks, for every model at a small size: a plan that can be followed, or a sentence.
#[test]
fn strategies_for_any_number_of_ranks() {
    let runs = |preset: &&moesaic_spec::Preset| preset.spec().unwrap().planning_only.is_none();
    for preset in moesaic_spec::presets().iter().filter(runs) {
        let small = Scale { layers: Some(4), hidden: Some(64), vocab: Some(128), experts: Some(8), ..Scale::default() };
        let model = preset.spec().unwrap().scaled(&small).unwrap();
        for ranks in (1..=33).chain([48, 64, 100]) {
            for of in Strategy::ALL {
                let file = match strategy(of, &model, ranks) {
                    Ok(file) => file,
                    Err(_) => {
                        let few = ranks < 4 || !ranks.is_multiple_of(2);
                        assert!(few && of != Strategy::Tp && of != Strategy::Ep, "{} {of:?} {ranks}", preset.name);
                        continue;
                    }
                };
                assert_eq!((file.ranks, file.world_size()), (ranks, ranks));
                let plan = Plan::new(file, &model, &huge_cluster());
                let plan = plan.unwrap_or_else(|e| panic!("{} {of:?} {ranks}: {e}", preset.name));
                assert_eq!(plan.world_size(), ranks);
            }
        }
    }
}

#[test]
fn a_plan_explains_itself() {
    let model = model();
    let text = explain(&plan("paper-003-ma", &model), &model);
    assert_eq!(text, include_str!("golden/paper-003-ma.txt"));
}
