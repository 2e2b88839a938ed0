//! One step, event by event.

use std::cmp::{Ordering, Reverse};
use std::collections::{BinaryHeap, HashMap};

use moesaic_device::op_log::{OpCall, Peer};
use moesaic_plan::{Lane, MessageKind, Rank, Work};
use moesaic_spec::Bytes;

use super::{Flow, MessageSpan, OpSpan, StepInput, StepTimes, VirtualClock};
use crate::clock::activity::collective_idx;
use crate::clock::{ActionSpan, Busy};
use crate::error::Place;
use crate::record::work_name;
use crate::{PlannerError, Roofline};

/// One step under way.
pub(crate) struct Replay<'c, 'a, 'i> {
    clock: &'c mut VirtualClock<'a>,
    input: StepInput<'i>,
    roofline: Roofline<'a>,
    events: BinaryHeap<Reverse<Event>>,
    /// `2 * rank + lane`.
    cursors: Vec<Cursor>,
    /// By rank and action of the schedule: its end, once known.
    ends: Vec<Vec<Option<f64>>>,
    /// By rank: actions that were not executed and are not known to be done.
    skipped: Vec<Vec<usize>>,
    /// Position in `times.messages`.
    sent: HashMap<Name, usize>,
    /// Cursors that wait for a message that is not sent yet.
    waiting: HashMap<Name, usize>,
    /// Actions that are not done.
    left: usize,
    times: StepTimes,
}

/// A message of the step: from, to, tag.
type Name = (Rank, Rank, u64);

/// Something to do at a time; ties go by rank, then compute, comm, background.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Event {
    at: f64,
    rank: Rank,
    queue: usize,
}

const BACKGROUND: usize = 2;

impl Eq for Event {}

impl PartialOrd for Event {
    fn partial_cmp(&self, other: &Event) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Event {
    fn cmp(&self, other: &Event) -> Ordering {
        self.at.total_cmp(&other.at).then_with(|| (self.rank, self.queue).cmp(&(other.rank, other.queue)))
    }
}

/// Where a lane is in its list.
struct Cursor {
    rank: Rank,
    lane: Lane,
    /// Indices in the rank's records.
    records: Vec<usize>,
    /// Which of them is next or running.
    next: usize,
    running: Option<Running>,
    /// An event will call it.
    called: bool,
}

#[derive(Clone, Copy)]
struct Running {
    start: f64,
    now: f64,
    waiting: f64,
    /// The next of the action's calls.
    call: usize,
}

fn lane_idx(lane: Lane) -> usize {
    match lane {
        Lane::Compute => 0,
        Lane::Comm => 1,
    }
}

impl<'c, 'a, 'i> Replay<'c, 'a, 'i> {
    pub(crate) fn new(clock: &'c mut VirtualClock<'a>, input: StepInput<'i>) -> Result<Self, PlannerError> {
        let ranks = clock.settings.world_size;
        let (schedules, records) = (input.schedules.len(), input.ranks.len());
        if schedules != ranks || records != ranks {
            return Err(PlannerError::RankCount { ranks, schedules, records });
        }
        let times = StepTimes {
            step: clock.steps,
            actions: vec![Vec::new(); ranks],
            ops: vec![Vec::new(); ranks],
            busy: vec![Busy::default(); ranks],
            ..StepTimes::default()
        };
        let mut replay = Replay {
            roofline: clock.roofline(),
            clock,
            input,
            events: BinaryHeap::new(),
            cursors: Vec::with_capacity(2 * ranks),
            ends: Vec::with_capacity(ranks),
            skipped: Vec::with_capacity(ranks),
            sent: HashMap::new(),
            waiting: HashMap::new(),
            left: 0,
            times,
        };
        for rank in 0..ranks {
            replay.add_rank(Rank(rank as u32))?;
        }
        Ok(replay)
    }

