use moesaic_device::{Arena, Pool};
use moesaic_spec::Bytes;

use super::*;
use crate::matrix::testing::{Random, arena, bits, contexts, f32_bits, poison};
use crate::matrix::{BlockScales, SourceMatrix};

fn random_experts(
    random: &mut Random,
    num: usize,
    (d, f): (usize, usize),
    dtype: DType,
    activation: Activation,
) -> ExpertWeights {
    let pool = Pool::new(1).unwrap();
    let mut pack = |rows: usize, cols: usize, pack: &mut dyn FnMut(&SourceMatrix)| {
        let bytes = random.bytes(rows * cols, dtype);
        let blocks = rows.div_ceil(128) * cols.div_ceil(128);
        let factors: Vec<f32> = (0..blocks).map(|_| random.value() / 256.0).collect();
        let scales = (dtype == DType::F8E4M3).then_some(BlockScales::new(&factors, [128, 128]));
        pack(&SourceMatrix { scales, ..SourceMatrix::new(&bytes, dtype, rows, cols) });
    };
    let experts = (0..num).map(|_| {
        let mut expert = ExpertWeight::empty(&arena(), d, f, dtype, activation).unwrap();
        if activation == Activation::SwiGlu {
            pack(f, d, &mut |src| expert.pack_gate(&pool, src).unwrap());
        }
        pack(f, d, &mut |src| expert.pack_up(&pool, src).unwrap());
        pack(d, f, &mut |src| expert.pack_down(&pool, src).unwrap());
        expert
    });
    ExpertWeights { experts: experts.collect(), activation }
}

#[test]
fn every_path_gives_the_bits_of_the_reference() {
    let mut random = Random::new(1);
    let cases: [&[usize]; 6] =
        [&[0, 1, 2, 3], &[0, 0, 5, 5], &[0, 40, 40, 40], &[0, 0, 0, 1], &[0, 3, 20, 57], &[0, 0, 0, 0]];
    for (i, offsets) in cases.into_iter().cycle().take(36).enumerate() {
        let dtype = [DType::F32, DType::BF16, DType::F8E4M3][i / 6 % 3];
        let activation = if i < 18 { Activation::SwiGlu } else { Activation::Gelu };
        let (d, f) = *random.pick(&[(1, 3), (16, 24), (32, 17), (33, 31), (100, 60), (64, 160), (48, 96)]);
        let w = random_experts(&mut random, 3, (d, f), dtype, activation);
        let x = random.tensor(&[offsets[3], d], dtype.compute());
        for out_dtype in [DType::F32, DType::BF16] {
            let expected = f32_bits(&reference::experts(&x, offsets, &w, out_dtype));
            for ctx in contexts() {
                poison(&ctx);
                let y = experts(&ctx, &x, RowsPerExpert::Known(offsets), &w, out_dtype).unwrap();
                assert_eq!(y.dtype(), out_dtype);
                assert_eq!(bits(&y), expected, "{dtype} {activation:?} {d} → {f}, {offsets:?} on {}", ctx.isa());
            }
        }
    }
}

#[test]
fn a_row_does_not_depend_on_its_batch() {
    let mut random = Random::new(2);
    let ctx = contexts().pop().unwrap();
    for dtype in [DType::F32, DType::BF16, DType::F8E4M3] {
        let w = random_experts(&mut random, 2, (64, 80), dtype, Activation::SwiGlu);
        let x = random.tensor(&[50, 64], dtype.compute());
        let together = bits(&experts(&ctx, &x, RowsPerExpert::Known(&[0, 20, 50]), &w, dtype.compute()).unwrap());
        let row_bytes = x.size_bytes() / 50;
        for row in [0, 19, 20, 49] {
            let one =
                crate::matrix::testing::tensor(&[1, 64], dtype.compute(), &x.bytes()[row * row_bytes..][..row_bytes]);
            let offsets = if row < 20 { [0, 1, 1] } else { [0, 0, 1] };
            let alone = experts(&ctx, &one, RowsPerExpert::Known(&offsets), &w, dtype.compute()).unwrap();
            assert_eq!(bits(&alone), together[row * 64..(row + 1) * 64], "{dtype} row {row}");
        }
    }
}

