//! The bytes that each token stands for, where the tokenizer's decoder treats tokens one by one.

use serde_json::Value;

/// What a token contributes to the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Decoding {
    /// Byte-level BPE: each character of a token is a byte.
    ByteLevel,
    /// Tokens are text, with replacements, in order; `<0xNN>` is a byte when `byte_fallback`.
    Pieces,
}

/// How to decode, read from the decoder's JSON.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    pub(super) decoding: Decoding,
    pub(super) byte_fallback: bool,
    replacements: Vec<(String, String)>,
    /// Removed from the start of the whole text, at most this often.
    pub(super) strip: Option<(u8, usize)>,
    /// Removed from the first token, however often (the Metaspace decoder).
    pub(super) first_token_drops: Option<String>,
}

impl Plan {
    /// None for a decoder whose tokens depend on their neighbours in a way not known here.
    pub(super) fn from_decoder(decoder: &Value) -> Option<Self> {
        let mut plan = Self {
            decoding: Decoding::Pieces,
            byte_fallback: false,
            replacements: Vec::new(),
            strip: None,
            first_token_drops: None,
        };
        let steps = match decoder.get("decoders").and_then(Value::as_array) {
            Some(steps) => steps.clone(),
            None => vec![decoder.clone()],
        };
        let mut fused = false;
        for (index, step) in steps.iter().enumerate() {
            let text = |name: &str| step.get(name).and_then(Value::as_str).map(str::to_owned);
            match step.get("type").and_then(Value::as_str)? {
                "ByteLevel" if steps.len() == 1 => plan.decoding = Decoding::ByteLevel,
                "Metaspace" if index == 0 => {
                    let mark = text("replacement")?;
                    if text("prepend_scheme").as_deref() != Some("never") {
                        plan.first_token_drops = Some(mark.clone());
                    }
                    plan.replacements.push((mark, " ".to_owned()));
                }
                "Replace" if !fused && !plan.byte_fallback => {
                    let from = step.get("pattern")?.get("String")?.as_str()?.to_owned();
                    if from.is_empty() {
                        return None;
                    }
                    plan.replacements.push((from, text("content")?));
                }
                "ByteFallback" if !fused => plan.byte_fallback = true,
                "Fuse" => fused = true,
                "Strip" if fused && plan.strip.is_none() => {
                    let count = |name: &str| step.get(name).and_then(Value::as_u64);
                    let (content, start, stop) = (text("content")?, count("start")?, count("stop")?);
                    if stop != 0 || content.len() != 1 {
                        return None;
                    }
                    plan.strip = Some((content.as_bytes()[0], usize::try_from(start).ok()?));
                }
                _ => return None,
            }
        }
        Some(plan)
    }

    /// The bytes of one token.
    pub(super) fn bytes_of(&self, token: &str) -> Vec<u8> {
        if self.decoding == Decoding::ByteLevel {
            return byte_level(token);
        }
        let mut text = token.to_owned();
        for (from, to) in &self.replacements {
            text = text.replace(from.as_str(), to);
        }
        if self.byte_fallback
            && let Some(byte) = fallback_byte(&text)
        {
            return vec![byte];
        }
        text.into_bytes()
    }

    /// The bytes of a token that opens the text, before `strip`.
    pub(super) fn bytes_of_first(&self, token: &str) -> Vec<u8> {
        match &self.first_token_drops {
            Some(mark) => self.bytes_of(&token.replace(mark.as_str(), "")),
            None => self.bytes_of(token),
        }
    }
}

/// `<0x41>` is the byte 0x41.
fn fallback_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() == 2 && digits.bytes().all(|b| b.is_ascii_hexdigit()) {
        u8::from_str_radix(digits, 16).ok()
    } else {
        None
    }
}

/// Printable Latin-1 characters stand for themselves; the 68 others were moved to U+0100 and up, in order.
fn byte_level(token: &str) -> Vec<u8> {
    let byte = |c: char| -> Option<u8> {
        match u32::from(c) {
            code @ (0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff) => u8::try_from(code).ok(),
            code @ 0x100..=0x120 => u8::try_from(code - 0x100).ok(),
            code @ 0x121..=0x142 => u8::try_from(code - 0x121 + 0x7f).ok(),
            0x143 => Some(0xad),
            _ => None,
        }
    };
    // A token with any other character was added by hand and is plain text.
    token.chars().map(byte).collect::<Option<Vec<u8>>>().unwrap_or_else(|| token.as_bytes().to_vec())
}

/// The bytes of every token, end to end.
#[derive(Clone, Debug)]
pub(super) struct TokenBytes {
    bytes: Vec<u8>,
    /// Token `i` is `bytes[ends[i - 1]..ends[i]]`.
    ends: Vec<u32>,
}

impl TokenBytes {
    pub(super) fn new(tokens: impl Iterator<Item = Vec<u8>>) -> Self {
        let (mut bytes, mut ends) = (Vec::new(), Vec::new());
        for token in tokens {
            bytes.extend_from_slice(&token);
            // A vocabulary of 4 GiB of text does not exist; saturating keeps the slices ordered.
            ends.push(u32::try_from(bytes.len()).unwrap_or(u32::MAX));
        }
        Self { bytes, ends }
    }

    /// Nothing for an id outside the vocabulary.
    pub(super) fn get(&self, id: u32) -> &[u8] {
        let id = id as usize;
        let Some(&end) = self.ends.get(id) else { return &[] };
        let start = if id == 0 { 0 } else { self.ends[id - 1] };
        self.bytes.get(start as usize..end as usize).unwrap_or(&[])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn byte_level_characters_cover_every_byte_once() {
        // The rule of the original: the printable ones, then the rest in order from U+0100.
        let mut rest = 0x100_u32;
        for byte in 0..=255_u8 {
            let printable = matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
            let code = if printable {
                u32::from(byte)
            } else {
                rest += 1;
                rest - 1
            };
            assert_eq!(byte_level(&char::from_u32(code).unwrap().to_string()), [byte]);
        }
        assert_eq!(byte_level("日"), "日".as_bytes());
    }

    #[test]
    fn unknown_decoders_have_no_plan() {
        let unknown = serde_json::json!({"type": "WordPiece", "prefix": "##", "cleanup": true});
        assert_eq!(Plan::from_decoder(&unknown), None);
        let known = serde_json::json!({"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]});
        let plan = Plan::from_decoder(&known).unwrap();
        assert_eq!(plan.bytes_of("▁a▁"), b" a ");
        assert_eq!(plan.bytes_of("<0xE4>"), [0xe4]);
        assert_eq!(plan.bytes_of("<0x+4>"), b"<0x+4>");
        assert_eq!(plan.strip, Some((b' ', 1)));
    }
}
