//! How fast this machine's cores read its memory: the roof under which decoding runs.

use std::hint::black_box;
use std::time::{Duration, Instant};

use crate::{DeviceError, HostMemory, Isa, Pool, available_memory};

/// What one task reads before it takes the next: long enough that taking costs nothing, short enough that threads of
/// different speed finish together.
const CHUNK_BYTES: usize = 4 << 20;

/// Far beyond any cache that these cores have to themselves, and what a last-level cache shared by a whole host (of which
/// a virtual machine sees the full size) can keep of it is a small part.
const MAX_BYTES: usize = 3 << 29;

/// A system that is slow to hand out memory is not waited for beyond this size.
const ENOUGH_BYTES: usize = 512 << 20;

/// How long memory is filled, and how long after the first pass another may start.
const TIME: Duration = Duration::from_millis(500);

/// Bytes per second at which the threads of `pool` read memory, with the widest loads of the processor: the best of
/// several passes over a buffer of 1.5 GiB, or of a quarter of the available memory if that is less. Takes less than two
/// seconds on a machine that does nothing else.
pub fn measure_read_bandwidth(pool: &Pool) -> Result<f64, DeviceError> {
    let quarter = available_memory().map_or(usize::MAX, |bytes| bytes.0 as usize / 4);
    read_bandwidth(pool, MAX_BYTES.min(quarter), TIME)
}

fn read_bandwidth(pool: &Pool, bytes: usize, time: Duration) -> Result<f64, DeviceError> {
    let max_chunks = (bytes / CHUNK_BYTES).max(1);
    let memory = HostMemory::new(max_chunks * CHUNK_BYTES)?;
    // Pages that were never written are all one page of zeros, which would be read from the cache.
    let start = Instant::now();
    let mut num_chunks = 0;
    while num_chunks < max_chunks && (start.elapsed() < time || num_chunks * CHUNK_BYTES < ENOUGH_BYTES) {
        let round = (max_chunks - num_chunks).min(32);
        pool.run(round, &|task| {
            // SAFETY: this chunk lies inside the mapping, and belongs to this task alone.
            unsafe { memory.as_ptr().add((num_chunks + task.idx) * CHUNK_BYTES).write_bytes(0x5a, CHUNK_BYTES) };
        });
        num_chunks += round;
    }
    let bytes = num_chunks * CHUNK_BYTES;
    // SAFETY: the mapping has at least `bytes` bytes, all initialised, and nobody writes to them any more.
    let data: &[u8] = unsafe { std::slice::from_raw_parts(memory.as_ptr(), bytes) };
    let isa = Isa::detect();
    let start = Instant::now();
    let mut best = 0f64;
    loop {
        let pass = Instant::now();
        pool.run(num_chunks, &|task| {
            black_box(read(&data[task.idx * CHUNK_BYTES..][..CHUNK_BYTES], isa));
        });
        best = best.max(bytes as f64 / pass.elapsed().as_secs_f64());
        if start.elapsed() > time {
            return Ok(best);
        }
    }
}

/// The XOR of all 64-bit words: the least work that needs every byte.
fn read(data: &[u8], isa: Isa) -> u64 {
    assert_eq!(data.len() % 512, 0, "whole steps of the widest path");
    #[cfg(target_arch = "x86_64")]
    {
        if isa >= Isa::Avx512 {
            // SAFETY: the processor has AVX-512 F.
            return unsafe { x86::read_avx512(data) };
        }
        if isa >= Isa::Avx2 {
            // SAFETY: the processor has AVX2.
            return unsafe { x86::read_avx2(data) };
        }
    }
    let _ = isa;
    read_portable(data)
}

fn read_portable(data: &[u8]) -> u64 {
    let mut sums = [0u64; 8];
    for words in data.as_chunks::<64>().0 {
        for (sum, word) in sums.iter_mut().zip(words.as_chunks::<8>().0) {
            *sum ^= u64::from_ne_bytes(*word);
        }
    }
    sums.into_iter().fold(0, |a, b| a ^ b)
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    /// How far ahead of its loads a thread asks for lines. The hardware's own prefetcher stops at every 4 KiB, also on
    /// huge pages.
    const AHEAD_BYTES: usize = 4096;

    #[target_feature(enable = "avx512f")]
    pub(super) fn read_avx512(data: &[u8]) -> u64 {
        let mut sums = [_mm512_setzero_si512(); 8];
        for step in data.as_chunks::<512>().0 {
            for (i, sum) in sums.iter_mut().enumerate() {
                let line = step[i * 64..].as_ptr();
                _mm_prefetch::<_MM_HINT_T0>(line.wrapping_add(AHEAD_BYTES).cast());
                // SAFETY: 64 bytes from `i * 64` lie inside the step of 512; the load needs no alignment.
                *sum = _mm512_xor_si512(*sum, unsafe { _mm512_loadu_si512(line.cast()) });
            }
        }
        let sum = sums.into_iter().reduce(|a, b| _mm512_xor_si512(a, b)).expect("eight sums");
        let mut words = [0u64; 8];
        // SAFETY: the array has 64 bytes; the store needs no alignment.
        unsafe { _mm512_storeu_si512(words.as_mut_ptr().cast(), sum) };
        words.into_iter().fold(0, |a, b| a ^ b)
    }

    #[target_feature(enable = "avx2")]
    pub(super) fn read_avx2(data: &[u8]) -> u64 {
        let mut sums = [_mm256_setzero_si256(); 8];
        for step in data.as_chunks::<256>().0 {
            for (i, sum) in sums.iter_mut().enumerate() {
                let half_line = step[i * 32..].as_ptr();
                _mm_prefetch::<_MM_HINT_T0>(half_line.wrapping_add(AHEAD_BYTES).cast());
                // SAFETY: 32 bytes from `i * 32` lie inside the step of 256; the load needs no alignment.
                *sum = _mm256_xor_si256(*sum, unsafe { _mm256_loadu_si256(half_line.cast()) });
            }
        }
        let sum = sums.into_iter().reduce(|a, b| _mm256_xor_si256(a, b)).expect("eight sums");
        let mut words = [0u64; 4];
        // SAFETY: the array has 32 bytes; the store needs no alignment.
        unsafe { _mm256_storeu_si256(words.as_mut_ptr().cast(), sum) };
        words.into_iter().fold(0, |a, b| a ^ b)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_path_reads_every_byte() {
        let mut data: Vec<u8> = (0..4096u32).map(|i| (i.wrapping_mul(2654435761) >> 24) as u8).collect();
        for _ in 0..64 {
            let expected = read_portable(&data);
            for isa in crate::isa::ALL.into_iter().filter(|&isa| isa <= Isa::detect()) {
                assert_eq!(read(&data, isa), expected, "{isa}");
            }
            let flipped = (expected as usize) % data.len();
            data[flipped] ^= 0x10;
            assert_ne!(read_portable(&data), expected);
        }
    }

    #[test]
    fn a_bandwidth_is_measured() {
        let pool = Pool::new(2).unwrap();
        let bandwidth = read_bandwidth(&pool, 64 << 20, Duration::from_millis(5)).unwrap();
        // Between a machine that swaps and one that does not exist.
        assert!((1e8..1e14).contains(&bandwidth), "{bandwidth} bytes/s");
    }

    #[test]
    #[ignore = "takes a second and all cores; prints what `doctor` would"]
    fn print_the_bandwidth() {
        let start = Instant::now();
        let bandwidth = measure_read_bandwidth(&Pool::new(crate::num_usable_cores()).unwrap()).unwrap();
        println!("{:.1} GB/s in {:?}", bandwidth / 1e9, start.elapsed());
    }
}
