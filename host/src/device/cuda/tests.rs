//! Tests on a GPU: `cargo test -- --include-ignored device::cuda`.

use cuda_std::launch::{Access, ParamDesc, ParamKind};

use cudarc::driver::sys::CUresult;

use super::memory::is_device_memory;
use super::*;
use crate::device::{Buffer, Device, ErrorCode, KernelImage, MemoryRecord};
use crate::testing::{TestRng, Tolerance, assert_bits, assert_close};

/// Two kernels written by hand, so that these tests need no device compiler: `x = x * scale + seed`, and one that writes to
/// address 0.
const PTX: &str = "
.version 7.0
.target sm_80
.address_size 64
.visible .entry scale_add(
    .param .u64 scale_add_param_0,
    .param .u64 scale_add_param_1,
    .param .f32 scale_add_param_2,
    .param .u64 scale_add_param_3
)
{
    .reg .pred %p<2>;
    .reg .b32 %r<5>;
    .reg .f32 %f<4>;
    .reg .b64 %rd<8>;
    ld.param.u64 %rd1, [scale_add_param_0];
    ld.param.u64 %rd2, [scale_add_param_1];
    ld.param.f32 %f1, [scale_add_param_2];
    ld.param.u64 %rd3, [scale_add_param_3];
    mov.u32 %r1, %ctaid.x;
    mov.u32 %r2, %ntid.x;
    mov.u32 %r3, %tid.x;
    mad.lo.s32 %r4, %r1, %r2, %r3;
    cvt.u64.u32 %rd4, %r4;
    setp.ge.u64 %p1, %rd4, %rd2;
    @%p1 bra DONE;
    cvta.to.global.u64 %rd5, %rd1;
    shl.b64 %rd6, %rd4, 2;
    add.s64 %rd7, %rd5, %rd6;
    ld.global.f32 %f2, [%rd7];
    cvt.rn.f32.u64 %f3, %rd3;
    fma.rn.f32 %f2, %f2, %f1, %f3;
    st.global.f32 [%rd7], %f2;
DONE:
    ret;
}
.visible .entry write_to_null()
{
    .reg .b64 %rd<2>;
    .reg .b32 %r<2>;
    mov.u64 %rd1, 0;
    mov.u32 %r1, 1;
    st.global.u32 [%rd1], %r1;
    ret;
}
";

const SCALE_ADD: &KernelDesc = &KernelDesc {
    name: "scale_add",
    block: 64,
    params: &[
        ParamDesc { name: "x", kind: ParamKind::Buffer { element: "f32", access: Access::ReadWrite } },
        ParamDesc { name: "scale", kind: ParamKind::Scalar { bytes: 4 } },
        ParamDesc { name: "seed", kind: ParamKind::Scalar { bytes: 8 } },
    ],
    entry: |_| {},
};
const WRITE_TO_NULL: &KernelDesc = &KernelDesc { name: "write_to_null", block: 32, params: &[], entry: |_| {} };

const IMAGE: KernelImage<'static> = KernelImage { sm: 80, arch_specific: false, ptx: PTX };

fn open(ordinal: i32) -> Result<Device, DeviceError> {
    Device::cuda(ordinal, &KernelImages { images: &[IMAGE] }, &[SCALE_ADD, WRITE_TO_NULL])
}

fn gpu() -> Device {
    open(0).unwrap()
}

fn context(device: &Device) -> &Arc<Context> {
    match device {
        Device::Cuda(cuda) => &cuda.context,
        Device::Cpu(_) => unreachable!("opened as a GPU"),
    }
}

fn scale_add<'a>(x: &'a mut Buffer<f32>, scale: f32, seed: u64) -> Launch<'a> {
    Launch::new(SCALE_ADD).write::<f32>(x).scalar(scale).scalar(seed)
}