    fn add_rank(&mut self, rank: Rank) -> Result<(), PlannerError> {
        let schedule = &self.input.schedules[rank.idx()].actions;
        let records = &self.input.ranks[rank.idx()].actions;
        let mut last = None;
        for record in records {
            let action = record.action;
            if last.is_some_and(|last| last >= action) || action >= schedule.len() {
                return Err(PlannerError::RecordOrder { rank, action, actions: schedule.len() });
            }
            last = Some(action);
        }
        for lane in [Lane::Compute, Lane::Comm] {
            let of_lane = (0..records.len()).filter(|&idx| schedule[records[idx].action].lane == lane);
            let cursor = Cursor { rank, lane, records: of_lane.collect(), next: 0, running: None, called: false };
            self.cursors.push(cursor);
            self.call(2 * rank.idx() + lane_idx(lane), self.clock.free[rank.idx()][lane_idx(lane)]);
        }
        self.left += records.len();
        self.ends.push(vec![None; schedule.len()]);
        let num_micro_batches = schedule.iter().map(|action| action.micro_batch as usize + 1).max().unwrap_or(0);
        self.times.sampled.push(vec![None; num_micro_batches]);
        let mut executed = records.iter().map(|record| record.action).peekable();
        let skipped = (0..schedule.len()).filter(|action| executed.next_if_eq(action).is_none());
        self.skipped.push(skipped.collect());
        self.pass_skipped(rank);

        let begin = self.clock.free[rank.idx()][0];
        if let Some(flow) = self.clock.background[rank.idx()].front() {
            self.events.push(Reverse(Event { at: flow.next_at, rank, queue: BACKGROUND }));
        }
        for call in &self.input.ranks[rank.idx()].background {
            let peer = call.peer.expect("background calls are messages");
            let place = Place { rank, action: 0, name: "background", layer: 0, micro_batch: 0 };
            self.known(&place, peer)?;
            if peer.outbound {
                self.start_flow((rank, Rank(peer.rank), peer.tag), call, begin, None);
            }
        }
        Ok(())
    }

    pub(crate) fn run(mut self) -> Result<StepTimes, PlannerError> {
        while self.left > 0 {
            let Some(Reverse(event)) = self.events.pop() else {
                return Err(self.stuck());
            };
            if event.queue == BACKGROUND {
                self.send_piece(event.rank);
            } else {
                let cursor = 2 * event.rank.idx() + event.queue;
                self.cursors[cursor].called = false;
                self.advance(cursor, event.at)?;
            }
        }
        if let Some(span) = self.times.messages.iter().find(|span| lost(span)) {
            let at = self.place(span.from, span.sender_action.unwrap_or(0));
            return Err(PlannerError::NeverReceived { at, kind: span.kind, to: span.to, tag: span.tag });
        }
        Ok(self.times)
    }

    /// Has a lane go on at a time.
    fn call(&mut self, cursor: usize, at: f64) {
        let Cursor { rank, lane, called, .. } = &mut self.cursors[cursor];
        assert!(!*called, "rank {rank} is called twice");
        *called = true;
        self.events.push(Reverse(Event { at, rank: *rank, queue: lane_idx(*lane) }));
    }

    /// Runs a lane until it must wait: for a message, for the other lane, or for its turn to send.
    fn advance(&mut self, cursor: usize, now: f64) -> Result<(), PlannerError> {
        loop {
            let Cursor { rank, lane, next, running, .. } = self.cursors[cursor];
            let Some(&record) = self.cursors[cursor].records.get(next) else {
                return Ok(());
            };
            let input = self.input;
            let record = &input.ranks[rank.idx()].actions[record];
            let Some(mut run) = running.or_else(|| self.begin(rank, record.action)) else {
                return Ok(());
            };
            while let Some(call) = record.calls.get(run.call) {
                match call.peer {
                    None => self.compute(rank, record.action, call, &mut run),
                    Some(peer) if peer.outbound => {
                        if run.now > now {
                            self.cursors[cursor].running = Some(run);
                            self.call(cursor, run.now);
                            return Ok(());
                        }
                        self.send(rank, record.action, call, peer, run.now)?;
                    }
                    Some(peer) => {
                        if !self.receive(rank, record.action, call, peer, &mut run)? {
                            self.cursors[cursor].running = Some(run);
                            self.waiting.insert((Rank(peer.rank), rank, peer.tag), cursor);
                            return Ok(());
                        }
                    }
                }
                run.call += 1;
            }
            self.cursors[cursor].running = None;
            self.cursors[cursor].next += 1;
            self.end(rank, record.action, lane, run);
        }
    }

