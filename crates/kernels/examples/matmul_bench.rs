//! Speed of the matrix ops, beside the machine's read bandwidth measured in the same moments.
//!
//! `cargo run --release -p moesaic-kernels --example matmul_bench -- [decode|experts|prefill|pack] [threads]`
//!
//! Decode streams weights from far more memory than the caches hold. Every figure is the fifth percentile of the times of
//! single calls, so a machine that is shared for most of the time still shows its speed; the bandwidth is measured
//! between those calls.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use moesaic_device::{Arena, Ctx, Isa, Pool, Tensor, isa};
use moesaic_kernels::experts::{Activation, ExpertWeight, ExpertWeights, RowsPerExpert, experts};
use moesaic_kernels::linear::linear;
use moesaic_kernels::matrix::{PackedMatrix, SourceMatrix};
use moesaic_spec::{Bytes, DType};

const WEIGHT_BYTES: usize = 1 << 30;

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let wanted = |name: &str| args.first().is_none_or(|arg| arg == name);
    let threads = args.get(1).map_or(2, |arg| arg.parse().expect("a number of threads"));
    let pool = Arc::new(Pool::new(threads).unwrap());
    let isas: Vec<Isa> = isa::ALL.into_iter().filter(|&isa| isa <= Isa::detect() && isa != Isa::Avx512Bf16).collect();
    let contexts: Vec<Ctx> = (isas.into_iter())
        .map(|isa| Ctx::cpu_with(Arena::host("activation", Bytes(64 << 20)).expect("memory"), pool.clone(), isa))
        .collect();
    println!("{threads} threads, {}", Isa::detect());
    if wanted("decode") {
        decode(&contexts);
    }
    if wanted("experts") {
        grouped_decode(contexts.last().expect("portable"));
    }
    if wanted("prefill") {
        prefill(&contexts);
    }
    if wanted("pack") {
        pack(&pool);
    }
}

/// Fifth percentile, in seconds.
fn low(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 20]
}

fn timed(f: impl FnOnce()) -> f64 {
    let start = Instant::now();
    f();
    start.elapsed().as_secs_f64()
}

/// Memory to read, larger than what the caches keep between two reads, on huge pages as weights are.
fn plain() -> Tensor {
    let arena = Arena::host("plain", Bytes(512 << 20)).expect("memory");
    let mut plain = Tensor::empty(&arena, &[512 << 20], DType::F8E4M3).expect("memory");
    plain.bytes_mut().fill(1);
    plain
}

/// Reads `bytes` with all threads.
fn read(pool: &Pool, bytes: &[u8]) {
    let sum = AtomicU64::new(0);
    let chunks: Vec<&[u8]> = bytes.chunks(256 << 10).collect();
    pool.run(chunks.len(), &|task| {
        #[cfg(target_arch = "x86_64")]
        if Isa::detect() >= Isa::Avx512 {
            // SAFETY: the machine has AVX-512.
            sum.fetch_add(unsafe { combine_avx512(chunks[task.idx]) }, Ordering::Relaxed);
            return;
        }
        sum.fetch_add(combine(chunks[task.idx]), Ordering::Relaxed);
    });
    std::hint::black_box(sum.into_inner());
}

#[inline(always)]
fn combine(bytes: &[u8]) -> u64 {
    let mut sums = [0u64; 32];
    for line in bytes.chunks_exact(256) {
        for (sum, word) in sums.iter_mut().zip(line.chunks_exact(8)) {
            *sum ^= u64::from_le_bytes(word.try_into().expect("eight bytes"));
        }
    }
    sums.iter().fold(0, |a, b| a ^ b)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn combine_avx512(bytes: &[u8]) -> u64 {
    use std::arch::x86_64::*;
    let mut sums = [_mm512_setzero_si512(); 2];
    for line in bytes.chunks_exact(64 * 2) {
        for (i, sum) in sums.iter_mut().enumerate() {
            // SAFETY: inside the chunk; prefetching any address is harmless.
            unsafe {
                let at = line.as_ptr().add(i * 64);
                _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(512).cast());
                *sum = _mm512_xor_si512(*sum, _mm512_loadu_si512(at.cast()));
            }
        }
    }
    _mm512_reduce_add_epi64(_mm512_xor_si512(sums[0], sums[1])) as u64
}

fn random_bytes(num: usize, dtype: DType) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    match dtype {
        DType::F32 => (0..num).flat_map(|_| next().to_le_bytes()).collect(),
        DType::BF16 => (0..num).flat_map(|_| half::bf16::from_f32(next()).to_le_bytes()).collect(),
        _ => (0..num).map(|_| ((next() * 60.0) as i32 & 0xbf) as u8).collect(),
    }
}

