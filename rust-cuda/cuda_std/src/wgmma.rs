//! Matrix products of a warpgroup (four consecutive warps, the first a multiple of four) from shared memory: `wgmma`, of compute
//! capability 9.0 with its architecture-specific features.
//!
//! An operand is a tile of rows of 64 bf16 (128 bytes), k running along a row, in the layout that
//! [`tensor_copy`](crate::tensor_copy) leaves: 16-byte piece p of row r stands in place p ^ (r % 8) of the row (PTX ISA, "128-byte
//! swizzle"; [`place`]).
//!
//! The first operand is such a tile, too ([`Sums`]), or in registers ([`products`]).
//!
//! On the CPU, and on a GPU without them, a kernel that multiplies so ends with a fault.

use half::bf16;

use crate::Shared;
use crate::bulk::Barriers;

/// Rows of the first operand.
pub const ROWS: usize = 64;

/// Elements of k in a row of a tile.
pub const DEPTH: usize = 64;

/// Elements of a tile of 64 rows.
pub const TILE: usize = ROWS * DEPTH;

/// Where element `column` of row `row` lies in a tile. The eight elements from a multiple of 8 on lie side by side.
#[inline(always)]
#[must_use]
pub const fn place(row: usize, column: usize) -> usize {
    row * DEPTH + ((column / 8) ^ (row % 8)) * 8 + column % 8
}

/// Makes what this thread wrote into shared memory known to the tensor cores; a barrier of those that did follows.
#[inline(always)]
pub fn publish() {
    crate::bulk::release_to_copies();
}

/// A tile as an operand: PTX's matrix descriptor.
#[derive(Clone, Copy)]
pub struct Operand(u64);

impl Operand {
    /// The tile whose first row starts at element `start`, at a multiple of 1024 bytes of shared memory.
    #[inline(always)]
    #[must_use]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub fn new(memory: &Shared<bf16>, start: usize) -> Self {
        #[cfg(target_arch = "nvptx64")]
        {
            /// From eight rows to the next eight, in units of 16 bytes.
            const EIGHT_ROWS: u64 = 8 * 128 / 16;
            /// The 128-byte swizzle. With it the other distance means nothing.
            const SWIZZLE: u64 = 1 << 62;
            let address = u64::from(memory.address_of(start) & 0x3_ffff) >> 4;
            Self(address | 1 << 16 | EIGHT_ROWS << 32 | SWIZZLE)
        }
        #[cfg(not(target_arch = "nvptx64"))]
        {
            let _ = (memory, start);
            crate::cpu::gpu_only()
        }
    }
}

/// Sums of a warpgroup's tile of 64 rows and N columns, `COUNT` = N / 2 to a thread. Of warp w (of four) and lane l, element
/// 4 i + j is of row 16 w + l / 4, or 8 more for j > 1, and column 8 i + 2 (l % 4) + j % 2.
pub trait Sums {
    /// Starts to add the products of a stage, 64 of k: the chain of four steps of 16 k in order, each of which adds to what is there.
    /// `a` has 64 rows, `b` has N. [`wait`] tells when they have been read; the sums are there after [`settle`](Self::settle).
    fn add(&mut self, a: Operand, b: Operand);

    /// Waits until all that was started is done.
    fn settle(&mut self);

    /// The same for the next `stages` stages of a ring, one at least, from `place` on, which moves on: each as soon as its slot is
    /// full, so that the tensor cores have the next one's products to do while one's are awaited. Says of each slot that this warp has
    /// read it.
    fn add_stages(&mut self, ring: &Ring, place: &mut Place, stages: u32);
}

/// Waits until all stages that a warpgroup has started, but for the last `PENDING`, have been read.
#[inline(always)]
pub fn wait<const PENDING: u32>() {
    #[cfg(all(target_arch = "nvptx64", target_feature = "sm_90a"))]
    // SAFETY: a wait.
    unsafe {
        core::arch::asm!("wgmma.wait_group.sync.aligned {};", const PENDING, options(nostack));
    }
}

/// From here on each thread of this warpgroup has up to `COUNT` registers, a multiple of 8: more than the kernel begins with, which
/// others have [left](leave_registers). It waits until they have.
#[inline(always)]
pub fn take_registers<const COUNT: u32>() {
    #[cfg(all(target_arch = "nvptx64", target_feature = "sm_90a"))]
    // SAFETY: the compiler of PTX counts registers.
    unsafe {
        core::arch::asm!("setmaxnreg.inc.sync.aligned.u32 {};", const COUNT, options(nostack));
    }
}

