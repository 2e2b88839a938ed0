//! Absorbed attention against attention with expanded heads, and its sameness.

use moesaic_device::{Arena, Ctx, Isa};
use moesaic_spec::{Bytes, DType};

use super::*;
use crate::attention::tests::{NUM_BLOCKS, Numbers, assert_close, batch, bits, ctx, isas, rope, tensor, values};
use crate::cols::Cols;
use crate::rope::RopeTable;

#[derive(Clone, Copy, Debug)]
struct Model {
    h: usize,
    l: usize,
    p: usize,
    nope: usize,
    dtype: DType,
    block_size: usize,
}

/// Inputs of a sequence, by row.
struct Input {
    kv_a: Vec<f32>,
    q_latent: Vec<f32>,
    q: Vec<f32>,
}

impl Model {
    fn latent(&self) -> PagedLatent {
        let &Model { l, p, dtype, block_size, .. } = self;
        let shape = LatentShape { num_blocks: NUM_BLOCKS, block_size, kv_lora_rank: l, qk_rope_head_dim: p, dtype };
        let mut latent = PagedLatent::new(&Arena::host("kv", Bytes(64 << 20)).unwrap(), shape).unwrap();
        latent.poison();
        latent
    }

    fn input(&self, len: usize, seed: u64) -> Input {
        let mut numbers = Numbers(seed);
        Input {
            kv_a: numbers.vec(len * (self.l + self.p)),
            q_latent: numbers.vec(len * self.h * self.l),
            q: numbers.vec(len * self.h * (self.nope + self.p)),
        }
    }

    fn weight(&self) -> Vec<f32> {
        Numbers(77).vec(self.l).iter().map(|x| 1.0 + 0.2 * x).collect()
    }

    /// One step; also returns what was stored for each row and the rotated queries.
    fn step(&self, ctx: &Ctx, latent: &mut PagedLatent, batch: &PagedBatch, input: &Input) -> [Vec<f32>; 3] {
        let &Model { h, l, p, nope, dtype, .. } = self;
        let t = batch.num_rows();
        // Entries sit in the middle of a wider matrix.
        let wide: Vec<f32> = input.kv_a.chunks(l + p).flat_map(|row| [&[9.0; 3], row, &[9.0; 2]].concat()).collect();
        let wide = tensor(ctx, &[t, l + p + 5], dtype, &wide);
        let norm_weight = tensor(ctx, &[l], DType::F32, &self.weight());
        let table = RopeTable::new(&rope(true), p, 4096).unwrap();
        let post = LatentPost { norm_weight: &norm_weight, eps: 1e-6, rope: &table };
        store_latent(ctx, Cols { tensor: &wide, start: 3, len: l + p }, &post, latent, batch).unwrap();
        let q_latent = tensor(ctx, &[t, h * l], dtype, &input.q_latent);
        let mut q = tensor(ctx, &[t, h * (nope + p)], dtype, &input.q);
        rope_queries(ctx, &mut q, h, &table, batch).unwrap();
        let out = mla_attention(ctx, &q_latent, &q, h, latent, batch, self.scale()).unwrap();
        let width = l + p;
        let entries = latent.entries_f32();
        let stored = batch.slots().iter().flat_map(|slot| entries[slot * width..(slot + 1) * width].to_vec());
        [stored.collect(), values(&q), values(&out)]
    }

    fn scale(&self) -> f32 {
        2.0 / ((self.l + self.p) as f32).sqrt()
    }
}

/// What is stored is the normalised latent and the rotated key.
fn assert_stored(model: &Model, input: &Input, stored: &[f32]) {
    let &Model { l, p, .. } = model;
    let mut expected = vec![];
    for (position, row) in input.kv_a.chunks(l + p).enumerate() {
        let row: Vec<f64> = row
            .iter()
            .map(|&x| if model.dtype == DType::BF16 { half::bf16::from_f32(x).to_f64() } else { x as f64 })
            .collect();
        let mean = row[..l].iter().map(|x| x * x).sum::<f64>() / l as f64;
        expected.extend(row[..l].iter().zip(model.weight()).map(|(x, w)| x / (mean + 1e-6).sqrt() * w as f64));
        for i in 0..p / 2 {
            let angle = position as f64 * 10_000f64.powf(-((2 * i) as f64) / p as f64);
            let (a, b) = (row[l + 2 * i], row[l + 2 * i + 1]);
            expected.extend([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()]);
        }
    }
    assert_close(stored, &expected, model.dtype, "stored entries");
}

