//! `lapidary report`: the curves of runs on a page, and what they came to.

mod chart;
mod page;
mod scale;
mod table;

use std::path::{Path, PathBuf};

use engine::metrics::history::{self, DamagedLine, Metric, Run};
use serde_json::json;

use self::chart::{Chart, Scale, Series};
use self::page::Page;
use self::scale::Unit;
use self::table::Table;
use super::{CommandResult, Failure, Outcome};
use crate::ui::Ui;

/// Curves and figures of training runs: loss, evaluation loss, learning rate, gradient norm, tokens/s, MFU, memory.
///
/// Takes run directories, files of JSON lines and logs, this program's or MaxText's. Prints a table; `--out` draws the curves of all runs over each other into one file that needs nothing else, online or offline.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Run directories, files of metrics, logs.
    #[arg(required = true, value_name = "RUN")]
    runs: Vec<PathBuf>,
    /// Draw into this file: a page (.html) or the charts alone (.svg).
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Heading of the page [default: the names of the runs, or their number].
    #[arg(long)]
    title: Option<String>,
    /// Draw moving averages: weight of the past, from 0 (none) to below 1, as TensorBoard's slider.
    #[arg(long, value_name = "WEIGHT", default_value_t = 0.0)]
    smooth: f64,
    /// Draw losses on a logarithmic scale.
    #[arg(long)]
    log_loss: bool,
    /// Print the figures as JSON on stdout.
    #[arg(long)]
    json: bool,
}

const EXAMPLES: &str = "\
Examples:
  lapidary report ./lapidary_output/my_run
  lapidary report ./lapidary_output/a ./lapidary_output/b --out report.html --smooth 0.9
  lapidary report metrics.jsonl --out curves.svg --log-loss
  lapidary report ./lapidary_output/my_run --json";

/// Damaged lines that are named on the terminal; the JSON has more.
const NAMED: usize = 5;

const MFU: &str = "MFU";
const TFLOPS: &str = "TFLOP/s per device";

#[derive(Debug, Clone, Copy)]
enum Format {
    Html,
    Svg,
}

pub(crate) fn run(ui: &Ui, args: &Args) -> CommandResult {
    let format = args.out.as_deref().map(format_of).transpose()?;
    if !(0.0..1.0).contains(&args.smooth) {
        return Err(Failure::usage(format!("--smooth is {}; it takes 0 (none) up to, but not, 1", args.smooth)));
    }
    let (mut runs, mut damaged, mut damaged_lines) = (Vec::new(), Vec::new(), 0);
    for path in &args.runs {
        let history = history::read(path)?;
        runs.extend(history.runs);
        damaged.extend(history.damaged);
        damaged_lines += history.damaged_lines;
    }
    report_damage(ui, &damaged, damaged_lines);
    let names = names(&runs);
    let summaries: Vec<_> = runs.iter().map(Run::summary).collect();
    let table = Table::new(&summaries);
    if let (Some(out), Some(format)) = (&args.out, format) {
        let charts = charts(&runs, &names, args.log_loss);
        let title = args.title.clone().unwrap_or_else(|| heading(&names));
        let page = Page {
            title: &title,
            runs: &runs,
            names: &names,
            table: &table,
            charts: &charts,
            damaged: &damaged,
            damaged_lines,
            smooth: args.smooth,
        };
        let text = match format {
            Format::Html => page.html(),
            Format::Svg => page.svg(),
        };
        fs_err::write(out, text)?;
        ui.say(format!("wrote {}", out.display()));
    }
    if args.json {
        ui.json(&json!({ "runs": summaries, "damaged_lines": damaged_lines, "damaged": damaged }))?;
    } else {
        ui.data(table.text(&names));
    }
    Ok(Outcome::Yes)
}

/// The names of few runs, the number of many.
fn heading(names: &[String]) -> String {
    if names.len() <= 3 { names.join(", ") } else { format!("{} runs", names.len()) }
}

fn format_of(out: &Path) -> Result<Format, Failure> {
    match out.extension().and_then(|e| e.to_str()).map(str::to_ascii_lowercase).as_deref() {
        Some("html" | "htm") => Ok(Format::Html),
        Some("svg") => Ok(Format::Svg),
        _ => Err(Failure::usage(format!("--out {}: the name must end with .html or .svg", out.display()))),
    }
}

