//! Kernels that are wrong, one for each thing that the executor claims to find; and beside each the right version,
//! which must pass.
#![allow(missing_docs, clippy::unwrap_used, reason = "a test")]

use cuda_std::cpu::{Action, Buffer, Executor, Fault, FaultKind, Space};
use cuda_std::launch::{Grid, Launch};
use cuda_std::prelude::*;
use cuda_std::{cp_async, shared};

const SEEDS: std::ops::Range<u64> = 0..20;

fn fault(executor: &Executor, launch: &Launch<'_>, grid: Grid) -> Fault {
    let fault = executor.run(launch, grid).expect_err("a fault was planted");
    assert_eq!(fault.kernel, launch.kernel().name);
    assert!(fault.to_string().contains(fault.kernel));
    fault
}

/// Every seed finds a fault that `expected` accepts.
fn every_seed_finds(run: impl Fn(&Executor) -> Fault, expected: impl Fn(&FaultKind) -> bool) {
    for seed in SEEDS {
        let fault = run(&Executor::checked(seed));
        assert!(expected(&fault.kind), "seed {seed}: {fault}");
    }
}

/// Fast mode finds it too, on one thread and on two, and works afterwards.
fn fast_mode_finds(run: impl Fn(&Executor) -> Fault, expected: impl Fn(&FaultKind) -> bool) {
    for threads in [1, 2] {
        let executor = Executor::new(threads);
        for _ in 0..3 {
            let fault = run(&executor);
            assert!(expected(&fault.kind), "{threads} threads: {fault}");
            let (x, mut out) = (Buffer::new(&[1.0f32; 128]), Buffer::uninitialised(2));
            executor.run(&reverse_in_shared::launch(&x, &mut out, 2), Grid::new_1d(2)).unwrap();
            assert_eq!(out.as_slice(), [64.0; 2]);
        }
    }
}

fn passes(launch: impl Fn(&Executor) -> Result<(), Fault>) {
    launch(&Executor::new(2)).unwrap();
    for seed in SEEDS {
        launch(&Executor::checked(seed)).unwrap_or_else(|fault| panic!("seed {seed}: {fault}"));
    }
}

/// Writes and reads swapped places of shared memory; `barriers` says how many of the two barriers to keep.
#[kernel(block = 64)]
fn reverse_in_shared(x: In<f32>, out: Out<f32>, barriers: u32) {
    let tile = shared_array!(f32, 64);
    let thread = thread::thread_idx_x() as usize;
    let block = thread::block_idx_x() as usize;
    tile.set(thread, x.get(block * 64 + thread));
    if barriers > 0 {
        thread::sync_threads();
    }
    let other = tile.get(63 - thread);
    if barriers > 1 {
        thread::sync_threads();
    }
    tile.set(thread, other);
    thread::sync_threads();
    if thread == 0 {
        let mut sum = 0.0;
        let mut i = 0;
        while i < 64 {
            sum += tile.get(i);
            i += 1;
        }
        out.set(block, sum);
    }
}

fn run_reverse(executor: &Executor, barriers: u32) -> Result<(), Fault> {
    let (x, mut out) = (Buffer::new(&[1.0f32; 128]), Buffer::uninitialised(2));
    executor.run(&reverse_in_shared::launch(&x, &mut out, barriers), Grid::new_1d(2))
}

