//! The same prompt and seed give the same bits, whoever is beside it and whatever computes it.

mod common;

use common::{GoldenModel, config, greedy, prompt, run};
use moesaic_device::{Isa, isa};
use moesaic_engine::{Engine, EngineConfig, Request, SamplingParams, TokenEvent};
use moesaic_model::{KvCache, LoadDType, MetaModel};
use moesaic_spec::Bytes;

const MAX_MODEL_LEN: usize = 144;
const MAX_TOKENS: usize = 20;

/// A model in a type, and a request whose answer is known.
struct Case {
    what: String,
    model: GoldenModel,
    dtype: LoadDType,
    request: Request,
    /// Alone, in one chunk, on one thread.
    expected: Vec<Bits>,
}

/// A token with its log-probabilities, to the bit.
#[derive(Clone, Debug, PartialEq)]
struct Bits {
    token: u32,
    logprob: u32,
    top: Vec<(u32, u32)>,
}

fn bits(events: &[TokenEvent]) -> Vec<Bits> {
    let top = |event: &TokenEvent| event.top_logprobs.iter().map(|&(id, logprob)| (id, logprob.to_bits())).collect();
    events.iter().map(|e| Bits { token: e.token, logprob: e.logprob.to_bits(), top: top(e) }).collect()
}

fn greedy_params() -> SamplingParams {
    SamplingParams { logprobs: Some(3), ..SamplingParams::greedy() }
}

fn sampled_params() -> SamplingParams {
    SamplingParams {
        temperature: 0.9,
        top_k: 60,
        top_p: 0.97,
        min_p: 0.001,
        repetition_penalty: 1.2,
        presence_penalty: 0.3,
        frequency_penalty: 0.2,
        seed: 11,
        logprobs: Some(3),
        ..SamplingParams::default()
    }
}

/// One model with grouped-query attention and one with latent attention, in both types, greedy and sampled.
fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for name in ["qwen3_moe", "deepseek_v3-two-groups"] {
        for dtype in [LoadDType::BFloat16, LoadDType::Float32] {
            for (how, sampling) in [("greedy", greedy_params()), ("sampled", sampled_params())] {
                let model = GoldenModel::open(name);
                let prompt = prompt(1, 90, model.spec.vocab_size);
                let request = Request { prompt, sampling, max_tokens: MAX_TOKENS, stop_token_ids: Vec::new() };
                let mut case =
                    Case { what: format!("{name} {dtype:?} {how}"), model, dtype, request, expected: Vec::new() };
                let mut engine = case.launch(EngineConfig { num_threads: Some(1), ..config() });
                case.expected = bits(&run(&mut engine, std::slice::from_ref(&case.request))[0]);
                assert_eq!(case.expected.len(), MAX_TOKENS);
                cases.push(case);
            }
        }
    }
    cases
}

impl Case {
    fn launch(&self, config: EngineConfig) -> Engine {
        let config = EngineConfig { dtype: self.dtype, max_model_len: Some(MAX_MODEL_LEN), ..config };
        self.model.launch(&self.model.spec, &config)
    }

    /// The request and 15 others of all lengths; the request is the `place`th of them.
    fn among_others(&self, place: usize) -> Vec<Request> {
        let mut requests: Vec<Request> = (0..15)
            .map(|i| {
                let ids = prompt(100 + i, 1 + i as usize * 8, self.model.spec.vocab_size);
                let sampling =
                    SamplingParams { seed: i, ..if i % 2 == 0 { sampled_params() } else { greedy_params() } };
                Request { sampling, ..greedy(&ids, 3 + i as usize) }
            })
            .collect();
        // One that begins with the same 40 tokens.
        requests[0].prompt = self.request.prompt[..40].to_vec();
        requests.insert(place, self.request.clone());
        requests
    }

    fn check(&self, how: &str, events: &[TokenEvent]) {
        let got = bits(events);
        let differs = got.iter().zip(&self.expected).position(|(a, b)| a != b);
        if let Some(at) = differs {
            panic!("{}, {how}: token {at} is {:?}, alone {:?}", self.what, got[at], self.expected[at]);
        }
        assert_eq!(got.len(), self.expected.len(), "{}, {how}", self.what);
    }
}

