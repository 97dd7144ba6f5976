//! What the tests of planted faults share.
#![allow(dead_code, missing_docs, clippy::unwrap_used, unreachable_pub, reason = "each test crate uses a part")]

use cuda_std::cpu::{Buffer, Executor, Fault, FaultKind};
use cuda_std::launch::{Grid, Launch};
use cuda_std::prelude::*;

pub const SEEDS: std::ops::Range<u64> = 0..20;

pub fn fault(executor: &Executor, launch: &Launch<'_>, grid: Grid) -> Fault {
    let fault = executor.run(launch, grid).expect_err("a fault was planted");
    assert_eq!(fault.kernel, launch.kernel().name);
    assert!(fault.to_string().contains(fault.kernel));
    fault
}

/// Every seed finds a fault that `expected` accepts.
pub fn every_seed_finds(run: impl Fn(&Executor) -> Fault, expected: impl Fn(&FaultKind) -> bool) {
    for seed in SEEDS {
        let fault = run(&Executor::checked(seed));
        assert!(expected(&fault.kind), "seed {seed}: {fault}");
    }
}

/// Fast mode finds it too, on one thread and on two, and works afterwards.
pub fn fast_mode_finds(run: impl Fn(&Executor) -> Fault, expected: impl Fn(&FaultKind) -> bool) {
    for threads in [1, 2] {
        let executor = Executor::new(threads);
        for _ in 0..3 {
            let fault = run(&executor);
            assert!(expected(&fault.kind), "{threads} threads: {fault}");
            let (x, mut out) =
                (Buffer::new(&std::array::from_fn::<f32, 128, _>(|i| i as f32)), Buffer::uninitialised(2));
            executor.run(&healthy::launch(&x, &mut out), Grid::new_1d(2)).unwrap();
            assert_eq!(out.as_slice(), [63.0, 127.0]);
        }
    }
}

pub fn passes(launch: impl Fn(&Executor) -> Result<(), Fault>) {
    launch(&Executor::new(2)).unwrap();
    for seed in SEEDS {
        launch(&Executor::checked(seed)).unwrap_or_else(|fault| panic!("seed {seed}: {fault}"));
    }
}

/// A kernel without a fault: the largest of 64 numbers, for each block.
#[kernel(block = 64)]
fn healthy(x: In<f32>, out: Out<f32>) {
    let partial = shared_array!(f32, 2);
    let largest = warp::max_f32(x.get(thread::index_1d() as usize));
    if thread::lane_id() == 0 {
        partial.set(thread::warp_id() as usize, largest);
    }
    thread::sync_threads();
    if thread::thread_idx_x() == 0 {
        out.set(thread::block_idx_x() as usize, math::max(partial.get(0), partial.get(1)));
    }
}
