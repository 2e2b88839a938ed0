//! Rows in eight bits a value, for messages between ranks, and back.
//!
//! Each row is cut into groups of 128 columns, the last one shorter. With `amax` the greatest magnitude of a group,
//! `factor = max(amax / M, 2^-126)`, `code = nearest(x / factor)` (ties to even), and `x' = code * factor`:
//!
//! | format | M | code | of one value, abs(x - x') is at most |
//! | --- | --- | --- | --- |
//! | [`Int8`](Format::Int8) | 127 | integer, two's complement | amax / 254 |
//! | [`E4m3`](Format::E4m3) | 448 | OCP FP8 | x / 16, or amax / 448 / 1024 where x is below amax / 448 / 64 |
//!
//! (both plus the roundings of F32, and where factors end at 2^-126 half of that). Zeros are exact. A group that holds a NaN
//! or an infinity has the factor NaN and zeros as codes, so all of it comes back as NaN: what is broken does not turn into
//! numbers on the way.
//!
//! | | shape | type |
//! | --- | --- | --- |
//! | `x` | `[T, D]` | F32 or BF16 |
//! | codes | `[T, D]` | U8 (the bytes of Int8) or F8 E4M3 |
//! | factors | `[T, ceil(D / 128)]` | F32 |
//! | out of `dequantize` | `[T, D]` | F32 or BF16, rounded once |
//!
//! Flops 2 T D (magnitude and quotient), back T D. Bytes: everything once. The same bits on every path.

use half::bf16;
use moesaic_device::{Arena, Ctx, OpCall, Tensor};
use moesaic_spec::DType;

use crate::KernelError;
use crate::contract::{check, require};
use crate::elementwise::{Element, check_activation, multi_isa};
use crate::matrix::fp8;
use crate::rows::{for_rows, for_rows2};

pub mod reference;
#[cfg(test)]
mod tests;

/// Columns that share a factor.
pub const GROUP: usize = 128;

const OP: &str = "quantize";
const BACK: &str = "dequantize";

/// What the eight bits mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// An integer from -127 to 127.
    Int8,
    /// A float of four bits of exponent and three of mantissa, up to 448.
    E4m3,
}

impl Format {
    /// Element type of the codes.
    pub fn dtype(self) -> DType {
        match self {
            Format::Int8 => DType::U8,
            Format::E4m3 => DType::F8E4M3,
        }
    }

    /// The code of a group's greatest magnitude.
    pub(crate) fn max(self) -> f32 {
        match self {
            Format::Int8 => 127.0,
            Format::E4m3 => fp8::MAX,
        }
    }
}

/// A matrix in eight bits a value.
pub struct Quantized {
    /// The codes, `[T, D]` in U8 ([`Format::Int8`]) or F8 E4M3.
    pub values: Tensor,
    /// The factors, `[T, ceil(D / 128)]` in F32.
    pub scales: Tensor,
}

/// `x` in eight bits a value; the result lies in `arena`, because it is on its way to another rank.
pub fn quantize(ctx: &Ctx, x: &Tensor, format: Format, arena: &Arena) -> Result<Quantized, KernelError> {
    check_activation(OP, "x", x.dtype())?;
    let rank2 = x.dims().len() == 2 && x.dims()[1] > 0;
    require(rank2, OP, "x", || "[T, D]".into(), || format!("{:?}", x.dims()))?;
    let (t, d) = x.dims2();
    let groups = d.div_ceil(GROUP);
    let row_bytes = d * (x.dtype().size_bytes() + 1) + 4 * groups;
    ctx.record(|| OpCall::compute(OP, &[("T", t), ("D", d)], (2 * t * d) as u64, (t * row_bytes) as u64));
    let mut values = Tensor::empty(arena, &[t, d], format.dtype())?;
    let mut scales = Tensor::empty(arena, &[t, groups], DType::F32)?;
    if !ctx.is_meta() {
        match x.dtype() {
            DType::F32 => to_codes::<f32>(ctx, x, format, (values.u8_mut(), scales.f32_mut())),
            _ => to_codes::<bf16>(ctx, x, format, (values.u8_mut(), scales.f32_mut())),
        }
    }
    Ok(Quantized { values, scales })
}

