//! Random checkpoints: any model in any size, without a download.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs;
#[cfg(unix)]
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use half::{bf16, f16};
use moesaic_spec::model::tensors::{DTypeClass, Role, TensorSpec};
use moesaic_spec::{DType, ModelSpec};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use safetensors::tensor::{Dtype, View};

use super::{INDEX, SINGLE};
use crate::ModelError;

/// Seeded random weights. A tensor depends on the seed and its own name only, so it is the same in any file layout.
///
/// Matrices are uniform with variance `1 / columns`, which keeps activations of order one through the layers; norm weights
/// are near one and biases near zero.
#[derive(Clone, Copy, Debug)]
pub struct RandomWeights {
    /// Same seed, same weights.
    pub seed: u64,
}

impl RandomWeights {
    /// The elements of one tensor in `dtype`, little endian.
    pub fn tensor(&self, tensor: &TensorSpec, dtype: DType) -> Vec<u8> {
        let num_elements: usize = tensor.shape.iter().product();
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed ^ fnv1a(tensor.name.as_bytes()));
        let mut random = vec![0u8; num_elements * 2];
        rng.fill_bytes(&mut random);
        let pairs = random.as_chunks::<2>().0.iter();
        let (centre, half_width) = distribution(tensor);
        let values = pairs.clone().map(|&pair| {
            let unit = (f32::from(u16::from_le_bytes(pair)) + 0.5) * (2.0 / 65536.0) - 1.0;
            centre + half_width * unit
        });
        match dtype {
            DType::F32 => values.flat_map(f32::to_le_bytes).collect(),
            DType::BF16 => values.flat_map(|v| bf16::from_f32(v).to_le_bytes()).collect(),
            DType::F16 => values.flat_map(|v| f16::from_f32(v).to_le_bytes()).collect(),
            // Codes are drawn instead of values: sign and magnitude up to 0x77 (240), uniform over codes; the scale makes
            // the variance right.
            DType::F8E4M3 => pairs.map(|&[low, high]| (low & 0x80) | (high % 0x78)).collect(),
            DType::I64 | DType::I32 | DType::U8 | DType::F8E8M0 => unreachable!("weights are floating-point"),
        }
    }

    /// The block scales of an FP8 tensor, all one value: its codes get the variance `1 / columns`.
    fn scales(tensor: &TensorSpec) -> Vec<u8> {
        // Root mean square of the codes 0x00..=0x77: subnormals m/8 * 2^-6, normals (1 + m/8) * 2^(e - 7).
        let mean_square: f32 = (0..0x78u32)
            .map(|code| {
                let (exponent, mantissa) = (code >> 3, (code & 7) as f32 / 8.0);
                let value =
                    if exponent == 0 { mantissa / 64.0 } else { (1.0 + mantissa) * 2f32.powi(exponent as i32 - 7) };
                value * value / 120.0
            })
            .sum();
        let columns = tensor.shape[tensor.shape.len() - 1] as f32;
        let scale = (1.0 / (columns * mean_square)).sqrt();
        let num_blocks = tensor.scale.as_ref().map_or(0, |scale| scale.shape.iter().product());
        scale.to_le_bytes().repeat(num_blocks)
    }
}

/// Centre and half width of the uniform distribution of a tensor's elements.
fn distribution(tensor: &TensorSpec) -> (f32, f32) {
    match (tensor.role, tensor.dtype_class) {
        (Role::QBias(_) | Role::KBias(_) | Role::VBias(_) | Role::OBias(_), _) | (_, DTypeClass::RouterBias) => {
            (0.0, 0.05)
        }
        (_, DTypeClass::Norm) => (1.0, 0.1),
        // The variance of a uniform distribution is half_width² / 3. A row of the embedding is looked up, not summed over.
        (Role::Embed, _) => (0.0, 3f32.sqrt()),
        _ => (0.0, (3.0 / tensor.shape[tensor.shape.len() - 1] as f32).sqrt()),
    }
}

/// FNV-1a: stable across versions and machines, which `std`'s hasher does not promise.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &b| (hash ^ u64::from(b)).wrapping_mul(0x0000_0100_0000_01b3))
}

