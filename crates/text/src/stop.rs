//! Stop strings, matched across the borders of tokens.
//!
//! Text arrives in pieces of any size. What could still be the beginning of a stop string is held
//! back; everything before it is released at once. The match that ends first wins (generation would
//! have stopped there), and of those that end together the longest (no part of a stop string is
//! released by accident). So the result depends on the text alone, not on how it was cut into pieces.

use crate::Error;

/// Most stop strings of one request.
pub const MAX_STOP_STRINGS: usize = 64;
/// Longest stop string, in bytes.
pub const MAX_STOP_BYTES: usize = 1024;

/// What a piece of text led to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StopOutput {
    /// Text that may be shown now: it can be part of no stop string.
    pub text: String,
    /// The stop string that ended the text: its index in the list given to [`StopStrings::new`].
    pub matched: Option<usize>,
}

/// Watches a growing text for stop strings.
///
/// ```
/// let mut stop = moesaic_text::StopStrings::new(vec!["###".into()], false)?;
/// assert_eq!(stop.push("one#").text, "one");
/// assert_eq!(stop.push("two##").text, "#two");
/// let end = stop.push("# three");
/// assert_eq!((end.text.as_str(), end.matched), ("", Some(0)));
/// # Ok::<(), moesaic_text::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct StopStrings {
    stops: Vec<String>,
    include: bool,
    /// The longest suffix of the text so far that begins a stop string; shorter than that string.
    held: String,
    matched: Option<usize>,
}

impl StopStrings {
    /// Watches for `stops`; with `include` the matched string stays at the end of the text
    /// (vLLM's `include_stop_str_in_output`).
    ///
    /// # Errors
    /// [`Error::StopStrings`] for an empty string, for more than [`MAX_STOP_STRINGS`], and for one
    /// longer than [`MAX_STOP_BYTES`].
    pub fn new(stops: Vec<String>, include: bool) -> Result<Self, Error> {
        let refuse = |got: String, expected: String| Err(Error::StopStrings { got, expected });
        if stops.len() > MAX_STOP_STRINGS {
            return refuse(format!("{} were given", stops.len()), format!("at most {MAX_STOP_STRINGS} are accepted"));
        }
        for (i, stop) in stops.iter().enumerate() {
            if stop.is_empty() {
                return refuse(format!("number {i} is empty"), "each needs at least one character".into());
            }
            if stop.len() > MAX_STOP_BYTES {
                return refuse(
                    format!("number {i} is {} bytes long", stop.len()),
                    format!("at most {MAX_STOP_BYTES} are accepted"),
                );
            }
        }
        Ok(StopStrings { stops, include, held: String::new(), matched: None })
    }

    /// Takes the next piece of text. After a match everything further is dropped.
    pub fn push(&mut self, piece: &str) -> StopOutput {
        if self.matched.is_some() {
            return StopOutput { text: String::new(), matched: self.matched };
        }
        if self.stops.is_empty() {
            return StopOutput { text: piece.to_owned(), matched: None };
        }
        let mut text = std::mem::take(&mut self.held);
        text.push_str(piece);
        if let Some((start, end, index)) = self.earliest(&text) {
            self.matched = Some(index);
            text.truncate(if self.include { end } else { start });
        } else {
            let keep = self.could_begin(&text);
            self.held = text.split_off(text.len() - keep);
        }
        StopOutput { text, matched: self.matched }
    }

    /// The text has ended: releases what was held back for a stop string that never came.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Index of the stop string that was found, if one was.
    pub fn matched(&self) -> Option<usize> {
        self.matched
    }

    /// First match as (start, end, index of the stop string).
    fn earliest(&self, text: &str) -> Option<(usize, usize, usize)> {
        self.stops
            .iter()
            .enumerate()
            .filter_map(|(index, stop)| text.find(stop.as_str()).map(|start| (start, start + stop.len(), index)))
            .min_by_key(|&(start, end, index)| (end, start, index))
    }

