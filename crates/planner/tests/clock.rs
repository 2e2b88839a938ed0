//! The virtual clock against small cases that are computed by hand.

mod script;

use moesaic_plan::{Lane, Peers, Rank, Work};
use moesaic_planner::VirtualClock;
use moesaic_planner::clock::BACKGROUND_BYTES;
use moesaic_planner::clock::activity::CommSeconds;
use moesaic_planner::metrics::{Communication, Performance, RequestTimes, Spread};
use moesaic_spec::{Cluster, DType, LinkClass};

use script::{Script, cluster, op, receive, send, settings};

/// A message of 20 bytes inside the node: 2 s on the link, there after 3.
#[test]
fn a_receive_waits_for_compute_link_and_latency() {
    let cluster = cluster(1);
    let mut script = Script::new(2);
    script.compute(0, &[], vec![op(3), send(1, 10, 20), op(1)]);
    script.compute(1, &[], vec![op(1), receive(0, 10, 20), op(2)]);
    let mut clock = VirtualClock::new(&cluster, settings(2));
    let times = clock.step(script.input()).unwrap();

    let message = times.messages[0];
    assert_eq!((message.sent, message.start, message.end, message.arrival), (3.0, 3.0, 5.0, 6.0));
    assert_eq!((message.wanted, message.class), (Some(1.0), LinkClass::IntraNode));
    assert_eq!((message.sender_action, message.receiver_action), (Some(0), Some(0)));
    // The sender did not wait.
    assert_eq!((times.actions[0][0].end, times.actions[1][0].end), (4.0, 8.0));
    assert_eq!(times.actions[1][0].waiting, 5.0);
    assert_eq!((times.busy[1].compute_ops, times.busy[1].compute_waiting), (3.0, 5.0));
    let ops: Vec<_> = times.ops[1].iter().map(|span| (span.start, span.end)).collect();
    assert_eq!(ops, [(0.0, 1.0), (6.0, 8.0)]);

    let totals = clock.finish();
    assert_eq!(totals.seconds, 8.0);
    let [sender, receiver] = [0, 1].map(|rank: usize| totals.ranks[rank].seconds);
    // The link carried for 2 s, 1 of which an op ran beside.
    assert_eq!(sender.all, CommSeconds { communication: 2.0, exposed: 1.0, waiting: 0.0 });
    // Waiting from 1, on its way from 3 to 6.
    assert_eq!(receiver.all, CommSeconds { communication: 5.0, exposed: 5.0, waiting: 2.0 });
    assert_eq!((sender.computing, receiver.computing), (4.0, 3.0));

    let communication = Communication::of(&totals, &cluster);
    assert_eq!(communication.classes.len(), 1);
    assert_eq!(communication.all.total, (2.0 + 5.0) / 16.0);
    assert_eq!(communication.all.hidden(), 1.0 / 16.0);
    // 20 bytes of 2 GPUs * 20 bytes/s * 8 s.
    assert_eq!((communication.links[0].bytes, communication.links[0].utilization), (20, 20.0 / 320.0));
}

/// Both GPUs of node 0 send to node 1 over the node's one link.
#[test]
fn two_ranks_share_their_nodes_link() {
    let mut script = Script::new(4);
    script.compute(0, &[], vec![send(2, 10, 10)]);
    script.compute(1, &[], vec![send(3, 10, 10)]);
    script.compute(2, &[], vec![receive(0, 10, 10)]);
    script.compute(3, &[], vec![receive(1, 10, 10)]);
    let arrivals = |cluster: &Cluster| -> Vec<f64> {
        script.run(cluster).unwrap().messages.iter().map(|message| message.arrival).collect()
    };
    assert_eq!(arrivals(&cluster(2)), [4.0, 6.0]);
    // With a link for each GPU nobody waits, in one node even less.
    let mut wide = cluster(2);
    wide.inter_node.as_mut().unwrap().bandwidth_per_node = 20.0;
    assert_eq!(arrivals(&wide), [4.0, 4.0]);
    let mut one_node = cluster(1);
    one_node.gpus_per_node = 4;
    one_node.intra_node.bandwidth_per_node = 80.0;
    assert_eq!(arrivals(&one_node), [2.0, 2.0]);
    // Who runs where decides: ranks 0 and 2 on node 0, 1 and 3 on node 1.
    let mapped = Cluster { rank_map: vec![0, 2, 1, 3], ..cluster(2) };
    assert_eq!(arrivals(&mapped), [2.0, 2.0]);
}

