//! All-reduce: every rank of a group has a tensor of the same shape, and gets the sum of all of them.
//!
//! Elements are F32, or BF16 that is summed in F32 and rounded once (hierarchically: once inside the node, once between).
//!
//! `N` elements, `G` ranks. The sum of an element has one order, by position in the group, so all ranks have the same bits,
//! in every run:
//!
//! - *Flat*, from [`ONE_ROUND_BYTES`] on: round 0, part `j` of the elements goes to the rank at position `j`, which sums it
//!   (reduce-scatter); round 1, every rank gives its sums to all others (all-gather). Each rank sends `2 N (G - 1) / G`
//!   elements.
//! - *Flat*, below: one round in which everybody sends everything to everybody and sums by itself. More bytes, half the waits,
//!   the same bits.
//! - *Hierarchical*: round 0, reduce-scatter among the ranks of a node; rounds 1 and 2, flat all-reduce of each part among the
//!   ranks of the same place in their nodes; round 3, all-gather inside the node. The order is by position inside the
//!   node, then by node in the order of their first ranks, so bits differ from *flat*. Where nodes have different numbers
//!   of ranks, there are as many parts as the smallest has ranks: the further ranks of a node give their elements to its
//!   first ones and get the sums from them.

use std::ops::Range;

use half::bf16;
use moesaic_device::{Ctx, OpCall, Tensor};
use moesaic_plan::{AllReduce, Rank, Slice, Tag};
use moesaic_spec::DType;

use super::{Expected, Group};
use crate::{CommError, Communicator};

/// Tensors smaller than this are summed in one round: the time of a message is then its latency, not its length.
pub const ONE_ROUND_BYTES: usize = 64 << 10;

/// Parts begin on cache lines, whatever the elements are.
const UNIT: usize = 64 / size_of::<bf16>();

/// Elements that are summed while they are in the first cache.
const BLOCK: usize = 1024;

/// Who sums what, and how.
#[derive(Clone, Copy, Debug)]
pub struct AllReduceArgs<'a> {
    /// Names the messages; the rounds count from its round.
    pub tag: Tag,
    /// Who, this rank included; the order is that of the sum.
    pub group: &'a [Rank],
    /// By rank of the world: its node.
    pub node_of: &'a [usize],
    /// How.
    pub algorithm: AllReduce,
}

/// Replaces `x` (F32 or BF16, any shape, the same at all ranks) by the sum over the group.
pub fn all_reduce(
    ctx: &Ctx,
    comm: &dyn Communicator,
    args: AllReduceArgs<'_>,
    x: &mut Tensor,
) -> Result<(), CommError> {
    assert!(matches!(x.dtype(), DType::F32 | DType::BF16), "sums of {}", x.dtype());
    let AllReduceArgs { tag, group: ranks, node_of, algorithm } = args;
    let group = Group { ctx, comm, tag };
    let all = 0..x.num_elements();
    match algorithm {
        AllReduce::Flat => flat(&group, ranks, all, x),
        AllReduce::Hierarchical => {
            let nodes = nodes(ranks, node_of);
            let num_parts = nodes.iter().map(Vec::len).min().expect("a group has a rank, this one");
            let own = node_of[comm.rank().idx()];
            let node = nodes.iter().find(|node| node_of[node[0].idx()] == own).expect("this rank is in its group");
            let place = group.position(node);
            reduce_scatter(&group, Parts { ranks: node, num_parts, all: all.clone() }, x)?;
            if place < num_parts {
                let peers: Vec<Rank> = nodes.iter().map(|node| node[place]).collect();
                let part = part(&all, place, num_parts);
                flat(&group.with_round(1), &peers, part, x)?;
            }
            all_gather(&group.with_round(3), Parts { ranks: node, num_parts, all }, x)
        }
    }
}

