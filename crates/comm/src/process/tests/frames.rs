//! Frames of every kind, whole, cut and spoiled.

use std::sync::Arc;

use moesaic_device::{Arena, SharedMap, Tensor};
use moesaic_plan::{MessageKind, Rank, Tag};
use moesaic_spec::{Bytes, DType};
use proptest::prelude::*;

use crate::process::decoder::{Decoder, Event};
use crate::process::frame::{self, Described, HEAD_BYTES, Link, Place};

const TAG: Tag = Tag { step: 1 << 40, layer: 60, micro_batch: 3, kind: MessageKind::Answer, round: 2 };

/// A sender's memory with a receiver for it.
struct Pair {
    sender: Arena,
    link: Link,
    shared: Arc<SharedMap>,
    receiver: Arena,
}

impl Pair {
    fn new() -> Pair {
        let (sender, file) = Arena::shared("sender", Bytes(2 << 20)).unwrap();
        let shared = Arc::new(SharedMap::open(&file, sender.capacity()).unwrap());
        let link = Link { from: Rank(3), to: Rank(1), shared_bytes: shared.len() };
        Pair { sender, link, shared, receiver: Arena::host("receiver", Bytes(2 << 20)).unwrap() }
    }

    fn decoder(&self) -> Decoder {
        Decoder::new(self.link, self.receiver.clone(), self.shared.clone())
    }

    /// What comes of these bytes when they come in chunks of this length: words, bytes of tensors, or text.
    fn decode(&self, bytes: &[u8], chunk: usize) -> (Vec<String>, Result<(), String>) {
        let mut decoder = self.decoder();
        let mut events = Vec::new();
        let mut deliver = |event| {
            events.push(match event {
                Event::Abort { why } => format!("abort: {why}"),
                Event::Message { tag, content: Err(why), .. } => format!("{tag}: {why}"),
                Event::Message { tag, content: Ok(message), was_shared } => {
                    let tensors: Vec<_> =
                        message.tensors.iter().map(|it| (it.dtype(), it.dims().to_vec(), sum(it.bytes()))).collect();
                    format!("{tag}: {:?} {tensors:?} {was_shared}", message.header)
                }
            });
        };
        for chunk in bytes.chunks(chunk) {
            if let Err(why) = decoder.push(chunk, &mut deliver) {
                return (events, Err(why.to_string()));
            }
        }
        (events, Ok(()))
    }
}

fn sum(bytes: &[u8]) -> u64 {
    bytes.iter().enumerate().map(|(i, &byte)| (i as u64 + 1) * u64::from(byte)).sum()
}

/// Words, and for each tensor its type, dims and whether it is in shared memory.
type Content = (Vec<u32>, Vec<(DType, Vec<usize>, bool)>);

fn content() -> impl Strategy<Value = Content> {
    let dtype = prop::sample::select(vec![DType::F32, DType::BF16, DType::I64, DType::U8, DType::F8E8M0]);
    let tensor = (dtype, prop::collection::vec(0..6usize, 0..=6), any::<bool>());
    (prop::collection::vec(any::<u32>(), 0..20), prop::collection::vec(tensor, 0..5))
}

/// The frame of a message, the tensors that must live until it is read, and what is to be decoded.
fn encode(pair: &Pair, (words, tensors): &Content) -> (Vec<u8>, Vec<Tensor>, String) {
    let mut kept = Vec::new();
    let mut described = Vec::new();
    for (i, (dtype, dims, is_shared)) in tensors.iter().enumerate() {
        let mut tensor = Tensor::empty(&pair.sender, dims, *dtype).unwrap();
        tensor.bytes_mut().iter_mut().enumerate().for_each(|(j, byte)| *byte = (i * 50 + j * 7) as u8);
        let place = if *is_shared { Place::Shared(tensor.offset_in(&pair.sender).unwrap()) } else { Place::Frame };
        described.push(Described { dims: dims.clone(), dtype: *dtype, place });
        kept.push(tensor);
    }
    let mut bytes = frame::message(pair.link, TAG, words, &described);
    let in_frame = kept.iter().zip(&described).filter(|(_, it)| it.place == Place::Frame);
    in_frame.for_each(|(tensor, _)| bytes.extend_from_slice(tensor.bytes()));
    let shapes: Vec<_> = kept.iter().map(|it| (it.dtype(), it.dims().to_vec(), sum(it.bytes()))).collect();
    let was_shared = tensors.iter().any(|(_, _, is_shared)| *is_shared);
    (bytes, kept, format!("{TAG}: {words:?} {shapes:?} {was_shared}"))
}

