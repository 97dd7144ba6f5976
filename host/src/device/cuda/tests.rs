//! Tests on a GPU.
