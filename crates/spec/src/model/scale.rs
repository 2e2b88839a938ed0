//! Small models with the shape of large ones.

use super::common::limits;
use super::{Attention, Ffn, Gqa, Mla, ModelSpec, Moe};
use crate::SpecError;

/// Sizes to replace; what is left out follows: widths shrink with the hidden size, heads shrink in width to 16 and then
/// in number, key/value heads keep their share of them, groups shrink to what the experts allow and top-k to half of
/// the experts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Scale {
    /// Decoder layers. A dense start is kept, but at most half of them.
    pub layers: Option<usize>,
    /// Width of the residual stream.
    pub hidden: Option<usize>,
    /// Query heads.
    pub heads: Option<usize>,
    /// Key/value heads; MLA has none.
    pub kv_heads: Option<usize>,
    /// Width of a head; for MLA of its value and of its position-free query/key part.
    pub head_dim: Option<usize>,
    /// Routed experts of a layer.
    pub experts: Option<usize>,
    /// Experts that a token goes to.
    pub top_k: Option<usize>,
    /// Hidden width of one expert; dense MLPs and shared experts shrink alike.
    pub intermediate: Option<usize>,
    /// Rows of the embedding.
    pub vocab: Option<usize>,
    /// Longest context, tokens.
    pub max_position_embeddings: Option<usize>,
}

/// A share that widths are multiplied by.
#[derive(Clone, Copy)]
struct Ratio {
    to: usize,
    from: usize,
}

impl Ratio {
    /// `size * to / from`, as a multiple of `multiple` and at least `min`. Sizes that do not change stay as they are.
    fn of(self, size: usize, multiple: usize, min: usize) -> usize {
        if self.to == self.from {
            return size;
        }
        let exact = (size as u128 * self.to as u128 / self.from as u128) as usize;
        (exact / multiple * multiple).max(min)
    }
}

impl ModelSpec {
    /// The same family with other sizes; multi-token-prediction layers are left out.
    ///
    /// # Errors
    /// [`SpecError`] when a size is out of range or does not fit the others, or the model can only be planned.
    pub fn scaled(&self, scale: &Scale) -> Result<ModelSpec, SpecError> {
        scale.check()?;
        self.require_runnable()?;
        let hidden = Ratio { to: scale.hidden.unwrap_or(self.hidden_size), from: self.hidden_size };
        let moe = self.layers.iter().find_map(Ffn::as_moe);
        let dense = self.layers.iter().find_map(Ffn::as_dense);
        let widest = moe.map(|moe| moe.intermediate_size).or(dense.map(|mlp| mlp.intermediate_size));
        let mlp = match (scale.intermediate, widest) {
            (Some(to), Some(from)) => Ratio { to, from },
            _ => hidden,
        };
        let mut layers = self.scaled_layers(scale.layers.unwrap_or(self.layers.len()));
        for ffn in &mut layers {
            match ffn {
                Ffn::Dense(dense) => dense.intermediate_size = mlp.of(dense.intermediate_size, 8, 8),
                Ffn::Moe(moe) => scale_moe(moe, scale, mlp)?,
            }
        }
        let attention = match &self.attention {
            Attention::Gqa(gqa) => Attention::Gqa(scale_gqa(gqa, scale, hidden, self.derives_head_dim())?),
            Attention::Mla(mla) => Attention::Mla(scale_mla(mla, scale, hidden)?),
        };
        let scaled = ModelSpec {
            vocab_size: scale.vocab.unwrap_or(self.vocab_size),
            hidden_size: hidden.to,
            max_position_embeddings: scale.max_position_embeddings.unwrap_or(self.max_position_embeddings),
            attention,
            layers,
            num_mtp_layers: 0,
            ..self.clone()
        };
        // The reader of descriptions is the one place that knows what fits together.
        let read = ModelSpec::from_config_json(&scaled.to_config_json(), "the scaled model")?;
        assert_eq!(read, scaled, "a description must read back as it was written");
        Ok(scaled)
    }

    /// Whether the width of a head is not free, but hidden size over heads.
    fn derives_head_dim(&self) -> bool {
        self.family == super::Family::Olmoe
    }

    /// So many layers with the same pattern of dense and MoE: a dense start of at most half of them, then MoE.
    fn scaled_layers(&self, num_layers: usize) -> Vec<Ffn> {
        if num_layers == self.layers.len() {
            return self.layers.clone();
        }
        let start = self.layers.iter().take_while(|ffn| ffn.as_dense().is_some()).count();
        let (start, rest) = self.layers.split_at(start);
        if rest.is_empty() {
            return vec![start[0].clone(); num_layers];
        }
        // A mixed pattern (`decoder_sparse_step`, `moe_layer_freq`) stays itself from its beginning.
        let mixed = rest.iter().any(|ffn| ffn.as_dense().is_some());
        if mixed && (start.len() + 1..=self.layers.len()).contains(&num_layers) {
            return self.layers[..num_layers].to_vec();
        }
        let num_dense = start.len().min(num_layers / 2);
        let moe = rest.iter().filter(|ffn| ffn.as_moe().is_some()).cycle();
        start.iter().take(num_dense).chain(moe.take(num_layers - num_dense)).cloned().collect()
    }
}

