//! Which types a model's weights and its cache are held in.

use moesaic_spec::{DType, ModelSpec, WeightFormat, WeightFormats};
use serde::{Deserialize, Serialize};

use super::parts::Part;
use crate::cost::Precision;

/// Types that weights and cache are held in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Formats {
    /// Weights of attention, dense MLPs and shared experts.
    pub dense: Precision,
    /// Weights of routed experts.
    pub experts: Precision,
    /// Keys and values.
    pub kv: Precision,
}

impl Formats {
    /// As the checkpoint stores them; keys and values in 16 bits.
    pub fn of(model: &ModelSpec) -> Formats {
        let WeightFormats { dense, experts } = model.formats();
        Formats { dense: precision(dense), experts: precision(experts), kv: Precision::Bf16 }
    }

    /// The same in our own engine: keys and values are in the type that it computes in.
    pub fn of_engine(model: &ModelSpec) -> Formats {
        let kv = if model.dtype.compute() == DType::F32 { Precision::F32 } else { Precision::Bf16 };
        Formats { kv, ..Formats::of(model) }
    }

    /// Type of a part's weights. Routers and heads are never quantised.
    pub(crate) fn of_part(self, part: Part) -> Precision {
        match part {
            Part::Route | Part::Head if self.dense != Precision::F32 => Precision::Bf16,
            Part::Experts => self.experts,
            _ => self.dense,
        }
    }
}

fn precision(format: WeightFormat) -> Precision {
    match format {
        WeightFormat::F32 => Precision::F32,
        WeightFormat::Bf16 => Precision::Bf16,
        WeightFormat::Fp8 => Precision::Fp8,
        WeightFormat::Fp8Block => Precision::Fp8Block,
        WeightFormat::Mxfp4 | WeightFormat::Nvfp4 => Precision::F4,
        WeightFormat::Int4 => Precision::Int4,
    }
}
