//! Kernels whose threads race, and beside each the right version, which must pass.
#![allow(missing_docs, clippy::unwrap_used, reason = "a test")]

mod planted;

use cuda_std::cp_async;
use cuda_std::cpu::{Action, Buffer, Executor, Fault, FaultKind, Space};
use cuda_std::launch::Grid;
use cuda_std::prelude::*;

use planted::{SEEDS, every_seed_finds, passes};

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
    let line = |text: &str| 1 + include_str!("races.rs").lines().position(|line| line.contains(text)).unwrap() as u32;
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

/// Every block leaves a number; the last to arrive at the counter adds them up. `how`: 0 counts without memory order, 1
/// arrives before all threads have written, 2 and 3 are right, but with 2 only the arriving thread may read.
#[kernel(block = 64)]
fn last_block_adds(parts: InOut<f32>, counter: InOut<u32>, out: Out<f32>, how: u32) {
    let told = shared_array!(u32, 1);
    let (thread, block, blocks) = (thread::thread_idx_x(), thread::block_idx_x(), thread::grid_dim_x());
    parts.set((block * 64 + thread) as usize, thread as f32);
    if how != 1 {
        thread::sync_threads();
    }
    if thread == 0 {
        let arrived = if how == 0 { counter.atomic_add(0, 1) } else { counter.arrive(0, blocks - 1) };
        told.set(0, arrived);
    }
    let reader = if how == 2 {
        thread == 0
    } else {
        thread::sync_threads();
        thread == 40
    };
    if reader && told.get(0) + 1 == blocks {
        let mut sum = 0.0;
        let mut i = 0;
        while i < blocks * 64 {
            sum += parts.get(i as usize);
            i += 1;
        }
        out.set(0, sum);
        counter.set(0, 0);
    }
}

#[test]
fn an_arrival_orders_blocks_and_a_plain_count_does_not() {
    let run = |executor: &Executor, how| {
        let (mut parts, mut counter) = (Buffer::uninitialised(5 * 64), Buffer::new(&[0u32]));
        let mut out = Buffer::uninitialised(1);
        let launch = |parts: &mut _, counter: &mut _, out: &mut _| {
            executor.run(&last_block_adds::launch(parts, counter, out, how), Grid::new_1d(5))
        };
        launch(&mut parts, &mut counter, &mut out)?;
        assert_eq!(out.as_slice(), [5.0 * 2016.0]);
        // The counter is as it was.
        launch(&mut parts, &mut counter, &mut out)
    };
    for how in [0, 1] {
        every_seed_finds(
            |e| run(e, how).unwrap_err(),
            |kind| match kind {
                FaultKind::Race { space: Space::Global, first, second, .. } => {
                    [first.action, second.action] == [Action::Write, Action::Read]
                        && (how == 1 || first.block != second.block)
                }
                FaultKind::Uninitialised { space: Space::Global, .. } => how == 1,
                _ => false,
            },
        );
    }
    for how in [2, 3] {
        passes(|executor| run(executor, how));
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
