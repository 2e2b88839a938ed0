//! What must hold for every schedule.

mod script;

use moesaic_device::op_log::OpCall;
use moesaic_plan::Lane;
use moesaic_planner::{StepTimes, VirtualClock};
use moesaic_spec::Cluster;
use proptest::prelude::*;

use script::{Script, cluster, op, receive, send, settings};

/// One action of a random script: rank, in the comm lane, seconds, whom it sends to and how much.
type Draw = (u32, bool, u64, Option<(u32, u64)>);

/// Actions in a global order. What is sent is received by the next action of the receiver that is drawn; so there is no
/// circle. Each action of a rank comes after its first one.
fn script(ranks: u32, draws: &[Draw]) -> Script {
    let mut script = Script::new(ranks);
    let mut pending: Vec<Vec<OpCall>> = vec![Vec::new(); ranks as usize];
    for (idx, &(rank, comm, seconds, to)) in draws.iter().enumerate() {
        let rank = rank % ranks;
        let mut calls = std::mem::take(&mut pending[rank as usize]);
        calls.push(op(seconds));
        if let Some((to, bytes)) = to.map(|(to, bytes)| (to % ranks, bytes)).filter(|&(to, _)| to != rank) {
            let tag = 10 * idx as u64 + idx as u64 % 5;
            calls.push(send(to, tag, bytes));
            pending[to as usize].push(receive(rank, tag, bytes));
        }
        let first: &[u32] = if script.ranks[rank as usize].actions.is_empty() { &[] } else { &[0] };
        if comm {
            script.comm(rank, first, calls)
        } else {
            script.compute(rank, first, calls)
        };
    }
    for (rank, calls) in pending.into_iter().enumerate() {
        script.compute(rank as u32, &[], calls);
    }
    script
}

fn draws() -> impl Strategy<Value = Vec<Draw>> {
    let message = prop::option::of((0u32..8, 0u64..60));
    prop::collection::vec((0u32..8, any::<bool>(), 0u64..9, message), 1..60)
}

/// Without contention: each action when its lane and its messages allow, in the order in which they were drawn.
fn critical_path(script: &Script, cluster: &Cluster) -> f64 {
    let arrivals = std::cell::RefCell::new(std::collections::HashMap::new());
    let mut positions = vec![0; script.ranks.len()];
    let mut lanes = vec![[0.0f64; 2]; script.ranks.len()];
    let mut firsts = vec![None; script.ranks.len()];
    let mut progress = true;
    // Again and again over the ranks, whoever can go on does.
    while std::mem::take(&mut progress) {
        for (rank, step) in script.ranks.iter().enumerate() {
            while let Some(record) = step.actions.get(positions[rank]) {
                let action = &script.schedules[rank].actions[record.action];
                let lane = if action.lane == Lane::Compute { 0 } else { 1 };
                let mut now = lanes[rank][lane];
                if !action.after.is_empty() {
                    now = now.max(firsts[rank].unwrap());
                }
                let known = |call: &OpCall| {
                    let peer = call.peer.unwrap();
                    peer.outbound || arrivals.borrow().contains_key(&(peer.rank as usize, rank, peer.tag))
                };
                if !record.calls.iter().filter(|call| call.peer.is_some()).all(known) {
                    break;
                }
                for call in &record.calls {
                    match call.peer {
                        None => now += call.flops.expected,
                        Some(peer) if peer.outbound => {
                            let link = cluster.link(cluster.link_class(rank, peer.rank as usize));
                            let seconds = call.bytes.expected / (link.bandwidth_per_gpu * link.utilization);
                            let name = (rank, peer.rank as usize, peer.tag);
                            arrivals.borrow_mut().insert(name, now + seconds + link.latency_s);
                        }
                        Some(peer) => now = now.max(arrivals.borrow()[&(peer.rank as usize, rank, peer.tag)]),
                    }
                }
                lanes[rank][lane] = now;
                firsts[rank].get_or_insert(now);
                positions[rank] += 1;
                progress = true;
            }
        }
    }
    lanes.iter().flatten().copied().fold(0.0, f64::max)
}

/// Links so wide that bytes take no time.
fn without_contention() -> Cluster {
    let mut wide = cluster(4);
    wide.intra_node.bandwidth_per_gpu = 1e30;
    wide.intra_node.bandwidth_per_node = 1e31;
    let outer = wide.inter_node.as_mut().unwrap();
    (outer.bandwidth_per_gpu, outer.bandwidth_per_node) = (1e30, 1e31);
    wide
}

