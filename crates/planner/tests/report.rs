//! The report in all its forms.

mod script;

use moesaic_plan::Collective;
use moesaic_planner::metrics::{ClassTraffic, CommShares, ExpertLoad, LayerLoad, LinkTraffic, RankMemory, Spread};
use moesaic_planner::report::{
    ABOUT_TIMES, Activity, ClusterFacts, Comparison, ModelFacts, Sameness, StrategyReport, Timeline, TimelineRow,
    TimelineSpan, VERSION, WorkloadFacts,
};
use moesaic_spec::{Arrival, LinkClass, TokenRange, Workload};

use script::{Script, cluster, op, receive, send};

fn strategy(name: &str, baseline: bool, (tpot, tps): (f64, f64)) -> StrategyReport {
    let mut report = StrategyReport { name: name.to_owned(), baseline, ranks: 16, ..StrategyReport::default() };
    report.description = format!("{name} in words");
    report.performance.tpot_ms = Spread { mean: tpot, p50: tpot, p99: 1.5 * tpot };
    report.performance.tps_per_gpu = tps;
    report.performance.throughput = 16.0 * tps;
    report.performance.gpu_utilization = 0.684;
    let shares = CommShares { total: 0.25, exposed: 0.125, waiting: 0.05 };
    report.communication.all = shares;
    let all_reduce = ClassTraffic { collective: Collective::AllReduce, shares, messages: 12, bytes: 3 << 20 };
    report.communication.classes = vec![all_reduce];
    let link =
        LinkTraffic { class: LinkClass::InterNode, name: "HDR".into(), messages: 12, bytes: 3 << 20, utilization: 0.1 };
    report.communication.links = vec![link];
    let parts = vec![("weights".to_owned(), 30 << 30), ("KV cache".to_owned(), 10 << 30)];
    report.memory = vec![RankMemory { parts, available: 80 << 30 }; 16];
    report.sameness = Some(Sameness {
        answers: 4,
        differing_answers: 1,
        tokens: 4096,
        differing_tokens: 3,
        max_logprob_difference: 0.02,
        widest_gap: Some(0.0123),
    });
    report
}

/// The papers' Table 1, as far as it goes.
fn comparison() -> Comparison {
    let model = ModelFacts { name: "paper".into(), experts: 16, ..ModelFacts::default() };
    let workload = Workload {
        name: "chat".into(),
        num_requests: 4,
        input_tokens: TokenRange { min: 8, max: 16 },
        output_tokens: TokenRange { min: 32, max: 32 },
        seed: 1,
        arrival: Arrival::AtStart,
        prefix_hit: 0.0,
    };
    let mut comparison = Comparison::new(model, ClusterFacts::of(&cluster(2)), WorkloadFacts::of(&workload));
    comparison.strategies = vec![
        strategy("TP=8", true, (2.84, 8450.0)),
        strategy("PP=2", true, (3.12, 7692.0)),
        strategy("TP=8 + PP=2", true, (2.76, 8696.0)),
        strategy("MA", false, (1.82, 13289.0)),
    ];
    comparison
}

/// As large as it gets: 58 layers, 256 experts, 1,000 ranks that are all different.
fn large() -> Comparison {
    let mut comparison = comparison();
    for (idx, strategy) in (0u64..).zip(&mut comparison.strategies) {
        let layer = |layer| LayerLoad { layer, tokens: (0..256).map(|expert| (expert * 7919 + idx) % 509).collect() };
        strategy.expert_load = Some(ExpertLoad { layers: (3..61).map(layer).collect() });
        strategy.memory = (0..1000)
            .map(|rank| RankMemory { parts: vec![("weights".into(), (1 << 30) + rank)], available: 80 << 30 })
            .collect();
        let span = |at: u32| TimelineSpan {
            activity: if at.is_multiple_of(2) { Activity::Experts } else { Activity::Attention },
            micro_batch: at % 3,
            start: f64::from(at),
            end: f64::from(at + 1),
        };
        let row = |rank| TimelineRow { rank, compute: (0..1500).map(span).collect(), network: Vec::new() };
        strategy.timeline = Some(Timeline { step: 5, seconds: 1500.0, ranks: 1000, rows: (0..32).map(row).collect() });
    }
    comparison
}

#[test]
fn table_1_has_the_papers_rows_and_the_improvement_over_the_best_baseline() {
    let markdown = comparison().to_markdown();
    let expected = "\
| | TP=8 | PP=2 | TP=8 + PP=2 | MA | Improvement |
|---|---:|---:|---:|---:|---:|
| TPOT (ms) | 2.84 | 3.12 | 2.76 | **1.82** | 34.1 % ↓ |
| TPS per GPU | 8,450 | 7,692 | 8,696 | **13,289** | 52.8 % ↑ |
| Throughput (tokens/s) | 135,200 | 123,072 | 139,136 | **212,624** | 52.8 % ↑ |
| GPU utilisation (%) | 68.4 | 68.4 | 68.4 | 68.4 | 0 % |
| Memory efficiency (%) | 50 | 50 | 50 | 50 | 0 % |
";
    assert!(markdown.contains(expected), "{markdown}");
    assert!(markdown.contains(ABOUT_TIMES));
    assert!(markdown.contains("| all-reduce (%) | 25 (12.5) | 25 (12.5) | 25 (12.5) | 25 (12.5) |"));
}

