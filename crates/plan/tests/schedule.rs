//! Schedules against each other: what one rank sends another waits for, and nobody waits for ever.

use std::collections::{BTreeMap, BTreeSet};

use moesaic_plan::plan::{Exchange, ExchangeRoute, Overlap};
use moesaic_plan::{MessageKind, Plan, PlanFile, Rank, Schedule, Setting, Strategy, Work};
use moesaic_spec::{Cluster, ModelSpec, preset, workload_preset};

/// One message: from, to, layer, micro-batch, kind. (A sum is one, whatever its rounds.)
type Name = (Rank, Rank, u32, u32, MessageKind);

fn model(name: &str) -> ModelSpec {
    preset(name).unwrap().spec().unwrap()
}

fn cluster() -> Cluster {
    moesaic_spec::cluster_preset("a100-4x4").unwrap()
}

fn schedules(plan: &Plan, model: &ModelSpec, num_micro_batches: usize) -> Vec<Schedule> {
    (0..plan.world_size() as u32).map(|rank| plan.schedule(model, Rank(rank), num_micro_batches)).collect()
}

fn sent(schedule: &Schedule) -> Vec<Name> {
    let mut names = Vec::new();
    for action in &schedule.actions {
        if let Some((kind, to)) = action.work.sends() {
            let to = to.iter().filter(|&&to| to != schedule.rank);
            names.extend(to.map(|&to| (schedule.rank, to, action.layer, action.micro_batch, kind)));
        }
    }
    names
}

/// What an action waits for from others, if they have something to send.
fn awaited(rank: Rank, action: &moesaic_plan::Action) -> Vec<Name> {
    let all = |from: &[Rank], layer: u32, kind: MessageKind| -> Vec<Name> {
        let others = from.iter().filter(|&&from| from != rank);
        others.map(|&from| (from, rank, layer, action.micro_batch, kind)).collect()
    };
    let layer = action.layer;
    match &action.work {
        Work::ReceiveHidden { from } => all(&[*from], layer - 1, MessageKind::Hidden),
        Work::AllReduce { of, group, .. } => all(group, layer, *of),
        Work::AllGather { group } => all(group, layer, MessageKind::Rows),
        Work::GatherLogits { group } if group[0] == rank => all(group, layer, MessageKind::Logits),
        Work::Relay { from, .. } => all(from, layer, MessageKind::Dispatch),
        Work::Experts { from, relays } => {
            let mut names = all(from, layer, MessageKind::Dispatch);
            names.extend(all(relays, layer, MessageKind::Relay));
            names
        }
        Work::Combine { from } => all(from, layer, MessageKind::Answer),
        _ => Vec::new(),
    }
}

/// Runs all schedules with messages that never block their sender; panics where somebody waits for ever.
fn run(schedules: &[Schedule]) {
    let mut on_the_way: BTreeSet<Name> = BTreeSet::new();
    let mut next = vec![0; schedules.len()];
    loop {
        let mut moved = false;
        for (rank, schedule) in schedules.iter().enumerate() {
            while let Some(action) = schedule.actions.get(next[rank]) {
                // A sum and a gathering send before they wait.
                let at_once: Vec<Name> = sent(&Schedule { rank: schedule.rank, actions: vec![action.clone()] });
                let collective =
                    matches!(action.work, Work::AllReduce { .. } | Work::AllGather { .. } | Work::GatherLogits { .. });
                if collective {
                    on_the_way.extend(&at_once);
                }
                if !awaited(schedule.rank, action).iter().all(|name| on_the_way.contains(name)) {
                    break;
                }
                on_the_way.extend(&at_once);
                next[rank] += 1;
                moved = true;
            }
        }
        if !moved {
            break;
        }
    }
    for (rank, schedule) in schedules.iter().enumerate() {
        let stuck = schedule.actions.get(next[rank]);
        assert!(stuck.is_none(), "rank {rank} waits for ever in {}", stuck.unwrap().work);
    }
}

fn check(plan: &Plan, model: &ModelSpec, num_micro_batches: usize) {
    let schedules = schedules(plan, model, num_micro_batches);
    let mut sends: BTreeMap<Name, usize> = BTreeMap::new();
    let mut waits: BTreeMap<Name, usize> = BTreeMap::new();
    for schedule in &schedules {
        for (idx, action) in schedule.actions.iter().enumerate() {
            assert!(action.after.iter().all(|&before| (before as usize) < idx), "only what is earlier is waited for");
            awaited(schedule.rank, action).into_iter().for_each(|name| *waits.entry(name).or_default() += 1);
        }
        sent(schedule).into_iter().for_each(|name| *sends.entry(name).or_default() += 1);
    }
    assert!(sends.values().all(|&count| count == 1), "one message for each destination, layer and micro-batch");
    let missing: Vec<_> = sends.keys().filter(|name| !waits.contains_key(name)).collect();
    assert!(missing.is_empty(), "nobody waits for {missing:?}");
    let missing: Vec<_> = waits.keys().filter(|name| !sends.contains_key(name)).collect();
    assert!(missing.is_empty(), "nobody sends {missing:?}");
    run(&schedules);
}