#[test]
fn a_missing_barrier_is_a_race_on_shared_memory() {
    // The kernel comes before this test, so the first line that holds the text is the kernel's.
    let line = |text: &str| 1 + include_str!("faults.rs").lines().position(|line| line.contains(text)).unwrap() as u32;
    let (write, read, write_back) =
        (line("tile.set(thread, x"), line("let other = tile.get"), line("tile.set(thread, other"));
    assert!(write < read && read < write_back);

    // Without the first barrier a thread reads before (nothing there) or after (a race) the other's write.
    every_seed_finds(
        |executor| run_reverse(executor, 0).unwrap_err(),
        |kind| match kind {
            FaultKind::Race { space: Space::Shared, first, second, .. } => {
                let lines = [first.location.line(), second.location.line()];
                first.thread != second.thread
                    && first.block == second.block
                    && lines.iter().all(|line| [write, read, write_back].contains(line))
                    && [first, second].iter().any(|site| site.action == Action::Write)
            }
            FaultKind::Uninitialised { space: Space::Shared, at, .. } => at.line() == read,
            _ => false,
        },
    );
    // Without the second, the write back races with the read, whatever comes first, and both lines are named.
    every_seed_finds(
        |executor| run_reverse(executor, 1).unwrap_err(),
        |kind| match kind {
            FaultKind::Race { space: Space::Shared, first, second, .. } => {
                let mut lines = [first.location.line(), second.location.line()];
                lines.sort_unstable();
                lines == [read, write_back] && first.thread + second.thread == 63
            }
            _ => false,
        },
    );
    passes(|executor| run_reverse(executor, 2));
}

/// Each lane hands its value to its neighbour through memory; `synced` says whether the warp meets in between.
#[kernel(block = 32)]
fn neighbour(out: Out<u32>, synced: u32) {
    let tile = shared_array!(u32, 32);
    let lane = thread::lane_id();
    tile.set(lane as usize, lane);
    if synced == 1 {
        warp::sync_warp();
    } else {
        // A shuffle makes lanes meet, but orders no memory.
        let _ = warp::shuffle_xor_u32(lane, 1);
    }
    out.set(lane as usize, tile.get((lane as usize + 1) % 32));
}

#[test]
fn a_warp_barrier_orders_memory_and_a_shuffle_does_not() {
    let run = |executor: &Executor, synced| {
        let mut out = Buffer::uninitialised(32);
        executor.run(&neighbour::launch(&mut out, synced), Grid::new_1d(1))
    };
    every_seed_finds(|e| run(e, 0).unwrap_err(), |kind| matches!(kind, FaultKind::Race { space: Space::Shared, .. }));
    passes(|executor| run(executor, 1));
}

/// A warp barrier does not order two warps.
#[kernel(block = 64)]
fn other_warp(out: Out<u32>, whole_block: u32) {
    let tile = shared_array!(u32, 64);
    let thread = thread::thread_idx_x() as usize;
    tile.set(thread, 1);
    if whole_block == 1 {
        thread::sync_threads();
    } else {
        warp::sync_warp();
    }
    if thread < 32 {
        tile.set(thread + 32, 2);
    }
    thread::sync_threads();
    out.set(thread, tile.get(thread));
}

#[test]
fn a_warp_barrier_is_not_a_block_barrier() {
    let run = |executor: &Executor, whole_block| {
        let mut out = Buffer::uninitialised(64);
        executor.run(&other_warp::launch(&mut out, whole_block), Grid::new_1d(1))
    };
    every_seed_finds(
        |e| run(e, 0).unwrap_err(),
        |kind| {
            matches!(kind, FaultKind::Race { space: Space::Shared, first, second, .. }
            if first.action == Action::Write && second.action == Action::Write)
        },
    );
    passes(|executor| run(executor, 1));
}

/// Neighbouring halves of a word belong to different threads: no race.
#[kernel(block = 64)]
fn halves(out: Out<bf16>, bytes: Out<u8>) {
    let tile = shared_array!(bf16, 64);
    let thread = thread::thread_idx_x() as usize;
    tile.set(thread, f32_to_bf16(thread as f32));
    out.set(thread, tile.get(thread));
    bytes.set(thread, thread as u8);
}

#[test]
fn neighbours_in_a_word_do_not_race() {
    passes(|executor| {
        let (mut out, mut bytes) = (Buffer::uninitialised(64), Buffer::uninitialised(64));
        executor.run(&halves::launch(&mut out, &mut bytes), Grid::new_1d(1))
    });
}

