use moesaic_device::{Ctx, Isa};
use moesaic_spec::DType;

use super::*;
use crate::matrix::SourceMatrix;
use crate::matrix::testing::{Random, bits, contexts, poison, tensor};

#[test]
fn every_path_gives_the_bits_of_the_reference() {
    let mut random = Random::new(1);
    for (i, dtype) in [DType::F32, DType::BF16, DType::F8E4M3].into_iter().cycle().take(60).enumerate() {
        let n = *random.pick(&[1, 3, 16, 17, 33, 48, 64, 100]);
        let k = *random.pick(&[1, 31, 32, 33, 96, 100, 128, 160, 257]);
        let t = if i < 40 { i + 1 } else { random.below(70) + 1 };
        let w = random.matrix(n, k, dtype);
        let start = random.below(5);
        let x = random.tensor(&[t, k + start + 3], dtype.compute());
        let bias = random.tensor(&[n], DType::F32);
        let out = *random.pick(&[DType::F32, DType::BF16]);
        let bias = (i % 2 == 0).then_some(&bias);
        let x = Cols { tensor: &x, start, len: k };
        let expected = reference::linear(x, &w, bias, out);
        for ctx in contexts() {
            poison(&ctx);
            let y = linear_bias(&ctx, x, &w, bias, out).unwrap();
            assert_eq!(
                bits(&y),
                crate::matrix::testing::f32_bits(&expected),
                "{dtype} [{t}, {n}, {k}] on {}",
                ctx.isa()
            );
        }
    }
}

#[test]
fn the_reference_is_accurate() {
    let mut random = Random::new(2);
    for dtype in [DType::F32, DType::BF16, DType::F8E4M3] {
        let (t, n, k) = (3, 20, 300);
        let (w, x) = (random.matrix(n, k, dtype), random.tensor(&[t, k], dtype.compute()));
        let y = reference::linear(&x, &w, None, DType::F32);
        for t in 0..t {
            for n in 0..n {
                let mut row = vec![0.0; k];
                w.row_to_f32(n, &mut row);
                let products =
                    row.iter().zip(reference::row(&(&x).into(), t)).map(|(w, x)| f64::from(*w) * f64::from(x));
                let (exact, size) = products.fold((0.0, 0.0), |(sum, size), p| (sum + p, size + p.abs()));
                // Each product goes through at most k + 1 roundings.
                let limit = size * f64::from(f32::EPSILON) * k as f64;
                assert!((f64::from(y[t * w.n() + n]) - exact).abs() <= limit, "{dtype} {t} {n}");
            }
        }
    }
}

#[test]
fn a_row_does_not_depend_on_its_batch() {
    let mut random = Random::new(3);
    let ctx = contexts().pop().unwrap();
    for dtype in [DType::F32, DType::BF16, DType::F8E4M3] {
        let (t, n, k) = (40, 50, 200);
        let (w, x) = (random.matrix(n, k, dtype), random.tensor(&[t, k], dtype.compute()));
        let together = bits(&linear(&ctx, &x, &w, DType::F32).unwrap());
        for row in [0, 7, 39] {
            let size = x.size_bytes() / t;
            let alone = tensor(&[1, k], dtype.compute(), &x.bytes()[row * size..(row + 1) * size]);
            let alone = linear(&ctx, &alone, &w, DType::F32).unwrap();
            assert_eq!(bits(&alone), together[row * n..(row + 1) * n], "{dtype} row {row}");
        }
    }
}

#[test]
fn subnormals_count_as_zero_in_every_path() {
    let tiny = half::bf16::from_bits(0x8001);
    let big = half::bf16::from_f32(1e38);
    let row: Vec<u8> = [tiny, big].iter().flat_map(|v| v.to_le_bytes()).collect();
    let swapped: Vec<u8> = [big, tiny].iter().flat_map(|v| v.to_le_bytes()).collect();
    for ctx in contexts() {
        let mut w = PackedMatrix::empty(
            &moesaic_device::Arena::host("test", moesaic_spec::Bytes(1 << 20)).unwrap(),
            1,
            2,
            DType::BF16,
        )
        .unwrap();
        w.pack_rows(ctx.pool(), 0, &SourceMatrix::new(&row, DType::BF16, 1, 2)).unwrap();
        for t in [1, 20] {
            let y = linear(&ctx, &tensor(&[t, 2], DType::BF16, &swapped.repeat(t)), &w, DType::F32).unwrap();
            assert!(y.f32().iter().all(|&y| y == 0.0), "{}: {:?}", ctx.isa(), y.f32());
        }
    }
}

#[test]
fn meta_records_what_a_real_run_records() {
    let mut random = Random::new(4);
    let (w, x) = (random.matrix(33, 50, DType::BF16), random.tensor(&[4, 50], DType::BF16));
    let cpu = Ctx::cpu_with(
        moesaic_device::Arena::host("activation", moesaic_spec::Bytes(1 << 20)).unwrap(),
        std::sync::Arc::new(moesaic_device::Pool::new(2).unwrap()),
        Isa::Portable,
    );
    cpu.start_log();
    linear(&cpu, &x, &w, DType::F32).unwrap();
    let meta = Ctx::meta();
    let meta_w = PackedMatrix::empty(&moesaic_device::Arena::meta("weights"), 33, 50, DType::BF16).unwrap();
    let meta_x = meta.empty(&[4, 50], DType::BF16).unwrap();
    let before = meta.arena().peak().0;
    linear(&meta, &meta_x, &meta_w, DType::F32).unwrap();
    assert_eq!(cpu.take_log(), meta.take_log());
    assert_eq!(cpu.arena().peak().0, meta.arena().peak().0 - before);
}

#[test]
fn wrong_types_and_sizes_are_refused() {
    let mut random = Random::new(5);
    let ctx = Ctx::cpu(1, 1 << 20).unwrap();
    let w = random.matrix(8, 40, DType::BF16);
    let message = |x: Tensor, out| linear(&ctx, &x, &w, out).err().unwrap().to_string();
    let wrong = message(random.tensor(&[2, 40], DType::F32), DType::F32);
    assert_eq!(wrong, "linear: type of x is F32, expected BF16 for BF16 weights");
    let wrong = message(random.tensor(&[2, 39], DType::BF16), DType::F32);
    assert_eq!(wrong, "linear: columns of x is 39, expected 40");
    let wrong = message(random.tensor(&[2, 40], DType::BF16), DType::I32);
    assert_eq!(wrong, "linear: type of the result is I32, expected F32 or BF16");
}
