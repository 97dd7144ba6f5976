//! The GPU's bits against the CPU's, for every kernel without tensor cores.

use std::collections::BTreeMap;
use std::sync::Mutex;

use crate::rig::{Record, Rig};

/// Kernels whose products go through tensor cores, whose sums are rounded as the hardware likes.
const TENSOR_CORES: [&str; 39] = [
    "attention_decode_32",
    "attention_decode_64",
    "attention_decode_96",
    "attention_decode_128",
    "attention_decode_short_32",
    "attention_decode_short_64",
    "attention_decode_short_two_64",
    "attention_decode_short_96",
    "attention_decode_short_128",
    "attention_prefill_32",
    "attention_prefill_64",
    "attention_prefill_96",
    "attention_prefill_short_32",
    "attention_prefill_short_64",
    "attention_prefill_short_96",
    "attention_prefill_short_128",
    "attention_prefill_wide_64",
    "few_gate_up",
    "few_gate_up_wide",
    "few_logits",
    "few_qkv",
    "few_qkv_wide",
    "few_residual_1",
    "few_residual_2",
    "few_residual_4",
    "linear_bf16",
    "linear_f32",
    "tile_gate_up_16",
    "tile_gate_up_32",
    "tile_gate_up_64",
    "tile_logits_16",
    "tile_logits_32",
    "tile_logits_64",
    "tile_parts_16",
    "tile_parts_32",
    "tile_parts_64",
    "tile_qkv_16",
    "tile_qkv_32",
    "tile_qkv_64",
];

/// Kernels whose blocks wait for each other or for the copy engine, which the executor does not do. `decode_step` and `tiles` compare
/// them with the separate operations on a GPU, and so does the self-test, on every model of the GPU tests.
const GPU_ONLY: [&str; 23] = [
    "attention_groups_64",
    "attention_groups_short_64",
    "decode_step_32",
    "decode_step_64",
    "decode_step_long_32",
    "decode_step_long_64",
    "wgmma_gate_up_64",
    "wgmma_gate_up_128",
    "wgmma_gate_up_256",
    "wgmma_logits_64",
    "wgmma_logits_128",
    "wgmma_logits_256",
    "wgmma_long_gate_up_160",
    "wgmma_long_gate_up_256",
    "wgmma_long_qkv_1",
    "wgmma_long_qkv_3",
    "wgmma_long_residual_112",
    "wgmma_long_residual_224",
    "wgmma_parts_64",
    "wgmma_parts_128",
    "wgmma_parts_256",
    "wgmma_qkv",
    "wgmma_qkv_paired",
];

/// Cases and values of a kernel.
#[derive(Clone, Copy, Default)]
struct Covered {
    cases: usize,
    values: usize,
}

/// What the records cover, tensor-core kernels and those of a GPU alone left out. Panics when a kernel is missing.
#[track_caller]
fn coverage(records: &[Record]) -> BTreeMap<&'static str, Covered> {
    let names = kernels_gpu::KERNELS.iter().map(|kernel| kernel.name);
    let mut covered: BTreeMap<_, _> = names.map(|name| (name, Covered::default())).collect();
    for record in records {
        let entry = covered.get_mut(record.kernel).unwrap();
        entry.cases += 1;
        entry.values += record.bits.len();
    }
    for (name, entry) in covered.iter().filter(|(name, _)| !GPU_ONLY.contains(name)) {
        assert!(entry.cases > 0 && entry.values > 0, "no case covers {name}");
    }
    covered.retain(|name, _| !TENSOR_CORES.contains(name) && !GPU_ONLY.contains(name));
    assert_eq!(covered.len() + TENSOR_CORES.len() + GPU_ONLY.len(), kernels_gpu::KERNELS.len());
    covered
}

#[test]
fn cases_cover_every_kernel() {
    let mut rig = Rig::sabotaged(None);
    for (_, body) in super::BODIES {
        body(&mut rig);
    }
    coverage(&rig.records);
}

/// What differs between the records of a body's cases on a CPU and on a GPU.
fn differences(body: &str, cpu: &[Record], gpu: &[Record]) -> Vec<String> {
    // Kernels with tensor cores run other cases on a GPU, and some run nowhere else.
    let exact = |record: &&Record| !TENSOR_CORES.contains(&record.kernel) && !GPU_ONLY.contains(&record.kernel);
    let on_cpu: Vec<_> = cpu.iter().filter(exact).collect();
    let on_gpu: Vec<_> = gpu.iter().filter(exact).collect();
    assert_eq!(on_cpu.len(), on_gpu.len(), "{body}: the devices ran other cases");
    let mut faults = Vec::new();
    for (case, (a, b)) in on_cpu.iter().zip(&on_gpu).enumerate() {
        assert_eq!((a.kernel, a.bits.len()), (b.kernel, b.bits.len()), "{body}: the devices ran other cases");
        let places: Vec<usize> = (0..a.bits.len()).filter(|&index| a.bits[index] != b.bits[index]).collect();
        if let Some(&first) = places.first() {
            faults.push(format!(
                "{} (case {case} of {body}): {} of {} values differ, the first at {first}: CPU {:#x}, GPU {:#x}",
                a.kernel,
                places.len(),
                a.bits.len(),
                a.bits[first],
                b.bits[first]
            ));
        }
    }
    faults
}

#[test]
fn a_bit_that_differs_is_named() {
    let record = |bits: [u32; 3]| Record { kernel: "argmax", bits: bits.to_vec() };
    assert!(differences("body", &[record([1, 2, 3])], &[record([1, 2, 3])]).is_empty());
    let [fault] = &differences("body", &[record([1, 2, 3])], &[record([1, 6, 3])])[..] else { panic!("one fault") };
    assert!(
        fault.contains("argmax (case 0 of body): 1 of 3 values differ, the first at 1: CPU 0x2, GPU 0x6"),
        "{fault}"
    );
}

#[test]
#[ignore = "needs a GPU"]
fn the_gpu_gives_the_bits_of_the_cpu() {
    // Most of the time is the CPU's, and few bodies keep all of its cores busy.
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let (left, records, faults) =
        (Mutex::new(super::BODIES.iter().rev()), Mutex::new(Vec::new()), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let next = || left.lock().unwrap().next();
                while let Some((name, body)) = next() {
                    let (mut cpu, mut gpu) = (Rig::fast(), Rig::cuda());
                    body(&mut cpu);
                    body(&mut gpu);
                    faults.lock().unwrap().extend(differences(name, &cpu.records, &gpu.records));
                    records.lock().unwrap().append(&mut cpu.records);
                }
            });
        }
    });
    println!("{:<18} {:>6} {:>10}", "kernel", "cases", "values");
    for (name, entry) in coverage(&records.into_inner().unwrap()) {
        println!("{name:<18} {:>6} {:>10}", entry.cases, entry.values);
    }
    let faults = faults.into_inner().unwrap();
    assert!(faults.is_empty(), "bits differ:\n{}", faults.join("\n"));
}
