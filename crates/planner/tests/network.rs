//! What must hold for every price of communication.

use moesaic_planner::network::published::TABLES;
use moesaic_planner::network::{
    Algorithm, Collective, CollectiveKind, CommOp, Copies, Exchange, Family, FittedCurve, Group, Library, M2n, Mode,
    Network, Source, expected_distinct, held_out,
};
use moesaic_spec::{Cluster, LinkClass, cluster_preset};
use proptest::prelude::*;
use serde_json::json;

const ALGORITHMS: [Algorithm; 6] = [
    Algorithm::OneShot,
    Algorithm::TwoShot,
    Algorithm::Ring,
    Algorithm::Tree,
    Algorithm::Hierarchical,
    Algorithm::Best,
];

/// Cluster, change of (bandwidth, latency, utilization) of its links.
fn changed(cluster: &Cluster, [bandwidth, latency, utilization]: [f64; 3]) -> Cluster {
    let mut cluster = cluster.clone();
    for link in [Some(&mut cluster.intra_node), cluster.inter_node.as_mut()].into_iter().flatten() {
        link.bandwidth_per_gpu *= bandwidth;
        link.bandwidth_per_node *= bandwidth;
        link.latency_s *= latency;
        link.utilization = (link.utilization * utilization).min(1.0);
    }
    cluster
}

fn clusters() -> impl Strategy<Value = Cluster> {
    prop::sample::select(vec!["dgx-h100-x2", "hgx-h200", "a100-4x4", "gb200-nvl72", "h100-paper", "laptop"])
        .prop_map(|name| cluster_preset(name).unwrap())
}

fn ops() -> impl Strategy<Value = CommOp> {
    let kinds = vec![
        CollectiveKind::AllReduce,
        CollectiveKind::AllGather,
        CollectiveKind::ReduceScatter,
        CollectiveKind::AllToAll,
    ];
    let library = prop::sample::select(vec![Library::Nccl, Library::Custom]);
    let collective = (prop::sample::select(kinds), library, 1.0..1e9, 1_usize..5, 1_usize..9).prop_map(
        |(kind, library, bytes, nodes, here)| {
            let group = Group { ranks: nodes * here, ranks_per_node: here };
            CommOp::Collective(Collective { kind, library, bytes, group })
        },
    );
    let exchange = exchanges()
        .prop_flat_map(|exchange| prop::sample::select(vec![CommOp::Dispatch(exchange), CommOp::Combine(exchange)]));
    prop_oneof![collective, exchange]
}

prop_compose! {
    fn exchanges()(
        tokens in 0_u32..10_000,
        (hidden, top_k, experts) in (64_usize..8192, 1_usize..9, 8_usize..512),
        (nodes, here) in (1_usize..9, 1_usize..9),
        (max_over_mean, sms) in (1.0..3.0, 1_usize..100),
        low_latency in any::<bool>(),
        copies in prop::sample::select(vec![Copies::PerExpert, Copies::PerRank, Copies::PerNode]),
    ) -> Exchange {
        Exchange {
            tokens_per_rank: f64::from(tokens),
            hidden,
            top_k,
            experts,
            group: Group { ranks: nodes * here, ranks_per_node: here },
            bytes_per_value_out: 1.03125,
            bytes_per_value_back: 2.0,
            copies,
            max_over_mean,
            mode: if low_latency { Mode::LowLatency } else { Mode::Normal },
            sms,
        }
    }
}