/// A later message uses the gap that an earlier one, whose receiver is busy, leaves.
#[test]
fn a_link_does_not_idle_behind_a_busy_receiver() {
    let one_node = Cluster { gpus_per_node: 4, ..cluster(1) };
    let mut script = Script::new(4);
    script.compute(0, &[], vec![send(2, 10, 30)]);
    script.compute(1, &[], vec![send(2, 20, 30), send(3, 30, 20)]);
    script.compute(2, &[], vec![receive(0, 10, 30), receive(1, 20, 30)]);
    script.compute(3, &[], vec![receive(1, 30, 20)]);
    let wide = Cluster {
        intra_node: moesaic_spec::Link { bandwidth_per_node: 80.0, ..one_node.intra_node.clone() },
        ..one_node
    };
    let times = script.run(&wide).unwrap();
    let starts: Vec<_> = times.messages.iter().map(|message| (message.tag, message.start)).collect();
    assert_eq!(starts, [(10, 0.0), (20, 3.0), (30, 0.0)]);
}

/// What runs in the comm lane costs compute nothing unless compute waits for it.
#[test]
fn the_comm_lane_runs_beside_compute() {
    let cluster = cluster(1);
    let mut script = Script::new(2);
    let first = script.compute(0, &[], vec![op(2)]);
    let exchange = script.comm(0, &[first], vec![send(1, 12, 20), receive(1, 13, 20)]);
    let beside = script.compute(0, &[first], vec![op(9)]);
    script.compute(0, &[exchange, beside], vec![op(1)]);
    script.comm(1, &[], vec![send(0, 13, 20), receive(0, 12, 20)]);
    let mut clock = VirtualClock::new(&cluster, settings(2));
    let times = clock.step(script.input()).unwrap();
    // The message arrives at 3, before it is asked for at 2 + 0; compute ends at 2 + 9 + 1.
    assert_eq!(times.end(), 12.0);
    assert_eq!(times.busy[0].comm_waiting, 1.0);
    let seconds = clock.finish().ranks[0].seconds;
    // In [0, 3] something comes, in [2, 4] something goes: all behind ops.
    assert_eq!(seconds.all, CommSeconds { communication: 4.0, exposed: 0.0, waiting: 0.0 });
}

