//! GPUs as YAML: a file of their own, or part of a cluster's. Keys are the fields' names; quantities are in bytes,
//! seconds, FLOP/s, watts and US dollars.

use std::fmt::Write;
use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use super::{Gpu, PeakFlops, Power};
use crate::fields::{Fields, shorten, show};
use crate::nearest::nearest;
use crate::presets::gpus;
use crate::yaml::{parse_mapping, scalar};
use crate::{Bytes, SpecError};

/// FLOP/s and bytes/s, from a microcontroller's to far beyond any GPU's.
pub(crate) const RATE: RangeInclusive<f64> = 1.0..=1e18;
pub(crate) const SHARE: RangeInclusive<f64> = 0.001..=1.0;
pub(crate) const SECONDS: RangeInclusive<f64> = 0.0..=1.0;
const SMS: RangeInclusive<usize> = 1..=1 << 16;
const WATTS: RangeInclusive<f64> = 0.0..=1e5;
const USD: RangeInclusive<f64> = 0.0..=1e6;

impl Gpu {
    /// Reads a GPU file. `origin` is its path, for messages. Total: any text gives a checked GPU or an error.
    ///
    /// # Errors
    /// [`SpecError`]: not YAML, a key unknown or missing, or a value out of range or at odds with another.
    pub fn from_yaml(text: &str, origin: &str) -> Result<Gpu, SpecError> {
        read_gpu(&Fields::new(origin, "", &parse_mapping(text, origin)?))
    }

    /// The file that is read back as this GPU.
    pub fn to_yaml(&self) -> String {
        let PeakFlops { bf16, f8, f4, f32 } = self.peak_flops;
        let mut text = format!(
            "name: {}\nmemory: {}\nsms: {}\npeak_flops: {{bf16: {bf16:e}, f8: {f8:e}, f4: {f4:e}, f32: {f32:e}}} # FLOP/s\n\
             compute_utilization: {}\nmemory_bandwidth: {:e} # bytes/s\nmemory_utilization: {}\nlaunch_s: {:e}\n",
            scalar(&self.name),
            self.memory.0,
            self.sms,
            self.compute_utilization,
            self.memory_bandwidth,
            self.memory_utilization,
            self.launch_s
        );
        if let Some(Power { idle_w, max_w }) = self.power {
            let _ = writeln!(text, "power: {{idle_w: {idle_w}, max_w: {max_w}}}");
        }
        if let Some(usd) = self.usd_per_hour {
            let _ = writeln!(text, "usd_per_hour: {usd}");
        }
        text
    }
}

/// The GPU at `key`: a preset's name, or keys of its own.
pub(crate) fn read_gpu_of(f: &Fields, key: &str) -> Result<Gpu, SpecError> {
    if let Some(Value::String(_)) = f.get(key) {
        let preset = preset_map(f, key)?.expect("the key is there");
        return read_gpu(&Fields::new(f.origin, format!("{}.", f.dotted(key)), &preset));
    }
    let own =
        f.section(key)?.ok_or_else(|| f.missing(key, format!("{}, or keys of its own, indented below it", names())))?;
    read_gpu(&own)
}

/// The keys of a GPU, some of which may be those of a `preset`.
fn read_gpu(own: &Fields) -> Result<Gpu, SpecError> {
    own.only_keys(&[
        "preset",
        "name",
        "memory",
        "sms",
        "peak_flops",
        "compute_utilization",
        "memory_bandwidth",
        "memory_utilization",
        "launch_s",
        "power",
        "usd_per_hour",
    ])?;
    let map = with_preset(own)?;
    let f = own.with_map(&map);
    let peak = f.section("peak_flops")?.ok_or_else(|| f.missing("peak_flops", "FLOP/s for bf16, f8 and f32"))?;
    peak.only_keys(&["bf16", "f8", "f4", "f32"])?;
    let f8 = peak.required_number("f8", RATE)?;
    Ok(Gpu {
        name: f.required_text("name")?.to_owned(),
        memory: read_bytes(&f, "memory")?,
        sms: f.size("sms", Some(Gpu::DEFAULT_SMS), SMS)?,
        peak_flops: PeakFlops {
            bf16: peak.required_number("bf16", RATE)?,
            f8,
            f4: peak.number("f4", f8, RATE)?,
            f32: peak.required_number("f32", RATE)?,
        },
        compute_utilization: f.required_number("compute_utilization", SHARE)?,
        memory_bandwidth: f.required_number("memory_bandwidth", RATE)?,
        memory_utilization: f.required_number("memory_utilization", SHARE)?,
        launch_s: f.required_number("launch_s", SECONDS)?,
        power: f.section("power")?.map(|power| read_power(&power)).transpose()?,
        usd_per_hour: f.opt_number("usd_per_hour", USD)?,
    })
}

fn read_power(f: &Fields) -> Result<Power, SpecError> {
    f.only_keys(&["idle_w", "max_w"])?;
    let power = Power { idle_w: f.required_number("idle_w", WATTS)?, max_w: f.required_number("max_w", WATTS)? };
    if power.max_w < power.idle_w {
        return Err(f.invalid("max_w", power.max_w, format!("at least idle_w ({})", power.idle_w)));
    }
    Ok(power)
}

/// The GPU's own keys over those of its `preset`; keys of a section one by one.
fn with_preset(own: &Fields) -> Result<Map<String, Value>, SpecError> {
    let Some(mut map) = preset_map(own, "preset")? else { return Ok(own.map().clone()) };
    for (key, value) in own.map().iter().filter(|(key, _)| *key != "preset") {
        match (map.get_mut(key), value) {
            (Some(Value::Object(section)), Value::Object(changes)) => section.extend(changes.clone()),
            _ => _ = map.insert(key.clone(), value.clone()),
        }
    }
    Ok(map)
}

/// All keys of the preset that the text at `key` names; case does not matter.
fn preset_map(f: &Fields, key: &str) -> Result<Option<Map<String, Value>>, SpecError> {
    let Some(name) = f.text(key)? else { return Ok(None) };
    let lower = name.to_ascii_lowercase();
    let Some(file) = gpus().iter().find(|file| file.name == lower) else {
        let nearest = nearest(&lower, gpus().iter().map(|file| file.name));
        return Err(f.invalid(key, format!("{:?}", shorten(name)), format!("{} (`{nearest}`?)", names())));
    };
    let map = parse_mapping(file.yaml, file.name).expect("our own file is a mapping");
    with_preset(&Fields::new(file.name, "", &map)).map(Some)
}

fn names() -> String {
    format!("one of {}", gpus().iter().map(|file| file.name).collect::<Vec<_>>().join(", "))
}

/// A size with a unit, or bytes.
fn read_bytes(f: &Fields, key: &str) -> Result<Bytes, SpecError> {
    let expected = "a size like 80 GiB";
    let bytes = match f.get(key) {
        None => return Err(f.missing(key, expected)),
        Some(Value::Number(number)) => number.as_u64().map(Bytes).ok_or_else(|| expected.to_owned()),
        Some(Value::String(text)) => text.parse(),
        Some(_) => Err(expected.to_owned()),
    };
    match bytes {
        Ok(Bytes(0)) => Err(f.invalid(key, "0", "more than none")),
        Ok(bytes) => Ok(bytes),
        Err(expected) => Err(f.invalid(key, f.get(key).map_or_else(String::new, show), expected)),
    }
}
