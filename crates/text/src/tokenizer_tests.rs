use std::fs;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::fixtures::{build, byte_char, byte_fallback, byte_fallback_json, byte_level, byte_level_json};

/// A tokenizer with a `tokenizer_config.json`, and a template file if one is given.
fn with_config(tokenizer: &Value, config: &Value, template: Option<&str>) -> Result<Tokenizer, Error> {
    Tokenizer::from_bytes(TokenizerFiles {
        tokenizer_json: &serde_json::to_vec(tokenizer).unwrap(),
        tokenizer_config_json: Some(&serde_json::to_vec(config).unwrap()),
        chat_template_jinja: template.map(str::as_bytes),
    })
}

fn message<T: std::fmt::Debug>(result: Result<T, Error>) -> String {
    result.unwrap_err().to_string()
}

#[test]
fn byte_level_merges_and_round_trips() {
    let tokenizer = byte_level();
    let id = |token: &str| tokenizer.token_to_id(token).unwrap();
    let ids = tokenizer.encode("hello the", false).unwrap();
    assert_eq!(ids, [id("hello"), id("Ġthe")]);
    assert_eq!(tokenizer.encode("hi", false).unwrap(), [u32::from(b'h'), u32::from(b'i')]);
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), "hello the");
    assert_eq!(tokenizer.id_to_token(ids[1]).unwrap(), "Ġthe");
    assert!(tokenizer.encode("", true).unwrap().is_empty());
    assert_eq!(byte_char(b' '), 'Ġ');
}

#[test]
fn special_tokens_are_found_in_the_text() {
    let tokenizer = byte_level();
    let ids = tokenizer.encode("<|start|>hi<|end|>", false).unwrap();
    assert_eq!((ids.len(), ids[0], ids[3]), (4, 262, 263));
    assert!(tokenizer.is_special(262) && !tokenizer.is_special(0) && !tokenizer.is_special(9999));
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), "hi");
    assert_eq!(tokenizer.decode(&ids, false).unwrap(), "<|start|>hi<|end|>");
    assert_eq!(tokenizer.decode(&[9999], false).unwrap(), "");
}

#[test]
fn the_vocabulary_is_held_against_the_model() {
    let tokenizer = byte_level();
    assert_eq!(tokenizer.vocab_size(), 264);
    tokenizer.check_vocab(264).unwrap();
    tokenizer.check_vocab(512).unwrap();
    let text = message(tokenizer.check_vocab(263));
    assert!(text.contains("\"<|end|>\"") && text.contains("263"), "{text}");

    // Ids that only the post-processor names count as well.
    let mut json = byte_fallback_json();
    json["post_processor"]["special_tokens"]["<s>"]["ids"] = json!([5000]);
    assert_eq!(build(&json).unwrap().vocab_size(), 5001);
}

#[test]
fn the_bos_token_is_added_once_or_not_at_all() {
    let (plain, framed) = (byte_level_json(), byte_fallback_json());
    let encode = |tokenizer: &Value, config: Value| {
        let tokenizer = with_config(tokenizer, &config, None).unwrap();
        assert!(tokenizer.encode("h", false).unwrap().first() != tokenizer.bos_id().as_ref());
        (tokenizer.encode("h", true).unwrap(), tokenizer.bos_id().unwrap())
    };
    for (tokenizer, add, want) in [
        (&plain, json!(true), 1),
        (&plain, json!(false), 0),
        (&plain, json!(null), 0),
        (&framed, json!(true), 1),
        (&framed, json!(false), 0),
        (&framed, json!(null), 1),
    ] {
        let token = if std::ptr::eq(tokenizer, &plain) { "<|start|>" } else { "<s>" };
        let (ids, bos) = encode(tokenizer, json!({"bos_token": {"content": token}, "add_bos_token": add}));
        assert_eq!(ids.iter().filter(|&&id| id == bos).count(), want, "{token} {add}");
        assert_eq!(ids.first() == Some(&bos), want == 1);
    }
    let missing = message(with_config(&plain, &json!({"bos_token": "<nope>", "add_bos_token": true}), None));
    assert!(missing.contains("bos_token is \"<nope>\""), "{missing}");
}

#[test]
fn the_config_names_tokens_and_templates() {
    let config = json!({
        "bos_token": null, "eos_token": "<|end|>", "pad_token": {"content": "<|start|>", "lstrip": false},
        "chat_template": [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]});
    let render = |tokenizer: &Tokenizer, tools| {
        let request = crate::ChatRequest::new(&[]);
        tokenizer.chat_template(tools).unwrap().render(request).unwrap()
    };
    let tokenizer = with_config(&byte_level_json(), &config, None).unwrap();
    assert_eq!((tokenizer.bos_token(), tokenizer.eos_token()), (None, Some("<|end|>")));
    assert_eq!((tokenizer.eos_id(), tokenizer.pad_token()), (Some(263), Some("<|start|>")));
    assert_eq!(render(&tokenizer, false), "D");
    assert_eq!(render(&tokenizer, true), "T");

    let with_file = with_config(&byte_level_json(), &config, Some("F")).unwrap();
    assert_eq!(render(&with_file, false), "F");

    assert!(!byte_level().has_chat_template());
    assert!(matches!(byte_level().chat_template(false), Err(Error::NoChatTemplate)));
    let other = json!({"chat_template": [{"name": "rag", "template": "R"}]});
    let text = message(with_config(&byte_level_json(), &other, None).unwrap().chat_template(false));
    assert!(text.contains("rag") && text.contains("default"), "{text}");
}

