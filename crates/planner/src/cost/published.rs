//! Measurements that others published: files of `bench/results/published`, whose heads name source and licence.

use std::sync::LazyLock;

use moesaic_spec::{Gpu, gpu_preset};

use super::table::{Row, parse};

macro_rules! tables {
    ($($device:literal: $($op:literal)*;)*) => {
        &[$($(($device, $op, include_str!(
            concat!("../../../../bench/results/published/", $device, "/", $op, ".csv")
        )),)*)*]
    };
}

/// GPU, op, text.
const TABLES: &[(&str, &str, &str)] = tables! {
    "h200_sxm": "gemm" "moe" "moe_wideep_context" "moe_wideep_generation" "attn_decode" "attn_prefill" "mla_decode";
    "h100_sxm": "gemm" "moe" "moe_wideep_context" "moe_wideep_generation" "attn_decode" "attn_prefill" "mla_decode";
    "a100_sxm": "gemm" "moe" "attn_decode" "attn_prefill" "mla_decode";
    "h800": "moe_grouped_gemm_decode" "attn_decode" "mla_decode";
};

/// GPUs with tables: name of the folder, name of the preset, what a GPU of the kind has in its name.
const DEVICES: &[(&str, &str, &str)] = &[
    ("h200_sxm", "h200-sxm", "H200"),
    ("h100_sxm", "h100-sxm", "H100"),
    ("a100_sxm", "a100-sxm-80gb", "A100"),
    ("h800", "h800", "H800"),
];

/// A GPU that was measured.
#[derive(Clone, Debug, PartialEq)]
pub struct Device {
    /// Name of its folder of tables.
    pub folder: &'static str,
    name: &'static str,
    /// Its data sheet.
    pub gpu: Gpu,
}

static PRESETS: LazyLock<Vec<Device>> = LazyLock::new(|| {
    let device =
        |&(folder, preset, name)| Device { folder, name, gpu: gpu_preset(preset).expect("presets are tested") };
    DEVICES.iter().map(device).collect()
});

/// All GPUs with tables.
pub fn devices() -> &'static [Device] {
    &PRESETS
}

/// The device of a folder.
pub fn device(folder: &str) -> Option<&'static Device> {
    devices().iter().find(|device| device.folder == folder)
}

/// The device whose tables speak for a GPU: the one that its name says. A GPU that none was measured of is taken for an H200:
/// what it reaches of its own data sheet is then what the H200 reaches of its.
pub(super) fn device_of(gpu: &Gpu) -> (&'static Device, bool) {
    let name = gpu.name.to_ascii_uppercase();
    match devices().iter().find(|device| name.contains(device.name)) {
        Some(device) => (device, true),
        None => (&devices()[0], false),
    }
}

/// All rows of all tables.
pub fn rows() -> Vec<Row> {
    let table = |&(folder, op, text): &(&str, &str, &str)| {
        let gpu = &device(folder).expect("every table has a device").gpu;
        parse(text, &format!("bench/results/published/{folder}/{op}.csv"), folder, gpu, op)
            .unwrap_or_else(|error| panic!("{error}"))
    };
    TABLES.iter().flat_map(table).collect()
}
