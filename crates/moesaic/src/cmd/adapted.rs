//! What changed while requests ran, in sentences: experts that moved, micro-batches that were chosen.

use moesaic_engine::Adaptation;
use moesaic_engine::balance::BalanceReport;
use moesaic_engine::synchronize::SynchronizerReport;
use moesaic_spec::Bytes;

/// A sentence for each thing that the plan lets change; none where it lets nothing.
pub(crate) fn sentences(adaptation: &Adaptation) -> Vec<String> {
    let moved = adaptation.balance_report().map(moved);
    let chosen = adaptation.synchronizer_report().map(|report| chosen(report, adaptation.num_micro_batches()));
    moved.into_iter().chain(chosen).collect()
}

fn moved(report: &BalanceReport) -> String {
    let looks = counted(report.intervals, "look");
    let Some((first, last)) = report.decisions.first().zip(report.decisions.last()) else {
        let why = match report.intervals {
            0 => "no interval of `balance` was over",
            _ => "none found a load that is uneven beyond chance and worth a move",
        };
        return format!("Experts stayed where they were: {looks} at the load; {why}.");
    };
    let experts: usize = report.decisions.iter().map(|decision| decision.moves).sum();
    let steps: Vec<String> = report.decisions.iter().map(|decision| decision.step.to_string()).collect();
    // Weights of the last decision may be on their way still.
    let after = last.measured.map_or(("should become", last.predicted), |measured| ("became", measured));
    format!(
        "Experts moved after step {}: {} sent ({}), {looks} at the load. Max/mean load of ranks was {:.2} and {} {:.2}.",
        steps.join(", "),
        counted(experts as u64, "expert"),
        Bytes(report.moved_bytes),
        first.before.max_over_mean,
        after.0,
        after.1.max_over_mean
    )
}

fn chosen(report: &SynchronizerReport, now: usize) -> String {
    if report.intervals == 0 {
        return "Micro-batches were not chosen: no interval of `synchronize` was over.".to_string();
    }
    let changes = report.choices.iter().filter(|choice| choice.from != choice.to);
    let changes: Vec<String> =
        changes.map(|choice| format!("{} to {} after step {}", choice.from, choice.to, choice.step)).collect();
    let changes = if changes.is_empty() { "never changed".to_string() } else { changes.join(", ") };
    format!("Micro-batches were chosen {}: {changes}; {now} at the end.", counted(report.intervals, "time"))
}

fn counted(count: u64, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}
