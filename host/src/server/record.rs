//! Records of answers, a JSON object a line, to be compared with later answers by [`replay`](super::replay).
//!
//! Writing is a thread's work, behind a bounded channel: a disk that is slow or full costs records, never an answer.

use std::fs::OpenOptions;
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::{Map, Value};

use super::chat::finish_reason;
use super::generation::Piece;
use super::receipt::{Receipt, Tally};

/// Records that may wait to be written.
const RECORDS_WAITING: usize = 1024;
/// Bytes of them.
const BYTES_WAITING: usize = 64 << 20;
/// At most so often trouble is logged.
const COMPLAIN_EVERY: Duration = Duration::from_secs(10);

/// Takes records without waiting. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Recorder {
    messages: SyncSender<Message>,
    backlog: Arc<Backlog>,
}

#[derive(Debug, Default)]
struct Backlog {
    bytes: AtomicUsize,
    /// Records that were given up since the last complaint.
    lost: AtomicU64,
}

#[derive(Debug)]
enum Message {
    Line(Vec<u8>),
    /// Answered once everything before it is in the file.
    Flush(SyncSender<()>),
}

impl Recorder {
    /// Appends to the file at `path`, which is made if it is not there.
    ///
    /// # Errors
    /// The file cannot be opened, or no thread can be started.
    pub fn append(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new().create(true).append(true).open(path)?;
        Self::to(file)
    }

    fn to(file: impl Write + Send + 'static) -> io::Result<Self> {
        let (messages, received) = sync_channel(RECORDS_WAITING);
        let backlog = Arc::new(Backlog::default());
        let writer = Writer { out: BufWriter::new(file), torn: false, complained: None, backlog: Arc::clone(&backlog) };
        std::thread::Builder::new().name("record".to_owned()).spawn(move || writer.run(&received))?;
        Ok(Self { messages, backlog })
    }

    /// Waits until what was taken so far is written, at most for `patience`. False if it took longer.
    #[must_use]
    pub fn flush(&self, patience: Duration) -> bool {
        let (done, written) = sync_channel(1);
        let deadline = Instant::now() + patience;
        let mut message = Message::Flush(done);
        while let Err(refused) = self.messages.try_send(message) {
            message = match refused {
                TrySendError::Full(message) if Instant::now() < deadline => message,
                _ => return false,
            };
            std::thread::sleep(Duration::from_millis(1));
        }
        written.recv_timeout(deadline.saturating_duration_since(Instant::now())).is_ok()
    }

    fn take(&self, line: Vec<u8>) {
        let bytes = line.len();
        let queued = self.backlog.bytes.fetch_add(bytes, Ordering::Relaxed);
        if queued + bytes > BYTES_WAITING || self.messages.try_send(Message::Line(line)).is_err() {
            self.backlog.bytes.fetch_sub(bytes, Ordering::Relaxed);
            self.backlog.lost.fetch_add(1, Ordering::Relaxed);
        }
    }
}

struct Writer<W: Write> {
    out: BufWriter<W>,
    /// A part of a line may be in the file.
    torn: bool,
    complained: Option<Instant>,
    backlog: Arc<Backlog>,
}

impl<W: Write> Writer<W> {
    fn run(mut self, messages: &Receiver<Message>) {
        while let Ok(message) = messages.recv() {
            let mut next = Ok(message);
            while let Ok(message) = next {
                self.serve(message);
                next = messages.try_recv();
            }
            self.note(Write::flush);
        }
    }

    fn serve(&mut self, message: Message) {
        match message {
            Message::Line(line) => {
                self.backlog.bytes.fetch_sub(line.len(), Ordering::Relaxed);
                let torn = std::mem::take(&mut self.torn);
                self.note(|out| {
                    if torn {
                        out.write_all(b"\n")?;
                    }
                    out.write_all(&line)
                });
            }
            Message::Flush(done) => {
                self.note(Write::flush);
                // Whoever waited may have lost patience.
                let _ = done.send(());
            }
        }
    }

    /// Errors cost the record, and a line of the log.
    fn note(&mut self, write: impl FnOnce(&mut BufWriter<W>) -> io::Result<()>) {
        let result = write(&mut self.out);
        if let Err(error) = &result {
            self.torn = true;
            if self.may_complain() {
                tracing::error!(%error, "answers cannot be recorded; is the disk full?");
            }
        }
        let lost = self.backlog.lost.load(Ordering::Relaxed);
        if lost > 0 && self.may_complain() {
            self.backlog.lost.fetch_sub(lost, Ordering::Relaxed);
            tracing::warn!(lost, "answers were not recorded: the disk does not keep up");
        }
    }

    fn may_complain(&mut self) -> bool {
        let may = self.complained.is_none_or(|last| last.elapsed() >= COMPLAIN_EVERY);
        if may {
            self.complained = Some(Instant::now());
        }
        may
    }
}

/// An answer on its way into the record.
pub(super) struct Transcript {
    recorder: Recorder,
    endpoint: &'static str,
    request: Map<String, Value>,
    system_fingerprint: String,
    texts: Vec<String>,
    reasons: Vec<Option<&'static str>>,
    /// An unfinished character at the end is dropped.
    whole_characters: bool,
    tally: Tally,
}

