//! What should be measured on a machine, so that a model's iterations are priced from measurements.
//!
//! The list is what [`Iterations`](crate::iteration::Iterations) would ask for: the model's own products, attention cores and
//! experts ([`Parts::trace`]), at sizes of a [`Grid`]. It begins with the ends of the grid and then halves what is between, so
//! that a measurement that is interrupted covers all of it, coarsely.

use std::collections::HashSet;

use moesaic_spec::ModelSpec;

use crate::PlannerError;
use crate::cost::{Op, Precision};
use crate::iteration::Layout;
use crate::iteration::parts::{Part, PartOp, Parts};
use crate::network::LinkKind;

/// At which sizes.
#[derive(Clone, Debug, PartialEq)]
pub struct Grid {
    /// Most rows of a step.
    pub max_tokens: u64,
    /// Most sequences of a step.
    pub max_seqs: u64,
    /// Most tokens that a sequence sees.
    pub max_context: u64,
    /// Types of weights and caches, the most wanted first.
    pub types: Vec<Precision>,
}

/// Something to measure.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Wanted {
    /// On one rank.
    Compute(Op),
    /// Between ranks.
    Link(Link),
}

/// A message, or what ranks do together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    /// What.
    pub kind: LinkKind,
    /// How many ranks take part.
    pub ranks: u64,
    /// Bytes of the message; of the buffer of one rank.
    pub bytes: u64,
}

/// The smallest context that is measured: below it, attention costs what its call costs.
const MIN_CONTEXT: u64 = 64;
/// Sizes of messages.
const LINK_BYTES: [u64; 2] = [1 << 10, 64 << 20];
/// Ranks of the sums that are measured.
const SUM_RANKS: [u64; 2] = [2, 4];

/// All that a model asks for when it is spread like any of these layouts, without duplicates: what is wanted most comes first.
///
/// # Errors
/// [`PlannerError`]: the model cannot be cut like this.
pub fn wanted(model: &ModelSpec, layouts: &[Layout], grid: &Grid) -> Result<Vec<Wanted>, PlannerError> {
    let mut found: Vec<(usize, u32, Wanted)> = Vec::new();
    for layout in layouts {
        let parts = Parts::trace(model, &layout.cut())?;
        for (rank, &precision) in grid.types.iter().enumerate() {
            let ops = ops_of(model, layout, &parts, grid, precision);
            found.extend(ops.into_iter().map(|(level, op)| (rank, level, Wanted::Compute(op))));
        }
    }
    found.extend(links().into_iter().map(|(level, link)| (0, level, Wanted::Link(link))));
    // Stable: within a level, in the order of the model.
    found.sort_by_key(|&(rank, level, _)| (rank, level));
    let mut seen = HashSet::new();
    Ok(found.into_iter().map(|(.., wanted)| wanted).filter(|wanted| seen.insert(wanted.to_string())).collect())
}