fn report_damage(ui: &Ui, damaged: &[DamagedLine], count: u64) {
    for d in damaged.iter().take(NAMED) {
        ui.say(format!("note: {}:{}: line passed over: {}", d.path.display(), d.line, d.reason));
    }
    if count > NAMED as u64 {
        ui.say(format!("note: {count} lines passed over in all"));
    }
}

/// What to call the runs: their names; where names repeat, with as much of the path as tells them apart.
fn names(runs: &[Run]) -> Vec<String> {
    let shared = |name: &str| runs.iter().filter(|r| r.name == name).count() > 1;
    let directory = |run: &Run| {
        let path = run.path.ancestors().find(|p| !p.ends_with("metrics.jsonl") && !p.ends_with("metrics"))?;
        path.file_name().map(|n| n.to_string_lossy().into_owned())
    };
    runs.iter()
        .map(|run| {
            if !shared(&run.name) {
                return run.name.clone();
            }
            let place = directory(run);
            let alone = runs.iter().filter(|r| r.name == run.name && directory(r) == place).count() == 1;
            match place.filter(|_| alone) {
                Some(place) => format!("{} ({place})", run.name),
                None => format!("{} ({})", run.name, run.path.display()),
            }
        })
        .collect()
}

fn charts<'a>(runs: &[Run], names: &'a [String], log_loss: bool) -> Vec<Chart<'a>> {
    let of = |values: &dyn Fn(&Run) -> Vec<(u64, f64)>| -> Vec<Series<'a>> {
        let series = runs.iter().zip(names).enumerate().map(|(i, (run, name))| {
            let points = values(run).into_iter().map(|(step, value)| (step as f64, value)).collect();
            Series { run: i, name, points }
        });
        series.collect()
    };
    let metric = |m: Metric| of(&|run: &Run| run.values(m).collect());
    let loss = if log_loss { Scale::Log } else { Scale::Linear };
    let waiting = |run: &Run| {
        let share = |row: &history::Row| {
            let (wait, all) = (row.get(Metric::DataWaitSeconds)?, row.get(Metric::Seconds)?);
            (all > 0.0).then_some((row.step, (wait / all).min(1.0)))
        };
        run.steps.iter().filter_map(share).collect()
    };
    let all = || runs.iter().flat_map(|r| r.steps.iter().map(|s| s.step).chain(r.evals.iter().map(|e| e.step)));
    let steps = (all().min().unwrap_or(0) as f64, all().max().unwrap_or(0) as f64);
    let chart = |title, unit, scale, series| Chart { title, unit, scale, steps, noisy: true, series };
    let steady = |chart| Chart { noisy: false, ..chart };
    let evaluation = of(&|run: &Run| run.evals.iter().map(|e| (e.step, e.loss)).collect());
    let mut charts = vec![
        chart("Loss", Unit::Plain, loss, metric(Metric::Loss)),
        steady(chart("Evaluation loss", Unit::Plain, loss, evaluation)),
        steady(chart("Learning rate", Unit::Plain, Scale::FromZero, metric(Metric::LearningRate))),
        chart("Gradient norm, before clipping", Unit::Plain, Scale::Auto, metric(Metric::RawGradNorm)),
        chart("Tokens/s per device", Unit::Count, Scale::FromZero, metric(Metric::TokensPerSecond)),
        chart(TFLOPS, Unit::Plain, Scale::FromZero, metric(Metric::TflopsPerSecond)),
        chart(MFU, Unit::Percent, Scale::FromZero, metric(Metric::Mfu)),
        steady(chart("Memory", Unit::Bytes, Scale::FromZero, metric(Metric::MemoryBytes))),
        chart("Time waiting for data, share of the step", Unit::Percent, Scale::FromZero, of(&waiting)),
    ];
    // MFU says what TFLOP/s says, and more.
    let has_mfu = charts.iter().any(|c| c.title == MFU && c.series.iter().all(|s| !s.points.is_empty()));
    charts.retain(|c| !c.is_empty() && (c.title != TFLOPS || !has_mfu));
    charts
}