#[test]
fn a_wrong_field_is_named_with_its_value() {
    for (config, parts) in [
        (json!({"add_bos_token": "yes"}), ["add_bos_token is \"yes\"", "true, false or null"]),
        (json!({"eos_token": 7}), ["eos_token is 7", "a string"]),
        (json!({"eos_token": {"id": 3}}), ["eos_token is {\"id\":3}", "content"]),
        (json!({"chat_template": 3}), ["chat_template is 3", "a string or a list"]),
        (json!({"chat_template": [{"name": "x"}]}), ["chat_template[0]", "template"]),
        (json!([]), ["tokenizer_config.json", "expected a map"]),
    ] {
        let text = message(with_config(&byte_level_json(), &config, None));
        assert!(parts.iter().all(|part| text.contains(part)), "{text}");
    }
    let change = |pointer: &str, value: Value| {
        let mut json = byte_level_json();
        *json.pointer_mut(pointer).unwrap() = value;
        message(build(&json))
    };
    for (text, parts) in [
        (change("/model", json!(3)), ["tokenizer.json", "struct Model"]),
        (change("/model/dropout", json!(0.1)), ["model.dropout is 0.1", "null is right"]),
        (change("/added_tokens/1/id", json!(300)), ["\"<|end|>\" is 300", "263 is right"]),
        (change("/model/merges/0", json!(["h", "☃"])), ["tokenizer.json", "☃"]),
        (change("/model/type", json!("Unigram")), ["tokenizer.json", "no usable tokenizer"]),
        (change("/normalizer", json!({"type": "Precompiled", "precompiled_charsmap": "!"})), ["tokenizer.json", ""]),
        (change("/decoder", json!(5)), ["tokenizer.json", "no usable tokenizer"]),
    ] {
        assert!(parts.iter().all(|part| text.contains(part)), "{text}");
    }
    let nothing = json!({"model": {"type": "BPE", "vocab": {}, "merges": []}});
    assert!(message(build(&nothing)).contains("model.vocab is empty"));
}

/// The tokenizers crate would cut the prefix's bytes off unseen: through a character (which makes a
/// string that is not UTF-8) or past the end (which panics).
#[test]
fn a_merge_without_the_subword_prefix_is_refused() {
    for right in [json!(["a", "é"]), json!("a é"), json!(["a", ""])] {
        let json = json!({"model": {"type": "BPE", "continuing_subword_prefix": "#", "merges": [right],
                                    "vocab": {"a": 0, "é": 1, "": 2, "#b": 3}}});
        let text = message(build(&json));
        assert!(text.contains("model.merges[0]") && text.contains("\"#\""), "{text}");
    }
    let good = json!({"model": {"type": "BPE", "continuing_subword_prefix": "#", "merges": ["a #b"],
                                "vocab": {"a": 0, "#b": 1, "ab": 2}}});
    assert_eq!(build(&good).unwrap().encode("ab", false).unwrap(), [2]);
}

#[test]
fn what_training_left_behind_changes_nothing() {
    let mut json = byte_level_json();
    json["padding"] = json!({"strategy": {"Fixed": 1_000_000_000_000_u64}, "direction": "Right",
        "pad_to_multiple_of": null, "pad_id": 0, "pad_type_id": 0, "pad_token": "!"});
    json["truncation"] = json!({"max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right"});
    assert_eq!(build(&json).unwrap().encode("hi the", false).unwrap().len(), 3);
}

#[test]
fn a_rule_that_fails_on_text_is_an_error() {
    let mut json = byte_level_json();
    json["pre_tokenizer"] = json!({"type": "FixedLength", "length": 0});
    let text = match build(&json) {
        Ok(tokenizer) => message(tokenizer.encode("hello", false)),
        Err(error) => error.to_string(),
    };
    assert!(text.contains("cannot be encoded") || text.contains("no usable tokenizer"), "{text}");
}

#[test]
fn long_runs_of_space_are_refused_before_they_are_split_wrongly() {
    let tokenizer = byte_level();
    let run = " ".repeat(MAX_WHITESPACE_RUN);
    // One token a space, but the last belongs to the word after it: it is the ids that are held.
    let ids = tokenizer.encode(&format!("{run}the"), false).unwrap();
    assert_eq!((ids.len(), *ids.last().unwrap()), (MAX_WHITESPACE_RUN, tokenizer.token_to_id("Ġthe").unwrap()));
    assert!(message(tokenizer.encode(&format!("{run} the"), false)).contains("white-space"));
}

