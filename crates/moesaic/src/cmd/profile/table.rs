//! A table that grows row by row, and goes on where it stopped.
//!
//! Its head says what was measured by which command, commit and machine; the first other line names the columns: the op's
//! parameters, then `kernel`, `framework`, `version` and `latency_us`.

use std::collections::HashSet;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

/// What every table of a run says about where it comes from.
#[derive(Clone, Debug)]
pub(super) struct Origin {
    pub command: String,
    pub commit: String,
    pub machine: String,
    pub date: String,
}

impl Origin {
    /// As lines that are notes in tables and cluster files.
    pub(super) fn head(&self) -> String {
        let Origin { command, commit, machine, date } = self;
        format!("# command: {command}\n# commit: {commit}\n# machine: {machine}\n# date: {date}\n")
    }
}

/// Column `framework`.
const FRAMEWORK: &str = "moesaic";
const VERSION: &str = env!("CARGO_PKG_VERSION");
/// Larger than any table, so that a wrong file is not read into memory.
const MAX_BYTES: u64 = 64 << 20;

/// A file of measurements of one op.
pub(super) struct Table {
    path: PathBuf,
    head: String,
    measured: HashSet<String>,
    /// Open once there is something to write.
    file: Option<File>,
}

impl Table {
    /// The table of an op in a folder, with the rows that it already has. Nothing is written, unless a last line was cut off by the
    /// end of an earlier run: it is removed.
    pub(super) fn open(dir: &Path, op: &str, parameters: &[&str], origin: &Origin) -> Result<Table> {
        let path = dir.join(format!("{op}.csv"));
        let columns = [parameters, &["kernel", "framework", "version", "latency_us"]].concat();
        let head = format!(
            "{}# what: medians of repeated calls with random data, weights and caches from memory\n{}\n",
            origin.head(),
            columns.join(",")
        );
        let mut table = Table { path, head, measured: HashSet::new(), file: None };
        if !table.path.exists() {
            return Ok(table);
        }
        let name = table.path.display().to_string();
        let length = fs::metadata(&table.path).with_context(|| name.clone())?.len();
        ensure!(length <= MAX_BYTES, "{name} has {length} bytes; a table has at most {MAX_BYTES}");
        let text = fs::read_to_string(&table.path).with_context(|| name.clone())?;
        let whole = whole_lines(&text);
        let rows = read(whole, &columns, origin).with_context(|| name.clone())?;
        if let Some(rows) = rows {
            table.measured = rows;
            let file = OpenOptions::new().append(true).open(&table.path).with_context(|| name.clone())?;
            file.set_len(whole.len() as u64).with_context(|| name)?;
            table.file = Some(file);
        }
        Ok(table)
    }

    /// Whether a row is there: its parameters and kernel, with commas.
    pub(super) fn has(&self, row: &str) -> bool {
        self.measured.contains(row)
    }

    /// Adds a row, on the disk before this returns.
    pub(super) fn add(&mut self, row: String, seconds: f64) -> Result<()> {
        let name = || self.path.display().to_string();
        let mut file = match self.file.take() {
            Some(file) => file,
            None => {
                let mut file = File::create(&self.path).with_context(name)?;
                file.write_all(self.head.as_bytes()).with_context(name)?;
                file
            }
        };
        // One write: whoever ends the program leaves at most one line cut off.
        let line = format!("{row},{FRAMEWORK},{VERSION},{:.3}\n", seconds * 1e6);
        file.write_all(line.as_bytes()).with_context(name)?;
        file.flush().with_context(name)?;
        self.file = Some(file);
        self.measured.insert(row);
        Ok(())
    }

    /// Rows.
    pub(super) fn len(&self) -> usize {
        self.measured.len()
    }
}

/// The text up to its last line end.
fn whole_lines(text: &str) -> &str {
    text.rfind('\n').map_or("", |end| &text[..=end])
}

