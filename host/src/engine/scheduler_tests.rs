//! Random traffic against the scheduler, on a device of its own: a table that holds, for each place of each page, the
//! digest of the tokens up to there. Whoever reads a place must find the digest of its own tokens. The checks know
//! nothing of how the scheduler decides; three planted faults show that they can fail.

use std::collections::BTreeMap;

use super::*;
use crate::testing::TestRng;

/// Small, so that prompts often begin alike.
const VOCAB: u64 = 3;

/// What is tested: the scheduler, or one with a fault.
trait Subject {
    fn scheduler(&mut self) -> &mut Scheduler;

    fn plan(&mut self) -> Plan {
        self.scheduler().plan()
    }

    fn remove(&mut self, id: SequenceId) -> Option<Sequence> {
        self.scheduler().remove(id)
    }
}

impl Subject for Scheduler {
    fn scheduler(&mut self) -> &mut Scheduler {
        self
    }
}

struct DoubleFree(Scheduler);

impl Subject for DoubleFree {
    fn scheduler(&mut self) -> &mut Scheduler {
        &mut self.0
    }

    fn remove(&mut self, id: SequenceId) -> Option<Sequence> {
        let page = self.0.sequence(id).and_then(|sequence| sequence.pages.first().copied());
        let removed = self.0.remove(id);
        if let Some(page) = page {
            self.0.pool.release(page);
        }
        removed
    }
}

struct Overrun(Scheduler);

impl Subject for Overrun {
    fn scheduler(&mut self) -> &mut Scheduler {
        &mut self.0
    }

    fn plan(&mut self) -> Plan {
        let mut plan = self.0.plan();
        if let Some(last) = plan.segments.last_mut() {
            last.rows = self.0.sequence(last.id).unwrap().remaining();
            last.wants_token = true;
        }
        plan
    }
}

/// Plans prompts as if logits cost nothing.
struct Prodigal(Scheduler);

impl Subject for Prodigal {
    fn scheduler(&mut self) -> &mut Scheduler {
        &mut self.0
    }

    fn plan(&mut self) -> Plan {
        let room = self.0.limits.logits_rows;
        self.0.limits.logits_rows = 1 << 30;
        let plan = self.0.plan();
        self.0.limits.logits_rows = room;
        plan
    }
}

struct Starving(Scheduler);

impl Subject for Starving {
    fn scheduler(&mut self) -> &mut Scheduler {
        &mut self.0
    }

    fn plan(&mut self) -> Plan {
        let mut plan = self.0.plan();
        plan.segments.retain(|segment| segment.id % 50 != 0);
        plan
    }
}

struct Live {
    prompt_tokens: usize,
    most_tokens: usize,
    salt: u64,
    /// Where the prompt's logits are wanted: how many rows have given theirs.
    scored: Option<usize>,
    /// The plan by which it has ended.
    deadline: u64,
}

/// What a run of random steps has met.
#[derive(Debug, Default)]
struct Tally {
    finished: u64,
    cancelled: u64,
    refused: u64,
    preemptions: u64,
    counts: PageCounts,
    largest_share: usize,
    cached_tokens: u64,
    scored: u64,
    /// Steps planned before the tokens of the one before were known.
    ahead: u64,
}

fn mix(digest: u64, token: u32) -> u64 {
    let mut z = (digest ^ u64::from(token)).wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb)
}

/// Random steps with one seed.
struct Traffic<'a, S> {
    subject: &'a mut S,
    limits: SchedulerLimits,
    random: TestRng,
    places: Vec<u64>,
    live: BTreeMap<SequenceId, Live>,
    plans: u64,
    /// The oldest running sequence, and how many plans have passed it over.
    oldest: (SequenceId, u64),
    tally: Tally,
}

