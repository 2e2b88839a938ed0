//! Some rows of a matrix, or of several: those whose logits are wanted, or that go to another rank.
//!
//! `out[i, :] = x[rows[i], :]`; of several sources `out[i, :] = x[source of i][row of i, :]`
//!
//! | | shape | type |
//! | --- | --- | --- |
//! | `x`, each source | `[T, D]`, T its own | any, one for all |
//! | `rows` | `[S]`, each below T | usize, or (source, row) |
//! | out | `[S, D]` | that of `x` |
//!
//! Flops 0. Bytes: S rows in and out. Exact.

use moesaic_device::{Arena, Ctx, OpCall, Tensor};
use moesaic_spec::DType;

use crate::KernelError;
use crate::contract::{check, require};
use crate::rows::{Sources, copy_rows};

pub mod reference;

const OP: &str = "gather_rows";

/// The rows `rows` of `x`.
pub fn gather_rows(ctx: &Ctx, x: &Tensor, rows: &[usize]) -> Result<Tensor, KernelError> {
    let (d, dtype) = width(&[x])?;
    check_row(x, rows.iter().copied().max())?;
    let (mut out, row_bytes) = empty(ctx, ctx.arena(), (rows.len(), d), dtype)?;
    if !ctx.is_meta() {
        let x = x.bytes();
        copy_rows(ctx, out.bytes_mut(), row_bytes, |i| &x[rows[i] * row_bytes..][..row_bytes]);
    }
    Ok(out)
}

/// Rows of several matrices, each named by its matrix and its row there.
pub fn gather_rows_from(ctx: &Ctx, sources: &[&Tensor], rows: &[(u32, u32)]) -> Result<Tensor, KernelError> {
    gather_rows_into(ctx, ctx.arena(), sources, rows)
}

/// The same with the result in another arena, for a message that outlives the step's activations.
pub fn gather_rows_into(
    ctx: &Ctx,
    arena: &Arena,
    sources: &[&Tensor],
    rows: &[(u32, u32)],
) -> Result<Tensor, KernelError> {
    let (d, dtype) = width(sources)?;
    let mut last = vec![None; sources.len()];
    for &(source, row) in rows {
        let expected = || format!("below {}", sources.len());
        require((source as usize) < sources.len(), OP, "source", expected, || source.to_string())?;
        let last = &mut last[source as usize];
        *last = (*last).max(Some(row as usize));
    }
    sources.iter().zip(last).try_for_each(|(x, last)| check_row(x, last))?;
    let (mut out, row_bytes) = empty(ctx, arena, (rows.len(), d), dtype)?;
    if !ctx.is_meta() {
        let sources = Sources::new(sources.iter().copied(), row_bytes);
        copy_rows(ctx, out.bytes_mut(), row_bytes, |i| sources.row(rows[i]));
    }
    Ok(out)
}

/// Width and type that all sources have.
fn width(sources: &[&Tensor]) -> Result<(usize, DType), KernelError> {
    require(!sources.is_empty(), OP, "sources", || "at least 1".into(), || "0".into())?;
    let first = sources[0];
    let rank2 = first.dims().len() == 2 && first.dims()[1] > 0;
    require(rank2, OP, "x", || "[T, D]".into(), || format!("{:?}", first.dims()))?;
    let (_, d) = first.dims2();
    for x in sources {
        let rows = x.dims().first().copied().unwrap_or(0);
        check(OP, "x", x, &[rows, d], first.dtype())?;
    }
    Ok((d, first.dtype()))
}

/// The last row that is asked for must be there.
fn check_row(x: &Tensor, last: Option<usize>) -> Result<(), KernelError> {
    let Some(last) = last else { return Ok(()) };
    let (t, _) = x.dims2();
    require(last < t, OP, "row", || format!("below {t}"), || last.to_string())
}

/// Records, and takes memory for the result; also the bytes of a row.
fn empty(ctx: &Ctx, arena: &Arena, (s, d): (usize, usize), dtype: DType) -> Result<(Tensor, usize), KernelError> {
    let row_bytes = d * dtype.size_bytes();
    ctx.record(|| OpCall::compute(OP, &[("S", s), ("D", d)], 0, (2 * s * row_bytes) as u64));
    Ok((Tensor::empty(arena, &[s, d], dtype)?, row_bytes))
}

#[cfg(test)]
mod tests {
    use moesaic_spec::Bytes;

