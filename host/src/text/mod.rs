//! Text: tokenizer, chat template, incremental detokenizer, stop strings, and the calendar that templates ask for.

mod calendar;
mod detokenizer;
mod stop_strings;
mod template;
mod token_bytes;
mod tokenizer;

pub use calendar::{rfc3339, strftime};
pub use detokenizer::Detokenizer;
pub use stop_strings::{Scan, StopStrings};
pub use template::{ChatTemplate, TemplateError};
pub use tokenizer::{Tokenizer, TokenizerError};
