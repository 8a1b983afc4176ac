//! What was measured: rows of ours beside a peer's, as a table, as JSON, and as a page with plots.

use serde::Serialize;

use crate::machine::Machine;

/// Which way is better.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Better {
    /// Throughput and the like: the ratio should be large.
    Higher,
    /// Latency, memory, bytes: the ratio should be small.
    Lower,
}

/// The figures of one side, one for each run.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Runs(pub Vec<f64>);

impl Runs {
    fn sorted(&self) -> Vec<f64> {
        let mut all = self.0.clone();
        all.sort_by(f64::total_cmp);
        all
    }

    /// The one in the middle; 0 without any.
    pub fn median(&self) -> f64 {
        let all = self.sorted();
        match all.len() {
            0 => 0.0,
            len if len % 2 == 1 => all[len / 2],
            len => f64::midpoint(all[len / 2 - 1], all[len / 2]),
        }
    }

    /// The lowest.
    pub fn min(&self) -> f64 {
        self.sorted().first().copied().unwrap_or(0.0)
    }

    /// The highest.
    pub fn max(&self) -> f64 {
        self.sorted().last().copied().unwrap_or(0.0)
    }
}

/// A figure of ours beside a peer's.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    /// `device`, `engine` or `server`.
    pub section: &'static str,
    /// What is measured.
    pub name: String,
    /// Median of our runs.
    pub ours: f64,
    /// Who stands beside us.
    pub peer: String,
    /// Median of the peer's runs.
    pub peer_value: f64,
    /// Of both.
    pub unit: &'static str,
    /// Ours / the peer's.
    pub ratio: f64,
    /// Which way is better.
    pub better: Better,
    /// What the ratio should reach, where anything was set.
    pub goal: Option<f64>,
    /// Whether it does.
    pub met: Option<bool>,
    /// Our runs.
    pub ours_runs: Runs,
    /// The peer's.
    pub peer_runs: Runs,
}

impl Row {
    /// From the runs of both sides, which took turns.
    pub fn new(
        section: &'static str,
        name: impl Into<String>,
        unit: &'static str,
        better: Better,
        ours_runs: Runs,
        (peer, peer_runs): (impl Into<String>, Runs),
    ) -> Row {
        let (ours, peer_value) = (ours_runs.median(), peer_runs.median());
        Row {
            section,
            name: name.into(),
            ours,
            peer: peer.into(),
            peer_value,
            unit,
            ratio: if peer_value == 0.0 { 0.0 } else { ours / peer_value },
            better,
            goal: None,
            met: None,
            ours_runs,
            peer_runs,
        }
    }

    /// The same with a goal for the ratio.
    pub fn with_goal(self, goal: f64) -> Row {
        let met = match self.better {
            Better::Higher => self.ratio >= goal,
            Better::Lower => self.ratio <= goal,
        };
        Row { goal: Some(goal), met: Some(met), ..self }
    }
}

/// All of it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// Where it was measured.
    pub machine: Machine,
    /// How to repeat it.
    pub command: String,
    /// Versions of ours and of the peers.
    pub versions: Vec<String>,
    /// The figures.
    pub rows: Vec<Row>,
    /// What a reader has to know: what was left out and why, how peers were set up.
    pub notes: Vec<String>,
}

/// A number with as many digits as say something.
pub fn figure(value: f64) -> String {
    match value.abs() {
        v if v >= 1000.0 => grouped(value),
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

fn grouped(value: f64) -> String {
    let digits = format!("{:.0}", value.abs());
    let mut out = String::from(if value < 0.0 { "-" } else { "" });
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// The rows for people.
pub fn table(report: &Report) -> String {
    let mut out = format!("machine: {}\ncommand: {}\n", report.machine.text(), report.command);
    for version in &report.versions {
        out.push_str(&format!("         {version}\n"));
    }
    let mut section = "";
    for row in &report.rows {
        if row.section != section {
            section = row.section;
            out.push_str(&format!(
                "\n{:<58} {:>12} {:>25}  {:<18} {:>12} {:>25} {:>7}  {}\n",
                section, "basalt", "min .. max", "peer", "", "min .. max", "ratio", "goal"
            ));
        }
        let range = |runs: &Runs| format!("{} .. {}", figure(runs.min()), figure(runs.max()));
        let goal = match (row.goal, row.met) {
            (Some(goal), Some(met)) => {
                let sign = if row.better == Better::Higher { ">=" } else { "<=" };
                format!("{sign} {} {}", figure(goal), if met { "met" } else { "MISSED" })
            }
            _ => String::new(),
        };
        out.push_str(&format!(
            "{:<58} {:>12} {:>25}  {:<18} {:>12} {:>25} {:>7.2}  {goal}\n",
            format!("{}, {}", row.name, row.unit),
            figure(row.ours),
            range(&row.ours_runs),
            row.peer,
            figure(row.peer_value),
            range(&row.peer_runs),
            row.ratio
        ));
    }
    if !report.notes.is_empty() {
        out.push('\n');
    }
    for note in &report.notes {
        out.push_str(&format!("note: {note}\n"));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(better: Better, ours: &[f64], peer: &[f64]) -> Row {
        Row::new("engine", "x", "ops/s", better, Runs(ours.to_vec()), ("peer", Runs(peer.to_vec())))
    }

    #[test]
    fn ratios_are_of_medians_and_goals_know_which_way_is_better() {
        let faster = row(Better::Higher, &[30.0, 10.0, 20.0], &[10.0, 5.0]);
        assert_eq!((faster.ours, faster.peer_value), (20.0, 7.5));
        assert_eq!(faster.clone().with_goal(2.5).met, Some(true));
        assert_eq!(faster.with_goal(2.7).met, Some(false));
        let slower = row(Better::Lower, &[3.0], &[2.0]);
        assert_eq!(slower.clone().with_goal(1.4).met, Some(false));
        assert_eq!(slower.with_goal(1.5).met, Some(true));
        assert_eq!(row(Better::Higher, &[1.0], &[]).ratio, 0.0);
    }

    #[test]
    fn figures_keep_what_matters() {
        let shown: Vec<String> = [1_234_567.0, 999.6, 123.4, 12.34, 1.234, 0.0].map(figure).to_vec();
        assert_eq!(shown, ["1,234,567", "1000", "123", "12.3", "1.23", "0.00"]);
    }
}
