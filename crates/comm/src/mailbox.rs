//! One rank's inbox: messages by sender and tag, whenever they came.
//!
//! One thread receives, any thread delivers. Whoever waits for a set of messages is woken once, by the delivery that
//! completes the set.

use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use moesaic_device::DeviceError;
use moesaic_plan::{Rank, Tag};

use crate::{CommError, Message};

/// The inbox of `rank`.
pub(crate) struct Mailbox {
    rank: Rank,
    state: Mutex<State>,
    complete: Condvar,
}

struct State {
    /// By sender. Ranks are in step, so a sender has few messages here at a time, and a search is faster than a hash.
    slots: Vec<Vec<Slot>>,
    /// By peer: why it ended.
    ended: Vec<Option<String>>,
    /// Why this rank takes nothing more.
    closed: Option<String>,
    /// The tag that the receiver waits for now.
    waits_for: Option<Tag>,
    /// By peer: the receiver waits for it, and it is not there. All false while nobody waits.
    missing: Vec<bool>,
    num_missing: usize,
}

struct Slot {
    tag: Tag,
    /// What came first; an error if there was no memory for it.
    content: Result<Message, DeviceError>,
    num_copies: usize,
}

impl Mailbox {
    /// Empty.
    pub(crate) fn new(rank: Rank, world_size: usize) -> Mailbox {
        let state = State {
            slots: (0..world_size).map(|_| Vec::new()).collect(),
            ended: vec![None; world_size],
            closed: None,
            waits_for: None,
            missing: vec![false; world_size],
            num_missing: 0,
        };
        Mailbox { rank, state: Mutex::new(state), complete: Condvar::new() }
    }

    /// Puts a message in; an error, with the reason, if this rank takes nothing more.
    pub(crate) fn deliver(&self, from: Rank, tag: Tag, content: Result<Message, DeviceError>) -> Result<(), String> {
        let mut state = self.lock();
        if let Some(why) = &state.closed {
            return Err(why.clone());
        }
        let wakes = state.insert(from, tag, content);
        drop(state);
        if wakes {
            self.complete.notify_one();
        }
        Ok(())
    }

    /// Notes that no more comes from `peer`. The first reason stays.
    pub(crate) fn end(&self, peer: Rank, why: &str) {
        let mut state = self.lock();
        state.ended[peer.idx()].get_or_insert_with(|| why.to_owned());
        let wakes = state.missing[peer.idx()];
        drop(state);
        if wakes {
            self.complete.notify_one();
        }
    }

    /// Why `peer` ended, if it did.
    pub(crate) fn ended(&self, peer: Rank) -> Option<String> {
        self.lock().ended[peer.idx()].clone()
    }

    /// Takes nothing more, and gives up what is there. The first reason stays.
    pub(crate) fn close(&self, why: &str) {
        let mut state = self.lock();
        state.closed.get_or_insert_with(|| why.to_owned());
        let slots: Vec<Vec<Slot>> = state.slots.iter_mut().map(std::mem::take).collect();
        drop(state);
        // Memory of the messages goes back to its arenas while nobody waits for this lock.
        drop(slots);
    }

    /// One message from each of `from`, in their order.
    pub(crate) fn receive_all(&self, from: &[Rank], tag: Tag, deadline: Duration) -> Result<Vec<Message>, CommError> {
        let start = Instant::now();
        let mut state = self.lock();
        state.begin_wait(from, tag);
        while state.num_missing > 0 {
            let lost = from.iter().find(|peer| state.missing[peer.idx()] && state.ended[peer.idx()].is_some());
            if let Some(&peer) = lost {
                state.end_wait();
                return Err(self.peer_ended(&state, peer, tag));
            }
            let left = deadline.saturating_sub(start.elapsed());
            if left.is_zero() {
                let peer = *from.iter().find(|peer| state.missing[peer.idx()]).expect("one is missing");
                state.end_wait();
                return Err(CommError::Timeout { rank: self.rank, peer, tag, seconds: deadline.as_secs_f64() });
            }
            let (guard, _) = self.complete.wait_timeout(state, left).expect(NO_PANIC);
            state = guard;
        }
        state.end_wait();
        from.iter().map(|&peer| self.take(&mut state, peer, tag)).collect()
    }

    /// A message if it is there.
    pub(crate) fn try_receive(&self, from: Rank, tag: Tag) -> Result<Option<Message>, CommError> {
        let mut state = self.lock();
        if state.place_of(from, tag).is_some() {
            return self.take(&mut state, from, tag).map(Some);
        }
        if state.ended[from.idx()].is_some() { Err(self.peer_ended(&state, from, tag)) } else { Ok(None) }
    }

    fn take(&self, state: &mut State, from: Rank, tag: Tag) -> Result<Message, CommError> {
        let place = state.place_of(from, tag).expect("a message that is not missing is there");
        let slot = state.slots[from.idx()].swap_remove(place);
        if slot.num_copies > 1 {
            let (got, expected) = (format!("{} copies", slot.num_copies), "1".to_owned());
            return Err(CommError::Malformed { rank: self.rank, peer: from, tag, got, expected });
        }
        Ok(slot.content?)
    }

