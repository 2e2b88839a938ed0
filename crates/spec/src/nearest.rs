//! "Did you mean …?"

/// The candidate that `name` is the beginning of, or else the one spelled most like it; the first of equals.
///
/// # Panics
/// When there are no candidates, which would be our own mistake.
pub fn nearest<'a>(name: &str, candidates: impl IntoIterator<Item = &'a str>) -> &'a str {
    // Only the head of a very long name is compared, so that a hostile file costs nothing.
    let name: Vec<char> = name.chars().take(64).collect();
    let starts: String = name.iter().collect();
    let unlike = |c: &&str| (starts.is_empty() || !c.starts_with(&starts), edit_distance(&name, c));
    candidates.into_iter().min_by_key(unlike).expect("there is always something to suggest")
}

/// Levenshtein distance: insertions, deletions and replacements that turn `a` into `b`.
fn edit_distance(a: &[char], b: &str) -> usize {
    // row[i] is the distance between the first i characters of `a` and the part of `b` that has been read.
    let mut row: Vec<usize> = (0..=a.len()).collect();
    for (j, cb) in b.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = j + 1;
        for (i, ca) in a.iter().enumerate() {
            let replaced = diagonal + usize::from(*ca != cb);
            diagonal = row[i + 1];
            row[i + 1] = replaced.min(row[i] + 1).min(diagonal + 1);
        }
    }
    row[a.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distance_counts_single_edits() {
        let chars = |s: &str| s.chars().collect::<Vec<_>>();
        assert_eq!(edit_distance(&chars("kitten"), "sitting"), 3);
        assert_eq!(edit_distance(&chars(""), "abc"), 3);
        assert_eq!(edit_distance(&chars("abc"), "abc"), 0);
    }

    #[test]
    fn nearest_finds_the_typo() {
        assert_eq!(nearest("hiden_size", ["vocab_size", "hidden_size", "head_dim"]), "hidden_size");
        assert_eq!(nearest("qwen3", ["kimi-k2", "qwen3-30b-a3b"]), "qwen3-30b-a3b");
    }
}
