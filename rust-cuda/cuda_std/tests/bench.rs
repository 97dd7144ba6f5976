//! What the executor's own work costs. Run with
//! `cargo test --release -p lockstep-cuda-std --test bench -- --ignored --nocapture --test-threads 1`.
#![allow(missing_docs, clippy::unwrap_used, reason = "a test")]

use std::hint::black_box;
use std::time::Instant;

use cuda_std::cpu::{Buffer, Executor};
use cuda_std::launch::{Grid, Launch};
use cuda_std::prelude::*;

#[kernel(block = 128)]
fn empty(x: In<u32>) {
    black_box(x.len());
}

#[kernel(block = 128)]
fn barriers(count: u32) {
    let mut i = 0;
    while i < count {
        thread::sync_threads();
        i += 1;
    }
}

#[kernel(block = 128)]
fn shuffles(count: u32) {
    let mut i = 0;
    let mut value = thread::lane_id();
    while i < count {
        value = warp::shuffle_xor_u32(value, 1);
        i += 1;
    }
    black_box(value);
}

#[kernel(block = 128)]
fn products(count: u32) {
    let mut i = 0;
    let mut c = [0.0; 4];
    while i < count {
        c = mma::m16n8k16_bf16([0x3f80_3f80; 4], [0x3f80_3f80; 2], c);
        i += 1;
    }
    black_box(c);
}

fn nanoseconds(executor: &Executor, launch: &Launch<'_>, grid: Grid) -> f64 {
    let mut best = f64::INFINITY;
    for _ in 0..7 {
        let start = Instant::now();
        let mut launches = 0;
        while start.elapsed().as_millis() < 20 {
            executor.run(launch, grid).unwrap();
            launches += 1;
        }
        best = best.min(start.elapsed().as_nanos() as f64 / f64::from(launches));
    }
    best
}

#[test]
#[ignore = "a benchmark"]
fn costs() {
    let x = Buffer::new(&[0u32; 32]);
    for threads in [1, 2] {
        let executor = Executor::new(threads);
        let time = |launch: &Launch<'_>, blocks| nanoseconds(&executor, launch, Grid::new_1d(blocks));
        println!("{threads} threads:");
        println!("  launch of 1 empty block of 128:    {:8.0} ns", time(&empty::launch(&x), 1));
        println!("  launch of 64 empty blocks:         {:8.0} ns", time(&empty::launch(&x), 64));
        println!("  launch of 1 block, 1 barrier:      {:8.0} ns", time(&barriers::launch(1), 1));
        println!("  a thread at a barrier:             {:8.1} ns", time(&barriers::launch(100), 1) / 12800.0);
        println!("  a thread at a shuffle:             {:8.1} ns", time(&shuffles::launch(100), 1) / 12800.0);
        println!("  a warp's product, switches in it:  {:8.1} ns", time(&products::launch(100), 1) / 400.0);
    }
}