    use super::*;
    use crate::testing::{ACTIVATIONS, WIDTHS, contexts, random, tensor, values};

    #[test]
    fn rows_are_those_asked_for() {
        for ctx in contexts() {
            for (d, dtype) in WIDTHS.iter().flat_map(|&d| ACTIVATIONS.map(|dtype| (d, dtype))) {
                let x = tensor(&ctx, &[60, d], dtype, &random(1, 60 * d));
                for rows in [vec![], vec![59], (0..60).rev().chain([3, 3]).collect()] {
                    let out = gather_rows(&ctx, &x, &rows).unwrap();
                    assert_eq!(out.dims(), [rows.len(), d]);
                    assert_eq!(values(&out), reference::gather_rows(&values(&x), d, &rows));
                }
            }
        }
    }

    #[test]
    fn rows_of_several_sources_are_those_of_their_concatenation() {
        let outside = Arena::host("message", Bytes(1 << 22)).unwrap();
        for ctx in contexts() {
            for (d, dtype) in WIDTHS.iter().flat_map(|&d| ACTIVATIONS.map(|dtype| (d, dtype))) {
                let sizes = [5usize, 0, 60, 1];
                let matrix = |(i, &t): (usize, &usize)| tensor(&ctx, &[t, d], dtype, &random(i as u64, t * d));
                let matrices: Vec<Tensor> = sizes.iter().enumerate().map(matrix).collect();
                let sources: Vec<&Tensor> = matrices.iter().collect();
                let all: Vec<f32> = sources.iter().flat_map(|x| values(x)).collect();
                let rows = [(3, 0), (0, 4), (0, 0), (2, 59), (2, 0), (2, 59)].repeat(30);
                for rows in [&rows[..], &rows[..1], &[]] {
                    let place =
                        |&(source, row): &(u32, u32)| sizes[..source as usize].iter().sum::<usize>() + row as usize;
                    let expected = reference::gather_rows(&all, d, &rows.iter().map(place).collect::<Vec<_>>());
                    assert_eq!(values(&gather_rows_from(&ctx, &sources, rows).unwrap()), expected);
                    let before = (ctx.arena().in_use(), outside.in_use());
                    let out = gather_rows_into(&ctx, &outside, &sources, rows).unwrap();
                    assert_eq!(values(&out), expected);
                    assert_eq!(ctx.arena().in_use(), before.0, "the result lies in the other arena");
                    assert!(rows.is_empty() || outside.in_use() > before.1);
                }
            }
        }
    }

    #[test]
    fn a_real_call_is_recorded_as_its_meta_run() {
        let (cpu, meta) = (Ctx::cpu(1, 1 << 16).unwrap(), Ctx::meta());
        cpu.start_log();
        for ctx in [&cpu, &meta] {
            let (a, b) = (ctx.empty(&[4, 8], DType::BF16).unwrap(), ctx.empty(&[2, 8], DType::BF16).unwrap());
            gather_rows_from(ctx, &[&a, &b], &[(1, 1), (0, 3), (1, 0)]).unwrap();
        }
        let calls = cpu.take_log();
        assert_eq!(calls, meta.take_log());
        assert_eq!(calls, [OpCall::compute("gather_rows", &[("S", 3), ("D", 8)], 0, 2 * 3 * 16)]);
    }

    #[test]
    fn a_row_beyond_the_matrix_is_named() {
        let ctx = Ctx::meta();
        let x = ctx.empty(&[4, 8], DType::BF16).unwrap();
        let error = gather_rows(&ctx, &x, &[1, 4]).err().unwrap().to_string();
        assert_eq!(error, "gather_rows: row is 4, expected below 4");
        let other = ctx.empty(&[2, 8], DType::BF16).unwrap();
        let refused = |sources: &[&Tensor], row| gather_rows_from(&ctx, sources, &[row]).err().unwrap().to_string();
        assert_eq!(refused(&[&x, &other], (1, 2)), "gather_rows: row is 2, expected below 2");
        assert_eq!(refused(&[&x, &other], (2, 0)), "gather_rows: source is 2, expected below 2");
        assert_eq!(refused(&[], (0, 0)), "gather_rows: sources is 0, expected at least 1");
        let wide = ctx.empty(&[2, 9], DType::BF16).unwrap();
        assert_eq!(refused(&[&x, &wide], (0, 0)), "gather_rows: x is BF16 [2, 9], expected BF16 [2, 8]");
    }
}
