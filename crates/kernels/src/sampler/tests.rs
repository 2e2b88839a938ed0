use super::*;
use crate::testing::{contexts, random, tensor};

/// Logits with a few likely tokens and a long tail.
fn logits(seed: u64, v: usize) -> Vec<f32> {
    random(seed, v).iter().map(|x| x * x * x).collect()
}

fn base(seed: u64) -> SamplingParams {
    SamplingParams { seed, ..SamplingParams::default() }
}

fn settings() -> Vec<SamplingParams> {
    vec![
        base(1),
        SamplingParams::greedy(),
        SamplingParams { temperature: 0.3, ..base(2) },
        SamplingParams { temperature: 2.0, ..base(3) },
        SamplingParams { top_k: 1, ..base(4) },
        SamplingParams { top_k: 5, temperature: 0.8, ..base(5) },
        SamplingParams { top_k: 40, top_p: 0.9, ..base(6) },
        SamplingParams { top_p: 0.5, ..base(7) },
        SamplingParams { top_p: 0.999, temperature: 3.0, ..base(8) },
        SamplingParams { min_p: 0.1, ..base(9) },
        SamplingParams { min_p: 0.02, top_p: 0.95, top_k: 30, ..base(10) },
        SamplingParams { repetition_penalty: 1.3, ..base(11) },
        SamplingParams { presence_penalty: 1.5, frequency_penalty: -0.5, ..base(12) },
        SamplingParams { logit_bias: vec![(0, 5.0), (1, -5.0)], repetition_penalty: 0.7, ..base(13) },
        SamplingParams { temperature: 0.0, frequency_penalty: 2.0, repetition_penalty: 1.1, ..base(14) },
    ]
}

#[test]
fn tokens_are_those_of_the_reference_on_every_path() {
    let contexts = contexts();
    for v in [2, 7, 64, 1000, 3001] {
        for (i, params) in settings().iter().enumerate() {
            let data = logits(i as u64, 24 * v);
            let history: Vec<u32> = (0..24).map(|i| i * 5 % v as u32).collect();
            let requests: Vec<SampleRequest> =
                (0..24).map(|n| SampleRequest { params, prompt: &[0, 1, 1], generated: &history[..n] }).collect();
            let mut first: Option<Vec<Sampled>> = None;
            for ctx in &contexts {
                let sampled = sample(ctx, &tensor(ctx, &[24, v], DType::F32, &data), &requests).unwrap();
                if let Some(first) = &first {
                    assert_eq!(*first, sampled, "{v} {params:?} on {}", ctx.isa());
                    continue;
                }
                for (n, (sampled, request)) in sampled.iter().zip(&requests).enumerate() {
                    let row = &data[n * v..][..v];
                    let u = philox::uniform(params.seed, n as u64);
                    assert_eq!(sampled.token, reference::draw(row, request, u), "{v} {params:?} {n}");
                    let raw: Vec<f64> = row.iter().map(|&x| f64::from(x)).collect();
                    let p = reference::probabilities(&raw)[sampled.token as usize];
                    assert!((f64::from(sampled.logprob) - p.ln()).abs() < 2e-6, "{} {}", sampled.logprob, p.ln());
                }
                first = Some(sampled);
            }
        }
    }
}

#[test]
fn a_row_alone_and_among_others_gives_the_same_token() {
    let v = 2500;
    let settings = settings();
    for ctx in contexts() {
        let data = logits(3, settings.len() * v);
        let history = [3, 4, 3, 9];
        let requests: Vec<SampleRequest> = settings
            .iter()
            .enumerate()
            .map(|(i, params)| SampleRequest { params, prompt: &[7, 9], generated: &history[..i % 5] })
            .collect();
        let all = sample(&ctx, &tensor(&ctx, &[settings.len(), v], DType::F32, &data), &requests).unwrap();
        for (i, request) in requests.iter().enumerate() {
            let row = tensor(&ctx, &[1, v], DType::F32, &data[i * v..][..v]);
            assert_eq!(sample(&ctx, &row, &[*request]).unwrap(), all[i..=i]);
        }
    }
}

