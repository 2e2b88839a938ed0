//! Token ids to text, one id at a time.
//!
//! A token is not a piece of text: a character may be spread over several tokens, and a decoder
//! looks at a token's neighbours (the first one loses its leading space). So each step decodes a
//! short *window*: the tokens shown last, which give the context, and those since. What is new in
//! the window's text is released, except trailing U+FFFD, which stand for bytes that the next
//! token may complete to a character.

use crate::{Error, Tokenizer};

/// Tokens of the prompt that give the first generated one its context (vLLM takes as many).
const PROMPT_CONTEXT_TOKENS: usize = 5;
/// A character has at most 4 bytes, hence 4 tokens. After more than this many tokens that end in
/// U+FFFD the bytes are malformed, and waiting would not help: only the last U+FFFD can still change.
const MAX_HELD_TOKENS: usize = 4;
/// The window is cut back when tokens bring no text or malformed text for so long, so that a step
/// costs the same however long the text is.
const MAX_WINDOW_TOKENS: usize = 32;
/// What remains of the window then: more than any character, so decoding is in step again.
const KEPT_TOKENS: usize = 8;

const REPLACEMENT: char = '\u{FFFD}';

/// Turns a stream of token ids into a stream of text; never half a character.
///
/// All texts together are what [`Tokenizer::decode`] gives for all ids. The one exception: a
/// byte-fallback tokenizer, as of the Llama and Mixtral families, turns a whole run of byte tokens
/// to U+FFFD when a later byte makes the run malformed; characters that were shown by then stay.
///
/// Each step takes time bounded by a small constant number of tokens.
#[derive(Debug, Clone)]
pub struct Detokenizer {
    tokenizer: Tokenizer,
    skip_special: bool,
    /// The last tokens; their text begins with `shown`.
    window: Vec<u32>,
    /// How many tokens of the window are context: their text has been released in full.
    num_settled: usize,
    /// The beginning of the window's text that has been released.
    shown: String,
}

impl Detokenizer {
    /// Starts a text of its own. `skip_special` leaves special tokens out, as in
    /// [`Tokenizer::decode`]. The tokenizer is cheap to clone.
    pub fn new(tokenizer: Tokenizer, skip_special: bool) -> Self {
        Detokenizer { tokenizer, skip_special, window: Vec::new(), num_settled: 0, shown: String::new() }
    }

    /// Continues a prompt: the text joins the prompt's as if both had been decoded together (a
    /// leading space is kept), without repeating any of it.
    ///
    /// # Errors
    /// [`Error::Decode`] as for [`Tokenizer::decode`].
    pub fn after_prompt(tokenizer: Tokenizer, skip_special: bool, prompt: &[u32]) -> Result<Self, Error> {
        let mut this = Self::new(tokenizer, skip_special);
        let last = prompt.iter().rev().copied().filter(|&id| !this.skips(id)).take(PROMPT_CONTEXT_TOKENS);
        this.window = last.collect();
        this.window.reverse();
        this.num_settled = this.window.len();
        this.shown = this.decode()?.trim_end_matches(REPLACEMENT).to_owned();
        Ok(this)
    }

    /// Takes the next id; returns the text that is certain now (often empty, never half a character).
    ///
    /// # Errors
    /// [`Error::Decode`] as for [`Tokenizer::decode`].
    pub fn step(&mut self, id: u32) -> Result<String, Error> {
        if self.skips(id) {
            return Ok(String::new());
        }
        self.window.push(id);
        let mut text = self.decode()?;
        if !text.starts_with(&self.shown) {
            // A byte-fallback decoder rewrote what has been shown. Go on with what has not: all
            // since the context, or the new token alone where malformed text was shown in part.
            let from = if self.num_settled > 0 { self.num_settled } else { self.window.len() - 1 };
            self.window.drain(..from);
            self.num_settled = 0;
            self.shown.clear();
            text = self.decode()?;
        }

        let certain = if self.window.len() - self.num_settled > MAX_HELD_TOKENS {
            text.strip_suffix(REPLACEMENT).unwrap_or(&text)
        } else {
            text.trim_end_matches(REPLACEMENT)
        };
        if certain.len() > self.shown.len() {
            let new = certain[self.shown.len()..].to_owned();
            self.shown = certain.to_owned();
            if self.shown.len() == text.len() {
                self.settle()?;
            } else {
                self.bound(&text)?;
            }
            Ok(new)
        } else {
            self.bound(&text)?;
            Ok(String::new())
        }
    }

