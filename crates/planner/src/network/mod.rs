//! What communication costs: flows over links, no packets.
//!
//! An operation ([`CommOp`]) asks links for bytes and steps ([`Demand`]). A curve turns these into seconds with a latency
//! α, a share of the bandwidth that large messages reach, and a gradual change from one to the other ([`Curve`]). Curves
//! are fitted to published measurements of a GPU's own links, and what is left of the measurements is interpolated. A
//! cluster's links count relative to the links that were measured: the price follows its bandwidth, utilization and
//! latency, and no price is below what the full bandwidth allows.
//!
//! ```
//! use moesaic_planner::network::{Algorithm, Group, Library, Network};
//! use moesaic_spec::cluster_preset;
//!
//! let network = Network::new(&cluster_preset("dgx-h100").unwrap(), Library::Nccl);
//! let price = network.all_reduce(64e6, Group::one_node(8), Algorithm::Best);
//! assert!(price.seconds > 64e6 / 450e9 && price.seconds < 1e-3);
//! ```

mod calibration;
mod collective;
mod comm_op;
mod curve;
mod exchange;
mod fit;
mod kriging;
mod own;
pub mod published;

use std::sync::Arc;

use moesaic_spec::{Cluster, Link, LinkClass};

pub use crate::price::{Price, Source};
pub use calibration::{Calibration, Family, FittedCurve, HeldOut, MeasuredGpu, OPS, Version, held_out};
pub use collective::{Algorithm, Collective, CollectiveKind};
pub use comm_op::CommOp;
pub use curve::{Curve, Demand};
pub use exchange::{Copies, Exchange, Exchanged, M2n, Mode, expected_distinct};
pub(crate) use own::usual_transport;
pub use own::{LinkKind, LinkRow, OwnLinks};

use calibration::Profile;
use curve::Tier;

/// How a communicator lies over nodes: equally many ranks on each, the last node perhaps fewer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Group {
    /// Ranks.
    pub ranks: usize,
    /// Ranks of it on one node.
    pub ranks_per_node: usize,
}

impl Group {
    /// All on one node.
    pub fn one_node(ranks: usize) -> Self {
        Group { ranks, ranks_per_node: ranks.max(1) }
    }

    /// Ranks that fill one node after the other.
    pub fn packed(ranks: usize, gpus_per_node: usize) -> Self {
        Group { ranks, ranks_per_node: gpus_per_node.min(ranks).max(1) }
    }

    /// Nodes that it touches.
    pub fn nodes(&self) -> usize {
        self.ranks.div_ceil(self.ranks_per_node).max(1)
    }
}

/// Who moves the bytes of an all-reduce. The other collectives are NCCL's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Library {
    /// NVIDIA's NCCL.
    Nccl,
    /// Kernels that read and write the other GPUs' memory over NVLink in one or two rounds, as serving engines have them;
    /// large sizes fall to NCCL.
    Custom,
}

/// Prices on one cluster.
#[derive(Clone, Debug)]
pub struct Network {
    profile: Profile,
    library: Library,
    version: Version,
    intra: Tier,
    inter: Tier,
    /// What the machine itself measured, and over which link of the cluster that goes.
    own: Option<(Arc<OwnLinks>, Link)>,
}

impl Network {
    /// For the links of a cluster.
    pub fn new(cluster: &Cluster, library: Library) -> Self {
        let links = |class| cluster.link(class);
        Network::of(Profile::of(cluster), library, links(LinkClass::IntraNode), links(LinkClass::InterNode))
    }

    /// For the links of a cluster, with what a machine measured of itself: it speaks for sums and messages inside a node.
    pub fn with_own(cluster: &Cluster, library: Library, own: Arc<OwnLinks>) -> Self {
        Network { own: Some((own, cluster.intra_node.clone())), ..Network::new(cluster, library) }
    }

    /// The nodes that the tables of a GPU were measured on.
    pub fn measured(gpu: MeasuredGpu, library: Library) -> Self {
        let links = gpu.links();
        Network::of(Profile { gpu, own: true }, library, &links.intra, &links.inter)
    }

    /// The same by the curves of another GPU, as if this one had no tables.
    pub fn measured_by(gpu: MeasuredGpu, other: MeasuredGpu, library: Library) -> Self {
        let links = gpu.links();
        Network::of(Profile { gpu: other, own: false }, library, &links.intra, &links.inter)
    }

    fn of(profile: Profile, library: Library, intra: &Link, inter: &Link) -> Self {
        let measured = profile.gpu.links();
        Network {
            profile,
            library,
            version: Version::Newest,
            intra: Tier::new(intra, &measured.intra),
            inter: Tier::new(inter, &measured.inter),
            own: None,
        }
    }

