//! An arena: one range of memory, settled before the first token, from which tensors take and to which they return.
//!
//! First fit over address-ordered free ranges. The sequence of requests decides everything, so a `Meta` arena that sees
//! the same requests reports the same peak as the real one.

use std::sync::{Arc, Mutex};

use moesaic_spec::Bytes;

use crate::{DeviceError, HostMemory};

/// Allocations start on a cache line, which is also the width of the widest vector.
pub const ALIGN_BYTES: usize = 64;

/// A range of memory that hands out [`Region`]s.
#[derive(Clone)]
pub struct Arena {
    inner: Arc<Inner>,
}

struct Inner {
    name: &'static str,
    /// `None` on `Meta`: everything is counted, nothing is stored.
    memory: Option<HostMemory>,
    capacity: usize,
    state: Mutex<State>,
}

struct State {
    /// Free ranges as (start, length), ascending; neighbours are merged, so no two touch. There are few: a list is searched
    /// faster than a tree, and takes no memory when a range comes or goes.
    free: Vec<(usize, usize)>,
    in_use: usize,
    /// Highest end address ever taken: the size that the arena must have.
    peak: usize,
    /// Regions that are taken now and not empty.
    num_regions: usize,
    /// See [`Arena::sufficient`].
    sufficient: usize,
}

impl Arena {
    /// An arena with memory behind it, rounded up to whole pages ([`HostMemory`]).
    pub fn host(name: &'static str, capacity: Bytes) -> Result<Arena, DeviceError> {
        let memory = HostMemory::new(capacity.0 as usize)?;
        let capacity = memory.len();
        Ok(Arena::with(name, Some(memory), capacity))
    }

    /// An arena without memory or limit.
    pub fn meta(name: &'static str) -> Arena {
        Arena::with(name, None, usize::MAX / 2 / ALIGN_BYTES * ALIGN_BYTES)
    }

    /// An arena whose memory other processes can map, by the file that comes with it (see [`SharedMap`](crate::SharedMap)).
    ///
    /// They may read a region while nobody writes to it: the arena's owner names the region to them, and keeps its
    /// tensor until they said that they are done.
    pub fn shared(name: &'static str, capacity: Bytes) -> Result<(Arena, std::fs::File), DeviceError> {
        let (memory, file) = HostMemory::shared(capacity.0 as usize)?;
        let capacity = memory.len();
        Ok((Arena::with(name, Some(memory), capacity), file))
    }

    fn with(name: &'static str, memory: Option<HostMemory>, capacity: usize) -> Arena {
        let state = State { free: vec![(0, capacity)], in_use: 0, peak: 0, num_regions: 0, sufficient: 0 };
        Arena { inner: Arc::new(Inner { name, memory, capacity, state: Mutex::new(state) }) }
    }

    /// Takes `bytes`; their content is whatever was there before.
    pub fn alloc(&self, bytes: usize) -> Result<Region, DeviceError> {
        if bytes == 0 {
            return Ok(Region { arena: self.clone(), start: 0, bytes: 0, len: 0 });
        }
        let mut state = self.inner.state.lock().expect("no code panics while it holds an arena");
        let len = bytes.checked_next_multiple_of(ALIGN_BYTES).unwrap_or(usize::MAX);
        let Some(found) = state.free.iter().position(|&(_, free)| free >= len) else {
            return Err(DeviceError::ArenaFull {
                arena: self.inner.name,
                capacity: Bytes(self.inner.capacity as u64),
                requested: Bytes(bytes as u64),
                in_use: Bytes(state.in_use as u64),
            });
        };
        let (start, free) = state.free[found];
        if free > len {
            state.free[found] = (start + len, free - len);
        } else {
            state.free.remove(found);
        }
        // Around n regions lie at most n + 1 holes. A request that finds none long enough sees each at least one line too
        // short, so with one line more than that in all, one is.
        let holes = (state.num_regions + 1).saturating_mul(len - ALIGN_BYTES);
        let sufficient = state.in_use.saturating_add(holes).saturating_add(ALIGN_BYTES);
        state.sufficient = state.sufficient.max(sufficient);
        state.num_regions += 1;
        state.in_use += len;
        state.peak = state.peak.max(start + len);
        drop(state);
        Ok(Region { arena: self.clone(), start, bytes, len })
    }

    /// The size that an arena needs to serve the requests seen so far.
    pub fn peak(&self) -> Bytes {
        Bytes(self.inner.state.lock().expect("no code panics while it holds an arena").peak as u64)
    }

    /// The size at which an arena serves the requests seen so far wherever earlier ones were placed; so it also serves any
    /// requests that come and go in the same order and of which none is larger. [`peak`](Self::peak) promises the latter
    /// not: where a smaller request leaves a smaller hole, the next one may have to go elsewhere.
    pub fn sufficient(&self) -> Bytes {
        Bytes(self.inner.state.lock().expect("no code panics while it holds an arena").sufficient as u64)
    }

    /// Bytes that are taken now.
    pub fn in_use(&self) -> Bytes {
        Bytes(self.inner.state.lock().expect("no code panics while it holds an arena").in_use as u64)
    }

    /// Size in bytes.
    pub fn capacity(&self) -> Bytes {
        Bytes(self.inner.capacity as u64)
    }

    /// Whether there is no memory behind it.
    pub fn is_meta(&self) -> bool {
        self.inner.memory.is_none()
    }