#[test]
fn a_folder_is_read_within_limits() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let load = || Tokenizer::from_folder(folder.path());
    assert!(message(load()).contains("tokenizer.json: cannot be read"));

    fs::write(path("tokenizer.json"), serde_json::to_vec(&byte_fallback_json()).unwrap()).unwrap();
    assert!(!load().unwrap().has_chat_template());
    fs::write(path("tokenizer_config.json"), r#"{"eos_token": "</s>", "chat_template": "C"}"#).unwrap();
    assert_eq!(load().unwrap().eos_id(), byte_fallback().token_to_id("</s>"));
    fs::write(path("chat_template.jinja"), "{{ eos_token }}").unwrap();
    let template = load().unwrap().chat_template(false).unwrap();
    assert_eq!(template.render(crate::ChatRequest::new(&[])).unwrap(), "</s>");

    fs::write(path("chat_template.jinja"), [b'a', 0xFF]).unwrap();
    assert!(message(load()).contains("chat_template.jinja: is not UTF-8: byte 1"));
    fs::remove_file(path("chat_template.jinja")).unwrap();
    fs::create_dir(path("chat_template.jinja")).unwrap();
    assert!(message(load()).contains("is a folder; a plain file"));
    fs::remove_dir(path("chat_template.jinja")).unwrap();

    // A file that only claims its length: nothing of it is read.
    fs::File::create(path("tokenizer.json")).unwrap().set_len(1 << 40).unwrap();
    assert!(message(load()).contains("1099511627776 bytes long; at most 67108864"));
    #[cfg(unix)]
    {
        fs::remove_file(path("tokenizer.json")).unwrap();
        std::os::unix::fs::symlink("/dev/zero", path("tokenizer.json")).unwrap();
        assert!(message(load()).contains("is a device, pipe or socket"));
    }
}

/// Loads whatever it is given and, where that succeeds, uses it.
fn survives(tokenizer_json: &[u8], config: &[u8]) {
    let files = TokenizerFiles { tokenizer_json, tokenizer_config_json: Some(config), chat_template_jinja: None };
    if let Ok(tokenizer) = Tokenizer::from_bytes(files) {
        if let Ok(ids) = tokenizer.encode("hello the é🙂 <|end|>", true) {
            assert!(ids.iter().all(|&id| (id as usize) < tokenizer.vocab_size()));
            let _ = tokenizer.decode(&ids, false);
        }
        if let Ok(template) = tokenizer.chat_template(false) {
            let _ = template.render(crate::ChatRequest::new(&[crate::ChatMessage::new("user", "hi")]));
        }
    }
}

/// Every place in a JSON value, as a pointer.
fn pointers(value: &Value, at: String, out: &mut Vec<String>) {
    match value {
        Value::Array(items) => items.iter().enumerate().for_each(|(i, v)| pointers(v, format!("{at}/{i}"), out)),
        Value::Object(fields) => fields.iter().for_each(|(k, v)| {
            pointers(v, format!("{at}/{}", k.replace('~', "~0").replace('/', "~1")), out);
        }),
        _ => {}
    }
    out.push(at);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_bytes_are_survived(tokenizer in prop::collection::vec(any::<u8>(), 0..200), config in "[{}\\[\\]\":,a-z0-9]{0,60}") {
        survives(&tokenizer, config.as_bytes());
    }

    #[test]
    fn damaged_bytes_are_survived(fallback: bool, damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6), cut in any::<prop::sample::Index>(), cuts: bool) {
        let json = if fallback { byte_fallback_json() } else { byte_level_json() };
        let mut bytes = serde_json::to_vec(&json).unwrap();
        for (at, byte) in damage {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if cuts {
            bytes.truncate(cut.index(bytes.len()));
        }
        survives(&bytes, b"{}");
    }

    /// Damage that stays JSON gets past the parser, to where the rules are built.
    #[test]
    fn damaged_values_are_survived(fallback: bool, damage in prop::collection::vec((any::<prop::sample::Index>(), 0usize..12), 1..4)) {
        let mut json = if fallback { byte_fallback_json() } else { byte_level_json() };
        for (at, kind) in damage {
            let mut all = Vec::new();
            // The vocabulary is most of the file; the rules are the interesting part.
            let mut rules = json.clone();
            rules["model"]["vocab"] = json!(null);
            pointers(&rules, String::new(), &mut all);
            let new = [
                json!(null), json!(true), json!(-1), json!(u64::MAX), json!(0), json!(1e300), json!(""), json!("é"),
                json!([]), json!({}), json!({"Regex": "(a*)*$"}), json!({"type": "ByteLevel"}),
            ][kind].clone();
            *json.pointer_mut(&all[at.index(all.len())]).unwrap() = new;
            if !json.is_object() || !json["model"].is_object() {
                break;
            }
        }
        survives(&serde_json::to_vec(&json).unwrap(), b"{}");
    }
}