/// Attention on rank 0, experts on rank 1, four layers. Attention takes 6 s for all tokens, experts 2 s; a message takes 1 s.
fn ping_pong(micro_batches: u32) -> Script {
    let (attention, experts) = (6 / u64::from(micro_batches), 2 / u64::from(micro_batches));
    let mut script = Script::new(2);
    let mut previous = vec![None; micro_batches as usize];
    for layer in 0..4u64 {
        for micro_batch in 0..micro_batches {
            let tag = |kind: u64| (layer * 10 + u64::from(micro_batch)) * 10 + kind;
            let after: Vec<u32> = previous[micro_batch as usize].into_iter().collect();
            let work = (Work::Attention, Lane::Compute, &*after);
            let attended = script.action(0, micro_batch, work, vec![op(attention)]);
            let dispatch = (Work::Dispatch { to: Peers::from([Rank(1)]) }, Lane::Comm, &[attended][..]);
            let dispatched = script.action(0, micro_batch, dispatch, vec![send(1, tag(2), 0)]);
            let experts_of = Work::Experts { from: Peers::from([Rank(0)]), relays: Peers::from([]) };
            let calls = vec![receive(0, tag(2), 0), op(experts)];
            let answered = script.action(1, micro_batch, (experts_of, Lane::Compute, &[]), calls);
            let answer = (Work::Answer { to: Peers::from([Rank(0)]) }, Lane::Comm, &[answered][..]);
            script.action(1, micro_batch, answer, vec![send(0, tag(3), 0)]);
            // Answers arrive in the comm lane, each in a list position after the other micro-batch's dispatch.
            previous[micro_batch as usize] = Some(dispatched);
        }
        for micro_batch in 0..micro_batches {
            let tag = (layer * 10 + u64::from(micro_batch)) * 10 + 3;
            let combine = Work::Combine { from: Peers::from([Rank(1)]) };
            let dispatched = previous[micro_batch as usize].unwrap();
            let combined =
                script.action(0, micro_batch, (combine, Lane::Comm, &[dispatched]), vec![receive(1, tag, 0)]);
            previous[micro_batch as usize] = Some(combined);
        }
    }
    script
}

#[test]
fn ping_pong_of_two_micro_batches_hides_communication() {
    let cluster = cluster(1);
    let run = |micro_batches| {
        let mut clock = VirtualClock::new(&cluster, settings(2));
        let end = clock.step(ping_pong(micro_batches).input()).unwrap().end();
        (end, clock.finish().ranks[0].seconds)
    };
    // One micro-batch: 6 + 1 + 2 + 1 for each of four layers.
    let (end, alone) = run(1);
    assert_eq!(end, 40.0);
    assert_eq!((alone.computing, alone.all.exposed), (24.0, 16.0));
    // Two: 3 + 1 + 1 + 1 of one are the 2 * 3 of both, so attention never stops; at the end the last answer is awaited.
    let (end, both) = run(2);
    assert_eq!(end, 24.0 + 3.0);
    assert_eq!((both.computing, both.all.exposed), (24.0, 3.0));
}

/// Stages of a pipeline: rank 0 begins its next step while rank 1 is still in this one, and lanes stay where they are.
#[test]
fn steps_overlap_where_tokens_allow() {
    let cluster = cluster(1);
    let mut script = Script::new(2);
    script.compute(0, &[], vec![op(2), send(1, 10, 0)]);
    script.compute(1, &[], vec![receive(0, 10, 0), op(5)]);
    let sample = script.action(1, 0, (Work::Sample, Lane::Compute, &[]), vec![op(1)]);
    assert_eq!(sample, 1);
    let mut clock = VirtualClock::new(&cluster, settings(2));
    let first = clock.step(script.input()).unwrap();
    assert_eq!(first.sampled, [vec![None], vec![Some(9.0)]]);
    // Tokens of another micro-batch that were known at 4: rank 0 begins then, rank 1 when it is free.
    script.ready = vec![vec![4.0]];
    let second = clock.step(script.input()).unwrap();
    assert_eq!((second.step, second.start(), second.actions[1][0].start, second.end()), (1, 4.0, 9.0, 15.0));
    // Its message found the links as they were: at 6, long before the first step's end.
    assert_eq!(second.messages[0].arrival, 7.0);
    assert_eq!(clock.now(), 15.0);
    assert_eq!(clock.finish().ranks[1].seconds.computing, 12.0);
}

#[test]
fn independent_replicas_do_not_wait_for_each_other() {
    let cluster = cluster(1);
    let mut script = Script::new(2);
    script.compute(0, &[], vec![op(1)]);
    script.compute(1, &[], vec![op(10)]);
    let mut clock = VirtualClock::new(&cluster, settings(2));
    (0..3).for_each(|_| drop(clock.step(script.input()).unwrap()));
    assert_eq!(clock.step(script.input()).unwrap().actions[0][0].end, 4.0);
}

