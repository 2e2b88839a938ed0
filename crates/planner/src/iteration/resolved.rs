//! Where everything is that the prices of a layout need.

use std::rc::Rc;

use super::dag::Dag;
use super::interned::{CoreCosts, CutCosts, ExchangeKey, ExpertKey, FullestKey, GroupKey};
use super::parts::Parts;
use super::{Iterations, Layout};
use crate::PlannerError;

/// A layout of which everything is found that a price needs: pricing it at many batches looks nothing up.
#[derive(Clone, Debug)]
pub struct Resolved<'l> {
    pub(super) layout: &'l Layout,
    pub(super) dense: usize,
    pub(super) moe: usize,
    pub(super) cut: usize,
    pub(super) expert: usize,
    pub(super) fullest: usize,
    /// Where there are several ranks that share heads.
    pub(super) group: Option<usize>,
    /// Where rows travel.
    pub(super) exchange: Option<usize>,
    /// By micro-batches less one: graphs of few layers, with a MoE layer less, with a dense layer more.
    pub(super) dags: Vec<[usize; 3]>,
}

impl<'l> Resolved<'l> {
    /// The layout.
    pub fn layout(&self) -> &'l Layout {
        self.layout
    }
}

impl Iterations<'_> {
    /// Finds what prices of a layout need. What it returns is of these iterations and no others.
    ///
    /// # Errors
    /// [`PlannerError`]: the model cannot be spread like this.
    pub fn resolve<'l>(&mut self, layout: &'l Layout) -> Result<Resolved<'l>, PlannerError> {
        let (dense, moe) = layout.fullest_stage(self.model);
        let cut = self.cut(layout)?;
        let expert = ExpertKey::of(layout);
        let exchange = layout.experts.exchanges().then(|| {
            let Layout { tp, dp, precision, two_level, .. } = *layout;
            self.exchanges.or_default(ExchangeKey { expert, tp, dp, precision, two_level })
        });
        let Layout { tp, all_reduce, .. } = *layout;
        let group = (tp > 1).then(|| self.groups.or_default(GroupKey { tp, all_reduce }));
        // Stages of a pipeline have one micro-batch at a time.
        let most = if layout.pp > 1 { 1 } else { layout.micro_batches };
        // From the third MoE layer on, each adds the same; so does each dense layer.
        let (few_dense, few_moe) = (dense.min(1), moe.min(3));
        let mut dags = Vec::with_capacity(most);
        for micro_batches in 1..=most {
            let mut dag = |dense, moe| {
                let structure = layout.structure(micro_batches, dense, moe);
                self.dags.place(structure, |structure| Dag::new(self.model, structure))
            };
            let few = dag(few_dense, few_moe)?;
            let fewer = if moe > 3 { dag(few_dense, 2)? } else { few };
            let two = if dense > 1 { dag(2, few_moe)? } else { few };
            dags.push([few, fewer, two]);
        }
        Ok(Resolved {
            layout,
            dense,
            moe,
            cut,
            expert: self.experts.or_default(expert),
            fullest: self.fullest.or_default(FullestKey::of(layout)),
            group,
            exchange,
            dags,
        })
    }

    /// The costs of a way of cutting the model, traced the first time.
    pub(super) fn cut(&mut self, layout: &Layout) -> Result<usize, PlannerError> {
        let (model, ways) = (self.model, &self.attention);
        self.cuts.place(layout.cut(), |cut| {
            let parts = Rc::new(Parts::trace(model, cut)?);
            let cores = ways.iter().map(|_| CoreCosts::default()).collect();
            Ok(CutCosts { parts, curves: Default::default(), cores })
        })
    }
}
