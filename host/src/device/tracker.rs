//! Who uses the device's memory: one record per allocation.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// What memory is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum MemoryKind {
    /// The model's weights.
    Weights,
    /// Keys and values of attention.
    KvCache,
    /// Everything a step computes.
    Activations,
    /// The rest.
    Other,
}

impl MemoryKind {
    /// Every kind.
    pub const ALL: [Self; 4] = [Self::Weights, Self::KvCache, Self::Activations, Self::Other];
}

impl fmt::Display for MemoryKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Weights => "weights",
            Self::KvCache => "KV cache",
            Self::Activations => "activations",
            Self::Other => "other",
        })
    }
}

/// An allocation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryRecord {
    /// Where it starts on the device.
    pub address: u64,
    /// Its size.
    pub bytes: u64,
    /// What it is for.
    pub kind: MemoryKind,
    /// Its name, for people.
    pub label: String,
}

/// The allocations of one device. Every method takes the lock once and calls no other method that does.
#[derive(Debug, Default)]
pub struct MemoryTracker {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    records: BTreeMap<u64, MemoryRecord>,
    total_bytes: u64,
    high_water_bytes: u64,
    forgotten: u64,
}

impl State {
    fn bytes_of(&self, kind: MemoryKind) -> u64 {
        self.records.values().filter(|record| record.kind == kind).map(|record| record.bytes).sum()
    }

    fn breakdown(&self) -> String {
        let kinds = MemoryKind::ALL.map(|kind| format!("{kind} {}", megabytes(self.bytes_of(kind))));
        format!("{} in {} allocations ({})", megabytes(self.total_bytes), self.records.len(), kinds.join(", "))
    }
}

fn megabytes(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / (1024.0 * 1024.0))
}

impl MemoryTracker {
    fn state(&self) -> MutexGuard<'_, State> {
        // The state is consistent at every point where a panic could be, so a poisoned lock is as good as any.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds an allocation. One at the same address is replaced.
    pub fn record(&self, record: MemoryRecord) {
        let mut state = self.state();
        let added = record.bytes;
        let replaced = state.records.insert(record.address, record).map_or(0, |old| old.bytes);
        state.total_bytes = state.total_bytes + added - replaced;
        state.high_water_bytes = state.high_water_bytes.max(state.total_bytes);
    }

    /// Removes the allocation at `address`; an unknown address changes nothing.
    pub fn forget(&self, address: u64) {
        let mut state = self.state();
        let freed = state.records.remove(&address).map_or(0, |old| old.bytes);
        state.total_bytes -= freed;
        state.forgotten += 1;
    }

    /// How often an allocation was removed.
    #[must_use]
    pub fn forgotten(&self) -> u64 {
        self.state().forgotten
    }

    /// Bytes allocated now.
    #[must_use]
    pub fn total_bytes(&self) -> u64 {
        self.state().total_bytes
    }

    /// Bytes allocated now for `kind`.
    #[must_use]
    pub fn bytes_of(&self, kind: MemoryKind) -> u64 {
        self.state().bytes_of(kind)
    }

    /// Allocations now.
    #[must_use]
    pub fn count(&self) -> usize {
        self.state().records.len()
    }

    /// The most bytes that were ever allocated at once.
    #[must_use]
    pub fn high_water_bytes(&self) -> u64 {
        self.state().high_water_bytes
    }

    /// A copy of the records, by address.
    #[must_use]
    pub fn records(&self) -> Vec<MemoryRecord> {
        self.state().records.values().cloned().collect()
    }

    /// True when the whole range lies in one allocation.
    #[must_use]
    pub fn contains(&self, address: u64, bytes: u64) -> bool {
        let state = self.state();
        let Some((start, record)) = state.records.range(..=address).next_back() else { return false };
        let offset = address - start;
        offset <= record.bytes && bytes <= record.bytes - offset
    }

    /// One line: total, count and each kind.
    #[must_use]
    pub fn breakdown(&self) -> String {
        self.state().breakdown()
    }

