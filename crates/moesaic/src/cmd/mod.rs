//! One file a command.

pub(crate) mod adapted;
pub(crate) mod bench;
pub(crate) mod compare;
pub(crate) mod doctor;
pub(crate) mod explain;
pub(crate) mod generate;
pub(crate) mod init;
pub(crate) mod inspect;
pub(crate) mod plan;
pub(crate) mod profile;
pub(crate) mod rank;
pub(crate) mod reproduce;
pub(crate) mod simulate;
pub(crate) mod validate;

use clap::CommandFactory;
use clap_complete::{Shell, generate as write_completions};

use crate::args::Cli;

/// Prints the completion script of a shell.
pub(crate) fn completions(shell: Shell) {
    write_completions(shell, &mut Cli::command(), "moesaic", &mut std::io::stdout());
}
