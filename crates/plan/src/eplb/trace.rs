//! What routers chose: the file that placements are made from.

use serde::{Deserialize, Serialize};

use super::co_activation::{num_pairs, pair_idx};
use super::{CoActivation, PlaceError};
use crate::ExpertId;

/// Version of the file.
const VERSION: u32 = 1;
/// Greatest count: what every reader of JSON keeps exactly.
const MAX_COUNT: u64 = 1 << 53;

/// Counts of what the routers of a model chose. Traces of the same model can be added.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RoutingTrace {
    /// Version of the format; 1.
    pub version: u32,
    /// The model's name, for people.
    pub model: String,
    /// Routed experts of a layer.
    pub num_experts: usize,
    /// Experts that a token chooses in a layer.
    pub top_k: usize,
    /// By decoder layer; `null` where the layer has no router.
    pub layers: Vec<Option<LayerTrace>>,
}

/// Counts of one router.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerTrace {
    /// Tokens that passed.
    pub tokens: u64,
    /// Tokens that chose each expert. `[E]`
    pub counts: Vec<u64>,
    /// Tokens that chose both of two experts: `(0, 1), (0, 2), …, (1, 2), …`. `[E (E - 1) / 2]`
    pub pairs: Vec<u64>,
}

impl LayerTrace {
    fn new(num_experts: usize) -> Self {
        LayerTrace { tokens: 0, counts: vec![0; num_experts], pairs: vec![0; num_pairs(num_experts)] }
    }

    /// The pairs as a matrix.
    pub fn co_activation(&self) -> CoActivation<'_> {
        CoActivation::new(self.counts.len(), &self.pairs)
    }
}

impl RoutingTrace {
    /// Nothing counted yet; `routed` says of each decoder layer whether it has a router.
    pub fn new(model: &str, num_experts: usize, top_k: usize, routed: &[bool]) -> Self {
        assert!(top_k >= 1 && top_k <= num_experts, "top_k {top_k} of {num_experts} experts");
        let layers = routed.iter().map(|&routed| routed.then(|| LayerTrace::new(num_experts))).collect();
        RoutingTrace { version: VERSION, model: model.into(), num_experts, top_k, layers }
    }

    /// Counts one token of a layer with a router, and the `top_k` different experts that it chose.
    pub fn record(&mut self, layer: usize, chosen: &[ExpertId]) {
        assert_eq!(chosen.len(), self.top_k, "experts that a token of layer {layer} chose");
        let counted = self.layers[layer].as_mut().expect("a layer with a router");
        counted.tokens += 1;
        for (idx, expert) in chosen.iter().enumerate() {
            counted.counts[expert.idx()] += 1;
            for other in &chosen[..idx] {
                assert_ne!(expert, other, "a token of layer {layer} chose an expert twice");
                counted.pairs[pair_idx(self.num_experts, expert.idx(), other.idx())] += 1;
            }
        }
    }

    /// Adds what another trace of the same model counted.
    ///
    /// # Errors
    /// [`PlaceError::Trace`] if it is of another shape, or the sum is beyond what the file can say.
    pub fn add(&mut self, other: &RoutingTrace) -> Result<(), PlaceError> {
        let differs = |field: &str, value: String, own: String| PlaceError::Trace {
            field: field.into(),
            value,
            right: format!("it must be {own}, as in the trace that it is added to"),
        };
        for (field, value, own) in [
            ("num_experts", other.num_experts, self.num_experts),
            ("top_k", other.top_k, self.top_k),
            ("the number of layers", other.layers.len(), self.layers.len()),
        ] {
            if value != own {
                return Err(differs(field, value.to_string(), own.to_string()));
            }
        }
        let name = |layer: &Option<LayerTrace>| if layer.is_some() { "counts" } else { "null" };
        for (layer, (own, other)) in self.layers.iter().zip(&other.layers).enumerate() {
            if own.is_some() != other.is_some() {
                return Err(differs(&format!("layer {layer}"), name(other).into(), name(own).into()));
            }
            let tokens = |layer: &Option<LayerTrace>| layer.as_ref().map_or(0, |layer| layer.tokens);
            if tokens(own) + tokens(other) > MAX_COUNT {
                let value = (tokens(own) + tokens(other)).to_string();
                let right = format!("it must be at most {MAX_COUNT}, so that every reader keeps it exactly");
                return Err(PlaceError::Trace { field: format!("tokens of layer {layer}"), value, right });
            }
        }
        for (own, other) in self.layers.iter_mut().zip(&other.layers) {
            if let (Some(own), Some(other)) = (own, other) {
                own.tokens += other.tokens;
                own.counts.iter_mut().zip(&other.counts).for_each(|(own, n)| *own += n);
                own.pairs.iter_mut().zip(&other.pairs).for_each(|(own, n)| *own += n);
            }
        }
        Ok(())
    }