/// An action without a record takes no time, and what comes after it comes after what it came after.
#[test]
fn actions_that_were_not_executed_are_passed_over() {
    let mut script = Script::new(1);
    let first = script.comm(0, &[], vec![op(2)]);
    let skipped = script.compute(0, &[first], vec![op(100)]);
    script.compute(0, &[skipped], vec![op(3)]);
    script.ranks[0].actions.remove(1);
    let times = script.run(&cluster(1)).unwrap();
    assert_eq!(times.actions[0].iter().map(|span| (span.action, span.end)).collect::<Vec<_>>(), [(0, 2.0), (2, 5.0)]);
}

#[test]
fn weights_in_the_background_delay_others_by_one_piece_at_most() {
    let mut cluster = cluster(1);
    let piece_s = 1e-3;
    cluster.intra_node.bandwidth_per_gpu = BACKGROUND_BYTES as f64 / piece_s / 0.5;
    cluster.intra_node.bandwidth_per_node = 2.0 * cluster.intra_node.bandwidth_per_gpu;
    let mut script = Script::new(2);
    script.compute(0, &[], vec![op(1), send(1, 10, 0), op(1), send(1, 20, BACKGROUND_BYTES)]);
    script.compute(1, &[], vec![receive(0, 10, 0), receive(0, 20, BACKGROUND_BYTES)]);
    let alone = script.run(&cluster).unwrap();
    // 1,500 pieces of 1 ms: in 3 s half of them are through.
    script.ranks[0].background = vec![send(1, 15, 6000 * BACKGROUND_BYTES), send(1, 25, 7)];
    let mut clock = VirtualClock::new(&cluster, settings(2));
    let beside = clock.step(script.input()).unwrap();
    let delay = beside.end() - alone.end();
    assert!((0.0..=piece_s * 1.001).contains(&delay), "{delay} s");
    // It is not through: it goes on in the next step, or when the run ends.
    assert_eq!(beside.messages.len(), 2);
    let totals = clock.finish();
    assert_eq!(totals.ranks[0].sent[0][4].bytes, 6000 * BACKGROUND_BYTES + 7);
    assert_eq!(totals.ranks[1].received[0][4].messages, 2);
    // 6,000 ms of weights and 1 ms of the message between them; the last 7 bytes are too few to see.
    assert!((totals.seconds - 7.001).abs() < 1e-3, "{}", totals.seconds);
}

#[test]
fn weights_that_meet_nobody_delay_nobody_and_are_not_waited_for() {
    let cluster = cluster(2);
    let mut script = Script::new(4);
    script.compute(0, &[], vec![op(3), send(1, 10, 20)]);
    script.compute(1, &[], vec![receive(0, 10, 20)]);
    script.compute(2, &[], vec![op(1), send(3, 15, 1000)]);
    script.compute(3, &[], vec![receive(2, 15, 1000), op(1)]);
    let times = script.run(&cluster).unwrap();
    assert_eq!((times.actions[1][0].end, times.actions[3][0].end), (6.0, 1.0));
}

#[test]
fn performance_is_what_the_tokens_and_the_sums_say() {
    let cluster = cluster(1);
    let mut script = Script::new(2);
    script.compute(0, &[], vec![op(4)]);
    script.compute(1, &[], vec![op(2)]);
    let mut clock = VirtualClock::new(&cluster, settings(2));
    clock.step(script.input()).unwrap();
    clock.step(script.input()).unwrap();
    let requests = [
        RequestTimes { arrival: 0.0, tokens: vec![1.0, 2.0, 5.0] },
        RequestTimes { arrival: 1.0, tokens: vec![4.0, 5.0] },
        RequestTimes { arrival: 0.0, tokens: vec![3.0] },
        RequestTimes::default(),
    ];
    let performance = Performance::of(&clock.finish(), &requests, &cluster, DType::BF16);
    // (5 - 1) / 2 and 5 - 4; a request of one token has no time between tokens.
    assert_eq!(performance.tpot_ms, Spread { mean: 1500.0, p50: 1000.0, p99: 2000.0 });
    assert_eq!(performance.ttft_ms.mean, 1e3 * (1.0 + 3.0 + 3.0) / 3.0);
    assert_eq!((performance.tokens, performance.steps, performance.seconds), (6, 2, 8.0));
    // The last token was there at 5.
    assert_eq!((performance.throughput, performance.tps_per_gpu), (6.0 / 5.0, 3.0 / 5.0));
    // 2 * (4 + 2) of 2 * 8 s, at 1 FLOP/s.
    assert_eq!((performance.gpu_utilization, performance.mfu, performance.mbu), (0.75, 0.75, 0.0));
}

