//! The page pool: who holds which page of the KV cache, and which pages hold what. No tensors: a page is a number.
//!
//! A page is free (nobody holds it, nothing worth keeping), held (by one sequence or by several that share it) or idle
//! (nobody holds it, but its contents are known by their key). Idle pages are taken again by key, and are given away, the
//! least recently used first, when no page is free.

use std::collections::{BTreeMap, HashMap};

use sha2::{Digest, Sha256};

use crate::testing::TestRng;

/// A page's number in the cache.
pub(super) type PageId = u32;

/// Names the contents of a full page: its tokens, all tokens before it, and the salt. A cryptographic digest, because a
/// collision would give one client's context to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct PageKey([u8; 32]);

impl PageKey {
    /// What the first page's key is derived from. Requests with different salts share nothing.
    pub(super) fn root(salt: Option<&str>) -> Self {
        let mut hash = Sha256::new();
        hash.update([u8::from(salt.is_some())]);
        hash.update(salt.unwrap_or_default());
        Self(hash.finalize().into())
    }

    /// The key of the page of `tokens` that follows this one.
    pub(super) fn child(&self, tokens: &[u32]) -> Self {
        let mut hash = Sha256::new();
        hash.update(self.0);
        for token in tokens {
            hash.update(token.to_le_bytes());
        }
        Self(hash.finalize().into())
    }
}

/// Pages by state, and what became of them since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PageCounts {
    /// Pages in all.
    pub total: usize,
    /// Held by sequences; a shared page counts once.
    pub held: usize,
    /// Held by nobody, contents kept for later requests.
    pub idle: usize,
    /// The most that were ever held at once.
    pub high_water: usize,
    /// Times a page's contents were there already.
    pub hits: u64,
    /// Times a full page had to be computed that could have been shared.
    pub misses: u64,
    /// Idle pages given away.
    pub evictions: u64,
}

#[derive(Clone, Debug, Default)]
struct Page {
    holders: u32,
    /// Where it is in the index, if it is.
    key: Option<PageKey>,
    /// Its key in `idle`, while nobody holds it.
    idle_since: u64,
}

/// The pool. Every page is in exactly one state; [`check_integrity`](Self::check_integrity) recounts.
#[derive(Debug)]
pub(super) struct PagePool {
    pages: Vec<Page>,
    free: Vec<PageId>,
    /// Idle pages, the least recently used first.
    idle: BTreeMap<u64, PageId>,
    index: HashMap<PageKey, PageId>,
    clock: u64,
    counts: PageCounts,
    /// Pages given back that nobody held: an engine's fault, reported by the next check.
    wrong_releases: u64,
}

impl PagePool {
    pub(super) fn new(total: usize) -> Self {
        Self {
            pages: vec![Page::default(); total],
            free: (0..total as PageId).rev().collect(),
            idle: BTreeMap::new(),
            index: HashMap::new(),
            clock: 0,
            counts: PageCounts { total, ..PageCounts::default() },
            wrong_releases: 0,
        }
    }

    /// Gives the pages that are free now out in another order.
    pub(super) fn shuffle_free(&mut self, seed: u64) {
        let mut random = TestRng::new(seed);
        for last in (1..self.free.len()).rev() {
            self.free.swap(last, random.below(last as u64 + 1) as usize);
        }
    }

    pub(super) fn counts(&self) -> PageCounts {
        PageCounts { idle: self.idle.len(), ..self.counts }
    }

    /// Pages that can be allocated now.
    pub(super) fn available(&self) -> usize {
        self.free.len() + self.idle.len()
    }

    /// A page with one holder and no contents; none when every page is held.
    pub(super) fn allocate(&mut self) -> Option<PageId> {
        let id = self.free.pop().or_else(|| self.evict())?;
        self.pages[id as usize].holders = 1;
        self.count_held();
        Some(id)
    }

    fn evict(&mut self) -> Option<PageId> {
        let (_, id) = self.idle.pop_first()?;
        if let Some(key) = self.pages[id as usize].key.take() {
            self.index.remove(&key);
        }
        self.counts.evictions += 1;
        Some(id)
    }

