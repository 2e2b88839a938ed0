//! Ranks that are processes of their own: this test binary, started again for the one test `child`, which does what the
//! variable `ROLE` says. The parent is rank 0.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use moesaic_comm::collective::{AllReduceArgs, all_reduce};
use moesaic_comm::process::{Join, join};
use moesaic_comm::{Communicator, Message, Process};
use moesaic_device::{Ctx, Tensor};
use moesaic_plan::{AllReduce, Rank};
use moesaic_spec::{Bytes, DType};

use crate::{LONG, Transport, assert_is, meeting_folder, on_all, sentence, tag, tensor, words};

/// Folder, rank, world size and what to do, divided by line ends.
const ROLE: &str = "MOESAIC_COMM_TEST_ROLE";

/// Children that do not outlive their test.
struct Children(Vec<Child>);

impl Children {
    fn start(dir: &Path, world_size: usize, work: &str) -> Children {
        Children(
            (1..world_size)
                .map(|rank| start_child(&format!("{}\n{rank}\n{world_size}\n{work}", dir.display())))
                .collect(),
        )
    }

    fn of(&mut self, rank: usize) -> &mut Child {
        &mut self.0[rank - 1]
    }

    fn all_end_well(mut self) {
        for child in &mut self.0 {
            assert!(child.wait().unwrap().success());
        }
    }
}

impl Drop for Children {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn start_child(role: &str) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "children::child", "--test-threads=1"]).env(ROLE, role);
    command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap()
}

fn join_as(dir: &Path, rank: u32, world_size: usize) -> Process {
    let exchange_bytes = Bytes(64 << 20);
    join(Join { dir, rank: Rank(rank), world_size, session: 5, deadline: LONG, exchange_bytes }).unwrap()
}

/// Not a test of its own: what children do. Without a role it does nothing.
#[test]
fn child() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let fields: Vec<&str> = role.lines().collect();
    let [dir, rank, world_size, work] = fields[..] else { panic!("a role of four lines: {role}") };
    let world_size = world_size.parse().unwrap();
    let join = || join_as(Path::new(dir), rank.parse().unwrap(), world_size);
    match work {
        "exchange" => exchange(&join()),
        "wait" => {
            // Until killed; not for ever if the parent is.
            let _ = join().receive(Rank(0), tag(1000));
        }
        "leaks" => nothing_is_left(),
        "idle" => waiting_costs_nothing(),
        other => panic!("no role is called {other}"),
    }
}

/// Small and large messages, from all to all, and a sum.
fn exchange(comm: &Process) {
    let n = comm.world_size() as u32;
    let own = comm.rank().0;
    let others: Vec<Rank> = (0..n).filter(|&rank| rank != own).map(Rank).collect();
    for (layer, len) in [(0, 10), (1, 100_000), (2, 8 << 20)] {
        for &to in &others {
            let tensors = vec![tensor(comm.exchange(), &[len], (own * n + to.0) as usize)];
            comm.send(to, tag(layer), Message { header: vec![own, to.0], tensors }).unwrap();
        }
        for (from, message) in others.iter().zip(comm.receive_all(&others, tag(layer)).unwrap()) {
            assert_eq!(message.header, [from.0, own]);
            assert_is(&message.tensors[0], &[len], (from.0 * n + own) as usize);
        }
    }
    let ctx = Ctx::cpu(1, 1 << 20).unwrap();
    let mut x = ctx.empty(&[30_000], DType::F32).unwrap();
    x.f32_mut().fill(own as f32 + 1.0);
    let group: Vec<Rank> = (0..n).map(Rank).collect();
    let node_of: Vec<usize> = (0..n as usize).map(|rank| rank / 2).collect();
    let args = AllReduceArgs { tag: tag(3), group: &group, node_of: &node_of, algorithm: AllReduce::Hierarchical };
    all_reduce(&ctx, comm, args, &mut x).unwrap();
    assert!(x.f32().iter().all(|&x| x == (n * (n + 1) / 2) as f32));
}

#[test]
fn processes_exchange() {
    let folder = meeting_folder();
    let children = Children::start(folder.path(), 4, "exchange");
    exchange(&join_as(folder.path(), 0, 4));
    children.all_end_well();
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "no socket keeps its name");
}

