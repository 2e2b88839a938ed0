//! Weights of a group of experts.

use moesaic_device::{Arena, Pool, Tensor};
use moesaic_spec::{Bytes, DType};

use super::{Activation, OP};
use crate::KernelError;
use crate::contract::{check, require};
use crate::matrix::{PackedMatrix, Placement, SourceMatrix, TILE_N, packed_bytes};

/// Experts of one shape.
pub struct ExpertWeights {
    /// By expert.
    pub experts: Vec<ExpertWeight>,
    /// Of all of them.
    pub activation: Activation,
}

/// One expert: `D → F → D`.
pub struct ExpertWeight {
    /// Gated: panels of the gate (even) and of up (odd) alternate, so that one block of a product has both. Otherwise the
    /// first matrix as it is.
    gate_up: PackedMatrix,
    /// `[D, F]`.
    down: PackedMatrix,
    f: usize,
    activation: Activation,
}

/// Rows that the first matrix has when packed.
fn first_rows(f: usize, activation: Activation) -> usize {
    match activation {
        Activation::SwiGlu => 2 * f.next_multiple_of(TILE_N),
        Activation::Gelu => f,
    }
}

impl ExpertWeight {
    /// Takes memory for an expert of model width `d` and hidden width `f`.
    pub fn empty(
        arena: &Arena,
        d: usize,
        f: usize,
        dtype: DType,
        activation: Activation,
    ) -> Result<ExpertWeight, KernelError> {
        require(f > 0, OP, "hidden width", || "at least 1".into(), || "0".into())?;
        let mut gate_up = PackedMatrix::empty(arena, first_rows(f, activation), d, dtype)?;
        if activation == Activation::SwiGlu && !f.is_multiple_of(TILE_N) {
            let last = gate_up.panels() - 1;
            gate_up.clear_panel(last - 1);
            gate_up.clear_panel(last);
        }
        let down = PackedMatrix::empty(arena, d, f, dtype)?;
        Ok(ExpertWeight { gate_up, down, f, activation })
    }

    /// Bytes that [`ExpertWeight::empty`] takes, rounded up as arenas do.
    pub fn packed_bytes(d: usize, f: usize, dtype: DType, activation: Activation) -> Bytes {
        let round = |bytes: Bytes| bytes.0.next_multiple_of(moesaic_device::arena::ALIGN_BYTES as u64);
        Bytes(round(packed_bytes(first_rows(f, activation), d, dtype)) + round(packed_bytes(d, f, dtype)))
    }

    /// Model width.
    pub fn d(&self) -> usize {
        self.down.n()
    }

    /// Hidden width.
    pub fn f(&self) -> usize {
        self.f
    }

    /// Element type of the weights.
    pub fn dtype(&self) -> DType {
        self.down.dtype()
    }

    /// Size in memory.
    pub fn size_bytes(&self) -> Bytes {
        Bytes(self.gate_up.size_bytes().0 + self.down.size_bytes().0)
    }

    /// The weights as they lie in memory, for a message to another rank.
    pub fn to_tensors(&self, arena: &Arena) -> Result<Vec<Tensor>, KernelError> {
        let copy = |matrix: &PackedMatrix| {
            let packed = matrix.packed();
            let mut tensor = Tensor::empty(arena, &[packed.len()], DType::U8)?;
            tensor.bytes_mut().copy_from_slice(packed);
            Ok(tensor)
        };
        [&self.gate_up, &self.down].into_iter().map(copy).collect()
    }

    /// Takes over what [`ExpertWeight::to_tensors`] of an expert of the same shape and type gave.
    pub fn fill(&mut self, tensors: &[Tensor]) -> Result<(), KernelError> {
        let num = tensors.len();
        require(num == 2, OP, "tensors of an expert", || "2".into(), || num.to_string())?;
        for (matrix, tensor) in [&mut self.gate_up, &mut self.down].into_iter().zip(tensors) {
            let packed = matrix.packed_mut();
            check(OP, "packed matrix", tensor, &[packed.len()], DType::U8)?;
            packed.copy_from_slice(tensor.bytes());
        }
        Ok(())
    }

    /// The first matrix, packed.
    pub(crate) fn gate_up(&self) -> &PackedMatrix {
        &self.gate_up
    }

    /// The second matrix, packed.
    pub(crate) fn down(&self) -> &PackedMatrix {
        &self.down
    }

    /// Packs the gate `[F, D]`.
    pub fn pack_gate(&mut self, pool: &Pool, src: &SourceMatrix) -> Result<(), KernelError> {
        self.whole("gate", src)?;
        self.pack_half(pool, 0, src, 0)
    }

    /// Packs up `[F, D]`; for an ungated expert, its first matrix.
    pub fn pack_up(&mut self, pool: &Pool, src: &SourceMatrix) -> Result<(), KernelError> {
        self.whole("up", src)?;
        self.pack_half(pool, 1, src, 0)
    }

    /// Packs a fused `[2F, D]`: the gate's rows, then up's.
    pub fn pack_gate_up(&mut self, pool: &Pool, src: &SourceMatrix) -> Result<(), KernelError> {
        let rows = 2 * self.f;
        require(src.rows == rows, OP, "rows of gate_up", || rows.to_string(), || src.rows.to_string())?;
        self.pack_half(pool, 0, src, 0)?;
        self.pack_half(pool, 1, src, self.f)
    }

    /// Packs down `[D, F]`.
    pub fn pack_down(&mut self, pool: &Pool, src: &SourceMatrix) -> Result<(), KernelError> {
        let d = self.d();
        require(src.rows == d, OP, "rows of down", || d.to_string(), || src.rows.to_string())?;
        self.down.pack_rows(pool, 0, src)
    }

    fn whole(&self, what: &'static str, src: &SourceMatrix) -> Result<(), KernelError> {
        let f = self.f;
        require(src.rows == f, OP, what, || format!("{f} rows"), || format!("{} rows", src.rows))
    }

    fn pack_half(&mut self, pool: &Pool, half: usize, src: &SourceMatrix, first: usize) -> Result<(), KernelError> {
        let placement = match self.activation {
            Activation::SwiGlu => Placement { first: 0, panel_step: 2, panel_offset: half },
            Activation::Gelu => {
                let got = || "a gate".to_string();
                require(half == 1, OP, "weights of an expert without gate", || "up and down".into(), got)?;
                Placement { first: 0, panel_step: 1, panel_offset: 0 }
            }
        };
        self.gate_up.pack_placed(pool, placement, src, first..first + self.f)
    }
}

impl ExpertWeights {
    /// Checks that all experts have one shape, type and activation, and says them: `(d, f, type)`.
    pub(crate) fn shape(&self) -> Result<(usize, usize, DType), KernelError> {
        let first = self.experts.first();
        let Some(first) = first else {
            return require(false, OP, "experts", || "at least 1".into(), || "0".into()).map(|()| unreachable!());
        };
        let shape = (first.d(), first.f(), first.dtype());
        for expert in &self.experts {
            let this = (expert.d(), expert.f(), expert.dtype());
            let describe =
                |(d, f, dtype): (usize, usize, DType), activation| format!("{dtype} {d} → {f}, {activation:?}");
            require(
                this == shape && expert.activation == self.activation,
                OP,
                "shape of an expert",
                || describe(shape, self.activation),
                || describe(this, expert.activation),
            )?;
        }
        Ok(shape)
    }
}
