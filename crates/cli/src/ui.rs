//! Talking to a person: lines on stderr, data on stdout.

use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

pub(crate) use engine::metrics::summary::grouped;

use crate::commands::Failure;

/// How to talk.
#[derive(Debug)]
pub(crate) struct Ui {
    quiet: bool,
    color: bool,
    terminal: bool,
}

impl Ui {
    pub(crate) fn new(quiet: bool) -> Self {
        let terminal = io::stderr().is_terminal();
        let color = terminal && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty());
        Ui { quiet, color, terminal }
    }

    /// A line for people, on stderr.
    pub(crate) fn say(&self, line: impl AsRef<str>) {
        if !self.quiet {
            // A closed stderr is no reason to stop.
            let _ = writeln!(io::stderr().lock(), "{}", line.as_ref());
        }
    }

    /// Data, on stdout. A closed pipe (`| head`) ends quietly.
    pub(crate) fn data(&self, text: impl AsRef<str>) {
        let _ = writeln!(io::stdout().lock(), "{}", text.as_ref());
    }

    /// A value as pretty JSON on stdout.
    pub(crate) fn json(&self, value: &impl serde::Serialize) -> Result<(), Failure> {
        self.data(serde_json::to_string_pretty(value)?);
        Ok(())
    }

    /// An error and its hints, always on stderr.
    pub(crate) fn failure(&self, failure: &Failure) {
        let mut err = io::stderr().lock();
        let _ = writeln!(err, "{} {}", self.paint("31;1", "error:"), failure.message());
        for hint in failure.hints() {
            let _ = writeln!(err, "{} {hint}", self.paint("36;1", "hint:"));
        }
    }

    /// `PASS` in green or `FAIL` in red; readable without colour.
    pub(crate) fn verdict(&self, passed: bool) -> String {
        if passed { self.paint("32;1", "PASS") } else { self.paint("31;1", "FAIL") }
    }

    pub(crate) fn bold(&self, text: &str) -> String {
        self.paint("1", text)
    }

    fn paint(&self, code: &str, text: &str) -> String {
        if self.color { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    /// A bar over bytes, with rate and time left. Hidden where nobody looks.
    pub(crate) fn bytes_bar(&self, label: &str, total: u64) -> ProgressBar {
        let bar = ProgressBar::new(total);
        bar.set_style(style("{prefix} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}"));
        self.start(bar, label)
    }

    /// A bar over a count. Hidden where nobody looks.
    pub(crate) fn count_bar(&self, label: &str, total: u64) -> ProgressBar {
        let bar = ProgressBar::new(total);
        bar.set_style(style("{prefix} {wide_bar} {human_pos}/{human_len} {eta}"));
        self.start(bar, label)
    }

    /// A bar over steps, with time left and a message. Hidden where nobody looks.
    pub(crate) fn steps_bar(&self, total: u64) -> ProgressBar {
        let bar = ProgressBar::new(total);
        bar.set_style(style("{prefix} {wide_bar} {pos}/{len} {msg} {eta}"));
        self.start(bar, "steps")
    }

    /// A spinner for a step of unknown length.
    pub(crate) fn spinner(&self, label: &str) -> ProgressBar {
        let bar = ProgressBar::new_spinner();
        bar.set_style(style("{spinner} {prefix} {elapsed}"));
        let bar = self.start(bar, label);
        bar.enable_steady_tick(Duration::from_millis(120));
        bar
    }

    fn start(&self, bar: ProgressBar, label: &str) -> ProgressBar {
        if self.quiet || !self.terminal {
            bar.set_draw_target(ProgressDrawTarget::hidden());
        }
        bar.set_prefix(label.to_owned());
        bar
    }
}

fn style(template: &str) -> ProgressStyle {
    // The templates are the literals above.
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

/// Bytes for people: `1.50 GB`, in powers of ten as disks and checkpoints are sold.
pub(crate) fn bytes(n: u64) -> String {
    let units = ["B", "kB", "MB", "GB", "TB"];
    let mut value = n as f64;
    let mut unit = 0;
    while value >= 1000.0 && unit + 1 < units.len() {
        value /= 1000.0;
        unit += 1;
    }
    if unit == 0 { format!("{n} B") } else { format!("{value:.2} {}", units[unit]) }
}

/// A duration for people: `850 ms`, `12.3 s`, `4 min 05 s`.
pub(crate) fn seconds(d: Duration) -> String {
    let s = d.as_secs_f64();
    match s {
        s if s < 1.0 => format!("{:.0} ms", s * 1e3),
        s if s < 60.0 => format!("{s:.1} s"),
        s => format!("{} min {:02} s", (s / 60.0) as u64, (s % 60.0) as u64),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_for_people() {
        assert_eq!(bytes(999), "999 B");
        assert_eq!(bytes(9_257_138_758), "9.26 GB");
        assert_eq!(seconds(Duration::from_millis(850)), "850 ms");
        assert_eq!(seconds(Duration::from_secs(245)), "4 min 05 s");
        assert_eq!(grouped(4_628_569_379), "4,628,569,379");
    }
}
