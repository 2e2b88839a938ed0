use moesaic_device::Arena;

use super::*;
use crate::matrix::testing::{Random, bits, contexts, f32_bits, poison};

#[test]
fn every_path_gives_the_bits_of_the_reference() {
    let mut random = Random::new(1);
    for i in 0..30 {
        let dtype = [DType::F32, DType::BF16, DType::F8E4M3][i % 3];
        let (t, h) = (*random.pick(&[1, 2, 5, 17, 40]), random.below(4) + 1);
        let (n, k) = (*random.pick(&[1, 16, 24, 40]), *random.pick(&[1, 20, 32, 64, 130]));
        let stride = k + random.below(10);
        let w: Vec<PackedMatrix> = (0..h).map(|_| random.matrix(n, k, dtype)).collect();
        let start = random.below(4);
        let x = random.tensor(&[t, start + h * stride], dtype.compute());
        let x = Cols { tensor: &x, start, len: h * stride };
        let expected = f32_bits(&reference::head_linear(x, stride, &w, DType::BF16));
        for ctx in contexts() {
            poison(&ctx);
            let y = head_linear(&ctx, x, stride, &w, DType::BF16).unwrap();
            assert_eq!(bits(&y), expected, "{dtype} T={t} H={h} N={n} K={k} on {}", ctx.isa());
        }
    }
}

#[test]
fn meta_records_what_a_real_run_records() {
    let mut random = Random::new(2);
    let w: Vec<PackedMatrix> = (0..3).map(|_| random.matrix(20, 24, DType::BF16)).collect();
    let x = random.tensor(&[4, 72], DType::BF16);
    let cpu = Ctx::cpu(2, 1 << 20).unwrap();
    cpu.start_log();
    head_linear(&cpu, &x, 24, &w, DType::F32).unwrap();
    let meta = Ctx::meta();
    let arena = Arena::meta("weights");
    let meta_w: Vec<PackedMatrix> = (0..3).map(|_| PackedMatrix::empty(&arena, 20, 24, DType::BF16).unwrap()).collect();
    let meta_x = meta.empty(&[4, 72], DType::BF16).unwrap();
    let before = meta.arena().in_use().0;
    head_linear(&meta, &meta_x, 24, &meta_w, DType::F32).unwrap();
    assert_eq!(cpu.take_log(), meta.take_log());
    assert_eq!(cpu.arena().peak().0, meta.arena().peak().0 - before);
}

#[test]
fn heads_beyond_x_are_refused() {
    let mut random = Random::new(3);
    let ctx = Ctx::cpu(1, 1 << 20).unwrap();
    let w: Vec<PackedMatrix> = (0..2).map(|_| random.matrix(4, 8, DType::F32)).collect();
    let x = random.tensor(&[1, 15], DType::F32);
    let error = head_linear(&ctx, &x, 8, &w, DType::F32).err().unwrap().to_string();
    assert_eq!(error, "head_linear: columns of x is 15, expected at least 16");
}
