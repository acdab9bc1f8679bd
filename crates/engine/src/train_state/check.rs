//! Whether snapshots are complete and fit the architecture.

use std::collections::{BTreeMap, BTreeSet};

use tensor::{DType, HostArray, ParamSpec, Shape};

use super::record::FORMAT;
use super::{Array, Snapshot, TableSnapshot, TrainerState};

/// Whether the arrays of a snapshot are of this architecture. The error is a clause.
pub(super) fn fits(snapshot: &Snapshot, table: &[ParamSpec]) -> Result<(), String> {
    let format = snapshot.state.format;
    if format != FORMAT {
        return Err(format!("its format is {format}, this version writes {FORMAT}"));
    }
    let shapes = shapes(table);
    let shape = |name: &str| shapes.get(name).ok_or_else(|| format!("{name} is no parameter of the model"));
    for a in &snapshot.params {
        array_fits(a, shape(&a.name)?)?;
    }
    if let Some(t) = &snapshot.table {
        table_fits(t, shape(&t.name)?)?;
    }
    for a in &snapshot.moments {
        // Moments of what is not trained are found when all names are there.
        let param = Some(split(&a.name)?.1).filter(|n| snapshot.state.trained.iter().any(|t| t == n));
        if let Some(shape) = param.and_then(|n| shapes.get(n)) {
            array_fits(a, shape)?;
        }
    }
    Ok(())
}

/// Names of the parameters in a snapshot.
pub(super) fn given(snapshot: &Snapshot) -> impl Iterator<Item = &str> {
    snapshot.params.iter().map(|a| &a.name).chain(snapshot.table.iter().map(|t| &t.name)).map(String::as_str)
}

/// Names of the moments in a snapshot.
pub(super) fn moments(snapshot: &Snapshot) -> impl Iterator<Item = &str> {
    let of_table = snapshot.table.iter().flat_map(|t| &t.moments).map(|(name, _)| name);
    snapshot.moments.iter().map(|a| &a.name).chain(of_table).map(String::as_str)
}

/// Whether parameters and moments by these names, and the parameters said to be frozen, are the whole state, each once. The error
/// is a clause.
pub(super) fn complete<'a>(
    state: &TrainerState,
    frozen: &[String],
    params: impl Iterator<Item = &'a str>,
    moments: impl Iterator<Item = &'a str>,
    table: &[ParamSpec],
) -> Result<(), String> {
    let shapes = shapes(table);
    let mut given = BTreeSet::new();
    for name in params {
        if !given.insert(name) {
            return Err(format!("parameter {name} is given twice"));
        }
    }
    let mut rest: BTreeSet<&str> = shapes.keys().copied().filter(|n| !given.contains(n)).collect();
    for name in frozen {
        if !rest.remove(name.as_str()) {
            return Err(format!("frozen parameter {name} is given as well, named twice, or no parameter of the model"));
        }
    }
    if let Some(name) = rest.first() {
        return Err(format!("parameter {name} is neither given nor named as frozen ({} in all)", rest.len()));
    }
    if let Some(name) = state.trained.iter().find(|n| !given.contains(n.as_str())) {
        return Err(format!("{name} is trained, but not given"));
    }
    let trained: BTreeSet<&str> = state.trained.iter().map(String::as_str).collect();
    if trained.len() != state.trained.len() {
        return Err("a trained parameter is named twice".to_owned());
    }
    check_moments(&state.optimizer, &trained, &moments.collect::<Vec<_>>())
}

/// Kind and parameter of a moment.
fn split(name: &str) -> Result<(&str, &str), String> {
    let split = name.split_once(':').filter(|(kind, _)| matches!(*kind, "mu" | "nu"));
    split.ok_or_else(|| format!("moment {name} is named neither mu:NAME nor nu:NAME"))
}

fn shapes(table: &[ParamSpec]) -> BTreeMap<&str, &Shape> {
    table.iter().map(|p| (p.name.as_str(), &p.shape)).collect()
}

/// Whether a table has the model's shape, and its parts as many rows as are named. The error is a clause.
fn table_fits(t: &TableSnapshot, shape: &Shape) -> Result<(), String> {
    let fits = shape.dims() == [t.base.rows(), t.base.columns()];
    let part: Shape = [t.rows.len(), t.base.columns()].into();
    let parts = std::iter::once(&t.weights).chain(t.moments.iter().map(|(_, m)| m));
    let floats = |a: &HostArray| *a.shape() == part && matches!(a.dtype(), DType::BF16 | DType::F32);
    if !fits || !parts.into_iter().all(floats) {
        return Err(format!("{}: its rows do not fit {shape}", t.name));
    }
    check_rows(&t.rows, t.base.rows()).map_err(|reason| format!("{}: {reason}", t.name))
}

/// Whether rows are different ones of a table of `n`, in order. The error is a clause.
pub(super) fn check_rows(rows: &[i32], n: usize) -> Result<(), String> {
    let known = |r: &i32| usize::try_from(*r).is_ok_and(|r| r < n);
    if rows.is_empty() || !rows.iter().all(known) || !rows.windows(2).all(|w| w[0] < w[1]) {
        return Err(format!("its changed rows are not numbered in ascending order within {n}"));
    }
    Ok(())
}

fn array_fits(a: &Array, shape: &Shape) -> Result<(), String> {
    if a.data.shape() != shape {
        return Err(format!("{} has the shape {} instead of {shape}", a.name, a.data.shape()));
    }
    if !matches!(a.data.dtype(), DType::BF16 | DType::F32) {
        return Err(format!("{} is {}; checkpoints hold bfloat16 and float32", a.name, a.data.dtype()));
    }
    Ok(())
}

/// Whether moments are those of exactly the trained parameters. The error is a clause.
pub(super) fn check_moments(optimizer: &str, trained: &BTreeSet<&str>, names: &[&str]) -> Result<(), String> {
    let mut kinds: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    if optimizer.starts_with("adam") {
        kinds.extend([("mu", BTreeSet::new()), ("nu", BTreeSet::new())]);
    }
    for name in names {
        let (kind, param) = split(name)?;
        if !trained.contains(param) {
            return Err(format!("moment {name} is of a parameter that is not trained"));
        }
        if !kinds.entry(kind).or_default().insert(param) {
            return Err(format!("moment {name} is there twice"));
        }
    }
    for (kind, there) in &kinds {
        if let Some(name) = trained.iter().find(|n| !there.contains(*n)) {
            return Err(format!("moment {kind}:{name} is missing (of {} trained parameters)", trained.len()));
        }
    }
    Ok(())
}
