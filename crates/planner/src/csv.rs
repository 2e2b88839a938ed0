//! Tables of measurements as comma-separated values (RFC 4180): a line of names, then a line a row. Fields may be quoted,
//! lines that begin with `#` are notes.

use crate::PlannerError;

/// A table, as it stands in its file.
#[derive(Clone, Debug)]
pub struct Table {
    origin: String,
    columns: Vec<String>,
    /// Line of the file, from 1, and fields in the order of the columns.
    rows: Vec<(usize, Vec<String>)>,
}

/// One row of a table.
#[derive(Clone, Copy, Debug)]
pub struct Record<'t> {
    table: &'t Table,
    /// Line of the file, from 1.
    pub line: usize,
    fields: &'t [String],
}

impl Table {
    /// Reads the text of a file; `origin` is its path, for messages.
    ///
    /// # Errors
    /// [`PlannerError::Table`]: no names, a name twice, a column of `needed` missing, no row, a row of another number of
    /// fields, or a quote without an end.
    pub fn parse(text: &str, origin: &str, needed: &[&str]) -> Result<Table, PlannerError> {
        let fault = |line: usize, column: &str, why: String| PlannerError::Table {
            file: origin.to_owned(),
            line,
            column: column.to_owned(),
            why,
        };
        let mut records = records(text).map_err(|line| fault(line, "", "a quote has no end".into()))?.into_iter();
        let (first, columns) = records.next().ok_or_else(|| fault(1, "", "the file has no line of names".into()))?;
        let columns: Vec<String> = columns.iter().map(|name| name.trim().to_owned()).collect();
        if let Some(idx) = (1..columns.len()).find(|&idx| columns[..idx].contains(&columns[idx])) {
            return Err(fault(first, &columns[idx], "the name is there twice".into()));
        }
        if let Some(missing) = needed.iter().find(|name| !columns.iter().any(|column| column == *name)) {
            return Err(fault(first, missing, format!("the column is missing; needed are {}", needed.join(", "))));
        }
        let rows: Vec<_> = records.collect();
        if rows.is_empty() {
            return Err(fault(first, "", "the table has names but no row".into()));
        }
        if let Some((line, fields)) = rows.iter().find(|(_, fields)| fields.len() != columns.len()) {
            let why = format!("the row has {} fields; the line of names has {}", fields.len(), columns.len());
            return Err(fault(*line, "", why));
        }
        Ok(Table { origin: origin.to_owned(), columns, rows })
    }

    /// The rows, in order.
    pub fn rows(&self) -> impl Iterator<Item = Record<'_>> {
        self.rows.iter().map(|(line, fields)| Record { table: self, line: *line, fields })
    }

    /// Columns that are not among `known`.
    pub fn others(&self, known: &[&str]) -> Vec<&str> {
        self.columns.iter().map(String::as_str).filter(|column| !known.contains(column)).collect()
    }
}

impl<'t> Record<'t> {
    /// The field of a column, without space around it; empty where the file says "nan" or has no such column.
    pub fn text(&self, column: &str) -> &'t str {
        let idx = self.table.columns.iter().position(|name| name == column);
        let text = idx.map_or("", |idx| self.fields[idx].trim());
        if text.eq_ignore_ascii_case("nan") { "" } else { text }
    }

    /// A number above 0, where there is one; 0 counts as none.
    ///
    /// # Errors
    /// [`PlannerError::Table`]: something else.
    pub fn number(&self, column: &str) -> Result<Option<f64>, PlannerError> {
        let text = self.text(column);
        if text.is_empty() {
            return Ok(None);
        }
        match text.parse::<f64>() {
            Ok(0.0) => Ok(None),
            Ok(number) if number > 0.0 && number < 1e15 => Ok(Some(number)),
            _ => Err(self.fault(column, format!("is {text:?}; a number above 0 is right"))),
        }
    }

    /// The same where there must be one.
    ///
    /// # Errors
    /// [`PlannerError::Table`]: something else, or nothing.
    pub fn needed(&self, column: &str) -> Result<f64, PlannerError> {
        self.number(column)?.ok_or_else(|| self.fault(column, "is empty or 0; a number above 0 is right".into()))
    }

    /// A whole number of at least 1, where there is one; 0 counts as none.
    ///
    /// # Errors
    /// [`PlannerError::Table`]: something else.
    pub fn count(&self, column: &str) -> Result<Option<usize>, PlannerError> {
        match self.number(column)? {
            None => Ok(None),
            Some(number) if number.fract() == 0.0 && number <= 1e6 => Ok(Some(number as usize)),
            Some(number) => Err(self.fault(column, format!("is {number}; a whole number up to 1,000,000 is right"))),
        }
    }

    /// What is wrong with a field.
    pub fn fault(&self, column: &str, why: String) -> PlannerError {
        PlannerError::Table { file: self.table.origin.clone(), line: self.line, column: column.to_owned(), why }
    }
}

