//! A model's sizes, the phases that follow from them, and how the work of each is cut into groups.

use cuda_std::prelude::*;

/// Phases of a layer.
pub(super) const PHASES: u32 = 5;

/// The one that reads no weights.
pub(super) const ATTENTION: u32 = 1;

/// A model's sizes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// The residual stream's width C.
    pub hidden: u32,
    /// Query heads H.
    pub heads: u32,
    /// KV heads G.
    pub kv_heads: u32,
    /// Width D of a head.
    pub head_width: u32,
    /// Feed-forward width F.
    pub ffn: u32,
    /// Segments of K of the attention output layer are 2 to the power of this.
    pub output_halvings: u32,
    /// The same of the down projection.
    pub down_halvings: u32,
    /// Tokens V of the vocabulary.
    pub vocab: u32,
}

/// Replicas of what every block reads. A line of the second-level cache answers one block after the other, and all ask at once. A
/// product leaves each output in four lanes, each of which stores into one.
pub(super) const REPLICAS: u32 = 4;

/// Where the words of each phase start in the first of several replicas, and how many there are. Only the first has QKV, of
/// which few blocks read each word, unless blocks share the spans of a context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Words {
    /// \[(H + 2 G) D\]: queries f32, keys and values bf16.
    pub qkv: u32,
    /// \[H D / 2\]: pairs of bf16.
    pub attended: u32,
    /// \[C\]: the residual stream behind attention, f32.
    pub after_output: u32,
    /// \[F / 2\]: pairs of bf16.
    pub gated: u32,
    /// \[C\]: the residual stream behind the layer, f32.
    pub after_down: u32,
    /// Words of a replica.
    pub replica: u32,
    /// Words of all replicas.
    pub len: u32,
}

/// Where the words are by which blocks share the spans of a long context, all f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Partials {
    /// A word for each replica, in lines of their own: the first span of all has been computed.
    pub started: u32,
    /// \[H, spans, 2\]: maximum and sum.
    pub statistics: u32,
    /// \[H D / 16, spans, 16\].
    pub outputs: u32,
    /// Words of all, and of what stands before them.
    pub len: u32,
}

impl Shape {
    /// The same, of which nothing has been computed yet: each phase computes what it needs, rather than hold it in registers.
    #[inline(always)]
    pub(super) fn anew(self) -> Self {
        let anew = thread::number_anew;
        Self {
            hidden: anew(self.hidden),
            heads: anew(self.heads),
            kv_heads: anew(self.kv_heads),
            head_width: self.head_width,
            ffn: anew(self.ffn),
            output_halvings: anew(self.output_halvings),
            down_halvings: anew(self.down_halvings),
            vocab: anew(self.vocab),
        }
    }

    /// H D.
    #[must_use]
    pub const fn query_width(self) -> u32 {
        self.heads * self.head_width
    }

    /// (H + 2 G) D.
    #[must_use]
    pub const fn qkv_width(self) -> u32 {
        (self.heads + 2 * self.kv_heads) * self.head_width
    }

    /// Where the words of spans are that blocks share, where contexts have at most so many; they follow the others.
    #[must_use]
    pub const fn partials(self, most_spans: u32) -> Partials {
        let started = self.words().len;
        let statistics = started + 16 * REPLICAS;
        let outputs = (statistics + self.heads * most_spans * 2).next_multiple_of(16);
        Partials { started, statistics, outputs, len: outputs + self.query_width() * most_spans }
    }

    /// Groups of a phase of a layer; of the head, where the phase is [`PHASES`].
    #[inline(always)]
    pub(super) fn groups(self, phase: u32) -> u32 {
        match phase {
            0 => self.linear(Linear::Qkv).groups,
            1 => self.kv_heads,
            2 => self.linear(Linear::Output).groups,
            3 => self.linear(Linear::GateUp).groups,
            4 => self.linear(Linear::Down).groups,
            _ => self.linear(Linear::Head).groups,
        }
    }

    /// Where words are.
    #[must_use]
    pub const fn words(self) -> Words {
        let attended = self.qkv_width();
        let after_output = attended + self.query_width() / 2;
        let gated = after_output + self.hidden;
        let after_down = gated + self.ffn / 2;
        let replica = (after_down + self.hidden).next_multiple_of(16);
        Words { qkv: 0, attended, after_output, gated, after_down, replica, len: replica * REPLICAS }
    }

    /// A linear layer.
    #[inline(always)]
    pub(super) fn linear(self, linear: Linear) -> Cut {
        match linear {
            Linear::Qkv => Cut { groups: self.qkv_width() / 16, rows: 16, width: self.hidden, halvings: 0 },
            Linear::Output => {
                Cut { groups: self.hidden / 8, rows: 8, width: self.query_width(), halvings: self.output_halvings }
            }
            Linear::GateUp => Cut { groups: self.ffn / 8, rows: 16, width: self.hidden, halvings: 0 },
            Linear::Down => Cut { groups: self.hidden / 8, rows: 8, width: self.ffn, halvings: self.down_halvings },
            Linear::Head => Cut { groups: self.vocab.div_ceil(16), rows: 16, width: self.hidden, halvings: 0 },
        }
    }
}

/// The phases that read weights.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Linear {
    Qkv,
    Output,
    GateUp,
    Down,
    Head,
}

impl Linear {
    /// Its number among a layer's phases; of the head [`PHASES`].
    #[inline(always)]
    pub(super) fn phase(self) -> u32 {
        match self {
            Self::Qkv => 0,
            Self::Output => 2,
            Self::GateUp => 3,
            Self::Down => 4,
            Self::Head => PHASES,
        }
    }

    /// The phase behind it, and its layer.
    #[inline(always)]
    pub(super) fn next(self, layer: u32, layers: u32) -> (Self, u32) {
        match self {
            Self::Qkv => (Self::Output, layer),
            Self::Output => (Self::GateUp, layer),
            Self::GateUp => (Self::Down, layer),
            Self::Down | Self::Head if layer + 1 < layers => (Self::Qkv, layer + 1),
            Self::Down | Self::Head => (Self::Head, layer + 1),
        }
    }
}

/// How a linear layer is cut: into groups of so many rows, each of these into segments of K.
#[derive(Clone, Copy)]
pub(super) struct Cut {
    pub(super) groups: u32,
    pub(super) rows: u32,
    /// K.
    pub(super) width: u32,
    /// Segments of K are 2 to the power of this.
    pub(super) halvings: u32,
}

impl Cut {
    /// Whether inputs are the normalised residual stream: then the first unit of a block is the gain.
    #[inline(always)]
    pub(super) fn has_gain(linear: Linear) -> bool {
        !matches!(linear, Linear::Output | Linear::Down)
    }
}
