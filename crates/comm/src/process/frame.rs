//! What goes over a socket: frames of a fixed head, a body, and payload. All numbers are little-endian.
//!
//! ```text
//! head     magic u32 | kind u32 | from u32 | to u32 | tag code u64 | tag step u64 | words u32 | tensors u32 | length u64
//! body     words × u32 | tensors × (dtype u8 | dims u8 | place u8 | 0 × 5 | offset u64 | 6 × u64)
//! payload  the bytes of tensors whose place is the frame, in order
//! ```
//!
//! `length` counts body and payload. A frame of kind "abort" has text as its body. Whatever a peer writes is checked here
//! before it is used; nothing is allocated because a head asks for it.

use moesaic_plan::{Rank, Tag};
use moesaic_spec::DType;

/// Starts every frame.
pub(super) const MAGIC: u32 = u32::from_le_bytes(*b"MOEX");
/// Length of a head.
pub const HEAD_BYTES: usize = 48;
/// Length of what describes one tensor.
const TENSOR_BYTES: usize = 64;
/// Limits of one message.
pub(super) const MAX_WORDS: usize = 1 << 20;
pub(super) const MAX_TENSORS: usize = 64;
pub(super) const MAX_DIMS: usize = 6;
const MAX_TENSOR_BYTES: u64 = 1 << 36;
/// Longest reason of an abort, bytes.
pub(super) const MAX_REASON_BYTES: usize = 4096;

const KIND_MESSAGE: u32 = 1;
const KIND_ABORT: u32 = 2;

const DTYPES: [DType; 8] =
    [DType::F32, DType::BF16, DType::F16, DType::F8E4M3, DType::F8E8M0, DType::I64, DType::I32, DType::U8];

/// What is wrong with a frame.
#[derive(Debug, PartialEq, thiserror::Error)]
#[error("a frame's {field} is {got}, expected {expected}")]
pub struct MalformedFrame {
    /// Which part.
    pub field: &'static str,
    /// What it is.
    pub got: String,
    /// What would be right.
    pub expected: String,
}

fn malformed(field: &'static str, got: impl ToString, expected: impl ToString) -> MalformedFrame {
    MalformedFrame { field, got: got.to_string(), expected: expected.to_string() }
}

/// Whose frames these are, and where their tensors may lie.
#[derive(Clone, Copy, Debug)]
pub struct Link {
    /// Sender.
    pub from: Rank,
    /// Receiver.
    pub to: Rank,
    /// Size of the sender's shared memory.
    pub shared_bytes: usize,
}

/// Where a tensor's bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// Behind the body.
    Frame,
    /// At this offset of the sender's shared memory.
    Shared(usize),
}

/// A tensor of a message.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Described {
    pub(super) dims: Vec<usize>,
    pub(super) dtype: DType,
    pub(super) place: Place,
}

impl Described {
    /// Size in bytes. Dims were checked when read, or come from a tensor that is there.
    pub(super) fn size_bytes(&self) -> usize {
        self.dims.iter().product::<usize>() * self.dtype.size_bytes()
    }
}

/// A message's head and body.
pub(super) fn message(link: Link, tag: Tag, words: &[u32], tensors: &[Described]) -> Vec<u8> {
    assert!(words.len() <= MAX_WORDS, "{} words in a message, at most {MAX_WORDS}", words.len());
    assert!(tensors.len() <= MAX_TENSORS, "{} tensors in a message, at most {MAX_TENSORS}", tensors.len());
    let body_bytes = 4 * words.len() + TENSOR_BYTES * tensors.len();
    let payload_bytes: usize = tensors.iter().filter(|t| t.place == Place::Frame).map(Described::size_bytes).sum();
    let mut frame = Vec::with_capacity(HEAD_BYTES + body_bytes);
    for word in [MAGIC, KIND_MESSAGE, link.from.0, link.to.0] {
        frame.extend(word.to_le_bytes());
    }
    frame.extend(tag.code().to_le_bytes());
    frame.extend(tag.step.to_le_bytes());
    frame.extend((words.len() as u32).to_le_bytes());
    frame.extend((tensors.len() as u32).to_le_bytes());
    frame.extend(((body_bytes + payload_bytes) as u64).to_le_bytes());
    words.iter().for_each(|word| frame.extend(word.to_le_bytes()));
    for Described { dims, dtype, place } in tensors {
        assert!(dims.len() <= MAX_DIMS, "a tensor of {} dims in a message, at most {MAX_DIMS}", dims.len());
        let dtype = DTYPES.iter().position(|it| it == dtype).expect("every type is in the list");
        let (place, offset) = match *place {
            Place::Frame => (0, 0),
            Place::Shared(offset) => (1, offset),
        };
        frame.extend([dtype as u8, dims.len() as u8, place, 0, 0, 0, 0, 0]);
        frame.extend((offset as u64).to_le_bytes());
        let padded = dims.iter().chain(&[0; MAX_DIMS]).take(MAX_DIMS);
        padded.for_each(|&dim| frame.extend((dim as u64).to_le_bytes()));
    }
    frame
}

/// A frame that says why its sender ends, cut to what a frame may say.
pub(super) fn abort(link: Link, why: &str) -> Vec<u8> {
    let why = &why[..why.floor_char_boundary(MAX_REASON_BYTES)];
    let mut frame = Vec::with_capacity(HEAD_BYTES + why.len());
    for word in [MAGIC, KIND_ABORT, link.from.0, link.to.0, 0, 0, 0, 0, 0, 0] {
        frame.extend(word.to_le_bytes());
    }
    frame.extend((why.len() as u64).to_le_bytes());
    frame.extend(why.as_bytes());
    frame
}

/// What a head says.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Head {
    Message { tag: Tag, num_words: usize, num_tensors: usize, length: u64 },
    Abort { length: usize },
}

