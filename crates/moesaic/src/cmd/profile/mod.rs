//! `moesaic profile`: what this machine's ops and links take, in tables that the planner prices from.

mod cluster;
mod measure;
mod table;

use std::collections::BTreeMap;
use std::fs;
use std::io::{Write, stdout};
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use moesaic_device::{Isa, Machine, env};
use moesaic_engine::Ceilings;
use moesaic_engine::probe::{Effort, Prober};
use moesaic_planner::cost::{Op, Precision};
use moesaic_planner::iteration::{ExpertLayout, Formats, Layout};
use moesaic_planner::profile::{Grid, Wanted, wanted};
use moesaic_spec::{Bytes, ModelSpec};

use crate::args::{ProfileArgs, ProfileDTypeArg};
use crate::folder::named_spec;
use crate::{progress, tables};
use measure::{Item, dtype};
use table::{Origin, Table};

pub(crate) fn run(args: &ProfileArgs) -> Result<()> {
    check(args)?;
    let (_, model) = named_spec(args.model.as_deref())?;
    let machine = Machine::detect();
    let isa = Isa::from_env()?.to_string();
    let num_threads = args.num_threads.or(env::num_threads()?).unwrap_or(machine.num_cores);
    let dir = match &args.output {
        Some(dir) => dir.clone(),
        None => PathBuf::from("moesaic-profile").join(format!("cpu-{}core-{}", machine.num_cores, machine.isa)),
    };
    let origin = origin(&machine, num_threads);
    let mut items: Vec<Item> =
        wanted(&model, &layouts(args, &model)?, &grid(args, &model)?)?.into_iter().flat_map(Item::of).collect();
    if !args.op.is_empty() {
        items.retain(|item| args.op.iter().any(|op| op == item.wanted.columns().0));
    }
    let mut tables = BTreeMap::new();
    for item in &items {
        let (op, columns) = item.wanted.columns();
        if !tables.contains_key(op) {
            let parameters: Vec<&str> = columns.iter().map(|(name, _)| *name).collect();
            tables.insert(op, Table::open(&dir, op, &parameters, &origin)?);
        }
    }
    let types = types_of(&items);
    let asked = items.len();
    items.retain(|item| !tables[item.wanted.columns().0].has(&item.row(&isa)));
    if args.list {
        let mut out = stdout().lock();
        items.iter().try_for_each(|item| writeln!(out, "{}", item.label(&isa)))?;
        return Ok(());
    }
    fs::create_dir_all(&dir).with_context(|| dir.display().to_string())?;
    if !args.quiet {
        eprintln!("{asked} to measure, {} of them are in {}", asked - items.len(), dir.display());
    }
    if items.is_empty() && dir.join(tables::CLUSTER).exists() {
        write!(stdout(), "{}", tables::left_out(&tables::of_machine(&dir)?))?;
        return Ok(());
    }
    let ranks = Ranks { count: (machine.num_cores / num_threads).max(1), threads: num_threads };
    let prober = Prober::new(ranks.count, ranks.threads, args.memory_limit)?;
    let ceilings = Ceiling::measure_all(&prober, &types)?;
    let mut shares = Shares::default();
    let left = measure_all(args, &items, &isa, &prober, &mut tables, |item, seconds| shares.add(item, seconds))?;
    let ceilings = Ceiling::best(ceilings, Ceiling::measure_all(&prober, &types)?);
    shares.print(&ceilings, &tables)?;
    if tables.values().any(|table| table.len() > 0) {
        cluster::write(&dir, &machine, ranks, &prober, &ceilings, &origin)?;
        write!(stdout(), "\n{}", tables::left_out(&tables::of_machine(&dir)?))?;
    }
    if left > 0 && !args.quiet {
        eprintln!("{left} are left; the same command goes on");
    }
    Ok(())
}

/// Ranks that share the machine, and the threads of each.
#[derive(Clone, Copy)]
struct Ranks {
    count: usize,
    threads: usize,
}

/// Types of the ops, the first first; BF16 where only links are measured.
fn types_of(items: &[Item]) -> Vec<Precision> {
    let mut types: Vec<Precision> = Vec::new();
    for item in items {
        match item.wanted {
            Wanted::Compute(op) if !types.contains(&op_type(&op)) => types.push(op_type(&op)),
            _ => {}
        }
    }
    if types.is_empty() { vec![Precision::Bf16] } else { types }
}

