//! The two things of Python that chat templates show to the model: how it writes JSON and dates.

use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::value::Kwargs;
use minijinja::{Error, ErrorKind, Value};
use serde_json::Value as Json;

/// `tojson` as transformers defines it: Python's `json.dumps` with `ensure_ascii=False`, so
/// `", "` and `": "` between items, no HTML escapes, keys in the order that they were given.
pub(crate) fn tojson(value: &Value, indent: Option<u64>, kwargs: Kwargs) -> Result<String, Error> {
    if value.is_undefined() {
        return Err(Error::new(ErrorKind::UndefinedError, "tojson of an undefined value"));
    }
    let json = serde_json::to_value(value)
        .map_err(|e| Error::new(ErrorKind::InvalidOperation, "cannot be written as JSON").with_source(e))?;
    let indent = match indent {
        Some(indent) => Some(indent),
        None => kwargs.get::<Option<u64>>("indent")?,
    };
    if let Some(wide) = indent.filter(|&i| i > 64) {
        let words = format!("tojson: indent is {wide}; at most 64 is accepted");
        return Err(Error::new(ErrorKind::InvalidOperation, words));
    }
    let separators = match kwargs.get::<Option<Vec<String>>>("separators")?.as_deref() {
        None => (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()),
        Some([item, key]) => (item.clone(), key.clone()),
        Some(_) => return Err(Error::new(ErrorKind::InvalidOperation, "tojson: separators are two strings")),
    };
    let mut writer = Writer {
        out: String::new(),
        ensure_ascii: kwargs.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        sort_keys: kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
        indent: indent.map(|i| i as usize),
        separators,
    };
    kwargs.assert_all_used()?;
    writer.value(&json, 0);
    Ok(writer.out)
}

struct Writer {
    out: String,
    ensure_ascii: bool,
    sort_keys: bool,
    indent: Option<usize>,
    /// Between items, and between a key and its value.
    separators: (String, String),
}

impl Writer {
    fn value(&mut self, value: &Json, depth: usize) {
        match value {
            Json::Null => self.out.push_str("null"),
            Json::Bool(b) => self.out.push_str(if *b { "true" } else { "false" }),
            Json::Number(n) if n.is_f64() => self.out.push_str(&float(n.as_f64().unwrap_or_default())),
            Json::Number(n) => self.out.push_str(&n.to_string()),
            Json::String(s) => self.string(s),
            Json::Array(items) if items.is_empty() => self.out.push_str("[]"),
            Json::Object(fields) if fields.is_empty() => self.out.push_str("{}"),
            Json::Array(items) => {
                self.out.push('[');
                for (i, item) in items.iter().enumerate() {
                    self.between(i, depth + 1);
                    self.value(item, depth + 1);
                }
                self.newline(depth);
                self.out.push(']');
            }
            Json::Object(fields) => {
                let mut fields: Vec<(&String, &Json)> = fields.iter().collect();
                if self.sort_keys {
                    fields.sort_by_key(|&(key, _)| key);
                }
                self.out.push('{');
                for (i, (key, value)) in fields.into_iter().enumerate() {
                    self.between(i, depth + 1);
                    self.string(key);
                    self.out.push_str(&self.separators.1);
                    self.value(value, depth + 1);
                }
                self.newline(depth);
                self.out.push('}');
            }
        }
    }

    fn between(&mut self, index: usize, depth: usize) {
        if index > 0 {
            self.out.push_str(&self.separators.0);
        }
        self.newline(depth);
    }

    fn newline(&mut self, depth: usize) {
        if let Some(indent) = self.indent {
            self.out.push('\n');
            self.out.extend(std::iter::repeat_n(' ', indent * depth));
        }
    }

    fn string(&mut self, s: &str) {
        self.out.push('"');
        for c in s.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                c if c < ' ' || (self.ensure_ascii && !(' '..='~').contains(&c)) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        self.out.push_str(&format!("\\u{unit:04x}"));
                    }
                }
                c => self.out.push(c),
            }
        }
        self.out.push('"');
    }
}

/// Python's `repr` of a finite float: the shortest digits that read back the same, with an exponent
/// below 1e-4 and from 1e16 on.
fn float(value: f64) -> String {
    let scientific = format!("{value:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let power: i32 = exponent.parse().unwrap_or_default();
    if value != 0.0 && !(-4..16).contains(&power) {
        let sign = if power < 0 { '-' } else { '+' };
        return format!("{digits}e{sign}{:02}", power.unsigned_abs());
    }
    format!("{value:?}")
}

const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];
const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];

