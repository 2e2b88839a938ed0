//! Chores of the repository: `cargo xtask NAME`. The continuous integration runs them all.

mod licences;
mod metadata;
mod walls;

use std::process::ExitCode;

use metadata::Workspace;

const USAGE: &str = "usage: cargo xtask CHORE

check-walls      the dependencies between crates are those of ARCHITECTURE.md
check-licences   the licences of all dependencies are allowed by deny.toml";

fn main() -> anyhow::Result<ExitCode> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let chore = match arguments.as_slice() {
        [chore] if chore == "check-walls" => check_walls,
        [chore] if chore == "check-licences" => check_licences,
        _ => {
            eprintln!("{USAGE}");
            return Ok(ExitCode::from(2));
        }
    };
    let workspace = Workspace::load()?;
    let faults = chore(&workspace)?;
    for fault in &faults {
        eprintln!("error: {fault}");
    }
    Ok(if faults.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn check_walls(workspace: &Workspace) -> anyhow::Result<Vec<String>> {
    let document = workspace.read("ARCHITECTURE.md")?;
    let rooms = walls::parse(&document)?;
    let mut faults = walls::check(&rooms, workspace);
    faults.extend(walls::missing_paths(&document, |path| workspace.root.join(path).exists()));
    if faults.is_empty() {
        println!("the walls hold: {} crates", workspace.crates.len());
    }
    Ok(faults)
}

fn check_licences(workspace: &Workspace) -> anyhow::Result<Vec<String>> {
    let allowed = licences::allowed(&workspace.read("deny.toml")?)?;
    let faults = licences::check(&workspace.packages, &allowed);
    for (name, versions) in licences::duplicates(&workspace.packages) {
        println!("warning: {name} is there {} times: {}", versions.len(), versions.join(", "));
    }
    if faults.is_empty() {
        println!("all licences are allowed: {} packages", workspace.packages.len());
    }
    Ok(faults)
}
