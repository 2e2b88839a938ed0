//! NVIDIA GPUs, asked of the driver's management library (NVML) or, where it does not load, of /proc.
//!
//! Neither touches a GPU: no context is made, no memory is taken.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::path::Path;
use std::ptr::null_mut;

use moesaic_spec::Bytes;

use super::library::Loaded;

/// A GPU of this machine.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Gpu {
    /// Its product name.
    pub name: String,
    /// The name that survives a reboot.
    pub uuid: Option<String>,
    /// Memory built in.
    pub memory_total: Option<Bytes>,
    /// Memory that nobody has taken.
    pub memory_free: Option<Bytes>,
    /// Which instructions it has, as `major.minor`.
    pub compute_capability: Option<String>,
}

/// The GPUs and the driver's version.
pub(super) fn find(root: &Path) -> (Vec<Gpu>, Option<String>) {
    if let Some(nvml) = Nvml::load() {
        let gpus = nvml.gpus();
        let driver = nvml.driver();
        nvml.shutdown();
        if !gpus.is_empty() {
            return (gpus, driver);
        }
    }
    (from_driver_files(root), driver_of_files(root))
}

/// What the kernel module says in /proc, in the order of the bus.
pub(super) fn from_driver_files(root: &Path) -> Vec<Gpu> {
    let Ok(folders) = std::fs::read_dir(root.join("proc/driver/nvidia/gpus")) else { return Vec::new() };
    let mut files: Vec<_> = folders.flatten().map(|folder| folder.path().join("information")).collect();
    files.sort();
    let gpu = |text: String| {
        let mut fields = text.lines().filter_map(|line| line.split_once(':'));
        let mut field = |name: &str| fields.find(|(key, _)| key.trim() == name).map(|(_, v)| v.trim().to_owned());
        // The model comes before the UUID in this file.
        Some(Gpu {
            name: field("Model")?,
            uuid: field("GPU UUID"),
            memory_total: None,
            memory_free: None,
            compute_capability: None,
        })
    };
    files.iter().filter_map(|file| std::fs::read_to_string(file).ok()).filter_map(gpu).collect()
}

/// `NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue …`
fn driver_of_files(root: &Path) -> Option<String> {
    let text = super::read(root, "proc/driver/nvidia/version")?;
    let line = text.lines().find(|line| line.starts_with("NVRM version"))?;
    let is_version = |word: &&str| word.contains('.') && word.chars().all(|c| c.is_ascii_digit() || c == '.');
    line.split_whitespace().find(is_version).map(str::to_owned)
}

type Handle = *mut c_void;
type Status = c_int;
const SUCCESS: Status = 0;

/// The calls used here, with the signatures of `nvml.h`; the `_v2` names are what its macros stand for.
struct Nvml {
    shutdown: unsafe extern "C" fn() -> Status,
    driver_version: unsafe extern "C" fn(*mut c_char, c_uint) -> Status,
    count: unsafe extern "C" fn(*mut c_uint) -> Status,
    handle: unsafe extern "C" fn(c_uint, *mut Handle) -> Status,
    name: unsafe extern "C" fn(Handle, *mut c_char, c_uint) -> Status,
    uuid: unsafe extern "C" fn(Handle, *mut c_char, c_uint) -> Status,
    memory: unsafe extern "C" fn(Handle, *mut MemoryInfo) -> Status,
    capability: unsafe extern "C" fn(Handle, *mut c_int, *mut c_int) -> Status,
}

/// `nvmlMemory_t`.
#[repr(C)]
#[derive(Default)]
struct MemoryInfo {
    total: u64,
    free: u64,
    used: u64,
}

impl Nvml {
    /// The library, initialised; `None` where there is none or no driver under it.
    fn load() -> Option<Nvml> {
        let library = Loaded::open("libnvidia-ml.so.1").ok()?;
        // SAFETY: `nvml.h` fixes the signature of each name as the type that it is bound to says.
        let (init, nvml) = unsafe {
            let init: unsafe extern "C" fn() -> Status = library.function(c"nvmlInit_v2")?;
            let nvml = Nvml {
                shutdown: library.function(c"nvmlShutdown")?,
                driver_version: library.function(c"nvmlSystemGetDriverVersion")?,
                count: library.function(c"nvmlDeviceGetCount_v2")?,
                handle: library.function(c"nvmlDeviceGetHandleByIndex_v2")?,
                name: library.function(c"nvmlDeviceGetName")?,
                uuid: library.function(c"nvmlDeviceGetUUID")?,
                memory: library.function(c"nvmlDeviceGetMemoryInfo")?,
                capability: library.function(c"nvmlDeviceGetCudaComputeCapability")?,
            };
            (init, nvml)
        };
        // SAFETY: takes nothing; the counterpart is `shutdown`.
        (unsafe { init() } == SUCCESS).then_some(nvml)
    }