#[test]
#[ignore = "needs a GPU"]
fn every_gpu_opens_and_describes_itself() {
    let count = Device::cuda_count();
    assert!(count > 0);
    for ordinal in 0..count {
        let device = open(i32::try_from(ordinal).unwrap()).unwrap();
        assert!(!device.name().is_empty() && device.is_cuda() && device.is_healthy());
        assert!((80..=200).contains(&device.compute_capability().unwrap()));
        assert!(device.multiprocessors() > 0);
        assert_eq!(device.kernel_image(), Some("sm_80"));
        assert!(device.driver().unwrap().starts_with("CUDA 1"));
        let info = device.memory_info().unwrap();
        assert!(info.total_bytes >= 1 << 30 && info.free_bytes > 0 && info.free_bytes <= info.total_bytes);
    }
}

#[test]
#[ignore = "needs a GPU"]
fn bad_ordinals_are_refused_with_the_range() {
    let count = i32::try_from(Device::cuda_count()).unwrap();
    for ordinal in [-1, i32::MIN, count, count + 1, 999, i32::MAX] {
        let error = open(ordinal).unwrap_err();
        assert_eq!(error.code(), ErrorCode::InvalidDevice);
        let text = error.to_string();
        assert!(text.contains(&ordinal.to_string()) && text.contains(&format!("0..={}", count - 1)), "{text}");
    }
}

#[test]
#[ignore = "needs a GPU"]
fn opening_again_and_again_leaks_nothing() {
    let keep = gpu();
    for _ in 0..20 {
        drop(gpu());
    }
    assert!(keep.memory_info().unwrap().free_bytes > 0);
}

#[test]
#[ignore = "needs a GPU"]
fn memory_is_given_back() {
    let device = gpu();
    // A sixteenth of the memory a hundred times does not fit unless it is freed.
    let bytes = usize::try_from(device.memory_info().unwrap().total_bytes / 16).unwrap();
    for _ in 0..100 {
        let buffer = device.alloc::<u8>(bytes, MemoryKind::Other, "a sixteenth").unwrap();
        assert_eq!(device.tracker().total_bytes(), bytes as u64);
        drop(buffer);
        assert_eq!((device.tracker().total_bytes(), device.tracker().count()), (0, 0));
    }
}

#[test]
#[ignore = "needs a GPU"]
fn too_much_is_out_of_memory_and_the_device_lives() {
    let device = gpu();
    let total = usize::try_from(device.memory_info().unwrap().total_bytes).unwrap();
    for bytes in [total, total - (64 << 20), total * 2, 1 << 60] {
        let error = device.alloc::<u8>(bytes, MemoryKind::KvCache, "too much").unwrap_err();
        assert_eq!(error.code(), ErrorCode::OutOfMemory, "{error}");
        assert!(error.to_string().contains(&format!("{bytes} bytes for too much (KV cache)")), "{error}");
    }
    assert_eq!(device.alloc::<u8>(0, MemoryKind::Other, "nothing").unwrap_err().code(), ErrorCode::InvalidParameter);
    assert!(device.is_healthy());
    device.alloc::<u8>(1, MemoryKind::Other, "one byte").unwrap();
}

#[test]
#[ignore = "needs a GPU"]
fn copies_of_every_size_arrive() {
    let device = gpu();
    // Both sides of the staging limits, and enough small copies for the ring to go round.
    for len in [1, 2, 1001, 65_535, 65_536, 65_537, 300_000, 1_000_003] {
        let values: Vec<u32> = (0..len).map(|index| index ^ 0x5a5a_0000).collect();
        let mut buffer = device.alloc_from(&values, MemoryKind::Other, "values").unwrap();
        assert!(device.download(&buffer).unwrap() == values, "{len}");
        let mut copy = device.alloc_unwritten::<u32>(values.len(), MemoryKind::Other, "copy").unwrap();
        device.copy(&buffer, &mut copy).unwrap();
        device.fill_zero(&mut buffer).unwrap();
        assert!(device.download(&copy).unwrap() == values, "{len}");
        assert!(device.download(&buffer).unwrap().iter().all(|&value| value == 0), "{len}");
    }
    let mut buffer = device.alloc::<u32>(10_000 * 40, MemoryKind::Other, "rows").unwrap();
    for row in 0..40_u32 {
        let start = row as usize * 10_000;
        device.upload(buffer.slice_mut(start..start + 10_000).unwrap(), &vec![row; 10_000]).unwrap();
    }
    let values = device.download(&buffer).unwrap();
    assert!(values.iter().enumerate().all(|(index, &value)| value as usize == index / 10_000));
    let nan = device.alloc_unwritten::<f32>(5, MemoryKind::Other, "unwritten").unwrap();
    assert!(device.download(&nan).unwrap().iter().all(|value| value.is_nan()));
}