/// The ranks of each node, nodes in the order of their first ranks.
fn nodes(ranks: &[Rank], node_of: &[usize]) -> Vec<Vec<Rank>> {
    let mut nodes: Vec<Vec<Rank>> = Vec::new();
    for &rank in ranks {
        match nodes.iter_mut().find(|node| node_of[node[0].idx()] == node_of[rank.idx()]) {
            Some(node) => node.push(rank),
            None => nodes.push(vec![rank]),
        }
    }
    nodes
}

fn flat(group: &Group<'_>, ranks: &[Rank], all: Range<usize>, x: &mut Tensor) -> Result<(), CommError> {
    if all.len() * x.dtype().size_bytes() < ONE_ROUND_BYTES {
        one_round(group, ranks, all, x)
    } else {
        two_rounds(group, ranks, all, x)
    }
}

/// Everybody sends everything to everybody.
pub(super) fn one_round(group: &Group<'_>, ranks: &[Rank], all: Range<usize>, x: &mut Tensor) -> Result<(), CommError> {
    let place = group.position(ranks);
    if all.is_empty() {
        return Ok(());
    }
    for &rank in others(ranks, place) {
        send_range(group, rank, &all, x)?;
    }
    let expected: Vec<Expected> = others(ranks, place).map(|&from| expect(from, &all, x)).collect();
    let others = group.receive(&expected)?;
    reduce(group.ctx, Sum { num_ranks: ranks.len(), place, range: all, others }, x);
    Ok(())
}

/// Everybody sums a part.
pub(super) fn two_rounds(
    group: &Group<'_>,
    ranks: &[Rank],
    all: Range<usize>,
    x: &mut Tensor,
) -> Result<(), CommError> {
    let num_parts = ranks.len();
    reduce_scatter(group, Parts { ranks, num_parts, all: all.clone() }, x)?;
    all_gather(&group.with_round(1), Parts { ranks, num_parts, all }, x)
}

/// Elements that are cut into parts, one for each of the first `num_parts` ranks.
struct Parts<'a> {
    ranks: &'a [Rank],
    num_parts: usize,
    all: Range<usize>,
}

impl Parts<'_> {
    /// The elements of the rank at this place.
    fn of(&self, place: usize) -> Range<usize> {
        if place < self.num_parts { part(&self.all, place, self.num_parts) } else { 0..0 }
    }
}

fn part(all: &Range<usize>, idx: usize, count: usize) -> Range<usize> {
    let part = Slice { idx, count }.range(all.len(), UNIT);
    all.start + part.start..all.start + part.end
}

/// Each part becomes the sum at its rank.
fn reduce_scatter(group: &Group<'_>, parts: Parts<'_>, x: &mut Tensor) -> Result<(), CommError> {
    let place = group.position(parts.ranks);
    for (to, &rank) in parts.ranks.iter().enumerate() {
        if to != place {
            send_range(group, rank, &parts.of(to), x)?;
        }
    }
    let own = parts.of(place);
    if own.is_empty() {
        return Ok(());
    }
    let expected: Vec<Expected> = others(parts.ranks, place).map(|&from| expect(from, &own, x)).collect();
    let others = group.receive(&expected)?;
    reduce(group.ctx, Sum { num_ranks: parts.ranks.len(), place, range: own, others }, x);
    Ok(())
}

/// Each part goes from its rank to all others.
fn all_gather(group: &Group<'_>, parts: Parts<'_>, x: &mut Tensor) -> Result<(), CommError> {
    let place = group.position(parts.ranks);
    let own = parts.of(place);
    for &rank in others(parts.ranks, place) {
        send_range(group, rank, &own, x)?;
    }
    let of_others = parts.ranks.iter().enumerate().filter(|&(from, _)| from != place);
    let of_others: Vec<(Rank, Range<usize>)> =
        of_others.map(|(from, &rank)| (rank, parts.of(from))).filter(|(_, range)| !range.is_empty()).collect();
    let expected: Vec<Expected> = of_others.iter().map(|(from, range)| expect(*from, range, x)).collect();
    if let Some(received) = group.receive(&expected)? {
        for ((_, range), tensor) in of_others.into_iter().zip(received) {
            let bytes = bytes_of(&range, x);
            x.bytes_mut()[bytes].copy_from_slice(tensor.bytes());
        }
    }
    Ok(())
}

