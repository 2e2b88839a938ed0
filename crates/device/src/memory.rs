//! Memory from the operating system: anonymous (huge pages where it has them), shared, and mapped files.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::path::{Path, PathBuf};
use std::ptr::NonNull;

use moesaic_spec::Bytes;

use crate::DeviceError;

const PAGE_BYTES: usize = 4 << 10;
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// What shared memory's file may no longer do: shrink, grow, be written to through new mappings.
pub(crate) const SEALS: i32 = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_FUTURE_WRITE;

/// A zeroed, page-aligned range of memory. Pages become resident when they are first touched.
///
/// Huge pages are asked for because weights are streamed: with 4 KiB pages a third of the time of a memory-bound kernel
/// goes to page walks, and hardware prefetchers stop at each page's end. What is smaller than one stays in small pages: a
/// thousand ranks of a small model in one process must not take 2 MiB for every arena.
pub struct HostMemory {
    base: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the mapping is plain memory owned by this value; it has no thread affinity.
unsafe impl Send for HostMemory {}
// SAFETY: shared access hands out a raw pointer only; who dereferences it states why that is not a race.
unsafe impl Sync for HostMemory {}

impl HostMemory {
    /// Reserves `bytes`, rounded up to whole pages; from 2 MiB on, to whole huge pages.
    pub fn new(bytes: usize) -> Result<HostMemory, DeviceError> {
        let page_bytes = if bytes < HUGE_PAGE_BYTES { PAGE_BYTES } else { HUGE_PAGE_BYTES };
        let refused = |why| DeviceError::OutOfMemory { requested: Bytes(bytes as u64), why };
        // One huge page more than asked for, so that the start can be aligned to one; the ends go back at once. The system
        // aligns small pages itself.
        let rounded = bytes.max(1).checked_next_multiple_of(page_bytes);
        let padded = rounded.and_then(|rounded| rounded.checked_add(page_bytes - PAGE_BYTES));
        let (Some(bytes), Some(padded)) = (rounded, padded) else {
            return Err(refused(std::io::Error::from(std::io::ErrorKind::OutOfMemory)));
        };
        // SAFETY: a fresh private mapping at an address of the kernel's choice touches no existing memory.
        let raw = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                padded,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if raw == libc::MAP_FAILED {
            return Err(refused(std::io::Error::last_os_error()));
        }
        let start = (raw as usize).next_multiple_of(page_bytes);
        let head = start - raw as usize;
        let tail = padded - head - bytes;
        // SAFETY: both ranges are parts of the mapping made above, outside [start, start + bytes), and page-aligned.
        unsafe {
            if head > 0 {
                libc::munmap(raw, head);
            }
            if tail > 0 {
                libc::munmap((start + bytes) as *mut libc::c_void, tail);
            }
            // Advice only: where the kernel has no transparent huge pages, everything still works.
            if page_bytes == HUGE_PAGE_BYTES {
                libc::madvise(start as *mut libc::c_void, bytes, libc::MADV_HUGEPAGE);
            }
        }
        let base = NonNull::new(start as *mut u8).expect("mmap does not return a null mapping");
        Ok(HostMemory { base, bytes })
    }

    /// Reserves `bytes`, rounded up to whole huge pages, in memory that other processes can map by the file that comes with
    /// it. The file has no name, so nothing is left of it when the last process has let go; it is sealed: it can neither
    /// shrink under a process that reads it, nor be mapped for writing by another.
    pub fn shared(bytes: usize) -> Result<(HostMemory, File), DeviceError> {
        let refused = |why| DeviceError::OutOfMemory { requested: Bytes(bytes as u64), why };
        let bytes = bytes
            .max(1)
            .checked_next_multiple_of(HUGE_PAGE_BYTES)
            .ok_or_else(|| refused(std::io::Error::from(std::io::ErrorKind::OutOfMemory)))?;
        // SAFETY: the name is a string with its end; the call touches no other memory.
        let fd = unsafe { libc::memfd_create(c"moesaic".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) };
        if fd < 0 {
            return Err(refused(std::io::Error::last_os_error()));
        }
        // SAFETY: the descriptor was made above and belongs to nobody else.
        let file = unsafe { File::from_raw_fd(fd) };
        file.set_len(bytes as u64).map_err(refused)?;
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no existing memory; it keeps the file's
        // memory alive by itself.
        let raw = unsafe {
            let access = libc::PROT_READ | libc::PROT_WRITE;
            libc::mmap(std::ptr::null_mut(), bytes, access, libc::MAP_SHARED | libc::MAP_NORESERVE, fd, 0)
        };
        if raw == libc::MAP_FAILED {
            return Err(refused(std::io::Error::last_os_error()));
        }
        let base = NonNull::new(raw.cast()).expect("mmap does not return a null mapping");
        let memory = HostMemory { base, bytes };
        // SAFETY: fcntl on an open descriptor; seals change what may be done with the file from now on.
        if unsafe { libc::fcntl(fd, libc::F_ADD_SEALS, SEALS) } != 0 {
            return Err(refused(std::io::Error::last_os_error()));
        }
        Ok((memory, file))
    }