#[test]
fn every_path_is_the_definition_and_all_have_the_same_bits() {
    for dtype in [DType::F32, DType::BF16] {
        for (h, l, p, nope, len, block_size) in
            [(3, 32, 8, 16, 70, 16), (16, 64, 16, 4, 40, 8), (5, 7, 4, 3, 90, 24), (2, 512, 64, 0, 30, 32)]
        {
            let model = Model { h, l, p, nope, dtype, block_size };
            let input = model.input(len, 1);
            let batch = batch(block_size, &[(len, len)], NUM_BLOCKS, 7);
            let mut first: Option<Vec<u32>> = None;
            for isa in isas() {
                let [stored, q, out] = model.step(&ctx(isa, 2), &mut model.latent(), &batch, &input);
                if isa == Isa::Portable {
                    assert_stored(&model, &input, &stored);
                    let rounded = values(&tensor(&ctx(isa, 1), &[len, h * l], dtype, &input.q_latent));
                    assert_close(&out, &absorbed(&model, &stored, &q, &rounded), dtype, &format!("{model:?}"));
                }
                let first = first.get_or_insert_with(|| bits(&out));
                assert!(*first == bits(&out), "{isa} differs: {model:?}");
            }
        }
    }
}

fn absorbed(model: &Model, stored: &[f32], q: &[f32], q_latent: &[f32]) -> Vec<f64> {
    let &Model { h, l, p, nope, .. } = model;
    let width = l + p;
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| *a as f64 * *b as f64).sum::<f64>();
    let mut out = vec![];
    for t in 0..stored.len() / width {
        for head in 0..h {
            let item = t * h + head;
            let rope = &q[item * (nope + p) + nope..][..p];
            let weights: Vec<f64> = stored[..(t + 1) * width]
                .chunks(width)
                .map(|entry| {
                    let score = dot(&q_latent[item * l..][..l], &entry[..l]) + dot(rope, &entry[l..]);
                    (score * model.scale() as f64).exp()
                })
                .collect();
            let total: f64 = weights.iter().sum();
            out.extend((0..l).map(|d| {
                weights.iter().zip(stored.chunks(width)).map(|(w, entry)| w * entry[d] as f64).sum::<f64>() / total
            }));
        }
    }
    out
}

/// The identity that absorption rests on: with `k = W_k latent` and `v = W_v latent` per head, attention over expanded
/// heads equals `W_v` applied to attention over latents with queries `W_kᵀ q`.
#[test]
fn absorbed_attention_is_attention_with_expanded_heads() {
    let model = Model { h: 4, l: 24, p: 8, nope: 12, dtype: DType::F32, block_size: 16 };
    let Model { h, l, p, nope, .. } = model;
    let (len, v_dim) = (50, 10);
    let mut input = model.input(len, 2);
    let mut numbers = Numbers(8);
    let (w_k, w_v) = (numbers.vec(h * nope * l), numbers.vec(h * v_dim * l));
    for t in 0..len {
        for head in 0..h {
            let q = &input.q[(t * h + head) * (nope + p)..][..nope];
            for d in 0..l {
                input.q_latent[(t * h + head) * l + d] = (0..nope).map(|i| q[i] * w_k[(head * nope + i) * l + d]).sum();
            }
        }
    }
    let batch = batch(16, &[(len, len)], NUM_BLOCKS, 3);
    let [stored, q, out] = model.step(&ctx(Isa::detect(), 2), &mut model.latent(), &batch, &input);
    let width = l + p;
    let (mut got, mut expected) = (vec![], vec![]);
    for t in 0..len {
        for head in 0..h {
            let project = |w: &[f32], row: usize, latent: &[f32]| {
                w[row * l..][..l].iter().zip(latent).map(|(a, b)| *a as f64 * *b as f64).sum::<f64>()
            };
            let query = &q[(t * h + head) * (nope + p)..][..nope + p];
            let weights: Vec<f64> = (0..=t)
                .map(|s| {
                    let entry = &stored[s * width..][..width];
                    let nope_part = (0..nope).map(|i| query[i] as f64 * project(&w_k, head * nope + i, &entry[..l]));
                    let rope_part = (0..p).map(|i| query[nope + i] as f64 * entry[l + i] as f64);
                    ((nope_part.sum::<f64>() + rope_part.sum::<f64>()) * model.scale() as f64).exp()
                })
                .collect();
            let total: f64 = weights.iter().sum();
            for i in 0..v_dim {
                let value = |s: usize| project(&w_v, head * v_dim + i, &stored[s * width..][..l]);
                expected.push((0..=t).map(|s| weights[s] * value(s)).sum::<f64>() / total);
                got.push(project(&w_v, head * v_dim + i, &out[(t * h + head) * l..][..l]) as f32);
            }
        }
    }
    assert_close(&got, &expected, DType::F32, "expanded");
}

