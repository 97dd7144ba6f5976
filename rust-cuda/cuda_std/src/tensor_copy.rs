//! Copies of a box of a matrix from global to shared memory, made by the copy engine of a multiprocessor from a description of the
//! matrix (PTX's tensor map, 128 bytes that the host encodes), and clusters of blocks, into all of which such a copy can go at once
//! (compute capability 9.0 and later).
//!
//! Rows of a box are 128 bytes and land with the 128-byte swizzle, as [`wgmma`](crate::wgmma) reads them; what is outside the matrix
//! arrives as zeros. Destinations are multiples of 1024 bytes.

use crate::bulk::{self, Barriers};
use crate::{Element, In, Shared};

/// Which block of its cluster this one is.
#[inline(always)]
#[must_use]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn cluster_rank() -> u32 {
    #[cfg(all(target_arch = "nvptx64", target_feature = "sm_90"))]
    {
        let rank: u32;
        // SAFETY: reads a special register.
        unsafe {
            core::arch::asm!("mov.u32 {}, %cluster_ctarank;", out(reg32) rank, options(pure, nomem, nostack));
        }
        rank
    }
    #[cfg(not(all(target_arch = "nvptx64", target_feature = "sm_90")))]
    bulk::unsupported()
}

/// Waits for all threads of the cluster's blocks. It orders barriers that were initialised before it
/// ([`Barriers::publish`]), and no other memory: that would cost a way to global memory.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn sync_cluster() {
    #[cfg(all(target_arch = "nvptx64", target_feature = "sm_90"))]
    // SAFETY: a barrier.
    unsafe {
        core::arch::asm!("barrier.cluster.arrive.relaxed;", "barrier.cluster.wait;", options(nostack));
    }
    #[cfg(not(all(target_arch = "nvptx64", target_feature = "sm_90")))]
    bulk::unsupported()
}

/// Arrives at the barrier with this index of block `rank` of the cluster. It says that products and copies are over, and orders no
/// memory that the thread itself wrote: at the scope of a cluster that would cost half a microsecond.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn arrive_at(barriers: &Barriers, index: usize, rank: u32) {
    #[cfg(all(target_arch = "nvptx64", target_feature = "sm_90"))]
    // SAFETY: a barrier's 8 bytes, inside the array of the other block, which is laid out as this one's (the kernel's duty).
    unsafe {
        core::arch::asm!(
            "{{ .reg .b32 there; mapa.shared::cluster.u32 there, {}, {};",
            "mbarrier.arrive.shared::cluster.b64 _, [there]; }}",
            in(reg32) barriers.address_of(index), in(reg32) rank, options(nostack));
    }
    #[cfg(not(all(target_arch = "nvptx64", target_feature = "sm_90")))]
    {
        let _ = (barriers, index, rank);
        bulk::unsupported()
    }
}

/// Says that copies will follow from this map: the first one waits for its description otherwise.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn prefetch_map(map: &In<'_, u64>) {
    #[cfg(all(target_arch = "nvptx64", target_feature = "sm_90"))]
    // SAFETY: a hint about memory that is there.
    unsafe {
        core::arch::asm!("prefetch.tensormap [{}];", in(reg64) map.address_unchecked(0), options(nostack));
    }
    #[cfg(not(all(target_arch = "nvptx64", target_feature = "sm_90")))]
    {
        let _ = map;
        bulk::unsupported()
    }
}

macro_rules! copies {
    ($($(#[$doc:meta])* $name:ident, $dimensions:literal, [$($at:ident)*];)*) => {$(
        $(#[$doc])*
        ///
        /// `blocks` are the blocks of the cluster that get it, a bit for each rank: into the same place of each, with word to the
        /// barrier with the same index of each.
        ///
        /// # Safety
        /// `map` is a tensor map of a matrix that is there, with boxes as large as the destination is; nobody touches the
        /// destinations until the barriers' phases are over, and what was done to them before is ordered before this call.
        #[inline(always)]
        #[expect(clippy::too_many_arguments, reason = "the coordinates are arguments")]
        #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
        pub unsafe fn $name<T: Element>(
            destination: &Shared<T>,
            to: usize,
            map: &In<'_, u64>,
            $($at: u32,)*
            barriers: &Barriers,
            index: usize,
            blocks: Option<u16>,
        ) {
            #[cfg(all(target_arch = "nvptx64", target_feature = "sm_90"))]
            // SAFETY: this function's contract.
            unsafe {
                match blocks {
                    None => core::arch::asm!(
                        copies!(@text $dimensions "" ["{to}], [{map}"] $($at)*, ";"),
                        to = in(reg32) destination.address_of(to), map = in(reg64) map.address_unchecked(0),
                        $($at = in(reg32) $at,)*
                        barrier = in(reg32) barriers.address_of(index), options(nostack)),
                    Some(blocks) => core::arch::asm!(
                        copies!(@text $dimensions ".multicast::cluster" ["{to}], [{map}"] $($at)*, ", {blocks};"),
                        to = in(reg32) destination.address_of(to), map = in(reg64) map.address_unchecked(0),
                        $($at = in(reg32) $at,)*
                        barrier = in(reg32) barriers.address_of(index), blocks = in(reg16) blocks, options(nostack)),
                }
            }
            #[cfg(not(all(target_arch = "nvptx64", target_feature = "sm_90")))]
            {
                let _ = (destination, to, map, $($at,)* barriers, index, blocks);
                bulk::unsupported()
            }
        }
    )*};
    (@text $dimensions:literal $multicast:literal [$place:literal] $first:ident $($at:ident)*, $end:literal) => {
        concat!(
            "cp.async.bulk.tensor.", $dimensions, ".shared::cluster.global.tile.mbarrier::complete_tx::bytes", $multicast, " [",
            $place, ", {{{", stringify!($first), "}", $(", {", stringify!($at), "}",)* "}}], [{barrier}]", $end
        )
    };
}
copies! {
    /// Starts to copy the box of a matrix that begins at column `column` of row `row`.
    copy_rows, "2d", [column row];
    /// Starts to copy the box that begins at column `column` of row `row` of eight, of matrix `part`, of the eights from
    /// `eight` on: see the host's description.
    copy_eights, "4d", [column row part eight];
    /// As [`copy_eights`], with `part` a half of head `head`, whose eights are counted by themselves.
    copy_halves, "5d", [column row part eight head];
    /// Starts to copy the box that begins at column `column` of the rows that three dimensions number, from `block` on, where the
    /// matrix's rows are to stand in another order than it has them: see the host's description.
    copy_woven, "5d", [column one few some block];
}
