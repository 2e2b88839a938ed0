//! `moesaic reproduce` as a user meets it.

mod common;

use std::fs;
use std::path::Path;

use common::{arg, moesaic, temp};

/// The document in the repository is what the command writes: after a change of prices, run it again.
#[test]
fn the_document_is_up_to_date() {
    let temp = temp();
    let output = temp.path().join("papers.md");
    let json = temp.path().join("papers.json");
    let table = moesaic(&["reproduce", "--output", arg(&output), "--json", arg(&json)]).ok();
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs");
    let same = |name: &str| {
        let [written, committed] = [temp.path(), &docs].map(|folder| fs::read_to_string(folder.join(name)).unwrap());
        assert!(written == committed, "docs/{name} is not what `moesaic reproduce` writes");
    };
    same("papers.md");
    let plots = ["tpot-by-length", "scaling", "communication", "parallel-efficiency"];
    plots.iter().for_each(|plot| same(&format!("papers/{plot}.svg")));
    let drawn = fs::read_dir(temp.path().join("papers")).unwrap().count();
    assert_eq!(drawn, plots.len());

    let papers: serde_json::Value = serde_json::from_str(&fs::read_to_string(&json).unwrap()).unwrap();
    let names: Vec<&str> = papers.as_array().unwrap().iter().map(|paper| paper["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["000", "001", "002", "003", "004"]);
    for paper in papers.as_array().unwrap() {
        for finding in paper["findings"].as_array().unwrap() {
            let what = finding["what"].as_str().unwrap();
            assert!(table.contains(what), "no {what:?} in the table");
            assert!(finding["verdict"]["verdict"].is_string() && finding["stated"]["value"].is_number(), "{finding}");
        }
    }
}

#[test]
fn one_paper_alone_each_once() {
    let temp = temp();
    let output = temp.path().join("one.md");
    let table = moesaic(&["reproduce", "001", "001", "-o", arg(&output)]).ok();
    assert_eq!(table.matches("001 large expert parallelism").count(), 1);
    let document = fs::read_to_string(&output).unwrap();
    assert!(document.contains("## 001:") && !document.contains("## 003:"));
}

#[test]
fn papers_that_are_not_there_are_refused() {
    let temp = temp();
    let output = temp.path().join("papers.md");
    let refused = moesaic(&["reproduce", "003", "007", "-o", arg(&output)]).refused(&[]);
    assert_eq!(refused, "error: there is no paper \"007\"; there are 000, 001, 002, 003, 004");
    assert!(!output.exists(), "nothing is written before all is checked");
    let folder = temp.path().join("no/such");
    fs::write(temp.path().join("no"), "a file").unwrap();
    moesaic(&["reproduce", "001", "-o", arg(&folder)]).refused(&["cannot create the folder"]);
}
