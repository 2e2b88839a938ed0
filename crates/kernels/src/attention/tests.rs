//! Attention against plain loops, and its sameness: alone or among others, whole or in chunks, on any instruction set.

use std::sync::Arc;

use half::bf16;
use moesaic_device::{Arena, Ctx, Isa, Pool, Tensor};
use moesaic_spec::{Bytes, DType, Rope, RopeScaling};

use super::*;
use crate::rope::{QkNormWeights, QkvPost, RopeTable, rope_and_store};

/// A stream of numbers in -1 … 1.
pub(crate) struct Numbers(pub(crate) u64);

impl Numbers {
    pub(crate) fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 40) as f32 / (1u64 << 23) as f32) - 1.0
    }

    pub(crate) fn vec(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.next()).collect()
    }
}

pub(crate) fn ctx(isa: Isa, num_threads: usize) -> Ctx {
    Ctx::cpu_with(Arena::host("activation", Bytes(64 << 20)).unwrap(), Arc::new(Pool::new(num_threads).unwrap()), isa)
}

pub(crate) fn isas() -> Vec<Isa> {
    moesaic_device::isa::ALL.into_iter().filter(|&isa| isa <= Isa::detect()).collect()
}

pub(crate) fn tensor(ctx: &Ctx, dims: &[usize], dtype: DType, values: &[f32]) -> Tensor {
    let mut tensor = ctx.empty(dims, dtype).unwrap();
    match dtype {
        DType::F32 => tensor.f32_mut().copy_from_slice(values),
        _ => tensor.bf16_mut().iter_mut().zip(values).for_each(|(to, from)| *to = bf16::from_f32(*from)),
    }
    tensor
}

pub(crate) fn values(tensor: &Tensor) -> Vec<f32> {
    match tensor.dtype() {
        DType::F32 => tensor.f32().to_vec(),
        _ => tensor.bf16().iter().map(|x| x.to_f32()).collect(),
    }
}

pub(crate) fn rope(interleaved: bool) -> Rope {
    Rope { theta: 10_000.0, interleaved, scaling: RopeScaling::None }
}

/// Sequences of these (context, rows) over `block_size`, with their blocks dealt by a stride; block 0 stays free.
pub(crate) fn batch(block_size: usize, lens: &[(usize, usize)], num_blocks: usize, stride: usize) -> PagedBatch {
    let (mut next, mut row0) = (0, 0);
    let seqs = lens.iter().map(|&(context_len, num_rows)| {
        let block_table = (0..context_len.div_ceil(block_size))
            .map(|_| {
                next += 1;
                (next * stride % num_blocks) as u32
            })
            .collect();
        let seq = PagedSeq { row0, num_rows, context_len, block_table };
        row0 += num_rows;
        seq
    });
    PagedBatch::new(block_size, seqs.collect()).unwrap()
}

/// A prime, so that every stride deals all blocks.
pub(crate) const NUM_BLOCKS: usize = 211;

#[derive(Clone, Copy, Debug)]
struct Model {
    layout: QkvLayout,
    dtype: DType,
    block_size: usize,
    window: Option<usize>,
}

impl Model {
    fn new(h: usize, g: usize, c: usize, dtype: DType) -> Model {
        let layout = QkvLayout { num_heads: h, num_kv_heads: g, head_dim: c };
        Model { layout, dtype, block_size: 16, window: None }
    }

    fn kv(&self) -> PagedKv {
        let QkvLayout { num_kv_heads, head_dim, .. } = self.layout;
        let arena = Arena::host("kv", Bytes(256 << 20)).unwrap();
        let shape =
            KvShape { num_blocks: NUM_BLOCKS, block_size: self.block_size, num_kv_heads, head_dim, dtype: self.dtype };
        let mut kv = PagedKv::new(&arena, shape).unwrap();
        // What was there before must not matter.
        kv.poison();
        kv
    }

    fn scale(&self) -> f32 {
        // Peaked enough that the maximum moves.
        4.0 / (self.layout.head_dim as f32).sqrt()
    }

    /// One step: stores and attends.
    fn step(&self, ctx: &Ctx, kv: &mut PagedKv, batch: &PagedBatch, rows: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let mut qkv = tensor(ctx, &[batch.num_rows(), self.layout.width()], self.dtype, rows);
        let table = RopeTable::new(&rope(false), self.layout.head_dim / 2 * 2, 4096).unwrap();
        let post = QkvPost { layout: self.layout, norm: QkNormWeights::None, eps: 1e-6, clip: None, rope: &table };
        rope_and_store(ctx, &mut qkv, &post, kv, batch).unwrap();
        let out = attention(ctx, &qkv, self.layout, kv, batch, self.scale(), self.window).unwrap();
        (values(&qkv), values(&out))
    }

