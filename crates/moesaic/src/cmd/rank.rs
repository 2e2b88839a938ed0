//! `moesaic rank`: one rank of a plan that another process leads.

use anyhow::Result;
use moesaic_engine::{RankLink, serve_rank};

use crate::args::RankArgs;
use crate::folder::OpenModel;

pub(crate) fn run(args: &RankArgs) -> Result<()> {
    let link = RankLink::connect(&args.folder, args.rank)?;
    let model = OpenModel::open(&args.model)?;
    Ok(serve_rank(link, &model.spec, &model.launch_from())?)
}