    /// Starts an action if what it comes after is done.
    fn begin(&self, rank: Rank, action: usize) -> Option<Running> {
        let of_rank = &self.input.schedules[rank.idx()].actions[action];
        let ready = self.input.ready.get(rank.idx()).and_then(|ready| ready.get(of_rank.micro_batch as usize));
        let mut start = self.clock.free[rank.idx()][lane_idx(of_rank.lane)].max(ready.copied().unwrap_or(0.0));
        for &earlier in &of_rank.after {
            start = start.max(self.ends[rank.idx()][earlier as usize]?);
        }
        Some(Running { start, now: start, waiting: 0.0, call: 0 })
    }

    fn end(&mut self, rank: Rank, action: usize, lane: Lane, run: Running) {
        let Running { start, now: end, waiting, .. } = run;
        self.clock.free[rank.idx()][lane_idx(lane)] = end;
        self.ends[rank.idx()][action] = Some(end);
        self.left -= 1;
        self.times.actions[rank.idx()].push(ActionSpan { action, lane, start, end, waiting });
        let scheduled = &self.input.schedules[rank.idx()].actions[action];
        if scheduled.work == Work::Sample {
            self.times.sampled[rank.idx()][scheduled.micro_batch as usize] = Some(end);
        }
        self.pass_skipped(rank);
        // The other lane may wait for this.
        let other = 2 * rank.idx() + 1 - lane_idx(lane);
        let Cursor { running, called, .. } = &self.cursors[other];
        if running.is_none() && !called {
            self.call(other, end);
        }
    }

    /// Actions that were not executed are done when what they come after is.
    fn pass_skipped(&mut self, rank: Rank) {
        let schedule = &self.input.schedules[rank.idx()].actions;
        let ends = &mut self.ends[rank.idx()];
        self.skipped[rank.idx()].retain(|&action| {
            let done = |end: Option<f64>, &earlier: &u32| Some(end?.max(ends[earlier as usize]?));
            ends[action] = schedule[action].after.iter().fold(Some(0.0), done);
            ends[action].is_none()
        });
    }

    fn compute(&mut self, rank: Rank, action: usize, call: &OpCall, run: &mut Running) {
        let (start, seconds) = (run.now, self.roofline.seconds(call));
        run.now += seconds;
        let scheduled = &self.input.schedules[rank.idx()].actions[action];
        let totals = &mut self.clock.totals.ranks[rank.idx()];
        totals.flops += call.flops.expected;
        totals.memory_bytes += call.bytes.expected;
        let activity = &mut self.clock.activity[rank.idx()];
        match scheduled.lane {
            Lane::Compute => {
                activity.computing.push(start, run.now);
                self.times.busy[rank.idx()].compute_ops += seconds;
            }
            Lane::Comm => self.times.busy[rank.idx()].comm_ops += seconds,
        }
        if matches!(scheduled.work, Work::Experts { .. }) {
            activity.experts.push(start, run.now);
        }
        if self.clock.settings.keep_ops {
            let (flops, bytes) = (call.flops.expected, call.bytes.expected);
            let span = OpSpan { op: call.op, lane: scheduled.lane, start, end: run.now, flops, bytes };
            self.times.ops[rank.idx()].push(span);
        }
    }

    fn send(&mut self, rank: Rank, action: usize, call: &OpCall, peer: Peer, now: f64) -> Result<(), PlannerError> {
        let place = self.place(rank, action);
        self.known(&place, peer)?;
        let (to, tag, kind) = (Rank(peer.rank), peer.tag, (self.clock.settings.kind_of)(peer.tag));
        let name = (rank, to, tag);
        if kind == MessageKind::Weights {
            self.start_flow(name, call, now, Some(action));
            return Ok(());
        }
        if self.sent.contains_key(&name) {
            return Err(PlannerError::SentTwice { at: place, kind, to, tag });
        }
        let bytes = Bytes(call.bytes.bound);
        let transfer = self.clock.network.carry(rank, to, bytes, now);
        let span = MessageSpan {
            from: rank,
            to,
            tag,
            kind,
            bytes,
            class: transfer.class,
            sent: now,
            start: transfer.start,
            end: transfer.end,
            arrival: transfer.arrival,
            wanted: None,
            sender_action: Some(action),
            receiver_action: None,
        };
        self.clock.count(&span);
        self.clock.mark(&span, transfer);
        self.sent.insert(name, self.times.messages.len());
        self.times.messages.push(span);
        if let Some(cursor) = self.waiting.remove(&name) {
            self.call(cursor, span.arrival);
        }
        Ok(())
    }

