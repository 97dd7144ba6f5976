//! Steps that are recorded, by what they are recordings of.

use std::collections::VecDeque;

use crate::device::Recording;

/// Recordings of a workspace's steps, of which it keeps those that were used last. `K` is all that their launches depend on.
#[derive(Debug)]
pub(super) struct Recordings<K> {
    /// The most recently used last.
    kept: VecDeque<(K, Recording)>,
    /// What was asked for once and is not recorded, the latest last.
    seen: VecDeque<K>,
    most: usize,
}

impl<K: PartialEq> Recordings<K> {
    /// Keeps at most `most`, and remembers as many more that are not recorded.
    pub(super) fn new(most: usize) -> Self {
        Self { kept: VecDeque::new(), seen: VecDeque::new(), most }
    }

    /// The recording of `key`, empty where there is none. It is to be put back.
    pub(super) fn take(&mut self, key: &K) -> Recording {
        self.take_kept(key).unwrap_or_default()
    }

    /// As [`take`](Self::take), but nothing where `key` is asked for a first time: recording a step takes longer than launching it
    /// piece by piece, which one that does not come again would pay for nothing.
    pub(super) fn take_again(&mut self, key: &K) -> Option<Recording>
    where
        K: Clone,
    {
        if let Some(recording) = self.take_kept(key) {
            return Some(recording);
        }
        if let Some(place) = self.seen.iter().rposition(|seen| seen == key) {
            self.seen.remove(place);
            return Some(Recording::default());
        }
        push_to(&mut self.seen, self.most, key.clone());
        None
    }

    /// Keeps a recording of `key`.
    pub(super) fn put(&mut self, key: K, recording: Recording) {
        push_to(&mut self.kept, self.most, (key, recording));
    }

    /// How many are kept.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.kept.len()
    }

    fn take_kept(&mut self, key: &K) -> Option<Recording> {
        let place = self.kept.iter().rposition(|(kept, _)| kept == key)?;
        self.kept.remove(place).map(|(_, recording)| recording)
    }
}

/// Puts an item last; the first leaves where there are `most`.
fn push_to<T>(items: &mut VecDeque<T>, most: usize, item: T) {
    if items.len() == most {
        items.pop_front();
    }
    items.push_back(item);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_time_is_recorded_and_the_least_recently_used_leaves() {
        let mut recordings = Recordings::new(2);
        assert!(recordings.take_again(&1).is_none(), "a first time");
        let recording = recordings.take_again(&1).expect("a second time");
        recordings.put(1, recording);
        assert!(recordings.take_again(&2).is_none());
        for key in [1, 2] {
            let recording = recordings.take_again(&key).expect("kept, or seen before");
            recordings.put(key, recording);
        }
        let recording = recordings.take(&3);
        recordings.put(3, recording);
        assert_eq!(recordings.kept.iter().map(|(key, _)| *key).collect::<Vec<_>>(), [2, 3]);
        assert!(recordings.take_again(&1).is_none(), "it has left and is new again");
    }

    #[test]
    fn what_comes_once_is_forgotten() {
        let mut recordings = Recordings::new(3);
        for key in 0..100 {
            assert!(recordings.take_again(&key).is_none());
            assert!(recordings.seen.len() <= 3 && recordings.kept.is_empty());
        }
        assert!(recordings.take_again(&0).is_none(), "too long ago");
        assert!(recordings.take_again(&99).is_some());
    }
}
