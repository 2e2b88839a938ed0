//! Whether a checkpoint is the model that its config describes.

use std::collections::HashSet;

use moesaic_spec::model::tensors::{DTypeClass, FusedProj, Proj, Role, TensorSpec};
use moesaic_spec::{DType, ModelSpec};

use super::Checkpoint;
use crate::ModelError;

/// Element types that matrices and vectors may have on disk.
const FLOATS: [DType; 3] = [DType::BF16, DType::F16, DType::F32];

impl Checkpoint {
    /// Every tensor of the model is there once, with its shape and a type that can be read, and nothing else is there.
    pub fn check(&self, spec: &ModelSpec) -> Result<(), ModelError> {
        let mut expected: HashSet<String> = HashSet::new();
        for tensor in spec.tensors() {
            if let Role::Expert { layer, expert, proj } = tensor.role {
                let fused_proj = if proj == Proj::Down { FusedProj::Down } else { FusedProj::GateUp };
                let fused = spec.fused_expert_name(layer, fused_proj);
                if self.tensors.contains_key(&fused) {
                    if expert == 0 {
                        let shape = spec.fused_expert_shape(layer, fused_proj).expect("the layer has experts");
                        self.check_tensor(&fused, &shape, &FLOATS)?;
                        expected.insert(fused);
                    }
                    continue;
                }
            }
            let name = self.name_of(spec, &tensor);
            self.check_tensor(&name, &tensor.shape, allowed(&tensor))?;
            let stored = &self.tensors[&name];
            if stored.dtype == DType::F8E4M3 {
                let scale = tensor.scale.as_ref().expect("only tensors with scales may be FP8");
                let scale_name = spec.scale_name(&name);
                self.check_tensor(&scale_name, &scale.shape, &[DType::F32, DType::BF16, DType::F8E8M0])?;
                expected.insert(scale_name);
            }
            expected.insert(name);
        }
        match self.names().find(|&name| !expected.contains(name) && !spec.is_ignorable(name)) {
            None => Ok(()),
            Some(extra) => Err(ModelError::file(
                self.file_of(extra),
                format!("holds tensor '{extra}', which a {} of this config does not have", spec.family.model_type()),
            )),
        }
    }

    /// The name under which the tensor is stored: its own, or the alias that some versions wrote.
    pub(crate) fn name_of(&self, spec: &ModelSpec, tensor: &TensorSpec) -> String {
        let alias = spec.alias_of(tensor.role).filter(|alias| self.tensors.contains_key(alias));
        alias.unwrap_or_else(|| tensor.name.clone())
    }

    fn check_tensor(&self, name: &str, shape: &[usize], dtypes: &[DType]) -> Result<(), ModelError> {
        let Some(stored) = self.tensors.get(name) else {
            return Err(ModelError::file(&self.folder, format!("tensor '{name}' {shape:?} is missing")));
        };
        let wrong = |what: String| Err(ModelError::file(self.file_of(name), format!("tensor '{name}' {what}")));
        if stored.shape != shape {
            return wrong(format!("has shape {:?}; the config asks for {shape:?}", stored.shape));
        }
        if !dtypes.contains(&stored.dtype) {
            let right: Vec<String> = dtypes.iter().map(DType::to_string).collect();
            return wrong(format!("is {}; {} is right", stored.dtype, right.join(" or ")));
        }
        Ok(())
    }
}

fn allowed(tensor: &TensorSpec) -> &'static [DType] {
    const WITH_FP8: [DType; 4] = [DType::BF16, DType::F16, DType::F32, DType::F8E4M3];
    match tensor.dtype_class {
        DTypeClass::Matrix if tensor.scale.is_some() => &WITH_FP8,
        _ => &FLOATS,
    }
}