/// The values again, as `dtype`.
pub fn dequantize(ctx: &Ctx, x: &Quantized, dtype: DType) -> Result<Tensor, KernelError> {
    check_activation(BACK, "type of the result", dtype)?;
    let Quantized { values, scales } = x;
    let format = match values.dtype() {
        DType::U8 => Format::Int8,
        _ => Format::E4m3,
    };
    let rank2 = values.dims().len() == 2 && values.dims()[1] > 0;
    require(rank2, BACK, "values", || "[T, D]".into(), || format!("{:?}", values.dims()))?;
    let (t, d) = values.dims2();
    let groups = d.div_ceil(GROUP);
    check(BACK, "values", values, &[t, d], format.dtype())?;
    check(BACK, "scales", scales, &[t, groups], DType::F32)?;
    let row_bytes = d * (dtype.size_bytes() + 1) + 4 * groups;
    ctx.record(|| OpCall::compute(BACK, &[("T", t), ("D", d)], (t * d) as u64, (t * row_bytes) as u64));
    let mut out = ctx.empty(&[t, d], dtype)?;
    if !ctx.is_meta() {
        match dtype {
            DType::F32 => from_codes::<f32>(ctx, x, format, &mut out),
            _ => from_codes::<bf16>(ctx, x, format, &mut out),
        }
    }
    Ok(out)
}

/// `(Σ (x - y)², Σ x²)` over all elements, in F64, so that sums of many messages may be added up: the relative error of `y` is
/// the root of their quotient.
///
/// # Panics
/// On different shapes, on other types than F32 and BF16, and on `Meta`.
pub fn relative_error(x: &Tensor, y: &Tensor) -> (f64, f64) {
    assert_eq!(x.dims(), y.dims(), "two results of one shape");
    match (x.dtype(), y.dtype()) {
        (DType::F32, DType::F32) => squares(x.f32(), y.f32()),
        (DType::F32, _) => squares(x.f32(), y.bf16()),
        (_, DType::F32) => squares(x.bf16(), y.f32()),
        _ => squares(x.bf16(), y.bf16()),
    }
}

fn squares<X: Element, Y: Element>(x: &[X], y: &[Y]) -> (f64, f64) {
    x.iter().zip(y).fold((0.0, 0.0), |(error, total), (x, y)| {
        let (x, y) = (f64::from(x.to_f32()), f64::from(y.to_f32()));
        (error + (x - y) * (x - y), total + x * x)
    })
}

fn to_codes<X: Element>(ctx: &Ctx, x: &Tensor, format: Format, (codes, scales): (&mut [u8], &mut [f32])) {
    let (isa, (_, d)) = (ctx.isa(), x.dims2());
    let (x, groups) = (X::of(x), d.div_ceil(GROUP));
    for_rows2(ctx, (codes, d), (scales, groups), d * (size_of::<X>() + 1), |first, codes, scales| {
        let x = &x[first * d..][..codes.len()];
        match format {
            Format::Int8 => encode_int8::<X>(isa, x, d, codes, scales),
            Format::E4m3 => encode_e4m3::<X>(isa, x, d, codes, scales),
        }
    });
}

fn from_codes<X: Element>(ctx: &Ctx, x: &Quantized, format: Format, out: &mut Tensor) {
    let (isa, (_, d)) = (ctx.isa(), out.dims2());
    let (codes, scales, groups) = (x.values.u8(), x.scales.f32(), d.div_ceil(GROUP));
    for_rows(ctx, X::of_mut(out), d, d * (size_of::<X>() + 1), |first, out| {
        let codes = &codes[first * d..][..out.len()];
        let scales = &scales[first * groups..];
        match format {
            Format::Int8 => decode_int8::<X>(isa, codes, scales, d, out),
            Format::E4m3 => decode_e4m3::<X>(isa, codes, scales, d, out),
        }
    });
}

