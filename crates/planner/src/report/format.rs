//! Numbers as people read them.

/// Three or four digits that count, thousands apart: `0.0123`, `2.84`, `12.3`, `135,200`.
pub(crate) fn number(value: f64) -> String {
    let size = value.abs();
    match size {
        0.0 => "0".to_owned(),
        _ if !value.is_finite() => "n/a".to_owned(),
        _ if size >= 999.5 => thousands(value),
        _ if size >= 99.95 => format!("{value:.0}"),
        _ if size >= 9.995 => format!("{value:.1}"),
        _ if size >= 0.1 => format!("{value:.2}"),
        _ if size >= 0.001 => format!("{value:.4}"),
        _ => format!("{value:.1e}"),
    }
}

/// A count, thousands apart.
pub(crate) fn integer(count: u64) -> String {
    thousands(count as f64)
}

fn thousands(value: f64) -> String {
    let digits = format!("{:.0}", value.abs());
    let mut text = String::from(if value < 0.0 { "-" } else { "" });
    for (idx, digit) in digits.chars().enumerate() {
        if idx > 0 && (digits.len() - idx).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A share as percent, without the sign for it.
pub(crate) fn percent(share: f64) -> String {
    let percent = 100.0 * share;
    match percent.abs() {
        0.0 => "0".to_owned(),
        size if size < 0.001 => format!("{percent:.1e}"),
        // Two digits that count: the memory of a large GPU that a small model uses, say.
        size if size < 0.05 => format!("{percent:.*}", if size < 0.01 { 4 } else { 3 }),
        size if size >= 99.95 => thousands(percent),
        _ if percent.fract() == 0.0 => format!("{percent:.0}"),
        _ => format!("{percent:.1}"),
    }
}

/// A large count: `46.7 B`.
pub(crate) fn count(value: f64) -> String {
    const UNITS: [(f64, &str); 4] = [(1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")];
    match UNITS.iter().find(|(unit, _)| value >= *unit) {
        Some((unit, name)) => format!("{}{name}", number(value / unit)),
        None => number(value),
    }
}

/// Bytes per second in decimal units, as links are sold.
pub(crate) fn rate(bytes_per_s: f64) -> String {
    if bytes_per_s >= 1e12 {
        format!("{} TB/s", number(bytes_per_s / 1e12))
    } else {
        format!("{} GB/s", number(bytes_per_s / 1e9))
    }
}

/// A span of time.
pub(crate) fn seconds(seconds: f64) -> String {
    match seconds.abs() {
        0.0 => "0 s".to_owned(),
        size if size >= 1.0 => format!("{} s", number(seconds)),
        size if size >= 1e-3 => format!("{} ms", number(1e3 * seconds)),
        _ => format!("{} µs", number(1e6 * seconds)),
    }
}

/// Text in HTML and its attributes.
pub(crate) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            other => escaped.push(other),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_the_digits_that_count() {
        let cases = [
            (0.0, "0"),
            (2.841, "2.84"),
            (12.34, "12.3"),
            (712.6, "713"),
            (999.7, "1,000"),
            (135_200.0, "135,200"),
            (-1_234_567.0, "-1,234,567"),
            (0.01234, "0.0123"),
            (2.3e-7, "2.3e-7"),
            (f64::NAN, "n/a"),
        ];
        for (value, text) in cases {
            assert_eq!(number(value), text);
        }
        assert_eq!([0, 24, 32_768].map(integer), ["0", "24", "32,768"]);
        assert_eq!([0.0, 2e-6, 5.2e-5, 0.00012, 0.0006].map(percent), ["0", "2.0e-4", "0.0052", "0.012", "0.1"]);
        assert_eq!([0.5, 0.684, 1.0, 3.065].map(percent), ["50", "68.4", "100", "306"]);
        assert_eq!([46.7e9, 1.2e12, 950.0].map(count), ["46.7 B", "1.20 T", "950"]);
        assert_eq!([25e9, 3.35e12].map(rate), ["25.0 GB/s", "3.35 TB/s"]);
        assert_eq!([2.5, 0.0025, 2.5e-6].map(seconds), ["2.50 s", "2.50 ms", "2.50 µs"]);
    }
}
