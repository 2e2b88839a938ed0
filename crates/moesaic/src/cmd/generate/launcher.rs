//! The engine of `generate`: one rank, or the ranks of a plan as threads or processes.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use moesaic_engine::{Engine, EngineConfig, Ranks};
use moesaic_plan::{Plan, PlanFile, Rank};

use crate::args::{CommunicatorArg, GenerateArgs, ModelArgs};
use crate::folder::OpenModel;
use crate::plans;

/// What makes an engine.
pub(super) struct Launcher<'a> {
    args: &'a GenerateArgs,
    model: &'a OpenModel,
    /// As a process of a rank is told.
    model_args: ModelArgs,
    plan: Arc<Plan>,
}

impl<'a> Launcher<'a> {
    pub(super) fn new(
        args: &'a GenerateArgs,
        model: &'a OpenModel,
        model_args: ModelArgs,
        file: Option<PlanFile>,
    ) -> Result<Launcher<'a>> {
        ensure!(
            args.deadline.is_finite() && args.deadline > 0.0 && args.deadline <= 86_400.0,
            "--deadline is {}; seconds above 0 and at most 86400 are right",
            args.deadline
        );
        let plan = match file {
            None => Plan::single(&model.spec),
            Some(file) => {
                let path = args.plan.as_deref().unwrap_or(Path::new("plan"));
                let cluster = plans::cluster(&file.cluster).with_context(|| path.display().to_string())?;
                plans::resolve(file, &model.spec, &cluster).with_context(|| path.display().to_string())?
            }
        };
        Ok(Launcher { args, model, model_args, plan: Arc::new(plan) })
    }

    /// A line on how the model is spread; none for one rank without a plan.
    pub(super) fn line(&self) -> String {
        if self.args.plan.is_none() {
            return String::new();
        }
        let ranks = match (self.plan.world_size(), self.args.communicator) {
            (1, _) => "1 rank".to_string(),
            (ranks, CommunicatorArg::InProcess) => format!("{ranks} ranks, threads of this process"),
            (ranks, CommunicatorArg::Process) => format!("{ranks} ranks, a process each"),
        };
        let file = &self.plan.file;
        format!("plan      {} ({}): {ranks}\n", file.name, plans::describe(file))
    }

    pub(super) fn launch(&self, config: EngineConfig) -> Result<Engine> {
        let config = EngineConfig { deadline: Duration::from_secs_f64(self.args.deadline), ..config };
        let start = |rank, folder: &Path| self.start_rank(rank, folder);
        let ranks = match self.args.communicator {
            CommunicatorArg::InProcess => Ranks::Threads,
            CommunicatorArg::Process => Ranks::Processes(&start),
        };
        self.model.launch_plan(&self.plan, &config, ranks, self.args.quiet)
    }

    fn start_rank(&self, rank: Rank, folder: &Path) -> std::io::Result<Child> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("rank").args(self.model_args.to_args()).arg("--folder").arg(folder);
        // What goes wrong in a rank comes back to its leader, who says it.
        command.arg("--rank").arg(rank.to_string()).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command.spawn()
    }
}
