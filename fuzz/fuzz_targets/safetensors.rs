//! Any bytes as `model.safetensors`, or as the index of a sharded checkpoint: tensors that lie inside the file, or an
//! error.
//!
//! The first byte chooses: even, the rest is the file; odd, a byte 0 divides the rest into the index and one shard,
//! `model-00001-of-00001.safetensors`.
#![no_main]

use libfuzzer_sys::fuzz_target;
use moesaic_model::Checkpoint;

fuzz_target!(|data: &[u8]| {
    let Some((&kind, data)) = data.split_first() else { return };
    let folder = tempfile::tempdir().expect("a folder can be made");
    let write = |name: &str, bytes: &[u8]| std::fs::write(folder.path().join(name), bytes).expect("a file is written");
    if kind % 2 == 0 {
        write("model.safetensors", data);
    } else {
        let end = data.iter().position(|&byte| byte == 0).unwrap_or(data.len());
        write("model.safetensors.index.json", &data[..end]);
        write("model-00001-of-00001.safetensors", data.get(end + 1..).unwrap_or_default());
    }
    let Ok(checkpoint) = Checkpoint::open(folder.path()) else { return };
    for name in checkpoint.names() {
        let tensor = checkpoint.get(name).expect("a name of the checkpoint");
        // Reads every byte that is claimed to be there.
        std::hint::black_box(tensor.bytes.iter().fold(0u8, |sum, byte| sum ^ byte));
    }
});
