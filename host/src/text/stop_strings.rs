//! Finds stop strings in text that arrives in pieces.

/// One stop string and how much of it the text so far ends with (Knuth, Morris, Pratt).
struct Pattern {
    bytes: Vec<u8>,
    /// For each prefix length, the length of its longest proper border.
    borders: Vec<usize>,
    matched: usize,
}

impl Pattern {
    fn new(text: &str) -> Self {
        let bytes = text.as_bytes().to_vec();
        let mut borders = vec![0; bytes.len()];
        let mut length = 0;
        for i in 1..bytes.len() {
            while length > 0 && bytes[i] != bytes[length] {
                length = borders[length - 1];
            }
            if bytes[i] == bytes[length] {
                length += 1;
            }
            borders[i] = length;
        }
        Self { bytes, borders, matched: 0 }
    }

    /// True when `byte` completes the string.
    fn advance(&mut self, byte: u8) -> bool {
        while self.matched > 0 && self.bytes[self.matched] != byte {
            self.matched = self.borders[self.matched - 1];
        }
        if self.bytes[self.matched] == byte {
            self.matched += 1;
        }
        self.matched == self.bytes.len()
    }
}

/// What a piece of text brought.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scan {
    /// Text that may be shown.
    pub text: String,
    /// Index of the stop string that was found; the text before it has all been given out and nothing follows.
    pub matched: Option<usize>,
}

/// Looks for stop strings across token borders. Text that may be the start of one is held back until it is decided, and
/// the stop string itself is never given out. The string that is complete first wins (then the longest), so the result
/// does not depend on how the text was cut. Work is linear in the text, for each string.
pub struct StopStrings {
    patterns: Vec<Pattern>,
    held: String,
    stopped: bool,
}

impl StopStrings {
    /// Looks for `strings`; empty ones are never found.
    #[must_use]
    pub fn new(strings: &[String]) -> Self {
        Self { patterns: strings.iter().map(|s| Pattern::new(s)).collect(), held: String::new(), stopped: false }
    }

    /// Adds text.
    pub fn push(&mut self, text: &str) -> Scan {
        if self.stopped || text.is_empty() {
            return Scan { text: String::new(), matched: None };
        }
        if self.patterns.iter().all(|p| p.bytes.is_empty()) {
            return Scan { text: text.to_owned(), matched: None };
        }
        let scanned = self.held.len();
        self.held.push_str(text);
        for (i, byte) in text.bytes().enumerate() {
            let mut found: Option<(usize, usize)> = None;
            for (index, pattern) in self.patterns.iter_mut().enumerate().filter(|(_, p)| !p.bytes.is_empty()) {
                if pattern.advance(byte) && found.is_none_or(|(length, _)| pattern.bytes.len() > length) {
                    found = Some((pattern.bytes.len(), index));
                }
            }
            if let Some((length, index)) = found {
                self.stopped = true;
                let mut text = std::mem::take(&mut self.held);
                text.truncate(scanned + i + 1 - length);
                return Scan { text, matched: Some(index) };
            }
        }
        Scan { text: self.give(), matched: None }
    }

    /// Adds text that ends nothing: a stop string that is complete in it is passed over. One that begins in it and is
    /// complete behind it counts.
    pub fn pass(&mut self, text: &str) -> String {
        if self.stopped {
            return String::new();
        }
        self.held.push_str(text);
        for pattern in self.patterns.iter_mut().filter(|pattern| !pattern.bytes.is_empty()) {
            for byte in text.bytes() {
                if pattern.advance(byte) {
                    pattern.matched = pattern.borders[pattern.matched - 1];
                }
            }
        }
        self.give()
    }

    /// What no stop string can begin in any more. A partial match starts where a stop string starts, so at a character
    /// border.
    fn give(&mut self) -> String {
        let keep = self.patterns.iter().map(|p| p.matched).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        std::mem::replace(&mut self.held, rest)
    }

    /// No more text comes: what was held back is no stop string.
    pub fn flush(&mut self) -> String {
        self.stopped = true;
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The definition, on the whole text at once: the earliest end, then the longest.
    fn expected(text: &str, stops: &[String]) -> (String, Option<usize>) {
        let mut best: Option<(usize, usize, usize)> = None;
        for (index, stop) in stops.iter().enumerate().filter(|(_, s)| !s.is_empty()) {
            if let Some(start) = text.find(stop.as_str()) {
                let end = start + stop.len();
                if best.is_none_or(|(e, s, _)| end < e || (end == e && start < s)) {
                    best = Some((end, start, index));
                }
            }
        }
        match best {
            Some((_, start, index)) => (text[..start].to_owned(), Some(index)),
            None => (text.to_owned(), None),
        }
    }

    #[test]
    fn every_cut_gives_the_answer_of_the_whole() {
        let alphabet = ['a', 'b', 'é', '日'];
        let mut state = 1_u64;
        let mut next = move |n: usize| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as usize % n
        };
        let (mut found, mut absent) = (0, 0);
        for _ in 0..3000 {
            let mut word = |longest: usize| -> String {
                let length = next(longest + 1);
                (0..length).map(|_| alphabet[next(4)]).collect()
            };
            let stops = vec![word(4), word(5), word(3)];
            let text = word(40);
            let (want, want_match) = expected(&text, &stops);
            let mut scanner = StopStrings::new(&stops);
            let (mut got, mut got_match) = (String::new(), None);
            let chars: Vec<char> = text.chars().collect();
            let mut at = 0;
            while at < chars.len() && got_match.is_none() {
                let end = (at + 1 + next(3)).min(chars.len());
                let scan = scanner.push(&chars[at..end].iter().collect::<String>());
                got.push_str(&scan.text);
                assert!(want.starts_with(&got), "gave out {got:?} of {want:?}; stops {stops:?}");
                got_match = scan.matched;
                at = end;
            }
            if got_match.is_none() {
                got.push_str(&scanner.flush());
            }
            // Two equal strings may both be the longest; their text decides.
            assert_eq!(
                (got, got_match.map(|i| &stops[i])),
                (want, want_match.map(|i| &stops[i])),
                "{text:?} {stops:?}"
            );
            if want_match.is_some() {
                found += 1;
            } else {
                absent += 1;
            }
        }
        assert!(found > 300 && absent > 300, "{found} with a stop string, {absent} without");
    }

    #[test]
    fn text_that_cannot_be_a_stop_string_leaves_at_once() {
        let mut s = StopStrings::new(&["<end>".to_owned()]);
        assert_eq!(s.push("hello <"), Scan { text: "hello ".into(), matched: None });
        assert_eq!(s.push("en"), Scan { text: String::new(), matched: None });
        assert_eq!(s.push("x<<e"), Scan { text: "<enx<".into(), matched: None });
        assert_eq!(s.push("nd>tail"), Scan { text: String::new(), matched: Some(0) });
        assert_eq!(s.push("more"), Scan { text: String::new(), matched: None });
        assert_eq!(s.flush(), "");
    }
}
