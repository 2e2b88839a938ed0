//! The whole model against PyTorch's logits; `tests/goldens/README.md` says what is in the folders and which limits hold.

mod common;

use common::{GoldenModel, config, golden_names, greedy, run};
use moesaic_engine::EngineConfig;
use moesaic_model::LoadDType;
use moesaic_spec::{DType, ModelSpec};
use safetensors::SafeTensors;

/// ‖a − b‖ / ‖b‖, as `compare.py` has them.
const F32_LIMIT: f64 = 1e-4;
const BF16_LIMIT: f64 = 1e-2;
const FP8_LIMIT: f64 = 2e-2;
/// A router gap, in logits, that BF16 may flip.
const ROUTER_FENCE: f32 = 0.03;

/// What a run of a prompt said.
struct Logits {
    prefill: Vec<Vec<f32>>, // [P, V]
    decode: Vec<Vec<f32>>,  // [S, V]
    token_ids: Vec<u32>,    // [S + 1]
}

/// A run of PyTorch.
struct Golden {
    prompt_ids: Vec<u32>,
    logits: Logits,
    top2_margin: Vec<f32>,   // [S + 1]
    router_margin: Vec<f32>, // [P + S]
}

fn read(model: &GoldenModel, file: &str) -> Option<Golden> {
    let bytes = std::fs::read(model.folder.join(file)).ok()?;
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let f32s = |name: &str| -> Vec<f32> {
        let data = tensors.tensor(name).unwrap().data().to_vec();
        data.as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b)).collect()
    };
    let ids = |name: &str| -> Vec<u32> {
        let data = tensors.tensor(name).unwrap().data().to_vec();
        data.as_chunks::<8>().0.iter().map(|&b| i64::from_le_bytes(b).try_into().unwrap()).collect()
    };
    let rows = |name: &str| f32s(name).chunks(model.spec.vocab_size).map(<[f32]>::to_vec).collect();
    Some(Golden {
        prompt_ids: ids("prompt_ids"),
        logits: Logits { prefill: rows("prefill_logits"), decode: rows("decode_logits"), token_ids: ids("token_ids") },
        top2_margin: f32s("top2_margin"),
        router_margin: f32s("router_margin"),
    })
}

/// The same prompt through the engine.
fn answer(model: &GoldenModel, spec: &ModelSpec, dtype: LoadDType, golden: &Golden) -> Logits {
    let config = EngineConfig { dtype, keep_logits: true, ..config() };
    let mut engine = model.launch(spec, &config);
    let request = greedy(&golden.prompt_ids, golden.logits.token_ids.len());
    let events = run(&mut engine, &[request]).remove(0);
    let mut rows = engine.take_logits(events[0].id);
    let decode = rows.split_off(&golden.prompt_ids.len());
    Logits {
        prefill: rows.into_values().collect(),
        decode: decode.into_values().collect(),
        token_ids: events.iter().map(|event| event.token).collect(),
    }
}

/// How far one run is from another.
struct Comparison {
    /// Over all rows for as long as both fed the same tokens.
    error: f64,
    /// Rows before the first at which a router is on the fence.
    undisturbed: usize,
    /// Over those; `None` if there are none.
    undisturbed_error: Option<f64>,
    /// The median of the decode rows' own errors.
    typical_decode_error: Option<f64>,
    /// They differ nowhere, or first where errors within the limit explain it.
    tokens_ok: bool,
    same_tokens: usize,
    /// The row with the largest error of its own, and that error.
    worst_row: (usize, f64),
}

fn compare(got: &Logits, want: &Golden, limit: f64) -> Comparison {
    let prompt_len = want.logits.prefill.len();
    assert_eq!(got.prefill.len(), prompt_len, "a row for every token of the prompt");
    assert_eq!(got.decode.len() + 1, got.token_ids.len(), "a row for every token that was fed back");
    assert_eq!(got.token_ids.len(), want.logits.token_ids.len());
    let same_tokens = got.token_ids.iter().zip(&want.logits.token_ids).take_while(|(a, b)| a == b).count();
    let steps = same_tokens.min(want.logits.decode.len());
    let a: Vec<&[f32]> = got.prefill.iter().chain(&got.decode[..steps]).map(Vec::as_slice).collect();
    let b: Vec<&[f32]> = want.logits.prefill.iter().chain(&want.logits.decode[..steps]).map(Vec::as_slice).collect();
    let on_fence = want.router_margin[..b.len()].iter().position(|&margin| margin < ROUTER_FENCE);
    let undisturbed = on_fence.unwrap_or(b.len());
    let row_errors: Vec<f64> = a.iter().zip(&b).map(|(&a, &b)| relative_error(&[a], &[b])).collect();
    let mut decode_errors = row_errors[prompt_len..].to_vec();
    decode_errors.sort_by(f64::total_cmp);
    let tokens_ok = same_tokens == got.token_ids.len() || {
        let row = prompt_len - 1 + same_tokens;
        // An error of `limit` is spread over the row; single logits move by a few times its root mean square.
        let mean_square = b[row].iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / b[row].len() as f64;
        row >= undisturbed || f64::from(want.top2_margin[same_tokens]) <= 4.0 * limit * mean_square.sqrt()
    };
    let worst = (0..row_errors.len()).max_by(|&i, &j| row_errors[i].total_cmp(&row_errors[j])).unwrap();
    Comparison {
        error: relative_error(&a, &b),
        undisturbed,
        undisturbed_error: (undisturbed > 0).then(|| relative_error(&a[..undisturbed], &b[..undisturbed])),
        typical_decode_error: decode_errors.get(decode_errors.len().saturating_sub(1) / 2).copied(),
        tokens_ok,
        same_tokens,
        worst_row: (worst, row_errors[worst]),
    }
}