#[test]
fn among_others_and_however_the_prefill_is_cut() {
    for case in cases() {
        for (max_num_batched_tokens, place) in [(16, 0), (64, 7), (512, 15)] {
            let mut engine = case.launch(EngineConfig { max_num_batched_tokens, ..config() });
            let how = format!("among 15 others at place {place}, {max_num_batched_tokens} tokens a step");
            case.check(&how, &run(&mut engine, &case.among_others(place))[place]);
            let how = format!("alone again, {max_num_batched_tokens} tokens a step");
            case.check(&how, &run(&mut engine, std::slice::from_ref(&case.request))[0]);
        }
    }
}

#[test]
fn with_and_without_what_the_prefix_cache_holds() {
    for case in cases() {
        for enable_prefix_caching in [false, true] {
            let mut engine = case.launch(EngineConfig { enable_prefix_caching, block_size: 8, ..config() });
            for round in ["first", "second"] {
                let how = format!("prefix caching {enable_prefix_caching}, {round} time");
                case.check(&how, &run(&mut engine, std::slice::from_ref(&case.request))[0]);
            }
            // The prompt's 90 tokens fill 11 blocks.
            assert_eq!(engine.stats().prefix_cache_hits, if enable_prefix_caching { 88 } else { 0 }, "{}", case.what);
        }
    }
}

#[test]
fn after_losing_its_blocks() {
    for case in cases() {
        let spec = &case.model.spec;
        let compute_dtype = MetaModel::new(spec, case.dtype, MAX_MODEL_LEN).unwrap().transformer().compute_dtype();
        let block_bytes = KvCache::block_bytes(&spec.attention, spec.layers.len(), compute_dtype, 8).unwrap();
        for enable_prefix_caching in [false, true] {
            // The three prompts below take 25 blocks and one more each to be let in; they grow to 32 before we are done.
            let kv_cache = Some(Bytes(block_bytes.0 * 29));
            let mut engine = case.launch(EngineConfig {
                kv_cache,
                block_size: 8,
                enable_prefix_caching,
                max_num_batched_tokens: 64,
                ..config()
            });
            // Two that came before: they keep their blocks, ours are taken.
            let first = Request { prompt: prompt(9, 90, spec.vocab_size), max_tokens: 50, ..case.request.clone() };
            let short = Request { prompt: prompt(8, 8, spec.vocab_size), max_tokens: 50, ..case.request.clone() };
            let requests = [first, short, case.request.clone()];
            let mut answers = Vec::new();
            let ids: Vec<_> = requests.iter().map(|request| engine.add(request.clone()).unwrap()).collect();
            let mut preempted = false;
            while !engine.is_idle() {
                let step = engine.step().unwrap();
                answers.extend(step.events.into_iter().filter(|event| event.id == ids[2]));
                preempted |= engine.stats().preemptions > 0 && !answers.is_empty() && answers.len() < MAX_TOKENS;
            }
            assert!(preempted, "{}: nobody lost its blocks: {:?}", case.what, engine.stats());
            case.check(&format!("preempted, prefix caching {enable_prefix_caching}"), &answers);
        }
    }
}

#[test]
fn on_any_number_of_threads_with_any_instruction_set() {
    let best = Isa::detect();
    for case in cases() {
        for isa in isa::ALL.into_iter().filter(|&isa| isa <= best) {
            for num_threads in [1, 4] {
                let mut engine =
                    case.launch(EngineConfig { isa: Some(isa), num_threads: Some(num_threads), ..config() });
                let how = format!("{isa}, {num_threads} threads, among 15 others");
                case.check(&how, &run(&mut engine, &case.among_others(5))[5]);
            }
        }
    }
}

#[test]
fn an_instruction_set_beyond_the_machine_is_refused() {
    let best = Isa::detect();
    let Some(beyond) = isa::ALL.into_iter().find(|&isa| isa > best) else { return };
    let model = GoldenModel::open("mixtral");
    let config = EngineConfig { isa: Some(beyond), ..config() };
    let launched =
        moesaic_engine::launch(&model.spec, &moesaic_engine::Launch::Checkpoint(&model.checkpoint), &config, |_| ());
    let error = launched.err().unwrap().to_string();
    assert_eq!(error, format!("isa is {beyond}; this machine runs {best} and what is below it"));
}

/// What is asked for decides the draw: another seed says something else.
#[test]
fn another_seed_is_another_answer() {
    let case = cases().into_iter().find(|case| case.what.ends_with("sampled")).unwrap();
    let mut other = case.request.clone();
    other.sampling.seed += 1;
    let mut engine = case.launch(config());
    assert_ne!(bits(&run(&mut engine, &[other])[0]), case.expected);
}