#[test]
fn a_row_does_not_see_how_it_was_computed() {
    for dtype in [DType::F32, DType::BF16] {
        let model = Model { h: 10, l: 32, p: 8, nope: 8, dtype, block_size: 16 };
        let (Model { h, l, p, nope, .. }, len) = (model, 530);
        let input = model.input(len, 4);
        let whole = batch(16, &[(len, len)], NUM_BLOCKS, 1);
        let whole = bits(&model.step(&ctx(Isa::detect(), 4), &mut model.latent(), &whole, &input)[2]);
        for (isa, num_threads, chunks) in
            [(Isa::detect(), 1, vec![1, 3, 60, 200, 1, 1, 262, 1, 1]), (Isa::Portable, 2, vec![500, 1, 12, 1, 16])]
        {
            let ctx = ctx(isa, num_threads);
            let (mut latent, mut done, mut out) = (model.latent(), 0, vec![]);
            let other = model.input(6, 5);
            for rows in chunks {
                let mut tables = batch(16, &[(37, 6), (len, 1)], NUM_BLOCKS, 5).seqs().to_vec();
                (tables[1].context_len, tables[1].num_rows) = (done + rows, rows);
                let batch = PagedBatch::new(16, tables).unwrap();
                let join = |a: &[f32], b: &[f32], width: usize| [a, &b[done * width..(done + rows) * width]].concat();
                let step = Input {
                    kv_a: join(&other.kv_a, &input.kv_a, l + p),
                    q_latent: join(&other.q_latent, &input.q_latent, h * l),
                    q: join(&other.q, &input.q, h * (nope + p)),
                };
                // The other sequence's earlier entries were never stored; its rows may be anything.
                let [_, _, all] = model.step(&ctx, &mut latent, &batch, &step);
                out.extend(bits(&all[6 * h * l..]));
                done += rows;
            }
            assert_eq!(done, len);
            let differ = out.iter().zip(&whole).position(|(a, b)| a != b);
            assert!(differ.is_none(), "{model:?} {isa}: row {}", differ.unwrap() / (h * l));
        }
    }
}

#[test]
fn meta_takes_the_same_memory_and_records_the_same_calls() {
    let model = Model { h: 4, l: 32, p: 8, nope: 8, dtype: DType::BF16, block_size: 16 };
    let batch = batch(16, &[(1100, 1), (20, 20)], NUM_BLOCKS, 1);
    let run = |ctx: &Ctx, arena: &Arena| {
        let shape = model.latent().shape();
        let mut latent = PagedLatent::new(arena, shape).unwrap();
        let make = |width| {
            let mut tensor = ctx.empty(&[21, width], DType::BF16).unwrap();
            if !ctx.is_meta() {
                tensor.bytes_mut().fill(0);
            }
            tensor
        };
        let (kv_a, q_latent, mut q) = (make(40), make(128), make(64));
        let norm_weight = ctx.empty(&[32], DType::BF16).unwrap();
        let table = RopeTable::new(&rope(true), 8, 2000).unwrap();
        let post = LatentPost { norm_weight: &norm_weight, eps: 1e-6, rope: &table };
        store_latent(ctx, Cols { tensor: &kv_a, start: 0, len: 40 }, &post, &mut latent, &batch).unwrap();
        rope_queries(ctx, &mut q, 4, &table, &batch).unwrap();
        let _out = mla_attention(ctx, &q_latent, &q, 4, &latent, &batch, 0.1).unwrap();
        assert_eq!(arena.in_use(), PagedLatent::bytes(shape));
        (ctx.take_log(), ctx.arena().peak())
    };
    let (real, meta) = (ctx(Isa::detect(), 3), Ctx::meta());
    real.start_log();
    let (real, meta) = (run(&real, &Arena::host("kv", Bytes(64 << 20)).unwrap()), run(&meta, &Arena::meta("kv")));
    assert_eq!(real, meta);
    assert_eq!(real.0[2].flops.bound, (1100 + 210) * 4 * (4 * 32 + 2 * 8));
}