/// From here on no thread of this warpgroup needs more than `COUNT` registers, a multiple of 8.
#[inline(always)]
pub fn leave_registers<const COUNT: u32>() {
    #[cfg(all(target_arch = "nvptx64", target_feature = "sm_90a"))]
    // SAFETY: as above.
    unsafe {
        core::arch::asm!("setmaxnreg.dec.sync.aligned.u32 {};", const COUNT, options(nostack));
    }
}

/// A ring of stages in shared memory, each a slot with the tiles of both operands.
#[derive(Clone, Copy)]
pub struct Ring {
    /// The first operand in the first slot.
    pub a: Operand,
    /// The second.
    pub b: Operand,
    /// Bytes from a slot to the next, a multiple of 1024.
    pub slot_bytes: u32,
    /// How many there are.
    pub slots: u32,
    /// The first `slots` say that a slot is full. The next ones are told that a warp has read it.
    pub barriers: Barriers,
    /// Blocks of the cluster, in all of which those are told: lane r of a warp tells block r.
    pub cluster: u32,
}

/// Where a warp is in a ring.
#[derive(Clone, Copy)]
pub struct Place {
    slot: u32,
    parity: u32,
}

impl Place {
    /// The first slot, which nobody has filled.
    pub const FIRST: Self = Self { slot: 0, parity: 0 };
}

macro_rules! sums {
    ($columns:literal: 0 $($i:literal)*) => {
        impl Sums for [f32; $columns / 2] {
            #[inline(always)]
            #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
            fn add(&mut self, a: Operand, b: Operand) {
                #[cfg(all(target_arch = "nvptx64", target_feature = "sm_90a"))]
                // SAFETY: reads shared memory of the two tiles (the kernel's duty) and registers.
                unsafe {
                    core::arch::asm!(
                        "{{",
                        ".reg .pred add;",
                        ".reg .b64 a, b;",
                        "setp.eq.u32 add, 0, 0;",
                        "mov.b64 a, {a};",
                        "mov.b64 b, {b};",
                        "wgmma.fence.sync.aligned;",
                        sums!(@step $columns 0 $($i)*),
                        "add.u64 a, a, 2; add.u64 b, b, 2;",
                        sums!(@step $columns 0 $($i)*),
                        "add.u64 a, a, 2; add.u64 b, b, 2;",
                        sums!(@step $columns 0 $($i)*),
                        "add.u64 a, a, 2; add.u64 b, b, 2;",
                        sums!(@step $columns 0 $($i)*),
                        "wgmma.commit_group.sync.aligned;",
                        "}}",
                        inout(reg32) self[0],
                        $(inout(reg32) self[$i],)*
                        a = in(reg64) a.0,
                        b = in(reg64) b.0,
                        options(nostack)
                    );
                }
                #[cfg(not(all(target_arch = "nvptx64", target_feature = "sm_90a")))]
                {
                    let _ = (a.0, b.0);
                    crate::bulk::unsupported()
                }
            }

            #[inline(always)]
            fn settle(&mut self) {
                #[cfg(all(target_arch = "nvptx64", target_feature = "sm_90a"))]
                // SAFETY: a wait; the registers are named because they change until it is over.
                unsafe {
                    core::arch::asm!(
                        concat!("wgmma.wait_group.sync.aligned 0; // {0}", $(" {", $i, "}",)*),
                        inout(reg32) self[0],
                        $(inout(reg32) self[$i],)*
                        options(nostack)
                    );
                }
            }

            #[inline(always)]
            #[allow(named_asm_labels, reason = "PTX has no others; they are known inside the braces alone")]
            #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
            fn add_stages(&mut self, ring: &Ring, place: &mut Place, stages: u32) {
                #[cfg(all(target_arch = "nvptx64", target_feature = "sm_90a"))]
                // SAFETY: reads tiles and barriers of shared memory, which are inside their arrays (the kernel's duty), and registers.
                // The instructions end when the products have, so no register is used while they run.
                unsafe {
                    core::arch::asm!(
                        "{{",
                        ".reg .pred add, full, tells, more;",
                        ".reg .b32 at, there, left, read;",
                        ".reg .b64 a, b, way;",
                        "setp.eq.u32 add, 0, 0;",
                        "mov.u32 left, {stages};",
                        "mov.u32 read, {full};",
                        // Before the first stage there is none to tell of.
                        "setp.ne.u32 tells, 0, 0;",
                        "NEXT:",
                        "mad.lo.u32 at, {slot}, 8, {full};",
                        "FULL:",
                        "mbarrier.try_wait.parity.shared::cta.b64 full, [at], {parity};",
                        "@!full bra FULL;",
                        "bar.warp.sync 0xffffffff;",
                        "mul.wide.u32 way, {slot}, {units};",
                        "add.u64 a, {a}, way;",
                        "add.u64 b, {b}, way;",
                        "wgmma.fence.sync.aligned;",
                        sums!(@step $columns 0 $($i)*),
                        "add.u64 a, a, 2; add.u64 b, b, 2;",
                        sums!(@step $columns 0 $($i)*),
                        "add.u64 a, a, 2; add.u64 b, b, 2;",
                        sums!(@step $columns 0 $($i)*),
                        "add.u64 a, a, 2; add.u64 b, b, 2;",
                        sums!(@step $columns 0 $($i)*),
                        "wgmma.commit_group.sync.aligned;",
                        // The products of the stage before are over.
                        "wgmma.wait_group.sync.aligned 1;",
                        "@tells mapa.shared::cluster.u32 there, read, {lane};",
                        "@tells mbarrier.arrive.shared::cluster.b64 _, [there];",
                        "add.u32 read, at, {free};",
                        "setp.lt.u32 tells, {lane}, {cluster};",
                        "add.u32 {slot}, {slot}, 1;",
                        "setp.eq.u32 more, {slot}, {slots};",
                        "@more mov.u32 {slot}, 0;",
                        "@more xor.b32 {parity}, {parity}, 1;",
                        "sub.u32 left, left, 1;",
                        "setp.ne.u32 more, left, 0;",
                        "@more bra NEXT;",
                        "wgmma.wait_group.sync.aligned 0;",
                        "@tells mapa.shared::cluster.u32 there, read, {lane};",
                        "@tells mbarrier.arrive.shared::cluster.b64 _, [there];",
                        "}}",
                        inout(reg32) self[0],
                        $(inout(reg32) self[$i],)*
                        slot = inout(reg32) place.slot,
                        parity = inout(reg32) place.parity,
                        a = in(reg64) ring.a.0,
                        b = in(reg64) ring.b.0,
                        full = in(reg32) ring.barriers.address_of(0),
                        free = in(reg32) ring.slots * 8,
                        units = in(reg32) ring.slot_bytes / 16,
                        slots = in(reg32) ring.slots,
                        stages = in(reg32) stages,
                        lane = in(reg32) crate::thread::lane_id(),
                        cluster = in(reg32) ring.cluster,
                        options(nostack)
                    );
                }
                #[cfg(not(all(target_arch = "nvptx64", target_feature = "sm_90a")))]
                {
                    let Ring { a, b, slot_bytes, slots, barriers, cluster } = *ring;
                    let _ = (a.0, b.0, slot_bytes, slots, barriers, cluster, place.slot, place.parity, stages);
                    crate::bulk::unsupported()
                }
            }
        }
    };
    (@step $columns:literal 0 $($i:literal)*) => {
        concat!(
            "wgmma.mma_async.sync.aligned.m64n", $columns, "k16.f32.bf16.bf16 {{{0}", $(", {", $i, "}",)*
            "}}, a, b, add, 1, 1, 0, 0;"
        )
    };
}
sums!(32: 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15);
sums!(64: 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31);
sums!(80: 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31 32 33 34 35 36 37 38 39);
sums!(96: 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31 32 33 34 35 36 37 38 39
    40 41 42 43 44 45 46 47);