/// Measures what is not there yet; the number of rows that time did not suffice for.
fn measure_all(
    args: &ProfileArgs,
    items: &[Item],
    isa: &str,
    prober: &Prober,
    tables: &mut BTreeMap<&'static str, Table>,
    mut measured: impl FnMut(&Item, f64),
) -> Result<usize> {
    let start = Instant::now();
    let over = || args.max_seconds.is_some_and(|most| start.elapsed() >= Duration::from_secs_f64(most));
    let bar = progress::count_bar("measuring", items.len() as u64, args.quiet);
    let say = |line: String| {
        if !args.quiet {
            bar.suspend(|| eprintln!("{line}"));
        }
    };
    let (mut unsettled, mut left) = (0, 0);
    for (place, item) in items.iter().enumerate() {
        if over() {
            left = items.len() - place;
            break;
        }
        let label = item.label(isa);
        bar.set_message(label.clone());
        match item.measure(prober, &Effort::default()).with_context(|| label.clone())? {
            Ok(timing) => {
                let table = tables.get_mut(item.wanted.columns().0).expect("a table for each op");
                table.add(item.row(isa), timing.seconds)?;
                measured(item, timing.seconds);
                unsettled += usize::from(!timing.settled);
            }
            Err(why) => say(format!("skipped {label}: {why}")),
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    if unsettled > 0 {
        let tolerance = Effort::default().tolerance * 100.0;
        say(format!(
            "{unsettled} medians are less sure than {tolerance} %: calls took too long, or other programs run here"
        ));
    }
    Ok(left)
}

fn check(args: &ProfileArgs) -> Result<()> {
    for (flag, value, most) in [
        ("--max-num-batched-tokens", args.max_num_batched_tokens, 1 << 20),
        ("--max-num-seqs", args.max_num_seqs, 1 << 16),
        ("--max-model-len", args.max_model_len.unwrap_or(1), 1 << 24),
        ("--tensor-parallel-size", args.tensor_parallel_size as u64, 1 << 10),
        ("--expert-parallel-size", args.expert_parallel_size as u64, 1 << 10),
        ("--num-threads", args.num_threads.unwrap_or(1) as u64, 1 << 10),
    ] {
        ensure!((1..=most).contains(&value), "{flag} is {value}; 1 to {most} is right");
    }
    if let Some(seconds) = args.max_seconds {
        ensure!((0.0..1e9).contains(&seconds), "--max-seconds is {seconds}; a time from 0 to 1e9 is right");
    }
    Ok(())
}

fn grid(args: &ProfileArgs, model: &ModelSpec) -> Result<Grid> {
    const DEFAULT_CONTEXT: u64 = 4096;
    let longest = model.max_position_embeddings as u64;
    let max_context = args.max_model_len.unwrap_or(DEFAULT_CONTEXT.min(longest));
    ensure!(max_context <= longest, "--max-model-len is {max_context}; the model's own, {longest}, is the most");
    let max_seqs = args.max_num_seqs.min(args.max_num_batched_tokens);
    Ok(Grid { max_tokens: args.max_num_batched_tokens, max_seqs, max_context, types: types(args, model) })
}

/// As asked for; else all that kernels have, those of the model's experts and of its other weights first.
fn types(args: &ProfileArgs, model: &ModelSpec) -> Vec<Precision> {
    if !args.dtype.is_empty() {
        let precision = |arg: &ProfileDTypeArg| match arg {
            ProfileDTypeArg::Float32 => Precision::F32,
            ProfileDTypeArg::Bfloat16 => Precision::Bf16,
            ProfileDTypeArg::Fp8 => Precision::Fp8Block,
        };
        return args.dtype.iter().map(precision).collect();
    }
    let of_model = Formats::of(model);
    let mut types = vec![Precision::Bf16, Precision::F32, Precision::Fp8Block];
    types.sort_by_key(|&it| (it != of_model.dense, it != of_model.experts));
    types
}

/// One rank alone, and the ways to spread the model that were asked for.
fn layouts(args: &ProfileArgs, model: &ModelSpec) -> Result<Vec<Layout>> {
    let (tp, ep) = (args.tensor_parallel_size, args.expert_parallel_size);
    let single = Layout::single(tp.max(ep));
    let mut layouts = vec![single.clone()];
    if tp > 1 {
        layouts.push(Layout { tp, ..single.clone() });
    }
    if ep > 1 {
        let experts = model.layers.iter().find_map(|ffn| ffn.as_moe()).map_or(0, |moe| moe.num_experts);
        ensure!(ep <= experts, "--expert-parallel-size is {ep}; the model's {experts} experts are the most");
        layouts.push(Layout { dp: ep, experts: ExpertLayout::Placed { ep }, ..single });
    }
    Ok(layouts)
}

fn origin(machine: &Machine, num_threads: usize) -> Origin {
    let command = std::env::args().skip(1).collect::<Vec<_>>().join(" ");
    let cpu = machine.cpu_model.as_deref().unwrap_or("unknown processor");
    Origin {
        command: format!("moesaic {command}"),
        commit: env!("MOESAIC_COMMIT").to_owned(),
        machine: format!("{cpu}, {} cores, {}, {num_threads} threads", machine.num_cores, machine.isa),
        date: date(SystemTime::now()),
    }
}

/// Year, month and day in UTC. Source of the arithmetic: Hinnant, "chrono-compatible low-level date algorithms".
fn date(time: SystemTime) -> String {
    let days = time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs() / 86400);
    // Years begin in March here, so that the leap day is their last.
    let days = days + 719_468;
    let (era, of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    format!("{year}-{month:02}-{day:02}")
}

/// What this machine can do at best in one type.
struct Ceiling {
    precision: Precision,
    ceilings: Ceilings,
}

impl Ceiling {
    /// Measured for some types.
    fn measure_all(prober: &Prober, types: &[Precision]) -> Result<Vec<Ceiling>> {
        let ctx = prober.ctx(Bytes(1 << 20))?;
        let ceiling = |&precision: &Precision| {
            let ceilings = Ceilings::measure(&ctx, dtype(precision)?)?;
            Ok(Ceiling { precision, ceilings })
        };
        types.iter().map(ceiling).collect()
    }

    /// The better of two measurements of the same types, before and after: what else runs on this machine lowers them.
    fn best(before: Vec<Ceiling>, after: Vec<Ceiling>) -> Vec<Ceiling> {
        let best = |(a, b): (Ceiling, Ceiling)| {
            let (a, b, precision) = (a.ceilings, b.ceilings, a.precision);
            let ceilings = Ceilings {
                read_bytes_per_s: a.read_bytes_per_s.max(b.read_bytes_per_s),
                flops_per_s: a.flops_per_s.max(b.flops_per_s),
            };
            Ceiling { precision, ceilings }
        };
        before.into_iter().zip(after).map(best).collect()
    }

    /// Least time of an op.
    fn floor_s(&self, op: &Op) -> f64 {
        (op.flops() / self.ceilings.flops_per_s).max(op.bytes() / self.ceilings.read_bytes_per_s)
    }
}

/// The type that an op computes in here: attention in that of its cache.
fn op_type(op: &Op) -> Precision {
    match *op {
        Op::AttentionPrefill { kv, .. }
        | Op::AttentionDecode { kv, .. }
        | Op::MlaPrefill { kv, .. }
        | Op::MlaDecode { kv, .. } => kv,
        _ => op.precision(),
    }
}

/// What this run measured, by table.
#[derive(Default)]
struct Shares(BTreeMap<&'static str, Vec<(Op, f64)>>);

impl Shares {
    fn add(&mut self, item: &Item, seconds: f64) {
        if let Wanted::Compute(op) = item.wanted {
            self.0.entry(item.wanted.columns().0).or_default().push((op, seconds));
        }
    }

    /// A line for each table, with shares of the ceilings that this run's ops reached.
    fn print(&self, ceilings: &[Ceiling], tables: &BTreeMap<&'static str, Table>) -> Result<()> {
        let mut out = stdout().lock();
        writeln!(out, "{:<14}{:>6}  share of ceilings: median, best tenth", "op", "rows")?;
        for (op, table) in tables {
            write!(out, "{op:<14}{:>6}", table.len())?;
            let share = |(op, seconds): &(Op, f64)| {
                let ceiling = ceilings.iter().find(|ceiling| ceiling.precision == op_type(op))?;
                Some(ceiling.floor_s(op) / seconds)
            };
            let mut shares: Vec<f64> = self.0.get(op).into_iter().flatten().filter_map(share).collect();
            shares.sort_by(f64::total_cmp);
            if !shares.is_empty() {
                let at = |share: f64| 100.0 * shares[((shares.len() - 1) as f64 * share) as usize];
                write!(out, "  {:>24.0} % {:>8.0} %", at(0.5), at(0.9))?;
            }
            writeln!(out)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_of_the_calendar() {
        let at = |days: u64| date(UNIX_EPOCH + Duration::from_secs(days * 86400));
        assert_eq!(
            [at(0), at(59), at(11_016), at(11_017), at(20_782)].map(|it| it),
            ["1970-01-01", "1970-03-01", "2000-02-29", "2000-03-01", "2026-11-25"]
        );
    }
}
