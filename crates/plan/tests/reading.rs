//! Plan files as text: what is read, what is refused with which sentence, and what two of them differ in.

mod common;

use common::{model, strategy};
use moesaic_plan::plan::{Exchange, ExchangePrecision, ExchangeRoute, ExplicitLayer, InitialPlacement, Overlap, Pool};
use moesaic_plan::{AllReduce, PlanFile, Rank, Strategy, diff};

const SHORT: &str = "version: 1\nname: n\nmodel: m\ncluster: c\nworkload: w\nranks: 4\nmesh: {dp: 4}\n";

fn sentence(text: &str) -> String {
    PlanFile::from_yaml(text, "p.yaml").unwrap_err().to_string()
}

#[test]
fn what_is_left_out_has_its_default() {
    let file = PlanFile::from_yaml(SHORT, "p.yaml").unwrap();
    assert_eq!((file.mesh.tp, file.mesh.pp, file.mesh.dp, file.mesh.ep), (1, 1, 4, 1));
    assert_eq!((file.micro_batches, file.overlap), (1, Overlap::MicroBatches));
    assert_eq!((file.moe.pool, file.max_experts_per_rank(), file.moe.redundant_experts), (Pool::Shared, 1, 0));
    assert_eq!(file.exchange, Exchange { precision: ExchangePrecision::Full, route: ExchangeRoute::Direct });
    assert_eq!((file.all_reduce, file.balance, file.synchronize), (None, None, None));
}

#[test]
fn every_key_is_read() {
    let text = format!(
        "{SHORT}stage_layers: [1, 2]\nattention: {{heads: [3, 2], replication: 2}}\nmoe:\n  pool: separate\n  \
         max_experts_per_rank: 2\n  redundant_experts: 1\n  placement:\n    explicit:\n      - layer: 3\n        experts: \
         [[4], [5, 6]]\nmicro_batches: 3\noverlap: arrivals\nexchange: {{precision: fp8, route: two_level}}\nall_reduce: \
         hierarchical\nbalance: {{interval: 10, threshold: 0.05, significance: 0.01, bytes_per_step: 1000}}\nsynchronize: \
         {{interval: 100, threshold: 0.05}}\nmemory: {{max_model_len: 9, max_num_seqs: 8, max_num_batched_tokens: 7, \
         utilization: 0.5}}\n"
    );
    let file = PlanFile::from_yaml(&text, "p.yaml").unwrap();
    assert_eq!(file.stage_layers, Some(vec![1, 2]));
    assert_eq!((file.attention.heads.clone(), file.attention.replication), (Some(vec![3, 2]), Some(2)));
    assert_eq!(
        (file.moe.pool, file.moe.max_experts_per_rank, file.moe.redundant_experts),
        (Pool::Separate, Some(2), 1)
    );
    let layer = ExplicitLayer { layer: 3, experts: vec![vec![Rank(4)], vec![Rank(5), Rank(6)]] };
    assert_eq!(file.moe.placement, InitialPlacement::Explicit(vec![layer]));
    assert_eq!((file.micro_batches, file.overlap), (3, Overlap::Arrivals));
    assert_eq!(file.exchange, Exchange { precision: ExchangePrecision::Fp8, route: ExchangeRoute::TwoLevel });
    assert_eq!(file.all_reduce, Some(AllReduce::Hierarchical));
    let balance = file.balance.unwrap();
    assert_eq!((balance.interval, balance.threshold, balance.significance), (10, 0.05, 0.01));
    assert_eq!(balance.bytes_per_step, Some(1000));
    assert_eq!(file.synchronize.unwrap().interval, 100);
    assert_eq!((file.memory.max_model_len, file.memory.max_num_seqs), (Some(9), Some(8)));
    assert_eq!((file.memory.max_num_batched_tokens, file.memory.utilization), (Some(7), Some(0.5)));
    assert_eq!(PlanFile::from_yaml(&file.to_yaml(), "written").unwrap(), file);

    let traced = format!("{SHORT}moe: {{placement: {{trace: loads.json}}}}\n");
    let traced = PlanFile::from_yaml(&traced, "p.yaml").unwrap();
    assert_eq!(traced.moe.placement, InitialPlacement::Trace("loads.json".to_owned()));
}

