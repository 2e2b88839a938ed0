//! No message is sent that the schedule does not show, and every message has the bytes that follow from the plan and from
//! what routers chose.

#[path = "../common/mod.rs"]
mod common;
mod expected;

use std::collections::{BTreeMap, BTreeSet};

use common::moves::{movable, move_on};
use common::plans::{Subject, cluster, ep, exact_config, file, num_experts, requests, separate};
use common::{GoldenModel, greedy, prompt, tiny_moe};
use expected::{Facts, Messages, messages};
use moesaic_device::{OpCall, Peer};
use moesaic_engine::{Engine, EngineConfig, Launch, Request, StepRecord};
use moesaic_model::LoadDType;
use moesaic_plan::plan::{AttentionPlan, Exchange, ExchangePrecision, ExchangeRoute, Mesh, MoePlan, Overlap};
use moesaic_plan::{AllReduce, MessageKind, Plan, PlanFile, Rank, Tag, Work};
use moesaic_spec::ModelSpec;

/// Who may send what an action waits for.
fn senders(work: &Work) -> Vec<Rank> {
    match work {
        Work::ReceiveHidden { from } => vec![*from],
        Work::AllReduce { group, .. } | Work::AllGather { group } | Work::GatherLogits { group } => group.to_vec(),
        Work::Relay { from, .. } | Work::Combine { from } => from.to_vec(),
        Work::Experts { from, relays } => from.iter().chain(relays.iter()).copied().collect(),
        _ => Vec::new(),
    }
}

/// What both ends logged, each message found in an action that says so.
fn logged(plan: &Plan, spec: &ModelSpec, record: &StepRecord) -> [Messages; 2] {
    let num_micro_batches = record.sequences[0].len();
    let (mut sent, mut received) = (Messages::new(), Messages::new());
    for (rank, of_rank) in record.ranks.iter().enumerate() {
        let this = Rank(rank as u32);
        let of_moves = |call: &OpCall| Tag::from_code(call.peer.unwrap().tag, 0).unwrap().kind == MessageKind::Weights;
        assert!(of_rank.background.iter().all(of_moves), "beside its actions a rank only moves experts");
        let schedule = plan.schedule(spec, this, num_micro_batches);
        assert_eq!(of_rank.calls.len(), schedule.actions.len(), "rank {rank}");
        for (action, calls) in schedule.actions.iter().zip(&of_rank.calls) {
            for call in calls {
                let Some(Peer { rank: peer, tag, outbound }) = call.peer else { continue };
                let (peer, tag) = (Rank(peer), Tag::from_code(tag, record.step).unwrap());
                let what =
                    format!("rank {rank}, {}: {tag} {} rank {peer}", action.work, if outbound { "to" } else { "from" });
                assert_eq!(tag.micro_batch, action.micro_batch, "{what}");
                // The stage before sends under its own last layer.
                let received_hidden = !outbound && tag.kind == MessageKind::Hidden;
                assert_eq!(tag.layer + u32::from(received_hidden), action.layer, "{what}");
                let bytes = call.bytes.bound;
                assert_eq!(call.bytes.expected, bytes as f64, "{what}");
                assert_ne!(peer, this, "{what}");
                let (log, key) = if outbound {
                    let (kind, to) =
                        action.work.sends().unwrap_or_else(|| panic!("{what} from an action that sends nothing"));
                    assert!(kind == tag.kind && to.contains(&peer), "{what} is not announced");
                    (&mut sent, (this, peer, tag))
                } else {
                    assert!(senders(&action.work).contains(&peer), "{what} is not waited for");
                    (&mut received, (peer, this, tag))
                };
                assert_eq!(log.insert(key, bytes), None, "{what} is there twice");
            }
        }
    }
    [sent, received]
}

/// What was seen in a run, so that a test can say that it saw anything.
#[derive(Default)]
struct Seen {
    kinds: BTreeSet<MessageKind>,
    rounds: BTreeSet<u8>,
    messages: usize,
    steps: usize,
    /// Of placements.
    epochs: BTreeSet<u64>,
}

/// Tokens by layer and expert.
type Counts = BTreeMap<u32, Vec<u64>>;

