//! Gathers: rows for all of a group, columns for its first rank. `S` rows, `D` and `V` columns, any element type.

use moesaic_device::{Ctx, Tensor};
use moesaic_plan::{Rank, Tag};

use super::{Expected, Group};
use crate::{CommError, Communicator};

/// Who has how much of what is gathered.
#[derive(Clone, Copy, Debug)]
pub struct GatherArgs<'a> {
    /// Names the messages.
    pub tag: Tag,
    /// Who, this rank included; parts are joined in this order.
    pub group: &'a [Rank],
    /// By position in the group: rows or columns of its part, which may be 0.
    pub sizes: &'a [usize],
}

impl GatherArgs<'_> {
    /// Position and part size of everybody who has a part but `own`.
    fn others(&self, own: usize) -> impl Iterator<Item = (usize, Rank, usize)> {
        let parts = self.group.iter().zip(self.sizes).enumerate();
        let parts = parts.filter(move |&(idx, (_, &size))| idx != own && size > 0);
        parts.map(|(idx, (&rank, &size))| (idx, rank, size))
    }
}

/// Rows of all ranks, for all of them: `local` is this rank's [S_i, D], the result [ΣS_i, D], from the activation arena.
pub fn all_gather_rows(
    ctx: &Ctx,
    comm: &dyn Communicator,
    args: GatherArgs<'_>,
    local: &Tensor,
) -> Result<Tensor, CommError> {
    let group = Group { ctx, comm, tag: args.tag };
    let own = group.position(args.group);
    let (rows, cols) = local.dims2();
    assert_eq!((args.group.len(), args.sizes[own]), (args.sizes.len(), rows), "sizes are those of the group");
    if local.size_bytes() > 0 {
        let bytes = (!ctx.is_meta()).then(|| local.bytes());
        for (_, &rank) in args.group.iter().enumerate().filter(|&(idx, _)| idx != own) {
            group.send(rank, &[rows, cols], local.dtype(), bytes)?;
        }
    }
    let others: Vec<(usize, Rank, usize)> = args.others(own).filter(|_| cols > 0).collect();
    let expect = |&(_, from, rows): &_| Expected { from, dims: vec![rows, cols], dtype: local.dtype() };
    let expected: Vec<Expected> = others.iter().map(expect).collect();
    let received = group.receive(&expected)?;

    let mut all = ctx.empty(&[args.sizes.iter().sum(), cols], local.dtype())?; // [ΣS_i, D]
    let Some(received) = received else { return Ok(all) };
    let row_bytes = cols * local.dtype().size_bytes();
    let mut put = |idx: usize, part: &Tensor| {
        let start = args.sizes[..idx].iter().sum::<usize>() * row_bytes;
        all.bytes_mut()[start..start + part.size_bytes()].copy_from_slice(part.bytes());
    };
    put(own, local);
    others.iter().zip(&received).for_each(|(&(idx, ..), part)| put(idx, part));
    Ok(all)
}

/// Columns of all ranks, for the first of them: `local` is this rank's [S, V_i]; the result there [S, ΣV_i], from the
/// activation arena, and `None` elsewhere.
pub fn gather_to_first(
    ctx: &Ctx,
    comm: &dyn Communicator,
    args: GatherArgs<'_>,
    local: &Tensor,
) -> Result<Option<Tensor>, CommError> {
    let group = Group { ctx, comm, tag: args.tag };
    let own = group.position(args.group);
    let (rows, cols) = local.dims2();
    assert_eq!((args.group.len(), args.sizes[own]), (args.sizes.len(), cols), "sizes are those of the group");
    if own > 0 {
        if local.size_bytes() > 0 {
            group.send(args.group[0], &[rows, cols], local.dtype(), (!ctx.is_meta()).then(|| local.bytes()))?;
        }
        return Ok(None);
    }
    let others: Vec<(usize, Rank, usize)> = args.others(own).filter(|_| rows > 0).collect();
    let expect = |&(_, from, cols): &_| Expected { from, dims: vec![rows, cols], dtype: local.dtype() };
    let expected: Vec<Expected> = others.iter().map(expect).collect();
    let received = group.receive(&expected)?;

    let width: usize = args.sizes.iter().sum();
    let mut all = ctx.empty(&[rows, width], local.dtype())?; // [S, ΣV_i]
    let Some(received) = received else { return Ok(Some(all)) };
    let element_bytes = local.dtype().size_bytes();
    let mut put = |idx: usize, part: &Tensor| {
        let start = args.sizes[..idx].iter().sum::<usize>() * element_bytes;
        let (_, cols) = part.dims2();
        let row_bytes = cols * element_bytes;
        if part.size_bytes() == 0 {
            return;
        }
        let to = all.bytes_mut().chunks_exact_mut(width * element_bytes);
        for (to, from) in to.zip(part.bytes().chunks_exact(row_bytes)) {
            to[start..start + row_bytes].copy_from_slice(from);
        }
    };
    put(own, local);
    others.iter().zip(&received).for_each(|(&(idx, ..), part)| put(idx, part));
    Ok(Some(all))
}