#[test]
fn a_killed_rank_is_named_at_once() {
    let folder = meeting_folder();
    let mut children = Children::start(folder.path(), 3, "wait");
    let comm = join_as(folder.path(), 0, 3);
    let start = Instant::now();
    children.of(2).kill().unwrap();
    let error = sentence(LONG / 2, || comm.receive_all(&[Rank(1), Rank(2)], tag(0)));
    let expected = "rank 2 has ended (connection closed); rank 0 waited for dispatch of layer 0, micro-batch 0, step 9";
    assert_eq!(error, expected);
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    assert_eq!(
        sentence(LONG / 2, || comm.send(Rank(2), tag(0), words(&[]))),
        "rank 0 cannot send dispatch of layer 0, micro-batch 0, step 9 to rank 2: it has ended (connection closed)"
    );
    // Nothing is kept of its shared memory, and the other rank can still be sent to.
    comm.send(Rank(1), tag(0), words(&[])).unwrap();
}

#[test]
fn a_stopped_rank_is_named_by_the_deadline() {
    let folder = meeting_folder();
    let mut children = Children::start(folder.path(), 2, "wait");
    let mut comm = join_as(folder.path(), 0, 2);
    comm.set_deadline(Duration::from_millis(300));
    let pid = children.of(1).id().to_string();
    assert!(Command::new("kill").args(["-STOP", &pid]).status().unwrap().success());
    let error = sentence(LONG / 2, || comm.receive(Rank(1), tag(2)));
    assert_eq!(error, "rank 0 waited 0.3 s for rank 1: dispatch of layer 2, micro-batch 0, step 9");
    // Sends go on until nothing more fits between the two, and then end by the deadline as well.
    let mut sends = (0..).map(|i| comm.send(Rank(1), tag(i), words(&[0; 3000])));
    let error = sends.find_map(Result::err).unwrap().to_string();
    let why = "micro-batch 0, step 9 to rank 1: it took nothing for 0.3 s";
    assert!(error.starts_with("rank 0 cannot send dispatch of layer ") && error.ends_with(why), "{error}");
}

/// Alone in its process, so that it sees its own descriptors and mappings only.
#[test]
fn nothing_is_left_of_a_world() {
    assert!(start_child("/\n0\n0\nleaks").wait().unwrap().success());
}

fn nothing_is_left() {
    let run = || {
        let ends = Transport::Process.world(4, LONG);
        on_all(ends, |comm| {
            let to = Rank((comm.rank().0 + 1) % 4);
            let from = Rank((comm.rank().0 + 3) % 4);
            for i in 0..10 {
                let tensors = vec![tensor(comm.exchange(), &[100_000], 0)];
                // Who receives the first one leaves while the others are still being sent.
                let sent = comm.send(to, tag(i), Message { header: Vec::new(), tensors });
                assert!(sent.is_ok() || i > 0);
            }
            comm.receive(from, tag(0)).unwrap();
        });
    };
    let counts = || {
        let descriptors = std::fs::read_dir("/proc/self/fd").unwrap().count();
        let mappings = std::fs::read_to_string("/proc/self/maps").unwrap();
        let threads = std::fs::read_dir("/proc/self/task").unwrap().count();
        (descriptors, mappings.matches("memfd:moesaic").count(), threads)
    };
    // A joined thread may be listed for a moment longer.
    let settled = |expected: (usize, usize, usize)| {
        let until = Instant::now() + Duration::from_secs(5);
        while counts() != expected && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(5));
        }
        counts()
    };
    run();
    std::thread::sleep(Duration::from_millis(50));
    let before = counts();
    assert_eq!(before.1, 0);
    for _ in 0..5 {
        run();
    }
    assert_eq!(settled(before), before);
}

#[test]
fn no_thread_of_a_waiting_process_uses_the_processor() {
    assert!(start_child("/\n0\n0\nidle").wait().unwrap().success());
}

fn waiting_costs_nothing() {
    let cpu_time = || {
        let tasks = std::fs::read_dir("/proc/self/task").unwrap();
        let of_task = |task: std::io::Result<std::fs::DirEntry>| {
            let counts = std::fs::read_to_string(task.unwrap().path().join("schedstat")).unwrap_or_default();
            counts.split(' ').next().and_then(|count| count.parse().ok()).unwrap_or(0)
        };
        Duration::from_nanos(tasks.map(of_task).sum())
    };
    let ends = Transport::Process.world(4, Duration::from_millis(200));
    // Memory that is touched for the first time, before what is measured.
    let x = Tensor::empty(ends[0].exchange(), &[100_000], DType::U8).unwrap();
    ends[0].send(Rank(1), tag(0), Message { header: Vec::new(), tensors: vec![x] }).unwrap();
    ends[1].receive(Rank(0), tag(0)).unwrap();
    let before = cpu_time();
    sentence(LONG, || ends[0].receive(Rank(1), tag(0)));
    let used = cpu_time() - before;
    assert!(used < Duration::from_millis(20), "{used:?}");
}