fn count(counts: &mut Counts, record: &StepRecord) {
    for (layer, of_step) in &record.expert_counts {
        let sums = counts.entry(*layer).or_insert_with(|| vec![0; of_step.len()]);
        sums.iter_mut().zip(of_step).for_each(|(sum, n)| *sum += u64::from(*n));
    }
}

fn run(engine: &mut Engine, requests: &[Request], mut after_step: impl FnMut(&mut Engine)) {
    for request in requests {
        engine.add(request.clone()).unwrap();
    }
    while !engine.is_idle() {
        engine.step().unwrap();
        after_step(engine);
    }
}

/// Runs a plan on the usual requests and holds every message of every step against what it must be.
fn check(subject: &Subject, file: PlanFile, config: &EngineConfig) -> (Seen, Counts) {
    check_requests(subject, file, config, &requests(subject.spec))
}

fn check_requests(subject: &Subject, file: PlanFile, config: &EngineConfig, requests: &[Request]) -> (Seen, Counts) {
    let what = format!("{} {:?} {:?} {:?}", subject.name, file.mesh, file.exchange, file.overlap);
    let plan = subject.plan(file);
    let config = EngineConfig { record_calls: true, ..config.clone() };
    let mut engine = subject.many(&plan, &config);
    let value_bytes = config.dtype.weights(subject.spec.dtype).compute().size_bytes() as u64;
    let (mut seen, mut counts) = (Seen::default(), Counts::new());
    run(&mut engine, requests, |engine| {
        // The step was run with the placement that is still announced; the next one may have another.
        let placement = engine.adaptation().placement().clone();
        let record = engine.last_step();
        let [sent, received] = logged(&plan, subject.spec, record);
        assert_same(&format!("{what}, received and sent"), &received, &sent);
        let facts = Facts { plan: &plan, spec: subject.spec, placement: &placement, record, value_bytes };
        assert_same(&format!("{what}, sent and computed"), &sent, &messages(&facts));
        seen.kinds.extend(sent.keys().map(|(.., tag)| tag.kind));
        seen.rounds.extend(sent.keys().map(|(.., tag)| tag.round));
        seen.messages += sent.len();
        seen.steps += 1;
        seen.epochs.insert(placement.epoch);
        count(&mut counts, record);
        if plan.file.balance.is_some() {
            move_on(engine, &plan);
        }
    });
    assert!(seen.steps > 1, "{what}");
    (seen, counts)
}

fn assert_same(what: &str, a: &Messages, b: &Messages) {
    if a != b {
        let name = |(from, to, tag): &(Rank, Rank, Tag)| format!("rank {from} to {to}, {tag}, round {}", tag.round);
        let differs = |(key, bytes): &(&(Rank, Rank, Tag), &u64)| b.get(key) != Some(bytes);
        let first = a.iter().find(differs).map(|(key, bytes)| (name(key), *bytes, b.get(key)));
        let missing = b.keys().find(|key| !a.contains_key(key)).map(name);
        panic!("{what}: {first:?} differs, {missing:?} is missing");
    }
}

/// What one rank's routers chose, in all.
fn single_counts(subject: &Subject, config: &EngineConfig) -> Counts {
    let mut counts = Counts::new();
    run(&mut subject.single(config), &requests(subject.spec), |engine| count(&mut counts, engine.last_step()));
    counts
}

const EXCHANGE: [MessageKind; 3] = [MessageKind::Dispatch, MessageKind::Relay, MessageKind::Answer];

