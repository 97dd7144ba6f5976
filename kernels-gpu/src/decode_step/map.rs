//! Where things are in a block's dynamic shared memory, in bytes: the ring's barriers first.

use super::attention::AT_ONCE;
use super::lookup::Phase;
use super::plan::{self, Shape};
use super::spans::SCRATCH_BYTES;
use super::{LAYER_WORDS, THREADS};
use crate::attention_decode::MAX_RATIO;
use crate::weight_ring::{CONTROL_BYTES, PAD};

/// Sums of squares of a row's four parts.
pub(super) const SQUARES: usize = CONTROL_BYTES;
/// The token's position, its page table, and the page that it is in.
pub(super) const TOKEN: usize = SQUARES + 16;
/// [`Phase`]s of a layer, and of the head.
pub(super) const PHASES: usize = TOKEN + 4 * 4;
/// Maxima and sums of spans.
pub(super) const STATISTICS: usize = PHASES + (plan::PHASES as usize + 1) * Phase::WORDS * 4;
/// Sums of segments.
pub(super) const PARTIALS: usize = STATISTICS + AT_ONCE * MAX_RATIO * 2 * 4;
/// Of each thread, its best token.
pub(super) const BEST: usize = PARTIALS + THREADS as usize * 4;
/// A record for each layer: its addresses, then the block's groups in each phase; then one for the head.
pub(super) const LAYERS: usize = (BEST + THREADS as usize * 8).next_multiple_of(16);
/// Bytes of a record.
pub(super) const LAYER_BYTES: usize = LAYER_WORDS * 8 + plan::PHASES as usize * 8;

// What is read as vectors, or as 64 bits, is aligned.
const _: () = {
    assert!(SQUARES.is_multiple_of(16) && TOKEN.is_multiple_of(16));
    assert!(PHASES.is_multiple_of(16) && (Phase::WORDS * 4).is_multiple_of(16));
    assert!(STATISTICS.is_multiple_of(8) && BEST.is_multiple_of(8));
    assert!(LAYERS.is_multiple_of(8) && LAYER_BYTES.is_multiple_of(8));
};

/// Where the rest starts, in bytes: it depends on the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Front {
    /// Normalised inputs, \[C + [`PAD`]\].
    pub normed: u32,
    /// Inputs of the down projection and the attention output layer, \[K + [`PAD`]\].
    pub collected: u32,
    /// Scratch memory of spans that blocks share.
    pub scratch: u32,
    /// The ring of weights.
    pub ring: u32,
}

impl Shape {
    /// What a block has in dynamic shared memory, with a model of so many layers. `long`: blocks share the spans of a context.
    #[must_use]
    pub const fn front(self, layers: u32, long: bool) -> Front {
        let widest = if self.query_width() > self.ffn { self.query_width() } else { self.ffn };
        let normed = (LAYERS as u32 + (layers + 1) * LAYER_BYTES as u32).next_multiple_of(128);
        let collected = normed + ((self.hidden + PAD) * 2).next_multiple_of(128);
        let scratch = collected + ((widest + PAD) * 2).next_multiple_of(128);
        Front { normed, collected, scratch, ring: scratch + if long { SCRATCH_BYTES as u32 } else { 0 } }
    }
}