impl Scale {
    /// Ranges, before anything is multiplied.
    fn check(&self) -> Result<(), SpecError> {
        for (what, size, range) in [
            ("layers", self.layers, limits::LAYERS),
            ("hidden", self.hidden, limits::WIDTH),
            ("heads", self.heads, limits::HEADS),
            ("kv_heads", self.kv_heads, limits::HEADS),
            ("head_dim", self.head_dim, limits::HEAD_DIM),
            ("experts", self.experts, limits::EXPERTS),
            ("top_k", self.top_k, limits::EXPERTS),
            ("intermediate", self.intermediate, limits::INTERMEDIATE),
            ("vocab", self.vocab, limits::VOCAB),
            ("max_position_embeddings", self.max_position_embeddings, limits::CONTEXT),
        ] {
            if let Some(size) = size.filter(|size| !range.contains(size)) {
                return Err(refuse(what, size, format!("a whole number from {} to {}", range.start(), range.end())));
            }
        }
        Ok(())
    }
}

fn refuse(what: &str, got: usize, expected: String) -> SpecError {
    SpecError::Scale { what: what.to_owned(), got: got.to_string(), expected }
}

fn scale_gqa(gqa: &Gqa, scale: &Scale, hidden: Ratio, derived_head_dim: bool) -> Result<Gqa, SpecError> {
    let num_heads = scale.heads.unwrap_or_else(|| fewer_heads(gqa.num_heads, gqa.head_dim, hidden, derived_head_dim));
    let num_kv_heads = scale.kv_heads.unwrap_or_else(|| {
        // The same share, rounded down to a divisor.
        let share = (gqa.num_kv_heads * num_heads / gqa.num_heads).max(1);
        (1..=share).rev().find(|kv| num_heads.is_multiple_of(*kv)).expect("1 divides everything")
    });
    if !num_heads.is_multiple_of(num_kv_heads) {
        return Err(refuse("kv_heads", num_kv_heads, format!("a divisor of the {num_heads} heads")));
    }
    let head_dim = if derived_head_dim {
        if !hidden.to.is_multiple_of(2 * num_heads) {
            let expected = format!("a multiple of {}, twice the heads of this family", 2 * num_heads);
            return Err(refuse("hidden", hidden.to, expected));
        }
        hidden.to / num_heads
    } else {
        scale.head_dim.unwrap_or_else(|| head_width(gqa.head_dim, hidden, gqa.num_heads, num_heads))
    };
    Ok(Gqa { num_heads, num_kv_heads, head_dim, ..gqa.clone() })
}

/// The most heads, dividing the old number, that can be 16 wide while all together keep their proportion to the hidden
/// size; at least one. `derived_head_dim`: they also divide the hidden size into even parts, if any number does.
fn fewer_heads(num_heads: usize, head_dim: usize, hidden: Ratio, derived_head_dim: bool) -> usize {
    let most = match hidden.of(num_heads * head_dim, 1, 1) {
        same if same == num_heads * head_dim => num_heads,
        all_heads => (all_heads / 16).clamp(1, num_heads),
    };
    let fits =
        |heads: &usize| num_heads.is_multiple_of(*heads) && (!derived_head_dim || hidden.to.is_multiple_of(2 * heads));
    (1..=most).rev().find(fits).unwrap_or(1)
}

/// A head's width where all heads together keep their proportion to the hidden size.
fn head_width(head_dim: usize, hidden: Ratio, heads_from: usize, heads_to: usize) -> usize {
    Ratio { to: hidden.to * heads_from, from: hidden.from * heads_to }.of(head_dim, 2, 8).min(*limits::HEAD_DIM.end())
}

fn scale_mla(mla: &Mla, scale: &Scale, hidden: Ratio) -> Result<Mla, SpecError> {
    let num_heads = scale.heads.unwrap_or_else(|| fewer_heads(mla.num_heads, mla.v_head_dim, hidden, false));
    if let Some(kv_heads) = scale.kv_heads.filter(|kv_heads| *kv_heads != num_heads) {
        return Err(refuse("kv_heads", kv_heads, "left out, because latent attention has none".to_owned()));
    }
    let width = |head_dim| head_width(head_dim, hidden, mla.num_heads, num_heads);
    Ok(Mla {
        num_heads,
        q_lora_rank: mla.q_lora_rank.map(|rank| hidden.of(rank, 8, 16)),
        kv_lora_rank: hidden.of(mla.kv_lora_rank, 8, 16),
        qk_nope_head_dim: scale.head_dim.unwrap_or_else(|| width(mla.qk_nope_head_dim)),
        qk_rope_head_dim: width(mla.qk_rope_head_dim),
        v_head_dim: scale.head_dim.unwrap_or_else(|| width(mla.v_head_dim)),
    })
}

fn scale_moe(moe: &mut Moe, scale: &Scale, mlp: Ratio) -> Result<(), SpecError> {
    let num_shared = moe.shared_intermediate_size / moe.intermediate_size;
    moe.intermediate_size = mlp.of(moe.intermediate_size, 8, 8);
    if let Some(intermediate) = scale.intermediate {
        moe.intermediate_size = intermediate;
    }
    moe.shared_intermediate_size = num_shared * moe.intermediate_size;
    if let Some(experts) = scale.experts {
        moe.num_experts = experts;
        let router = &mut moe.router;
        let groups = (1..=router.n_group).rev().find(|g| experts.is_multiple_of(*g) && (*g == 1 || experts / g >= 2));
        let groups = groups.expect("1 divides everything");
        router.topk_group = (router.topk_group * groups).div_ceil(router.n_group).clamp(1, groups);
        router.n_group = groups;
    }
    let choosable = moe.num_experts / moe.router.n_group * moe.router.topk_group;
    moe.top_k = scale.top_k.unwrap_or_else(|| match scale.experts {
        // At most half, so that there is still something to choose.
        Some(experts) => moe.top_k.min(choosable).min(experts.div_ceil(2)),
        None => moe.top_k,
    });
    if moe.top_k > choosable {
        let what = format!("at most {choosable}, the experts that a token may choose from");
        return Err(refuse("top_k", moe.top_k, what));
    }
    Ok(())
}
