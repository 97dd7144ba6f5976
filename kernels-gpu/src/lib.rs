//! Every GPU kernel of Lockstep, one operation per file. The same source runs on a GPU (as PTX) and on the CPU (under the
//! executor of `cuda_std`). Kernels know no model and allocate nothing; the host's `ops` checks shapes and picks grids.
//!
//! Letters in the docs: T tokens (rows) of a step, C model width, H query heads, G KV heads, D head width, F feed-forward
//! width, V vocabulary, R rows of logits; M, N, K tokens, outputs and inputs of a linear layer. Upper case for sizes,
//! lower case for indices. Arrays are row-major.
//!
//! | file | kernels |
//! | --- | --- |
//! | `embedding` | token ids to the residual stream |
//! | `rms_norm`, `residual_norm` | normalisation, by itself and of a sum |
//! | `linear` | linear layers: the tensor-core chain, and a plain one |
//! | `rotary_kv_write` | between the QKV layer and attention; `bias_add`, `rotary`, `kv_write` define it |
//! | `attention` | the definition; `attention_prefill`, `attention_groups` (on Hopper), `attention_decode` and `attention_decode_short` meet it |
//! | `residual_add`, `silu_mul` (`silu_table`: fast on Hopper) | around the feed-forward layers |
//! | `gather_rows` | the rows whose logits are needed |
//! | `copy_words` | few words: a step's indices, chosen tokens |
//! | `penalties`, `argmax`, `sample`, `log_probs` | from logits to a token (`rank`, `distance`, `row_parameters`, `philox`, `quads`: their parts) |
//! | `candidates`, `masses`, `choose` | `sample`, fast on a GPU |
//! | `few` | what the linear layers of few tokens share; each is fused with its neighbours in `few_qkv`, `few_residual`, `few_gate_up`, `few_logits` |
//! | `decode_step` | a whole step of one token in one kernel (`weight_ring`: its weights) |
//! | `tiles` | the linear layers of many tokens, with what stands behind them: `tile_qkv`, `tile_parts`, `tile_gate_up`, `tile_logits` |
//! | `warpgroup_tiles` | the same on Hopper, from more rows on: `wgmma_qkv`, `wgmma_parts`, `wgmma_gate_up`, `wgmma_logits` |
//! | `wgmma_long_qkv`, `wgmma_long_gate_up`, `wgmma_long_residual` | the same for prefills |
//! | `differing` | bit comparison, for the self-test |
#![cfg_attr(target_arch = "nvptx64", no_std)]
#![cfg_attr(target_arch = "nvptx64", feature(abi_ptx, asm_experimental_arch))]
#![allow(
    clippy::needless_range_loop,
    reason = "index loops over small arrays unroll into registers; the index is the lane's arithmetic"
)]

pub mod argmax;
pub mod attention;
pub mod attention_decode;
pub mod attention_decode_short;
pub mod attention_groups;
pub mod attention_prefill;
pub mod bias_add;
pub mod candidates;
pub mod choose;
pub mod copy_words;
pub mod decode_step;
pub mod differing;
pub mod distance;
pub mod embedding;
pub mod few;
pub mod few_gate_up;
pub mod few_logits;
pub mod few_qkv;
pub mod few_residual;
pub mod gather_rows;
pub mod kv_write;
pub mod linear;
pub mod log_probs;
pub mod masses;
pub mod penalties;
pub mod philox;
pub mod quads;
pub mod rank;
pub mod residual_add;
pub mod residual_norm;
pub mod rms_norm;
pub mod rotary;
pub mod rotary_kv_write;
pub mod row_parameters;
pub mod sample;
pub mod silu_mul;
mod silu_table;
pub mod tile_gate_up;
pub mod tile_logits;
pub mod tile_parts;
pub mod tile_qkv;
pub mod tiles;
pub mod warpgroup_tiles;
pub mod weight_ring;
pub mod wgmma_gate_up;
pub mod wgmma_logits;
pub mod wgmma_long_gate_up;
pub mod wgmma_long_qkv;
pub mod wgmma_long_residual;
pub mod wgmma_parts;
pub mod wgmma_qkv;