#[test]
fn the_exchange_is_what_plan_and_routing_say() {
    for name in ["qwen3_moe", "deepseek_v3", "mixtral", "olmoe", "paper-capacity-probs"] {
        let model = GoldenModel::open(name);
        let weights = Launch::Checkpoint(&model.checkpoint);
        let subject = Subject { name, spec: &model.spec, weights: &weights };
        for dtype in [LoadDType::Float32, LoadDType::Auto] {
            let config = EngineConfig { dtype, ..exact_config() };
            // Capacity counts a sequence's tokens of one step, and steps are cut alike on one rank only.
            let single = model.spec.layers.iter().filter_map(|ffn| ffn.as_moe()).all(|moe| moe.capacity.is_none());
            let single = single.then(|| single_counts(&subject, &config));
            let check = |file: PlanFile, kinds: &[MessageKind]| {
                let (seen, counts) = check(&subject, file, &config);
                assert_eq!(seen.kinds, kinds.iter().copied().collect());
                assert!(single.as_ref().is_none_or(|single| *single == counts), "{name}: routers chose as on one rank");
            };
            for overlap in [Overlap::None, Overlap::MicroBatches, Overlap::Arrivals] {
                for precision in [ExchangePrecision::Full, ExchangePrecision::Int8] {
                    if precision != ExchangePrecision::Full && (overlap == Overlap::None || single.is_none()) {
                        continue;
                    }
                    let exchange = |route| Exchange { route, precision };
                    let base = PlanFile { overlap, micro_batches: 2, ..ep(9, subject.spec) };
                    let direct = PlanFile { exchange: exchange(ExchangeRoute::Direct), ..base.clone() };
                    let two_level = PlanFile { exchange: exchange(ExchangeRoute::TwoLevel), ..base };
                    if precision == ExchangePrecision::Full {
                        check(direct, &[MessageKind::Dispatch, MessageKind::Answer]);
                        check(two_level, &EXCHANGE);
                    } else {
                        // What was rounded may choose other experts later.
                        self::check(&subject, direct, &config);
                        self::check(&subject, two_level, &config);
                    }
                }
            }
            let moe = MoePlan {
                redundant_experts: 3,
                max_experts_per_rank: Some(num_experts(subject.spec) + 3),
                ..MoePlan::default()
            };
            check(PlanFile { moe, ..ep(5, subject.spec) }, &[MessageKind::Dispatch, MessageKind::Answer]);
            let requests = PlanFile { micro_batches: 3, ..separate(1, 5, 3, subject.spec) };
            check(requests.clone(), &[MessageKind::Dispatch, MessageKind::Answer]);
            let exchange = Exchange { route: ExchangeRoute::TwoLevel, ..Exchange::default() };
            check(PlanFile { exchange, ..requests }, &[MessageKind::Dispatch, MessageKind::Relay, MessageKind::Answer]);
        }
    }
}

/// A switch is of all ranks at once: each step's rows go where one placement says.
#[test]
fn rows_follow_experts_that_move() {
    let folder = tiny_moe();
    let model = GoldenModel::in_folder(&folder);
    let weights = Launch::Checkpoint(&model.checkpoint);
    let subject = Subject { name: "tiny-moe", spec: &model.spec, weights: &weights };
    let single = single_counts(&subject, &exact_config());
    for route in [ExchangeRoute::Direct, ExchangeRoute::TwoLevel] {
        let exchange = Exchange { route, ..Exchange::default() };
        let moe = MoePlan { redundant_experts: 8, max_experts_per_rank: Some(3), ..MoePlan::default() };
        let file = PlanFile { moe, exchange, overlap: Overlap::Arrivals, ..ep(8, &model.spec) };
        let (seen, counts) = check(&subject, movable(file), &exact_config());
        assert!(seen.epochs.len() > 1, "{:?}", seen.epochs);
        assert_eq!(counts, single);
    }
}

