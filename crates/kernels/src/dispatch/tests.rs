use super::*;
use crate::router::router;
use crate::testing::{ACTIVATIONS, contexts, random, tensor, values};
use moesaic_spec::{Router, Scoring};

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

#[test]
fn rows_are_where_the_reference_puts_them() {
    for ctx in contexts() {
        for (t, e, top_k, d) in SIZES {
            for dtype in ACTIVATIONS {
                let routing = route(&ctx, t, e, top_k);
                let x = tensor(&ctx, &[t, d], dtype, &random(2, t * d));
                let out = dispatch(&ctx, &x, &routing, e, None).unwrap();
                let kept = vec![true; t * top_k];
                let (offsets, tokens, row_of) = reference::sort(routing.topk_idx.i32(), &kept, top_k, e);
                assert_eq!((&out.offsets, out.dropped), (&offsets, 0));
                assert_eq!(out.row_of.i32(), row_of);
                let x = values(&x);
                let expected: Vec<f32> = tokens.iter().flat_map(|&t| x[t * d..][..d].to_vec()).collect();
                assert_eq!(values(&out.x), expected);
            }
        }
        let (x, routing) = (ctx.empty(&[0, 4], DType::F32).unwrap(), route(&ctx, 0, 3, 2));
        let out = dispatch(&ctx, &x, &routing, 3, None).unwrap();
        assert_eq!((out.x.dims(), &out.offsets[..]), (&[0, 4][..], &[0; 4][..]));
    }
}

#[test]
fn capacity_drops_what_the_reference_drops() {
    let ctx = Ctx::cpu(2, 8 << 20).unwrap();
    let mut dropped = 0;
    for (t, e, top_k, d) in SIZES {
        for policy in [DropPolicy::Probs, DropPolicy::Position] {
            for factor in [0.5, 1.0, 1.25, 100.0] {
                let capacity = Capacity { factor, policy };
                let routing = route(&ctx, t, e, top_k);
                let x = tensor(&ctx, &[t, d], DType::F32, &random(2, t * d));
                let seqs = [0..t / 3, t / 3..t / 3, t / 3..t];
                let out = dispatch(&ctx, &x, &routing, e, Some((&capacity, &seqs))).unwrap();
                let (idx, weights) = (routing.topk_idx.i32(), routing.topk_weights.f32());
                let kept = reference::kept(idx, weights, top_k, e, &capacity, &seqs);
                let (offsets, tokens, row_of) = reference::sort(idx, &kept, top_k, e);
                assert_eq!((&out.offsets, out.dropped), (&offsets, t * top_k - tokens.len()));
                assert_eq!(out.row_of.i32(), row_of, "{t} {e} {top_k} {capacity:?}");
                dropped += out.dropped;
                for seq in seqs {
                    let places = places(factor, top_k, seq.len(), e);
                    for expert in 0..e as i32 {
                        let pairs = seq.start * top_k..seq.end * top_k;
                        assert!(pairs.filter(|&p| kept[p] && idx[p] == expert).count() <= places);
                    }
                }
                if factor == 100.0 {
                    assert_eq!(out.dropped, 0);
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
    let x = tensor(&ctx, &[4, 1], DType::F32, &[0.0, 1.0, 2.0, 3.0]);
    let row_of = |policy, seqs: &[Range<usize>]| {
        let capacity = Capacity { factor: 1.0, policy };
        dispatch(&ctx, &x, &routing, 2, Some((&capacity, seqs))).unwrap().row_of.i32().to_vec()
    };
    let whole = 0..4;
    assert_eq!(row_of(DropPolicy::Position, std::slice::from_ref(&whole)), [0, 1, -1, -1]);
    assert_eq!(row_of(DropPolicy::Probs, std::slice::from_ref(&whole)), [-1, 0, 1, -1]);
    // Each of two sequences has a place of its own.
    assert_eq!(row_of(DropPolicy::Position, &[0..2, 2..4]), [0, -1, 1, -1]);
    // ceil(1.0 * 1 * 1 / 2) = 1: a lone token is never dropped.
    assert_eq!(row_of(DropPolicy::Probs, &[0..1, 1..2, 2..3, 3..4]), [0, 1, 2, 3]);
}

#[test]
fn a_real_call_is_recorded_as_its_meta_run() {
    let (cpu, meta) = (Ctx::cpu(1, 1 << 16).unwrap(), Ctx::meta());
    cpu.start_log();
    for ctx in [&cpu, &meta] {
        let routing = Routing {
            topk_idx: ctx.empty(&[6, 2], DType::I32).unwrap(),
            topk_weights: ctx.empty(&[6, 2], DType::F32).unwrap(),
        };
        let mut routing = routing;
        if !ctx.is_meta() {
            routing.topk_idx.i32_mut().copy_from_slice(&[0, 1, 2, 0, 1, 2, 0, 2, 1, 0, 2, 1]);
        }
        let x = ctx.empty(&[6, 5], DType::BF16).unwrap();
        let out = dispatch(ctx, &x, &routing, 3, None).unwrap();
        assert_eq!((out.x.dims(), out.is_meta()), (&[12, 5][..], ctx.is_meta()));
    }
    assert_eq!(cpu.take_log(), meta.take_log());
    assert_eq!(cpu.arena().peak(), meta.arena().peak());
}

#[test]
fn wrong_arguments_are_named() {
    let ctx = Ctx::meta();
    let routing = route(&ctx, 4, 3, 2);
    let x = ctx.empty(&[4, 8], DType::F32).unwrap();
    let capacity = Capacity { factor: 1.0, policy: DropPolicy::Probs };
    for seqs in [&[0..1, 1..3][..], &[0..2, 3..4], &[1..2, 2..4], &[0..4, 4..5], &[]] {
        let error = dispatch(&ctx, &x, &routing, 3, Some((&capacity, seqs))).err().unwrap().to_string();
        assert_eq!(error, format!("dispatch: seqs is {seqs:?}, expected ranges that follow each other from 0 to 4"));
    }
    let capacity = Capacity { factor: f32::NAN, ..capacity };
    let error = dispatch(&ctx, &x, &routing, 3, Some((&capacity, &[]))).err().unwrap().to_string();
    assert_eq!(error, "dispatch: capacity factor is NaN, expected a number above 0");
}
