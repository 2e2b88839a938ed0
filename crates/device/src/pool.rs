//! Threads that wait hot for the next op.
//!
//! A decode step is a few hundred parallel regions of 10–100 µs each. A general pool costs 5–20 µs to wake a sleeping
//! worker for each; here workers spin for a while before they sleep, and a worker that the system has descheduled is not
//! waited for: the region ends when every *task* is done, and late workers find the door closed.

use std::any::Any;
use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::DeviceError;

/// What a task is told about itself.
#[derive(Clone, Copy, Debug)]
pub struct Task {
    /// Which task, `0..num_tasks`.
    pub idx: usize,
    /// Which thread runs it, `0..num_threads`: for scratch memory of its own.
    pub thread: usize,
}

/// How long a worker looks for the next region before it sleeps. Longer than the serial gaps inside a step, shorter than
/// anyone would notice as a busy core.
const SPIN: Duration = Duration::from_micros(200);

/// The door of a region. Workers that enter are counted in the low bits; nobody may enter a closed door.
const CLOSED: usize = 1 << 32;

type Body = dyn Fn(Task) + Sync;

struct Shared {
    /// Counts regions; a change is what workers look for.
    epoch: AtomicU64,
    door: AtomicUsize,
    job: UnsafeCell<Option<Job>>,
    next_task: AtomicUsize,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    stop: AtomicBool,
}

#[derive(Clone, Copy)]
struct Job {
    body: *const Body,
    num_tasks: usize,
}

// SAFETY: `job` is written only by the thread inside `Pool::run` while the door is closed and nobody is inside, and read
// only by workers that entered an open door (the door's atomics order the two). The body behind the pointer is `Sync`, and
// `run` does not return, so the borrow does not end, before everybody has left.
unsafe impl Sync for Shared {}
// SAFETY: as above.
unsafe impl Send for Shared {}

/// A fixed set of threads. The thread that calls [`Pool::run`] is one of them.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// One region at a time.
    turn: Mutex<()>,
}

impl Pool {
    /// `num_threads` counts the caller; 1 starts no thread.
    ///
    /// # Errors
    /// [`DeviceError::Threads`] when the system has no more of them; those that were started have ended then.
    pub fn new(num_threads: usize) -> Result<Pool, DeviceError> {
        let shared = Arc::new(Shared {
            epoch: AtomicU64::new(0),
            door: AtomicUsize::new(CLOSED),
            job: UnsafeCell::new(None),
            next_task: AtomicUsize::new(0),
            panic: Mutex::new(None),
            stop: AtomicBool::new(false),
        });
        let mut pool = Pool { shared, workers: Vec::new(), turn: Mutex::new(()) };
        for thread in 1..num_threads.max(1) {
            let shared = pool.shared.clone();
            let started = std::thread::Builder::new()
                .name(format!("moesaic-{thread}"))
                .spawn(move || work(&shared, thread))
                .map_err(|why| DeviceError::Threads { refused: thread + 1, asked: num_threads, why })?;
            pool.workers.push(started);
        }
        Ok(pool)
    }

    /// Threads, the caller included.
    pub fn num_threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs `body` for every task, each once, on whichever thread is free; returns when all are done. A panic in a task
    /// comes out here. Must not be called from inside a task.
    pub fn run(&self, num_tasks: usize, body: &(dyn Fn(Task) + Sync)) {
        if num_tasks <= 1 || self.workers.is_empty() {
            (0..num_tasks).for_each(|idx| body(Task { idx, thread: 0 }));
            return;
        }
        let _turn = self.turn.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let shared = &*self.shared;
        // SAFETY: only the lifetime is erased; `run` outlives every use of the pointer (note at `Sync for Shared`).
        let body: *const Body = unsafe { std::mem::transmute::<*const (dyn Fn(Task) + Sync + '_), *const Body>(body) };
        let job = Job { body, num_tasks };
        // SAFETY: the door is closed and empty between regions, so no worker reads the job now.
        unsafe { *shared.job.get() = Some(job) };
        shared.next_task.store(0, Ordering::Relaxed);
        shared.door.fetch_and(!CLOSED, Ordering::Release);
        shared.epoch.fetch_add(1, Ordering::Release);
        self.workers.iter().for_each(|worker| worker.thread().unpark());

        drain(shared, job, 0);

        shared.door.fetch_or(CLOSED, Ordering::AcqRel);
        let mut spins = 0u32;
        while shared.door.load(Ordering::Acquire) != CLOSED {
            spins += 1;
            if spins < 20_000 { std::hint::spin_loop() } else { std::thread::yield_now() }
        }
        let panic = shared.panic.lock().expect("nobody panics while holding a panic").take();
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // A worker never panics: tasks are caught.
            let _ = worker.join();
        }
    }
}

fn work(shared: &Shared, thread: usize) {
    let mut seen = 0;
    loop {
        let waiting_since = Instant::now();
        let mut spins = 0u32;
        loop {
            if shared.stop.load(Ordering::Acquire) {
                return;
            }
            let epoch = shared.epoch.load(Ordering::Acquire);
            if epoch != seen {
                seen = epoch;
                break;
            }
            std::hint::spin_loop();
            spins += 1;
            if spins.is_multiple_of(256) && waiting_since.elapsed() > SPIN {
                // `unpark` before `park` makes `park` return at once, so no region is slept through.
                std::thread::park();
            }
        }
        if shared.door.fetch_add(1, Ordering::AcqRel) & CLOSED == 0 {
            // SAFETY: this thread is inside an open door, so the job was written before and is not rewritten until it
            // leaves.
            let job = unsafe { *shared.job.get() };
            drain(shared, job.expect("an open door has a job"), thread);
        }
        shared.door.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Takes tasks until none is left.
fn drain(shared: &Shared, job: Job, thread: usize) {
    loop {
        let idx = shared.next_task.fetch_add(1, Ordering::Relaxed);
        if idx >= job.num_tasks {
            return;
        }
        // SAFETY: the body lives until `run` returns, and `run` waits for everybody inside the door.
        let body = unsafe { &*job.body };
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| body(Task { idx, thread }))) {
            shared.panic.lock().expect("nobody panics while holding a panic").get_or_insert(panic);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_in_every_region() {
        for num_threads in [1, 2, 5] {
            let pool = Pool::new(num_threads).unwrap();
            for num_tasks in (0..50).chain([1000]) {
                let counts: Vec<AtomicUsize> = (0..num_tasks).map(|_| AtomicUsize::new(0)).collect();
                pool.run(num_tasks, &|task| {
                    assert!(task.thread < num_threads);
                    counts[task.idx].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn regions_after_a_sleep_still_run() {
        let pool = Pool::new(3).unwrap();
        for _ in 0..5 {
            std::thread::sleep(SPIN * 5);
            let sum = AtomicUsize::new(0);
            pool.run(10, &|task| {
                sum.fetch_add(task.idx, Ordering::Relaxed);
            });
            assert_eq!(sum.into_inner(), 45);
        }
    }

    #[test]
    fn a_panic_in_a_task_comes_out_and_the_pool_lives() {
        let pool = Pool::new(3).unwrap();
        let result = catch_unwind(AssertUnwindSafe(|| pool.run(10, &|task| assert_ne!(task.idx, 7))));
        assert!(result.is_err());
        pool.run(10, &|_| {});
    }
}
