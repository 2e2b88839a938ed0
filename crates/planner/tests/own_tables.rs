//! Prices from the tables of one machine.

use moesaic_planner::cost::{Op, Precision, Source, roofline};
use moesaic_planner::machine::Machine;
use moesaic_planner::network::LinkKind;
use moesaic_planner::network::{Algorithm, Group, LinkRow};
use moesaic_planner::profile::TABLES;
use moesaic_planner::tables::{OwnTables, TableFile};
use moesaic_spec::{Bytes, Cluster, LinkClass};

const GEMM: &str = "dtype,m,n,k,kernel,framework,version,latency_us\n";

fn table(op: &str, text: String) -> TableFile {
    let op = TABLES.iter().find(|table| **table == op).expect("a table");
    TableFile { op, path: format!("dir/{op}.csv"), text }
}

fn gemm(m: f64, weights: Precision) -> Op {
    Op::Gemm { m, n: 1024.0, k: 2048.0, weights }
}

/// 50 GFLOP/s for many rows, 8 GB/s for few, and something in between where both count.
fn seconds(op: &Op) -> f64 {
    2e-6 + op.flops() / 50e9 + op.bytes() / 8e9
}

fn products() -> TableFile {
    let rows = (0..12).map(|i| f64::from(1 << i));
    let row = |m: f64| {
        let us = 1e6 * seconds(&gemm(m, Precision::Bf16));
        format!("bfloat16,{m},1024,2048,avx2,moesaic,0,{us:.3}\n")
    };
    table("gemm", GEMM.to_owned() + &rows.map(row).collect::<String>())
}

fn links() -> [TableFile; 2] {
    let head = "gpus,bytes,kernel,framework,version,latency_us\n";
    let row = |kernel: &str, bytes: f64, us: f64| format!("2,{bytes},{kernel},moesaic,0,{us}\n");
    let sizes = || (10..26).step_by(2).map(|i| f64::from(1 << i));
    let messages = sizes().map(|bytes| row("process", bytes, 10.0 + bytes / 4e3) + &row("in_process", bytes, 2.0));
    let sums = sizes().map(|bytes| row("in_process", bytes, 5.0 + bytes / 1e3));
    let text = |rows: String| head.to_owned() + &rows;
    [table("send_receive", text(messages.collect())), table("all_reduce", text(sums.collect()))]
}

fn machine(files: &[TableFile]) -> Cluster {
    let machine = Machine {
        name: "here".into(),
        processor: "a processor".into(),
        memory: Bytes(16 << 30),
        ranks: 2,
        threads: 1,
        peaks: vec![(Precision::Bf16, 60e9), (Precision::F32, 30e9)],
        read_bytes_per_s: 10e9,
        launch_s: 1e-6,
    };
    let message = |bytes: f64| LinkRow {
        kind: LinkKind::SendReceive,
        ranks: 2,
        bytes,
        transport: "process".into(),
        seconds: 1e-5 + bytes / 4e9,
    };
    machine.cluster(files, &[message(1024.0), message(1e7)]).unwrap()
}

fn all() -> (Cluster, OwnTables) {
    let [messages, sums] = links();
    let files = [products(), messages, sums];
    let cluster = machine(&files);
    let tables = OwnTables::read(&cluster, &files).unwrap();
    (cluster, tables)
}

#[test]
fn rows_are_met_and_between_them_times_lie_between() {
    let (cluster, tables) = all();
    let costs = tables.costs(&cluster.gpu);
    let price = |m| costs.price(&gemm(m, Precision::Bf16));
    for m in (0..12).map(|i| f64::from(1 << i)) {
        let (price, measured) = (price(m), seconds(&gemm(m, Precision::Bf16)));
        assert!((price.seconds / measured - 1.0).abs() < 0.02, "{m} rows: {price:?}, {measured}");
        assert_eq!(price.source, Source::Table);
    }
    for m in (1..2047).map(f64::from) {
        let (below, above) = (2_f64.powf(m.log2().floor()), 2_f64.powf(m.log2().ceil()));
        let [low, middle, high] = [below, m, above].map(|m| price(m).seconds);
        assert!(low * 0.999 <= middle && middle <= high * 1.001, "{m} rows: {low} {middle} {high}");
    }
    let (op, left_out) = tables.leave_one_out()[0];
    assert_eq!((op, left_out.rows), ("gemm", 12));
    assert!(left_out.median < 0.1 && left_out.p90 < 0.3, "{left_out:?}");
}

