//! `lapidary bench`.

mod decode;
mod forward;
mod products;

use std::time::Duration;

use super::CommandResult;
use crate::ui::Ui;

/// Measure this machine with a model.
///
/// Figures vary by 10 to 25 % on a machine that is not idle: compare only runs of one sitting.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    Forward(forward::Args),
    Decode(decode::DecodeArgs),
    Prefill(decode::PrefillArgs),
    Products(products::Args),
}

pub(crate) fn run(ui: &Ui, args: &Args) -> CommandResult {
    match &args.what {
        What::Forward(args) => forward::run(ui, args),
        What::Decode(args) => decode::decode(ui, args),
        What::Prefill(args) => decode::prefill(ui, args),
        What::Products(args) => products::run(ui, args),
    }
}

/// Median and least of some times, in seconds.
fn median_and_min(mut times: Vec<Duration>) -> (f64, f64) {
    times.sort_unstable();
    let at = |i: usize| times.get(i).map_or(f64::NAN, Duration::as_secs_f64);
    (at(times.len() / 2), at(0))
}
