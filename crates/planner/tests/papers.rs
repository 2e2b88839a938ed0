//! The papers' claims as a whole: physics bounds every prediction, and every claim has a verdict of the one rule.

use moesaic_planner::PlannerError;
use moesaic_planner::papers::claim::{Better, Finding};
use moesaic_planner::papers::verdict::Verdict;
use moesaic_planner::papers::{NAMES, Paper, markdown, reproduce, text};

fn papers() -> Vec<Paper> {
    NAMES.into_iter().map(|name| reproduce(name).unwrap()).collect()
}

fn finding<'p>(papers: &'p [Paper], paper: &str, what: &str) -> &'p Finding {
    let paper = papers.iter().find(|other| other.name == paper).unwrap();
    paper.findings.iter().find(|finding| finding.what == what).unwrap_or_else(|| panic!("no {what:?}"))
}

#[test]
fn nothing_is_predicted_that_physics_forbids() {
    let papers = papers();
    let mut bounded = 0;
    for (paper, finding) in papers.iter().flat_map(|paper| paper.findings.iter().map(move |finding| (paper, finding))) {
        let at = format!("{} {}: {}", paper.name, finding.at, finding.what);
        for answer in &finding.answers {
            let estimate = answer.estimate;
            assert!(estimate.value.is_finite(), "{at}: {answer:?}");
            let Some(bound) = answer.bound.as_ref().filter(|bound| bound.limits) else { continue };
            bounded += 1;
            assert!(!bound.arithmetic.is_empty(), "{at}");
            match finding.better {
                Better::Less => {
                    assert!(bound.value <= estimate.value && bound.value <= estimate.low, "{at}: {answer:?}")
                }
                Better::More => {
                    assert!(bound.value >= estimate.value && bound.value >= estimate.high, "{at}: {answer:?}")
                }
            }
        }
        // Where something is predicted, it is judged; where nothing is, it is said why.
        let silent = finding.answers.is_empty();
        let unjudged = matches!(finding.verdict, Verdict::OutOfReach { .. });
        assert!(silent || !unjudged, "{at}");
    }
    assert!(bounded > 60, "most predictions have a bound: {bounded}");

    // What no price can change.
    for (paper, what) in [("003", "energy per token, MA separation"), ("004", "energy per token, the baseline")] {
        let verdict = &finding(&papers, paper, what).verdict;
        assert_eq!(verdict.word(), "cannot hold", "{what}: {}", verdict.sentence());
    }
    assert_eq!(finding(&papers, "002", "bytes of an expert").verdict, Verdict::Holds);
    assert_eq!(finding(&papers, "002", "time of one token's transfer").verdict, Verdict::Holds);
    assert_eq!(finding(&papers, "003", "perplexity").verdict.word(), "out of reach");
}

#[test]
fn contradictions_are_found_and_what_agrees_is_not_blamed() {
    let papers: Vec<Paper> = ["001", "003", "004"].into_iter().map(|name| reproduce(name).unwrap()).collect();
    let checks = |paper: &str, part: &str| -> Vec<bool> {
        let paper = papers.iter().find(|other| other.name == paper).unwrap();
        let of = paper.checks.iter().filter(|check| check.says.contains(part) || check.follows.contains(part));
        of.map(|check| check.agrees).collect()
    };
    assert_eq!(checks("003", "TPS × TPOT of"), [false; 4]);
    assert_eq!(checks("003", "8.4 + 6.2 + 2.9 + 1.3"), [true]);
    assert_eq!(checks("003", "16.8 + 16.8"), [true]);
    assert_eq!(checks("003", "123.7 / 124"), [false]);
    assert_eq!(checks("003", "13,289 / 8,696 − 1"), [true]);
    assert_eq!(checks("003", "2.76 / 1.82 − 1"), [false]);
    assert_eq!(checks("004", "SwiGLU"), [false]);
    assert_eq!(checks("004", "communication in all"), [true; 4]);
    assert_eq!(checks("004", "memory in all"), [true; 4]);
    assert_eq!(checks("001", "8.3 / 2.2"), [true]);
    assert_eq!(checks("001", "450,000 tokens/s × 2.2 ms"), [false]);
}

#[test]
fn documents_are_deterministic_and_name_every_claim() {
    let paper = || vec![reproduce("001").unwrap()];
    let (first, second) = (markdown(&paper(), "papers"), markdown(&paper(), "papers"));
    assert_eq!(first, second);
    assert_eq!(text(&paper()), text(&paper()));
    for finding in &paper()[0].findings {
        assert!(first.contains(&finding.what.replace('<', "&lt;")), "{}", finding.what);
    }
}

#[test]
fn other_papers_are_refused() {
    let error = reproduce("005").unwrap_err();
    assert!(matches!(error, PlannerError::UnknownPaper { .. }));
    assert_eq!(error.to_string(), "there is no paper \"005\"; there are 000, 001, 002, 003, 004");
}
