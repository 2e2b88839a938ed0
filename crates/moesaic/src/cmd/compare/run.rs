//! One plan after another: run it on local ranks, hold its answers against those of one rank.

use std::collections::HashMap;
use std::fs::File;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use moesaic_device::process_time;
use moesaic_engine::synchronize;
use moesaic_engine::{Engine, EngineConfig, Ranks, Request, SamplingParams, SeqId, TokenEvent, balance};
use moesaic_plan::Plan;
use moesaic_plan::eplb::RoutingTrace;
use moesaic_planner::metrics::Imbalance;
use moesaic_planner::report::{BalanceReport, Sameness, StrategyReport, SynchronizerReport};
use moesaic_spec::{Cluster, DType, Workload};

use super::priced::Priced;
use super::prompts::Prompt;
use crate::args::CompareArgs;
use crate::cmd::adapted;
use crate::folder::OpenModel;

/// Likeliest tokens that the reference is asked for: the second says how sure the first was.
const TOP: usize = 2;

/// What all plans have in common.
pub(super) struct Run<'a> {
    pub args: &'a CompareArgs,
    pub model: &'a OpenModel,
    pub cluster: &'a Cluster,
    pub workload: &'a Workload,
    pub requests: &'a [Prompt],
}

/// The answers of one rank.
pub(super) struct Reference {
    answers: Vec<Vec<TokenEvent>>,
    cpu_s: f64,
    /// What routers chose.
    pub trace: Option<RoutingTrace>,
}

impl Run<'_> {
    /// Type of the weights in memory.
    pub(super) fn dtype(&self) -> DType {
        self.config(None).dtype.weights(self.model.spec.dtype)
    }

    pub(super) fn reference(&self) -> Result<Reference> {
        let config = EngineConfig { record_routing: true, ..self.config(None) };
        let mut engine = self.model.launch(&config, true)?;
        let (_, answers, cpu_s) = self.answers(&mut engine, |_, _| Ok(()))?;
        Ok(Reference { answers, cpu_s, trace: engine.routing_trace().cloned() })
    }

    pub(super) fn plan(&self, plan: &Arc<Plan>, reference: &Reference, trace: Option<File>) -> Result<StrategyReport> {
        let mut engine = self.model.launch_plan(plan, &self.config(Some(plan)), Ranks::Threads, true)?;
        let mut priced = Priced::new(self, plan, trace)?;
        let (ids, answers, cpu_s) = self.answers(&mut engine, |engine, events| {
            let times = priced.step(engine.last_step())?;
            engine.adaptation().observe_times(&times);
            events.iter().for_each(|event| priced.sampled(event.id));
            Ok(())
        })?;
        let weights_s = priced.weights_s();
        let mut report = priced.report(&ids)?;
        let adaptation = engine.adaptation();
        report.balance = adaptation.balance_report().and_then(balance_of);
        if let Some(balance) = &mut report.balance {
            balance.seconds = weights_s;
        }
        report.synchronizer = adaptation.synchronizer_report().map(synchronizer_of);
        report.sameness = Some(sameness(&reference.answers, &answers));
        report.notes = adapted::sentences(adaptation);
        report.notes.push(format!(
            "All ranks together took {cpu_s:.2} s of processor time here, {:.2} times one rank's.",
            cpu_s / reference.cpu_s
        ));
        Ok(report)
    }

    /// Settings of the ranks of a plan, or of one rank.
    fn config(&self, plan: Option<&Plan>) -> EngineConfig {
        let memory = plan.map(|plan| plan.file.memory).unwrap_or_default();
        let (num, groups) = (self.requests.len().max(1), plan.map_or(1, Plan::num_groups));
        // Requests go to the group that has the least to do, which need not be the one with the fewest: with room for twice
        // its share, none of them waits.
        let max_num_seqs = memory.max_num_seqs.unwrap_or((2 * num.div_ceil(groups)).min(num));
        EngineConfig {
            max_num_seqs,
            max_num_batched_tokens: memory.max_num_batched_tokens.unwrap_or(2048).max(max_num_seqs),
            max_model_len: Some(memory.max_model_len.unwrap_or(self.workload.longest())),
            max_num_waiting: num,
            block_size: 16,
            dtype: self.args.model.dtype.into(),
            record_calls: plan.is_some(),
            external_times: true,
            num_threads: Some(1),
            // A laptop may work for minutes on what one GPU does in a blink.
            deadline: Duration::from_secs(600),
            ..EngineConfig::default()
        }
    }

    /// Runs all requests to their ends: their ids, their answers, and the processor time that it took. `after_step` sees
    /// each step and the tokens that it gained.
    fn answers(
        &self,
        engine: &mut Engine,
        mut after_step: impl FnMut(&mut Engine, &[TokenEvent]) -> Result<()>,
    ) -> Result<(Vec<SeqId>, Vec<Vec<TokenEvent>>, f64)> {
        let add = |prompt: &Prompt| {
            engine.add(Request {
                prompt: prompt.token_ids.clone(),
                sampling: SamplingParams { logprobs: Some(TOP), ..SamplingParams::greedy() },
                max_tokens: prompt.output_tokens,
                stop_token_ids: Vec::new(),
            })
        };
        let ids = self.requests.iter().map(add).collect::<Result<Vec<SeqId>, _>>()?;
        let mut answers: HashMap<SeqId, Vec<TokenEvent>> = HashMap::new();
        let mut cpu_s = 0.0;
        while !engine.is_idle() {
            let before = process_time();
            let step = engine.step()?;
            cpu_s += process_time() - before;
            after_step(engine, &step.events)?;
            for event in step.events {
                answers.entry(event.id).or_default().push(event);
            }
        }
        let answers = ids.iter().map(|id| answers.remove(id).unwrap_or_default()).collect();
        Ok((ids, answers, cpu_s))
    }
}

