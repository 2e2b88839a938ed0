//! `moesaic inspect`: what a model is, without its weights.

use std::fmt::Write as _;

use anyhow::{Result, ensure};
use moesaic_spec::model::presets::presets;
use moesaic_spec::{Attention, Bytes, Ffn, ModelSpec, QkNorm, WeightFormats};

use crate::args::InspectArgs;
use crate::folder::named_spec;

pub(crate) fn run(args: &InspectArgs) -> Result<()> {
    ensure!(args.context > 0, "--context is 0; 1 or more is right");
    if args.list {
        for preset in presets() {
            let spec = preset.spec()?;
            let counts = spec.counts();
            let (total, active) = (billions(counts.params_total), billions(counts.params_active));
            let planned = if spec.planning_only.is_some() { ", planned only" } else { "" };
            let (name, bytes) = (preset.name, Bytes(counts.bytes_total));
            println!("{name:<20} {total:>9} parameters, {active:>8} active, {bytes}{planned}");
        }
        return Ok(());
    }
    let (name, spec) = named_spec(args.model.as_deref())?;
    if args.json {
        let counts = spec.counts();
        let json = serde_json::json!({
            "model": name,
            "model_type": spec.family.model_type(),
            "dtype": spec.dtype.to_string(),
            "num_layers": spec.layers.len(),
            "hidden_size": spec.hidden_size,
            "vocab_size": spec.vocab_size,
            "max_position_embeddings": spec.max_position_embeddings,
            "formats": spec.formats(),
            "planning_only": spec.planning_only.as_ref().map(|planning| &planning.reason),
            "counts": counts,
            "context": args.context,
            "flops_per_token_prefill": counts.flops.prefill(args.context),
            "flops_per_token_decode": counts.flops.decode(args.context),
        });
        println!("{json:#}");
    } else {
        print!("{}", report(&name, &spec, args.context));
    }
    Ok(())
}

fn report(name: &str, spec: &ModelSpec, context: usize) -> String {
    let counts = spec.counts();
    let mut out = String::new();
    let mut line = |key: &str, value: String| writeln!(out, "{key:<12}{value}").expect("writing to a string");
    line("model", format!("{name} ({}, {})", spec.family.model_type(), spec.dtype));
    let dense = spec.layers.iter().filter(|ffn| matches!(ffn, Ffn::Dense(_))).count();
    line(
        "layers",
        format!(
            "{} ({dense} dense), width {}, vocabulary {}{}, context {}",
            spec.layers.len(),
            spec.hidden_size,
            spec.vocab_size,
            if spec.tie_word_embeddings { " (tied)" } else { "" },
            spec.max_position_embeddings
        ),
    );
    line("attention", attention(&spec.attention));
    if let Some(moe) = spec.layers.iter().find_map(Ffn::as_moe) {
        let shared = match moe.shared_intermediate_size {
            0 => String::new(),
            width => format!(", shared expert of width {width}"),
        };
        line("experts", format!("{} of width {}, top-{}{shared}", moe.num_experts, moe.intermediate_size, moe.top_k));
    }
    let (total, active) = (billions(counts.params_total), billions(counts.params_active));
    line("parameters", format!("{total}, {active} active for a token"));
    line("bytes", format!("{} in the checkpoint", Bytes(counts.bytes_total)));
    for part in &counts.parts {
        let share = part.bytes as f64 / counts.bytes_total as f64 * 100.0;
        let (params, bytes) = (billions(part.params), Bytes(part.bytes).to_string());
        line("", format!("{:<16}{params:>10}{bytes:>14} {share:>5.1} %", part.name.label()));
    }
    let kv = counts.kv.bytes_per_token;
    let in_all = match &spec.planning_only {
        None => kv * context as u64,
        Some(_) => spec.cache_bytes(context),
    };
    line("KV cache", format!("{} a token, {} for {context} tokens", Bytes(kv), Bytes(in_all)));
    let (prefill, decode) = (counts.flops.prefill(context), counts.flops.decode(context));
    line("FLOPs", format!("{} a token at context {context} (prefill), {} (decode)", giga(prefill), giga(decode)));
    if let Some(planning) = &spec.planning_only {
        let WeightFormats { dense, experts } = planning.formats;
        line("weights", format!("{dense}, routed experts {experts}"));
        line("planned", format!("only, and not run yet: it has {}", planning.reason));
    }
    out
}

fn attention(attention: &Attention) -> String {
    match attention {
        Attention::Gqa(gqa) => {
            let norm = match gqa.qk_norm {
                QkNorm::None => "",
                QkNorm::PerHead => ", q/k norm per head",
                QkNorm::FullWidth => ", q/k norm over all heads",
            };
            let window = gqa.sliding_window.map(|w| format!(", window {w}")).unwrap_or_default();
            format!(
                "{} heads of {}, {} for keys and values{norm}{window}",
                gqa.num_heads, gqa.head_dim, gqa.num_kv_heads
            )
        }
        Attention::Mla(mla) => format!(
            "latent (MLA), {} heads of {}+{} (values {}), latent {}+{}",
            mla.num_heads,
            mla.qk_nope_head_dim,
            mla.qk_rope_head_dim,
            mla.v_head_dim,
            mla.kv_lora_rank,
            mla.qk_rope_head_dim
        ),
    }
}

fn billions(params: u64) -> String {
    let params = params as f64;
    if params >= 1e9 { format!("{:.2} B", params / 1e9) } else { format!("{:.2} M", params / 1e6) }
}

fn giga(flops: f64) -> String {
    if flops >= 1e9 { format!("{:.1} G", flops / 1e9) } else { format!("{:.1} M", flops / 1e6) }
}
