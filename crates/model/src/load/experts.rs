//! MLPs and experts, whole or cut by their hidden width.

use std::ops::Range;

use moesaic_kernels::experts::{ExpertWeight, ExpertWeights};
use moesaic_plan::{ExpertId, Slice};
use moesaic_spec::model::tensors::{FusedProj, Proj, Role};
use moesaic_spec::{Activation, DType, Moe};

use super::{Cut, Origin, WeightSource};
use crate::ModelError;
use crate::checkpoint::Checkpoint;

impl WeightSource<'_> {
    /// Which hidden values a slice of an MLP has, whose matrix up has this role. FP8 is cut between blocks, so that it stays
    /// FP8, unless there are fewer blocks than parts; then all but the first part are dequantised.
    fn hidden_range(&self, up: Role, slice: Slice) -> Range<usize> {
        let (width, _) = self.dims(up);
        let unit = match self.spec.fp8_block {
            Some([_, block]) if self.matrix_dtype(up) == DType::F8E4M3 && width.div_ceil(block) >= slice.count => block,
            _ => 1,
        };
        slice.range(width, unit)
    }

    /// Memory for a part of an expert.
    fn empty_expert(&self, up: Role, hidden: &Range<usize>, of: Activation) -> Result<ExpertWeight, ModelError> {
        let dtype = self.part_dtype(up, hidden);
        Ok(ExpertWeight::empty(self.arena, self.spec.hidden_size, hidden.len(), dtype, of)?)
    }

    /// A dense MLP or a shared expert: a group of one.
    pub(crate) fn mlp(
        &self,
        role: impl Fn(Proj) -> Role,
        activation: Activation,
        slice: Slice,
    ) -> Result<ExpertWeights, ModelError> {
        let hidden = self.hidden_range(role(Proj::Up), slice);
        let mut expert = self.empty_expert(role(Proj::Up), &hidden, activation)?;
        for &proj in activation.projs() {
            self.take_proj(&role, proj, &hidden, &mut expert)?;
        }
        Ok(ExpertWeights { experts: vec![expert], activation })
    }

    /// Some of a layer's routed experts (ascending), or a part of the hidden width of each, in the spelling of transformers 4
    /// (one tensor a matrix) or 5 (all experts in one).
    pub(crate) fn routed_experts(
        &self,
        layer: usize,
        spec: &Moe,
        which: &[ExpertId],
        slice: Slice,
    ) -> Result<ExpertWeights, ModelError> {
        let in_order =
            which.is_sorted_by(|a, b| a < b) && which.last().is_none_or(|last| last.idx() < spec.num_experts);
        assert!(in_order, "ascending experts below {}: {which:?}", spec.num_experts);
        let activation = spec.activation;
        let role = |expert: ExpertId| move |proj| Role::Expert { layer, expert: expert.idx(), proj };
        let hidden = match which.first() {
            Some(&first) => self.hidden_range(role(first)(Proj::Up), slice),
            None => return Ok(ExpertWeights { experts: Vec::new(), activation }),
        };
        let mut experts = which
            .iter()
            .map(|&expert| self.empty_expert(role(expert)(Proj::Up), &hidden, activation))
            .collect::<Result<Vec<_>, _>>()?;
        // Each of the two tensors may be in either spelling.
        let fused = |proj| self.fused(layer, proj);
        let in_fused = |proj| fused(if proj == Proj::Down { FusedProj::Down } else { FusedProj::GateUp });
        for (&expert, weights) in which.iter().zip(&mut experts) {
            for &proj in activation.projs().iter().filter(|&&proj| in_fused(proj).is_none()) {
                self.take_proj(&role(expert), proj, &hidden, weights)?;
            }
        }
        if let Some((checkpoint, name)) = fused(FusedProj::GateUp) {
            self.take_fused_first((checkpoint, &name), which, (spec, &hidden), &mut experts)?;
        }
        if let Some((checkpoint, name)) = fused(FusedProj::Down) {
            let d = self.spec.hidden_size; // [E, D, F]
            let rows = |e: &ExpertId| e.idx() * d..(e.idx() + 1) * d;
            let cuts: Vec<Cut> = which.iter().map(|e| Cut { rows: rows(e), cols: hidden.clone() }).collect();
            self.take_stored(checkpoint, &name, &cuts, |idx, source, pool| experts[idx].pack_down(pool, source))?;
        }
        Ok(ExpertWeights { experts, activation })
    }

    /// The checkpoint and the name of a layer's experts, where they are stored as one.
    fn fused(&self, layer: usize, proj: FusedProj) -> Option<(&Checkpoint, String)> {
        let Origin::Checkpoint(checkpoint) = self.origin else { return None };
        let name = self.spec.fused_expert_name(layer, proj);
        checkpoint.get(&name).is_some().then_some((checkpoint, name))
    }

    /// One matrix of an expert or MLP, stored by itself.
    fn take_proj(
        &self,
        role: &impl Fn(Proj) -> Role,
        proj: Proj,
        hidden: &Range<usize>,
        expert: &mut ExpertWeight,
    ) -> Result<(), ModelError> {
        let part = match proj {
            Proj::Gate | Proj::Up => self.rows(role(proj), hidden.clone()),
            Proj::Down => self.cols(role(proj), hidden.clone()),
        };
        self.take(part.role, &[part.cut], |_, source, pool| match proj {
            Proj::Gate => expert.pack_gate(pool, source),
            Proj::Up => expert.pack_up(pool, source),
            Proj::Down => expert.pack_down(pool, source),
        })
    }

    /// Gates and ups of `which` from `[E, 2F, D]`, or ups alone from `[E, F, D]`.
    fn take_fused_first(
        &self,
        (checkpoint, name): (&Checkpoint, &str),
        which: &[ExpertId],
        (spec, hidden): (&Moe, &Range<usize>),
        experts: &mut [ExpertWeight],
    ) -> Result<(), ModelError> {
        let (width, d) = (spec.intermediate_size, self.spec.hidden_size);
        let halves = if spec.activation == Activation::SwiGlu { 2 } else { 1 };
        let cut = |expert: ExpertId, half: usize| {
            let first = (expert.idx() * halves + half) * width;
            Cut { rows: first + hidden.start..first + hidden.end, cols: 0..d }
        };
        let cuts: Vec<Cut> = which.iter().flat_map(|&e| (0..halves).map(move |half| cut(e, half))).collect();
        self.take_stored(checkpoint, name, &cuts, |idx, source, pool| {
            let (expert, half) = (&mut experts[idx / halves], idx % halves);
            if halves == 2 && half == 0 { expert.pack_gate(pool, source) } else { expert.pack_up(pool, source) }
        })
    }
}
