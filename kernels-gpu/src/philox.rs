//! Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC11): random words as a
//! pure function of a counter and a key, so that a draw needs no state.

/// Four random words for a counter and a key.
#[inline(always)]
#[must_use]
pub fn philox4x32_10(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let [mut c0, mut c1, mut c2, mut c3] = counter;
    let [mut k0, mut k1] = key;
    let mut round = 0;
    while round < 10 {
        let first = u64::from(c0) * 0xd251_1f53;
        let second = u64::from(c2) * 0xcd9e_8d57;
        (c0, c1, c2, c3) =
            ((second >> 32) as u32 ^ c1 ^ k0, second as u32, (first >> 32) as u32 ^ c3 ^ k1, first as u32);
        k0 = k0.wrapping_add(0x9e37_79b9);
        k1 = k1.wrapping_add(0xbb67_ae85);
        round += 1;
    }
    [c0, c1, c2, c3]
}

/// Gumbel noise for a token: -ln(-ln u), u uniform in the open unit interval with 23 bits, keyed by (seed, position, id).
#[inline(always)]
#[must_use]
pub fn gumbel(seed: u64, position: u32, id: u32) -> f32 {
    let words = words(seed, position, id / 4);
    noise(match id % 4 {
        0 => words[0],
        1 => words[1],
        2 => words[2],
        _ => words[3],
    })
}

/// [`gumbel`] for the four tokens from 4 `quad` on, for the price of one in random words.
#[inline(always)]
#[must_use]
pub fn gumbel_quad(seed: u64, position: u32, quad: u32) -> [f32; 4] {
    let words = words(seed, position, quad);
    [noise(words[0]), noise(words[1]), noise(words[2]), noise(words[3])]
}

#[inline(always)]
fn words(seed: u64, position: u32, quad: u32) -> [u32; 4] {
    philox4x32_10([quad, position, 0, 0], [seed as u32, (seed >> 32) as u32])
}

#[inline(always)]
fn noise(word: u32) -> f32 {
    let u = ((word >> 9) as f32 + 0.5) * (1.0 / 8_388_608.0);
    -cuda_std::math::ln(-cuda_std::math::ln(u))
}
