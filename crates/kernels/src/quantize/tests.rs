use super::*;
use crate::testing::{ACTIVATIONS, contexts, random, tensor, values};
use moesaic_spec::Bytes;

const FORMATS: [Format; 2] = [Format::Int8, Format::E4m3];
const WIDTHS: [usize; 6] = [1, 7, 128, 129, 300, 512];

fn arena() -> Arena {
    Arena::host("message", Bytes(4 << 20)).unwrap()
}

/// Rows whose groups have very different magnitudes, zeros among them.
fn rows(t: usize, d: usize) -> Vec<f32> {
    let magnitude = |i: usize| 10f32.powi((i / GROUP % 13) as i32 * 5 - 35);
    let x = random(5, t * d);
    x.iter().enumerate().map(|(i, x)| if i % 11 == 0 { 0.0 } else { x.powi(3) * magnitude(i) }).collect()
}

#[test]
fn the_bits_of_the_reference_on_every_path() {
    for ctx in contexts() {
        for (d, dtype) in WIDTHS.iter().flat_map(|&d| ACTIVATIONS.map(|dtype| (d, dtype))) {
            for format in FORMATS {
                let t = 5;
                let x = tensor(&ctx, &[t, d], dtype, &rows(t, d));
                let out = quantize(&ctx, &x, format, &arena()).unwrap();
                assert_eq!((out.values.dtype(), out.values.dims()), (format.dtype(), &[t, d][..]));
                let mut back = Vec::new();
                let given = values(&x);
                let (codes, factors): (Vec<_>, Vec<_>) =
                    given.chunks(d).map(|row| reference::quantize_row(row, format)).unzip();
                assert_eq!(out.values.u8(), codes.concat(), "{format:?} {dtype} {d}");
                assert_eq!(out.scales.f32(), factors.concat());
                for (codes, factors) in codes.iter().zip(&factors) {
                    let factor = |i: usize| factors[i / GROUP];
                    back.extend(codes.iter().enumerate().map(|(i, &c)| reference::value(c, format) * factor(i)));
                }
                for dtype in ACTIVATIONS {
                    let expected = values(&tensor(&ctx, &[t, d], dtype, &back));
                    assert_eq!(values(&dequantize(&ctx, &out, dtype).unwrap()), expected, "{format:?} {dtype} {d}");
                }
            }
        }
    }
}

#[test]
fn no_value_is_further_off_than_the_contract_says() {
    let ctx = contexts().pop().unwrap();
    let (t, d) = (40, 300);
    let given = rows(t, d);
    let x = tensor(&ctx, &[t, d], DType::F32, &given);
    for format in FORMATS {
        let quantized = quantize(&ctx, &x, format, &arena()).unwrap();
        let back = values(&dequantize(&ctx, &quantized, DType::F32).unwrap());
        for (row, back) in given.chunks(d).zip(back.chunks(d)) {
            for (group, back) in row.chunks(GROUP).zip(back.chunks(GROUP)) {
                let amax = group.iter().fold(0.0f64, |max, x| max.max(f64::from(x.abs())));
                for (&x, &back) in group.iter().zip(back) {
                    let (x, back) = (f64::from(x), f64::from(back));
                    let bound = match format {
                        Format::Int8 => amax / 254.0,
                        // 2^-4 of a normal code, half a step of a subnormal one.
                        Format::E4m3 => (x.abs() / 16.0).max(amax / 448.0 / 1024.0),
                    };
                    // A few roundings of F32: factor, quotient, product.
                    let slack = amax * 4.0 * f64::from(f32::EPSILON);
                    assert!((x - back).abs() <= bound + slack, "{format:?}: {x:e} became {back:e}, amax {amax:e}");
                    assert!(x != 0.0 || back == 0.0);
                }
            }
        }
        let (error, total) = relative_error(&x, &dequantize(&ctx, &quantized, DType::F32).unwrap());
        assert!(error > 0.0 && (error / total).sqrt() < 0.03, "{format:?}: {error:e} of {total:e}");
    }
}

#[test]
fn tiny_groups_do_not_blow_up() {
    let ctx = Ctx::cpu(1, 1 << 16).unwrap();
    for format in FORMATS {
        for amax in [0.0, f32::from_bits(1), 1e-40, 1e-37, f32::MIN_POSITIVE] {
            let x = tensor(&ctx, &[1, 3], DType::F32, &[amax, -amax / 2.0, 0.0]);
            let out = quantize(&ctx, &x, format, &arena()).unwrap();
            let back = values(&dequantize(&ctx, &out, DType::F32).unwrap());
            // Half of the least factor.
            assert!(values(&x).iter().zip(&back).all(|(x, y)| (x - y).abs() <= 2f32.powi(-127)), "{format:?} {amax:e}");
        }
    }
}

