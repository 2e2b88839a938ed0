//! What holds for every transport.

use std::time::{Duration, Instant};

use moesaic_comm::collective::{AllReduceArgs, GatherArgs, all_gather_rows, all_reduce, gather_to_first};
use moesaic_comm::{CommError, Message};
use moesaic_device::{Arena, Ctx, Tensor};
use moesaic_plan::{AllReduce, MessageKind, Rank, Tag};
use moesaic_spec::{Bytes, DType};

use crate::{LONG, Transport, assert_is, on_all, sentence, tag, tensor, words};

/// Each of these for each transport.
macro_rules! suite {
    ($($test:ident)*) => {
        mod in_process {
            $(#[test] fn $test() { super::$test(crate::Transport::InProcess); })*
        }
        mod process {
            $(#[test] fn $test() { super::$test(crate::Transport::Process); })*
        }
    };
}

suite! {
    messages_are_found_by_tag_and_not_by_arrival
    many_messages_are_in_flight
    messages_of_any_size_arrive_whole
    tensors_of_another_arena_arrive
    sixteen_ranks_send_to_all
    both_sides_send_much_at_once
    sums_and_gathers_are_those_of_a_plain_loop
    memory_of_messages_comes_back
    nothing_comes_in_time
    one_of_many_is_missing
    a_rank_that_aborts_says_why
    a_rank_that_is_dropped_ends_all_waits
    a_rank_that_panics_ends_all_waits
    what_was_sent_before_the_end_is_received
    nothing_is_sent_to_a_rank_that_ended
    a_message_that_comes_twice_is_refused
    a_message_may_be_looked_for
    a_rank_may_send_to_itself
    a_rank_alone_needs_nobody
    a_waiting_rank_uses_no_processor
    a_full_exchange_is_an_error_that_says_so
}

fn messages_are_found_by_tag_and_not_by_arrival(transport: Transport) {
    on_all(transport.world(2, LONG), |comm| {
        if comm.rank() == Rank(0) {
            // All fields of a tag count.
            for (i, tag) in tags().into_iter().enumerate() {
                comm.send(Rank(1), tag, words(&[i as u32])).unwrap();
            }
        } else {
            for (i, tag) in tags().into_iter().enumerate().rev() {
                assert_eq!(comm.receive(Rank(0), tag).unwrap().header, [i as u32]);
            }
        }
    });
    fn tags() -> [Tag; 6] {
        let first = tag(3);
        [
            first,
            Tag { step: 10, ..first },
            Tag { layer: 4, ..first },
            Tag { micro_batch: 1, ..first },
            Tag { kind: MessageKind::Answer, ..first },
            Tag { round: 1, ..first },
        ]
    }
}

fn many_messages_are_in_flight(transport: Transport) {
    const N: u32 = 2000;
    on_all(transport.world(2, LONG), |comm| {
        let peer = Rank(1 - comm.rank().0);
        for i in 0..N {
            let message = Message { header: vec![i], tensors: vec![tensor(comm.exchange(), &[i as usize % 50], 5)] };
            comm.send(peer, tag(i), message).unwrap();
        }
        for i in (0..N).rev() {
            let message = comm.receive(peer, tag(i)).unwrap();
            assert_eq!(message.header, [i]);
            assert_is(&message.tensors[0], &[i as usize % 50], 5);
        }
    });
}

/// On both sides of every limit: in the frame, in shared memory, of no bytes at all, of no tensors, with 8 MiB.
fn messages_of_any_size_arrive_whole(transport: Transport) {
    let shapes: [&[&[usize]]; 8] = [
        &[],
        &[&[0]],
        &[&[0, 7], &[1]],
        &[&[], &[2, 3, 4, 5, 6, 7]],
        &[&[2 << 10]],
        &[&[2 << 10], &[1], &[0]],
        &[&[100, 1001], &[3]],
        &[&[8 << 20]],
    ];
    on_all(transport.world(2, LONG), |comm| {
        for (i, shapes) in shapes.iter().enumerate() {
            if comm.rank() == Rank(0) {
                let tensors = shapes.iter().enumerate().map(|(j, dims)| tensor(comm.exchange(), dims, i * 8 + j));
                let header = (0..[0, 1, 100_000][i % 3]).collect();
                comm.send(Rank(1), tag(i as u32), Message { header, tensors: tensors.collect() }).unwrap();
            } else {
                let message = comm.receive(Rank(0), tag(i as u32)).unwrap();
                assert!(message.header.iter().copied().eq(0..[0, 1, 100_000][i % 3]));
                assert_eq!(message.tensors.len(), shapes.len());
                for (j, (tensor, dims)) in message.tensors.iter().zip(*shapes).enumerate() {
                    assert_is(tensor, dims, i * 8 + j);
                }
            }
        }
    });
}

/// Also more of them than the exchange arena of 64 MiB has room for, all of 30 MiB in the frames then.
fn tensors_of_another_arena_arrive(transport: Transport) {
    on_all(transport.world(2, LONG), |comm| {
        let other = Arena::host("other", Bytes(64 << 20)).unwrap();
        if comm.rank() == Rank(0) {
            let full = tensor(comm.exchange(), &[62 << 20], 0);
            for i in 0..5 {
                let tensors = vec![tensor(&other, &[(1 << 20) + i], i)];
                comm.send(Rank(1), tag(i as u32), Message { header: Vec::new(), tensors }).unwrap();
            }
            drop(full);
            comm.receive(Rank(1), tag(99)).unwrap();
        } else {
            for i in 0..5 {
                let message = comm.receive(Rank(0), tag(i as u32)).unwrap();
                assert_is(&message.tensors[0], &[(1 << 20) + i], i);
            }
            comm.send(Rank(0), tag(99), words(&[])).unwrap();
        }
    });
}

fn sixteen_ranks_send_to_all(transport: Transport) {
    const N: u32 = 16;
    on_all(transport.world(N as usize, LONG), |comm| {
        let own = comm.rank().0;
        let others: Vec<Rank> = (0..N).filter(|&rank| rank != own).map(Rank).collect();
        for round in 0..5 {
            // Sizes on both sides of what travels in the frame.
            let dims = |from: u32, to: u32| [(from * 16 + to) as usize * 97 + 1];
            for &to in &others {
                let tensors = vec![tensor(comm.exchange(), &dims(own, to.0), (own * 16 + to.0) as usize)];
                comm.send(to, tag(round), Message { header: vec![own, round], tensors }).unwrap();
            }
            let messages = comm.receive_all(&others, tag(round)).unwrap();
            for (from, message) in others.iter().zip(messages) {
                assert_eq!(message.header, [from.0, round]);
                assert_is(&message.tensors[0], &dims(from.0, own), (from.0 * 16 + own) as usize);
            }
        }
    });
}

/// Far more than a socket holds, in frames and beside them, before anybody receives.
fn both_sides_send_much_at_once(transport: Transport) {
    on_all(transport.world(2, LONG), |comm| {
        let peer = Rank(1 - comm.rank().0);
        for i in 0..1000u32 {
            let len = if i % 10 == 0 { 50_000 } else { 2_000 };
            let tensors = vec![tensor(comm.exchange(), &[len], i as usize)];
            comm.send(peer, tag(i), Message { header: Vec::new(), tensors }).unwrap();
        }
        for i in 0..1000u32 {
            let len = if i % 10 == 0 { 50_000 } else { 2_000 };
            assert_is(&comm.receive(peer, tag(i)).unwrap().tensors[0], &[len], i as usize);
        }
    });
}

fn sums_and_gathers_are_those_of_a_plain_loop(transport: Transport) {
    for n in [1usize, 2, 5, 16] {
        let group: Vec<Rank> = (0..n as u32).map(Rank).collect();
        let node_of: Vec<usize> = (0..n).map(|rank| rank / 4).collect();
        let sizes: Vec<usize> = (0..n).map(|rank| rank % 3).collect();
        on_all(transport.world(n, LONG), |comm| {
            let ctx = Ctx::cpu(1, 8 << 20).unwrap();
            let own = comm.rank().idx();
            for (round, algorithm) in [(0, AllReduce::Flat), (8, AllReduce::Hierarchical)] {
                for (layer, len) in [(0, 100), (1, 30_000)] {
                    let args =
                        AllReduceArgs { tag: Tag { round, ..tag(layer) }, group: &group, node_of: &node_of, algorithm };
                    let mut x = ctx.empty(&[len], DType::F32).unwrap();
                    // Whole numbers, so that any order of the sum is exact.
                    x.f32_mut().iter_mut().enumerate().for_each(|(i, x)| *x = (i % 1000 * (own + 1)) as f32);
                    all_reduce(&ctx, comm, args, &mut x).unwrap();
                    let factor = n * (n + 1) / 2;
                    assert!(x.f32().iter().enumerate().all(|(i, &x)| x == (i % 1000 * factor) as f32));
                }
            }
            let args = |layer| GatherArgs { tag: tag(layer), group: &group, sizes: &sizes };
            let all = all_gather_rows(&ctx, comm, args(2), &tensor(ctx.arena(), &[sizes[own], 7], own)).unwrap();
            let expected = (0..n).flat_map(|rank| crate::pattern(rank, sizes[rank] * 7));
            assert!(all.bytes().iter().copied().eq(expected));
            let columns = gather_to_first(&ctx, comm, args(3), &tensor(ctx.arena(), &[2, sizes[own]], own)).unwrap();
            assert_eq!(columns.is_some(), own == 0);
            if let Some(columns) = columns {
                let of = |row: usize, rank: usize| crate::pattern(rank, 2 * sizes[rank]).skip(row * sizes[rank]);
                let row = |row| (0..n).flat_map(move |rank| of(row, rank).take(rank % 3));
                assert!(columns.bytes().iter().copied().eq((0..2).flat_map(row)));
            }
        });
    }
}

/// Twenty times the arena passes through it.
fn memory_of_messages_comes_back(transport: Transport) {
    on_all(transport.world(2, LONG), |comm| {
        let peer = Rank(1 - comm.rank().0);
        let before = comm.exchange().in_use();
        // Nobody begins before the other has looked at its own arena.
        comm.send(peer, tag(999), words(&[])).unwrap();
        comm.receive(peer, tag(999)).unwrap();
        for i in 0..160u32 {
            let mut x = Tensor::empty(comm.exchange(), &[2 << 20], DType::I32).unwrap();
            x.i32_mut()[1 << 20] = i as i32;
            comm.send(peer, tag(i), Message { header: Vec::new(), tensors: vec![x] }).unwrap();
            let message = comm.receive(peer, tag(i)).unwrap();
            assert_eq!(message.tensors[0].i32()[1 << 20], i as i32);
            // Nobody is ahead by more than one message.
            drop(message);
            comm.send(peer, Tag { round: 1, ..tag(i) }, words(&[])).unwrap();
            comm.receive(peer, Tag { round: 1, ..tag(i) }).unwrap();
        }
        assert_eq!(comm.exchange().in_use(), before);
        // Nobody goes while the other looks at its own arena.
        comm.send(peer, tag(1000), words(&[])).unwrap();
        comm.receive(peer, tag(1000)).unwrap();
    });
}

fn nothing_comes_in_time(transport: Transport) {
    let ends = transport.world(2, Duration::from_millis(200));
    let start = Instant::now();
    let error = sentence(LONG, || ends[0].receive(Rank(1), Tag { kind: MessageKind::Answer, ..tag(7) }));
    assert!(start.elapsed() >= Duration::from_millis(200));
    assert_eq!(error, "rank 0 waited 0.2 s for rank 1: answers of layer 7, micro-batch 0, step 9");
}

fn one_of_many_is_missing(transport: Transport) {
    let ends = transport.world(4, Duration::from_millis(300));
    for from in [1, 3] {
        ends[from].send(Rank(0), tag(1), words(&[])).unwrap();
    }
    let error = sentence(LONG, || ends[0].receive_all(&[Rank(3), Rank(2), Rank(1)], tag(1)));
    assert_eq!(error, "rank 0 waited 0.3 s for rank 2: dispatch of layer 1, micro-batch 0, step 9");
}

fn a_rank_that_aborts_says_why(transport: Transport) {
    on_all(transport.world(3, LONG), |comm| {
        if comm.rank() == Rank(2) {
            std::thread::sleep(Duration::from_millis(50));
            comm.abort("its weights are no numbers");
            return;
        }
        let error = sentence(LONG / 2, || comm.receive(Rank(2), tag(5)));
        let (own, why) = (comm.rank(), "its weights are no numbers");
        let expected =
            format!("rank 2 has ended ({why}); rank {own} waited for dispatch of layer 5, micro-batch 0, step 9");
        assert_eq!(error, expected);
        // The same for who asks later, and for who only looks.
        assert_eq!(sentence(LONG / 2, || comm.receive(Rank(2), tag(5))), expected);
        assert_eq!(sentence(LONG / 2, || comm.try_receive(Rank(2), tag(5))), expected);
    });
}

fn a_rank_that_is_dropped_ends_all_waits(transport: Transport) {
    on_all(transport.world(3, LONG), |comm| {
        if comm.rank() == Rank(1) {
            std::thread::sleep(Duration::from_millis(50));
            return;
        }
        let other = Rank(2 - comm.rank().0);
        comm.send(other, tag(5), words(&[])).unwrap();
        let error = sentence(LONG / 2, || comm.receive_all(&[other, Rank(1)], tag(5)));
        let expected = format!(
            "rank 1 has ended (connection closed); rank {} waited for dispatch of layer 5, micro-batch 0, step 9",
            comm.rank()
        );
        assert_eq!(error, expected);
        // Those who are left go on.
        comm.send(other, tag(6), words(&[6])).unwrap();
        assert_eq!(comm.receive(other, tag(6)).unwrap().header, [6]);
    });
}

fn a_rank_that_panics_ends_all_waits(transport: Transport) {
    let mut ends = transport.world(2, LONG);
    let end = ends.pop().unwrap();
    let thread = std::thread::spawn(move || {
        let _end = end;
        // Not `panic!`, whose message would look like a failure of the test.
        std::panic::resume_unwind(Box::new("on purpose"));
    });
    let error = sentence(LONG / 2, || ends[0].receive(Rank(1), tag(0)));
    let expected =
        "rank 1 has ended (its thread panicked); rank 0 waited for dispatch of layer 0, micro-batch 0, step 9";
    assert_eq!(error, expected);
    thread.join().unwrap_err();
}

fn what_was_sent_before_the_end_is_received(transport: Transport) {
    let mut ends = transport.world(2, LONG);
    let end = ends.pop().unwrap();
    for i in 0..20 {
        let tensors = vec![tensor(end.exchange(), &[i * 10_000], i)];
        end.send(Rank(0), tag(i as u32), Message { header: Vec::new(), tensors }).unwrap();
    }
    drop(end);
    for i in 0..20 {
        assert_is(&ends[0].receive(Rank(1), tag(i as u32)).unwrap().tensors[0], &[i * 10_000], i);
    }
    let error = sentence(LONG / 2, || ends[0].receive(Rank(1), tag(20)));
    assert!(error.starts_with("rank 1 has ended (connection closed);"), "{error}");
}

fn nothing_is_sent_to_a_rank_that_ended(transport: Transport) {
    let mut ends = transport.world(2, LONG);
    ends.pop().unwrap().abort("that was enough");
    // The end is known at the latest when a wait ends by it.
    sentence(LONG / 2, || ends[0].receive(Rank(1), tag(0)));
    let error = sentence(LONG / 2, || ends[0].send(Rank(1), tag(4), words(&[])));
    let expected = "rank 0 cannot send dispatch of layer 4, micro-batch 0, step 9 to rank 1: it has ended (that was \
                    enough)";
    assert_eq!(error, expected);
}

fn a_message_that_comes_twice_is_refused(transport: Transport) {
    let ends = transport.world(2, LONG);
    ends[1].send(Rank(0), tag(4), words(&[1])).unwrap();
    ends[1].send(Rank(0), tag(4), words(&[2])).unwrap();
    ends[1].send(Rank(0), tag(5), words(&[])).unwrap();
    // Messages of one sender arrive in their order.
    ends[0].receive(Rank(1), tag(5)).unwrap();
    let error = sentence(LONG / 2, || ends[0].receive(Rank(1), tag(4)));
    let expected = "rank 0: dispatch of layer 4, micro-batch 0, step 9 from rank 1 has 2 copies, expected 1";
    assert_eq!(error, expected);
}

fn a_message_may_be_looked_for(transport: Transport) {
    let ends = transport.world(2, LONG);
    assert!(ends[0].try_receive(Rank(1), tag(4)).unwrap().is_none());
    ends[1].send(Rank(0), tag(4), words(&[8])).unwrap();
    ends[1].send(Rank(0), tag(5), words(&[])).unwrap();
    ends[0].receive(Rank(1), tag(5)).unwrap();
    assert_eq!(ends[0].try_receive(Rank(1), tag(4)).unwrap().unwrap().header, [8]);
    assert!(ends[0].try_receive(Rank(1), tag(4)).unwrap().is_none());
}

fn a_rank_may_send_to_itself(transport: Transport) {
    let ends = transport.world(2, LONG);
    let tensors = vec![tensor(ends[1].exchange(), &[70_000], 3)];
    ends[1].send(Rank(1), tag(0), Message { header: vec![1], tensors }).unwrap();
    assert_is(&ends[1].receive(Rank(1), tag(0)).unwrap().tensors[0], &[70_000], 3);
}

fn a_rank_alone_needs_nobody(transport: Transport) {
    let ends = transport.world(1, LONG);
    assert_eq!((ends[0].rank(), ends[0].world_size()), (Rank(0), 1));
    assert!(ends[0].receive_all(&[], tag(0)).unwrap().is_empty());
}

fn a_waiting_rank_uses_no_processor(transport: Transport) {
    let ends = transport.world(2, Duration::from_millis(200));
    let before = thread_cpu_time();
    sentence(LONG, || ends[0].receive(Rank(1), tag(0)));
    let used = thread_cpu_time() - before;
    assert!(used < Duration::from_millis(20), "{used:?}");

    /// Of the calling thread, as the kernel counts it.
    fn thread_cpu_time() -> Duration {
        let counts = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
        Duration::from_nanos(counts.split(' ').next().unwrap().parse().unwrap())
    }
}

/// The sender's without a transport, the receiver's where it copies.
fn a_full_exchange_is_an_error_that_says_so(transport: Transport) {
    let ends = transport.world(2, LONG);
    let error = Tensor::empty(ends[0].exchange(), &[65 << 20], DType::U8).err().unwrap().to_string();
    assert!(error.starts_with("the exchange arena of 64.00 MiB cannot hold 65.00 MiB more"), "{error}");
    if transport == Transport::Process {
        let full = tensor(ends[1].exchange(), &[60 << 20], 0);
        let tensors = vec![tensor(ends[0].exchange(), &[5 << 20], 0)];
        ends[0].send(Rank(1), tag(0), Message { header: Vec::new(), tensors }).unwrap();
        ends[0].send(Rank(1), tag(1), words(&[1])).unwrap();
        let error = ends[1].receive(Rank(0), tag(0)).err().unwrap();
        assert!(matches!(error, CommError::Device(_)), "{error}");
        drop(full);
        assert_eq!(ends[1].receive(Rank(0), tag(1)).unwrap().header, [1], "what follows is understood");
    }
}
