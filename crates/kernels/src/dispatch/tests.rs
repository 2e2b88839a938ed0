use std::ops::Range;

use moesaic_device::Device;
use moesaic_spec::{Capacity, DType, DropPolicy, Router, Scoring};
use proptest::prelude::*;

use super::*;
use crate::router::{Routing, router};
use crate::testing::{ACTIVATIONS, WIDTHS, contexts, random, tensor, values};

fn route(ctx: &Ctx, t: usize, e: usize, top_k: usize) -> Routing {
    let spec = Router {
        scoring: Scoring::Softmax,
        norm_topk_prob: true,
        correction_bias: false,
        n_group: 1,
        topk_group: 1,
        routed_scaling_factor: 1.0,
    };
    // Few distinct logits make ties, a slope makes a popular expert.
    let logits: Vec<f32> =
        random(t as u64, t * e).iter().enumerate().map(|(i, x)| x.round() - (i % e) as f32 * 0.1).collect();
    router(ctx, &tensor(ctx, &[t, e], DType::F32, &logits), &spec, top_k, None).unwrap()
}

const SIZES: [(usize, usize, usize, usize); 6] =
    [(1, 1, 1, 7), (5, 3, 3, 1), (33, 3, 2, 64), (64, 16, 2, 100), (9, 256, 8, 1000), (130, 16, 4, 256)];

/// The pairs that keep their place, in the order of tokens.
fn pairs(kept: &[i32], a: usize) -> Vec<(u32, u32)> {
    let kept = kept.iter().enumerate().filter(|&(_, &expert)| expert >= 0);
    kept.map(|(pair, &expert)| ((pair / a) as u32, expert as u32)).collect()
}

