//! `moesaic validate` on files that it has never seen, as a user meets it.

mod common;

use std::fs;
use std::path::PathBuf;

use common::{arg, moesaic, temp};
use tempfile::TempDir;

const NAMES: &str = "id,silicon_data_source,backend,backend_version,model_path,system,mode,isl,osl,gemm_quant_mode,\
                     moe_quant_mode,batch_size,tp_size,moe_tp_size,moe_ep_size,silicon_ttft_ms,silicon_tpot_ms,colour";

/// A row that is fine, with some columns exchanged.
fn row(changes: &[(&str, &str)]) -> String {
    let names: Vec<&str> = NAMES.split(',').map(str::trim).collect();
    let fine = [
        "mine_tp8_ep1_1",
        "a lab; silicon_concurrency=16",
        "vllm",
        "0.18.0",
        "MiniMaxAI/MiniMax-M2.5",
        "h200_sxm",
        "agg",
        "1024",
        "1024",
        "fp8",
        "fp8",
        "16",
        "8",
        "8",
        "1",
        "130",
        "11",
        "blue",
    ];
    let value = |(name, fine): (&&str, &str)| {
        changes.iter().find(|(changed, _)| changed == name).map_or(fine, |(_, value)| value).to_owned()
    };
    names.iter().zip(fine).map(value).collect::<Vec<_>>().join(",")
}

fn served(rows: &[String]) -> (TempDir, PathBuf) {
    let folder = temp();
    let path = folder.path().join("served.csv");
    fs::write(&path, format!("{NAMES}\n{}\n", rows.join("\n"))).unwrap();
    (folder, path)
}

fn refused(rows: &[String], parts: &[&str]) {
    let (_folder, path) = served(rows);
    moesaic(&["validate", "--e2e", arg(&path)]).refused(parts);
}

#[test]
fn rows_that_nobody_can_predict_are_passed_over_with_their_reasons() {
    let rows = [
        row(&[]),
        row(&[("silicon_data_source", "here"), ("batch_size", "64"), ("silicon_tpot_ms", "18")]),
        row(&[("model_path", "nobody/Nothing-7B")]),
        row(&[("system", "abacus")]),
        row(&[("backend", "telegraph")]),
        row(&[("gemm_quant_mode", "roman")]),
        row(&[("model_path", "nobody/Nothing-7B")]),
    ];
    let (folder, path) = served(&rows);
    let (json, page) = (folder.path().join("v.json"), folder.path().join("out"));
    let text = moesaic(&["validate", "--e2e", arg(&path), "--json", arg(&json), "--output", arg(&page)]).ok();
    for part in [
        "5 rows passed over",
        "columns passed over: colour",
        "(line 4, 8)",
        "system \"abacus\" is not known; h100_sxm, h200_sxm",
        "backend \"telegraph\" is not known; trtllm, vllm, sglang are",
        "type of weights \"roman\" is not known",
    ] {
        assert!(text.contains(part), "no {part:?} in {text}");
    }
    let all: serde_json::Value = serde_json::from_str(&fs::read_to_string(json).unwrap()).unwrap();
    assert_eq!(all["tpot"][0]["score"]["rows"], 2);
    let rows = all["rows"]["served"].as_array().unwrap();
    assert_eq!((rows.len(), rows[1]["line"].as_u64(), rows[1]["concurrency"].as_f64()), (2, Some(3), Some(64.0)));
    for row in rows {
        let (measured, predicted) = (&row["tpot"]["measured"], &row["tpot"]["predicted"]);
        let ratio = predicted["value"].as_f64().unwrap() / measured.as_f64().unwrap();
        // The published rows have deployments like these; a prediction that is far off has lost them.
        assert!((0.6..1.7).contains(&ratio), "{row}");
        assert!(predicted["low"].as_f64() < predicted["value"].as_f64());
        assert!(predicted["value"].as_f64() < predicted["high"].as_f64());
    }
    let html = fs::read_to_string(page.join("validation.html")).unwrap();
    assert!(html.contains("<circle") && html.contains("Rows passed over") && html.ends_with("</html>\n"));
}

#[test]
fn a_file_with_a_value_that_cannot_be_is_refused_by_line_and_column() {
    refused(
        &[row(&[]), row(&[("isl", "many")])],
        &["served.csv, line 3, column isl: is \"many\"; a number above 0 is right"],
    );
    refused(&[row(&[("silicon_tpot_ms", "-3")])], &["column silicon_tpot_ms: is \"-3\"; a number above 0 is right"]);
    refused(&[row(&[("tp_size", "2.5")])], &["column tp_size: is 2.5; a whole number up to 1,000,000 is right"]);
    refused(&[row(&[("mode", "both")])], &["column mode: is \"both\"; \"agg\" or \"disagg\" is right"]);
    refused(&[row(&[("osl", "")])], &["column osl: is empty or 0"]);
    refused(
        &[row(&[("batch_size", ""), ("silicon_data_source", "here")])],
        &["column batch_size: is empty, and silicon_data_source has no silicon_concurrency=; one is needed"],
    );
    refused(
        &[row(&[("silicon_tpot_ms", ""), ("silicon_ttft_ms", "")])],
        &["column silicon_tpot_ms: is empty, and so is silicon_ttft_ms; one is needed"],
    );
}

#[test]
fn a_file_without_a_row_to_predict_is_refused() {
    refused(
        &[row(&[("system", "abacus")])],
        &["none of its 1 rows can be predicted; the first, line 2: system \"abacus\""],
    );
    let folder = temp();
    let path = folder.path().join("no.csv");
    moesaic(&["validate", "--e2e", arg(&path)]).refused(&["cannot read", "no.csv"]);
    fs::write(&path, "backend,mode\nvllm,agg\n").unwrap();
    moesaic(&["validate", "--e2e", arg(&path)]).refused(&["no.csv, line 1, column model_path: the column is missing"]);
}

#[test]
fn ops_are_held_against_their_prices_and_physics() {
    let folder = temp();
    let path = folder.path().join("ops.csv");
    let gemm = r#""{""dtype"":""bfloat16"",""m"":512,""n"":12288,""k"":7168}""#;
    let reduce = r#""{""gpus"":8,""elements"":1048576,""bytes"":2097152}""#;
    let rows = format!(
        "gpu,op,params,latency_us,framework\nh200_sxm,gemm,{gemm},140,TRTLLM\nh200_sxm,gemm,{gemm},1,TRTLLM\n\
         h100_sxm,nccl_all_reduce,{reduce},40,NCCL\nabacus,gemm,{gemm},140,TRTLLM\nh200_sxm,knitting,{gemm},140,TRTLLM\n"
    );
    fs::write(&path, &rows).unwrap();
    let text = moesaic(&["validate", "--ops", arg(&path)]).ok();
    for part in [
        "3 rows passed over",
        "faster than physics lets it be",
        "GPU \"abacus\" is not known",
        "predictions faster than physics: 0",
        "nccl_all_reduce",
    ] {
        assert!(text.contains(part), "no {part:?} in {text}");
    }
    fs::write(&path, "gpu,op,params,latency_us\nh200_sxm,gemm,no,140\n").unwrap();
    moesaic(&["validate", "--ops", arg(&path)]).refused(&["ops.csv, line 2, column params: is no JSON object"]);
}
