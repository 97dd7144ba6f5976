//! Rotary position embedding: the table of cosines and sines that the kernels read.
//!
//! The inverse frequencies follow the float32 steps of the reference implementation (transformers on PyTorch): one
//! power, one reciprocal, then the scaling. Power, cosine and sine are taken in f64 by the portable `libm` and rounded
//! once, so every machine builds the same bits; PyTorch's own power is off by one last place here and there, and that is
//! the only difference left.

/// How positions become angles.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rope {
    /// The base of the geometric series of wavelengths.
    pub theta: f32,
    /// How the frequencies are stretched for contexts longer than the model was first trained on.
    pub scaling: RopeScaling,
}

/// A stretching of the frequencies.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    /// None (`default`).
    None,
    /// Every frequency divided by `factor`.
    Linear {
        /// At least 1 in practice.
        factor: f64,
    },
    /// Llama 3: long wavelengths divided by `factor`, short ones kept, a ramp between.
    Llama3 {
        /// What the long wavelengths are divided by.
        factor: f64,
        /// `original_positions / low_freq_factor` is the wavelength above which frequencies are divided.
        low_freq_factor: f64,
        /// `original_positions / high_freq_factor` is the wavelength below which frequencies are kept.
        high_freq_factor: f64,
        /// The context length before the stretching.
        original_positions: u32,
    },
}

impl Rope {
    /// The angle per position of each of the `head_width / 2` pairs, in radians.
    #[must_use]
    pub fn inverse_frequencies(&self, head_width: usize) -> Vec<f32> {
        let width = head_width as f32;
        (0..head_width / 2).map(|pair| self.scaled(self.inverse_frequency((2 * pair) as f32 / width))).collect()
    }

    fn inverse_frequency(&self, exponent: f32) -> f32 {
        1.0 / (libm::pow(f64::from(self.theta), f64::from(exponent)) as f32)
    }

    fn scaled(&self, frequency: f32) -> f32 {
        match self.scaling {
            RopeScaling::None => frequency,
            RopeScaling::Linear { factor } => frequency / factor as f32,
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_positions } => {
                let original = f64::from(original_positions);
                // A number divided by a tensor is, in PyTorch, the reciprocal times the number: two roundings.
                let wavelength = (1.0 / frequency) * std::f64::consts::TAU as f32;
                let long_above = (original / low_freq_factor) as f32;
                let short_below = (original / high_freq_factor) as f32;
                if wavelength > long_above {
                    frequency / factor as f32
                } else if wavelength < short_below {
                    frequency
                } else {
                    let smooth = ((1.0 / wavelength) * original as f32 - low_freq_factor as f32)
                        / (high_freq_factor - low_freq_factor) as f32;
                    (1.0 - smooth) * frequency / factor as f32 + smooth * frequency
                }
            }
        }
    }

    /// Cosine and sine of every angle below `positions`.
    #[must_use]
    pub fn table(&self, positions: usize, head_width: usize) -> RopeTable {
        let frequencies = self.inverse_frequencies(head_width);
        let mut pairs = Vec::with_capacity(positions * frequencies.len());
        for position in 0..positions {
            pairs.extend(frequencies.iter().map(|frequency| {
                let angle = f64::from(position as f32 * frequency);
                [libm::cos(angle) as f32, libm::sin(angle) as f32]
            }));
        }
        RopeTable { pairs, positions, pairs_per_position: frequencies.len() }
    }
}

/// Cosines and sines, `[positions][head_width / 2]` of (cosine, sine).
#[derive(Clone, Debug, PartialEq)]
pub struct RopeTable {
    pairs: Vec<[f32; 2]>,
    positions: usize,
    pairs_per_position: usize,
}

impl RopeTable {
    /// All pairs; pair `i` of position `p` is at `p * pairs_per_position() + i`.
    #[must_use]
    pub fn pairs(&self) -> &[[f32; 2]] {
        &self.pairs
    }

    /// The same numbers in a row: cosine, sine, cosine, ...
    #[must_use]
    pub fn as_flat(&self) -> &[f32] {
        self.pairs.as_flattened()
    }

    /// Positions covered.
    #[must_use]
    pub fn positions(&self) -> usize {
        self.positions
    }

    /// Half the head width.
    #[must_use]
    pub fn pairs_per_position(&self) -> usize {
        self.pairs_per_position
    }
}

#[cfg(test)]
mod tests {
    //! The goldens come from transformers 5.23.0 on PyTorch 2.15.0 (CPU, float32):
    //! `r = LlamaRotaryEmbedding(LlamaConfig(hidden_size=d, num_attention_heads=1, head_dim=d, rope_parameters=...))`,
    //! then `r.inv_freq.view(torch.int32)` and `r(torch.zeros(1), positions)`.
    use super::*;

    /// (position, pair, cosine, sine)
    type Angles = &'static [(usize, usize, f32, f32)];

