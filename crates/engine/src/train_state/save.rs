//! A snapshot becomes a directory.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use checkpoint::commit::{StagedDir, check_space};
use checkpoint::hf::{CONFIG_FILE, INDEX_FILE};
use checkpoint::manifest::ManifestFile;
use checkpoint::write::{HfPlan, PlanOptions, PlannedFile, TensorPlan, write_file};
use fs_err as fs;
use gemma4::hf::{CAUSAL_PREFIX, CONDITIONAL_PREFIX, config_json};
use gemma4::param_table;
use serde_json::{Map, Value, json};
use tensor::{DType, HostArray, ParamSpec, Shape};

use super::frozen::Frozen;
use super::record::{FORMAT, Record};
use super::{Array, OPTIMIZER_FILE, ROWS, Snapshot, StateError, Store, TableSnapshot};
use crate::convert::config::sidecars;
use crate::forward::narrow;

/// Largest weights file in bytes of data; a single larger tensor gets a file of its own.
const SHARD: u64 = 4 << 30;

/// What a save did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Saved {
    /// The step.
    pub step: u64,
    /// Where it lies.
    pub path: PathBuf,
    /// Bytes of arrays that were written.
    pub written: u64,
    /// Bytes of files that were linked.
    pub linked: u64,
    /// Older steps that were removed.
    pub removed: Vec<u64>,
    /// What went wrong after the checkpoint was complete: old steps that could not be removed.
    pub problems: Vec<String>,
}

