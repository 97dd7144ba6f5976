//! The seam on the CPU: bounds, lengths, memory, errors, launches.

use cuda_std::launch::{Grid, Launch};
use half::bf16;
use kernels_gpu::residual_add::residual_add;

use super::*;
use crate::testing::{TestRng, Tolerance, assert_bits, assert_close};

fn cpu() -> Device {
    Device::cpu(CpuOptions { threads: 2, ..CpuOptions::default() }).unwrap()
}

fn checked() -> Device {
    Device::cpu(CpuOptions { checked: true, seed: 7, ..CpuOptions::default() }).unwrap()
}

fn limited(bytes: u64) -> Device {
    Device::cpu(CpuOptions { threads: 1, memory_limit_bytes: Some(bytes), ..CpuOptions::default() }).unwrap()
}

#[track_caller]
fn assert_code<T: std::fmt::Debug>(result: Result<T, DeviceError>, code: ErrorCode) {
    let error = result.unwrap_err();
    assert_eq!(error.code(), code, "{error}");
}

#[test]
fn the_handle_may_go_to_other_threads() {
    fn takes<T: Send + Sync>() {}
    takes::<Device>();
    takes::<Buffer<f32>>();
    takes::<Slice<'static, f32>>();
    takes::<SliceMut<'static, f32>>();
    takes::<Weight>();
}

#[test]
fn what_goes_up_comes_down() {
    let device = cpu();
    let values: Vec<u32> = (0..1001).collect();
    let mut buffer = device.alloc_from(&values, MemoryKind::Other, "values").unwrap();
    assert_eq!(device.download(&buffer).unwrap(), values);
    device.upload(buffer.slice_mut(10..13).unwrap(), &[1, 2, 3]).unwrap();
    assert_eq!(device.download(buffer.slice(9..14).unwrap()).unwrap(), [9, 1, 2, 3, 13]);
    device.fill_zero(buffer.slice_mut(1000..).unwrap()).unwrap();
    assert_eq!(device.download(buffer.slice(999..).unwrap()).unwrap(), [999, 0]);
    let mut copy = device.alloc::<u32>(3, MemoryKind::Other, "copy").unwrap();
    assert_eq!(device.download(&copy).unwrap(), [0; 3]);
    device.copy(buffer.slice(9..12).unwrap(), &mut copy).unwrap();
    assert_eq!(device.download(&copy).unwrap(), [9, 1, 2]);
    device.copy(buffer.slice(5..5).unwrap(), copy.slice_mut(3..).unwrap()).unwrap();
    device.synchronize().unwrap();
}

#[test]
fn unwritten_memory_is_nan() {
    let device = cpu();
    let floats = device.alloc_unwritten::<f32>(33, MemoryKind::Other, "floats").unwrap();
    assert!(device.download(&floats).unwrap().iter().all(|value| value.is_nan()));
    let halves = device.alloc_unwritten::<bf16>(33, MemoryKind::Other, "halves").unwrap();
    assert!(device.download(&halves).unwrap().iter().all(|value| value.is_nan()));
}

#[test]
fn ranges_outside_are_refused() {
    let device = cpu();
    let mut buffer = device.alloc::<f32>(10, MemoryKind::Other, "ten").unwrap();
    for range in [0..11, 11..11, 10..12, usize::MAX - 1..usize::MAX] {
        assert_code(buffer.slice(range.clone()), ErrorCode::InvalidParameter);
        assert_code(buffer.slice_mut(range), ErrorCode::InvalidParameter);
    }
    #[expect(clippy::reversed_empty_ranges, reason = "that is the point")]
    let backwards = buffer.slice(5..3);
    assert_code(backwards, ErrorCode::InvalidParameter);
    assert_code(buffer.slice(0..=usize::MAX), ErrorCode::InvalidParameter);
    assert_eq!(buffer.slice(10..).unwrap().len(), 0);
    assert_eq!(buffer.slice(..=9).unwrap().len(), 10);
    let part = buffer.slice(2..8).unwrap();
    assert_code(part.slice(0..7), ErrorCode::InvalidParameter);
    assert_eq!(part.slice(1..=2).unwrap().len(), 2);
    let (first, rest) = buffer.as_slice_mut().split_at(3).unwrap();
    assert_eq!((first.len(), rest.len()), (3, 7));
    assert_code(buffer.as_slice_mut().split_at(11), ErrorCode::InvalidParameter);
}