fn input(ctx: &Ctx, dims: &[usize], dtype: DType) -> Tensor {
    let mut x = ctx.empty(dims, dtype).expect("memory");
    let bytes = random_bytes(dims.iter().product(), dtype);
    x.bytes_mut().copy_from_slice(&bytes);
    x
}

/// Matrices `[n, k]` that fill `bytes`.
fn matrices(pool: &Pool, n: usize, k: usize, dtype: DType, bytes: usize) -> Vec<PackedMatrix> {
    let arena = Arena::host("weights", Bytes(bytes as u64 + (2 << 20))).expect("memory");
    let source = random_bytes(n * k, dtype);
    let num = bytes / moesaic_kernels::matrix::packed_bytes(n, k, dtype).0 as usize;
    (0..num)
        .map(|_| {
            let mut w = PackedMatrix::empty(&arena, n, k, dtype).expect("memory");
            w.pack_rows(pool, 0, &SourceMatrix::new(&source, dtype, n, k)).expect("sizes fit");
            w
        })
        .collect()
}

fn decode(contexts: &[Ctx]) {
    const N: usize = 2048;
    const K: usize = 2048;
    let pool = contexts[0].pool();
    println!("decode, linear [{N}, {K}] of {} MiB; share of read bandwidth", WEIGHT_BYTES >> 20);
    for dtype in [DType::BF16, DType::F8E4M3, DType::F32] {
        let weights = matrices(pool, N, K, dtype, WEIGHT_BYTES);
        let plain = plain();
        let plain = plain.bytes();
        let size = weights[0].size_bytes().0 as usize;
        for t in [1, 2, 3, 4, 5, 8, 16] {
            for ctx in &contexts[2..] {
                let x = input(ctx, &[t, K], dtype.compute());
                let (mut times, mut reads) = (Vec::new(), Vec::new());
                for (i, w) in weights.iter().enumerate() {
                    times.push(timed(|| drop(linear(ctx, &x, w, DType::F32).expect("sizes fit"))));
                    if i % 8 == 0 {
                        let at = i / 8 * size % (plain.len() - size) / 64 * 64;
                        reads.push(timed(|| read(pool, &plain[at..at + size])));
                    }
                }
                let (time, read) = (low(&mut times), low(&mut reads));
                println!(
                    "  {dtype:8} T={t:2} {:11} {:5.1} GB/s of {:5.1} ({:3.0} %) {:7.1} GF/s",
                    ctx.isa().to_string(),
                    size as f64 / time / 1e9,
                    size as f64 / read / 1e9,
                    100.0 * read / time,
                    (2 * t * N * K) as f64 / time / 1e9,
                );
            }
        }
    }
}

fn random_experts(pool: &Pool, arena: &Arena, num: usize, d: usize, f: usize, dtype: DType) -> ExpertWeights {
    let source = random_bytes(d * f, dtype);
    let experts = (0..num).map(|_| {
        let mut expert = ExpertWeight::empty(arena, d, f, dtype, Activation::SwiGlu).expect("memory");
        expert.pack_gate(pool, &SourceMatrix::new(&source, dtype, f, d)).expect("sizes fit");
        expert.pack_up(pool, &SourceMatrix::new(&source, dtype, f, d)).expect("sizes fit");
        expert.pack_down(pool, &SourceMatrix::new(&source, dtype, d, f)).expect("sizes fit");
        expert
    });
    ExpertWeights { experts: experts.collect(), activation: Activation::SwiGlu }
}

fn grouped_decode(ctx: &Ctx) {
    const D: usize = 1024;
    const F: usize = 2048;
    const E: usize = 16;
    println!("decode, experts {D} → {F} (SwiGLU), {E} of {} MiB; share of read bandwidth", WEIGHT_BYTES >> 20);
    for dtype in [DType::BF16, DType::F8E4M3] {
        let size = ExpertWeight::packed_bytes(D, F, dtype, Activation::SwiGlu).0 as usize;
        let arena = Arena::host("weights", Bytes(WEIGHT_BYTES as u64)).expect("memory");
        let layers: Vec<ExpertWeights> =
            (0..WEIGHT_BYTES / size / E).map(|_| random_experts(ctx.pool(), &arena, E, D, F, dtype)).collect();
        let plain = plain();
        let plain = plain.bytes();
        for (active, rows) in [(2, 1), (4, 1), (16, 1), (16, 2), (16, 3), (16, 4), (16, 5), (16, 8), (16, 16)] {
            let x = input(ctx, &[active * rows, D], DType::BF16);
            let (mut times, mut reads) = (Vec::new(), Vec::new());
            for round in 0..10 {
                for w in &layers {
                    // Other experts in every round.
                    let first = round * active % E;
                    let before = |e: usize| (e.saturating_sub(first)).min(active) * rows;
                    let offsets: Vec<usize> = (0..=E).map(before).collect();
                    let rows = RowsPerExpert::Known(&offsets);
                    times.push(timed(|| drop(experts(ctx, &x, rows, w, x.dtype()).expect("sizes fit"))));
                    let at = (times.len() * size) % (plain.len() - 2 * size);
                    reads.push(timed(|| read(ctx.pool(), &plain[at..at + 2 * size])) / 2.0);
                }
            }
            let (time, read) = (low(&mut times), low(&mut reads) * active as f64);
            println!(
                "  {dtype:8} {active:2} active, {rows:2} rows each: {:5.1} GB/s of {:5.1} ({:3.0} %), {:6.0} us",
                (active * size) as f64 / time / 1e9,
                (active * size) as f64 / read / 1e9,
                100.0 * read / time,
                time * 1e6,
            );
        }
    }
}

