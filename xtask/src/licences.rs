//! The licences of the dependencies against the list in deny.toml: the part of `cargo deny` that must not be skipped
//! where that program is not installed.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, ensure};

use crate::metadata::Package;

/// The list `allow` of the section `[licenses]`.
pub(crate) fn allowed(deny_toml: &str) -> anyhow::Result<BTreeSet<String>> {
    let (_, section) = deny_toml.split_once("[licenses]").context("deny.toml has no section [licenses]")?;
    let (_, list) = section.split_once("allow = [").context("deny.toml: [licenses] has no list `allow`")?;
    let (list, _) = list.split_once(']').context("deny.toml: the list `allow` has no end")?;
    let entries = list.lines().map(|line| line.split('#').next().unwrap_or_default());
    let names: BTreeSet<String> =
        entries.flat_map(|line| line.split('"').skip(1).step_by(2)).map(str::to_owned).collect();
    ensure!(!names.is_empty(), "deny.toml allows no licence at all");
    Ok(names)
}

/// Packages whose licence does not allow us to use them under the list.
pub(crate) fn check(packages: &[Package], allowed: &BTreeSet<String>) -> Vec<String> {
    let fault = |package: &Package| {
        let Package { name, version, licence } = package;
        match licence {
            None => Some(format!("{name} {version} names no licence")),
            Some(licence) if satisfied(licence, allowed) => None,
            Some(licence) => Some(format!("{name} {version}: licence {licence} is not allowed by deny.toml")),
        }
    };
    packages.iter().filter_map(fault).collect()
}

/// Packages that are there in more than one version.
pub(crate) fn duplicates(packages: &[Package]) -> Vec<(&str, Vec<&str>)> {
    let mut versions: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for package in packages {
        versions.entry(&package.name).or_default().push(&package.version);
    }
    versions.into_iter().filter(|(_, versions)| versions.len() > 1).collect()
}

/// Whether an SPDX expression can be met with the allowed licences. `AND` binds tighter than `OR`; `A/B` is an old
/// spelling of `A OR B`; `A WITH B` is a licence of its own.
fn satisfied(expression: &str, allowed: &BTreeSet<String>) -> bool {
    let spaced = expression.replace('(', " ( ").replace(')', " ) ").replace('/', " OR ");
    let words: Vec<&str> = spaced.split_whitespace().collect();
    let mut rest = words.as_slice();
    let result = any(&mut rest, allowed);
    // What cannot be understood is not allowed.
    rest.is_empty() && result == Some(true)
}

fn any(words: &mut &[&str], allowed: &BTreeSet<String>) -> Option<bool> {
    let mut result = all(words, allowed)?;
    while let Some((&"OR", rest)) = words.split_first() {
        *words = rest;
        result |= all(words, allowed)?;
    }
    Some(result)
}

fn all(words: &mut &[&str], allowed: &BTreeSet<String>) -> Option<bool> {
    let mut result = one(words, allowed)?;
    while let Some((&"AND", rest)) = words.split_first() {
        *words = rest;
        result &= one(words, allowed)?;
    }
    Some(result)
}

fn one(words: &mut &[&str], allowed: &BTreeSet<String>) -> Option<bool> {
    let (&first, rest) = words.split_first()?;
    *words = rest;
    if first == "(" {
        let result = any(words, allowed)?;
        let (&closing, rest) = words.split_first()?;
        *words = rest;
        return (closing == ")").then_some(result);
    }
    if let [with, exception, rest @ ..] = *words
        && *with == "WITH"
    {
        *words = rest;
        return Some(allowed.contains(&format!("{first} WITH {exception}")));
    }
    Some(allowed.contains(first))
}

#[cfg(test)]
mod tests {
    use super::*;

    const DENY: &str =
        "[graph]\n[licenses]\nallow = [\n  \"MIT\", # short\n  # \"GPL-3.0-only\",\n  \"Zlib\",\n  \"A WITH B\",\n]\n";

    #[test]
    fn expressions_are_read_as_spdx_means_them() {
        let allowed = allowed(DENY).unwrap();
        assert_eq!(allowed.len(), 3);
        for good in
            ["MIT", "GPL-3.0-only OR MIT", "MIT/Apache-2.0", "(X OR MIT) AND Zlib", "X AND Y OR Zlib", "A WITH B"]
        {
            assert!(satisfied(good, &allowed), "{good}");
        }
        for bad in ["X", "MIT AND X", "(MIT OR X) AND Y", "A", "A WITH C", "", "(MIT", "MIT Zlib", "MIT OR", "mit"] {
            assert!(!satisfied(bad, &allowed), "{bad}");
        }
    }

    #[test]
    fn a_package_that_is_not_allowed_is_named() {
        let package = |name: &str, version: &str, licence: Option<&str>| Package {
            name: name.into(),
            version: version.into(),
            licence: licence.map(str::to_owned),
        };
        let packages =
            [package("a", "1.0.0", Some("MIT")), package("b", "2.0.0", Some("X")), package("a", "1.1.0", None)];
        assert_eq!(
            check(&packages, &allowed(DENY).unwrap()),
            ["b 2.0.0: licence X is not allowed by deny.toml", "a 1.1.0 names no licence"]
        );
        assert_eq!(duplicates(&packages), [("a", vec!["1.0.0", "1.1.0"])]);
    }
}