/// One tensor as the writer asks for it: its bytes are made when they are written, so a checkpoint of any size needs the
/// memory of its largest tensor only.
struct Lazy<'a> {
    weights: RandomWeights,
    tensor: &'a TensorSpec,
    shape: &'a [usize],
    dtype: DType,
    is_scale: bool,
}

impl View for Lazy<'_> {
    fn dtype(&self) -> Dtype {
        match self.dtype {
            DType::F32 => Dtype::F32,
            DType::BF16 => Dtype::BF16,
            DType::F16 => Dtype::F16,
            DType::F8E4M3 => Dtype::F8_E4M3,
            other => unreachable!("no weight is written as {other}"),
        }
    }
    fn shape(&self) -> &[usize] {
        self.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Owned(match self.is_scale {
            true => RandomWeights::scales(self.tensor),
            false => self.weights.tensor(self.tensor, self.dtype),
        })
    }
    fn data_len(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.size_bytes()
    }
}

/// Writes `config.json` and random weights into `folder`, in files of about `shard_bytes` at most (one file if they fit).
/// The folder must be new or empty. Returns the bytes written; `progress` is told them file by file.
pub fn write_random(
    folder: &Path,
    spec: &ModelSpec,
    weights: RandomWeights,
    shard_bytes: u64,
    mut progress: impl FnMut(u64),
) -> Result<u64, ModelError> {
    spec.require_runnable()?;
    let failed = |path: &Path, e: std::io::Error| ModelError::file(path, e.to_string());
    fs::create_dir_all(folder).map_err(|e| failed(folder, e))?;
    if fs::read_dir(folder).map_err(|e| failed(folder, e))?.next().is_some() {
        return Err(ModelError::file(folder, "is not empty; a new or empty folder is right"));
    }
    let tensors = spec.tensors();
    let mut views: Vec<(String, Lazy)> = Vec::new();
    for tensor in &tensors {
        let dtype = spec.dtype_of(tensor.dtype_class);
        views.push((tensor.name.clone(), Lazy { weights, tensor, shape: &tensor.shape, dtype, is_scale: false }));
        if let Some(scale) = &tensor.scale {
            let view = Lazy { weights, tensor, shape: &scale.shape, dtype: DType::F32, is_scale: true };
            views.push((scale.name.clone(), view));
        }
    }
    let total: u64 = views.iter().map(|(_, view)| view.data_len() as u64).sum();

    let mut shards: Vec<Vec<(String, Lazy)>> = vec![Vec::new()];
    let mut shard_len = 0;
    for (name, view) in views {
        let len = view.data_len() as u64;
        if shard_len > 0 && shard_len + len > shard_bytes {
            shards.push(Vec::new());
            shard_len = 0;
        }
        shard_len += len;
        shards.last_mut().expect("there is a shard").push((name, view));
    }

    let num_shards = shards.len();
    let mut weight_map = BTreeMap::new();
    let mut written = 0;
    for (i, shard) in shards.into_iter().enumerate() {
        let file = match num_shards {
            1 => SINGLE.to_string(),
            _ => format!("model-{:05}-of-{num_shards:05}.safetensors", i + 1),
        };
        written += shard.iter().map(|(_, view)| view.data_len() as u64).sum::<u64>();
        weight_map.extend(shard.iter().map(|(name, _)| (name.clone(), file.clone())));
        let path = folder.join(&file);
        let metadata = [("format".to_string(), "pt".to_string())].into();
        safetensors::serialize_to_file(shard, Some(metadata), &path)
            .map_err(|e| ModelError::file(&path, e.to_string()))?;
        // The writer makes a private temporary file and renames it; a checkpoint is as readable as its config.
        #[cfg(unix)]
        fs::set_permissions(&path, PermissionsExt::from_mode(0o644)).map_err(|e| failed(&path, e))?;
        progress(written);
    }
    if num_shards > 1 {
        let index = serde_json::json!({ "metadata": { "total_size": total }, "weight_map": weight_map });
        let path = folder.join(INDEX);
        fs::write(&path, format!("{index:#}\n")).map_err(|e| failed(&path, e))?;
    }
    let path = folder.join("config.json");
    fs::write(&path, spec.to_config_json()).map_err(|e| failed(&path, e))?;
    Ok(total)
}
