//! `moesaic init`: a random checkpoint.

use anyhow::Result;
use moesaic_model::checkpoint::{RandomWeights, write_random};
use moesaic_spec::Bytes;
use moesaic_spec::model::scale::Scale;

use crate::args::InitArgs;
use crate::folder::named_spec;
use crate::progress;

pub(crate) fn run(args: &InitArgs) -> Result<()> {
    let (_, spec) = named_spec(args.model.as_deref().or(args.config.as_deref()))?;
    let scale = Scale {
        layers: args.layers,
        hidden: args.hidden,
        heads: args.heads,
        experts: args.experts,
        intermediate: args.intermediate,
        vocab: args.vocab,
        ..Scale::default()
    };
    let spec = if scale == Scale::default() { spec } else { spec.scaled(&scale)? };
    let total = spec.counts().bytes_total;
    let bar = progress::bytes_bar("writing", total, false);
    let weights = RandomWeights { seed: args.seed };
    let written = write_random(&args.output, &spec, weights, args.shard_size.0, |done| bar.set_position(done))?;
    bar.finish_and_clear();
    println!("{}: {} of random weights (seed {})", args.output.display(), Bytes(written), args.seed);
    Ok(())
}
