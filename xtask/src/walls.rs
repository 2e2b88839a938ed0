//! The walls between crates, read from the table in ARCHITECTURE.md and held against what is there.
//!
//! The table is the one whose header is `crate | floor | may use | its tests also | unsafe | async`. Names are in
//! backticks; `yes` opens the doors of the last two columns.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, bail, ensure};

use crate::metadata::{Crate, Workspace};

/// What the map says about one crate.
#[derive(Debug)]
pub(crate) struct Room {
    floor: u32,
    may_use: BTreeSet<String>,
    tests_may_use: BTreeSet<String>,
    may_be_unsafe: bool,
    may_be_async: bool,
}

const HEADER: [&str; 6] = ["crate", "floor", "may use", "its tests also", "unsafe", "async"];

/// Packages that bring an async runtime.
const ASYNC_RUNTIMES: [&str; 5] = ["tokio", "async-std", "smol", "async-executor", "futures-executor"];

/// Reads the table.
pub(crate) fn parse(document: &str) -> anyhow::Result<BTreeMap<String, Room>> {
    let mut lines = document.lines().map(cells).skip_while(|cells| *cells != HEADER);
    ensure!(lines.next().is_some(), "ARCHITECTURE.md has no table with the header | {} |", HEADER.join(" | "));
    let mut rooms = BTreeMap::new();
    // The line under the header is dashes.
    for row in lines.skip(1).take_while(|row| !row.is_empty()) {
        let [name, floor, may_use, tests, unsafety, asynchrony] = row.as_slice() else {
            bail!("ARCHITECTURE.md: a row of {} cells instead of {}: {row:?}", row.len(), HEADER.len());
        };
        let name = names(name).pop_first().with_context(|| format!("{name:?} is no crate in backticks"))?;
        let room = Room {
            floor: floor.parse().with_context(|| format!("`{name}`: floor {floor:?} is not a number"))?,
            may_use: names(may_use),
            tests_may_use: names(tests),
            may_be_unsafe: yes(unsafety).with_context(|| format!("`{name}`, unsafe"))?,
            may_be_async: yes(asynchrony).with_context(|| format!("`{name}`, async"))?,
        };
        ensure!(rooms.insert(name.clone(), room).is_none(), "ARCHITECTURE.md has `{name}` twice in its table");
    }
    Ok(rooms)
}

/// The cells of a table's line; none if it is not one.
fn cells(line: &str) -> Vec<&str> {
    let inner = line.trim().strip_prefix('|').and_then(|line| line.strip_suffix('|'));
    inner.map(|inner| inner.split('|').map(str::trim).collect()).unwrap_or_default()
}

