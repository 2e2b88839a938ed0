//! What every op is handed: where tensors live, who works, and where the call is recorded.

use std::cell::RefCell;
use std::sync::Arc;
use std::time::Instant;

use moesaic_spec::{Bytes, DType};

use crate::{Arena, DeviceError, Isa, OpCall, Pool, Tensor};

/// Where tensors of a [`Ctx`] live.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Device {
    /// This machine's memory and cores.
    Cpu,
    /// Nowhere: shapes are checked and calls are recorded, nothing is computed.
    Meta,
}

/// Calls, and when the work of each began.
#[derive(Default)]
struct Log {
    calls: Vec<OpCall>,
    starts: Vec<Instant>,
}

impl Log {
    fn push(&mut self, call: OpCall, start: Instant) {
        self.calls.push(call);
        self.starts.push(start);
    }
}

/// One rank's device: the activation arena, the threads, the op log.
pub struct Ctx {
    device: Device,
    arena: Arena,
    pool: Arc<Pool>,
    isa: Isa,
    log: RefCell<Option<Log>>,
}

impl Ctx {
    /// The CPU with `num_threads` threads (the caller's included) and an arena of `activation_bytes`.
    pub fn cpu(num_threads: usize, activation_bytes: usize) -> Result<Ctx, DeviceError> {
        let arena = Arena::host("activation", Bytes(activation_bytes as u64))?;
        Ok(Ctx::cpu_with(arena, Arc::new(Pool::new(num_threads)?), Isa::from_env()?))
    }

    /// The CPU with threads that are shared, and a chosen instruction set (at most what the machine has).
    pub fn cpu_with(arena: Arena, pool: Arc<Pool>, isa: Isa) -> Ctx {
        assert!(isa <= Isa::detect(), "this machine cannot run {isa}");
        Ctx { device: Device::Cpu, arena, pool, isa, log: RefCell::new(None) }
    }

    /// The device that only records; its log is on.
    pub fn meta() -> Ctx {
        Ctx {
            device: Device::Meta,
            arena: Arena::meta("activation"),
            pool: Arc::new(Pool::new(1).expect("the caller's thread is there")),
            isa: Isa::Portable,
            log: RefCell::new(Some(Log::default())),
        }
    }

    /// Where its tensors live.
    pub fn device(&self) -> Device {
        self.device
    }

    /// Whether ops end after checking and recording.
    pub fn is_meta(&self) -> bool {
        self.device == Device::Meta
    }

    /// Where activations come from.
    pub fn arena(&self) -> &Arena {
        &self.arena
    }

    /// Who works.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// The threads, to share with another context.
    pub fn shared_pool(&self) -> Arc<Pool> {
        self.pool.clone()
    }

    /// Which paths kernels may take.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// A tensor from the activation arena; its content is whatever was there.
    pub fn empty(&self, dims: &[usize], dtype: DType) -> Result<Tensor, DeviceError> {
        Tensor::empty(&self.arena, dims, dtype)
    }

    /// Notes a call, if somebody is listening.
    pub fn record(&self, call: impl FnOnce() -> OpCall) {
        if let Some(log) = self.log.borrow_mut().as_mut() {
            log.push(call(), Instant::now());
        }
    }

    /// The same for a call whose size was not known before its work, which began at `start`.
    pub fn record_from(&self, start: Instant, call: impl FnOnce() -> OpCall) {
        if let Some(log) = self.log.borrow_mut().as_mut() {
            log.push(call(), start);
        }
    }

    /// Starts an empty log.
    pub fn start_log(&self) {
        *self.log.borrow_mut() = Some(Log::default());
    }

    /// Ends logging.
    pub fn stop_log(&self) {
        *self.log.borrow_mut() = None;
    }

    /// The calls since the log was started, and an end to logging (on `Meta`: a new empty log).
    pub fn take_log(&self) -> Vec<OpCall> {
        self.end_log().calls
    }

    /// The same with the seconds of each call: from its start to the next one's, or to now.
    pub fn take_timed_log(&self) -> Vec<(OpCall, f64)> {
        let mut log = self.end_log();
        log.starts.push(Instant::now());
        let seconds = log.starts.windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64());
        log.calls.into_iter().zip(seconds).collect()
    }

    fn end_log(&self) -> Log {
        let next = self.is_meta().then(Log::default);
        std::mem::replace(&mut *self.log.borrow_mut(), next).unwrap_or_default()
    }
}