multi_isa! {
    fn encode_int8<X: Element>(x: &[X], d: usize, codes: &mut [u8], scales: &mut [f32]) = encode_int8_rows
}
multi_isa! {
    fn encode_e4m3<X: Element>(x: &[X], d: usize, codes: &mut [u8], scales: &mut [f32]) = encode_e4m3_rows
}
multi_isa! {
    fn decode_int8<X: Element>(codes: &[u8], scales: &[f32], d: usize, out: &mut [X]) = decode_int8_rows
}
multi_isa! {
    fn decode_e4m3<X: Element>(codes: &[u8], scales: &[f32], d: usize, out: &mut [X]) = decode_e4m3_rows
}

#[inline(always)]
fn encode_int8_rows<X: Element>(x: &[X], d: usize, codes: &mut [u8], scales: &mut [f32]) {
    // 1.5 * 2^23: a sum with it has no places behind the point, so the addition rounds.
    const ROUND: f32 = 12_582_912.0;
    encode_rows(x, d, Format::Int8, (codes, scales), |x| (x + ROUND).to_bits() as u8);
}

#[inline(always)]
fn encode_e4m3_rows<X: Element>(x: &[X], d: usize, codes: &mut [u8], scales: &mut [f32]) {
    encode_rows(x, d, Format::E4m3, (codes, scales), fp8::from_f32);
}

#[inline(always)]
fn encode_rows<X: Element>(
    x: &[X],
    d: usize,
    format: Format,
    (codes, scales): (&mut [u8], &mut [f32]),
    code: impl Fn(f32) -> u8,
) {
    let groups = d.div_ceil(GROUP);
    let rows = x.chunks_exact(d).zip(codes.chunks_exact_mut(d)).zip(scales.chunks_exact_mut(groups));
    for ((x, codes), scales) in rows {
        for ((x, codes), scale) in x.chunks(GROUP).zip(codes.chunks_mut(GROUP)).zip(scales) {
            // As integers, magnitudes are in the order of their values, and what is not finite is above all others.
            let amax = x.iter().fold(0, |max: u32, x| max.max(x.to_f32().to_bits() & 0x7fff_ffff));
            if amax >= f32::INFINITY.to_bits() {
                *scale = f32::NAN;
                codes.fill(0);
                continue;
            }
            let factor = (f32::from_bits(amax) / format.max()).max(f32::MIN_POSITIVE);
            *scale = factor;
            codes.iter_mut().zip(x).for_each(|(to, x)| *to = code(x.to_f32() / factor));
        }
    }
}

#[inline(always)]
fn decode_int8_rows<X: Element>(codes: &[u8], scales: &[f32], d: usize, out: &mut [X]) {
    decode_rows(codes, scales, d, out, |code| f32::from(code as i8));
}

#[inline(always)]
fn decode_e4m3_rows<X: Element>(codes: &[u8], scales: &[f32], d: usize, out: &mut [X]) {
    decode_rows(codes, scales, d, out, fp8::to_f32);
}

#[inline(always)]
fn decode_rows<X: Element>(codes: &[u8], scales: &[f32], d: usize, out: &mut [X], value: impl Fn(u8) -> f32) {
    let rows = codes.chunks_exact(d).zip(scales.chunks_exact(d.div_ceil(GROUP))).zip(out.chunks_exact_mut(d));
    for ((codes, scales), out) in rows {
        for ((codes, &factor), out) in codes.chunks(GROUP).zip(scales).zip(out.chunks_mut(GROUP)) {
            out.iter_mut().zip(codes).for_each(|(out, &code)| *out = X::from_f32(value(code) * factor));
        }
    }
}
