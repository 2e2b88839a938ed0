//! `--logits FILE`: what the model thought, for parity checks from outside.

use std::path::Path;

use anyhow::{Context, Result};
use moesaic_engine::Engine;
use safetensors::tensor::{Dtype, TensorView};

use super::answer::Answer;

/// Writes `prefill_logits [P, V]`, `decode_logits [steps, V]` (F32) and `token_ids [steps + 1]` (I64): the logits at every
/// prompt position, those at every generated token but the last (which was never run), and the tokens.
pub(super) fn write(file: &Path, engine: &mut Engine, answer: &Answer) -> Result<()> {
    let vocab_size = engine.spec().vocab_size;
    let rows = engine.take_logits(answer.id);
    let bytes = |range: std::ops::Range<usize>| -> Vec<u8> {
        rows.range(range).flat_map(|(_, row)| row.iter().flat_map(|x| x.to_le_bytes())).collect()
    };
    let prefill = bytes(0..answer.prompt_len);
    let decode = bytes(answer.prompt_len..usize::MAX);
    let ids: Vec<u8> = answer.tokens.iter().flat_map(|event| i64::from(event.token).to_le_bytes()).collect();
    let num_rows = |bytes: &[u8]| bytes.len() / (4 * vocab_size);
    let tensors = [
        ("prefill_logits", TensorView::new(Dtype::F32, vec![num_rows(&prefill), vocab_size], &prefill)?),
        ("decode_logits", TensorView::new(Dtype::F32, vec![num_rows(&decode), vocab_size], &decode)?),
        ("token_ids", TensorView::new(Dtype::I64, vec![answer.tokens.len()], &ids)?),
    ];
    safetensors::serialize_to_file(tensors, None, file).with_context(|| file.display().to_string())
}