fn variants(file: &PlanFile) -> Vec<PlanFile> {
    let mut variants = Vec::new();
    for overlap in [Overlap::None, Overlap::MicroBatches, Overlap::Arrivals] {
        for route in [ExchangeRoute::Direct, ExchangeRoute::TwoLevel] {
            variants.push(PlanFile { overlap, exchange: Exchange { route, ..file.exchange }, ..file.clone() });
        }
    }
    variants
}

#[test]
fn every_message_is_sent_once_and_waited_for_once() {
    let workload = workload_preset("chat-small").unwrap();
    let mut checked = 0;
    for name in ["mixtral-8x7b", "paper-003-swiglu", "olmoe-1b-7b"] {
        let model = model(name);
        for ranks in [3, 16] {
            for strategy in Strategy::ALL {
                let setting = Setting {
                    model: &model,
                    model_name: name,
                    cluster_name: "a100-4x4",
                    workload_name: "chat-small",
                    workload: &workload,
                    ranks,
                };
                let Ok(file) = PlanFile::preset(strategy, &setting) else { continue };
                for file in variants(&file) {
                    // Some of these models are too large for so few of these GPUs.
                    let Ok(plan) = Plan::new(file, &model, &cluster()) else { continue };
                    for num_micro_batches in [1, 3] {
                        check(&plan, &model, num_micro_batches);
                        checked += 1;
                    }
                }
            }
        }
    }
    assert!(checked > 150, "{checked}");
}

/// What the papers describe as asynchronous routing, in the order of a rank's actions.
#[test]
fn a_schedule_reads_as_the_plan_says() {
    let model = preset("paper-003-gelu").unwrap().spec().unwrap();
    let workload = workload_preset("chat-small").unwrap();
    let setting = Setting {
        model: &model,
        model_name: "paper-003-gelu",
        cluster_name: "a100-4x4",
        workload_name: "chat-small",
        workload: &workload,
        ranks: 16,
    };
    let plan = |strategy| Plan::new(PlanFile::preset(strategy, &setting).unwrap(), &model, &cluster()).unwrap();
    let text = plan(Strategy::Ep).schedule(&model, Rank(5), 2).to_string();
    let lines: Vec<&str> = text.lines().take(17).map(str::trim).collect();
    assert_eq!(
        lines,
        [
            "rank 5",
            "0  layer 0   micro-batch 0  compute  embed",
            "1  layer 0   micro-batch 1  compute  embed",
            "2  layer 0   micro-batch 0  compute  attention  (after 0)",
            "3  layer 0   micro-batch 0  compute  route  (after 2)",
            "4  layer 0   micro-batch 0  comm     dispatch to 0-4,6-15  (after 3)",
            "5  layer 0   micro-batch 1  compute  attention  (after 1)",
            "6  layer 0   micro-batch 1  compute  route  (after 5)",
            "7  layer 0   micro-batch 1  comm     dispatch to 0-4,6-15  (after 6)",
            "8  layer 0   micro-batch 0  compute  experts for 4-7  (after 3)",
            "9  layer 0   micro-batch 0  comm     answer 4,6-7  (after 8)",
            "10  layer 0   micro-batch 0  compute  experts for 0-3,8-15  (after 3)",
            "11  layer 0   micro-batch 0  comm     answer 0-3,8-15  (after 10)",
            "12  layer 0   micro-batch 1  compute  experts for 4-7  (after 6)",
            "13  layer 0   micro-batch 1  comm     answer 4,6-7  (after 12)",
            "14  layer 0   micro-batch 1  compute  experts for 0-3,8-15  (after 6)",
            "15  layer 0   micro-batch 1  comm     answer 0-3,8-15  (after 14)",
        ]
    );
    let text = plan(Strategy::Ma).schedule(&model, Rank(13), 2).to_string();
    let lines: Vec<&str> = text.lines().take(5).map(str::trim).collect();
    assert_eq!(
        lines,
        [
            "rank 13",
            "0  layer 0   micro-batch 0  compute  experts for 0-11",
            "1  layer 0   micro-batch 0  comm     answer 0-11  (after 0)",
            "2  layer 0   micro-batch 1  compute  experts for 0-11",
            "3  layer 0   micro-batch 1  comm     answer 0-11  (after 2)",
        ]
    );
}
