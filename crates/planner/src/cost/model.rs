//! The price of an op on a GPU by a stack.

use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock};

use moesaic_spec::Gpu;

use super::features::{Place, measured_as, unit_seconds};
use super::learned::{Factors, Family, Learned, NEAR};
use super::op::Op;
use super::own::OwnOps;
use super::published::{self, Device};
use super::roofline;
use super::table::{Row, Stack};
use crate::price::{Price, Source};

/// Standard deviation of ln(time) where nothing was measured.
const UNMEASURED_SD: f64 = 0.4;
/// The same of what another GPU, or another stack, is to this one: the spread of factors between those that were measured.
const BORROWED_SD: f64 = 0.2;

static PUBLISHED: LazyLock<Arc<BTreeMap<Family, Factors>>> = LazyLock::new(|| {
    let text = include_str!("../../../../bench/results/published/fit-ops.json");
    let learned: Learned = serde_json::from_str(text).expect("the file is written by fit_costs");
    Arc::new(learned.factors(&published::rows()))
});

/// Prices ops on one GPU, by the kernels of one stack. Cheap to clone.
#[derive(Clone, Debug)]
pub struct CostModel {
    gpu: Gpu,
    stack: Stack,
    device: &'static Device,
    /// Whether the device is the GPU, or only stands for it.
    measured: bool,
    factors: Arc<BTreeMap<Family, Factors>>,
    /// What the machine itself measured; it comes before what others did.
    own: Option<Arc<OwnOps>>,
}

impl CostModel {
    /// With the published measurements.
    pub fn new(gpu: &Gpu, stack: Stack) -> CostModel {
        CostModel::of(gpu, stack, PUBLISHED.clone())
    }

    /// With other measurements, and what was learned from them.
    pub fn with(gpu: &Gpu, stack: Stack, learned: &Learned, rows: &[Row]) -> CostModel {
        CostModel::of(gpu, stack, Arc::new(learned.factors(rows)))
    }

    /// With what a machine measured of itself: it speaks for all ops that it has tables of, and published measurements for the
    /// rest only if they are of this GPU.
    pub fn measured(gpu: &Gpu, own: Arc<OwnOps>) -> CostModel {
        CostModel { own: Some(own), ..CostModel::new(gpu, Stack::Moesaic) }
    }

    pub(super) fn of(gpu: &Gpu, stack: Stack, factors: Arc<BTreeMap<Family, Factors>>) -> CostModel {
        let (device, measured) = published::device_of(gpu);
        CostModel { gpu: gpu.clone(), stack, device, measured, factors, own: None }
    }

    /// The same measurements for another GPU or stack.
    pub fn on(&self, gpu: &Gpu, stack: Stack) -> CostModel {
        CostModel { own: self.own.clone(), ..CostModel::of(gpu, stack, self.factors.clone()) }
    }

    /// Whose kernels are priced.
    pub fn stack(&self) -> Stack {
        self.stack
    }

    /// What an op costs with the kernel that the stack uses for it.
    pub fn price(&self, op: &Op) -> Price {
        self.price_kernel(op, None)
    }

    /// What an op costs with a kernel that tables name; with the usual one for `None`.
    pub fn price_kernel(&self, op: &Op, kernel: Option<&str>) -> Price {
        match &self.own {
            None => self.price_and_distance(op, kernel).0,
            Some(own) => own.price(&self.gpu, op).unwrap_or_else(|| match self.measured {
                true => self.price_and_distance(op, kernel).0,
                false => self.by_roofline(op),
            }),
        }
    }

    /// By the data sheet alone.
    fn by_roofline(&self, op: &Op) -> Price {
        let seconds = roofline::seconds(&self.gpu, op).max(roofline::bound(&self.gpu, op));
        Price { seconds, sd: UNMEASURED_SD, source: Source::Roofline }
    }

    /// The price, and the length scales to the nearest row; infinite where there is none.
    pub(super) fn price_and_distance(&self, op: &Op, kernel: Option<&str>) -> (Price, f64) {
        let known = measured_as(op).and_then(|(family, measured)| Some((self.factors.get(&family)?, measured)));
        let Some((factors, measured)) = known else {
            return (self.by_roofline(op), f64::INFINITY);
        };
        let usual = factors.usual_kernel(self.stack, measured.precision());
        let place = Place {
            op: &measured,
            device: self.device.folder,
            gpu: &self.device.gpu,
            stack: self.stack,
            kernel: kernel.or(usual).unwrap_or_default(),
        };
        let factor = factors.predict(&place);
        let own = self.measured && usual.is_some() && measured == *op;
        let source = if own && factor.distance <= NEAR { Source::Table } else { Source::Predictor };
        let seconds = unit_seconds(&self.gpu, op) * factor.mean.exp();
        let sd = if own { factor.sd } else { factor.sd.hypot(BORROWED_SD) };
        (Price { seconds: seconds.max(roofline::bound(&self.gpu, op)), sd, source }, factor.distance)
    }
}