fn relative_error(a: &[&[f32]], b: &[&[f32]]) -> f64 {
    let norm = |squares: &mut dyn Iterator<Item = f64>| squares.sum::<f64>().sqrt();
    let pairs = || a.iter().copied().flatten().zip(b.iter().copied().flatten());
    let difference = norm(&mut pairs().map(|(&a, &b)| (f64::from(a) - f64::from(b)).powi(2)));
    difference / norm(&mut pairs().map(|(_, &b)| f64::from(b).powi(2)))
}

/// Collects what is beyond its limit, so that one run of the test shows every case.
#[derive(Default)]
struct Failures(Vec<String>);

impl Failures {
    fn check(&mut self, what: &str, compared: &Comparison, errors: &[(&str, Option<f64>, f64)]) {
        let (row, row_error) = compared.worst_row;
        for &(over, error, limit) in errors {
            // NaN is beyond every limit; nothing to compare is not.
            if error.is_some_and(|error| error.is_nan() || error > limit) {
                let error = error.unwrap();
                self.0.push(format!(
                    "{what}: {over}: error {error:.2e}, limit {limit:.2e}; worst row {row} has {row_error:.2e}"
                ));
            }
        }
        if !compared.tokens_ok {
            self.0.push(format!(
                "{what}: token {} differs and is no near tie; worst row {row} has {row_error:.2e}",
                compared.same_tokens
            ));
        }
    }

    fn none(self) {
        assert!(self.0.is_empty(), "{} beyond their limits:\n{}", self.0.len(), self.0.join("\n"));
    }
}

#[test]
fn f32_is_the_function_that_pytorch_computes() {
    let mut failures = Failures::default();
    for name in golden_names() {
        let model = GoldenModel::open(&name);
        let golden = read(&model, "golden.safetensors").unwrap();
        let got = answer(&model, &model.without_capacity(), LoadDType::Float32, &golden);
        let compared = compare(&got, &golden, F32_LIMIT);
        failures.check(&format!("{name}, F32"), &compared, &[("all rows", Some(compared.error), F32_LIMIT)]);
    }
    failures.none();
}

#[test]
fn full_experts_drop_the_tokens_that_pytorch_drops() {
    let mut failures = Failures::default();
    let mut num_cases = 0;
    for name in golden_names() {
        let model = GoldenModel::open(&name);
        let Some(golden) = read(&model, "golden-capacity.safetensors") else { continue };
        let with = answer(&model, &model.spec, LoadDType::Float32, &golden);
        let compared = compare(&with, &golden, F32_LIMIT);
        failures.check(&format!("{name}, capacity"), &compared, &[("prefill", Some(compared.error), F32_LIMIT)]);
        let without = answer(&model, &model.without_capacity(), LoadDType::Float32, &golden);
        assert!(compare(&without, &golden, F32_LIMIT).error > 10.0 * F32_LIMIT, "{name}: nothing was dropped");
        num_cases += 1;
    }
    assert_eq!(num_cases, 2);
    failures.none();
}

#[test]
fn bf16_is_as_near_as_eight_bits_allow() {
    let mut failures = Failures::default();
    let mut num_cases = 0;
    for name in golden_names() {
        let model = GoldenModel::open(&name);
        let golden = read(&model, "golden.safetensors").unwrap();
        let Some(peer) = read(&model, "golden-bf16.safetensors") else { continue };
        // Arithmetic in BF16 cannot be asked to be nearer to F32 than PyTorch's.
        let peers = compare(&peer.logits, &golden, BF16_LIMIT);
        let limit = BF16_LIMIT.max(peers.undisturbed_error.unwrap_or(0.0));
        let decode_limit = BF16_LIMIT.max(1.5 * peers.typical_decode_error.unwrap());
        let got = answer(&model, &model.without_capacity(), LoadDType::BFloat16, &golden);
        let compared = compare(&got, &golden, limit);
        let what = format!("{name}, BF16, {} undisturbed rows", compared.undisturbed);
        let errors = [
            ("undisturbed rows", compared.undisturbed_error, limit),
            ("median decode row", compared.typical_decode_error, decode_limit),
        ];
        failures.check(&what, &compared, &errors);
        // Both have errors.
        let between = compare(&got, &peer, 2.0 * limit);
        failures.check(&format!("{name}, BF16 against PyTorch's BF16"), &between, &[]);
        num_cases += 1;
    }
    assert!(num_cases >= 15, "{num_cases}");
    failures.none();
}

#[test]
fn fp8_weights_stay_fp8_and_near() {
    let mut failures = Failures::default();
    let mut num_cases = 0;
    for name in golden_names() {
        let model = GoldenModel::open(&name);
        if model.checkpoint.names().all(|name| model.checkpoint.get(name).unwrap().dtype != DType::F8E4M3) {
            continue;
        }
        let golden = read(&model, "golden.safetensors").unwrap();
        for dtype in [LoadDType::Auto, LoadDType::BFloat16] {
            let compared = compare(&answer(&model, &model.spec, dtype, &golden), &golden, FP8_LIMIT);
            let errors = [
                ("undisturbed rows", compared.undisturbed_error, FP8_LIMIT),
                ("median decode row", compared.typical_decode_error, FP8_LIMIT),
            ];
            failures.check(
                &format!("{name}, {dtype:?}, {} undisturbed rows", compared.undisturbed),
                &compared,
                &errors,
            );
        }
        num_cases += 1;
    }
    assert_eq!(num_cases, 1);
    failures.none();
}
