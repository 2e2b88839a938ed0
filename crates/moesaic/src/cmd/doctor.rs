//! `moesaic doctor`: what this machine has.

use anyhow::Result;
use moesaic_device::machine::Machine;
use moesaic_device::{Pool, machine, measure_read_bandwidth};

use crate::args::DoctorArgs;

pub(crate) fn run(args: &DoctorArgs) -> Result<()> {
    let machine = Machine::detect();
    let num_cores = machine::num_usable_cores();
    let bytes_per_s = measure_read_bandwidth(&Pool::new(num_cores)?)?;
    if args.json {
        let mut json = serde_json::to_value(&machine)?;
        json["read_bandwidth_bytes_per_s"] = serde_json::json!(bytes_per_s);
        println!("{json:#}");
    } else {
        println!("{machine}");
        println!("read bandwidth  {:.1} GB/s with {num_cores} threads (measured)", bytes_per_s / 1e9);
    }
    Ok(())
}