#[test]
fn far_from_rows_prices_are_less_sure_and_never_below_physics() {
    let (cluster, tables) = all();
    let costs = tables.costs(&cluster.gpu);
    let near = costs.price(&gemm(100.0, Precision::Bf16));
    let mut last = near.sd;
    for (n, k) in [(4096.0, 8192.0), (65536.0, 65536.0)] {
        let op = Op::Gemm { m: 100.0, n, k, weights: Precision::Bf16 };
        let price = costs.price(&op);
        assert!(price.sd > last && price.source == Source::Predictor, "{price:?} after {last}");
        assert!(price.seconds >= roofline::bound(&cluster.gpu, &op));
        last = price.sd;
    }
    let tiny = Op::Gemm { m: 1.0, n: 1.0, k: 1.0, weights: Precision::Bf16 };
    assert!(costs.price(&tiny).seconds >= roofline::bound(&cluster.gpu, &tiny));
}

#[test]
fn a_type_without_rows_is_not_taken_for_another() {
    let (cluster, tables) = all();
    let costs = tables.costs(&cluster.gpu);
    assert_eq!(costs.price(&gemm(64.0, Precision::F32)).source, Source::Roofline);
    let attention =
        Op::AttentionDecode { seqs: 1.0, context: 64.0, heads: 8, kv_heads: 8, head_dim: 64, kv: Precision::Bf16 };
    assert_eq!(costs.price(&attention).source, Source::Roofline);
}

#[test]
fn a_faster_machine_is_never_slower() {
    let (cluster, tables) = all();
    let mut faster = cluster.gpu.clone();
    faster.peak_flops.bf16 *= 2.0;
    let wider = moesaic_spec::Gpu { memory_bandwidth: 2.0 * cluster.gpu.memory_bandwidth, ..cluster.gpu.clone() };
    for m in [1.0, 30.0, 300.0, 5000.0] {
        let op = gemm(m, Precision::Bf16);
        let [own, faster, wider] = [&cluster.gpu, &faster, &wider].map(|gpu| tables.costs(gpu).price(&op).seconds);
        assert!(faster <= own && wider <= own && faster.min(wider) < own, "{m} rows: {own} {faster} {wider}");
    }
}

#[test]
fn sums_and_messages_are_those_that_were_measured() {
    let (cluster, tables) = all();
    let network = tables.network(&cluster);
    let sum = |bytes| network.all_reduce(bytes, Group::one_node(2), Algorithm::Best);
    for bytes in [1024.0, 65536.0, f64::from(1 << 24)] {
        let measured = 5e-6 + bytes / 1e9;
        assert!((sum(bytes).seconds / measured - 1.0).abs() < 1e-3, "{bytes}: {:?}", sum(bytes));
        assert_eq!(sum(bytes).source, Source::Table);
        let message = network.point_to_point(bytes, LinkClass::IntraNode).seconds;
        assert!((message / (10e-6 + bytes / 4e9) - 1.0).abs() < 1e-3, "{bytes}: {message}");
    }
    assert!(sum(1e9).sd > sum(1e6).sd && sum(1e9).source == Source::Predictor);
    let mut faster = cluster.clone();
    faster.intra_node.bandwidth_per_gpu *= 2.0;
    faster.intra_node.bandwidth_per_node *= 2.0;
    let halved = tables.network(&faster).all_reduce(1e8, Group::one_node(2), Algorithm::Best).seconds;
    assert!((halved / sum(1e8).seconds - 0.5).abs() < 0.01, "{halved}");
}