/// Everything one after the other.
fn sequential(times: &StepTimes) -> f64 {
    let ops = times.ops.iter().flatten().map(|span| span.end - span.start).sum::<f64>();
    ops + times.messages.iter().map(|message| message.arrival - message.start).sum::<f64>()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// The slow reference, exact where links are never busy.
    #[test]
    fn without_contention_the_clock_is_the_critical_path(draws in draws()) {
        let (script, wide) = (script(8, &draws), without_contention());
        prop_assert_eq!(script.run(&wide).unwrap().end(), critical_path(&script, &wide));
    }

    #[test]
    fn contention_costs_time_but_never_more_than_one_thing_at_a_time(draws in draws()) {
        let (script, cluster) = (script(8, &draws), cluster(4));
        let times = script.run(&cluster).unwrap();
        prop_assert!(times.end() >= critical_path(&script, &cluster) - 1e-9);
        prop_assert!(times.end() <= sequential(&times) + 1e-9);
    }

    /// No link carries two messages at a time, and none starts before it is sent.
    #[test]
    fn links_carry_one_message_at_a_time(draws in draws()) {
        let (script, cluster) = (script(8, &draws), cluster(4));
        let times = script.run(&cluster).unwrap();
        let node_of = |rank: moesaic_plan::Rank| cluster.node_of(rank.idx());
        for (idx, a) in times.messages.iter().enumerate() {
            prop_assert!(a.sent <= a.start && a.start <= a.end && a.end < a.arrival);
            for b in &times.messages[idx + 1..] {
                let node = a.class == moesaic_spec::LinkClass::InterNode;
                let shared = a.from == b.from
                    || a.to == b.to
                    || node && (node_of(a.from) == node_of(b.from) || node_of(a.to) == node_of(b.to));
                if a.class == b.class && shared {
                    prop_assert!(a.end.min(b.end) <= a.start.max(b.start) + 1e-9, "{a:?} {b:?}");
                }
            }
        }
    }

    #[test]
    fn bytes_in_are_bytes_out_and_equal_inputs_give_equal_times(draws in draws()) {
        let (script, cluster) = (script(8, &draws), cluster(4));
        let run = || {
            let mut clock = VirtualClock::new(&cluster, settings(8));
            let steps = [clock.step(script.input()).unwrap(), clock.step(script.input()).unwrap()];
            (format!("{steps:?}"), clock.finish())
        };
        let (steps, totals) = run();
        prop_assert_eq!((steps, totals.clone()), run());
        for link in 0..2 {
            for class in 0..5 {
                let sum = |of: fn(&moesaic_planner::clock::RankTotals) -> &[[moesaic_planner::clock::Traffic; 5]; 2]| {
                    let traffic = totals.ranks.iter().map(|rank| of(rank)[link][class]);
                    traffic.fold((0, 0), |sum, one| (sum.0 + one.messages, sum.1 + one.bytes))
                };
                prop_assert_eq!(sum(|rank| &rank.sent), sum(|rank| &rank.received));
            }
        }
        let calls = script.ranks.iter().flat_map(|rank| &rank.actions).flat_map(|action| &action.calls);
        let sent: u64 = calls.filter(|call| call.peer.is_some_and(|peer| peer.outbound)).map(|call| call.bytes.bound).sum();
        let counted: u64 = totals.ranks.iter().flat_map(|rank| rank.sent.iter().flatten()).map(|one| one.bytes).sum();
        prop_assert_eq!(counted, 2 * sent);
        for rank in &totals.ranks {
            let all = rank.seconds.all;
            prop_assert!(all.communication <= totals.seconds + 1e-9);
            prop_assert!(all.exposed <= all.communication + 1e-9 && all.waiting <= all.communication + 1e-9);
            prop_assert!(rank.seconds.computing <= totals.seconds + 1e-9);
        }
    }

    /// Only for two ranks with one lane each; the clock's documentation says why not for more.
    #[test]
    fn more_bandwidth_is_never_slower_for_two_ranks_of_one_lane(draws in draws(), factor in 1.0f64..20.0) {
        let draws: Vec<Draw> = draws.into_iter().map(|(rank, _, seconds, to)| (rank, false, seconds, to)).collect();
        let (script, cluster) = (script(2, &draws), cluster(1));
        let mut faster = cluster.clone();
        faster.intra_node.bandwidth_per_gpu *= factor;
        faster.intra_node.bandwidth_per_node *= factor;
        prop_assert!(script.run(&faster).unwrap().end() <= script.run(&cluster).unwrap().end() + 1e-9);
    }
}