/// Line and fields of each record; the line where a quote without an end begins otherwise.
fn records(text: &str) -> Result<Vec<(usize, Vec<String>)>, usize> {
    let mut records = Vec::new();
    let mut lines = text.lines().enumerate();
    while let Some((idx, line)) = lines.next() {
        if line.trim().is_empty() || line.starts_with('#') {
            continue;
        }
        let (mut fields, mut field, mut quoted) = (Vec::new(), String::new(), false);
        let mut rest = line;
        loop {
            let mut chars = rest.chars().peekable();
            while let Some(c) = chars.next() {
                match c {
                    '"' if quoted && chars.peek() == Some(&'"') => {
                        chars.next();
                        field.push('"');
                    }
                    '"' => quoted = !quoted,
                    ',' if !quoted => fields.push(std::mem::take(&mut field)),
                    c => field.push(c),
                }
            }
            if !quoted {
                break;
            }
            // A quoted field goes on in the next line.
            field.push('\n');
            rest = lines.next().ok_or(idx + 1)?.1;
        }
        fields.push(field);
        records.push((idx + 1, fields));
    }
    Ok(records)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(text: &str) -> String {
        let table = Table::parse(text, "t.csv", &["a", "b"]);
        table.and_then(|table| table.rows().try_for_each(|row| row.needed("b").map(drop))).unwrap_err().to_string()
    }

    #[test]
    fn quotes_notes_and_empty_fields_are_read() {
        let text = "# a note\na,b,c\n1,2,\"x, \"\"y\"\"\"\n\n, 2.5 ,\"two\nlines\"\nnan,3,z\n";
        let table = Table::parse(text, "t.csv", &["a", "b"]).unwrap();
        let rows: Vec<Record> = table.rows().collect();
        assert_eq!((rows[0].line, rows[0].text("c"), rows[0].count("a").unwrap()), (3, "x, \"y\"", Some(1)));
        assert_eq!((rows[1].line, rows[1].text("c"), rows[1].number("b").unwrap()), (5, "two\nlines", Some(2.5)));
        assert_eq!((rows[2].number("a").unwrap(), rows[2].text("nowhere")), (None, ""));
        assert_eq!(table.others(&["a", "b"]), ["c"]);
    }

    #[test]
    fn what_cannot_be_read_is_refused_by_line_and_column() {
        for (text, sentence) in [
            ("", "t.csv, line 1: the file has no line of names"),
            ("a,c\n1,2\n", "t.csv, line 1, column b: the column is missing; needed are a, b"),
            ("a,b,a\n1,2,3\n", "t.csv, line 1, column a: the name is there twice"),
            ("a,b\n", "t.csv, line 1: the table has names but no row"),
            ("a,b\n1\n", "t.csv, line 2: the row has 1 fields; the line of names has 2"),
            ("a,b\n1,\"2\n", "t.csv, line 2: a quote has no end"),
            ("a,b\n1,x\n", "t.csv, line 2, column b: is \"x\"; a number above 0 is right"),
            ("a,b\n1,-2\n", "t.csv, line 2, column b: is \"-2\"; a number above 0 is right"),
            ("a,b\n1,inf\n", "t.csv, line 2, column b: is \"inf\"; a number above 0 is right"),
            ("a,b\n1,\n", "t.csv, line 2, column b: is empty or 0; a number above 0 is right"),
        ] {
            assert_eq!(refusal(text), sentence, "{text:?}");
        }
    }
}
