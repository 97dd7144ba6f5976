//! Devices: memory, launches and linear layers, on CUDA or on the CPU.

mod file_map;

pub use file_map::FileMap;
