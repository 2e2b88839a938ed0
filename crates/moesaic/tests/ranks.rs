//! `moesaic generate --plan`: the ranks of a plan say what one rank says, and when one of them dies or stalls, the run ends
//! and leaves nothing behind.

mod common;

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::{arg, moesaic, temp};

/// Experts on four ranks, every rank with requests of its own.
const EP: &str = "{version: 1, name: EP=4, model: tiny-moe, cluster: a100-4x4, workload: chat-small, ranks: 4,
    mesh: {dp: 4, ep: 4}, moe: {max_experts_per_rank: 4}, micro_batches: 2, overlap: arrivals}\n";

fn plan(folder: &Path, text: &str) -> PathBuf {
    let path = folder.join("plan.yaml");
    fs::write(&path, text).unwrap();
    path
}

#[test]
fn ranks_give_the_tokens_and_the_logits_of_one_rank() {
    let temp = temp();
    let plan = plan(temp.path(), EP);
    let run = |name: &str, extra: &[&str]| {
        let logits = temp.path().join(name);
        let args =
            ["generate", "--prompt-ids", "5,6,7,8,9", "-n", "6", "--ignore-eos", "--json", "--logits", arg(&logits)];
        let json = moesaic(&[&args[..], extra].concat()).json();
        (json["token_ids"].clone(), fs::read(&logits).unwrap())
    };
    let (tokens, logits) = run("one", &[]);
    assert_eq!(tokens.as_array().unwrap().len(), 6);
    for communicator in ["in-process", "process"] {
        let (others, other_logits) = run(communicator, &["--plan", arg(&plan), "--communicator", communicator]);
        assert_eq!(others, tokens, "{communicator}");
        assert!(other_logits == logits, "{communicator}: logits differ");
    }
}

#[test]
fn text_and_chat_are_those_of_one_rank_and_the_plan_is_named() {
    let temp = temp();
    let plan = plan(temp.path(), EP);
    for extra in [&["--prompt", "The old house"][..], &["--chat", "--prompt", "Good morning"]] {
        let args = [&["generate", "-n", "8"], extra].concat();
        let ran = moesaic(&[&args[..], &["--plan", arg(&plan)]].concat());
        let line = "plan      EP=4 (dp 4, experts over 4, 2 micro-batches): 4 ranks, threads of this process";
        assert!(ran.stderr.contains(line), "{}", ran.stderr);
        assert_eq!(ran.ok(), moesaic(&args).ok());
    }
}

#[test]
fn what_changed_while_it_ran_is_said() {
    let temp = temp();
    // Looks at the load that never find enough of it.
    let balanced =
        plan(temp.path(), &EP.replace("micro_batches: 2", "balance: {interval: 2, threshold: 9, significance: 0.01}"));
    let args = ["generate", "--prompt", "x", "-n", "8", "--ignore-eos", "--plan"];
    let ran = moesaic(&[&args[..], &[arg(&balanced)]].concat());
    let sentence = "Experts stayed where they were: 4 looks at the load; none found a load that is uneven beyond chance and \
                    worth a move.";
    assert!(ran.stderr.contains(sentence), "{}", ran.stderr);
    let separate = "mesh: {tp: 2, ep: 2}, moe: {pool: separate, max_experts_per_rank: 8}, synchronize: {interval: 4, \
                    threshold: 0.05}";
    let separate = EP.replace("mesh: {dp: 4, ep: 4}, moe: {max_experts_per_rank: 4}", separate);
    let ran = moesaic(&[&args[..], &[arg(&plan(temp.path(), &separate))]].concat());
    assert!(ran.stderr.contains("\nMicro-batches were chosen 2 times: "), "{}", ran.stderr);
}

/// A run of four processes in its middle.
struct Running {
    leader: Child,
    /// By rank: process ids.
    ranks: Vec<u32>,
    /// Where they met.
    folder: PathBuf,
    stderr: std::thread::JoinHandle<String>,
}

