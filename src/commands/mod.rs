//! The commands, one per file, and what they share: opening a device and loading a model onto it.

pub(crate) mod bench;
pub(crate) mod generate;
pub(crate) mod replay;
pub(crate) mod serve;
pub(crate) mod verify;
