//! Traces are what viewers read.

mod script;

use std::collections::HashMap;

use moesaic_planner::VirtualClock;
use moesaic_planner::trace::ChromeTrace;
use serde_json::Value;

use script::{Script, cluster, op, receive, send, settings};

/// Three steps of two ranks, of which two are wanted.
fn trace() -> Vec<Value> {
    let cluster = cluster(1);
    let mut script = Script::new(2);
    script.compute(0, &[], vec![op(3), send(1, 12, 20)]);
    script.compute(0, &[], vec![op(1), send(1, 22, 40)]);
    script.compute(1, &[], vec![op(1), receive(0, 12, 20), op(2), receive(0, 22, 40)]);
    script.ranks[0].background = vec![send(1, 15, 20)];
    let mut clock = VirtualClock::new(&cluster, settings(2));
    let names = ["attention".to_owned(), "experts \"0\"".to_owned()];
    let mut trace = ChromeTrace::new(Vec::new(), &names, 2).unwrap();
    for _ in 0..3 {
        let times = clock.step(script.input()).unwrap();
        trace.step(&times, &script.schedules).unwrap();
    }
    serde_json::from_slice(&trace.finish().unwrap()).unwrap()
}

fn of<'a>(trace: &'a [Value], ph: &'a str) -> impl Iterator<Item = &'a Value> {
    trace.iter().filter(move |event| event["ph"] == ph)
}

#[test]
fn every_action_op_message_and_wait_is_a_slice() {
    let trace = trace();
    let names = |name: &str| of(&trace, "X").filter(|event| event["name"] == name).count();
    assert_eq!((names("attention"), names("linear")), (6, 8));
    assert_eq!((names("dispatch"), names("weights"), names("wait")), (4, 2, 4));
    let wait = of(&trace, "X").find(|event| event["name"] == "wait").unwrap();
    // From 1 s; the message is sent at 3, but weights are in its way until 2 + 2.
    assert_eq!((wait["ts"].as_f64(), wait["pid"].as_u64()), (Some(1e6), Some(1)));
    assert_eq!((&wait["args"]["for"], &wait["args"]["from"]), (&Value::from("dispatch"), &Value::from(0)));
    let dispatch = of(&trace, "X").find(|event| event["name"] == "dispatch").unwrap();
    assert_eq!((dispatch["args"]["bytes"].as_u64(), dispatch["tid"].as_u64()), (Some(20), Some(2)));
    let named = of(&trace, "M").find(|event| event["pid"] == 1 && event["name"] == "process_name").unwrap();
    assert_eq!(named["args"]["name"], "rank 1: experts \"0\"");
}

#[test]
fn arrows_go_from_send_to_receive() {
    let trace = trace();
    let ends: HashMap<u64, &Value> = of(&trace, "f").map(|event| (event["id"].as_u64().unwrap(), event)).collect();
    assert_eq!((of(&trace, "s").count(), ends.len()), (4, 4));
    for start in of(&trace, "s") {
        let end = ends[&start["id"].as_u64().unwrap()];
        assert!(start["ts"].as_f64() < end["ts"].as_f64());
        assert_eq!((start["pid"].as_u64(), end["pid"].as_u64()), (Some(0), Some(1)));
    }
}

/// Viewers need slices of a thread to nest.
#[test]
fn slices_of_a_thread_are_nested_or_apart() {
    let trace = trace();
    let mut threads: HashMap<(u64, u64), Vec<(f64, f64)>> = HashMap::new();
    for event in of(&trace, "X") {
        let (start, duration) = (event["ts"].as_f64().unwrap(), event["dur"].as_f64().unwrap());
        let thread = (event["pid"].as_u64().unwrap(), event["tid"].as_u64().unwrap());
        threads.entry(thread).or_default().push((start, start + duration));
    }
    for spans in threads.values() {
        for (idx, a) in spans.iter().enumerate() {
            for b in &spans[idx + 1..] {
                let apart = a.1 <= b.0 + 1e-3 || b.1 <= a.0 + 1e-3;
                let within =
                    |inner: &(f64, f64), outer: &(f64, f64)| inner.0 >= outer.0 - 1e-3 && inner.1 <= outer.1 + 1e-3;
                assert!(apart || within(a, b) || within(b, a), "{a:?} {b:?}");
            }
        }
    }
}

#[test]
fn a_trace_of_nothing_is_an_empty_list() {
    let trace = ChromeTrace::new(Vec::new(), &[], 5).unwrap().finish().unwrap();
    assert_eq!(trace, b"[]\n");
}
