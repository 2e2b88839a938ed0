//! Setting AMX tiles up and giving them back: what all tile code shares.

use std::arch::asm;

/// What `LDTILECFG` reads.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// Gives this thread eight tiles of 64-byte rows, as many rows each as `rows` says.
///
/// # Safety
/// The machine has AMX and the process may use it (`Isa::Amx`); `rows` are within 1..=16.
pub(crate) unsafe fn configure(rows: [u8; 8]) {
    let mut config = Config { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
    config.row_bytes[..8].fill(64);
    config.rows[..8].copy_from_slice(&rows);
    // SAFETY: a valid configuration in 64 bytes of memory; clobbers only tile registers, which no Rust value lives in.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &config, options(nostack, readonly)) };
}

/// Gives this thread's tile state back, so that the system need not save it.
///
/// # Safety
/// As [`configure`].
pub(crate) unsafe fn release() {
    // SAFETY: no memory is touched; nobody keeps values in tiles between tasks.
    unsafe { asm!("tilerelease", options(nostack, nomem)) };
}