sums!(112: 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31 32 33 34 35 36 37 38 39 40 41
    42 43 44 45 46 47 48 49 50 51 52 53 54 55);
sums!(128: 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31 32 33 34 35 36 37 38 39
    40 41 42 43 44 45 46 47 48 49 50 51 52 53 54 55 56 57 58 59 60 61 62 63);
sums!(160: 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31 32 33 34 35 36 37 38 39
    40 41 42 43 44 45 46 47 48 49 50 51 52 53 54 55 56 57 58 59 60 61 62 63 64 65 66 67 68 69 70 71 72 73 74 75 76 77 78 79);
sums!(192: 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31 32 33 34 35 36 37 38 39 40 41
    42 43 44 45 46 47 48 49 50 51 52 53 54 55 56 57 58 59 60 61 62 63 64 65 66 67 68 69 70 71 72 73 74 75 76 77 78 79 80 81 82
    83 84 85 86 87 88 89 90 91 92 93 94 95);
sums!(224: 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31 32 33 34 35 36 37 38 39 40 41
    42 43 44 45 46 47 48 49 50 51 52 53 54 55 56 57 58 59 60 61 62 63 64 65 66 67 68 69 70 71 72 73 74 75 76 77 78 79 80 81 82
    83 84 85 86 87 88 89 90 91 92 93 94 95 96 97 98 99 100 101 102 103 104 105 106 107 108 109 110 111);