#[test]
fn what_is_not_finite_breaks_its_group_and_no_other() {
    for ctx in contexts() {
        for (format, broken) in FORMATS.iter().flat_map(|&f| [f32::NAN, f32::INFINITY, -f32::INFINITY].map(|x| (f, x)))
        {
            let mut given = random(1, 300);
            given[200] = broken;
            let x = tensor(&ctx, &[1, 300], DType::F32, &given);
            let out = quantize(&ctx, &x, format, &arena()).unwrap();
            let back = values(&dequantize(&ctx, &out, DType::BF16).unwrap());
            for (i, back) in back.iter().enumerate() {
                assert_eq!(back.is_nan(), (128..256).contains(&i), "{format:?} {broken}: {i} is {back}");
            }
        }
    }
}

#[test]
fn errors_add_up() {
    let ctx = Ctx::cpu(1, 1 << 12).unwrap();
    let x = tensor(&ctx, &[2, 2], DType::F32, &[3.0, 4.0, 0.0, 1.0]);
    let y = tensor(&ctx, &[2, 2], DType::BF16, &[3.0, 2.0, 0.5, 1.0]);
    assert_eq!(relative_error(&x, &y), (4.25, 26.0));
    assert_eq!(relative_error(&y, &x), (4.25, 14.25));
    assert_eq!(relative_error(&x, &x), (0.0, 26.0));
}

#[test]
fn a_real_call_is_recorded_as_its_meta_run() {
    let (cpu, meta) = (Ctx::cpu(1, 1 << 16).unwrap(), Ctx::meta());
    cpu.start_log();
    let (message, counted) = (arena(), Arena::meta("message"));
    for (ctx, arena) in [(&cpu, &message), (&meta, &counted)] {
        let mut x = ctx.empty(&[6, 130], DType::BF16).unwrap();
        if !ctx.is_meta() {
            x.bytes_mut().fill(0);
        }
        let quantized = quantize(ctx, &x, Format::E4m3, arena).unwrap();
        assert_eq!((quantized.values.dims(), quantized.scales.dims()), (&[6, 130][..], &[6, 2][..]));
        dequantize(ctx, &quantized, DType::BF16).unwrap();
    }
    let calls = cpu.take_log();
    assert_eq!(calls, meta.take_log());
    let call = |op, flops| OpCall::compute(op, &[("T", 6), ("D", 130)], flops, 6 * (130 * 3 + 8));
    assert_eq!(calls, [call("quantize", 2 * 6 * 130), call("dequantize", 6 * 130)]);
    assert_eq!((cpu.arena().peak(), message.peak()), (meta.arena().peak(), counted.peak()));
}

#[test]
fn wrong_arguments_are_named() {
    let ctx = Ctx::meta();
    let arena = Arena::meta("message");
    let ids = ctx.empty(&[4, 8], DType::I32).unwrap();
    let error = quantize(&ctx, &ids, Format::Int8, &arena).err().unwrap().to_string();
    assert_eq!(error, "quantize: x is I32, expected F32 or BF16");
    let line = ctx.empty(&[8], DType::F32).unwrap();
    let error = quantize(&ctx, &line, Format::Int8, &arena).err().unwrap().to_string();
    assert_eq!(error, "quantize: x is [8], expected [T, D]");

    let part = |dims: &[usize], dtype| ctx.empty(dims, dtype).unwrap();
    let refused =
        |values, scales, dtype| dequantize(&ctx, &Quantized { values, scales }, dtype).err().unwrap().to_string();
    let error = refused(part(&[4, 200], DType::U8), part(&[4, 1], DType::F32), DType::F32);
    assert_eq!(error, "dequantize: scales is F32 [4, 1], expected F32 [4, 2]");
    let error = refused(part(&[4, 200], DType::F32), part(&[4, 2], DType::F32), DType::F32);
    assert_eq!(error, "dequantize: values is F32 [4, 200], expected F8_E4M3 [4, 200]");
    let error = refused(part(&[4, 200], DType::U8), part(&[4, 2], DType::F32), DType::U8);
    assert_eq!(error, "dequantize: type of the result is U8, expected F32 or BF16");
}