impl<S: Subject> Traffic<'_, S> {
    fn longest(&self) -> usize {
        self.limits.pages * self.limits.page_tokens
    }

    fn decode_share(&self) -> usize {
        self.limits.step_tokens - self.limits.reserved_tokens()
    }

    /// Plans that pass at most between two turns of a generating sequence.
    fn round(&self) -> u64 {
        self.limits.running.div_ceil(self.decode_share()) as u64 + 1
    }

    fn submit(&mut self) -> Result<(), String> {
        let longest = self.longest() as u64;
        let prompt_tokens = match self.random.below(4) {
            0 => 1 + self.random.below(3),
            1 => 1 + self.random.below(longest),
            _ => 1 + self.random.below(longest / 2),
        };
        let most_tokens = (prompt_tokens + 1 + self.random.below(longest / 3)) as usize;
        let prompt: Vec<u32> =
            (0..prompt_tokens).map(|place| if place % 4 == 3 { self.random.below(VOCAB) as u32 } else { 1 }).collect();
        let salt = self.random.below(8) / 7;
        let result = self.subject.scheduler().submit(prompt, most_tokens, (salt == 1).then_some("salt"));
        match result {
            Ok(id) => {
                if most_tokens > self.longest() {
                    return Err("a request was taken that can never fit".to_owned());
                }
                // The oldest one is never put back, has a turn in each round and needs at most so many turns; then the next
                // one is the oldest.
                let scored = (self.random.below(6) == 0).then_some(0);
                if scored.is_some() {
                    self.subject.scheduler().score_prompt(id);
                }
                let each = self.longest() as u64 * (1 + self.round());
                let deadline = self.plans + (self.live.len() as u64 + 1) * each;
                let live = Live { prompt_tokens: prompt_tokens as usize, most_tokens, salt, scored, deadline };
                self.live.insert(id, live);
            }
            Err(NeverFits { needed_pages, total_pages }) => {
                if needed_pages <= total_pages || most_tokens <= self.longest() {
                    return Err("a request was refused that fits".to_owned());
                }
                self.tally.refused += 1;
            }
        }
        Ok(())
    }

    fn end(&mut self, id: SequenceId) -> Result<Sequence, String> {
        self.live.remove(&id);
        self.subject.remove(id).ok_or_else(|| format!("sequence {id} is lost"))
    }

    fn cancel(&mut self) -> Result<(), String> {
        let place = self.random.below(self.live.len().max(1) as u64) as usize;
        if let Some(&id) = self.live.keys().nth(place) {
            self.end(id)?;
            self.tally.cancelled += 1;
        }
        Ok(())
    }

    fn step(&mut self) -> Result<(), String> {
        self.plans += 1;
        let preempted = self.subject.scheduler().preemptions();
        let plan = self.subject.plan();
        let (rows, budget) = (plan.rows(), self.limits.step_tokens);
        if rows > budget {
            return Err(format!("{rows} tokens in a step of {budget}"));
        }
        if rows == 0 && !self.live.is_empty() && self.subject.scheduler().preemptions() == preempted {
            return Err(format!("nothing is planned for {} requests", self.live.len()));
        }
        if plan.segments.windows(2).any(|pair| pair[0].rows > 1 && pair[1].rows == 1) {
            return Err("a single row behind longer segments".to_owned());
        }
        let late = self.live.iter().next().filter(|(_, live)| live.deadline < self.plans);
        if let Some((id, _)) = late {
            return Err(format!("request {id} has waited beyond its bound"));
        }
        self.watch_oldest(&plan)?;

        self.score(&plan)?;
        let mut plan = plan;
        loop {
            let next_tokens =
                plan.segments.iter().map(|segment| self.compute(segment)).collect::<Result<Vec<_>, _>>()?;
            self.subject.scheduler().commit(&plan);
            // Half of the steps that can be followed by one planned ahead are, before their tokens are known.
            let ahead = if self.random.below(2) == 0 { self.subject.scheduler().plan_ahead(&plan) } else { None };
            self.take(&plan, next_tokens)?;
            let Some(mut ahead) = ahead else { return Ok(()) };
            if ahead.rows() > budget || ahead.segments.len() != plan.segments.len() {
                return Err(format!("{} tokens ahead, behind {}", ahead.rows(), plan.rows()));
            }
            self.tally.ahead += 1;
            ahead.segments.retain(|segment| self.live.contains_key(&segment.id));
            if ahead.segments.is_empty() {
                return Ok(());
            }
            plan = ahead;
        }
    }

    /// Gives the sequences of a step their tokens, and ends some.
    fn take(&mut self, plan: &Plan, next_tokens: Vec<Option<u32>>) -> Result<(), String> {
        for (segment, token) in plan.segments.iter().zip(next_tokens) {
            if let Some(token) = token {
                self.subject.scheduler().push(segment.id, token);
                let scheduler = self.subject.scheduler();
                let tokens = scheduler.sequence(segment.id).map_or(0, |sequence| sequence.tokens.len());
                let live = &self.live[&segment.id];
                if tokens == live.most_tokens || self.random.below(40) == 0 {
                    let ended = self.end(segment.id)?;
                    self.tally.finished += 1;
                    self.tally.cached_tokens += ended.cached_tokens as u64;
                    if ended.cached_tokens >= ended.prompt_tokens {
                        return Err("more tokens came from the cache than can".to_owned());
                    }
                }
            }
        }
        Ok(())
    }

    /// Every row of a prompt whose logits are wanted gives them once, in order, before the first token; in no step are
    /// there more logits than there is room for.
    fn score(&mut self, plan: &Plan) -> Result<(), String> {
        let mut logits = 0;
        for segment in &plan.segments {
            logits += usize::from(segment.wants_token);
            let positions = self.subject.scheduler().sequence(segment.id).map(|s| s.scores_of_next(segment.rows));
            let (positions, live) = (positions.unwrap_or_default(), self.live.get_mut(&segment.id));
            let Some(live) = live else { continue };
            logits += positions.len();
            self.tally.scored += positions.len() as u64;
            let Some(scored) = &mut live.scored else {
                if positions.is_empty() {
                    continue;
                } else {
                    return Err("logits that nobody wants".to_owned());
                };
            };
            if !positions.is_empty() && positions.start != *scored {
                return Err(format!("the logits of {positions:?} come behind those of {scored} rows"));
            }
            *scored += positions.len();
            if segment.wants_token && *scored + 1 < live.prompt_tokens {
                return Err(format!("a token is chosen behind {scored} of {} rows of a prompt", live.prompt_tokens));
            }
        }
        let room = self.limits.logits_rows;
        if logits > room { Err(format!("logits of {logits} rows in a step with room for {room}")) } else { Ok(()) }
    }

    /// The oldest running sequence gets something in every round.
    fn watch_oldest(&mut self, plan: &Plan) -> Result<(), String> {
        let Some(oldest) = self.subject.scheduler().running().first().map(|sequence| sequence.id) else {
            return Ok(());
        };
        if self.oldest.0 != oldest || plan.segments.iter().any(|segment| segment.id == oldest) {
            self.oldest = (oldest, 0);
        } else {
            self.oldest.1 += 1;
        }
        if self.oldest.1 > self.round() {
            return Err(format!("sequence {oldest}, the oldest, starves"));
        }
        Ok(())
    }

    /// Does what a device would: writes the segment's places, reads all before them; the next token follows from them.
    fn compute(&mut self, segment: &Segment) -> Result<Option<u32>, String> {
        let page_tokens = self.limits.page_tokens;
        let running = self.subject.scheduler().running();
        let Some(sequence) = running.iter().find(|sequence| sequence.id == segment.id) else {
            return Err(format!("sequence {} is planned and does not run", segment.id));
        };
        let live = &self.live[&segment.id];
        let end = segment.first + segment.rows;
        if segment.first != sequence.computed || end > sequence.tokens.len() || segment.rows == 0 {
            return Err(format!("{segment:?} of {} tokens, {} computed", sequence.tokens.len(), sequence.computed));
        }
        if segment.wants_token != (end == sequence.tokens.len()) || live.prompt_tokens != sequence.prompt_tokens {
            return Err(format!("{segment:?} of {} tokens", sequence.tokens.len()));
        }
        let mut digest = live.salt;
        for (position, &token) in sequence.tokens[..end].iter().enumerate() {
            digest = mix(digest, token);
            let &page = sequence.pages.get(position / page_tokens).ok_or("a page is missing")?;
            let place = page as usize * page_tokens + position % page_tokens;
            if position >= segment.first {
                if position == segment.first || position % page_tokens == 0 {
                    let holders = running.iter().filter(|sequence| sequence.pages.contains(&page)).count();
                    if holders != 1 {
                        return Err(format!("page {page} is written and has {holders} holders"));
                    }
                }
                self.places[place] = digest;
            } else if self.places[place] != digest {
                return Err(format!("sequence {} finds other tokens at position {position}", segment.id));
            }
        }
        Ok(segment.wants_token.then_some((mix(digest, 7) % VOCAB) as u32))
    }

    fn check(&mut self) -> Result<(), String> {
        let scheduler = self.subject.scheduler();
        scheduler.check_integrity()?;
        let known = scheduler.running.len() + scheduler.waiting.len();
        let shared = scheduler.pool.counts().held;
        let listed: usize = scheduler.running.iter().map(|sequence| sequence.pages.len()).sum();
        self.tally.largest_share = self.tally.largest_share.max(listed - shared);
        if known != self.live.len() {
            return Err(format!("{known} sequences for {} requests", self.live.len()));
        }
        Ok(())
    }
}