#[test]
fn lengths_and_devices_must_agree() {
    let (device, other) = (cpu(), cpu());
    let mut buffer = device.alloc::<f32>(4, MemoryKind::Other, "four").unwrap();
    let mut foreign = other.alloc::<f32>(4, MemoryKind::Other, "four").unwrap();
    assert_code(device.upload(&mut buffer, &[0.0; 3]), ErrorCode::InvalidParameter);
    assert_code(device.download_into(&buffer, &mut [0.0; 5]), ErrorCode::InvalidParameter);
    assert_code(device.upload(&mut foreign, &[0.0; 4]), ErrorCode::InvalidParameter);
    assert_code(device.download(&foreign), ErrorCode::InvalidParameter);
    assert_code(device.copy(&buffer, &mut foreign), ErrorCode::InvalidParameter);
    assert_code(device.copy(&foreign, &mut buffer), ErrorCode::InvalidParameter);
    assert_code(device.fill_zero(&mut foreign), ErrorCode::InvalidParameter);
    assert_code(
        device.launch(residual_add::launch(&mut buffer, &foreign), Grid::new_1d(1)),
        ErrorCode::InvalidParameter,
    );
    assert!(device.is_healthy());
}

#[test]
fn nothing_cannot_be_allocated() {
    let device = cpu();
    assert_code(device.alloc::<f32>(0, MemoryKind::Other, "nothing"), ErrorCode::InvalidParameter);
    assert_code(device.alloc::<f32>(usize::MAX, MemoryKind::Other, "all"), ErrorCode::InvalidParameter);
    assert_code(device.alloc_from::<f32>(&[], MemoryKind::Other, "nothing"), ErrorCode::InvalidParameter);
    assert_eq!(device.tracker().count(), 0);
}

#[test]
fn memory_is_tracked_and_given_back() {
    let device = limited(10_000);
    for _ in 0..100 {
        let a = device.alloc::<f32>(100, MemoryKind::KvCache, "a").unwrap();
        let b = device.alloc::<u8>(1, MemoryKind::Activations, "b").unwrap();
        assert_eq!(device.tracker().total_bytes(), 401);
        assert_eq!(device.tracker().bytes_of(MemoryKind::KvCache), 400);
        assert_eq!(device.memory_info().unwrap(), MemoryInfo { free_bytes: 9599, total_bytes: 10_000 });
        drop((a, b));
        assert_eq!((device.tracker().total_bytes(), device.tracker().count()), (0, 0));
    }
    assert_eq!(device.tracker().high_water_bytes(), 401);
    device.verify_residency().unwrap();
}

#[test]
fn a_buffer_outlives_its_handle() {
    let device = cpu();
    let other = device.clone();
    let buffer = device.alloc_from(&[1.0_f32, 2.0], MemoryKind::Other, "two").unwrap();
    drop(device);
    assert_eq!(other.download(&buffer).unwrap(), [1.0, 2.0]);
    drop(other);
    drop(buffer);
}

#[test]
fn out_of_memory_says_what_and_how_much() {
    let device = limited(1 << 20);
    let _weights = device.alloc::<u8>(700 << 10, MemoryKind::Weights, "weights").unwrap();
    let error = device.alloc::<f32>(100_000, MemoryKind::KvCache, "keys of layer 3").unwrap_err();
    assert_eq!((error.code(), error.code().is_retriable()), (ErrorCode::OutOfMemory, true));
    let text = error.to_string();
    for part in ["400000 bytes", "keys of layer 3", "KV cache", "331776 bytes are free", "weights 0.7 MiB", "smaller"] {
        assert!(text.contains(part), "{part:?} is not in {text}");
    }
    assert!(device.is_healthy());
    assert_code(limited(10).alloc::<u8>(1 << 62, MemoryKind::Other, "huge"), ErrorCode::OutOfMemory);
    assert_code(cpu().alloc::<u8>(1 << 62, MemoryKind::Other, "huge"), ErrorCode::OutOfMemory);
    device.alloc::<f32>(80_000, MemoryKind::KvCache, "less").unwrap();
}

