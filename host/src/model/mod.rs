//! Configuration, weights and the transformer.