    /// First byte.
    pub fn as_ptr(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Whether there is nothing here; never true, there is at least a page.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }
}

impl Drop for HostMemory {
    fn drop(&mut self) {
        // SAFETY: this value owns exactly this mapping, and nothing that borrows it outlives it.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.bytes) };
    }
}

/// A file mapped for reading.
///
/// The bytes of a mapped file change when somebody writes to the file, and reading beyond a file that was cut short ends
/// the process (SIGBUS). Checkpoints are not written while they are read; that is the one assumption made here.
pub struct FileMap {
    base: NonNull<u8>,
    bytes: usize,
    path: PathBuf,
}

// SAFETY: a private read-only mapping; reading it from any thread is fine.
unsafe impl Send for FileMap {}
// SAFETY: as above, nothing in this process writes to it.
unsafe impl Sync for FileMap {}

impl FileMap {
    /// Maps all of a regular file.
    pub fn open(path: &Path) -> Result<FileMap, DeviceError> {
        let failed = |why| DeviceError::File { path: path.to_path_buf(), why };
        let file = File::open(path).map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        if !metadata.is_file() {
            return Err(failed(std::io::Error::other("not a regular file")));
        }
        let bytes = metadata.len() as usize;
        if bytes == 0 {
            return Ok(FileMap { base: NonNull::dangling(), bytes: 0, path: path.to_path_buf() });
        }
        // SAFETY: a fresh private read-only mapping of an open file; the descriptor may be closed afterwards.
        let raw =
            unsafe { libc::mmap(std::ptr::null_mut(), bytes, libc::PROT_READ, libc::MAP_PRIVATE, file.as_raw_fd(), 0) };
        if raw == libc::MAP_FAILED {
            return Err(failed(std::io::Error::last_os_error()));
        }
        let base = NonNull::new(raw.cast()).expect("mmap does not return a null mapping");
        Ok(FileMap { base, bytes, path: path.to_path_buf() })
    }

    /// The file's bytes.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the mapping covers `bytes` bytes, lives as long as `self`, and is not written to (type's note).
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.bytes) }
    }

    /// Where it came from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Tells the kernel that these bytes will not be read again soon, so that they stop counting as this process's
    /// memory; reading them again still works. `range` is shrunk to whole pages.
    pub fn release(&self, range: std::ops::Range<usize>) {
        let start = range.start.next_multiple_of(PAGE_BYTES);
        let end = range.end.min(self.bytes) / PAGE_BYTES * PAGE_BYTES;
        if start < end {
            // SAFETY: whole pages inside the mapping; a private file mapping without writes only drops clean pages.
            unsafe { libc::madvise(self.base.as_ptr().add(start).cast(), end - start, libc::MADV_DONTNEED) };
        }
    }
}

impl Drop for FileMap {
    fn drop(&mut self) {
        if self.bytes > 0 {
            // SAFETY: this value owns exactly this mapping.
            unsafe { libc::munmap(self.base.as_ptr().cast(), self.bytes) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_sizes_take_small_pages_and_large_ones_huge_pages() {
        let sizes = [(0, PAGE_BYTES), (1, PAGE_BYTES), (5000, 8192), (HUGE_PAGE_BYTES - 1, HUGE_PAGE_BYTES)];
        let large = [(HUGE_PAGE_BYTES, HUGE_PAGE_BYTES), (HUGE_PAGE_BYTES + 1, 2 * HUGE_PAGE_BYTES)];
        for (bytes, len) in sizes.into_iter().chain(large) {
            let memory = HostMemory::new(bytes).unwrap();
            let page_bytes = if bytes < HUGE_PAGE_BYTES { PAGE_BYTES } else { HUGE_PAGE_BYTES };
            assert_eq!((memory.len(), memory.as_ptr() as usize % page_bytes), (len, 0), "{bytes}");
            // SAFETY: the last byte lies inside the mapping, which this test alone has.
            unsafe { assert_eq!(memory.as_ptr().add(len - 1).replace(1), 0) };
        }
    }

    #[test]
    fn what_no_machine_has_is_refused() {
        for bytes in [usize::MAX, usize::MAX - HUGE_PAGE_BYTES, usize::MAX / 2] {
            let error = HostMemory::new(bytes).err().unwrap();
            assert!(
                matches!(error, DeviceError::OutOfMemory { requested, .. } if requested.0 == bytes as u64),
                "{error}"
            );
        }
    }
}
