//! Tensor maps, which the driver encodes.

use cudarc::driver::sys;

use super::context::Context;
use crate::device::{DeviceError, Dimension, TENSOR_MAP_WORDS};

/// The tensor map of bf16 at `address`, which stand there in these dimensions.
pub(super) fn encode(
    context: &Context,
    address: u64,
    dimensions: &[Dimension],
) -> Result<[u64; TENSOR_MAP_WORDS], DeviceError> {
    let refused = |_| DeviceError::InvalidParameter(format!("{dimensions:?} is beyond a tensor map"));
    let rank = u32::try_from(dimensions.len()).map_err(refused)?;
    let lengths: Vec<u64> = dimensions.iter().map(|one| one.len as u64).collect();
    // The innermost has none. In bytes.
    let strides: Vec<u64> = dimensions[1..].iter().map(|one| one.stride as u64 * 2).collect();
    let boxed: Result<Vec<u32>, _> = dimensions.iter().map(|one| u32::try_from(one.boxed)).collect();
    let boxed = boxed.map_err(refused)?;
    let steps = vec![1_u32; dimensions.len()];
    context.enter()?;
    let mut map = sys::CUtensorMap { opaque: [0; TENSOR_MAP_WORDS] };
    // SAFETY: the arrays have `rank` elements, the strides one less, as the driver reads them; it writes one map and keeps nothing.
    // The address is not followed here.
    let result = unsafe {
        sys::cuTensorMapEncodeTiled(
            &raw mut map,
            sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            rank,
            std::ptr::with_exposed_provenance_mut(address as usize),
            lengths.as_ptr(),
            strides.as_ptr(),
            boxed.as_ptr(),
            steps.as_ptr(),
            sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
            sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
            sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    };
    context.check(result, DeviceError::InvalidParameter, &format!("a tensor map of {dimensions:?}"))?;
    Ok(map.opaque)
}
