//! Parts of every golden model, put together again, are the whole.

use std::ops::Range;
use std::path::{Path, PathBuf};

use half::bf16;
use moesaic_device::{Arena, Ctx, Pool, Tensor};
use moesaic_kernels::experts::{ExpertWeights, RowsPerExpert, experts};
use moesaic_kernels::paged::{PagedBatch, PagedSeq};
use moesaic_kernels::rope::RopeTable;
use moesaic_plan::{ExpertId, Slice};
use moesaic_spec::model::tensors::{FusedProj, Proj, Role};
use moesaic_spec::{Activation, Attention, Bytes, DType, Ffn, ModelSpec, Moe};

use super::{LoadDType, WeightSource};
use crate::checkpoint::{Checkpoint, RandomWeights, write_random};
use crate::kv_cache::LayerCache;
use crate::layers::{AttentionStep, Embedding, GqaAttention, MlaAttention, attention_of};
use crate::{KvCache, ModelError};

/// Where the order of a sum in F32 differs, and nothing else.
const SUM_LIMIT: f64 = 1e-6;
/// Where FP8 blocks that a part does not begin with are dequantised: each weight of three matrices is rounded to BF16.
const FP8_LIMIT: f64 = 3.0 / 512.0;

const NUM_ROWS: usize = 8;

struct Golden {
    name: String,
    folder: PathBuf,
    spec: ModelSpec,
    checkpoint: Checkpoint,
}

impl Golden {
    fn open(folder: PathBuf) -> Golden {
        let config = std::fs::read_to_string(folder.join("config.json")).unwrap();
        let spec = ModelSpec::from_config_json(&config, "config.json").unwrap();
        let checkpoint = Checkpoint::open(&folder).unwrap();
        checkpoint.check(&spec).unwrap();
        let name = folder.file_name().unwrap().to_str().unwrap().to_owned();
        Golden { name, folder, spec, checkpoint }
    }

    fn named(name: &str) -> Golden {
        Golden::open(goldens().join(name))
    }

    fn all() -> Vec<Golden> {
        let folders = std::fs::read_dir(goldens()).unwrap().map(|entry| entry.unwrap().path());
        let mut all: Vec<Golden> =
            folders.filter(|path| path.join("golden.safetensors").exists()).map(Golden::open).collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        assert!(all.len() >= 20, "the goldens are missing");
        all
    }
}

fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens")
}

/// What a test loads from and computes with.
struct Bench<'a> {
    golden: &'a Golden,
    dtype: LoadDType,
    pool: Pool,
    ctx: Ctx,
}

