//! The alarm of the MC146818: a time of day, any field of which may be "any".

use super::calendar::DAY_SECONDS;

/// What the alarm registers ask for; `None` in a field matches every value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Alarm {
    pub hour: Option<i64>,
    pub minute: Option<i64>,
    pub second: Option<i64>,
}

impl Alarm {
    /// How many seconds after the second `of_day` the alarm goes off next: 1 to 86400.
    pub(super) fn next_after(self, of_day: i64) -> Option<i64> {
        let start = of_day + 1;
        let first = |wanted: Option<i64>, from: i64, end: i64| match wanted {
            None => (from < end).then_some(from),
            Some(value) => (from <= value && value < end).then_some(value),
        };
        // Today from `start` on, else tomorrow from midnight: the alarm recurs daily.
        for (day_start, from) in [(0, start), (DAY_SECONDS, 0)] {
            let mut from = from;
            while from < DAY_SECONDS {
                let hour = first(self.hour, from / 3_600, 24);
                let Some(hour) = hour else { break };
                from = from.max(hour * 3_600);
                let Some(minute) = first(self.minute, from / 60 % 60, 60) else {
                    from = (hour + 1) * 3_600;
                    continue;
                };
                from = from.max(hour * 3_600 + minute * 60);
                let Some(second) = first(self.second, from % 60, 60) else {
                    from = hour * 3_600 + (minute + 1) * 60;
                    continue;
                };
                return Some(day_start + hour * 3_600 + minute * 60 + second - of_day);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn matches(alarm: Alarm, of_day: i64) -> bool {
        let meets = |wanted: Option<i64>, value: i64| wanted.is_none_or(|wanted| wanted == value);
        meets(alarm.hour, of_day / 3_600)
            && meets(alarm.minute, of_day / 60 % 60)
            && meets(alarm.second, of_day % 60)
    }

    proptest! {
        #[test]
        fn the_next_alarm_is_the_first_matching_second(
            hour in prop::option::of(0..24i64),
            minute in prop::option::of(0..60i64),
            second in prop::option::of(0..60i64),
            of_day in 0..DAY_SECONDS,
        ) {
            let alarm = Alarm { hour, minute, second };
            let searched =
                (1..=DAY_SECONDS).find(|ahead| matches(alarm, (of_day + ahead) % DAY_SECONDS));
            prop_assert_eq!(alarm.next_after(of_day), searched);
        }
    }
}
