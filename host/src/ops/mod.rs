//! One safe function per kernel.
