//! Meeting: who is let in, who is sent away, and what happens when a peer stops making sense.

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use moesaic_device::Arena;
use moesaic_plan::{MessageKind, Rank, Tag};
use moesaic_spec::Bytes;
use tempfile::TempDir;

use crate::process::frame::{self, Link, MAGIC};
use crate::process::{Join, Process, join, socket};
use crate::{Communicator, Message};

const TAG: Tag = Tag { step: 0, layer: 0, micro_batch: 0, kind: MessageKind::Hidden, round: 0 };

fn folder() -> TempDir {
    let folder = TempDir::new().unwrap();
    std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
    folder
}

fn settings(dir: &Path, rank: u32, world_size: usize) -> Join<'_> {
    let deadline = Duration::from_secs(20);
    Join { dir, rank: Rank(rank), world_size, session: 77, deadline, exchange_bytes: Bytes(2 << 20) }
}

/// Why a rank cannot join, without the folder's name.
fn refusal(settings: Join<'_>) -> String {
    let dir = settings.dir.display().to_string();
    join(settings).err().expect("it cannot join").to_string().replace(&dir, "DIR")
}

#[test]
fn an_open_folder_is_refused() {
    let folder = folder();
    std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let expected = "rank 0 cannot join the others in DIR: its mode is 0755, expected 0700, so that nobody else can meet \
                    there";
    assert_eq!(refusal(settings(folder.path(), 0, 2)), expected);
    assert_eq!(
        refusal(settings(&folder.path().join("none"), 0, 2)),
        "rank 0 cannot join the others in DIR: No such file or directory (os error 2)"
    );
}

#[test]
fn a_folder_is_for_one_launch() {
    let folder = folder();
    let _other = UnixListener::bind(folder.path().join("rank-0.sock")).unwrap();
    assert_eq!(
        refusal(settings(folder.path(), 0, 2)),
        "rank 0 cannot join the others in DIR: DIR/rank-0.sock is there already; each launch needs a new folder"
    );
}

#[test]
fn who_does_not_come_is_named() {
    let folder = folder();
    let short = |rank| Join { deadline: Duration::from_millis(100), ..settings(folder.path(), rank, 3) };
    let expected = "rank 0 cannot join the others in DIR: rank 1 did not come within 0.1 s";
    assert_eq!(refusal(short(0)), expected);
    let expected = "rank 2 cannot join the others in DIR: rank 0 did not come within 0.1 s";
    assert_eq!(refusal(short(2)), expected);
    // One that listens and says nothing.
    let _silent = UnixListener::bind(folder.path().join("rank-0.sock")).unwrap();
    let expected = "rank 2 cannot join the others in DIR: rank 0 did not answer within 0.1 s";
    assert_eq!(refusal(short(2)), expected);
}

#[test]
fn who_does_not_belong_is_told_why() {
    // Session, world size and rank of the second; what it says and what the first one does.
    let cases = [
        (78, 2, 1, "it is of another session", "it is of another session"),
        (77, 3, 1, "its world size is 2, expected 3", "its world size is 3, expected 2"),
        (77, 9, 8, "its world size is 2, expected 9", "its world size is 9, expected 2"),
    ];
    for (session, world_size, rank, told, noted) in cases {
        let folder = folder();
        let first = Join { deadline: Duration::from_millis(300), ..settings(folder.path(), 0, 2) };
        let deadline = Duration::from_secs(5);
        let second = Join { session, deadline, ..settings(folder.path(), rank, world_size) };
        let [first, second] = std::thread::scope(|scope| {
            [first, second].map(|it| scope.spawn(|| refusal(it))).map(|thread| thread.join().unwrap())
        });
        let expected = format!(
            "rank 0 cannot join the others in DIR: rank 1 did not come within 0.3 s; a connection was sent away: {noted}"
        );
        assert_eq!(first, expected);
        assert_eq!(second, format!("rank {rank} cannot join the others in DIR: rank 0: {told}"));
    }
}