    /// Bytes at the end of `text` that begin a stop string without completing it.
    fn could_begin(&self, text: &str) -> usize {
        let mut most = 0;
        for stop in &self.stops {
            // Only whole characters: text is cut where a character begins, and so are its suffixes.
            let mut ends = stop.char_indices().map(|(at, _)| at).skip(1).collect::<Vec<_>>();
            while let Some(end) = ends.pop().filter(|&end| end > most) {
                if text.ends_with(&stop[..end]) {
                    most = end;
                }
            }
        }
        most
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn run(stops: &[&str], include: bool, pieces: &[&str]) -> (String, Option<usize>) {
        let mut stop = StopStrings::new(stops.iter().map(|s| s.to_string()).collect(), include).unwrap();
        let mut text: String = pieces.iter().map(|p| stop.push(p).text).collect();
        text += &stop.finish();
        (text, stop.matched())
    }

    #[test]
    fn cuts_at_the_match_and_keeps_it_when_asked() {
        assert_eq!(run(&["END"], false, &["a E", "N", "D b"]), ("a ".into(), Some(0)));
        assert_eq!(run(&["END"], true, &["a E", "N", "D b"]), ("a END".into(), Some(0)));
        assert_eq!(run(&["END"], true, &["a E", "N"]), ("a EN".into(), None));
        assert_eq!(run(&[], false, &["a", "b"]), ("ab".into(), None));
    }

    #[test]
    fn first_end_wins_then_the_longest() {
        assert_eq!(run(&["abc", "b"], false, &["xabc"]), ("xa".into(), Some(1)));
        assert_eq!(run(&["b", "ab"], false, &["xabc"]), ("x".into(), Some(1)));
    }

    #[test]
    fn an_overlapping_beginning_is_not_lost() {
        assert_eq!(run(&["aab"], false, &["a", "a", "a", "b"]), ("a".into(), Some(0)));
        assert_eq!(run(&["é🙂"], false, &["é", "é", "🙂"]), ("é".into(), Some(0)));
    }

    #[test]
    fn releases_what_cannot_match_at_once() {
        let mut stop = StopStrings::new(vec!["\n\n".into()], false).unwrap();
        assert_eq!(stop.push("line\n").text, "line");
        assert_eq!(stop.push("next").text, "\nnext");
        assert_eq!(stop.push("\n\nmore").matched, Some(0));
        assert_eq!(stop.push("more"), StopOutput { text: String::new(), matched: Some(0) });
    }

    #[test]
    fn refuses_what_cannot_be_meant() {
        for stops in [vec![String::new()], vec!["x".repeat(MAX_STOP_BYTES + 1)], vec!["x".into(); MAX_STOP_STRINGS + 1]]
        {
            assert!(matches!(StopStrings::new(stops, false), Err(Error::StopStrings { .. })));
        }
    }

    /// The slow truth: look at every prefix of the text, shortest first, and ask whether it ends in
    /// a stop string.
    fn cut(text: &str, stops: &[String], include: bool) -> (String, bool) {
        for end in (0..=text.len()).filter(|&e| text.is_char_boundary(e)) {
            if let Some(stop) = stops.iter().filter(|s| text[..end].ends_with(s.as_str())).max_by_key(|s| s.len()) {
                return (text[..if include { end } else { end - stop.len() }].to_owned(), true);
            }
        }
        (text.to_owned(), false)
    }

    proptest! {
        #[test]
        fn any_chunking_equals_the_cut_of_the_whole(
            pieces in prop::collection::vec("[abé]{0,4}", 0..12),
            stops in prop::collection::vec("[abé]{1,4}", 0..4),
            include: bool,
        ) {
            let text = pieces.concat();
            let mut stop = StopStrings::new(stops.clone(), include).unwrap();
            let mut got = String::new();
            for piece in &pieces {
                got += &stop.push(piece).text;
                // What was released is never taken back.
                prop_assert!(cut(&text, &stops, include).0.starts_with(&got));
            }
            got += &stop.finish();
            let (want, stopped) = cut(&text, &stops, include);
            prop_assert_eq!(got, want);
            prop_assert_eq!(stop.matched().is_some(), stopped);
        }
    }
}
