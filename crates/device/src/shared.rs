//! Another process's memory, and counters by which two processes say how far they are.
//!
//! One process makes an arena with [`Arena::shared`](crate::Arena::shared) and gives its file to others, who map it for
//! reading. Each writes to its own arena only.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use moesaic_spec::Bytes;

use crate::memory::SEALS;
use crate::{Arena, DeviceError, Region};

/// Each counter has a cache line of its own, so that who counts here does not slow who counts there.
const LINE_BYTES: usize = 64;

/// Numbers in an arena that only this value changes, and that every process that maps the arena can read.
pub struct Counters {
    region: Region,
    len: usize,
}

impl Counters {
    /// Takes memory for `len` counters, all 0. Panics on `Meta`.
    pub fn new(arena: &Arena, len: usize) -> Result<Counters, DeviceError> {
        let counters = Counters { region: arena.alloc(len * LINE_BYTES)?, len };
        (0..len).for_each(|idx| counters.counter(idx).store(0, Ordering::Release));
        Ok(counters)
    }

    /// Where in `arena` they are; `None` if in another.
    pub fn offset_in(&self, arena: &Arena) -> Option<usize> {
        self.region.offset_in(arena)
    }

    /// Adds one. What this thread did before is seen by who reads the new number.
    pub fn increment(&self, idx: usize) {
        self.counter(idx).fetch_add(1, Ordering::Release);
    }

    fn counter(&self, idx: usize) -> &AtomicU64 {
        assert!(idx < self.len, "counter {idx} of {}", self.len);
        // SAFETY: inside the region, which is aligned to a cache line; every access to the region goes through here, so
        // through atomics, in this process; others only read, and theirs are atomics too.
        unsafe { AtomicU64::from_ptr(self.region.base().add(idx * LINE_BYTES).cast()) }
    }
}

/// Another process's shared arena, mapped for reading.
pub struct SharedMap {
    base: NonNull<u8>,
    bytes: usize,
}

// SAFETY: a read-only mapping; reading it from any thread is fine.
unsafe impl Send for SharedMap {}
// SAFETY: as above.
unsafe impl Sync for SharedMap {}

impl SharedMap {
    /// Maps a file that [`Arena::shared`](crate::Arena::shared) made elsewhere and that is said to have `bytes`. The seals are
    /// checked, so that its maker cannot cut it short while it is read, which would end this process (SIGBUS).
    pub fn open(file: &File, bytes: Bytes) -> Result<SharedMap, DeviceError> {
        let failed = |why| DeviceError::SharedFile { why };
        // SAFETY: fcntl on an open descriptor; it changes nothing.
        let seals = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS) };
        if seals < 0 || seals & SEALS != SEALS {
            return Err(failed("it is not sealed against being cut short".into()));
        }
        let len = file.metadata().map_err(|why| failed(why.to_string()))?.len();
        if len != bytes.0 || len == 0 {
            return Err(failed(format!("it has {len} bytes, expected {}", bytes.0)));
        }
        let len = len as usize;
        // SAFETY: a fresh read-only mapping at an address of the kernel's choice; it stays when the descriptor is closed.
        let raw =
            unsafe { libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ, libc::MAP_SHARED, file.as_raw_fd(), 0) };
        if raw == libc::MAP_FAILED {
            return Err(failed(std::io::Error::last_os_error().to_string()));
        }
        let base = NonNull::new(raw.cast()).expect("mmap does not return a null mapping");
        Ok(SharedMap { base, bytes: len })
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Whether there is nothing here; never true.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Copies the bytes from `offset` on. If the other process writes there meanwhile, which it promised not to, any bytes
    /// may come. Panics where they are not all inside.
    pub fn copy_to(&self, offset: usize, to: &mut [u8]) {
        let end = offset.checked_add(to.len());
        assert!(end.is_some_and(|end| end <= self.bytes), "{} bytes at {offset} of {}", to.len(), self.bytes);
        // SAFETY: the source is inside the mapping, which lives as long as `self` and cannot shrink (sealed); `to` is this
        // process's own memory, so the two do not overlap. No reference to the source is made: it may be written to by
        // a process that breaks its promise, and any byte is a valid one.
        unsafe { std::ptr::copy_nonoverlapping(self.base.as_ptr().add(offset), to.as_mut_ptr(), to.len()) };
    }

    /// What the [`Counters`] at `offset` say at `idx`. What its process did before is seen from now on. Panics where that is
    /// not inside.
    pub fn count(&self, offset: usize, idx: usize) -> u64 {
        let start = offset + idx * LINE_BYTES;
        assert!(start.is_multiple_of(LINE_BYTES) && start + LINE_BYTES <= self.bytes, "counter {idx} at {offset}");
        // SAFETY: aligned and inside the mapping; the memory is only loaded from, which a read-only mapping allows for an
        // atomic of the machine's word size; its writer uses atomics too.
        unsafe { AtomicU64::from_ptr(self.base.as_ptr().add(start).cast()) }.load(Ordering::Acquire)
    }
}

impl Drop for SharedMap {
    fn drop(&mut self) {
        // SAFETY: this value owns exactly this mapping, and nothing that borrows it outlives it.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.bytes) };
    }
}

#[cfg(test)]
mod tests {
    use moesaic_spec::DType;

    use super::*;
    use crate::Tensor;

    #[test]
    fn what_one_writes_the_other_reads() {
        let (arena, file) = Arena::shared("exchange", Bytes(1 << 20)).unwrap();
        let map = SharedMap::open(&file, arena.capacity()).unwrap();
        drop(file);
        let counters = Counters::new(&arena, 3).unwrap();
        let mut tensor = Tensor::empty(&arena, &[5], DType::F32).unwrap();
        tensor.f32_mut().copy_from_slice(&[1.0, 2.0, 3.0, 4.0, 5.0]);
        let mut bytes = [0; 20];
        map.copy_to(tensor.offset_in(&arena).unwrap(), &mut bytes);
        assert_eq!(bytes, tensor.bytes());
        counters.increment(2);
        counters.increment(2);
        let offset = counters.offset_in(&arena).unwrap();
        assert_eq!([0, 1, 2].map(|idx| map.count(offset, idx)), [0, 0, 2]);
        let other = Arena::host("other", Bytes(1 << 20)).unwrap();
        assert_eq!(tensor.offset_in(&other), None);
    }

    #[test]
    fn a_file_that_could_shrink_is_refused() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        let error = SharedMap::open(&file, Bytes(4096)).err().unwrap().to_string();
        assert_eq!(error, "shared memory of another process: it is not sealed against being cut short");
    }

    #[test]
    fn a_file_of_another_length_is_refused() {
        let (arena, file) = Arena::shared("exchange", Bytes(1 << 20)).unwrap();
        let error = SharedMap::open(&file, Bytes(arena.capacity().0 + 1)).err().unwrap().to_string();
        assert_eq!(error, "shared memory of another process: it has 2097152 bytes, expected 2097153");
        assert!(file.set_len(0).is_err(), "sealed");
    }

    #[test]
    #[should_panic(expected = "20 bytes at 2097140 of 2097152")]
    fn reading_beyond_the_end_is_our_mistake() {
        let (_arena, file) = Arena::shared("exchange", Bytes(1 << 20)).unwrap();
        SharedMap::open(&file, Bytes(2 << 20)).unwrap().copy_to((2 << 20) - 12, &mut [0; 20]);
    }
}