    /// Waits for a message; `false` if it is not sent yet.
    fn receive(
        &mut self,
        rank: Rank,
        action: usize,
        call: &OpCall,
        peer: Peer,
        run: &mut Running,
    ) -> Result<bool, PlannerError> {
        let at = self.place(rank, action);
        self.known(&at, peer)?;
        let kind = (self.clock.settings.kind_of)(peer.tag);
        if kind == MessageKind::Weights {
            return Ok(true);
        }
        let from = Rank(peer.rank);
        let Some(&message) = self.sent.get(&(from, rank, peer.tag)) else {
            return Ok(false);
        };
        let span = &mut self.times.messages[message];
        let (sent, received) = (span.bytes.0, call.bytes.bound);
        if sent != received {
            return Err(PlannerError::OtherSize { at, kind, from, sent, received });
        }
        span.wanted = Some(run.now);
        span.receiver_action = Some(action);
        let waited = (span.arrival - run.now).max(0.0);
        self.clock.activity[rank.idx()].waits[collective_idx(kind.collective())].push(run.now, span.arrival);
        let busy = &mut self.times.busy[rank.idx()];
        match self.input.schedules[rank.idx()].actions[action].lane {
            Lane::Compute => busy.compute_waiting += waited,
            Lane::Comm => busy.comm_waiting += waited,
        }
        run.waiting += waited;
        run.now = run.now.max(span.arrival);
        Ok(true)
    }

    fn start_flow(&mut self, (from, to, tag): Name, call: &OpCall, now: f64, sender_action: Option<usize>) {
        let bytes = Bytes(call.bytes.bound);
        let span = MessageSpan {
            from,
            to,
            tag,
            kind: MessageKind::Weights,
            bytes,
            class: self.clock.network.class(from, to),
            sent: now,
            start: now,
            end: now,
            arrival: now,
            wanted: None,
            sender_action,
            receiver_action: None,
        };
        let flows = &mut self.clock.background[from.idx()];
        flows.push_back(Flow { span, left: bytes, next_at: now });
        if flows.len() == 1 {
            self.events.push(Reverse(Event { at: now, rank: from, queue: BACKGROUND }));
        }
    }

    fn send_piece(&mut self, rank: Rank) {
        if let Some(Some(span)) = self.clock.send_piece(rank) {
            self.times.messages.push(span);
        }
        if let Some(flow) = self.clock.background[rank.idx()].front() {
            self.events.push(Reverse(Event { at: flow.next_at, rank, queue: BACKGROUND }));
        }
    }

    fn known(&self, place: &Place, peer: Peer) -> Result<(), PlannerError> {
        let ranks = self.clock.settings.world_size;
        if (peer.rank as usize) < ranks {
            return Ok(());
        }
        Err(PlannerError::NoSuchRank { at: *place, peer: peer.rank, last: ranks - 1 })
    }

    fn place(&self, rank: Rank, action: usize) -> Place {
        let scheduled = &self.input.schedules[rank.idx()].actions[action];
        let (layer, micro_batch) = (scheduled.layer, scheduled.micro_batch);
        Place { rank, action, name: work_name(&scheduled.work), layer, micro_batch }
    }

    /// Nothing can go on: somebody waits for a message that nobody sends. Others wait for those who wait; a message whose
    /// sender has nothing left to do is named rather than one whose sender waits, too.
    fn stuck(&self) -> PlannerError {
        let mut waiting: Vec<(Name, usize)> = self.waiting.iter().map(|(&name, &cursor)| (name, cursor)).collect();
        let waits = |rank: Rank| self.waiting.values().any(|&cursor| self.cursors[cursor].rank == rank);
        waiting.sort_by_key(|&((from, to, tag), _)| (waits(from), to, from, tag));
        let &((from, to, tag), cursor) = waiting.first().expect("a lane stops only where it waits for a message");
        let Cursor { records, next, .. } = &self.cursors[cursor];
        let action = self.input.ranks[to.idx()].actions[records[*next]].action;
        PlannerError::NeverSent { at: self.place(to, action), kind: (self.clock.settings.kind_of)(tag), from, tag }
    }
}

/// A message that its receiver never asked for.
fn lost(span: &MessageSpan) -> bool {
    span.wanted.is_none() && span.kind != MessageKind::Weights
}