/// `steps` random steps, then no more requests until all have ended; or what went wrong, and at which step.
fn drive(subject: &mut impl Subject, seed: u64, steps: u64) -> Result<Tally, String> {
    let limits = *subject.scheduler().limits();
    let mut traffic = Traffic {
        subject,
        limits,
        random: TestRng::new(seed),
        places: vec![0; limits.pages * limits.page_tokens],
        live: BTreeMap::new(),
        plans: 0,
        oldest: (0, 0),
        tally: Tally::default(),
    };
    let most_waiting = 2 * limits.running as u64 + 2;
    for step in 0..steps {
        let result = match traffic.random.below(16) {
            0..=3 if (traffic.live.len() as u64) < most_waiting => traffic.submit(),
            4 => traffic.cancel(),
            _ => traffic.step(),
        };
        result.and_then(|()| traffic.check()).map_err(|why| format!("seed {seed}, step {step}: {why}"))?;
    }
    // The deadlines bound this.
    while !traffic.live.is_empty() {
        traffic.step().and_then(|()| traffic.check()).map_err(|why| format!("seed {seed}, at the end: {why}"))?;
    }
    if traffic.subject.scheduler().pages().held != 0 {
        return Err(format!("seed {seed}: pages are held when nothing runs"));
    }
    traffic.tally.preemptions = traffic.subject.scheduler().preemptions();
    traffic.tally.counts = traffic.subject.scheduler().pages();
    Ok(traffic.tally)
}