    /// The breakdown, the high water mark, and the largest allocations, for people.
    #[must_use]
    pub fn report(&self) -> String {
        let state = self.state();
        let mut largest: Vec<_> = state.records.values().collect();
        largest.sort_by_key(|record| (std::cmp::Reverse(record.bytes), record.address));
        let mut text = format!("{}\nat most {} at once\n", state.breakdown(), megabytes(state.high_water_bytes));
        for record in largest.iter().take(10) {
            text.push_str(&format!(
                "{:>12}  {:<11}  {}\n",
                megabytes(record.bytes),
                record.kind.to_string(),
                record.label
            ));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(address: u64, bytes: u64, kind: MemoryKind) -> MemoryRecord {
        MemoryRecord { address, bytes, kind, label: format!("at {address}") }
    }

    #[test]
    fn totals_kinds_count_and_high_water_follow_the_records() {
        let tracker = MemoryTracker::default();
        assert_eq!((tracker.total_bytes(), tracker.count(), tracker.high_water_bytes()), (0, 0, 0));
        tracker.record(record(4096, 100, MemoryKind::Weights));
        tracker.record(record(8192, 30, MemoryKind::KvCache));
        tracker.record(record(9000, 7, MemoryKind::Weights));
        assert_eq!((tracker.total_bytes(), tracker.count()), (137, 3));
        assert_eq!(MemoryKind::ALL.map(|kind| tracker.bytes_of(kind)), [107, 30, 0, 0]);
        tracker.forget(4096);
        tracker.forget(4096);
        tracker.forget(1);
        assert_eq!((tracker.total_bytes(), tracker.count(), tracker.high_water_bytes()), (37, 2, 137));
        tracker.record(record(8192, 40, MemoryKind::Other));
        assert_eq!((tracker.total_bytes(), tracker.count()), (47, 2));
        assert_eq!(tracker.records().iter().map(|r| r.address).collect::<Vec<_>>(), [8192, 9000]);
    }

    #[test]
    fn zero_bytes_are_a_record() {
        let tracker = MemoryTracker::default();
        tracker.record(record(64, 0, MemoryKind::Other));
        assert_eq!((tracker.total_bytes(), tracker.count()), (0, 1));
    }

    #[test]
    fn contains_knows_the_edges() {
        let tracker = MemoryTracker::default();
        tracker.record(record(1000, 10, MemoryKind::Other));
        tracker.record(record(1010, 10, MemoryKind::Other));
        for (address, bytes) in [(1000, 10), (1000, 0), (1009, 1), (1010, 10), (1010, 0)] {
            assert!(tracker.contains(address, bytes), "{address}+{bytes}");
        }
        for (address, bytes) in [(999, 1), (1000, 11), (1005, 10), (1020, 1), (1015, u64::MAX), (0, 0)] {
            assert!(!tracker.contains(address, bytes), "{address}+{bytes}");
        }
    }

    #[test]
    fn the_report_names_kinds_sizes_and_labels() {
        let tracker = MemoryTracker::default();
        tracker.record(record(1, 3 << 20, MemoryKind::Weights));
        tracker.record(record(1 << 30, 1 << 19, MemoryKind::KvCache));
        let report = tracker.report();
        for part in ["3.5 MiB in 2 allocations", "weights 3.0 MiB", "KV cache 0.5 MiB", "activations 0.0 MiB", "at 1\n"]
        {
            assert!(report.contains(part), "{part:?} is not in {report}");
        }
    }

    #[test]
    fn threads_may_share_it() {
        let tracker = MemoryTracker::default();
        std::thread::scope(|scope| {
            for thread in 0..4_u64 {
                let tracker = &tracker;
                scope.spawn(move || {
                    for i in 0..100 {
                        tracker.record(record(thread * 1000 + i, 2, MemoryKind::Other));
                        let _ = tracker.report();
                        if i % 2 == 0 {
                            tracker.forget(thread * 1000 + i);
                        }
                    }
                });
            }
        });
        assert_eq!((tracker.count(), tracker.total_bytes()), (200, 400));
    }
}