impl<'a> Bench<'a> {
    fn new(golden: &'a Golden, dtype: LoadDType) -> Bench<'a> {
        Bench { golden, dtype, pool: Pool::new(1).unwrap(), ctx: Ctx::cpu(1, 8 << 20).unwrap() }
    }

    /// Loads something from the checkpoint, and sees that `Meta` knows its memory.
    fn load<T>(&self, load: impl Fn(&WeightSource) -> Result<T, ModelError>) -> T {
        let (arena, meta) = (Arena::host("weight", Bytes(1 << 20)).unwrap(), Arena::meta("weight"));
        let Golden { spec, checkpoint, name, .. } = self.golden;
        let loaded = load(&WeightSource::checkpoint(spec, self.dtype, &arena, &self.pool, checkpoint)).unwrap();
        let _counted = load(&WeightSource::meta(spec, self.dtype, &meta)).unwrap();
        assert_eq!((arena.peak(), arena.in_use()), (meta.peak(), meta.in_use()), "{name}");
        loaded
    }

    fn compute_dtype(&self) -> DType {
        WeightSource::meta(&self.golden.spec, self.dtype, &Arena::meta("weight")).compute_dtype()
    }

    fn limit(&self) -> f64 {
        let keeps_fp8 = self.dtype == LoadDType::Auto && self.golden.spec.dtype == DType::F8E4M3;
        if keeps_fp8 { FP8_LIMIT } else { SUM_LIMIT }
    }

    /// Random rows of the model's width.
    fn x(&self) -> Tensor {
        let dims = [NUM_ROWS, self.golden.spec.hidden_size];
        let mut x = self.ctx.empty(&dims, self.compute_dtype()).unwrap();
        let mut state = 1u32;
        let values = (0..dims[0] * dims[1]).map(|_| {
            state = state.wrapping_mul(747_796_405).wrapping_add(2_891_336_453);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        });
        match x.dtype() {
            DType::F32 => x.f32_mut().iter_mut().zip(values).for_each(|(to, x)| *to = x),
            _ => x.bf16_mut().iter_mut().zip(values).for_each(|(to, x)| *to = bf16::from_f32(x)),
        }
        x
    }

    /// Parts of a sum against the whole.
    fn check_sum(&self, what: &str, parts: &[Tensor], whole: &Tensor) {
        let sum = (0..whole.num_elements()).map(|i| parts.iter().map(|part| f64::from(part.f32()[i])).sum::<f64>());
        let norm = |x: f64| x * x;
        let error: f64 = sum.zip(whole.f32()).map(|(a, &b)| norm(a - f64::from(b))).sum();
        let total: f64 = whole.f32().iter().map(|&x| norm(f64::from(x))).sum();
        let error = (error / total).sqrt();
        assert!(error < self.limit(), "{}, {:?}, {what}: {error:e}", self.golden.name, self.dtype);
    }
}

/// In F32, and as stored where that is something else.
fn each_bench(test: impl Fn(&Bench)) {
    for golden in Golden::all() {
        for dtype in [LoadDType::Float32, LoadDType::Auto] {
            test(&Bench::new(&golden, dtype));
        }
    }
}

/// All ways to cut `0..n` into ranges that follow each other.
fn compositions(n: usize) -> Vec<Vec<Range<usize>>> {
    let cuts = |set: usize| (1..n).filter(move |&at| set >> (at - 1) & 1 == 1);
    let ranges = |set: usize| {
        let ends = cuts(set).chain([n]);
        let mut start = 0;
        ends.map(|end| std::mem::replace(&mut start, end)..end).collect()
    };
    (0..1 << (n - 1)).map(ranges).collect()
}

/// Attention of every rank on the same rows, the sums of its norm exchanged.
fn attend(bench: &Bench, parts: &[Range<usize>]) -> Vec<Tensor> {
    let (spec, ctx, dtype) = (&bench.golden.spec, &bench.ctx, bench.compute_dtype());
    let rotary_dim = match &spec.attention {
        Attention::Gqa(gqa) => gqa.head_dim,
        Attention::Mla(mla) => mla.qk_rope_head_dim,
    };
    let rope = RopeTable::new(&spec.rope, rotary_dim, 64).unwrap();
    let seq = |row0, num_rows, block| PagedSeq { row0, num_rows, context_len: num_rows, block_table: vec![block] };
    let batch = PagedBatch::new(8, vec![seq(0, 5, 1), seq(5, NUM_ROWS - 5, 0)]).unwrap();
    let step = AttentionStep { batch: &batch, rope: &rope, out_dtype: DType::F32 };
    let cache = |heads: &Range<usize>| {
        let local = attention_of(&spec.attention, heads.clone());
        let mut kv = KvCache::new(&Arena::host("kv", Bytes(1 << 20)).unwrap(), &local, 1, dtype, 2, 8).unwrap();
        kv.layers.remove(0)
    };
    let x = bench.x();
    let layer = spec.layers.len() - 1;
    match &spec.attention {
        Attention::Gqa(gqa) => {
            let ranks: Vec<GqaAttention> = parts
                .iter()
                .map(|heads| bench.load(|source| GqaAttention::load(source, layer, gqa, heads.clone())))
                .collect();
            let mut projected: Vec<_> = ranks.iter().map(|rank| rank.project(ctx, &x).unwrap()).collect();
            if projected[0].norm_sums.is_some() {
                let mut totals = vec![0.0; 2 * NUM_ROWS];
                let sums = |projected: &mut crate::layers::Projected| projected.norm_sums.take().unwrap();
                let mut all: Vec<Tensor> = projected.iter_mut().map(sums).collect();
                all.iter().for_each(|sums| totals.iter_mut().zip(sums.f32()).for_each(|(total, sum)| *total += sum));
                for (projected, mut sums) in projected.iter_mut().zip(all.drain(..)) {
                    sums.f32_mut().copy_from_slice(&totals);
                    projected.norm_sums = Some(sums);
                }
            }
            let halves = ranks.iter().zip(projected).zip(parts);
            let attend = |((rank, projected), heads): ((&GqaAttention, _), &Range<usize>)| {
                let LayerCache::Gqa(mut kv) = cache(heads) else { panic!("keys and values") };
                rank.attend(ctx, projected, &mut kv, step).unwrap()
            };
            halves.map(attend).collect()
        }
        Attention::Mla(mla) => {
            let attend = |heads: &Range<usize>| {
                let rank = bench.load(|source| MlaAttention::load(source, layer, mla, heads.clone()));
                let LayerCache::Mla(mut latent) = cache(heads) else { panic!("latents") };
                rank.forward(ctx, &x, &mut latent, step).unwrap()
            };
            parts.iter().map(attend).collect()
        }
    }
}

#[test]
fn attention_of_some_heads_adds_up_to_that_of_all() {
    each_bench(|bench| {
        let num_heads = bench.golden.spec.attention.num_heads();
        let whole = attend(bench, std::slice::from_ref(&(0..num_heads))).remove(0);
        for parts in compositions(num_heads) {
            bench.check_sum(&format!("heads {parts:?}"), &attend(bench, &parts), &whole);
        }
    });
}

#[test]
fn logits_of_some_rows_are_those_rows_of_the_logits() {
    each_bench(|bench| {
        let (ctx, x, tied) = (&bench.ctx, bench.x(), bench.golden.spec.tie_word_embeddings);
        let load =
            |vocab, embeds, has_head| bench.load(|source| Embedding::load(source, tied, vocab, embeds, has_head));
        let whole = load(Slice::WHOLE, true, true);
        let logits = whole.logits(ctx, &x).unwrap();
        let (vocab_size, ids) = (logits.dims()[1], [0, 95, 7, 7, 40]);
        let embedded = whole.embed(ctx, &ids).unwrap();
        for count in [1, 2, 3, 5, 7] {
            let mut next = 0;
            for idx in 0..count {
                let part = load(Slice { idx, count }, true, true);
                assert_eq!(part.embed(ctx, &ids).unwrap().f32(), embedded.f32(), "{}", bench.golden.name);
                let some = part.logits(ctx, &x).unwrap();
                let width = some.dims()[1];
                for (some, all) in some.f32().chunks(width).zip(logits.f32().chunks(vocab_size)) {
                    assert_eq!(some, &all[next..next + width], "{}, part {idx} of {count}", bench.golden.name);
                }
                next += width;
            }
            assert_eq!(next, vocab_size);
        }
        let ends = [load(Slice::WHOLE, true, false), load(Slice::WHOLE, false, true)];
        assert_eq!(ends[0].embed(ctx, &ids).unwrap().f32(), embedded.f32());
        assert_eq!(ends[1].logits(ctx, &x).unwrap().f32(), logits.f32());
    });
}

fn slices(count: usize) -> Vec<Slice> {
    (0..count).map(|idx| Slice { idx, count }).collect()
}

/// `x` through one expert, in F32.
fn one(bench: &Bench, weights: &ExpertWeights) -> Tensor {
    experts(&bench.ctx, &bench.x(), RowsPerExpert::Known(&[0, NUM_ROWS]), weights, DType::F32).unwrap()
}

#[test]
fn a_cut_mlp_adds_up_to_the_whole() {
    let mut num_mlps = 0;
    let check = |bench: &Bench, role: &dyn Fn(Proj) -> Role, activation: Activation| {
        let load = |slice| one(bench, &bench.load(|source| source.mlp(role, activation, slice)));
        let whole = load(Slice::WHOLE);
        for count in [2, 3, 8] {
            let parts: Vec<Tensor> = slices(count).into_iter().map(load).collect();
            bench.check_sum(&format!("{:?} in {count} parts", role(Proj::Up)), &parts, &whole);
        }
    };
    for golden in Golden::all() {
        for dtype in [LoadDType::Float32, LoadDType::Auto] {
            let bench = Bench::new(&golden, dtype);
            for (layer, ffn) in golden.spec.layers.iter().enumerate() {
                match ffn {
                    Ffn::Dense(mlp) => check(&bench, &|proj| Role::Dense(layer, proj), mlp.activation),
                    Ffn::Moe(moe) if moe.shared_intermediate_size > 0 => {
                        check(&bench, &|proj| Role::Shared(layer, proj), moe.activation);
                    }
                    Ffn::Moe(_) => continue,
                }
                num_mlps += 1;
            }
        }
    }
    assert!(num_mlps >= 20, "{num_mlps}");
}

/// The last layer with experts.
fn moe_of(spec: &ModelSpec) -> (usize, &Moe) {
    let layers = spec.layers.iter().enumerate().rev();
    layers.filter_map(|(layer, ffn)| Some((layer, ffn.as_moe()?))).next().unwrap()
}

/// `x` through each expert of a group, one after the other.
fn each(bench: &Bench, weights: ExpertWeights) -> Vec<Tensor> {
    let activation = weights.activation;
    let alone = |expert| one(bench, &ExpertWeights { experts: vec![expert], activation });
    weights.experts.into_iter().map(alone).collect()
}

#[test]
fn some_experts_or_parts_of_experts_are_those_of_the_whole() {
    each_bench(|bench| {
        let (layer, moe) = moe_of(&bench.golden.spec);
        let load = |which: &[u32], slice| {
            let which: Vec<ExpertId> = which.iter().copied().map(ExpertId).collect();
            each(bench, bench.load(|source| source.routed_experts(layer, moe, &which, slice)))
        };
        let all: Vec<u32> = (0..moe.num_experts as u32).collect();
        let whole = load(&all, Slice::WHOLE);
        let odd: Vec<u32> = all.iter().copied().filter(|e| e % 2 == 1).collect();
        for which in [&all[2..3], &odd, &all[1..], &[]] {
            for (&expert, y) in which.iter().zip(load(which, Slice::WHOLE)) {
                let name = &bench.golden.name;
                assert_eq!(y.f32(), whole[expert as usize].f32(), "{name}: expert {expert} of {which:?}");
            }
        }
        for count in [2, 3] {
            let mut parts: Vec<Vec<Tensor>> = slices(count).into_iter().map(|slice| load(&all, slice)).collect();
            for (expert, whole) in whole.iter().enumerate().rev() {
                let parts: Vec<Tensor> = parts.iter_mut().map(|part| part.pop().unwrap()).collect();
                bench.check_sum(&format!("expert {expert} in {count} parts"), &parts, whole);
            }
        }
    });
}

/// Random weights cut are those of the random checkpoint cut, to the bit.
#[test]
fn parts_of_random_weights_are_those_of_a_random_checkpoint() {
    let folder = Scratch::new("random");
    let weights = RandomWeights { seed: 3 };
    let spec = Golden::named("olmoe-clip").spec;
    write_random(&folder.0, &spec, weights, 1 << 30, |_| ()).unwrap();
    let golden = Golden::open(folder.0.clone());
    let bench = Bench::new(&golden, LoadDType::Auto);
    let (layer, moe) = moe_of(&spec);
    let which = [ExpertId(1), ExpertId(6)];
    let parts = |source: &WeightSource| -> Result<Vec<Tensor>, ModelError> {
        let experts = source.routed_experts(layer, moe, &which, Slice { idx: 1, count: 3 })?;
        let head = Embedding::load(source, false, Slice { idx: 2, count: 5 }, false, true)?;
        let mut parts = each(&bench, experts);
        parts.push(head.logits(&bench.ctx, &bench.x())?);
        parts.push(source.vector(&[source.cols(Role::QNorm(0), 10..20), source.whole(Role::KNorm(0))])?);
        Ok(parts)
    };
    let arenas = [(); 2].map(|()| Arena::host("weight", Bytes(1 << 20)).unwrap());
    let dtype = LoadDType::Auto;
    let random = parts(&WeightSource::random(&spec, dtype, &arenas[0], &bench.pool, &weights)).unwrap();
    let stored = WeightSource::checkpoint(&spec, dtype, &arenas[1], &bench.pool, &golden.checkpoint);
    let stored = parts(&stored).unwrap();
    assert_eq!((random.len(), arenas[0].peak()), (4, arenas[1].peak()));
    assert!(random.iter().zip(&stored).all(|(a, b)| a.f32() == b.f32()));
}

/// A folder that is gone after the test.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Scratch {
        let folder = std::env::temp_dir().join(format!("moesaic-load-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&folder);
        std::fs::create_dir(&folder).unwrap();
        Scratch(folder)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Whoever takes a broken element is told which; whoever does not, does not read it.
#[test]
fn only_what_is_taken_is_read() {
    let folder = Scratch::new("broken");
    let golden = Golden::named("qwen3_moe-fused");
    let (layer, moe) = moe_of(&golden.spec);
    let (d, f) = (golden.spec.hidden_size, moe.intermediate_size);
    std::fs::copy(golden.folder.join("config.json"), folder.0.join("config.json")).unwrap();
    let mut file = std::fs::read(golden.folder.join("model.safetensors")).unwrap();
    let header_len = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let header: serde_json::Value = serde_json::from_slice(&file[8..8 + header_len]).unwrap();
    let start = |name: &str| 8 + header_len + header[name]["data_offsets"][0].as_u64().unwrap() as usize;
    let [first, down] = [FusedProj::GateUp, FusedProj::Down].map(|proj| golden.spec.fused_expert_name(layer, proj));
    // Expert 1: up's row 5, column 3; down's row 2, hidden value 20.
    let broken = [(first, (2 * f + f + 5) * d + 3), (down, (d + 2) * f + 20)];
    for (name, element) in &broken {
        let at = start(name) + 2 * element;
        file[at..at + 2].fill(0xff);
    }
    std::fs::write(folder.0.join("model.safetensors"), file).unwrap();
    let broken_golden = Golden::open(folder.0.clone());
    let pool = Pool::new(1).unwrap();
    let load = |which: &[u32], slice| {
        let which: Vec<ExpertId> = which.iter().copied().map(ExpertId).collect();
        let arena = Arena::host("weight", Bytes(1 << 20)).unwrap();
        let Golden { spec, checkpoint, .. } = &broken_golden;
        let source = WeightSource::checkpoint(spec, LoadDType::Auto, &arena, &pool, checkpoint);
        source.routed_experts(layer, moe, &which, slice).map(|_| ())
    };
    load(&[0, 2], Slice::WHOLE).unwrap();
    let path = folder.0.join("model.safetensors");
    let sentence = |(name, element): &(String, usize)| {
        format!("{}: tensor '{name}': element {element} is not a finite number", path.display())
    };
    assert_eq!(load(&[0, 1], Slice::WHOLE).unwrap_err().to_string(), sentence(&broken[0]));
    // Of three parts of eight hidden values the first has row 5 of up, the last the hidden value 20.
    assert_eq!(load(&[1], Slice { idx: 0, count: 3 }).unwrap_err().to_string(), sentence(&broken[0]));
    load(&[1], Slice { idx: 1, count: 3 }).unwrap();
    assert_eq!(load(&[1], Slice { idx: 2, count: 3 }).unwrap_err().to_string(), sentence(&broken[1]));
}

/// The same checkpoint with a layer's experts in one tensor, as far as `fused` says.
fn respell(golden: &Golden, layer: usize, fused: &[FusedProj], folder: &Path) -> Golden {
    use safetensors::tensor::{Dtype, TensorView};
    let moe = golden.spec.layers[layer].as_moe().unwrap();
    let bytes_of = |name: &str| golden.checkpoint.get(name).unwrap().bytes;
    let mut joined: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::new();
    let mut gone: Vec<String> = Vec::new();
    for &proj in fused {
        let projs = moe.activation.projs().iter().filter(|&&p| (p == Proj::Down) == (proj == FusedProj::Down));
        let mut bytes = Vec::new();
        for expert in 0..moe.num_experts {
            for &proj in projs.clone() {
                gone.push(golden.spec.name_of(Role::Expert { layer, expert, proj }));
                bytes.extend(bytes_of(gone.last().unwrap()));
            }
        }
        let shape = golden.spec.fused_expert_shape(layer, proj).unwrap().to_vec();
        joined.push((golden.spec.fused_expert_name(layer, proj), shape, bytes));
    }
    let kept = golden.checkpoint.names().filter(|name| !gone.iter().any(|gone| gone == name)).map(|name| {
        let stored = golden.checkpoint.get(name).unwrap();
        (name.to_owned(), stored.shape.to_vec(), stored.bytes.to_vec())
    });
    let tensors: Vec<_> = kept.chain(joined).collect();
    let views = tensors.iter().map(|(name, shape, bytes)| {
        (name, TensorView::new(Dtype::BF16, shape.clone(), bytes).expect("all tensors are BF16"))
    });
    safetensors::serialize_to_file(views, None, &folder.join("model.safetensors")).unwrap();
    std::fs::copy(golden.folder.join("config.json"), folder.join("config.json")).unwrap();
    Golden::open(folder.to_path_buf())
}

#[test]
fn experts_are_the_same_in_every_spelling() {
    for name in ["paper", "qwen3_moe"] {
        let golden = Golden::named(name);
        let (layer, moe) = moe_of(&golden.spec);
        let load = |golden: &Golden| {
            let bench = Bench::new(golden, LoadDType::Auto);
            let (which, slice) = ([ExpertId(0), ExpertId(3)], Slice { idx: 1, count: 2 });
            each(&bench, bench.load(|source| source.routed_experts(layer, moe, &which, slice)))
        };
        let expected = load(&golden);
        for fused in [&[FusedProj::GateUp, FusedProj::Down][..], &[FusedProj::GateUp], &[FusedProj::Down]] {
            let folder = Scratch::new(&format!("{name}-{}", fused.len()));
            let got = load(&respell(&golden, layer, fused, &folder.0));
            assert!(got.iter().zip(&expected).all(|(a, b)| a.f32() == b.f32()), "{name} {fused:?}");
        }
    }
}

#[test]
fn progress_counts_the_bytes_that_are_taken() {
    let golden = Golden::named("mixtral-fused");
    let (layer, moe) = moe_of(&golden.spec);
    let (pool, arena) = (Pool::new(1).unwrap(), Arena::host("weight", Bytes(1 << 20)).unwrap());
    let taken = std::cell::Cell::new(0);
    let source = WeightSource::checkpoint(&golden.spec, LoadDType::Auto, &arena, &pool, &golden.checkpoint);
    let source = source.on_progress(|bytes| taken.set(bytes));
    source.routed_experts(layer, moe, &[ExpertId(3)], Slice { idx: 0, count: 2 }).unwrap();
    let values = 3 * golden.spec.hidden_size * moe.intermediate_size / 2;
    assert_eq!(taken.get(), 2 * values as u64);
}
