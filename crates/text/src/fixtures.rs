//! Small tokenizers for the tests, described in code and built through the public way in.

use std::sync::OnceLock;

use serde_json::{Value, json};

use crate::{Tokenizer, TokenizerFiles};

/// GPT-2's alphabet: the printable character that stands for each byte in a byte-level vocabulary.
pub(crate) fn byte_char(byte: u8) -> char {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    if printable(byte) {
        return char::from(byte);
    }
    let rank = (0..byte).filter(|&b| !printable(b)).count();
    char::from_u32(256 + u32::try_from(rank).unwrap()).unwrap()
}

/// The id of a single byte's token in [`byte_level`].
pub(crate) fn byte_id(tokenizer: &Tokenizer, byte: u8) -> u32 {
    tokenizer.token_to_id(&byte_char(byte).to_string()).unwrap()
}

/// As Qwen's and OLMoE's: byte-level BPE, ids 0–255 the bytes, a few merges, two special tokens.
pub(crate) fn byte_level_json() -> Value {
    let mut vocab: serde_json::Map<String, Value> = (0..=255u8).map(|b| (byte_char(b).to_string(), json!(b))).collect();
    let merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "t"), ("Ġt", "he")];
    for (a, b) in merges {
        let id = vocab.len();
        vocab.insert(format!("{a}{b}"), json!(id));
    }
    let first_special = vocab.len();
    let special = |offset: usize, content: &str| {
        json!({"id": first_special + offset, "content": content, "single_word": false, "lstrip": false,
               "rstrip": false, "normalized": false, "special": true})
    };
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [special(0, "<|start|>"), special(1, "<|end|>")],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "behavior": "Isolated", "invert": false,
             "pattern": {"Regex": r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"}},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false}]},
        "post_processor": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false},
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": "",
                  "end_of_word_suffix": "", "fuse_unk": false, "byte_fallback": false, "vocab": vocab,
                  "merges": merges.map(|(a, b)| json!([a, b]))}
    })
}

/// As Mixtral's: BPE over `▁`-joined words with byte fallback, `<s>` put first by a template.
pub(crate) fn byte_fallback_json() -> Value {
    let mut vocab = serde_json::Map::new();
    let mut add = |token: String| {
        let id = vocab.len();
        vocab.insert(token, json!(id));
    };
    ["<unk>", "<s>", "</s>"].iter().for_each(|t| add(t.to_string()));
    (0..=255u8).for_each(|b| add(format!("<0x{b:02X}>")));
    "▁abcdefghijklmnopqrstuvwxyz".chars().for_each(|c| add(c.to_string()));
    let merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("▁", "hello")];
    merges.iter().for_each(|(a, b)| add(format!("{a}{b}")));
    let special = |id: u32, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    };
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": null,
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "vocab": vocab,
                  "merges": merges.map(|(a, b)| format!("{a} {b}"))}
    })
}

/// Builds a tokenizer from its description alone.
pub(crate) fn build(json: &Value) -> Result<Tokenizer, crate::Error> {
    let tokenizer_json = serde_json::to_vec(json).unwrap();
    Tokenizer::from_bytes(TokenizerFiles { tokenizer_json: &tokenizer_json, ..Default::default() })
}

pub(crate) fn byte_level() -> Tokenizer {
    static ONCE: OnceLock<Tokenizer> = OnceLock::new();
    ONCE.get_or_init(|| build(&byte_level_json()).unwrap()).clone()
}

pub(crate) fn byte_fallback() -> Tokenizer {
    static ONCE: OnceLock<Tokenizer> = OnceLock::new();
    ONCE.get_or_init(|| build(&byte_fallback_json()).unwrap()).clone()
}
