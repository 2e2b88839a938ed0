//! What is different in two plans, key by key.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::PlanFile;

/// One line for each key that differs, like `mesh.tp: 8 → 1`; a key that one of them does not have is `absent` there.
pub fn diff(a: &PlanFile, b: &PlanFile) -> Vec<String> {
    let (a, b) = (leaves(a), leaves(b));
    let keys: std::collections::BTreeSet<&String> = a.keys().chain(b.keys()).collect();
    let shown = |leaf: Option<&String>| leaf.map_or("absent", String::as_str).to_owned();
    let line = |key: &String| {
        let (from, to) = (a.get(key), b.get(key));
        (from != to).then(|| format!("{key}: {} → {}", shown(from), shown(to)))
    };
    keys.into_iter().filter_map(line).collect()
}

/// Dotted path → value, of all keys that are not sections.
fn leaves(file: &PlanFile) -> BTreeMap<String, String> {
    let mut leaves = BTreeMap::new();
    let value = serde_json::to_value(file).expect("a plan file has string keys only");
    collect(String::new(), &value, &mut leaves);
    leaves
}

fn collect(path: String, value: &Value, leaves: &mut BTreeMap<String, String>) {
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                collect(path, value, leaves);
            }
        }
        Value::String(text) => drop(leaves.insert(path, text.clone())),
        // Only lists of layers hold objects; each is a line of its own.
        Value::Array(items) if items.iter().any(Value::is_object) => {
            for item in items {
                collect(format!("{path}[{}]", item["layer"]), &item["experts"], leaves);
            }
        }
        other => drop(leaves.insert(path, other.to_string())),
    }
}
