//! The product as the contract writes it: plain loops, one output at a time.

use moesaic_spec::DType;

use super::source::flush_bf16;
use super::{PackedMatrix, SCALE_K, TILE_K};

/// `Σ_k x[k] · W[n, k]` in the order of the arithmetic contract (the module's head). For BF16 and F8 E4M3 weights, `x`
/// holds BF16 values.
pub fn dot(x: &[f32], w: &PackedMatrix, n: usize) -> f32 {
    assert_eq!(x.len(), w.k());
    match w.dtype() {
        DType::F32 => x.iter().enumerate().fold(0.0, |sum, (k, x)| x.mul_add(w.stored(n, k), sum)),
        DType::BF16 => tiles(x, w, n, 0),
        _ => {
            let blocks = x.chunks(SCALE_K).enumerate();
            blocks.fold(0.0, |sum, (i, x)| w.scale(n, i * SCALE_K).mul_add(tiles(x, w, n, i * SCALE_K), sum))
        }
    }
}

/// Sum over tiles of 32 columns, `x` beginning at column `first`.
fn tiles(x: &[f32], w: &PackedMatrix, n: usize, first: usize) -> f32 {
    let mut sum = 0.0;
    for (tile, x) in x.chunks(TILE_K).enumerate() {
        let mut chains = [0f32; 2];
        for (k, &x) in x.iter().enumerate() {
            let x = f32::from_bits(u32::from(flush_bf16((x.to_bits() >> 16) as u16)) << 16);
            chains[k % 2] = x.mul_add(w.stored(n, first + tile * TILE_K + k), chains[k % 2]);
        }
        sum += chains[0] + chains[1];
    }
    sum
}
