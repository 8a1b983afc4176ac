//! Named situations and how often a run came to them: a generator that never produces a situation proves nothing about it.

use std::collections::BTreeMap;

/// Counts by name.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Probes(BTreeMap<&'static str, u64>);

impl Probes {
    /// Counts one.
    pub fn hit(&mut self, name: &'static str) {
        self.add_count(name, 1);
    }

    /// Counts several.
    pub fn add_count(&mut self, name: &'static str, count: u64) {
        *self.0.entry(name).or_default() += count;
    }

    /// Counts one if it is so.
    pub fn hit_if(&mut self, condition: bool, name: &'static str) {
        if condition {
            self.hit(name);
        }
    }

    /// Adds another run's counts.
    pub fn add(&mut self, other: &Probes) {
        for (name, count) in &other.0 {
            *self.0.entry(name).or_default() += count;
        }
    }

    /// How often a situation came up.
    pub fn count(&self, name: &str) -> u64 {
        self.0.get(name).copied().unwrap_or(0)
    }

    /// Which of these never came up.
    pub fn missing<'a>(&self, names: &[&'a str]) -> Vec<&'a str> {
        names.iter().filter(|name| self.count(name) == 0).copied().collect()
    }
}

impl std::fmt::Display for Probes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (name, count) in &self.0 {
            writeln!(f, "{count:>10}  {name}")?;
        }
        Ok(())
    }
}
