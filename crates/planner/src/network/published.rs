//! Measurements that others published: files of `bench/results/published`, whose heads name source and licence.

use serde_json::{Map, Value};

use super::{CommOp, MeasuredGpu, Version};

/// One measurement.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Measured {
    /// On what.
    pub gpu: MeasuredGpu,
    /// What was measured.
    pub op: CommOp,
    /// With which software.
    pub version: Version,
    /// How long it took, seconds.
    pub seconds: f64,
}

impl Measured {
    /// In which of some parts the measurement is, by its sizes alone. FNV-1a.
    pub(super) fn part(&self, salt: u64, parts: u64) -> u64 {
        let text = format!("{:?}", self.op);
        let step = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        (text.bytes().fold(step(0xcbf2_9ce4_8422_2325, salt as u8), step) >> 32) % parts
    }
}

/// All measurements of one operation on one GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Table {
    /// The GPU.
    pub gpu: MeasuredGpu,
    /// The operation.
    pub op: &'static str,
    text: &'static str,
}

macro_rules! tables {
    ($($gpu:ident $folder:literal: $($op:literal)*;)*) => {
        &[$($(Table {
            gpu: MeasuredGpu::$gpu,
            op: $op,
            text: include_str!(concat!("../../../../bench/results/published/", $folder, "/", $op, ".csv")),
        },)*)*]
    };
}

/// Every table.
pub const TABLES: &[Table] = tables! {
    H200 "h200_sxm": "nccl_all_reduce" "nccl_all_gather" "nccl_reduce_scatter" "nccl_alltoall" "custom_all_reduce"
        "deepep_ll_dispatch" "deepep_ll_combine" "deepep_normal_dispatch" "deepep_normal_combine";
    H100 "h100_sxm": "nccl_all_reduce" "nccl_all_gather" "nccl_reduce_scatter" "nccl_alltoall" "custom_all_reduce"
        "deepep_ll_dispatch" "deepep_ll_combine" "deepep_normal_dispatch" "deepep_normal_combine";
    A100 "a100_sxm": "nccl_all_reduce" "nccl_all_gather" "nccl_reduce_scatter" "nccl_alltoall" "custom_all_reduce";
};

impl Table {
    /// The rows.
    pub fn rows(&self) -> Vec<Measured> {
        let mut lines = self.text.lines().filter(|line| !line.starts_with('#'));
        let names: Vec<&str> = lines.next().expect("a line of names").split(',').collect();
        lines.map(|line| self.row(&names, line)).collect()
    }

    /// The files are ours: a row that cannot be read is our mistake.
    fn row(&self, names: &[&str], line: &str) -> Measured {
        let Table { gpu, op, .. } = self;
        let mut params = Map::new();
        let (mut version, mut seconds) = (Version::Newest, f64::NAN);
        for (&name, value) in names.iter().zip(line.split(',')) {
            match name {
                "framework" => {}
                "version" => version = Version::of(op, value),
                "latency_us" => seconds = value.parse::<f64>().expect("microseconds") * 1e-6,
                _ => drop(params.insert(name.into(), value.parse::<u64>().map_or(Value::Null, Value::from))),
            }
        }
        assert!(seconds > 0.0, "{gpu:?} {op}: {line}: latency_us");
        let op = CommOp::from_params(op, &params).unwrap_or_else(|fault| panic!("{gpu:?} {op}: {line}: {fault}"));
        Measured { gpu: *gpu, op, version, seconds }
    }
}