#[derive(Serialize)]
struct Record<'a> {
    endpoint: &'a str,
    request: &'a Map<String, Value>,
    response: Response<'a>,
}

#[derive(Serialize)]
struct Response<'a> {
    system_fingerprint: &'a str,
    choices: Vec<Choice<'a>>,
    lockstep: Option<Receipt>,
}

#[derive(Serialize)]
struct Choice<'a> {
    index: usize,
    text: &'a str,
    finish_reason: Option<&'a str>,
}

impl Transcript {
    /// `texts` is what each choice begins with.
    pub(super) fn new(
        recorder: Recorder,
        endpoint: &'static str,
        request: Map<String, Value>,
        system_fingerprint: String,
        texts: Vec<String>,
        tally: Tally,
    ) -> Self {
        let reasons = vec![None; texts.len()];
        let whole_characters = false;
        Self { recorder, endpoint, request, system_fingerprint, texts, reasons, whole_characters, tally }
    }

    /// Of an API that drops a character which was never completed.
    pub(super) fn whole_characters(self) -> Self {
        Self { whole_characters: true, ..self }
    }

    /// Takes note of a piece of an answer.
    pub(super) fn note(&mut self, choice: usize, piece: &Piece) {
        self.tally.note(choice, piece);
        let drops = self.whole_characters && piece.end.is_some();
        self.texts[choice].push_str(if drops { piece.text.trim_end_matches('\u{fffd}') } else { &piece.text });
        self.reasons[choice] = piece.end.as_ref().map(|end| finish_reason(Some(end)));
    }

    /// All choices have ended.
    pub(super) fn finish(self) {
        let choices = self.texts.iter().zip(&self.reasons).enumerate();
        let response = Response {
            system_fingerprint: &self.system_fingerprint,
            choices: choices.map(|(index, (text, reason))| Choice { index, text, finish_reason: *reason }).collect(),
            lockstep: self.tally.receipt(),
        };
        let record = Record { endpoint: self.endpoint, request: &self.request, response };
        // JSON escapes line breaks, so a record is a line. Writing plain structs to memory does not fail.
        if let Ok(mut line) = serde_json::to_vec(&record) {
            line.push(b'\n');
            self.recorder.take(line);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[test]
    fn lines_are_appended_in_order() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("answers.jsonl");
        for part in 0..2 {
            let recorder = Recorder::append(&path).unwrap();
            for line in 0..500 {
                recorder.take(format!("{part} {line}\n").into_bytes());
            }
            assert!(recorder.flush(Duration::from_secs(20)));
        }
        let expected: String = (0..1000).map(|n| format!("{} {}\n", n / 500, n % 500)).collect();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), expected);
        assert!(Recorder::append(folder.path()).is_err());
    }

    /// Takes nothing while it is locked, and what it is told to refuse not at all.
    #[derive(Clone, Default)]
    struct Disk(Arc<Mutex<(Vec<u8>, bool)>>);

    impl Write for Disk {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let mut disk = self.0.lock().unwrap();
            if disk.1 {
                // A part of it, as a disk that becomes full does.
                disk.0.extend_from_slice(&bytes[..1]);
                return Err(io::Error::other("full"));
            }
            disk.0.extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_disk_that_does_not_keep_up_costs_records_and_no_time() {
        let disk = Disk::default();
        let recorder = Recorder::to(disk.clone()).unwrap();
        let stuck = disk.0.lock().unwrap();
        // 80 MB at most are more than may wait, and so are 2000 records.
        for _ in 0..2000 {
            recorder.take(vec![b'x'; 40_000]);
        }
        assert!(recorder.backlog.bytes.load(Ordering::Relaxed) <= BYTES_WAITING);
        assert!(recorder.backlog.lost.load(Ordering::Relaxed) >= 900);
        assert!(!recorder.flush(Duration::from_millis(20)));
        drop(stuck);
        while !recorder.flush(Duration::from_secs(20)) {}
        let written = disk.0.lock().unwrap().0.len();
        assert!(written.is_multiple_of(40_000) && (1..2000 * 40_000).contains(&written), "{written}");
        assert_eq!(recorder.backlog.bytes.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn a_line_behind_a_failure_is_a_line_of_its_own() {
        let disk = Disk::default();
        let recorder = Recorder::to(disk.clone()).unwrap();
        disk.0.lock().unwrap().1 = true;
        // Longer than the buffer, so that it is written at once.
        recorder.take([vec![b'x'; 20_000], vec![b'\n']].concat());
        assert!(recorder.flush(Duration::from_secs(20)));
        disk.0.lock().unwrap().1 = false;
        recorder.take(b"whole\n".to_vec());
        assert!(recorder.flush(Duration::from_secs(20)));
        let text = String::from_utf8(disk.0.lock().unwrap().0.clone()).unwrap();
        assert_eq!(text.lines().filter(|line| *line == "whole").count(), 1, "{text:?}");
    }
}