proptest! {
    #[test]
    fn what_is_sent_arrives_in_chunks_of_any_length(first in content(), second in content(), chunk in 1..300usize) {
        let pair = Pair::new();
        let (mut bytes, _first, expected) = encode(&pair, &first);
        let (more, _second, expected_2) = encode(&pair, &second);
        bytes.extend(more);
        bytes.extend(frame::abort(pair.link, "no memory"));
        let (events, end) = pair.decode(&bytes, chunk);
        prop_assert_eq!(events, [expected, expected_2, "abort: no memory".to_owned()]);
        prop_assert_eq!(end, Ok(()));
        prop_assert_eq!(pair.receiver.in_use(), Bytes(0));
    }

    #[test]
    fn a_frame_that_is_cut_is_waited_for(content in content(), cut: prop::sample::Index) {
        let pair = Pair::new();
        let (bytes, _kept, _) = encode(&pair, &content);
        let cut = cut.index(bytes.len());
        let mut decoder = pair.decoder();
        decoder.push(&bytes[..cut], &mut |_| panic!("nothing is complete")).unwrap();
        prop_assert_eq!(decoder.is_inside_frame(), cut > 0);
    }

    /// Whatever comes, the result is events or an error, and no more memory than the arena has.
    #[test]
    fn a_spoiled_frame_never_panics(
        content in content(),
        spoils in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        chunk in 1..300usize,
    ) {
        let pair = Pair::new();
        let (mut bytes, _kept, _) = encode(&pair, &content);
        for (at, byte) in spoils {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        bytes.extend([0; 200]);
        let _ = pair.decode(&bytes, chunk);
        prop_assert_eq!(pair.receiver.in_use(), Bytes(0));
    }

    #[test]
    fn random_bytes_are_refused(bytes in prop::collection::vec(any::<u8>(), HEAD_BYTES..200)) {
        let (events, end) = Pair::new().decode(&bytes, 64);
        prop_assert!(events.is_empty() && (end.is_err() || bytes.starts_with(b"MOEX")));
    }
}

#[test]
fn a_lie_is_refused_with_a_sentence() {
    let pair = Pair::new();
    let described = |dims: &[usize], place| Described { dims: dims.to_vec(), dtype: DType::F32, place };
    let good = frame::message(pair.link, TAG, &[7], &[described(&[2, 3], Place::Shared(64))]);
    assert_eq!(pair.decode(&good, 1000).1, Ok(()));
    // Where the fields are: see the table in `frame`.
    let tensor = HEAD_BYTES + 4;
    let spoiled: [(usize, &[u8], &str); 15] = [
        (0, b"HTTP", "magic is 0x50545448, expected 0x58454f4d"),
        (4, &[9], "kind is 9, expected 1 (message) or 2 (abort)"),
        (8, &[4], "sender is rank 4, expected rank 3"),
        (12, &[9], "receiver is rank 9, expected rank 1"),
        (23, &[200], "tag is 0xc80200000300003c, expected the code of a kind of message"),
        (32, &[0xff; 4], "number of words is 4294967295, expected at most 1048576"),
        (36, &[65], "number of tensors is 65, expected at most 64"),
        (36, &[2], "length is 68, expected 132 to 68719476868"),
        (40, &[69], "length is 69, expected 68"),
        (40, &[0xff; 8], "length is 18446744073709551615, expected 68 to 68719476804"),
        (tensor, &[8], "element type is 8, expected 0 to 7"),
        (tensor + 1, &[7], "number of dims is 7, expected at most 6"),
        (tensor + 2, &[2], "place is 2, expected 0 (frame) or 1 (shared memory)"),
        (tensor + 8, &[0xff; 8], "offset is 18446744073709551615 for 24 bytes, expected a range inside 2097152 bytes"),
        (tensor + 16, &[0xff; 8], "dims is [18446744073709551615, 3], expected at most 68719476736 bytes of F32"),
    ];
    for (at, bytes, expected) in spoiled {
        let mut frame = good.clone();
        frame[at..at + bytes.len()].copy_from_slice(bytes);
        assert_eq!(pair.decode(&frame, 1000), (Vec::new(), Err(format!("a frame's {expected}"))));
    }
}

/// The payload of a message that found no memory is skipped, and the next one understood.
#[test]
fn a_message_without_room_is_an_event() {
    let pair = Pair::new();
    let big = Described { dims: vec![3 << 20], dtype: DType::U8, place: Place::Frame };
    let mut bytes = frame::message(pair.link, TAG, &[], &[big]);
    bytes.resize(bytes.len() + (3 << 20), 1);
    bytes.extend(frame::message(pair.link, TAG, &[5], &[]));
    let (events, end) = pair.decode(&bytes, 64 << 10);
    let full = "the receiver arena of 2.00 MiB cannot hold 3.00 MiB more (0 B in use)";
    assert_eq!(events, [format!("{TAG}: {full}"), format!("{TAG}: [5] [] false")]);
    assert_eq!(end, Ok(()));
}

#[test]
fn a_long_reason_is_cut_between_letters() {
    let pair = Pair::new();
    let (events, end) = pair.decode(&frame::abort(pair.link, &"ä".repeat(5000)), 1000);
    assert_eq!((events, end), (vec![format!("abort: {}", "ä".repeat(frame::MAX_REASON_BYTES / 2))], Ok(())));
}
