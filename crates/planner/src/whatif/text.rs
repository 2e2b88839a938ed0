//! What a terminal shows.

use std::fmt;

use super::{Bound, Change, Explained};
use crate::estimate::Estimate;
use crate::report::format::{integer, number, percent, seconds};

impl fmt::Display for Explained {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let prediction = &self.prediction;
        let time = |estimate: Estimate| interval(estimate, seconds);
        let rate = |estimate: Estimate| interval(estimate, number);
        writeln!(
            f,
            "predicted for {} users at a time, on {} GPUs",
            integer(prediction.concurrency.round() as u64),
            prediction.gpus
        )?;
        writeln!(f, "  time to first token       {}", time(prediction.ttft_s))?;
        writeln!(f, "  time per output token     {}", time(prediction.tpot_s))?;
        writeln!(f, "  tokens/s of one user      {}", rate(prediction.tokens_per_s_user))?;
        writeln!(f, "  tokens/s of all users     {}", rate(prediction.tokens_per_s))?;
        writeln!(f, "  tokens/s for each GPU     {}", rate(prediction.tokens_per_s_gpu))?;
        writeln!(
            f,
            "  an iteration takes {}, and {} where prompts are read, which is in {} % of them",
            seconds(self.decode_s),
            seconds(self.mixed_s),
            percent(self.mixed_share)
        )?;
        if (self.pace - 1.0).abs() > 5e-3 {
            let pace = number(self.pace);
            writeln!(f, "  a step takes {pace} times as long as its iteration, as measurements of the program show")?;
        }
        writeln!(f, "\nwhat binds: parts of an iteration in the mean")?;
        for part in &self.parts {
            let bound = part.bound.map_or("", bound_name);
            writeln!(f, "  {:<30} {:>5} %  {bound}", part.name, percent(part.share))?;
        }
        writeln!(
            f,
            "  {:<30} {:>5} %  of the time a rank does not compute",
            "exposed, and waiting",
            percent(self.exposed)
        )?;
        let straggler = format!("max/mean {}", number(prediction.imbalance));
        writeln!(
            f,
            "  {:<30} {:>5} %  of the time per token; {straggler}",
            "the fullest rank's surplus",
            percent(self.straggler)
        )?;
        writeln!(f, "\nwhat would help, one thing at a time")?;
        writeln!(f, "  {:<52} {:>9} {:>9} {:>11}", "", "TPOT", "tokens/s", "TTFT")?;
        for what_if in &self.what_ifs {
            writeln!(
                f,
                "  {:<52} {:>9} {:>9} {:>11}",
                change_name(what_if.change),
                signed(what_if.tpot_gain),
                signed(what_if.throughput_gain),
                seconds(what_if.ttft_s)
            )?;
        }
        Ok(())
    }
}

fn interval(estimate: Estimate, show: impl Fn(f64) -> String) -> String {
    format!("{} (90 %: {} to {})", show(estimate.value), show(estimate.low), show(estimate.high))
}

fn signed(share: f64) -> String {
    let percent = 100.0 * share;
    if percent.abs() < 0.05 { "±0 %".to_owned() } else { format!("{percent:+.1} %") }
}

fn bound_name(bound: Bound) -> &'static str {
    match bound {
        Bound::Compute => "arithmetic",
        Bound::Memory => "memory traffic",
        Bound::Latency => "latency",
        Bound::IntraNode => "links inside nodes",
        Bound::InterNode => "links between nodes",
    }
}

fn change_name(change: Change) -> &'static str {
    match change {
        Change::TwiceCompute => "arithmetic twice as fast",
        Change::TwiceMemory => "memory twice as fast",
        Change::TwiceIntraNode => "links inside nodes twice as fast",
        Change::TwiceInterNode => "links between nodes twice as fast",
        Change::HalfLatency => "half the latency of kernels and links",
        Change::OneMoreGroup => "one more data-parallel group, same users",
        Change::OneMoreNode => "one more node, same users",
        Change::OneMoreNodeAndItsUsers => "one more node, and as many users for each GPU",
        Change::OneMoreExpertRank => "one more GPU with experts",
        Change::HalfTheUsers => "half the users",
        Change::TwiceTheUsers => "twice the users",
        Change::EightBitExchange => "rows travel in 8 bits",
        Change::Replicas => "a replica more on each rank, placed by load",
        Change::Balancing => "experts placed by load",
        Change::TwoMicroBatches => "two micro-batches",
        Change::OneMicroBatch => "one micro-batch",
    }
}
