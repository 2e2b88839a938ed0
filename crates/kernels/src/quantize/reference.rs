//! Quantisation, plainly: the nearest code is looked for among all.

use super::{Format, GROUP};
use crate::matrix::fp8;

/// Codes and factors of one row.
pub fn quantize_row(x: &[f32], format: Format) -> (Vec<u8>, Vec<f32>) {
    let (mut codes, mut factors) = (Vec::new(), Vec::new());
    for group in x.chunks(GROUP) {
        if group.iter().any(|x| !x.is_finite()) {
            codes.extend(vec![0; group.len()]);
            factors.push(f32::NAN);
            continue;
        }
        let amax = group.iter().fold(0.0f32, |max, x| max.max(x.abs()));
        let factor = (amax / format.max()).max(f32::MIN_POSITIVE);
        codes.extend(group.iter().map(|x| nearest(x / factor, format)));
        factors.push(factor);
    }
    (codes, factors)
}

/// What a code stands for, before its factor.
pub fn value(code: u8, format: Format) -> f32 {
    match format {
        Format::Int8 => f32::from(code as i8),
        Format::E4m3 => fp8::to_f32(code),
    }
}

/// Among equally near codes the even one; a zero keeps its sign where the format has one.
fn nearest(x: f32, format: Format) -> u8 {
    let usable = |&code: &u8| match format {
        Format::Int8 => code != 0x80,
        Format::E4m3 => code & 0x7f != 0x7f && (code >> 7 == 1) == x.is_sign_negative(),
    };
    let distance = |code: u8| (f64::from(value(code, format)) - f64::from(x)).abs();
    let better = |a: u8, b: u8| if (distance(b), b % 2) < (distance(a), a % 2) { b } else { a };
    (0..=255).filter(usable).reduce(better).expect("there are codes")
}