/// A block writes its part; with an overlap of one element it also writes the next block's first.
#[kernel(block = 32)]
fn parts(out: Out<f32>, overlap: u32) {
    let thread = thread::thread_idx_x();
    let block = thread::block_idx_x();
    out.set((block * 32 + thread) as usize, 1.0);
    if thread == 31 && overlap == 1 && block + 1 < thread::grid_dim_x() {
        out.set((block * 32 + 32) as usize, 1.0);
    }
}

#[test]
fn blocks_that_write_the_same_element_race() {
    let run = |executor: &Executor, overlap| {
        let mut out = Buffer::uninitialised(128);
        executor.run(&parts::launch(&mut out, overlap), Grid::new_1d(4))
    };
    every_seed_finds(
        |e| run(e, 1).unwrap_err(),
        |kind| match kind {
            FaultKind::Race { space: Space::Global, first, second, offset } => {
                first.block != second.block && offset % 128 == 0 && first.location.line() != second.location.line()
            }
            _ => false,
        },
    );
    passes(|executor| run(executor, 0));
}

/// Blocks read what another block writes, or its own.
#[kernel(block = 32)]
fn chase(data: InOut<f32>, out: Out<f32>, distance: u32) {
    let index = thread::index_1d() as usize;
    let own = data.get(index);
    data.set(index, own + 1.0);
    out.set(index, data.get((index + distance as usize * 32) % data.len()));
}

#[test]
fn reading_what_another_block_writes_is_a_race() {
    let run = |executor: &Executor, distance| {
        let (mut data, mut out) = (Buffer::new(&[0.0f32; 128]), Buffer::uninitialised(128));
        executor.run(&chase::launch(&mut data, &mut out, distance), Grid::new_1d(4))
    };
    every_seed_finds(
        |e| run(e, 1).unwrap_err(),
        |kind| matches!(kind, FaultKind::Race { space: Space::Global, first, second, .. } if first.block != second.block),
    );
    passes(|executor| run(executor, 0));
}

/// Counts with atomics; one thread may peek while the others still count.
#[kernel(block = 64)]
fn peek(counter: InOut<u32>, out: Out<u32>, early: u32) {
    counter.atomic_add(0, 1);
    if early == 0 {
        thread::sync_threads();
    }
    if thread::thread_idx_x() == 17 {
        out.set(0, counter.get(0));
    }
}

#[test]
fn plain_reads_race_with_atomics() {
    let run = |executor: &Executor, early| {
        let (mut counter, mut out) = (Buffer::new(&[0u32]), Buffer::uninitialised(1));
        executor.run(&peek::launch(&mut counter, &mut out, early), Grid::new_1d(1))
    };
    every_seed_finds(
        |e| run(e, 1).unwrap_err(),
        |kind| match kind {
            FaultKind::Race { space: Space::Global, first, second, .. } => {
                [first.action, second.action].contains(&Action::Atomic)
                    && [first.action, second.action].contains(&Action::Read)
            }
            _ => false,
        },
    );
    passes(|executor| run(executor, 0));
}

/// Barriers on two ways, or none for some threads.
#[kernel(block = 64)]
fn forked(way: u32) {
    let thread = thread::thread_idx_x();
    if way == 1 && thread >= 32 {
        thread::sync_threads();
    } else if way == 2 && thread == 5 {
        return;
    } else {
        thread::sync_threads();
    }
    thread::sync_threads();
}

#[test]
fn divergent_barriers_are_found() {
    let run = |executor: &Executor, way| executor.run(&forked::launch(way), Grid::new_1d(1));
    every_seed_finds(
        |e| run(e, 1).unwrap_err(),
        |kind| match kind {
            FaultKind::Divergence { waits, other_at: Some(other), .. } => {
                waits.location.line() != other.location.line()
            }
            _ => false,
        },
    );
    every_seed_finds(
        |e| run(e, 2).unwrap_err(),
        |kind| matches!(kind, FaultKind::Divergence { other: 5, other_at: None, .. }),
    );
    passes(|executor| run(executor, 0));
}

