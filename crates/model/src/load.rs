//! Weights from where they are to where kernels want them: one description of what each layer takes, read by a
//! checkpoint, by random weights and by `Meta`.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;

use half::bf16;
use moesaic_device::{Arena, Pool, Tensor};
use moesaic_kernels::KernelError;
use moesaic_kernels::experts::{ExpertWeight, ExpertWeights};
use moesaic_kernels::matrix::{PackedMatrix, SourceMatrix};
use moesaic_spec::model::tensors::{FusedProj, Proj, Role, TensorSpec};
use moesaic_spec::{Activation, DType, Mla, ModelSpec, Moe};

use crate::checkpoint::{Checkpoint, RandomWeights, StoredTensor};
use crate::{ModelError, finite};

/// The type that matrices take in memory (`--dtype`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum LoadDType {
    /// As stored; F16 becomes F32, which holds it exactly.
    #[default]
    Auto,
    /// Everything in F32.
    Float32,
    /// Everything in BF16; FP8 blocks are dequantised.
    BFloat16,
}

/// Where weights come from.
#[derive(Clone, Copy)]
enum Origin<'a> {
    Meta,
    Random(&'a RandomWeights),
    Checkpoint(&'a Checkpoint),
}

/// What layers take their weights from.
pub struct WeightSource<'a> {
    spec: &'a ModelSpec,
    tensors: HashMap<Role, TensorSpec>,
    dtype: LoadDType,
    arena: &'a Arena,
    origin: Origin<'a>,
    pool: Option<&'a Pool>,
    /// Called with the bytes taken so far.
    progress: RefCell<Box<dyn FnMut(u64) + 'a>>,
    taken_bytes: Cell<u64>,
}

