//! Prices of ops: physics as properties, tables that are refused, what is read from parameters.

use moesaic_planner::cost::validate::{Split, cross_validate};
use moesaic_planner::cost::{CostModel, Learned, Op, Phase, Precision, Source, Stack, parse, published, roofline};
use moesaic_spec::{Gpu, gpu_preset};
use proptest::prelude::*;

const STACKS: [Stack; 3] = [Stack::Trtllm, Stack::Vllm, Stack::Sglang];
const PRECISIONS: [Precision; 6] =
    [Precision::F32, Precision::Bf16, Precision::Fp8, Precision::Fp8Block, Precision::F4, Precision::Int4];

fn gpu(name: &str) -> Gpu {
    gpu_preset(name).unwrap()
}

fn any_gpu() -> impl Strategy<Value = Gpu> {
    let names = ["h100-sxm", "h200-sxm", "a100-sxm-80gb", "h800", "h20", "b200"];
    (prop::sample::select(names.to_vec()), 0.3..3.0, 0.3..3.0).prop_map(|(name, compute, memory)| {
        let mut gpu = gpu(name);
        faster(&mut gpu, compute, memory);
        gpu
    })
}

fn faster(gpu: &mut Gpu, compute: f64, memory: f64) {
    let peak = &mut gpu.peak_flops;
    [&mut peak.f32, &mut peak.bf16, &mut peak.f8, &mut peak.f4].into_iter().for_each(|flops| *flops *= compute);
    gpu.memory_bandwidth *= memory;
}

