//! How long the engine's steps take, and for how much of that the device has work.

use std::time::Instant;

use crate::device::{Device, DeviceError, Stopwatch};

/// What the steps since the start took together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepTimes {
    /// Steps computed.
    pub steps: u64,
    /// Nanoseconds by the clock, from the end of one step to the end of the next; from its start for the first step
    /// after a pause, so that an idle engine adds nothing. 0 unless the engine takes times.
    pub wall_ns: u64,
    /// Of these, nanoseconds from a step's first work on the device to its last. What is missing to `wall_ns`
    /// is time in which the device waits for the host. 0 unless the engine takes times.
    pub device_ns: u64,
}

/// A step that was given to the device and is not over yet.
#[derive(Clone, Copy, Debug)]
pub(super) struct Running {
    watch: usize,
}

/// Counts steps and, where asked to, times them. Two may be on the device at once.
pub(super) struct StepClock {
    times: StepTimes,
    watches: Vec<Stopwatch>,
    started: usize,
    /// When the last step ended, or this one started after a pause.
    since: Option<Instant>,
}

impl StepClock {
    pub(super) fn new(device: &Device, takes_times: bool) -> Result<Self, DeviceError> {
        let watches = (0..if takes_times { 2 } else { 0 }).map(|_| device.stopwatch()).collect::<Result<_, _>>()?;
        Ok(Self { times: StepTimes::default(), watches, started: 0, since: None })
    }

    /// The device gets its first work of a step.
    pub(super) fn start(&mut self) -> Result<Running, DeviceError> {
        let watch = self.started % 2;
        self.started += 1;
        if let Some(stopwatch) = self.watches.get_mut(watch) {
            self.since.get_or_insert_with(Instant::now);
            stopwatch.start()?;
        }
        Ok(Running { watch })
    }

    /// The device has been given its last work of the step.
    pub(super) fn given(&mut self, running: Running) -> Result<(), DeviceError> {
        self.watches.get_mut(running.watch).map_or(Ok(()), Stopwatch::stop)
    }

    /// The step's tokens are here.
    pub(super) fn stop(&mut self, running: Running) -> Result<(), DeviceError> {
        self.times.steps += 1;
        if let (Some(stopwatch), Some(since)) = (self.watches.get(running.watch), &mut self.since) {
            self.times.device_ns += stopwatch.elapsed()?.as_nanos() as u64;
            let now = Instant::now();
            self.times.wall_ns += (now - *since).as_nanos() as u64;
            *since = now;
        }
        Ok(())
    }

    /// There is nothing to do.
    pub(super) fn pause(&mut self) {
        self.since = None;
    }

    pub(super) fn times(&self) -> StepTimes {
        self.times
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::device::CpuOptions;

    fn clock(takes_times: bool) -> StepClock {
        StepClock::new(&Device::cpu(CpuOptions::default()).unwrap(), takes_times).unwrap()
    }

    fn nanoseconds(duration: Duration) -> u64 {
        duration.as_nanos() as u64
    }

    #[test]
    fn the_host_counts_between_steps_and_pauses_do_not() {
        let mut clock = clock(true);
        let (work, host, pause) = (Duration::from_millis(3), Duration::from_millis(5), Duration::from_millis(200));
        let began = Instant::now();
        for _ in 0..2 {
            for step in 0..3 {
                if step > 0 {
                    std::thread::sleep(host);
                }
                let running = clock.start().unwrap();
                std::thread::sleep(work);
                clock.given(running).unwrap();
                clock.stop(running).unwrap();
            }
            clock.pause();
            std::thread::sleep(pause);
        }
        let StepTimes { steps, wall_ns, device_ns } = clock.times();
        assert_eq!(steps, 6);
        // Sleeping takes at least what was asked for, so these hold on a busy machine too.
        assert!(device_ns >= 6 * nanoseconds(work));
        assert!(wall_ns - device_ns >= 4 * nanoseconds(host), "{wall_ns} {device_ns}");
        assert!(wall_ns + 2 * nanoseconds(pause) <= nanoseconds(began.elapsed()));
    }

    #[test]
    fn without_times_steps_are_still_counted() {
        let mut clock = clock(false);
        let running = clock.start().unwrap();
        clock.given(running).unwrap();
        clock.stop(running).unwrap();
        clock.pause();
        assert_eq!(clock.times(), StepTimes { steps: 1, wall_ns: 0, device_ns: 0 });
    }
}