#[test]
fn tables_of_all_ops_are_read() {
    let end = ",avx2,moesaic,0,900000\n";
    let moe = "dtype,tokens,h,inter,topk,E,tp,ep,dist,kernel,framework,version,latency_us\n";
    let files = [
        table("moe", format!("{moe}float32,4,64,64,2,8,1,1,uniform{end}")),
        table("moe_ungated", format!("{moe}bfloat16,4,64,64,2,8,1,1,uniform{end}")),
        table(
            "attn_prefill",
            format!(
                "batch,seq,q_heads,kv_heads,head_dim,kv,kernel,framework,version,latency_us\n1,64,8,4,32,float32{end}"
            ),
        ),
        table(
            "mla_decode",
            format!(
                "batch,kv_len,heads,latent,rope,kv,kernel,framework,version,latency_us\n2,64,4,128,32,float32{end}"
            ),
        ),
        table(
            "mla_prefill",
            format!("batch,seq,heads,latent,rope,kv,kernel,framework,version,latency_us\n1,64,4,128,32,bfloat16{end}"),
        ),
    ];
    let cluster = machine(&files);
    let tables = OwnTables::read(&cluster, &files).unwrap();
    let costs = tables.costs(&cluster.gpu);
    let experts = |weights, matrices| Op::Experts {
        tokens: 4.0,
        hidden: 64.0,
        intermediate: 64.0,
        top_k: 2.0,
        experts: 8.0,
        tp: 1.0,
        ep: 1.0,
        weights,
        matrices,
        skew: 0.0,
    };
    let measured = [
        experts(Precision::F32, 3),
        experts(Precision::Bf16, 2),
        Op::AttentionPrefill {
            seqs: 1.0,
            new_tokens: 64.0,
            context: 64.0,
            heads: 8,
            kv_heads: 4,
            head_dim: 32,
            kv: Precision::F32,
        },
        Op::MlaDecode { seqs: 2.0, context: 64.0, heads: 4, latent: 128, rope: 32, kv: Precision::F32 },
        Op::MlaPrefill {
            seqs: 1.0,
            new_tokens: 64.0,
            context: 64.0,
            heads: 4,
            latent: 128,
            rope: 32,
            kv: Precision::Bf16,
        },
    ];
    for op in measured {
        let price = costs.price(&op);
        assert!((price.seconds - 0.9).abs() < 1e-6 && price.source == Source::Table, "{op:?}: {price:?}");
    }
    // The other type and the other number of matrices have no row.
    assert_eq!(costs.price(&experts(Precision::Bf16, 3)).source, Source::Roofline);
}

#[test]
fn tables_that_cannot_be_are_refused() {
    let (cluster, _) = all();
    let refused = |op: &str, text: &str| OwnTables::read(&cluster, &[table(op, text.into())]).unwrap_err().to_string();
    for (op, text, sentence) in [
        (
            "gemm",
            format!("{GEMM}bfloat16,2048,1024,2048,avx2,moesaic,0,9\n"),
            "dir/gemm.csv, line 2, column latency_us: 9.000 µs is faster than physics: a processor (1 threads) needs 143165.",
        ),
        (
            "gemm",
            "dtype,m,n,colour\n".into(),
            "dir/gemm.csv, line 1, column colour: is not known; a table of gemm may have",
        ),
        (
            "gemm",
            format!("{GEMM}bfloat16,no,1024,2048,avx2,moesaic,0,9\n"),
            "line 2, column m: no is not a number above 0",
        ),
        (
            "gemm",
            format!("{GEMM}bfloat16,1,1024,2048,avx2,moesaic,0,-1\n"),
            "column latency_us: -1 is not a time above 0",
        ),
        (
            "all_reduce",
            "gpus,bytes,kernel,latency_us\n2,67108864,in_process,1\n".into(),
            "dir/all_reduce.csv, line 2, column latency_us: 1.000 µs is faster than physics: shared memory needs ",
        ),
        (
            "all_reduce",
            "gpus,kernel,latency_us\n2,in_process,1\n".into(),
            "line 1, column bytes: the column is missing",
        ),
        (
            "send_receive",
            "gpus,bytes,kernel,latency_us\n1.5,8,process,1\n".into(),
            "column gpus: is 1.5; a whole number",
        ),
    ] {
        let message = refused(op, &text);
        assert!(message.contains(sentence), "{message}");
    }
}

/// The tables that this repository has of a machine, by the cluster file beside them.
#[test]
fn measured_tables_price_what_they_measured() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../bench/results/cpu-2core-avx512-bf16");
    let text = |name: &str| std::fs::read_to_string(folder.join(name)).unwrap();
    let cluster = Cluster::from_yaml(&text("cluster.yaml"), "cluster.yaml").unwrap();
    let ops = ["gemm", "moe", "attn_decode", "attn_prefill", "send_receive", "all_reduce"];
    let files: Vec<TableFile> = ops.iter().map(|op| table(op, text(&format!("{op}.csv")))).collect();
    let costs = OwnTables::read(&cluster, &files).unwrap().costs(&cluster.gpu);
    let (rows, _) = moesaic_planner::tables::rows(&cluster, &files).unwrap();
    let mut errors: Vec<f64> = rows.iter().map(|row| (costs.price(&row.op).seconds / row.seconds).ln().abs()).collect();
    errors.sort_by(f64::total_cmp);
    assert!(errors.len() > 80 && errors[errors.len() / 2] < 0.03, "{errors:?}");
}
