//! Compiles a crate of GPU kernels written in Rust to PTX, with rustc's own `nvptx64-nvidia-cuda` backend.
//!
//! It needs no CUDA toolkit, only a rustc that has the sources of its library; [`Search`] says where it looks.
//! A build script calls [`Builder::build`]: PTX that was committed beside the kernels is taken as long as its
//! manifest names the sources as they are now, anything else is compiled. The program `ptx` of this package
//! rewrites the committed PTX (`build`), proves it fresh (`check`) and assembles it with ptxas (`gate`).
//!
//! Two things happen to the compiler's text, no more:
//! - `#[kernel(block = N)]` leaves the comment `// lockstep.block N` in the body of its entry. It becomes the
//!   directive `.maxntid N, 1, 1`, so that ptxas shares the register file among exactly that many threads. The
//!   comment `// lockstep.min_blocks N`, where a kernel has it, becomes `.minnctapersm N`, and `// lockstep.cluster N`
//!   becomes `.reqnctapercluster N, 1, 1`;
//! - a call that nothing defines is refused here, with the kernel that makes it, instead of by the driver.
//!
//! | file | what it holds |
//! | --- | --- |
//! | `build` | the builder: committed PTX or the compiler's |
//! | `toolchain` | which compiler |
//! | `compile` | the cargo that runs inside cargo |
//! | `ptx` | entries, parameters, undefined calls in a PTX text |
//! | `overlap`, `flow` | that kernels wait for their predecessors in time |
//! | `source` | the hash of the kernel sources, and the kernels they declare |
//! | `manifest` | what committed PTX says about itself |
//! | `ptxas` | registers, shared memory and spills of each kernel |
//! | `workspace` | where this repository keeps its kernels, and its targets |

mod build;
mod compile;
mod error;
mod flow;
mod manifest;
mod overlap;
mod ptx;
mod ptxas;
mod source;
mod toolchain;
pub mod workspace;

pub use build::{Builder, Built, Freshness, Module, Target};
pub use error::Error;
pub use manifest::{Manifest, ManifestKernel, ManifestTarget};
pub use overlap::{EarlyUse, Overlap, overlap_faults, overlaps, parse_early_uses};
pub use ptx::{Entry, add_block_sizes, entries, undefined_calls};
pub use ptxas::{Ptxas, Usage, parse_usage};
pub use source::{Sources, declared_kernels, declared_parameters, sha256_hex};
pub use toolchain::{Search, Toolchain};
