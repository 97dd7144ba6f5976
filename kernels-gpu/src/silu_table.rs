//! SiLU of ordinary gates as a table in shared memory: a gate is a bf16, of which there are few, and to look it up takes a quarter of
//! the instructions that computing it does. The bits are the same.

use cuda_std::prelude::*;

use crate::silu_mul::{LEAST, MOST, silu_ordinary};

/// Twice the least ordinary gate's magnitude: gates stand in order of their magnitudes, each before its negative.
const FIRST: u32 = LEAST as u32 * 2;

/// Ordinary gates.
const GATES: usize = (MOST - LEAST + 1) as usize * 2;

/// The place of a gate that is not ordinary.
pub(crate) const NONE: u32 = GATES as u32;

/// Elements of the table: a place for all others, and what makes a multiple of 16 bytes of it.
pub(crate) const LEN: usize = (GATES + 1).next_multiple_of(4);

/// Places of two gates that a word holds, the low half's first.
#[inline(always)]
pub(crate) fn places(pair: u32) -> [u32; 2] {
    // Each half turned by a bit, which brings the sign behind the magnitude.
    let turned = pair << 1 & 0xfffe_fffe | pair >> 15 & 0x0001_0001;
    [turned & 0xffff, turned >> 16].map(|gate| {
        let place = gate.wrapping_sub(FIRST);
        if place < NONE { place } else { NONE }
    })
}

/// The gate with this place.
#[inline(always)]
fn gate(place: u32) -> bf16 {
    let turned = place + FIRST;
    bf16::from_bits((turned >> 1 | turned << 15) as u16)
}

/// Makes the table, with `threads` threads of which this is one. A barrier of theirs follows before anybody reads it.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub(crate) fn fill(table: &Shared<f32>, thread: usize, threads: usize) {
    let mut place = thread;
    while place < GATES {
        table.set(place, silu_ordinary(gate(place as u32)));
        place += threads;
    }
    if thread == 0 {
        table.set(GATES, 0.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::silu_mul::is_ordinary;

    #[test]
    fn every_ordinary_gate_has_a_place_of_its_own() {
        let mut taken = [false; GATES];
        for bits in 0..=u16::MAX {
            for (other, half) in [(0, 0), (0xffff, 0), (0x3f80, 0), (0, 1), (0xffff, 1), (0x3f80, 1)] {
                let pair = u32::from(bits) << (16 * half) | other << (16 * (1 - half));
                let place = places(pair)[half as usize];
                if is_ordinary(bf16::from_bits(bits)) {
                    assert_eq!(gate(place).to_bits(), bits);
                    taken[place as usize] = true;
                } else {
                    assert_eq!(place, NONE, "{bits:x}");
                }
            }
        }
        assert!(taken.into_iter().all(|taken| taken) && GATES < LEN);
    }
}
