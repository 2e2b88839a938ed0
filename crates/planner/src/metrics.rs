//! A run in numbers: latency, throughput, use of the GPUs, communication, memory, load of experts.

use moesaic_plan::Collective;
use moesaic_spec::{Cluster, DType, LinkClass};
use serde::{Deserialize, Serialize};

use crate::clock::activity::COLLECTIVES;
use crate::clock::{Totals, Traffic};

/// When one request's tokens were there, in seconds of the virtual clock.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RequestTimes {
    /// It was asked.
    pub arrival: f64,
    /// Each of its tokens was sampled, ascending.
    pub tokens: Vec<f64>,
}

/// A distribution.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Spread {
    /// Mean.
    pub mean: f64,
    /// Median.
    pub p50: f64,
    /// 99th percentile: the least value that 99 % do not exceed.
    pub p99: f64,
}

impl Spread {
    /// Of some values; all 0 when there are none.
    pub fn of(mut values: Vec<f64>) -> Spread {
        if values.is_empty() {
            return Spread::default();
        }
        values.sort_by(f64::total_cmp);
        let percentile = |percent: usize| values[(values.len() * percent).div_ceil(100).max(1) - 1];
        Spread { mean: values.iter().sum::<f64>() / values.len() as f64, p50: percentile(50), p99: percentile(99) }
    }
}

/// How fast, and how well used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Performance {
    /// Time per output token after a request's first, milliseconds, by request.
    pub tpot_ms: Spread,
    /// Time to first token, milliseconds, by request.
    pub ttft_ms: Spread,
    /// Output tokens per second, from 0 to the last token.
    pub throughput: f64,
    /// The same per GPU.
    pub tps_per_gpu: f64,
    /// Output tokens.
    pub tokens: u64,
    /// Length of the run, seconds.
    pub seconds: f64,
    /// Steps of the engine.
    pub steps: u64,
    /// Share of the time in which a rank's compute lane executes ops; mean over ranks.
    pub gpu_utilization: f64,
    /// Model FLOPs utilization: operations done / (peak * time), all ranks.
    pub mfu: f64,
    /// Memory bandwidth utilization: bytes moved / (bandwidth * time), all ranks.
    pub mbu: f64,
}

impl Performance {
    /// From the clock's sums and the requests' tokens.
    pub fn of(totals: &Totals, requests: &[RequestTimes], cluster: &Cluster, dtype: DType) -> Performance {
        let with_first = requests.iter().filter_map(|request| Some((request, *request.tokens.first()?)));
        let ttft = with_first.clone().map(|(request, first)| 1e3 * (first - request.arrival));
        let tpot = with_first.filter(|(request, _)| request.tokens.len() > 1).map(|(request, first)| {
            let last = request.tokens[request.tokens.len() - 1];
            1e3 * (last - first) / (request.tokens.len() - 1) as f64
        });
        let tokens: usize = requests.iter().map(|request| request.tokens.len()).sum();
        let last = requests.iter().filter_map(|request| request.tokens.last()).fold(0.0, |last: f64, &at| last.max(at));
        let rank_seconds = totals.ranks.len() as f64 * totals.seconds;
        let sum = |of: fn(&crate::clock::RankTotals) -> f64| totals.ranks.iter().map(of).sum::<f64>();
        let throughput = share(tokens as f64, last);
        Performance {
            tpot_ms: Spread::of(tpot.collect()),
            ttft_ms: Spread::of(ttft.collect()),
            throughput,
            tps_per_gpu: share(throughput, totals.ranks.len() as f64),
            tokens: tokens as u64,
            seconds: totals.seconds,
            steps: totals.steps,
            gpu_utilization: share(sum(|rank| rank.seconds.computing), rank_seconds),
            mfu: share(sum(|rank| rank.flops), cluster.gpu.peak(dtype) * rank_seconds),
            mbu: share(sum(|rank| rank.memory_bytes), cluster.gpu.memory_bandwidth * rank_seconds),
        }
    }
}

