//! What runs came to, side by side.

use engine::metrics::history::RunSummary;

use crate::ui::grouped;

/// A row for each figure, a column for each run.
#[derive(Debug)]
pub(super) struct Table {
    pub(super) rows: Vec<(&'static str, Vec<String>)>,
}

type Cell = fn(&RunSummary) -> Option<String>;

const ROWS: &[(&str, Cell)] = &[
    ("steps", |s| {
        let (first, last) = s.first_step.zip(s.last_step)?;
        Some(format!("{} ({} to {})", grouped(s.steps), grouped(first), grouped(last)))
    }),
    ("final loss", |s| s.final_loss.map(loss)),
    ("lowest loss", |s| at(s.min_loss, s.min_loss_step)),
    ("final evaluation loss", |s| s.final_eval_loss.map(loss)),
    ("lowest evaluation loss", |s| at(s.min_eval_loss, s.min_eval_loss_step)),
    ("seconds per step, median", |s| s.median_step_seconds.map(digits)),
    ("tokens/s per device, median", |s| s.median_tokens_per_second_per_device.map(digits)),
    ("TFLOP/s per device, median", |s| s.median_tflops_per_second_per_device.map(digits)),
    ("MFU, median", |s| s.median_mfu.map(|m| format!("{:.2}%", 100.0 * m))),
    ("peak memory", |s| s.peak_memory_bytes.map(crate::ui::bytes)),
    ("time in steps", |s| s.step_seconds.map(time)),
    ("time waiting for data", |s| {
        let share = s.data_wait_share.map_or_else(String::new, |share| format!(" ({:.1}%)", 100.0 * share));
        s.data_wait_seconds.map(|w| format!("{}{share}", time(w)))
    }),
    ("time in evaluation", |s| s.eval_seconds.map(time)),
    ("wall time, pauses included", |s| s.wall_seconds.map(time)),
    ("losses not finite", |s| some(s.non_finite_losses)),
    ("updates skipped", |s| some(s.skipped_steps)),
    ("steps run again", |s| some(s.repeated_steps)),
];

impl Table {
    /// Rows that have a figure for at least one run.
    pub(super) fn new(summaries: &[RunSummary]) -> Self {
        let rows = ROWS.iter().filter_map(|(label, cell)| {
            let cells: Vec<Option<String>> = summaries.iter().map(cell).collect();
            let known = cells.iter().any(Option::is_some);
            known.then(|| (*label, cells.into_iter().map(|c| c.unwrap_or_else(|| "-".to_owned())).collect()))
        });
        Table { rows: rows.collect() }
    }

    /// The table in columns of text, with names on top.
    pub(super) fn text(&self, names: &[String]) -> String {
        let label = self.rows.iter().map(|(l, _)| l.chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..names.len())
            .map(|i| {
                let cells = self.rows.iter().map(|(_, cells)| cells[i].chars().count());
                cells.chain([names[i].chars().count()]).max().unwrap_or(0)
            })
            .collect();
        let line = |first: &str, cells: &[String]| {
            let mut line = format!("{first:label$}");
            for (cell, width) in cells.iter().zip(&widths) {
                line += &format!("  {cell:>width$}");
            }
            line.trim_end().to_owned()
        };
        let mut lines = vec![line("", names)];
        lines.extend(self.rows.iter().map(|(first, cells)| line(first, cells)));
        lines.join("\n")
    }
}

fn loss(value: f64) -> String {
    if value.is_finite() { format!("{value:.4}") } else { "not finite".to_owned() }
}

fn at(value: Option<f64>, step: Option<u64>) -> Option<String> {
    value.zip(step).map(|(v, s)| format!("{} at step {}", loss(v), grouped(s)))
}

/// A count worth a row.
fn some(n: u64) -> Option<String> {
    (n > 0).then(|| grouped(n))
}

/// Four digits that matter.
fn digits(value: f64) -> String {
    if value == 0.0 {
        return "0".to_owned();
    }
    if (1e4..1e15).contains(&value) {
        return grouped(value.round() as u64);
    }
    if !(1e-12..1e4).contains(&value.abs()) {
        return format!("{value:.3e}");
    }
    let places = (3.0 - value.abs().log10().floor()).clamp(0.0, 12.0) as usize;
    format!("{value:.places$}")
}

/// `12.3 s`, `4 min 05 s`, `3 h 07 min`.
fn time(seconds: f64) -> String {
    let seconds = seconds.clamp(0.0, 1e15);
    if seconds < 3600.0 {
        return crate::ui::seconds(std::time::Duration::from_secs_f64(seconds));
    }
    let minutes = (seconds / 60.0) as u64;
    match minutes / 60 {
        h if h < 48 => format!("{h} h {:02} min", minutes % 60),
        h => format!("{} d {:02} h", h / 24, h % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures() {
        for (value, text) in [
            (0.225_04, "0.2250"),
            (1137.78, "1138"),
            (36_325.4, "36,325"),
            (0.0, "0"),
            (12.5, "12.50"),
            (-1e300, "-1.000e300"),
        ] {
            assert_eq!(digits(value), text);
        }
        for (value, text) in [
            (12.34, "12.3 s"),
            (245.0, "4 min 05 s"),
            (11_220.0, "3 h 07 min"),
            (200_000.0, "2 d 07 h"),
            (-1.0, "0 ms"),
        ] {
            assert_eq!(time(value), text);
        }
        assert_eq!(loss(f64::NAN), "not finite");
    }
}
