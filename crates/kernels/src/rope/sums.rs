//! Sums of squares of queries and keys, for a norm over heads that are on several ranks.

use half::bf16;
use moesaic_device::{Ctx, OpCall, Tensor};
use moesaic_spec::DType;

use super::QkvLayout;
use crate::contract::{KernelError, check, require};
use crate::elementwise::{Element, check_activation, multi_isa, sum_by};
use crate::rows::for_rows;

const OP: &str = "qk_sums";

/// For each row of `qkv` `[T, (H + 2G) * C]` (F32 or BF16) the sum of squares over all query heads, and over the key heads
/// `key_heads`: F32 `[T, 2]`. Added up over all ranks they are what
/// [`QkNormWeights::FullWidthOf`](super::QkNormWeights::FullWidthOf) wants. Where a key head of the model is held several
/// times, here or on several ranks, it must be counted once: that is what `key_heads` is for.
///
/// Each head in the order of all sums over a row, then head by head. Dims T, H, C and the counted key heads. FLOPs
/// `2 * T * C * (H + counted)`. Bytes: the counted columns read, the sums written.
pub fn qk_sums(ctx: &Ctx, qkv: &Tensor, layout: QkvLayout, key_heads: &[usize]) -> Result<Tensor, KernelError> {
    let QkvLayout { num_heads: h, num_kv_heads: g, head_dim: c } = layout;
    layout.check(OP)?;
    check_activation(OP, "qkv", qkv.dtype())?;
    let t = qkv.dims().first().copied().unwrap_or(0);
    check(OP, "qkv", qkv, &[t, layout.width()], qkv.dtype())?;
    let ascending = key_heads.is_sorted_by(|a, b| a < b) && key_heads.last().is_none_or(|&last| last < g);
    let expected = || format!("ascending and below {g}");
    require(ascending, OP, "key heads", expected, || format!("{key_heads:?}"))?;
    ctx.record(|| {
        let columns = t * c * (h + key_heads.len());
        let dims = [("T", t), ("H", h), ("C", c), ("counted", key_heads.len())];
        OpCall::compute(OP, &dims, 2 * columns as u64, (columns * qkv.dtype().size_bytes() + 8 * t) as u64)
    });
    let mut sums = ctx.empty(&[t, 2], DType::F32)?;
    if !ctx.is_meta() {
        match qkv.dtype() {
            DType::F32 => run::<f32>(ctx, qkv, layout, key_heads, &mut sums),
            _ => run::<bf16>(ctx, qkv, layout, key_heads, &mut sums),
        }
    }
    Ok(sums)
}

fn run<X: Element>(ctx: &Ctx, qkv: &Tensor, layout: QkvLayout, key_heads: &[usize], sums: &mut Tensor) {
    let (isa, width, x) = (ctx.isa(), layout.width(), X::of(qkv));
    for_rows(ctx, sums.f32_mut(), 2, width * size_of::<X>(), |first, sums| {
        let x = &x[first * width..][..sums.len() / 2 * width];
        sum_rows::<X>(isa, x, layout, key_heads, sums);
    });
}

multi_isa! {
    fn sum_rows<X: Element>(x: &[X], layout: QkvLayout, key_heads: &[usize], sums: &mut [f32]) = sum_each_row
}