fn prefill(contexts: &[Ctx]) {
    println!("prefill, linear");
    for dtype in [DType::BF16, DType::F8E4M3, DType::F32] {
        for (t, n, k) in [(512, 2048, 1024), (512, 1024, 2048), (512, 4096, 4096), (64, 2048, 1024), (32, 2048, 1024)] {
            let w = matrices(contexts[0].pool(), n, k, dtype, n * k * 4 + (1 << 20)).remove(0);
            for ctx in &contexts[1..] {
                let x = input(ctx, &[t, k], dtype.compute());
                let flops = (2 * t * n * k) as f64;
                let calls = if ctx.isa() < Isa::Amx { 3 } else { 3 + (2e10 / flops) as usize };
                let out = dtype.compute();
                let mut times: Vec<f64> =
                    (0..calls).map(|_| timed(|| drop(linear(ctx, &x, &w, out).expect("sizes fit")))).collect();
                let time = low(&mut times);
                println!(
                    "  {dtype:8} [{t}, {n}, {k}] {:11} {:7.1} GF/s (best {:7.1})",
                    ctx.isa().to_string(),
                    flops / time / 1e9,
                    flops / times[0] / 1e9
                );
            }
        }
    }
    println!("prefill, experts 1024 → 2048 (SwiGLU), 16 experts");
    let ctx = contexts.last().expect("portable");
    for dtype in [DType::BF16, DType::F8E4M3] {
        let arena = Arena::host("weights", Bytes(400 << 20)).expect("memory");
        let w = random_experts(ctx.pool(), &arena, 16, 1024, 2048, dtype);
        for rows in [16, 32, 48, 56, 64, 72, 80, 96, 128, 200] {
            let x = input(ctx, &[16 * rows, 1024], DType::BF16);
            let offsets: Vec<usize> = (0..=16).map(|e| e * rows).collect();
            let rows_of = RowsPerExpert::Known(&offsets);
            let mut times: Vec<f64> =
                (0..20).map(|_| timed(|| drop(experts(ctx, &x, rows_of, &w, x.dtype()).expect("sizes fit")))).collect();
            let time = low(&mut times);
            let flops = (6 * 16 * rows * 1024 * 2048) as f64;
            println!("  {dtype:8} {rows:3} rows each: {:7.1} GF/s", flops / time / 1e9);
        }
    }
}

fn pack(pool: &Pool) {
    const N: usize = 8192;
    const K: usize = 4096;
    println!("pack [{N}, {K}]");
    let cases = [
        (DType::BF16, DType::BF16),
        (DType::F32, DType::BF16),
        (DType::F16, DType::BF16),
        (DType::F8E4M3, DType::F8E4M3),
        (DType::F8E4M3, DType::BF16),
        (DType::F32, DType::F32),
    ];
    for (from, to) in cases {
        let bytes = random_bytes(N * K, if from == DType::F16 { DType::BF16 } else { from });
        let arena = Arena::host("weights", Bytes(256 << 20)).expect("memory");
        let mut w = PackedMatrix::empty(&arena, N, K, to).expect("memory");
        for transposed in [false, true] {
            let src = match transposed {
                false => SourceMatrix::new(&bytes, from, N, K),
                true => SourceMatrix::new(&bytes, from, K, N).transposed(),
            };
            let mut times: Vec<f64> =
                (0..6).map(|_| timed(|| w.pack_rows(pool, 0, &src).expect("sizes fit"))).collect();
            let time = low(&mut times);
            let moved = bytes.len() as f64 + w.size_bytes().0 as f64;
            let layout = if transposed { "transposed" } else { "" };
            println!("  {from:8} → {to:8} {:5.1} GB/s read + written {layout}", moved / time / 1e9);
        }
    }
}
