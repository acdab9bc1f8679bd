//! `lapidary config`.

use super::{CommandResult, Failure};
use crate::ui::Ui;

/// Placeholder.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {}

pub(crate) fn run(_ui: &Ui, _args: &Args) -> CommandResult {
    Err(Failure::usage("not built yet"))
}
