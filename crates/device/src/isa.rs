//! What the CPU can do, found at run time.

use std::fmt;
use std::sync::OnceLock;

use crate::{DeviceError, env};

/// Instruction sets that kernels have paths for, each including those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Isa {
    /// Plain Rust.
    Portable,
    /// AVX2 with FMA.
    Avx2,
    /// AVX-512 F, BW, DQ, VL.
    Avx512,
    /// AVX-512 with BF16 conversions and dot products.
    Avx512Bf16,
    /// AMX tiles with BF16.
    Amx,
}

/// All, weakest first.
pub const ALL: [Isa; 5] = [Isa::Portable, Isa::Avx2, Isa::Avx512, Isa::Avx512Bf16, Isa::Amx];

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Isa::Portable => "portable",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
            Isa::Avx512Bf16 => "avx512-bf16",
            Isa::Amx => "amx",
        })
    }
}

impl std::str::FromStr for Isa {
    type Err = DeviceError;

    fn from_str(name: &str) -> Result<Isa, DeviceError> {
        Isa::among(name, Isa::Amx)
    }
}

impl serde::Serialize for Isa {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl Isa {
    /// The best that this machine and its operating system allow, found once per process.
    pub fn detect() -> Isa {
        static FOUND: OnceLock<Isa> = OnceLock::new();
        *FOUND.get_or_init(detect)
    }

    /// [`Isa::detect`], or the weaker one that the variable `MOESAIC_ISA` names.
    pub fn from_env() -> Result<Isa, DeviceError> {
        let best = Isa::detect();
        env::value("MOESAIC_ISA").map_or(Ok(best), |asked| Isa::among(&asked, best))
    }

    /// The one of this name, at most `best`.
    fn among(name: &str, best: Isa) -> Result<Isa, DeviceError> {
        let usable = || ALL.into_iter().filter(|&isa| isa <= best);
        usable().find(|isa| isa.to_string() == name).ok_or_else(|| DeviceError::Isa {
            asked: name.to_string(),
            available: usable().map(|isa| isa.to_string()).collect::<Vec<_>>().join(", "),
        })
    }
}

#[cfg(target_arch = "x86_64")]
fn detect() -> Isa {
    use std::arch::is_x86_feature_detected as has;
    if !(has!("avx2") && has!("fma") && has!("f16c")) {
        return Isa::Portable;
    }
    if !(has!("avx512f") && has!("avx512bw") && has!("avx512dq") && has!("avx512vl")) {
        return Isa::Avx2;
    }
    if !has!("avx512bf16") {
        return Isa::Avx512;
    }
    if amx_usable() { Isa::Amx } else { Isa::Avx512Bf16 }
}

#[cfg(not(target_arch = "x86_64"))]
fn detect() -> Isa {
    Isa::Portable
}

/// Whether the CPU has AMX tiles with BF16 and the kernel lets this process use them.
///
/// Tile state is 8 KiB a thread, so Linux hands it out only on request: `arch_prctl(ARCH_REQ_XCOMP_PERM, 18)`, once per
/// process, inherited by threads made afterwards and valid for those that exist.
#[cfg(target_arch = "x86_64")]
fn amx_usable() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_int = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_ulong = 18;
    const AMX_BF16: u32 = 1 << 22;
    const AMX_TILE: u32 = 1 << 24;
    let leaf = std::arch::x86_64::__cpuid_count(7, 0);
    if leaf.edx & AMX_BF16 == 0 || leaf.edx & AMX_TILE == 0 {
        return false;
    }
    // SAFETY: this system call takes two integers and changes only what this process may use.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}