#[test]
#[ignore = "needs a GPU"]
fn residency_tells_device_memory_from_the_rest() {
    let device = gpu();
    let context = context(&device);
    let buffer = device.alloc::<u8>(5 << 20, MemoryKind::Weights, "weights").unwrap();
    let address = device.tracker().records()[0].address;
    assert!(is_device_memory(context, address));
    assert!(is_device_memory(context, address + (5 << 20) - 1));
    device.verify_residency().unwrap();

    assert!(!is_device_memory(context, 0));
    let on_the_heap = vec![0_u8; 4096];
    assert!(!is_device_memory(context, on_the_heap.as_ptr().addr() as u64));
    let (mut managed, mut pinned) = (0, std::ptr::null_mut());
    // SAFETY: each call writes one pointer; both are freed below.
    unsafe {
        use cudarc::driver::sys;
        assert_eq!(sys::cuMemAllocManaged(&raw mut managed, 4096, 1), CUresult::CUDA_SUCCESS);
        assert_eq!(sys::cuMemAllocHost_v2(&raw mut pinned, 4096), CUresult::CUDA_SUCCESS);
    }
    assert!(!is_device_memory(context, managed));
    assert!(!is_device_memory(context, pinned.addr() as u64));
    assert!(device.is_healthy());

    // A managed pointer among the records is found, and stops the device.
    let record = MemoryRecord { address: managed, bytes: 4096, kind: MemoryKind::KvCache, label: "planted".to_owned() };
    device.tracker().record(record);
    let error = device.verify_residency().unwrap_err();
    assert_eq!(error.code(), ErrorCode::ResidencyFailed);
    assert!(error.to_string().contains("planted") && error.to_string().contains("1 of 2"), "{error}");
    assert!(!device.is_healthy());
    assert_eq!(device.synchronize(), Err(error));
    device.tracker().forget(managed);
    drop(buffer);
    // SAFETY: allocated above.
    unsafe {
        let _ = cudarc::driver::sys::cuMemFree_v2(managed);
        let _ = cudarc::driver::sys::cuMemFreeHost(pinned);
    }
}

#[test]
#[ignore = "needs a GPU"]
fn a_kernel_gets_its_arguments() {
    let device = gpu();
    let values: Vec<f32> = (0..1000).map(|index| index as f32).collect();
    let mut x = device.alloc_from(&values, MemoryKind::Other, "x").unwrap();
    device.launch(scale_add(&mut x, 0.5, 1 << 40), Grid::new_1d(16)).unwrap();
    let expected: Vec<f32> = values.iter().map(|value| value.mul_add(0.5, (1_u64 << 40) as f32)).collect();
    assert_bits(&device.download(&x).unwrap(), &expected);
    // More shared memory than blocks have without asking, twice; then more than there is.
    device.upload(&mut x, &values).unwrap();
    for _ in 0..2 {
        let grid = Grid { blocks: [16, 1, 1], dynamic_shared_bytes: 60 << 10 };
        device.launch(scale_add(&mut x, 1.0, 1), grid).unwrap();
    }
    let expected: Vec<f32> = values.iter().map(|value| value + 2.0).collect();
    assert_close(&device.download(&x).unwrap(), &expected, Tolerance::EXACT);
    for grid in [
        Grid { blocks: [1, 1, 1], dynamic_shared_bytes: 1 << 20 },
        Grid { blocks: [1, 65536, 1], dynamic_shared_bytes: 0 },
        Grid { blocks: [1, 1, 65536], dynamic_shared_bytes: 0 },
        Grid { blocks: [1 << 31, 1, 1], dynamic_shared_bytes: 0 },
        Grid { blocks: [0, 1, 1], dynamic_shared_bytes: 0 },
    ] {
        let error = device.launch(scale_add(&mut x, 1.0, 1), grid).unwrap_err();
        assert_eq!(error.code(), ErrorCode::InvalidParameter, "{error}");
    }
    assert!(device.is_healthy());
}

