//! Weights from where they are to where kernels want them: one description of what each layer takes, read by a
//! checkpoint, by random weights and by `Meta`.
//!
//! A rank takes parts: some rows or columns of a stored tensor. Of a checkpoint it reads, checks and gives back the pages of
//! these only. Whole is the part that has everything, so one rank and many load through the same code.

mod experts;
mod matrices;
mod part;
#[cfg(test)]
mod tests;

use std::cell::{Cell, RefCell};
use std::collections::HashMap;

use moesaic_device::{Arena, Pool};
use moesaic_kernels::KernelError;
use moesaic_kernels::matrix::SourceMatrix;
use moesaic_spec::model::tensors::{Proj, Role, TensorSpec};
use moesaic_spec::{DType, ModelSpec};

use crate::checkpoint::{Checkpoint, RandomWeights};
use crate::{ModelError, finite};
pub(crate) use matrices::LatentHeads;
pub(crate) use part::{Cut, Part};

/// The type that matrices take in memory (`--dtype`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
pub enum LoadDType {
    /// As stored; F16 becomes F32, which holds it exactly.
    #[default]
    Auto,
    /// Everything in F32.
    Float32,
    /// Everything in BF16; FP8 blocks are dequantised.
    BFloat16,
}

impl LoadDType {
    /// The type of most weights of a checkpoint of type `stored`.
    pub fn weights(self, stored: DType) -> DType {
        match self {
            LoadDType::Float32 => DType::F32,
            LoadDType::BFloat16 => DType::BF16,
            LoadDType::Auto if stored == DType::F16 => DType::F32,
            LoadDType::Auto => stored,
        }
    }
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

    /// The type that routed experts of a layer take in memory.
    pub(crate) fn expert_dtype(&self, layer: usize) -> DType {
        let role = Role::Expert { layer, expert: 0, proj: Proj::Up };
        if self.tensors.contains_key(&role) { self.matrix_dtype(role) } else { self.plain_dtype() }
    }

    /// The type of matrices that are not FP8 blocks.
    fn plain_dtype(&self) -> DType {
        match (self.dtype, self.spec.dtype) {
            (LoadDType::Float32, _) | (LoadDType::Auto, DType::F32 | DType::F16) => DType::F32,
            _ => DType::BF16,
        }
    }

    /// The type that a whole matrix takes in memory: FP8 blocks stay as they are unless asked otherwise.
    fn matrix_dtype(&self, role: Role) -> DType {
        if self.tensors[&role].scale.is_some() && self.dtype == LoadDType::Auto {
            DType::F8E4M3
        } else {
            self.plain_dtype()
        }
    }

    /// Rows and columns of a stored tensor; a vector is one row.
    fn dims(&self, role: Role) -> (usize, usize) {
        match *self.tensors[&role].shape {
            [cols] => (1, cols),
            [rows, cols] => (rows, cols),
            ref shape => unreachable!("{role:?} {shape:?}: tensors with a role are vectors and matrices"),
        }
    }

    /// Hands these cuts of a stored tensor to `pack`, each with its index; does nothing on `Meta`.
    fn take(
        &self,
        role: Role,
        cuts: &[Cut],
        mut pack: impl FnMut(usize, &SourceMatrix, &Pool) -> Result<(), KernelError>,
    ) -> Result<(), ModelError> {
        let tensor = &self.tensors[&role];
        match self.origin {
            Origin::Meta => Ok(()),
            Origin::Random(weights) => {
                let dtype = self.plain_dtype();
                // All of it, so that a part has the values that it has in the whole.
                let bytes = weights.tensor(tensor, dtype);
                let whole = source_matrix(&bytes, dtype, &tensor.shape);
                for (idx, cut) in cuts.iter().enumerate() {
                    pack(idx, &cut.of(&whole), self.pool())?;
                    self.report(cut.num_elements() * dtype.size_bytes());
                }
                Ok(())
            }
            Origin::Checkpoint(checkpoint) => {
                self.take_stored(checkpoint, &checkpoint.name_of(self.spec, tensor), cuts, pack)
            }
        }
    }

    /// Cuts of a stored tensor, each checked to be finite; its pages are given back when it is packed.
    fn take_stored(
        &self,
        checkpoint: &Checkpoint,
        name: &str,
        cuts: &[Cut],
        mut pack: impl FnMut(usize, &SourceMatrix, &Pool) -> Result<(), KernelError>,
    ) -> Result<(), ModelError> {
        let stored = checkpoint.get(name).expect("checked: every tensor is there");
        let mut whole = source_matrix(stored.bytes, stored.dtype, stored.shape);
        let scales: Vec<f32>;
        if stored.dtype == DType::F8E4M3 {
            scales = self.scales(checkpoint, name)?;
            whole = whole.with_scales(&scales, self.spec.fp8_block.expect("checked: an FP8 tensor has blocks"));
        }
        let row_bytes = whole.cols * stored.dtype.size_bytes();
        for (idx, cut) in cuts.iter().enumerate() {
            let matrix = cut.of(&whole);
            self.check_finite(checkpoint, name, &matrix, |row, col| {
                (cut.rows.start + row) * whole.cols + cut.cols.start + col
            })?;
            pack(idx, &matrix, self.pool())?;
            stored.release(cut.rows.start * row_bytes..cut.rows.end * row_bytes);
            self.report(cut.num_elements() * stored.dtype.size_bytes());
        }
        Ok(())
    }

    /// The factors of the FP8 tensor `name`.
    fn scales(&self, checkpoint: &Checkpoint, name: &str) -> Result<Vec<f32>, ModelError> {
        let name = self.spec.scale_name(name);
        let stored = checkpoint.get(&name).expect("checked: every FP8 tensor has scales");
        let matrix = source_matrix(stored.bytes, stored.dtype, stored.shape);
        self.check_finite(checkpoint, &name, &matrix, |row, col| row * matrix.cols + col)?;
        Ok(match stored.dtype {
            DType::F8E8M0 => stored.bytes.iter().map(|&code| f32::exp2(f32::from(code) - 127.0)).collect(),
            _ => {
                let mut scales = vec![0.0; matrix.rows * matrix.cols];
                matrix.to_f32(&mut scales);
                scales
            }
        })
    }

    /// `element` turns a row and a column into the element of the whole tensor, for the message.
    fn check_finite(
        &self,
        checkpoint: &Checkpoint,
        name: &str,
        matrix: &SourceMatrix,
        element: impl Fn(usize, usize) -> usize,
    ) -> Result<(), ModelError> {
        match finite::first_non_finite(self.pool(), matrix) {
            None => Ok(()),
            Some((row, col)) => {
                let what = format!("tensor '{name}': element {} is not a finite number", element(row, col));
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