proptest! {
    #[test]
    fn better_links_are_never_slower(
        cluster in clusters(),
        op in ops(),
        bandwidth in 1.0..8.0,
        latency in 0.1..1.0,
        utilization in 1.0..2.0,
    ) {
        let better = changed(&cluster, [bandwidth, latency, utilization]);
        let [before, after] = [&cluster, &better].map(|cluster| Network::new(cluster, Library::Nccl).price(&op));
        prop_assert!(after.seconds <= before.seconds * (1.0 + 1e-12), "{before:?} {after:?}");
    }

    #[test]
    fn no_price_is_below_what_the_bandwidth_allows(cluster in clusters(), op in ops()) {
        let network = Network::new(&cluster, Library::Nccl);
        let (price, bound) = (network.price(&op), network.bound(&op));
        prop_assert!(price.seconds >= bound && bound.is_finite(), "{price:?} {bound}");
        prop_assert!(price.sd >= 0.0);
    }

    #[test]
    fn every_algorithm_keeps_to_the_bound(
        cluster in clusters(), bytes in 1.0..1e9, nodes in 1_usize..5, here in 1_usize..9, custom in any::<bool>(),
    ) {
        let library = if custom { Library::Custom } else { Library::Nccl };
        let network = Network::new(&cluster, library);
        let group = Group { ranks: nodes * here, ranks_per_node: here };
        let op = CommOp::Collective(Collective { kind: CollectiveKind::AllReduce, library, bytes, group });
        for algorithm in ALGORITHMS {
            let price = network.all_reduce(bytes, group, algorithm);
            prop_assert!(price.seconds >= network.bound(&op) && price.seconds.is_finite(), "{algorithm:?} {price:?}");
        }
    }

    #[test]
    fn what_is_shared_is_never_faster(cluster in clusters(), op in ops(), flows in 1.0..8.0) {
        let alone = Network::new(&cluster, Library::Nccl);
        let shared = alone.shared(flows, flows);
        prop_assert!(shared.price(&op).seconds >= alone.price(&op).seconds * (1.0 - 1e-12));
        prop_assert!((shared.bound(&op) - flows * alone.bound(&op)).abs() <= 1e-9 * shared.bound(&op));
    }

    #[test]
    fn one_rank_costs_nothing(cluster in clusters(), op in ops()) {
        let alone = Group::one_node(1);
        let op = match op {
            CommOp::Collective(collective) => CommOp::Collective(Collective { group: alone, ..collective }),
            CommOp::Dispatch(exchange) => CommOp::Dispatch(Exchange { group: alone, ..exchange }),
            CommOp::Combine(exchange) => CommOp::Combine(Exchange { group: alone, ..exchange }),
        };
        let network = Network::new(&cluster, Library::Nccl);
        prop_assert_eq!(network.price(&op).seconds, 0.0);
        prop_assert_eq!(network.bound(&op), 0.0);
    }

    /// What goes out comes back: as many rows, each with its own bytes.
    #[test]
    fn bytes_are_conserved_between_dispatch_and_combine(exchange in exchanges(), back in 0.5..4.0) {
        let exchange = Exchange { bytes_per_value_back: back, ..exchange };
        let (out, home) = (CommOp::Dispatch(exchange).demand(), CommOp::Combine(exchange).demand());
        for (out, home) in [(out.intra_bytes, home.intra_bytes), (out.inter_bytes, home.inter_bytes)] {
            prop_assert!((out / exchange.bytes_per_value_out - home / back).abs() <= 1e-9 * home / back);
        }
    }

    /// Fewer copies are fewer rows, and a rank's own experts cost no row.
    #[test]
    fn a_copy_for_each_node_is_the_fewest(exchange in exchanges()) {
        let rows = |copies| Exchange { copies, ..exchange }.rows();
        let [expert, rank, node] = [Copies::PerExpert, Copies::PerRank, Copies::PerNode].map(rows);
        prop_assert!(node.inter_rows <= rank.inter_rows * (1.0 + 1e-9));
        prop_assert!(rank.inter_rows <= expert.inter_rows * (1.0 + 1e-9));
        let all = exchange.tokens_per_rank * exchange.top_k as f64;
        let others = (exchange.group.ranks as f64 - 1.0) / exchange.group.ranks as f64;
        prop_assert!((expert.intra_rows + expert.inter_rows - all * others).abs() <= 1e-6 * all.max(1.0));
    }

    #[test]
    fn pools_are_bounded_by_adapters(
        (m, n) in (1_usize..65, 1_usize..65), tokens in 1.0..1e5,
        copies in prop::sample::select(vec![Copies::PerExpert, Copies::PerRank, Copies::PerNode]),
    ) {
        let cluster = cluster_preset("dgx-h100-x2").unwrap();
        let pools = M2n {
            senders: Group::packed(m, 8), receivers: Group::packed(n, 8), tokens, hidden: 7168, top_k: 8, experts: 256,
            bytes_per_value: 2.0, copies, max_over_mean: 1.0, across: LinkClass::InterNode,
        };
        let network = Network::new(&cluster, Library::Nccl);
        let bytes = pools.rows_across() * 7168.0 * 2.0;
        let price = network.m_to_n(&pools).seconds;
        prop_assert!(price >= bytes / m.min(n) as f64 / 50e9 * (1.0 - 1e-12));
        prop_assert!(price >= network.m_to_n_bound(&pools));
    }
}

/// All sets of experts are equally likely: counted one by one.
#[test]
fn distinct_owners_are_counted_by_hand() {
    // 4 experts on 2 owners, 2 of them: 6 pairs, of which 2 have one owner and 4 have two.
    assert!((expected_distinct(4, 2, 2) - (2.0 + 8.0) / 6.0).abs() < 1e-12);
    assert!((expected_distinct(256, 8, 4) - 3.615).abs() < 1e-3);
    assert_eq!(expected_distinct(8, 8, 4), 4.0);
    assert_eq!(expected_distinct(8, 3, 1), 1.0);
}