#[test]
fn an_improvement_that_is_none_is_called_worse() {
    let mut comparison = comparison();
    comparison.strategies[3].performance.tpot_ms.mean = 5.52;
    comparison.strategies[3].performance.tps_per_gpu = 4348.0;
    let markdown = comparison.to_markdown();
    assert!(markdown.contains("| TPOT (ms) | 2.84 | 3.12 | **2.76** | 5.52 | 100 % worse |"), "{markdown}");
    assert!(markdown.contains("| TPS per GPU | 8,450 | 7,692 | **8,696** | 4,348 | 50 % worse |"), "{markdown}");
    // A factor stays narrow enough for a terminal.
    comparison.strategies[3].performance.tpot_ms.mean = 55.2;
    let text = comparison.to_text();
    assert!(text.lines().any(|line| line.starts_with("TPOT (ms)") && line.ends_with(" 20.0× worse")), "{text}");
    // Nothing to improve upon.
    comparison.strategies.truncate(3);
    assert!(!comparison.to_markdown().contains("| Improvement |"));
}

#[test]
fn whether_tokens_are_those_of_one_rank_is_said_as_it_is() {
    let mut comparison = comparison();
    comparison.strategies[0].sameness = Some(Sameness { tokens: 4096, ..Sameness::default() });
    comparison.strategies[1].sameness =
        Some(Sameness { tokens: 4096, max_logprob_difference: 1.2e-6, ..Sameness::default() });
    comparison.strategies[2].sameness = None;
    let markdown = comparison.to_markdown();
    assert!(
        markdown.contains("| answers as one rank | every bit | every token | not compared | 3 of 4 |"),
        "{markdown}"
    );
    assert!(markdown.contains("| tokens that differ | 0 of 4,096 | 0 of 4,096 | – | 3 of 4,096 |"), "{markdown}");
    assert!(markdown.contains("| largest log-prob diff | 0 | 1.2e-6 | – | 0.0200 |"), "{markdown}");
    assert!(markdown.contains("| gap where they part | – | – | – | 0.0123 |"), "{markdown}");
    assert!(comparison.to_html().contains(
        "<strong>2 of 3</strong><span>1 of them to the last bit; others part where two tokens are within 0.0123</span>"
    ));
}

#[test]
fn the_cluster_says_which_link_is_where() {
    let line = |nodes| {
        let mut cluster = cluster(nodes);
        cluster.inter_node = cluster.inter_node.filter(|_| nodes > 1);
        Comparison { cluster: ClusterFacts::of(&cluster), ..comparison() }.to_markdown()
    };
    assert!(line(1).contains("1 node of 2 × script"), "{}", line(1));
    assert!(line(1).contains("; in a node inner: 2.0e-8 GB/s at 50 %, 1,000,000 µs\n"), "{}", line(1));
    let two = line(2);
    assert!(two.contains("2 nodes of 2 × script"), "{two}");
    assert!(two.contains("µs; between nodes outer: 1.0e-8 GB/s at 50 %, 2,000,000 µs"), "{two}");
}

#[test]
fn answers_of_one_token_have_no_time_per_output_token() {
    let mut comparison = comparison();
    comparison.strategies.iter_mut().for_each(|strategy| {
        strategy.performance.tpot_ms = Spread::default();
        strategy.performance.ttft_ms.mean = 3.0;
    });
    let markdown = comparison.to_markdown();
    for row in ["| TPOT (ms) | – | – | – | – | n/a |", "| TPOT p50 (ms) | – | – | – | – |"] {
        assert!(markdown.contains(row), "no {row:?} in {markdown}");
    }
    let page = comparison.to_html();
    assert!(!page.contains("Lowest TPOT") && page.contains("Time to first token"), "{page}");
    assert!(comparison.strategies[0].summary().ends_with("TTFT 3.00 ms"), "{}", comparison.strategies[0].summary());
}

#[test]
fn json_is_read_back_and_other_versions_are_refused() {
    let comparison = large();
    assert_eq!(Comparison::from_json(&comparison.to_json()).unwrap(), comparison);
    let newer = Comparison { version: VERSION + 1, ..comparison };
    let error = Comparison::from_json(&newer.to_json()).unwrap_err();
    assert_eq!(error.to_string(), "this is no comparison of version 1: version is 2");
    let error = Comparison::from_json("[]").unwrap_err().to_string();
    assert!(error.starts_with("this is no comparison of version 1: invalid length 0"), "{error}");
}

#[test]
fn text_fits_a_terminal() {
    let mut comparison = comparison();
    comparison.strategies =
        (0..12).map(|idx| strategy(&format!("a strategy of long name {idx}"), false, (1e6, 1e9))).collect();
    comparison.notes.push("A note that goes on and on. ".repeat(20));
    for comparison in [&comparison, &large()] {
        let text = comparison.to_text();
        for line in text.lines() {
            assert!(line.chars().count() <= 100, "{line}");
        }
    }
    let text = comparison.to_text();
    // Six at a time: two heads in each table.
    assert_eq!(text.lines().filter(|line| line.trim_start().starts_with("a strategy")).count() % 2, 0);
    assert_eq!(text.lines().filter(|line| line.starts_with("TPOT (ms)")).count(), 2);
}