/// `part / whole`; 0 of nothing.
pub(crate) fn share(part: f64, whole: f64) -> f64 {
    if whole > 0.0 { part / whole } else { 0.0 }
}

/// Who talked about what, and for how long. Shares are of the length of the run, mean over ranks;
/// [`crate::clock::activity`] says what each means.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Communication {
    /// Classes that had messages.
    pub classes: Vec<ClassTraffic>,
    /// All classes together (which may overlap each other).
    pub all: CommShares,
    /// Classes of links that had messages.
    pub links: Vec<LinkTraffic>,
    /// Share of the experts' time in which a message from or to their rank was on its way.
    pub experts_overlapped: f64,
}

/// Shares of the length of the run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct CommShares {
    /// Communication.
    pub total: f64,
    /// The part of it in which the compute lane is idle.
    pub exposed: f64,
    /// The part of that in which the rank only waits: no message is from it or to it on its way.
    pub waiting: f64,
}

impl CommShares {
    /// The part of it behind which the compute lane works.
    pub fn hidden(self) -> f64 {
        self.total - self.exposed
    }
}

/// One class of messages.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ClassTraffic {
    /// Which.
    pub collective: Collective,
    /// Time.
    pub shares: CommShares,
    /// Messages.
    pub messages: u64,
    /// Bytes.
    pub bytes: u64,
}

/// One class of links.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LinkTraffic {
    /// Which.
    pub class: LinkClass,
    /// The link's name.
    pub name: String,
    /// Messages.
    pub messages: u64,
    /// Bytes.
    pub bytes: u64,
    /// Share of what all GPUs could have sent over it in the time.
    pub utilization: f64,
}

impl Communication {
    /// From the clock's sums.
    pub fn of(totals: &Totals, cluster: &Cluster) -> Communication {
        let rank_seconds = totals.ranks.len() as f64 * totals.seconds;
        let shares = |of: &dyn Fn(&crate::clock::RankTotals) -> crate::clock::activity::CommSeconds| {
            let mut sums = CommShares::default();
            for seconds in totals.ranks.iter().map(of) {
                sums.total += share(seconds.communication, rank_seconds);
                sums.exposed += share(seconds.exposed, rank_seconds);
                sums.waiting += share(seconds.waiting, rank_seconds);
            }
            sums
        };
        let classes = COLLECTIVES.iter().enumerate().map(|(idx, &collective)| {
            let sent = totals.ranks.iter().flat_map(|rank| [rank.sent[0][idx], rank.sent[1][idx]]);
            let Traffic { messages, bytes } = sum(sent);
            ClassTraffic { collective, shares: shares(&|rank| rank.seconds.by_class[idx]), messages, bytes }
        });
        let links = [LinkClass::IntraNode, LinkClass::InterNode].into_iter().enumerate().map(|(idx, class)| {
            let Traffic { messages, bytes } = sum(totals.ranks.iter().flat_map(|rank| rank.sent[idx]));
            let link = cluster.link(class);
            let gpus_share = link.bandwidth_per_gpu.min(link.bandwidth_per_node / cluster.gpus_per_node as f64);
            let utilization = share(bytes as f64, gpus_share * rank_seconds);
            LinkTraffic { class, name: link.name.clone(), messages, bytes, utilization }
        });
        let experts = totals.ranks.iter().map(|rank| rank.seconds.experts).sum();
        let overlapped = totals.ranks.iter().map(|rank| rank.seconds.experts_overlapped).sum();
        Communication {
            classes: classes.filter(|class| class.messages > 0).collect(),
            all: shares(&|rank| rank.seconds.all),
            links: links.filter(|link| link.messages > 0).collect(),
            experts_overlapped: share(overlapped, experts),
        }
    }
}

fn sum(traffic: impl Iterator<Item = Traffic>) -> Traffic {
    traffic.fold(Traffic::default(), |sum, one| Traffic {
        messages: sum.messages + one.messages,
        bytes: sum.bytes + one.bytes,
    })
}