fn refusal(script: &Script) -> String {
    script.run(&cluster(1)).unwrap_err().to_string()
}

#[test]
fn what_cannot_be_replayed_is_refused() {
    let mut never_sent = Script::new(3);
    never_sent.compute(2, &[], vec![receive(1, 10, 1)]);
    // Waits for a message of one that waits itself: not the cause.
    never_sent.compute(1, &[], vec![receive(0, 22, 8), send(2, 10, 1)]);
    assert_eq!(
        refusal(&never_sent),
        "rank 1, action 0 (attention of layer 0, micro-batch 0) waits for dispatch from rank 0 (tag 0x16), which the \
         records of this step never send"
    );

    let mut circle = Script::new(2);
    circle.compute(0, &[], vec![receive(1, 10, 1), send(1, 20, 1)]);
    circle.compute(1, &[], vec![receive(0, 20, 1), send(0, 10, 1)]);
    assert!(refusal(&circle).starts_with("rank 0, action 0 (attention of layer 0, micro-batch 0) waits for hidden"));

    let mut never_received = Script::new(2);
    never_received.compute(0, &[], vec![send(1, 10, 1)]);
    assert_eq!(
        refusal(&never_received),
        "rank 0, action 0 (attention of layer 0, micro-batch 0) sends hidden states to rank 1 (tag 0xa), which the \
         records of this step never receive"
    );

    let mut twice = Script::new(2);
    twice.compute(0, &[], vec![send(1, 10, 1), send(1, 10, 1)]);
    twice.compute(1, &[], vec![receive(0, 10, 1)]);
    assert_eq!(
        refusal(&twice),
        "rank 0, action 0 (attention of layer 0, micro-batch 0) sends hidden states to rank 1 with tag 0xa, which names \
         another message between the two in this step"
    );

    let mut other_size = Script::new(2);
    other_size.compute(0, &[], vec![send(1, 10, 5)]);
    other_size.compute(1, &[], vec![receive(0, 10, 6)]);
    assert_eq!(
        refusal(&other_size),
        "rank 1, action 0 (attention of layer 0, micro-batch 0) receives 6 bytes of hidden states from rank 0, which \
         sent 5"
    );

    let mut nobody = Script::new(2);
    nobody.compute(0, &[], vec![send(7, 10, 5)]);
    assert_eq!(
        refusal(&nobody),
        "rank 0, action 0 (attention of layer 0, micro-batch 0) has a message to or from rank 7; the plan has ranks 0 to 1"
    );

    let mut backwards = Script::new(1);
    backwards.compute(0, &[], vec![]);
    backwards.compute(0, &[], vec![]);
    backwards.ranks[0].actions.reverse();
    assert_eq!(
        refusal(&backwards),
        "rank 0: the record of action 0 is out of order or beyond the schedule's 2 actions"
    );
    backwards.ranks.pop();
    let error = VirtualClock::new(&cluster(1), settings(1)).step(backwards.input()).unwrap_err();
    assert_eq!(error.to_string(), "a step of 1 ranks needs as many schedules and records, got 1 and 0");
}
