//! Compiles a crate of GPU kernels to PTX.