/// Connects to rank 0 as rank 1 would, once it listens.
fn connect(dir: &Path) -> UnixStream {
    let until = Instant::now() + Duration::from_secs(20);
    loop {
        match UnixStream::connect(dir.join("rank-0.sock")) {
            Ok(stream) => return stream,
            Err(why) => assert!(Instant::now() < until, "{why}"),
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn hello(shared_bytes: u64) -> Vec<u8> {
    let words = [MAGIC, 1, 2, 1, 0, 0].into_iter().flat_map(u32::to_le_bytes);
    words.chain(77u64.to_le_bytes()).chain(shared_bytes.to_le_bytes()).collect()
}

/// Rank 0, joined by a stranger that greets as rank 1 and then writes these bytes; and the stranger's end.
fn joined_by_stranger(bytes: &[u8]) -> (Process, UnixStream) {
    let folder = folder();
    std::thread::scope(|scope| {
        let rank = scope.spawn(|| join(settings(folder.path(), 0, 2)).unwrap());
        // Nonsense and silence before are no harm.
        drop(connect(folder.path()));
        connect(folder.path()).write_all(&[b'x'; 40]).unwrap();
        let mut stranger = connect(folder.path());
        let (arena, file) = Arena::shared("stranger", Bytes(2 << 20)).unwrap();
        socket::send_with_file(&stranger, &hello(arena.capacity().0), &file).unwrap();
        stranger.write_all(bytes).unwrap();
        (rank.join().unwrap(), stranger)
    })
}

#[test]
fn a_malformed_frame_ends_its_sender() {
    let link = Link { from: Rank(1), to: Rank(0), shared_bytes: 2 << 20 };
    let good = frame::message(link, TAG, &[1, 2], &[]);
    let other = Tag { layer: 1, ..TAG };
    let spoiled = [good.clone(), b"GET / HTTP/1.1\r\n".repeat(4)].concat();
    let (rank, mut stranger) = joined_by_stranger(&spoiled);
    assert_eq!(rank.receive(Rank(1), TAG).unwrap().header, [1, 2]);
    let expected = "rank 1 has ended (a frame's magic is 0x20544547, expected 0x58454f4d); rank 0 waited for hidden \
                    states of layer 1, micro-batch 0, step 0";
    assert_eq!(rank.receive(Rank(1), other).err().unwrap().to_string(), expected);
    // Nobody reads there any more, and the stranger sees it.
    assert!(stranger.write_all(&[0; 100]).is_err());
    assert!(rank.send(Rank(1), TAG, Message { header: Vec::new(), tensors: Vec::new() }).is_err());

    let (rank, stranger) = joined_by_stranger(&good[..good.len() - 1]);
    drop(stranger);
    let expected = "rank 1 has ended (connection closed in the middle of a message); rank 0 waited for hidden states of \
                    layer 0, micro-batch 0, step 0";
    assert_eq!(rank.receive(Rank(1), TAG).err().unwrap().to_string(), expected);
}

#[test]
fn memory_that_is_not_what_it_is_said_to_be_is_refused() {
    let plain = tempfile::tempfile().unwrap();
    plain.set_len(2 << 20).unwrap();
    let (_arena, sealed) = Arena::shared("stranger", Bytes(2 << 20)).unwrap();
    let cases = [
        (&plain, 2 << 20, "shared memory of another process: it is not sealed against being cut short"),
        (&sealed, 4 << 20, "shared memory of another process: it has 2097152 bytes, expected 4194304"),
    ];
    for (file, bytes, why) in cases {
        let folder = folder();
        let settings = Join { deadline: Duration::from_millis(300), ..settings(folder.path(), 0, 2) };
        let refused = std::thread::scope(|scope| {
            let rank = scope.spawn(|| refusal(settings));
            let stranger = connect(folder.path());
            socket::send_with_file(&stranger, &hello(bytes), file).unwrap();
            rank.join().unwrap()
        });
        let expected = format!(
            "rank 0 cannot join the others in DIR: rank 1 did not come within 0.3 s; a connection was sent away: rank 1: \
             {why}"
        );
        assert_eq!(refused, expected);
    }
}

#[test]
fn a_greeting_without_memory_is_refused() {
    let folder = folder();
    let settings = Join { deadline: Duration::from_millis(300), ..settings(folder.path(), 0, 2) };
    let refused = std::thread::scope(|scope| {
        let rank = scope.spawn(|| refusal(settings));
        let mut stranger = connect(folder.path());
        stranger.write_all(&hello(2 << 20)).unwrap();
        rank.join().unwrap()
    });
    assert!(refused.ends_with("a connection was sent away: rank 1 gave no file of its shared memory"), "{refused}");
}