/// Draws many tokens from one row and counts them; the chi-square statistic against the reference's distribution.
#[test]
fn draws_follow_the_distribution() {
    const DRAWS: usize = 6_000;
    const V: usize = 12;
    let ctx = Ctx::cpu(1, 8 << 20).unwrap();
    // Between e^-2 and e^2: every token is expected dozens of times, as the statistic needs.
    let row = random(21, V);
    let generated = vec![0u32; DRAWS];
    for params in [
        base(1),
        SamplingParams { temperature: 0.7, ..base(2) },
        SamplingParams { top_k: 6, ..base(3) },
        SamplingParams { top_p: 0.8, ..base(4) },
        SamplingParams { min_p: 0.05, ..base(5) },
    ] {
        let mut counts = [0usize; V];
        for draws in generated.chunks(500).enumerate().map(|(i, chunk)| i * 500..i * 500 + chunk.len()) {
            let requests: Vec<SampleRequest> =
                draws.map(|n| SampleRequest { params: &params, prompt: &[], generated: &generated[..n] }).collect();
            let logits = tensor(&ctx, &[requests.len(), V], DType::F32, &row.repeat(requests.len()));
            for sampled in sample(&ctx, &logits, &requests).unwrap() {
                counts[sampled.token as usize] += 1;
            }
        }
        let expected = reference::distribution(&row, &SampleRequest { params: &params, prompt: &[], generated: &[] });
        assert_eq!(expected.iter().map(|&(token, _)| counts[token as usize]).sum::<usize>(), DRAWS, "{params:?}");
        let chi2: f64 = expected
            .iter()
            .map(|&(token, p)| (counts[token as usize] as f64 - p * DRAWS as f64).powi(2) / (p * DRAWS as f64))
            .sum();
        // 11 degrees of freedom at most: 31.3 is passed once in a thousand seeds; these seeds are fixed.
        assert!(chi2 < 31.3, "{params:?} {chi2}");
    }
}

/// Every token that a setting can give, by trying many draws.
fn support(logits: &[f32], params: &SamplingParams) -> Vec<u32> {
    let ctx = Ctx::cpu(1, 8 << 20).unwrap();
    let zeros = vec![0u32; 400];
    let requests: Vec<SampleRequest> =
        (0..400).map(|n| SampleRequest { params, prompt: &[], generated: &zeros[..n] }).collect();
    let rows = tensor(&ctx, &[400, logits.len()], DType::F32, &logits.repeat(400));
    let mut tokens: Vec<u32> = sample(&ctx, &rows, &requests).unwrap().iter().map(|sampled| sampled.token).collect();
    tokens.sort_unstable();
    tokens.dedup();
    tokens
}

#[test]
fn top_p_keeps_the_fewest_that_reach_it() {
    let equal = [1.5f32; 4];
    let top_p = |top_p| SamplingParams { top_p, ..base(0) };
    assert_eq!(support(&equal, &top_p(0.25)), [0]);
    assert_eq!(support(&equal, &top_p(0.5)), [0, 1]);
    assert_eq!(support(&equal, &top_p(0.500_001)), [0, 1, 2]);
    assert_eq!(support(&equal, &top_p(0.75)), [0, 1, 2]);
    assert_eq!(support(&equal, &top_p(1.0)), [0, 1, 2, 3]);
    assert_eq!(support(&[0.0, 3.0, 1.0], &top_p(1e-6)), [1]);
    // Of what top-k has left, half: one of two.
    assert_eq!(support(&equal, &SamplingParams { top_k: 2, ..top_p(0.5) }), [0]);
    // Longer than the first look of the search.
    let long = [0f32; 1000];
    assert!(support(&long, &top_p(0.25)).iter().all(|&token| token < 250));
    assert!(support(&long, &top_p(0.25)).len() > 150);
}

#[test]
fn top_k_and_min_p_keep_what_they_say() {
    let tied = [1.0f32, 2.0, 2.0, 2.0, 0.0];
    assert_eq!(support(&tied, &SamplingParams { top_k: 2, ..base(0) }), [1, 2]);
    assert_eq!(support(&tied, &SamplingParams { top_k: 4, temperature: 5.0, ..base(0) }), [0, 1, 2, 3]);
    assert_eq!(support(&tied, &SamplingParams { top_k: 99, temperature: 5.0, ..base(0) }), [0, 1, 2, 3, 4]);
    // e^-1 = 0.368 of the likeliest.
    assert_eq!(support(&tied, &SamplingParams { min_p: 0.36, ..base(0) }), [0, 1, 2, 3]);
    assert_eq!(support(&tied, &SamplingParams { min_p: 0.38, ..base(0) }), [1, 2, 3]);
    assert_eq!(support(&tied, &SamplingParams { min_p: 1.0, ..base(0) }), [1, 2, 3]);
}