    /// The same cluster while several such groups use its links at once: each gets its share. `intra` and `inter` are how
    /// many flows a GPU's (and so a node's) link of each class carries; at least 1.
    #[must_use]
    pub fn shared(&self, intra: f64, inter: f64) -> Self {
        assert!(intra >= 1.0 && inter >= 1.0, "flows of a link: {intra} inside nodes, {inter} between them");
        Network { intra: self.intra.shared(intra), inter: self.inter.shared(inter), ..self.clone() }
    }

    /// The same cluster with another version of the software that exchanges rows.
    #[must_use]
    pub fn with_version(&self, version: Version) -> Self {
        Network { version, ..self.clone() }
    }

    /// Any operation.
    pub fn price(&self, op: &CommOp) -> Price {
        match op {
            CommOp::Collective(collective) => self.collective(collective),
            CommOp::Dispatch(exchange) => self.dispatch(exchange),
            CommOp::Combine(exchange) => self.combine(exchange),
        }
    }

    /// The least seconds that the full bandwidth of the links allows; no price is below.
    pub fn bound(&self, op: &CommOp) -> f64 {
        self.bound_of(&op.demand())
    }

    /// One message between two GPUs.
    pub fn point_to_point(&self, bytes: f64, class: LinkClass) -> Price {
        if class == LinkClass::IntraNode
            && let Some(price) = self.own(LinkKind::SendReceive, 2, bytes)
        {
            return Price { seconds: price.seconds.max(bytes / self.intra.bandwidth(1.0)), ..price };
        }
        // A pair is an all-to-all of two ranks where half of what each has stays at home.
        let group = match class {
            LinkClass::IntraNode => Group::one_node(2),
            LinkClass::InterNode => Group { ranks: 2, ranks_per_node: 1 },
        };
        self.all_to_all(2.0 * bytes, group)
    }

    /// Streaming multiprocessors that an operation keeps from computing while it runs.
    pub fn sms_taken(&self, op: &CommOp) -> usize {
        match op {
            CommOp::Collective(_) => NCCL_SMS,
            CommOp::Dispatch(exchange) | CommOp::Combine(exchange) => match exchange.mode {
                // The adapter moves the bytes; a receiving hook finishes the work later.
                Mode::LowLatency => 0,
                Mode::Normal => exchange.sms,
            },
        }
    }

    fn own(&self, kind: LinkKind, ranks: usize, bytes: f64) -> Option<Price> {
        let (own, link) = self.own.as_ref()?;
        own.price(kind, ranks as u64, bytes, link)
    }

    fn bound_of(&self, demand: &Demand) -> f64 {
        let (intra, inter) = (self.intra.bandwidth(demand.ranks_per_node), self.inter.bandwidth(demand.ranks_per_node));
        (demand.least_intra_bytes / intra).max(demand.least_inter_bytes / inter)
    }

    /// A demand by a fitted curve, corrected by what the measurements near it say.
    fn fitted(
        &self,
        op: &str,
        demand: &Demand,
        coordinates: &[f64; calibration::COORDINATES],
        version: Version,
    ) -> Price {
        let (fitted, own) = Calibration::published().curve(self.profile, op);
        let correction = fitted.correction(coordinates, self.profile.gpu, version);
        let seconds = fitted.curve.seconds(demand, &self.intra, &self.inter) * correction.ln_ratio.exp();
        let (sd, source) = match (own, correction.inside) {
            (true, true) => (correction.sd, Source::Table),
            (true, false) => (correction.sd, Source::Predictor),
            (false, _) => (correction.sd.hypot(BETWEEN_GPUS_SD), Source::Predictor),
        };
        Price { seconds: seconds.max(self.bound_of(demand)), sd, source }
    }
}

/// Blocks of a large NCCL collective; each takes one multiprocessor. Source: NCCL's documentation, `NCCL_MAX_CTAS` (at most
/// 32 by default).
const NCCL_SMS: usize = 32;

/// How far a law fitted on one GPU's links is from another's, standard deviation of the logarithm: the A100's collectives
/// by the curves of the H200 and the A100's own links are off by 7 to 10 % (median), 17 to 38 % (nine tenths), as the
/// example `check_network` prints.
const BETWEEN_GPUS_SD: f64 = 0.15;

/// Standard deviation of the logarithm where only the links' figures are known: a judgement, a factor of 1.5 either way in
/// nine of ten cases.
const UNMEASURED_SD: f64 = 0.25;
