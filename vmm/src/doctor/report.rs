//! The findings as text and as JSON, and the verdict on the whole.

use std::fmt::Write;

use serde::Serialize;

use super::finding::{Finding, Verdict, Weight};
use hindsight_replay::foreign::shown;

/// The way out for a host that cannot record.
pub(super) const WAY_OUT: &str = "use a host with kvm_intel or kvm_amd, or run `scripts/box COMMAND`, \
                           which needs no KVM of the host's";

/// Everything that was found.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Whether this host can record.
    pub can_record: bool,
    /// Whether it can, in a line; if not, why not and what to do.
    pub verdict: String,
    /// What goes missing here, or what may come in unnoticed.
    pub limits: Vec<&'static str>,
    /// Each probe's finding, in the order of asking.
    pub probes: Vec<Finding>,
}

impl Report {
    /// The report on `probes`.
    pub fn new(probes: Vec<Finding>) -> Report {
        let stops: Vec<&Finding> = probes.iter().filter(|finding| finding.stops()).collect();
        let can_record = stops.is_empty();
        let limits = limits(&probes);
        let verdict = if can_record {
            "this host can record".to_string()
        } else {
            let reasons: Vec<String> = stops
                .iter()
                .map(|finding| format!("\"{}: {}\"", finding.group, finding.probe))
                .collect();
            let verb = if reasons.len() == 1 { "does" } else { "do" };
            format!(
                "this host cannot record: {} {verb} not hold; {WAY_OUT}",
                reasons.join(", ")
            )
        };
        Report {
            can_record,
            verdict,
            limits,
            probes,
        }
    }

    /// As lines for people.
    pub fn text(&self) -> String {
        let width = self
            .probes
            .iter()
            .map(|finding| finding.probe.len())
            .max()
            .unwrap_or(0);
        let mut text = String::new();
        let mut group = "";
        for finding in &self.probes {
            if finding.group != group {
                let gap = if group.is_empty() { "" } else { "\n" };
                group = finding.group;
                writeln!(text, "{gap}{group}").expect("a String takes what is written");
            }
            let Finding {
                probe,
                verdict,
                detail,
                cost,
                ..
            } = finding;
            // It quotes the host: names of CPUs and kernels, errors.
            let detail = shown(detail);
            write!(text, "  {probe:width$}  {:11}  {detail}", verdict.text())
                .expect("a String takes what is written");
            let why = match verdict {
                Verdict::Fails => " -- ",
                Verdict::Unknown => " -- otherwise: ",
                Verdict::Holds => "",
            };
            if !why.is_empty() && !cost.is_empty() {
                write!(text, "{why}{cost}").expect("a String takes what is written");
            }
            text.push('\n');
        }
        write!(text, "\n{}", self.verdict).expect("a String takes what is written");
        // Who cannot record at all does not ask what else would be missing.
        if self.can_record && !self.limits.is_empty() {
            text.push_str(", within these limits:");
            for limit in &self.limits {
                write!(text, "\n  {limit}").expect("a String takes what is written");
            }
        }
        text.push('\n');
        text
    }
}

/// The costs of features that are missing and holes that are open, each once.
fn limits(probes: &[Finding]) -> Vec<&'static str> {
    let mut limits = Vec::new();
    for finding in probes {
        let counts = matches!(finding.weight, Weight::Feature | Weight::Hole);
        if counts && finding.verdict != Verdict::Holds && !limits.contains(&finding.cost) {
            limits.push(finding.cost);
        }
    }
    limits
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finding(probe: &'static str, verdict: Verdict, weight: Weight) -> Finding {
        Finding {
            group: "g",
            probe,
            verdict,
            detail: "d".to_string(),
            cost: "c",
            weight,
        }
    }

    #[test]
    fn a_missing_need_stops_recording_and_is_named_with_the_way_out() {
        let report = Report::new(vec![
            finding("fine", Verdict::Holds, Weight::Gate),
            finding("broken", Verdict::Fails, Weight::Needed),
        ]);
        assert!(!report.can_record);
        assert!(
            report.verdict.contains("\"g: broken\" does not hold")
                && report.verdict.contains("scripts/box")
        );
        assert!(!report.verdict.contains("fine"));
    }

    #[test]
    fn missing_features_and_what_cannot_be_told_do_not_stop_it() {
        let report = Report::new(vec![
            finding("feature", Verdict::Fails, Weight::Feature),
            finding("hole", Verdict::Fails, Weight::Hole),
            finding("fact", Verdict::Fails, Weight::Fact),
            finding("need", Verdict::Unknown, Weight::Needed),
        ]);
        assert!(report.can_record);
        assert_eq!(report.limits, ["c"]);
        assert!(
            report
                .text()
                .ends_with("\nthis host can record, within these limits:\n  c\n")
        );
    }

    #[test]
    fn the_text_has_one_line_per_probe_and_the_cost_only_where_it_is_paid() {
        let report = Report::new(vec![
            finding("a", Verdict::Holds, Weight::Fact),
            finding("longer", Verdict::Fails, Weight::Fact),
        ]);
        let expected = "g\n  a       holds        d\n  longer  DOES NOT     d -- c\n\n\
                        this host can record\n";
        assert_eq!(report.text(), expected);
    }

    #[test]
    fn json_has_what_scripts_need() {
        let report = Report::new(vec![finding("a", Verdict::Fails, Weight::Gate)]);
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["can_record"], false);
        assert_eq!(json["probes"][0]["verdict"], "does not");
        for field in ["group", "probe", "detail", "cost"] {
            assert!(json["probes"][0][field].is_string(), "{field}");
        }
    }
}