#[test]
#[ignore = "needs a GPU"]
fn wrong_images_are_refused() {
    let open = |images: &[KernelImage<'_>], kernels: &[&'static KernelDesc]| {
        Device::cuda(0, &KernelImages { images }, kernels).unwrap_err()
    };
    let error = open(&[], &[]);
    assert_eq!(error.code(), ErrorCode::InvalidDevice, "{error}");
    let fewer = PTX.replace("entry write_to_null", "entry other");
    let error = open(&[KernelImage { ptx: &fewer, ..IMAGE }], &[SCALE_ADD, WRITE_TO_NULL]);
    assert_eq!(error.code(), ErrorCode::ModelLoadFailed);
    assert!(error.to_string().contains("write_to_null is missing"), "{error}");
    let broken = PTX.replace("fma.rn.f32", "fma.rn.f33");
    let error = open(&[KernelImage { ptx: &broken, ..IMAGE }], &[SCALE_ADD]);
    assert_eq!(error.code(), ErrorCode::ModelLoadFailed);
    assert!(error.to_string().contains("ptxas"), "the driver's own log is not in {error}");
}

/// A fault ends the context for the whole process, so it happens in a process of its own.
#[test]
#[ignore = "needs a GPU"]
fn a_fault_stops_the_device_and_stays() {
    const CHILD: &str = "LOCKSTEP_TEST_FAULT";
    if std::env::var_os(CHILD).is_none() {
        let name = "device::cuda::tests::a_fault_stops_the_device_and_stays";
        let output = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", name, "--include-ignored"])
            .env(CHILD, "1")
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && text.contains("1 passed"), "{text}");
        return;
    }
    let device = gpu();
    let buffer = device.alloc::<f32>(4, MemoryKind::Other, "four").unwrap();
    device.launch(Launch::new(WRITE_TO_NULL), Grid::new_1d(1)).unwrap();
    let fault = device.synchronize().unwrap_err();
    assert_eq!(fault.code(), ErrorCode::InferenceFailed);
    assert!(fault.to_string().contains("ILLEGAL_ADDRESS"), "{fault}");
    assert!(!device.is_healthy());
    assert_eq!(device.download(&buffer), Err(fault.clone()));
    assert_eq!(device.launch(Launch::new(WRITE_TO_NULL), Grid::new_1d(1)), Err(fault.clone()));
    assert_eq!(device.verify_residency(), Err(fault));
}

/// A linear layer on the GPU with its input and weight on the host.
struct Layer {
    x: Vec<bf16>,
    rows: Vec<bf16>,
    on_device: Buffer<bf16>,
    weight: Weight,
    m: usize,
}

impl Layer {
    fn new(device: &Device, m: usize, n: usize, k: usize) -> Self {
        let mut rng = TestRng::new((m * 7919 + n * 31 + k) as u64);
        Self::holding(device, m, rng.bf16s(m * k), rng.bf16s(n * k))
    }

    fn holding(device: &Device, m: usize, x: Vec<bf16>, rows: Vec<bf16>) -> Self {
        let k = x.len() / m;
        let n = rows.len() / k;
        let buffer = device.alloc_from(&rows, MemoryKind::Weights, "rows").unwrap();
        let weight = device.prepare_weight(buffer, n, k, false).unwrap();
        Self { on_device: device.alloc_from(&x, MemoryKind::Activations, "x").unwrap(), x, rows, weight, m }
    }

    fn run<O: LinearOutput>(
        &self,
        device: &Device,
        rows: std::ops::Range<usize>,
        algorithm: Option<usize>,
    ) -> Result<Vec<O>, DeviceError> {
        let k = self.weight.k();
        let mut out = device.alloc_unwritten::<O>(rows.len() * self.weight.n(), MemoryKind::Activations, "out")?;
        let x = self.on_device.slice(rows.start * k..rows.end * k)?;
        match algorithm {
            None => device.linear(x, &self.weight, &mut out)?,
            Some(index) => device.linear_with_algorithm(index, x, &self.weight, &mut out)?,
        }
        device.download(&out)
    }

