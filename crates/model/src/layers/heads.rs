//! Attention heads spread over ranks: which key/value heads belong to some query heads.
//!
//! A key/value head of the model serves `ratio = H / G` neighbouring query heads. A rank whose query heads do not begin and
//! end at such a group holds copies of key/value heads, so that all of its key/value heads serve equally many of its query
//! heads, as every kernel expects: with `r = gcd(ratio, start, len)`, its key/value head `i` serves the query heads
//! `start + i r ..` and is a copy of the model's `(start + i r) / ratio`.

use std::ops::Range;

use moesaic_spec::{Attention, Gqa, Mla};

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// Query heads that each key/value head of a rank serves.
fn local_ratio(spec: &Gqa, heads: &Range<usize>) -> usize {
    assert!(!heads.is_empty() && heads.end <= spec.num_heads, "heads {heads:?} of {}", spec.num_heads);
    gcd(gcd(spec.num_heads / spec.num_kv_heads, heads.start), heads.len())
}

/// Attention over the query heads `heads` of the model: what one rank computes, and the shape of its cache.
pub fn kv_heads_of(spec: &Gqa, heads: Range<usize>) -> Gqa {
    let num_kv_heads = heads.len() / local_ratio(spec, &heads);
    Gqa { num_heads: heads.len(), num_kv_heads, ..spec.clone() }
}

/// The same for any attention. Latents are shared by all heads, so each rank has them whole.
pub fn attention_of(attention: &Attention, heads: Range<usize>) -> Attention {
    match attention {
        Attention::Gqa(gqa) => Attention::Gqa(kv_heads_of(gqa, heads)),
        Attention::Mla(mla) => Attention::Mla(Mla { num_heads: heads.len(), ..mla.clone() }),
    }
}

/// By key/value head of a rank: the one of the model that it is a copy of.
pub(crate) fn model_kv_heads(spec: &Gqa, heads: &Range<usize>) -> Vec<usize> {
    let ratio = spec.num_heads / spec.num_kv_heads;
    heads.clone().step_by(local_ratio(spec, heads)).map(|head| head / ratio).collect()
}

/// The key/value heads of a rank that stand for the model's where each must be counted once: those whose first query head
/// in the model is here. Over ranks that share the query heads out, every one of the model is among them once.
pub(crate) fn counted_kv_heads(spec: &Gqa, heads: &Range<usize>) -> Vec<usize> {
    let ratio = spec.num_heads / spec.num_kv_heads;
    let first = heads.clone().step_by(local_ratio(spec, heads)).enumerate();
    first.filter(|(_, head)| head.is_multiple_of(ratio)).map(|(idx, _)| idx).collect()
}

/// The columns of these heads, each `width` wide; neighbours become one range.
pub(crate) fn columns_of(heads: &[usize], width: usize) -> Vec<Range<usize>> {
    let groups = heads.chunk_by(|a, b| a + 1 == *b);
    groups.map(|group| group[0] * width..(group[0] + group.len()) * width).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use moesaic_spec::QkNorm;

    fn gqa(num_heads: usize, num_kv_heads: usize) -> Gqa {
        Gqa {
            num_heads,
            num_kv_heads,
            head_dim: 8,
            qk_norm: QkNorm::None,
            clip_qkv: None,
            sliding_window: None,
            bias: false,
        }
    }

    #[test]
    fn every_query_head_finds_its_key_head_and_every_key_head_is_counted_once() {
        for num_kv_heads in 1..=6 {
            for ratio in 1..=6 {
                let num_heads = num_kv_heads * ratio;
                let spec = gqa(num_heads, num_kv_heads);
                for start in 0..num_heads {
                    for end in start + 1..=num_heads {
                        let local = kv_heads_of(&spec, start..end);
                        let copies = model_kv_heads(&spec, &(start..end));
                        assert_eq!((local.num_heads, local.num_kv_heads), (end - start, copies.len()));
                        assert!(local.num_heads.is_multiple_of(local.num_kv_heads));
                        let local_ratio = local.num_heads / local.num_kv_heads;
                        for head in start..end {
                            assert_eq!(copies[(head - start) / local_ratio], head / ratio, "{head} of {start}..{end}");
                        }
                    }
                }
                // Shared out in parts of any sizes.
                for step in 1..=num_heads {
                    let ranks = (0..num_heads).step_by(step).map(|start| start..num_heads.min(start + step));
                    let counted = ranks.flat_map(|heads| {
                        let copies = model_kv_heads(&spec, &heads);
                        counted_kv_heads(&spec, &heads).into_iter().map(move |idx| copies[idx])
                    });
                    assert_eq!(counted.collect::<Vec<_>>(), (0..num_kv_heads).collect::<Vec<_>>(), "{step}");
                }
                assert_eq!(kv_heads_of(&spec, 0..num_heads), spec);
                let columns = columns_of(&model_kv_heads(&spec, &(0..num_heads)), 8);
                assert_eq!((columns.len(), &columns[0]), (1, &(0..num_kv_heads * 8)), "the whole is one range");
            }
        }
    }

    #[test]
    fn uneven_heads_hold_copies() {
        // Four query heads a key head; heads 2..8 begin in the middle of a group.
        let spec = gqa(12, 3);
        assert_eq!(kv_heads_of(&spec, 2..8).num_kv_heads, 3);
        assert_eq!(model_kv_heads(&spec, &(2..8)), [0, 1, 1]);
        assert_eq!(counted_kv_heads(&spec, &(2..8)), [1]);
        assert_eq!(columns_of(&[0, 1, 1], 8), [0..16, 8..16]);
    }
}
