//! Shared libraries that are used where they exist, and found at run time only.

use std::ffi::{CStr, CString, c_int, c_void};
use std::ptr::NonNull;

/// One that was looked for.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Library {
    /// The name that the loader was asked for.
    pub name: &'static str,
    /// Where it is.
    pub path: Option<String>,
    /// What it says about itself. Of the CUDA driver: the newest CUDA version that it runs.
    pub version: Option<String>,
    /// Why it does not load, in the loader's words. `None`: it loads.
    pub error: Option<String>,
}

/// How a library is asked for its version.
#[derive(Clone, Copy)]
enum Ask {
    /// `status f(int *version)`, 0 is success.
    Status(&'static CStr, fn(c_int) -> String),
    /// `status f(int *major, int *minor)`, 0 is success.
    MajorMinor(&'static CStr),
    /// `size_t f()`.
    Value(&'static CStr, fn(c_int) -> String),
}

const CUDA: Ask = Ask::Status(c"cuDriverGetVersion", |v| format!("{}.{}", v / 1000, v % 1000 / 10));
const NVRTC: Ask = Ask::MajorMinor(c"nvrtcVersion");
const CUBLAS_LT: Ask = Ask::Value(c"cublasLtGetVersion", |v| format!("{}.{}.{}", v / 10000, v % 10000 / 100, v % 100));
/// Five places since 2.9.0, four before.
const NCCL: Ask = Ask::Status(c"ncclGetVersion", |v| {
    let major = if v < 10000 { 1000 } else { 10000 };
    format!("{}.{}.{}", v / major, v % major / 100, v % 100)
});

/// What is looked for; of several majors each.
const WANTED: [(&str, Ask); 6] = [
    ("libcuda.so.1", CUDA),
    ("libnvrtc.so.13", NVRTC),
    ("libnvrtc.so.12", NVRTC),
    ("libcublasLt.so.13", CUBLAS_LT),
    ("libcublasLt.so.12", CUBLAS_LT),
    ("libnccl.so.2", NCCL),
];

pub(super) fn find_all() -> Vec<Library> {
    WANTED.iter().map(|&(name, ask)| find(name, ask)).collect()
}

fn find(name: &'static str, ask: Ask) -> Library {
    let library = match Loaded::open(name) {
        Ok(library) => library,
        Err(error) => return Library { name, path: None, version: None, error: Some(error) },
    };
    let (Ask::Status(function, _) | Ask::MajorMinor(function) | Ask::Value(function, _)) = ask;
    Library { name, path: library.symbol(function).and_then(path_of), version: version(&library, ask), error: None }
}

fn version(library: &Loaded, ask: Ask) -> Option<String> {
    let (mut first, mut second): (c_int, c_int) = (0, 0);
    match ask {
        Ask::Status(name, text) => {
            // SAFETY: the function of this name has this signature in every release of its library, may be called
            // before anything else, and writes one int.
            let status = unsafe { library.function::<extern "C" fn(*mut c_int) -> c_int>(name)?(&mut first) };
            (status == 0).then(|| text(first))
        }
        Ask::MajorMinor(name) => {
            type TwoInts = extern "C" fn(*mut c_int, *mut c_int) -> c_int;
            // SAFETY: as above; it writes two ints.
            let status = unsafe { library.function::<TwoInts>(name)?(&mut first, &mut second) };
            (status == 0).then(|| format!("{first}.{second}"))
        }
        Ask::Value(name, text) => {
            // SAFETY: as above; it takes nothing and returns a number.
            let value = unsafe { library.function::<extern "C" fn() -> usize>(name)?() };
            c_int::try_from(value).ok().map(text)
        }
    }
}

/// A library in this process. It stays for the process's life: CUDA's libraries start threads and exit handlers that
/// must not lose their code.
pub(super) struct Loaded(NonNull<c_void>);

impl Loaded {
    /// Loads it, or says why not.
    pub(super) fn open(name: &str) -> Result<Loaded, String> {
        let name = CString::new(name).expect("library names are literals without NUL");
        // SAFETY: the name ends in NUL; the constructors that run are those of NVIDIA's libraries, which expect this.
        let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_LAZY | libc::RTLD_LOCAL) };
        NonNull::new(handle).map(Loaded).ok_or_else(|| {
            // SAFETY: dlerror returns null or a string that ends in NUL and stays until this thread's next dl call.
            let error = unsafe { libc::dlerror().as_ref().map(|text| CStr::from_ptr(text)) };
            error.map_or("unknown error".to_owned(), |text| text.to_string_lossy().into_owned())
        })
    }

    /// The address of a function, if it has it.
    pub(super) fn symbol(&self, name: &CStr) -> Option<NonNull<c_void>> {
        // SAFETY: the handle comes from dlopen and is never closed; the name ends in NUL.
        NonNull::new(unsafe { libc::dlsym(self.0.as_ptr(), name.as_ptr()) })
    }

    /// A function, if it has it.
    ///
    /// # Safety
    /// `F` is the type of a C function pointer with the signature that the library gives to `name`.
    pub(super) unsafe fn function<F: Copy>(&self, name: &CStr) -> Option<F> {
        const { assert!(size_of::<F>() == size_of::<*mut c_void>()) };
        // SAFETY: `F` is a function pointer (the caller's promise), the address is that of its function, and the
        // library is never unloaded.
        self.symbol(name).map(|address| unsafe { std::mem::transmute_copy(&address) })
    }
}

/// The file that an address was loaded from.
fn path_of(address: NonNull<c_void>) -> Option<String> {
    // SAFETY: Dl_info holds pointers only, for which zero is a value.
    let mut info: libc::Dl_info = unsafe { std::mem::zeroed() };
    // SAFETY: dladdr accepts any address and writes only to `info`.
    let known = unsafe { libc::dladdr(address.as_ptr(), &mut info) } != 0;
    // SAFETY: when known, the name is null or a string of the loader's that lives as long as the library, so forever.
    let name = unsafe { (known && !info.dli_fname.is_null()).then(|| CStr::from_ptr(info.dli_fname)) };
    name.map(|name| name.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_library_that_is_not_there_says_so() {
        let library = find("libmoesaic-is-no-library.so.7", CUDA);
        assert!(library.error.unwrap().contains("libmoesaic-is-no-library.so.7"));
        assert_eq!((library.path, library.version), (None, None));
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn a_function_is_called_where_it_was_loaded() {
        // The C library stands in for CUDA's: every Linux has it.
        let libc = Loaded::open("libc.so.6").unwrap();
        assert!(path_of(libc.symbol(c"getpagesize").unwrap()).unwrap().contains("libc"));
        assert_eq!(version(&libc, Ask::Value(c"getpagesize", |v| (v % 4096).to_string())).unwrap(), "0");
        assert_eq!(version(&libc, CUDA), None);
    }

    #[test]
    fn versions_read_as_their_makers_write_them() {
        let text = |ask, v| match ask {
            Ask::Status(_, text) | Ask::Value(_, text) => text(v),
            Ask::MajorMinor(_) => unreachable!(),
        };
        assert_eq!(text(CUDA, 13020), "13.2");
        assert_eq!(text(CUBLAS_LT, 120803), "12.8.3");
        assert_eq!(text(NCCL, 22703), "2.27.3");
        assert_eq!(text(NCCL, 2804), "2.8.4");
    }
}