/// What is in backticks.
fn names(cell: &str) -> BTreeSet<String> {
    cell.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

fn yes(cell: &str) -> anyhow::Result<bool> {
    match cell {
        "yes" => Ok(true),
        "no" | "" => Ok(false),
        other => bail!("{other:?} is neither yes nor no"),
    }
}

/// Every way in which the workspace differs from the map, and the map from itself.
pub(crate) fn check(rooms: &BTreeMap<String, Room>, workspace: &Workspace) -> Vec<String> {
    let mut faults = Vec::new();
    for (name, room) in rooms {
        if !workspace.crates.iter().any(|krate| krate.name == *name) {
            faults.push(format!("ARCHITECTURE.md has a crate `{name}`, the workspace has not"));
        }
        for used in room.may_use.iter().chain(&room.tests_may_use) {
            if !rooms.contains_key(used) {
                faults.push(format!("ARCHITECTURE.md lets `{name}` use `{used}`, which has no row"));
            }
        }
        for used in &room.may_use {
            if let Some(below) = rooms.get(used)
                && below.floor >= room.floor
            {
                let (from, to) = (room.floor, below.floor);
                faults.push(format!("ARCHITECTURE.md: `{name}` on floor {from} may not use `{used}` on floor {to}"));
            }
        }
    }
    for krate in &workspace.crates {
        match rooms.get(&krate.name) {
            Some(room) => check_crate(krate, room, &mut faults),
            None => faults.push(format!("`{}` has no row in ARCHITECTURE.md", krate.name)),
        }
    }
    faults
}

fn check_crate(krate: &Crate, room: &Room, faults: &mut Vec<String>) {
    let name = &krate.name;
    for used in krate.uses.difference(&room.may_use) {
        faults.push(format!("`{name}` uses `{used}`: ARCHITECTURE.md has no such arrow"));
    }
    for used in
        krate.tests_use.iter().filter(|used| !room.may_use.contains(*used) && !room.tests_may_use.contains(*used))
    {
        faults.push(format!("the tests of `{name}` use `{used}`: ARCHITECTURE.md has no such arrow"));
    }
    if !room.may_be_async {
        for runtime in ASYNC_RUNTIMES.iter().filter(|runtime| krate.reaches.contains(**runtime)) {
            faults.push(format!("`{name}` depends on the async runtime {runtime}, directly or through others"));
        }
    }
    if room.may_be_unsafe {
        if lint(&krate.manifest, "clippy", "undocumented_unsafe_blocks") != Some("\"deny\"") {
            faults.push(format!("`{name}` has unsafe code and must deny clippy's undocumented_unsafe_blocks"));
        }
        return;
    }
    if !inherits_lints(&krate.manifest) {
        faults.push(format!("`{name}` must say `[lints] workspace = true`: unsafe code is denied there"));
    }
    for (path, text) in &krate.sources {
        // In two parts, so that this line is not one of them.
        let lint = concat!("unsafe", "_code");
        if text.lines().any(|line| line.contains(lint) && (line.contains("allow(") || line.contains("expect("))) {
            faults.push(format!("{path} lifts the lint unsafe_code: `{name}` may not have unsafe code"));
        }
    }
}

/// The lines of one `[section]` of a manifest, comments left out.
fn section<'a>(manifest: &'a str, header: &str) -> impl Iterator<Item = (&'a str, &'a str)> {
    let lines = manifest.lines().map(str::trim).skip_while(move |line| *line != header);
    let lines = lines.skip(1).take_while(|line| !line.starts_with('['));
    let lines = lines.map(|line| line.split('#').next().unwrap_or_default());
    lines.filter_map(|line| line.split_once('=')).map(|(key, value)| (key.trim(), value.trim()))
}

fn inherits_lints(manifest: &str) -> bool {
    section(manifest, "[lints]").any(|pair| pair == ("workspace", "true"))
}

fn lint<'a>(manifest: &'a str, tool: &str, name: &str) -> Option<&'a str> {
    section(manifest, &format!("[lints.{tool}]")).find(|(key, _)| *key == name).map(|(_, value)| value)
}