/// Half of a warp shuffles; the other half leaves, waits at a barrier, or takes part in another operation.
#[kernel(block = 64)]
fn half_warp(way: u32) {
    let low = thread::lane_id() < 16;
    let value = thread::lane_id();
    if way == 0 || low {
        let _ = warp::shuffle_xor_u32(value, 1);
    } else if way == 1 {
        return;
    } else if way == 2 {
        thread::sync_threads();
    } else {
        warp::sync_warp();
    }
    thread::sync_threads();
}

#[test]
fn shuffles_that_can_never_take_place_are_found() {
    let run = |executor: &Executor, way| executor.run(&half_warp::launch(way), Grid::new_1d(2));
    let gone = |kind: &FaultKind| {
        matches!(kind, FaultKind::Deadlock { waits, other_at: None, other, .. }
            if waits.action == Action::Exchange && other % 32 >= 16)
    };
    every_seed_finds(|e| run(e, 1).unwrap_err(), gone);
    fast_mode_finds(|e| run(e, 1).unwrap_err(), gone);
    let elsewhere = |kind: &FaultKind| {
        matches!(kind, FaultKind::Deadlock { waits, other_at: Some(other), .. }
            if waits.action == Action::Exchange && other.action == Action::SyncThreads)
    };
    every_seed_finds(|e| run(e, 2).unwrap_err(), elsewhere);
    fast_mode_finds(|e| run(e, 2).unwrap_err(), elsewhere);
    let mixed = |kind: &FaultKind| match kind {
        FaultKind::Divergence { waits, other_at: Some(other), .. } => waits.action != other.action,
        _ => false,
    };
    every_seed_finds(|e| run(e, 3).unwrap_err(), mixed);
    fast_mode_finds(|e| run(e, 3).unwrap_err(), mixed);
    passes(|executor| run(executor, 0));
}

/// Two shuffles on two lines that the halves of a warp take each.
#[kernel(block = 32)]
fn two_shuffles(out: Out<u32>) {
    let lane = thread::lane_id();
    let value = if lane < 16 { warp::shuffle_xor_u32(lane, 1) } else { warp::shuffle_xor_u32(lane, 2) };
    out.set(lane as usize, value);
}

#[test]
fn divergent_shuffles_are_found() {
    every_seed_finds(
        |executor| fault(executor, &two_shuffles::launch(&mut Buffer::uninitialised(32)), Grid::new_1d(1)),
        |kind| match kind {
            FaultKind::Divergence { waits, other_at: Some(other), .. } => {
                waits.location != other.location && waits.action == Action::Exchange
            }
            _ => false,
        },
    );
}

#[kernel(block = 32)]
fn reach(x: In<f32>, out: Out<f32>, offset: u32, place: u32) {
    let tile = shared_array!(f32, 32);
    let lane = thread::lane_id() as usize;
    let index = lane + offset as usize;
    match place {
        0 => out.set(lane, x.get(index)),
        1 => out.set(index, 1.0),
        2 => tile.set(index, 1.0),
        3 => {
            tile.set(lane, 1.0);
            warp::sync_warp();
            out.set(lane, tile.get(index));
        }
        _ => {
            let values: [f32; 4] = x.load(index * 4);
            out.set(lane, values[3]);
        }
    }
}