#[test]
fn every_row_of_a_markdown_table_has_the_cells_of_its_head() {
    let mut comparison = large();
    comparison.strategies[0].name = "a|b\n<i>".into();
    let mut cells = None;
    for line in comparison.to_markdown().lines() {
        let count = line.replace("\\|", "").matches('|').count();
        match (line.starts_with('|'), cells) {
            (true, Some(expected)) => assert_eq!(count, expected, "{line}"),
            (true, None) => cells = Some(count),
            (false, _) => cells = None,
        }
    }
}

/// Every element that is opened is closed, in the right order.
fn assert_balanced(html: &str) {
    const VOID: [&str; 3] = ["meta", "br", "!doctype"];
    let style = html.find("<style>").unwrap()..html.find("</style>").unwrap();
    let html = format!("{}{}", &html[..style.start], &html[style.end + "</style>".len()..]);
    let mut open: Vec<&str> = Vec::new();
    for tag in html.split('<').skip(1) {
        let tag = tag.split('>').next().unwrap();
        let name = tag.trim_start_matches('/').split([' ', '/']).next().unwrap();
        if tag.starts_with('/') {
            assert_eq!(open.pop(), Some(name));
        } else if !tag.ends_with('/') && !VOID.contains(&name) {
            open.push(name);
        }
    }
    assert!(open.is_empty(), "{open:?}");
}

#[test]
fn the_page_needs_nothing_else_and_says_what_its_times_are() {
    let mut comparison = large();
    comparison.strategies[1].name = "<script>alert(\"1\")</script>".into();
    comparison.model.name = "a & b".into();
    comparison.notes.push("</main><img src=x>".into());
    let page = comparison.to_html();
    for outside in ["http:", "https:", "<script", "<link", "<img", "@import", "url("] {
        assert!(!page.contains(outside), "{outside}");
    }
    assert!(page.contains(ABOUT_TIMES) && page.contains("<title>a &amp; b on"));
    assert_balanced(&page);
    // 15,000 cells, 1,000 ranks and 48,000 spans for each of four strategies.
    assert!(page.len() < 8 << 20, "{} bytes", page.len());
}

#[test]
fn nothing_to_show_is_shown_as_nothing() {
    let mut empty = comparison();
    empty.strategies.clear();
    assert_balanced(&empty.to_html());
    assert!(empty.to_markdown().contains("0 ways to spread it") && empty.to_text().contains("0 ways"));
    empty.strategies.push(StrategyReport::default());
    assert_balanced(&empty.to_html());
    assert!(!empty.to_html().contains("NaN"));
}

#[test]
fn facts_are_those_of_the_specifications() {
    let spec = moesaic_spec::preset("mixtral-8x7b").unwrap().spec().unwrap();
    let mut comparison = comparison();
    comparison.model = ModelFacts::of("mixtral-8x7b", &spec);
    let markdown = comparison.to_markdown();
    for line in [
        "# mixtral-8x7b on script: 4 ways to spread it",
        "- Model: 46.7 B parameters (12.9 B active), 32 layers, 8 experts in 32 of them, 2 a token, BF16",
        "- Workload: 4 requests of 8 to 16 tokens, answers of 32, all there at the start (seed 1)",
    ] {
        assert!(markdown.contains(line), "{markdown}");
    }
}

/// What the virtual clock said, as bars.
#[test]
fn a_timeline_shows_actions_waits_and_messages() {
    let mut script = Script::new(2);
    script.compute(0, &[], vec![op(3), send(1, 12, 20)]);
    script.compute(0, &[], vec![op(1)]);
    script.compute(1, &[], vec![op(1), receive(0, 12, 20), op(2)]);
    let times = script.run(&cluster(1)).unwrap();
    let timeline = Timeline::of(&times, &script.schedules);
    assert_eq!((timeline.seconds, timeline.ranks, timeline.rows.len()), (8.0, 2, 2));
    let spans =
        |spans: &[TimelineSpan]| -> Vec<_> { spans.iter().map(|span| (span.activity, span.start, span.end)).collect() };
    // Two actions of one kind without a gap are one bar.
    assert_eq!(spans(&timeline.rows[0].compute), [(Activity::Attention, 0.0, 4.0)]);
    assert_eq!(spans(&timeline.rows[0].network), [(Activity::Message(Collective::AllToAll), 3.0, 6.0)]);
    let receiver = [(Activity::Attention, 0.0, 8.0), (Activity::Waiting, 1.0, 6.0)];
    assert_eq!(spans(&timeline.rows[1].compute), receiver);

    let many = Script::new(1000);
    let timeline = Timeline::of(&many.run(&cluster(500)).unwrap(), &many.schedules);
    assert_eq!((timeline.rows.len(), timeline.rows[31].rank), (32, 968));
}
