use std::time::Duration;

use half::bf16;
use moesaic_device::{Arena, Ctx, OpCall, Tensor};
use moesaic_plan::{AllReduce, MessageKind, Rank, Tag};
use moesaic_spec::{Bytes, DType};
use proptest::prelude::*;

use super::all_reduce::{one_round, two_rounds};
use super::*;
use crate::{Meta, in_process};

const TAG: Tag = Tag { step: 3, layer: 2, micro_batch: 1, kind: MessageKind::Mlp, round: 0 };

/// What each rank of a world of `n` threads makes of `work`.
fn on_all<T: Send>(n: usize, work: impl Fn(&Ctx, &dyn Communicator) -> T + Sync) -> Vec<T> {
    let exchanges = (0..n).map(|_| Arena::host("exchange", Bytes(8 << 20)).unwrap()).collect();
    let world = in_process::world(exchanges, Duration::from_secs(20));
    std::thread::scope(|scope| {
        let work = &work;
        let threads: Vec<_> =
            world.into_iter().map(|comm| scope.spawn(move || work(&Ctx::cpu(1, 8 << 20).unwrap(), &comm))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// Numbers whose sum depends on the order, different at each rank.
fn numbers(rank: Rank, len: usize) -> Vec<f32> {
    let number = |i: usize| ((i * 7919 + rank.idx() * 104_729) % 1009) as f32 / 97.0 - 5.1;
    (0..len).map(number).collect()
}

fn tensor(ctx: &Ctx, values: &[f32]) -> Tensor {
    let mut tensor = ctx.empty(&[values.len()], DType::F32).unwrap();
    if !ctx.is_meta() {
        tensor.f32_mut().copy_from_slice(values);
    }
    tensor
}

fn sum_in_order(summands: impl IntoIterator<Item = Vec<f32>>) -> Vec<f32> {
    summands.into_iter().reduce(|sum, x| sum.iter().zip(&x).map(|(a, b)| a + b).collect()).unwrap()
}

/// The sum as the module's head says it.
fn reference(args: &AllReduceArgs<'_>, len: usize, dtype: DType) -> Vec<f32> {
    let of = |&rank: &Rank| rounded(numbers(rank, len), dtype);
    let sum_in_order = |summands: Vec<Vec<f32>>| rounded(sum_in_order(summands), dtype);
    match args.algorithm {
        AllReduce::Flat => sum_in_order(args.group.iter().map(of).collect()),
        AllReduce::Hierarchical => {
            let mut nodes: Vec<usize> = Vec::new();
            for rank in args.group {
                let node = args.node_of[rank.idx()];
                if !nodes.contains(&node) {
                    nodes.push(node);
                }
            }
            let ranks_of = |&node: &usize| {
                let in_node = args.group.iter().filter(|rank| args.node_of[rank.idx()] == node);
                sum_in_order(in_node.map(of).collect())
            };
            sum_in_order(nodes.iter().map(ranks_of).collect())
        }
    }
}

/// As values of this type.
fn rounded(values: Vec<f32>, dtype: DType) -> Vec<f32> {
    match dtype {
        DType::BF16 => values.into_iter().map(|x| bf16::from_f32(x).to_f32()).collect(),
        _ => values,
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

fn tensor_of(ctx: &Ctx, values: &[f32], dtype: DType) -> Tensor {
    if dtype == DType::F32 {
        return tensor(ctx, values);
    }
    let mut x = ctx.empty(&[values.len()], dtype).unwrap();
    if !x.is_meta() {
        x.bf16_mut().iter_mut().zip(values).for_each(|(x, &value)| *x = bf16::from_f32(value));
    }
    x
}

fn values(x: &Tensor) -> Vec<f32> {
    match x.dtype() {
        DType::BF16 => x.bf16().iter().map(|x| x.to_f32()).collect(),
        _ => x.f32().to_vec(),
    }
}

/// A world of 1 to 16 ranks, a group of some of them in any order, and their nodes.
fn groups() -> impl Strategy<Value = (Vec<Rank>, Vec<usize>)> {
    (1..=16usize).prop_flat_map(|n| {
        let order = Just((0..n as u32).map(Rank).collect::<Vec<_>>()).prop_shuffle();
        (order, 1..=n, prop::collection::vec(0..4usize, n)).prop_map(|(mut order, len, node_of)| {
            order.truncate(len);
            (order, node_of)
        })
    })
}

/// Nothing, less than a cache line a rank, uneven parts, and more than goes in one round.
const LENGTHS: [usize; 6] = [0, 1, 37, 1000, 16_385, 40_003];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn sums_have_the_bits_of_the_reference_and_logs_those_of_meta(
        (group, node_of) in groups(),
        len in prop::sample::select(LENGTHS.to_vec()),
        algorithm in prop::sample::select(vec![AllReduce::Flat, AllReduce::Hierarchical]),
        dtype in prop::sample::select(vec![DType::F32, DType::BF16]),
    ) {
        let args = AllReduceArgs { tag: TAG, group: &group, node_of: &node_of, algorithm };
        let expected = bits(&reference(&args, len, dtype));
        let run = |ctx: &Ctx, comm: &dyn Communicator| {
            if !group.contains(&comm.rank()) {
                return None;
            }
            ctx.start_log();
            let mut x = tensor_of(ctx, &numbers(comm.rank(), len), dtype);
            all_reduce(ctx, comm, args, &mut x).unwrap();
            Some(((!x.is_meta()).then(|| bits(&values(&x))), ctx.take_log()))
        };
        let results = on_all(node_of.len(), run);
        for (rank, result) in results.into_iter().enumerate() {
            let meta = run(&Ctx::meta(), &Meta::new(Rank(rank as u32), node_of.len()));
            let (Some((sum, log)), Some((_, meta))) = (result, meta) else { continue };
            prop_assert!(sum.unwrap() == expected, "rank {rank} of {group:?}");
            prop_assert_eq!(log, meta);
        }
    }
}

#[test]
fn one_round_and_two_give_the_same_bits() {
    for (n, len) in [(2, 100), (3, 1000), (5, 16_384), (16, 777)] {
        let ranks: Vec<Rank> = (0..n as u32).map(Rank).collect();
        let forms = [one_round, two_rounds];
        let [one, two] = forms.map(|form| {
            on_all(n, |ctx, comm| {
                let mut x = tensor(ctx, &numbers(comm.rank(), len));
                form(&Group { ctx, comm, tag: TAG }, &ranks, 0..len, &mut x).unwrap();
                bits(x.f32())
            })
        });
        assert!(one == two && one.iter().all(|bits| *bits == one[0]), "{n} ranks, {len} elements");
    }
}

#[test]
fn bytes_are_those_of_the_algorithm() {
    let ranks: Vec<Rank> = (0..8).map(Rank).collect();
    let node_of = [0, 0, 0, 0, 1, 1, 1, 1];
    let n = 1 << 15;
    let outbound = |algorithm, len| {
        let ctx = Ctx::meta();
        let mut x = ctx.empty(&[len], DType::F32).unwrap();
        let args = AllReduceArgs { tag: TAG, group: &ranks, node_of: &node_of, algorithm };
        all_reduce(&ctx, &Meta::new(Rank(1), 8), args, &mut x).unwrap();
        let is_out = |call: &&OpCall| call.peer.is_some_and(|peer| peer.outbound);
        let to_other_node = |call: &&OpCall| call.peer.is_some_and(|peer| peer.rank >= 4);
        let log = ctx.take_log();
        let bytes = |calls: Vec<&OpCall>| calls.iter().map(|call| call.bytes.bound).sum::<u64>() / 4;
        let all: Vec<&OpCall> = log.iter().filter(is_out).collect();
        (bytes(all.clone()), bytes(all.into_iter().filter(to_other_node).collect()))
    };
    // 2 N (G - 1) / G, a half of it to the other node's four ranks of seven.
    assert_eq!(outbound(AllReduce::Flat, n), (n as u64 * 14 / 8, n as u64));
    // Inside 2 N 3/4; between nodes a quarter of N, in one round because it is short.
    assert_eq!(outbound(AllReduce::Hierarchical, n), (n as u64 * 7 / 4, n as u64 / 4));
    assert_eq!(outbound(AllReduce::Flat, 100), (700, 400));
}

#[test]
fn rows_and_columns_are_joined_and_logs_are_those_of_meta() {
    let group = [Rank(2), Rank(0), Rank(3), Rank(1)];
    for (sizes, width) in [([3usize, 0, 1, 2], 5usize), ([0, 0, 0, 0], 4), ([2, 1, 0, 0], 0), ([0, 2, 2, 5], 1)] {
        for dtype in [DType::F32, DType::BF16, DType::F8E4M3] {
            let args = GatherArgs { tag: TAG, group: &group, sizes: &sizes };
            let element = dtype.size_bytes();
            // The byte at (row, col) of the whole says where it is from.
            let byte = |row: usize, col: usize, idx: usize| (row * 31 + col * 7 + idx) as u8;
            let run = |ctx: &Ctx, comm: &dyn Communicator| {
                ctx.start_log();
                let place = group.iter().position(|&rank| rank == comm.rank()).unwrap();
                let (own, before) = (sizes[place], sizes[..place].iter().sum::<usize>());
                let mut rows = ctx.empty(&[own, width], dtype).unwrap();
                let mut cols = ctx.empty(&[width, own], dtype).unwrap();
                if !ctx.is_meta() {
                    for (i, x) in rows.bytes_mut().iter_mut().enumerate() {
                        let (at, idx) = (i / element, i % element);
                        *x = byte(before + at / width, at % width, idx);
                    }
                    for (i, x) in cols.bytes_mut().iter_mut().enumerate() {
                        let (at, idx) = (i / element, i % element);
                        *x = byte(at / own, before + at % own, idx);
                    }
                }
                let rows = all_gather_rows(ctx, comm, args, &rows).unwrap();
                let args = GatherArgs { tag: Tag { kind: MessageKind::Logits, ..TAG }, ..args };
                let cols = gather_to_first(ctx, comm, args, &cols).unwrap();
                assert_eq!(cols.is_some(), place == 0);
                let total = sizes.iter().sum::<usize>();
                assert_eq!(rows.dims(), [total, width]);
                if !ctx.is_meta() {
                    let whole = |num_rows: usize, num_cols: usize| -> Vec<u8> {
                        let at = |i: usize| byte(i / element / num_cols, i / element % num_cols, i % element);
                        (0..num_rows * num_cols * element).map(at).collect()
                    };
                    assert_eq!(rows.bytes(), whole(total, width));
                    if let Some(cols) = cols {
                        assert_eq!(cols.dims(), [width, total]);
                        assert_eq!(cols.bytes(), whole(width, total));
                    }
                }
                ctx.take_log()
            };
            for (rank, log) in on_all(4, run).into_iter().enumerate() {
                assert_eq!(log, run(&Ctx::meta(), &Meta::new(Rank(rank as u32), 4)));
            }
        }
    }
}

#[test]
fn a_message_of_another_shape_is_refused() {
    let errors = on_all(2, |ctx, comm| {
        let len = 3 + comm.rank().idx();
        let mut x = tensor(ctx, &numbers(comm.rank(), len));
        let (group, node_of) = ([Rank(0), Rank(1)], [0, 0]);
        let args = AllReduceArgs { tag: TAG, group: &group, node_of: &node_of, algorithm: AllReduce::Flat };
        all_reduce(ctx, comm, args, &mut x).unwrap_err().to_string()
    });
    let expected = "rank 0: partial MLP of layer 2, micro-batch 1, step 3 from rank 1 has 0 header words and tensors \
                    [F32 [4]], expected 0 header words and tensors [F32 [3]]";
    assert_eq!(errors[0], expected);
}

#[test]
fn what_is_received_is_recorded_as_it_was_sent() {
    let logs = on_all(2, |ctx, comm| {
        ctx.start_log();
        let peer = Rank(1 - comm.rank().0);
        let tensors = vec![tensor(ctx, &[1.0, 2.0])];
        send(ctx, comm, peer, TAG, Message { header: vec![5, 6, 7], tensors }).unwrap();
        receive_all(ctx, comm, &[peer], TAG).unwrap();
        ctx.take_log()
    });
    for (rank, log) in logs.iter().enumerate() {
        let peer = |outbound| Peer { rank: 1 - rank as u32, tag: TAG.code(), outbound };
        let expected = [true, false].map(|outbound| OpCall::message(peer(outbound), Amount::exact(20)));
        assert_eq!(log[..], expected);
    }
}
