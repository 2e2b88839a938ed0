//! YAML as clusters, workloads and plans are written in: one document of plain mappings, lists and scalars.
//!
//! No anchors, aliases, merge keys, tags or includes, and no key twice: a description says each thing once, and a
//! stranger's file cannot grow while it is read. Booleans and numbers are those of YAML 1.2.

use serde_json::{Map, Value};

use crate::SpecError;
use crate::fields::{shorten, show};

/// Bytes of a description; the placement of 15,000 experts takes some hundred thousand.
const TEXT_BYTES: usize = 1 << 20;

/// Parses `text` as one mapping. `origin` is its path, for messages. Total: time and memory are bounded by the text's
/// length.
///
/// # Errors
/// [`SpecError`]: too long, not YAML, a key twice, or no mapping.
pub fn parse_mapping(text: &str, origin: &str) -> Result<Map<String, Value>, SpecError> {
    if text.len() > TEXT_BYTES {
        return Err(SpecError::TooLong { origin: origin.to_owned(), got: text.len(), limit: TEXT_BYTES });
    }
    let options = serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_depth: 16,
            flow_nesting_limit: 16,
            max_anchors: 0,
            max_aliases: 0,
            max_documents: 1,
        },
        merge_keys: serde_saphyr::MergeKeyPolicy::Error,
        duplicate_keys: serde_saphyr::DuplicateKeyPolicy::Error,
        reject_unsupported_tags: true,
        strict_booleans: true,
        leading_zero_numbers_as_strings: true,
        underscored_numbers_as_strings: true,
        with_snippet: false,
    };
    match serde_saphyr::from_str_with_options(text, options) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(other) => Err(SpecError::NotAMapping { origin: origin.to_owned(), got: show(&other) }),
        Err(e) => {
            let (line, column) = e.location().map_or((0, 0), |at| (at.line(), at.column()));
            Err(SpecError::Yaml { origin: origin.to_owned(), line, column, reason: reason_of(&e) })
        }
    }
}

/// What is wrong, on one line and without the place, which we say ourselves.
fn reason_of(error: &serde_saphyr::Error) -> String {
    use serde_saphyr::Error;
    use serde_saphyr::budget::BudgetBreach;
    match error {
        Error::DuplicateMappingKey { key: Some(key), .. } => format!("key `{}` is there twice", shorten(key)),
        Error::DuplicateMappingKey { key: None, .. } => "a key is there twice".to_owned(),
        Error::MergeKeyNotAllowed { .. } => "merge keys (<<) are not used here; write the keys out".to_owned(),
        Error::NonFiniteFloat { .. } => "numbers must be finite".to_owned(),
        Error::Budget { breach, .. } => match breach {
            BudgetBreach::Anchors { .. } | BudgetBreach::Aliases { .. } => {
                "anchors and aliases (& and *) are not used here; write the value out".to_owned()
            }
            BudgetBreach::Documents { .. } => "a second document begins (---), but a file has one".to_owned(),
            _ => "more or deeper than any description is".to_owned(),
        },
        other => {
            let text = other.to_string();
            let line = text.lines().next().unwrap_or("");
            shorten(line.split(" at line ").next().unwrap_or(line))
        }
    }
}

/// `text` as a YAML scalar that is read back as the same string: plain where that is safe, else in double quotes.
pub fn scalar(text: &str) -> String {
    let plain = text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || "-_./+".contains(c))
        && !["null", "true", "false", "yes", "no", "on", "off", "y", "n"].contains(&text.to_ascii_lowercase().as_str());
    if plain {
        return text.to_owned();
    }
    let mut quoted = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            ' '..='~' => quoted.push(c),
            c if c.is_alphanumeric() => quoted.push(c),
            c => quoted.push_str(&format!("\\U{:08X}", u32::from(c))),
        }
    }
    quoted.push('"');
    quoted
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sentence(text: &str) -> String {
        parse_mapping(text, "p.yaml").unwrap_err().to_string()
    }

    #[test]
    fn what_is_no_plain_mapping_is_refused() {
        for (text, expected) in [
            ("", "p.yaml: the top of the file is null, but must be keys with values, like `name: …`"),
            ("- 1\n- 2\n", "p.yaml: the top of the file is [1,2], but must be keys with values, like `name: …`"),
            ("a: 1\na: 2\n", "p.yaml: not valid YAML at line 2, column 1: key `a` is there twice"),
            (
                "a: &x 1\nb: 2\n",
                "p.yaml: not valid YAML at line 1, column 7: anchors and aliases (& and *) are not used here; write the \
                 value out",
            ),
            (
                "a: 1\n<<: {b: 2}\n",
                "p.yaml: not valid YAML at line 2, column 1: merge keys (<<) are not used here; write the keys out",
            ),
            ("a: !secret 1\n", "p.yaml: not valid YAML at line 1, column 12: unsupported tag `!secret`"),
            ("a: .inf\n", "p.yaml: not valid YAML at line 1, column 4: numbers must be finite"),
            ("a: [1, 2\n", "p.yaml: not valid YAML at line 1, column 4: unclosed bracket '['"),
            (
                "a: 1\n---\nb: 2\n",
                "p.yaml: not valid YAML at line 2, column 1: a second document begins (---), but a file has one",
            ),
        ] {
            assert_eq!(sentence(text), expected);
        }
        let deep = "p.yaml: not valid YAML at line 1, column 17: recursion limit exceeded";
        assert_eq!(sentence(&"[".repeat(100_000)), deep);
        assert!(sentence(&" ".repeat(TEXT_BYTES + 1)).ends_with("but a description has at most 1048576"));
    }

    #[test]
    fn numbers_and_booleans_are_those_of_yaml_1_2() {
        let map =
            parse_mapping("a: 1.8e12\nb: 300e9\nc: yes\nd: 0755\ne: 1_000\nf: 0.9\ng: 18446744073709551615\n", "p")
                .unwrap();
        assert_eq!(map["a"], 1.8e12);
        assert_eq!(map["b"], 3e11);
        assert_eq!(map["c"], "yes");
        assert_eq!(map["d"], "0755");
        assert_eq!(map["e"], "1_000");
        assert_eq!(map["f"], 0.9);
        assert_eq!(map["g"], u64::MAX);
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn scalars_are_read_back(text in any::<String>()) {
            let map = parse_mapping(&format!("key: {}\n", scalar(&text)), "p.yaml").unwrap();
            prop_assert_eq!(&map["key"], &Value::from(text));
        }

        #[test]
        fn words_are_read_back(text in "[a-zA-Z0-9~._-]{0,5}") {
            let map = parse_mapping(&format!("key: {}\n", scalar(&text)), "p.yaml").unwrap();
            prop_assert_eq!(&map["key"], &Value::from(text));
        }

        #[test]
        fn any_text_is_answered(text in ".{0,200}", bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse_mapping(&text, "p.yaml");
            let _ = parse_mapping(&String::from_utf8_lossy(&bytes), "p.yaml");
        }
    }
}
