//! The requests of a workload as token ids: pieces of English where the model reads text, random ids where it does not.

use anyhow::Result;
use moesaic_spec::Workload;

use crate::folder::OpenModel;

/// Beginnings of books in the public domain, a line each.
const TEXT: &str = include_str!("../../../../../examples/tiny-moe/prompts.txt");

/// A prompt and how many tokens its answer has.
pub(super) struct Prompt {
    pub token_ids: Vec<u32>,
    pub output_tokens: usize,
}

/// The same for the same workload. Where there is text, a prompt is a piece of it that begins where the random ids say.
pub(super) fn requests(model: &OpenModel, workload: &Workload) -> Result<Vec<Prompt>> {
    let text = match &model.tokenizer {
        None => Vec::new(),
        Some(tokenizer) => tokenizer.encode(&TEXT.replace('\n', " "), false)?,
    };
    let requests = workload.requests(model.spec.vocab_size).into_iter().map(|(ids, output_tokens)| {
        let piece = |start: usize| text.iter().cycle().skip(start).take(ids.len()).copied().collect();
        let token_ids = if text.is_empty() { ids } else { piece(ids[0] as usize % text.len()) };
        Prompt { token_ids, output_tokens }
    });
    Ok(requests.collect())
}