#[test]
fn accesses_outside_are_found() {
    let run = |executor: &Executor, offset, place| {
        let (x, mut out) = (Buffer::new(&[0.0f32; 32]), Buffer::uninitialised(32));
        executor.run(&reach::launch(&x, &mut out, offset, place), Grid::new_1d(1))
    };
    for place in 0..4 {
        let outside = |kind: &FaultKind| match kind {
            FaultKind::OutOfBounds { space, index, count: 1, length: 32, .. } => {
                (32..36).contains(index) && (*space == Space::Shared) == (place >= 2)
            }
            _ => false,
        };
        every_seed_finds(|e| run(e, 4, place).unwrap_err(), outside);
        fast_mode_finds(|e| run(e, 4, place).unwrap_err(), outside);
        passes(|executor| run(executor, 0, place));
    }
    let vector = |kind: &FaultKind| matches!(kind, FaultKind::OutOfBounds { count: 4, length: 32, .. });
    fast_mode_finds(|e| run(e, 0, 4).unwrap_err(), vector);
    every_seed_finds(|e| run(e, u32::MAX, 0).unwrap_err(), |kind| matches!(kind, FaultKind::OutOfBounds { .. }));
}

#[kernel(block = 32)]
fn copy_first(x: In<f32>, out: Out<f32>) {
    let index = thread::index_1d() as usize;
    if index < out.len() {
        out.set(index, x.get(index));
    }
}

#[test]
fn unwritten_global_memory_is_found_and_kernels_write_it() {
    let mut middle = Buffer::<f32>::uninitialised(64);
    let run = |executor: &Executor, x: &Buffer<f32>, out: &mut Buffer<f32>| {
        executor.run(&copy_first::launch(x, out), Grid::new_1d(2))
    };
    let mut out = Buffer::uninitialised(48);
    for seed in SEEDS {
        let fault = run(&Executor::checked(seed), &middle, &mut out).unwrap_err();
        assert!(matches!(*fault.kind, FaultKind::Uninitialised { space: Space::Global, .. }), "{fault}");
    }
    // One kernel writes the first 48 elements, another may read those and no more.
    let executor = Executor::checked(1);
    let x = Buffer::new(&[2.0; 48]);
    let mut first = Buffer::uninitialised(48);
    run(&executor, &x, &mut first).unwrap();
    assert!(first.shadow().is_initialised(0..192));
    middle.shadow().mark_initialised(0..192);
    run(&executor, &middle, &mut out).unwrap();
    let mut wide = Buffer::uninitialised(49);
    let fault = run(&executor, &middle, &mut wide).unwrap_err();
    assert!(matches!(*fault.kind, FaultKind::Uninitialised { offset: 192, .. }), "{fault}");
    middle.as_mut_slice().fill(1.0);
    run(&executor, &middle, &mut wide).unwrap();
    // A slice begins where it begins: its shadow is its parent's.
    let part = Buffer::<f32>::uninitialised(64);
    part.shadow().mark_initialised(64..128);
    let mut sixteen = Buffer::uninitialised(16);
    executor.run(&copy_first::launch(&part.slice(16..32), &mut sixteen), Grid::new_1d(1)).unwrap();
    let fault = executor.run(&copy_first::launch(&part.slice(17..33), &mut sixteen), Grid::new_1d(1)).unwrap_err();
    assert!(matches!(*fault.kind, FaultKind::Uninitialised { offset: 128, .. }), "{fault}");
}

#[kernel(block = 32)]
fn fresh_shared(out: Out<f32>, dynamic: u32) {
    let fixed = shared_array!(f32, 64);
    let lane = thread::lane_id() as usize;
    let tile: Shared<f32> = if dynamic == 1 { shared::dynamic(0, 64) } else { fixed };
    tile.set(lane, 1.0);
    out.set(lane, tile.get(lane + 1));
}

#[test]
fn unwritten_shared_memory_is_found_and_is_nan() {
    for dynamic in [0, 1] {
        let grid = Grid { blocks: [3, 1, 1], dynamic_shared_bytes: 256 };
        let run = |executor: &Executor, out: &mut Buffer<f32>| executor.run(&fresh_shared::launch(out, dynamic), grid);
        every_seed_finds(
            |executor| run(executor, &mut Buffer::uninitialised(32)).unwrap_err(),
            |kind| match kind {
                FaultKind::Uninitialised { space: Space::Shared, .. } => true,
                FaultKind::Race { space: Space::Shared, first, second, .. } => {
                    first.location.line() + 1 == second.location.line()
                        || second.location.line() + 1 == first.location.line()
                }
                _ => false,
            },
        );
        let mut out = Buffer::uninitialised(32);
        run(&Executor::new(1), &mut out).unwrap();
        assert!(out.as_slice()[31].is_nan());
    }
}

