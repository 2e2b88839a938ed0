//! The tables of one machine: what its ops and links take, measured by itself (`moesaic profile`), and prices from them.

use std::collections::BTreeMap;
use std::sync::Arc;

use moesaic_spec::{Cluster, Gpu};

use crate::PlannerError;
use crate::cost::{self, CostModel, LeftOut, OwnOps, Row};
use crate::network::LinkKind;
use crate::network::{Library, LinkRow, Network, OwnLinks};
use crate::profile::TABLES;

/// A folder of tables, read and fitted. Cheap to clone.
#[derive(Clone, Debug)]
pub struct OwnTables {
    ops: Arc<OwnOps>,
    links: Arc<OwnLinks>,
    num_rows: usize,
}

/// One file of a folder of tables.
#[derive(Clone, Debug)]
pub struct TableFile {
    /// The op, one of [`TABLES`]: the file's name without `.csv`.
    pub op: &'static str,
    /// Its path, for messages.
    pub path: String,
    /// What is in it.
    pub text: String,
}

impl OwnTables {
    /// From files that this machine measured: a cluster of it alone, which says what no op and no link can beat.
    ///
    /// # Errors
    /// [`PlannerError::Table`] names file, line and column of what is missing or cannot be, and what would be right; times that are
    /// shorter than physics lets them be, too.
    pub fn read(machine: &Cluster, files: &[TableFile]) -> Result<OwnTables, PlannerError> {
        let (ops, links) = rows(machine, files)?;
        let num_rows = ops.len() + links.len();
        let links = OwnLinks::new(&machine.intra_node, &links);
        Ok(OwnTables { ops: Arc::new(OwnOps::new(&machine.gpu, &ops)), links: Arc::new(links), num_rows })
    }

    /// Prices of ops on a GPU: the machine's own, or one with other figures.
    pub fn costs(&self, gpu: &Gpu) -> CostModel {
        CostModel::measured(gpu, self.ops.clone())
    }

    /// Prices of communication on a cluster: of the machine, or of one with other figures.
    pub fn network(&self, cluster: &Cluster) -> Network {
        Network::with_own(cluster, Library::Custom, self.links.clone())
    }

    /// How well each row is met by the others, by table, in the order of [`TABLES`].
    pub fn leave_one_out(&self) -> Vec<(&'static str, LeftOut)> {
        let mut all: BTreeMap<&'static str, LeftOut> = self.ops.leave_one_out();
        all.extend(self.links.leave_one_out().into_iter().map(|(kind, left_out)| (kind.table(), left_out)));
        TABLES.iter().filter_map(|table| Some((*table, *all.get(table)?))).collect()
    }

    /// Rows of all tables.
    pub fn num_rows(&self) -> usize {
        self.num_rows
    }
}

/// All rows of ops and of links, checked.
///
/// # Errors
/// As of [`OwnTables::read`].
pub fn rows(machine: &Cluster, files: &[TableFile]) -> Result<(Vec<Row>, Vec<LinkRow>), PlannerError> {
    let (mut ops, mut links) = (Vec::new(), Vec::new());
    let Cluster { gpu, intra_node, .. } = machine;
    for TableFile { op, path, text } in files {
        match [LinkKind::SendReceive, LinkKind::AllReduce].into_iter().find(|kind| kind.table() == *op) {
            Some(kind) => links.extend(LinkRow::parse(text, path, kind, intra_node)?),
            None => ops.extend(cost::parse(text, path, &gpu.name, gpu, op)?),
        }
    }
    Ok((ops, links))
}