impl<'a> WeightSource<'a> {
    /// Shapes without data.
    pub fn meta(spec: &'a ModelSpec, dtype: LoadDType, arena: &'a Arena) -> WeightSource<'a> {
        WeightSource::new(spec, dtype, arena, Origin::Meta, None)
    }

    /// A checkpoint whose names and shapes were found right ([`Checkpoint::check`]).
    pub fn checkpoint(
        spec: &'a ModelSpec,
        dtype: LoadDType,
        arena: &'a Arena,
        pool: &'a Pool,
        checkpoint: &'a Checkpoint,
    ) -> WeightSource<'a> {
        WeightSource::new(spec, dtype, arena, Origin::Checkpoint(checkpoint), Some(pool))
    }

    /// Random weights, the same that a checkpoint written with this seed would hold.
    pub fn random(
        spec: &'a ModelSpec,
        dtype: LoadDType,
        arena: &'a Arena,
        pool: &'a Pool,
        weights: &'a RandomWeights,
    ) -> WeightSource<'a> {
        WeightSource::new(spec, dtype, arena, Origin::Random(weights), Some(pool))
    }

    fn new(
        spec: &'a ModelSpec,
        dtype: LoadDType,
        arena: &'a Arena,
        origin: Origin<'a>,
        pool: Option<&'a Pool>,
    ) -> WeightSource<'a> {
        let progress = RefCell::new(Box::new(|_| ()) as Box<dyn FnMut(u64)>);
        let tensors = spec.tensors().into_iter().map(|tensor| (tensor.role, tensor)).collect();
        WeightSource { spec, tensors, dtype, arena, origin, pool, progress, taken_bytes: Cell::new(0) }
    }

    /// Calls `progress` with the bytes taken so far, after each tensor.
    pub fn on_progress(self, progress: impl FnMut(u64) + 'a) -> WeightSource<'a> {
        *self.progress.borrow_mut() = Box::new(progress);
        self
    }

    /// What the model is.
    pub fn spec(&self) -> &'a ModelSpec {
        self.spec
    }

    /// Whether there is no data.
    pub(crate) fn is_meta(&self) -> bool {
        matches!(self.origin, Origin::Meta)
    }

    /// Element type of activations.
    pub fn compute_dtype(&self) -> DType {
        self.plain_dtype().compute()
    }

    /// The type of matrices that are not FP8 blocks.
    fn plain_dtype(&self) -> DType {
        match (self.dtype, self.spec.dtype) {
            (LoadDType::Float32, _) | (LoadDType::Auto, DType::F32 | DType::F16) => DType::F32,
            _ => DType::BF16,
        }
    }

    /// The type that a matrix takes in memory: FP8 blocks stay as they are unless asked otherwise.
    fn matrix_dtype(&self, role: Role) -> DType {
        if self.tensors[&role].scale.is_some() && self.dtype == LoadDType::Auto {
            DType::F8E4M3
        } else {
            self.plain_dtype()
        }
    }

    fn shape_of(&self, role: Role) -> &[usize] {
        &self.tensors[&role].shape
    }

    /// One matrix `[sum of rows, cols]` of these stored ones, one below the other.
    pub(crate) fn matrix(&self, roles: &[Role]) -> Result<PackedMatrix, ModelError> {
        let rows = roles.iter().map(|&role| self.shape_of(role)[0]).sum();
        let cols = self.shape_of(roles[0])[1];
        let mut matrix = PackedMatrix::empty(self.arena, rows, cols, self.matrix_dtype(roles[0]))?;
        let mut row = 0;
        for &role in roles {
            self.take(role, |source, pool| matrix.pack_rows(pool, row, source))?;
            row += self.shape_of(role)[0];
        }
        Ok(matrix)
    }

    /// A row-major table, for looking rows up.
    pub(crate) fn table(&self, role: Role) -> Result<Tensor, ModelError> {
        let shape = self.shape_of(role);
        let mut table = Tensor::empty(self.arena, shape, self.plain_dtype())?;
        self.take(role, |source, _| {
            match table.dtype() {
                dtype if dtype == source.dtype => table.bytes_mut().copy_from_slice(source.bytes),
                DType::F32 => source.to_f32(table.f32_mut()),
                _ => {
                    let mut row_f32 = vec![0.0; source.cols];
                    for (row, out) in table.bf16_mut().chunks_mut(source.cols).enumerate() {
                        source.row_range(row..row + 1).to_f32(&mut row_f32);
                        out.iter_mut().zip(&row_f32).for_each(|(out, &x)| *out = bf16::from_f32(x));
                    }
                }
            }
            Ok(())
        })?;
        Ok(table)
    }

    /// F32 vectors, one behind the other.
    pub(crate) fn vector(&self, roles: &[Role]) -> Result<Tensor, ModelError> {
        let len: usize = roles.iter().map(|&role| self.shape_of(role)[0]).sum();
        let mut vector = Tensor::empty(self.arena, &[len], DType::F32)?;
        let mut start = 0;
        for &role in roles {
            let end = start + self.shape_of(role)[0];
            self.take(role, |source, _| {
                source.to_f32(&mut vector.f32_mut()[start..end]);
                Ok(())
            })?;
            start = end;
        }
        Ok(vector)
    }

    pub(crate) fn vector_if(&self, present: bool, roles: &[Role]) -> Result<Option<Tensor>, ModelError> {
        present.then(|| self.vector(roles)).transpose()
    }

    /// MLA's `kv_b_proj [H (Q + V), L]` as kernels want it: per head `W_UKᵀ [L, Q]` and `W_UV [V, L]`. FP8 blocks are
    /// dequantised: a transposed block would need its scale along the other axis, and these matrices are small.
    #[allow(clippy::type_complexity)]
    pub(crate) fn latent_heads(
        &self,
        layer: usize,
        spec: &Mla,
    ) -> Result<(Vec<PackedMatrix>, Vec<PackedMatrix>), ModelError> {
        let (rank, nope, value) = (spec.kv_lora_rank, spec.qk_nope_head_dim, spec.v_head_dim);
        let empty = |rows, cols| PackedMatrix::empty(self.arena, rows, cols, self.plain_dtype());
        let mut key_up = (0..spec.num_heads).map(|_| empty(rank, nope)).collect::<Result<Vec<_>, _>>()?;
        let mut value_up = (0..spec.num_heads).map(|_| empty(value, rank)).collect::<Result<Vec<_>, _>>()?;
        self.take(Role::KvB(layer), |source, pool| {
            let mut plain = vec![0.0; source.rows * source.cols];
            source.to_f32(&mut plain);
            let plain: Vec<u8> = plain.into_iter().flat_map(f32::to_le_bytes).collect();
            let plain = SourceMatrix::new(&plain, DType::F32, source.rows, source.cols);
            for (head, (key, value_matrix)) in key_up.iter_mut().zip(&mut value_up).enumerate() {
                let row = head * (nope + value);
                key.pack_rows(pool, 0, &plain.row_range(row..row + nope).transposed())?;
                value_matrix.pack_rows(pool, 0, &plain.row_range(row + nope..row + nope + value))?;
            }
            Ok(())
        })?;
        Ok((key_up, value_up))
    }

    /// Experts whose matrices are stored one by one.
    pub(crate) fn experts(
        &self,
        roles: &[&dyn Fn(Proj) -> Role],
        width: usize,
        activation: Activation,
    ) -> Result<ExpertWeights, ModelError> {
        let experts = roles
            .iter()
            .map(|role| {
                let mut expert = self.empty_expert(role(Proj::Up), width, activation)?;
                if activation == Activation::SwiGlu {
                    self.take(role(Proj::Gate), |source, pool| expert.pack_gate(pool, source))?;
                }
                self.take(role(Proj::Up), |source, pool| expert.pack_up(pool, source))?;
                self.take(role(Proj::Down), |source, pool| expert.pack_down(pool, source))?;
                Ok(expert)
            })
            .collect::<Result<_, ModelError>>()?;
        Ok(ExpertWeights { experts, activation })
    }

    fn empty_expert(&self, role: Role, width: usize, activation: Activation) -> Result<ExpertWeight, ModelError> {
        Ok(ExpertWeight::empty(self.arena, self.spec.hidden_size, width, self.matrix_dtype(role), activation)?)
    }

    /// A layer's routed experts, in the spelling of transformers 4 (one tensor a matrix) or 5 (all experts in one).
    pub(crate) fn routed_experts(&self, layer: usize, spec: &Moe) -> Result<ExpertWeights, ModelError> {
        let fused = |proj| self.spec.fused_expert_name(layer, proj);
        let (Origin::Checkpoint(checkpoint), true) = (self.origin, spec.activation == Activation::SwiGlu) else {
            return self.separate_experts(layer, spec);
        };
        if checkpoint.get(&fused(FusedProj::GateUp)).is_none() {
            return self.separate_experts(layer, spec);
        }
        let (width, hidden) = (spec.intermediate_size, self.spec.hidden_size);
        let up = |expert| Role::Expert { layer, expert, proj: Proj::Up };
        let mut experts = (0..spec.num_experts)
            .map(|expert| self.empty_expert(up(expert), width, spec.activation))
            .collect::<Result<Vec<_>, _>>()?;
        self.take_stored(checkpoint, &fused(FusedProj::GateUp), |source, pool| {
            for (e, expert) in experts.iter_mut().enumerate() {
                let row = e * 2 * width; // [E, 2F, D]
                expert.pack_gate(pool, &source.row_range(row..row + width))?;
                expert.pack_up(pool, &source.row_range(row + width..row + 2 * width))?;
            }
            Ok(())
        })?;
        self.take_stored(checkpoint, &fused(FusedProj::Down), |source, pool| {
            for (e, expert) in experts.iter_mut().enumerate() {
                expert.pack_down(pool, &source.row_range(e * hidden..(e + 1) * hidden))?; // [E, D, F]
            }
            Ok(())
        })?;
        Ok(ExpertWeights { experts, activation: spec.activation })
    }

    fn separate_experts(&self, layer: usize, spec: &Moe) -> Result<ExpertWeights, ModelError> {
        let roles: Vec<_> =
            (0..spec.num_experts).map(|expert| move |proj| Role::Expert { layer, expert, proj }).collect();
        let roles: Vec<&dyn Fn(Proj) -> Role> = roles.iter().map(|role| role as &dyn Fn(Proj) -> Role).collect();
        self.experts(&roles, spec.intermediate_size, spec.activation)
    }

    /// Hands the stored matrix to `pack`; does nothing on `Meta`.
    fn take(
        &self,
        role: Role,
        pack: impl FnOnce(&SourceMatrix, &Pool) -> Result<(), KernelError>,
    ) -> Result<(), ModelError> {
        let tensor = &self.tensors[&role];
        match self.origin {
            Origin::Meta => Ok(()),
            Origin::Random(weights) => {
                let dtype = self.plain_dtype();
                let bytes = weights.tensor(tensor, dtype);
                pack(&source_matrix(&bytes, dtype, &tensor.shape), self.pool())?;
                self.report(bytes.len());
                Ok(())
            }
            Origin::Checkpoint(checkpoint) => {
                self.take_stored(checkpoint, &checkpoint.name_of(self.spec, tensor), pack)
            }
        }
    }

    /// A stored tensor, checked to be finite; its pages are given back when it is packed.
    fn take_stored(
        &self,
        checkpoint: &Checkpoint,
        name: &str,
        pack: impl FnOnce(&SourceMatrix, &Pool) -> Result<(), KernelError>,
    ) -> Result<(), ModelError> {
        let stored = checkpoint.get(name).expect("checked: every tensor is there");
        self.check_finite(checkpoint, name, &stored)?;
        let matrix = source_matrix(stored.bytes, stored.dtype, stored.shape);
        if stored.dtype == DType::F8E4M3 {
            let scale_name = self.spec.scale_name(name);
            let scale = checkpoint.get(&scale_name).expect("checked: every FP8 tensor has scales");
            self.check_finite(checkpoint, &scale_name, &scale)?;
            let scales = match scale.dtype {
                DType::F8E8M0 => scale.bytes.iter().map(|&code| f32::exp2(f32::from(code) - 127.0)).collect(),
                _ => {
                    let mut scales = vec![0.0; scale.shape.iter().product()];
                    source_matrix(scale.bytes, scale.dtype, scale.shape).to_f32(&mut scales);
                    scales
                }
            };
            let block = self.spec.fp8_block.expect("checked: an FP8 tensor has blocks");
            pack(&matrix.with_scales(&scales, block), self.pool())?;
        } else {
            pack(&matrix, self.pool())?;
        }
        stored.release();
        self.report(stored.bytes.len());
        Ok(())
    }

    fn check_finite(&self, checkpoint: &Checkpoint, name: &str, stored: &StoredTensor) -> Result<(), ModelError> {
        match finite::first_non_finite(self.pool(), stored.bytes, stored.dtype) {
            None => Ok(()),
            Some(element) => {
                let what = format!("tensor '{name}': element {element} is not a finite number");
                Err(ModelError::file(checkpoint.file_of(name), what))
            }
        }
    }

    fn pool(&self) -> &Pool {
        self.pool.expect("only Meta has no threads")
    }

    fn report(&self, bytes: usize) {
        self.taken_bytes.set(self.taken_bytes.get() + bytes as u64);
        (self.progress.borrow_mut())(self.taken_bytes.get());
    }
}

/// Leading dims are rows.
fn source_matrix<'a>(bytes: &'a [u8], dtype: DType, shape: &[usize]) -> SourceMatrix<'a> {
    let (&cols, leading) = shape.split_last().expect("checked: a weight has dimensions");
    SourceMatrix::new(bytes, dtype, leading.iter().product(), cols)
}
