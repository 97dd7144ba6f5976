//! Every kernel against formulas in f64, on the CPU in checked mode and as it is served, and on a GPU; and the GPU's bits
//! against the CPU's.
//!
//! One body per kernel serves all devices. Inputs lie in poisoned memory, outputs start as NaN between guard zones. The
//! tests on a GPU are ignored by default: `cargo test --test kernels -- --include-ignored`.
//!
//! | file | what it tests |
//! | --- | --- |
//! | `rows`, `elementwise` | embedding, gathering, normalisation; bias, residual, gate, comparison |
//! | `positions` | rotary embedding, the pages of the KV cache; both in one kernel |
//! | `attention` | prefill and decode |
//! | `linear`, `few`, `tiles` | linear layers; their fused forms, of few tokens and of many |
//! | `decode_step` | a whole step of one token in one kernel |
//! | `prefill` | the layers of a prefill: how long, and the same bits in parts |
//! | `logits`, `sample` | from logits to a token |
//! | `ptx` | the kernel images against the table of kernels |
//! | `bits` | the GPU's bits against the CPU's |
//! | `rig`, `compare` | devices and guarded memory; comparisons, and proof that they can fail |
#![allow(clippy::unwrap_used, reason = "tests")]

mod attention;
mod bits;
mod compare;
mod decode_step;
mod elementwise;
mod few;
mod linear;
mod logits;
mod positions;
mod prefill;
mod ptx;
mod rig;
mod rows;
mod sample;
mod tiles;

use rig::Rig;

/// Seeds of the order in which checked mode runs threads.
const SEEDS: [u64; 3] = [1, 2, 0x9e37_79b9];

macro_rules! on_every_device {
    (with canary: [$($name:ident: $body:path;)*] without: [$($more:ident: $other:path;)*]) => {
        on_every_device!(@tests $($name: $body;)* $($more: $other;)*);

        mod canary {
            $(#[test]
            fn $name() {
                crate::planted_faults_are_found($body);
            })*
        }
    };
    (@tests $($name:ident: $body:path;)*) => {
        /// Every body, for the comparison of bits.
        const BODIES: &[(&str, fn(&mut Rig))] = &[$((stringify!($name), $body)),*];

        mod checked {
            $(#[test]
            fn $name() {
                for seed in crate::SEEDS {
                    $body(&mut crate::Rig::checked(seed));
                }
            })*
        }
        mod fast {
            $(#[test]
            fn $name() {
                $body(&mut crate::Rig::fast());
            })*
        }
        mod cuda {
            $(#[test]
            #[ignore = "needs a GPU"]
            fn $name() {
                $body(&mut crate::Rig::cuda());
            })*
        }
    };
}

on_every_device! {
    with canary: [
    embedding: crate::rows::embedding;
    copy_words: crate::rows::copy_words;
    gather_rows: crate::rows::gather_rows;
    rms_norm: crate::rows::rms_norm;
    early_reads_see_uploads: crate::rows::early_reads_see_uploads;
    residual_norm: crate::rows::residual_norm;
    bias_add: crate::elementwise::bias_add;
    residual_add: crate::elementwise::residual_add;
    silu_mul: crate::elementwise::silu_mul;
    differing: crate::elementwise::differing;
    rotary: crate::positions::rotary;
    kv_write: crate::positions::kv_write;
    rotary_kv_write: crate::positions::rotary_kv_write;
    attention_company: crate::attention::company;
    attention_oracle: crate::attention::oracle;
    attention_bits: crate::attention::bits;
    attention_spans: crate::attention::spans;
    attention_causality: crate::attention::causality;
    linear_values: crate::linear::values;
    linear_rows: crate::linear::rows;
    linear_parts: crate::linear::parts;
    few_qkv: crate::few::qkv;
    few_gate_up: crate::few::gate_up;
    few_residual: crate::few::residual;
    few_logits: crate::few::logits;
    decode_step: crate::decode_step::steps;
    tile_qkv: crate::tiles::qkv;
    tile_parts: crate::tiles::parts;
    tile_gate_up: crate::tiles::gate_up;
    tile_logits: crate::tiles::logits;
    penalties: crate::logits::penalties;
    argmax: crate::logits::argmax;
    log_probs: crate::logits::log_probs;
    sample_filters: crate::sample::filters;
    sample_large: crate::sample::large;
    sample_shapes: crate::sample::shapes;
    sample_level: crate::sample::level;
    sample_edges: crate::sample::edges;
    ]
    // A wrong draw among thousands is no fault of a distribution.
    without: [sample_distribution: crate::sample::distribution;]
}

/// Runs a body with faults planted in its outputs; it must fail every time.
#[track_caller]
fn planted_faults_are_found(body: fn(&mut Rig)) {
    use rig::Sabotage::{Nan, OneWrong, Swapped, Zeros};

    let mut rig = Rig::sabotaged(None);
    body(&mut rig);
    assert!(rig.reads > 0, "the body reads no output");
    // A few outputs, the first and the last among them: all of them would take minutes.
    let places = (0..rig.reads).step_by(rig.reads.div_ceil(6)).chain([rig.reads - 1]).map(OneWrong);
    for sabotage in [Zeros, Nan, Swapped].into_iter().chain(places) {
        let run = move || body(&mut Rig::sabotaged(Some(sabotage)));
        assert!(std::panic::catch_unwind(run).is_err(), "{sabotage:?} passed");
    }
}