impl Running {
    fn start(plan: &Path) -> Running {
        let mut command = Command::new(env!("CARGO_BIN_EXE_moesaic"));
        let args = ["generate", "--prompt", "It was", "-n", "2000", "--ignore-eos", "--plan", arg(plan)];
        command.args(args).args(["--communicator", "process", "--deadline", "2"]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut leader = command.spawn().unwrap();
        let mut stderr = leader.stderr.take().unwrap();
        let stderr = std::thread::spawn(move || {
            let mut text = String::new();
            stderr.read_to_string(&mut text).unwrap();
            text
        });
        let mut stdout = leader.stdout.take().unwrap();
        // The first tokens: everybody is at work.
        stdout.read_exact(&mut [0; 20]).unwrap();
        std::thread::spawn(move || stdout.read_to_end(&mut Vec::new()));
        let mut ranks = vec![0; 4];
        let mut folder = PathBuf::new();
        for (pid, args) in processes() {
            let after = |flag: &str| args.iter().position(|arg| arg == flag).map(|at| args[at + 1].clone());
            if parent(pid) == Some(leader.id())
                && let (Some(rank), Some(of)) = (after("--rank"), after("--folder"))
            {
                ranks[rank.parse::<usize>().unwrap()] = pid;
                folder = of.into();
            }
        }
        assert!(ranks.iter().all(|&pid| pid > 0) && folder.is_absolute(), "{ranks:?} {folder:?}");
        Running { leader, ranks, folder, stderr }
    }

    fn signal(&self, pid: u32, signal: &str) {
        assert!(Command::new("kill").args([signal, &pid.to_string()]).status().unwrap().success());
    }

    /// Waits for the end: exit code and standard error.
    fn end(mut self, within: Duration) -> (Option<i32>, String) {
        let start = Instant::now();
        let status = loop {
            if let Some(status) = self.leader.try_wait().unwrap() {
                break status;
            }
            assert!(start.elapsed() < within, "the run goes on");
            std::thread::sleep(Duration::from_millis(5));
        };
        // Ranks without a leader end by themselves, soon after.
        while self.ranks.iter().any(|&pid| is_alive(pid)) {
            assert!(start.elapsed() < within, "a rank is left behind");
            std::thread::sleep(Duration::from_millis(5));
        }
        (status.code(), self.stderr.join().unwrap())
    }
}

impl Drop for ReapRanks {
    fn drop(&mut self) {
        for pid in &self.0 {
            let _ = Command::new("kill").args(["-9", &pid.to_string()]).stderr(Stdio::null()).status();
        }
    }
}

/// A failing test must not leave stopped processes, either.
struct ReapRanks(Vec<u32>);

fn processes() -> Vec<(u32, Vec<String>)> {
    let entries = fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    let command_line = |pid: u32| {
        let text = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        (pid, text.split('\0').map(str::to_string).collect())
    };
    entries.map(command_line).collect()
}

/// State and parent of a process.
fn stat(pid: u32) -> Option<(String, u32)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    Some((fields.next()?.to_string(), fields.next()?.parse().ok()?))
}

fn parent(pid: u32) -> Option<u32> {
    Some(stat(pid)?.1)
}

fn is_alive(pid: u32) -> bool {
    stat(pid).is_some_and(|(state, _)| state != "Z" && state != "X")
}

/// The deadline, half of it and two seconds that the leader waits longer than its ranks, and what a busy machine adds.
const WITHIN: Duration = Duration::from_secs(15);

#[test]
fn a_rank_that_is_killed_ends_the_run_by_name() {
    let temp = temp();
    let running = Running::start(&plan(temp.path(), EP));
    let _reap = ReapRanks(running.ranks.clone());
    let folder = running.folder.clone();
    running.signal(running.ranks[2], "-KILL");
    let (code, stderr) = running.end(WITHIN);
    let last = stderr.lines().last().unwrap_or_default();
    assert_eq!((code, last), (Some(2), "error: the process of rank 2 has ended (signal: 9 (SIGKILL))"), "{stderr}");
    assert!(!folder.exists(), "{folder:?} is left behind");
}

#[test]
fn a_rank_that_stalls_ends_the_run_by_name() {
    let temp = temp();
    let running = Running::start(&plan(temp.path(), EP));
    let _reap = ReapRanks(running.ranks.clone());
    let folder = running.folder.clone();
    running.signal(running.ranks[1], "-STOP");
    let (code, stderr) = running.end(WITHIN);
    let last = stderr.lines().last().unwrap_or_default();
    assert_eq!(code, Some(2), "{stderr}");
    assert!(last.starts_with("error: rank ") && last.contains("rank 1"), "{stderr}");
    assert!(!folder.exists(), "{folder:?} is left behind");
}

#[test]
fn a_leader_that_is_ended_takes_its_ranks_along() {
    let temp = temp();
    let running = Running::start(&plan(temp.path(), EP));
    let _reap = ReapRanks(running.ranks.clone());
    running.signal(running.leader.id(), "-TERM");
    let (code, _) = running.end(WITHIN);
    assert_eq!(code, None, "a signal ended it");
}
