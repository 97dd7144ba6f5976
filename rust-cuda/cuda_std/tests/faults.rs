//! Kernels that are wrong, one for each thing (but races) that the executor claims to find; and beside each the right
//! version, which must pass.
#![allow(missing_docs, clippy::unwrap_used, reason = "a test")]

mod planted;

use cuda_std::cpu::{Action, Buffer, Executor, FaultKind, Space};
use cuda_std::launch::Grid;
use cuda_std::prelude::*;
use cuda_std::{cp_async, shared};

use planted::{SEEDS, every_seed_finds, fast_mode_finds, fault, passes};

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
