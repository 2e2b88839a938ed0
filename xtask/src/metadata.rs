//! What cargo knows about the workspace, reduced to what the checks ask.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, ensure};
use serde_json::Value;

/// The workspace as it is.
#[derive(Debug, Default)]
pub(crate) struct Workspace {
    /// Its folder.
    pub root: PathBuf,
    /// Its members.
    pub crates: Vec<Crate>,
    /// Members and everything that they depend on, on any platform.
    pub packages: Vec<Package>,
}

/// A member of the workspace.
#[derive(Debug, Default)]
pub(crate) struct Crate {
    /// Without the prefix `moesaic-`.
    pub name: String,
    /// Members that it depends on, build dependencies included.
    pub uses: BTreeSet<String>,
    /// Members that only its tests depend on.
    pub tests_use: BTreeSet<String>,
    /// Names of all packages that end up in it, through any number of arrows, tests left out.
    pub reaches: BTreeSet<String>,
    /// Its Cargo.toml.
    pub manifest: String,
    /// Its Rust files: path from the workspace's folder, and text.
    pub sources: Vec<(String, String)>,
}

/// A member or a dependency.
#[derive(Debug)]
pub(crate) struct Package {
    /// As published.
    pub name: String,
    /// Version.
    pub version: String,
    /// SPDX expression.
    pub licence: Option<String>,
}

/// The name in our maps: `spec` for `moesaic-spec`.
fn short(name: &str) -> &str {
    name.strip_prefix("moesaic-").unwrap_or(name)
}

impl Workspace {
    /// Asks cargo.
    pub(crate) fn load() -> anyhow::Result<Workspace> {
        let cargo = std::env::var_os("CARGO").unwrap_or("cargo".into());
        let output = Command::new(cargo).args(["metadata", "--format-version", "1", "--locked"]).output()?;
        ensure!(output.status.success(), "cargo metadata failed:\n{}", String::from_utf8_lossy(&output.stderr));
        let metadata: Value = serde_json::from_slice(&output.stdout).context("the answer of cargo metadata")?;
        let mut workspace = Workspace::from_metadata(&metadata);
        for krate in &mut workspace.crates {
            let package = list(&metadata["packages"]).iter().find(|p| short(text(&p["name"])) == krate.name);
            let manifest = PathBuf::from(text(&package.expect("crates come from packages")["manifest_path"]));
            krate.manifest = std::fs::read_to_string(&manifest)?;
            let mut folders = vec![manifest.parent().expect("a manifest is in a folder").to_path_buf()];
            while let Some(folder) = folders.pop() {
                for entry in std::fs::read_dir(&folder)? {
                    let path = entry?.path();
                    if path.is_dir() {
                        folders.push(path);
                    } else if path.extension().is_some_and(|extension| extension == "rs") {
                        let name = path.strip_prefix(&workspace.root).unwrap_or(&path).display().to_string();
                        krate.sources.push((name, std::fs::read_to_string(&path)?));
                    }
                }
            }
        }
        Ok(workspace)
    }

    /// A file of the workspace's folder.
    pub(crate) fn read(&self, name: &str) -> anyhow::Result<String> {
        std::fs::read_to_string(self.root.join(name)).with_context(|| name.to_owned())
    }

    fn from_metadata(metadata: &Value) -> Workspace {
        let members: BTreeSet<&str> = list(&metadata["workspace_members"]).iter().map(text).collect();
        let packages = list(&metadata["packages"]);
        let names: BTreeMap<&str, &str> = packages.iter().map(|p| (text(&p["id"]), text(&p["name"]))).collect();
        // Arrows between package ids: to use, and to test.
        let mut arrows: BTreeMap<&str, Vec<(&str, bool)>> = BTreeMap::new();
        for node in list(&metadata["resolve"]["nodes"]) {
            let dependencies = list(&node["deps"]).iter().flat_map(|dependency| {
                let id = text(&dependency["pkg"]);
                list(&dependency["dep_kinds"]).iter().map(move |kind| (id, kind["kind"] == "dev"))
            });
            arrows.insert(text(&node["id"]), dependencies.collect());
        }
        let no_arrows = Vec::new();
        let arrows_of = |id| arrows.get(id).unwrap_or(&no_arrows).iter().copied();
        let crates = members.iter().map(|&id| {
            let direct = |dev| {
                let to_members = arrows_of(id).filter(|(to, is_dev)| members.contains(to) && *is_dev == dev);
                to_members.map(|(to, _)| short(names[to]).to_owned()).collect::<BTreeSet<_>>()
            };
            let (uses, tests_use) = (direct(false), direct(true));
            let (mut reached, mut next) = (BTreeSet::new(), vec![id]);
            while let Some(from) = next.pop() {
                let news = arrows_of(from).filter(|(_, is_dev)| !is_dev).map(|(to, _)| to);
                next.extend(news.filter(|to| reached.insert(*to)));
            }
            Crate {
                name: short(names[id]).to_owned(),
                tests_use: &tests_use - &uses,
                uses,
                reaches: reached.into_iter().map(|id| names[id].to_owned()).collect(),
                ..Crate::default()
            }
        });
        let package = |p: &Value| Package {
            name: text(&p["name"]).to_owned(),
            version: text(&p["version"]).to_owned(),
            licence: p["license"].as_str().map(str::to_owned),
        };
        Workspace {
            root: PathBuf::from(text(&metadata["workspace_root"])),
            crates: crates.collect(),
            packages: packages.iter().map(package).collect(),
        }
    }
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map(Vec::as_slice).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn arrows_are_sorted_by_what_they_are_for() {
        let dep = |id: &str, kind: Value| json!({ "pkg": id, "dep_kinds": [{ "kind": kind }] });
        let metadata = json!({
            "workspace_root": "/w",
            "workspace_members": ["a", "b", "t"],
            "packages": [
                { "id": "a", "name": "moesaic-a", "version": "0.0.0", "license": "MIT" },
                { "id": "b", "name": "moesaic-b", "version": "0.0.0", "license": null },
                { "id": "t", "name": "moesaic-t", "version": "0.0.0", "license": null },
                { "id": "x", "name": "x", "version": "1.0.0", "license": "MIT" },
                { "id": "tokio", "name": "tokio", "version": "1.0.0", "license": "MIT" },
            ],
            "resolve": { "nodes": [
                { "id": "a", "deps": [dep("b", Value::Null), dep("t", json!("dev"))] },
                { "id": "b", "deps": [dep("x", json!("build"))] },
                { "id": "t", "deps": [dep("a", Value::Null)] },
                { "id": "x", "deps": [dep("tokio", Value::Null)] },
            ] },
        });
        let workspace = Workspace::from_metadata(&metadata);
        let a = &workspace.crates[0];
        let set = |names: &[&str]| names.iter().map(|name| name.to_string()).collect::<BTreeSet<_>>();
        assert_eq!((a.name.as_str(), &a.uses, &a.tests_use), ("a", &set(&["b"]), &set(&["t"])));
        assert_eq!(a.reaches, set(&["moesaic-b", "x", "tokio"]));
        assert_eq!(workspace.packages.len(), 5);
    }
}