    /// The ids have ended: releases what was held back, U+FFFD for bytes that never became a
    /// character.
    ///
    /// # Errors
    /// [`Error::Decode`] as for [`Tokenizer::decode`].
    pub fn finish(&mut self) -> Result<String, Error> {
        let text = self.decode()?;
        let rest = text.strip_prefix(self.shown.as_str()).unwrap_or_default().to_owned();
        self.window.clear();
        self.num_settled = 0;
        self.shown.clear();
        Ok(rest)
    }

    /// All of the window has been shown: its newer part becomes the context.
    fn settle(&mut self) -> Result<(), Error> {
        self.window.drain(..self.num_settled);
        self.num_settled = self.window.len();
        self.shown = self.decode()?;
        Ok(())
    }

    /// Cuts a window back that has grown too long; what is still to be shown stays to be shown.
    fn bound(&mut self, text: &str) -> Result<(), Error> {
        if self.window.len() <= MAX_WINDOW_TOKENS {
            return Ok(());
        }
        let pending = &text[self.shown.len().min(text.len())..];
        let cut = self.window.len() - KEPT_TOKENS;
        let kept = self.tokenizer.decode(&self.window[cut..], self.skip_special)?;
        if let Some(shown) = kept.strip_suffix(pending) {
            self.shown = shown.to_owned();
            self.window.drain(..cut);
            self.num_settled = self.num_settled.saturating_sub(cut);
        }
        Ok(())
    }

    /// Such an id adds nothing to the text, nor to its neighbours' context.
    fn skips(&self, id: u32) -> bool {
        !self.tokenizer.has_id(id) || (self.skip_special && self.tokenizer.is_special(id))
    }