/// Every kernel: what the host checks the PTX against.
#[cfg(not(target_arch = "nvptx64"))]
pub const KERNELS: &[&cuda_std::launch::KernelDesc] = &[
    argmax::argmax::KERNEL,
    attention_decode::attention_decode_32::KERNEL,
    attention_decode::attention_decode_64::KERNEL,
    attention_decode::attention_decode_96::KERNEL,
    attention_decode::attention_decode_128::KERNEL,
    attention_decode_short::attention_decode_short_32::KERNEL,
    attention_decode_short::attention_decode_short_64::KERNEL,
    attention_decode_short::attention_decode_short_two_64::KERNEL,
    attention_decode_short::attention_decode_short_96::KERNEL,
    attention_decode_short::attention_decode_short_128::KERNEL,
    attention_groups::attention_groups_64::KERNEL,
    attention_groups::attention_groups_short_64::KERNEL,
    attention_prefill::attention_prefill_32::KERNEL,
    attention_prefill::attention_prefill_64::KERNEL,
    attention_prefill::attention_prefill_96::KERNEL,
    attention_prefill::attention_prefill_short_32::KERNEL,
    attention_prefill::attention_prefill_short_64::KERNEL,
    attention_prefill::attention_prefill_short_96::KERNEL,
    attention_prefill::attention_prefill_short_128::KERNEL,
    attention_prefill::attention_prefill_wide_64::KERNEL,
    bias_add::bias_add::KERNEL,
    candidates::sample_candidates::KERNEL,
    choose::sample_choose::KERNEL,
    decode_step::decode_step_32::KERNEL,
    decode_step::decode_step_64::KERNEL,
    decode_step::decode_step_long_32::KERNEL,
    decode_step::decode_step_long_64::KERNEL,
    differing::differing_bf16::KERNEL,
    differing::differing_f32::KERNEL,
    embedding::embedding::KERNEL,
    few_logits::few_argmax::KERNEL,
    few_gate_up::few_gate_up::KERNEL,
    few_gate_up::few_gate_up_wide::KERNEL,
    few_logits::few_logits::KERNEL,
    few_qkv::few_qkv::KERNEL,
    few_qkv::few_qkv_wide::KERNEL,
    few_residual::few_residual_1::KERNEL,
    few_residual::few_residual_2::KERNEL,
    few_residual::few_residual_4::KERNEL,
    copy_words::copy_words::KERNEL,
    gather_rows::gather_rows::KERNEL,
    kv_write::kv_write::KERNEL,
    linear::linear_bf16::KERNEL,
    linear::linear_f32::KERNEL,
    linear::linear_plain::KERNEL,
    log_probs::log_probs::KERNEL,
    masses::sample_masses::KERNEL,
    penalties::penalties::KERNEL,
    residual_add::residual_add::KERNEL,
    residual_add::residual_add_2::KERNEL,
    residual_add::residual_add_4::KERNEL,
    residual_norm::residual_norm::KERNEL,
    residual_norm::residual_norm_2::KERNEL,
    residual_norm::residual_norm_4::KERNEL,
    rms_norm::rms_norm::KERNEL,
    rotary::rotary::KERNEL,
    rotary_kv_write::rotary_kv_write::KERNEL,
    sample::sample::KERNEL,
    silu_mul::silu_mul::KERNEL,
    tile_gate_up::tile_gate_up_16::KERNEL,
    tile_gate_up::tile_gate_up_32::KERNEL,
    tile_gate_up::tile_gate_up_64::KERNEL,
    tile_logits::tile_logits_16::KERNEL,
    tile_logits::tile_logits_32::KERNEL,
    tile_logits::tile_logits_64::KERNEL,
    tile_parts::tile_parts_16::KERNEL,
    tile_parts::tile_parts_32::KERNEL,
    tile_parts::tile_parts_64::KERNEL,
    tile_qkv::tile_qkv_16::KERNEL,
    tile_qkv::tile_qkv_32::KERNEL,
    tile_qkv::tile_qkv_64::KERNEL,
    wgmma_gate_up::wgmma_gate_up_64::KERNEL,
    wgmma_gate_up::wgmma_gate_up_128::KERNEL,
    wgmma_gate_up::wgmma_gate_up_256::KERNEL,
    wgmma_logits::wgmma_logits_64::KERNEL,
    wgmma_logits::wgmma_logits_128::KERNEL,
    wgmma_logits::wgmma_logits_256::KERNEL,
    wgmma_long_gate_up::wgmma_long_gate_up_160::KERNEL,
    wgmma_long_gate_up::wgmma_long_gate_up_256::KERNEL,
    wgmma_long_qkv::wgmma_long_qkv_1::KERNEL,
    wgmma_long_qkv::wgmma_long_qkv_3::KERNEL,
    wgmma_long_residual::wgmma_long_residual_112::KERNEL,
    wgmma_long_residual::wgmma_long_residual_224::KERNEL,
    wgmma_parts::wgmma_parts_64::KERNEL,
    wgmma_parts::wgmma_parts_128::KERNEL,
    wgmma_parts::wgmma_parts_256::KERNEL,
    wgmma_qkv::wgmma_qkv::KERNEL,
    wgmma_qkv::wgmma_qkv_paired::KERNEL,
];

/// Kernels that only define what a fused one computes: tests compare with them, no model launches them.
#[cfg(not(target_arch = "nvptx64"))]
pub const DEFINITIONS: [&str; 3] = ["bias_add", "kv_write", "rotary"];

/// The kernels that a model with heads of `head_width` elements needs, [`DEFINITIONS`] left out: a device that is opened with
/// fewer kernels is ready sooner.
#[cfg(not(target_arch = "nvptx64"))]
pub fn kernels_for(head_width: usize) -> Vec<&'static cuda_std::launch::KernelDesc> {
    let suits = |name: &str| {
        let width = name
            .strip_prefix("attention_")
            .or_else(|| name.strip_prefix("decode_step_"))
            .and_then(|rest| rest.rsplit('_').next());
        width.is_none_or(|width| width.parse() == Ok(head_width)) && !DEFINITIONS.contains(&name)
    };
    KERNELS.iter().copied().filter(|kernel| suits(kernel.name)).collect()
}

#[cfg(target_arch = "nvptx64")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // Bounds are checked before every access; should a check be wrong, end the kernel rather than go on.
    // SAFETY: `trap` has no operands and does not return.
    unsafe { core::arch::asm!("trap;", options(noreturn, nostack)) }
}