    /// The definition, in F64, for a sequence from position 0 on, from rotated rows.
    fn reference(&self, rows: &[f32]) -> Vec<f64> {
        let QkvLayout { num_heads: h, num_kv_heads: g, head_dim: c } = self.layout;
        let width = self.layout.width();
        let row = |t: usize, head: usize| &rows[t * width + head * c..][..c];
        let mut out = vec![];
        for t in 0..rows.len() / width {
            let first = (t + 1).saturating_sub(self.window.unwrap_or(usize::MAX));
            for head in 0..h {
                let (key, value) = (h + head * g / h, h + g + head * g / h);
                let dot =
                    |s: usize| row(t, head).iter().zip(row(s, key)).map(|(a, b)| *a as f64 * *b as f64).sum::<f64>();
                let weights: Vec<f64> = (first..=t).map(|s| (dot(s) * self.scale() as f64).exp()).collect();
                let total: f64 = weights.iter().sum();
                out.extend((0..c).map(|d| {
                    let weighed = weights.iter().enumerate().map(|(i, w)| w * row(first + i, value)[d] as f64);
                    weighed.sum::<f64>() / total
                }));
            }
        }
        out
    }
}

/// F32: rounding of sums. BF16: weights and results are rounded to 8 bits.
pub(crate) fn assert_close(got: &[f32], expected: &[f64], dtype: DType, what: &str) {
    assert_eq!(got.len(), expected.len());
    let limit = if dtype == DType::F32 { 2e-6 } else { 4e-3 };
    let norm = expected.iter().map(|x| x * x).sum::<f64>().sqrt();
    let error = got.iter().zip(expected).map(|(a, b)| (*a as f64 - b).powi(2)).sum::<f64>().sqrt();
    assert!(error <= limit * norm, "{what}: relative error {:e}", error / norm);
}

