//! What the tests of all ops share.

use half::bf16;
use moesaic_device::{Arena, Ctx, Isa, Pool, Tensor, isa};
use moesaic_spec::{Bytes, DType};

use crate::philox::uniform;

/// Widths that miss and hit every vector length.
pub(crate) const WIDTHS: [usize; 5] = [1, 7, 64, 100, 1000];
/// The two activation types.
pub(crate) const ACTIVATIONS: [DType; 2] = [DType::F32, DType::BF16];

/// A context for each instruction set of this machine, with one thread and with three. Its memory is full of NaNs, so an
/// output that is not written shows.
pub(crate) fn contexts() -> Vec<Ctx> {
    let usable = isa::ALL.into_iter().filter(|&isa| isa <= Isa::detect() && isa <= Isa::Avx512);
    usable.flat_map(|isa| [1, 3].map(|threads| context(isa, threads))).collect()
}

pub(crate) fn context(isa: Isa, num_threads: usize) -> Ctx {
    let arena = Arena::host("test", Bytes(24 << 20)).unwrap();
    let mut all = arena.alloc(24 << 20).unwrap();
    all.bytes_mut().fill(0xff);
    drop(all);
    Ctx::cpu_with(arena, std::sync::Arc::new(Pool::new(num_threads).unwrap()), isa)
}

/// Numbers in `[-2, 2)`, the same for the same seed.
pub(crate) fn random(seed: u64, len: usize) -> Vec<f32> {
    (0..len).map(|i| (uniform(seed, i as u64) * 4.0 - 2.0) as f32).collect()
}

/// A tensor of these numbers, rounded to `dtype`; on `Meta` of their shape.
pub(crate) fn tensor(ctx: &Ctx, dims: &[usize], dtype: DType, values: &[f32]) -> Tensor {
    let mut tensor = ctx.empty(dims, dtype).unwrap();
    match dtype {
        _ if ctx.is_meta() => {}
        DType::F32 => tensor.f32_mut().copy_from_slice(values),
        DType::BF16 => {
            tensor.bf16_mut().iter_mut().zip(values).for_each(|(to, &from)| *to = bf16::from_f32(from));
        }
        other => panic!("no test needs {other}"),
    }
    tensor
}

/// A tensor's numbers.
pub(crate) fn values(tensor: &Tensor) -> Vec<f32> {
    match tensor.dtype() {
        DType::F32 => tensor.f32().to_vec(),
        DType::BF16 => tensor.bf16().iter().map(|x| x.to_f32()).collect(),
        DType::I32 => tensor.i32().iter().map(|&x| x as f32).collect(),
        other => panic!("no test needs {other}"),
    }
}

/// `‖a - b‖ / ‖b‖`; NaN if either has one.
pub(crate) fn relative_error(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    let difference = norm(&mut a.iter().zip(b).map(|(&a, &b)| f64::from(a) - f64::from(b)));
    difference / norm(&mut b.iter().map(|&b| f64::from(b))).max(f64::MIN_POSITIVE)
}

/// The same bits, with the place of the first that differ.
pub(crate) fn assert_same_bytes(a: &Tensor, b: &Tensor, what: &str) {
    assert_eq!((a.dims(), a.dtype()), (b.dims(), b.dtype()), "{what}");
    if let Some(i) = (0..a.size_bytes()).find(|&i| a.bytes()[i] != b.bytes()[i]) {
        panic!("{what}: byte {i} of {:?} {}", a.dims(), a.dtype());
    }
}