    fn check(&self, sums: &[f32], rounded: &[bf16]) {
        let (n, k) = (self.weight.n(), self.weight.k());
        assert!(sums.len() == self.m * n && rounded.len() == self.m * n);
        for index in 0..self.m * n {
            let (row, feature) = (index / n, index % n);
            let products = (0..k).map(|i| self.x[row * k + i].to_f64() * self.rows[feature * k + i].to_f64());
            let magnitude: f64 = products.clone().map(f64::abs).sum();
            let expected: f64 = products.sum();
            // A tensor core aligns 16 products to the largest and cuts what is below its 24 to 26 bits, at each step.
            let absolute = magnitude * (k as f64 / 16.0 + 1.0) * 16.0 / f64::from(1 << 24);
            assert_close(&[sums[index]], &[expected], Tolerance { absolute, relative: 0.0 });
            let absolute = absolute + Tolerance::BF16.absolute;
            assert_close(&[rounded[index]], &[expected], Tolerance { absolute, ..Tolerance::BF16 });
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn cublaslt_computes_the_product() {
    let device = gpu();
    assert!(device.linear_library().contains("cuBLASLt 1"), "{}", device.linear_library());
    assert_eq!(device.linear_backend(), LinearBackend::CublasLt);
    for (m, n, k) in [(1, 8, 16), (1, 64, 64), (3, 24, 40), (17, 128, 896), (64, 256, 72), (33, 1152, 256)] {
        let layer = Layer::new(&device, m, n, k);
        layer.check(&layer.run(&device, 0..m, None).unwrap(), &layer.run(&device, 0..m, None).unwrap());
    }
}

#[test]
#[ignore = "needs a GPU"]
fn cublaslt_computes_odd_shapes_or_refuses_them() {
    let device = gpu();
    for (m, n, k) in [(1, 1, 1), (5, 33, 72), (2, 7, 3), (3, 17, 31), (4, 16, 100)] {
        let layer = Layer::new(&device, m, n, k);
        match (layer.run(&device, 0..m, None), layer.run(&device, 0..m, None)) {
            (Ok(sums), Ok(rounded)) => layer.check(&sums, &rounded),
            (sums, rounded) => {
                for error in sums.err().into_iter().chain(rounded.err()) {
                    assert_eq!(error.code(), ErrorCode::KernelLaunchFailed, "{error}");
                }
            }
        }
    }
    assert!(device.is_healthy());
}

#[test]
#[ignore = "needs a GPU"]
fn every_algorithm_gives_every_row_its_bits() {
    let device = gpu();
    for (n, k) in [(256, 256), (896, 896), (1024, 512)] {
        let layer = Layer::new(&device, 64, n, k);
        let alone: Vec<f32> = (0..64).flat_map(|row| layer.run::<f32>(&device, row..row + 1, None).unwrap()).collect();
        for m in [1, 2, 3, 8, 17, 64] {
            let algorithms = device.linear_algorithms(n, k, m, OutputType::F32).unwrap();
            assert!(!algorithms.is_empty());
            for (index, text) in algorithms.iter().enumerate() {
                assert!(text.contains("split-K 1"), "{text}");
                let together = layer.run::<f32>(&device, 0..m, Some(index)).unwrap();
                assert_bits(&together, &alone[..m * n]);
            }
            let error = layer.run::<f32>(&device, 0..m, Some(algorithms.len())).unwrap_err();
            assert_eq!(error.code(), ErrorCode::InvalidParameter, "{error}");
        }
    }
}

/// Each part is the whole layer of its columns alone, with every algorithm and at every number of rows; and the planted
/// fault: a part's columns begun 16 too late are other bits.
#[test]
#[ignore = "needs a GPU"]
fn every_algorithm_gives_every_part_its_bits() {
    let device = gpu();
    for (n, k, segments) in [(896, 4864, 4), (128, 2048, 4), (1536, 8960, 2), (72, 256, 2)] {
        let layer = Layer::new(&device, 64, n, k);
        let part = k / segments;
        let columns = |values: &[bf16], first: usize| -> Vec<bf16> {
            values.chunks(k).flat_map(|row| &row[first..first + part]).copied().collect()
        };
        let alone = |first: usize| -> Vec<f32> {
            let layer = Layer::holding(&device, 64, columns(&layer.x, first), columns(&layer.rows, first));
            layer.run(&device, 0..64, None).unwrap()
        };
        let expected: Vec<Vec<f32>> = (0..segments).map(|segment| alone(segment * part)).collect();
        assert_ne!(alone(16), expected[0]);
        for m in [1, 2, 8, 9, 17, 64] {
            let algorithms = device.linear_algorithms(n, k, m, OutputType::Parts(segments)).unwrap();
            assert!(!algorithms.is_empty(), "{n} x {k} in {segments} segments, {m} rows");
            let x = layer.on_device.slice(..m * k).unwrap();
            for (index, text) in algorithms.iter().enumerate() {
                assert!(text.contains("split-K 1"), "{text}");
                let mut out = device.alloc_unwritten::<f32>(segments * m * n, MemoryKind::Activations, "out").unwrap();
                device.linear_parts_with_algorithm(index, x, &layer.weight, segments, &mut out).unwrap();
                let parts = device.download(&out).unwrap();
                for (part, expected) in parts.chunks(m * n).zip(&expected) {
                    assert_bits(part, &expected[..m * n]);
                }
            }
        }
    }
    assert!(device.linear_algorithms(8, 64, 1, OutputType::Parts(3)).is_err());
    assert!(device.linear_algorithms(8, 64, 1, OutputType::Parts(0)).is_err());
}

#[test]
#[ignore = "needs a GPU"]
fn threads_may_share_the_device() {
    let device = gpu();
    std::thread::scope(|scope| {
        for thread in 0..4_u32 {
            let device = device.clone();
            scope.spawn(move || {
                let layer = Layer::new(&device, 5, 64, 64);
                let expected = layer.run::<f32>(&device, 0..5, None).unwrap();
                for round in 0..20 {
                    let values = vec![thread * 100 + round; 777];
                    let buffer = device.alloc_from(&values, MemoryKind::Other, "values").unwrap();
                    assert_eq!(device.download(&buffer).unwrap(), values);
                    assert_bits(&layer.run(&device, 0..5, None).unwrap(), &expected);
                    device.verify_residency().unwrap();
                }
            });
        }
    });
    assert_eq!(device.tracker().count(), 0);
}

#[test]
#[ignore = "needs a GPU"]
fn the_backend_switch_stays() {
    let device = gpu();
    device.set_linear_backend(LinearBackend::Kernel);
    assert_eq!(device.clone().linear_backend(), LinearBackend::Kernel);
    device.set_linear_backend(LinearBackend::CublasLt);
    assert_eq!(device.linear_backend(), LinearBackend::CublasLt);
}

#[test]
#[ignore = "needs a GPU"]
fn a_stopwatch_counts_the_devices_time_and_not_the_hosts() {
    let device = gpu();
    let mut stopwatch = device.stopwatch().unwrap();
    assert!(stopwatch.elapsed().is_err());
    let mut memory = device.alloc::<u32>(64 << 20, MemoryKind::Other, "memory").unwrap();
    let mut timed = |fills: usize, nap: std::time::Duration| {
        device.synchronize().unwrap();
        let began = std::time::Instant::now();
        stopwatch.start().unwrap();
        for _ in 0..fills {
            device.fill_zero(&mut memory).unwrap();
        }
        stopwatch.stop().unwrap();
        device.synchronize().unwrap();
        // The host sleeps while the stopwatch has stopped: none of that is the device's.
        let most = began.elapsed();
        std::thread::sleep(nap);
        let elapsed = stopwatch.elapsed().unwrap();
        assert!(elapsed <= most, "{elapsed:?} of {most:?}");
        elapsed
    };
    let one = timed(1, std::time::Duration::from_millis(50));
    let twenty = timed(20, std::time::Duration::ZERO);
    assert!(!one.is_zero() && twenty > 5 * one, "{one:?} {twenty:?}");
}