impl Head {
    pub(super) fn parse(bytes: &[u8; HEAD_BYTES], link: Link) -> Result<Head, MalformedFrame> {
        let mut fields = Fields(bytes);
        let magic = fields.u32();
        if magic != MAGIC {
            return Err(malformed("magic", format!("{magic:#010x}"), format!("{MAGIC:#010x}")));
        }
        let kind = fields.u32();
        let (from, to) = (Rank(fields.u32()), Rank(fields.u32()));
        if from != link.from {
            return Err(malformed("sender", format!("rank {from}"), format!("rank {}", link.from)));
        }
        if to != link.to {
            return Err(malformed("receiver", format!("rank {to}"), format!("rank {}", link.to)));
        }
        let (code, step) = (fields.u64(), fields.u64());
        let (num_words, num_tensors, length) = (fields.u32() as usize, fields.u32() as usize, fields.u64());
        match kind {
            KIND_MESSAGE => {
                let known = || malformed("tag", format!("{code:#x}"), "the code of a kind of message");
                let tag = Tag::from_code(code, step).ok_or_else(known)?;
                if num_words > MAX_WORDS {
                    return Err(malformed("number of words", num_words, format!("at most {MAX_WORDS}")));
                }
                if num_tensors > MAX_TENSORS {
                    return Err(malformed("number of tensors", num_tensors, format!("at most {MAX_TENSORS}")));
                }
                let head = Head::Message { tag, num_words, num_tensors, length };
                let body_bytes = head.body_bytes() as u64;
                if length < body_bytes || length - body_bytes > MAX_TENSOR_BYTES {
                    let most = body_bytes + MAX_TENSOR_BYTES;
                    return Err(malformed("length", length, format!("{body_bytes} to {most}")));
                }
                Ok(head)
            }
            KIND_ABORT if length <= MAX_REASON_BYTES as u64 => Ok(Head::Abort { length: length as usize }),
            KIND_ABORT => Err(malformed("length", length, format!("at most {MAX_REASON_BYTES}"))),
            other => Err(malformed("kind", other, "1 (message) or 2 (abort)")),
        }
    }

    /// Length of what follows before the payload.
    pub(super) fn body_bytes(&self) -> usize {
        match *self {
            Head::Message { num_words, num_tensors, .. } => 4 * num_words + TENSOR_BYTES * num_tensors,
            Head::Abort { length } => length,
        }
    }
}

/// The body of a message, which has the length that its head said.
pub(super) fn parse_body(head: Head, body: &[u8], link: Link) -> Result<(Vec<u32>, Vec<Described>), MalformedFrame> {
    let Head::Message { num_words, length, .. } = head else { panic!("the body of a message") };
    assert_eq!(body.len(), head.body_bytes(), "a whole body");
    let (words, tensors) = body.split_at(4 * num_words);
    let words = words.chunks_exact(4).map(|word| Fields(word).u32()).collect();
    let tensors = tensors.chunks_exact(TENSOR_BYTES).map(|tensor| parse_tensor(tensor, link));
    let tensors: Vec<Described> = tensors.collect::<Result<_, _>>()?;
    // At most 64 times 2^36.
    let payload_bytes: u64 =
        tensors.iter().filter(|tensor| tensor.place == Place::Frame).map(|tensor| tensor.size_bytes() as u64).sum();
    if body.len() as u64 + payload_bytes != length {
        return Err(malformed("length", length, body.len() as u64 + payload_bytes));
    }
    Ok((words, tensors))
}

fn parse_tensor(bytes: &[u8], link: Link) -> Result<Described, MalformedFrame> {
    let (dtype, num_dims, place) = (bytes[0], bytes[1] as usize, bytes[2]);
    let known = || malformed("element type", dtype, format!("0 to {}", DTYPES.len() - 1));
    let dtype = *DTYPES.get(usize::from(dtype)).ok_or_else(known)?;
    if num_dims > MAX_DIMS {
        return Err(malformed("number of dims", num_dims, format!("at most {MAX_DIMS}")));
    }
    let mut fields = Fields(&bytes[8..]);
    let offset = fields.u64();
    let dims: Vec<u64> = (0..num_dims).map(|_| fields.u64()).collect();
    // A dim of 0 makes the rest worth nothing; each must still be a size that the others could have.
    let most = dims.iter().try_fold(dtype.size_bytes() as u64, |n, &dim| n.checked_mul(dim.max(1)));
    if most.is_none_or(|bytes| bytes > MAX_TENSOR_BYTES) {
        return Err(malformed("dims", format!("{dims:?}"), format!("at most {MAX_TENSOR_BYTES} bytes of {dtype}")));
    }
    let dims: Vec<usize> = dims.iter().map(|&dim| dim as usize).collect();
    let described = Described { dims, dtype, place: Place::Frame };
    match place {
        0 if offset == 0 => Ok(described),
        0 => Err(malformed("offset", offset, "0 for a tensor inside the frame")),
        1 => {
            let end = offset.checked_add(described.size_bytes() as u64);
            if end.is_none_or(|end| end > link.shared_bytes as u64) {
                let got = format!("{offset} for {} bytes", described.size_bytes());
                return Err(malformed("offset", got, format!("a range inside {} bytes", link.shared_bytes)));
            }
            Ok(Described { place: Place::Shared(offset as usize), ..described })
        }
        other => Err(malformed("place", other, "0 (frame) or 1 (shared memory)")),
    }
}

/// Numbers one after the other, out of bytes that are long enough.
pub(super) struct Fields<'a>(pub(super) &'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let (field, rest) = self.0.split_first_chunk().expect("the caller has checked the length");
        self.0 = rest;
        *field
    }

    pub(super) fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }

    pub(super) fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }
}
