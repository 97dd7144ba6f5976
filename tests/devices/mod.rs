//! The devices that whole-system tests run on.

#![allow(dead_code, reason = "each test file uses some of these")]

use host::device::{CpuOptions, Device, KernelImage, KernelImages};

/// The CPU, as it serves.
pub(crate) fn cpu() -> Device {
    Device::cpu(CpuOptions::default()).unwrap()
}

/// The CPU with linear layers by tensor-core kernels, as on a GPU.
pub(crate) fn cpu_like_a_gpu() -> Device {
    Device::cpu(CpuOptions { tensor_cores: true, ..CpuOptions::default() }).unwrap()
}

/// The first GPU, with the kernels of this build.
pub(crate) fn cuda() -> Device {
    let images = KernelImages {
        images: &[
            KernelImage { sm: 80, arch_specific: false, ptx: include_str!(env!("LOCKSTEP_PTX_SM_80")) },
            KernelImage { sm: 90, arch_specific: true, ptx: include_str!(env!("LOCKSTEP_PTX_SM_90A")) },
        ],
    };
    Device::cuda(0, &images, kernels_gpu::KERNELS).unwrap()
}