#[test]
fn an_all_reduce_between_nodes_is_bounded_by_adapters() {
    let cluster = cluster_preset("dgx-h100-x2").unwrap();
    let network = Network::new(&cluster, Library::Nccl);
    let group = Group::packed(16, 8);
    // Each of 8 adapters carries an eighth of the buffer, there and back.
    let adapters = 1e9 / 8.0 / 50e9;
    for algorithm in ALGORITHMS {
        assert!(network.all_reduce(1e9, group, algorithm).seconds > adapters);
    }
    let narrow = Cluster {
        inter_node: cluster.inter_node.clone().map(|link| moesaic_spec::Link { bandwidth_per_node: 50e9, ..link }),
        ..cluster
    };
    let hierarchical = |cluster| Network::new(cluster, Library::Nccl).all_reduce(1e9, group, Algorithm::Hierarchical);
    // One adapter for the node: the whole buffer goes over it.
    assert!(hierarchical(&narrow).seconds > 1e9 / 50e9);
}

/// Small buffers want few steps, large ones few bytes.
#[test]
fn the_size_decides_between_one_and_two_shots() {
    let network = Network::new(&cluster_preset("hgx-h200").unwrap(), Library::Custom);
    let group = Group::one_node(8);
    let price = |bytes, algorithm| network.all_reduce(bytes, group, algorithm).seconds;
    assert!(price(8e3, Algorithm::OneShot) < price(8e3, Algorithm::TwoShot));
    assert!(price(8e6, Algorithm::TwoShot) < price(8e6, Algorithm::OneShot));
}

/// A row that beats its bound would break physics, or our reading of its sizes.
#[test]
fn no_measurement_is_below_its_bound() {
    for table in TABLES {
        let network = Network::measured(table.gpu, Library::Nccl);
        for row in table.rows() {
            let bound = network.bound(&row.op);
            assert!(row.seconds >= bound, "{:?} {}: {row:?} is below {bound}", table.gpu, table.op);
        }
    }
}

#[test]
fn a_measured_size_is_priced_by_its_table() {
    let network = Network::new(&cluster_preset("hgx-h200").unwrap(), Library::Nccl);
    let params = json!({"gpus": 8, "elements": 8388608, "bytes": 16777216});
    let op = CommOp::from_params("nccl_all_reduce", params.as_object().unwrap()).unwrap();
    let price = network.price(&op);
    assert_eq!(price.source, Source::Table);
    assert!((price.seconds / 121.74e-6).ln().abs() < 0.15, "{price:?}");
}

/// The committed curves are those that the committed tables give.
#[test]
fn the_file_of_curves_is_fitted_to_the_tables() {
    let fitted = FittedCurve::fit("nccl_all_reduce", &Family::NvLink3.measured("nccl_all_reduce"));
    let file = include_str!("../src/network/fitted.csv");
    let line = file.lines().find_map(|line| line.strip_prefix("NVLink 3,nccl_all_reduce,")).unwrap();
    for ((value, cell), name) in fitted.values().iter().zip(line.split(',')).zip(FittedCurve::names()) {
        assert!((value - cell.parse::<f64>().unwrap()).abs() <= 1e-3 * value.abs(), "{name}: {value} {cell}");
    }
}

/// Nine tenths of what was never seen lie in their interval: the widest claim a price makes.
#[test]
fn intervals_hold_what_was_held_out() {
    let measured = Family::NvLink3.measured("nccl_reduce_scatter");
    let errors = held_out(&measured, 0, |known| FittedCurve::fit("nccl_reduce_scatter", known));
    assert_eq!(errors.len(), measured.len());
    let inside = errors.iter().filter(|error| error.ln_ratio.abs() <= 1.645 * error.sd).count();
    // 27 rows: fewer than 20 inside would happen once in a hundred if nine tenths were true.
    assert!(inside >= 20, "{inside} of {}", errors.len());
}

#[test]
fn rows_that_cannot_be_are_refused() {
    let refused = |op: &str, params: serde_json::Value| {
        CommOp::from_params(op, params.as_object().unwrap()).unwrap_err().to_string()
    };
    assert!(refused("nccl_broadcast", json!({})).contains("\"nccl_broadcast\" is no operation"));
    assert!(refused("nccl_all_reduce", json!({"gpus": 8})).contains("bytes is missing"));
    assert!(refused("nccl_all_reduce", json!({"gpus": 0, "bytes": 1})).contains("gpus is 0"));
    let exchange = json!({"nodes": 1, "ep": 8, "tokens_per_gpu": 1, "h": 64, "topk": 9, "E": 8});
    assert!(refused("deepep_ll_dispatch", exchange).contains("topk is 9; it must be at most the 8 experts of E"));
}