#[test]
fn one_source_in_the_order_of_tokens_is_sorted_by_expert_then_token() {
    for ctx in contexts() {
        for (t, e, top_k, d) in SIZES {
            for dtype in ACTIVATIONS {
                let routing = route(&ctx, t, e, top_k);
                let x = tensor(&ctx, &[t, d], dtype, &random(2, t * d));
                let kept = keep_pairs(&routing, e, None).unwrap();
                assert_eq!(kept, routing.topk_idx.i32());
                let pairs = pairs(&kept, top_k);
                let out = dispatch(&ctx, &[DispatchSource { x: &x, pairs: Pairs::Known(&pairs) }], e).unwrap();
                let mut sorted: Vec<(u32, u32)> = pairs.iter().map(|&(token, expert)| (expert, token)).collect();
                sorted.sort();
                let x = values(&x);
                let expected: Vec<f32> = sorted.iter().flat_map(|&(_, t)| x[t as usize * d..][..d].to_vec()).collect();
                assert_eq!(values(&out.x), expected);
                for (rows, expert) in out.offsets.windows(2).zip(0..) {
                    assert!(sorted[rows[0]..rows[1]].iter().all(|&(e, _)| e == expert));
                }
            }
        }
        let x = ctx.empty(&[0, 4], DType::F32).unwrap();
        let out = dispatch(&ctx, &[DispatchSource { x: &x, pairs: Pairs::Known(&[]) }], 3).unwrap();
        assert_eq!((out.x.dims(), &out.offsets[..]), (&[0, 4][..], &[0; 4][..]));
        assert!(keep_pairs(&route(&ctx, 0, 3, 2), 3, None).unwrap().is_empty());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn rows_of_several_sources_are_where_the_reference_puts_them(
        num_experts in 1usize..6,
        sizes in prop::collection::vec((1usize..9, 0usize..30), 1..5),
        seed: u64,
        width in 0usize..WIDTHS.len(),
    ) {
        let d = WIDTHS[width];
        let number = |i: usize| crate::philox::uniform(seed, i as u64);
        let all: Vec<Vec<(u32, u32)>> = sizes.iter().enumerate().map(|(source, &(n, num_pairs))| {
            let pair = |i: usize| {
                let at = 2 * (source * 100 + i);
                ((number(at) * n as f64) as u32, (number(at + 1) * num_experts as f64) as u32)
            };
            (0..num_pairs).map(pair).collect()
        }).collect();
        let slices: Vec<&[(u32, u32)]> = all.iter().map(Vec::as_slice).collect();
        let (offsets, origins) = reference::sort(&slices, num_experts);
        for ctx in contexts() {
            for dtype in ACTIVATIONS {
                let matrix = |(i, &(n, _)): (usize, &(usize, usize))| {
                    tensor(&ctx, &[n, d], dtype, &random(seed ^ i as u64, n * d))
                };
                let xs: Vec<Tensor> = sizes.iter().enumerate().map(matrix).collect();
                let pairs = slices.iter().map(|&pairs| Pairs::Known(pairs));
                let sources: Vec<_> = xs.iter().zip(pairs).map(|(x, pairs)| DispatchSource { x, pairs }).collect();
                let out = dispatch(&ctx, &sources, num_experts).unwrap();
                prop_assert_eq!(&out.offsets, &offsets);
                let sorted = values(&out.x);
                let row = |matrix: &[f32], row: usize| matrix[row * d..][..d].to_vec();
                for (at, &(source, pair)) in origins.iter().enumerate() {
                    prop_assert_eq!(out.row_of[source][pair] as usize, at);
                    let from = all[source][pair].0 as usize;
                    prop_assert_eq!(row(&sorted, at), row(&values(&xs[source]), from));
                }
            }
        }
    }
}

#[test]
fn capacity_drops_what_the_reference_drops() {
    let ctx = Ctx::cpu(2, 8 << 20).unwrap();
    let mut dropped = 0;
    for (t, e, top_k, _) in SIZES {
        for policy in [DropPolicy::Probs, DropPolicy::Position] {
            for factor in [0.5, 1.0, 1.25, 100.0] {
                let capacity = Capacity { factor, policy };
                let routing = route(&ctx, t, e, top_k);
                let seqs = [0..t / 3, t / 3..t / 3, t / 3..t];
                let out = keep_pairs(&routing, e, Some((&capacity, &seqs))).unwrap();
                let (idx, weights) = (routing.topk_idx.i32(), routing.topk_weights.f32());
                let kept = reference::kept(idx, weights, top_k, e, &capacity, &seqs);
                let expected: Vec<i32> = idx.iter().zip(&kept).map(|(&e, &kept)| if kept { e } else { -1 }).collect();
                assert_eq!(out, expected, "{t} {e} {top_k} {capacity:?}");
                let num_dropped = kept.iter().filter(|&&kept| !kept).count();
                dropped += num_dropped;
                for seq in seqs {
                    let places = capacity::places(factor, top_k, seq.len(), e);
                    for expert in 0..e as i32 {
                        let pairs = seq.start * top_k..seq.end * top_k;
                        assert!(pairs.filter(|&p| kept[p] && idx[p] == expert).count() <= places);
                    }
                }
                if factor == 100.0 {
                    assert_eq!(num_dropped, 0);
                }
            }
        }
    }
    assert!(dropped > 100, "{dropped}");
}

#[test]
fn the_policies_differ_in_who_loses() {
    let ctx = Ctx::cpu(1, 1 << 12).unwrap();
    let mut topk_idx = ctx.empty(&[4, 1], DType::I32).unwrap();
    topk_idx.i32_mut().copy_from_slice(&[0, 0, 0, 0]);
    let routing = Routing { topk_idx, topk_weights: tensor(&ctx, &[4, 1], DType::F32, &[0.2, 0.9, 0.5, 0.5]) };
    let kept = |policy, seqs: &[Range<usize>]| {
        let capacity = Capacity { factor: 1.0, policy };
        keep_pairs(&routing, 2, Some((&capacity, seqs))).unwrap()
    };
    let whole = 0..4;
    assert_eq!(kept(DropPolicy::Position, std::slice::from_ref(&whole)), [0, 0, -1, -1]);
    assert_eq!(kept(DropPolicy::Probs, std::slice::from_ref(&whole)), [-1, 0, 0, -1]);
    // Each of two sequences has a place of its own.
    assert_eq!(kept(DropPolicy::Position, &[0..2, 2..4]), [0, -1, 0, -1]);
    // ceil(1.0 * 1 * 1 / 2) = 1: a lone token is never dropped.
    assert_eq!(kept(DropPolicy::Probs, &[0..1, 1..2, 2..3, 3..4]), [0, 0, 0, 0]);
}

#[test]
fn a_real_call_is_recorded_as_its_meta_run() {
    let (cpu, meta) = (Ctx::cpu(1, 1 << 16).unwrap(), Ctx::meta());
    cpu.start_log();
    let pairs: Vec<(u32, u32)> = (0..12).map(|pair| (pair / 2, pair % 3)).collect();
    for ctx in [&cpu, &meta] {
        let (x, y) = (ctx.empty(&[6, 5], DType::BF16).unwrap(), ctx.empty(&[1, 5], DType::BF16).unwrap());
        let pairs: [Pairs; 2] = match ctx.device() {
            Device::Cpu => [Pairs::Known(&pairs), Pairs::Known(&[(0, 2)])],
            Device::Meta => [12, 1].map(|count| Pairs::Counted(Amount::exact(count))),
        };
        let sources = [DispatchSource { x: &x, pairs: pairs[0] }, DispatchSource { x: &y, pairs: pairs[1] }];
        assert_eq!(dispatch(ctx, &sources, 3).unwrap().x.dims(), [13, 5]);
    }
    let calls = cpu.take_log();
    assert_eq!(calls, meta.take_log());
    assert_eq!(cpu.arena().peak(), meta.arena().peak());
    assert_eq!(calls[0].bytes, Amount::exact(13 * (2 * 10 + 12)));

    // Of 12 pairs a third is expected here.
    let x = meta.empty(&[6, 5], DType::BF16).unwrap();
    let pairs = Pairs::Counted(Amount { expected: 4.0, bound: 12 });
    assert_eq!(dispatch(&meta, &[DispatchSource { x: &x, pairs }], 1).unwrap().x.dims(), [12, 5]);
    assert_eq!(meta.take_log()[0].bytes, Amount { expected: 4.0 * 32.0, bound: 12 * 32 });
    assert!(keep_pairs(&route(&meta, 6, 3, 2), 3, None).unwrap().is_empty());
}

#[test]
fn wrong_arguments_are_named() {
    let ctx = Ctx::meta();
    let routing = route(&ctx, 4, 3, 2);
    let capacity = Capacity { factor: 1.0, policy: DropPolicy::Probs };
    for seqs in [&[0..1, 1..3][..], &[0..2, 3..4], &[1..2, 2..4], &[0..4, 4..5], &[]] {
        let error = keep_pairs(&routing, 3, Some((&capacity, seqs))).err().unwrap().to_string();
        assert_eq!(error, format!("dispatch: seqs is {seqs:?}, expected ranges that follow each other from 0 to 4"));
    }
    let capacity = Capacity { factor: f32::NAN, ..capacity };
    let error = keep_pairs(&routing, 3, Some((&capacity, &[]))).err().unwrap().to_string();
    assert_eq!(error, "dispatch: capacity factor is NaN, expected a number above 0");

    let ctx = Ctx::cpu(1, 1 << 12).unwrap();
    let x = ctx.empty(&[4, 8], DType::F32).unwrap();
    let refused = |pairs| dispatch(&ctx, &[DispatchSource { x: &x, pairs }], 3).err().unwrap().to_string();
    let expected = "expected a row below 4 and an expert below 3";
    assert_eq!(refused(Pairs::Known(&[(0, 0), (4, 1)])), format!("dispatch: pair is (4, 1), {expected}"));
    assert_eq!(refused(Pairs::Known(&[(0, 3)])), format!("dispatch: pair is (0, 3), {expected}"));
    let counted = Pairs::Counted(Amount::exact(1));
    assert_eq!(refused(counted), "dispatch: pairs is counted, expected known");
    let narrow = ctx.empty(&[4, 7], DType::F32).unwrap();
    let sources = [&x, &narrow].map(|x| DispatchSource { x, pairs: Pairs::Known(&[]) });
    let error = dispatch(&ctx, &sources, 3).err().unwrap().to_string();
    assert_eq!(error, "dispatch: x is F32 [4, 7], expected F32 [4, 8]");
    let error = dispatch(&ctx, &[], 3).err().unwrap().to_string();
    assert_eq!(error, "dispatch: sources is 0, expected at least 1");
}
