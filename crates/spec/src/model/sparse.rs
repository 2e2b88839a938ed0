//! `deepseek_v32` and `glm_moe_dsa`: `deepseek_v3` whose attention only looks at the tokens that an indexer chooses.

use serde_json::{Map, Value, json};

use super::common::limits;
use super::planning::{Indexer, LayerAttention, PlanningOnly};
use super::{Family, ModelSpec, deepseek_v3};
use crate::SpecError;
use crate::fields::Fields;

pub(crate) fn read(f: &Fields, family: Family) -> Result<ModelSpec, SpecError> {
    let spec = deepseek_v3::read(f)?;
    let indexer = Indexer {
        top_k: f.size("index_topk", None, limits::CONTEXT)?,
        num_heads: f.size("index_n_heads", None, limits::HEADS)?,
        head_dim: f.size("index_head_dim", None, limits::HEAD_DIM)?,
    };
    let planning = PlanningOnly {
        reason: "sparse attention, whose indexer chooses the tokens that are looked at".to_owned(),
        attention: vec![LayerAttention::Sparse(indexer); spec.layers.len()],
        output_gate: false,
        formats: spec.formats(),
    };
    Ok(ModelSpec { family, planning_only: Some(planning), ..spec })
}

pub(crate) fn write(spec: &ModelSpec) -> Map<String, Value> {
    let mut map = deepseek_v3::write(spec);
    map.remove("architectures");
    map.insert("model_type".into(), json!(spec.family.model_type()));
    let LayerAttention::Sparse(Indexer { top_k, num_heads, head_dim }) = spec.layer_attention(0) else {
        panic!("{:?} has an indexer", spec.family)
    };
    map.insert("index_topk".into(), json!(top_k));
    map.insert("index_n_heads".into(), json!(num_heads));
    map.insert("index_head_dim".into(), json!(head_dim));
    map
}