fn any_op() -> impl Strategy<Value = Op> {
    // Sizes by their logarithm, so that small ones are as frequent as large ones.
    let size = |most: f64| (0.0..most.ln()).prop_map(f64::exp);
    let precision = || prop::sample::select(PRECISIONS.to_vec());
    let heads = || prop::sample::select(vec![1_u64, 2, 8, 32, 64, 128]);
    let even = (size(512.0), size(131072.0), heads(), heads(), precision());
    prop_oneof![
        (size(16384.0), size(65536.0), size(32768.0), precision()).prop_map(|(m, n, k, weights)| Op::Gemm {
            m,
            n,
            k,
            weights
        }),
        (size(65536.0), size(16384.0), size(16384.0), 1.0..8.0_f64, size(64.0), 0.0..1.5_f64, precision()).prop_map(
            |(tokens, hidden, intermediate, top_k, ep, skew, weights)| Op::Experts {
                tokens,
                hidden,
                intermediate,
                top_k,
                experts: 128.0,
                tp: 2.0,
                ep,
                weights,
                matrices: 3,
                skew,
            }
        ),
        (size(65536.0), 1.0..8.0_f64, size(256.0), 0.0..1.5_f64, precision(), any::<bool>()).prop_map(
            |(tokens, top_k, ep, skew, weights, prompt)| Op::ExpertsDeepEp {
                tokens,
                hidden: 7168.0,
                intermediate: 2048.0,
                top_k,
                experts: 256.0,
                ep,
                weights,
                skew,
                phase: if prompt { Phase::Context } else { Phase::Generation },
            }
        ),
        even.clone().prop_map(|(seqs, context, heads, kv_heads, kv)| Op::AttentionDecode {
            seqs,
            context,
            heads: heads.max(kv_heads),
            kv_heads,
            head_dim: 128,
            kv,
        }),
        even.clone().prop_map(|(seqs, context, heads, kv_heads, kv)| Op::AttentionPrefill {
            seqs,
            new_tokens: context / 2.0 + 0.5,
            context,
            heads: heads.max(kv_heads),
            kv_heads,
            head_dim: 128,
            kv,
        }),
        even.clone().prop_map(|(seqs, context, heads, _, kv)| Op::MlaDecode {
            seqs,
            context,
            heads,
            latent: 512,
            rope: 64,
            kv,
        }),
        even.prop_map(|(seqs, context, heads, _, kv)| Op::MlaPrefill {
            seqs,
            new_tokens: context,
            context,
            heads,
            latent: 512,
            rope: 64,
            kv,
        }),
        (size(1e12), size(1e10), precision()).prop_map(|(flops, bytes, precision)| Op::Stream {
            flops,
            bytes,
            precision
        }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn a_faster_gpu_is_never_slower(
        gpu in any_gpu(),
        stack in prop::sample::select(STACKS.to_vec()),
        op in any_op(),
        compute in 1.0..4.0_f64,
        memory in 1.0..4.0_f64,
    ) {
        let before = CostModel::new(&gpu, stack).price(&op);
        for (compute, memory) in [(compute, 1.0), (1.0, memory), (compute, memory)] {
            let mut other = gpu.clone();
            faster(&mut other, compute, memory);
            let after = CostModel::new(&other, stack).price(&op);
            prop_assert!(after.seconds <= before.seconds * (1.0 + 1e-12), "{before:?}, {after:?}");
        }
    }

    #[test]
    fn nothing_is_faster_than_physics(
        gpu in any_gpu(),
        stack in prop::sample::select(STACKS.to_vec()),
        op in any_op(),
    ) {
        let price = CostModel::new(&gpu, stack).price(&op);
        prop_assert!(price.seconds.is_finite() && price.sd > 0.0 && price.sd.is_finite(), "{price:?}");
        prop_assert!(price.seconds >= roofline::bound(&gpu, &op), "{price:?}");
    }
}

#[test]
fn what_a_price_rests_on_is_said() {
    fn shared<T: Send + Sync + Clone>() {}
    shared::<CostModel>();
    let h100 = CostModel::new(&gpu("h100-sxm"), Stack::Trtllm);
    let gemm = Op::Gemm { m: 64.0, n: 4096.0, k: 4096.0, weights: Precision::Bf16 };
    assert_eq!(h100.price(&gemm).source, Source::Table);
    // vLLM has no rows of products: those of another stack speak, less surely.
    let borrowed = h100.on(&gpu("h100-sxm"), Stack::Vllm).price(&gemm);
    assert_eq!(borrowed.source, Source::Predictor);
    assert!(borrowed.sd > h100.price(&gemm).sd);
    assert_eq!(CostModel::new(&gpu("b200"), Stack::Trtllm).price(&gemm).source, Source::Predictor);
    let norm = Op::Stream { flops: 1e6, bytes: 1e6, precision: Precision::Bf16 };
    assert_eq!(h100.price(&norm).source, Source::Roofline);
}

#[test]
fn rows_of_tables_are_met() {
    let rows = published::rows();
    assert_eq!(rows.len(), 5_879);
    let model = CostModel::new(&gpu("h200-sxm"), Stack::Trtllm);
    let mut errors: Vec<f64> = rows
        .iter()
        .step_by(17)
        .map(|row| {
            let gpu = &published::device(&row.device).unwrap().gpu;
            let price = model.on(gpu, row.stack).price_kernel(&row.op, Some(&row.kernel));
            (price.seconds / row.seconds - 1.0).abs()
        })
        .collect();
    errors.sort_by(f64::total_cmp);
    // These rows were learned from; what is left is the noise that kriging sees in them.
    assert!(errors[errors.len() / 2] < 0.03, "{}", errors[errors.len() / 2]);
}

fn refusal(text: &str) -> String {
    parse(text, "t.csv", "h100_sxm", &gpu("h100-sxm"), "gemm").unwrap_err().to_string()
}

#[test]
fn tables_that_cannot_be_are_refused() {
    let head = "# source: a test\ndtype,m,n,k,framework,version,latency_us\n";
    let good = format!("{head}bfloat16,64,4096,4096,TRTLLM,1,30.5\n");
    let rows = parse(&good, "t.csv", "h100_sxm", &gpu("h100-sxm"), "gemm").unwrap();
    assert_eq!((rows.len(), rows[0].seconds, rows[0].stack), (1, 30.5e-6, Stack::Trtllm));
    for (row, sentence) in [
        ("bfloat16,64,4096,4096,TRTLLM,1,0", "line 3, column latency_us: 0 is not a time above 0"),
        ("bfloat16,64,4096,4096,TRTLLM,1,NaN", "line 3, column latency_us: NaN is not a time above 0"),
        ("bfloat16,-1,4096,4096,TRTLLM,1,9", "line 3, column m: -1 is not a number above 0"),
        (
            "float7,64,4096,4096,TRTLLM,1,9",
            "line 3, column dtype: float7 is not float32, bfloat16, fp8, fp8_block, nvfp4 or int4",
        ),
        ("bfloat16,64,4096,4096,NoSuch,1,9", "line 3, column framework: NoSuch is not known"),
        ("bfloat16,64,4096,4096,TRTLLM,1", "line 3: 6 values for 7 columns"),
    ] {
        let message = refusal(&format!("{head}{row}\n"));
        assert!(message.contains(sentence), "{message}");
    }
    let fast = refusal(&format!("{head}bfloat16,8192,12288,7168,TRTLLM,1,900\n"));
    assert!(
        fast.contains("line 3, column latency_us: 900.000 µs is faster than physics: H100 SXM 80GB needs 1459"),
        "{fast}"
    );
    let column = refusal("dtype,m,n,k,colour,framework,version,latency_us\n");
    assert!(column.contains("line 1, column colour: is not known"), "{column}");
    assert!(refusal("dtype,m,n,k,framework,version\n").contains("column latency_us: is missing"));
    assert!(refusal("").contains("the table is empty"));
}

#[test]
fn ops_are_read_from_parameters() {
    let read = |op: &str, text: &str| Op::from_params(op, &serde_json::from_str(text).unwrap());
    let moe = read(
        "moe",
        r#"{"model":"x","dtype":"fp8_block","tokens":8,"h":2048,"inter":768,"topk":8,"E":128,"tp":1,"ep":2,"dist":"power_law_1.2"}"#,
    );
    let expected = Op::Experts {
        tokens: 8.0,
        hidden: 2048.0,
        intermediate: 768.0,
        top_k: 8.0,
        experts: 128.0,
        tp: 1.0,
        ep: 2.0,
        weights: Precision::Fp8Block,
        matrices: 3,
        skew: 1.2,
    };
    assert_eq!(moe.unwrap(), expected);
    let missing = read("gemm", r#"{"dtype":"fp8","m":1,"n":2}"#).unwrap_err().to_string();
    assert_eq!(missing, "k is nothing, and should be a value");
    let skew =
        read("moe_wideep_context", r#"{"dtype":"fp8","tokens":1,"h":1,"inter":1,"topk":1,"E":1,"ep":1,"dist":"odd"}"#);
    assert!(skew.unwrap_err().to_string().starts_with("dist is odd"));
    assert!(read("conv", "{}").unwrap_err().to_string().starts_with("op is conv, and should be one of gemm"));
}

#[test]
fn a_row_that_is_held_out_has_no_say_in_its_price() {
    let few =
        |row: &moesaic_planner::cost::Row| row.device == "a100_sxm" && matches!(row.op, Op::AttentionPrefill { .. });
    let rows: Vec<_> = published::rows().into_iter().filter(few).collect();
    let learned = Learned::train(&rows);
    let mut other = rows.clone();
    other[7].seconds *= 3.0;
    let (before, after) =
        (cross_validate(&rows, &learned, Split::Rows, 5), cross_validate(&other, &learned, Split::Rows, 5));
    assert_eq!((before.len(), after.len()), (rows.len(), rows.len()));
    let price = |held_out: &[moesaic_planner::cost::validate::HeldOut], op: &Op, stack| {
        held_out.iter().find(|held| held.row.op == *op && held.row.stack == stack).map(|held| held.seconds)
    };
    let (op, stack) = (rows[7].op, rows[7].stack);
    assert_eq!(price(&before, &op, stack), price(&after, &op, stack));
    // The others learned from it.
    let moved = rows.iter().filter(|row| price(&before, &row.op, row.stack) != price(&after, &row.op, row.stack));
    assert!(moved.count() > rows.len() / 2);
    let mut errors: Vec<f64> = before.iter().map(|held| held.error()).collect();
    errors.sort_by(f64::total_cmp);
    assert!(errors[errors.len() / 2] < 0.1, "{errors:?}");
}