    /// As a file.
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("numbers and strings are always JSON")
    }

    /// From a file that anybody may have written.
    ///
    /// # Errors
    /// [`PlaceError::Json`] for what is no trace, [`PlaceError::Trace`] for numbers that do not belong together.
    pub fn from_json(text: &str) -> Result<Self, PlaceError> {
        let trace: RoutingTrace = serde_json::from_str(text).map_err(|fault| PlaceError::Json(fault.to_string()))?;
        trace.check()?;
        Ok(trace)
    }

    fn check(&self) -> Result<(), PlaceError> {
        let wrong =
            |field: &str, value: String, right: String| Err(PlaceError::Trace { field: field.into(), value, right });
        if self.version != VERSION {
            return wrong("version", self.version.to_string(), format!("it must be {VERSION}"));
        }
        if self.num_experts == 0 {
            return wrong("num_experts", "0".into(), "it must be at least 1".into());
        }
        if self.top_k == 0 || self.top_k > self.num_experts {
            let right = format!("it must be from 1 to num_experts ({})", self.num_experts);
            return wrong("top_k", self.top_k.to_string(), right);
        }
        for (layer, counted) in self.layers.iter().enumerate() {
            if let Some(counted) = counted {
                self.check_layer(layer, counted)?;
            }
        }
        Ok(())
    }

    fn check_layer(&self, layer: usize, counted: &LayerTrace) -> Result<(), PlaceError> {
        let LayerTrace { tokens, counts, pairs } = counted;
        let wrong = |field: String, value: String, right: String| {
            Err(PlaceError::Trace { field: format!("{field} of layer {layer}"), value, right })
        };
        // The file's own size bounds the lists; `num_experts` alone must not overflow a product.
        if counts.len() != self.num_experts {
            let right = format!("there must be one for each of the {} experts", self.num_experts);
            return wrong("the number of counts".into(), counts.len().to_string(), right);
        }
        let wanted = num_pairs(counts.len());
        if pairs.len() != wanted {
            let right = format!("{} experts have {wanted}", self.num_experts);
            return wrong("the number of pairs".into(), pairs.len().to_string(), right);
        }
        if *tokens > MAX_COUNT {
            let right = format!("it must be at most {MAX_COUNT}, so that every reader keeps it exactly");
            return wrong("tokens".into(), tokens.to_string(), right);
        }
        if let Some((expert, count)) = counts.iter().enumerate().find(|(_, count)| *count > tokens) {
            let right = format!("it must be at most the {tokens} tokens");
            return wrong(format!("the count of expert {expert}"), count.to_string(), right);
        }
        let sum: u128 = counts.iter().map(|&n| u128::from(n)).sum();
        let right_sum = u128::from(*tokens) * self.top_k as u128;
        if sum != right_sum {
            let right = format!("{tokens} tokens that choose {} each make {right_sum}", self.top_k);
            return wrong("the sum of counts".into(), sum.to_string(), right);
        }
        let of = |a: usize, b: usize| pairs[pair_idx(counts.len(), a, b)];
        for a in 0..counts.len() {
            // A token that chose `a` chose `top_k - 1` others.
            let met: u128 = (0..counts.len()).filter(|&b| b != a).map(|b| u128::from(of(a, b))).sum();
            let right = u128::from(counts[a]) * (self.top_k as u128 - 1);
            if met != right {
                let sentence = format!("{} tokens that choose {} others each make {right}", counts[a], self.top_k - 1);
                return wrong(format!("the sum of pairs with expert {a}"), met.to_string(), sentence);
            }
        }
        Ok(())
    }
}
