//! Server-sent events of a completion, and how many tokens they bring.

/// What an event says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Said {
    /// So many more tokens.
    Tokens(u32),
    /// Nothing to be counted.
    Nothing,
    /// The stream is complete.
    Done,
    /// The answer failed.
    Error,
}

/// Cuts a stream into events.
#[derive(Debug, Default)]
pub(super) struct Events {
    unread: Vec<u8>,
    /// By the server's own count.
    counted: u32,
}

impl Events {
    /// Takes bytes as they come and tells what each event that is complete now says.
    pub(super) fn take(&mut self, bytes: &[u8], mut tell: impl FnMut(Said)) {
        self.unread.extend_from_slice(bytes);
        let mut start = 0;
        while let Some(length) = end_of_event(&self.unread[start..]) {
            let said = self.said(start, start + length);
            start += length;
            tell(said);
        }
        self.unread.drain(..start);
    }

    fn said(&mut self, start: usize, end: usize) -> Said {
        let text = String::from_utf8_lossy(&self.unread[start..end]);
        if text.lines().any(|line| line == "event: error") {
            return Said::Error;
        }
        let Some(data) = text.lines().find_map(|line| line.strip_prefix("data:")).map(str::trim_start) else {
            return Said::Nothing;
        };
        if data == "[DONE]" {
            return Said::Done;
        }
        if data.starts_with("{\"error\"") {
            return Said::Error;
        }
        // Parsing all of it would take the client as long as the server takes to write it.
        match number_after(data, "\"completion_tokens\":") {
            Some(count) => {
                let more = count.saturating_sub(self.counted);
                self.counted = self.counted.max(count);
                if more > 0 { Said::Tokens(more) } else { Said::Nothing }
            }
            None if data.contains("\"text\":\"") && !data.contains("\"text\":\"\"") => Said::Tokens(1),
            None => Said::Nothing,
        }
    }
}

/// Bytes up to the end of the first event, its empty line included.
fn end_of_event(bytes: &[u8]) -> Option<usize> {
    let found = |pattern: &[u8]| bytes.windows(pattern.len()).position(|window| window == pattern);
    let ends = [found(b"\n\n").map(|at| at + 2), found(b"\r\n\r\n").map(|at| at + 4)];
    ends.into_iter().flatten().min()
}

fn number_after(text: &str, name: &str) -> Option<u32> {
    let rest = text[text.find(name)? + name.len()..].trim_start();
    let digits = rest.find(|character: char| !character.is_ascii_digit()).unwrap_or(rest.len());
    rest[..digits].parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const STREAM: &str = concat!(
        "data: {\"choices\":[{\"text\":\"a\\n\\nb\"}],\"usage\":{\"completion_tokens\":1,\"total_tokens\":9}}\n\n",
        ": keep-alive\n\n",
        "data: {\"choices\":[{\"text\":\"c\"}],\"usage\":{\"completion_tokens\": 4}}\n\n",
        "data: {\"choices\":[],\"usage\":{\"completion_tokens\":4}}\r\n\r\n",
        "data: {\"choices\":[{\"text\":\"d\"}],\"usage\":null}\n\n",
        "data: {\"choices\":[{\"text\":\"\"}],\"usage\":null}\n\n",
        "event: error\ndata: {\"error\":{}}\n\n",
        "data: {\"error\":{}}\n\n",
        "data: [DONE]\n\n",
        "data: cut",
    );
    const SAID: [Said; 9] = [
        Said::Tokens(1),
        Said::Nothing,
        Said::Tokens(3),
        Said::Nothing,
        Said::Tokens(1),
        Said::Nothing,
        Said::Error,
        Said::Error,
        Said::Done,
    ];

    #[test]
    fn events_are_the_same_however_the_bytes_come() {
        for size in 1..STREAM.len() {
            let (mut events, mut said) = (Events::default(), Vec::new());
            for bytes in STREAM.as_bytes().chunks(size) {
                events.take(bytes, |one| said.push(one));
            }
            assert_eq!(said, SAID, "{size} bytes at a time");
        }
    }
}
