//! Bytes of one connection, as they come, to messages: no socket, no thread, so anything can be fed to it.

use std::sync::Arc;

use moesaic_device::{Arena, DeviceError, SharedMap, Tensor};
use moesaic_plan::Tag;

use super::frame::{self, Described, HEAD_BYTES, Head, Link, MalformedFrame, Place};
use crate::Message;

/// The receiving end of one connection.
pub struct Decoder {
    link: Link,
    /// Where tensors are copied to.
    exchange: Arena,
    /// The sender's memory.
    shared: Arc<SharedMap>,
    /// What has come of the head or body that is being read.
    buffer: Vec<u8>,
    state: State,
}

enum State {
    Head,
    Body(Head),
    Payload(Incoming),
}

/// A message whose payload is on its way.
struct Incoming {
    tag: Tag,
    words: Vec<u32>,
    /// An error if there is no memory for it: its payload is read and thrown away, so that the next frame is found.
    tensors: Result<Vec<Tensor>, DeviceError>,
    /// Tensors whose bytes are in the frame and have not come in full, last first.
    in_frame: Vec<usize>,
    /// Bytes that have come of the tensor that is being read.
    filled: usize,
    /// Payload that has not come.
    left: u64,
    /// Some of its tensors were in shared memory, which the sender may use again now.
    was_shared: bool,
}

/// What came.
pub enum Event {
    /// A message, or why there was no memory for it.
    Message {
        /// Which.
        tag: Tag,
        /// What it is.
        content: Result<Message, DeviceError>,
        /// The sender waits to hear that its memory is free again.
        was_shared: bool,
    },
    /// The peer ends.
    Abort {
        /// Why.
        why: String,
    },
}

impl Decoder {
    /// For frames of this link. Copies what lies in `shared`, the sender's memory, to `exchange`.
    pub fn new(link: Link, exchange: Arena, shared: Arc<SharedMap>) -> Decoder {
        assert_eq!(link.shared_bytes, shared.len(), "the sender's memory");
        Decoder { link, exchange, shared, buffer: Vec::new(), state: State::Head }
    }

    /// Whether a frame has begun and not ended.
    pub fn is_inside_frame(&self) -> bool {
        !matches!(self.state, State::Head) || !self.buffer.is_empty()
    }

    /// The next bytes, and what they complete. After an error no frame can be found any more.
    pub fn push(&mut self, mut bytes: &[u8], deliver: &mut dyn FnMut(Event)) -> Result<(), MalformedFrame> {
        loop {
            self.state = match &mut self.state {
                State::Head => {
                    let Some(head) = collect(&mut self.buffer, &mut bytes, HEAD_BYTES) else { return Ok(()) };
                    let head = Head::parse(head.first_chunk().expect("as long as a head"), self.link)?;
                    self.buffer.clear();
                    State::Body(head)
                }
                &mut State::Body(head) => {
                    let Some(body) = collect(&mut self.buffer, &mut bytes, head.body_bytes()) else { return Ok(()) };
                    let next = match head {
                        Head::Abort { .. } => {
                            deliver(Event::Abort { why: String::from_utf8_lossy(body).into_owned() });
                            State::Head
                        }
                        Head::Message { tag, length, .. } => {
                            let (words, described) = frame::parse_body(head, body, self.link)?;
                            let left = length - body.len() as u64;
                            let tensors = copy_shared(&described, &self.exchange, &self.shared);
                            let is_in_frame = |&idx: &usize| described[idx].place == Place::Frame;
                            let in_frame = (0..described.len()).rev().filter(is_in_frame).collect();
                            let was_shared = described.iter().any(|tensor| tensor.place != Place::Frame);
                            State::Payload(Incoming { tag, words, tensors, in_frame, filled: 0, left, was_shared })
                        }
                    };
                    self.buffer.clear();
                    next
                }
                State::Payload(incoming) => {
                    incoming.fill(&mut bytes);
                    if incoming.left > 0 {
                        return Ok(());
                    }
                    let State::Payload(incoming) = std::mem::replace(&mut self.state, State::Head) else {
                        unreachable!("the arm that this is in")
                    };
                    let Incoming { tag, words, tensors, was_shared, .. } = incoming;
                    let content = tensors.map(|tensors| Message { header: words, tensors });
                    deliver(Event::Message { tag, content, was_shared });
                    State::Head
                }
            }
        }
    }
}

/// The first `len` bytes, once they are all there. The buffer grows only by what came.
fn collect<'a>(buffer: &'a mut Vec<u8>, bytes: &mut &[u8], len: usize) -> Option<&'a [u8]> {
    let (now, later) = bytes.split_at(bytes.len().min(len - buffer.len()));
    buffer.extend_from_slice(now);
    *bytes = later;
    (buffer.len() == len).then_some(buffer)
}

/// Tensors of the receiver, those that lie in the sender's memory with their bytes.
fn copy_shared(described: &[Described], exchange: &Arena, shared: &SharedMap) -> Result<Vec<Tensor>, DeviceError> {
    let tensors = described.iter().map(|Described { dims, dtype, place }| {
        let mut tensor = Tensor::empty(exchange, dims, *dtype)?;
        if let Place::Shared(offset) = *place {
            shared.copy_to(offset, tensor.bytes_mut());
        }
        Ok(tensor)
    });
    tensors.collect()
}

impl Incoming {
    /// Takes what belongs to the payload.
    fn fill(&mut self, bytes: &mut &[u8]) {
        let now = (bytes.len() as u64).min(self.left) as usize;
        let (mut payload, later) = bytes.split_at(now);
        *bytes = later;
        self.left -= now as u64;
        let Ok(tensors) = &mut self.tensors else { return };
        while !payload.is_empty() {
            let idx = *self.in_frame.last().expect("the length is the sum of the tensors'");
            let to = &mut tensors[idx].bytes_mut()[self.filled..];
            let (now, later) = payload.split_at(payload.len().min(to.len()));
            to[..now.len()].copy_from_slice(now);
            payload = later;
            self.filled += now.len();
            if self.filled == tensors[idx].size_bytes() {
                self.in_frame.pop();
                self.filled = 0;
            }
        }
    }
}