/// What a rank's memory is used for.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RankMemory {
    /// Parts by name, bytes. All ranks of a report have the same parts in the same order.
    pub parts: Vec<(String, u64)>,
    /// What there is, bytes.
    pub available: u64,
}

impl RankMemory {
    /// All parts, bytes.
    pub fn used(&self) -> u64 {
        self.parts.iter().map(|(_, bytes)| bytes).sum()
    }
}

/// Memory efficiency: used / available, mean over ranks.
pub fn memory_efficiency(ranks: &[RankMemory]) -> f64 {
    let each = ranks.iter().map(|rank| share(rank.used() as f64, rank.available as f64));
    share(each.sum(), ranks.len() as f64)
}

/// Tokens that each expert got.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ExpertLoad {
    /// Layers with experts, ascending.
    pub layers: Vec<LayerLoad>,
}

/// Tokens that each expert of a layer got.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LayerLoad {
    /// Decoder layer.
    pub layer: usize,
    /// By expert.
    pub tokens: Vec<u64>,
}

/// How uneven a load is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Imbalance {
    /// Greatest load / mean load; 1 is even.
    pub max_over_mean: f64,
    /// Standard deviation of the shares of the load (over experts or ranks, which sum to 1).
    pub std_dev: f64,
}

impl Imbalance {
    /// Of the loads of experts, or of ranks. Even when there is no load.
    pub fn of(loads: &[u64]) -> Imbalance {
        let total: u64 = loads.iter().sum();
        if total == 0 {
            return Imbalance { max_over_mean: 1.0, std_dev: 0.0 };
        }
        let count = loads.len() as f64;
        let most = loads.iter().max().copied().unwrap_or(0);
        let squares = loads.iter().map(|&load| (load as f64 / total as f64 - 1.0 / count).powi(2));
        Imbalance { max_over_mean: most as f64 * count / total as f64, std_dev: (squares.sum::<f64>() / count).sqrt() }
    }
}

impl ExpertLoad {
    /// Mean over layers.
    pub fn mean(&self) -> Imbalance {
        let layers = self.layers.iter().map(|layer| Imbalance::of(&layer.tokens));
        let count = self.layers.len() as f64;
        layers.fold(Imbalance::default(), |mean, layer| Imbalance {
            max_over_mean: mean.max_over_mean + layer.max_over_mean / count,
            std_dev: mean.std_dev + layer.std_dev / count,
        })
    }

    /// The layer with the greatest max/mean.
    pub fn worst(&self) -> Option<(usize, Imbalance)> {
        let layers = self.layers.iter().map(|layer| (layer.layer, Imbalance::of(&layer.tokens)));
        layers.max_by(|a, b| a.1.max_over_mean.total_cmp(&b.1.max_over_mean))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_that_occurred() {
        assert_eq!(Spread::of(vec![3.0, 1.0, 2.0]), Spread { mean: 2.0, p50: 2.0, p99: 3.0 });
        let hundred = Spread::of((1..=100).map(f64::from).collect());
        assert_eq!((hundred.p50, hundred.p99), (50.0, 99.0));
        assert_eq!(Spread::of(Vec::new()), Spread::default());
    }

    #[test]
    fn imbalance_is_that_of_the_definition() {
        let loads = Imbalance::of(&[1, 1, 1, 5]);
        assert_eq!(loads.max_over_mean, 2.5);
        assert!((loads.std_dev - (3.0 * 0.125f64.powi(2) + 0.375f64.powi(2)).sqrt() / 2.0).abs() < 1e-15);
        assert_eq!(Imbalance::of(&[0, 0]), Imbalance { max_over_mean: 1.0, std_dev: 0.0 });
        let load = ExpertLoad {
            layers: vec![LayerLoad { layer: 3, tokens: vec![2, 2] }, LayerLoad { layer: 5, tokens: vec![3, 1] }],
        };
        assert_eq!(load.mean(), Imbalance { max_over_mean: 1.25, std_dev: 0.125 });
        assert_eq!(load.worst().map(|(layer, worst)| (layer, worst.max_over_mean)), Some((5, 1.5)));
    }
}
