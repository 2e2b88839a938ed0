//! Any bytes as the three files of a tokenizer, divided by bytes 0: a tokenizer or an error; and what loads encodes,
//! decodes and renders any text without a panic.
#![no_main]

use libfuzzer_sys::fuzz_target;
use moesaic_text::{ChatMessage, ChatRequest, Detokenizer, Tokenizer, TokenizerFiles};

// The tokenizers library panics on some files; `moesaic_text` turns that into an error, which the driver's panic hook would
// forestall by ending the process. A panic that nobody catches still ends it.
fuzz_target!(init: std::panic::set_hook(Box::new(|_| {})), |data: &[u8]| {
    let mut parts = data.splitn(4, |&byte| byte == 0);
    let files = TokenizerFiles {
        tokenizer_json: parts.next().unwrap_or_default(),
        tokenizer_config_json: parts.next().filter(|part| !part.is_empty()),
        chat_template_jinja: parts.next().filter(|part| !part.is_empty()),
    };
    let text = String::from_utf8_lossy(parts.next().unwrap_or(b"The sea, the sea."));
    let Ok(tokenizer) = Tokenizer::from_bytes(files) else { return };
    let messages = [ChatMessage::new("user", text.as_ref())];
    let prompt = tokenizer.chat_template(false).and_then(|template| template.render(ChatRequest::new(&messages)));
    let Ok(ids) = tokenizer.encode(prompt.as_deref().unwrap_or(&text), true) else { return };
    let _ = tokenizer.decode(&ids, true);
    let mut detokenizer = Detokenizer::new(tokenizer, true);
    for id in ids {
        let _ = detokenizer.step(id);
    }
    let _ = detokenizer.finish();
});
