//! Token ids to text, one at a time.

use std::sync::Arc;

use super::Tokenizer;

/// Tokens that may wait for their neighbours where a decoder works on groups; then they are given out as they are.
const MOST_WAITING: usize = 8;

/// The state of one answer. `push` gives out text as soon as its characters are complete, so an unfinished character is
/// never shown; a byte that cannot be part of one becomes U+FFFD at once and does not hold up what follows. The work for
/// a token does not grow with the answer.
///
/// All pieces together are what the tokenizer's own decoder makes of the whole, but for one case: where vocabulary has
/// byte tokens (`<0xE4>`), that decoder gives up a whole run of them for a single invalid byte, while this one
/// replaces the invalid byte and keeps the characters around it.
pub struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    skip_special_tokens: bool,
    /// No token has been decoded yet.
    at_start: bool,
    strips_left: usize,
    /// Bytes of a character that is not complete.
    pending: Vec<u8>,
    /// For decoders without a plan: the tokens given out last, then those that wait.
    window: Vec<u32>,
    given_out: usize,
}

impl Detokenizer {
    /// For one answer.
    #[must_use]
    pub fn new(tokenizer: Arc<Tokenizer>, skip_special_tokens: bool) -> Self {
        let strips_left = tokenizer.pieces.as_ref().and_then(|(plan, _)| plan.strip).map_or(0, |(_, count)| count);
        Self {
            tokenizer,
            skip_special_tokens,
            at_start: true,
            strips_left,
            pending: Vec::new(),
            window: Vec::new(),
            given_out: 0,
        }
    }

    /// The text that this token completes; often its own, sometimes none.
    pub fn push(&mut self, id: u32) -> String {
        if self.skip_special_tokens && self.tokenizer.is_special(id) {
            return String::new();
        }
        let Some((plan, table)) = &self.tokenizer.pieces else { return self.push_window(id) };
        let first;
        let mut bytes = if self.at_start && plan.first_token_drops.is_some() {
            first = self.tokenizer.id_to_token(id).map(|t| plan.bytes_of_first(&t)).unwrap_or_default();
            first.as_slice()
        } else {
            table.get(id)
        };
        self.at_start = false;
        if let Some((content, _)) = plan.strip {
            while self.strips_left > 0 && !bytes.is_empty() {
                if bytes[0] == content {
                    bytes = &bytes[1..];
                    self.strips_left -= 1;
                } else {
                    self.strips_left = 0;
                }
            }
        }
        self.pending.extend_from_slice(bytes);
        take_complete(&mut self.pending)
    }

    /// No more tokens come: an unfinished character becomes U+FFFD.
    pub fn flush(&mut self) -> String {
        if self.window.len() > self.given_out {
            let before = self.tokenizer.decode_at_once(&self.window[..self.given_out]);
            let all = self.tokenizer.decode_at_once(&self.window);
            self.window.clear();
            self.given_out = 0;
            return all.get(before.len()..).unwrap_or_default().to_owned();
        }
        let text = String::from_utf8_lossy(&self.pending).into_owned();
        self.pending.clear();
        text
    }

    /// Decodes the last group again with the new token behind it and gives out the difference.
    fn push_window(&mut self, id: u32) -> String {
        self.window.push(id);
        let before = self.tokenizer.decode_at_once(&self.window[..self.given_out]);
        let all = self.tokenizer.decode_at_once(&self.window);
        let complete = all.len() > before.len() && !all.ends_with('\u{fffd}');
        if !complete && self.window.len() - self.given_out < MOST_WAITING {
            return String::new();
        }
        let text = all.get(before.len()..).unwrap_or_default().to_owned();
        self.window.drain(..self.given_out);
        self.given_out = self.window.len();
        text
    }
}