/// The rows that are there. `None`: the file ended within its head, and is begun anew.
fn read(text: &str, columns: &[&str], origin: &Origin) -> Result<Option<HashSet<String>>> {
    let stated =
        |key: &str| text.lines().find_map(|line| line.strip_prefix("# ")?.strip_prefix(key)?.strip_prefix(": "));
    for (key, own) in [("machine", &origin.machine), ("commit", &origin.commit)] {
        match stated(key) {
            Some(other) if other != own => {
                bail!("is of {key} {other}, this is {own}; another folder (--output) is right for this one")
            }
            _ => {}
        }
    }
    let mut lines = text.lines().enumerate().filter(|(_, line)| !line.starts_with('#') && !line.is_empty());
    let Some((at, names)) = lines.next() else { return Ok(None) };
    ensure!(names == columns.join(","), "line {} has the columns {names}; {} are right", at + 1, columns.join(","));
    ensure!(stated("machine").is_some(), "does not say on which machine it was measured; `# machine: …` is missing");
    let row = |(at, line): (usize, &str)| {
        let values: Vec<&str> = line.split(',').collect();
        let (at, wanted) = (at + 1, columns.len());
        ensure!(values.len() == wanted, "line {at} has {} values for {wanted} columns", values.len());
        let [.., framework, version, latency] = values[..] else { unreachable!("there are four columns at least") };
        ensure!(framework == FRAMEWORK, "line {at} is of {framework}, this is {FRAMEWORK}");
        ensure!(
            version == VERSION,
            "line {at} is of version {version}, this is {VERSION}; another folder (--output) is right"
        );
        let time = latency.parse().is_ok_and(|time: f64| time > 0.0 && time.is_finite());
        ensure!(time, "line {at}: latency_us is {latency}; a time above 0 is right");
        Ok(values[..values.len() - 3].join(","))
    };
    lines.map(row).collect::<Result<_>>().map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn origin() -> Origin {
        let text = |text: &str| text.to_owned();
        Origin {
            command: text("profile x"),
            commit: text("abc"),
            machine: text("M, 2 cores"),
            date: text("2026-11-25"),
        }
    }

    fn open(dir: &Path) -> Result<Table> {
        Table::open(dir, "gemm", &["dtype", "m"], &origin())
    }

    #[test]
    fn rows_are_kept_and_not_measured_again() {
        let dir = tempfile::tempdir().unwrap();
        let mut table = open(dir.path()).unwrap();
        assert!(!dir.path().join("gemm.csv").exists(), "nothing is written before there is a row");
        table.add("bfloat16,1,avx2".into(), 1.5e-6).unwrap();
        table.add("bfloat16,2,avx2".into(), 0.25).unwrap();
        let text = fs::read_to_string(dir.path().join("gemm.csv")).unwrap();
        let rows = "dtype,m,kernel,framework,version,latency_us\nbfloat16,1,avx2,moesaic,0.0.0,1.500\n";
        assert!(
            text.starts_with(
                "# command: profile x\n# commit: abc\n# machine: M, 2 cores\n# date: 2026-11-25\n# what: "
            )
        );
        assert!(text.replace(VERSION, "0.0.0").contains(rows), "{text}");
        let again = open(dir.path()).unwrap();
        assert!(again.has("bfloat16,1,avx2") && again.has("bfloat16,2,avx2") && !again.has("bfloat16,3,avx2"));
        assert_eq!(again.len(), 2);
    }

    #[test]
    fn a_file_cut_anywhere_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("gemm.csv");
        let rows = ["bfloat16,1,avx2", "bfloat16,2,avx2"];
        let mut table = open(dir.path()).unwrap();
        rows.iter().for_each(|row| table.add((*row).into(), 1e-3).unwrap());
        let whole = fs::read(&path).unwrap();
        for length in 0..whole.len() {
            fs::write(&path, &whole[..length]).unwrap();
            let mut table = open(dir.path()).unwrap();
            for row in rows {
                if !table.has(row) {
                    table.add(row.into(), 1e-3).unwrap();
                }
            }
            assert_eq!(fs::read(&path).unwrap(), whole, "cut at {length}");
        }
    }

    #[test]
    fn files_of_others_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("gemm.csv");
        open(dir.path()).unwrap().add("bfloat16,1,avx2".into(), 1e-3).unwrap();
        let good = fs::read_to_string(&path).unwrap();
        let refused = |text: String| {
            fs::write(&path, &text).unwrap();
            let error = format!("{:#}", open(dir.path()).map(|_| ()).unwrap_err());
            assert_eq!(fs::read_to_string(&path).unwrap(), text, "a refused file is not touched");
            error
        };
        for (from, to, part) in [
            ("M, 2 cores", "N", "is of machine N, this is M, 2 cores"),
            ("commit: abc", "commit: def", "is of commit def, this is abc"),
            ("dtype,m,", "dtype,n,", "has the columns dtype,n,kernel"),
            ("# machine: M, 2 cores\n", "", "`# machine: …` is missing"),
            (",moesaic,", ",vllm,", "line 7 is of vllm"),
            (&format!(",{VERSION},"), ",9.9.9,", "line 7 is of version 9.9.9"),
            ("1000.000", "-1", "line 7: latency_us is -1"),
            ("bfloat16,1,", "bfloat16,", "line 7 has 5 values for 6 columns"),
        ] {
            let error = refused(good.replace(from, to));
            assert!(error.contains(part) && error.contains("gemm.csv"), "{part:?} is not in {error:?}");
        }
    }
}
