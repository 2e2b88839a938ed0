use super::*;
use crate::testing::{assert_same_bytes, contexts, random, tensor};

fn plain(scoring: Scoring) -> Router {
    Router {
        scoring,
        norm_topk_prob: true,
        correction_bias: false,
        n_group: 1,
        topk_group: 1,
        routed_scaling_factor: 1.0,
    }
}

/// Router, experts, top-k: the families and the corners.
fn cases() -> Vec<(Router, usize, usize)> {
    let mut cases = Vec::new();
    for scoring in [Scoring::Softmax, Scoring::Sigmoid] {
        for (e, top_k) in [(1, 1), (3, 1), (3, 2), (3, 3), (16, 2), (64, 8), (256, 8)] {
            for norm_topk_prob in [false, true] {
                cases.push((Router { norm_topk_prob, ..plain(scoring) }, e, top_k));
            }
        }
        for (e, n_group, topk_group, top_k) in
            [(256, 8, 4, 8), (16, 4, 1, 3), (16, 4, 3, 5), (12, 12, 5, 5), (6, 2, 2, 4)]
        {
            let router = Router { n_group, topk_group, routed_scaling_factor: 2.5, ..plain(scoring) };
            cases.push((Router { correction_bias: true, ..router.clone() }, e, top_k));
            cases.push((router, e, top_k));
        }
    }
    cases
}

#[test]
fn near_the_reference_and_the_same_on_every_path() {
    const T: usize = 37;
    let contexts = contexts();
    for (case, (spec, e, top_k)) in cases().into_iter().enumerate() {
        let mut first: Option<Routing> = None;
        for ctx in &contexts {
            let logits = tensor(ctx, &[T, e], DType::F32, &random(case as u64, T * e));
            let bias = spec.correction_bias.then(|| tensor(ctx, &[e], DType::F32, &random(1000 + case as u64, e)));
            let routing = router(ctx, &logits, &spec, top_k, bias.as_ref()).unwrap();
            for t in 0..T {
                let expected =
                    reference::route(&logits.f32()[t * e..][..e], &spec, top_k, bias.as_ref().map(Tensor::f32));
                for (a, &(idx, weight)) in expected.iter().enumerate() {
                    assert_eq!(routing.topk_idx.i32()[t * top_k + a], idx as i32, "{spec:?} {e} {top_k} row {t}");
                    // A few roundings of F32, and an exponential that is off by two units.
                    let got = f64::from(routing.topk_weights.f32()[t * top_k + a]);
                    assert!((got - weight).abs() <= 2e-6 * weight, "{got} {weight}");
                }
            }
            match &first {
                Some(first) => {
                    assert_same_bytes(&routing.topk_idx, &first.topk_idx, "idx");
                    assert_same_bytes(&routing.topk_weights, &first.topk_weights, "weights");
                }
                None => first = Some(routing),
            }
        }
    }
}

#[test]
fn many_rows_on_many_threads_are_like_one() {
    for ctx in contexts() {
        let data = random(9, 500 * 64);
        let logits = tensor(&ctx, &[500, 64], DType::F32, &data);
        let all = router(&ctx, &logits, &plain(Scoring::Softmax), 8, None).unwrap();
        for t in [0, 123, 499] {
            let row = tensor(&ctx, &[1, 64], DType::F32, &data[t * 64..][..64]);
            let one = router(&ctx, &row, &plain(Scoring::Softmax), 8, None).unwrap();
            assert_eq!(one.topk_idx.i32(), &all.topk_idx.i32()[t * 8..][..8]);
            assert_eq!(one.topk_weights.f32(), &all.topk_weights.f32()[t * 8..][..8]);
        }
    }
}

#[test]
fn ties_go_to_the_lower_index_and_nan_to_nobody() {
    for ctx in contexts() {
        let x = [1.0, 3.0, 3.0, 1.0, f32::NAN, f32::NAN, -0.0, 0.0, 5.0, f32::NEG_INFINITY, 2.0, 5.0];
        let logits = tensor(&ctx, &[3, 4], DType::F32, &x);
        let chosen =
            |scoring, top_k| router(&ctx, &logits, &plain(scoring), top_k, None).unwrap().topk_idx.i32().to_vec();
        assert_eq!(chosen(Scoring::Sigmoid, 3), [1, 2, 0, 2, 3, 0, 0, 3, 2]);
        // A NaN among the logits makes every softmax NaN: the lowest indices, all distinct.
        assert_eq!(chosen(Scoring::Softmax, 4), [1, 2, 0, 3, 0, 1, 2, 3, 0, 3, 2, 1]);
        let weights = router(&ctx, &logits, &plain(Scoring::Softmax), 2, None).unwrap().topk_weights;
        assert!(weights.f32()[2].is_nan() && weights.f32()[3].is_nan());
        assert_eq!((weights.f32()[0], weights.f32()[1]), (0.5, 0.5));
    }
}

#[test]
fn the_bias_chooses_and_does_not_weigh() {
    let ctx = Ctx::cpu(1, 1 << 12).unwrap();
    let logits = tensor(&ctx, &[1, 4], DType::F32, &[2.0, 1.0, 0.0, -1.0]);
    let bias = tensor(&ctx, &[4], DType::F32, &[-9.0, -9.0, 0.0, 0.5]);
    let spec = Router { correction_bias: true, norm_topk_prob: false, ..plain(Scoring::Sigmoid) };
    let routing = router(&ctx, &logits, &spec, 2, Some(&bias)).unwrap();
    assert_eq!(routing.topk_idx.i32(), [3, 2]);
    let weights = routing.topk_weights.f32();
    assert!((weights[0] - 0.268_941_4).abs() < 1e-6 && weights[1] == 0.5);
    // Scores in an open group may be negative with their bias and still win over those of a closed group.
    let bias = tensor(&ctx, &[4], DType::F32, &[-2.0, -2.0, -9.0, -9.0]);
    let spec = Router { n_group: 2, ..spec };
    assert_eq!(router(&ctx, &logits, &spec, 2, Some(&bias)).unwrap().topk_idx.i32(), [0, 1]);
}

#[test]
fn wrong_arguments_are_named() {
    let ctx = Ctx::meta();
    let logits = ctx.empty(&[2, 6], DType::F32).unwrap();
    let message = |spec: Router, top_k| router(&ctx, &logits, &spec, top_k, None).err().unwrap().to_string();
    let base = plain(Scoring::Sigmoid);
    assert_eq!(message(base.clone(), 7), "router: top_k is 7, expected 1 to 6, the number of experts");
    let four = Router { n_group: 4, ..base.clone() };
    assert_eq!(message(four, 1), "router: n_group is 4, expected a divisor of 6, the number of experts");
    let none = Router { topk_group: 0, ..base.clone() };
    assert_eq!(message(none, 1), "router: topk_group is 0, expected 1 to n_group = 1");
    let few = Router { n_group: 3, topk_group: 1, ..base.clone() };
    assert_eq!(message(few, 3), "router: top_k is 3, expected at most 2, the experts of topk_group groups");
    let biased = Router { correction_bias: true, ..base };
    assert_eq!(message(biased, 1), "router: correction bias is absent, expected given by the router's description");
}