#[test]
fn a_kernel_runs_on_views() {
    for device in [cpu(), checked()] {
        let mut residual = device.alloc_from(&vec![1.0_f32; 1032], MemoryKind::Other, "residual").unwrap();
        let values: Vec<f32> = (0..1032).map(|index| index as f32).collect();
        let x = device.alloc_from(&values, MemoryKind::Other, "x").unwrap();
        let mut part = residual.slice_mut(4..1028).unwrap();
        device.launch(residual_add::launch(&mut part, &x.slice(8..).unwrap()), Grid::new_1d(1)).unwrap();
        let mut expected: Vec<f32> = (4..1036).map(|index| index as f32 + 1.0).collect();
        expected[..4].fill(1.0);
        expected[1028..].fill(1.0);
        assert_close(&device.download(&residual).unwrap(), &expected, Tolerance::EXACT);
    }
}

#[test]
fn a_fault_stops_the_device_and_stays() {
    let device = cpu();
    let mut residual = device.alloc::<f32>(1024, MemoryKind::Other, "residual").unwrap();
    let short = device.alloc::<f32>(1000, MemoryKind::Other, "x").unwrap();
    let fault = device.launch(residual_add::launch(&mut residual, &short), Grid::new_1d(1)).unwrap_err();
    assert_eq!(fault.code(), ErrorCode::KernelLaunchFailed);
    assert!(fault.to_string().contains("residual_add"), "{fault}");
    assert!(!device.is_healthy());
    assert_eq!(device.failure(), Some(fault.clone()));
    assert_eq!(device.synchronize(), Err(fault.clone()));
    assert_eq!(device.download(&residual), Err(fault.clone()));
    assert_eq!(device.upload(&mut residual, &[0.0; 1024]), Err(fault.clone()));
    assert_eq!(device.verify_residency(), Err(fault));
}

#[test]
fn checked_mode_finds_what_nobody_wrote() {
    let device = checked();
    let mut residual = device.alloc::<f32>(8, MemoryKind::Other, "residual").unwrap();
    let mut x = device.alloc_unwritten::<f32>(8, MemoryKind::Other, "x").unwrap();
    device.upload(x.slice_mut(..4).unwrap(), &[1.0; 4]).unwrap();
    let mut part = residual.slice_mut(..4).unwrap();
    device.launch(residual_add::launch(&mut part, &x.slice(..4).unwrap()), Grid::new_1d(1)).unwrap();
    let mut copy = device.alloc::<f32>(8, MemoryKind::Other, "copy").unwrap();
    device.copy(&x, &mut copy).unwrap();
    let fault = device.launch(residual_add::launch(&mut residual, &copy), Grid::new_1d(1)).unwrap_err();
    assert!(fault.to_string().contains("nobody has written"), "{fault}");

    let device = checked();
    let rows = device.alloc_from(&[bf16::ONE; 6], MemoryKind::Weights, "rows").unwrap();
    let weight = device.prepare_weight(rows, 2, 3, false).unwrap();
    let x = device.alloc_unwritten::<bf16>(3, MemoryKind::Other, "x").unwrap();
    let mut out = device.alloc_unwritten::<f32>(2, MemoryKind::Other, "out").unwrap();
    let fault = device.linear(&x, &weight, &mut out).unwrap_err();
    assert!(fault.to_string().contains("nobody has written"), "{fault}");
}

#[test]
fn launches_by_hand_and_empty_grids_are_refused() {
    let device = cpu();
    let mut buffer = device.alloc::<f32>(4, MemoryKind::Other, "four").unwrap();
    let x = device.alloc::<f32>(4, MemoryKind::Other, "four").unwrap();
    let kernel = residual_add::KERNEL;
    assert_code(device.launch(Launch::new(kernel), Grid::new_1d(1)), ErrorCode::InvalidParameter);
    let wrong = Launch::new(kernel).read::<f32>(&x).scalar(1_u32);
    assert_code(device.launch(wrong, Grid::new_1d(1)), ErrorCode::InvalidParameter);
    for blocks in [[0, 1, 1], [1, 0, 1], [1, 1, 0]] {
        let grid = Grid { blocks, dynamic_shared_bytes: 0 };
        assert_code(device.launch(residual_add::launch(&mut buffer, &x), grid), ErrorCode::InvalidParameter);
    }
    assert!(device.is_healthy());
}