#[inline(always)]
fn sum_each_row<X: Element>(x: &[X], layout: QkvLayout, key_heads: &[usize], sums: &mut [f32]) {
    let QkvLayout { num_heads: h, head_dim: c, .. } = layout;
    for (x, sums) in x.chunks_exact(layout.width()).zip(sums.chunks_exact_mut(2)) {
        let head = |i: usize| sum_by(&x[i * c..(i + 1) * c], |x| x * x);
        sums[0] = (0..h).fold(0.0, |sum, i| sum + head(i));
        sums[1] = key_heads.iter().fold(0.0, |sum, &i| sum + head(h + i));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::paged::{KvShape, PagedBatch, PagedKv, PagedSeq};
    use crate::rope::{QkNormWeights, QkvPost, RopeTable, rope_and_store};
    use crate::testing::{ACTIVATIONS, contexts, random, relative_error, tensor, values};
    use moesaic_device::Arena;
    use moesaic_spec::{Bytes, Rope, RopeScaling};

    const C: usize = 10;

    #[test]
    fn sums_are_those_of_the_columns_on_every_path() {
        let layout = QkvLayout { num_heads: 6, num_kv_heads: 3, head_dim: C };
        let (t, width) = (40, layout.width());
        let mut outs: Vec<Vec<f32>> = vec![Vec::new(); 2];
        for ctx in contexts() {
            for (dtype, seen) in ACTIVATIONS.into_iter().zip(&mut outs) {
                let x = tensor(&ctx, &[t, width], dtype, &random(1, t * width));
                for key_heads in [&[0, 1, 2][..], &[1], &[0, 2], &[]] {
                    let sums = qk_sums(&ctx, &x, layout, key_heads).unwrap();
                    let squares = |x: &[f32]| x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>();
                    for (x, sums) in values(&x).chunks(width).zip(sums.f32().chunks(2)) {
                        let key = |&i: &usize| squares(&x[(6 + i) * C..(7 + i) * C]);
                        let expected = [squares(&x[..6 * C]), key_heads.iter().map(key).sum()];
                        // 60 additions of positive numbers.
                        let close = |a: f32, b: f64| (f64::from(a) - b).abs() <= 1e-6 * b;
                        assert!(sums.iter().zip(expected).all(|(&a, b)| close(a, b)), "{sums:?} {expected:?}");
                    }
                    if key_heads.len() == 3 {
                        if seen.is_empty() {
                            seen.extend(sums.f32());
                        }
                        assert_eq!(sums.f32(), seen, "{dtype} on {}", ctx.isa());
                    }
                }
            }
        }
    }

    /// Heads of the model on one rank or on several, with copies of key heads, and the norm over all of them.
    #[test]
    fn heads_on_several_ranks_are_normed_as_on_one() {
        let ctx = Ctx::cpu(2, 1 << 20).unwrap();
        let rope = Rope { theta: 10_000.0, interleaved: false, scaling: RopeScaling::None };
        let table = RopeTable::new(&rope, C, 64).unwrap();
        let (h, g, t) = (6, 3, 9);
        let model = QkvLayout { num_heads: h, num_kv_heads: g, head_dim: C };
        let seq = PagedSeq { row0: 0, num_rows: t, context_len: t, block_table: vec![0, 1] };
        let batch = PagedBatch::new(8, vec![seq]).unwrap();
        for dtype in ACTIVATIONS {
            let given = random(2, t * model.width());
            let (query, key) = (random(3, h * C), random(4, g * C));
            let run = |layout: QkvLayout, qkv: &mut Tensor, norm: QkNormWeights| {
                let shape =
                    KvShape { num_blocks: 2, block_size: 8, num_kv_heads: layout.num_kv_heads, head_dim: C, dtype };
                let mut kv = PagedKv::new(&Arena::host("kv", Bytes(1 << 16)).unwrap(), shape).unwrap();
                let post = QkvPost { layout, norm, eps: 1e-5, clip: None, rope: &table };
                rope_and_store(&ctx, qkv, &post, &mut kv, &batch).unwrap();
                values(qkv)
            };
            let weight = |values: &[f32]| tensor(&ctx, &[values.len()], DType::F32, values);
            let (whole_query, whole_key) = (weight(&query), weight(&key));
            let norm = QkNormWeights::FullWidth { query: &whole_query, key: &whole_key };
            let mut whole = tensor(&ctx, &[t, model.width()], dtype, &given);
            let expected = run(model, &mut whole, norm);

            // Which heads a rank has, and which of its key heads it counts.
            type Part = (std::ops::Range<usize>, &'static [usize], &'static [usize]);
            let one: [Part; 1] = [(0..6, &[0, 1, 2], &[0, 1, 2])];
            let three: [Part; 3] = [(0..2, &[0], &[0]), (2..5, &[1, 1, 2], &[0, 2]), (5..6, &[2], &[])];
            for parts in [&one[..], &three] {
                let columns = |x: &[f32], (heads, key_heads, _): &Part| -> Vec<f32> {
                    let keys = key_heads.iter().map(|i| h + i).chain(key_heads.iter().map(|i| h + g + i));
                    let all = heads.clone().chain(keys);
                    let rows = x.chunks(model.width());
                    rows.flat_map(|row| all.clone().flat_map(|i| row[i * C..(i + 1) * C].to_vec())).collect()
                };
                let layout = |(heads, key_heads, _): &Part| QkvLayout {
                    num_heads: heads.len(),
                    num_kv_heads: key_heads.len(),
                    head_dim: C,
                };
                let mut locals: Vec<Tensor> = parts
                    .iter()
                    .map(|part| tensor(&ctx, &[t, layout(part).width()], dtype, &columns(&given, part)))
                    .collect();
                let mut totals = vec![0.0; 2 * t];
                for (part, local) in parts.iter().zip(&locals) {
                    let sums = qk_sums(&ctx, local, layout(part), part.2).unwrap();
                    totals.iter_mut().zip(sums.f32()).for_each(|(total, sum)| *total += sum);
                }
                let sums = tensor(&ctx, &[t, 2], DType::F32, &totals);
                for (part, local) in parts.iter().zip(&mut locals) {
                    let query = weight(&query[part.0.start * C..part.0.end * C]);
                    let key: Vec<f32> = part.1.iter().flat_map(|i| key[i * C..(i + 1) * C].to_vec()).collect();
                    let key = weight(&key);
                    let (query_width, key_width) = (h * C, g * C);
                    let norm =
                        QkNormWeights::FullWidthOf { query: &query, key: &key, sums: &sums, query_width, key_width };
                    let got = run(layout(part), local, norm);
                    // The sums run in another order; in BF16 a value may round to the other neighbour.
                    let limit = if dtype == DType::F32 { 1e-6 } else { 1e-3 };
                    let error = relative_error(&got, &columns(&expected, part));
                    assert!(error < limit, "{dtype}, heads {:?}: {error:e}", part.0);
                }
            }
        }
    }

    #[test]
    fn wrong_arguments_are_named_and_meta_records_what_a_real_run_records() {
        let layout = QkvLayout { num_heads: 4, num_kv_heads: 2, head_dim: 8 };
        let (cpu, meta) = (Ctx::cpu(1, 1 << 16).unwrap(), Ctx::meta());
        cpu.start_log();
        for ctx in [&cpu, &meta] {
            let qkv = tensor(ctx, &[3, 64], DType::BF16, &random(1, 3 * 64));
            assert_eq!(qk_sums(ctx, &qkv, layout, &[1]).unwrap().dims(), [3, 2]);
            for key_heads in [&[2][..], &[1, 0], &[0, 0]] {
                let error = qk_sums(ctx, &qkv, layout, key_heads).err().unwrap().to_string();
                assert_eq!(error, format!("qk_sums: key heads is {key_heads:?}, expected ascending and below 2"));
            }
        }
        let calls = cpu.take_log();
        assert_eq!(calls, meta.take_log());
        let dims = [("T", 3), ("H", 4), ("C", 8), ("counted", 1)];
        assert_eq!(calls, [OpCall::compute("qk_sums", &dims, 2 * 3 * 40, 3 * 40 * 2 + 24)]);
    }
}
