//! Everything a run logs, to every place it is logged to.

use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use fs_err as fs;

use super::event::Event;
use super::jsonl::{self, JsonLines};
use super::{EvalMetrics, Result, Scalar, StepMetrics, record};

/// Losses of parts that this model does not have. MaxText logs zeros for them, and what reads its files may ask.
const ABSENT: &[Scalar] = &[("learning/moe_lb_loss", 0.0), ("learning/indexer_loss", 0.0), ("learning/mtp_loss", 0.0)];

/// Where metrics go.
#[derive(Debug, Clone, Default)]
pub struct MetricsOptions {
    /// A further file of JSON lines, with MaxText's keys complete: the key `metrics_file`.
    pub metrics_file: Option<PathBuf>,
    /// Whether to write event files for TensorBoard: the key `enable_tensorboard`.
    pub tensorboard: bool,
    /// The first step that will be logged, where a checkpoint is continued. `None` is a run from the beginning.
    pub resume_step: Option<u64>,
}

/// Writes metrics of a run. Every call writes through to the system, so that a crash of the program loses nothing.
#[derive(Debug)]
pub struct MetricsWriter {
    run_name: String,
    first_step: u64,
    own: JsonLines,
    named: Option<JsonLines>,
    events: Option<EventFile>,
}

impl MetricsWriter {
    /// Opens the files of a run: `metrics/metrics.jsonl`, `tensorboard/events...` and the one that is named. What an
    /// earlier run logged beyond the first step of this one is dropped; see [`MetricsOptions::resume_step`].
    ///
    /// # Errors
    /// When the file system refuses, or the named file holds something else than metrics.
    pub fn open(run_dir: &Path, run_name: &str, options: &MetricsOptions) -> Result<Self> {
        let first_step = options.resume_step.unwrap_or(0);
        let open = |path: &Path, key| JsonLines::open(path, run_name, first_step, key);
        // The named file first: it may be the wrong one, and then nothing else should have been touched.
        let mut named = options.metrics_file.as_deref().map(|path| open(path, "metrics_file")).transpose()?;
        let own = open(&metrics_path(run_dir), "run_name")?;
        if let Some(file) = &named
            && file.is_same(&own)?
        {
            named = None;
        }
        Ok(MetricsWriter {
            run_name: run_name.to_owned(),
            first_step,
            own,
            named,
            events: if options.tensorboard {
                Some(EventFile::create(&run_dir.join("tensorboard"), first_step)?)
            } else {
                None
            },
        })
    }

    /// Logs a training step.
    ///
    /// # Errors
    /// When a file cannot be written. What was written before stays readable, and the next step may succeed.
    pub fn log_step(&mut self, metrics: &StepMetrics) -> Result<()> {
        self.log(metrics.step, &metrics.scalars(), ABSENT)
    }

    /// Logs an evaluation, at the training step after which it ran.
    ///
    /// # Errors
    /// As [`Self::log_step`].
    pub fn log_eval(&mut self, metrics: &EvalMetrics) -> Result<()> {
        self.log(metrics.step, &metrics.scalars(), &[])
    }

    fn log(&mut self, step: u64, scalars: &[Scalar], absent: &[Scalar]) -> Result<()> {
        let now = now();
        let object = jsonl::object(&self.run_name, step, now, scalars);
        self.own.append(&object)?;
        if let Some(named) = &mut self.named {
            let mut object = object;
            object.extend(absent.iter().map(|(key, value)| ((*key).to_owned(), (*value).into())));
            named.append(&object)?;
        }
        if let Some(events) = &mut self.events {
            events.append(Event::Scalars(scalars), now, step)?;
        }
        Ok(())
    }

    /// Puts Markdown under a tag, at the first step of the run: the configuration, the summary of the start. Only
    /// TensorBoard shows it.
    ///
    /// # Errors
    /// As [`Self::log_step`].
    pub fn text(&mut self, tag: &str, markdown: &str) -> Result<()> {
        match &mut self.events {
            Some(events) => events.append(Event::Text(tag, markdown), now(), self.first_step),
            None => Ok(()),
        }
    }

    /// Waits until everything is on disk, so that a crash of the machine loses nothing either.
    ///
    /// # Errors
    /// When the file system refuses.
    pub fn flush(&mut self) -> Result<()> {
        self.own.sync()?;
        self.named.as_ref().map_or(Ok(()), JsonLines::sync)?;
        self.events.as_ref().map_or(Ok(()), EventFile::sync)
    }
}

/// Where a run directory has its metrics.
#[must_use]
pub fn metrics_path(run_dir: &Path) -> PathBuf {
    run_dir.join("metrics").join("metrics.jsonl")
}

/// A file of TensorBoard's events.
#[derive(Debug)]
struct EventFile {
    file: fs::File,
    length: u64,
}