#[test]
fn linear_layers_check_shapes_and_write_only_their_output() {
    let device = cpu();
    let (m, n, k) = (3, 35, 21);
    let mut rng = TestRng::new(5);
    let (x, rows) = (rng.bf16s(m * k), rng.bf16s(n * k));
    let expected: Vec<f64> = (0..m * n)
        .map(|index| (0..k).map(|i| x[index / n * k + i].to_f64() * rows[index % n * k + i].to_f64()).sum())
        .collect();
    let x = device.alloc_from(&x, MemoryKind::Activations, "x").unwrap();
    let buffer = device.alloc_from(&rows, MemoryKind::Weights, "rows").unwrap();
    let weight = device.prepare_weight(buffer, n, k, false).unwrap();
    assert_eq!((weight.n(), weight.k()), (n, k));
    assert_code(weight.rows().map(Buffer::len), ErrorCode::InvalidParameter);
    // 35 features fill three blocks of 16: the rows are gone, the packed form is there.
    assert_eq!(device.tracker().bytes_of(MemoryKind::Weights), 48 * 21 * 2);

    const GUARD: usize = 5;
    let mut out = device.alloc_unwritten::<f32>(m * n + 2 * GUARD, MemoryKind::Activations, "out").unwrap();
    device.linear(&x, &weight, out.slice_mut(GUARD..GUARD + m * n).unwrap()).unwrap();
    let out = device.download(&out).unwrap();
    assert_close(&out[GUARD..GUARD + m * n], &expected, Tolerance { absolute: 2e-5, relative: 0.0 });
    assert!(out[..GUARD].iter().chain(&out[GUARD + m * n..]).all(|value| value.is_nan()));

    let mut rounded = device.alloc_unwritten::<bf16>(m * n, MemoryKind::Activations, "out").unwrap();
    device.linear_with_algorithm(0, &x, &weight, &mut rounded).unwrap();
    assert_close(&device.download(&rounded).unwrap(), &expected, Tolerance { absolute: 2e-5, ..Tolerance::BF16 });
    assert_code(device.linear_with_algorithm(1, &x, &weight, &mut rounded), ErrorCode::InvalidParameter);

    for (inputs, outputs) in [(k, m * n), (m * k, n), (k + 1, n), (0, 0), (m * k, m * n - 1)] {
        let mut out = rounded.slice_mut(..outputs).unwrap();
        assert_code(device.linear(x.slice(..inputs).unwrap(), &weight, &mut out), ErrorCode::InvalidParameter);
    }
    let other = cpu();
    let x = other.alloc::<bf16>(k, MemoryKind::Other, "x").unwrap();
    let mut out = other.alloc::<f32>(n, MemoryKind::Other, "out").unwrap();
    assert_code(other.linear(&x, &weight, &mut out), ErrorCode::InvalidParameter);
}

#[test]
fn parts_of_a_linear_layer_check_shapes_and_write_only_their_output() {
    let device = cpu();
    let (m, n, k, segments) = (3, 5, 12, 4);
    let x = device.alloc_from(&vec![bf16::ONE; m * k], MemoryKind::Activations, "x").unwrap();
    let rows = device.alloc_from(&vec![bf16::ONE; n * k], MemoryKind::Weights, "rows").unwrap();
    let weight = device.prepare_weight(rows, n, k, false).unwrap();
    let len = segments * m * n;
    let mut out = device.alloc_unwritten::<f32>(len + 2, MemoryKind::Activations, "out").unwrap();
    device.linear_parts(&x, &weight, segments, out.slice_mut(1..=len).unwrap()).unwrap();
    let found = device.download(&out).unwrap();
    assert!(found[0].is_nan() && found[len + 1].is_nan());
    assert!(found[1..=len].iter().all(|&value| value == 3.0), "{found:?}");
    let mut out = device.alloc_unwritten::<f32>(5 * m * n, MemoryKind::Activations, "out").unwrap();
    for (segments, outputs) in [(4, len - 1), (4, m * n), (1, len), (0, 0), (5, 5 * m * n), (2, len)] {
        let out = out.slice_mut(..outputs).unwrap();
        assert_code(device.linear_parts(&x, &weight, segments, out), ErrorCode::InvalidParameter);
    }
    let whole = out.slice_mut(..len).unwrap();
    assert_code(device.linear_parts_with_algorithm(1, &x, &weight, segments, whole), ErrorCode::InvalidParameter);
}