    fn give_back(&self, start: usize, len: usize) {
        if len == 0 {
            return;
        }
        let mut state = self.inner.state.lock().expect("no code panics while it holds an arena");
        state.in_use -= len;
        state.num_regions -= 1;
        let after = state.free.partition_point(|&(free, _)| free < start);
        let joins_after = state.free.get(after).is_some_and(|&(free, _)| start + len == free);
        let joins_before = after > 0 && state.free[after - 1].0 + state.free[after - 1].1 == start;
        match (joins_before, joins_after) {
            (true, true) => {
                let (_, after_len) = state.free.remove(after);
                state.free[after - 1].1 += len + after_len;
            }
            (true, false) => state.free[after - 1].1 += len,
            (false, true) => state.free[after] = (start, len + state.free[after].1),
            (false, false) => state.free.insert(after, (start, len)),
        }
    }
}

/// A range of an arena, owned by one tensor and given back when dropped.
pub struct Region {
    arena: Arena,
    start: usize,
    bytes: usize,
    len: usize,
}

impl Region {
    /// Whether there is no memory behind it.
    pub fn is_meta(&self) -> bool {
        self.arena.is_meta()
    }

    /// Where in `arena` this is; `None` if it belongs to another.
    pub fn offset_in(&self, arena: &Arena) -> Option<usize> {
        Arc::ptr_eq(&self.arena.inner, &arena.inner).then_some(self.start)
    }

    /// The bytes. Panics on `Meta`.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: [start, start + bytes) lies inside the arena's mapping, which `self.arena` keeps alive; mapped memory
        // is always initialised; the allocator gave this range to this region alone, so `&self` excludes writers.
        unsafe { std::slice::from_raw_parts(self.base(), self.bytes) }
    }

    /// The bytes, to write. Panics on `Meta`.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`; `&mut self` excludes every other access.
        unsafe { std::slice::from_raw_parts_mut(self.base(), self.bytes) }
    }

    /// First byte. Panics on `Meta`.
    pub(crate) fn base(&self) -> *mut u8 {
        let memory = self.arena.inner.memory.as_ref();
        let memory =
            memory.unwrap_or_else(|| panic!("a Meta tensor of the {} arena has no data", self.arena.inner.name));
        // SAFETY: `start` is below the mapping's length (alloc), so the result stays inside one allocation.
        unsafe { memory.as_ptr().add(self.start) }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        self.arena.give_back(self.start, self.len);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_do_not_overlap_and_come_back_whole() {
        let arena = Arena::host("test", Bytes(1 << 21)).unwrap();
        let mut regions: Vec<Region> = (1..40).map(|i| arena.alloc(i * 37).unwrap()).collect();
        for (i, region) in regions.iter_mut().enumerate() {
            region.bytes_mut().fill(i as u8);
        }
        // Every third goes back, and smaller ones take their places.
        let mut i = 0;
        regions.retain(|_| {
            i += 1;
            i % 3 != 0
        });
        let more: Vec<Region> = (1..13).map(|i| arena.alloc(i * 11).unwrap()).collect();
        let mut i = 0;
        for region in &regions {
            while i % 3 == 2 {
                i += 1;
            }
            assert!(region.bytes().iter().all(|&b| b == i as u8));
            i += 1;
        }
        drop((regions, more));
        assert_eq!(arena.in_use(), Bytes(0));
        assert_eq!(arena.inner.state.lock().unwrap().free.len(), 1);
    }

    #[test]
    fn meta_and_host_report_the_same_peak() {
        let (host, meta) = (Arena::host("test", Bytes(1 << 21)).unwrap(), Arena::meta("test"));
        for arena in [&host, &meta] {
            let a = arena.alloc(1000).unwrap();
            let b = arena.alloc(5000).unwrap();
            drop(a);
            let c = arena.alloc(2000).unwrap();
            drop((b, c));
        }
        assert_eq!(host.peak(), meta.peak());
    }

    #[test]
    fn a_small_arena_takes_little() {
        let arena = Arena::host("test", Bytes(100)).unwrap();
        assert_eq!(arena.capacity(), Bytes(4096));
        let mut all = arena.alloc(4096).unwrap();
        all.bytes_mut().fill(7);
        assert!(all.bytes().as_ptr().addr().is_multiple_of(ALIGN_BYTES) && arena.alloc(1).is_err());
    }

    /// The smaller requests take more than the larger ones did, but not more than was promised.
    #[test]
    fn what_is_sufficient_holds_for_smaller_requests() {
        let run = |sizes: [usize; 4]| {
            let arena = Arena::meta("test");
            let [a, b, c, d] = sizes.map(|lines| lines * ALIGN_BYTES);
            let first = arena.alloc(a).unwrap();
            let _second = arena.alloc(b).unwrap();
            drop(first);
            let _third = arena.alloc(c).unwrap();
            let _fourth = arena.alloc(d).unwrap();
            (arena.peak().0 as usize / ALIGN_BYTES, arena.sufficient().0 as usize / ALIGN_BYTES)
        };
        assert_eq!(run([10, 4, 6, 4]).0, 14);
        assert_eq!(run([9, 4, 6, 4]).0, 17, "the hole is a line too short");
        for sizes in [[10, 4, 6, 4], [9, 4, 6, 4], [10, 4, 6, 3], [1, 4, 6, 4], [10, 0, 6, 4], [7, 2, 5, 4]] {
            let (peak, sufficient) = run(sizes);
            assert!(peak <= sufficient && peak <= run([10, 4, 6, 4]).1, "{sizes:?}: {peak} {sufficient}");
        }
    }

    #[test]
    fn a_full_arena_says_the_numbers() {
        let arena = Arena::host("activation", Bytes(1 << 21)).unwrap();
        let _held = arena.alloc(1 << 20).unwrap();
        let error = arena.alloc(3 << 20).err().unwrap().to_string();
        assert_eq!(error, "the activation arena of 2.00 MiB cannot hold 3.00 MiB more (1.00 MiB in use)");
    }
}