#[kernel(block = 32)]
fn vector_at(x: In<f32>, out: Out<f32>, offset: u32, place: u32) {
    let tile = shared_array!(f32, 256);
    let index = thread::lane_id() as usize * 4 + offset as usize;
    match place {
        0 => {
            let _: [f32; 4] = x.load(index);
        }
        1 => out.store(index, [0.0; 2]),
        2 => tile.store(index, [0.0; 4]),
        _ => cp_async::copy::<f32, 4>(&tile, index, &x, 0),
    }
}

#[test]
fn misaligned_vectors_are_found() {
    for place in 0..4 {
        let run = |executor: &Executor, offset| {
            let (x, mut out) = (Buffer::new(&[0.0f32; 256]), Buffer::uninitialised(256));
            executor.run(&vector_at::launch(&x, &mut out, offset, place), Grid::new_1d(1))
        };
        let bytes = if place == 1 { 8 } else { 16 };
        let misaligned = |kind: &FaultKind| match kind {
            FaultKind::Misaligned { address, bytes: size, at } => {
                address % bytes != 0 && *size == bytes && at.file().ends_with("faults.rs")
            }
            _ => false,
        };
        every_seed_finds(|e| run(e, 1).unwrap_err(), misaligned);
        fast_mode_finds(|e| run(e, 3).unwrap_err(), misaligned);
        passes(|executor| run(executor, 4));
    }
}

/// Copies asynchronously and reads; `steps` has a bit for the wait and one for the barrier.
#[kernel(block = 64)]
fn fetch(x: In<f32>, out: Out<f32>, steps: u32) {
    let tile = shared_array!(f32, 256);
    let thread = thread::thread_idx_x() as usize;
    cp_async::copy::<f32, 4>(&tile, thread * 4, &x, thread * 4);
    cp_async::commit_group();
    if steps & 1 == 1 {
        cp_async::wait_group::<0>();
    }
    if steps & 2 == 2 {
        thread::sync_threads();
    }
    out.set(thread, tile.get((thread * 4 + 130) % 256));
}

#[test]
fn asynchronous_copies_must_be_waited_for() {
    let run = |executor: &Executor, steps| {
        let (x, mut out) = (Buffer::new(&[1.0f32; 256]), Buffer::uninitialised(64));
        executor.run(&fetch::launch(&x, &mut out, steps), Grid::new_1d(1))
    };
    every_seed_finds(
        |e| run(e, 2).unwrap_err(),
        |kind| match kind {
            FaultKind::UnfinishedCopy { copy, access, .. } => {
                copy.location.line() < access.location.line() && access.action == Action::Read
            }
            _ => false,
        },
    );
    every_seed_finds(
        |e| run(e, 1).unwrap_err(),
        |kind| {
            matches!(
                kind,
                FaultKind::Race { space: Space::Shared, .. }
                    | FaultKind::UnfinishedCopy { .. }
                    | FaultKind::Uninitialised { space: Space::Shared, .. }
            )
        },
    );
    passes(|executor| run(executor, 3));
}

/// The next tile is fetched over the one that others still read, unless a barrier is between.
#[kernel(block = 64)]
fn refill(x: In<f32>, out: Out<f32>, barrier: u32) {
    let tile = shared_array!(f32, 256);
    let thread = thread::thread_idx_x() as usize;
    let mut sum = 0.0;
    let mut round = 0;
    while round < 2 {
        cp_async::copy::<f32, 4>(&tile, thread * 4, &x, thread * 4);
        cp_async::commit_group();
        cp_async::wait_group::<0>();
        thread::sync_threads();
        sum += tile.get(255 - thread);
        if barrier == 1 {
            thread::sync_threads();
        }
        round += 1;
    }
    out.set(thread, sum);
}