#[test]
fn a_tied_weight_keeps_its_rows() {
    let device = cpu();
    let rows = device.alloc_from(&[bf16::ONE; 12], MemoryKind::Weights, "rows").unwrap();
    let weight = device.prepare_weight(rows, 4, 3, true).unwrap();
    assert_eq!(device.download(weight.rows().unwrap()).unwrap(), [bf16::ONE; 12]);
    let rows = device.alloc_from(&[bf16::ONE; 12], MemoryKind::Weights, "rows").unwrap();
    assert_code(device.prepare_weight(rows, 4, 4, true), ErrorCode::InvalidParameter);
    let rows = device.alloc_from(&[bf16::ONE; 12], MemoryKind::Weights, "rows").unwrap();
    assert_code(device.prepare_weight(rows, 0, 12, true), ErrorCode::InvalidParameter);
}

#[test]
fn checked_and_fast_devices_agree() {
    let mut rng = TestRng::new(9);
    let (x, rows) = (rng.bf16s(4 * 70), rng.bf16s(50 * 70));
    let run = |device: Device| {
        let x = device.alloc_from(&x, MemoryKind::Activations, "x").unwrap();
        let rows = device.alloc_from(&rows, MemoryKind::Weights, "rows").unwrap();
        let weight = device.prepare_weight(rows, 50, 70, false).unwrap();
        let mut out = device.alloc_unwritten::<f32>(200, MemoryKind::Activations, "out").unwrap();
        device.linear(&x, &weight, &mut out).unwrap();
        device.download(&out).unwrap()
    };
    assert_bits(&run(cpu()), &run(checked()));
}

#[test]
fn a_machine_without_a_gpu_says_so() {
    // Where there is a GPU, the ordinal is refused instead: no machine has this many.
    let error = Device::cuda(i32::MAX, &KernelImages { images: &[] }, &[]).unwrap_err();
    let expected = if Device::cuda_count() == 0 { ErrorCode::DeviceNotFound } else { ErrorCode::InvalidDevice };
    assert_eq!(error.code(), expected, "{error}");
}

#[test]
fn the_cpu_describes_itself() {
    let device = cpu();
    assert_eq!(device.name(), "CPU, 2 threads");
    assert_eq!((device.is_cuda(), device.compute_capability(), device.kernel_image()), (false, None, None));
    assert_eq!(device.multiprocessors(), 2);
    assert_eq!(device.linear_algorithms(1, 1, 1, OutputType::F32).unwrap().len(), 1);
    assert!(device.memory_info().unwrap().total_bytes > 0);
    assert_code(Device::cpu(CpuOptions { threads: 1 << 20, ..CpuOptions::default() }), ErrorCode::InvalidDevice);
}

#[test]
fn a_stopwatch_is_read_after_it_was_started_and_stopped() {
    let device = cpu();
    let mut stopwatch = device.stopwatch().unwrap();
    assert!(stopwatch.elapsed().is_err());
    stopwatch.stop().unwrap();
    assert!(stopwatch.elapsed().is_err());
    for wait in [20, 1].map(std::time::Duration::from_millis) {
        let began = std::time::Instant::now();
        stopwatch.start().unwrap();
        std::thread::sleep(wait);
        stopwatch.stop().unwrap();
        let elapsed = stopwatch.elapsed().unwrap();
        assert!(elapsed >= wait && elapsed <= began.elapsed(), "{elapsed:?}");
    }
}
