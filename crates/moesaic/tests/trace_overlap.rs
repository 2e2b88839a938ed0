//! What the timeline shows is what the plan says: where the plan lets messages travel while experts compute they do, and
//! where it says `overlap: none`, or leaves nothing to overlap, they do not.

mod common;

use std::collections::BTreeSet;
use std::path::Path;

use common::{arg, moesaic, temp};
use serde_json::Value;

/// Threads of a rank's process in the trace: its computation, and what it sends inside its node and out of it.
const COMPUTE: u64 = 0;
const NETWORK: [u64; 2] = [2, 3];

/// From and to, microseconds of the virtual clock.
type Span = (f64, f64);

struct Message {
    kind: String,
    from: u64,
    to: u64,
    span: Span,
}

/// A run on the virtual clock.
struct Timeline {
    messages: Vec<Message>,
    /// Rank, and when its experts computed: the op, without the wait for rows.
    experts: Vec<(u64, Span)>,
}

impl Timeline {
    fn of(folder: &Path, plan: &str) -> Timeline {
        let (file, workload, trace) = (folder.join("plan.yaml"), folder.join("long.yaml"), folder.join("trace.json"));
        let head = "version: 1\nname: test\nmodel: tiny-moe\ncluster: a100-4x4\nworkload: chat-small\n";
        std::fs::write(&file, format!("{head}{plan}")).unwrap();
        let long = "name: long\nnum_requests: 32\ninput_tokens: {min: 64, max: 96}\noutput_tokens: {min: 3, max: 6}\nseed: 1\n";
        std::fs::write(&workload, long).unwrap();
        let output = folder.join("report");
        let paths = [&file, &workload, &trace, &output].map(|path| arg(path));
        let [file, workload, trace, output] = paths;
        let ran = moesaic(&[
            "compare",
            "--plan",
            file,
            "--workload",
            workload,
            "--trace",
            trace,
            "--output",
            output,
            "--quiet",
        ]);
        assert_eq!(ran.code, Some(0), "{}", ran.stderr);
        let events: Vec<Value> = serde_json::from_str(&std::fs::read_to_string(trace).unwrap()).unwrap();
        let (mut messages, mut experts) = (Vec::new(), Vec::new());
        for event in events.iter().filter(|event| event["ph"] == "X") {
            let (start, length) = (event["ts"].as_f64().unwrap(), event["dur"].as_f64().unwrap());
            let (rank, thread, span) =
                (event["pid"].as_u64().unwrap(), event["tid"].as_u64().unwrap(), (start, start + length));
            if NETWORK.contains(&thread) {
                let (kind, to) = (event["name"].as_str().unwrap().to_owned(), event["args"]["to"].as_u64().unwrap());
                messages.push(Message { kind, from: rank, to, span });
            } else if thread == COMPUTE && event["name"] == "experts" && event["args"]["flops"].is_number() {
                experts.push((rank, span));
            }
        }
        assert!(messages.len() > 300 && experts.len() > 100, "{} and {}", messages.len(), experts.len());
        Timeline { messages, experts }
    }

    fn computes(&self, rank: u64, during: Span) -> bool {
        self.experts.iter().any(|&(of, (start, end))| of == rank && start < during.1 && during.0 < end)
    }

    /// Kinds of messages that are on their way while their sender's experts compute.
    fn sent_meanwhile(&self) -> BTreeSet<&str> {
        let meanwhile = |message: &&Message| self.computes(message.from, message.span);
        self.messages.iter().filter(meanwhile).map(|message| message.kind.as_str()).collect()
    }

    /// Kinds of messages that are on their way while their receiver's experts compute.
    fn arriving_meanwhile(&self) -> BTreeSet<&str> {
        let meanwhile = |message: &&Message| self.computes(message.to, message.span);
        self.messages.iter().filter(meanwhile).map(|message| message.kind.as_str()).collect()
    }
}

/// Experts on all ranks, over two nodes.
const EP: &str = "ranks: 8\nmesh: {tp: 1, pp: 1, dp: 8, ep: 8}\nmoe: {max_experts_per_rank: 2}\n";
/// Experts on ranks of their own.
const MA: &str = "ranks: 6\nmesh: {tp: 1, pp: 1, dp: 2, ep: 4}\nmoe: {pool: separate, max_experts_per_rank: 4}\n";

#[test]
fn one_micro_batch_is_exchanged_while_another_is_computed() {
    let folder = temp();
    let ep = Timeline::of(folder.path(), &format!("{EP}micro_batches: 2\noverlap: micro_batches\n"));
    assert_eq!(ep.sent_meanwhile(), BTreeSet::from(["answers", "dispatch"]));
    // A pool of experts computes the rows of one while those of the other are on their way to it.
    let ma = Timeline::of(folder.path(), &format!("{MA}micro_batches: 2\noverlap: micro_batches\n"));
    assert!(ma.arriving_meanwhile().contains("dispatch"), "{:?}", ma.arriving_meanwhile());
}

#[test]
fn nothing_is_sent_while_experts_compute_where_the_plan_says_so() {
    let folder = temp();
    for plan in [
        format!("{EP}micro_batches: 2\noverlap: none\n"),
        format!("{MA}micro_batches: 2\noverlap: none\n"),
        // One micro-batch has nothing to overlap with.
        format!("{EP}micro_batches: 1\noverlap: micro_batches\n"),
    ] {
        let timeline = Timeline::of(folder.path(), &plan);
        assert_eq!(timeline.sent_meanwhile(), BTreeSet::new(), "{plan}");
        // Others may be done before: their answers are on the way to who still computes. Rows never are.
        assert!(!timeline.arriving_meanwhile().contains("dispatch"), "{plan}");
    }
}

#[test]
fn experts_begin_with_the_rows_of_their_node_while_others_arrive() {
    let folder = temp();
    let arrivals = Timeline::of(folder.path(), &format!("{EP}micro_batches: 1\noverlap: arrivals\n"));
    assert!(arrivals.arriving_meanwhile().contains("dispatch"), "{:?}", arrivals.arriving_meanwhile());
    assert!(arrivals.sent_meanwhile().contains("answers"), "{:?}", arrivals.sent_meanwhile());
    let relayed = "exchange: {route: two_level}\nmicro_batches: 1\noverlap: arrivals\n";
    let relayed = Timeline::of(folder.path(), &format!("{EP}{relayed}"));
    assert!(relayed.arriving_meanwhile().contains("relay"), "{:?}", relayed.arriving_meanwhile());
}
