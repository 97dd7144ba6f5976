//! Kernels that are right: their results against a plain computation, in fast mode and in checked mode.
#![allow(missing_docs, clippy::unwrap_used, reason = "a test")]

use cuda_std::cpu::{Buffer, Executor, Fault};
use cuda_std::launch::{Grid, Launch};
use cuda_std::prelude::*;
use cuda_std::{cp_async, shared};

/// Runs a launch that `launch` makes over fresh buffers, fast on 1 and 3 threads and checked under 20 seeds, and
/// demands the same answer of all.
fn everywhere<R: PartialEq + std::fmt::Debug>(mut run: impl FnMut(&Executor) -> R) -> R {
    let answer = run(&Executor::new(1));
    assert_eq!(answer, run(&Executor::new(3)), "3 threads");
    for seed in 0..20 {
        assert_eq!(answer, run(&Executor::checked(seed)), "seed {seed}");
    }
    answer
}

fn must(executor: &Executor, launch: &Launch<'_>, grid: Grid) {
    let result: Result<(), Fault> = executor.run(launch, grid);
    if let Err(fault) = result {
        panic!("{executor:?}: {fault}");
    }
}

fn dynamic(blocks: u32, bytes: u32) -> Grid {
    Grid { blocks: [blocks, 1, 1], dynamic_shared_bytes: bytes }
}