    fn shutdown(self) {
        // SAFETY: initialised once in `load`, and `self` ends here.
        unsafe { (self.shutdown)() };
    }

    fn driver(&self) -> Option<String> {
        text(|buffer, len| {
            // SAFETY: the library is initialised and writes at most `len` bytes, NUL included.
            unsafe { (self.driver_version)(buffer, len) }
        })
    }

    fn gpus(&self) -> Vec<Gpu> {
        let mut count = 0;
        // SAFETY: the library is initialised; it writes one number.
        if unsafe { (self.count)(&mut count) } != SUCCESS {
            return Vec::new();
        }
        (0..count).filter_map(|idx| self.gpu(idx)).collect()
    }

    fn gpu(&self, idx: c_uint) -> Option<Gpu> {
        let mut gpu: Handle = null_mut();
        // SAFETY: the index is below the count; the handle stays valid until `shutdown`.
        if unsafe { (self.handle)(idx, &mut gpu) } != SUCCESS {
            return None;
        }
        let mut memory = MemoryInfo::default();
        // SAFETY: a valid handle; the struct has the layout of `nvmlMemory_t`.
        let has_memory = unsafe { (self.memory)(gpu, &mut memory) } == SUCCESS;
        let (mut major, mut minor) = (0, 0);
        // SAFETY: a valid handle; it writes two numbers.
        let has_capability = unsafe { (self.capability)(gpu, &mut major, &mut minor) } == SUCCESS;
        Some(Gpu {
            // SAFETY: a valid handle; at most `len` bytes are written, NUL included.
            name: text(|buffer, len| unsafe { (self.name)(gpu, buffer, len) })?,
            // SAFETY: as above.
            uuid: text(|buffer, len| unsafe { (self.uuid)(gpu, buffer, len) }),
            memory_total: has_memory.then_some(Bytes(memory.total)),
            memory_free: has_memory.then_some(Bytes(memory.free)),
            compute_capability: has_capability.then(|| format!("{major}.{minor}")),
        })
    }
}

/// A string that a call writes into a buffer of the length that it is told.
fn text(call: impl FnOnce(*mut c_char, c_uint) -> Status) -> Option<String> {
    // NVML's longest string (a UUID of its second form) has 96 bytes.
    let mut buffer = [0u8; 256];
    // One byte fewer, so that a NUL follows whatever happens.
    if call(buffer.as_mut_ptr().cast(), buffer.len() as c_uint - 1) != SUCCESS {
        return None;
    }
    CStr::from_bytes_until_nul(&buffer).ok().map(|text| text.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_driver_files_are_read_in_bus_order() {
        let root = tempfile::tempdir().unwrap();
        for (bus, name) in [("0000:81:00.0", "B"), ("0000:01:00.0", "A")] {
            let folder = root.path().join("proc/driver/nvidia/gpus").join(bus);
            std::fs::create_dir_all(&folder).unwrap();
            let text =
                format!("Model: \t\t NVIDIA {name}\nIRQ:   \t 17\nGPU UUID: \t GPU-{name}-1\nBus Type: \t PCIe\n");
            std::fs::write(folder.join("information"), text).unwrap();
        }
        let version =
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5\nGCC version:  gcc 12.2.0\n";
        std::fs::write(root.path().join("proc/driver/nvidia/version"), version).unwrap();
        let found = from_driver_files(root.path());
        let names: Vec<_> = found.iter().map(|gpu| (gpu.name.as_str(), gpu.uuid.as_deref().unwrap())).collect();
        assert_eq!(names, [("NVIDIA A", "GPU-A-1"), ("NVIDIA B", "GPU-B-1")]);
        assert_eq!(driver_of_files(root.path()).unwrap(), "550.54.15");
    }

    #[test]
    fn a_string_ends_where_the_call_ended_it() {
        let filled = text(|buffer, len| {
            // SAFETY: the buffer has `len` bytes.
            unsafe { std::ptr::write_bytes(buffer, b'x', len as usize) };
            SUCCESS
        });
        assert_eq!(filled.unwrap().len(), 255);
        assert_eq!(text(|_, _| 3), None);
    }
}