#[test]
fn sums_and_gathers_are_what_the_plan_says() {
    let mut rounds = BTreeSet::new();
    let tiny = tiny_moe();
    for name in ["qwen3_moe", "deepseek_v3", "olmoe", "paper", "tiny-moe"] {
        let model = if name == "tiny-moe" { GoldenModel::in_folder(&tiny) } else { GoldenModel::open(name) };
        let spec = model.without_capacity();
        let weights = Launch::Checkpoint(&model.checkpoint);
        let subject = Subject { name, spec: &spec, weights: &weights };
        let heads = spec.attention.num_heads();
        let mut plans = Vec::new();
        let uneven = |tp: usize| {
            let mut uneven = vec![1; tp];
            uneven[0] = heads - (tp - 1);
            AttentionPlan { heads: Some(uneven), replication: None }
        };
        for tp in [2, 4].into_iter().filter(|&tp| tp <= heads) {
            plans.push(file(Mesh { tp, pp: 1, dp: 1, ep: 1 }, tp));
            plans.push(PlanFile { micro_batches: 2, ..file(Mesh { tp, pp: 2, dp: 2, ep: 1 }, 4 * tp) });
            plans.push(PlanFile { attention: uneven(tp), micro_batches: 2, ..separate(tp, 2, 3, &spec) });
            let moe = MoePlan { max_experts_per_rank: Some(num_experts(&spec)), ..MoePlan::default() };
            let exchange = Exchange { route: ExchangeRoute::TwoLevel, ..Exchange::default() };
            plans.push(PlanFile { moe, exchange, ..file(Mesh { tp, pp: 1, dp: 3, ep: 3 * tp }, 3 * tp) });
        }
        if heads >= 8 {
            // Over two nodes: by nodes, and not.
            for all_reduce in [AllReduce::Hierarchical, AllReduce::Flat] {
                let across = PlanFile { all_reduce: Some(all_reduce), ..file(Mesh { tp: 8, pp: 2, dp: 1, ep: 1 }, 16) };
                plans.push(PlanFile { micro_batches: 2, ..across });
            }
        }
        for file in plans.into_iter().filter(|file| Plan::new(file.clone(), &spec, &cluster()).is_ok()) {
            let (tp, pp, cut) = (file.mesh.tp, file.mesh.pp, !file.places_experts());
            let (seen, _) = check(&subject, file, &exact_config());
            assert!(tp == 1 || seen.kinds.contains(&MessageKind::Attention));
            assert!(tp == 1 || seen.kinds.contains(if cut { &MessageKind::Mlp } else { &MessageKind::Rows }));
            assert!(tp == 1 || seen.kinds.contains(&MessageKind::Logits));
            assert_eq!(seen.kinds.contains(&MessageKind::Hidden), pp > 1);
            assert_eq!(seen.kinds.contains(&MessageKind::QkNorm), name == "olmoe");
            rounds.extend(seen.rounds);
        }
    }
    assert_eq!(rounds, BTreeSet::from([0, 1, 3]), "by nodes, and in one round where sums are short");
}

/// Sums of 64 KiB and more are cut; that takes many rows of a small model.
#[test]
fn long_sums_take_two_rounds() {
    let folder = tiny_moe();
    let model = GoldenModel::in_folder(&folder);
    let weights = Launch::Checkpoint(&model.checkpoint);
    let subject = Subject { name: "tiny-moe", spec: &model.spec, weights: &weights };
    let config = EngineConfig { max_num_batched_tokens: 640, max_num_seqs: 20, ..exact_config() };
    let prompts: Vec<Request> = (0..20).map(|seed| greedy(&prompt(seed, 30, model.spec.vocab_size), 2)).collect();
    let mut rounds = BTreeSet::new();
    for all_reduce in [AllReduce::Flat, AllReduce::Hierarchical] {
        let file = PlanFile { all_reduce: Some(all_reduce), ..file(Mesh { tp: 8, pp: 1, dp: 1, ep: 1 }, 8) };
        rounds.extend(check_requests(&subject, file, &config, &prompts).0.rounds);
    }
    assert_eq!(rounds, BTreeSet::from([0, 1, 2, 3]));
}

#[test]
fn the_small_trained_model_on_sixteen_ranks() {
    let folder = tiny_moe();
    let model = GoldenModel::in_folder(&folder);
    let weights = Launch::Checkpoint(&model.checkpoint);
    let subject = Subject { name: "tiny-moe", spec: &model.spec, weights: &weights };
    for dtype in [LoadDType::Float32, LoadDType::Auto] {
        let config = EngineConfig { dtype, ..exact_config() };
        let single = single_counts(&subject, &config);
        for route in [ExchangeRoute::Direct, ExchangeRoute::TwoLevel] {
            let exchange = Exchange { route, ..Exchange::default() };
            let arrivals = PlanFile { exchange, overlap: Overlap::Arrivals, micro_batches: 2, ..ep(16, &model.spec) };
            assert_eq!(check(&subject, arrivals, &config).1, single);
            assert_eq!(check(&subject, PlanFile { exchange, ..separate(1, 12, 4, &model.spec) }, &config).1, single);
        }
        let heads = Some(vec![2, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1]);
        let attention = AttentionPlan { heads, replication: Some(2) };
        let (seen, _) = check(&subject, PlanFile { attention, ..separate(12, 1, 4, &model.spec) }, &config);
        assert!(seen.messages > 1000);
    }
}