sums!(256: 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31 32 33 34 35 36 37 38 39 40
    41 42 43 44 45 46 47 48 49 50 51 52 53 54 55 56 57 58 59 60 61 62 63 64 65 66 67 68 69 70 71 72 73 74 75 76 77 78 79 80
    81 82 83 84 85 86 87 88 89 90 91 92 93 94 95 96 97 98 99 100 101 102 103 104 105 106 107 108 109 110 111 112 113 114 115
    116 117 118 119 120 121 122 123 124 125 126 127);

#[cfg(all(target_arch = "nvptx64", target_feature = "sm_90a"))]
macro_rules! products {
    ($($a:literal)*) => {
        products!(@step [$($a)*] 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31)
    };
    (@step [$first:literal $($a:literal)*] 0 $($d:literal)*) => {
        concat!(
            "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {{{0}", $(", {", $d, "}",)* "}}, {{{", $first, "}",
            $(", {", $a, "}",)* "}}, b, add, 1, 1, 0;"
        )
    };
}

/// A B^T for the whole warpgroup, of 64 rows of A, of which a warp has 16, and the 64 rows of the tile B from element `start` of
/// `memory` on: the chain of four steps of 16 k in order, the first of which adds to 0. Returns when the sums are there.
///
/// `a[s]` are the words of [`m16n8k16_bf16`](crate::mma::m16n8k16_bf16) for columns 16 s to 16 s + 15 of the warp's rows; result `n`
/// is that product's for rows 8 n to 8 n + 7 of the tile, with its bits.
#[inline(always)]
#[must_use]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn products(a: &[[u32; 4]; 4], memory: &Shared<bf16>, start: usize) -> [[f32; 4]; 8] {
    #[cfg(all(target_arch = "nvptx64", target_feature = "sm_90a"))]
    {
        let Operand(operand) = Operand::new(memory, start);
        let mut d = [[0.0f32; 4]; 8];
        // SAFETY: reads registers and a tile of shared memory, which is inside the array (the kernel's duty). The block of
        // instructions ends when the products have, so no register is used while they run.
        unsafe {
            core::arch::asm!(
                "{{ .reg .pred add; .reg .b64 b;",
                "setp.ne.u32 add, 0, 0;",
                "mov.b64 b, {48};",
                "wgmma.fence.sync.aligned;",
                products!(32 33 34 35),
                "setp.eq.u32 add, 0, 0;",
                "add.u64 b, b, 2;",
                products!(36 37 38 39),
                "add.u64 b, b, 2;",
                products!(40 41 42 43),
                "add.u64 b, b, 2;",
                products!(44 45 46 47),
                "wgmma.commit_group.sync.aligned;",
                "wgmma.wait_group.sync.aligned 0; }}",
                out(reg32) d[0][0], out(reg32) d[0][1], out(reg32) d[0][2], out(reg32) d[0][3],
                out(reg32) d[1][0], out(reg32) d[1][1], out(reg32) d[1][2], out(reg32) d[1][3],
                out(reg32) d[2][0], out(reg32) d[2][1], out(reg32) d[2][2], out(reg32) d[2][3],
                out(reg32) d[3][0], out(reg32) d[3][1], out(reg32) d[3][2], out(reg32) d[3][3],
                out(reg32) d[4][0], out(reg32) d[4][1], out(reg32) d[4][2], out(reg32) d[4][3],
                out(reg32) d[5][0], out(reg32) d[5][1], out(reg32) d[5][2], out(reg32) d[5][3],
                out(reg32) d[6][0], out(reg32) d[6][1], out(reg32) d[6][2], out(reg32) d[6][3],
                out(reg32) d[7][0], out(reg32) d[7][1], out(reg32) d[7][2], out(reg32) d[7][3],
                in(reg32) a[0][0], in(reg32) a[0][1], in(reg32) a[0][2], in(reg32) a[0][3],
                in(reg32) a[1][0], in(reg32) a[1][1], in(reg32) a[1][2], in(reg32) a[1][3],
                in(reg32) a[2][0], in(reg32) a[2][1], in(reg32) a[2][2], in(reg32) a[2][3],
                in(reg32) a[3][0], in(reg32) a[3][1], in(reg32) a[3][2], in(reg32) a[3][3],
                in(reg64) operand, options(nostack));
        }
        d
    }
    #[cfg(not(all(target_arch = "nvptx64", target_feature = "sm_90a")))]
    {
        let _ = (a, memory, start);
        crate::bulk::unsupported()
    }
}