    fn count_held(&mut self) {
        self.counts.held += 1;
        self.counts.high_water = self.counts.high_water.max(self.counts.held);
    }

    /// Whether the contents are there, and then whether somebody holds them.
    pub(super) fn find(&self, key: &PageKey) -> Option<bool> {
        self.index.get(key).map(|&id| self.pages[id as usize].holders > 0)
    }

    /// Adds a holder to the page with these contents, if there is one.
    pub(super) fn acquire(&mut self, key: &PageKey) -> Option<PageId> {
        let &id = self.index.get(key)?;
        let page = &mut self.pages[id as usize];
        page.holders += 1;
        if page.holders == 1 {
            self.idle.remove(&page.idle_since);
            self.count_held();
        }
        self.counts.hits += 1;
        Some(id)
    }

    /// Makes a held page's contents known. It is full and is not written any more. Contents that another page has
    /// already stay with that one.
    pub(super) fn publish(&mut self, id: PageId, key: PageKey) {
        let page = &mut self.pages[id as usize];
        if page.key.is_none() && !self.index.contains_key(&key) {
            page.key = Some(key);
            self.index.insert(key, id);
        }
    }

    /// Counts a page that was computed because nobody had it.
    pub(super) fn count_miss(&mut self) {
        self.counts.misses += 1;
    }

    /// Takes one holder away. Known contents become idle, unknown ones free.
    pub(super) fn release(&mut self, id: PageId) {
        let page = &mut self.pages[id as usize];
        match page.holders {
            0 => self.wrong_releases += 1,
            1 => {
                page.holders = 0;
                self.counts.held -= 1;
                if page.key.is_some() {
                    self.clock += 1;
                    page.idle_since = self.clock;
                    self.idle.insert(self.clock, id);
                } else {
                    self.free.push(id);
                }
            }
            _ => page.holders -= 1,
        }
    }