pub(crate) fn bits(values: &[f32]) -> Vec<u32> {
    assert!(values.iter().all(|x| x.is_finite()));
    values.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn every_path_is_the_definition_and_all_have_the_same_bits() {
    let cases = [
        (2, 2, 5, 20, 8, None),
        (3, 1, 8, 130, 16, None),
        (4, 2, 24, 77, 24, None),
        (6, 2, 56, 65, 32, Some(20)),
        (4, 2, 64, 150, 16, None),
        (8, 1, 128, 90, 64, Some(64)),
        (1, 1, 3, 9, 8, None),
        (2, 1, 32, 600, 32, None),
        (2, 1, 16, 580, 16, Some(530)),
    ];
    for dtype in [DType::F32, DType::BF16] {
        for (h, g, c, len, block_size, window) in cases {
            let model = Model { block_size, window, ..Model::new(h, g, c, dtype) };
            let input = Numbers(len as u64).vec(len * model.layout.width());
            let batch = batch(block_size, &[(len, len)], NUM_BLOCKS, 7);
            let mut first: Option<Vec<u32>> = None;
            for isa in isas() {
                let (rows, out) = model.step(&ctx(isa, 2), &mut model.kv(), &batch, &input);
                if isa == Isa::Portable {
                    assert_close(&out, &model.reference(&rows), dtype, &format!("{model:?}"));
                }
                let first = first.get_or_insert_with(|| bits(&out));
                assert!(*first == bits(&out), "{isa} differs: {model:?}");
            }
        }
    }
}

#[test]
fn random_shapes_are_the_definition() {
    let mut numbers = Numbers(2024);
    let mut below = |n: usize| (((numbers.next() + 1.0) / 2.0 * n as f32) as usize).min(n - 1);
    for _ in 0..40 {
        let g = 1 + below(3);
        let dtype = [DType::F32, DType::BF16][below(2)];
        let window = [None, Some(1 + below(70))][below(2)];
        let model =
            Model { block_size: 8 * (1 + below(8)), window, ..Model::new(g * (1 + below(9)), g, 2 + below(72), dtype) };
        let lens: Vec<(usize, usize)> = (0..1 + below(4)).map(|_| 1 + below(100)).map(|len| (len, len)).collect();
        let batch = batch(model.block_size, &lens, NUM_BLOCKS, 1 + below(9));
        let input = Numbers(below(1000) as u64).vec(batch.num_rows() * model.layout.width());
        let (rows, out) = model.step(&ctx(Isa::detect(), 2), &mut model.kv(), &batch, &input);
        let of = |seq: &PagedSeq, width: usize| seq.row0 * width..(seq.row0 + seq.num_rows) * width;
        let out_width = model.layout.num_heads * model.layout.head_dim;
        for seq in batch.seqs() {
            let expected = model.reference(&rows[of(seq, model.layout.width())]);
            assert_close(&out[of(seq, out_width)], &expected, dtype, &format!("{model:?} {lens:?}"));
        }
    }
}

#[test]
fn a_nan_is_seen_and_stays_in_its_sequence() {
    for dtype in [DType::F32, DType::BF16] {
        let model = Model::new(4, 2, 16, dtype);
        let (width, out_width) = (model.layout.width(), 64);
        let batch = batch(16, &[(40, 40), (70, 70), (50, 50)], NUM_BLOCKS, 1);
        let mut input = Numbers(6).vec(160 * width);
        for isa in [Isa::Portable, Isa::detect()] {
            let (_, clean) = model.step(&ctx(isa, 2), &mut model.kv(), &batch, &input);
            // A key of the first head of row 30 of the second sequence.
            let at = (40 + 30) * width + 4 * 16 + 3;
            let before = std::mem::replace(&mut input[at], f32::NAN);
            let (_, out) = model.step(&ctx(isa, 2), &mut model.kv(), &batch, &input);
            input[at] = before;
            for (row, (out, clean)) in out.chunks(out_width).zip(clean.chunks(out_width)).enumerate() {
                if (70..110).contains(&row) {
                    assert!(out[..32].iter().all(|x| x.is_nan()), "{isa} row {row}");
                    assert_eq!(out[32..], clean[32..], "{isa} row {row}");
                } else {
                    assert_eq!(out, clean, "{isa} row {row}");
                }
            }
        }
    }
}

#[test]
fn a_row_does_not_see_how_it_was_computed() {
    for dtype in [DType::F32, DType::BF16] {
        for (window, h, g, c) in [(None, 4, 2, 24), (Some(100), 12, 2, 16)] {
            let model = Model { window, ..Model::new(h, g, c, dtype) };
            let width = model.layout.width();
            let len = 1100;
            let input = Numbers(3).vec(len * width);
            let whole = {
                let batch = batch(16, &[(len, len)], NUM_BLOCKS, 1);
                bits(&model.step(&ctx(Isa::detect(), 4), &mut model.kv(), &batch, &input).1)
            };
            // Chunks of any length, decode rows among them, among other sequences, on shuffled blocks.
            for (isa, num_threads, chunks) in [
                (Isa::detect(), 1, vec![1, 62, 2, 64, 200, 31, 1, 1, 1, 300, 1, 1, 435]),
                (Isa::detect(), 4, vec![511, 1, 1, 1, 500, 1, 85]),
                (Isa::Portable, 2, vec![1063, 1, 1, 35]),
            ] {
                let ctx = ctx(isa, num_threads);
                let (mut kv, mut done, mut others) = (model.kv(), 0, Numbers(9));
                let mut out = vec![];
                for rows in chunks {
                    let mut tables = batch(16, &[(37, 37), (len, len), (500, 500)], NUM_BLOCKS, 5).seqs().to_vec();
                    let mut row0 = 0;
                    for (seq, (context, rows)) in tables.iter_mut().zip([(37, 5), (done + rows, rows), (500, 1)]) {
                        (seq.row0, seq.context_len, seq.num_rows) = (row0, context, rows);
                        row0 += rows;
                    }
                    let batch = PagedBatch::new(16, tables).unwrap();
                    let mut step = others.vec(5 * width);
                    step.extend(&input[done * width..(done + rows) * width]);
                    step.extend(others.vec(width));
                    let (_, all) = model.step(&ctx, &mut kv, &batch, &step);
                    out.extend(bits(&all[5 * h * c..(5 + rows) * h * c]));
                    done += rows;
                }
                assert_eq!(done, len);
                let differ = out.iter().zip(&whole).position(|(a, b)| a != b);
                assert!(differ.is_none(), "{model:?} {isa}: row {}", differ.unwrap() / (h * c));
            }
        }
    }
}

#[test]
fn queries_and_keys_are_normalised_clamped_and_rotated() {
    let layout = QkvLayout { num_heads: 4, num_kv_heads: 2, head_dim: 6 };
    let (t, c) = (19, 6);
    let ctx = ctx(Isa::detect(), 2);
    let batch = batch(8, &[(30, 19)], NUM_BLOCKS, 3);
    let mut numbers = Numbers(5);
    let input: Vec<f32> = numbers.vec(t * layout.width()).iter().map(|x| x * 3.0).collect();
    let (wide_q, wide_k) = (numbers.vec(24), numbers.vec(12));
    let table = RopeTable::new(&rope(false), 4, 64).unwrap();
    for full in [false, true] {
        let (lq, lk) = if full { (24, 12) } else { (6, 6) };
        let query = tensor(&ctx, &[lq], DType::F32, &wide_q[..lq]);
        let key = tensor(&ctx, &[lk], DType::F32, &wide_k[..lk]);
        let norm = if full {
            QkNormWeights::FullWidth { query: &query, key: &key }
        } else {
            QkNormWeights::PerHead { query: &query, key: &key }
        };
        let mut qkv = tensor(&ctx, &[t, layout.width()], DType::F32, &input);
        let shape = KvShape { num_blocks: NUM_BLOCKS, block_size: 8, num_kv_heads: 2, head_dim: 6, dtype: DType::F32 };
        let mut kv = PagedKv::new(&Arena::host("kv", Bytes(1 << 20)).unwrap(), shape).unwrap();
        let post = QkvPost { layout, norm, eps: 1e-5, clip: Some(0.75), rope: &table };
        rope_and_store(&ctx, &mut qkv, &post, &mut kv, &batch).unwrap();

        for row in 0..t {
            let mut x: Vec<f64> = input[row * 48..(row + 1) * 48].iter().map(|&x| x as f64).collect();
            for (part, weight) in [(0..24, &wide_q), (24..36, &wide_k)] {
                let step = if full { part.len() } else { c };
                for start in part.step_by(step) {
                    let mean = x[start..start + step].iter().map(|x| x * x).sum::<f64>() / step as f64;
                    for i in 0..step {
                        x[start + i] *= weight[i] as f64 / (mean + 1e-5).sqrt();
                    }
                }
            }
            x.iter_mut().for_each(|x| *x = x.clamp(-0.75, 0.75));
            for head in 0..6 {
                for i in 0..2 {
                    let angle = (11 + row) as f64 * 10_000f64.powf(-(i as f64) / 2.0);
                    let (a, b) = (x[head * c + i], x[head * c + i + 2]);
                    x[head * c + i] = a * angle.cos() - b * angle.sin();
                    x[head * c + i + 2] = b * angle.cos() + a * angle.sin();
                }
            }
            for (got, expected) in qkv.f32()[row * 48..(row + 1) * 48].iter().zip(&x) {
                assert!((*got as f64 - expected).abs() < 1e-5, "row {row}: {got} for {expected}");
            }
        }
    }
}

#[test]
fn meta_takes_the_same_memory_and_records_the_same_calls() {
    let model = Model::new(6, 3, 32, DType::BF16);
    let batch = batch(16, &[(1500, 1), (40, 40), (700, 100)], NUM_BLOCKS, 2);
    let run = |ctx: &Ctx, arena: &Arena| {
        let shape = KvShape { ..model.kv().shape() };
        let mut kv = PagedKv::new(arena, shape).unwrap();
        let mut qkv = ctx.empty(&[141, model.layout.width()], DType::BF16).unwrap();
        if !ctx.is_meta() {
            qkv.bytes_mut().fill(0);
        }
        let table = RopeTable::new(&rope(false), 32, 2000).unwrap();
        let post = QkvPost { layout: model.layout, norm: QkNormWeights::None, eps: 1e-6, clip: None, rope: &table };
        rope_and_store(ctx, &mut qkv, &post, &mut kv, &batch).unwrap();
        let _out = attention(ctx, &qkv, model.layout, &kv, &batch, 0.1, None).unwrap();
        assert_eq!(arena.in_use(), PagedKv::bytes(shape));
        (ctx.take_log(), ctx.arena().peak())
    };
    let (real, meta) = (ctx(Isa::detect(), 3), Ctx::meta());
    real.start_log();
    let (real, meta) = (run(&real, &Arena::host("kv", Bytes(64 << 20)).unwrap()), run(&meta, &Arena::meta("kv")));
    assert_eq!(real, meta);
    let pairs = 1500 + 40 * 41 / 2 + (601..=700).sum::<u64>();
    assert_eq!(real.0[1].flops.bound, 4 * pairs * 6 * 32);
}

#[test]
fn what_does_not_fit_is_refused() {
    let ctx = ctx(Isa::detect(), 1);
    let model = Model::new(4, 2, 16, DType::BF16);
    let kv = model.kv();
    let refused = |dims: &[usize], batch: &PagedBatch, window| {
        let qkv = ctx.empty(dims, DType::BF16).unwrap();
        attention(&ctx, &qkv, model.layout, &kv, batch, 1.0, window).err().unwrap().to_string()
    };
    let fine = batch(16, &[(3, 3)], NUM_BLOCKS, 1);
    assert_eq!(refused(&[3, 127], &fine, None), "attention: qkv is BF16 [3, 127], expected BF16 [3, 128]");
    assert_eq!(refused(&[3, 128], &fine, Some(0)), "attention: sliding_window is 0, expected at least 1");
    let other = batch(8, &[(3, 3)], NUM_BLOCKS, 1);
    assert_eq!(refused(&[3, 128], &other, None), "attention: batch.block_size is 8, expected 16");
    let beyond = batch(16, &[(3, 3)], 1000, 500);
    let message = "attention: batch.block_table is block 500, expected blocks below 211";
    assert_eq!(refused(&[3, 128], &beyond, None), message);
}
