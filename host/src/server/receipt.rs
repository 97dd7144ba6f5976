//! What an answer comes to, over all its choices: the tokens that were used, and the receipt by which it can be checked.
//!
//! A choice's digest is SHA-256 over these bytes, numbers in little-endian order:
//!
//! 1. one byte: 1 if log-probabilities of the answer were asked for, plus 2 if the prompt's were computed (they were asked
//!    for, or nothing was to be generated);
//! 2. with the 2: the number of the prompt's tokens (u32), then each token's id (u32), from the second one on with the
//!    bits of its log-probability (f32) behind it;
//! 3. each generated token's id (u32), with the 1 followed by the bits of its log-probability (f32). The token that
//!    completes a stop string is the last one of these; a stop token is not one of them.
//!
//! An answer of one choice has that choice's digest, one of several the SHA-256 of theirs, 32 bytes each, by rising index.

use serde::Serialize;
use serde_json::Number;
use sha2::{Digest, Sha256};

use crate::engine::{Request, TokenEvent};

use super::generation::Piece;
use super::parameters::Usage;

/// A choice's digest on its way.
pub(super) struct Digesting {
    hash: Sha256,
    with_logprobs: bool,
}

impl Digesting {
    pub(super) fn new(request: &Request) -> Self {
        let with_logprobs = request.logprobs.is_some();
        let mut hash = Sha256::new();
        hash.update([u8::from(with_logprobs) + 2 * u8::from(request.prompt_logprobs.is_some())]);
        Self { hash, with_logprobs }
    }

    pub(super) fn prompt(&mut self, tokens: &[TokenEvent]) {
        self.hash.update(u32::try_from(tokens.len()).unwrap_or(u32::MAX).to_le_bytes());
        for token in tokens {
            self.hash.update(token.id.to_le_bytes());
            if let Some(logprob) = token.logprob {
                self.hash.update(logprob.to_bits().to_le_bytes());
            }
        }
    }

    pub(super) fn token(&mut self, token: &TokenEvent) {
        self.hash.update(token.id.to_le_bytes());
        if self.with_logprobs {
            self.hash.update(token.logprob.unwrap_or(f32::NAN).to_bits().to_le_bytes());
        }
    }

    pub(super) fn finish(&self) -> [u8; 32] {
        self.hash.clone().finalize().into()
    }
}

/// What a choice that has ended is known by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ChoiceDigest {
    pub(super) seed: u64,
    pub(super) digest: [u8; 32],
}

/// The extension object of an answer.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Receipt {
    /// As the client wrote it, or drawn.
    seed: Number,
    digest: String,
    /// Where there are several.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    choices: Vec<ChoiceReceipt>,
}

#[derive(Clone, Debug, Serialize)]
struct ChoiceReceipt {
    index: usize,
    seed: u64,
    digest: String,
}

/// All choices of an answer: `of_each` for each prompt, in the order of the prompts.
#[derive(Clone, Debug)]
pub(super) struct Tally {
    seed: Number,
    of_each: usize,
    prompt_tokens: u32,
    generated: Vec<u32>,
    cached: Vec<u32>,
    digests: Vec<Option<ChoiceDigest>>,
}

impl Tally {
    /// Nothing yet, of `choices` in all.
    pub(super) fn new(seed: Number, prompt_tokens: u32, choices: usize, of_each: usize) -> Self {
        let zeros = vec![0; choices];
        Self { seed, of_each, prompt_tokens, generated: zeros.clone(), cached: zeros, digests: vec![None; choices] }
    }

    /// Takes note of what a piece says of its choice.
    pub(super) fn note(&mut self, choice: usize, piece: &Piece) {
        self.generated[choice] = piece.generated;
        self.cached[choice] = piece.cached;
        self.digests[choice] = piece.digest;
    }

    /// A prompt counts once, however many choices continue it.
    pub(super) fn usage(&self) -> Usage {
        let cached = self.cached.iter().step_by(self.of_each.max(1)).sum();
        Usage::new(self.prompt_tokens, self.generated.iter().sum(), cached)
    }