/// What moving experts did, from the first decision to the last; `None` while nothing moved.
fn balance_of(report: &balance::BalanceReport) -> Option<BalanceReport> {
    let (first, last) = (report.decisions.first()?, report.decisions.last()?);
    let imbalance =
        |stats: balance::LoadStats| Imbalance { max_over_mean: stats.max_over_mean, std_dev: stats.std_dev };
    Some(BalanceReport {
        before: imbalance(first.before),
        after: imbalance(last.measured.unwrap_or(last.predicted)),
        moves: report.decisions.iter().map(|decision| decision.moves as u64).sum(),
        bytes_moved: report.moved_bytes,
        seconds: 0.0,
    })
}

/// How well the pools' times were predicted: the pool that is predicted worst by what is used.
fn synchronizer_of(report: &synchronize::SynchronizerReport) -> SynchronizerReport {
    let used = |pool: &synchronize::PoolErrors| match (pool.errors.used, pool.errors.mlp) {
        (synchronize::Model::Mlp, Some(mlp)) => mlp.median,
        _ => pool.errors.linear.median,
    };
    let worst = report.errors.iter().max_by(|a, b| used(a).total_cmp(&used(b)));
    SynchronizerReport {
        mlp_error: worst.and_then(|pool| pool.errors.mlp).map(|errors| errors.median),
        linear_error: worst.map_or(0.0, |pool| pool.errors.linear.median),
        choices: report.intervals,
        mlp_used: worst.is_some_and(|pool| pool.errors.used == synchronize::Model::Mlp),
    }
}

/// How much answers differ from the reference.
fn sameness(reference: &[Vec<TokenEvent>], answers: &[Vec<TokenEvent>]) -> Sameness {
    let mut sameness = Sameness { answers: reference.len() as u64, ..Sameness::default() };
    for (right, got) in reference.iter().zip(answers) {
        assert_eq!(right.len(), got.len(), "nothing but its length ends an answer here");
        let mut same = true;
        for (right, got) in right.iter().zip(got) {
            sameness.tokens += 1;
            sameness.differing_tokens += u64::from(right.token != got.token);
            if same && right.token != got.token {
                same = false;
                let [best, second] = right.top_logprobs[..] else { panic!("the reference was asked for {TOP}") };
                let gap = f64::from(best.1 - second.1);
                sameness.widest_gap = Some(sameness.widest_gap.map_or(gap, |widest| widest.max(gap)));
            }
            if same {
                let difference = f64::from((right.logprob - got.logprob).abs());
                sameness.max_logprob_difference = sameness.max_logprob_difference.max(difference);
            }
        }
        sameness.differing_answers += u64::from(!same);
    }
    sameness
}
