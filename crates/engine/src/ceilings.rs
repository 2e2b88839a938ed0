//! What this machine can do at best, measured; and the time that a list of ops needs at that speed.

use std::time::Instant;

use moesaic_device::{Arena, Ctx, OpCall, measure_read_bandwidth};
use moesaic_kernels::linear::linear;
use moesaic_kernels::matrix::PackedMatrix;
use moesaic_spec::{Bytes, DType};
use serde::Serialize;

use crate::EngineError;

/// Measured in the same process, just before or after what is compared with them.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Ceilings {
    /// Streaming reads from memory with all threads.
    pub read_bytes_per_s: f64,
    /// The dense matrix product of our own kernels with operands in cache.
    pub flops_per_s: f64,
}

impl Ceilings {
    /// Measures both, in about two seconds.
    pub fn measure(ctx: &Ctx, dtype: DType) -> Result<Ceilings, EngineError> {
        let read_bytes_per_s = measure_read_bandwidth(ctx.pool())?;
        // [512, 1024] x [2048, 1024]: 4 MiB of weights and 1 MiB of activations stay in a second-level cache.
        let (t, n, k) = (512, 2048, 1024);
        let arena = Arena::host("ceiling", Bytes(64 << 20))?;
        let bench = Ctx::cpu_with(arena.clone(), ctx.shared_pool(), ctx.isa());
        let weights = PackedMatrix::empty(&arena, n, k, dtype)?;
        let mut x = bench.empty(&[t, k], dtype.compute())?;
        x.bytes_mut().fill(0x3c);
        let mut best = f64::MAX;
        for _ in 0..20 {
            let start = Instant::now();
            linear(&bench, &x, &weights, dtype.compute())?;
            best = best.min(start.elapsed().as_secs_f64());
        }
        Ok(Ceilings { read_bytes_per_s, flops_per_s: (2 * t * n * k) as f64 / best })
    }

    /// Seconds that the ops need when each runs at whichever ceiling binds it.
    pub fn floor_s(&self, calls: &[OpCall]) -> f64 {
        let of =
            |call: &OpCall| (call.flops.expected / self.flops_per_s).max(call.bytes.expected / self.read_bytes_per_s);
        calls.iter().map(of).sum()
    }
}