fn limits(page_tokens: usize, pages: usize, running: usize, step_tokens: usize) -> SchedulerLimits {
    SchedulerLimits { page_tokens, pages, running, step_tokens, logits_rows: running.min(step_tokens) }
}

/// Many shapes, each with its own seed: pages few and many, budgets below and above the sequences that run.
const SHAPES: [SchedulerLimits; 8] = [
    SchedulerLimits { page_tokens: 4, pages: 6, running: 4, step_tokens: 8, logits_rows: 4 },
    SchedulerLimits { page_tokens: 4, pages: 10, running: 6, step_tokens: 5, logits_rows: 7 },
    SchedulerLimits { page_tokens: 2, pages: 9, running: 3, step_tokens: 4, logits_rows: 3 },
    SchedulerLimits { page_tokens: 8, pages: 5, running: 8, step_tokens: 16, logits_rows: 9 },
    SchedulerLimits { page_tokens: 4, pages: 8, running: 7, step_tokens: 2, logits_rows: 2 },
    SchedulerLimits { page_tokens: 1, pages: 13, running: 5, step_tokens: 6, logits_rows: 8 },
    SchedulerLimits { page_tokens: 3, pages: 16, running: 2, step_tokens: 100, logits_rows: 3 },
    SchedulerLimits { page_tokens: 4, pages: 30, running: 12, step_tokens: 24, logits_rows: 12 },
];

/// Five million steps over all shapes.
const STEPS: u64 = 5_000_000 / SHAPES.len() as u64;

fn random_traffic(shapes: &[usize]) {
    for &shape in shapes {
        let tally = drive(&mut Scheduler::new(SHAPES[shape]), 1 + shape as u64, STEPS);
        let tally = tally.unwrap_or_else(|why| panic!("{:?}: {why}", SHAPES[shape]));
        // What was meant to be met has been met.
        let met = [
            tally.finished,
            tally.cancelled,
            tally.refused,
            tally.preemptions,
            tally.counts.hits,
            tally.counts.misses,
            tally.counts.evictions,
            tally.largest_share as u64,
            tally.cached_tokens,
            tally.scored,
            tally.ahead,
        ];
        assert!(met.iter().all(|&count| count > 0), "{:?}: {tally:?}", SHAPES[shape]);
        assert!(tally.counts.high_water <= SHAPES[shape].pages && tally.finished > STEPS / 200, "{tally:?}");
    }
}

#[test]
fn random_traffic_with_few_pages() {
    random_traffic(&[0, 1, 2]);
}

#[test]
fn random_traffic_with_many_sequences() {
    random_traffic(&[3, 4, 5]);
}

#[test]
fn random_traffic_with_many_pages() {
    random_traffic(&[6, 7]);
}

