//! Chrome traces, which Perfetto and chrome://tracing show: a process for each rank, in it a thread for each lane and for
//! each of its links.
//!
//! Format: "Trace Event Format", JSON array form. Times are microseconds of the virtual clock.

use std::io::Write;

use moesaic_plan::{Lane, MessageKind, Rank, Schedule};
use moesaic_spec::LinkClass;
use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::PlannerError;
use crate::clock::{ActionSpan, MessageSpan, OpSpan, StepTimes};
use crate::record::work_name;

/// Writes a trace, step by step; nothing but the writer grows with the run.
#[derive(Debug)]
pub struct ChromeTrace<W> {
    to: W,
    steps_left: u64,
    events: u64,
    flows: u64,
}

/// Threads of a rank's process, in the order in which they are shown.
const THREADS: [&str; 5] = ["compute", "comm", "network out, in the node", "network out, between nodes", "weights out"];

#[derive(Serialize)]
struct Event<'a> {
    name: &'a str,
    ph: &'a str,
    pid: u32,
    tid: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    cat: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ts: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    dur: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<u64>,
    /// Binds a flow's end to the slice around it.
    #[serde(skip_serializing_if = "Option::is_none")]
    bp: Option<&'a str>,
    #[serde(skip_serializing_if = "Map::is_empty")]
    args: Map<String, Value>,
}

impl<'a> Event<'a> {
    fn new(name: &'a str, ph: &'a str, rank: Rank, tid: usize) -> Event<'a> {
        let args = Map::new();
        Event { name, ph, pid: rank.0, tid, cat: None, ts: None, dur: None, id: None, bp: None, args }
    }

    fn slice(name: &'a str, rank: Rank, tid: usize, (start, end): (f64, f64)) -> Event<'a> {
        Event { ts: Some(1e6 * start), dur: Some(1e6 * (end - start)), ..Event::new(name, "X", rank, tid) }
    }

    fn with(mut self, args: Value) -> Event<'a> {
        if let Value::Object(args) = args {
            self.args = args;
        }
        self
    }
}

impl<W: Write> ChromeTrace<W> {
    /// A trace of at most `max_steps` steps. `names` says what each rank is, for example `attention, heads 0 to 2`.
    pub fn new(to: W, names: &[String], max_steps: u64) -> Result<ChromeTrace<W>, PlannerError> {
        let mut trace = ChromeTrace { to, steps_left: max_steps, events: 0, flows: 0 };
        for (rank, name) in names.iter().enumerate() {
            let rank = Rank(rank as u32);
            let of_process = json!({ "name": format!("rank {rank}: {name}") });
            trace.write(&Event::new("process_name", "M", rank, 0).with(of_process))?;
            trace.write(&Event::new("process_sort_index", "M", rank, 0).with(json!({ "sort_index": rank.0 })))?;
            for (tid, thread) in THREADS.iter().enumerate() {
                trace.write(&Event::new("thread_name", "M", rank, tid).with(json!({ "name": thread })))?;
                trace.write(&Event::new("thread_sort_index", "M", rank, tid).with(json!({ "sort_index": tid })))?;
            }
        }
        Ok(trace)
    }

    /// Adds a step, or nothing when there are enough.
    pub fn step(&mut self, times: &StepTimes, schedules: &[Schedule]) -> Result<(), PlannerError> {
        if self.steps_left == 0 {
            return Ok(());
        }
        self.steps_left -= 1;
        for ((schedule, actions), ops) in schedules.iter().zip(&times.actions).zip(&times.ops) {
            actions.iter().try_for_each(|span| self.action(schedule, span, times.step))?;
            ops.iter().try_for_each(|span| self.op(schedule.rank, span))?;
        }
        times.messages.iter().try_for_each(|span| self.message(schedules, span))
    }

    /// Ends the file and gives the writer back.
    pub fn finish(mut self) -> Result<W, PlannerError> {
        let end: &[u8] = if self.events == 0 { b"[]\n" } else { b"\n]\n" };
        self.to.write_all(end).and_then(|()| self.to.flush()).map_err(cannot_write)?;
        Ok(self.to)
    }

    fn action(&mut self, schedule: &Schedule, span: &ActionSpan, step: u64) -> Result<(), PlannerError> {
        let action = &schedule.actions[span.action];
        let slice = Event::slice(work_name(&action.work), schedule.rank, lane_tid(span.lane), (span.start, span.end));
        self.write(&slice.with(json!({
            "step": step,
            "layer": action.layer,
            "micro_batch": action.micro_batch,
            "waiting_us": 1e6 * span.waiting,
        })))
    }

    fn op(&mut self, rank: Rank, span: &OpSpan) -> Result<(), PlannerError> {
        let slice = Event::slice(span.op, rank, lane_tid(span.lane), (span.start, span.end));
        self.write(&slice.with(json!({ "flops": span.flops, "bytes": span.bytes })))
    }

    /// The message on its way, the receiver's wait, and an arrow from the sending action to the receiving one.
    fn message(&mut self, schedules: &[Schedule], span: &MessageSpan) -> Result<(), PlannerError> {
        let kind = span.kind.to_string();
        let tid = match (span.kind, span.class) {
            (MessageKind::Weights, _) => 4,
            (_, LinkClass::InterNode) => 3,
            (_, LinkClass::IntraNode) => 2,
        };
        let args = json!({ "to": span.to.0, "bytes": span.bytes.0, "queued_us": 1e6 * (span.start - span.sent) });
        self.write(&Event::slice(&kind, span.from, tid, (span.start, span.end)).with(args))?;

        let (Some(wanted), Some(sender), Some(receiver)) = (span.wanted, span.sender_action, span.receiver_action)
        else {
            return Ok(());
        };
        let tid_of = |rank: Rank, action: usize| lane_tid(schedules[rank.idx()].actions[action].lane);
        let tid = tid_of(span.to, receiver);
        if wanted < span.arrival {
            let wait = Event::slice("wait", span.to, tid, (wanted, span.arrival));
            self.write(&wait.with(json!({ "for": kind, "from": span.from.0 })))?;
        }
        self.flows += 1;
        let arrow = |ph, rank, tid, at: f64| Event {
            cat: Some("message"),
            ts: Some(1e6 * at),
            id: Some(self.flows),
            bp: (ph == "f").then_some("e"),
            ..Event::new(&kind, ph, rank, tid)
        };
        let start = arrow("s", span.from, tid_of(span.from, sender), span.sent);
        let finish = arrow("f", span.to, tid, span.arrival.max(wanted));
        self.write(&start)?;
        self.write(&finish)
    }

    fn write(&mut self, event: &Event<'_>) -> Result<(), PlannerError> {
        let before: &[u8] = if self.events == 0 { b"[\n" } else { b",\n" };
        self.events += 1;
        self.to.write_all(before).map_err(cannot_write)?;
        serde_json::to_writer(&mut self.to, event).map_err(|error| cannot_write(error.into()))
    }
}

fn lane_tid(lane: Lane) -> usize {
    match lane {
        Lane::Compute => 0,
        Lane::Comm => 1,
    }
}

fn cannot_write(why: std::io::Error) -> PlannerError {
    PlannerError::Write { what: "trace", why }
}
