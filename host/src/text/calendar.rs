//! Dates in UTC, for `strftime_now` in chat templates and for time stamps. Proleptic Gregorian calendar.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const WEEKDAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];

/// A moment, taken apart.
struct Moment {
    year: u64,
    /// 1 to 12.
    month: u64,
    /// 1 to 31.
    day: u64,
    /// Days since 1 January, from 0.
    day_of_year: u64,
    days_since_epoch: u64,
    hour: u64,
    minute: u64,
    second: u64,
    microsecond: u32,
}

impl Moment {
    /// Times before 1970 count as its first second: a clock that wrong has other problems.
    fn new(time: SystemTime) -> Self {
        let since = time.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
        let (days, seconds) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
        let mut year = 1970;
        let mut day_of_year = days;
        // At most a few hundred steps for any clock in use.
        while day_of_year >= days_in_year(year) {
            day_of_year -= days_in_year(year);
            year += 1;
        }
        let mut month = 1;
        let mut day = day_of_year;
        while day >= days_in_month(year, month) {
            day -= days_in_month(year, month);
            month += 1;
        }
        Self {
            year,
            month,
            day: day + 1,
            day_of_year,
            days_since_epoch: days,
            hour: seconds / 3600,
            minute: seconds / 60 % 60,
            second: seconds % 60,
            microsecond: since.subsec_micros(),
        }
    }

    fn month_name(&self) -> &'static str {
        MONTHS[(self.month - 1) as usize]
    }

    fn weekday_name(&self) -> &'static str {
        WEEKDAYS[(self.days_since_epoch % 7) as usize]
    }
}

fn is_leap(year: u64) -> bool {
    year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
}

fn days_in_year(year: u64) -> u64 {
    if is_leap(year) { 366 } else { 365 }
}

fn days_in_month(year: u64, month: u64) -> u64 {
    match month {
        4 | 6 | 9 | 11 => 30,
        2 if is_leap(year) => 29,
        2 => 28,
        _ => 31,
    }
}

/// `time` in the notation of RFC 3339, in UTC with milliseconds: `2026-11-23T04:11:00.250Z`.
#[must_use]
pub fn rfc3339(time: SystemTime) -> String {
    let m = Moment::new(time);
    format!(
        "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}.{:03}Z",
        m.year,
        m.month,
        m.day,
        m.hour,
        m.minute,
        m.second,
        m.microsecond / 1000
    )
}

/// `time` in UTC by a pattern of C's `strftime`, the directives that chat templates use. A directive that is not known
/// stays as it is.
#[must_use]
pub fn strftime(time: SystemTime, pattern: &str) -> String {
    let m = Moment::new(time);
    let hour12 = (m.hour + 11) % 12 + 1;
    let mut out = String::new();
    let mut chars = pattern.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let Some(mut directive) = chars.next() else {
            out.push('%');
            break;
        };
        // glibc's "no padding", which templates use in `%-d`.
        let unpadded = directive == '-';
        if unpadded {
            directive = chars.next().unwrap_or('-');
        }
        let text = match directive {
            'Y' => format!("{:04}", m.year),
            'y' => format!("{:02}", m.year % 100),
            'm' => format!("{:02}", m.month),
            'd' => format!("{:02}", m.day),
            'e' => format!("{:2}", m.day),
            'H' => format!("{:02}", m.hour),
            'I' => format!("{hour12:02}"),
            'M' => format!("{:02}", m.minute),
            'S' => format!("{:02}", m.second),
            'f' => format!("{:06}", m.microsecond),
            'j' => format!("{:03}", m.day_of_year + 1),
            'B' => m.month_name().to_owned(),
            'b' | 'h' => m.month_name()[..3].to_owned(),
            'A' => m.weekday_name().to_owned(),
            'a' => m.weekday_name()[..3].to_owned(),
            'p' => if m.hour < 12 { "AM" } else { "PM" }.to_owned(),
            'F' => format!("{:04}-{:02}-{:02}", m.year, m.month, m.day),
            'T' => format!("{:02}:{:02}:{:02}", m.hour, m.minute, m.second),
            'Z' => "UTC".to_owned(),
            'z' => "+0000".to_owned(),
            '%' => "%".to_owned(),
            other => format!("%{other}"),
        };
        if unpadded {
            let trimmed = text.trim_start_matches(['0', ' ']);
            out.push_str(if trimmed.is_empty() { "0" } else { trimmed });
        } else {
            out.push_str(&text);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(seconds)
    }

    // Expected values from `date -u -d @N`.
    #[test]
    fn known_moments() {
        assert_eq!(rfc3339(at(0)), "1970-01-01T00:00:00.000Z");
        assert_eq!(rfc3339(at(951_782_400)), "2000-02-29T00:00:00.000Z");
        assert_eq!(rfc3339(at(1_709_251_199)), "2024-02-29T23:59:59.000Z");
        assert_eq!(rfc3339(at(1_709_251_200) + Duration::from_millis(7)), "2024-03-01T00:00:00.007Z");
        assert_eq!(rfc3339(at(4_102_444_800)), "2100-01-01T00:00:00.000Z");
        assert_eq!(rfc3339(at(4_107_542_400)), "2100-03-01T00:00:00.000Z");
    }

    #[test]
    fn patterns() {
        let t = at(1_709_251_199);
        assert_eq!(strftime(t, "%d %b %Y"), "29 Feb 2024");
        assert_eq!(strftime(t, "%A, %B %-d; %I:%M %p; %j %y%%"), "Thursday, February 29; 11:59 PM; 060 24%");
        assert_eq!(strftime(at(1_709_251_200), "%-d/%-m %Q %"), "1/3 %Q %");
        assert_eq!(strftime(at(1_709_251_200), "%a %-H"), "Fri 0");
    }
}