/// `strftime` for a moment in UTC, in English; the error names a directive that is not known.
pub(crate) fn strftime(format: &str, time: SystemTime) -> Result<String, String> {
    let seconds = time.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let (days, second_of_day) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day, day_of_year) = civil(days);
    let (hour, minute, second) = (second_of_day / 3600, second_of_day / 60 % 60, second_of_day % 60);
    let weekday = DAYS[((days + 4) % 7) as usize]; // 1970-01-01 was a Thursday
    let month_name = MONTHS[month as usize - 1];
    let hour_12 = (hour + 11) % 12 + 1;

    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut directive = chars.next();
        let padded = directive != Some('-');
        if !padded {
            directive = chars.next();
        }
        let number = |n: u64, width: usize| if padded { format!("{n:0width$}") } else { n.to_string() };
        out += &match directive {
            Some('Y') => year.to_string(),
            Some('y') => number(year % 100, 2),
            Some('m') => number(month, 2),
            Some('d') => number(day, 2),
            Some('e') => format!("{day:2}"),
            Some('j') => number(day_of_year, 3),
            Some('H') => number(hour, 2),
            Some('I') => number(hour_12, 2),
            Some('M') => number(minute, 2),
            Some('S') => number(second, 2),
            Some('p') => if hour < 12 { "AM" } else { "PM" }.to_owned(),
            Some('B') => month_name.to_owned(),
            Some('b' | 'h') => month_name[..3].to_owned(),
            Some('A') => weekday.to_owned(),
            Some('a') => weekday[..3].to_owned(),
            Some('F') => format!("{year}-{month:02}-{day:02}"),
            Some('T') => format!("{hour:02}:{minute:02}:{second:02}"),
            Some('Z') => "UTC".to_owned(),
            Some('z') => "+0000".to_owned(),
            Some('%') => "%".to_owned(),
            Some(other) => return Err(format!("strftime_now: the directive %{other} is not known")),
            None => return Err("strftime_now: the format ends inside a directive".to_owned()),
        };
    }
    Ok(out)
}

/// Year, month (from 1), day (from 1) and day of the year (from 1) of a day since 1970-01-01 in the
/// Gregorian calendar.
fn civil(days: u64) -> (u64, u64, u64, u64) {
    let leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    // Whole cycles of 400 years first, so that the loop is short for any clock.
    let (mut year, mut left) = (1970 + days / 146_097 * 400, days % 146_097);
    loop {
        let length = if leap(year) { 366 } else { 365 };
        if left < length {
            break;
        }
        left -= length;
        year += 1;
    }
    let day_of_year = left + 1;
    let february = if leap(year) { 29 } else { 28 };
    let mut month = 1;
    for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if left < length {
            break;
        }
        left -= length;
        month += 1;
    }
    (year, month, left + 1, day_of_year)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn dates_as_date_prints_them() {
        let at = |seconds| UNIX_EPOCH + Duration::from_secs(seconds);
        // Each expected text is what `date -u -d @SECONDS` prints.
        let all = "%Y-%m-%d %H:%M:%S %j %a %b";
        assert_eq!(strftime(all, at(0)).unwrap(), "1970-01-01 00:00:00 001 Thu Jan");
        assert_eq!(strftime(all, at(951_782_400)).unwrap(), "2000-02-29 00:00:00 060 Tue Feb");
        assert_eq!(strftime(all, at(1_735_689_599)).unwrap(), "2024-12-31 23:59:59 366 Tue Dec");
        assert_eq!(strftime(all, at(4_107_542_400)).unwrap(), "2100-03-01 00:00:00 060 Mon Mar");
        assert_eq!(strftime("%-d %B %y, %A %-I %p 100%%", at(1_751_378_400)).unwrap(), "1 July 25, Tuesday 2 PM 100%");
        assert!(strftime("%Q", at(0)).unwrap_err().contains("%Q"));
        assert!(strftime("%", at(0)).is_err());
    }

    #[test]
    fn floats_as_python_prints_them() {
        for (value, want) in [
            (1.0, "1.0"),
            (0.1, "0.1"),
            (-2.5, "-2.5"),
            (0.0, "0.0"),
            (1e-4, "0.0001"),
            (1.5e-5, "1.5e-05"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1e300, "1e+300"),
        ] {
            assert_eq!(float(value), want);
        }
    }
}