/// Ops of one layout in one type, each with how early it is needed.
fn ops_of(model: &ModelSpec, layout: &Layout, parts: &Parts, grid: &Grid, precision: Precision) -> Vec<(u32, Op)> {
    let mut ops = Vec::new();
    let rows = doublings(1, grid.max_tokens);
    for part in Part::ALL {
        for op in parts.ops(part) {
            match *op {
                PartOp::Gemm { rows: m, n, k } => {
                    // Routers and heads are never quantised; a head has rows for sequences only.
                    let quantised = !matches!(precision, Precision::F32 | Precision::Bf16);
                    if quantised && matches!(part, Part::Route | Part::Head) {
                        continue;
                    }
                    let most = if part == Part::Head { grid.max_seqs } else { grid.max_tokens };
                    for &(level, rows) in rows.iter().filter(|(_, rows)| *rows <= most) {
                        let m = m.at(rows as f64).round();
                        ops.push((level, Op::Gemm { m, n: n as f64, k: k as f64, weights: precision }));
                    }
                }
                PartOp::AttentionCore { .. } | PartOp::MlaCore { .. } => {
                    let Some(kv) = cache_type(precision) else { continue };
                    for &(level, seqs) in &doublings(1, grid.max_seqs) {
                        for &(of_context, context) in &doublings(MIN_CONTEXT, grid.max_context) {
                            ops.push((level.max(of_context), op.decode(seqs as f64, context as f64, kv)));
                        }
                    }
                    for &(level, tokens) in &doublings(MIN_CONTEXT, grid.max_tokens.min(grid.max_context)) {
                        ops.push((level, op.prefill(1.0, tokens as f64, tokens as f64, kv)));
                    }
                }
                PartOp::RoutedExperts { .. } => {
                    let Some(moe) = model.layers.iter().find_map(|ffn| ffn.as_moe()) else { continue };
                    let ranks = layout.expert_ranks() as f64;
                    ops.extend(rows.iter().map(|&(level, rows)| {
                        let op = Op::Experts {
                            tokens: rows as f64 * ranks,
                            hidden: model.hidden_size as f64,
                            intermediate: moe.intermediate_size as f64,
                            top_k: moe.top_k as f64,
                            experts: (moe.num_experts + layout.redundant_experts) as f64,
                            tp: layout.expert_cut() as f64,
                            ep: ranks,
                            weights: precision,
                            matrices: moe.activation.matrices(),
                            skew: 0.0,
                        };
                        (level, op)
                    }));
                }
                // Priced by the bytes that they move.
                PartOp::Stream { .. } => {}
            }
        }
    }
    ops
}

fn links() -> Vec<(u32, Link)> {
    let sizes = doublings(LINK_BYTES[0], LINK_BYTES[1]);
    let of = |kind, ranks| sizes.iter().map(move |&(level, bytes)| (level, Link { kind, ranks, bytes }));
    let sums = SUM_RANKS.into_iter().flat_map(|ranks| of(LinkKind::AllReduce, ranks));
    of(LinkKind::SendReceive, 2).chain(sums).collect()
}

/// What keys and values are held in beside weights of a type; `None` where another type has the same.
fn cache_type(weights: Precision) -> Option<Precision> {
    matches!(weights, Precision::F32 | Precision::Bf16).then_some(weights)
}

/// `from`, twice as many, and so on, and `to`; each with its level: 0 for both ends, 1 for what halves the list, and so on.
/// Only `to` where it is below `from`.
fn doublings(from: u64, to: u64) -> Vec<(u32, u64)> {
    let mut sizes: Vec<u64> =
        std::iter::successors(Some(from), |size| size.checked_mul(2)).take_while(|&size| size < to).collect();
    sizes.push(to);
    let mut levels = vec![0; sizes.len()];
    halve(&mut levels, 0, sizes.len() - 1, 1);
    levels.into_iter().zip(sizes).collect()
}

/// Gives what lies between two places its levels, the middle first.
fn halve(levels: &mut [u32], low: usize, high: usize, level: u32) {
    if high - low < 2 {
        return;
    }
    let middle = (low + high) / 2;
    levels[middle] = level;
    halve(levels, low, middle, level + 1);
    halve(levels, middle, high, level + 1);
}