#[test]
fn planted_faults_are_found() {
    for (shape, limits) in SHAPES.into_iter().enumerate() {
        let scheduler = || Scheduler::new(limits);
        let freed = drive(&mut DoubleFree(scheduler()), 1, 10_000).unwrap_err();
        assert!(freed.contains("given back") || freed.contains("holders"), "{freed}");
        let starved = drive(&mut Starving(scheduler()), 1, 100_000).unwrap_err();
        assert!(starved.contains("starves") || starved.contains("nothing is planned"), "{starved}");
        // Where every row of a step can have logits there is nothing to exceed.
        if limits.logits_rows < limits.step_tokens {
            let exceeded = drive(&mut Prodigal(scheduler()), 1, 10_000).unwrap_err();
            assert!(exceeded.contains("in a step with room for"), "{exceeded}");
        }
        // A budget that all prompts together never reach cannot be overrun.
        if shape != 6 {
            let overrun = drive(&mut Overrun(scheduler()), 1, 10_000).unwrap_err();
            assert!(overrun.contains("tokens in a step") || overrun.contains("with room for"), "{overrun}");
        }
    }
}

#[test]
fn a_request_that_can_never_fit_is_refused_with_the_numbers() {
    let mut scheduler = Scheduler::new(limits(4, 3, 2, 8));
    assert_eq!(scheduler.submit(vec![1], 13, None), Err(NeverFits { needed_pages: 4, total_pages: 3 }));
    assert!(scheduler.submit(vec![1], 12, None).is_ok());
}

#[test]
fn a_long_prompt_and_short_ones_move_together() {
    let mut scheduler = Scheduler::new(limits(64, 1000, 8, 64));
    let long = scheduler.submit((0..10_000).collect(), 10_010, None).unwrap();
    let short = scheduler.submit((0..20).rev().collect(), 30, None).unwrap();
    let plan = scheduler.plan();
    let rows_of = |id| plan.segments.iter().find(|segment| segment.id == id).map_or(0, |segment| segment.rows);
    assert_eq!((rows_of(long), rows_of(short), plan.rows()), (44, 20, 64));
    assert!(plan.segments.iter().all(|segment| segment.wants_token == (segment.id == short)));
}

#[test]
fn choices_of_one_prompt_compute_it_once() {
    let mut scheduler = Scheduler::new(limits(4, 100, 8, 64));
    let prompt: Vec<u32> = (0..22).collect();
    for _ in 0..4 {
        scheduler.submit(prompt.clone(), 30, None).unwrap();
    }
    scheduler.submit(prompt.clone(), 30, Some("another")).unwrap();
    let first = scheduler.plan();
    assert_eq!(first.segments.iter().map(|s| (s.id, s.rows)).collect::<Vec<_>>(), [(1, 22), (5, 22)]);
    scheduler.commit(&first);
    for segment in &first.segments {
        scheduler.push(segment.id, 9);
    }
    let second = scheduler.plan();
    let prompts: Vec<_> = second.segments[2..].iter().map(|s| (s.id, s.first, s.rows)).collect();
    assert_eq!(prompts, [(2, 20, 2), (3, 20, 2), (4, 20, 2)]);
    assert_eq!(scheduler.sequence(3).unwrap().cached_tokens, 20);
    assert_eq!((scheduler.pages().hits, scheduler.pages().held), (15, 5 + 4 + 6));
    scheduler.check_integrity().unwrap();
}

#[test]
fn pages_of_generated_tokens_are_found_by_a_later_prompt() {
    let mut scheduler = Scheduler::new(limits(4, 20, 2, 64));
    let first = scheduler.submit(vec![1, 2, 3], 12, None).unwrap();
    for token in 10..19 {
        let plan = scheduler.plan();
        scheduler.commit(&plan);
        scheduler.push(first, token);
    }
    let tokens = scheduler.remove(first).unwrap().tokens;
    assert_eq!((tokens.len(), scheduler.pages().idle), (12, 2));
    // The third page's last token was chosen and never computed.
    let again = scheduler.submit(tokens, 20, None).unwrap();
    let plan = scheduler.plan();
    assert_eq!(plan.segments, [Segment { id: again, first: 8, rows: 4, wants_token: true }]);
    // Half a page more or less: only full pages count.
    let shorter = scheduler.submit(vec![1, 2, 3, 10, 11], 20, None).unwrap();
    let plan = scheduler.plan();
    assert!(plan.segments.contains(&Segment { id: shorter, first: 4, rows: 1, wants_token: true }));
}