    /// Recounts everything: every page is free, idle or held, by as many as `tables` (the page tables of all sequences)
    /// say; the index and the pages agree.
    ///
    /// # Errors
    /// What is wrong first.
    pub(super) fn check_integrity<'a>(&self, tables: impl Iterator<Item = &'a [PageId]>) -> Result<(), String> {
        if self.wrong_releases > 0 {
            return Err(format!("{} pages were given back that nobody held", self.wrong_releases));
        }
        let mut holders = vec![0_u32; self.pages.len()];
        for &id in tables.flatten() {
            *holders.get_mut(id as usize).ok_or_else(|| format!("page {id} is in a table and not in the pool"))? += 1;
        }
        let mut places = vec![0_u8; self.pages.len()];
        for &id in self.free.iter().chain(self.idle.values()) {
            places[id as usize] += 1;
        }
        let mut indexed = 0;
        for (id, page) in self.pages.iter().enumerate() {
            if page.holders != holders[id] {
                return Err(format!("page {id} counts {} holders and has {}", page.holders, holders[id]));
            }
            if usize::from(places[id]) != usize::from(page.holders == 0) {
                return Err(format!("page {id} with {} holders is {} times free or idle", page.holders, places[id]));
            }
            if page.holders == 0 && page.key.is_some() != (self.idle.get(&page.idle_since) == Some(&(id as PageId))) {
                return Err(format!("page {id} is idle exactly if its contents are known"));
            }
            if let Some(key) = &page.key {
                indexed += 1;
                if self.index.get(key) != Some(&(id as PageId)) {
                    return Err(format!("page {id} has contents that the index does not know"));
                }
            }
        }
        let held = holders.iter().filter(|&&count| count > 0).count();
        if indexed != self.index.len() {
            return Err(format!("the index has {} entries for {indexed} pages", self.index.len()));
        }
        if held != self.counts.held || held + self.free.len() + self.idle.len() != self.pages.len() {
            return Err(format!(
                "{held} held (counted {}), {} free and {} idle pages are not {}",
                self.counts.held,
                self.free.len(),
                self.idle.len(),
                self.pages.len()
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(number: u32) -> PageKey {
        PageKey::root(None).child(&[number])
    }

    #[test]
    fn a_shuffled_pool_gives_out_every_page_once_in_another_order() {
        let order = |seed: Option<u64>| {
            let mut pool = PagePool::new(50);
            if let Some(seed) = seed {
                pool.shuffle_free(seed);
            }
            pool.check_integrity(std::iter::empty()).unwrap();
            std::iter::from_fn(|| pool.allocate()).collect::<Vec<_>>()
        };
        let plain = order(None);
        assert_eq!(plain, (0..50).collect::<Vec<_>>());
        assert_ne!(order(Some(1)), order(Some(2)));
        for seed in 1..3 {
            let mut shuffled = order(Some(seed));
            assert_ne!(shuffled, plain);
            shuffled.sort_unstable();
            assert_eq!(shuffled, plain);
        }
    }

    #[test]
    fn keys_depend_on_salt_parent_and_every_token() {
        let roots = [PageKey::root(None), PageKey::root(Some("")), PageKey::root(Some("a"))];
        let mut keys = Vec::new();
        for root in roots {
            keys.extend([root, root.child(&[1, 2]), root.child(&[2, 1]), root.child(&[1]).child(&[2])]);
        }
        for (index, key) in keys.iter().enumerate() {
            assert!(!keys[..index].contains(key), "{index}");
        }
        assert_eq!(roots[2].child(&[1, 2]), PageKey::root(Some("a")).child(&[1, 2]));
    }

    #[test]
    fn pages_are_shared_kept_and_given_away_least_recently_used_first() {
        let mut pool = PagePool::new(3);
        let pages: Vec<_> = (0..3).map(|_| pool.allocate().unwrap()).collect();
        assert_eq!(pool.allocate(), None);
        for (number, &page) in pages.iter().enumerate() {
            pool.publish(page, key(number as u32));
        }
        assert_eq!(pool.acquire(&key(0)), Some(pages[0]));
        assert_eq!(pool.acquire(&key(7)), None);
        pool.check_integrity([&pages[..], &pages[..1]].into_iter()).unwrap();
        for &page in [0, 1, 2, 0].map(|index: usize| &pages[index]) {
            pool.release(page);
        }
        pool.check_integrity(std::iter::empty()).unwrap();
        // Page 0 was given back last; page 1 is the oldest.
        assert_eq!(pool.allocate(), Some(pages[1]));
        assert_eq!((pool.find(&key(1)), pool.find(&key(0))), (None, Some(false)));
        assert_eq!(pool.acquire(&key(2)), Some(pages[2]));
        assert_eq!(pool.allocate(), Some(pages[0]));
        let counts = pool.counts();
        assert_eq!((counts.held, counts.idle, counts.high_water), (3, 0, 3));
        assert_eq!((counts.hits, counts.evictions), (2, 2));
        pool.check_integrity([&pages[..]].into_iter()).unwrap();
    }

    #[test]
    fn contents_that_are_known_already_stay_where_they_are() {
        let mut pool = PagePool::new(2);
        let (first, second) = (pool.allocate().unwrap(), pool.allocate().unwrap());
        pool.publish(first, key(1));
        pool.publish(second, key(1));
        pool.release(second);
        assert_eq!((pool.counts().idle, pool.available()), (0, 1));
        assert_eq!(pool.acquire(&key(1)), Some(first));
        pool.check_integrity([&[first, first][..]].into_iter()).unwrap();
    }

    #[test]
    fn the_recount_finds_wrong_books() {
        let mut pool = PagePool::new(2);
        let page = pool.allocate().unwrap();
        assert!(pool.check_integrity(std::iter::empty()).is_err(), "a page that leaked");
        assert!(pool.check_integrity([&[page, page][..]].into_iter()).is_err(), "a page in two tables, held once");
        assert!(pool.check_integrity([&[page, 9][..]].into_iter()).is_err(), "a page that is not there");
        pool.check_integrity([&[page][..]].into_iter()).unwrap();
        pool.release(page);
        pool.check_integrity(std::iter::empty()).unwrap();
        pool.release(page);
        assert!(pool.check_integrity(std::iter::empty()).is_err(), "a page given back twice");
    }
}
