//! Processor time, which other processes on a busy machine do not stretch.

/// Processor time of the calling thread, seconds.
pub fn thread_time() -> f64 {
    clock(libc::CLOCK_THREAD_CPUTIME_ID)
}

/// Processor time of all threads of this process, seconds.
pub fn process_time() -> f64 {
    clock(libc::CLOCK_PROCESS_CPUTIME_ID)
}

fn clock(id: libc::clockid_t) -> f64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes one timespec that is ours; both clocks exist on every Linux, and a failure leaves zeros.
    unsafe { libc::clock_gettime(id, &mut now) };
    now.tv_sec as f64 + now.tv_nsec as f64 * 1e-9
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_takes_time_and_sleep_takes_none() {
        let (thread, process) = (thread_time(), process_time());
        let mut x = 1u64;
        while thread_time() - thread < 0.01 {
            x = std::hint::black_box(x.wrapping_mul(3));
        }
        assert!(process_time() - process >= 0.01);
        let before = thread_time();
        std::thread::sleep(std::time::Duration::from_millis(50));
        assert!(thread_time() - before < 0.04);
    }
}
