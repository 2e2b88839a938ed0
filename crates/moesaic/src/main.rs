//! `moesaic`: plans, runs and measures Mixture-of-Experts transformers.

mod args;
mod cmd;
mod folder;
mod plans;
mod predicted;
mod pricing;
mod progress;
mod tables;

use std::process::ExitCode;

use clap::Parser;

use args::{Cli, Command};

/// What the user gave cannot be used: the code that command lines use for it.
const EXIT_BAD_INPUT: u8 = 2;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match cli.command {
        Command::Generate(args) => cmd::generate::run(&args),
        Command::Inspect(args) => cmd::inspect::run(&args),
        Command::Init(args) => cmd::init::run(&args),
        Command::Compare(args) => cmd::compare::run(&args),
        Command::Plan(args) => cmd::plan::run(&args),
        Command::Explain(args) => cmd::explain::run(&args),
        Command::Simulate(args) => cmd::simulate::run(&args),
        Command::Diff { a, b } => cmd::explain::diff(&a, &b),
        Command::Reproduce(args) => cmd::reproduce::run(&args),
        Command::Validate(args) => cmd::validate::run(&args),
        Command::Bench(args) => cmd::bench::run(&args),
        Command::Profile(args) => cmd::profile::run(&args),
        Command::Doctor(args) => cmd::doctor::run(&args),
        Command::Completions { shell } => {
            cmd::completions(shell);
            Ok(())
        }
        Command::Rank(args) => cmd::rank::run(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        // The reader went away (`| head`): nobody is left to tell.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(EXIT_BAD_INPUT)
        }
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let io = error.downcast_ref::<std::io::Error>();
    io.is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
}