    /// None before the last choice has ended.
    pub(super) fn receipt(&self) -> Option<Receipt> {
        let digests: Option<Vec<ChoiceDigest>> = self.digests.iter().copied().collect();
        let digests = digests?;
        let (digest, choices) = match &digests[..] {
            [one] => (hex(&one.digest), Vec::new()),
            several => {
                let mut hash = Sha256::new();
                several.iter().for_each(|choice| hash.update(choice.digest));
                let list = several.iter().enumerate();
                let list = list.map(|(index, c)| ChoiceReceipt { index, seed: c.seed, digest: hex(&c.digest) });
                (hex(&hash.finalize().into()), list.collect())
            }
        };
        Some(Receipt { seed: self.seed.clone(), digest, choices })
    }
}

pub(super) fn hex(bytes: &[u8; 32]) -> String {
    bytes.iter().fold(String::with_capacity(64), |text, byte| text + &format!("{byte:02x}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(id: u32, logprob: Option<f32>) -> TokenEvent {
        TokenEvent { id, logprob, top: vec![] }
    }

    fn sha256(bytes: &[u8]) -> String {
        hex(&Sha256::digest(bytes).into())
    }

    #[test]
    fn the_bytes_under_a_digest_are_those_of_the_documentation() {
        let request = |logprobs, prompt_logprobs| Request { logprobs, prompt_logprobs, ..Request::default() };
        let digest = |request: &Request, prompt: &[TokenEvent], tokens: &[TokenEvent]| {
            let mut digesting = Digesting::new(request);
            if request.prompt_logprobs.is_some() {
                digesting.prompt(prompt);
            }
            tokens.iter().for_each(|token| digesting.token(token));
            hex(&digesting.finish())
        };
        let tokens = [token(1, Some(-0.5)), token(258, Some(-2.0))];
        let ids = [0, 1, 0, 0, 0, 2, 1, 0, 0];
        assert_eq!(digest(&request(None, None), &[], &tokens), sha256(&ids));
        // -0.5 is 0xbf000000, -2 is 0xc0000000.
        let both = [1, 1, 0, 0, 0, 0, 0, 0, 0xbf, 2, 1, 0, 0, 0, 0, 0, 0xc0];
        assert_eq!(digest(&request(Some(0), None), &[], &tokens), sha256(&both));
        let prompt = [token(7, None), token(9, Some(-2.0))];
        let all = [&[3, 2, 0, 0, 0, 7, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0xc0], &both[1..]].concat();
        assert_eq!(digest(&request(Some(0), Some(0)), &prompt, &tokens), sha256(&all));
        // The digest of "abc" in the standard.
        assert_eq!(sha256(b"abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    }

    #[test]
    fn several_choices_have_one_receipt() {
        let piece = |seed, byte, generated, cached| Piece {
            text: String::new(),
            prompt: vec![],
            tokens: vec![],
            generated,
            cached,
            digest: Some(ChoiceDigest { seed, digest: [byte; 32] }),
            end: None,
        };
        let mut tally = Tally::new(5.into(), 10, 4, 2);
        for (choice, byte) in [(3, 4), (0, 1), (2, 3)] {
            tally.note(choice, &piece(u64::from(byte), byte, 7, 3));
            assert!(tally.receipt().is_none());
        }
        tally.note(1, &piece(2, 2, 7, 9));
        let receipt = serde_json::to_value(tally.receipt().unwrap()).unwrap();
        let bytes: Vec<u8> = (1..=4).flat_map(|byte| [byte; 32]).collect();
        assert_eq!((&receipt["seed"], &receipt["digest"]), (&5.into(), &sha256(&bytes).into()));
        let second = serde_json::json!({"index": 1, "seed": 2, "digest": "02".repeat(32)});
        assert_eq!((receipt["choices"].as_array().unwrap().len(), &receipt["choices"][1]), (4, &second));
        let usage = serde_json::to_value(tally.usage()).unwrap();
        let expected = serde_json::json!({"prompt_tokens": 10, "completion_tokens": 28, "total_tokens": 38,
            "prompt_tokens_details": {"cached_tokens": 6}});
        assert_eq!(usage, expected);
        let mut single = Tally::new((-1).into(), 10, 1, 1);
        single.note(0, &piece(2, 2, 7, 0));
        let receipt = serde_json::to_value(single.receipt().unwrap()).unwrap();
        assert_eq!(receipt, serde_json::json!({"seed": -1, "digest": "02".repeat(32)}));
    }
}
