//! Tokenizer, chat template, incremental detokenizer.