fn others(ranks: &[Rank], place: usize) -> impl Iterator<Item = &Rank> {
    ranks.iter().enumerate().filter(move |&(idx, _)| idx != place).map(|(_, rank)| rank)
}

fn expect(from: Rank, range: &Range<usize>, x: &Tensor) -> Expected {
    Expected { from, dims: vec![range.len()], dtype: x.dtype() }
}

fn bytes_of(range: &Range<usize>, x: &Tensor) -> Range<usize> {
    let size = x.dtype().size_bytes();
    range.start * size..range.end * size
}

fn send_range(group: &Group<'_>, to: Rank, range: &Range<usize>, x: &Tensor) -> Result<(), CommError> {
    if range.is_empty() {
        return Ok(());
    }
    let bytes = (!group.ctx.is_meta()).then(|| &x.bytes()[bytes_of(range, x)]);
    group.send(to, &[range.len()], x.dtype(), bytes)
}

/// Elements of this rank, at `place` of its group, and of all others in the order of theirs.
struct Sum {
    num_ranks: usize,
    place: usize,
    range: Range<usize>,
    /// `None` on `Meta`.
    others: Option<Vec<Tensor>>,
}

/// `x[range] = t[0] + t[1] + ...`, in this order, where `t[place]` is `x[range]` itself.
fn reduce(ctx: &Ctx, sum: Sum, x: &mut Tensor) {
    let Sum { num_ranks, place, range, others } = sum;
    let n = range.len();
    if n == 0 || num_ranks == 1 {
        return;
    }
    ctx.record(|| {
        let (flops, bytes) = (n * (num_ranks - 1), n * (num_ranks + 1) * x.dtype().size_bytes());
        OpCall::compute("reduce", &[("N", n), ("G", num_ranks)], flops as u64, bytes as u64)
    });
    let Some(others) = others else { return };
    let (before, after) = others.split_at(place);
    match x.dtype() {
        DType::F32 => sum_in_order(&mut x.f32_mut()[range], before, after, Tensor::f32),
        _ => sum_in_order(&mut x.bf16_mut()[range], before, after, Tensor::bf16),
    }
}

fn sum_in_order<X: Summand>(own: &mut [X], before: &[Tensor], after: &[Tensor], elements: fn(&Tensor) -> &[X]) {
    let mut total = [0.0; BLOCK];
    for (block, own) in own.chunks_mut(BLOCK).enumerate() {
        let total = &mut total[..own.len()];
        let (start, end) = (block * BLOCK, block * BLOCK + own.len());
        // -0.0 and not 0.0: it leaves the first summand as it is, whatever its sign.
        total.fill(-0.0);
        before.iter().for_each(|tensor| add(total, &elements(tensor)[start..end]));
        add(total, own);
        after.iter().for_each(|tensor| add(total, &elements(tensor)[start..end]));
        own.iter_mut().zip(&*total).for_each(|(own, &total)| *own = X::rounded(total));
    }
}

fn add<X: Summand>(total: &mut [f32], summand: &[X]) {
    total.iter_mut().zip(summand).for_each(|(total, summand)| *total += summand.widened());
}

/// What is summed in F32.
trait Summand: Copy {
    fn widened(self) -> f32;
    fn rounded(sum: f32) -> Self;
}

impl Summand for f32 {
    fn widened(self) -> f32 {
        self
    }
    fn rounded(sum: f32) -> f32 {
        sum
    }
}

impl Summand for bf16 {
    fn widened(self) -> f32 {
        self.to_f32()
    }
    fn rounded(sum: f32) -> bf16 {
        bf16::from_f32(sum)
    }
}