#[test]
fn wrong_forms_are_refused() {
    for (change, expected) in [
        (("version: 1\n", ""), "field `version` is missing; it must be 1"),
        (("version: 1", "version: 2"), "field `version` is 2, but must be 1"),
        (("mesh:", "mseh:"), "field `mseh` is not known; did you mean `mesh`?"),
        (("{dp: 4}", "{pd: 4}"), "field `mesh.pd` is not known; did you mean `pp`?"),
        (("{dp: 4}", "{dp: 4, dp: 2}"), "not valid YAML at line 7, column 15: key `dp` is there twice"),
        (("{dp: 4}", "4"), "field `mesh` is 4, but must be keys of its own, indented below it"),
        (("mesh: {dp: 4}", ""), "field `mesh` is missing; it must be tp, pp, dp and ep; those left out are 1"),
        (("ranks: 4", "ranks: four"), "field `ranks` is \"four\", but must be a whole number from 0 to 1073741824"),
        (("ranks: 4", "ranks: -1"), "field `ranks` is -1, but must be a whole number from 0 to 1073741824"),
        (("name: n", "name: 3"), "field `name` is 3, but must be a string"),
    ] {
        assert_eq!(sentence(&SHORT.replacen(change.0, change.1, 1)), format!("p.yaml: {expected}"));
    }
    for (more, expected) in [
        ("overlap: all\n", "field `overlap` is \"all\", but must be none or micro_batches or arrivals"),
        ("stage_layers: 4\n", "field `stage_layers` is 4, but must be a list […]"),
        ("stage_layers: [2, x]\n", "field `stage_layers[1]` is \"x\", but must be a whole number from 0 to 1073741824"),
        ("exchange: {precison: full}\n", "field `exchange.precison` is not known; did you mean `precision`?"),
        (
            "moe: {placement: random}\n",
            "field `moe.placement` is \"random\", but must be linear, or one of the keys trace and explicit",
        ),
        (
            "moe: {placement: {}}\n",
            "field `moe.placement` is neither, but must be linear, or one of the keys trace and explicit",
        ),
        (
            "moe: {placement: {trace: t, explicit: []}}\n",
            "field `moe.placement` is both, but must be linear, or one of the keys trace and explicit",
        ),
        (
            "moe: {placement: {explicit: [{layer: 0, experts: [0]}]}}\n",
            "field `moe.placement.explicit[0].experts[0]` is 0, but must be a list of ranks",
        ),
        (
            "moe: {placement: {explicit: [{layer: 0, experts: [[-1]]}]}}\n",
            "field `moe.placement.explicit[0].experts[0]` is [-1], but must be a list of ranks",
        ),
        (
            "moe: {placement: {explicit: [{layers: 0}]}}\n",
            "field `moe.placement.explicit[0].layers` is not known; did you mean `layer`?",
        ),
        (
            "moe: {placement: {explicit: [7]}}\n",
            "field `moe.placement.explicit[0]` is 7, but must be a layer with its experts, {layer: …, experts: […]}",
        ),
        ("balance: {interval: 1}\n", "field `balance.threshold` is missing; it must be a number"),
    ] {
        assert_eq!(sentence(&format!("{SHORT}{more}")), format!("p.yaml: {expected}"));
    }
}

#[test]
fn a_diff_says_what_changed_key_by_key() {
    let tp = strategy(Strategy::Tp, &model(), 16).unwrap();
    assert_eq!(diff(&tp, &tp), Vec::<String>::new());
    let mut pp = strategy(Strategy::Pp, &model(), 16).unwrap();
    pp.stage_layers = Some(vec![3, 1]);
    pp.memory.utilization = Some(0.5);
    assert_eq!(
        diff(&tp, &pp),
        [
            "memory.utilization: absent → 0.5",
            "mesh.dp: 2 → 8",
            "mesh.pp: 1 → 2",
            "mesh.tp: 8 → 1",
            "micro_batches: 1 → 2",
            "name: TP=8 → PP=2",
            "stage_layers: absent → [3,1]",
        ]
    );
    let mut placed = tp.clone();
    placed.moe.placement =
        InitialPlacement::Explicit(vec![ExplicitLayer { layer: 2, experts: vec![vec![Rank(1)], vec![Rank(0)]] }]);
    assert_eq!(diff(&placed, &tp), ["moe.placement: absent → linear", "moe.placement.explicit[2]: [[1],[0]] → absent"]);
}