    const LLAMA3: RopeScaling =
        RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_positions: 8192 };

    #[rustfmt::skip]
    const QWEN64_INVERSE: &[u32] = &[
        0x3f80_0000, 0x3f26_3de0, 0x3ed7_e89b, 0x3e8c_3504, 0x3e36_1887, 0x3dec_7fd6, 0x3d99_940d, 0x3d47_763f,
        0x3d01_86e3, 0x3ca8_398b, 0x3c5a_7bf2, 0x3c0d_e12d, 0x3bb8_449c, 0x3b6f_520e, 0x3b1b_690d, 0x3ac9_d75c,
        0x3a83_126f, 0x3a2a_3b44, 0x39dd_1725, 0x398f_9272, 0x393a_7753, 0x38f2_2ce2, 0x389d_43a4, 0x384c_3fbe,
        0x3804_a2b2, 0x37ac_431d, 0x375f_ba4f, 0x3711_48e3, 0x36bc_b0c1, 0x3675_1070, 0x361f_23e4, 0x35ce_af79,
    ];
    const QWEN64_ANGLES: Angles = &[
        (1, 0, 0.54030234, 0.84147096),
        (1, 1, 0.7964579, 0.604694),
        (1, 16, 0.9999995, 0.0009999999),
        (1, 31, 1.0, 1.5399265e-06),
        (4095, 0, -0.065975994, -0.9978212),
        (4095, 1, 0.13994694, 0.990159),
        (4095, 16, -0.5789079, -0.8153929),
        (4095, 31, 0.9999801, 0.006305957),
    ];
    #[rustfmt::skip]
    const D96_INVERSE: &[u32] = &[
        0x3f80_0000, 0x3f53_4db0, 0x3f2e_6928, 0x3f0f_f59a, 0x3eed_a63c, 0x3ec4_2822, 0x3ea1_e89b, 0x3e85_a3da,
        0x3e5c_9d35, 0x3e36_1887, 0x3e16_4d7a, 0x3df8_1eef, 0x3dcc_cccd, 0x3da9_0af3, 0x3d8b_8754, 0x3d66_55c2,
        0x3d3e_1e95, 0x3d1c_ece9, 0x3d01_86e3, 0x3cd5_d2f6, 0x3cb0_7dc7, 0x3c91_ad39, 0x3c70_7bf6, 0x3c46_7f28,
        0x3c23_d70a, 0x3c07_3bf8, 0x3bdf_3ee9, 0x3bb8_449c, 0x3b98_187a, 0x3b7b_14a3, 0x3b4f_3e38, 0x3b2b_0f2e,
        0x3b0d_3169, 0x3ae9_1528, 0x3ac0_632e, 0x3a9e_cc1d, 0x3a83_126f, 0x3a58_5ff2, 0x3a32_98ba, 0x3a13_6a16,
        0x39f3_5a5c, 0x39c8_dd4f, 0x39a5_cb60, 0x3988_d8f2, 0x3961_e8a7, 0x393a_7753, 0x3919_e8f2, 0x38fe_1363,
    ];
    const D96_ANGLES: Angles = &[
        (1, 0, 0.54030234, 0.84147096),
        (1, 1, 0.67826, 0.734822),
        (1, 24, 0.99995, 0.009999833),
        (1, 47, 1.0, 0.00012115275),
        (4095, 0, -0.065975994, -0.9978212),
        (4095, 1, 0.94807583, -0.3180443),
        (4095, 24, -0.9940331, -0.109078795),
        (4095, 47, 0.8794359, 0.4760174),
    ];
    #[rustfmt::skip]
    const LLAMA3_128_INVERSE: &[u32] = &[
        0x3f80_0000, 0x3f50_8ac1, 0x3f29_e1c6, 0x3f0a_6384, 0x3ee1_77bc, 0x3eb7_ab7d, 0x3e95_9ee3, 0x3e73_c461,
        0x3e46_93b0, 0x3e21_c3a0, 0x3e03_c6a0, 0x3dd6_b19c, 0x3dae_e4ad, 0x3d8e_7898, 0x3d68_1e67, 0x3d3d_1684,
        0x3d1a_08c8, 0x3cfa_f53f, 0x3ccc_6f49, 0x3ca6_8939, 0x3c87_a9c3, 0x3c5d_06ec, 0x3c34_0d6d, 0x3c12_ac7f,
        0x3bee_f74f, 0x3bc2_aa76, 0x3b9e_9402, 0x3b81_2e35, 0x3b52_7720, 0x3b0d_fd06, 0x3ab3_d11d, 0x3a60_979e,
        0x3a09_95d2, 0x39a3_f108, 0x393b_2dd2, 0x38c8_6886, 0x38a3_418d, 0x3884_fdbf, 0x3858_ac81, 0x3830_8199,
        0x380f_c8f8, 0x37ea_426f, 0x37be_d4f4, 0x379b_7475, 0x377d_45c3, 0x374e_51f5, 0x3728_126b, 0x3708_ea0f,
        0x36df_10c4, 0x36b5_b687, 0x3694_06cb, 0x3671_2b80, 0x3644_7610, 0x3620_0a69, 0x3602_5f34, 0x35d4_6808,
        0x35ad_07a7, 0x358c_f400, 0x3565_a54d, 0x353b_12c7, 0x3518_64a7, 0x34f8_48c2, 0x34ca_41b0, 0x34a4_c2ff,
    ];
    const LLAMA3_128_ANGLES: Angles = &[
        (1, 0, 0.54030234, 0.84147096),
        (1, 1, 0.6861469, 0.727463),
        (1, 32, 0.9999999, 0.000524846),
        (1, 63, 1.0, 3.068926e-07),
        (100003, 0, 0.98431486, -0.17642085),
        (100003, 1, -0.8892755, 0.457372),
        (100003, 32, -0.6051042, 0.7961463),
        (100003, 63, 0.99952906, 0.030685363),
    ];
    #[rustfmt::skip]
    const LINEAR32_INVERSE: &[u32] = &[
        0x3ecc_cccd, 0x3e66_55c3, 0x3e01_86e2, 0x3d91_ad39, 0x3d23_d70a, 0x3cb8_449b, 0x3c4f_3e38, 0x3be9_1528,
        0x3b83_126e, 0x3b13_6a16, 0x3aa5_cb60, 0x3a3a_7753, 0x39d1_b718, 0x396b_dcf0, 0x3904_a2b3, 0x3895_2c42,
    ];
    const LINEAR32_ANGLES: Angles = &[
        (7, 0, -0.94222236, 0.3349882),
        (7, 1, -0.003759419, 0.99999297),
        (7, 8, 0.99960804, 0.027996339),
        (7, 15, 0.9999999, 0.0004979182),
        (4095, 0, -0.33402333, -0.9425648),
        (4095, 1, -0.808931, -0.58790356),
        (4095, 8, -0.78255576, -0.62258047),
        (4095, 15, 0.95787644, 0.2871806),
    ];

    fn last_places_apart(a: f32, b: f32) -> u32 {
        a.to_bits().abs_diff(b.to_bits())
    }

    /// True when `ours` meets the reference: frequencies equal but for at most `uneven` of them, which are one last place
    /// off, and cosines and sines within two last places of 1 where the frequency is equal.
    fn meets(rope: &Rope, inverse: &[u32], angles: Angles, uneven: usize) -> bool {
        let width = 2 * inverse.len();
        let ours = rope.inverse_frequencies(width);
        let apart: Vec<u32> =
            ours.iter().zip(inverse).map(|(ours, bits)| last_places_apart(*ours, f32::from_bits(*bits))).collect();
        let positions = angles.iter().map(|angle| angle.0).max().unwrap() + 1;
        let table = rope.table(positions, width);
        let angles_meet = angles.iter().all(|&(position, pair, cosine, sine)| {
            let [c, s] = table.pairs()[position * table.pairs_per_position() + pair];
            let tolerance = 1.2e-7 + if apart[pair] == 0 { 0.0 } else { position as f32 * ours[pair] * 1.2e-7 };
            (c - cosine).abs() <= tolerance && (s - sine).abs() <= tolerance
        });
        ours.len() == inverse.len()
            && apart.iter().all(|places| *places <= 1)
            && apart.iter().filter(|places| **places == 1).count() <= uneven
            && angles_meet
    }

    #[test]
    fn default_frequencies_and_angles_meet_the_reference() {
        let rope = Rope { theta: 1_000_000.0, scaling: RopeScaling::None };
        assert!(meets(&rope, QWEN64_INVERSE, QWEN64_ANGLES, 0));
        let rope = Rope { theta: 10_000.0, scaling: RopeScaling::None };
        assert!(meets(&rope, D96_INVERSE, D96_ANGLES, 1));
    }

    #[test]
    fn llama3_frequencies_and_angles_meet_the_reference() {
        let rope = Rope { theta: 500_000.0, scaling: LLAMA3 };
        assert!(meets(&rope, LLAMA3_128_INVERSE, LLAMA3_128_ANGLES, 1));
    }

    #[test]
    fn linear_frequencies_and_angles_meet_the_reference() {
        let rope = Rope { theta: 10_000.0, scaling: RopeScaling::Linear { factor: 2.5 } };
        assert!(meets(&rope, LINEAR32_INVERSE, LINEAR32_ANGLES, 0));
    }

    #[test]
    fn another_scaling_or_base_does_not_meet_the_reference() {
        assert!(!meets(
            &Rope { theta: 500_000.0, scaling: RopeScaling::None },
            LLAMA3_128_INVERSE,
            LLAMA3_128_ANGLES,
            1
        ));
        assert!(!meets(&Rope { theta: 999_999.0, scaling: RopeScaling::None }, QWEN64_INVERSE, QWEN64_ANGLES, 0));
    }

    #[test]
    fn the_table_is_laid_out_by_position_and_starts_at_angle_zero() {
        let table = Rope { theta: 10_000.0, scaling: RopeScaling::None }.table(3, 32);
        assert_eq!((table.positions(), table.pairs_per_position(), table.pairs().len()), (3, 16, 48));
        assert!(table.pairs()[..16].iter().all(|pair| *pair == [1.0, 0.0]));
        assert_eq!(table.as_flat()[2 * 16..][..2], [1f64.cos() as f32, 1f64.sin() as f32]);
    }
}
