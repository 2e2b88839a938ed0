//! Tokens are copied to their experts: the rows of one expert lie together, so each expert is one matrix product.
//!
//! Rows come from several sources: this rank's own, and what other ranks sent. For each pair (row t of source s, expert e)
//! `out[row_of[s][pair], :] = x[s][t, :]`; rows are sorted by expert, then by source, then in the order of the pairs. Rows of
//! expert e are `offsets[e] .. offsets[e + 1]`. Which pairs there are [`keep_pairs`] decides.
//!
//! | | shape | type |
//! | --- | --- | --- |
//! | `x` of each source | `[n, D]`, n its own | any, one for all |
//! | `pairs` of each source | row below n, expert below E | u32, u32 |
//! | out `x` | `[R, D]` | that of the sources |
//! | `row_of` | by source: a row of `x` for each pair | u32 |
//!
//! R is the number of pairs. Flops 0. Bytes: R rows in and out, pairs in, `row_of` out. On `Meta`, where routing is not
//! known, pairs are counted: their bound is R. Exact.

use moesaic_device::{Amount, Ctx, OpCall, Tensor};

use crate::KernelError;
use crate::contract::{check, require};
use crate::rows::{Sources, copy_rows};

mod capacity;
pub mod reference;
#[cfg(test)]
mod tests;

pub use capacity::keep_pairs;

const OP: &str = "dispatch";

/// Rows of one origin and where they go.
pub struct DispatchSource<'a> {
    /// `[n, D]`.
    pub x: &'a Tensor,
    /// Which rows go to which expert; a row may go to several, or to none.
    pub pairs: Pairs<'a>,
}

/// The pairs of a source.
#[derive(Clone, Copy, Debug)]
pub enum Pairs<'a> {
    /// Row of the source, expert.
    Known(&'a [(u32, u32)]),
    /// Not decided yet (on `Meta`): how many there are.
    Counted(Amount),
}

/// Rows sorted by expert.
pub struct Dispatched {
    /// `[R, D]`.
    pub x: Tensor,
    /// Where each expert's rows start, and the end: E + 1 numbers. Empty on `Meta`.
    pub offsets: Vec<usize>,
    /// By source: the row in `x` of each pair. Empty on `Meta`.
    pub row_of: Vec<Vec<u32>>,
}

/// Sorts the rows of all sources by expert.
pub fn dispatch(ctx: &Ctx, sources: &[DispatchSource], num_experts: usize) -> Result<Dispatched, KernelError> {
    let d = check_sources(ctx, sources, num_experts)?;
    let dtype = sources[0].x.dtype();
    let count = sources.iter().map(|source| match source.pairs {
        Pairs::Known(pairs) => Amount::exact(pairs.len() as u64),
        Pairs::Counted(count) => count,
    });
    let count = count.fold(Amount::exact(0), |sum, count| Amount {
        expected: sum.expected + count.expected,
        bound: sum.bound + count.bound,
    });
    let (r, row_bytes) = (count.bound as usize, d * dtype.size_bytes());
    ctx.record(|| {
        let pair_bytes = 2 * row_bytes + 12;
        let expected = count.expected * pair_bytes as f64;
        let bytes = Amount { expected, bound: count.bound * pair_bytes as u64 };
        OpCall { bytes, ..OpCall::compute(OP, &[("R", r), ("E", num_experts), ("D", d)], 0, 0) }
    });
    let mut x = ctx.empty(&[r, d], dtype)?;
    if ctx.is_meta() {
        return Ok(Dispatched { x, offsets: Vec::new(), row_of: Vec::new() });
    }
    let pairs: Vec<&[(u32, u32)]> = sources.iter().map(|source| known(source.pairs)).collect();
    let Sorted { offsets, row_of, origins } = sort_by_expert(&pairs, num_experts);
    let rows = Sources::new(sources.iter().map(|source| source.x), row_bytes);
    copy_rows(ctx, x.bytes_mut(), row_bytes, |row| rows.row(origins[row]));
    Ok(Dispatched { x, offsets, row_of })
}

/// Checks what goes in; the width of all sources.
fn check_sources(ctx: &Ctx, sources: &[DispatchSource], num_experts: usize) -> Result<usize, KernelError> {
    require(num_experts > 0, OP, "num_experts", || "at least 1".into(), || num_experts.to_string())?;
    require(!sources.is_empty(), OP, "sources", || "at least 1".into(), || "0".into())?;
    let first = sources[0].x;
    let rank2 = first.dims().len() == 2 && first.dims()[1] > 0;
    require(rank2, OP, "x", || "[n, D]".into(), || format!("{:?}", first.dims()))?;
    let (_, d) = first.dims2();
    for DispatchSource { x, pairs } in sources {
        let n = x.dims().first().copied().unwrap_or(0);
        check(OP, "x", x, &[n, d], first.dtype())?;
        match pairs {
            Pairs::Known(pairs) => {
                let wrong = pairs.iter().find(|(row, expert)| *row as usize >= n || *expert as usize >= num_experts);
                let expected = || format!("a row below {n} and an expert below {num_experts}");
                require(wrong.is_none(), OP, "pair", expected, || format!("{:?}", wrong.expect("found")))?;
            }
            Pairs::Counted(_) => {
                require(ctx.is_meta(), OP, "pairs", || "known".into(), || "counted".into())?;
            }
        }
    }
    Ok(d)
}

fn known<'a>(pairs: Pairs<'a>) -> &'a [(u32, u32)] {
    match pairs {
        Pairs::Known(pairs) => pairs,
        Pairs::Counted(_) => unreachable!("checked: only Meta counts"),
    }
}

struct Sorted {
    offsets: Vec<usize>,
    /// By source: the row of each pair.
    row_of: Vec<Vec<u32>>,
    /// Of each row: its source and its row there.
    origins: Vec<(u32, u32)>,
}

/// A counting sort, stable over sources and pairs.
fn sort_by_expert(sources: &[&[(u32, u32)]], num_experts: usize) -> Sorted {
    let mut offsets = vec![0usize; num_experts + 1];
    for &(_, expert) in sources.iter().copied().flatten() {
        offsets[expert as usize + 1] += 1;
    }
    (0..num_experts).for_each(|e| offsets[e + 1] += offsets[e]);
    let mut next = offsets.clone();
    let mut origins = vec![(0, 0); offsets[num_experts]];
    let row_of = sources.iter().enumerate().map(|(source, pairs)| {
        let places = pairs.iter().map(|&(row, expert)| {
            let place = &mut next[expert as usize];
            origins[*place] = (source as u32, row);
            *place += 1;
            *place as u32 - 1
        });
        places.collect()
    });
    let row_of = row_of.collect();
    Sorted { offsets, row_of, origins }
}