impl Wanted {
    /// The name of its table, and the parameters that say what it is, in the order of the table's columns. Tables of the ops of
    /// GPUs' libraries have the same names and columns; what those cannot say has names and columns of its own.
    ///
    /// # Panics
    /// For an op that [`wanted`] never asks for.
    pub fn columns(&self) -> (&'static str, Vec<(&'static str, String)>) {
        let text = |value: f64| value.to_string();
        match *self {
            Wanted::Compute(Op::Gemm { m, n, k, weights }) => {
                let columns = [("dtype", name(weights).into()), ("m", text(m)), ("n", text(n)), ("k", text(k))];
                ("gemm", columns.into())
            }
            Wanted::Compute(Op::Experts {
                tokens,
                hidden,
                intermediate,
                top_k,
                experts,
                tp,
                ep,
                weights,
                matrices,
                ..
            }) => {
                let columns = [
                    ("dtype", name(weights).into()),
                    ("tokens", text(tokens)),
                    ("h", text(hidden)),
                    ("inter", text(intermediate)),
                    ("topk", text(top_k)),
                    ("E", text(experts)),
                    ("tp", text(tp)),
                    ("ep", text(ep)),
                    ("dist", "uniform".into()),
                ];
                (if matrices == 3 { "moe" } else { "moe_ungated" }, columns.into())
            }
            Wanted::Compute(Op::AttentionDecode { seqs, context, heads, kv_heads, head_dim, kv }) => {
                let columns = [
                    ("batch", text(seqs)),
                    ("kv_len", text(context)),
                    ("q_heads", heads.to_string()),
                    ("kv_heads", kv_heads.to_string()),
                    ("head_dim", head_dim.to_string()),
                    ("kv", name(kv).into()),
                ];
                ("attn_decode", columns.into())
            }
            Wanted::Compute(Op::AttentionPrefill { seqs, context, heads, kv_heads, head_dim, kv, .. }) => {
                let columns = [
                    ("batch", text(seqs)),
                    ("seq", text(context)),
                    ("q_heads", heads.to_string()),
                    ("kv_heads", kv_heads.to_string()),
                    ("head_dim", head_dim.to_string()),
                    ("kv", name(kv).into()),
                ];
                ("attn_prefill", columns.into())
            }
            Wanted::Compute(Op::MlaDecode { seqs, context, heads, latent, rope, kv }) => {
                ("mla_decode", mla_columns(seqs, ("kv_len", context), [heads, latent, rope], kv))
            }
            Wanted::Compute(Op::MlaPrefill { seqs, context, heads, latent, rope, kv, .. }) => {
                ("mla_prefill", mla_columns(seqs, ("seq", context), [heads, latent, rope], kv))
            }
            Wanted::Compute(op @ (Op::Stream { .. } | Op::ExpertsDeepEp { .. })) => panic!("{op:?} has no table"),
            Wanted::Link(Link { kind, ranks, bytes }) => {
                (kind.table(), [("gpus", ranks.to_string()), ("bytes", bytes.to_string())].into())
            }
        }
    }
}

/// Names of all tables that [`Wanted::columns`] may give.
pub const TABLES: &[&str] = &[
    "gemm",
    "moe",
    "moe_ungated",
    "attn_decode",
    "attn_prefill",
    "mla_decode",
    "mla_prefill",
    "send_receive",
    "all_reduce",
];

fn mla_columns(
    seqs: f64,
    (length, tokens): (&'static str, f64),
    [heads, latent, rope]: [u64; 3],
    kv: Precision,
) -> Vec<(&'static str, String)> {
    let columns = [
        ("batch", seqs.to_string()),
        (length, tokens.to_string()),
        ("heads", heads.to_string()),
        ("latent", latent.to_string()),
        ("rope", rope.to_string()),
        ("kv", name(kv).into()),
    ];
    columns.into()
}

/// As tables spell types.
fn name(precision: Precision) -> &'static str {
    match precision {
        Precision::F32 => "float32",
        Precision::Bf16 => "bfloat16",
        Precision::Fp8 => "fp8",
        Precision::Fp8Block => "fp8_block",
        Precision::F4 => "nvfp4",
        Precision::Int4 => "int4",
    }
}