/// Removes and returns the complete characters at the front, with U+FFFD for each invalid sequence.
fn take_complete(pending: &mut Vec<u8>) -> String {
    let mut text = String::new();
    let mut rest = pending.as_slice();
    loop {
        match std::str::from_utf8(rest) {
            Ok(valid) => {
                text.push_str(valid);
                rest = &[];
                break;
            }
            Err(error) => {
                let (valid, after) = rest.split_at(error.valid_up_to());
                text.push_str(&String::from_utf8_lossy(valid));
                rest = after;
                let Some(invalid) = error.error_len() else { break };
                text.push('\u{fffd}');
                rest = &rest[invalid..];
            }
        }
    }
    let keep = rest.len();
    pending.drain(..pending.len() - keep);
    text
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use tokenizers::decoders::DecoderWrapper;
    use tokenizers::models::bpe::BPE;
    use tokenizers::models::wordlevel::WordLevel;
    use tokenizers::{AddedToken, Tokenizer as Inner};

    use super::*;

    struct Draw(u64);

    impl Draw {
        fn below(&mut self, n: usize) -> usize {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (self.0 >> 33) as usize % n
        }
    }

    /// The byte-to-character table of byte-level BPE, made as its authors made it.
    fn byte_characters() -> Vec<char> {
        let mut next = 0x100;
        (0..=255_u32)
            .map(|b| {
                let printable = (33..=126).contains(&b) || (161..=172).contains(&b) || (174..=255).contains(&b);
                char::from_u32(if printable {
                    b
                } else {
                    next += 1;
                    next - 1
                })
                .unwrap()
            })
            .collect()
    }

    fn byte_level() -> Arc<Tokenizer> {
        let mut vocab: HashMap<String, u32> =
            byte_characters().iter().enumerate().map(|(i, c)| (c.to_string(), i as u32)).collect();
        for word in ["Ġhe", "ðŁ", "æĹ¥", "æľ"] {
            let id = vocab.len() as u32;
            vocab.insert(word.to_owned(), id);
        }
        let bpe = BPE::new(vocab.into_iter().collect(), vec![]);
        let mut inner = Inner::new(bpe);
        inner.with_decoder(Some(tokenizers::decoders::byte_level::ByteLevel::default()));
        inner.add_special_tokens([AddedToken::from("<|end|>", true)]).unwrap();
        inner.add_tokens([AddedToken::from("日本 x", false)]).unwrap();
        Arc::new(Tokenizer::new(inner, vec![]))
    }

    fn pieces(words: &[&str], decoder: &str) -> Arc<Tokenizer> {
        let mut vocab: HashMap<String, u32> =
            words.iter().enumerate().map(|(i, w)| ((*w).to_owned(), i as u32)).collect();
        for byte in 0..256 {
            vocab.insert(format!("<0x{byte:02X}>"), (words.len() + byte) as u32);
        }
        let model = WordLevel::builder().vocab(vocab.into_iter().collect()).unk_token("<unk>".into()).build().unwrap();
        let mut inner = Inner::new(model);
        inner.with_decoder(Some(serde_json::from_str::<DecoderWrapper>(decoder).unwrap()));
        inner.add_special_tokens([AddedToken::from("<s>", true)]).unwrap();
        Arc::new(Tokenizer::new(inner, vec![]))
    }

    const LLAMA: &str = r#"{"type":"Sequence","decoders":[{"type":"Replace","pattern":{"String":"▁"},"content":" "},
        {"type":"ByteFallback"},{"type":"Fuse"},{"type":"Strip","content":" ","start":1,"stop":0}]}"#;
    const METASPACE: &str = r#"{"type":"Metaspace","replacement":"▁","prepend_scheme":"always","split":true}"#;
    const WORDPIECE: &str = r###"{"type":"WordPiece","prefix":"##","cleanup":false}"###;
    const WORDS: [&str; 8] = ["<unk>", "▁Hello", "▁", "▁▁", "world", "▁日本", "é", "##s"];

    /// Streams `ids`; no piece may show an unfinished character that a later token completes.
    fn stream(tokenizer: &Arc<Tokenizer>, ids: &[u32], skip: bool) -> (String, Vec<String>) {
        let mut d = Detokenizer::new(Arc::clone(tokenizer), skip);
        let mut parts: Vec<String> = ids.iter().map(|&id| d.push(id)).collect();
        parts.push(d.flush());
        (parts.concat(), parts)
    }

    #[test]
    fn random_bytes_stream_to_what_the_library_decodes_at_once() {
        let tokenizer = byte_level();
        let texts = ["hello ", "日本語", "👩‍🚀🇫🇷", "é̃ ", "\u{10ffff}", "\n\t"];
        let mut draw = Draw(7);
        let mut replaced = 0;
        for round in 0..2000 {
            let mut ids: Vec<u32> = Vec::new();
            for _ in 0..draw.below(8) {
                match draw.below(4) {
                    0 => ids.push(draw.below(256) as u32),
                    1 => ids.push((256 + draw.below(tokenizer.vocab_size() - 256)) as u32),
                    _ => ids.extend(texts[draw.below(texts.len())].bytes().map(u32::from)),
                }
            }
            if draw.below(3) == 0 {
                ids.truncate(ids.len().saturating_sub(1));
            }
            for skip in [true, false] {
                let want = tokenizer.inner_decode(&ids, skip);
                replaced += usize::from(want.contains('\u{fffd}'));
                assert_eq!(stream(&tokenizer, &ids, skip).0, want, "round {round}: {ids:?}");
                assert_eq!(tokenizer.decode(&ids, skip), want);
            }
        }
        assert!(replaced > 500, "only {replaced} cases with invalid bytes");
    }

    #[test]
    fn an_emoji_over_four_tokens_comes_out_whole_and_an_invalid_byte_does_not_wait() {
        let t = byte_level();
        let ids: Vec<u32> = "a👩b".bytes().map(u32::from).collect();
        assert_eq!(stream(&t, &ids, true).1, ["a", "", "", "", "👩", "b", ""]);
        assert_eq!(stream(&t, &[0xff, 0x41, 0xe6, 0x41], true).1, ["\u{fffd}", "A", "", "\u{fffd}A", ""]);
        assert_eq!(stream(&t, &[0x41, 0xe6, 0x97], true).1, ["A", "", "", "\u{fffd}"]);
        // Continuation bytes alone: each is invalid, none may wait.
        assert_eq!(stream(&t, &[0x80; 5], true).1, ["\u{fffd}", "\u{fffd}", "\u{fffd}", "\u{fffd}", "\u{fffd}", ""]);
    }

    #[test]
    fn pieces_with_spaces_stream_to_what_the_library_decodes_at_once() {
        for decoder in [LLAMA, METASPACE] {
            let tokenizer = pieces(&WORDS, decoder);
            assert!(tokenizer.pieces.is_some());
            let special = tokenizer.token_to_id("<s>").unwrap();
            let mut draw = Draw(11);
            for _ in 0..2000 {
                let mut ids = Vec::new();
                for _ in 0..draw.below(7) {
                    match draw.below(6) {
                        0 => ids.push(special),
                        1 if decoder == LLAMA => {
                            ids.extend("日é👩".bytes().map(|b| WORDS.len() as u32 + u32::from(b)));
                        }
                        _ => ids.push(draw.below(WORDS.len()) as u32),
                    }
                }
                for skip in [true, false] {
                    assert_eq!(stream(&tokenizer, &ids, skip).0, tokenizer.inner_decode(&ids, skip), "{ids:?}");
                }
            }
        }
    }

    #[test]
    fn byte_tokens_that_are_invalid_leave_their_neighbours_alone() {
        let t = pieces(&WORDS, LLAMA);
        let byte = |b: u8| WORDS.len() as u32 + u32::from(b);
        let ids = [1, byte(0xe6), byte(0x97), byte(0xa5), byte(0xff), byte(b'x'), byte(0xe6), 4];
        assert_eq!(stream(&t, &ids, true).1, ["Hello", "", "", "日", "\u{fffd}", "x", "", "\u{fffd}world", ""]);
    }

    #[test]
    fn decoders_that_look_at_neighbours_go_through_a_bounded_window() {
        let t = pieces(&WORDS, WORDPIECE);
        assert!(t.pieces.is_none());
        let mut draw = Draw(3);
        for _ in 0..500 {
            let ids: Vec<u32> = (0..draw.below(9)).map(|_| draw.below(WORDS.len()) as u32).collect();
            assert_eq!(stream(&t, &ids, true).0, t.inner_decode(&ids, true), "{ids:?}");
        }
        let mut d = Detokenizer::new(Arc::clone(&t), true);
        for _ in 0..1000 {
            d.push(7);
            assert!(d.window.len() <= 2 * MOST_WAITING);
        }
    }

    impl Tokenizer {
        /// The oracle: the library's own decoder over everything at once.
        fn inner_decode(&self, ids: &[u32], skip: bool) -> String {
            let kept: Vec<u32> = ids.iter().copied().filter(|id| !(skip && self.is_special(*id))).collect();
            self.decode_at_once(&kept)
        }
    }
}