#[test]
fn an_asynchronous_copy_over_a_tile_in_use_is_found() {
    let run = |executor: &Executor, barrier| {
        let (x, mut out) = (Buffer::new(&[1.0f32; 256]), Buffer::uninitialised(64));
        executor.run(&refill::launch(&x, &mut out, barrier), Grid::new_1d(1))
    };
    every_seed_finds(
        |e| run(e, 0).unwrap_err(),
        |kind| matches!(kind, FaultKind::Race { space: Space::Shared, .. } | FaultKind::UnfinishedCopy { .. }),
    );
    passes(|executor| run(executor, 1));
}

#[kernel(block = 64)]
fn panics(x: In<u32>) {
    thread::sync_threads();
    let divisor = x.get(thread::thread_idx_x() as usize);
    assert!(divisor != 0, "thread {} would divide by 0", thread::thread_idx_x());
    thread::sync_threads();
}

#[test]
fn a_panic_is_a_fault() {
    let mut values = [1u32; 64];
    values[41] = 0;
    let x = Buffer::new(&values);
    let panicked =
        |kind: &FaultKind| matches!(kind, FaultKind::Panic { message } if message == "thread 41 would divide by 0");
    fast_mode_finds(|executor| fault(executor, &panics::launch(&x), Grid::new_1d(3)), panicked);
    let found = fault(&Executor::checked(3), &panics::launch(&x), Grid::new_1d(3));
    assert!(panicked(&found.kind) && found.thread == 41, "{found}");
}

#[kernel(block = 32)]
fn big(bytes: u32) {
    let tile = shared_array!(u8, 200 * 1024);
    let more: Shared<u8> = shared::dynamic(0, bytes as usize);
    tile.set(0, 0);
    if !more.is_empty() {
        more.set(0, 0);
    }
}

#[kernel(block = 32)]
fn nothing() {}

#[test]
fn launches_and_shared_memory_have_limits() {
    let grid = |blocks, dynamic_shared_bytes| Grid { blocks, dynamic_shared_bytes };
    for executor in [Executor::new(1), Executor::checked(0)] {
        let found = fault(&executor, &big::launch(0), grid([1, 1, 1], 28 * 1024));
        assert!(matches!(*found.kind, FaultKind::SharedMemory { limit: 232_448, .. }), "{found}");
        let found = fault(&executor, &big::launch(1025), grid([1, 1, 1], 1024));
        assert!(matches!(*found.kind, FaultKind::SharedMemory { bytes: 1025, limit: 1024, .. }), "{found}");
        let found = fault(&executor, &nothing::launch(), grid([1, 1, 1], 232_449));
        assert!(matches!(*found.kind, FaultKind::SharedMemory { at: None, .. }), "{found}");
        for blocks in [[0, 1, 1], [1, 0, 1], [1, 1, 0], [1, 65_536, 1], [1 << 31, 1, 1], [1 << 20, 1 << 12, 1]] {
            let found = fault(&executor, &nothing::launch(), grid(blocks, 0));
            assert!(matches!(*found.kind, FaultKind::Grid { .. }), "{found}");
        }
        executor.run(&nothing::launch(), grid([1, 1, 1], 232_448)).unwrap();
    }
}

#[test]
fn a_seed_repeats_its_fault() {
    for seed in SEEDS {
        let run = || run_reverse(&Executor::checked(seed), 1).unwrap_err();
        assert_eq!(run(), run());
    }
    let all: Vec<Fault> = SEEDS.map(|seed| run_reverse(&Executor::checked(seed), 1).unwrap_err()).collect();
    assert!(all.iter().any(|fault| *fault != all[0]), "seeds change the order");
}
