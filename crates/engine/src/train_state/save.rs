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
use serde_json::{Value, json};
use tensor::{DType, HostArray, ParamSpec, Shape};

use super::frozen::Frozen;
use super::record::Record;
use super::share::{self, Listed, Part, Share};
use super::{Array, Data, Fetch, OPTIMIZER_FILE, ROWS, Snapshot, StateError, Store, TableSnapshot, check};
use crate::convert::config::sidecars;
use crate::forward::narrow;

/// Largest weights file in bytes of data; a single larger tensor gets a file of its own.
const SHARD: u64 = 4 << 30;

/// Begins the names of files of which nothing is trained.
const FROZEN: &str = "model-frozen";

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
    /// An array of this name, asked for now.
    Later(&'s str),
    /// A whole table: changed rows, and all others.
    Table(&'s TableSnapshot),
    /// The numbers of a table's changed rows.
    Rows(&'s [i32]),
    /// A parameter of one of [`Frozen::models`].
    Model(usize, &'s str),
}

impl<'s> Bytes<'s> {
    fn of(array: &'s Array) -> Self {
        match &array.data {
            Data::Here(values) => Bytes::Given(values),
            Data::Later(..) => Bytes::Later(&array.name),
        }
    }
}

/// What a save asks for, and what it tells.
struct Talk<'a> {
    fetch: &'a mut Fetch<'a>,
    progress: &'a mut dyn FnMut(u64, u64),
}

/// Files of one kind, and their tensors in the order of the plan.
struct Group<'s> {
    files: Vec<PlannedFile>,
    bytes: Vec<Bytes<'s>>,
}

impl Store {
    /// Writes a checkpoint, and then removes old ones. `fetch` is asked once for each array that the snapshot does not hold;
    /// `progress` gets bytes written and bytes to write.
    ///
    /// A step that exists is replaced if it is of the same run (optimizer, keys, trained parameters, place in the data), or
    /// damaged. Of several processes ([`StoreOptions::share`](super::StoreOptions)) every one calls this; those other than 0 are
    /// done when their own files are written.
    ///
    /// # Errors
    /// When the snapshot does not fit the architecture, the step exists and is of another run, frozen tensors are nowhere
    /// to be found, space is short, another process does not do its part, or the file system refuses. Earlier checkpoints are then
    /// as they were.
    pub fn save(
        &self,
        snapshot: &Snapshot,
        fetch: &mut Fetch<'_>,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Saved, StateError> {
        let mut talk = Talk { fetch, progress };
        let step = snapshot.state.step;
        let table = param_table(&self.options.arch);
        let unfit = |reason| StateError::Snapshot { step, reason };
        check::fits(snapshot, &table).map_err(unfit)?;
        let path = self.path(step);
        if self.options.share.process > 0 {
            return self.save_part(snapshot, &table, path, &mut talk);
        }
        if self.options.share == Share::ALONE {
            let (params, moments) = (check::given(snapshot), check::moments(snapshot));
            check::complete(&snapshot.state, &snapshot.frozen, params, moments, &table).map_err(unfit)?;
        }
        if path.is_dir()
            && let Ok(old) = Record::read(&path, step)
            && let Some(what) = old.differs(&snapshot.state)
        {
            return Err(StateError::Exists { path, what });
        }
        let shapes: BTreeMap<&str, &Shape> = table.iter().map(|p| (p.name.as_str(), &p.shape)).collect();
        let frozen = self.find_frozen(&snapshot.frozen, &shapes, self.prefix())?;
        let plan = Plan::new(snapshot, &table, &frozen, self.prefix(), self.options.share)?;
        let extra = self.carried_over()?;
        let small: u64 = extra.iter().map(|(_, b)| b.len() as u64).sum();
        // The configuration, the index, the state and the manifest are small; the margin covers them.
        check_space(&path, plan.bytes().saturating_add(small).saturating_add(16 << 20))?;
        fs::create_dir_all(&self.dir)?;
        let mut staged = StagedDir::create(&path, true)?;
        let result = self.fill(staged.path(), snapshot, &plan, &frozen, extra, &mut talk);
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

    /// Begins the names of the model's tensors.
    fn prefix(&self) -> &'static str {
        if self.options.conditional { CONDITIONAL_PREFIX } else { CAUSAL_PREFIX }
    }

    /// Writes what falls to a process other than 0 into the directory that process 0 has opened.
    fn save_part(
        &self,
        snapshot: &Snapshot,
        table: &[ParamSpec],
        path: PathBuf,
        talk: &mut Talk<'_>,
    ) -> Result<Saved, StateError> {
        let (step, share) = (snapshot.state.step, self.options.share);
        let frozen = Frozen::default();
        let plan = Plan::new(snapshot, table, &frozen, self.prefix(), share)?;
        let dir = share::opened(&path, share, step)?;
        let mut write = || -> Result<Part, StateError> {
            check_space(&dir, plan.bytes())?;
            self.write_arrays(&dir, step, &plan, &frozen, talk)
        };
        match write() {
            Ok(part) => part.hand_in(&dir, share)?,
            Err(e) => {
                // Best effort: whoever launched the processes ends the others as well.
                let _ = Part::failed(step, e.to_string()).hand_in(&dir, share);
                return Err(e);
            }
        }
        Ok(Saved { step, path, written: plan.data_bytes(), linked: 0, removed: Vec::new(), problems: Vec::new() })
    }

    /// Writes everything into the staged directory; gives the bytes of linked files.
    fn fill(
        &self,
        dir: &Path,
        snapshot: &Snapshot,
        plan: &Plan<'_>,
        frozen: &Frozen,
        mut extra: Vec<(String, Vec<u8>)>,
        talk: &mut Talk<'_>,
    ) -> Result<u64, StateError> {
        self.reach("staged")?;
        let (step, share) = (snapshot.state.step, self.options.share);
        let (mut files, mut linked) = (Vec::new(), 0);
        let mut weights = Vec::new();
        let links = plan.frozen.files.len() + 1;
        for (i, link) in frozen.linked.iter().enumerate() {
            let name = share.file(FROZEN, links + i);
            let (file, hard) = link.place(dir, &name)?;
            linked += if hard { file.bytes } else { 0 };
            files.push(file);
            weights.extend(link.tensors.iter().map(|(tensor, elements, bytes)| Listed {
                name: tensor.clone(),
                file: name.clone(),
                elements: *elements,
                bytes: *bytes,
                element: link.widest.map_or(0, DType::size),
            }));
        }
        self.reach("linked")?;
        let mut whole = self.write_arrays(dir, step, plan, frozen, talk)?;
        files.append(&mut whole.files);
        if share != Share::ALONE {
            for process in 1..share.count {
                let part = Part::collect(dir, process, step)?;
                files.extend(part.files);
                whole.weights.extend(part.weights);
                whole.moments.extend(part.moments);
            }
            // What is copied from elsewhere is named as frozen.
            let copied: BTreeSet<&str> = frozen.copied.iter().map(|(n, _)| n.as_str()).collect();
            let names = whole.weights.iter().filter_map(|w| w.name.strip_prefix(self.prefix()));
            let (params, moments) = (names.filter(|n| !copied.contains(n)), whole.moments.iter().map(String::as_str));
            let table = param_table(&self.options.arch);
            check::complete(&snapshot.state, &snapshot.frozen, params, moments, &table)
                .map_err(|reason| StateError::Snapshot { step, reason })?;
        }
        weights.append(&mut whole.weights);
        let elements: u64 = weights.iter().map(|w| w.elements).sum();
        let size: u64 = weights.iter().map(|w| w.bytes).sum();
        // The files' kinds only matter to whoever reads the configuration: the tensors tell for themselves.
        let widest = share::widest(&weights);
        let map: BTreeMap<String, Value> = weights.into_iter().map(|w| (w.name, json!(w.file))).collect();
        let index = json!({"metadata": {"total_parameters": elements, "total_size": size}, "weight_map": map});
        let config = config_json(&self.options.arch, self.options.conditional, widest.name());
        extra.push((INDEX_FILE.to_owned(), format!("{index:#}\n").into_bytes()));
        extra.push((CONFIG_FILE.to_owned(), format!("{config:#}\n").into_bytes()));
        for (name, bytes) in &extra {
            fs::write(dir.join(name), bytes)?;
            files.push(ManifestFile::of_bytes(name, bytes));
        }
        self.reach("files")?;
        Record { state: snapshot.state.clone(), frozen: plan.untrained.clone(), files }.write(dir)?;
        self.reach("record")?;
        Ok(linked)
    }

    /// Writes the planned files.
    fn write_arrays(
        &self,
        dir: &Path,
        step: u64,
        plan: &Plan<'_>,
        frozen: &Frozen,
        talk: &mut Talk<'_>,
    ) -> Result<Part, StateError> {
        let (total, mut done) = (plan.data_bytes(), 0);
        let mut part = Part { step, ..Part::default() };
        for (group, weights) in [(&plan.trained, true), (&plan.frozen, true), (&plan.moments, false)] {
            for file in &group.files {
                let written = write_file(
                    dir,
                    file,
                    &mut |index, sink| match group.bytes.get(index) {
                        Some(Bytes::Given(array)) => Ok(sink.write(array.bytes())?),
                        Some(Bytes::Later(name)) => Ok(sink.write((talk.fetch)(name)?.bytes())?),
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
                    &mut |n| (talk.progress)(done + n, total),
                )?;
                part.files.push(written);
                done += file.tensors.iter().map(|t| t.bytes).sum::<u64>();
                for t in &file.tensors {
                    let TensorPlan { name, dtype, shape } = &t.tensor;
                    if weights {
                        let (file, elements) = (file.name.clone(), shape.elements() as u64);
                        part.weights.push(Listed {
                            name: name.clone(),
                            file,
                            elements,
                            bytes: t.bytes,
                            element: dtype.size(),
                        });
                    } else if !name.starts_with(ROWS) {
                        part.moments.push(name.clone());
                    }
                }
                self.reach(if weights { "weights" } else { "moments" })?;
            }
        }
        Ok(part)
    }

    /// What is carried over from the source or, when that is gone, from an earlier checkpoint.
    fn carried_over(&self) -> Result<Vec<(String, Vec<u8>)>, StateError> {
        let mut from: Vec<PathBuf> = self.options.source.iter().cloned().collect();
        from.extend(self.complete().next().map(|(s, _)| self.path(s)));
        sidecars(&from, false).map_err(|e| StateError::Source(Box::new(e)))
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
}

impl<'s> Plan<'s> {
    fn new(
        snapshot: &'s Snapshot,
        table: &[ParamSpec],
        sources: &'s Frozen,
        prefix: &str,
        share: Share,
    ) -> Result<Self, StateError> {
        let shapes: BTreeMap<&str, &Shape> = table.iter().map(|p| (p.name.as_str(), &p.shape)).collect();
        let trained: BTreeSet<&str> = snapshot.state.trained.iter().map(String::as_str).collect();
        let given: BTreeMap<&str, &Array> = snapshot.params.iter().map(|a| (a.name.as_str(), a)).collect();
        let copied: BTreeMap<&str, usize> = sources.copied.iter().map(|(n, m)| (n.as_str(), *m)).collect();
        let (mut ours, mut others) = ((Vec::new(), Vec::new()), (Vec::new(), Vec::new()));
        // The order of the table, so that equal snapshots give equal files.
        for spec in table {
            let name = spec.name.as_str();
            let (dtype, bytes) = if let Some(table) = snapshot.table.as_ref().filter(|t| t.name == name) {
                (table.weights.dtype(), Bytes::Table(table))
            } else if let Some(array) = given.get(name) {
                (array.data.dtype(), Bytes::of(array))
            } else if let Some((&key, &model)) = copied.get_key_value(name) {
                let dtype = sources.models.get(model).map(|m| m.dtype(key)).transpose();
                let dtype = dtype.map_err(|e| StateError::Source(Box::new(e)))?;
                (dtype.unwrap_or(DType::BF16), Bytes::Model(model, key))
            } else {
                // It lies in a file that is linked, or another process writes it.
                continue;
            };
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
            moments.1.push(Bytes::of(a));
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
        let file = |kind: &'static str| move |i: usize| share.file(kind, i + 1);
        Ok(Plan {
            trained: Group::new(ours, Some(SHARD), file("model-trained"))?,
            frozen: Group::new(others, Some(SHARD), file(FROZEN))?,
            moments: match share.process {
                0 => Group::all(moments, OPTIMIZER_FILE)?,
                _ => Group::new(moments, None, file("optimizer"))?,
            },
            untrained,
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