    fn decode(&self) -> Result<String, Error> {
        self.tokenizer.decode(&self.window, self.skip_special)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::{byte_fallback, byte_level};
    use proptest::prelude::*;

    fn stream(tokenizer: &Tokenizer, ids: &[u32], skip_special: bool) -> (Vec<String>, String) {
        let mut detokenizer = Detokenizer::new(tokenizer.clone(), skip_special);
        let pieces: Vec<String> = ids.iter().map(|&id| detokenizer.step(id).unwrap()).collect();
        let text = pieces.concat() + &detokenizer.finish().unwrap();
        (pieces, text)
    }

    #[test]
    fn a_character_over_several_tokens_comes_whole() {
        let tokenizer = byte_level();
        let ids = tokenizer.encode("a🙂b", false).unwrap();
        assert_eq!(ids.len(), 6, "the fixture merges no bytes of 🙂");
        let (pieces, text) = stream(&tokenizer, &ids, true);
        assert_eq!(pieces, ["a", "", "", "", "🙂", "b"]);
        assert_eq!(text, "a🙂b");
    }

    #[test]
    fn what_never_becomes_a_character_comes_at_the_end() {
        let tokenizer = byte_level();
        let ids = tokenizer.encode("é", false).unwrap();
        let (pieces, text) = stream(&tokenizer, &ids[..1], true);
        assert_eq!((pieces[0].as_str(), text.as_str()), ("", "\u{FFFD}"));
    }

    #[test]
    fn special_tokens_are_left_out_or_shown() {
        let tokenizer = byte_level();
        let end = tokenizer.token_to_id("<|end|>").unwrap();
        let mut ids = tokenizer.encode("hello", false).unwrap();
        ids.push(end);
        assert_eq!(stream(&tokenizer, &ids, true).1, "hello");
        assert_eq!(stream(&tokenizer, &ids, false).1, "hello<|end|>");
    }

    #[test]
    fn a_leading_space_is_kept_after_a_prompt() {
        let tokenizer = byte_fallback();
        let prompt = tokenizer.encode("hello", false).unwrap();
        let all = tokenizer.encode("hello hello", false).unwrap();
        assert_eq!(&all[..prompt.len()], &prompt[..]);
        let rest = &all[prompt.len()..];
        assert_eq!(stream(&tokenizer, rest, true).1, "hello");
        let mut detokenizer = Detokenizer::after_prompt(tokenizer, true, &prompt).unwrap();
        let text: String = rest.iter().map(|&id| detokenizer.step(id).unwrap()).collect();
        assert_eq!(text, " hello");
    }

    #[test]
    fn a_malformed_run_of_byte_tokens_keeps_what_was_shown() {
        let tokenizer = byte_fallback();
        let byte = |b: u8| tokenizer.token_to_id(&format!("<0x{b:02X}>")).unwrap();
        let ids = [byte(0xE4), byte(0xB8), byte(0xAD), byte(0x80), tokenizer.token_to_id("▁hello").unwrap()];
        let (pieces, text) = stream(&tokenizer, &ids, true);
        assert_eq!(pieces[..3], ["", "", "中"]);
        assert!(text.starts_with("中") && text.ends_with("hello"), "{text:?}");
    }

    #[test]
    fn the_window_stays_short() {
        for (tokenizer, ids) in [
            (byte_level(), vec![byte_level().encode("é", false).unwrap()[0]; 3000]),
            (byte_level(), vec![byte_level().token_to_id("<|end|>").unwrap(); 3000]),
            (byte_fallback(), vec![byte_fallback().token_to_id("<0x80>").unwrap(); 3000]),
            (byte_fallback(), vec![byte_fallback().token_to_id("▁hello").unwrap(); 3000]),
        ] {
            let mut detokenizer = Detokenizer::new(tokenizer.clone(), true);
            let mut text = String::new();
            for &id in &ids {
                text += &detokenizer.step(id).unwrap();
                assert!(detokenizer.window.len() <= MAX_WINDOW_TOKENS + 1);
            }
            text += &detokenizer.finish().unwrap();
            assert_eq!(text, tokenizer.decode(&ids, true).unwrap());
        }
    }

    proptest! {
        #[test]
        fn any_ids_stream_to_what_they_decode_to(
            ids in prop::collection::vec(0u32..290, 0..120),
            high in prop::collection::vec(128u8..=255, 0..80),
            skip_special: bool,
        ) {
            let tokenizer = byte_level();
            let (pieces, text) = stream(&tokenizer, &ids, skip_special);
            prop_assert_eq!(&text, &tokenizer.decode(&ids, skip_special).unwrap());
            prop_assert!(text.starts_with(&pieces.concat()));
            // Bytes that mostly form no character: the hard case for the window.
            let ids: Vec<u32> = high.iter().map(|&b| crate::fixtures::byte_id(&tokenizer, b)).collect();
            prop_assert_eq!(stream(&tokenizer, &ids, true).1, tokenizer.decode(&ids, true).unwrap());
        }

        #[test]
        fn any_text_streams_to_itself(text in "[ a-zé中🙂\n]{0,40}") {
            for tokenizer in [byte_level(), byte_fallback()] {
                let ids = tokenizer.encode(&text, false).unwrap();
                let (pieces, streamed) = stream(&tokenizer, &ids, true);
                prop_assert!(!pieces.concat().contains(REPLACEMENT));
                prop_assert_eq!(&streamed, &tokenizer.decode(&ids, true).unwrap());
                prop_assert_eq!(&streamed, &text);
            }
        }

        #[test]
        fn a_byte_fallback_stream_never_breaks(ids in prop::collection::vec(0u32..270, 0..80)) {
            let tokenizer = byte_fallback();
            stream(&tokenizer, &ids, true);
        }
    }
}
