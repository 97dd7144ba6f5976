//! How a row of logits is sampled: one record of words per row, so that a step uploads all of it at once.

use cuda_std::prelude::*;

/// Words of a row's record: a multiple of 16 bytes.
pub const WORDS: usize = 12;

/// How a row is sampled.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RowParameters {
    /// Key of the random numbers.
    pub seed: u64,
    /// The position of the token that is drawn.
    pub position: u32,
    /// 0 keeps all.
    pub top_k: u32,
    /// Divides the logits; 0 leaves them as they are.
    pub temperature: f32,
    /// 1 keeps all.
    pub top_p: f32,
    /// 0 keeps all.
    pub min_p: f32,
    /// 1 changes nothing.
    pub repetition: f32,
    /// 0 changes nothing.
    pub frequency: f32,
    /// 0 changes nothing.
    pub presence: f32,
}

impl RowParameters {
    /// The record.
    #[must_use]
    pub fn words(self) -> [u32; WORDS] {
        [
            self.seed as u32,
            (self.seed >> 32) as u32,
            self.position,
            self.top_k,
            self.temperature.to_bits(),
            self.top_p.to_bits(),
            self.min_p.to_bits(),
            self.repetition.to_bits(),
            self.frequency.to_bits(),
            self.presence.to_bits(),
            0,
            0,
        ]
    }

    /// The record of `row` of u32 \[R, [`WORDS`]\], which starts at a multiple of 16 bytes.
    #[inline(always)]
    #[must_use]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub fn of_row(records: &In<u32>, row: usize) -> Self {
        let [seed_low, seed_high, position, top_k] = records.load(row * WORDS);
        let [temperature, top_p, min_p, repetition] = records.load(row * WORDS + 4);
        let [frequency, presence] = records.load(row * WORDS + 8);
        Self {
            seed: (u64::from(seed_high) << 32) | u64::from(seed_low),
            position,
            top_k,
            temperature: f32::from_bits(temperature),
            top_p: f32::from_bits(top_p),
            min_p: f32::from_bits(min_p),
            repetition: f32::from_bits(repetition),
            frequency: f32::from_bits(frequency),
            presence: f32::from_bits(presence),
        }
    }

    /// The logit after the temperature.
    #[inline(always)]
    #[must_use]
    pub fn scaled(&self, logit: f32) -> f32 {
        if self.temperature > 0.0 { logit / self.temperature } else { logit }
    }

    /// Whether no filter is on.
    #[inline(always)]
    #[must_use]
    pub fn keeps_all(&self) -> bool {
        let limited = self.top_k > 0 || self.top_p < 1.0 || self.min_p > 0.0;
        !limited
    }

    /// Whether top-p takes its part of the whole vocabulary's mass.
    #[inline(always)]
    #[must_use]
    pub fn needs_whole_mass(&self) -> bool {
        self.top_k == 0 && self.top_p < 1.0
    }
}