/// Files and folders that the document names in backticks and that are not there.
pub(crate) fn missing_paths(document: &str, exists: impl Fn(&str) -> bool) -> Vec<String> {
    const TREES: [&str; 7] = ["crates/", "xtask/", "docs/", "specs/", "fuzz/", "examples/", ".ci/"];
    let mut fenced = false;
    let prose = document.lines().filter(|line| {
        let fence = line.trim_start().starts_with("```");
        fenced ^= fence;
        !fenced && !fence
    });
    let paths: BTreeSet<String> = prose.flat_map(names).collect();
    let ours = paths.iter().filter(|path| TREES.iter().any(|tree| path.starts_with(tree)));
    // A path with a placeholder in it names many.
    let missing = ours.filter(|path| !path.contains(['<', '*', '{', ' ']) && !exists(path));
    missing.map(|path| format!("ARCHITECTURE.md names `{path}`, which does not exist")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAP: &str = "
# Map
| crate | floor | may use | its tests also | unsafe | async |
| --- | --- | --- | --- | --- | --- |
| `top` | 3 | `low` `mid` | | no | yes |
| `mid` | 2 | `low` | `kit` | no | no |
| `low` | 1 | nothing | | yes | no |
| `kit` | 1 | nothing | | no | no |

| another | table |
";

    fn set(names: &[&str]) -> BTreeSet<String> {
        names.iter().map(|name| name.to_string()).collect()
    }

    fn krate(name: &str, uses: &[&str]) -> Crate {
        let manifest = match name {
            "low" => "[lints.clippy]\nundocumented_unsafe_blocks = \"deny\"\n",
            _ => "[lints]\nworkspace = true # all of them\n\n[dependencies]\n",
        };
        Crate { name: name.into(), uses: set(uses), manifest: manifest.into(), ..Crate::default() }
    }

    /// A workspace that agrees with the map.
    fn good() -> Workspace {
        let mut mid = krate("mid", &["low"]);
        mid.tests_use = set(&["kit"]);
        let crates = vec![krate("top", &["low", "mid"]), mid, krate("low", &[]), krate("kit", &[])];
        Workspace { crates, ..Workspace::default() }
    }

    fn faults(change: impl FnOnce(&mut Workspace)) -> Vec<String> {
        let mut workspace = good();
        change(&mut workspace);
        check(&parse(MAP).unwrap(), &workspace)
    }

    #[test]
    fn a_workspace_like_its_map_has_no_fault() {
        assert_eq!(faults(|_| {}), Vec::<String>::new());
    }

    #[test]
    fn a_forbidden_arrow_is_reported() {
        assert_eq!(
            faults(|w| w.crates[2].uses = set(&["mid"])),
            ["`low` uses `mid`: ARCHITECTURE.md has no such arrow"]
        );
        assert_eq!(
            faults(|w| w.crates[3].tests_use = set(&["low"])),
            ["the tests of `kit` use `low`: ARCHITECTURE.md has no such arrow"]
        );
        // What tests may use, the crate itself may not.
        assert_eq!(
            faults(|w| w.crates[1].uses = set(&["low", "kit"])),
            ["`mid` uses `kit`: ARCHITECTURE.md has no such arrow"]
        );
    }

    #[test]
    fn map_and_workspace_have_the_same_crates() {
        assert_eq!(faults(|w| drop(w.crates.pop())), ["ARCHITECTURE.md has a crate `kit`, the workspace has not"]);
        assert_eq!(faults(|w| w.crates.push(krate("new", &[]))), ["`new` has no row in ARCHITECTURE.md"]);
    }

    #[test]
    fn unsafe_code_stays_in_its_rooms() {
        assert_eq!(
            faults(|w| w.crates[0].manifest = "[dependencies]\nworkspace = true\n".into()),
            ["`top` must say `[lints] workspace = true`: unsafe code is denied there"]
        );
        let stricter = concat!("#![forbid(unsafe", "_code)]").to_owned();
        assert_eq!(faults(|w| w.crates[1].sources.push(("x.rs".into(), stricter))), Vec::<String>::new());
        let source = concat!("#![allow(unsafe", "_code)]").to_owned();
        assert_eq!(
            faults(|w| w.crates[1].sources.push(("crates/mid/src/lib.rs".into(), source))),
            ["crates/mid/src/lib.rs lifts the lint unsafe_code: `mid` may not have unsafe code"]
        );
        assert_eq!(
            faults(|w| w.crates[2].manifest.clear()),
            ["`low` has unsafe code and must deny clippy's undocumented_unsafe_blocks"]
        );
    }

    #[test]
    fn async_runtimes_stay_at_the_top() {
        assert_eq!(
            faults(|w| w.crates.iter_mut().take(2).for_each(|krate| krate.reaches = set(&["tokio"]))),
            ["`mid` depends on the async runtime tokio, directly or through others"]
        );
    }

    #[test]
    fn the_map_must_agree_with_itself() {
        let upward = MAP.replace("| `low` | 1 | nothing |", "| `low` | 1 | `mid` `gone` |");
        assert_eq!(
            check(&parse(&upward).unwrap(), &good()),
            [
                "ARCHITECTURE.md lets `low` use `gone`, which has no row",
                "ARCHITECTURE.md: `low` on floor 1 may not use `mid` on floor 2"
            ]
        );
        assert!(parse("no table").is_err());
        assert!(parse(&MAP.replace("| yes | no |", "| maybe | no |")).is_err());
        assert!(parse(&MAP.replace("`kit` | 1", "`low` | 1")).is_err());
    }

    #[test]
    fn paths_in_the_document_exist() {
        let document = "`crates/a`, `crates/b/src/x.rs`, `crates/<op>/cpu.rs`, `cargo x`\n```\n`crates/fenced`\n```\n";
        assert_eq!(
            missing_paths(document, |path| path == "crates/a"),
            ["ARCHITECTURE.md names `crates/b/src/x.rs`, which does not exist"]
        );
    }
}
