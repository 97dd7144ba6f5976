//! When requests are due.

use std::time::Duration;

use crate::testing::TestRng;

/// The times before `duration` at which requests are due, `per_second` of them on average, with exponential gaps: a
/// Poisson process, the same for the same seed.
#[must_use]
pub fn due_times(per_second: f64, seed: u64, duration: Duration) -> Vec<Duration> {
    if per_second.is_nan() || per_second <= 0.0 {
        return Vec::new();
    }
    let mut random = TestRng::new(seed);
    let mut at = 0.0;
    let mut times = Vec::new();
    loop {
        // 53 bits: uniform in [0, 1), so the logarithm is finite.
        let uniform = (random.next_u64() >> 11) as f64 / (1_u64 << 53) as f64;
        at -= (1.0 - uniform).ln() / per_second;
        if at >= duration.as_secs_f64() {
            return times;
        }
        times.push(Duration::from_secs_f64(at));
    }
}
