//! Devices: memory, launches and linear layers, on CUDA or on the CPU.