#[test]
fn greedy_ties_go_to_the_lower_id_and_extremes_are_survived() {
    let greedy = SamplingParams::greedy();
    assert_eq!(support(&[1.0, 7.0, 7.0], &greedy), [1]);
    assert_eq!(support(&[f32::MIN, f32::MAX, 0.0], &base(0)), [1]);
    let push = SamplingParams { logit_bias: vec![(1, 100.0)], repetition_penalty: 1e-3, ..base(0) };
    assert_eq!(support(&[0.0, f32::MAX, f32::MIN], &push), [1]);
    assert_eq!(support(&[0.0, 1e-3, 0.0], &SamplingParams { temperature: 1e-5, ..base(0) }), [1]);
    assert_eq!(support(&[4.0], &base(0)), [0]);
}

#[test]
fn logprobs_come_from_the_raw_logits() {
    let ctx = Ctx::cpu(1, 1 << 16).unwrap();
    let logits = tensor(&ctx, &[1, 4], DType::F32, &[0.0, 2.0, 1.0, 2.0]);
    let params = SamplingParams { logprobs: Some(3), logit_bias: vec![(0, 50.0)], ..SamplingParams::greedy() };
    let request = SampleRequest { params: &params, prompt: &[], generated: &[] };
    let sampled = sample(&ctx, &logits, &[request]).unwrap().remove(0);
    assert_eq!((sampled.token, sampled.rank), (0, Some(4)));
    let total = (1.0 + 2.0 * 2f64.exp() + 1f64.exp()).ln();
    assert!((f64::from(sampled.logprob) + total).abs() < 1e-6);
    assert_eq!(sampled.top.iter().map(|&(token, _)| token).collect::<Vec<_>>(), [1, 3, 2]);
    assert!((f64::from(sampled.top[0].1) - (2.0 - total)).abs() < 1e-6);
    assert_eq!(sampled.top[0].1, sampled.top[1].1);
}

#[test]
fn a_broken_row_is_an_error_and_no_token() {
    for ctx in contexts() {
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut data = logits(1, 3 * 100);
            data[2 * 100 + 37] = value;
            let rows = tensor(&ctx, &[3, 100], DType::F32, &data);
            let params = base(0);
            let request = SampleRequest { params: &params, prompt: &[], generated: &[] };
            let error = sample(&ctx, &rows, &[request; 3]).unwrap_err().to_string();
            let expected =
                format!("sampler: row 2 of the logits has {value} at column 37, expected finite numbers only");
            assert_eq!(error, expected);
        }
    }
}

#[test]
fn wrong_arguments_are_named_and_meta_takes_the_same_memory() {
    let (cpu, meta) = (Ctx::cpu(1, 1 << 16).unwrap(), Ctx::meta());
    cpu.start_log();
    for ctx in [&cpu, &meta] {
        let rows = tensor(ctx, &[2, 10], DType::F32, &random(1, 20));
        let params = SamplingParams { logit_bias: vec![(10, 1.0)], ..base(0) };
        let wrong = SampleRequest { params: &params, prompt: &[], generated: &[] };
        let params = base(0);
        let right = SampleRequest { params: &params, ..wrong };
        let error = sample(ctx, &rows, &[right, wrong]).unwrap_err().to_string();
        assert_eq!(error, "sampler: logit_bias is 10, expected token ids below 10, the size of the vocabulary");
        let error = sample(ctx, &rows, &[right]).unwrap_err().to_string();
        assert_eq!(error, "sampler: logits is F32 [2, 10], expected F32 [1, 10]");
        assert_eq!(sample(ctx, &rows, &[right, right]).unwrap().len(), if ctx.is_meta() { 0 } else { 2 });
    }
    assert_eq!(cpu.take_log(), meta.take_log());
    assert_eq!(cpu.arena().peak(), meta.arena().peak());
}
