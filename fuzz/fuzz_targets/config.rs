//! Any text as `config.json`: a model or an error. What is understood must be writable and readable again as the same
//! model, and everything that is counted from it must be countable.
#![no_main]

use libfuzzer_sys::fuzz_target;
use moesaic_spec::{GenerationConfig, ModelSpec};

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let _ = GenerationConfig::from_json(text, "generation_config.json");
    if let Ok(spec) = ModelSpec::from_config_json(text, "config.json") {
        let _ = spec.counts();
        let again = ModelSpec::from_config_json(&spec.to_config_json(), "written").expect("what we write we read");
        assert_eq!(spec, again);
    }
});