/// The table and the parameters: `gemm dtype=bfloat16 m=1 …`.
impl std::fmt::Display for Wanted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (table, columns) = self.columns();
        f.write_str(table)?;
        columns.iter().try_for_each(|(column, value)| write!(f, " {column}={value}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::iteration::ExpertLayout;

    fn grid() -> Grid {
        Grid { max_tokens: 512, max_seqs: 8, max_context: 1024, types: vec![Precision::Bf16, Precision::Fp8Block] }
    }

    fn list(name: &str, layouts: &[Layout], grid: &Grid) -> Vec<String> {
        let model = moesaic_spec::preset(name).unwrap().spec().unwrap();
        wanted(&model, layouts, grid).unwrap().iter().map(Wanted::to_string).collect()
    }

    #[test]
    fn ends_come_first_and_halves_follow() {
        assert_eq!(doublings(1, 16), [(0, 1), (2, 2), (1, 4), (2, 8), (0, 16)]);
        assert_eq!(doublings(1, 5), [(0, 1), (1, 2), (2, 4), (0, 5)]);
        assert_eq!(doublings(64, 64), [(0, 64)]);
        assert_eq!(doublings(64, 16), [(0, 16)]);
    }

    #[test]
    fn the_model_s_own_shapes_are_asked_for() {
        let list = list("mixtral-8x7b", &[Layout::single(8)], &grid());
        for asked in [
            "gemm dtype=bfloat16 m=1 n=6144 k=4096",
            "gemm dtype=fp8_block m=512 n=4096 k=4096",
            "gemm dtype=bfloat16 m=64 n=8 k=4096",
            "gemm dtype=bfloat16 m=8 n=32000 k=4096",
            "moe dtype=bfloat16 tokens=512 h=4096 inter=14336 topk=2 E=8 tp=1 ep=1 dist=uniform",
            "attn_decode batch=8 kv_len=1024 q_heads=32 kv_heads=8 head_dim=128 kv=bfloat16",
            "attn_prefill batch=1 seq=512 q_heads=32 kv_heads=8 head_dim=128 kv=bfloat16",
            "send_receive gpus=2 bytes=67108864",
            "all_reduce gpus=4 bytes=1024",
        ] {
            assert!(list.iter().any(|row| row == asked), "{asked} is not among {list:#?}");
        }
        // Routers and heads are not quantised, a head has no more rows than there are sequences.
        let not = |part: &str| !list.iter().any(|row| row.contains(part));
        assert!(not("fp8_block m=1 n=8 ") && not("fp8_block m=1 n=32000 ") && not("m=512 n=32000 "));
    }

    #[test]
    fn nothing_is_asked_for_twice() {
        let single = Layout::single(8);
        let once = list("mixtral-8x7b", std::slice::from_ref(&single), &grid());
        let twice = list("mixtral-8x7b", &[single.clone(), single.clone()], &grid());
        assert_eq!(once, twice);
        let cut = list("mixtral-8x7b", &[single.clone(), Layout { tp: 4, ..single }], &grid());
        assert!(cut.len() > once.len() && cut.iter().collect::<HashSet<_>>().len() == cut.len());
        assert!(cut.iter().any(|row| row.contains("tp=4")));
    }

    #[test]
    fn the_first_few_cover_every_kind_from_end_to_end() {
        let list = list("mixtral-8x7b", &[Layout::single(8)], &grid());
        let start = &list[..list.len() / 4];
        for part in ["gemm", "moe", "attn_decode", "attn_prefill", "all_reduce"] {
            assert!(start.iter().any(|row| row.starts_with(part)), "{part} is late in {list:#?}");
        }
        assert!(start.iter().any(|row| row.contains("m=512 ")) && start.iter().any(|row| row.contains("m=1 ")));
        let last_bf16 = list.iter().rposition(|row| row.contains("bfloat16")).unwrap();
        assert!(list.iter().position(|row| row.contains("fp8_block")).unwrap() > last_bf16);
    }

    #[test]
    fn latent_attention_and_placed_experts_have_their_own_columns() {
        let placed = Layout { dp: 8, experts: ExpertLayout::Placed { ep: 8 }, ..Layout::single(8) };
        let list = list("deepseek-v3", &[placed], &grid());
        let asked = "mla_decode batch=8 kv_len=1024 heads=128 latent=512 rope=64 kv=bfloat16";
        assert!(list.iter().any(|row| row == asked), "{list:#?}");
        let asked = "moe dtype=fp8_block tokens=4096 h=7168 inter=2048 topk=8 E=256 tp=1 ep=8 dist=uniform";
        assert!(list.iter().any(|row| row == asked), "{list:#?}");
        let mut found: Vec<&str> = list.iter().filter_map(|row| row.split(' ').next()).collect();
        found.sort_unstable();
        found.dedup();
        assert!(found.iter().all(|table| TABLES.contains(table)), "{found:?}");
    }
}