/// Numbers without a pattern.
fn noise(count: usize) -> Vec<f32> {
    let mut state = 12345u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / 8_388_608.0 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

#[kernel(block = 64)]
pub fn scale(x: In<f32>, out: Out<f32>, factor: f32) {
    let index = thread::index_1d() as usize;
    if index < out.len() {
        out.set(index, x.get(index) * factor);
    }
}

#[test]
fn threads_without_barriers_over_many_blocks() {
    let values = noise(1003);
    let answer = everywhere(|executor| {
        let (x, mut out) = (Buffer::new(&values), Buffer::uninitialised(1003));
        must(executor, &scale::launch(&x, &mut out, 3.0), Grid::new_1d(16));
        out.as_slice().to_vec()
    });
    let expected: Vec<f32> = values.iter().map(|x| x * 3.0).collect();
    assert_eq!(answer, expected);
}

#[kernel(block = 32)]
fn indices(out: Out<u64>) {
    let block = (thread::block_idx_z() * thread::grid_dim_y() + thread::block_idx_y()) * thread::grid_dim_x()
        + thread::block_idx_x();
    let value = u64::from(thread::block_idx_x())
        | u64::from(thread::block_idx_y()) << 8
        | u64::from(thread::block_idx_z()) << 16
        | u64::from(thread::lane_id()) << 24
        | u64::from(thread::block_dim_x()) << 32;
    out.set((block * 32 + thread::thread_idx_x()) as usize, value);
}

#[test]
fn grids_have_three_dimensions() {
    let answer = everywhere(|executor| {
        let mut out = Buffer::uninitialised(3 * 5 * 7 * 32);
        must(executor, &indices::launch(&mut out), Grid { blocks: [3, 5, 7], dynamic_shared_bytes: 0 });
        out.as_slice().to_vec()
    });
    let mut expected = Vec::new();
    for z in 0..7u64 {
        for y in 0..5u64 {
            for x in 0..3u64 {
                expected.extend((0..32u64).map(|lane| x | y << 8 | z << 16 | lane << 24 | 32 << 32));
            }
        }
    }
    assert_eq!(answer, expected);
}

/// The sum of 1024 numbers in the tree that the kernel documents.
#[kernel(block = 1024)]
fn block_sum(x: In<f32>, out: Out<f32>) {
    let partial = shared_array!(f32, 32);
    let thread = thread::thread_idx_x() as usize;
    let block = thread::block_idx_x() as usize;
    let sum = warp::sum_f32(x.get(block * 1024 + thread));
    if thread::lane_id() == 0 {
        partial.set(thread::warp_id() as usize, sum);
    }
    thread::sync_threads();
    if thread::warp_id() == 0 {
        let total = warp::sum_f32(partial.get(thread));
        if thread == 0 {
            out.set(block, total);
        }
    }
}

fn tree(values: &[f32]) -> f32 {
    let mut lanes: [f32; 32] = values.try_into().unwrap();
    for distance in [16, 8, 4, 2, 1] {
        lanes = std::array::from_fn(|lane| lanes[lane] + lanes[lane ^ distance]);
    }
    lanes[0]
}

#[test]
fn blocks_of_1024_threads_reduce() {
    let values = noise(5 * 1024);
    let answer = everywhere(|executor| {
        let (x, mut out) = (Buffer::new(&values), Buffer::uninitialised(5));
        must(executor, &block_sum::launch(&x, &mut out), Grid::new_1d(5));
        out.as_slice().to_vec()
    });
    for (sum, values) in answer.iter().zip(values.chunks(1024)) {
        let warps: Vec<f32> = values.chunks(32).map(tree).collect();
        assert_eq!(*sum, tree(&warps));
        let exact: f64 = values.iter().map(|&x| f64::from(x)).sum();
        assert!((f64::from(*sum) - exact).abs() <= 1e-4);
    }
}

#[kernel(block = 96)]
fn warp_functions(x: In<u32>, out: Out<u32>) {
    let thread = thread::thread_idx_x() as usize;
    let value = x.get(thread);
    let lane = thread::lane_id();
    let results = [
        warp::shuffle_xor_u32(value, 5),
        warp::shuffle_u32(value, lane * 7 + 3),
        warp::ballot(value.is_multiple_of(3)),
        u32::from(warp::any(value == 40)),
        u32::from(warp::all(value < 70)),
        warp::sum_u32(value),
        warp::max_f32(value as f32) as u32,
        warp::shuffle_f32(value as f32, 31) as u32,
    ];
    warp::sync_warp();
    for (index, result) in results.into_iter().enumerate() {
        out.set(thread * 8 + index, result);
    }
}

#[test]
fn lanes_exchange() {
    let values: Vec<u32> = (0..96).map(|i| i * 29 % 97).collect();
    let answer = everywhere(|executor| {
        let (x, mut out) = (Buffer::new(&values), Buffer::uninitialised(96 * 8));
        must(executor, &warp_functions::launch(&x, &mut out), Grid::new_1d(1));
        out.as_slice().to_vec()
    });
    for (index, results) in answer.chunks(8).enumerate() {
        let (warp, lane) = (&values[index / 32 * 32..][..32], index % 32);
        let ballot = warp.iter().enumerate().fold(0, |mask, (lane, v)| mask | u32::from(v % 3 == 0) << lane);
        let expected = [
            warp[lane ^ 5],
            warp[(lane * 7 + 3) % 32],
            ballot,
            u32::from(warp.contains(&40)),
            u32::from(warp.iter().all(|&v| v < 70)),
            warp.iter().sum(),
            *warp.iter().max().unwrap(),
            warp[31],
        ];
        assert_eq!(results, expected, "thread {index}");
    }
}

/// Warps take different ways between barriers; every warp-level operation has its own number of rounds.
#[kernel(block = 128)]
fn uneven_warps(out: Out<u32>) {
    let totals = shared_array!(u32, 4);
    let mut value = thread::thread_idx_x();
    let mut round = 0;
    while round <= thread::warp_id() * 3 {
        value = warp::sum_u32(value) ^ thread::lane_id();
        round += 1;
    }
    if thread::lane_id() == 0 {
        totals.set(thread::warp_id() as usize, value);
    }
    thread::sync_threads();
    let sum = totals.get(0).wrapping_add(totals.get(1)).wrapping_add(totals.get(2)).wrapping_add(totals.get(3));
    out.set(thread::thread_idx_x() as usize, sum);
}

#[test]
fn warps_run_apart_between_barriers() {
    let answer = everywhere(|executor| {
        let mut out = Buffer::uninitialised(128);
        must(executor, &uneven_warps::launch(&mut out), Grid::new_1d(1));
        out.as_slice().to_vec()
    });
    let mut expected = 0u32;
    for warp in 0..4 {
        let mut lanes: Vec<u32> = (warp * 32..warp * 32 + 32).collect();
        for _ in 0..=warp * 3 {
            let sum = lanes.iter().fold(0u32, |sum, &lane| sum.wrapping_add(lane));
            lanes = (0..32).map(|lane| sum ^ lane).collect();
        }
        expected = expected.wrapping_add(lanes[0]);
    }
    assert_eq!(answer, [expected; 128]);
}

/// Several arrays, one of them asked for in a loop, and the dynamic part in two pieces.
#[kernel(block = 64)]
fn arrays(out: Out<u32>) {
    let thread = thread::thread_idx_x();
    let index = thread as usize;
    let bytes = shared_array!(u8, 64);
    let halves = shared_array!(u16, 64);
    let words: Shared<u32> = shared::dynamic(16, 64);
    let long: Shared<u64> = shared::dynamic(16 + 256, 64);
    let mut round = 0;
    while round < 3 {
        let again = shared_array!(u32, 64);
        if round == 0 {
            again.set(index, thread * 5);
        } else {
            again.set(index, again.get(index) + 1);
        }
        words.set(index, again.get(index));
        round += 1;
    }
    bytes.set(index, thread as u8);
    halves.set(index, thread as u16 * 3);
    long.set(index, u64::from(thread) << 33);
    thread::sync_threads();
    let other = 63 - index;
    let sum = u32::from(bytes.get(other)) + u32::from(halves.get(other)) + words.get(other);
    out.set(index, sum + (long.get(other) >> 33) as u32);
}

#[test]
fn shared_arrays_do_not_overlap() {
    let answer = everywhere(|executor| {
        let mut out = Buffer::uninitialised(64);
        must(executor, &arrays::launch(&mut out), dynamic(1, 16 + 256 + 512));
        out.as_slice().to_vec()
    });
    let expected: Vec<u32> = (0..64).rev().map(|t| t + t * 3 + t * 5 + 2 + t).collect();
    assert_eq!(answer, expected);
}

#[kernel(block = 64)]
fn count(x: In<u32>, histogram: InOut<u32>, largest: Out<u64>) {
    let local = shared_array!(u32, 4);
    let top = shared_array!(u64, 1);
    let thread = thread::thread_idx_x() as usize;
    if thread < 4 {
        local.set(thread, 0);
    }
    if thread == 0 {
        top.set(0, 0);
    }
    thread::sync_threads();
    let value = x.get(thread::index_1d() as usize);
    local.atomic_add(value as usize % 4, 1);
    top.atomic_max(0, u64::from(value));
    thread::sync_threads();
    if thread < 4 {
        histogram.atomic_add(thread, local.get(thread));
    }
    if thread == 0 {
        largest.set(thread::block_idx_x() as usize, top.get(0));
    }
}

#[test]
fn atomics_count() {
    let values: Vec<u32> = (0..640).map(|i| i * i % 1009).collect();
    let answer = everywhere(|executor| {
        let x = Buffer::new(&values);
        let (mut histogram, mut largest) = (Buffer::new(&[0u32; 4]), Buffer::uninitialised(10));
        must(executor, &count::launch(&x, &mut histogram, &mut largest), Grid::new_1d(10));
        (histogram.as_slice().to_vec(), largest.as_slice().to_vec())
    });
    let histogram: Vec<u32> = (0..4).map(|r| values.iter().filter(|&&v| v % 4 == r).count() as u32).collect();
    let largest: Vec<u64> = values.chunks(64).map(|block| u64::from(*block.iter().max().unwrap())).collect();
    assert_eq!(answer, (histogram, largest));
}

/// D = A B + C for 16 x 16, 16 x 8 and 16 x 8 row-major matrices, one per warp.
#[kernel(block = 64)]
fn tensor_product(a: In<bf16>, b: In<bf16>, c: In<f32>, d: Out<f32>) {
    let warp = thread::warp_id() as usize;
    let (g, t) = (thread::lane_id() as usize / 4, thread::lane_id() as usize % 4);
    let pair = |row: usize, column: usize| {
        let index = warp * 256 + row * 16 + column;
        bf16_pair(bf16_to_f32(a.get(index)), bf16_to_f32(a.get(index + 1)))
    };
    let column_pair = |row: usize| {
        let index = warp * 128 + row * 8 + g;
        bf16_pair(bf16_to_f32(b.get(index)), bf16_to_f32(b.get(index + 8)))
    };
    let at = |row: usize| warp * 128 + row * 8 + 2 * t;
    let result = mma::m16n8k16_bf16(
        [pair(g, 2 * t), pair(g + 8, 2 * t), pair(g, 2 * t + 8), pair(g + 8, 2 * t + 8)],
        [column_pair(2 * t), column_pair(2 * t + 8)],
        [c.get(at(g)), c.get(at(g) + 1), c.get(at(g + 8)), c.get(at(g + 8) + 1)],
    );
    d.store(at(g), [result[0], result[1]]);
    d.store(at(g + 8), [result[2], result[3]]);
}

#[test]
fn tensor_products_are_chains_in_k_order() {
    let round = |values: Vec<f32>| -> Vec<bf16> { values.into_iter().map(bf16::from_f32).collect() };
    let all = noise(2 * (256 + 128 + 128));
    let (a, b) = (round(all[..512].to_vec()), round(all[512..768].to_vec()));
    let c = &all[768..1024];
    let answer = everywhere(|executor| {
        let (a, b, c, mut d) = (Buffer::new(&a), Buffer::new(&b), Buffer::new(c), Buffer::uninitialised(256));
        must(executor, &tensor_product::launch(&a, &b, &c, &mut d), Grid::new_1d(1));
        d.as_slice().to_vec()
    });
    for warp in 0..2 {
        for row in 0..16 {
            for column in 0..8 {
                let start = c[warp * 128 + row * 8 + column];
                let (mut chain, mut exact) = (start, f64::from(start));
                for k in 0..16 {
                    let (x, y) = (a[warp * 256 + row * 16 + k].to_f32(), b[warp * 128 + k * 8 + column].to_f32());
                    // The product is exact in f64 and so is its sum with an f32 of this size: one rounding.
                    chain = (f64::from(x) * f64::from(y) + f64::from(chain)) as f32;
                    exact += f64::from(x) * f64::from(y);
                }
                let result = answer[warp * 128 + row * 8 + column];
                assert_eq!(result, chain, "warp {warp}, row {row}, column {column}");
                assert!((f64::from(result) - exact).abs() <= 1e-5);
            }
        }
    }
}

/// Two stages of asynchronous copies, the usual pipeline.
#[kernel(block = 32)]
fn pipeline(x: In<f32>, out: Out<f32>) {
    let stages = shared_array!(f32, 256);
    let lane = thread::lane_id() as usize;
    let tiles = x.len() / 128;
    cp_async::copy::<f32, 4>(&stages, lane * 4, &x, lane * 4);
    cp_async::commit_group();
    let mut sum = 0.0;
    let mut tile = 0;
    while tile < tiles {
        if tile + 1 < tiles {
            cp_async::copy::<f32, 4>(&stages, (tile + 1) % 2 * 128 + lane * 4, &x, (tile + 1) * 128 + lane * 4);
        }
        cp_async::commit_group();
        cp_async::wait_group::<1>();
        thread::sync_threads();
        let mut i = 0;
        while i < 4 {
            sum += stages.get(tile % 2 * 128 + i * 32 + (31 - lane));
            i += 1;
        }
        thread::sync_threads();
        tile += 1;
    }
    out.set(lane, sum);
}

#[test]
fn asynchronous_copies_arrive() {
    let values = noise(128 * 5);
    let answer = everywhere(|executor| {
        let (x, mut out) = (Buffer::new(&values), Buffer::uninitialised(32));
        must(executor, &pipeline::launch(&x, &mut out), Grid::new_1d(1));
        out.as_slice().to_vec()
    });
    for (lane, sum) in answer.iter().enumerate() {
        let mut expected = 0.0;
        for row in values.chunks(32) {
            expected += row[31 - lane];
        }
        assert_eq!(*sum, expected);
    }
}

#[kernel(block = 32)]
fn vectors(x: In<bf16>, out: InOut<bf16>) {
    let lane = thread::lane_id() as usize;
    let values: [bf16; 8] = x.load(lane * 8);
    // SAFETY: the test's buffers hold 256 elements.
    let again: [bf16; 8] = unsafe { x.load_streaming_unchecked(lane * 8) };
    let reversed: [bf16; 8] = core::array::from_fn(|i| if i % 2 == 0 { values[7 - i] } else { again[7 - i] });
    out.store(lane * 8, reversed);
}

#[test]
fn vector_accesses_move_whole_lines_and_slices_keep_their_place() {
    let values: Vec<bf16> = (0..512u16).map(bf16::from_bits).collect();
    let answer = everywhere(|executor| {
        let (x, mut out) = (Buffer::new(&values), Buffer::uninitialised(256));
        must(executor, &vectors::launch(&x.slice(128..384), &mut out), Grid::new_1d(1));
        out.as_slice().to_vec()
    });
    let expected: Vec<bf16> = values[128..384].chunks(8).flat_map(|chunk| chunk.iter().rev().copied()).collect();
    assert_eq!(answer, expected);
}

#[kernel(block = 32)]
fn numbers(out: Out<u64>, a: u32, b: i32, c: u64, d: f32) {
    if thread::lane_id() == 0 {
        out.set(0, u64::from(a));
        out.set(1, i64::from(b) as u64);
        out.set(2, c);
        out.set(3, u64::from(d.to_bits()));
    }
}

#[test]
fn numbers_keep_their_bits() {
    let answer = everywhere(|executor| {
        let mut out = Buffer::uninitialised(4);
        must(executor, &numbers::launch(&mut out, u32::MAX, -7, 1 << 63, -0.0), Grid::new_1d(1));
        out.as_slice().to_vec()
    });
    assert_eq!(answer, [u64::from(u32::MAX), -7i64 as u64, 1 << 63, 0x8000_0000]);
}

#[kernel(block = 64)]
fn early_exit(out: Out<u32>) {
    let thread = thread::thread_idx_x();
    if thread >= 40 {
        return;
    }
    thread::sync_threads();
    out.set(thread as usize, thread);
}

#[test]
fn fast_mode_counts_threads_that_left_as_arrived() {
    for threads in [1, 2] {
        let mut out = Buffer::uninitialised(40);
        must(&Executor::new(threads), &early_exit::launch(&mut out), Grid::new_1d(1));
        assert_eq!(out.as_slice(), (0..40).collect::<Vec<u32>>());
    }
}

#[test]
fn one_executor_serves_several_threads() {
    let executor = Executor::new(2);
    let values = noise(64 * 200);
    std::thread::scope(|scope| {
        for factor in 1..5u8 {
            let (executor, values) = (&executor, &values);
            scope.spawn(move || {
                let x = Buffer::new(values);
                for _ in 0..50 {
                    let mut out = Buffer::uninitialised(values.len());
                    must(executor, &scale::launch(&x, &mut out, f32::from(factor)), Grid::new_1d(200));
                    assert!(out.as_slice().iter().zip(values).all(|(y, x)| *y == x * f32::from(factor)));
                }
            });
        }
    });
}

#[test]
fn tasks_run_once_each() {
    use std::sync::atomic::{AtomicU32, Ordering};
    for threads in [1, 4] {
        let executor = Executor::new(threads);
        let seen: Vec<AtomicU32> = (0..5000).map(|_| AtomicU32::new(0)).collect();
        executor.for_each(seen.len(), &|index| {
            seen[index].fetch_add(1, Ordering::Relaxed);
        });
        assert!(seen.iter().all(|count| count.load(Ordering::Relaxed) == 1));
    }
}

macro_rules! two_arrays_in_one_expansion {
    ($name:ident) => {
        #[kernel(block = 32)]
        fn $name(out: Out<u32>) {
            let first = shared_array!(u32, 32);
            let second = shared_array!(u32, 32);
            let thread = thread::thread_idx_x() as usize;
            first.set(thread, 1);
            second.set(thread, 2);
            out.set(thread, first.get(thread) * 10 + second.get(thread));
        }
    };
}
two_arrays_in_one_expansion!(shared_pair);

/// Both arrays have one size and, being written by one macro call, one source location.
#[test]
fn arrays_of_one_macro_expansion_are_different() {
    let mut out = Buffer::<u32>::uninitialised(32);
    Executor::checked(1).run(&shared_pair::launch(&mut out), Grid::new_1d(1)).unwrap();
    assert_eq!(out.as_slice(), [12; 32]);
}