/// Where the bytes of a planned tensor come from.
enum Bytes<'s> {
    Given(&'s HostArray),
    /// A whole table: changed rows, and all others.
    Table(&'s TableSnapshot),
    /// The numbers of a table's changed rows.
    Rows(&'s [i32]),
    /// A parameter of one of [`Frozen::models`].
    Model(usize, &'s str),
}

/// Files of one kind, and their tensors in the order of the plan.
struct Group<'s> {
    files: Vec<PlannedFile>,
    bytes: Vec<Bytes<'s>>,
}

impl Store {
    /// Writes a checkpoint, and then removes old ones. `progress` gets bytes written and bytes to write.
    ///
    /// A step that exists is replaced if it is of the same run (optimizer, keys, trained parameters, place in the data), or
    /// damaged.
    ///
    /// # Errors
    /// When the snapshot does not fit the architecture, the step exists and is of another run, frozen tensors are nowhere
    /// to be found, space is short, or the file system refuses. Earlier checkpoints are then as they were.
    pub fn save(&self, snapshot: &Snapshot, progress: &mut dyn FnMut(u64, u64)) -> Result<Saved, StateError> {
        let step = snapshot.state.step;
        let table = param_table(&self.options.arch);
        check(snapshot, &table).map_err(|reason| StateError::Snapshot { step, reason })?;
        let path = self.path(step);
        if path.is_dir()
            && let Ok(old) = Record::read(&path, step)
            && let Some(what) = old.differs(&snapshot.state)
        {
            return Err(StateError::Exists { path, what });
        }
        let shapes: BTreeMap<&str, &Shape> = table.iter().map(|p| (p.name.as_str(), &p.shape)).collect();
        let prefix = if self.options.conditional { CONDITIONAL_PREFIX } else { CAUSAL_PREFIX };
        let frozen = self.find_frozen(&snapshot.frozen, &shapes, prefix)?;
        let plan = Plan::new(snapshot, &table, &shapes, &frozen, prefix)?;
        let extra = self.extra_files(plan.widest)?;
        let small: u64 = extra.iter().map(|(_, b)| b.len() as u64).sum();
        // The index, the state and the manifest are small; the margin covers them.
        check_space(&path, plan.bytes().saturating_add(small).saturating_add(16 << 20))?;
        fs::create_dir_all(&self.dir)?;
        let mut staged = StagedDir::create(&path, true)?;
        let result = self.fill(staged.path(), snapshot, &plan, &frozen, &extra, progress);
        let linked = match result {
            Ok(linked) => linked,
            Err(e) => {
                if self.leaves_staged() {
                    staged.keep();
                }
                return Err(e);
            }
        };
        staged.commit()?;
        self.reach("committed")?;
        let (removed, problems) = self.remove_old(step);
        Ok(Saved { step, path, written: plan.data_bytes(), linked, removed, problems })
    }

    /// Writes everything into the staged directory; gives the bytes of linked files.
    fn fill(
        &self,
        dir: &Path,
        snapshot: &Snapshot,
        plan: &Plan<'_>,
        frozen: &Frozen,
        extra: &[(String, Vec<u8>)],
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<u64, StateError> {
        self.reach("staged")?;
        let total = plan.data_bytes();
        let (mut files, mut done, mut linked) = (Vec::new(), 0, 0);
        let mut map = BTreeMap::new();
        let (mut elements, mut size) = (0, 0);
        let links = plan.frozen.files.len() + 1;
        for (i, link) in frozen.linked.iter().enumerate() {
            let name = format!("model-frozen-{:05}.safetensors", links + i);
            let (file, hard) = link.place(dir, &name)?;
            linked += if hard { file.bytes } else { 0 };
            files.push(file);
            for (tensor, n, bytes) in &link.tensors {
                map.insert(tensor.clone(), json!(name));
                elements += n;
                size += bytes;
            }
        }
        self.reach("linked")?;
        for (group, weights) in [(&plan.trained, true), (&plan.frozen, true), (&plan.moments, false)] {
            for file in &group.files {
                let written = write_file(
                    dir,
                    file,
                    &mut |index, sink| match group.bytes.get(index) {
                        Some(Bytes::Given(array)) => Ok(sink.write(array.bytes())?),
                        Some(Bytes::Table(table)) => write_table(table, sink),
                        Some(Bytes::Rows(rows)) => {
                            Ok(sink.write(&rows.iter().flat_map(|r| r.to_le_bytes()).collect::<Vec<u8>>())?)
                        }
                        Some(Bytes::Model(model, name)) => match frozen.models.get(*model) {
                            Some(model) => copy(model, name, sink),
                            None => Err("its model is not open".into()),
                        },
                        None => Err("it is not planned".into()),
                    },
                    &mut |n| progress(done + n, total),
                )?;
                files.push(written);
                done += file.tensors.iter().map(|t| t.bytes).sum::<u64>();
                for t in file.tensors.iter().filter(|_| weights) {
                    map.insert(t.tensor.name.clone(), json!(file.name));
                    elements += t.tensor.shape.elements() as u64;
                    size += t.bytes;
                }
                self.reach(if weights { "weights" } else { "moments" })?;
            }
        }
        let map: Map<String, Value> = map.into_iter().collect();
        let index = json!({"metadata": {"total_parameters": elements, "total_size": size}, "weight_map": map});
        let index = (INDEX_FILE.to_owned(), format!("{index:#}\n").into_bytes());
        for (name, bytes) in std::iter::once(&index).chain(extra) {
            fs::write(dir.join(name), bytes)?;
            files.push(ManifestFile::of_bytes(name, bytes));
        }
        self.reach("files")?;
        Record { state: snapshot.state.clone(), frozen: plan.untrained.clone(), files }.write(dir)?;
        self.reach("record")?;
        Ok(linked)
    }

    /// The configuration, and what is carried over from the source or, when that is gone, from an earlier checkpoint.
    fn extra_files(&self, widest: DType) -> Result<Vec<(String, Vec<u8>)>, StateError> {
        let config = config_json(&self.options.arch, self.options.conditional, widest.name());
        let mut out = vec![(CONFIG_FILE.to_owned(), format!("{config:#}\n").into_bytes())];
        let mut from: Vec<PathBuf> = self.options.source.iter().cloned().collect();
        from.extend(self.complete().next().map(|(s, _)| self.path(s)));
        out.extend(sidecars(&from, false).map_err(|e| StateError::Source(Box::new(e)))?);
        Ok(out)
    }
}

fn copy(
    model: &crate::Model,
    name: &str,
    sink: &mut checkpoint::write::TensorSink<'_>,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    if let Some(view) = model.mapped(name) {
        view.bytes.advise_sequential();
        sink.write(&view.bytes)?;
        view.bytes.advise_dont_need();
    } else {
        sink.write(model.read(name)?.bytes())?;
    }
    Ok(())
}

/// Rows of a table that are converted at once.
const TABLE_BLOCK: usize = 1024;

/// Writes all rows of a table in the dtype of its changed ones.
fn write_table(
    t: &TableSnapshot,
    sink: &mut checkpoint::write::TensorSink<'_>,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let dtype = t.weights.dtype();
    let width = t.base.columns() * dtype.size();
    let mut changed = t.rows.iter().zip(t.weights.bytes().chunks_exact(width.max(1))).peekable();
    for start in (0..t.base.rows()).step_by(TABLE_BLOCK) {
        let end = (start + TABLE_BLOCK).min(t.base.rows());
        let ids: Vec<i32> = (start..end).map(i32::try_from).collect::<Result<_, _>>()?;
        let block = t.base.gather(&ids, [ids.len(), t.base.columns()])?;
        let mut block = if block.dtype() == dtype {
            block
        } else {
            narrow(block.dtype(), block.bytes(), block.shape().clone(), dtype)?
        };
        for (id, row) in ids.iter().zip(block.bytes_mut().chunks_exact_mut(width.max(1))) {
            if let Some((_, new)) = changed.next_if(|(r, _)| *r == id) {
                row.copy_from_slice(new);
            }
        }
        sink.write(block.bytes())?;
    }
    Ok(())
}

/// Everything that is written, laid out.
struct Plan<'s> {
    trained: Group<'s>,
    frozen: Group<'s>,
    moments: Group<'s>,
    /// Names without moments.
    untrained: Vec<String>,
    widest: DType,
}

impl<'s> Plan<'s> {
    fn new(
        snapshot: &'s Snapshot,
        table: &[ParamSpec],
        shapes: &BTreeMap<&str, &Shape>,
        sources: &'s Frozen,
        prefix: &str,
    ) -> Result<Self, StateError> {
        let trained: BTreeSet<&str> = snapshot.state.trained.iter().map(String::as_str).collect();
        let given: BTreeMap<&str, &Array> = snapshot.params.iter().map(|a| (a.name.as_str(), a)).collect();
        let copied: BTreeMap<&str, usize> = sources.copied.iter().map(|(n, m)| (n.as_str(), *m)).collect();
        let mut wide = sources.linked.iter().filter_map(|l| l.widest).collect::<Vec<_>>();
        let (mut ours, mut others) = ((Vec::new(), Vec::new()), (Vec::new(), Vec::new()));
        // The order of the table, so that equal snapshots give equal files.
        for spec in table {
            let name = spec.name.as_str();
            let (dtype, bytes) = if let Some(table) = snapshot.table.as_ref().filter(|t| t.name == name) {
                (table.weights.dtype(), Bytes::Table(table))
            } else if let Some(array) = given.get(name) {
                (array.data.dtype(), Bytes::Given(&array.data))
            } else if let Some((&key, &model)) = copied.get_key_value(name) {
                let dtype = sources.models.get(model).map(|m| m.dtype(key)).transpose();
                let dtype = dtype.map_err(|e| StateError::Source(Box::new(e)))?;
                (dtype.unwrap_or(DType::BF16), Bytes::Model(model, key))
            } else {
                // It lies in a file that is linked.
                continue;
            };
            wide.push(dtype);
            let plan = TensorPlan { name: format!("{prefix}{name}"), dtype, shape: spec.shape.clone() };
            let to = if trained.contains(name) { &mut ours } else { &mut others };
            to.0.push(plan);
            to.1.push(bytes);
        }
        let mut moments = (Vec::new(), Vec::new());
        for a in &snapshot.moments {
            let shape = a.name.split_once(':').and_then(|(_, n)| shapes.get(n)).map(|s| (*s).clone());
            let shape = shape.unwrap_or_else(|| a.data.shape().clone());
            moments.0.push(TensorPlan { name: a.name.clone(), dtype: a.data.dtype(), shape });
            moments.1.push(Bytes::Given(&a.data));
        }
        if let Some(t) = &snapshot.table {
            let plan = |name: String, dtype, shape| TensorPlan { name, dtype, shape };
            for (name, data) in &t.moments {
                moments.0.push(plan(name.clone(), data.dtype(), data.shape().clone()));
                moments.1.push(Bytes::Given(data));
            }
            moments.0.push(plan(format!("{ROWS}{}", t.name), DType::I32, [t.rows.len()].into()));
            moments.1.push(Bytes::Rows(&t.rows));
        }
        let untrained = table.iter().map(|p| &p.name).filter(|n| !trained.contains(n.as_str())).cloned().collect();
        Ok(Plan {
            trained: Group::new(ours, Some(SHARD), |i| format!("model-trained-{:05}.safetensors", i + 1))?,
            frozen: Group::new(others, Some(SHARD), |i| format!("model-frozen-{:05}.safetensors", i + 1))?,
            moments: Group::all(moments, OPTIMIZER_FILE)?,
            untrained,
            widest: wide.into_iter().max_by_key(|d| d.size()).unwrap_or(DType::BF16),
        })
    }

    fn groups(&self) -> [&Group<'s>; 3] {
        [&self.trained, &self.frozen, &self.moments]
    }

    /// Bytes of arrays.
    fn data_bytes(&self) -> u64 {
        self.groups().iter().flat_map(|g| &g.files).flat_map(|f| &f.tensors).map(|t| t.bytes).sum()
    }

    /// Bytes of files.
    fn bytes(&self) -> u64 {
        self.groups().iter().flat_map(|g| &g.files).map(|f| f.bytes).sum()
    }
}

impl<'s> Group<'s> {
    fn new(
        (tensors, bytes): (Vec<TensorPlan>, Vec<Bytes<'s>>),
        max_shard_bytes: Option<u64>,
        name: impl Fn(usize) -> String,
    ) -> Result<Self, StateError> {
        if tensors.is_empty() {
            return Ok(Group { files: Vec::new(), bytes });
        }
        let mut files = HfPlan::new(&tensors, &PlanOptions { max_shard_bytes, ..PlanOptions::default() })?.files;
        for (i, file) in files.iter_mut().enumerate() {
            file.name = name(i);
        }
        Ok(Group { files, bytes })
    }

    /// One file, also of nothing.
    fn all((tensors, bytes): (Vec<TensorPlan>, Vec<Bytes<'s>>), name: &str) -> Result<Self, StateError> {
        let mut files = HfPlan::new(&tensors, &PlanOptions::default())?.files;
        for file in &mut files {
            file.name = name.to_owned();
        }
        Ok(Group { files, bytes })
    }
}

/// Whether a snapshot is one of this architecture. The error is a clause.
fn check(snapshot: &Snapshot, table: &[ParamSpec]) -> Result<(), String> {
    let state = &snapshot.state;
    if state.format != FORMAT {
        return Err(format!("its format is {}, this version writes {FORMAT}", state.format));
    }
    let shapes: BTreeMap<&str, &Shape> = table.iter().map(|p| (p.name.as_str(), &p.shape)).collect();
    let mut given = BTreeSet::new();
    for a in &snapshot.params {
        let shape = shapes.get(a.name.as_str()).ok_or_else(|| format!("{} is no parameter of the model", a.name))?;
        array_fits(a, shape)?;
        if !given.insert(a.name.as_str()) {
            return Err(format!("parameter {} is given twice", a.name));
        }
    }
    let mut moments: Vec<&str> = snapshot.moments.iter().map(|a| a.name.as_str()).collect();
    if let Some(t) = &snapshot.table {
        let shape = shapes.get(t.name.as_str()).ok_or_else(|| format!("{} is no parameter of the model", t.name))?;
        table_fits(t, shape)?;
        if !given.insert(t.name.as_str()) {
            return Err(format!("parameter {} is given twice", t.name));
        }
        moments.extend(t.moments.iter().map(|(n, _)| n.as_str()));
    }
    let mut rest: BTreeSet<&str> = shapes.keys().copied().filter(|n| !given.contains(n)).collect();
    for name in &snapshot.frozen {
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
    check_moments(&state.optimizer, &trained, &moments)?;
    for a in &snapshot.moments {
        if let Some(shape) = a.name.split_once(':').and_then(|(_, n)| shapes.get(n)) {
            array_fits(a, shape)?;
        }
    }
    Ok(())
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
        let split = name.split_once(':').filter(|(kind, _)| matches!(*kind, "mu" | "nu"));
        let (kind, param) = split.ok_or_else(|| format!("moment {name} is named neither mu:NAME nor nu:NAME"))?;
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
