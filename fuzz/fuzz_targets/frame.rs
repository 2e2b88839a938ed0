//! Any bytes as what a peer writes to its socket: messages or an error, never a panic; and no more memory than the
//! receiver's arena has.
//!
//! The first byte says in how long chunks the rest comes.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use moesaic_comm::process::decoder::{Decoder, Event};
use moesaic_comm::process::frame::Link;
use moesaic_device::{Arena, SharedMap};
use moesaic_plan::Rank;
use moesaic_spec::Bytes;

fuzz_target!(|data: &[u8]| {
    let Some((&chunk, data)) = data.split_first() else { return };
    let (sender, file) = Arena::shared("sender", Bytes(1 << 20)).expect("there is memory");
    let shared = Arc::new(SharedMap::open(&file, sender.capacity()).expect("it was just made"));
    let receiver = Arena::host("receiver", Bytes(1 << 20)).expect("there is memory");
    let link = Link { from: Rank(1), to: Rank(0), shared_bytes: shared.len() };
    let mut decoder = Decoder::new(link, receiver, shared);
    for chunk in data.chunks(usize::from(chunk) + 1) {
        let mut read = |event| {
            if let Event::Message { content: Ok(message), .. } = event {
                // Reads every byte that is claimed to be there.
                let bytes = message.tensors.iter().flat_map(|tensor| tensor.bytes());
                std::hint::black_box(bytes.fold(message.header.len() as u8, |sum, byte| sum ^ byte));
            }
        };
        if decoder.push(chunk, &mut read).is_err() {
            return;
        }
    }
});