    fn peer_ended(&self, state: &State, peer: Rank, tag: Tag) -> CommError {
        let why = state.ended[peer.idx()].clone().expect("the caller saw that it ended");
        CommError::PeerEnded { rank: self.rank, peer, tag, why }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect(NO_PANIC)
    }
}

const NO_PANIC: &str = "no code panics while it holds a mailbox";

impl State {
    /// Where a message is among those of its sender.
    fn place_of(&self, from: Rank, tag: Tag) -> Option<usize> {
        self.slots[from.idx()].iter().position(|slot| slot.tag == tag)
    }

    /// Whether this delivery completes what the receiver waits for.
    fn insert(&mut self, from: Rank, tag: Tag, content: Result<Message, DeviceError>) -> bool {
        match self.place_of(from, tag) {
            Some(place) => self.slots[from.idx()][place].num_copies += 1,
            None => self.slots[from.idx()].push(Slot { tag, content, num_copies: 1 }),
        }
        if self.waits_for != Some(tag) || !std::mem::take(&mut self.missing[from.idx()]) {
            return false;
        }
        self.num_missing -= 1;
        self.num_missing == 0
    }

    fn begin_wait(&mut self, from: &[Rank], tag: Tag) {
        self.waits_for = Some(tag);
        for &peer in from {
            if self.place_of(peer, tag).is_none() {
                self.missing[peer.idx()] = true;
                self.num_missing += 1;
            }
        }
    }

    fn end_wait(&mut self) {
        self.waits_for = None;
        if self.num_missing > 0 {
            self.missing.fill(false);
            self.num_missing = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use moesaic_plan::MessageKind;

    use super::*;

    fn tag(layer: u32) -> Tag {
        Tag { step: 7, layer, micro_batch: 1, kind: MessageKind::Dispatch, round: 0 }
    }

    fn message(word: u32) -> Message {
        Message { header: vec![word], tensors: Vec::new() }
    }

    #[test]
    fn only_the_delivery_that_completes_the_set_wakes() {
        let mailbox = Mailbox::new(Rank(0), 5);
        let mut state = mailbox.lock();
        state.insert(Rank(3), tag(0), Ok(message(3)));
        state.begin_wait(&[Rank(1), Rank(2), Rank(3), Rank(4)], tag(0));
        assert_eq!(state.num_missing, 3);
        let mut insert = |from, layer| state.insert(Rank(from), tag(layer), Ok(message(from)));
        assert!(!insert(1, 0) && !insert(2, 1) && !insert(4, 0) && !insert(4, 0) && !insert(0, 0));
        assert!(insert(2, 0));
        assert!(!insert(2, 0));
    }

    #[test]
    fn a_second_copy_is_an_error() {
        let mailbox = Mailbox::new(Rank(0), 2);
        for word in 0..3 {
            mailbox.deliver(Rank(1), tag(4), Ok(message(word))).unwrap();
        }
        let error = mailbox.receive_all(&[Rank(1)], tag(4), Duration::ZERO).err().unwrap().to_string();
        assert_eq!(error, "rank 0: dispatch of layer 4, micro-batch 1, step 7 from rank 1 has 3 copies, expected 1");
    }

    #[test]
    fn what_came_before_the_end_is_received() {
        let mailbox = Mailbox::new(Rank(0), 2);
        mailbox.deliver(Rank(1), tag(0), Ok(message(1))).unwrap();
        mailbox.end(Rank(1), "it had enough");
        mailbox.end(Rank(1), "connection closed");
        assert_eq!(mailbox.receive_all(&[Rank(1)], tag(0), Duration::ZERO).unwrap()[0].header, [1]);
        let expected = "rank 1 has ended (it had enough); rank 0 waited for dispatch of layer 0, micro-batch 1, step 7";
        let error = mailbox.receive_all(&[Rank(1)], tag(0), Duration::from_secs(9)).err().unwrap();
        assert_eq!(error.to_string(), expected);
        assert_eq!(mailbox.try_receive(Rank(1), tag(0)).err().unwrap().to_string(), expected);
    }

    #[test]
    fn a_failed_wait_leaves_what_came() {
        let mailbox = Mailbox::new(Rank(0), 3);
        mailbox.deliver(Rank(2), tag(0), Ok(message(2))).unwrap();
        let error = mailbox.receive_all(&[Rank(2), Rank(1)], tag(0), Duration::from_millis(1)).err().unwrap();
        assert!(matches!(error, CommError::Timeout { peer: Rank(1), .. }));
        mailbox.deliver(Rank(1), tag(0), Ok(message(1))).unwrap();
        let both = mailbox.receive_all(&[Rank(2), Rank(1)], tag(0), Duration::ZERO).unwrap();
        assert_eq!([&both[0].header, &both[1].header], [&[2], &[1]]);
    }
}
