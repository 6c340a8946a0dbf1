//! Civil dates and seconds since 1970, both ways, in the proleptic Gregorian calendar.
//!
//! The arithmetic counts years from March, so that the leap day comes last and a month's
//! first day is a linear function of its number.

/// Seconds of a day.
pub(crate) const DAY_SECONDS: i64 = 86_400;

/// A date and a time of day.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Civil {
    pub year: i64,
    /// 1 to 12.
    pub month: i64,
    /// 1 to 31.
    pub day: i64,
    pub hour: i64,
    pub minute: i64,
    pub second: i64,
}

impl Civil {
    /// The civil time of `unix_seconds`.
    pub(super) fn from_unix(unix_seconds: i64) -> Civil {
        let days = unix_seconds.div_euclid(DAY_SECONDS);
        let of_day = unix_seconds.rem_euclid(DAY_SECONDS);
        // Days since 0000-03-01, in eras of 400 years.
        let shifted = days + 719_468;
        let era = shifted.div_euclid(146_097);
        let of_era = shifted.rem_euclid(146_097);
        let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
        let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let march_month = (5 * of_year + 2) / 153;
        let month = if march_month < 10 {
            march_month + 3
        } else {
            march_month - 9
        };
        Civil {
            year: year_of_era + era * 400 + i64::from(month <= 2),
            month,
            day: of_year - (153 * march_month + 2) / 5 + 1,
            hour: of_day / 3_600,
            minute: of_day / 60 % 60,
            second: of_day % 60,
        }
    }

    /// Seconds since 1970. A day beyond its month's end runs on into the next month.
    pub(super) fn to_unix(self) -> i64 {
        let year = self.year - i64::from(self.month <= 2);
        let era = year.div_euclid(400);
        let year_of_era = year.rem_euclid(400);
        let march_month = (self.month + 9) % 12;
        let of_year = (153 * march_month + 2) / 5 + self.day - 1;
        let of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + of_year;
        let days = era * 146_097 + of_era - 719_468;
        days * DAY_SECONDS + self.hour * 3_600 + self.minute * 60 + self.second
    }
}

/// The day of the week of `unix_seconds`, Sunday being 0.
pub(crate) fn weekday(unix_seconds: i64) -> u8 {
    // 1970-01-01 was a Thursday.
    (unix_seconds.div_euclid(DAY_SECONDS) + 4).rem_euclid(7) as u8
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn known_days_are_themselves() {
        let leap = Civil {
            year: 2024,
            month: 2,
            day: 29,
            hour: 23,
            minute: 59,
            second: 59,
        };
        assert_eq!(leap.to_unix(), 1_709_251_199);
        assert_eq!(Civil::from_unix(1_709_251_199), leap);
        assert_eq!(weekday(1_709_251_199), 4);
        assert_eq!(weekday(0), 4);
    }

    proptest! {
        #[test]
        fn every_second_of_ten_thousand_years_goes_there_and_back(
            seconds in -62_167_219_200i64..=253_402_300_799,
        ) {
            prop_assert_eq!(Civil::from_unix(seconds).to_unix(), seconds);
        }
    }
}