#[test]
fn a_fused_source_is_gate_then_up() {
    let mut random = Random::new(3);
    let (d, f) = (40, 21);
    let bytes = random.bytes(2 * f * d, DType::BF16);
    let (gate, up) = bytes.split_at(f * d * 2);
    let pool = Pool::new(2).unwrap();
    let empty = || ExpertWeight::empty(&arena(), d, f, DType::BF16, Activation::SwiGlu).unwrap();
    let (mut fused, mut parts) = (empty(), empty());
    fused.pack_gate_up(&pool, &SourceMatrix::new(&bytes, DType::BF16, 2 * f, d)).unwrap();
    parts.pack_gate(&pool, &SourceMatrix::new(gate, DType::BF16, f, d)).unwrap();
    parts.pack_up(&pool, &SourceMatrix::new(up, DType::BF16, f, d)).unwrap();
    let all = |w: &ExpertWeight| w.gate_up().panel(0, w.gate_up().panels()).to_vec();
    assert!(all(&fused) == all(&parts));
    let wrong = parts.pack_gate(&pool, &SourceMatrix::new(&bytes, DType::BF16, 2 * f, d)).unwrap_err().to_string();
    assert_eq!(wrong, "experts: gate is 42 rows, expected 21 rows");
}

#[test]
fn meta_records_what_a_real_run_records_and_bounds_what_it_cannot_know() {
    let mut random = Random::new(4);
    let w = random_experts(&mut random, 4, (48, 40), DType::BF16, Activation::SwiGlu);
    let x = random.tensor(&[6, 48], DType::BF16);
    let cpu = Ctx::cpu(2, 1 << 20).unwrap();
    cpu.start_log();
    let offsets = [0, 2, 2, 5, 6];
    experts(&cpu, &x, RowsPerExpert::Known(&offsets), &w, DType::BF16).unwrap();

    let meta = Ctx::meta();
    let empty = || ExpertWeight::empty(&Arena::meta("weights"), 48, 40, DType::BF16, Activation::SwiGlu).unwrap();
    let meta_w = ExpertWeights { experts: (0..4).map(|_| empty()).collect(), activation: Activation::SwiGlu };
    let meta_x = meta.empty(&[6, 48], DType::BF16).unwrap();
    let before = meta.arena().in_use();
    experts(&meta, &meta_x, RowsPerExpert::Known(&offsets), &meta_w, DType::BF16).unwrap();
    let real = cpu.take_log();
    assert_eq!(real, meta.take_log());
    assert_eq!(real[0].flops, Amount::exact(2 * 3 * 6 * 48 * 40));
    assert_eq!(cpu.arena().peak(), Bytes(meta.arena().peak().0 - before.0));

    let uniform_of = |num_tokens, top_k, num_experts| RowsPerExpert::Uniform { num_tokens, top_k, num_experts };
    experts(&meta, &meta_x, uniform_of(3, 2, 4), &meta_w, DType::BF16).unwrap();
    let uniform = meta.take_log().remove(0);
    let weight = w.experts[0].size_bytes().0 as f64;
    let values = (6 * (48 + 40) * 2 * 2) as f64;
    assert_eq!(uniform.bytes.bound as f64, 4.0 * weight + values);
    assert_eq!(uniform.bytes.expected, 3.5 * weight + values); // 4 (1 - (1/2)^3)
    assert_eq!(uniform.flops, real[0].flops);

    // These are 4 of 16 experts: a token that may send all of its 2 rows here sends half a row on average.
    experts(&meta, &meta_x, uniform_of(3, 2, 16), &meta_w, DType::F32).unwrap();
    let part = meta.take_log().remove(0);
    let flops = (2 * 3 * 48 * 40) as u64;
    assert_eq!(part.flops, Amount { expected: 1.5 * flops as f64, bound: 6 * flops });
    let row_bytes = ((48 + 2 * 40) * 2 + 48 * 4) as f64;
    assert_eq!(part.bytes.bound as f64, 4.0 * weight + 6.0 * row_bytes);
    let active = 4.0 * (1.0 - (7.0f64 / 8.0).powi(3));
    assert_eq!(part.bytes.expected, active * weight + 1.5 * row_bytes);
}

#[test]
fn wrong_offsets_are_refused() {
    let mut random = Random::new(5);
    let ctx = Ctx::cpu(1, 1 << 20).unwrap();
    let w = random_experts(&mut random, 2, (8, 8), DType::F32, Activation::Gelu);
    let x = random.tensor(&[3, 8], DType::F32);
    for offsets in [&[0, 3][..], &[0, 2, 4], &[1, 2, 3], &[0, 4, 3]] {
        let error = experts(&ctx, &x, RowsPerExpert::Known(offsets), &w, DType::F32).err().unwrap().to_string();
        assert_eq!(error, format!("experts: offsets is {offsets:?}, expected 3 ascending from 0 to 3"));
    }
    let uniform = RowsPerExpert::Uniform { num_tokens: 3, top_k: 1, num_experts: 2 };
    let error = experts(&ctx, &x, uniform, &w, DType::F32).err().unwrap().to_string();
    assert_eq!(error, "experts: rows of each expert is uniform, expected known");
    let error = experts(&ctx, &x, RowsPerExpert::Known(&[0, 1, 3]), &w, DType::I32).err().unwrap().to_string();
    assert_eq!(error, "experts: type of the result is I32, expected F32 or BF16");
}