impl EventFile {
    /// A new file, which says that steps from `first_step` on in older files no longer count.
    fn create(dir: &Path, first_step: u64) -> Result<Self> {
        fs::create_dir_all(dir)?;
        let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let host: String = host.trim().chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
        let host = if host.is_empty() { "localhost" } else { &host };
        // TensorBoard reads files in the order of their names, so that a clock set back must not name this one first.
        let mut time = newest(dir)?.map_or(0, |t| t.saturating_add(1)).max(now() as u64);
        let file = loop {
            let path = dir.join(format!("events.out.tfevents.{time:010}.{host}"));
            match fs::OpenOptions::new().create_new(true).append(true).open(&path) {
                Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => time += 1,
                other => break other?,
            }
        };
        let mut events = EventFile { file, length: 0 };
        events.append(Event::FileVersion, now(), 0)?;
        events.append(Event::SessionStart, now(), first_step)?;
        Ok(events)
    }

    fn append(&mut self, event: Event<'_>, seconds: f64, step: u64) -> Result<()> {
        let mut bytes = Vec::new();
        record::frame(&mut bytes, &event.encode(seconds, step));
        jsonl::append(&mut self.file, &mut self.length, &bytes)
    }

    fn sync(&self) -> Result<()> {
        Ok(self.file.sync_data()?)
    }
}

/// The latest time in a name of an event file.
fn newest(dir: &Path) -> Result<Option<u64>> {
    let mut newest = None;
    for entry in fs::read_dir(dir)? {
        let name = entry?.file_name();
        let time = name.to_str().and_then(|n| n.strip_prefix("events.out.tfevents.")?.split('.').next()?.parse().ok());
        newest = newest.max(time);
    }
    Ok(newest)
}

/// Seconds since 1970.
fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::super::record::tests::records;
    use super::super::step::tests::sample;
    use super::*;

    fn open(dir: &Path, resume_step: Option<u64>) -> MetricsWriter {
        let options = MetricsOptions { metrics_file: Some(dir.join("theirs.jsonl")), tensorboard: true, resume_step };
        MetricsWriter::open(dir, "run", &options).unwrap()
    }

    fn event_files(dir: &Path) -> Vec<PathBuf> {
        let mut files: Vec<_> = fs::read_dir(dir.join("tensorboard")).unwrap().map(|e| e.unwrap().path()).collect();
        files.sort();
        files
    }

    #[test]
    fn a_run_that_is_killed_and_resumed() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = open(dir.path(), None);
        writer.text("config", "`steps`: 9").unwrap();
        for step in 0..6 {
            writer.log_step(&sample(step)).unwrap();
        }
        let mut eval = EvalMetrics::begin(5);
        eval.add(20.0, 10.0, 0.0, 0.1);
        writer.log_eval(&eval).unwrap();
        drop(writer);
        let mut writer = open(dir.path(), Some(4));
        for step in 4..9 {
            writer.log_step(&sample(step)).unwrap();
        }
        writer.flush().unwrap();

        for file in [metrics_path(dir.path()), dir.path().join("theirs.jsonl")] {
            let text = fs::read_to_string(&file).unwrap();
            let lines: Vec<serde_json::Value> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
            let steps: Vec<_> = lines.iter().filter_map(|l| l["step"].as_u64()).collect();
            assert_eq!(steps, (0..9).collect::<Vec<_>>(), "{}", file.display());
            assert!(lines.iter().all(|l| l["learning/loss"] == 8.917_154 && l["run_name"] == "run"));
            assert_eq!(lines[0].get("learning/mtp_loss").is_some(), file.ends_with("theirs.jsonl"));
        }
        let files = event_files(dir.path());
        assert_eq!(files.len(), 2);
        let second = fs::read(&files[1]).unwrap();
        let second = records(&second);
        assert_eq!(second.len(), 2 + 5);
        assert!(second[0].ends_with(b"brain.Event:2"));
        assert!(second[1].ends_with(b"\x10\x04\x3a\x02\x08\x01"), "{:?}", second[1]);
        assert!(second[2].windows(13).any(|w| w == b"learning/loss"));
    }

    #[test]
    fn one_file_under_two_names_is_written_once() {
        let dir = tempfile::tempdir().unwrap();
        let options = MetricsOptions { metrics_file: Some(metrics_path(dir.path())), ..Default::default() };
        MetricsWriter::open(dir.path(), "run", &options).unwrap().log_step(&sample(0)).unwrap();
        assert_eq!(fs::read_to_string(metrics_path(dir.path())).unwrap().lines().count(), 1);
    }

    #[test]
    fn names_of_event_files_only_grow() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("tensorboard")).unwrap();
        fs::write(dir.path().join("tensorboard/events.out.tfevents.9000000000.host"), b"").unwrap();
        for _ in 0..3 {
            open(dir.path(), None);
        }
        let names: Vec<_> = event_files(dir.path());
        assert_eq!(names.len(), 4);
        assert!(names[0].to_string_lossy().ends_with(".9000000000.host"));
    }

    #[test]
    fn a_wrong_file_stops_before_anything_is_touched() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("theirs.jsonl"), "dear diary\n").unwrap();
        let options = MetricsOptions { metrics_file: Some(dir.path().join("theirs.jsonl")), ..Default::default() };
        let run = dir.path().join("run");
        assert!(MetricsWriter::open(&run, "run", &options).is_err());
        assert!(!run.exists());
    }
}
